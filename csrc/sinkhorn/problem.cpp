#include "problem.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/log.h>
#include <ATen/ops/log2.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <limits>
#include <vector>

#include "../checks.h"

namespace wgan_ext::sinkhorn {

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

at::ScalarType kernel_type(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

Tensor batched(const Tensor& t, int64_t dim) { return t.dim() == dim ? t.unsqueeze(0) : t; }
Tensor given_form(const Tensor& t, bool batch) { return batch ? t : t.squeeze(0); }

namespace {

void check_cloud(const char* op, const char* name, const Tensor& t) {
  check_floating(op, name, t);
  TORCH_CHECK_VALUE((t.dim() == 2 || t.dim() == 3) && t.numel() > 0, op, ": ", name,
                    " must be points of shape (count, dim) or (batch, count, dim), at least one of each, got ",
                    t.sizes());
}

}  // namespace

at::IntArrayRef shape_of_weights(const Tensor& points) { return points.sizes().slice(0, points.dim() - 1); }

void check_weights(const char* op, const char* name, const OptionalTensor& w, at::IntArrayRef shape,
                   const char* other_name, const Tensor& other) {
  if (!w) return;
  check_floating(op, name, *w);
  check_shape(op, name, *w, shape);
  check_same_device(op, name, *w, other_name, other);
}

namespace {

struct Weights {
  Tensor a, b;            // [B, N], [B, M] double
  Tensor mass_a, mass_b;  // [B] double
};

// The weights and their masses, equal where the problem is balanced.
Weights prepare_weights(const Terms& terms, const Tensor& like, const Segments& x, const Segments& y,
                        const OptionalTensor& a, const OptionalTensor& b) {
  const auto weights = [&](const OptionalTensor& w, const Segments& of) {
    if (!w) return of.uniform(like.options().dtype(at::kDouble));
    return (of.ragged() ? w->detach() : batched(w->detach(), 1)).to(at::kDouble);
  };
  Weights w;
  w.a = weights(a, x);
  w.b = weights(b, y);
  w.mass_a = x.sum(w.a);
  w.mass_b = y.sum(w.b);
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
    const Tensor ratio = at::sqrt(w.mass_a / w.mass_b);
    w.a = w.a / x.spread(ratio);
    w.b = w.b * y.spread(ratio);
    w.mass_a = w.mass_b = at::sqrt(w.mass_a * w.mass_b);
  }
  return w;
}

Measure measure(const Segments& segments, const Tensor& points, const Tensor& weights, const Tensor& mass,
                const Tensor& centre, Cost cost) {
  const auto type = kernel_type(points);
  Measure m;
  m.segments = segments;
  const auto [centred, squares] = segments.centred(points, centre, type);
  m.points = centred;
  m.spread = segments.sum(squares * weights) / mass;
  m.squares = cost == Cost::sqeuclidean ? squares.to(type) : at::zeros(squares.sizes(), m.points.options());
  m.weights = weights.to(type).contiguous();
  m.log_weights =
      at::where(weights > 0, at::log2(weights), at::scalar_tensor(kLogZero, weights.options())).to(type).contiguous();
  m.mass = mass;
  return m;
}

}  // namespace

Problem prepare(const Terms& terms, const Tensor& given_x, const Tensor& given_y, const OptionalTensor& a,
                const OptionalTensor& b, const OptionalTensor& offsets_x, const OptionalTensor& offsets_y) {
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
  TORCH_CHECK_VALUE(offsets_x.has_value() == offsets_y.has_value(), op, ": offsets must be those of x and of y");
  const auto segmented = [&](const char* name, const Tensor& points, const OptionalTensor& offsets) {
    return offsets ? Segments(op, name, *offsets, points) : Segments(points.size(0), points.size(1));
  };
  const auto in_batch = [&](const Tensor& points) { return offsets_x ? points.detach() : batched(points.detach(), 2); };
  const Tensor x = in_batch(given_x), y = in_batch(given_y);
  const Segments of_x = segmented("x", x, offsets_x), of_y = segmented("y", y, offsets_y);
  TORCH_CHECK_VALUE(of_x.problems() == of_y.problems(), op, ": offsets of y must be those of as many problems as x (",
                    of_x.problems(), "), got ", of_y.problems());
  const Weights w = prepare_weights(terms, x, of_x, of_y, a, b);
  const auto mean = [](const Segments& of, const Tensor& points, const Tensor& weights, const Tensor& mass) {
    return of.weighted_sum(points, weights) / mass.unsqueeze(1);
  };
  const Tensor mean_x = mean(of_x, x, w.a, w.mass_a), mean_y = mean(of_y, y, w.b, w.mass_b);
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
  p.x = measure(of_x, x, w.a, w.mass_a, separate ? mean_x : middle, terms.cost);
  p.y = measure(of_y, y, w.b, w.mass_b, separate ? mean_y : middle, terms.cost);
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
  const Segments rows(p.matrix.size(0), p.matrix.size(1)), columns(p.matrix.size(0), p.matrix.size(2));
  const Weights w = prepare_weights(terms, p.matrix, rows, columns, a, b);
  const auto none = [&](const Tensor& weights) {
    return at::empty({weights.size(0), weights.size(1), 0}, p.matrix.options());
  };
  const Tensor nowhere = at::zeros({p.matrix.size(0), 0}, w.a.options());
  p.x = measure(rows, none(w.a), w.a, w.mass_a, nowhere, terms.cost);
  p.y = measure(columns, none(w.b), w.b, w.mass_b, nowhere, terms.cost);
  p.shift = nowhere;
  p.shift_cost = at::zeros_like(w.mass_a);
  return p;
}

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
      return at::sqrt(square * p.x.points.size(-1));
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
  const Tensor mass = m.segments.spread(m.mass.to(m.weights.scalar_type()));
  return -at::log(m.segments.least(at::where(m.weights > 0, m.weights, mass)));
}

// [B, N] The potential of the original cost from that of the centred one, and back. `sign` is +1 for x, -1 for y.
Tensor linear_part(const Problem& p, const Measure& m, double sign) {
  if (!p.terms.separate()) return at::zeros(m.weights.sizes(), p.shift.options());
  const Tensor product = m.segments.products(m.points, p.shift);
  return 2 * sign * product + m.segments.spread(p.shift_cost) / 2;
}

}  // namespace wgan_ext::sinkhorn
