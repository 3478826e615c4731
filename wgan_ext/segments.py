"""Ragged batches: problems of unlike sizes, whose points lie one problem after the other and are cut by offsets."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from ._checks import check_type

__all__ = ["Offsets", "flattened", "integral"]

Offsets: TypeAlias = tuple[Tensor, Tensor] | None
"""Of x and y, shape (B + 1,), int64: problem p has the points from offsets[p] to offsets[p + 1]."""


def flattened(
    function: str, x: Any, y: Any, a: Any, b: Any, offsets: Any
) -> tuple[Any, Any, Any, Any, tuple[Tensor | None, Tensor | None]]:
    """Return x, y, a and b with their problems one after the other, and the offsets, on the CPU; (None, None): dense.

    What is no jagged tensor stays as it is. Raises TypeError and ValueError.
    """
    if any(isinstance(t, Tensor) and t.is_nested for t in (x, y)):
        if offsets is not None:
            raise ValueError(f"{function}: nested tensors bring their own offsets; leave offsets out")
        (x, offsets_x), (y, offsets_y) = _opened(function, "x", x, 3), _opened(function, "y", y, 3)
        offsets = offsets_x, offsets_y
        a, b = (
            _opened(function, name, w, 2)[0] if isinstance(w, Tensor) and w.is_nested else w
            for name, w in (("a", a), ("b", b))
        )
    if offsets is None:
        return x, y, a, b, (None, None)
    check_type(function, "offsets", offsets, (tuple, list), "a pair of tensors")
    if len(offsets) != 2:
        raise ValueError(f"{function}: offsets must be a pair, of x and of y, got {len(offsets)} values")
    for each in offsets:
        check_type(function, "offsets", each, Tensor, "a pair of tensors")
    return x, y, a, b, (offsets[0].cpu(), offsets[1].cpu())


def _opened(function: str, name: str, t: Any, dim: int) -> tuple[Tensor, Tensor]:
    """The values and offsets of a jagged tensor."""
    jagged = isinstance(t, Tensor) and t.is_nested and t.layout == torch.jagged
    if not jagged or t.dim() != dim or t._ragged_idx != 1 or t.lengths() is not None:
        came = f"{t.dim()} dimensions, {t.layout}" if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(
            f"{function}: {name} must be a contiguous nested tensor of layout torch.jagged with {dim} dimensions, the "
            f"second of them ragged, got {came}"
        )
    return t.values(), t.offsets()


def integral(values: Tensor, weights: Tensor | None, offsets: Tensor | None) -> Tensor:
    """Return the sum over the points, the last dimension, of values times weights (None: their mean), by problem."""
    if offsets is None:
        return values.mean(-1) if weights is None else (values * weights).sum(-1)
    weighted = values if weights is None else values * weights
    reduction = "mean" if weights is None else "sum"
    return torch.segment_reduce(weighted, reduction, offsets=offsets.to(values.device), axis=0, unsafe=True)
