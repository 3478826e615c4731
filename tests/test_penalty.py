from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wgan_ext
from wgan_ext import GradientPenalty, gradient_penalty, reference

ENGINES = ["analytic", "autograd"]


def make_critic(*, outputs: int = 1, dtype: torch.dtype = torch.float64, device: Any = "cpu") -> nn.Sequential:
    layers = [nn.Linear(6, 17), nn.LeakyReLU(0.2), nn.Linear(17, 9), nn.ReLU(), nn.Linear(9, outputs)]
    critic = nn.Sequential(*layers).to(device, dtype)
    with torch.no_grad():
        critic[0].weight *= 6  # norms on both sides of 1
    return critic


def make_patch_critic(device: Any = "cpu") -> nn.Sequential:
    layers = [nn.Conv2d(2, 6, 3), nn.LeakyReLU(0.2), nn.Conv2d(6, 3, 2)]
    return nn.Sequential(*layers).to(device, torch.float64)


def make_batches(*shape: int, dtype: torch.dtype = torch.float64, device: Any = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    real, fake = torch.randn(2, *shape, dtype=dtype, device=device)
    return real, fake, torch.rand(shape[0], *[1] * (len(shape) - 1), dtype=dtype, device=device)


def derivatives(penalty: Tensor, module: nn.Module) -> list[Tensor | None]:
    weights = torch.linspace(1, 2, penalty.numel(), dtype=penalty.dtype, device=penalty.device)
    total = (penalty.flatten() * weights).sum()
    return list(torch.autograd.grad(total, list(module.parameters()), allow_unused=True))


def assert_same(got: Tensor, expected: Tensor, critic: nn.Module, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(derivatives(got, critic), derivatives(expected, critic), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target": 0.0},
        {"target": 0.7, "one_sided": True},
        {"power": 1.0},
        {"power": 1.0, "one_sided": True},
        {"power": 6.0, "target": 0.0},
        {"power": 1.5},
        {"p": 1.0},
        {"p": 1.3},
        {"p": 4.0},
        {"p": math.inf},
        {"reduction": "sum"},
        {"reduction": "max"},
        {"reduction": "none"},
        {"output_reduction": "mean"},
        {"output_reduction": "mean", "power": 3.0, "p": 3.0, "one_sided": True, "reduction": "none"},
    ],
    ids=str,
)
def test_variants(options: dict[str, Any], engine: Any, device: torch.device) -> None:
    critic, (real, fake, mix) = make_critic(outputs=3, device=device), make_batches(11, 6, device=device)
    got = gradient_penalty(critic, real, fake, mix=mix, engine=engine, **options)
    assert_same(got, reference.gradient_penalty(critic, mix * real + (1 - mix) * fake, **options), critic)


@pytest.mark.parametrize("output_reduction", ["sum", "mean"])
def test_patch_critics(output_reduction: Any, device: torch.device) -> None:
    critic, (real, fake, mix) = make_patch_critic(device), make_batches(3, 2, 7, 6, device=device)
    x = mix * real + (1 - mix) * fake
    got = gradient_penalty(critic, real, fake, mix=mix, output_reduction=output_reduction, engine="analytic")
    assert_same(got, reference.gradient_penalty(critic, x, output_reduction=output_reduction), critic)


def test_r1_r2_and_dragan(device: torch.device) -> None:
    critic, (real, fake, mix) = make_critic(device=device), make_batches(11, 6, device=device)
    for at, x in (("real", real), ("fake", fake)):
        got = gradient_penalty(critic, real, fake, at=at)
        assert_same(got, reference.gradient_penalty(critic, x, target=0.0), critic)
    assert torch.equal(gradient_penalty(critic, real, at="real"), gradient_penalty(critic, real, fake, at="real"))
    assert torch.equal(gradient_penalty(critic, None, fake, at="fake"), gradient_penalty(critic, real, fake, at="fake"))

    generator = torch.Generator(device).manual_seed(3)
    got = gradient_penalty(critic, real, at="noise", mix=mix, generator=generator)
    noise = torch.rand(real.shape, generator=generator.manual_seed(3), device=device, dtype=torch.float64)
    assert_same(got, reference.gradient_penalty(critic, real + mix * 0.5 * real.std() * noise), critic)


def test_linear_critic_has_the_penalty_of_its_weight() -> None:
    critic = nn.Linear(3, 1).double()
    critic.weight.data = torch.tensor([[3.0, 0.0, 4.0]], dtype=torch.float64)
    real, fake, _ = make_batches(5, 3)
    for options, expected in (
        ({}, 16.0),
        ({"target": 0.0}, 25.0),
        ({"p": 1.0}, 36.0),
        ({"p": math.inf}, 9.0),
        ({"power": 1.0}, 4.0),
        ({"target": 6.0}, 1.0),
        ({"target": 6.0, "one_sided": True}, 0.0),
        ({"at": "real"}, 25.0),
        ({"reduction": "sum"}, 80.0),
        ({"mask": torch.tensor([1, 1, 0])}, 4.0),
    ):
        assert gradient_penalty(critic, real, fake, **options).item() == pytest.approx(expected, rel=1e-14), options


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 6.0])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_zero_gradient_has_zero_subgradient(engine: Any, p: float, power: float, target: float) -> None:
    critic, (real, fake, _) = make_critic(), make_batches(5, 6)
    with torch.no_grad():
        critic[4].weight.zero_()
    penalty = gradient_penalty(critic, real, fake, p=p, power=power, target=target, engine=engine)
    assert penalty.item() == target
    for derivative in derivatives(penalty, critic):
        assert derivative is None or not derivative.any()


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
def test_zero_entries_of_a_gradient_are_no_nan(p: float) -> None:
    critic, (real, fake, _) = make_critic(), make_batches(5, 6)
    mask = torch.tensor([1.0, 0, 1, 0, 1, 1])
    penalty = gradient_penalty(critic, real, fake, p=p, mask=mask)
    assert all(d is None or d.isfinite().all() for d in derivatives(penalty, critic))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (11, 1), (11, 6), (1,), ()])
def test_mask_multiplies_the_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    critic, (real, fake, mix) = make_critic(), make_batches(11, 6)
    mask = torch.randint(0, 2, shape).to(dtype)
    got = gradient_penalty(critic, real, fake, mix=mix, mask=mask)
    assert_same(got, reference.gradient_penalty(critic, mix * real + (1 - mix) * fake, mask=mask), critic)


# Drawing.


def test_mixing_factors_are_one_uniform_number_a_sample(device: torch.device) -> None:
    seen: list[Tensor] = []

    def critic(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return x.square().flatten(1).sum(1)

    real, fake = torch.ones(2000, 3, 2, device=device), torch.zeros(2000, 3, 2, device=device)
    gradient_penalty(critic, real, fake)
    factors = seen[0][:, 0, 0]
    assert torch.equal(seen[0], factors[:, None, None].expand(2000, 3, 2))
    assert 0 <= factors.min() < 0.01
    assert 0.99 < factors.max() < 1
    assert abs(factors.mean() - 0.5) < 0.03
    for _ in range(2):
        gradient_penalty(critic, real, fake, generator=torch.Generator(device).manual_seed(5))
    assert torch.equal(seen[1], seen[2])
    expected = torch.rand(2000, generator=torch.Generator(device).manual_seed(5), device=device)
    assert torch.equal(seen[1][:, 0, 0], expected)
    gradient_penalty(critic, real.double(), fake.double(), generator=torch.Generator(device).manual_seed(5))
    assert torch.equal(seen[3][:, 0, 0].float(), expected)


def test_ends_of_the_mix_are_exact() -> None:
    seen: list[Tensor] = []

    def critic(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return x.square().sum(1)

    real, fake, _ = make_batches(2, 5, dtype=torch.float16)
    for shape in ((2, 1), (2,)):
        gradient_penalty(critic, real, fake, mix=torch.tensor([1.0, 0.0]).view(shape))
        assert torch.equal(seen[-1], torch.stack([real[0], fake[1]]))


def test_real_and_fake_are_detached() -> None:
    critic, (real, fake, mix) = make_critic(), make_batches(4, 6)
    for at in ("interpolates", "real", "fake", "noise"):
        for engine in ENGINES:
            a, b = real.clone().requires_grad_(), fake.clone().requires_grad_()
            gradient_penalty(critic, a, b, mix=mix, at=at, engine=engine).backward()
            assert a.grad is None
            assert b.grad is None


@pytest.mark.parametrize("engine", ENGINES)
def test_no_grad_gives_the_value(engine: Any) -> None:
    critic, (real, fake, mix) = make_critic(), make_batches(4, 6)
    with torch.no_grad():
        penalty = gradient_penalty(critic, real, fake, mix=mix, engine=engine)
    assert not penalty.requires_grad
    torch.testing.assert_close(penalty, gradient_penalty(critic, real, fake, mix=mix).detach())


def test_norms() -> None:
    critic, (real, fake, mix) = make_critic(), make_batches(4, 6)
    penalty, norms = gradient_penalty(critic, real, fake, mix=mix, return_norms=True)
    assert norms.shape == (4,)
    assert not norms.requires_grad
    torch.testing.assert_close(penalty, (norms - 1).square().mean())


# Several inputs.


class Pair(nn.Module):
    def __init__(self, keys: Any = (0, 1)) -> None:
        super().__init__()
        self.keys = keys
        self.left, self.right = nn.Linear(3, 5).double(), nn.Linear(4, 5).double()

    def forward(self, x: Any) -> Tensor:
        return (self.left(x[self.keys[0]]).tanh() * self.right(x[self.keys[1]].flatten(1))).sum(1)


@pytest.mark.parametrize("structure", ["tuple", "list", "dict"])
def test_several_inputs_share_the_mix_and_the_norm(structure: str) -> None:
    a, b, mix = make_batches(6, 3)
    c, d, _ = make_batches(6, 2, 2)
    pair = Pair(("left", "right") if structure == "dict" else (0, 1))
    wrap = {"tuple": tuple, "list": list, "dict": lambda parts: dict(zip(("left", "right"), parts, strict=True))}
    real, fake = wrap[structure]([a, c]), wrap[structure]([b, d])
    got = gradient_penalty(pair, real, fake, mix=mix)

    x = torch.cat([mix * a + (1 - mix) * b, (mix[..., None] * c + (1 - mix[..., None]) * d).flatten(1)], 1)
    keys = pair.keys
    expected = reference.gradient_penalty(lambda x: pair({keys[0]: x[:, :3], keys[1]: x[:, 3:]}), x)
    assert_same(got, expected, pair)
    assert gradient_penalty(pair, real, at="real") != gradient_penalty(pair, real, at="noise")


def test_masks_of_several_inputs() -> None:
    a, b, mix = make_batches(6, 3)
    c, d, _ = make_batches(6, 2, 2)
    left = gradient_penalty(Pair(), (a, c), (b, d), mix=mix, mask=(torch.tensor(1), torch.tensor(0)), target=0)
    assert left > 0
    none = gradient_penalty(Pair(), (a, c), (b, d), mix=mix, mask=(torch.tensor(0), torch.tensor(0)), target=0)
    assert none == 0


def test_an_unused_one_of_several_inputs_has_no_gradient() -> None:
    a, b, mix = make_batches(6, 3)
    got = gradient_penalty(lambda x: x[0].square().sum(1), (a, a), (b, b), mix=mix)
    torch.testing.assert_close(got, gradient_penalty(lambda x: x.square().sum(1), a, b, mix=mix))


def test_conditional_critic() -> None:
    class Conditional(nn.Module):
        def forward(self, x: Tensor, label: Tensor, *, gain: float) -> Tensor:
            return gain * (x * label[:, None]).sum(1)

    real, fake, _ = make_batches(3, 4)
    labels = torch.tensor([1.0, 2.0, 3.0])
    got = gradient_penalty(
        Conditional(), real, fake, critic_args=(labels,), critic_kwargs={"gain": 0.5}, reduction="none"
    )
    torch.testing.assert_close(got, ((labels - 1) ** 2).double())


# Precision.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_norms_do_not_overflow(dtype: torch.dtype, engine: Any, device: torch.device) -> None:
    critic = nn.Sequential(nn.Flatten(), nn.Linear(4096, 1)).to(device, dtype)
    with torch.no_grad():
        critic[1].weight.fill_(8)  # the sum of squares, 262144, is beyond float16
    real, fake, _ = make_batches(2, 64, 64, dtype=dtype, device=device)
    penalty, norms = gradient_penalty(critic, real, fake, engine=engine, return_norms=True)
    assert penalty.dtype == norms.dtype == torch.float32
    torch.testing.assert_close(norms, torch.full((2,), 512.0, device=device))
    penalty.backward()
    assert critic[1].weight.grad.dtype == dtype
    assert critic[1].weight.grad.isfinite().all()


@pytest.mark.parametrize("engine", ENGINES)
def test_autocast(engine: Any, device: torch.device) -> None:
    critic, (real, fake, mix) = make_critic(dtype=torch.float32, device=device), make_batches(11, 6, device=device)
    real, fake = real.float(), fake.float()
    expected = gradient_penalty(critic, real, fake, mix=mix)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        penalty = gradient_penalty(critic, real, fake, mix=mix, engine=engine)
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, expected, rtol=0.1, atol=0.01)
    penalty.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in critic.parameters())


def test_float32_agrees_with_autograd() -> None:
    critic, (real, fake, mix) = make_critic(dtype=torch.float32), make_batches(64, 6, dtype=torch.float32)
    got = gradient_penalty(critic, real, fake, mix=mix)
    assert_same(got, reference.gradient_penalty(critic, torch.lerp(fake, real, mix)), critic, 1e-5)


# The module.


def test_module_is_the_function() -> None:
    critic, (real, fake, mix) = make_critic(), make_batches(4, 6)
    penalty = GradientPenalty(target=0.5, power=3, return_norms=True)
    for got, expected in zip(
        penalty(critic, real, fake, mix=mix),
        gradient_penalty(critic, real, fake, mix=mix, target=0.5, power=3, return_norms=True),
        strict=True,
    ):
        assert torch.equal(got, expected)
    assert list(penalty.parameters()) == []
    assert "target=0.5" in repr(penalty)


def test_module_is_lazy_on_demand() -> None:
    critic, (real, fake, mix) = make_critic(), make_batches(4, 6)
    lazy = GradientPenalty(every=3)
    once = gradient_penalty(critic, real, fake, mix=mix)
    values = [lazy(critic, real, fake, mix=mix) for _ in range(7)]
    assert [v.item() for v in values] == pytest.approx([3 * once.item() if i % 3 == 0 else 0.0 for i in range(7)])
    assert [v.requires_grad for v in values] == [i % 3 == 0 for i in range(7)]
    assert all(v.dtype == torch.float64 and v.shape == () for v in values)

    resumed = GradientPenalty(every=3)
    resumed.load_state_dict(lazy.state_dict())
    assert [resumed(critic, real, fake).item() > 0 for _ in range(3)] == [False, False, True]

    lazy = GradientPenalty(every=2, reduction="none", return_norms=True)
    assert [norms.shape for _, norms in (lazy(critic, real, fake) for _ in range(2))] == [(4,), (0,)]


# Errors.

ONES = torch.ones(2, 6)
TWO = (ONES, ONES)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((None,), {}, ValueError, "real is needed"),
        ((ONES,), {}, ValueError, "fake is needed"),
        ((ONES,), {"at": "fake"}, ValueError, "fake is needed"),
        (([1.0],), {"at": "real"}, TypeError, "real must be a tensor, got float"),
        (((),), {"at": "real"}, ValueError, "real must hold at least one tensor"),
        ((ONES.long(),), {"at": "real"}, TypeError, "real must be a floating-point.*got torch.int64"),
        ((torch.ones(0, 6),), {"at": "real"}, ValueError, r"real must hold at least one sample.*got shape \(0, 6\)"),
        ((ONES, torch.ones(3, 6)), {}, ValueError, r"fake must have the shape of real \(2, 6\), got \(3, 6\)"),
        ((ONES, ONES.double()), {}, TypeError, "fake must have the dtype of real"),
        ((ONES, torch.ones(2, 6, device="meta")), {}, ValueError, "fake must be on the device of real"),
        ((ONES, (ONES,)), {}, TypeError, r"fake must have the structure of real \(Tensor\)"),
        (({"a": torch.ones(2, 1)}, {"b": torch.ones(2, 1)}), {}, ValueError, "fake must have the keys of real"),
        (((torch.ones(2, 1),) * 2, (torch.ones(2, 1),)), {}, ValueError, r"fake must hold as many.*\(2\), got 1"),
        (((torch.ones(2, 1), torch.ones(3, 1)),), {"at": "real"}, ValueError, ".*one batch size, got 2 and 3"),
        (TWO, {"mix": 0.5}, TypeError, "mix must be a tensor, got float"),
        (TWO, {"mix": torch.ones(2, 1).long()}, TypeError, "mix must be a floating-point tensor"),
        (TWO, {"mix": torch.rand(2, 6)}, ValueError, r"mix must have shape \[B, 1, \.\.\., 1\] with B = 2"),
        (TWO, {"mix": torch.rand(1, 2)}, ValueError, r"mix must have shape.*with B = 2, got \(1, 2\)"),
        (TWO, {"mix": torch.rand(())}, ValueError, "mix must have shape"),
        (TWO, {"mix": torch.rand(2, device="meta")}, ValueError, "mix must be on the device of real"),
        (TWO, {"mask": torch.ones(5)}, ValueError, r"mask must be broadcastable.*\(2, 6\), got \(5,\)"),
        (TWO, {"mask": torch.ones(1, 2, 6)}, ValueError, "mask must be broadcastable"),
        (TWO, {"mask": [torch.ones(6)] * 2}, TypeError, r"mask must have the structure of real \(Tensor\)"),
        (TWO, {"mask": torch.ones(6, device="meta")}, ValueError, "mask must be on the device"),
        (TWO, {"at": "middle"}, ValueError, "at must be one of interpolates, real, fake, noise"),
        (TWO, {"reduction": "min"}, ValueError, "reduction must be one of mean, sum, max, none"),
        (TWO, {"output_reduction": "max"}, ValueError, "output_reduction must be one of sum, mean"),
        (TWO, {"target": -1.0}, ValueError, "target must be a finite norm, at least 0, got -1.0"),
        (TWO, {"target": math.nan}, ValueError, "target must be a finite norm"),
        (TWO, {"power": 0.5}, ValueError, "power must be at least 1 and finite, got 0.5"),
        (TWO, {"power": math.inf}, ValueError, "power must be at least 1 and finite"),
        (TWO, {"p": 0.5}, ValueError, "p must be the order of a norm, from 1 to inf, got 0.5"),
        (TWO, {"p": math.nan}, ValueError, "p must be the order of a norm"),
        (TWO, {"engine": "fast"}, ValueError, "engine must be"),
        ((torch.ones(1, 1),), {"at": "noise"}, ValueError, ".*standard deviation of real, which has one element"),
    ],
)  # fmt: skip
def test_errors(arguments: Any, options: Any, error: type[Exception], match: str) -> None:
    critic = make_critic(dtype=torch.float32)
    with pytest.raises(error, match=f"gradient_penalty: {match}"):
        gradient_penalty(critic, *arguments, **options)


def test_errors_of_the_module() -> None:
    with pytest.raises(ValueError, match="GradientPenalty: every must be at least 1, got 0"):
        GradientPenalty(every=0)
    with pytest.raises(ValueError, match="power must be at least 1"):
        GradientPenalty(power=0.0)
    lazy = GradientPenalty(every=2)
    lazy.calls = 1
    with pytest.raises(ValueError, match="gradient_penalty: real is needed"):
        lazy(make_critic(), None)


def test_batchnorm_in_training_warns() -> None:
    critic, (real, fake, _) = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), make_batches(4, 6)
    with pytest.warns(UserWarning, match="gradient_penalty: the critic normalizes over the batch") as caught:
        gradient_penalty(critic, real.float(), fake.float())
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="input_gradient: the critic normalizes over the batch") as caught:
        wgan_ext.input_gradient(critic, real.float())
    assert caught[0].filename == __file__


# torch.compile.


def test_compiled_step() -> None:
    critic, (real, fake, mix) = make_critic(), make_batches(4, 6)

    def step(real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
        scores = critic(fake).mean() - critic(real).mean()
        return scores + 10 * gradient_penalty(critic, real, fake, mix=mix, one_sided=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same(compiled(real, fake, mix), step(real, fake, mix), critic)


def test_compiled_critic_with_its_own_factors() -> None:
    critic, (real, fake, _) = make_critic(), make_batches(4, 6)
    compiled = torch.compile(lambda: gradient_penalty(critic, real, fake), fullgraph=True, backend="aot_eager")
    penalty = compiled()
    penalty.backward()
    assert critic[0].weight.grad.any()
    assert compiled() != penalty


def test_compile_refuses_what_it_cannot_do_by_name() -> None:
    critic, (real, fake, _) = make_critic(), make_batches(4, 6)
    generator = torch.Generator()
    unknown = nn.Sequential(nn.Linear(6, 4), nn.Softmax(1), nn.Linear(4, 1)).double()
    for function, match in (
        (lambda: gradient_penalty(critic, real, fake, generator=generator), "draw mix outside"),
        (lambda: gradient_penalty(unknown, real, fake), "torch.compile cannot differentiate twice"),
    ):
        with pytest.raises(Exception, match=match):
            torch.compile(function, fullgraph=True, backend="aot_eager")()
        torch._dynamo.reset()
