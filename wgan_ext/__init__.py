"""Fast, exact gradient penalties, spectral normalization and Sinkhorn divergences for PyTorch."""

import torch as _torch  # loads libtorch, which the extension links to

try:
    from . import _C as _C
except ImportError as error:
    raise ImportError(
        f"wgan_ext's extension is not built for this Python and torch {_torch.__version__} ({error}): "
        "run `make build` in the checkout, or `pip install --no-build-isolation .`"
    ) from error
from ._build import BuildInfo, build_info  # first, since it refuses a build for another torch

# isort: split
from . import parametrizations
from .bounds import operator_norm_bound
from .critic import CriticPlan, LayerPlan, explain, input_gradient
from .distances import js_divergence, wasserstein_1d
from .lipschitz import LayerBound, LayerNorms, LipschitzBound, SpectralReport, lipschitz_bound, spectral_report
from .losses import clip_weights_, critic_loss, gan_critic_loss, gan_generator_loss, generator_loss
from .memory import empty_cache
from .norms import operator_norm, singular_values
from .penalty import GradientPenalty, gradient_penalty
from .samples_loss import SamplesLoss
from .sinkhorn import SinkhornResult, sinkhorn, sinkhorn_divergence, sinkhorn_matrix
from .spectral import remove_spectral_norm, spectral_norm
from .spectral_group import converge_spectral_norm_, fuse_spectral_norm_
from .transport import TransportPlan
from .wgan_gp import CriticLoss, CriticLossParts, wgan_gp_loss

__version__ = "0.1.0"
__all__ = [
    "BuildInfo",
    "CriticLoss",
    "CriticLossParts",
    "CriticPlan",
    "GradientPenalty",
    "LayerBound",
    "LayerNorms",
    "LayerPlan",
    "LipschitzBound",
    "SamplesLoss",
    "SinkhornResult",
    "SpectralReport",
    "TransportPlan",
    "build_info",
    "clip_weights_",
    "converge_spectral_norm_",
    "critic_loss",
    "empty_cache",
    "explain",
    "fuse_spectral_norm_",
    "gan_critic_loss",
    "gan_generator_loss",
    "generator_loss",
    "gradient_penalty",
    "input_gradient",
    "js_divergence",
    "lipschitz_bound",
    "operator_norm",
    "operator_norm_bound",
    "parametrizations",
    "remove_spectral_norm",
    "singular_values",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_matrix",
    "spectral_norm",
    "spectral_report",
    "wasserstein_1d",
    "wgan_gp_loss",
]
