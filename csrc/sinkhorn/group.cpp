// Sinkhorn of one problem that is shared out over the processes of a group: the operators that solve it and their
// derivatives. x, y, a and b are the whole problem, the same in every process, which owns some rows of x and of y:
// those of its rank, the counts being of all. A gradient in points is that of the process's own rows, 0 in all others.
#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <functional>
#include <string>
#include <vector>

#include "autograd.h"

namespace wgan_ext::sinkhorn {

Nine sinkhorn_group(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                    std::string_view cost, double power, OptionalNumber rho_x, OptionalNumber rho_y,
                    OptionalNumber epsilon, OptionalNumber scaling, double tol, int64_t max_iter,
                    OptionalNumber relaxation, int64_t memory_limit, const OptionalTensor& f, const OptionalTensor& g,
                    std::string_view group, int64_t rank, at::IntArrayRef counts_x, at::IntArrayRef counts_y);
Nine sinkhorn_divergence_group(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                               std::string_view cost, double power, OptionalNumber rho_x, OptionalNumber rho_y,
                               OptionalNumber epsilon, OptionalNumber scaling, double tol, int64_t max_iter,
                               OptionalNumber relaxation, int64_t memory_limit, std::string_view group, int64_t rank,
                               at::IntArrayRef counts_x, at::IntArrayRef counts_y);
Tensor sinkhorn_group_gradient(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                               const Tensor& f, const Tensor& g, const Tensor& epsilon, std::string_view cost,
                               double power, OptionalNumber rho_x, OptionalNumber rho_y, int64_t begin, int64_t count);

namespace {

WGAN_EXT_SINKHORN_HANDLE(sinkhorn_group)
WGAN_EXT_SINKHORN_HANDLE(sinkhorn_divergence_group)
WGAN_EXT_SINKHORN_HANDLE(sinkhorn_group_gradient)
WGAN_EXT_SINKHORN_HANDLE(sinkhorn_weight_gradient)

Exchange exchange_of(const char* op, const Tensor& x, const Tensor& y, std::string_view group, int64_t rank,
                     at::IntArrayRef counts_x, at::IntArrayRef counts_y) {
  const auto check = [&](const char* name, const Tensor& points, at::IntArrayRef counts) {
    int64_t total = 0;
    for (const int64_t count : counts) total += count;
    TORCH_CHECK_VALUE(points.dim() == 2 && points.size(0) == total, op, ": ", name,
                      " must be points of shape (count, dim) whose count is the sum of those of the processes (", total,
                      "), got ", points.sizes());
  };
  check("x", x, counts_x);
  check("y", y, counts_y);
  return {std::string(group), rank, counts_x, counts_y, x.device()};
}

// The potentials that gradients hold fixed move with the points of all processes.
constexpr const char* kOnce =
    "sinkhorn: second derivatives are not implemented with a group; detach the gradient of a sinkhorn cost before "
    "differentiating through it";

// What the derivatives must know of the call besides: the own rows.
struct KeptRows : Kept {
  Range of_x, of_y;

  void save(AutogradContext* ctx) const {
    Kept::save(ctx);
    ctx->saved_data["rows"] = std::vector<int64_t>{of_x.begin, of_x.count, of_y.begin, of_y.count};
  }

  static KeptRows load(AutogradContext* ctx) {
    const auto rows = ctx->saved_data["rows"].toIntVector();
    return {Kept::load(ctx), {rows[0], rows[1]}, {rows[2], rows[3]}};
  }
};

// A problem as its derivatives need it, seen from x; `turned` sees it from y.
struct Seen {
  Tensor x, y;
  OptionalTensor a, b;
  Tensor epsilon;
  std::string cost;
  double power;
  OptionalNumber rho_x, rho_y;
  Range of_x, of_y;

  Seen turned() const { return {y, x, b, a, epsilon, cost, power, rho_y, rho_x, of_y, of_x}; }
  // x, and its weights and penalty, on both sides.
  Seen self() const { return {x, x, a, a, epsilon, cost, power, rho_x, rho_x, of_x, of_x}; }

  // In x, at the potentials. [N, D], 0 but for the own rows
  Tensor of_points(const Tensor& f, const Tensor& g) const {
    return sinkhorn_group_gradient_op().call(x, y, a, b, f, g, epsilon, cost, power, rho_x, rho_y, of_x.begin,
                                             of_x.count);
  }
  // In a. [N]
  Tensor of_weights(const Tensor& f) const {
    return sinkhorn_weight_gradient_op().call(x, y, a, b, f, epsilon, cost, power, rho_x, rho_y, std::nullopt,
                                              std::nullopt);
  }
  // grad times the gradient that compute returns, which is differentiated no further.
  Tensor times(const Tensor& grad, const std::function<Tensor()>& compute) const {
    const Tensor gradient = refused(kOnce, {x, y, a, b}, [&] { return variable_list{compute()}; })[0];
    return grad.to(gradient.scalar_type()) * gradient;
  }
};

// What both operators' backward pass does; points(seen, of x) and weights(seen, of x) are the derivatives of a side.
template <typename Points, typename Weights>
variable_list gradients(AutogradContext* ctx, const Tensor& grad, size_t inputs, const Points& points,
                        const Weights& weights) {
  const variable_list saved = ctx->get_saved_variables();
  const KeptRows kept = KeptRows::load(ctx);
  const Seen from_x{saved[0],   saved[1],   optional(saved[2]), optional(saved[3]), saved[4], kept.cost,
                    kept.power, kept.rho_x, kept.rho_y,         kept.of_x,          kept.of_y},
      from_y = from_x.turned();
  variable_list result(inputs);
  if (ctx->needs_input_grad(0)) result[0] = from_x.times(grad, [&] { return points(saved, from_x, true); });
  if (ctx->needs_input_grad(1)) result[1] = from_y.times(grad, [&] { return points(saved, from_y, false); });
  if (from_x.a && ctx->needs_input_grad(2))
    result[2] = from_x.times(grad, [&] { return weights(saved, from_x, true); });
  if (from_y.a && ctx->needs_input_grad(from_x.a ? 3 : 2))
    result[3] = from_y.times(grad, [&] { return weights(saved, from_y, false); });
  return result;
}

class GroupFunction : public torch::autograd::Function<GroupFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const OptionalTensor& a,
                               const OptionalTensor& b, const KeptRows& kept, const std::function<Nine()>& solve) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [value, f, g, fc, gc, error, iterations, converged, used] = solve();
    kept.save(ctx);
    ctx->save_for_backward({x, y, a.value_or(Tensor()), b.value_or(Tensor()), used, fc, gc});
    ctx->mark_non_differentiable({f, g, fc, gc, error, iterations, converged, used});
    return {value, f, g, fc, gc, error, iterations, converged, used};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return gradients(
        ctx, grads[0], 6,
        [](const variable_list& saved, const Seen& seen, bool of_x) {
          return seen.of_points(saved[of_x ? 5 : 6], saved[of_x ? 6 : 5]);
        },
        [](const variable_list& saved, const Seen& seen, bool of_x) { return seen.of_weights(saved[of_x ? 5 : 6]); });
  }
};

class DivergenceGroupFunction : public torch::autograd::Function<DivergenceGroupFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const OptionalTensor& a,
                               const OptionalTensor& b, const KeptRows& kept, const std::function<Nine()>& solve) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [value, f, g, p, q, error, iterations, converged, used] = solve();
    kept.save(ctx);
    ctx->save_for_backward({x, y, a.value_or(Tensor()), b.value_or(Tensor()), used, f, g, p, q});
    ctx->mark_non_differentiable({f, g, p, q, error, iterations, converged, used});
    return {value, f, g, p, q, error, iterations, converged, used};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return gradients(
        ctx, grads[0], 6,
        [](const variable_list& saved, const Seen& seen, bool of_x) {
          const Tensor& own = saved[of_x ? 7 : 8];
          return seen.of_points(saved[of_x ? 5 : 6], saved[of_x ? 6 : 5]) - seen.self().of_points(own, own);
        },
        // Where mass may vanish, the other side stands in the self term for the derivative of
        // epsilon / 2 (mass of a - mass of b)^2.
        [](const variable_list& saved, const Seen& seen, bool of_x) {
          const bool hard = !seen.rho_x && !seen.rho_y;
          return seen.of_weights(saved[of_x ? 5 : 6]) - (hard ? seen.self() : seen).of_weights(saved[of_x ? 7 : 8]);
        });
  }
};

Tensor refused_gradient(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                        const Tensor& f, const Tensor& g, const Tensor& epsilon, std::string_view cost, double power,
                        OptionalNumber rho_x, OptionalNumber rho_y, int64_t begin, int64_t count) {
  return refused(kOnce, {x, y, a, b}, [&] {
    return variable_list{
        sinkhorn_group_gradient_op().call(x, y, a, b, f, g, epsilon, cost, power, rho_x, rho_y, begin, count)};
  })[0];
}

Nine nine(const variable_list& t) { return {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8]}; }

Nine differentiable(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                    std::string_view cost, double power, OptionalNumber rho_x, OptionalNumber rho_y,
                    OptionalNumber epsilon, OptionalNumber scaling, double tol, int64_t max_iter,
                    OptionalNumber relaxation, int64_t memory_limit, const OptionalTensor& f, const OptionalTensor& g,
                    std::string_view group, int64_t rank, at::IntArrayRef counts_x, at::IntArrayRef counts_y) {
  const KeptRows kept{{std::string(cost), power, rho_x, rho_y}, rows_of(rank, counts_x), rows_of(rank, counts_y)};
  return nine(GroupFunction::apply(x, y, a, b, kept, [&] {
    return sinkhorn_group_op().call(x, y, a, b, cost, power, rho_x, rho_y, epsilon, scaling, tol, max_iter, relaxation,
                                    memory_limit, f, g, group, rank, counts_x, counts_y);
  }));
}

Nine differentiable_divergence(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                               std::string_view cost, double power, OptionalNumber rho_x, OptionalNumber rho_y,
                               OptionalNumber epsilon, OptionalNumber scaling, double tol, int64_t max_iter,
                               OptionalNumber relaxation, int64_t memory_limit, std::string_view group, int64_t rank,
                               at::IntArrayRef counts_x, at::IntArrayRef counts_y) {
  const KeptRows kept{{std::string(cost), power, rho_x, rho_y}, rows_of(rank, counts_x), rows_of(rank, counts_y)};
  return nine(DivergenceGroupFunction::apply(x, y, a, b, kept, [&] {
    return sinkhorn_divergence_group_op().call(x, y, a, b, cost, power, rho_x, rho_y, epsilon, scaling, tol, max_iter,
                                               relaxation, memory_limit, group, rank, counts_x, counts_y);
  }));
}

}  // namespace

Nine sinkhorn_group(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                    std::string_view cost, double power, OptionalNumber rho_x, OptionalNumber rho_y,
                    OptionalNumber epsilon, OptionalNumber scaling, double tol, int64_t max_iter,
                    OptionalNumber relaxation, int64_t memory_limit, const OptionalTensor& f, const OptionalTensor& g,
                    std::string_view group, int64_t rank, at::IntArrayRef counts_x, at::IntArrayRef counts_y) {
  const Exchange exchange = exchange_of("sinkhorn", x, y, group, rank, counts_x, counts_y);
  return solve(x, y, a, b, cost, power, rho_x, rho_y, epsilon, scaling, tol, max_iter, relaxation, memory_limit, f, g,
               std::nullopt, std::nullopt, &exchange);
}

Nine sinkhorn_divergence_group(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                               std::string_view cost, double power, OptionalNumber rho_x, OptionalNumber rho_y,
                               OptionalNumber epsilon, OptionalNumber scaling, double tol, int64_t max_iter,
                               OptionalNumber relaxation, int64_t memory_limit, std::string_view group, int64_t rank,
                               at::IntArrayRef counts_x, at::IntArrayRef counts_y) {
  const Exchange exchange = exchange_of("sinkhorn_divergence", x, y, group, rank, counts_x, counts_y);
  return solve_divergence(x, y, a, b, cost, power, rho_x, rho_y, epsilon, scaling, tol, max_iter, relaxation,
                          memory_limit, std::nullopt, std::nullopt, &exchange);
}

Tensor sinkhorn_group_gradient(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                               const Tensor& f, const Tensor& g, const Tensor& epsilon, std::string_view cost,
                               double power, OptionalNumber rho_x, OptionalNumber rho_y, int64_t begin, int64_t count) {
  const Tensor all = at::zeros(x.sizes(), x.options());
  all.narrow(0, begin, count)
      .copy_(gradient_of_rows(x, y, a, b, f, g, epsilon, cost, power, rho_x, rho_y, {begin, count}));
  return all;
}

namespace {

void implement(torch::Library& m) {
  m.impl("sinkhorn_group", sinkhorn_group);
  m.impl("sinkhorn_divergence_group", sinkhorn_divergence_group);
  m.impl("sinkhorn_group_gradient", sinkhorn_group_gradient);
}

}  // namespace

TORCH_LIBRARY_IMPL(wgan_ext, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(wgan_ext, CUDA, m) { implement(m); }
TORCH_LIBRARY_IMPL(wgan_ext, Autograd, m) {
  m.impl("sinkhorn_group", differentiable);
  m.impl("sinkhorn_divergence_group", differentiable_divergence);
  m.impl("sinkhorn_group_gradient", refused_gradient);
}

}  // namespace wgan_ext::sinkhorn
