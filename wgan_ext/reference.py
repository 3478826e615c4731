"""The specification, in plain torch: slow, obvious, differentiable by autograd to any order.

Tests and benchmarks call it; the library never does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# critic


def input_gradient(critic: Callable[[Tensor], Tensor], x: Tensor, output_reduction: str = "sum") -> Tensor:
    """dD/dx of every sample, with the graph that a second differentiation needs."""
    x = x.detach().requires_grad_()
    scores = critic(x)
    total = scores.sum() if output_reduction == "sum" else scores.sum() * x.shape[0] / scores.numel()
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    return gradient


def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    target: float = 1.0,
    one_sided: bool = False,
    power: float = 2.0,
    p: float = 2.0,
    reduction: str = "mean",
    output_reduction: str = "sum",
    mask: Tensor | None = None,
) -> Tensor:
    """Gulrajani et al. 2017, eq. 3, at the points x, and its variants; differentiated by double backward."""
    gradient = input_gradient(critic, x, output_reduction)
    if mask is not None:
        gradient = gradient * mask
    excess = torch.linalg.vector_norm(gradient.flatten(1), p, dim=1) - target
    penalty: Tensor = (excess.clamp_min(0) if one_sided else excess.abs()) ** power
    if reduction == "mean":
        return penalty.mean()
    return {"sum": penalty.sum(), "max": penalty.amax(), "none": penalty}[reduction]


# spectral


def spectral_norm(
    weight: Tensor, u: Tensor, v: Tensor, dim: int = 0, n_power_iterations: int = 1, v_first: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return W / sigma, u, v and sigma = u . (W v) after power iterations on weight seen as a matrix.

    The rows of W are the dimension ``dim`` of weight, its columns all others. With ``v_first`` an iteration is
    v = W^T u / |W^T u|, u = W v / |W v|, as in torch.nn.utils.spectral_norm, else u first and then v, as in
    torch.nn.utils.parametrizations. In derivatives u and v are constants.
    """
    matrix = weight.movedim(dim, 0).flatten(1) if weight.dim() > 1 else weight[:, None]
    with torch.no_grad():
        for _ in range(n_power_iterations):
            if v_first:
                v = torch.nn.functional.normalize(matrix.T @ u, dim=0)
            u = torch.nn.functional.normalize(matrix @ v, dim=0)
            if not v_first:
                v = torch.nn.functional.normalize(matrix.T @ u, dim=0)
    sigma = u @ (matrix @ v)
    return weight / sigma, u, v, sigma


# sinkhorn
