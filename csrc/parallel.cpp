#include "parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <thread>

#if !AT_PARALLEL_OPENMP
#error "build with -fopenmp -DAT_PARALLEL_OPENMP=1: at::parallel_for would silently run on one thread"
#endif

namespace wgan_ext {
namespace {

// Spins until `ready`, and lets others run where that takes long, as with more threads than processors.
template <typename Ready>
void wait_until(const Ready& ready) {
  for (int spins = 0; !ready(); ++spins) {
    if (spins >= 1 << 12) {
      std::this_thread::yield();
      continue;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
}

// The threads of a region. There are as many shares of a loop as torch has threads; a thread of the region does one, or
// more where OpenMP gives fewer threads, down to all of them within another parallel region. The leader posts loops.
class Team {
 public:
  explicit Team(int64_t shares) : shares_(shares) {}

  // The part of a thread with the shares [begin, end) but the leader's: does those of each loop that is posted.
  void follow(int64_t begin, int64_t end) {
    for (uint64_t seen = 0;;) {
      wait_until([&] { return posted_.load(std::memory_order_acquire) != seen; });
      ++seen;
      if (!work_) return;
      for (int64_t share = begin; share < end; ++share) work_(context_, share);
      done_.fetch_add(end - begin, std::memory_order_release);
    }
  }

  // The leader has the shares [0, own).
  void lead(int64_t own, void (*body)(const void*), const void* context) {
    own_ = own;
    led = this;
    body(context);
    led = nullptr;
    work_ = nullptr;
    posted_.fetch_add(1, std::memory_order_release);
  }

  void loop(void (*work)(const void*, int64_t), const void* context) {
    work_ = work;
    context_ = context;
    done_.store(own_, std::memory_order_relaxed);
    posted_.fetch_add(1, std::memory_order_release);
    led = nullptr;  // loops within the loop are the thread's own
    for (int64_t share = 0; share < own_; ++share) work(context, share);
    led = this;
    wait_until([&] { return done_.load(std::memory_order_acquire) == shares_; });
  }

  int64_t shares() const { return shares_; }

  static thread_local Team* led;  // that this thread may post a loop to

 private:
  const int64_t shares_;
  int64_t own_ = 0;
  void (*work_)(const void*, int64_t) = nullptr;
  const void* context_ = nullptr;
  alignas(64) std::atomic<uint64_t> posted_{0};  // loops so far, and the end
  alignas(64) std::atomic<int64_t> done_{0};     // shares of the loop
};

thread_local Team* Team::led = nullptr;

// Calls body(begin, end) for parts of [0, count), on all threads.
template <typename Body>
void share_out(int64_t count, const Body& body) {
  Team* team = Team::led;
  if (!team) return at::parallel_for(0, count, 1, body);
  struct Loop {
    const Body& body;
    int64_t count, each;
  };
  const Loop loop{body, count, (count + team->shares() - 1) / team->shares()};
  team->loop(
      [](const void* context, int64_t share) {
        const Loop& loop = *static_cast<const Loop*>(context);
        const int64_t begin = share * loop.each, end = std::min(loop.count, begin + loop.each);
        if (begin < end) loop.body(begin, end);
      },
      &loop);
}

}  // namespace

void parallel_chunks(int64_t chunks, Order order, void (*body)(const void*, int64_t), const void* context) {
  share_out(chunks, [&](int64_t begin, int64_t end) {
    if (order == Order::forth)
      for (int64_t chunk = begin; chunk < end; ++chunk) body(context, chunk);
    else
      for (int64_t chunk = end; chunk-- > begin;) body(context, chunk);
  });
}

void parallel_queue(int64_t items, void (*body)(const void*, int64_t), const void* context) {
  std::atomic<int64_t> next{0};
  share_out(std::min<int64_t>(items, at::get_num_threads()), [&](int64_t, int64_t) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(context, item);
  });
}

void parallel_region(void (*body)(const void*), const void* context) {
  if (Team::led || at::in_parallel_region() || at::get_num_threads() == 1) return body(context);
  Team team(at::get_num_threads());
  at::parallel_for(0, team.shares(), 1, [&](int64_t begin, int64_t end) {
    if (begin == 0)
      team.lead(end, body, context);
    else
      team.follow(begin, end);
  });
}

}  // namespace wgan_ext
