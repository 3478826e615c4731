// Sums and maxima over a warp and over a block, in a fixed order (deterministic).
#pragma once
#include "launch.cuh"

namespace wgan_ext::device {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarp = 32;

struct Sum {
  template <typename T>
  __device__ static T combine(T a, T b) {
    return a + b;
  }
};

struct Max {
  template <typename T>
  __device__ static T combine(T a, T b) {
    return a < b ? b : a;
  }
};

// Every lane gets the result; all 32 lanes must call.
template <typename Op, typename T>
__device__ T warp_reduce(T value) {
  for (int offset = kWarp / 2; offset; offset /= 2)
    value = Op::combine(value, __shfl_xor_sync(kFullMask, value, offset));
  return value;
}

// Every thread gets the result; all threads of a one-dimensional block of whole warps must call. `scratch` is shared
// memory of at least 32 elements; it may be reused after the next __syncthreads.
template <typename Op, typename T>
__device__ T block_reduce(T value, T* scratch, T identity) {
  value = warp_reduce<Op>(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  return warp_reduce<Op>(lane < static_cast<int>(blockDim.x) / kWarp ? scratch[lane] : identity);
}

}  // namespace wgan_ext::device
