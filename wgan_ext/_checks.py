"""Checks of the functions written in Python, worded as in ``csrc/checks.h``: function, argument, demand, what came."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor, nn


def check_type(function: str, name: str, value: Any, kind: type | tuple[type, ...], demand: str) -> None:
    """Raise TypeError unless the value is of the kind, which ``demand`` names: "a tensor"."""
    if not isinstance(value, kind):
        raise TypeError(f"{function}: {name} must be {demand}, got {type(value).__name__}")


def check_number(function: str, name: str, value: Any) -> None:
    """Raise TypeError unless the value is a real number."""
    check_type(function, name, value, (int, float, numbers.Real), "a number")


def check_count(function: str, name: str, value: Any) -> None:
    """Raise TypeError unless the value is an integer, ValueError unless it is positive."""
    check_type(function, name, value, (int, numbers.Integral), "an integer")
    if value < 1:
        raise ValueError(f"{function}: {name} must be at least 1, got {value}")


def check_module(function: str, name: str, value: Any) -> None:
    """Raise TypeError unless the value is a module."""
    check_type(function, name, value, nn.Module, "an nn.Module")


def check_floating_tensor(function: str, name: str, value: Any) -> None:
    """Raise TypeError unless the value is a floating-point tensor."""
    check_type(function, name, value, Tensor, "a tensor")
    if not value.is_floating_point():
        raise TypeError(f"{function}: {name} must be a floating-point tensor, got {value.dtype}")


def check_device(function: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{function}: {name} must be on the device of {other_name} ({other.device}), got {tensor.device}"
        )


def check_floating(function: str, **tensors: Tensor) -> None:
    """Raise TypeError unless all are floating-point tensors of one dtype, ValueError unless they are on one device."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        check_floating_tensor(function, name, tensor)
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{function}: {name} must have the dtype of {first_name} ({first.dtype}), got {tensor.dtype}"
            )
        check_device(function, name, tensor, first_name, first)


def check_batch(function: str, name: str, x: Tensor) -> None:
    """Raise unless x is a floating-point batch of at least one sample."""
    check_floating_tensor(function, name, x)
    if x.dim() == 0 or x.shape[0] == 0:
        raise ValueError(f"{function}: {name} must hold at least one sample in dimension 0, got shape {tuple(x.shape)}")


def values_are_checked(tensor: Tensor) -> bool:
    """Whether bad values raise: on a CPU they do; elsewhere looking would synchronise, and they yield NaN."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower: what sums are taken and returned in."""
    wide = dtype == torch.float32 or dtype == torch.float64
    return dtype if wide else torch.promote_types(dtype, torch.float32)  # a call of torch's
