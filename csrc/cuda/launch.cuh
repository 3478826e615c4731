// How kernels are launched: on the device by nvcc, or on the host by the emulator of tests/cuda_on_cpu, from one text.
//
//   WGAN_EXT_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)   a template kernel goes in parentheses
//   WGAN_EXT_DYNAMIC_SHARED(T, name)                                           in place of extern __shared__
#pragma once

#if defined(WGAN_EXT_EMULATED)
#include "emulator.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

namespace wgan_ext {

// The most blocks of a loop that strides by the grid: more than any device runs at once. The emulator has few, so that
// there such loops turn.
#if defined(WGAN_EXT_EMULATED)
constexpr int64_t kLoopBlocks = 2;
#else
constexpr int64_t kLoopBlocks = 8192;
#endif

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("wgan_ext: ") + what + ": " + cudaGetErrorString(status));
}

}  // namespace wgan_ext

#if !defined(WGAN_EXT_EMULATED)
#define WGAN_EXT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                    \
  do {                                                                                     \
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__); \
    ::wgan_ext::check_cuda(cudaGetLastError(), "launch of " #kernel);                      \
  } while (0)

#define WGAN_EXT_DYNAMIC_SHARED(T, name)                           \
  extern __shared__ __align__(16) unsigned char wgan_ext_shared[]; \
  T* name = reinterpret_cast<T*>(wgan_ext_shared)
#endif
