#include "order.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "../parallel.h"

namespace wgan_ext::sinkhorn {

namespace {

// A part of a cloud, [begin, end) of `order`, divided in whole tiles across its widest coordinate.
template <typename T>
class Tree {
 public:
  Tree(const T* points, int64_t dim, int64_t* order, int64_t count)
      : points_(points), dim_(dim), order_(order), keys_(static_cast<size_t>(count)) {}

  // Divides down to parts of at most `size` points, of which body(begin, end) is told.
  template <typename Body>
  void divide(int64_t begin, int64_t end, int64_t size, const Body& body) {
    if (end - begin <= std::max(size, kTile)) return body(begin, end);
    const int64_t middle = begin + ceil_div(end - begin, kTile) / 2 * kTile, axis = widest(begin, end);
    const auto keys = keys_.begin();
    for (int64_t i = begin; i < end; ++i) keys[i] = {points_[order_[i] * dim_ + axis], order_[i]};
    std::nth_element(keys + begin, keys + middle, keys + end);
    for (int64_t i = begin; i < end; ++i) order_[i] = keys[i].second;
    divide(begin, middle, size, body);
    divide(middle, end, size, body);
  }

 private:
  int64_t widest(int64_t begin, int64_t end) const {
    int64_t axis = 0;
    T most = -1;
    for (int64_t d = 0; d < dim_; ++d) {
      T low = std::numeric_limits<T>::infinity(), high = -low;
      for (int64_t i = begin; i < end; ++i) {
        low = std::min(low, points_[order_[i] * dim_ + d]);
        high = std::max(high, points_[order_[i] * dim_ + d]);
      }
      if (high - low > most) {
        most = high - low;
        axis = d;
      }
    }
    return axis;
  }

  const T* points_;
  int64_t dim_;
  int64_t* order_;
  std::vector<std::pair<T, int64_t>> keys_;
};

}  // namespace

Tensor order_of(const Measure& m, const std::vector<bool>& chosen) {
  if (std::find(chosen.begin(), chosen.end(), true) == chosen.end()) return {};
  constexpr int64_t kShare = 4096;  // points that one thread divides
  const int64_t dim = m.points.size(-1);
  const Tensor order = at::empty({m.weights.numel()}, m.points.options().dtype(at::kLong));
  int64_t* all = order.mutable_data_ptr<int64_t>();
  std::iota(all, all + order.numel(), int64_t{0});
  with_type(m.points.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    Tree<T> tree(m.points.const_data_ptr<T>(), dim, all, order.numel());
    std::vector<std::pair<int64_t, int64_t>> shares;
    const auto keep = [&](int64_t begin, int64_t end) { shares.emplace_back(begin, end); };
    for (int64_t p = 0; p < m.segments.problems(); ++p)
      if (chosen[static_cast<size_t>(p)])
        tree.divide(m.segments.first(p), m.segments.first(p) + m.segments.count(p), kShare, keep);
    parallel_each(static_cast<int64_t>(shares.size()), [&](int64_t k) {
      const auto [begin, end] = shares[static_cast<size_t>(k)];
      tree.divide(begin, end, kTile, [](int64_t, int64_t) {});
    });
  });
  return order;
}

Tensor arranged(const Tensor& t, const Measure& m, const Tensor& order) {
  if (!order.defined()) return t;
  const int64_t total = m.weights.numel();
  return t.reshape({total, t.numel() / total}).index_select(0, order).reshape(t.sizes());
}

Tensor restored(const Tensor& t, const Measure& m, const Tensor& order) {
  if (!order.defined()) return t;
  const int64_t total = m.weights.numel();
  const Tensor rows = t.reshape({total, t.numel() / total});
  return at::empty_like(rows).index_copy_(0, order, rows).reshape(t.sizes());
}

Measure arranged(const Measure& m, const Tensor& order) {
  if (!order.defined()) return m;
  Measure ordered = m;
  ordered.points = arranged(m.points, m, order);
  ordered.squares = arranged(m.squares, m, order);
  ordered.weights = arranged(m.weights, m, order);
  ordered.log_weights = arranged(m.log_weights, m, order);
  return ordered;
}

namespace {

// Mean and variance of each coordinate of one problem's points.
template <typename T>
std::pair<std::vector<double>, std::vector<double>> moments(const Measure& m, int64_t problem, int64_t dim) {
  const int64_t first = m.segments.first(problem), count = m.segments.count(problem);
  const T *points = m.points.const_data_ptr<T>() + first * dim, *weights = m.weights.const_data_ptr<T>() + first;
  std::vector<double> mean(static_cast<size_t>(dim)), variance(static_cast<size_t>(dim));
  double mass = 0;
  for (int64_t i = 0; i < count; ++i) {
    mass += weights[i];
    for (int64_t d = 0; d < dim; ++d) mean[static_cast<size_t>(d)] += double(weights[i]) * points[i * dim + d];
  }
  for (double& v : mean) v /= mass;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < dim; ++d) {
      const double z = points[i * dim + d] - mean[static_cast<size_t>(d)];
      variance[static_cast<size_t>(d)] += weights[i] * z * z / mass;
    }
  return {mean, variance};
}

}  // namespace

Tiles tiles_of(const Measure& m, const Measure& other, Cost cost) {
  const int64_t dim = m.points.size(-1), problems = m.segments.problems(), fields = 2 * dim + 1;
  const int64_t stride = box_stride(m.segments.count());
  const int64_t strides =
      m.segments.ragged() ? first_of_padded(m.segments.first(problems), problems, kBoxUnit) / kTile : problems * stride;
  Tiles tiles{at::zeros({strides * fields}, m.points.options()), at::empty_like(m.squares)};
  with_type(m.points.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    for (int64_t p = 0; p < problems; ++p) {
      const int64_t first = m.segments.first(p), count = m.segments.count(p), width = box_stride(count);
      std::vector<double> mean(static_cast<size_t>(dim)), other_mean = mean, factor(static_cast<size_t>(dim), 1.0);
      if (cost == Cost::sqeuclidean) {
        std::vector<double> variance, other_variance;
        std::tie(mean, variance) = moments<T>(m, p, dim);
        std::tie(other_mean, other_variance) = moments<T>(other, p, dim);
        for (size_t d = 0; d < factor.size(); ++d)
          if (variance[d] > 0 && other_variance[d] > 0) factor[d] = std::pow(other_variance[d] / variance[d], 0.25);
      }
      const T* points = m.points.const_data_ptr<T>() + first * dim;
      T* aligned = tiles.aligned.mutable_data_ptr<T>() + first;
      T* boxes = tiles.boxes.mutable_data_ptr<T>() +
                 (m.segments.ragged() ? first_of_padded(first, p, kBoxUnit) / kTile : p * stride) * fields;
      parallel_for(ceil_div(count, kTile), [&](int64_t tile) {
        const int64_t begin = tile * kTile, end = std::min(begin + kTile, count);
        for (int64_t i = begin; i < end; ++i) aligned[i] = 0;
        for (int64_t d = 0; d < dim; ++d) {
          const size_t k = static_cast<size_t>(d);
          double low = std::numeric_limits<double>::infinity(), high = -low;
          for (int64_t i = begin; i < end; ++i) {
            const double x = points[i * dim + d], z = factor[k] * (x - mean[k]);
            low = std::min(low, z);
            high = std::max(high, z);
            // 2 x.y = |x'|^2 + |y'|^2 - |x' - y'|^2 + 2 x.mean(y) + 2 mean(x).y - 2 mean(x).mean(y)
            if (cost == Cost::sqeuclidean) aligned[i] += T(z * z + (2 * x - mean[k]) * other_mean[k]);
          }
          boxes[d * width + tile] = T((low + high) / 2);
          boxes[(dim + d) * width + tile] = T((high - low) / 2);
        }
      });
    }
  });
  return tiles;
}

}  // namespace wgan_ext::sinkhorn
