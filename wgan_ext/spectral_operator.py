"""Spectral normalization by the norm of a layer as an operator, in place of that of its reshaped weight.

Gouk et al., Regularisation of Neural Networks by Enforcing Lipschitz Continuity (arXiv:1804.04368), algorithm 2.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm as _TorchSpectralNorm
from torch.nn.utils.spectral_norm import SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook

from ._checks import accumulation_dtype
from .norms import largest_singular
from .operators import LayerMap, map_of, output_dim
from .spectral_hook import SpectralNorm, unit

__all__ = ["OperatorSpectralNorm", "normalize_operator"]


def power_iteration(layer: LayerMap, weight: Tensor, u: Tensor, v: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """V = A^T u / |A^T u|, u = A v / |A v|, so many times; where A is 0 or not finite, u and v stay.

    Args:
        layer: The map A.
        weight: Its weight.
        u: Shape ``layer.output_shape``.
        v: Shape ``layer.input_shape``.
        iterations: How many.
    """
    with torch.no_grad():
        for _ in range(iterations):
            v = unit(layer.adjoint(weight, u[None])[0], v)
            u = unit(layer.apply(weight, v[None])[0], u)
    return u, v


def sigma_of(layer: LayerMap, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """<u, A v>, differentiable to any order in the weight, u and v being constants."""
    return (u * layer.apply(weight, v[None])[0]).sum()


class OperatorSpectralNorm(SpectralNorm):
    """The hook, with torch's parameter and buffers: weight_orig, weight_u like an output, weight_v like an input."""

    layer: LayerMap

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        """Return the normalized weight; with ``do_power_iteration`` update the buffers u and v in place before."""
        weight: Tensor = getattr(module, self.name + "_orig")
        buffers: tuple[Tensor, Tensor] = getattr(module, self.name + "_u"), getattr(module, self.name + "_v")
        device_type, dtype = weight.device.type, accumulation_dtype(weight.dtype)
        on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
        with torch.autocast(device_type, enabled=False) if on else contextlib.nullcontext():
            wide = weight.to(dtype)
            u, v = (buffer.to(dtype, copy=True) for buffer in buffers)
            if do_power_iteration:
                u, v = power_iteration(self.layer, wide, u, v, self.n_power_iterations)
                with torch.no_grad():
                    buffers[0].copy_(u)
                    buffers[1].copy_(v)
            sigma = sigma_of(self.layer, wide, u, v)
            divisor = torch.where(sigma != 0, sigma, self.eps) / self.target
            if self.shrink_only:
                divisor = torch.where(sigma.abs() <= self.target, 1.0, divisor)
            return (wide / divisor).to(weight.dtype)

    def reshape_weight_to_matrix(self, weight: Tensor) -> Tensor:
        """The weight itself: torch's hooks for old checkpoints hand it to ``_solve_v_and_rescale``."""
        return weight

    def _solve_v_and_rescale(self, weight: Tensor, u: Tensor, target_sigma: Tensor) -> Tensor:
        v = self.layer.adjoint(weight, u[None])[0]
        return v * (target_sigma / sigma_of(self.layer, weight, u, v))


def normalize_operator(
    module: nn.Module,
    input_shape: Sequence[int] | None,
    name: str,
    n_power_iterations: int,
    eps: float,
    target: float,
    shrink_only: bool,
) -> None:
    """Register the hook; see ``spectral_norm``, whose ``kind`` "operator" this is. What it takes is checked there.

    u and v start converged, to 1e-3 of sigma, since power iteration is slow on convolutions.

    Raises:
        KeyError: the module has no such parameter.
        RuntimeError: the parameter is normalized already.
        ValueError: the parameter is None or uninitialized, or the input does not fit the layer.
        TypeError: the module is none of the layers of ``operator_norm``.
    """
    function = "spectral_norm"
    if any(isinstance(h, _TorchSpectralNorm) and h.name == name for h in module._forward_pre_hooks.values()):
        raise RuntimeError(f"{function}: {name} is normalized already")
    if name not in module._parameters:
        raise KeyError(f"{function}: name must be a parameter of the module, got {name!r}")
    weight = module._parameters[name]
    if weight is None or nn.parameter.is_lazy(weight):
        raise ValueError(f"{function}: {name} is {'None' if weight is None else 'uninitialized'}")
    hook = OperatorSpectralNorm(name, n_power_iterations, output_dim(module), eps)
    hook.layer = map_of(function, module, input_shape)
    hook.target, hook.shrink_only = float(target), shrink_only
    hook._module = weakref.ref(module)
    u, v = _start(hook.layer, weight)
    del module._parameters[name]
    module.register_parameter(name + "_orig", weight)
    setattr(module, name, weight.data)
    module.register_buffer(name + "_u", u)
    module.register_buffer(name + "_v", v)
    module.register_forward_pre_hook(hook)
    module._register_state_dict_hook(SpectralNormStateDictHook(hook))  # type: ignore[no-untyped-call]
    module._register_load_state_dict_pre_hook(SpectralNormLoadStateDictPreHook(hook))  # type: ignore[no-untyped-call]


def _start(layer: LayerMap, weight: Tensor) -> tuple[Tensor, Tensor]:
    u, v = weight.new_empty(layer.output_shape), weight.new_empty(layer.input_shape)
    if weight.is_meta:
        return u, v
    found = largest_singular(layer, weight, tol=1e-3, max_iter=200)
    random: list[Any] = [t.normal_() / torch.linalg.vector_norm(t) for t in (u, v)]
    return unit(found.left[0], random[0]).to(weight.dtype), unit(found.right[0], random[1]).to(weight.dtype)
