"""Spectral normalization of one layer, and of a whole critic, against torch.nn.utils.spectral_norm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import utils as torch_utils

import wgan_ext


def sndcgan() -> list[nn.Module]:
    """The layers of the critic of Miyato et al. for 32 x 32 images (table 3)."""
    channels = [(3, 64, 3), (64, 64, 4), (64, 128, 3), (128, 128, 4), (128, 256, 3), (256, 256, 4), (256, 512, 3)]
    return [nn.Conv2d(*shape) for shape in channels] + [nn.Linear(512 * 4 * 4, 1)]


LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "Linear(128, 128)": lambda: [nn.Linear(128, 128)],
    "Linear(1024, 1024)": lambda: [nn.Linear(1024, 1024)],
    "Linear(4096, 4096)": lambda: [nn.Linear(4096, 4096)],
    "Conv2d(64, 128, 3)": lambda: [nn.Conv2d(64, 128, 3)],
    "Conv2d(256, 512, 4)": lambda: [nn.Conv2d(256, 512, 4)],
    "ConvTranspose2d(512, 256, 4)": lambda: [nn.ConvTranspose2d(512, 256, 4)],
    "critic of 8 layers": sndcgan,
}
FUSED = "critic of 8 layers, fused"


class Layers:
    """The normalization alone of some layers: their pre-hooks, and backward from given gradients of their weights."""

    def __init__(self, layers: list[nn.Module], normalize: Callable[[nn.Module], nn.Module]) -> None:
        self.layers = [normalize(copy.deepcopy(layer)) for layer in layers]
        self.hooks = [next(iter(layer._forward_pre_hooks.values())) for layer in self.layers]
        self.grads = [torch.ones_like(layer.weight_orig) for layer in self.layers]

    def forward(self) -> None:
        for layer, hook in zip(self.layers, self.hooks, strict=True):
            hook(layer, ())

    def forward_backward(self) -> None:
        self.forward()
        for layer in self.layers:
            layer.weight_orig.grad = None
        torch.autograd.backward([layer.weight for layer in self.layers], self.grads)


class FusedLayers(Layers):
    """The same of a fused model: its hooks besides."""

    def __init__(self, layers: list[nn.Module], normalize: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__(layers, normalize)
        self.model = nn.ModuleList(self.layers)
        wgan_ext.fuse_spectral_norm_(self.model)
        (self.begin,) = self.model._forward_pre_hooks.values()
        (self.finish,) = self.model._forward_hooks.values()

    def forward(self) -> None:
        self.begin(self.model, ())
        super().forward()
        self.finish(self.model, (), None)


@pytest.mark.parametrize("call", ["forward", "forward_backward"])
@pytest.mark.parametrize("name", [*LAYERS, FUSED])
def test_spectral_norm(name: str, call: str, device: torch.device, contest: Any) -> None:
    layers = [layer.to(device) for layer in (sndcgan() if name == FUSED else LAYERS[name]())]
    ours_kind = FusedLayers if name == FUSED else Layers
    contestants = {
        "wgan_ext": ours_kind(layers, wgan_ext.spectral_norm),
        "torch": Layers(layers, torch_utils.spectral_norm),
    }
    ours, theirs = contestants["wgan_ext"], contestants["torch"]
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        a.load_state_dict(b.state_dict())
    for contestant in contestants.values():
        contestant.forward_backward()
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(a.weight, b.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.weight_orig.grad, b.weight_orig.grad, rtol=1e-3, atol=1e-3)
    contest(
        f"spectral_norm, {call.replace('_', ' and ')}, {name}", {k: getattr(c, call) for k, c in contestants.items()}
    )
