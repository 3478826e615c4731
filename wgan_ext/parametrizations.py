"""Spectral normalization as a parametrization, interchangeable with ``torch.nn.utils.parametrizations``."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm as _TorchSpectralNorm
from torch.nn.utils.parametrize import register_parametrization

from ._checks import accumulation_dtype
from ._distributed import refuse_sharded_weight
from .spectral_hook import PENDING, checked_options, normalized_weight, take_pending

__all__ = ["spectral_norm"]

M = TypeVar("M", bound=nn.Module)


class _SpectralNorm(_TorchSpectralNorm):
    """Torch's parametrization, with everything between the buffers and the normalized weight done by one operator."""

    v_first = False
    target = 1.0
    shrink_only = False

    @torch.no_grad()
    def _power_method(self, weight_mat: Tensor, n_power_iterations: int) -> None:
        normalized_weight(self, weight_mat, self._u, self._v, n_power_iterations, dim=0)

    def forward(self, weight: Tensor) -> Tensor:
        """Return W / divisor(sigma); in training mode, update the buffers u and v in place before."""
        if weight.dim() == 1:
            refuse_sharded_weight("spectral_norm", weight)
            wide = weight.to(accumulation_dtype(weight.dtype))
            unit = nn.functional.normalize(wide, dim=0, eps=self.eps) * self.target
            if self.shrink_only:
                unit = torch.where(torch.linalg.vector_norm(wide) <= self.target, wide, unit)
            return unit.to(weight.dtype)
        iterations = self.n_power_iterations if self.training else 0
        if not torch.compiler.is_compiling() and PENDING in self.__dict__:
            found = take_pending(self, self, "weight", weight, iterations)
            if found is not None:
                return found
        buffers: dict[str, Any] = self._buffers  # found without the detour of Module.__getattr__
        return normalized_weight(self, weight, buffers["_u"], buffers["_v"], iterations)


def spectral_norm(
    module: M,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    target: float = 1.0,
    shrink_only: bool = False,
) -> M:
    """Make ``module.weight`` a parametrized tensor: its original divided by its largest singular value.

    A drop-in for :func:`torch.nn.utils.parametrizations.spectral_norm`: the same buffers ``_u`` and ``_v``, parameter
    ``original``, state dict, first 15 iterations, order of iteration (first u, then v), training and evaluation. In
    training every read of the weight makes ``n_power_iterations``, unless ``torch.nn.utils.parametrize.cached()`` is
    active. ``torch.nn.utils.parametrize.remove_parametrizations`` removes it. Modules, parametrizations and checkpoints
    of the two libraries are interchangeable. The derivative holds u and v constant and is differentiable to any order.
    A vector is divided by its Euclidean norm and has no buffers. Complex weights are normalized by torch's operators.

    Where this differs from torch: a zero weight stays zero and leaves u and v as they were (torch: NaN, for good), as
    does a weight with a NaN in it; u and v are unit vectors however small the weight, and ``eps`` only stands in for a
    sigma of exactly 0 (for a vector, it bounds the norm from below); forward-mode derivatives work in training;
    under autocast the weight is normalized in float32; a half-precision weight is normalized in float32 and rounded
    once.

    The processes of DDP have the same u and v as long as they start with the same, which ``broadcast_buffers=True``
    sees to; without it, give all processes one seed before this call, since u and v are initially random.

    Args:
        module: the module, whose parameter or buffer is replaced; returned.
        name: the parameter or buffer; one that is parametrized already gets this parametrization on top.
        n_power_iterations: power iterations per read in training; none are made in evaluation.
        eps: the divisor where sigma is 0.
        dim: the dimension of outputs, the rows of the matrix; by default 1 for transposed convolutions, else 0.
        target: the norm that the weight gets.
        shrink_only: leave a weight whose norm is below the target as it is.

    Raises:
        ValueError: the module has no such tensor, ``n_power_iterations`` is not positive, ``eps`` is negative or not
            finite, or ``target`` is not positive and finite.
        RuntimeError: the parameter is uninitialized.
        TypeError: an argument is of another type, or the tensor is not of a floating-point or complex dtype.
        IndexError: ``dim`` is out of range.
        NotImplementedError: the weight is sharded: a DTensor, or a parameter of an FSDP module, here or in a read.
    """
    dim = checked_options(module, name, n_power_iterations, eps, dim, target, shrink_only)
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"spectral_norm: name must be a parameter or buffer of the module, got {name!r}")
    if nn.parameter.is_lazy(weight):
        raise RuntimeError(f"spectral_norm: {name} is uninitialized; run a forward of the lazy module first")
    refuse_sharded_weight("spectral_norm", weight)
    if not (weight.is_floating_point() or weight.is_complex()):
        raise TypeError(f"spectral_norm: {name} must be a floating-point or complex tensor, got {weight.dtype}")
    if not -weight.dim() <= dim < weight.dim():
        raise IndexError(f"spectral_norm: dim must be in [{-weight.dim()}, {weight.dim() - 1}], got {dim}")
    rule = _SpectralNorm(weight, n_power_iterations, dim, eps)
    rule.target, rule.shrink_only = float(target), shrink_only
    register_parametrization(module, name, rule)
    return module
