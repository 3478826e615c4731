"""Entropic transport and the Sinkhorn divergence against dense torch loops, stopped at the same marginal error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from wgan_ext import sinkhorn, sinkhorn_divergence

SHAPES = [(1000, 3), (1000, 64), (4000, 3)]


def softmin(C: Tensor, potential: Tensor, epsilon: float) -> Tensor:
    """Return -epsilon log mean_j exp((potential_j - C_ij) / epsilon): how torch users write it."""
    return -epsilon * (((potential - C) / epsilon).logsumexp(1) - torch.tensor(float(C.shape[1])).log())


def marginal_error(C: Tensor, f: Tensor, g: Tensor, epsilon: float) -> float:
    P = ((f[:, None] + g - C) / epsilon).exp() / C.numel()
    return ((P.sum(1) - 1 / C.shape[0]).abs().sum() + (P.sum(0) - 1 / C.shape[1]).abs().sum()).item()


def schedule(C: Tensor, epsilon: float, iterations: int) -> list[float]:
    """Halve epsilon from the mean cost to its target."""
    start = C.mean().item()
    return [max(epsilon, start * 0.5**k) for k in range(iterations)]


def alternating(C: Tensor, epsilons: list[float]) -> tuple[Tensor, Tensor]:
    f, g = C.new_zeros(C.shape[0]), C.new_zeros(C.shape[1])
    for epsilon in epsilons:
        f = softmin(C, g, epsilon)
        g = softmin(C.t(), f, epsilon)
    return f, g


def averaged(C: Tensor, epsilons: list[float]) -> tuple[Tensor, Tensor]:
    """GeomLoss's loop: both potentials from the old ones, then the mean of old and new."""
    f, g = C.new_zeros(C.shape[0]), C.new_zeros(C.shape[1])
    for epsilon in epsilons:
        f, g = (f + softmin(C, g, epsilon)) / 2, (g + softmin(C.t(), f, epsilon)) / 2
    return f, g


def iterations_to(tol: float, C: Tensor, epsilon: float, solve: Callable[..., tuple[Tensor, Tensor]]) -> int:
    """Count, to 20 %, the iterations after which the marginal error is at most tol."""
    count = 8
    while marginal_error(C, *solve(C, schedule(C, epsilon, count)), epsilon) > tol:
        count = count * 6 // 5
    return count


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.t()


def clouds(count: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    x, y = torch.rand(count, dim, device=device), torch.rand(count, dim, device=device)
    return x / dim**0.5, (0.9 * y + 0.05) / dim**0.5


def announce(benchmark: Any, pairs: float) -> None:
    """Print pairs of points a second, summed over the passes."""
    for name, row in benchmark.extra_info.get("contestants", {}).items():
        if name == "wgan_ext":
            print(f"\n{benchmark.group}: {pairs / row['median'] / 1e9:.2f} Gpair/s")


@pytest.mark.parametrize(("count", "dim"), SHAPES)
def test_ten_iterations(
    count: int, dim: int, contest: Callable[..., None], benchmark: Any, device: torch.device
) -> None:
    x, y = clouds(count, dim, device)
    epsilon = 0.05 * squared_distances(x, y).mean().item()

    def ours() -> Tensor:
        return sinkhorn(x, y, epsilon=epsilon, scaling=None, tol=0.0, max_iter=10, relaxation=1.0).value

    def dense() -> Tensor:
        f, g = alternating(squared_distances(x, y), [epsilon] * 10)
        return f.mean() + g.mean()

    assert ours().item() == pytest.approx(dense().item(), rel=1e-4)
    contest(f"10 plain Sinkhorn iterations, N=M={count}, D={dim}, float32", {"wgan_ext": ours, "dense torch": dense})
    announce(benchmark, 21.0 * count * count)


@pytest.mark.parametrize("fraction", [0.05, 0.005])
@pytest.mark.parametrize(("count", "dim"), SHAPES[:2])
def test_cost_at_equal_marginal_error(
    count: int, dim: int, fraction: float, contest: Callable[..., None], device: torch.device
) -> None:
    x, y = clouds(count, dim, device)
    C = squared_distances(x, y)
    epsilon, tol = fraction * C.mean().item(), 1e-3
    iterations = iterations_to(tol, C, epsilon, alternating)

    def ours() -> Tensor:
        return sinkhorn(x, y, epsilon=epsilon, tol=tol, max_iter=10_000).value

    def dense() -> Tensor:
        C = squared_distances(x, y)
        f, g = alternating(C, schedule(C, epsilon, iterations))
        return f.mean() + g.mean()

    assert ours().item() == pytest.approx(dense().item(), rel=1e-3)
    contest(
        f"entropic cost, marginal error {tol}, epsilon {fraction} of the mean cost, N=M={count}, D={dim}, float32",
        {"wgan_ext": ours, "dense torch, alternating": dense},
        iterations=sinkhorn(x, y, epsilon=epsilon, tol=tol, max_iter=10_000).iterations.item(),
        iterations_dense=iterations,
    )


@pytest.mark.parametrize(("count", "dim"), SHAPES[:2])
def test_divergence_and_gradient_at_equal_marginal_error(
    count: int, dim: int, contest: Callable[..., None], device: torch.device
) -> None:
    x, y = clouds(count, dim, device)
    x.requires_grad_()
    C = squared_distances(x, y).detach()
    epsilon, tol = 0.05 * C.mean().item(), 1e-2
    iterations = iterations_to(tol, C, epsilon, averaged)

    def ours() -> tuple[Tensor, Tensor]:
        value = sinkhorn_divergence(x, y, epsilon=epsilon, tol=tol)
        return value, torch.autograd.grad(value, x)[0]

    def dense() -> tuple[Tensor, Tensor]:
        value = x.new_zeros(())
        for p, q, sign in ((x, y, 1.0), (x, x, -0.5), (y, y, -0.5)):
            C = squared_distances(p, q)
            with torch.no_grad():
                f, g = averaged(C, schedule(C, epsilon, iterations))
            # the last step, which carries the gradient, as GeomLoss takes it
            value = value + sign * (softmin(C, g, epsilon).mean() + softmin(C.t(), f, epsilon).mean())
        return value, torch.autograd.grad(value, x)[0]

    for got, want in zip(ours(), dense(), strict=True):
        assert (got - want).norm() <= 0.05 * want.norm()
    contest(
        f"Sinkhorn divergence and gradient, marginal error {tol}, N=M={count}, D={dim}, float32",
        {"wgan_ext": ours, "dense torch, GeomLoss's loop": dense},
        iterations_dense=iterations,
    )
