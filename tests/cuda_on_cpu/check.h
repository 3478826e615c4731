// What a tower's program here is made of: inputs, comparisons, a verdict.
//
//   int main(int argc, char** argv) {
//     const bool small = check::small(argc, argv);  // few small shapes: ThreadSanitizer is slow
//     const std::vector<float> x = check::random<float>(n, seed);
//     ... launch from Kernels<T>::cuda(), compute `want` from portable::table<T>() ...
//     check::close("norms, B=3 D=33", got, want, 1e-6);
//     return check::verdict();
//   }
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

namespace check {

inline int64_t comparisons = 0, failures = 0;

inline bool small(int argc, char** argv) { return argc > 1 && std::strcmp(argv[1], "small") == 0; }

// Uniform in [low, high); the same numbers for every T and on every machine.
template <typename T>
std::vector<T> random(int64_t n, uint32_t seed, double low = -1, double high = 1) {
  std::mt19937 bits(seed);
  std::vector<T> values(static_cast<size_t>(n));
  for (T& value : values) value = static_cast<T>(low + (high - low) * (bits() * 0x1p-32));
  return values;
}

// NaN, so that an element the kernel leaves out is seen.
template <typename T>
std::vector<T> unset(int64_t n) {
  return std::vector<T>(static_cast<size_t>(n), static_cast<T>(NAN));
}

// |got - want| <= tolerance * (1 + |want|); NaN and infinities must be the same on both sides.
template <typename T>
bool close(const char* what, const std::vector<T>& got, const std::vector<T>& want, double tolerance) {
  ++comparisons;
  if (got.size() != want.size()) {
    std::printf("%s: %zu elements, want %zu\n", what, got.size(), want.size());
    ++failures;
    return false;
  }
  size_t wrong = 0, first = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double a = static_cast<double>(got[i]), b = static_cast<double>(want[i]);
    const bool same = a == b || (std::isnan(a) && std::isnan(b)) || std::abs(a - b) <= tolerance * (1 + std::abs(b));
    if (!same && wrong++ == 0) first = i;
  }
  if (wrong == 0) return true;
  ++failures;
  std::printf("%s: %zu of %zu elements differ, first [%zu]: got %.9g, want %.9g\n", what, wrong, got.size(), first,
              static_cast<double>(got[first]), static_cast<double>(want[first]));
  return false;
}

template <typename T>
bool equal(const char* what, const std::vector<T>& got, const std::vector<T>& want) {
  return close(what, got, want, 0);
}

// The exit status of the program; one that compared nothing has failed.
inline int verdict() {
  std::printf("%lld comparisons, %lld failed\n", static_cast<long long>(comparisons), static_cast<long long>(failures));
  return comparisons > 0 && failures == 0 ? 0 : 1;
}

}  // namespace check
