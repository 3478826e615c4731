// Which rows of a batch's tensors belong to which of its problems.
//
// In a dense batch each problem has as many points: tensors are [B, count, ...]. In a ragged one the problems have
// points in unlike numbers, one problem after the other: tensors are [total, ...].
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace wgan_ext::sinkhorn {

class Segments {
 public:
  Segments() = default;
  Segments(int64_t problems, int64_t count) : problems_(problems), count_(count) {}

  // Ragged, from offsets [B + 1] in memory of the host: problem p has the points from offsets[p] to offsets[p + 1].
  // Raises unless they rise, so that no problem is empty, from 0 to the number of points.
  Segments(const char* op, const char* name, const at::Tensor& offsets, const at::Tensor& points);

  int64_t problems() const { return problems_; }
  int64_t count() const { return count_; }  // of each problem's points; where ragged the most
  bool ragged() const { return offsets_.defined(); }

  int64_t first(int64_t problem) const { return ragged() ? begins()[problem] : problem * count_; }
  int64_t count(int64_t problem) const { return ragged() ? begins()[problem + 1] - begins()[problem] : count_; }

  // The offsets on the device of the points; null where dense.
  const int64_t* offsets() const { return ragged() ? device_offsets_.const_data_ptr<int64_t>() : nullptr; }

  // Sums (least values) over the points of each problem. [B, ...] The same bits as for the problem alone on the CPU.
  at::Tensor sum(const at::Tensor& t) const;
  at::Tensor least(const at::Tensor& t) const;

  // A value of each problem, [B, ...], so that it broadcasts with tensors of points.
  at::Tensor spread(const at::Tensor& t) const;

  // For each point 1 / the number of its problem's. double
  at::Tensor uniform(const at::TensorOptions& options) const;

 private:
  const int64_t* begins() const { return offsets_.const_data_ptr<int64_t>(); }

  int64_t problems_ = 0, count_ = 0;
  at::Tensor offsets_, device_offsets_;  // undefined where dense
  at::Tensor owner_;                     // [total] the problem of each point
};

}  // namespace wgan_ext::sinkhorn
