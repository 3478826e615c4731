// Which rows of a batch's tensors belong to which of its problems, and what is summed over them.
//
// In a dense batch each problem has as many points: tensors of points are [B, count, ...]. In a ragged one the problems
// have points in unlike numbers, one problem after the other: tensors of points are [total, ...]. On the CPU a problem
// gives the same bits alone and in any batch, whatever the number of threads, and nothing is made in between: a large
// block that malloc takes from the system costs more than the sum.
#pragma once
#include <ATen/core/Tensor.h>

#include <tuple>

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

  // In double over the points of each problem: sums of t, of t [.., dim] times a weight (double) of each point, the
  // least t. [B], [B, dim], [B]
  at::Tensor sum(const at::Tensor& t) const;
  at::Tensor weighted_sum(const at::Tensor& t, const at::Tensor& weights) const;
  at::Tensor least(const at::Tensor& t) const;

  // For centres [B, dim] in double: the points less their problem's centre, in the type given, and their squares summed
  // over dim, in double. [.., dim], [..]
  std::tuple<at::Tensor, at::Tensor> centred(const at::Tensor& points, const at::Tensor& centre,
                                             at::ScalarType type) const;

  // Products of the points with their problem's vector, [B, dim] in double. [..] double
  at::Tensor products(const at::Tensor& points, const at::Tensor& vector) const;

  // A value of each problem, [B, ...], so that it broadcasts with tensors of points.
  at::Tensor spread(const at::Tensor& t) const;

  // For each point 1 / the number of its problem's. double
  at::Tensor uniform(const at::TensorOptions& options) const;

 private:
  const int64_t* begins() const { return offsets_.const_data_ptr<int64_t>(); }

  // Of the sums of double over the rows of each problem that add(begin, end, sum) makes, each [width]. [B, width]
  template <typename Add>
  at::Tensor reduce(int64_t width, double start, const at::Tensor& like, const Add& add,
                    double (*combine)(double, double)) const;

  int64_t problems_ = 0, count_ = 0;
  at::Tensor offsets_, device_offsets_;  // undefined where dense
  at::Tensor owner_;                     // [total] the problem of each point
};

}  // namespace wgan_ext::sinkhorn
