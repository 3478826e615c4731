// The 16-bit floating-point types as they lie in memory; only CUDA kernels compute with them (cuda/half.cuh).
#pragma once
#include <cstdint>

namespace wgan_ext {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

}  // namespace wgan_ext
