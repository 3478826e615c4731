from __future__ import annotations

import copy
import gc
import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import wgan_ext
from wgan_ext import explain, input_gradient, reference

Gradients = list[Tensor | None]


def mlp(*widths: int, slope: float = 0.2, **options: Any) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(widths):
        layers += [nn.Linear(n, m, **options), nn.LeakyReLU(slope)]
    return nn.Sequential(*layers[:-1])


# Each critic with the shape of a batch for it.
CRITICS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(5, 16, 13, 1), (11, 5)),
    "one sample": (lambda: mlp(5, 16, 13, 1), (1, 5)),
    "relu": (lambda: nn.Sequential(nn.Linear(3, 17), nn.ReLU(), *mlp(17, 9, 1, slope=0.0)), (7, 3)),
    "without biases": (lambda: mlp(5, 9, 8, 1, bias=False), (6, 5)),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 1)), (6, 5)),
    "one layer": (lambda: nn.Linear(5, 3), (6, 5)),
    "linear twice": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1)), (6, 5)),
    "linear on top": (lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4), nn.Linear(4, 2)), (6, 5)),
    "linear below": (lambda: nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 1)), (6, 5)),
    "ends in an activation": (lambda: nn.Sequential(nn.Linear(5, 8), nn.LeakyReLU(0.1)), (6, 5)),
    "starts with activations": (
        lambda: nn.Sequential(nn.LeakyReLU(0.3), nn.LeakyReLU(0.5), nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 1)),
        (6, 5),
    ),
    "activation alone": (lambda: nn.Sequential(nn.LeakyReLU(0.3)), (6, 5)),
    "negative slope": (lambda: mlp(5, 9, 8, 1, slope=-0.5), (6, 5)),
    "steep slope": (lambda: mlp(5, 9, 8, 1, slope=1.5), (6, 5)),
    "sequences": (lambda: mlp(5, 9, 8, 2), (4, 3, 5)),
    "grids": (lambda: mlp(5, 9, 8, 1), (4, 2, 3, 5)),
    "flattened": (lambda: nn.Sequential(nn.Flatten(), *mlp(30, 9, 1)), (4, 2, 3, 5)),
    "flattened in part": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Flatten(1, 2), nn.Linear(4, 7), nn.ReLU(), nn.Flatten(-2)),
        (4, 2, 3, 5),
    ),
    "in place": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 7), nn.LeakyReLU(0.2, True)),
        (6, 5),
    ),
    "skips": (
        lambda: nn.Sequential(
            nn.Identity(), nn.Sequential(nn.Linear(5, 8), nn.Sequential(nn.ReLU()), nn.Dropout(0.0)), nn.Linear(8, 1)
        ),
        (6, 5),
    ),
    "images": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 5, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(),
            nn.Linear(5 * 4 * 3, 1),
        ),
        (4, 3, 16, 12),
    ),
    "patches": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 7, 3), nn.ReLU(), nn.Conv2d(7, 1, 2)
        ),
        (3, 2, 9, 7),
    ),
    "grouped, dilated, uneven": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, (3, 2), (2, 1), (0, 3), (1, 2), groups=2), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=8, bias=False), nn.LeakyReLU(),
            nn.Conv2d(8, 3, 1, padding="valid"), nn.Flatten(2), nn.Flatten(),
        ),
        (3, 4, 9, 7),
    ),
    "one channel": (lambda: nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Conv2d(1, 1, 3)), (3, 1, 9, 7)),
    "one pixel": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 1, 1)),
        (3, 3, 5, 5),
    ),
    "more than one tile": (lambda: nn.Sequential(nn.Conv2d(1, 40, 3), nn.ReLU(), nn.Conv2d(40, 1, 3)), (2, 1, 29, 29)),
}  # fmt: skip


def parameter_gradients(gradient: Tensor, module: nn.Module) -> Gradients:
    """The derivative of something that takes in every entry of the gradient in its own way."""
    weights = torch.linspace(0.5, 1.5, gradient.numel(), dtype=gradient.dtype, device=gradient.device)
    total = (gradient * weights.view(gradient.shape)).square().sum()
    parameters = list(module.parameters())
    return list(torch.autograd.grad(total, parameters, allow_unused=True)) if parameters else []


def assert_same(got: Gradients, expected: Gradients, **tolerance: float) -> None:
    """Equal values, and None in the same places."""
    assert [g is None for g in got] == [e is None for e in expected]
    for g, e in zip(got, expected, strict=True):
        if g is not None:
            torch.testing.assert_close(g, e, **(tolerance or {"rtol": 1e-12, "atol": 1e-12}))


@pytest.fixture(params=CRITICS)
def case(request: pytest.FixtureRequest, device: torch.device) -> tuple[nn.Module, Tensor]:
    make, shape = CRITICS[request.param]
    return make().to(device, torch.float64), torch.randn(shape, dtype=torch.float64, device=device)


def test_value_and_derivative_are_autograds(case: tuple[nn.Module, Tensor]) -> None:
    critic, x = case
    gradient = input_gradient(critic, x, engine="analytic")
    expected = reference.input_gradient(critic, x)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert_same(parameter_gradients(gradient, critic), parameter_gradients(expected, critic))


def test_float32_is_as_exact_as_autograds(case: tuple[nn.Module, Tensor]) -> None:
    critic, x = case
    expected = reference.input_gradient(critic, x)
    derivatives = parameter_gradients(expected, critic)
    single = copy.deepcopy(critic).float()
    gradient = input_gradient(single, x.float(), engine="analytic")
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)
    got = [g if g is None else g.double() for g in parameter_gradients(gradient, single)]
    assert_same(got, derivatives, rtol=1e-4, atol=1e-4)


@given(
    batch=st.integers(1, 70),
    widths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    slopes=st.lists(st.sampled_from([0.0, 0.01, 0.2, 1.0]), min_size=4, max_size=4),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_any_widths(batch: int, widths: list[int], slopes: list[float], seed: int) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for n, m, slope in zip(widths[:-1], widths[1:], slopes, strict=False):
        layers += [nn.Linear(n, m), nn.LeakyReLU(slope)]
    critic = nn.Sequential(*layers, nn.Linear(widths[-1], 1)).double()
    x = torch.randn(batch, widths[0], dtype=torch.float64)
    gradient, expected = input_gradient(critic, x, engine="analytic"), reference.input_gradient(critic, x)
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-12)
    got, want = parameter_gradients(gradient, critic), parameter_gradients(expected, critic)
    assert_same(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "strided"])
def test_layouts_of_the_input(layout: str, device: torch.device) -> None:
    make, shape = CRITICS["images"]
    for dtype in (torch.float32, torch.float64):
        critic, x = make().to(device, dtype), torch.randn(shape, dtype=dtype, device=device)
        y = {
            "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),  # noqa: B023
            "transposed": lambda: x.mT.contiguous().mT,  # noqa: B023
            "expanded": lambda: x[:1].expand(shape),  # noqa: B023
            "strided": lambda: x.repeat_interleave(2, 0)[::2],  # noqa: B023
        }[layout]()
        gradient, expected = input_gradient(critic, y, engine="analytic"), reference.input_gradient(critic, y)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(gradient, expected, **tolerance)
        for format in (torch.contiguous_format, torch.channels_last):
            cotangent = torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=format)
            got, want = (
                torch.autograd.grad(g, [*critic.parameters()], cotangent, retain_graph=True, allow_unused=True)
                for g in (gradient, expected)
            )
            assert_same(list(got), list(want), **tolerance)


@pytest.mark.parametrize("name", ["mlp", "images", "linear on top", "sequences"])
def test_gradcheck(name: str, device: torch.device) -> None:
    make, shape = CRITICS[name]
    critic = make().to(device, torch.float64)
    x = torch.randn(2, *shape[1:], dtype=torch.float64, device=device)
    weights = {n: p.detach().requires_grad_() for n, p in critic.named_parameters() if n.endswith("weight")}

    def gradient(*values: Tensor) -> Tensor:
        for key, value in zip(weights, values, strict=True):
            module, _, attribute = key.rpartition(".")
            delattr(critic.get_submodule(module), attribute)
            setattr(critic.get_submodule(module), attribute, value)
        return input_gradient(critic, x, engine="analytic")

    torch.autograd.gradcheck(gradient, tuple(weights.values()), fast_mode=True)


def test_second_derivative_is_refused_by_name() -> None:
    critic, x = mlp(3, 8, 1), torch.randn(4, 3)
    total = input_gradient(critic, x, engine="analytic").square().sum()
    derivatives = torch.autograd.grad(total, [critic[0].weight], create_graph=True)
    with pytest.raises(NotImplementedError, match="critic_input_gradient is differentiable once"):
        derivatives[0].sum().backward()


def test_autograd_engine_differentiates_on() -> None:
    critic, x = mlp(3, 8, 1), torch.randn(4, 3)
    total = input_gradient(critic, x, engine="autograd").square().sum()
    derivatives = torch.autograd.grad(total, [critic[0].weight], create_graph=True)
    derivatives[0].square().sum().backward()
    assert critic[2].weight.grad is not None


def test_smooth_critics_have_a_second_derivative_in_x() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    gradient = input_gradient(lambda x: (x**3).sum(1), x)
    torch.testing.assert_close(gradient, 3 * x**2)
    torch.testing.assert_close(torch.autograd.grad(gradient.sum(), x)[0], 6 * x)


def test_derivative_in_x_is_zero_for_the_analytic_engine() -> None:
    critic, x = mlp(3, 8, 1), torch.randn(4, 3, requires_grad=True)
    (derivative,) = torch.autograd.grad(input_gradient(critic, x, engine="analytic").sum(), x)
    assert torch.equal(derivative, torch.zeros_like(x))


@pytest.mark.parametrize("engine", ["analytic", "autograd"])
def test_input_is_left_alone(engine: Any) -> None:
    critic = mlp(3, 8, 1)
    for requires_grad in (False, True):
        x = torch.randn(4, 3, requires_grad=requires_grad)
        before = x.detach().clone()
        input_gradient(critic, x, engine=engine).square().sum().backward()
        assert x.requires_grad == requires_grad
        assert torch.equal(x.detach(), before)
        assert x.grad is None or not x.grad.any()
    critic = nn.Sequential(nn.LeakyReLU(0.2), nn.Linear(3, 1))
    x = torch.randn(4, 3)
    before = x.clone()
    input_gradient(critic, x, engine=engine)
    assert torch.equal(x, before)


@pytest.mark.parametrize("engine", ["analytic", "autograd"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_only_the_value(mode: Any, engine: Any) -> None:
    critic = mlp(3, 8, 1)
    with mode():
        x = torch.randn(4, 3)
        gradient = input_gradient(critic, x, engine=engine)
    assert not gradient.requires_grad
    torch.testing.assert_close(gradient, reference.input_gradient(critic, x.clone()).detach())


def test_frozen_parameters_get_no_gradient() -> None:
    for frozen in (["0.weight"], ["2.weight", "4.weight"], ["0.bias", "2.weight"]):
        critic, x = mlp(3, 8, 7, 1).double(), torch.randn(4, 3, dtype=torch.float64)
        for name in frozen:
            critic.get_parameter(name).requires_grad_(False)
        expected = copy.deepcopy(critic)
        input_gradient(critic, x, engine="analytic").square().sum().backward()
        reference.input_gradient(expected, x).square().sum().backward()
        assert_same([p.grad for p in critic.parameters()], [p.grad for p in expected.parameters()])
    assert not input_gradient(critic.requires_grad_(False), x, engine="analytic").requires_grad


def test_tied_weights_add_up() -> None:
    for tie_modules in (False, True):
        layer = nn.Linear(6, 6)
        other = layer if tie_modules else nn.Linear(6, 6)
        other.weight = layer.weight
        critic = nn.Sequential(layer, nn.ReLU(), other, nn.ReLU(), nn.Linear(6, 1)).double()
        x = torch.randn(5, 6, dtype=torch.float64)
        got = parameter_gradients(input_gradient(critic, x, engine="analytic"), critic)
        assert_same(got, parameter_gradients(reference.input_gradient(critic, x), critic))


# Weights that are computed from others.

NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "legacy spectral_norm": nn.utils.spectral_norm,
    "legacy weight_norm": nn.utils.weight_norm,
    "wgan_ext's spectral_norm": wgan_ext.spectral_norm,
}


def normalized(norm: str, images: bool) -> nn.Sequential:
    wrap = NORMS[norm]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if images:
            layers = [wrap(nn.Conv2d(2, 6, 3)), nn.LeakyReLU(0.2), nn.Flatten(), wrap(nn.Linear(6 * 4 * 4, 1))]
        else:
            layers = [wrap(nn.Linear(5, 8)), nn.LeakyReLU(0.2), wrap(nn.Linear(8, 7)), nn.ReLU(), wrap(nn.Linear(7, 1))]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_normalized_weights_move_as_in_one_forward(norm: str, images: bool, training: bool) -> None:
    torch.manual_seed(1)
    critic = normalized(norm, images).train(training)
    torch.manual_seed(1)
    expected = normalized(norm, images).train(training)
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64) if images else torch.randn(3, 5, dtype=torch.float64)
    for _ in range(2):
        got = parameter_gradients(input_gradient(critic, x, engine="analytic"), critic)
        assert_same(got, parameter_gradients(reference.input_gradient(expected, x), expected))
        for a, b in zip(critic.buffers(), expected.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_explain_advances_nothing(norm: str) -> None:
    critic = normalized(norm, images=False)
    before = copy.deepcopy(critic.state_dict())
    assert explain(critic, torch.randn(2, 5)).engine == "analytic"
    for key, value in critic.state_dict().items():
        assert torch.equal(value, before[key])


def test_each_parametrization_is_read_once() -> None:
    class Count(nn.Module):
        reads = 0

        def forward(self, weight: Tensor) -> Tensor:
            Count.reads += 1
            return 2 * weight

    critic = mlp(3, 8, 1)
    nn.utils.parametrize.register_parametrization(critic[0], "weight", Count())
    Count.reads = 0
    input_gradient(critic, torch.randn(2, 3), engine="analytic")
    assert Count.reads == 1


# Which engine.


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked(register: str) -> nn.Sequential:
    critic = mlp(3, 8, 1)
    getattr(critic[2], register)(lambda module, *args: None)
    return critic


def with_own_forward() -> nn.Sequential:
    critic = mlp(3, 8, 1)
    critic[0].forward = lambda x: 2 * nn.functional.linear(x, critic[0].weight)
    return critic


OBSTACLES: dict[str, tuple[Callable[[], Any], tuple[int, ...], str]] = {
    "smooth": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), (2, 3), "'1', Tanh"),
    "nested": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.GELU())), (2, 3), r"'1\.0', GELU"),
    "subclass": (lambda: nn.Sequential(Doubled(3, 4)), (2, 3), "Doubled.*class"),
    "subclassed container": (lambda: type("Critic", (nn.Sequential,), {})(nn.Linear(3, 1)), (2, 3), "Critic.*class"),
    "own forward": (with_own_forward, (2, 3), "forward of its own"),
    "forward hook": (lambda: hooked("register_forward_hook"), (2, 3), "forward hook"),
    "forward pre-hook": (lambda: hooked("register_forward_pre_hook"), (2, 3), "forward pre-hook"),
    "backward hook": (lambda: hooked("register_full_backward_hook"), (2, 3), "backward hook"),
    "backward pre-hook": (lambda: hooked("register_full_backward_pre_hook"), (2, 3), "backward hook"),
    "dropout": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)), (2, 3), "random in training"),
    "padding mode": (
        lambda: nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")),
        (2, 1, 5, 5),
        "mode 'reflect'",
    ),
    "uneven padding": (lambda: nn.Sequential(nn.Conv2d(1, 1, 2, padding="same")), (2, 1, 5, 5), "pads unevenly"),
    "function": (lambda: lambda x: x.square().sum(1), (2, 3), "not an nn.Module"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_other_critics_take_autograd_visibly(obstacle: str) -> None:
    make, shape, reason = OBSTACLES[obstacle]
    critic, x = make(), torch.randn(shape)
    plan = explain(critic, x)
    assert plan.engine == "autograd"
    with pytest.raises(NotImplementedError, match=f"input_gradient: the analytic engine cannot take.*{reason}"):
        input_gradient(critic, x, engine="analytic")
    torch.manual_seed(1)
    gradient = input_gradient(critic, x)
    torch.manual_seed(1)
    torch.testing.assert_close(gradient, reference.input_gradient(critic, x))


def test_hooks_on_all_modules_mean_autograd() -> None:
    critic, x, seen = mlp(3, 8, 1), torch.randn(2, 3), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        assert "all modules" in explain(critic, x).reason
        input_gradient(critic, x)
    finally:
        handle.remove()
    assert len(seen) == 4
    assert explain(critic, x).engine == "analytic"


def test_further_arguments_mean_autograd() -> None:
    class Conditional(nn.Module):
        def forward(self, x: Tensor, label: Tensor, *, gain: float) -> Tensor:
            return gain * (x * label[:, None]).sum(1)

    x, label = torch.randn(4, 3), torch.arange(4.0)
    gradient = input_gradient(Conditional(), x, critic_args=(label,), critic_kwargs={"gain": 3.0})
    torch.testing.assert_close(gradient, 3 * label[:, None].expand(4, 3))
    with pytest.raises(NotImplementedError, match="further arguments"):
        input_gradient(mlp(3, 8, 1), x, critic_args=(label,), engine="analytic")


def test_explain_prints_a_table() -> None:
    critic = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh()), nn.Linear(4, 1, bias=False))
    assert str(explain(critic, torch.randn(2, 3))).splitlines() == [
        "engine: autograd (layer '1.0', Tanh(), is of a class that the analytic engine does not know)",
        "layer                                                     engine    reason",
        "0      Linear(in_features=3, out_features=4, bias=True)   analytic",
        f"1.0    Tanh(){' ' * 45}autograd  is of a class that the analytic engine does not know",
        "2      Linear(in_features=4, out_features=1, bias=False)  analytic",
    ]
    assert str(explain(mlp(3, 1), torch.randn(2, 3))).splitlines()[0] == "engine: analytic"


def test_dropout_is_skipped_in_eval() -> None:
    critic = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 1)).eval()
    x = torch.randn(2, 3)
    torch.testing.assert_close(input_gradient(critic, x, engine="analytic"), reference.input_gradient(critic, x))


def test_batchnorm_in_training_warns() -> None:
    critic = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    with pytest.warns(UserWarning, match="input_gradient: the critic normalizes over the batch"):
        input_gradient(critic, torch.randn(5, 3))
    input_gradient(critic.eval(), torch.randn(5, 3))


def test_compiled_critics_are_unwrapped() -> None:
    critic, x = mlp(3, 8, 1), torch.randn(2, 3)
    compiled = torch.compile(critic, backend="eager")
    assert explain(compiled, x).engine == "analytic"
    assert torch.equal(input_gradient(compiled, x), input_gradient(critic, x))
    nested = nn.Sequential(torch.compile(mlp(3, 8, 4), backend="eager"), nn.ReLU(), nn.Linear(4, 1))
    torch.testing.assert_close(input_gradient(nested, x, engine="analytic"), reference.input_gradient(nested, x))


def test_data_parallel_critics_are_refused(tmp_path: Any) -> None:
    critic, x = mlp(3, 8, 1), torch.randn(2, 3)
    for engine in ("auto", "analytic", "autograd"):
        with pytest.raises(NotImplementedError, match=r"wrapped in DataParallel.*unsynchronised"):
            input_gradient(nn.DataParallel(critic), x, engine=engine)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(critic)
        with pytest.raises(
            NotImplementedError, match="input_gradient: the critic is wrapped in DistributedDataParallel"
        ):
            input_gradient(wrapped, x)
        with pytest.raises(NotImplementedError, match="explain: the critic is wrapped in DistributedDataParallel"):
            explain(wrapped, x)
    finally:
        torch.distributed.destroy_process_group()


# Precision.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_critics(dtype: torch.dtype, device: torch.device) -> None:
    for name in ("mlp", "images"):
        make, shape = CRITICS[name]
        critic, x = make().to(device, dtype), torch.randn(shape, device=device).to(dtype)
        expected = reference.input_gradient(copy.deepcopy(critic).double(), x.double())
        gradient = input_gradient(critic, x, engine="analytic")
        assert gradient.dtype == dtype
        tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
        torch.testing.assert_close(gradient.double(), expected.detach(), **tolerance)
        for parameter, derivative in zip(critic.parameters(), parameter_gradients(gradient, critic), strict=True):
            assert derivative is None or derivative.dtype == parameter.dtype


def test_autocast_keeps_parameters_and_gradients_in_float32(device: torch.device) -> None:
    critic, x = mlp(5, 32, 32, 1).to(device), torch.randn(16, 5, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        gradient = input_gradient(critic, x, engine="analytic")
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, reference.input_gradient(critic, x), rtol=0.05, atol=0.02)
    for derivative in parameter_gradients(gradient, critic):
        assert derivative is None or derivative.dtype == torch.float32
    with torch.autocast(device.type, dtype=torch.bfloat16):  # a 16-bit input, as from a generator under autocast
        again = input_gradient(critic, x.bfloat16(), engine="analytic")
    assert again.dtype == torch.bfloat16


def test_autocast_leaves_float64_alone(device: torch.device) -> None:
    critic, x = mlp(5, 8, 1).to(device, torch.float64), torch.randn(4, 5, dtype=torch.float64, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        gradient = input_gradient(critic, x, engine="analytic")
    torch.testing.assert_close(gradient, reference.input_gradient(critic, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_result_does_not_depend_on_threads_within_the_kernels(threads: int) -> None:
    make, shape = CRITICS["more than one tile"]
    critic, x = make().double(), torch.randn(shape, dtype=torch.float64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        gradient = input_gradient(critic, x, engine="analytic")
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(gradient, reference.input_gradient(critic, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("level", ["portable", "avx2"])
def test_simd_levels(level: str) -> None:
    """The level is chosen once a process."""
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_critic as t; t.check_some()"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "WGAN_EXT_SIMD": level, "OMP_NUM_THREADS": "1"}
    )


def check_some() -> None:
    for make, shape in map(CRITICS.__getitem__, ("relu", "more than one tile")):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
            critic, x = make().to(dtype), torch.randn(shape, dtype=dtype)
            gradient, expected = input_gradient(critic, x, engine="analytic"), reference.input_gradient(critic, x)
            torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)
            got, want = parameter_gradients(gradient, critic), parameter_gradients(expected, critic)
            assert_same(got, want, rtol=10 * tolerance, atol=10 * tolerance)


def test_graph_is_freed() -> None:
    critic, x = mlp(3, 8, 1), torch.randn(4, 3)
    input_gradient(critic, x).square().sum().backward()
    gc.collect()
    before = len([o for o in gc.get_objects() if type(o) is Tensor])
    for _ in range(3):
        input_gradient(critic, x).square().sum().backward()
    gc.collect()
    assert len([o for o in gc.get_objects() if type(o) is Tensor]) == before


# Errors.


@pytest.mark.parametrize(
    ("critic", "x", "error", "match"),
    [
        (mlp(3, 1), [1.0], TypeError, "input_gradient: x must be a tensor, got list"),
        (
            mlp(3, 1),
            torch.ones(2, 3, dtype=torch.int64),
            TypeError,
            "x must be a floating-point tensor, got torch.int64",
        ),
        (
            mlp(3, 1),
            torch.ones(0, 3),
            ValueError,
            r"x must hold at least one sample in dimension 0, got shape \(0, 3\)",
        ),
        (mlp(3, 1), torch.tensor(1.0), ValueError, "at least one sample"),
        (mlp(3, 1), torch.ones(3), ValueError, r"x must have shape \[B, \.\.\.\]"),
        (mlp(3, 1), torch.ones(2, 4), ValueError, r"layer 0 \(linear\) takes .* of 3, got shape \[2, 4\]"),
        (mlp(3, 1), torch.ones(2, 3).double(), TypeError, r"x must have the dtype of the critic \(torch.float32\)"),
        (
            mlp(3, 1),
            torch.ones(2, 3, device="meta"),
            ValueError,
            r"x must be on the device of the critic \(cpu\), got meta",
        ),
        (nn.Conv2d(3, 1, 3), torch.ones(3, 5, 5), ValueError, r"layer 0 \(conv2d\) takes shape \[B, 3, H, W\]"),
        (nn.Conv2d(3, 1, 6), torch.ones(1, 3, 5, 5), ValueError, r"layer 0 \(conv2d\) has a kernel larger"),
        (nn.Flatten(0), torch.ones(2, 3), ValueError, r"layer 0 \(flatten\) must keep dimension 0"),
        (lambda x: x.mean(), torch.ones(2, 3), ValueError, r"one score.*for each of the 2 samples, got shape \(\)"),
        (lambda x: x.sum(0), torch.ones(2, 3), ValueError, r"for each of the 2 samples, got shape \(3,\)"),
        (lambda x: (x, x), torch.ones(2, 3), TypeError, "the critic must return a tensor, got tuple"),
        (lambda x: x.long(), torch.ones(2, 3), TypeError, "must return floating-point scores"),
        (lambda x: torch.ones(2), torch.ones(2, 3), ValueError, "scores do not depend on its input"),
        (lambda x: torch.ones(2, requires_grad=True), torch.ones(2, 3), ValueError, "do not depend on its input"),
        ("critic", torch.ones(2, 3), TypeError, "critic must be callable, got str"),
    ],
)
def test_errors(critic: Any, x: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        input_gradient(critic, x)


def test_unknown_engine() -> None:
    with pytest.raises(ValueError, match='engine must be "auto", "analytic" or "autograd", got \'fast\''):
        input_gradient(mlp(3, 1), torch.ones(2, 3), engine="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parameters", "program", "slopes", "match"),
    [
        ([], [0], [], "program ends within a record"),
        ([], [0, 0], [], "parameters has too few"),
        ([torch.ones(1, 3)] * 2, [0, 0], [], "parameters has more"),
        ([], [7], [], "unknown layer kind: 7"),
        ([], [3], [], "slopes has too few"),
        ([], [3], [0.1, 0.1], "slopes has more"),
        ([torch.ones(3)], [0, 0], [], "needs a 2-D weight"),
        ([torch.ones(1, 3), torch.ones(2)], [0, 1, 3], [0.1], "a bias must have shape"),
    ],
)
def test_errors_of_the_operator(parameters: Any, program: Any, slopes: Any, match: str) -> None:
    with pytest.raises(ValueError, match=f"critic_input_gradient: .*{match}"):
        torch.ops.wgan_ext.critic_input_gradient(
            torch.ones(2, 3), parameters, program, slopes, False, torch.float32, False
        )


def test_compiled_step() -> None:
    critic, x = mlp(3, 8, 1).double(), torch.randn(4, 3, dtype=torch.float64)

    def step(x: Tensor) -> Tensor:
        return input_gradient(critic, x, engine="analytic").square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    compiled(x).backward()
    got = [p.grad for p in critic.parameters()]
    critic.zero_grad()
    step(x).backward()
    assert_same(got, [p.grad for p in critic.parameters()])
