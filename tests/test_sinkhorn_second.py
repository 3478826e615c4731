"""Second derivatives of entropic transport: finite differences, closed forms, layouts, refusals."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from wgan_ext import reference, sinkhorn, sinkhorn_divergence, sinkhorn_matrix

DOUBLE = torch.float64
CONVERGED: dict[str, Any] = {"epsilon": 0.3, "tol": 1e-13, "max_iter": 20_000}
COSTS = ["sqeuclidean", "half_sqeuclidean", "euclidean", "l1", "cosine", "dot", 0.7, 1.5, 3]


def distances(x: Tensor, y: Tensor) -> Tensor:
    return (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)


def inputs(device: torch.device, *sizes: tuple[int, ...]) -> list[Tensor]:
    return [torch.rand(size, dtype=DOUBLE, device=device).requires_grad_() for size in sizes]


def hessian_product(value: Callable[..., Tensor], points: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
    gradients = torch.autograd.grad(value(*points), points, create_graph=True)
    return list(torch.autograd.grad(gradients, points, tangents))


@pytest.mark.parametrize(
    ("cost", "reach"),
    [(cost, r) for cost in (*COSTS, distances) for r in (None, 0.5, (0.7, None)) if cost != "dot" or r is None],
)
@pytest.mark.parametrize("debiased", [False, True])
def test_second_derivatives_are_those_of_finite_differences(
    cost: Any, debiased: bool, reach: Any, device: torch.device
) -> None:
    def value(x: Tensor, y: Tensor, logits_a: Tensor, logits_b: Tensor) -> Tensor:
        a, b = (t.softmax(0) if reach is None else t.exp() for t in (logits_a, logits_b))
        options = CONVERGED | {"cost": cost, "reach": reach}
        return sinkhorn_divergence(x, y, a, b, **options) if debiased else sinkhorn(x, y, a, b, **options).value

    assert torch.autograd.gradgradcheck(
        value, inputs(device, (6, 3), (5, 3), (6,), (5,)), eps=1e-5, atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("reach", [None, 0.5, (None, 0.7)], ids=str)
def test_second_derivatives_of_a_matrix(reach: Any, device: torch.device) -> None:
    def value(C: Tensor, logits_a: Tensor, logits_b: Tensor) -> Tensor:
        a, b = (t.softmax(-1) if reach is None else t.exp() for t in (logits_a, logits_b))
        return sinkhorn_matrix(C, a, b, reach=reach, **CONVERGED).value

    check = torch.autograd.gradgradcheck
    assert check(value, inputs(device, (6, 5), (6,), (5,)), eps=1e-5, atol=1e-6, rtol=1e-4)
    assert check(value, inputs(device, (2, 3, 4), (2, 3), (2, 4)), eps=1e-5, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("wanted", ["x", "y", "a", "b"])
@pytest.mark.parametrize("function", [sinkhorn, sinkhorn_divergence])
def test_one_input_alone(wanted: str, function: Any, device: torch.device) -> None:
    t = dict(zip("xyab", inputs(device, (6, 2), (5, 2), (6,), (5,)), strict=True))
    t = {name: (p if name in "xy" else p / p.sum()).detach() for name, p in t.items()}
    t[wanted].requires_grad_()

    def value(p: Tensor) -> Tensor:
        result = function(**(t | {wanted: p.softmax(0) if wanted in "ab" else p}), **CONVERGED)
        return getattr(result, "value", result).square()  # whose second derivative also has a part of the gradient

    assert torch.autograd.gradgradcheck(value, t[wanted], eps=1e-5, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reach", [None, 0.6])
def test_points_without_weight(reach: float | None, device: torch.device) -> None:
    x, y, a, b = inputs(device, (7, 2), (6, 2), (7,), (6,))
    with torch.no_grad():
        a[2], b[3:5] = 0, 0
        a /= a.sum()
        b /= b.sum()
    keep_x, keep_y = a.detach() > 0, b.detach() > 0
    tangents = [torch.randn_like(t) for t in (x, y)]

    def value(x: Tensor, y: Tensor) -> Tensor:
        return sinkhorn(x, y, a.detach(), b.detach(), reach=reach, **CONVERGED).value

    def value_of_kept(x: Tensor, y: Tensor) -> Tensor:
        return sinkhorn(x, y, a[keep_x].detach(), b[keep_y].detach(), reach=reach, **CONVERGED).value

    got = hessian_product(value, [x, y], tangents)
    points = [x[keep_x].detach().requires_grad_(), y[keep_y].detach().requires_grad_()]
    want = hessian_product(value_of_kept, points, [tangents[0][keep_x], tangents[1][keep_y]])
    for one, other, keep in zip(got, want, (keep_x, keep_y), strict=True):
        assert torch.allclose(one[keep], other, atol=1e-9)
        assert not one[~keep].any()


def test_the_weight_of_a_point_without_weight_can_rise(device: torch.device) -> None:
    x, y, a = inputs(device, (7, 2), (6, 2), (7,))
    with torch.no_grad():
        a[2] = 0

    def gradient(a: Tensor) -> Tensor:
        return torch.autograd.grad(sinkhorn(x, y, a, reach=0.6, **CONVERGED).value, a, create_graph=True)[0]

    step = torch.zeros_like(a)
    step[2] = 1e-5
    raised = gradient((a + step).detach().requires_grad_())
    (got,) = torch.autograd.grad(gradient(a), a, step / 1e-5)
    assert torch.allclose(got, (raised - gradient(a)) / 1e-5, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_a_translation_has_a_closed_form(dtype: torch.dtype, device: torch.device) -> None:
    # The plan stays, so the gradient 2 (a_i x_i - sum_j P_ij y_j) moves by 2 a_i t; a self term knows no translation.
    x = torch.rand(150, 3, device=device, dtype=dtype, requires_grad=True)
    y = torch.rand(90, 3, device=device, dtype=dtype) + 5
    a = torch.rand(150, device=device, dtype=dtype)
    a = a / a.sum()
    shift = torch.tensor([1.0, -2.0, 0.5], device=device, dtype=dtype).expand(150, 3)
    for cost, factor in (("sqeuclidean", 2), ("half_sqeuclidean", 1)):
        for function in (sinkhorn, sinkhorn_divergence):

            def value(x: Tensor, function: Any = function, cost: Any = cost) -> Tensor:
                result = function(x, y, a, cost=cost, tol=1e-5)
                return getattr(result, "value", result)

            (got,) = hessian_product(value, [x], [shift])
            assert torch.allclose(got, factor * a[:, None] * shift, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "l1", 1.5])
@pytest.mark.parametrize("dim", [2, 40])
def test_float_products_are_those_of_double(cost: Any, dim: int, device: torch.device) -> None:
    x, y = torch.randn(120, dim, dtype=DOUBLE, device=device), torch.randn(90, dim, dtype=DOUBLE, device=device) + 0.5
    tangent = torch.randn_like(x)
    epsilon = 0.2 * dim if cost == "sqeuclidean" else 0.2 * dim**0.5

    def product(dtype: torch.dtype, tol: float) -> Tensor:
        def value(p: Tensor) -> Tensor:
            return sinkhorn_divergence(p, y.to(dtype), cost=cost, epsilon=epsilon, tol=tol, max_iter=5000)

        return hessian_product(value, [x.detach().to(dtype).requires_grad_()], [tangent.to(dtype)])[0]

    got, want = product(torch.float32, 1e-5), product(DOUBLE, 1e-11)
    assert got.dtype == torch.float32
    assert (got.double() - want).norm() < 2e-3 * want.norm()
    half = torch.randn(9, 3, device=device).bfloat16().requires_grad_()
    (one,) = hessian_product(lambda p: sinkhorn(p, p.detach() + 1).value, [half], [torch.ones_like(half)])
    assert one.dtype == torch.bfloat16


def test_the_hessian_is_symmetric(device: torch.device) -> None:
    x, y = (t.detach().requires_grad_() for t in inputs(device, (30, 3), (20, 3)))
    value: Callable[..., Tensor] = lambda x, y: sinkhorn_divergence(x, y, cost="euclidean", **CONVERGED)  # noqa: E731
    u, v = ([torch.randn_like(t) for t in (x, y)] for _ in range(2))
    there = sum((p * q).sum() for p, q in zip(u, hessian_product(value, [x, y], v), strict=True))
    back = sum((p * q).sum() for p, q in zip(v, hessian_product(value, [x, y], u), strict=True))
    assert torch.allclose(torch.as_tensor(there), torch.as_tensor(back), rtol=1e-8)


def test_newtons_method_in_the_points(device: torch.device) -> None:
    torch.manual_seed(0)
    y = torch.rand(60, 2, dtype=DOUBLE, device=device)
    x = y[:8] + 0.01

    def value(x: Tensor) -> Tensor:
        return sinkhorn(x, y, **CONVERGED).value

    norms = []
    for _ in range(6):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(value(x), x)
        norms.append(gradient.norm().item())
        hessian = torch.autograd.functional.hessian(value, x.detach()).reshape(16, 16)
        x = x - torch.linalg.solve(hessian, gradient.flatten()).reshape(8, 2)
    assert norms[-1] < 1e-12 < norms[0]


# Layouts


@pytest.mark.parametrize("reach", [None, 0.5])
def test_a_batch_is_its_problems(reach: float | None, device: torch.device) -> None:
    x, y = inputs(device, (3, 9, 2), (3, 7, 2))
    b = torch.rand(3, 7, dtype=DOUBLE, device=device)
    b = (b / b.sum(1, keepdim=True)).requires_grad_()
    tangents = [torch.randn_like(t) for t in (x, y, b)]
    tangents[2] -= tangents[2].mean(1, keepdim=True)
    options: dict[str, Any] = CONVERGED | {"reach": reach}

    def value(x: Tensor, y: Tensor, b: Tensor) -> Tensor:
        return sinkhorn_divergence(x, y, None, b, **options).sum()

    batch = hessian_product(value, [x, y, b], tangents)
    for k in range(3):
        one = hessian_product(value, [t[k].detach().requires_grad_() for t in (x, y, b)], [t[k] for t in tangents])
        for got, want in zip(batch, one, strict=True):
            assert torch.allclose(got[k], want, atol=1e-9)


def test_all_products_at_once(device: torch.device) -> None:
    # torch maps the backward pass over the rows of the identity.
    x, y, a = inputs(device, (4, 2), (5, 2), (4,))
    for value in (
        lambda x: sinkhorn_divergence(x, y, (a / a.sum()).detach(), **CONVERGED),
        lambda x: sinkhorn_matrix(distances(x, y), (a / a.sum()).detach(), **CONVERGED).value,
    ):
        at_once, one_by_one = (
            torch.autograd.functional.hessian(value, x.detach(), vectorize=vectorize) for vectorize in (True, False)
        )
        assert torch.allclose(at_once, one_by_one, atol=1e-12)
    batch = torch.rand(3, 4, 2, dtype=DOUBLE, device=device, requires_grad=True)
    mapped = torch.func.vmap(lambda x: sinkhorn_divergence(x, y.detach(), **CONVERGED))
    tangent = torch.randn_like(batch)
    (got,) = hessian_product(lambda x: mapped(x).sum(), [batch], [tangent])
    (want,) = hessian_product(
        lambda x: sinkhorn_divergence(x, y.detach().expand(3, 5, 2), **CONVERGED).sum(), [batch], [tangent]
    )
    assert torch.allclose(got, want, atol=1e-12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's autocast is what this tests")
def test_autocast_changes_nothing() -> None:
    x, y = torch.rand(30, 3, requires_grad=True), torch.rand(30, 3)
    tangent = torch.randn(30, 3)
    (want,) = hessian_product(lambda x: sinkhorn_divergence(x, y), [x], [tangent])
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = hessian_product(lambda x: sinkhorn_divergence(x, y), [x], [tangent])
    assert torch.equal(got, want)


def test_the_operators_compile(device: torch.device) -> None:
    # torch.compile itself differentiates compiled code once; the product as an operator can stand within.
    x, y = torch.rand(9, 2, device=device), torch.rand(7, 2, device=device)
    result = sinkhorn(x, y, epsilon=0.3)
    plan: Any = result.plan

    def product(dx: Tensor) -> Tensor:
        h: Tensor = torch.ops.wgan_ext.sinkhorn_hessian(
            dx, None, None, None, x, y, None, None, *plan.centred, plan.epsilon, "sqeuclidean", 2.0, None, None
        )[0]
        return h * 2

    tangent = torch.randn_like(x)
    assert torch.equal(torch.compile(product, backend="aot_eager", fullgraph=True)(tangent), product(tangent))


def test_memory_grows_with_the_points_not_with_their_pairs() -> None:
    x, y = torch.rand(12_000, 2, requires_grad=True), torch.rand(15_000, 2)
    (gradient,) = torch.autograd.grad(sinkhorn(x, y, epsilon=1.0).value, x, create_graph=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.autograd.grad(gradient, x, torch.ones_like(x))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB; one matrix is 720 MB


def test_the_products_do_not_depend_on_the_threads() -> None:
    x, y = torch.rand(700, 3, requires_grad=True), torch.rand(600, 3)
    tangent = torch.randn(700, 3)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(hessian_product(lambda x: sinkhorn(x, y).value, [x], [tangent])[0])
    torch.set_num_threads(threads)
    assert torch.allclose(*results, rtol=1e-4, atol=1e-8)


# Refusals


@pytest.mark.parametrize("function", [sinkhorn, sinkhorn_divergence])
def test_third_derivatives_are_refused(function: Any, device: torch.device) -> None:
    x, y, a = inputs(device, (9, 2), (7, 2), (9,))
    weights = a.softmax(0)
    result = function(x, y, weights, epsilon=0.3)
    gradients = torch.autograd.grad(getattr(result, "value", result), (x, a), create_graph=True)
    second = torch.autograd.grad([g.square().sum() for g in gradients], (x, y, a), create_graph=True)
    for t in second:
        with pytest.raises(NotImplementedError, match="sinkhorn: third derivatives are not implemented"):
            torch.autograd.grad(t.sum(), x, retain_graph=True)


def test_third_derivatives_of_a_matrix_are_refused(device: torch.device) -> None:
    (C,) = inputs(device, (5, 4))
    (gradient,) = torch.autograd.grad(sinkhorn_matrix(C, epsilon=0.3).value, C, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), C, create_graph=True)
    with pytest.raises(NotImplementedError, match="sinkhorn: third derivatives are not implemented"):
        torch.autograd.grad(second.sum(), C)


def test_second_derivatives_of_new_potentials_are_refused(device: torch.device) -> None:
    (x,) = inputs(device, (5, 2))
    plan = sinkhorn(x.detach(), torch.rand(4, 2, dtype=DOUBLE, device=device)).plan
    (gradient,) = torch.autograd.grad(plan.potential(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="TransportPlan: second derivatives of a potential at new points"):
        torch.autograd.grad(gradient.sum(), x)


def test_a_cost_that_torch_differentiates_once_is_refused_by_torch(device: torch.device) -> None:
    (x,) = inputs(device, (5, 2))
    y = torch.rand(4, 2, dtype=DOUBLE, device=device)
    (gradient,) = torch.autograd.grad(sinkhorn(x, y, cost=torch.cdist, epsilon=0.1).value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="_cdist_backward"):
        torch.autograd.grad(gradient.sum(), x)


def test_reference_costs_are_differentiable_twice(device: torch.device) -> None:
    x, y = inputs(device, (6, 2), (5, 2))
    tangents = [torch.randn_like(t) for t in (x, y)]

    def by_function(x: Tensor, y: Tensor) -> Tensor:
        return sinkhorn(x, y, cost=lambda x, y: reference.transport_cost_matrix(x, y, 1.5), **CONVERGED).value

    got, want = (
        hessian_product(value, [x, y], tangents)
        for value in (lambda x, y: sinkhorn(x, y, cost=1.5, **CONVERGED).value, by_function)
    )
    assert all(torch.allclose(one, other, atol=1e-9) for one, other in zip(got, want, strict=True))
