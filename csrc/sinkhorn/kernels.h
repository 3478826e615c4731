// Sinkhorn kernels on raw pointers, the same functions for every SIMD level and for CUDA.
#pragma once
#include "solve.h"
//
#include "../simd.h"

namespace wgan_ext::sinkhorn {

// |x - y|^2, |x - y|, sum_d |x_d - y_d|, |x - y|^power, or a matrix in memory.
enum class Cost : int32_t { sqeuclidean, euclidean, manhattan, power, matrix };

// The cost of moving mass from a pass's rows to its columns.
template <typename T>
struct Ground {
  Cost cost;
  T power;          // for Cost::power
  const T* matrix;  // for Cost::matrix: [problems, row count, column count]; squares are added to it
  bool transposed;  // it is [problems, column count, row count]
};

// log2 of weight 0: finite, so that no kernel meets inf - inf, and far below every exponent.
constexpr double kLogZero = -1e30;

// Where the problem's part of an array begins in which each problem is padded to whole units, for a problem whose
// points begin at `first`: whole units that hold all before it, whatever their counts.
WGAN_EXT_FORMULA int64_t first_of_padded(int64_t first, int64_t problem, int64_t unit) {
  return (first / unit + problem) * unit;
}

// A cloud of `count` weighted points and what a solve keeps for it, for each problem of a batch in turn. All pointers
// are of T. In a ragged batch, whose problems have points in unlike numbers, the arrays of points lie one problem after
// the other; the padded ones too, each problem's where `first_padded` says.
template <typename T>
struct Cloud {
  const T* points;       // [count, dim]
  const T* columns;      // [columns_size]: the points as `pack` lays them out
  const T* squares;      // [count] |x|^2 for the squared Euclidean cost, else 0
  const T* weights;      // [count]
  const T* log_weights;  // [count] log2, kLogZero for weight 0
  T* potential;          // [count] f
  T* softmin;            // [count] softmin over the other cloud, neither relaxed nor damped: the exponents' shift
  T* start;              // [count] kept for Control::restore: rows their fresh softmin, columns their potential
  T* bias;               // [padded(count)] log2 w + (f - |x|^2) log2(e) / epsilon
  T* scratch;            // [scratch_size]
  int64_t count, dim;    // count: of a ragged batch the largest, to which the sizes that follow belong
  int64_t columns_size, padded, scratch_size;  // of a ragged batch the first and the last are multiples of `padded`
  const int64_t* offsets;                      // [problems + 1] where each problem of a ragged batch begins, else null
  int64_t unit;                                // of padding, where there are offsets

  // Where the problem's points begin.
  WGAN_EXT_FORMULA int64_t first(int64_t problem) const { return offsets ? offsets[problem] : problem * count; }

  // The same in arrays that are padded for each problem.
  WGAN_EXT_FORMULA int64_t first_padded(int64_t problem) const {
    return offsets ? first_of_padded(offsets[problem], problem, unit) : problem * padded;
  }

  // One problem of the batch.
  WGAN_EXT_FORMULA Cloud of(int64_t problem) const {
    Cloud c = *this;
    const int64_t begin = first(problem), begin_padded = first_padded(problem);
    c.points += begin * dim;
    c.squares += begin;
    c.weights += begin;
    c.log_weights += begin;
    c.potential += begin;
    c.softmin += begin;
    if (c.start) c.start += begin;
    c.bias += begin_padded;
    c.columns += offsets ? begin_padded * (columns_size / padded) : problem * columns_size;
    c.scratch += offsets ? begin_padded * (scratch_size / padded) : problem * scratch_size;
    if (offsets) {
      c.count = offsets[problem + 1] - begin;
      c.padded = ceil_div(c.count, unit) * unit;
      c.columns_size = c.padded * (columns_size / padded);
      c.scratch_size = c.padded * (scratch_size / padded);
      c.offsets = nullptr;
    }
    return c;
  }
};

template <typename T>
struct Kernels {
  int64_t iterations_per_poll;  // how often `finished` is worth asking
  bool together;                // whether all problems of a batch are best driven at once

  // Sizes of the arrays above and of a pass's sums, functions of shape alone.
  int64_t (*columns_size)(int64_t count, int64_t dim);
  int64_t (*padded)(int64_t count);
  int64_t (*scratch_size)(int64_t count, int64_t dim, int64_t other_count, Cost);
  int64_t (*sums_size)(int64_t count, int64_t other_count, int64_t dim, Cost);
  // Whether a matrix of costs in memory is worth its making; null where it never is.
  bool (*caches)(int64_t count, int64_t other_count, int64_t dim, Cost);

  // Each does what it says for `problems` problems: controls and facts [problems], sums [problems, sums_size].
  // `offsets`, null or of a ragged batch, and `count` as in Cloud.
  void (*pack)(const T* points, const int64_t* offsets, int64_t count, int64_t dim, int64_t problems, T* columns,
               Stream);
  // The matrix that stands for the ground cost: for the squared one without the squares. [row count, column count].
  // Null where `caches` is.
  void (*costs)(const Cloud<T>& rows, const Cloud<T>& columns, const Ground<T>&, int64_t problems, T* matrix, Stream);
  // Starts a solve; `rows` and `columns`, if not null, are finished solves of the self terms, whose form of the
  // exponent the first passes repeat, so that equal clouds give equal bits.
  void (*begin)(Control*, const Facts*, const Options&, const Control* rows, const Control* columns, int64_t problems,
                Stream);
  // The bias of the present potential; also fills the padding.
  void (*set_bias)(const Control*, const Cloud<T>&, int64_t problems, Stream);
  // Keeps the probed start for later, then potential 0 and its bias; nothing if the probe was good enough.
  void (*set_cold)(const Control*, const Cloud<T>&, Role, int64_t problems, Stream);
  // New softmin of `rows` from the bias of `columns`; the sums of the old potential.
  void (*pass)(const Control*, const Cloud<T>& rows, const Cloud<T>& columns, const Ground<T>&, Role, int64_t problems,
               Sums*, Stream);
  void (*advance)(Control*, Event, const Sums*, int64_t sums, int64_t problems, Stream);
  // potential += omega (damped softmin - potential), and its bias; then the translation of an unbalanced problem. A
  // cloud against itself is shifted by its potential from then.
  void (*apply)(const Control*, const Cloud<T>&, Role, int64_t problems, Stream);
  // Whether all solves are known to be done; may answer late.
  bool (*finished)(Control*, int64_t problems, Stream);
  // error, mass, iterations, converged, epsilon: [problems, 5]
  void (*report)(const Control*, int64_t problems, double* out, Stream);

  // For plan_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon), epsilon of each problem that of its control:
  // force[i] = sum_j plan_ij dC_ij/dx_i (half of it for the squared cost), [count, dim], and mass[i] = sum_j plan_ij.
  void (*gradient)(const Control*, const Cloud<T>& rows, const Cloud<T>& columns, const Ground<T>&, int64_t problems,
                   T* force, T* mass, Stream);
  // out = plan values, [count, width], for values [other count, width] as `pack` lays them out.
  void (*transport)(const Control*, const Cloud<T>& rows, const Cloud<T>& columns, const Ground<T>&, int64_t problems,
                    const T* values, int64_t width, T* out, Stream);

  static const Kernels& cpu(SimdLevel);
  static const Kernels& cuda();
};

WGAN_EXT_CPU_TABLES(Kernels)

}  // namespace wgan_ext::sinkhorn
