// Sinkhorn on CUDA.
//
// A pass is two kernels. `pass_kernel`: a block owns a tile of rows and a range of columns; tiles of columns come to
// shared memory while the one before is used, each thread keeps 8 x 4 exponents (4 x 2 in double) in registers and adds
// their exp2. Where dimensions are many `tensor_pass_kernel` does the same. `finish_kernel`: one thread a row adds the
// ranges, does again (the whole block) rows that left the range of T, writes the softmin and sums what the controller
// asks. The controller is one thread on the device; every kernel returns at once when the solve is done, so the host
// only enqueues, and looks at a flag copied to pinned memory one batch of iterations ago. The third dimension of every
// grid counts the problems of a batch. Tiles and ranges depend on shape alone and sums have a fixed order: results are
// deterministic.
#include <cstdint>
#include <type_traits>

#include "exponent.cuh"
#include "tensor.cuh"

namespace wgan_ext::sinkhorn {
namespace {

using device::block_reduce;
using device::kFullMask;
using device::kWarp;

constexpr int kSide = 16;                 // a block is 16 x 16 threads
constexpr int kDepth = 16;                // dimensions in shared memory at a time
constexpr int64_t kResidentBlocks = 264;  // that an H100 runs at once: 2 on each of 132 multiprocessors
constexpr int64_t kMostRanges = 64;
constexpr int64_t kMostBlocks = kLoopBlocks;
constexpr int kMostConstantDim = 4;  // up to which the number of dimensions is known to the compiler

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
static_assert(Tile<float>::rows == kTensorRows && Tile<float>::columns == kTensorColumns);

template <typename T>
int64_t padded(int64_t count) {
  return ceil_div(count, Tile<T>::rows) * Tile<T>::rows;  // whole tiles of rows are whole tiles of columns
}

// Coordinate d of point i of a packed cloud: [tiles of columns, dim, points of a tile].
template <typename T>
__host__ __device__ constexpr int64_t coordinate(int64_t dim, int64_t i, int64_t d) {
  constexpr int64_t points = Tile<T>::columns;
  return (i / points * dim + d) * points + i % points;
}

template <typename T>
__host__ __device__ constexpr bool has_split(int64_t dim) {
  return sizeof(T) == sizeof(float) && dim >= kTensorDim;
}

// What a padded point takes: its coordinates, and behind those of all its split ones.
template <typename T>
__host__ __device__ int64_t columns_width(int64_t dim) {
  return dim + (has_split<T>(dim) ? split_width(dim) : 0);
}

template <typename T>
int64_t columns_size(int64_t count, int64_t dim) {
  return padded<T>(count) * columns_width<T>(dim);
}

// Into how many ranges the columns are cut: blocks go in rounds, and one takes as long as its tiles and about one more.
template <typename T>
int64_t ranges(int64_t row_count, int64_t column_count) {
  const int64_t tiles = ceil_div(column_count, Tile<T>::columns), strips = ceil_div(row_count, Tile<T>::rows);
  int64_t best = 1, least = INT64_MAX;
  for (int64_t count = 1; count <= tiles && count <= kMostRanges; ++count) {
    const int64_t time = ceil_div(strips * count, kResidentBlocks) * (ceil_div(tiles, count) + 1);
    if (time < least) {
      least = time;
      best = count;
    }
  }
  return best;
}

// The sums of each row that finish_kernel adds up.
template <typename T>
int64_t parts(int64_t row_count, int64_t column_count, int64_t dim, Cost cost) {
  const bool tensor = cost == Cost::sqeuclidean && has_split<T>(dim);
  return ranges<T>(row_count, column_count) * (tensor ? kWarpsAcross : 1);
}

// Each part's sum and maximum for each row.
template <typename T>
int64_t scratch_size(int64_t count, int64_t dim, int64_t other_count, Cost cost) {
  return 2 * parts<T>(count, other_count, dim, cost) * padded<T>(count);
}

int64_t sums_size(int64_t count, int64_t, int64_t, Cost) { return ceil_div(count, kThreads); }

dim3 elementwise_grid(int64_t count, int64_t problems) {
  const int64_t blocks = ceil_div(count, kThreads);
  return dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks), 1, static_cast<unsigned>(problems));
}

__device__ inline int64_t first_element() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ inline int64_t stride() { return int64_t{gridDim.x} * blockDim.x; }

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
__global__ void pack_kernel(const T* points, const int64_t* offsets, int64_t count, int64_t dim, T* columns) {
  constexpr int64_t tile = Tile<T>::columns;
  const Extent extent(offsets, count, Tile<T>::rows);
  points += extent.first * dim;
  columns += extent.first_padded * columns_width<T>(dim);
  for (int64_t k = first_element(); k < extent.padded * dim; k += stride()) {
    const int64_t d = k / tile % dim, i = k / (tile * dim) * tile + k % tile;
    columns[k] = i < extent.count ? points[i * dim + d] : T(0);
  }
}

template <typename T>
struct Slots {
  T rows[2][kDepth][Tile<T>::rows];
  T columns[2][kDepth][Tile<T>::columns];
};

// How many of a thread's 8 rows leave one of their 4 powers to the polynomial, for that many dimensions.
__host__ __device__ constexpr int polynomial_rows(int dim) { return dim == 0 || dim > 3 ? 0 : dim == 3 ? 3 : 4; }

// `constant_dim` is the number of dimensions, or 0 where the compiler does not know it. If it does, rows stay in
// registers.
template <typename T, Cost cost, bool safe, int constant_dim>
__device__ void pass_range(const Control& control, const Cloud<T>& rows, const Cloud<T>& columns,
                           const Ground<T>& ground, int first_tile, int last_tile, Slots<T>& shared) {
  using Shape = Tile<T>;
  constexpr int size = Quad<T>::size, R = Shape::rows_each, C = Shape::columns_each;
  constexpr bool has_points = cost != Cost::matrix, rows_shared = has_points && constant_dim == 0;
  // where dimensions are more, the tensor cores have them
  constexpr bool one_chunk = !has_points || constant_dim > 0 || (cost == Cost::sqeuclidean && has_split<T>(kDepth));
  static_assert(kThreads == kDepth * kSide);  // each fetches one quad of a tile of columns
  const int dim = constant_dim ? constant_dim : has_points ? static_cast<int>(rows.dim) : 0;
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  const T scale = T(kLog2e / control.epsilon), row_scale = cost == Cost::sqeuclidean ? 2 * scale : T(1);
  const int64_t row_begin = int64_t{blockIdx.x} * Shape::rows;
  const T* matrix = has_points ? nullptr : matrix_of(ground, rows, columns);

  const auto row = [&](int r) { return row_begin + (r / size * kSide + ty) * size + r % size; };
  T shift[R], x[R][constant_dim ? constant_dim : 1];
  Scaled<T> sum[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t i = row(r);
    shift[r] = i < rows.count ? scale * (rows.softmin[i] - rows.squares[i]) : T(0);
    if constexpr (constant_dim > 0) {
#pragma unroll
      for (int d = 0; d < constant_dim; ++d) x[r][d] = row_scale * rows.columns[coordinate<T>(constant_dim, i, d)];
    }
  }

  const auto fetch = [&](const Step& step) {
    const int d = step.chunk * kDepth + ty;
    if (d >= dim) return;
    device::copy_async(&shared.columns[step.parity][ty][tx * size],
                       columns.columns + (int64_t{step.tile} * dim + d) * Shape::columns + tx * size);
    if constexpr (rows_shared) {
      if (!step.brings_rows(first_tile)) return;
      const T* from = rows.columns + (row_begin / Shape::columns * dim + d) * Shape::columns + tx * size;
      T* to = &shared.rows[step.row_slot()][ty][tx * size];
      device::copy_async(to, from);
      device::copy_async(to + Shape::columns, from + dim * Shape::columns);
    }
  };
  // By the threads that fetched them, so that no barrier is needed.
  const auto scale_rows = [&](const Step& step) {
    if constexpr (rows_shared && cost == Cost::sqeuclidean) {
      if (!step.brings_rows(first_tile) || step.chunk * kDepth + ty >= dim) return;
      T* to = &shared.rows[step.row_slot()][ty][tx * size];
#pragma unroll
      for (int e = 0; e < size; ++e) {
        to[e] *= row_scale;
        to[Shape::columns + e] *= row_scale;
      }
    }
  };
  const auto bias_of = [&](int tile) {
    return *reinterpret_cast<const Quad<T>*>(columns.bias + int64_t{tile} * Shape::columns + tx * C);
  };

  T s[R][C];
  Step now(first_tile, one_chunk ? 1 : (dim + kDepth - 1) / kDepth), next = now;
  if (has_points && now.tile < last_tile) fetch(next);
  for (; now.tile < last_tile; now.advance()) {
    if (has_points) {
      device::wait_copies();
      scale_rows(now);
      __syncthreads();
      next.advance();
      if (next.tile < last_tile) fetch(next);
    }
    if (now.chunk == 0) {
      Quad<T> bias{};
      if (cost == Cost::sqeuclidean) bias = bias_of(now.tile);
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int c = 0; c < C; ++c) s[r][c] = cost == Cost::sqeuclidean ? bias.value[c] + shift[r] : T(0);
    }
    const auto add_dimension = [&](int d) {
      const Quad<T> y = *reinterpret_cast<const Quad<T>*>(&shared.columns[now.parity][d][tx * C]);
      Quad<T> quads[2];
      if (rows_shared) {
        const auto& from = shared.rows[now.row_slot()][d];
        quads[0] = *reinterpret_cast<const Quad<T>*>(&from[ty * size]);
        quads[1] = *reinterpret_cast<const Quad<T>*>(&from[(kSide + ty) * size]);
      }
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int c = 0; c < C; ++c) {
          const T xr = rows_shared ? quads[r / size].value[r % size] : x[r][constant_dim ? d : 0];
          accumulate<cost>(s[r][c], xr, y.value[c]);
        }
    };
    if constexpr (constant_dim > 0) {
#pragma unroll
      for (int d = 0; d < constant_dim; ++d) add_dimension(d);
    } else if (has_points) {
      const int left = dim - now.chunk * kDepth, depth = left < kDepth ? left : kDepth;
#pragma unroll 4
      for (int d = 0; d < depth; ++d) add_dimension(d);
    }
    if (!now.completes_tile()) continue;
    const int64_t column_begin = int64_t{now.tile} * Shape::columns;
    Quad<T> bias{};
    if (cost != Cost::sqeuclidean) bias = bias_of(now.tile);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (cost != Cost::sqeuclidean) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
          T pair = 0;
          if (has_points) {
            pair = cost_of<cost>(s[r][c], ground.power);
          } else {
            const int64_t j = column_begin + tx * C + c;
            if (row(r) < rows.count && j < columns.count) pair = matrix[place(ground, rows, columns, row(r), j)];
          }
          s[r][c] = bias.value[c] + shift[r] - scale * pair;
        }
      }
      if (r < polynomial_rows(constant_dim))
        sum[r].template add_powers<safe, 1>(s[r]);
      else
        sum[r].template add_powers<safe, 0>(s[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    sum[r].template add_lanes<safe, kSide>();
    if (tx == 0 && row(r) < rows.count) sum[r].template write<safe>(rows, gridDim.y, blockIdx.y, row(r));
  }
}

template <typename T, Cost cost, int constant_dim>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    pass_kernel(const Control* controls, Cloud<T> all_rows, Cloud<T> all_columns, Ground<T> ground) {
  const Control* control = controls + blockIdx.z;
  if (control->done) return;
  const Cloud<T> rows = all_rows.of(blockIdx.z), columns = all_columns.of(blockIdx.z);
  if (int64_t{blockIdx.x} * Tile<T>::rows >= rows.count) return;
  __shared__ Slots<T> shared;
  const int64_t tiles = ceil_div(columns.count, Tile<T>::columns), ranges = gridDim.y, range = blockIdx.y;
  const int first = static_cast<int>(tiles * range / ranges), last = static_cast<int>(tiles * (range + 1) / ranges);
  if (control->safe)
    pass_range<T, cost, true, constant_dim>(*control, rows, columns, ground, first, last, shared);
  else
    pass_range<T, cost, false, constant_dim>(*control, rows, columns, ground, first, last, shared);
}

// log2 of one row's sum, by the whole block, with a running maximum.
template <typename T, Cost cost>
__device__ T redo_row(const Control& control, const Cloud<T>& rows, const Cloud<T>& columns, const Ground<T>& ground,
                      int64_t i, T* scratch) {
  const T scale = T(kLog2e / control.epsilon);
  const T shift = scale * (rows.softmin[i] - rows.squares[i]);
  Scaled<T> sum;
  for (int64_t j = threadIdx.x; j < columns.count; j += kThreads) {
    T pair = 0;
    if (cost == Cost::matrix) {
      pair = matrix_of(ground, rows, columns)[place(ground, rows, columns, i, j)];
    } else {
      for (int64_t d = 0; d < rows.dim; ++d)
        accumulate<cost>(pair, rows.columns[coordinate<T>(rows.dim, i, d)],
                         columns.columns[coordinate<T>(rows.dim, j, d)]);
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
                  int64_t parts, Sums* sums) {
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
    for (int64_t part = 0; part < parts; ++part) {
      const T total = rows.scratch[part * rows.padded + i];
      if (control->safe)
        sum.add(rows.scratch[(parts + part) * rows.padded + i], total);
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
  const int64_t dim = rows.dim;
  const T* source =
      derivative ? columns.columns : values + all_columns.first_padded(blockIdx.z) * columns_width<T>(out_width);
  __shared__ T xs[kForceRows][kDepth + 1], ys[kForceColumns][kDepth + 1];
  __shared__ T weights[kForceRows][kForceColumns + 1];
  __shared__ T points[kForceColumns][kForceDims + 1];
  const int64_t row_begin = int64_t{blockIdx.x} * kForceRows;
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
      x[r][k] = derivative && in && d < dim ? rows.columns[coordinate<T>(dim, i, d)] : T(0);
    }
  }
  for (int64_t column_begin = 0; column_begin < columns.count; column_begin += kForceColumns) {
    T s[kRowsEach] = {};
    for (int64_t from = 0; from < dim; from += kDepth) {
      __syncthreads();
#pragma unroll 1
      for (int k = threadIdx.x; k < kForceRows * kDepth; k += kThreads) {
        const int p = k % kForceRows, d = k / kForceRows;
        const bool in = from + d < dim;
        xs[p][d] = in ? rows.columns[coordinate<T>(dim, row_begin + p, from + d)] : T(0);
        ys[p][d] = in ? columns.columns[coordinate<T>(dim, column_begin + p, from + d)] : T(0);
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
      const int c = k % kForceColumns, d = k / kForceColumns;
      points[c][d] =
          dim_begin + d < out_width ? source[coordinate<T>(out_width, column_begin + c, dim_begin + d)] : T(0);
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

dim3 one_block(int64_t problems) { return dim3(1, 1, static_cast<unsigned>(problems)); }

void split(const float* points, const int64_t* offsets, int64_t count, int64_t dim, int64_t problems, float* columns,
           Stream stream) {
  const int64_t width = columns_width<float>(dim), blocks = ceil_div(count * dim, kThreads * kScaleLoads);
  const dim3 scale_grid(static_cast<unsigned>(blocks < kScaleBlocks ? blocks : kScaleBlocks), 1,
                        static_cast<unsigned>(problems));
  WGAN_EXT_LAUNCH(scale_kernel, scale_grid, kThreads, 0, stream, points, offsets, count, dim, width, columns);
  WGAN_EXT_LAUNCH(split_kernel, elementwise_grid(padded<float>(count) * tensor_chunks(dim) * kTensorDepth, problems),
                  kThreads, 0, stream, points, offsets, count, dim, width, static_cast<int>(scale_grid.x), columns);
}
void split(const double*, const int64_t*, int64_t, int64_t, int64_t, double*, Stream) {}

template <typename T>
void pack(const T* points, const int64_t* offsets, int64_t count, int64_t dim, int64_t problems, T* columns,
          Stream stream) {
  if (dim == 0) return;
  WGAN_EXT_LAUNCH((pack_kernel<T>), elementwise_grid(padded<T>(count) * dim, problems), kThreads, 0, stream, points,
                  offsets, count, dim, columns);
  if (has_split<T>(dim)) split(points, offsets, count, dim, problems, columns, stream);
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

template <typename T, Cost cost, int constant_dim>
void launch_pass(const Control* controls, const Cloud<T>& rows, const Cloud<T>& columns, const Ground<T>& ground,
                 dim3 grid, Stream stream) {
  if constexpr (constant_dim > 0) {
    if (rows.dim != constant_dim)
      return launch_pass<T, cost, constant_dim - 1>(controls, rows, columns, ground, grid, stream);
  }
  WGAN_EXT_LAUNCH((pass_kernel<T, cost, constant_dim>), grid, kThreads, 0, stream, controls, rows, columns, ground);
}

void launch_tensor_pass(const Control* controls, const Cloud<float>& rows, const Cloud<float>& columns, dim3 grid,
                        Stream stream) {
  if (rows.dim <= kTensorDepth)
    WGAN_EXT_LAUNCH((tensor_pass_kernel<true>), grid, kThreads, 0, stream, controls, rows, columns);
  else
    WGAN_EXT_LAUNCH((tensor_pass_kernel<false>), grid, kThreads, 0, stream, controls, rows, columns);
}
void launch_tensor_pass(const Control*, const Cloud<double>&, const Cloud<double>&, dim3, Stream) {}

template <typename T>
void pass(const Control* controls, const Cloud<T>& rows, const Cloud<T>& columns, const Ground<T>& ground, Role role,
          int64_t problems, Sums* sums, Stream stream) {
  const int64_t cuts = ranges<T>(rows.count, columns.count);
  const unsigned depth = static_cast<unsigned>(problems);
  const dim3 grid(static_cast<unsigned>(ceil_div(rows.count, Tile<T>::rows)), static_cast<unsigned>(cuts), depth);
  const dim3 finish_grid(static_cast<unsigned>(sums_size(rows.count, 0, 0, ground.cost)), 1, depth);
  const auto launch = [&](auto constant) {
    constexpr Cost cost = decltype(constant)::value;
    constexpr bool fast = std::is_same_v<T, float> && cost == Cost::sqeuclidean;
    if (cost == Cost::sqeuclidean && has_split<T>(rows.dim))
      launch_tensor_pass(controls, rows, columns, grid, stream);
    else
      launch_pass<T, cost, fast ? kMostConstantDim : 0>(controls, rows, columns, ground, grid, stream);
    WGAN_EXT_LAUNCH((finish_kernel<T, cost>), finish_grid, kThreads, 0, stream, controls, rows, columns, ground, role,
                    parts<T>(rows.count, columns.count, rows.dim, cost), sums);
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
  static constexpr Kernels<T> kernels = {
      16,       true,    false,       columns_size<T>, padded<T>,   scratch_size<T>, sums_size,     nullptr,
      pack<T>,  nullptr, begin_solve, set_bias<T>,     set_cold<T>, pass<T>,         advance_solve, apply<T>,
      finished, report,  gradient<T>, transport<T>};
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
