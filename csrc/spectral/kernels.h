// Kernels of spectral normalization: W / sigma, where sigma is the largest singular value of a weight seen as a matrix,
// found by power iteration, and the derivative of that quotient.
#pragma once
#include <cstdint>

#include "../formulas.h"
#include "../simd.h"

namespace wgan_ext::spectral {

// A contiguous weight [outer, rows, inner] seen, without moving anything, as the matrix W of `rows` rows and
// outer * inner columns; column (o, i) is entry o * inner + i of v. Convolutions have outer = 1; transposed
// convolutions, whose rows are the second dimension of the weight, have outer > 1.
struct Shape {
  int64_t outer, rows, inner;
};

WGAN_EXT_FORMULA int64_t columns(Shape s) { return s.outer * s.inner; }
WGAN_EXT_FORMULA int64_t elements(Shape s) { return s.outer * s.rows * s.inner; }

// The norm that a weight is given; with shrink_only a weight whose norm is less stays as it is.
struct Target {
  double norm;
  bool shrink_only;
};

WGAN_EXT_FORMULA bool is_active(Target target, double sigma) {
  return !(target.shrink_only && sigma <= target.norm && -sigma <= target.norm);
}

WGAN_EXT_FORMULA double divisor(Target target, double sigma) {
  return is_active(target, sigma) ? sigma / target.norm : 1.0;
}

// One weight to normalize. From u0 [rows] and v0 [columns] `iterations` power iterations are made, each v = N(W^T u),
// u = N(W v) if v_first, else u = N(W v), v = N(W^T u); N(x) is x / |x|, or the vector as it was where |x| is zero or
// not finite. Written are u, v, sigma = u . (W v) (a scalar, eps where it is exactly 0), and unless it is null
// normalized = W / divisor(sigma), in the shape of W.
template <typename T>
struct Job {
  const T* weight;
  Shape shape;
  const T *u0, *v0;
  int64_t iterations;
  bool v_first;
  double eps;
  Target target;
  T *normalized, *u, *v, *sigma;
};

// A weight stored by columns ([outer, rows, 1]), a single one also, is the transposed matrix stored by rows.
WGAN_EXT_FORMULA bool is_transposed(Shape s) { return s.inner == 1 && s.rows > 1; }
WGAN_EXT_FORMULA Shape by_rows(Shape s) {
  if (s.inner != 1) return s;
  return s.rows == 1 ? Shape{1, 1, s.outer} : Shape{1, s.outer, s.rows};
}

template <typename T>
WGAN_EXT_FORMULA Job<T> by_rows(Job<T> job) {
  const bool transpose = is_transposed(job.shape);
  job.shape = by_rows(job.shape);
  if (!transpose) return job;
  return {job.weight, job.shape,  job.v0,         job.u0, job.iterations, !job.v_first,
          job.eps,    job.target, job.normalized, job.v,  job.u,          job.sigma};
}

template <typename T>
struct Kernels {
  // Elements of T that the calls below need as scratch for weights of these shapes, aligned to 64 bytes, contents
  // arbitrary.
  int64_t (*scratch)(const Shape* shapes, int64_t count);

  // Normalizes each of the weights, which are sorted by falling size.
  void (*normalize)(const Job<T>* jobs, int64_t count, T* scratch, Stream);

  // With u and v constant, the gradient by W of normalized and sigma together:
  //   grad / d + (grad_sigma - d' <grad, W> / d^2) u v^T, where d = divisor(sigma) and d' its derivative
  // grad [the shape of weight] or grad_sigma (a scalar) may be null, which means zero.
  void (*backward)(const T* grad, const T* grad_sigma, const T* weight, Shape, const T* u, const T* v, const T* sigma,
                   Target, T* grad_weight, T* scratch, Stream);

  static const Kernels& cpu(SimdLevel level);
  static const Kernels& cuda();
};

WGAN_EXT_CPU_TABLES(Kernels)

}  // namespace wgan_ext::spectral
