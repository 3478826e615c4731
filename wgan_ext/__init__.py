"""Fast, exact gradient penalties, spectral normalization and Sinkhorn divergences for PyTorch."""

import torch as _torch  # loads libtorch, which the extension links to

try:
    from . import _C as _C
except ImportError as error:
    raise ImportError(
        f"wgan_ext's extension is not built for this Python and torch {_torch.__version__} ({error}): "
        "run `make build` in the checkout, or `pip install --no-build-isolation .`"
    ) from error
from ._build import BuildInfo, build_info
from .critic import CriticPlan, LayerPlan, explain, input_gradient
from .distances import js_divergence, wasserstein_1d
from .losses import clip_weights_, critic_loss, gan_critic_loss, gan_generator_loss, generator_loss
from .penalty import GradientPenalty, gradient_penalty
from .samples_loss import SamplesLoss
from .sinkhorn import SinkhornResult, sinkhorn, sinkhorn_divergence, sinkhorn_matrix
from .spectral import remove_spectral_norm, spectral_norm
from .transport import TransportPlan
from .wgan_gp import CriticLoss, CriticLossParts, wgan_gp_loss

__version__ = "0.1.0"
__all__ = [
    "BuildInfo",
    "CriticLoss",
    "CriticLossParts",
    "CriticPlan",
    "GradientPenalty",
    "LayerPlan",
    "SamplesLoss",
    "SinkhornResult",
    "TransportPlan",
    "build_info",
    "clip_weights_",
    "critic_loss",
    "explain",
    "gan_critic_loss",
    "gan_generator_loss",
    "generator_loss",
    "gradient_penalty",
    "input_gradient",
    "js_divergence",
    "remove_spectral_norm",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_matrix",
    "spectral_norm",
    "wasserstein_1d",
    "wgan_gp_loss",
]
