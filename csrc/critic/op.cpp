// The operator `critic`: the scores of a critic and their gradient with respect to its input, differentiable once.
// engine.h says how, docs/how_it_works.md what a program is.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/irange.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../checks.h"
#include "engine.h"

namespace wgan_ext::critic {
namespace {

using OptionalTensor = const std::optional<Tensor>&;

// Below the autograd and autocast keys: products and convolutions must do what they are told.
struct Plain {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

Rows check_inputs(TensorList x, TensorList parameters, int64_t scored, int64_t first, int64_t count) {
  TORCH_CHECK_VALUE(!x.empty(), kOp, ": x must hold at least one tensor");
  for (const Tensor& t : x) {
    check_floating(kOp, "x", t);
    check_same_device(kOp, "x", t, "its first tensor", x[0]);
    check_same_dtype(kOp, "x", t, "its first tensor", x[0]);
    TORCH_CHECK_VALUE(t.dim() >= 1 && t.size(0) == x[0].size(0), kOp,
                      ": x must hold tensors of one batch size, got shapes ", x[0].sizes(), " and ", t.sizes());
  }
  for (const Tensor& parameter : parameters) {
    check_same_device(kOp, "parameters", parameter, "x", x[0]);
    check_floating(kOp, "parameters", parameter);
  }
  const int64_t rows = x[0].size(0);
  const bool within = scored >= 0 && scored <= rows && first >= 0 && count >= 0 && first + count <= rows;
  TORCH_CHECK_VALUE(within && (scored == rows || (scored == first && first + count == rows)), kOp,
                    ": scored and points must cover the ", rows, " rows of x, got ", scored, " scored and points ",
                    first, " to ", first + count);
  return {first, count, rows};
}

std::tuple<Tensor, Tensors, Tensors> run(TensorList x, TensorList parameters, IntArrayRef program, Scalars scalars,
                                         bool mean_outputs, int64_t scored, int64_t first, int64_t count,
                                         at::ScalarType compute_dtype, bool channels_last, bool keep) {
  const Rows points = check_inputs(x, parameters, scored, first, count);
  const Plain plain;
  Engine engine(x, parameters, program, scalars, scored, points, compute_dtype, channels_last);
  auto [scores, gradients] = engine.forward(x, mean_outputs, keep);
  return {scores, gradients, keep ? engine.packed() : Tensors()};
}

std::tuple<Tensor, Tensors> critic(TensorList x, TensorList parameters, IntArrayRef program, Scalars scalars,
                                   bool mean_outputs, int64_t scored, int64_t first, int64_t count,
                                   at::ScalarType compute_dtype, bool channels_last) {
  auto [scores, gradients, kept] =
      run(x, parameters, program, scalars, mean_outputs, scored, first, count, compute_dtype, channels_last, false);
  return {scores, gradients};
}

std::tuple<Tensor, Tensors, Tensors> critic_forward(TensorList x, TensorList parameters, IntArrayRef program,
                                                    Scalars scalars, bool mean_outputs, int64_t scored, int64_t first,
                                                    int64_t count, at::ScalarType compute_dtype, bool channels_last) {
  return run(x, parameters, program, scalars, mean_outputs, scored, first, count, compute_dtype, channels_last, true);
}

// The gradients of the wanted parameters and, with of_x, of x.
Tensors critic_backward(OptionalTensor grad_scores, TensorList grad_gradients, TensorList x, TensorList parameters,
                        TensorList kept, IntArrayRef program, Scalars scalars, int64_t scored, int64_t first,
                        int64_t count, at::ScalarType compute_dtype, bool channels_last, IntArrayRef wanted,
                        bool of_x) {
  const Rows points = check_inputs(x, parameters, scored, first, count);
  TORCH_CHECK_VALUE(grad_gradients.empty() || grad_gradients.size() == x.size(), kOp,
                    ": grad_gradients must be as many as x (", x.size(), ") or none, got ", grad_gradients.size());
  TORCH_CHECK_VALUE(grad_scores || !grad_gradients.empty(), kOp, ": backward needs a cotangent");
  if (grad_scores) check_shape(kOp, "grad_scores", *grad_scores, {scored});
  for (const auto i : c10::irange(grad_gradients.size())) {
    Shape shape = x[i].sizes().vec();
    shape[0] = count;
    check_shape(kOp, "grad_gradients", grad_gradients[i], shape);
  }
  const Plain plain;
  Engine engine(x, parameters, program, scalars, scored, points, compute_dtype, channels_last);
  engine.unpack(kept);
  Engine::Backward result = engine.backward(grad_scores.value_or(Tensor()), grad_gradients, wanted, of_x);
  result.parameters.insert(result.parameters.end(), result.x.begin(), result.x.end());
  return result.parameters;
}

template <typename Signature>
auto typed_handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

struct Options {
  IntArrayRef program;
  Scalars scalars;
  bool mean_outputs;
  int64_t scored, first, count;
  at::ScalarType compute_dtype;
  bool channels_last;
};

// What it keeps of the forward pass is no output, which is sound because the backward refuses to be differentiated.
struct Critic : torch::autograd::Function<Critic> {
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;

  static Variables forward(Context* ctx, TensorList x, TensorList parameters, const Options& o) {
    static const auto op = typed_handle<decltype(critic_forward)>("wgan_ext::critic_forward");
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [scores, gradients, kept] = op.call(x, parameters, o.program, o.scalars, o.mean_outputs, o.scored, o.first,
                                             o.count, o.compute_dtype, o.channels_last);
    ctx->set_materialize_grads(false);
    Variables saved = x.vec();
    saved.insert(saved.end(), parameters.begin(), parameters.end());
    saved.insert(saved.end(), kept.begin(), kept.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["sizes"] =
        Shape{static_cast<int64_t>(x.size()), static_cast<int64_t>(parameters.size()), o.scored, o.first, o.count};
    ctx->saved_data["program"] = o.program;
    ctx->saved_data["scalars"] = o.scalars;
    ctx->saved_data["compute_dtype"] = o.compute_dtype;
    ctx->saved_data["channels_last"] = o.channels_last;
    Variables outputs = {scores};
    outputs.insert(outputs.end(), gradients.begin(), gradients.end());
    return outputs;
  }

  static Variables backward(Context* ctx, const Variables& grads) {
    static const auto op = typed_handle<decltype(critic_backward)>("wgan_ext::critic_backward");
    const Variables saved = ctx->get_saved_variables();
    const Shape sizes = ctx->saved_data["sizes"].toIntVector();
    const size_t inputs = sizes[0], count = sizes[1];
    const TensorList all(saved), x = all.slice(0, inputs), parameters = all.slice(inputs, count),
                                 kept = all.slice(inputs + count);
    const Shape program = ctx->saved_data["program"].toIntVector();
    const std::vector<double> scalars = ctx->saved_data["scalars"].toDoubleVector();
    const auto dtype = ctx->saved_data["compute_dtype"].toScalarType();
    const Rows points{sizes[3], sizes[4], x[0].size(0)};
    const Engine engine(x, parameters, program, scalars, sizes[2], points, dtype, false);

    Variables grad_gradients(grads.begin() + 1, grads.end());
    bool penalised = false;
    for (const Tensor& grad : grad_gradients) penalised = penalised || (grad.defined() && points.count);
    for (const auto i : c10::irange(inputs))
      if (penalised && !grad_gradients[i].defined())
        grad_gradients[i] = at::zeros_like(x[i]).narrow(0, points.first, points.count);
    if (!penalised) grad_gradients.clear();
    const bool scored = grads[0].defined() && sizes[2];
    const std::optional<Tensor> grad_scores = scored ? std::optional<Tensor>(grads[0]) : std::nullopt;

    // As autograd does: what only moves a sign gets zeros, what does not reach the gradient gets none.
    Variables result(inputs + count + 1);
    Shape wanted;
    for (const auto i : c10::irange(count)) {
      if (!ctx->needs_input_grad(inputs + i)) continue;
      if (engine.moves(static_cast<int64_t>(i)))
        wanted.push_back(static_cast<int64_t>(i));
      else if (engine.reaches(static_cast<int64_t>(i)))
        result[inputs + i] = at::zeros_like(parameters[i]);
    }
    bool of_x = false;
    for (const auto i : c10::irange(inputs)) of_x = of_x || ctx->needs_input_grad(i);
    TORCH_CHECK_NOT_IMPLEMENTED(!of_x || sizes[2] == 0, kOp, ": x cannot be differentiated where it is scored");
    const bool curved = of_x && engine.curved();
    Variables computed;
    if (scored || penalised) {
      computed = op.call(grad_scores, grad_gradients, x, parameters, kept, program, scalars, sizes[2], points.first,
                         points.count, dtype, ctx->saved_data["channels_last"].toBool(), wanted, curved);
    } else {  // nothing that the loss depends on has rows
      for (const int64_t i : wanted) computed.push_back(at::zeros_like(parameters[i]));
      if (curved)
        for (const Tensor& t : x) computed.push_back(at::zeros_like(t));
    }
    for (const auto i : c10::irange(wanted.size())) result[inputs + wanted[i]] = computed[i];
    for (const auto i : c10::irange(inputs)) {
      if (!ctx->needs_input_grad(i)) continue;
      if (curved)
        result[i] = computed[wanted.size() + i];
      else if (engine.bends_input())
        result[i] = at::zeros_like(x[i]);
    }
    return result;
  }
};

// Lets the backward run with create_graph=True and refuses only when it is itself differentiated.
struct Once : torch::autograd::Function<Once> {
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;

  template <typename Call>
  static Variables forward(Context*, TensorList, TensorList, const Call& call) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call();
  }

  static Variables backward(Context*, const Variables&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, kOp,
                                " is differentiable once: for a second derivative of the input gradient use "
                                "engine=\"autograd\"");
  }
};

Tensors critic_backward_autograd(OptionalTensor grad_scores, TensorList grad_gradients, TensorList x,
                                 TensorList parameters, TensorList kept, IntArrayRef program, Scalars scalars,
                                 int64_t scored, int64_t first, int64_t count, at::ScalarType compute_dtype,
                                 bool channels_last, IntArrayRef wanted, bool of_x) {
  static const auto op = typed_handle<decltype(critic_backward)>("wgan_ext::critic_backward");
  Tensors grads = grad_gradients.vec();
  if (grad_scores) grads.push_back(*grad_scores);
  return Once::apply(TensorList(grads), parameters, [&] {
    return op.call(grad_scores, grad_gradients, x, parameters, kept, program, scalars, scored, first, count,
                   compute_dtype, channels_last, wanted, of_x);
  });
}

std::tuple<Tensor, Tensors> critic_autograd(TensorList x, TensorList parameters, IntArrayRef program, Scalars scalars,
                                            bool mean_outputs, int64_t scored, int64_t first, int64_t count,
                                            at::ScalarType compute_dtype, bool channels_last) {
  Tensors outputs = Critic::apply(
      x, parameters, Options{program, scalars, mean_outputs, scored, first, count, compute_dtype, channels_last});
  return {outputs[0], Tensors(outputs.begin() + 1, outputs.end())};
}

template <typename Library>
void implement(Library& m) {
  m.impl("critic", &critic);
  m.impl("critic_forward", &critic_forward);
  m.impl("critic_backward", &critic_backward);
}

TORCH_LIBRARY_IMPL(wgan_ext, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(wgan_ext, CUDA, m) { implement(m); }
TORCH_LIBRARY_IMPL(wgan_ext, Meta, m) { implement(m); }
TORCH_LIBRARY_IMPL(wgan_ext, Autograd, m) {
  m.impl("critic", &critic_autograd);
  m.impl("critic_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("critic_backward", &critic_backward_autograd);
}

}  // namespace
}  // namespace wgan_ext::critic
