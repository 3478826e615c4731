// The driver of a Sinkhorn solve: memory, passes and updates in their order, for CPU and CUDA alike.
#pragma once
#include <ATen/ops/abs.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../backend.h"
#include "../parallel.h"
#include "../results.h"
#include "problem.h"

namespace wgan_ext::sinkhorn {

struct Solution {
  Tensor f, g;     // [B, N], [B, M], or [total], of the centred problem, in the type of the kernels
  Tensor facts;    // [B, 5] double: error, mass of the plan, iterations, converged, epsilon
  Tensor control;  // bytes
  bool converged = true;
};

template <typename T>
class Solver {
 public:
  Solver(const Problem& problem, const Tensor& epsilon, const Request& request)
      : problem_(problem),
        kernels_(kernels_for<Kernels<T>>(request.terms.op, problem.x.points)),
        scope_(problem.x.points),
        memory_limit_(request.memory_limit) {
    TORCH_CHECK_VALUE(!kernels_.together || problem.problems() <= kMostTogether, request.terms.op,
                      ": a batch on this device must have at most ", kMostTogether, " problems, got ",
                      problem.problems());
    options_.scaling = request.scaling.value_or(0);
    options_.tolerance = request.tolerance;
    options_.relaxation = request.relaxation.value_or(0);
    options_.exponent_limit = sizeof(T) == 4 ? 80 : 700;
    options_.rounding = sizeof(T) == 4 ? 1e-7 : 1e-16;
    options_.row_rho = problem.terms.rho_x;
    options_.column_rho = problem.terms.rho_y;
    options_.max_iter = request.max_iter;
    options_.number = 1;
    const Tensor start = at::abs(mean_cost(problem, true)), range_x = weight_range(problem.x),
                 range_y = weight_range(problem.y);
    facts_ = at::stack({epsilon, start, range_x, range_y}, 1);
    facts_y_ = at::stack({epsilon, start, range_y, range_x}, 1);
    if (problem.terms.cost != Cost::matrix) {
      columns_x_ = pack(problem.x.segments, problem.x.points);
      columns_y_ = pack(problem.y.segments, problem.y.points);
    }
  }

  // x (or y) against itself: averaged updates from 0.
  Solution self(Role role) {
    const bool of_x = role == Role::rows;
    const Measure& m = of_x ? problem_.x : problem_.y;
    const Tensor& columns = of_x ? columns_x_ : columns_y_;
    const Costs costs = make_costs(m, columns, m, columns);
    Side side = make_side(m, columns, m, {}, costs.ground.cost);
    Options options = options_;
    options.row_rho = options.column_rho = of_x ? problem_.terms.rho_x : problem_.terms.rho_y;
    const Tensor control = make_control();
    const int64_t most_sums = sums_size(side.cloud, side.cloud, costs.ground.cost);
    const Tensor sums = make_sums(most_sums);
    each_group(m, m, [&](const Group& group) {
      Control* c = group.of(control_of(control));
      const Cloud<T> cloud = group.of(side.cloud);
      const Ground<T> ground = costs.of(group);
      Sums* s = static_cast<Sums*>(sums.mutable_data_ptr()) + group.first * most_sums;
      const int64_t count = sums_size(cloud, cloud, ground.cost);
      kernels_.begin(c, facts_of(of_x ? facts_ : facts_y_, group), options, nullptr, nullptr, group.count, stream());
      kernels_.set_bias(c, cloud, group.count, stream());
      for (int64_t i = 0; i <= options.max_iter; ++i) {
        kernels_.pass(c, cloud, cloud, ground, Role::self, group.count, s, stream());
        kernels_.advance(c, Event::self, s, count, group.count, stream());
        if (finished(c, i, group)) break;
        kernels_.apply(c, cloud, Role::self, group.count, stream());
      }
    });
    return finish(side.potential, side.potential, control);
  }

  // x against y from nothing, from given potentials, or from the self terms if that start is the better one.
  Solution cross(const OptionalTensor& f, const OptionalTensor& g, const Solution* self_x, const Solution* self_y) {
    const Costs costs = make_costs(problem_.x, columns_x_, problem_.y, columns_y_);
    const Cost cost = costs.ground.cost;
    Side x = make_side(problem_.x, columns_x_, problem_.y, f, cost),
         y = make_side(problem_.y, columns_y_, problem_.x, g, cost);
    if (self_x) {
      x.start = at::empty_like(x.potential);
      y.start = at::empty_like(y.potential);
      x.cloud.start = x.start.template mutable_data_ptr<T>();
      y.cloud.start = y.start.template mutable_data_ptr<T>();
    }
    const Tensor control = make_control();
    const int64_t most_sums = std::max(sums_size(x.cloud, y.cloud, cost), sums_size(y.cloud, x.cloud, cost));
    const Tensor all_sums = make_sums(most_sums);
    each_group(problem_.x, problem_.y, [&](const Group& group) {
      Control* c = group.of(control_of(control));
      const Cloud<T> cx = group.of(x.cloud), cy = group.of(y.cloud);
      const Ground<T> ground = costs.of(group);
      Ground<T> back = ground;
      back.transposed = cost == Cost::matrix;
      Sums* sums = static_cast<Sums*>(all_sums.mutable_data_ptr()) + group.first * most_sums;
      const int64_t count = group.count, row_sums = sums_size(cx, cy, cost), column_sums = sums_size(cy, cx, cost);
      const auto rows = [&](Event event) {
        kernels_.pass(c, cx, cy, ground, Role::rows, count, sums, stream());
        kernels_.advance(c, event, sums, row_sums, count, stream());
      };
      const auto columns = [&](Event event) {
        kernels_.pass(c, cy, cx, back, Role::columns, count, sums, stream());
        kernels_.advance(c, event, sums, column_sums, count, stream());
      };
      const auto of_self = [&](const Solution* s) -> const Control* {
        return s ? group.of(control_of(s->control)) : nullptr;
      };
      kernels_.begin(c, facts_of(facts_, group), options_, of_self(self_x), of_self(self_y), count, stream());
      if (f) {
        kernels_.set_bias(c, cx, count, stream());
        kernels_.set_bias(c, cy, count, stream());
        rows(Event::probe_rows);
        columns(self_x ? Event::probe_columns_then_cold : Event::probe_columns);
      }
      if (!f || self_x) {
        if (!f) kernels_.advance(c, Event::cold, nullptr, 0, count, stream());
        kernels_.set_cold(c, cx, Role::rows, count, stream());
        kernels_.set_cold(c, cy, Role::columns, count, stream());
        rows(Event::rows);
      }
      for (int64_t i = 0; i < options_.max_iter && !finished(c, i, group); ++i) {
        kernels_.apply(c, cx, Role::rows, count, stream());
        columns(Event::columns);
        kernels_.apply(c, cy, Role::columns, count, stream());
        if (!problem_.terms.balanced()) kernels_.apply(c, cx, Role::translated, count, stream());
        rows(Event::rows);
      }
    });
    return finish(x.potential, y.potential, control);
  }

  // The forces on x by the plan with y (Kernels::gradient), [B, N, D], and the plan's row sums, [B, N].
  std::tuple<Tensor, Tensor> gradient(const Tensor& f, const Tensor& g) {
    const Held held = hold(f, g);
    Tensor force = at::empty_like(problem_.x.points), mass = at::empty_like(problem_.x.weights);
    T *to_force = force.template mutable_data_ptr<T>(), *to_mass = mass.template mutable_data_ptr<T>();
    each_share(held, [&](const Group& group, Control* c, const Cloud<T>& x, const Cloud<T>& y, int64_t first) {
      kernels_.gradient(c, x, y, held.ground, group.count, to_force + first * dim(), to_mass + first, stream());
    });
    return {force, mass};
  }

  // The plan times values [B, M, K]. [B, N, K]
  Tensor transport(const Tensor& f, const Tensor& g, const Tensor& values) {
    const Held held = hold(f, g);
    const Tensor packed = pack(problem_.y.segments, values);
    const int64_t width = values.size(-1), packed_width = kernels_.columns_size(1, width) / kernels_.padded(1);
    std::vector<int64_t> shape = problem_.x.weights.sizes().vec();
    shape.push_back(width);
    Tensor out = at::empty(shape, problem_.x.points.options());
    const T* from = packed.template const_data_ptr<T>();
    T* to = out.template mutable_data_ptr<T>();
    each_share(held, [&](const Group& group, Control* c, const Cloud<T>& x, const Cloud<T>& y, int64_t first) {
      kernels_.transport(c, x, y, held.ground, group.count,
                         from + held.y.cloud.first_padded(group.first) * packed_width, width, to + first * width,
                         stream());
    });
    return out;
  }

  // The softmin over y at the points x. [B, N]
  Tensor softmin(const Tensor& g) {
    const Held held = hold(at::zeros_like(problem_.x.weights), g);
    const int64_t count = sums_size(held.x.cloud, held.y.cloud, held.ground.cost);
    const Tensor sums = make_sums(count);
    kernels_.pass(control_of(held.control), held.x.cloud, held.y.cloud, held.ground, Role::rows, problem_.problems(),
                  static_cast<Sums*>(sums.mutable_data_ptr()), stream());
    return held.x.softmin;
  }

 private:
  static constexpr int64_t kMostTogether = 65535;  // blocks in a grid's third dimension

  struct Side {
    Tensor potential, softmin, start, bias, scratch;
    Cloud<T> cloud;
  };

  // Problems that are driven at once.
  struct Group {
    int64_t first, count;
    bool whole;  // all problems of the batch
    template <typename U>
    U* of(U* per_problem) const {
      return per_problem + first;
    }
    Cloud<T> of(const Cloud<T>& cloud) const { return whole ? cloud : cloud.of(first); }
  };

  // The ground cost as passes read it, and the memory it lies in.
  struct Costs {
    Tensor matrix;
    Ground<T> ground;
    std::vector<int64_t> first;  // [B] where each problem's matrix begins
    Ground<T> of(const Group& group) const {
      Ground<T> g = ground;
      if (g.matrix) g.matrix += first[static_cast<size_t>(group.first)];
      return g;
    }
  };

  // Both sides at given potentials.
  struct Held {
    Side x, y;
    Ground<T> ground;
    Tensor control;
  };

  // Calls body for all problems at once, or for each: on the CPU each problem stops by itself. All threads share a
  // problem that is large, and large among the others; the rest is shared out problem by problem, the largest first.
  // Results do not depend on it.
  template <typename Body>
  void each_group(const Measure& x, const Measure& y, const Body& body) const {
    const int64_t problems = problem_.problems();
    if (kernels_.together || (problems == 1 && !x.segments.ragged())) return body(Group{0, problems, true});
    constexpr double kMany = 16, kLargeWork = 1 << 23;
    std::vector<std::pair<double, int64_t>> shares;
    shares.reserve(static_cast<size_t>(problems));
    double total = 0;
    for (int64_t p = 0; p < problems; ++p) {
      const double pairs = static_cast<double>(x.segments.count(p)) * static_cast<double>(y.segments.count(p));
      shares.emplace_back(-pairs * static_cast<double>(dim() + 12), p);
      total -= shares.back().first;
    }
    std::stable_sort(shares.begin(), shares.end());
    int64_t large = 0;
    for (; large < problems; ++large) {
      const auto [work, p] = shares[static_cast<size_t>(large)];
      if (-work < kLargeWork || -work * kMany <= total) break;
      body(Group{p, 1, false});
    }
    parallel_each(problems - large,
                  [&](int64_t k) { body(Group{shares[static_cast<size_t>(large + k)].second, 1, false}); });
  }

  // Calls body(group, its controls, rows, columns, where its rows begin) for problems at held potentials: at once but
  // for a ragged batch on the CPU.
  template <typename Body>
  void each_share(const Held& held, const Body& body) const {
    const auto call = [&](const Group& group) {
      body(group, group.of(control_of(held.control)), group.of(held.x.cloud), group.of(held.y.cloud),
           held.x.cloud.first(group.whole ? 0 : group.first));
    };
    if (problem_.x.segments.ragged()) return each_group(problem_.x, problem_.y, call);
    call(Group{0, problem_.problems(), true});
  }

  Stream stream() const { return scope_.stream(); }
  int64_t dim() const { return problem_.x.points.size(-1); }
  Tensor bytes(int64_t size) const { return at::empty({size}, problem_.x.points.options().dtype(at::kByte)); }
  // Memory for `size` elements a problem, or as many in proportion in a ragged batch, `size` being of its largest.
  Tensor padded_values(const Segments& segments, int64_t size) const {
    const int64_t problems = segments.problems();
    int64_t elements = problems * size;
    if (segments.ragged())
      elements = first_of_padded(segments.first(problems), problems, kernels_.padded(1)) *
                 (size / kernels_.padded(segments.count()));
    return at::empty({elements}, problem_.x.points.options());
  }
  Tensor make_control() const { return bytes(problem_.problems() * static_cast<int64_t>(sizeof(Control))); }
  Tensor make_sums(int64_t count) const {
    return bytes(problem_.problems() * count * static_cast<int64_t>(sizeof(Sums)));
  }
  static Control* control_of(const Tensor& control) { return static_cast<Control*>(control.mutable_data_ptr()); }
  static const Facts* facts_of(const Tensor& facts, const Group& group) {
    static_assert(sizeof(Facts) == 4 * sizeof(double));
    return reinterpret_cast<const Facts*>(facts.const_data_ptr<double>()) + group.first;
  }

  Tensor pack(const Segments& segments, const Tensor& points) const {
    const Tensor whole = points.contiguous();
    const int64_t width = whole.size(-1);
    Tensor columns = padded_values(segments, kernels_.columns_size(segments.count(), width));
    kernels_.pack(whole.template const_data_ptr<T>(), segments.offsets(), segments.count(), width, segments.problems(),
                  columns.template mutable_data_ptr<T>(), stream());
    return columns;
  }

  Ground<T> ground() const {
    const T* matrix = problem_.matrix.defined() ? problem_.matrix.template const_data_ptr<T>() : nullptr;
    return {problem_.terms.cost, T(problem_.terms.power), matrix, false};
  }

  // Caches the costs where it pays and the limit allows.
  Costs make_costs(const Measure& rows, const Tensor& row_columns, const Measure& columns,
                   const Tensor& column_columns) {
    Costs c;
    c.ground = ground();
    int64_t pairs = 0;
    double bytes = 0;
    for (int64_t p = 0; p < problem_.problems(); ++p) {
      const int64_t n = rows.segments.count(p), m = columns.segments.count(p);
      c.first.push_back(pairs);
      bytes += static_cast<double>(n) * static_cast<double>(m) * sizeof(T);
      pairs += n * m;
    }
    if (c.ground.matrix || !kernels_.caches ||
        !kernels_.caches(rows.segments.count(), columns.segments.count(), dim(), c.ground.cost) ||
        bytes > static_cast<double>(memory_limit_))
      return c;
    const Side x = make_side(rows, row_columns, columns, {}, c.ground.cost),
               y = make_side(columns, column_columns, rows, {}, c.ground.cost);
    c.matrix = empty_result({pairs}, rows.points.options());
    T* to = c.matrix.template mutable_data_ptr<T>();
    const auto fill = [&](const Group& group) {
      kernels_.costs(group.of(x.cloud), group.of(y.cloud), c.ground, group.count,
                     to + c.first[static_cast<size_t>(group.first)], stream());
    };
    if (rows.segments.ragged())
      each_group(rows, columns, fill);
    else
      fill(Group{0, problem_.problems(), true});
    c.ground = {Cost::matrix, T(0), to, false};
    return c;
  }

  int64_t sums_size(const Cloud<T>& rows, const Cloud<T>& columns, Cost cost) const {
    return kernels_.sums_size(rows.count, columns.count, dim(), cost);
  }

  // Of the largest problem, and what all others in proportion to their padded points make do with.
  int64_t scratch_size(const Segments& segments, const Segments& other, Cost cost) const {
    const int64_t all = kernels_.scratch_size(segments.count(), dim(), other.count(), cost);
    if (!segments.ragged()) return all;
    int64_t each = ceil_div(all, kernels_.padded(segments.count()));
    for (int64_t p = 0; p < segments.problems(); ++p) {
      const int64_t own = kernels_.scratch_size(segments.count(p), dim(), other.count(p), cost);
      each = std::max(each, ceil_div(own, kernels_.padded(segments.count(p))));
    }
    return each * kernels_.padded(segments.count());
  }

  Side make_side(const Measure& m, const Tensor& columns, const Measure& other, const OptionalTensor& potential,
                 Cost cost) const {
    const int64_t count = m.segments.count(), padded = kernels_.padded(count);
    const int64_t scratch = scratch_size(m.segments, other.segments, cost);
    Side s;
    s.potential =
        potential ? potential->reshape(m.weights.sizes()).clone() : at::zeros(m.weights.sizes(), m.points.options());
    s.softmin = s.potential.clone();
    s.bias = padded_values(m.segments, padded);
    s.scratch = padded_values(m.segments, scratch);
    s.cloud = {m.points.template const_data_ptr<T>(),
               columns.defined() ? columns.template const_data_ptr<T>() : nullptr,
               m.squares.template const_data_ptr<T>(),
               m.weights.template const_data_ptr<T>(),
               m.log_weights.template const_data_ptr<T>(),
               s.potential.template mutable_data_ptr<T>(),
               s.softmin.template mutable_data_ptr<T>(),
               nullptr,
               s.bias.template mutable_data_ptr<T>(),
               s.scratch.template mutable_data_ptr<T>(),
               count,
               dim(),
               columns.defined() ? kernels_.columns_size(count, dim()) : 0,
               padded,
               scratch,
               m.segments.offsets(),
               kernels_.padded(1)};
    return s;
  }

  Held hold(const Tensor& f, const Tensor& g) const {
    Held held;
    held.ground = ground();
    held.x = make_side(problem_.x, columns_x_, problem_.y, f, held.ground.cost);
    held.y = make_side(problem_.y, columns_y_, problem_.x, g, held.ground.cost);
    held.control = make_control();
    Control* c = control_of(held.control);
    const Group all{0, problem_.problems(), true};
    kernels_.begin(c, facts_of(facts_, all), options_, nullptr, nullptr, all.count, stream());
    kernels_.set_bias(c, held.y.cloud, all.count, stream());
    return held;
  }

  bool finished(Control* c, int64_t iteration, const Group& group) const {
    return (iteration + 1) % kernels_.iterations_per_poll == 0 && kernels_.finished(c, group.count, stream());
  }

  Solution finish(const Tensor& f, const Tensor& g, const Tensor& control) const {
    Tensor facts = at::empty({problem_.problems(), 5}, problem_.shift.options());
    kernels_.report(control_of(control), problem_.problems(), facts.template mutable_data_ptr<double>(), stream());
    bool converged = true;
    for (int64_t p = 0; control.is_cpu() && p < problem_.problems(); ++p)
      converged = converged && control_of(control)[p].converged;
    return {f, g, facts, control, converged};
  }

  const Problem& problem_;
  const Kernels<T>& kernels_;
  DeviceScope scope_;
  int64_t memory_limit_;
  Options options_{};
  Tensor facts_, facts_y_;  // [B, 4] of a pass over x, over y
  Tensor columns_x_, columns_y_;
};

}  // namespace wgan_ext::sinkhorn
