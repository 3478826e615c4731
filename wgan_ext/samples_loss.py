"""A module with the signature and the numbers of ``geomloss.SamplesLoss``, solved to a tolerance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ._checks import check_floating_tensor, check_number, check_type
from .sinkhorn import SinkhornResult, sinkhorn, sinkhorn_divergence

__all__ = ["SamplesLoss"]

Value = Tensor | tuple[Tensor, Tensor]


class SamplesLoss(nn.Module):
    """Sinkhorn divergence between weighted samples: a drop-in for ``geomloss.SamplesLoss(loss="sinkhorn")``.

    Feydy et al. 2019; Sejourne et al. 2019 for ``reach``. Called as ``loss(x, y)``, ``loss(a, x, b, y)`` or
    ``loss(labels_x, a, x, labels_y, b, y)``, whose labels GeomLoss needs for its clusters and which are ignored here.
    Points x, y have shapes (N, D), (M, D), or (B, N, D), (B, M, D); weights a, b shapes (N,), (M,), or (B, N), (B, M).
    Returns a value of shape () or (B,); with ``potentials=True`` the dual potentials, shaped like a and b and detached.

    The cost is |x-y| for ``p=1``, |x-y|^2 / 2 for ``p=2``, or ``cost(x, y)`` of batches of points, shape (B, N, M).
    The temperature is ``blur**p``, the weight of the penalties on the marginals ``reach**p``, and ``scaling``
    multiplies blur from iteration to iteration. Values are GeomLoss's at convergence, which its default ``scaling=0.5``
    stays about 10 % away from; here each solve goes on to the L1 marginal error ``tol``, or ``max_iter`` iterations
    with a warning.
    ``diameter``, ``truncate``, ``cluster_scale``, ``verbose`` and ``backend`` are accepted and need not be set.
    Differentiable twice, as :func:`wgan_ext.sinkhorn`.

    Raises NotImplementedError for other losses and kernels, ValueError and TypeError for wrong options and arguments.
    """

    def __init__(
        self,
        loss: str = "sinkhorn",
        p: int = 2,
        blur: float = 0.05,
        reach: float | None = None,
        diameter: float | None = None,
        scaling: float = 0.5,
        truncate: float | None = 5,
        cost: Callable[[Tensor, Tensor], Tensor] | None = None,
        kernel: Any = None,
        cluster_scale: float | None = None,
        debias: bool = True,
        potentials: bool = False,
        verbose: bool = False,
        backend: str = "auto",
        *,
        tol: float = 1e-3,
        max_iter: int = 1000,
    ) -> None:
        super().__init__()
        function = "SamplesLoss"
        check_type(function, "loss", loss, str, "a string")
        if loss != "sinkhorn" or kernel is not None:
            raise NotImplementedError(
                f'{function}: loss must be "sinkhorn", without a kernel, got {loss!r}; kernel norms are in geomloss'
            )
        if p not in (1, 2):
            raise ValueError(f"{function}: p must be 1 or 2, got {p!r}")
        for name, value in (("blur", blur), ("scaling", scaling), ("reach", 1.0 if reach is None else reach)):
            check_number(function, name, value)
            if not value > 0:
                raise ValueError(f"{function}: {name} must be positive, got {value}")
        if not scaling < 1:
            raise ValueError(f"{function}: scaling must be in (0, 1), got {scaling}")
        if cost is not None and not callable(cost):
            raise NotImplementedError(f"{function}: cost must be a function of x and y, got {cost!r}")
        self.loss, self.p, self.blur, self.reach, self.scaling, self.cost = loss, p, blur, reach, scaling, cost
        self.debias, self.potentials, self.tol, self.max_iter = debias, potentials, tol, max_iter

    def extra_repr(self) -> str:
        """The options that set the number."""
        return f"p={self.p}, blur={self.blur}, reach={self.reach}, debias={self.debias}, tol={self.tol}"

    def forward(self, *args: Any) -> Value:
        """Return the loss of (x, y), (a, x, b, y) or (labels_x, a, x, labels_y, b, y)."""
        a, x, b, y = _arguments(*args)
        if self.potentials:
            return self._potentials(a, x, b, y)
        if self.debias:
            return sinkhorn_divergence(x, y, a, b, **self._options())
        value = sinkhorn(x, y, a, b, **self._options()).value
        if self.reach is None:
            return value
        mass_a, mass_b = (1.0 if w is None else w.sum(-1) for w in (a, b))
        # GeomLoss counts the entropy of its unbalanced plan from the mean of the masses, not from their product.
        return value - self._epsilon * (mass_a * mass_b - (mass_a + mass_b) / 2)

    @property
    def _epsilon(self) -> float:
        return float(self.blur**self.p)

    def _options(self) -> dict[str, Any]:
        reach = self.reach
        cost: Any = self.cost
        if cost is not None:
            reach = None if reach is None else reach**self.p  # of a function, reach is the weight itself
        elif self.p == 1:
            cost = "euclidean"
        else:
            cost = "half_sqeuclidean"
            reach = None if reach is None else reach * 2**0.5  # whose half square is the weight
        return {
            "cost": cost if self.cost is None else _batch_cost(cost),
            "epsilon": self._epsilon,
            "reach": reach,
            "scaling": self.scaling**self.p,
            "tol": self.tol,
            "max_iter": self.max_iter,
        }

    def _potentials(self, a: Tensor | None, x: Tensor, b: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor]:
        def solve(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> SinkhornResult:
            return sinkhorn(x.detach(), y.detach(), a, b, **self._options())

        result = solve(x, y, a, b)
        if not self.debias:
            return result.f, result.g
        own_x, own_y = solve(x, x, a, a), solve(y, y, b, b)
        return result.f - (own_x.f + own_x.g) / 2, result.g - (own_y.f + own_y.g) / 2


def _arguments(*args: Any) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
    function = "SamplesLoss"
    if len(args) not in (2, 4, 6):
        raise ValueError(
            f"{function}: arguments must be (x, y), (a, x, b, y) or (labels_x, a, x, labels_y, b, y), got {len(args)}"
        )
    if len(args) == 2:
        a, b = None, None
        x, y = args
    else:
        a, x, b, y = args if len(args) == 4 else (*args[1:3], *args[4:])
    for name, t in (("x", x), ("y", y)):
        check_floating_tensor(function, name, t)
    return a, x, b, y


def _batch_cost(cost: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """GeomLoss's costs take and return batches."""

    def of_any(x: Tensor, y: Tensor) -> Tensor:
        return cost(x, y) if x.dim() == 3 else cost(x.unsqueeze(0), y.unsqueeze(0)).squeeze(0)

    return of_any
