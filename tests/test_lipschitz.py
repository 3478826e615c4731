"""Norms of layers as operators against dense matrices and closed forms; bounds are never below the truth."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from critics import Forward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized

import wgan_ext
from wgan_ext import bounds, lipschitz_bound, operator_norm, operator_norm_bound, singular_values, spectral_report
from wgan_ext.norms import Singular, largest_singular
from wgan_ext.operators import LayerMap, map_of

Case = tuple[nn.Module, tuple[int, ...]]
MODES = ["zeros", "circular", "reflect", "replicate"]


def random_layer(rng: random.Random) -> Case:
    """A small convolution of any kind in float64, and a shape of inputs that it takes."""
    while True:
        nd = rng.choice([1, 1, 2, 2, 2, 3])
        groups = rng.choice([1, 1, 2])
        channels = groups * rng.randint(1, 3), groups * rng.randint(1, 3)
        kernel = [rng.randint(1, (5, 4, 3)[nd - 1]) for _ in range(nd)]
        stride = [rng.randint(1, 3) for _ in range(nd)]
        dilation = [rng.randint(1, 2) for _ in range(nd)]
        options: dict[str, Any] = {"groups": groups, "dilation": dilation, "dtype": torch.float64}
        layer: nn.Module
        if rng.random() < 0.35:
            extra = [rng.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True)]
            padding: Any = [rng.randint(0, 1) for _ in range(nd)]
            kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[nd - 1]
            layer = kind(*channels, kernel, stride, padding, extra, **options)
        else:
            padding = rng.choice(["same", "valid", [rng.randint(0, 2) for _ in range(nd)]])
            steps: Any = 1 if padding == "same" else stride
            convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[nd - 1]
            layer = convolution(*channels, kernel, steps, padding, padding_mode=rng.choice(MODES), **options)
        with torch.no_grad():
            layer.weight.normal_(generator=torch.Generator().manual_seed(rng.getrandbits(32)))  # type: ignore[operator, union-attr]
        shape = (channels[0], *(rng.randint(1, (12, 7, 4)[nd - 1]) for _ in range(nd)))
        try:
            map_of("", layer, shape)
        except ValueError:  # too small
            continue
        return layer, shape


layers = st.integers(0, 2**32).map(lambda seed: random_layer(random.Random(seed)))


def dense(module: nn.Module, shape: Sequence[int]) -> Tensor:
    """The matrix of the module's linear part, from its forward."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of padding "same" for even kernels
        n = math.prod(shape)
        weight = next(module.parameters())
        identity = torch.eye(n, dtype=weight.dtype).view(n, *shape)
        return (module(identity) - module(torch.zeros_like(identity[:1]))).flatten(1).T


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double(), 2)) if matrix.numel() else 0.0


# maps


@settings(max_examples=80, deadline=None)
@given(layers)
def test_maps_are_the_forward_and_its_adjoint(case: Case) -> None:
    module, shape = case
    layer, weight = map_of("", module, shape), module.weight
    assert isinstance(weight, Tensor)
    matrix = dense(module, shape)
    identity = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    torch.testing.assert_close(layer.apply(weight, identity).flatten(1).T, matrix)
    x, y = torch.randn(2, *shape, dtype=torch.float64), torch.randn(2, *layer.output_shape, dtype=torch.float64)
    torch.testing.assert_close(
        (layer.apply(weight, x) * y).sum(), (x * layer.adjoint(weight, y)).sum(), rtol=1e-10, atol=1e-10
    )


# operator_norm


@settings(max_examples=80, deadline=None)
@given(layers)
def test_norm_is_that_of_the_dense_matrix(case: Case) -> None:
    module, shape = case
    true = norm(dense(module, shape))
    value = operator_norm(module, shape)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(true, rel=1e-5, abs=1e-12)
    assert value.item() <= true * (1 + 1e-12)


@pytest.mark.parametrize(("channels", "size"), [((4, 3), 12), ((8, 16), 10)])
def test_norm_of_layers_with_hundreds_of_singular_values(channels: tuple[int, int], size: int) -> None:
    for kernel, stride, padding in ((3, 1, 1), (4, 2, 1), (5, 3, 2)):
        module = nn.Conv2d(*channels, kernel, stride, padding, dtype=torch.float64)
        shape = (channels[0], size, size)
        assert operator_norm(module, shape).item() == pytest.approx(norm(dense(module, shape)), rel=1e-6)


def of_ones(size: int, padding: int, mode: str = "zeros") -> nn.Conv2d:
    module = nn.Conv2d(1, 1, size, padding=padding, padding_mode=mode, dtype=torch.float64)
    nn.init.ones_(module.weight)
    return module


def test_closed_forms() -> None:
    # a tridiagonal matrix of ones has the eigenvalues 1 + 2 cos(pi k / (N + 1))
    for n in (1, 4, 9):
        true = (1 + 2 * math.cos(math.pi / (n + 1))) ** 2
        assert operator_norm(of_ones(3, 1), (1, n, n)).item() == pytest.approx(true)
    assert operator_norm(of_ones(3, 1, "circular"), (1, 6, 7)).item() == pytest.approx(9)
    # patches that do not overlap: the matrix's own norm
    patches = nn.Conv2d(3, 5, 4, 4, dtype=torch.float64)
    flat = norm(patches.weight.detach().flatten(1))
    assert operator_norm(patches, (3, 8, 12)).item() == pytest.approx(flat)
    assert singular_values(patches).item() == pytest.approx(flat)
    linear = nn.Linear(5, 4, dtype=torch.float64)
    assert operator_norm(linear).item() == pytest.approx(norm(linear.weight.detach()))
    assert operator_norm(linear, (7, 5)).item() == pytest.approx(norm(linear.weight.detach()))


def test_one_pixel_padded_by_itself() -> None:
    assert operator_norm(of_ones(3, 1, "replicate"), (1, 1, 1)).item() == pytest.approx(9)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e150])
def test_scale_does_not_matter(scale: float) -> None:
    module = nn.Conv1d(2, 3, 3, padding=1, dtype=torch.float64)
    true = norm(dense(module, (2, 9)))
    with torch.no_grad():
        module.weight *= scale
    assert operator_norm(module, (2, 9)).item() == pytest.approx(true * scale, rel=1e-6)
    assert true * scale <= operator_norm_bound(module, (2, 9)).item() <= 1.01 * true * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_weights_are_computed_in_float64(dtype: torch.dtype) -> None:
    module = nn.Conv2d(2, 3, 3, padding=1, dtype=dtype)
    value = operator_norm(module, (2, 5, 5))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(norm(dense(module.double(), (2, 5, 5))), rel=1e-6)
    module.to(dtype)
    (gradient,) = torch.autograd.grad(operator_norm(module, (2, 5, 5)), module.weight)
    assert gradient.dtype == dtype


def test_weight_of_zeros() -> None:
    module = nn.Conv1d(2, 3, 3, padding=1)
    nn.init.zeros_(module.weight)
    value = operator_norm(module, (2, 5))
    assert value.item() == 0 == operator_norm_bound(module, (2, 5)).item()
    (gradient,) = torch.autograd.grad(value, module.weight)
    assert gradient.isfinite().all()


def with_weight(module: nn.Module, weight: Tensor) -> nn.Module:
    module = copy.deepcopy(module)
    del module.weight
    module.weight = weight
    return module


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(3, 4, dtype=torch.float64), (3,)),
        (nn.Conv2d(2, 2, 3, 2, 1, padding_mode="reflect", dtype=torch.float64), (2, 5, 4)),
        (nn.Conv2d(2, 4, 2, padding="same", groups=2, dtype=torch.float64), (2, 3, 4)),
        (nn.ConvTranspose1d(2, 3, 3, 2, 1, 1, dtype=torch.float64), (2, 5)),
    ],
)
def test_derivative(module: nn.Module, shape: tuple[int, ...]) -> None:
    weight = module.weight
    assert torch.autograd.gradcheck(lambda w: operator_norm(with_weight(module, w), shape, tol=1e-12), (weight,))


def test_the_second_derivative_is_refused() -> None:
    module = nn.Conv1d(2, 3, 3)
    (gradient,) = torch.autograd.grad(operator_norm(module, (2, 5)), module.weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="operator_norm: the derivative cannot be differentiated"):
        gradient.square().sum().backward()


def test_there_is_no_graph_without_a_gradient() -> None:
    with torch.no_grad():
        assert not operator_norm(nn.Linear(3, 2)).requires_grad
    assert not operator_norm(nn.Linear(3, 2).requires_grad_(False)).requires_grad


@pytest.mark.parametrize(
    "normalize",
    [wgan_ext.spectral_norm, nn.utils.spectral_norm, parametrizations.spectral_norm, parametrizations.weight_norm],
)
def test_computed_weights_are_those_of_evaluation(normalize: Callable[[nn.Module], nn.Module]) -> None:
    module = normalize(nn.Conv2d(2, 3, 3, padding=1).double())
    module(torch.randn(1, 2, 5, 5, dtype=torch.float64))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    value = operator_norm(module, (2, 5, 5))
    bound = operator_norm_bound(module, (2, 5, 5))
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert module.training
    assert all(part.training for part in module.modules())
    true = norm(dense(module.eval(), (2, 5, 5)))
    assert value.item() == pytest.approx(true)
    assert true <= bound.item() <= 1.01 * true
    source = next(p for name, p in module.named_parameters() if "orig" in name)
    (gradient,) = torch.autograd.grad(value, source)
    assert gradient.norm() > 0


def test_a_generator_makes_the_result_the_same() -> None:
    module = nn.Conv2d(8, 8, 3, padding=1)
    values = [operator_norm(module, (8, 9, 9), generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*values)
    state = torch.get_rng_state()
    operator_norm(module, (8, 9, 9), generator=torch.Generator())
    operator_norm_bound(module, (8, 9, 9))
    lipschitz_bound(nn.Sequential(module), (8, 9, 9))
    spectral_report(module, (8, 9, 9))
    assert torch.equal(state, torch.get_rng_state())


def test_too_few_iterations_warn() -> None:
    with pytest.warns(RuntimeWarning, match="operator_norm: max_iter=3 was reached before tol=1e-06"):
        value = operator_norm(nn.Conv2d(8, 8, 3), (8, 12, 12), max_iter=3)
    assert value > 0


# singular_values


@settings(max_examples=60, deadline=None)
@given(layers, st.integers(1, 4))
def test_singular_values_are_those_of_the_dense_matrix(case: Case, k: int) -> None:
    module, shape = case
    weight = module.weight
    assert isinstance(weight, Tensor)
    dim = 1 if "Transpose" in type(module).__name__ else 0
    for matrix, shape_or_none in ((dense(module, shape), shape), (weight.detach().movedim(dim, 0).flatten(1), None)):
        true = torch.linalg.svdvals(matrix)[:k]
        values = singular_values(module, len(true), shape_or_none)
        torch.testing.assert_close(values, true, rtol=1e-5, atol=1e-6 * float(true[0]) + 1e-12)


def test_multiple_singular_values_are_found() -> None:
    # circular convolutions have each frequency and its conjugate
    module = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", dtype=torch.float64)
    true = torch.linalg.svdvals(dense(module, (3, 8, 8)))[:6]
    torch.testing.assert_close(singular_values(module, 6, (3, 8, 8)), true, rtol=1e-5, atol=0)
    assert not singular_values(module, 2).requires_grad


# operator_norm_bound


def test_the_bound_is_above_the_norm_by_1_percent_at_most() -> None:
    rng = random.Random(0)
    for _ in range(300):
        module, shape = random_layer(rng)
        true = norm(dense(module, shape))
        assert true <= operator_norm_bound(module, shape).item() <= 1.01 * true + 1e-10, (module, shape)


@pytest.mark.parametrize("budget", [0, 2e11])
def test_the_bound_needs_no_estimate(budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Singular(torch.zeros(1), torch.zeros(1), torch.zeros(1), 0, True)
    monkeypatch.setattr(bounds, "largest_singular", lambda *args, **kwargs: nothing)
    monkeypatch.setattr(bounds, "_BUDGET", budget)  # 0: no dimension is taken as it is
    rng = random.Random(1)
    for _ in range(400):
        module, shape = random_layer(rng)
        assert operator_norm_bound(module, shape).item() >= norm(dense(module, shape)), (module, shape)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_circular_bound_is_the_norm(stride: int, dilation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "_BUDGET", 0)
    module = nn.Conv2d(2, 3, 3, stride, dilation, dilation, padding_mode="circular", dtype=torch.float64)
    true, bound = norm(dense(module, (2, 8, 6))), operator_norm_bound(module, (2, 8, 6)).item()
    assert true <= bound <= true * (1 + 1e-4)


def test_the_bound_of_ones_is_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    # here the twisted torus is exact, where the torus alone would bound by 9
    monkeypatch.setattr(bounds, "_BUDGET", 0)
    monkeypatch.setattr(bounds, "_TARGET", 1.0)
    for n in (4, 32):
        true = (1 + 2 * math.cos(math.pi / (n + 1))) ** 2
        assert true <= operator_norm_bound(of_ones(3, 1), (1, n, n)).item() <= true * (1 + 1e-4)


def test_the_bound_for_all_sizes() -> None:
    assert 9 <= operator_norm_bound(of_ones(3, 1)).item() <= 9 * 1.005
    for module in (
        nn.Conv2d(2, 3, 3, 2, 1, dtype=torch.float64),
        nn.Conv2d(2, 3, 3, 1, 2, 2, dtype=torch.float64),
        nn.ConvTranspose2d(2, 3, 4, 2, 1, dtype=torch.float64),
    ):
        bound = operator_norm_bound(module).item()
        largest = max(norm(dense(module, (2, n, n + 1))) for n in (5, 9, 14))
        assert largest <= bound <= 1.1 * largest


def test_the_bound_of_many_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Conv1d(2, 3, 5, padding=2, dtype=torch.float64)
    true = norm(dense(module, (2, 400)))
    monkeypatch.setattr(bounds, "_BUDGET", 0)
    assert true <= operator_norm_bound(module, (2, 400)).item() <= 1.01 * true  # on a grid of fewer
    monkeypatch.setattr(bounds, "_CHUNK", 1)
    assert true <= operator_norm_bound(module, (2, 400)).item() <= 1.01 * true  # one at a time


def test_the_bound_of_a_layer_as_of_dcgan() -> None:
    module = nn.Conv2d(16, 32, 4, 2, 1)
    value, bound = operator_norm(module, (16, 16, 16)).item(), operator_norm_bound(module, (16, 16, 16)).item()
    assert value <= bound <= 1.01 * value
    assert bound == operator_norm_bound(module, (16, 16, 16)).item()


# lipschitz_bound


def of_input(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """A critic of one function, in float64."""
    return Forward(lambda self, x: function(x), unused=nn.Linear(1, 1, dtype=torch.float64))


LINEAR: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "scale": (lambda x: -3 * x + 1, (4,)),
    "flatten": (lambda x: x.flatten(1), (2, 3)),
    "permute": (lambda x: x.permute(0, 2, 1), (2, 3)),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (4, 2, 3)),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), (1, 4, 6)),
    "narrow": (lambda x: x[:, 1:3], (4,)),
    "sum": (lambda x: x.sum((1, 2))[:, None], (3, 4)),
    "mean": (lambda x: x.mean(1, keepdim=True), (5,)),
    "expand": (lambda x: x[:, None].expand(-1, 3, -1), (4,)),
    "add to itself": (lambda x: x + x, (4,)),
    "take from itself": (lambda x: x - x, (4,)),
    "cat": (lambda x: torch.cat([x, 2 * x], 1), (4,)),
    "pad": (lambda x: F.pad(x, (1, 2)), (4,)),
    "crop": (lambda x: F.pad(x, (-1, 2)), (4,)),
    "pad circular": (lambda x: F.pad(x, (1, 2, 2, 0), mode="circular"), (1, 4, 4)),
    "pad reflect": (lambda x: F.pad(x, (1, 2), mode="reflect"), (2, 4)),
    "pad replicate": (lambda x: F.pad(x, (2, 3), mode="replicate"), (2, 4)),
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 3, 2, 1), (2, 9)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, (3, 2), (2, 1), (1, 0), ceil_mode=True), (2, 6, 5)),
    "avg_pool2d, padding not counted": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), (1, 6, 7)),
    "avg_pool2d by 5": (lambda x: F.avg_pool2d(x, 2, 1, divisor_override=5), (1, 4, 4)),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 2, 1), (1, 3, 4, 3)),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (2, 3)), (2, 5, 7)),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), (2, 3, 4)),
    "nearest to a size": (lambda x: F.interpolate(x, size=(5, 3)), (1, 3, 4)),
    "linear": (lambda x: F.interpolate(x, scale_factor=1.5, mode="linear"), (2, 6)),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True), (1, 4, 3)),
    "trilinear": (lambda x: F.interpolate(x, size=(4, 3, 5), mode="trilinear"), (1, 3, 3, 2)),
    "bicubic": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), (1, 4, 5)),
    "dropout": (lambda x: F.dropout(2 * x, training=False), (3,)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_functions_that_are_linear_have_their_norm(name: str) -> None:
    function, shape = LINEAR[name]
    true = norm(dense(of_input(function), shape))
    assert true - 1e-12 <= float(lipschitz_bound(of_input(function), shape)) <= true * (1 + 1e-6) + 1e-12


def slope_of(function: Callable[[Tensor], Tensor]) -> float:
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).sum(), x)
    return float(gradient.abs().max())


ACTIVATIONS: list[nn.Module] = [
    *(nn.ReLU(), nn.LeakyReLU(0.2), nn.LeakyReLU(3.0), nn.LeakyReLU(-2.0), nn.Hardtanh(-2, 1), nn.ReLU6()),
    *(nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Mish(), nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid(), nn.Softplus()),
    *(nn.Softplus(3.0, 30.0), nn.ELU(), nn.ELU(2.5), nn.SELU(), nn.CELU(0.7), nn.RReLU().eval()),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations_have_their_largest_slope(activation: nn.Module) -> None:
    true = slope_of(activation)
    bound = float(lipschitz_bound(nn.Sequential(activation), (3,)))
    rounding = 1e-7 if isinstance(activation, nn.CELU) else 1e-12  # torch rounds CELU's
    assert true / (1 + rounding) <= bound <= true * (1 + 1e-7)


def test_prelu_and_batch_norm_have_their_largest_slope() -> None:
    prelu = nn.PReLU(3, dtype=torch.float64)
    prelu.weight.data = torch.tensor([0.1, -4.0, 2.0], dtype=torch.float64)
    assert float(lipschitz_bound(prelu, (3, 2))) == pytest.approx(4)
    batch = nn.BatchNorm1d(3, dtype=torch.float64).eval()
    batch.running_var = torch.tensor([0.25, 1.0, 4.0], dtype=torch.float64)
    batch.weight.data = torch.tensor([1.0, -3.0, 1.0], dtype=torch.float64)
    assert float(lipschitz_bound(batch, (3, 2))) == pytest.approx(3, rel=1e-4)


def test_normalizations_have_the_slope_at_constant_inputs() -> None:
    module = nn.LayerNorm(4, eps=0.01, dtype=torch.float64)
    module.weight.data = torch.tensor([1.0, -2.0, 1.0, 1.0], dtype=torch.float64)
    bound = float(lipschitz_bound(module, (4,)))
    jacobian = torch.autograd.functional.jacobian(module, torch.ones(4, dtype=torch.float64))
    assert bound == pytest.approx(20)
    assert norm(jacobian) <= bound <= 1.3 * norm(jacobian)  # the mean takes a little away from the second
    group = nn.GroupNorm(2, 4, eps=0.01, affine=False)
    assert float(lipschitz_bound(nn.Sequential(group, nn.Hardtanh()), (4, 3))) == pytest.approx(10)


def test_max_pools_count_their_windows() -> None:
    pool = of_input(lambda x: F.max_pool2d(x, 3, 2, 1))
    assert float(lipschitz_bound(pool, (1, 7, 7))) == pytest.approx(2)  # a pixel is in 2 x 2 windows at most
    x = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    x[0, 0, 3, 3] = 1
    assert float(pool(x).norm()) == 2
    assert float(lipschitz_bound(of_input(lambda x: F.max_pool1d(x, 2)), (1, 6))) == pytest.approx(1)
    dilated = of_input(lambda x: F.max_pool1d(x, 3, 1, dilation=2))
    assert float(lipschitz_bound(dilated, (1, 9))) == pytest.approx(3**0.5)
    assert float(lipschitz_bound(of_input(lambda x: x.max(1).values), (5,))) == pytest.approx(1)


class Residual(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.branch = nn.Linear(4, 4, bias=False, dtype=torch.float64)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.branch(x)


def test_linear_critics_reach_the_bound_where_layers_agree() -> None:
    diagonals = [torch.tensor([3.0, 1, 0.5]), torch.tensor([2.0, 2, 1]), torch.tensor([0.5, 0.1, 0.4])]
    critic = nn.Sequential(*(nn.Linear(3, 3, bias=False, dtype=torch.float64) for _ in diagonals))
    for layer, diagonal in zip(critic, diagonals, strict=True):
        layer.weight.data = torch.diag(diagonal).double()
    result = lipschitz_bound(critic, (3,))
    assert 3 <= float(result) <= 3 * (1 + 1e-3)
    assert [layer.factor for layer in result.layers] == pytest.approx([3, 2, 0.5], rel=1e-3)
    residual = Residual(-0.5)
    residual.branch.weight.data = -torch.diag(torch.tensor([2.0, 1, 0, 1])).double()
    assert 2 <= float(lipschitz_bound(residual, (4,))) <= 2 * (1 + 1e-3)
    for _ in range(20):
        critic = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 4), Residual(0.3).float(), nn.Linear(4, 2)).double()
        assert float(lipschitz_bound(critic, (5,))) >= norm(dense(critic, (5,)))


def dcgan(normalize: Callable[[nn.Module], nn.Module] = lambda m: m) -> nn.Module:
    return nn.Sequential(
        *(normalize(nn.Conv2d(1, 4, 4, 2, 1)), nn.LeakyReLU(0.2), normalize(nn.Conv2d(4, 8, 3, padding=1)), nn.SiLU()),
        *(nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"), nn.ELU(), nn.MaxPool2d(3, 2, 1), nn.Flatten(1)),
        nn.Linear(16, 1),
    ).double()


def residual_net(self: Any, x: Tensor) -> Tensor:
    h = F.relu(self.a(x))
    h = h + 0.5 * F.gelu(self.b(F.avg_pool2d(h, 3, 1, 1)))
    h = torch.cat([h, torch.tanh(self.c(h)) * torch.sigmoid(self.d(h))], 1)
    return F.interpolate(h, scale_factor=0.5, mode="bilinear").flatten(1).mean(1)


CRITICS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "mlp": (nn.Sequential(nn.Linear(6, 12), nn.Mish(), nn.Linear(12, 12), nn.Softplus(), nn.Linear(12, 1)), (6,)),
    "dcgan": (dcgan(), (1, 8, 8)),
    "normalized": (dcgan(wgan_ext.spectral_norm), (1, 8, 8)),
    "parametrized": (dcgan(parametrizations.spectral_norm), (1, 8, 8)),
    "residual": (
        Forward(
            residual_net,
            a=nn.Conv2d(2, 4, 3, padding=1),
            b=nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect"),
            c=nn.Conv2d(4, 2, 1),
            d=nn.Conv2d(4, 2, 2, padding="same"),
        ),
        (2, 6, 6),
    ),
    "maxout": (
        Forward(lambda self, x: torch.maximum(self.a(x), self.b(x)).sum(1), a=nn.Linear(3, 4), b=nn.Linear(3, 4)),
        (3,),
    ),
}


@pytest.mark.parametrize("name", CRITICS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_no_pair_of_inputs_is_lengthened_by_more(name: str) -> None:
    critic, shape = CRITICS[name]
    critic = copy.deepcopy(critic).double().eval()
    bound = float(lipschitz_bound(critic, shape))
    largest = 0.0
    for scale in (0.01, 1.0, 10.0):
        x = scale * torch.randn(256, *shape, dtype=torch.float64)
        x.requires_grad_()
        scores = critic(x).reshape(256, -1)
        (gradient,) = torch.autograd.grad(scores.sum(), x)
        x, scores = x.detach(), scores.detach()
        gradients = gradient.flatten(1).norm(dim=1) / scores.shape[1] ** 0.5
        secants = (scores[1:] - scores[:-1]).norm(dim=1) / (x[1:] - x[:-1]).flatten(1).norm(dim=1)
        largest = max(largest, float(gradients.max()), float(secants.max()))
    assert largest <= bound
    assert bound < 1000 * largest


def test_nothing_of_the_critic_changes() -> None:
    critic = dcgan(wgan_ext.spectral_norm)
    critic(torch.randn(2, 1, 8, 8).double())
    before = copy.deepcopy(critic.state_dict())
    lipschitz_bound(critic, (1, 8, 8))
    spectral_report(critic, (1, 8, 8))
    assert all(torch.equal(value, before[key]) for key, value in critic.state_dict().items())
    assert all(module.training for module in critic.modules())


def attention() -> nn.Module:
    return Forward(lambda self, x: self.a(x, x, x)[0].sum((1, 2)), a=nn.MultiheadAttention(4, 2, batch_first=True))


REFUSED: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "attention": (attention(), (3, 4), "layer 'a'.* dot-product attention is not Lipschitz"),
    "softmax": (nn.Sequential(nn.Linear(3, 3), nn.Softmax(1)), (3,), "layer '1', Softmax"),
    "product": (
        Forward(lambda self, x: x * torch.sigmoid(self.a(x)), a=nn.Linear(3, 3)),
        (3,),
        r"lipschitz_bound: mul\(\) is a product of two values that depend on the input, which is not Lipschitz",
    ),
    "square": (Forward(lambda self, x: self.a(x) ** 2, a=nn.Linear(3, 3)), (3,), r"pow__\(\) is a product"),
    "dropout": (nn.Sequential(nn.Linear(3, 3), nn.Dropout()), (3,), "layer '1', Dropout.* is random in training mode"),
    "batch": (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), (3,), "layer '1', BatchNorm1d.* over the batch"),
    "softplus": (nn.Sequential(nn.Linear(3, 3), nn.Softplus(1, 2)), (3,), "layer '1', Softplus.* jumps at its thresh"),
    "no eps": (nn.Sequential(nn.LayerNorm(3, eps=0), nn.Linear(3, 3)), (3,), "layer '0', LayerNorm.* with eps=0"),
    "shape": (nn.Linear(3, 3), (4,), "its forward fails on a batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_lipschitz_is_refused_by_name(name: str) -> None:
    critic, shape, message = REFUSED[name]
    with pytest.raises(NotImplementedError, match=message):
        lipschitz_bound(critic, shape)


def test_the_table_of_a_bound() -> None:
    result = lipschitz_bound(nn.Sequential(nn.Linear(3, 2), nn.GELU(), nn.Flatten()), (3,))
    lines = str(result).splitlines()
    assert lines[0] == f"Lipschitz bound: {result.value:.6g}"
    assert lines[1].split() == ["layer", "factor", "bound"]
    assert lines[2].startswith("0      Linear(in_features=3, out_features=2, bias=True)")
    assert lines[3].split()[-2] == "1.1289"
    assert [layer.name for layer in result.layers] == ["0", "1"]
    assert result.layers[-1].bound == pytest.approx(float(result))


def test_padding_and_convolution_are_one_layer() -> None:
    for mode in MODES:
        module = nn.Conv2d(2, 3, 3, padding="same", padding_mode=mode, dtype=torch.float64)
        result = lipschitz_bound(nn.Sequential(module, nn.ReLU()), (2, 4, 4))
        assert float(result) == pytest.approx(float(operator_norm_bound(module, (2, 4, 4))))
        assert [layer.layer.split("(")[0] for layer in result.layers] == ["Conv2d", "ReLU"]


# spectral_report


def test_report() -> None:
    model = dcgan()
    wgan_ext.spectral_norm(model[0])
    parametrizations.spectral_norm(model[2])
    for _ in range(100):
        model(torch.zeros(1, 1, 8, 8).double())
    report = spectral_report(model, (1, 8, 8))
    assert [layer.name for layer in report.layers] == ["0", "2", "4", "8"]
    first, second, third, last = report.layers
    for layer in (first, second):
        assert layer.matrix == pytest.approx(1, abs=1e-2)
        assert layer.operator > 1.05
    original = singular_values(model[0], name="weight_orig")
    assert first.divisor == pytest.approx(float(original) / first.matrix)
    assert math.isnan(third.divisor)
    assert last.matrix == pytest.approx(last.operator)
    assert all(layer.operator <= layer.bound <= 1.01 * layer.operator for layer in report.layers)
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "divided", "by", "matrix", "operator", "operator/matrix", "bound"]
    assert "ParametrizedConv2d" not in lines[2]
    assert len(lines) == 5
    without = spectral_report(model)
    assert math.isnan(without.layers[1].operator)
    assert without.layers[1].matrix == pytest.approx(second.matrix)


# normalization by the operator's norm


def operator_spectral_norm(module: nn.Module, input_shape: Sequence[int] | None = None, **options: Any) -> nn.Module:
    return wgan_ext.spectral_norm(module, kind="operator", input_shape=input_shape, **options)


def step(module: nn.Module, shape: Sequence[int], times: int = 1) -> None:
    for _ in range(times):
        module(torch.randn(2, *shape, dtype=next(module.parameters()).dtype))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv2d(3, 8, 4, 2, 1), (3, 8, 8)),
        (nn.Conv2d(4, 4, 3, padding=1, groups=2, padding_mode="circular"), (4, 6, 6)),
        (nn.ConvTranspose2d(3, 2, 4, 2, 1), (3, 4, 4)),
        (nn.Linear(5, 3), (5,)),
    ],
)
def test_normalized_layers_have_norm_1(module: nn.Module, shape: tuple[int, ...]) -> None:
    module = operator_spectral_norm(copy.deepcopy(module), None if len(shape) == 1 else shape)
    layer = map_of("", module, shape)
    assert sorted(n for n, _ in module.named_parameters()) == ["bias", "weight_orig"]
    assert dict(module.named_buffers()).keys() == {"weight_u", "weight_v"}
    assert (module.weight_u.shape, module.weight_v.shape) == (layer.output_shape, layer.input_shape)
    with torch.no_grad():
        module.weight_orig *= 3
    step(module, shape, 200)
    assert norm(dense(module, shape)) == pytest.approx(1, abs=1e-3)


def test_evaluation_leaves_u_and_v() -> None:
    module = operator_spectral_norm(nn.Conv1d(2, 3, 3, padding=1), (2, 7))
    with torch.no_grad():
        module.weight_orig.normal_()
    u = module.weight_u.clone()
    step(module.eval(), (2, 7))
    assert torch.equal(module.weight_u, u)
    step(module.train(), (2, 7))
    assert not torch.equal(module.weight_u, u)


def test_checkpoints_and_copies() -> None:
    module = operator_spectral_norm(nn.Conv1d(2, 3, 3, padding=1), (2, 7))
    step(module, (2, 7), 3)
    other = operator_spectral_norm(nn.Conv1d(2, 3, 3, padding=1), (2, 7))
    other.load_state_dict(module.state_dict())
    copied = copy.deepcopy(module)
    x = torch.randn(2, 2, 7)
    expected = module.eval()(x)
    assert torch.equal(other.eval()(x), expected)
    assert torch.equal(copied.eval()(x), expected)
    wgan_ext.remove_spectral_norm(module)
    torch.testing.assert_close(module(x), expected)
    assert sorted(module.state_dict()) == ["bias", "weight"]
    module.load_state_dict(module.state_dict())
    nn.utils.remove_spectral_norm(other)
    torch.testing.assert_close(other(x), expected)


def test_shrinks_only_what_exceeds_the_target() -> None:
    module = nn.Conv1d(2, 3, 3, padding=1, dtype=torch.float64)
    true = operator_norm(module, (2, 7)).item()
    weight = module.weight.detach().clone()
    for target, expected in ((2 * true, true), (true / 2, true / 2)):
        normalized = operator_spectral_norm(copy.deepcopy(module), (2, 7), target=target, shrink_only=True)
        step(normalized, (2, 7), 50)
        assert norm(dense(normalized, (2, 7))) == pytest.approx(expected, rel=1e-4)
    assert torch.equal(weight, module.weight)
    normalized = operator_spectral_norm(module, (2, 7), target=5.0)
    step(normalized, (2, 7), 50)
    assert norm(dense(normalized, (2, 7))) == pytest.approx(5, rel=1e-4)


def test_derivatives_hold_u_and_v_constant() -> None:
    module = operator_spectral_norm(nn.Conv1d(1, 2, 3, padding=1, dtype=torch.float64), (1, 5)).eval()
    (hook,) = module._forward_pre_hooks.values()
    weight = module.weight_orig.detach().clone().requires_grad_()

    def normalized(weight: Tensor) -> Tensor:
        place = copy.copy(module)
        place._parameters = {**module._parameters, "weight_orig": weight}  # type: ignore[dict-item]
        result: Tensor = hook.compute_weight(place, False)  # type: ignore[operator]
        return result

    assert torch.autograd.gradcheck(normalized, (weight,))
    assert torch.autograd.gradgradcheck(normalized, (weight,))
    plain = nn.Conv1d(1, 2, 3, padding=1, dtype=torch.float64)
    sigma = operator_norm(with_weight(plain, nn.Parameter(weight)), (1, 5)).item()
    torch.testing.assert_close(normalized(weight), weight / sigma, rtol=1e-2, atol=0)


def test_a_weight_of_zeros_stays_and_recovers() -> None:
    module = nn.Conv1d(2, 3, 3)
    nn.init.zeros_(module.weight)
    operator_spectral_norm(module, (2, 7))
    step(module, (2, 7))
    assert not module.weight.any()
    nn.init.ones_(module.weight_orig)
    step(module, (2, 7), 20)
    assert norm(dense(module, (2, 7))) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_and_autocast(dtype: torch.dtype) -> None:
    module = operator_spectral_norm(nn.Linear(4, 3, dtype=dtype))
    step(module, (4,), 10)
    assert module.weight.dtype == module.weight_u.dtype == dtype
    assert norm(module.weight.detach()) == pytest.approx(1, abs=0.02)
    module = operator_spectral_norm(nn.Conv1d(2, 3, 3), (2, 7))
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(2, 2, 7))
    assert module.weight.dtype == torch.float32


def test_the_analytic_engine_and_torch_compile_take_it() -> None:
    normalized = operator_spectral_norm(nn.Conv1d(2, 3, 3), (2, 7))
    critic = nn.Sequential(normalized, nn.ReLU(), nn.Flatten(), nn.Linear(15, 1))
    assert wgan_ext.explain(critic, torch.randn(3, 2, 7)).engine == "analytic"
    twin = copy.deepcopy(critic)
    x = torch.randn(3, 2, 7)
    torch.testing.assert_close(torch.compile(critic, backend="aot_eager", fullgraph=True)(x), twin(x))


def test_it_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(RuntimeError, match="spectral_norm: weight is normalized already"):
        operator_spectral_norm(wgan_ext.spectral_norm(nn.Linear(3, 2)))
    with pytest.raises(TypeError, match="module must be a Linear, Conv1d"):
        operator_spectral_norm(nn.Embedding(3, 2))
    with pytest.raises(ValueError, match="input_shape must be given for a convolution"):
        operator_spectral_norm(nn.Conv1d(2, 3, 3))
    with pytest.raises(ValueError, match="target must be positive and finite, got 0"):
        operator_spectral_norm(nn.Linear(3, 2), target=0)
    with pytest.raises(ValueError, match="kind='operator' has no dim"):
        operator_spectral_norm(nn.Linear(3, 2), dim=0)
    with pytest.raises(ValueError, match="input_shape goes with kind='operator', got"):
        wgan_ext.spectral_norm(nn.Linear(3, 2), input_shape=(3,))
    with pytest.raises(ValueError, match="kind must be 'matrix' or 'operator', got 'conv'"):
        wgan_ext.spectral_norm(nn.Linear(3, 2), kind="conv")
    assert not is_parametrized(operator_spectral_norm(nn.Linear(3, 2)))


def test_largest_singular_counts_its_applications() -> None:
    layer: LayerMap = map_of("", nn.Conv2d(8, 8, 3, padding=1), (8, 16, 16))
    found = largest_singular(layer, torch.randn(8, 8, 3, 3))
    assert found.converged
    assert 32 <= found.applications <= 150
