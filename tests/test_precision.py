"""What penalties and losses keep: range and subgradients in small types, randomness, NaN, and asynchrony."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wgan_ext import CriticLoss, GradientPenalty, gradient_penalty, wgan_gp_loss
from wgan_ext.penalty import Penalty

ENGINES = ["analytic", "autograd"]
HALVES = [torch.float16, torch.bfloat16]
FUNCTIONS: list[Callable[..., Tensor]] = [gradient_penalty, wgan_gp_loss]


def make_critic(dtype: torch.dtype = torch.float32, device: Any = "cpu") -> nn.Sequential:
    layers = [nn.Linear(6, 24), nn.LeakyReLU(0.2), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 1)]
    return nn.Sequential(*layers).to(device, dtype)


def make_batches(*shape: int, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    real, fake = torch.randn(2, *shape, device=device).to(dtype)
    return real, fake, torch.rand(shape[0], device=device)


def gradients(loss: Tensor, critic: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True, materialize_grads=True))


# Range


# Elements and how many: squares that overflow, squares that vanish, and what norms the types can hold.
EXTREMES = [(300.0, 100), (8.0, 4096), (1e-4, 12288), (6e-8, 64)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("element", "count"), EXTREMES)
@pytest.mark.parametrize("options", [{}, {"target": 0}, {"p": 1.0}, {"p": 3.0}, {"p": math.inf}, {"power": 3}], ids=str)
def test_norms_of_16_bit_gradients_have_the_range_of_float32(
    options: dict[str, Any], element: float, count: int, dtype: torch.dtype, engine: Any, device: torch.device
) -> None:
    critic = nn.Linear(count, 1).to(device, dtype)
    with torch.no_grad():
        critic.weight.copy_(torch.linspace(0.5, 1, count).mul(element)[None])
    real, fake, mix = make_batches(3, count, dtype=dtype, device=device)
    exact = critic.weight.detach().double().requires_grad_()
    p, power, target = options.get("p", 2.0), options.get("power", 2), options.get("target", 1)
    norm = torch.linalg.vector_norm(exact, p)
    expected = (norm - target).abs() ** power

    penalty, norms = gradient_penalty(critic, real, fake, mix=mix, engine=engine, return_norms=True, **options)
    assert penalty.dtype == norms.dtype == torch.float32
    torch.testing.assert_close(norms, norm.detach().float().expand(3), rtol=1e-5, atol=0)
    torch.testing.assert_close(penalty, expected.detach().float(), rtol=1e-5, atol=0)

    (expected_gradient,) = torch.autograd.grad(expected, exact)
    (gradient,) = torch.autograd.grad(penalty, critic.weight)
    assert gradient.dtype == dtype
    if expected_gradient.abs().max() <= torch.finfo(dtype).max:
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            gradient.double(),
            expected_gradient,
            rtol=tolerance,
            atol=tolerance * expected_gradient.abs().max().item() + torch.finfo(dtype).smallest_normal,
        )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", HALVES)
def test_losses_of_16_bit_critics_are_float32(dtype: torch.dtype, engine: Any, device: torch.device) -> None:
    critic, (real, fake, mix) = make_critic(dtype, device), make_batches(11, 6, dtype=dtype, device=device)
    parts = wgan_gp_loss(critic, real, fake, mix=mix, engine=engine, return_parts=True)
    assert {t.dtype for t in parts} == {torch.float32}
    exact = wgan_gp_loss(critic.double(), real.double(), fake.double(), mix=mix, engine="autograd")
    torch.testing.assert_close(parts.loss.double(), exact, rtol=16 * torch.finfo(dtype).eps, atol=0)


# Gradients that are zero


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dead_critics_have_zero_subgradients(dtype: torch.dtype, p: float, engine: Any) -> None:
    critic, (real, fake, mix) = make_critic(dtype), make_batches(5, 6, dtype=dtype)
    with torch.no_grad():
        critic[2].bias.fill_(-100)
    for power, target, one_sided, reduction in itertools.product(
        [1.0, 1.5, 2.0, 6.0], [0.0, 0.5, 1.0], [False, True], ["mean", "max"]
    ):
        options: dict[str, Any] = {"power": power, "target": target, "one_sided": one_sided, "reduction": reduction}
        penalty = gradient_penalty(critic, real, fake, mix=mix, p=p, engine=engine, **options)
        assert penalty.item() == (0 if one_sided else pytest.approx(target**power, rel=1e-6)), options
        assert not any(g.isnan().any() or g.any() for g in gradients(penalty, critic)), options


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options", [{}, {"one_sided": True}, {"power": 1.0}, {"p": 1.5}, {"reduction": "max"}], ids=str
)
def test_losses_of_dead_critics_are_finite(options: dict[str, Any], engine: Any) -> None:
    critic, (real, fake, mix) = make_critic(), make_batches(5, 6)
    with torch.no_grad():
        critic[2].bias.fill_(-100)
    loss = wgan_gp_loss(critic, real, fake, mix=mix, engine=engine, **options)
    assert loss.item() == (0 if options.get("one_sided") else 10)
    assert all(g.abs().max() < 1e-6 for g in gradients(loss, critic))  # of scores that cancel


@pytest.mark.parametrize("engine", ENGINES)
def test_samples_without_a_gradient_do_not_disturb_the_others(engine: Any) -> None:
    critic = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU()).double()
    with torch.no_grad():
        critic[0].weight.fill_(3.0)
    x = torch.tensor([[-1.0], [2.0]]).double()
    for p in (1.0, 2.0, 3.0, math.inf):
        penalty = gradient_penalty(critic, x, at="real", target=1, p=p, engine=engine)
        assert penalty.item() == pytest.approx((1 + 4) / 2)
        assert gradients(penalty, critic)[0].item() == pytest.approx(2 * (3 - 1) / 2)


# Autocast and GradScaler


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_bfloat16_autocast_is_near_float32(function: Callable[..., Tensor], engine: Any, device: torch.device) -> None:
    critic, (real, fake, mix) = make_critic(device=device), make_batches(64, 6, device=device)
    expected = function(critic, real, fake, mix=mix, engine=engine)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = function(critic, real, fake, mix=mix, engine=engine)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0)
    both = zip(gradients(got, critic), gradients(expected, critic), strict=True)
    for a, b in both:
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 0.05 * b.norm() + 1e-6


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grad_scaler_needs_nothing_more(
    dtype: torch.dtype, function: Callable[..., Tensor], engine: Any, device: torch.device
) -> None:
    critic, (real, fake, mix) = make_critic(device=device), make_batches(16, 6, device=device)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.0)

    def loss() -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return function(critic, real, fake, mix=mix, engine=engine)

    expected = gradients(loss(), critic)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16)
    scaler.scale(loss()).backward()
    scaler.unscale_(optimizer)
    for p, b in zip(critic.parameters(), expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else p.grad, b, rtol=1e-6, atol=1e-9)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**16


@pytest.mark.parametrize("engine", ENGINES)
def test_grad_scaler_skips_steps_that_overflow(engine: Any) -> None:
    critic, (real, fake, mix) = make_critic(), make_batches(16, 6)
    optimizer = torch.optim.SGD(critic.parameters(), lr=1.0)
    before = [p.detach().clone() for p in critic.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    scaler.scale(1e6 * gradient_penalty(critic, real, fake, mix=mix, engine=engine)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 1e38
    assert all(map(torch.equal, before, critic.parameters()))


# Randomness


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("at", ["interpolates", "noise"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_generators_make_draws_repeatable(
    function: Callable[..., Tensor], at: str, engine: Any, device: torch.device
) -> None:
    critic, (real, fake, _) = make_critic(device=device), make_batches(16, 6, device=device)
    draw = functools.partial(function, critic, real, fake, at=at, engine=engine)

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator(device).manual_seed(seed)

    assert torch.equal(draw(generator=seeded(1)), draw(generator=seeded(1)))
    assert draw(generator=seeded(1)) != draw(generator=seeded(2))
    generator = seeded(1)
    assert draw(generator=generator) != draw(generator=generator)
    state = torch.get_rng_state()
    draw(generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), state)  # torch's own is left alone
    torch.manual_seed(4)
    first = draw()
    assert draw() != first
    torch.manual_seed(4)
    assert torch.equal(draw(), first)


def test_modules_take_generators() -> None:
    critic, (real, fake, _) = make_critic(), make_batches(16, 6)
    for call in (functools.partial(GradientPenalty(), critic), CriticLoss(critic, engine="autograd")):
        values = [call(real, fake, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
        assert torch.equal(values[0], values[1])
        assert values[1] != values[2]


@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 3, 4), (7, 3, 4, 5), (7, 3, 4, 5, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_mix_is_drawn_for_each_sample_and_broadcast(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    kind = Penalty("test", "interpolates", None, False, 2.0, 2.0, "mean", "sum")
    ones, zeros = torch.ones(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    points = kind.points(ones, zeros, None, torch.Generator().manual_seed(2))
    drawn = torch.rand(7, generator=torch.Generator().manual_seed(2))  # in float32, whatever the dtype
    assert torch.equal(points, drawn.to(dtype).view(-1, *[1] * (len(shape) - 1)).expand(shape))
    assert kind.points(ones.to("meta"), zeros.to("meta"), None, None).device.type == "meta"  # on the device of real
    mix = torch.linspace(0, 1, 7)
    for given in (mix, mix.view(-1, *[1] * (len(shape) - 1))):
        points = kind.points(ones, zeros, given, None)
        assert torch.equal(points.reshape(7, -1), mix.to(dtype)[:, None].expand(7, ones[0].numel()))


def test_mix_is_uniform() -> None:
    kind = Penalty("test", "interpolates", None, False, 2.0, 2.0, "mean", "sum")
    n = 50_000
    mix = kind.points(torch.ones(n, 1).double(), torch.zeros(n, 1).double(), None, None).flatten().sort().values
    assert mix[0] >= 0
    assert mix[-1] < 1
    steps = torch.arange(n).double()
    distance = torch.maximum((steps + 1) / n - mix, mix - steps / n).max().item()
    assert distance < 1.95 / n**0.5  # Kolmogorov and Smirnov, at 0.1 %


# NaN


@pytest.mark.parametrize(
    ("engine", "activation"),
    [
        ("analytic", nn.ReLU()),
        ("analytic", nn.LeakyReLU(0.2)),
        ("analytic", nn.Hardtanh()),
        ("autograd", nn.ReLU()),
    ],
    ids=str,
)
def test_nan_shows_in_scores_and_losses(engine: Any, activation: nn.Module) -> None:
    critic, (real, fake, mix) = nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(8, 1)), make_batches(5, 6)
    real[2, 3] = math.nan  # also among the samples that the critic is traced with
    gradient_penalty(critic, real, fake, mix=mix, engine=engine)  # does not look for it
    parts = wgan_gp_loss(critic, real, fake, mix=mix, engine=engine, return_parts=True)
    assert parts.loss.isnan()
    assert parts.real_scores.isnan().tolist() == [False, False, True, False, False]
    assert not parts.fake_scores.isnan().any()


@pytest.mark.parametrize("engine", ENGINES)
def test_nan_shows_in_penalties_of_smooth_critics(engine: Any) -> None:
    critic, (real, fake, mix) = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)), make_batches(5, 6)
    real[2, 3] = math.nan
    penalty, norms = gradient_penalty(critic, real, fake, mix=mix, engine=engine, return_norms=True)
    assert penalty.isnan()
    assert norms.isnan().tolist() == [False, False, True, False, False]


# Asynchrony: what a CUDA graph cannot capture


SYNCHRONISING = {
    *("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::allclose"),
    *("aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2", "aten::bincount"),
    "aten::lift_fresh",  # torch.tensor of numbers: a copy from the host
}


def synchronising(function: Callable[[], object]) -> set[str]:
    """Which of all operators that run, inside of C++ too, read values or make shapes of them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        function()
    events = profile.events()
    assert any(event.name.startswith("aten::") for event in events)
    return {event.name for event in events if event.name in SYNCHRONISING and not _in_std(event)}


def _in_std(event: Any) -> bool:
    """Whether within torch's standard deviation, which reads values on a CPU, but not on CUDA."""
    return event is not None and (event.name == "aten::std" or _in_std(event.cpu_parent))


class Curved(nn.Module):
    """A critic of two inputs, with most kinds of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.spectral_norm(nn.Conv2d(2, 8, 3, padding=1))
        self.norm, self.pool = nn.GroupNorm(2, 8), nn.MaxPool2d(2)
        self.side, self.out = nn.Linear(5, 8), nn.Linear(8, 1)

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        h = nn.functional.silu(self.norm(self.first(x[0])))
        h = self.pool(h) + nn.functional.avg_pool2d(h, 2)
        return self.out(h.mean((2, 3)) * self.side(x[1]).sigmoid())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"at": "real"},
        {"at": "fake", "power": 6},
        {"at": "noise"},
        {"one_sided": True},
        {"reduction": "sum"},
        {"reduction": "max"},
        {"p": 1.0},
        {"p": 1.5},
        {"p": math.inf, "reduction": "max", "one_sided": True},
        {"power": 1.0, "target": 0.5},
        {"output_reduction": "mean"},
        {"mask": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("curved", [False, True])
def test_steps_do_not_wait_for_values(
    curved: bool, options: dict[str, Any], function: Callable[..., Tensor], engine: Any
) -> None:
    critic: nn.Module
    if curved:
        critic = Curved()
        real, fake = ((torch.randn(4, 2, 6, 6), torch.randn(4, 5)) for _ in range(2))
        mask: Any = (torch.ones(6), torch.zeros(5))
    else:
        critic, (real, fake, _) = make_critic(), make_batches(4, 6)  # type: ignore[assignment]
        mask = torch.ones(6).bool()
    if "mask" in options:
        options = options | {"mask": mask}

    def step() -> None:
        function(critic, real, fake, engine=engine, **options).backward()

    step()  # traces the critic, and looks at what it returns
    assert synchronising(step) == set()


def test_synchronising_calls_are_seen() -> None:
    x = torch.ones(3)
    assert synchronising(lambda: x.sum().item()) == {"aten::item", "aten::_local_scalar_dense"}
    assert "aten::nonzero" in synchronising(lambda: x[x > 0])
    assert "aten::lift_fresh" in synchronising(lambda: torch.tensor(2.0) * x)
