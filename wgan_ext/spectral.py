"""Spectral normalization of a module's weight, interchangeable with ``torch.nn.utils.spectral_norm``.

Miyato et al., Spectral Normalization for Generative Adversarial Networks (arXiv:1802.05957), algorithm 1.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as _torch_function
from torch.nn.utils.spectral_norm import SpectralNorm as _TorchSpectralNorm

from . import _ops

__all__ = ["remove_spectral_norm", "spectral_norm"]

M = TypeVar("M", bound=nn.Module)


class SpectralNorm(_TorchSpectralNorm):
    """Torch's hook with the products, the quotient and their derivative in one operator each.

    What surrounds them (buffers, state dict, removal) is torch's, so that either library handles the other's modules.
    """

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        """Return W / sigma; with ``do_power_iteration`` update the buffers u and v in place."""
        name = self.name
        u = getattr(module, name + "_u")
        v = getattr(module, name + "_v")
        iterations = self.n_power_iterations if do_power_iteration else 0
        weight, new_u, new_v, _ = _ops.spectral_norm(
            getattr(module, name + "_orig"), u, v, self.dim, iterations, self.eps, True
        )
        if do_power_iteration:
            _ops.spectral_norm_store_(u, v, new_u, new_v)
        return weight


def spectral_norm(
    module: M, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> M:
    if dim is None:
        dim = 1 if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)) else 0
    hook = _TorchSpectralNorm.apply(module, name, n_power_iterations, dim, eps)
    hook.__class__ = SpectralNorm
    return module
