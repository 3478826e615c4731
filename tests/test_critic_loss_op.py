"""The operator critic_loss against its specification; the layers are tested beside ``critic``."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from devices import DEVICES
from torch import Tensor

from wgan_ext import _ops, reference
from wgan_ext._ops import Function, Kind

Critic = tuple[list[Tensor], list[int], list[float]]


def record(kind: Kind, payload: list[int], sizes: list[int]) -> list[int]:
    return [kind, len(payload), *payload, len(sizes), *sizes]


def mlp(device: torch.device, function: Function = Function.LEAKY_RELU) -> Critic:
    """Two inputs, of 5 numbers and of one, into 7, 6 and 1."""
    shapes = ((7, 6), (7,), (6, 7), (6,), (1, 6), (1,))
    parameters = [torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for shape in shapes]
    program = [
        *record(Kind.RESHAPE, [1], [1]),
        *record(Kind.CAT, [1, 0, 2], [6]),
        *record(Kind.LINEAR, [3, 0, 1], [7]),
        *record(Kind.ACTIVATION, [4, function, 0], [7]),
        *record(Kind.LINEAR, [5, 2, 3], [6]),
        *record(Kind.ACTIVATION, [6, Function.LEAKY_RELU, 0], [6]),
        *record(Kind.LINEAR, [7, 4, 5], [1]),
    ]
    return parameters, program, [0.2]


def images(device: torch.device) -> Critic:
    """Images [2, 6, 6] by two convolutions to a patch of scores."""
    shapes = ((4, 2, 3, 3), (4,), (2, 4, 2, 2), (2,))
    parameters = [torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for shape in shapes]
    program = [
        *record(Kind.CONVOLUTION, [0, 0, 1, 0, 1, 2, 2, 1, 1, 1, 1, 0, 0], [4, 3, 3]),
        *record(Kind.ACTIVATION, [1, Function.LEAKY_RELU, 0], [4, 3, 3]),
        *record(Kind.CONVOLUTION, [2, 2, 3, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0], [2, 2, 2]),
    ]
    return parameters, program, [0.0]


def inputs(device: torch.device, rows: int) -> list[Tensor]:
    return [torch.randn(rows, 5, dtype=torch.float64, device=device), torch.randn(rows, device=device).double()]


# (rows, real, scored, first, count)
LAYOUTS = {
    "penalty alone": (5, 0, 0, 0, 5),
    "points behind": (9, 4, 7, 7, 2),
    "points at the real": (7, 3, 7, 0, 3),
    "points at the fake": (7, 3, 7, 3, 4),
    "points everywhere": (4, 3, 4, 0, 4),
}


def arguments(critic: Critic, x: list[Tensor], layout: str, *loss: Any, **options: Any) -> tuple[Any, ...]:
    parameters, program, scalars = critic
    _, real, scored, first, count = LAYOUTS[layout]
    dtype, channels_last = options.get("dtype", torch.float64), options.get("channels_last", False)
    return (x, parameters, program, scalars, True, real, scored, first, count, dtype, channels_last, *loss)


def assert_specified(arguments: tuple[Any, ...], tolerance: float = 1e-12) -> None:
    got, expected = _ops.critic_loss(*arguments), reference.critic_loss(*arguments)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert [t.requires_grad for t in got] == [True, False, False, False]
    gradients = (torch.autograd.grad(loss[0] * 3, arguments[1], allow_unused=True) for loss in (got, expected))
    for g, e in zip(*gradients, strict=True):
        assert (g is None) == (e is None)
        if g is not None:
            torch.testing.assert_close(g, e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", [Function.LEAKY_RELU, Function.SILU])
@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 6.0])
def test_is_as_specified(layout: str, function: Function, one_sided: bool, power: float, device: torch.device) -> None:
    x = inputs(device, LAYOUTS[layout][0])
    critic = mlp(device, function)
    norms = _ops.critic_loss(*arguments(critic, x, layout, 1.0, 0.0, False, 2.0))[3]
    for target in (0.0, norms.mean().item()):  # some norms on either side
        assert_specified(arguments(critic, x, layout, 10.0, target, one_sided, power))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_images(layout: str, channels_last: bool, device: torch.device) -> None:
    format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(LAYOUTS[layout][0], 2, 6, 6, dtype=torch.float64, device=device).to(memory_format=format)
    assert_specified(arguments(images(device), [x], layout, 0.5, 1.0, False, 2.0, channels_last=channels_last))


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_a_gradient_of_zero_has_a_finite_derivative(power: float, target: float, device: torch.device) -> None:
    parameters, program, scalars = mlp(device)
    with torch.no_grad():
        parameters[-2].zero_()
    x = inputs(device, 7)
    assert_specified(arguments((parameters, program, scalars), x, "points at the real", 10.0, target, False, power))


def test_a_norm_at_its_target_has_the_derivative_zero(device: torch.device) -> None:
    weight = torch.tensor([[3.0, 4.0]], dtype=torch.float64, device=device, requires_grad=True)
    x = [torch.randn(5, 2, dtype=torch.float64, device=device)]
    critic: Critic = [weight], record(Kind.LINEAR, [0, 0, -1], [1]), []
    for power in (1.0, 1.5, 2.0):
        assert_specified(arguments(critic, x, "penalty alone", 10.0, 5.0, False, power))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e30), (torch.float32, 1e-30), (torch.float64, 1e300)])
def test_norms_do_not_overflow(dtype: torch.dtype, size: float, device: torch.device) -> None:
    weight = torch.tensor([[3.0, 4.0]], dtype=dtype, device=device).mul(size).requires_grad_()
    x = [torch.ones(5, 2, dtype=dtype, device=device)]
    critic: Critic = [weight], record(Kind.LINEAR, [0, 0, -1], [1]), []
    loss, _, _, norms = _ops.critic_loss(*arguments(critic, x, "penalty alone", 1.0, 0.0, False, 1.0, dtype=dtype))
    torch.testing.assert_close(norms, torch.full_like(norms, 5 * size), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(gradient, torch.tensor([[0.6, 0.8]], dtype=dtype, device=device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("device", "given", "computed", "tolerance"),
    [
        (device, *types)
        for device in DEVICES
        for types in (
            (torch.float32, torch.float32, 1e-5),
            (torch.float16, torch.float32, 1e-3),
            (torch.bfloat16, torch.float32, 1e-2),
            (torch.float32, torch.float16, 1e-2),
            (torch.float32, torch.bfloat16, 1e-1),
        )
        if device != "cpu" or types[1] == torch.float32  # the engine has no 16-bit kernels for the CPU
    ],
    indirect=["device"],
)
def test_other_dtypes(
    layout: str, given: torch.dtype, computed: torch.dtype, tolerance: float, device: torch.device
) -> None:
    parameters, program, scalars = mlp(device)
    narrow = [t.detach().to(given).requires_grad_() for t in parameters]
    x = [t.to(given) for t in inputs(device, LAYOUTS[layout][0])]
    wide = [t.detach().double().requires_grad_() for t in narrow]
    loss = (10.0, 1.0, False, 2.0)
    got = _ops.critic_loss(*arguments((narrow, program, scalars), x, layout, *loss, dtype=computed))
    expected = reference.critic_loss(*arguments((wide, program, scalars), [t.double() for t in x], layout, *loss))
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g.double(), e, rtol=tolerance, atol=tolerance * 10)
    gradients = (
        torch.autograd.grad(got[0], narrow, allow_unused=True),
        torch.autograd.grad(expected[0], wide, allow_unused=True),
    )
    for g, e in zip(*gradients, strict=True):
        assert (g is None) == (e is None)
        if g is not None and e is not None:
            assert g.dtype == given
            torch.testing.assert_close(g.double(), e, rtol=tolerance, atol=tolerance * e.abs().max().item() + 1e-6)


def test_loss_can_be_scaled_and_kept(device: torch.device) -> None:
    critic, x = mlp(device), inputs(device, 9)
    loss = _ops.critic_loss(*arguments(critic, x, "points behind", 10.0, 1.0, False, 2.0))[0]
    once = torch.autograd.grad(loss, critic[0], retain_graph=True)
    twice = torch.autograd.grad(loss, critic[0], torch.tensor(-2.0, dtype=torch.float64, device=device))
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(b, -2 * a, rtol=1e-12, atol=1e-12)


def test_without_gradients(device: torch.device) -> None:
    critic, x = mlp(device), inputs(device, 9)
    options = arguments(critic, x, "points behind", 10.0, 1.0, False, 2.0)
    with torch.no_grad():
        got = _ops.critic_loss(*options)
    assert not any(t.requires_grad for t in got)
    torch.testing.assert_close(got, reference.critic_loss(*options))


def test_refuses_a_second_derivative_by_name(device: torch.device) -> None:
    critic, x = mlp(device), inputs(device, 9)
    loss = _ops.critic_loss(*arguments(critic, x, "points behind", 10.0, 1.0, False, 2.0))[0]
    gradients = torch.autograd.grad(loss, critic[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r'differentiable once.*engine="autograd"'):
        torch.autograd.grad(gradients[0].sum(), critic[0])


class Stop(torch.autograd.Function):
    """Passes no gradient on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("create_graph", [False, True])
def test_an_undefined_gradient_does_nothing(create_graph: bool, device: torch.device) -> None:
    critic, x = mlp(device), inputs(device, 9)
    loss = _ops.critic_loss(*arguments(critic, x, "points behind", 10.0, 1.0, False, 2.0))[0]
    gradients = torch.autograd.grad(
        Stop.apply(loss), critic[0], retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    assert all(gradient is None or not gradient.any() for gradient in gradients)
    after = torch.autograd.grad(loss, critic[0])
    again = _ops.critic_loss(*arguments(critic, x, "points behind", 10.0, 1.0, False, 2.0))[0]
    for got, expected in zip(after, torch.autograd.grad(again, critic[0]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_refuses_no_input(requires_grad: bool) -> None:
    """In a process of its own, which a crash would end."""
    code = f"""
import torch, wgan_ext
parameters = [torch.ones(1, 1, requires_grad={requires_grad})]
for program in [], [{int(Kind.CONSTANT)}, 1, 0, 1, 1]:
    options = parameters, program, [], True, 2, 4, 0, 4, torch.float32, False, 10.0, 1.0, False, 2.0
    try:
        torch.ops.wgan_ext.critic_loss([], *options)
    except ValueError as error:
        assert "x must hold at least one tensor" in str(error), error
    else:
        raise AssertionError(program)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_refuses_to_differentiate_x(device: torch.device) -> None:
    x = [t.requires_grad_() for t in inputs(device, 9)]
    options = arguments(mlp(device), x, "points behind", 10.0, 1.0, False, 2.0)
    with pytest.raises(NotImplementedError, match=r'critic_loss: x.*engine="autograd"'):
        _ops.critic_loss(*options)


@pytest.mark.parametrize(
    ("layout", "change", "match"),
    [
        ("points behind", {5: 0}, "real must be from 1 to 6, of 7 scored, got 0"),
        ("points behind", {5: 7}, "real must be"),
        ("points behind", {7: 9, 8: 0, 6: 9}, "count must be at least 1"),
        ("points behind", {11: float("nan")}, "weight must be finite"),
        ("points behind", {12: float("inf")}, "target must be finite"),
        ("points behind", {14: 0.5}, "power must be at least 1"),
        ("penalty alone", {8: 4}, "must cover the 5 rows"),
    ],
)
def test_checks(layout: str, change: dict[int, Any], match: str, device: torch.device) -> None:
    x = inputs(device, LAYOUTS[layout][0])
    options = list(arguments(mlp(device), x, layout, 10.0, 1.0, False, 2.0))
    for i, value in change.items():
        options[i] = value
    with pytest.raises(ValueError, match=match):
        _ops.critic_loss(*options)
