"""Entropic transport and the Sinkhorn divergence against dense torch loops, stopped at the same marginal error.

POT and GeomLoss take part where they are installed (requirements.txt here), driven to the same error: POT by the number
of its iterations, GeomLoss by its scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from wgan_ext import sinkhorn, sinkhorn_divergence

Update = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]

SHAPES = [(1000, 3), (1000, 64), (4000, 3)]


def softmin(C: Tensor, potential: Tensor, epsilon: float) -> Tensor:
    """Return -epsilon log mean_j exp((potential_j - C_ij) / epsilon): how torch users write it."""
    return -epsilon * (((potential - C) / epsilon).logsumexp(1) - torch.tensor(float(C.shape[1])).log())


def marginal_error(C: Tensor, f: Tensor, g: Tensor, epsilon: float) -> float:
    P = ((f[:, None] + g - C) / epsilon).exp() / C.numel()
    return ((P.sum(1) - 1 / C.shape[0]).abs().sum() + (P.sum(0) - 1 / C.shape[1]).abs().sum()).item()


def alternating(C: Tensor, f: Tensor, g: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    f = softmin(C, g, epsilon)
    return f, softmin(C.t(), f, epsilon)


def averaged(C: Tensor, f: Tensor, g: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """GeomLoss's update: both potentials from the old ones, then the mean of old and new."""
    return (f + softmin(C, g, epsilon)) / 2, (g + softmin(C.t(), f, epsilon)) / 2


def schedule(C: Tensor, epsilon: float) -> Iterator[float]:
    """Halve epsilon from the mean cost to its target, and stay there."""
    at = C.mean().item()
    while True:
        yield max(epsilon, at)
        at /= 2


def solve(C: Tensor, epsilons: Iterable[float], update: Update) -> tuple[Tensor, Tensor]:
    f, g = C.new_zeros(C.shape[0]), C.new_zeros(C.shape[1])
    for epsilon in epsilons:
        f, g = update(C, f, g, epsilon)
    return f, g


def iterations_to(tol: float, C: Tensor, epsilon: float, update: Update) -> int:
    """Count the iterations, in steps of four, after which the marginal error is at most tol."""
    f, g = C.new_zeros(C.shape[0]), C.new_zeros(C.shape[1])
    for k, at in enumerate(schedule(C, epsilon), 1):
        f, g = update(C, f, g, at)
        if k % 4 == 0 and at == epsilon and marginal_error(C, f, g, epsilon) <= tol:
            return k
    raise AssertionError


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.t()


def clouds(count: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    x, y = torch.rand(count, dim, device=device), torch.rand(count, dim, device=device)
    return x / dim**0.5, (0.9 * y + 0.05) / dim**0.5


def announce(benchmark: Any, pairs: float) -> None:
    """Print pairs of points a second, summed over the passes."""
    if "contestants" in benchmark.extra_info:
        rate = pairs / benchmark.extra_info["contestants"]["wgan_ext"]["median"]
        print(f"\n{benchmark.group}: {rate / 1e9:.2f} Gpair/s")


def geomloss_at(tol: float, x: Tensor, y: Tensor, epsilon: float) -> dict[str, Any] | None:
    """Return GeomLoss's options for |x-y|^2 / 2 with the quickest scaling that reaches the marginal error."""
    if not find_spec("geomloss"):
        return None
    from geomloss import SamplesLoss

    options: dict[str, Any] = {"p": 2, "blur": (epsilon / 2) ** 0.5, "backend": "tensorized"}
    C = squared_distances(x, y) / 2
    for scaling in (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998):
        f, g = (t.flatten() for t in SamplesLoss(scaling=scaling, debias=False, potentials=True, **options)(x, y))
        if marginal_error(C, f, g, epsilon / 2) <= tol:
            return options | {"scaling": scaling}
    return None


def pot_at(tol: float, x: Tensor, y: Tensor, epsilon: float) -> Callable[[], Tensor] | None:
    """Return POT's entropic cost in the log domain, with as many iterations as reach the marginal error."""
    if not find_spec("ot"):
        return None
    import ot

    C = squared_distances(x, y)
    f, g = C.new_zeros(C.shape[0]), C.new_zeros(C.shape[1])
    for iterations in range(1, 5000):
        f, g = alternating(C, f, g, epsilon)
        if iterations % 10 == 0 and marginal_error(C, f, g, epsilon) <= tol:
            break
    else:
        return None
    a, b = torch.full_like(f, 1 / len(f)), torch.full_like(g, 1 / len(g))

    def cost() -> Tensor:
        value: Tensor = ot.sinkhorn2(
            a, b, ot.dist(x, y), epsilon, method="sinkhorn_log", numItermax=iterations, stopThr=0.0, warn=False
        )
        return value

    return cost


@pytest.mark.parametrize(("count", "dim"), SHAPES)
def test_ten_iterations(
    count: int, dim: int, contest: Callable[..., None], benchmark: Any, device: torch.device
) -> None:
    x, y = clouds(count, dim, device)
    epsilon = 0.05 * squared_distances(x, y).mean().item()

    def ours() -> Tensor:
        return sinkhorn(x, y, epsilon=epsilon, scaling=None, tol=0.0, max_iter=10, relaxation=1.0).value

    def dense() -> Tensor:
        f, g = solve(squared_distances(x, y), [epsilon] * 10, alternating)
        return f.mean() + g.mean()

    assert ours().item() == pytest.approx(dense().item(), rel=2e-3)  # not converged, and ours starts centred
    contest(f"10 plain Sinkhorn iterations, N=M={count}, D={dim}, float32", {"wgan_ext": ours, "dense torch": dense})
    announce(benchmark, 21.0 * count * count)


@pytest.mark.parametrize(("count", "dim", "fraction"), [(1000, 3, 0.05), (1000, 3, 0.005), (1000, 64, 0.05)])
def test_cost_at_equal_marginal_error(
    count: int, dim: int, fraction: float, contest: Callable[..., None], device: torch.device
) -> None:
    x, y = clouds(count, dim, device)
    C = squared_distances(x, y)
    epsilon, tol = fraction * C.mean().item(), 1e-2
    iterations = iterations_to(tol, C, epsilon, alternating)

    def ours() -> Tensor:
        return sinkhorn(x, y, epsilon=epsilon, tol=tol, max_iter=10_000).value

    def dense() -> Tensor:
        C = squared_distances(x, y)
        f, g = solve(C, islice(schedule(C, epsilon), iterations), alternating)
        return f.mean() + g.mean()

    assert ours().item() == pytest.approx(dense().item(), rel=1e-3)
    contestants: dict[str, Callable[[], object]] = {"wgan_ext": ours, "dense torch, alternating": dense}
    if pot := pot_at(tol, x, y, epsilon):
        contestants["POT, sinkhorn_log"] = pot
    contest(
        f"entropic cost, marginal error {tol}, epsilon {fraction} of the mean cost, N=M={count}, D={dim}, float32",
        contestants,
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
                f, g = solve(C, islice(schedule(C, epsilon), iterations), averaged)
            # the last step carries the gradient, of one cloud at a time, as GeomLoss takes it
            rows, columns = squared_distances(p, q.detach()), squared_distances(q, p.detach())
            value = value + sign * (softmin(rows, g, epsilon).mean() + softmin(columns, f, epsilon).mean())
        return value, torch.autograd.grad(value, x)[0]

    for got, want in zip(ours(), dense(), strict=True):
        assert (got - want).norm() <= 0.05 * want.norm()
    contestants: dict[str, Callable[[], object]] = {"wgan_ext": ours, "dense torch, GeomLoss's loop": dense}
    if options := geomloss_at(tol, x.detach(), y, epsilon):
        contestants["GeomLoss"] = geomloss_gradient(x, y, options)
    contest(
        f"Sinkhorn divergence and gradient, marginal error {tol}, N=M={count}, D={dim}, float32",
        contestants,
        iterations_dense=iterations,
    )


def geomloss_gradient(x: Tensor, y: Tensor, options: dict[str, Any]) -> Callable[[], object]:
    from geomloss import SamplesLoss

    loss = SamplesLoss(**options)

    def call() -> tuple[Tensor, Tensor]:
        value = loss(x, y)
        return value, torch.autograd.grad(value.sum(), x)[0]

    return call


@pytest.mark.parametrize(("problems", "count", "dim"), [(1, 64, 2), (64, 64, 2), (64, 256, 16)])
def test_batch_of_divergences_and_gradient(
    problems: int, count: int, dim: int, contest: Callable[..., None], device: torch.device
) -> None:
    pairs = [clouds(count, dim, device) for _ in range(problems)]
    x, y = (torch.stack(side) for side in zip(*pairs, strict=True))
    x.requires_grad_()
    epsilon, tol = 0.05 * squared_distances(*pairs[0]).mean().item(), 1e-2

    def ours() -> object:
        value = sinkhorn_divergence(x, y, epsilon=epsilon, tol=tol)
        return value, torch.autograd.grad(value.sum(), x)[0]

    def dense() -> object:
        value = x.new_zeros(problems)
        for p, q, sign in ((x, y, 1.0), (x, x, -0.5), (y, y, -0.5)):
            C = torch.cdist(p, q).square()
            with torch.no_grad():
                f, g = C.new_zeros(C.shape[:2]), C.new_zeros(problems, C.shape[2])
                for at in islice(schedule(C, epsilon), iterations):
                    f, g = (f + batch_softmin(C, g, at)) / 2, (g + batch_softmin(C.mT, f, at)) / 2
            rows = (p[:, :, None] - q[:, None].detach()).square().sum(-1)
            columns = (q[:, :, None] - p[:, None].detach()).square().sum(-1)
            sides = batch_softmin(rows, g, epsilon).mean(1), batch_softmin(columns, f, epsilon).mean(1)
            value = value + sign * (sides[0] + sides[1])
        return value, torch.autograd.grad(value.sum(), x)[0]

    iterations = iterations_to(tol, squared_distances(*pairs[0]), epsilon, averaged)
    contestants: dict[str, Callable[[], object]] = {"wgan_ext": ours, "dense torch, GeomLoss's loop": dense}
    if options := geomloss_at(tol, *pairs[0], epsilon):
        contestants["GeomLoss"] = geomloss_gradient(x, y, options)
    contest(
        f"{problems} Sinkhorn divergences and gradient, marginal error {tol}, N=M={count}, D={dim}, float32",
        contestants,
    )


@pytest.mark.parametrize(("problems", "most", "dim"), [(64, 512, 3), (64, 512, 64), (4096, 64, 3)])
def test_ragged_batch_and_gradient(
    problems: int, most: int, dim: int, contest: Callable[..., None], device: torch.device
) -> None:
    counts = torch.randint(most // 32, most + 1, (2, problems))
    offsets = [torch.cat([c.new_zeros(1), c.cumsum(0)]) for c in counts]
    points = [torch.rand(int(c.sum()), dim, device=device) / dim**0.5 for c in counts]
    points[0].requires_grad_()
    epsilon, tol = 0.02, 1e-2

    def gradient(value: Tensor, x: Tensor) -> object:
        return value, torch.autograd.grad(value.sum(), x)[0]

    def ours() -> Any:
        cuts = offsets[0], offsets[1]
        return gradient(sinkhorn_divergence(points[0], points[1], offsets=cuts, epsilon=epsilon, tol=tol), points[0])

    clouds = [list(p.detach().tensor_split(cuts[1:-1])) for p, cuts in zip(points, offsets, strict=True)]
    pad = torch.nn.utils.rnn.pad_sequence
    x, y = (pad(c, batch_first=True) for c in clouds)
    a, b = (pad([torch.full((len(t),), 1 / len(t), device=device) for t in c], batch_first=True) for c in clouds)
    x.requires_grad_()
    alone = [(p.requires_grad_(), q) for p, q in zip(*clouds, strict=True)]

    def padded() -> Any:
        return gradient(sinkhorn_divergence(x, y, a, b, epsilon=epsilon, tol=tol), x)

    def loop() -> list[object]:
        return [gradient(sinkhorn_divergence(p, q, epsilon=epsilon, tol=tol), p) for p, q in alone]

    assert torch.allclose(ours()[0], padded()[0], rtol=1e-3, atol=1e-6)
    contestants: dict[str, Callable[[], object]] = {"wgan_ext": ours, "padded": padded}
    if problems <= 64:
        contestants["one by one"] = loop
    contest(
        f"{problems} Sinkhorn divergences and gradient, {most // 32} to {most} points, D={dim}, float32", contestants
    )


def batch_softmin(C: Tensor, potential: Tensor, epsilon: float) -> Tensor:
    return -epsilon * (((potential[:, None] - C) / epsilon).logsumexp(2) - torch.tensor(float(C.shape[2])).log())
