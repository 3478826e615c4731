// Derivatives of Sinkhorn's operators.
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/diff.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <functional>
#include <limits>
#include <string>

#include "ops.h"

namespace wgan_ext::sinkhorn {
namespace {

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

// grad [] or [B] times a gradient of `dims` more dimensions, the first of which a ragged batch's offsets cut.
Tensor scaled(const Tensor& grad, const Tensor& gradient, int64_t dims, const OptionalTensor& offsets = {}) {
  Tensor g = grad.to(gradient.scalar_type());
  if (offsets) {
    g = at::repeat_interleave_symint(g, at::diff(*offsets).to(g.device()), 0, gradient.sym_size(0));
    --dims;
  }
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
    const OptionalTensor a = optional(saved[2]), b = optional(saved[3]), ox = optional(saved[7]),
                         oy = optional(saved[8]);
    const auto [cost, power, rx, ry] = Kept::load(ctx);
    const auto& points = sinkhorn_gradient_op();
    const auto& weights = sinkhorn_weight_gradient_op();
    const Needs needs(*ctx, 2, a, b);
    variable_list inputs(15);
    if (needs.x)
      inputs[0] = scaled(grads[0], points.call(x, y, a, b, f, g, epsilon, cost, power, rx, ry, ox, oy), 2, ox);
    if (needs.y)
      inputs[1] = scaled(grads[0], points.call(y, x, b, a, g, f, epsilon, cost, power, ry, rx, oy, ox), 2, oy);
    if (needs.a) inputs[2] = scaled(grads[0], weights.call(x, y, a, b, f, epsilon, cost, power, rx, ry, ox, oy), 1, ox);
    if (needs.b) inputs[3] = scaled(grads[0], weights.call(y, x, b, a, g, epsilon, cost, power, ry, rx, oy, ox), 1, oy);
    return inputs;
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
    const OptionalTensor a = optional(saved[2]), b = optional(saved[3]), ox = optional(saved[9]),
                         oy = optional(saved[10]);
    const auto [cost, power, rx, ry] = Kept::load(ctx);
    const auto& points = sinkhorn_gradient_op();
    const auto& weights = sinkhorn_weight_gradient_op();
    const Needs needs(*ctx, 2, a, b);
    variable_list inputs(14);
    if (needs.x)
      inputs[0] = scaled(grads[0],
                         points.call(x, y, a, b, f, g, epsilon, cost, power, rx, ry, ox, oy) -
                             points.call(x, x, a, a, p, p, epsilon, cost, power, rx, rx, ox, ox),
                         2, ox);
    if (needs.y)
      inputs[1] = scaled(grads[0],
                         points.call(y, x, b, a, g, f, epsilon, cost, power, ry, rx, oy, ox) -
                             points.call(y, y, b, b, q, q, epsilon, cost, power, ry, ry, oy, oy),
                         2, oy);
    // Where mass may vanish the gradient of a self term has epsilon times its own mass, that of the cross term the
    // other side's; the derivative of epsilon / 2 (mass of a - mass of b)^2 is their difference, so the other side
    // stands here.
    const bool hard = !rx && !ry;
    if (needs.a)
      inputs[2] = scaled(grads[0],
                         weights.call(x, y, a, b, f, epsilon, cost, power, rx, ry, ox, oy) -
                             (hard ? weights.call(x, x, a, a, p, epsilon, cost, power, rx, rx, ox, ox)
                                   : weights.call(x, y, a, b, p, epsilon, cost, power, rx, ry, ox, oy)),
                         1, ox);
    if (needs.b)
      inputs[3] = scaled(grads[0],
                         weights.call(y, x, b, a, g, epsilon, cost, power, ry, rx, oy, ox) -
                             (hard ? weights.call(y, y, b, b, q, epsilon, cost, power, ry, ry, oy, oy)
                                   : weights.call(y, x, b, a, q, epsilon, cost, power, ry, rx, oy, ox)),
                         1, oy);
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
      const Tensor mass = b ? at::sum(*b, {-1}, true, at::kDouble) : at::ones({1}, epsilon.options());
      const double rho = rho_x.value_or(std::numeric_limits<double>::infinity());
      return soft_gradient(f.to(at::kDouble), epsilon.unsqueeze(-1), rho, mass).to(f.scalar_type());
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
  return RefusedFunction::apply(x, OptionalTensor(y), a, b, [&] {
    return sinkhorn_gradient_op().call(x, y, a, b, f, g, epsilon, cost, power, rho_x, rho_y, offsets_x, offsets_y);
  });
}

Tensor weight_gradient_autograd(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                                const Tensor& f, const Tensor& epsilon, std::string_view cost, double power,
                                OptionalNumber rho_x, OptionalNumber rho_y, const OptionalTensor& offsets_x,
                                const OptionalTensor& offsets_y) {
  return RefusedFunction::apply(x, OptionalTensor(y), a, b, [&] {
    return sinkhorn_weight_gradient_op().call(x, y, a, b, f, epsilon, cost, power, rho_x, rho_y, offsets_x, offsets_y);
  });
}

Tensor matrix_gradient_autograd(const Tensor& costs, const OptionalTensor& a, const OptionalTensor& b, const Tensor& f,
                                const Tensor& g, const Tensor& epsilon) {
  return RefusedFunction::apply(costs, a, b, OptionalTensor(),
                                [&] { return sinkhorn_matrix_gradient_op().call(costs, a, b, f, g, epsilon); });
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
  return RefusedFunction::apply(x, OptionalTensor(y), OptionalTensor(), b, [&] {
    return sinkhorn_softmin_gradient_op().call(x, y, b, f, g, epsilon, cost, power);
  });
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
}

}  // namespace wgan_ext::sinkhorn
