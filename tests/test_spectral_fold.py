"""Layers that divide their output by sigma against layers that divide their weight."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import prune

import wgan_ext
from wgan_ext import _ops
from wgan_ext.spectral_fold import FoldedSpectralNorm

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(6, 5), (4, 3, 6)),
    "Linear without bias": (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 8)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 3, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, bias=False), (2, 4, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3)),
}
OPTIONS: list[dict[str, Any]] = [{}, {"n_power_iterations": 3, "target": 0.5}, {"target": 0.1, "shrink_only": True}]


def pair(name: str, device: torch.device, **options: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    plain = make().to(device, torch.float64)
    folded = copy.deepcopy(plain)
    torch.manual_seed(1)
    wgan_ext.spectral_norm(plain, **options)
    torch.manual_seed(1)
    assert wgan_ext.spectral_norm(folded, fold=True, **options) is folded
    return plain, folded, torch.randn(shape, dtype=torch.float64, device=device)


def assert_same(plain: nn.Module, folded: nn.Module) -> None:
    assert list(plain.state_dict()) == list(folded.state_dict())
    for a, b in zip(plain.state_dict().values(), folded.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(plain.parameters(), folded.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_same_numbers(name: str, options: dict[str, Any], device: torch.device) -> None:
    plain, folded, x = pair(name, device, **options)
    assert isinstance(folded, type(plain))
    for train in (True, True, False, True):
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [m.train(train)(i) for m, i in zip((plain, folded), inputs, strict=True)]
        torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(plain.weight, folded.weight, rtol=1e-12, atol=1e-12)
        for output in outputs:
            output.square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-11, atol=1e-11)
        assert_same(plain, folded)
    (plain(x).sum() - plain(-x).exp().sum()).backward()
    (folded(x).sum() - folded(-x).exp().sum()).backward()
    assert_same(plain, folded)


@pytest.mark.parametrize("name", ["Linear", "Conv2d", "ConvTranspose2d"])
def test_derivatives(name: str, device: torch.device) -> None:
    _, folded, x = pair(name, device)
    folded.eval()
    names = [name for name, _ in folded.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters, strict=True))
        for key, value in values.items():
            del folded._parameters[key]
            setattr(folded, key, value)
        try:
            return folded(x)
        finally:
            for key in values:
                delattr(folded, key)
                folded._parameters[key] = originals[key]

    originals = dict(folded.named_parameters())
    x = x[:1, :2] if name == "Linear" else x[:1]
    inputs = [t.detach().clone().requires_grad_() for t in (x, *originals.values())]
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


def test_the_gradient_of_the_weight_does_not_read_it(device: torch.device) -> None:
    grad, u, v = (torch.randn(shape, device=device) for shape in ((4, 3), (4,), (3,)))
    poisoned, sigma = torch.full((4, 3), torch.nan, device=device), torch.tensor(2.0, device=device)
    got = _ops.spectral_norm_backward(grad, sigma, poisoned, u, v, sigma, 0, math.inf, True)
    torch.testing.assert_close(got, grad + 2 * torch.outer(u, v))


def test_a_frozen_weight(device: torch.device) -> None:
    plain, folded, x = pair("Linear", device)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for module, i in zip((plain, folded), inputs, strict=True):
        module.weight_orig.requires_grad_(False)
        module(i).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


def test_threads_share_a_layer(device: torch.device) -> None:
    plain, folded, x = pair("Linear", device)
    want = plain.eval()(x)
    folded.eval()

    def run(_: int) -> bool:
        with torch.no_grad():
            return all(torch.allclose(folded(x), want) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))
    torch.testing.assert_close(folded(x), want)


def test_a_bias_that_is_computed(device: torch.device) -> None:
    plain, folded, x = pair("Linear", device)
    for module in (plain, folded):
        prune.l1_unstructured(module, "bias", 2)
    torch.testing.assert_close(plain(x), folded(x))


def test_removal_by_another_name_changes_nothing(device: torch.device) -> None:
    plain, folded, x = pair("Linear", device)
    with pytest.raises(ValueError, match="not found"):
        wgan_ext.remove_spectral_norm(folded, "other")
    torch.testing.assert_close(plain(x), folded(x))


def test_removal_by_torch(device: torch.device) -> None:
    plain, folded, x = pair("ConvTranspose2d", device)
    for module in (plain, folded):
        torch.nn.utils.remove_spectral_norm(module)
    torch.testing.assert_close(plain(x), folded(x))


def test_copies_pickles_and_checkpoints(device: torch.device) -> None:
    plain, folded, x = pair("Conv2d", device)
    folded(x).sum().backward()
    plain(x).sum().backward()
    want = plain(x)
    for copied in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        torch.testing.assert_close(copied(x), want)
    plain.load_state_dict(folded.state_dict())
    torch.testing.assert_close(plain.eval()(x), folded.eval()(x))


@pytest.mark.parametrize("trained", [True, False])
def test_removal(trained: bool, device: torch.device) -> None:
    plain, folded, x = pair("Conv2d", device)
    if trained:
        plain(x), folded(x)
    for module in (plain, folded):
        wgan_ext.remove_spectral_norm(module)
    assert type(folded) is nn.Conv2d
    assert not folded._forward_hooks
    assert not folded._forward_pre_hooks
    assert list(plain.state_dict()) == list(folded.state_dict())
    torch.testing.assert_close(plain(x), folded(x))
    assert isinstance(folded.weight, nn.Parameter)


def test_replicas_share_the_buffers(device: torch.device) -> None:
    plain, folded, x = pair("Conv2d", device)
    replica = folded._replicate_for_data_parallel()
    for name, parameter in folded._parameters.items():
        setattr(replica, name, parameter.view_as(parameter))
    torch.testing.assert_close(plain(x), replica(x))
    torch.testing.assert_close(plain(x), replica(x))
    assert_same(plain, folded)


def test_a_forward_that_raises_leaves_the_layer_whole(device: torch.device) -> None:
    plain, folded, x = pair("Linear", device)
    for module in (plain, folded):
        with pytest.raises(RuntimeError):
            module(x[..., :-1])
    assert folded.bias is not None
    torch.testing.assert_close(plain(x), folded(x))
    assert_same(plain, folded)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str, device: torch.device) -> None:
    plain, folded, x = pair("Linear", device)
    compiled = torch.compile(folded, fullgraph=True, backend=backend)
    for _ in range(2):
        torch.testing.assert_close(plain(x), compiled(x))
    torch.testing.assert_close(plain.weight_u, folded.weight_u)


def test_transforms_and_engines(device: torch.device) -> None:
    plain, folded, x = pair("Linear", device)
    for module in (plain, folded):
        module.eval()
    torch.testing.assert_close(
        *[torch.func.jacrev(lambda x, module=module: module(x))(x) for module in (plain, folded)]
    )
    critics = [nn.Sequential(module, nn.Tanh(), nn.Flatten()) for module in (plain, folded)]
    torch.testing.assert_close(*[wgan_ext.gradient_penalty(critic, x, at="real") for critic in critics])
    assert "forward pre-hook" in str(wgan_ext.explain(critics[1], x))


def test_autocast(device: torch.device) -> None:
    plain, folded, x = pair("Linear", device)
    for module in (plain, folded):
        module.float()
    with torch.autocast(device.type, torch.bfloat16):
        want, got = plain(x.float()), folded(x.float())
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert isinstance(next(iter(folded._forward_pre_hooks.values())), FoldedSpectralNorm)


def test_a_fused_model_leaves_folded_layers_alone(device: torch.device) -> None:
    plain, folded, x = pair("Linear", device)
    model = nn.Sequential(folded)
    assert wgan_ext.fuse_spectral_norm_(model) == 0
    torch.testing.assert_close(plain(x), model(x))
