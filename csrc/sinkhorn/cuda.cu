// Sinkhorn on CUDA.
//
// A pass is two kernels. `pass_kernel`: a block owns a tile of rows and a range of columns; tiles of both go through
// shared memory, each thread keeps 8 x 4 exponents (4 x 2 in double) in registers and adds their exp2. `finish_kernel`:
// one thread a row adds the ranges, does again (the whole block) rows that left the range of T, writes the softmin and
// sums what the controller asks. The controller is one thread on the device; every kernel returns at once when the
// solve is done, so the host only enqueues, and looks at a flag copied to pinned memory one batch of iterations ago.
// The third dimension of every grid counts the problems of a batch.
// Tiles and ranges depend on shape alone and sums have a fixed order: results are deterministic.
#include "../cuda/reduce.cuh"
#include "kernels.h"

namespace wgan_ext::sinkhorn {
namespace {

using device::block_reduce;
using device::kFullMask;
using device::kWarp;

constexpr int kThreads = 256, kSide = 16;  // a block is 16 x 16 threads
constexpr int kDepth = 32;                 // dimensions in shared memory at a time
constexpr int kBlocksPerSm = 2;            // of the heavy kernels: 128 registers a thread
constexpr int64_t kWantedBlocks = 512;     // ranges are cut until there are about so many
constexpr int64_t kMostBlocks = kLoopBlocks;
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <typename T>
struct __align__(16) Quad {  // what one load brings
  static constexpr int size = 16 / sizeof(T);
  T value[size];
};

template <typename T>
struct Tile {
  static constexpr int rows_each = 2 * Quad<T>::size, columns_each = Quad<T>::size;
  static constexpr int rows = kSide * rows_each, columns = kSide * columns_each;
};

template <typename T>
__host__ __device__ constexpr int64_t padded_dim(int64_t dim) {
  return (dim + Quad<T>::size - 1) / Quad<T>::size * Quad<T>::size;
}

template <typename T>
int64_t padded(int64_t count) {
  return ceil_div(count, Tile<T>::rows) * Tile<T>::rows;  // whole tiles of rows are whole tiles of columns
}

template <typename T>
int64_t columns_size(int64_t count, int64_t dim) {
  return padded<T>(count) * padded_dim<T>(dim);
}

// Into how many ranges the columns are cut.
template <typename T>
int64_t ranges(int64_t row_count, int64_t column_count) {
  const int64_t tiles = ceil_div(column_count, Tile<T>::columns);
  const int64_t wanted = ceil_div(kWantedBlocks, ceil_div(row_count, Tile<T>::rows));
  return wanted < tiles ? wanted : tiles;
}

// Each range's sum and maximum for each row.
template <typename T>
int64_t scratch_size(int64_t count, int64_t, int64_t other_count, Cost) {
  return 2 * ranges<T>(count, other_count) * padded<T>(count);
}

int64_t sums_size(int64_t count, int64_t, int64_t, Cost) { return ceil_div(count, kThreads); }

dim3 elementwise_grid(int64_t count, int64_t problems) {
  const int64_t blocks = ceil_div(count, kThreads);
  return dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks), 1, static_cast<unsigned>(problems));
}

__device__ inline int64_t first_element() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ inline int64_t stride() { return int64_t{gridDim.x} * blockDim.x; }

__device__ inline float power(float x) { return exp2f(x); }
__device__ inline double power(double x) { return exp2(x); }
__device__ inline float logarithm(float x) { return log2f(x); }
__device__ inline double logarithm(double x) { return log2(x); }
__device__ inline float root(float x) { return sqrtf(x); }
__device__ inline double root(double x) { return sqrt(x); }
template <typename T>
__device__ T greater(T a, T b) {
  return a < b ? b : a;
}
template <typename T>
__device__ T magnitude(T a) {
  return a < 0 ? -a : a;
}

// A sum of 2^s kept as total * 2^most.
template <typename T>
struct Scaled {
  T most = T(2 * kLogZero), total = 0;
  __device__ void add(T other_most, T other_total) {
    const T now = greater(most, other_most);
    total = total * power(most - now) + other_total * power(other_most - now);
    most = now;
  }
};

// x^(power / 2) for x > 0; 0 at 0. NaN stays.
template <typename T>
__device__ T half_power(T x, T p) {
  return x > 0 ? power(p / 2 * logarithm(x)) : x;
}

// Adds one dimension to what a pair's cost is made of.
template <Cost cost, typename T>
__device__ void accumulate(T& s, T x, T y) {
  if (cost == Cost::sqeuclidean) {
    s += x * y;
  } else {
    const T z = x - y;
    s += cost == Cost::manhattan ? magnitude(z) : z * z;
  }
}

// The cost of that sum; for the squared cost -2 x.y.
template <Cost cost, typename T>
__device__ T cost_of(T s, T p) {
  if (cost == Cost::sqeuclidean) return -2 * s;
  if (cost == Cost::euclidean) return root(s);
  if (cost == Cost::power) return half_power(s, p);
  return s;
}

// The problem's own matrix.
template <typename T>
__device__ const T* matrix_of(const Ground<T>& ground, const Cloud<T>& rows, const Cloud<T>& columns) {
  return ground.matrix + int64_t{blockIdx.z} * rows.count * columns.count;
}

// Where the cost of row i and column j lies in it.
template <typename T>
__device__ int64_t place(const Ground<T>& ground, const Cloud<T>& rows, const Cloud<T>& columns, int64_t i, int64_t j) {
  return ground.transposed ? j * rows.count + i : i * columns.count + j;
}

template <typename T>
__global__ void pack_kernel(const T* points, const int64_t* offsets, int64_t count, int64_t dim, int64_t size,
                            T* columns) {
  const int64_t problem = blockIdx.z, width = padded_dim<T>(dim);
  const int64_t first = offsets ? offsets[problem] : problem * count;
  columns += offsets ? first_of_padded(first, problem, Tile<T>::rows) * width : problem * size;
  if (offsets) {
    count = offsets[problem + 1] - first;
    size = ceil_div(count, Tile<T>::rows) * Tile<T>::rows * width;
  }
  points += first * dim;
  for (int64_t k = first_element(); k < size; k += stride()) {
    const int64_t i = k / width, d = k % width;
    columns[k] = i < count && d < dim ? points[i * dim + d] : T(0);
  }
}

// Dimensions [from, from + kDepth) of `count` points, transposed, times scale; past width 0.
template <typename T, int count>
__device__ void load_tile(const T* points, int64_t width, int64_t from, T scale, T (&tile)[kDepth][count]) {
  constexpr int size = Quad<T>::size;
#pragma unroll 2
  for (int k = threadIdx.x; k < count * (kDepth / size); k += kThreads) {
    const int point = k % count, d = k / count * size;
    Quad<T> quad{};
    if (from + d < width) quad = *reinterpret_cast<const Quad<T>*>(points + point * width + from + d);
    for (int e = 0; e < size; ++e) tile[d + e][point] = scale * quad.value[e];
  }
}

template <typename T>
struct Shared {
  T rows[kDepth][Tile<T>::rows];
  T columns[kDepth][Tile<T>::columns];
};

template <typename T, Cost cost, bool safe>
__device__ void pass_range(const Control& control, const Cloud<T>& rows, const Cloud<T>& columns,
                           const Ground<T>& ground, int64_t first_tile, int64_t last_tile, Shared<T>& shared) {
  using Shape = Tile<T>;
  constexpr int size = Quad<T>::size, R = Shape::rows_each, C = Shape::columns_each;
  const int64_t width = cost == Cost::matrix ? 0 : padded_dim<T>(rows.dim);
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  const T scale = T(kLog2e / control.epsilon), row_scale = cost == Cost::sqeuclidean ? 2 * scale : T(1);
  const int64_t row_begin = int64_t{blockIdx.x} * Shape::rows;
  const T* row_points = rows.columns + row_begin * width;
  const T* matrix = cost == Cost::matrix ? matrix_of(ground, rows, columns) : nullptr;

  const auto row = [&](int r) { return row_begin + (r / size * kSide + ty) * size + r % size; };
  T shift[R];
  Scaled<T> sum[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t i = row(r);
    shift[r] = i < rows.count ? scale * (rows.softmin[i] - rows.squares[i]) : T(0);
  }
  if (cost != Cost::matrix && width <= kDepth) load_tile<T, Shape::rows>(row_points, width, 0, row_scale, shared.rows);

  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const int64_t column_begin = tile * Shape::columns;
    T s[R][C];
    const Quad<T> bias = *reinterpret_cast<const Quad<T>*>(columns.bias + column_begin + tx * C);
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int c = 0; c < C; ++c) s[r][c] = cost == Cost::sqeuclidean ? bias.value[c] + shift[r] : T(0);
    for (int64_t from = 0; from < width; from += kDepth) {
      if (width > kDepth) load_tile<T, Shape::rows>(row_points, width, from, row_scale, shared.rows);
      load_tile<T, Shape::columns>(columns.columns + column_begin * width, width, from, T(1), shared.columns);
      __syncthreads();
      const int depth = static_cast<int>(width - from < kDepth ? width - from : kDepth);
#pragma unroll 4
      for (int d = 0; d < depth; ++d) {
        const Quad<T> y = *reinterpret_cast<const Quad<T>*>(&shared.columns[d][tx * C]);
        Quad<T> x[2];
        x[0] = *reinterpret_cast<const Quad<T>*>(&shared.rows[d][ty * size]);
        x[1] = *reinterpret_cast<const Quad<T>*>(&shared.rows[d][(kSide + ty) * size]);
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int c = 0; c < C; ++c) {
            const T xr = x[r / size].value[r % size];
            accumulate<cost>(s[r][c], xr, y.value[c]);
          }
      }
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (cost != Cost::sqeuclidean) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
          T pair = 0;
          if (cost != Cost::matrix) {
            pair = cost_of<cost>(s[r][c], ground.power);
          } else {
            const int64_t j = column_begin + tx * C + c;
            if (row(r) < rows.count && j < columns.count) pair = matrix[place(ground, rows, columns, row(r), j)];
          }
          s[r][c] = bias.value[c] + shift[r] - scale * pair;
        }
      }
      if (safe) {
        T most = s[r][0], total = 0;
#pragma unroll
        for (int c = 1; c < C; ++c) most = greater(most, s[r][c]);
#pragma unroll
        for (int c = 0; c < C; ++c) total += power(s[r][c] - most);
        sum[r].add(most, total);
      } else {
#pragma unroll
        for (int c = 0; c < C; ++c) sum[r].total += power(s[r][c]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    for (int offset = kSide / 2; offset; offset /= 2) {
      const T total = __shfl_xor_sync(kFullMask, sum[r].total, offset);
      if (safe) {
        const T most = __shfl_xor_sync(kFullMask, sum[r].most, offset);
        sum[r].add(most, total);
      } else {
        sum[r].total += total;
      }
    }
    if (tx == 0 && row(r) < rows.count) {
      T* mine = rows.scratch + blockIdx.y * rows.padded + row(r);
      *mine = sum[r].total;
      if (safe) mine[gridDim.y * rows.padded] = sum[r].most;
    }
  }
}

template <typename T, Cost cost>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    pass_kernel(const Control* controls, Cloud<T> all_rows, Cloud<T> all_columns, Ground<T> ground) {
  const Control* control = controls + blockIdx.z;
  if (control->done) return;
  const Cloud<T> rows = all_rows.of(blockIdx.z), columns = all_columns.of(blockIdx.z);
  if (int64_t{blockIdx.x} * Tile<T>::rows >= rows.count) return;
  __shared__ Shared<T> shared;
  const int64_t tiles = ceil_div(columns.count, Tile<T>::columns), ranges = gridDim.y, range = blockIdx.y;
  const int64_t first = tiles * range / ranges, last = tiles * (range + 1) / ranges;
  if (control->safe)
    pass_range<T, cost, true>(*control, rows, columns, ground, first, last, shared);
  else
    pass_range<T, cost, false>(*control, rows, columns, ground, first, last, shared);
}

// log2 of one row's sum, by the whole block, with a running maximum.
template <typename T, Cost cost>
__device__ T redo_row(const Control& control, const Cloud<T>& rows, const Cloud<T>& columns, const Ground<T>& ground,
                      int64_t i, T* scratch) {
  const int64_t width = padded_dim<T>(rows.dim);
  const T scale = T(kLog2e / control.epsilon);
  const T shift = scale * (rows.softmin[i] - rows.squares[i]);
  Scaled<T> sum;
  for (int64_t j = threadIdx.x; j < columns.count; j += kThreads) {
    T pair = 0;
    if (cost == Cost::matrix) {
      pair = matrix_of(ground, rows, columns)[place(ground, rows, columns, i, j)];
    } else {
      for (int64_t d = 0; d < rows.dim; ++d)
        accumulate<cost>(pair, rows.columns[i * width + d], columns.columns[j * width + d]);
      pair = cost_of<cost>(pair, ground.power);
    }
    sum.add(columns.bias[j] + shift - scale * pair, T(1));
  }
  const T most = block_reduce<device::Max>(sum.most, scratch, T(2 * kLogZero));
  __syncthreads();
  const T total = block_reduce<device::Sum>(sum.total * power(sum.most - most), scratch, T(0));
  __syncthreads();
  return most + logarithm(total);
}

// The new softmin of a row and what it adds to the sums, from its level relative to the old softmin.
template <typename T>
__device__ Sums update_row(const Control& control, const Cloud<T>& rows, Role role, int64_t i, T level) {
  const double rho = role == Role::columns ? control.options.column_rho : control.options.row_rho;
  const double lambda = damping(control, rho);
  const T scale = T(kLog2e / control.epsilon), unscale = T(control.epsilon * kLn2), omega = T(control.proposal);
  const T minus_unit = T(-kLog2e / rho), most = T(100);
  const T f = (control.restore ? rows.start : rows.potential)[i], h = rows.softmin[i], a = rows.weights[i];
  const T fresh = h - level * unscale;
  rows.softmin[i] = fresh;
  if (!(a > 0)) return {};
  const auto capped_power = [&](T exponent) { return power(exponent > most ? most : exponent); };
  T log_s = level + scale * (f - h);
  log_s = log_s > most ? most : log_s;  // NaN passes the cap
  const T s = power(log_s), wanted = capped_power(f * minus_unit), best = fresh * T(lambda);
  Sums sums{};
  sums.error = a * magnitude(s - wanted);
  sums.mass = a * s;
  sums.target = a * capped_power(best * minus_unit);
  sums.change = magnitude(best - f);
  if (omega != 1) {
    // log2 exp(delta), written so that nothing cancels where the marginal is hard
    const T delta = -omega * (log_s * T(lambda) + f * T((1 - lambda) * kLog2e / control.epsilon));
    const T left = capped_power(log_s + delta), z = delta * T(kLn2) * T(control.epsilon / rho);
    const T relaxed_wanted = capped_power((omega * (best - f) + f) * minus_unit);
    // rho / epsilon (T - T') = ln 2 delta T (1 - exp(-z)) / z
    const T factor = magnitude(z) < T(0.05) ? z * (z * (z * T(-1. / 24) + T(1. / 6)) - T(0.5)) + 1
                                            : (wanted - relaxed_wanted) / (z * wanted);
    sums.relaxed_error = a * magnitude(left - relaxed_wanted);
    sums.gain = a * (s - left + delta * T(kLn2) * wanted * factor);
    sums.relaxed_target = a * relaxed_wanted;
  }
  return sums;
}

constexpr int kSums = 7;

__device__ inline Sums block_sums(const Sums& sums, double (&scratch)[kSums][kWarp]) {
  return {block_reduce<device::Sum>(sums.error, scratch[0], 0.0),
          block_reduce<device::Sum>(sums.relaxed_error, scratch[1], 0.0),
          block_reduce<device::Sum>(sums.mass, scratch[2], 0.0),
          block_reduce<device::Sum>(sums.gain, scratch[3], 0.0),
          block_reduce<device::Sum>(sums.target, scratch[4], 0.0),
          block_reduce<device::Sum>(sums.relaxed_target, scratch[5], 0.0),
          block_reduce<device::Max>(sums.change, scratch[6], 0.0)};
}

template <typename T, Cost cost>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    finish_kernel(const Control* controls, Cloud<T> all_rows, Cloud<T> all_columns, Ground<T> ground, Role role,
                  int64_t ranges, Sums* sums) {
  const Control* control = controls + blockIdx.z;
  if (control->done) return;
  const Cloud<T> rows = all_rows.of(blockIdx.z), columns = all_columns.of(blockIdx.z);
  __shared__ T redo_scratch[kWarp];
  __shared__ double sums_scratch[kSums][kWarp];
  __shared__ int32_t bad[kThreads];
  constexpr T least = sizeof(T) == 4 ? T(1e-30) : T(1e-290), most = sizeof(T) == 4 ? T(3e38) : T(1e308);
  const int64_t begin = int64_t{blockIdx.x} * kThreads, i = begin + threadIdx.x;
  T level = 0;
  bool redo = false;
  if (i < rows.count) {
    Scaled<T> sum;
    for (int64_t range = 0; range < ranges; ++range) {
      const T total = rows.scratch[range * rows.padded + i];
      if (control->safe)
        sum.add(rows.scratch[(ranges + range) * rows.padded + i], total);
      else
        sum.total += total;
    }
    redo = !control->safe && !(sum.total >= least && sum.total <= most);
    level = logarithm(sum.total) + (control->safe ? sum.most : T(0));
  }
  bad[threadIdx.x] = redo;
  if (__syncthreads_or(redo)) {
    for (int k = 0; k < kThreads; ++k) {
      if (!bad[k]) continue;
      const T again = redo_row<T, cost>(*control, rows, columns, ground, begin + k, redo_scratch);
      if (static_cast<int>(threadIdx.x) == k) level = again;
    }
  }
  const Sums mine = i < rows.count ? update_row(*control, rows, role, i, level) : Sums{};
  const Sums all = block_sums(mine, sums_scratch);
  if (threadIdx.x == 0) sums[int64_t{blockIdx.z} * gridDim.x + blockIdx.x] = all;
}

__global__ void begin_kernel(Control* controls, const Facts* facts, Options options, const Control* rows,
                             const Control* columns) {
  const int64_t p = blockIdx.z;
  begin(controls[p], facts[p], options, rows ? rows[p].safe : 1, columns ? columns[p].safe : 1);
}

__global__ void __launch_bounds__(kThreads)
    advance_kernel(Control* controls, Event event, const Sums* sums, int64_t count) {
  Control* control = controls + blockIdx.z;
  if (control->done) return;
  __shared__ double scratch[kSums][kWarp];
  Sums mine{};
  for (int64_t k = threadIdx.x; k < count; k += kThreads) mine = combine(mine, sums[int64_t{blockIdx.z} * count + k]);
  const Sums all = block_sums(mine, scratch);
  if (threadIdx.x == 0) advance(*control, event, all);
}

// Element i of the bias.
template <typename T>
__device__ void write_bias(const Cloud<T>& cloud, int64_t i, T potential, T scale) {
  cloud.bias[i] = cloud.log_weights[i] + scale * (potential - cloud.squares[i]);
}

template <typename T>
__global__ void set_bias_kernel(const Control* controls, Cloud<T> clouds) {
  const Cloud<T> cloud = clouds.of(blockIdx.z);
  const T scale = T(kLog2e / controls[blockIdx.z].epsilon);
  for (int64_t i = first_element(); i < cloud.padded; i += stride()) {
    if (i < cloud.count)
      write_bias(cloud, i, cloud.potential[i], scale);
    else
      cloud.bias[i] = T(kLogZero);
  }
}

template <typename T>
__global__ void set_cold_kernel(const Control* controls, Cloud<T> clouds, Role role) {
  if (controls[blockIdx.z].done) return;
  const Cloud<T> cloud = clouds.of(blockIdx.z);
  const T scale = T(kLog2e / controls[blockIdx.z].epsilon);
  for (int64_t i = first_element(); i < cloud.padded; i += stride()) {
    if (i >= cloud.count) {
      cloud.bias[i] = T(kLogZero);
      continue;
    }
    if (cloud.start) cloud.start[i] = role == Role::rows ? cloud.softmin[i] : cloud.potential[i];
    cloud.potential[i] = 0;
    cloud.softmin[i] = 0;
    write_bias(cloud, i, T(0), scale);
  }
}

template <typename T>
__global__ void apply_kernel(const Control* controls, Cloud<T> clouds, Role role) {
  const Control* control = controls + blockIdx.z;
  if (control->done) return;
  const Cloud<T> cloud = clouds.of(blockIdx.z);
  const T scale = T(kLog2e / control->epsilon), omega = T(control->omega), damped = T(control->damping);
  const bool restore = role == Role::rows && control->restore;
  const T shift = role == Role::columns      ? T(-control->translation)
                  : role == Role::translated ? T(control->translation)
                                             : T(0);
  for (int64_t i = first_element(); i < cloud.count; i += stride()) {
    if (restore) cloud.softmin[i] = cloud.start[i];
    const T h = damped * cloud.softmin[i], f = cloud.potential[i];
    const T next = (role == Role::translated ? f : omega == 1 ? h : f + omega * (h - f)) + shift;
    cloud.potential[i] = next;
    cloud.softmin[i] = role == Role::self ? next : cloud.softmin[i] + shift;
    write_bias(cloud, i, next, scale);
  }
}

// Tells the first control whether all are done.
__global__ void __launch_bounds__(kThreads) poll_kernel(Control* controls, int64_t problems) {
  bool going = false;
  for (int64_t p = threadIdx.x; p < problems; p += kThreads) going = going || !controls[p].done;
  going = __syncthreads_or(going);
  if (threadIdx.x == 0) controls->all_done = going ? 0 : controls->done;
}

__global__ void report_kernel(const Control* controls, double* out) {
  const Control* control = controls + blockIdx.z;
  out += 5 * blockIdx.z;
  out[0] = control->row_error + control->column_error;
  out[1] = control->mass;
  out[2] = static_cast<double>(control->iterations);
  out[3] = control->converged;
  out[4] = control->epsilon;
}

constexpr int kForceRows = 32, kForceColumns = 32, kForceDims = 64, kRowsEach = kForceRows * kWarp / kThreads;

// The factor of x - y in the cost's derivative (half of it for the squared cost), from what `accumulate` made.
template <Cost cost, typename T>
__device__ T derivative_factor(T s, T p) {
  if (cost == Cost::euclidean) return s > 0 ? 1 / root(s) : T(0);
  if (cost == Cost::power) return s > 0 ? p * power((p / 2 - 1) * logarithm(s)) : T(0);
  return 1;
}

// A block owns 32 rows and 64 dimensions of the force, or of the plan times values. Per tile of columns: each thread
// computes the plan's entries of 4 rows and its column, then sums over the tile's columns for 4 rows and 2 dimensions.
template <typename T, Cost cost, bool derivative>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    plan_kernel(const Control* controls, Cloud<T> all_rows, Cloud<T> all_columns, Ground<T> ground, const T* values,
                int64_t out_width, T* out, T* mass) {
  const Cloud<T> rows = all_rows.of(blockIdx.z), columns = all_columns.of(blockIdx.z);
  const int64_t dim = rows.dim, source_width = padded_dim<T>(out_width);
  const T* source = derivative ? columns.columns : values + all_columns.first_padded(blockIdx.z) * source_width;
  __shared__ T xs[kForceRows][kDepth + 1], ys[kForceColumns][kDepth + 1];
  __shared__ T weights[kForceRows][kForceColumns + 1];
  __shared__ T points[kForceColumns][kForceDims];
  const int64_t width = padded_dim<T>(dim), row_begin = int64_t{blockIdx.x} * kForceRows;
  if (row_begin >= rows.count) return;
  const int64_t first = all_rows.first(blockIdx.z);
  const int64_t dim_begin = int64_t{blockIdx.y} * kForceDims;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  constexpr int kWarps = kThreads / kWarp;
  const T scale = T(kLog2e / controls[blockIdx.z].epsilon);

  T shift[kRowsEach], row_mass[kRowsEach], total[kRowsEach][2], x[kRowsEach][2];
#pragma unroll
  for (int r = 0; r < kRowsEach; ++r) {
    const int64_t i = row_begin + warp + r * kWarps;
    const bool in = i < rows.count;
    shift[r] = in ? rows.log_weights[i] + scale * (rows.potential[i] - rows.squares[i]) : T(kLogZero);
    row_mass[r] = 0;
    for (int k = 0; k < 2; ++k) {
      const int64_t d = dim_begin + lane + k * kWarp;
      total[r][k] = 0;
      x[r][k] = derivative && in && d < dim ? rows.columns[i * width + d] : T(0);
    }
  }
  for (int64_t column_begin = 0; column_begin < columns.count; column_begin += kForceColumns) {
    T s[kRowsEach] = {};
    for (int64_t from = 0; from < dim; from += kDepth) {
      __syncthreads();
#pragma unroll 1
      for (int k = threadIdx.x; k < kForceRows * kDepth; k += kThreads) {
        const int p = k / kDepth, d = k % kDepth;
        const bool in = from + d < dim;
        xs[p][d] = in && row_begin + p < rows.count ? rows.columns[(row_begin + p) * width + from + d] : T(0);
        ys[p][d] =
            in && column_begin + p < columns.count ? columns.columns[(column_begin + p) * width + from + d] : T(0);
      }
      __syncthreads();
#pragma unroll 4
      for (int d = 0; d < kDepth; ++d) {
        const T y = ys[lane][d];
#pragma unroll
        for (int r = 0; r < kRowsEach; ++r) {
          const T xr = xs[warp + r * kWarps][d];
          accumulate<cost>(s[r], xr, y);
        }
      }
    }
    const int64_t j = column_begin + lane;
    const T bias = j < columns.count ? columns.bias[j] : T(kLogZero);
#pragma unroll
    for (int r = 0; r < kRowsEach; ++r) {
      const T plan = power(bias + shift[r] - scale * cost_of<cost>(s[r], ground.power));
      row_mass[r] += plan;
      weights[warp + r * kWarps][lane] = derivative ? plan * derivative_factor<cost>(s[r], ground.power) : plan;
    }
#pragma unroll 1
    for (int k = threadIdx.x; k < kForceColumns * kForceDims; k += kThreads) {
      const int64_t p = column_begin + k / kForceDims, d = dim_begin + k % kForceDims;
      points[k / kForceDims][k % kForceDims] = p < columns.count && d < out_width ? source[p * source_width + d] : T(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int c = 0; c < kForceColumns; ++c) {
#pragma unroll
      for (int r = 0; r < kRowsEach; ++r) {
        const T w = weights[warp + r * kWarps][c];
        for (int k = 0; k < 2; ++k) {
          const T y = points[c][lane + k * kWarp], z = x[r][k] - y;
          if (!derivative)
            total[r][k] += w * y;
          else if (cost == Cost::manhattan)
            total[r][k] += z > 0 ? w : z < 0 ? -w : T(0);
          else
            total[r][k] += w * z;
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < kRowsEach; ++r) {
    const int64_t i = row_begin + warp + r * kWarps;
    const T sum = device::warp_reduce<device::Sum>(row_mass[r]);
    if (i >= rows.count) continue;
    if (derivative && lane == 0 && blockIdx.y == 0) mass[first + i] = sum;
    for (int k = 0; k < 2; ++k) {
      const int64_t d = dim_begin + lane + k * kWarp;
      if (d < out_width) out[(first + i) * out_width + d] = total[r][k];
    }
  }
}

template <typename T>
void pack(const T* points, const int64_t* offsets, int64_t count, int64_t dim, int64_t problems, T* columns,
          Stream stream) {
  const int64_t size = columns_size<T>(count, dim);
  WGAN_EXT_LAUNCH((pack_kernel<T>), elementwise_grid(size, problems), kThreads, 0, stream, points, offsets, count, dim,
                  size, columns);
}

// What this host thread last saw of its solve. The device writes the solve's number into `done`, so that a late copy of
// an earlier solve is not taken for this one's.
struct Poll {
  int device = -1;
  int32_t number = 0;
  int64_t count = 0;
  int32_t* seen = nullptr;  // [2] pinned
  cudaEvent_t events[2] = {};
};
#if defined(WGAN_EXT_EMULATED)
Poll poll;  // one host thread
#else
thread_local Poll poll;
#endif

dim3 one_block(int64_t problems) { return dim3(1, 1, static_cast<unsigned>(problems)); }

void begin_solve(Control* controls, const Facts* facts, const Options& options, const Control* rows,
                 const Control* columns, int64_t problems, Stream stream) {
  poll.number = poll.number % 0x7fffffff + 1;
  poll.count = 0;
  Options numbered = options;
  numbered.number = poll.number;
  WGAN_EXT_LAUNCH(begin_kernel, one_block(problems), 1, 0, stream, controls, facts, numbered, rows, columns);
}

bool finished(Control* controls, int64_t problems, Stream stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus capture;
  check_cuda(cudaStreamIsCapturing(s, &capture), "cudaStreamIsCapturing");
  if (capture != cudaStreamCaptureStatusNone) return false;
  int device;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  if (poll.device != device) {
    if (!poll.seen) check_cuda(cudaMallocHost(&poll.seen, 2 * sizeof *poll.seen), "cudaMallocHost");
    for (cudaEvent_t& event : poll.events) {
      if (event) check_cuda(cudaEventDestroy(event), "cudaEventDestroy");
      check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
    }
    poll.device = device;
  }
  const int64_t now = poll.count++ % 2, before = 1 - now;
  WGAN_EXT_LAUNCH(poll_kernel, 1, kThreads, 0, stream, controls, problems);
  check_cuda(cudaMemcpyAsync(poll.seen + now, &controls->all_done, sizeof(int32_t), cudaMemcpyDeviceToHost, s),
             "cudaMemcpy");
  check_cuda(cudaEventRecord(poll.events[now], s), "cudaEventRecord");
  if (poll.count == 1) return false;
  check_cuda(cudaEventSynchronize(poll.events[before]), "cudaEventSynchronize");
  return static_cast<volatile int32_t*>(poll.seen)[before] == poll.number;
}

template <typename T>
void set_bias(const Control* controls, const Cloud<T>& clouds, int64_t problems, Stream stream) {
  WGAN_EXT_LAUNCH((set_bias_kernel<T>), elementwise_grid(clouds.padded, problems), kThreads, 0, stream, controls,
                  clouds);
}

template <typename T>
void set_cold(const Control* controls, const Cloud<T>& clouds, Role role, int64_t problems, Stream stream) {
  WGAN_EXT_LAUNCH((set_cold_kernel<T>), elementwise_grid(clouds.padded, problems), kThreads, 0, stream, controls,
                  clouds, role);
}

template <Cost cost>
struct Constant {
  static constexpr Cost value = cost;
};

// Calls body with the cost of points as a constant of its type.
template <typename Body>
void with_point_cost(Cost cost, const Body& body) {
  if (cost == Cost::sqeuclidean) return body(Constant<Cost::sqeuclidean>{});
  if (cost == Cost::euclidean) return body(Constant<Cost::euclidean>{});
  if (cost == Cost::manhattan) return body(Constant<Cost::manhattan>{});
  return body(Constant<Cost::power>{});
}

template <typename T>
void pass(const Control* controls, const Cloud<T>& rows, const Cloud<T>& columns, const Ground<T>& ground, Role role,
          int64_t problems, Sums* sums, Stream stream) {
  const int64_t parts = ranges<T>(rows.count, columns.count);
  const unsigned depth = static_cast<unsigned>(problems);
  const dim3 grid(static_cast<unsigned>(ceil_div(rows.count, Tile<T>::rows)), static_cast<unsigned>(parts), depth);
  const dim3 finish_grid(static_cast<unsigned>(sums_size(rows.count, 0, 0, ground.cost)), 1, depth);
  const auto launch = [&](auto constant) {
    constexpr Cost cost = decltype(constant)::value;
    WGAN_EXT_LAUNCH((pass_kernel<T, cost>), grid, kThreads, 0, stream, controls, rows, columns, ground);
    WGAN_EXT_LAUNCH((finish_kernel<T, cost>), finish_grid, kThreads, 0, stream, controls, rows, columns, ground, role,
                    parts, sums);
  };
  if (ground.cost == Cost::matrix) return launch(Constant<Cost::matrix>{});
  with_point_cost(ground.cost, launch);
}

void advance_solve(Control* controls, Event event, const Sums* sums, int64_t count, int64_t problems, Stream stream) {
  WGAN_EXT_LAUNCH(advance_kernel, one_block(problems), kThreads, 0, stream, controls, event, sums, count);
}

template <typename T>
void apply(const Control* controls, const Cloud<T>& clouds, Role role, int64_t problems, Stream stream) {
  WGAN_EXT_LAUNCH((apply_kernel<T>), elementwise_grid(clouds.count, problems), kThreads, 0, stream, controls, clouds,
                  role);
}

void report(const Control* controls, int64_t problems, double* out, Stream stream) {
  WGAN_EXT_LAUNCH(report_kernel, one_block(problems), 1, 0, stream, controls, out);
}

template <typename T, bool derivative>
void launch_plan(const Control* controls, const Cloud<T>& rows, const Cloud<T>& columns, const Ground<T>& ground,
                 int64_t problems, const T* values, int64_t width, T* out, T* mass, Stream stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(rows.count, kForceRows)),
                  static_cast<unsigned>(ceil_div(width, kForceDims)), static_cast<unsigned>(problems));
  with_point_cost(ground.cost, [&](auto constant) {
    constexpr Cost cost = decltype(constant)::value;
    WGAN_EXT_LAUNCH((plan_kernel<T, cost, derivative>), grid, kThreads, 0, stream, controls, rows, columns, ground,
                    values, width, out, mass);
  });
}

template <typename T>
void gradient(const Control* controls, const Cloud<T>& rows, const Cloud<T>& columns, const Ground<T>& ground,
              int64_t problems, T* force, T* mass, Stream stream) {
  launch_plan<T, true>(controls, rows, columns, ground, problems, nullptr, rows.dim, force, mass, stream);
}

template <typename T>
void transport(const Control* controls, const Cloud<T>& rows, const Cloud<T>& columns, const Ground<T>& ground,
               int64_t problems, const T* values, int64_t width, T* out, Stream stream) {
  launch_plan<T, false>(controls, rows, columns, ground, problems, values, width, out, nullptr, stream);
}

template <typename T>
const Kernels<T>& table() {
  static constexpr Kernels<T> kernels = {16,          true,        columns_size<T>, padded<T>,     scratch_size<T>,
                                         sums_size,   nullptr,     pack<T>,         nullptr,       begin_solve,
                                         set_bias<T>, set_cold<T>, pass<T>,         advance_solve, apply<T>,
                                         finished,    report,      gradient<T>,     transport<T>};
  return kernels;
}

}  // namespace

template <>
const Kernels<float>& Kernels<float>::cuda() {
  return table<float>();
}
template <>
const Kernels<double>& Kernels<double>::cuda() {
  return table<double>();
}

}  // namespace wgan_ext::sinkhorn
