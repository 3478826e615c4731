"""Entropic transport and the Sinkhorn divergence: values, derivatives, the solver's rules, layouts, refusals."""

from __future__ import annotations

import itertools
import math
import resource
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wgan_ext import SamplesLoss, reference, sinkhorn, sinkhorn_divergence, sinkhorn_matrix

COSTS = ["sqeuclidean", "euclidean"]
DOUBLE = torch.float64
SHAPES = [(1, 1, 1), (1, 9, 2), (17, 1, 3), (5, 3, 1), (33, 70, 2), (130, 67, 3), (64, 64, 17), (90, 41, 100)]


def cloud(count: int, dim: int, device: torch.device, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    weights = torch.rand(count, dtype=DOUBLE) + 0.1
    return torch.rand(count, dim, dtype=DOUBLE).to(device, dtype), (weights / weights.sum()).to(device, dtype)


def plan(x: Tensor, y: Tensor, a: Tensor, b: Tensor, result: Any, cost: str) -> Tensor:
    x, y, a, b, f, g = (t.double() for t in (x, y, a, b, result.f, result.g))
    C = reference.transport_cost_matrix(x, y, cost)
    return torch.outer(a, b) * ((f[:, None] + g - C) / result.epsilon).exp()


# Values


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_is_that_of_the_reference(shape: tuple[int, int, int], cost: str, device: torch.device) -> None:
    n, m, dim = shape
    (x, a), (y, b) = cloud(n, dim, device), cloud(m, dim, device)
    epsilon = 0.2 * math.sqrt(dim) if cost == "euclidean" else 0.1 * dim
    want = reference.sinkhorn(x, y, a, b, epsilon, cost)
    got = sinkhorn(x, y, a, b, cost=cost, epsilon=epsilon, tol=1e-10)
    assert got.converged
    assert got.value.item() == pytest.approx(want.item(), rel=1e-10)
    single = sinkhorn(x.float(), y.float(), a.float(), b.float(), cost=cost, epsilon=epsilon, tol=1e-4)
    assert single.converged
    assert single.value.item() == pytest.approx(want.item(), rel=3e-5, abs=1e-5)

    want = reference.sinkhorn_divergence(x, y, a, b, epsilon, cost)
    got = sinkhorn_divergence(x, y, a, b, cost=cost, epsilon=epsilon, tol=1e-10)
    assert got.item() == pytest.approx(want.item(), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_marginal_error_is_that_of_the_plan(cost: str, dtype: torch.dtype, device: torch.device) -> None:
    (x, a), (y, b) = cloud(200, 3, device, dtype), cloud(150, 3, device, dtype)
    for relaxation in ("auto", 1.0, 1.7):
        result = sinkhorn(x, y, a, b, cost=cost, epsilon=0.02, relaxation=relaxation)
        P = plan(x, y, a, b, result, cost)
        error = (P.sum(1) - a).abs().sum() + (P.sum(0) - b).abs().sum()
        assert result.marginal_error.item() == pytest.approx(
            error.item(), abs=1e-5 if dtype == torch.float32 else 1e-12
        )
        assert result.marginal_error <= 1e-3


def test_value_is_a_lower_bound_that_rises_with_the_iterations(device: torch.device) -> None:
    (x, a), (y, b) = cloud(60, 2, device), cloud(70, 2, device)
    exact = reference.sinkhorn(x, y, a, b, 0.02)
    options: dict[str, Any] = {"epsilon": 0.02, "tol": 0.0, "scaling": None, "relaxation": 1.0}
    values = [sinkhorn(x, y, a, b, max_iter=k, **options).value for k in (1, 2, 4, 8, 16, 32)]
    assert all(low < high for low, high in itertools.pairwise(values))
    assert values[-1] <= exact


def test_gaussians_have_a_closed_form(device: torch.device) -> None:
    # Janati et al. 2020, with epsilon = 2 sigma^2, on Gauss-Hermite nodes, which integrate the Gaussians exactly.
    nodes, weights = np.polynomial.hermite.hermgauss(60)
    t = torch.tensor(nodes * math.sqrt(2), device=device)
    w = torch.tensor(weights / weights.sum(), device=device)
    s1, s2, shift, epsilon = 1.0, 0.6, 0.7, 0.5
    v = epsilon / 2
    d = math.sqrt(4 * s1**2 * s2**2 + v**2)
    want = shift**2 + s1**2 + s2**2 - d + v * (1 - math.log(2 * v)) + v * math.log(d + v)
    got = sinkhorn((s1 * t)[:, None], (s2 * t + shift)[:, None], w, w, epsilon=epsilon, tol=1e-12)
    assert got.value.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_a_translate_is_its_squared_distance_away(dtype: torch.dtype, device: torch.device) -> None:
    x, a = cloud(120, 3, device, dtype)
    shift = torch.tensor([1.0, -2.0, 0.5], device=device, dtype=dtype)
    y = (x + shift).requires_grad_()
    value = sinkhorn_divergence(x, y, a, a)
    assert value.item() == pytest.approx(5.25, rel=1e-6 if dtype == torch.float32 else 1e-12)
    value.backward()
    assert torch.allclose(y.grad, 2 * shift * a[:, None], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("epsilon", [None, 1e-3, 0.1, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_equal_clouds_are_zero_bit_for_bit(
    cost: str, epsilon: float | None, dtype: torch.dtype, device: torch.device
) -> None:
    x, a = cloud(150, 3, device, dtype)
    x.requires_grad_()
    y = x.detach().clone().requires_grad_()
    value = sinkhorn_divergence(x, y, a, a.clone(), cost=cost, epsilon=epsilon)
    value.backward()
    assert value.item() == 0
    assert not x.grad.any()
    assert not y.grad.any()


@pytest.mark.parametrize("cost", COSTS)
def test_a_common_shift_of_the_clouds_changes_nothing(cost: str, device: torch.device) -> None:
    grid = 2.0**-10  # points that float32 holds exactly, shifted or not
    x, y = ((torch.rand(100, 3, device=device) / grid).round() * grid for _ in range(2))
    near, far = (
        [sinkhorn_divergence(x + s, y + s, cost=cost), sinkhorn(x + s, y + s, cost=cost).value] for s in (0, 1000)
    )
    assert near[0].item() == pytest.approx(far[0].item(), rel=1e-4, abs=1e-6)
    assert near[1].item() == pytest.approx(far[1].item(), rel=1e-5)


@pytest.mark.parametrize("cost", COSTS)
def test_zero_weights_are_absent_points(cost: str, device: torch.device) -> None:
    (x, a), (y, b) = cloud(60, 2, device), cloud(50, 2, device)
    far = torch.full((3, 2), 1e3, dtype=DOUBLE, device=device)
    nothing = torch.zeros(3, dtype=DOUBLE, device=device)
    for dtype, tol, rel in ((DOUBLE, 1e-10, 1e-9), (torch.float32, 1e-4, 1e-4)):
        x2, a2 = torch.cat([far, x]).to(dtype).requires_grad_(), torch.cat([nothing, a]).to(dtype)
        y2, b2 = torch.cat([y, -far]).to(dtype), torch.cat([b, nothing]).to(dtype)
        got = sinkhorn(x2, y2, a2, b2, cost=cost, epsilon=0.05, tol=tol)
        want = sinkhorn(x.to(dtype), y.to(dtype), a.to(dtype), b.to(dtype), cost=cost, epsilon=0.05, tol=tol)
        assert got.value.item() == pytest.approx(want.value.item(), rel=rel)
        assert all(torch.isfinite(t).all() for t in (got.f, got.g))
        got.value.backward()
        assert torch.isfinite(x2.grad).all()
        assert x2.grad[:3].abs().max() < 1e-30


@pytest.mark.parametrize("cost", COSTS)
def test_all_points_in_one_place(cost: str, device: torch.device) -> None:
    x = torch.full((20, 3), 0.3, device=device, requires_grad=True)
    y = torch.full((7, 3), 0.3, device=device)
    value = sinkhorn_divergence(x, y, cost=cost)
    value.backward()
    assert abs(value.item()) < 1e-6
    assert x.grad.abs().max() < 1e-6


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    dim=st.integers(1, 4),
    epsilon=st.sampled_from([0.02, 0.1, 1.0]),
    cost=st.sampled_from(COSTS),
    seed=st.integers(0, 2**16),
)
def test_divergence_is_symmetric_and_not_negative(
    n: int, m: int, dim: int, epsilon: float, cost: str, seed: int
) -> None:
    torch.manual_seed(seed)
    cpu = torch.device("cpu")
    (x, a), (y, b) = cloud(n, dim, cpu), cloud(m, dim, cpu)
    options: dict[str, Any] = {"cost": cost, "epsilon": epsilon, "tol": 1e-9, "max_iter": 20_000}
    there, back = sinkhorn_divergence(x, y, a, b, **options), sinkhorn_divergence(y, x, b, a, **options)
    assert there.item() == pytest.approx(back.item(), abs=1e-8)
    assert there >= -1e-8


# Derivatives


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("debiased", [False, True])
def test_gradients_are_those_of_finite_differences(cost: str, debiased: bool, device: torch.device) -> None:
    options: dict[str, Any] = {"cost": cost, "epsilon": 0.15, "tol": 1e-11, "max_iter": 20_000}

    def value(x: Tensor, y: Tensor, logits_a: Tensor, logits_b: Tensor) -> Tensor:
        a, b = logits_a.softmax(0), logits_b.softmax(0)
        return sinkhorn_divergence(x, y, a, b, **options) if debiased else sinkhorn(x, y, a, b, **options).value

    inputs = [
        torch.rand(size, dtype=DOUBLE, device=device, requires_grad=True) for size in ((9, 3), (7, 3), (9,), (7,))
    ]
    assert torch.autograd.gradcheck(value, inputs, eps=1e-5, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("dim", [1, 3, 100])
def test_float_gradients_are_those_of_the_reference(cost: str, dim: int, device: torch.device) -> None:
    (x, a), (y, b) = cloud(150, dim, device), cloud(131, dim, device)
    y = y + 0.2
    inputs = [t.requires_grad_() for t in (x, y, a, b)]
    want = torch.autograd.grad(reference.sinkhorn_divergence(*inputs, 0.2 * dim, cost), inputs)
    single = [t.detach().float().requires_grad_() for t in inputs]
    value = sinkhorn_divergence(*single, cost=cost, epsilon=0.2 * dim, tol=1e-5)
    for got, reference_gradient, t in zip(torch.autograd.grad(value, single), want, inputs, strict=True):
        if t.dim() == 1:  # defined up to a constant
            got, reference_gradient = got - got.mean(), reference_gradient - reference_gradient.mean()
        assert got.dtype == torch.float32
        difference = (got.double() - reference_gradient).norm() / reference_gradient.norm()
        assert difference < 2e-3


def test_gradient_at_the_default_tolerance(device: torch.device) -> None:
    (x, a), (y, b) = cloud(120, 2, device), cloud(120, 2, device)
    x, y = x.requires_grad_(), y * 0.5 + 1
    (want,) = torch.autograd.grad(reference.sinkhorn_divergence(x, y, a, b, 0.05), x)
    (got,) = torch.autograd.grad(sinkhorn_divergence(x, y, a, b, epsilon=0.05), x)
    assert (got - want).norm() / want.norm() < 0.01


def test_second_derivatives_are_refused(device: torch.device) -> None:
    (x, a), (y, b) = cloud(9, 2, device), cloud(7, 2, device)
    x.requires_grad_()
    a.requires_grad_()
    for value in (sinkhorn(x, y, a, b).value, sinkhorn_divergence(x, y, a, b)):
        for gradient in torch.autograd.grad(value, (x, a), create_graph=True):
            with pytest.raises(NotImplementedError, match="sinkhorn: second derivatives are not implemented"):
                torch.autograd.grad(gradient.sum(), x, retain_graph=True)


@pytest.mark.parametrize("wanted", ["x", "y", "a", "b", "C"])
def test_no_part_of_a_second_derivative_is_left_out(wanted: str, device: torch.device) -> None:
    # The square's second derivative has a part that could be had without the potentials' derivative.
    (x, a), (y, b) = cloud(9, 2, device), cloud(7, 2, device)
    t = {"x": x, "y": y, "a": a, "b": b, "C": reference.transport_cost_matrix(x, y)}
    t[wanted].requires_grad_()
    points, weights = (t["x"], t["y"]), (t["a"], t["b"])
    values = [] if wanted == "C" else [sinkhorn(*points, *weights).value, sinkhorn_divergence(*points, *weights)]
    values += [] if wanted in "xy" else [sinkhorn_matrix(t["C"], *weights).value]
    for value in values:
        (gradient,) = torch.autograd.grad(value.square(), t[wanted], create_graph=True)
        with pytest.raises(NotImplementedError, match="sinkhorn: second derivatives are not implemented"):
            torch.autograd.grad(gradient.square().sum(), t[wanted])


def test_potentials_and_facts_carry_no_gradient(device: torch.device) -> None:
    x, y = torch.rand(9, 2, device=device, requires_grad=True), torch.rand(7, 2, device=device)
    result = sinkhorn(x, y)
    assert result.value.requires_grad
    assert not any(t.requires_grad for t in (result.f, result.g, result.marginal_error, result.epsilon))


def test_gradient_between_near_clouds_at_the_default_tolerance(device: torch.device) -> None:
    # Both terms of the gradient are a hundred times the difference; the cross term has to start from the self terms.
    torch.manual_seed(0)
    x, a = cloud(200, 2, device)
    y = x + 0.01 * torch.randn_like(x)
    x.requires_grad_()
    (want,) = torch.autograd.grad(reference.sinkhorn_divergence(x, y, a, a, 0.02), x)
    (got,) = torch.autograd.grad(sinkhorn_divergence(x, y, a, a, epsilon=0.02), x)
    assert (got - want).norm() < 0.06 * want.norm()


# The solver's rules


def test_relaxation_saves_iterations(device: torch.device) -> None:
    x, y = torch.rand(300, 3, device=device), torch.rand(300, 3, device=device)
    options: dict[str, Any] = {"epsilon": 2e-3, "tol": 1e-4, "max_iter": 5000}
    plain, relaxed = sinkhorn(x, y, relaxation=1.0, **options), sinkhorn(x, y, **options)
    assert plain.converged
    assert relaxed.converged
    assert relaxed.iterations < plain.iterations / 3
    assert relaxed.value.item() == pytest.approx(plain.value.item(), rel=1e-4)


def test_scaling_saves_iterations(device: torch.device) -> None:
    x, y = torch.rand(300, 3, device=device), torch.rand(300, 3, device=device) * 0.5
    options: dict[str, Any] = {"epsilon": 2e-3, "tol": 1e-2, "max_iter": 5000, "relaxation": 1.0}
    scaled, unscaled = sinkhorn(x, y, **options), sinkhorn(x, y, scaling=None, **options)
    assert scaled.converged
    assert scaled.iterations < 0.8 * unscaled.iterations


def test_self_terms_start_the_cross_term_where_that_is_better(device: torch.device) -> None:
    from wgan_ext import _ops

    x = torch.rand(500, 2, device=device)
    y = x + 0.003 * torch.randn(500, 2, device=device)
    options = ("sqeuclidean", 2.0, None, None, 0.01, 0.5, 1e-4, 5000, 1.0, 0)
    scaled = _ops.sinkhorn(x, y, None, None, *options, None, None, None, None)[6]
    started = _ops.sinkhorn_divergence(x, y, None, None, *options, None, None)[6]
    assert started < scaled / 2


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(
    "case", ["scaling", "no scaling", "zero weights", "tiny weights", "warm", "omega", "wide", "short"]
)
def test_adversaries_of_the_plain_sum(case: str, cost: str, device: torch.device) -> None:
    # Each makes exponents large, sums vanish or weights unlike: no NaN, and the double reference's value.
    (x, a), (y, b) = cloud(150, 2, device), cloud(120, 2, device)
    options: dict[str, Any] = {"epsilon": 5e-3, "tol": 1e-3, "max_iter": 5000, "cost": cost}
    if case == "scaling":
        options["scaling"] = 1 / 16
    elif case == "no scaling":
        options["scaling"] = None
    elif case == "zero weights":
        a[::3], b[1::2] = 0, 0
        options["scaling"] = 1 / 16
    elif case == "tiny weights":
        a[::3], b[1::2] = 1e-30, 1e-35
    elif case == "omega":
        options["relaxation"] = 1.95
    elif case == "wide":
        x[:75] += 30
        y[:60] += 30
        options["max_iter"] = 200
    elif case == "short":
        options |= {"max_iter": 3, "tol": 0.0}
    a, b = a / a.sum(), b / b.sum()
    single = [t.float() for t in (x, y, a, b)]
    if case == "warm":
        rough = [(torch.randn(k, device=device) * 5) for k in (150, 120)]
        options["init"] = tuple(rough)
    with warnings.catch_warnings():
        if case == "wide":
            warnings.simplefilter("ignore")
        result, exact = sinkhorn(*single, **options), sinkhorn(x, y, a, b, **options)
    for t in (result.value, result.f, result.g, result.marginal_error):
        assert torch.isfinite(t).all()
    if case == "wide":  # two lumps that exchange mass over a gap of 3600 epsilon or more: neither converges
        return
    assert result.converged or case == "short"
    assert result.value.item() == pytest.approx(exact.value.item(), rel=2e-3, abs=1e-4)


def test_a_converged_start_needs_no_iteration(device: torch.device) -> None:
    (x, a), (y, b) = cloud(100, 2, device, torch.float32), cloud(80, 2, device, torch.float32)
    y = y + 3
    for cost in COSTS:
        first = sinkhorn(x, y, a, b, cost=cost, epsilon=0.05)
        again = sinkhorn(x, y, a, b, cost=cost, epsilon=0.05, init=(first.f, first.g), tol=1.1e-3)
        assert again.iterations == 0
        assert again.value.item() == pytest.approx(first.value.item(), rel=1e-5)
        moved = sinkhorn(x + 0.01, y, a, b, cost=cost, epsilon=0.05, init=(first.f, first.g))
        assert moved.converged
        assert moved.iterations <= first.iterations


def test_tolerance_zero_runs_all_iterations_and_does_not_warn(device: torch.device) -> None:
    x, y = torch.rand(40, 2, device=device), torch.rand(30, 2, device=device)
    for count in (1, 2, 7, 40):
        assert sinkhorn(x, y, tol=0.0, max_iter=count).iterations == count
    assert torch.isfinite(sinkhorn_divergence(x, y, tol=0.0, max_iter=20))


def test_a_solve_that_does_not_converge_warns() -> None:
    x, y = torch.rand(100, 2), torch.rand(100, 2)
    with pytest.warns(UserWarning, match=r"sinkhorn: not converged after 5 iterations.*raise max_iter"):
        result = sinkhorn(x, y, epsilon=1e-4, max_iter=5)
    assert not result.converged


def test_default_epsilon_follows_the_scale(device: torch.device) -> None:
    (x, a), (y, b) = cloud(50, 3, device), cloud(60, 3, device)
    C = reference.transport_cost_matrix(x, y)
    mean = (torch.outer(a, b) * C).sum()
    assert sinkhorn(x, y, a, b).epsilon.item() == pytest.approx(0.05 * mean.item(), rel=1e-12)
    euclidean = sinkhorn(x, y, a, b, cost="euclidean").epsilon.item()
    assert euclidean == pytest.approx(0.05 * mean.sqrt().item(), rel=1e-12)
    iterations = {sinkhorn(x * s, y * s, a, b).iterations.item() for s in (1e-3, 1.0, 1e3)}
    assert len(iterations) == 1


@pytest.mark.parametrize("cost", COSTS)
def test_results_do_not_depend_on_the_threads(cost: str) -> None:
    (x, a), (y, b) = (
        cloud(700, 5, torch.device("cpu"), torch.float32),
        cloud(900, 5, torch.device("cpu"), torch.float32),
    )
    x.requires_grad_()
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        value = sinkhorn_divergence(x, y, a, b, cost=cost)
        results.append((value.detach(), *torch.autograd.grad(value, x)))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_memory_grows_with_the_points_not_with_their_pairs() -> None:
    x, y = torch.rand(20_000, 2), torch.rand(15_000, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sinkhorn(x, y, tol=0.0, max_iter=1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB; one matrix is 1.2 GB


def test_the_threads_keep_their_subnormal_numbers() -> None:
    x, y = torch.rand(2000, 2), torch.rand(2000, 2)
    sinkhorn(x, y, epsilon=1e-4, tol=0.0, max_iter=3)  # exponents far below those of normal numbers
    least = torch.full((1 << 20,), 1e-40)
    assert (least * 1 > 0).all()
    assert (least + least > 0).all()


# Unbalanced problems


REACHES = [0.3, (0.5, 0.2), (0.4, None), (None, 0.3)]


def rho_of(reach: Any, power: float) -> tuple[float, float]:
    pair = reach if isinstance(reach, tuple) else (reach, reach)
    rho_x, rho_y = (math.inf if r is None else r**power for r in pair)
    return rho_x, rho_y


@pytest.mark.parametrize("reach", REACHES, ids=str)
@pytest.mark.parametrize("cost", COSTS)
def test_unbalanced_values_and_gradients_are_those_of_the_reference(
    reach: Any, cost: str, device: torch.device
) -> None:
    (x, a), (y, b) = cloud(40, 3, device), cloud(30, 3, device)
    y, a = y + 2, a * 1.7
    inputs = [t.requires_grad_() for t in (x, y, a, b)]
    rho = rho_of(reach, 2 if cost == "sqeuclidean" else 1)
    options: dict[str, Any] = {"cost": cost, "epsilon": 0.1, "reach": reach, "max_iter": 20_000}
    for ours, theirs in ((sinkhorn, reference.sinkhorn), (sinkhorn_divergence, reference.sinkhorn_divergence)):
        want = theirs(*inputs, 0.1, cost, rho)
        for dtype, tol, rel in ((DOUBLE, 1e-11, 1e-9), (torch.float32, 1e-4, 2e-3)):
            single = [t.detach().to(dtype).requires_grad_() for t in inputs]
            got = ours(*single, tol=tol, **options)
            got = getattr(got, "value", got)
            assert got.item() == pytest.approx(want.item(), rel=rel / 10, abs=1e-5 if dtype != DOUBLE else 1e-12)
            for mine, other in zip(
                torch.autograd.grad(got, single), torch.autograd.grad(want, inputs, retain_graph=True), strict=True
            ):
                assert (mine - other).norm() <= rel * other.norm() + (1e-4 if dtype != DOUBLE else 1e-9)


@pytest.mark.parametrize("cost", [*COSTS, "l1", 1.5])
def test_unbalanced_gradients_are_those_of_finite_differences(cost: Any, device: torch.device) -> None:
    options: dict[str, Any] = {"cost": cost, "epsilon": 0.15, "tol": 1e-12, "max_iter": 20_000, "reach": (0.7, 0.4)}
    inputs = [
        torch.rand(size, dtype=DOUBLE, device=device, requires_grad=True) for size in ((6, 3), (5, 3), (6,), (5,))
    ]
    assert torch.autograd.gradcheck(
        lambda *t: sinkhorn_divergence(*t, **options), inputs, eps=1e-5, atol=1e-6, rtol=1e-4
    )


def test_two_points_unbalanced_have_a_closed_form(device: torch.device) -> None:
    # One point of mass 1 each at distance d: the plan is the number P that minimises P C + epsilon (P log P - P + 1)
    # + 2 rho (P log P - P + 1): log P = -C / (epsilon + 2 rho).
    for distance, reach, epsilon in ((1.0, 0.5, 0.1), (3.0, 1.0, 0.01), (0.2, 2.0, 1.0)):
        x = torch.zeros(1, 1, dtype=DOUBLE, device=device)
        result = sinkhorn(x, x + distance, epsilon=epsilon, reach=reach, tol=1e-13, max_iter=5000)
        scale = epsilon + 2 * reach**2
        plan = math.exp(-(distance**2) / scale)
        assert result.plan.dense().item() == pytest.approx(plan, rel=1e-9)
        assert result.value.item() == pytest.approx(scale * (1 - plan), rel=1e-9)


def test_the_shift_of_the_potentials_saves_iterations(device: torch.device) -> None:
    (x, a), (y, b) = cloud(300, 3, device), cloud(300, 3, device)
    result = sinkhorn(x, y, a, 0.5 * b, epsilon=2e-3, reach=1.0, tol=1e-3, max_iter=5000)
    assert result.converged
    assert result.iterations < 200  # thousands without it: the slow mode contracts by 1 - epsilon / rho
    assert sinkhorn(x, y, a, 0.5 * b, epsilon=1e-2, reach=10.0, max_iter=500).converged


def test_a_long_reach_is_balanced_transport(device: torch.device) -> None:
    (x, a), (y, b) = cloud(50, 2, device), cloud(60, 2, device)
    balanced = sinkhorn_divergence(x, y, a, b, epsilon=0.05, tol=1e-9)
    assert sinkhorn_divergence(x, y, a, b, epsilon=0.05, reach=1e4, tol=1e-9).item() == pytest.approx(
        balanced.item(), rel=1e-5
    )


def test_the_term_of_unlike_masses(device: torch.device) -> None:
    # Without it masses of 1 and 1.5 on the same points would give a negative divergence.
    x, a = cloud(60, 2, device)
    value = sinkhorn_divergence(x, x, a, 1.5 * a, epsilon=0.5, reach=1.0, tol=1e-8)
    assert value > 0
    assert sinkhorn_divergence(x, x, a, a.clone(), epsilon=0.5, reach=1.0).item() == 0


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    masses=st.tuples(st.sampled_from([0.3, 1.0, 4.0]), st.sampled_from([0.5, 1.0, 2.0])),
    reach=st.sampled_from([0.1, 1.0, (0.3, 2.0), (None, 0.5)]),
    cost=st.sampled_from([*COSTS, "l1"]),
    seed=st.integers(0, 2**16),
)
def test_unbalanced_divergence_is_symmetric_and_not_negative(
    n: int, m: int, masses: tuple[float, float], reach: Any, cost: str, seed: int
) -> None:
    torch.manual_seed(seed)
    cpu = torch.device("cpu")
    (x, a), (y, b) = cloud(n, 2, cpu), cloud(m, 2, cpu)
    a, b = masses[0] * a, masses[1] * b
    options: dict[str, Any] = {"cost": cost, "epsilon": 0.1, "tol": 1e-9, "max_iter": 20_000}
    turned = reach[::-1] if isinstance(reach, tuple) else reach
    there = sinkhorn_divergence(x, y, a, b, reach=reach, **options)
    back = sinkhorn_divergence(y, x, b, a, reach=turned, **options)
    assert there.item() == pytest.approx(back.item(), rel=1e-7, abs=1e-7)
    if not isinstance(reach, tuple):  # of unlike penalties it is no divergence
        assert there >= -1e-7


@pytest.mark.parametrize("case", ["scaling", "no scaling", "zero weights", "tiny weights", "warm", "far", "omega"])
@pytest.mark.parametrize("cost", COSTS)
def test_adversaries_of_unbalanced_problems(case: str, cost: str, device: torch.device) -> None:
    (x, a), (y, b) = cloud(150, 2, device), cloud(120, 2, device)
    options: dict[str, Any] = {"epsilon": 5e-3, "max_iter": 5000, "cost": cost, "reach": 0.3}
    if case in ("scaling", "no scaling"):
        options["scaling"] = 1 / 16 if case == "scaling" else None
    elif case == "zero weights":
        a[::3], b[1::2] = 0, 0
    elif case == "tiny weights":
        a[::3], b[1::2] = 1e-30, 1e-35
    elif case == "far":  # nothing is worth moving
        y += 100
    elif case == "omega":
        options["relaxation"] = 1.95
    single = [t.float() for t in (x, y, 3 * a, b)]
    if case == "warm":
        options["init"] = tuple(torch.randn(k, device=device) for k in (150, 120))
    result, exact = sinkhorn(*single, **options), sinkhorn(x, y, 3 * a, b, **options)
    for t in (result.value, result.f, result.g, result.marginal_error):
        assert torch.isfinite(t).all()
    assert result.converged
    assert result.value.item() == pytest.approx(exact.value.item(), rel=2e-3)
    if case == "far":
        rho, mass_a, mass_b = 0.3 if cost == "euclidean" else 0.09, 3 * a.sum().item(), b.sum().item()
        assert result.value.item() == pytest.approx(rho * (mass_a + mass_b) + 5e-3 * mass_a * mass_b, rel=1e-3)


# Batches


@pytest.mark.parametrize("cost", [*COSTS, "l1", 1.5])
@pytest.mark.parametrize("reach", [None, 0.5])
def test_a_batch_is_its_problems(cost: Any, reach: Any, device: torch.device) -> None:
    for dim in (3, 30):
        x, y = torch.rand(5, 33, dim, device=device), torch.rand(5, 20, dim, device=device) + 0.3
        a = torch.rand(5, 33, device=device) + 0.1
        a = (a / a.sum(1, keepdim=True)).requires_grad_()
        x.requires_grad_()
        options: dict[str, Any] = {"cost": cost, "reach": reach}
        result, divergence = sinkhorn(x, y, a, **options), sinkhorn_divergence(x, y, a, **options)
        assert result.value.shape == divergence.shape == result.converged.shape == (5,)
        (gradient, weights) = torch.autograd.grad(divergence @ torch.arange(5.0, device=device), (x, a))
        values = torch.rand(20, 2, device=device)
        products = result.plan @ values.expand(5, 20, 2)
        for k in range(5):
            xk, ak = x[k].detach().requires_grad_(), a[k].detach().requires_grad_()
            one = sinkhorn(xk, y[k], ak, **options)
            assert torch.equal(one.f, result.f[k])
            assert torch.equal(one.value, result.value[k])
            assert torch.equal(one.iterations, result.iterations[k])
            assert torch.equal(one.plan @ values, products[k])
            value = sinkhorn_divergence(xk, y[k], ak, **options)
            assert torch.equal(value, divergence[k])
            for got, want in zip((gradient[k], weights[k]), torch.autograd.grad(k * value, (xk, ak)), strict=True):
                assert torch.allclose(got, want, rtol=1e-6, atol=1e-9)


def test_weights_of_one_problem_serve_a_batch(device: torch.device) -> None:
    x, y, b = torch.rand(3, 7, 2, device=device), torch.rand(3, 5, 2, device=device), torch.rand(5, device=device)
    b = (b / b.sum()).requires_grad_()
    value = sinkhorn_divergence(x, y, None, b)
    assert torch.equal(value, sinkhorn_divergence(x, y, None, b.expand(3, 5)))
    assert torch.autograd.grad(value.sum(), b)[0].shape == (5,)


def test_a_batch_warns_of_its_worst_problem() -> None:
    x, y = torch.rand(2, 50, 2), torch.rand(2, 50, 2)
    y[0] = x[0]
    with pytest.warns(UserWarning, match="not converged after 3 iterations"):
        result = sinkhorn(x, y, epsilon=1e-4, max_iter=3)
    assert not result.converged[1]


def test_vmap_makes_a_batch(device: torch.device) -> None:
    x, y = torch.rand(4, 9, 3, device=device, requires_grad=True), torch.rand(8, 3, device=device)
    a = torch.rand(9, device=device)
    a = a / a.sum()

    def divergence(x: Tensor) -> Tensor:
        return sinkhorn_divergence(x, y, a, epsilon=0.1)

    value = torch.func.vmap(divergence)(x)
    want = sinkhorn_divergence(x, y.expand(4, 8, 3), a, epsilon=0.1)
    assert torch.equal(value, want)
    assert torch.equal(*(torch.autograd.grad(t.sum(), x)[0] for t in (value, want)))
    grid = x.detach().reshape(2, 2, 9, 3)
    nested = torch.func.vmap(torch.func.vmap(divergence, in_dims=1), in_dims=2)(grid.permute(2, 1, 0, 3))
    assert torch.equal(nested.flatten(), want)
    of_batches = torch.func.vmap(lambda x: sinkhorn(x, y.expand(2, 8, 3), epsilon=0.1).f)(grid)
    assert torch.equal(of_batches.flatten(0, 1), sinkhorn(x, y.expand(4, 8, 3), epsilon=0.1).f)
    C = torch.rand(3, 5, 6, device=device)
    assert torch.equal(torch.func.vmap(lambda C: sinkhorn_matrix(C).value)(C), sinkhorn_matrix(C).value)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # jvp's own
def test_differentiating_transforms_are_refused(device: torch.device) -> None:
    x, y = torch.rand(9, 3, device=device), torch.rand(8, 3, device=device)
    for call in (
        lambda: torch.func.grad(lambda x: sinkhorn_divergence(x, y))(x),
        lambda: torch.func.vmap(torch.func.grad(lambda x: sinkhorn(x, y).value))(x[None]),
        lambda: torch.func.jvp(lambda x: sinkhorn_divergence(x, y), (x,), (x,)),
    ):
        with pytest.raises(NotImplementedError, match=r"sinkhorn.*: torch.func's grad, vjp, jvp"):
            call()


# Costs


@pytest.mark.parametrize("cost", ["half_sqeuclidean", "l1", "cosine", "dot", 0.7, 1.5, 3])
def test_other_costs(cost: Any, device: torch.device) -> None:
    (x, a), (y, b) = cloud(25, 3, device), cloud(30, 3, device)
    inputs = [t.requires_grad_() for t in (x - 0.3, y, a, b)]
    options: dict[str, Any] = {"cost": cost, "epsilon": 0.1, "tol": 1e-11, "max_iter": 20_000}
    result = sinkhorn(*inputs, **options)
    want = reference.sinkhorn(*inputs, 0.1, cost)
    assert result.value.item() == pytest.approx(want.item(), rel=1e-9)
    for got, other in zip(torch.autograd.grad(result.value, inputs), torch.autograd.grad(want, inputs), strict=True):
        if got.dim() == 1:  # defined up to a constant
            got, other = got - got.mean(), other - other.mean()
        assert torch.allclose(got, other, rtol=1e-6, atol=1e-8)
    C = reference.transport_cost_matrix(inputs[0], y, cost)
    P = torch.outer(a, b) * ((result.f[:, None] + result.g - C) / result.epsilon).exp()
    assert torch.allclose(result.plan.dense(), P, atol=1e-9)
    value = sinkhorn_divergence(*inputs, **options)
    assert value.item() == pytest.approx(reference.sinkhorn_divergence(*inputs, 0.1, cost).item(), rel=1e-7)


def test_powers_one_and_two_are_the_named_costs(device: torch.device) -> None:
    x, y = torch.rand(20, 3, device=device), torch.rand(30, 3, device=device)
    assert torch.equal(sinkhorn_divergence(x, y, cost=2), sinkhorn_divergence(x, y))
    assert torch.equal(sinkhorn_divergence(x, y, cost=1.0), sinkhorn_divergence(x, y, cost="euclidean"))


@pytest.mark.parametrize("reach", [None, 0.7])
@pytest.mark.parametrize("shape", [(1, 1), (40, 33), (200, 131)], ids=str)
def test_a_matrix_of_costs(shape: tuple[int, int], reach: float | None, device: torch.device) -> None:
    n, m = shape
    C = torch.rand(n, m, dtype=DOUBLE, device=device, requires_grad=True)
    _, a = cloud(n, 1, device)
    _, b = cloud(m, 1, device)
    inputs = [C, a.requires_grad_(), b.requires_grad_()]
    rho = (math.inf, math.inf) if reach is None else (reach, reach)
    f, g = reference.sinkhorn_potentials(C.detach(), a.detach(), b.detach(), 0.1, rho=rho)
    want = reference.transport_dual(C, a, b, f, g, 0.1, rho)
    result = sinkhorn_matrix(*inputs, epsilon=0.1, reach=reach, tol=1e-12, max_iter=5000)
    assert result.value.item() == pytest.approx(want.item(), rel=1e-10)
    for got, other in zip(torch.autograd.grad(result.value, inputs), torch.autograd.grad(want, inputs), strict=True):
        if got.dim() == 1 and reach is None:
            got, other = got - got.mean(), other - other.mean()
        assert torch.allclose(got, other, rtol=1e-6, atol=1e-9)
    single = sinkhorn_matrix(*(t.detach().float() for t in inputs), epsilon=0.1, reach=reach, tol=1e-4)
    assert single.value.item() == pytest.approx(want.item(), rel=1e-4)


def test_a_function_of_the_points(device: torch.device) -> None:
    (x, a), (y, b) = cloud(40, 3, device), cloud(33, 3, device)
    x.requires_grad_()

    def squared(x: Tensor, y: Tensor) -> Tensor:
        return (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)

    got, want = (sinkhorn(x, y, a, b, cost=cost, epsilon=0.1, tol=1e-11) for cost in (squared, "sqeuclidean"))
    assert got.value.item() == pytest.approx(want.value.item(), rel=1e-9)
    with pytest.raises(NotImplementedError, match="a matrix of costs says nothing of new points"):
        got.plan.potential(x)
    gradients = [torch.autograd.grad(result.value, x)[0] for result in (got, want)]
    assert torch.allclose(*gradients, atol=1e-9)
    assert torch.allclose(got.plan.barycentric_map(), want.plan.barycentric_map(), atol=1e-9)
    batch = sinkhorn(x.expand(2, 40, 3), y.expand(2, 33, 3), a, b, cost=squared, epsilon=0.1, tol=1e-11)
    assert torch.allclose(batch.value, got.value)


@pytest.mark.parametrize("cost", [*COSTS, "l1", 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_costs_in_memory_give_what_costs_computed_again_give(
    cost: Any, dtype: torch.dtype, device: torch.device
) -> None:
    for n, m, dim in ((1, 1, 24), (133, 70, 24), (70, 200, 65)):
        (x, a), (y, b) = cloud(n, dim, device, dtype), cloud(m, dim, device, dtype)
        options: dict[str, Any] = {"cost": cost, "tol": 1e-4 if dtype == torch.float32 else 1e-10}
        cached, computed = (sinkhorn(x, y, a, b, memory_limit=k, **options) for k in (1 << 30, 0))
        assert cached.value.item() == pytest.approx(
            computed.value.item(), rel=1e-5 if dtype == torch.float32 else 1e-11
        )
        assert cached.iterations == computed.iterations
        a[1::3] = 0
        a /= a.sum()
        for scaling in (None, 1 / 16):
            options |= {"scaling": scaling, "epsilon": 0.02 * dim, "max_iter": 300, "tol": 0.0}
            cached, computed = (sinkhorn(x, y, a, b, memory_limit=k, **options) for k in (1 << 30, 0))
            assert cached.value.item() == pytest.approx(
                computed.value.item(), rel=1e-4 if dtype == torch.float32 else 1e-9
            )
        divergence = sinkhorn_divergence(x, x.clone(), a, a.clone(), cost=cost)
        assert divergence.item() == 0


@pytest.mark.parametrize("reach", [1e4, 1e5, 1e7, 1e12])
def test_a_reach_beyond_all_points_is_none(reach: float, device: torch.device) -> None:
    for n, m in ((500, 300), (1000, 4097)):
        x, y = torch.randn(n, 2, device=device), torch.randn(m, 2, device=device)
        soft, hard = (sinkhorn(x, y, epsilon=0.1, reach=r) for r in (reach, None))
        assert soft.converged
        assert soft.value.item() == pytest.approx(hard.value.item(), rel=1e-4)
        assert soft.iterations <= 2 * hard.iterations
        assert torch.allclose(soft.plan.sum(-1), hard.plan.sum(-1), atol=1e-6)


@pytest.mark.parametrize("power", [0.05, 0.3])
@pytest.mark.parametrize("dim", [2, 20])
def test_a_small_power_is_zero_at_distance_zero(power: float, dim: int, device: torch.device) -> None:
    x, y = torch.randn(40, dim, device=device), torch.randn(30, dim, device=device)
    y[:10] = x[:10]
    got = sinkhorn(x, y, cost=power, epsilon=0.1, tol=1e-5)
    C = reference.transport_cost_matrix(x.double(), y.double(), power)
    want = sinkhorn_matrix(C, epsilon=0.1, tol=1e-9)
    assert got.value.item() == pytest.approx(want.value.item(), rel=1e-4)


@pytest.mark.parametrize("cost", ["half_sqeuclidean", "cosine", "dot"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mapped_half_points_are_computed_in_float(cost: Any, dtype: torch.dtype, device: torch.device) -> None:
    x, y = torch.randn(40, 3, device=device).to(dtype), torch.randn(30, 3, device=device).to(dtype)
    got, want = (sinkhorn(x.to(t), y.to(t), cost=cost, epsilon=0.3) for t in (dtype, torch.float32))
    assert got.value.dtype == torch.float32
    assert torch.equal(got.value, want.value)


def test_dot_of_far_points_keeps_its_digits(device: torch.device) -> None:
    x, y = torch.rand(40, 3, device=device), torch.rand(30, 3, device=device) + 1e6
    got = sinkhorn(x, y, cost="dot", epsilon=0.1)
    want = -(x.double() @ y.double().mean(0)).mean()  # up to the plan's part, of order 1
    assert got.value.item() == pytest.approx(want.item(), rel=1e-6)


def test_masses_not_quite_equal(device: torch.device) -> None:
    (x, a), (y, b) = cloud(40, 2, device, torch.float32), cloud(30, 2, device, torch.float32)
    b = b * (1 + 5e-5)
    plan = sinkhorn(x, y, a, b, epsilon=0.1, tol=1e-5).plan
    values = torch.ones(30, device=device)
    assert torch.allclose(plan @ values, plan.dense() @ values, rtol=1e-5)
    assert torch.allclose(plan.T.sum(-2), plan.sum(-1), rtol=1e-5)


# The plan


@pytest.mark.parametrize("cost", [*COSTS, "l1", "cosine", 1.5])
@pytest.mark.parametrize("reach", [None, 0.4])
def test_plan(cost: Any, reach: float | None, device: torch.device) -> None:
    (x, a), (y, b) = cloud(70, 3, device), cloud(45, 3, device)
    y = y + 5 if cost != "cosine" else y
    result = sinkhorn(x, y, a, b, cost=cost, reach=reach, epsilon=0.1, tol=1e-10, max_iter=5000)
    plan = result.plan
    C = reference.transport_cost_matrix(x, y, cost)
    P = torch.outer(a, b) * ((result.f[:, None] + result.g - C) / result.epsilon).exp()
    assert plan.shape == (70, 45)
    assert plan.T.shape == (45, 70)
    assert torch.allclose(plan.dense(), P, atol=1e-12)
    assert torch.allclose(plan.T.dense(), P.T, atol=1e-12)
    values, weights = torch.rand(45, 4, dtype=DOUBLE, device=device), torch.rand(70, dtype=DOUBLE, device=device)
    assert torch.allclose(plan @ values, P @ values, atol=1e-12)
    assert torch.allclose(plan.T @ weights, P.T @ weights, atol=1e-12)
    assert torch.allclose(plan.sum(-1), P.sum(1), atol=1e-12)
    assert torch.allclose(plan.sum(-2), P.sum(0), atol=1e-12)
    assert torch.allclose(plan.barycentric_map(), P @ y / P.sum(1, keepdim=True), atol=1e-9)
    assert torch.equal(plan.argmax(), P.argmax(1))
    assert torch.allclose(plan.rows(3, 9), P[3:9], atol=1e-12)
    if reach is None:
        assert torch.allclose(plan.sum(-1), a, atol=1e-9)
    assert torch.autograd.gradcheck(lambda v: plan @ v, values.requires_grad_())
    with pytest.raises(ValueError, match="the matrix has 3150 entries, more than the limit of 100"):
        plan.dense(100)
    with pytest.raises(ValueError, match=r"values must have shape \(45,\), or one more dimension"):
        plan @ weights


def test_plan_in_float(device: torch.device) -> None:
    x, y = torch.rand(300, 20, device=device) + 100, torch.rand(200, 20, device=device) - 100
    result = sinkhorn(x, y, tol=1e-5)
    P = result.plan.dense()
    assert P.dtype == torch.float32
    values = torch.rand(200, 3, device=device)
    assert torch.allclose(result.plan @ values, P @ values, rtol=1e-3)
    assert (result.plan.sum(-1) - 1 / 300).abs().sum() < 1e-3


@pytest.mark.parametrize("cost", [*COSTS, "l1", "cosine", "dot", 1.5])
def test_potentials_at_new_points(cost: Any, device: torch.device) -> None:
    (x, a), (y, b) = cloud(50, 3, device), cloud(40, 3, device)
    for reach in (None, 0.6) if cost != "dot" else (None,):
        result = sinkhorn(x, y, a, b, cost=cost, reach=reach, epsilon=0.1, tol=1e-12, max_iter=5000)
        assert torch.allclose(result.plan.potential(x), result.f, atol=1e-9)
        assert torch.allclose(result.plan.T.potential(y), result.g, atol=1e-9)
        points = torch.rand(5, 3, dtype=DOUBLE, device=device, requires_grad=True)
        assert torch.autograd.gradcheck(result.plan.potential, points, atol=1e-6)


def test_a_new_point_moves_no_others_potential(device: torch.device) -> None:
    x, y = torch.randn(60, 3, device=device), torch.randn(50, 3, device=device) + 1
    plan = sinkhorn(x, y, epsilon=0.5).plan
    near, far = x[:3].clone().requires_grad_(), torch.full((3, 3), 1e5, device=device)
    alone, among = plan.potential(near), plan.potential(torch.cat([near, far]))[:3]
    assert torch.equal(alone, among)
    gradients = [torch.autograd.grad(f.sum(), near)[0] for f in (alone, among)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("cost", [*COSTS, "matrix"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_barycentric_map_of_rows_without_weight(cost: str, dtype: torch.dtype, device: torch.device) -> None:
    (x, a), (y, b) = cloud(60, 2, device, dtype), cloud(50, 2, device, dtype)
    a[::3] = 0
    a /= a.sum()
    options: dict[str, Any] = {"epsilon": 0.1, "tol": 1e-5}
    if cost == "matrix":
        result = sinkhorn_matrix(torch.cdist(x, y), a, b, targets=y, **options)
        C = torch.cdist(x, y).double()
    else:
        result = sinkhorn(x, y, a, b, cost=cost, **options)
        C = reference.transport_cost_matrix(x.double(), y.double(), cost)
    rows = ((result.g.double() - C) / 0.1 + b.double().log()).softmax(1)
    want = (rows @ y.double()).to(dtype)
    assert torch.allclose(result.plan.barycentric_map(), want, atol=1e-4 if dtype == torch.float32 else 1e-12)


# GeomLoss's interface


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reach", [None, 0.5])
@pytest.mark.parametrize("debias", [True, False])
def test_samples_loss(p: int, reach: float | None, debias: bool, device: torch.device) -> None:
    (x, a), (y, b) = cloud(40, 3, device), cloud(30, 3, device)
    x.requires_grad_()
    loss = SamplesLoss("sinkhorn", p, 0.3, reach, debias=debias, tol=1e-11, max_iter=5000)
    cost, epsilon = "euclidean" if p == 1 else "half_sqeuclidean", 0.3**p
    rho = (math.inf, math.inf) if reach is None else (reach**p, reach**p)
    want = (reference.sinkhorn_divergence if debias else reference.sinkhorn)(x, y, a, b, epsilon, cost, rho)
    got = loss(a, x, b, y)
    assert got.item() == pytest.approx(want.item(), rel=1e-9)
    assert torch.allclose(*(torch.autograd.grad(t, x)[0] for t in (got, want)), rtol=1e-6, atol=1e-9)
    assert loss(None, a, x, None, b, y).item() == got.item()
    batch = loss(a.expand(2, 40), x.expand(2, 40, 3), b.expand(2, 30), y.expand(2, 30, 3))
    assert torch.allclose(batch, got.expand(2))
    by_hand = SamplesLoss("sinkhorn", p, 0.3, reach, debias=debias, tol=1e-11, max_iter=5000)
    by_hand.cost = lambda x, y: torch.stack(
        [reference.transport_cost_matrix(one, other, cost) for one, other in zip(x, y, strict=True)]
    )
    assert by_hand(a, x, b, y).item() == pytest.approx(got.item(), rel=1e-8)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reach", [None, 0.5])
@pytest.mark.parametrize("debias", [True, False])
def test_samples_loss_is_that_of_geomloss(p: int, reach: float | None, debias: bool) -> None:
    geomloss = pytest.importorskip("geomloss")
    cpu = torch.device("cpu")
    (x, a), (y, b) = cloud(60, 2, cpu), cloud(50, 2, cpu)
    x.requires_grad_()
    a = a * (1.3 if reach else 1)
    options: dict[str, Any] = {"p": p, "blur": 0.2, "reach": reach, "debias": debias}
    theirs = geomloss.SamplesLoss("sinkhorn", scaling=0.995, backend="tensorized", **options)
    ours = SamplesLoss("sinkhorn", tol=1e-9, max_iter=5000, **options)
    values = [loss(a, x, b, y) for loss in (theirs, ours)]
    assert values[1].item() == pytest.approx(values[0].item(), rel=2e-3)
    if reach is None:  # with reach, its gradient is 7 % off its own finite differences
        want, got = (torch.autograd.grad(value, x)[0] for value in values)
        assert (got - want).norm() < 0.02 * want.norm()
        F, G = SamplesLoss("sinkhorn", tol=1e-9, max_iter=5000, potentials=True, **options)(a, x, b, y)
        assert ((a * F).sum() + (b * G).sum()).item() == pytest.approx(values[0].item(), rel=2e-3)


# Layouts and dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_points_are_computed_in_float(dtype: torch.dtype, device: torch.device) -> None:
    x, y = torch.rand(50, 3, device=device).to(dtype), torch.rand(40, 3, device=device).to(dtype)
    value = sinkhorn_divergence(x.requires_grad_(), y)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(sinkhorn_divergence(x.float(), y.float()).item(), rel=1e-6)
    value.backward()
    assert x.grad.dtype == dtype


def test_layouts(device: torch.device) -> None:
    x, y = torch.rand(3, 40, device=device).t(), torch.rand(60, 6, device=device)[::2, ::2]
    a = torch.rand(80, device=device)[::2]
    a = torch.stack([a / a.sum()] * 2, 1)[:, 0]
    got = sinkhorn(x, y, a)
    want = sinkhorn(x.contiguous(), y.contiguous(), a.contiguous())
    assert torch.equal(got.value, want.value)
    assert torch.equal(got.f, want.f)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's autocast is what this tests")
def test_autocast_computes_in_float() -> None:
    x, y = torch.rand(30, 3), torch.rand(30, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sinkhorn_divergence(x, y), sinkhorn_divergence(x.clone(), y))
        assert sinkhorn_divergence(x.bfloat16(), y).dtype == torch.float32


def test_compiled_code_gives_the_same(device: torch.device) -> None:
    x, y = torch.rand(30, 3, device=device, requires_grad=True), torch.rand(20, 3, device=device)

    def loss(x: Tensor) -> Tensor:
        return sinkhorn_divergence(x * 2, y).square()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for function in (loss, compiled):
        value = function(x)
        (gradient,) = torch.autograd.grad(value, x)
        if function is loss:
            want = (value, gradient)
    assert torch.equal(value, want[0])
    assert torch.equal(gradient, want[1])


def test_compiled_results_have_a_plan(device: torch.device) -> None:
    x, y = torch.rand(2, 9, 3, device=device, requires_grad=True), torch.rand(2, 8, 3, device=device)

    def loss(x: Tensor) -> Tensor:
        result = sinkhorn(x, y, cost="half_sqeuclidean", epsilon=0.1, reach=(1.0, None))
        moved = result.plan.barycentric_map().square().sum() + result.plan.times(x[:, :8]).sum()
        return result.value.sum() + moved + result.plan.potential(x).sum() + SamplesLoss()(x, y).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (got, want) = ((value, *torch.autograd.grad(value, x)) for value in (compiled(x), loss(x)))
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


# Refusals


def test_refusals(device: torch.device) -> None:
    x, y = torch.rand(5, 2, device=device), torch.rand(4, 2, device=device)
    a = torch.full((5,), 0.2, device=device)
    cases: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (ValueError, r"y must have the dimension of x \(2\), got 3", (x, torch.rand(4, 3, device=device)), {}),
        (ValueError, r"x must be points of shape \(count, dim\) or \(batch, count, dim\)", (x[0], y), {}),
        (ValueError, r"y must be points of shape .*, at least one of each", (x, y[:0]), {}),
        (ValueError, r"a must have shape \[5\], got \[4\]", (x, y, a[:4]), {}),
        (TypeError, "x must be a floating-point tensor", (x.int(), y), {}),
        (TypeError, "y must have the dtype of x", (x, y.double()), {}),
        (
            ValueError,
            'cost must be one of "sqeuclidean", .*, or a power of the distance, got .manhattan',
            (x, y),
            {"cost": "manhattan"},
        ),
        (ValueError, "cost as a power of the distance must be positive", (x, y), {"cost": -1.0}),
        (ValueError, "reach must be positive and finite, or None, got 0", (x, y), {"reach": 0}),
        (ValueError, "reach must be a number or a pair, got 3 values", (x, y), {"reach": (1, 2, 3)}),
        (TypeError, "reach must be a number", (x, y), {"reach": "far"}),
        (
            NotImplementedError,
            "cost .dot. is implemented for balanced transport only",
            (x, y),
            {"cost": "dot", "reach": 1},
        ),
        (ValueError, "memory_limit must not be negative", (x, y), {"memory_limit": -1}),
        (ValueError, "y must have the batch of x", (x[None], y), {}),
        (ValueError, "y must have the batch of x", (x.expand(2, 5, 2), y.expand(3, 4, 2)), {}),
        (ValueError, "epsilon must be positive", (x, y), {"epsilon": 0.0}),
        (ValueError, r"scaling must be in \(0, 1\)", (x, y), {"scaling": 1.0}),
        (ValueError, "tol must be finite and not negative", (x, y), {"tol": -1.0}),
        (ValueError, "max_iter must be at least 1", (x, y), {"max_iter": 0}),
        (ValueError, r"relaxation must be \"auto\" or in \[1, 2\)", (x, y), {"relaxation": 2.0}),
    ]
    for function, name in ((sinkhorn, "sinkhorn"), (sinkhorn_divergence, "sinkhorn_divergence")):
        for kind, message, arguments, options in cases:
            with pytest.raises(kind, match=f"{name}: {message}"):
                function(*arguments, **options)
    with pytest.raises(ValueError, match=r"init g must have shape \[4\], got \[5\]"):
        sinkhorn(x, y, init=(a, a))


def test_refusals_of_functions_matrices_and_plans(device: torch.device) -> None:
    x, y = torch.rand(5, 2, device=device), torch.rand(4, 2, device=device)
    f = torch.rand(5, device=device)

    def transposed(x: Tensor, y: Tensor) -> Tensor:
        return torch.cdist(y, x)

    for function, name in ((sinkhorn, "sinkhorn"), (sinkhorn_divergence, "sinkhorn_divergence")):
        with pytest.raises(ValueError, match=rf"{name}: the result of cost must have shape \[5, 4\], got \[4, 5\]"):
            function(x, y, cost=transposed, epsilon=0.1)
        with pytest.raises(TypeError, match=f"{name}: the result of cost must be a tensor, got float"):
            function(x, y, cost=lambda *_: 1.0, epsilon=0.1)
        with pytest.raises(ValueError, match=f"{name}: reach must be positive"):
            function(x, y, cost=torch.cdist, epsilon=0.1, reach=-1.0)
        with pytest.raises(ValueError, match=rf"{name}: cost must be one of .* got \['l1'\]"):
            function(x, y, cost=["l1"])
    with pytest.raises(ValueError, match=r"sinkhorn: init g must have shape \[4\], got \[5\]"):
        sinkhorn(x, y, cost="dot", init=(f, f))
    C = torch.cdist(x, y)
    with pytest.raises(TypeError, match="sinkhorn_matrix: targets must be a tensor"):
        sinkhorn_matrix(C, targets=1.0)
    with pytest.raises(ValueError, match=r"sinkhorn_matrix: targets must be the points of the columns of C"):
        sinkhorn_matrix(C, targets=x)
    plan = sinkhorn(x, y).plan
    with pytest.raises(ValueError, match="TransportPlan: points must have the batch and the dimension of the plan"):
        plan.potential(x[:, :1])
    with pytest.raises(TypeError, match="TransportPlan: points must have the dtype of the plan"):
        plan.potential(x.double())


def test_plan_of_a_function_goes_both_ways(device: torch.device) -> None:
    x, y = torch.rand(50, 2, device=device), torch.rand(40, 2, device=device)
    got, want = (sinkhorn(x, y, cost=cost, epsilon=0.1, tol=1e-5).plan for cost in (torch.cdist, "euclidean"))
    assert torch.allclose(got.T.barycentric_map(), want.T.barycentric_map(), atol=1e-4)
    ones = torch.ones(40, device=device)
    half = got @ ones.bfloat16()
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, (got @ ones).bfloat16())


def test_bad_values_are_refused_on_the_cpu() -> None:
    x, y = torch.rand(5, 2), torch.rand(4, 2)
    a = torch.full((5,), 0.2)
    with pytest.raises(ValueError, match="a and b must have the same sum"):
        sinkhorn(x, y, 2 * a)
    with pytest.raises(ValueError, match="a must be finite and not negative, with a positive sum"):
        sinkhorn(x, y, a * torch.tensor([1.0, 1, 1, 3, -1]))
    with pytest.raises(ValueError, match="a must be finite and not negative, with a positive sum"):
        sinkhorn(x, y, 0 * a)
    with pytest.raises(ValueError, match="y must be finite"):
        sinkhorn(x, y * math.nan)
    with pytest.raises(ValueError, match="x must be finite"):
        sinkhorn_divergence(x / 0, y)
    with pytest.raises(ValueError, match="init f must be finite"):
        sinkhorn(x, y, init=(a * math.inf, y[:, 0]))
    for function in (sinkhorn, sinkhorn_divergence):
        with pytest.raises(ValueError, match="x must be points whose squares do not overflow Float"):
            function(x * 1e20, y)
        with pytest.raises(ValueError, match="y must be points whose squares do not overflow Double"):
            function(x.double(), y.double() * 1e200)
        with pytest.raises(ValueError, match="x and y must be points whose squares do not overflow Float"):
            function(x, y * 1e20, cost="euclidean")


def test_nan_is_no_convergence(device: torch.device) -> None:
    x, y = torch.randn(60, 3, device=device), torch.randn(50, 3, device=device) + 1
    costs = torch.full((60, 50), 1e38, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [
            sinkhorn(x * 1e-20, y * 1e-20, max_iter=20),
            sinkhorn(x, y, init=(1e30 * x[:, 0], 1e30 * y[:, 0]), max_iter=20),
            sinkhorn_matrix(costs, epsilon=1e-3, max_iter=20),
        ]
    for result in results:
        assert not result.converged or torch.isfinite(result.value)
    with pytest.warns(UserWarning, match="not converged") if device.type == "cpu" else warnings.catch_warnings():
        assert not sinkhorn(x * 1e-20, y * 1e-20, max_iter=20).converged
