"""The plan of an entropic transport problem, applied without being formed."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from . import _ops
from ._checks import check_device, check_floating_tensor
from .ground import Ground

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MatrixPlan", "PointPlan", "TransportPlan"]

BLOCK_BYTES = 1 << 26
"""Of a block of rows, where a method goes through the plan in blocks."""


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class TransportPlan(abc.ABC):
    """The plan P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon) of a solve, shape (N, M), or (B, N, M) for a batch.

    That of a ragged batch has the shape (sum of N, sum of M), the plans of its problems on its diagonal. ``plan[i]`` is
    the plan of one problem of a batch.

    Its entries are computed as they are used, in memory that grows with N + M. All is detached from the points, costs
    and weights of the solve.
    """

    weights: tuple[Tensor | None, Tensor | None]
    """Of x and y, shapes (N,) and (M,); None: uniform."""
    potentials: tuple[Tensor, Tensor]
    """f and g, shapes (N,) and (M,), of the costs without their ground's offsets."""
    epsilon: Tensor
    """Shape ()."""
    ends: tuple[Tensor | None, Tensor | None]
    """The points that mass is moved from and to, shapes (N, D) and (M, D), where they are known."""
    _tensors: ClassVar[tuple[str, ...]] = ("weights", "potentials", "ends")
    _pairs: ClassVar[tuple[str, ...]] = _tensors

    @property
    def shape(self) -> torch.Size:
        """(N, M), or (B, N, M)."""
        return torch.Size((*self.potentials[0].shape, self.potentials[1].shape[-1]))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, device={str(self.epsilon.device)!r})"

    @property
    def T(self) -> Self:  # noqa: N802  # as a tensor's
        """The plan from y to x, shape (M, N)."""
        changes: dict[str, Any] = {name: getattr(self, name)[::-1] for name in self._pairs}
        return dataclasses.replace(self, **changes)

    def __getitem__(self, problem: int) -> Self:
        """The plan of one problem of a batch."""
        if self.epsilon.dim() == 0:
            raise TypeError("TransportPlan: this is the plan of one problem, which has no problems to choose from")
        problem = range(self.epsilon.shape[0])[problem]
        changes: dict[str, Any] = {}
        for name in self._tensors:
            x, y = getattr(self, name)
            changes[name] = self._part(problem, 0, x), self._part(problem, 1, y)
        return dataclasses.replace(self, epsilon=self.epsilon[problem], **changes)

    def __matmul__(self, values: Tensor) -> Tensor:
        """P times values: see :meth:`times`."""
        return self.times(values)

    def times(self, values: Tensor) -> Tensor:
        """P times values, shape (M,) or (M, K), for a batch (B, M) or (B, M, K); differentiable in them.

        For a ragged batch shapes are (sum of M,) or (sum of M, K).

        ``plan @ values`` is the same, but torch.compile knows no operators of classes.
        """
        check_floating_tensor("TransportPlan", "values", values)
        check_device("TransportPlan", "values", values, "the points", self.epsilon)
        columns = self.potentials[1].shape
        vector = values.shape == columns
        if not vector and values.shape[:-1] != columns:
            raise ValueError(
                f"TransportPlan: values must have shape {tuple(columns)}, or one more dimension, got "
                f"{tuple(values.shape)}"
            )
        matrix = values.unsqueeze(-1) if vector else values
        product = self._product(matrix) if matrix.shape[-1] else matrix.new_zeros(*self.shape[:-1], 0)
        return product.squeeze(-1) if vector else product

    def sum(self, dim: int) -> Tensor:
        """The plan's marginal: row sums, shape (N,), for dim -1; column sums, shape (M,), for dim -2."""
        if dim not in (-1, -2):
            raise ValueError(f"TransportPlan: dim must be -1 or -2, got {dim}")
        plan = self if dim == -1 else self.T
        return plan.times(torch.ones_like(plan.potentials[1]))

    def rows(self, begin: int, end: int) -> Tensor:
        """The entries of the rows from begin to end, shape (end - begin, M), by way of float64."""
        self._refuse_ragged("rows")
        if not 0 <= begin < end <= self.shape[-2]:
            raise ValueError(f"TransportPlan: rows must be a range within 0 and {self.shape[-2]}, got {begin}, {end}")
        f, g = (t.double() for t in self._balanced())
        exponents = f[..., begin:end, None] + g[..., None, :] - self._cost_rows(begin, end)
        plan = exponents.div_(self.epsilon[..., None, None]).exp_()
        a, b = self.weights
        plan *= 1 / self.shape[-2] if a is None else a[..., begin:end, None].double()
        plan *= 1 / self.shape[-1] if b is None else b[..., None, :].double()
        return plan.to(self.potentials[0].dtype)

    def dense(self, limit: int = 1 << 28) -> Tensor:
        """The matrix, shape (N, M); ValueError if it has more than ``limit`` entries."""
        self._refuse_ragged("dense")
        if self.shape.numel() > limit:
            raise ValueError(
                f"TransportPlan: the matrix has {self.shape.numel()} entries, more than the limit of {limit}; take "
                "rows or plan @ values, or raise limit"
            )
        return torch.cat(list(self._blocks()), -2)

    def barycentric_map(self) -> Tensor:
        """Where the plan sends each point of x on average: (P @ y) / (P @ 1), shape (N, D)."""
        y = self.ends[1]
        if y is None:
            raise ValueError("TransportPlan: barycentric_map needs points; give sinkhorn_matrix the targets")
        dtype = self.potentials[0].dtype
        values = torch.cat([y, torch.ones_like(y[..., :1])], -1).to(dtype)
        plan, weight = self, self.weights[0]
        if weight is not None:
            # A row's weight cancels, but 0 / 0 would not: a weight this small moves no mean, and its row can be summed.
            least = weight.amax(-1, keepdim=True) * torch.finfo(dtype).tiny ** 0.5
            plan = dataclasses.replace(self, weights=(torch.maximum(weight, least.to(weight.dtype)), self.weights[1]))
        sums = plan.times(values)
        return sums[..., :-1] / sums[..., -1:]

    def argmax(self) -> Tensor:
        """The column of the largest entry of each row, shape (N,), int64: a hard assignment."""
        self._refuse_ragged("argmax")
        return torch.cat([block.argmax(-1) for block in self._blocks()], -1)

    def potential(self, points: Tensor) -> Tensor:
        """The potential f at new points, shape (K, D), or (B, K, D): shape (K,), differentiable once in the points.

        -epsilon log sum_j b_j exp((g_j - C(x, y_j)) / epsilon), where a marginal is penalised times rho / (rho +
        epsilon): f itself at the points of x, at convergence. ``plan.T.potential(points)`` is that of g.

        Raises NotImplementedError for the plan of a matrix of costs, which says nothing of new points.
        """
        raise NotImplementedError("TransportPlan: a matrix of costs says nothing of new points")

    def _blocks(self) -> Iterator[Tensor]:
        size = max(1, BLOCK_BYTES // (8 * self.shape[:-2].numel() * self.shape[-1]))
        for begin in range(0, self.shape[-2], size):
            yield self.rows(begin, min(begin + size, self.shape[-2]))

    def _part(self, problem: int, side: int, t: Tensor | None) -> Tensor | None:
        """One problem's part of a side's tensor."""
        return None if t is None else t[problem]

    def _refuse_ragged(self, method: str) -> None:  # noqa: B027  # most plans have no ragged batches
        """Raise NotImplementedError for the plan of a ragged batch."""

    @abc.abstractmethod
    def _product(self, values: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def _cost_rows(self, begin: int, end: int) -> Tensor:
        """Costs in float64, to which the potentials of ``_balanced`` belong."""

    def _balanced(self) -> tuple[Tensor, Tensor]:
        return self.potentials


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class PointPlan(TransportPlan):
    """The plan between clouds of points."""

    points: tuple[Tensor, Tensor]
    """As the operators take them: ``ground.points`` of the ends."""
    centred: tuple[Tensor, Tensor]
    """The potentials of the problem whose clouds are centred."""
    ground: Ground
    rho: tuple[float | None, float | None]
    """Weights of the penalties on the marginals; None where they are kept."""
    offsets: tuple[Tensor | None, Tensor | None] = (None, None)
    """Where the problems of a ragged batch begin and end, shape (B + 1,), on the CPU."""

    _tensors: ClassVar[tuple[str, ...]] = (*TransportPlan._tensors, "points", "centred")
    _pairs: ClassVar[tuple[str, ...]] = (*_tensors, "rho", "offsets")

    def __getitem__(self, problem: int) -> Self:
        """See :meth:`TransportPlan.__getitem__`."""
        return dataclasses.replace(super().__getitem__(problem), offsets=(None, None))

    def potential(self, points: Tensor) -> Tensor:
        """See :meth:`TransportPlan.potential`."""
        self._refuse_ragged("potential")
        check_floating_tensor("TransportPlan", "points", points)
        check_device("TransportPlan", "points", points, "the plan's points", self.epsilon)
        y, mapped = self.points[1], self.ground.points(points)
        if mapped.dtype != y.dtype:
            raise TypeError(f"TransportPlan: points must have the dtype of the plan's ({y.dtype}), got {points.dtype}")
        if points.dim() != y.dim() or (*points.shape[:-2], points.shape[-1]) != (*y.shape[:-2], y.shape[-1]):
            raise ValueError(
                f"TransportPlan: points must have the batch and the dimension of the plan's, whose shape is "
                f"{list(y.shape)}, got {list(points.shape)}"
            )
        softmin: Tensor = _ops.sinkhorn_softmin(
            mapped, self.points[1], self.weights[1], self.potentials[1], self.epsilon,
            self.ground.operator, self.ground.power,
        )  # fmt: skip
        rho = self.rho[0]
        if rho is not None:
            softmin = softmin * (rho / (rho + self.epsilon)).unsqueeze(-1).to(softmin.dtype)
        return softmin if self.ground.offset is None else softmin - self.ground.offset(points).to(softmin.dtype)

    def _product(self, values: Tensor) -> Tensor:
        product: Tensor = _ops.sinkhorn_transport(
            values, *self.points, *self.weights, *self.centred, self.epsilon, self.ground.operator, self.ground.power,
            *self.rho, *self.offsets,
        )  # fmt: skip
        return product

    def _part(self, problem: int, side: int, t: Tensor | None) -> Tensor | None:
        offsets = self.offsets[side]
        if offsets is None or t is None:
            return super()._part(problem, side, t)
        begin, end = offsets[problem : problem + 2].tolist()
        return t[begin:end]

    def _refuse_ragged(self, method: str) -> None:
        if self.offsets[0] is not None:
            raise NotImplementedError(
                f"TransportPlan: {method} of a ragged batch is not implemented; take plan[i].{method}"
            )

    def _balanced(self) -> tuple[Tensor, Tensor]:
        return self.centred

    def _cost_rows(self, begin: int, end: int) -> Tensor:
        x, y = (t.double() for t in self.points)
        means = [_mean(points, weight) for points, weight in zip((x, y), self.weights, strict=True)]
        operator = self.ground.operator
        if operator != "sqeuclidean" or self.rho != (None, None):
            means = [(means[0] + means[1]) / 2] * 2
        x, y = (x - means[0])[..., begin:end, :], y - means[1]
        if operator == "l1":
            return torch.cdist(x, y, 1.0)
        if operator == "sqeuclidean":
            return x.square().sum(-1)[..., None] + y.square().sum(-1)[..., None, :] - 2 * x @ y.mT
        distance = torch.cdist(x, y)
        return distance if operator == "euclidean" else distance**self.ground.power


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class MatrixPlan(TransportPlan):
    """The plan of given costs."""

    costs: Tensor

    @property
    def T(self) -> Self:  # noqa: N802
        """The plan from y to x, shape (M, N)."""
        return dataclasses.replace(super().T, costs=self.costs.mT)

    def __getitem__(self, problem: int) -> Self:
        """See :meth:`TransportPlan.__getitem__`."""
        return dataclasses.replace(super().__getitem__(problem), costs=self.costs[problem])

    def _product(self, values: Tensor) -> Tensor:
        dtype = torch.promote_types(self.potentials[0].dtype, values.dtype)
        wide = values.to(dtype)
        return torch.cat([block.to(dtype) @ wide for block in self._blocks()], -2).to(values.dtype)

    def _cost_rows(self, begin: int, end: int) -> Tensor:
        return self.costs[..., begin:end, :].double()


def _mean(points: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return points.mean(-2, keepdim=True)
    w = weight.double().unsqueeze(-1)
    return (points * w).sum(-2, keepdim=True) / w.sum(-2, keepdim=True)
