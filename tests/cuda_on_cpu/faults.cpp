// Kernels with one seeded fault each, to prove that the emulator and the sanitizers report it; `clean` has none.
// The first argument names the kernel to run. Exit status 1: the result is wrong.
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"

namespace {

using wgan_ext::device::block_reduce;
using wgan_ext::device::kFullMask;
using wgan_ext::device::Sum;

constexpr int kBlock = 96, kBlocks = 3, kSize = kBlock * kBlocks;

// out[block] = the block's sum of x, through dynamic and static shared memory, shuffles and both barriers.
template <typename T>
__global__ void clean(const T* x, T* out) {
  __shared__ T scratch[32];
  WGAN_EXT_DYNAMIC_SHARED(T, turned);
  turned[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  T value = turned[blockDim.x - 1 - threadIdx.x];
  const T total = block_reduce<Sum>(value, scratch, T(0));
  __syncthreads();
  const int lane = threadIdx.x % 32;
  turned[threadIdx.x] = value;
  __syncwarp();
  value = turned[threadIdx.x - lane + (lane + 1) % 32];
  __syncwarp();
  turned[threadIdx.x] = value;
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  const bool ballots = __ballot_sync(half, lane % 2 == 0) == (half & 0x55555555u) && __all_sync(half, lane < 32) &&
                       !__any_sync(half, lane == 32);
  const bool shuffles = __shfl_sync(half, lane, 3, 16) == (lane & 16) + 3 &&
                        __shfl_down_sync(kFullMask, lane, 4, 8) == (lane % 8 < 4 ? lane + 4 : lane) &&
                        __shfl_up_sync(kFullMask, lane, 1) == (lane ? lane - 1 : 0) &&
                        __shfl_xor_sync(kFullMask, lane, 5) == (lane ^ 5);
  const bool counts = __syncthreads_count(threadIdx.x < 40) == 40 && __syncthreads_or(threadIdx.x == 7) &&
                      !__syncthreads_and(threadIdx.x != 7);
  if (threadIdx.x == 0) out[blockIdx.x] = ballots && shuffles && counts ? total : T(-1);
}

__global__ void missing_syncthreads(const float* x, float* out) {
  WGAN_EXT_DYNAMIC_SHARED(float, shared);
  __shared__ float scratch[32];
  shared[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  const float total = block_reduce<Sum>(shared[blockDim.x - 1 - threadIdx.x], scratch, 0.0f);
  if (threadIdx.x == 0) out[blockIdx.x] = total;
}

__global__ void missing_syncwarp(const float* x, float* out) {
  __shared__ float scratch[32], shared[kBlock];
  const int lane = threadIdx.x % 32;
  shared[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  const float total = block_reduce<Sum>(lane == 0 ? shared[threadIdx.x] : shared[threadIdx.x - 1], scratch, 0.0f);
  if (threadIdx.x == 0) out[blockIdx.x] = total;
}

// A shuffle makes the lanes meet but orders no memory.
__global__ void shuffle_for_syncwarp(const float* x, float* out) {
  __shared__ float scratch[32], shared[kBlock];
  shared[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  __shfl_sync(kFullMask, 0, 0);
  const float total = block_reduce<Sum>(shared[threadIdx.x ^ 31], scratch, 0.0f);
  if (threadIdx.x == 0) out[blockIdx.x] = total;
}

// The second use of the scratch memory may overtake the first.
__global__ void reused_scratch(const float* x, float* out) {
  __shared__ float scratch[32];
  float total = block_reduce<Sum>(x[blockIdx.x * blockDim.x + threadIdx.x], scratch, 0.0f);
  total = block_reduce<Sum>(threadIdx.x == 0 ? total : 0.0f, scratch, 0.0f);
  if (threadIdx.x == 0) out[blockIdx.x] = total;
}

__global__ void divergent_syncthreads(const float*, float* out) {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
  out[blockIdx.x] = 0;
}

__global__ void syncthreads_after_return(const float*, float* out) {
  if (threadIdx.x >= 64) return;
  __syncthreads();
  out[blockIdx.x] = 0;
}

__global__ void divergent_shuffle(const float* x, float* out) {
  if (threadIdx.x < 16) out[blockIdx.x] = __shfl_xor_sync(kFullMask, x[threadIdx.x], 1);
  __syncthreads();
}

__global__ void mixed_collectives(const float*, float* out) {
  if (threadIdx.x % 2)
    __syncwarp();
  else
    out[blockIdx.x] = static_cast<float>(__ballot_sync(kFullMask, 1));
}

__global__ void shuffle_from_absent_lane(const float* x, float* out) {
  if (threadIdx.x % 32 < 16) out[blockIdx.x] = __shfl_sync(0x0000ffffu, x[threadIdx.x], 20);
}

__global__ void lane_outside_mask(const float* x, float* out) {
  out[blockIdx.x] = __shfl_sync(0x0000ffffu, x[threadIdx.x], 0);
}

__global__ void read_past_end(const float* x, float* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = x[(blockIdx.x + 1) * blockDim.x];
}

__global__ void write_past_end(const float* x, float* out) {
  if (threadIdx.x == 0) out[blockIdx.x + 1] = x[0];
}

__global__ void write_past_dynamic_shared(const float* x, float* out) {
  WGAN_EXT_DYNAMIC_SHARED(float, shared);
  shared[threadIdx.x + 1] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = shared[1];
}

__global__ void write_past_static_shared(const float* x, float* out) {
  __shared__ float shared[kBlock];
  shared[threadIdx.x + 1] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = shared[1];
}

// Past the scratch memory that the callee knows only by a pointer.
__device__ __attribute__((noinline)) void fill(float* shared, int n, float value) {
  for (int i = threadIdx.x; i < n; i += static_cast<int>(blockDim.x)) shared[i] = value;
}
__global__ void write_past_passed_shared(const float* x, float* out) {
  __shared__ float shared[kBlock];
  fill(shared, kBlock + 1, x[0]);
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = shared[1];
}

__global__ void uninitialised_static_shared(const float* x, float* out) {
  __shared__ float scratch[32], shared[kBlock];
  if (blockIdx.x == 0) shared[threadIdx.x] = x[threadIdx.x];  // later blocks would find what this one left
  __syncthreads();
  const float total = block_reduce<Sum>(shared[threadIdx.x], scratch, 0.0f);
  if (threadIdx.x == 0) out[blockIdx.x] = total;
}

__global__ void uninitialised_dynamic_shared(const float* x, float* out) {
  __shared__ float scratch[32];
  WGAN_EXT_DYNAMIC_SHARED(float, shared);
  if (threadIdx.x != 50) shared[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  const float total = block_reduce<Sum>(shared[threadIdx.x], scratch, 0.0f);
  if (threadIdx.x == 0) out[blockIdx.x] = total;
}

__global__ void misaligned_vector_load(const float* x, float* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = __ldg(reinterpret_cast<const float4*>(x + 1)).x;
}

// Four floats, aligned as one float; the neighbour makes the address odd.
struct Offset {
  float first, rest[8];
};
__global__ void misaligned_static_shared(const float* x, float* out) {
  __shared__ Offset shared;
  if (threadIdx.x < 8) shared.rest[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = reinterpret_cast<const float4*>(shared.rest)->x;
}

__global__ void overflowing_index(const float* x, float* out) {
  const int row = static_cast<int>(threadIdx.x) + 70000, columns = 70000;
  out[blockIdx.x] = x[(row * columns) % kSize < 0 ? 0 : 1];
}

// A block that counts on an earlier one having run.
__global__ void ordered_blocks(const float* x, float* out) {
  __shared__ float scratch[32];
  const float total = block_reduce<Sum>(x[blockIdx.x * blockDim.x + threadIdx.x], scratch, 0.0f);
  if (threadIdx.x == 0) out[blockIdx.x] = blockIdx.x == 0 || out[blockIdx.x - 1] != -2 ? total : 0.0f;
}

// Copies to shared memory by the first threads, 4 floats each.
__device__ void start_copies(float* shared, const float* x, int shift = 0) {
  if (threadIdx.x < kBlock / 4)
    wgan_ext::device::copy_async(shared + 4 * threadIdx.x, x + blockIdx.x * blockDim.x + 4 * threadIdx.x + shift);
}
__device__ void sum_shared(const float* shared, float* scratch, float* out) {
  const float total = block_reduce<Sum>(shared[threadIdx.x], scratch, 0.0f);
  if (threadIdx.x == 0) out[blockIdx.x] = total;
}

__global__ void copy_read_too_soon(const float* x, float* out) {
  __shared__ float scratch[32];
  __shared__ __align__(16) float shared[kBlock];
  start_copies(shared, x);
  __syncthreads();
  sum_shared(shared, scratch, out);
  wgan_ext::device::wait_copies();
}

// Each thread waits for its own copies alone.
__global__ void copy_without_barrier(const float* x, float* out) {
  __shared__ float scratch[32];
  __shared__ __align__(16) float shared[kBlock];
  start_copies(shared, x);
  wgan_ext::device::wait_copies();
  sum_shared(shared, scratch, out);
}

__global__ void copy_under_way_at_the_end(const float* x, float* out) {
  __shared__ __align__(16) float shared[kBlock];
  start_copies(shared, x);
  out[blockIdx.x] = 0;
}

__global__ void misaligned_copy(const float* x, float* out) {
  __shared__ __align__(16) float shared[kBlock];
  start_copies(shared, x, 1);
  wgan_ext::device::wait_copies();
  out[blockIdx.x] = 0;
}

__global__ void divergent_matrices(const float*, float* out) {
  const uint32_t a[4] = {};
  float c[4] = {};
  if (threadIdx.x % 32 < 16) wgan_ext::device::multiply_add(c, a, 0, 0);
  __syncthreads();
  out[blockIdx.x] = c[0];
}

using Fault = void (*)(const float*, float*);

struct Run {
  const char* name;
  Fault kernel;
  int64_t grid_y = 1;
  int block = kBlock;
  size_t shared = kBlock * sizeof(float);
};

#define WGAN_EXT_FAULT(kernel) {#kernel, kernel}
const Run kRuns[] = {{"clean", clean<float>},
                     WGAN_EXT_FAULT(missing_syncthreads),
                     WGAN_EXT_FAULT(missing_syncwarp),
                     WGAN_EXT_FAULT(shuffle_for_syncwarp),
                     WGAN_EXT_FAULT(reused_scratch),
                     WGAN_EXT_FAULT(divergent_syncthreads),
                     WGAN_EXT_FAULT(syncthreads_after_return),
                     WGAN_EXT_FAULT(divergent_shuffle),
                     WGAN_EXT_FAULT(mixed_collectives),
                     WGAN_EXT_FAULT(shuffle_from_absent_lane),
                     WGAN_EXT_FAULT(lane_outside_mask),
                     WGAN_EXT_FAULT(read_past_end),
                     WGAN_EXT_FAULT(write_past_end),
                     WGAN_EXT_FAULT(write_past_dynamic_shared),
                     WGAN_EXT_FAULT(write_past_static_shared),
                     WGAN_EXT_FAULT(write_past_passed_shared),
                     WGAN_EXT_FAULT(misaligned_static_shared),
                     WGAN_EXT_FAULT(uninitialised_static_shared),
                     WGAN_EXT_FAULT(uninitialised_dynamic_shared),
                     WGAN_EXT_FAULT(misaligned_vector_load),
                     WGAN_EXT_FAULT(overflowing_index),
                     WGAN_EXT_FAULT(ordered_blocks),
                     WGAN_EXT_FAULT(copy_read_too_soon),
                     WGAN_EXT_FAULT(copy_without_barrier),
                     WGAN_EXT_FAULT(copy_under_way_at_the_end),
                     WGAN_EXT_FAULT(misaligned_copy),
                     WGAN_EXT_FAULT(divergent_matrices),
                     {"too_many_threads", clean<float>, 1, 1025},
                     {"too_large_grid", clean<float>, 65536},
                     {"empty_grid", clean<float>, 0},
                     {"too_much_shared", clean<float>, 1, kBlock, (48 << 10) + 1}};

}  // namespace

int main(int, char** argv) {
  for (const Run& run : kRuns) {
    if (std::strcmp(run.name, argv[1]) != 0) continue;
    // Arrays of exactly their size, so that the byte after the last is AddressSanitizer's.
    const std::unique_ptr<float[]> x(new float[kSize]), out(new float[kBlocks]);
    float want[kBlocks] = {};
    for (int i = 0; i < kSize; ++i) want[i / kBlock] += x[i] = static_cast<float>(i % 7);
    for (int i = 0; i < kBlocks; ++i) out[i] = -2;
    const Fault kernel = run.kernel;
    const wgan_ext::emulated::Extent grid =
        run.grid_y == 1 ? wgan_ext::emulated::Extent(kBlocks) : dim3(1, static_cast<unsigned>(run.grid_y));
    WGAN_EXT_LAUNCH(kernel, grid, run.block, run.shared, nullptr, x.get(), out.get());
    for (int i = 0; i < kBlocks; ++i)
      if (out[i] != want[i]) {
        std::printf("%s: block %d: got %g, want %g\n", run.name, i, out[i], want[i]);
        return 1;
      }
    return 0;
  }
  return 2;
}
