// Sinkhorn for torch: checks, centring, the driver of a solve, derivatives.
//
// Inside this file all is a batch: points [B, N, D]; a single problem is a batch of one. Balanced problems with squared
// Euclidean cost: each cloud is centred on its own mean in float64, for with d = mean(x) - mean(y)
//     |x - y|^2 = |x' - y'|^2 + 2 x'.d - 2 y'.d + |d|^2
// and the linear terms are absorbed by the potentials. Else both are centred on the midpoint of the means. Inside this
// file potentials are those of the centred problem.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/log.h>
#include <ATen/ops/log2.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <functional>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "../backend.h"
#include "../checks.h"
#include "../parallel.h"
#include "../results.h"
#include "kernels.h"

namespace wgan_ext::sinkhorn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalNumber = std::optional<double>;

// The cost and the marginals' penalties: what a solve and its derivatives must agree on.
struct Terms {
  const char* op;
  Cost cost;
  double power;         // of the distance, for Cost::power
  double rho_x, rho_y;  // infinite for a hard marginal
  bool around_y;        // centred on y alone: no point of x moves another's result
  bool balanced() const { return std::isinf(rho_x) && std::isinf(rho_y); }
  // Whether each cloud is centred on its own mean.
  bool separate() const { return cost == Cost::sqeuclidean && balanced(); }
};

// What else the caller asked for.
struct Request {
  Terms terms;
  OptionalNumber epsilon;
  OptionalNumber scaling;
  double tolerance;
  int64_t max_iter;
  OptionalNumber relaxation;
  int64_t memory_limit;  // bytes
};

Terms parse_terms(const char* op, std::string_view name, double power, OptionalNumber rho_x, OptionalNumber rho_y) {
  constexpr std::string_view names[] = {"sqeuclidean", "euclidean", "l1", "power", "matrix"};
  int32_t cost = 0;
  while (cost < 5 && names[cost] != name) ++cost;
  TORCH_CHECK_VALUE(cost < 5, op,
                    ": cost must be \"sqeuclidean\", \"euclidean\", \"l1\" or a power of the distance, got \"", name,
                    "\"");
  if (static_cast<Cost>(cost) == Cost::power) check_positive(op, "the power of the distance", power);
  if (rho_x) check_positive(op, "the weight of the penalty on the marginal of x", *rho_x);
  if (rho_y) check_positive(op, "the weight of the penalty on the marginal of y", *rho_y);
  constexpr double infinite = std::numeric_limits<double>::infinity();
  return {op, static_cast<Cost>(cost), power, rho_x.value_or(infinite), rho_y.value_or(infinite), false};
}

Request parse(const Terms& terms, OptionalNumber epsilon, OptionalNumber scaling, double tolerance, int64_t max_iter,
              OptionalNumber relaxation, int64_t memory_limit) {
  const char* op = terms.op;
  if (epsilon) check_positive(op, "epsilon", *epsilon);
  TORCH_CHECK_VALUE(!scaling || (*scaling > 0 && *scaling < 1), op, ": scaling must be in (0, 1), or None, got ",
                    scaling.value_or(0));
  TORCH_CHECK_VALUE(tolerance >= 0 && std::isfinite(tolerance), op, ": tol must be finite and not negative, got ",
                    tolerance);
  TORCH_CHECK_VALUE(max_iter >= 1, op, ": max_iter must be at least 1, got ", max_iter);
  TORCH_CHECK_VALUE(!relaxation || (*relaxation >= 1 && *relaxation < 2), op,
                    ": relaxation must be \"auto\" or in [1, 2), got ", relaxation.value_or(0));
  TORCH_CHECK_VALUE(memory_limit >= 0, op, ": memory_limit must not be negative, got ", memory_limit);
  return {terms, epsilon, scaling, tolerance, max_iter, relaxation, memory_limit};
}

// A weighted cloud, centred, in the type of the kernels.
struct Measure {
  Tensor points;       // [B, count, dim]; dim 0 where the costs are given
  Tensor squares;      // [B, count], zeros but for the squared Euclidean cost
  Tensor weights;      // [B, count]
  Tensor log_weights;  // [B, count]
  Tensor mass;         // [B] double
  Tensor spread;       // [B] double, weighted mean of |x'|^2
  int64_t count() const { return points.size(1); }
};

struct Problem {
  Terms terms;
  Measure x, y;
  Tensor shift;       // [B, dim] double, mean(x) - mean(y)
  Tensor shift_cost;  // [B] double, |shift|^2; zero where the clouds are centred together
  Tensor matrix;      // [B, N, M] of the kernels' type, for Cost::matrix
  int64_t problems() const { return x.points.size(0); }
};

at::ScalarType kernel_type(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

Tensor batched(const Tensor& t, int64_t dim) { return t.dim() == dim ? t.unsqueeze(0) : t; }

void check_cloud(const char* op, const char* name, const Tensor& t) {
  check_floating(op, name, t);
  TORCH_CHECK_VALUE((t.dim() == 2 || t.dim() == 3) && t.numel() > 0, op, ": ", name,
                    " must be points of shape (count, dim) or (batch, count, dim), at least one of each, got ",
                    t.sizes());
}

// [N] for points [N, D], [B, N] for points [B, N, D].
at::IntArrayRef shape_of_weights(const Tensor& points) { return points.sizes().slice(0, points.dim() - 1); }

void check_weights(const char* op, const char* name, const OptionalTensor& w, at::IntArrayRef shape,
                   const char* other_name, const Tensor& other) {
  if (!w) return;
  check_floating(op, name, *w);
  check_shape(op, name, *w, shape);
  check_same_device(op, name, *w, other_name, other);
}

struct Weights {
  Tensor a, b;            // [B, N], [B, M] double
  Tensor mass_a, mass_b;  // [B] double
};

// The weights and their masses, equal where the problem is balanced.
Weights prepare_weights(const Terms& terms, const Tensor& like, int64_t problems, int64_t n, int64_t m,
                        const OptionalTensor& a, const OptionalTensor& b) {
  const auto doubles = like.options().dtype(at::kDouble);
  const auto weights = [&](const OptionalTensor& w, int64_t count) {
    return w ? batched(w->detach(), 1).to(at::kDouble)
             : at::full({problems, count}, 1.0 / static_cast<double>(count), doubles);
  };
  Weights w;
  w.a = weights(a, n);
  w.b = weights(b, m);
  w.mass_a = at::sum(w.a, {1});
  w.mass_b = at::sum(w.b, {1});
  if (like.is_cpu()) {
    const auto check = [&](const char* name, const Tensor& weights, const Tensor& mass) {
      TORCH_CHECK_VALUE(
          at::isfinite(mass).all().item<bool>() && weights.min().item<double>() >= 0 && mass.min().item<double>() > 0,
          terms.op, ": ", name, " must be finite and not negative, with a positive sum");
    };
    if (a) check("a", w.a, w.mass_a);
    if (b) check("b", w.b, w.mass_b);
    if (terms.balanced() && (a || b)) {
      const double rounding =
          kernel_type(like) == at::kDouble ? 1e-6 : (like.scalar_type() == at::kFloat ? 1e-4 : 1e-2);
      const Tensor excess = at::abs(w.mass_a - w.mass_b) - rounding * w.mass_a;
      if (excess.max().item<double>() > 0) {
        const int64_t worst = excess.argmax().item<int64_t>();
        TORCH_CHECK_VALUE(false, terms.op, ": a and b must have the same sum (balanced transport), got ",
                          w.mass_a[worst].item<double>(), " and ", w.mass_b[worst].item<double>(),
                          "; divide each by its sum, or let mass appear and vanish by reach");
      }
    }
  }
  if (terms.balanced() && (a || b)) {
    // both, so that the plan of (y, x) is that of (x, y), and a_i b_j stays
    const Tensor ratio = at::sqrt(w.mass_a / w.mass_b).unsqueeze(1);
    w.a = w.a / ratio;
    w.b = w.b * ratio;
    w.mass_a = w.mass_b = at::sqrt(w.mass_a * w.mass_b);
  }
  return w;
}

Measure measure(const Tensor& points, const Tensor& weights, const Tensor& mass, const Tensor& centre, Cost cost) {
  const auto type = kernel_type(points);
  Measure m;
  m.points = at::sub(points, centre.unsqueeze(1)).to(type).contiguous();
  const Tensor squares = at::sum(m.points * m.points, {2}, false, at::kDouble);
  m.spread = at::sum(squares * weights, {1}) / mass;
  m.squares = cost == Cost::sqeuclidean ? squares.to(type) : at::zeros(squares.sizes(), m.points.options());
  m.weights = weights.to(type).contiguous();
  m.log_weights =
      at::where(weights > 0, at::log2(weights), at::scalar_tensor(kLogZero, weights.options())).to(type).contiguous();
  m.mass = mass;
  return m;
}

Problem prepare(const Terms& terms, const Tensor& given_x, const Tensor& given_y, const OptionalTensor& a,
                const OptionalTensor& b) {
  const char* op = terms.op;
  check_cloud(op, "x", given_x);
  check_cloud(op, "y", given_y);
  check_same_device(op, "y", given_y, "x", given_x);
  check_same_dtype(op, "y", given_y, "x", given_x);
  TORCH_CHECK_VALUE(given_x.dim() == given_y.dim() &&
                        given_x.sizes().slice(0, given_x.dim() - 2) == given_y.sizes().slice(0, given_y.dim() - 2),
                    op, ": y must have the batch of x, whose shape is ", given_x.sizes(), ", got ", given_y.sizes());
  TORCH_CHECK_VALUE(given_x.size(-1) == given_y.size(-1), op, ": y must have the dimension of x (", given_x.size(-1),
                    "), got ", given_y.size(-1));
  check_weights(op, "a", a, shape_of_weights(given_x), "x", given_x);
  check_weights(op, "b", b, shape_of_weights(given_y), "y", given_y);
  const Tensor x = batched(given_x.detach(), 2), y = batched(given_y.detach(), 2);
  const Weights w = prepare_weights(terms, x, x.size(0), x.size(1), y.size(1), a, b);
  const auto mean = [](const Tensor& points, const Tensor& weights, const Tensor& mass) {
    return at::sum(points * weights.unsqueeze(2), {1}) / mass.unsqueeze(1);
  };
  const Tensor mean_x = mean(x, w.a, w.mass_a), mean_y = mean(y, w.b, w.mass_b);
  if (x.is_cpu()) {
    TORCH_CHECK_VALUE(at::isfinite(mean_x).all().item<bool>(), op, ": x must be finite");
    TORCH_CHECK_VALUE(at::isfinite(mean_y).all().item<bool>(), op, ": y must be finite");
  }
  Problem p;
  p.terms = terms;
  p.shift = mean_x - mean_y;
  const bool separate = terms.separate();
  const Tensor middle = separate ? Tensor() : terms.around_y ? mean_y : (mean_x + mean_y) / 2;
  p.shift_cost = separate ? at::sum(p.shift * p.shift, {1}) : at::zeros_like(w.mass_a);
  p.x = measure(x, w.a, w.mass_a, separate ? mean_x : middle, terms.cost);
  p.y = measure(y, w.b, w.mass_b, separate ? mean_y : middle, terms.cost);
  if (x.is_cpu()) {
    const auto check = [&](const char* name, const Measure& m) {
      TORCH_CHECK_VALUE(at::isfinite(m.spread).all().item<bool>(), op, ": ", name,
                        " must be points whose squares do not overflow ", kernel_type(x));
    };
    check(separate ? "x" : "x and y", p.x);
    check(separate ? "y" : "x and y", p.y);
  }
  return p;
}

Problem prepare_matrix(const Terms& terms, const Tensor& costs, const OptionalTensor& a, const OptionalTensor& b) {
  const char* op = terms.op;
  check_floating(op, "C", costs);
  TORCH_CHECK_VALUE((costs.dim() == 2 || costs.dim() == 3) && costs.numel() > 0, op,
                    ": C must be costs of shape (N, M) or (batch, N, M), at least one of each, got ", costs.sizes());
  const int64_t dims = costs.dim();
  std::vector<int64_t> shape_a(costs.sizes().begin(), costs.sizes().end() - 1), shape_b = shape_a;
  shape_b.back() = costs.size(dims - 1);
  check_weights(op, "a", a, shape_a, "C", costs);
  check_weights(op, "b", b, shape_b, "C", costs);
  Problem p;
  p.terms = terms;
  p.matrix = batched(costs.detach(), 2).to(kernel_type(costs)).contiguous();
  const Weights w = prepare_weights(terms, p.matrix, p.matrix.size(0), p.matrix.size(1), p.matrix.size(2), a, b);
  const auto none = [&](const Tensor& weights) {
    return at::empty({weights.size(0), weights.size(1), 0}, p.matrix.options());
  };
  const Tensor nowhere = at::zeros({p.matrix.size(0), 0}, w.a.options());
  p.x = measure(none(w.a), w.a, w.mass_a, nowhere, terms.cost);
  p.y = measure(none(w.b), w.b, w.mass_b, nowhere, terms.cost);
  p.shift = nowhere;
  p.shift_cost = at::zeros_like(w.mass_a);
  return p;
}

// [B] The mean cost where it has a closed form or lies in memory; else from the root mean square distance, which bounds
// it for costs that grow no faster than the square.
Tensor mean_cost(const Problem& p, bool centred) {
  if (p.terms.cost == Cost::matrix) {
    const Tensor row = at::matmul(p.matrix, p.y.weights.unsqueeze(2)).squeeze(2);
    return at::sum(row * p.x.weights, {1}, false, at::kDouble) / (p.x.mass * p.y.mass);
  }
  const Tensor spread = p.x.spread + p.y.spread;
  if (p.terms.separate()) return centred ? spread : spread + p.shift_cost;
  const Tensor square = spread + at::sum(p.shift * p.shift, {1}) / 2;
  switch (p.terms.cost) {
    case Cost::sqeuclidean:
      return square;
    case Cost::power:
      return at::pow(square, p.terms.power / 2);
    case Cost::manhattan:
      return at::sqrt(square * p.x.points.size(2));
    default:
      return at::sqrt(square);
  }
}

Tensor resolve_epsilon(const Problem& p, const Request& request) {
  if (request.epsilon) return at::full({p.problems()}, *request.epsilon, p.shift.options());
  const Tensor epsilon = 0.05 * at::abs(mean_cost(p, false));
  return at::where(epsilon > 0, epsilon, at::ones({}, epsilon.options()));  // all points in one place
}

// [B] log(1 / least positive weight)
Tensor weight_range(const Measure& m) {
  const Tensor mass = m.mass.to(m.weights.scalar_type()).unsqueeze(1);
  return -at::log(at::where(m.weights > 0, m.weights, mass).amin({1})).to(at::kDouble);
}

// [B, N] The potential of the original cost from that of the centred one, and back. `sign` is +1 for x, -1 for y.
Tensor linear_part(const Problem& p, const Measure& m, double sign) {
  if (!p.terms.separate()) return at::zeros({m.points.size(0), m.count()}, p.shift.options());
  return 2 * sign * at::sum(m.points * p.shift.unsqueeze(1), {2}) + p.shift_cost.unsqueeze(1) / 2;
}

struct Solution {
  Tensor f, g;     // [B, N], [B, M] of the centred problem, in the type of the kernels
  Tensor facts;    // [B, 5] double: error, mass of the plan, iterations, converged, epsilon
  Tensor control;  // bytes
  bool converged = true;
};

template <typename T>
class Solver {
 public:
  Solver(const Problem& problem, const Tensor& epsilon, const Request& request)
      : problem_(problem),
        kernels_(kernels_for<Kernels<T>>(request.terms.op, problem.x.points)),
        scope_(problem.x.points),
        memory_limit_(request.memory_limit) {
    TORCH_CHECK_VALUE(!kernels_.together || problem.problems() <= kMostTogether, request.terms.op,
                      ": a batch on this device must have at most ", kMostTogether, " problems, got ",
                      problem.problems());
    options_.scaling = request.scaling.value_or(0);
    options_.tolerance = request.tolerance;
    options_.relaxation = request.relaxation.value_or(0);
    options_.exponent_limit = sizeof(T) == 4 ? 80 : 700;
    options_.rounding = sizeof(T) == 4 ? 1e-7 : 1e-16;
    options_.row_rho = problem.terms.rho_x;
    options_.column_rho = problem.terms.rho_y;
    options_.max_iter = request.max_iter;
    options_.number = 1;
    const Tensor start = at::abs(mean_cost(problem, true)), range_x = weight_range(problem.x),
                 range_y = weight_range(problem.y);
    facts_ = at::stack({epsilon, start, range_x, range_y}, 1);
    facts_y_ = at::stack({epsilon, start, range_y, range_x}, 1);
    if (problem.terms.cost != Cost::matrix) {
      columns_x_ = pack(problem.x.points);
      columns_y_ = pack(problem.y.points);
    }
  }

  // x (or y) against itself: averaged updates from 0.
  Solution self(Role role) {
    const bool of_x = role == Role::rows;
    const Measure& m = of_x ? problem_.x : problem_.y;
    const Tensor& columns = of_x ? columns_x_ : columns_y_;
    const Costs costs = make_costs(m, columns, m, columns);
    Side side = make_side(m, columns, m, {}, costs.ground.cost);
    Options options = options_;
    options.row_rho = options.column_rho = of_x ? problem_.terms.rho_x : problem_.terms.rho_y;
    const Tensor control = make_control();
    const int64_t count = sums_count(m, m, costs.ground.cost);
    const Tensor sums = make_sums(count);
    each_group(m, m, [&](const Group& group) {
      Control* c = group.of(control_of(control));
      const Cloud<T> cloud = side.cloud.of(group.first);
      const Ground<T> ground = group.of(costs.ground, m, m);
      Sums* s = static_cast<Sums*>(sums.mutable_data_ptr()) + group.first * count;
      kernels_.begin(c, facts_of(of_x ? facts_ : facts_y_, group), options, nullptr, nullptr, group.count, stream());
      kernels_.set_bias(c, cloud, group.count, stream());
      for (int64_t i = 0; i <= options.max_iter; ++i) {
        kernels_.pass(c, cloud, cloud, ground, Role::self, group.count, s, stream());
        kernels_.advance(c, Event::self, s, count, group.count, stream());
        if (finished(c, i, group)) break;
        kernels_.apply(c, cloud, Role::self, group.count, stream());
      }
    });
    return finish(side.potential, side.potential, control);
  }

  // x against y from nothing, from given potentials, or from the self terms if that start is the better one.
  Solution cross(const OptionalTensor& f, const OptionalTensor& g, const Solution* self_x, const Solution* self_y) {
    const Costs costs = make_costs(problem_.x, columns_x_, problem_.y, columns_y_);
    const Cost cost = costs.ground.cost;
    Side x = make_side(problem_.x, columns_x_, problem_.y, f, cost),
         y = make_side(problem_.y, columns_y_, problem_.x, g, cost);
    if (self_x) {
      x.start = at::empty_like(x.potential);
      y.start = at::empty_like(y.potential);
      x.cloud.start = x.start.template mutable_data_ptr<T>();
      y.cloud.start = y.start.template mutable_data_ptr<T>();
    }
    const Tensor control = make_control();
    const int64_t row_sums = sums_count(problem_.x, problem_.y, cost),
                  column_sums = sums_count(problem_.y, problem_.x, cost), most_sums = std::max(row_sums, column_sums);
    const Tensor all_sums = make_sums(most_sums);
    each_group(problem_.x, problem_.y, [&](const Group& group) {
      Control* c = group.of(control_of(control));
      const Cloud<T> cx = x.cloud.of(group.first), cy = y.cloud.of(group.first);
      const Ground<T> ground = group.of(costs.ground, problem_.x, problem_.y);
      Ground<T> back = ground;
      back.transposed = cost == Cost::matrix;
      Sums* sums = static_cast<Sums*>(all_sums.mutable_data_ptr()) + group.first * most_sums;
      const int64_t count = group.count;
      const auto rows = [&](Event event) {
        kernels_.pass(c, cx, cy, ground, Role::rows, count, sums, stream());
        kernels_.advance(c, event, sums, row_sums, count, stream());
      };
      const auto columns = [&](Event event) {
        kernels_.pass(c, cy, cx, back, Role::columns, count, sums, stream());
        kernels_.advance(c, event, sums, column_sums, count, stream());
      };
      const auto of_self = [&](const Solution* s) -> const Control* {
        return s ? group.of(control_of(s->control)) : nullptr;
      };
      kernels_.begin(c, facts_of(facts_, group), options_, of_self(self_x), of_self(self_y), count, stream());
      if (f) {
        kernels_.set_bias(c, cx, count, stream());
        kernels_.set_bias(c, cy, count, stream());
        rows(Event::probe_rows);
        columns(self_x ? Event::probe_columns_then_cold : Event::probe_columns);
      }
      if (!f || self_x) {
        if (!f) kernels_.advance(c, Event::cold, nullptr, 0, count, stream());
        kernels_.set_cold(c, cx, Role::rows, count, stream());
        kernels_.set_cold(c, cy, Role::columns, count, stream());
        rows(Event::rows);
      }
      for (int64_t i = 0; i < options_.max_iter && !finished(c, i, group); ++i) {
        kernels_.apply(c, cx, Role::rows, count, stream());
        columns(Event::columns);
        kernels_.apply(c, cy, Role::columns, count, stream());
        if (!problem_.terms.balanced()) kernels_.apply(c, cx, Role::translated, count, stream());
        rows(Event::rows);
      }
    });
    return finish(x.potential, y.potential, control);
  }

  // The forces on x by the plan with y (Kernels::gradient), [B, N, D], and the plan's row sums, [B, N].
  std::tuple<Tensor, Tensor> gradient(const Tensor& f, const Tensor& g) {
    const Held held = hold(f, g);
    Tensor force = at::empty_like(problem_.x.points), mass = at::empty_like(problem_.x.weights);
    kernels_.gradient(control_of(held.control), held.x.cloud, held.y.cloud, held.ground, problem_.problems(),
                      force.template mutable_data_ptr<T>(), mass.template mutable_data_ptr<T>(), stream());
    return {force, mass};
  }

  // The plan times values [B, M, K]. [B, N, K]
  Tensor transport(const Tensor& f, const Tensor& g, const Tensor& values) {
    const Held held = hold(f, g);
    const Tensor packed = pack(values);
    Tensor out = at::empty({problem_.problems(), problem_.x.count(), values.size(2)}, problem_.x.points.options());
    kernels_.transport(control_of(held.control), held.x.cloud, held.y.cloud, held.ground, problem_.problems(),
                       packed.template const_data_ptr<T>(), values.size(2), out.template mutable_data_ptr<T>(),
                       stream());
    return out;
  }

  // The softmin over y at the points x. [B, N]
  Tensor softmin(const Tensor& g) {
    const Held held = hold(at::zeros_like(problem_.x.weights), g);
    const int64_t count = sums_count(problem_.x, problem_.y, held.ground.cost);
    const Tensor sums = make_sums(count);
    kernels_.pass(control_of(held.control), held.x.cloud, held.y.cloud, held.ground, Role::rows, problem_.problems(),
                  static_cast<Sums*>(sums.mutable_data_ptr()), stream());
    return held.x.softmin;
  }

 private:
  static constexpr int64_t kMostTogether = 65535;  // blocks in a grid's third dimension

  struct Side {
    Tensor potential, softmin, start, bias, scratch;
    Cloud<T> cloud;
  };

  // The ground cost as passes read it, and the memory it lies in.
  struct Costs {
    Tensor matrix;
    Ground<T> ground;
  };

  // Both sides at given potentials.
  struct Held {
    Side x, y;
    Ground<T> ground;
    Tensor control;
  };

  // Problems that are driven at once.
  struct Group {
    int64_t first, count;
    template <typename U>
    U* of(U* per_problem) const {
      return per_problem + first;
    }
    Ground<T> of(Ground<T> ground, const Measure& rows, const Measure& columns) const {
      if (ground.matrix) ground.matrix += first * rows.count() * columns.count();
      return ground;
    }
  };

  // Calls body for all problems at once, or for each: on the CPU each problem stops by itself, and where problems are
  // many or small the threads share out problems. Results do not depend on it.
  template <typename Body>
  void each_group(const Measure& x, const Measure& y, const Body& body) const {
    const int64_t problems = problem_.problems();
    if (kernels_.together || problems == 1) return body(Group{0, problems});
    constexpr int64_t kMany = 16, kLargeWork = int64_t{1} << 23;
    if (problems >= kMany || x.count() * y.count() * (dim() + 12) < kLargeWork)
      return parallel_for(problems, [&](int64_t p) { body(Group{p, 1}); });
    for (int64_t p = 0; p < problems; ++p) body(Group{p, 1});
  }

  Stream stream() const { return scope_.stream(); }
  int64_t dim() const { return problem_.x.points.size(2); }
  Tensor bytes(int64_t size) const { return at::empty({size}, problem_.x.points.options().dtype(at::kByte)); }
  Tensor values(int64_t size) const { return at::empty({problem_.problems(), size}, problem_.x.points.options()); }
  Tensor make_control() const { return bytes(problem_.problems() * static_cast<int64_t>(sizeof(Control))); }
  Tensor make_sums(int64_t count) const {
    return bytes(problem_.problems() * count * static_cast<int64_t>(sizeof(Sums)));
  }
  static Control* control_of(const Tensor& control) { return static_cast<Control*>(control.mutable_data_ptr()); }
  static const Facts* facts_of(const Tensor& facts, const Group& group) {
    static_assert(sizeof(Facts) == 4 * sizeof(double));
    return reinterpret_cast<const Facts*>(facts.const_data_ptr<double>()) + group.first;
  }

  Tensor pack(const Tensor& points) const {
    const Tensor whole = points.contiguous();
    const int64_t count = whole.size(1), width = whole.size(2);
    Tensor columns = values(kernels_.columns_size(count, width));
    kernels_.pack(whole.template const_data_ptr<T>(), count, width, problem_.problems(),
                  columns.template mutable_data_ptr<T>(), stream());
    return columns;
  }

  Ground<T> ground() const {
    const T* matrix = problem_.matrix.defined() ? problem_.matrix.template const_data_ptr<T>() : nullptr;
    return {problem_.terms.cost, T(problem_.terms.power), matrix, false};
  }

  // Caches the costs where it pays and the limit allows.
  Costs make_costs(const Measure& rows, const Tensor& row_columns, const Measure& columns,
                   const Tensor& column_columns) {
    Costs c;
    c.ground = ground();
    const int64_t n = rows.count(), m = columns.count(), problems = problem_.problems();
    if (c.ground.matrix || !kernels_.caches || !kernels_.caches(n, m, dim(), c.ground.cost) ||
        static_cast<double>(problems) * static_cast<double>(n) * static_cast<double>(m) * sizeof(T) >
            static_cast<double>(memory_limit_))
      return c;
    const Side x = make_side(rows, row_columns, columns, {}, c.ground.cost),
               y = make_side(columns, column_columns, rows, {}, c.ground.cost);
    c.matrix = empty_result({problems, n, m}, rows.points.options());
    kernels_.costs(x.cloud, y.cloud, c.ground, problems, c.matrix.template mutable_data_ptr<T>(), stream());
    c.ground = {Cost::matrix, T(0), c.matrix.template const_data_ptr<T>(), false};
    return c;
  }

  int64_t sums_count(const Measure& rows, const Measure& columns, Cost cost) const {
    return kernels_.sums_size(rows.count(), columns.count(), dim(), cost);
  }

  Side make_side(const Measure& m, const Tensor& columns, const Measure& other, const OptionalTensor& potential,
                 Cost cost) const {
    const int64_t count = m.count(), problems = problem_.problems();
    Side s;
    s.potential =
        potential ? potential->reshape({problems, count}).clone() : at::zeros({problems, count}, m.points.options());
    s.softmin = s.potential.clone();
    s.bias = values(kernels_.padded(count));
    s.scratch = values(kernels_.scratch_size(count, dim(), other.count(), cost));
    s.cloud = {m.points.template const_data_ptr<T>(),
               columns.defined() ? columns.template const_data_ptr<T>() : nullptr,
               m.squares.template const_data_ptr<T>(),
               m.weights.template const_data_ptr<T>(),
               m.log_weights.template const_data_ptr<T>(),
               s.potential.template mutable_data_ptr<T>(),
               s.softmin.template mutable_data_ptr<T>(),
               nullptr,
               s.bias.template mutable_data_ptr<T>(),
               s.scratch.template mutable_data_ptr<T>(),
               count,
               dim(),
               columns.defined() ? columns.size(1) : 0,
               s.bias.size(1),
               s.scratch.size(1)};
    return s;
  }

  Held hold(const Tensor& f, const Tensor& g) const {
    Held held;
    held.ground = ground();
    held.x = make_side(problem_.x, columns_x_, problem_.y, f, held.ground.cost);
    held.y = make_side(problem_.y, columns_y_, problem_.x, g, held.ground.cost);
    held.control = make_control();
    Control* c = control_of(held.control);
    const Group all{0, problem_.problems()};
    kernels_.begin(c, facts_of(facts_, all), options_, nullptr, nullptr, all.count, stream());
    kernels_.set_bias(c, held.y.cloud, all.count, stream());
    return held;
  }

  bool finished(Control* c, int64_t iteration, const Group& group) const {
    return (iteration + 1) % kernels_.iterations_per_poll == 0 && kernels_.finished(c, group.count, stream());
  }

  Solution finish(const Tensor& f, const Tensor& g, const Tensor& control) const {
    Tensor facts = at::empty({problem_.problems(), 5}, problem_.shift.options());
    kernels_.report(control_of(control), problem_.problems(), facts.template mutable_data_ptr<double>(), stream());
    bool converged = true;
    for (int64_t p = 0; control.is_cpu() && p < problem_.problems(); ++p)
      converged = converged && control_of(control)[p].converged;
    return {f, g, facts, control, converged};
  }

  const Problem& problem_;
  const Kernels<T>& kernels_;
  DeviceScope scope_;
  int64_t memory_limit_;
  Options options_{};
  Tensor facts_, facts_y_;  // [B, 4] of a pass over x, over y
  Tensor columns_x_, columns_y_;
};

// [B] The dual at the potentials: with hard marginals <a, f> + <b, g> - epsilon (mass of the plan - mass of a x b),
// else rho <a, 1 - exp(-f / rho)> in place of <a, f>.
Tensor dual(const Measure& x, const Measure& y, double rho_x, double rho_y, const Solution& s) {
  const auto integral = [](const Measure& m, const Tensor& potential, double rho) {
    const Tensor f = potential.to(at::kDouble), soft = std::isinf(rho) ? f : -rho * at::expm1(f / -rho);
    return at::sum(m.weights.to(at::kDouble) * soft, {1});
  };
  return integral(x, s.f, rho_x) + integral(y, s.g, rho_y) -
         s.facts.select(1, 4) * (s.facts.select(1, 1) - x.mass * y.mass);
}

void warn_unless_converged(const Request& request, std::initializer_list<const Solution*> solutions) {
  if (request.tolerance == 0) return;
  for (const Solution* s : solutions) {
    if (s->converged) continue;
    TORCH_WARN(request.terms.op, ": not converged after ", request.max_iter, " iterations: marginal error ",
               s->facts.select(1, 0).max().item<double>(), " > tol ", request.tolerance,
               "; raise max_iter, epsilon or tol (tol=0.0 runs exactly max_iter iterations and does not warn)");
    return;
  }
}

// Calls body with a value of the kernels' type.
template <typename Body>
auto with_type(at::ScalarType type, const Body& body) {
  return type == at::kDouble ? body(double{}) : body(float{});
}

// The result of a batch, or of the one problem that was given.
Tensor given_form(const Tensor& t, bool batch) { return batch ? t : t.squeeze(0); }

using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The potential to start from, of the centred problem.
OptionalTensor start_of(const char* op, const char* name, const OptionalTensor& potential, at::IntArrayRef shape,
                        const char* other_name, const Tensor& other, const Tensor& linear, at::ScalarType type) {
  if (!potential) return std::nullopt;
  check_weights(op, name, potential, shape, other_name, other);
  const Tensor start = (batched(potential->detach(), 1).to(at::kDouble) - linear).to(type);
  if (other.is_cpu()) TORCH_CHECK_VALUE(at::isfinite(start).all().item<bool>(), op, ": ", name, " must be finite");
  return start;
}

void check_init(const char* op, const OptionalTensor& f, const OptionalTensor& g) {
  TORCH_CHECK_VALUE(f.has_value() == g.has_value(), op, ": init must hold both potentials, f and g");
}

Nine sinkhorn(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b, std::string_view cost,
              double power, OptionalNumber rho_x, OptionalNumber rho_y, OptionalNumber epsilon, OptionalNumber scaling,
              double tol, int64_t max_iter, OptionalNumber relaxation, int64_t memory_limit, const OptionalTensor& f,
              const OptionalTensor& g) {
  constexpr const char* op = "sinkhorn";
  const Terms terms = parse_terms(op, cost, power, rho_x, rho_y);
  const Request request = parse(terms, epsilon, scaling, tol, max_iter, relaxation, memory_limit);
  const Problem p = prepare(terms, x, y, a, b);
  const auto type = kernel_type(x);
  const Tensor linear_x = linear_part(p, p.x, 1), linear_y = linear_part(p, p.y, -1);
  check_init(op, f, g);
  const OptionalTensor f0 = start_of(op, "init f", f, shape_of_weights(x), "x", x, linear_x, type),
                       g0 = start_of(op, "init g", g, shape_of_weights(y), "y", y, linear_y, type);
  const Tensor target = resolve_epsilon(p, request);
  const Solution s = with_type(
      type, [&](auto scalar) { return Solver<decltype(scalar)>(p, target, request).cross(f0, g0, nullptr, nullptr); });
  warn_unless_converged(request, {&s});
  const Tensor value = dual(p.x, p.y, terms.rho_x, terms.rho_y, s) + p.x.mass * p.shift_cost;
  const auto form = [&](const Tensor& t) { return given_form(t, x.dim() == 3); };
  return {form(value),  // in double: what the caller subtracts may be large
          form((s.f + linear_x).to(type)),
          form((s.g + linear_y).to(type)),
          form(s.f),
          form(s.g),
          form(s.facts.select(1, 0).to(type)),
          form(s.facts.select(1, 2).to(at::kLong)),
          form(s.facts.select(1, 3).to(at::kBool)),
          form(target)};
}

Nine sinkhorn_divergence(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                         std::string_view cost, double power, OptionalNumber rho_x, OptionalNumber rho_y,
                         OptionalNumber epsilon, OptionalNumber scaling, double tol, int64_t max_iter,
                         OptionalNumber relaxation, int64_t memory_limit) {
  constexpr const char* op = "sinkhorn_divergence";
  const Terms terms = parse_terms(op, cost, power, rho_x, rho_y);
  const Request request = parse(terms, epsilon, scaling, tol, max_iter, relaxation, memory_limit);
  const Problem p = prepare(terms, x, y, a, b);
  const auto type = kernel_type(x);
  const Tensor target = resolve_epsilon(p, request);
  const auto [xx, yy, xy] = with_type(type, [&](auto scalar) {
    Solver<decltype(scalar)> solver(p, target, request);
    const Solution xx = solver.self(Role::rows), yy = solver.self(Role::columns);
    return std::make_tuple(xx, yy, solver.cross(xx.f, yy.f, &xx, &yy));
  });
  warn_unless_converged(request, {&xy, &xx, &yy});
  const double rx = terms.rho_x, ry = terms.rho_y;
  Tensor value = dual(p.x, p.y, rx, ry, xy) - (dual(p.x, p.x, rx, rx, xx) + dual(p.y, p.y, ry, ry, yy)) / 2 +
                 p.x.mass * p.shift_cost;
  if (!terms.balanced()) value = value + target / 2 * at::pow(p.x.mass - p.y.mass, 2);
  const Tensor facts = at::stack({xy.facts, xx.facts, yy.facts});
  const auto form = [&](const Tensor& t) { return given_form(t, x.dim() == 3); };
  return {form(value.to(type)),
          form(xy.f),
          form(xy.g),
          form(xx.f),
          form(yy.f),
          form(facts.select(2, 0).amax({0}).to(type)),
          form(xy.facts.select(1, 2).to(at::kLong)),
          form(facts.select(2, 3).amin({0}).to(at::kBool)),
          form(target)};
}

Seven sinkhorn_matrix(const Tensor& costs, const OptionalTensor& a, const OptionalTensor& b, OptionalNumber rho_x,
                      OptionalNumber rho_y, OptionalNumber epsilon, OptionalNumber scaling, double tol,
                      int64_t max_iter, OptionalNumber relaxation, const OptionalTensor& f, const OptionalTensor& g) {
  constexpr const char* op = "sinkhorn_matrix";
  const Terms terms = parse_terms(op, "matrix", 0, rho_x, rho_y);
  const Request request = parse(terms, epsilon, scaling, tol, max_iter, relaxation, 0);
  const Problem p = prepare_matrix(terms, costs, a, b);
  const auto type = kernel_type(costs);
  check_init(op, f, g);
  const Tensor no_x = at::zeros({1}, p.shift.options());
  std::vector<int64_t> shape_f(costs.sizes().begin(), costs.sizes().end() - 1), shape_g = shape_f;
  shape_g.back() = costs.size(-1);
  const OptionalTensor f0 = start_of(op, "init f", f, shape_f, "C", costs, no_x, type),
                       g0 = start_of(op, "init g", g, shape_g, "C", costs, no_x, type);
  const Tensor mean = mean_cost(p, true);
  if (costs.is_cpu())
    TORCH_CHECK_VALUE(at::isfinite(mean).all().item<bool>(), op,
                      ": C must be finite (a large cost stands for a forbidden move)");
  const Tensor target = resolve_epsilon(p, request);
  const Solution s = with_type(
      type, [&](auto scalar) { return Solver<decltype(scalar)>(p, target, request).cross(f0, g0, nullptr, nullptr); });
  warn_unless_converged(request, {&s});
  const auto form = [&](const Tensor& t) { return given_form(t, costs.dim() == 3); };
  return {form(dual(p.x, p.y, terms.rho_x, terms.rho_y, s).to(type)),
          form(s.f),
          form(s.g),
          form(s.facts.select(1, 0).to(type)),
          form(s.facts.select(1, 2).to(at::kLong)),
          form(s.facts.select(1, 3).to(at::kBool)),
          form(target)};
}

// The problem of held potentials, and the solver for it.
template <typename Body>
Tensor with_held(const Problem& p, const Tensor& epsilon, const Body& body) {
  const Request request = parse(p.terms, {}, {}, 0, 1, {}, 0);
  const Tensor target = epsilon.to(at::kDouble).expand({p.problems()}).contiguous();
  return with_type(kernel_type(p.x.points),
                   [&](auto scalar) { return body(Solver<decltype(scalar)>(p, target, request)); });
}

Tensor gradient(const Terms& terms, const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                const Tensor& f, const Tensor& g, const Tensor& epsilon) {
  const Problem p = prepare(terms, x, y, a, b);
  const Tensor gradient = with_held(p, epsilon, [&](auto solver) {
    const auto [force, mass] = solver.gradient(f, g);
    if (terms.cost != Cost::sqeuclidean) return force;
    return terms.separate() ? 2 * (force + mass.unsqueeze(2) * p.shift.unsqueeze(1)) : 2 * force;
  });
  return given_form(gradient.to(x.scalar_type()), x.dim() == 3);
}

// d cost / d x = sum_j plan_ij dC_ij / dx_i at frozen potentials of the centred problem. [N, D]
Tensor sinkhorn_gradient(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                         const Tensor& f, const Tensor& g, const Tensor& epsilon, std::string_view cost, double power,
                         OptionalNumber rho_x, OptionalNumber rho_y) {
  return gradient(parse_terms("sinkhorn_gradient", cost, power, rho_x, rho_y), x, y, a, b, f, g, epsilon);
}

// rho (1 - T) - epsilon (T - mass of the other side), T = exp(-f / rho). [B, N] double
Tensor soft_gradient(const Tensor& f, const Tensor& epsilon, double rho, const Tensor& other_mass) {
  const Tensor soft = std::isinf(rho) ? f : -rho * at::expm1(f / -rho);
  return soft - epsilon.reshape({-1, 1}) * (at::exp(f / -rho) - other_mass.reshape({-1, 1}));
}

// d cost / d a, from the potential of the centred problem; defined up to a constant where both marginals are hard. [N]
Tensor sinkhorn_weight_gradient(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                                const Tensor& f, const Tensor& epsilon, std::string_view cost, double power,
                                OptionalNumber rho_x, OptionalNumber rho_y) {
  const Terms terms = parse_terms("sinkhorn_weight_gradient", cost, power, rho_x, rho_y);
  const Problem p = prepare(terms, x, y, a, b);
  const Tensor potential = batched(f, 1).to(at::kDouble) + linear_part(p, p.x, 1);
  const Tensor gradient = soft_gradient(potential, epsilon, terms.rho_x, p.y.mass);
  return given_form(gradient.to(f.scalar_type()), x.dim() == 3);
}

// d cost / d C: the plan. [N, M]
Tensor sinkhorn_matrix_gradient(const Tensor& costs, const OptionalTensor& a, const OptionalTensor& b, const Tensor& f,
                                const Tensor& g, const Tensor& epsilon) {
  const auto type = kernel_type(costs);
  const Tensor scale = epsilon.to(type).unsqueeze(-1).unsqueeze(-1);
  Tensor plan = (f.unsqueeze(-1) + g.unsqueeze(-2) - costs.to(type)).div_(scale).exp_();
  plan.mul_(a ? a->to(type).unsqueeze(-1) : at::full({}, 1.0 / costs.size(-2), plan.options()));
  plan.mul_(b ? b->to(type).unsqueeze(-2) : at::full({}, 1.0 / costs.size(-1), plan.options()));
  return plan.to(costs.scalar_type());
}

// The plan of held potentials times values [M, K]. [N, K]
Tensor sinkhorn_transport(const Tensor& values, const Tensor& x, const Tensor& y, const OptionalTensor& a,
                          const OptionalTensor& b, const Tensor& f, const Tensor& g, const Tensor& epsilon,
                          std::string_view cost, double power, OptionalNumber rho_x, OptionalNumber rho_y) {
  constexpr const char* op = "sinkhorn_transport";
  const Terms terms = parse_terms(op, cost, power, rho_x, rho_y);
  const Problem p = prepare(terms, x, y, a, b);
  check_floating(op, "values", values);
  check_same_device(op, "values", values, "y", y);
  TORCH_CHECK_VALUE(
      values.dim() == y.dim() && values.sizes().slice(0, y.dim() - 1) == shape_of_weights(y) && values.size(-1) > 0, op,
      ": values must have shape ", shape_of_weights(y), " and one more dimension, got ", values.sizes());
  const Tensor out =
      with_held(p, epsilon, [&](auto solver) { return solver.transport(f, g, batched(values, 2).to(kernel_type(x))); });
  return given_form(out.to(values.scalar_type()), x.dim() == 3);
}

// The potential of x's side at the points: -epsilon log sum_j b_j exp((g_j - C(x, y_j)) / epsilon), for the potential g
// of the original problem. [N]
Terms softmin_terms(const char* op, std::string_view cost, double power) {
  Terms terms = parse_terms(op, cost, power, 1.0, 1.0);  // no marginal is kept
  terms.around_y = true;
  return terms;
}

Tensor sinkhorn_softmin(const Tensor& x, const Tensor& y, const OptionalTensor& b, const Tensor& g,
                        const Tensor& epsilon, std::string_view cost, double power) {
  constexpr const char* op = "sinkhorn_softmin";
  const Problem p = prepare(softmin_terms(op, cost, power), x, y, std::nullopt, b);
  check_weights(op, "g", g, shape_of_weights(y), "y", y);
  const Tensor f = with_held(p, epsilon, [&](auto solver) { return solver.softmin(g.to(kernel_type(x))); });
  return given_form(f, x.dim() == 3);
}

// Its derivative in x, f being the result. Each row of exp((f_i + g_j - C_ij) / epsilon) b_j sums to 1: the gradient of
// a plan whose other weights are 1. [N, D]
Tensor sinkhorn_softmin_gradient(const Tensor& x, const Tensor& y, const OptionalTensor& b, const Tensor& f,
                                 const Tensor& g, const Tensor& epsilon, std::string_view cost, double power) {
  return gradient(softmin_terms("sinkhorn_softmin_gradient", cost, power), x, y, at::ones_like(f), b, f, g, epsilon);
}

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// The dispatcher's handle of an operator with the signature of `function`.
#define WGAN_EXT_SINKHORN_HANDLE(function)                                                                      \
  const auto& function##_op() {                                                                                 \
    static const auto handle =                                                                                  \
        c10::Dispatcher::singleton().findSchemaOrThrow("wgan_ext::" #function, "").typed<decltype(function)>(); \
    return handle;                                                                                              \
  }
WGAN_EXT_SINKHORN_HANDLE(sinkhorn)
WGAN_EXT_SINKHORN_HANDLE(sinkhorn_divergence)
WGAN_EXT_SINKHORN_HANDLE(sinkhorn_matrix)
WGAN_EXT_SINKHORN_HANDLE(sinkhorn_gradient)
WGAN_EXT_SINKHORN_HANDLE(sinkhorn_weight_gradient)
WGAN_EXT_SINKHORN_HANDLE(sinkhorn_matrix_gradient)
WGAN_EXT_SINKHORN_HANDLE(sinkhorn_transport)
WGAN_EXT_SINKHORN_HANDLE(sinkhorn_softmin)
WGAN_EXT_SINKHORN_HANDLE(sinkhorn_softmin_gradient)
#undef WGAN_EXT_SINKHORN_HANDLE

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
Tensor plain(const OptionalTensor& t) { return t.value_or(Tensor()); }

// grad [] or [B] times a gradient of `dims` more dimensions.
Tensor scaled(const Tensor& grad, const Tensor& gradient, int64_t dims) {
  Tensor g = grad.to(gradient.scalar_type());
  for (; dims > 0; --dims) g = g.unsqueeze(-1);
  return g * gradient;
}

// Which of x, y, a, b (or C, a, b) need a gradient; torch counts only the tensors that are there.
struct Needs {
  bool x, y, a, b;
  Needs(const AutogradContext& ctx, int64_t leading, const OptionalTensor& given_a, const OptionalTensor& given_b)
      : x(ctx.needs_input_grad(0)),
        y(leading > 1 && ctx.needs_input_grad(1)),
        a(given_a && ctx.needs_input_grad(leading)),
        b(given_b && ctx.needs_input_grad(given_a ? leading + 1 : leading)) {}
};

// What the derivatives must know of the call.
struct Kept {
  std::string cost;
  double power;
  OptionalNumber rho_x, rho_y;
  void save(AutogradContext* ctx) const {
    ctx->saved_data["cost"] = cost;
    ctx->saved_data["power"] = power;
    ctx->saved_data["rho_x"] = rho_x;
    ctx->saved_data["rho_y"] = rho_y;
  }
  static Kept load(AutogradContext* ctx) {
    return {ctx->saved_data["cost"].toStringRef(), ctx->saved_data["power"].toDouble(),
            ctx->saved_data["rho_x"].toOptional<double>(), ctx->saved_data["rho_y"].toOptional<double>()};
  }
};

// Envelope theorem: the dual's partial derivatives at the returned potentials. Inputs x, y, a, b come first.
class SinkhornFunction : public torch::autograd::Function<SinkhornFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const OptionalTensor& a,
                               const OptionalTensor& b, const Kept& kept, OptionalNumber epsilon,
                               OptionalNumber scaling, double tol, int64_t max_iter, OptionalNumber relaxation,
                               int64_t memory_limit, const OptionalTensor& f, const OptionalTensor& g) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [value, f1, g1, fc, gc, error, iterations, converged, used] =
        sinkhorn_op().call(x, y, a, b, kept.cost, kept.power, kept.rho_x, kept.rho_y, epsilon, scaling, tol, max_iter,
                           relaxation, memory_limit, f, g);
    kept.save(ctx);
    ctx->save_for_backward({x, y, plain(a), plain(b), fc, gc, used});
    ctx->mark_non_differentiable({f1, g1, fc, gc, error, iterations, converged, used});
    return {value, f1, g1, fc, gc, error, iterations, converged, used};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &y = saved[1], &f = saved[4], &g = saved[5], &epsilon = saved[6];
    const OptionalTensor a = optional(saved[2]), b = optional(saved[3]);
    const auto [cost, power, rx, ry] = Kept::load(ctx);
    const auto& points = sinkhorn_gradient_op();
    const auto& weights = sinkhorn_weight_gradient_op();
    const Needs needs(*ctx, 2, a, b);
    variable_list inputs(13);
    if (needs.x) inputs[0] = scaled(grads[0], points.call(x, y, a, b, f, g, epsilon, cost, power, rx, ry), 2);
    if (needs.y) inputs[1] = scaled(grads[0], points.call(y, x, b, a, g, f, epsilon, cost, power, ry, rx), 2);
    if (needs.a) inputs[2] = scaled(grads[0], weights.call(x, y, a, b, f, epsilon, cost, power, rx, ry), 1);
    if (needs.b) inputs[3] = scaled(grads[0], weights.call(y, x, b, a, g, epsilon, cost, power, ry, rx), 1);
    return inputs;
  }
};

class DivergenceFunction : public torch::autograd::Function<DivergenceFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const OptionalTensor& a,
                               const OptionalTensor& b, const Kept& kept, OptionalNumber epsilon,
                               OptionalNumber scaling, double tol, int64_t max_iter, OptionalNumber relaxation,
                               int64_t memory_limit) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [value, f, g, p, q, error, iterations, converged, used] =
        sinkhorn_divergence_op().call(x, y, a, b, kept.cost, kept.power, kept.rho_x, kept.rho_y, epsilon, scaling, tol,
                                      max_iter, relaxation, memory_limit);
    kept.save(ctx);
    ctx->save_for_backward({x, y, plain(a), plain(b), f, g, p, q, used});
    ctx->mark_non_differentiable({f, g, p, q, error, iterations, converged, used});
    return {value, f, g, p, q, error, iterations, converged, used};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &y = saved[1], &f = saved[4], &g = saved[5], &p = saved[6], &q = saved[7],
                 &epsilon = saved[8];
    const OptionalTensor a = optional(saved[2]), b = optional(saved[3]);
    const auto [cost, power, rx, ry] = Kept::load(ctx);
    const auto& points = sinkhorn_gradient_op();
    const auto& weights = sinkhorn_weight_gradient_op();
    const Needs needs(*ctx, 2, a, b);
    variable_list inputs(12);
    if (needs.x)
      inputs[0] = scaled(grads[0],
                         points.call(x, y, a, b, f, g, epsilon, cost, power, rx, ry) -
                             points.call(x, x, a, a, p, p, epsilon, cost, power, rx, rx),
                         2);
    if (needs.y)
      inputs[1] = scaled(grads[0],
                         points.call(y, x, b, a, g, f, epsilon, cost, power, ry, rx) -
                             points.call(y, y, b, b, q, q, epsilon, cost, power, ry, ry),
                         2);
    // epsilon / 2 (mass of a - mass of b)^2
    Tensor excess = at::zeros({}, epsilon.options());
    if ((rx || ry) && (needs.a || needs.b)) {
      const auto mass = [&](const OptionalTensor& w) {
        return w ? at::sum(*w, {-1}, false, at::kDouble) : at::ones({}, epsilon.options());
      };
      excess = (epsilon * (mass(a) - mass(b))).unsqueeze(-1);
    }
    if (needs.a)
      inputs[2] = scaled(grads[0],
                         weights.call(x, y, a, b, f, epsilon, cost, power, rx, ry) -
                             weights.call(x, x, a, a, p, epsilon, cost, power, rx, rx) + excess.to(f.scalar_type()),
                         1);
    if (needs.b)
      inputs[3] = scaled(grads[0],
                         weights.call(y, x, b, a, g, epsilon, cost, power, ry, rx) -
                             weights.call(y, y, b, b, q, epsilon, cost, power, ry, ry) - excess.to(f.scalar_type()),
                         1);
    return inputs;
  }
};

// What the derivatives compute has none of its own: the potentials that they hold fixed move with all that the problem
// is made of, points or costs and weights, which come first.
class RefusedFunction : public torch::autograd::Function<RefusedFunction> {
 public:
  static Tensor forward(AutogradContext*, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                        const OptionalTensor&, const std::function<Tensor()>& compute) {
    at::AutoDispatchBelowADInplaceOrView below;
    return compute();
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "sinkhorn: second derivatives are not implemented; detach the gradient of a sinkhorn "
                                "cost before differentiating through it");
  }
};

class MatrixFunction : public torch::autograd::Function<MatrixFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& costs, const OptionalTensor& a,
                               const OptionalTensor& b, OptionalNumber rho_x, OptionalNumber rho_y,
                               OptionalNumber epsilon, OptionalNumber scaling, double tol, int64_t max_iter,
                               OptionalNumber relaxation, const OptionalTensor& f, const OptionalTensor& g) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [value, f1, g1, error, iterations, converged, used] =
        sinkhorn_matrix_op().call(costs, a, b, rho_x, rho_y, epsilon, scaling, tol, max_iter, relaxation, f, g);
    Kept{"matrix", 0, rho_x, rho_y}.save(ctx);
    ctx->save_for_backward({costs, plain(a), plain(b), f1, g1, used});
    ctx->mark_non_differentiable({f1, g1, error, iterations, converged, used});
    return {value, f1, g1, error, iterations, converged, used};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &costs = saved[0], &f = saved[3], &g = saved[4], &epsilon = saved[5];
    const OptionalTensor a = optional(saved[1]), b = optional(saved[2]);
    const Kept kept = Kept::load(ctx);
    const Needs needs(*ctx, 1, a, b);
    variable_list inputs(12);
    if (needs.x) inputs[0] = scaled(grads[0], sinkhorn_matrix_gradient_op().call(costs, a, b, f, g, epsilon), 2);
    if (needs.a) inputs[1] = scaled(grads[0], weight_gradient(costs, f, a, b, kept.rho_x, kept.rho_y, epsilon), 1);
    if (needs.b) inputs[2] = scaled(grads[0], weight_gradient(costs, g, b, a, kept.rho_y, kept.rho_x, epsilon), 1);
    return inputs;
  }

 private:
  // f, or soft_gradient; a second derivative is refused, for f depends on the costs.
  static Tensor weight_gradient(const Tensor& costs, const Tensor& f, const OptionalTensor& a, const OptionalTensor& b,
                                OptionalNumber rho_x, OptionalNumber rho_y, const Tensor& epsilon) {
    return RefusedFunction::apply(costs, a, b, OptionalTensor(), [&] {
      const Tensor mass = b ? at::sum(*b, {-1}, false, at::kDouble) : at::ones({1}, epsilon.options());
      const double rho = rho_x.value_or(std::numeric_limits<double>::infinity());
      return soft_gradient(batched(f, 1).to(at::kDouble), epsilon, rho, mass).reshape(f.sizes()).to(f.scalar_type());
    });
  }
};

// The new potentials of points, differentiable once in the points.
class SoftminFunction : public torch::autograd::Function<SoftminFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const OptionalTensor& b,
                        const Tensor& g, const Tensor& epsilon, const std::string& cost, double power) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor f = sinkhorn_softmin_op().call(x, y, b, g, epsilon, cost, power);
    Kept{cost, power, {}, {}}.save(ctx);
    ctx->save_for_backward({x, y, plain(b), f, g, epsilon});
    return f;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &y = saved[1], &f = saved[3], &g = saved[4], &epsilon = saved[5];
    const Kept kept = Kept::load(ctx);
    const Tensor gradient =
        sinkhorn_softmin_gradient_op().call(x, y, optional(saved[2]), f, g, epsilon, kept.cost, kept.power);
    variable_list inputs(7);
    inputs[0] = grads[0].unsqueeze(-1).to(gradient.scalar_type()) * gradient;
    return inputs;
  }
};

// The plan times values is linear in them; its other inputs are held.
class TransportFunction : public torch::autograd::Function<TransportFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& values, const Tensor& x, const Tensor& y,
                        const OptionalTensor& a, const OptionalTensor& b, const Tensor& f, const Tensor& g,
                        const Tensor& epsilon, const Kept& kept) {
    at::AutoDispatchBelowADInplaceOrView below;
    kept.save(ctx);
    ctx->save_for_backward({x, y, plain(a), plain(b), f, g, epsilon});
    return sinkhorn_transport_op().call(values, x, y, a, b, f, g, epsilon, kept.cost, kept.power, kept.rho_x,
                                        kept.rho_y);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list s = ctx->get_saved_variables();
    const Kept kept = Kept::load(ctx);
    variable_list inputs(9);
    inputs[0] = sinkhorn_transport_op().call(grads[0], s[1], s[0], optional(s[3]), optional(s[2]), s[5], s[4], s[6],
                                             kept.cost, kept.power, kept.rho_y, kept.rho_x);
    return inputs;
  }
};

Nine sinkhorn_autograd(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                       std::string_view cost, double power, OptionalNumber rho_x, OptionalNumber rho_y,
                       OptionalNumber epsilon, OptionalNumber scaling, double tol, int64_t max_iter,
                       OptionalNumber relaxation, int64_t memory_limit, const OptionalTensor& f,
                       const OptionalTensor& g) {
  const variable_list r = SinkhornFunction::apply(x, y, a, b, Kept{std::string(cost), power, rho_x, rho_y}, epsilon,
                                                  scaling, tol, max_iter, relaxation, memory_limit, f, g);
  return {r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8]};
}

Nine divergence_autograd(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                         std::string_view cost, double power, OptionalNumber rho_x, OptionalNumber rho_y,
                         OptionalNumber epsilon, OptionalNumber scaling, double tol, int64_t max_iter,
                         OptionalNumber relaxation, int64_t memory_limit) {
  const variable_list r = DivergenceFunction::apply(x, y, a, b, Kept{std::string(cost), power, rho_x, rho_y}, epsilon,
                                                    scaling, tol, max_iter, relaxation, memory_limit);
  return {r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8]};
}

Seven matrix_autograd(const Tensor& costs, const OptionalTensor& a, const OptionalTensor& b, OptionalNumber rho_x,
                      OptionalNumber rho_y, OptionalNumber epsilon, OptionalNumber scaling, double tol,
                      int64_t max_iter, OptionalNumber relaxation, const OptionalTensor& f, const OptionalTensor& g) {
  const variable_list r =
      MatrixFunction::apply(costs, a, b, rho_x, rho_y, epsilon, scaling, tol, max_iter, relaxation, f, g);
  return {r[0], r[1], r[2], r[3], r[4], r[5], r[6]};
}

Tensor gradient_autograd(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                         const Tensor& f, const Tensor& g, const Tensor& epsilon, std::string_view cost, double power,
                         OptionalNumber rho_x, OptionalNumber rho_y) {
  return RefusedFunction::apply(x, OptionalTensor(y), a, b, [&] {
    return sinkhorn_gradient_op().call(x, y, a, b, f, g, epsilon, cost, power, rho_x, rho_y);
  });
}

Tensor weight_gradient_autograd(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                                const Tensor& f, const Tensor& epsilon, std::string_view cost, double power,
                                OptionalNumber rho_x, OptionalNumber rho_y) {
  return RefusedFunction::apply(x, OptionalTensor(y), a, b, [&] {
    return sinkhorn_weight_gradient_op().call(x, y, a, b, f, epsilon, cost, power, rho_x, rho_y);
  });
}

Tensor matrix_gradient_autograd(const Tensor& costs, const OptionalTensor& a, const OptionalTensor& b, const Tensor& f,
                                const Tensor& g, const Tensor& epsilon) {
  return RefusedFunction::apply(costs, a, b, OptionalTensor(),
                                [&] { return sinkhorn_matrix_gradient_op().call(costs, a, b, f, g, epsilon); });
}

Tensor transport_autograd(const Tensor& values, const Tensor& x, const Tensor& y, const OptionalTensor& a,
                          const OptionalTensor& b, const Tensor& f, const Tensor& g, const Tensor& epsilon,
                          std::string_view cost, double power, OptionalNumber rho_x, OptionalNumber rho_y) {
  return TransportFunction::apply(values, x, y, a, b, f, g, epsilon, Kept{std::string(cost), power, rho_x, rho_y});
}

Tensor softmin_autograd(const Tensor& x, const Tensor& y, const OptionalTensor& b, const Tensor& g,
                        const Tensor& epsilon, std::string_view cost, double power) {
  return SoftminFunction::apply(x, y, b, g, epsilon, std::string(cost), power);
}

Tensor softmin_gradient_autograd(const Tensor& x, const Tensor& y, const OptionalTensor& b, const Tensor& f,
                                 const Tensor& g, const Tensor& epsilon, std::string_view cost, double power) {
  return RefusedFunction::apply(x, OptionalTensor(y), OptionalTensor(), b, [&] {
    return sinkhorn_softmin_gradient_op().call(x, y, b, f, g, epsilon, cost, power);
  });
}

void implement(torch::Library& m) {
  m.impl("sinkhorn", sinkhorn);
  m.impl("sinkhorn_divergence", sinkhorn_divergence);
  m.impl("sinkhorn_matrix", sinkhorn_matrix);
  m.impl("sinkhorn_gradient", sinkhorn_gradient);
  m.impl("sinkhorn_weight_gradient", sinkhorn_weight_gradient);
  m.impl("sinkhorn_matrix_gradient", sinkhorn_matrix_gradient);
  m.impl("sinkhorn_transport", sinkhorn_transport);
  m.impl("sinkhorn_softmin", sinkhorn_softmin);
  m.impl("sinkhorn_softmin_gradient", sinkhorn_softmin_gradient);
}

}  // namespace

TORCH_LIBRARY_IMPL(wgan_ext, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(wgan_ext, CUDA, m) { implement(m); }
TORCH_LIBRARY_IMPL(wgan_ext, Autograd, m) {
  m.impl("sinkhorn", sinkhorn_autograd);
  m.impl("sinkhorn_divergence", divergence_autograd);
  m.impl("sinkhorn_matrix", matrix_autograd);
  m.impl("sinkhorn_gradient", gradient_autograd);
  m.impl("sinkhorn_weight_gradient", weight_gradient_autograd);
  m.impl("sinkhorn_matrix_gradient", matrix_gradient_autograd);
  m.impl("sinkhorn_transport", transport_autograd);
  m.impl("sinkhorn_softmin", softmin_autograd);
  m.impl("sinkhorn_softmin_gradient", softmin_gradient_autograd);
}

}  // namespace wgan_ext::sinkhorn
