"""Entropic optimal transport between weighted clouds of points, and the Sinkhorn divergence.

No N x M matrix is formed unless it is given or pays: memory grows with N + M. The solver works in the log domain,
follows epsilon from the mean cost down to its target (Kosowsky and Yuille 1994; Schmitzer 2019), then over-relaxes with
a factor read off its own convergence (Thibault, Chizat, Dossal and Papadakis 2021), each relaxed update accepted only
if the dual gains by it. Unbalanced problems (Chizat, Peyre, Schmitzer and Vialard 2018) also move the potentials
against each other, which is their slow mode.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import _ops
from ._checks import check_device, check_floating_tensor, check_number, check_type
from ._transforms import refuse_derivatives
from .ground import Cost, Ground, ground
from .segments import Offsets, flattened, integral
from .transport import MatrixPlan, PointPlan, TransportPlan

__all__ = ["SinkhornResult", "sinkhorn", "sinkhorn_divergence", "sinkhorn_matrix"]

Reach: TypeAlias = float | tuple[float | None, float | None] | None

MEMORY_LIMIT = 1 << 30
"""Bytes that a solve may take for a matrix of costs."""


@dataclasses.dataclass(frozen=True)
class SinkhornResult:
    """What a solve returns, as tensors on the device of the points: reading one in Python waits for the device.

    Shapes are those of one problem; a batch has its dimension in front of each. In a ragged batch f and g, like x and
    y, hold one problem after the other.
    """

    value: Tensor
    """Shape (). <P, C> + epsilon KL(P | a x b), and the penalties of an unbalanced problem, as the dual at f and g, a
    lower bound. Differentiable once."""
    f: Tensor
    """Shape (N,). Potential of x, in units of the cost; detached."""
    g: Tensor
    """Shape (M,). Potential of y. The plan is a_i b_j exp((f_i + g_j - C_ij) / epsilon)."""
    marginal_error: Tensor
    """Shape (). L1 distance of the plan's row sums from a, plus that of its column sums from b; for an unbalanced
    problem from a exp(-f / rho) and b exp(-g / rho)."""
    iterations: Tensor
    """Shape (), int64. One iteration updates f, then g."""
    converged: Tensor
    """Shape (), bool. marginal_error <= tol."""
    epsilon: Tensor
    """Shape (), float64. The temperature used."""
    plan: TransportPlan
    """The plan, never formed unless asked: ``plan @ values``, ``plan.T @ values``, ``plan.barycentric_map()``, ..."""


def sinkhorn(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    offsets: Offsets = None,
    cost: Cost = "sqeuclidean",
    epsilon: float | None = None,
    reach: Reach = None,
    scaling: float | None = 0.5,
    tol: float = 1e-3,
    max_iter: int = 1000,
    relaxation: float | Literal["auto"] = "auto",
    init: tuple[Tensor, Tensor] | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> SinkhornResult:
    """Entropic optimal transport cost of x, shape (N, D), with weights a, to y, shape (M, D), with weights b.

    Points of shapes (B, N, D) and (B, M, D) are a batch of B problems, solved in one call and stopped one by one.
    Clouds of unlike sizes make a ragged batch: all points of x one problem after the other, shape (sum of N, D), the
    same of y, and ``offsets``, a pair of int64 tensors of shape (B + 1,) that rise from 0 to the number of points:
    problem p has the points ``x[offsets[0][p]:offsets[0][p + 1]]``, and of y those of ``offsets[1]``. Weights,
    potentials and ``init`` then have shapes (sum of N,) and (sum of M,), and ``result.plan[p]`` is the plan of one
    problem. Offsets are read on the CPU: those of another device are copied there, which waits for it. Nested tensors
    of layout torch.jagged bring their own.

    ``a`` and ``b``, shapes (N,) and (M,), or (B, N) and (B, M), are not negative; 1/N and 1/M by default. ``cost`` is
    "sqeuclidean", |x-y|^2 (no half); "half_sqeuclidean"; "euclidean", |x-y|; "l1"; "cosine", 1 - cos(x, y); "dot",
    -x.y; a number p > 0 for |x-y|^p; or a function of x and y that returns the (B,) N x M matrix of costs.

    ``epsilon`` is in units of the cost; by default, detached, 0.05 times the magnitude of the mean cost ("dot": of
    "half_sqeuclidean"), for powers of the distance that of the cost at its root mean square, for "l1" that of the root
    mean square distance times sqrt(D). ``reach`` lets mass appear and vanish rather than move further:
    the marginals, instead of being kept, cost rho KL(P 1 | a) and rho KL(P^T 1 | b), where rho is the cost of a move
    over the distance ``reach`` (cosine and functions: rho is ``reach`` itself). A pair gives each side its own, and
    None in it keeps that side's marginal. Without reach both weights must have the same sum.

    ``scaling`` multiplies epsilon from iteration to iteration until the target; None starts there. The solve stops at
    the L1 marginal error ``tol``, or after ``max_iter`` iterations, with a warning on the CPU (on CUDA, read
    ``converged``); ``tol=0.0`` runs exactly ``max_iter``. ``relaxation`` is the factor of over-relaxation, 1.0 for
    none. ``init`` holds potentials (f, g) to start from, at the target epsilon. On the CPU the costs of points in 16
    dimensions and more are kept in a matrix if it takes no more than ``memory_limit`` bytes, which stay with the
    process for the next solve until ``wgan_ext.empty_cache()``; else they are computed again in every pass.

    Computed in float64 for float64 points, else in float32. Differentiable once in x, y, a and b: the partial
    derivatives of the dual at the returned potentials (envelope theorem), those of the weights up to a constant where
    the marginals are kept. Deterministic, and the same for any number of threads.

    Raises ValueError for shapes, options, and (on the CPU) weights that are negative or of unequal sum and points that
    are not finite; TypeError for dtypes; NotImplementedError for a second derivative, and for ``reach`` with "dot".
    """
    function = "sinkhorn"
    x, y, a, b, cuts = flattened(function, x, y, a, b, offsets)
    factor = _check(function, x, y, a, b, epsilon, scaling, tol, max_iter, relaxation, memory_limit)
    _check_init(function, init, x)
    f, g = (None, None) if init is None else init
    if callable(cost):
        _refuse_ragged(function, cuts)
        options = Options(epsilon, reach, scaling, tol, max_iter, factor)
        return _solve_matrix(function, _costs(function, cost, x, y), a, b, options, (f, g), (x.detach(), y.detach()))
    space = ground(function, cost)
    rho_x, rho_y = _rho(function, reach, space)
    a, b = _batch_weights(x, a), _batch_weights(y, b)
    absorbed = None if space.offset is None else (space.offset(x), space.offset(y))
    if absorbed is not None and f is not None and g is not None:
        _check_shape(function, "init f", f, absorbed[0].shape)
        _check_shape(function, "init g", g, absorbed[1].shape)
        f, g = f + absorbed[0].detach(), g + absorbed[1].detach()
    points = space.points(x), space.points(y)
    value, f, g, centred_f, centred_g, marginal_error, iterations, converged, used = _ops.sinkhorn(
        *points, a, b, space.operator, space.power, rho_x, rho_y, epsilon, scaling, tol, max_iter, factor, memory_limit,
        f, g, *cuts,
    )  # fmt: skip
    plan = PointPlan(
        points=(points[0].detach(), points[1].detach()),
        weights=(_detached(a), _detached(b)),
        centred=(centred_f, centred_g),
        potentials=(f, g),
        epsilon=used,
        ground=space,
        rho=(rho_x, rho_y),
        ends=(x.detach(), y.detach()),
        offsets=cuts,
    )
    if absorbed is not None:
        value = value - sum(integral(*each) for each in zip(absorbed, (a, b), cuts, strict=True))
        f, g = ((t - offset.detach()).to(t.dtype) for t, offset in zip((f, g), absorbed, strict=True))
    value = value.to(f.dtype)
    return SinkhornResult(value, f, g, marginal_error, iterations, converged, used, plan)


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    offsets: Offsets = None,
    cost: Cost = "sqeuclidean",
    epsilon: float | None = None,
    reach: Reach = None,
    scaling: float | None = 0.5,
    tol: float = 1e-3,
    max_iter: int = 1000,
    relaxation: float | Literal["auto"] = "auto",
    memory_limit: int = MEMORY_LIMIT,
) -> Tensor:
    """Debiased Sinkhorn divergence OT(x, y) - OT(x, x)/2 - OT(y, y)/2 (Feydy et al. 2019), shape () or (B,).

    Arguments, derivatives and errors are those of :func:`sinkhorn`; one epsilon serves the three terms, and must be
    given where the cost is a function. With ``reach`` it includes epsilon/2 (sum of a - sum of b)^2 (Sejourne et al.
    2019). Zero bit for bit when the two clouds are equal, and so is its gradient, but for a cost given by a function,
    whose gradient vanishes to ``tol``. A cloud and its translate by t are |t|^2 apart (squared cost, balanced). It is
    not negative at convergence; stopped at ``tol`` it can fall below zero by the error of its terms.
    """
    function = "sinkhorn_divergence"
    x, y, a, b, cuts = flattened(function, x, y, a, b, offsets)
    factor = _check(function, x, y, a, b, epsilon, scaling, tol, max_iter, relaxation, memory_limit)
    if callable(cost):
        _refuse_ragged(function, cuts)
        if epsilon is None:
            raise ValueError(f"{function}: a cost given by a function needs an epsilon, one for the three terms")

        def value_of(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, reach: Reach) -> Tensor:
            options = Options(epsilon, reach, scaling, tol, max_iter, factor)
            return _solve_matrix(function, _costs(function, cost, x, y), a, b, options).value

        side_x, side_y = reach if isinstance(reach, tuple) and len(reach) == 2 else (reach, reach)
        total = value_of(x, y, a, b, reach) - (value_of(x, x, a, a, side_x) + value_of(y, y, b, b, side_y)) / 2
        if reach is not None:
            mass_a, mass_b = (1.0 if w is None else w.sum(-1) for w in (a, b))
            total = total + epsilon / 2 * (mass_a - mass_b) ** 2
        return total
    space = ground(function, cost)
    rho_x, rho_y = _rho(function, reach, space)
    value: Tensor = _ops.sinkhorn_divergence(
        space.points(x), space.points(y), _batch_weights(x, a), _batch_weights(y, b), space.operator, space.power,
        rho_x, rho_y, epsilon, scaling, tol, max_iter, factor, memory_limit, *cuts,
    )[0]  # fmt: skip
    return value


def sinkhorn_matrix(
    C: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float | None = None,
    reach: Reach = None,
    scaling: float | None = 0.5,
    tol: float = 1e-3,
    max_iter: int = 1000,
    relaxation: float | Literal["auto"] = "auto",
    init: tuple[Tensor, Tensor] | None = None,
    targets: Tensor | None = None,
) -> SinkhornResult:
    """Entropic optimal transport for given costs C, shape (N, M), or (B, N, M) for a batch.

    The other arguments, the result and the errors are those of :func:`sinkhorn`; ``reach`` is the weight rho of the
    penalties itself. C must be finite: a large cost stands for a forbidden move. ``targets``, shape (M, D), are the
    points that ``plan.barycentric_map()`` averages. Differentiable once in C, whose gradient is the plan, a and b.
    """
    function = "sinkhorn_matrix"
    check_floating_tensor(function, "C", C)
    factor = _check_options(function, epsilon, scaling, tol, max_iter, relaxation)
    for name, weight in (("a", a), ("b", b)):
        if weight is not None:
            check_floating_tensor(function, name, weight)
            check_device(function, name, weight, "C", C)
    _check_init(function, init, C)
    f, g = (None, None) if init is None else init
    if targets is not None:
        check_floating_tensor(function, "targets", targets)
        check_device(function, "targets", targets, "C", C)
        if C.dim() >= 2 and targets.shape[:-1] != (*C.shape[:-2], C.shape[-1]):
            raise ValueError(
                f"{function}: targets must be the points of the columns of C, whose shape is {list(C.shape)}, got "
                f"{list(targets.shape)}"
            )
    options = Options(epsilon, reach, scaling, tol, max_iter, factor)
    return _solve_matrix(function, C, a, b, options, (f, g), (None, _detached(targets)))


class Options(NamedTuple):
    """Of the solve of a matrix, checked."""

    epsilon: float | None
    reach: Reach
    scaling: float | None
    tol: float
    max_iter: int
    relaxation: float | None


def _solve_matrix(
    function: str,
    C: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    options: Options,
    init: tuple[Tensor | None, Tensor | None] = (None, None),
    ends: tuple[Tensor | None, Tensor | None] = (None, None),
) -> SinkhornResult:
    rho_x, rho_y = _rho(function, options.reach, None)
    a, b = _batch_weights(C, a), _batch_weights(C, b)
    value, f, g, marginal_error, iterations, converged, used = _ops.sinkhorn_matrix(
        C, a, b, rho_x, rho_y, options.epsilon, options.scaling, options.tol, options.max_iter, options.relaxation,
        *init,
    )  # fmt: skip
    plan = MatrixPlan(
        costs=C.detach(), weights=(_detached(a), _detached(b)), potentials=(f, g), epsilon=used, ends=ends
    )
    return SinkhornResult(value, f, g, marginal_error, iterations, converged, used, plan)


def _costs(function: str, cost: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    C = cost(x, y)
    check_floating_tensor(function, "the result of cost", C)
    check_device(function, "the result of cost", C, "x", x)
    _check_shape(function, "the result of cost", C, torch.Size((*x.shape[:-1], y.shape[-2])))
    return C


def _check_shape(function: str, name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{function}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")


def _rho(function: str, reach: Reach, space: Ground | None) -> tuple[float | None, float | None]:
    """Return the weights of the penalties on the marginals of x and y; None keeps a marginal."""
    if isinstance(reach, tuple) and len(reach) != 2:
        raise ValueError(f"{function}: reach must be a number or a pair, got {len(reach)} values")
    pair = reach if isinstance(reach, tuple) else (reach, reach)
    weights: list[float | None] = []
    for one in pair:
        if one is None:
            weights.append(None)
            continue
        check_number(function, "reach", one)
        if not (one > 0 and math.isfinite(one)):
            raise ValueError(f"{function}: reach must be positive and finite, or None, got {one}")
        weights.append(float(one if space is None else space.rho(one)))
    if space is not None and space.offset is not None and weights != [None, None]:
        raise NotImplementedError(
            f'{function}: cost "dot" is implemented for balanced transport only; leave reach out, or give a function'
        )
    return weights[0], weights[1]


def _batch_weights(points: Tensor, weights: Tensor | None) -> Tensor | None:
    """Weights of one problem serve all of a batch."""
    if weights is not None and points.dim() == 3 and weights.dim() == 1:
        return weights.expand(points.shape[0], -1)
    return weights


def _detached(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


def _refuse_ragged(function: str, offsets: tuple[Tensor | None, Tensor | None]) -> None:
    if offsets[0] is not None:
        raise NotImplementedError(
            f"{function}: a cost given by a function is not implemented for ragged batches; name the cost, or solve "
            "the problems one by one"
        )


def _check(
    function: str,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    epsilon: float | None,
    scaling: float | None,
    tol: float,
    max_iter: int,
    relaxation: Any,
    memory_limit: Any,
) -> float | None:
    """Check types and devices; csrc checks dtypes (after autocast), shapes and values. None for a relaxation of "auto".

    A tensor on the meta device would lead the dispatcher past the checks in csrc.
    """
    check_floating_tensor(function, "x", x)
    check_floating_tensor(function, "y", y)
    check_device(function, "y", y, "x", x)
    for name, weight in (("a", a), ("b", b)):
        if weight is not None:
            check_floating_tensor(function, name, weight)
            check_device(function, name, weight, "x", x)
    check_type(function, "memory_limit", memory_limit, int, "an integer")
    return _check_options(function, epsilon, scaling, tol, max_iter, relaxation)


def _check_options(
    function: str, epsilon: float | None, scaling: float | None, tol: float, max_iter: int, relaxation: Any
) -> float | None:
    if not torch.compiler.is_compiling():
        refuse_derivatives(function)
    for name, value in (("epsilon", epsilon), ("scaling", scaling), ("tol", tol)):
        if value is not None or name == "tol":
            check_number(function, name, value)
    check_type(function, "max_iter", max_iter, int, "an integer")
    if relaxation == "auto":
        return None
    if isinstance(relaxation, str):
        raise ValueError(f'{function}: relaxation must be "auto" or in [1, 2), got {relaxation!r}')
    check_number(function, "relaxation", relaxation)
    factor: float = relaxation
    return factor


def _check_init(function: str, init: Any, x: Tensor) -> None:
    if init is None:
        return
    check_type(function, "init", init, (tuple, list), "a pair of tensors")
    if len(init) != 2:
        raise ValueError(f"{function}: init must hold both potentials, f and g, got {len(init)} values")
    for name, potential in zip(("init f", "init g"), init, strict=True):
        check_floating_tensor(function, name, potential)
        check_device(function, name, potential, "x", x)
