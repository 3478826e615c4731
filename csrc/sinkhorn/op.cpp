// Sinkhorn for torch: checks, centring, the driver of a solve, derivatives.
//
// Squared Euclidean cost: each cloud is centred on its own mean in float64, for with d = mean(x) - mean(y)
//     |x - y|^2 = |x' - y'|^2 + 2 x'.d - 2 y'.d + |d|^2
// and the linear terms are absorbed by the potentials. Euclidean cost: both are centred on the midpoint of the means.
// Inside this file potentials are those of the centred problem.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/log.h>
#include <ATen/ops/log2.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "../backend.h"
#include "../checks.h"
#include "kernels.h"

namespace wgan_ext::sinkhorn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What the caller asked for, shared by both operators.
struct Request {
  const char* op;
  Cost cost;
  std::optional<double> epsilon;
  std::optional<double> scaling;
  double tolerance;
  int64_t max_iter;
  std::optional<double> relaxation;
};

Cost parse_cost(const char* op, std::string_view cost) {
  TORCH_CHECK_VALUE(cost == "sqeuclidean" || cost == "euclidean", op,
                    ": cost must be \"sqeuclidean\" or \"euclidean\", got \"", cost, "\"");
  return cost == "sqeuclidean" ? Cost::sqeuclidean : Cost::euclidean;
}

Request parse(const char* op, std::string_view cost, std::optional<double> epsilon, std::optional<double> scaling,
              double tolerance, int64_t max_iter, std::optional<double> relaxation) {
  if (epsilon) check_positive(op, "epsilon", *epsilon);
  TORCH_CHECK_VALUE(!scaling || (*scaling > 0 && *scaling < 1), op, ": scaling must be in (0, 1), or None, got ",
                    scaling.value_or(0));
  TORCH_CHECK_VALUE(tolerance >= 0 && std::isfinite(tolerance), op, ": tol must be finite and not negative, got ",
                    tolerance);
  TORCH_CHECK_VALUE(max_iter >= 1, op, ": max_iter must be at least 1, got ", max_iter);
  TORCH_CHECK_VALUE(!relaxation || (*relaxation >= 1 && *relaxation < 2), op,
                    ": relaxation must be \"auto\" or in [1, 2), got ", relaxation.value_or(0));
  return {op, parse_cost(op, cost), epsilon, scaling, tolerance, max_iter, relaxation};
}

// A weighted cloud, centred, in the type of the kernels.
struct Measure {
  Tensor points;       // [count, dim]
  Tensor squares;      // [count], zeros for the Euclidean cost
  Tensor weights;      // [count]
  Tensor log_weights;  // [count]
  Tensor mass;         // [] double
  Tensor mean;         // [dim] double, of the original points
  Tensor spread;       // [] double, weighted mean of |x'|^2
};

struct Problem {
  Cost cost;
  Measure x, y;
  Tensor shift;       // [dim] double, mean(x) - mean(y)
  Tensor shift_cost;  // [] double, |shift|^2; zero for the Euclidean cost
};

at::ScalarType kernel_type(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

void check_cloud(const char* op, const char* name, const Tensor& t) {
  check_floating(op, name, t);
  TORCH_CHECK_VALUE(t.dim() == 2 && t.size(0) > 0 && t.size(1) > 0, op, ": ", name,
                    " must be points of shape (count, dim), at least one of each, got ", t.sizes());
}

void check_weights(const char* op, const char* name, const OptionalTensor& w, const char* points_name,
                   const Tensor& points) {
  if (!w) return;
  check_floating(op, name, *w);
  check_shape(op, name, *w, {points.size(0)});
  check_same_device(op, name, *w, points_name, points);
}

// Weighted mean in double.
Tensor weighted_mean(const Tensor& points, const Tensor& weights, const Tensor& mass) {
  return at::sum(points * weights.unsqueeze(1), {0}) / mass;
}

Measure measure(const Tensor& points, const Tensor& weights, const Tensor& mass, const Tensor& mean,
                const Tensor& centre, Cost cost) {
  const auto type = kernel_type(points);
  Measure m;
  m.points = at::sub(points, centre).to(type).contiguous();
  const Tensor squares = at::sum(m.points * m.points, {1}, false, at::kDouble);
  m.spread = at::sum(squares * weights) / mass;
  m.squares = cost == Cost::sqeuclidean ? squares.to(type) : at::zeros({points.size(0)}, m.points.options());
  m.weights = weights.to(type);
  m.log_weights = at::where(weights > 0, at::log2(weights), at::scalar_tensor(kLogZero, weights.options())).to(type);
  m.mass = mass;
  m.mean = mean;
  return m;
}

Problem prepare(const char* op, Cost cost, const Tensor& x, const Tensor& y, const OptionalTensor& a,
                const OptionalTensor& b) {
  check_cloud(op, "x", x);
  check_cloud(op, "y", y);
  check_same_device(op, "y", y, "x", x);
  check_same_dtype(op, "y", y, "x", x);
  TORCH_CHECK_VALUE(x.size(1) == y.size(1), op, ": y must have the dimension of x (", x.size(1), "), got ", y.size(1));
  check_weights(op, "a", a, "x", x);
  check_weights(op, "b", b, "y", y);
  const auto doubles = x.options().dtype(at::kDouble);
  const auto uniform = [&](const Tensor& t) {
    return at::full({t.size(0)}, 1.0 / static_cast<double>(t.size(0)), doubles);
  };
  const Tensor wa = a ? a->detach().to(at::kDouble) : uniform(x);
  Tensor wb = b ? b->detach().to(at::kDouble) : uniform(y);
  const Tensor mass_a = at::sum(wa), mass_b = at::sum(wb);
  const Tensor mean_x = weighted_mean(x.detach(), wa, mass_a), mean_y = weighted_mean(y.detach(), wb, mass_b);
  if (x.is_cpu()) {
    const auto check_values = [&](const char* name, const char* weights_name, const Tensor& w, double mass,
                                  const Tensor& mean) {
      TORCH_CHECK_VALUE(std::isfinite(mass) && w.min().item<double>() >= 0 && mass > 0, op, ": ", weights_name,
                        " must be finite and not negative, with a positive sum");
      TORCH_CHECK_VALUE(at::isfinite(mean).all().item<bool>(), op, ": ", name, " must be finite");
    };
    const double ma = mass_a.item<double>(), mb = mass_b.item<double>();
    check_values("x", "a", wa, ma, mean_x);
    check_values("y", "b", wb, mb, mean_y);
    const double rounding = kernel_type(x) == at::kDouble ? 1e-6 : (x.scalar_type() == at::kFloat ? 1e-4 : 1e-2);
    TORCH_CHECK_VALUE(std::abs(ma - mb) <= rounding * ma, op,
                      ": a and b must have the same sum (balanced transport), got ", ma, " and ", mb,
                      "; divide each by its sum");
  }
  wb = wb * (mass_a / mass_b);
  Problem p;
  p.cost = cost;
  p.shift = mean_x - mean_y;
  const bool squared = cost == Cost::sqeuclidean;
  const Tensor middle = squared ? Tensor() : (mean_x + mean_y) / 2;
  p.shift_cost = squared ? at::sum(p.shift * p.shift) : at::zeros({}, doubles);
  p.x = measure(x.detach(), wa, mass_a, mean_x, squared ? mean_x : middle, cost);
  p.y = measure(y.detach(), wb, mass_a, mean_y, squared ? mean_y : middle, cost);
  return p;
}

// The mean cost where it has a closed form; for the Euclidean cost its upper bound, the root mean square distance.
Tensor mean_cost(const Problem& p, bool centred) {
  const Tensor spread = p.x.spread + p.y.spread;
  if (p.cost == Cost::sqeuclidean) return centred ? spread : spread + p.shift_cost;
  return at::sqrt(spread + at::sum(p.shift * p.shift) / 2);
}

Tensor resolve_epsilon(const Problem& p, const Request& request) {
  if (request.epsilon) return at::full({}, *request.epsilon, p.shift.options());
  const Tensor epsilon = 0.05 * mean_cost(p, false);
  return at::where(epsilon > 0, epsilon, at::ones({}, epsilon.options()));  // all points in one place
}

// log(1 / least positive weight)
Tensor weight_range(const Measure& m) {
  return -at::log(at::where(m.weights > 0, m.weights, m.mass.to(m.weights.scalar_type())).min()).to(at::kDouble);
}

// The potential of the original cost from that of the centred one, and back. `sign` is +1 for x, -1 for y.
Tensor linear_part(const Problem& p, const Measure& m, double sign) {
  if (p.cost == Cost::euclidean) return at::zeros({m.points.size(0)}, p.shift.options());
  return 2 * sign * at::sum(m.points * p.shift, {1}) + p.shift_cost / 2;
}

struct Solution {
  Tensor f, g;     // of the centred problem, in the type of the kernels
  Tensor facts;    // [5] double: error, mass of the plan, iterations, converged, epsilon
  Tensor control;  // bytes
  bool converged = true;
};

template <typename T>
class Solver {
 public:
  Solver(const Problem& problem, const Tensor& epsilon, const Request& request)
      : problem_(problem), kernels_(kernels_for<Kernels<T>>(request.op, problem.x.points)), scope_(problem.x.points) {
    options_.scaling = request.scaling.value_or(0);
    options_.tolerance = request.tolerance;
    options_.relaxation = request.relaxation.value_or(0);
    options_.exponent_limit = sizeof(T) == 4 ? 80 : 700;
    options_.max_iter = request.max_iter;
    options_.number = 1;
    const Tensor start = mean_cost(problem, true), range_x = weight_range(problem.x), range_y = weight_range(problem.y);
    facts_ = at::stack({epsilon, start, range_x, range_y});
    facts_y_ = at::stack({epsilon, start, range_y, range_x});
    columns_x_ = pack(problem.x);
    columns_y_ = pack(problem.y);
  }

  // x (or y) against itself: averaged updates from 0.
  Solution self(Role role) {
    const bool of_x = role == Role::rows;
    const Measure& m = of_x ? problem_.x : problem_.y;
    Side side = make_side(m, of_x ? columns_x_ : columns_y_, m, {});
    const Tensor control = bytes(sizeof(Control));
    Control* c = static_cast<Control*>(control.mutable_data_ptr());
    Sums* sums = make_sums(m, m);
    const int64_t count = sums_count(m, m);
    kernels_.begin(c, (of_x ? facts_ : facts_y_).template const_data_ptr<double>(), options_, nullptr, nullptr,
                   stream());
    kernels_.set_bias(c, side.cloud, stream());
    for (int64_t i = 0; i <= options_.max_iter; ++i) {
      kernels_.pass(c, side.cloud, side.cloud, dim(), problem_.cost, sums, stream());
      kernels_.advance(c, Event::self, sums, count, stream());
      if (finished(c, i)) break;
      kernels_.apply(c, side.cloud, Role::self, stream());
    }
    return finish(side.potential, side.potential, control);
  }

  // x against y from nothing, from given potentials, or from the self terms if that start is the better one.
  Solution cross(const OptionalTensor& f, const OptionalTensor& g, const Solution* self_x, const Solution* self_y) {
    Side x = make_side(problem_.x, columns_x_, problem_.y, f), y = make_side(problem_.y, columns_y_, problem_.x, g);
    if (self_x) {
      x.start = at::empty_like(x.potential);
      y.start = at::empty_like(y.potential);
      x.cloud.start = x.start.template mutable_data_ptr<T>();
      y.cloud.start = y.start.template mutable_data_ptr<T>();
    }
    const Tensor control = bytes(sizeof(Control));
    Control* c = static_cast<Control*>(control.mutable_data_ptr());
    Sums* sums = make_sums(problem_.x, problem_.y);
    const int64_t row_sums = sums_count(problem_.x, problem_.y), column_sums = sums_count(problem_.y, problem_.x);
    const auto control_of = [](const Solution* s) {
      return s ? static_cast<const Control*>(s->control.const_data_ptr()) : nullptr;
    };
    const auto rows = [&](Event event) {
      kernels_.pass(c, x.cloud, y.cloud, dim(), problem_.cost, sums, stream());
      kernels_.advance(c, event, sums, row_sums, stream());
    };
    const auto columns = [&](Event event) {
      kernels_.pass(c, y.cloud, x.cloud, dim(), problem_.cost, sums, stream());
      kernels_.advance(c, event, sums, column_sums, stream());
    };
    kernels_.begin(c, facts_.template const_data_ptr<double>(), options_, control_of(self_x), control_of(self_y),
                   stream());
    if (f) {
      kernels_.set_bias(c, x.cloud, stream());
      kernels_.set_bias(c, y.cloud, stream());
      rows(Event::probe_rows);
      columns(self_x ? Event::probe_columns_then_cold : Event::probe_columns);
    }
    if (!f || self_x) {
      if (!f) kernels_.advance(c, Event::cold, nullptr, 0, stream());
      kernels_.set_cold(c, x.cloud, Role::rows, stream());
      kernels_.set_cold(c, y.cloud, Role::columns, stream());
      rows(Event::rows);
    }
    for (int64_t i = 0; i < options_.max_iter && !finished(c, i); ++i) {
      kernels_.apply(c, x.cloud, Role::rows, stream());
      columns(Event::columns);
      kernels_.apply(c, y.cloud, Role::columns, stream());
      rows(Event::rows);
    }
    return finish(x.potential, y.potential, control);
  }

  // The forces of `rows` by the plan with `columns` (Kernels::gradient), and the plan's row sums.
  std::tuple<Tensor, Tensor> gradient(const Tensor& f, const Tensor& g, const Tensor& epsilon) {
    Side x = make_side(problem_.x, columns_x_, problem_.y, f), y = make_side(problem_.y, columns_y_, problem_.x, g);
    const Tensor control = bytes(sizeof(Control));
    Control* c = static_cast<Control*>(control.mutable_data_ptr());
    kernels_.begin(c, facts_.template const_data_ptr<double>(), options_, nullptr, nullptr, stream());
    kernels_.set_bias(c, y.cloud, stream());
    Tensor force = at::empty_like(problem_.x.points), mass = at::empty_like(problem_.x.weights);
    kernels_.gradient(epsilon.const_data_ptr<double>(), x.cloud, y.cloud, dim(), problem_.cost,
                      force.template mutable_data_ptr<T>(), mass.template mutable_data_ptr<T>(), stream());
    return {force, mass};
  }

 private:
  struct Side {
    Tensor potential, softmin, start, bias, scratch;
    Cloud<T> cloud;
  };

  Stream stream() const { return scope_.stream(); }
  int64_t dim() const { return problem_.x.points.size(1); }
  Tensor bytes(int64_t size) const { return at::empty({size}, problem_.x.points.options().dtype(at::kByte)); }
  Tensor values(int64_t size) const { return at::empty({size}, problem_.x.points.options()); }

  Tensor pack(const Measure& m) {
    const int64_t count = m.points.size(0);
    Tensor columns = values(kernels_.columns_size(count, dim()));
    kernels_.pack(m.points.template const_data_ptr<T>(), count, dim(), columns.template mutable_data_ptr<T>(),
                  stream());
    return columns;
  }

  int64_t sums_count(const Measure& rows, const Measure& columns) const {
    return kernels_.sums_size(rows.points.size(0), columns.points.size(0), dim());
  }

  Sums* make_sums(const Measure& x, const Measure& y) {
    sums_ = bytes(std::max(sums_count(x, y), sums_count(y, x)) * static_cast<int64_t>(sizeof(Sums)));
    return static_cast<Sums*>(sums_.mutable_data_ptr());
  }

  Side make_side(const Measure& m, const Tensor& columns, const Measure& other, const OptionalTensor& potential) {
    const int64_t count = m.points.size(0);
    Side s;
    s.potential = potential ? potential->clone() : at::zeros({count}, m.points.options());
    s.softmin = s.potential.clone();
    s.bias = values(kernels_.padded(count));
    s.scratch = values(kernels_.scratch_size(count, dim(), other.points.size(0)));
    s.cloud = {m.points.template const_data_ptr<T>(),
               columns.template const_data_ptr<T>(),
               m.squares.template const_data_ptr<T>(),
               m.weights.template const_data_ptr<T>(),
               m.log_weights.template const_data_ptr<T>(),
               s.potential.template mutable_data_ptr<T>(),
               s.softmin.template mutable_data_ptr<T>(),
               nullptr,
               s.bias.template mutable_data_ptr<T>(),
               s.scratch.template mutable_data_ptr<T>(),
               count};
    return s;
  }

  bool finished(const Control* c, int64_t iteration) const {
    return (iteration + 1) % kernels_.iterations_per_poll == 0 && kernels_.finished(c, stream());
  }

  Solution finish(const Tensor& f, const Tensor& g, const Tensor& control) const {
    Tensor facts = at::empty({5}, problem_.shift.options());
    const Control* c = static_cast<const Control*>(control.const_data_ptr());
    kernels_.report(c, facts.template mutable_data_ptr<double>(), stream());
    return {f, g, facts, control, !control.is_cpu() || c->converged != 0};
  }

  const Problem& problem_;
  const Kernels<T>& kernels_;
  DeviceScope scope_;
  Options options_;
  Tensor facts_, facts_y_, columns_x_, columns_y_, sums_;
};

// The dual of x against y at the potentials of the solution, without |shift|^2. [] double
Tensor dual(const Measure& x, const Measure& y, const Solution& s) {
  const auto integral = [](const Measure& m, const Tensor& potential) {
    return at::sum(m.weights * potential, at::kDouble);
  };
  return integral(x, s.f) + integral(y, s.g) - s.facts[4] * (s.facts[1] - x.mass * y.mass);
}

void warn_unless_converged(const Request& request, std::initializer_list<const Solution*> solutions) {
  if (request.tolerance == 0) return;
  for (const Solution* s : solutions) {
    if (s->converged) continue;
    TORCH_WARN(request.op, ": not converged after ", request.max_iter, " iterations: marginal error ",
               s->facts[0].item<double>(), " > tol ", request.tolerance,
               "; raise max_iter, epsilon or tol (tol=0.0 runs exactly max_iter iterations and does not warn)");
    return;
  }
}

// Calls body with a value of the kernels' type.
template <typename Body>
auto with_type(at::ScalarType type, const Body& body) {
  return type == at::kDouble ? body(double{}) : body(float{});
}

using CostResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using DivergenceResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

CostResult sinkhorn(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                    std::string_view cost, std::optional<double> epsilon, std::optional<double> scaling, double tol,
                    int64_t max_iter, std::optional<double> relaxation, const OptionalTensor& f,
                    const OptionalTensor& g) {
  constexpr const char* op = "sinkhorn";
  const Request request = parse(op, cost, epsilon, scaling, tol, max_iter, relaxation);
  const Problem p = prepare(op, request.cost, x, y, a, b);
  const auto type = kernel_type(x);
  const Tensor linear_x = linear_part(p, p.x, 1), linear_y = linear_part(p, p.y, -1);
  const auto centred = [&](const char* name, const OptionalTensor& potential, const char* points_name,
                           const Tensor& points, const Tensor& linear) -> OptionalTensor {
    if (!potential) return std::nullopt;
    check_weights(op, name, potential, points_name, points);
    const Tensor start = (potential->detach().to(at::kDouble) - linear).to(type);
    if (x.is_cpu()) TORCH_CHECK_VALUE(at::isfinite(start).all().item<bool>(), op, ": ", name, " must be finite");
    return start;
  };
  TORCH_CHECK_VALUE(f.has_value() == g.has_value(), op, ": init must hold both potentials, f and g");
  const OptionalTensor f0 = centred("init f", f, "x", x, linear_x), g0 = centred("init g", g, "y", y, linear_y);
  const Tensor target = resolve_epsilon(p, request);
  const Solution s = with_type(
      type, [&](auto scalar) { return Solver<decltype(scalar)>(p, target, request).cross(f0, g0, nullptr, nullptr); });
  warn_unless_converged(request, {&s});
  const Tensor value = dual(p.x, p.y, s) + p.x.mass * p.shift_cost;
  return {value.to(type),      (s.f + linear_x).to(type), (s.g + linear_y).to(type), s.f,   s.g,
          s.facts[0].to(type), s.facts[2].to(at::kLong),  s.facts[3].to(at::kBool),  target};
}

DivergenceResult sinkhorn_divergence(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                                     std::string_view cost, std::optional<double> epsilon,
                                     std::optional<double> scaling, double tol, int64_t max_iter,
                                     std::optional<double> relaxation) {
  constexpr const char* op = "sinkhorn_divergence";
  const Request request = parse(op, cost, epsilon, scaling, tol, max_iter, relaxation);
  const Problem p = prepare(op, request.cost, x, y, a, b);
  const auto type = kernel_type(x);
  const Tensor target = resolve_epsilon(p, request);
  const auto [xx, yy, xy] = with_type(type, [&](auto scalar) {
    Solver<decltype(scalar)> solver(p, target, request);
    const Solution xx = solver.self(Role::rows), yy = solver.self(Role::columns);
    return std::make_tuple(xx, yy, solver.cross(xx.f, yy.f, &xx, &yy));
  });
  warn_unless_converged(request, {&xy, &xx, &yy});
  const Tensor value = dual(p.x, p.y, xy) - (dual(p.x, p.x, xx) + dual(p.y, p.y, yy)) / 2 + p.x.mass * p.shift_cost;
  const Tensor facts = at::stack({xy.facts, xx.facts, yy.facts});
  return {value.to(type),
          xy.f,
          xy.g,
          xx.f,
          yy.f,
          facts.select(1, 0).amax().to(type),
          xy.facts[2].to(at::kLong),
          facts.select(1, 3).amin().to(at::kBool),
          target};
}

// d cost / d x = 2 sum_j plan_ij (x_i - y_j), or sum_j plan_ij (x_i - y_j) / |x_i - y_j|, at frozen potentials of the
// centred problem. [N, D]
Tensor sinkhorn_gradient(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                         const Tensor& f, const Tensor& g, const Tensor& epsilon, std::string_view cost) {
  const Request request = parse("sinkhorn_gradient", cost, {}, {}, 0, 1, {});
  const Problem p = prepare(request.op, request.cost, x, y, a, b);
  const auto [force, mass] = with_type(kernel_type(x), [&](auto scalar) {
    return Solver<decltype(scalar)>(p, epsilon, request).gradient(f, g, epsilon);
  });
  if (request.cost == Cost::euclidean) return force.to(x.scalar_type());
  return (2 * (force + mass.unsqueeze(1) * p.shift)).to(x.scalar_type());
}

// d cost / d a = f, defined up to a constant: the potential of the original problem from that of the centred one. [N]
Tensor sinkhorn_weight_gradient(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                                const Tensor& f, std::string_view cost) {
  const Request request = parse("sinkhorn_weight_gradient", cost, {}, {}, 0, 1, {});
  const Problem p = prepare(request.op, request.cost, x, y, a, b);
  return (f + linear_part(p, p.x, 1)).to(f.scalar_type());
}

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

const auto& gradient_op() {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("wgan_ext::sinkhorn_gradient", "")
                                 .typed<decltype(sinkhorn_gradient)>();
  return handle;
}

const auto& weight_gradient_op() {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("wgan_ext::sinkhorn_weight_gradient", "")
                                 .typed<decltype(sinkhorn_weight_gradient)>();
  return handle;
}

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
Tensor plain(const OptionalTensor& t) { return t.value_or(Tensor()); }

// Which of x, y, a, b need a gradient; torch counts only the tensors that are there.
struct Needs {
  bool x, y, a, b;
  Needs(const AutogradContext& ctx, const OptionalTensor& given_a, const OptionalTensor& given_b)
      : x(ctx.needs_input_grad(0)),
        y(ctx.needs_input_grad(1)),
        a(given_a && ctx.needs_input_grad(2)),
        b(given_b && ctx.needs_input_grad(given_a ? 3 : 2)) {}
};

// Envelope theorem: the dual's partial derivatives at the returned potentials. Inputs x, y, a, b come first.
class SinkhornFunction : public torch::autograd::Function<SinkhornFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const OptionalTensor& a,
                               const OptionalTensor& b, const std::string& cost, std::optional<double> epsilon,
                               std::optional<double> scaling, double tol, int64_t max_iter,
                               std::optional<double> relaxation, const OptionalTensor& f, const OptionalTensor& g) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto handle =
        c10::Dispatcher::singleton().findSchemaOrThrow("wgan_ext::sinkhorn", "").typed<decltype(sinkhorn)>();
    const auto [value, f1, g1, fc, gc, error, iterations, converged, used] =
        handle.call(x, y, a, b, cost, epsilon, scaling, tol, max_iter, relaxation, f, g);
    ctx->saved_data["cost"] = cost;
    ctx->save_for_backward({x, y, plain(a), plain(b), fc, gc, used});
    ctx->mark_non_differentiable({f1, g1, fc, gc, error, iterations, converged, used});
    return {value, f1, g1, fc, gc, error, iterations, converged, used};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &y = saved[1], &f = saved[4], &g = saved[5], &epsilon = saved[6];
    const OptionalTensor a = optional(saved[2]), b = optional(saved[3]);
    const std::string cost = ctx->saved_data["cost"].toStringRef();
    const Needs needs(*ctx, a, b);
    variable_list inputs(12);
    if (needs.x) inputs[0] = grads[0].to(x.scalar_type()) * gradient_op().call(x, y, a, b, f, g, epsilon, cost);
    if (needs.y) inputs[1] = grads[0].to(y.scalar_type()) * gradient_op().call(y, x, b, a, g, f, epsilon, cost);
    if (needs.a) inputs[2] = grads[0] * weight_gradient_op().call(x, y, a, b, f, cost);
    if (needs.b) inputs[3] = grads[0] * weight_gradient_op().call(y, x, b, a, g, cost);
    return inputs;
  }
};

class DivergenceFunction : public torch::autograd::Function<DivergenceFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const OptionalTensor& a,
                               const OptionalTensor& b, const std::string& cost, std::optional<double> epsilon,
                               std::optional<double> scaling, double tol, int64_t max_iter,
                               std::optional<double> relaxation) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto handle = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("wgan_ext::sinkhorn_divergence", "")
                                   .typed<decltype(sinkhorn_divergence)>();
    const auto [value, f, g, p, q, error, iterations, converged, used] =
        handle.call(x, y, a, b, cost, epsilon, scaling, tol, max_iter, relaxation);
    ctx->saved_data["cost"] = cost;
    ctx->save_for_backward({x, y, plain(a), plain(b), f, g, p, q, used});
    ctx->mark_non_differentiable({f, g, p, q, error, iterations, converged, used});
    return {value, f, g, p, q, error, iterations, converged, used};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &y = saved[1], &f = saved[4], &g = saved[5], &p = saved[6], &q = saved[7],
                 &epsilon = saved[8];
    const OptionalTensor a = optional(saved[2]), b = optional(saved[3]);
    const std::string cost = ctx->saved_data["cost"].toStringRef();
    const auto& points = gradient_op();
    const auto& weights = weight_gradient_op();
    const Needs needs(*ctx, a, b);
    variable_list inputs(10);
    if (needs.x)
      inputs[0] = grads[0].to(x.scalar_type()) *
                  (points.call(x, y, a, b, f, g, epsilon, cost) - points.call(x, x, a, a, p, p, epsilon, cost));
    if (needs.y)
      inputs[1] = grads[0].to(y.scalar_type()) *
                  (points.call(y, x, b, a, g, f, epsilon, cost) - points.call(y, y, b, b, q, q, epsilon, cost));
    if (needs.a) inputs[2] = grads[0] * (weights.call(x, y, a, b, f, cost) - weights.call(x, x, a, a, p, cost));
    if (needs.b) inputs[3] = grads[0] * (weights.call(y, x, b, a, g, cost) - weights.call(y, y, b, b, q, cost));
    return inputs;
  }
};

CostResult sinkhorn_autograd(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                             std::string_view cost, std::optional<double> epsilon, std::optional<double> scaling,
                             double tol, int64_t max_iter, std::optional<double> relaxation, const OptionalTensor& f,
                             const OptionalTensor& g) {
  const variable_list r =
      SinkhornFunction::apply(x, y, a, b, std::string(cost), epsilon, scaling, tol, max_iter, relaxation, f, g);
  return {r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8]};
}

DivergenceResult divergence_autograd(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                                     std::string_view cost, std::optional<double> epsilon,
                                     std::optional<double> scaling, double tol, int64_t max_iter,
                                     std::optional<double> relaxation) {
  const variable_list r =
      DivergenceFunction::apply(x, y, a, b, std::string(cost), epsilon, scaling, tol, max_iter, relaxation);
  return {r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8]};
}

// The gradient operators have no derivative of their own: the potentials they hold fixed move with the points.
class RefusedFunction : public torch::autograd::Function<RefusedFunction> {
 public:
  static Tensor forward(AutogradContext*, const Tensor& x, const Tensor& y, const OptionalTensor& a,
                        const OptionalTensor& b, const Tensor& f, const OptionalTensor& g,
                        const OptionalTensor& epsilon, const std::string& cost) {
    at::AutoDispatchBelowADInplaceOrView below;
    if (!g) return weight_gradient_op().call(x, y, a, b, f, cost);
    return gradient_op().call(x, y, a, b, f, *g, *epsilon, cost);
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "sinkhorn: second derivatives are not implemented; detach the gradient of a sinkhorn "
                                "cost before differentiating through it");
  }
};

Tensor gradient_autograd(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                         const Tensor& f, const Tensor& g, const Tensor& epsilon, std::string_view cost) {
  return RefusedFunction::apply(x, y, a, b, f, OptionalTensor(g), OptionalTensor(epsilon), std::string(cost));
}

Tensor weight_gradient_autograd(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                                const Tensor& f, std::string_view cost) {
  return RefusedFunction::apply(x, y, a, b, f, OptionalTensor(), OptionalTensor(), std::string(cost));
}

void implement(torch::Library& m) {
  m.impl("sinkhorn", sinkhorn);
  m.impl("sinkhorn_divergence", sinkhorn_divergence);
  m.impl("sinkhorn_gradient", sinkhorn_gradient);
  m.impl("sinkhorn_weight_gradient", sinkhorn_weight_gradient);
}

}  // namespace

TORCH_LIBRARY_IMPL(wgan_ext, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(wgan_ext, CUDA, m) { implement(m); }
TORCH_LIBRARY_IMPL(wgan_ext, Autograd, m) {
  m.impl("sinkhorn", sinkhorn_autograd);
  m.impl("sinkhorn_divergence", divergence_autograd);
  m.impl("sinkhorn_gradient", gradient_autograd);
  m.impl("sinkhorn_weight_gradient", weight_gradient_autograd);
}

}  // namespace wgan_ext::sinkhorn
