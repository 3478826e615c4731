// Scalar formulas shared by CPU and CUDA kernels, each written once. No torch, no standard containers.
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define WGAN_EXT_HOST_DEVICE __host__ __device__
#else
#define WGAN_EXT_HOST_DEVICE
#endif
// A formula is inlined without fail: left to the compiler, a copy compiled for AVX could be the one the linker keeps.
#define WGAN_EXT_FORMULA WGAN_EXT_HOST_DEVICE inline __attribute__((always_inline))

namespace wgan_ext {

using Stream = void*;  // a cudaStream_t; null on the CPU

WGAN_EXT_FORMULA int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }

}  // namespace wgan_ext
