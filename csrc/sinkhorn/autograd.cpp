// Derivatives of Sinkhorn's operators.
#include "autograd.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <functional>
#include <initializer_list>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace wgan_ext::sinkhorn {
namespace {

WGAN_EXT_SINKHORN_HANDLE(sinkhorn)
WGAN_EXT_SINKHORN_HANDLE(sinkhorn_divergence)
WGAN_EXT_SINKHORN_HANDLE(sinkhorn_matrix)
WGAN_EXT_SINKHORN_HANDLE(sinkhorn_gradient)
WGAN_EXT_SINKHORN_HANDLE(sinkhorn_weight_gradient)
WGAN_EXT_SINKHORN_HANDLE(sinkhorn_matrix_gradient)
WGAN_EXT_SINKHORN_HANDLE(sinkhorn_transport)
WGAN_EXT_SINKHORN_HANDLE(sinkhorn_softmin)
WGAN_EXT_SINKHORN_HANDLE(sinkhorn_softmin_gradient)
WGAN_EXT_SINKHORN_HANDLE(sinkhorn_hessian)
WGAN_EXT_SINKHORN_HANDLE(sinkhorn_matrix_hessian)

Tensor plain(const OptionalTensor& t) { return t.value_or(Tensor()); }

// grad [] or [B] times a gradient of more dimensions, the first of which a ragged batch's offsets cut.
Tensor scaled(const Tensor& grad, const Tensor& gradient, const OptionalTensor& offsets) {
  Tensor g = grad.to(gradient.scalar_type());
  if (offsets) g = at::repeat_interleave_symint(g, at::diff(*offsets).to(g.device()), 0, gradient.sym_size(0));
  while (g.dim() < gradient.dim()) g = g.unsqueeze(-1);
  return g * gradient;
}

// Which of x, y, a, b (or C, a, b) need a gradient; torch counts only the tensors that are there.
struct Needs {
  std::vector<bool> inputs;  // in this order
  Needs(const AutogradContext& ctx, size_t leading, const OptionalTensor& given_a, const OptionalTensor& given_b) {
    for (size_t i = 0; i < leading; ++i) inputs.push_back(ctx.needs_input_grad(i));
    inputs.push_back(given_a && ctx.needs_input_grad(leading));
    inputs.push_back(given_b && ctx.needs_input_grad(given_a ? leading + 1 : leading));
  }
  explicit Needs(std::vector<bool> needed) : inputs(std::move(needed)) {}
  void save(AutogradContext* ctx) const {
    c10::List<bool> list;
    for (const bool needed : inputs) list.push_back(needed);
    ctx->saved_data["needs"] = list;
  }
  static Needs load(AutogradContext* ctx) {
    const c10::List<bool> list = ctx->saved_data["needs"].toBoolList();
    return Needs(std::vector<bool>(list.begin(), list.end()));
  }
  // The results for the inputs that need one, as a Function returns them, and back.
  variable_list chosen(std::initializer_list<std::function<Tensor()>> results) const {
    variable_list some;
    size_t i = 0;
    for (const auto& result : results)
      if (inputs[i++]) some.push_back(result());
    return some;
  }
  std::vector<OptionalTensor> spread(const variable_list& some) const {
    std::vector<OptionalTensor> all(inputs.size());
    size_t next = 0;
    for (size_t i = 0; i < inputs.size(); ++i)
      if (inputs[i]) all[i] = optional(some[next++]);
    return all;
  }
};

// No gradient for weights that were not given.
Tensor given(const Tensor& weights, const Tensor& gradient) { return weights.defined() ? gradient : Tensor(); }

// The offsets of a ragged batch's clouds; neither where the batch is dense.
struct Offsets {
  OptionalTensor x, y;
};

// The gradients of a Function's `count` inputs: grad [] or [B] times those of its first ones, which belong to x and y
// in turn, that need one.
variable_list scaled_inputs(size_t count, const Tensor& grad, const Needs& needs, const variable_list& gradients,
                            const Offsets& offsets) {
  variable_list inputs(count);
  const auto all = needs.spread(gradients);
  for (size_t i = 0; i < all.size(); ++i)
    if (all[i]) inputs[i] = scaled(grad, *all[i], i % 2 == 0 ? offsets.x : offsets.y);
  return inputs;
}

constexpr const char* kOfGradients =
    "sinkhorn: the operators of its gradient have no derivatives of their own; differentiate the cost twice";
constexpr const char* kRagged =
    "sinkhorn: second derivatives of a ragged batch are not implemented; take its problems one by one, or pad them "
    "with points of weight 0";
constexpr const char* kThird =
    "sinkhorn: third derivatives are not implemented; detach the second derivative of a sinkhorn cost before "
    "differentiating through it";
constexpr const char* kOfPotentials =
    "TransportPlan: second derivatives of a potential at new points are not implemented; detach its gradient before "
    "differentiating through it";

// A cost's gradient in the points and weights that need one, by the envelope theorem: the dual's partial derivatives at
// the returned potentials. Its derivative lets them move.
class GradientFunction : public torch::autograd::Function<GradientFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const OptionalTensor& a,
                               const OptionalTensor& b, const Tensor& f, const Tensor& g, const Tensor& epsilon,
                               const Kept& kept, const Needs& needs, const Offsets& offsets) {
    at::AutoDispatchBelowADInplaceOrView below;
    kept.save(ctx);
    needs.save(ctx);
    ctx->set_materialize_grads(false);
    ctx->saved_data["ragged"] = offsets.x.has_value();
    ctx->save_for_backward({x, y, plain(a), plain(b), f, g, epsilon});
    const auto& [cost, power, rx, ry] = kept;
    const auto& [ox, oy] = offsets;
    const auto& points = sinkhorn_gradient_op();
    const auto& weights = sinkhorn_weight_gradient_op();
    return needs.chosen({
        [&] { return points.call(x, y, a, b, f, g, epsilon, cost, power, rx, ry, ox, oy); },
        [&] { return points.call(y, x, b, a, g, f, epsilon, cost, power, ry, rx, oy, ox); },
        [&] { return weights.call(x, y, a, b, f, epsilon, cost, power, rx, ry, ox, oy); },
        [&] { return weights.call(y, x, b, a, g, epsilon, cost, power, ry, rx, oy, ox); },
    });
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK_NOT_IMPLEMENTED(!ctx->saved_data["ragged"].toBool(), kRagged);
    const variable_list s = ctx->get_saved_variables();
    const auto [cost, power, rx, ry] = Kept::load(ctx);
    const auto v = Needs::load(ctx).spread(grads);
    const auto [x, y, a, b] = sinkhorn_hessian_op().call(v[0], v[1], v[2], v[3], s[0], s[1], optional(s[2]),
                                                         optional(s[3]), s[4], s[5], s[6], cost, power, rx, ry);
    return {x, y, given(s[2], a), given(s[3], b), {}, {}, {}, {}, {}, {}};
  }
};

// The same of the divergence: of the cross term, less the halves of the self terms, whose two sides move together.
class DivergenceGradientFunction : public torch::autograd::Function<DivergenceGradientFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const OptionalTensor& a,
                               const OptionalTensor& b, const Tensor& f, const Tensor& g, const Tensor& p,
                               const Tensor& q, const Tensor& epsilon, const Kept& kept, const Needs& needs,
                               const Offsets& offsets) {
    at::AutoDispatchBelowADInplaceOrView below;
    kept.save(ctx);
    needs.save(ctx);
    ctx->set_materialize_grads(false);
    ctx->saved_data["ragged"] = offsets.x.has_value();
    ctx->save_for_backward({x, y, plain(a), plain(b), f, g, p, q, epsilon});
    const auto& [cost, power, rx, ry] = kept;
    const auto& points = sinkhorn_gradient_op();
    const auto& weights = sinkhorn_weight_gradient_op();
    const auto& [ox, oy] = offsets;
    // Where mass may vanish the gradient of a self term has epsilon times its own mass, that of the cross term the
    // other side's; the derivative of epsilon / 2 (mass of a - mass of b)^2 is their difference, so the other side
    // stands here.
    const bool hard = kept.balanced();
    return needs.chosen({
        [&] {
          return points.call(x, y, a, b, f, g, epsilon, cost, power, rx, ry, ox, oy) -
                 points.call(x, x, a, a, p, p, epsilon, cost, power, rx, rx, ox, ox);
        },
        [&] {
          return points.call(y, x, b, a, g, f, epsilon, cost, power, ry, rx, oy, ox) -
                 points.call(y, y, b, b, q, q, epsilon, cost, power, ry, ry, oy, oy);
        },
        [&] {
          return weights.call(x, y, a, b, f, epsilon, cost, power, rx, ry, ox, oy) -
                 (hard ? weights.call(x, x, a, a, p, epsilon, cost, power, rx, rx, ox, ox)
                       : weights.call(x, y, a, b, p, epsilon, cost, power, rx, ry, ox, oy));
        },
        [&] {
          return weights.call(y, x, b, a, g, epsilon, cost, power, ry, rx, oy, ox) -
                 (hard ? weights.call(y, y, b, b, q, epsilon, cost, power, ry, ry, oy, oy)
                       : weights.call(y, x, b, a, q, epsilon, cost, power, ry, rx, oy, ox));
        },
    });
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK_NOT_IMPLEMENTED(!ctx->saved_data["ragged"].toBool(), kRagged);
    const variable_list s = ctx->get_saved_variables();
    const Kept kept = Kept::load(ctx);
    const auto& [cost, power, rx, ry] = kept;
    const auto v = Needs::load(ctx).spread(grads);
    const OptionalTensor a = optional(s[2]), b = optional(s[3]);
    const Tensor& epsilon = s[8];
    const auto& hessian = sinkhorn_hessian_op();
    auto [hx, hy, ha, hb] =
        hessian.call(v[0], v[1], v[2], v[3], s[0], s[1], a, b, s[4], s[5], epsilon, cost, power, rx, ry);
    if (v[0] || v[2]) {
      const auto [x1, x2, a1, a2] =
          hessian.call(v[0], v[0], v[2], v[2], s[0], s[0], a, a, s[6], s[6], epsilon, cost, power, rx, rx);
      hx = hx - (x1 + x2) / 2;
      ha = ha - (a1 + a2) / 2;
    }
    if (v[1] || v[3]) {
      const auto [y1, y2, b1, b2] =
          hessian.call(v[1], v[1], v[3], v[3], s[1], s[1], b, b, s[7], s[7], epsilon, cost, power, ry, ry);
      hy = hy - (y1 + y2) / 2;
      hb = hb - (b1 + b2) / 2;
    }
    if (!kept.balanced() && (v[2] || v[3])) {
      const auto mass = [&](const OptionalTensor& t) {
        return t ? at::sum(*t, {-1}, true, at::kDouble) : at::zeros({1}, epsilon.options());
      };
      const Tensor excess = (epsilon.unsqueeze(-1) * (mass(v[2]) - mass(v[3]))).to(ha.scalar_type());
      ha = ha + excess;
      hb = hb - excess;
    }
    return {hx, hy, given(s[2], ha), given(s[3], hb), {}, {}, {}, {}, {}, {}, {}, {}};
  }
};

// The same of the cost of a matrix: the plan, and f and g, or soft_gradient.
class MatrixGradientFunction : public torch::autograd::Function<MatrixGradientFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& costs, const OptionalTensor& a,
                               const OptionalTensor& b, const Tensor& f, const Tensor& g, const Tensor& epsilon,
                               const Kept& kept, const Needs& needs) {
    at::AutoDispatchBelowADInplaceOrView below;
    kept.save(ctx);
    needs.save(ctx);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({costs, plain(a), plain(b), f, g, epsilon});
    const auto weights = [&](const Tensor& potential, OptionalNumber given_rho, const OptionalTensor& other) {
      const Tensor mass = other ? at::sum(*other, {-1}, true, at::kDouble) : at::ones({1}, epsilon.options());
      const double rho = given_rho.value_or(std::numeric_limits<double>::infinity());
      return soft_gradient(potential.to(at::kDouble), epsilon.unsqueeze(-1), rho, mass).to(potential.scalar_type());
    };
    return needs.chosen({
        [&] { return sinkhorn_matrix_gradient_op().call(costs, a, b, f, g, epsilon); },
        [&] { return weights(f, kept.rho_x, b); },
        [&] { return weights(g, kept.rho_y, a); },
    });
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list s = ctx->get_saved_variables();
    const Kept kept = Kept::load(ctx);
    const auto v = Needs::load(ctx).spread(grads);
    const auto [costs, a, b] = sinkhorn_matrix_hessian_op().call(v[0], v[1], v[2], s[0], optional(s[1]), optional(s[2]),
                                                                 s[3], s[4], s[5], kept.rho_x, kept.rho_y);
    return {costs, given(s[1], a), given(s[2], b), {}, {}, {}, {}, {}};
  }
};

// Inputs x, y, a, b come first.
class SinkhornFunction : public torch::autograd::Function<SinkhornFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const OptionalTensor& a,
                               const OptionalTensor& b, const Kept& kept, OptionalNumber epsilon,
                               OptionalNumber scaling, double tol, int64_t max_iter, OptionalNumber relaxation,
                               int64_t memory_limit, const OptionalTensor& f, const OptionalTensor& g,
                               const OptionalTensor& offsets_x, const OptionalTensor& offsets_y) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [value, f1, g1, fc, gc, error, iterations, converged, used] =
        sinkhorn_op().call(x, y, a, b, kept.cost, kept.power, kept.rho_x, kept.rho_y, epsilon, scaling, tol, max_iter,
                           relaxation, memory_limit, f, g, offsets_x, offsets_y);
    kept.save(ctx);
    ctx->save_for_backward({x, y, plain(a), plain(b), fc, gc, used, plain(offsets_x), plain(offsets_y)});
    ctx->mark_non_differentiable({f1, g1, fc, gc, error, iterations, converged, used});
    return {value, f1, g1, fc, gc, error, iterations, converged, used};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &y = saved[1], &f = saved[4], &g = saved[5], &epsilon = saved[6];
    const OptionalTensor a = optional(saved[2]), b = optional(saved[3]);
    const Needs needs(*ctx, 2, a, b);
    const Offsets offsets{optional(saved[7]), optional(saved[8])};
    return scaled_inputs(15, grads[0], needs,
                         GradientFunction::apply(x, y, a, b, f, g, epsilon, Kept::load(ctx), needs, offsets), offsets);
  }
};

class DivergenceFunction : public torch::autograd::Function<DivergenceFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const OptionalTensor& a,
                               const OptionalTensor& b, const Kept& kept, OptionalNumber epsilon,
                               OptionalNumber scaling, double tol, int64_t max_iter, OptionalNumber relaxation,
                               int64_t memory_limit, const OptionalTensor& offsets_x, const OptionalTensor& offsets_y) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [value, f, g, p, q, error, iterations, converged, used] =
        sinkhorn_divergence_op().call(x, y, a, b, kept.cost, kept.power, kept.rho_x, kept.rho_y, epsilon, scaling, tol,
                                      max_iter, relaxation, memory_limit, offsets_x, offsets_y);
    kept.save(ctx);
    ctx->save_for_backward({x, y, plain(a), plain(b), f, g, p, q, used, plain(offsets_x), plain(offsets_y)});
    ctx->mark_non_differentiable({f, g, p, q, error, iterations, converged, used});
    return {value, f, g, p, q, error, iterations, converged, used};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &y = saved[1], &f = saved[4], &g = saved[5], &p = saved[6], &q = saved[7],
                 &epsilon = saved[8];
    const OptionalTensor a = optional(saved[2]), b = optional(saved[3]);
    const Needs needs(*ctx, 2, a, b);
    const Offsets offsets{optional(saved[9]), optional(saved[10])};
    return scaled_inputs(
        14, grads[0], needs,
        DivergenceGradientFunction::apply(x, y, a, b, f, g, p, q, epsilon, Kept::load(ctx), needs, offsets), offsets);
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
    return scaled_inputs(12, grads[0], needs, MatrixGradientFunction::apply(costs, a, b, f, g, epsilon, kept, needs),
                         {});
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
                        const Tensor& epsilon, const Kept& kept, const OptionalTensor& offsets_x,
                        const OptionalTensor& offsets_y) {
    at::AutoDispatchBelowADInplaceOrView below;
    kept.save(ctx);
    ctx->save_for_backward({x, y, plain(a), plain(b), f, g, epsilon, plain(offsets_x), plain(offsets_y)});
    return sinkhorn_transport_op().call(values, x, y, a, b, f, g, epsilon, kept.cost, kept.power, kept.rho_x,
                                        kept.rho_y, offsets_x, offsets_y);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list s = ctx->get_saved_variables();
    const Kept kept = Kept::load(ctx);
    variable_list inputs(11);
    inputs[0] =
        sinkhorn_transport_op().call(grads[0], s[1], s[0], optional(s[3]), optional(s[2]), s[5], s[4], s[6], kept.cost,
                                     kept.power, kept.rho_y, kept.rho_x, optional(s[8]), optional(s[7]));
    return inputs;
  }
};

Nine sinkhorn_autograd(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                       std::string_view cost, double power, OptionalNumber rho_x, OptionalNumber rho_y,
                       OptionalNumber epsilon, OptionalNumber scaling, double tol, int64_t max_iter,
                       OptionalNumber relaxation, int64_t memory_limit, const OptionalTensor& f,
                       const OptionalTensor& g, const OptionalTensor& offsets_x, const OptionalTensor& offsets_y) {
  const variable_list r =
      SinkhornFunction::apply(x, y, a, b, Kept{std::string(cost), power, rho_x, rho_y}, epsilon, scaling, tol, max_iter,
                              relaxation, memory_limit, f, g, offsets_x, offsets_y);
  return {r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8]};
}

Nine divergence_autograd(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                         std::string_view cost, double power, OptionalNumber rho_x, OptionalNumber rho_y,
                         OptionalNumber epsilon, OptionalNumber scaling, double tol, int64_t max_iter,
                         OptionalNumber relaxation, int64_t memory_limit, const OptionalTensor& offsets_x,
                         const OptionalTensor& offsets_y) {
  const variable_list r =
      DivergenceFunction::apply(x, y, a, b, Kept{std::string(cost), power, rho_x, rho_y}, epsilon, scaling, tol,
                                max_iter, relaxation, memory_limit, offsets_x, offsets_y);
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
                         OptionalNumber rho_x, OptionalNumber rho_y, const OptionalTensor& offsets_x,
                         const OptionalTensor& offsets_y) {
  return refused(kOfGradients, {x, y, a, b}, [&] {
    return variable_list{
        sinkhorn_gradient_op().call(x, y, a, b, f, g, epsilon, cost, power, rho_x, rho_y, offsets_x, offsets_y)};
  })[0];
}

Tensor weight_gradient_autograd(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                                const Tensor& f, const Tensor& epsilon, std::string_view cost, double power,
                                OptionalNumber rho_x, OptionalNumber rho_y, const OptionalTensor& offsets_x,
                                const OptionalTensor& offsets_y) {
  return refused(kOfGradients, {x, y, a, b}, [&] {
    return variable_list{
        sinkhorn_weight_gradient_op().call(x, y, a, b, f, epsilon, cost, power, rho_x, rho_y, offsets_x, offsets_y)};
  })[0];
}

Tensor matrix_gradient_autograd(const Tensor& costs, const OptionalTensor& a, const OptionalTensor& b, const Tensor& f,
                                const Tensor& g, const Tensor& epsilon) {
  return refused(kOfGradients, {costs, a, b},
                 [&] { return variable_list{sinkhorn_matrix_gradient_op().call(costs, a, b, f, g, epsilon)}; })[0];
}

Tensor transport_autograd(const Tensor& values, const Tensor& x, const Tensor& y, const OptionalTensor& a,
                          const OptionalTensor& b, const Tensor& f, const Tensor& g, const Tensor& epsilon,
                          std::string_view cost, double power, OptionalNumber rho_x, OptionalNumber rho_y,
                          const OptionalTensor& offsets_x, const OptionalTensor& offsets_y) {
  return TransportFunction::apply(values, x, y, a, b, f, g, epsilon, Kept{std::string(cost), power, rho_x, rho_y},
                                  offsets_x, offsets_y);
}

Tensor softmin_autograd(const Tensor& x, const Tensor& y, const OptionalTensor& b, const Tensor& g,
                        const Tensor& epsilon, std::string_view cost, double power) {
  return SoftminFunction::apply(x, y, b, g, epsilon, std::string(cost), power);
}

Tensor softmin_gradient_autograd(const Tensor& x, const Tensor& y, const OptionalTensor& b, const Tensor& f,
                                 const Tensor& g, const Tensor& epsilon, std::string_view cost, double power) {
  return refused(kOfPotentials, {x, y, b}, [&] {
    return variable_list{sinkhorn_softmin_gradient_op().call(x, y, b, f, g, epsilon, cost, power)};
  })[0];
}

Four hessian_autograd(const OptionalTensor& dx, const OptionalTensor& dy, const OptionalTensor& da,
                      const OptionalTensor& db, const Tensor& x, const Tensor& y, const OptionalTensor& a,
                      const OptionalTensor& b, const Tensor& f, const Tensor& g, const Tensor& epsilon,
                      std::string_view cost, double power, OptionalNumber rho_x, OptionalNumber rho_y) {
  const variable_list r = refused(kThird, {dx, dy, da, db, x, y, a, b}, [&] {
    const auto [hx, hy, ha, hb] =
        sinkhorn_hessian_op().call(dx, dy, da, db, x, y, a, b, f, g, epsilon, cost, power, rho_x, rho_y);
    return variable_list{hx, hy, ha, hb};
  });
  return {r[0], r[1], r[2], r[3]};
}

Three matrix_hessian_autograd(const OptionalTensor& dc, const OptionalTensor& da, const OptionalTensor& db,
                              const Tensor& costs, const OptionalTensor& a, const OptionalTensor& b, const Tensor& f,
                              const Tensor& g, const Tensor& epsilon, OptionalNumber rho_x, OptionalNumber rho_y) {
  const variable_list r = refused(kThird, {dc, da, db, costs, a, b}, [&] {
    const auto [hc, ha, hb] = sinkhorn_matrix_hessian_op().call(dc, da, db, costs, a, b, f, g, epsilon, rho_x, rho_y);
    return variable_list{hc, ha, hb};
  });
  return {r[0], r[1], r[2]};
}

}  // namespace

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
  m.impl("sinkhorn_hessian", hessian_autograd);
  m.impl("sinkhorn_matrix_hessian", matrix_hessian_autograd);
}

}  // namespace wgan_ext::sinkhorn
