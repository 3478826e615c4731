// What the critic engine computes between matrix products: activations, their packed signs, the masks made of them,
// norms of gradients and the penalty on them.
//
// An activation is a matrix [rows, columns] in memory order. Its signs take one bit each, as bytes
// [rows, ceil_div(columns, 8)]: bit j of byte k of a row says that z in column 8 k + j is not <= 0 (NaN passes). Bits
// beyond the last column are 0.
#pragma once
#include "../formulas.h"
#include "../simd.h"

namespace wgan_ext::critic {

// What to divide a row by before its squares are added up in double, by its largest magnitude.
template <typename T>
WGAN_EXT_FORMULA double norm_scale(double largest) {
  return sizeof(T) == 8 && largest > 0 && largest < HUGE_VAL ? largest : 1;  // the square of a narrower T is a double
}

// A penalty on the norm of a sample's gradient: |norm - target|^power, or where one_sided that of the positive part.
struct Penalty {
  double target;
  bool one_sided;
  double power;

  WGAN_EXT_FORMULA double value(double norm) const { return raise(excess(norm), power); }
  // Its derivative with respect to the gradient is this times the gradient; 0 for a norm whose inverse T cannot hold.
  template <typename T>
  WGAN_EXT_FORMULA double slope(double norm) const {
    if (norm < (sizeof(T) == 8 ? 0x1p-1022 : 0x1p-126)) return 0;
    const double distance = excess(norm);
    if (distance == 0) return 0;
    return (norm < target ? -power : power) * raise(distance, power - 1) / norm;
  }

 private:
  WGAN_EXT_FORMULA double excess(double norm) const {
    const double difference = norm - target;
    return difference < 0 ? (one_sided ? 0 : -difference) : difference;
  }
  WGAN_EXT_FORMULA static double raise(double x, double power) {
    return power == 2 ? x * x : power == 1 ? x : power == 0 ? 1 : ::pow(x, power);
  }
};

template <typename T>
struct Kernels {
  // h = leaky_relu(z + bias, slope) and the signs of z + bias. slope 0 is relu (nothing is multiplied by 0).
  //   z [rows, columns]   h the same, may be z, null if only the signs are wanted   bias [columns] or null
  void (*activate)(const T* z, const T* bias, double slope, T* h, uint8_t* signs, int64_t rows, int64_t columns,
                   Stream stream);
  // out[r, c] = in[r mod in_rows, c] * (1 where the sign is set, else slope); in may be out if in_rows is rows.
  //   in [in_rows, columns]   out [rows, columns]
  void (*mask)(const T* in, int64_t in_rows, const uint8_t* signs, double slope, T* out, int64_t rows, int64_t columns,
               Stream stream);
  // The 2-norm of each row. It overflows only where it cannot be represented.
  //   in [rows, columns]   norms [rows]
  void (*norms)(const T* in, T* norms, int64_t rows, int64_t columns, Stream stream);
  // The mean of the penalty over samples, weight times that (the loss), and its derivative with respect to each
  // sample's gradient, divided by the gradient.
  //   norms [count]   value, loss []   slopes [count] or null
  void (*penalty)(const T* norms, int64_t count, Penalty penalty, double weight, T* value, T* loss, T* slopes,
                  Stream stream);

  // c = a b, or c + a b: a product too small for a library, which takes longer to begin. On a GPU the launch is what
  // takes long, whoever launches: there is none (null), and `small` is 0.
  //   a [m, k], or [k, m] if a_transposed, or null for ones   b [k, n], or [n, k] if b_transposed   c [m, n]
  void (*product)(const T* a, bool a_transposed, const T* b, bool b_transposed, T* c, bool add, int64_t m, int64_t n,
                  int64_t k);
  // Up to how many multiply-adds, m n k, a product is small.
  int64_t small;

  static const Kernels& cpu(SimdLevel level);
  static const Kernels& cuda();
};

WGAN_EXT_CPU_TABLES(Kernels)

}  // namespace wgan_ext::critic
