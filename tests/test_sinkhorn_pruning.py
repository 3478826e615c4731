"""Passes that leave out tiles of far points give what dense passes give, to rounding.

Pruned are clouds of at least 2048 points in fewer than 16 dimensions, at an epsilon small beside the mean cost. The
same points with coordinates of 0 added up to 16 are the dense problem.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from wgan_ext import sinkhorn, sinkhorn_divergence

DTYPES = [torch.float32, torch.float64]


def cloud(count: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.rand(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def flat(x: Tensor) -> Tensor:
    """The same points in 16 dimensions, where nothing is pruned."""
    return torch.nn.functional.pad(x, (0, 16 - x.shape[-1]))


def weights(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Half of them zeros, those of whole tiles among them."""
    w = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1
    w[: count // 2] = 0
    return (w / w.sum()).to(dtype)


def outliers(x: Tensor) -> Tensor:
    x = x.clone()
    x[::700] *= 40
    return x


def clustered(x: Tensor) -> Tensor:
    return x * 0.02 + (torch.arange(len(x)) % 5).to(x).unsqueeze(-1)


def surface(x: Tensor) -> Tensor:
    """Without extent in the last coordinate."""
    return x * torch.tensor([*[1.0] * (x.shape[-1] - 1), 0.0]).to(x)


CLOUDS = {
    "same": lambda x: x,
    "displaced": lambda x: x + 0.5,
    "contracted": lambda x: x * torch.tensor([0.3, 1.0, 2.0])[: x.shape[-1]].to(x),
    "outliers": outliers,
    "clustered": clustered,
    "surface": surface,
}


def solve(x: Tensor, y: Tensor, **options: Any) -> list[Tensor]:
    """Potentials, value, gradients and the plan's product with ones."""
    p, q = x.clone().requires_grad_(), y.clone().requires_grad_()
    r = sinkhorn(p, q, **options)
    return [r.f, r.g, r.value.detach(), *torch.autograd.grad(r.value, (p, q)), r.plan @ torch.ones_like(y)[:, :2]]


def compare(x: Tensor, y: Tensor, epsilon: float, **options: Any) -> None:
    """Pruned against dense, both in the type given: no farther from dense in float64 than dense is."""
    options = {"epsilon": epsilon, "tol": 0.0, "max_iter": 25, **options}
    wide = {k: tuple(map(to_double, v)) if isinstance(v, tuple) else to_double(v) for k, v in options.items()}
    truth = solve(flat(x.double()), flat(y.double()), **wide)
    dense = solve(flat(x), flat(y), **options)
    pruned = solve(x, y, **options)
    for k, (want, other, got) in enumerate(zip(truth, dense, pruned, strict=True)):
        got = flat(got) if k in (3, 4) else got
        scale = epsilon if k < 3 else float(want.abs().max())
        least = 1e-9 if x.dtype == torch.float64 else 1e-4
        error, dense_error = (float((t.double() - want).abs().max()) / scale for t in (got, other))
        assert error <= max(least, 3 * dense_error), (k, error, dense_error)


def to_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CLOUDS)
def test_pruned_is_dense(name: str, dtype: torch.dtype) -> None:
    x, y = cloud(2100, 3, dtype, 0), CLOUDS[name](cloud(2500, 3, dtype, 1))
    compare(x, y, 2e-3)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_dimensions(dim: int) -> None:
    x, y = cloud(2048, dim, torch.float64, 0), cloud(2049, dim, torch.float64, 1) + 0.2
    compare(x, y, 2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_zero(dtype: torch.dtype) -> None:
    x, y = cloud(2200, 2, dtype, 0), cloud(2100, 2, dtype, 1) * 0.7
    compare(x, y, 2e-3, a=weights(len(x), dtype, 2), b=weights(len(y), dtype, 3).flip(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_marginals(dtype: torch.dtype) -> None:
    x, y = cloud(2100, 3, dtype, 0), cloud(2300, 3, dtype, 1) * 0.5 + 1
    compare(x, y, 2e-3, reach=0.5)
    compare(x, y, 2e-3, reach=5.0)


@pytest.mark.parametrize("cost", ["euclidean", "l1", 1.5])
def test_costs(cost: str | float) -> None:
    x, y = cloud(2100, 2, torch.float64, 0), cloud(2100, 2, torch.float64, 1) + 0.1
    compare(x, y, 5e-3, cost=cost, scaling=None)  # its schedule would follow the dimension


def test_batch_is_each_problem_alone() -> None:
    x, y = (
        torch.stack([cloud(2100, 3, torch.float32, seed + k) * s for k, s in enumerate((1, 0.01, 3))])
        for seed in (0, 9)
    )
    options: dict[str, Any] = {"epsilon": 2e-3, "tol": 0.0, "max_iter": 8}
    batch = sinkhorn(x, y, **options)  # of the second one nothing is pruned
    for k in range(len(x)):
        alone = sinkhorn(x[k], y[k], **options)
        assert torch.equal(batch.f[k], alone.f)
        assert torch.equal(batch.g[k], alone.g)


def test_ragged_batch_is_each_problem_alone() -> None:
    sizes = [(2100, 2500), (30, 7), (3000, 40), (2048, 2048)]
    xs = [cloud(n, 2, torch.float32, 2 * k).requires_grad_() for k, (n, _) in enumerate(sizes)]
    ys = [cloud(m, 2, torch.float32, 2 * k + 1) for k, (_, m) in enumerate(sizes)]
    offsets = [torch.tensor([0, *torch.tensor([p[side] for p in sizes]).cumsum(0).tolist()]) for side in (0, 1)]
    options: dict[str, Any] = {"epsilon": 2e-3, "tol": 0.0, "max_iter": 8}
    joined = torch.cat([x.detach() for x in xs]).requires_grad_()
    batch = sinkhorn_divergence(joined, torch.cat(ys), offsets=tuple(offsets), **options)
    batch.sum().backward()
    for k, (x, y) in enumerate(zip(xs, ys, strict=True)):
        alone = sinkhorn_divergence(x, y, **options)
        alone.backward()
        assert torch.equal(batch[k], alone)
        assert torch.equal(joined.grad[offsets[0][k] : offsets[0][k + 1]], x.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_divergence_of_a_cloud_from_itself_is_zero(dtype: torch.dtype) -> None:
    x = cloud(2300, 3, dtype, 0).requires_grad_()
    value = sinkhorn_divergence(x, x.detach().clone(), epsilon=2e-3)
    assert value == 0
    value.backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_threads_and_order_of_the_points_do_not_matter() -> None:
    x, y = cloud(2400, 3, torch.float64, 0), cloud(2400, 3, torch.float64, 1) + 0.3
    options: dict[str, Any] = {"epsilon": 2e-3, "tol": 0.0, "max_iter": 10}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = sinkhorn(x, y, **options)
        torch.set_num_threads(2)
        two = sinkhorn(x, y, **options)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.f, two.f)
    assert torch.equal(one.g, two.g)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    assert torch.allclose(sinkhorn(x[order], y, **options).f, one.f[order], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_potentials_far_from_the_solution(dtype: torch.dtype) -> None:
    """Whose row sums are far from 1, so that what was left out could matter: such rows are done again."""
    x, y = cloud(2100, 3, dtype, 0), cloud(2100, 3, dtype, 1)
    g = torch.linspace(-3, 3, len(y), dtype=dtype) * 0.05
    compare(x, y, 1e-3, init=(torch.full((len(x),), -0.05, dtype=dtype), g), max_iter=1)
    compare(x, y, 1e-3, init=(torch.full((len(x),), 0.3, dtype=dtype), g), max_iter=1)


def test_potentials_are_softmins() -> None:
    """Against log-sum-exp in float64, at an epsilon at which almost every tile is left out."""
    x, y = cloud(4000, 2, torch.float64, 0), cloud(4000, 2, torch.float64, 1)
    epsilon = 1e-4
    r = sinkhorn(x, y, epsilon=epsilon, tol=0.0, max_iter=40)
    costs = torch.cdist(y, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    want = -epsilon * (torch.logsumexp((r.f - costs) / epsilon, 1) - math.log(len(x)))
    assert torch.allclose(r.g, want, rtol=0, atol=1e-12)
