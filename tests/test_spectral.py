from __future__ import annotations

import copy
import io
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import utils as torch_utils

import wgan_ext
from wgan_ext import _ops, reference
from wgan_ext.spectral_hook import SpectralNorm

# Weight and dim for every path of the kernels: whole rows, slabs of short and of long rows, stored by columns.
SHAPES: list[tuple[tuple[int, ...], int]] = [
    ((1, 1), 0),
    ((7,), 0),
    ((1, 9), 0),
    ((9, 1), 0),
    ((37, 53), 0),
    ((37, 53), 1),
    ((64, 3, 3, 3), 0),
    ((64, 32, 4, 4), 1),
    ((64, 3, 3, 3), 1),
    ((5, 70, 70), 1),
    ((6, 9, 1, 1), 1),
    ((5, 4, 3), 2),
    ((5, 4, 3), -2),
    ((200, 1000), 0),
    ((300, 40, 16), 1),
    ((20, 100, 100), 1),
]


PLAIN = (1.0, False)
"""A target norm of 1, for every weight."""


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def operands(
    shape: tuple[int, ...], dim: int, device: torch.device, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    weight = torch.randn(shape, dtype=torch.float64)
    rows = shape[dim]
    u, v = torch.randn(rows, dtype=torch.float64), torch.randn(math.prod(shape) // max(rows, 1), dtype=torch.float64)
    return [t.to(device, dtype) for t in (weight, u / u.norm(), v / v.norm())]


def pair(make: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, nn.Module]:
    """The same module normalized by torch and by us, in the same state."""
    module = make()
    torch.manual_seed(1)
    theirs = torch_utils.spectral_norm(copy.deepcopy(module), **options)
    torch.manual_seed(1)
    ours = wgan_ext.spectral_norm(copy.deepcopy(module), **options)
    return theirs, ours


# ---- the operator


@pytest.mark.parametrize("v_first", [True, False])
@pytest.mark.parametrize("n_power_iterations", [0, 1, 3])
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_operator(
    shape: tuple[int, ...], dim: int, n_power_iterations: int, v_first: bool, device: torch.device
) -> None:
    weight, u, v = operands(shape, dim, device)
    weight.requires_grad_()
    got = _ops.spectral_norm(weight, u, v, dim, n_power_iterations, 1e-12, v_first, *PLAIN)
    want = reference.spectral_norm(weight, u, v, dim, n_power_iterations, v_first)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    grad, grad_sigma = torch.randn_like(weight), torch.randn((), dtype=weight.dtype, device=device)
    for normalized, sigma in [(grad, grad_sigma), (grad, None), (None, grad_sigma)]:
        gradients = []
        for result in (got, want):
            loss = sum((x * g).sum() for x, g in ((result[0], normalized), (result[3], sigma)) if g is not None)
            gradients += torch.autograd.grad(loss, weight, retain_graph=True)
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10 * float(gradients[1].abs().max()) + 1e-14)


TARGETS = [(1.0, False), (0.3, False), (0.3, True), (1e3, True)]


@pytest.mark.parametrize(("target", "shrink_only"), TARGETS)
@pytest.mark.parametrize(("shape", "dim"), [((37, 53), 0), ((64, 3, 3, 3), 1), ((37, 53), 1)])
def test_target_norm(shape: tuple[int, ...], dim: int, target: float, shrink_only: bool, device: torch.device) -> None:
    weight, u, v = operands(shape, dim, device)
    want = reference.spectral_norm(weight, u, v, dim, 2, True, target, shrink_only)
    got = _ops.spectral_norm(weight, u, v, dim, 2, 1e-12, True, target, shrink_only)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
    assert torch.equal(got[0], weight) == (shrink_only and target > 1)


@pytest.mark.parametrize(("target", "shrink_only"), TARGETS)
def test_derivatives_with_a_target(target: float, shrink_only: bool, device: torch.device) -> None:
    weight, u, v = operands((4, 3), 0, device)
    _, u, v, _ = reference.spectral_norm(weight, u, v, 0, 20)

    def both(weight: Tensor) -> tuple[Tensor, Tensor]:
        normalized, _, _, sigma = _ops.spectral_norm(weight, u, v, 0, 0, 1e-12, True, target, shrink_only)
        return normalized, sigma

    weight.requires_grad_()
    assert gradcheck(both, (weight,))
    assert gradgradcheck(both, (weight,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_group_is_the_operator_of_each(dtype: torch.dtype, device: torch.device) -> None:
    """Bit for bit, whatever the sizes, orders, iterations and targets."""
    shapes = [((1, 1), 0), ((300, 1024), 0), ((37, 53), 1), ((3, 0), 0), ((600, 512), 0), ((64, 3, 3, 3), 1)] * 4
    each = [operands(shape, dim, device, dtype) for shape, dim in shapes]
    options = [(dim, i % 3, 1e-12, i % 2 == 0, *TARGETS[i % len(TARGETS)]) for i, (_, dim) in enumerate(shapes)]
    wants = [_ops.spectral_norm(*tensors, *rest) for tensors, rest in zip(each, options, strict=True)]
    got = _ops.spectral_norm_group(*map(list, zip(*each, strict=True)), *map(list, zip(*options, strict=True)))
    for want, result in zip(wants, zip(*got, strict=True), strict=True):
        for w, g in zip(want, result, strict=True):
            assert torch.equal(w, g)


def test_group_has_the_derivatives_of_each(device: torch.device) -> None:
    each = [operands(shape, 0, device) for shape in ((4, 3), (5, 2), (3, 3))]
    weights, us, vs = map(list, zip(*each, strict=True))
    weights[0].requires_grad_()
    weights[2].requires_grad_()
    options = ([0, 0, 0], [0, 0, 0], [1e-12] * 3, [1, 0, 1], [1.0, 1.0, 0.5], [0, 0, 1])

    def normalized(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        group = _ops.spectral_norm_group([a, weights[1], b], us, vs, *options)
        assert not group[0][1].requires_grad
        return group[0][0], group[0][2], group[3][0]

    assert gradcheck(normalized, (weights[0], weights[2]))
    assert gradgradcheck(normalized, (weights[0], weights[2]))


def test_sigma_alone(device: torch.device) -> None:
    weight, u, v = operands((6, 5), 0, device)
    weight.requires_grad_()
    want = _ops.spectral_norm(weight, u, v, 0, 2, 1e-12, True, *PLAIN)
    got = _ops.spectral_norm_sigma(weight, u, v, 0, 2, 1e-12, True)
    assert all(map(torch.equal, want[1:], got))
    assert gradcheck(lambda w: _ops.spectral_norm_sigma(w, got[0], got[1], 0, 0, 1e-12, True)[2], (weight,))
    assert gradgradcheck(lambda w: _ops.spectral_norm_sigma(w, got[0], got[1], 0, 0, 1e-12, True)[2], (weight,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_dtypes(shape: tuple[int, ...], dim: int, dtype: torch.dtype, device: torch.device) -> None:
    weight, u, v = operands(shape, dim, device, dtype)
    got = _ops.spectral_norm(weight, u, v, dim, 1, 1e-12, True, *PLAIN)
    want = reference.spectral_norm(weight.double(), u.double(), v.double(), dim)
    assert [t.dtype for t in got] == [dtype, dtype, dtype, torch.float32]
    error = max(torch.finfo(dtype).eps, 2e-6)
    for a, b, unit in zip(got, want, (want[0].abs().max(), 1, 1, want[3]), strict=True):
        assert (a.double() - b).abs().max() <= error * unit
    grad = torch.randn_like(weight)
    got_grad = _ops.spectral_norm_backward(grad, None, weight, u, v, want[3].float(), dim, *PLAIN)
    doubles = [t.double() for t in (weight, u, v)]
    want_grad = _ops.spectral_norm_backward(grad.double(), None, *doubles, want[3], dim, *PLAIN)
    assert got_grad.dtype == dtype
    assert (got_grad.double() - want_grad).abs().max() <= max(
        torch.finfo(dtype).eps, 2e-6
    ) * want_grad.abs().max() + 1e-6


def test_layouts(device: torch.device) -> None:
    weight, u, v = operands((6, 4, 5, 3), 0, device)
    want = _ops.spectral_norm(weight, u, v, 0, 1, 1e-12, True, *PLAIN)[0]
    strided = torch.empty(6, 4, 5, 6, dtype=weight.dtype, device=device)[..., ::2].copy_(weight)
    for given_weight in (strided, weight.to(memory_format=torch.channels_last), weight.mT.contiguous().mT):
        got = _ops.spectral_norm(given_weight, u.repeat_interleave(2)[::2], v, 0, 1, 1e-12, True, *PLAIN)[0]
        assert torch.equal(got, want)
        assert got.stride() == torch.empty_like(given_weight).stride()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 4)])
def test_empty(shape: tuple[int, ...], device: torch.device) -> None:
    weight = torch.empty(shape, device=device, requires_grad=True)
    u, v = torch.ones(shape[0], device=device), torch.ones(weight[:1].numel() if shape[0] else 3, device=device)
    normalized, new_u, new_v, _ = _ops.spectral_norm(weight, u, v, 0, 1, 1e-12, True, *PLAIN)
    assert normalized.shape == weight.shape
    assert torch.equal(new_u, u)
    assert torch.equal(new_v, v)
    assert torch.autograd.grad(normalized.sum(), weight)[0].shape == weight.shape


@pytest.mark.parametrize("v_first", [True, False])
@pytest.mark.parametrize(("shape", "dim"), [((3, 4), 0), ((3, 2, 2), 1), ((3, 4), 1), ((2, 3), -1), ((4,), 0)])
def test_derivatives(shape: tuple[int, ...], dim: int, v_first: bool, device: torch.device) -> None:
    """With iterations u and v follow the weight, which derivatives ignore: so hold them."""
    weight, u, v = operands(shape, dim, device)
    weight.requires_grad_()

    def normalized_and_sigma(weight: Tensor) -> tuple[Tensor, Tensor]:
        normalized, _, _, sigma = _ops.spectral_norm(weight, u, v, dim, 0, 1e-12, v_first, *PLAIN)
        return normalized, sigma

    assert gradcheck(normalized_and_sigma, weight)
    assert gradgradcheck(normalized_and_sigma, weight)
    sigma = torch.tensor(1.3, dtype=weight.dtype, device=device, requires_grad=True)
    grad = torch.randn_like(weight).requires_grad_()
    grad_sigma = torch.randn_like(sigma).requires_grad_()

    def backward(grad: Tensor | None, grad_sigma: Tensor | None, weight: Tensor, sigma: Tensor) -> Tensor:
        return _ops.spectral_norm_backward(grad, grad_sigma, weight, u, v, sigma, dim, *PLAIN)

    assert gradcheck(backward, (grad, grad_sigma, weight, sigma))
    assert gradgradcheck(backward, (grad, grad_sigma, weight, sigma))
    assert gradcheck(lambda g: backward(None, g, weight.detach(), sigma.detach()), grad_sigma)


def test_second_derivative_after_an_iteration(device: torch.device) -> None:
    weight, u, v = operands((5, 4, 3), 1, device)
    weight.requires_grad_()
    direction = torch.randn_like(weight)
    results = []
    for normalize in (
        lambda: _ops.spectral_norm(weight, u, v, 1, 2, 1e-12, True, *PLAIN),
        lambda: reference.spectral_norm(weight, u, v, 1, 2),
    ):
        normalized, _, _, sigma = normalize()
        (grad,) = torch.autograd.grad(normalized.pow(3).sum() * sigma, weight, create_graph=True)
        results += torch.autograd.grad((grad * direction).sum(), weight)
    torch.testing.assert_close(*results)


@settings(max_examples=40, deadline=None)
@given(st.integers(-30, 30), st.integers(1, 12), st.integers(1, 40), st.booleans(), st.integers(0, 1))
def test_scale_does_not_matter(exponent: int, rows: int, width: int, v_first: bool, dim: int) -> None:
    """Spectral norm is homogeneous; float32 goes from 1e-38 to 1e38, sigma squared would not."""
    shape = (width, rows)
    weight, u, v = operands(shape, dim, torch.device("cpu"), torch.float32)
    size = 2.0 ** round(exponent * 3.32)
    want = _ops.spectral_norm(weight, u, v, dim, 2, 1e-12, v_first, *PLAIN)
    got = _ops.spectral_norm(weight * size, u, v, dim, 2, 1e-12, v_first, *PLAIN)
    torch.testing.assert_close(got[3] / size, want[3], rtol=2e-6, atol=0)
    for a, b in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("v_first", [True, False])
@pytest.mark.parametrize(("shape", "dim"), [((64, 64), 0), ((64, 32, 4, 4), 1), ((5, 70, 70), 1), ((64, 64), 1)])
def test_first_rows_that_are_tiny(shape: tuple[int, ...], dim: int, v_first: bool, device: torch.device) -> None:
    weight, u, v = (t.float() for t in operands(shape, dim, device))
    weight[:2] *= 1e-40
    weight.movedim(dim, 0)[:8] *= 1e-40
    want = reference.spectral_norm(weight.double(), u.double(), v.double(), dim, 2, v_first)
    got = _ops.spectral_norm(weight, u, v, dim, 2, 1e-12, v_first, *PLAIN)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5)


def test_a_norm_that_is_negative_is_not_small() -> None:
    weight = -torch.eye(3)
    unit = torch.tensor([1.0, 0.0, 0.0])
    normalized = _ops.spectral_norm(weight, unit, unit, 0, 0, 1e-12, True, 0.5, True)[0]
    torch.testing.assert_close(normalized.abs(), 0.5 * torch.eye(3))


def test_iterations_find_the_largest_singular_value(device: torch.device) -> None:
    for v_first in (True, False):
        weight, u, v = operands((12, 5, 3), 1, device)
        _, u, v, sigma = _ops.spectral_norm(weight, u, v, 1, 500, 1e-12, v_first, *PLAIN)
        matrix = weight.movedim(1, 0).flatten(1)
        torch.testing.assert_close(sigma, torch.linalg.matrix_norm(matrix, 2))
        torch.testing.assert_close(matrix @ v, sigma * u)
        torch.testing.assert_close(matrix.T @ u, sigma * v)


@pytest.mark.parametrize("v_first", [True, False])
@pytest.mark.parametrize(("shape", "dim"), [((5, 7), 0), ((5, 7), 1), ((3, 4, 5), 1), ((3, 4, 70), 1)])
def test_zero_and_not_finite_weights_leave_the_vectors(
    shape: tuple[int, ...], dim: int, v_first: bool, device: torch.device
) -> None:
    weight, u, v = operands(shape, dim, device, torch.float32)
    for bad in (torch.zeros_like(weight), weight * torch.nan, weight / 0):
        bad.requires_grad_()
        normalized, new_u, new_v, sigma = _ops.spectral_norm(bad, u, v, dim, 2, 1e-12, v_first, *PLAIN)
        assert torch.equal(new_u, u)
        assert torch.equal(new_v, v)
        (grad,) = torch.autograd.grad(normalized.sum(), bad)
        if bad.detach().count_nonzero():
            assert sigma.isnan()
            assert normalized.isnan().all()
        else:
            assert float(sigma.detach()) == pytest.approx(1e-12)
            assert torch.equal(normalized, bad)
            assert grad.isfinite().all()


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    for shape, dim in [((600, 700), 0), ((600, 700), 1), ((300, 40, 36), 1), ((300, 20, 100), 1)]:
        weight, u, v = operands(shape, dim, torch.device("cpu"), torch.float32)
        for v_first in (True, False):
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                forward = _ops.spectral_norm(weight, u, v, dim, 2, 1e-12, v_first, *PLAIN)
                backward = _ops.spectral_norm_backward(weight.cos(), None, weight, *forward[1:], dim, *PLAIN)
                results.append((*forward, backward))
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


LEVELS = ["portable", "avx2", "avx512"]


@pytest.mark.parametrize("level", LEVELS[: LEVELS.index(wgan_ext.build_info().simd)])
def test_lower_vector_levels(level: str) -> None:
    """The level is chosen once in a process: run the operator's tests in others."""
    tests = "(test_operator and 1-True) or (test_operator and 1-False) or (test_dtypes and dtype0)"
    shown = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", tests, __file__],
        env=os.environ | {"WGAN_EXT_SIMD": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert " passed" in shown.stdout
    assert shown.returncode == 0, shown.stdout[-4000:]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"weight": torch.ones(3, 4, dtype=torch.int64)},
            TypeError,
            "weight must be a floating-point tensor, got Long",
        ),
        ({"weight": torch.tensor(1.0)}, ValueError, "weight must have at least one dimension"),
        ({"dim": 2}, IndexError, r"dim must be in \[-2, 1\] for a weight of shape \[3, 4\], got 2"),
        ({"u": torch.ones(4)}, ValueError, r"u must have shape \[3\], got \[4\]"),
        ({"v": torch.ones(4, 1)}, ValueError, r"v must have shape \[4\], got \[4, 1\]"),
        ({"v": torch.ones(4).double()}, TypeError, "v must have the dtype of weight"),
        ({"n": -1}, ValueError, "n_power_iterations must not be negative, got -1"),
        ({"eps": -1.0}, ValueError, "eps must not be negative, got -1"),
        ({"target": 0.0}, ValueError, "target must be positive, got 0"),
    ],
)
def test_operator_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"weight": torch.ones(3, 4), "u": torch.ones(3), "v": torch.ones(4), "dim": 0, "n": 1, "eps": 1e-12}
    arguments |= {"v_first": True, "target": 1.0}
    with pytest.raises(error, match=message):
        _ops.spectral_norm(*(arguments | change).values(), False)


# ---- the hook, beside torch's: what test_spectral_interfaces.py does not share with the parametrization


def test_surface_is_torchs() -> None:
    original = nn.Linear(4, 3)
    parameter = original.weight
    module = wgan_ext.spectral_norm(original)
    assert module is original
    assert module.weight_orig is parameter
    assert "weight" not in module._parameters
    assert module.weight.data_ptr() == parameter.data_ptr()
    assert {name for name, _ in module.named_parameters()} == {"weight_orig", "bias"}
    assert {name for name, _ in module.named_buffers()} == {"weight_u", "weight_v"}
    (hook,) = module._forward_pre_hooks.values()
    assert isinstance(hook, torch_utils.spectral_norm.__globals__["SpectralNorm"])
    assert module.state_dict()._metadata[""]["spectral_norm"] == {"weight.version": 1}
    pointers = module.weight_u.data_ptr(), module.weight_v.data_ptr()
    module(torch.ones(2, 4))
    assert (module.weight_u.data_ptr(), module.weight_v.data_ptr()) == pointers
    assert wgan_ext.spectral_norm(nn.Linear(4, 3), dim=-1).weight_u.shape == (4,)


@pytest.mark.parametrize("n_power_iterations", [0, -1])
def test_refuses_as_torch_does(n_power_iterations: int) -> None:
    module = wgan_ext.spectral_norm(nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match="Cannot register two spectral_norm hooks on the same parameter weight"):
        wgan_ext.spectral_norm(module)
    with pytest.raises(RuntimeError, match="Cannot register two spectral_norm hooks"):
        torch_utils.spectral_norm(module)
    with pytest.raises(RuntimeError, match="Cannot register two spectral_norm hooks"):
        wgan_ext.spectral_norm(torch_utils.spectral_norm(nn.Linear(4, 3)))
    with pytest.raises(KeyError, match="kernel"):
        wgan_ext.spectral_norm(nn.Linear(4, 3), "kernel")
    with pytest.raises(ValueError, match="cannot be applied as parameter `bias` is None"):
        wgan_ext.spectral_norm(nn.Linear(4, 3, bias=False), "bias")
    with pytest.raises(ValueError, match="can't have uninitialized parameters"):
        wgan_ext.spectral_norm(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="n_power_iterations must be at least 1"):
        wgan_ext.spectral_norm(nn.Linear(4, 3), n_power_iterations=n_power_iterations)
    with pytest.raises(IndexError, match=r"dim must be in \[-2, 1\], got 2"):
        wgan_ext.spectral_norm(nn.Linear(4, 3), dim=2)
    with pytest.raises(NotImplementedError, match="weight is complex"):
        wgan_ext.spectral_norm(nn.Linear(4, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="spectral_norm of 'weight' not found"):
        wgan_ext.remove_spectral_norm(nn.Linear(4, 3))


def test_registering_the_name_anew_is_refused() -> None:
    module = wgan_ext.spectral_norm(nn.Linear(4, 3))
    module.weight = nn.Parameter(torch.ones(3, 4))
    with pytest.raises(TypeError, match=r"cannot assign .* as parameter 'weight'"):
        module(torch.ones(2, 4))


@pytest.mark.parametrize("normalize", [torch_utils.spectral_norm, wgan_ext.spectral_norm])
def test_a_checkpoint_loads_after_removal(normalize: Callable[[nn.Module], nn.Module]) -> None:
    module = wgan_ext.remove_spectral_norm(normalize(nn.Linear(4, 3)))
    state = nn.Linear(4, 3).state_dict()
    module.load_state_dict(state)
    assert torch.equal(module.weight, state["weight"])


def test_old_checkpoints_are_converted() -> None:
    """Before version 1 the normalized weight was stored and v was not."""
    for strict in (True, False):
        theirs, ours = pair(lambda: nn.Linear(4, 3))
        theirs(torch.ones(2, 4))
        theirs.eval()(torch.ones(2, 4))
        state = dict(theirs.state_dict())
        del state["weight_v"]
        state["weight"] = theirs.weight.detach().clone()
        for m in (theirs, ours):
            m.load_state_dict(dict(state), strict=strict)
        assert equal_states(theirs, ours)
        with pytest.raises(RuntimeError, match=r'Missing key.*"weight_orig"'):
            ours.load_state_dict({"bias": state["bias"]})
    bare = dict(ours.state_dict().items())  # without metadata
    ours.load_state_dict(bare)


def test_copies() -> None:
    """After a forward with a graph torch refuses; the copy shares nothing and goes on alone."""
    model = nn.Sequential(wgan_ext.spectral_norm(nn.Linear(4, 4)), nn.ReLU(), wgan_ext.spectral_norm(nn.Linear(4, 1)))
    x = torch.ones(2, 4)
    model(x).sum().backward()
    first = copy.deepcopy(model)
    second = copy.deepcopy(first)
    first(x)
    third = copy.deepcopy(first)
    pickled = pickle.loads(pickle.dumps(model))
    pickled(x)
    fourth = copy.deepcopy(pickled)
    model[0].weight_u.zero_()
    for other in (first, second, third, pickled, fourth):
        assert other[0].weight_u.count_nonzero() == 4
        (hook,) = other[0]._forward_pre_hooks.values()
        assert type(hook) is SpectralNorm
        other(x).sum().backward()
        assert other[0].weight_orig.grad is not None
    state = first[0].state_dict()
    assert state._metadata[""]["spectral_norm"] == {"weight.version": 1}


def test_pickles_of_a_whole_module() -> None:
    module = wgan_ext.spectral_norm(nn.Linear(4, 3))
    module(torch.ones(2, 4))
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    torch.testing.assert_close(loaded.eval()(torch.ones(2, 4)), module.eval()(torch.ones(2, 4)))


def test_a_sparse_gradient(device: torch.device) -> None:
    theirs, ours = pair(lambda: nn.Embedding(5, 3, sparse=True).to(device))
    for module in (theirs, ours):
        module(torch.tensor([1, 1, 4], device=device)).sum().backward()
    torch.testing.assert_close(ours.weight_orig.grad, theirs.weight_orig.grad)
