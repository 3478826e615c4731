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

// What one weight is asked.
struct Case {
  Shape shape;
  int64_t iterations;
  bool v_first;
  double size;  // of the weight's elements
  bool with_grad, with_grad_sigma;
  int64_t offset;  // elements of misalignment, so that the loads of single elements are run too
  Target target{1, false};
  bool only_sigma = false;
};

template <typename T>
struct Inputs {
  std::vector<T> weight, grad, grad_sigma, u, v;

  explicit Inputs(const Case& c)
      : weight(check::random<T>(elements(c.shape), 1, -c.size, c.size)),
        grad(check::random<T>(elements(c.shape), 2)),
        grad_sigma(check::random<T>(1, 3)),
        u(check::random<T>(c.shape.rows, 4)),
        v(check::random<T>(columns(c.shape), 5)) {
    weight.insert(weight.begin(), static_cast<size_t>(c.offset), static_cast<T>(NAN));
    for (auto* x : {&u, &v}) {
      double squares = 0;
      for (T e : *x) squares += static_cast<double>(e) * static_cast<double>(e);
      for (T& e : *x) e = static_cast<T>(static_cast<double>(e) / std::sqrt(squares));
    }
  }

  Job<T> job(const Case& c, Outputs<T>& out) const {
    return {
        weight.data() + c.offset, c.shape,      u.data(),     v.data(),        c.iterations, c.v_first, 1e-12, c.target,
        out.normalized.data(),    out.u.data(), out.v.data(), out.sigma.data()};
  }
};

template <typename T>
void differentiate(const Kernels<T>& kernels, const Case& c, const Inputs<T>& in, Outputs<T>& out) {
  std::vector<T> scratch = check::unset<T>(kernels.scratch(&c.shape, 1));
  kernels.backward(c.with_grad ? in.grad.data() : nullptr, c.with_grad_sigma ? in.grad_sigma.data() : nullptr,
                   in.weight.data() + c.offset, c.shape, out.u.data(), out.v.data(), out.sigma.data(), c.target,
                   out.gradient.data(), scratch.data(), nullptr);
}

template <typename T>
std::vector<Outputs<T>> run(const Kernels<T>& kernels, const std::vector<Case>& cases) {
  std::vector<Inputs<T>> in(cases.begin(), cases.end());
  std::vector<Outputs<T>> out;
  for (const Case& c : cases) out.emplace_back(c.shape);
  std::vector<Job<T>> jobs;
  std::vector<Shape> shapes;
  for (size_t i = 0; i < cases.size(); ++i) {
    jobs.push_back(in[i].job(cases[i], out[i]));
    shapes.push_back(cases[i].shape);
  }
  std::vector<T> scratch = check::unset<T>(kernels.scratch(shapes.data(), static_cast<int64_t>(shapes.size())));
  kernels.normalize(jobs.data(), static_cast<int64_t>(jobs.size()), scratch.data(), nullptr);
  for (size_t i = 0; i < cases.size(); ++i) differentiate(kernels, cases[i], in[i], out[i]);
  return out;
}

template <typename T>
void compare(const Case& c, const Outputs<T>& got, const Outputs<T>& want) {
  const Shape s = c.shape;
  const std::string name = "[" + std::to_string(s.outer) + ", " + std::to_string(s.rows) + ", " +
                           std::to_string(s.inner) + "] " + (sizeof(T) == 4 ? "float " : "double ") +
                           std::to_string(c.iterations) + (c.v_first ? " v first, size " : " u first, size ") +
                           std::to_string(c.size);
  // Without an iteration sigma is a sum that all but cancels.
  const double tolerance = (sizeof(T) == 4 ? 2e-5 : 1e-12) * (c.iterations == 0 ? 10 : 1);
  const auto close = [&](const char* what, std::vector<T> x, std::vector<T> y) {
    double unit = 0;
    for (T e : y) unit = std::fmax(unit, std::fabs(static_cast<double>(e)));
    for (auto* vector : {&x, &y})
      for (T& e : *vector) e = static_cast<T>(static_cast<double>(e) / (unit > 0 ? unit : 1));
    check::close((name + ": " + what).c_str(), x, y, tolerance);
  };
  if (!c.only_sigma) close("weight", got.normalized, want.normalized);
  close("u", got.u, want.u);
  close("v", got.v, want.v);
  close("sigma", got.sigma, want.sigma);
  close("gradient", got.gradient, want.gradient);
}

template <typename T>
void compare(const std::vector<Case>& cases) {
  const std::vector<Outputs<T>> want = run(portable::table<T>(), cases), got = run(Kernels<T>::cuda(), cases);
  for (size_t i = 0; i < cases.size(); ++i) compare(cases[i], got[i], want[i]);
}

template <typename T>
void compare_all(bool small) {
  const std::vector<Shape> shapes = {{1, 1, 1},    {1, 1, 9},    {1, 9, 1},    {7, 3, 1},   {1, 37, 53},
                                     {1, 64, 128}, {1, 5, 600},  {6, 4, 16},   {5, 33, 9},  {3, 10, 64},
                                     {4, 70, 65},  {1, 700, 12}, {1, 3, 4100}, {40, 16, 4}, {1, 300, 700}};
  int64_t n = 0;
  std::vector<Case> all;
  for (const Shape s : shapes) {
    if (small && elements(s) > 600) continue;
    for (const bool v_first : {true, false})
      for (const int64_t iterations : {0, 1, 2}) {
        const double size = n % 5 == 1 && sizeof(T) == 4 ? 1e-20 : n % 5 == 3 && sizeof(T) == 4 ? 1e20 : 0.5;
        const Target target{n % 4 == 1 ? 0.25 : 1.0, n % 8 < 3};
        all.push_back({s, iterations, v_first, size, n % 3 != 1, n % 3 != 0, n % 2, target});
        compare<T>({all.back()});
        ++n;
      }
  }
  compare<T>({{{1, 5, 7}, 1, true, 0, true, true, 0}});
  compare<T>({{{3, 5, 7}, 2, false, 0, true, true, 0}});
  all.push_back({{1, 20, 24}, 1, true, 0.5, true, true, 0, {HUGE_VAL, true}});  // as a folded layer
  all.push_back({{3, 20, 8}, 2, false, 0.5, true, false, 1, {1, false}, true});
  compare<T>({all.end()[-2]});
  compare<T>({all.end()[-1]});
  compare<T>(all);  // more weights than one launch takes
}

}  // namespace

int main(int argc, char** argv) {
  const bool small = check::small(argc, argv);
  compare_all<float>(small);
  compare_all<double>(small);
  return check::verdict();
}
