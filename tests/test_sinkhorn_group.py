"""Sinkhorn over a process group: each check runs in all of two, and of four, processes, each on its rows of the clouds.

What is demanded is the result of one process that has all rows, to rounding, and the same bits in every process.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wgan_ext import sinkhorn, sinkhorn_divergence

CHECKS: processes.Checks = {}
check = functools.partial(processes.check, CHECKS)

N, M = 53, 38
# How many rows of x and of y each process has, for each number of processes.
UNLIKE = {2: ((20, 33), (25, 13)), 4: ((1, 0, 30, 22), (10, 9, 0, 19))}
ALIKE = {2: ((26, 26), (19, 19)), 4: ((13, 13, 13, 13), (9, 9, 9, 9))}


def clouds(dim: int = 3, dtype: torch.dtype = torch.float64, n: int = N, m: int = M) -> tuple[Tensor, ...]:
    """Points x and y, weights a and b of the same sum."""
    torch.manual_seed(0)
    x, y = torch.rand(n, dim).double(), torch.rand(m, dim).double() + 0.3
    a, b = torch.rand(n).double() + 0.1, torch.rand(m).double() + 0.1
    return tuple(t.to(dtype) for t in (x, y, a / a.sum(), b / b.sum()))


def shards(tensors: tuple[Tensor | None, ...], unlike: bool = True) -> tuple[Any, ...]:
    """This process's rows of x, y, a, b, ..., as leaves."""
    counts = (UNLIKE if unlike else ALIKE)[dist.get_world_size()]
    rank = dist.get_rank()
    return tuple(
        None if t is None else t.split(counts[i % 2])[rank].clone().requires_grad_() for i, t in enumerate(tensors)
    )


def leaves(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    return tuple(None if t is None else t.clone().requires_grad_() for t in tensors)


def assert_same_everywhere(*tensors: Tensor) -> None:
    for t in tensors:
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, t.detach().clone())
        assert all(torch.equal(t, other) for other in gathered), gathered


def assert_as_in_one_process(
    tensors: tuple[Tensor | None, ...], unlike: bool = True, exact: bool = True, **options: Any
) -> None:
    """Of sinkhorn: result, gradients, plan; ``exact``: in float64."""
    rtol, atol = (1e-9, 1e-11) if exact else (2e-4, 2e-5)
    close = functools.partial(torch.testing.assert_close, rtol=rtol, atol=atol)
    whole, mine = leaves(tensors), shards(tensors, unlike)
    expected = sinkhorn(*whole, **options)
    if "init" in options:
        options["init"] = tuple(t.detach() for t in shards(options["init"], unlike))
    result = sinkhorn(*mine, group=dist.group.WORLD, **options)
    again = sinkhorn(*mine, group=dist.group.WORLD, **options)
    scalars = (result.value, result.marginal_error, result.iterations, result.converged, result.epsilon)
    assert_same_everywhere(*scalars)
    for name in ("value", "f", "g", "marginal_error", "iterations", "converged", "epsilon"):
        assert torch.equal(getattr(result, name), getattr(again, name)), name
    close(result.value, expected.value)
    close(result.epsilon, expected.epsilon)
    if exact:
        assert result.iterations == expected.iterations
        assert result.converged == expected.converged
        close(result.marginal_error, expected.marginal_error, rtol=1e-6)
    for potential, other in zip((result.f, result.g), shards((expected.f, expected.g), unlike), strict=True):
        close(potential, other.detach())
    close(result.plan.dense(), expected.plan.dense())
    # of a function of the value, whose derivative must come through
    (2 * result.value).backward()
    (2 * expected.value).backward()
    for leaf, other, place in zip(mine, whole, range(4), strict=True):
        if leaf is not None:
            (gradient,) = shards((other.grad,) if place % 2 == 0 else (None, other.grad), unlike)[-1:]
            close(leaf.grad, gradient.detach())


@check(
    cost=("sqeuclidean", "half_sqeuclidean", "euclidean", "l1", "cosine", "dot", 1.5),
    unlike=(True, False),
)
def costs(cost: Any, unlike: bool) -> None:
    size = {} if unlike else {"n": 52, "m": 4 * 9 if dist.get_world_size() == 4 else 38}
    assert_as_in_one_process(clouds(**size), unlike, cost=cost, tol=1e-6)


@check(reach=(0.5, (None, 1.0), (0.3, 0.7)), cost=("sqeuclidean", "euclidean"))
def unbalanced(reach: Any, cost: str) -> None:
    x, y, a, b = clouds()
    assert_as_in_one_process((x, y, a, 2 * b), cost=cost, reach=reach, tol=1e-6)


@check(
    options=(
        {"epsilon": 0.003, "max_iter": 3000},
        {"epsilon": 0.05, "scaling": None},
        {"relaxation": 1.0},
        {"epsilon": 0.005, "relaxation": 1.5},
        {"tol": 0.0, "max_iter": 7},
        {"tol": 0.0, "max_iter": 1},
    )
)
def options(options: dict[str, Any]) -> None:
    assert_as_in_one_process(clouds(), **options)


@check()
def uniform_weights() -> None:
    x, y, *_ = clouds()
    assert_as_in_one_process((x, y, None, None))


@check(memory_limit=(0, 1 << 30), cost=("sqeuclidean", "l1"))
def many_dimensions(memory_limit: int, cost: str) -> None:
    """Where costs are kept in a matrix if they may be."""
    assert_as_in_one_process(clouds(dim=40), cost=cost, memory_limit=memory_limit)


@check(dtype=("float32", "bfloat16", "float16"), dim=(2, 40))
def narrow_dtypes(dtype: str, dim: int) -> None:
    x, y, a, b = clouds(dim)
    narrow = getattr(torch, dtype)
    exact_points = tuple(t.to(narrow) for t in (x, y))
    a, b = a.float(), b.float()
    whole = leaves((*exact_points, a, b))
    mine = shards((*exact_points, a, b))
    result, expected = sinkhorn(*mine, group=dist.group.WORLD), sinkhorn(*whole)
    assert_same_everywhere(result.value, result.marginal_error, result.iterations)
    torch.testing.assert_close(result.value, expected.value, rtol=1e-5, atol=1e-5)
    result.value.backward()
    expected.value.backward()
    x_gradient, y_gradient = shards((whole[0].grad, whole[1].grad))
    tolerance = 2e-5 if narrow == torch.float32 else 1e-2
    torch.testing.assert_close(mine[0].grad, x_gradient.detach(), rtol=tolerance, atol=tolerance / 10)
    torch.testing.assert_close(mine[1].grad, y_gradient.detach(), rtol=tolerance, atol=tolerance / 10)


@check(cost=("sqeuclidean", "dot"))
def warm_starts(cost: Any) -> None:
    x, y, a, b = clouds()
    near = sinkhorn(x + 0.01, y, a, b, cost=cost)
    assert_as_in_one_process((x, y, a, b), cost=cost, init=(near.f, near.g), tol=1e-6)
    mine = shards((x, y, a, b))
    result = sinkhorn(*mine, cost=cost, group=dist.group.WORLD)
    again = sinkhorn(*mine, cost=cost, group=dist.group.WORLD, init=(result.f, result.g))
    assert again.iterations == 0


@check(cost=("sqeuclidean", "euclidean", "cosine"), reach=(None, 0.5), dim=(3, 40))
def divergences(cost: str, reach: Any, dim: int) -> None:
    x, y, a, b = clouds(dim)
    tensors = (x, y, a, b if reach is None else 1.5 * b)
    whole, mine = leaves(tensors), shards(tensors)
    options = {"cost": cost, "reach": reach, "tol": 1e-7}
    expected = sinkhorn_divergence(*whole, **options)
    value = sinkhorn_divergence(*mine, group=dist.group.WORLD, **options)
    assert_same_everywhere(value)
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-10)
    value.backward()
    expected.backward()
    for leaf, gradient in zip(mine, shards(tuple(t.grad for t in whole)), strict=True):
        torch.testing.assert_close(leaf.grad, gradient.detach(), rtol=1e-7, atol=1e-9)


@check(reach=(None, 0.5), dim=(3, 40), dtype=("float32", "float64"))
def divergence_of_equal_clouds_is_zero(reach: Any, dim: int, dtype: str) -> None:
    x, _, a, _ = clouds(dim, getattr(torch, dtype))
    rank, counts = dist.get_rank(), UNLIKE[dist.get_world_size()][0]
    x, y = (x.split(counts)[rank].clone().requires_grad_() for _ in range(2))
    a, b = (a.split(counts)[rank].clone() for _ in range(2))
    value = sinkhorn_divergence(x, y, a, b, reach=reach, group=dist.group.WORLD)
    value.backward()
    assert value == 0
    assert not x.grad.any()
    assert not y.grad.any()


@check()
def large_clouds() -> None:
    """More rows than a block of the kernels has, float32, exponents that need a running maximum."""
    torch.manual_seed(0)
    x, y = torch.randn(1500, 2), torch.randn(1300, 2)
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = [t.tensor_split(world)[rank].clone().requires_grad_() for t in (x, y)]
    result = sinkhorn(*mine, epsilon=0.01, group=dist.group.WORLD)
    expected = sinkhorn(x, y, epsilon=0.01)
    assert_same_everywhere(result.value)
    assert result.converged
    torch.testing.assert_close(result.value, expected.value, rtol=2e-3, atol=0.0)
    result.value.backward()
    P = result.plan.dense().double()
    gradient = 2 * (P.sum(1, keepdim=True) * x - P @ y.double()).tensor_split(world)[rank].float()
    torch.testing.assert_close(mine[0].grad, gradient, rtol=1e-3, atol=1e-6)


@check()
def generators_in_ddp() -> None:
    """DDP averages over the processes: the value times their number has the gradient of one process's value."""
    torch.manual_seed(0)
    alone, in_group = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    in_group.load_state_dict(alone.state_dict())
    ddp = DistributedDataParallel(in_group)
    z, y = torch.randn(N, 4).double(), torch.randn(M, 3).double()
    mine, mine_y = (t.detach() for t in shards((z, y)))
    if dist.get_world_size() == 4:
        mine, mine_y = z.tensor_split(4)[dist.get_rank()], y.tensor_split(4)[dist.get_rank()]
    (dist.get_world_size() * sinkhorn_divergence(ddp(mine), mine_y, group=dist.group.WORLD)).backward()
    sinkhorn_divergence(alone(z), y).backward()
    for parameter, other in zip(in_group.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-7, atol=1e-9)


@check()
def groups_of_some_processes() -> None:
    """Two problems at once, each in the processes of one parity."""
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group(list(range(parity, world, 2))) for parity in range(2)]
    x, y, a, b = clouds()
    x = x + rank % 2
    counts = world // 2
    mine = [t.tensor_split(counts)[rank // 2] for t in (x, y, a, b)]
    result = sinkhorn(*mine, group=groups[rank % 2])
    torch.testing.assert_close(result.value, sinkhorn(x, y, a, b).value)


# Errors: in all processes, none waits for another


def assert_raises_everywhere(kind: Any, match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=match):
        call()
    # and nobody is left behind
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total == dist.get_world_size()


DISAGREEMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "dimension": ({"x": torch.rand(3, 4), "y": torch.rand(3, 4)}, "the dimension of x must be the same on all ranks"),
    "dtype": (
        {"x": torch.rand(3, 2).double(), "y": torch.rand(3, 2).double()},
        "the dtype of x must be the same on all ranks of the group, got torch.float32 on rank 0 and torch.float64 on",
    ),
    "weights": ({"a": torch.rand(3)}, "the dtype of a must be the same .* got None on rank 0 and torch.float32"),
    "init": ({"init": (torch.zeros(3), torch.zeros(3))}, "init must be the same"),
    "epsilon": ({"epsilon": 0.1}, r"epsilon must be the same .* got 0.2 on rank 0 and 0.1 on rank"),
    "cost": ({"cost": "l1"}, "cost must be the same .* got sqeuclidean on rank 0 and l1 on rank"),
    "reach": ({"reach": 1.0}, "reach must be the same .* got None on rank 0 and 1.0 on rank"),
    "tol": ({"tol": 0.1}, "tol must be the same"),
    "max_iter": ({"max_iter": 5}, "max_iter must be the same"),
    "relaxation": ({"relaxation": 1.0}, "relaxation must be the same"),
    "scaling": ({"scaling": None}, "scaling must be the same"),
}


@check(name=tuple(DISAGREEMENTS))
def disagreements(name: str) -> None:
    arguments: dict[str, Any] = {"x": torch.rand(3, 2), "y": torch.rand(3, 2), "epsilon": 0.2}
    changed, match = DISAGREEMENTS[name]
    if dist.get_rank() == dist.get_world_size() - 1:
        arguments |= changed
    assert_raises_everywhere(ValueError, f"sinkhorn: {match}", lambda: sinkhorn(**arguments, group=dist.group.WORLD))


@check()
def functions_that_differ() -> None:
    function: Any = sinkhorn_divergence if dist.get_rank() else sinkhorn
    match = "function must be the same on all ranks of the group, got sinkhorn on rank 0 and sinkhorn_divergence on"
    call = functools.partial(function, torch.rand(3, 2), torch.rand(3, 2), group=dist.group.WORLD)
    assert_raises_everywhere(ValueError, match, call)


@check()
def errors_of_one_process() -> None:
    """Its own error there; in the others one that names it."""
    last = dist.get_world_size() - 1
    x: Any = torch.rand(3, 2)
    for bad, kind, text in (
        (torch.rand(3, 2).long(), TypeError, "x must be a floating-point tensor"),
        (torch.rand(2, 3, 2), ValueError, r"x must be points of shape \(count, dim\) where a group is given"),
        (None, TypeError, "x must be a tensor"),
    ):
        mine = dist.get_rank() == last
        match = text if mine else rf"rank {last} of the group refused what it was given: {kind.__name__}: .*{text}"
        call = functools.partial(sinkhorn, bad if mine else x, torch.rand(3, 2), group=dist.group.WORLD)
        assert_raises_everywhere(kind if mine else RuntimeError, f"sinkhorn: {match}", call)


@check()
def errors_of_values() -> None:
    """What only the whole problem shows, and what one process has, raises in all."""
    bad, y = torch.rand(3, 2), torch.rand(3, 2)
    if dist.get_rank() == 0:
        bad[0, 0] = torch.nan
    world = dist.group.WORLD
    assert_raises_everywhere(ValueError, "sinkhorn: x must be finite", lambda: sinkhorn(bad, y, group=world))
    a = torch.full((3,), float(dist.get_rank()))
    assert_raises_everywhere(
        ValueError, "a and b must have the same sum", lambda: sinkhorn(y, y, a, a + 1, group=world)
    )
    nothing = torch.rand(0, 2)
    assert_raises_everywhere(
        ValueError, "y must hold at least one point on some rank", lambda: sinkhorn(y, nothing, group=world)
    )
    assert_raises_everywhere(ValueError, "epsilon must be positive", lambda: sinkhorn(y, y, epsilon=-1.0, group=world))
    with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup, got int"):
        sinkhorn(y, y, group=3)  # type: ignore[arg-type]


@check(name=("sinkhorn", "sinkhorn_divergence"))
def refusals(name: str) -> None:
    function: Any = {"sinkhorn": sinkhorn, "sinkhorn_divergence": sinkhorn_divergence}[name]
    call = functools.partial(function, group=dist.group.WORLD)
    refused = functools.partial(assert_raises_everywhere, NotImplementedError)
    x, y = torch.rand(3, 2), torch.rand(3, 2)
    offsets = torch.tensor([0, 1, 3])
    refused(f"{name}: a cost given by a function.*group", lambda: call(x, y, cost=torch.cdist))
    refused(f"{name}: ragged batches.*group", lambda: call(x, y, offsets=(offsets, offsets)))
    refused(f"{name}: torch.func's transforms", lambda: torch.func.vmap(call)(x[None], y[None]))
    refused(f"{name}: torch.func's transforms", lambda: torch.func.grad(call)(x, y))
    result = call(x.requires_grad_(), y)
    value = result if isinstance(result, Tensor) else result.value
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    refused("second derivatives are not implemented with a group", gradient.sum().backward)


@check()
def warnings_of_no_convergence() -> None:
    mine = shards(clouds())
    with pytest.warns(UserWarning, match="sinkhorn: not converged after 2 iterations"):
        result = sinkhorn(*mine, epsilon=1e-3, max_iter=2, group=dist.group.WORLD)
    assert not result.converged
    assert_same_everywhere(result.marginal_error)


# Running them


def all_checks() -> processes.Checks:
    return CHECKS


@pytest.fixture(scope="module", params=[2, 4])
def failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return processes.failures(request.param, os.fspath(tmp_path_factory.mktemp("group")), all_checks)


@pytest.mark.parametrize("name", CHECKS)
def test_in_processes(failures: list[dict[str, str]], name: str) -> None:
    processes.fail_if_failed(failures, name)


def test_the_page_under_torchrun() -> None:
    """The script of docs/processes.md, in two processes that torchrun starts."""
    root = Path(__file__).parents[1]
    (script,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "processes.md").read_text(), re.DOTALL)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [*launcher, sys.executable, "-c", script]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    clouds: list[Tensor] = []
    for rank in range(2):
        torch.manual_seed(rank)
        clouds += [torch.randn(100 + rank, 2), torch.randn(120, 2) + 1]
    value = sinkhorn_divergence(torch.cat(clouds[0::2]), torch.cat(clouds[1::2])).item()
    said = dict(re.findall(r"rank (\d): distance (\S+), gradient of shape \[(?:100|101), 2\]", run.stdout))
    assert set(said) == {"0", "1"}, run.stdout
    assert said["0"] == said["1"]
    assert float(said["0"]) == pytest.approx(value, rel=1e-4)
