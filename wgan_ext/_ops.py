"""The operators as Python calls them.

Eager code uses the pybind11 entries of ``wgan_ext._C`` (0.7 us a call), code being compiled uses
``torch.ops.wgan_ext`` (which torch can trace); both go through the dispatcher and mean the same. Beside each operator
stand its fake kernel and its autocast rule, which torch needs to know; checks and kernels are in ``csrc``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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

# sinkhorn
