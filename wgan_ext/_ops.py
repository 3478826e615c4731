"""The operators as Python calls them.

Eager code uses the pybind11 entries of ``wgan_ext._C`` (0.7 us a call), code being compiled uses
``torch.ops.wgan_ext`` (which torch can trace); both go through the dispatcher and mean the same. Beside each operator
stand its fake kernel and its autocast rule, which torch needs to know; checks and kernels are in ``csrc``.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
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


# (x, parameters, program, scalars, mean_outputs, scores, first, count, compute_dtype, channels_last)
# -> (scores, gradients): see reference.critic. Its Meta kernel is in csrc.
critic: Callable[..., Any] = _operator("critic") if hasattr(_C, "critic") else NotImplemented


# The kinds of a critic's program and the integers that follow each: see csrc/critic/op.cpp.
LINEAR, CONV2D, FLATTEN, ACTIVATION = range(4)
_RECORD = {LINEAR: 1, CONV2D: 8, FLATTEN: 2, ACTIVATION: 0}

critic_input_gradient = _operator("critic_input_gradient")


@_register_fake("wgan_ext::critic_input_gradient")
def _critic_input_gradient(
    x: Tensor,
    parameters: list[Tensor],
    program: Sequence[int],
    slopes: Sequence[float],
    mean_outputs: bool,
    compute_dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=suggested_format(x))


@_register_fake("wgan_ext::critic_input_gradient_forward")
def _critic_input_gradient_forward(
    x: Tensor,
    parameters: list[Tensor],
    program: Sequence[int],
    slopes: Sequence[float],
    mean_outputs: bool,
    compute_dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    records: list[Sequence[int]] = []
    while program:
        size = 1 + _RECORD[program[0]]
        records.append(program[:size])
        program = program[size:]
    kinds = [record[0] for record in records]
    last = max((i for i, kind in enumerate(kinds) if kind == ACTIVATION), default=-1)
    remaining = iter(parameters)
    shape, signs, chain = list(x.shape), [], []
    for i, record in enumerate(records):
        if record[0] in (LINEAR, CONV2D):
            weight = next(remaining)
            if record[1]:
                next(remaining)
        if record[0] == LINEAR:
            shape = [*shape[:-1], weight.shape[0]]
        elif record[0] == CONV2D:
            window = [
                (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
                for size, kernel, stride, padding, dilation in zip(
                    shape[2:], weight.shape[2:], record[2:4], record[4:6], record[6:8], strict=True
                )
            ]
            shape = [shape[0], weight.shape[0], *window]
        elif record[0] == FLATTEN:
            start, end = (dim % len(shape) for dim in record[1:])
            shape = [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]]
        else:
            by_feature = i > 0 and kinds[i - 1] == LINEAR and len(shape) != 4
            rows = math.prod(shape[:-1]) if by_feature else shape[0]
            columns = shape[-1] if by_feature else math.prod(shape[1:])
            signs.append(torch.empty(rows, (columns + 7) // 8, dtype=torch.uint8, device=x.device))
        if record[0] in (LINEAR, CONV2D):
            u_shape = [1, *shape[1:]] if i > last else shape
            format = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
            chain.append(torch.empty(u_shape, dtype=compute_dtype, device=x.device, memory_format=format))
    grad = _critic_input_gradient(x, parameters, program, slopes, mean_outputs, compute_dtype, channels_last)
    return grad, signs, chain


@_register_fake("wgan_ext::critic_input_gradient_backward")
def _critic_input_gradient_backward(
    grad: Tensor,
    parameters: list[Tensor],
    signs: list[Tensor],
    chain: list[Tensor],
    program: Sequence[int],
    slopes: Sequence[float],
    compute_dtype: torch.dtype,
    channels_last: bool,
    wanted: Sequence[int],
) -> list[Tensor]:
    weights = [parameter for parameter in parameters if parameter.dim() > 1]
    return [torch.empty_like(weights[i], memory_format=suggested_format(weights[i])) for i in wanted]


# spectral

spectral_norm = _operator("spectral_norm")
spectral_norm_backward = _operator("spectral_norm_backward")
spectral_norm_store_ = _operator("spectral_norm_store_")


@torch.library.register_fake("wgan_ext::spectral_norm")
def _(
    weight: Tensor, u: Tensor, v: Tensor, dim: int, n_power_iterations: int, eps: float, v_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sigma = weight.new_empty((), dtype=torch.promote_types(weight.dtype, torch.float32))
    return torch.empty_like(weight), torch.empty_like(u), torch.empty_like(v), sigma


@torch.library.register_fake("wgan_ext::spectral_norm_backward")
def _(
    grad: Tensor | None, grad_sigma: Tensor | None, weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor, dim: int
) -> Tensor:
    return torch.empty_like(weight)


# sinkhorn
sinkhorn = _operator("sinkhorn")
sinkhorn_divergence = _operator("sinkhorn_divergence")


def _sinkhorn_type(x: Tensor) -> torch.dtype:
    """The kernels compute in float64 for float64 points, else in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@_register_fake("wgan_ext::sinkhorn")
def _(x: Tensor, y: Tensor, *options: Any) -> tuple[Tensor, ...]:
    value = x.new_empty((), dtype=_sinkhorn_type(x))
    f, g = value.new_empty(x.shape[0]), value.new_empty(y.shape[0])
    return (value, f, g, f.clone(), g.clone(), *_sinkhorn_facts(value))


@_register_fake("wgan_ext::sinkhorn_divergence")
def _(x: Tensor, y: Tensor, *options: Any) -> tuple[Tensor, ...]:
    value = x.new_empty((), dtype=_sinkhorn_type(x))
    f, g = value.new_empty(x.shape[0]), value.new_empty(y.shape[0])
    return (value, f, g, f.clone(), g.clone(), *_sinkhorn_facts(value))


def _sinkhorn_facts(value: Tensor) -> tuple[Tensor, ...]:
    """Marginal error, iterations, converged, epsilon."""
    dtypes = (value.dtype, torch.int64, torch.bool, torch.float64)
    return tuple(value.new_empty((), dtype=dtype) for dtype in dtypes)


@_register_fake("wgan_ext::sinkhorn_gradient")
def _(x: Tensor, y: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_register_fake("wgan_ext::sinkhorn_weight_gradient")
def _(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, f: Tensor, cost: str) -> Tensor:
    return torch.empty_like(f)


for _name in ("sinkhorn", "sinkhorn_divergence"):
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(f"wgan_ext::{_name}", _device, torch.float32)
