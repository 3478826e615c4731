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

// While one lives, this thread's subnormal results are zero, as arguments too: Intel's processors take a hundred cycles
// and more for each (a Sinkhorn pass at small epsilon was six times slower).
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  WGAN_EXT_INLINE FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  WGAN_EXT_INLINE ~FlushSubnormals() { _mm_setcsr(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned before_;
#else
  WGAN_EXT_INLINE ~FlushSubnormals() {}
#endif
};

// a * b + c, one instruction where the level has it (the build sets -ffp-contract=fast).
template <typename T>
WGAN_EXT_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return {a.value * b.value + c.value};
}

// The level's own instruction on whole registers, suffix ps or pd. (Zero-masked at AVX-512 because GCC 12 warns of its
// own unmasked intrinsics.)
#if defined(WGAN_EXT_LEVEL_AVX512)
#define WGAN_EXT_NATIVE(operation, suffix, ...) _mm512_maskz_##operation##_##suffix(-1, __VA_ARGS__)
#define WGAN_EXT_NATIVE_FLOAT __m512
#define WGAN_EXT_NATIVE_DOUBLE __m512d
#elif defined(WGAN_EXT_LEVEL_AVX2)
#define WGAN_EXT_NATIVE(operation, suffix, ...) _mm256_##operation##_##suffix(__VA_ARGS__)
#define WGAN_EXT_NATIVE_FLOAT __m256
#define WGAN_EXT_NATIVE_DOUBLE __m256d
#elif defined(__SSE2__)
#define WGAN_EXT_NATIVE(operation, suffix, ...) _mm_##operation##_##suffix(__VA_ARGS__)
#define WGAN_EXT_NATIVE_FLOAT __m128
#define WGAN_EXT_NATIVE_DOUBLE __m128d
#endif

// least and greatest return the second of two registers' elements where either is NaN.
#if defined(WGAN_EXT_NATIVE)
#define WGAN_EXT_NATIVE_OPERATIONS(T, Native, suffix)                                          \
  WGAN_EXT_INLINE Vec<T> least(Vec<T> a, Vec<T> b) {                                           \
    return {(Vec<T>::Register)WGAN_EXT_NATIVE(min, suffix, (Native)a.value, (Native)b.value)}; \
  }                                                                                            \
  WGAN_EXT_INLINE Vec<T> greatest(Vec<T> a, Vec<T> b) {                                        \
    return {(Vec<T>::Register)WGAN_EXT_NATIVE(max, suffix, (Native)a.value, (Native)b.value)}; \
  }                                                                                            \
  WGAN_EXT_INLINE Vec<T> sqrt(Vec<T> a) { return {(Vec<T>::Register)WGAN_EXT_NATIVE(sqrt, suffix, (Native)a.value)}; }
WGAN_EXT_NATIVE_OPERATIONS(float, WGAN_EXT_NATIVE_FLOAT, ps)
WGAN_EXT_NATIVE_OPERATIONS(double, WGAN_EXT_NATIVE_DOUBLE, pd)
#else
template <typename T>
WGAN_EXT_INLINE Vec<T> least(Vec<T> a, Vec<T> b) {
  return {a.value < b.value ? a.value : b.value};
}
template <typename T>
WGAN_EXT_INLINE Vec<T> greatest(Vec<T> a, Vec<T> b) {
  return {b.value < a.value ? a.value : b.value};
}
template <typename T>
WGAN_EXT_INLINE Vec<T> sqrt(Vec<T> a) {
  for (int64_t i = 0; i < Vec<T>::size; ++i) a.value[i] = __builtin_sqrt(a.value[i]);
  return a;
}
#endif

// What exp2 and log2 need to know of a type: its bits, and minimax polynomials of degree 5 and 11 for 2^r on
// [-1/2, 1/2] (relative error 9e-8 and 3e-18; 1 at 0) and of log2((1 + t) / (1 - t)) / t in t^2 on [1/sqrt 2, sqrt 2].
template <typename T>
struct Binary;
template <>
struct Binary<float> {
  typedef int32_t Bits __attribute__((vector_size(WGAN_EXT_VECTOR_BYTES)));
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float least = -126, most = 128, rounder = 0x1.8p23f;
  static constexpr float exp2[] = {1.0f,
                                   0.693146977568413f,
                                   0.24022242025815851f,
                                   0.055507337562911485f,
                                   0.009671516570295583f,
                                   0.0013264736892709093f};
  static constexpr float log2[] = {2.88539008178009006f, 0.961796673349930665f, 0.577083582931838137f,
                                   0.411672825759151673f, 0.340728026368649273f};
  static constexpr int32_t half = 0x3f3504f3;  // the bits of sqrt(1/2)
};
template <>
struct Binary<double> {
  typedef int64_t Bits __attribute__((vector_size(WGAN_EXT_VECTOR_BYTES)));
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double least = -1022, most = 1024, rounder = 0x1.8p52;
  static constexpr double exp2[] = {1.0,
                                    0.69314718055994533047,
                                    0.24022650695910156198,
                                    0.055504108664819920829,
                                    0.0096181291075883375878,
                                    0.0013333558146790119134,
                                    0.00015403530462511438904,
                                    0.000015252733489787996875,
                                    1.321543309117148398e-6,
                                    1.0178198108777556482e-7,
                                    7.0741053598010983954e-9,
                                    4.4352692144885519186e-10};
  static constexpr double log2[] = {2.8853900817779268147,  0.96179669392597560591, 0.57707801635558424018,
                                    0.41219858311161942253, 0.32059889786810913861, 0.2623082027972794876,
                                    0.22195204304293915824, 0.19240865071806741154, 0.16832335470880751469,
                                    0.17375563160714820463};
  static constexpr int64_t half = 0x3fe6a09e667f3bcd;
};

template <typename T, int n>
WGAN_EXT_INLINE Vec<T> polynomial(const T (&coefficients)[n], Vec<T> x) {
  Vec<T> value = Vec<T>::fill(coefficients[n - 1]);
  for (int i = n - 2; i >= 0; --i) value = fma(value, x, Vec<T>::fill(coefficients[i]));
  return value;
}

// 2^x. From 128 (1024 in double) upwards infinity; below -126 (-1022) a value of at most 1.5 times the least normal
// number, which stands for zero.
template <typename T>
WGAN_EXT_INLINE Vec<T> exp2(Vec<T> x) {
#if defined(WGAN_EXT_LEVEL_AVX512)
  if constexpr (sizeof(T) == 4) {
    const __m512 whole = WGAN_EXT_NATIVE(roundscale, ps, (__m512)x.value, 0);
    const Vec<T> rest = {x.value - (typename Vec<T>::Register)whole};
    return {
        (typename Vec<T>::Register)WGAN_EXT_NATIVE(scalef, ps, (__m512)polynomial(Binary<T>::exp2, rest).value, whole)};
  } else {
    const __m512d whole = WGAN_EXT_NATIVE(roundscale, pd, (__m512d)x.value, 0);
    const Vec<T> rest = {x.value - (typename Vec<T>::Register)whole};
    return {(typename Vec<T>::Register)WGAN_EXT_NATIVE(scalef, pd, (__m512d)polynomial(Binary<T>::exp2, rest).value,
                                                       whole)};
  }
#else
  using Constants = Binary<T>;
  x = least(Vec<T>::fill(Constants::most), greatest(Vec<T>::fill(Constants::least), x));  // NaN stays
  const Vec<T> shifted = x + Vec<T>::fill(Constants::rounder);  // the low bits of the mantissa now hold round(x)
  const Vec<T> rest = x - (shifted - Vec<T>::fill(Constants::rounder));
  const Vec<T> fraction = polynomial(Constants::exp2, rest);
  using Bits = typename Constants::Bits;
  return {(typename Vec<T>::Register)((Bits)fraction.value + ((Bits)shifted.value << Constants::mantissa))};
#endif
}

// The binary logarithm of a positive normal number.
template <typename T>
WGAN_EXT_INLINE Vec<T> log2(Vec<T> x) {
  using Constants = Binary<T>;
  using Bits = typename Constants::Bits;
  const Bits offset = (Bits)x.value - Constants::half;
  const Bits exponent = offset >> Constants::mantissa;
  const Vec<T> m = {(typename Vec<T>::Register)((Bits)x.value - (exponent << Constants::mantissa))};
  const Vec<T> t = (m - Vec<T>::fill(1)) / (m + Vec<T>::fill(1));
  const Vec<T> whole = {__builtin_convertvector(exponent, typename Vec<T>::Register)};
  return fma(t, polynomial(Constants::log2, t * t), whole);
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
