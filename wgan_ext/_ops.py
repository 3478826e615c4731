"""The operators as Python calls them.

Eager code uses the pybind11 entries of ``wgan_ext._C`` (0.7 us a call), code being compiled uses
``torch.ops.wgan_ext`` (which torch can trace); both go through the dispatcher and mean the same. Beside each operator
stand its fake kernel and its autocast rule, which torch needs to know; checks and kernels are in ``csrc``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import _C

_F = TypeVar("_F", bound=Callable[..., Any])
_register_fake: Callable[[str], Callable[[_F], _F]] = torch.library.register_fake


def _operator(name: str) -> Callable[..., Any]:
    eager = getattr(_C, name)
    traced = getattr(torch.ops.wgan_ext, name).default

    def call(*args: Any) -> Any:
        return traced(*args) if torch.compiler.is_compiling() else eager(*args)

    call.__name__ = name
    return call


# critic

# spectral

# sinkhorn
sinkhorn = _operator("sinkhorn")
sinkhorn_divergence = _operator("sinkhorn_divergence")


def _sinkhorn_type(x: Tensor) -> torch.dtype:
    """The kernels compute in float64 for float64 points, else in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@_register_fake("wgan_ext::sinkhorn")
def _(x: Tensor, y: Tensor, *options: Any) -> tuple[Tensor, ...]:
    value = x.new_empty((), dtype=_sinkhorn_type(x))
    f, g = value.new_empty(x.shape[0]), value.new_empty(y.shape[0])
    return (value, f, g, f.clone(), g.clone(), *_sinkhorn_facts(value))


@_register_fake("wgan_ext::sinkhorn_divergence")
def _(x: Tensor, y: Tensor, *options: Any) -> tuple[Tensor, ...]:
    value = x.new_empty((), dtype=_sinkhorn_type(x))
    f, g = value.new_empty(x.shape[0]), value.new_empty(y.shape[0])
    return (value, f, g, f.clone(), g.clone(), *_sinkhorn_facts(value))


def _sinkhorn_facts(value: Tensor) -> tuple[Tensor, ...]:
    """Marginal error, iterations, converged, epsilon."""
    dtypes = (value.dtype, torch.int64, torch.bool, torch.float64)
    return tuple(value.new_empty((), dtype=dtype) for dtype in dtypes)


@_register_fake("wgan_ext::sinkhorn_gradient")
def _(x: Tensor, y: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_register_fake("wgan_ext::sinkhorn_weight_gradient")
def _(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, f: Tensor, cost: str) -> Tensor:
    return torch.empty_like(f)


for _name in ("sinkhorn", "sinkhorn_divergence"):
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(f"wgan_ext::{_name}", _device, torch.float32)
