#include "simd.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace wgan_ext {
namespace {

const char* level_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::avx512:
      return "avx512";
    case SimdLevel::avx2:
      return "avx2";
    case SimdLevel::portable:
      break;
  }
  return "portable";
}

SimdLevel processor_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return avx512 ? SimdLevel::avx512 : avx2 ? SimdLevel::avx2 : SimdLevel::portable;
#else
  return SimdLevel::portable;
#endif
}

SimdLevel chosen_level() {
  const SimdLevel best = processor_level();
  const char* wanted = std::getenv("WGAN_EXT_SIMD");
  if (wanted == nullptr) return best;
  for (SimdLevel level : {SimdLevel::portable, SimdLevel::avx2, SimdLevel::avx512})
    if (std::string(wanted) == level_name(level)) return level < best ? level : best;
  throw std::runtime_error(std::string("WGAN_EXT_SIMD must be portable, avx2 or avx512, got ") + wanted);
}

}  // namespace

SimdLevel simd_level() {
  static const SimdLevel level = chosen_level();
  return level;
}

const char* simd_level_name() { return level_name(simd_level()); }

}  // namespace wgan_ext
