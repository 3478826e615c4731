#include "parallel.h"

#include <ATen/Parallel.h>

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

}  // namespace wgan_ext
