// The controller of a Sinkhorn solve: schedule of epsilon, over-relaxation, choice of the exponent's form, stop.
//
// One iteration updates f from g, then g from f. A *pass* over one cloud's rows computes for each row
//     S_i = sum_j b_j exp((f_i + g_j - C_ij) / epsilon)
// its fresh softmin h_i = f_i - epsilon log S_i, and the Sums below; the controller turns them into the decisions of
// the next update. It is plain scalar code on one struct, run by the host on the CPU and by one thread on the GPU, so
// that the GPU never waits for the host.
#pragma once
#include "../formulas.h"

namespace wgan_ext::sinkhorn {

// What a pass sums over its rows, a being their weights, omega the proposed relaxation and h the fresh softmin.
//
// Marginals may be soft: the penalty rho KL(P 1 | a), rho infinite where they are hard. The best f is then lambda h
// with lambda = rho / (rho + epsilon), the wanted row sum is T = exp(-f / rho), and delta = (f' - f) / epsilon is
// -omega (lambda log S + (1 - lambda) f / epsilon).
struct Sums {
  double error;           // a |S - T|: the marginal error before the update
  double relaxed_error;   // a |S exp(delta) - T'|: the marginal error of the same side after the relaxed update
  double mass;            // a S
  double gain;            // a (S - S exp(delta) + rho / epsilon (T - T')): the dual's gain by it, over epsilon
  double target;          // a T after a plain update
  double relaxed_target;  // a T' after the relaxed update
  double change;          // max |lambda h - f| where a > 0
};

WGAN_EXT_FORMULA Sums combine(const Sums& p, const Sums& q) {
  return {p.error + q.error,
          p.relaxed_error + q.relaxed_error,
          p.mass + q.mass,
          p.gain + q.gain,
          p.target + q.target,
          p.relaxed_target + q.relaxed_target,
          p.change < q.change ? q.change : p.change};
}

struct Options {
  double scaling;         // epsilon's factor per iteration until the target; 0: start at the target
  double tolerance;       // L1 marginal error at which to stop; 0: never
  double relaxation;      // 1: none; 0: automatic
  double exponent_limit;  // largest exponent (base e) for which a plain sum cannot overflow
  double rounding;        // of the mean of a type's numbers near 1: what a gain below it says nothing of
  double row_rho;         // weight of the KL penalty on x's marginal; infinite: a is kept
  double column_rho;      // the same of y
  int64_t max_iter;
  int32_t number;  // of the solve, not 0: what `done` becomes
};

// Computed by torch on the device of the points, in this order.
struct Facts {
  double epsilon;        // the target
  double start_epsilon;  // where the schedule starts: the mean cost
  double row_range;      // log(1 / least positive weight) of x
  double column_range;   // the same of y
};

struct Control {
  Facts facts;
  Options options;
  double epsilon;      // of the pass at hand
  double ratio;        // epsilon of the previous iteration over epsilon
  double omega;        // the update that follows the last pass
  double damping;      // its lambda
  double translation;  // then added to f and taken from g
  double row_target;   // the row update's sum of a exp(-f / rho)
  double proposal;     // the relaxation whose gain the next pass measures
  double row_error;    // Sums::error of the last row pass
  double column_error;
  double mass;
  double start_error;      // marginal error of the given start, infinite without one
  double start_row_error;  // its row part
  double window_error;     // row error when the present estimate of the rate began
  int64_t window_start;
  int64_t iterations;
  int32_t column_safe;  // for the column pass of the probe
  int32_t safe;         // the next pass keeps a running maximum
  int32_t primed;       // both softmins belong to the present potentials
  int32_t arrived;      // epsilon has reached its target
  int32_t plain;        // no relaxation in this iteration
  int32_t restore;      // this iteration goes back to the given start
  int32_t done;         // 0, or the number of the solve
  int32_t converged;
  int32_t all_done;  // of a batch's first problem: its `done` once all are done
};

// What a cloud is in a pass or an update: its potential is updated first, second, or against itself; or, the first
// again, only translated.
enum class Role : int32_t { rows, columns, self, translated };

enum class Event : int32_t { cold, rows, columns, self, probe_rows, probe_columns, probe_columns_then_cold };

// A plain sum cannot overflow if (old / new epsilon) log(1 / least weight) + (largest change of the other potential
// since this side's softmin was taken) / epsilon stays under the limit. Written so that NaN is unsafe.
WGAN_EXT_FORMULA int32_t unsafe(const Control& c, double range, double change) {
  return !(c.ratio * range + change / c.epsilon <= c.options.exponent_limit);
}

WGAN_EXT_FORMULA bool below_tolerance(const Control& c, double error) {
  return c.options.tolerance > 0 && error <= c.options.tolerance;
}

WGAN_EXT_FORMULA void stop(Control& c) {
  c.done = c.options.number;
  c.converged = c.row_error + c.column_error <= c.options.tolerance;
}

// Epsilon of the iteration with this number: the last one is always at the target.
WGAN_EXT_FORMULA double scheduled(const Control& c, double epsilon) {
  const bool last = c.iterations + 1 >= c.options.max_iter;
  return last || !(c.options.scaling > 0) || !(epsilon > c.facts.epsilon * (1 + 1e-9)) ? c.facts.epsilon : epsilon;
}

WGAN_EXT_FORMULA void begin_cold(Control& c) {
  c.epsilon = scheduled(c, c.facts.start_epsilon);
  c.ratio = 1;
  c.safe = 1;
  c.primed = 0;
  c.column_error = 0;  // the first pass only decides whether to stop when the target is reached, one update later
}

// Potentials are given, or wait to be chosen (warm start, self terms): all begin at the target.
WGAN_EXT_FORMULA void begin(Control& c, const Facts& facts, const Options& options, int32_t safe_rows,
                            int32_t safe_columns) {
  c = Control{};
  c.facts = facts;
  c.options = options;
  c.epsilon = c.facts.epsilon;
  c.ratio = 1;
  c.omega = 1;
  c.proposal = 1;
  c.damping = 1;
  c.start_error = INFINITY;
  c.safe = safe_rows;
  c.column_safe = safe_columns;
}

// The relaxation of this update: the proposal if the dual gains by it, else none, and a smaller proposal from here on.
WGAN_EXT_FORMULA double accept(Control& c, const Sums& sums) {
  if (c.plain || c.restore || c.proposal == 1) return 1;
  if (sums.gain >= -c.options.rounding * sums.mass) return c.proposal;
  c.proposal = 1 + (c.proposal - 1) / 2;
  return 1;
}

WGAN_EXT_FORMULA double damping(const Control& c, double rho) { return rho == INFINITY ? 1 : rho / (rho + c.epsilon); }

// f + t, g - t leaves the plan alone; the best t solves exp(-t / rho1) sum a exp(-f / rho1) = the same of y with -t. It
// is the slow mode of an unbalanced problem. What the sums' rounding makes of the ratio is none: rho would magnify it.
WGAN_EXT_FORMULA double translation(const Control& c, double column_target) {
  const double rate = 1 / c.options.row_rho + 1 / c.options.column_rho;
  if (c.plain || c.restore || rate == 0 || !(c.row_target > 1e-30) || !(column_target > 1e-30)) return 0;
  const double difference = log(c.row_target / column_target);
  const double certain = fabs(difference) - 32 * c.options.rounding;
  return certain > 0 ? copysign(certain, difference) / rate : 0;
}

// Successive over-relaxation: a plain iteration contracts the error by mu^2, a relaxed one by l with
// (l + omega - 1)^2 = l omega^2 mu^2, and the best omega is 2 / (1 + sqrt(1 - mu^2)).
WGAN_EXT_FORMULA void propose(Control& c) {
  constexpr int64_t window = 10;
  const int64_t steps = c.iterations - c.window_start;
  if (steps < window) return;
  const double rate = pow(c.row_error / c.window_error, 1.0 / static_cast<double>(steps));
  const double omega = c.proposal;
  if (c.options.relaxation != 0) {
    c.proposal = c.options.relaxation;
  } else if (rate > omega - 1 && rate < 1) {
    const double plain_rate = (rate + omega - 1) * (rate + omega - 1) / (omega * omega * rate);
    const double best = 2 / (1 + sqrt(plain_rate < 1 ? 1 - plain_rate : 0.0));
    c.proposal = best < 1.98 ? best : 1.98;
  }
  c.window_start = c.iterations;
  c.window_error = c.row_error;
}

WGAN_EXT_FORMULA void after_rows(Control& c, const Sums& sums) {
  const bool at_target = c.epsilon == c.facts.epsilon;
  const double error = sums.error + c.column_error;
  c.row_error = sums.error;
  c.mass = sums.mass;
  if ((at_target && c.primed && below_tolerance(c, error)) || c.iterations >= c.options.max_iter) return stop(c);
  c.plain = c.iterations + 1 >= c.options.max_iter || below_tolerance(c, sums.error);
  c.restore = at_target && !c.arrived && c.start_error < error;
  c.omega = accept(c, sums);
  c.damping = damping(c, c.options.row_rho);
  c.row_target = c.omega == 1 ? sums.target : sums.relaxed_target;
  c.safe = !c.primed || c.restore || unsafe(c, c.facts.row_range, c.omega * sums.change);
  if (at_target && !c.arrived) {
    c.arrived = 1;
    c.window_start = c.iterations;
    c.window_error = c.restore ? c.start_row_error : sums.error;
    if (c.options.relaxation != 0) c.proposal = c.options.relaxation;
  } else if (c.arrived) {
    propose(c);
  }
}

WGAN_EXT_FORMULA void after_columns(Control& c, const Sums& sums) {
  c.omega = accept(c, sums);
  c.damping = damping(c, c.options.column_rho);
  const double target = c.omega == 1 ? sums.target : sums.relaxed_target;
  c.translation = translation(c, target);
  c.column_error = (c.omega == 1 ? 0 : sums.relaxed_error) + target * fabs(expm1(c.translation / c.options.column_rho));
  c.restore = 0;
  c.primed = 1;
  c.iterations += 1;
  const double previous = c.epsilon;
  c.epsilon = scheduled(c, previous * c.options.scaling);
  c.ratio = previous / c.epsilon;
  c.safe = unsafe(c, c.facts.column_range, c.omega * sums.change);
}

// f <- (f + lambda h) / 2 for a cloud against itself; rows and columns have the same error. Exponents are shifted by f,
// and f_i + f_j - C_ij = [(f'_i + h_j - C_ij) + (h_i + f'_j - C_ij)] / 2 for the previous f': never above that of h.
WGAN_EXT_FORMULA void after_self(Control& c, const Sums& sums) {
  c.row_error = c.column_error = sums.error;
  c.mass = sums.mass;
  if (below_tolerance(c, 2 * sums.error) || c.iterations >= c.options.max_iter) return stop(c);
  c.omega = 0.5;
  c.damping = damping(c, c.options.row_rho);
  c.iterations += 1;
  c.safe = unsafe(c, c.facts.row_range, 0);
}

WGAN_EXT_FORMULA void advance(Control& c, Event event, const Sums& sums) {
  if (c.done) return;
  switch (event) {
    case Event::cold:
      return begin_cold(c);
    case Event::rows:
      return after_rows(c, sums);
    case Event::columns:
      return after_columns(c, sums);
    case Event::self:
      return after_self(c, sums);
    case Event::probe_rows:
      c.row_error = c.start_row_error = c.window_error = sums.error;
      c.mass = sums.mass;
      c.safe = c.column_safe;
      return;
    case Event::probe_columns:
    case Event::probe_columns_then_cold:
      c.column_error = sums.error;
      if (below_tolerance(c, c.row_error + c.column_error)) return stop(c);
      if (event == Event::probe_columns_then_cold) {
        c.start_error = c.row_error + c.column_error;
        return begin_cold(c);
      }
      c.arrived = 1;
      c.safe = 1;  // the next pass is over columns, whose softmin was taken before f's update, of unknown size
      if (c.options.relaxation != 0) c.proposal = c.options.relaxation;
      return;
  }
}

}  // namespace wgan_ext::sinkhorn
