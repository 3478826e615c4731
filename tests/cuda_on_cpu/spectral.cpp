// The CUDA kernels of spectral normalization against the portable CPU kernels.
#include <string>

#include "check.h"
#include "spectral/kernels.h"

using namespace wgan_ext::spectral;

namespace {

template <typename T>
struct Outputs {
  std::vector<T> normalized, u, v, sigma, gradient;

  explicit Outputs(Shape s)
      : normalized(check::unset<T>(elements(s))),
        u(check::unset<T>(s.rows)),
        v(check::unset<T>(columns(s))),
        sigma(check::unset<T>(1)),
        gradient(check::unset<T>(elements(s))) {}
};

// `offset` elements of misalignment, so that the loads of single elements are run too.
template <typename T>
Outputs<T> run(const Kernels<T>& kernels, Shape s, int64_t iterations, bool v_first, double size, bool with_grad,
               bool with_grad_sigma, int64_t offset) {
  std::vector<T> weight = check::random<T>(elements(s), 1, -size, size);
  weight.insert(weight.begin(), static_cast<size_t>(offset), static_cast<T>(NAN));
  const std::vector<T> grad = check::random<T>(elements(s), 2), grad_sigma = check::random<T>(1, 3);
  std::vector<T> u = check::random<T>(s.rows, 4), v = check::random<T>(columns(s), 5);
  for (auto* x : {&u, &v}) {
    double squares = 0;
    for (T e : *x) squares += static_cast<double>(e) * static_cast<double>(e);
    for (T& e : *x) e = static_cast<T>(static_cast<double>(e) / std::sqrt(squares));
  }
  std::vector<T> scratch = check::unset<T>(kernels.scratch(s));
  Outputs<T> out(s);
  kernels.normalize(weight.data() + offset, s, u.data(), v.data(), iterations, v_first, 1e-12, out.normalized.data(),
                    out.u.data(), out.v.data(), out.sigma.data(), scratch.data(), nullptr);
  scratch = check::unset<T>(kernels.scratch(s));
  kernels.backward(with_grad ? grad.data() : nullptr, with_grad_sigma ? grad_sigma.data() : nullptr,
                   weight.data() + offset, s, out.u.data(), out.v.data(), out.sigma.data(), out.gradient.data(),
                   scratch.data(), nullptr);
  return out;
}

template <typename T>
void compare(Shape s, int64_t iterations, bool v_first, double size, bool grad, bool grad_sigma, int64_t offset) {
  const auto& cpu = portable::table<T>();
  const Outputs<T> want = run(cpu, s, iterations, v_first, size, grad, grad_sigma, offset);
  const Outputs<T> got = run(Kernels<T>::cuda(), s, iterations, v_first, size, grad, grad_sigma, offset);
  const std::string name = "[" + std::to_string(s.outer) + ", " + std::to_string(s.rows) + ", " +
                           std::to_string(s.inner) + "] " + (sizeof(T) == 4 ? "float " : "double ") +
                           std::to_string(iterations) + (v_first ? " v first, size " : " u first, size ") +
                           std::to_string(size);
  // Without an iteration sigma is a sum that all but cancels.
  const double tolerance = (sizeof(T) == 4 ? 2e-5 : 1e-12) * (iterations == 0 ? 10 : 1);
  const auto close = [&](const char* what, std::vector<T> x, std::vector<T> y) {
    double unit = 0;
    for (T e : y) unit = std::fmax(unit, std::fabs(static_cast<double>(e)));
    for (auto* vector : {&x, &y})
      for (T& e : *vector) e = static_cast<T>(static_cast<double>(e) / (unit > 0 ? unit : 1));
    check::close((name + ": " + what).c_str(), x, y, tolerance);
  };
  close("weight", got.normalized, want.normalized);
  close("u", got.u, want.u);
  close("v", got.v, want.v);
  close("sigma", got.sigma, want.sigma);
  close("gradient", got.gradient, want.gradient);
}

template <typename T>
void compare_all(bool small) {
  const std::vector<Shape> shapes = {{1, 1, 1},    {1, 1, 9},    {1, 9, 1},    {7, 3, 1},   {1, 37, 53},
                                     {1, 64, 128}, {1, 5, 600},  {6, 4, 16},   {5, 33, 9},  {3, 10, 64},
                                     {4, 70, 65},  {1, 700, 12}, {1, 3, 4100}, {40, 16, 4}, {1, 300, 700}};
  int64_t n = 0;
  for (const Shape s : shapes) {
    if (small && elements(s) > 600) continue;
    for (const bool v_first : {true, false})
      for (const int64_t iterations : {0, 1, 2}) {
        const double size = n % 5 == 1 && sizeof(T) == 4 ? 1e-20 : n % 5 == 3 && sizeof(T) == 4 ? 1e20 : 0.5;
        compare<T>(s, iterations, v_first, size, n % 3 != 1, n % 3 != 0, n % 2);
        ++n;
      }
  }
  compare<T>({1, 5, 7}, 1, true, 0, true, true, 0);
  compare<T>({3, 5, 7}, 2, false, 0, true, true, 0);
}

}  // namespace

int main(int argc, char** argv) {
  const bool small = check::small(argc, argv);
  compare_all<float>(small);
  compare_all<double>(small);
  return check::verdict();
}
