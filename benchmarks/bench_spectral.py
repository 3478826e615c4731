"""Spectral normalization of one layer, and of a whole critic, against torch's two interfaces."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
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
    "critic of 8 layers, fused": sndcgan,
}
INTERFACES: dict[str, dict[str, Callable[[nn.Module], nn.Module]]] = {
    "spectral_norm": {"wgan_ext": wgan_ext.spectral_norm, "torch": torch_utils.spectral_norm},
    "parametrizations.spectral_norm": {
        "wgan_ext": wgan_ext.parametrizations.spectral_norm,
        "torch": torch_utils.parametrizations.spectral_norm,
    },
}


class Layers:
    """The normalization alone of some layers: their weights, and backward from given gradients of these."""

    def __init__(self, layers: list[nn.Module], normalize: Callable[[nn.Module], nn.Module]) -> None:
        self.layers = [normalize(copy.deepcopy(layer)) for layer in layers]
        self.originals = [p for layer in self.layers for name, p in layer.named_parameters() if "weight" in name]
        self.grads = [torch.ones_like(original) for original in self.originals]

    def forward(self) -> list[Tensor]:
        for layer in self.layers:
            for hook in layer._forward_pre_hooks.values():
                hook(layer, ())
        return [layer.weight for layer in self.layers]

    def forward_backward(self) -> None:
        for original in self.originals:
            original.grad = None
        torch.autograd.backward(self.forward(), self.grads)


class FusedLayers(Layers):
    """The same of a fused model."""

    def __init__(self, layers: list[nn.Module], normalize: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__(layers, normalize)
        self.model = nn.ModuleList(self.layers)
        wgan_ext.fuse_spectral_norm_(self.model)
        (self.begin,) = self.model._forward_pre_hooks.values()
        (self.finish,) = self.model._forward_hooks.values()

    def forward(self) -> list[Tensor]:
        self.begin(self.model, ())
        weights = super().forward()
        self.finish(self.model, (), None)
        return weights


@pytest.mark.parametrize("call", ["forward", "forward_backward"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("interface", INTERFACES)
def test_spectral_norm(interface: str, name: str, call: str, device: torch.device, contest: Any) -> None:
    layers = [layer.to(device) for layer in LAYERS[name]()]
    kinds = {"wgan_ext": FusedLayers if name.endswith("fused") else Layers, "torch": Layers}
    contestants = {library: kinds[library](layers, normalize) for library, normalize in INTERFACES[interface].items()}
    ours, theirs = contestants["wgan_ext"], contestants["torch"]
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        a.load_state_dict(b.state_dict())
    for contestant in contestants.values():
        contestant.forward_backward()
    for a, b in zip(ours.forward(), theirs.forward(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(ours.originals, theirs.originals, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)
    contest(f"{interface}, {call.replace('_', ' and ')}, {name}", {k: getattr(c, call) for k, c in contestants.items()})


@pytest.mark.parametrize("layer", [nn.Linear(1024, 1024), nn.Linear(4096, 4096)], ids=str)
def test_folded(layer: nn.Linear, device: torch.device, contest: Any) -> None:
    """A whole layer on 64 inputs, its product and derivative included."""
    x = torch.randn(64, layer.in_features, device=device)
    normalizations: dict[str, Callable[[nn.Module], nn.Module]] = {
        "wgan_ext": lambda layer: wgan_ext.spectral_norm(layer, fold=True),
        "weight divided": wgan_ext.spectral_norm,
        "torch": torch_utils.spectral_norm,
    }
    layers = {name: normalize(copy.deepcopy(layer).to(device)) for name, normalize in normalizations.items()}
    for other in layers.values():
        other.load_state_dict(layers["torch"].state_dict())

    def step(layer: nn.Module) -> Tensor:
        layer.zero_grad()
        output = layer(x)
        output.backward(x[:, : output.shape[1]])
        return output.detach()

    outputs = [step(layer) for layer in layers.values()]
    for output in outputs:
        torch.testing.assert_close(output, outputs[-1], rtol=1e-4, atol=1e-4)
    name = f"Linear({layer.in_features}, {layer.out_features})"
    contest(
        f"a layer folded, forward and backward, {name}, B64",
        {name: functools.partial(step, layer) for name, layer in layers.items()},
    )
