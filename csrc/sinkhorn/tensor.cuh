// A pass over points of many dimensions on the tensor cores, with the accuracy of float32.
//
// A tensor core multiplies numbers of 11 bits. Each coordinate x is split, once a solve: times a power of two that
// takes the cloud's greatest to [2^14, 2^15) it is high + low, both float16, 22 bits in all, and x y is high high +
// high low + low high. What is cut off is below 2^-22 |x y|, or 2^-40 of the clouds' greatest |x| |y|. Of the splits
// that reach this, it takes the fewest instructions a 16 x 8 tile and 16 dimensions: 3, where TensorFloat32 takes 6,
// and bfloat16, of 8 bits, in three parts also 6. Tensor cores cut their sums off towards zero, which adds up, so 16
// dimensions at a time are summed anew, the small products first, and added to the others rounded (Ootomo and Yokota,
// Recovering Single Precision Accuracy from Tensor Cores, 2022).
#pragma once
#include "../cuda/half.cuh"
#include "exponent.cuh"

namespace wgan_ext::sinkhorn {

constexpr int64_t kTensorDim = 16;  // the least
constexpr int kTensorDepth = 32;  // dimensions in shared memory at a time: 64 bytes of high and 64 of low parts a point
constexpr int kTensorRows = 128, kTensorColumns = 64;
constexpr int kWarpRows = 32, kWarpColumns = 32, kWarpsAcross = kTensorColumns / kWarpColumns;
constexpr int kUnits = 8;  // of 16 bytes, that hold a point's chunk

constexpr int64_t kScaleBlocks = 64, kScaleLoads = 16;  // at most; points' coordinates a thread of them wants

// The split points of a problem: a header in the room of one float a padded point, then [padded, chunks, 2,
// kTensorDepth] halves.
struct alignas(16) SplitHeader {
  float scale, unscale;
  float unused[2];
  float greatest[kScaleBlocks];  // coordinate that each block of scale_kernel has found
};
static_assert(sizeof(SplitHeader) <= kTensorRows * sizeof(float));  // the least that is padded to

inline __host__ __device__ int64_t tensor_chunks(int64_t dim) { return ceil_div(dim, kTensorDepth); }

// In floats a padded point.
inline __host__ __device__ int64_t split_width(int64_t dim) { return 1 + tensor_chunks(dim) * kTensorDepth; }

// Where they are in Cloud::columns: behind the packed points.
struct Split {
  SplitHeader* header;
  uint4* units;

  __device__ Split(float* columns, int64_t padded, int64_t dim)
      : header(reinterpret_cast<SplitHeader*>(columns + padded * dim)),
        units(reinterpret_cast<uint4*>(columns + padded * (dim + 1))) {}
  __device__ explicit Split(const Cloud<float>& cloud)
      : Split(const_cast<float*>(cloud.columns), cloud.padded, cloud.dim) {}
};

__global__ void __launch_bounds__(kThreads) scale_kernel(const float* points, const int64_t* offsets, int64_t count,
                                                         int64_t dim, int64_t columns_width, float* columns) {
  __shared__ float scratch[device::kWarp];
  const Extent extent(offsets, count, kTensorRows);
  points += extent.first * dim;
  const Split split(columns + extent.first_padded * columns_width, extent.padded, dim);
  float most = 0;
  const int64_t step = int64_t{gridDim.x} * kThreads;
#pragma unroll 8
  for (int64_t k = int64_t{blockIdx.x} * kThreads + threadIdx.x; k < extent.count * dim; k += step)
    most = greater(most, magnitude(points[k]));
  most = device::block_reduce<device::Max>(most, scratch, 0.0f);
  if (threadIdx.x == 0) split.header->greatest[blockIdx.x] = most;
}

// The power of two that points are multiplied by, and its inverse. What is not finite keeps it 1, and stays.
__device__ inline float2 split_scale(float greatest) {
  const int exponent = static_cast<int>(__float_as_uint(greatest) >> 23);
  if (!(greatest > 0) || exponent == 255) return {1, 1};
  const int up = 14 + 127 - exponent < 126 ? 14 + 127 - exponent : 126;
  return {__uint_as_float(static_cast<unsigned>(127 + up) << 23),
          __uint_as_float(static_cast<unsigned>(127 - up) << 23)};
}

__global__ void __launch_bounds__(kThreads)
    split_kernel(const float* points, const int64_t* offsets, int64_t count, int64_t dim, int64_t columns_width,
                 int scale_blocks, float* columns) {
  __shared__ float scratch[device::kWarp];
  const Extent extent(offsets, count, kTensorRows);
  points += extent.first * dim;
  const Split split(columns + extent.first_padded * columns_width, extent.padded, dim);
  const int t = threadIdx.x;
  const float mine = t < scale_blocks ? split.header->greatest[t] : 0.0f;
  const float2 scale = split_scale(device::block_reduce<device::Max>(mine, scratch, 0.0f));
  if (blockIdx.x == 0 && t == 0) {
    split.header->scale = scale.x;
    split.header->unscale = scale.y;
  }
  Half* halves = reinterpret_cast<Half*>(split.units);
  const int64_t width = tensor_chunks(dim) * kTensorDepth, step = int64_t{gridDim.x} * kThreads;
  for (int64_t k = int64_t{blockIdx.x} * kThreads + t; k < extent.padded * width; k += step) {
    const int64_t i = k / width, d = k % width;
    const float x = i < extent.count && d < dim ? scale.x * points[i * dim + d] : 0.0f;
    Half* to = halves + 2 * (k - d % kTensorDepth) + d % kTensorDepth;
    device::narrow(to[0], x);
    device::narrow(to[kTensorDepth], x - device::widen(to[0]));
  }
}

// A point's units lie rotated by its number, so that the same unit of 8 neighbours lies in different banks.
struct TensorSlots {
  uint4 rows[2][kTensorRows][kUnits];
  uint4 columns[2][kTensorColumns][kUnits];
};

template <int count>
__device__ void fetch_units(const uint4* split, int64_t first_point, const Step& step, uint4 (&slot)[count][kUnits]) {
  const int unit = threadIdx.x % kUnits;
  split += (first_point * step.chunks + step.chunk) * kUnits;
#pragma unroll
  for (int p = threadIdx.x / kUnits; p < count; p += kThreads / kUnits)
    device::copy_async(&slot[p][unit ^ p % kUnits], split + (p * step.chunks * kUnits + unit));
}

// A warp owns 32 x 32 pairs, as 2 x 4 tiles of 16 x 8. A lane holds of each tile two neighbouring columns in two rows.
template <bool safe, bool one_chunk>
__device__ void tensor_range(const Control& control, const Cloud<float>& rows, const Cloud<float>& columns,
                             int first_tile, int last_tile, TensorSlots& shared) {
  constexpr int across = 2, down = 4;  // tiles; rows and columns of products are the tensor cores' m and n
  const int lane = threadIdx.x % device::kWarp, warp = threadIdx.x / device::kWarp;
  const int row_begin = warp / kWarpsAcross * kWarpRows, column_begin = warp % kWarpsAcross * kWarpColumns;
  const int64_t first_row = int64_t{blockIdx.x} * kTensorRows + row_begin + lane / 4;
  const double scale = kLog2e / control.epsilon;
  const Split row_split(rows), column_split(columns);
  const float factor = static_cast<float>(2 * scale * row_split.header->unscale * column_split.header->unscale);
  const int dim = static_cast<int>(rows.dim);

  float shift[across][2];
  Scaled<float> sum[across][2];
#pragma unroll
  for (int r = 0; r < 2 * across; ++r) {
    const int64_t i = first_row + 8 * r;
    shift[r / 2][r % 2] = i < rows.count ? static_cast<float>(scale) * (rows.softmin[i] - rows.squares[i]) : 0.0f;
  }
  // Where this lane's rows of the operands lie: of a, rows l % 16 and units l / 16; of b, two tiles of 8 columns.
  const int a_point = row_begin + lane % 16, a_unit = lane / 16;
  const int b_point = column_begin + lane / 16 * 8 + lane % 8, b_unit = lane / 8 % 2;

  const auto fetch = [&](const Step& step) {
    fetch_units(column_split.units, int64_t{step.tile} * kTensorColumns, step, shared.columns[step.parity]);
    if (step.brings_rows(first_tile))
      fetch_units(row_split.units, int64_t{blockIdx.x} * kTensorRows, step, shared.rows[step.row_slot()]);
  };
  float s[across][2][2 * down];
  Step now(first_tile, one_chunk ? 1 : static_cast<int>(tensor_chunks(dim))), next = now;
  if (now.tile < last_tile) fetch(next);
  for (; now.tile < last_tile; now.advance()) {
    device::wait_copies();
    __syncthreads();
    next.advance();
    if (next.tile < last_tile) fetch(next);
    if (now.chunk == 0) {
      const float* bias = columns.bias + int64_t{now.tile} * kTensorColumns + column_begin + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < down; ++n) {
        const float2 b = *reinterpret_cast<const float2*>(bias + 8 * n);
#pragma unroll
        for (int r = 0; r < 2 * across; ++r) {
          s[r / 2][r % 2][2 * n] = b.x + shift[r / 2][r % 2];
          s[r / 2][r % 2][2 * n + 1] = b.y + shift[r / 2][r % 2];
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kTensorDepth / 16; ++k) {
      if (now.chunk * kTensorDepth + 16 * k >= dim) break;
      float c[across][down][4] = {};
      // Parts 0 are high, 1 low. No more operands are held than needed.
      const auto load_a = [&](uint32_t (&a)[across][4], int part) {
        const int unit = (part * kUnits / 2 + 2 * k + a_unit) ^ lane % kUnits;
#pragma unroll
        for (int m = 0; m < across; ++m)
          device::load_matrices(a[m], &shared.rows[now.row_slot()][a_point + 16 * m][unit]);
      };
      const auto load_b = [&](uint32_t (&b)[4], int part, int pair) {
        const int unit = (part * kUnits / 2 + 2 * k + b_unit) ^ lane % kUnits;
        device::load_matrices(b, &shared.columns[now.parity][b_point + 16 * pair][unit]);
      };
      const auto multiply = [&](const uint32_t (&a)[across][4], const uint32_t (&b)[4], int pair) {
#pragma unroll
        for (int m = 0; m < across; ++m)
#pragma unroll
          for (int n = 0; n < 2; ++n) device::multiply_add(c[m][2 * pair + n], a[m], b[2 * n], b[2 * n + 1]);
      };
      uint32_t a[across][4], high[down / 2][4], low[4];
      load_a(a, 1);
#pragma unroll
      for (int pair = 0; pair < down / 2; ++pair) {
        load_b(high[pair], 0, pair);
        multiply(a, high[pair], pair);
      }
      load_a(a, 0);
#pragma unroll
      for (int pair = 0; pair < down / 2; ++pair) {
        load_b(low, 1, pair);
        multiply(a, low, pair);
      }
#pragma unroll
      for (int pair = 0; pair < down / 2; ++pair) multiply(a, high[pair], pair);
#pragma unroll
      for (int m = 0; m < across; ++m)
#pragma unroll
        for (int n = 0; n < down; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[m][e / 2][2 * n + e % 2] += c[m][n][e] * factor;
    }
    if (!now.completes_tile()) continue;
#pragma unroll
    for (int r = 0; r < 2 * across; ++r) sum[r / 2][r % 2].template add_powers<safe, 0>(s[r / 2][r % 2]);
  }
#pragma unroll
  for (int r = 0; r < 2 * across; ++r) {
    const int64_t i = first_row + 8 * r;
    sum[r / 2][r % 2].template add_lanes<safe, 4>();
    if (lane % 4 == 0 && i < rows.count)
      sum[r / 2][r % 2].template write<safe>(rows, int64_t{gridDim.y} * kWarpsAcross,
                                             int64_t{blockIdx.y} * kWarpsAcross + warp % kWarpsAcross, i);
  }
}

// For the squared cost in float32.
template <bool one_chunk>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    tensor_pass_kernel(const Control* controls, Cloud<float> all_rows, Cloud<float> all_columns) {
  const Control* control = controls + blockIdx.z;
  if (control->done) return;
  const Cloud<float> rows = all_rows.of(blockIdx.z), columns = all_columns.of(blockIdx.z);
  if (int64_t{blockIdx.x} * kTensorRows >= rows.count) return;
  __shared__ TensorSlots shared;
  const int64_t tiles = ceil_div(columns.count, kTensorColumns), ranges = gridDim.y, range = blockIdx.y;
  const int first = static_cast<int>(tiles * range / ranges), last = static_cast<int>(tiles * (range + 1) / ranges);
  if (control->safe)
    tensor_range<true, one_chunk>(*control, rows, columns, first, last, shared);
  else
    tensor_range<false, one_chunk>(*control, rows, columns, first, last, shared);
}

}  // namespace wgan_ext::sinkhorn
