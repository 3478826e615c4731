"""The matrix products and convolutions of a critic: how many multiply-adds, and the least time they can take.

A layer has three products, each of as many multiply-adds: forward y = x W^T, input dx = dy W, weight dW = dy^T x. A
gradient penalty is made of them: activations (forward), u-chain (input), v-chain (forward), dW = u^T v (weight), and
for a smooth critic the derivative through its activations (input, weight). The critic loss has real and fake besides:
their activations (forward), their u-chain (input) and dW = u^T h (weight).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from contestant import Contestant
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

Place = Literal["first", "inner", "last"]


class Needs(NamedTuple):
    """How often the samples of a batch go through (forward, input, weight) of a layer, by its place.

    Below the first layer only the points' chain u goes on. Above the last activation the penalty's u is the same for
    every sample, so its products have a batch of one, which is not counted, and the activations are not needed. In the
    loss u starts from the weights of the scores and differs between real, fake and points.
    """

    first: tuple[int, int, int]
    inner: tuple[int, int, int]
    last: tuple[int, int, int]


class Kind(NamedTuple):
    """What a kind of critic needs."""

    penalty: Needs
    loss: Needs


PIECEWISE_LINEAR = Kind(
    penalty=Needs(first=(2, 1, 1), inner=(2, 1, 1), last=(0, 0, 0)),
    loss=Needs(first=(4, 1, 3), inner=(4, 3, 3), last=(3, 3, 3)),
)
SMOOTH = Kind(
    penalty=Needs(first=(2, 1, 2), inner=(2, 2, 2), last=(0, 0, 0)),
    loss=Needs(first=(4, 1, 4), inner=(4, 4, 4), last=(3, 3, 3)),
)

ROUNDS = 3


class Layer:
    """The products of a linear or convolutional layer, at the shapes that it met."""

    def __init__(self, module: Any, x: Tensor, y: Tensor, place: Place) -> None:
        self.module, self.x_shape, self.y_shape = module, x.shape, y.shape
        self.place: Place = place
        self.multiply_adds = y.numel() * module.weight[0].numel()

    def calls(self, rows: int, memory_format: torch.memory_format) -> list[Callable[[], object]]:
        """The three products, of ``rows`` times as many samples."""

        def random(shape: torch.Size) -> Tensor:
            return torch.randn(shape, device=self.module.weight.device).to(memory_format=memory_format)

        x, y = (random(torch.Size([rows * shape[0], *shape[1:]])) for shape in (self.x_shape, self.y_shape))
        W = random(self.module.weight.shape)
        if isinstance(self.module, nn.Linear):
            x, y = x.flatten(0, -2), y.flatten(0, -2)
            return [lambda: x @ W.T, lambda: y @ W, lambda: y.T @ x]
        m = self.module
        settings = (m.stride, m.padding, m.dilation, False, [0] * len(m.stride), m.groups)

        def backward(*wanted: bool) -> Callable[[], object]:
            return lambda: aten.convolution_backward(y, x, W, None, *settings, wanted)

        return [
            lambda: aten.convolution(x, W, None, *settings),
            backward(True, False, False),
            backward(False, True, False),
        ]

    def seconds(self) -> list[float]:
        """The least time of each product for the samples that it met, in the best layout and batch."""
        formats = [torch.contiguous_format] + [torch.channels_last] * (len(self.x_shape) == 4)
        trials = [
            [fastest(call, self.module.weight.device) / rows for call in self.calls(rows, memory_format)]
            for rows, memory_format in itertools.product((1, 3), formats)
        ]
        return [min(times) for times in zip(*trials, strict=True)]


def fastest(call: Callable[[], object], device: torch.device) -> float:
    """The least time of a call, the mean of a round."""
    contestant = Contestant(call, device)
    contestant.calibrate()
    for _ in range(ROUNDS):
        contestant()
    return min(contestant.seconds)


def layers(critic: nn.Module, x: Tensor) -> list[Layer]:
    """The linear and convolutional layers of a critic that ends in one, as a batch meets them."""
    found: list[Layer] = []

    def met(module: nn.Module, inputs: tuple[Tensor], y: Tensor) -> None:
        found.append(Layer(module, inputs[0], y, "inner" if inputs[0].requires_grad else "first"))

    products = [module for module in critic.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    handles = [module.register_forward_hook(met) for module in products]
    critic(x)
    for handle in handles:
        handle.remove()
    found[-1].place = "last"
    return found


def needed(layers: list[Layer], needs: Needs) -> int:
    """Multiply-adds that the layers need."""
    return sum(sum(getattr(needs, layer.place)) * layer.multiply_adds for layer in layers)


def floor_seconds(layers: list[Layer], seconds: list[list[float]], needs: Needs) -> float:
    """The least time that the products of the layers can take, from the times of each."""
    return sum(
        need * least
        for layer, times in zip(layers, seconds, strict=True)
        for need, least in zip(getattr(needs, layer.place), times, strict=True)
    )


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the multiply-adds that torch is asked for; torch's FlopCounterMode breaks on a gradient penalty."""
    count = {"multiply_adds": 0}

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            count["multiply_adds"] += multiply_adds(func.overloadpacket, args, result)
            return result

    with Counter():
        yield count


def multiply_adds(operator: Any, args: Any, result: Any) -> int:
    """Multiply-adds of one call."""
    if operator in (aten.mm, aten.bmm):
        return int(args[0].numel() * args[1].shape[-1])
    if operator == aten.addmm:
        return int(args[1].numel() * args[2].shape[-1])
    if operator == aten.convolution:
        x, W, transposed = args[0], args[1], args[6]
        return int((x if transposed else result).numel() * W[0].numel())
    if operator == aten.convolution_backward:
        dy, x, W, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
        return int((x if transposed else dy).numel() * W[0].numel() * sum(wanted[:2]))
    return 0
