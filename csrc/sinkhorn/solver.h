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
#include "exchange.h"
#include "order.h"
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
  // With an exchange, the one problem's rows are shared out over processes.
  Solver(const Problem& problem, const Tensor& epsilon, const Request& request, const Exchange* exchange = nullptr)
      : problem_(problem),
        exchange_(exchange),
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
    if (exchange_) {
      const Tensor agreed = exchange_->agreed(at::stack({facts_, facts_y_}));
      facts_ = agreed.select(0, 0);
      facts_y_ = agreed.select(0, 1);
    } else if (kernels_.prunes) {
      order_x_ = order_of(problem.x, chosen(problem.x, epsilon, start));
      order_y_ = order_of(problem.y, chosen(problem.y, epsilon, start));
      problem_.x = arranged(problem.x, order_x_);
      problem_.y = arranged(problem.y, order_y_);
    }
    if (problem.terms.cost != Cost::matrix) {
      columns_x_ = pack(problem_.x.segments, problem_.x.points);
      columns_y_ = pack(problem_.y.segments, problem_.y.points);
    }
  }

  // x (or y) against itself: averaged updates from 0.
  Solution self(Role role) {
    const bool of_x = role == Role::rows;
    const Measure& m = of_x ? problem_.x : problem_.y;
    const Tensor& columns = of_x ? columns_x_ : columns_y_;
    const Costs costs = make_costs(m, columns, m, columns, memory_limit_, of_x);
    Side side = make_side(m, columns, m, {}, costs.ground.cost);
    const Share share = make_share(side, m, m, of_x, costs.ground.cost);
    Options options = options_;
    options.row_rho = options.column_rho = of_x ? problem_.terms.rho_x : problem_.terms.rho_y;
    const Tensor control = make_control();
    const int64_t most_sums = sums_size(share.rows, side.cloud, costs.ground.cost);
    const Tensor sums = make_sums(most_sums);
    each_group(m, m, [&](const Group& group) {
      Control* c = group.of(control_of(control));
      const Cloud<T> cloud = group.of(side.cloud), rows = group.of(share.rows);
      const Ground<T> ground = costs.of(group);
      Sums* s = static_cast<Sums*>(sums.mutable_data_ptr()) + group.first * most_sums;
      const int64_t count = sums_size(rows, cloud, ground.cost);
      kernels_.begin(c, facts_of(of_x ? facts_ : facts_y_, group), options, nullptr, nullptr, group.count, stream());
      kernels_.set_bias(c, cloud, group.count, stream());
      for (int64_t i = 0; i <= options.max_iter; ++i) {
        if (rows.count > 0) kernels_.pass(c, rows, cloud, ground, Role::self, group.count, s, stream());
        advance(c, Event::self, of_x, side, sums, s, count, group.count);
        if (finished(c, i, group)) break;
        kernels_.apply(c, cloud, Role::self, group.count, stream());
      }
    });
    const Tensor f = restored(side.potential, m, of_x ? order_x_ : order_y_);
    return finish(f, f, control);
  }

  // x against y from nothing, from given potentials, or from the self terms if that start is the better one.
  Solution cross(const OptionalTensor& f, const OptionalTensor& g, const Solution* self_x, const Solution* self_y) {
    // Each process has rows of its own in the two directions: two matrices in place of one.
    const int64_t limit = exchange_ ? memory_limit_ / 2 : memory_limit_;
    const Costs costs = make_costs(problem_.x, columns_x_, problem_.y, columns_y_, limit, true),
                back_costs =
                    exchange_ ? make_costs(problem_.y, columns_y_, problem_.x, columns_x_, limit, false) : costs;
    const Cost cost = costs.ground.cost, back_cost = back_costs.ground.cost;
    Side x = make_side(problem_.x, columns_x_, problem_.y, start_of(f, problem_.x, order_x_), cost),
         y = make_side(problem_.y, columns_y_, problem_.x, start_of(g, problem_.y, order_y_), back_cost);
    if (self_x) {
      x.start = at::empty_like(x.potential);
      y.start = at::empty_like(y.potential);
      x.cloud.start = x.start.template mutable_data_ptr<T>();
      y.cloud.start = y.start.template mutable_data_ptr<T>();
    }
    const Share share_x = make_share(x, problem_.x, problem_.y, true, cost),
                share_y = make_share(y, problem_.y, problem_.x, false, back_cost);
    const Tensor control = make_control();
    const int64_t most_sums =
        std::max(sums_size(share_x.rows, y.cloud, cost), sums_size(share_y.rows, x.cloud, back_cost));
    const Tensor all_sums = make_sums(most_sums);
    each_group(problem_.x, problem_.y, [&](const Group& group) {
      Control* c = group.of(control_of(control));
      const Cloud<T> cx = group.of(x.cloud), cy = group.of(y.cloud);
      const Cloud<T> rows_x = group.of(share_x.rows), rows_y = group.of(share_y.rows);
      const Ground<T> ground = costs.of(group);
      Ground<T> back = back_costs.of(group);
      back.transposed = !exchange_ && cost == Cost::matrix;
      Sums* sums = static_cast<Sums*>(all_sums.mutable_data_ptr()) + group.first * most_sums;
      const int64_t count = group.count, row_sums = sums_size(rows_x, cy, cost),
                    column_sums = sums_size(rows_y, cx, back_cost);
      const auto rows = [&](Event event) {
        if (rows_x.count > 0) kernels_.pass(c, rows_x, cy, ground, Role::rows, count, sums, stream());
        advance(c, event, true, x, all_sums, sums, row_sums, count);
      };
      const auto columns = [&](Event event) {
        if (rows_y.count > 0) kernels_.pass(c, rows_y, cx, back, Role::columns, count, sums, stream());
        advance(c, event, false, y, all_sums, sums, column_sums, count);
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
    return finish(restored(x.potential, problem_.x, order_x_), restored(y.potential, problem_.y, order_y_), control);
  }

  // The forces on x by the plan with y (Kernels::gradient), [B, N, D], and the plan's row sums, [B, N].
  std::tuple<Tensor, Tensor> gradient(const Tensor& f, const Tensor& g) {
    const Held held = hold(f, g);
    Tensor force = at::empty_like(problem_.x.points), mass = at::empty_like(problem_.x.weights);
    T *to_force = force.template mutable_data_ptr<T>(), *to_mass = mass.template mutable_data_ptr<T>();
    each_share(held, [&](const Group& group, Control* c, const Cloud<T>& x, const Cloud<T>& y, int64_t first) {
      kernels_.gradient(c, x, y, held.ground, group.count, to_force + first * dim(), to_mass + first, stream());
    });
    return {restored(force, problem_.x, order_x_), restored(mass, problem_.x, order_x_)};
  }

  // The plan times values [B, M, K]. [B, N, K]
  Tensor transport(const Tensor& f, const Tensor& g, const Tensor& values) {
    const Held held = hold(f, g);
    const Tensor packed = pack(problem_.y.segments, arranged(values, problem_.y, order_y_));
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
    return restored(out, problem_.x, order_x_);
  }

  // The softmin over y at the points x. [B, N]
  Tensor softmin(const Tensor& g) {
    const Held held = hold(at::zeros_like(problem_.x.weights), g);
    const int64_t count = sums_size(held.x.cloud, held.y.cloud, held.ground.cost);
    const Tensor sums = make_sums(count);
    kernels_.pass(control_of(held.control), held.x.cloud, held.y.cloud, held.ground, Role::rows, problem_.problems(),
                  static_cast<Sums*>(sums.mutable_data_ptr()), stream());
    return restored(held.x.softmin, problem_.x, order_x_);
  }

 private:
  static constexpr int64_t kMostTogether = 65535;  // blocks in a grid's third dimension

  struct Side {
    Tensor potential, softmin, start, bias, scratch;
    Tiles tiles;
    Cloud<T> cloud;
  };

  // The rows that this process passes over: all, or a range of the one problem's, with columns and scratch of their
  // own.
  struct Share {
    Tensor columns, scratch;
    Cloud<T> rows;
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
  Costs make_costs(const Measure& rows, const Tensor& row_columns, const Measure& columns, const Tensor& column_columns,
                   int64_t limit, bool of_x) {
    Costs c;
    c.ground = ground();
    int64_t pairs = 0;
    double bytes = 0;
    for (int64_t p = 0; p < problem_.problems(); ++p) {
      const int64_t n = exchange_ ? exchange_->rows(of_x).count : rows.segments.count(p), m = columns.segments.count(p);
      c.first.push_back(pairs);
      bytes += static_cast<double>(n) * static_cast<double>(m) * sizeof(T);
      pairs += n * m;
    }
    if (c.ground.matrix || !kernels_.caches ||
        !kernels_.caches(rows.segments.count(), columns.segments.count(), dim(), c.ground.cost) || pairs == 0 ||
        bytes > static_cast<double>(limit))
      return c;
    const Side x = make_side(rows, row_columns, columns, {}, c.ground.cost),
               y = make_side(columns, column_columns, rows, {}, c.ground.cost);
    const Share share = make_share(x, rows, columns, of_x, c.ground.cost);
    c.matrix = empty_result({pairs}, rows.points.options());
    T* to = c.matrix.template mutable_data_ptr<T>();
    const auto fill = [&](const Group& group) {
      kernels_.costs(group.of(share.rows), group.of(y.cloud), c.ground, group.count,
                     to + c.first[static_cast<size_t>(group.first)], stream());
    };
    if (rows.segments.ragged())
      each_group(rows, columns, fill);
    else
      fill(Group{0, problem_.problems(), true});
    c.ground = {Cost::matrix, T(0), to, false};
    return c;
  }

  // The problems whose points are to be ordered. [B]
  std::vector<bool> chosen(const Measure& m, const Tensor& epsilon, const Tensor& mean_cost) const {
    std::vector<bool> c;
    for (int64_t p = 0; p < problem_.problems(); ++p)
      c.push_back(problem_.terms.cost != Cost::matrix &&
                  worth_pruning(epsilon.const_data_ptr<double>()[p], mean_cost.const_data_ptr<double>()[p],
                                m.segments.count(p), dim()));
    return c;
  }

  // A potential in the user's order as a side starts from it.
  static OptionalTensor start_of(const OptionalTensor& potential, const Measure& m, const Tensor& order) {
    if (!potential) return std::nullopt;
    return arranged(potential->reshape(m.weights.sizes()), m, order);
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
    if (order_x_.defined() || order_y_.defined()) {
      s.tiles = tiles_of(m, other, problem_.terms.cost);
      s.cloud.boxes = s.tiles.boxes.template mutable_data_ptr<T>();
      s.cloud.aligned = s.tiles.aligned.template const_data_ptr<T>();
    }
    return s;
  }

  Share make_share(const Side& side, const Measure& m, const Measure& other, bool of_x, Cost cost) const {
    if (!exchange_) return {{}, {}, side.cloud};
    Share s{{}, {}, side.cloud};
    Cloud<T>& rows = s.rows;
    const auto [begin, count] = exchange_->rows(of_x);
    rows.points += begin * dim();
    rows.squares += begin;
    rows.weights += begin;
    rows.log_weights += begin;
    rows.potential += begin;
    rows.softmin += begin;
    if (rows.start) rows.start += begin;
    rows.bias = nullptr;  // of columns
    rows.count = count;
    rows.padded = kernels_.padded(count);
    rows.columns_size = kernels_.columns_size(count, dim());
    rows.scratch_size = kernels_.scratch_size(count, dim(), other.segments.count(), cost);
    if (count == 0) return s;
    s.columns = pack(Segments(1, count), m.points.narrow(1, begin, count));
    s.scratch = at::empty({rows.scratch_size}, m.points.options());
    rows.columns = s.columns.template const_data_ptr<T>();
    rows.scratch = s.scratch.template mutable_data_ptr<T>();
    return s;
  }

  // The controller's next decisions, from the sums of all processes' passes.
  void advance(Control* c, Event event, bool of_x, const Side& side, const Tensor& memory, const Sums* sums,
               int64_t count, int64_t problems) const {
    if (!exchange_) return kernels_.advance(c, event, sums, count, problems, stream());
    const Tensor all =
        exchange_->gather(of_x, side.softmin, memory.narrow(0, 0, count * static_cast<int64_t>(sizeof(Sums))));
    kernels_.advance(c, event, static_cast<const Sums*>(all.const_data_ptr()), exchange_->processes(), problems,
                     stream());
  }

  Held hold(const Tensor& f, const Tensor& g) const {
    Held held;
    held.ground = ground();
    held.x = make_side(problem_.x, columns_x_, problem_.y, start_of(f, problem_.x, order_x_), held.ground.cost);
    held.y = make_side(problem_.y, columns_y_, problem_.x, start_of(g, problem_.y, order_y_), held.ground.cost);
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

  Problem problem_;  // in the order of its tiles where that differs from the user's, which is that of all results
  const Exchange* exchange_;
  const Kernels<T>& kernels_;
  DeviceScope scope_;
  int64_t memory_limit_;
  Options options_{};
  Tensor facts_, facts_y_;    // [B, 4] of a pass over x, over y
  Tensor order_x_, order_y_;  // undefined where it is the user's
  Tensor columns_x_, columns_y_;
};

}  // namespace wgan_ext::sinkhorn
