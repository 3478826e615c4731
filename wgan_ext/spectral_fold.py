"""Spectral normalization of a layer's output in place of its weight, for weights that are large beside their inputs.

(W / sigma) x = (W x) / sigma: W is read by the power iteration and by the layer's product, and W / sigma is not
written. The gradient g of sigma comes from the output, so that of the weight is G + g u v^T with G the gradient of the
product by W: one pass, which does not read W.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _ops
from .spectral_hook import SpectralNorm, wants_formula

__all__ = ["FoldedSpectralNorm", "check_folds", "fold", "unfold"]


class FoldedSpectralNorm(SpectralNorm):
    """The hook of a folded layer, which does nothing before its forward: the layer's class does it in its forward."""

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Leave the module as it is."""

    def find(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Return a weight and what to divide the product by; makes a power iteration in training mode."""
        if wants_formula():
            return self.compute_weight(module, module.training), None
        weight: Any = getattr(module, "weight_orig")  # noqa: B009  # mypy knows no attributes of modules
        u, v = module._buffers["weight_u"], module._buffers["weight_v"]
        iterations = self.n_power_iterations if module.training else 0
        weight, sigma = _ops.spectral_norm_fold_(weight, u, v, self.dim, iterations, self.eps, self.v_first)
        divisor: Tensor = sigma / self.target
        return weight, torch.where(sigma.abs() <= self.target, 1.0, divisor) if self.shrink_only else divisor


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    hook = hook_of(self)
    if hook is None:  # removed by torch's remove_spectral_norm
        weight, divisor = self.weight, None
    else:
        weight, divisor = hook.find(self)
    output: Tensor = self.product(x, weight, *args, **kwargs)
    bias: Tensor | None = self.bias
    if divisor is None:
        shifted: Tensor = output if bias is None else output + self.spread(bias)
        return shifted
    factor: Tensor = divisor.reciprocal()
    if bias is None:
        return output * factor
    if output.dtype == bias.dtype == factor.dtype:
        return torch.addcmul(self.spread(bias), output, factor)
    added: Tensor = self.spread(bias).to(output.dtype)
    return output * factor + added


class _Folded:
    """A layer whose weight reads as W / divisor(sigma), and whose output is divided in its forward."""

    @property
    def weight(self: Any) -> Tensor:
        found: Tensor | None = self._parameters.get("weight")
        if found is not None:
            return found
        hook = hook_of(self)
        if hook is None:
            raise AttributeError("weight")
        computed: Tensor = hook.compute_weight(self, False)
        return computed

    @weight.setter
    def weight(self: Any, value: Tensor) -> None:
        raise AttributeError("the weight is computed from weight_orig; remove_spectral_norm makes it a parameter")

    @weight.deleter
    def weight(self: Any) -> None:
        """Torch's remove_spectral_norm deletes what it takes to be an attribute."""

    forward: Any = _forward

    def spread(self: Any, bias: Tensor) -> Tensor:
        """The bias as it is added to an output."""
        return bias.reshape(-1, *[1] * len(self.kernel_size))


class _Convolution(_Folded):
    def product(self: Any, x: Tensor, weight: Tensor) -> Tensor:
        product: Tensor = self._conv_forward(x, weight, None)
        return product


class _Transposed(_Folded):
    transpose: Any

    def product(self: Any, x: Tensor, weight: Tensor, output_size: list[int] | None = None) -> Tensor:
        dims = len(self.kernel_size)
        padding = self._output_padding(x, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation)
        product: Tensor = type(self).transpose(
            x, weight, None, self.stride, self.padding, padding, self.groups, self.dilation
        )
        return product


class FoldedLinear(_Folded, nn.Linear):
    """A Linear whose output is divided by sigma."""

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The output without its bias."""
        return F.linear(x, weight)

    def spread(self, bias: Tensor) -> Tensor:
        """The bias as it is added to an output."""
        return bias


class FoldedConv1d(_Convolution, nn.Conv1d):
    """A Conv1d whose output is divided by sigma."""


class FoldedConv2d(_Convolution, nn.Conv2d):
    """A Conv2d whose output is divided by sigma."""


class FoldedConv3d(_Convolution, nn.Conv3d):
    """A Conv3d whose output is divided by sigma."""


class FoldedConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """A ConvTranspose1d whose output is divided by sigma."""

    transpose = F.conv_transpose1d


class FoldedConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """A ConvTranspose2d whose output is divided by sigma."""

    transpose = F.conv_transpose2d


class FoldedConvTranspose3d(_Transposed, nn.ConvTranspose3d):
    """A ConvTranspose3d whose output is divided by sigma."""

    transpose = F.conv_transpose3d


_FOLDED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FoldedLinear,
    nn.Conv1d: FoldedConv1d,
    nn.Conv2d: FoldedConv2d,
    nn.Conv3d: FoldedConv3d,
    nn.ConvTranspose1d: FoldedConvTranspose1d,
    nn.ConvTranspose2d: FoldedConvTranspose2d,
    nn.ConvTranspose3d: FoldedConvTranspose3d,
}


def hook_of(module: nn.Module) -> FoldedSpectralNorm | None:
    """The hook that folds, unless it was removed."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, FoldedSpectralNorm):
            return hook
    return None


def check_folds(module: nn.Module, name: str) -> None:
    """Raise unless the module's output is linear in its weight, but for a bias."""
    if type(module) not in _FOLDED or name != "weight":
        kinds = ", ".join(kind.__name__ for kind in _FOLDED)
        raise NotImplementedError(
            f"spectral_norm: fold=True takes the weight of one of {kinds}, got {name} of {type(module).__name__}"
        )


def fold(module: nn.Module, hook: SpectralNorm) -> None:
    """Make a module that ``spectral_norm`` has normalized divide its output instead."""
    hook.__class__ = FoldedSpectralNorm
    del module.__dict__["weight"]
    module.__class__ = _FOLDED[type(module)]


def unfold(module: nn.Module) -> None:
    """Undo ``fold``."""
    hook = hook_of(module)
    if hook is not None:
        hook.__class__ = SpectralNorm  # type: ignore[assignment]
        (module.__class__,) = (plain for plain, folded in _FOLDED.items() if isinstance(module, folded))
        module.__dict__["weight"] = module.weight_orig.data
