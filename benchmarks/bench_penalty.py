"""The gradient penalty and its derivative, against autograd's double backward."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from wgan_ext import gradient_penalty, reference


def mlp(*widths: int) -> nn.Sequential:
    layers = [layer for n, m in pairwise(widths) for layer in (nn.Linear(n, m), nn.LeakyReLU(0.2))]
    return nn.Sequential(*layers[:-1])


def dcgan(*channels: int) -> nn.Sequential:
    layers = [layer for n, m in pairwise(channels) for layer in (nn.Conv2d(n, m, 4, 2, 1), nn.LeakyReLU(0.2))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * 4 * 4, 1))


CRITICS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "MLP 2-64x2-1, B64": (lambda: mlp(2, 64, 64, 1), (64, 2)),
    "MLP 2-512x3-1, B256": (lambda: mlp(2, 512, 512, 512, 1), (256, 2)),
    "MLP 784-1024x2-1, B64": (lambda: mlp(784, 1024, 1024, 1), (64, 784)),
    "DCGAN 32, B64": (lambda: dcgan(3, 64, 128, 256), (64, 3, 32, 32)),
}


@pytest.mark.parametrize("name", CRITICS)
def test_gradient_penalty(name: str, contest: Callable[..., None], device: torch.device) -> None:
    make, shape = CRITICS[name]
    critic = make().to(device)
    real, fake = torch.randn(2, *shape, device=device)
    mix = torch.rand(shape[0], *[1] * (len(shape) - 1), device=device)
    parameters = list(critic.parameters())

    def step(penalty: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            for parameter in parameters:
                parameter.grad = None
            penalty().backward()
            return [parameter.grad for parameter in parameters if parameter.grad is not None]

        return run

    ours = step(lambda: gradient_penalty(critic, real, fake, mix=mix, engine="analytic"))
    eager = step(lambda: reference.gradient_penalty(critic, torch.lerp(fake, real, mix)))
    for got, expected in zip(ours(), eager(), strict=True):
        # float32 rounds the few activations next to 0 to either side, and each moves the gradient a little
        assert (got - expected).norm() <= 3e-3 * expected.norm()
    contest(f"gradient penalty and its derivative, {name}, float32", {"wgan_ext": ours, "autograd": eager})
