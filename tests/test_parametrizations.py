"""What is particular to the parametrization; test_spectral_interfaces.py has what it shares with the hook."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as TorchSpectralNorm

import wgan_ext
from wgan_ext.parametrizations import spectral_norm

DOUBLE, COMPLEX = torch.float64, torch.complex128


def linear(**options: Any) -> nn.Linear:
    return nn.Linear(4, 3, **options)


def pair(module: nn.Module, **options: Any) -> tuple[Any, Any]:
    """The module normalized by torch and by us, from one seed."""
    modules = []
    for normalize in (torch_parametrizations.spectral_norm, spectral_norm):
        torch.manual_seed(1)
        modules.append(normalize(copy.deepcopy(module), **options))
    return modules[0], modules[1]


def u_of(module: nn.Module, name: str = "weight") -> Tensor:
    return module.get_buffer(f"parametrizations.{name}.0._u")


def test_the_module_is_in_the_package() -> None:
    assert wgan_ext.parametrizations.spectral_norm is spectral_norm


def test_what_stands_in_the_module_is_torchs_too() -> None:
    module = spectral_norm(linear(), n_power_iterations=2, eps=1e-6)
    assert type(module).__name__ == "ParametrizedLinear"
    assert isinstance(module, nn.Linear)
    assert parametrize.is_parametrized(module, "weight")
    assert parametrize.type_before_parametrizations(module) is nn.Linear
    (parametrization,) = module.parametrizations.weight
    assert isinstance(parametrization, TorchSpectralNorm)
    assert (parametrization.n_power_iterations, parametrization.eps, parametrization.dim) == (2, 1e-6, 0)
    assert spectral_norm(linear(), dim=-1).parametrizations.weight[0].dim == 1


def test_every_read_in_training_iterates() -> None:
    theirs, ours = pair(linear(dtype=DOUBLE))
    for _ in range(3):
        before = u_of(ours).clone()
        torch.testing.assert_close(theirs.weight, ours.weight)
        torch.testing.assert_close(u_of(theirs), u_of(ours))
        assert not torch.equal(u_of(ours), before)
    ours.eval()
    before = u_of(ours).clone()
    assert torch.equal(ours.weight, ours.weight)
    assert torch.equal(u_of(ours), before)


def test_cached_reads_iterate_once() -> None:
    theirs, ours = pair(linear(dtype=DOUBLE))
    with parametrize.cached():
        assert ours.weight is ours.weight
        assert theirs.weight is theirs.weight
        ours.weight.sum().backward()
    torch.testing.assert_close(u_of(theirs), u_of(ours))
    torch.testing.assert_close(theirs.weight, ours.weight)
    x = torch.randn(2, 4, dtype=DOUBLE)
    with parametrize.cached():
        ours.zero_grad()
        (ours(x) - ours(x).square()).sum().backward()
    theirs.weight  # noqa: B018  # one iteration
    torch.testing.assert_close(u_of(theirs), u_of(ours))


def test_assignment_writes_the_original() -> None:
    module = spectral_norm(linear())
    original = module.parametrizations.weight.original
    value = torch.randn(3, 4)
    assert module.parametrizations.weight[0].right_inverse(value) is value
    module.weight = value
    assert module.parametrizations.weight.original is original
    assert torch.equal(original, value)
    for _ in range(100):
        module.weight  # noqa: B018
    torch.testing.assert_close(module.weight, value / torch.linalg.matrix_norm(value, 2))


@pytest.mark.parametrize("first", [torch_parametrizations.spectral_norm, spectral_norm])
@pytest.mark.parametrize("second", [torch_parametrizations.spectral_norm, spectral_norm])
def test_stacking(first: Callable[..., Any], second: Callable[..., Any]) -> None:
    expected, module = linear(dtype=DOUBLE), linear(dtype=DOUBLE)
    module.load_state_dict(expected.state_dict())
    for normalize in (torch_parametrizations.spectral_norm, torch_parametrizations.spectral_norm):
        torch.manual_seed(4)
        normalize(expected)
    for normalize in (first, second):
        torch.manual_seed(4)
        normalize(module)
    assert len(module.parametrizations.weight) == 2
    torch.testing.assert_close(module.weight, expected.weight)
    torch.testing.assert_close(module.state_dict(), expected.state_dict())
    parametrize.remove_parametrizations(module, "weight")
    parametrize.remove_parametrizations(expected, "weight")
    torch.testing.assert_close(module.weight, expected.weight)


def test_other_parametrizations_beside_and_below() -> None:
    module, expected = linear(dtype=DOUBLE), linear(dtype=DOUBLE)
    module.load_state_dict(expected.state_dict())
    for m, normalize in ((module, spectral_norm), (expected, torch_parametrizations.spectral_norm)):
        torch.manual_seed(3)
        torch_parametrizations.weight_norm(m)
        normalize(m)
        normalize(m, "bias")
    x = torch.randn(2, 4, dtype=DOUBLE)
    torch.testing.assert_close(module(x), expected(x))
    module(x).sum().backward()
    expected(x).sum().backward()
    for a, b in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_buffer_can_be_normalized() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("matrix", torch.eye(3, 4, dtype=DOUBLE) * 5 + 1)

    theirs, ours = pair(Fixed(), name="matrix")
    torch.testing.assert_close(theirs.matrix, ours.matrix)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert not list(ours.parameters())


@pytest.mark.parametrize("leave_parametrized", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_removal_keeps_the_parameter(train: bool, leave_parametrized: bool) -> None:
    """In training, torch's removal makes one more iteration."""
    theirs, ours = pair(linear(dtype=DOUBLE).train(train))
    original = ours.parametrizations.weight.original
    for module in (theirs, ours):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized)
        assert type(module) is nn.Linear
    assert ours.weight is original
    torch.testing.assert_close(theirs.weight, ours.weight)


def test_transfer_to_another_module() -> None:
    module, other = spectral_norm(linear()).eval(), linear().eval()
    parametrize.transfer_parametrizations_and_params(module, other)
    assert torch.equal(module.weight, other.weight)
    assert isinstance(other.parametrizations.weight[0], TorchSpectralNorm)


def test_pickles_are_those_of_state_dicts() -> None:
    module = spectral_norm(linear())
    for dump in (pickle.dumps, copy.copy, lambda m: torch.save(m, io.BytesIO())):
        with pytest.raises(RuntimeError, match=r"only supported through state_dict\(\)"):
            dump(module)
    parametrization = pickle.loads(pickle.dumps(module.parametrizations.weight[0].eval()))
    torch.testing.assert_close(parametrization(module.parametrizations.weight.original), module.eval().weight)


# ---- vectors, complex matrices


@pytest.mark.parametrize("dim", [None, 0, -1])
def test_vectors_are_divided_by_their_norm(dim: int | None, device: torch.device) -> None:
    theirs, ours = pair(linear(dtype=DOUBLE, device=device), name="bias", dim=dim)
    assert list(dict(ours.named_buffers())) == []
    assert list(theirs.state_dict()) == list(ours.state_dict())
    gradients = []
    for module in (theirs, ours):
        module.bias.sin().sum().backward()
        gradients.append(module.parametrizations.bias.original.grad)
    assert torch.equal(theirs.bias, ours.bias)
    assert torch.equal(*gradients)
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(ours).to(dtype)
        original = half.parametrizations.bias.original
        assert torch.equal(half.bias, nn.functional.normalize(original.float(), dim=0).to(dtype))
        nn.init.zeros_(original)
        assert not half.bias.any()  # torch's is NaN in float16, which has no 1e-12


@pytest.mark.parametrize("n_power_iterations", [1, 3])
@pytest.mark.parametrize("make", [lambda: linear(dtype=COMPLEX), lambda: nn.ConvTranspose1d(4, 3, 2, dtype=COMPLEX)])
def test_complex_matrices(make: Callable[[], nn.Module], n_power_iterations: int, device: torch.device) -> None:
    theirs, ours = pair(make().to(device), n_power_iterations=n_power_iterations)
    for train in (True, True, False):
        gradients = []
        for module in (theirs, ours):
            module.zero_grad()
            weight = module.train(train).weight
            (weight.real.sin() + weight.imag.cos()).sum().backward()
            gradients.append(module.parametrizations.weight.original.grad)
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(theirs.state_dict(), ours.state_dict())
    ours.train()
    for _ in range(300):
        ours.weight  # noqa: B018
    matrix = ours.weight.detach()
    dim = ours.parametrizations.weight[0].dim
    norm = torch.linalg.matrix_norm(matrix.movedim(dim, 0).flatten(1), 2)
    torch.testing.assert_close(norm, torch.ones_like(norm))


def test_a_complex_weight_of_zeros_stays_zero() -> None:
    module = spectral_norm(linear(dtype=torch.complex64))
    before = u_of(module).clone()
    nn.init.zeros_(module.parametrizations.weight.original)
    assert not module.weight.any()
    assert torch.equal(u_of(module), before)


# ---- refusals


@pytest.mark.parametrize(
    "call",
    [
        lambda f: f(nn.ReLU()),
        lambda f: f(linear(), "kernel"),
        lambda f: f(linear(bias=False), "bias"),
        lambda f: f(linear(), "in_features"),
        lambda f: f(linear(), n_power_iterations=0),
        lambda f: f(linear(), n_power_iterations=-1),
        lambda f: f(linear(), dim=2),
        lambda f: f(linear(), dim=-3),
        lambda f: f(linear(), "bias", dim=1),
        lambda f: f(nn.PReLU(), dim=1),
        lambda f: f(nn.LazyLinear(3)),
    ],
)
def test_errors_are_torchs(call: Callable[[Any], object]) -> None:
    with pytest.raises((ValueError, IndexError, RuntimeError)) as theirs:
        call(torch_parametrizations.spectral_norm)
    with pytest.raises(theirs.type, match=r"^spectral_norm: "):
        call(spectral_norm)


@pytest.mark.parametrize("norm", [wgan_ext.spectral_norm, wgan_ext.parametrizations.spectral_norm])
@pytest.mark.parametrize(("size", "shrink_only", "want"), [(3.0, False, 0.5), (3.0, True, 0.5), (0.1, True, None)])
def test_target(norm: Callable[..., nn.Module], size: float, shrink_only: bool, want: float | None) -> None:
    """The norm that the weight gets, in both interfaces."""
    module = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.weight.mul_(size / torch.linalg.matrix_norm(module.weight, 2))
    norm(module, n_power_iterations=200, target=0.5, shrink_only=shrink_only)
    module(torch.ones(4, dtype=torch.float64))
    assert torch.linalg.matrix_norm(module.weight, 2).item() == pytest.approx(want or size)


@pytest.mark.parametrize("shrink_only", [False, True])
def test_target_of_a_vector(shrink_only: bool) -> None:
    module = nn.PReLU(3)
    parametrized = wgan_ext.parametrizations.spectral_norm(module, target=2.0, shrink_only=shrink_only)
    want = 0.25 * 3**0.5 if shrink_only else 2.0
    assert parametrized.weight.norm().item() == pytest.approx(want)
