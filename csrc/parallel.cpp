#include "parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#if !AT_PARALLEL_OPENMP
#error "build with -fopenmp -DAT_PARALLEL_OPENMP=1: at::parallel_for would silently run on one thread"
#endif

namespace wgan_ext {

void parallel_chunks(int64_t chunks, Order order, void (*body)(const void*, int64_t), const void* context) {
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    if (order == Order::forth)
      for (int64_t chunk = begin; chunk < end; ++chunk) body(context, chunk);
    else
      for (int64_t chunk = end; chunk-- > begin;) body(context, chunk);
  });
}

void parallel_queue(int64_t items, void (*body)(const void*, int64_t), const void* context) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(items, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(context, item);
  });
}

}  // namespace wgan_ext
