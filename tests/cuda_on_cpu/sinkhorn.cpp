// Every Sinkhorn launcher of csrc/sinkhorn/cuda.cu against the portable CPU kernels: the steps of a solve, compared one
// by one, for a batch of two problems of like and of unlike sizes, over shapes that are not multiples of a tile, with
// weights of zero, rows that must be done again, and hard and soft marginals.
#include <limits>
#include <string>

#include "check.h"
#include "sinkhorn/kernels.h"

namespace {

using namespace wgan_ext::sinkhorn;

constexpr int64_t kProblems = 2;
constexpr double kHard = std::numeric_limits<double>::infinity();

// How many points a cloud has in each problem.
struct Counts {
  int64_t first, second;
  bool ragged() const { return first != second; }
  int64_t most() const { return first < second ? second : first; }
  int64_t total() const { return first + second; }
  int64_t begin(int64_t problem) const { return problem == 0 ? 0 : problem == 1 ? first : total(); }
  int64_t of(int64_t problem) const { return problem == 0 ? first : second; }
};

template <typename T>
struct Buffers {
  std::vector<T> points, columns, squares, weights, log_weights, potential, softmin, start, bias, scratch;
  std::vector<int64_t> offsets;
  int64_t unit;
  Cloud<T> cloud;

  // The size of an array that is padded for each problem, from that of the largest, and the sizes of one problem.
  int64_t padded_size(int64_t of_most) const {
    if (!cloud.offsets) return kProblems * of_most;
    return first_of_padded(offsets[kProblems], kProblems, unit) * (of_most / cloud.padded);
  }

  static int64_t scratch_size(const Kernels<T>& kernels, const Counts& counts, int64_t dim, const Counts& other,
                              Cost cost) {
    if (!counts.ragged() && !other.ragged()) return kernels.scratch_size(counts.first, dim, other.first, cost);
    const int64_t padded = kernels.padded(counts.most());
    int64_t each = wgan_ext::ceil_div(kernels.scratch_size(counts.most(), dim, other.most(), cost), padded);
    for (int64_t p = 0; p < kProblems; ++p) {
      const int64_t own = kernels.scratch_size(counts.of(p), dim, other.of(p), cost),
                    width = wgan_ext::ceil_div(own, kernels.padded(counts.of(p)));
      if (width > each) each = width;
    }
    return each * padded;
  }

  Buffers(const Kernels<T>& kernels, const Counts& counts, int64_t dim, const Counts& other, Cost cost, uint32_t seed) {
    points = check::random<T>(counts.total() * dim, seed);
    const auto size = static_cast<size_t>(counts.total());
    squares.assign(size, T(0));
    weights = check::random<T>(counts.total(), seed + 1, 0.1, 1);
    offsets = {0, counts.first, counts.total()};
    unit = kernels.padded(1);
    for (int64_t p = 0; p < kProblems; ++p) {
      const auto begin = weights.begin() + counts.begin(p), end = weights.begin() + counts.begin(p + 1);
      if (counts.of(p) > 3) begin[1] = 0;
      double total = 0;
      for (auto w = begin; w != end; ++w) total += *w;
      for (auto w = begin; w != end; ++w) *w = static_cast<T>(*w / total);
    }
    for (const T w : weights) log_weights.push_back(w > 0 ? std::log2(w) : static_cast<T>(kLogZero));
    if (cost == Cost::sqeuclidean)
      for (int64_t i = 0; i < counts.total() * dim; ++i) squares[static_cast<size_t>(i / dim)] += points[i] * points[i];
    const int64_t columns_size = kernels.columns_size(counts.most(), dim);
    cloud = {};
    cloud.count = counts.most();
    cloud.dim = dim;
    cloud.padded = kernels.padded(cloud.count);
    cloud.unit = unit;
    cloud.offsets = counts.ragged() || other.ragged() ? offsets.data() : nullptr;
    cloud.columns_size = columns_size;
    cloud.scratch_size = scratch_size(kernels, counts, dim, other, cost);
    columns = check::unset<T>(padded_size(columns_size));
    potential = softmin = start = std::vector<T>(size, T(0));
    bias = check::unset<T>(padded_size(cloud.padded));
    scratch = check::unset<T>(padded_size(cloud.scratch_size));
    kernels.pack(points.data(), cloud.offsets, cloud.count, dim, kProblems, columns.data(), nullptr);
    cloud.points = points.data();
    cloud.columns = columns.data();
    cloud.squares = squares.data();
    cloud.weights = weights.data();
    cloud.log_weights = log_weights.data();
    cloud.potential = potential.data();
    cloud.softmin = softmin.data();
    cloud.start = start.data();
    cloud.bias = bias.data();
    cloud.scratch = scratch.data();
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
Trace<T> solve(const Kernels<T>& kernels, const Counts& of_x, const Counts& of_y, int64_t dim, Cost cost,
               double row_rho, double column_rho) {
  Trace<T> trace;
  const int64_t n = of_x.most(), m = of_y.most(), all_x = of_x.total(), all_y = of_y.total();
  Buffers<T> x(kernels, of_x, dim, of_y, cost, 1), y(kernels, of_y, dim, of_x, cost, 7);
  const std::vector<T> matrix = check::random<T>(kProblems * n * m, 11, 0, 1), values = check::random<T>(all_y * 5, 12);
  const Ground<T> ground = {cost, T(1.5), cost == Cost::matrix ? matrix.data() : nullptr, false};
  Ground<T> back = ground;
  back.transposed = cost == Cost::matrix;
  std::vector<Control> controls(kProblems);
  const double range_x = std::log(20.0 * static_cast<double>(n)), range_y = std::log(20.0 * static_cast<double>(m));
  const Facts facts[kProblems] = {{0.05, 0.4, range_x, range_y}, {0.1, 0.3, range_x, range_y}};
  Options options{};
  options.scaling = 0.5;
  options.relaxation = 1.3;
  options.exponent_limit = sizeof(T) == 4 ? 80 : 700;
  options.rounding = sizeof(T) == 4 ? 1e-6 : 1e-15;
  options.row_rho = row_rho;
  options.column_rho = column_rho;
  options.max_iter = 9;
  options.number = 1;
  const int64_t row_sums = kernels.sums_size(n, m, dim, cost), column_sums = kernels.sums_size(m, n, dim, cost);
  std::vector<Sums> sums(static_cast<size_t>(kProblems * (row_sums > column_sums ? row_sums : column_sums)));
  const auto note = [&](const std::string& step) {
    trace.note(step + ": f", x.potential, all_x);
    trace.note(step + ": g", y.potential, all_y);
    trace.note(step + ": softmin of x", x.softmin, all_x);
    trace.note(step + ": softmin of y", y.softmin, all_y);
    for (int64_t p = 0; p < kProblems; ++p) {
      const auto bias_of = [&](const Buffers<T>& side) {
        const T* begin = side.cloud.of(p).bias;
        return std::vector<T>(begin, begin + side.cloud.of(p).count);
      };
      trace.note(step + ": bias of x", bias_of(x), of_x.of(p));
      trace.note(step + ": bias of y", bias_of(y), of_y.of(p));
      const Control& c = controls[static_cast<size_t>(p)];
      trace.note(step + ": controller",
                 {T(c.row_error), T(c.column_error), T(c.mass), T(c.omega), T(c.epsilon), T(c.iterations), T(c.restore),
                  T(c.safe), T(c.damping), T(c.translation)},
                 10);
    }
  };
  const auto note_sums = [&](int64_t count) {
    for (int64_t p = 0; p < kProblems; ++p) {
      Sums t{};
      for (int64_t i = 0; i < count; ++i) t = combine(t, sums[static_cast<size_t>(p * count + i)]);
      trace.note("sums",
                 {T(t.error), T(t.relaxed_error), T(t.mass), T(t.gain), T(t.target), T(t.relaxed_target), T(t.change)},
                 7);
    }
  };
  const auto rows = [&](Event event) {
    kernels.pass(controls.data(), x.cloud, y.cloud, ground, Role::rows, kProblems, sums.data(), nullptr);
    note_sums(row_sums);
    kernels.advance(controls.data(), event, sums.data(), row_sums, kProblems, nullptr);
  };
  const auto columns = [&](Event event) {
    kernels.pass(controls.data(), y.cloud, x.cloud, back, Role::columns, kProblems, sums.data(), nullptr);
    note_sums(column_sums);
    kernels.advance(controls.data(), event, sums.data(), column_sums, kProblems, nullptr);
  };

  // A start whose first pass is plain though its shift is far off: rows have to be done again.
  const std::vector<Control> plain(kProblems);
  kernels.begin(controls.data(), facts, options, plain.data(), plain.data(), kProblems, nullptr);
  for (int64_t i = 0; i < all_x; i += 3) x.softmin[static_cast<size_t>(i)] = T(sizeof(T) == 4 ? 20 : 200);
  for (int64_t i = 1; i < all_x; i += 3) x.softmin[static_cast<size_t>(i)] = T(sizeof(T) == 4 ? -20 : -200);
  kernels.set_bias(controls.data(), x.cloud, kProblems, nullptr);
  kernels.set_bias(controls.data(), y.cloud, kProblems, nullptr);
  rows(Event::probe_rows);
  note("probe of rows");
  columns(Event::probe_columns_then_cold);
  note("probe of columns");
  kernels.set_cold(controls.data(), x.cloud, Role::rows, kProblems, nullptr);
  kernels.set_cold(controls.data(), y.cloud, Role::columns, kProblems, nullptr);
  trace.note("start of x", x.start, all_x);
  trace.note("start of y", y.start, all_y);
  rows(Event::rows);
  for (int64_t i = 0; i < options.max_iter; ++i) {
    if (i == 1) controls[0].start_error = 0;  // forces the way back to the start at the target
    note("iteration " + std::to_string(i));
    kernels.apply(controls.data(), x.cloud, Role::rows, kProblems, nullptr);
    columns(Event::columns);
    kernels.apply(controls.data(), y.cloud, Role::columns, kProblems, nullptr);
    kernels.apply(controls.data(), x.cloud, Role::translated, kProblems, nullptr);
    rows(Event::rows);
  }
  note("end");
  std::vector<double> report(5 * kProblems);
  kernels.report(controls.data(), kProblems, report.data(), nullptr);
  for (size_t p = 0; p < kProblems; ++p) {  // converged is exact, the error is not
    if (report[5 * p + 3] != (report[5 * p] <= options.tolerance)) ++check::failures;
    report[5 * p + 3] = 0;
  }
  trace.note("report", std::vector<T>(report.begin(), report.end()), 5 * kProblems);
  kernels.finished(controls.data(), kProblems, nullptr);
  const bool done = controls[0].done == options.number && controls[1].done == options.number;
  if (!kernels.finished(controls.data(), kProblems, nullptr) && !done) ++check::failures;

  if (cost != Cost::matrix) {
    std::vector<T> force = check::unset<T>(all_x * dim), mass = check::unset<T>(all_x),
                   product = check::unset<T>(all_x * 5),
                   packed = check::unset<T>(y.padded_size(kernels.columns_size(m, 5)));
    kernels.gradient(controls.data(), x.cloud, y.cloud, ground, kProblems, force.data(), mass.data(), nullptr);
    trace.note("force", force, all_x * dim);
    trace.note("mass", mass, all_x);
    kernels.pack(values.data(), y.cloud.offsets, m, 5, kProblems, packed.data(), nullptr);
    kernels.transport(controls.data(), x.cloud, y.cloud, ground, kProblems, packed.data(), 5, product.data(), nullptr);
    trace.note("plan times values", product, all_x * 5);

    kernels.begin(controls.data(), facts, options, nullptr, nullptr, kProblems, nullptr);
    x.potential = x.softmin = std::vector<T>(static_cast<size_t>(all_x), T(0));
    x.cloud.potential = x.potential.data();
    x.cloud.softmin = x.softmin.data();
    kernels.set_bias(controls.data(), x.cloud, kProblems, nullptr);
    const int64_t self_sums = kernels.sums_size(n, n, dim, cost);
    sums.resize(static_cast<size_t>(kProblems * self_sums));
    x.cloud.scratch_size = Buffers<T>::scratch_size(kernels, of_x, dim, of_x, cost);
    std::vector<T> self_scratch(static_cast<size_t>(x.padded_size(x.cloud.scratch_size)));
    x.cloud.scratch = self_scratch.data();
    for (int64_t i = 0; i < 4; ++i) {
      kernels.pass(controls.data(), x.cloud, x.cloud, ground, Role::self, kProblems, sums.data(), nullptr);
      kernels.advance(controls.data(), Event::self, sums.data(), self_sums, kProblems, nullptr);
      kernels.apply(controls.data(), x.cloud, Role::self, kProblems, nullptr);
      note("self, iteration " + std::to_string(i));
    }
  }
  return trace;
}

template <typename T>
void compare(const Counts& n, const Counts& m, int64_t dim, Cost cost, double row_rho, double column_rho) {
  const Trace<T> got = solve<T>(Kernels<T>::cuda(), n, m, dim, cost, row_rho, column_rho);
  const Trace<T> want = solve<T>(portable::table<T>(), n, m, dim, cost, row_rho, column_rho);
  const std::string shape =
      "N=" + std::to_string(n.first) + "," + std::to_string(n.second) + " M=" + std::to_string(m.first) + "," +
      std::to_string(m.second) + " D=" + std::to_string(dim) + " cost " + std::to_string(static_cast<int>(cost)) +
      " rho " + std::to_string(row_rho) + " " + std::to_string(column_rho) + (sizeof(T) == 4 ? " float " : " double ");
  for (size_t k = 0; k < want.arrays.size(); ++k)
    check::close((shape + want.names[k]).c_str(), got.arrays[k], want.arrays[k], sizeof(T) == 4 ? 2e-3 : 1e-9);
}

// The poll sees every problem of a batch larger than a block, and answers one call late.
void check_poll() {
  const Kernels<float>& kernels = Kernels<float>::cuda();
  constexpr size_t count = 300;
  for (const size_t going : {size_t{0}, size_t{40}, count - 1}) {
    std::vector<Facts> facts(count, {0.1, 0.3, 1, 1});
    std::vector<Control> controls(count);
    Options options{};
    options.max_iter = 1;
    kernels.begin(controls.data(), facts.data(), options, nullptr, nullptr, count, nullptr);
    const int32_t number = controls[0].options.number;
    for (size_t p = 0; p < count; ++p) controls[p].done = p == going ? 0 : number;
    const auto answers = [&](bool last) {
      kernels.finished(controls.data(), count, nullptr);
      check::equal("poll", std::vector<int>{kernels.finished(controls.data(), count, nullptr)}, std::vector<int>{last});
    };
    answers(false);
    controls[going].done = number;
    answers(true);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool small = check::small(argc, argv);
  const int64_t shapes[][3] = {{1, 1, 1},    {5, 3, 2},     {131, 70, 3}, {66, 259, 37},
                               {40, 33, 70}, {300, 140, 5}, {700, 5, 2}};
  for (const auto& [n, m, dim] : shapes) {
    if (small && n * m > 5000) continue;
    for (const Cost cost : {Cost::sqeuclidean, Cost::euclidean, Cost::manhattan, Cost::power, Cost::matrix}) {
      // each kernel with hard and soft marginals, without all combinations
      const bool soft = (n + static_cast<int64_t>(cost)) % 2;
      compare<float>({n, n}, {m, m}, dim, cost, soft ? 0.3 : kHard, kHard);
      compare<double>({n, n}, {m, m}, dim, cost, soft ? 0.3 : kHard, soft ? 0.7 : kHard);
    }
  }
  // Ragged; no matrices, which only the CPU makes. One problem is a single point of x, one fits its tiles.
  const Counts ragged[][2] = {{{150, 1}, {5, 140}}, {{33, 300}, {130, 7}}, {{64, 128}, {128, 64}}, {{40, 3}, {9, 9}}};
  for (const auto& [n, m] : ragged) {
    if (small && n.most() * m.most() > 10000) continue;
    for (const Cost cost : {Cost::sqeuclidean, Cost::euclidean, Cost::manhattan, Cost::power}) {
      const bool soft = (n.first + static_cast<int64_t>(cost)) % 2;
      compare<float>(n, m, 3, cost, soft ? 0.3 : kHard, kHard);
      compare<double>(n, m, 5, cost, soft ? 0.3 : kHard, soft ? 0.7 : kHard);
    }
  }
  check_poll();
  return check::verdict();
}
