// Memory for results. A large block that malloc takes from the system at every call costs a page fault for each of its
// pages (10 ms for 64 MiB, measured, even with huge pages; reading and writing them takes 2), so on the CPU large
// blocks are kept and used again.
#pragma once
#include <ATen/core/Tensor.h>

namespace wgan_ext {

// at::empty, with kept blocks for all but small results on the CPU. No more bytes are kept than were once in use.
at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options);

// Frees the blocks that are kept; returns their bytes.
int64_t empty_cache();

}  // namespace wgan_ext
