#include "segments.h"

#include <ATen/ops/amin.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/diff.h>
#include <ATen/ops/full.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/segment_reduce.h>
#include <ATen/ops/sum.h>
#include <c10/util/Exception.h>

#include <vector>

namespace wgan_ext::sinkhorn {

Segments::Segments(const char* op, const char* name, const at::Tensor& offsets, const at::Tensor& points) {
  TORCH_CHECK_TYPE(offsets.scalar_type() == at::kLong, op, ": offsets of ", name, " must be int64, got ",
                   offsets.scalar_type());
  TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.numel() > 1 && offsets.is_cpu(), op, ": offsets of ", name,
                    " must have shape (problems + 1,), for at least one problem, on the CPU, got ", offsets.sizes(),
                    " on ", offsets.device());
  TORCH_CHECK_VALUE(points.dim() == 2, op, ": with offsets ", name, " must have shape (total, dim), got ",
                    points.sizes());
  offsets_ = offsets.contiguous();
  problems_ = offsets_.size(0) - 1;
  TORCH_CHECK_VALUE(begins()[0] == 0 && begins()[problems_] == points.size(0), op, ": offsets of ", name,
                    " must go from 0 to the number of points, ", points.size(0), ", got ", begins()[0], " to ",
                    begins()[problems_]);
  for (int64_t p = 0; p < problems_; ++p) {
    const int64_t own = begins()[p + 1] - begins()[p];
    TORCH_CHECK_VALUE(own > 0, op, ": ", name, " of problem ", p, " must have at least one point, got ", own);
    if (own > count_) count_ = own;
  }
  device_offsets_ = offsets_.to(points.device());
  owner_ = at::repeat_interleave(at::diff(device_offsets_), std::optional<int64_t>(points.size(0)));
}

namespace {

// [B, ...] of a reduction of each problem's rows [1, count, ...], written so that the bits are those of the problem
// alone.
template <typename Reduce>
at::Tensor each_alone(const Segments& segments, const at::Tensor& t, const Reduce& reduce) {
  std::vector<at::Tensor> results;
  results.reserve(static_cast<size_t>(segments.problems()));
  for (int64_t p = 0; p < segments.problems(); ++p)
    results.push_back(reduce(t.narrow(0, segments.first(p), segments.count(p)).unsqueeze(0)));
  return at::cat(results);
}

}  // namespace

at::Tensor Segments::sum(const at::Tensor& t) const {
  if (!ragged()) return at::sum(t, {1});
  if (t.is_cpu()) return each_alone(*this, t, [](const at::Tensor& own) { return at::sum(own, {1}); });
  return at::segment_reduce(t.contiguous(), "sum", {}, {}, device_offsets_, 0, true, 0);
}

at::Tensor Segments::least(const at::Tensor& t) const {
  if (!ragged()) return at::amin(t, {1});
  if (t.is_cpu()) return each_alone(*this, t, [](const at::Tensor& own) { return at::amin(own, {1}); });
  return at::segment_reduce(t.contiguous(), "min", {}, {}, device_offsets_, 0, true);
}

at::Tensor Segments::spread(const at::Tensor& t) const { return ragged() ? t.index_select(0, owner_) : t.unsqueeze(1); }

at::Tensor Segments::uniform(const at::TensorOptions& options) const {
  if (!ragged()) return at::full({problems_, count_}, 1.0 / static_cast<double>(count_), options);
  return spread(at::reciprocal(at::diff(device_offsets_).to(options.dtype())));
}

}  // namespace wgan_ext::sinkhorn
