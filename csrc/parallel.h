// The parallel loop of the CPU kernels. Work is cut into chunks by shape alone, never by the number of threads, so that
// results do not depend on it; reductions over chunks are summed in chunk order by the caller.
#pragma once
#include <cstdint>

namespace wgan_ext {

// The order in which a thread goes through its chunks. A pass that goes over the same data as the one before finds more
// of it in cache if it begins where that one ended.
enum class Order { forth, back };

// Calls body(context, chunk) for every chunk in [0, chunks), on torch's intra-op threads (parallel.cpp).
void parallel_chunks(int64_t chunks, Order order, void (*body)(const void* context, int64_t chunk),
                     const void* context);

template <typename Body>
void parallel_for(int64_t chunks, Order order, const Body& body) {
  if (chunks == 1) return body(int64_t{0});
  parallel_chunks(
      chunks, order, [](const void* context, int64_t chunk) { (*static_cast<const Body*>(context))(chunk); }, &body);
}

template <typename Body>
void parallel_for(int64_t chunks, const Body& body) {
  parallel_for(chunks, Order::forth, body);
}

// Calls body(context, item) for every item in [0, items), each by the next thread that is free: for items of different
// sizes, the largest first. What an item does in parallel is done by its one thread.
void parallel_queue(int64_t items, void (*body)(const void* context, int64_t item), const void* context);

template <typename Body>
void parallel_each(int64_t items, const Body& body) {
  parallel_queue(items, [](const void* context, int64_t item) { (*static_cast<const Body*>(context))(item); }, &body);
}

}  // namespace wgan_ext
