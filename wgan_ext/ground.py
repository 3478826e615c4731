"""Ground costs of entropic transport: how each is said to the operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ._checks import accumulation_dtype

__all__ = ["Cost", "CostName", "Ground", "ground"]

CostName: TypeAlias = Literal["sqeuclidean", "half_sqeuclidean", "euclidean", "l1", "cosine", "dot"]
Cost: TypeAlias = CostName | float | Callable[[Tensor, Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


def _wide(x: Tensor) -> Tensor:
    """Half precision would round the results."""
    return x.to(accumulation_dtype(x.dtype))


def _halved(x: Tensor) -> Tensor:
    return _wide(x) * math.sqrt(0.5)


def _normalized(x: Tensor) -> Tensor:
    return _halved(torch.nn.functional.normalize(_wide(x), dim=-1))


class Ground(NamedTuple):
    """A cost C(x, y) = operator(points(x), points(y)) - offset(x) - offset(y)."""

    operator: str
    """"sqeuclidean", "euclidean", "l1" or "power": what the operators call it."""
    power: float
    """Of the distance."""
    points: Callable[[Tensor], Tensor]
    rho: Callable[[float], float]
    """The cost of a move over a distance: the weight of the penalty on a marginal from a reach."""
    offset: Callable[[Tensor], Tensor] | None = None
    """Shape of the points without their last dimension, float64; the potentials absorb it."""


_GROUNDS = {
    "sqeuclidean": Ground("sqeuclidean", 2.0, _same, lambda r: r * r),
    "half_sqeuclidean": Ground("sqeuclidean", 2.0, _halved, lambda r: r * r / 2),
    "euclidean": Ground("euclidean", 1.0, _same, lambda r: r),
    "l1": Ground("l1", 1.0, _same, lambda r: r),
    "cosine": Ground("sqeuclidean", 2.0, _normalized, lambda r: r),
    "dot": Ground("sqeuclidean", 2.0, _halved, lambda r: r, lambda x: _halved(x).double().square().sum(-1)),
}


def ground(function: str, cost: Any) -> Ground:
    """Return the ground cost of a name or a power of the distance; raise ValueError for others."""
    if isinstance(cost, (int, float)) and not isinstance(cost, bool):
        if not (cost > 0 and math.isfinite(cost)):
            raise ValueError(f"{function}: cost as a power of the distance must be positive and finite, got {cost}")
        if cost in (1, 2):
            return _GROUNDS["euclidean" if cost == 1 else "sqeuclidean"]
        power = float(cost)
        return Ground("power", power, _same, lambda r: r**power)
    if not isinstance(cost, str) or cost not in _GROUNDS:
        names = ", ".join(f'"{name}"' for name in _GROUNDS)
        raise ValueError(f"{function}: cost must be one of {names}, or a power of the distance, got {cost!r}")
    return _GROUNDS[cost]
