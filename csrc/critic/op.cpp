// The operators `critic`, the scores of a critic and their gradient with respect to its input, and `critic_loss`, a
// loss made of both; each is differentiable once. engine.h says how, docs/how_it_works.md what a program is.
#define AT_PER_OPERATOR_HEADERS  // before ATen/TensorOperators.h, which else includes every operator
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/dot.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/hypot.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/irange.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>
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

struct Options {
  IntArrayRef program;
  Scalars scalars;
  bool mean_outputs;
  int64_t scored, first, count;
  at::ScalarType compute_dtype;
  bool channels_last;
};

Rows check_inputs(TensorList x, TensorList parameters, const Options& o) {
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
  const bool within = o.scored >= 0 && o.scored <= rows && o.first >= 0 && o.count >= 0 && o.first + o.count <= rows;
  TORCH_CHECK_VALUE(within && (o.scored == rows || (o.scored == o.first && o.first + o.count == rows)), kOp,
                    ": scored and points must cover the ", rows, " rows of x, got ", o.scored, " scored and points ",
                    o.first, " to ", o.first + o.count);
  return {o.first, o.count, rows};
}

// Scores and gradients, and what the backward pass needs besides, if `keep`.
std::tuple<Engine::Forward, Tensors> evaluate(TensorList x, TensorList parameters, const Options& o, bool keep) {
  const Rows points = check_inputs(x, parameters, o);
  const Plain plain;
  Engine engine(x, parameters, o.program, o.scalars, o.scored, points, o.compute_dtype, o.channels_last);
  Engine::Forward result = engine.forward(x, o.mean_outputs, keep);
  return {std::move(result), keep ? engine.packed() : Tensors()};
}

std::tuple<Tensor, Tensors> critic(TensorList x, TensorList parameters, IntArrayRef program, Scalars scalars,
                                   bool mean_outputs, int64_t scored, int64_t first, int64_t count,
                                   at::ScalarType compute_dtype, bool channels_last) {
  const Options options{program, scalars, mean_outputs, scored, first, count, compute_dtype, channels_last};
  auto [result, kept] = evaluate(x, parameters, options, false);
  return {result.scores, result.gradients};
}

std::tuple<Tensor, Tensors, Tensors> critic_forward(TensorList x, TensorList parameters, IntArrayRef program,
                                                    Scalars scalars, bool mean_outputs, int64_t scored, int64_t first,
                                                    int64_t count, at::ScalarType compute_dtype, bool channels_last) {
  const Options options{program, scalars, mean_outputs, scored, first, count, compute_dtype, channels_last};
  auto [result, kept] = evaluate(x, parameters, options, true);
  return {result.scores, result.gradients, kept};
}

// The gradients of the wanted parameters and, with of_x, of x.
Tensors critic_backward(OptionalTensor grad_scores, TensorList grad_gradients, TensorList x, TensorList parameters,
                        TensorList kept, IntArrayRef program, Scalars scalars, int64_t scored, int64_t first,
                        int64_t count, at::ScalarType compute_dtype, bool channels_last, IntArrayRef wanted,
                        bool of_x) {
  const Options options{program, scalars, false, scored, first, count, compute_dtype, channels_last};
  const Rows points = check_inputs(x, parameters, options);
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

// What critic_loss makes of scores, of which the first `real` are those of real samples, and of gradients.
struct Loss {
  int64_t real;
  double weight;
  Penalty penalty;
};

void check_loss(const Options& o, const Loss& l) {
  TORCH_CHECK_VALUE(o.scored == 0 || (l.real > 0 && l.real < o.scored), kLossOp, ": real must be from 1 to ",
                    o.scored - 1, ", of ", o.scored, " scored, got ", l.real);
  TORCH_CHECK_VALUE(o.count > 0, kLossOp, ": count must be at least 1, got ", o.count);
  TORCH_CHECK_VALUE(std::isfinite(l.weight), kLossOp, ": weight must be finite, got ", l.weight);
  TORCH_CHECK_VALUE(std::isfinite(l.penalty.target), kLossOp, ": target must be finite, got ", l.penalty.target);
  TORCH_CHECK_VALUE(l.penalty.power >= 1 && std::isfinite(l.penalty.power), kLossOp,
                    ": power must be at least 1 and finite, got ", l.penalty.power);
}

// t [samples] to multiply what has so many samples and dimensions.
Tensor per_sample(const Tensor& t, int64_t dims) {
  Shape shape(dims, 1);
  shape[0] = -1;
  return t.view(shape);
}

// The 2-norm of each sample's gradient, over all inputs.
Tensor norms_of(const Tensors& gradients) {
  Tensor norms;
  for (const Tensor& gradient : gradients) {
    const Tensor part = norms_of_samples(gradient);
    norms = norms.defined() ? at::hypot(norms, part) : part;
  }
  return norms;
}

// The results of critic_loss, and the derivatives of the loss with respect to scores and gradients.
struct Evaluated {
  Tensor loss, penalty, scores, norms, of_scores;
  Tensors of_gradients;
};

Evaluated apply(const Loss& l, const Engine::Forward& critic, bool differentiate) {
  const int64_t scored = critic.scores.size(0), real = l.real, fake = scored - real;
  Evaluated e;
  e.scores = critic.scores;
  e.norms = norms_of(critic.gradients);
  const Penalized penalized = penalize(e.norms, l.penalty, l.weight, differentiate);
  e.penalty = penalized.value;
  e.loss = penalized.loss;
  e.of_scores = at::empty_like(e.scores);
  if (scored) {
    e.of_scores.narrow(0, 0, real).fill_(-1.0 / static_cast<double>(real));
    e.of_scores.narrow(0, real, fake).fill_(1.0 / static_cast<double>(fake));
    e.loss.add_(at::dot(e.scores, e.of_scores));
  }
  if (!differentiate) return e;

  for (const Tensor& gradient : critic.gradients)
    e.of_gradients.push_back(gradient * per_sample(penalized.slopes, gradient.dim()));
  return e;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> critic_loss(TensorList x, TensorList parameters, IntArrayRef program,
                                                       Scalars scalars, bool mean_outputs, int64_t real, int64_t scored,
                                                       int64_t first, int64_t count, at::ScalarType compute_dtype,
                                                       bool channels_last, double weight, double target, bool one_sided,
                                                       double power) {
  const Options options{program, scalars, mean_outputs, scored, first, count, compute_dtype, channels_last};
  const Loss loss{real, weight, {target, one_sided, power}};
  check_loss(options, loss);
  const auto [critic, kept] = evaluate(x, parameters, options, false);
  const Plain plain;
  const Evaluated e = apply(loss, critic, false);
  return {e.loss, e.penalty, e.scores, e.norms};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensors, Tensors> critic_loss_forward(
    TensorList x, TensorList parameters, IntArrayRef program, Scalars scalars, bool mean_outputs, int64_t real,
    int64_t scored, int64_t first, int64_t count, at::ScalarType compute_dtype, bool channels_last, double weight,
    double target, bool one_sided, double power) {
  const Options options{program, scalars, mean_outputs, scored, first, count, compute_dtype, channels_last};
  const Loss loss{real, weight, {target, one_sided, power}};
  check_loss(options, loss);
  const auto [critic, kept] = evaluate(x, parameters, options, true);
  const Plain plain;
  const Evaluated e = apply(loss, critic, true);
  return {e.loss, e.penalty, e.scores, e.norms, e.of_scores, e.of_gradients, kept};
}

template <typename Signature>
auto typed_handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using Context = torch::autograd::AutogradContext;
using Variables = torch::autograd::variable_list;

// What a node keeps from its forward to its backward pass. What the engine kept is no output, which is sound because
// the backward refuses to be differentiated.
struct Saved {
  Variables tensors;
  size_t extra, inputs, parameters;
  Shape program;
  std::vector<double> scalars;
  Options options;

  // `extra` are tensors that only the node knows.
  static void save(Context* ctx, const Tensors& extra, TensorList x, TensorList parameters, const Tensors& kept,
                   const Options& o) {
    Variables tensors = extra;
    tensors.reserve(extra.size() + x.size() + parameters.size() + kept.size());
    tensors.insert(tensors.end(), x.begin(), x.end());
    tensors.insert(tensors.end(), parameters.begin(), parameters.end());
    tensors.insert(tensors.end(), kept.begin(), kept.end());
    ctx->save_for_backward(std::move(tensors));
    ctx->saved_data["sizes"] = Shape{static_cast<int64_t>(extra.size()),
                                     static_cast<int64_t>(x.size()),
                                     static_cast<int64_t>(parameters.size()),
                                     o.scored,
                                     o.first,
                                     o.count};
    ctx->saved_data["program"] = o.program;
    ctx->saved_data["scalars"] = o.scalars;
    ctx->saved_data["compute_dtype"] = o.compute_dtype;
    ctx->saved_data["channels_last"] = o.channels_last;
    ctx->set_materialize_grads(false);
  }

  explicit Saved(Context* ctx)
      : tensors(ctx->get_saved_variables()),
        program(ctx->saved_data["program"].toIntVector()),
        scalars(ctx->saved_data["scalars"].toDoubleVector()) {
    const Shape sizes = ctx->saved_data["sizes"].toIntVector();
    extra = sizes[0];
    inputs = sizes[1];
    parameters = sizes[2];
    options = {program,
               scalars,
               false,
               sizes[3],
               sizes[4],
               sizes[5],
               ctx->saved_data["compute_dtype"].toScalarType(),
               ctx->saved_data["channels_last"].toBool()};
  }

  // The gradients of x and parameters, undefined where there is none.
  Variables differentiate(Context* ctx, OptionalTensor grad_scores, TensorList grad_gradients) const {
    static const auto op = typed_handle<decltype(critic_backward)>("wgan_ext::critic_backward");
    const TensorList all = TensorList(tensors).slice(extra), x = all.slice(0, inputs),
                     given = all.slice(inputs, parameters), kept = all.slice(inputs + parameters);
    const Options& o = options;
    const auto critic = Program::read(x, given, program, scalars);

    // As autograd does: what only moves a sign gets zeros, what does not reach the gradient gets none.
    Variables result(inputs + parameters);
    Shape wanted;
    for (const auto i : c10::irange(parameters)) {
      if (!ctx->needs_input_grad(inputs + i)) continue;
      if (critic->moves(static_cast<int64_t>(i), o.scored > 0))
        wanted.push_back(static_cast<int64_t>(i));
      else if (critic->reaches(static_cast<int64_t>(i), o.scored > 0))
        result[inputs + i] = at::zeros_like(given[i]);
    }
    bool of_x = false;
    for (const auto i : c10::irange(inputs)) of_x = of_x || ctx->needs_input_grad(i);
    TORCH_CHECK_NOT_IMPLEMENTED(!of_x || o.scored == 0, kOp, ": x cannot be differentiated where it is scored");
    const bool curved = of_x && critic->curved;
    Variables computed;
    if (grad_scores || !grad_gradients.empty()) {
      computed = op.call(grad_scores, grad_gradients, x, given, kept, program, scalars, o.scored, o.first, o.count,
                         o.compute_dtype, o.channels_last, wanted, curved);
    } else {  // nothing that the loss depends on has rows
      for (const int64_t i : wanted) computed.push_back(at::zeros_like(given[i]));
      if (curved)
        for (const Tensor& t : x) computed.push_back(at::zeros_like(t));
    }
    for (const auto i : c10::irange(wanted.size())) result[inputs + wanted[i]] = computed[i];
    for (const auto i : c10::irange(inputs)) {
      if (!ctx->needs_input_grad(i)) continue;
      if (curved)
        result[i] = computed[wanted.size() + i];
      else if (critic->bends_input())
        result[i] = at::zeros_like(x[i]);
    }
    return result;
  }
};

struct Critic : torch::autograd::Function<Critic> {
  static Variables forward(Context* ctx, TensorList x, TensorList parameters, const Options& o) {
    static const auto op = typed_handle<decltype(critic_forward)>("wgan_ext::critic_forward");
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [scores, gradients, kept] = op.call(x, parameters, o.program, o.scalars, o.mean_outputs, o.scored, o.first,
                                             o.count, o.compute_dtype, o.channels_last);
    Saved::save(ctx, {}, x, parameters, kept, o);
    Variables outputs = {scores};
    outputs.insert(outputs.end(), gradients.begin(), gradients.end());
    return outputs;
  }

  static Variables backward(Context* ctx, const Variables& grads) {
    const Saved saved(ctx);
    Variables grad_gradients(grads.begin() + 1, grads.end());
    bool penalised = false;
    for (const Tensor& grad : grad_gradients) penalised = penalised || (grad.defined() && saved.options.count);
    for (const auto i : c10::irange(saved.inputs))
      if (penalised && !grad_gradients[i].defined())
        grad_gradients[i] = at::zeros_like(saved.tensors[i]).narrow(0, saved.options.first, saved.options.count);
    if (!penalised) grad_gradients.clear();
    const bool scored = grads[0].defined() && saved.options.scored;
    Variables result = saved.differentiate(ctx, scored ? std::optional(grads[0]) : std::nullopt, grad_gradients);
    result.emplace_back();  // options
    return result;
  }
};

// The loss is linear in the derivatives that its forward pass left, so that backward only scales them.
struct CriticLoss : torch::autograd::Function<CriticLoss> {
  static Variables forward(Context* ctx, TensorList x, TensorList parameters, const Options& o, const Loss& l) {
    static const auto op = typed_handle<decltype(critic_loss_forward)>("wgan_ext::critic_loss_forward");
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, penalty, scores, norms, of_scores, derivatives, kept] =
        op.call(x, parameters, o.program, o.scalars, o.mean_outputs, l.real, o.scored, o.first, o.count,
                o.compute_dtype, o.channels_last, l.weight, l.penalty.target, l.penalty.one_sided, l.penalty.power);
    derivatives.push_back(of_scores);
    Saved::save(ctx, derivatives, x, parameters, kept, o);
    ctx->mark_non_differentiable({penalty, scores, norms});
    return {loss, penalty, scores, norms};
  }

  static Variables backward(Context* ctx, const Variables& grads) {
    const Saved saved(ctx);
    Variables scaled;
    for (const auto i : c10::irange(saved.extra)) scaled.push_back(saved.tensors[i] * grads[0]);
    const Tensor of_scores = scaled.back();
    scaled.pop_back();
    Variables result = saved.differentiate(ctx, saved.options.scored ? std::optional(of_scores) : std::nullopt, scaled);
    result.resize(result.size() + 2);  // options and loss
    return result;
  }
};

// Lets the backward run with create_graph=True and refuses only when it is itself differentiated.
struct Once : torch::autograd::Function<Once> {
  template <typename Call>
  static Variables forward(Context*, TensorList, TensorList, const Call& call) {
    return call();
  }

  static Variables backward(Context*, const Variables&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, kOp,
                                " is differentiable once: for a second derivative of the input gradient, or of a "
                                "penalty on it, use engine=\"autograd\"");
  }
};

Tensors critic_backward_autograd(OptionalTensor grad_scores, TensorList grad_gradients, TensorList x,
                                 TensorList parameters, TensorList kept, IntArrayRef program, Scalars scalars,
                                 int64_t scored, int64_t first, int64_t count, at::ScalarType compute_dtype,
                                 bool channels_last, IntArrayRef wanted, bool of_x) {
  static const auto op = typed_handle<decltype(critic_backward)>("wgan_ext::critic_backward");
  const auto call = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(grad_scores, grad_gradients, x, parameters, kept, program, scalars, scored, first, count,
                   compute_dtype, channels_last, wanted, of_x);
  };
  if (!at::GradMode::is_enabled()) return call();
  Tensors grads = grad_gradients.vec();
  if (grad_scores) grads.push_back(*grad_scores);
  return Once::apply(TensorList(grads), parameters, call);
}

std::tuple<Tensor, Tensors> critic_autograd(TensorList x, TensorList parameters, IntArrayRef program, Scalars scalars,
                                            bool mean_outputs, int64_t scored, int64_t first, int64_t count,
                                            at::ScalarType compute_dtype, bool channels_last) {
  const Options options{program, scalars, mean_outputs, scored, first, count, compute_dtype, channels_last};
  Tensors outputs = Critic::apply(x, parameters, options);
  return {outputs[0], Tensors(outputs.begin() + 1, outputs.end())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> critic_loss_autograd(TensorList x, TensorList parameters,
                                                                IntArrayRef program, Scalars scalars, bool mean_outputs,
                                                                int64_t real, int64_t scored, int64_t first,
                                                                int64_t count, at::ScalarType compute_dtype,
                                                                bool channels_last, double weight, double target,
                                                                bool one_sided, double power) {
  for (const Tensor& t : x)
    TORCH_CHECK_NOT_IMPLEMENTED(!(t.requires_grad() && at::GradMode::is_enabled()), kLossOp,
                                ": x cannot be differentiated: detach it, or use engine=\"autograd\"");
  const Options options{program, scalars, mean_outputs, scored, first, count, compute_dtype, channels_last};
  const Loss loss{real, weight, {target, one_sided, power}};
  const Tensors outputs = CriticLoss::apply(x, parameters, options, loss);
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

// An operator on meta tensors, which torch.compile may give symbolic sizes: a program holds numbers, so that each size
// becomes a number too, and another one compiles anew.
template <auto op>
struct OnMeta;
template <typename Result, typename... Args, Result (*op)(Args...)>
struct OnMeta<op> {
  static Tensor concrete(const Tensor& t) { return at::empty_strided(t.sizes(), t.strides(), t.options()); }
  static Tensors concrete(TensorList list) {
    Tensors result;
    for (const Tensor& t : list) result.push_back(concrete(t));
    return result;
  }
  static std::optional<Tensor> concrete(OptionalTensor t) { return t ? std::optional(concrete(*t)) : std::nullopt; }
  template <typename T>
  static T concrete(const T& other) {
    return other;
  }
  static Result call(Args... args) { return op(concrete(args)...); }
};

template <template <auto> typename On, typename Library>
void implement(Library& m) {
  m.impl("critic", On<&critic>::call);
  m.impl("critic_forward", On<&critic_forward>::call);
  m.impl("critic_backward", On<&critic_backward>::call);
  m.impl("critic_loss", On<&critic_loss>::call);
  m.impl("critic_loss_forward", On<&critic_loss_forward>::call);
}

template <auto op>
struct OnDevice {
  static constexpr auto call = op;
};

TORCH_LIBRARY_IMPL(wgan_ext, CPU, m) { implement<OnDevice>(m); }
TORCH_LIBRARY_IMPL(wgan_ext, CUDA, m) { implement<OnDevice>(m); }
TORCH_LIBRARY_IMPL(wgan_ext, Meta, m) { implement<OnMeta>(m); }
TORCH_LIBRARY_IMPL(wgan_ext, Autograd, m) {
  m.impl("critic", &critic_autograd);
  m.impl("critic_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("critic_backward", &critic_backward_autograd);
  m.impl("critic_loss", &critic_loss_autograd);
  m.impl("critic_loss_forward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace
}  // namespace wgan_ext::critic
