"""A proven bound of a critic's Lipschitz constant, and the norms of a model's layers.

The bound walks the program that the critic is traced into (``_ops.Kind``): each record adds the factor by which it can
lengthen the distance of two inputs at most, in the 2-norm. Factors multiply along a chain, add up over a sum, and are
put together as squares by a concatenation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._checks import check_module
from ._ops import Function, Kind, Pad, Resize
from .bounds import certified_norm
from .norms import largest_singular
from .operators import Matrix, convolution, effective_weight, map_of, matrix_of, output_dim, padded_index, shape_of
from .plans import parameters_unchanged, plan_for

__all__ = ["LayerBound", "LayerNorms", "LipschitzBound", "SpectralReport", "lipschitz_bound", "spectral_report"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_SHAPES = (Kind.RESHAPE, Kind.PERMUTE, Kind.NARROW, Kind.CONSTANT)
_EXACT = 1 + 1e-9  # above the rounding errors of singular values in float64
_ATTENTION = ("softmax", "scaled_dot_product_attention", "multi_head_attention_forward", "multihead")

# The largest derivative of each activation. GELU's is at sqrt(2), where 2 - x^2 = 0: Phi(x) + x phi(x). SiLU's is at
# 2.39936, where x tanh(x / 2) = 2, those of Mish and of GELU's tanh form at 1.49057 and 1.41850; all rounded up.
_SLOPES = {
    Function.SILU: 1.0998393202,
    Function.GELU: (1 + math.erf(1)) / 2 + math.exp(-1) / math.sqrt(math.pi) + 1e-15,
    Function.GELU_TANH: 1.1289930687,
    Function.MISH: 1.0884981613,
    Function.TANH: 1.0,
    Function.SIGMOID: 0.25,
    Function.ABS: 1.0,
}


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


# the bound of a critic


@dataclasses.dataclass(frozen=True)
class LayerBound:
    """What one layer, or function, adds to a bound."""

    name: str
    """Its path in the critic, as in named_modules."""
    layer: str
    factor: float
    """Its own Lipschitz constant, or a bound of that."""
    bound: float
    """Of the critic up to here."""


@dataclasses.dataclass(frozen=True)
class LipschitzBound:
    """A bound of a critic's Lipschitz constant; ``float`` gives it, ``str`` prints one layer to a line."""

    value: float
    layers: tuple[LayerBound, ...]

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        rows = [("layer", "", "factor", "bound")]
        rows += [(row.name, row.layer, f"{row.factor:.6g}", f"{row.bound:.6g}") for row in self.layers]
        return f"Lipschitz bound: {self.value:.6g}\n{_table(rows)}"


def lipschitz_bound(critic: nn.Module, input_shape: Sequence[int]) -> LipschitzBound:
    """Bound the Lipschitz constant of a critic, in the 2-norm of one sample: |D(x) - D(y)| <= bound |x - y|.

    A proof, not an estimate: the norms of layers are ``operator_norm_bound``'s, and each other function has its exact
    Lipschitz constant, or a bound of it. It is seldom tight for a deep critic, since it takes every layer at its worst
    together; it is, to some 1e-4 a layer, for a single layer and for a product of linear layers that lengthen the same
    direction. Any critic that can be traced is taken, as for ``explain``, whatever style its forward is written in.

    The critic is taken in its present mode, with the weights that its next forward would compute; power iterations are
    not advanced. Arithmetic is taken as exact, and softplus without the jump of 2e-9 at its threshold. Not
    differentiable.

    LayerNorm, GroupNorm and InstanceNorm have the Lipschitz constant max|weight| / sqrt(eps), next to constant inputs:
    a true bound, though hardly of use. Products of two values that depend on the input have none, unless both are
    bounded (tanh(a) * sigmoid(b)), nor has dot-product attention: these are refused.

    Args:
        critic: A map from a batch to scores, or maps of them.
        input_shape: That of one sample, without the batch.

    Raises:
        TypeError, ValueError: the critic is no module, or ``input_shape`` no shape.
        NotImplementedError: the critic cannot be traced, its forward failing on inputs of this shape included, or a
            layer, which is named, has no known Lipschitz constant.
    """
    function = "lipschitz_bound"
    check_module(function, "critic", critic)
    shape = shape_of(function, input_shape)
    x = _random(critic, shape)
    plan = plan_for(critic, x, (), {})
    trace = plan.trace
    if trace.obstacle:
        known = "; dot-product attention is not Lipschitz (Kim, Papamakarios and Mnih, 2021)"
        attends = any(word in f"{row.layer} {trace.obstacle}".lower() for row in trace.layers for word in _ATTENTION)
        raise NotImplementedError(
            f"{function}: this critic cannot be bounded: {trace.obstacle}{known if attends else ''}"
        )
    walk = _Walk(shape, parameters_unchanged(plan, critic, len(x)), trace.scalars)
    rows: list[LayerBound] = []
    for record, (path, layer) in zip(_records(trace.program), trace.places, strict=True):
        try:
            factor = walk.add(*record)
        except _Unbounded as error:
            where = f"layer {path!r}, {layer}," if path else layer
            raise NotImplementedError(f"{function}: {where} {error}") from None
        if record[0] in _SHAPES:
            continue
        bound = walk.bounds[-1]
        if rows and (rows[-1].name, rows[-1].layer) == (path, layer) and not layer.endswith("()"):
            before = rows.pop()  # one layer, in several records
            factor = bound * before.factor / before.bound if before.bound else 0.0
        rows.append(LayerBound(path, layer, factor, bound))
    return LipschitzBound(walk.bounds[-1] * (1 + 1e-12), tuple(rows))


def _random(critic: nn.Module, shape: tuple[int, ...], batch: int = 3) -> Tensor:
    """A batch in the dtype and on the device of the critic, without touching the global generator."""
    own = next((p for p in critic.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *shape, generator=generator).to(own.device, own.dtype)


def _records(program: Sequence[int]) -> Iterator[tuple[Kind, list[int], list[int]]]:
    """Each record's kind, payload and sizes."""
    i = 0
    while i < len(program):
        start, n = i + 2, program[i + 1]
        sizes, d = start + n + 1, program[start + n]
        yield Kind(program[i]), list(program[start : start + n]), list(program[sizes : sizes + d])
        i = sizes + d


class _Unbounded(Exception):  # noqa: N818
    """Says why a record has no bound."""


class _Walk:
    """Bounds of the values of a program, as functions of its input."""

    def __init__(self, shape: tuple[int, ...], parameters: list[Tensor], scalars: Sequence[float]) -> None:
        self.parameters = [p.double() for p in parameters]
        self.scalars = scalars
        self.shapes: list[list[int]] = [[*shape]]
        self.bounds = [1.0]
        self.sizes = [math.inf]
        """How large an element of each value can be."""
        self.pads: dict[int, tuple[int, Pad, list[tuple[int, int]]]] = {}
        """By value: what was padded, in which mode, and how much before and after each spatial dimension."""
        self.norms: dict[Any, float] = {}

    def add(self, kind: Kind, payload: list[int], shape: list[int]) -> float:
        """Append the bound of what a record makes; returns its factor over the largest of what it takes."""
        self.shapes.append(shape)
        size = math.inf
        if kind == Kind.CONSTANT:
            P = self.parameters[payload[0]]
            bound, taken, size = 0.0, 0.0, float(P.abs().max())
        elif kind == Kind.CAT:
            parts = payload[1:]
            taken = max(self.bounds[i] for i in parts)
            bound = math.sqrt(sum(self.bounds[i] ** 2 for i in parts))
            size = max(self.sizes[i] for i in parts)
        elif kind == Kind.ADD:
            a, b, s = payload
            scale, taken = abs(self.scalars[s]), max(self.bounds[a], self.bounds[b])
            bound = self.repeated(a) + scale * self.repeated(b)
            if a == b:
                bound = abs(1 + self.scalars[s]) * self.bounds[a]
            size = self.sizes[a] + scale * self.sizes[b]
        elif kind == Kind.MULTIPLY:
            a, b = payload
            taken = max(self.bounds[a], self.bounds[b])
            bound = self.times(self.sizes[a], self.repeated(b)) + self.times(self.sizes[b], self.repeated(a))
            size = self.times(self.sizes[a], self.sizes[b])
            if bound == math.inf:
                raise _Unbounded("is a product of two values that depend on the input, which is not Lipschitz")
        else:
            h = payload[0]
            source, factor = self.convolved(payload, shape) if kind == Kind.CONVOLUTION else (h, 0.0)
            if kind != Kind.CONVOLUTION:
                factor = self.factor(kind, h, payload[1:], shape)
            taken, bound = self.bounds[source], factor * self.bounds[source]
            size = self.size(kind, payload)
        self.bounds.append(bound)
        self.sizes.append(size)
        if not bound < math.inf:
            raise _Unbounded("has a weight that is not finite")
        return bound / taken if taken else 0.0

    @staticmethod
    def times(a: float, b: float) -> float:
        """The product, in which 0 wins over infinity."""
        return a * b if a and b else 0.0

    def repeated(self, value: int) -> float:
        """The bound of a value that is broadcast to the shape of the record."""
        return self.bounds[value] * math.sqrt(math.prod(self.shapes[-1]) / math.prod(self.shapes[value]))

    def size(self, kind: Kind, payload: list[int]) -> float:
        """How large an element of what a record makes can be."""
        own = self.sizes[payload[0]]
        if kind in (Kind.RESHAPE, Kind.PERMUTE, Kind.NARROW, Kind.EXPAND, Kind.MAX, Kind.MAX_POOL):
            return own
        if kind == Kind.AFFINE:
            scale, offset = self.scalars[payload[1] : payload[1] + 2]
            return self.times(abs(scale), own) + abs(offset)
        if kind == Kind.MULTIPLY_PARAMETER:
            return self.times(own, float(self.parameters[payload[1]].abs().max()))
        if kind == Kind.ACTIVATION:
            function = Function(payload[1])
            if function in (Function.TANH, Function.SIGMOID):
                return 1.0
            if function == Function.HARDTANH:
                return max(map(abs, self.scalars[payload[2] : payload[2] + 2]))
            return own if function == Function.ABS else math.inf
        return math.inf

    def factor(self, kind: Kind, h: int, rest: list[int], shape: list[int]) -> float:
        """The Lipschitz constant, or a bound of it, of a record that takes one value."""
        given = self.shapes[h]
        match kind:
            case Kind.LINEAR:
                W = self.parameters[rest[0]]
                return self.norm((rest[0],), lambda: certified_norm(Matrix(*W.shape), W))
            case Kind.ACTIVATION:
                return _slope(Function(rest[0]), self.scalars[rest[1] : rest[1] + 3])
            case Kind.PRELU:
                return max(1.0, float(self.parameters[rest[0]].abs().max()))
            case Kind.AFFINE:
                return abs(self.scalars[rest[0]])
            case Kind.MULTIPLY_PARAMETER:
                largest = float(self.parameters[rest[0]].abs().max())
                return largest * math.sqrt(math.prod(shape) / math.prod(given))
            case Kind.SUM:
                return math.sqrt(math.prod(given[dim - 1] for dim in rest[1:]))
            case Kind.EXPAND:
                return math.sqrt(math.prod(shape) / math.prod(given))
            case Kind.NORMALIZE:
                eps = self.scalars[rest[1]]
                if math.prod(given[len(given) - rest[0] :]) == 1:
                    return 0.0
                if eps <= 0:
                    raise _Unbounded("normalizes with eps=0, which is not Lipschitz")
                return 1 / math.sqrt(eps)  # the Jacobian is a projection / sqrt(var + eps)
            case Kind.MAX_POOL:
                return _max_pool(given[1:], shape[1:], rest)
            case Kind.AVG_POOL | Kind.ADAPTIVE_AVG_POOL | Kind.RESIZE:
                return self.separable(kind, given[1:], shape[1:], rest)
            case Kind.PAD:
                return self.padded(h, rest)
        assert kind in (Kind.RESHAPE, Kind.PERMUTE, Kind.NARROW, Kind.MAX), kind
        return 1.0

    def norm(self, key: Any, compute: Any) -> float:
        """The norm of a layer, once."""
        if key not in self.norms:
            self.norms[key] = compute()
        return self.norms[key]

    def convolved(self, payload: list[int], shape: list[int]) -> tuple[int, float]:
        """A value that a convolution is of, which may be what the value that it takes was padded from, and its norm."""
        h, number, _, transposed, groups, *rest = payload
        W = self.parameters[number]
        nd = W.dim() - 2
        stride, padding, dilation, extra = (rest[i : i + nd] for i in range(0, 4 * nd, nd))
        pads, mode = [(p, p) for p in padding], "zeros"
        if h in self.pads and not transposed:
            source, kind, before_and_after = self.pads[h]
            if kind == Pad.CONSTANT or not any(padding):
                h, mode = source, "zeros" if kind == Pad.CONSTANT else kind.name.lower()
                pads = [(a + p, b + p) for (a, b), p in zip(before_and_after, padding, strict=True)]
        given = tuple(self.shapes[h])
        layer = convolution(
            *("lipschitz_bound", given, shape[0], W.shape[2:], stride, pads, mode, dilation, groups),
            *(bool(transposed), extra),
        )
        return h, self.norm((number, layer), lambda: certified_norm(layer, W))

    def padded(self, h: int, rest: list[int]) -> float:
        mode, _, *pads = rest
        given = self.shapes[h]
        pairs = list(zip(pads[::2], pads[1::2], strict=True))[::-1]  # of the last dimensions, in order
        pairs = [(0, 0)] * (len(given) - len(pairs)) + pairs
        if pairs[0] == (0, 0) and min(pads) >= 0:
            self.pads[len(self.shapes) - 1] = h, Pad(mode), pairs[1:]
        if mode == Pad.CONSTANT:
            return 1.0
        name = Pad(mode).name.lower()
        factor = 1.0
        for n, (before, after) in zip(given, pairs, strict=True):
            if before or after:
                factor *= math.sqrt(int(padded_index(n, before, after, name).bincount().max()))
        return factor

    def separable(self, kind: Kind, given: list[int], made: list[int], rest: list[int]) -> float:
        """The norm of a pool or resize, the product of those along each dimension."""
        nd, factor = len(given), 1.0
        for dim, (n, t) in enumerate(zip(given, made, strict=True)):
            lines = torch.eye(n, dtype=torch.float64)[:, None, :, None]
            if kind == Kind.ADAPTIVE_AVG_POOL:
                matrix = F.adaptive_avg_pool2d(lines, (t, 1))
            elif kind == Kind.AVG_POOL:
                kernel, stride, padding = (rest[dim + i * nd] for i in range(3))
                ceil, count_include_pad, divisor = rest[3 * nd :]
                options = (bool(ceil), bool(count_include_pad), 1 if divisor else None)
                matrix = F.avg_pool2d(lines, (kernel, 1), (stride, 1), (padding, 0), *options)
                factor /= divisor if divisor and dim == 0 else 1
            else:
                mode, corners, s = rest
                scales = (self.scalars[s + dim] or None, None)
                if mode == Resize.NEAREST:
                    matrix = torch.ops.aten.upsample_nearest2d(lines, [t, 1], *scales)
                else:
                    name = "upsample_bilinear2d" if mode == Resize.LINEAR else "upsample_bicubic2d"
                    matrix = getattr(torch.ops.aten, name)(lines, [t, 1], bool(corners), *scales)
            factor *= float(torch.linalg.matrix_norm(matrix[:, 0, :, 0], 2)) * _EXACT
        return factor


def _slope(function: Function, scalars: Sequence[float]) -> float:
    if function == Function.LEAKY_RELU:
        return max(1.0, abs(scalars[0]))
    if function == Function.HARDTANH:
        return 1.0
    if function == Function.ELU:
        alpha, scale, input_scale = scalars
        return abs(scale) * max(1.0, abs(alpha * input_scale))
    if function == Function.SOFTPLUS:
        if scalars[1] < 15:
            raise _Unbounded(f"jumps at its threshold of {scalars[1]:g}, so that it is not Lipschitz")
        return 1.0
    return _SLOPES[function]


def _max_pool(given: list[int], made: list[int], rest: list[int]) -> float:
    """The root of how many windows the busiest element is in: |max a - max b| <= |a - b| of each window."""
    nd, count = len(given), 1
    for dim, (n, t) in enumerate(zip(given, made, strict=True)):
        kernel, stride, padding, dilation = (rest[dim + i * nd] for i in range(4))
        places = torch.arange(t)[:, None] * stride + torch.arange(kernel) * dilation - padding
        count *= int(places[(places >= 0) & (places < n)].bincount().max())
    return math.sqrt(count)


# the norms of a model's layers


@dataclasses.dataclass(frozen=True)
class LayerNorms:
    """The norms of one layer, with the weight that its forward uses in evaluation; NaN if not asked for."""

    name: str
    layer: str
    divisor: float
    """By what a normalization divides the weight: its estimate of the matrix's norm. NaN if nothing does."""
    matrix: float
    """The norm of the weight reshaped to a matrix; 1 if a spectral norm has converged."""
    operator: float
    """The norm of the layer as an operator."""
    bound: float
    """``operator_norm_bound``."""


@dataclasses.dataclass(frozen=True)
class SpectralReport:
    """The norms of a model's layers; ``str`` prints one layer to a line."""

    layers: tuple[LayerNorms, ...]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "", "divided by", "matrix", "operator", "operator/matrix", "bound")]
        for row in self.layers:
            ratio = row.operator / row.matrix if row.matrix else math.nan
            numbers = (row.divisor, row.matrix, row.operator, ratio, row.bound)
            rows.append((row.name, row.layer, *("" if math.isnan(n) else f"{n:.5g}" for n in numbers)))
        return _table(rows)


def spectral_report(model: nn.Module, input_shape: Sequence[int] | None = None) -> SpectralReport:
    """The norms of all linear layers and convolutions of a model, as matrices and as operators.

    Args:
        model: Any module. With ``input_shape`` it is run once, in evaluation mode and without a gradient, to see the
            shapes of the inputs of its layers; nothing of it changes.
        input_shape: That of one sample. Without it, convolutions have no norm as operators, and no bound.

    Raises:
        TypeError, ValueError: the model is no module, or ``input_shape`` no shape.
    """
    function = "spectral_report"
    check_module(function, "model", model)
    shapes: dict[nn.Module, tuple[int, ...]] = {}
    if input_shape is not None:
        shapes = _input_shapes(model, _random(model, shape_of(function, input_shape), batch=1))
    rows = []
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if not isinstance(module, _LAYERS) or not isinstance(getattr(module, "weight", None), Tensor):
            continue
        weight = effective_weight(module).detach().double()
        matrix = matrix_of(weight, output_dim(module))
        found = largest_singular(Matrix(*matrix.shape), matrix, generator=generator)
        norms = [float(found.values[0]), math.nan, math.nan]
        if isinstance(module, nn.Linear) or module in shapes:
            layer = map_of(function, module, shapes.get(module))
            found = largest_singular(layer, weight, generator=generator)
            norms[1:] = float(found.values[0]), certified_norm(layer, weight)
        described = type(module).__name__.removeprefix("Parametrized")
        rows.append(LayerNorms(name, f"{described}({module.extra_repr()})", _divisor(module, weight), *norms))
    return SpectralReport(tuple(rows))


def _input_shapes(model: nn.Module, x: Tensor) -> dict[nn.Module, tuple[int, ...]]:
    """The shape of what each layer takes, without the batch."""
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes[module] = tuple(inputs[0].shape[1:])

    modes = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_pre_hook(see) for module, _ in modes if isinstance(module, _LAYERS)]
    try:
        model.eval()
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return shapes


def _divisor(module: nn.Module, weight: Tensor) -> float:
    original: Any = getattr(module, "weight_orig", None)
    if original is None and "parametrizations" in module._modules:
        original = getattr(module.parametrizations["weight"], "original", None)  # type: ignore[index]
    if not isinstance(original, Tensor) or original.shape != weight.shape or not weight.any():
        return math.nan
    return float(torch.linalg.vector_norm(original.detach().double()) / torch.linalg.vector_norm(weight))
