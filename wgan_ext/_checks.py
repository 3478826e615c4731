"""Checks of the functions written in Python, worded as in ``csrc/checks.h``: function, argument, demand, what came."""

from __future__ import annotations

import torch
from torch import Tensor


def check_floating(function: str, **tensors: Tensor | None) -> None:
    """Raise TypeError unless all are floating-point tensors of one dtype, ValueError unless they are on one device.

    None is an argument left out.
    """
    first: tuple[str, Tensor] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{function}: {name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{function}: {name} must be a floating-point tensor, got {tensor.dtype}")
        first = first or (name, tensor)
        if tensor.dtype != first[1].dtype:
            raise TypeError(
                f"{function}: {name} must have the dtype of {first[0]} ({first[1].dtype}), got {tensor.dtype}"
            )
        if tensor.device != first[1].device:
            raise ValueError(
                f"{function}: {name} must be on the device of {first[0]} ({first[1].device}), got {tensor.device}"
            )


def values_are_checked(tensor: Tensor) -> bool:
    """Whether bad values raise: on a CPU they do; elsewhere looking would synchronise, and they yield NaN."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower: what sums are taken and returned in."""
    return torch.promote_types(dtype, torch.float32)
