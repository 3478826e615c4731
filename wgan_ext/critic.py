"""The gradient of a critic with respect to its input, differentiable once, and the plan by which it is computed.

The input gradient of a critic is a chain of matrix products, and its derivative another one or two (csrc/critic). They
need no double backward and, where the critic is piecewise linear, two thirds of its arithmetic. Critics that cannot be
traced into such a chain take autograd's double backward; ``explain`` says which way a critic goes, and why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import _C, _ops
from ._checks import check_batch, check_type
from ._distributed import WRAPPERS, guard, refuse_wrapped, wrapped_layer
from ._transforms import engine_under_transforms, scores_and_gradients, transformed
from .plans import compute_dtype, plan_for, read_parameters
from .tracing import LayerPlan, couples_samples

__all__ = ["CriticPlan", "LayerPlan", "explain", "input_gradient"]

Engine: TypeAlias = Literal["auto", "analytic", "autograd"]
Inputs: TypeAlias = "Tensor | Sequence[Tensor] | Mapping[str, Tensor]"
Critic: TypeAlias = Callable[..., Tensor]
_ENGINES = get_args(Engine)
_SUSPECTS = (_BatchNorm, *WRAPPERS)


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
    NotImplementedError. With respect to x the gradient of a piecewise-linear critic is constant almost everywhere, so
    that x gets zeros; smooth layers give it their second derivative, by a third chain of products. Under ``no_grad``
    only the value is computed. The call touches neither ``x.requires_grad`` nor ``x.grad``.

    NaN in x is not looked for: smooth layers turn it into NaN, but in a piecewise-linear critic it only decides signs,
    and the gradient there is finite, as autograd's can be too. The scores are NaN then, and so is a loss that has them.

    The analytic engine calls ``critic.forward`` only to trace it, on two and on three samples, at the first call and
    after changes of the critic other than of its tensors' values; a forward that branches on the number of samples is
    found out only if it treats two and three differently. Otherwise the engine runs spectral- and weight-norm hooks and
    reads each parametrized weight once, as one forward would. Its products run in the dtype of x or in autocast's,
    those of 16-bit types in float32 on a CPU.

    Args:
        critic: A map from a batch, the first dimension of x, to as many scores, or maps of scores. Each score must
            depend on its own sample only, or the gradients of different samples mix.
        x: [B, ...], floating point, B > 0.
        critic_args: Further positional arguments of the critic (labels, conditions); tensors keep their rows.
        critic_kwargs: Further named arguments of the critic; the same.
        engine: "auto" takes the analytic engine where it can; "analytic" raises NotImplementedError, naming the first
            layer it cannot take; "autograd" is autograd's double backward. ``explain`` tells which "auto" takes.

    Returns:
        [B, ...], of the shape and dtype of x.

    Raises:
        TypeError, ValueError: the critic loses the batch, ignores its input or returns no tensor, or x is not a
            floating-point batch of the critic's dtype and device.
        NotImplementedError: the critic is wrapped for data-parallel training, whose synchronisation of gradients
            calling the engine would bypass; the analytic engine is asked for where it cannot, as under a transform of
            torch.func; or autograd is needed under torch.compile.
        RuntimeError: from ``backward``, which leaves gradients of a critic in DDP unsynchronised.
    """
    check_batch("input_gradient", "x", x)
    analytic = evaluation("input_gradient", critic, x, critic_args, critic_kwargs, engine)
    if analytic is None:
        _, (gradient,) = double_backward("input_gradient", critic, x, critic_args, critic_kwargs or {}, False)
    else:
        _, (gradient,) = analytic.scores_and_gradients([x], 0, 0, x.shape[0])
    return guard("input_gradient", critic, gradient.to(x.dtype))


def explain(
    critic: Critic,
    x: Inputs,
    *,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
) -> CriticPlan:
    """Return the plan by which the input gradient of the critic at x would be computed.

    The critic's forward is run on two and on three samples to see what it does, unless that is known from before; see
    ``input_gradient`` for what this cannot see. Spectral norm's vectors u and v and all other buffers stay as they are.

    Args:
        critic: As for ``input_gradient``.
        x: [B, ...], floating point, or a tuple, list or dict of such tensors, as the critic takes it; the first samples
            serve, and the plan is for any B.
        critic_args: Further positional arguments of the critic.
        critic_kwargs: Further named arguments of the critic.

    Returns:
        The engine that "auto" takes, the first obstacle to the analytic one, and a row for each layer.

    Raises:
        TypeError, ValueError: the critic is not callable, or x not a floating-point batch or a structure of such.
        NotImplementedError: the critic is wrapped for data-parallel training; see ``input_gradient``.
    """
    for t in tensors_of("explain", "x", x):
        check_batch("explain", "x", t)
    plan = plan_for(_unwrap("explain", critic), x, tuple(critic_args), dict(critic_kwargs or {}))
    trace = plan.trace
    if plan.refused:
        raise NotImplementedError(f"explain: {trace.obstacle}")
    return CriticPlan("autograd" if trace.obstacle else "analytic", trace.obstacle, trace.layers)


@dataclasses.dataclass
class Evaluation:
    """One evaluation of a critic by the analytic engine, all but its input."""

    parameters: list[Tensor]
    program: list[int]
    scalars: list[float]
    compute_dtype: torch.dtype
    channels_last: bool
    mean_outputs: bool

    def scores_and_gradients(self, x: list[Tensor], scored: int, first: int, count: int) -> tuple[Tensor, list[Tensor]]:
        """The scores of the first rows of x, and their gradients by x at ``count`` rows from ``first``."""
        result: tuple[Tensor, list[Tensor]] = _ops.critic(
            x,
            self.parameters,
            self.program,
            self.scalars,
            self.mean_outputs,
            scored,
            first,
            count,
            self.compute_dtype,
            self.channels_last,
        )
        return result

    def loss(
        self,
        x: list[Tensor],
        real: int,
        scored: int,
        first: int,
        count: int,
        weight: float,
        target: float,
        one_sided: bool,
        power: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss, penalty, scores and norms of ``reference.critic_loss``, in one operator."""
        result: tuple[Tensor, Tensor, Tensor, Tensor] = _ops.critic_loss(
            x,
            self.parameters,
            self.program,
            self.scalars,
            self.mean_outputs,
            real,
            scored,
            first,
            count,
            self.compute_dtype,
            self.channels_last,
            weight,
            target,
            one_sided,
            power,
        )
        return result


def evaluation(
    op: str,
    critic: Critic,
    x: Inputs,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    engine: Engine = "auto",
    *,
    mean_outputs: bool = False,
    copies: int = 1,
) -> Evaluation | None:
    """Read the critic's weights for one evaluation by the analytic engine, or return None if autograd must do it.

    The evaluation will have ``copies`` batches like x, one below the other, each with the same further arguments.
    """
    check_engine(op, engine)
    check_type(op, "critic_args", critic_args, (tuple, list), "a tuple or list")
    if critic_kwargs:
        check_type(op, "critic_kwargs", critic_kwargs, Mapping, "a mapping")
    critic = _unwrap(op, critic)
    engine = engine_under_transforms(op, engine)
    if engine == "autograd":
        return None
    args, kwargs = tuple(critic_args), dict(critic_kwargs or {})
    plan = plan_for(critic, x, args, kwargs, trust=engine == "auto")
    trace = plan.trace
    if plan.refused:
        raise NotImplementedError(f"{op}: {trace.obstacle}")
    if trace.obstacle:
        if engine == "analytic":
            raise NotImplementedError(f"{op}: the analytic engine cannot take this critic: {trace.obstacle}")
        return None
    first = tensors_of(op, "x", x)[0]
    parameters = read_parameters(plan, critic, args, kwargs, first.shape[0], copies)  # type: ignore[arg-type]
    dtype = plan.compute_dtype
    # oneDNN's convolutions are faster in channels_last (from 3 to 64 channels, several times); it has no float64.
    channels_last = trace.images and (
        (first.device.type == "cpu" and dtype == torch.float32) or _ops.suggested_format(first) == torch.channels_last
    )
    return Evaluation(parameters, trace.program, trace.scalars, dtype, channels_last, mean_outputs)


def check_engine(op: str, engine: str) -> None:
    """Raise ValueError unless there is such an engine."""
    if engine not in _ENGINES:
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


def double_backward(
    op: str,
    critic: Critic,
    x: Inputs,
    critic_args: Sequence[Any],
    critic_kwargs: Mapping[str, Any],
    mean_outputs: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return the critic's outputs, and the gradient of each sample's summed outputs by every tensor of x, by autograd.

    ``mean_outputs`` averages a sample's outputs instead.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{op}: torch.compile cannot differentiate twice, and this critic takes autograd's double backward; "
            "wgan_ext.explain(critic, x) says why"
        )
    critic = _unwrap(op, critic)
    # one look at the modules, of which most are none of these
    suspects = [m for m in critic.modules() if isinstance(m, _SUSPECTS)] if isinstance(critic, nn.Module) else []
    if suspects and (wrapped := wrapped_layer(critic)):  # type: ignore[arg-type]
        raise NotImplementedError(f"{op}: {wrapped}")
    if any(map(couples_samples, suspects)):
        warnings.warn(
            f"{op}: the critic normalizes over the batch, so that the gradient at a sample takes in the scores of the "
            "others; put BatchNorm in eval mode, or normalize each sample by itself",
            stacklevel=_callers_level(),
        )
    if transformed():

        def scores_of(points: Any) -> Tensor:
            scores = called(op, critic, points, critic_args, critic_kwargs)
            check_scores(op, scores, tensors_of(op, "x", points)[0].shape[0])
            return scores

        outputs, structure = scores_and_gradients(scores_of, map_tensors(lambda t: t, x), mean_outputs)
        return outputs, tensors_of(op, "x", structure)
    create_graph = torch.is_grad_enabled()
    # Not x itself, so that neither its grad nor its hooks are touched; a view of it where x is part of a graph.
    plain = create_graph and not torch.is_inference_mode_enabled()
    with contextlib.nullcontext() if plain else _recording():
        points: list[Tensor] = []
        leaves: list[Tensor] = []  # those of the points that are not in a graph

        def point(t: Tensor) -> Tensor:
            if create_graph and t.requires_grad:
                points.append(t.view_as(t))
            else:
                leaves.append((t.clone() if t.is_inference() else t.detach()).requires_grad_())
                points.append(leaves[-1])
            return points[-1]

        outputs = called(op, critic, map_tensors(point, x), critic_args, critic_kwargs)
        batch = points[0].shape[0]
        check_scores(op, outputs, batch)
        device_type = points[0].device.type
        weight = batch / outputs.numel() if mean_outputs else 1.0
        autocast = torch.is_autocast_enabled(device_type)
        with torch.autocast(device_type, enabled=False) if autocast else contextlib.nullcontext():
            gradients = torch.autograd.grad(
                outputs, points, torch.full_like(outputs, weight), create_graph=create_graph, allow_unused=True
            )
    if all(gradient is None for gradient in gradients):
        raise ValueError(f"{op}: the critic's scores do not depend on its input")
    if create_graph:
        _C.forget_leaves([outputs, *(g for g in gradients if g is not None)], leaves)
    return outputs, [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, points, strict=True)]


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _callers_level() -> int:
    """The stacklevel, for the function that calls this, of the code that called the library."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back and frame.f_globals["__name__"].startswith("wgan_ext."):
        level, frame = level + 1, frame.f_back
    return level + 1


def called(op: str, critic: Critic, x: Inputs, critic_args: Sequence[Any], critic_kwargs: Mapping[str, Any]) -> Tensor:
    """Call the critic; a forward that fails on inputs of another dtype or device than the critic's says so."""
    try:
        return critic(x, *critic_args, **critic_kwargs)
    except RuntimeError as error:
        first = tensors_of(op, "x", x)[0]
        own = _first_floating(critic)
        name = "x" if op == "input_gradient" else "real and fake"
        if own is not None and own.device != first.device:
            raise ValueError(
                f"{op}: {name} must be on the device of the critic ({own.device}), got {first.device}"
            ) from error
        if own is not None and own.dtype != first.dtype and compute_dtype(first) == first.dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of the critic ({own.dtype}), got {first.dtype}"
            ) from error
        raise


def _first_floating(critic: Critic) -> Tensor | None:
    parameters = critic.parameters() if isinstance(critic, nn.Module) else ()
    return next((p for p in parameters if p.is_floating_point()), None)


def check_scores(op: str, scores: object, batch: int, *, of_input: bool = True) -> None:
    """Raise unless the critic returned at least one score for each sample, computed from its input."""
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
    if of_input and not scores.requires_grad:
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
