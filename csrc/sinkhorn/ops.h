// Sinkhorn's operators as torch's dispatcher knows them. Points [B, N, D], or [N, D] for one problem, or [total, D] for
// a ragged batch, which offsets_x and offsets_y [B + 1], int64 on the CPU, cut into problems.
#pragma once
#include <tuple>

#include "problem.h"

namespace wgan_ext::sinkhorn {

using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Nine sinkhorn(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b, std::string_view cost,
              double power, OptionalNumber rho_x, OptionalNumber rho_y, OptionalNumber epsilon, OptionalNumber scaling,
              double tol, int64_t max_iter, OptionalNumber relaxation, int64_t memory_limit, const OptionalTensor& f,
              const OptionalTensor& g, const OptionalTensor& offsets_x, const OptionalTensor& offsets_y);
Nine sinkhorn_divergence(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                         std::string_view cost, double power, OptionalNumber rho_x, OptionalNumber rho_y,
                         OptionalNumber epsilon, OptionalNumber scaling, double tol, int64_t max_iter,
                         OptionalNumber relaxation, int64_t memory_limit, const OptionalTensor& offsets_x,
                         const OptionalTensor& offsets_y);
Seven sinkhorn_matrix(const Tensor& costs, const OptionalTensor& a, const OptionalTensor& b, OptionalNumber rho_x,
                      OptionalNumber rho_y, OptionalNumber epsilon, OptionalNumber scaling, double tol,
                      int64_t max_iter, OptionalNumber relaxation, const OptionalTensor& f, const OptionalTensor& g);
Tensor sinkhorn_gradient(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                         const Tensor& f, const Tensor& g, const Tensor& epsilon, std::string_view cost, double power,
                         OptionalNumber rho_x, OptionalNumber rho_y, const OptionalTensor& offsets_x,
                         const OptionalTensor& offsets_y);
Tensor sinkhorn_weight_gradient(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                                const Tensor& f, const Tensor& epsilon, std::string_view cost, double power,
                                OptionalNumber rho_x, OptionalNumber rho_y, const OptionalTensor& offsets_x,
                                const OptionalTensor& offsets_y);
Tensor sinkhorn_matrix_gradient(const Tensor& costs, const OptionalTensor& a, const OptionalTensor& b, const Tensor& f,
                                const Tensor& g, const Tensor& epsilon);
Tensor sinkhorn_transport(const Tensor& values, const Tensor& x, const Tensor& y, const OptionalTensor& a,
                          const OptionalTensor& b, const Tensor& f, const Tensor& g, const Tensor& epsilon,
                          std::string_view cost, double power, OptionalNumber rho_x, OptionalNumber rho_y,
                          const OptionalTensor& offsets_x, const OptionalTensor& offsets_y);
Tensor sinkhorn_softmin(const Tensor& x, const Tensor& y, const OptionalTensor& b, const Tensor& g,
                        const Tensor& epsilon, std::string_view cost, double power);
Tensor sinkhorn_softmin_gradient(const Tensor& x, const Tensor& y, const OptionalTensor& b, const Tensor& f,
                                 const Tensor& g, const Tensor& epsilon, std::string_view cost, double power);

// rho (1 - T) - epsilon (T - mass of the other side), T = exp(-f / rho), double; the arguments go together.
Tensor soft_gradient(const Tensor& f, const Tensor& epsilon, double rho, const Tensor& other_mass);

}  // namespace wgan_ext::sinkhorn
