"""The gradient penalty, and the whole critic loss of WGAN-GP, with their gradients, against eager double backward."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from itertools import pairwise

import products
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wgan_ext import gradient_penalty, reference, spectral_norm, wgan_gp_loss

WEIGHT = 10.0
Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]  # of critic, real, fake, mix


def mlp(*widths: int, activation: Callable[[int], list[nn.Module]] = lambda _: [nn.LeakyReLU(0.2)]) -> nn.Sequential:
    layers = [layer for n, m in pairwise(widths[:-1]) for layer in (nn.Linear(n, m), *activation(m))]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


def dcgan(*channels: int, normalize: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> nn.Sequential:
    convolutions = [
        layer for n, m in pairwise(channels) for layer in (normalize(nn.Conv2d(n, m, 4, 2, 1)), nn.LeakyReLU(0.2))
    ]
    return nn.Sequential(*convolutions, nn.Flatten(), normalize(nn.Linear(channels[-1] * 4 * 4, 1)))


class Residual(nn.Module):
    def __init__(self, shortcut: nn.Module, *body: nn.Module) -> None:
        super().__init__()
        self.shortcut, self.body = shortcut, nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.body(x)


def resnet(n: int) -> nn.Sequential:
    """The critic of Gulrajani et al. 2017, appendix F, for 32 x 32 images, as in gan_cifar_resnet.py."""

    def convolution() -> nn.Conv2d:
        return nn.Conv2d(n, n, 3, padding=1)

    def pool() -> nn.AvgPool2d:
        return nn.AvgPool2d(2)

    return nn.Sequential(
        Residual(
            nn.Sequential(pool(), nn.Conv2d(3, n, 1)), nn.Conv2d(3, n, 3, padding=1), nn.ReLU(), convolution(), pool()
        ),
        Residual(nn.Sequential(nn.Conv2d(n, n, 1), pool()), nn.ReLU(), convolution(), nn.ReLU(), convolution(), pool()),
        Residual(nn.Identity(), nn.ReLU(), convolution(), nn.ReLU(), convolution()),
        Residual(nn.Identity(), nn.ReLU(), convolution(), nn.ReLU(), convolution()),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(n, 1),
    )


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inputs, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.inputs(x).chunk(3, -1)
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        return x + self.output(F.softmax(scores, -1) @ value)


def attention(tokens: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        Attention(width), nn.LeakyReLU(0.2), Attention(width), nn.Flatten(), nn.Linear(tokens * width, 1)
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """A critic, the shape of its input, and what products it needs; None if only autograd can take it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    kind: products.Kind | None = products.PIECEWISE_LINEAR


CRITICS = {
    "MLP 2-64x2-1, B64": Case(lambda: mlp(2, 64, 64, 1), (64, 2)),
    "MLP 2-512x3-1, B256": Case(lambda: mlp(2, 512, 512, 512, 1), (256, 2)),
    "MLP 784-1024x2-1, B64": Case(lambda: mlp(784, 1024, 1024, 1), (64, 784)),
    "DCGAN 32, B64": Case(lambda: dcgan(3, 64, 128, 256), (64, 3, 32, 32)),
    "DCGAN 64, B64": Case(lambda: dcgan(3, 64, 128, 256, 512), (64, 3, 64, 64)),
    "ResNet 32, B64": Case(lambda: resnet(128), (64, 3, 32, 32)),
    "DCGAN 32, spectral norm, B64": Case(lambda: dcgan(3, 64, 128, 256, normalize=spectral_norm), (64, 3, 32, 32)),
    "MLP 2-512x3-1, SiLU, B256": Case(
        lambda: mlp(2, 512, 512, 512, 1, activation=lambda _: [nn.SiLU()]), (256, 2), products.SMOOTH
    ),
    "MLP 2-512x3-1, LayerNorm, B256": Case(
        lambda: mlp(2, 512, 512, 512, 1, activation=lambda m: [nn.LayerNorm(m), nn.LeakyReLU(0.2)]),
        (256, 2),
        products.SMOOTH,
    ),
    "self-attention 16x128, B64": Case(lambda: attention(16, 128), (64, 16, 128), None),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Step:
    """A loss and its gradients, on copies of the critic and of its inputs in some memory format."""

    def __init__(
        self,
        loss: Loss,
        critic: nn.Module,
        inputs: list[Tensor],
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.loss = loss
        self.critic = copy.deepcopy(critic)
        if memory_format == torch.channels_last:
            self.critic.to(memory_format=memory_format)
            inputs = [x.to(memory_format=memory_format) for x in inputs]
        self.inputs = inputs

    def __call__(self) -> None:
        for parameter in self.critic.parameters():
            parameter.grad = None
        self.loss(self.critic, *self.inputs).backward()

    def gradients(self) -> list[Tensor]:
        """Those of all parameters, without power iterations: contestants make one or three."""
        self.critic.eval()
        self()
        self.critic.train()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.critic.parameters()]

    def multiply_adds(self) -> int:
        """What torch is asked for, counted on shapes alone."""
        twin = Step(self.loss, self.critic, [x.to("meta") for x in self.inputs])
        twin.critic.to("meta")
        with products.counted() as count:
            twin()
        return count["multiply_adds"]


def prepare(case: Case, device: torch.device) -> tuple[nn.Module, list[Tensor]]:
    """The critic, and real, fake and mix."""
    critic = case.make().to(device)
    real, fake = torch.randn(2, *case.shape, device=device)
    return critic, [real, fake, torch.rand(case.shape[0], *[1] * (len(case.shape) - 1), device=device)]


def check_agreement(ours: Step, rivals: dict[str, Step]) -> None:
    """Compare the gradients of every parameter."""
    gradients = ours.gradients()
    for name, rival in rivals.items():
        # float32 rounds the few activations next to 0 to either side, and each moves the gradient a little
        expected = rival.gradients()
        negligible = 1e-6 * torch.stack([gradient.norm() for gradient in expected]).norm()
        for got, wanted in zip(gradients, expected, strict=True):
            assert (got - wanted).norm() <= 3e-3 * wanted.norm() + negligible, name


@functools.cache
def product_seconds(name: str, device: torch.device) -> tuple[list[products.Layer], list[list[float]]]:
    """The layers of a critic and the least time of each of their products."""
    critic, (real, _, _) = prepare(CRITICS[name], device)
    layers = products.layers(critic, real)
    return layers, [layer.seconds() for layer in layers]


def counts(name: str, device: torch.device, loss: str, eager: Step) -> dict[str, object]:
    """The facts of a contest: multiply-adds of both sides, and the floor under the time of ours."""
    kind, asked = CRITICS[name].kind, eager.multiply_adds()
    if kind is None:
        return {"multiply_adds": {"wgan_ext": asked, "autograd": asked}}
    needs = getattr(kind, loss)
    layers, seconds = product_seconds(name, device)
    return {
        "multiply_adds": {"wgan_ext": products.needed(layers, needs), "autograd": asked},
        "floor_seconds": products.floor_seconds(layers, seconds, needs),
    }


def eager_penalty(critic: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    return reference.gradient_penalty(critic, torch.lerp(fake, real, mix))


def three_forwards(critic: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    return critic(fake).mean() - critic(real).mean() + WEIGHT * eager_penalty(critic, real, fake, mix)


def two_forwards(critic: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    real_scores, fake_scores = critic(torch.cat([real, fake])).chunk(2)
    return fake_scores.mean() - real_scores.mean() + WEIGHT * eager_penalty(critic, real, fake, mix)


@pytest.mark.parametrize("name", CRITICS)
def test_gradient_penalty(name: str, contest: Callable[..., None], device: torch.device) -> None:
    critic, inputs = prepare(CRITICS[name], device)
    ours = Step(lambda critic, real, fake, mix: gradient_penalty(critic, real, fake, mix=mix), critic, inputs)
    eager = Step(eager_penalty, critic, inputs)
    check_agreement(ours, {"autograd": eager})
    contest(
        f"gradient penalty and its derivative, {name}, float32",
        {"wgan_ext": ours, "autograd": eager},
        **counts(name, device, "penalty", eager),
    )


@pytest.mark.parametrize("name", CRITICS)
def test_critic_loss(name: str, contest: Callable[..., None], device: torch.device) -> None:
    critic, inputs = prepare(CRITICS[name], device)
    ours = Step(lambda critic, real, fake, mix: wgan_gp_loss(critic, real, fake, WEIGHT, mix=mix), critic, inputs)
    layouts = LAYOUTS if inputs[0].dim() == 4 else ["contiguous"]
    rivals = {
        f"{forwards}, {layout}": Step(loss, critic, inputs, LAYOUTS[layout])
        for layout in layouts
        for forwards, loss in {"three forwards": three_forwards, "two forwards": two_forwards}.items()
    }
    check_agreement(ours, rivals)
    contest(
        f"critic loss and its gradients, {name}, float32",
        {"wgan_ext": ours, **rivals},
        **counts(name, device, "loss", rivals["three forwards, contiguous"]),
    )
