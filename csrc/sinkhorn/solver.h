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

#include "../backend.h"
#include "../parallel.h"
#include "../results.h"
#include "problem.h"

namespace wgan_ext::sinkhorn {

struct Solution {
  Tensor f, g;     // [B, N], [B, M] of the centred problem, in the type of the kernels
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
      columns_x_ = pack(problem.x.points);
      columns_y_ = pack(problem.y.points);
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
    const int64_t count = sums_count(m, m, costs.ground.cost);
    const Tensor sums = make_sums(count);
    each_group(m, m, [&](const Group& group) {
      Control* c = group.of(control_of(control));
      const Cloud<T> cloud = side.cloud.of(group.first);
      const Ground<T> ground = group.of(costs.ground, m, m);
      Sums* s = static_cast<Sums*>(sums.mutable_data_ptr()) + group.first * count;
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
    const int64_t row_sums = sums_count(problem_.x, problem_.y, cost),
                  column_sums = sums_count(problem_.y, problem_.x, cost), most_sums = std::max(row_sums, column_sums);
    const Tensor all_sums = make_sums(most_sums);
    each_group(problem_.x, problem_.y, [&](const Group& group) {
      Control* c = group.of(control_of(control));
      const Cloud<T> cx = x.cloud.of(group.first), cy = y.cloud.of(group.first);
      const Ground<T> ground = group.of(costs.ground, problem_.x, problem_.y);
      Ground<T> back = ground;
      back.transposed = cost == Cost::matrix;
      Sums* sums = static_cast<Sums*>(all_sums.mutable_data_ptr()) + group.first * most_sums;
      const int64_t count = group.count;
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
    kernels_.gradient(control_of(held.control), held.x.cloud, held.y.cloud, held.ground, problem_.problems(),
                      force.template mutable_data_ptr<T>(), mass.template mutable_data_ptr<T>(), stream());
    return {force, mass};
  }

  // The plan times values [B, M, K]. [B, N, K]
  Tensor transport(const Tensor& f, const Tensor& g, const Tensor& values) {
    const Held held = hold(f, g);
    const Tensor packed = pack(values);
    Tensor out = at::empty({problem_.problems(), problem_.x.count(), values.size(2)}, problem_.x.points.options());
    kernels_.transport(control_of(held.control), held.x.cloud, held.y.cloud, held.ground, problem_.problems(),
                       packed.template const_data_ptr<T>(), values.size(2), out.template mutable_data_ptr<T>(),
                       stream());
    return out;
  }

  // The softmin over y at the points x. [B, N]
  Tensor softmin(const Tensor& g) {
    const Held held = hold(at::zeros_like(problem_.x.weights), g);
    const int64_t count = sums_count(problem_.x, problem_.y, held.ground.cost);
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

  // The ground cost as passes read it, and the memory it lies in.
  struct Costs {
    Tensor matrix;
    Ground<T> ground;
  };

  // Both sides at given potentials.
  struct Held {
    Side x, y;
    Ground<T> ground;
    Tensor control;
  };

  // Problems that are driven at once.
  struct Group {
    int64_t first, count;
    template <typename U>
    U* of(U* per_problem) const {
      return per_problem + first;
    }
    Ground<T> of(Ground<T> ground, const Measure& rows, const Measure& columns) const {
      if (ground.matrix) ground.matrix += first * rows.count() * columns.count();
      return ground;
    }
  };

  // Calls body for all problems at once, or for each: on the CPU each problem stops by itself, and where problems are
  // many or small the threads share out problems. Results do not depend on it.
  template <typename Body>
  void each_group(const Measure& x, const Measure& y, const Body& body) const {
    const int64_t problems = problem_.problems();
    if (kernels_.together || problems == 1) return body(Group{0, problems});
    constexpr int64_t kMany = 16, kLargeWork = int64_t{1} << 23;
    if (problems >= kMany || x.count() * y.count() * (dim() + 12) < kLargeWork)
      return parallel_for(problems, [&](int64_t p) { body(Group{p, 1}); });
    for (int64_t p = 0; p < problems; ++p) body(Group{p, 1});
  }

  Stream stream() const { return scope_.stream(); }
  int64_t dim() const { return problem_.x.points.size(2); }
  Tensor bytes(int64_t size) const { return at::empty({size}, problem_.x.points.options().dtype(at::kByte)); }
  Tensor values(int64_t size) const { return at::empty({problem_.problems(), size}, problem_.x.points.options()); }
  Tensor make_control() const { return bytes(problem_.problems() * static_cast<int64_t>(sizeof(Control))); }
  Tensor make_sums(int64_t count) const {
    return bytes(problem_.problems() * count * static_cast<int64_t>(sizeof(Sums)));
  }
  static Control* control_of(const Tensor& control) { return static_cast<Control*>(control.mutable_data_ptr()); }
  static const Facts* facts_of(const Tensor& facts, const Group& group) {
    static_assert(sizeof(Facts) == 4 * sizeof(double));
    return reinterpret_cast<const Facts*>(facts.const_data_ptr<double>()) + group.first;
  }

  Tensor pack(const Tensor& points) const {
    const Tensor whole = points.contiguous();
    const int64_t count = whole.size(1), width = whole.size(2);
    Tensor columns = values(kernels_.columns_size(count, width));
    kernels_.pack(whole.template const_data_ptr<T>(), count, width, problem_.problems(),
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
    const int64_t n = rows.count(), m = columns.count(), problems = problem_.problems();
    if (c.ground.matrix || !kernels_.caches || !kernels_.caches(n, m, dim(), c.ground.cost) ||
        static_cast<double>(problems) * static_cast<double>(n) * static_cast<double>(m) * sizeof(T) >
            static_cast<double>(memory_limit_))
      return c;
    const Side x = make_side(rows, row_columns, columns, {}, c.ground.cost),
               y = make_side(columns, column_columns, rows, {}, c.ground.cost);
    c.matrix = empty_result({problems, n, m}, rows.points.options());
    kernels_.costs(x.cloud, y.cloud, c.ground, problems, c.matrix.template mutable_data_ptr<T>(), stream());
    c.ground = {Cost::matrix, T(0), c.matrix.template const_data_ptr<T>(), false};
    return c;
  }

  int64_t sums_count(const Measure& rows, const Measure& columns, Cost cost) const {
    return kernels_.sums_size(rows.count(), columns.count(), dim(), cost);
  }

  Side make_side(const Measure& m, const Tensor& columns, const Measure& other, const OptionalTensor& potential,
                 Cost cost) const {
    const int64_t count = m.count(), problems = problem_.problems();
    Side s;
    s.potential =
        potential ? potential->reshape({problems, count}).clone() : at::zeros({problems, count}, m.points.options());
    s.softmin = s.potential.clone();
    s.bias = values(kernels_.padded(count));
    s.scratch = values(kernels_.scratch_size(count, dim(), other.count(), cost));
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
               columns.defined() ? columns.size(1) : 0,
               s.bias.size(1),
               s.scratch.size(1)};
    return s;
  }

  Held hold(const Tensor& f, const Tensor& g) const {
    Held held;
    held.ground = ground();
    held.x = make_side(problem_.x, columns_x_, problem_.y, f, held.ground.cost);
    held.y = make_side(problem_.y, columns_y_, problem_.x, g, held.ground.cost);
    held.control = make_control();
    Control* c = control_of(held.control);
    const Group all{0, problem_.problems()};
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
