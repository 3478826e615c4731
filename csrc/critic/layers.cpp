// Every kind of layer, one class each, and the reading of programs.
#define AT_PER_OPERATOR_HEADERS  // before ATen/TensorOperators.h, which else includes every operator
#include "layers.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_adaptive_avg_pool2d.h>
#include <ATen/ops/_adaptive_avg_pool2d_backward.h>
#include <ATen/ops/_adaptive_avg_pool3d.h>
#include <ATen/ops/_adaptive_avg_pool3d_backward.h>
#include <ATen/ops/_pad_circular.h>
#include <ATen/ops/_prelu_kernel.h>
#include <ATen/ops/_prelu_kernel_backward.h>
#include <ATen/ops/add.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/avg_pool2d_backward.h>
#include <ATen/ops/avg_pool3d.h>
#include <ATen/ops/avg_pool3d_backward.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/erf.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/max.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <ATen/ops/max_pool2d_with_indices_backward.h>
#include <ATen/ops/max_pool3d_with_indices.h>
#include <ATen/ops/max_pool3d_with_indices_backward.h>
#include <ATen/ops/mish.h>
#include <ATen/ops/mish_backward.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <ATen/ops/reflection_pad1d.h>
#include <ATen/ops/reflection_pad1d_backward.h>
#include <ATen/ops/reflection_pad2d.h>
#include <ATen/ops/reflection_pad2d_backward.h>
#include <ATen/ops/reflection_pad3d.h>
#include <ATen/ops/reflection_pad3d_backward.h>
#include <ATen/ops/replication_pad1d.h>
#include <ATen/ops/replication_pad1d_backward.h>
#include <ATen/ops/replication_pad2d.h>
#include <ATen/ops/replication_pad2d_backward.h>
#include <ATen/ops/replication_pad3d.h>
#include <ATen/ops/replication_pad3d_backward.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/softplus_backward.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/upsample_bicubic2d.h>
#include <ATen/ops/upsample_bicubic2d_backward.h>
#include <ATen/ops/upsample_bilinear2d.h>
#include <ATen/ops/upsample_bilinear2d_backward.h>
#include <ATen/ops/upsample_linear1d.h>
#include <ATen/ops/upsample_linear1d_backward.h>
#include <ATen/ops/upsample_nearest1d.h>
#include <ATen/ops/upsample_nearest1d_backward.h>
#include <ATen/ops/upsample_nearest2d.h>
#include <ATen/ops/upsample_nearest2d_backward.h>
#include <ATen/ops/upsample_nearest3d.h>
#include <ATen/ops/upsample_nearest3d_backward.h>
#include <ATen/ops/upsample_trilinear3d.h>
#include <ATen/ops/upsample_trilinear3d_backward.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "../backend.h"
#include "../checks.h"
#include "../half.h"
#include "kernels.h"

namespace wgan_ext::critic {

int64_t product(IntArrayRef shape) {
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  return n;
}

Frame::Frame(const Tensor& x, TensorList given, at::ScalarType compute_dtype, bool channels_last)
    : options(x.options().dtype(compute_dtype)),
      images(channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous) {
  for (const Tensor& parameter : given) parameters.push_back(arrange(cast(parameter, compute_dtype)));
}

Gradients::Gradients(size_t parameters, IntArrayRef wanted) : sums_(parameters), wanted_(parameters) {
  for (const int64_t i : wanted) {
    TORCH_CHECK_VALUE(i >= 0 && i < static_cast<int64_t>(parameters), kOp, ": wanted must number parameters from 0 to ",
                      parameters, ", got ", i);
    wanted_[i] = true;
  }
}

void Gradients::add(int64_t parameter, const Tensor& t) {
  Tensor& sum = sums_[parameter];
  if (!sum.defined())
    sum = t;
  else
    sum = ours(sum) ? sum.add_(t) : sum + t;
}

Tensors Layer::bend(const Frame&, const Kept&, const Tensor&, const Tensors&) const { return Tensors(inputs.size()); }
void Layer::weigh(const Frame&, const Kept&, const Tensor&, const Tensor&, Gradients&) const {}
void Layer::shift(const Frame&, const Kept&, const Tensor&, const Tensor&, Gradients&) const {}

namespace {

Tensor matrix(const Tensor& t) { return t.dim() == 2 ? t : t.reshape({-1, t.size(-1)}); }

Shape batched(int64_t batch, const Shape& sizes) {
  Shape shape = {batch};
  shape.insert(shape.end(), sizes.begin(), sizes.end());
  return shape;
}

// t summed to a shape that broadcasts to that of t.
Tensor sum_to(Tensor t, IntArrayRef shape) {
  const auto extra = t.dim() - static_cast<int64_t>(shape.size());
  Shape dims;
  for (const auto i : c10::irange(t.dim()))
    if (i < extra || (shape[i - extra] == 1 && t.size(i) != 1)) dims.push_back(i);
  if (!dims.empty()) t = t.sum(dims, true);
  return t.sizes() == shape ? t : t.reshape(shape);
}

// Calls the kernels of t's device and dtype; there is nothing to call for an empty tensor or one without memory.
template <typename Call>
void with_kernels(const Tensor& t, const Call& call) {
  if (t.is_meta() || t.numel() == 0) return;
  const DeviceScope scope(t);
  if (t.scalar_type() == at::kDouble) return call(kernels_for<Kernels<double>>(kOp, t), scope.stream());
  if (t.scalar_type() == at::kFloat) return call(kernels_for<Kernels<float>>(kOp, t), scope.stream());
#if defined(WGAN_EXT_CUDA)
  if (t.is_cuda() && t.scalar_type() == at::kHalf) return call(Kernels<Half>::cuda(), scope.stream());
  if (t.is_cuda() && t.scalar_type() == at::kBFloat16) return call(Kernels<BFloat16>::cuda(), scope.stream());
#endif
  TORCH_CHECK_TYPE(false, kOp, ": compute_dtype must be one that ", t.device(), " has kernels for, got ",
                   t.scalar_type());
}

template <typename T>
const T* input(const Tensor& t, const Kernels<T>&) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) : nullptr;
}

template <typename T>
T* output(const Tensor& t, const Kernels<T>&) {
  return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

// The packed signs of z + bias, [rows, ceil(columns / 8)]; h, if defined, becomes the activation and may be z.
Tensor activate(const Tensor& z, const Tensor& bias, double slope, const Tensor& h) {
  const int64_t columns = product(bias.defined() ? bias.sizes() : z.sizes().slice(1));
  const int64_t rows = columns ? product(z.sizes()) / columns : z.size(0);
  Tensor signs = fresh({rows, ceil_div(columns, 8)}, z.options().dtype(at::kByte));
  with_kernels(z, [&](const auto& kernels, Stream stream) {
    kernels.activate(input(z, kernels), input(bias, kernels), slope, output(h, kernels),
                     signs.mutable_data_ptr<uint8_t>(), rows, columns, stream);
  });
  return signs;
}

// t times the mask: 1 where the sign is set, else slope. In place if t is ours; a uniform t becomes a whole batch.
Tensor mask(const Frame& frame, Tensor t, const Tensor& signs, double slope, int64_t batch) {
  if (!t.is_contiguous(frame.format(t.sizes()))) t = frame.arrange(t);
  const Tensor out = t.size(0) == batch && ours(t) ? t : frame.empty(batched(batch, t.sizes().slice(1).vec()));
  if (product(out.sizes()) == 0) return out;
  const int64_t rows = signs.size(0), columns = product(out.sizes()) / rows, in_rows = product(t.sizes()) / columns;
  with_kernels(out, [&](const auto& kernels, Stream stream) {
    kernels.mask(input(t, kernels), in_rows, signs.const_data_ptr<uint8_t>(), slope, output(out, kernels), rows,
                 columns, stream);
  });
  return out;
}

// The matrix that t, of contiguous rows, is.
struct Matrix {
  const Tensor& t;
  bool transposed;

  int64_t columns() const { return t.size(-1); }
  int64_t rows() const { return product(t.sizes().slice(0, t.dim() - 1)); }
  Tensor view() const { return transposed ? matrix(t).t() : matrix(t); }
};

// a b [m, n] if that is a small product, which is then added to `sum` if there is one; whether it was. With m = 1, a
// may be undefined, for ones.
bool small_product(const Tensor& a, bool a_transposed, const Tensor& b, bool b_transposed, Tensor& sum, int64_t m,
                   int64_t n, int64_t k) {
  if (b.scalar_type() != at::kFloat && b.scalar_type() != at::kDouble) return false;  // half is the library's
  if ((a.defined() && !a.is_contiguous()) || !b.is_contiguous()) return false;
  bool done = false;
  with_kernels(b, [&](const auto& kernels, Stream) {
    if (m * n * k > kernels.small) return;
    const bool add = sum.defined();
    if (!add) sum = fresh({m, n}, b.options());
    kernels.product(input(a, kernels), a_transposed, input(b, kernels), b_transposed, output(sum, kernels), add, m, n,
                    k);
    done = true;
  });
  return done;
}

// a b [m, n], or that added to `sum`. The choice between the kernel for small products and the library is made here.
Tensor matrix_product(const Matrix& a, const Matrix& b, Tensor sum = {}) {
  const int64_t m = a.transposed ? a.columns() : a.rows(), k = a.transposed ? a.rows() : a.columns();
  const int64_t n = b.transposed ? b.rows() : b.columns(), others_k = b.transposed ? b.columns() : b.rows();
  if (k == others_k && small_product(a.t, a.transposed, b.t, b.transposed, sum, m, n, k)) return sum;
  return sum.defined() ? sum.addmm_(a.view(), b.view()) : at::mm(a.view(), b.view());
}

// t, or t summed over its samples to suit a uniform gradient.
Tensor like_gradient(const Tensor& u, const Tensor& t) {
  if (u.size(0) != 1 || t.size(0) == 1) return t;
  if (Tensor sum; t.dim() == 2 && small_product({}, false, t, false, sum, 1, t.size(1), t.size(0))) return sum;
  return t.sum(0, true);
}

// The sum over samples of a, each times its c (undefined: 1), for `count` samples; without the batch, a's dims in the
// order of memory.
Tensor weighted_sum(const Tensor& a, const Tensor& c, int64_t count) {
  if (a.size(0) == 1 && count != 1) return c.defined() ? a[0] * c.sum() : a[0] * count;
  const int64_t samples = a.size(0), n = product(a.sizes().slice(1));
  if (Tensor sums; a.dim() == 2 && small_product(c, false, a, false, sums, 1, n, samples)) return sums.view({n});
  if (!c.defined()) return a.sum(0);
  return at::mv(a.reshape({samples, -1}).t(), c).view(a.sizes().slice(1));
}

// t [n, m] as a batch of samples.
Tensor shaped(const Tensor& t, const Shape& shape) { return shape.size() == 2 ? t : t.view(shape); }

// Reads the integers of one record, or the scalars that it names.
class Reader {
 public:
  Reader(IntArrayRef payload, Scalars scalars, size_t parameters)
      : payload_(payload), scalars_(scalars), parameters_(static_cast<int64_t>(parameters)) {}

  int64_t take() {
    TORCH_CHECK_VALUE(at_ < payload_.size(), kOp, ": program has a record that is too short: ", payload_);
    return payload_[at_++];
  }
  Shape take(size_t n) {
    Shape values;
    for (size_t i = 0; i < n; ++i) values.push_back(take());
    return values;
  }
  Shape rest() { return take(payload_.size() - at_); }
  size_t left() const { return payload_.size() - at_; }
  int64_t parameter(bool optional = false) {
    const int64_t i = take();
    TORCH_CHECK_VALUE((i >= 0 || (optional && i == -1)) && i < parameters_, kOp, ": program names parameter ", i,
                      " of ", parameters_);
    return i;
  }
  std::vector<double> scalars(size_t n) {
    const int64_t first = take(), size = static_cast<int64_t>(scalars_.size());
    TORCH_CHECK_VALUE(first >= 0 && first <= size - static_cast<int64_t>(n), kOp, ": program names ", n,
                      " scalars from ", first, " of ", size);
    return scalars_.slice(first, n).vec();
  }

 private:
  IntArrayRef payload_;
  Scalars scalars_;
  int64_t parameters_;
  size_t at_ = 0;
};

// A layer with one input whose change is computed as its value is, but for constants.
struct Unary : Layer {
  const Shape& in() const { return input_sizes[0]; }
  Shape in(int64_t batch) const { return batched(batch, in()); }
  Shape out(int64_t batch) const { return batched(batch, sizes); }

  Tensor forward(const Frame& frame, Tensors in, Rows, Tensors&) const override { return apply(frame, in[0]); }
  Tensor push(const Frame& frame, const Kept&, Tensors v) const override { return apply(frame, v[0]); }
  Tensors pull(const Frame& frame, const Kept&, Tensor u) const override { return {adjoint(frame, std::move(u))}; }

 protected:
  virtual Tensor apply(const Frame&, const Tensor& h) const { return h; }
  virtual Tensor adjoint(const Frame&, Tensor u) const { return u; }
};

struct Linear : Unary {
  int64_t W, b;
  bool adds_bias = true;  // else the activation that follows does

  explicit Linear(Reader& r) : W(r.parameter()), b(r.parameter(true)) {}
  int64_t weight() const override { return W; }
  int64_t bias() const override { return b; }

  Tensor forward(const Frame& frame, Tensors in, Rows, Tensors&) const override {
    Tensor z = apply(frame, in[0]);
    return b >= 0 && adds_bias ? z.add_(frame.parameters[b]) : z;
  }
  Tensor apply(const Frame& frame, const Tensor& h) const override {
    return frame.arrange(shaped(matrix_product({h, false}, {frame.parameters[W], true}), out(h.size(0))));
  }
  Tensor adjoint(const Frame& frame, Tensor u) const override {
    return frame.arrange(shaped(matrix_product({u, false}, {frame.parameters[W], false}), in(u.size(0))));
  }
  void weigh(const Frame&, const Kept&, const Tensor& a, const Tensor& t, Gradients& gradients) const override {
    Tensor& sum = gradients[W];
    sum = matrix_product({a, true}, {like_gradient(a, t), false}, std::move(sum));
  }
  void shift(const Frame&, const Kept& kept, const Tensor& a, const Tensor& c, Gradients& gradients) const override {
    const Tensor sum = weighted_sum(a, c, kept.rows.count);
    gradients.add(b, sum.dim() == 1 ? sum : matrix(sum).sum(0));
  }
};

struct Convolution : Unary {
  int64_t W, b;
  bool transposed;
  int64_t groups;
  Shape stride, padding, dilation, output_padding;

  explicit Convolution(Reader& r)
      : W(r.parameter()), b(r.parameter(true)), transposed(r.take() != 0), groups(r.take()) {
    const size_t nd = r.left() / 4;
    stride = r.take(nd);
    padding = r.take(nd);
    dilation = r.take(nd);
    output_padding = r.take(nd);
  }
  int64_t weight() const override { return W; }
  int64_t bias() const override { return b; }

  Tensor convolve(const Frame& frame, const Tensor& h, const std::optional<Tensor>& bias) const {
    return frame.arrange(
        at::convolution(h, frame.parameters[W], bias, stride, padding, dilation, transposed, output_padding, groups));
  }
  std::tuple<Tensor, Tensor, Tensor> derivative(const Frame& frame, const Tensor& u, const Tensor& h,
                                                std::array<bool, 3> which) const {
    return at::convolution_backward(u, h, frame.parameters[W], at::OptionalIntArrayRef(), stride, padding, dilation,
                                    transposed, output_padding, groups, which);
  }
  Tensor forward(const Frame& frame, Tensors in, Rows, Tensors&) const override {
    return convolve(frame, in[0], b >= 0 ? std::optional<Tensor>(frame.parameters[b]) : std::nullopt);
  }
  Tensor apply(const Frame& frame, const Tensor& h) const override { return convolve(frame, h, std::nullopt); }
  Tensor adjoint(const Frame& frame, Tensor u) const override {
    return frame.arrange(std::get<0>(derivative(frame, u, frame.empty(in(u.size(0))), {true, false, false})));
  }
  void weigh(const Frame& frame, const Kept&, const Tensor& a, const Tensor& t, Gradients& gradients) const override {
    gradients.add(W, std::get<1>(derivative(frame, a, frame.arrange(like_gradient(a, t)), {false, true, false})));
  }
  void shift(const Frame&, const Kept& kept, const Tensor& a, const Tensor& c, Gradients& gradients) const override {
    // [samples, places, channels] in memory if channels come last
    const Tensor sum = weighted_sum(a.movedim(1, -1), c, kept.rows.count);
    gradients.add(b, matrix(sum).sum(0));
  }
};

struct Reshape : Unary {
  Tensor apply(const Frame& frame, const Tensor& h) const override { return frame.arrange(h.reshape(out(h.size(0)))); }
  Tensor adjoint(const Frame& frame, Tensor u) const override { return frame.arrange(u.reshape(in(u.size(0)))); }
};

struct Permute : Unary {
  Shape dims, inverse;

  explicit Permute(Reader& r) : dims(r.rest()), inverse(dims.size(), -1) {
    for (const auto i : c10::irange(dims.size())) {
      TORCH_CHECK_VALUE(dims[i] >= 0 && dims[i] < static_cast<int64_t>(dims.size()) && inverse[dims[i]] < 0, kOp,
                        ": a permutation must name each dimension once, got ", dims);
      inverse[dims[i]] = static_cast<int64_t>(i);
    }
    TORCH_CHECK_VALUE(!dims.empty() && dims[0] == 0, kOp, ": a permutation must keep dimension 0, the batch, got ",
                      dims);
  }
  Tensor apply(const Frame& frame, const Tensor& h) const override { return frame.arrange(h.permute(dims)); }
  Tensor adjoint(const Frame& frame, Tensor u) const override { return frame.arrange(u.permute(inverse)); }
};

// leaky relu, and relu with slope 0
struct LeakyRelu : Unary {
  double slope;
  int64_t bias_in = -1;  // of the linear layer before, which leaves it to the kernel

  explicit LeakyRelu(Reader& r) : slope(r.scalars(1)[0]) {}
  bool linear() const override { return false; }
  size_t extras() const override { return 1; }
  bool takes_uniform() const override { return true; }

  Tensor forward(const Frame& frame, Tensors in, Rows, Tensors& extras) const override {
    const Tensor z = in[0].is_contiguous(frame.format(in[0].sizes())) ? std::move(in[0]) : frame.arrange(in[0]);
    const Tensor h = ours(z) ? z : frame.empty(z.sizes());
    extras.push_back(activate(z, bias_in >= 0 ? frame.parameters[bias_in].contiguous() : Tensor(), slope, h));
    return h;
  }
  Tensors pull(const Frame& frame, const Kept& kept, Tensor u) const override {
    return {mask(frame, std::move(u), kept.extras[0], slope, kept.rows.count)};
  }
  Tensor push(const Frame& frame, const Kept& kept, Tensors v) const override {
    return mask(frame, std::move(v[0]), kept.extras[0], slope, kept.rows.count);
  }
};

struct Hardtanh : Unary {
  double low, high;

  explicit Hardtanh(Reader& r) {
    const auto scalars = r.scalars(2);
    low = scalars[0];
    high = scalars[1];
  }
  bool linear() const override { return false; }
  size_t extras() const override { return 1; }
  bool takes_uniform() const override { return true; }

  Tensor forward(const Frame& frame, Tensors in, Rows, Tensors& extras) const override {
    const Tensor z = frame.arrange(in[0]);
    extras.push_back(activate(frame.arrange(at::logical_and(z > low, z < high).to(z.scalar_type())), {}, 0, {}));
    return at::clamp(z, low, high);
  }
  Tensors pull(const Frame& frame, const Kept& kept, Tensor u) const override {
    return {mask(frame, std::move(u), kept.extras[0], 0, kept.rows.count)};
  }
  Tensor push(const Frame& frame, const Kept& kept, Tensors v) const override {
    return mask(frame, std::move(v[0]), kept.extras[0], 0, kept.rows.count);
  }
};

// A pointwise function with the derivative torch gives it: slope(z, t) is t times that at z.
struct Pointwise : Unary {
  bool linear() const override { return false; }
  bool curved() const override { return true; }
  bool keeps_inputs() const override { return true; }
  bool takes_uniform() const override { return false; }

  virtual Tensor value(const Tensor& z) const = 0;
  virtual Tensor slope(const Tensor& z, const Tensor& t) const = 0;
  virtual Tensor curvature(const Tensor& z) const = 0;

  Tensor forward(const Frame&, Tensors in, Rows, Tensors&) const override { return value(in[0]); }
  Tensors pull(const Frame&, const Kept& kept, Tensor u) const override { return {slope(kept.inputs[0], u)}; }
  Tensor push(const Frame&, const Kept& kept, Tensors v) const override { return slope(kept.inputs[0], v[0]); }
  Tensors bend(const Frame&, const Kept& kept, const Tensor& u, const Tensors& v) const override {
    return {curvature(kept.inputs[0]).mul_(u).mul_(v[0])};
  }
};

struct Abs : Pointwise {
  bool curved() const override { return false; }
  Tensor value(const Tensor& z) const override { return z.abs(); }
  Tensor slope(const Tensor& z, const Tensor& t) const override { return z.sgn().mul_(t); }
  Tensor curvature(const Tensor& z) const override { return at::zeros(z.sizes(), z.options()); }
};

struct Silu : Pointwise {
  Tensor value(const Tensor& z) const override { return at::silu(z); }
  Tensor slope(const Tensor& z, const Tensor& t) const override { return at::silu_backward(t, z); }
  Tensor curvature(const Tensor& z) const override {
    const Tensor s = at::sigmoid(z);
    // s (1 - s) (2 + z (1 - 2 s))
    return s.mul(-2).add_(1).mul_(z).add_(2).mul_(s).mul_(1 - s);
  }
};

struct Gelu : Pointwise {
  bool tanh;

  explicit Gelu(bool tanh) : tanh(tanh) {}
  Tensor value(const Tensor& z) const override { return at::gelu(z, tanh ? "tanh" : "none"); }
  Tensor slope(const Tensor& z, const Tensor& t) const override {
    return at::gelu_backward(t, z, tanh ? "tanh" : "none");
  }
  Tensor curvature(const Tensor& z) const override {
    const Tensor squares = z.square();
    if (!tanh) return squares.mul(-0.5).exp_().mul_(2 - squares).mul_(1 / std::sqrt(2 * M_PI));
    // with g = k (z + 0.044715 z^3): (1 - tanh^2) (g' + z g'' / 2 - z tanh g'^2)
    const double k = std::sqrt(2 / M_PI), cubic = 0.044715;
    const Tensor t = (squares.mul(cubic) + 1).mul_(z).mul_(k).tanh_();
    const Tensor g1 = squares.mul(3 * cubic).add_(1).mul_(k);
    return (1 - t.square()).mul_(g1 + squares.mul(3 * cubic * k) - z * t * g1.square());
  }
};

struct Softplus : Pointwise {
  double beta, threshold;

  explicit Softplus(Reader& r) {
    const auto scalars = r.scalars(2);
    beta = scalars[0];
    threshold = scalars[1];
  }
  Tensor value(const Tensor& z) const override { return at::softplus(z, beta, threshold); }
  Tensor slope(const Tensor& z, const Tensor& t) const override { return at::softplus_backward(t, z, beta, threshold); }
  Tensor curvature(const Tensor& z) const override {
    const Tensor x = z.mul(beta), s = at::sigmoid(x);
    return (s * (1 - s)).mul_(beta).masked_fill_(x > threshold, 0);
  }
};

struct Tanh : Pointwise {
  Tensor value(const Tensor& z) const override { return at::tanh(z); }
  Tensor slope(const Tensor& z, const Tensor& t) const override { return at::tanh_backward(t, at::tanh(z)); }
  Tensor curvature(const Tensor& z) const override {
    const Tensor t = at::tanh(z);
    return t.square().neg_().add_(1).mul_(t).mul_(-2);
  }
};

struct Sigmoid : Pointwise {
  Tensor value(const Tensor& z) const override { return at::sigmoid(z); }
  Tensor slope(const Tensor& z, const Tensor& t) const override { return at::sigmoid_backward(t, at::sigmoid(z)); }
  Tensor curvature(const Tensor& z) const override {
    const Tensor s = at::sigmoid(z);
    return s.mul(-2).add_(1).mul_(s).mul_(1 - s);
  }
};

struct Elu : Pointwise {
  double alpha, scale, input_scale;

  explicit Elu(Reader& r) {
    const auto scalars = r.scalars(3);
    alpha = scalars[0];
    scale = scalars[1];
    input_scale = scalars[2];
  }
  Tensor value(const Tensor& z) const override { return at::elu(z, alpha, scale, input_scale); }
  Tensor slope(const Tensor& z, const Tensor& t) const override {
    return at::elu_backward(t, alpha, scale, input_scale, false, z);
  }
  Tensor curvature(const Tensor& z) const override {
    return z.mul(input_scale).exp_().mul_(alpha * scale * input_scale * input_scale).masked_fill_(z > 0, 0);
  }
};

struct Mish : Pointwise {
  Tensor value(const Tensor& z) const override { return at::mish(z); }
  Tensor slope(const Tensor& z, const Tensor& t) const override { return at::mish_backward(t, z); }
  Tensor curvature(const Tensor& z) const override {
    // z tanh(w) with w = softplus(z), w' = s: (1 - tanh^2) s (2 + z (1 - s - 2 s tanh))
    const Tensor t = at::tanh(at::softplus(z, 1, 40)), s = at::sigmoid(z);
    return (1 - t.square()).mul_(s).mul_((1 - s - (s * t).mul_(2)).mul_(z).add_(2));
  }
};

struct Prelu : Unary {
  int64_t P;

  explicit Prelu(Reader& r) : P(r.parameter()) {}
  int64_t weight() const override { return P; }
  bool linear() const override { return false; }
  bool keeps_inputs() const override { return true; }

  // The slopes, broadcastable to z.
  Tensor slopes(const Frame& frame, const Tensor& z) const {
    Shape shape(z.dim(), 1);
    if (z.dim() > 1) shape[1] = product(frame.parameters[P].sizes());
    return frame.parameters[P].view(shape);
  }
  Tensor forward(const Frame& frame, Tensors in, Rows, Tensors&) const override {
    return at::_prelu_kernel(in[0], slopes(frame, in[0]));
  }
  Tensors pull(const Frame& frame, const Kept& kept, Tensor u) const override {
    return {push(frame, kept, {std::move(u)})};
  }
  Tensor push(const Frame& frame, const Kept& kept, Tensors v) const override {
    const Tensor& z = kept.inputs[0];
    return at::where(z > 0, v[0], v[0] * slopes(frame, z));
  }
  void weigh(const Frame& frame, const Kept& kept, const Tensor& a, const Tensor& t,
             Gradients& gradients) const override {
    const Tensor product = (a * t).masked_fill_(kept.inputs[0] > 0, 0);
    gradients.add(P, sum_to(product, slopes(frame, product).sizes()).view(frame.parameters[P].sizes()));
  }
};

// A pool over 1 to 3 spatial dimensions; one is done as two of which the first has size 1.
struct Pool : Unary {
  size_t nd = 0;

  Tensor spread(const Tensor& t) const { return nd == 1 ? t.unsqueeze(2) : t; }
  Tensor unspread(const Tensor& t) const { return nd == 1 ? t.squeeze(2) : t; }
  static void spread(Shape& shape, int64_t value) {
    if (shape.size() == 1) shape.insert(shape.begin(), value);
  }
};

struct MaxPool : Pool {
  Shape kernel, stride, padding, dilation;
  bool ceil;

  explicit MaxPool(Reader& r) {
    nd = (r.left() - 1) / 4;
    kernel = r.take(nd);
    stride = r.take(nd);
    padding = r.take(nd);
    dilation = r.take(nd);
    ceil = r.take() != 0;
    spread(kernel, 1);
    spread(stride, 1);
    spread(padding, 0);
    spread(dilation, 1);
  }
  bool linear() const override { return false; }
  size_t extras() const override { return 1; }

  Tensor forward(const Frame& frame, Tensors in, Rows, Tensors& extras) const override {
    auto [h, indices] = nd == 3 ? at::max_pool3d_with_indices(in[0], kernel, stride, padding, dilation, ceil)
                                : at::max_pool2d_with_indices(spread(in[0]), kernel, stride, padding, dilation, ceil);
    extras.push_back(indices);
    return frame.arrange(unspread(h));
  }
  Tensors pull(const Frame& frame, const Kept& kept, Tensor u) const override {
    const Tensor z = spread(frame.empty(in(u.size(0)))), &indices = kept.extras[0];
    return {unspread(
        nd == 3
            ? at::max_pool3d_with_indices_backward(u, z, kernel, stride, padding, dilation, ceil, indices)
            : at::max_pool2d_with_indices_backward(spread(u), z, kernel, stride, padding, dilation, ceil, indices))};
  }
  Tensor push(const Frame& frame, const Kept& kept, Tensors v) const override {
    const Tensor indices = kept.extras[0].flatten(2);
    return frame.arrange(v[0].flatten(2).gather(2, indices).view(out(v[0].size(0))));
  }
};

struct AvgPool : Pool {
  Shape kernel, stride, padding;
  bool ceil, count_padding;
  std::optional<int64_t> divisor;

  explicit AvgPool(Reader& r) {
    nd = (r.left() - 3) / 3;
    kernel = r.take(nd);
    stride = r.take(nd);
    padding = r.take(nd);
    ceil = r.take() != 0;
    count_padding = r.take() != 0;
    if (const int64_t given = r.take()) divisor = given;
    spread(kernel, 1);
    spread(stride, 1);
    spread(padding, 0);
  }
  Tensor apply(const Frame& frame, const Tensor& h) const override {
    return frame.arrange(
        unspread(nd == 3 ? at::avg_pool3d(h, kernel, stride, padding, ceil, count_padding, divisor)
                         : at::avg_pool2d(spread(h), kernel, stride, padding, ceil, count_padding, divisor)));
  }
  Tensor adjoint(const Frame& frame, Tensor u) const override {
    const Tensor z = spread(frame.empty(in(u.size(0))));
    return frame.arrange(unspread(
        nd == 3 ? at::avg_pool3d_backward(u, z, kernel, stride, padding, ceil, count_padding, divisor)
                : at::avg_pool2d_backward(spread(u), z, kernel, stride, padding, ceil, count_padding, divisor)));
  }
};

struct AdaptiveAvgPool : Pool {
  explicit AdaptiveAvgPool(size_t spatial_dims) { nd = spatial_dims; }
  Tensor apply(const Frame& frame, const Tensor& h) const override {
    Shape size(sizes.begin() + 1, sizes.end());
    spread(size, 1);
    return frame.arrange(
        unspread(nd == 3 ? at::_adaptive_avg_pool3d(h, size) : at::_adaptive_avg_pool2d(spread(h), size)));
  }
  Tensor adjoint(const Frame& frame, Tensor u) const override {
    const Tensor z = spread(frame.empty(in(u.size(0))));
    return frame.arrange(
        unspread(nd == 3 ? at::_adaptive_avg_pool3d_backward(u, z) : at::_adaptive_avg_pool2d_backward(spread(u), z)));
  }
};

struct Resize : Unary {
  enum Mode : int64_t { nearest, linear_, bicubic };
  int64_t mode;
  bool align;
  std::array<std::optional<double>, 3> scales;

  Resize(Reader& r, size_t nd) : mode(r.take()), align(r.take() != 0) {
    const auto given = r.scalars(nd);
    for (const auto i : c10::irange(nd))
      if (given[i] != 0) scales[i] = given[i];
    TORCH_CHECK_VALUE(nd >= 1 && nd <= 3 && mode >= nearest && mode <= bicubic && (mode != bicubic || nd == 2), kOp,
                      ": program resizes ", nd, " dimensions by the unknown mode ", mode);
  }
  Tensor apply(const Frame& frame, const Tensor& h) const override {
    const IntArrayRef size = IntArrayRef(sizes).slice(1);
    switch (size.size()) {
      case 1:
        return mode == nearest ? at::upsample_nearest1d(h, size, scales[0])
                               : at::upsample_linear1d(h, size, align, scales[0]);
      case 2:
        return frame.arrange(mode == nearest   ? at::upsample_nearest2d(h, size, scales[0], scales[1])
                             : mode == linear_ ? at::upsample_bilinear2d(h, size, align, scales[0], scales[1])
                                               : at::upsample_bicubic2d(h, size, align, scales[0], scales[1]));
      default:
        return mode == nearest ? at::upsample_nearest3d(h, size, scales[0], scales[1], scales[2])
                               : at::upsample_trilinear3d(h, size, align, scales[0], scales[1], scales[2]);
    }
  }
  Tensor adjoint(const Frame& frame, Tensor u) const override {
    const IntArrayRef size = IntArrayRef(sizes).slice(1);
    const Shape to = in(u.size(0));
    switch (size.size()) {
      case 1:
        return mode == nearest ? at::upsample_nearest1d_backward(u, size, to, scales[0])
                               : at::upsample_linear1d_backward(u, size, to, align, scales[0]);
      case 2:
        return frame.arrange(mode == nearest ? at::upsample_nearest2d_backward(u, size, to, scales[0], scales[1])
                             : mode == linear_
                                 ? at::upsample_bilinear2d_backward(u, size, to, align, scales[0], scales[1])
                                 : at::upsample_bicubic2d_backward(u, size, to, align, scales[0], scales[1]));
      default:
        return mode == nearest ? at::upsample_nearest3d_backward(u, size, to, scales[0], scales[1], scales[2])
                               : at::upsample_trilinear3d_backward(u, size, to, align, scales[0], scales[1], scales[2]);
    }
  }
};

struct Pad : Unary {
  enum Mode : int64_t { constant, reflect, replicate, circular };
  int64_t mode;
  double value;
  Shape pads;

  explicit Pad(Reader& r) : mode(r.take()), value(r.scalars(1)[0]), pads(r.rest()) {
    TORCH_CHECK_VALUE(mode >= constant && mode <= circular && !pads.empty() && pads.size() % 2 == 0, kOp,
                      ": program pads by ", pads, " in the unknown mode ", mode);
  }
  Tensor forward(const Frame& frame, Tensors in, Rows, Tensors&) const override {
    return mode == constant ? frame.arrange(at::constant_pad_nd(in[0], pads, value)) : apply(frame, in[0]);
  }
  Tensor apply(const Frame& frame, const Tensor& h) const override {
    const size_t nd = pads.size() / 2;
    switch (mode) {
      case constant:
        return frame.arrange(at::constant_pad_nd(h, pads, 0));
      case reflect:
        return frame.arrange(nd == 1   ? at::reflection_pad1d(h, pads)
                             : nd == 2 ? at::reflection_pad2d(h, pads)
                                       : at::reflection_pad3d(h, pads));
      case replicate:
        return frame.arrange(nd == 1   ? at::replication_pad1d(h, pads)
                             : nd == 2 ? at::replication_pad2d(h, pads)
                                       : at::replication_pad3d(h, pads));
      default:
        return frame.arrange(at::_pad_circular(h, pads));
    }
  }
  Tensor adjoint(const Frame& frame, Tensor u) const override {
    const size_t nd = pads.size() / 2;
    if (mode == constant) {
      Shape crop;
      for (const int64_t pad : pads) crop.push_back(-pad);
      return frame.arrange(at::constant_pad_nd(u, crop, 0));
    }
    if (mode == circular) return frame.arrange(unwrap(u));
    const Tensor z = frame.empty(in(u.size(0)));
    if (mode == reflect)
      return frame.arrange(nd == 1   ? at::reflection_pad1d_backward(u, z, pads)
                           : nd == 2 ? at::reflection_pad2d_backward(u, z, pads)
                                     : at::reflection_pad3d_backward(u, z, pads));
    return frame.arrange(nd == 1   ? at::replication_pad1d_backward(u, z, pads)
                         : nd == 2 ? at::replication_pad2d_backward(u, z, pads)
                                   : at::replication_pad3d_backward(u, z, pads));
  }
  // Adds what lies in the padding to what it was copied from.
  Tensor unwrap(Tensor u) const {
    for (const auto i : c10::irange(pads.size() / 2)) {
      const int64_t dim = u.dim() - 1 - static_cast<int64_t>(i), left = pads[2 * i], right = pads[2 * i + 1];
      const int64_t n = u.size(dim) - left - right;
      const Tensor sum = u.narrow(dim, left, n).clone();
      sum.narrow(dim, n - left, left).add_(u.narrow(dim, 0, left));
      sum.narrow(dim, 0, right).add_(u.narrow(dim, left + n, right));
      u = sum;
    }
    return u;
  }
};

struct Add : Layer {
  double alpha;

  explicit Add(Reader& r) : alpha(r.scalars(1)[0]) {}

  Tensor forward(const Frame& frame, Tensors in, Rows, Tensors&) const override {
    return frame.arrange(ours(in[0]) && in[0].sizes().slice(1) == sizes ? in[0].add_(in[1], alpha)
                                                                        : at::add(in[0], in[1], alpha));
  }
  Tensors pull(const Frame&, const Kept&, Tensor u) const override {
    const int64_t batch = u.size(0);
    Tensor second = sum_to(u, batched(batch, input_sizes[1]));
    if (alpha != 1) second = second * alpha;
    return {sum_to(std::move(u), batched(batch, input_sizes[0])), std::move(second)};
  }
  Tensor push(const Frame& frame, const Kept&, Tensors v) const override {
    if (v[0].defined() && v[1].defined()) return frame.arrange(at::add(v[0], v[1], alpha));
    const Tensor moved = v[0].defined() ? std::move(v[0]) : alpha == 1 ? std::move(v[1]) : v[1] * alpha;
    return frame.arrange(moved.expand(batched(moved.size(0), sizes)));
  }
};

struct Cat : Layer {
  int64_t dim;

  explicit Cat(Reader& r) : dim(r.take()) {
    TORCH_CHECK_VALUE(dim >= 1, kOp, ": program concatenates along dimension ", dim, ", which must not be the batch");
  }
  Tensor forward(const Frame& frame, Tensors in, Rows, Tensors&) const override {
    return frame.arrange(at::cat(in, dim));
  }
  Tensors pull(const Frame&, const Kept&, Tensor u) const override {
    Tensors parts;
    int64_t start = 0;
    for (const Shape& in : input_sizes) {
      parts.push_back(u.narrow(dim, start, in.at(dim - 1)));
      start += in.at(dim - 1);
    }
    return parts;
  }
  Tensor push(const Frame& frame, const Kept& kept, Tensors v) const override {
    for (const auto i : c10::irange(v.size()))
      if (!v[i].defined()) v[i] = at::zeros(batched(kept.rows.count, input_sizes[i]), frame.options);
    return frame.arrange(at::cat(v, dim));
  }
};

struct Affine : Unary {
  double scale, offset;

  explicit Affine(Reader& r) {
    const auto scalars = r.scalars(2);
    scale = scalars[0];
    offset = scalars[1];
  }
  Tensor forward(const Frame&, Tensors in, Rows, Tensors&) const override {
    Tensor h = scale == 1 ? in[0] : in[0] * scale;
    return offset == 0 ? h : h + offset;
  }
  Tensor apply(const Frame&, const Tensor& h) const override { return scale == 1 ? h : h * scale; }
  Tensor adjoint(const Frame&, Tensor u) const override { return scale == 1 ? u : u * scale; }
};

// A parameter that is no matrix: shared by all samples, or one for each, the batch its first dimension.
struct Parametric : Layer {
  int64_t P;

  explicit Parametric(Reader& r) : P(r.parameter()) {}
  bool takes_uniform() const override { return false; }

  bool per_sample(const Frame& frame, Rows rows) const {
    const Tensor& parameter = frame.parameters[P];
    return rows.total > 1 && parameter.dim() == static_cast<int64_t>(sizes.size()) + 1 &&
           parameter.size(0) == rows.total;
  }
  Tensor parameter(const Frame& frame, Rows rows) const {
    return per_sample(frame, rows) ? rows.of(frame.parameters[P]) : frame.parameters[P];
  }
  // Adds what each of the samples at hand contributes.
  void add(const Frame& frame, Rows rows, const Tensor& contributions, Gradients& gradients) const {
    const Tensor& parameter = frame.parameters[P];
    if (!per_sample(frame, rows) || rows.whole()) return gradients.add(P, sum_to(contributions, parameter.sizes()));
    const Tensor whole = at::zeros(parameter.sizes(), contributions.options());
    const Tensor part = rows.of(whole);
    part.copy_(sum_to(contributions, part.sizes()));
    gradients.add(P, whole);
  }
};

struct Constant : Parametric {
  using Parametric::Parametric;
  int64_t bias() const override { return P; }

  Tensor forward(const Frame& frame, Tensors, Rows rows, Tensors&) const override {
    return frame.parameters[P].expand(batched(rows.total, sizes));
  }
  Tensors pull(const Frame&, const Kept&, Tensor) const override { return {}; }
  Tensor push(const Frame&, const Kept&, Tensors) const override { return {}; }
  void shift(const Frame& frame, const Kept& kept, const Tensor& a, const Tensor& c,
             Gradients& gradients) const override {
    Shape per_row(a.dim(), 1);
    per_row[0] = -1;
    add(frame, kept.rows, c.defined() ? a * c.view(per_row) : a, gradients);
  }
};

struct MultiplyParameter : Parametric {
  using Parametric::Parametric;
  int64_t weight() const override { return P; }

  Tensor forward(const Frame& frame, Tensors in, Rows rows, Tensors&) const override {
    return frame.arrange(in[0] * parameter(frame, rows));
  }
  Tensors pull(const Frame& frame, const Kept& kept, Tensor u) const override {
    const Shape shape = batched(u.size(0), input_sizes[0]);
    return {sum_to(u * parameter(frame, kept.rows), shape)};
  }
  Tensor push(const Frame& frame, const Kept& kept, Tensors v) const override {
    return frame.arrange(v[0] * parameter(frame, kept.rows));
  }
  void weigh(const Frame& frame, const Kept& kept, const Tensor& a, const Tensor& t,
             Gradients& gradients) const override {
    add(frame, kept.rows, a * t, gradients);
  }
};

struct Sum : Unary {
  bool keep;
  Shape dims;

  explicit Sum(Reader& r) : keep(r.take() != 0), dims(r.rest()) {
    for (const int64_t dim : dims)
      TORCH_CHECK_VALUE(dim >= 1, kOp, ": program sums over dimension ", dim, ", which must not be the batch");
  }
  Tensor apply(const Frame& frame, const Tensor& h) const override { return frame.arrange(h.sum(dims, keep)); }
  Tensor adjoint(const Frame&, Tensor u) const override {
    Shape shape = in(u.size(0)), kept = shape;
    for (const int64_t dim : dims) kept.at(dim) = 1;
    return u.reshape(kept).expand(shape);
  }
};

struct Max : Unary {
  int64_t dim;
  bool keep;

  explicit Max(Reader& r) : dim(r.take()), keep(r.take() != 0) {
    TORCH_CHECK_VALUE(dim >= 1, kOp, ": program takes the maximum over dimension ", dim,
                      ", which must not be the batch");
  }
  bool linear() const override { return false; }
  size_t extras() const override { return 1; }

  Tensor forward(const Frame& frame, Tensors in, Rows, Tensors& extras) const override {
    auto [h, indices] = at::max(in[0], dim, true);
    extras.push_back(indices);
    return frame.arrange(keep ? h : h.squeeze(dim));
  }
  Tensors pull(const Frame& frame, const Kept& kept, Tensor u) const override {
    const Tensor zeros = at::zeros(in(u.size(0)), frame.options);
    return {frame.arrange(zeros.scatter(dim, kept.extras[0], keep ? u : u.unsqueeze(dim)))};
  }
  Tensor push(const Frame& frame, const Kept& kept, Tensors v) const override {
    const Tensor moved = v[0].gather(dim, kept.extras[0]);
    return frame.arrange(keep ? moved : moved.squeeze(dim));
  }
};

struct Multiply : Layer {
  bool linear() const override { return false; }
  bool curved() const override { return true; }
  bool keeps_inputs() const override { return true; }

  Tensor forward(const Frame& frame, Tensors in, Rows, Tensors&) const override { return frame.arrange(in[0] * in[1]); }
  Tensors pull(const Frame&, const Kept& kept, Tensor u) const override {
    return {sum_to(u * kept.inputs[1], kept.inputs[0].sizes()), sum_to(u * kept.inputs[0], kept.inputs[1].sizes())};
  }
  Tensor push(const Frame& frame, const Kept& kept, Tensors v) const override {
    Tensor sum;
    if (v[0].defined()) sum = v[0] * kept.inputs[1];
    if (v[1].defined()) sum = sum.defined() ? sum.add_(v[1] * kept.inputs[0]) : v[1] * kept.inputs[0];
    return frame.arrange(sum);
  }
  Tensors bend(const Frame&, const Kept& kept, const Tensor& u, const Tensors& v) const override {
    Tensors p(2);
    for (const int i : {0, 1})
      if (v[1 - i].defined()) p[i] = sum_to(u * v[1 - i], kept.inputs[i].sizes());
    return p;
  }
};

// (h - mean) / sqrt(variance + eps) over the last dimensions.
struct Normalize : Unary {
  size_t dims;
  double eps;

  explicit Normalize(Reader& r) : dims(r.take()), eps(r.scalars(1)[0]) {}
  bool linear() const override { return false; }
  bool curved() const override { return true; }
  bool keeps_inputs() const override { return true; }
  size_t extras() const override { return 2; }  // mean and 1 / sqrt(variance + eps)

  IntArrayRef normalized() const {
    TORCH_CHECK_VALUE(dims >= 1 && dims <= sizes.size(), kOp, ": program normalizes over ", dims, " dimensions of ",
                      sizes);
    return IntArrayRef(sizes).slice(sizes.size() - dims);
  }
  Tensor forward(const Frame& frame, Tensors in, Rows, Tensors& extras) const override {
    auto [h, mean, scale] = at::native_layer_norm(in[0].contiguous(), normalized(), {}, {}, eps);
    extras.push_back(mean);
    extras.push_back(scale);
    return frame.arrange(h);
  }
  // The derivative is symmetric: r (t - mean(t) - x mean(t x)) with x the value and r = 1 / sqrt(variance + eps).
  Tensor derivative(const Frame& frame, const Kept& kept, const Tensor& t) const {
    return frame.arrange(
        std::get<0>(at::native_layer_norm_backward(t.contiguous(), kept.inputs[0].contiguous(), normalized(),
                                                   kept.extras[0], kept.extras[1], {}, {}, {true, false, false})));
  }
  Tensors pull(const Frame& frame, const Kept& kept, Tensor u) const override { return {derivative(frame, kept, u)}; }
  Tensor push(const Frame& frame, const Kept& kept, Tensors v) const override { return derivative(frame, kept, v[0]); }
  // With a = mean(u x), b = mean(v x), c = mean(u v) - mean(u) mean(v) - a b:
  //   -r^2 (c x + d - mean(d) - x mean(d x)),  d = u b + v a
  Tensors bend(const Frame& frame, const Kept& kept, const Tensor& u, const Tensors& vs) const override {
    const Tensor &v = vs[0], &mean = kept.extras[0], &r = kept.extras[1];
    const Tensor x = (kept.inputs[0] - mean).mul_(r);
    Shape over(dims);
    std::iota(over.begin(), over.end(), x.dim() - static_cast<int64_t>(dims));
    const auto average = [&](const Tensor& t) { return t.mean(over, true); };
    const Tensor a = average(u * x), b = average(v * x);
    const Tensor c = average(u * v) - average(u) * average(v) - a * b;
    const Tensor d = u * b + v * a;
    return {frame.arrange((x * (c - average(d * x)) + d - average(d)).mul_(r.square().neg_()))};
  }
};

struct Narrow : Unary {
  int64_t dim, start, length;

  explicit Narrow(Reader& r) : dim(r.take()), start(r.take()), length(r.take()) {
    TORCH_CHECK_VALUE(dim >= 1, kOp, ": program narrows dimension ", dim, ", which must not be the batch");
  }
  Tensor apply(const Frame& frame, const Tensor& h) const override {
    return frame.arrange(h.narrow(dim, start, length));
  }
  Tensor adjoint(const Frame& frame, Tensor u) const override {
    const Tensor whole = frame.empty(in(u.size(0))).zero_();
    whole.narrow(dim, start, length).copy_(u);
    return whole;
  }
};

struct Expand : Unary {
  Tensor apply(const Frame& frame, const Tensor& h) const override { return frame.arrange(h.expand(out(h.size(0)))); }
  Tensor adjoint(const Frame& frame, Tensor u) const override {
    return frame.arrange(sum_to(std::move(u), batched(u.size(0), in())));
  }
};

enum Kind : int64_t {
  linear,
  convolution,
  reshape,
  permute,
  activation,
  prelu,
  max_pool,
  avg_pool,
  adaptive_avg_pool,
  resize,
  pad,
  add,
  cat,
  affine,
  constant,
  multiply_parameter,
  sum,
  max,
  multiply,
  normalize,
  narrow,
  expand
};

enum Function : int64_t { leaky_relu, hardtanh, silu, gelu, gelu_tanh, softplus, tanh, sigmoid, elu, mish, abs };

std::unique_ptr<Layer> make_activation(Reader& r) {
  const int64_t function = r.take();
  switch (function) {
    case leaky_relu:
      return std::make_unique<LeakyRelu>(r);
    case hardtanh:
      return std::make_unique<Hardtanh>(r);
    case softplus:
      return std::make_unique<Softplus>(r);
    case elu:
      return std::make_unique<Elu>(r);
  }
  r.take();  // where its scalars would start
  switch (function) {
    case silu:
      return std::make_unique<Silu>();
    case gelu:
    case gelu_tanh:
      return std::make_unique<Gelu>(function == gelu_tanh);
    case tanh:
      return std::make_unique<Tanh>();
    case sigmoid:
      return std::make_unique<Sigmoid>();
    case mish:
      return std::make_unique<Mish>();
    case abs:
      return std::make_unique<Abs>();
    default:
      TORCH_CHECK_VALUE(false, kOp, ": program names the unknown activation ", function);
  }
}

std::unique_ptr<Layer> make_layer(int64_t kind, Reader& r, size_t spatial_dims) {
  switch (kind) {
    case linear:
      return std::make_unique<Linear>(r);
    case convolution:
      return std::make_unique<Convolution>(r);
    case reshape:
      return std::make_unique<Reshape>();
    case permute:
      return std::make_unique<Permute>(r);
    case activation:
      return make_activation(r);
    case prelu:
      return std::make_unique<Prelu>(r);
    case max_pool:
      return std::make_unique<MaxPool>(r);
    case avg_pool:
      return std::make_unique<AvgPool>(r);
    case adaptive_avg_pool:
      return std::make_unique<AdaptiveAvgPool>(spatial_dims);
    case resize:
      return std::make_unique<Resize>(r, spatial_dims);
    case pad:
      return std::make_unique<Pad>(r);
    case add:
      return std::make_unique<Add>(r);
    case cat:
      return std::make_unique<Cat>(r);
    case affine:
      return std::make_unique<Affine>(r);
    case constant:
      return std::make_unique<Constant>(r);
    case multiply_parameter:
      return std::make_unique<MultiplyParameter>(r);
    case sum:
      return std::make_unique<Sum>(r);
    case max:
      return std::make_unique<Max>(r);
    case multiply:
      return std::make_unique<Multiply>();
    case normalize:
      return std::make_unique<Normalize>(r);
    case narrow:
      return std::make_unique<Narrow>(r);
    case expand:
      return std::make_unique<Expand>();
    default:
      TORCH_CHECK_VALUE(false, kOp, ": program holds the unknown layer kind ", kind);
  }
}

}  // namespace

Tensor norms_of_samples(const Tensor& t) {
  const int64_t batch = t.size(0);
  if (t.numel() == 0) return at::zeros({batch}, t.options());
  const Tensor norms = fresh({batch}, t.options());
  with_kernels(t, [&](const auto& kernels, Stream stream) {
    kernels.norms(input(t, kernels), output(norms, kernels), batch, product(t.sizes()) / batch, stream);
  });
  return norms;
}

Tensor scaled_samples(const Tensor& t, const Tensor& factors) {
  const auto scale = [&](auto zero) {
    using T = decltype(zero);
    const Tensor result = fresh(t.sizes(), t.options());
    const T *from = t.const_data_ptr<T>(), *factor = factors.const_data_ptr<T>();
    T* to = result.mutable_data_ptr<T>();
    const int64_t each = t.numel() / t.size(0);
    for (int64_t sample = 0; sample < t.size(0); ++sample)
      for (int64_t i = 0; i < each; ++i) *to++ = *from++ * factor[sample];
    return result;
  };
  if (t.is_cpu() && t.is_contiguous() && t.numel() > 0 && t.numel() <= kFewElements) {
    if (t.scalar_type() == at::kFloat) return scale(float());
    if (t.scalar_type() == at::kDouble) return scale(double());
  }
  Shape shape(t.dim(), 1);
  shape[0] = -1;
  return t * factors.view(shape);
}

Penalized penalize(const Tensor& norms, const Penalty& penalty, double weight, bool differentiate) {
  Penalized result{fresh({}, norms.options()), fresh({}, norms.options()), {}};
  if (differentiate) result.slopes = fresh(norms.sizes(), norms.options());
  with_kernels(norms, [&](const auto& kernels, Stream stream) {
    kernels.penalty(input(norms, kernels), norms.size(0), penalty, weight, output(result.value, kernels),
                    output(result.loss, kernels), output(result.slopes, kernels), stream);
  });
  return result;
}

std::shared_ptr<const Program> Program::read(TensorList x, TensorList parameters, IntArrayRef program,
                                             Scalars scalars) {
  struct Entry {
    std::vector<Shape> sizes, parameters;
    Shape program;
    std::vector<double> scalars;
    std::shared_ptr<const Program> value;
  };
  constexpr size_t kEntries = 8;
  thread_local std::vector<Entry> entries;  // the last used first
  const auto alike = [](const Tensor& t, const Shape& sizes) { return t.sizes() == sizes; };
  const auto samples_alike = [](const Tensor& t, const Shape& sizes) { return t.sizes().slice(1) == sizes; };
  auto found = std::find_if(entries.begin(), entries.end(), [&](const Entry& e) {
    return program == e.program && scalars == e.scalars &&
           std::equal(x.begin(), x.end(), e.sizes.begin(), e.sizes.end(), samples_alike) &&
           std::equal(parameters.begin(), parameters.end(), e.parameters.begin(), e.parameters.end(), alike);
  });
  TORCH_CHECK_VALUE(!x.empty(), kOp, ": x must hold at least one tensor");
  if (found == entries.end()) {
    Entry entry{{}, {}, program.vec(), scalars.vec(), {}};
    for (const Tensor& t : x) entry.sizes.push_back(t.sizes().slice(1).vec());
    for (const Tensor& t : parameters) entry.parameters.push_back(t.sizes().vec());
    entry.value = std::make_shared<const Program>(entry.sizes, entry.parameters, program, scalars);
    const Shape& out = entry.value->layers.empty() ? entry.sizes.back() : entry.value->layers.back()->sizes;
    TORCH_CHECK_VALUE(product(out) > 0, kOp, ": the critic must return at least one score a sample, got shape ",
                      batched(x[0].size(0), out));
    if (entries.size() == kEntries) entries.pop_back();
    entries.push_back(std::move(entry));
    found = entries.end() - 1;
  }
  std::rotate(entries.begin(), found, found + 1);
  return entries.front().value;
}

Program::Program(std::vector<Shape> sizes, const std::vector<Shape>& parameters, IntArrayRef program, Scalars scalars)
    : inputs(static_cast<int64_t>(sizes.size())) {
  moving.assign(inputs, true);
  deep.assign(inputs, false);
  std::vector<int64_t> uses(inputs);  // of each value, by layers

  size_t at = 0;
  const auto take = [&](int64_t n) {
    TORCH_CHECK_VALUE(n >= 0 && at + n <= program.size(), kOp, ": program ends within a record");
    at += n;
    return program.slice(at - n, n);
  };
  while (at < program.size()) {
    const int64_t kind = take(1)[0];
    const IntArrayRef record = take(take(1)[0]);
    const Shape out = take(take(1)[0]).vec();

    // The values that it takes come first, but for cat, where its dimension does, and constants, which take none.
    TORCH_CHECK_VALUE(!record.empty(), kOp, ": program has an empty record");
    const size_t taken = kind == cat                       ? record.size() - 1
                         : kind == constant                ? 0
                         : kind == add || kind == multiply ? 2
                                                           : 1;
    const size_t before = kind == cat ? 1 : 0;
    TORCH_CHECK_VALUE(record.size() >= before + taken && (kind != cat || taken > 0), kOp,
                      ": program has a record that is too short: ", record);
    const IntArrayRef in = record.slice(before, taken);
    Reader reader(kind == cat ? record.slice(0, 1) : record.slice(taken), scalars, parameters.size());
    for (const int64_t value : in)
      TORCH_CHECK_VALUE(value >= 0 && value < values(), kOp, ": program takes value ", value, ", of ", values(),
                        " there are");

    const size_t spatial = taken && !sizes[in[0]].empty() ? sizes[in[0]].size() - 1 : 0;
    TORCH_CHECK_VALUE((kind != adaptive_avg_pool && kind != resize) || (spatial && out.size() == spatial + 1), kOp,
                      ": program resizes samples with ", spatial, " spatial dimensions to shape ", out);
    if (kind == add || kind == multiply || kind == multiply_parameter || kind == cat)
      for (const int64_t value : in)
        TORCH_CHECK_VALUE(sizes[value].size() == out.size(), kOp, ": program joins samples that are not of one number ",
                          "of dimensions: ", sizes[value], " to make ", out);
    std::unique_ptr<Layer> layer = make_layer(kind, reader, spatial);
    TORCH_CHECK_VALUE(reader.left() == 0, kOp, ": program has a record that is too long: ", record);
    if (kind == multiply_parameter)
      TORCH_CHECK_VALUE(parameters[layer->weight()].size() <= out.size() + 1, kOp,
                        ": program multiplies by a parameter of too many dimensions, ", parameters[layer->weight()],
                        ", to make ", out);
    layer->inputs = in.vec();
    layer->sizes = out;
    bool moves = false, parametric = layer->weight() >= 0 || layer->bias() >= 0;
    for (const int64_t value : in) {
      layer->input_sizes.push_back(sizes[value]);
      ++uses[value];
      moves = moves || moving[value];
      parametric = parametric || deep[value];
    }
    moving.push_back(moves);
    deep.push_back(parametric);
    uses.push_back(0);
    sizes.push_back(out);
    curved = curved || (layer->curved() && moves);
    layers.push_back(std::move(layer));
  }
  bent.assign(values(), false);
  for (auto i = static_cast<int64_t>(layers.size()) - 1; i >= 0; --i) {
    const Layer& layer = *layers[i];
    for (const int64_t value : layer.inputs)
      bent[value] = bent[value] || bent[inputs + i] || (!layer.linear() && moving[inputs + i]);
  }

  // A linear layer that only an activation uses leaves its bias to it.
  for (const auto& layer : layers) {
    auto* activation = dynamic_cast<LeakyRelu*>(layer.get());
    if (!activation || activation->inputs[0] < inputs || uses[activation->inputs[0]] != 1) continue;
    auto* before = dynamic_cast<Linear*>(layers[activation->inputs[0] - inputs].get());
    if (!before || before->b < 0 || before->sizes.empty() || before->sizes.size() == 3) continue;
    if (parameters[before->b] != Shape{before->sizes.back()}) continue;
    before->adds_bias = false;
    activation->bias_in = before->b;
  }
}

bool Program::moves(int64_t parameter, bool scored) const {
  for (const auto i : c10::irange(layers.size())) {
    const Layer& layer = *layers[i];
    const auto value = inputs + static_cast<int64_t>(i);
    if (layer.weight() == parameter && (scored || moving[layer.inputs[0]])) return true;
    if (layer.bias() == parameter && scored) return true;
    if ((layer.weight() == parameter || layer.bias() == parameter) && curved && bent[value]) return true;
  }
  return false;
}

bool Program::reaches(int64_t parameter, bool scored) const {
  for (const auto i : c10::irange(layers.size())) {
    const Layer& layer = *layers[i];
    if ((layer.weight() == parameter || layer.bias() == parameter) && bent[inputs + static_cast<int64_t>(i)])
      return true;
  }
  return moves(parameter, scored);
}

bool Program::bends_input() const {
  for (const auto i : c10::irange(inputs))
    if (bent[i]) return true;
  return false;
}

}  // namespace wgan_ext::critic
