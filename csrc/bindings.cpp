// The roof: every operator's schema and its eager Python entry, one line each.
//
// An entry calls the dispatcher's typed handle, never a kernel: a kernel called past the dispatcher would silently
// return tensors without gradients.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <optional>
#include <tuple>
#include <vector>

#include "graph.h"
#include "results.h"
#include "simd.h"
#include "state.h"

namespace py = pybind11;

namespace {

using at::Tensor;

// What Python hands over for a schema's list arguments.
template <typename T>
struct Held {
  using type = T;
};
template <typename T>
struct Held<c10::ArrayRef<T>> {
  using type = std::vector<T>;
};
template <>
struct Held<const c10::List<std::optional<Tensor>>&> {
  using type = std::vector<std::optional<Tensor>>;
};

template <typename Signature>
struct Entry;

template <typename Result, typename... Args>
struct Entry<Result(Args...)> {
  static void bind(py::module_& m, const char* name) {
    const auto handle = c10::Dispatcher::singleton()
                            .findSchemaOrThrow((std::string("wgan_ext::") + name).c_str(), "")
                            .typed<Result(Args...)>();
    m.def(name, torch::wrap_pybind_function_no_gil(
                    [handle](typename Held<Args>::type... args) -> Result { return handle.call(args...); }));
  }
};

}  // namespace

TORCH_LIBRARY(wgan_ext, m) {
  // clang-format off
  // critic
  m.def("critic(Tensor[] x, Tensor[] parameters, int[] program, float[] scalars, bool mean_outputs, int scored, int first, int count, ScalarType compute_dtype, bool channels_last) -> (Tensor scores, Tensor[] gradients)");
  m.def("critic_forward(Tensor[] x, Tensor[] parameters, int[] program, float[] scalars, bool mean_outputs, int scored, int first, int count, ScalarType compute_dtype, bool channels_last) -> (Tensor scores, Tensor[] gradients, Tensor[] kept)");
  m.def("critic_backward(Tensor? grad_scores, Tensor[] grad_gradients, Tensor[] x, Tensor[] parameters, Tensor[] kept, int[] program, float[] scalars, int scored, int first, int count, ScalarType compute_dtype, bool channels_last, int[] wanted, bool of_x) -> Tensor[]");
  m.def("critic_loss(Tensor[] x, Tensor[] parameters, int[] program, float[] scalars, bool mean_outputs, int real, int scored, int first, int count, ScalarType compute_dtype, bool channels_last, float weight, float target, bool one_sided, float power) -> (Tensor loss, Tensor penalty, Tensor scores, Tensor norms)");
  m.def("critic_loss_forward(Tensor[] x, Tensor[] parameters, int[] program, float[] scalars, bool mean_outputs, int real, int scored, int first, int count, ScalarType compute_dtype, bool channels_last, float weight, float target, bool one_sided, float power, int[] wanted) -> (Tensor loss, Tensor penalty, Tensor scores, Tensor norms, Tensor[] gradients)");
  // spectral
  m.def("spectral_norm(Tensor weight, Tensor u, Tensor v, int dim, int n_power_iterations, float eps, bool v_first, float target, bool shrink_only) -> (Tensor weight, Tensor u, Tensor v, Tensor sigma)");
  m.def("spectral_norm_group(Tensor[] weight, Tensor[] u, Tensor[] v, int[] dim, int[] n_power_iterations, float[] eps, int[] v_first, float[] target, int[] shrink_only) -> (Tensor[] weight, Tensor[] u, Tensor[] v, Tensor[] sigma)");
  m.def("spectral_norm_sigma(Tensor weight, Tensor u, Tensor v, int dim, int n_power_iterations, float eps, bool v_first) -> (Tensor u, Tensor v, Tensor sigma)");
  m.def("spectral_norm_backward(Tensor? grad, Tensor? grad_sigma, Tensor weight, Tensor u, Tensor v, Tensor sigma, int dim, float target, bool shrink_only) -> Tensor");
  m.def("spectral_norm_fold_(Tensor(c) weight, Tensor(a!) u, Tensor(b!) v, int dim, int n_power_iterations, float eps, bool v_first) -> (Tensor(c) weight, Tensor sigma)");
  m.def("spectral_norm_(Tensor weight, Tensor(a!) u, Tensor(b!) v, int dim, int n_power_iterations, float eps, bool v_first, float target, bool shrink_only) -> Tensor");
  // sinkhorn
  m.def("sinkhorn(Tensor x, Tensor y, Tensor? a, Tensor? b, str cost, float power, float? rho_x, float? rho_y, float? epsilon, float? scaling, float tol, int max_iter, float? relaxation, int memory_limit, Tensor? f, Tensor? g, Tensor? offsets_x, Tensor? offsets_y) -> (Tensor value, Tensor f, Tensor g, Tensor centred_f, Tensor centred_g, Tensor marginal_error, Tensor iterations, Tensor converged, Tensor epsilon)");
  m.def("sinkhorn_divergence(Tensor x, Tensor y, Tensor? a, Tensor? b, str cost, float power, float? rho_x, float? rho_y, float? epsilon, float? scaling, float tol, int max_iter, float? relaxation, int memory_limit, Tensor? offsets_x, Tensor? offsets_y) -> (Tensor value, Tensor f, Tensor g, Tensor self_x, Tensor self_y, Tensor marginal_error, Tensor iterations, Tensor converged, Tensor epsilon)");
  m.def("sinkhorn_matrix(Tensor C, Tensor? a, Tensor? b, float? rho_x, float? rho_y, float? epsilon, float? scaling, float tol, int max_iter, float? relaxation, Tensor? f, Tensor? g) -> (Tensor value, Tensor f, Tensor g, Tensor marginal_error, Tensor iterations, Tensor converged, Tensor epsilon)");
  m.def("sinkhorn_gradient(Tensor x, Tensor y, Tensor? a, Tensor? b, Tensor centred_f, Tensor centred_g, Tensor epsilon, str cost, float power, float? rho_x, float? rho_y, Tensor? offsets_x, Tensor? offsets_y) -> Tensor");
  m.def("sinkhorn_weight_gradient(Tensor x, Tensor y, Tensor? a, Tensor? b, Tensor centred_f, Tensor epsilon, str cost, float power, float? rho_x, float? rho_y, Tensor? offsets_x, Tensor? offsets_y) -> Tensor");
  m.def("sinkhorn_matrix_gradient(Tensor C, Tensor? a, Tensor? b, Tensor f, Tensor g, Tensor epsilon) -> Tensor");
  m.def("sinkhorn_transport(Tensor values, Tensor x, Tensor y, Tensor? a, Tensor? b, Tensor centred_f, Tensor centred_g, Tensor epsilon, str cost, float power, float? rho_x, float? rho_y, Tensor? offsets_x, Tensor? offsets_y) -> Tensor");
  m.def("sinkhorn_softmin(Tensor x, Tensor y, Tensor? b, Tensor g, Tensor epsilon, str cost, float power) -> Tensor");
  m.def("sinkhorn_softmin_gradient(Tensor x, Tensor y, Tensor? b, Tensor f, Tensor g, Tensor epsilon, str cost, float power) -> Tensor");
  m.def("sinkhorn_group(Tensor x, Tensor y, Tensor? a, Tensor? b, str cost, float power, float? rho_x, float? rho_y, float? epsilon, float? scaling, float tol, int max_iter, float? relaxation, int memory_limit, Tensor? f, Tensor? g, str group, int rank, int[] counts_x, int[] counts_y) -> (Tensor value, Tensor f, Tensor g, Tensor centred_f, Tensor centred_g, Tensor marginal_error, Tensor iterations, Tensor converged, Tensor epsilon)");
  m.def("sinkhorn_divergence_group(Tensor x, Tensor y, Tensor? a, Tensor? b, str cost, float power, float? rho_x, float? rho_y, float? epsilon, float? scaling, float tol, int max_iter, float? relaxation, int memory_limit, str group, int rank, int[] counts_x, int[] counts_y) -> (Tensor value, Tensor f, Tensor g, Tensor self_x, Tensor self_y, Tensor marginal_error, Tensor iterations, Tensor converged, Tensor epsilon)");
  m.def("sinkhorn_group_gradient(Tensor x, Tensor y, Tensor? a, Tensor? b, Tensor centred_f, Tensor centred_g, Tensor epsilon, str cost, float power, float? rho_x, float? rho_y, int begin, int count) -> Tensor");
  m.def("sinkhorn_hessian(Tensor? dx, Tensor? dy, Tensor? da, Tensor? db, Tensor x, Tensor y, Tensor? a, Tensor? b, Tensor centred_f, Tensor centred_g, Tensor epsilon, str cost, float power, float? rho_x, float? rho_y) -> (Tensor x, Tensor y, Tensor a, Tensor b)");
  m.def("sinkhorn_matrix_hessian(Tensor? dC, Tensor? da, Tensor? db, Tensor C, Tensor? a, Tensor? b, Tensor f, Tensor g, Tensor epsilon, float? rho_x, float? rho_y) -> (Tensor C, Tensor a, Tensor b)");
  // clang-format on
}

PYBIND11_MODULE(_C, m) {
  // critic
  Entry<std::tuple<Tensor, std::vector<Tensor>>(at::TensorList, at::TensorList, at::IntArrayRef, at::ArrayRef<double>,
                                                bool, int64_t, int64_t, int64_t, at::ScalarType, bool)>::bind(m,
                                                                                                              "critic");
  Entry<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      at::TensorList, at::TensorList, at::IntArrayRef, at::ArrayRef<double>, bool, int64_t, int64_t, int64_t, int64_t,
      at::ScalarType, bool, double, double, bool, double)>::bind(m, "critic_loss");
  // spectral
  using Integers = at::IntArrayRef;
  using Floats = at::ArrayRef<double>;
  Entry<std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t,
                                                   double, bool, double, bool)>::bind(m, "spectral_norm");
  Entry<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, double,
                                           bool)>::bind(m, "spectral_norm_sigma");
  Entry<Tensor(const std::optional<Tensor>&, const std::optional<Tensor>&, const Tensor&, const Tensor&, const Tensor&,
               const Tensor&, int64_t, double, bool)>::bind(m, "spectral_norm_backward");
  Entry<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, double, bool, double, bool)>::bind(
      m, "spectral_norm_");
  Entry<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, double, bool)>::bind(
      m, "spectral_norm_fold_");
  using Group = std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>;
  Entry<Group(at::TensorList, at::TensorList, at::TensorList, Integers, Integers, Floats, Integers, Floats,
              Integers)>::bind(m, "spectral_norm_group");
  // sinkhorn
  using OptionalTensor = const std::optional<Tensor>&;
  using Tensors9 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  using Tensors7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  using OptionalNumber = std::optional<double>;
  Entry<Tensors9(const Tensor&, const Tensor&, OptionalTensor, OptionalTensor, std::string_view, double, OptionalNumber,
                 OptionalNumber, OptionalNumber, OptionalNumber, double, int64_t, OptionalNumber, int64_t,
                 OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor)>::bind(m, "sinkhorn");
  Entry<Tensors9(const Tensor&, const Tensor&, OptionalTensor, OptionalTensor, std::string_view, double, OptionalNumber,
                 OptionalNumber, OptionalNumber, OptionalNumber, double, int64_t, OptionalNumber, int64_t,
                 OptionalTensor, OptionalTensor)>::bind(m, "sinkhorn_divergence");
  Entry<Tensors7(const Tensor&, OptionalTensor, OptionalTensor, OptionalNumber, OptionalNumber, OptionalNumber,
                 OptionalNumber, double, int64_t, OptionalNumber, OptionalTensor,
                 OptionalTensor)>::bind(m, "sinkhorn_matrix");
  Entry<Tensor(const Tensor&, const Tensor&, const Tensor&, OptionalTensor, OptionalTensor, const Tensor&,
               const Tensor&, const Tensor&, std::string_view, double, OptionalNumber, OptionalNumber, OptionalTensor,
               OptionalTensor)>::bind(m, "sinkhorn_transport");
  Entry<Tensor(const Tensor&, const Tensor&, OptionalTensor, const Tensor&, const Tensor&, std::string_view,
               double)>::bind(m, "sinkhorn_softmin");
  Entry<Tensors9(const Tensor&, const Tensor&, OptionalTensor, OptionalTensor, std::string_view, double, OptionalNumber,
                 OptionalNumber, OptionalNumber, OptionalNumber, double, int64_t, OptionalNumber, int64_t,
                 OptionalTensor, OptionalTensor, std::string_view, int64_t, Integers,
                 Integers)>::bind(m, "sinkhorn_group");
  Entry<Tensors9(const Tensor&, const Tensor&, OptionalTensor, OptionalTensor, std::string_view, double, OptionalNumber,
                 OptionalNumber, OptionalNumber, OptionalNumber, double, int64_t, OptionalNumber, int64_t,
                 std::string_view, int64_t, Integers, Integers)>::bind(m, "sinkhorn_divergence_group");

  // memory
  m.def("empty_cache", &wgan_ext::empty_cache);

  // autograd's graphs
  m.def("forget_leaves", &wgan_ext::forget_leaves);

  // what a plan depends on
  m.def("state_of", &wgan_ext::state_of);
  m.def("same_state", &wgan_ext::same_state);

  // build facts
  m.attr("torch_version") = py::make_tuple(TORCH_VERSION_MAJOR, TORCH_VERSION_MINOR, TORCH_VERSION_PATCH);
#if defined(WGAN_EXT_CUDA)
  m.attr("cuda_architectures") = WGAN_EXT_CUDA_ARCHITECTURES;
#else
  m.attr("cuda_architectures") = "";
#endif
  m.attr("simd_level") = wgan_ext::simd_level_name();
}
