// Second derivatives of Sinkhorn's costs: Hessians times tangents, in memory that grows with N + M.
//
// The cost is the dual D at its best potentials f, g: its Hessian along a tangent of points, costs and weights is the
// derivative of D's partial derivatives, in which the potentials move with it as D's stationarity wants (implicit
// differentiation). With P the plan, dC the costs' derivative, da and db the weights', the potentials' df and dg solve
//     (S_x + epsilon / rho_x T_x) df + (P / a) dg = sum_j (P_ij / a_i) (dC_ij - epsilon db_j / b_j)
//     (P / b)^T df + (S_y + epsilon / rho_y T_y) dg = sum_i (P_ij / b_j) (dC_ij - epsilon da_i / a_i)
// where S are the marginals over the weights, T = exp(-f / rho), and the second terms vanish where marginals are kept.
// With df eliminated the rest is symmetric and positive in the scalar product that b weighs, and solved by conjugate
// gradients. Where both marginals are kept, a constant may go from g to f: it is projected out. Divided by their
// weights, the equations also hold where a weight is 0.
#include <ATen/TensorOperators.h>
#include <ATen/ops/cdist.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/sign.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <utility>

#include "../checks.h"
#include "ops.h"
#include "solver.h"

namespace wgan_ext::sinkhorn {
namespace {

using Product = std::function<Tensor(const Tensor&)>;  // of vectors [B, count] double

constexpr int64_t kMostSteps = 1000, kPatience = 25;  // steps without a halving: the products' rounding is reached

struct Potentials {
  Tensor f, g;  // [B, N], [B, M] double
};

// The equations above.
struct System {
  Product rows, columns;          // (P / a) times [B, M], (P / b)^T times [B, N]
  Tensor diagonal_x, diagonal_y;  // [B, N], [B, M]
  Tensor right_x, right_y;        // [B, N], [B, M]
  Tensor weights_y;               // [B, M]
  bool balanced;                  // a constant is free
  double tolerance;               // of the residual over the right hand side
};

Potentials solve(const System& s) {
  const auto dot = [&](const Tensor& u, const Tensor& v) { return at::sum(s.weights_y * u * v, {1}, true); };
  const Tensor mass = at::sum(s.weights_y, {1}, true);
  const auto centred = [&](const Tensor& u) { return s.balanced ? u - at::sum(s.weights_y * u, {1}, true) / mass : u; };
  const auto f_of = [&](const Tensor& g) { return (s.right_x - s.rows(g)) / s.diagonal_x; };
  Tensor residual = centred(s.right_y - s.columns(s.right_x / s.diagonal_x));
  Tensor g = at::zeros_like(residual), direction = residual / s.diagonal_y;
  Tensor decrease = dot(residual, direction);  // in the preconditioner's norm
  const Tensor goal = s.tolerance * s.tolerance * decrease;
  Tensor least = decrease.clone(), since = at::zeros_like(decrease);
  const int64_t poll = residual.is_cpu() ? 1 : 8;  // the host waits for other devices
  for (int64_t step = 0; step < kMostSteps; ++step) {
    const Tensor active = decrease > goal;
    if (step % poll == 0 && !active.any().item<bool>()) break;
    const Tensor image = s.diagonal_y * direction - s.columns(s.rows(direction) / s.diagonal_x);
    const Tensor curvature = dot(direction, image);
    // a curvature that is not positive is rounding's: nothing is left to gain
    const Tensor length = at::where(active.logical_and(curvature > 0), decrease / curvature, 0.0);
    g = g + length * direction;
    residual = centred(residual - length * image);
    const Tensor scaled = residual / s.diagonal_y, next = dot(residual, scaled);
    direction = scaled + at::where(active, next / decrease, 0.0) * direction;
    since = at::where(next < 0.5 * least, 0.0, since + 1);
    least = at::minimum(least, next);
    decrease = at::where(active.logical_and(curvature > 0).logical_and(since < kPatience), next, 0.0);
  }
  const Tensor f = f_of(g);
  g = (s.right_y - s.columns(f)) / s.diagonal_y;  // also where the weight is 0, of which the search sees nothing
  return {f, g};
}

double tolerance_of(at::ScalarType type) { return type == at::kDouble ? 1e-12 : 1e-6; }

// [B, count] double, zeros if there is none.
Tensor tangent_of_weights(const OptionalTensor& v, const Tensor& like) {
  return v ? batched(*v, 1).to(at::kDouble) : at::zeros_like(like);
}

// The terms that a penalised marginal adds: T = exp(-f / rho), 1 where it is kept. [B, count] double
Tensor target(const Tensor& potential, double rho) { return at::exp(potential / -rho); }

// The derivative of soft_gradient.
Tensor weight_tangent(const Tensor& df, const Tensor& soft, const Tensor& epsilon, double rho, const Tensor& dw) {
  return df * soft * (1 + epsilon / rho) + epsilon * at::sum(dw, {1}, true);
}

// Points

// The plan of a problem, without the weights of its rows or those of its columns too, as an operator on vectors.
template <typename T>
class Operator {
 public:
  Operator(const Problem& problem, const Tensor& f, const Tensor& g, const Tensor& epsilon, const Request& request,
           bool weighted_columns)
      : problem_(unweighted(problem, weighted_columns)), solver_(problem_, epsilon, request), f_(f), g_(g) {}
  Operator(const Operator&) = delete;

  Tensor operator()(const Tensor& values) {
    const auto type = problem_.x.points.scalar_type();
    return solver_.transport(f_, g_, values.unsqueeze(2).to(type)).squeeze(2).to(at::kDouble);
  }

 private:
  static Problem unweighted(Problem p, bool weighted_columns) {
    const auto forget = [](Measure& m) {
      m.weights = at::ones_like(m.weights);
      m.log_weights = at::zeros_like(m.weights);
    };
    forget(p.x);
    if (!weighted_columns) forget(p.y);
    return p;
  }

  const Problem problem_;
  Solver<T> solver_;
  Tensor f_, g_;
};

Problem transposed(const Problem& p) {
  Problem t = p;
  std::swap(t.x, t.y);
  std::swap(t.terms.rho_x, t.terms.rho_y);
  t.shift = -p.shift;
  return t;
}

// The pairs of points, in double, by blocks of rows. What a block leaves is written to memory that was there before:
// small results allocated between the large temporaries would keep malloc from using theirs again.
// An isotropic cost phi(|x - y|^2) has, with z = x - y,
//     dC/dx = slope z,    slope = 2 phi',
//     d2C/dx2 v = slope v + curve (slope z.v) z,    curve = 2 phi'' / phi'.
// At distance 0, where other costs than the squared one have no derivative, both are 0.
class Pairs {
 public:
  Pairs(const Problem& p, const Tensor& f, const Tensor& g, const Tensor& epsilon, const OptionalTensor& dx,
        const OptionalTensor& dy)
      : cost_(p.terms.cost),
        power_(p.terms.power),
        x_(p.x.points.to(at::kDouble)),
        y_(p.y.points.to(at::kDouble)),
        f_(f.reshape({p.problems(), p.x.segments.count(), 1}).to(at::kDouble)),
        g_(g.reshape({p.problems(), 1, p.y.segments.count()}).to(at::kDouble)),
        epsilon_(epsilon.reshape({-1, 1, 1})),
        dx_(dx ? batched(*dx, 2).to(at::kDouble) : at::zeros_like(x_)),
        dy_(dy ? batched(*dy, 2).to(at::kDouble) : at::zeros_like(y_)) {
    if (cost_ == Cost::sqeuclidean) {  // the potentials belong to clouds that may be centred one by one
      f_ = f_ - at::sum(x_ * x_, {2}, true);
      g_ = g_ - at::sum(y_ * y_, {2}).unsqueeze(1);
      centred_x_ = x_;
      centred_y_ = y_;
      if (p.terms.separate()) x_ = x_ + p.shift.unsqueeze(1);
    }
  }

  struct Block {
    int64_t begin, end;
    Tensor plan;  // [B, n, M] exp((f_i + g_j - C_ij) / epsilon), without weights
    Tensor rate;  // [B, n, M] derivative of the cost along the tangents
    Tensor slope, curve;
  };

  template <typename Body>
  void each(const Body& body) const {
    const int64_t n = x_.size(1), pairs = x_.size(0) * y_.size(1), most = x_.is_cpu() ? 1 << 18 : 1 << 24;
    const int64_t size = std::max<int64_t>(1, most / pairs);
    for (int64_t begin = 0; begin < n; begin += size) body(block(begin, std::min(begin + size, n)));
  }

  // Writes to the rows of hx and adds to hy what pairs of weights `plan` and their derivative `change` [B, n, M] say of
  // dC/dx and dC/dy.
  void add_forces(const Block& b, const Tensor& plan, const Tensor& change, Tensor& hx, Tensor& hy) const {
    const Tensor x = rows(x_, b), dx = rows(dx_, b);
    if (cost_ == Cost::manhattan) {
      for (int64_t d = 0; d < x.size(2); ++d) {
        const Tensor force = change * signs(x, d);
        rows(hx, b).select(2, d).copy_(at::sum(force, {2}));
        hy.select(2, d).sub_(at::sum(force, {1}));
      }
      return;
    }
    const Tensor stiffness = b.slope.defined() ? b.slope * plan : 2 * plan;
    Tensor pull = b.slope.defined() ? b.slope * change : 2 * change;
    if (b.curve.defined()) pull.add_(b.curve * plan * b.rate);
    const auto sums = [](const Tensor& t, int64_t dim) { return at::sum(t, {dim}).unsqueeze(2); };
    rows(hx, b).copy_(sums(pull, 2) * x - at::matmul(pull, y_) + sums(stiffness, 2) * dx - at::matmul(stiffness, dy_));
    hy.add_(sums(pull, 1) * y_ - at::matmul(pull.mT(), x) + sums(stiffness, 1) * dy_ - at::matmul(stiffness.mT(), dx));
  }

  Tensor zeros_x() const { return at::zeros_like(x_); }
  Tensor zeros_y() const { return at::zeros_like(y_); }

 private:
  static Tensor rows(const Tensor& t, const Block& b) { return t.slice(1, b.begin, b.end); }

  Tensor signs(const Tensor& x, int64_t d) const {
    return at::sign(x.select(2, d).unsqueeze(2) - y_.select(2, d).unsqueeze(1));
  }

  Block block(int64_t begin, int64_t end) const {
    Block b{begin, end, {}, {}, {}, {}};
    const Tensor x = rows(x_, b), dx = rows(dx_, b);
    Tensor costs;
    if (cost_ == Cost::manhattan) {
      costs = at::cdist(x, y_, 1.0);
      b.rate = at::zeros_like(costs);
      for (int64_t d = 0; d < x.size(2); ++d)
        b.rate.add_(signs(x, d) * (dx.select(2, d).unsqueeze(2) - dy_.select(2, d).unsqueeze(1)));
    } else {
      b.rate = at::sum(x * dx, {2}, true) + at::sum(y_ * dy_, {2}).unsqueeze(1) - at::matmul(x, dy_.mT()) -
               at::matmul(dx, y_.mT());
      if (cost_ == Cost::sqeuclidean) {
        costs = -2 * at::matmul(rows(centred_x_, b), centred_y_.mT());
        b.rate.mul_(2);
      } else {
        const double power = cost_ == Cost::euclidean ? 1 : power_;
        const Tensor distance = at::cdist(x, y_, 2.0, /*compute_mode=*/2);  // exact at 0
        const Tensor apart = distance > 0;
        costs = at::where(apart, at::pow(distance, power), 0.0);
        b.slope = at::where(apart, power * at::pow(distance, power - 2), 0.0);
        b.curve = at::where(apart, (power - 2) / (distance * distance), 0.0);
        b.rate.mul_(b.slope);
      }
    }
    b.plan = at::exp((rows(f_, b) + g_ - costs) / epsilon_);
    return b;
  }

  Cost cost_;
  double power_;
  Tensor x_, y_;  // [B, count, D], whose differences are those of the given points
  Tensor f_, g_;  // [B, N, 1], [B, 1, M]; for the squared cost less the squares
  Tensor epsilon_;
  Tensor dx_, dy_;
  Tensor centred_x_, centred_y_;
};

template <typename T>
Four hessian(const Problem& p, const OptionalTensor& dx, const OptionalTensor& dy, const OptionalTensor& da,
             const OptionalTensor& db, const Tensor& f, const Tensor& g, const Tensor& epsilon) {
  const Request request = parse(p.terms, {}, {}, 0, 1, {}, 0);
  const Problem back = transposed(p);
  const double rho_x = p.terms.rho_x, rho_y = p.terms.rho_y;
  const Tensor a = p.x.weights.to(at::kDouble), b = p.y.weights.to(at::kDouble), scale = epsilon.unsqueeze(1);
  const Tensor va = tangent_of_weights(da, a), vb = tangent_of_weights(db, b);
  const Tensor soft_x = target(batched(f, 1).to(at::kDouble), rho_x),
               soft_y = target(batched(g, 1).to(at::kDouble), rho_y);
  const Pairs pairs(p, f, g, epsilon, dx, dy);

  Operator<T> rows(p, f, g, epsilon, request, true), columns(back, g, f, epsilon, request, true);
  System s{std::ref(rows), std::ref(columns), {}, {}, {}, {}, b, p.terms.balanced(), tolerance_of(kernel_type(f))};
  s.diagonal_x = rows(at::ones_like(b)) + scale / rho_x * soft_x;
  s.diagonal_y = columns(at::ones_like(a)) + scale / rho_y * soft_y;
  s.right_x = at::zeros_like(a);
  s.right_y = at::zeros_like(b);
  if (db) s.right_x = -scale * Operator<T>(p, f, g, epsilon, request, false)(vb);
  if (da) s.right_y = -scale * Operator<T>(back, g, f, epsilon, request, false)(va);
  if (dx || dy) {
    Tensor of_rows = at::zeros_like(a), of_columns = at::zeros_like(b);
    pairs.each([&](const Pairs::Block& block) {
      const Tensor change = block.plan * block.rate;
      of_rows.slice(1, block.begin, block.end).copy_(at::matmul(change, b.unsqueeze(2)).squeeze(2));
      of_columns.add_(at::matmul(change.mT(), a.slice(1, block.begin, block.end).unsqueeze(2)).squeeze(2));
    });
    s.right_x = s.right_x + of_rows;
    s.right_y = s.right_y + of_columns;
  }
  const Potentials move = solve(s);

  Tensor hx = pairs.zeros_x(), hy = pairs.zeros_y();
  pairs.each([&](const Pairs::Block& block) {
    const auto part = [&](const Tensor& t) { return t.slice(1, block.begin, block.end).unsqueeze(2); };
    const Tensor weights = part(a) * b.unsqueeze(1);
    Tensor change = (part(move.f) + move.g.unsqueeze(1) - block.rate).div_(scale.unsqueeze(2)).mul_(weights);
    if (da) change.add_(part(va) * b.unsqueeze(1));
    if (db) change.add_(part(a) * vb.unsqueeze(1));
    pairs.add_forces(block, block.plan * weights, change.mul_(block.plan), hx, hy);
  });
  return {hx, hy, weight_tangent(move.f, soft_x, scale, rho_x, vb), weight_tangent(move.g, soft_y, scale, rho_y, va)};
}

void check_tangent(const char* op, const char* name, const OptionalTensor& tangent, at::IntArrayRef shape,
                   const Tensor& x) {
  if (!tangent) return;
  check_floating(op, name, *tangent);
  check_shape(op, name, *tangent, shape);
  check_same_device(op, name, *tangent, "the potentials", x);
}

}  // namespace

Four sinkhorn_hessian(const OptionalTensor& dx, const OptionalTensor& dy, const OptionalTensor& da,
                      const OptionalTensor& db, const Tensor& x, const Tensor& y, const OptionalTensor& a,
                      const OptionalTensor& b, const Tensor& f, const Tensor& g, const Tensor& epsilon,
                      std::string_view cost, double power, OptionalNumber rho_x, OptionalNumber rho_y) {
  constexpr const char* op = "sinkhorn_hessian";
  const Problem p = prepare(parse_terms(op, cost, power, rho_x, rho_y), x, y, a, b, {}, {});
  check_tangent(op, "dx", dx, x.sizes(), f);
  check_tangent(op, "dy", dy, y.sizes(), f);
  check_tangent(op, "da", da, shape_of_weights(x), f);
  check_tangent(op, "db", db, shape_of_weights(y), f);
  const Tensor temperature = epsilon.to(at::kDouble).expand({p.problems()}).contiguous();
  const auto [hx, hy, ha, hb] = with_type(
      kernel_type(x), [&](auto scalar) { return hessian<decltype(scalar)>(p, dx, dy, da, db, f, g, temperature); });
  const auto form = [&](const Tensor& t, at::ScalarType type) { return given_form(t, x.dim() == 3).to(type); };
  return {form(hx, x.scalar_type()), form(hy, y.scalar_type()), form(ha, f.scalar_type()), form(hb, g.scalar_type())};
}

Three sinkhorn_matrix_hessian(const OptionalTensor& dc, const OptionalTensor& da, const OptionalTensor& db,
                              const Tensor& costs, const OptionalTensor& a, const OptionalTensor& b, const Tensor& f,
                              const Tensor& g, const Tensor& epsilon, OptionalNumber given_rho_x,
                              OptionalNumber given_rho_y) {
  constexpr const char* op = "sinkhorn_matrix_hessian";
  const Problem p = prepare_matrix(parse_terms(op, "matrix", 0, given_rho_x, given_rho_y), costs, a, b);
  check_tangent(op, "dC", dc, costs.sizes(), f);
  check_tangent(op, "da", da, f.sizes(), f);
  check_tangent(op, "db", db, g.sizes(), f);
  const auto type = kernel_type(costs);
  const double rho_x = p.terms.rho_x, rho_y = p.terms.rho_y;
  const Tensor temperature = epsilon.to(at::kDouble).expand({p.problems()}), scale = temperature.unsqueeze(1);
  const Tensor fb = batched(f, 1), gb = batched(g, 1);
  const Tensor wa = p.x.weights.to(at::kDouble), wb = p.y.weights.to(at::kDouble);
  const Tensor va = tangent_of_weights(da, wa), vb = tangent_of_weights(db, wb);
  const Tensor soft_x = target(fb.to(at::kDouble), rho_x), soft_y = target(gb.to(at::kDouble), rho_y);
  const Tensor divisor = scale.unsqueeze(2).to(type);
  const Tensor plan = (fb.unsqueeze(2) + gb.unsqueeze(1) - p.matrix).div_(divisor).exp_();  // without weights
  const auto times = [&](const Tensor& matrix, const Tensor& vector) {
    return at::matmul(matrix, vector.to(type).unsqueeze(2)).squeeze(2).to(at::kDouble);
  };
  System s{[&](const Tensor& v) { return times(plan, wb * v); },
           [&](const Tensor& v) { return times(plan.mT(), wa * v); },
           {},
           {},
           {},
           {},
           wb,
           p.terms.balanced(),
           tolerance_of(type)};
  s.diagonal_x = times(plan, wb) + scale / rho_x * soft_x;
  s.diagonal_y = times(plan.mT(), wa) + scale / rho_y * soft_y;
  s.right_x = -scale * times(plan, vb);
  s.right_y = -scale * times(plan.mT(), va);
  const Tensor rate = dc ? batched(*dc, 2).to(type) : at::zeros({}, plan.options());
  if (dc) {
    const Tensor change = plan * rate;
    s.right_x = s.right_x + times(change, wb);
    s.right_y = s.right_y + times(change.mT(), wa);
  }
  const Potentials move = solve(s);
  const auto row = [&](const Tensor& t) { return t.to(type).unsqueeze(2); };
  const auto column = [&](const Tensor& t) { return t.to(type).unsqueeze(1); };
  Tensor change = (row(move.f) + column(move.g) - rate).div_(divisor).mul_(row(wa)).mul_(column(wb));
  if (da) change.add_(row(va) * column(wb));
  if (db) change.add_(row(wa) * column(vb));
  change.mul_(plan);
  const auto form = [&](const Tensor& t, at::ScalarType to) { return given_form(t, costs.dim() == 3).to(to); };
  return {form(change, costs.scalar_type()), form(weight_tangent(move.f, soft_x, scale, rho_x, vb), f.scalar_type()),
          form(weight_tangent(move.g, soft_y, scale, rho_y, va), g.scalar_type())};
}

namespace {

void implement(torch::Library& m) {
  m.impl("sinkhorn_hessian", sinkhorn_hessian);
  m.impl("sinkhorn_matrix_hessian", sinkhorn_matrix_hessian);
}

}  // namespace

TORCH_LIBRARY_IMPL(wgan_ext, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(wgan_ext, CUDA, m) { implement(m); }

}  // namespace wgan_ext::sinkhorn
