"""Entropic optimal transport between weighted clouds of points, and the Sinkhorn divergence.

No N x M matrix is formed: memory grows with N + M. The solver works in the log domain, follows epsilon from the mean
cost down to its target (Kosowsky and Yuille 1994; Schmitzer 2019), then over-relaxes with a factor read off its own
convergence (Thibault, Chizat, Dossal and Papadakis 2021), each relaxed update accepted only if the dual gains by it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from torch import Tensor

from . import _ops
from ._checks import check_device, check_floating_tensor, check_number, check_type

__all__ = ["SinkhornResult", "sinkhorn", "sinkhorn_divergence"]


@dataclasses.dataclass(frozen=True)
class SinkhornResult:
    """What a solve returns, as tensors on the device of the points: reading one in Python waits for the device."""

    value: Tensor
    """Shape (). <P, C> + epsilon KL(P | a x b) as the dual at f and g: a lower bound. Differentiable once."""
    f: Tensor
    """Shape (N,). Potential of x, in units of the cost; detached."""
    g: Tensor
    """Shape (M,). Potential of y. The plan is a_i b_j exp((f_i + g_j - C_ij) / epsilon)."""
    marginal_error: Tensor
    """Shape (). L1 distance of the plan's row sums from a, plus that of its column sums from b."""
    iterations: Tensor
    """Shape (), int64. One iteration updates f, then g."""
    converged: Tensor
    """Shape (), bool. marginal_error <= tol."""
    epsilon: Tensor
    """Shape (), float64. The temperature used."""


def sinkhorn(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    cost: Literal["sqeuclidean", "euclidean"] = "sqeuclidean",
    epsilon: float | None = None,
    scaling: float | None = 0.5,
    tol: float = 1e-3,
    max_iter: int = 1000,
    relaxation: float | Literal["auto"] = "auto",
    init: tuple[Tensor, Tensor] | None = None,
) -> SinkhornResult:
    """Entropic optimal transport cost of x, shape (N, D), with weights a, to y, shape (M, D), with weights b.

    ``a`` and ``b``, shapes (N,) and (M,), are not negative and have the same sum; 1/N and 1/M by default. ``cost`` is
    |x-y|^2 (no half) or |x-y|. ``epsilon`` is in units of the cost; by default 0.05 times the mean cost (for the
    Euclidean cost, times the root mean square distance), detached. ``scaling`` multiplies epsilon from iteration to
    iteration until the target; None starts there. The solve stops at the L1 marginal error ``tol``, or after
    ``max_iter`` iterations, with a warning on the CPU (on CUDA, read ``converged``); ``tol=0.0`` runs exactly
    ``max_iter``. ``relaxation`` is the factor of over-relaxation, 1.0 for none. ``init`` holds potentials (f, g) to
    start from, at the target epsilon.

    Computed in float64 for float64 points, else in float32. Differentiable once in x, y, a and b: the partial
    derivatives of the dual at the returned potentials (envelope theorem), those of the weights up to a constant.
    Deterministic, and the same for any number of threads.

    Raises ValueError for shapes, options, and (on the CPU) weights that are negative or of unequal sum and points that
    are not finite; TypeError for dtypes; NotImplementedError for a second derivative.
    """
    factor = _check("sinkhorn", x, y, a, b, epsilon, scaling, tol, max_iter, relaxation)
    if init is not None:
        check_type("sinkhorn", "init", init, (tuple, list), "a pair of tensors")
        if len(init) != 2:
            raise ValueError(f"sinkhorn: init must hold both potentials, f and g, got {len(init)} values")
        for name, potential in zip(("init f", "init g"), init, strict=True):
            check_floating_tensor("sinkhorn", name, potential)
            check_device("sinkhorn", name, potential, "x", x)
    f, g = (None, None) if init is None else init
    value, f, g, _, _, marginal_error, iterations, converged, used = _ops.sinkhorn(
        x, y, a, b, cost, epsilon, scaling, tol, max_iter, factor, f, g
    )
    return SinkhornResult(value, f, g, marginal_error, iterations, converged, used)


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    cost: Literal["sqeuclidean", "euclidean"] = "sqeuclidean",
    epsilon: float | None = None,
    scaling: float | None = 0.5,
    tol: float = 1e-3,
    max_iter: int = 1000,
    relaxation: float | Literal["auto"] = "auto",
) -> Tensor:
    """Debiased Sinkhorn divergence OT(x, y) - OT(x, x)/2 - OT(y, y)/2 (Feydy et al. 2019), shape ().

    Arguments, derivatives and errors are those of :func:`sinkhorn`; one epsilon serves the three terms. Zero bit for
    bit, gradient included, when the two clouds are equal; a cloud and its translate by t are |t|^2 apart (squared
    cost). It is not negative at convergence; stopped at ``tol`` it can fall below zero by the error of its terms.
    """
    factor = _check("sinkhorn_divergence", x, y, a, b, epsilon, scaling, tol, max_iter, relaxation)
    value: Tensor = _ops.sinkhorn_divergence(x, y, a, b, cost, epsilon, scaling, tol, max_iter, factor)[0]
    return value


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
