// Sinkhorn kernels on raw pointers, the same functions for every SIMD level and for CUDA.
#pragma once
#include "solve.h"
//
#include "../simd.h"

namespace wgan_ext::sinkhorn {

enum class Cost : int32_t { sqeuclidean, euclidean };

// log2 of weight 0: finite, so that no kernel meets inf - inf, and far below every exponent.
constexpr double kLogZero = -1e30;

// A cloud of `count` weighted points and what a solve keeps for it. All but `control` pointers are of T.
template <typename T>
struct Cloud {
  const T* points;       // [count, dim]
  const T* columns;      // [columns_size]: the points as `pack` lays them out
  const T* squares;      // [count] |x|^2; 0 for the Euclidean cost
  const T* weights;      // [count]
  const T* log_weights;  // [count] log2, kLogZero for weight 0
  T* potential;          // [count] f
  T* softmin;            // [count] softmin over the other cloud, neither relaxed nor damped: the exponents' shift
  T* start;              // [count] kept for Control::restore: rows their fresh softmin, columns their potential
  T* bias;               // [padded(count)] log2 w + (f - |x|^2) log2(e) / epsilon
  T* scratch;            // [scratch_size]
  int64_t count;
};

template <typename T>
struct Kernels {
  int64_t iterations_per_poll;  // how often `finished` is worth asking

  // Sizes of the arrays above and of a pass's sums, functions of shape alone.
  int64_t (*columns_size)(int64_t count, int64_t dim);
  int64_t (*padded)(int64_t count);
  int64_t (*scratch_size)(int64_t count, int64_t dim, int64_t other_count);
  int64_t (*sums_size)(int64_t count, int64_t other_count, int64_t dim);

  void (*pack)(const T* points, int64_t count, int64_t dim, T* columns, Stream);
  // Starts a solve; `rows` and `columns`, if not null, are finished solves of the self terms, whose form of the
  // exponent the first passes repeat, so that equal clouds give equal bits.
  void (*begin)(Control*, const double* facts, const Options&, const Control* rows, const Control* columns, Stream);
  // The bias of the present potential; also fills the padding.
  void (*set_bias)(const Control*, const Cloud<T>&, Stream);
  // Keeps the probed start for later, then potential 0 and its bias; nothing if the probe was good enough.
  void (*set_cold)(const Control*, const Cloud<T>&, Role, Stream);
  // New softmin of `rows` from the bias of `columns`; the sums of the old potential.
  void (*pass)(const Control*, const Cloud<T>& rows, const Cloud<T>& columns, int64_t dim, Cost, Sums*, Stream);
  void (*advance)(Control*, Event, const Sums*, int64_t count, Stream);
  // potential += omega (softmin - potential), and its bias. A cloud against itself is shifted by its potential from
  // then.
  void (*apply)(const Control*, const Cloud<T>&, Role, Stream);
  // Whether the solve is known to be done; may answer late.
  bool (*finished)(const Control*, Stream);
  // error, mass, iterations, converged, epsilon
  void (*report)(const Control*, double* out, Stream);
  // For plan_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon): force[i] = sum_j plan_ij (x_i - y_j) / s_ij with s = 1
  // (squared cost) or |x_i - y_j|, and mass[i] = sum_j plan_ij.  force [count, dim], mass [count].
  void (*gradient)(const double* epsilon, const Cloud<T>& rows, const Cloud<T>& columns, int64_t dim, Cost, T* force,
                   T* mass, Stream);

  static const Kernels& cpu(SimdLevel);
  static const Kernels& cuda();
};

WGAN_EXT_CPU_TABLES(Kernels)

}  // namespace wgan_ext::sinkhorn
