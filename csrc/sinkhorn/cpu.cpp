// Sinkhorn on the CPU.
//
// A pass computes, for a tile of kRows rows and a panel of two vectors of columns, the exponents in registers (the dot
// product starts from the bias), their exp2, and the row sums; nothing of size N x M is stored. Panels are kept packed
// [dim][panel]; a block of panels stays in the second-level cache while the tiles of a chunk of rows pass over it.
// Exponents are in base 2, and shifted by the row's previous softmin, which bounds them (solve.h), so that no running
// maximum is needed; a row whose sum still leaves the range of T is done again with one.
#include "../parallel.h"
#include "kernels.h"

namespace wgan_ext::sinkhorn::WGAN_EXT_LEVEL {
using namespace wgan_ext::WGAN_EXT_LEVEL;
namespace {

constexpr int kRows = WGAN_EXT_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int64_t kLeastChunk = 64, kMostChunk = 1024;  // rows
constexpr int64_t kBlockBytes = 128 * 1024;             // of panels
constexpr int64_t kVectorChunk = 8192;                  // elements of an elementwise loop

template <typename T>
constexpr int64_t kPanel = 2 * Vec<T>::size;

// A row sum outside is done again: below, terms lost to underflow could matter; above, it has overflowed.
template <typename T>
constexpr T kLeastSum = sizeof(T) == 4 ? T(1e-30) : T(1e-290);
template <typename T>
constexpr T kMostSum = sizeof(T) == 4 ? T(3e38) : T(1e308);

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

int64_t sums_size(int64_t count, int64_t other_count, int64_t dim) {
  return ceil_div(count, chunk_rows(other_count, dim));
}

int64_t scratch_size(int64_t count, int64_t dim, int64_t) { return round_up(count, kRows) * dim; }

template <typename T>
void pack(const T* points, int64_t count, int64_t dim, T* columns, Stream) {
  const int64_t panels = ceil_div(count, kPanel<T>);
  const int64_t per_chunk = greatest(int64_t{1}, kVectorChunk / (dim * kPanel<T>));
  parallel_for(ceil_div(panels, per_chunk), [&](int64_t chunk) {
    for (int64_t p = chunk * per_chunk; p < least((chunk + 1) * per_chunk, panels); ++p) {
      T* panel = columns + p * kPanel<T> * dim;
      for (int64_t k = 0; k < kPanel<T>; ++k) {
        const int64_t j = p * kPanel<T> + k;
        for (int64_t d = 0; d < dim; ++d) panel[d * kPanel<T> + k] = j < count ? points[j * dim + d] : T(0);
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

// The exponents of a tile against a panel. D is dim where it is known when compiling, else 0.
template <Cost cost, int D, typename T>
WGAN_EXT_INLINE void exponents(const T* tile, const T* panel, const T* bias, const T* shift, int64_t dim, T scale,
                               Vec<T> (&s)[kRows][2]) {
  constexpr int64_t size = Vec<T>::size;
  const Vec<T> bias0 = Vec<T>::load(bias), bias1 = Vec<T>::load(bias + size);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const Vec<T> row = Vec<T>::fill(shift[r]);
    s[r][0] = cost == Cost::sqeuclidean ? bias0 + row : Vec<T>::zero();
    s[r][1] = cost == Cost::sqeuclidean ? bias1 + row : Vec<T>::zero();
  }
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
      } else {
        const Vec<T> z0 = x - y0, z1 = x - y1;
        s[r][0] = fma(z0, z0, s[r][0]);
        s[r][1] = fma(z1, z1, s[r][1]);
      }
    }
  }
  if constexpr (cost == Cost::euclidean) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> row = Vec<T>::fill(shift[r]), minus = Vec<T>::fill(-scale);
      s[r][0] = fma(sqrt(s[r][0]), minus, bias0 + row);
      s[r][1] = fma(sqrt(s[r][1]), minus, bias1 + row);
    }
  }
}

WGAN_EXT_INLINE float log2_of(float x) { return __builtin_log2f(x); }
WGAN_EXT_INLINE double log2_of(double x) { return __builtin_log2(x); }

// What the loops over tiles need of a pass.
template <typename T>
struct Pass {
  const T* tiles;
  const T* columns;
  const T* bias;
  int64_t column_count;  // padded
  int64_t dim;
  T scale;  // log2(e) / epsilon
};

// total[i - begin] = sum_j 2^exponent, rows [begin, end) of whole tiles.
template <Cost cost, int D, typename T>
void plain_sums(const Pass<T>& pass, int64_t begin, int64_t end, const T* shift, T* total) {
  const int64_t dim = D ? D : pass.dim;
  const int64_t block =
      greatest(int64_t{1}, kBlockBytes / (dim * kPanel<T> * static_cast<int64_t>(sizeof(T)))) * kPanel<T>;
  for (int64_t i = begin; i < end; ++i) total[i - begin] = 0;
  for (int64_t from = 0; from < pass.column_count; from += block) {
    const int64_t to = least(from + block, pass.column_count);
    for (int64_t i = begin; i < end; i += kRows) {
      const T* tile = pass.tiles + i * dim;
      Vec<T> row_sums[kRows];
      for (int r = 0; r < kRows; ++r) row_sums[r] = Vec<T>::zero();
      for (int64_t j = from; j < to; j += kPanel<T>) {
        Vec<T> s[kRows][2];
        exponents<cost, D>(tile, pass.columns + j * dim, pass.bias + j, shift + (i - begin), dim, pass.scale, s);
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
    for (int64_t j = 0; j < pass.column_count; j += kPanel<T>) {
      Vec<T> s[kRows][2];
      exponents<cost, 0>(pass.tiles + i * pass.dim, pass.columns + j * pass.dim, pass.bias + j, shift + (i - begin),
                         pass.dim, pass.scale, s);
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

// The new softmin of a chunk of rows and its sums, from levels relative to the old softmin.
template <typename T>
WGAN_EXT_INLINE Sums update_softmin(const Control& control, const Cloud<T>& rows, int64_t begin, int64_t end,
                                    const T* level) {
  const T scale = T(kLog2e / control.epsilon), unscale = T(control.epsilon * kLn2), relaxation = T(control.proposal);
  const T* potential = control.restore ? rows.start : rows.potential;
  Vec<T> error = Vec<T>::zero(), relaxed = error, mass = error, gain = error, change = error;
  for (int64_t i = begin; i < end; i += Vec<T>::size) {
    const int64_t n = least(Vec<T>::size, end - i);
    const bool whole = n == Vec<T>::size;
    const Vec<T> f = whole ? Vec<T>::load(potential + i) : Vec<T>::load(potential + i, n);
    const Vec<T> h = whole ? Vec<T>::load(rows.softmin + i) : Vec<T>::load(rows.softmin + i, n);
    const Vec<T> a = whole ? Vec<T>::load(rows.weights + i) : Vec<T>::load(rows.weights + i, n);
    const Vec<T> l = whole ? Vec<T>::load(level + (i - begin)) : Vec<T>::load(level + (i - begin), n);
    const Vec<T> fresh = h - l * Vec<T>::fill(unscale);
    if (whole)
      fresh.store(rows.softmin + i);
    else
      fresh.store(rows.softmin + i, n);
    // S of the potential itself; capped, for a weight of 0 makes no infinity vanish.
    const Vec<T> log_s = least(fma(f - h, Vec<T>::fill(scale), l), Vec<T>::fill(T(100)));
    const Vec<T> s = exp2(log_s), excess = s - Vec<T>::fill(1);
    error = fma(a, greatest(excess, Vec<T>::zero() - excess), error);
    mass = fma(a, s, mass);
    const Vec<T> step = fresh - f, positive = {a.value > 0 ? step.value : Vec<T>::zero().value};
    change = greatest(change, greatest(positive, Vec<T>::zero() - positive));
    if (relaxation != 1) {
      const Vec<T> left = exp2(log_s * Vec<T>::fill(1 - relaxation)), rest = left - Vec<T>::fill(1);
      relaxed = fma(a, greatest(rest, Vec<T>::zero() - rest), relaxed);
      gain = fma(a, s - left - log_s * Vec<T>::fill(relaxation * T(kLn2)), gain);
    }
  }
  T most[Vec<T>::size];
  change.store(most);
  for (int64_t k = 1; k < Vec<T>::size; ++k) most[0] = greatest(most[0], most[k]);
  return {double(sum(error)), double(sum(relaxed)), double(sum(mass)), double(sum(gain)), double(most[0])};
}

template <Cost cost, typename T>
void pass_chunk(const Control& control, const Cloud<T>& rows, const Cloud<T>& columns, int64_t dim, int64_t begin,
                int64_t end, Sums* sums) {
  const FlushSubnormals flush;
  const T scale = T(kLog2e / control.epsilon);
  interleave(rows.points, begin, end, dim, cost == Cost::sqeuclidean ? 2 * scale : T(1), rows.scratch);
  const Pass<T> pass = {rows.scratch, columns.columns, columns.bias, padded<T>(columns.count), dim, scale};
  const int64_t tiled_end = round_up(end, kRows);
  T shift[kMostChunk + kRows], level[kMostChunk + kRows];
  for (int64_t i = begin; i < tiled_end; ++i)
    shift[i - begin] = i < end ? scale * (rows.softmin[i] - rows.squares[i]) : T(0);
  if (control.safe) {
    safe_levels<cost>(pass, begin, tiled_end, shift, level);
  } else {
    switch (dim) {
      case 1:
        plain_sums<cost, 1>(pass, begin, tiled_end, shift, level);
        break;
      case 2:
        plain_sums<cost, 2>(pass, begin, tiled_end, shift, level);
        break;
      case 3:
        plain_sums<cost, 3>(pass, begin, tiled_end, shift, level);
        break;
      default:
        plain_sums<cost, 0>(pass, begin, tiled_end, shift, level);
    }
    for (int64_t i = begin; i < tiled_end; i += kRows) {
      T* total = level + (i - begin);
      bool fine = true;
      for (int64_t r = 0; r < least(int64_t{kRows}, end - i); ++r)
        fine = fine && total[r] >= kLeastSum<T> && total[r] <= kMostSum<T>;
      if (fine)
        for (int r = 0; r < kRows; ++r) total[r] = log2_of(total[r]);
      else
        safe_levels<cost>(pass, i, i + kRows, shift + (i - begin), total);
    }
  }
  *sums = update_softmin(control, rows, begin, end, level);
}

template <typename T>
void pass(const Control* control, const Cloud<T>& rows, const Cloud<T>& columns, int64_t dim, Cost cost, Sums* sums,
          Stream) {
  if (control->done) return;
  const int64_t size = chunk_rows(columns.count, dim);
  parallel_for(ceil_div(rows.count, size), [&](int64_t chunk) {
    const int64_t begin = chunk * size, end = least(begin + size, rows.count);
    if (cost == Cost::sqeuclidean)
      pass_chunk<Cost::sqeuclidean>(*control, rows, columns, dim, begin, end, sums + chunk);
    else
      pass_chunk<Cost::euclidean>(*control, rows, columns, dim, begin, end, sums + chunk);
  });
}

void begin_solve(Control* control, const double* facts, const Options& options, const Control* rows,
                 const Control* columns, Stream) {
  begin(*control, facts, options, rows ? rows->safe : 1, columns ? columns->safe : 1);
}

void advance_solve(Control* control, Event event, const Sums* sums, int64_t count, Stream) {
  Sums total{};
  for (int64_t i = 0; i < count; ++i) total = combine(total, sums[i]);
  advance(*control, event, total);
}

// Calls body(begin, end) on parts of [0, count).
template <typename Body>
void each_part(int64_t count, const Body& body) {
  parallel_for(ceil_div(count, kVectorChunk),
               [&](int64_t part) { body(part * kVectorChunk, least((part + 1) * kVectorChunk, count)); });
}

template <typename T>
WGAN_EXT_INLINE void fill_padding(const Cloud<T>& cloud) {
  for (int64_t i = cloud.count; i < padded<T>(cloud.count); ++i) cloud.bias[i] = T(kLogZero);
}

template <typename T>
void set_bias(const Control* control, const Cloud<T>& cloud, Stream) {
  const T scale = T(kLog2e / control->epsilon);
  each_part(cloud.count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      cloud.bias[i] = cloud.log_weights[i] + scale * (cloud.potential[i] - cloud.squares[i]);
  });
  fill_padding(cloud);
}

template <typename T>
void set_cold(const Control* control, const Cloud<T>& cloud, Role role, Stream stream) {
  if (control->done) return;
  for (int64_t i = 0; i < cloud.count; ++i) {
    if (cloud.start) cloud.start[i] = role == Role::rows ? cloud.softmin[i] : cloud.potential[i];
    cloud.potential[i] = 0;
    cloud.softmin[i] = 0;
  }
  set_bias(control, cloud, stream);
}

template <typename T>
void apply(const Control* control, const Cloud<T>& cloud, Role role, Stream) {
  if (control->done) return;
  const T scale = T(kLog2e / control->epsilon), omega = T(control->omega);
  const bool restore = role == Role::rows && control->restore;
  each_part(cloud.count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (restore) cloud.softmin[i] = cloud.start[i];
      const T h = cloud.softmin[i], f = cloud.potential[i];
      const T next = omega == 1 ? h : f + omega * (h - f);
      cloud.potential[i] = next;
      if (role == Role::self) cloud.softmin[i] = next;
      cloud.bias[i] = cloud.log_weights[i] + scale * (next - cloud.squares[i]);
    }
  });
}

bool finished(const Control* control, Stream) { return control->done; }

void report(const Control* control, double* out, Stream) {
  out[0] = control->row_error + control->column_error;
  out[1] = control->mass;
  out[2] = static_cast<double>(control->iterations);
  out[3] = control->converged;
  out[4] = control->epsilon;
}

// The plan's entries of a tile against a block of columns stay on the stack; then each dimension is summed in
// registers.
template <Cost cost, typename T>
void gradient_chunk(double epsilon, const Cloud<T>& rows, const Cloud<T>& columns, int64_t dim, int64_t begin,
                    int64_t end, T* force, T* mass) {
  const FlushSubnormals flush;
  constexpr int64_t size = Vec<T>::size, block = 8 * kPanel<T>;
  const T scale = T(kLog2e / epsilon);
  interleave(rows.points, begin, end, dim, cost == Cost::sqeuclidean ? 2 * scale : T(1), rows.scratch);
  const int64_t column_count = padded<T>(columns.count);
  for (int64_t i = begin; i < end; i += kRows) {
    const int64_t n = least(int64_t{kRows}, end - i);
    T shift[kRows];
    Vec<T> row_mass[kRows];
    for (int r = 0; r < kRows; ++r) {
      shift[r] = r < n ? rows.log_weights[i + r] + scale * (rows.potential[i + r] - rows.squares[i + r]) : T(kLogZero);
      row_mass[r] = Vec<T>::zero();
    }
    for (int64_t k = 0; k < n * dim; ++k) force[i * dim + k] = 0;
    for (int64_t from = 0; from < column_count; from += block) {
      const int64_t to = least(from + block, column_count);
      T weight[kRows][block];
      for (int64_t j = from; j < to; j += kPanel<T>) {
        Vec<T> s[kRows][2];
        exponents<cost, 0>(rows.scratch + i * dim, columns.columns + j * dim, columns.bias + j, shift, dim, scale, s);
        for (int r = 0; r < kRows; ++r)
          for (int v = 0; v < 2; ++v) {
            const Vec<T> p = exp2(s[r][v]);
            row_mass[r] = row_mass[r] + p;
            p.store(weight[r] + (j - from) + v * size);
          }
      }
      if constexpr (cost == Cost::euclidean) {
        for (int64_t j = from; j < to; j += size) {
          const T* panel = columns.columns + j / kPanel<T> * kPanel<T> * dim + j % kPanel<T>;
          for (int r = 0; r < kRows; ++r) {
            Vec<T> square = Vec<T>::zero();
            for (int64_t d = 0; d < dim; ++d) {
              const Vec<T> z =
                  Vec<T>::fill(rows.scratch[(i / kRows * dim + d) * kRows + r]) - Vec<T>::load(panel + d * kPanel<T>);
              square = fma(z, z, square);
            }
            const Vec<T> p = Vec<T>::load(weight[r] + (j - from)) / sqrt(square);
            Vec<T>{square.value > 0 ? p.value : Vec<T>::zero().value}.store(weight[r] + (j - from));
          }
        }
      }
      for (int64_t d = 0; d < dim; ++d) {
        Vec<T> total[kRows];
        T x[kRows];
        for (int r = 0; r < kRows; ++r) {
          total[r] = Vec<T>::zero();
          x[r] = r < n ? rows.points[(i + r) * dim + d] : T(0);
        }
        for (int64_t j = from; j < to; j += size) {
          const Vec<T> y = Vec<T>::load(columns.columns + (j / kPanel<T> * dim + d) * kPanel<T> + j % kPanel<T>);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r)
            total[r] = fma(Vec<T>::load(weight[r] + (j - from)), Vec<T>::fill(x[r]) - y, total[r]);
        }
        for (int64_t r = 0; r < n; ++r) force[(i + r) * dim + d] += sum(total[r]);
      }
    }
    for (int64_t r = 0; r < n; ++r) mass[i + r] = sum(row_mass[r]);
  }
}

template <typename T>
void gradient(const double* epsilon, const Cloud<T>& rows, const Cloud<T>& columns, int64_t dim, Cost cost, T* force,
              T* mass, Stream) {
  const int64_t size = chunk_rows(columns.count, 2 * dim);
  parallel_for(ceil_div(rows.count, size), [&](int64_t chunk) {
    const int64_t begin = chunk * size, end = least(begin + size, rows.count);
    if (cost == Cost::sqeuclidean)
      gradient_chunk<Cost::sqeuclidean>(*epsilon, rows, columns, dim, begin, end, force, mass);
    else
      gradient_chunk<Cost::euclidean>(*epsilon, rows, columns, dim, begin, end, force, mass);
  });
}

template <typename T>
constexpr Kernels<T> kTable = {1,           columns_size<T>, padded<T>,   scratch_size, sums_size,     pack<T>,
                               begin_solve, set_bias<T>,     set_cold<T>, pass<T>,      advance_solve, apply<T>,
                               finished,    report,          gradient<T>};

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
