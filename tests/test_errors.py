"""Every public function refuses wrong arguments by name: the function, the argument, the demand and what came."""

import dataclasses
import functools
import inspect
import math
import operator
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wgan_ext

X = torch.linspace(0.1, 1, 12).view(4, 3)
META = X.to("meta")
NAN, INFINITE = torch.full_like(X, math.nan), torch.full_like(X, math.inf)
WEIGHTS = torch.full((4,), 0.25)
CRITIC = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
SCORELESS = nn.Linear(3, 1, bias=False)
SCORELESS.weight = nn.Parameter(torch.empty(0, 3))
SMOOTH = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
UNKNOWN = nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, 1))


def linear(**options: Any) -> nn.Linear:
    return nn.Linear(3, 4, **options)


Row = tuple[Callable[[Any], object], type[Exception], str]

# What a critic can do wrong, however it is called.
BAD_CRITICS: list[tuple[Any, type[Exception], str]] = [
    (5, TypeError, "critic must be callable, got int"),
    (lambda x: [x], TypeError, "the critic must return a tensor, got list"),
    (lambda x: x.argmax(1), TypeError, "the critic must return floating-point scores, got torch.int64"),
    (lambda x: x.sum(), ValueError, r"the critic must return one score.* each of the 4 samples, got shape \(\)"),
    (lambda x: x[:2].sum(1), ValueError, r"the critic must return one score.* each of the 4 samples, got shape \(2,\)"),
    (lambda x: x[:, :0], ValueError, r"the critic must return at least one score a sample, got shape \(4, 0\)"),
    (lambda x: torch.ones(4), ValueError, "the critic's scores do not depend on its input"),
    (lambda x: torch.ones(4, requires_grad=True), ValueError, "the critic's scores do not depend on its input"),
]


def of_critics(call: Callable[[Any, Any], object]) -> list[Row]:
    return [(lambda f, critic=critic: call(f, critic), *rest) for critic, *rest in BAD_CRITICS]  # type: ignore[misc]


def of_transport() -> list[Row]:
    """The rows that sinkhorn and sinkhorn_divergence share."""
    return [
        (lambda f: f(5, X), TypeError, "x must be a tensor, got int"),
        (lambda f: f(X, None), TypeError, "y must be a tensor, got NoneType"),
        (lambda f: f(X.int(), X), TypeError, "x must be a floating-point tensor, got torch.int32"),
        (lambda f: f(X, X.double()), TypeError, r"y must have the dtype of x \(Float\), got Double"),
        (lambda f: f(X, META), ValueError, r"y must be on the device of x \(cpu\), got meta"),
        (lambda f: f(X, X, a=5), TypeError, "a must be a tensor, got int"),
        (lambda f: f(X, X, b=WEIGHTS.to("meta")), ValueError, r"b must be on the device of x \(cpu\), got meta"),
        (lambda f: f(X[:, 0], X), ValueError, r"x must be points of shape \(count, dim\) or \(batch, .*, got \[4\]"),
        (lambda f: f(X[:0], X), ValueError, r"x must be points .* at least one of each, got \[0, 3\]"),
        (lambda f: f(X, X[:0]), ValueError, r"y must be points .* at least one of each, got \[0, 3\]"),
        (lambda f: f(X, X[:, :2]), ValueError, r"y must have the dimension of x \(3\), got 2"),
        (lambda f: f(NAN, X), ValueError, "x must be finite"),
        (lambda f: f(X, INFINITE), ValueError, "y must be finite"),
        (lambda f: f(X, X, a=WEIGHTS[:3]), ValueError, r"a must have shape \[4\], got \[3\]"),
        (lambda f: f(X, X, a=-WEIGHTS), ValueError, "a must be finite and not negative"),
        (lambda f: f(X, X, b=WEIGHTS * math.nan), ValueError, "b must be finite and not negative"),
        (lambda f: f(X, X, a=4 * WEIGHTS), ValueError, "a and b must have the same sum .*, got 4 and 1"),
        (lambda f: f(X, X, epsilon=-1.0), ValueError, "epsilon must be positive and finite, got -1"),
        (lambda f: f(X, X, epsilon=0.0), ValueError, "epsilon must be positive and finite, got 0"),
        (lambda f: f(X, X, epsilon=math.nan), ValueError, "epsilon must be positive and finite, got nan"),
        (lambda f: f(X, X, epsilon="a"), TypeError, "epsilon must be a number, got str"),
        (lambda f: f(X, X, scaling=1.0), ValueError, r"scaling must be in \(0, 1\), or None, got 1"),
        (lambda f: f(X, X, tol=-1.0), ValueError, "tol must be finite and not negative, got -1"),
        (lambda f: f(X, X, tol=None), TypeError, "tol must be a number, got NoneType"),
        (lambda f: f(X, X, max_iter=0), ValueError, "max_iter must be at least 1, got 0"),
        (lambda f: f(X, X, max_iter=1.5), TypeError, "max_iter must be an integer, got float"),
        (lambda f: f(X, X, relaxation=2.0), ValueError, r'relaxation must be "auto" or in \[1, 2\), got 2'),
        (lambda f: f(X, X, relaxation="b"), ValueError, r"relaxation must be \"auto\" or in \[1, 2\), got 'b'"),
        (lambda f: f(X, X, cost="l2"), ValueError, r"cost must be one of \"sqeuclidean\", .*distance, got 'l2'"),
        (lambda f: f(X, X, cost=0.0), ValueError, "cost as a power of the distance must be positive .*, got 0.0"),
        (lambda f: f(X, X[None]), ValueError, r"y must have the batch of x, whose shape is \[4, 3\], got \[1, 4, 3\]"),
        (lambda f: f(X, X, reach=-1.0), ValueError, "reach must be positive and finite, or None, got -1.0"),
        (lambda f: f(X, X, reach="a"), TypeError, "reach must be a number, got str"),
        (lambda f: f(X, X, reach=(1.0,)), ValueError, "reach must be a number or a pair, got 1 values"),
        (lambda f: f(X, X, memory_limit=-1), ValueError, "memory_limit must not be negative, got -1"),
        (lambda f: f(X, X, memory_limit=1e9), TypeError, "memory_limit must be an integer, got float"),
    ]


def of_scores(function: Callable[..., Tensor]) -> list[Row]:
    """The rows of a loss, whose arguments are scores."""
    names = [name for name in inspect.signature(function).parameters if name.endswith("scores")]
    first, last = names[0], names[-1]
    rest = [X] * (len(names) - 1)
    rows: list[Row] = [
        (lambda f: f(None, *rest), TypeError, f"{first} must be a tensor, got NoneType"),
        (lambda f: f(X.int(), *rest), TypeError, f"{first} must be a floating-point tensor, got torch.int32"),
        (lambda f: f(X.cfloat(), *rest), TypeError, f"{first} must be a floating-point tensor, got torch.complex64"),
        (lambda f: f(X[:0], *rest), ValueError, rf"{first} must not be empty, got shape \(0, 3\)"),
    ]
    if rest:
        rows += [
            (lambda f: f(X, 5), TypeError, f"{last} must be a tensor, got int"),
            (lambda f: f(X, X.double()), TypeError, rf"{last} must have the dtype of {first} \(torch.float32\), got"),
            (lambda f: f(X, META), ValueError, rf"{last} must be on the device of {first} \(cpu\), got meta"),
            (lambda f: f(X, X[:0]), ValueError, rf"{last} must not be empty, got shape \(0, 3\)"),
        ]
    return rows


def of_layers(function: Callable[..., Tensor]) -> list[Row]:
    """The rows of a norm of a layer."""
    options = inspect.signature(function).parameters
    conv = functools.partial(nn.Conv1d, 2, 3, 3)
    small = functools.partial(conv, padding=2, padding_mode="reflect")
    infinite = linear()
    nn.init.constant_(infinite.weight, math.inf)

    def call(f: Any, module: Any, shape: Any = None) -> object:
        return f(module, input_shape=shape)

    rows: list[Row] = [
        (lambda f: call(f, 5), TypeError, "module must be an nn.Module, got int"),
        (lambda f: call(f, nn.Bilinear(2, 2, 2), (3,)), TypeError, "module must be a Linear, .* got Bilinear"),
        (lambda f: call(f, linear(), 3), TypeError, "input_shape must be a sequence of integers, got 3"),
        (lambda f: call(f, linear(), (2, 4)), ValueError, r"must end in 3, the layer's features, got \(2, 4\)"),
        (lambda f: call(f, conv(), (2,)), ValueError, r"input_shape must be \(2, size\), without a batch, got \(2,\)"),
        (lambda f: call(f, conv(), (3, 5)), ValueError, r"input_shape must be \(2, size\), .* got \(3, 5\)"),
        (lambda f: call(f, conv(), (2, 0)), ValueError, r"input_shape must hold positive sizes, got \(2, 0\)"),
        (lambda f: call(f, conv(), (2, 1)), ValueError, r"input_shape is too small for the layer, got \(2, 1\)"),
        (lambda f: call(f, small(), (2, 2)), ValueError, r"input_shape is too small for the layer, got \(2, 2\)"),
        (lambda f: call(f, infinite), ValueError, "the weight must be finite"),
        (lambda f: call(f, linear(dtype=torch.cfloat)), TypeError, "the weight must be a floating-point tensor"),
    ]
    if function is not wgan_ext.singular_values:
        rows.append((lambda f: call(f, small()), ValueError, "input_shape must be given for a convolution"))
    if "tol" in options:
        rows += [
            (lambda f: f(linear(), tol=0), ValueError, "tol must be between 0 and 1, got 0"),
            (lambda f: f(linear(), tol="a"), TypeError, "tol must be a number, got str"),
            (lambda f: f(linear(), max_iter=0), ValueError, "max_iter must be at least 1, got 0"),
            (lambda f: f(linear(), generator=5), TypeError, "generator must be a torch.Generator, got int"),
        ]
    return rows


ROWS: dict[str, list[Row]] = {
    "input_gradient": [
        *of_critics(lambda f, critic: f(critic, X)),
        (lambda f: f(CRITIC, 5), TypeError, "x must be a tensor, got int"),
        (
            lambda f: f(SCORELESS, X),
            ValueError,
            r"the critic must return at least one score a sample, got shape \(4, 0\)",
        ),
        (lambda f: f(CRITIC, X.int()), TypeError, "x must be a floating-point tensor, got torch.int32"),
        (lambda f: f(CRITIC, X.cfloat()), TypeError, "x must be a floating-point tensor, got torch.complex64"),
        (lambda f: f(CRITIC, X[0, 0]), ValueError, r"x must hold at least one sample .*, got shape \(\)"),
        (lambda f: f(CRITIC, X[:0]), ValueError, r"x must hold at least one sample .*, got shape \(0, 3\)"),
        (lambda f: f(CRITIC, X.double()), TypeError, r"x must have the dtype of the critic \(torch.float32\), got"),
        (lambda f: f(CRITIC, META), ValueError, r"x must be on the device of the critic \(cpu\), got meta"),
        (lambda f: f(CRITIC, X[:, :2]), RuntimeError, "mat1 and mat2 shapes cannot be multiplied"),
        (lambda f: f(nn.Flatten(0), X), ValueError, r"for each of the 4 samples, got shape \(12,\)"),
        (lambda f: f(CRITIC, X, engine="fast"), ValueError, "engine must be \"auto\", .* got 'fast'"),
        (
            lambda f: f(UNKNOWN, X, engine="analytic"),
            NotImplementedError,
            r"cannot take this critic: layer '1', Softmax\(dim=1\), is not a function that the analytic engine knows",
        ),
        (lambda f: f(nn.DataParallel(CRITIC), X), NotImplementedError, "the critic is wrapped in DataParallel"),
        (lambda f: f(CRITIC, X, critic_args=X), TypeError, "critic_args must be a tuple or list, got Tensor"),
        (lambda f: f(CRITIC, X, critic_kwargs=[X]), TypeError, "critic_kwargs must be a mapping, got list"),
    ],
    "explain": [
        (lambda f: f(5, X), TypeError, "critic must be callable, got int"),
        (lambda f: f(CRITIC, None), TypeError, "x must be a tensor, or a tuple.*, got NoneType"),
        (lambda f: f(CRITIC, X.int()), TypeError, "x must be a floating-point tensor, got torch.int32"),
        (lambda f: f(CRITIC, X[:0]), ValueError, r"x must hold at least one sample .*, got shape \(0, 3\)"),
        (lambda f: f(nn.DataParallel(CRITIC), X), NotImplementedError, "the critic is wrapped in DataParallel"),
    ],
    "gradient_penalty": [
        *of_critics(lambda f, critic: f(critic, X, X)),
        (lambda f: f(CRITIC, X), ValueError, "fake is needed, got None"),
        (lambda f: f(CRITIC, None, X), ValueError, "real is needed, got None"),
        (lambda f: f(CRITIC, 5, X), TypeError, "real must be a tensor, or a tuple.*, got int"),
        (lambda f: f(CRITIC, X, 5), TypeError, "fake must be a tensor, or a tuple.*, got int"),
        (lambda f: f(CRITIC, [X, 5], [X, X]), TypeError, "real must be a tensor, got int"),
        (lambda f: f(CRITIC, [], []), ValueError, "real must hold at least one tensor, got an empty list"),
        (lambda f: f(CRITIC, X[:0], X[:0]), ValueError, "real must hold at least one sample"),
        (lambda f: f(CRITIC, X.int(), X.int()), TypeError, "real must be a floating-point tensor, got torch.int32"),
        (lambda f: f(CRITIC, [X, X[:2]], [X, X]), ValueError, "tensors of real must have one batch size, got 4 and 2"),
        (lambda f: f(CRITIC, X, X[:2]), ValueError, r"fake must have the shape of real \(4, 3\), got \(2, 3\)"),
        (lambda f: f(CRITIC, X, X.double()), TypeError, "fake must have the dtype of real .*, got torch.float64"),
        (lambda f: f(CRITIC, X, META), ValueError, r"fake must be on the device of real \(cpu\), got meta"),
        (lambda f: f(CRITIC, X, [X]), TypeError, r"fake must have the structure of real \(Tensor\), got list"),
        (
            lambda f: f(CRITIC, {"a": X}, {"b": X}),
            ValueError,
            r"fake must have the keys of real \(\['a'\]\), got \['b'",
        ),
        (lambda f: f(CRITIC, (X, X), (X,)), ValueError, r"fake must hold as many tensors as real \(2\), got 1"),
        (lambda f: f(CRITIC, X, X, at="here"), ValueError, "at must be one of interpolates.*, got 'here'"),
        (lambda f: f(CRITIC, X[:1, 0], at="noise"), ValueError, "needs the standard deviation of real"),
        (lambda f: f(CRITIC, X, X, target=-1.0), ValueError, "target must be a finite norm, at least 0, got -1"),
        (lambda f: f(CRITIC, X, X, target="a"), TypeError, "target must be a number, got str"),
        (lambda f: f(CRITIC, X, X, power=math.inf), ValueError, "power must be at least 1 and finite, got inf"),
        (lambda f: f(CRITIC, X, X, p=0.5), ValueError, "p must be the order of a norm, from 1 to inf, got 0.5"),
        (lambda f: f(CRITIC, X, X, one_sided="yes"), TypeError, "one_sided must be .*, got str"),
        (lambda f: f(CRITIC, X, X, one_sided=None), TypeError, "one_sided must be .*, got NoneType"),
        # 1 and True are equal, and one may be taken for the other where options are looked up
        (lambda f: (f(CRITIC, X, X, one_sided=True), f(CRITIC, X, X, one_sided=1)), TypeError, "one_sided .*, got int"),
        (lambda f: f(CRITIC, X, X, reduction="avg"), ValueError, "reduction must be one of mean.*, got 'avg'"),
        (lambda f: f(CRITIC, X, X, output_reduction="max"), ValueError, "output_reduction must be one of sum, mean"),
        (lambda f: f(CRITIC, X, X, mask=5), TypeError, "mask must be a tensor, or a tuple.*, got int"),
        (lambda f: f(CRITIC, X, X, mask=[X]), TypeError, r"mask must have the structure of real \(Tensor\), got list"),
        (lambda f: f(CRITIC, X, X, mask=X[0, :2]), ValueError, r"mask must be broadcastable .*\(4, 3\), got \(2,\)"),
        (lambda f: f(CRITIC, X, X, mask=META), ValueError, r"mask must be on the device of real \(cpu\), got meta"),
        (lambda f: f(CRITIC, X, X, generator=5), TypeError, "generator must be a torch.Generator, got int"),
        (lambda f: f(CRITIC, X, X, mix=0.5), TypeError, "mix must be a tensor, got float"),
        (lambda f: f(CRITIC, X, X, mix=WEIGHTS.int()), TypeError, "mix must be a floating-point tensor, got torch.int"),
        (lambda f: f(CRITIC, X, X, mix=WEIGHTS[:3]), ValueError, r"mix must have shape .* B = 4, got \(3,\)"),
        (lambda f: f(CRITIC, X, X, mix=WEIGHTS.to("meta")), ValueError, r"mix must be on the device of real \(cpu\)"),
        (lambda f: f(CRITIC, X, X, engine="fast"), ValueError, "engine must be .* got 'fast'"),
        (lambda f: f(CRITIC, X, X, critic_args=X), TypeError, "critic_args must be a tuple or list, got Tensor"),
        (lambda f: f(CRITIC, X, X, critic_kwargs=5), TypeError, "critic_kwargs must be a mapping, got int"),
        (lambda f: f(CRITIC, META, META), ValueError, r"must be on the device of the critic \(cpu\), got meta"),
        (
            lambda f: f(CRITIC, X.double(), X.double()),
            TypeError,
            r"must have the dtype of the critic \(torch.float32\), got",
        ),
    ],
    "wgan_gp_loss": [
        *of_critics(lambda f, critic: f(critic, X, X)),
        (lambda f: f(CRITIC, None, X), ValueError, "real is needed, got None"),
        (lambda f: f(CRITIC, X, None), ValueError, "fake is needed, got None"),
        (lambda f: f(CRITIC, 5, X), TypeError, "real must be a tensor, or a tuple.*, got int"),
        (lambda f: f(CRITIC, X, [X, 5]), TypeError, "fake must be a tensor, got int"),
        (lambda f: f(CRITIC, [], []), ValueError, "real must hold at least one tensor, got an empty list"),
        (lambda f: f(CRITIC, X, X[:0]), ValueError, "fake must hold at least one sample"),
        (lambda f: f(CRITIC, X.int(), X.int()), TypeError, "real must be a floating-point tensor, got torch.int32"),
        (lambda f: f(CRITIC, X, X[:2]), ValueError, r"fake must have the shape of real \(4, 3\), got \(2, 3\)"),
        (lambda f: f(CRITIC, X, X[:, :2], at="real"), ValueError, r"fake must have the shape of real .*got \(4, 2\)"),
        (lambda f: f(CRITIC, X, X.double()), TypeError, "fake must have the dtype of real .*, got torch.float64"),
        (lambda f: f(CRITIC, X, META), ValueError, r"fake must be on the device of real \(cpu\), got meta"),
        (lambda f: f(CRITIC, META, META), ValueError, r"must be on the device of the critic \(cpu\), got meta"),
        (
            lambda f: f(CRITIC, X.double(), X.double()),
            TypeError,
            r"must have the dtype of the critic \(torch.float32\), got",
        ),
        (lambda f: f(CRITIC, X, (X,)), TypeError, r"fake must have the structure of real \(Tensor\), got tuple"),
        (lambda f: f(CRITIC, {"a": X}, {"b": X}), ValueError, r"fake must have the keys of real"),
        (lambda f: f(CRITIC, X, X.clone().requires_grad_()), ValueError, "fake must not require grad"),
        (lambda f: f(CRITIC, X, X, -1.0), ValueError, "weight must be at least 0 and finite, got -1"),
        (lambda f: f(CRITIC, X, X, math.nan), ValueError, "weight must be at least 0 and finite, got nan"),
        (lambda f: f(CRITIC, X, X, "a"), TypeError, "weight must be a number, got str"),
        (lambda f: f(CRITIC, X, X, at="here"), ValueError, "at must be one of interpolates.*, got 'here'"),
        (lambda f: f(CRITIC, X, X, target=-1.0), ValueError, "target must be a finite norm, at least 0, got -1"),
        (lambda f: f(CRITIC, X, X, power=0.5), ValueError, "power must be at least 1 and finite, got 0.5"),
        (lambda f: f(CRITIC, X, X, p=0.5), ValueError, "p must be the order of a norm, from 1 to inf, got 0.5"),
        (lambda f: f(CRITIC, X, X, reduction="avg"), ValueError, "reduction must be one of mean.*, got 'avg'"),
        (lambda f: f(CRITIC, X, X, one_sided="yes"), TypeError, "one_sided must be .*, got str"),
        (lambda f: f(CRITIC, X, X, one_sided=0), TypeError, "one_sided must be .*, got int"),
        (lambda f: f(CRITIC, X, X, reduction="none"), ValueError, "a loss is one number, got 'none'"),
        (lambda f: f(CRITIC, X, X, output_reduction="max"), ValueError, "output_reduction must be one of sum, mean"),
        (lambda f: f(CRITIC, X, X, mask=X[0, :2]), ValueError, r"mask must be broadcastable .*\(4, 3\), got \(2,\)"),
        (lambda f: f(CRITIC, X, X, mask=5), TypeError, "mask must be a tensor, or a tuple.*, got int"),
        (lambda f: f(CRITIC, X, X, generator=5), TypeError, "generator must be a torch.Generator, got int"),
        (lambda f: f(CRITIC, X, X, mix=WEIGHTS[:3]), ValueError, r"mix must have shape .* B = 4, got \(3,\)"),
        (lambda f: f(CRITIC, X, X, engine="fast"), ValueError, "engine must be .* got 'fast'"),
        (
            lambda f: f(UNKNOWN, X, X, engine="analytic"),
            NotImplementedError,
            "cannot take this critic: layer '1', Softmax",
        ),
        (lambda f: f(nn.DataParallel(CRITIC), X, X), NotImplementedError, "the critic is wrapped in DataParallel"),
        (lambda f: f(CRITIC, X, X, critic_args=X), TypeError, "critic_args must be a tuple or list, got Tensor"),
        (lambda f: f(CRITIC, X, X, critic_kwargs=5), TypeError, "critic_kwargs must be a mapping, got int"),
    ],
    "CriticLoss": [
        (lambda f: f(5), TypeError, "critic must be an nn.Module, got int"),
        (lambda f: f(CRITIC, -1.0), ValueError, "weight must be at least 0 and finite, got -1"),
        (lambda f: f(CRITIC, math.inf), ValueError, "weight must be at least 0 and finite, got inf"),
        (lambda f: f(CRITIC, engine="fast"), ValueError, "engine must be .* got 'fast'"),
        (lambda f: f(CRITIC, power=0), ValueError, "power must be at least 1 and finite, got 0"),
        (lambda f: f(CRITIC, one_sided="yes"), TypeError, "one_sided must be .*, got str"),
        (lambda f: f(CRITIC, at="here"), ValueError, "at must be one of interpolates.*, got 'here'"),
        (lambda f: f(CRITIC)(5, X), TypeError, "real must be a tensor, or a tuple.*, got int"),
        (lambda f: f(CRITIC)(X, None), ValueError, "fake is needed, got None"),
    ],
    "GradientPenalty": [
        (lambda f: f(every=0), ValueError, "every must be at least 1, got 0"),
        (lambda f: f(every=2.5), TypeError, "every must be an integer, got float"),
        (lambda f: f(engine="fast"), ValueError, "engine must be .* got 'fast'"),
        (lambda f: f(power=0), ValueError, "power must be at least 1 and finite, got 0"),
        (lambda f: f(one_sided="yes"), TypeError, "one_sided must be .*, got str"),
        (lambda f: f(at="here"), ValueError, "at must be one of interpolates.*, got 'here'"),
        (lambda f: f()(CRITIC, 5), TypeError, "real must be a tensor, or a tuple.*, got int"),
    ],
    "spectral_norm": [
        (lambda f: f(5), TypeError, "module must be an nn.Module, got int"),
        (lambda f: f(linear(), 5), TypeError, "name must be a string, got int"),
        (lambda f: f(nn.ReLU()), KeyError, "name must be a parameter of the module, got 'weight'"),
        (lambda f: f(linear(bias=False), "bias"), ValueError, "parameter `bias` is None"),
        (lambda f: f(linear(), n_power_iterations=0), ValueError, "n_power_iterations must be at least 1, got 0"),
        (lambda f: f(linear(), n_power_iterations=1.5), TypeError, "n_power_iterations must be an integer, got float"),
        (lambda f: f(linear(), eps=-1.0), ValueError, "eps must be finite and not negative, got -1"),
        (lambda f: f(linear(), eps=math.nan), ValueError, "eps must be finite and not negative, got nan"),
        (lambda f: f(linear(), dim=2), IndexError, r"dim must be in \[-2, 1\], got 2"),
        (lambda f: f(linear(), dim="a"), TypeError, "dim must be an integer, got str"),
        (lambda f: f(linear(dtype=torch.cfloat)), NotImplementedError, "weight is complex"),
        (lambda f: f(f(linear())), RuntimeError, "two spectral_norm hooks on the same parameter weight"),
        (lambda f: f(linear(), target=0), ValueError, "target must be positive and finite, got 0"),
        (lambda f: f(linear(), target="a"), TypeError, "target must be a number, got str"),
        (lambda f: f(linear(), shrink_only=1), TypeError, "shrink_only must be True or False, got int"),
        (lambda f: f(linear(), fold=1), TypeError, "fold must be True or False, got int"),
        (lambda f: f(nn.Bilinear(2, 3, 4), fold=True), NotImplementedError, "fold=True .* got weight of Bilinear"),
    ],
    "converge_spectral_norm_": [
        (lambda f: f(5), TypeError, "model must be an nn.Module, got int"),
        (lambda f: f(linear(), tol=-1.0), ValueError, "tol must be finite and not negative, got -1.0"),
        (lambda f: f(linear(), tol="a"), TypeError, "tol must be a number, got str"),
        (lambda f: f(linear(), max_iter=0), ValueError, "max_iter must be at least 1, got 0"),
    ],
    "fuse_spectral_norm_": [
        (lambda f: f(5), TypeError, "model must be an nn.Module, got int"),
    ],
    "parametrizations.spectral_norm": [
        (lambda f: f(5), TypeError, "module must be an nn.Module, got int"),
        (lambda f: f(linear(), 5), TypeError, "name must be a string, got int"),
        (lambda f: f(nn.ReLU()), ValueError, "name must be a parameter or buffer of the module, got 'weight'"),
        (lambda f: f(linear(bias=False), "bias"), ValueError, "must be a parameter or buffer .*, got 'bias'"),
        (lambda f: f(nn.LazyLinear(3)), RuntimeError, "weight is uninitialized"),
        (lambda f: f(linear(), n_power_iterations=0), ValueError, "n_power_iterations must be at least 1, got 0"),
        (lambda f: f(linear(), n_power_iterations=1.5), TypeError, "n_power_iterations must be an integer, got float"),
        (lambda f: f(linear(), eps=-1.0), ValueError, "eps must be finite and not negative, got -1"),
        (lambda f: f(linear(), eps="a"), TypeError, "eps must be a number, got str"),
        (lambda f: f(linear(), dim=2), IndexError, r"dim must be in \[-2, 1\], got 2"),
        (lambda f: f(linear(), dim=-3), IndexError, r"dim must be in \[-2, 1\], got -3"),
        (lambda f: f(linear(), "bias", dim=1), IndexError, r"dim must be in \[-1, 0\], got 1"),
        (lambda f: f(linear(), dim="a"), TypeError, "dim must be an integer, got str"),
        (lambda f: f(nn.BatchNorm1d(3), "num_batches_tracked"), TypeError, "must be a floating-point or complex"),
    ],
    **{name: of_layers(getattr(wgan_ext, name)) for name in ("operator_norm", "operator_norm_bound")},
    "singular_values": [
        *of_layers(wgan_ext.singular_values),
        (lambda f: f(linear(), 0), ValueError, "k must be at least 1, got 0"),
        (lambda f: f(linear(), 1.5), TypeError, "k must be an integer, got float"),
        (lambda f: f(linear(), 4), ValueError, "k must be at most the number of singular values, got 4"),
        (lambda f: f(linear(), name="w"), AttributeError, "no attribute 'w'"),
    ],
    "lipschitz_bound": [
        (lambda f: f(5, (3,)), TypeError, "critic must be an nn.Module, got int"),
        (lambda f: f(CRITIC, 3), TypeError, "input_shape must be a sequence of integers, got 3"),
        (lambda f: f(CRITIC, (0,)), ValueError, r"input_shape must hold positive sizes, got \(0,\)"),
        (lambda f: f(CRITIC, (4,)), NotImplementedError, "its forward fails on a batch of 2 samples"),
        (lambda f: f(UNKNOWN, (3,)), NotImplementedError, "this critic cannot be bounded: layer '1', Softmax"),
        (lambda f: f(nn.DataParallel(CRITIC), (3,)), NotImplementedError, "the critic is wrapped in DataParallel"),
    ],
    "spectral_report": [
        (lambda f: f(5), TypeError, "model must be an nn.Module, got int"),
        (lambda f: f(CRITIC, 3), TypeError, "input_shape must be a sequence of integers, got 3"),
        (lambda f: f(CRITIC, (4,)), RuntimeError, "mat1 and mat2 shapes cannot be multiplied"),
    ],
    "remove_spectral_norm": [
        (lambda f: f(5), TypeError, "module must be an nn.Module, got int"),
        (lambda f: f(linear()), ValueError, "spectral_norm of 'weight' not found in Linear"),
    ],
    **{
        name: of_scores(getattr(wgan_ext, name))
        for name in ("critic_loss", "generator_loss", "gan_critic_loss", "gan_generator_loss")
    },
    "clip_weights_": [
        (lambda f: f(5, 0.1), TypeError, "module must be an nn.Module, got int"),
        (lambda f: f(linear(), "a"), TypeError, "c must be a number, got str"),
        (lambda f: f(linear(), 0), ValueError, "c must be positive and finite, got 0"),
        (lambda f: f(linear(), math.nan), ValueError, "c must be positive and finite, got nan"),
        (lambda f: f(wgan_ext.spectral_norm(linear()), 0.1), ValueError, "weight is computed from other parameters"),
    ],
    "js_divergence": [
        (lambda f: f(None, X), TypeError, "p must be a tensor, got NoneType"),
        (lambda f: f(X, X.int()), TypeError, "q must be a floating-point tensor, got torch.int32"),
        (lambda f: f(X, X.double()), TypeError, r"q must have the dtype of p \(torch.float32\), got torch.float64"),
        (lambda f: f(X, META), ValueError, r"q must be on the device of p \(cpu\), got meta"),
        (lambda f: f(X, X[:, :2]), ValueError, r"same number of bins .*, got shapes \(4, 3\) and \(4, 2\)"),
        (lambda f: f(X[:, :0], X[:, :0]), ValueError, r"same number of bins \(at least 1\)"),
        (lambda f: f(X[:2], X[:3]), ValueError, r"batch dimensions must broadcast, got p \(2,\), q \(3,\)"),
        (lambda f: f(-X, X), ValueError, "p must not be negative"),
        (lambda f: f(X, NAN), ValueError, "q must be finite"),
        (lambda f: f(INFINITE, X), ValueError, "p must be finite"),
        (lambda f: f(X, 0 * X), ValueError, "q must have positive mass"),
    ],
    "wasserstein_1d": [
        (lambda f: f(None, X), TypeError, "x must be a tensor, got NoneType"),
        (lambda f: f(X, X.int()), TypeError, "y must be a floating-point tensor, got torch.int32"),
        (lambda f: f(X, X.double()), TypeError, r"y must have the dtype of x \(torch.float32\), got torch.float64"),
        (lambda f: f(X, META), ValueError, r"y must be on the device of x \(cpu\), got meta"),
        (lambda f: f(X, X, b=META), ValueError, r"b must be on the device of x \(cpu\), got meta"),
        (lambda f: f(X, X, a=5), TypeError, "a must be a tensor, got int"),
        (lambda f: f(X[:, :0], X), ValueError, r"x must have points in its last dimension, got shape \(4, 0\)"),
        (lambda f: f(X, X, a=X[:, :2]), ValueError, r"a must have one weight for each point of x \(4, 3\), got shape"),
        (lambda f: f(X[:2], X[:3]), ValueError, r"batch dimensions must broadcast, got x \(2,\), y \(3,\)"),
        (lambda f: f(X, X, p=0.5), ValueError, "p must be finite and at least 1, got 0.5"),
        (lambda f: f(X, X, p="a"), TypeError, "p must be a number, got str"),
        (lambda f: f(NAN, X), ValueError, "x must be finite"),
        (lambda f: f(X, INFINITE), ValueError, "y must be finite"),
        (lambda f: f(X, X, a=-X), ValueError, "a must not be negative"),
        (lambda f: f(X, X, b=NAN), ValueError, "b must be finite"),
        (lambda f: f(X, X, b=0 * X), ValueError, "b must have positive mass"),
    ],
    "sinkhorn": [
        *of_transport(),
        (lambda f: f(X, X, init=5), TypeError, "init must be a pair of tensors, got int"),
        (lambda f: f(X, X, init=(WEIGHTS,)), ValueError, "init must hold both potentials, f and g, got 1 values"),
        (lambda f: f(X, X, init=(WEIGHTS, None)), TypeError, "init g must be a tensor, got NoneType"),
        (lambda f: f(X, X, init=(WEIGHTS, WEIGHTS[:3])), ValueError, r"init g must have shape \[4\], got \[3\]"),
    ],
    "sinkhorn_divergence": [
        *of_transport(),
        (lambda f: f(X, X, cost=torch.cdist), ValueError, "a cost given by a function needs an epsilon"),
    ],
    "SamplesLoss": [
        (lambda f: f("energy"), NotImplementedError, 'loss must be "sinkhorn", without a kernel, got .energy.'),
        (lambda f: f(5), TypeError, "loss must be a string, got int"),
        (lambda f: f(p=3), ValueError, "p must be 1 or 2, got 3"),
        (lambda f: f(blur=0.0), ValueError, "blur must be positive, got 0.0"),
        (lambda f: f(blur=None), TypeError, "blur must be a number, got NoneType"),
        (lambda f: f(reach=-1), ValueError, "reach must be positive, got -1"),
        (lambda f: f(scaling=1.0), ValueError, r"scaling must be in \(0, 1\), got 1.0"),
        (lambda f: f(cost="SqDist(X,Y)"), NotImplementedError, "cost must be a function of x and y"),
        (lambda f: f()(X), ValueError, r"arguments must be \(x, y\), .*, got 1"),
        (lambda f: f()(X, 5), TypeError, "y must be a tensor, got int"),
    ],
    "sinkhorn_matrix": [
        (lambda f: f(5), TypeError, "C must be a tensor, got int"),
        (lambda f: f(X.int()), TypeError, "C must be a floating-point tensor, got torch.int32"),
        (lambda f: f(X[0]), ValueError, r"C must be costs of shape \(N, M\) or \(batch, N, M\), .*, got \[3\]"),
        (lambda f: f(X[:0]), ValueError, r"C must be costs .* at least one of each, got \[0, 3\]"),
        (lambda f: f(INFINITE), ValueError, "C must be finite"),
        (lambda f: f(X, a=WEIGHTS[:3]), ValueError, r"a must have shape \[4\], got \[3\]"),
        (lambda f: f(X, b=WEIGHTS), ValueError, r"b must have shape \[3\], got \[4\]"),
        (lambda f: f(X, a=WEIGHTS.to("meta")), ValueError, r"a must be on the device of C \(cpu\), got meta"),
        (lambda f: f(X, a=4 * WEIGHTS), ValueError, "a and b must have the same sum .*, got 4 and 1"),
        (lambda f: f(X, tol=-1.0), ValueError, "tol must be finite and not negative, got -1"),
        (lambda f: f(X, init=(WEIGHTS, WEIGHTS)), ValueError, r"init g must have shape \[3\], got \[4\]"),
    ],
}


def takes_arguments(public: Any) -> bool:
    """Whether a user calls it with arguments: results are dataclasses and named tuples, which users only read."""
    result = dataclasses.is_dataclass(public) or hasattr(public, "_fields")
    return not result and bool(inspect.signature(public).parameters)


def public_names(module: Any) -> Iterator[str]:
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, types.ModuleType):
            yield from (f"{name}.{inner}" for inner in public_names(value))
        elif takes_arguments(value):
            yield name


def test_every_public_function_has_rows() -> None:
    assert set(ROWS) == set(public_names(wgan_ext))
    assert all(ROWS.values())


@pytest.mark.parametrize(
    ("name", "call", "error", "message"),
    [
        pytest.param(name, *row, id=f"{name}: {re.sub(r'[^ -Z^-~]', '', row[2])}")
        for name, rows in ROWS.items()
        for row in rows
    ],
)
def test_a_wrong_argument_is_named(
    name: str, call: Callable[[Any], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        call(operator.attrgetter(name)(wgan_ext))
    assert raised.type is error


def test_nan_reaches_the_penalty_through_weights_and_smooth_layers() -> None:
    spoiled = X.clone()
    spoiled[1, 1] = math.nan
    for engine in ("analytic", "autograd"):
        penalty = wgan_ext.gradient_penalty(CRITIC, spoiled, at="real", reduction="none", engine=engine)
        assert penalty[[0, 2, 3]].isfinite().all()
    assert wgan_ext.gradient_penalty(SMOOTH, spoiled, at="real", reduction="none").isnan().tolist() == [
        False,
        True,
        False,
        False,
    ]
    broken = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.2), nn.Linear(4, 1))
    nn.init.constant_(broken[0].weight, math.nan)
    assert wgan_ext.gradient_penalty(broken, X, at="real").isnan()


def test_a_mask_goes_by_key() -> None:
    def critic(x: dict[str, Tensor]) -> Tensor:
        return (x["a"].square() * x["b"]).sum(1)

    points = {"a": X, "b": X + 1}
    ones, zeros = torch.ones(3), torch.zeros(3)
    in_order = wgan_ext.gradient_penalty(critic, points, at="real", mask={"a": ones, "b": zeros})
    reversed_order = wgan_ext.gradient_penalty(critic, points, at="real", mask={"b": zeros, "a": ones})
    torch.testing.assert_close(in_order, (2 * X * (X + 1)).square().sum(1).mean())
    assert torch.equal(in_order, reversed_order)
