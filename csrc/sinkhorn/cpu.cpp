// Sinkhorn on the CPU.
//
// A pass computes, for a tile of kRows rows and a panel of two vectors of columns, the exponents in registers (the dot
// product starts from the bias), their exp2, and the row sums; nothing of size N x M is stored. Panels are kept packed
// [dim][panel]; a block of panels stays in the second-level cache while the tiles of a chunk of rows pass over it.
// Exponents are in base 2, and shifted by the row's previous softmin, which bounds them (solve.h), so that no running
// maximum is needed; a row whose sum still leaves the range of T is done again with one.
//
// Where the clouds have boxes, a pass with plain sums leaves out the tiles of columns that are too far from a tile of
// rows; what they could add is summed up too, and a row against whose sum that is not rounding is done again with all.
//
// Where the costs lie in memory as a matrix, a tile reads its rows of it. The pass over the matrix's columns reads it
// in the same order and adds to one sum a column, of which each chunk of rows has its own.
#include "../parallel.h"
#include "kernels.h"

namespace wgan_ext::sinkhorn::WGAN_EXT_LEVEL {
using namespace wgan_ext::WGAN_EXT_LEVEL;
namespace {

constexpr int kRows = WGAN_EXT_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int64_t kLeastChunk = 64, kMostChunk = 1024;  // rows
constexpr int64_t kBlockBytes = 128 * 1024;             // of panels
constexpr int64_t kVectorChunk = 8192;                  // elements of an elementwise loop
constexpr int64_t kMostStrips = 32;                     // parts of a matrix's rows
constexpr int64_t kStripColumns = 4096;                 // whose sums stay in the first-level cache
constexpr int64_t kHeldDims = 128;                      // of a plan's product, whose sums stay on the stack
constexpr int64_t kLeastProductDim = 16;                // from here on a gradient may be the plan's product with points
constexpr int64_t kLeastCachedDim = 16;                 // from here on reading a cost is cheaper than computing it

template <typename T>
constexpr int64_t kPanel = 2 * Vec<T>::size;

// A row sum outside is done again: below, terms lost to underflow could matter; above, it has overflowed.
template <typename T>
constexpr T kLeastSum = sizeof(T) == 4 ? T(1e-30) : T(1e-290);
template <typename T>
constexpr T kMostSum = sizeof(T) == 4 ? T(3e38) : T(1e308);

// What all tiles left out may add to a row's sum, by which factor of it, and log2 of what one may add to a sum of 1.
template <typename T>
constexpr T kLeftOut = sizeof(T) == 4 ? T(0x1p-24) : T(0x1p-53);
template <typename T>
constexpr T kLeastExponent = sizeof(T) == 4 ? T(-31) : T(-60);
constexpr int64_t kBlockTiles = 2048;  // of columns, whose distances to a tile of rows stay on the stack

WGAN_EXT_INLINE int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <typename T>
int64_t padded(int64_t count) {
  return round_up(count, kPanel<T>);
}

template <typename T>
int64_t columns_size(int64_t count, int64_t dim) {
  return padded<T>(count) * dim;
}

// Rows of a chunk: enough work for a thread to be worth waking, cut by shape alone.
WGAN_EXT_INLINE int64_t chunk_rows(int64_t other_count, int64_t dim) {
  const int64_t rows = ceil_div(int64_t{1} << 19, other_count * (dim + 12));
  return round_up(greatest(kLeastChunk, least(rows, kMostChunk)), kRows);
}

// Rows of a strip of a matrix, for the sums over its columns.
WGAN_EXT_INLINE int64_t strip_rows(int64_t row_count) {
  return round_up(greatest(kLeastChunk, ceil_div(row_count, kMostStrips)), kRows);
}

int64_t sums_size(int64_t count, int64_t other_count, int64_t dim, Cost) {
  return ceil_div(count, chunk_rows(other_count, dim));
}

template <typename T>
int64_t scratch_size(int64_t count, int64_t dim, int64_t other_count, Cost cost) {
  return cost == Cost::matrix ? 2 * ceil_div(other_count, strip_rows(other_count)) * padded<T>(count)
                              : round_up(count, kRows) * dim;
}

bool caches(int64_t, int64_t, int64_t dim, Cost) { return dim >= kLeastCachedDim; }

template <Cost cost>
struct Constant {
  static constexpr Cost value = cost;
};

// Calls body with the cost as a constant of its type.
template <typename Body>
WGAN_EXT_INLINE void with_cost(Cost cost, const Body& body) {
  switch (cost) {
    case Cost::sqeuclidean:
      return body(Constant<Cost::sqeuclidean>{});
    case Cost::euclidean:
      return body(Constant<Cost::euclidean>{});
    case Cost::manhattan:
      return body(Constant<Cost::manhattan>{});
    case Cost::power:
      return body(Constant<Cost::power>{});
    case Cost::matrix:
      return body(Constant<Cost::matrix>{});
  }
}

template <int D>
struct Dim {
  static constexpr int value = D;
};

// Calls body with the dimension as a constant of its type, where a kernel for it alone is worth its size, else 0.
template <typename Body>
WGAN_EXT_INLINE void with_dim(int64_t dim, const Body& body) {
  switch (dim) {
    case 1:
      return body(Dim<1>{});
    case 2:
      return body(Dim<2>{});
    case 3:
      return body(Dim<3>{});
    default:
      return body(Dim<0>{});
  }
}

// Calls body(problem, chunk) for each.
template <typename Body>
void each_chunk(int64_t problems, int64_t chunks, const Body& body) {
  parallel_for(problems * chunks, [&](int64_t k) { body(k / chunks, k % chunks); });
}

template <typename T>
void pack(const T* points, const int64_t* offsets, int64_t most, int64_t dim, int64_t problems, T* columns, Stream) {
  const int64_t most_panels = ceil_div(most, kPanel<T>);
  const int64_t per_chunk = greatest(int64_t{1}, kVectorChunk / (dim * kPanel<T>));
  each_chunk(problems, ceil_div(most_panels, per_chunk), [&](int64_t problem, int64_t chunk) {
    const int64_t first = offsets ? offsets[problem] : problem * most;
    const int64_t count = offsets ? offsets[problem + 1] - first : most, panels = ceil_div(count, kPanel<T>);
    const T* from = points + first * dim;
    T* to = columns + (offsets ? first_of_padded(first, problem, kPanel<T>) : problem * padded<T>(most)) * dim;
    for (int64_t p = chunk * per_chunk; p < least((chunk + 1) * per_chunk, panels); ++p) {
      T* panel = to + p * kPanel<T> * dim;
      for (int64_t k = 0; k < kPanel<T>; ++k) {
        const int64_t j = p * kPanel<T> + k;
        for (int64_t d = 0; d < dim; ++d) panel[d * kPanel<T> + k] = j < count ? from[j * dim + d] : T(0);
      }
    }
  });
}

// Rows [begin, end) times scale, tiles of kRows laid out [dim][kRows]; rows past the end are 0.
template <typename T>
WGAN_EXT_INLINE void interleave(const T* points, int64_t begin, int64_t end, int64_t dim, T scale, T* tiles) {
  for (int64_t i = begin; i < round_up(end, kRows); ++i)
    for (int64_t d = 0; d < dim; ++d)
      tiles[(i / kRows * dim + d) * kRows + i % kRows] = i < end ? scale * points[i * dim + d] : T(0);
}

WGAN_EXT_INLINE float log2_of(float x) { return __builtin_log2f(x); }
WGAN_EXT_INLINE double log2_of(double x) { return __builtin_log2(x); }

template <typename T>
WGAN_EXT_INLINE Vec<T> magnitude(Vec<T> a) {
  return greatest(a, Vec<T>::zero() - a);
}

// x^power for x > 0; 0 at 0, and below the least normal number the power of that. NaN stays.
template <typename T>
WGAN_EXT_INLINE Vec<T> raise(Vec<T> x, T power) {
  const Vec<T> least_normal = Vec<T>::fill(sizeof(T) == 4 ? T(0x1p-126) : T(0x1p-1022));
  const Vec<T> raised = exp2(log2(greatest(x, least_normal)) * Vec<T>::fill(power));
  return {x.value > 0 ? raised.value : x.value};
}

// What the loops over tiles need of a pass.
template <typename T>
struct Pass {
  const T* tiles;
  const T* columns;
  const T* bias;
  const T* matrix;  // [row_count, column_count]
  int64_t row_count, column_count;
  int64_t padded_count;  // of columns
  int64_t dim;
  T scale;  // log2(e) / epsilon
  T power;
};

// What a tile of rows times (2 scale, for the squared cost) has to do with a panel: the dot products or the costs,
// added to s. D is dim where it is known when compiling, else 0.
template <Cost cost, int D, typename T>
WGAN_EXT_INLINE void accumulate(const T* tile, const T* panel, int64_t dim, T power, Vec<T> (&s)[kRows][2]) {
  constexpr int64_t size = Vec<T>::size;
  const int64_t n = D ? D : dim;
#pragma GCC unroll 3
  for (int64_t d = 0; d < n; ++d) {
    const Vec<T> y0 = Vec<T>::load(panel + d * 2 * size), y1 = Vec<T>::load(panel + d * 2 * size + size);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> x = Vec<T>::fill(tile[d * kRows + r]);
      if constexpr (cost == Cost::sqeuclidean) {
        s[r][0] = fma(x, y0, s[r][0]);
        s[r][1] = fma(x, y1, s[r][1]);
      } else if constexpr (cost == Cost::manhattan) {
        s[r][0] = s[r][0] + magnitude(x - y0);
        s[r][1] = s[r][1] + magnitude(x - y1);
      } else {
        const Vec<T> z0 = x - y0, z1 = x - y1;
        s[r][0] = fma(z0, z0, s[r][0]);
        s[r][1] = fma(z1, z1, s[r][1]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 2; ++v) {
      if constexpr (cost == Cost::euclidean) s[r][v] = sqrt(s[r][v]);
      if constexpr (cost == Cost::power) s[r][v] = raise(s[r][v], power / 2);
    }
}

// The exponents of the tile at row i against the panel at column j.
template <Cost cost, int D, typename T>
WGAN_EXT_INLINE void exponents(const Pass<T>& pass, int64_t i, int64_t j, const T* shift, Vec<T> (&s)[kRows][2]) {
  constexpr int64_t size = Vec<T>::size;
  const Vec<T> bias[2] = {Vec<T>::load(pass.bias + j), Vec<T>::load(pass.bias + j + size)};
  const Vec<T> minus = Vec<T>::fill(-pass.scale);
  if constexpr (cost == Cost::matrix) {
    const bool whole = j + 2 * size <= pass.column_count;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const T* costs = pass.matrix + least(i + r, pass.row_count - 1) * pass.column_count + j;
      const Vec<T> row = Vec<T>::fill(shift[r]);
      for (int v = 0; v < 2; ++v) {
        const int64_t n = greatest(int64_t{0}, least(size, pass.column_count - j - v * size));
        const Vec<T> c = whole ? Vec<T>::load(costs + v * size) : Vec<T>::load(costs + v * size, n);
        s[r][v] = fma(c, minus, bias[v] + row);
      }
    }
  } else {
    const int64_t dim = D ? D : pass.dim;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < 2; ++v)
        s[r][v] = cost == Cost::sqeuclidean ? bias[v] + Vec<T>::fill(shift[r]) : Vec<T>::zero();
    accumulate<cost, D>(pass.tiles + i * dim, pass.columns + j * dim, dim, pass.power, s);
    if constexpr (cost != Cost::sqeuclidean) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < 2; ++v) s[r][v] = fma(s[r][v], minus, bias[v] + Vec<T>::fill(shift[r]));
    }
  }
}

// The columns against which a tile of rows is summed: runs of whole tiles, out of a block of them.
struct Kept {
  int32_t runs;
  int32_t from[kBlockTiles], to[kBlockTiles];  // tiles
};

// The greatest value(i) of i in [begin, end), kLogZero of none; NaN if one is, which is below and above nothing.
template <typename T, typename Value>
WGAN_EXT_INLINE T greatest_of(int64_t begin, int64_t end, const Value& value) {
  T top = T(kLogZero);
  for (int64_t i = begin; i < end; ++i) {
    const T v = value(i);
    top = v <= top ? top : v;
    if (!(v == v)) break;
  }
  return top;
}

// The greatest exponent of the tiles of columns, but for distance; the number of columns is in it.
template <typename T>
void set_tops(const Cloud<T>& columns, T scale) {
  const int64_t stride = box_stride(columns.count);
  T* tops = columns.boxes + 2 * columns.dim * stride;
  constexpr int64_t per_chunk = kVectorChunk / kTile;
  parallel_for(ceil_div(stride, per_chunk), [&](int64_t chunk) {
    for (int64_t tile = chunk * per_chunk; tile < least((chunk + 1) * per_chunk, stride); ++tile) {
      const T top = greatest_of<T>(tile * kTile, least((tile + 1) * kTile, columns.count),
                                   [&](int64_t j) { return columns.bias[j] + scale * columns.aligned[j]; });
      tops[tile] = top + 5;  // log2 kTile
    }
  });
}

// Which tiles of the block of columns [first, last) may add more than 2^kLeastExponent to a sum of rows of one tile,
// the greatest of whose exponents but for distance is `top`; adds what all others may.
template <Cost cost, typename T>
void keep(const Pass<T>& pass, const Cloud<T>& rows, const Cloud<T>& columns, int64_t tile, T top, int64_t first,
          int64_t last, Kept& kept, T& left_out) {
  static_assert(kTile == 32);
  constexpr int64_t size = Vec<T>::size;
  const int64_t dim = rows.dim, row_stride = box_stride(rows.count), stride = box_stride(columns.count);
  const Vec<T> zero = Vec<T>::zero(), minus = Vec<T>::fill(-pass.scale), level = Vec<T>::fill(top);
  const Vec<T> least_exponent = Vec<T>::fill(kLeastExponent<T>);
  Vec<T> others = zero;
  int32_t runs = 0, end = -1;  // of the last run
  for (int64_t j = first; j < last; j += size) {
    Vec<T> distance = zero;
    for (int64_t d = 0; d < dim; ++d) {
      const Vec<T> middle = Vec<T>::fill(rows.boxes[d * row_stride + tile]),
                   half = Vec<T>::fill(rows.boxes[(dim + d) * row_stride + tile]);
      const Vec<T> gap = greatest(zero, magnitude(middle - Vec<T>::load(columns.boxes + d * stride + j)) -
                                            (half + Vec<T>::load(columns.boxes + (dim + d) * stride + j)));
      distance = cost == Cost::manhattan ? distance + gap : fma(gap, gap, distance);
    }
    if constexpr (cost == Cost::euclidean) distance = sqrt(distance);
    if constexpr (cost == Cost::power) distance = raise(distance, pass.power / 2);
    const Vec<T> exponent = fma(distance, minus, level + Vec<T>::load(columns.boxes + 2 * dim * stride + j));
    const auto far = exponent.value <= least_exponent.value;  // NaN is not
    others = others + Vec<T>{far ? exp2(exponent).value : zero.value};
    T near[size];
    Vec<T>{far ? zero.value : Vec<T>::fill(1).value}.store(near);
    if (sum(Vec<T>::load(near)) == 0) continue;
    for (int64_t k = 0; k < size; ++k) {
      if (near[k] == 0) continue;
      const int32_t at = static_cast<int32_t>(j - first + k);
      if (at != end) kept.from[runs++] = at;
      end = at + 1;
      kept.to[runs - 1] = end;
    }
  }
  kept.runs = runs;
  left_out += sum(others);
}

// The same where nothing is left out.
WGAN_EXT_INLINE void keep_all(int64_t tiles, Kept& kept) {
  kept.runs = 1;
  kept.from[0] = 0;
  kept.to[0] = static_cast<int32_t>(tiles);
}

// total[i - begin] = sum_j 2^exponent, rows [begin, end) of whole tiles of rows; left_out[(i - begin) / kTile] is what
// the sums may lack.
template <Cost cost, int D, typename T>
void pruned_sums(const Pass<T>& pass, const Cloud<T>& rows, const Cloud<T>& columns, int64_t begin, int64_t end,
                 const T* shift, T* total, T* left_out) {
  Kept kept;
  const int64_t tiles = box_stride(columns.count);
  for (int64_t i = begin; i < end; ++i) total[i - begin] = 0;
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t last = least(first + kTile, end);
    T lost = 0;
    const T top = greatest_of<T>(first, least(last, rows.count),
                                 [&](int64_t i) { return shift[i - begin] + pass.scale * rows.aligned[i]; });
    for (int64_t block = 0; block < tiles; block += kBlockTiles) {
      keep<cost>(pass, rows, columns, first / kTile, top, block, least(block + kBlockTiles, tiles), kept, lost);
      for (int64_t i = first; i < last; i += kRows) {
        Vec<T> row_sums[kRows];
        for (int r = 0; r < kRows; ++r) row_sums[r] = Vec<T>::zero();
        for (int32_t run = 0; run < kept.runs; ++run) {
          const int64_t to = least((block + kept.to[run]) * kTile, pass.padded_count);
          for (int64_t j = (block + kept.from[run]) * kTile; j < to; j += kPanel<T>) {
            Vec<T> s[kRows][2];
            exponents<cost, D>(pass, i, j, shift + (i - begin), s);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) row_sums[r] = row_sums[r] + (exp2(s[r][0]) + exp2(s[r][1]));
          }
        }
        for (int r = 0; r < kRows; ++r) total[i - begin + r] += sum(row_sums[r]);
      }
    }
    left_out[(first - begin) / kTile] = lost;
  }
}

// Whether the tiles can be told apart in a pass at this epsilon.
template <typename T>
WGAN_EXT_INLINE bool pruned(const Control& control, const Cloud<T>& rows, const Cloud<T>& columns) {
  return rows.boxes && columns.boxes &&
         worth_pruning(control.epsilon, control.facts.start_epsilon, least(rows.count, columns.count), rows.dim);
}

// total[i - begin] = sum_j 2^exponent, rows [begin, end) of whole tiles.
template <Cost cost, int D, typename T>
void plain_sums(const Pass<T>& pass, int64_t begin, int64_t end, const T* shift, T* total) {
  const int64_t dim = D ? D : pass.dim;
  const int64_t block =
      greatest(int64_t{1}, kBlockBytes / (greatest(dim, int64_t{1}) * kPanel<T> * static_cast<int64_t>(sizeof(T)))) *
      kPanel<T>;
  for (int64_t i = begin; i < end; ++i) total[i - begin] = 0;
  for (int64_t from = 0; from < pass.padded_count; from += block) {
    const int64_t to = least(from + block, pass.padded_count);
    for (int64_t i = begin; i < end; i += kRows) {
      Vec<T> row_sums[kRows];
      for (int r = 0; r < kRows; ++r) row_sums[r] = Vec<T>::zero();
      for (int64_t j = from; j < to; j += kPanel<T>) {
        Vec<T> s[kRows][2];
        exponents<cost, D>(pass, i, j, shift + (i - begin), s);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) row_sums[r] = row_sums[r] + (exp2(s[r][0]) + exp2(s[r][1]));
      }
      for (int r = 0; r < kRows; ++r) total[i - begin + r] += sum(row_sums[r]);
    }
  }
}

// level[i - begin] = log2 sum_j 2^exponent with a running maximum in each lane: right whatever the exponents.
template <Cost cost, typename T>
void safe_levels(const Pass<T>& pass, int64_t begin, int64_t end, const T* shift, T* level) {
  for (int64_t i = begin; i < end; i += kRows) {
    Vec<T> most[kRows], row_sums[kRows];
    for (int r = 0; r < kRows; ++r) {
      most[r] = Vec<T>::fill(T(2 * kLogZero));
      row_sums[r] = Vec<T>::zero();
    }
    for (int64_t j = 0; j < pass.padded_count; j += kPanel<T>) {
      Vec<T> s[kRows][2];
      exponents<cost, 0>(pass, i, j, shift + (i - begin), s);
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> now = greatest(most[r], greatest(s[r][0], s[r][1]));
        row_sums[r] = fma(row_sums[r], exp2(most[r] - now), exp2(s[r][0] - now) + exp2(s[r][1] - now));
        most[r] = now;
      }
    }
    for (int r = 0; r < kRows; ++r) {
      T lanes[Vec<T>::size];
      most[r].store(lanes);
      T top = lanes[0];
      for (int64_t k = 1; k < Vec<T>::size; ++k) top = greatest(top, lanes[k]);
      level[i - begin + r] = top + log2_of(sum(row_sums[r] * exp2(most[r] - Vec<T>::fill(top))));
    }
  }
}

// The new softmin of rows [begin, end) and their sums, from levels relative to the old softmin.
template <typename T>
WGAN_EXT_INLINE Sums update_softmin(const Control& control, const Cloud<T>& rows, Role role, int64_t begin, int64_t end,
                                    const T* level) {
  const double rho = role == Role::columns ? control.options.column_rho : control.options.row_rho;
  const double lambda = damping(control, rho);
  const Vec<T> scale = Vec<T>::fill(T(kLog2e / control.epsilon)), one = Vec<T>::fill(1), zero = Vec<T>::zero();
  const Vec<T> unscale = Vec<T>::fill(T(control.epsilon * kLn2)), most_exponent = Vec<T>::fill(T(100));
  const Vec<T> minus_unit = Vec<T>::fill(T(-kLog2e / rho)), damped = Vec<T>::fill(T(lambda));
  const Vec<T> undamped_scale = Vec<T>::fill(T((1 - lambda) * kLog2e / control.epsilon));
  const Vec<T> relaxation = Vec<T>::fill(T(control.proposal)), ln2 = Vec<T>::fill(T(kLn2));
  const Vec<T> ratio = Vec<T>::fill(T(control.epsilon / rho));
  const bool relax = control.proposal != 1;
  const T* potential = control.restore ? rows.start : rows.potential;
  Vec<T> error = zero, relaxed = zero, mass = zero, gain = zero, change = zero, target = zero, relaxed_target = zero;
  for (int64_t i = begin; i < end; i += Vec<T>::size) {
    const int64_t n = least(Vec<T>::size, end - i);
    const bool whole = n == Vec<T>::size;
    const Vec<T> f = whole ? Vec<T>::load(potential + i) : Vec<T>::load(potential + i, n);
    const Vec<T> h = whole ? Vec<T>::load(rows.softmin + i) : Vec<T>::load(rows.softmin + i, n);
    const Vec<T> a = whole ? Vec<T>::load(rows.weights + i) : Vec<T>::load(rows.weights + i, n);
    const Vec<T> l = whole ? Vec<T>::load(level + (i - begin)) : Vec<T>::load(level + (i - begin), n);
    const Vec<T> fresh = h - l * unscale;
    if (whole)
      fresh.store(rows.softmin + i);
    else
      fresh.store(rows.softmin + i, n);
    // S of the potential itself; capped, for a weight of 0 makes no infinity vanish. NaN passes the cap.
    const Vec<T> log_s = least(most_exponent, fma(f - h, scale, l));
    const Vec<T> s = exp2(log_s), wanted = exp2(least(most_exponent, f * minus_unit)), best = fresh * damped;
    error = fma(a, magnitude(s - wanted), error);
    mass = fma(a, s, mass);
    target = fma(a, exp2(least(most_exponent, best * minus_unit)), target);
    const Vec<T> step = best - f, positive = {a.value > 0 ? step.value : zero.value};
    change = greatest(change, magnitude(positive));
    if (relax) {
      // log2 exp(delta), written so that nothing cancels where the marginal is hard
      const Vec<T> delta = (zero - relaxation) * fma(log_s, damped, f * undamped_scale);
      const Vec<T> left = exp2(least(most_exponent, log_s + delta)), z = delta * ln2 * ratio;
      const Vec<T> relaxed_wanted = exp2(least(most_exponent, fma(relaxation, step, f) * minus_unit));
      // rho / epsilon (T - T') = ln 2 delta T (1 - exp(-z)) / z
      const Vec<T> series =
          fma(z, fma(z, fma(z, Vec<T>::fill(T(-1. / 24)), Vec<T>::fill(T(1. / 6))), Vec<T>::fill(T(-0.5))), one);
      const Vec<T> large = (wanted - relaxed_wanted) / (z * wanted);
      const Vec<T> factor = {magnitude(z).value < T(0.05) ? series.value : large.value};
      relaxed = fma(a, magnitude(left - relaxed_wanted), relaxed);
      gain = fma(a, s - left + delta * ln2 * wanted * factor, gain);
      relaxed_target = fma(a, relaxed_wanted, relaxed_target);
    }
  }
  T most[Vec<T>::size];
  change.store(most);
  for (int64_t k = 1; k < Vec<T>::size; ++k) most[0] = greatest(most[0], most[k]);
  return {double(sum(error)),  double(sum(relaxed)),        double(sum(mass)), double(sum(gain)),
          double(sum(target)), double(sum(relaxed_target)), double(most[0])};
}

template <typename T>
WGAN_EXT_INLINE Pass<T> make_pass(double epsilon, const Cloud<T>& rows, const Cloud<T>& columns,
                                  const Ground<T>& ground) {
  return {rows.scratch,  columns.columns, columns.bias, ground.matrix,       rows.count,
          columns.count, columns.padded,  rows.dim,     T(kLog2e / epsilon), ground.power};
}

// The problem's own matrix.
template <typename T>
WGAN_EXT_INLINE Ground<T> of_problem(Ground<T> ground, int64_t problem, int64_t pairs) {
  if (ground.matrix) ground.matrix += problem * pairs;
  return ground;
}

template <Cost cost, typename T>
void pass_chunk(const Control& control, const Cloud<T>& rows, const Cloud<T>& columns, const Ground<T>& ground,
                Role role, int64_t begin, int64_t end, Sums* sums) {
  const FlushSubnormals flush;
  const Pass<T> pass = make_pass(control.epsilon, rows, columns, ground);
  if constexpr (cost != Cost::matrix)
    interleave(rows.points, begin, end, rows.dim, cost == Cost::sqeuclidean ? 2 * pass.scale : T(1), rows.scratch);
  const int64_t tiled_end = round_up(end, kRows);
  T shift[kMostChunk + kRows], level[kMostChunk + kRows];
  for (int64_t i = begin; i < tiled_end; ++i)
    shift[i - begin] = i < end ? pass.scale * (rows.softmin[i] - rows.squares[i]) : T(0);
  const bool prune = pruned(control, rows, columns);
  if (control.safe && !prune) {  // with most tiles left out it is cheaper to see what a plain sum is
    safe_levels<cost>(pass, begin, tiled_end, shift, level);
  } else {
    T left_out[ceil_div(kMostChunk + kRows, kTile)];
    const auto sums_of = [&](auto d) {
      constexpr int D = decltype(d)::value;
      if constexpr (cost != Cost::matrix)
        if (prune) return pruned_sums<cost, D>(pass, rows, columns, begin, tiled_end, shift, level, left_out);
      plain_sums<cost, D>(pass, begin, tiled_end, shift, level);
    };
    with_dim(cost == Cost::matrix ? 0 : rows.dim, sums_of);
    for (int64_t i = begin; i < tiled_end; i += kRows) {
      T* total = level + (i - begin);
      const int64_t n = least(int64_t{kRows}, end - i);
      bool fine = true;
      if (prune) {
        for (int64_t r = 0; r < n; ++r) fine = fine && left_out[(i - begin) / kTile] <= kLeftOut<T> * total[r];
        if (!fine && !control.safe) plain_sums<cost, 0>(pass, i, i + kRows, shift + (i - begin), total);
        fine = fine || !control.safe;
      }
      for (int64_t r = 0; r < n; ++r) fine = fine && total[r] >= kLeastSum<T> && total[r] <= kMostSum<T>;
      if (fine)
        for (int r = 0; r < kRows; ++r) total[r] = log2_of(total[r]);
      else
        safe_levels<cost>(pass, i, i + kRows, shift + (i - begin), total);
    }
  }
  *sums = update_softmin(control, rows, role, begin, end, level);
}

// The part of one strip of a matrix [others, rows] in the sums of its columns, which are the pass's rows. With
// `safe`, total 2^most with a running maximum.
template <bool safe, typename T>
void strip_sums(const Ground<T>& ground, const Cloud<T>& rows, const Cloud<T>& others, T scale, int64_t begin,
                int64_t end, T* total, T* most) {
  const FlushSubnormals flush;
  constexpr int64_t size = Vec<T>::size;
  const Vec<T> minus = Vec<T>::fill(-scale);
  for (int64_t j = 0; j < rows.padded; ++j) {
    total[j] = 0;
    if (safe) most[j] = T(2 * kLogZero);
  }
  for (int64_t from = 0; from < rows.count; from += kStripColumns) {
    const int64_t to = least(from + kStripColumns, rows.count);
    for (int64_t k = begin; k < end; k += kRows) {
      const T* costs[kRows];
      Vec<T> bias[kRows];
      for (int r = 0; r < kRows; ++r) {
        costs[r] = ground.matrix + least(k + r, end - 1) * rows.count;
        bias[r] = Vec<T>::fill(k + r < end ? others.bias[k + r] : T(kLogZero));
      }
      for (int64_t j = from; j < to; j += size) {
        const int64_t n = least(size, to - j);
        const bool whole = n == size;
        const Vec<T> h = whole ? Vec<T>::load(rows.softmin + j) : Vec<T>::load(rows.softmin + j, n);
        const Vec<T> q = whole ? Vec<T>::load(rows.squares + j) : Vec<T>::load(rows.squares + j, n);
        const Vec<T> shift = (h - q) * Vec<T>::fill(scale);
        Vec<T> s[kRows];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
          s[r] = fma(whole ? Vec<T>::load(costs[r] + j) : Vec<T>::load(costs[r] + j, n), minus, bias[r] + shift);
        Vec<T> sum = Vec<T>::load(total + j);
        if constexpr (safe) {
          const Vec<T> before = Vec<T>::load(most + j);
          Vec<T> now = before;
          for (int r = 0; r < kRows; ++r) now = greatest(now, s[r]);
          sum = sum * exp2(before - now);
          for (int r = 0; r < kRows; ++r) sum = sum + exp2(s[r] - now);
          now.store(most + j);
        } else {
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) sum = sum + exp2(s[r]);
        }
        sum.store(total + j);
      }
    }
  }
}

// A pass whose rows are the columns of the matrix.
template <typename T>
void pass_columns(const Control& control, const Cloud<T>& rows, const Cloud<T>& others, const Ground<T>& ground,
                  Role role, int64_t chunk, Sums* sums) {
  const T scale = T(kLog2e / control.epsilon);
  const int64_t strip = strip_rows(others.count), strips = ceil_div(others.count, strip), width = rows.padded;
  T *totals = rows.scratch, *most = rows.scratch + strips * width;
  const auto strip_of = [&](bool safe) {
    parallel_for(strips, [&](int64_t k) {
      const int64_t begin = k * strip, end = least(begin + strip, others.count);
      if (safe)
        strip_sums<true>(ground, rows, others, scale, begin, end, totals + k * width, most + k * width);
      else
        strip_sums<false>(ground, rows, others, scale, begin, end, totals + k * width, most + k * width);
    });
  };
  const auto total_of = [&](bool safe) {
    parallel_for(ceil_div(rows.count, chunk), [&](int64_t k) {
      for (int64_t i = k * chunk; i < least((k + 1) * chunk, rows.count); ++i) {
        T top = safe ? most[i] : T(0), total = 0;
        for (int64_t j = 1; safe && j < strips; ++j) top = greatest(top, most[j * width + i]);
        for (int64_t j = 0; j < strips; ++j)
          total += totals[j * width + i] * (safe ? T(__builtin_exp2(most[j * width + i] - top)) : T(1));
        totals[i] = total;
        if (safe) most[i] = top;
      }
    });
  };
  bool safe = control.safe;
  strip_of(safe);
  total_of(safe);
  if (!safe) {
    bool fine = true;
    for (int64_t i = 0; i < rows.count; ++i) fine = fine && totals[i] >= kLeastSum<T> && totals[i] <= kMostSum<T>;
    if (!fine) {  // all again: the whole matrix would be read anyway
      safe = true;
      strip_of(true);
      total_of(true);
    }
  }
  parallel_for(ceil_div(rows.count, chunk), [&](int64_t k) {
    const int64_t begin = k * chunk, end = least(begin + chunk, rows.count);
    T level[kMostChunk + kRows];
    for (int64_t i = begin; i < end; ++i) level[i - begin] = (safe ? most[i] : T(0)) + log2_of(totals[i]);
    sums[k] = update_softmin(control, rows, role, begin, end, level);
  });
}

template <typename T>
void pass(const Control* controls, const Cloud<T>& all_rows, const Cloud<T>& all_columns, const Ground<T>& whole_ground,
          Role role, int64_t problems, Sums* sums, Stream) {
  const int64_t stride = sums_size(all_rows.count, all_columns.count, all_rows.dim, whole_ground.cost);
  for (int64_t p = 0; p < problems; ++p) {
    const Control& control = controls[p];
    if (control.done) continue;
    const Cloud<T> rows = all_rows.of(p), columns = all_columns.of(p);
    const Ground<T> ground = of_problem(whole_ground, p, rows.count * columns.count);
    Sums* mine = sums + p * stride;
    const int64_t size = chunk_rows(columns.count, rows.dim);
    for (int64_t k = ceil_div(rows.count, size); k < stride; ++k) mine[k] = Sums{};
    if (ground.transposed) {
      pass_columns(control, rows, columns, ground, role, size, mine);
      continue;
    }
    const auto each = [&](int64_t chunk) {
      const int64_t begin = chunk * size, end = least(begin + size, rows.count);
      with_cost(ground.cost, [&](auto cost) {
        pass_chunk<decltype(cost)::value>(control, rows, columns, ground, role, begin, end, mine + chunk);
      });
    };
    if (pruned(control, rows, columns)) {
      set_tops(columns, T(kLog2e / control.epsilon));
      parallel_each(ceil_div(rows.count, size), each);
    } else {
      parallel_for(ceil_div(rows.count, size), each);
    }
  }
}

template <typename T>
void costs(const Cloud<T>& all_rows, const Cloud<T>& all_columns, const Ground<T>& ground, int64_t problems, T* matrix,
           Stream) {
  const int64_t size = chunk_rows(all_columns.count, all_rows.dim), dim = all_rows.dim;
  each_chunk(problems, ceil_div(all_rows.count, size), [&](int64_t problem, int64_t chunk) {
    const Cloud<T> rows = all_rows.of(problem), columns = all_columns.of(problem);
    const int64_t begin = chunk * size, end = least(begin + size, rows.count), width = columns.count;
    T* out = matrix + problem * rows.count * width;
    interleave(rows.points, begin, end, dim, ground.cost == Cost::sqeuclidean ? T(-2) : T(1), rows.scratch);
    const int64_t block =
        greatest(int64_t{1}, kBlockBytes / (dim * kPanel<T> * static_cast<int64_t>(sizeof(T)))) * kPanel<T>;
    with_cost(ground.cost, [&](auto cost) {
      if constexpr (decltype(cost)::value != Cost::matrix)
        for (int64_t from = 0; from < columns.padded; from += block)
          for (int64_t i = begin; i < end; i += kRows)
            for (int64_t j = from; j < least(from + block, columns.padded); j += kPanel<T>) {
              Vec<T> s[kRows][2];
              for (int r = 0; r < kRows; ++r) s[r][0] = s[r][1] = Vec<T>::zero();
              accumulate<decltype(cost)::value, 0>(rows.scratch + i * dim, columns.columns + j * dim, dim, ground.power,
                                                   s);
              for (int64_t r = 0; r < least(int64_t{kRows}, end - i); ++r)
                for (int v = 0; v < 2; ++v) {
                  const int64_t k = j + v * Vec<T>::size, n = least(Vec<T>::size, width - k);
                  T* to = out + (i + r) * width + k;
                  if (n == Vec<T>::size)
                    s[r][v].store(to);
                  else if (n > 0)
                    s[r][v].store(to, n);
                }
            }
    });
  });
}

void begin_solve(Control* controls, const Facts* facts, const Options& options, const Control* rows,
                 const Control* columns, int64_t problems, Stream) {
  for (int64_t p = 0; p < problems; ++p)
    begin(controls[p], facts[p], options, rows ? rows[p].safe : 1, columns ? columns[p].safe : 1);
}

void advance_solve(Control* controls, Event event, const Sums* sums, int64_t count, int64_t problems, Stream) {
  for (int64_t p = 0; p < problems; ++p) {
    Sums total{};
    for (int64_t i = 0; i < count; ++i) total = combine(total, sums[p * count + i]);
    advance(controls[p], event, total);
  }
}

// Calls body(begin, end) on parts of [0, count).
template <typename Body>
void each_part(int64_t count, const Body& body) {
  parallel_for(ceil_div(count, kVectorChunk),
               [&](int64_t part) { body(part * kVectorChunk, least((part + 1) * kVectorChunk, count)); });
}

// The bias of `cloud` from its potential, and its padding.
template <typename T>
WGAN_EXT_INLINE void write_bias(const Cloud<T>& cloud, T scale) {
  each_part(cloud.count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      cloud.bias[i] = cloud.log_weights[i] + scale * (cloud.potential[i] - cloud.squares[i]);
  });
  for (int64_t i = cloud.count; i < cloud.padded; ++i) cloud.bias[i] = T(kLogZero);
}

template <typename T>
void set_bias(const Control* controls, const Cloud<T>& clouds, int64_t problems, Stream) {
  for (int64_t p = 0; p < problems; ++p) write_bias(clouds.of(p), T(kLog2e / controls[p].epsilon));
}

template <typename T>
void set_cold(const Control* controls, const Cloud<T>& clouds, Role role, int64_t problems, Stream) {
  for (int64_t p = 0; p < problems; ++p) {
    if (controls[p].done) continue;
    const Cloud<T> cloud = clouds.of(p);
    for (int64_t i = 0; i < cloud.count; ++i) {
      if (cloud.start) cloud.start[i] = role == Role::rows ? cloud.softmin[i] : cloud.potential[i];
      cloud.potential[i] = 0;
      cloud.softmin[i] = 0;
    }
    write_bias(cloud, T(kLog2e / controls[p].epsilon));
  }
}

template <typename T>
void apply(const Control* controls, const Cloud<T>& clouds, Role role, int64_t problems, Stream) {
  for (int64_t p = 0; p < problems; ++p) {
    const Control& control = controls[p];
    if (control.done) continue;
    const Cloud<T> cloud = clouds.of(p);
    const T scale = T(kLog2e / control.epsilon), omega = T(control.omega), damped = T(control.damping);
    const bool restore = role == Role::rows && control.restore;
    const T shift = role == Role::columns      ? T(-control.translation)
                    : role == Role::translated ? T(control.translation)
                                               : T(0);
    each_part(cloud.count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (restore) cloud.softmin[i] = cloud.start[i];
        const T h = damped * cloud.softmin[i], f = cloud.potential[i];
        const T next = (role == Role::translated ? f : omega == 1 ? h : f + omega * (h - f)) + shift;
        cloud.potential[i] = next;
        cloud.softmin[i] = role == Role::self ? next : cloud.softmin[i] + shift;
        cloud.bias[i] = cloud.log_weights[i] + scale * (next - cloud.squares[i]);
      }
    });
  }
}

bool finished(Control* controls, int64_t problems, Stream) {
  for (int64_t p = 0; p < problems; ++p)
    if (!controls[p].done) return false;
  return true;
}

void report(const Control* controls, int64_t problems, double* out, Stream) {
  for (int64_t p = 0; p < problems; ++p) {
    const Control& control = controls[p];
    double* facts = out + p * 5;
    facts[0] = control.row_error + control.column_error;
    facts[1] = control.mass;
    facts[2] = static_cast<double>(control.iterations);
    facts[3] = control.converged;
    facts[4] = control.epsilon;
  }
}

// total = sum_j weight_rj values_jd over the panels of columns [from, to), for dims values from d on.
template <int dims, int64_t block, typename T>
WGAN_EXT_INLINE void weigh(const T (&weight)[kRows][block], const T* values, int64_t width, int64_t d, int64_t from,
                           int64_t to, Vec<T> (&total)[dims][kRows]) {
  constexpr int64_t size = Vec<T>::size;
  for (int k = 0; k < dims; ++k)
    for (int r = 0; r < kRows; ++r) total[k][r] = Vec<T>::zero();
  for (int64_t j = from; j < to; j += kPanel<T>) {
    const T* panel = values + j * width + d * kPanel<T>;
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      Vec<T> y[dims];
      for (int k = 0; k < dims; ++k) y[k] = Vec<T>::load(panel + k * kPanel<T> + v * size);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> w = Vec<T>::load(weight[r] + (j - from) + v * size);
        for (int k = 0; k < dims; ++k) total[k][r] = fma(w, y[k], total[k][r]);
      }
    }
  }
}

// Sums over a tile's plan, whose entries against a block of columns stay on the stack: of values [width] of the columns
// (packed like points, out [.., width]), or, where there are none, of the cost's derivative (out [.., dim]).
template <Cost cost, bool derivative, typename T>
void plan_chunk(const Control& control, const Cloud<T>& rows, const Cloud<T>& columns, const Ground<T>& ground,
                int64_t begin, int64_t end, const T* values, int64_t width, T* out, T* mass) {
  const FlushSubnormals flush;
  constexpr int64_t size = Vec<T>::size, block = 32 * kPanel<T>;
  const Pass<T> pass = make_pass(control.epsilon, rows, columns, ground);
  const int64_t dim = rows.dim, tiles = ceil_div(columns.padded, kTile);
  const T scale = pass.scale;
  const bool prune = pruned(control, rows, columns);
  Kept kept;
  Vec<T> sums[kHeldDims][kRows];  // over the lanes' columns: adding up lanes for every block would cost more than it
  const bool held = width <= kHeldDims;
  // The derivative of the squared cost as the plan's product with the points, for half the operations; at few
  // dimensions, where distances may be small beside the points' own size, as a sum of differences.
  const bool product = !derivative || (cost == Cost::sqeuclidean && dim >= kLeastProductDim);
  interleave(rows.points, begin, end, dim, cost == Cost::sqeuclidean ? 2 * scale : T(1), rows.scratch);
  for (int64_t i = begin; i < end; i += kRows) {
    const int64_t n = least(int64_t{kRows}, end - i);
    T shift[kRows];
    Vec<T> row_mass[kRows];
    for (int r = 0; r < kRows; ++r) {
      shift[r] = r < n ? rows.log_weights[i + r] + scale * (rows.potential[i + r] - rows.squares[i + r]) : T(kLogZero);
    }
    const T top = greatest_of<T>(i, prune ? i + n : i, [&](int64_t k) {
      return scale * (rows.potential[k] - rows.squares[k] + rows.aligned[k]);
    });
    const auto add = [&](int64_t from, int64_t to) {
      T weight[kRows][block];
      for (int64_t j = from; j < to; j += kPanel<T>) {
        Vec<T> s[kRows][2];
        exponents<cost, 0>(pass, i, j, shift, s);
        for (int r = 0; r < kRows; ++r)
          for (int v = 0; v < 2; ++v) {
            const Vec<T> p = exp2(s[r][v]);
            row_mass[r] = row_mass[r] + p;
            p.store(weight[r] + (j - from) + v * size);
          }
      }
      // dC/dx = factor(|x - y|) (x - y): the factor's place is in the weight
      if constexpr (derivative && (cost == Cost::euclidean || cost == Cost::power)) {
        for (int64_t j = from; j < to; j += size) {
          const T* panel = columns.columns + j / kPanel<T> * kPanel<T> * dim + j % kPanel<T>;
          for (int r = 0; r < kRows; ++r) {
            Vec<T> square = Vec<T>::zero();
            for (int64_t d = 0; d < dim; ++d) {
              const Vec<T> z =
                  Vec<T>::fill(rows.scratch[(i / kRows * dim + d) * kRows + r]) - Vec<T>::load(panel + d * kPanel<T>);
              square = fma(z, z, square);
            }
            Vec<T> p = Vec<T>::load(weight[r] + (j - from));
            if constexpr (cost == Cost::euclidean)
              p = p / sqrt(square);
            else
              p = p * Vec<T>::fill(pass.power) * raise(square, pass.power / 2 - 1);
            Vec<T>{square.value > 0 ? p.value : Vec<T>::zero().value}.store(weight[r] + (j - from));
          }
        }
      }
      const T* source = derivative ? columns.columns : values;
      const auto collect = [&](int64_t d, const Vec<T>(&total)[kRows]) {
        if (held)
          for (int r = 0; r < kRows; ++r) sums[d][r] = sums[d][r] + total[r];
        else
          for (int64_t r = 0; r < n; ++r) out[(i + r) * width + d] += sum(total[r]);
      };
      int64_t d = 0;
      for (; product && d + 1 < width; d += 2) {
        Vec<T> total[2][kRows];
        weigh<2>(weight, source, width, d, from, to, total);
        collect(d, total[0]);
        collect(d + 1, total[1]);
      }
      for (; product && d < width; ++d) {
        Vec<T> total[1][kRows];
        weigh<1>(weight, source, width, d, from, to, total);
        collect(d, total[0]);
      }
      if constexpr (derivative) {
        for (; d < width; ++d) {
          Vec<T> total[kRows];
          T x[kRows];
          for (int r = 0; r < kRows; ++r) {
            total[r] = Vec<T>::zero();
            x[r] = r < n ? rows.points[(i + r) * dim + d] : T(0);
          }
          for (int64_t j = from; j < to; j += size) {
            const Vec<T> y = Vec<T>::load(source + (j / kPanel<T> * width + d) * kPanel<T> + j % kPanel<T>);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
              const Vec<T> w = Vec<T>::load(weight[r] + (j - from)), z = Vec<T>::fill(x[r]) - y;
              if constexpr (cost == Cost::manhattan) {
                const Vec<T> negative = {z.value < 0 ? -w.value : Vec<T>::zero().value};
                total[r] = total[r] + Vec<T>{z.value > 0 ? w.value : negative.value};
              } else {
                total[r] = fma(w, z, total[r]);
              }
            }
          }
          collect(d, total);
        }
      }
    };
    // All columns in blocks, or only those that matter; returns what the sums may lack.
    const auto add_all = [&](bool whole) {
      T lost = 0;
      for (int r = 0; r < kRows; ++r) row_mass[r] = Vec<T>::zero();
      for (int64_t k = 0; k < n * width; ++k) out[i * width + k] = 0;
      for (int64_t d = 0; held && d < width; ++d)
        for (int r = 0; r < kRows; ++r) sums[d][r] = Vec<T>::zero();
      for (int64_t first = 0; first < tiles; first += kBlockTiles) {
        const int64_t last = least(first + kBlockTiles, tiles);
        if (whole)
          keep_all(last - first, kept);
        else
          keep<cost>(pass, rows, columns, i / kTile, top, first, last, kept, lost);
        for (int32_t run = 0; run < kept.runs; ++run) {
          const int64_t to = least((first + kept.to[run]) * kTile, columns.padded);
          for (int64_t from = (first + kept.from[run]) * kTile; from < to; from += block)
            add(from, least(from + block, to));
        }
      }
      return lost;
    };
    const T lost = add_all(!prune);
    bool fine = true;
    for (int64_t r = 0; r < n; ++r) fine = fine && rows.weights[i + r] * lost <= kLeftOut<T> * sum(row_mass[r]);
    if (prune && !fine) add_all(true);
    for (int64_t d = 0; held && d < width; ++d)
      for (int64_t r = 0; r < n; ++r) out[(i + r) * width + d] = sum(sums[d][r]);
    if constexpr (derivative) {
      for (int64_t r = 0; r < n; ++r) {
        mass[i + r] = sum(row_mass[r]);
        for (int64_t d = 0; product && d < width; ++d)
          out[(i + r) * width + d] = rows.points[(i + r) * dim + d] * mass[i + r] - out[(i + r) * width + d];
      }
    }
  }
}

template <typename T>
void set_all_tops(const Control* controls, const Cloud<T>& rows, const Cloud<T>& columns, int64_t problems) {
  for (int64_t p = 0; p < problems; ++p)
    if (pruned(controls[p], rows.of(p), columns.of(p))) set_tops(columns.of(p), T(kLog2e / controls[p].epsilon));
}

template <typename T>
void gradient(const Control* controls, const Cloud<T>& all_rows, const Cloud<T>& all_columns, const Ground<T>& ground,
              int64_t problems, T* force, T* mass, Stream) {
  const int64_t size = chunk_rows(all_columns.count, 2 * all_rows.dim), dim = all_rows.dim, count = all_rows.count;
  set_all_tops(controls, all_rows, all_columns, problems);
  each_chunk(problems, ceil_div(count, size), [&](int64_t problem, int64_t chunk) {
    const Cloud<T> rows = all_rows.of(problem);
    const int64_t first = all_rows.first(problem), begin = chunk * size, end = least(begin + size, rows.count);
    if (begin >= end) return;
    with_cost(ground.cost, [&](auto cost) {
      if constexpr (decltype(cost)::value != Cost::matrix)
        plan_chunk<decltype(cost)::value, true, T>(controls[problem], rows, all_columns.of(problem), ground, begin, end,
                                                   nullptr, dim, force + first * dim, mass + first);
    });
  });
}

template <typename T>
void transport(const Control* controls, const Cloud<T>& all_rows, const Cloud<T>& all_columns, const Ground<T>& ground,
               int64_t problems, const T* values, int64_t width, T* out, Stream) {
  const int64_t size = chunk_rows(all_columns.count, all_rows.dim + width), count = all_rows.count;
  set_all_tops(controls, all_rows, all_columns, problems);
  each_chunk(problems, ceil_div(count, size), [&](int64_t problem, int64_t chunk) {
    const Cloud<T> rows = all_rows.of(problem);
    const int64_t begin = chunk * size, end = least(begin + size, rows.count);
    if (begin >= end) return;
    with_cost(ground.cost, [&](auto cost) {
      if constexpr (decltype(cost)::value != Cost::matrix)
        plan_chunk<decltype(cost)::value, false, T>(controls[problem], rows, all_columns.of(problem), ground, begin,
                                                    end, values + all_columns.first_padded(problem) * width, width,
                                                    out + all_rows.first(problem) * width, nullptr);
    });
  });
}

template <typename T>
constexpr Kernels<T> kTable = {1,           false,       true,          columns_size<T>, padded<T>,   scratch_size<T>,
                               sums_size,   caches,      pack<T>,       costs<T>,        begin_solve, set_bias<T>,
                               set_cold<T>, pass<T>,     advance_solve, apply<T>,        finished,    report,
                               gradient<T>, transport<T>};

}  // namespace

template <>
const Kernels<float>& table<float>() {
  return kTable<float>;
}
template <>
const Kernels<double>& table<double>() {
  return kTable<double>;
}

}  // namespace wgan_ext::sinkhorn::WGAN_EXT_LEVEL
