// Spectral normalization on the GPU.
//
// Each product with W is one streaming read by many blocks; what they find is summed by whichever finishes last, in a
// fixed order, and its length is known when the launch ends, so that the next product divides by it while it loads. One
// power iteration and the quotient are three launches, whatever the shapes of the weights and however many (up to
// kGroup); the second and third find W in the L2 cache where it fits. Nothing depends on the order in which blocks run.
#include <initializer_list>
#include <optional>

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
constexpr int64_t kGridLimit = kLoopBlocks;
constexpr int kGroup = 20;  // weights of a launch; what is said of them, its parameters, takes at most 4 KiB

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

// What a launch does to its weights; the blocks of item i begin at items[i].first_block.
template <typename Item>
struct Group {
  Item items[kGroup];
  int count;
};

template <typename Item>
__device__ const Item& item_of_block(const Group<Item>& group) {
  int i = 0;
  while (i + 1 < group.count && blockIdx.x >= group.items[i + 1].first_block) ++i;
  return group.items[i];
}

// product = W N(x) or W^T N(x), where x_length is the length of x or null for a unit vector, and found = |product|, or
// <product, with> if `with` is given. Block `first_block + split * tiles + tile` makes a tile's part of a split.
template <typename T>
struct Product {
  const T* weight;
  Shape shape;
  const T* x;
  const Length<T>* x_length;
  const T* with;
  T* product;
  Length<T>* found;
  Shared<T> shared;
  unsigned first_block, tiles, splits;
  bool packs;  // sixteen bytes are loaded at a time
};

// Sums the splits of the tile [begin, end) of a product of `length` elements; then, in the last block of the item,
// finds what the product's length is.
template <typename T>
__device__ void finish(const Product<T>& item, unsigned block, int64_t begin, int64_t end, int64_t length) {
  __shared__ double scratch[kWarp];
  const Shared<T> shared = item.shared;
  if (!is_last(shared.tickets + block, item.splits)) return;
  const volatile T* partial = shared.partial;
  double sum = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    T total = 0;
    for (unsigned split = 0; split < item.splits; ++split) total += partial[split * length + i];
    item.product[i] = total;
    sum += static_cast<double>(total) * static_cast<double>(item.with ? item.with[i] : total);
  }
  sum = block_reduce<device::Sum>(sum, scratch, 0.0);
  if (threadIdx.x == 0) shared.sums[block] = sum;
  if (!is_last(shared.tickets + item.tiles, item.tiles)) return;
  const volatile double* sums = shared.sums;
  sum = 0;
  for (unsigned tile = threadIdx.x; tile < item.tiles; tile += kThreads) sum += sums[tile];
  sum = block_reduce<device::Sum>(sum, scratch, 0.0);
  if (threadIdx.x == 0) {
    item.found->length = item.with ? sum : sqrt(sum);
    const T inverse = static_cast<T>(1 / item.found->length);
    item.found->inverse = item.found->length > 0 && inverse > 0 && inverse < static_cast<T>(HUGE_VAL) ? inverse : T{0};
  }
}

template <typename T>
__device__ T factor_of(const Length<T>* length) {
  return length ? length->inverse : T{1};
}

// A warp for four rows and a split of the columns.
template <typename T, int P>
__device__ void rows_of(const Product<T>& item) {
  const Shape shape = item.shape;
  const unsigned block = (blockIdx.x - item.first_block) % item.tiles;
  const unsigned split = (blockIdx.x - item.first_block) / item.tiles;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tile = static_cast<int64_t>(block) * kWarps * kRows, first = tile + warp * kRows;
  const int64_t width = columns(shape), per_split = ceil_div(ceil_div(width, P), item.splits) * P;
  const int64_t begin = split * per_split, end = width < begin + per_split ? width : begin + per_split;
  const T factor = factor_of(item.x_length);
  T total[kRows] = {};
  for (int64_t c = begin + lane * P; c < end; c += kWarp * P) {
    const int64_t o = shape.outer == 1 ? 0 : c / shape.inner;
    const T* a = item.weight + o * (shape.rows - 1) * shape.inner + c;
    Pack<T, P> v = *reinterpret_cast<const Pack<T, P>*>(item.x + c);
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
    if (lane == 0 && first + k < shape.rows) item.shared.partial[split * shape.rows + first + k] = sum;
  }
  const int64_t tile_end = tile + kWarps * kRows;
  finish(item, block, tile, tile_end < shape.rows ? tile_end : shape.rows, shape.rows);
}

// A lane for P neighbouring columns, a warp for every eighth row of a split of the rows.
template <typename T, int P>
__device__ void columns_of(const Product<T>& item) {
  __shared__ T sums[kWarps][kWarp * P];
  const Shape shape = item.shape;
  const unsigned block = (blockIdx.x - item.first_block) % item.tiles;
  const unsigned split = (blockIdx.x - item.first_block) / item.tiles;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tile = static_cast<int64_t>(block) * kWarp * P, c = tile + lane * P, width = columns(shape);
  const int64_t per_split = ceil_div(shape.rows, item.splits);
  const int64_t begin = split * per_split, end = shape.rows < begin + per_split ? shape.rows : begin + per_split;
  const T factor = factor_of(item.x_length);
  T total[P] = {};
  if (c < width) {
    const T* a = item.weight + c / shape.inner * (shape.rows - 1) * shape.inner + c;
#pragma unroll 4
    for (int64_t r = begin + warp; r < end; r += kWarps) {
      const Pack<T, P> w = *reinterpret_cast<const Pack<T, P>*>(a + r * shape.inner);
      const T u = item.x[r] * factor;
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
    item.shared.partial[split * width + tile + i] = sum;
  }
  finish(item, block, tile, tile + kWarp * P < width ? tile + kWarp * P : width, width);
}

template <typename T>
constexpr int kPack = 16 / sizeof(T);

template <typename T>
__global__ void __launch_bounds__(kThreads, kResident) rows_kernel(const __grid_constant__ Group<Product<T>> group) {
  const Product<T>& item = item_of_block(group);
  if (item.packs)
    rows_of<T, kPack<T>>(item);
  else
    rows_of<T, 1>(item);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kResident) columns_kernel(const __grid_constant__ Group<Product<T>> group) {
  const Product<T>& item = item_of_block(group);
  if (item.packs)
    columns_of<T, kPack<T>>(item);
  else
    columns_of<T, 1>(item);
}

// normalized = W / divisor(sigma); u and v are t and s divided by their lengths, or as they were. `first` is the length
// of the product that was made first, or null if no iteration was made; sigma is the length of the other.
template <typename T>
struct Quotient {
  const T* weight;
  Shape shape;
  double eps;
  Target target;
  const Length<T>*first, *second;
  const T *u0, *v0, *t, *s;
  const Length<T>*t_length, *s_length;
  T *normalized, *u, *v, *sigma;
  unsigned first_block, blocks;
  bool packs;
};

template <typename T, int P>
__device__ void multiply(const Quotient<T>& item, int64_t index, int64_t stride, T factor) {
  for (int64_t i = index * P; i < elements(item.shape); i += stride * P) {
    Pack<T, P> w = *reinterpret_cast<const Pack<T, P>*>(item.weight + i);
#pragma unroll
    for (int j = 0; j < P; ++j) w.value[j] *= factor;
    *reinterpret_cast<Pack<T, P>*>(item.normalized + i) = w;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kResident)
    quotient_kernel(const __grid_constant__ Group<Quotient<T>> group) {
  const Quotient<T>& item = item_of_block(group);
  double found = item.second->length;
  if (item.first)
    found = item.first->length > 0 && item.first->length < HUGE_VAL ? found : item.first->length - item.first->length;
  if (item.first && !(found < HUGE_VAL)) found -= found;
  if (found == 0) found = item.eps;
  const int64_t index = static_cast<int64_t>(blockIdx.x - item.first_block) * kThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(item.blocks) * kThreads;
  if (index == 0) *item.sigma = static_cast<T>(found);
  for (int64_t i = index; i < item.shape.rows; i += stride)
    item.u[i] = item.t_length && item.t_length->inverse > 0 ? item.t[i] * item.t_length->inverse : item.u0[i];
  for (int64_t i = index; i < columns(item.shape); i += stride)
    item.v[i] = item.s_length && item.s_length->inverse > 0 ? item.s[i] * item.s_length->inverse : item.v0[i];
  if (!item.normalized) return;
  const T factor = static_cast<T>(1 / divisor(item.target, found));
  if (item.packs)
    multiply<T, kPack<T>>(item, index, stride, factor);
  else
    multiply<T, 1>(item, index, stride, factor);
}

static_assert(sizeof(Group<Quotient<double>>) <= 4096 && sizeof(Group<Product<double>>) <= 4096);

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

// See Kernels<T>::backward. P divides inner.
template <typename T, int P>
__global__ void __launch_bounds__(kThreads, kResident)
    gradient_kernel(const T* grad, const T* grad_sigma, const double* product, Shape shape, const T* u, const T* v,
                    const T* sigma, Target target, T* grad_weight) {
  const double inverse = 1 / divisor(target, static_cast<double>(*sigma));
  const T a = static_cast<T>(inverse);
  double coefficient = grad_sigma ? static_cast<double>(*grad_sigma) : 0.0;
  if (grad && is_active(target, static_cast<double>(*sigma))) coefficient -= *product * inverse * inverse / target.norm;
  const T b = static_cast<T>(coefficient);
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
bool loads_packs(Shape shape, std::initializer_list<const T*> pointers) {
  for (const T* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  return shape.inner % kPack<T> == 0;
}

// How a product is cut.
struct Grid {
  unsigned tiles, splits;
};

Grid rows_grid(Shape shape) {
  const int64_t tiles = ceil_div(shape.rows, kWarps * kRows);
  const int64_t splits = at_least(1, at_most(ceil_div(kBlocks, tiles), columns(shape) / (kWarp * 16)));
  return {static_cast<unsigned>(tiles), static_cast<unsigned>(splits)};
}

Grid columns_grid(Shape shape, int pack) {
  const int64_t tiles = ceil_div(columns(shape), kWarp * pack);
  const int64_t splits = at_least(1, at_most(ceil_div(kBlocks, tiles), shape.rows / (kWarps * 4)));
  return {static_cast<unsigned>(tiles), static_cast<unsigned>(splits)};
}

unsigned loop_blocks(int64_t elements, int pack) {
  return static_cast<unsigned>(at_least(1, at_most(ceil_div(elements, kThreads * pack), kGridLimit)));
}

int64_t tickets_of(Shape shape) {
  return at_least(at_least(rows_grid(shape).tiles, columns_grid(shape, 1).tiles), kBlocks) + 1;
}

// Scratch, cut up in pieces aligned to 16 bytes.
class Cutter {
 public:
  explicit Cutter(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <typename U>
  U* take(int64_t count) {
    U* piece = reinterpret_cast<U*>(base_ + static_cast<uintptr_t>(bytes_));
    bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(U)), 16) * 16;
    return piece;
  }

  int64_t bytes() const { return bytes_; }

 private:
  uintptr_t base_;
  int64_t bytes_ = 0;
};

// What a weight needs besides its tickets.
template <typename T>
struct Scratch {
  Shared<T> shared;
  double* product;
  Length<T>*t_length, *s_length;
  T *t, *s;

  Scratch(Shape shape, unsigned* tickets, Cutter& cutter) {
    const Grid by_row = rows_grid(shape), packed = columns_grid(shape, kPack<T>), single = columns_grid(shape, 1);
    const int64_t splits = at_least(packed.splits, single.splits);
    shared.tickets = tickets;
    shared.sums = cutter.take<double>(tickets_of(shape));
    shared.partial = cutter.take<T>(at_least(by_row.splits * shape.rows, splits * columns(shape)));
    product = cutter.take<double>(1);
    t_length = cutter.take<Length<T>>(1);
    s_length = cutter.take<Length<T>>(1);
    t = cutter.take<T>(shape.rows);
    s = cutter.take<T>(columns(shape));
  }
};

template <typename T>
int64_t scratch_size(const Shape* shapes, int64_t count) {
  Cutter cutter(nullptr);
  for (int64_t i = 0; i < count; ++i) {
    const Shape shape = by_rows(shapes[i]);
    cutter.take<unsigned>(tickets_of(shape));
    Scratch<T>(shape, nullptr, cutter);
  }
  return ceil_div(cutter.bytes(), static_cast<int64_t>(sizeof(T)));
}

// Tickets for weights of these shapes, all zero, as launches want and leave them.
unsigned* take_tickets(int64_t count, Cutter& cutter, Stream stream) {
  unsigned* tickets = cutter.take<unsigned>(count);
  check_cuda(
      cudaMemsetAsync(tickets, 0, static_cast<size_t>(count) * sizeof(unsigned), static_cast<cudaStream_t>(stream)),
      "clearing the tickets of spectral_norm");
  return tickets;
}

// The launches of a group of weights. Step i makes one product for each weight that has as many to make; those that
// want W x are one launch, those that want W^T x another.
template <typename T>
class Launches {
 public:
  // `tickets` are those of jobs[0], behind which lie those of the others.
  Launches(const Job<T>* jobs, int count, unsigned* tickets, Cutter& cutter, Stream stream)
      : count_(count), stream_(stream) {
    for (int i = 0; i < count; ++i) {
      jobs_[i] = by_rows(jobs[i]);
      scratch_[i].emplace(jobs_[i].shape, tickets, cutter);
      tickets += tickets_of(jobs_[i].shape);
    }
  }

  void run() const {
    for (int64_t step = 0;; ++step) {
      Group<Product<T>> rows{}, columns{};
      for (int i = 0; i < count_; ++i) {
        const Job<T>& job = jobs_[i];
        if (step >= at_least(1, 2 * job.iterations)) continue;
        if (job.iterations > 0 && job.v_first == (step % 2 == 0))
          add(columns, column_product(i, step));
        else
          add(rows, row_product(i, step));
      }
      if (rows.count == 0 && columns.count == 0) break;
      if (rows.count > 0) WGAN_EXT_LAUNCH((rows_kernel<T>), blocks(rows), kThreads, 0, stream_, rows);
      if (columns.count > 0) WGAN_EXT_LAUNCH((columns_kernel<T>), blocks(columns), kThreads, 0, stream_, columns);
    }
    Group<Quotient<T>> quotients{};
    for (int i = 0; i < count_; ++i) add(quotients, quotient(i));
    WGAN_EXT_LAUNCH((quotient_kernel<T>), blocks(quotients), kThreads, 0, stream_, quotients);
  }

 private:
  static unsigned blocks_of(const Product<T>& item) { return item.tiles * item.splits; }
  static unsigned blocks_of(const Quotient<T>& item) { return item.blocks; }

  template <typename Item>
  static dim3 blocks(const Group<Item>& group) {
    const Item& last = group.items[group.count - 1];
    return dim3(last.first_block + blocks_of(last));
  }

  template <typename Item>
  static void add(Group<Item>& group, Item item) {
    item.first_block = group.count == 0 ? 0 : blocks(group).x;
    group.items[group.count++] = item;
  }

  bool packs(int i) const {
    const Job<T>& job = jobs_[i];
    return loads_packs(job.shape, {job.weight, job.v0, static_cast<const T*>(job.normalized)});
  }

  Product<T> row_product(int i, int64_t step) const {
    const Job<T>& job = jobs_[i];
    const Scratch<T>& at = *scratch_[i];
    const Grid grid = rows_grid(job.shape);
    Product<T> item{job.weight,  job.shape, at.s, at.s_length, nullptr,     at.t,
                    at.t_length, at.shared, 0,    grid.tiles,  grid.splits, packs(i)};
    if (step > 0) return item;
    item.x = job.v0;
    item.x_length = nullptr;
    if (job.iterations == 0) item.with = job.u0;
    return item;
  }

  Product<T> column_product(int i, int64_t step) const {
    const Job<T>& job = jobs_[i];
    const Scratch<T>& at = *scratch_[i];
    const Grid grid = columns_grid(job.shape, packs(i) ? kPack<T> : 1);
    Product<T> item{job.weight,  job.shape, at.t, at.t_length, nullptr,     at.s,
                    at.s_length, at.shared, 0,    grid.tiles,  grid.splits, packs(i)};
    if (step > 0) return item;
    item.x = job.u0;
    item.x_length = nullptr;
    return item;
  }

  Quotient<T> quotient(int i) const {
    const Job<T>& job = jobs_[i];
    const Scratch<T>& at = *scratch_[i];
    const bool iterated = job.iterations > 0, t_last = job.v_first || !iterated;
    const Length<T>* none = nullptr;
    return {job.weight,
            job.shape,
            job.eps,
            job.target,
            iterated ? (t_last ? at.s_length : at.t_length) : none,
            t_last ? at.t_length : at.s_length,
            job.u0,
            job.v0,
            at.t,
            at.s,
            iterated ? at.t_length : none,
            iterated ? at.s_length : none,
            job.normalized,
            job.u,
            job.v,
            job.sigma,
            0,
            loop_blocks(elements(job.shape), packs(i) ? kPack<T> : 1),
            packs(i)};
  }

  Job<T> jobs_[kGroup];
  std::optional<Scratch<T>> scratch_[kGroup];
  int count_;
  Stream stream_;
};

template <typename T>
void normalize(const Job<T>* jobs, int64_t count, T* scratch, Stream stream) {
  int64_t tickets_wanted = 0;
  for (int64_t i = 0; i < count; ++i) tickets_wanted += tickets_of(by_rows(jobs[i].shape));
  Cutter cutter(scratch);
  unsigned* tickets = take_tickets(tickets_wanted, cutter, stream);
  for (int64_t i = 0; i < count; i += kGroup) {
    const int64_t n = at_most(kGroup, count - i);
    Launches<T>(jobs + i, static_cast<int>(n), tickets, cutter, stream).run();
    for (int64_t k = i; k < i + n; ++k) tickets += tickets_of(by_rows(jobs[k].shape));
  }
}

template <typename T, int P>
void backward_packs(const T* grad, const T* grad_sigma, const T* weight, Shape shape, const T* u, const T* v,
                    const T* sigma, Target target, T* grad_weight, const Scratch<T>& scratch, Stream stream) {
  const int64_t n = elements(shape);
  const bool may_be_active = !target.shrink_only || target.norm < HUGE_VAL;
  if (grad && may_be_active)
    WGAN_EXT_LAUNCH((inner_product_kernel<T, P>), dim3(static_cast<unsigned>(at_most(loop_blocks(n, P), kBlocks))),
                    kThreads, 0, stream, grad, weight, n, scratch.product, scratch.shared.sums, scratch.shared.tickets);
  WGAN_EXT_LAUNCH((gradient_kernel<T, P>), dim3(loop_blocks(n, P)), kThreads, 0, stream, grad, grad_sigma,
                  scratch.product, shape, u, v, sigma, target, grad_weight);
}

template <typename T>
void backward(const T* grad, const T* grad_sigma, const T* weight, Shape shape, const T* u, const T* v, const T* sigma,
              Target target, T* grad_weight, T* scratch, Stream stream) {
  if (is_transposed(shape)) {
    backward(grad, grad_sigma, weight, by_rows(shape), v, u, sigma, target, grad_weight, scratch, stream);
    return;
  }
  shape = by_rows(shape);
  Cutter cutter(scratch);
  unsigned* tickets = take_tickets(tickets_of(shape), cutter, stream);
  const Scratch<T> pieces(shape, tickets, cutter);
  const bool packs = loads_packs(shape, {weight, grad, v, static_cast<const T*>(grad_weight)});
  (packs ? backward_packs<T, kPack<T>> : backward_packs<T, 1>)(grad, grad_sigma, weight, shape, u, v, sigma, target,
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
