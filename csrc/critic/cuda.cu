// Activations, masks, norms and penalties on the GPU.
//
// Of the first two a thread takes 8 columns of a row and the byte of their signs: 16-byte loads and stores where rows
// are aligned, and a warp's bytes lie side by side. Each kernel reads and writes what it must once, so memory bandwidth
// bounds it. Blocks are `width` threads across and kThreads / width rows deep, so that narrow rows fill them too.
#include "../cuda/half.cuh"
#include "../cuda/launch.cuh"
#include "../cuda/reduce.cuh"
#include "kernels.h"

namespace wgan_ext::critic {
namespace {

using device::ComputeT;
using device::narrow;
using device::widen;

constexpr int kThreads = 256;
constexpr int64_t kBlocks = kLoopBlocks;

template <typename T>
struct alignas(16) Eight {
  T value[8];
};

// Columns [0, n) at p, n up to 8; the others are zero.
template <bool aligned, typename T>
__device__ void load(const T* p, int64_t n, ComputeT<T> (&values)[8]) {
  if (aligned && n == 8) {
    const Eight<T> eight = *reinterpret_cast<const Eight<T>*>(p);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = widen(eight.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = i < n ? widen(p[i]) : ComputeT<T>(0);
  }
}

template <bool aligned, typename T>
__device__ void store(T* p, int64_t n, const ComputeT<T> (&values)[8]) {
  if (aligned && n == 8) {
    Eight<T> eight;
#pragma unroll
    for (int i = 0; i < 8; ++i) narrow(eight.value[i], values[i]);
    *reinterpret_cast<Eight<T>*>(p) = eight;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < n) narrow(p[i], values[i]);
  }
}

// slope 0 multiplies nothing, so that relu turns an infinity into 0.
template <typename C>
__device__ C pass(bool set, C value, C slope) {
  return set ? value : slope == 0 ? C(0) : value * slope;
}

// Calls body(row, byte) for every byte of signs, `width` (a power of two) threads of a block to a row.
template <typename Body>
__device__ void for_bytes(int64_t rows, int64_t bytes, int width, const Body& body) {
  const int64_t depth = kThreads / width;
  for (int64_t row = blockIdx.y * depth + threadIdx.x / width; row < rows; row += gridDim.y * depth)
    for (int64_t byte = int64_t{blockIdx.x} * width + threadIdx.x % width; byte < bytes;
         byte += int64_t{gridDim.x} * width)
      body(row, byte);
}

template <typename T, bool aligned>
__global__ void __launch_bounds__(kThreads, 4)
    activate_kernel(const T* z, const T* bias, ComputeT<T> slope, T* h, uint8_t* signs, int64_t rows, int64_t columns,
                    int width) {
  const int64_t bytes = ceil_div(columns, 8);
  for_bytes(rows, bytes, width, [=](int64_t row, int64_t byte) {
    const int64_t column = 8 * byte, n = min(int64_t{8}, columns - column);
    ComputeT<T> values[8];
    load<aligned>(z + row * columns + column, n, values);
    if (bias) {
      ComputeT<T> shift[8];
      load<aligned>(bias + column, n, shift);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] += shift[i];
    }
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool positive = !(values[i] <= 0);
      bits |= unsigned{positive} << i;
      values[i] = pass(positive, values[i], slope);
    }
    signs[row * bytes + byte] = static_cast<uint8_t>(bits);
    if (h) store<aligned>(h + row * columns + column, n, values);
  });
}

template <typename T, bool aligned>
__global__ void __launch_bounds__(kThreads, 4)
    mask_kernel(const T* in, int64_t in_rows, const uint8_t* signs, ComputeT<T> slope, T* out, int64_t rows,
                int64_t columns, int width) {
  const int64_t bytes = ceil_div(columns, 8);
  for_bytes(rows, bytes, width, [=](int64_t row, int64_t byte) {
    const int64_t column = 8 * byte, n = min(int64_t{8}, columns - column);
    ComputeT<T> values[8];
    load<aligned>(in + row % in_rows * columns + column, n, values);
    const unsigned bits = signs[row * bytes + byte];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = pass((bits >> i & 1) != 0, values[i], slope);
    store<aligned>(out + row * columns + column, n, values);
  });
}

// A block takes a row at a time.
template <typename T>
__global__ void __launch_bounds__(kThreads) norms_kernel(const T* in, T* norms, int64_t rows, int64_t columns) {
  __shared__ double scratch[device::kWarp];
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* x = in + row * columns;
    double largest = 0, sum = 0;
    if (sizeof(T) == 8) {
      for (int64_t i = threadIdx.x; i < columns; i += kThreads) largest = fmax(largest, fabs(double(widen(x[i]))));
      largest = device::block_reduce<device::Max>(largest, scratch, 0.0);
      __syncthreads();
    }
    const double scale = norm_scale<T>(largest);
    for (int64_t i = threadIdx.x; i < columns; i += kThreads) {
      const double scaled = double(widen(x[i])) / scale;
      sum += scaled * scaled;
    }
    sum = device::block_reduce<device::Sum>(sum, scratch, 0.0);
    if (threadIdx.x == 0) narrow(norms[row], ComputeT<T>(scale * sqrt(sum)));
    __syncthreads();
  }
}

// One block takes all.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    penalty_kernel(const T* norms, int64_t count, Penalty penalty, double weight, T* value, T* loss, T* slopes) {
  __shared__ double scratch[device::kWarp];
  double total = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const auto norm = double(widen(norms[i]));
    total += penalty.value(norm);
    if (slopes) narrow(slopes[i], ComputeT<T>(weight / double(count) * penalty.slope<ComputeT<T>>(norm)));
  }
  total = device::block_reduce<device::Sum>(total, scratch, 0.0);
  if (threadIdx.x == 0) {
    narrow(*value, ComputeT<T>(total / double(count)));
    narrow(*loss, ComputeT<T>(weight * (total / double(count))));
  }
}

struct Shape {
  dim3 grid;
  int width;

  Shape(int64_t rows, int64_t columns) : width(1) {
    const int64_t bytes = ceil_div(columns, 8);
    while (width < kThreads && width < bytes) width *= 2;
    const int64_t across = ceil_div(bytes, width), down = ceil_div(rows, kThreads / width);
    grid.x = static_cast<unsigned>(across < kBlocks ? across : kBlocks);
    const int64_t most = ceil_div(kBlocks, grid.x);
    grid.y = static_cast<unsigned>(down < most ? down : most);
  }
};

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <typename T>
void activate(const T* z, const T* bias, double slope, T* h, uint8_t* signs, int64_t rows, int64_t columns,
              Stream stream) {
  const Shape shape(rows, columns);
  const auto s = static_cast<ComputeT<T>>(slope);
  if (columns * sizeof(T) % 16 == 0 && is_aligned(z) && is_aligned(bias) && is_aligned(h))
    WGAN_EXT_LAUNCH((activate_kernel<T, true>), shape.grid, kThreads, 0, stream, z, bias, s, h, signs, rows, columns,
                    shape.width);
  else
    WGAN_EXT_LAUNCH((activate_kernel<T, false>), shape.grid, kThreads, 0, stream, z, bias, s, h, signs, rows, columns,
                    shape.width);
}

template <typename T>
void mask(const T* in, int64_t in_rows, const uint8_t* signs, double slope, T* out, int64_t rows, int64_t columns,
          Stream stream) {
  const Shape shape(rows, columns);
  const auto s = static_cast<ComputeT<T>>(slope);
  if (columns * sizeof(T) % 16 == 0 && is_aligned(in) && is_aligned(out))
    WGAN_EXT_LAUNCH((mask_kernel<T, true>), shape.grid, kThreads, 0, stream, in, in_rows, signs, s, out, rows, columns,
                    shape.width);
  else
    WGAN_EXT_LAUNCH((mask_kernel<T, false>), shape.grid, kThreads, 0, stream, in, in_rows, signs, s, out, rows, columns,
                    shape.width);
}

template <typename T>
void norms(const T* in, T* norms, int64_t rows, int64_t columns, Stream stream) {
  const auto blocks = static_cast<unsigned>(rows < kBlocks ? rows : kBlocks);
  WGAN_EXT_LAUNCH((norms_kernel<T>), blocks, kThreads, 0, stream, in, norms, rows, columns);
}

template <typename T>
void penalty(const T* norms, int64_t count, Penalty penalty, double weight, T* value, T* loss, T* slopes,
             Stream stream) {
  WGAN_EXT_LAUNCH((penalty_kernel<T>), 1, kThreads, 0, stream, norms, count, penalty, weight, value, loss, slopes);
}

template <typename T>
constexpr Kernels<T> kTable{activate<T>, mask<T>, norms<T>, penalty<T>, nullptr, 0};

}  // namespace

template <>
const Kernels<float>& Kernels<float>::cuda() {
  return kTable<float>;
}
template <>
const Kernels<double>& Kernels<double>::cuda() {
  return kTable<double>;
}
template <>
const Kernels<Half>& Kernels<Half>::cuda() {
  return kTable<Half>;
}
template <>
const Kernels<BFloat16>& Kernels<BFloat16>::cuda() {
  return kTable<BFloat16>;
}

}  // namespace wgan_ext::critic
