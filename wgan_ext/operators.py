"""The linear map that a layer is but for its bias, and the map's true adjoint: what norms of layers are taken of.

A map holds no weight; it is a function of one, so that any weight (normalized, cast, under autograd) can be put in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["Convolution", "LayerMap", "Matrix", "effective_weight", "map_of", "matrix_of"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """x -> x W^T."""

    rows: int
    columns: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Without a batch, as below."""
        return (self.columns,)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of what ``apply`` makes."""
        return (self.rows,)

    def apply(self, weight: Tensor, x: Tensor) -> Tensor:
        """X [B, columns] to [B, rows]."""
        return x @ weight.mT

    def adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        """Y [B, rows] to [B, columns]."""
        return y @ weight


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution, or a transposed one, of inputs of one shape."""

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    """Before and after, for each dimension; of the output if transposed."""
    mode: str
    """What the input is continued with: "zeros", "circular", "reflect" or "replicate"."""
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]

    @property
    def _padding(self) -> tuple[int, ...]:
        """The padding that the convolution itself does, if it is zeros, as many before as after."""
        own = self.mode == "zeros" and all(before == after for before, after in self.pads)
        return tuple(before if own else 0 for before, _ in self.pads)

    @property
    def _extended(self) -> tuple[int, ...]:
        """The spatial shape of the input with the padding that the convolution does not do."""
        own = self._padding
        return tuple(
            n + before + after - 2 * p
            for n, (before, after), p in zip(self.input_shape[1:], self.pads, own, strict=True)
        )

    def apply(self, weight: Tensor, x: Tensor) -> Tensor:
        """X [B, *input_shape] to [B, *output_shape]."""
        if not self.transposed and self._extended != self.input_shape[1:]:
            pads = [pad for pair in reversed(self.pads) for pad in pair]
            x = F.pad(x, pads) if self.mode == "zeros" else F.pad(x, pads, self.mode)
        return self._convolve(weight, x, self.transposed, self.output_padding)

    def adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        """Y [B, *output_shape] to [B, *input_shape]."""
        if self.transposed:
            x = self._convolve(weight, y, False, (0,) * len(self.stride))
            for dim, n in enumerate(self.input_shape[1:], 2):  # a long output padding makes places of its own
                x = x.narrow(dim, 0, n)
            return x
        rests = [
            n + 2 * p - d * (k - 1) - 1 - (t - 1) * s
            for n, p, d, k, t, s in zip(
                *(self._extended, self._padding, self.dilation, self.kernel, self.output_shape[1:], self.stride),
                strict=True,
            )
        ]
        x = self._convolve(weight, y, True, rests)
        if self._extended != self.input_shape[1:]:
            for dim, (before, after) in enumerate(self.pads, 2):
                x = _unpad(x, dim, before, after, self.mode)
        return x

    def _convolve(self, weight: Tensor, x: Tensor, transposed: bool, output_padding: Sequence[int]) -> Tensor:
        return torch.convolution(
            *(x, weight, None, self.stride, self._padding, self.dilation, transposed, output_padding, self.groups)
        )

    def transpose(self) -> Convolution:
        """The map that ``adjoint`` is; only for zeros."""
        return dataclasses.replace(
            self, input_shape=self.output_shape, output_shape=self.input_shape, transposed=not self.transposed
        )


LayerMap: TypeAlias = "Matrix | Convolution"


def _unpad(y: Tensor, dim: int, before: int, after: int, mode: str) -> Tensor:
    """The adjoint of padding: what was made of an element is added up at it."""
    n = y.shape[dim] - before - after
    x = y.narrow(dim, before, n)
    if mode == "zeros":
        return x
    first, last = y.narrow(dim, 0, before), y.narrow(dim, before + n, after)
    if mode == "circular":
        at_first, at_last = n - before, 0
    elif mode == "reflect":
        first, last, at_first, at_last = first.flip(dim), last.flip(dim), 1, n - 1 - after
    else:
        first, last, at_first, at_last = first.sum(dim, True), last.sum(dim, True), 0, n - 1
    return x + _placed(first, dim, at_first, n) + _placed(last, dim, at_last, n)


def _placed(part: Tensor, dim: int, start: int, n: int) -> Tensor:
    """Zeros of size n along a dimension, with the part from ``start`` on."""
    return F.pad(part, [0, 0] * (part.dim() - 1 - dim) + [start, n - start - part.shape[dim]])


def padded_index(n: int, before: int, after: int, mode: str) -> Tensor:
    """Which of n elements stands at each place of the padded ones, -1 for a zero."""
    index = torch.arange(n, dtype=torch.float64)[None, None]
    index = F.pad(index, (before, after), value=-1.0) if mode == "zeros" else F.pad(index, (before, after), mode)
    return index[0, 0].long()


def matrix_of(weight: Tensor, dim: int) -> Tensor:
    """The weight as the matrix whose rows are its dimension ``dim``, as spectral normalization sees it."""
    return weight.movedim(dim, 0).flatten(1) if weight.dim() > 1 else weight[:, None]


def output_dim(module: nn.Module) -> int:
    """The dimension of a weight that spectral normalization takes for the outputs."""
    return 1 if isinstance(module, _TRANSPOSED) else 0


def shape_of(function: str, input_shape: Any) -> tuple[int, ...]:
    """The shape as a tuple; raises TypeError unless it is of integers, ValueError unless these are positive."""
    if not isinstance(input_shape, Sequence) or not all(isinstance(n, int) for n in input_shape):
        raise TypeError(f"{function}: input_shape must be a sequence of integers, got {input_shape!r}")
    if not input_shape or min(input_shape) < 1:
        raise ValueError(f"{function}: input_shape must hold positive sizes, got {tuple(input_shape)}")
    return tuple(input_shape)


def map_of(function: str, module: nn.Module, input_shape: Sequence[int] | None) -> LayerMap:
    """The map of a layer on inputs of this shape, (channels, *spatial); a linear layer needs none."""
    if isinstance(module, nn.Linear):
        if input_shape is not None and shape_of(function, input_shape)[-1] != module.in_features:
            raise ValueError(
                f"{function}: input_shape must end in {module.in_features}, the layer's features, "
                f"got {tuple(input_shape)}"
            )
        return Matrix(module.out_features, module.in_features)
    if not isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
        raise TypeError(
            f"{function}: module must be a Linear, Conv1d, 2d or 3d, or ConvTranspose1d, 2d or 3d, "
            f"got {type(module).__name__}"
        )
    n = len(module.kernel_size)
    if input_shape is None:
        raise ValueError(f"{function}: input_shape must be given for a convolution, (channels, *spatial)")
    shape = shape_of(function, input_shape)
    if len(shape) != n + 1 or shape[0] != module.in_channels:
        raise ValueError(
            f"{function}: input_shape must be ({module.in_channels}, {', '.join(['size'] * n)}), without a batch, "
            f"got {shape}"
        )
    transposed = isinstance(module, _TRANSPOSED)
    padding: Any = module.padding
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        pads = tuple((total // 2, total - total // 2) for total in totals)
    else:
        pads = tuple((p, p) for p in ((0,) * n if padding == "valid" else padding))
    return convolution(
        function,
        shape,
        module.out_channels,
        module.kernel_size,
        module.stride,
        pads,
        module.padding_mode,
        module.dilation,
        module.groups,
        transposed,
        module.output_padding,
    )


def convolution(
    function: str,
    input_shape: tuple[int, ...],
    channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    pads: Sequence[tuple[int, int]],
    mode: str,
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
) -> Convolution:
    """The map to so many channels; raises ValueError if the input is too small for it."""
    sizes = []
    for n, k, s, (before, after), d, extra in zip(
        input_shape[1:], kernel, stride, pads, dilation, output_padding, strict=True
    ):
        if transposed:
            size = (n - 1) * s - before - after + d * (k - 1) + 1 + extra
        else:
            size = (n + before + after - d * (k - 1) - 1) // s + 1
            limit = {"circular": n, "reflect": n - 1}.get(mode, math.inf)
            size = size if max(before, after) <= limit else 0
        if size < 1:
            raise ValueError(f"{function}: input_shape is too small for the layer, got {input_shape}")
        sizes.append(size)
    return Convolution(
        input_shape,
        (channels, *sizes),
        tuple(kernel),
        tuple(stride),
        tuple(pads),
        mode,
        tuple(dilation),
        groups,
        transposed,
        tuple(output_padding),
    )


def effective_weight(module: nn.Module, name: str = "weight") -> Tensor:
    """The weight that the module's forward would use in evaluation, differentiable in what it is computed from.

    Neither hooks nor parametrizations of spectral normalization make a power iteration.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm) and hook.name == name:
            return hook.compute_weight(module, False)
        if isinstance(hook, WeightNorm) and hook.name == name:
            weight: Tensor = hook.compute_weight(module)
            return weight
    if not parametrize.is_parametrized(module, name):
        plain: Tensor = getattr(module, name)
        return plain
    chain: Any = module.parametrizations
    modes = [(part, part.training) for part in chain[name].modules()]
    try:
        chain[name].eval()
        computed: Tensor = getattr(module, name)
        return computed
    finally:
        for part, training in modes:
            part.training = training
