// The operators of spectral normalization: checks, allocation, choice of kernels, derivatives.
//
//   spectral_norm           W / divisor(sigma), u, v and sigma of a weight
//   spectral_norm_group     the same of several weights, in one call of the kernels
//   spectral_norm_sigma     u, v and sigma alone
//   spectral_norm_backward  the gradient of all of them
//   spectral_norm_          W / divisor(sigma), with u and v updated in place
//   spectral_norm_fold_     W as it is and sigma, with u and v updated in place
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

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
using Found = std::tuple<Tensor, Tensor, Tensor>;               // u, v, sigma
using NormalizedGroup = std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>;

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

void check_target(const char* op, double norm) {
  TORCH_CHECK_VALUE(norm > 0, op, ": target must be positive, got ", norm);
}

// What is asked for one weight.
struct Request {
  const Tensor &weight, &u, &v;
  int64_t dim, n_power_iterations;
  double eps;
  bool v_first;
  Target target;

  Shape check() const {
    check_floating(kForward, "weight", weight);
    const Shape shape = matrix(kForward, weight, dim);
    check_vector(kForward, "u", u, shape.rows, weight);
    check_vector(kForward, "v", v, columns(shape), weight);
    TORCH_CHECK_VALUE(n_power_iterations >= 0, kForward, ": n_power_iterations must not be negative, got ",
                      n_power_iterations);
    TORCH_CHECK_VALUE(eps >= 0, kForward, ": eps must not be negative, got ", eps);
    check_target(kForward, target.norm);
    return shape;
  }
};

// The tensors of one job, in the type that the kernels compute in.
struct Work {
  Shape shape;
  Tensor weight, u0, v0, normalized, u, v, sigma;

  Work(const Request& request, bool with_normalized) : shape(request.check()) {
    const at::ScalarType type = compute_type(request.weight);
    const auto options = request.weight.options().dtype(type);
    weight = operand(request.weight, type);
    u0 = operand(request.u, type);
    v0 = operand(request.v, type);
    if (with_normalized) normalized = empty_result(weight.sizes(), options);
    u = empty_result(u0.sizes(), options);
    v = empty_result(v0.sizes(), options);
    sigma = empty_result({}, options);
  }

  template <typename T>
  Job<T> job(const Request& request) const {
    return {weight.const_data_ptr<T>(),
            shape,
            u0.const_data_ptr<T>(),
            v0.const_data_ptr<T>(),
            request.n_power_iterations,
            request.v_first,
            request.eps,
            request.target,
            normalized.defined() ? normalized.mutable_data_ptr<T>() : nullptr,
            u.mutable_data_ptr<T>(),
            v.mutable_data_ptr<T>(),
            sigma.mutable_data_ptr<T>()};
  }

  // As the caller wants them.
  Normalized results(const Request& request) const {
    return {normalized.defined() ? in_layout_of(request.weight, normalized) : Tensor(), in_layout_of(request.u, u),
            in_layout_of(request.v, v), sigma};
  }
};

template <typename T>
void run(const std::vector<Request>& requests, const std::vector<Work>& works) {
  std::vector<size_t> order;
  for (size_t i = 0; i < works.size(); ++i)
    if (works[i].weight.numel() > 0 && works[i].weight.scalar_type() == c10::CppTypeToScalarType<T>::value)
      order.push_back(i);
  if (order.empty()) return;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return elements(works[a].shape) > elements(works[b].shape); });
  std::vector<Job<T>> jobs;
  std::vector<Shape> shapes;
  for (const size_t i : order) {
    jobs.push_back(works[i].template job<T>(requests[i]));
    shapes.push_back(works[i].shape);
  }
  const Tensor& first = works[order[0]].weight;
  const auto& kernels = kernels_for<Kernels<T>>(kForward, first);
  const auto count = static_cast<int64_t>(jobs.size());
  const Tensor scratch = empty_result({kernels.scratch(shapes.data(), count)}, first.options());
  kernels.normalize(jobs.data(), count, scratch.mutable_data_ptr<T>(), DeviceScope(first).stream());
}

std::vector<Work> run_all(const std::vector<Request>& requests, bool with_normalized) {
  std::vector<Work> works;
  works.reserve(requests.size());
  for (const Request& request : requests) works.emplace_back(request, with_normalized);
  const DeviceScope scope(requests[0].weight);
  run<float>(requests, works);
  run<double>(requests, works);
  for (size_t i = 0; i < works.size(); ++i)
    if (works[i].weight.numel() == 0) {
      works[i].u.copy_(works[i].u0);
      works[i].v.copy_(works[i].v0);
      works[i].sigma.fill_(requests[i].eps);
    }
  return works;
}

Normalized forward(const Tensor& weight, const Tensor& u, const Tensor& v, int64_t dim, int64_t n_power_iterations,
                   double eps, bool v_first, double target, bool shrink_only) {
  const std::vector<Request> one{{weight, u, v, dim, n_power_iterations, eps, v_first, {target, shrink_only}}};
  return run_all(one, true)[0].results(one[0]);
}

Found forward_sigma(const Tensor& weight, const Tensor& u, const Tensor& v, int64_t dim, int64_t n_power_iterations,
                    double eps, bool v_first) {
  const std::vector<Request> one{{weight, u, v, dim, n_power_iterations, eps, v_first, {1, false}}};
  auto [none, new_u, new_v, sigma] = run_all(one, false)[0].results(one[0]);
  return {new_u, new_v, sigma};
}

NormalizedGroup forward_group(at::TensorList weight, at::TensorList u, at::TensorList v, at::IntArrayRef dim,
                              at::IntArrayRef n_power_iterations, at::ArrayRef<double> eps, at::IntArrayRef v_first,
                              at::ArrayRef<double> target, at::IntArrayRef shrink_only) {
  const size_t count = weight.size();
  TORCH_CHECK_VALUE(count > 0, kForward, ": weight must hold at least one tensor, got none");
  for (const size_t size : {u.size(), v.size(), dim.size(), n_power_iterations.size(), eps.size(), v_first.size(),
                            target.size(), shrink_only.size()})
    TORCH_CHECK_VALUE(size == count, kForward, ": every list must have the length of weight (", count, "), got ", size);
  std::vector<Request> requests;
  for (size_t i = 0; i < count; ++i) {
    check_same_device(kForward, "weight", weight[i], "the first weight", weight[0]);
    requests.push_back({weight[i],
                        u[i],
                        v[i],
                        dim[i],
                        n_power_iterations[i],
                        eps[i],
                        v_first[i] != 0,
                        {target[i], shrink_only[i] != 0}});
  }
  const std::vector<Work> works = run_all(requests, true);
  NormalizedGroup group;
  for (size_t i = 0; i < count; ++i) {
    auto [normalized, new_u, new_v, sigma] = works[i].results(requests[i]);
    std::get<0>(group).push_back(normalized);
    std::get<1>(group).push_back(new_u);
    std::get<2>(group).push_back(new_v);
    std::get<3>(group).push_back(sigma);
  }
  return group;
}

Tensor backward(const std::optional<Tensor>& grad, const std::optional<Tensor>& grad_sigma, const Tensor& weight,
                const Tensor& u, const Tensor& v, const Tensor& sigma, int64_t dim, double target, bool shrink_only) {
  check_floating(kBackward, "weight", weight);
  const Shape shape = matrix(kBackward, weight, dim);
  check_vector(kBackward, "u", u, shape.rows, weight);
  check_vector(kBackward, "v", v, columns(shape), weight);
  check_shape(kBackward, "sigma", sigma, {});
  check_same_device(kBackward, "sigma", sigma, "weight", weight);
  check_target(kBackward, target);
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
    const Tensor scratch = empty_result({kernels.scratch(&shape, 1)}, options);
    kernels.backward(grad ? g.const_data_ptr<T>() : nullptr, grad_sigma ? gs.const_data_ptr<T>() : nullptr,
                     w.const_data_ptr<T>(), shape, u0.const_data_ptr<T>(), v0.const_data_ptr<T>(),
                     s.const_data_ptr<T>(), {target, shrink_only}, grad_weight.mutable_data_ptr<T>(),
                     scratch.mutable_data_ptr<T>(), scope.stream());
  });
  return in_layout_of(weight, grad_weight);
}

// ---- derivatives

template <typename Signature>
auto operator_called(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor call_backward(const std::optional<Tensor>& grad, const std::optional<Tensor>& grad_sigma, const Tensor& weight,
                     const Tensor& u, const Tensor& v, const Tensor& sigma, int64_t dim, double target,
                     bool shrink_only) {
  static const auto op = operator_called<decltype(backward)>("wgan_ext::spectral_norm_backward");
  return op.call(grad, grad_sigma, weight, u, v, sigma, dim, target, shrink_only);
}

std::optional<Tensor> if_defined(const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; }

bool wants_grad(const Tensor& t) { return t.defined() && t.requires_grad(); }
bool wants_grad(const std::optional<Tensor>& t) { return t && wants_grad(*t); }

// Gives results that were found without a graph their derivatives by weight: normalized = W / divisor(sigma) and
// sigma = u . (W v), with u and v constant. Without `normalized` the derivative of sigma alone.
struct Attach : torch::autograd::Function<Attach> {
  static variable_list forward(AutogradContext* ctx, const Tensor& weight, const Normalized* results, int64_t dim,
                               double target, bool shrink_only) {
    const auto& [normalized, u, v, sigma] = *results;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({weight, u, v, sigma});
    ctx->saved_data["dim"] = dim;
    if (target != 1) ctx->saved_data["target"] = target;  // each entry takes 0.1 us
    if (shrink_only) ctx->saved_data["shrink_only"] = true;
    return normalized.defined() ? variable_list{sigma, normalized} : variable_list{sigma};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(5);
    Tensor grad = grads.size() > 1 ? grads[1] : Tensor();
    if (grad.defined() && grad.layout() != at::kStrided) grad = grad.to_dense();  // as of an embedding
    if (!grads[0].defined() && !grad.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const auto& data = ctx->saved_data;
    const auto target = data.find("target");
    result[0] = call_backward(if_defined(grad), if_defined(grads[0]), saved[0], saved[1], saved[2], saved[3],
                              data.find("dim")->second.toInt(), target == data.end() ? 1 : target->second.toDouble(),
                              data.find("shrink_only") != data.end());
    return result;
  }
};

Normalized attached(const Tensor& weight, const Normalized& results, int64_t dim, double target, bool shrink_only) {
  const variable_list with_graph = Attach::apply(weight, &results, dim, target, shrink_only);
  const auto& [normalized, u, v, sigma] = results;
  return {normalized.defined() ? with_graph[1] : Tensor(), u, v, with_graph[0]};
}

// With d = divisor(sigma), d' = 1 / target, or 0 where the weight stays as it is, the gradient
//   D = G / d + (g - d' <G, W> / d^2) u v^T
// is linear in G and g = grad_sigma. With H the gradient by D and q = <H, u v^T>, its own derivatives are
//   by G: H / d - d' q W / d^2        by g: q        by W: -d' q G / d^2
//   by sigma: d' (2 d' q <G, W> / d - <H, G>) / d^2
// in operators of ATen, hence differentiable to any order.
struct NormalizeBackward : torch::autograd::Function<NormalizeBackward> {
  static Tensor forward(AutogradContext* ctx, const std::optional<Tensor>& grad,
                        const std::optional<Tensor>& grad_sigma, const Tensor& weight, const Tensor& u, const Tensor& v,
                        const Tensor& sigma, int64_t dim, double target, bool shrink_only) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({grad.value_or(Tensor()), weight, u, v, sigma});
    ctx->saved_data["dim"] = dim;
    ctx->saved_data["with_grad_sigma"] = grad_sigma.has_value();
    ctx->saved_data["target"] = target;
    ctx->saved_data["shrink_only"] = shrink_only;
    return call_backward(grad, grad_sigma, weight, u, v, sigma, dim, target, shrink_only);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(9);
    const Tensor& h = grads[0];
    if (!h.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad = saved[0], &weight = saved[1], &u = saved[2], &v = saved[3];
    const Shape shape = matrix(kBackward, weight, ctx->saved_data["dim"].toInt());
    const Tensor by_columns = at::matmul(u, h.reshape({shape.outer, shape.rows, shape.inner}));
    const Tensor q = (by_columns * v.view({shape.outer, shape.inner})).sum();
    if (grad.defined()) {
      const double target = ctx->saved_data["target"].toDouble();
      const bool shrink_only = ctx->saved_data["shrink_only"].toBool();
      if (shrink_only && target == HUGE_VAL) {  // D = G + g u v^T
        result[0] = h;
        if (ctx->saved_data["with_grad_sigma"].toBool()) result[1] = q.to(saved[4].scalar_type());
        return result;
      }
      Tensor d = saved[4].to(weight.scalar_type()) / target, slope = at::full_like(d, 1 / target);
      if (shrink_only) {
        const Tensor stays = saved[4].abs() <= target;
        d = at::where(stays, at::ones_like(d), d);
        slope = at::where(stays, at::zeros_like(d), slope);
      }
      const Tensor slope_q = slope * q / d.square();
      result[0] = h / d - slope_q * weight;
      result[2] = -slope_q * grad;
      const Tensor by_sigma = slope * (2 * slope * q * (grad * weight).sum() / d - (h * grad).sum()) / d.square();
      result[5] = by_sigma.to(saved[4].scalar_type());
    }
    if (ctx->saved_data["with_grad_sigma"].toBool()) result[1] = q.to(saved[4].scalar_type());
    return result;
  }
};

Normalized forward_autograd(const Tensor& weight, const Tensor& u, const Tensor& v, int64_t dim,
                            int64_t n_power_iterations, double eps, bool v_first, double target, bool shrink_only) {
  static const auto op = operator_called<decltype(forward)>("wgan_ext::spectral_norm");
  const Normalized results = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(weight, u, v, dim, n_power_iterations, eps, v_first, target, shrink_only);
  }();
  if (!c10::GradMode::is_enabled() || !wants_grad(weight)) return results;
  return attached(weight, results, dim, target, shrink_only);
}

Found forward_sigma_autograd(const Tensor& weight, const Tensor& u, const Tensor& v, int64_t dim,
                             int64_t n_power_iterations, double eps, bool v_first) {
  static const auto op = operator_called<decltype(forward_sigma)>("wgan_ext::spectral_norm_sigma");
  const auto [new_u, new_v, sigma] = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(weight, u, v, dim, n_power_iterations, eps, v_first);
  }();
  if (!c10::GradMode::is_enabled() || !wants_grad(weight)) return {new_u, new_v, sigma};
  return {new_u, new_v, std::get<3>(attached(weight, {Tensor(), new_u, new_v, sigma}, dim, 1, false))};
}

// Each weight has a node of its own: its gradient is ready, and the gradient of its quotient free, as soon as may be.
NormalizedGroup forward_group_autograd(at::TensorList weight, at::TensorList u, at::TensorList v, at::IntArrayRef dim,
                                       at::IntArrayRef n_power_iterations, at::ArrayRef<double> eps,
                                       at::IntArrayRef v_first, at::ArrayRef<double> target,
                                       at::IntArrayRef shrink_only) {
  static const auto op = operator_called<decltype(forward_group)>("wgan_ext::spectral_norm_group");
  NormalizedGroup group = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(weight, u, v, dim, n_power_iterations, eps, v_first, target, shrink_only);
  }();
  if (!c10::GradMode::is_enabled()) return group;
  auto& [normalized, new_u, new_v, sigma] = group;
  for (size_t i = 0; i < weight.size(); ++i)
    if (wants_grad(weight[i]))
      std::tie(normalized[i], new_u[i], new_v[i], sigma[i]) =
          attached(weight[i], {normalized[i], new_u[i], new_v[i], sigma[i]}, dim[i], target[i], shrink_only[i] != 0);
  return group;
}

Tensor backward_autograd(const std::optional<Tensor>& grad, const std::optional<Tensor>& grad_sigma,
                         const Tensor& weight, const Tensor& u, const Tensor& v, const Tensor& sigma, int64_t dim,
                         double target, bool shrink_only) {
  if (!c10::GradMode::is_enabled() ||
      !(wants_grad(grad) || wants_grad(grad_sigma) || wants_grad(weight) || wants_grad(sigma))) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_backward(grad, grad_sigma, weight, u, v, sigma, dim, target, shrink_only);
  }
  return NormalizeBackward::apply(grad, grad_sigma, weight, u, v, sigma, dim, target, shrink_only);
}

// ---- with u and v updated in place, as the buffers of a module are

Tensor forward_in_place(const Tensor& weight, const Tensor& u, const Tensor& v, int64_t dim, int64_t n_power_iterations,
                        double eps, bool v_first, double target, bool shrink_only) {
  static const auto op = operator_called<decltype(forward)>("wgan_ext::spectral_norm");
  const auto [normalized, new_u, new_v, sigma] =
      op.call(weight, u, v, dim, n_power_iterations, eps, v_first, target, shrink_only);
  if (n_power_iterations > 0) {
    const at::AutoDispatchBelowAutograd guard;  // the vectors have no graph
    u.copy_(new_u);
    v.copy_(new_v);
  }
  return normalized;
}

// The weight as it is and sigma, for a layer that divides its output: their gradients G and g become G + g u v^T.
std::tuple<Tensor, Tensor> forward_fold(const Tensor& weight, const Tensor& u, const Tensor& v, int64_t dim,
                                        int64_t n_power_iterations, double eps, bool v_first) {
  static const auto op = operator_called<decltype(forward_sigma)>("wgan_ext::spectral_norm_sigma");
  const auto [new_u, new_v, sigma] = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(weight, u, v, dim, n_power_iterations, eps, v_first);
  }();
  if (n_power_iterations > 0) {
    const at::AutoDispatchBelowAutograd guard;
    u.copy_(new_u);
    v.copy_(new_v);
  }
  if (!c10::GradMode::is_enabled() || !wants_grad(weight)) return {weight, sigma};
  const Normalized with_graph = attached(weight, {weight, new_u, new_v, sigma}, dim, HUGE_VAL, true);
  return {std::get<0>(with_graph), std::get<3>(with_graph)};
}

}  // namespace

TORCH_LIBRARY_IMPL(wgan_ext, CPU, m) {
  m.impl("spectral_norm", forward);
  m.impl("spectral_norm_group", forward_group);
  m.impl("spectral_norm_sigma", forward_sigma);
  m.impl("spectral_norm_backward", backward);
}
TORCH_LIBRARY_IMPL(wgan_ext, CUDA, m) {
  m.impl("spectral_norm", forward);
  m.impl("spectral_norm_group", forward_group);
  m.impl("spectral_norm_sigma", forward_sigma);
  m.impl("spectral_norm_backward", backward);
}
TORCH_LIBRARY_IMPL(wgan_ext, Autograd, m) {
  m.impl("spectral_norm", forward_autograd);
  m.impl("spectral_norm_group", forward_group_autograd);
  m.impl("spectral_norm_sigma", forward_sigma_autograd);
  m.impl("spectral_norm_backward", backward_autograd);
}
TORCH_LIBRARY_IMPL(wgan_ext, CompositeImplicitAutograd, m) {
  m.impl("spectral_norm_", forward_in_place);
  m.impl("spectral_norm_fold_", forward_fold);
}

}  // namespace wgan_ext::spectral
