#define AT_PER_OPERATOR_HEADERS  // before ATen/TensorOperators.h, which else includes every operator
#include "engine.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <cmath>

namespace wgan_ext::critic {
namespace {

// Adds t to sum, in place where the sum's memory is ours alone.
void accumulate(Tensor& sum, Tensor t) {
  if (!t.defined()) return;
  if (!sum.defined())
    sum = std::move(t);
  else if (ours(sum) && sum.sizes() == t.sizes() && sum.is_non_overlapping_and_dense())
    sum.add_(t);
  else
    sum = sum + t;
}

Tensor take(Tensor& t) { return std::exchange(t, Tensor()); }

// A uniform gradient as a whole batch, for layers that differ from sample to sample.
Tensor for_layer(const Layer& layer, Tensor u, int64_t count) {
  if (u.size(0) == count || layer.takes_uniform()) return u;
  Shape shape = u.sizes().vec();
  shape[0] = count;
  return u.expand(shape);
}

}  // namespace

Engine::Engine(TensorList x, TensorList parameters, IntArrayRef program, Scalars scalars, int64_t scored, Rows points,
               at::ScalarType compute_dtype, bool channels_last)
    : x_(x),
      given_(parameters),
      shared_(Program::read(x, parameters, program, scalars)),
      program_(*shared_),
      frame_(x[0], parameters, compute_dtype, channels_last),
      scored_{0, scored, points.total},
      points_(points) {
  analyse();
  tape_.values.resize(program_.values());
  tape_.gradients.resize(program_.values());
  tape_.extras.resize(program_.layers.size());
}

void Engine::analyse() {
  const size_t layers = program_.layers.size();
  std::vector<bool> used(program_.values()), needed(program_.values());
  runs_.assign(layers, false);
  keeps_value_.assign(program_.values(), false);
  keeps_gradient_.assign(program_.values(), false);
  used.back() = true;
  needed.back() = scored_.count > 0;
  for (size_t i = layers; i-- > 0;) {
    const Layer& layer = *program_.layers[i];
    const auto value = program_.inputs + static_cast<int64_t>(i);
    if (!used[value]) continue;
    const bool moving = program_.moving[value], weighed = layer.weight() >= 0 && (scored_.count || program_.curved);
    keeps_gradient_[value] = (layer.weight() >= 0 && moving) || (layer.curved() && moving) ||
                             (scored_.count && (layer.weight() >= 0 || layer.bias() >= 0));
    for (const int64_t input : layer.inputs) {
      used[input] = true;
      if (weighed || (layer.keeps_inputs() && (moving || program_.curved || scored_.count))) keeps_value_[input] = true;
      needed[input] = needed[input] || keeps_value_[input];
    }
    runs_[i] = needed[value] || (layer.extras() && (moving || program_.curved));
    if (runs_[i])
      for (const int64_t input : layer.inputs) needed[input] = true;
  }
}

Kept Engine::kept(const Layer& layer, size_t index, Rows rows) const {
  Kept result{rows, {}, {}};
  if (layer.keeps_inputs())
    for (const int64_t input : layer.inputs) result.inputs.push_back(rows.of(tape_.values[input]));
  for (const Tensor& extra : tape_.extras[index]) result.extras.push_back(rows.of(extra));
  return result;
}

Engine::Forward Engine::forward(TensorList x, bool mean_outputs, bool keep, const Tensor& weights) {
  const Rows all = Rows::all(points_.total);
  Tensors values(program_.values());
  std::vector<int64_t> uses(program_.values());
  for (const auto i : c10::irange(program_.layers.size()))
    if (runs_[i])
      for (const int64_t input : program_.layers[i]->inputs) ++uses[input];
  const auto store = [&](int64_t value, Tensor t) {
    if (keeps_value_[value]) tape_.values[value] = t;
    values[value] = std::move(t);
  };
  for (const auto i : c10::irange(x.size())) store(static_cast<int64_t>(i), frame_.enter(x[i]));
  for (const auto i : c10::irange(program_.layers.size())) {
    if (!runs_[i]) continue;
    const Layer& layer = *program_.layers[i];
    Tensors in;
    for (const int64_t input : layer.inputs) in.push_back(--uses[input] ? values[input] : take(values[input]));
    Tensor value = layer.forward(frame_, std::move(in), all, tape_.extras[i]);
    TORCH_CHECK_VALUE(value.size(0) == all.total && value.sizes().slice(1) == layer.sizes, kOp, ": layer ", i,
                      " makes ", value.size(0), " samples of shape ", value.sizes().slice(1), ", where program says ",
                      all.total, " of ", layer.sizes);
    store(program_.inputs + static_cast<int64_t>(i), std::move(value));
  }

  Forward result;
  const auto dtype = result_dtype(x[0]);
  if (!scored_.count) {
    result.scores = fresh({0}, x[0].options().dtype(dtype));
  } else if (const Tensor& last = values.back(); ours(last) && last.numel() == all.total && last.is_contiguous() &&
                                                 last.scalar_type() == dtype) {  // the output itself
    result.scores = scored_.of(last.view({all.total}));
  } else {
    const Tensor outputs = scored_.of(last).reshape({scored_.count, -1}).to(dtype);
    result.scores = mean_outputs ? outputs.mean(1) : outputs.sum(1);
  }
  values.clear();

  // Above what depends on parameters u is needed where the scores are differentiated too, below only at the points.
  const Rows above = keep && scored_.count ? all : points_;
  Tensors& u = tape_.gradients;
  Shape seed = program_.layers.empty() ? x[0].sizes().vec() : program_.layers.back()->sizes;
  const double weight = mean_outputs ? 1.0 / static_cast<double>(product(seed)) : 1.0;
  // Rows that are scored and points need u without the weights; float16 is scaled in backward.
  weighted_ = weights.defined() && points_.first == scored_.count && frame_.options.dtype() != at::kHalf;
  seed.insert(seed.begin(), weighted_ ? points_.total : 1);
  u.back() = fill(frame_.empty(seed), weight);
  if (weighted_) {
    Shape per_row(seed.size(), 1);
    per_row[0] = -1;
    scored_.of(u.back()).mul_(weights.view(per_row));
  }
  for (size_t i = program_.layers.size(); i-- > 0;) {
    const Layer& layer = *program_.layers[i];
    const auto value = program_.inputs + static_cast<int64_t>(i);
    if (!u[value].defined()) continue;
    Tensor gradient = keep && keeps_gradient_[value] ? u[value] : take(u[value]);
    if (!program_.moving[value] && !scored_.count) continue;
    bool shallow = true;
    for (const int64_t input : layer.inputs) shallow = shallow && !program_.deep[input];
    const Rows rows = shallow ? points_ : above;
    if (rows.count != above.count) gradient = rows.of_gradient(gradient);
    Tensors pulled = layer.pull(frame_, kept(layer, i, rows), for_layer(layer, std::move(gradient), rows.count));
    for (const auto j : c10::irange(layer.inputs.size())) {
      const int64_t input = layer.inputs[j];
      TORCH_CHECK_VALUE(pulled[j].sizes().slice(1) == layer.input_sizes[j], kOp, ": layer ", i,
                        " does not make samples of shape ", layer.sizes, ", as program says");
      if (rows.whole() && !program_.deep[input]) pulled[j] = points_.of_gradient(pulled[j]);
      accumulate(u[input], std::move(pulled[j]));
    }
  }
  for (const auto i : c10::irange(x.size())) {
    Shape shape = x[i].sizes().vec();
    shape[0] = points_.count;
    Tensor gradient = take(u[i]);
    if (!gradient.defined())
      gradient = at::zeros(shape, x[i].options().dtype(dtype));
    else if (gradient.sizes() != shape)
      gradient = gradient.expand(shape);
    result.gradients.push_back(cast(gradient, dtype).contiguous(x[i].suggest_memory_format()));
  }
  return result;
}

Tensors Engine::packed() const {
  Tensors result;
  std::vector<const c10::StorageImpl*> taken;
  const auto memory = [](const Tensor& t) { return t.storage().unsafeGetStorageImpl(); };
  for (const TensorList given : {x_, given_})
    for (const Tensor& t : given) taken.push_back(memory(t));
  const auto pack = [&](const Tensor& t) {
    if (!t.defined()) return;
    const bool shared = std::find(taken.begin(), taken.end(), memory(t)) != taken.end();
    result.push_back(shared ? t.clone() : t);
    taken.push_back(memory(result.back()));
  };
  for (const auto i : c10::irange(program_.inputs, program_.values())) pack(tape_.values[i]);
  for (const Tensors& extras : tape_.extras)
    for (const Tensor& t : extras) pack(t);
  for (const Tensor& t : tape_.gradients) pack(t);
  return result;
}

void Engine::unpack(TensorList kept) {
  size_t next = 0;
  const auto take = [&] {
    TORCH_CHECK_VALUE(next < kept.size(), kOp, ": kept has too few tensors for program: ", kept.size());
    return kept[next++];
  };
  for (const auto i : c10::irange(program_.values()))
    if (keeps_value_[i]) tape_.values[i] = i < program_.inputs ? frame_.enter(x_[i]) : take();
  for (const auto i : c10::irange(program_.layers.size()))
    for (size_t n = runs_[i] ? program_.layers[i]->extras() : 0; n > 0; --n) tape_.extras[i].push_back(take());
  for (const auto i : c10::irange(program_.values()))
    if (keeps_gradient_[i]) tape_.gradients[i] = take();
  TORCH_CHECK_VALUE(next == kept.size(), kOp, ": kept has more tensors than program uses: ", kept.size());
}

// What takes the place of a value in the product with its layer's u: c h where scored, plus v at the points.
Tensor Engine::operand(int64_t value, const Tensor& c, const Tensor& v) const {
  if (!c.defined()) return v;
  const Tensor& h = tape_.values[value];
  Shape per_row(h.dim(), 1);
  per_row[0] = -1;
  if (!v.defined()) return scored_.of(h) * c.view(per_row);
  const Tensor t = frame_.empty(h.sizes());
  Tensor top = scored_.of(t);
  at::mul_out(top, scored_.of(h), c.view(per_row));
  if (scored_.whole())
    points_.of(t).add_(v);
  else
    points_.of(t).copy_(v);
  return t;
}

Engine::Backward Engine::backward(const Tensor& grad_scores, TensorList grad_gradients, IntArrayRef wanted, bool of_x) {
  return chains(grad_scores, grad_gradients, wanted, of_x, false);
}

Tensors Engine::finish(const Tensor& weights, TensorList grad_gradients, IntArrayRef wanted) {
  return chains(weights, grad_gradients, wanted, false, true).parameters;
}

Engine::Backward Engine::chains(const Tensor& grad_scores, TensorList grad_gradients, IntArrayRef wanted, bool of_x,
                                bool last) {
  const auto values = program_.values();
  Gradients gradients(frame_.parameters.size(), wanted);

  // All is linear in the cotangents. In float16 they are carried scaled to at most about 1, lest they underflow.
  Tensor scale, c;
  const bool scored = grad_scores.defined() && scored_.count > 0;
  if (frame_.options.dtype() == at::kHalf) {
    const auto take_in = [&](const Tensor& grad) {
      const Tensor largest = at::linalg_vector_norm(grad, INFINITY);
      scale = scale.defined() ? at::maximum(scale, largest) : largest;
    };
    for (const Tensor& grad : grad_gradients) take_in(grad);
    if (scored) take_in(grad_scores);
    if (scale.defined()) scale = scale.clamp(1e-30, 1e30).log2().floor().exp2();
  }
  const auto enter = [&](const Tensor& t) { return frame_.enter(scale.defined() ? t.div(scale) : t); };
  if (scored && !weighted_) c = enter(grad_scores);
  Tensors v(values);
  for (const auto i : c10::irange(grad_gradients.size())) v[i] = enter(grad_gradients[i]);

  // Which changes are needed: for a product with a layer's u, for a bend, or for others further up.
  std::vector<bool> needed(values), bends(values);
  std::vector<int64_t> uses(values);
  for (size_t i = program_.layers.size(); i-- > 0;) {
    const Layer& layer = *program_.layers[i];
    const auto value = program_.inputs + static_cast<int64_t>(i);
    const bool curved = layer.curved() && keeps_gradient_[value];
    const bool weighed = gradients.wants(layer.weight()) && keeps_gradient_[value];
    for (const int64_t input : layer.inputs) {
      needed[input] = needed[input] || needed[value] || curved || weighed;
      bends[input] = bends[input] || curved;
      ++uses[input];
    }
  }

  for (const auto i : c10::irange(program_.layers.size())) {
    const Layer& layer = *program_.layers[i];
    const auto value = program_.inputs + static_cast<int64_t>(i);
    const Tensor u = tape_.gradients[value];
    Tensors changes;
    bool changed = false;
    for (const int64_t input : layer.inputs) {
      changes.push_back(--uses[input] || bends[input] ? v[input] : take(v[input]));
      changed = changed || changes.back().defined();
    }
    if (weighted_ && u.defined()) {
      if (gradients.wants(layer.weight()))
        layer.weigh(frame_, kept(layer, i, scored_), scored_.of(u), scored_.of(tape_.values[layer.inputs[0]]),
                    gradients);
      if (gradients.wants(layer.bias())) layer.shift(frame_, kept(layer, i, scored_), scored_.of(u), {}, gradients);
    }
    if (u.defined() && gradients.wants(layer.weight()) && (c.defined() || changed)) {
      const Rows rows = !c.defined() ? points_ : changed ? Rows::all(points_.total) : scored_;
      layer.weigh(frame_, kept(layer, i, rows), for_layer(layer, rows.of_gradient(u), rows.count),
                  operand(layer.inputs[0], c, changes[0]), gradients);
    }
    if (u.defined() && c.defined() && gradients.wants(layer.bias()))
      layer.shift(frame_, kept(layer, i, scored_), for_layer(layer, scored_.of_gradient(u), scored_.count), c,
                  gradients);
    if (changed && needed[value]) v[value] = layer.push(frame_, kept(layer, i, points_), std::move(changes));
    if (last && !program_.curved) {
      tape_.extras[i].clear();
      tape_.gradients[value] = Tensor();
      for (const int64_t input : layer.inputs)
        if (!uses[input]) tape_.values[input] = Tensor();
    }
  }

  Backward result;
  Tensors p(values);
  for (size_t i = program_.curved && !grad_gradients.empty() ? program_.layers.size() : 0; i-- > 0;) {
    const Layer& layer = *program_.layers[i];
    const auto value = program_.inputs + static_cast<int64_t>(i);
    const Tensor above = take(p[value]);
    Tensors pulled(layer.inputs.size());
    if (above.defined()) {
      if (gradients.wants(layer.weight()))
        layer.weigh(frame_, kept(layer, i, points_), above, points_.of(tape_.values[layer.inputs[0]]), gradients);
      if (gradients.wants(layer.bias())) layer.shift(frame_, kept(layer, i, points_), above, {}, gradients);
      bool deeper = false;
      for (const int64_t input : layer.inputs)
        deeper = deeper || program_.deep[input] || (of_x && program_.moving[input]);
      if (deeper) pulled = layer.pull(frame_, kept(layer, i, points_), above);
    }
    if (layer.curved() && tape_.gradients[value].defined()) {
      Tensors changes;
      bool changed = false;
      for (const int64_t input : layer.inputs) {
        changes.push_back(v[input]);
        changed = changed || v[input].defined();
      }
      if (changed) {
        const Tensor u = for_layer(layer, points_.of_gradient(tape_.gradients[value]), points_.count);
        Tensors bent = layer.bend(frame_, kept(layer, i, points_), u, changes);
        for (const auto j : c10::irange(bent.size())) accumulate(pulled[j], std::move(bent[j]));
      }
    }
    for (const auto j : c10::irange(pulled.size())) accumulate(p[layer.inputs[j]], std::move(pulled[j]));
  }

  v.clear();
  const auto leave = [&](Tensor t, const Tensor& model) {
    const at::ScalarType dtype = last ? c10::promoteTypes(model.scalar_type(), at::kFloat) : model.scalar_type();
    if (!t.defined() && model.is_contiguous()) return fill(fresh(model.sizes(), model.options().dtype(dtype)), 0);
    if (!t.defined()) return at::zeros_like(model, model.options().dtype(dtype));
    if (!ours(t)) t = t.clone();  // as of two constants that are added up
    if (scale.defined()) t = t.to(scale.scalar_type()).mul_(scale);
    return cast(t, dtype).contiguous(model.suggest_memory_format());
  };
  for (const int64_t i : wanted) result.parameters.push_back(leave(take(gradients[i]), given_[i]));
  if (of_x)
    for (const auto i : c10::irange(x_.size())) result.x.push_back(leave(take(p[i]), x_[i]));
  return result;
}

}  // namespace wgan_ext::critic
