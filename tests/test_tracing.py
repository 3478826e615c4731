"""What keeps a critic from the analytic engine, what tracing leaves alone, and how long a plan holds."""

from __future__ import annotations

import copy
import gc
import io
import random
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wgan_ext
from wgan_ext import explain, input_gradient, reference


class Forward(nn.Module):
    """A critic made of its parts and the function that its forward is."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(self, *args, **kwargs)


def mlp(*options: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), *options, nn.ReLU(), nn.Linear(8, 1))


def of_body(function: Callable[..., Tensor], **parts: Any) -> Forward:
    return Forward(function, body=nn.Linear(3, 4), head=nn.Linear(4, 1), **parts)


def hooked(register: str) -> nn.Sequential:
    critic = mlp()
    getattr(critic[2], register)(lambda module, *args: None)
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
    "division": (lambda: of_body(lambda self, x: 1 / (self.head(self.body(x)) + 9)), (4, 3),  r"truediv__\(\),? is not a"),
    "attention": (Attention, (3, 5, 4), "MultiheadAttention|multi_head|layer 'inner"),
    "product of the input with itself": (
        lambda: of_body(lambda self, x: self.head(self.body(x) @ self.body(x).mT @ self.body(x))),
        (4, 2, 3),
        "product other than input @ matrix",
    ),
    "item": (lambda: of_body(lambda self, x: self.head(self.body(x)) * x.sum().item()), (4, 3), r"reads the values|reduces"),
    "control flow": (lambda: of_body(control_flow), (4, 3), "reads the values|reduces the batch|not a function"),
    "dropout": (lambda: mlp(nn.Dropout(0.5)), (4, 3), r"layer '1', Dropout\(p=0.5.* is random in training mode"),
    "functional dropout": (
        lambda: of_body(lambda self, x: self.head(F.dropout(self.body(x), 0.5, self.training))),
        (4, 3),
        r"dropout\(\), is random|is random in training",
    ),
    "RReLU": (lambda: mlp(nn.RReLU()), (4, 3), "layer '1', RReLU.* is random in training mode"),
    "minibatch stddev": (lambda: of_body(minibatch_stddev), (4, 3), r"std\(\)"),
    "centred on the batch": (
        lambda: of_body(lambda self, x: self.head(self.body(x) - self.body(x).mean(0))), (4, 3), "dimension 0, the batch"
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
        lambda: of_body(lambda self, x: self.head(self.body(x) + torch.randn_like(x[:, :1]))), (4, 3), "randn_like"
    ),
    "noise in place": (
        lambda: of_body(lambda self, x: self.head(self.body(x)) * torch.empty(1).uniform_(1, 2)), (4, 3), "random"
    ),
    "noise of Python": (
        lambda: of_body(lambda self, x: self.head(self.body(x)) * (1 + random.random())), (4, 3), "random|number of samples"
    ),
    "Python's coin": (
        lambda: of_body(lambda self, x: self.head(self.body(x)) * (2 if random.random() < 0.5 else 1)), (4, 3), "random|number of samples"
    ),
    "global tensor": (lambda: Forward(lambda self, x: self.body(x * TENSOR), body=nn.Linear(3, 1)), (4, 3), "neither of the critic"),
    "tensor of a closure": (lambda: closure_over([torch.tensor(2.0)]), (4, 3), "neither of the critic"),
    "global dict": (lambda: Forward(lambda self, x: self.body(x) * TABLE["scale"], body=nn.Linear(3, 1)), (4, 3), "'TABLE'"),
    "global object": (
        lambda: Forward(lambda self, x: self.body(x) * SETTINGS.scale, body=nn.Linear(3, 1)), (4, 3), "'SETTINGS'"
    ),
    "list of a closure": (lambda: closure_over([2.0]), (4, 3), "the variable 'value', which may change unseen"),
    "global list in a comprehension": (
        lambda: Forward(lambda self, x: sum([self.body(x) * c for c in CELL]), body=nn.Linear(3, 1)), (4, 3), "'CELL'"
    ),
    "global list in an inner function": (
        lambda: Forward(lambda self, x: (lambda h: h * CELL[0])(self.body(x)), body=nn.Linear(3, 1)), (4, 3), "'CELL'"
    ),
    "counter": (Counter, (4, 3), "changes its attributes"),
    "log": (Log, (4, 3), "changes its attributes"),
    "the batch reshaped": (lambda: of_body(lambda self, x: self.head(self.body(x.view(-1, 3))).view(4 if len(x) == 8 else len(x), -1)), (4, 2, 3), "batch as dimension 0|keep"),
    "the batch transposed": (lambda: of_body(lambda self, x: self.head(self.body(x.transpose(0, 1))).transpose(0, 1)), (4, 4, 3), "moves dimension 0"),
    "samples rolled": (lambda: of_body(lambda self, x: self.head(self.body(x.roll(1, 0)))), (4, 3), "roll"),
    "samples indexed": (lambda: of_body(lambda self, x: self.head(self.body(x[[0] * len(x)]))), (4, 3), "indexed by"),
    "autograd.Function": (lambda: of_body(lambda self, x: self.head(Cube.apply(self.body(x)))), (4, 3), ""),
    "in place through a view": (lambda: of_body(through_a_view), (4, 3), "through a view|in place"),
    "assigned": (lambda: of_body(through_a_slice), (4, 3), "__setitem__|in place"),
    "weights of the input": (lambda: of_body(made_by_functional_weights), (4, 3), "batch|weight that depends"),
    "depends on the batch size": (
        lambda: of_body(lambda self, x: self.head(self.body(x)) / len(x)), (4, 3), "depends on the number of samples"
    ),
    "zeros of the batch size": (
        lambda: of_body(lambda self, x: self.head(self.body(x)) + torch.zeros(len(x), 1)), (4, 3), "number of samples"
    ),
    "parameter changed": (
        lambda: Forward(lambda self, x: self.body(x) + self.count.add_(1), body=nn.Linear(3, 1), count=nn.Buffer(torch.zeros(1))),
        (4, 3),
        "in place",
    ),
    "other type": (lambda: of_body(lambda self, x: self.head(self.body(x)).double()), (4, 3), "casts torch.float32 to"),
}  # fmt: skip


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
