// The gradient of a piecewise-linear critic with respect to its input, differentiable once.
//
// For z_l = W_l h_(l-1) + b_l and h_l = m_l * z_l, where m_l is 1 or the slope by the sign of z_l, the gradient of the
// sum of a sample's outputs is the chain u_(l-1) = m_(l-1) * (u_l W_l), from u = 1 at the outputs down to g = dD/dx.
// Given a cotangent v_0 of g, the adjoint chain v_l = m_l * (v_(l-1) W_l^T) yields dW_l = u_l^T v_(l-1); biases and the
// input move only the signs, so their derivatives are 0. Compared with autograd's double backward, which also
// differentiates through z, this is 4 matrix products a layer against 6, and the signs (one bit each) are all that is
// kept of the forward pass. Above the last activation u is the same for every sample: there both chains run with a
// batch of one.
//
// The critic comes as a program: one record a layer, in order of evaluation,
//   linear      0, has_bias
//   conv2d      1, has_bias, stride (2), padding (2), dilation (2), groups
//   flatten     2, start_dim, end_dim
//   activation  3                                     leaky relu with the next of `slopes`; 0 is relu
// and `parameters` holds the weight, and the bias if there is one, of each linear and conv2d layer in turn. The
// products run in compute_dtype, on images that lie in channels_last or contiguous memory.
#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/irange.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../backend.h"
#include "../checks.h"
#include "../half.h"
#include "kernels.h"

namespace wgan_ext::critic {
namespace {

using at::IntArrayRef;
using at::Tensor;
using at::TensorList;
using Slopes = at::ArrayRef<double>;
using Shape = std::vector<int64_t>;

constexpr char kOp[] = "critic_input_gradient";

enum class Kind : int64_t { linear, conv2d, flatten, activation };

struct Layer {
  Kind kind;
  int64_t weight = -1;  // index among the layers with weights
  Tensor W, b;          // b undefined if the layer has none
  IntArrayRef stride, padding, dilation;
  int64_t groups = 1;
  int64_t start = 0, end = 0;  // flatten
  int64_t signs = -1;          // index among the activations
  double slope = 0;

  bool weighted() const { return kind == Kind::linear || kind == Kind::conv2d; }
};

struct Critic {
  std::vector<Layer> layers;
  int64_t weights = 0;
  int64_t activations = 0;
  int64_t last_activation = -1;  // index in layers
};

Critic read_program(TensorList parameters, IntArrayRef program, Slopes slopes) {
  Critic critic;
  size_t at = 0, parameter = 0;
  const auto take = [&](size_t n) {
    TORCH_CHECK_VALUE(at + n <= program.size(), kOp, ": program ends within a record");
    at += n;
    return program.slice(at - n, n);
  };
  const auto take_parameter = [&] {
    TORCH_CHECK_VALUE(parameter < parameters.size(), kOp,
                      ": parameters has too few tensors for program: ", parameters.size());
    return parameters[parameter++];
  };
  while (at < program.size()) {
    Layer layer{static_cast<Kind>(take(1)[0])};
    switch (layer.kind) {
      case Kind::linear:
      case Kind::conv2d: {
        const bool has_bias = take(1)[0];
        if (layer.kind == Kind::conv2d) {
          layer.stride = take(2);
          layer.padding = take(2);
          layer.dilation = take(2);
          layer.groups = take(1)[0];
        }
        layer.weight = critic.weights++;
        layer.W = take_parameter();
        if (has_bias) layer.b = take_parameter();
        break;
      }
      case Kind::flatten:
        layer.start = take(1)[0];
        layer.end = take(1)[0];
        break;
      case Kind::activation:
        TORCH_CHECK_VALUE(critic.activations < static_cast<int64_t>(slopes.size()), kOp,
                          ": slopes has too few values for program: ", slopes.size());
        layer.slope = slopes[critic.activations];
        layer.signs = critic.activations++;
        critic.last_activation = static_cast<int64_t>(critic.layers.size());
        break;
      default:
        TORCH_CHECK_VALUE(false, kOp, ": program holds an unknown layer kind: ", static_cast<int64_t>(layer.kind));
    }
    critic.layers.push_back(std::move(layer));
  }
  TORCH_CHECK_VALUE(parameter == parameters.size(), kOp,
                    ": parameters has more tensors than program uses: ", parameters.size());
  TORCH_CHECK_VALUE(critic.activations == static_cast<int64_t>(slopes.size()), kOp,
                    ": slopes has more values than program uses: ", slopes.size());
  return critic;
}

Shape linear_shape(const Layer& layer, Shape shape, int64_t number) {
  TORCH_CHECK_VALUE(layer.W.dim() == 2, kOp, ": layer ", number, " (linear) needs a 2-D weight, got ", layer.W.sizes());
  TORCH_CHECK_VALUE(shape.size() >= 2 && shape.back() == layer.W.size(1), kOp, ": layer ", number,
                    " (linear) takes a batch of samples with a last dimension of ", layer.W.size(1), ", got shape ",
                    IntArrayRef(shape));
  shape.back() = layer.W.size(0);
  return shape;
}

Shape conv2d_shape(const Layer& layer, const Shape& shape, int64_t number) {
  const Tensor& W = layer.W;
  TORCH_CHECK_VALUE(W.dim() == 4, kOp, ": layer ", number, " (conv2d) needs a 4-D weight, got ", W.sizes());
  TORCH_CHECK_VALUE(layer.groups > 0 && W.size(0) % layer.groups == 0, kOp, ": layer ", number,
                    " (conv2d) needs groups that divide its output channels, got ", layer.groups);
  TORCH_CHECK_VALUE(shape.size() == 4 && shape[1] == W.size(1) * layer.groups, kOp, ": layer ", number,
                    " (conv2d) takes shape [B, ", W.size(1) * layer.groups, ", H, W], got ", IntArrayRef(shape));
  Shape out = {shape[0], W.size(0), 0, 0};
  for (const auto i : c10::irange(2)) {
    TORCH_CHECK_VALUE(layer.stride[i] > 0 && layer.dilation[i] > 0 && layer.padding[i] >= 0, kOp, ": layer ", number,
                      " (conv2d) needs positive stride and dilation and no negative padding, got ", layer.stride[i],
                      ", ", layer.dilation[i], ", ", layer.padding[i]);
    const int64_t room = shape[2 + i] + 2 * layer.padding[i] - layer.dilation[i] * (W.size(2 + i) - 1) - 1;
    TORCH_CHECK_VALUE(room >= 0, kOp, ": layer ", number, " (conv2d) has a kernel larger than its padded input ",
                      IntArrayRef(shape));
    out[2 + i] = room / layer.stride[i] + 1;
  }
  return out;
}

Shape flatten_shape(const Layer& layer, const Shape& shape, int64_t number) {
  const auto dims = static_cast<int64_t>(shape.size());
  const int64_t start = layer.start < 0 ? layer.start + dims : layer.start;
  const int64_t end = layer.end < 0 ? layer.end + dims : layer.end;
  TORCH_CHECK_VALUE(start >= 1 && start <= end && end < dims, kOp, ": layer ", number,
                    " (flatten) must keep dimension 0, the batch, and stay within shape ", IntArrayRef(shape),
                    "; start_dim is ", layer.start, ", end_dim ", layer.end);
  Shape out(shape.begin(), shape.begin() + start);
  int64_t size = 1;
  for (int64_t i = start; i <= end; ++i) size *= shape[i];
  out.push_back(size);
  out.insert(out.end(), shape.begin() + end + 1, shape.end());
  return out;
}

// The shape of every layer's input, and of the output at the end.
std::vector<Shape> trace_shapes(const Critic& critic, IntArrayRef input) {
  std::vector<Shape> shapes = {input.vec()};
  for (const Layer& layer : critic.layers) {
    const Shape& shape = shapes.back();
    const auto number = static_cast<int64_t>(shapes.size()) - 1;
    shapes.push_back(layer.kind == Kind::linear    ? linear_shape(layer, shape, number)
                     : layer.kind == Kind::conv2d  ? conv2d_shape(layer, shape, number)
                     : layer.kind == Kind::flatten ? flatten_shape(layer, shape, number)
                                                   : shape);
  }
  return shapes;
}

int64_t product(IntArrayRef shape) {
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  return n;
}

// The shape of a chain above the last activation, where all samples are alike.
Shape one_sample(Shape shape) {
  shape[0] = 1;
  return shape;
}

// What all tensors inside the engine agree on: the dtype of the products and the memory format of images.
struct Frame {
  at::TensorOptions options;
  at::MemoryFormat images;

  Frame(const Tensor& x, at::ScalarType compute_dtype, bool channels_last)
      : options(x.options().dtype(compute_dtype)),
        images(channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous) {}

  at::MemoryFormat format(IntArrayRef shape) const { return shape.size() == 4 ? images : at::MemoryFormat::Contiguous; }
  Tensor arrange(const Tensor& t) const { return t.contiguous(format(t.sizes())); }
  Tensor enter(const Tensor& t) const { return arrange(t.to(options.dtype())); }
  Tensor empty(IntArrayRef shape) const { return at::empty(shape, options, format(shape)); }
  Tensor reshape(const Tensor& t, IntArrayRef shape) const { return arrange(t.reshape(shape)); }
};

Tensor rows(const Tensor& t) { return t.dim() == 2 ? t : t.reshape({-1, t.size(-1)}); }

// z = h W^T, without the bias.
Tensor linear(const Frame& frame, const Layer& layer, const Tensor& h, IntArrayRef out_shape) {
  return frame.arrange(at::mm(rows(h), layer.W.t()).view(out_shape));
}

Tensor conv2d(const Frame& frame, const Layer& layer, const Tensor& h, const Tensor& bias) {
  return frame.arrange(at::convolution(h, layer.W, bias.defined() ? std::optional<Tensor>(bias) : std::nullopt,
                                       layer.stride, layer.padding, layer.dilation, false, {0, 0}, layer.groups));
}

Tensor conv2d_input_gradient(const Frame& frame, const Layer& layer, const Tensor& u, IntArrayRef in_shape) {
  return frame.arrange(std::get<0>(
      at::convolution_backward(u, frame.empty(in_shape), layer.W, at::OptionalIntArrayRef(), layer.stride,
                               layer.padding, layer.dilation, false, {0, 0}, layer.groups, {true, false, false})));
}

Tensor conv2d_weight_gradient(const Layer& layer, const Tensor& u, const Tensor& v) {
  return std::get<1>(at::convolution_backward(u, v, layer.W, at::OptionalIntArrayRef(), layer.stride, layer.padding,
                                              layer.dilation, false, {0, 0}, layer.groups, {false, true, false}));
}

// Whether the activation at index follows a linear layer whose bias the kernel adds.
bool takes_bias(const Critic& critic, int64_t index, IntArrayRef shape) {
  return index > 0 && critic.layers[index - 1].kind == Kind::linear && shape.size() != 4;
}

// How an activation is laid out for the kernels: where they add a bias the columns are its features, elsewhere a row is
// a sample.
struct Matrix {
  int64_t rows, columns;

  Matrix(const Critic& critic, int64_t index, IntArrayRef shape) {
    const bool features = takes_bias(critic, index, shape);
    columns = features ? shape.back() : product(shape.slice(1));
    rows = features ? product(shape.slice(0, shape.size() - 1)) : shape[0];
  }
};

template <typename Call>
void with_kernels(const Tensor& t, const Call& call) {
  if (t.numel() == 0) return;
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

// The signs of z + bias; h, if defined, becomes the activation and may be z.
Tensor activate(const Layer& layer, Matrix size, const Tensor& z, const Tensor& bias, const Tensor& h) {
  Tensor signs = at::empty({size.rows, ceil_div(size.columns, 8)}, z.options().dtype(at::kByte));
  with_kernels(z, [&](const auto& kernels, Stream stream) {
    kernels.activate(input(z, kernels), input(bias, kernels), layer.slope, output(h, kernels),
                     signs.mutable_data_ptr<uint8_t>(), size.rows, size.columns, stream);
  });
  return signs;
}

// t times the layer's mask, in place unless t is the caller's or a single sample that stands for the whole batch.
Tensor mask(const Frame& frame, const Critic& critic, int64_t index, const Tensor& t, bool owned, const Tensor& signs,
            IntArrayRef shape) {
  const Layer& layer = critic.layers[index];
  const Matrix size(critic, index, shape);
  const Tensor out = owned && t.sizes() == shape ? t : frame.empty(shape);
  const int64_t in_rows = Matrix(critic, index, t.sizes()).rows;
  with_kernels(out, [&](const auto& kernels, Stream stream) {
    kernels.mask(input(t, kernels), in_rows, signs.const_data_ptr<uint8_t>(), layer.slope, output(out, kernels),
                 size.rows, size.columns, stream);
  });
  return out;
}

void check_inputs(const Tensor& x, TensorList parameters) {
  check_floating(kOp, "x", x);
  TORCH_CHECK_VALUE(x.dim() >= 2, kOp, ": x must have shape [B, ...] with at least 2 dimensions, got ", x.sizes());
  for (const Tensor& parameter : parameters) {
    check_same_device(kOp, "parameters", parameter, "x", x);
    check_floating(kOp, "parameters", parameter);
  }
}

// Converts the parameters to the dtype of the products; a kernel reads biases as they lie in memory.
void enter_parameters(const Frame& frame, Critic& critic) {
  for (Layer& layer : critic.layers) {
    if (!layer.weighted()) continue;
    if (layer.b.defined()) {
      check_shape(kOp, "a bias", layer.b, {layer.W.size(0)});
      layer.b = layer.b.to(frame.options.dtype()).contiguous();
    }
    layer.W = layer.W.to(frame.options.dtype());
  }
}

at::ScalarType gradient_dtype(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Below the autograd and autocast keys: at::mm and the convolutions must do what they are told.
struct Plain {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// Runs the critic up to its last activation and returns the signs at every activation.
std::vector<Tensor> forward_signs(const Frame& frame, const Critic& critic, const Tensor& x,
                                  const std::vector<Shape>& shapes) {
  std::vector<Tensor> signs;
  Tensor h = frame.enter(x), bias;
  bool owned = false;  // whether h may be overwritten
  for (int64_t i = 0; i <= critic.last_activation; ++i) {
    const Layer& layer = critic.layers[i];
    switch (layer.kind) {
      case Kind::linear:
        h = linear(frame, layer, h, shapes[i + 1]);
        owned = true;
        if (critic.layers[i + 1].kind == Kind::activation && takes_bias(critic, i + 1, shapes[i + 1]))
          bias = layer.b;
        else if (layer.b.defined())
          h.add_(layer.b);
        break;
      case Kind::conv2d:
        h = conv2d(frame, layer, h, layer.b);
        owned = true;
        break;
      case Kind::flatten:
        h = frame.reshape(h, shapes[i + 1]);
        break;
      case Kind::activation: {
        const bool last = i == critic.last_activation;
        const Tensor out = last ? Tensor() : owned ? h : frame.empty(shapes[i]);
        signs.push_back(activate(layer, Matrix(critic, i, shapes[i]), h, bias, out));
        h = out;
        bias = Tensor();
        owned = true;
        break;
      }
    }
  }
  return signs;
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> input_gradient_forward(
    const Tensor& x, TensorList parameters, IntArrayRef program, Slopes slopes, bool mean_outputs,
    at::ScalarType compute_dtype, bool channels_last) {
  check_inputs(x, parameters);
  Critic critic = read_program(parameters, program, slopes);
  const std::vector<Shape> shapes = trace_shapes(critic, x.sizes());
  const Plain plain;
  const Frame frame(x, compute_dtype, channels_last);
  enter_parameters(frame, critic);
  const std::vector<Tensor> signs = forward_signs(frame, critic, x, shapes);

  TORCH_CHECK_VALUE(product(shapes.back()) > 0 || x.numel() == 0, kOp,
                    ": the critic must return at least one score a sample, got shape ", IntArrayRef(shapes.back()));
  const Shape outputs = one_sample(shapes.back());
  Tensor u = frame.arrange(at::full(outputs, mean_outputs ? 1.0 / product(outputs) : 1.0, frame.options));
  std::vector<Tensor> chain(critic.weights);
  for (auto i = static_cast<int64_t>(critic.layers.size()) - 1; i >= 0; --i) {
    const Layer& layer = critic.layers[i];
    const Shape shape = i > critic.last_activation ? one_sample(shapes[i]) : shapes[i];
    switch (layer.kind) {
      case Kind::linear:
        chain[layer.weight] = u;
        u = frame.arrange(at::mm(rows(u), layer.W).view(shape));
        break;
      case Kind::conv2d:
        chain[layer.weight] = u;
        u = conv2d_input_gradient(frame, layer, u, shape);
        break;
      case Kind::flatten:
        u = frame.reshape(u, shape);
        break;
      case Kind::activation:
        u = mask(frame, critic, i, u, true, signs[layer.signs], shape);
        break;
    }
  }
  Tensor grad = u.expand(x.sizes()).to(gradient_dtype(x)).contiguous(x.suggest_memory_format());
  return {grad, signs, chain};
}

Tensor input_gradient(const Tensor& x, TensorList parameters, IntArrayRef program, Slopes slopes, bool mean_outputs,
                      at::ScalarType compute_dtype, bool channels_last) {
  return std::get<0>(
      input_gradient_forward(x, parameters, program, slopes, mean_outputs, compute_dtype, channels_last));
}

// The gradients of the weights (not the biases) whose indices are in `wanted`, which ascends.
std::vector<Tensor> input_gradient_backward(const Tensor& grad, TensorList parameters, TensorList signs,
                                            TensorList chain, IntArrayRef program, Slopes slopes,
                                            at::ScalarType compute_dtype, bool channels_last, IntArrayRef wanted) {
  constexpr char op[] = "critic_input_gradient_backward";
  Critic critic = read_program(parameters, program, slopes);
  const auto weights = static_cast<size_t>(critic.weights);
  TORCH_CHECK_VALUE(chain.size() == weights, op, ": chain must have one tensor a weight (", weights, "), got ",
                    chain.size());
  TORCH_CHECK_VALUE(signs.size() == static_cast<size_t>(critic.activations), op,
                    ": signs must have one tensor an activation (", critic.activations, "), got ", signs.size());
  const std::vector<Shape> shapes = trace_shapes(critic, grad.sizes());
  const Plain plain;
  const Frame frame(grad, compute_dtype, channels_last);
  std::vector<at::ScalarType> dtypes;
  for (const Layer& layer : critic.layers)
    if (layer.weighted()) dtypes.push_back(layer.W.scalar_type());
  enter_parameters(frame, critic);

  // The chain is linear in grad. In float16 it is carried scaled to entries of about 1, lest it underflow.
  Tensor scale;
  if (compute_dtype == at::kHalf)
    scale = at::linalg_vector_norm(grad, INFINITY).clamp(1e-30, 1e30).log2().floor().exp2();
  std::vector<Tensor> gradients;
  Tensor v = frame.enter(scale.defined() ? grad.div(scale) : grad);
  bool owned = false;
  if (critic.last_activation < 0) v = frame.arrange(v.sum(0, true));
  for (int64_t i = 0; gradients.size() < wanted.size(); ++i) {
    const Layer& layer = critic.layers[i];
    const Shape out_shape = i > critic.last_activation ? one_sample(shapes[i + 1]) : shapes[i + 1];
    if (layer.weighted() && layer.weight == wanted[gradients.size()]) {
      const Tensor& u = chain[layer.weight];
      Tensor gradient = layer.kind == Kind::linear ? at::mm(rows(u).t(), rows(v)) : conv2d_weight_gradient(layer, u, v);
      if (scale.defined()) gradient = gradient.to(scale.scalar_type()).mul(scale);
      gradients.push_back(gradient.to(dtypes[layer.weight]).contiguous(layer.W.suggest_memory_format()));
      if (gradients.size() == wanted.size()) break;
    }
    switch (layer.kind) {
      case Kind::linear:
        v = linear(frame, layer, v, out_shape);
        owned = true;
        break;
      case Kind::conv2d:
        v = conv2d(frame, layer, v, Tensor());
        owned = true;
        break;
      case Kind::flatten:
        v = frame.reshape(v, out_shape);
        break;
      case Kind::activation:
        v = mask(frame, critic, i, v, owned, signs[layer.signs], out_shape);
        owned = true;
        if (i == critic.last_activation) v = frame.arrange(v.sum(0, true));
        break;
    }
  }
  return gradients;
}

template <typename Signature>
auto typed_handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Positions in `parameters` of the weights, and of the biases of layers that an activation follows.
struct Places {
  std::vector<size_t> weights, bending_biases;
};

Places places(TensorList parameters, IntArrayRef program, Slopes slopes) {
  const Critic critic = read_program(parameters, program, slopes);
  Places result;
  size_t next = 0;
  for (const auto i : c10::irange(critic.layers.size())) {
    const Layer& layer = critic.layers[i];
    if (!layer.weighted()) continue;
    result.weights.push_back(next++);
    if (!layer.b.defined()) continue;
    if (static_cast<int64_t>(i) < critic.last_activation) result.bending_biases.push_back(next);
    ++next;
  }
  return result;
}

struct Program {
  IntArrayRef layers;
  Slopes slopes;
  bool mean_outputs;
  at::ScalarType compute_dtype;
  bool channels_last;
};

// Only the gradient is an output; signs and chain are saved though they are not, which is sound because the backward
// refuses to be differentiated.
struct InputGradient : torch::autograd::Function<InputGradient> {
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;

  static Tensor forward(Context* ctx, const Tensor& x, TensorList parameters, const Program& program) {
    static const auto op = typed_handle<decltype(input_gradient_forward)>("wgan_ext::critic_input_gradient_forward");
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [grad, signs, chain] = op.call(x, parameters, program.layers, program.slopes, program.mean_outputs,
                                        program.compute_dtype, program.channels_last);
    Variables saved = parameters.vec();
    saved.insert(saved.end(), signs.begin(), signs.end());
    saved.insert(saved.end(), chain.begin(), chain.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["parameters"] = static_cast<int64_t>(parameters.size());
    ctx->saved_data["program"] = program.layers;
    ctx->saved_data["slopes"] = program.slopes;
    ctx->saved_data["compute_dtype"] = program.compute_dtype;
    ctx->saved_data["channels_last"] = program.channels_last;
    return grad;
  }

  static Variables backward(Context* ctx, const Variables& grads) {
    static const auto op = typed_handle<decltype(input_gradient_backward)>("wgan_ext::critic_input_gradient_backward");
    const Variables saved = ctx->get_saved_variables();
    const TensorList all(saved);
    const std::vector<int64_t> program = ctx->saved_data["program"].toIntVector();
    const std::vector<double> slopes = ctx->saved_data["slopes"].toDoubleVector();
    const at::ScalarType compute_dtype = ctx->saved_data["compute_dtype"].toScalarType();
    const bool channels_last = ctx->saved_data["channels_last"].toBool();
    const size_t count = ctx->saved_data["parameters"].toInt();
    const TensorList parameters = all.slice(0, count), signs = all.slice(count, slopes.size()),
                     chain = all.slice(count + slopes.size());
    const Places place = places(parameters, program, slopes);

    // As autograd does: what moves a sign gets zeros, what does not reach the gradient gets none.
    Variables result(count + 2);
    if (!slopes.empty() && ctx->needs_input_grad(0)) result[0] = at::zeros_like(grads[0]);
    for (const size_t i : place.bending_biases)
      if (ctx->needs_input_grad(i + 1)) result[i + 1] = at::zeros_like(parameters[i]);
    Shape wanted;
    for (const auto i : c10::irange(place.weights.size()))
      if (ctx->needs_input_grad(place.weights[i] + 1)) wanted.push_back(static_cast<int64_t>(i));
    const std::vector<Tensor> gradients =
        op.call(grads[0], parameters, signs, chain, program, slopes, compute_dtype, channels_last, wanted);
    for (const auto i : c10::irange(wanted.size())) result[place.weights[wanted[i]] + 1] = gradients[i];
    return result;
  }
};

// Lets the adjoint chain run with create_graph=True and refuses only when it is itself differentiated.
struct Once : torch::autograd::Function<Once> {
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;

  template <typename Call>
  static Variables forward(Context*, const Tensor&, TensorList, const Call& call) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call();
  }

  static Variables backward(Context*, const Variables&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, kOp,
                                " is differentiable once: for a second derivative of the input gradient use "
                                "engine=\"autograd\"");
  }
};

std::vector<Tensor> input_gradient_backward_autograd(const Tensor& grad, TensorList parameters, TensorList signs,
                                                     TensorList chain, IntArrayRef program, Slopes slopes,
                                                     at::ScalarType compute_dtype, bool channels_last,
                                                     IntArrayRef wanted) {
  static const auto op = typed_handle<decltype(input_gradient_backward)>("wgan_ext::critic_input_gradient_backward");
  return Once::apply(grad, parameters, [&] {
    return op.call(grad, parameters, signs, chain, program, slopes, compute_dtype, channels_last, wanted);
  });
}

Tensor input_gradient_autograd(const Tensor& x, TensorList parameters, IntArrayRef program, Slopes slopes,
                               bool mean_outputs, at::ScalarType compute_dtype, bool channels_last) {
  return InputGradient::apply(x, parameters, Program{program, slopes, mean_outputs, compute_dtype, channels_last});
}

template <typename Library>
void implement(Library& m) {
  m.impl("critic_input_gradient", &input_gradient);
  m.impl("critic_input_gradient_forward", &input_gradient_forward);
  m.impl("critic_input_gradient_backward", &input_gradient_backward);
}

TORCH_LIBRARY_IMPL(wgan_ext, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(wgan_ext, CUDA, m) { implement(m); }
TORCH_LIBRARY_IMPL(wgan_ext, Autograd, m) {
  m.impl("critic_input_gradient", &input_gradient_autograd);
  m.impl("critic_input_gradient_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("critic_input_gradient_backward", &input_gradient_backward_autograd);
}

}  // namespace
}  // namespace wgan_ext::critic
