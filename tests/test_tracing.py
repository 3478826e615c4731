"""What keeps a critic from the analytic engine, what tracing leaves alone, and how long a plan holds."""

from __future__ import annotations

import collections
import copy
import functools
import gc
import io
import itertools
import random
import re
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from critics import Forward
from torch import Tensor, nn
from torch.nn import functional as F

import wgan_ext
from wgan_ext import explain, input_gradient, plans, reference


def mlp(*options: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), *options, nn.ReLU(), nn.Linear(8, 1))


def of_body(function: Callable[..., Tensor], **parts: Any) -> Forward:
    return Forward(function, body=nn.Linear(3, 4), head=nn.Linear(4, 1), **parts)


def hooked(register: str) -> nn.Sequential:
    critic = mlp()
    getattr(critic[2], register)(lambda module, *args: None)
    return critic


def with_own_forward() -> nn.Sequential:
    critic = mlp()
    critic[0].forward = lambda x: 2 * F.linear(x, critic[0].weight)
    return critic


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x, x, x)[0])


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = nn.Linear(3, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x) * (1 + self.calls)


class Log(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.shapes = nn.Linear(3, 1), []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(x.shape)
        return self.body(x)


class Scaled(nn.Module):
    """Reads a variable of this module."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * scaled_by()


def minibatch_stddev(self: Any, x: Tensor) -> Tensor:
    h = self.body(x)
    return self.head(h + h.std(0, keepdim=True).mean())


def control_flow(self: Any, x: Tensor) -> Tensor:
    h = self.body(x)
    return self.head(h if h.sum() > 0 else -h)


def through_a_view(self: Any, x: Tensor) -> Tensor:
    h = self.body(x)
    h[:, :2].mul_(3)
    return self.head(h)


def through_a_slice(self: Any, x: Tensor) -> Tensor:
    h = self.body(x) + 0
    h[:, 0] = 1.0
    return self.head(h)


def without_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = self.body(x).abs() + 1
    return self.head(self.body(x) * scale)


def made_by_functional_weights(self: Any, x: Tensor) -> Tensor:
    h = self.body(x)
    return self.head(F.linear(h, h.mean(0).expand(4, 4)))


SCALE = 2.0
TENSOR = torch.tensor([0.5, 1.0, 2.0])
TABLE = {"scale": 2.0}
SETTINGS = types.SimpleNamespace(scale=2.0)
CELL = [2.0]
THIS = sys.modules[__name__]


def scaled_by() -> float:
    return SCALE


def closure_over(value: Any) -> Forward:
    return Forward(lambda self, x: self.body(x) * value[0], body=nn.Linear(3, 1))


# Each critic with the shape of a batch for it and what its plan says.
OBSTACLES: dict[str, tuple[Callable[[], Any], tuple[int, ...], str]] = {
    "function": (lambda: lambda x: x.square().sum(1), (4, 3), "the critic is not an nn.Module"),
    "softmax": (lambda: of_body(lambda self, x: self.head(self.body(x).softmax(1))), (4, 3), r"softmax\(\),? is not a"),
    "softmax module": (lambda: mlp(nn.Softmax(1)), (4, 3), r"layer '1', Softmax\(dim=1\), is not a function"),
    "cumsum": (lambda: of_body(lambda self, x: self.head(self.body(x).cumsum(1))), (4, 3), r"cumsum\(\),? is not a"),
    "sine": (lambda: of_body(lambda self, x: self.head(torch.sin(self.body(x)))), (4, 3), r"sin\(\),? is not a"),
    "cube": (lambda: of_body(lambda self, x: self.head(self.body(x) ** 3)), (4, 3), "power other than the square"),
    "division": (
        lambda: of_body(lambda self, x: 1 / (self.head(self.body(x)) + 9)),
        (4, 3),
        r"truediv__\(\),? is not a",
    ),
    "attention": (Attention, (3, 5, 4), "MultiheadAttention|multi_head|layer 'inner"),
    "product of the input with itself": (
        lambda: of_body(lambda self, x: self.head(self.body(x) @ self.body(x).mT @ self.body(x))),
        (4, 2, 3),
        "product other than input @ matrix",
    ),
    "item": (
        lambda: of_body(lambda self, x: self.head(self.body(x)) * x.sum().item()),
        (4, 3),
        r"reads the values|reduces",
    ),
    "control flow": (lambda: of_body(control_flow), (4, 3), "reads the values|reduces the batch|not a function"),
    "values by numpy": (
        lambda: of_body(
            lambda self, x: self.head(self.body(x)) * float(np.asarray(self.scale.detach())[0]),
            scale=nn.Buffer(torch.full((1,), 2.0)),
        ),
        (4, 3),
        "reads the values of a tensor",
    ),
    "values by numpy, a tensor again": (
        lambda: of_body(
            lambda self, x: self.head(self.body(x)) * torch.from_numpy(2 * np.asarray(self.scale.detach())),
            scale=nn.Buffer(torch.full((1,), 2.0)),
        ),
        (4, 3),
        "reads the values of a tensor",
    ),
    "indices of a maximum": (
        # so small a part that comparing the plan with autograd would not show it
        lambda: of_body(lambda self, x: self.head(self.body(x)) * (1 + 1e-3 * self.body(x).max(1, keepdim=True)[1])),
        (4, 3),
        r"mul|max|indices",
    ),
    "indices of a maximum added": (
        lambda: of_body(
            lambda self, x: self.head(self.body(x) + 1e-3 * self.body(x).max(dim=1, keepdim=True).indices.float())
        ),
        (4, 3),
        r"mul|max|indices|float",
    ),
    "indices of a maximum to gather": (
        lambda: of_body(lambda self, x: self.body(x).gather(1, self.body(x).max(1, keepdim=True).indices)),
        (4, 3),
        "gather|max|indices",
    ),
    "dropout": (lambda: mlp(nn.Dropout(0.5)), (4, 3), r"layer '1', Dropout\(p=0.5.* is random in training mode"),
    "functional dropout": (
        lambda: of_body(lambda self, x: self.head(F.dropout(self.body(x), 0.5, self.training))),
        (4, 3),
        r"dropout\(\), is random|is random in training",
    ),
    "dropout of a weight": (
        lambda: of_body(lambda self, x: self.head(F.linear(x, F.dropout(self.body.weight, 0.5, training=True)))),
        (4, 3),
        "draws random numbers",
    ),
    "RReLU": (lambda: mlp(nn.RReLU()), (4, 3), "layer '1', RReLU.* is random in training mode"),
    "minibatch stddev": (lambda: of_body(minibatch_stddev), (4, 3), r"std\(\)"),
    "centred on the batch": (
        lambda: of_body(lambda self, x: self.head(self.body(x) - self.body(x).mean(0))),
        (4, 3),
        "dimension 0, the batch",
    ),
    "detach": (lambda: of_body(lambda self, x: self.head(self.body(x) * self.body(x).detach())), (4, 3), r"detach\(\)"),
    "data": (lambda: of_body(lambda self, x: self.head(self.body(x) * self.body(x).data)), (4, 3), r"data\(\)|__get__"),
    "no_grad": (lambda: of_body(without_grad), (4, 3), "runs under no_grad"),
    "forward hook": (lambda: hooked("register_forward_hook"), (4, 3), "layer '2', Linear.* has a forward hook"),
    "forward pre-hook": (lambda: hooked("register_forward_pre_hook"), (4, 3), "layer '2', .*has a forward pre-hook"),
    "backward hook": (lambda: hooked("register_full_backward_hook"), (4, 3), "layer '2', .*has a backward hook"),
    "backward pre-hook": (lambda: hooked("register_full_backward_pre_hook"), (4, 3), "has a backward hook"),
    "noise": (lambda: of_body(lambda self, x: self.head(self.body(x)) + torch.randn(1)), (4, 3), "random"),
    "noise like the input": (
        lambda: of_body(lambda self, x: self.head(self.body(x) + torch.randn_like(x[:, :1]))),
        (4, 3),
        "randn_like",
    ),
    "noise in place": (
        lambda: of_body(lambda self, x: self.head(self.body(x)) * torch.empty(1).uniform_(1, 2)),
        (4, 3),
        "random",
    ),
    "noise of Python": (
        lambda: of_body(lambda self, x: self.head(self.body(x)) * (1 + random.random())),
        (4, 3),
        "random|number of samples",
    ),
    "Python's rare coin": (
        lambda: of_body(lambda self, x: self.head(self.body(x)) * (2 if random.random() < 1e-9 else 1)),
        (4, 3),
        "draws random numbers",
    ),
    "numpy's rare coin": (
        lambda: of_body(lambda self, x: self.head(self.body(x)) * (2 if np.random.rand() < 1e-9 else 1)),
        (4, 3),
        "draws random numbers",
    ),
    "Python's coin": (
        lambda: of_body(lambda self, x: self.head(self.body(x)) * (2 if random.random() < 0.5 else 1)),
        (4, 3),
        "random|number of samples",
    ),
    "global tensor": (
        lambda: Forward(lambda self, x: self.body(x * TENSOR), body=nn.Linear(3, 1)),
        (4, 3),
        "neither of the critic",
    ),
    "tensor of a closure": (lambda: closure_over([torch.tensor(2.0)]), (4, 3), "neither of the critic"),
    "global dict": (
        lambda: Forward(lambda self, x: self.body(x) * TABLE["scale"], body=nn.Linear(3, 1)),
        (4, 3),
        "'TABLE'",
    ),
    "global object": (
        lambda: Forward(lambda self, x: self.body(x) * SETTINGS.scale, body=nn.Linear(3, 1)),
        (4, 3),
        "'SETTINGS'",
    ),
    "list of a closure": (lambda: closure_over([2.0]), (4, 3), "the variable 'value', which may change unseen"),
    "global list in a comprehension": (
        lambda: Forward(lambda self, x: sum([self.body(x) * c for c in CELL]), body=nn.Linear(3, 1)),
        (4, 3),
        "'CELL'",
    ),
    "global list in an inner function": (
        lambda: Forward(lambda self, x: (lambda h: h * CELL[0])(self.body(x)), body=nn.Linear(3, 1)),
        (4, 3),
        "'CELL'",
    ),
    "counter": (Counter, (4, 3), "changes its attributes"),
    "log": (Log, (4, 3), "changes its attributes"),
    "the batch reshaped": (
        lambda: of_body(lambda self, x: self.head(self.body(x.view(-1, 3))).view(len(x), -1)),
        (4, 2, 3),
        "batch as dimension 0|keep",
    ),
    "the batch transposed": (
        lambda: of_body(lambda self, x: self.head(self.body(x.transpose(0, 1))).transpose(0, 1)),
        (4, 4, 3),
        "moves dimension 0",
    ),
    "samples rolled": (lambda: of_body(lambda self, x: self.head(self.body(x.roll(1, 0)))), (4, 3), "roll"),
    "samples indexed": (lambda: of_body(lambda self, x: self.head(self.body(x[[0] * len(x)]))), (4, 3), "indexed by"),
    "autograd.Function": (lambda: of_body(lambda self, x: self.head(Cube.apply(self.body(x)))), (4, 3), ""),
    "in place through a view": (lambda: of_body(through_a_view), (4, 3), "through a view|in place"),
    "assigned": (lambda: of_body(through_a_slice), (4, 3), "__setitem__|in place"),
    "weights of the input": (lambda: of_body(made_by_functional_weights), (4, 3), "batch|weight that depends"),
    "depends on the batch size": (
        lambda: of_body(lambda self, x: self.head(self.body(x)) / len(x)),
        (4, 3),
        "depends on the number of samples",
    ),
    "zeros of the batch size": (
        lambda: of_body(lambda self, x: self.head(self.body(x)) + torch.zeros(len(x), 1)),
        (4, 3),
        "number of samples",
    ),
    "parameter changed": (
        lambda: Forward(
            lambda self, x: self.body(x) + self.count.add_(1), body=nn.Linear(3, 1), count=nn.Buffer(torch.zeros(1))
        ),
        (4, 3),
        "in place",
    ),
    "other type": (lambda: of_body(lambda self, x: self.head(self.body(x)).double()), (4, 3), "casts torch.float32 to"),
}


def gradients_of(critic: Any, engine: Any, x: Tensor) -> list[Tensor | None]:
    """The input gradient and what comes of differentiating it; twice from the same random numbers, the same."""
    torch.manual_seed(1)
    random.seed(1)
    gradient = input_gradient(critic, x, engine=engine)
    parameters = list(critic.parameters()) if isinstance(critic, nn.Module) else []
    if not gradient.requires_grad or not parameters:
        return [gradient]
    return [gradient, *torch.autograd.grad(gradient.square().sum(), parameters, allow_unused=True)]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", OBSTACLES)
def test_other_critics_take_autograd_visibly(name: str) -> None:
    make, shape, reason = OBSTACLES[name]
    critic, x = make(), torch.randn(shape)
    other = copy.deepcopy(critic)
    # at once, so that tracing is part of the first call
    got, expected = gradients_of(critic, "auto", x), gradients_of(other, "autograd", x)
    for g, e in zip(got, expected, strict=True):
        assert (g is None) == (e is None)
        assert g is None or torch.equal(g, e)
    plan = explain(critic, x)
    assert plan.engine == "autograd"
    with pytest.raises(NotImplementedError, match=f"input_gradient: the analytic engine cannot take.*({reason})"):
        input_gradient(critic, x, engine="analytic")


@pytest.mark.parametrize("call", ["by name", "by position", "all by name", "of a part of the input"])
def test_dropout_out_of_training_is_traced(call: str) -> None:
    critic = of_body(
        {
            "by name": lambda self, x: self.head(F.linear(x, F.dropout(self.body.weight, 0.5, training=False)).relu()),
            "by position": lambda self, x: self.head(F.linear(x, F.dropout(self.body.weight, 0.5, False)).relu()),
            "all by name": lambda self, x: self.head(
                F.linear(x, F.dropout(input=self.body.weight, p=0.5, training=False)).relu()
            ),
            "of a part of the input": lambda self, x: self.head(F.dropout(self.body(x).relu(), 0.5, training=False)),
        }[call]
    )
    assert agrees(critic, torch.randn(4, 3))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.body(x * torch.as_tensor(np.linspace(1, 2, 4))),
        lambda self, x: self.body(x * torch.from_numpy(np.linspace(1, 2, 4))),
        lambda self, x: self.body(x * torch.tensor(np.linspace(1, 2, 4))),
        lambda self, x: self.body(x) + torch.as_tensor(np.float64(2)),
        lambda self, x: self.body(x * np.float64(2)),
    ],
    ids=["as_tensor", "from_numpy", "tensor", "a number of numpy", "times a number of numpy"],
)
def test_arrays_of_numpy_in_a_forward(forward: Callable[..., Tensor]) -> None:
    critic, x = Forward(forward, body=nn.Linear(4, 1)).double(), torch.randn(3, 4, dtype=torch.float64)
    explain(critic, x)
    for _ in range(2):
        assert agrees(critic, x, "auto")


def test_hooks_on_all_modules_mean_autograd() -> None:
    critic, x, seen = mlp(), torch.randn(2, 3), []
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda module, *args: seen.append(module))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert explain(critic, x).reason == "a hook is registered for all modules"
                assert not seen
                input_gradient(critic, x)
        finally:
            handle.remove()
        assert seen
        seen.clear()
    assert explain(critic, x).engine == "analytic"


def test_a_shared_layer_with_a_computed_weight() -> None:
    """In training mode torch computes the weight anew at each run, in eval mode it does not change."""
    for wrap in (
        nn.utils.parametrizations.spectral_norm,
        nn.utils.spectral_norm,
        wgan_ext.parametrizations.spectral_norm,
        wgan_ext.spectral_norm,
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            layer = wrap(nn.Linear(3, 3))
        critic, x = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(3, 1)), torch.randn(4, 3)
        assert "layer '0'" in explain(critic, x).reason
        assert "runs more than once, and its weight is computed anew" in explain(critic, x).reason
        assert explain(critic.eval(), x).engine == "analytic"
        torch.testing.assert_close(input_gradient(critic, x), reference.input_gradient(critic, x))


def test_refusals_are_taken_on_trust_for_a_while() -> None:
    critic, x = mlp(nn.Dropout(0.5)), torch.randn(4, 3)

    def looks(calls: int) -> int:
        counts = plans._plans[critic]
        before = counts.found + counts.made
        for _ in range(calls):
            wgan_ext.gradient_penalty(critic, x, x)
        return counts.found + counts.made - before

    wgan_ext.gradient_penalty(critic, x, x)
    assert 4 <= looks(60) <= 8
    assert 3 <= looks(99) <= 4  # one of 33

    critic[1].p = 0.0  # which no trusted call sees; those that must know do
    assert explain(critic, x).engine == "analytic"
    assert looks(5) == 5
    critic[1].p = 0.5
    assert explain(critic, x).engine == "autograd"
    with pytest.raises(NotImplementedError, match="cannot take this critic"):
        input_gradient(critic, x, engine="analytic")

    looks(40)
    critic.eval()  # another mode, another shape, another dtype: looked at
    assert looks(1) == 1
    critic.train()
    looks(40)
    critic[1].p = 0.0
    results = [wgan_ext.gradient_penalty(critic, x, x) for _ in range(40)]  # by autograd, then by the engine
    assert looks(5) == 5
    for result in results:
        torch.testing.assert_close(result, results[-1])


def test_scripted_parts_take_autograd() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4)))
    x = torch.randn(4, 3)
    for critic in (script, nn.Sequential(script, nn.ReLU(), nn.Linear(4, 1))):
        assert explain(critic, x).engine == "autograd"
        torch.testing.assert_close(input_gradient(critic, x), reference.input_gradient(critic, x))


def test_recurrent_critics_take_autograd() -> None:
    class Recurrent(nn.Module):
        def __init__(self, kind: type[nn.Module]) -> None:
            super().__init__()
            self.cells, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cells(x)[0][:, -1])

    x = torch.randn(4, 5, 3)
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        critic = Recurrent(kind)
        assert "layer 'cells'" in explain(critic, x).reason
        torch.testing.assert_close(input_gradient(critic, x), reference.input_gradient(critic, x))


@pytest.mark.parametrize("name", ["batch norm", "instance norm"])
def test_running_statistics_are_autograds(name: str) -> None:
    norm = nn.BatchNorm1d(4) if name == "batch norm" else nn.InstanceNorm1d(4, track_running_stats=True)
    critic = nn.Sequential(nn.Conv1d(3, 4, 2), norm, nn.ReLU(), nn.Conv1d(4, 1, 2))
    x = torch.randn(5, 3, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert re.search("normalizes over the batch|keeps running", explain(critic, x).reason)
        assert norm.num_batches_tracked == 0
        assert torch.equal(norm.running_mean, torch.zeros(4))
        expected = copy.deepcopy(critic)
        torch.testing.assert_close(input_gradient(critic, x), reference.input_gradient(expected, x))
        for got, buffer in zip(critic.buffers(), expected.buffers(), strict=True):
            assert torch.equal(got, buffer)
    assert explain(critic.eval(), x).engine == "analytic"


def test_explain_names_every_layer_and_the_first_obstacle() -> None:
    critic = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Softmax(1)), nn.Softmin(1), nn.Linear(4, 1, bias=False))
    unknown = "is not a function that the analytic engine knows"
    assert str(explain(critic, torch.randn(2, 3))).splitlines() == [
        f"engine: autograd (layer '1.0', Softmax(dim=1), {unknown})",
        "layer                                                     engine    reason",
        "0      Linear(in_features=3, out_features=4, bias=True)   analytic",
        f"1.0    {'Softmax(dim=1)':51}autograd  {unknown}",
        f"2      {'Softmin(dim=1)':51}autograd  {unknown}",
        "3      Linear(in_features=4, out_features=1, bias=False)  analytic",
    ]
    residual = of_body(lambda self, x: self.head(self.body(x).relu() * 2 + self.body(x)))
    assert [(row.name, row.layer) for row in explain(residual, torch.randn(2, 3)).layers] == [
        ("body", "Linear(in_features=3, out_features=4, bias=True)"),
        ("", "relu()"),
        ("", "mul()"),
        ("body", "Linear(in_features=3, out_features=4, bias=True)"),
        ("", "add()"),
        ("head", "Linear(in_features=4, out_features=1, bias=True)"),
    ]


# What tracing leaves alone.


def snapshot(critic: nn.Module) -> list[Any]:
    """All that the tracing of a critic could change."""
    state: list[Any] = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1:3]]
    state[-1] = [state[-1][0].tolist(), state[-1][1]]
    for name, module in critic.named_modules():
        state += [name, module.__class__, list(module.__dict__)]
        for key, value in module.__dict__.items():
            if isinstance(value, (dict, list)):
                items = value.values() if isinstance(value, dict) else value
                state.append((key, id(value), list(value), [id(item) for item in items]))
            else:
                state.append((key, value.tolist() if isinstance(value, Tensor) else value))
    for name, tensor in {**dict(critic.named_parameters()), **dict(critic.named_buffers())}.items():
        state += [name, id(tensor), tensor.tolist(), tensor.requires_grad, tensor.grad is None]
    return state


class Broken(nn.Module):
    """Changes all that it can, and may fail then."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.layers = nn.ModuleList(
                [
                    nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
                    nn.utils.spectral_norm(nn.Linear(3, 3)),
                    nn.utils.weight_norm(nn.Linear(3, 3)),
                    wgan_ext.spectral_norm(nn.Linear(3, 3)),
                    wgan_ext.parametrizations.spectral_norm(nn.Linear(3, 3)),
                    nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)),
                    nn.BatchNorm1d(3),
                    nn.Dropout(0.5),
                ]
            )
        self.fails, self.calls, self.log, self.table = fails, 0, [], {"a": 1}
        self.count = nn.Buffer(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        self.calls += 1
        self.log.append(len(x))
        self.table["b"] = self.calls
        self.new = self.calls
        self.count += 1
        self.count = self.count * 2
        random.random()
        np.random.rand()
        x = x + torch.randn(1)
        if self.fails:
            raise RuntimeError("on purpose")
        return x


@pytest.mark.filterwarnings("ignore:.*the critic normalizes over the batch")
@pytest.mark.parametrize("fails", [False, True])
def test_tracing_leaves_no_traces(fails: bool) -> None:
    critic, x = Broken(fails), torch.randn(4, 3)
    before, x_before = snapshot(critic), x.clone()
    assert "normalizes over the batch" in explain(critic, x).reason
    after = snapshot(critic)
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        assert a == b
    assert torch.equal(x, x_before)
    assert x.grad is None
    assert not torch.nn.modules.module._has_any_global_hook()
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            input_gradient(critic, x)


def test_a_forward_that_fails_is_autograds_to_report() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        raise ZeroDivisionError("on purpose")

    critic = of_body(forward)
    assert explain(critic, torch.randn(4, 3)).reason.endswith("its forward fails on a batch of 2 samples: on purpose")
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        input_gradient(critic, torch.randn(4, 3))


def test_tracing_computes_no_gradients_of_parameters() -> None:
    critic, x = mlp(), torch.randn(4, 3, requires_grad=True)
    input_gradient(critic, x)
    assert all(p.grad is None for p in critic.parameters())
    assert x.grad is None


# How long a plan holds.


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Filled by one entry a plan that is made."""
    made: list[Any] = []
    make = plans._make
    monkeypatch.setattr(plans, "_make", lambda *args: made.append(args) or make(*args))
    return made


def agrees(critic: Any, x: Tensor, engine: Any = "analytic", **options: Any) -> bool:
    got = input_gradient(critic, x, engine=engine, **options)
    args, kwargs = options.get("critic_args", ()), options.get("critic_kwargs", {})
    expected = reference.input_gradient(lambda x: critic(x, *args, **kwargs), x)
    return torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_plan_is_made_once(traces: list[Any]) -> None:
    critic = mlp()
    for batch in (1, 2, 5, 64):
        assert agrees(critic, torch.randn(batch, 3))
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.mul_(2)
    critic[0].weight = nn.Parameter(torch.randn(8, 3))
    critic[0].weight.requires_grad_(False)
    assert agrees(critic, torch.randn(5, 3))
    assert len(traces) == 1


class Progressive(nn.Module):
    gain = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.old, self.new, self.alpha = nn.Linear(3, 1), mlp(), 0.0
        self.options: dict[str, Any] = {"scale": 1.0, "steps": [1, 2]}
        self.config = types.SimpleNamespace(gain=1.0)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        mixed = (1 - self.alpha) * self.old(x) + self.alpha * self.new(x)
        return mixed * (self.options["scale"] * sum(self.options["steps"]) * self.config.gain * gain * self.gain)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "an attribute": lambda critic: setattr(critic, "alpha", 0.5),
    "an entry of a dict": lambda critic: critic.options.update(scale=3.0),
    "an entry of a list": lambda critic: critic.options["steps"].append(3),
    "an attribute of an object": lambda critic: setattr(critic.config, "gain", 3.0),
    "an attribute of the class": lambda critic: setattr(type(critic), "gain", 3.0),
    "a submodule": lambda critic: setattr(critic, "old", nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))),
    "a submodule's submodule": lambda critic: critic.new.__setitem__(1, nn.LeakyReLU(0.5)),
    "a layer's option": lambda critic: setattr(critic.new, "1", nn.LeakyReLU(0.3)),
    "a Parameter of another shape": lambda critic: (
        setattr(critic.new[0], "weight", nn.Parameter(torch.randn(5, 3))),
        setattr(critic.new[0], "bias", None),
        setattr(critic.new[2], "weight", nn.Parameter(torch.randn(1, 5))),
    ),
    "a parametrization": lambda critic: nn.utils.parametrizations.weight_norm(critic.old),
    "the forward": lambda critic: setattr(critic, "forward", lambda x: critic.new(x) * 2),
    "the mode": lambda critic: critic.eval(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_plan_goes_with_the_state_that_it_was_made_for(name: str, traces: list[Any]) -> None:
    critic, x = Progressive(), torch.randn(4, 3)
    try:
        assert agrees(critic, x)
        CHANGES[name](critic)
        assert agrees(critic, x)
        assert len(traces) == 2
    finally:
        Progressive.gain = 1.0


class Gain(float):
    pass


def rescaled(self: Any, x: Tensor) -> Tensor:
    return self.body(x) * float(self.gain)


def renew(critic: Any, make: Callable[[], Any]) -> None:
    """Set another gain, which often lies where the one before lay."""
    critic.gain = None
    critic.gain = make()


# Each forward with what it reads, self.gain, and what changes that at a step.
GAINS: dict[str, tuple[Callable[..., Tensor], Callable[[], Any], Callable[[Any, int], Any]]] = {
    "a number of numpy": (
        rescaled,
        lambda: np.float32(1),
        lambda critic, step: renew(critic, lambda: np.float32(step)),
    ),
    "a number of numpy times x": (
        lambda self, x: self.body(x * self.gain),
        lambda: np.float64(1),
        lambda critic, step: renew(critic, lambda: np.float64(step)),
    ),
    "a subclass of float": (rescaled, lambda: Gain(1), lambda critic, step: renew(critic, lambda: Gain(step))),
    "a subclass of float in a list": (
        lambda self, x: self.body(x) * self.gain[0],
        lambda: [Gain(1)],
        lambda critic, step: critic.gain.__setitem__(0, Gain(step)),
    ),
    "a partial function": (
        lambda self, x: self.gain(self.body(x)),
        lambda: functools.partial(F.leaky_relu, negative_slope=0.1),
        lambda critic, step: renew(critic, lambda: functools.partial(F.leaky_relu, negative_slope=step / 10)),
    ),
    "a partial function in place": (
        lambda self, x: self.gain(self.body(x)),
        lambda: functools.partial(F.leaky_relu, negative_slope=0.1),
        lambda critic, step: critic.gain.keywords.update(negative_slope=step / 10),
    ),
    "a set": (
        lambda self, x: self.body(x) * sum(self.gain),
        lambda: {1},
        lambda critic, step: critic.gain.add(step),
    ),
    "a frozenset": (
        lambda self, x: self.body(x) * sum(self.gain),
        lambda: frozenset([1]),
        lambda critic, step: renew(critic, lambda: frozenset([1, step])),
    ),
    "a queue": (
        lambda self, x: self.body(x) * sum(self.gain),
        lambda: collections.deque([1]),
        lambda critic, step: critic.gain.append(step),
    ),
    "an array in place": (
        lambda self, x: self.body(x) * float(self.gain[0]),
        lambda: np.ones(2),
        lambda critic, step: critic.gain.__setitem__(0, step),
    ),
    "an array in a dict in place": (
        lambda self, x: self.body(x) * float(self.gain["a"][0]),
        lambda: {"a": np.ones(2)},
        lambda critic, step: critic.gain["a"].__setitem__(0, step),
    ),
}


@pytest.mark.parametrize("name", GAINS)
def test_no_plan_goes_stale(name: str) -> None:
    """By whichever engine; several steps, since what is new may lie where something lay that was made before."""
    forward, gain, change = GAINS[name]
    critic, x = Forward(forward, body=nn.Linear(3, 1), gain=gain()), torch.randn(4, 3)
    assert agrees(critic, x, "auto")
    for step in range(2, 10):
        change(critic, step)
        assert agrees(critic, x, "auto")


class Settings:
    """Compared by identity, as most objects are."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.alpha


class Slotted:
    __slots__ = ("alpha",)

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda: Settings(alpha=1.0), lambda cfg, step: setattr(cfg, "alpha", float(step))),
        (lambda: Slotted(1.0), lambda cfg, step: setattr(cfg, "alpha", float(step))),
        (lambda: types.SimpleNamespace(alpha=1.0), lambda cfg, step: setattr(cfg, "alpha", float(step))),
        (
            lambda: Settings(alpha=1.0, table={"a": [0]}),
            lambda cfg, step: (cfg.table["a"].append(step), setattr(cfg, "alpha", sum(cfg.table["a"]))),
        ),
    ],
    ids=["object", "slots", "namespace", "nested"],
)
def test_no_plan_goes_stale_by_an_argument(make: Any, change: Any, by_name: bool) -> None:
    critic, cfg = Forward(lambda self, x, cfg: self.body(x) * cfg.alpha, body=nn.Linear(3, 1)), make()
    x, given = torch.randn(4, 3), {}
    for step in range(2, 9):
        if step == 5:
            given.clear()
            del cfg
            cfg = make()  # often where the one before lay
        else:
            change(cfg, step)
        given = {"critic_kwargs": {"cfg": cfg}} if by_name else {"critic_args": (cfg,)}
        assert agrees(critic, x, "auto", **given)


@pytest.mark.parametrize(
    "argument",
    [
        lambda critic: Settings(alpha=1.0, critic=critic),
        lambda critic: Settings(alpha=1.0, parts=[{"critic": critic}]),
        lambda critic: lambda x: x * critic.alpha,
        lambda critic: critic.scaled,
        lambda critic: functools.partial(critic.scaled),
    ],
    ids=["object", "nested", "closure", "method", "partial function"],
)
def test_arguments_that_hold_the_critic_keep_it_not_alive(argument: Any) -> None:
    class Taking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.alpha = nn.Linear(3, 1), 2.0

        def scaled(self, x: Tensor) -> Tensor:
            return x * self.alpha

        def forward(self, x: Tensor, of: Any) -> Tensor:
            return of(self.body(x))

    for by_name in (False, True):
        critic = Taking()
        dead, of = weakref.ref(critic), argument(critic)
        given: dict[str, Any] = {"critic_kwargs": {"of": of}} if by_name else {"critic_args": (of,)}
        explain(critic, torch.randn(4, 3), **given)
        for alpha in (2.0, 3.0):
            critic.alpha = alpha
            assert agrees(critic, torch.randn(4, 3), "auto", **given)
        del critic, of, given
        gc.collect()
        assert dead() is None


def test_a_hook_ends_a_plan() -> None:
    critic, x = mlp(), torch.randn(4, 3)
    assert agrees(critic, x)
    handle = critic[2].register_forward_hook(lambda module, args, output: 3 * output)
    assert agrees(critic, x, "auto")
    assert "forward hook" in explain(critic, x).reason
    handle.remove()
    assert agrees(critic, x)


def test_modes_have_plans_of_their_own(traces: list[Any]) -> None:
    critic, x = mlp(nn.Dropout(0.9)), torch.randn(4, 3)
    for _ in range(3):
        assert explain(critic.train(), x).engine == "autograd"
        assert agrees(critic.eval(), x)
    assert len(traces) == 2


@pytest.mark.parametrize("critic", [Scaled, lambda: closure_of_number(2.0)], ids=["global", "closure"])
def test_variables_outside_are_watched(critic: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    critic, x = critic(), torch.randn(4, 3)
    assert agrees(critic, x)
    monkeypatch.setattr(THIS, "SCALE", 5.0)
    if hasattr(critic, "turn"):
        critic.turn(5.0)
    assert agrees(critic, x)


def closure_of_number(scale: float) -> Forward:
    def turn(value: float) -> None:
        nonlocal scale
        scale = value

    return Forward(lambda self, x: self.body(x) * scale, body=nn.Linear(3, 1), turn=turn)


class Constants:
    scale = 2.0


class Child(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift

    @property
    def shift(self) -> float:
        return 2.0


@pytest.mark.parametrize("name", ["class", "module", "parent", "comprehension", "attribute"])
def test_variables_outside_are_watched_wherever_they_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    critic: nn.Module = {
        "class": lambda: Forward(lambda self, x: self.body(x) * Constants.scale, body=nn.Linear(3, 1)),
        "module": lambda: Forward(lambda self, x: self.body(x) * THIS.SCALE, body=nn.Linear(3, 1)),
        "parent": Child,
        "comprehension": lambda: Forward(
            lambda self, x: sum([layer(x) * SCALE for layer in self.layers]),
            layers=nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)]),
        ),
        "attribute": lambda: Forward(
            lambda self, x: self.of(self.body(x)), body=nn.Linear(3, 1), of=lambda h: h * SCALE
        ),
    }[name]()
    x = torch.randn(4, 3)
    assert agrees(critic, x)
    monkeypatch.setattr(THIS, "SCALE", 5.0)
    monkeypatch.setattr(Constants, "scale", 5.0)
    assert agrees(critic, x)


def test_arguments_and_sizes_have_plans_of_their_own(traces: list[Any]) -> None:
    critic = Progressive()
    for gain in (1.0, 2.0, 1.0, 2.0):
        assert agrees(critic, torch.randn(4, 3), critic_kwargs={"gain": gain})
        assert agrees(critic, torch.randn(4, 3), critic_args=(gain,))
    assert len(traces) == 4
    images = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 1))
    for size in (8, 9, 8, 9):
        assert agrees(images, torch.randn(3, 1, size, 8))
    assert agrees(images.double(), torch.randn(3, 1, 8, 8, dtype=torch.float64))
    assert len(traces) == 7


def test_plans_keep_no_critic_alive() -> None:
    kinds: list[Callable[[], nn.Module]] = [
        mlp,
        Progressive,
        lambda: mlp(nn.Softmax(1)),
        lambda: closure_of_number(1.0),
        with_own_forward,
    ]
    for kind in kinds:
        critic = kind()
        dead = weakref.ref(critic)
        input_gradient(critic, torch.randn(4, 3)).sum().backward()
        explain(critic, torch.randn(4, 3))
        del critic
        gc.collect()
        assert dead() is None


def test_a_critic_that_changes_at_every_call_takes_autograd_after_a_while(traces: list[Any]) -> None:
    critic, x = Progressive(), torch.randn(4, 3)
    for step in range(40):
        critic.alpha = step / 40
        assert agrees(critic, x, "auto")
    assert 10 < len(traces) < 20
    assert "change too often to trace" in explain(critic, x).reason


def test_used_critics_are_copied_and_pickled() -> None:
    critic, x = (
        nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 8)), *mlp()[1:]).eval(),
        torch.randn(4, 3),
    )
    input_gradient(critic, x)
    for other in (copy.deepcopy(critic), copy.copy(critic)):
        assert agrees(other, x)
        with torch.no_grad():
            other[2].weight.mul_(2)
        assert agrees(other, x)
        assert agrees(critic, x)
    file = io.BytesIO()
    critic = mlp()
    expected = input_gradient(critic, x)
    torch.save(critic, file)
    file.seek(0)
    assert torch.equal(input_gradient(torch.load(file, weights_only=False), x, engine="analytic"), expected)


def test_several_threads_trace_and_evaluate() -> None:
    critics, x = [mlp() for _ in range(8)], torch.randn(4, 3)

    def work(critic: nn.Module) -> list[bool]:
        return [agrees(critic, x, "auto") for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        assert all(itertools.chain.from_iterable(pool.map(work, critics * 2)))
    assert all(agrees(critic, x) for critic in critics)


def while_tracing(trace: Callable[[], Any], evaluate: Callable[[], Any]) -> list[Any]:
    """What evaluations in two threads return for as long as another traces."""
    done = threading.Event()

    def work() -> list[Any]:
        results = [evaluate()]
        while not done.is_set():
            results.append(evaluate())
        return results

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(work) for _ in range(2)]
            try:
                trace()
            finally:
                done.set()
    finally:
        sys.setswitchinterval(interval)
    return [result for future in futures for result in future.result()]


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_evaluations_while_another_thread_traces_the_critic(norm: str) -> None:
    """Computed weights are put aside for tracing, yet every evaluation has the gradients of what they come from."""
    wrap, x = getattr(nn.utils.parametrizations, norm), torch.randn(4, 3)
    for _ in range(4):
        critic = nn.Sequential(wrap(nn.Linear(3, 8)), nn.SiLU(), wrap(nn.Linear(8, 1, bias=False))).eval()
        parameters = list(critic.parameters())

        def evaluate(critic: Any = critic, parameters: Any = parameters) -> tuple[Tensor | None, ...]:
            gradient = input_gradient(critic, x)
            return torch.autograd.grad(gradient.square().sum(), parameters, allow_unused=True)

        def trace(critic: Any = critic) -> None:
            for n in range(1, 12):
                assert explain(critic, torch.randn(4, n, 3)).engine == "analytic"

        expected = evaluate()
        assert not any(gradient is None for gradient in expected)
        for gradients in while_tracing(trace, evaluate):
            assert not any(gradient is None for gradient in gradients)
            torch.testing.assert_close(gradients, expected)
        torch.testing.assert_close(evaluate(), expected)


def test_evaluations_while_another_thread_traces_other_critics() -> None:
    """The tracer watches all modules, which must not be taken for a hook of the user's."""
    critic, x = mlp(), torch.randn(4, 3)
    expected = input_gradient(critic, x, engine="analytic")

    def trace() -> None:
        for _ in range(40):
            assert explain(mlp(), x).engine == "analytic"

    for gradient in while_tracing(trace, lambda: input_gradient(critic, x, engine="analytic")):
        assert torch.equal(gradient, expected)


def test_new_critics_while_another_thread_traces_others() -> None:
    x = torch.randn(4, 3)

    def trace() -> None:
        for _ in range(20):
            assert explain(mlp(), x).engine == "analytic"

    assert all(while_tracing(trace, lambda: agrees(mlp(), x)))
