// The operators spectral_norm and spectral_norm_backward: checks, allocation, choice of kernels, derivatives.
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/matmul.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../backend.h"
#include "../checks.h"
#include "../results.h"
#include "kernels.h"

namespace wgan_ext::spectral {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Normalized = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // weight, u, v, sigma

constexpr const char* kForward = "spectral_norm";
constexpr const char* kBackward = "spectral_norm_backward";

Shape matrix(const char* op, const Tensor& weight, int64_t dim) {
  TORCH_CHECK_VALUE(weight.dim() > 0, op, ": weight must have at least one dimension, got a scalar");
  TORCH_CHECK_INDEX(dim >= -weight.dim() && dim < weight.dim(), op, ": dim must be in [", -weight.dim(), ", ",
                    weight.dim() - 1, "] for a weight of shape ", weight.sizes(), ", got ", dim);
  if (dim < 0) dim += weight.dim();
  Shape shape{1, weight.size(dim), 1};
  for (int64_t d = 0; d < dim; ++d) shape.outer *= weight.size(d);
  for (int64_t d = dim + 1; d < weight.dim(); ++d) shape.inner *= weight.size(d);
  return shape;
}

void check_vector(const char* op, const char* name, const Tensor& t, int64_t size, const Tensor& weight) {
  check_shape(op, name, t, {size});
  check_same_dtype(op, name, t, "weight", weight);
  check_same_device(op, name, t, "weight", weight);
}

// The dtype that the kernels compute in, and that of sigma.
at::ScalarType compute_type(const Tensor& weight) {
  return weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor operand(const Tensor& t, at::ScalarType type) {
  if (t.scalar_type() == type && t.is_contiguous()) return t;  // else two calls of the dispatcher, for nothing
  return t.to(type).contiguous();
}

// Calls body(T{}) for the type that the kernels compute in.
template <typename Body>
void with_type(at::ScalarType type, const Body& body) {
  if (type == at::kDouble)
    body(double{});
  else
    body(float{});
}

// `result`, which is contiguous, with the dtype and the strides of `like`.
Tensor in_layout_of(const Tensor& like, const Tensor& result) {
  if (result.scalar_type() == like.scalar_type() && like.is_contiguous()) return result;
  Tensor out = at::empty_like(like);
  out.copy_(result);
  return out;
}

Normalized forward(const Tensor& weight, const Tensor& u, const Tensor& v, int64_t dim, int64_t n_power_iterations,
                   double eps, bool v_first) {
  check_floating(kForward, "weight", weight);
  const Shape shape = matrix(kForward, weight, dim);
  check_vector(kForward, "u", u, shape.rows, weight);
  check_vector(kForward, "v", v, columns(shape), weight);
  TORCH_CHECK_VALUE(n_power_iterations >= 0, kForward, ": n_power_iterations must not be negative, got ",
                    n_power_iterations);
  TORCH_CHECK_VALUE(eps >= 0, kForward, ": eps must not be negative, got ", eps);

  const DeviceScope scope(weight);
  const at::ScalarType type = compute_type(weight);
  const auto options = weight.options().dtype(type);
  Tensor normalized = empty_result(weight.sizes(), options), new_u = at::empty(u.sizes(), options);
  Tensor new_v = at::empty(v.sizes(), options), sigma = at::empty({}, options);
  if (elements(shape) == 0) {
    sigma.fill_(eps);
    return {in_layout_of(weight, normalized), u.clone(), v.clone(), sigma};
  }
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const auto& kernels = kernels_for<Kernels<T>>(kForward, weight);
    const Tensor w = operand(weight, type), u0 = operand(u, type), v0 = operand(v, type);
    const Tensor scratch = at::empty({kernels.scratch(shape)}, options);
    kernels.normalize(w.const_data_ptr<T>(), shape, u0.const_data_ptr<T>(), v0.const_data_ptr<T>(), n_power_iterations,
                      v_first, eps, normalized.mutable_data_ptr<T>(), new_u.mutable_data_ptr<T>(),
                      new_v.mutable_data_ptr<T>(), sigma.mutable_data_ptr<T>(), scratch.mutable_data_ptr<T>(),
                      scope.stream());
  });
  return {in_layout_of(weight, normalized), in_layout_of(u, new_u), in_layout_of(v, new_v), sigma};
}

Tensor backward(const std::optional<Tensor>& grad, const std::optional<Tensor>& grad_sigma, const Tensor& weight,
                const Tensor& u, const Tensor& v, const Tensor& sigma, int64_t dim) {
  check_floating(kBackward, "weight", weight);
  const Shape shape = matrix(kBackward, weight, dim);
  check_vector(kBackward, "u", u, shape.rows, weight);
  check_vector(kBackward, "v", v, columns(shape), weight);
  check_shape(kBackward, "sigma", sigma, {});
  check_same_device(kBackward, "sigma", sigma, "weight", weight);
  if (grad) {
    check_shape(kBackward, "grad", *grad, weight.sizes());
    check_same_dtype(kBackward, "grad", *grad, "weight", weight);
    check_same_device(kBackward, "grad", *grad, "weight", weight);
  }
  if (grad_sigma) {
    check_shape(kBackward, "grad_sigma", *grad_sigma, {});
    check_same_device(kBackward, "grad_sigma", *grad_sigma, "weight", weight);
  }

  const DeviceScope scope(weight);
  const at::ScalarType type = compute_type(weight);
  const auto options = weight.options().dtype(type);
  Tensor grad_weight = empty_result(weight.sizes(), options);
  if (elements(shape) == 0) return in_layout_of(weight, grad_weight);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const auto& kernels = kernels_for<Kernels<T>>(kBackward, weight);
    const Tensor w = operand(weight, type), u0 = operand(u, type), v0 = operand(v, type), s = operand(sigma, type);
    const Tensor g = grad ? operand(*grad, type) : Tensor(), gs = grad_sigma ? operand(*grad_sigma, type) : Tensor();
    const Tensor scratch = at::empty({kernels.scratch(shape)}, options);
    kernels.backward(grad ? g.const_data_ptr<T>() : nullptr, grad_sigma ? gs.const_data_ptr<T>() : nullptr,
                     w.const_data_ptr<T>(), shape, u0.const_data_ptr<T>(), v0.const_data_ptr<T>(),
                     s.const_data_ptr<T>(), grad_weight.mutable_data_ptr<T>(), scratch.mutable_data_ptr<T>(),
                     scope.stream());
  });
  return in_layout_of(weight, grad_weight);
}

// ---- derivatives

Normalized call_forward(const Tensor& weight, const Tensor& u, const Tensor& v, int64_t dim, int64_t n_power_iterations,
                        double eps, bool v_first) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("wgan_ext::spectral_norm", "").typed<decltype(forward)>();
  return op.call(weight, u, v, dim, n_power_iterations, eps, v_first);
}

Tensor call_backward(const std::optional<Tensor>& grad, const std::optional<Tensor>& grad_sigma, const Tensor& weight,
                     const Tensor& u, const Tensor& v, const Tensor& sigma, int64_t dim) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("wgan_ext::spectral_norm_backward", "")
                             .typed<decltype(backward)>();
  return op.call(grad, grad_sigma, weight, u, v, sigma, dim);
}

std::optional<Tensor> if_defined(const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; }

bool wants_grad(const Tensor& t) { return t.defined() && t.requires_grad(); }
bool wants_grad(const std::optional<Tensor>& t) { return t && wants_grad(*t); }

// normalized = W / sigma and sigma = u . (W v), with u and v constant.
struct Normalize : torch::autograd::Function<Normalize> {
  static variable_list forward(AutogradContext* ctx, const Tensor& weight, const Tensor& u, const Tensor& v,
                               int64_t dim, int64_t n_power_iterations, double eps, bool v_first) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [normalized, new_u, new_v, sigma] = call_forward(weight, u, v, dim, n_power_iterations, eps, v_first);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({new_u, new_v});
    ctx->save_for_backward({weight, new_u, new_v, sigma});
    ctx->saved_data["dim"] = dim;
    return {normalized, new_u, new_v, sigma};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(7);
    if (!grads[0].defined() && !grads[3].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    result[0] = call_backward(if_defined(grads[0]), if_defined(grads[3]), saved[0], saved[1], saved[2], saved[3],
                              ctx->saved_data["dim"].toInt());
    return result;
  }
};

// The gradient D = G / sigma + (g - <G, W> / sigma^2) u v^T is linear in G and g = grad_sigma. With H the gradient by D
// and q = <H, u v^T>, its own derivatives are
//   by G: H / sigma - q W / sigma^2        by g: q        by W: -q G / sigma^2
//   by sigma: (2 q <G, W> / sigma - <H, G>) / sigma^2
// in operators of ATen, hence differentiable to any order.
struct NormalizeBackward : torch::autograd::Function<NormalizeBackward> {
  static Tensor forward(AutogradContext* ctx, const std::optional<Tensor>& grad,
                        const std::optional<Tensor>& grad_sigma, const Tensor& weight, const Tensor& u, const Tensor& v,
                        const Tensor& sigma, int64_t dim) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({grad.value_or(Tensor()), weight, u, v, sigma});
    ctx->saved_data["dim"] = dim;
    ctx->saved_data["with_grad_sigma"] = grad_sigma.has_value();
    return call_backward(grad, grad_sigma, weight, u, v, sigma, dim);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(7);
    const Tensor& h = grads[0];
    if (!h.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad = saved[0], &weight = saved[1], &u = saved[2], &v = saved[3];
    const Tensor sigma = saved[4].to(weight.scalar_type());
    const Shape shape = matrix(kBackward, weight, ctx->saved_data["dim"].toInt());
    const Tensor by_columns = at::matmul(u, h.reshape({shape.outer, shape.rows, shape.inner}));
    const Tensor q = (by_columns * v.view({shape.outer, shape.inner})).sum();
    if (grad.defined()) {
      result[0] = h / sigma - (q / sigma.square()) * weight;
      result[2] = -(q / sigma.square()) * grad;
      const Tensor by_sigma = (2 * q * (grad * weight).sum() / sigma - (h * grad).sum()) / sigma.square();
      result[5] = by_sigma.to(saved[4].scalar_type());
    }
    if (ctx->saved_data["with_grad_sigma"].toBool()) result[1] = q.to(saved[4].scalar_type());
    return result;
  }
};

Normalized forward_autograd(const Tensor& weight, const Tensor& u, const Tensor& v, int64_t dim,
                            int64_t n_power_iterations, double eps, bool v_first) {
  if (!c10::GradMode::is_enabled() || !wants_grad(weight)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_forward(weight, u, v, dim, n_power_iterations, eps, v_first);
  }
  const variable_list result = Normalize::apply(weight, u, v, dim, n_power_iterations, eps, v_first);
  return {result[0], result[1], result[2], result[3]};
}

Tensor backward_autograd(const std::optional<Tensor>& grad, const std::optional<Tensor>& grad_sigma,
                         const Tensor& weight, const Tensor& u, const Tensor& v, const Tensor& sigma, int64_t dim) {
  if (!c10::GradMode::is_enabled() ||
      !(wants_grad(grad) || wants_grad(grad_sigma) || wants_grad(weight) || wants_grad(sigma))) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_backward(grad, grad_sigma, weight, u, v, sigma, dim);
  }
  return NormalizeBackward::apply(grad, grad_sigma, weight, u, v, sigma, dim);
}

// Copies both vectors; for buffers, which replicas and the state dict share.
void store(const Tensor& u, const Tensor& v, const Tensor& new_u, const Tensor& new_v) {
  u.copy_(new_u);
  v.copy_(new_v);
}

}  // namespace

TORCH_LIBRARY_IMPL(wgan_ext, CPU, m) {
  m.impl("spectral_norm", forward);
  m.impl("spectral_norm_backward", backward);
}
TORCH_LIBRARY_IMPL(wgan_ext, CUDA, m) {
  m.impl("spectral_norm", forward);
  m.impl("spectral_norm_backward", backward);
}
TORCH_LIBRARY_IMPL(wgan_ext, Autograd, m) {
  m.impl("spectral_norm", forward_autograd);
  m.impl("spectral_norm_backward", backward_autograd);
}
TORCH_LIBRARY_IMPL(wgan_ext, CompositeImplicitAutograd, m) { m.impl("spectral_norm_store_", store); }

}  // namespace wgan_ext::spectral
