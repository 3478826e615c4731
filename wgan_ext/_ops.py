"""The operators as Python calls them.

Eager code uses the pybind11 entries of ``wgan_ext._C`` (0.7 us a call), code being compiled uses
``torch.ops.wgan_ext`` (which torch can trace); both go through the dispatcher and mean the same. Beside each operator
stand its fake kernel and its autocast rule, which torch needs to know; checks and kernels are in ``csrc``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _C


def _operator(name: str) -> Callable[..., Any]:
    eager = getattr(_C, name)
    traced = getattr(torch.ops.wgan_ext, name).default

    def call(*args: Any) -> Any:
        return traced(*args) if torch.compiler.is_compiling() else eager(*args)

    call.__name__ = name
    return call


# critic

# spectral

spectral_norm = _operator("spectral_norm")
spectral_norm_backward = _operator("spectral_norm_backward")
spectral_norm_store_ = _operator("spectral_norm_store_")


@torch.library.register_fake("wgan_ext::spectral_norm")
def _(
    weight: Tensor, u: Tensor, v: Tensor, dim: int, n_power_iterations: int, eps: float, v_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sigma = weight.new_empty((), dtype=torch.promote_types(weight.dtype, torch.float32))
    return torch.empty_like(weight), torch.empty_like(u), torch.empty_like(v), sigma


@torch.library.register_fake("wgan_ext::spectral_norm_backward")
def _(
    grad: Tensor | None, grad_sigma: Tensor | None, weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor, dim: int
) -> Tensor:
    return torch.empty_like(weight)


# sinkhorn
