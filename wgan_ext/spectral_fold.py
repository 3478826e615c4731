"""Spectral normalization of a layer's output in place of its weight, for weights that are large beside their inputs.

(W / sigma) x = (W x) / sigma: W is read by the power iteration and by the layer's product, and W / sigma is not
written. The gradient g of sigma comes from the output, so that backward reads no weight either: with G the gradient of
the product by W, that by the weight is G + g u v^T, one pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _ops
from .spectral_hook import SpectralNorm, wants_formula

__all__ = ["FoldedSpectralNorm", "fold", "unfold"]


class _Folded(nn.Module):
    """A layer whose weight reads as W / divisor(sigma), and is W in its forward."""

    @property
    def weight(self) -> Tensor:
        found: Tensor | None = self.__dict__.get("weight", self._parameters.get("weight"))
        if found is None:
            for hook in self._forward_pre_hooks.values():
                if isinstance(hook, FoldedSpectralNorm):
                    return hook.compute_weight(self, False)
            raise AttributeError("weight")
        return found

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.__dict__["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        self.__dict__.pop("weight", None)


class FoldedLinear(_Folded, nn.Linear):
    """A Linear whose output is divided by sigma."""


class FoldedConv1d(_Folded, nn.Conv1d):
    """A Conv1d whose output is divided by sigma."""


class FoldedConv2d(_Folded, nn.Conv2d):
    """A Conv2d whose output is divided by sigma."""


class FoldedConv3d(_Folded, nn.Conv3d):
    """A Conv3d whose output is divided by sigma."""


class FoldedConvTranspose1d(_Folded, nn.ConvTranspose1d):
    """A ConvTranspose1d whose output is divided by sigma."""


class FoldedConvTranspose2d(_Folded, nn.ConvTranspose2d):
    """A ConvTranspose2d whose output is divided by sigma."""


class FoldedConvTranspose3d(_Folded, nn.ConvTranspose3d):
    """A ConvTranspose3d whose output is divided by sigma."""


_FOLDED = {
    folded.__mro__[2]: folded
    for folded in (
        *(FoldedLinear, FoldedConv1d, FoldedConv2d, FoldedConv3d),
        *(FoldedConvTranspose1d, FoldedConvTranspose2d, FoldedConvTranspose3d),
    )
}
_SET_ASIDE = "_spectral_norm_set_aside"


class FoldedSpectralNorm(SpectralNorm):
    """The hook before the forward: it gives the layer its weight as it is, no bias, and keeps the divisor."""

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Prepare a forward of the module; with a power iteration if it is in training mode."""
        attributes = module.__dict__
        iterations = self.n_power_iterations if module.training else 0
        weight = getattr(module, "weight_orig")  # noqa: B009  # a replica's is no parameter
        u, v = module._buffers["weight_u"], module._buffers["weight_v"]
        assert isinstance(u, Tensor)
        assert isinstance(v, Tensor)
        if wants_formula():
            attributes["weight"] = self.compute_weight(module, module.training)
            return
        weight, sigma = _ops.spectral_norm_fold_(weight, u, v, self.dim, iterations, self.eps, self.v_first)
        divisor = sigma / self.target
        divisor = divisor.clamp_min(1) if self.shrink_only else divisor
        attributes[_SET_ASIDE] = divisor, module.bias, "bias" in attributes
        attributes["weight"], attributes["bias"] = weight, None

    def finish(self, module: nn.Module, output: Tensor | None) -> Tensor | None:
        """Divide the output of a forward, and let the module's weight read as it should."""
        attributes = module.__dict__
        attributes.pop("weight", None)
        if _SET_ASIDE not in attributes:
            return output
        divisor, bias, as_attribute = attributes.pop(_SET_ASIDE)
        if as_attribute:  # as in a replica of DataParallel
            attributes["bias"] = bias
        else:
            del attributes["bias"]
        if output is None:  # the forward raised
            return None
        factor: Tensor = divisor.reciprocal()
        if bias is None:
            return output * factor
        if not isinstance(module, nn.Linear):
            bias = bias.reshape(-1, *[1] * len(module.kernel_size))  # type: ignore[arg-type]
        if output.dtype == bias.dtype == factor.dtype:
            return torch.addcmul(bias, output, factor)
        shifted: Tensor = output * factor + bias.to(output.dtype)
        return shifted


class _Finish:
    def __call__(self, module: nn.Module, inputs: Any, output: Tensor | None) -> Tensor | None:
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, FoldedSpectralNorm):
                return hook.finish(module, output)
        return output


def fold(module: nn.Module, hook: SpectralNorm) -> None:
    """Make a module that ``spectral_norm`` has normalized divide its output instead."""
    hook.__class__ = FoldedSpectralNorm
    module.__class__ = _FOLDED[type(module)]
    module.__dict__.pop("weight", None)
    module.register_forward_hook(_Finish(), always_call=True, prepend=True)


def check_folds(module: nn.Module, name: str) -> None:
    """Raise unless the module's output is linear in its weight, but for a bias."""
    if type(module) not in _FOLDED or name != "weight":
        kinds = ", ".join(kind.__name__ for kind in _FOLDED)
        raise NotImplementedError(
            f"spectral_norm: fold=True takes the weight of one of {kinds}, got {name} of {type(module).__name__}"
        )


def unfold(module: nn.Module) -> None:
    """Undo what ``fold`` changed besides the hook."""
    for plain, folded in _FOLDED.items():
        if type(module) is folded:
            module.__class__ = plain
            module.__dict__["weight"] = module.weight_orig.data
    for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, _Finish)]:
        del module._forward_hooks[key]
        module._forward_hooks_always_called.pop(key, None)
