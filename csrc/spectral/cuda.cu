// Spectral normalization on the GPU.
//
// Each product with W is one streaming read by many blocks; what they find is summed by whichever finishes last, in a
// fixed order, and its length is known when the launch ends, so that the next product divides by it while it loads. One
// power iteration and the quotient are three launches, whatever the shape; the second and third find W in the L2 cache
// where it fits. Nothing depends on the order in which blocks run.
#include <initializer_list>

#include "../cuda/launch.cuh"
#include "../cuda/reduce.cuh"
#include "kernels.h"

namespace wgan_ext::spectral {
namespace {

using device::block_reduce;
using device::kWarp;
using device::warp_reduce;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kResident = 2;       // blocks on a multiprocessor at least; left to itself ptxas aims at six and spills
constexpr int kRows = 4;           // of a warp, so that one load of x serves four rows
constexpr int64_t kBlocks = 1024;  // aimed at by the splits of a product
constexpr int64_t kGridLimit = 8192;  // of loops that stride by the grid

// P elements of T that are loaded and stored at once.
template <typename T, int P>
struct alignas(P * sizeof(T)) Pack {
  T value[P];
};

// The length of an unnormalised vector, and 1 / length, which is 0 where the vector is no direction.
template <typename T>
struct Length {
  double length;
  T inverse;
};

// What the blocks of one product share. Row and column tiles have a ticket each and the grid has one more; all are zero
// before a launch and after it.
template <typename T>
struct Shared {
  unsigned* tickets;  // [tiles + 1]
  double* sums;       // [tiles]
  T* partial;         // [splits, length of the product]
};

// True in the block that takes the last of `count` tickets, which then sees what the others wrote.
__device__ bool is_last(unsigned* ticket, unsigned count) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(ticket, 1u) == count - 1;
    if (last) *ticket = 0;
  }
  __syncthreads();
  const bool result = last;
  __threadfence();
  __syncthreads();
  return result;
}

// Sums the splits of the tile [begin, end) of a product of `length` elements into `product`; then, in the last block of
// the launch, finds |product|, or <product, with> if `with` is given. Tiles are blockIdx.x, splits blockIdx.y.
template <typename T>
__device__ void finish(Shared<T> shared, int64_t begin, int64_t end, int64_t length, const T* with, T* product,
                       Length<T>* found) {
  __shared__ double scratch[kWarp];
  if (!is_last(shared.tickets + blockIdx.x, gridDim.y)) return;
  const volatile T* partial = shared.partial;
  double sum = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    T total = 0;
    for (unsigned split = 0; split < gridDim.y; ++split) total += partial[split * length + i];
    product[i] = total;
    sum += static_cast<double>(total) * static_cast<double>(with ? with[i] : total);
  }
  sum = block_reduce<device::Sum>(sum, scratch, 0.0);
  if (threadIdx.x == 0) shared.sums[blockIdx.x] = sum;
  if (!is_last(shared.tickets + gridDim.x, gridDim.x)) return;
  const volatile double* sums = shared.sums;
  sum = 0;
  for (unsigned tile = threadIdx.x; tile < gridDim.x; tile += kThreads) sum += sums[tile];
  sum = block_reduce<device::Sum>(sum, scratch, 0.0);
  if (threadIdx.x == 0) {
    found->length = with ? sum : sqrt(sum);
    const T inverse = static_cast<T>(1 / found->length);
    found->inverse = found->length > 0 && inverse > 0 && inverse < static_cast<T>(HUGE_VAL) ? inverse : T{0};
  }
}

template <typename T>
__device__ T factor_of(const Length<T>* length) {
  return length ? length->inverse : T{1};
}

// t = W N(x), where x_length is the length of x or null for a unit vector. A warp for four rows and a split of the
// columns, sixteen bytes a lane.
template <typename T, int P>
__global__ void __launch_bounds__(kThreads, kResident)
    rows_kernel(const T* weight, Shape shape, const T* x, const Length<T>* x_length, const T* with, T* product,
                Length<T>* found, Shared<T> shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps * kRows, first = tile + warp * kRows;
  const int64_t width = columns(shape), per_split = ceil_div(ceil_div(width, P), gridDim.y) * P;
  const int64_t begin = blockIdx.y * per_split, end = width < begin + per_split ? width : begin + per_split;
  const T factor = factor_of(x_length);
  T total[kRows] = {};
  for (int64_t c = begin + lane * P; c < end; c += kWarp * P) {
    const int64_t o = shape.outer == 1 ? 0 : c / shape.inner;
    const T* a = weight + o * (shape.rows - 1) * shape.inner + c;
    Pack<T, P> v = *reinterpret_cast<const Pack<T, P>*>(x + c);
#pragma unroll
    for (int j = 0; j < P; ++j) v.value[j] *= factor;
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      if (first + k >= shape.rows) break;
      const Pack<T, P> w = *reinterpret_cast<const Pack<T, P>*>(a + (first + k) * shape.inner);
#pragma unroll
      for (int j = 0; j < P; ++j) total[k] += w.value[j] * v.value[j];
    }
  }
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    const T sum = warp_reduce<device::Sum>(total[k]);
    if (lane == 0 && first + k < shape.rows) shared.partial[blockIdx.y * shape.rows + first + k] = sum;
  }
  const int64_t tile_end = tile + kWarps * kRows;
  finish(shared, tile, tile_end < shape.rows ? tile_end : shape.rows, shape.rows, with, product, found);
}

// s = W^T N(x). A lane for P neighbouring columns, a warp for every eighth row of a split of the rows.
template <typename T, int P>
__global__ void __launch_bounds__(kThreads, kResident)
    columns_kernel(const T* weight, Shape shape, const T* x, const Length<T>* x_length, T* product, Length<T>* found,
                   Shared<T> shared) {
  __shared__ T sums[kWarps][kWarp * P];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarp * P, c = tile + lane * P, width = columns(shape);
  const int64_t per_split = ceil_div(shape.rows, gridDim.y);
  const int64_t begin = blockIdx.y * per_split, end = shape.rows < begin + per_split ? shape.rows : begin + per_split;
  const T factor = factor_of(x_length);
  T total[P] = {};
  if (c < width) {
    const T* a = weight + c / shape.inner * (shape.rows - 1) * shape.inner + c;
#pragma unroll 4
    for (int64_t r = begin + warp; r < end; r += kWarps) {
      const Pack<T, P> w = *reinterpret_cast<const Pack<T, P>*>(a + r * shape.inner);
      const T u = x[r] * factor;
#pragma unroll
      for (int j = 0; j < P; ++j) total[j] += w.value[j] * u;
    }
  }
#pragma unroll
  for (int j = 0; j < P; ++j) sums[warp][lane * P + j] = total[j];
  __syncthreads();
  for (int i = threadIdx.x; i < kWarp * P && tile + i < width; i += kThreads) {
    T sum = 0;
#pragma unroll
    for (int k = 0; k < kWarps; ++k) sum += sums[k][i];
    shared.partial[blockIdx.y * width + tile + i] = sum;
  }
  finish(shared, tile, tile + kWarp * P < width ? tile + kWarp * P : width, width, static_cast<const T*>(nullptr),
         product, found);
}

// normalized = W / sigma; u and v are t and s divided by their lengths, or as they were. `first` is the length of the
// product that was made first, or null if no iteration was made; sigma is the length of the other.
template <typename T, int P>
__global__ void __launch_bounds__(kThreads, kResident)
    quotient_kernel(const T* weight, Shape shape, double eps, const Length<T>* first, const Length<T>* second,
                    const T* u0, const T* v0, const T* t, const T* s, const Length<T>* t_length,
                    const Length<T>* s_length, T* normalized, T* u, T* v, T* sigma) {
  double found = second->length;
  if (first) found = first->length > 0 && first->length < HUGE_VAL ? found : first->length - first->length;
  if (first && !(found < HUGE_VAL)) found -= found;
  if (found == 0) found = eps;
  const T factor = static_cast<T>(1 / found);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  if (index == 0) *sigma = static_cast<T>(found);
  for (int64_t i = index; i < shape.rows; i += stride)
    u[i] = t_length && t_length->inverse > 0 ? t[i] * t_length->inverse : u0[i];
  for (int64_t i = index; i < columns(shape); i += stride)
    v[i] = s_length && s_length->inverse > 0 ? s[i] * s_length->inverse : v0[i];
  for (int64_t i = index * P; i < elements(shape); i += stride * P) {
    Pack<T, P> w = *reinterpret_cast<const Pack<T, P>*>(weight + i);
#pragma unroll
    for (int j = 0; j < P; ++j) w.value[j] *= factor;
    *reinterpret_cast<Pack<T, P>*>(normalized + i) = w;
  }
}

// <grad, W>
template <typename T, int P>
__global__ void __launch_bounds__(kThreads, kResident)
    inner_product_kernel(const T* grad, const T* weight, int64_t n, double* product, double* sums, unsigned* ticket) {
  __shared__ double scratch[kWarp];
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * P;
  T total[P] = {};
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * P; i < n; i += stride) {
    const Pack<T, P> g = *reinterpret_cast<const Pack<T, P>*>(grad + i);
    const Pack<T, P> w = *reinterpret_cast<const Pack<T, P>*>(weight + i);
#pragma unroll
    for (int j = 0; j < P; ++j) total[j] += g.value[j] * w.value[j];
  }
  double sum = 0;
#pragma unroll
  for (int j = 0; j < P; ++j) sum += total[j];
  sum = block_reduce<device::Sum>(sum, scratch, 0.0);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
  if (!is_last(ticket, gridDim.x)) return;
  const volatile double* all = sums;
  sum = 0;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads) sum += all[block];
  sum = block_reduce<device::Sum>(sum, scratch, 0.0);
  if (threadIdx.x == 0) *product = sum;
}

// grad / sigma + (grad_sigma - <grad, W> / sigma^2) u v^T. P divides inner.
template <typename T, int P>
__global__ void __launch_bounds__(kThreads, kResident)
    gradient_kernel(const T* grad, const T* grad_sigma, const double* product, Shape shape, const T* u, const T* v,
                    const T* sigma, T* grad_weight) {
  const double inverse = 1 / static_cast<double>(*sigma);
  const T a = static_cast<T>(inverse);
  const T b = static_cast<T>((grad_sigma ? static_cast<double>(*grad_sigma) : 0.0) -
                             (grad ? *product * inverse * inverse : 0.0));
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * P;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * P; i < elements(shape); i += stride) {
    const int64_t row = i / shape.inner, o = shape.outer == 1 ? 0 : row / shape.rows;
    const T bu = b * u[row - o * shape.rows];
    const Pack<T, P> w = *reinterpret_cast<const Pack<T, P>*>(v + o * shape.inner + (i - row * shape.inner));
    Pack<T, P> result;
#pragma unroll
    for (int j = 0; j < P; ++j) result.value[j] = bu * w.value[j];
    if (grad) {
      const Pack<T, P> g = *reinterpret_cast<const Pack<T, P>*>(grad + i);
#pragma unroll
      for (int j = 0; j < P; ++j) result.value[j] += a * g.value[j];
    }
    *reinterpret_cast<Pack<T, P>*>(grad_weight + i) = result;
  }
}

// ---- launches

int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }
int64_t at_least(int64_t n, int64_t limit) { return n > limit ? n : limit; }

template <typename T>
constexpr int kPack = 16 / sizeof(T);

template <typename T>
bool loads_packs(Shape shape, std::initializer_list<const T*> pointers) {
  for (const T* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  return shape.inner % kPack<T> == 0;
}

dim3 rows_grid(Shape shape) {
  const int64_t tiles = ceil_div(shape.rows, kWarps * kRows);
  const int64_t splits = at_least(1, at_most(ceil_div(kBlocks, tiles), columns(shape) / (kWarp * 16)));
  return dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(splits));
}

template <int P>
dim3 columns_grid(Shape shape) {
  const int64_t tiles = ceil_div(columns(shape), kWarp * P);
  const int64_t splits = at_least(1, at_most(ceil_div(kBlocks, tiles), shape.rows / (kWarps * 4)));
  return dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(splits));
}

dim3 loop_grid(int64_t elements, int pack) {
  return dim3(static_cast<unsigned>(at_least(1, at_most(ceil_div(elements, kThreads * pack), kGridLimit))));
}

// A weight stored by columns ([outer, rows, 1]) is the transposed matrix stored by rows.
bool is_transposed(Shape s) { return s.inner == 1 && s.outer > 1; }
Shape transposed(Shape s) { return {1, s.outer, s.rows}; }

// The scratch of both operators, cut up in pieces aligned to 16 bytes.
template <typename T>
struct Scratch {
  unsigned* tickets;
  double *sums, *product;
  Length<T>*t_length, *s_length;
  T *t, *s, *partial;
  int64_t tiles, bytes = 0;

  Scratch(Shape shape, void* base) {
    const dim3 by_row = rows_grid(shape), packed = columns_grid<kPack<T>>(shape), single = columns_grid<1>(shape);
    tiles = at_least(kGridLimit, at_least(by_row.x, single.x)) + 1;
    const int64_t splits = at_least(packed.y, single.y);
    tickets = take<unsigned>(base, tiles);
    sums = take<double>(base, tiles);
    product = take<double>(base, 1);
    t_length = take<Length<T>>(base, 1);
    s_length = take<Length<T>>(base, 1);
    t = take<T>(base, shape.rows);
    s = take<T>(base, columns(shape));
    partial = take<T>(base, at_least(by_row.y * shape.rows, splits * columns(shape)));
  }

  template <typename U>
  U* take(void* base, int64_t count) {
    U* piece = reinterpret_cast<U*>(reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(bytes));
    bytes += ceil_div(count * static_cast<int64_t>(sizeof(U)), 16) * 16;
    return piece;
  }

  void clear_tickets(Stream stream) const {
    check_cuda(
        cudaMemsetAsync(tickets, 0, static_cast<size_t>(tiles) * sizeof(unsigned), static_cast<cudaStream_t>(stream)),
        "clearing the tickets of spectral_norm");
  }
};

template <typename T>
int64_t scratch_size(Shape shape) {
  if (is_transposed(shape)) shape = transposed(shape);
  return Scratch<T>(shape, nullptr).bytes / static_cast<int64_t>(sizeof(T));
}

template <typename T, int P>
void normalize_packs(const T* weight, Shape shape, const T* u0, const T* v0, int64_t iterations, bool v_first,
                     double eps, T* normalized, T* u, T* v, T* sigma, const Scratch<T>& scratch, Stream stream) {
  const Shared<T> shared{scratch.tickets, scratch.sums, scratch.partial};
  const Length<T>* none = nullptr;
  const auto rows = [&](const T* x, const Length<T>* x_length, const T* with) {
    WGAN_EXT_LAUNCH((rows_kernel<T, P>), rows_grid(shape), kThreads, 0, stream, weight, shape, x, x_length, with,
                    scratch.t, scratch.t_length, shared);
  };
  const auto columns_of = [&](const T* x, const Length<T>* x_length) {
    WGAN_EXT_LAUNCH((columns_kernel<T, P>), columns_grid<P>(shape), kThreads, 0, stream, weight, shape, x, x_length,
                    scratch.s, scratch.s_length, shared);
  };
  if (iterations == 0) rows(v0, none, u0);
  for (int64_t i = 0; i < iterations; ++i) {
    const T* no_vector = nullptr;
    if (v_first) {
      i == 0 ? columns_of(u0, none) : columns_of(scratch.t, scratch.t_length);
      rows(scratch.s, scratch.s_length, no_vector);
    } else {
      i == 0 ? rows(v0, none, no_vector) : rows(scratch.s, scratch.s_length, no_vector);
      columns_of(scratch.t, scratch.t_length);
    }
  }
  const bool iterated = iterations > 0, t_last = v_first || !iterated;
  const Length<T>* second = t_last ? scratch.t_length : scratch.s_length;
  const Length<T>* first = t_last ? scratch.s_length : scratch.t_length;
  WGAN_EXT_LAUNCH((quotient_kernel<T, P>), loop_grid(elements(shape), P), kThreads, 0, stream, weight, shape, eps,
                  iterated ? first : none, second, u0, v0, scratch.t, scratch.s, iterated ? scratch.t_length : none,
                  iterated ? scratch.s_length : none, normalized, u, v, sigma);
}

template <typename T>
void normalize(const T* weight, Shape shape, const T* u0, const T* v0, int64_t iterations, bool v_first, double eps,
               T* normalized, T* u, T* v, T* sigma, T* scratch, Stream stream) {
  if (is_transposed(shape)) {
    normalize(weight, transposed(shape), v0, u0, iterations, !v_first, eps, normalized, v, u, sigma, scratch, stream);
    return;
  }
  const Scratch<T> pieces(shape, scratch);
  pieces.clear_tickets(stream);
  const bool packs = loads_packs(shape, {weight, v0, static_cast<const T*>(normalized)});
  (packs ? normalize_packs<T, kPack<T>> : normalize_packs<T, 1>)(weight, shape, u0, v0, iterations, v_first, eps,
                                                                 normalized, u, v, sigma, pieces, stream);
}

template <typename T, int P>
void backward_packs(const T* grad, const T* grad_sigma, const T* weight, Shape shape, const T* u, const T* v,
                    const T* sigma, T* grad_weight, const Scratch<T>& scratch, Stream stream) {
  const int64_t n = elements(shape);
  if (grad)
    WGAN_EXT_LAUNCH((inner_product_kernel<T, P>), dim3(static_cast<unsigned>(at_most(loop_grid(n, P).x, kBlocks))),
                    kThreads, 0, stream, grad, weight, n, scratch.product, scratch.sums, scratch.tickets);
  WGAN_EXT_LAUNCH((gradient_kernel<T, P>), loop_grid(n, P), kThreads, 0, stream, grad, grad_sigma, scratch.product,
                  shape, u, v, sigma, grad_weight);
}

template <typename T>
void backward(const T* grad, const T* grad_sigma, const T* weight, Shape shape, const T* u, const T* v, const T* sigma,
              T* grad_weight, T* scratch, Stream stream) {
  if (is_transposed(shape)) {
    backward(grad, grad_sigma, weight, transposed(shape), v, u, sigma, grad_weight, scratch, stream);
    return;
  }
  const Scratch<T> pieces(shape, scratch);
  pieces.clear_tickets(stream);
  const bool packs = loads_packs(shape, {weight, grad, v, static_cast<const T*>(grad_weight)});
  (packs ? backward_packs<T, kPack<T>> : backward_packs<T, 1>)(grad, grad_sigma, weight, shape, u, v, sigma,
                                                               grad_weight, pieces, stream);
}

template <typename T>
constexpr Kernels<T> kTable{&scratch_size<T>, &normalize<T>, &backward<T>};

}  // namespace

template <>
const Kernels<float>& Kernels<float>::cuda() {
  return kTable<float>;
}
template <>
const Kernels<double>& Kernels<double>::cuda() {
  return kTable<double>;
}

}  // namespace wgan_ext::spectral
