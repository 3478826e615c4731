from __future__ import annotations

import math

import pytest
import scipy.spatial.distance
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wgan_ext import js_divergence, wasserstein_1d

LOG2 = math.log(2)


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def quantile_cost(x: Tensor, y: Tensor, a: Tensor, b: Tensor, p: float) -> float:
    """W_p of weighted samples by walking along both heaps, one shovel at a time."""
    heap_x = sorted(zip(x.tolist(), (a / a.sum()).tolist(), strict=True))
    heap_y = sorted(zip(y.tolist(), (b / b.sum()).tolist(), strict=True))
    total, (point_x, mass_x), (point_y, mass_y) = 0.0, heap_x.pop(), heap_y.pop()
    while True:
        moved = min(mass_x, mass_y)
        total += moved * abs(point_x - point_y) ** p
        mass_x, mass_y = mass_x - moved, mass_y - moved
        if mass_x <= 0 and heap_x:
            point_x, mass_x = heap_x.pop()
        elif mass_y <= 0 and heap_y:
            point_y, mass_y = heap_y.pop()
        else:
            return total ** (1 / p)


# Jensen-Shannon


def test_js_agrees_with_scipy_and_broadcasts(device: torch.device) -> None:
    p, q = rand(4, 1, 9), rand(3, 9) * 7  # not normalised
    p[..., 2] = 0
    q[0, 5] = 0
    expected = torch.tensor(scipy.spatial.distance.jensenshannon(*torch.broadcast_tensors(p, q), axis=-1) ** 2)
    value = js_divergence(p.to(device), q.to(device))
    assert value.shape == (4, 3)
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_js_of_disjoint_supports_is_log_2_to_the_last_bit(dtype: torch.dtype) -> None:
    p, q = torch.rand(50, 40).to(dtype), torch.rand(50, 40).to(dtype)
    p[:, 20:], q[:, :25] = 0, 0
    value = js_divergence(p, q)
    assert value.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert torch.equal(value, torch.full_like(value, LOG2))
    assert torch.equal(js_divergence(p, p), torch.zeros_like(value))


def test_js_keeps_its_digits_where_the_histograms_nearly_agree() -> None:
    p = rand(100) + 0.5
    p = p / p.sum()
    step = randn(100) * p
    step = step - p * step.sum()
    q = p + 1e-6 * step
    exact = (p * (q / p - 1).square()).sum() / 8  # JS = chi^2/8 + O(step^3)
    torch.testing.assert_close(js_divergence(p, q), exact, rtol=2e-5, atol=0)
    low = js_divergence(p.float(), (p + 1e-3 * step).float())
    torch.testing.assert_close(low.double(), js_divergence(p, p + 1e-3 * step), rtol=1e-3, atol=0)


def test_js_gradients_are_the_closed_form() -> None:
    p, q = rand(6), rand(6)
    p, q = (p / p.sum()).requires_grad_(), q / q.sum()
    (grad,) = torch.autograd.grad(js_divergence(p, q), p)
    plain = 0.5 * (2 * p / (p + q)).log()
    torch.testing.assert_close(grad, (plain - (p * plain).sum()).detach())
    inputs = (rand(2, 5).requires_grad_(), rand(5).requires_grad_())
    assert torch.autograd.gradcheck(js_divergence, inputs)
    assert torch.autograd.gradgradcheck(js_divergence, inputs)


def test_js_gradients_near_and_far_from_equality() -> None:
    q = rand(8) + 0.1
    q = q / q.sum()
    for p in (q * (1 + 1e-6 * randn(8)), q * 10 ** (randn(8) * 3), q.clone()):
        p = (p / p.sum()).requires_grad_()
        (grad,) = torch.autograd.grad(js_divergence(p, q), p)
        t = ((p - q) / (p + q)).detach()
        plain = 0.5 * torch.where(t.abs() < 0.5, t.log1p(), (2 * p / (p + q)).detach().log())
        torch.testing.assert_close(grad, plain - (p * plain).sum().detach(), rtol=1e-12, atol=1e-15)
    p = torch.tensor([1e-30, 1.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(js_divergence(p, torch.tensor([0.5, 0.5], dtype=torch.float64)), p)
    # derivative log(2p/(p + q))/2 in the first bin, less its mean under p, that of the second
    assert grad[0].item() == pytest.approx(0.5 * math.log(4e-30) - 0.5 * math.log(4 / 3), rel=1e-12)


def test_js_gives_a_generator_no_direction() -> None:
    p = torch.tensor([0.25, 0.75, 0, 0, 0], requires_grad=True)
    q = torch.tensor([0, 0, 0, 0.5, 0.5])
    (grad,) = torch.autograd.grad(js_divergence(p, q), p)
    assert torch.equal(grad, torch.zeros(5))


def test_js_gradients_are_finite_in_empty_bins() -> None:
    p = torch.tensor([0.0, 0.5, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.5, 0.1, 0.4, 0.0], dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad(js_divergence(p, q), (p, q), create_graph=True)
    assert grads[0][0] == 0
    assert grads[0][3] == 0
    seconds = torch.autograd.grad(sum(grad.square().sum() for grad in grads), (p, q))
    assert all(grad.isfinite().all() for grad in (*grads, *seconds))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12).flatmap(lambda k: st.tuples(*[st.lists(st.integers(0, 5), min_size=k, max_size=k)] * 3)))
def test_js_is_the_square_of_a_metric(rows: tuple[list[int], ...]) -> None:
    p, q, r = (torch.tensor(row, dtype=torch.float32) for row in rows)
    if not (p.any() and q.any() and r.any()):
        return
    pq, qr, pr = js_divergence(p, q), js_divergence(q, r), js_divergence(p, r)
    assert 0 <= pq <= torch.tensor(LOG2)
    assert torch.equal(pq, js_divergence(q, p))
    assert pr.sqrt() <= pq.sqrt() + qr.sqrt() + 1e-6


def test_js_errors_name_the_argument() -> None:
    p = torch.ones(3)
    with pytest.raises(
        ValueError, match=r"js_divergence: p and q must have the same number of bins .*\(3,\) and \(4,\)"
    ):
        js_divergence(p, torch.ones(4))
    with pytest.raises(ValueError, match=r"at least 1"):
        js_divergence(torch.ones(0), torch.ones(0))
    with pytest.raises(ValueError, match=r"batch dimensions must broadcast, got p \(2,\), q \(3,\)"):
        js_divergence(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(TypeError, match=r"js_divergence: p must be a floating-point tensor, got torch\.int64"):
        js_divergence(torch.ones(3, dtype=torch.int64), p)
    with pytest.raises(ValueError, match="js_divergence: q must not be negative"):
        js_divergence(p, torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match="js_divergence: p must be finite"):
        js_divergence(torch.tensor([1.0, math.nan, 1.0]), p)
    with pytest.raises(ValueError, match="js_divergence: p must be finite"):
        js_divergence(torch.tensor([1.0, math.inf, 1.0]), p)
    with pytest.raises(ValueError, match="js_divergence: q must have positive mass"):
        js_divergence(p, torch.zeros(3))


# Wasserstein on the line


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (7, 5), (6, 4), (100, 1), (1000, 999)])
def test_w1_agrees_with_scipy(n: int, m: int, device: torch.device) -> None:
    x, y, a, b = randn(n), randn(m) * 2 + 1, rand(n), rand(m)
    a[0] = b[0] = 0.5
    a[1:2] = 0  # a point that weighs nothing
    for weights in ((None, None), (a, None), (None, b), (a, b)):
        expected = scipy.stats.wasserstein_distance(x, y, *weights)
        value = wasserstein_1d(x.to(device), y.to(device), *(w if w is None else w.to(device) for w in weights))
        assert value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 10])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (6, 6), (7, 5), (4, 12), (50, 30)])
def test_wp_agrees_with_moving_earth(p: float, n: int, m: int) -> None:
    x, y, a, b = randn(n), randn(m) * 2 + 1, rand(n) + 0.1, rand(m) + 0.1
    one, other = torch.ones_like(x), torch.ones_like(y)
    assert wasserstein_1d(x, y, p=p).item() == pytest.approx(quantile_cost(x, y, one, other, p), rel=1e-10)
    assert wasserstein_1d(x, y, a, b, p).item() == pytest.approx(quantile_cost(x, y, a, b, p), rel=1e-10)
    assert wasserstein_1d(x, y, one, p=p).item() == pytest.approx(wasserstein_1d(x, y, p=p).item(), rel=1e-12)


def test_batches_broadcast_and_layout_does_not_matter() -> None:
    x, y, a = randn(8, 3, 1).transpose(0, 2), randn(4, 5), rand(3, 8)[:, ::1]
    assert x.shape == (1, 3, 8)
    y = y.unsqueeze(1)
    for p in (1, 2):
        value = wasserstein_1d(x, y, a, p=p)
        assert value.shape == (4, 3)
        for i in range(4):
            for j in range(3):
                torch.testing.assert_close(value[i, j], wasserstein_1d(x[0, j], y[i, 0], a[j], p=p))
        plain = wasserstein_1d(x, y, p=p)
        torch.testing.assert_close(plain[2, 1], wasserstein_1d(x[0, 1], y[2, 0], p=p))
        assert wasserstein_1d(x[:, :0], y[:1, :0], p=p).shape == (1, 0)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "m"), [(5, 5), (5, 3)])
def test_w_differentiates_twice(p: float, weighted: bool, n: int, m: int) -> None:
    inputs = [randn(2, n).requires_grad_(), randn(2, m).requires_grad_()]
    if weighted:
        inputs += [(rand(n) + 0.1).requires_grad_(), (rand(2, m) + 0.1).requires_grad_()]

    def distance(x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        return wasserstein_1d(x, y, a, b, p)

    assert torch.autograd.gradcheck(distance, inputs, eps=1e-7, atol=1e-5)
    assert torch.autograd.gradgradcheck(distance, inputs, eps=1e-7, atol=1e-4)


def test_gradient_where_the_distance_is_zero_is_a_subgradient() -> None:
    x = randn(6).requires_grad_()
    for p in (1, 2, 3):
        for weights in (None, torch.ones(6, dtype=torch.float64)):
            (grad,) = torch.autograd.grad(wasserstein_1d(x, x.detach().flip(0), weights, p=p), x)
            assert (grad.abs() <= (1 / 6 + 1e-12 if p == 1 else 0)).all()


def test_moved_earth_pulls_a_generator_where_js_does_not() -> None:
    fake, real = (randn(20)).requires_grad_(), randn(20) + 100
    (grad,) = torch.autograd.grad(wasserstein_1d(fake, real), fake)
    torch.testing.assert_close(grad, torch.full_like(grad, -1 / 20))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision(dtype: torch.dtype, device: torch.device) -> None:
    x, y = (torch.randn(2, n, device=device).to(dtype) for n in (300, 200))
    a = torch.rand(2, 300, device=device).to(dtype)
    for p in (1, 2):
        for weights in (None, a):
            value = wasserstein_1d(x, y, weights, p=p)
            assert value.dtype is torch.float32
            exact = wasserstein_1d(x.double(), y.double(), None if weights is None else weights.double(), p=p)
            torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)


def test_extreme_scales_neither_overflow_nor_underflow() -> None:
    x, y = torch.randn(10), torch.randn(10) + 1
    for scale in (1e-30, 1e30):
        for p in (2, 7.5):
            torch.testing.assert_close(wasserstein_1d(x * scale, y * scale, p=p) / scale, wasserstein_1d(x, y, p=p))


def test_a_million_points_in_float32_lose_nothing_to_the_sum() -> None:
    n = 1_000_000
    x = torch.rand(n)
    for weights in (None, torch.rand(n)):
        assert wasserstein_1d(x, x + 0.25, weights, weights).item() == pytest.approx(0.25, rel=1e-6)
        assert wasserstein_1d(x, x + 0.25, weights, weights, p=2).item() == pytest.approx(0.25, rel=1e-6)


points = st.lists(st.integers(-20, 20), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(points, points, points, st.sampled_from([1, 2, 3.5]), st.integers(-5, 5))
def test_w_is_a_metric_and_moves_with_its_points(
    one: list[int], two: list[int], three: list[int], p: float, shift: int
) -> None:
    x, y, z = (torch.tensor(row, dtype=torch.float64) for row in (one, two, three))
    d = wasserstein_1d(x, y, p=p)
    assert wasserstein_1d(y, x, p=p).item() == pytest.approx(d.item(), rel=1e-12)
    assert d <= wasserstein_1d(x, z, p=p) + wasserstein_1d(z, y, p=p) + 1e-9
    assert wasserstein_1d(x + shift, y + shift, p=p).item() == pytest.approx(d.item(), rel=1e-12)
    assert wasserstein_1d(x, x + shift, p=p).item() == pytest.approx(abs(shift), rel=1e-12)
    assert wasserstein_1d(x.repeat(3), y.repeat(2), p=p).item() == pytest.approx(d.item(), rel=1e-12)
    assert wasserstein_1d(x, y).item() <= d.item() * (1 + 1e-12)  # W_1 <= W_p


def test_w_compiles() -> None:
    x, y, a = torch.randn(6), torch.randn(6), torch.rand(6)
    for p in (1, 2):
        compiled = torch.compile(lambda x, y, a, p=p: wasserstein_1d(x, y, a, p=p), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, y, a), wasserstein_1d(x, y, a, p=p))


def test_w_errors_name_the_argument() -> None:
    x = torch.randn(3)
    with pytest.raises(ValueError, match=r"wasserstein_1d: y must have points in its last dimension, got shape \(0,\)"):
        wasserstein_1d(x, x[:0])
    with pytest.raises(ValueError, match=r"wasserstein_1d: x must have points in its last dimension, got shape \(\)"):
        wasserstein_1d(x[0], x)
    with pytest.raises(ValueError, match=r"b must have one weight for each point of y \(3,\), got shape \(2,\)"):
        wasserstein_1d(x, x, b=x[:2])
    with pytest.raises(ValueError, match=r"batch dimensions must broadcast, got x \(2,\), y \(\), a \(3,\)"):
        wasserstein_1d(torch.randn(2, 3), x, torch.ones(3, 3))
    with pytest.raises(TypeError, match="wasserstein_1d: a must have the dtype of x"):
        wasserstein_1d(x, x, torch.ones(3, dtype=torch.float64))
    for p in (0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"p must be finite and at least 1, got {p}"):
            wasserstein_1d(x, x, p=p)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="wasserstein_1d: x must be finite"):
            wasserstein_1d(torch.tensor([0.0, bad, 1.0]), x)
    with pytest.raises(ValueError, match="wasserstein_1d: a must not be negative"):
        wasserstein_1d(x, x, torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match="wasserstein_1d: b must have positive mass"):
        wasserstein_1d(x, x, b=torch.zeros(3))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_both_sorts_give_the_same(p: float, weighted: bool) -> None:
    x, y = torch.randn(3, 50, requires_grad=True), torch.randn(3, 50)
    weights = (torch.rand(50), torch.rand(50)) if weighted else ()

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return wasserstein_1d(x, y, *weights, p=p)

    want = distance(x, y)  # by NumPy, with the order
    assert torch.equal(want, distance(x.detach(), y))  # without
    traced = torch.compile(distance, backend="aot_eager", fullgraph=True)(x, y)  # by torch
    assert torch.allclose(traced, want, rtol=1e-6)
    (gradient,), (other,) = (torch.autograd.grad(value.sum(), x) for value in (want, traced))
    assert torch.allclose(gradient, other, rtol=1e-5, atol=1e-8)
