"""Ragged batches of transport problems: each problem is what it is alone, whatever the sizes of the others."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wgan_ext import SamplesLoss, reference, sinkhorn, sinkhorn_divergence

DOUBLE = torch.float64
SIZES = [(7, 64), (1, 7), (1000, 3), (64, 1000), (33, 1), (64, 64)]  # of x, of y
COSTS = ["sqeuclidean", "half_sqeuclidean", "euclidean", "l1", "cosine", 1.5]


def offsets_of(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(sizes)])


class Ragged:
    """Clouds with weights, alone and one after the other."""

    def __init__(self, sizes: list[tuple[int, int]], dim: int, device: torch.device, dtype: torch.dtype = DOUBLE):
        def clouds(counts: list[int], shift: float) -> tuple[list[Tensor], list[Tensor]]:
            points = [(torch.rand(n, dim, dtype=DOUBLE) * 0.8 + shift).to(device, dtype) for n in counts]
            weights = [torch.rand(n, dtype=DOUBLE) + 0.1 for n in counts]
            return points, [(w / w.sum()).to(device, dtype) for w in weights]

        (self.xs, self.a_s), (self.ys, self.b_s) = (
            clouds([pair[side] for pair in sizes], shift) for side, shift in ((0, 0.0), (1, 0.3))
        )
        self.offsets = offsets_of([n for n, _ in sizes]), offsets_of([m for _, m in sizes])
        self.problems = range(len(sizes))

    def joined(self, grad: bool = False) -> list[Tensor]:
        """x, y, a, b of the batch."""
        return [torch.cat(each).requires_grad_(grad) for each in (self.xs, self.ys, self.a_s, self.b_s)]

    def alone(self, problem: int, grad: bool = False) -> list[Tensor]:
        return [e[problem].clone().requires_grad_(grad) for e in (self.xs, self.ys, self.a_s, self.b_s)]

    def part(self, t: Tensor, problem: int, side: int) -> Tensor:
        begin, end = self.offsets[side][problem : problem + 2].tolist()
        return t[begin:end]


def same(got: Tensor, want: Tensor) -> bool:
    """Bit for bit on the CPU, where each problem is driven alone; the grids of CUDA follow the largest problem."""
    if got.device.type == "cpu":
        return torch.equal(got, want)
    return torch.allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dim", [1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("cost_reach", [*itertools.product(COSTS, [None, 0.5, (None, 0.3)]), ("dot", None)], ids=str)
def test_each_problem_is_what_it_is_alone(
    cost_reach: tuple[Any, Any], dtype: torch.dtype, dim: int, device: torch.device
) -> None:
    cost, reach = cost_reach
    batch = Ragged(SIZES, dim, device, dtype)
    options: dict[str, Any] = {"cost": cost, "reach": reach, "tol": 1e-2}
    inputs = batch.joined(grad=True)
    result, divergence = (f(*inputs, offsets=batch.offsets, **options) for f in (sinkhorn, sinkhorn_divergence))
    scale = torch.arange(1, len(SIZES) + 1, device=device, dtype=dtype)
    gradients = torch.autograd.grad((result.value + 2 * divergence) @ scale, inputs)
    assert result.value.shape == divergence.shape == result.converged.shape == result.epsilon.shape == (len(SIZES),)
    for p in batch.problems:
        alone = batch.alone(p, grad=True)
        one = sinkhorn(*alone, **options)
        one_divergence = sinkhorn_divergence(*alone, **options)
        if cost == "dot":  # a sum over the points, in Python
            assert torch.allclose(result.value[p], one.value, rtol=1e-6 if dtype == torch.float32 else 1e-13)
        else:
            assert same(result.value[p], one.value)
        assert same(divergence[p], one_divergence)
        assert same(batch.part(result.f, p, 0), one.f)
        assert same(batch.part(result.g, p, 1), one.g)
        assert same(result.epsilon[p], one.epsilon)
        assert same(result.marginal_error[p], one.marginal_error)
        if device.type == "cpu":
            assert result.iterations[p] == one.iterations
        want = torch.autograd.grad((one.value + 2 * one_divergence) * (p + 1), alone)
        for got, wanted, side in zip(gradients, want, (0, 1, 0, 1), strict=True):
            assert torch.allclose(batch.part(got, p, side), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "l1", 1.5])
@pytest.mark.parametrize("rho", [math.inf, 0.4])
def test_values_are_those_of_the_reference(cost: Any, rho: float, device: torch.device) -> None:
    batch = Ragged([(5, 9), (40, 3), (1, 1), (12, 33)], 3, device)
    exponent = {"sqeuclidean": 2, "euclidean": 1, "l1": 1}.get(cost, cost)
    reach = None if math.isinf(rho) else rho ** (1 / exponent)
    for ours, theirs in ((sinkhorn, reference.sinkhorn), (sinkhorn_divergence, reference.sinkhorn_divergence)):
        got = ours(*batch.joined(), offsets=batch.offsets, cost=cost, epsilon=0.2, reach=reach, tol=1e-11)
        value = got if isinstance(got, Tensor) else got.value
        for p in batch.problems:
            want = theirs(*batch.alone(p), 0.2, cost, (rho, rho))
            assert value[p].item() == pytest.approx(want.item(), rel=1e-8, abs=1e-12)


def test_uniform_weights_are_those_of_each_problem(device: torch.device) -> None:
    batch = Ragged([(4, 6), (9, 2)], 2, device)
    x, y, _, _ = batch.joined()
    a, b = (
        torch.cat([torch.full((n,), 1 / n, dtype=DOUBLE, device=device) for n in offsets.diff().tolist()])
        for offsets in batch.offsets
    )
    got = sinkhorn_divergence(x, y, offsets=batch.offsets)
    assert torch.allclose(got, sinkhorn_divergence(x, y, a, b, offsets=batch.offsets), rtol=1e-12)


@pytest.mark.parametrize("cost", [*COSTS, "dot"])
def test_equal_clouds_are_zero_bit_for_bit(cost: Any, device: torch.device) -> None:
    x, _, a, _ = Ragged(SIZES, 3, device, torch.float32).joined(grad=True)
    offsets = offsets_of([n for n, _ in SIZES])
    y = x.detach().clone().requires_grad_()
    value = sinkhorn_divergence(x, y, a, a.detach().clone(), offsets=(offsets, offsets), cost=cost)
    value.sum().backward()
    assert not value.any()
    assert not x.grad.any()
    assert not y.grad.any()


@pytest.mark.parametrize("function", [sinkhorn, sinkhorn_divergence])
@pytest.mark.parametrize(("cost", "reach"), [("sqeuclidean", None), (1.5, (0.7, None)), ("dot", None)], ids=str)
def test_gradients_are_those_of_finite_differences(
    function: Callable[..., Any], cost: Any, reach: Any, device: torch.device
) -> None:
    batch = Ragged([(3, 5), (1, 4), (6, 2)], 2, device)
    cuts = [offsets.to(device) for offsets in batch.offsets]

    def value(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if reach is None:  # a direction in which the masses stay equal, and with them the gradient's constant unseen
            a, b = (
                torch.cat([w / w.sum() for w in weights.tensor_split(offsets[1:-1])])
                for weights, offsets in ((a, batch.offsets[0]), (b, batch.offsets[1]))
            )
        result = function(x, y, a, b, offsets=tuple(cuts), cost=cost, reach=reach, epsilon=0.3, tol=1e-13)
        return result if isinstance(result, Tensor) else result.value

    assert torch.autograd.gradcheck(value, batch.joined(grad=True), atol=1e-6)


def test_second_derivatives_are_refused(device: torch.device) -> None:
    batch = Ragged([(3, 5), (1, 4)], 2, device)
    x, *rest = batch.joined()
    x.requires_grad_()
    value = sinkhorn_divergence(x, *rest, offsets=batch.offsets).sum()
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        gradient.sum().backward()


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.tuples(*[st.integers(1, 90)] * 2), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_the_order_of_the_problems_does_not_matter(sizes: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    device = torch.device("cpu")
    batch = Ragged(sizes, 17, device, torch.float32)
    order = torch.randperm(len(sizes)).tolist()
    x, y, a, b = (torch.cat([e[p] for p in order]) for e in (batch.xs, batch.ys, batch.a_s, batch.b_s))
    cuts = offsets_of([sizes[p][0] for p in order]), offsets_of([sizes[p][1] for p in order])
    want = sinkhorn_divergence(*batch.joined(), offsets=batch.offsets)
    assert torch.equal(sinkhorn_divergence(x, y, a, b, offsets=cuts), want[order])


def test_results_do_not_depend_on_the_threads() -> None:
    batch = Ragged([(900, 900), *[(30, 40)] * 5, (600, 2)], 3, torch.device("cpu"), torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            inputs = batch.joined(grad=True)
            value = sinkhorn_divergence(*inputs, offsets=batch.offsets)
            results.append((value, *torch.autograd.grad(value.sum(), inputs)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "dot"])
def test_a_converged_start_needs_no_iteration(cost: Any, device: torch.device) -> None:
    batch = Ragged([(50, 20), (3, 70)], 3, device)
    options: dict[str, Any] = {"offsets": batch.offsets, "cost": cost, "epsilon": 0.05}
    first = sinkhorn(*batch.joined(), tol=1e-6, **options)
    again = sinkhorn(*batch.joined(), init=(first.f, first.g), **options)
    assert not again.iterations.any()
    assert torch.allclose(again.value, first.value, rtol=1e-5)


@pytest.mark.parametrize("reach", [None, 0.6])
def test_plans(reach: float | None, device: torch.device) -> None:
    batch = Ragged([(8, 5), (1, 6), (30, 40)], 3, device)
    x, y, a, b = batch.joined()
    plan = sinkhorn(x, y, a, b, offsets=batch.offsets, reach=reach, epsilon=0.1).plan
    assert plan.shape == (39, 51)
    values = torch.rand(51, 2, dtype=DOUBLE, device=device, requires_grad=True)
    products, mapped, sums = plan @ values, plan.barycentric_map(), plan.sum(-2)
    assert torch.autograd.gradcheck(plan.times, values)
    assert [one.shape for one in plan] == [(8, 5), (1, 6), (30, 40)]
    for p in batch.problems:
        one = sinkhorn(*batch.alone(p), reach=reach, epsilon=0.1).plan
        dense, taken = one.dense(), plan[p]
        assert same(taken.dense(), dense)
        assert torch.allclose(batch.part(products, p, 0), dense @ batch.part(values, p, 1))
        assert torch.allclose(batch.part(plan.T @ x, p, 1), dense.T @ batch.xs[p])
        assert torch.allclose(batch.part(sums, p, 1), dense.sum(0))
        assert torch.allclose(batch.part(mapped, p, 0), one.barycentric_map())
        points = torch.rand(4, 3, dtype=DOUBLE, device=device)
        assert same(taken.potential(points), one.potential(points))
        assert same(plan.T[p].dense(), one.T.dense())
    assert torch.equal(plan[-1].dense(), plan[2].dense())


def test_a_batchs_plan_is_taken_apart(device: torch.device) -> None:
    x, y = torch.rand(3, 9, 2, device=device), torch.rand(3, 4, 2, device=device)
    for cost in ("euclidean", torch.cdist):
        plan = sinkhorn(x, y, cost=cost).plan  # type: ignore[arg-type]
        for p in range(3):
            assert torch.allclose(plan[p].dense(), plan.dense()[p])
            assert torch.allclose(plan[p].barycentric_map(), plan.barycentric_map()[p], rtol=1e-4)
        with pytest.raises(IndexError):
            plan[3]
        with pytest.raises(TypeError, match="this is the plan of one problem"):
            plan[0][0]


def test_jagged_tensors_are_ragged_batches(device: torch.device) -> None:
    batch = Ragged(SIZES[:4], 3, device, torch.float32)
    x, y, a, b = (
        torch.nested.nested_tensor(e, layout=torch.jagged, requires_grad=True)
        for e in (batch.xs, batch.ys, batch.a_s, batch.b_s)
    )
    value = sinkhorn_divergence(x, y, a, b)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    flat = batch.joined(grad=True)
    want = sinkhorn_divergence(*flat, offsets=batch.offsets)
    assert torch.equal(value, want)
    assert gradient.is_nested
    assert torch.equal(gradient.values(), torch.autograd.grad(want.sum(), flat)[0])
    assert torch.equal(sinkhorn(x, y, epsilon=0.1).f, sinkhorn(*flat[:2], offsets=batch.offsets, epsilon=0.1).f)


def test_jagged_tensors_that_are_no_clouds_are_refused() -> None:
    clouds = [torch.rand(3, 2), torch.rand(5, 2)]
    x = torch.nested.nested_tensor(clouds, layout=torch.jagged)
    with pytest.raises(ValueError, match=r"y must be a contiguous nested tensor .*, got 2 dimensions, torch\.strided"):
        sinkhorn(x, clouds[0])
    with pytest.raises(ValueError, match=r"x must be a contiguous nested tensor of layout torch\.jagged"):
        sinkhorn(x.transpose(1, 2), x)
    with pytest.raises(ValueError, match="nested tensors bring their own offsets"):
        sinkhorn(x, x, offsets=(offsets_of([3, 5]), offsets_of([3, 5])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a prototype
        strided = torch.nested.nested_tensor(clouds)
    with pytest.raises(ValueError, match=r"x must be a contiguous nested tensor of layout torch\.jagged"):
        sinkhorn(strided, strided)


@pytest.mark.parametrize("nested", [False, True])
def test_compiled_code_gives_the_same(nested: bool, device: torch.device) -> None:
    batch = Ragged([(9, 8), (30, 3), (1, 20)], 3, device, torch.float32)

    def loss(x: Tensor, y: Tensor, a: Tensor, b: Tensor, *offsets: Tensor) -> Tensor:
        result = sinkhorn(x, y, a, b, offsets=offsets or None, epsilon=0.1, cost="dot")  # type: ignore[arg-type]
        moved = result.plan.barycentric_map().square().sum() + result.plan.T.times(result.f).sum()
        divergence = sinkhorn_divergence(x, y, a, b, offsets=offsets or None, reach=0.5)  # type: ignore[arg-type]
        return result.value.sum() + moved + (divergence * torch.arange(3, device=device)).sum()

    if nested:
        inputs = [
            torch.nested.nested_tensor(e, layout=torch.jagged, requires_grad=True)
            for e in (batch.xs, batch.ys, batch.a_s, batch.b_s)
        ]
        cuts: tuple[Tensor, ...] = ()
    else:
        inputs, cuts = batch.joined(grad=True), batch.offsets
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    values = [f(*inputs, *cuts) for f in (compiled, loss)]
    got, want = ((value, *torch.autograd.grad(value, inputs)) for value in values)
    for one, other in zip(got, want, strict=True):
        one, other = (t.values() if t.is_nested else t for t in (one, other))
        assert torch.equal(one, other)


def test_half_points_and_autocast(device: torch.device) -> None:
    batch = Ragged(SIZES[:3], 3, device, torch.float32)
    x, y, a, b = batch.joined()
    got = sinkhorn_divergence(x.bfloat16(), y.bfloat16(), offsets=batch.offsets, epsilon=0.1)
    want = sinkhorn_divergence(x.bfloat16().float(), y.bfloat16().float(), offsets=batch.offsets, epsilon=0.1)
    assert torch.allclose(got, want, rtol=1e-5)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(
            sinkhorn_divergence(x, y, a, b, offsets=batch.offsets),
            sinkhorn_divergence(x.clone(), y, a, b, offsets=batch.offsets),
        )


def test_costs_kept_in_memory_and_not(device: torch.device) -> None:
    batch = Ragged(SIZES, 20, device)
    inputs = batch.joined()
    kept, computed = (
        sinkhorn_divergence(*inputs, offsets=batch.offsets, tol=1e-9, memory_limit=limit) for limit in (1 << 30, 0)
    )
    assert torch.allclose(kept, computed, rtol=1e-6, atol=1e-9)


X, Y = torch.rand(5, 2), torch.rand(4, 2)
CUTS = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 4])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"offsets": CUTS[0]}, TypeError, "offsets must be a pair of tensors, got Tensor"),
        ({"offsets": (CUTS[0],)}, ValueError, "offsets must be a pair, of x and of y, got 1 values"),
        ({"offsets": (CUTS[0], [0, 3, 4])}, TypeError, "offsets must be a pair of tensors, got list"),
        ({"offsets": (CUTS[0].int(), CUTS[1])}, TypeError, "offsets of x must be int64, got Int"),
        ({"offsets": (CUTS[0], CUTS[1][None])}, ValueError, r"offsets of y must have shape \(problems \+ 1,\)"),
        ({"offsets": (CUTS[0][:1], CUTS[1])}, ValueError, r"offsets of x must have shape \(problems \+ 1,\)"),
        ({"offsets": (CUTS[0] + 1, CUTS[1])}, ValueError, "offsets of x must go from 0 to .*, 5, got 1 to 6"),
        ({"offsets": (CUTS[0][:2], CUTS[1][:2])}, ValueError, "offsets of x must go from 0 to .*, 5, got 0 to 2"),
        (
            {"offsets": (torch.tensor([0, 5, 5]), CUTS[1])},
            ValueError,
            "x of problem 1 must have at least one point, got 0",
        ),
        (
            {"offsets": (CUTS[0], torch.tensor([0, 5, 4]))},
            ValueError,
            "y of problem 1 must have at least one point, got -1",
        ),
        (
            {"offsets": (CUTS[0], torch.tensor([0, 4]))},
            ValueError,
            r"offsets of y must be those of as many problems as x \(2\), got 1",
        ),
        ({"x": X[None], "y": Y[None]}, ValueError, r"with offsets x must have shape \(total, dim\), got \[1, 5, 2\]"),
        ({"a": torch.full((2, 3), 1 / 3)}, ValueError, r"a must have shape \[5\], got \[2, 3\]"),
        ({"a": torch.tensor([1.0, 1, 1, 1, 1])}, ValueError, "a and b must have the same sum .*, got 3 and 1"),
        ({"cost": torch.cdist, "epsilon": 0.1}, NotImplementedError, "a cost given by a function .* ragged batches"),
    ],
    ids=str,
)
@pytest.mark.parametrize("function", [sinkhorn, sinkhorn_divergence])
def test_refusals(function: Callable[..., Any], change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": X, "y": Y, "offsets": CUTS} | change
    with pytest.raises(error, match=f"^{function.__name__}: {message}"):
        function(arguments.pop("x"), arguments.pop("y"), **arguments)


def test_refusals_of_plans_and_transforms() -> None:
    plan = sinkhorn(X, Y, offsets=CUTS).plan
    for method, call in {
        "rows": lambda: plan.rows(0, 1),
        "dense": plan.dense,
        "argmax": plan.argmax,
        "potential": lambda: plan.potential(X),
    }.items():
        message = f"TransportPlan: {method} of a ragged batch is not implemented; take plan[i].{method}"
        with pytest.raises(NotImplementedError, match=re.escape(message)):
            call()
    for function in (sinkhorn, sinkhorn_divergence):

        def value(x: Tensor, function: Any = function) -> Tensor:
            result = function(x, Y, offsets=CUTS)
            return result if isinstance(result, Tensor) else result.value

        with pytest.raises(NotImplementedError, match=f"^{function.__name__}: vmap of a ragged batch"):
            torch.func.vmap(value)(torch.rand(3, 5, 2))


def test_samples_loss_takes_no_offsets() -> None:
    with pytest.raises(TypeError, match="offsets"):
        SamplesLoss()(X, Y, offsets=CUTS)  # type: ignore[call-arg]
