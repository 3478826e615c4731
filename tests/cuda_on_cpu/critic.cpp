// The CUDA kernels of the critic engine against the portable CPU kernels, 16-bit types included.
#include <cmath>
#include <string>

#include "check.h"
#include "critic/kernels.h"
#include "half.cuh"

using namespace wgan_ext;
using namespace wgan_ext::critic;

namespace {

template <typename T>
using Reference = device::ComputeT<T>;

template <typename T>
constexpr const char* kName = "double";
template <>
constexpr const char* kName<float> = "float";
template <>
constexpr const char* kName<Half> = "half";
template <>
constexpr const char* kName<BFloat16> = "bfloat16";

template <typename T>
std::vector<T> narrowed(const std::vector<Reference<T>>& values) {
  std::vector<T> result(values.size());
  for (size_t i = 0; i < values.size(); ++i) device::narrow(result[i], values[i]);
  return result;
}

template <typename T>
std::vector<Reference<T>> widened(const std::vector<T>& values) {
  std::vector<Reference<T>> result;
  for (const T& value : values) result.push_back(device::widen(value));
  return result;
}

// As the 16-bit type holds them.
template <typename T>
std::vector<Reference<T>> inputs(int64_t n, uint32_t seed) {
  std::vector<Reference<T>> values = widened(narrowed<T>(check::random<Reference<T>>(n, seed)));
  for (int64_t i = 0; i < n; i += 13) values[i] = 0;
  for (int64_t i = 5; i < n; i += 29) values[i] = i % 2 ? INFINITY : -INFINITY;
  return values;
}

// Elements in front of the input, the bias and the output, so that each alone may be misaligned.
struct Offsets {
  int64_t in = 0, bias = 0, out = 0;
};

template <typename T>
void compare(int64_t rows, int64_t columns, double slope, Offsets offsets) {
  using C = Reference<T>;
  const std::string name = std::string(kName<T>) + " [" + std::to_string(rows) + ", " + std::to_string(columns) +
                           "] slope " + std::to_string(slope) + " offsets " + std::to_string(offsets.in) + " " +
                           std::to_string(offsets.bias) + " " + std::to_string(offsets.out) + ": ";
  const auto& cpu = portable::table<C>();
  const auto& cuda = Kernels<T>::cuda();
  const double tolerance = sizeof(T) == 2 ? 4e-3 : 0;
  const int64_t n = rows * columns, bytes = rows * ceil_div(columns, 8);
  // Compares what begins `offset` elements into `got`; the elements before must still be 7.
  const auto close = [&](const char* what, const std::vector<T>& got, const std::vector<C>& want, int64_t offset) {
    std::vector<C> all(static_cast<size_t>(offset), C(7));
    all.insert(all.end(), want.begin(), want.end());
    check::close((name + what).c_str(), widened(got), all, tolerance);
  };
  const auto fresh = [&](int64_t offset) { return narrowed<T>(std::vector<C>(n + offset, C(7))); };
  // The same numbers behind `offset` sevens.
  const auto moved = [](const std::vector<C>& values, int64_t offset) {
    std::vector<C> all(static_cast<size_t>(offset), C(7));
    all.insert(all.end(), values.begin(), values.end());
    return narrowed<T>(all);
  };

  const std::vector<C> z = inputs<T>(n, 1), bias = inputs<T>(columns, 2);
  const std::vector<T> z_narrow = moved(z, offsets.in), bias_narrow = moved(bias, offsets.bias);
  for (const bool with_bias : {false, true}) {
    std::vector<C> want = check::unset<C>(n);
    std::vector<uint8_t> want_signs(bytes, 0xaa);
    cpu.activate(z.data(), with_bias ? bias.data() : nullptr, slope, want.data(), want_signs.data(), rows, columns,
                 nullptr);
    const T* b = with_bias ? bias_narrow.data() + offsets.bias : nullptr;
    for (const bool with_h : {false, true}) {
      std::vector<T> h = fresh(offsets.out);
      std::vector<uint8_t> signs(bytes, 0x55);
      cuda.activate(z_narrow.data() + offsets.in, b, slope, with_h ? h.data() + offsets.out : nullptr, signs.data(),
                    rows, columns, nullptr);
      check::equal((name + "signs").c_str(), std::vector<int>(signs.begin(), signs.end()),
                   std::vector<int>(want_signs.begin(), want_signs.end()));
      if (with_h) close("activation", h, want, offsets.out);
    }
    std::vector<T> in_place = z_narrow;
    std::vector<uint8_t> signs(bytes, 0x55);
    cuda.activate(in_place.data() + offsets.in, b, slope, in_place.data() + offsets.in, signs.data(), rows, columns,
                  nullptr);
    close("activation in place", in_place, want, offsets.in);

    for (const int64_t in_rows : {int64_t{1}, rows}) {
      const std::vector<C> in = inputs<T>(in_rows * columns, 3);
      std::vector<C> masked = check::unset<C>(n);
      cpu.mask(in.data(), in_rows, want_signs.data(), slope, masked.data(), rows, columns, nullptr);
      std::vector<T> got = fresh(offsets.out), in_narrow = moved(in, offsets.in);
      cuda.mask(in_narrow.data() + offsets.in, in_rows, want_signs.data(), slope, got.data() + offsets.out, rows,
                columns, nullptr);
      close("mask", got, masked, offsets.out);
      if (in_rows != rows) continue;
      cuda.mask(in_narrow.data() + offsets.in, rows, want_signs.data(), slope, in_narrow.data() + offsets.in, rows,
                columns, nullptr);
      close("mask in place", in_narrow, masked, offsets.in);
    }
  }
}

template <typename T>
void compare_norms(int64_t rows, int64_t columns, double size) {
  using C = Reference<T>;
  std::vector<C> in = check::random<C>(rows * columns, 4);
  for (C& value : in) value *= static_cast<C>(size);
  if (size > 1)  // so that only the last element tells the scale
    for (int64_t i = 0; i < rows * columns; ++i)
      if (i % columns != columns - 1) in[i] /= static_cast<C>(size);
  const std::vector<T> narrow = narrowed<T>(in);
  in = widened(narrow);
  std::vector<C> want(rows, C(7));
  portable::table<C>().norms(in.data(), want.data(), rows, columns, nullptr);
  for (C& value : want) value /= static_cast<C>(size);
  std::vector<T> norms(rows);
  Kernels<T>::cuda().norms(narrow.data(), norms.data(), rows, columns, nullptr);
  std::vector<C> got = widened(norms);
  for (C& value : got) value /= static_cast<C>(size);
  const std::string name = std::string(kName<T>) + " norms of " + std::to_string(columns);
  check::close(name.c_str(), got, want, sizeof(T) == 2 ? 4e-3 : sizeof(T) == 4 ? 1e-6 : 1e-14);
}

template <typename T>
void compare_penalty(int64_t count, Penalty penalty) {
  using C = Reference<T>;
  const std::vector<T> narrow = narrowed<T>(check::random<C>(count, 5, 0, 2));
  const std::vector<C> norms = widened(narrow);
  std::vector<C> want(count + 2), got(count + 2);
  portable::table<C>().penalty(norms.data(), count, penalty, 10, &want[count], &want[count + 1], want.data(), nullptr);
  for (const bool with_slopes : {false, true}) {
    std::vector<T> results(count + 2);
    Kernels<T>::cuda().penalty(narrow.data(), count, penalty, 10, &results[count], &results[count + 1],
                               with_slopes ? results.data() : nullptr, nullptr);
    got = widened(results);
    if (!with_slopes)
      for (int64_t i = 0; i < count; ++i) got[i] = want[i];
    const std::string name = std::string(kName<T>) + " penalty of " + std::to_string(count);
    check::close(name.c_str(), got, want, sizeof(T) == 2 ? 4e-3 : sizeof(T) == 4 ? 1e-6 : 1e-14);
  }
}

template <typename T>
void compare_all(bool small) {
  const std::vector<std::pair<int64_t, int64_t>> few = {{1, 1}, {3, 7}, {5, 16}, {2, 33}, {300, 8}};
  const std::vector<std::pair<int64_t, int64_t>> more = {{4, 512},  {1, 4099},  {2, 4096},
                                                         {70, 129}, {1100, 24}, {9000, 1}};
  for (const double slope : {0.0, 0.2}) {
    for (const auto& [rows, columns] : few) compare<T>(rows, columns, slope, {});
    for (const Offsets& offsets : {Offsets{1, 1, 1}, {1, 0, 0}, {0, 1, 0}, {0, 0, 1}})
      compare<T>(5, 16, slope, offsets);
    compare<T>(3, 7, slope, {1, 0, 1});
    if (small) continue;
    for (const auto& [rows, columns] : more) compare<T>(rows, columns, slope, {});
  }
  const std::vector<std::pair<int64_t, int64_t>> long_rows = {{1, 1}, {3, 7}, {2, 33}, {5, 700}, {300, 8}};
  for (const bool one_sided : {false, true})
    for (const double power : {1.0, 1.5, 2.0})
      for (const int64_t count : {1, 300}) compare_penalty<T>(count, {1, one_sided, power});
  const double huge = sizeof(T) == 8 ? 1e300 : sizeof(T) == 4 ? 1e30 : 1;
  for (const double size : {1.0, huge, 1 / huge})
    for (const auto& [rows, columns] : long_rows) compare_norms<T>(rows, columns, size);
}

}  // namespace

int main(int argc, char** argv) {
  const bool small = check::small(argc, argv);
  compare_all<float>(small);
  compare_all<double>(small);
  compare_all<Half>(small);
  compare_all<BFloat16>(small);
  return check::verdict();
}
