// The parallel loop without torch, for the programs here.
#include "parallel.h"

namespace wgan_ext {

void parallel_chunks(int64_t chunks, Order, void (*body)(const void*, int64_t), const void* context) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk) body(context, chunk);
}

void parallel_queue(int64_t items, void (*body)(const void*, int64_t), const void* context) {
  parallel_chunks(items, Order::forth, body, context);
}

}  // namespace wgan_ext
