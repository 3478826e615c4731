// Sinkhorn's operators: what a solve returns, and what its derivatives compute.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../checks.h"
#include "ops.h"
#include "solver.h"

namespace wgan_ext::sinkhorn {
namespace {

// [B] The dual at the potentials: with hard marginals <a, f> + <b, g> - epsilon (mass of the plan - mass of a x b),
// else rho <a, 1 - exp(-f / rho)> in place of <a, f>.
Tensor dual(const Measure& x, const Measure& y, double rho_x, double rho_y, const Solution& s) {
  const auto integral = [](const Measure& m, const Tensor& potential, double rho) {
    const Tensor f = potential.to(at::kDouble), soft = std::isinf(rho) ? f : -rho * at::expm1(f / -rho);
    return m.segments.sum(m.weights.to(at::kDouble) * soft);
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

bool is_batch(const Tensor& points, const OptionalTensor& offsets) { return offsets || points.dim() == 3; }

// The potential to start from, of the centred problem.
OptionalTensor start_of(const char* op, const char* name, const OptionalTensor& potential, at::IntArrayRef shape,
                        const char* other_name, const Tensor& other, const Tensor& linear, at::ScalarType type) {
  if (!potential) return std::nullopt;
  check_weights(op, name, potential, shape, other_name, other);
  const Tensor start = (potential->detach().reshape(linear.sizes()).to(at::kDouble) - linear).to(type);
  if (other.is_cpu()) TORCH_CHECK_VALUE(at::isfinite(start).all().item<bool>(), op, ": ", name, " must be finite");
  return start;
}

Tensor agreed(const Exchange* exchange, const Tensor& t) { return exchange ? exchange->agreed(t) : t; }

void check_init(const char* op, const OptionalTensor& f, const OptionalTensor& g) {
  TORCH_CHECK_VALUE(f.has_value() == g.has_value(), op, ": init must hold both potentials, f and g");
}

}  // namespace

Nine solve(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b, std::string_view cost,
           double power, OptionalNumber rho_x, OptionalNumber rho_y, OptionalNumber epsilon, OptionalNumber scaling,
           double tol, int64_t max_iter, OptionalNumber relaxation, int64_t memory_limit, const OptionalTensor& f,
           const OptionalTensor& g, const OptionalTensor& offsets_x, const OptionalTensor& offsets_y,
           const Exchange* exchange) {
  constexpr const char* op = "sinkhorn";
  const Terms terms = parse_terms(op, cost, power, rho_x, rho_y);
  const Request request = parse(terms, epsilon, scaling, tol, max_iter, relaxation, memory_limit);
  const Problem p = prepare(terms, x, y, a, b, offsets_x, offsets_y);
  const auto type = kernel_type(x);
  const Tensor linear_x = linear_part(p, p.x, 1), linear_y = linear_part(p, p.y, -1);
  check_init(op, f, g);
  const OptionalTensor f0 = start_of(op, "init f", f, shape_of_weights(x), "x", x, linear_x, type),
                       g0 = start_of(op, "init g", g, shape_of_weights(y), "y", y, linear_y, type);
  const Tensor target = agreed(exchange, resolve_epsilon(p, request));
  const Solution s = with_type(type, [&](auto scalar) {
    return Solver<decltype(scalar)>(p, target, request, exchange).cross(f0, g0, nullptr, nullptr);
  });
  warn_unless_converged(request, {&s});
  const Tensor value = agreed(exchange, dual(p.x, p.y, terms.rho_x, terms.rho_y, s) + p.x.mass * p.shift_cost);
  const auto form = [&](const Tensor& t) { return given_form(t, is_batch(x, offsets_x)); };
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

Nine solve_divergence(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                      std::string_view cost, double power, OptionalNumber rho_x, OptionalNumber rho_y,
                      OptionalNumber epsilon, OptionalNumber scaling, double tol, int64_t max_iter,
                      OptionalNumber relaxation, int64_t memory_limit, const OptionalTensor& offsets_x,
                      const OptionalTensor& offsets_y, const Exchange* exchange) {
  constexpr const char* op = "sinkhorn_divergence";
  const Terms terms = parse_terms(op, cost, power, rho_x, rho_y);
  const Request request = parse(terms, epsilon, scaling, tol, max_iter, relaxation, memory_limit);
  const Problem p = prepare(terms, x, y, a, b, offsets_x, offsets_y);
  const auto type = kernel_type(x);
  const Tensor target = agreed(exchange, resolve_epsilon(p, request));
  const auto [xx, yy, xy] = with_type(type, [&](auto scalar) {
    Solver<decltype(scalar)> solver(p, target, request, exchange);
    const Solution xx = solver.self(Role::rows), yy = solver.self(Role::columns);
    return std::make_tuple(xx, yy, solver.cross(xx.f, yy.f, &xx, &yy));
  });
  warn_unless_converged(request, {&xy, &xx, &yy});
  const double rx = terms.rho_x, ry = terms.rho_y;
  Tensor value = dual(p.x, p.y, rx, ry, xy) - (dual(p.x, p.x, rx, rx, xx) + dual(p.y, p.y, ry, ry, yy)) / 2 +
                 p.x.mass * p.shift_cost;
  if (!terms.balanced()) value = value + target / 2 * at::pow(p.x.mass - p.y.mass, 2);
  const Tensor facts = at::stack({xy.facts, xx.facts, yy.facts});
  const auto form = [&](const Tensor& t) { return given_form(t, is_batch(x, offsets_x)); };
  return {form(agreed(exchange, value.to(type))),
          form(xy.f),
          form(xy.g),
          form(xx.f),
          form(yy.f),
          form(facts.select(2, 0).amax({0}).to(type)),
          form(xy.facts.select(1, 2).to(at::kLong)),
          form(facts.select(2, 3).amin({0}).to(at::kBool)),
          form(target)};
}

Nine sinkhorn(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b, std::string_view cost,
              double power, OptionalNumber rho_x, OptionalNumber rho_y, OptionalNumber epsilon, OptionalNumber scaling,
              double tol, int64_t max_iter, OptionalNumber relaxation, int64_t memory_limit, const OptionalTensor& f,
              const OptionalTensor& g, const OptionalTensor& offsets_x, const OptionalTensor& offsets_y) {
  return solve(x, y, a, b, cost, power, rho_x, rho_y, epsilon, scaling, tol, max_iter, relaxation, memory_limit, f, g,
               offsets_x, offsets_y, nullptr);
}

Nine sinkhorn_divergence(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                         std::string_view cost, double power, OptionalNumber rho_x, OptionalNumber rho_y,
                         OptionalNumber epsilon, OptionalNumber scaling, double tol, int64_t max_iter,
                         OptionalNumber relaxation, int64_t memory_limit, const OptionalTensor& offsets_x,
                         const OptionalTensor& offsets_y) {
  return solve_divergence(x, y, a, b, cost, power, rho_x, rho_y, epsilon, scaling, tol, max_iter, relaxation,
                          memory_limit, offsets_x, offsets_y, nullptr);
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
  const Tensor no_x = linear_part(p, p.x, 1), no_y = linear_part(p, p.y, -1);
  std::vector<int64_t> shape_f(costs.sizes().begin(), costs.sizes().end() - 1), shape_g = shape_f;
  shape_g.back() = costs.size(-1);
  const OptionalTensor f0 = start_of(op, "init f", f, shape_f, "C", costs, no_x, type),
                       g0 = start_of(op, "init g", g, shape_g, "C", costs, no_y, type);
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

namespace {

// The problem of held potentials, and the solver for it.
template <typename Body>
Tensor with_held(const Problem& p, const Tensor& epsilon, const Body& body) {
  const Request request = parse(p.terms, {}, {}, 0, 1, {}, 0);
  const Tensor target = epsilon.to(at::kDouble).expand({p.problems()}).contiguous();
  return with_type(kernel_type(p.x.points),
                   [&](auto scalar) { return body(Solver<decltype(scalar)>(p, target, request)); });
}

// [B, N, D]
Tensor gradient(const Problem& p, const Tensor& f, const Tensor& g, const Tensor& epsilon) {
  return with_held(p, epsilon, [&](auto solver) {
    const auto [force, mass] = solver.gradient(f, g);
    if (p.terms.cost != Cost::sqeuclidean) return force;
    return p.terms.separate() ? 2 * (force + mass.unsqueeze(-1) * p.x.segments.spread(p.shift)) : 2 * force;
  });
}

Tensor gradient(const Terms& terms, const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                const Tensor& f, const Tensor& g, const Tensor& epsilon, const OptionalTensor& offsets_x = {},
                const OptionalTensor& offsets_y = {}) {
  const Problem p = prepare(terms, x, y, a, b, offsets_x, offsets_y);
  return given_form(gradient(p, f, g, epsilon).to(x.scalar_type()), is_batch(x, offsets_x));
}

}  // namespace

// d cost / d x = sum_j plan_ij dC_ij / dx_i at frozen potentials of the centred problem. [N, D]
Tensor sinkhorn_gradient(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                         const Tensor& f, const Tensor& g, const Tensor& epsilon, std::string_view cost, double power,
                         OptionalNumber rho_x, OptionalNumber rho_y, const OptionalTensor& offsets_x,
                         const OptionalTensor& offsets_y) {
  return gradient(parse_terms("sinkhorn_gradient", cost, power, rho_x, rho_y), x, y, a, b, f, g, epsilon, offsets_x,
                  offsets_y);
}

// The same of some rows of x, which depend on no other. [count, D]
Tensor gradient_of_rows(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                        const Tensor& f, const Tensor& g, const Tensor& epsilon, std::string_view cost, double power,
                        OptionalNumber rho_x, OptionalNumber rho_y, Range rows) {
  if (rows.count == 0) return at::zeros({0, x.size(1)}, x.options());
  Problem p = prepare(parse_terms("sinkhorn_gradient", cost, power, rho_x, rho_y), x, y, a, b);
  p.x.segments = Segments(1, rows.count);
  for (Tensor* t : {&p.x.points, &p.x.squares, &p.x.weights, &p.x.log_weights})
    *t = t->narrow(1, rows.begin, rows.count);
  return gradient(p, f.narrow(-1, rows.begin, rows.count), g, epsilon).squeeze(0).to(x.scalar_type());
}

// rho (1 - T) - epsilon (T - mass of the other side), T = exp(-f / rho), double; the arguments go together.
Tensor soft_gradient(const Tensor& f, const Tensor& epsilon, double rho, const Tensor& other_mass) {
  const Tensor soft = std::isinf(rho) ? f : -rho * at::expm1(f / -rho);
  return soft - epsilon * (at::exp(f / -rho) - other_mass);
}

// d cost / d a, from the potential of the centred problem; defined up to a constant where both marginals are hard. [N]
Tensor sinkhorn_weight_gradient(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                                const Tensor& f, const Tensor& epsilon, std::string_view cost, double power,
                                OptionalNumber rho_x, OptionalNumber rho_y, const OptionalTensor& offsets_x,
                                const OptionalTensor& offsets_y) {
  const Terms terms = parse_terms("sinkhorn_weight_gradient", cost, power, rho_x, rho_y);
  const Problem p = prepare(terms, x, y, a, b, offsets_x, offsets_y);
  const Tensor linear = linear_part(p, p.x, 1), potential = f.reshape(linear.sizes()).to(at::kDouble) + linear;
  const auto spread = [&](const Tensor& t) { return p.x.segments.spread(t); };
  const Tensor gradient = soft_gradient(potential, spread(epsilon.reshape({-1})), terms.rho_x, spread(p.y.mass));
  return given_form(gradient.to(f.scalar_type()), is_batch(x, offsets_x));
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
                          std::string_view cost, double power, OptionalNumber rho_x, OptionalNumber rho_y,
                          const OptionalTensor& offsets_x, const OptionalTensor& offsets_y) {
  constexpr const char* op = "sinkhorn_transport";
  const Terms terms = parse_terms(op, cost, power, rho_x, rho_y);
  const Problem p = prepare(terms, x, y, a, b, offsets_x, offsets_y);
  check_floating(op, "values", values);
  check_same_device(op, "values", values, "y", y);
  TORCH_CHECK_VALUE(
      values.dim() == y.dim() && values.sizes().slice(0, y.dim() - 1) == shape_of_weights(y) && values.size(-1) > 0, op,
      ": values must have shape ", shape_of_weights(y), " and one more dimension, got ", values.sizes());
  const Tensor whole = (offsets_y ? values : batched(values, 2)).to(kernel_type(x));
  const Tensor out = with_held(p, epsilon, [&](auto solver) { return solver.transport(f, g, whole); });
  return given_form(out.to(values.scalar_type()), is_batch(x, offsets_x));
}

namespace {

Terms softmin_terms(const char* op, std::string_view cost, double power) {
  Terms terms = parse_terms(op, cost, power, 1.0, 1.0);  // no marginal is kept
  terms.around_y = true;
  return terms;
}

}  // namespace

// The potential of x's side at the points: -epsilon log sum_j b_j exp((g_j - C(x, y_j)) / epsilon), for the potential g
// of the original problem. [N]
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

namespace {

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

}  // namespace wgan_ext::sinkhorn
