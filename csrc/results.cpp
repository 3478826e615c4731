#include "results.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <list>
#include <map>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace wgan_ext {
namespace {

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kPage = 4 << 10;
constexpr size_t kLarge = 64 << 10;

size_t rounded(size_t bytes) {
  const size_t page = bytes < 4 * kHugePage ? kPage : kHugePage;
  return (bytes + page - 1) / page * page;
}

class Blocks final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kLarge) return c10::GetDefaultCPUAllocator()->allocate(bytes);
    auto* block = new Block{take(rounded(bytes)), rounded(bytes)};
    c10::profiledCPUMemoryReporter().New(block->memory, bytes);
    return {block->memory, block, &give_back, at::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // what it is given is no memory but a Block
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  size_t empty() {
    const std::lock_guard lock(mutex_);
    const size_t freed = bytes_kept_;
    keep_at_most(0);
    most_in_use_ = bytes_in_use_;
    return freed;
  }

  static Blocks& instance() {
    static Blocks* blocks = new Blocks;  // never destroyed: tensors may outlive everything else
    return *blocks;
  }

 private:
  struct Block {
    void* memory;
    size_t bytes;
  };
  using Kept = std::list<Block>;

  void* take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    void* memory = nullptr;
    if (const auto found = by_size_.find(bytes); found != by_size_.end()) {
      memory = found->second->memory;
      forget(found);
    }
    bytes_in_use_ += bytes;
    most_in_use_ = std::max(most_in_use_, bytes_in_use_);
    if (memory) return memory;
    const size_t alignment = bytes % kHugePage == 0 ? kHugePage : kPage;
    memory = std::aligned_alloc(alignment, bytes);
    if (!memory) {
      keep_at_most(0);
      memory = std::aligned_alloc(alignment, bytes);
    }
    if (!memory) {
      bytes_in_use_ -= bytes;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "wgan_ext: no memory for a result of ", bytes, " bytes");
    }
#if defined(MADV_HUGEPAGE)
    if (bytes % kHugePage == 0) madvise(memory, bytes, MADV_HUGEPAGE);  // advice: where it fails nothing is lost
#endif
    return memory;
  }

  static void give_back(void* context) {
    auto* block = static_cast<Block*>(context);
    c10::profiledCPUMemoryReporter().Delete(block->memory);
    Blocks& blocks = instance();
    const std::lock_guard lock(blocks.mutex_);
    blocks.bytes_in_use_ -= block->bytes;
    blocks.bytes_kept_ += block->bytes;
    blocks.kept_.push_back(*block);
    blocks.by_size_.emplace(block->bytes, std::prev(blocks.kept_.end()));
    blocks.keep_at_most(blocks.most_in_use_);
    delete block;
  }

  void forget(std::multimap<size_t, Kept::iterator>::iterator entry) {
    bytes_kept_ -= entry->first;
    kept_.erase(entry->second);
    by_size_.erase(entry);
  }

  void keep_at_most(size_t bytes) {  // frees those that were given back first
    while (bytes_kept_ > bytes) {
      auto [entry, end] = by_size_.equal_range(kept_.front().bytes);
      while (entry->second != kept_.begin()) ++entry;
      std::free(kept_.front().memory);
      forget(entry);
    }
  }

  std::mutex mutex_;
  Kept kept_;  // in the order in which they were given back
  std::multimap<size_t, Kept::iterator> by_size_;
  size_t bytes_kept_ = 0, bytes_in_use_ = 0, most_in_use_ = 0;
};

}  // namespace

at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (!options.device().is_cpu()) return at::empty(sizes, options);
  return at::detail::empty_generic(sizes, &Blocks::instance(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   c10::typeMetaToScalarType(options.dtype()), std::nullopt);
}

int64_t empty_cache() { return static_cast<int64_t>(Blocks::instance().empty()); }

}  // namespace wgan_ext
