// Spectral normalization on the processor.
//
// A normalisation is only a scalar, so both products of an iteration can be formed while a piece of W is in cache: a
// few rows give their part of t = W v and at once of W^T t (the order u, v); a slab of a transposed convolution gives
// its part of s = W^T u and at once of W s (the order v, u). Elsewhere W is streamed twice, which beats blocks of
// columns at every size measured. The pieces depend on the shape alone.
//
// Unnormalised products of both kinds are of the order of sigma^2 and would leave the range of float for weights of
// 1e-20 or 1e20, so each piece carries its part of the second product with a power of two of its own (`Scale`).
#include "../parallel.h"
#include "kernels.h"
//
#include "../simd.h"  // last

namespace wgan_ext::spectral::WGAN_EXT_LEVEL {
using namespace wgan_ext::WGAN_EXT_LEVEL;
namespace {

constexpr int64_t kPieces = 64;  // at most, of one pass; halved for as long as a piece would be smaller than a grain
constexpr int64_t kGrain = 1 << 15;   // elements of W
constexpr int64_t kShared = 1 << 18;  // elements of W from which all threads work on it
constexpr int64_t kNarrow = 64;       // rows shorter than this are handled a slab at a time

WGAN_EXT_INLINE int64_t align(int64_t n) { return ceil_div(n, 16) * 16; }

// `units` units of work of `size` elements each, cut into pieces.
struct Cut {
  int64_t units, per_piece, pieces;
  WGAN_EXT_INLINE Cut(int64_t units, int64_t size, int64_t at_least = 1) : units(units) {
    int64_t wanted = kPieces;
    while (wanted > 1 && (units * size < wanted * kGrain || units < wanted * at_least)) wanted /= 2;
    per_piece = ceil_div(units, wanted);
    pieces = ceil_div(units, per_piece);
  }
  WGAN_EXT_INLINE int64_t begin(int64_t piece) const { return piece * per_piece; }
  WGAN_EXT_INLINE int64_t end(int64_t piece) const { return least(units, (piece + 1) * per_piece); }
};

// The largest power of two that is at most x, within the normal range of T with a margin; 1 for 0 and NaN.
template <typename T>
T power_of_two(double x) {
  constexpr double kMost = sizeof(T) == 4 ? 0x1p126 : 0x1p1022;
  if (!(x > 0)) return 1;
  x = least(greatest(x, 1 / kMost), kMost);
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= uint64_t{0x7ff} << 52;
  std::memcpy(&x, &bits, sizeof bits);
  return static_cast<T>(x);
}

// A result this large is written past the caches, which would have to read it first and could not keep it.
template <typename T>
WGAN_EXT_INLINE bool past_caches(int64_t elements) {
  return elements * static_cast<int64_t>(sizeof(T)) >= 32 << 20;
}

// Sums of products in blocks of 4 x 64 vectors, the blocks in double.
template <typename T>
double dot(const T* x, const T* y, int64_t n) {
  using V = Vec<T>;
  double total = 0;
  int64_t i = 0;
  while (n - i >= 4 * V::size) {
    const int64_t end = i + least<int64_t>((n - i) / (4 * V::size), 64) * 4 * V::size;
    V a = V::zero(), b = V::zero(), c = V::zero(), d = V::zero();
    for (; i < end; i += 4 * V::size) {
      a = fma(V::load(x + i), V::load(y + i), a);
      b = fma(V::load(x + i + V::size), V::load(y + i + V::size), b);
      c = fma(V::load(x + i + 2 * V::size), V::load(y + i + 2 * V::size), c);
      d = fma(V::load(x + i + 3 * V::size), V::load(y + i + 3 * V::size), d);
    }
    total += sum((a + b) + (c + d));
  }
  for (; i < n; ++i) total += static_cast<double>(x[i]) * y[i];
  return total;
}

// |x|, also where the squares leave the range of T.
template <typename T>
double norm(const T* x, int64_t n) {
  constexpr double kLeast = sizeof(T) == 4 ? 1e-24 : 1e-260, kMost = sizeof(T) == 4 ? 1e36 : 1e300;
  const double squares = dot(x, x, n);
  if (squares > kLeast && squares < kMost) return std::sqrt(squares);
  double most = 0;
  for (int64_t i = 0; i < n; ++i) most = greatest(most, std::fabs(static_cast<double>(x[i])));
  const double scale = power_of_two<double>(most), inverse = 1 / scale;
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += (x[i] * inverse) * (x[i] * inverse);
  return scale * std::sqrt(total);
}

// y = a x, past the caches: for a y that is too large for them, and aligned to the vector
template <typename T>
WGAN_EXT_INLINE void multiply_past_caches(const T* x, int64_t n, T a, T* y) {
  using V = Vec<T>;
  const V factor = V::fill(a);
  int64_t i = 0;
  for (; i + V::size <= n; i += V::size) (V::load(x + i) * factor).stream(y + i);
  for (; i < n; ++i) y[i] = x[i] * a;
  finish_streams();
}

// y = a x
template <typename T>
WGAN_EXT_INLINE void multiply(const T* x, int64_t n, T a, T* y) {
  using V = Vec<T>;
  const V factor = V::fill(a);
  int64_t i = 0;
  for (; i + 4 * V::size <= n; i += 4 * V::size)
    for (int64_t k = 0; k < 4; ++k) (V::load(x + i + k * V::size) * factor).store(y + i + k * V::size);
  for (; i < n; ++i) y[i] = x[i] * a;
}

template <typename T>
WGAN_EXT_INLINE void fill_zero(T* x, int64_t n) {
  std::memset(static_cast<void*>(x), 0, n * sizeof(T));
}

template <typename T>
WGAN_EXT_INLINE void copy(const T* x, int64_t n, T* y) {
  std::memcpy(y, x, n * sizeof(T));
}

// ---- products with a block of full rows: a[r * stride + c], r < rows, c < width

// s[c] += sum_r u[r] a[r, c]
template <typename T>
void add_columns(const T* a, int64_t stride, int64_t rows, int64_t width, const T* u, T* s) {
  using V = Vec<T>;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4, a += 4 * stride) {
    const V u0 = V::fill(u[r]), u1 = V::fill(u[r + 1]), u2 = V::fill(u[r + 2]), u3 = V::fill(u[r + 3]);
    const T *a1 = a + stride, *a2 = a1 + stride, *a3 = a2 + stride;
    int64_t c = 0;
    for (; c + V::size <= width; c += V::size) {
      const V even = fma(u2, V::load(a2 + c), fma(u0, V::load(a + c), V::load(s + c)));
      (even + fma(u3, V::load(a3 + c), u1 * V::load(a1 + c))).store(s + c);
    }
    for (; c < width; ++c) s[c] += (u[r] * a[c] + u[r + 2] * a2[c]) + (u[r + 1] * a1[c] + u[r + 3] * a3[c]);
  }
  for (; r < rows; ++r, a += stride) {
    const V u0 = V::fill(u[r]);
    int64_t c = 0;
    for (; c + V::size <= width; c += V::size) fma(u0, V::load(a + c), V::load(s + c)).store(s + c);
    for (; c < width; ++c) s[c] += u[r] * a[c];
  }
}

// lanes[r] += the products of row r with x, to be summed over the lanes by fold_lanes
template <typename T>
void add_rows(const T* a, int64_t stride, int64_t rows, int64_t width, const T* x, T* lanes) {
  using V = Vec<T>;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4, a += 4 * stride, lanes += 4 * V::size) {
    const T *a1 = a + stride, *a2 = a1 + stride, *a3 = a2 + stride;
    V t0 = V::load(lanes), t1 = V::load(lanes + V::size), t2 = V::load(lanes + 2 * V::size),
      t3 = V::load(lanes + 3 * V::size);
    V s0 = V::zero(), s1 = V::zero(), s2 = V::zero(), s3 = V::zero();
    int64_t c = 0;
    for (; c + 2 * V::size <= width; c += 2 * V::size) {
      const V x0 = V::load(x + c), x1 = V::load(x + c + V::size);
      t0 = fma(x0, V::load(a + c), t0);
      t1 = fma(x0, V::load(a1 + c), t1);
      t2 = fma(x0, V::load(a2 + c), t2);
      t3 = fma(x0, V::load(a3 + c), t3);
      s0 = fma(x1, V::load(a + c + V::size), s0);
      s1 = fma(x1, V::load(a1 + c + V::size), s1);
      s2 = fma(x1, V::load(a2 + c + V::size), s2);
      s3 = fma(x1, V::load(a3 + c + V::size), s3);
    }
    (t0 + s0).store(lanes);
    (t1 + s1).store(lanes + V::size);
    (t2 + s2).store(lanes + 2 * V::size);
    (t3 + s3).store(lanes + 3 * V::size);
    for (int64_t i = 0; c < width; ++c, i = (i + 1) % V::size) {
      lanes[i] += a[c] * x[c];
      lanes[V::size + i] += a1[c] * x[c];
      lanes[2 * V::size + i] += a2[c] * x[c];
      lanes[3 * V::size + i] += a3[c] * x[c];
    }
  }
  for (; r < rows; ++r, a += stride, lanes += V::size) {
    V t = V::load(lanes);
    int64_t c = 0;
    for (; c + V::size <= width; c += V::size) t = fma(V::load(x + c), V::load(a + c), t);
    t.store(lanes);
    for (int64_t i = 0; c < width; ++c, ++i) lanes[i] += a[c] * x[c];
  }
}

template <typename T>
WGAN_EXT_INLINE void fold_lanes(const T* lanes, int64_t rows, T* t) {
  for (int64_t r = 0; r < rows; ++r) t[r] = sum(Vec<T>::load(lanes + r * Vec<T>::size));
}

// ---- products with a slab of short rows, taken as one run of rows * inner elements: what belongs to a row is spread
// over the run (`spread`), what belongs to a column is repeated with a period that is a whole number of vectors

template <typename T>
struct Slab {
  int64_t inner, run, period;  // elements; the period is a multiple of inner and of the vector
  WGAN_EXT_INLINE explicit Slab(Shape shape)
      : inner(shape.inner), run(shape.rows * shape.inner), period(inner * Vec<T>::size * ceil_div(8, inner)) {}
  static constexpr int64_t kPeriod = Vec<T>::size * (kNarrow + 8);  // of any slab
};

template <typename T>
WGAN_EXT_INLINE void spread(const T* u, Shape shape, T* run) {
  for (int64_t r = 0; r < shape.rows; ++r)
    for (int64_t i = 0; i < shape.inner; ++i) *run++ = u[r];
}

template <typename T>
WGAN_EXT_INLINE void gather(const T* run, Shape shape, T* t) {
  for (int64_t r = 0; r < shape.rows; ++r) {
    T total = 0;
    for (int64_t i = 0; i < shape.inner; ++i) total += *run++;
    t[r] = total;
  }
}

template <typename T>
WGAN_EXT_INLINE void repeat(const T* v, const Slab<T>& slab, T* pattern) {
  for (int64_t k = 0; k < least(slab.period, slab.run); k += slab.inner)
    for (int64_t i = 0; i < slab.inner; ++i) pattern[k + i] = v[i];
}

// s = A^T u, with u spread over the run
template <typename T>
void slab_columns(const T* a, const Slab<T>& slab, const T* spread_u, T* s) {
  using V = Vec<T>;
  T total[Slab<T>::kPeriod];
  fill_zero(total, slab.period);
  for (int64_t begin = 0; begin < slab.run; begin += slab.period) {
    const int64_t length = least(slab.period, slab.run - begin);
    const T *p = a + begin, *q = spread_u + begin;
    int64_t k = 0;
    for (; k + V::size <= length; k += V::size)
      fma(V::load(p + k), V::load(q + k), V::load(total + k)).store(total + k);
    for (; k < length; ++k) total[k] += p[k] * q[k];
  }
  fill_zero(s, slab.inner);
  for (int64_t k = 0; k < slab.period; k += slab.inner)
    for (int64_t i = 0; i < slab.inner; ++i) s[i] += total[k + i];
}

// spread_t += A x, still to be gathered over the elements of each row
template <typename T>
void add_slab_rows(const T* a, const Slab<T>& slab, const T* x, T* spread_t) {
  using V = Vec<T>;
  T pattern[Slab<T>::kPeriod];
  repeat(x, slab, pattern);
  for (int64_t begin = 0; begin < slab.run; begin += slab.period) {
    const int64_t length = least(slab.period, slab.run - begin);
    const T* p = a + begin;
    T* t = spread_t + begin;
    int64_t k = 0;
    for (; k + V::size <= length; k += V::size) fma(V::load(p + k), V::load(pattern + k), V::load(t + k)).store(t + k);
    for (; k < length; ++k) t[k] += p[k] * pattern[k];
  }
}

// result = a grad + u v^T, with u spread over the run
template <typename T>
void slab_outer(const T* grad, T a, const Slab<T>& slab, const T* spread_u, const T* v, T* result) {
  using V = Vec<T>;
  T pattern[Slab<T>::kPeriod];
  repeat(v, slab, pattern);
  const V factor = V::fill(a);
  for (int64_t begin = 0; begin < slab.run; begin += slab.period) {
    const int64_t length = least(slab.period, slab.run - begin);
    int64_t k = 0;
    for (; k + V::size <= length; k += V::size) {
      const V base = grad ? factor * V::load(grad + begin + k) : V::zero();
      fma(V::load(spread_u + begin + k), V::load(pattern + k), base).store(result + begin + k);
    }
    for (; k < length; ++k) result[begin + k] = spread_u[begin + k] * pattern[k] + (grad ? a * grad[begin + k] : T{0});
  }
}

// ---- passes over W

bool narrow(Shape s) { return s.outer > 1 && s.inner < kNarrow; }

// The power of two by which a piece divides its part of the first product before it forms the second.
template <typename T>
struct Scale {
  T value = 0, inverse = 1;  // value is 0 while all that was seen is 0

  // Looks at the next of that product; returns what the sums so far are to be multiplied with, as the scale has risen.
  WGAN_EXT_INLINE T see(const T* x, int64_t n) {
    const double length = norm(x, n);
    if (!(length > 0x1p24 * value) || !(length < HUGE_VAL)) return 1;
    const T before = value;
    value = power_of_two<T>(length);
    inverse = 1 / value;
    return before > 0 ? before * inverse : 1;
  }
};

// One vector for each piece, to be summed in the order of the pieces, each with its power of two.
template <typename T>
struct Partials {
  T* vectors;  // [pieces, stride]
  T* scales;   // [pieces]
  int64_t length, stride;
};

// Returns the scale of the sum, which is sum / scale in `total`.
template <typename T>
T add_partials(const Partials<T>& p, int64_t pieces, T* total) {
  T scale = 0;
  for (int64_t k = 0; k < pieces; ++k) scale = greatest(scale, p.scales[k]);
  if (scale == 0) scale = 1;
  const int64_t tile = 1024;
  const auto tile_sum = [&](int64_t index) {
    using V = Vec<T>;
    const int64_t begin = index * tile, n = least(tile, p.length - begin);
    T* out = total + begin;
    multiply(p.vectors + begin, n, p.scales[0] / scale, out);
    for (int64_t k = 1; k < pieces; ++k) {
      const T* x = p.vectors + k * p.stride + begin;
      const T factor = p.scales[k] / scale;
      int64_t i = 0;
      for (; i + V::size <= n; i += V::size) fma(V::fill(factor), V::load(x + i), V::load(out + i)).store(out + i);
      for (; i < n; ++i) out[i] += factor * x[i];
    }
  };
  const int64_t tiles = ceil_div(p.length, tile);
  if (pieces * p.length < kGrain)
    for (int64_t i = 0; i < tiles; ++i) tile_sum(i);
  else
    parallel_for(tiles, tile_sum);
  return scale;
}

// The products with W. Scratch is laid out by the caller; `free` is at least free_size() elements.
template <typename T>
struct Pass {
  const T* weight;
  Shape shape;
  mutable Order last = Order::back;

  // The order of the next pass: it begins where the last one ended, which is still in cache.
  Order turn() const { return last = last == Order::forth ? Order::back : Order::forth; }

  int64_t slab() const { return shape.rows * shape.inner; }

  // The pieces of each pass, and what one sums up t in before it is summed over lanes or gathered.
  Cut by_slab() const { return Cut(shape.outer, slab()); }
  Cut by_row() const { return Cut(shape.rows, shape.inner, 32); }  // each has a vector of sums: 1/32 of its rows
  int64_t sums_size() const { return align(narrow(shape) ? slab() : shape.rows * Vec<T>::size); }

  int64_t free_size() const {
    if (shape.outer > 1) return kPieces + by_slab().pieces * (align(shape.rows) + sums_size()) + align(slab());
    return kPieces + greatest(sums_size(), by_row().pieces * align(shape.inner));
  }

  Partials<T> partials(T* free, int64_t length) const { return {free + kPieces, free, length, align(length)}; }

  // t = W x
  void product(const T* x, T* t, T* free) const {
    if (shape.outer > 1) {
      pass_by_slabs(nullptr, x, nullptr, t, free);
      return;
    }
    const Cut cut = by_row();
    parallel_for(cut.pieces, turn(), [&](int64_t piece) {
      const int64_t begin = cut.begin(piece), n = cut.end(piece) - begin;
      T* lane = free + begin * Vec<T>::size;
      fill_zero(lane, n * Vec<T>::size);
      add_rows(weight + begin * shape.inner, shape.inner, n, shape.inner, x, lane);
      fold_lanes(lane, n, t + begin);
    });
  }

  // s = W^T x
  void transposed_product(const T* x, T* s, T* free) const {
    if (shape.outer > 1) {
      pass_by_slabs(x, nullptr, s, nullptr, free);
      return;
    }
    const Cut cut = by_row();
    const Partials<T> part = partials(free, shape.inner);
    parallel_for(cut.pieces, turn(), [&](int64_t piece) {
      const int64_t begin = cut.begin(piece), n = cut.end(piece) - begin;
      T* sums = part.vectors + piece * part.stride;
      fill_zero(sums, shape.inner);
      add_columns(weight + begin * shape.inner, shape.inner, n, shape.inner, x + begin, sums);
      part.scales[piece] = 1;
    });
    add_partials(part, cut.pieces, s);
  }

  // t = W v and s = W^T t / scale in one read, by blocks of rows; outer = 1. Returns the scale.
  T pass_by_rows(const T* v, T* t, T* s, T* free) const {
    const Cut cut = by_row();
    const Partials<T> part = partials(free, shape.inner);
    parallel_for(cut.pieces, turn(), [&](int64_t piece) {
      constexpr int64_t kBlock = 8;
      T lane[kBlock * Vec<T>::size], scaled[kBlock];
      T* sums = part.vectors + piece * part.stride;
      fill_zero(sums, shape.inner);
      Scale<T> scale;
      for (int64_t r = cut.begin(piece); r < cut.end(piece); r += kBlock) {
        const int64_t n = least(kBlock, cut.end(piece) - r);
        const T* a = weight + r * shape.inner;
        fill_zero(lane, n * Vec<T>::size);
        add_rows(a, shape.inner, n, shape.inner, v, lane);
        fold_lanes(lane, n, t + r);
        const T less = scale.see(t + r, n);
        if (less != 1) multiply(sums, shape.inner, less, sums);
        multiply(t + r, n, scale.inverse, scaled);
        add_columns(a, shape.inner, n, shape.inner, scaled, sums);
      }
      part.scales[piece] = scale.value;
    });
    return add_partials(part, cut.pieces, s);
  }

  // By slabs, in one read: s = W^T u if u is given; t, if it is given, is W x if x is, else W s / scale. Returns the
  // scale.
  T pass_by_slabs(const T* u, const T* x, T* s, T* t, T* free) const {
    const bool is_narrow = narrow(shape);
    const int64_t rows = shape.rows, inner = shape.inner;
    const Slab<T> run(shape);
    const Cut cut = by_slab();
    const Partials<T> part = partials(free, rows);
    T* spread_u = part.vectors + cut.pieces * part.stride;
    T* all_sums = spread_u + align(slab());
    if (u && is_narrow) spread(u, shape, spread_u);
    parallel_for(cut.pieces, turn(), [&](int64_t piece) {
      T* sums = all_sums + piece * sums_size();
      if (t) fill_zero(sums, sums_size());
      const auto add = [&](const T* a, int64_t width, const T* vector) {
        if (is_narrow)
          add_slab_rows(a, run, vector, sums);
        else
          add_rows(a, inner, rows, width, vector, sums);
      };
      Scale<T> scale;
      for (int64_t o = cut.begin(piece); o < cut.end(piece); ++o) {
        const T* a = weight + o * slab();
        const int64_t column = o * inner;
        if (u && is_narrow) slab_columns(a, run, spread_u, s + column);
        if (u && !is_narrow) {
          fill_zero(s + column, inner);
          add_columns(a, inner, rows, inner, u, s + column);
        }
        if (t && x) add(a, inner, x + column);
        if (!t || x) continue;
        const T less = scale.see(s + column, inner);
        if (less != 1) multiply(sums, sums_size(), less, sums);
        constexpr int64_t kTile = 1024;
        T scaled[kTile];
        for (int64_t c = 0; c < inner; c += kTile) {
          const int64_t width = least(kTile, inner - c);
          multiply(s + column + c, width, scale.inverse, scaled);
          add(a + c, width, scaled);
        }
      }
      if (t && is_narrow) gather(sums, shape, part.vectors + piece * part.stride);
      if (t && !is_narrow) fold_lanes(sums, rows, part.vectors + piece * part.stride);
      part.scales[piece] = x ? T{1} : scale.value;
    });
    return t ? add_partials(part, cut.pieces, t) : T{1};
  }
};

bool is_direction(double length) { return length > 0 && length < HUGE_VAL; }

// vector = x / |x| if that is a direction; returns |x|.
template <typename T>
double normalize_vector(const T* x, int64_t n, T* vector) {
  const double length = norm(x, n);
  if (!is_direction(length)) return length;
  const T scale = power_of_two<T>(length), factor = static_cast<T>(scale / length);
  multiply(x, n, 1 / scale, vector);
  multiply(vector, n, factor, vector);
  return length;
}

// The length of W N(x), where x has length `first` and W x has length `second`; NaN if either is not finite.
double ratio(double second, double first) {
  if (!is_direction(first)) return first - first;
  return second < HUGE_VAL ? second / first : second - second;
}

template <typename T>
struct Iteration {
  Pass<T> pass;
  T *u, *v;         // [rows], [columns]
  T *t, *s, *free;  // scratch for unnormalised u and v, and for the passes

  // One power iteration in either order. Returns u . (W v).
  double v_then_u() const {
    const Shape shape = pass.shape;
    if (shape.outer > 1) {
      const double scale = pass.pass_by_slabs(u, nullptr, s, t, free);
      const double first = normalize_vector(s, columns(shape), v);
      return ratio(normalize_vector(t, shape.rows, u), first / scale);
    }
    pass.transposed_product(u, s, free);
    const double first = normalize_vector(s, columns(shape), v);
    if (!is_direction(first)) return first - first;
    pass.product(v, t, free);
    return ratio(normalize_vector(t, shape.rows, u), 1);
  }

  double u_then_v() const {
    const Shape shape = pass.shape;
    if (shape.outer == 1) {
      const double scale = pass.pass_by_rows(v, t, s, free);
      const double first = normalize_vector(t, shape.rows, u);
      return ratio(normalize_vector(s, columns(shape), v), first / scale);
    }
    pass.product(v, t, free);
    const double first = normalize_vector(t, shape.rows, u);
    if (!is_direction(first)) return first - first;
    pass.transposed_product(u, s, free);
    return ratio(normalize_vector(s, columns(shape), v), 1);
  }
};

template <typename T>
int64_t scratch_of(Shape shape) {
  shape = by_rows(shape);
  return align(shape.rows) + align(columns(shape)) + align(Pass<T>{nullptr, shape}.free_size());
}

template <typename T>
int64_t scratch(const Shape* shapes, int64_t count) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += scratch_of<T>(shapes[i]);
  return total;
}

template <typename T>
void normalize_one(const Job<T>& given, T* scratch) {
  const Job<T> job = by_rows(given);
  const Shape shape = job.shape;
  copy(job.u0, shape.rows, job.u);
  copy(job.v0, columns(shape), job.v);
  T *t = scratch, *s = t + align(shape.rows), *free = s + align(columns(shape));
  const Iteration<T> iteration{{job.weight, shape}, job.u, job.v, t, s, free};
  double found = 0;
  if (job.iterations == 0) {
    iteration.pass.product(job.v, t, free);
    found = dot(job.u, t, shape.rows);
  }
  for (int64_t i = 0; i < job.iterations; ++i) found = job.v_first ? iteration.v_then_u() : iteration.u_then_v();
  if (found == 0) found = job.eps;
  *job.sigma = static_cast<T>(found);
  if (!job.normalized) return;
  const T factor = static_cast<T>(1 / divisor(job.target, found));
  const Cut cut(ceil_div(elements(shape), 4096), 4096);
  parallel_for(cut.pieces, iteration.pass.turn(), [&](int64_t piece) {
    const int64_t begin = cut.begin(piece) * 4096, end = least(cut.end(piece) * 4096, elements(shape));
    if (past_caches<T>(elements(shape)))
      multiply_past_caches(job.weight + begin, end - begin, factor, job.normalized + begin);
    else
      multiply(job.weight + begin, end - begin, factor, job.normalized + begin);
  });
}

// All threads share a weight that is large or more than half of what is left; of the others, which then stay in the
// cache of one core from the first pass to the last, each has one thread.
template <typename T>
void normalize(const Job<T>* jobs, int64_t count, T* scratch, Stream) {
  int64_t rest = 0;
  for (int64_t i = 0; i < count; ++i) rest += elements(jobs[i].shape);
  for (; count > 0; ++jobs, --count) {
    const int64_t size = elements(jobs->shape);
    if (size < kShared && 2 * size <= rest) break;
    normalize_one(*jobs, scratch);
    scratch += scratch_of<T>(jobs->shape);
    rest -= size;
  }
  if (count == 0) return;
  parallel_each(count, [&](int64_t i) {
    T* own = scratch;
    for (int64_t k = 0; k < i; ++k) own += scratch_of<T>(jobs[k].shape);
    normalize_one(jobs[i], own);
  });
}

// result = a grad + b[row] v
template <bool kPastCaches, typename T>
WGAN_EXT_INLINE void add_outer(const T* grad, T a, T b, const T* v, int64_t n, T* result) {
  using V = Vec<T>;
  const V va = V::fill(a), vb = V::fill(b);
  int64_t i = 0;
  for (; i + V::size <= n; i += V::size) {
    const V sum = fma(vb, V::load(v + i), grad ? va * V::load(grad + i) : V::zero());
    if constexpr (kPastCaches)
      sum.stream(result + i);
    else
      sum.store(result + i);
  }
  for (; i < n; ++i) result[i] = b * v[i] + (grad ? a * grad[i] : T{0});
}

template <typename T>
void backward(const T* grad, const T* grad_sigma, const T* weight, Shape shape, const T* u, const T* v, const T* sigma,
              Target target, T* grad_weight, T* scratch, Stream stream) {
  if (is_transposed(shape)) {
    backward(grad, grad_sigma, weight, by_rows(shape), v, u, sigma, target, grad_weight, scratch, stream);
    return;
  }
  shape = by_rows(shape);
  const double inverse = 1 / divisor(target, *sigma);
  double coefficient = grad_sigma ? *grad_sigma : 0;
  const Pass<T> pass{weight, shape};
  if (grad && is_active(target, *sigma)) {
    const Cut cut(ceil_div(elements(shape), 4096), 4096);
    parallel_for(cut.pieces, pass.turn(), [&](int64_t piece) {
      const int64_t begin = cut.begin(piece) * 4096, end = least(cut.end(piece) * 4096, elements(shape));
      scratch[piece] = static_cast<T>(dot(grad + begin, weight + begin, end - begin) * inverse);
    });
    double total = 0;
    for (int64_t piece = 0; piece < cut.pieces; ++piece) total += scratch[piece];
    coefficient -= total * inverse / target.norm;
  }
  const T a = static_cast<T>(inverse);
  if (narrow(shape)) {
    const Slab<T> run(shape);
    T* spread_u = scratch;
    spread(u, shape, spread_u);
    multiply(spread_u, pass.slab(), static_cast<T>(coefficient), spread_u);
    const Cut cut = pass.by_slab();
    parallel_for(cut.pieces, pass.turn(), [&](int64_t piece) {
      for (int64_t o = cut.begin(piece); o < cut.end(piece); ++o)
        slab_outer(grad ? grad + o * pass.slab() : nullptr, a, run, spread_u, v + o * shape.inner,
                   grad_weight + o * pass.slab());
    });
    return;
  }
  const bool past = past_caches<T>(elements(shape)) && shape.inner % Vec<T>::size == 0;
  const Cut cut(shape.outer * shape.rows, shape.inner);
  parallel_for(cut.pieces, pass.turn(), [&](int64_t piece) {
    for (int64_t row = cut.begin(piece); row < cut.end(piece); ++row) {
      const T b = static_cast<T>(coefficient * u[row % shape.rows]);
      const T* g = grad ? grad + row * shape.inner : nullptr;
      const T* v_row = v + row / shape.rows * shape.inner;
      if (past)
        add_outer<true>(g, a, b, v_row, shape.inner, grad_weight + row * shape.inner);
      else
        add_outer<false>(g, a, b, v_row, shape.inner, grad_weight + row * shape.inner);
    }
    if (past) finish_streams();
  });
}

template <typename T>
constexpr Kernels<T> kTable{&scratch<T>, &normalize<T>, &backward<T>};

}  // namespace

template <>
const Kernels<float>& table<float>() {
  return kTable<float>;
}
template <>
const Kernels<double>& table<double>() {
  return kTable<double>;
}

}  // namespace wgan_ext::spectral::WGAN_EXT_LEVEL
