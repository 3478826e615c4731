"""The operator `critic` against its specification in plain torch, `reference.critic`."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from wgan_ext import _ops, build_info, reference
from wgan_ext._ops import Function, Kind, Pad, Resize

EPS = 1e-12  # of float64, times the largest number of a result


class Program:
    """Writes a program record by record; knows the size of every value, as the reference makes it on meta tensors."""

    def __init__(self, *shapes: Sequence[int], batch: int = 4) -> None:
        self.batch = batch
        self.x = [torch.randn(batch, *shape, dtype=torch.float64) for shape in shapes]
        self.parameters: list[Tensor] = []
        self.records: list[int] = []
        self.scalars: list[float] = []
        self.values = [t.to("meta") for t in self.x]

    def sizes(self, h: int) -> list[int]:
        return list(self.values[h].shape[1:])

    def parameter(self, *shape: int, scale: float = 1.0) -> int:
        self.parameters.append(torch.randn(shape, dtype=torch.float64) * scale)
        return len(self.parameters) - 1

    def numbers(self, *numbers: float) -> int:
        self.scalars += numbers
        return len(self.scalars) - len(numbers)

    def record(self, kind: Kind, *payload: int, sizes: Sequence[int] = ()) -> int:
        parameters = [p.to("meta") for p in self.parameters]
        value = reference._value(kind, list(payload), list(sizes), self.values, parameters, self.scalars)
        self.values.append(value)
        self.records += [kind, len(payload), *payload, value.dim() - 1, *value.shape[1:]]
        return len(self.values) - 1

    def linear(self, h: int, width: int, bias: bool = True) -> int:
        n = self.sizes(h)[-1]
        W, b = self.parameter(width, n, scale=n**-0.5), self.parameter(width) if bias else -1
        return self.record(Kind.LINEAR, h, W, b)

    def convolution(
        self,
        h: int,
        channels: int,
        kernel: Sequence[int],
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        output_padding: int = 0,
        groups: int = 1,
        transposed: bool = False,
        bias: bool = True,
    ) -> int:
        n, nd = self.sizes(h)[0], len(kernel)
        shape = (n, channels // groups) if transposed else (channels, n // groups)
        W = self.parameter(*shape, *kernel, scale=(shape[1] * math.prod(kernel)) ** -0.5)
        geometry = [i for i in (stride, padding, dilation, output_padding) for _ in range(nd)]
        return self.record(
            Kind.CONVOLUTION, h, W, self.parameter(channels) if bias else -1, transposed, groups, *geometry
        )

    def activation(self, h: int, function: Function, *scalars: float) -> int:
        return self.record(Kind.ACTIVATION, h, function, self.numbers(*scalars) if scalars else -1)

    def reshape(self, h: int, *sizes: int) -> int:
        return self.record(Kind.RESHAPE, h, sizes=sizes)

    def flatten(self, h: int) -> int:
        return self.reshape(h, math.prod(self.sizes(h)))

    def resize(self, h: int, mode: Resize, size: Sequence[int], align: bool = False, *scales: float) -> int:
        s = self.numbers(*(scales or [0.0] * len(size)))
        return self.record(Kind.RESIZE, h, mode, align, s, sizes=[self.sizes(h)[0], *size])

    def pad(self, h: int, mode: Pad, *pads: int, constant: float = 0.0) -> int:
        return self.record(Kind.PAD, h, mode, self.numbers(constant), *pads)

    def add(self, a: int, b: int, alpha: float = 1.0) -> int:
        return self.record(Kind.ADD, a, b, self.numbers(alpha))

    def affine(self, h: int, scale: float, offset: float) -> int:
        return self.record(Kind.AFFINE, h, self.numbers(scale, offset))

    def constant(self, *shape: int) -> int:
        return self.record(Kind.CONSTANT, self.parameter(*shape))

    def multiply_parameter(self, h: int, *shape: int) -> int:
        return self.record(Kind.MULTIPLY_PARAMETER, h, self.parameter(*shape))

    def square(self, h: int) -> int:
        return self.record(Kind.MULTIPLY, h, h)

    def sum(self, h: int, *dims: int, keepdim: bool = False) -> int:
        return self.record(Kind.SUM, h, keepdim, *dims)

    def normalize(self, h: int, k: int, eps: float = 0.1) -> int:
        return self.record(Kind.NORMALIZE, h, k, self.numbers(eps))


# How it is evaluated


@dataclass(frozen=True)
class Mode:
    scored: int
    first: int
    count: int
    mean: bool = False
    channels_last: bool = False
    of: str = "both"  # what the loss depends on

    def fits(self, rows: int) -> bool:
        return self.scored <= rows and self.first + self.count <= rows


def evaluate(
    critic: Callable[..., tuple[Tensor, list[Tensor]]],
    p: Program,
    mode: Mode,
    compute: torch.dtype = torch.float64,
    x: Sequence[Tensor] | None = None,
    parameters: Sequence[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    return critic(
        p.x if x is None else x,
        p.parameters if parameters is None else parameters,
        p.records,
        p.scalars,
        mode.mean,
        mode.scored,
        mode.first,
        mode.count,
        compute,
        mode.channels_last,
    )


def generic(t: Tensor) -> Tensor:
    w = torch.arange(t.numel(), dtype=torch.float64, device=t.device).mul_(1.7).add_(0.3).cos_().view(t.shape)
    w = w.to(t.dtype)
    return (w * t + 0.25 * w.flip(0) * t * t).sum()


def loss(scores: Tensor, gradients: Sequence[Tensor], of: str = "both") -> Tensor:
    terms = [scores] if of == "scores" else list(gradients) if of == "gradients" else [scores, *gradients]
    return torch.stack([generic(t) for t in terms]).sum()


def differentiate(
    critic: Callable[..., tuple[Tensor, list[Tensor]]], p: Program, mode: Mode, compute: torch.dtype = torch.float64
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The scores and gradients, and the derivatives of the generic loss of them."""
    x = [t.detach().requires_grad_(not mode.scored) for t in p.x]
    parameters = [t.detach().requires_grad_() for t in p.parameters]
    scores, gradients = evaluate(critic, p, mode, compute, x, parameters)
    leaves = parameters + ([] if mode.scored else x)
    value = loss(scores, gradients, mode.of)
    if not value.requires_grad or not leaves:
        return [scores, *gradients], [None] * len(leaves)
    return [scores, *gradients], list(torch.autograd.grad(value, leaves, allow_unused=True))


def assert_close(
    ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None], eps: float = EPS, floor: float = 0.0
) -> None:
    """Equal up to eps times the largest number of all, and None in the same places."""
    scale = max((float(t.detach().abs().max()) for t in theirs if t is not None and t.numel()), default=0.0)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a is None or b is None:
            assert a is b, (
                f"{i}: {'none' if a is None else list(a.shape)}, not {'none' if b is None else list(b.shape)}"
            )
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype), i
        error = float((a - b).detach().abs().max()) if a.numel() else 0.0
        assert error <= eps * max(scale or 1.0, floor), f"{i}: off by {error} of {scale}"


def is_nothing(t: Tensor | None) -> bool:
    return t is None or not t.any()


def without_zeros(
    ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Those of which not both are none or zeros."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if not (is_nothing(a) and is_nothing(b))]
    return [a for a, _ in pairs], [b for _, b in pairs]


def check(p: Program, mode: Mode, strict: bool = True) -> None:
    """Compare values and derivatives; unless strict, none and zeros are the same, and small results may be inexact."""
    ours, grads = differentiate(_ops.critic, p, mode)
    theirs, their_grads = differentiate(reference.critic, p, mode)
    floor = 0.0 if strict else 1.0
    assert_close(ours, theirs, floor=floor)
    if not strict or (mode.scored and mode.of == "gradients"):
        # The engine knows what it computed, not what of it was used: all that moves scores gets a gradient.
        grads, their_grads = without_zeros(grads, their_grads)
    assert_close(grads, their_grads, floor=floor)


# One case for each kind of layer, and for each of its modes: the sizes of a value, and what makes another of it


Case = tuple[list[int], Callable[[Program, int], int]]
CASES: dict[str, Case] = {
    "linear": ([5], lambda p, h: p.linear(h, 4)),
    "linear without bias": ([5], lambda p, h: p.linear(h, 4, bias=False)),
    "linear on sequences": ([3, 5], lambda p, h: p.linear(h, 4)),
    "linear on grids": ([2, 3, 5], lambda p, h: p.linear(h, 4)),
    "convolution 1d": ([3, 7], lambda p, h: p.convolution(h, 4, [3], stride=2, padding=1)),
    "convolution 2d": ([3, 5, 6], lambda p, h: p.convolution(h, 4, [3, 2], stride=2, padding=1)),
    "convolution 2d without bias": ([3, 5, 6], lambda p, h: p.convolution(h, 4, [3, 2], bias=False)),
    "convolution 3d": ([2, 4, 3, 5], lambda p, h: p.convolution(h, 3, [2, 3, 2], stride=2, padding=1)),
    "dilated convolution": ([2, 6, 7], lambda p, h: p.convolution(h, 3, [2, 3], padding=1, dilation=2)),
    "grouped convolution": ([4, 5, 5], lambda p, h: p.convolution(h, 6, [3, 3], stride=2, groups=2)),
    "depthwise convolution": ([3, 5, 5], lambda p, h: p.convolution(h, 6, [3, 3], padding=1, groups=3)),
    "grouped convolution 1d": ([4, 6], lambda p, h: p.convolution(h, 2, [3], dilation=2, groups=2)),
    "transposed convolution 1d": (
        [3, 4], lambda p, h: p.convolution(h, 2, [3], stride=2, padding=1, output_padding=1, transposed=True)
    ),
    "transposed convolution 2d": (
        [4, 3, 2],
        lambda p, h: p.convolution(h, 6, [3, 2], stride=3, output_padding=2, groups=2, transposed=True),
    ),
    "transposed convolution 3d": (
        [2, 2, 3, 2],
        lambda p, h: p.convolution(h, 2, [2, 2, 3], 2, 1, 1, output_padding=1, transposed=True, bias=False),
    ),
    "dilated transposed convolution": (
        [2, 3, 3], lambda p, h: p.convolution(h, 3, [2, 3], padding=1, dilation=2, transposed=True)
    ),
    "reshape": ([2, 6], lambda p, h: p.reshape(h, 3, 4)),
    "reshape to images": ([2, 6], lambda p, h: p.reshape(h, 3, 2, 2)),
    "reshape of images": ([3, 2, 2], lambda p, h: p.reshape(h, 2, 6)),
    "permute": ([2, 3], lambda p, h: p.record(Kind.PERMUTE, h, 0, 2, 1)),
    "permute images": ([2, 3, 4], lambda p, h: p.record(Kind.PERMUTE, h, 0, 3, 1, 2)),
    "relu": ([3, 5], lambda p, h: p.activation(h, Function.LEAKY_RELU, 0.0)),
    "leaky relu": ([3, 5], lambda p, h: p.activation(h, Function.LEAKY_RELU, 0.2)),
    "leaky relu on images": ([3, 2, 5], lambda p, h: p.activation(h, Function.LEAKY_RELU, 0.2)),
    "falling leaky relu": ([17], lambda p, h: p.activation(h, Function.LEAKY_RELU, -0.5)),
    "steep leaky relu": ([7], lambda p, h: p.activation(h, Function.LEAKY_RELU, 1.5)),
    "hardtanh": ([3, 5], lambda p, h: p.activation(h, Function.HARDTANH, -0.4, 0.7)),
    "hardtanh on images": ([3, 2, 5], lambda p, h: p.activation(h, Function.HARDTANH, -0.4, 0.7)),
    "silu": ([3, 5], lambda p, h: p.activation(h, Function.SILU)),
    "gelu": ([3, 5], lambda p, h: p.activation(h, Function.GELU)),
    "gelu by tanh": ([3, 5], lambda p, h: p.activation(h, Function.GELU_TANH)),
    "softplus": ([3, 5], lambda p, h: p.activation(h, Function.SOFTPLUS, 1.0, 20.0)),
    "softplus with a threshold": ([3, 5], lambda p, h: p.activation(h, Function.SOFTPLUS, 1.7, 0.8)),
    "tanh": ([3, 5], lambda p, h: p.activation(h, Function.TANH)),
    "sigmoid": ([3, 5], lambda p, h: p.activation(h, Function.SIGMOID)),
    "elu": ([3, 5], lambda p, h: p.activation(h, Function.ELU, 1.0, 1.0, 1.0)),
    "elu with scales": ([3, 5], lambda p, h: p.activation(h, Function.ELU, 1.6, 1.05, 0.7)),
    "mish": ([3, 5], lambda p, h: p.activation(h, Function.MISH)),
    "abs": ([3, 5], lambda p, h: p.activation(h, Function.ABS)),
    "tanh on images": ([3, 2, 5], lambda p, h: p.activation(h, Function.TANH)),
    "prelu": ([5], lambda p, h: p.record(Kind.PRELU, h, p.parameter(1))),
    "prelu of channels": ([5], lambda p, h: p.record(Kind.PRELU, h, p.parameter(5))),
    "prelu of sequences": ([3, 5], lambda p, h: p.record(Kind.PRELU, h, p.parameter(3))),
    "prelu of images": ([3, 2, 4], lambda p, h: p.record(Kind.PRELU, h, p.parameter(3))),
    "max pool 1d": ([2, 7], lambda p, h: p.record(Kind.MAX_POOL, h, 3, 2, 1, 1, 0)),
    "max pool 2d": ([2, 6, 7], lambda p, h: p.record(Kind.MAX_POOL, h, 2, 2, 2, 2, 0, 0, 1, 1, 0)),
    "overlapping max pool 2d": ([2, 6, 7], lambda p, h: p.record(Kind.MAX_POOL, h, 3, 2, 1, 1, 1, 0, 2, 1, 0)),
    "max pool 2d rounded up": ([2, 6, 8], lambda p, h: p.record(Kind.MAX_POOL, h, 3, 3, 2, 2, 1, 1, 1, 2, 1)),
    "max pool 1d rounded up": ([2, 8], lambda p, h: p.record(Kind.MAX_POOL, h, 3, 2, 0, 1, 1)),
    "max pool 3d": (
        [2, 4, 3, 5], lambda p, h: p.record(Kind.MAX_POOL, h, 2, 3, 2, 2, 1, 1, 1, 1, 0, 1, 1, 2, 1)
    ),
    "avg pool 1d": ([2, 7], lambda p, h: p.record(Kind.AVG_POOL, h, 3, 2, 1, 0, 1, 0)),
    "avg pool 1d rounded up": ([2, 8], lambda p, h: p.record(Kind.AVG_POOL, h, 3, 2, 1, 1, 0, 0)),
    "avg pool 2d": ([2, 6, 7], lambda p, h: p.record(Kind.AVG_POOL, h, 3, 2, 2, 1, 1, 1, 0, 1, 0)),
    "avg pool 2d without the padding": (
        [2, 6, 7], lambda p, h: p.record(Kind.AVG_POOL, h, 3, 2, 2, 2, 1, 1, 1, 0, 0)
    ),
    "avg pool 2d with a divisor": ([2, 5, 7], lambda p, h: p.record(Kind.AVG_POOL, h, 3, 2, 2, 2, 1, 0, 1, 1, 5)),
    "avg pool 3d": ([2, 4, 3, 5], lambda p, h: p.record(Kind.AVG_POOL, h, 2, 3, 2, 2, 1, 2, 1, 1, 0, 1, 0, 0)),
    "avg pool 3d with a divisor": (
        [2, 4, 3, 5], lambda p, h: p.record(Kind.AVG_POOL, h, 2, 3, 2, 2, 1, 2, 1, 1, 0, 0, 1, 3)
    ),
    "adaptive avg pool 1d": ([2, 7], lambda p, h: p.record(Kind.ADAPTIVE_AVG_POOL, h, sizes=[2, 3])),
    "adaptive avg pool 2d": ([2, 5, 4], lambda p, h: p.record(Kind.ADAPTIVE_AVG_POOL, h, sizes=[2, 3, 3])),
    "adaptive avg pool 2d to one": ([2, 5, 4], lambda p, h: p.record(Kind.ADAPTIVE_AVG_POOL, h, sizes=[2, 1, 1])),
    "adaptive avg pool 2d to more": ([2, 3, 2], lambda p, h: p.record(Kind.ADAPTIVE_AVG_POOL, h, sizes=[2, 5, 3])),
    "adaptive avg pool 3d": ([2, 4, 3, 5], lambda p, h: p.record(Kind.ADAPTIVE_AVG_POOL, h, sizes=[2, 3, 2, 2])),
    "pad 1d": ([2, 4], lambda p, h: p.pad(h, Pad.CONSTANT, 1, 2, constant=0.7)),
    "pad 2d": ([2, 3, 4], lambda p, h: p.pad(h, Pad.CONSTANT, 1, 0, 2, 3, constant=-0.3)),
    "pad the last dimension": ([2, 3, 4], lambda p, h: p.pad(h, Pad.CONSTANT, 2, 1)),
    "pad channels": ([2, 3, 4], lambda p, h: p.pad(h, Pad.CONSTANT, 0, 0, 0, 0, 1, 2)),
    "crop": ([2, 4, 5], lambda p, h: p.pad(h, Pad.CONSTANT, -1, 2, 1, -2, constant=0.4)),
    "pad 3d": ([2, 2, 3, 2], lambda p, h: p.pad(h, Pad.CONSTANT, 1, 0, 0, 1, 2, 1)),
    "reflect 1d": ([2, 4], lambda p, h: p.pad(h, Pad.REFLECT, 3, 1)),
    "reflect 2d": ([2, 4, 3], lambda p, h: p.pad(h, Pad.REFLECT, 2, 1, 0, 3)),
    "reflect 3d": ([2, 2, 3, 4], lambda p, h: p.pad(h, Pad.REFLECT, 3, 1, 0, 2, 1, 1)),
    "replicate 1d": ([2, 3], lambda p, h: p.pad(h, Pad.REPLICATE, 4, 1)),
    "replicate 2d": ([2, 3, 2], lambda p, h: p.pad(h, Pad.REPLICATE, 2, 1, 0, 3)),
    "replicate 3d": ([2, 2, 3, 2], lambda p, h: p.pad(h, Pad.REPLICATE, 2, 1, 0, 3, 1, 1)),
    "circular 1d": ([2, 4], lambda p, h: p.pad(h, Pad.CIRCULAR, 4, 1)),
    "circular 2d": ([2, 3, 4], lambda p, h: p.pad(h, Pad.CIRCULAR, 1, 3, 2, 0)),
    "circular 3d": ([2, 2, 3, 2], lambda p, h: p.pad(h, Pad.CIRCULAR, 2, 1, 0, 3, 1, 1)),
    "add": ([2, 3], lambda p, h: p.add(h, p.affine(h, 0.5, 0.1))),
    "add to itself": ([2, 3], lambda p, h: p.add(h, h, 0.5)),
    "subtract": ([2, 3], lambda p, h: p.add(p.activation(h, Function.SILU), h, -1.5)),
    "add what is broadcast": ([2, 3], lambda p, h: p.add(h, p.sum(h, 2, keepdim=True), 0.7)),
    "add to what is broadcast": ([2, 3], lambda p, h: p.add(p.sum(h, 1, keepdim=True), h, 0.7)),
    "add both broadcast": ([2, 3], lambda p, h: p.add(p.sum(h, 1, keepdim=True), p.sum(h, 2, keepdim=True), 0.7)),
    "add a constant": ([2, 3], lambda p, h: p.add(h, p.constant(1, 2, 3), 0.7)),
    "add to a constant": ([2, 3], lambda p, h: p.add(p.constant(1, 1, 3), h, 0.7)),
    "add a constant of each sample": ([2, 3], lambda p, h: p.add(h, p.constant(p.batch, 2, 1), 0.7)),
    "cat": ([2, 3], lambda p, h: p.record(Kind.CAT, 1, h, p.affine(h, 2.0, 1.0), h)),
    "cat with a constant": ([2, 3], lambda p, h: p.record(Kind.CAT, 2, h, p.constant(1, 2, 2))),
    "cat with a constant of each sample": (
        [2, 3, 2], lambda p, h: p.record(Kind.CAT, 1, p.constant(p.batch, 1, 3, 2), h)
    ),
    "cat of one": ([2, 3], lambda p, h: p.record(Kind.CAT, 1, h)),
    "affine": ([2, 3], lambda p, h: p.affine(h, 1.5, -0.3)),
    "shift": ([2, 3], lambda p, h: p.affine(h, 1.0, 0.4)),
    "scale": ([2, 3], lambda p, h: p.affine(h, -2.0, 0.0)),
    "identity": ([2, 3], lambda p, h: p.affine(h, 1.0, 0.0)),
    "multiply by a parameter": ([2, 3], lambda p, h: p.multiply_parameter(h, 2, 3)),
    "multiply by a vector": ([2, 3], lambda p, h: p.multiply_parameter(h, 3)),
    "multiply by a scalar": ([2, 3], lambda p, h: p.multiply_parameter(h)),
    "multiply channels": ([2, 3, 2], lambda p, h: p.multiply_parameter(h, 1, 2, 1, 1)),
    "multiply by a larger parameter": ([1, 3], lambda p, h: p.multiply_parameter(h, 4, 3)),
    "multiply each sample": ([2, 3], lambda p, h: p.multiply_parameter(h, p.batch, 2, 3)),
    "multiply channels of each sample": ([2, 3, 2], lambda p, h: p.multiply_parameter(h, p.batch, 2, 1, 1)),
    "multiply each sample by a larger parameter": ([2, 1], lambda p, h: p.multiply_parameter(h, p.batch, 1, 3)),
    "sum": ([2, 3], lambda p, h: p.sum(h, 1)),
    "sum over two": ([2, 3, 2], lambda p, h: p.sum(h, 1, 3)),
    "sum and keep": ([2, 3, 2], lambda p, h: p.sum(h, 2, 3, keepdim=True)),
    "sum over all": ([2, 3], lambda p, h: p.sum(h, 2, 1)),
    "max": ([3, 4], lambda p, h: p.record(Kind.MAX, h, 1, 0)),
    "max of all": ([7], lambda p, h: p.record(Kind.MAX, h, 1, 0)),
    "max and keep": ([2, 3, 4], lambda p, h: p.record(Kind.MAX, h, 3, 1)),
    "multiply": ([2, 3], lambda p, h: p.record(Kind.MULTIPLY, h, p.activation(h, Function.SIGMOID))),
    "square": ([2, 3], lambda p, h: p.square(h)),
    "multiply with broadcasting": ([2, 3], lambda p, h: p.record(Kind.MULTIPLY, h, p.sum(h, 1, keepdim=True))),
    "multiply both with broadcasting": (
        [2, 3], lambda p, h: p.record(Kind.MULTIPLY, p.sum(h, 2, keepdim=True), p.sum(h, 1, keepdim=True))
    ),
    "multiply by a constant": ([2, 3], lambda p, h: p.record(Kind.MULTIPLY, p.constant(1, 1, 3), h)),
    "multiply by a function of a constant": (
        [2, 3], lambda p, h: p.record(Kind.MULTIPLY, h, p.activation(p.linear(p.constant(1, 2, 4), 3), Function.TANH))
    ),
    "normalize": ([2, 5], lambda p, h: p.multiply_parameter(p.normalize(h, 1), 5)),
    "normalize two dimensions": ([2, 5], lambda p, h: p.multiply_parameter(p.normalize(h, 2), 2, 5)),
    "normalize images": ([2, 3, 4], lambda p, h: p.multiply_parameter(p.normalize(h, 2, 1e-2), 3, 1)),
    "normalize all of images": ([2, 3, 4], lambda p, h: p.multiply_parameter(p.normalize(h, 3), 2, 1, 1)),
    "square of what is normalized": ([2, 5], lambda p, h: p.square(p.normalize(h, 1))),
    "narrow": ([2, 5], lambda p, h: p.record(Kind.NARROW, h, 2, 1, 3)),
    "narrow images": ([4, 2, 3], lambda p, h: p.record(Kind.NARROW, h, 1, 2, 2)),
    "expand": ([1, 3], lambda p, h: p.record(Kind.EXPAND, h, sizes=[4, 3])),
    "expand images": ([2, 1, 1], lambda p, h: p.record(Kind.EXPAND, h, sizes=[2, 3, 2])),
    **{
        f"add {name} of a constant": (
            [2, 5], lambda p, h, f=f, s=s: p.add(h, p.activation(p.constant(1, 2, 5), f, *s))
        )
        for name, f, s in (
            ("relu", Function.LEAKY_RELU, [0.0]),
            ("abs", Function.ABS, []),
            ("tanh", Function.TANH, []),
            ("hardtanh", Function.HARDTANH, [-0.5, 0.5]),
        )
    },
    "add a normalized constant": ([2, 5], lambda p, h: p.add(h, p.square(p.normalize(p.constant(4, 2, 5), 1)))),
    "add a product of constants": (
        [2, 5], lambda p, h: p.add(h, p.record(Kind.MULTIPLY, p.constant(1, 2, 5), p.constant(p.batch, 2, 5)))
    ),
    "add the largest of a constant": ([2, 5], lambda p, h: p.add(h, p.record(Kind.MAX, p.constant(1, 2, 5), 2, 1))),
    "add prelu of a constant": (
        [2, 5], lambda p, h: p.add(h, p.record(Kind.PRELU, p.constant(1, 2, 5), p.parameter(2)))
    ),
    "add a pooled constant": (
        [2, 3], lambda p, h: p.add(h, p.record(Kind.MAX_POOL, p.constant(1, 2, 6), 2, 2, 0, 1, 0))
    ),
}  # fmt: skip


def _resizes() -> dict[str, Case]:
    cases: dict[str, Case] = {}

    def add(name: str, mode: Resize, sizes: list[int], size: list[int], align: bool, *scales: float) -> None:
        cases[name] = (sizes, lambda p, h: p.resize(h, mode, size, align, *scales))

    for nd in (1, 2, 3):
        small, large, scales = [3, 2, 4][:nd], [7, 4, 5][:nd], [2.4, 2.2, 1.4][:nd]
        for mode in (Resize.NEAREST, Resize.LINEAR) + ((Resize.CUBIC,) if nd == 2 else ()):
            name = f"{mode.name.lower()} {nd}d"
            add(f"resize {name} up", mode, [2, *small], large, False)
            add(f"resize {name} down", mode, [2, *large], small, False)
            add(f"resize {name} by scales", mode, [2, *small], large, False, *scales)
            if mode != Resize.NEAREST:
                add(f"resize {name} aligned", mode, [2, *small], large, True)
                add(f"resize {name} aligned down", mode, [2, *large], small, True)
    add("resize by one scale", Resize.LINEAR, [2, 3, 4], [7, 5], False, 2.4, 0.0)
    return cases


CASES |= _resizes()


# Where in a critic it stands


def body(p: Program, h: int) -> int:
    """Parameters below; keeps the sizes."""
    return p.activation(p.linear(h, p.sizes(h)[-1]), Function.SILU)


def head(p: Program, h: int) -> int:
    """Parameters above, two outputs."""
    return p.linear(p.activation(p.linear(p.flatten(h), 4), Function.TANH), 2)


def piecewise_body(p: Program, h: int) -> int:
    return p.activation(p.linear(h, p.sizes(h)[-1]), Function.LEAKY_RELU, 0.2)


def piecewise_head(p: Program, h: int) -> int:
    return p.linear(p.activation(p.linear(p.flatten(h), 5), Function.LEAKY_RELU, 0.2), 2)


def reused(p: Program, h: int, layer: Callable[[Program, int], int]) -> int:
    """Every value is used more than once: by two layers, by a sum, by a cat, by a product."""
    x, h = h, body(p, h)
    y, z = layer(p, h), layer(p, h)
    both = p.add(y, z, -0.7)
    t = p.linear(p.record(Kind.CAT, 1, p.flatten(both), p.flatten(y), p.flatten(h), p.flatten(x)), 4)
    t = p.add(t, p.activation(p.linear(t, 4), Function.LEAKY_RELU, 0.1))
    return p.record(Kind.MULTIPLY, t, p.activation(p.linear(p.flatten(x), 4), Function.SIGMOID))


PLACES: dict[str, Callable[[Program, int, Callable[[Program, int], int]], int]] = {
    "alone": lambda p, x, layer: layer(p, x),
    "first": lambda p, x, layer: head(p, layer(p, x)),
    "last": lambda p, x, layer: layer(p, body(p, x)),
    "between": lambda p, x, layer: head(p, layer(p, body(p, x))),
    "piecewise": lambda p, x, layer: piecewise_head(p, layer(p, piecewise_body(p, x))),
    "piecewise last": lambda p, x, layer: layer(p, piecewise_body(p, x)),
    "reused": reused,
}
MODES = [
    Mode(0, 0, 4, of="gradients"),
    Mode(0, 0, 4, mean=True, channels_last=True, of="gradients"),
    Mode(4, 1, 2, mean=True),
    Mode(4, 0, 4, channels_last=True),
    Mode(3, 3, 1),
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", CASES)
def test_layers(case: str, place: str) -> None:
    sizes, layer = CASES[case]
    p = Program(sizes)
    PLACES[place](p, 0, layer)
    for mode in MODES:
        # Where the gradient does not depend on x, some of autograd's formulas give x zeros and some give none (of the
        # linear layers pools do, convolutions do not); the engine gives zeros only where a layer is not linear.
        check(p, mode, strict=place != "alone")


# Random critics


ACTIVATIONS: list[tuple[Function, tuple[float, ...]]] = [
    (Function.LEAKY_RELU, (0.2,)),
    (Function.LEAKY_RELU, (0.0,)),
    (Function.HARDTANH, (-0.8, 0.9)),
    (Function.SILU, ()),
    (Function.GELU, ()),
    (Function.GELU_TANH, ()),
    (Function.SOFTPLUS, (1.3, 1.0)),
    (Function.TANH, ()),
    (Function.SIGMOID, ()),
    (Function.ELU, (1.2, 1.1, 0.8)),
    (Function.MISH, ()),
    (Function.ABS, ()),
]
Draw = Callable[[st.SearchStrategy[Any]], Any]


def some(draw: Draw, options: Sequence[Any]) -> Any:
    return draw(st.sampled_from(list(options)))


def number(draw: Draw, low: int, high: int) -> int:
    n: int = draw(st.integers(low, high))
    return n


def alike(draw: Draw, p: Program, h: int, dim: int | None = None) -> int:
    """A value with the sizes of h, but along dim, or h."""
    sizes = p.sizes(h)

    def fits(other: list[int]) -> bool:
        return len(other) == len(sizes) and all(
            n == m or i + 1 == dim for i, (n, m) in enumerate(zip(other, sizes, strict=True))
        )

    others = [i for i in range(len(p.values)) if fits(p.sizes(i))]
    n: int = some(draw, others)
    return n


def broadcastable(draw: Draw, p: Program, sizes: list[int]) -> list[int]:
    return [some(draw, (1, n)) for n in sizes]


def spatial_step(draw: Draw, p: Program, h: int) -> int:
    sizes = p.sizes(h)
    c, space = sizes[0], sizes[1:]
    nd = len(space)

    def each(low: int, high: int) -> list[int]:
        return [number(draw, low, high) for _ in range(nd)]

    kind = some(draw, ("convolution", "transposed", "max", "avg", "adaptive", "resize", "pad"))
    kernel = [number(draw, 1, min(3, n)) for n in space]
    padding = [number(draw, 0, k // 2) for k in kernel]
    if kind in ("convolution", "transposed"):
        groups = some(draw, [g for g in (1, 2, 3) if c % g == 0])
        channels = groups * number(draw, 1, 2)
        shape = (c, channels // groups) if kind == "transposed" else (channels, c // groups)
        W = p.parameter(*shape, *kernel, scale=(shape[1] * math.prod(kernel)) ** -0.5)
        b = p.parameter(channels) if draw(st.booleans()) else -1
        stride, transposed = each(1, 2), kind == "transposed"
        extra = [number(draw, 0, s - 1) if transposed else 0 for s in stride]
        if transposed:
            padding = [min(i, (n - 1) * s // 2) for i, n, s in zip(padding, space, stride, strict=True)]
        return p.record(Kind.CONVOLUTION, h, W, b, transposed, groups, *stride, *padding, *[1] * nd, *extra)
    if kind == "max":
        return p.record(Kind.MAX_POOL, h, *kernel, *each(1, 2), *padding, *[1] * nd, number(draw, 0, 1))
    if kind == "avg":
        divisor = number(draw, 0, 3) if nd > 1 else 0
        return p.record(
            Kind.AVG_POOL, h, *kernel, *each(1, 2), *padding, number(draw, 0, 1), number(draw, 0, 1), divisor
        )
    if kind == "adaptive":
        return p.record(Kind.ADAPTIVE_AVG_POOL, h, sizes=[c, *each(1, 3)])
    if kind == "resize":
        mode = some(draw, (Resize.NEAREST, Resize.LINEAR) + ((Resize.CUBIC,) if nd == 2 else ()))
        return p.resize(h, mode, each(1, 4), mode != Resize.NEAREST and draw(st.booleans()))
    mode = some(draw, Pad)
    most = {Pad.CONSTANT: 2, Pad.REPLICATE: 2, Pad.REFLECT: min(space) - 1, Pad.CIRCULAR: min(space)}[mode]
    return p.pad(h, mode, *[number(draw, 0, min(most, 2)) for _ in range(2 * nd)], constant=0.3)


def step(draw: Draw, p: Program) -> int:
    """Adds a layer, or a few."""
    h = len(p.values) - 1 - min(number(draw, 0, len(p.values) - 1), number(draw, 0, len(p.values) - 1))
    sizes = p.sizes(h)
    d = len(sizes)
    if d == 0:
        return p.reshape(h, 1)
    if math.prod(sizes) > 60:
        return p.sum(h, number(draw, 1, d))
    dim = number(draw, 1, d)
    kinds = ["linear", "activation", "activation", "prelu", "affine", "add", "add", "multiply", "parameter", "cat"]
    kinds += ["constant", "sum", "max", "normalize", "narrow", "reshape", "permute", "expand"]
    kinds += ["spatial"] * 8 * (2 <= d <= 4)
    kind = some(draw, kinds)
    if kind == "spatial":
        return spatial_step(draw, p, h)
    if kind == "linear":
        return p.linear(h, number(draw, 1, 5), draw(st.booleans()))
    if kind == "activation":
        function, scalars = some(draw, ACTIVATIONS)
        return p.activation(h, function, *scalars)
    if kind == "prelu":
        return p.record(Kind.PRELU, h, p.parameter(some(draw, (1, sizes[0]))))
    if kind == "affine":
        return p.affine(h, some(draw, (1.0, -0.7)), some(draw, (0.0, 0.3)))
    if kind == "add":
        other = alike(draw, p, h)
        if draw(st.booleans()):
            other = p.sum(h, dim, keepdim=True)
        a, b = some(draw, ((h, other), (other, h)))
        return p.add(a, b, some(draw, (1.0, -0.6)))
    if kind == "multiply":
        other = p.activation(p.linear(alike(draw, p, h), sizes[-1]), Function.TANH)
        if draw(st.booleans()):
            other = p.sum(other, dim, keepdim=True)
        return p.record(Kind.MULTIPLY, *some(draw, ((h, other), (other, h))))
    if kind == "parameter":
        rows = some(draw, ((), (1,), (p.batch,)))
        return p.multiply_parameter(h, *rows, *broadcastable(draw, p, sizes))
    if kind == "cat":
        return p.record(Kind.CAT, dim, *[alike(draw, p, h, dim) for _ in range(number(draw, 0, 2))], h)
    if kind == "constant":
        constant = p.constant(some(draw, (1, p.batch)), *sizes)
        if draw(st.booleans()):
            function, scalars = some(draw, ACTIVATIONS)
            constant = p.activation(constant, function, *scalars)
        if draw(st.booleans()):
            return p.record(Kind.CAT, dim, constant, h)
        return p.add(h, constant, 0.8)
    if kind == "sum":
        return p.sum(h, dim, keepdim=draw(st.booleans()))
    if kind == "max":
        return p.record(Kind.MAX, h, dim, number(draw, 0, 1))
    if kind == "normalize":
        k = number(draw, 1, d)
        return p.multiply_parameter(p.normalize(h, k), *sizes[-k:])
    if kind == "narrow":
        start = number(draw, 0, sizes[dim - 1] - 1)
        return p.record(Kind.NARROW, h, dim, start, number(draw, 1, sizes[dim - 1] - start))
    if kind == "reshape":
        rest = math.prod(sizes)
        factors = [n for n in range(1, rest + 1) if rest % n == 0]
        n = some(draw, factors)
        return p.reshape(h, *some(draw, ((n, rest // n), (rest,), (n, rest // n, 1))))
    if kind == "permute":
        return p.record(Kind.PERMUTE, h, 0, *draw(st.permutations(range(1, d + 1))))
    kept = p.sum(h, dim, keepdim=True)
    return p.record(Kind.EXPAND, kept, sizes=[3 if i + 1 == dim else n for i, n in enumerate(sizes)])


@st.composite
def programs(draw: Draw) -> Program:
    torch.manual_seed(number(draw, 0, 10_000))
    shapes = draw(st.lists(st.sampled_from([[4], [2, 3], [3, 4], [2, 3, 4], [2, 2, 2, 3]]), min_size=1, max_size=2))
    p = Program(*shapes, batch=number(draw, 1, 5))
    for _ in range(number(draw, 1, 8)):
        step(draw, p)
    top = some(draw, ("as it is", "linear", "activation", "scaled", "joined"))
    last = len(p.values) - 1
    if top == "joined":  # all values that nothing uses
        top, last = "linear", p.record(Kind.CAT, 1, *[p.flatten(h) for h in range(len(p.values))])
    if top == "linear":
        p.linear(p.flatten(last), number(draw, 1, 3))
    if top == "activation":
        p.activation(last, Function.LEAKY_RELU, 0.3)
    if top == "scaled":
        p.multiply_parameter(last, *p.sizes(last))
    return p


@st.composite
def modes(draw: Draw, rows: int) -> Mode:
    kind = some(draw, ("gradients", "inside", "tail"))
    if kind == "gradients":
        scored, first, count = 0, 0, rows
    elif kind == "tail":
        first = scored = number(draw, 1, rows)
        count = rows - scored
    else:
        first = number(draw, 0, rows)
        scored, count = rows, number(draw, 0, rows - first)
    of = some(draw, ("both", "gradients", "scores") if scored else ("gradients", "both"))
    return Mode(scored, first, count, draw(st.booleans()), draw(st.booleans()), of)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_critics(data: st.DataObject) -> None:
    p = data.draw(programs())
    for _ in range(3):
        check(p, data.draw(modes(p.batch)), strict=False)


# Differentiation


def smooth(batch: int = 3) -> Program:
    """A curved critic of two inputs, of layers of many kinds."""
    p = Program([2, 5, 4], [3], batch=batch)
    h = p.activation(p.convolution(0, 4, [3, 3], padding=1), Function.LEAKY_RELU, 0.2)
    h = p.record(Kind.AVG_POOL, p.normalize(h, 3), 2, 2, 2, 2, 0, 0, 0, 1, 0)
    h = p.flatten(p.activation(p.multiply_parameter(h, 4, 1, 1), Function.SILU))
    gate = p.activation(p.linear(1, p.sizes(h)[0]), Function.SIGMOID)
    h = p.record(Kind.CAT, 1, p.record(Kind.MULTIPLY, h, gate), p.constant(batch, 2))
    p.linear(p.activation(p.linear(h, 5), Function.GELU), 2)
    return p


def piecewise(batch: int = 3) -> Program:
    p = Program([5], batch=batch)
    h = p.activation(p.linear(0, 6), Function.LEAKY_RELU, 0.2)
    h = p.add(h, p.record(Kind.PRELU, p.linear(h, 6), p.parameter(6)))
    p.linear(p.activation(h, Function.HARDTANH, -1.0, 1.0), 1)
    return p


@pytest.mark.parametrize("mode", [Mode(0, 0, 3), Mode(3, 1, 2, mean=True), Mode(2, 2, 1, channels_last=True)])
@pytest.mark.parametrize("program", [smooth, piecewise])
def test_gradcheck(program: Callable[[], Program], mode: Mode) -> None:
    p = program()
    x = [t.requires_grad_(not mode.scored) for t in p.x]
    n = len(x)

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        scores, gradients = evaluate(_ops.critic, p, mode, x=leaves[:n], parameters=leaves[n:])
        return ((scores,) if mode.scored else ()) + tuple(gradients)

    parameters = [t.requires_grad_() for t in p.parameters]
    assert torch.autograd.gradcheck(function, (*x, *parameters), fast_mode=True)


@pytest.mark.parametrize("mode", [Mode(0, 0, 3), Mode(3, 0, 3)])
@pytest.mark.parametrize("program", [smooth, piecewise])
def test_a_second_derivative_is_refused_by_name(program: Callable[[], Program], mode: Mode) -> None:
    p = program()
    parameters = [t.requires_grad_() for t in p.parameters]
    value = loss(*evaluate(_ops.critic, p, mode))
    firsts = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
    again = torch.stack([generic(t) for t in firsts if t is not None]).sum()
    with pytest.raises(NotImplementedError, match=r"critic is differentiable once.*autograd"):
        torch.autograd.grad(again, parameters, allow_unused=True)


def test_the_input_cannot_be_differentiated_where_it_is_scored() -> None:
    p = smooth()
    value = loss(*evaluate(_ops.critic, p, Mode(3, 0, 3), x=[t.requires_grad_() for t in p.x]))
    with pytest.raises(NotImplementedError, match="critic: x cannot be differentiated where it is scored"):
        value.backward()


def test_without_grad_mode_nothing_requires_grad() -> None:
    p = smooth()
    for t in p.parameters:
        t.requires_grad_()
    with torch.no_grad():
        ours = evaluate(_ops.critic, p, Mode(3, 1, 2))
    theirs = evaluate(reference.critic, p, Mode(3, 1, 2))
    assert not any(t.requires_grad for t in [ours[0], *ours[1]])
    assert_close([ours[0], *ours[1]], [theirs[0], *theirs[1]])


@pytest.mark.parametrize("mode", [Mode(0, 0, 3, of="scores"), Mode(0, 0, 3), Mode(3, 1, 0, of="gradients")])
@pytest.mark.parametrize("program", [smooth, piecewise])
def test_losses_of_nothing(program: Callable[[], Program], mode: Mode) -> None:
    """Scores or gradients without rows may be part of a loss."""
    check(program(), mode, strict=False)


def test_a_batch_without_rows() -> None:
    for program in (smooth, piecewise):
        p = program()
        p.x = [t[:0] for t in p.x]
        p.parameters = [t[:0] if len(t) == p.batch and t.shape[1:] == (2,) else t for t in p.parameters]
        for mode in (Mode(0, 0, 0), Mode(0, 0, 0, of="gradients"), Mode(0, 0, 0, of="scores")):
            ours, grads = differentiate(_ops.critic, p, mode)
            assert [t.shape for t in ours] == [(0,), *[t.shape for t in p.x]]
            assert all(is_nothing(t) for t in grads)


def test_which_gradients_there_are() -> None:
    """Autograd's rule, for gradients alone: what only moves a sign has zeros, what moves nothing has none."""
    p = Program([5], batch=3)
    h = p.activation(p.linear(0, 4), Function.LEAKY_RELU, 0.2)
    p.linear(h, 2)
    p.parameter(3)  # that no record uses
    for mode in (Mode(0, 0, 3, of="gradients"), Mode(3, 0, 3)):
        check(p, mode)
    _, (W, b, V, c, unused, x) = differentiate(_ops.critic, p, Mode(0, 0, 3, of="gradients"))
    assert W is not None
    assert V is not None
    assert b is not None
    assert not b.any()
    assert x is not None
    assert not x.any()
    assert c is None
    assert unused is None
    _, grads = differentiate(_ops.critic, p, Mode(3, 0, 3, of="gradients"))
    assert grads[3] is not None  # where there are scores it could have moved them
    assert not grads[3].any()


# Tensors of all sorts


def strided(t: Tensor) -> Tensor:
    """The same numbers, every second of a larger tensor in every dimension, backwards in the order of dimensions."""
    shape = [2 * n for n in reversed(t.shape)]
    whole = torch.full(shape, math.nan, dtype=t.dtype)
    view = whole[tuple(slice(None, None, 2) for _ in shape)].permute([*reversed(range(t.dim()))])
    return view.copy_(t)


@pytest.mark.parametrize("case", CASES)
def test_strided_tensors(case: str) -> None:
    sizes, layer = CASES[case]
    p = Program(sizes)
    PLACES["piecewise"](p, 0, layer)
    p.x = [strided(t) for t in p.x]
    p.parameters = [strided(t) for t in p.parameters]
    check(p, Mode(0, 0, 4, of="gradients"))
    check(p, Mode(3, 3, 1, channels_last=True))


def test_inputs_in_other_memory_formats() -> None:
    p = smooth()
    images, vectors = p.x
    for x in (
        [images.contiguous(memory_format=torch.channels_last), vectors],
        [images[:1].expand(3, -1, -1, -1), vectors[:, :1].expand(-1, 3)],
        [images.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), vectors.flip(0)],
    ):
        p.x = x
        for channels_last in (False, True):
            check(p, Mode(0, 0, 3, channels_last=channels_last, of="gradients"))
            check(p, Mode(2, 2, 1, channels_last=channels_last))
            _, gradients = evaluate(_ops.critic, p, Mode(0, 0, 3, channels_last=channels_last))
            for t, g in zip(x, gradients, strict=True):
                assert g.is_contiguous(memory_format=_ops.suggested_format(t))


def test_nothing_given_is_changed() -> None:
    """The engine overwrites what is its own; identities and views must not make it take x or parameters for that."""
    p = Program([2, 3], batch=3)
    h = p.activation(p.reshape(p.affine(0, 1.0, 0.0), 6), Function.LEAKY_RELU, 0.2)
    h = p.add(p.activation(p.constant(3, 6), Function.LEAKY_RELU, 0.2), h)
    p.activation(p.record(Kind.NARROW, p.record(Kind.CAT, 1, h), 1, 0, 6), Function.LEAKY_RELU, 0.1)
    x, parameters = [t.clone() for t in p.x], [t.clone() for t in p.parameters]
    for mode in (Mode(0, 0, 3, of="gradients"), Mode(3, 0, 3), Mode(2, 2, 1)):
        check(p, mode, strict=False)
        for before, after in zip(x + parameters, p.x + p.parameters, strict=True):
            assert torch.equal(before, after)


@pytest.mark.parametrize("mode", [Mode(0, 0, 3), Mode(3, 0, 2), Mode(2, 2, 1)])
@pytest.mark.parametrize("program", [smooth, piecewise])
def test_frozen_parameters(program: Callable[[], Program], mode: Mode) -> None:
    """Those that require a gradient get the one that they get if all do."""
    p = program()
    _, expected = differentiate(reference.critic, p, mode)
    n = len(p.parameters)
    for wanted in [{i} for i in range(n)] + [set(range(0, n, 2)), set(range(n // 2))]:
        parameters = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(p.parameters)]
        value = loss(*evaluate(_ops.critic, p, mode, parameters=parameters))
        grads = torch.autograd.grad(value, [parameters[i] for i in sorted(wanted)], allow_unused=True)
        for i, grad in zip(sorted(wanted), grads, strict=True):
            theirs = expected[i]
            if not is_nothing(theirs) or not is_nothing(grad):
                assert_close([grad], [theirs], eps=1e-11)  # each by its own scale, not the largest of all


def test_only_the_input_requires_grad() -> None:
    for program in (smooth, piecewise):
        p = program()
        expected = differentiate(reference.critic, p, Mode(0, 0, 3))[1][len(p.parameters) :]
        x = [t.detach().requires_grad_() for t in p.x]
        grads = torch.autograd.grad(loss(*evaluate(_ops.critic, p, Mode(0, 0, 3), x=x)), x)
        assert_close(grads, expected)
        for wanted in range(len(x)):
            x = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(p.x)]
            (grad,) = torch.autograd.grad(loss(*evaluate(_ops.critic, p, Mode(0, 0, 3), x=x)), [x[wanted]])
            assert_close([grad], [expected[wanted]])


def test_tied_parameters() -> None:
    """One number in several records, in several roles; and one tensor under two numbers."""
    p = Program([4], batch=4)
    W, b, slope = p.parameter(4, 4), p.parameter(4), p.parameter(4)
    h = p.record(Kind.LINEAR, 0, W, b)
    h = p.activation(h, Function.LEAKY_RELU, 0.2)
    h = p.record(Kind.LINEAR, h, W, slope)
    h = p.record(Kind.PRELU, h, slope)
    h = p.record(Kind.MULTIPLY_PARAMETER, p.add(h, p.record(Kind.CONSTANT, W)), W)
    h = p.activation(p.record(Kind.LINEAR, h, W, b), Function.TANH)
    p.linear(p.record(Kind.MULTIPLY_PARAMETER, h, b), 2)
    for mode in (Mode(0, 0, 4, of="gradients"), Mode(4, 1, 2), Mode(3, 3, 1)):
        check(p, mode)
        parameters = [t.detach().requires_grad_() for t in p.parameters]
        shared = [parameters[W], parameters[b], parameters[b], *parameters[3:]]
        value = loss(*evaluate(_ops.critic, p, mode, parameters=shared))
        expected = loss(*evaluate(reference.critic, p, mode, parameters=shared))
        assert_close(
            torch.autograd.grad(value, [parameters[W], parameters[b]]),
            torch.autograd.grad(expected, [parameters[W], parameters[b]]),
        )


# Other dtypes


def converted(p: Program, dtype: torch.dtype) -> Program:
    p.x, p.parameters = [t.to(dtype) for t in p.x], [t.to(dtype) for t in p.parameters]
    return p


def wide(p: Program, mode: Mode) -> tuple[list[Tensor], list[Tensor | None]]:
    """What the reference makes of the same numbers in float64."""
    x, parameters = p.x, p.parameters
    converted(p, torch.float64)
    result = differentiate(reference.critic, p, mode)
    p.x, p.parameters = x, parameters
    return result


def assert_close_to_wide(
    ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None], dtypes: Sequence[torch.dtype], eps: float
) -> None:
    assert [t.dtype for t in ours if t is not None] == [d for t, d in zip(ours, dtypes, strict=True) if t is not None]
    assert_close([None if t is None else t.double() for t in ours], theirs, eps)


@pytest.mark.parametrize("case", CASES)
def test_float32(case: str) -> None:
    sizes, layer = CASES[case]
    p = Program(sizes)
    PLACES["between"](p, 0, layer)
    converted(p, torch.float32)
    for mode in (Mode(0, 0, 4, of="gradients"), Mode(3, 3, 1, mean=True, channels_last=True)):
        expected, expected_grads = wide(p, mode)
        ours, grads = differentiate(_ops.critic, p, mode, torch.float32)
        assert_close_to_wide(ours, expected, [torch.float32] * len(ours), 1e-5)
        assert_close_to_wide(grads, expected_grads, [torch.float32] * len(grads), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("program", [smooth, piecewise])
def test_half_inputs_computed_in_float32(program: Callable[[], Program], dtype: torch.dtype) -> None:
    """Only the gradients of x and of parameters are rounded, to their dtype."""
    p = converted(program(), dtype)
    for mode in (Mode(0, 0, 3, of="gradients"), Mode(2, 2, 1)):
        expected, expected_grads = wide(p, mode)
        ours, grads = differentiate(_ops.critic, p, mode, torch.float32)
        assert_close_to_wide(ours, expected, [torch.float32] * len(ours), 1e-5)
        assert_close_to_wide(grads, expected_grads, [dtype] * len(grads), torch.finfo(dtype).eps)


def without_kinks() -> Program:
    """Of layers that need no kernel of ours."""
    p = Program([2, 4, 4], batch=3)
    h = p.activation(p.convolution(0, 4, [3, 3], padding=1), Function.SILU)
    h = p.normalize(p.flatten(h), 1)
    p.linear(p.activation(p.linear(h, 5), Function.TANH), 1)
    return p


@pytest.mark.parametrize("compute", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1.0, 1e-7])
def test_half_products(compute: torch.dtype, magnitude: float) -> None:
    """Cotangents of the size that a mean over a large batch gives do not underflow on their way."""
    p = converted(without_kinks(), torch.float32)
    for mode in (Mode(0, 0, 3), Mode(3, 0, 2), Mode(2, 2, 1), Mode(3, 3, 0)):
        results = []
        for critic, dtype in ((_ops.critic, compute), (reference.critic, torch.float32)):
            parameters = [t.detach().requires_grad_() for t in p.parameters]
            scores, gradients = evaluate(critic, p, mode, dtype, parameters=parameters)
            value = magnitude * loss(scores, gradients)
            results.append(([scores, *gradients], torch.autograd.grad(value, parameters, allow_unused=True)))
        (ours, grads), (theirs, their_grads) = results
        eps = 8 * torch.finfo(compute).eps
        assert_close(ours, theirs, eps)
        assert_close(*without_zeros(grads, their_grads), eps)


@pytest.mark.parametrize("compute", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [Function.LEAKY_RELU, Function.HARDTANH])
def test_half_products_without_a_kernel_are_refused_by_name(compute: torch.dtype, function: Function) -> None:
    p = Program([4])
    p.activation(p.linear(0, 3), function, -0.5, 0.5)
    with pytest.raises(TypeError, match="critic: compute_dtype must be one that cpu has kernels for, got"):
        evaluate(_ops.critic, converted(p, torch.float32), Mode(4, 0, 4), compute)
    with pytest.raises(TypeError, match="critic: compute_dtype must be"):
        evaluate(_ops.critic, p, Mode(4, 0, 4), torch.int64)


# Products of every size


# rows, inputs, outputs: one of each, tails of every tile, few columns, deeper than a panel, too large to be small
PRODUCTS = [(1, 1, 1), (5, 3, 2), (64, 2, 64), (64, 64, 1), (13, 300, 7), (9, 17, 33), (31, 65, 40), (6, 520, 4)]
PRODUCTS += [(64, 128, 64), (64, 129, 64), (3, 600, 600)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), PRODUCTS)
def test_products_of_every_size(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """Small ones have a kernel of their own; the second layer's weight gets the sum of two products."""
    p = Program([inputs], batch=rows)
    h = p.activation(p.linear(0, outputs), Function.LEAKY_RELU, 0.2)
    W = p.parameter(outputs, outputs, scale=outputs**-0.5)
    for _ in range(2):
        h = p.record(Kind.LINEAR, h, W, -1)
    p.linear(h, 3)
    converted(p, dtype)
    for transform in (Tensor.contiguous, strided):
        p.x, p.parameters = [transform(t) for t in p.x], [transform(t) for t in p.parameters]
        for mode in (Mode(0, 0, rows, of="gradients"), Mode(rows, 0, rows), Mode(rows - 1, rows - 1, 1)):
            expected, expected_grads = wide(p, mode)
            ours, grads = differentiate(_ops.critic, p, mode, dtype)
            eps = EPS if dtype == torch.float64 else 1e-5
            assert_close_to_wide(ours, expected, [dtype] * len(ours), eps)
            pairs = without_zeros(grads, expected_grads)
            assert_close_to_wide(*pairs, [dtype] * len(pairs[0]), eps)


LEVELS = ["portable", "avx2", "avx512"]


@pytest.mark.parametrize("level", LEVELS[: LEVELS.index(build_info().simd)])
def test_products_at_lower_vector_levels(level: str) -> None:
    """The level is chosen once in a process."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "products_of_every_size", __file__]
    shown = subprocess.run(
        command, env=os.environ | {"WGAN_EXT_SIMD": level}, capture_output=True, text=True, check=False
    )
    assert f"{2 * len(PRODUCTS)} passed" in shown.stdout, shown.stdout


def test_products_do_not_depend_on_threads() -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            p = Program([65], batch=33)
            p.linear(p.activation(p.linear(0, 40), Function.LEAKY_RELU, 0.2), 3)
            values, grads = differentiate(_ops.critic, p, Mode(20, 20, 13))
            results.append([t for t in [*values, *grads] if t is not None])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


# Meta tensors


def steps(t: Tensor) -> list[int]:
    """The strides that mean something."""
    return [step for n, step in zip(t.shape, t.stride(), strict=True) if n > 1]


@pytest.mark.parametrize("case", CASES)
def test_meta_tensors_have_the_metadata_of_real_ones(case: str) -> None:
    sizes, layer = CASES[case]
    p = Program(sizes)
    PLACES["between"](p, 0, layer)
    if len(sizes) == 3:
        p.x = [t.contiguous(memory_format=torch.channels_last) for t in p.x]
    for mode in (Mode(0, 0, 4, of="gradients"), Mode(3, 3, 1, channels_last=True)):
        real = differentiate(_ops.critic, p, mode)
        x, parameters = p.x, p.parameters
        p.x, p.parameters = [t.to("meta") for t in x], [t.to("meta") for t in parameters]
        meta = differentiate(_ops.critic, p, mode)
        p.x, p.parameters = x, parameters
        for a, b in zip([*meta[0], *meta[1]], [*real[0], *real[1]], strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert a.is_meta
                assert (a.shape, a.dtype, steps(a)) == (b.shape, b.dtype, steps(b))


# Malformed programs


def assert_refused_or_finite(p: Program, mode: Mode) -> None:
    """Raises an exception, or makes results of the right shapes; anything else ends this process."""
    x = [t.detach().requires_grad_(not mode.scored) for t in p.x]
    parameters = [t.detach().requires_grad_() for t in p.parameters]
    try:
        scores, gradients = evaluate(_ops.critic, p, mode, x=x, parameters=parameters)
        loss(scores, gradients).backward()
    except Exception:  # ATen's checks raise several types; what must not be is a crash, which no handler hides
        return
    assert scores.shape == (mode.scored,)
    for t, g in zip(x, gradients, strict=True):
        assert g.shape == (mode.count, *t.shape[1:])


STRANGE = [-(2**63), -(2**31) - 1, *range(-3, 14), 2**62, 2**63 - 1]


def mutate(draw: Draw, p: Program) -> None:
    kind = some(draw, ("set", "set", "set", "shift", "delete", "insert", "cut", "scalars", "parameters", "swap"))
    i = number(draw, 0, len(p.records) - 1)
    if kind == "set":
        p.records[i] = some(draw, STRANGE)
    if kind == "shift":
        p.records[i] += some(draw, (-1, 1))
    if kind == "delete":
        del p.records[i]
    if kind == "insert":
        p.records.insert(i, some(draw, STRANGE))
    if kind == "cut":
        del p.records[i:]
    if kind == "scalars":
        p.scalars = p.scalars[: number(draw, 0, len(p.scalars))]
    if p.parameters and kind in ("parameters", "swap"):
        j = number(draw, 0, len(p.parameters) - 1)
        if kind == "swap":
            P = p.parameters[j]
            p.parameters[j] = some(draw, (P[None], P[None][:0], P[None][..., :1], P.flatten(), p.parameters[j - 1]))
        else:
            del p.parameters[j]


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_malformed_programs_are_refused(data: st.DataObject) -> None:
    if data.draw(st.booleans()):
        p = data.draw(programs())
    else:
        sizes, layer = CASES[data.draw(st.sampled_from(list(CASES)))]
        p = Program(sizes)
        PLACES[data.draw(st.sampled_from(list(PLACES)))](p, 0, layer)
    for _ in range(data.draw(st.integers(1, 3))):
        if p.records:
            mutate(data.draw, p)
    assert_refused_or_finite(p, data.draw(modes(p.batch)))


REFUSED: dict[str, tuple[list[int], str]] = {
    "an unknown kind": ([99, 1, 0, 1, 5], "unknown layer kind 99"),
    "an unknown activation": ([Kind.ACTIVATION, 3, 0, 42, 0, 1, 5], "unknown activation 42"),
    "a value to come": ([Kind.ADD, 3, 0, 1, 0, 1, 5], "takes value 1, of 1"),
    "a negative value": ([Kind.AFFINE, 2, -1, 0, 1, 5], "takes value -1"),
    "a parameter that is not there": ([Kind.LINEAR, 3, 0, 3, -1, 1, 5], "names parameter 3 of 3"),
    "a missing weight": ([Kind.LINEAR, 3, 0, -1, -1, 1, 5], "names parameter -1"),
    "scalars that are not there": ([Kind.AFFINE, 2, 0, 2, 1, 5], "scalars from 2 of 3"),
    "scalars far away": ([Kind.AFFINE, 2, 0, 2**63 - 1, 1, 5], "scalars from"),
    "an end within a record": ([Kind.AFFINE, 2, 0], "ends within a record"),
    "a negative length": ([Kind.AFFINE, -2, 0, 0, 1, 5], "ends within a record"),
    "a short record": ([Kind.LINEAR, 1, 0, 1, 5], "too short"),
    "an empty record": ([Kind.CAT, 0, 1, 5], "empty record"),
    "a cat of nothing": ([Kind.CAT, 1, 1, 1, 5], "too short"),
    "a long record": ([Kind.RESHAPE, 2, 0, 0, 1, 5], "too long"),
    "wrong sizes": ([Kind.AFFINE, 2, 0, 0, 1, 6], "shape"),
    "a sum over the batch": ([Kind.SUM, 3, 0, 0, 0, 1, 5], "must not be the batch"),
    "a cat of batches": ([Kind.CAT, 3, 0, 0, 0, 1, 5], "must not be the batch"),
    "a maximum over the batch": ([Kind.MAX, 3, 0, 0, 1, 1, 5], "must not be the batch"),
    "a part of the batch": ([Kind.NARROW, 4, 0, 0, 0, 1, 1, 5], "must not be the batch"),
    "a permuted batch": ([Kind.PERMUTE, 3, 0, 1, 0, 1, 5], "must keep dimension 0"),
    "a permutation with a repetition": ([Kind.PERMUTE, 3, 0, 0, 0, 1, 5], "each dimension once"),
    "no scores": ([Kind.NARROW, 4, 0, 1, 0, 0, 1, 0], "at least one score"),
    "values of different dimensions": (
        [Kind.RESHAPE, 1, 0, 2, 1, 5, Kind.ADD, 3, 0, 1, 0, 2, 1, 5],
        "not of one number of dimensions",
    ),
    "a parameter with too many dimensions": (
        [Kind.MULTIPLY_PARAMETER, 2, 0, 2, 1, 5],
        "a parameter of too many dimensions",
    ),
    "a resize of vectors": ([Kind.RESIZE, 4, 0, 0, 0, 0, 1, 7], "0 spatial dimensions"),
    "a pool of vectors": ([Kind.ADAPTIVE_AVG_POOL, 1, 0, 0], "0 spatial dimensions"),
    "a normalization of nothing": ([Kind.NORMALIZE, 3, 0, 0, 0, 1, 5], "normalizes over 0"),
    "an unknown pad": ([Kind.PAD, 5, 0, 9, 0, 1, 1, 1, 7], "unknown mode 9"),
}


@pytest.mark.parametrize("mode", [Mode(0, 0, 4), Mode(4, 0, 4)])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_by_name(name: str, mode: Mode) -> None:
    p = Program([5])
    p.parameter(5, 5)
    p.parameter(5)
    p.parameter(5, 4, 5)
    p.numbers(0.5, 1.0, 0.3)
    p.records, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"critic: .*{message}"):
        evaluate(_ops.critic, p, mode)


@pytest.mark.parametrize(
    ("scored", "first", "count"), [(5, 0, 4), (-1, 0, 4), (2, 1, 3), (3, 3, 2), (2, 3, 1), (4, 3, -1)]
)
def test_rows_must_be_covered(scored: int, first: int, count: int) -> None:
    p = Program([5])
    p.linear(0, 1)
    with pytest.raises(ValueError, match="critic: scored and points must cover the 4 rows of x"):
        evaluate(_ops.critic, p, Mode(scored, first, count))
