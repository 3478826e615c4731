"""What the torch functions that critics call become in a program: the records of ``_ops.Kind``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._ops import Function, Kind, Pad, Resize
from .tracing import Handler, Obstacle, Recorder

HANDLERS: dict[str, Handler] = {}
"""By the name of the function, without torch's namespaces and without the underscore of an operation in place."""


_H = TypeVar("_H", bound=Handler)


def handles(*names: str) -> Callable[[_H], _H]:
    """Register a handler for functions of these names."""

    def register(handler: _H) -> _H:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def _each(value: Any, n: int) -> list[int]:
    """A number for each of n dimensions."""
    if isinstance(value, (tuple, list)):
        return [int(v) for v in value] * (n if len(value) == 1 else 1)
    return [int(value)] * n


def _dims(tensor: Tensor, dim: Any) -> list[int]:
    """Dimensions counted from 0; the batch is refused."""
    if dim is None:
        raise Obstacle("reduces the batch")
    dims = [d % tensor.dim() for d in (dim if isinstance(dim, (tuple, list)) else [dim])]
    if 0 in dims:
        raise Obstacle("works along dimension 0, the batch")
    return dims


# products


@handles("linear")
def _linear(r: Recorder, result: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> int:
    return r.emit(Kind.LINEAR, [r.value(input), r.parameter(weight), r.parameter(bias)], result.shape)


@handles("matmul", "mm", "__matmul__")
def _matmul(r: Recorder, result: Tensor, input: Tensor, other: Tensor) -> int:
    if not r.moves(input) or r.moves(other) or other.dim() > 2:
        raise Obstacle("is a product other than input @ matrix")
    if other.dim() == 1:
        weight = r.derive(Tensor.unsqueeze, other, 0)
        product = r.emit(Kind.LINEAR, [r.value(input), r.parameter(weight), -1], (*result.shape, 1))
        return r.emit(Kind.RESHAPE, [product], result.shape)
    return r.emit(Kind.LINEAR, [r.value(input), r.parameter(r.derive(Tensor.t, other)), -1], result.shape)


@handles("bilinear")
def _bilinear(
    r: Recorder, result: Tensor, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> int:
    if not r.moves(input1):  # exchange the inputs
        input1, input2, weight = input2, input1, r.derive(Tensor.transpose, weight, 1, 2)
    outputs, n, m = weight.shape
    matrix = r.derive(Tensor.reshape, r.derive(Tensor.transpose, weight, 1, 2), (outputs * m, n))
    lead = input1.shape[:-1]
    h = r.emit(Kind.LINEAR, [r.value(input1), r.parameter(matrix), -1], (*lead, outputs * m))
    h = r.emit(Kind.RESHAPE, [h], (*lead, outputs, m))
    if r.moves(input2):
        other = r.emit(Kind.RESHAPE, [r.value(input2)], (*lead, 1, m))
        h = r.emit(Kind.MULTIPLY, [h, other], (*lead, outputs, m))
    else:
        other = r.derive(Tensor.unsqueeze, input2, -2)
        h = r.emit(Kind.MULTIPLY_PARAMETER, [h, r.parameter(other)], (*lead, outputs, m))
    h = r.emit(Kind.SUM, [h, 0, len(lead) + 1], result.shape)
    return h if bias is None else _add_constant(r, h, bias, 1.0, result.shape)


def _convolution(
    r: Recorder,
    shape: torch.Size,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    output_padding: Any = 0,
    transposed: bool = False,
) -> int:
    n = weight.dim() - 2
    if input.dim() != n + 2:
        raise Obstacle("is a convolution without a batch")
    h, dilations = r.value(input), _each(dilation, n)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
        paddings = [t // 2 for t in total]
        odd = [t % 2 for t in total]
        if any(odd):  # torch pads the odd one at the end
            pads = [pad for extra in reversed(odd) for pad in (0, extra)]
            padded = [size + extra for size, extra in zip(input.shape[2:], odd, strict=True)]
            h = r.emit(Kind.PAD, [h, Pad.CONSTANT, r.scalar(0), *pads], (*input.shape[:2], *padded))
    else:
        paddings = [0] * n if padding == "valid" else _each(padding, n)
    r.trace.images |= n == 2
    payload = [h, r.parameter(weight), r.parameter(bias), transposed, groups]
    payload += [*_each(stride, n), *paddings, *dilations, *_each(output_padding, n)]
    return r.emit(Kind.CONVOLUTION, payload, shape)


@handles("conv1d", "conv2d", "conv3d")
def _conv(
    r: Recorder,
    result: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> int:
    return _convolution(r, result.shape, input, weight, bias, stride, padding, dilation, groups)


@handles("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(
    r: Recorder,
    result: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> int:
    return _convolution(r, result.shape, input, weight, bias, stride, padding, dilation, groups, output_padding, True)


# arithmetic


def _as_constant(r: Recorder, tensor: Tensor, dims: int) -> Tensor:
    """The tensor with `dims` dimensions, of which the first is 1 or the batch."""
    if tensor.dim() < dims:
        tensor = r.derive(Tensor.reshape, tensor, (1,) * (dims - tensor.dim()) + tuple(tensor.shape))
    if tensor.shape[0] not in (1, r.batch):
        raise Obstacle(f"combines the batch with a tensor of shape {tuple(tensor.shape)}")
    return tensor


def _constant(r: Recorder, tensor: Tensor, dims: int) -> int:
    constant = _as_constant(r, tensor, dims)
    return r.emit(Kind.CONSTANT, [r.parameter(constant)], (r.batch, *constant.shape[1:]))


def _add_constant(r: Recorder, h: int, tensor: Tensor, alpha: float, shape: Sequence[int]) -> int:
    return r.emit(Kind.ADD, [h, _constant(r, tensor, len(shape)), r.scalar(alpha)], shape)


def _affine(r: Recorder, h: int, scale: float, offset: float, shape: Sequence[int]) -> int:
    return r.emit(Kind.AFFINE, [h, r.scalar(scale, offset)], shape)


def _operand(r: Recorder, tensor: Tensor, dims: int) -> int:
    """The value of a tensor that takes part in an operation of so many dimensions."""
    if tensor.dim() != dims:
        raise Obstacle("combines tensors of different numbers of dimensions")
    return r.value(tensor)


def _sum(r: Recorder, shape: torch.Size, a: Any, b: Any, alpha: float, scale: float = 1.0) -> int:
    """Record scale a + alpha b."""
    dims = len(shape)
    if not isinstance(a, Tensor) or not r.moves(a):  # a number, or a constant
        a, b, scale, alpha = b, a, alpha, scale
    h = _operand(r, a, dims)
    if not isinstance(b, Tensor):
        return _affine(r, h, scale, alpha * b, shape)
    if scale != 1:
        h = _affine(r, h, scale, 0, a.shape)
    if r.moves(b):
        return r.emit(Kind.ADD, [h, _operand(r, b, dims), r.scalar(alpha)], shape)
    return _add_constant(r, h, b, alpha, shape)


@handles("add", "__add__", "__radd__", "__iadd__")
def _add(r: Recorder, result: Tensor, input: Any, other: Any, *, alpha: float = 1.0) -> int:
    return _sum(r, result.shape, input, other, alpha)


@handles("sub", "subtract", "__sub__", "__isub__")
def _sub(r: Recorder, result: Tensor, input: Any, other: Any, *, alpha: float = 1.0) -> int:
    return _sum(r, result.shape, input, other, -alpha)


@handles("rsub", "__rsub__")
def _rsub(r: Recorder, result: Tensor, input: Any, other: Any, *, alpha: float = 1.0) -> int:
    return _sum(r, result.shape, other, input, -alpha)


@handles("mul", "multiply", "__mul__", "__rmul__", "__imul__")
def _mul(r: Recorder, result: Tensor, input: Any, other: Any) -> int:
    if not r.moves(input):
        input, other = other, input
    h = _operand(r, input, result.dim())
    if not isinstance(other, Tensor):
        return _affine(r, h, other, 0, result.shape)
    if r.moves(other):
        return r.emit(Kind.MULTIPLY, [h, _operand(r, other, result.dim())], result.shape)
    if other.dim() == result.dim():
        other = _as_constant(r, other, result.dim())
    return r.emit(Kind.MULTIPLY_PARAMETER, [h, r.parameter(other)], result.shape)


@handles("div", "divide", "true_divide", "__truediv__", "__div__", "__itruediv__")
def _div(r: Recorder, result: Tensor, input: Any, other: Any) -> int:
    if not r.moves(input) or r.moves(other):
        raise Obstacle("divides by what depends on the input")
    return _mul(r, result, input, r.derive(Tensor.reciprocal, other) if isinstance(other, Tensor) else 1 / other)


@handles("neg", "negative", "__neg__")
def _neg(r: Recorder, result: Tensor, input: Tensor) -> int:
    return _affine(r, r.value(input), -1, 0, result.shape)


@handles("pow", "__pow__")
def _pow(r: Recorder, result: Tensor, input: Any, exponent: Any) -> int:
    if not r.moves(input) or isinstance(exponent, Tensor) or exponent not in (1, 2):
        raise Obstacle("is a power other than the square")
    h = r.value(input)
    return h if exponent == 1 else r.emit(Kind.MULTIPLY, [h, h], result.shape)


@handles("square")
def _square(r: Recorder, result: Tensor, input: Tensor) -> int:
    return _pow(r, result, input, 2)


# activations


def _activation(r: Recorder, result: Tensor, input: Tensor, function: Function, *scalars: float) -> int:
    return r.emit(Kind.ACTIVATION, [r.value(input), function, r.scalar(*scalars)], result.shape)


@handles("relu")
def _relu(r: Recorder, result: Tensor, input: Tensor, inplace: bool = False) -> int:
    return _activation(r, result, input, Function.LEAKY_RELU, 0.0)


@handles("leaky_relu")
def _leaky_relu(r: Recorder, result: Tensor, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> int:
    return _activation(r, result, input, Function.LEAKY_RELU, negative_slope)


@handles("rrelu")
def _rrelu(
    r: Recorder,
    result: Tensor,
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> int:
    if training:
        raise Obstacle("is random in training mode")
    return _activation(r, result, input, Function.LEAKY_RELU, (lower + upper) / 2)


@handles("prelu")
def _prelu(r: Recorder, result: Tensor, input: Tensor, weight: Tensor) -> int:
    return r.emit(Kind.PRELU, [r.value(input), r.parameter(weight)], result.shape)


@handles("hardtanh")
def _hardtanh(
    r: Recorder, result: Tensor, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> int:
    return _activation(r, result, input, Function.HARDTANH, min_val, max_val)


@handles("relu6")
def _relu6(r: Recorder, result: Tensor, input: Tensor, inplace: bool = False) -> int:
    return _activation(r, result, input, Function.HARDTANH, 0.0, 6.0)


@handles("gelu")
def _gelu(r: Recorder, result: Tensor, input: Tensor, approximate: str = "none") -> int:
    return _activation(r, result, input, Function.GELU_TANH if approximate == "tanh" else Function.GELU)


@handles("softplus")
def _softplus(r: Recorder, result: Tensor, input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> int:
    return _activation(r, result, input, Function.SOFTPLUS, beta, threshold)


@handles("logsigmoid")
def _logsigmoid(r: Recorder, result: Tensor, input: Tensor) -> int:
    # -softplus(-x), exact below any threshold
    h = _affine(r, r.value(input), -1, 0, result.shape)
    h = r.emit(Kind.ACTIVATION, [h, Function.SOFTPLUS, r.scalar(1.0, math.inf)], result.shape)
    return _affine(r, h, -1, 0, result.shape)


@handles("elu")
def _elu(r: Recorder, result: Tensor, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> int:
    return _activation(r, result, input, Function.ELU, alpha, 1.0, 1.0)


@handles("selu")
def _selu(r: Recorder, result: Tensor, input: Tensor, inplace: bool = False) -> int:
    return _activation(r, result, input, Function.ELU, 1.6732632423543772848170429916717, 1.0507009873554804934193, 1.0)


@handles("celu")
def _celu(r: Recorder, result: Tensor, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> int:
    return _activation(r, result, input, Function.ELU, alpha, 1.0, 1 / alpha)


@handles("glu")
def _glu(r: Recorder, result: Tensor, input: Tensor, dim: int = -1) -> int:
    (dim,) = _dims(input, dim)
    n, h = result.shape[dim], r.value(input)
    gate = r.emit(Kind.NARROW, [h, dim, n, n], result.shape)
    gate = r.emit(Kind.ACTIVATION, [gate, Function.SIGMOID, r.scalar()], result.shape)
    return r.emit(Kind.MULTIPLY, [r.emit(Kind.NARROW, [h, dim, 0, n], result.shape), gate], result.shape)


def _plain_activation(function: Function) -> Handler:
    def handler(r: Recorder, result: Tensor, input: Tensor, inplace: bool = False) -> int:
        return _activation(r, result, input, function)

    return handler


for _function in (Function.SILU, Function.TANH, Function.SIGMOID, Function.MISH, Function.ABS):
    HANDLERS[_function.name.lower()] = _plain_activation(_function)
HANDLERS["absolute"] = HANDLERS["__abs__"] = HANDLERS["abs"]


@handles("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
def _dropout(
    r: Recorder, result: Tensor, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> int:
    if training and p > 0:
        raise Obstacle("is random in training mode")
    return r.value(input)


# normalization


def _scale_and_shift(
    r: Recorder, h: int, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int], per_channel: bool
) -> int:
    """Of channels, dimension 1, or of the last dimensions."""
    ones = (1,) * (len(shape) - 2)
    if weight is not None:
        if per_channel and ones:
            weight = r.derive(Tensor.reshape, weight, (-1, *ones))
        h = r.emit(Kind.MULTIPLY_PARAMETER, [h, r.parameter(weight)], shape)
    if bias is not None:
        if per_channel and ones:
            bias = r.derive(Tensor.reshape, bias, (-1, *ones))
        h = _add_constant(r, h, bias, 1.0, shape)
    return h


@handles("layer_norm")
def _layer_norm(
    r: Recorder,
    result: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> int:
    if len(normalized_shape) >= input.dim():
        raise Obstacle("normalizes over the batch")
    h = r.emit(Kind.NORMALIZE, [r.value(input), len(normalized_shape), r.scalar(eps)], result.shape)
    return _scale_and_shift(r, h, weight, bias, result.shape, per_channel=False)


def _grouped_norm(r: Recorder, input: Tensor, groups: int, eps: float) -> int:
    """Normalize groups of channels and all places."""
    shape = input.shape
    grouped = (shape[0], groups, math.prod(shape[1:]) // groups)
    h = r.emit(Kind.RESHAPE, [r.value(input)], grouped)
    h = r.emit(Kind.NORMALIZE, [h, 1, r.scalar(eps)], grouped)
    return r.emit(Kind.RESHAPE, [h], shape)


@handles("group_norm")
def _group_norm(
    r: Recorder,
    result: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> int:
    return _scale_and_shift(r, _grouped_norm(r, input, num_groups, eps), weight, bias, result.shape, per_channel=True)


@handles("instance_norm")
def _instance_norm(
    r: Recorder,
    result: Tensor,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> int:
    if not use_input_stats:
        return _batch_norm(r, result, input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        raise Obstacle("keeps running statistics")
    h = _grouped_norm(r, input, input.shape[1], eps)
    return _scale_and_shift(r, h, weight, bias, result.shape, per_channel=True)


@handles("batch_norm")
def _batch_norm(
    r: Recorder,
    result: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> int:
    if training or running_mean is None or running_var is None:
        raise Obstacle("normalizes over the batch")
    # weight (x - mean) / sqrt(var + eps) + bias
    scale = r.derive(_batch_norm_scale, running_var, weight, eps)
    shift = r.derive(_batch_norm_shift, running_mean, scale, bias)
    return _scale_and_shift(r, r.value(input), scale, shift, result.shape, per_channel=True)


def _batch_norm_scale(var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    scale = (var + eps).rsqrt()
    return scale if weight is None else weight * scale


def _batch_norm_shift(mean: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return -mean * scale if bias is None else bias - mean * scale


# shapes


@handles("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view")
def _reshape(r: Recorder, result: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> int:
    if result.dtype != input.dtype:
        raise Obstacle("sees memory as another dtype")
    return r.emit(Kind.RESHAPE, [r.value(input)], result.shape)


@handles("contiguous", "clone", "alias", "requires_grad")
def _same(r: Recorder, result: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> int:
    return r.value(input)


@handles("to", "type", "float", "half", "bfloat16", "double", "type_as")
def _cast(r: Recorder, result: Any, input: Tensor, *args: Any, **kwargs: Any) -> int:
    single = (torch.float32, torch.float16, torch.bfloat16)
    if not isinstance(result, Tensor) or result.device != input.device:
        raise Obstacle("moves to another device")
    if result.dtype != input.dtype and not (result.dtype in single and input.dtype in single):
        raise Obstacle(f"casts {input.dtype} to {result.dtype}")
    return r.value(input)


def _permutation(r: Recorder, result: Tensor, input: Tensor, dims: Sequence[int]) -> int:
    if dims[0] != 0:
        raise Obstacle("moves dimension 0, the batch")
    return r.emit(Kind.PERMUTE, [r.value(input), *dims], result.shape)


@handles("permute")
def _permute(r: Recorder, result: Tensor, input: Tensor, *dims: Any) -> int:
    order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    return _permutation(r, result, input, [d % input.dim() for d in order])


@handles("transpose", "swapaxes", "swapdims")
def _transpose(r: Recorder, result: Tensor, input: Tensor, dim0: int, dim1: int) -> int:
    order = list(range(input.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permutation(r, result, input, order)


@handles("mT")
def _matrix_transpose(r: Recorder, result: Tensor, input: Tensor) -> int:
    return _transpose(r, result, input, -2, -1)


@handles("movedim", "moveaxis")
def _movedim(r: Recorder, result: Tensor, input: Tensor, source: Any, destination: Any) -> int:
    n = input.dim()
    sources = [d % n for d in (source if isinstance(source, (tuple, list)) else [source])]
    targets = [d % n for d in (destination if isinstance(destination, (tuple, list)) else [destination])]
    rest = iter([d for d in range(n) if d not in sources])
    moved = dict(zip(targets, sources, strict=True))
    return _permutation(r, result, input, [moved[d] if d in moved else next(rest) for d in range(n)])


@handles("expand", "expand_as", "broadcast_to")
def _expand(r: Recorder, result: Tensor, input: Tensor, *size: Any, **kwargs: Any) -> int:
    return r.emit(Kind.EXPAND, [_operand(r, input, result.dim())], result.shape)


@handles("cat", "concat", "concatenate")
def _cat(r: Recorder, result: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> int:
    (dim,) = _dims(result, dim)
    parts = [_operand(r, t, result.dim()) if r.moves(t) else _constant(r, t, result.dim()) for t in tensors]
    return r.emit(Kind.CAT, [dim, *parts], result.shape)


@handles("stack")
def _stack(r: Recorder, result: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> int:
    (dim,) = _dims(result, dim)
    shape = [*result.shape]
    shape[dim] = 1
    parts = []
    for t in tensors:
        if r.moves(t):
            parts.append(r.emit(Kind.RESHAPE, [r.value(t)], shape))
        else:
            parts.append(
                _constant(r, r.derive(Tensor.unsqueeze, _as_constant(r, t, result.dim() - 1), dim), len(shape))
            )
    return r.emit(Kind.CAT, [dim, *parts], result.shape)


def _narrowed(r: Recorder, h: int, shape: Sequence[int], dim: int, start: int, length: int) -> tuple[int, list[int]]:
    """A part along a dimension, and its shape."""
    part = [*shape]
    part[dim] = length
    return r.emit(Kind.NARROW, [h, dim, start, length], part), part


@handles("narrow")
def _narrow(r: Recorder, result: Tensor, input: Tensor, dim: int, start: int, length: int) -> int:
    (dim,) = _dims(input, dim)
    return _narrowed(r, r.value(input), input.shape, dim, start % input.shape[dim], length)[0]


@handles("chunk", "split", "split_with_sizes", "tensor_split")
def _split(r: Recorder, result: Sequence[Tensor], input: Tensor, sizes: Any, dim: int = 0) -> list[int]:
    (dim,) = _dims(input, dim)
    starts, start = [], 0
    for part in result:
        starts.append(_narrowed(r, r.value(input), input.shape, dim, start, part.shape[dim])[0])
        start += part.shape[dim]
    return starts


@handles("unbind")
def _unbind(r: Recorder, result: Sequence[Tensor], input: Tensor, dim: int = 0) -> list[int]:
    return [_select(r, part, input, dim, i) for i, part in enumerate(result)]


@handles("select")
def _select(r: Recorder, result: Tensor, input: Tensor, dim: int, index: int) -> int:
    (dim,) = _dims(input, dim)
    part, _ = _narrowed(r, r.value(input), input.shape, dim, index % input.shape[dim], 1)
    return r.emit(Kind.RESHAPE, [part], result.shape)


@handles("__getitem__")
def _getitem(r: Recorder, result: Tensor, input: Tensor, index: Any) -> int:
    items = list(index) if isinstance(index, tuple) else [index]
    if any(item is not None and item is not ... and not isinstance(item, (int, slice)) for item in items):
        raise Obstacle("is indexed by a tensor or a list")
    taken = sum(item is not None and item is not ... for item in items)
    if ... in items:
        at = items.index(...)
        items[at : at + 1] = [slice(None)] * (input.dim() - taken)
    h, shape, dim = r.value(input), [*input.shape], 0
    for item in items:
        if item is None:
            continue
        start, stop, step = (
            item.indices(input.shape[dim]) if isinstance(item, slice) else (item % input.shape[dim], None, 1)
        )
        if step != 1:
            raise Obstacle("is indexed with a step")
        length = 1 if stop is None else max(stop - start, 0)
        if length != shape[dim] or stop is None:
            if dim == 0:
                raise Obstacle("takes some of the samples")
            h, shape = _narrowed(r, h, shape, dim, start, length)
        dim += 1
    return h if shape == [*result.shape] else r.emit(Kind.RESHAPE, [h], result.shape)


@handles("pixel_shuffle")
def _pixel_shuffle(r: Recorder, result: Tensor, input: Tensor, upscale_factor: int) -> int:
    b, c, height, width = _image(input)
    n, channels = upscale_factor, c // upscale_factor**2
    h = r.emit(Kind.RESHAPE, [r.value(input)], (b, channels, n, n, height, width))
    h = r.emit(Kind.PERMUTE, [h, 0, 1, 4, 2, 5, 3], (b, channels, height, n, width, n))
    return r.emit(Kind.RESHAPE, [h], result.shape)


@handles("pixel_unshuffle")
def _pixel_unshuffle(r: Recorder, result: Tensor, input: Tensor, downscale_factor: int) -> int:
    b, c, height, width = _image(input)
    n, rows, columns = downscale_factor, height // downscale_factor, width // downscale_factor
    h = r.emit(Kind.RESHAPE, [r.value(input)], (b, c, rows, n, columns, n))
    h = r.emit(Kind.PERMUTE, [h, 0, 1, 3, 5, 2, 4], (b, c, n, n, rows, columns))
    return r.emit(Kind.RESHAPE, [h], result.shape)


def _image(input: Tensor) -> list[int]:
    if input.dim() != 4:
        raise Obstacle(f"takes shape {tuple(input.shape)}, which is no batch of images")
    return [*input.shape]


# reductions


@handles("sum")
def _sum_over(r: Recorder, result: Tensor, input: Tensor, dim: Any = None, keepdim: bool = False) -> int:
    return r.emit(Kind.SUM, [r.value(input), keepdim, *_dims(input, dim)], result.shape)


@handles("mean")
def _mean(r: Recorder, result: Tensor, input: Tensor, dim: Any = None, keepdim: bool = False) -> int:
    total = _sum_over(r, result, input, dim, keepdim)
    return _affine(r, total, 1 / math.prod(input.shape[d] for d in _dims(input, dim)), 0, result.shape)


@handles("max")
def _max(r: Recorder, result: Any, input: Tensor, dim: Any = None, keepdim: bool = False) -> int | list[int]:
    if isinstance(dim, Tensor):  # of two tensors
        return _maximum(r, result, input, dim)
    (dim,) = _dims(input, dim)
    h = r.emit(Kind.MAX, [r.value(input), dim, keepdim], result[0].shape)
    return [h, h]  # the indices are integers: nothing that is recorded takes them


@handles("maximum")
def _maximum(r: Recorder, result: Tensor, input: Tensor, other: Tensor) -> int:
    shape = (r.batch, 1, *result.shape[1:])
    parts = []
    for t in (input, other):
        h = _operand(r, t, result.dim()) if r.moves(t) else _constant(r, t, result.dim())
        if t.shape[1:] != result.shape[1:]:
            h = r.emit(Kind.EXPAND, [h], result.shape)
        parts.append(r.emit(Kind.RESHAPE, [h], shape))
    both = r.emit(Kind.CAT, [1, *parts], (r.batch, 2, *result.shape[1:]))
    return r.emit(Kind.MAX, [both, 1, 0], result.shape)


# pools, resizes and pads


def _spatial(input: Tensor, name: str) -> int:
    n = int(name[-2])
    if input.dim() != n + 2:
        raise Obstacle("is a pool without a batch")
    return n


def _max_pool(name: str) -> Handler:
    def handler(
        r: Recorder,
        result: Any,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> int:
        n = _spatial(input, name)
        if not isinstance(result, Tensor):
            raise Obstacle("returns indices")
        options = [kernel_size, kernel_size if stride is None or stride == [] else stride, padding, dilation]
        payload = [number for option in options for number in _each(option, n)]
        return r.emit(Kind.MAX_POOL, [r.value(input), *payload, ceil_mode], result.shape)

    return handler


def _avg_pool(name: str) -> Handler:
    def handler(
        r: Recorder,
        result: Tensor,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> int:
        n = _spatial(input, name)
        options = [kernel_size, kernel_size if stride is None or stride == [] else stride, padding]
        payload = [number for option in options for number in _each(option, n)]
        payload += [ceil_mode, count_include_pad, divisor_override or 0]
        return r.emit(Kind.AVG_POOL, [r.value(input), *payload], result.shape)

    return handler


def _adaptive_avg_pool(name: str) -> Handler:
    def handler(r: Recorder, result: Tensor, input: Tensor, output_size: Any) -> int:
        _spatial(input, name)
        return r.emit(Kind.ADAPTIVE_AVG_POOL, [r.value(input)], result.shape)

    return handler


for _make, _stem in ((_max_pool, "max_pool"), (_avg_pool, "avg_pool"), (_adaptive_avg_pool, "adaptive_avg_pool")):
    for _n in (1, 2, 3):
        HANDLERS[f"{_stem}{_n}d"] = _make(f"{_stem}{_n}d")


@handles("interpolate", "upsample")
def _interpolate(
    r: Recorder,
    result: Tensor,
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> int:
    n = input.dim() - 2
    h = r.value(input)
    if mode == "area":
        return r.emit(Kind.ADAPTIVE_AVG_POOL, [h], result.shape)
    modes = {"nearest": Resize.NEAREST, "bicubic": Resize.CUBIC}
    modes |= dict.fromkeys(("linear", "bilinear", "trilinear"), Resize.LINEAR)
    if mode not in modes or antialias:
        raise Obstacle(f"resizes with mode {mode!r}{' and antialias' if antialias else ''}")
    factors = [0.0] * n
    if scale_factor is not None and not recompute_scale_factor:
        factors = [float(f) for f in scale_factor] if isinstance(scale_factor, (tuple, list)) else [scale_factor] * n
    return r.emit(Kind.RESIZE, [h, modes[mode], bool(align_corners), r.scalar(*factors)], result.shape)


@handles("pad")
def _pad(
    r: Recorder, result: Tensor, input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> int:
    if len(pad) >= 2 * input.dim() and any(pad[2 * input.dim() - 2 :]):
        raise Obstacle("pads the batch")
    modes = {m.name.lower(): m for m in Pad}
    if mode != "constant" and any(p < 0 for p in pad):
        raise Obstacle(f"crops in mode {mode!r}")
    payload = [r.value(input), modes[mode], r.scalar(value or 0), *pad[: 2 * input.dim() - 2]]
    return r.emit(Kind.PAD, payload, result.shape)
