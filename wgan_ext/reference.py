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


def transport_cost_matrix(x: Tensor, y: Tensor, cost: str = "sqeuclidean") -> Tensor:
    """Return C, shape (N, M): |x_i - y_j|^2 or |x_i - y_j|, by differences; the latter's derivative is 0 at 0."""
    squares = (x[:, None] - y[None]).square().sum(-1)
    if cost == "sqeuclidean":
        return squares
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)


def sinkhorn_potentials(
    C: Tensor, a: Tensor, b: Tensor, epsilon: float, tol: float = 1e-12, max_iter: int = 100_000
) -> tuple[Tensor, Tensor]:
    """Return f (N,) and g (M,) of entropic transport by plain alternating updates (Cuturi 2013), in the log domain."""
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(max_iter):
        softmin = -epsilon * torch.logsumexp((g - C) / epsilon + b.log(), 1)
        error = (a * (((f - softmin) / epsilon).exp() - 1).abs()).sum()
        f = softmin
        g = -epsilon * torch.logsumexp((f[:, None] - C) / epsilon + a.log()[:, None], 0)
        if error < tol:
            return f, g
    raise RuntimeError(f"sinkhorn_potentials: marginal error {error} > {tol} after {max_iter} iterations")


def transport_dual(C: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, epsilon: float) -> Tensor:
    """Return <a, f> + <b, g> - epsilon (sum of the plan - sum of a x b), shape ()."""
    plan = torch.outer(a, b) * ((f[:, None] + g - C) / epsilon).exp()
    return (a * f).sum() + (b * g).sum() - epsilon * (plan.sum() - a.sum() * b.sum())


def sinkhorn(x: Tensor, y: Tensor, a: Tensor, b: Tensor, epsilon: float, cost: str = "sqeuclidean") -> Tensor:
    """Return min over plans P of <P, C> + epsilon KL(P | a x b), shape (); its derivative is the envelope's."""
    C = transport_cost_matrix(x, y, cost)
    f, g = sinkhorn_potentials(C.detach(), a.detach(), b.detach(), epsilon)
    return transport_dual(C, a, b, f, g, epsilon)


def sinkhorn_divergence(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, epsilon: float, cost: str = "sqeuclidean"
) -> Tensor:
    """Return OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 (Feydy et al. 2019), shape ()."""
    cross = sinkhorn(x, y, a, b, epsilon, cost)
    return cross - (sinkhorn(x, x, a, a, epsilon, cost) + sinkhorn(y, y, b, b, epsilon, cost)) / 2
