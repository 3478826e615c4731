"""Spectral normalization of a module's weight, interchangeable with ``torch.nn.utils.spectral_norm``.

Miyato et al., Spectral Normalization for Generative Adversarial Networks (arXiv:1802.05957), algorithm 1.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm as _TorchSpectralNorm
from torch.nn.utils.spectral_norm import SpectralNormLoadStateDictPreHook as _TorchLoadHook
from torch.nn.utils.spectral_norm import remove_spectral_norm as _torch_remove

from . import spectral_fold
from ._checks import check_module, check_type
from ._distributed import refuse_sharded_weight
from .spectral_hook import SpectralNorm, checked_options
from .spectral_operator import normalize_operator

__all__ = ["remove_spectral_norm", "spectral_norm"]

M = TypeVar("M", bound=nn.Module)


def spectral_norm(
    module: M,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    target: float = 1.0,
    shrink_only: bool = False,
    fold: bool = False,
    kind: Literal["matrix", "operator"] = "matrix",
    input_shape: Sequence[int] | None = None,
) -> M:
    """Normalize ``module.weight`` by its largest singular value before every forward.

    A drop-in for :func:`torch.nn.utils.spectral_norm`: the same buffers ``weight_u`` and ``weight_v``, parameter
    ``weight_orig``, state dict, initial values, training and evaluation. Modules, hooks and checkpoints of the two
    libraries are interchangeable. The derivative holds u and v constant and is differentiable to any order.

    Where this differs from torch: a zero weight stays zero and leaves u and v as they were (torch: NaN, for good), as
    does a weight with a NaN in it; u and v are unit vectors however small the weight, and ``eps`` only stands in for a
    sigma of exactly 0; a module can be deep-copied after a forward; ``dim`` may be negative; under autocast the weight
    is normalized in float32; a half-precision weight is normalized in float32 and rounded once.

    Args:
        module: the module, whose parameter is replaced; returned.
        name: the parameter.
        n_power_iterations: power iterations per forward in training; none are made in evaluation.
        eps: the divisor where sigma is 0.
        dim: the dimension of outputs, the rows of the matrix; by default 1 for transposed convolutions, else 0.
        target: the norm that the weight gets.
        shrink_only: leave a weight whose norm is below the target as it is (Gouk et al., arXiv:1804.04368).
        fold: divide the output of a linear layer or convolution instead of its weight, which saves writing W / sigma in
            the forward and reading W in the backward pass: the same up to rounding, quicker where the weight is large
            beside the inputs. ``module.weight`` still reads as W / sigma, but is computed by each read. Under
            torch.func and export the weight is divided; gradient penalties take autograd's engine.
        kind: "matrix", the largest singular value of the reshaped weight, as torch; or "operator", the norm of the
            layer as a map of its inputs, as ``operator_norm``, which for convolutions is another (Gouk et al.,
            algorithm 2). The buffers ``weight_u`` and ``weight_v`` then have the shapes of an output and an input,
            start converged, and an iteration costs the layer and its adjoint on one input.
        input_shape: of kind "operator": (channels, *spatial) of the inputs of a convolution, without a batch.

    Raises:
        KeyError: the module has no such parameter.
        RuntimeError: the parameter is normalized already.
        ValueError: the parameter is None or uninitialized, ``n_power_iterations`` is not positive, ``eps`` is negative
            or not finite, or ``target`` is not positive and finite.
        TypeError: an argument is of another type.
        NotImplementedError: the weight is complex (torch would use the transpose, not the adjoint), or sharded: a
            DTensor, or a parameter of an FSDP module, here or in a forward; or ``fold`` of another module or weight.
        IndexError: ``dim`` is out of range.
    """
    given_dim, dim = dim, checked_options(module, name, n_power_iterations, eps, dim, target, shrink_only)
    if kind not in ("matrix", "operator"):
        raise ValueError(f"spectral_norm: kind must be 'matrix' or 'operator', got {kind!r}")
    check_type("spectral_norm", "fold", fold, bool, "True or False")
    if kind == "operator":
        if given_dim is not None or fold:
            raise ValueError("spectral_norm: kind='operator' has no dim, which shapes a matrix, and no fold")
        normalize_operator(module, input_shape, name, n_power_iterations, eps, target, shrink_only)
        return module
    if input_shape is not None:
        raise ValueError(f"spectral_norm: input_shape goes with kind='operator', got {tuple(input_shape)}")
    if fold:
        spectral_fold.check_folds(module, name)
    if name not in module._parameters and name + "_orig" not in module._parameters:
        raise KeyError(f"spectral_norm: name must be a parameter of the module, got {name!r}")
    weight = module._parameters.get(name)
    if weight is not None and not nn.parameter.is_lazy(weight):
        refuse_sharded_weight("spectral_norm", weight)
        if weight.is_complex():
            raise NotImplementedError(f"spectral_norm: {name} is complex; use wgan_ext.parametrizations.spectral_norm")
        if not -max(weight.dim(), 1) <= dim < max(weight.dim(), 1):
            raise IndexError(f"spectral_norm: dim must be in [{-weight.dim()}, {weight.dim() - 1}], got {dim}")
        dim %= max(weight.dim(), 1)
    hook: Any = _TorchSpectralNorm.apply(module, name, n_power_iterations, dim, eps)
    hook.__class__ = SpectralNorm
    hook._module = weakref.ref(module)
    if (target, shrink_only) != (1, False):
        hook.target, hook.shrink_only = float(target), shrink_only
    if fold:
        spectral_fold.fold(module, hook)
    return module


def remove_spectral_norm(module: M, name: str = "weight") -> M:
    """Make ``module.weight`` a parameter with the normalized value, and take the hooks and buffers away.

    As :func:`torch.nn.utils.remove_spectral_norm`, which also handles modules of this library but leaves its
    hook for state dicts behind, so that the module refuses every later checkpoint.

    Raises:
        ValueError: the parameter is not normalized.
    """
    check_module("remove_spectral_norm", "module", module)
    if name == "weight":  # the only one that is folded
        spectral_fold.unfold(module)
    _torch_remove(module, name)
    for key, hook in module._load_state_dict_pre_hooks.items():
        load_hook = getattr(hook, "hook", hook)
        if isinstance(load_hook, _TorchLoadHook) and load_hook.fn.name == name:
            del module._load_state_dict_pre_hooks[key]
            break
    return module
