// What the critic engine computes between matrix products: activations, their packed signs, the masks made of them, and
// norms.
//
// An activation is a matrix [rows, columns] in memory order. Its signs take one bit each, as bytes
// [rows, ceil_div(columns, 8)]: bit j of byte k of a row says z > 0 in column 8 k + j. Bits beyond the last column are
// 0.
#pragma once
#include "../formulas.h"
#include "../simd.h"

namespace wgan_ext::critic {

// What to divide a row by before its squares are added up in double, by its largest magnitude.
template <typename T>
WGAN_EXT_FORMULA double norm_scale(double largest) {
  return sizeof(T) == 8 && largest > 0 && largest < HUGE_VAL ? largest : 1;  // the square of a narrower T is a double
}

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

  static const Kernels& cpu(SimdLevel level);
  static const Kernels& cuda();
};

WGAN_EXT_CPU_TABLES(Kernels)

}  // namespace wgan_ext::critic
