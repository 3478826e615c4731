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

template <typename T>
struct Kernels {
  // Elements of T that `normalize` and `backward` need as scratch, aligned to 64 bytes, contents arbitrary.
  int64_t (*scratch)(Shape);

  // From u0 [rows] and v0 [columns] makes `iterations` power iterations, each v = N(W^T u), u = N(W v) if v_first, else
  // u = N(W v), v = N(W^T u); writes u, v, sigma = u . (W v) (a scalar) and normalized = W / sigma (the shape of
  // weight). N(x) is x / |x|, or the vector as it was where |x| is zero or not finite. A sigma of exactly 0 is replaced
  // by eps.
  void (*normalize)(const T* weight, Shape, const T* u0, const T* v0, int64_t iterations, bool v_first, double eps,
                    T* normalized, T* u, T* v, T* sigma, T* scratch, Stream);

  // With u and v constant, the gradient by W of normalized and sigma together:
  //   grad / sigma + (grad_sigma - <grad, W> / sigma^2) u v^T
  // grad [the shape of weight] or grad_sigma (a scalar) may be null, which means zero.
  void (*backward)(const T* grad, const T* grad_sigma, const T* weight, Shape, const T* u, const T* v, const T* sigma,
                   T* grad_weight, T* scratch, Stream);

  static const Kernels& cpu(SimdLevel level);
  static const Kernels& cuda();
};

WGAN_EXT_CPU_TABLES(Kernels)

}  // namespace wgan_ext::spectral
