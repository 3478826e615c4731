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

// A matrix of any strides; T may be const.
template <typename T>
struct Matrix {
  T* data;
  int64_t row, column;

  WGAN_EXT_INLINE T* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
  WGAN_EXT_INLINE Matrix from(int64_t i, int64_t j) const { return {at(i, j), row, column}; }
  WGAN_EXT_INLINE Matrix transposed() const { return {data, column, row}; }
};

// A product keeps tiles of c, kTileRows by kPanel, in registers over a stretch of k, kDepth at most. The columns of b
// that a tile needs, a panel, lie in rows of whole registers: b's own, or copies where b is transposed or ends.
constexpr int kTileRows = WGAN_EXT_VECTOR_BYTES == 64 ? 8 : 4;
template <typename T>
constexpr int64_t kPanel = 2 * Vec<T>::size;
constexpr int64_t kDepth = 256;
constexpr int64_t kNarrow = 4;  // columns of c that are not worth a panel

// c, of some rows and columns, = a b, or c + a b where add; b's rows are whole registers.
template <typename T, int rows, int registers>
WGAN_EXT_INLINE void tile(Matrix<const T> a, Matrix<const T> b, Matrix<T> c, int64_t columns, int64_t depth, bool add) {
  constexpr int64_t size = Vec<T>::size;
  Vec<T> sums[rows][registers];
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < registers; ++j) sums[i][j] = Vec<T>::zero();
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> right[registers];
    for (int j = 0; j < registers; ++j) right[j] = Vec<T>::load(b.data + k * b.row + j * size);
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < registers; ++j) sums[i][j].value += *a.at(i, k) * right[j].value;
  }
  if (columns == registers * size && c.column == 1) {
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < registers; ++j) {
        T* out = c.at(i, j * size);
        (add ? Vec<T>::load(out) + sums[i][j] : sums[i][j]).store(out);
      }
  } else {
    T out[rows][registers * size];
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < registers; ++j) sums[i][j].store(out[i] + j * size);
    for (int i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) *c.at(i, j) = add ? *c.at(i, j) + out[i][j] : out[i][j];
  }
}

// The same for any number of rows, by ever smaller tiles.
template <typename T, int rows, int registers>
void tiles(Matrix<const T> a, Matrix<const T> b, Matrix<T> c, int64_t m, int64_t columns, int64_t depth, bool add) {
  int64_t i = 0;
  for (; i + rows <= m; i += rows) tile<T, rows, registers>(a.from(i, 0), b, c.from(i, 0), columns, depth, add);
  if constexpr (rows > 1)
    if (i < m) tiles<T, rows / 2, registers>(a.from(i, 0), b, c.from(i, 0), m - i, columns, depth, add);
}

// panel [depth, width] = b [depth, columns], with zeros beyond.
template <typename T>
void pack(Matrix<const T> b, int64_t columns, int64_t depth, T* panel, int64_t width) {
  int64_t j = 0;
  for (; j + 4 <= columns; j += 4)
    for (int64_t k = 0; k < depth; ++k) {
      T* out = panel + k * width + j;
      out[0] = *b.at(k, j);
      out[1] = *b.at(k, j + 1);
      out[2] = *b.at(k, j + 2);
      out[3] = *b.at(k, j + 3);
    }
  for (; j < width; ++j)
    for (int64_t k = 0; k < depth; ++k) panel[k * width + j] = j < columns ? *b.at(k, j) : T(0);
}

// c = a b, or c + a b.
template <typename T>
void product_by_tiles(Matrix<const T> a, Matrix<const T> b, Matrix<T> c, bool add, int64_t m, int64_t n, int64_t k) {
  T panel[kDepth * kPanel<T>];
  for (int64_t begin = 0; begin == 0 || begin < k; begin += kDepth) {
    const int64_t depth = least(kDepth, k - begin);
    const bool onto = add || begin > 0;
    for (int64_t column = 0; column < n; column += kPanel<T>) {
      const int64_t columns = least(kPanel<T>, n - column);
      const int64_t width = columns <= Vec<T>::size ? Vec<T>::size : kPanel<T>;
      Matrix<const T> right = b.from(begin, column);
      if (b.column != 1 || columns < width) {
        pack(right, columns, depth, panel, width);
        right = {panel, width, 1};
      }
      if (width == kPanel<T>)
        tiles<T, kTileRows, 2>(a.from(0, begin), right, c.from(0, column), m, columns, depth, onto);
      else
        tiles<T, kTileRows, 1>(a.from(0, begin), right, c.from(0, column), m, columns, depth, onto);
    }
  }
}

// The dot products of `rows` rows of a with one vector, of n elements each.
template <typename T, int rows>
void dots(const T* a, int64_t a_row, const T* b, Matrix<T> c, bool add, int64_t n) {
  constexpr int64_t size = Vec<T>::size;
  Vec<T> sums[rows];
  for (int i = 0; i < rows; ++i) sums[i] = Vec<T>::zero();
  int64_t k = 0;
  for (; k + size <= n; k += size) {
    const Vec<T> right = Vec<T>::load(b + k);
    for (int i = 0; i < rows; ++i) sums[i] = fma(Vec<T>::load(a + i * a_row + k), right, sums[i]);
  }
  for (int i = 0; i < rows; ++i) {
    T total = sum(sums[i]);
    for (int64_t l = k; l < n; ++l) total += a[i * a_row + l] * b[l];
    *c.at(i, 0) = add ? *c.at(i, 0) + total : total;
  }
}

// c = a b, or c + a b, for few columns, by dot products; the rows of a are contiguous.
template <typename T>
void product_by_dots(Matrix<const T> a, Matrix<const T> b, Matrix<T> c, bool add, int64_t m, int64_t n, int64_t k) {
  T copy[kDepth];
  for (int64_t begin = 0; begin == 0 || begin < k; begin += kDepth) {
    const int64_t depth = least(kDepth, k - begin);
    const bool onto = add || begin > 0;
    for (int64_t j = 0; j < n; ++j) {
      const T* right = b.at(begin, j);
      if (b.row != 1) {
        for (int64_t l = 0; l < depth; ++l) copy[l] = *b.at(begin + l, j);
        right = copy;
      }
      int64_t i = 0;
      for (; i + 4 <= m; i += 4) dots<T, 4>(a.at(i, begin), a.row, right, c.from(i, j), onto, depth);
      for (; i < m; ++i) dots<T, 1>(a.at(i, begin), a.row, right, c.from(i, j), onto, depth);
    }
  }
}

template <typename T>
void product(const T* a, bool a_transposed, const T* b, bool b_transposed, T* c, bool add, int64_t m, int64_t n,
             int64_t k) {
  static constexpr T one = 1;
  const Matrix<const T> left =
      a ? Matrix<const T>{a, a_transposed ? 1 : k, a_transposed ? m : 1} : Matrix<const T>{&one, 0, 0};
  const Matrix<const T> right = {b, b_transposed ? 1 : n, b_transposed ? k : 1};
  const Matrix<T> out = {c, n, 1};
  if (n > kNarrow)
    product_by_tiles(left, right, out, add, m, n, k);
  else if (a_transposed || !a)
    product_by_tiles(right.transposed(), left.transposed(), out.transposed(), add, n, m, k);
  else
    product_by_dots(left, right, out, add, m, n, k);
}

// On AVX-512 MKL on two threads takes as long at 192 x 64 x 64 and less at 256 x 128 x 128; the other levels are slower
// by what their registers hold less.
constexpr int64_t kSmall = WGAN_EXT_VECTOR_BYTES == 64 ? 1 << 20 : WGAN_EXT_VECTOR_BYTES == 32 ? 1 << 19 : 1 << 16;

}  // namespace

template <>
const Kernels<float>& table<float>() {
  static constexpr Kernels<float> kernels{activate<float>, mask<float>,    norms<float>,
                                          penalty<float>,  product<float>, kSmall};
  return kernels;
}

template <>
const Kernels<double>& table<double>() {
  static constexpr Kernels<double> kernels{activate<double>, mask<double>,    norms<double>,
                                           penalty<double>,  product<double>, kSmall};
  return kernels;
}

}  // namespace wgan_ext::critic::WGAN_EXT_LEVEL
