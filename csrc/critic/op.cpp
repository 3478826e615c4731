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
#include <c10/core/impl/TorchDispatchModeTLS.h>
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

Engine engine_for(TensorList x, TensorList parameters, const Options& o) {
  const Rows points = check_inputs(x, parameters, o);
  return Engine(x, parameters, o.program, o.scalars, o.scored, points, o.compute_dtype, o.channels_last);
}

std::tuple<Tensor, Tensors> critic(TensorList x, TensorList parameters, IntArrayRef program, Scalars scalars,
                                   bool mean_outputs, int64_t scored, int64_t first, int64_t count,
                                   at::ScalarType compute_dtype, bool channels_last) {
  const Options options{program, scalars, mean_outputs, scored, first, count, compute_dtype, channels_last};
  const Plain plain;
  Engine::Forward result = engine_for(x, parameters, options).forward(x, mean_outputs, false);
  return {result.scores, result.gradients};
}

std::tuple<Tensor, Tensors, Tensors> critic_forward(TensorList x, TensorList parameters, IntArrayRef program,
                                                    Scalars scalars, bool mean_outputs, int64_t scored, int64_t first,
                                                    int64_t count, at::ScalarType compute_dtype, bool channels_last) {
  const Options options{program, scalars, mean_outputs, scored, first, count, compute_dtype, channels_last};
  const Plain plain;
  Engine engine = engine_for(x, parameters, options);
  Engine::Forward result = engine.forward(x, mean_outputs, true);
  return {result.scores, result.gradients, engine.packed()};
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

// The 2-norm of each sample's gradient, over all inputs.
Tensor norms_of(const Tensors& gradients) {
  Tensor norms;
  for (const Tensor& gradient : gradients) {
    const Tensor part = norms_of_samples(gradient);
    norms = norms.defined() ? at::hypot(norms, part) : part;
  }
  return norms;
}

// What the loss gains per score: 1 over the number of fake ones, -1 over the number of real ones; undefined without
// any.
Tensor score_weights(const Tensor& x, const Options& o, const Loss& l) {
  if (!o.scored) return {};
  const int64_t fake = o.scored - l.real;
  const Tensor weights = fresh({o.scored}, x.options().dtype(result_dtype(x)));
  fill(Rows{0, l.real, o.scored}.of(weights), -1.0 / static_cast<double>(l.real));
  fill(Rows{l.real, fake, o.scored}.of(weights), 1.0 / static_cast<double>(fake));
  return weights;
}

// The results of critic_loss, and the derivatives of the loss with respect to the gradients.
struct Evaluated {
  Tensor loss, penalty, scores, norms;
  Tensors of_gradients;
};

Evaluated apply(const Loss& l, const Engine::Forward& critic, const Tensor& weights, bool differentiate) {
  Evaluated e;
  e.scores = critic.scores;
  e.norms = norms_of(critic.gradients);
  const Penalized penalized = penalize(e.norms, l.penalty, l.weight, differentiate);
  e.penalty = penalized.value;
  e.loss = penalized.loss;
  if (weights.defined()) e.loss.add_(at::dot(e.scores, weights));
  if (!differentiate) return e;

  for (const Tensor& gradient : critic.gradients) e.of_gradients.push_back(scaled_samples(gradient, penalized.slopes));
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
  const Plain plain;
  const Engine::Forward critic = engine_for(x, parameters, options).forward(x, mean_outputs, false);
  const Evaluated e = apply(loss, critic, score_weights(x[0], options, loss), false);
  return {e.loss, e.penalty, e.scores, e.norms};
}

// The gradients of the wanted parameters too: a loss is a number, so that they need not wait for its derivative, and
// what they are computed from need not be kept. Of 16-bit parameters they are float32, since the loss may yet be
// scaled.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensors> critic_loss_forward(
    TensorList x, TensorList parameters, IntArrayRef program, Scalars scalars, bool mean_outputs, int64_t real,
    int64_t scored, int64_t first, int64_t count, at::ScalarType compute_dtype, bool channels_last, double weight,
    double target, bool one_sided, double power, IntArrayRef wanted) {
  const Options o{program, scalars, mean_outputs, scored, first, count, compute_dtype, channels_last};
  const Loss loss{real, weight, {target, one_sided, power}};
  check_loss(o, loss);
  const Plain plain;
  Engine engine = engine_for(x, parameters, o);
  const Tensor weights = score_weights(x[0], o, loss);
  const Engine::Forward critic = engine.forward(x, o.mean_outputs, true, weights);
  const Evaluated e = apply(loss, critic, weights, true);
  return {e.loss, e.penalty, e.scores, e.norms, engine.finish(weights, e.of_gradients, wanted)};
}

template <typename Signature>
auto typed_handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using Context = torch::autograd::AutogradContext;
using Variables = torch::autograd::variable_list;

// What a node keeps from its forward to its backward pass, besides tensors.
struct State : torch::CustomClassHolder {
  Shape program;
  std::vector<double> scalars;
  Options options;
  size_t inputs, parameters;

  State(TensorList x, TensorList parameters, const Options& o)
      : program(o.program.vec()),
        scalars(o.scalars.vec()),
        options(o),
        inputs(x.size()),
        parameters(parameters.size()) {
    options.program = program;
    options.scalars = scalars;
  }

  // Of the context's tensors, which begin with x and the parameters.
  TensorList x(const Variables& saved) const { return TensorList(saved).slice(0, inputs); }
  TensorList given(const Variables& saved) const { return TensorList(saved).slice(inputs, parameters); }
  TensorList kept(const Variables& saved) const { return TensorList(saved).slice(inputs + parameters); }
};

template <typename T>
void save(Context* ctx, TensorList x, TensorList parameters, const Tensors& kept, c10::intrusive_ptr<T> state) {
  Variables tensors;
  tensors.reserve(x.size() + parameters.size() + kept.size());
  tensors.insert(tensors.end(), x.begin(), x.end());
  tensors.insert(tensors.end(), parameters.begin(), parameters.end());
  tensors.insert(tensors.end(), kept.begin(), kept.end());
  ctx->save_for_backward(std::move(tensors));
  ctx->saved_data["state"] = at::IValue::make_capsule(std::move(state));
  ctx->set_materialize_grads(false);
}

template <typename T>
c10::intrusive_ptr<T> state_of(Context* ctx) {
  return c10::static_intrusive_pointer_cast<T>(ctx->saved_data["state"].toCapsule());
}

// The gradients of x and parameters, undefined where there is none.
Variables differentiate(Context* ctx, const State& state, const Variables& saved, OptionalTensor grad_scores,
                        TensorList grad_gradients) {
  static const auto op = typed_handle<decltype(critic_backward)>("wgan_ext::critic_backward");
  const TensorList x = state.x(saved), given = state.given(saved);
  const Options& o = state.options;
  const size_t inputs = state.inputs;
  const auto critic = Program::read(x, given, o.program, o.scalars);

  // As autograd does: what only moves a sign gets zeros, what does not reach the gradient gets none.
  Variables result(inputs + state.parameters);
  Shape wanted;
  for (const auto i : c10::irange(state.parameters))
    if (ctx->needs_input_grad(inputs + i) && critic->reaches(static_cast<int64_t>(i), o.scored > 0))
      wanted.push_back(static_cast<int64_t>(i));
  bool of_x = false;
  for (const auto i : c10::irange(inputs)) of_x = of_x || ctx->needs_input_grad(i);
  TORCH_CHECK_NOT_IMPLEMENTED(!of_x || o.scored == 0, kOp, ": x cannot be differentiated where it is scored");
  const bool curved = of_x && critic->curved;
  Variables computed;
  if (grad_scores || !grad_gradients.empty()) {
    computed = op.call(grad_scores, grad_gradients, x, given, state.kept(saved), o.program, o.scalars, o.scored,
                       o.first, o.count, o.compute_dtype, o.channels_last, wanted, curved);
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

struct Critic : torch::autograd::Function<Critic> {
  static Variables forward(Context* ctx, TensorList x, TensorList parameters, const Options& o) {
    static const auto op = typed_handle<decltype(critic_forward)>("wgan_ext::critic_forward");
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [scores, gradients, kept] = op.call(x, parameters, o.program, o.scalars, o.mean_outputs, o.scored, o.first,
                                             o.count, o.compute_dtype, o.channels_last);
    save(ctx, x, parameters, kept, c10::make_intrusive<State>(x, parameters, o));
    Variables outputs = {scores};
    outputs.insert(outputs.end(), gradients.begin(), gradients.end());
    return outputs;
  }

  static Variables backward(Context* ctx, const Variables& grads) {
    const auto state = state_of<State>(ctx);
    const Options& o = state->options;
    const Variables saved = ctx->get_saved_variables();
    Variables grad_gradients(grads.begin() + 1, grads.end());
    bool penalised = false;
    for (const Tensor& grad : grad_gradients) penalised = penalised || (grad.defined() && o.count);
    for (const auto i : c10::irange(state->inputs))
      if (penalised && !grad_gradients[i].defined())
        grad_gradients[i] = at::zeros_like(saved[i]).narrow(0, o.first, o.count);
    if (!penalised) grad_gradients.clear();
    const bool scored = grads[0].defined() && o.scored;
    Variables result =
        differentiate(ctx, *state, saved, scored ? std::optional(grads[0]) : std::nullopt, grad_gradients);
    result.emplace_back();  // options
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

// Whether the tensor is the number 1, as far as can be told without waiting for a device or breaking a trace.
bool is_one(const Tensor& t) {
  if (!t.is_cpu() || t.numel() != 1 || c10::impl::TorchDispatchModeTLS::any_modes_set()) return false;
  if (t.scalar_type() == at::kFloat) return *t.const_data_ptr<float>() == 1;
  return t.scalar_type() == at::kDouble && *t.const_data_ptr<double>() == 1;
}

// The forward pass leaves the gradients, which the first backward pass scales and hands over without a copy; another
// one, of a graph that was retained, computes them again.
struct CriticLoss : torch::autograd::Function<CriticLoss> {
  struct LossState : State {
    Loss loss;
    Shape wanted;
    std::vector<at::ScalarType> dtypes;  // of the wanted parameters
    Tensors gradients;                   // theirs

    LossState(TensorList x, TensorList parameters, const Options& o, const Loss& l)
        : State(x, parameters, o), loss(l) {}
  };

  static auto run(TensorList x, TensorList parameters, const LossState& s) {
    static const auto op = typed_handle<decltype(critic_loss_forward)>("wgan_ext::critic_loss_forward");
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Options& o = s.options;
    const Loss& l = s.loss;
    return op.call(x, parameters, o.program, o.scalars, o.mean_outputs, l.real, o.scored, o.first, o.count,
                   o.compute_dtype, o.channels_last, l.weight, l.penalty.target, l.penalty.one_sided, l.penalty.power,
                   s.wanted);
  }

  static Variables forward(Context* ctx, TensorList x, TensorList parameters, const Options& o, const Loss& l) {
    auto state = c10::make_intrusive<LossState>(x, parameters, o, l);
    const auto program = Program::read(x, parameters, o.program, o.scalars);
    // As autograd does: what only moves a sign gets zeros, what does not reach the loss gets no gradient.
    for (const auto i : c10::irange(static_cast<int64_t>(parameters.size()))) {
      if (!parameters[i].requires_grad() || !program->reaches(i, o.scored > 0)) continue;
      state->wanted.push_back(i);
      state->dtypes.push_back(parameters[i].scalar_type());
    }
    auto [loss, penalty, scores, norms, gradients] = run(x, parameters, *state);
    state->gradients = std::move(gradients);
    save(ctx, x, parameters, {}, std::move(state));
    ctx->mark_non_differentiable({penalty, scores, norms});
    return {loss, penalty, scores, norms};
  }

  static Variables backward(Context* ctx, const Variables& grads) {
    const auto state = state_of<LossState>(ctx);
    Variables result(state->inputs + state->parameters + 2);  // options and loss
    if (!grads[0].defined()) return result;
    Tensors gradients = std::exchange(state->gradients, {});
    if (gradients.empty() && !state->wanted.empty()) {
      const Variables saved = ctx->get_saved_variables();
      gradients = std::get<4>(run(state->x(saved), state->given(saved), *state));
    }
    const auto scale = [&] {
      const at::AutoDispatchBelowADInplaceOrView guard;
      const bool one = is_one(grads[0]);
      for (const auto i : c10::irange(gradients.size()))
        gradients[i] = cast(one ? gradients[i] : gradients[i].mul_(grads[0]), state->dtypes[i]);
      return gradients;
    };
    if (at::GradMode::is_enabled())
      gradients = Once::apply(TensorList(grads).slice(0, 1), TensorList(ctx->get_saved_variables()), scale);
    else
      scale();
    for (const auto i : c10::irange(gradients.size()))
      result[state->inputs + state->wanted[i]] = std::move(gradients[i]);
    return result;
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
  bool differentiable = false;
  for (const Tensor& t : parameters) differentiable = differentiable || t.requires_grad();
  if (!differentiable || !at::GradMode::is_enabled()) {
    static const auto op = typed_handle<decltype(critic_loss)>("wgan_ext::critic_loss");
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(x, parameters, program, scalars, mean_outputs, real, scored, first, count, compute_dtype,
                   channels_last, weight, target, one_sided, power);
  }
  for (const Tensor& t : x)
    TORCH_CHECK_NOT_IMPLEMENTED(!t.requires_grad(), kLossOp,
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
