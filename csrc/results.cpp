#include "results.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <unordered_map>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace wgan_ext {
namespace {

constexpr size_t kPage = 2 << 20;    // a huge page
constexpr size_t kLarge = 16 << 20;  // malloc keeps smaller blocks itself

// What the system is told of a block; advice, so where it fails nothing is lost.
void wants_huge_pages(void* block, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  madvise(block, bytes, MADV_HUGEPAGE);
#endif
}
void contents_are_void(void* block, size_t bytes) {
#if defined(MADV_FREE)
  madvise(block, bytes, MADV_FREE);
#endif
}

class Blocks final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kLarge) return c10::GetDefaultCPUAllocator()->allocate(bytes);
    void* block = take((bytes + kPage - 1) / kPage * kPage);
    c10::profiledCPUMemoryReporter().New(block, bytes);
    return {block, block, &give_back, at::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // that of a small block is another
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  size_t empty() {
    const std::lock_guard lock(mutex_);
    const size_t freed = bytes_kept_;
    keep_at_most(0);
    most_ = bytes_in_use_;
    return freed;
  }

  static Blocks& instance() {
    static Blocks* blocks = new Blocks;  // never destroyed: tensors may outlive everything else
    return *blocks;
  }

 private:
  void* take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    void* block = nullptr;
    for (auto kept = kept_.rbegin(); kept != kept_.rend() && !block; ++kept)
      if (sizes_.at(*kept) == bytes) {
        block = *kept;
        kept_.erase(std::next(kept).base());
        bytes_kept_ -= bytes;
      }
    bytes_in_use_ += bytes;
    if (bytes_in_use_ > most_) most_ = bytes_in_use_;
    keep_at_most(most_ - bytes_in_use_);
    if (block) return block;
    block = std::aligned_alloc(kPage, bytes);
    if (!block) {
      bytes_in_use_ -= bytes;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "wgan_ext: no memory for a result of ", bytes, " bytes");
    }
    wants_huge_pages(block, bytes);
    sizes_[block] = bytes;
    return block;
  }

  static void give_back(void* block) {
    Blocks& blocks = instance();
    c10::profiledCPUMemoryReporter().Delete(block);
    const std::lock_guard lock(blocks.mutex_);
    const size_t bytes = blocks.sizes_.at(block);
    contents_are_void(block, bytes);
    blocks.bytes_in_use_ -= bytes;
    blocks.bytes_kept_ += bytes;
    blocks.kept_.push_back(block);
  }

  void keep_at_most(size_t bytes) {  // drops those that were given back first
    while (bytes_kept_ > bytes) {
      void* block = kept_.front();
      kept_.pop_front();
      bytes_kept_ -= sizes_.at(block);
      sizes_.erase(block);
      std::free(block);
    }
  }

  std::mutex mutex_;
  std::deque<void*> kept_;
  std::unordered_map<void*, size_t> sizes_;  // of all blocks
  size_t bytes_kept_ = 0, bytes_in_use_ = 0, most_ = 0;
};

}  // namespace

at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  if (!options.device().is_cpu() || bytes < kLarge) return at::empty(sizes, options);
  return at::detail::empty_generic(sizes, &Blocks::instance(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   c10::typeMetaToScalarType(options.dtype()), std::nullopt);
}

int64_t empty_cache() { return static_cast<int64_t>(Blocks::instance().empty()); }

}  // namespace wgan_ext
