"""Losses of the critic and of the generator, each one scalar to minimise, and the weight clipping of the first WGAN.

Scores are what the critic returns, of any shape; the mean is over all of them, and real and fake may differ in number.
Scores of half precision are averaged in float32 and the loss is float32. Every loss can be differentiated twice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._checks import accumulation_dtype, check_floating, check_module, check_number

__all__ = ["clip_weights_", "critic_loss", "gan_critic_loss", "gan_generator_loss", "generator_loss"]


def critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """E[D(fake)] - E[D(real)], the Wasserstein critic's loss, a 0-d tensor.

    Its negative estimates W1(real, fake) from below, up to the critic's Lipschitz constant: Kantorovich's dual
    (Arjovsky, Chintala and Bottou, Wasserstein GAN, 2017, eqs. 2 and 3). It bounds nothing by itself: add a gradient
    penalty, clip the weights or use spectral normalization.

    Raises:
        ValueError: scores are empty or on different devices.
        TypeError: scores are not floating-point tensors of one dtype.
    """
    _check_scores("critic_loss", real_scores=real_scores, fake_scores=fake_scores)
    return _mean(fake_scores) - _mean(real_scores)


def generator_loss(fake_scores: Tensor) -> Tensor:
    """-E[D(fake)], the Wasserstein generator's loss, a 0-d tensor (Wasserstein GAN, 2017, algorithm 1, line 10).

    Raises:
        ValueError: scores are empty.
        TypeError: scores are not a floating-point tensor.
    """
    _check_scores("generator_loss", fake_scores=fake_scores)
    return -_mean(fake_scores)


def gan_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """-E[log D(real)] - E[log(1 - D(fake))] with D = sigmoid(score), a 0-d tensor; scores are logits.

    At the best critic it is 2 log 2 - 2 JS(real, fake) (Goodfellow et al., Generative Adversarial Nets, 2014, eq. 1 and
    theorem 1). Neither term overflows, however large the scores.

    Raises:
        ValueError: scores are empty or on different devices.
        TypeError: scores are not floating-point tensors of one dtype.
    """
    _check_scores("gan_critic_loss", real_scores=real_scores, fake_scores=fake_scores)
    return -_mean_log_sigmoid(real_scores) - _mean_log_sigmoid(-fake_scores)


def gan_generator_loss(fake_scores: Tensor, *, saturating: bool = False) -> Tensor:
    """-E[log D(fake)] with D = sigmoid(score), a 0-d tensor; scores are logits.

    ``saturating=True`` is E[log(1 - D(fake))], the generator's side of the minimax game, whose gradient vanishes where
    the critic is sure of the fakes (Generative Adversarial Nets, 2014, eq. 1; section 3 proposes the default instead).

    Raises:
        ValueError: scores are empty.
        TypeError: scores are not a floating-point tensor.
    """
    _check_scores("gan_generator_loss", fake_scores=fake_scores)
    return _mean_log_sigmoid(-fake_scores) if saturating else -_mean_log_sigmoid(fake_scores)


@torch.no_grad()
def clip_weights_(module: nn.Module, c: float) -> None:
    """Clamp every parameter of ``module`` to [-c, c], in place (Wasserstein GAN, 2017, algorithm 1, line 7: c = 0.01).

    Biases and frozen parameters are clamped too, as in the paper; buffers (running statistics, u and v) are not weights
    and stay. Call it after the optimizer's step.

    Raises:
        ValueError: ``c`` is not positive and finite, or a weight is computed from other parameters (spectral or weight
            norm, pruning, any parametrization): clamping those would not bound the weight that the critic uses.
    """
    check_module("clip_weights_", "module", module)
    check_number("clip_weights_", "c", c)
    if not 0 < c < math.inf:
        raise ValueError(f"clip_weights_: c must be positive and finite, got {c}")
    for path, child in module.named_modules():
        computed = _computed_weight(child)
        if computed is not None:
            raise ValueError(
                f"clip_weights_: {path + '.' if path else ''}{computed} is computed from other parameters: "
                "remove its parametrization, or bound the critic by that instead of by clipping"
            )
    parameters: list[Tensor] = list(module.parameters())
    if parameters:
        torch._foreach_clamp_min_(parameters, -c)
        torch._foreach_clamp_max_(parameters, c)


def _computed_weight(module: nn.Module) -> str | None:
    """The first weight of ``module`` that is not a parameter.

    It is parametrized, or recomputed by a hook as torch's older spectral_norm, weight_norm and pruning do: weight_orig
    or weight_g is the parameter then, and weight a plain attribute.
    """
    parametrizations = getattr(module, "parametrizations", None)
    if isinstance(parametrizations, nn.ModuleDict):
        return next(iter(parametrizations.keys()))
    for name in module._parameters:
        stem, _, role = name.rpartition("_")
        if role in ("orig", "g", "v") and isinstance(getattr(module, stem, None), Tensor):
            return stem
    return None


def _check_scores(function: str, **scores: Tensor) -> None:
    check_floating(function, **scores)
    for name, tensor in scores.items():
        if tensor.numel() == 0:
            raise ValueError(f"{function}: {name} must not be empty, got shape {tuple(tensor.shape)}")


def _mean(scores: Tensor) -> Tensor:
    return scores.mean(dtype=accumulation_dtype(scores.dtype))


def _mean_log_sigmoid(scores: Tensor) -> Tensor:
    # not softplus: torch's becomes the identity above 20, an error of 2e-9 in float64
    return F.logsigmoid(scores.to(accumulation_dtype(scores.dtype))).mean()
