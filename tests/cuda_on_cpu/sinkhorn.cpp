// Every Sinkhorn launcher of csrc/sinkhorn/cuda.cu against the portable CPU kernels: the steps of a solve, compared one
// by one, over shapes that are not multiples of a tile, with weights of zero and rows that must be done again.
#include <string>

#include "check.h"
#include "sinkhorn/kernels.h"

namespace {

using namespace wgan_ext::sinkhorn;

template <typename T>
struct Buffers {
  std::vector<T> points, columns, squares, weights, log_weights, potential, softmin, start, bias, scratch;
  Cloud<T> cloud;

  Buffers(const Kernels<T>& kernels, int64_t count, int64_t dim, int64_t other, Cost cost, uint32_t seed) {
    points = check::random<T>(count * dim, seed);
    squares.assign(static_cast<size_t>(count), T(0));
    weights = check::random<T>(count, seed + 1, 0.1, 1);
    if (count > 3) weights[1] = 0;
    double total = 0;
    for (const T w : weights) total += w;
    for (T& w : weights) {
      w = static_cast<T>(w / total);
      log_weights.push_back(w > 0 ? std::log2(w) : static_cast<T>(kLogZero));
    }
    if (cost == Cost::sqeuclidean)
      for (int64_t i = 0; i < count * dim; ++i) squares[static_cast<size_t>(i / dim)] += points[i] * points[i];
    columns = check::unset<T>(kernels.columns_size(count, dim));
    potential = softmin = start = std::vector<T>(static_cast<size_t>(count), T(0));
    bias = check::unset<T>(kernels.padded(count));
    scratch = check::unset<T>(kernels.scratch_size(count, dim, other));
    kernels.pack(points.data(), count, dim, columns.data(), nullptr);
    cloud = {points.data(),      columns.data(),   squares.data(), weights.data(),
             log_weights.data(), potential.data(), softmin.data(), start.data(),
             bias.data(),        scratch.data(),   count};
  }
};

// What one implementation leaves after each step.
template <typename T>
struct Trace {
  std::vector<std::string> names;
  std::vector<std::vector<T>> arrays;
  void note(const std::string& name, const std::vector<T>& array, int64_t count) {
    names.push_back(name);
    arrays.emplace_back(array.begin(), array.begin() + count);
  }
};

template <typename T>
Trace<T> solve(const Kernels<T>& kernels, int64_t n, int64_t m, int64_t dim, Cost cost) {
  Trace<T> trace;
  Buffers<T> x(kernels, n, dim, m, cost, 1), y(kernels, m, dim, n, cost, 7);
  Control control{};
  const double facts[] = {0.05, 0.4, std::log(20.0 * static_cast<double>(n)), std::log(20.0 * static_cast<double>(m))};
  Options options{};
  options.scaling = 0.5;
  options.relaxation = 1.3;
  options.exponent_limit = sizeof(T) == 4 ? 80 : 700;
  options.max_iter = 9;
  options.number = 1;
  const int64_t row_sums = kernels.sums_size(n, m, dim), column_sums = kernels.sums_size(m, n, dim);
  std::vector<Sums> sums(static_cast<size_t>(row_sums > column_sums ? row_sums : column_sums));
  const auto note = [&](const std::string& step) {
    trace.note(step + ": f", x.potential, n);
    trace.note(step + ": g", y.potential, m);
    trace.note(step + ": softmin of x", x.softmin, n);
    trace.note(step + ": softmin of y", y.softmin, m);
    trace.note(step + ": bias of x", x.bias, n);
    trace.note(step + ": bias of y", y.bias, m);
    trace.note(step + ": controller",
               {T(control.row_error), T(control.column_error), T(control.mass), T(control.omega), T(control.epsilon),
                T(control.iterations), T(control.restore), T(control.safe)},
               8);
  };
  const auto note_sums = [&](int64_t count) {
    Sums total{};
    for (int64_t i = 0; i < count; ++i) total = combine(total, sums[static_cast<size_t>(i)]);
    trace.note("sums", {T(total.error), T(total.relaxed_error), T(total.mass), T(total.gain), T(total.change)}, 5);
  };
  const auto rows = [&](Event event) {
    kernels.pass(&control, x.cloud, y.cloud, dim, cost, sums.data(), nullptr);
    note_sums(row_sums);
    kernels.advance(&control, event, sums.data(), row_sums, nullptr);
  };
  const auto columns = [&](Event event) {
    kernels.pass(&control, y.cloud, x.cloud, dim, cost, sums.data(), nullptr);
    note_sums(column_sums);
    kernels.advance(&control, event, sums.data(), column_sums, nullptr);
  };

  // A start whose first pass is plain though its shift is far off: rows have to be done again.
  Control plain{};
  kernels.begin(&control, facts, options, &plain, &plain, nullptr);
  for (int64_t i = 0; i < n; i += 3) x.softmin[static_cast<size_t>(i)] = T(sizeof(T) == 4 ? 20 : 200);
  for (int64_t i = 1; i < n; i += 3) x.softmin[static_cast<size_t>(i)] = T(sizeof(T) == 4 ? -20 : -200);
  kernels.set_bias(&control, x.cloud, nullptr);
  kernels.set_bias(&control, y.cloud, nullptr);
  rows(Event::probe_rows);
  note("probe of rows");
  columns(Event::probe_columns_then_cold);
  note("probe of columns");
  kernels.set_cold(&control, x.cloud, Role::rows, nullptr);
  kernels.set_cold(&control, y.cloud, Role::columns, nullptr);
  trace.note("start of x", x.start, n);
  trace.note("start of y", y.start, m);
  rows(Event::rows);
  for (int64_t i = 0; i < options.max_iter; ++i) {
    if (i == 1) control.start_error = 0;  // forces the way back to the start at the target
    note("iteration " + std::to_string(i));
    kernels.apply(&control, x.cloud, Role::rows, nullptr);
    columns(Event::columns);
    kernels.apply(&control, y.cloud, Role::columns, nullptr);
    rows(Event::rows);
  }
  note("end");
  std::vector<double> report(5);
  kernels.report(&control, report.data(), nullptr);
  trace.note("report", std::vector<T>(report.begin(), report.end()), 5);
  kernels.finished(&control, nullptr);
  if (!kernels.finished(&control, nullptr) && control.done != control.options.number) ++check::failures;

  std::vector<T> force = check::unset<T>(n * dim), mass = check::unset<T>(n);
  kernels.gradient(&control.epsilon, x.cloud, y.cloud, dim, cost, force.data(), mass.data(), nullptr);
  trace.note("force", force, n * dim);
  trace.note("mass", mass, n);

  kernels.begin(&control, facts, options, nullptr, nullptr, nullptr);
  std::vector<T> zero(static_cast<size_t>(n), T(0));
  x.potential = x.softmin = zero;
  x.cloud.potential = x.potential.data();
  x.cloud.softmin = x.softmin.data();
  kernels.set_bias(&control, x.cloud, nullptr);
  std::vector<Sums> self_sums(static_cast<size_t>(kernels.sums_size(n, n, dim)));
  std::vector<T> self_scratch(static_cast<size_t>(kernels.scratch_size(n, dim, n)));
  x.cloud.scratch = self_scratch.data();
  for (int64_t i = 0; i < 4; ++i) {
    kernels.pass(&control, x.cloud, x.cloud, dim, cost, self_sums.data(), nullptr);
    kernels.advance(&control, Event::self, self_sums.data(), static_cast<int64_t>(self_sums.size()), nullptr);
    kernels.apply(&control, x.cloud, Role::self, nullptr);
    note("self, iteration " + std::to_string(i));
  }
  return trace;
}

template <typename T>
void compare(int64_t n, int64_t m, int64_t dim, Cost cost) {
  const Trace<T> got = solve<T>(Kernels<T>::cuda(), n, m, dim, cost);
  const Trace<T> want = solve<T>(portable::table<T>(), n, m, dim, cost);
  const std::string shape = "N=" + std::to_string(n) + " M=" + std::to_string(m) + " D=" + std::to_string(dim) +
                            (cost == Cost::sqeuclidean ? " squared " : " euclidean ") +
                            (sizeof(T) == 4 ? "float " : "double ");
  for (size_t k = 0; k < want.arrays.size(); ++k)
    check::close((shape + want.names[k]).c_str(), got.arrays[k], want.arrays[k], sizeof(T) == 4 ? 2e-3 : 1e-9);
}

}  // namespace

int main(int argc, char** argv) {
  const bool small = check::small(argc, argv);
  const int64_t shapes[][3] = {{1, 1, 1}, {5, 3, 2}, {131, 70, 3}, {66, 259, 37}, {40, 33, 70}, {300, 140, 5}};
  for (const auto& [n, m, dim] : shapes) {
    if (small && n * m > 5000) continue;
    for (const Cost cost : {Cost::sqeuclidean, Cost::euclidean}) {
      compare<float>(n, m, dim, cost);
      compare<double>(n, m, dim, cost);
    }
  }
  return check::verdict();
}
