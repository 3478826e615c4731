"""The operators as Python calls them.

Eager code uses the pybind11 entries of ``wgan_ext._C`` (0.7 us a call), code being compiled uses
``torch.ops.wgan_ext`` (which torch can trace); both go through the dispatcher and mean the same. Beside each operator
stand its fake kernel and its autocast rule, which torch needs to know; checks and kernels are in ``csrc``.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import _C

_F = TypeVar("_F", bound=Callable[..., Any])
_register_fake: Callable[[str], Callable[[_F], _F]] = torch.library.register_fake


def _operator(name: str) -> Callable[..., Any]:
    eager = getattr(_C, name)
    traced = getattr(torch.ops.wgan_ext, name).default

    def call(*args: Any) -> Any:
        return traced(*args) if torch.compiler.is_compiling() else eager(*args)

    call.__name__ = name
    return call


def suggested_format(x: Tensor) -> torch.memory_format:
    """The memory format that ATen takes x to have: Tensor.suggest_memory_format in C++."""
    for format, dim in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if x.dim() == dim and x.is_contiguous(memory_format=format) and not x.is_contiguous():
            return format
    return torch.contiguous_format


# critic


class Kind(enum.IntEnum):
    """What a record of a critic's program computes.

    A record is ``[kind, n, payload (n integers), d, size_1 .. size_d]``. It makes one value, whose shape without the
    batch is the sizes; the critic's inputs are the values 0, 1, ..., each record makes the next, and the last is the
    output. In a payload h, a, b number values, W, P, bias number parameters (bias -1 for none), s is the first of the
    record's scalars, and nd is the number of spatial dimensions.
    """

    LINEAR = 0  # h, W, bias: F.linear
    CONVOLUTION = 1  # h, W, bias, transposed, groups, stride*nd, padding*nd, dilation*nd, output_padding*nd
    RESHAPE = 2  # h
    PERMUTE = 3  # h, dims
    ACTIVATION = 4  # h, function, s
    PRELU = 5  # h, P
    MAX_POOL = 6  # h, kernel*nd, stride*nd, padding*nd, dilation*nd, ceil
    AVG_POOL = 7  # h, kernel*nd, stride*nd, padding*nd, ceil, count_include_pad, divisor (0: none)
    ADAPTIVE_AVG_POOL = 8  # h
    RESIZE = 9  # h, mode (Resize), align_corners, s: a scale factor a dimension, 0 for none
    PAD = 10  # h, mode (Pad), s: the constant, pads (last dimension first)
    ADD = 11  # a, b, s: a + scalars[s] b
    CAT = 12  # dim, values
    AFFINE = 13  # h, s: scalars[s] h + scalars[s + 1]
    CONSTANT = 14  # P, whose dim 0 is the rows or 1
    MULTIPLY_PARAMETER = 15  # h, P
    SUM = 16  # h, keepdim, dims
    MAX = 17  # h, dim, keepdim: torch.max(h, dim).values
    MULTIPLY = 18  # a, b
    NORMALIZE = 19  # h, k, s: (h - mean) / sqrt(var + scalars[s]) over the last k dimensions
    NARROW = 20  # h, dim, start, length
    EXPAND = 21  # h


class Function(enum.IntEnum):
    """The function of an activation, with its scalars."""

    LEAKY_RELU = 0  # slope
    HARDTANH = 1  # min, max
    SILU = 2
    GELU = 3
    GELU_TANH = 4
    SOFTPLUS = 5  # beta, threshold
    TANH = 6
    SIGMOID = 7
    ELU = 8  # alpha, scale, input_scale
    MISH = 9
    ABS = 10


class Resize(enum.IntEnum):
    """The interpolation of a resize."""

    NEAREST = 0
    LINEAR = 1
    CUBIC = 2


class Pad(enum.IntEnum):
    """What a pad continues the data with."""

    CONSTANT = 0
    REFLECT = 1
    REPLICATE = 2
    CIRCULAR = 3


# (x, parameters, program, scalars, mean_outputs, scored, first, count, compute_dtype, channels_last)
# -> (scores, gradients): see reference.critic. Its fake kernel is the engine itself, on meta tensors.
critic = _operator("critic")

# (x, parameters, program, scalars, mean_outputs, real, scored, first, count, compute_dtype, channels_last, weight,
# target, one_sided, power) -> (loss, penalty, scores, norms): see reference.critic_loss. Only loss is differentiable.
critic_loss = _operator("critic_loss")


# spectral

# (weight, u, v, dim, n_power_iterations, eps, v_first, target, shrink_only) -> (weight, u, v, sigma): see
# reference.spectral_norm; eps stands in for a sigma of exactly 0. The group takes a list for each argument and does all
# weights in one call of the kernels, _sigma leaves the weight out, and spectral_norm_ stores u and v in those it is
# given and returns the weight alone; spectral_norm_fold_ too, and returns the weight as it is and sigma.
spectral_norm = _operator("spectral_norm")
spectral_norm_group = _operator("spectral_norm_group")
spectral_norm_sigma = _operator("spectral_norm_sigma")
spectral_norm_backward = _operator("spectral_norm_backward")
spectral_norm_ = _operator("spectral_norm_")
spectral_norm_fold_ = _operator("spectral_norm_fold_")


@_register_fake("wgan_ext::spectral_norm")
def _(weight: Tensor, u: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sigma = weight.new_empty((), dtype=torch.promote_types(weight.dtype, torch.float32))
    return torch.empty_like(weight), torch.empty_like(u), torch.empty_like(v), sigma


@_register_fake("wgan_ext::spectral_norm_group")
def _(weight: list[Tensor], u: list[Tensor], v: list[Tensor], *options: Any) -> tuple[list[Tensor], ...]:
    sigmas = [w.new_empty((), dtype=torch.promote_types(w.dtype, torch.float32)) for w in weight]
    return (*([torch.empty_like(t) for t in tensors] for tensors in (weight, u, v)), sigmas)


@_register_fake("wgan_ext::spectral_norm_sigma")
def _(weight: Tensor, u: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    sigma = weight.new_empty((), dtype=torch.promote_types(weight.dtype, torch.float32))
    return torch.empty_like(u), torch.empty_like(v), sigma


@_register_fake("wgan_ext::spectral_norm_backward")
def _(grad: Tensor | None, grad_sigma: Tensor | None, weight: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(weight)


# sinkhorn

# The last two arguments of most are the offsets of a ragged batch (segments.py), on the CPU, or None.
sinkhorn = _operator("sinkhorn")
sinkhorn_divergence = _operator("sinkhorn_divergence")
sinkhorn_matrix = _operator("sinkhorn_matrix")
sinkhorn_transport = _operator("sinkhorn_transport")
sinkhorn_softmin = _operator("sinkhorn_softmin")


def _sinkhorn_type(x: Tensor) -> torch.dtype:
    """The kernels compute in float64 for float64 points, else in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@_register_fake("wgan_ext::sinkhorn")
def _(x: Tensor, y: Tensor, *options: Any) -> tuple[Tensor, ...]:
    value, *rest = _sinkhorn_result(x, y, options[-1])
    return (value.double(), *rest)


@_register_fake("wgan_ext::sinkhorn_divergence")
def _(x: Tensor, y: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return _sinkhorn_result(x, y, options[-1])


def _sinkhorn_result(x: Tensor, y: Tensor, offsets: Tensor | None) -> tuple[Tensor, ...]:
    batch = x.shape[:-2] if offsets is None else (offsets.shape[0] - 1,)
    value = x.new_empty(batch, dtype=_sinkhorn_type(x))
    f, g = value.new_empty(x.shape[:-1]), value.new_empty(y.shape[:-1])
    return (value, f, g, f.clone(), g.clone(), *_sinkhorn_facts(value))


@_register_fake("wgan_ext::sinkhorn_matrix")
def _(C: Tensor, *options: Any) -> tuple[Tensor, ...]:
    value = C.new_empty(C.shape[:-2], dtype=_sinkhorn_type(C))
    f, g = value.new_empty(C.shape[:-1]), value.new_empty(*C.shape[:-2], C.shape[-1])
    return (value, f, g, *_sinkhorn_facts(value))


def _sinkhorn_facts(value: Tensor) -> tuple[Tensor, ...]:
    """Marginal error, iterations, converged, epsilon."""
    dtypes = (value.dtype, torch.int64, torch.bool, torch.float64)
    return tuple(value.new_empty(value.shape, dtype=dtype) for dtype in dtypes)


@_register_fake("wgan_ext::sinkhorn_gradient")
@_register_fake("wgan_ext::sinkhorn_matrix_gradient")
@_register_fake("wgan_ext::sinkhorn_softmin_gradient")
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_register_fake("wgan_ext::sinkhorn_weight_gradient")
def _(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, f: Tensor, *terms: Any) -> Tensor:
    return torch.empty_like(f)


@_register_fake("wgan_ext::sinkhorn_transport")
def _(values: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return values.new_empty(*x.shape[:-1], values.shape[-1])


@_register_fake("wgan_ext::sinkhorn_softmin")
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=_sinkhorn_type(x))


for _name in ("sinkhorn", "sinkhorn_divergence", "sinkhorn_matrix", "sinkhorn_transport", "sinkhorn_softmin"):
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(f"wgan_ext::{_name}", _device, torch.float32)


def _sinkhorn_vmap(name: str, tensors: tuple[int, ...], dims: tuple[int, ...], ragged: bool) -> Callable[..., Any]:
    """Return the rule of an operator that solves a batch: the mapped dimension becomes the batch, or part of it.

    ``tensors`` are the places of the operator's tensors, ``dims`` their dimensions without a batch; ``ragged``: its
    last two arguments are offsets.
    """
    operator = getattr(torch.ops.wgan_ext, name).default

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if ragged and (args[-1] is not None or args[-2] is not None):
            raise NotImplementedError(
                f"{name}: vmap of a ragged batch is not implemented; put all problems in one ragged batch"
            )
        size, moved, batch = info.batch_size, list(args), None
        for place, dim in zip(tensors, dims, strict=True):
            t = args[place]
            if t is None:
                continue
            at = in_dims[place]
            t = t.expand(size, *t.shape) if at is None else t.movedim(at, 0)
            if t.dim() == dim + 2:
                batch = t.shape[1]
                t = t.flatten(0, 1)
            moved[place] = t
        result = operator(*moved)
        if batch is not None:
            result = tuple(t.unflatten(0, (size, batch)) for t in result)
        return result, tuple(0 for _ in result)

    return rule


for _name, _tensors, _dims, _ragged in (
    ("sinkhorn", (0, 1, 2, 3, 14, 15), (2, 2, 1, 1, 1, 1), True),
    ("sinkhorn_divergence", (0, 1, 2, 3), (2, 2, 1, 1), True),
    ("sinkhorn_matrix", (0, 1, 2, 10, 11), (2, 1, 1, 1, 1), False),
):
    torch.library.register_vmap(f"wgan_ext::{_name}", _sinkhorn_vmap(_name, _tensors, _dims, _ragged))
