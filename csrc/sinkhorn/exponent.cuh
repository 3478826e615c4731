// What the kernels of Sinkhorn share: 2^s, sums of it, and a block's way through its columns.
#pragma once
#include "../cuda/ptx.cuh"
#include "../cuda/reduce.cuh"
#include "kernels.h"

namespace wgan_ext::sinkhorn {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 2;  // of the heavy kernels: 128 registers a thread
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

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

// 2^x where many are needed: one instruction of the special-function unit.
__device__ inline float quick_power(float x) { return device::quick_exp2(x); }
__device__ inline double quick_power(double x) { return exp2(x); }

// The same by 11 instructions of the other units, which share the work where they would wait: 2^round(x) goes into the
// exponent's bits, the rest by a polynomial (of csrc/simd.h, relative error 9e-8). Below 2^-126 a value of that order.
__device__ inline float polynomial_power(float x) {
  constexpr float rounder = 0x1.8p23f;
  x = device::clamp(x, -126.0f, 128.0f);
  const float shifted = x + rounder;  // the low bits of the mantissa now hold round(x)
  const float r = x - (shifted - rounder);
  float value = fmaf(0.0013264736892709093f, r, 0.009671516570295583f);
  value = fmaf(value, r, 0.055507337562911485f);
  value = fmaf(value, r, 0.24022242025815851f);
  value = fmaf(value, r, 0.693146977568413f);
  value = fmaf(value, r, 1.0f);
  return __uint_as_float(__float_as_uint(value) + (__float_as_uint(shifted) << 23));
}
__device__ inline double polynomial_power(double x) { return exp2(x); }

// A sum of 2^s kept as total * 2^most.
template <typename T>
struct Scaled {
  T most = T(2 * kLogZero), total = 0;

  __device__ void add(T other_most, T other_total) {
    const T now = greater(most, other_most);
    total = total * power(most - now) + other_total * power(other_most - now);
    most = now;
  }

  // Adds 2^s of several, `by_polynomial` of them on the units for additions; not safe: `most` stays, and stands for 0.
  template <bool safe, int by_polynomial, int count>
  __device__ void add_powers(T (&s)[count]) {
    if (safe) {
      T now = most;
#pragma unroll
      for (int c = 0; c < count; ++c) now = greater(now, s[c]);
      total *= quick_power(most - now);
      most = now;
#pragma unroll
      for (int c = 0; c < count; ++c) s[c] -= now;
    }
#pragma unroll
    for (int c = 0; c < count; ++c) total += c < by_polynomial ? polynomial_power(s[c]) : quick_power(s[c]);
  }

  // Over `width` neighbouring lanes, which all get it.
  template <bool safe, int width>
  __device__ void add_lanes() {
#pragma unroll
    for (int offset = width / 2; offset; offset /= 2) {
      const T other = __shfl_xor_sync(device::kFullMask, total, offset);
      if (safe)
        add(__shfl_xor_sync(device::kFullMask, most, offset), other);
      else
        total += other;
    }
  }

  // As part `part` of the parts that finish_kernel adds up for row i.
  template <bool safe>
  __device__ void write(const Cloud<T>& rows, int64_t parts, int64_t part, int64_t i) const {
    T* mine = rows.scratch + part * rows.padded + i;
    *mine = total;
    if (safe) mine[parts * rows.padded] = most;
  }
};

// Where the points of a block's problem and their packed form begin, and how many they are.
struct Extent {
  int64_t first, first_padded, count, padded;

  __device__ Extent(const int64_t* offsets, int64_t most, int64_t unit)
      : first(offsets ? offsets[blockIdx.z] : int64_t{blockIdx.z} * most),
        first_padded(offsets ? first_of_padded(first, blockIdx.z, unit)
                             : int64_t{blockIdx.z} * ceil_div(most, unit) * unit),
        count(offsets ? offsets[blockIdx.z + 1] - first : most),
        padded(ceil_div(count, unit) * unit) {}
};

// A step of a block's way: a tile of columns and, of its dimensions, a chunk. The next step's points are copied to
// shared memory while this one's are used, in two slots by turns; the rows' chunks stay there if they all fit.
struct Step {
  int tile, chunks, chunk = 0, parity = 0;

  __device__ Step(int tile, int chunks) : tile(tile), chunks(chunks) {}
  __device__ bool brings_rows(int first_tile) const { return tile == first_tile || chunks > 2; }
  __device__ int row_slot() const { return chunks > 2 ? parity : chunk; }
  __device__ bool completes_tile() const { return chunk + 1 == chunks; }
  __device__ void advance() {
    parity ^= 1;
    if (!completes_tile()) {
      ++chunk;
      return;
    }
    chunk = 0;
    ++tile;
  }
};

}  // namespace wgan_ext::sinkhorn
