#include "segments.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/amin.h>
#include <ATen/ops/diff.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/segment_reduce.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/sum.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "../formulas.h"
#include "../parallel.h"

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
    count_ = std::max(count_, own);
  }
  device_offsets_ = offsets_.to(points.device());
  owner_ = at::repeat_interleave(at::diff(device_offsets_), std::optional<int64_t>(points.size(0)));
}

namespace {

constexpr int64_t kPartElements = 1 << 15;

// The rows of a batch cut into parts of about as many elements, none of more than one problem.
class Parts {
 public:
  Parts(const Segments& segments, int64_t width)
      : segments_(segments), rows_(std::max<int64_t>(1, kPartElements / std::max<int64_t>(1, width))) {
    first_.reserve(static_cast<size_t>(segments.problems()) + 1);
    first_.push_back(0);
    for (int64_t p = 0; p < segments.problems(); ++p)
      first_.push_back(first_.back() + ceil_div(segments.count(p), rows_));
    shares_ = std::min(count(), ceil_div(segments.first(segments.problems()), rows_));
  }

  int64_t count() const { return first_.back(); }
  int64_t first(int64_t problem) const { return first_[static_cast<size_t>(problem)]; }

  // Calls body(problem, part, its first row, its last + 1) for each; a thread takes small ones together.
  template <typename Body>
  void each(const Body& body) const {
    parallel_for(shares_, [&](int64_t share) {
      const int64_t begin = count() * share / shares_, end = count() * (share + 1) / shares_;
      int64_t p = std::upper_bound(first_.begin(), first_.end(), begin) - first_.begin() - 1;
      for (int64_t part = begin; part < end; ++part) {
        while (part >= first(p + 1)) ++p;
        const int64_t row = segments_.first(p) + (part - first(p)) * rows_;
        body(p, part, row, std::min(row + rows_, segments_.first(p) + segments_.count(p)));
      }
    });
  }

 private:
  const Segments& segments_;
  int64_t rows_, shares_;
  std::vector<int64_t> first_;  // part of each problem
};

// Calls body with the elements of t, in double if they are neither float nor double.
template <typename Body>
auto with_elements(const at::Tensor& t, const Body& body) {
  const at::Tensor whole = t.contiguous();
  if (whole.scalar_type() == at::kFloat) return body(whole.const_data_ptr<float>());
  const at::Tensor wide = whole.to(at::kDouble);
  return body(wide.const_data_ptr<double>());
}

// combine(...) of the numbers value(i): eight at a time, for each waits for the one before.
template <typename Value, typename Combine>
double fold(int64_t begin, int64_t end, double start, const Value& value, const Combine& combine) {
  double lanes[8];
  for (double& lane : lanes) lane = start;
  for (; begin + 8 <= end; begin += 8)
    for (int64_t k = 0; k < 8; ++k) lanes[k] = combine(lanes[k], value(begin + k));
  for (int64_t k = 0; begin + k < end; ++k) lanes[k] = combine(lanes[k], value(begin + k));
  for (int64_t k = 1; k < 8; ++k) lanes[0] = combine(lanes[0], lanes[k]);
  return lanes[0];
}

double add(double a, double b) { return a + b; }
double lesser(double a, double b) { return b < a ? b : a; }

}  // namespace

template <typename Add>
at::Tensor Segments::reduce(int64_t width, double start, const at::Tensor& like, const Add& add,
                            double (*combine)(double, double)) const {
  const Parts parts(*this, width);
  std::vector<double> partial(static_cast<size_t>(parts.count() * width), start);
  parts.each(
      [&](int64_t, int64_t part, int64_t begin, int64_t end) { add(begin, end, partial.data() + part * width); });
  at::Tensor result = at::empty({problems_, width}, like.options().dtype(at::kDouble));
  double* out = result.mutable_data_ptr<double>();
  for (int64_t p = 0; p < problems_; ++p)
    for (int64_t d = 0; d < width; ++d) {
      double total = partial[static_cast<size_t>(parts.first(p) * width + d)];
      for (int64_t part = parts.first(p) + 1; part < parts.first(p + 1); ++part)
        total = combine(total, partial[static_cast<size_t>(part * width + d)]);
      out[p * width + d] = total;
    }
  return result;
}

at::Tensor Segments::sum(const at::Tensor& t) const {
  if (!t.is_cpu()) {
    const at::Tensor wide = t.to(at::kDouble).contiguous();
    return ragged() ? at::segment_reduce(wide, "sum", {}, {}, device_offsets_, 0, true) : at::sum(wide, {1});
  }
  return with_elements(t, [&](const auto* from) {
    const auto value = [=](int64_t i) { return static_cast<double>(from[i]); };
    const auto part = [=](int64_t begin, int64_t end, double* sum) { *sum = fold(begin, end, 0, value, add); };
    return reduce(1, 0, t, part, add).squeeze(1);
  });
}

at::Tensor Segments::least(const at::Tensor& t) const {
  if (!t.is_cpu()) {
    const at::Tensor wide = t.to(at::kDouble).contiguous();
    return ragged() ? at::segment_reduce(wide, "min", {}, {}, device_offsets_, 0, true) : at::amin(wide, {1});
  }
  return with_elements(t, [&](const auto* from) {
    const auto value = [=](int64_t i) { return static_cast<double>(from[i]); };
    const auto part = [=](int64_t begin, int64_t end, double* least) {
      *least = fold(begin, end, *least, value, lesser);
    };
    return reduce(1, std::numeric_limits<double>::infinity(), t, part, lesser).squeeze(1);
  });
}

at::Tensor Segments::weighted_sum(const at::Tensor& t, const at::Tensor& weights) const {
  if (!t.is_cpu()) {
    const at::Tensor weighted = (t * weights.unsqueeze(-1)).contiguous();
    return ragged() ? at::segment_reduce(weighted, "sum", {}, {}, device_offsets_, 0, true) : at::sum(weighted, {1});
  }
  const at::Tensor whole = weights.contiguous();
  const double* w = whole.const_data_ptr<double>();
  const int64_t width = t.size(-1);
  return with_elements(t, [&](const auto* from) {
    const auto part = [=](int64_t begin, int64_t end, double* sum) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t d = 0; d < width; ++d) sum[d] += w[i] * static_cast<double>(from[i * width + d]);
    };
    return reduce(width, 0, t, part, add);
  });
}

std::tuple<at::Tensor, at::Tensor> Segments::centred(const at::Tensor& points, const at::Tensor& centre,
                                                     at::ScalarType type) const {
  if (!points.is_cpu()) {
    const at::Tensor result = at::sub(points, spread(centre)).to(type).contiguous();
    return {result, at::sum(result * result, {-1}, false, at::kDouble)};
  }
  const int64_t width = points.size(-1);
  const at::Tensor result = at::empty(points.sizes(), points.options().dtype(type)), whole = centre.contiguous();
  const at::Tensor squares = at::empty(points.sizes().slice(0, points.dim() - 1), points.options().dtype(at::kDouble));
  const double* centres = whole.const_data_ptr<double>();
  double* square = squares.mutable_data_ptr<double>();
  with_elements(points, [&](const auto* from) {
    const auto fill = [&](auto* to) {
      using T = std::remove_pointer_t<decltype(to)>;
      Parts(*this, width).each([=](int64_t problem, int64_t, int64_t begin, int64_t end) {
        const double* c = centres + problem * width;
        for (int64_t i = begin; i < end; ++i) {
          double sum = 0;
          for (int64_t d = 0; d < width; ++d) {
            const T x = static_cast<T>(static_cast<double>(from[i * width + d]) - c[d]);
            to[i * width + d] = x;
            sum += static_cast<double>(x * x);
          }
          square[i] = sum;
        }
      });
    };
    if (type == at::kDouble) return fill(result.mutable_data_ptr<double>());
    return fill(result.mutable_data_ptr<float>());
  });
  return {result, squares};
}

at::Tensor Segments::products(const at::Tensor& points, const at::Tensor& vector) const {
  if (!points.is_cpu()) return at::sum(points * spread(vector), {-1});
  const int64_t width = points.size(-1);
  const at::Tensor whole = vector.contiguous();
  const at::Tensor result = at::empty(points.sizes().slice(0, points.dim() - 1), whole.options());
  const double* vectors = whole.const_data_ptr<double>();
  double* to = result.mutable_data_ptr<double>();
  with_elements(points, [&](const auto* from) {
    Parts(*this, width).each([=](int64_t problem, int64_t, int64_t begin, int64_t end) {
      const double* v = vectors + problem * width;
      for (int64_t i = begin; i < end; ++i) {
        double sum = 0;
        for (int64_t d = 0; d < width; ++d) sum += static_cast<double>(from[i * width + d]) * v[d];
        to[i] = sum;
      }
    });
  });
  return result;
}

at::Tensor Segments::spread(const at::Tensor& t) const { return ragged() ? t.index_select(0, owner_) : t.unsqueeze(1); }

at::Tensor Segments::uniform(const at::TensorOptions& options) const {
  if (!ragged()) return at::full({problems_, count_}, 1.0 / static_cast<double>(count_), options);
  return spread(at::reciprocal(at::diff(device_offsets_).to(options.dtype())));
}

}  // namespace wgan_ext::sinkhorn
