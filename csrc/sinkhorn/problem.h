// What a Sinkhorn solve is given: the terms of the problem and its measures, checked and centred.
//
// Inside this backend all is a batch: points [B, N, D], or [total, D] where its problems are of unlike sizes
// (segments.h); a single problem is a batch of one. Balanced problems with
// squared Euclidean cost: each cloud is centred on its own mean in float64, for with d = mean(x) - mean(y)
//     |x - y|^2 = |x' - y'|^2 + 2 x'.d - 2 y'.d + |d|^2
// and the linear terms are absorbed by the potentials. Else both are centred on the midpoint of the means. Inside this
// backend potentials are those of the centred problem.
#pragma once
#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>
#include <string_view>

#include "kernels.h"
#include "segments.h"

namespace wgan_ext::sinkhorn {

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

Terms parse_terms(const char* op, std::string_view name, double power, OptionalNumber rho_x, OptionalNumber rho_y);
Request parse(const Terms& terms, OptionalNumber epsilon, OptionalNumber scaling, double tolerance, int64_t max_iter,
              OptionalNumber relaxation, int64_t memory_limit);

// A weighted cloud, centred, in the type of the kernels. [B, count] stands for [total] where the batch is ragged.
struct Measure {
  Segments segments;
  Tensor points;       // [B, count, dim]; dim 0 where the costs are given
  Tensor squares;      // [B, count], zeros but for the squared Euclidean cost
  Tensor weights;      // [B, count]
  Tensor log_weights;  // [B, count]
  Tensor mass;         // [B] double
  Tensor spread;       // [B] double, weighted mean of |x'|^2
};

struct Problem {
  Terms terms;
  Measure x, y;
  Tensor shift;       // [B, dim] double, mean(x) - mean(y)
  Tensor shift_cost;  // [B] double, |shift|^2; zero where the clouds are centred together
  Tensor matrix;      // [B, N, M] of the kernels' type, for Cost::matrix
  int64_t problems() const { return x.segments.problems(); }
};

at::ScalarType kernel_type(const Tensor& t);

// Calls body with a value of the kernels' type.
template <typename Body>
auto with_type(at::ScalarType type, const Body& body) {
  return type == at::kDouble ? body(double{}) : body(float{});
}

// With a batch's dimension, which a tensor of `dim` dimensions lacks; and the result of a batch, or of the one problem
// that was given.
Tensor batched(const Tensor& t, int64_t dim);
Tensor given_form(const Tensor& t, bool batch);

// [N] for points [N, D], [B, N] for points [B, N, D].
at::IntArrayRef shape_of_weights(const Tensor& points);

void check_weights(const char* op, const char* name, const OptionalTensor& w, at::IntArrayRef shape,
                   const char* other_name, const Tensor& other);

// `offsets_x` and `offsets_y` are those of a ragged batch.
Problem prepare(const Terms& terms, const Tensor& given_x, const Tensor& given_y, const OptionalTensor& a,
                const OptionalTensor& b, const OptionalTensor& offsets_x = {}, const OptionalTensor& offsets_y = {});
Problem prepare_matrix(const Terms& terms, const Tensor& costs, const OptionalTensor& a, const OptionalTensor& b);

// [B] The mean cost where it has a closed form or lies in memory; else from the root mean square distance, which bounds
// it for costs that grow no faster than the square.
Tensor mean_cost(const Problem& p, bool centred);

Tensor resolve_epsilon(const Problem& p, const Request& request);

// [B] log(1 / least positive weight)
Tensor weight_range(const Measure& m);

// [B, N] The potential of the original cost from that of the centred one, and back. `sign` is +1 for x, -1 for y.
Tensor linear_part(const Problem& p, const Measure& m, double sign);

}  // namespace wgan_ext::sinkhorn
