// Which vector level this machine runs, and the vector type that every CPU kernel is written in.
//
// A tower's cpu.cpp is compiled once per level, by three short stubs that define WGAN_EXT_LEVEL_<...> and include it.
// This header must be its LAST include: the target pragma below holds for everything after it, and a standard inline
// function compiled for AVX would be merged with the portable one by the linker and crash older processors. For the
// same reason kernels use nothing from the standard library below this point.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace wgan_ext {

enum class SimdLevel { portable, avx2, avx512 };

// The best level of this processor; the environment variable WGAN_EXT_SIMD=portable|avx2|avx512 lowers it (simd.cpp).
SimdLevel simd_level();
const char* simd_level_name();

}  // namespace wgan_ext

// In a tower's kernels.h, after `template <typename T> struct Table` (its function pointers): declares the table of
// every level, each defined in that level's compilation of cpu.cpp, and defines Table<T>::cpu, which picks one.
#define WGAN_EXT_DECLARE_LEVEL(Table, level) \
  namespace level {                          \
  template <typename T>                      \
  const Table<T>& table();                   \
  }
#if defined(__x86_64__) && !defined(WGAN_EXT_EMULATED)
#define WGAN_EXT_CPU_TABLES(Table)                             \
  WGAN_EXT_DECLARE_LEVEL(Table, portable)                      \
  WGAN_EXT_DECLARE_LEVEL(Table, avx2)                          \
  WGAN_EXT_DECLARE_LEVEL(Table, avx512)                        \
  template <typename T>                                        \
  const Table<T>& Table<T>::cpu(SimdLevel level) {             \
    if (level == SimdLevel::avx512) return avx512::table<T>(); \
    if (level == SimdLevel::avx2) return avx2::table<T>();     \
    return portable::table<T>();                               \
  }
#else
#define WGAN_EXT_CPU_TABLES(Table)           \
  WGAN_EXT_DECLARE_LEVEL(Table, portable)    \
  template <typename T>                      \
  const Table<T>& Table<T>::cpu(SimdLevel) { \
    return portable::table<T>();             \
  }
#endif

#if defined(WGAN_EXT_LEVEL_AVX512)
#define WGAN_EXT_LEVEL avx512
#define WGAN_EXT_VECTOR_BYTES 64
#define WGAN_EXT_TARGET "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi2"
#elif defined(WGAN_EXT_LEVEL_AVX2)
#define WGAN_EXT_LEVEL avx2
#define WGAN_EXT_VECTOR_BYTES 32
#define WGAN_EXT_TARGET "avx2,fma,f16c,bmi2"
#elif defined(WGAN_EXT_LEVEL_PORTABLE)
#define WGAN_EXT_LEVEL portable
#define WGAN_EXT_VECTOR_BYTES 16
#endif

#if defined(WGAN_EXT_LEVEL)
#define WGAN_EXT_STRING_(x) #x
#define WGAN_EXT_STRING(x) WGAN_EXT_STRING_(x)
#if defined(WGAN_EXT_TARGET) && defined(__clang__)
#define WGAN_EXT_CLANG_TARGET(t) \
  _Pragma(WGAN_EXT_STRING(clang attribute push(__attribute__((target(t))), apply_to = function)))
WGAN_EXT_CLANG_TARGET(WGAN_EXT_TARGET)
#elif defined(WGAN_EXT_TARGET)
#define WGAN_EXT_GCC_TARGET(t) _Pragma(WGAN_EXT_STRING(GCC target(t)))
WGAN_EXT_GCC_TARGET(WGAN_EXT_TARGET)
#endif
#define WGAN_EXT_INLINE inline __attribute__((always_inline))

namespace wgan_ext::WGAN_EXT_LEVEL {

template <typename T>
WGAN_EXT_INLINE T least(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
WGAN_EXT_INLINE T greatest(T a, T b) {
  return a < b ? b : a;
}

// A register of this level: WGAN_EXT_VECTOR_BYTES of T (float or double).
template <typename T>
struct Vec {
  typedef T Register __attribute__((vector_size(WGAN_EXT_VECTOR_BYTES)));
  static constexpr int64_t size = WGAN_EXT_VECTOR_BYTES / sizeof(T);
  Register value;

  static WGAN_EXT_INLINE Vec fill(T x) { return {Register{} + x}; }
  static WGAN_EXT_INLINE Vec zero() { return {Register{}}; }
  static WGAN_EXT_INLINE Vec load(const T* p) {
    Vec r;
    std::memcpy(&r.value, p, sizeof r.value);
    return r;
  }
  // The first n < size elements; the others are zero.
  static WGAN_EXT_INLINE Vec load(const T* p, int64_t n) {
    Vec r = zero();
    std::memcpy(&r.value, p, n * sizeof(T));
    return r;
  }
  WGAN_EXT_INLINE void store(T* p) const { std::memcpy(p, &value, sizeof value); }
  WGAN_EXT_INLINE void store(T* p, int64_t n) const { std::memcpy(p, &value, n * sizeof(T)); }
  // Past the caches; p is aligned to the vector. See finish_streams.
  WGAN_EXT_INLINE void stream(T* p) const {
#if defined(WGAN_EXT_LEVEL_AVX512)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(value));
#elif defined(WGAN_EXT_LEVEL_AVX2)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(value));
#elif defined(__SSE2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(value));
#else
    store(p);
#endif
  }

  friend WGAN_EXT_INLINE Vec operator+(Vec a, Vec b) { return {a.value + b.value}; }
  friend WGAN_EXT_INLINE Vec operator-(Vec a, Vec b) { return {a.value - b.value}; }
  friend WGAN_EXT_INLINE Vec operator*(Vec a, Vec b) { return {a.value * b.value}; }
  friend WGAN_EXT_INLINE Vec operator/(Vec a, Vec b) { return {a.value / b.value}; }
};

// After the last Vec::stream of a thread, before another thread may read what it wrote.
WGAN_EXT_INLINE void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// a * b + c, one instruction where the level has it (the build sets -ffp-contract=fast).
template <typename T>
WGAN_EXT_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return {a.value * b.value + c.value};
}

// The sum over the lanes, in a fixed order.
template <typename T>
WGAN_EXT_INLINE T sum(Vec<T> a) {
  T total[Vec<T>::size];
  a.store(total);
  for (int64_t width = Vec<T>::size / 2; width; width /= 2)
    for (int64_t i = 0; i < width; ++i) total[i] += total[i + width];
  return total[0];
}

}  // namespace wgan_ext::WGAN_EXT_LEVEL
#endif
