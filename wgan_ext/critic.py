"""The gradient of a critic with respect to its input, differentiable once, and the plan by which it is computed.

A critic made of layers that are linear once the signs at its activations are known has an input gradient whose own
derivative is two chains of matrix products (csrc/critic/op.cpp). It needs no double backward and two thirds of its
arithmetic. Other critics take autograd's double backward; ``explain`` says which way a critic goes, and why.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from . import _ops
from ._checks import check_batch, check_type
from ._distributed import guard, refuse_wrapped
from ._transforms import engine_under_transforms, scores_and_gradients, transformed

__all__ = ["CriticPlan", "LayerPlan", "explain", "input_gradient"]

Engine: TypeAlias = Literal["auto", "analytic", "autograd"]
Inputs: TypeAlias = "Tensor | Sequence[Tensor] | Mapping[str, Tensor]"
Critic: TypeAlias = Callable[..., Tensor]

# Forward pre-hooks that only set a parameter of their module, whatever its input: the engine runs them itself.
_WEIGHT_HOOKS = (SpectralNorm, WeightNorm)


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """How one layer of a critic is computed."""

    name: str
    """Its path in the critic, as in named_modules."""
    layer: str
    engine: Literal["analytic", "autograd"]
    reason: str
    """Why the analytic engine cannot take it; empty if it can."""


@dataclasses.dataclass(frozen=True)
class CriticPlan:
    """How the input gradient of a critic is computed; ``str`` prints one layer to a line."""

    engine: Literal["analytic", "autograd"]
    reason: str
    """Why not the analytic engine; empty if it is."""
    layers: tuple[LayerPlan, ...]

    def __str__(self) -> str:
        rows = [("layer", "", "engine", "reason")]
        rows += [(layer.name, layer.layer, layer.engine, layer.reason) for layer in self.layers]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"engine: {self.engine}" + (f" ({self.reason})" if self.reason else ""), *table])


def input_gradient(
    critic: Critic,
    x: Tensor,
    *,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    engine: Engine = "auto",
) -> Tensor:
    """Return dD/dx, the gradient of every sample's summed critic outputs with respect to that sample.

    Differentiable with respect to the critic's parameters, by the analytic engine once: deriving that derivative raises
    NotImplementedError. With respect to x the result of the analytic engine is constant almost everywhere, so x gets
    zeros; a critic with smooth layers takes autograd and keeps its second derivative in x. Under ``no_grad`` only the
    value is computed. Neither ``x.requires_grad`` nor ``x.grad`` is touched.

    NaN in x is not looked for: smooth layers turn it into NaN, but in a piecewise-linear critic it only decides signs,
    and the gradient there is finite, as autograd's can be too. The scores are NaN then, and so is a loss that has them.

    The analytic engine does not call ``critic.forward``: it runs spectral- and weight-norm hooks and reads each
    parametrized weight once, as one forward would. Under autocast its products run in autocast's dtype, and on a CPU
    in float32.

    Args:
        critic: A map from a batch, the first dimension of x, to as many scores, or maps of scores. Each score must
            depend on its own sample only, or the gradients of different samples mix.
        x: [B, ...], floating point, B > 0.
        critic_args: Further positional arguments of the critic (labels, conditions); only for autograd.
        critic_kwargs: Further named arguments of the critic; only for autograd.
        engine: "auto" takes the analytic engine where it can; "analytic" raises NotImplementedError, naming the first
            layer it cannot take; "autograd" is autograd's double backward.

    Returns:
        [B, ...], of the shape and dtype of x.

    Raises:
        TypeError, ValueError: the critic loses the batch, ignores its input or returns no tensor, or x is not a
            floating-point batch of the critic's dtype and device.
        NotImplementedError: the critic is wrapped for data-parallel training, whose synchronisation of gradients
            calling the engine would bypass; or the analytic engine is asked for under a transform of torch.func.
        RuntimeError: from ``backward``, which leaves gradients of a critic in DDP unsynchronised.
    """
    check_batch("input_gradient", "x", x)
    (gradient,) = critic_gradients("input_gradient", critic, x, critic_args, critic_kwargs, engine, mean_outputs=False)
    return guard("input_gradient", critic, gradient.to(x.dtype))


def explain(critic: Critic, x: Inputs) -> CriticPlan:
    """Return the plan by which the input gradient of the critic at x would be computed, without computing anything.

    Nothing is evaluated: spectral norm's vectors u and v stay as they are.

    Raises:
        TypeError, ValueError: the critic is not callable, or x not a floating-point batch or a structure of such.
        NotImplementedError: the critic is wrapped for data-parallel training; see ``input_gradient``.
    """
    for t in tensors_of("explain", "x", x):
        check_batch("explain", "x", t)
    trace = _trace(_unwrap("explain", critic), single=isinstance(x, Tensor), extra_arguments=False)
    layers = tuple(
        LayerPlan(name, _describe(module), "autograd" if obstacle else "analytic", obstacle)
        for name, module, obstacle in trace.layers
    )
    return CriticPlan("autograd" if trace.obstacle else "analytic", trace.obstacle, layers)


def critic_gradients(
    op: str,
    critic: Critic,
    x: Inputs,
    critic_args: Sequence[Any],
    critic_kwargs: Mapping[str, Any] | None,
    engine: Engine,
    *,
    mean_outputs: bool,
) -> list[Tensor]:
    """Return the gradient of each sample's summed outputs with respect to every tensor of x.

    ``mean_outputs`` averages a sample's outputs instead. The analytic engine returns float32 for 16-bit inputs.
    """
    check_engine(op, engine)
    check_type(op, "critic_args", critic_args, (tuple, list), "a tuple or list")
    check_type(op, "critic_kwargs", critic_kwargs or {}, Mapping, "a mapping")
    critic = _unwrap(op, critic)
    engine = engine_under_transforms(op, engine)
    if engine != "autograd":
        extra_arguments = bool(critic_args or critic_kwargs)
        trace = _trace(critic, single=isinstance(x, Tensor), extra_arguments=extra_arguments)
        if isinstance(x, Tensor) and not trace.obstacle:
            return [_run(op, trace, x, mean_outputs)]
        if engine == "analytic":
            raise NotImplementedError(f"{op}: the analytic engine cannot take this critic: {trace.obstacle}")
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{op}: torch.compile cannot differentiate twice, and this critic takes autograd's double backward; "
            "wgan_ext.explain(critic, x) says why"
        )
    return _double_backward(op, critic, x, critic_args, critic_kwargs or {}, mean_outputs)


def check_engine(op: str, engine: str) -> None:
    """Raise ValueError unless there is such an engine."""
    if engine not in get_args(Engine):
        raise ValueError(f'{op}: engine must be "auto", "analytic" or "autograd", got {engine!r}')


def _unwrap(op: str, critic: Critic) -> Critic:
    """The critic that torch.compile wrapped, or the critic itself; raises for wrappers that cannot be bypassed."""
    if not callable(critic):
        raise TypeError(f"{op}: critic must be callable, got {type(critic).__name__}")
    critic = _original(critic)
    refuse_wrapped(op, critic)
    return critic


def _original(module: Any) -> Any:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return module._orig_mod if dynamo is not None and isinstance(module, dynamo.OptimizedModule) else module


@dataclasses.dataclass
class _Trace:
    """A critic as csrc/critic/op.cpp reads it, or the obstacle to that."""

    obstacle: str = ""
    layers: list[tuple[str, nn.Module, str]] = dataclasses.field(default_factory=list)
    """Each layer's name, module and obstacle."""
    program: list[int] = dataclasses.field(default_factory=list)
    slopes: list[float] = dataclasses.field(default_factory=list)
    weighted: list[nn.Linear | nn.Conv2d] = dataclasses.field(default_factory=list)
    """The modules whose parameters the program takes, in order."""
    images: bool = False
    """Whether there is a convolution."""


def _trace(critic: Critic, *, single: bool, extra_arguments: bool) -> _Trace:
    trace = _Trace()
    if not isinstance(critic, nn.Module):
        trace.obstacle = "the critic is not an nn.Module"
    elif not single:
        trace.obstacle = "the input is not a single tensor"
    elif extra_arguments:
        trace.obstacle = "the critic takes further arguments"
    elif torch_module._has_any_global_hook():  # type: ignore[no-untyped-call]
        trace.obstacle = "a hook is registered for all modules"
    else:
        _walk("", critic, trace)
        for name, module, obstacle in trace.layers:
            if obstacle:
                where = f"layer {name!r}, {_describe(module)}," if name else _describe(module)
                trace.obstacle = f"{where} {obstacle}"
                break
    return trace


def _walk(name: str, module: nn.Module, trace: _Trace) -> None:
    module = _original(module)
    obstacle = _hooked(module)
    kind = parametrize.type_before_parametrizations(module)
    if not obstacle and kind is nn.Sequential:
        for child_name, child in module._modules.items():
            if child is not None:
                _walk(f"{name}.{child_name}" if name else child_name, child, trace)
        return
    if not obstacle:
        layer = _LAYERS.get(kind)
        obstacle = layer(module, trace) if layer else "is of a class that the analytic engine does not know"
    trace.layers.append((name, module, obstacle))


def _hooked(module: nn.Module) -> str:
    """What keeps a module's forward from being that of its class, or an empty string."""
    if "forward" in module.__dict__:
        return "has a forward of its own"
    if module._forward_hooks:
        return "has a forward hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has a backward hook"
    if not all(isinstance(hook, _WEIGHT_HOOKS) for hook in module._forward_pre_hooks.values()):
        return "has a forward pre-hook"
    return ""


def _describe(module: nn.Module) -> str:
    return f"{parametrize.type_before_parametrizations(module).__name__}({module.extra_repr()})"


# Each of these adds a layer to the trace, or returns what keeps it from that.


def _linear(module: nn.Linear, trace: _Trace) -> str:
    trace.program += (_ops.LINEAR, module.bias is not None)
    trace.weighted.append(module)
    return ""


def _conv2d(module: nn.Conv2d, trace: _Trace) -> str:
    if module.padding_mode != "zeros":
        return f"pads with mode {module.padding_mode!r}"
    # left, right, top, bottom; padding="same" can be uneven
    left, right, top, bottom = module._reversed_padding_repeated_twice
    if left != right or top != bottom:
        return "pads unevenly"
    trace.program += (_ops.CONV2D, module.bias is not None, *module.stride, top, left, *module.dilation, module.groups)
    trace.images = True
    trace.weighted.append(module)
    return ""


def _flatten(module: nn.Flatten, trace: _Trace) -> str:
    trace.program += (_ops.FLATTEN, module.start_dim, module.end_dim)
    return ""


def _relu(module: nn.ReLU, trace: _Trace) -> str:
    trace.program.append(_ops.ACTIVATION)
    trace.slopes.append(0.0)
    return ""


def _leaky_relu(module: nn.LeakyReLU, trace: _Trace) -> str:
    trace.program.append(_ops.ACTIVATION)
    trace.slopes.append(module.negative_slope)
    return ""


def _identity(module: nn.Identity, trace: _Trace) -> str:
    return ""


def _dropout(module: Any, trace: _Trace) -> str:
    return "is random in training mode" if module.training and module.p > 0 else ""


_LAYERS: dict[type[nn.Module], Callable[[Any, _Trace], str]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.Flatten: _flatten,
    nn.ReLU: _relu,
    nn.LeakyReLU: _leaky_relu,
    nn.Identity: _identity,
    nn.Dropout: _dropout,
    nn.Dropout1d: _dropout,
    nn.Dropout2d: _dropout,
    nn.Dropout3d: _dropout,
    nn.AlphaDropout: _dropout,
    nn.FeatureAlphaDropout: _dropout,
}


def _run(op: str, trace: _Trace, x: Tensor, mean_outputs: bool) -> Tensor:
    parameters: list[Tensor] = []
    for module in trace.weighted:
        for hook in module._forward_pre_hooks.values():
            hook(module, ())
        parameters.append(module.weight)
        if parameters[-1].device != x.device:
            raise ValueError(f"{op}: x must be on the device of the critic ({parameters[-1].device}), got {x.device}")
        if module.bias is not None:
            parameters.append(module.bias)
    on_cpu = x.device.type == "cpu"
    compute_dtype = _autocast_dtype(x)
    if compute_dtype is None:
        compute_dtype = x.dtype
        for parameter in parameters:
            if parameter.dtype != x.dtype:
                raise TypeError(f"{op}: x must have the dtype of the critic ({parameter.dtype}), got {x.dtype}")
    if on_cpu and compute_dtype.itemsize == 2:
        compute_dtype = torch.float32
    # oneDNN's convolutions are faster in channels_last (from 3 to 64 channels, several times); it has no float64.
    channels_last = trace.images and (
        (on_cpu and compute_dtype == torch.float32) or _ops.suggested_format(x) == torch.channels_last
    )
    gradient: Tensor = _ops.critic_input_gradient(
        x, parameters, trace.program, trace.slopes, mean_outputs, compute_dtype, channels_last
    )
    return gradient


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast, where it is on, casts x to; like autocast, this leaves float64 alone."""
    device_type = x.device.type
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on and x.dtype != torch.float64 else None


def _double_backward(
    op: str,
    critic: Critic,
    x: Inputs,
    critic_args: Sequence[Any],
    critic_kwargs: Mapping[str, Any],
    mean_outputs: bool,
) -> list[Tensor]:
    if isinstance(critic, nn.Module) and any(map(_couples_samples, critic.modules())):
        warnings.warn(
            f"{op}: the critic normalizes over the batch, so that the gradient at a sample takes in the scores of the "
            "others; put BatchNorm in eval mode, or normalize each sample by itself",
            stacklevel=4,
        )
    if transformed():

        def scores_of(points: Any) -> Tensor:
            scores = critic(points, *critic_args, **critic_kwargs)
            _check_scores(op, scores, tensors_of(op, "x", points)[0].shape[0])
            return scores

        _, structure = scores_and_gradients(scores_of, map_tensors(lambda t: t, x), mean_outputs)
        return tensors_of(op, "x", structure)
    create_graph = torch.is_grad_enabled()
    # Not x itself, so that neither its grad nor its hooks are touched; a view of it where x is part of a graph.
    with torch.inference_mode(False), torch.enable_grad():
        points: list[Tensor] = []

        def point(t: Tensor) -> Tensor:
            in_graph = create_graph and t.requires_grad
            points.append(
                t.view_as(t) if in_graph else (t.clone() if t.is_inference() else t.detach()).requires_grad_()
            )
            return points[-1]

        scores = critic(map_tensors(point, x), *critic_args, **critic_kwargs)
        batch = points[0].shape[0]
        _check_scores(op, scores, batch)
        device_type = points[0].device.type
        weight = batch / scores.numel() if mean_outputs else 1.0
        with torch.autocast(device_type, enabled=False):
            gradients = torch.autograd.grad(
                scores, points, torch.full_like(scores, weight), create_graph=create_graph, allow_unused=True
            )
    if all(gradient is None for gradient in gradients):
        raise ValueError(f"{op}: the critic's scores do not depend on its input")
    return [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, points, strict=True)]


def _couples_samples(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _check_scores(op: str, scores: object, batch: int) -> None:
    if not isinstance(scores, Tensor):
        raise TypeError(f"{op}: the critic must return a tensor, got {type(scores).__name__}")
    if not scores.is_floating_point():
        raise TypeError(f"{op}: the critic must return floating-point scores, got {scores.dtype}")
    if scores.dim() == 0 or scores.shape[0] != batch:
        raise ValueError(
            f"{op}: the critic must return one score, or one map of scores, for each of the {batch} samples, "
            f"got shape {tuple(scores.shape)}"
        )
    if scores.numel() == 0:
        raise ValueError(f"{op}: the critic must return at least one score a sample, got shape {tuple(scores.shape)}")
    if not scores.requires_grad:
        raise ValueError(f"{op}: the critic's scores do not depend on its input")


def tensors_of(op: str, name: str, x: Inputs) -> list[Tensor]:
    """The tensors of a structure that map_tensors takes, in order; raises TypeError for anything else."""
    check_type(op, name, x, (Tensor, tuple, list, Mapping), "a tensor, or a tuple, list or dict of tensors")
    if isinstance(x, Tensor):
        return [x]
    return list(x.values()) if isinstance(x, Mapping) else list(x)


def map_tensors(function: Callable[..., Tensor], *structures: Any) -> Any:
    """Apply the function to a tensor, or to each of a tuple, list or dict of tensors; structures must be alike."""
    first = structures[0]
    if isinstance(first, Tensor):
        return function(*structures)
    if isinstance(first, Mapping):
        return {key: function(*(s[key] for s in structures)) for key in first}
    values = [function(*items) for items in zip(*structures, strict=True)]
    return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)
