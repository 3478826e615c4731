// The layers of a critic: what each computes, and the products by which it takes part in the chains of engine.cpp.
//
// A layer makes one value, a batch of samples, of the values it takes. Where u is the gradient of the scores with
// respect to its value, pull(u) is that with respect to what it takes; where v are changes of what it takes, push(v) is
// the change of its value. A layer that is not linear once the signs are known is curved: bend(u, v) is the derivative
// of <u, push(v)> with respect to what it takes. Parameters enter linearly: weigh(a, t) adds the derivative of the
// product <a, value> with t in place of what it takes, shift(a, c) that of the terms without it (biases), each sample
// times its c.
//
// A gradient that is alike for all samples, as above the last activation, is kept as a batch of one ("uniform").
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.h"

namespace wgan_ext::critic {

constexpr char kOp[] = "critic", kLossOp[] = "critic_loss";

using at::IntArrayRef;
using at::Tensor;
using at::TensorList;
using Scalars = at::ArrayRef<double>;
using Shape = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

// at::empty, and on a CPU what that comes to: in a small critic finding the way there takes as long as a product.
inline Tensor fresh(IntArrayRef sizes, const at::TensorOptions& options,
                    at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  if (options.device().is_cpu())
    return Tensor(at::detail::empty_cpu(sizes, c10::typeMetaToScalarType(options.dtype()), false, format));
  return at::empty(sizes, options, format);
}

// The type of what is returned for inputs x.
inline at::ScalarType result_dtype(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Up to how many elements a loop of our own takes less time than finding the way to a library's.
constexpr int64_t kFewElements = 4096;

// t, which is dense, with this value everywhere; fill_ without the dispatcher where it is small.
inline const Tensor& fill(const Tensor& t, double value) {
  if (!t.is_cpu() || t.numel() > kFewElements)
    t.fill_(value);
  else if (t.scalar_type() == at::kFloat)
    std::fill_n(t.mutable_data_ptr<float>(), t.numel(), static_cast<float>(value));
  else if (t.scalar_type() == at::kDouble)
    std::fill_n(t.mutable_data_ptr<double>(), t.numel(), value);
  else
    t.fill_(value);
  return t;
}

// Rows [first, first + count) of a batch of `total`.
struct Rows {
  int64_t first, count, total;

  static Rows all(int64_t total) { return {0, total, total}; }
  bool whole() const { return count == total; }
  // These rows of a tensor that has the same number of rows, one or more, for each sample.
  Tensor of(const Tensor& t) const {
    if (whole() || !t.defined()) return t;
    const int64_t each = t.size(0) / total;
    if (t.is_meta()) return t.narrow(0, first * each, count * each);
    Shape sizes = t.sizes().vec();  // what narrow comes to
    sizes[0] = count * each;
    return at::native::as_strided_tensorimpl(t, sizes, t.strides(), t.storage_offset() + first * each * t.stride(0));
  }
  // The same of a gradient, which may be uniform.
  Tensor of_gradient(const Tensor& u) const { return u.size(0) == total ? of(u) : u; }
};

inline Tensor cast(const Tensor& t, at::ScalarType dtype) { return t.scalar_type() == dtype ? t : t.to(dtype); }

// What all tensors inside the engine agree on, the dtype of the products and the memory format of images, and the
// parameters in that dtype.
struct Frame {
  at::TensorOptions options;
  at::MemoryFormat images;
  Tensors parameters;

  Frame(const Tensor& x, TensorList parameters, at::ScalarType compute_dtype, bool channels_last);

  at::MemoryFormat format(IntArrayRef shape) const { return shape.size() == 4 ? images : at::MemoryFormat::Contiguous; }
  Tensor arrange(const Tensor& t) const { return t.contiguous(format(t.sizes())); }
  Tensor enter(const Tensor& t) const { return arrange(cast(t, c10::typeMetaToScalarType(options.dtype()))); }
  Tensor empty(IntArrayRef shape) const { return fresh(shape, options, format(shape)); }
};

// What a layer kept of the forward pass, at the rows at hand: what it takes, if it keeps_inputs, and its extras.
struct Kept {
  Rows rows;
  Tensors inputs, extras;
};

// Gradients of parameters as they add up; undefined until something is added.
class Gradients {
 public:
  Gradients(size_t parameters, IntArrayRef wanted);
  bool wants(int64_t parameter) const { return parameter >= 0 && wanted_[parameter]; }
  Tensor& operator[](int64_t parameter) { return sums_[parameter]; }
  void add(int64_t parameter, const Tensor& t);

 private:
  Tensors sums_;
  std::vector<bool> wanted_;
};

class Layer {
 public:
  virtual ~Layer() = default;

  Shape inputs;                    // numbers of the values it takes
  std::vector<Shape> input_sizes;  // their sizes, without the batch
  Shape sizes;                     // of its value, without the batch

  // Parameters that multiply what it takes, and those that are added to it; -1 for none.
  virtual int64_t weight() const { return -1; }
  virtual int64_t bias() const { return -1; }
  virtual bool linear() const { return true; }         // without regard to parameters
  virtual bool curved() const { return false; }        // not even piecewise linear
  virtual bool keeps_inputs() const { return false; }  // for pull, push and bend
  virtual size_t extras() const { return 0; }          // how many tensors forward leaves besides
  // Whether pull and weigh are the same for every sample, so that they can take a uniform u.
  virtual bool takes_uniform() const { return linear(); }

  virtual Tensor forward(const Frame& frame, Tensors in, Rows rows, Tensors& extras) const = 0;
  virtual Tensors pull(const Frame& frame, const Kept& kept, Tensor u) const = 0;
  // Of v at least one is defined; what is undefined does not change.
  virtual Tensor push(const Frame& frame, const Kept& kept, Tensors v) const = 0;
  virtual Tensors bend(const Frame& frame, const Kept& kept, const Tensor& u, const Tensors& v) const;
  virtual void weigh(const Frame& frame, const Kept& kept, const Tensor& a, const Tensor& t,
                     Gradients& gradients) const;
  virtual void shift(const Frame& frame, const Kept& kept, const Tensor& a, const Tensor& c,
                     Gradients& gradients) const;
};

// A critic as a program (wgan_ext/tracing.py writes it, docs/how_it_works.md describes it).
struct Program {
  std::vector<std::unique_ptr<Layer>> layers;  // layer i makes value inputs + i
  int64_t inputs = 0;
  bool curved = false;
  std::vector<bool> moving;  // whether the value depends on x
  std::vector<bool> deep;    // whether it depends on parameters
  std::vector<bool> bent;    // whether a layer that is not linear depends on it

  // Reads a program, or finds it among the last ones read: for a small critic reading takes as long as computing.
  static std::shared_ptr<const Program> read(TensorList x, TensorList parameters, IntArrayRef program, Scalars scalars);

  Program(std::vector<Shape> sizes, const std::vector<Shape>& parameters, IntArrayRef program, Scalars scalars);
  int64_t values() const { return inputs + static_cast<int64_t>(layers.size()); }

  // Whether a parameter's gradient is not identically zero, whether it exists at all, and the same of the input.
  bool moves(int64_t parameter, bool scored) const;
  bool reaches(int64_t parameter, bool scored) const;
  bool bends_input() const;
};

int64_t product(IntArrayRef shape);

// The 2-norm of each sample, [batch]; t is dense.
Tensor norms_of_samples(const Tensor& t);

// t, which is contiguous, with each sample times its factor [batch], of t's dtype.
Tensor scaled_samples(const Tensor& t, const Tensor& factors);

// A penalty on the norms of gradients: Kernels::penalty.
struct Penalized {
  Tensor value, loss, slopes;
};
Penalized penalize(const Tensor& norms, const Penalty& penalty, double weight, bool differentiate);

// Whether nobody else holds the tensor's memory, so that it may be overwritten.
inline bool ours(const Tensor& t) { return t.use_count() == 1 && t.storage().use_count() == 1; }

}  // namespace wgan_ext::critic
