"""A fused model against the same model whose layers normalize one by one: the same numbers in every use."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import utils as torch_utils
from torch.nn.utils import parametrizations as torch_parametrizations

import wgan_ext
from wgan_ext import _ops
from wgan_ext.spectral_group import group_of
from wgan_ext.spectral_hook import PENDING

NORMS: dict[str, Callable[..., Any]] = {
    "hook": wgan_ext.spectral_norm,
    "torch's hook": torch_utils.spectral_norm,
    "parametrization": wgan_ext.parametrizations.spectral_norm,
    "torch's parametrization": torch_parametrizations.spectral_norm,
}


class Critic(nn.Module):
    """Uses one layer twice, one never, and one only if asked."""

    def __init__(self, norm: Callable[..., Any]) -> None:
        super().__init__()
        self.first = norm(nn.Conv2d(2, 8, 3), n_power_iterations=2)
        self.twice = norm(nn.Conv2d(8, 8, 3, padding=1))
        self.never = norm(nn.Linear(3, 3))
        self.up = norm(nn.ConvTranspose2d(8, 4, 2))
        self.sometimes = norm(nn.Linear(4, 4))
        self.plain = nn.Linear(4, 4)
        self.last = norm(nn.Linear(4, 1, bias=False))

    def forward(self, x: Tensor, sometimes: bool = True) -> Tensor:
        h = self.first(x).relu()
        h = self.twice(self.twice(h).relu()).relu()
        h = self.up(h).relu().mean((2, 3))
        if sometimes:
            h = self.sometimes(h)
        return self.last(self.plain(h).relu())


def pair(norm: Callable[..., Any], device: torch.device) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    each = Critic(norm).to(device)
    for module in each.modules():  # ours, one by one
        for hook in module._forward_pre_hooks.values():
            hook.__class__ = wgan_ext.spectral_hook.SpectralNorm
        if type(module) is torch_parametrizations._SpectralNorm:
            module.__class__ = wgan_ext.parametrizations._SpectralNorm
    torch.manual_seed(0)
    together = Critic(norm).to(device)
    together.load_state_dict(each.state_dict())
    assert wgan_ext.fuse_spectral_norm_(together) == 6
    return each, together


def weights(model: nn.Module) -> list[Tensor]:
    with torch.nn.utils.parametrize.cached(), torch.no_grad():
        was = model.training
        model.eval()
        found = [module.weight for module in model.children() if hasattr(module, "weight")]
        model.train(was)
        return found


def assert_same(each: nn.Module, together: nn.Module) -> None:
    a, b = each.state_dict(), together.state_dict()
    assert list(a) == list(b)
    for key in a:
        assert torch.equal(a[key], b[key]), key
    for x, y in zip(weights(each), weights(together), strict=True):
        torch.testing.assert_close(x, y)  # of a layer that was not used it is found anew
    for (name, p), q in zip(each.named_parameters(), together.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    assert not any(PENDING in module.__dict__ for module in together.modules())


@pytest.fixture(params=NORMS)
def models(request: pytest.FixtureRequest, device: torch.device) -> tuple[nn.Module, nn.Module]:
    return pair(NORMS[request.param], device)


def step(model: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    output = model(x, **kwargs)
    output.square().sum().backward()
    return output


def test_every_use_is_the_layers_own(models: tuple[nn.Module, nn.Module], device: torch.device) -> None:
    each, together = models
    x = torch.randn(3, 2, 6, 6, device=device)
    for train, sometimes in [(True, True), (True, False), (False, True), (True, True), (True, False), (True, True)]:
        for model in models:
            model.train(train)
        assert torch.equal(step(each, x, sometimes=sometimes), step(together, x, sometimes=sometimes))
        assert_same(each, together)
    y = torch.randn(2, 8, 5, 5, device=device)
    assert torch.equal(each.twice(y), together.twice(y))  # by itself
    assert_same(each, together)
    with torch.no_grad():
        assert torch.equal(each(x), together(x))
    assert_same(each, together)
    torch.optim.SGD(each.parameters(), 0.1).step()
    torch.optim.SGD(together.parameters(), 0.1).step()
    (each(x).sum() - each(-x).sum()).backward()
    (together(x).sum() - together(-x).sum()).backward()
    assert_same(each, together)


def test_one_call_of_the_operator(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    _, together = pair(wgan_ext.spectral_norm, device)
    calls: list[int] = []

    def counting(name: str) -> Callable[..., Any]:
        operator = getattr(_ops, name)

        def call(weight: Any, *args: Any) -> Any:
            calls.append(len(weight) if isinstance(weight, list) else 1)
            return operator(weight, *args)

        return call

    for name in ("spectral_norm_group", "spectral_norm_"):
        monkeypatch.setattr(_ops, name, counting(name))
    together(torch.randn(1, 2, 6, 6, device=device))
    assert calls == [6, 1]  # all, and the one that is used twice again
    calls.clear()
    together.eval()(torch.randn(1, 2, 6, 6, device=device))
    assert calls == [6, 1]


@pytest.mark.parametrize("change", ["weight", "mode"])
def test_a_layer_that_changes_before_its_use_normalizes_alone(change: str, device: torch.device) -> None:
    models = pair(wgan_ext.spectral_norm, device)
    x = torch.randn(3, 2, 6, 6, device=device)

    def alter(module: nn.Module, inputs: Any) -> None:
        critic = module.critic()  # type: ignore[operator]
        if change == "weight":
            with torch.no_grad():
                critic.last.weight_orig.mul_(1.5)
        else:
            critic.last.eval()

    for model in models:
        model.up.critic = lambda model=model: model
        model.up.register_forward_pre_hook(alter)
    assert torch.equal(step(models[0], x), step(models[1], x))
    assert_same(*models)


def test_a_forward_that_raises_leaves_what_its_layers_did(device: torch.device) -> None:
    models = pair(wgan_ext.spectral_norm, device)
    for model in models:
        with pytest.raises(RuntimeError):
            model(torch.randn(3, 2, 6, 6, device=device, dtype=torch.float64))  # in the first layer
    assert_same(*models)
    for model in models:
        step(model, torch.ones(3, 2, 6, 6, device=device))
    assert_same(*models)


def test_copies_and_pickles(device: torch.device) -> None:
    each, together = pair(wgan_ext.spectral_norm, device)
    x = torch.randn(3, 2, 6, 6, device=device)
    step(each, x), step(together, x)
    copies = [copy.deepcopy(together), pickle.loads(pickle.dumps(together.zero_grad() or together))]
    want = each(x)
    for copied in copies:
        assert group_of(copied) is not None
        assert group_of(copied) is not group_of(together)
        assert torch.equal(want, copied(x))
        assert torch.equal(copied.first.weight_u, each.first.weight_u)
        assert not torch.equal(copied.first.weight_u, together.first.weight_u)


def test_replicas_share_the_buffers(device: torch.device) -> None:
    each, together = pair(wgan_ext.spectral_norm, device)
    x = torch.randn(3, 2, 6, 6, device=device)
    modules = list(together.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])  # type: ignore[index]
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter if parameter is None else parameter.view_as(parameter))
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer
    assert torch.equal(replicas[together](x), each(x))
    assert all(map(torch.equal, each.state_dict().values(), together.state_dict().values()))


def test_removed_layers_and_fusing_again(device: torch.device) -> None:
    each, together = pair(wgan_ext.spectral_norm, device)
    x = torch.randn(3, 2, 6, 6, device=device)
    step(each, x), step(together, x)
    for model in (each, together):
        wgan_ext.remove_spectral_norm(model.up)
        torch_utils.remove_spectral_norm(model.last)
    assert torch.equal(each(x), together(x))
    assert_same(each, together)
    assert wgan_ext.fuse_spectral_norm_(together) == 4
    assert len(together._forward_pre_hooks) == len(together._forward_hooks) == 1
    assert torch.equal(each(x), together(x))
    assert_same(each, together)


def test_a_fused_part_of_a_fused_model(device: torch.device) -> None:
    each, together = pair(wgan_ext.spectral_norm, device)
    wgan_ext.fuse_spectral_norm_(together.twice)
    x = torch.randn(3, 2, 6, 6, device=device)
    assert torch.equal(step(each, x), step(together, x))
    assert_same(each, together)
    assert wgan_ext.fuse_spectral_norm_(together) == 6
    assert group_of(together.twice) is None


def test_a_rule_that_is_replaced(device: torch.device) -> None:
    model = nn.Sequential(wgan_ext.spectral_norm(nn.Linear(4, 4))).to(device)
    wgan_ext.fuse_spectral_norm_(model)
    x = torch.randn(2, 4, device=device)
    model(x)
    wgan_ext.spectral_norm(wgan_ext.remove_spectral_norm(model[0]), n_power_iterations=100, target=3.0)
    model(x)
    assert torch.linalg.matrix_norm(model[0].weight, 2).item() == pytest.approx(3, rel=1e-3)


def test_forwards_that_read_the_weight_before_its_use(device: torch.device) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = wgan_ext.spectral_norm(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.to(self.layer.weight.dtype))

    model = Reads().to(device)
    wgan_ext.fuse_spectral_norm_(model)
    for _ in range(3):
        step(model, torch.randn(2, 4, device=device))


def test_checkpointed_parts(device: torch.device) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (wgan_ext.spectral_norm(nn.Linear(4, 4)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.b, self.a(x).relu(), use_reentrant=False)

    torch.manual_seed(0)
    each = Checkpointed().to(device)
    together = copy.deepcopy(each)
    wgan_ext.fuse_spectral_norm_(together)
    x = torch.randn(2, 4, device=device)
    for _ in range(2):
        assert torch.equal(step(each, x), step(together, x))
    for p, q in zip(each.parameters(), together.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert all(map(torch.equal, each.state_dict().values(), together.state_dict().values()))


def test_a_model_that_calls_itself(device: torch.device) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = wgan_ext.spectral_norm(nn.Linear(4, 4))

        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            h = self.layer(x)
            return self(h, again=False) if again else h

    torch.manual_seed(0)
    each = Twice().to(device)
    together = copy.deepcopy(each)
    wgan_ext.fuse_spectral_norm_(together)
    x = torch.randn(2, 4, device=device)
    for _ in range(2):
        assert torch.equal(each(x), together(x))
    assert all(map(torch.equal, each.state_dict().values(), together.state_dict().values()))


def test_threads_share_a_model(device: torch.device) -> None:
    each, together = pair(wgan_ext.spectral_norm, device)
    x = torch.randn(3, 2, 6, 6, device=device)
    with torch.no_grad():
        want = each.eval()(x)
    together.eval()

    def run(_: int) -> bool:
        with torch.no_grad():
            return all(torch.allclose(together(x), want, rtol=1e-4, atol=1e-5) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


def test_tensors_of_inference_mode(device: torch.device) -> None:
    with torch.inference_mode():
        model = nn.Sequential(wgan_ext.spectral_norm(nn.Linear(4, 4))).to(device)
        wgan_ext.fuse_spectral_norm_(model)
        model(torch.ones(4, device=device))


def test_what_cannot_be_normalized_is_left_whole(device: torch.device) -> None:
    _, together = pair(wgan_ext.spectral_norm, device)
    x = torch.randn(3, 2, 6, 6, device=device)
    step(together, x)
    good = together.up.weight_u.data
    together.up.weight_u.data = torch.zeros(1, device=device)
    with pytest.raises(ValueError, match="u must have shape"):
        together(x)
    assert together.first.weight is not None
    together.up.weight_u.data = good
    together(x)


def test_two_weights_of_a_module(device: torch.device) -> None:
    torch.manual_seed(0)
    each = nn.Sequential(nn.Bilinear(3, 4, 5), nn.GRUCell(5, 4)).to(device)
    norm = wgan_ext.spectral_norm
    norm(norm(each[1], "weight_ih"), "weight_hh")
    together = copy.deepcopy(each)
    assert wgan_ext.fuse_spectral_norm_(together) == 2
    x = torch.randn(2, 5, device=device)
    together.forward = lambda x: together[1](x)
    assert torch.equal(each[1](x), together(x))
    assert all(map(torch.equal, each.state_dict().values(), together.state_dict().values()))


def test_what_stays_as_it_is(device: torch.device) -> None:
    vector = torch_parametrizations.spectral_norm(nn.PReLU(3))
    stacked = wgan_ext.parametrizations.spectral_norm(torch_parametrizations.weight_norm(nn.Linear(3, 3)))
    complex_layer = torch_parametrizations.spectral_norm(nn.Linear(3, 3, dtype=torch.complex64))
    model = nn.ModuleList([vector, stacked, complex_layer, nn.Linear(2, 2)]).to(device)
    wgan_ext.fuse_spectral_norm_(model)
    x = torch.randn(4, 3, device=device)
    assert stacked(x).shape == complex_layer(x.cfloat()).shape == x.shape
    assert wgan_ext.fuse_spectral_norm_(nn.Linear(2, 2)) == 0


@pytest.mark.parametrize("api", ["hook", "parametrization"])
def test_gradient_penalties_count_one_iteration(api: str, device: torch.device) -> None:
    torch.manual_seed(0)
    norm = NORMS[api]
    each = nn.Sequential(norm(nn.Linear(6, 8)), nn.ReLU(), norm(nn.Linear(8, 8)), nn.ReLU(), norm(nn.Linear(8, 1)))
    each = each.to(device)
    together = copy.deepcopy(each)
    assert wgan_ext.fuse_spectral_norm_(together) == 3
    real, fake, mix = (torch.randn(5, n, device=device) for n in (6, 6, 1))
    assert str(wgan_ext.explain(together, real)) == str(wgan_ext.explain(each, real))
    for _ in range(3):
        losses = [
            wgan_ext.wgan_gp_loss(model, real, fake, mix=mix, engine="analytic")
            + wgan_ext.gradient_penalty(model, real, fake, mix=mix, engine="analytic")
            for model in (each, together)
        ]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        for p, q in zip(each.parameters(), together.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        assert all(map(torch.equal, each.state_dict().values(), together.state_dict().values()))


def test_compiled_models_normalize_layer_by_layer(device: torch.device) -> None:
    each, together = pair(wgan_ext.spectral_norm, device)
    x = torch.randn(3, 2, 6, 6, device=device)
    compiled = torch.compile(together, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(step(each, x), step(compiled, x))
    for a, b in zip(each.state_dict().values(), together.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("api", NORMS)
def test_vectors_converge(api: str, device: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(NORMS[api](nn.Linear(6, 8)), nn.Flatten(), NORMS[api](nn.ConvTranspose1d(3, 4, 2)))
    model = model.double().to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    sigmas = wgan_ext.converge_spectral_norm_(model, tol=1e-12, max_iter=10_000)
    names = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    assert list(sigmas) == names
    for name, dim in zip(names, (0, 1), strict=True):
        matrix = dict(model.named_parameters())[name].movedim(dim, 0).flatten(1)
        assert sigmas[name] == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=1e-9)
    with pytest.warns(UserWarning, match=r"after 10 iterations sigma still changes by more than 0 of itself in"):
        wgan_ext.converge_spectral_norm_(model, tol=0, max_iter=10)
