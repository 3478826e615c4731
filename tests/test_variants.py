"""docs/penalties.md: each call of its tables against the formula written out, and each of its code blocks."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import wgan_ext
from wgan_ext import CriticLoss, GradientPenalty, gradient_penalty, wgan_gp_loss

PAGE = (Path(__file__).parents[1] / "docs" / "penalties.md").read_text()
ENGINES = ["analytic", "autograd"]


def calls_of(heading: str) -> dict[str, str]:
    """The first and the last cell of each row of the table under a heading of the page."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    return {row[0]: row[-1].strip("`") for row in rows}


PENALTIES, LOSSES = calls_of("Which paper is which call"), calls_of("Whole losses")


# What the calls are made of


class PairCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return self.out(nn.functional.leaky_relu(self.left(x[0]) + self.right(x[1].flatten(1)), 0.2))


class ConditionalCritic(nn.Module):
    """A projection critic."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out, self.label = nn.Linear(6, 8), nn.Linear(8, 1), nn.Embedding(3, 8)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = nn.functional.leaky_relu(self.body(x), 0.2)
        return self.out(h).squeeze(1) + (h * self.label(labels)).sum(1)


def ingredients() -> SimpleNamespace:
    layers = [nn.Linear(6, 17), nn.LeakyReLU(0.2), nn.Linear(17, 24), nn.ReLU(), nn.Linear(24, 1)]
    patches = [nn.Conv2d(2, 6, 3), nn.LeakyReLU(0.2), nn.Conv2d(6, 1, 2)]
    of = SimpleNamespace(
        critic=nn.Sequential(*layers),
        pair_critic=PairCritic(),
        conditional_critic=ConditionalCritic(),
        patch_critic=nn.Sequential(*patches),
        real=torch.randn(11, 6),
        fake=torch.randn(11, 6),
        real2=torch.randn(11, 2, 2),
        fake2=torch.randn(11, 2, 2),
        images=torch.randn(11, 2, 5, 6),
        fake_images=torch.randn(11, 2, 5, 6),
        labels=torch.randint(3, (11,)),
        mask=torch.rand(11, 6).round(),
        mix=torch.rand(11, 1),
    )
    for name, value in vars(of).items():
        if isinstance(value, nn.Module):
            value.double()
        elif value.is_floating_point():
            setattr(of, name, value.double())
    stretch(of, 1 / norms(of.critic, of.real).median())  # norms on both sides of 1
    of.weight, of.gamma, of.s = 3.0, 1.7, 3.0
    return of


def stretch(of: SimpleNamespace, factor: Any) -> None:
    """Multiply all gradients of the critic."""
    with torch.no_grad():
        of.critic[-1].weight *= factor


def evaluate(call: str, of: SimpleNamespace, engine: str) -> Tensor:
    """The call of the page, with the engine, the mix and the noise that a test knows."""
    options: dict[str, Any] = {
        "mix": of.mix,
        "engine": engine,
        "generator": torch.Generator().manual_seed(3),
    }
    names = {
        "gradient_penalty": functools.partial(gradient_penalty, **options),
        "wgan_gp_loss": functools.partial(wgan_gp_loss, **options),
        "GradientPenalty": functools.partial(GradientPenalty, engine=engine),
    }
    result: Tensor = eval(call, vars(of) | names)
    return result


# The formulas


def gradient(critic: Callable[..., Tensor], x: Tensor, *args: Tensor) -> Tensor:
    """dD/dx, [B, N], to be differentiated again."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(critic(x, *args).sum(), x, create_graph=True)
    return g.flatten(1)


def squares(critic: Callable[..., Tensor], x: Tensor, *args: Tensor) -> Tensor:
    return (gradient(critic, x, *args) ** 2).sum(1)


def norms(critic: Callable[..., Tensor], x: Tensor, *args: Tensor) -> Tensor:
    return squares(critic, x, *args) ** 0.5


def between(of: SimpleNamespace, real: Tensor, fake: Tensor) -> Tensor:
    mix = of.mix.view(-1, *[1] * (real.dim() - 1))
    return mix * real + (1 - mix) * fake


def x(of: SimpleNamespace) -> Tensor:
    return between(of, of.real, of.fake)


def around(of: SimpleNamespace) -> Tensor:
    uniform = torch.rand(of.real.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return of.real + of.mix * 0.5 * of.real.std() * uniform


def dual_norms(of: SimpleNamespace) -> Tensor:
    q = 1 / (1 - 1 / of.s)
    return (gradient(of.critic, x(of)).abs() ** q).sum(1) ** (1 / q)


def pair_norms(of: SimpleNamespace) -> Tensor:
    a = between(of, of.real, of.fake).requires_grad_()
    b = between(of, of.real2, of.fake2).requires_grad_()
    g, h = torch.autograd.grad(of.pair_critic((a, b)).sum(), (a, b), create_graph=True)
    return ((g**2).sum(1) + (h**2).sum((1, 2))) ** 0.5


def patch_norms(of: SimpleNamespace) -> Tensor:
    return norms(of.patch_critic, between(of, of.images, of.fake_images))


FORMULAS: dict[str, Callable[[SimpleNamespace], Tensor]] = {
    "WGAN-GP, Gulrajani et al. 2017, eq. 3": lambda of: 10 * ((norms(of.critic, x(of)) - 1) ** 2).mean(),
    "WGAN-GP, toy data": lambda of: 0.1 * ((norms(of.critic, x(of)) - 1) ** 2).mean(),
    "WGAN-LP, Petzka et al. 2018": lambda of: of.weight * ((norms(of.critic, x(of)) - 1).clamp_min(0) ** 2).mean(),
    "R1, Mescheder et al. 2018, eq. 9": lambda of: of.gamma / 2 * squares(of.critic, of.real).mean(),
    "R2, Mescheder et al. 2018, eq. 10": lambda of: of.gamma / 2 * squares(of.critic, of.fake).mean(),
    "R1 + R2, as R3GAN, Huang et al. 2024": lambda of: (
        of.gamma / 2 * (squares(of.critic, of.real) + squares(of.critic, of.fake)).mean()
    ),
    "0-GP, Thanh-Tung et al. 2019": lambda of: of.weight * squares(of.critic, x(of)).mean(),
    "DRAGAN, Kodali et al. 2017": lambda of: 10 * ((norms(of.critic, around(of)) - 1) ** 2).mean(),
    "WGAN-div, Wu et al. 2018": lambda of: 2 * (squares(of.critic, x(of)) ** 3).mean(),
    "WGAN-div, at real and fake": lambda of: (
        (squares(of.critic, of.real) ** 3 + squares(of.critic, of.fake) ** 3).mean() * 2 / 2
    ),
    "Banach WGAN on L^s, Adler and Lunz 2018": lambda of: of.weight * ((dual_norms(of) / of.gamma - 1) ** 2).mean(),
    "MaxGP, as in LGAN, Zhou et al. 2019": lambda of: of.weight * norms(of.critic, x(of)).max() ** 2,
    "StyleGAN2's lazy R1, Karras et al. 2020": lambda of: 16 * (of.gamma / 2) * squares(of.critic, of.real).mean(),
    'masked, as MMGeneration\'s `norm_mode="HWC"`': lambda of: (
        10 * (((gradient(of.critic, x(of)) * of.mask).norm(2, dim=1) - 1) ** 2).mean() / of.mask.mean()
    ),
    "several inputs": lambda of: 10 * ((pair_norms(of) - 1) ** 2).mean(),
    "conditional critic": lambda of: 10 * ((norms(of.conditional_critic, x(of), of.labels) - 1) ** 2).mean(),
    "patch critic, as pix2pix": lambda of: 10 * ((patch_norms(of) - 1) ** 2).mean(),
    "patch critic, mean score": lambda of: 10 * ((patch_norms(of) / 6 - 1) ** 2).mean(),
}


def wasserstein(of: SimpleNamespace) -> Tensor:
    return of.critic(of.fake).mean() - of.critic(of.real).mean()


def patch_wasserstein(of: SimpleNamespace) -> Tensor:
    return of.patch_critic(of.fake_images).mean() - of.patch_critic(of.images).mean()


LOSS_FORMULAS: dict[str, Callable[[SimpleNamespace], Tensor]] = {
    name: functools.partial(lambda of, row: wasserstein(of) + FORMULAS[row](of), row=row)
    for name, row in {
        "WGAN-GP": "WGAN-GP, Gulrajani et al. 2017, eq. 3",
        "WGAN-GP, toy data": "WGAN-GP, toy data",
        "WGAN-LP": "WGAN-LP, Petzka et al. 2018",
        "R1 with the Wasserstein loss": "R1, Mescheder et al. 2018, eq. 9",
        "R2 with the Wasserstein loss": "R2, Mescheder et al. 2018, eq. 10",
        "R1 and R2 with the Wasserstein loss": "R1 + R2, as R3GAN, Huang et al. 2024",
        "0-GP with the Wasserstein loss": "0-GP, Thanh-Tung et al. 2019",
        "DRAGAN with the Wasserstein loss": "DRAGAN, Kodali et al. 2017",
        "WGAN-div": "WGAN-div, Wu et al. 2018",
        "MaxGP": "MaxGP, as in LGAN, Zhou et al. 2019",
        "masked": 'masked, as MMGeneration\'s `norm_mode="HWC"`',
    }.items()
} | {
    "Banach WGAN on L^s": lambda of: (
        wasserstein(of) / of.gamma + of.weight * ((dual_norms(of) / of.gamma - 1) ** 2).mean()
    ),
    "several inputs": lambda of: (
        of.pair_critic((of.fake, of.fake2)).mean()
        - of.pair_critic((of.real, of.real2)).mean()
        + FORMULAS["several inputs"](of)
    ),
    "conditional critic": lambda of: (
        of.conditional_critic(of.fake, of.labels).mean()
        - of.conditional_critic(of.real, of.labels).mean()
        + FORMULAS["conditional critic"](of)
    ),
    "patch critic": lambda of: 6 * patch_wasserstein(of) + FORMULAS["patch critic, as pix2pix"](of),
    "patch critic, mean score": lambda of: patch_wasserstein(of) + FORMULAS["patch critic, mean score"](of),
}


def assert_same(got: Tensor, expected: Tensor, of: SimpleNamespace) -> None:
    """Value and derivatives by all parameters agree."""
    assert got.shape == ()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    parameters = [p for value in vars(of).values() if isinstance(value, nn.Module) for p in value.parameters()]
    results = [torch.autograd.grad(t, parameters, allow_unused=True, materialize_grads=True) for t in (got, expected)]
    assert any(d.any() for d in results[1])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("row", PENALTIES)
def test_penalties(row: str, engine: str) -> None:
    of = ingredients()
    assert_same(evaluate(PENALTIES[row], of, engine), FORMULAS[row](of), of)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("row", LOSSES)
def test_losses(row: str, engine: str) -> None:
    of = ingredients()
    assert_same(evaluate(LOSSES[row], of, engine), LOSS_FORMULAS[row](of), of)


def test_every_formula_is_on_the_page() -> None:
    assert PENALTIES.keys() == FORMULAS.keys()
    assert LOSSES.keys() == LOSS_FORMULAS.keys()


# What the page says beside the tables


@pytest.mark.parametrize("engine", ENGINES)
def test_max_of_a_two_sided_penalty_is_not_that_of_the_largest_norm(engine: Any) -> None:
    of = ingredients()
    stretch(of, 0.9 / norms(of.critic, x(of)).max())
    n = norms(of.critic, x(of))
    options: dict[str, Any] = {"mix": of.mix, "reduction": "max", "engine": engine}
    assert_same(gradient_penalty(of.critic, of.real, of.fake, **options), ((n - 1) ** 2).max(), of)
    assert ((n - 1) ** 2).max() > (n.max() - 1) ** 2
    stretch(of, 2.0)
    got = gradient_penalty(of.critic, of.real, of.fake, one_sided=True, **options)
    assert_same(got, (norms(of.critic, x(of)).max() - 1) ** 2, of)


def test_sobolev_norm_by_a_filter() -> None:
    of = ingredients()
    symmetric = torch.randn(6, 6).double()
    symmetric = symmetric + symmetric.T + 9 * torch.eye(6)
    inverse = symmetric.inverse()
    got = gradient_penalty(lambda y: of.critic(y @ symmetric), of.real @ inverse, of.fake @ inverse, mix=of.mix)
    expected = (((gradient(of.critic, x(of)) @ symmetric).norm(2, dim=1) - 1) ** 2).mean()
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_other_points_go_in_as_real() -> None:
    of = ingredients()
    got = gradient_penalty(of.critic, of.mask, at="real", target=1)
    assert_same(got, ((norms(of.critic, of.mask) - 1) ** 2).mean(), of)


def test_lazy_penalty_in_the_loss_is_on_average_the_penalty() -> None:
    of = ingredients()
    lazy = GradientPenalty(at="real", every=16)
    total = sum(lazy(of.critic, of.real) for _ in range(32))
    torch.testing.assert_close(total / 32, squares(of.critic, of.real).mean())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("at", ["interpolates", "real", "fake", "noise"])
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"reduction": "max", "one_sided": True},
        {"target": 0.8, "one_sided": True},
        {"power": 1.0},
        {"power": 3.5, "one_sided": True, "reduction": "sum"},
        {"p": 1.5, "reduction": "sum"},
        {"mask": torch.arange(6) % 2, "reduction": "sum"},
    ],
    ids=str,
)
def test_losses_are_made_of_the_same_penalty(options: dict[str, Any], at: Any, engine: Any) -> None:
    of = ingredients()
    common = {"at": at, "mix": of.mix, "engine": engine} | options
    parts = wgan_gp_loss(
        of.critic, of.real, of.fake, 2.5, return_parts=True, generator=torch.Generator().manual_seed(3), **common
    )
    penalty, lengths = gradient_penalty(
        of.critic, of.real, of.fake, return_norms=True, generator=torch.Generator().manual_seed(3), **common
    )
    assert_same(parts.loss, wasserstein(of) + 2.5 * penalty, of)
    torch.testing.assert_close(parts.penalty, penalty.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.norms, lengths, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.real_scores, of.critic(of.real)[:, 0].detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.fake_scores, of.critic(of.fake)[:, 0].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_conditions_are_rows_of_real_and_of_fake(engine: Any) -> None:
    of = ingredients()
    fake = torch.cat([of.fake, of.fake])
    for labels in ({"critic_args": (of.labels,)}, {"critic_kwargs": {"labels": of.labels}}):
        with pytest.raises(ValueError, match=r"wgan_gp_loss: fake must have as many samples as real \(11\), got 22"):
            wgan_gp_loss(of.conditional_critic, of.real, fake, at="real", engine=engine, **labels)


# The code blocks


BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


class DropoutCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Dropout(0.5))
        self.out = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.out(features), features


def stand_ins() -> dict[str, Any]:
    """What the page's code blocks take for granted."""
    critic = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    generator = nn.Linear(3, 6)
    real, fake = torch.randn(2, 12, 6)
    return {name: getattr(wgan_ext, name) for name in wgan_ext.__all__} | {
        "torch": torch,
        "critic": critic,
        "dropout_critic": DropoutCritic(),
        "generator": generator,
        "latent": torch.randn(12, 3),
        "critic_optimizer": torch.optim.Adam(critic.parameters(), lr=1e-4),
        "generator_optimizer": torch.optim.Adam(generator.parameters(), lr=1e-4),
        "real": real,
        "fake": fake,
        "batches": [real, fake],
        "pairs": [(real, fake)] * 2,
        "device": "cpu",
        "history": [],
    }


@pytest.fixture
def _one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def _no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What of torch.cuda the page names, doing nothing."""
    graph = SimpleNamespace(replay=lambda: None)
    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name, stand_in in {
        "CUDAGraph": lambda: graph,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": contextlib.nullcontext,
        "graph": contextlib.nullcontext,
        "make_graphed_callables": lambda module, sample_args, allow_unused_input: module,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
@pytest.mark.usefixtures("_one_process", "_no_cuda")
@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch.distributed", "ignore:.*barrier:UserWarning")
def test_code_blocks_run(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    names = stand_ins()
    before = [p.detach().clone() for p in names["critic"].parameters()]
    text = BLOCKS[block]
    if text.startswith("# needs a GPU"):
        text = text.replace("capturable=True", "capturable=False")
    exec(compile(text, f"docs/penalties.md, block {block}", "exec"), names)
    if "distance" in names:
        assert names["distance"].shape == (12, 1)
    for name in ("loss", "penalty", "consistency", "static_loss"):
        assert name not in names or names[name].isfinite()
    if "step()" in text:
        now = [getattr(p, "full_tensor", lambda p=p: p)() for p in names["critic"].parameters()]
        assert not all(map(torch.equal, before, now))


def test_the_page_has_its_blocks() -> None:
    assert len(BLOCKS) == PAGE.count("```python") == 10
    assert sum(text.startswith("# needs a GPU") for text in BLOCKS) == 2


def test_accumulated_parts_give_the_gradient_of_the_whole() -> None:
    of = ingredients()
    loss = CriticLoss(of.critic, one_sided=True, engine="autograd")
    whole = torch.autograd.grad(loss(of.real[:8], of.fake[:8], mix=of.mix[:8]), list(of.critic.parameters()))
    parts = zip(*(t[:8].chunk(4) for t in (of.real, of.fake, of.mix)), strict=True)
    for real, fake, mix in parts:
        (loss(real, fake, mix=mix) / 4).backward()
    for p, expected in zip(of.critic.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-12)
