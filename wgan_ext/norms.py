"""Singular values of layers as operators, by Lanczos' method, and as matrices.

Golub and Kahan, Calculating the singular values and pseudo-inverse of a matrix (1965); restarts as in Wu and Simon,
Thick-restart Lanczos method for large symmetric eigenvalue problems (2000).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._checks import accumulation_dtype, check_count, check_module, check_number, check_type
from .operators import LayerMap, Matrix, effective_weight, map_of, matrix_of, output_dim

__all__ = ["operator_norm", "singular_values"]

_BASIS, _KEPT = 48, 16  # vectors of a basis, and how many of them a restart keeps; more for large blocks
_LEAST = 24  # iterations, so that a start that happens to have little of a vector does not pass over it


class Singular(NamedTuple):
    """Largest singular values of a map, with their vectors and what finding them took."""

    values: Tensor
    """[k], float64, descending."""
    left: Tensor
    """[k, *output_shape], unit vectors."""
    right: Tensor
    """[k, *input_shape]"""
    applications: int
    """Of the map and its adjoint, one vector each."""
    converged: bool


def largest_singular(
    layer: LayerMap,
    weight: Tensor,
    k: int = 1,
    tol: float = 1e-6,
    max_iter: int = 1000,
    generator: torch.Generator | None = None,
) -> Singular:
    """The k largest singular values of a map with this weight, in float64."""
    with torch.no_grad():
        weight = weight.detach().double()
        scale = power_of_two(weight)
        weight = weight / scale  # squares must neither overflow nor vanish
        shape, other = layer.input_shape, layer.output_shape
        tall = math.prod(other) > math.prod(shape)  # work on the shorter side
        near, far = (shape, other) if tall else (other, shape)
        there, back = (layer.apply, layer.adjoint) if tall else (layer.adjoint, layer.apply)

        def gram(x: Tensor) -> Tensor:
            return back(weight, there(weight, x.view(-1, *near))).flatten(1)

        n = math.prod(near)
        k = min(k, n)
        device = generator.device if generator is not None else weight.device
        # one vector more than asked for, or two values that are close would be taken for one between them
        block = min(k + 1, n)
        start = torch.randn(block, n, dtype=torch.float64, generator=generator, device=device).to(weight.device)
        _, vectors, applications, converged = lanczos(gram, start, k, tol, max_iter)
        vectors = vectors.view(-1, *near)
        images = there(weight, vectors)
        # |A v| has the square of the error of v
        values = torch.linalg.vector_norm(images.flatten(1), dim=1)
        order = values.argsort(descending=True)
        values, vectors, images = values[order], vectors[order], images[order]
        images = images / values.clamp_min(torch.finfo(values.dtype).tiny).view(-1, *(1,) * len(far))
        left, right = (images, vectors) if tall else (vectors, images)
        return Singular(values * scale, left, right, applications, converged)


def power_of_two(weight: Tensor) -> float:
    """A power of two next to the largest element."""
    largest = float(weight.detach().abs().max()) if weight.numel() else 0.0
    return 2.0 ** math.frexp(largest)[1] if 0 < largest < math.inf else 1.0


def lanczos(
    gram: Callable[[Tensor], Tensor], start: Tensor, k: int, tol: float, max_iter: int
) -> tuple[Tensor, Tensor, int, bool]:
    """The k largest eigenvalues of a Hermitian positive semidefinite gram, vectors [k, n], applications, convergence.

    A block of as many vectors as there are rows of ``start`` is taken through gram, made orthogonal to all before, and
    added to the basis Q; the eigenvalues are those of T = Q gram Q^H. With X the vectors to the i largest of these, R =
    gram X - X diag, and all others of gram below the (i+1)st, no eigenvalue is wrong by more than |R|^2 / (gap between
    the ith and the next), for any i >= k (Davis and Kahan), nor by more than |R|: tol is compared with the least of
    these bounds. The one assumption, that nothing large hides outside of the basis, holds almost surely for a random
    start.
    """
    p, n = start.shape
    size = min(n, max(_BASIS, 3 * p + _KEPT))
    kept = max(_KEPT, p)
    Q = start.new_empty(size, n)
    T = start.new_zeros(size, size)
    block, _ = _orthonormal(start)
    count, iterations = 0, 0
    while True:
        Q[count : count + p] = block
        end = count + p
        W = gram(block)
        iterations += 1
        H = W @ Q[:end].mH
        W = W - H @ Q[:end]
        again = W @ Q[:end].mH  # once is not enough in floating point
        W = W - again @ Q[:end]
        H = H + again
        T[:end, count:end] = H.T
        T[count:end, :end] = H.conj()
        block, R = _orthonormal(W)
        theta, S = torch.linalg.eigh((T[:end, :end] + T[:end, :end].mH) / 2)
        theta, S = theta.flip(0), S.flip(1)
        residuals = torch.linalg.vector_norm(R @ S[count:end], dim=0)
        found = max(iterations * p, end) >= min(n, _LEAST * p) and _is_converged(theta, residuals, k, tol)
        if found or iterations * p >= max_iter or end == n:
            break
        if end + p > size:
            if size == n:
                block, p = block[: n - end], n - end  # the last of the space
            else:
                Q[:kept] = S[:, :kept].T @ Q[:end]
                T.zero_()
                T[:kept, :kept] = torch.diag(theta[:kept]).to(T.dtype)
                end = kept
        block = block - (block @ Q[:end].mH) @ Q[:end]  # where W was nearly 0, its directions were rounding
        block, _ = _orthonormal(block)
        count = end
    return theta[:k], S[:, :k].T @ Q[:end], iterations * start.shape[0], found or end == n


def _orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows U and R with rows = R^T U."""
    columns, R = torch.linalg.qr(rows.T)
    return columns.T, R


def _is_converged(theta: Tensor, residuals: Tensor, k: int, tol: float) -> bool:
    demand = 2 * tol * theta[k - 1] + torch.finfo(theta.dtype).eps * theta[0]  # eigenvalues are squares
    squares = residuals.square().cumsum(0)
    bounds = [squares[k - 1 : k].sqrt(), squares[k - 1 : -1] / (theta[k - 1 : -1] - theta[k:])]
    return bool((torch.cat(bounds).nan_to_num(math.inf) <= demand).any())


def operator_norm(
    module: nn.Module,
    input_shape: Sequence[int] | None = None,
    *,
    tol: float = 1e-6,
    max_iter: int = 1000,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The norm of a layer as an operator: how much it lengthens the differences of inputs at most, in the 2-norm.

    For a convolution this is not the norm of its reshaped weight, by which ``spectral_norm`` divides: that is at least
    1 / sqrt(kernel size) of it, and at most, for unit stride and up to the border, sqrt(kernel size) times as large.
    The bias plays no part. Computed in float64 by Lanczos' method on the layer and its adjoint, in some 25 to 70
    iterations on two vectors. The value is |A v| / |v| for a vector v, so it is never too large, up to rounding;
    ``operator_norm_bound`` is never too small.

    A normalized or otherwise computed weight is taken as in evaluation: nothing advances its power iterations. The
    result can be differentiated once, with respect to the weight and what the weight is computed from: d sigma =
    <u, A(dW) v>. Where the largest singular value is multiple, that is one of the subgradients.

    Args:
        module: A Linear, Conv1d, 2d or 3d, or ConvTranspose1d, 2d or 3d, of any stride, padding, padding mode,
            dilation, groups and output padding.
        input_shape: (channels, *spatial) of the inputs of a convolution, without a batch; a linear layer needs none.
        tol: The relative error to stop at, by a residual bound; presumes that a random start has some of each vector.
        max_iter: The most applications of the layer and its adjoint, each.
        generator: For the start; torch's global one if None.

    Returns:
        Shape (), float64 for a float64 weight, else float32.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range, the input does not fit the layer, or the
            weight is not finite.
        NotImplementedError: from the derivative of the derivative.

    Warns:
        RuntimeWarning: ``max_iter`` was reached before ``tol``.
    """
    function = "operator_norm"
    check_module(function, "module", module)
    layer = map_of(function, module, input_shape)
    weight = finite_weight(function, module)
    found = _found(function, layer, weight, 1, tol, max_iter, generator)
    if weight.requires_grad and torch.is_grad_enabled():
        return _Sigma.apply(weight, layer, found.left, found.right, found.values[0])  # type: ignore[no-untyped-call, no-any-return]
    return found.values[0].to(accumulation_dtype(weight.dtype))


def singular_values(
    module: nn.Module,
    k: int = 1,
    input_shape: Sequence[int] | None = None,
    *,
    name: str = "weight",
    tol: float = 1e-6,
    max_iter: int = 1000,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The k largest singular values of a layer, for logs; not differentiable.

    With ``input_shape`` they are those of the layer as an operator, as in ``operator_norm``; without, those of its
    weight reshaped to a matrix, as ``spectral_norm`` sees it. Values of any multiplicity are found, since the method
    works on blocks of k vectors.

    Args:
        module: With ``input_shape`` a layer as for ``operator_norm``, else any with a parameter of this name.
        k: How many; no more than the matrix or the operator has.
        input_shape: (channels, *spatial), without a batch.
        name: The parameter.
        tol: The relative error of each value to stop at.
        max_iter: The most applications to one vector.
        generator: As in ``operator_norm``.

    Returns:
        [k], descending, float64 for a float64 weight, else float32.

    Raises:
        TypeError, ValueError: as in ``operator_norm``, or there are no k singular values.
        AttributeError: the module has no such parameter.

    Warns:
        RuntimeWarning: ``max_iter`` was reached before ``tol``.
    """
    function = "singular_values"
    check_module(function, "module", module)
    check_count(function, "k", k)
    weight = finite_weight(function, module, name).detach()
    if input_shape is None:
        weight = matrix_of(weight, output_dim(module))
        layer: LayerMap = Matrix(*weight.shape)
    else:
        layer = map_of(function, module, input_shape)
    if k > min(math.prod(layer.input_shape), math.prod(layer.output_shape)):
        raise ValueError(f"{function}: k must be at most the number of singular values, got {k}")
    return _found(function, layer, weight, k, tol, max_iter, generator).values.to(accumulation_dtype(weight.dtype))


def finite_weight(function: str, module: nn.Module, name: str = "weight") -> Tensor:
    """The weight of a module in evaluation; raises unless it is floating-point and finite."""
    weight = effective_weight(module, name)
    if not weight.is_floating_point():
        raise TypeError(f"{function}: the weight must be a floating-point tensor, got {weight.dtype}")
    if not weight.isfinite().all():
        raise ValueError(f"{function}: the weight must be finite, got a weight with NaN or infinity")
    return weight


def _found(
    function: str,
    layer: LayerMap,
    weight: Tensor,
    k: int,
    tol: float,
    max_iter: int,
    generator: torch.Generator | None,
) -> Singular:
    check_number(function, "tol", tol)
    if not 0 < tol < 1:
        raise ValueError(f"{function}: tol must be between 0 and 1, got {tol}")
    check_count(function, "max_iter", max_iter)
    check_type(function, "generator", generator, (torch.Generator, type(None)), "a torch.Generator")
    found = largest_singular(layer, weight, k, tol, max_iter * k, generator)
    if not found.converged:
        warnings.warn(f"{function}: max_iter={max_iter} was reached before tol={tol}", RuntimeWarning, stacklevel=3)
    return found


class _Sigma(torch.autograd.Function):
    """The largest singular value, whose derivative by the weight is that of <u, A v> at constant u and v."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, layer: LayerMap, left: Tensor, right: Tensor, value: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(weight, left, right)
        return value.to(accumulation_dtype(weight.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, left, right = ctx.saved_tensors
        with torch.enable_grad():
            copy = weight.detach().double().requires_grad_()
            inner = (left * ctx.layer.apply(copy, right)).sum()
            (derivative,) = torch.autograd.grad(inner, copy)
        return _Once.apply(grad, weight, derivative.to(weight.dtype)), None, None, None, None  # type: ignore[no-untyped-call]


class _Once(torch.autograd.Function):
    """A derivative that refuses to be differentiated: u and v change with the weight."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, derivative: Tensor) -> Tensor:
        return (grad * derivative).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError("operator_norm: the derivative cannot be differentiated")
