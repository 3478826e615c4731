// What kernels compute with: float64 in itself, every other type in float32.
#pragma once
#include "../half.h"
#include "launch.cuh"
#if !defined(WGAN_EXT_EMULATED)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <cstring>
#endif

namespace wgan_ext::device {

template <typename T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <typename T>
using ComputeT = typename Compute<T>::type;

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }

#if !defined(WGAN_EXT_EMULATED)

__device__ inline float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float widen(BFloat16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }

__device__ inline void narrow(Half& to, float x) { to.bits = __half_as_ushort(__float2half_rn(x)); }
__device__ inline void narrow(BFloat16& to, float x) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

#else

inline float widen(Half x) {
  _Float16 value;
  std::memcpy(&value, &x, sizeof value);
  return value;
}
inline float widen(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void narrow(Half& to, float x) {
  const auto value = static_cast<_Float16>(x);
  std::memcpy(&to, &value, sizeof value);
}
// Rounds to the nearest, ties to even; a NaN stays one.
inline void narrow(BFloat16& to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  to.bits = x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#endif

__device__ inline void narrow(double& to, double x) { to = x; }
__device__ inline void narrow(float& to, float x) { to = x; }

}  // namespace wgan_ext::device
