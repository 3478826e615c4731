// Activations, masks, norms and penalties on the CPU: one pass over memory each, 8 or 16 elements and their signs at a
// time.
#include "../parallel.h"
#include "kernels.h"
// last: see simd.h
#include "../simd.h"

namespace wgan_ext::critic::WGAN_EXT_LEVEL {

using namespace wgan_ext::WGAN_EXT_LEVEL;

namespace {

constexpr int64_t kTile = 1 << 14;  // elements that one task takes, at most, unless a single row is shared out

template <typename T>
using Lanes = typename Vec<T>::Register;

// Integers as wide as T.
template <typename T>
struct Bits {
  typedef int32_t Lane;
};
template <>
struct Bits<double> {
  typedef int64_t Lane;
};

// Bit i of the result says that lane i is positive, or NaN.
template <typename T>
WGAN_EXT_INLINE uint32_t positive(Vec<T> a) {
  constexpr bool single = sizeof(T) == 4;
#if defined(WGAN_EXT_LEVEL_AVX512)
  if constexpr (single)
    return _mm512_cmp_ps_mask(__m512(a.value), _mm512_setzero_ps(), _CMP_NLE_UQ);
  else
    return _mm512_cmp_pd_mask(__m512d(a.value), _mm512_setzero_pd(), _CMP_NLE_UQ);
#else
  const auto set = ~(a.value <= Lanes<T>{});
#if defined(WGAN_EXT_LEVEL_AVX2)
  if constexpr (single)
    return _mm256_movemask_ps(__m256(set));
  else
    return _mm256_movemask_pd(__m256d(set));
#elif defined(__x86_64__)
  if constexpr (single)
    return _mm_movemask_ps(__m128(set));
  else
    return _mm_movemask_pd(__m128d(set));
#else
  uint32_t bits = 0;
  for (int64_t i = 0; i < Vec<T>::size; ++i) bits |= uint32_t(set[i] & 1) << i;
  return bits;
#endif
#endif
}

// Lane i is a's where bit i is set, b's elsewhere; higher bits are ignored.
template <typename T>
WGAN_EXT_INLINE Vec<T> select(uint32_t bits, Vec<T> a, Vec<T> b) {
#if defined(WGAN_EXT_LEVEL_AVX512)
  if constexpr (sizeof(T) == 4)
    return {Lanes<T>(_mm512_mask_blend_ps(__mmask16(bits), __m512(b.value), __m512(a.value)))};
  else
    return {Lanes<T>(_mm512_mask_blend_pd(__mmask8(bits), __m512d(b.value), __m512d(a.value)))};
#else
  typedef typename Bits<T>::Lane Lane;
  typedef Lane Register __attribute__((vector_size(WGAN_EXT_VECTOR_BYTES)));
  Register lane;
  for (int64_t i = 0; i < Vec<T>::size; ++i) lane[i] = Lane(1) << i;
  const Register set = ((Register{} + Lane(bits)) & lane) != 0;
  return {set ? a.value : b.value};
#endif
}

// Elements that make whole bytes of signs and whole registers.
template <typename T>
constexpr int64_t kGroup = Vec<T>::size < 8 ? 8 : Vec<T>::size;

template <typename T, bool relu>
WGAN_EXT_INLINE Vec<T> pass(uint32_t bits, Vec<T> a, Vec<T> slope) {
  return select(bits, a, relu ? Vec<T>::zero() : a * slope);
}

template <typename T, bool relu>
WGAN_EXT_INLINE T pass(bool set, T a, T slope) {
  return set ? a : relu ? T(0) : a * slope;
}

// Columns [0, n) of one row; n is a multiple of 8 except at the end of a row.
template <typename T, bool relu>
void activate_row(const T* z, const T* bias, T slope, T* h, uint8_t* signs, int64_t n) {
  const Vec<T> slopes = Vec<T>::fill(slope);
  int64_t i = 0;
  for (; i + kGroup<T> <= n; i += kGroup<T>) {
    uint32_t bits = 0;
    for (int64_t j = 0; j < kGroup<T>; j += Vec<T>::size) {
      Vec<T> a = Vec<T>::load(z + i + j);
      if (bias) a = a + Vec<T>::load(bias + i + j);
      const uint32_t part = positive(a);
      if (h) pass<T, relu>(part, a, slopes).store(h + i + j);
      bits |= part << j;
    }
    std::memcpy(signs + i / 8, &bits, kGroup<T> / 8);
  }
  for (; i < n; i += 8) {
    uint8_t byte = 0;
    for (int64_t j = 0; j < least<int64_t>(8, n - i); ++j) {
      const T a = bias ? z[i + j] + bias[i + j] : z[i + j];
      const bool set = !(a <= 0);
      if (h) h[i + j] = pass<T, relu>(set, a, slope);
      byte |= uint8_t(set) << j;
    }
    signs[i / 8] = byte;
  }
}

template <typename T, bool relu>
void mask_row(const T* in, const uint8_t* signs, T slope, T* out, int64_t n) {
  const Vec<T> slopes = Vec<T>::fill(slope);
  int64_t i = 0;
  for (; i + kGroup<T> <= n; i += kGroup<T>) {
    uint32_t bits = 0;
    std::memcpy(&bits, signs + i / 8, kGroup<T> / 8);
    for (int64_t j = 0; j < kGroup<T>; j += Vec<T>::size)
      pass<T, relu>(bits >> j, Vec<T>::load(in + i + j), slopes).store(out + i + j);
  }
  for (; i < n; ++i) out[i] = pass<T, relu>(signs[i / 8] >> (i % 8) & 1, in[i], slope);
}

// Calls body(row, first, last) for pieces of rows that cover the matrix: whole rows, or tiles of a long one.
template <typename Body>
void for_pieces(int64_t rows, int64_t columns, const Body& body) {
  if (columns >= kTile) {
    const int64_t tiles = ceil_div(columns, kTile);
    parallel_for(rows * tiles, [&](int64_t task) {
      const int64_t first = task % tiles * kTile;
      body(task / tiles, first, least(first + kTile, columns));
    });
  } else {
    const int64_t share = kTile / greatest<int64_t>(columns, 1);
    parallel_for(ceil_div(rows, share), [&](int64_t task) {
      for (int64_t row = task * share; row < least((task + 1) * share, rows); ++row) body(row, 0, columns);
    });
  }
}

template <typename T, bool relu>
void activate_all(const T* z, const T* bias, T slope, T* h, uint8_t* signs, int64_t rows, int64_t columns) {
  for_pieces(rows, columns, [=](int64_t row, int64_t first, int64_t last) {
    const int64_t at = row * columns + first;
    activate_row<T, relu>(z + at, bias ? bias + first : nullptr, slope, h ? h + at : nullptr,
                          signs + row * ceil_div(columns, 8) + first / 8, last - first);
  });
}

template <typename T>
void activate(const T* z, const T* bias, double slope, T* h, uint8_t* signs, int64_t rows, int64_t columns, Stream) {
  if (slope == 0)
    activate_all<T, true>(z, bias, T(0), h, signs, rows, columns);
  else
    activate_all<T, false>(z, bias, T(slope), h, signs, rows, columns);
}

template <typename T, bool relu>
void mask_all(const T* in, int64_t in_rows, const uint8_t* signs, T slope, T* out, int64_t rows, int64_t columns) {
  for_pieces(rows, columns, [=](int64_t row, int64_t first, int64_t last) {
    mask_row<T, relu>(in + row % in_rows * columns + first, signs + row * ceil_div(columns, 8) + first / 8, slope,
                      out + row * columns + first, last - first);
  });
}

template <typename T>
void mask(const T* in, int64_t in_rows, const uint8_t* signs, double slope, T* out, int64_t rows, int64_t columns,
          Stream) {
  if (slope == 0)
    mask_all<T, true>(in, in_rows, signs, T(0), out, rows, columns);
  else
    mask_all<T, false>(in, in_rows, signs, T(slope), out, rows, columns);
}

// The sum of (x / scale)^2, in double.
template <typename T>
double sum_of_squares(const T* x, int64_t n, double scale) {
  typedef T Part __attribute__((vector_size(Vec<double>::size * sizeof(T))));
  const Vec<double> scales = Vec<double>::fill(scale);
  Vec<double> total = Vec<double>::zero();
  int64_t i = 0;
  for (; i + Vec<double>::size <= n; i += Vec<double>::size) {
    Part part;
    std::memcpy(&part, x + i, sizeof part);
    Vec<double> a = {__builtin_convertvector(part, typename Vec<double>::Register)};
    if (sizeof(T) == 8) a = a / scales;
    total = fma(a, a, total);
  }
  double result = sum(total);
  for (; i < n; ++i) result += (double(x[i]) / scale) * (double(x[i]) / scale);
  return result;
}

template <typename T>
void norms(const T* in, T* norms, int64_t rows, int64_t columns, Stream) {
  const int64_t share = greatest<int64_t>(kTile / greatest<int64_t>(columns, 1), 1);
  parallel_for(ceil_div(rows, share), [=](int64_t task) {
    for (int64_t row = task * share; row < least((task + 1) * share, rows); ++row) {
      const T* x = in + row * columns;
      double largest = 0;
      for (int64_t i = 0; sizeof(T) == 8 && i < columns; ++i) largest = greatest<double>(largest, __builtin_fabs(x[i]));
      const double scale = norm_scale<T>(largest);
      norms[row] = T(scale * __builtin_sqrt(sum_of_squares(x, columns, scale)));
    }
  });
}

template <typename T>
void penalty(const T* norms, int64_t count, Penalty penalty, double weight, T* value, T* loss, T* slopes, Stream) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) {
    total += penalty.value(norms[i]);
    if (slopes) slopes[i] = T(weight / double(count) * penalty.slope<T>(norms[i]));
  }
  *value = T(total / double(count));
  *loss = T(weight * (total / double(count)));
}

}  // namespace

template <>
const Kernels<float>& table<float>() {
  static constexpr Kernels<float> kernels{activate<float>, mask<float>, norms<float>, penalty<float>};
  return kernels;
}

template <>
const Kernels<double>& table<double>() {
  static constexpr Kernels<double> kernels{activate<double>, mask<double>, norms<double>, penalty<double>};
  return kernels;
}

}  // namespace wgan_ext::critic::WGAN_EXT_LEVEL
