// Instructions that CUDA C++ has no name for. Each has a twin of the same name and meaning in
// tests/cuda_on_cpu/emulator.h. All lanes of a warp must take part in `load_matrices` and `multiply_add`.
#pragma once
#include "launch.cuh"

#if !defined(WGAN_EXT_EMULATED)

#include <cstdint>

namespace wgan_ext::device {

// 2^x on the special-function unit, to 2 units in the last place; subnormal results are 0.
__device__ __forceinline__ float quick_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x between low and high; NaN stays, which fmaxf would lose.
__device__ __forceinline__ float clamp(float x, float low, float high) {
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(low));
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(high));
  return x;
}

// Starts to copy 16 bytes from global to shared memory, both aligned to 16. The thread itself may read them after
// `wait_copies`, others after a barrier behind that.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

// Until all copies that this thread has started are done.
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit elements. Lane l brings the address, in shared memory and aligned to 16 bytes, of row
// l % 8 of matrix l / 8. It gets of matrix k in `to[k]` the elements 2 (l % 4) and the next of row l / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// c += a b on the tensor cores: a of 16 x 16 and b of 16 x 8 in float16, c of 16 x 8 in float32. With g = lane / 4 and
// t = lane % 4, a lane holds two halves a register, the lower first:
//   a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with its right neighbour
//   b: (2t, g), (2t + 8, g), each with its lower neighbour
//   c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace wgan_ext::device

#endif
