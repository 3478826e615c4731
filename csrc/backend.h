// Where torch's devices meet the kernel tables: which table serves a tensor, under which device guard and stream.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "formulas.h"
#include "simd.h"
#if defined(WGAN_EXT_CUDA)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace wgan_ext {

// Makes the tensor's device current for the life of the object and names its current stream.
class DeviceScope {
 public:
  explicit DeviceScope(const at::Tensor& t) {
#if defined(WGAN_EXT_CUDA)
    if (t.is_cuda()) {
      guard_.emplace(t.device());
      stream_ = c10::cuda::getCurrentCUDAStream(t.device().index()).stream();
    }
#else
    static_cast<void>(t);
#endif
  }
  Stream stream() const { return stream_; }

 private:
#if defined(WGAN_EXT_CUDA)
  std::optional<c10::cuda::CUDAGuard> guard_;
#endif
  Stream stream_ = nullptr;
};

// The tower's kernels for the tensor's device. Table is a struct of function pointers with the static members
// cpu(SimdLevel) and cuda() (linked only where the extension is built with CUDA), each returning a table.
template <typename Table>
const Table& kernels_for(const char* op, const at::Tensor& t) {
  if (t.is_cpu()) return Table::cpu(simd_level());
#if defined(WGAN_EXT_CUDA)
  if (t.is_cuda()) return Table::cuda();
  TORCH_CHECK_NOT_IMPLEMENTED(false, op, ": no kernel for device ", t.device(), "; move the tensors to cpu or cuda");
#else
  TORCH_CHECK_NOT_IMPLEMENTED(false, op, ": this build of wgan_ext has no kernel for device ", t.device(),
                              (t.is_cuda() ? "; rebuild it where nvcc and a CUDA build of torch are installed" : ""));
#endif
}

}  // namespace wgan_ext
