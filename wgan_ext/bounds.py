"""Upper bounds of the norms of layers that are proofs: no power iteration, no assumption on a start.

That a number s exceeds all eigenvalues of a Hermitian matrix G is proven by a Cholesky factorization of s I - G. In
floating point that succeeds only if s I - G is positive semidefinite but for a known rounding error (Rump, Verification
of positive definiteness, 2006). It is cheaper than a step of Gram iteration (Delattre et al., 2023), which bounds the
largest eigenvalue too but needs several steps to be tight; here s is that eigenvalue and a slack.

For a convolution G is made small by a torus. The rows of a zero-padded convolution are rows of a circulant matrix that
is just large enough for nothing to wrap around, and of the one whose wrapping entries have the other sign; Fourier
transforms make blocks of the size of the channels of these. A convolution of stride s is one of stride 1 on s times the
channels. Dimensions that are too short for a tight torus are taken as they are, in blocks of channels times places.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ._checks import check_module
from .norms import finite_weight, lanczos, largest_singular, power_of_two
from .operators import Convolution, LayerMap, Matrix, map_of, padded_index

__all__ = ["certified_norm", "operator_norm_bound"]

_SLACK = 1e-4  # relative, of squares: what the first factorization allows above the estimate
_TARGET = 1.01  # a bound within this factor of the estimate is not improved
_BUDGET = 2e11  # floating-point operations, or so, that improving one may take
_LARGEST = 4096  # rows of a matrix to factorize
_FLOOR = 1e-24  # a square next to which a largest weight of 1 counts for nothing; no matrix is below 0
_CHUNK = 1 << 28  # bytes of matrices at a time
_GRID = 64  # frequencies a dimension, or 32 a tap of the kernel; more are replaced by an inequality


def operator_norm_bound(module: nn.Module, input_shape: Sequence[int] | None = None) -> Tensor:
    """An upper bound of a layer's norm as an operator: a proof, where ``operator_norm`` is an estimate from below.

    For linear layers, and for convolutions with circular padding whose output has the size of the input over the
    stride, it is the norm, to 1e-4. With zero padding it is mostly within 1 % of the norm, and holds for no longer
    inputs than the given ones; inputs of few places and hundreds of channels make it up to 10 % larger (512 at 4 x 4).
    Reflected and replicated padding are tight only where channels times places are few: else each padded dimension
    loosens the bound by up to the square root of how often padding repeats an element, sqrt(2) for reflection.

    Computed in float64 with all rounding errors accounted for; the weight is taken as in ``operator_norm``, and the
    layer's arithmetic as exact. Deterministic, not differentiable.

    Args:
        module: As for ``operator_norm``.
        input_shape: (channels, *spatial), without a batch. None bounds a zero-padded convolution for all sizes.

    Returns:
        Shape (), float64.

    Raises:
        TypeError, ValueError: as in ``operator_norm``.
    """
    function = "operator_norm_bound"
    check_module(function, "module", module)
    weight = finite_weight(function, module)
    if input_shape is None and not isinstance(module, nn.Linear) and getattr(module, "padding_mode", "") == "zeros":
        tiny = (module.in_channels, *(d * k for d, k in zip(module.dilation, module.kernel_size, strict=True)))  # type: ignore[arg-type]
        layer = map_of(function, module, tiny)
        return torch.tensor(certified_norm(layer, weight, any_size=True), dtype=torch.float64)
    layer = map_of(function, module, input_shape)
    return torch.tensor(certified_norm(layer, weight), dtype=torch.float64)


def certified_norm(layer: LayerMap, weight: Tensor, any_size: bool = False) -> float:
    """An upper bound of the norm of the map with this weight; of a zero-padded convolution, for inputs of any size."""
    with torch.no_grad():
        weight = weight.detach().double()
        scale = power_of_two(weight)
        weight = weight / scale
        if not weight.any():
            return 0.0
        generator = torch.Generator().manual_seed(0)
        estimate = float(largest_singular(layer, weight, generator=generator).values[0])
        if isinstance(layer, Matrix):
            W = weight[None]
            bound = _largest_eigenvalue([_gram(W)], estimate**2, max(weight.shape), math.inf)
            bound = math.sqrt(bound)
        else:
            bound = _convolution_bound(layer, weight, estimate, any_size)
        return bound * (1 + 1e-12) * scale


# eigenvalues


def _gram(W: Tensor) -> Tensor:
    """W^H W or W W^H, the smaller one."""
    return W.mH @ W if W.shape[-1] <= W.shape[-2] else W @ W.mH


def _largest_eigenvalue(batches: Iterator[Tensor] | list[Tensor], least: float, inner: int, most: float) -> float:
    """A number that no eigenvalue of the Hermitian matrices [B, n, n] exceeds; infinity if it would be above ``most``.

    ``least`` is a guess from below; the matrices are sums of ``inner`` products.
    """
    eps = torch.finfo(torch.float64).eps
    bound = max(least, _FLOOR) * (1 + _SLACK)
    margin = 0.0
    generator = torch.Generator().manual_seed(0)
    for G in batches:
        n = G.shape[-1]
        # of the products, |error| <= inner eps sum |.| |.| <= inner n eps bound, of the factorization n^2 eps bound
        margin = max(margin, 1e-9 + 8 * n * (n + inner) * eps)
        identity = torch.eye(n, dtype=G.dtype, device=G.device)
        while True:
            failed = torch.linalg.cholesky_ex(bound * identity - G).info != 0
            if not failed.any():
                break
            G = G[failed]
            x = torch.randn(len(G), n, 1, dtype=G.dtype, generator=generator.manual_seed(0)).to(G.device)
            for _ in range(8):
                x = G @ (x / torch.linalg.vector_norm(x, dim=1, keepdim=True))
            A = G[torch.linalg.vector_norm(x, dim=1).argmax()].mT
            start = torch.randn(1, n, dtype=G.dtype, generator=generator).to(G.device)
            theta = lanczos(functools.partial(torch.matmul, other=A), start, 1, 1e-6, 1000)[0][0]
            bound = max(bound * (1 + _SLACK / 10), float(theta) * (1 + _SLACK / 10))
            if bound > most:
                return math.inf
    return bound * (1 + margin)


# convolutions


@dataclasses.dataclass(frozen=True)
class _Axis:
    """One dimension of a convolution: output t takes padded input t stride + j dilation with tap j."""

    n: int
    t: int
    taps: int
    stride: int
    before: int
    after: int
    mode: str
    dilation: int

    @property
    def places(self) -> Tensor:
        """The input that output t takes with tap j, -1 for a zero: [t, taps]."""
        before, after = self.before, self.after
        reach = (self.t - 1) * self.stride + (self.taps - 1) * self.dilation + 1
        after = max(after, reach - self.n - before) if self.mode == "zeros" else after
        index = padded_index(self.n, before, after, self.mode)
        return index[torch.arange(self.t)[:, None] * self.stride + torch.arange(self.taps) * self.dilation]


@dataclasses.dataclass(frozen=True)
class _Torus:
    """A circulant of so many cells, of ``phases`` elements each, that an axis is a part of but for a factor."""

    cells: int
    phases: int
    taps: tuple[tuple[int, int], ...]
    """Phase and cell of each."""
    factor: float
    twists: bool
    """Whether entries that wrap around may change their sign."""

    def transform(self, twist: int, half: bool) -> Tensor:
        """[taps, phases, frequencies]; half of the frequencies are complex conjugates of the others."""
        count = self.cells if not half else (self.cells - twist) // 2 + 1
        result = torch.zeros(len(self.taps), self.phases, count, dtype=torch.complex128)
        angles = (2 * torch.arange(count, dtype=torch.float64) + twist) * (math.pi / self.cells)
        for j, (phase, cell) in enumerate(self.taps):
            result[j, phase] = torch.polar(torch.ones_like(angles), angles * cell)
        return result


def _torus(axis: _Axis, any_size: bool) -> _Torus:
    n, before, stride, dilation, factor = axis.n, axis.before, axis.stride, axis.dilation, 1.0
    if axis.mode == "circular" and n % stride == 0:
        cells = n // stride
        steps = [j * dilation - before for j in range(axis.taps)]
        repeats = -(-axis.t // cells)  # a row that is there twice
        return _Torus(cells, stride, tuple((e % stride, e // stride) for e in steps), repeats**0.5, False)
    if axis.mode != "zeros":  # pad, which repeats elements, and convolve without padding
        index = padded_index(n, before, axis.after, axis.mode)
        factor = math.sqrt(int(index.bincount().max()))
        n, before = len(index), 0
    common = math.gcd(stride, dilation)
    stride, dilation = stride // common, dilation // common
    first, last = -(-before // common), (before + n - 1) // common
    if stride == 1:  # dilation takes every so many elements by themselves
        steps, parts = list(range(axis.taps)), dilation
    else:
        steps, parts = [j * dilation for j in range(axis.taps)], 1
    taps = tuple((e % stride, e // stride) for e in steps)
    span = taps[-1][1] + 1
    cells = span
    for r in range(min(parts, axis.t)):
        outputs = -(-(axis.t - r) // parts)
        low, high = -((r - first) // parts) // stride, (last - r) // parts // stride
        high = min(high, outputs + span - 2)
        cells = max(cells, high + 1, outputs + span - 1 - max(low, 0))
    grid = max(_GRID, 32 * (span - 1))
    if cells > grid or any_size:
        # a trigonometric polynomial of degree span - 1 exceeds its values on a grid by no more (M. Riesz)
        return _Torus(grid, stride, taps, factor * math.cos(math.pi * (span - 1) / grid) ** -0.5, False)
    return _Torus(cells, stride, taps, factor, True)


def _axes(layer: Convolution) -> list[_Axis]:
    return [
        _Axis(n, t, k, s, before, after, layer.mode, d)
        for n, t, k, s, (before, after), d in zip(
            *(layer.input_shape[1:], layer.output_shape[1:], layer.kernel, layer.stride, layer.pads, layer.dilation),
            strict=True,
        )
    ]


def _convolution_bound(layer: Convolution, weight: Tensor, estimate: float, any_size: bool) -> float:
    layer = layer.transpose() if layer.transposed else layer  # of the same norm
    weight = weight.reshape(layer.groups, -1, *weight.shape[1:])
    axes = _axes(layer)
    tori = [_torus(axis, any_size) for axis in axes]
    best = math.inf
    for exact in _choices(axes, tori, weight, any_size):
        others = [a for a in range(len(axes)) if a not in exact]
        factor = math.prod(tori[a].factor for a in others)
        for twists in itertools.product(*((0, 1) if tori[a].twists else (0,) for a in others)):
            most = (best / factor) ** 2
            least = (estimate / factor) ** 2
            grams = _grams(weight, axes, tori, exact, dict(zip(others, twists, strict=True)))
            inner = weight[0, 0].numel() * max(math.prod(axes[a].t for a in exact), 1)
            best = min(best, factor * math.sqrt(_largest_eigenvalue(grams, least, inner, most)))
            if best <= _TARGET * estimate:
                return best
    return best


def _choices(axes: list[_Axis], tori: list[_Torus], weight: Tensor, any_size: bool) -> Iterator[tuple[int, ...]]:
    """Sets of dimensions to take as they are: none, then all, or single ones, as the budget allows."""
    yield ()
    if any_size:
        return
    dims = range(len(axes))
    whole = tuple(dims)
    costs = {}
    for exact in {whole, *((a,) for a in dims)}:
        count, rows, columns = weight.shape[:3]
        for a in dims:
            if a in exact:
                rows, columns = rows * axes[a].t, columns * axes[a].n
            else:
                columns, count = columns * tori[a].phases, count * tori[a].cells
        n = min(rows, columns)
        cost = count * n**3 * (1 if exact == whole else 4 * 3)  # complex, and factorized several times
        if n <= _LARGEST and cost <= _BUDGET:
            costs[exact] = cost
    if whole in costs:
        yield whole  # the norm itself
    else:
        yield from sorted(costs, key=costs.__getitem__)


def _grams(
    weight: Tensor, axes: list[_Axis], tori: list[_Torus], exact: tuple[int, ...], twists: dict[int, int]
) -> Iterator[Tensor]:
    """The Gram matrices of all blocks, some at a time."""
    kernel = weight.movedim(2, -1).movedim(1, -1)  # groups, taps of each dimension, inputs, outputs
    kernel = kernel[None] if not twists else kernel[None].to(torch.complex128)
    half = True
    for a in reversed(range(len(axes))):  # frequencies go to the front, phases to the inputs
        if a not in twists:
            continue
        D = tori[a].transform(twists[a], half).to(kernel.device)
        half = False
        kernel = torch.tensordot(kernel, D, dims=([2 + a], [0]))  # ..., inputs, outputs, phases, frequencies
        kernel = kernel.movedim(-1, 0).flatten(0, 1).movedim(-1, -2).flatten(-3, -2)
    kernel = kernel.flatten(0, 1)
    kernel = kernel.flatten(1, -3) if exact else kernel[:, None]  # blocks, taps of exact dimensions, inputs, outputs
    _, taps, inputs, outputs = kernel.shape
    if not exact:
        step = max(1, _CHUNK // (16 * min(inputs, outputs) ** 2))
        for part in torch.split(kernel[:, 0], step):
            yield _gram(part)
        return
    places, count = _all_places([axes[a] for a in exact])
    by_inputs = inputs * count <= outputs * len(places)
    size = count if by_inputs else len(places)
    channels = inputs if by_inputs else outputs
    step = max(1, _CHUNK // (16 * (size * channels) ** 2))
    for part in torch.split(kernel, step):
        G = part.new_zeros(len(part), size * size, channels, channels)
        for j, k in itertools.product(range(taps), repeat=2):
            if by_inputs:
                together = (places[:, j] >= 0) & (places[:, k] >= 0)
                one, other = places[together, j], places[together, k]
                product = part[:, j].conj() @ part[:, k].mT
            else:
                same = (places[:, j, None] == places[None, :, k]) & (places[:, j, None] >= 0)
                one, other = same.nonzero(as_tuple=True)
                product = part[:, j].mT @ part[:, k].conj()
            if len(one):
                where = (one * size + other).to(G.device)
                G.index_add_(1, where, product[:, None].expand(-1, len(one), -1, -1))
        n = size * channels
        yield G.view(-1, size, size, channels, channels).transpose(2, 3).reshape(-1, n, n)


def _all_places(axes: list[_Axis]) -> tuple[Tensor, int]:
    """The places of several dimensions together, [outputs, taps], and how many inputs there are."""
    places, count = axes[0].places, axes[0].n
    for axis in axes[1:]:
        more = axis.places
        both = places[:, None, :, None] * axis.n + more[None, :, None, :]
        both = both.masked_fill((places[:, None, :, None] < 0) | (more[None, :, None, :] < 0), -1)
        places, count = both.flatten(2).flatten(0, 1), count * axis.n
    return places, count
