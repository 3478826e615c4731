// Argument checks, written once. Every message names the operator, the argument, the demand and what came.
// Wrong values raise ValueError, wrong types TypeError.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>

namespace wgan_ext {

inline void check_floating(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(at::isFloatingType(t.scalar_type()), op, ": ", name, " must be a floating-point tensor, got ",
                   t.scalar_type());
}

inline void check_same_device(const char* op, const char* name, const at::Tensor& t, const char* other_name,
                              const at::Tensor& other) {
  TORCH_CHECK_VALUE(t.device() == other.device(), op, ": ", name, " must be on the device of ", other_name, " (",
                    other.device(), "), got ", t.device());
}

inline void check_same_dtype(const char* op, const char* name, const at::Tensor& t, const char* other_name,
                             const at::Tensor& other) {
  TORCH_CHECK_TYPE(t.scalar_type() == other.scalar_type(), op, ": ", name, " must have the dtype of ", other_name, " (",
                   other.scalar_type(), "), got ", t.scalar_type());
}

inline void check_shape(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.sizes() == shape, op, ": ", name, " must have shape ", shape, ", got ", t.sizes());
}

inline void check_positive(const char* op, const char* name, double value) {
  TORCH_CHECK_VALUE(value > 0 && std::isfinite(value), op, ": ", name, " must be positive and finite, got ", value);
}

}  // namespace wgan_ext
