"""The whole loss of a critic with a gradient penalty, in one evaluation of the critic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from ._checks import accumulation_dtype, check_module, check_number
from ._distributed import guard
from .critic import (
    Critic,
    Engine,
    Inputs,
    called,
    check_engine,
    check_scores,
    double_backward,
    evaluation,
    map_tensors,
    tensors_of,
)
from .penalty import OutputReduction, Penalty, Points, detached, penalty_of
from .tracing import tensors_in

__all__ = ["CriticLoss", "CriticLossParts", "wgan_gp_loss"]


class CriticLossParts(NamedTuple):
    """A critic's loss and what it is made of; only the loss can be differentiated."""

    loss: Tensor
    penalty: Tensor
    """Unweighted, a scalar."""
    real_scores: Tensor
    """[B], each sample's score."""
    fake_scores: Tensor
    norms: Tensor
    """Of the critic's gradient at the penalised points, [B]."""


@overload
def wgan_gp_loss(
    critic: Critic,
    real: Inputs,
    fake: Inputs,
    weight: float = 10.0,
    *,
    at: Points = "interpolates",
    target: float | None = None,
    one_sided: bool = False,
    power: float = 2.0,
    p: float = 2.0,
    reduction: Literal["mean", "sum", "max"] = "mean",
    output_reduction: OutputReduction = "sum",
    mask: Inputs | None = None,
    generator: torch.Generator | None = None,
    mix: Tensor | None = None,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    engine: Engine = "auto",
    return_parts: Literal[False] = False,
) -> Tensor: ...
@overload
def wgan_gp_loss(
    critic: Critic,
    real: Inputs,
    fake: Inputs,
    weight: float = 10.0,
    *,
    at: Points = "interpolates",
    target: float | None = None,
    one_sided: bool = False,
    power: float = 2.0,
    p: float = 2.0,
    reduction: Literal["mean", "sum", "max"] = "mean",
    output_reduction: OutputReduction = "sum",
    mask: Inputs | None = None,
    generator: torch.Generator | None = None,
    mix: Tensor | None = None,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    engine: Engine = "auto",
    return_parts: Literal[True],
) -> CriticLossParts: ...
def wgan_gp_loss(
    critic: Critic,
    real: Inputs,
    fake: Inputs,
    weight: float = 10.0,
    *,
    at: Points = "interpolates",
    target: float | None = None,
    one_sided: bool = False,
    power: float = 2.0,
    p: float = 2.0,
    reduction: Literal["mean", "sum", "max"] = "mean",
    output_reduction: OutputReduction = "sum",
    mask: Inputs | None = None,
    generator: torch.Generator | None = None,
    mix: Tensor | None = None,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    engine: Engine = "auto",
    return_parts: bool = False,
) -> Tensor | CriticLossParts:
    """Return mean D(fake) - mean D(real) + weight * penalty, WGAN-GP's critic loss (Gulrajani et al. 2017, eq. 3).

    The same as ``critic_loss(critic(real), critic(fake)) + weight * gradient_penalty(critic, real, fake)``, but all
    rows share one evaluation of the critic: one batch for every matrix product, one autograd node, and one power
    iteration of spectral norm where separate calls make three. Differentiable once with respect to the critic's
    parameters. Critics that the analytic engine cannot take (see ``explain``) are evaluated by autograd, real, fake and
    points apart, as everybody writes it.

    In grad mode the analytic engine computes the parameters' gradients along with the value (except for a mask, for p
    other than 2 and for the reduction "max"), so evaluate under ``no_grad`` where none is needed; a second backward of
    a retained graph computes them again.

    Args:
        critic: A map from a batch to as many scores, or maps of scores; see ``input_gradient``.
        real: [B, ...], floating point, or a tuple, list or dict of such tensors.
        fake: As real, and detached: the generator's step has a loss of its own, ``generator_loss``. The number of
            samples may differ from that of real where they are not interpolated.
        weight: Of the penalty: 10 for WGAN-GP on images, 0.1 on toy data, gamma / 2 for R1 and R2.
        at: See ``gradient_penalty``, as all that follows.
        target: The norm that costs nothing.
        one_sided: Penalise only larger norms.
        power: Of the excess.
        p: The order of the norm.
        reduction: Of the penalties of the samples: "mean", "sum" or "max". Scores are averaged.
        output_reduction: How several outputs of a sample become its score.
        mask: Multiplies the gradient.
        generator: Source of mix and noise.
        mix: The mixing factors.
        critic_args: Further positional arguments of the critic, the same for real, fake and points. Tensors whose first
            dimension is B are taken to be one row a sample.
        critic_kwargs: Further named arguments of the critic; the same.
        engine: "auto", "analytic" (raises where it cannot) or "autograd".
        return_parts: Return also the penalty, the scores and the norms, detached.

    Returns:
        A scalar; float64 for float64 inputs, else float32.

    Raises:
        TypeError, ValueError: an argument is not as above; the critic loses the batch or ignores its input; fake
            requires grad.
        NotImplementedError: see ``gradient_penalty``.
        RuntimeError: from ``backward``, which leaves gradients of a critic in DDP unsynchronised.
    """
    kind = penalty_of("wgan_gp_loss", at, target, one_sided, power, p, reduction, output_reduction)
    check_weight(kind.op, weight)
    kind.check_loss(real, fake)
    points = kind.points(real, fake, mix, generator)
    rows = _Rows(kind, real, fake, points)
    if rows.real != rows.fake and any(t.shape[:1] == (rows.real,) for t in tensors_in((critic_args, critic_kwargs))):
        raise ValueError(
            f"{kind.op}: fake must have as many samples as real ({rows.real}), got {rows.fake}: critic_args and "
            "critic_kwargs hold one row a sample, the same for both"
        )
    analytic = evaluation(
        kind.op,
        critic,
        real,
        critic_args,
        critic_kwargs,
        engine,
        mean_outputs=kind.mean_outputs,
        copies=rows.total // rows.real,
    )
    if analytic is None:
        loss, penalty, real_scores, fake_scores, norms = _by_autograd(
            kind, critic, real, fake, rows, points, weight, mask, critic_args, critic_kwargs or {}
        )
    else:
        loss, penalty, scores, norms = kind.by_engine(
            analytic,
            rows.stacked(),
            points,
            mask,
            weight=weight,
            real=rows.real,
            scored=rows.scored,
            first=rows.first,
            count=rows.count,
        )
    loss = guard(kind.op, critic, loss)
    if not return_parts:
        return loss
    if analytic is not None:
        real_scores, fake_scores = scores[: rows.real], scores[rows.real :]
    return CriticLossParts(loss, *(t.detach() for t in (penalty, real_scores, fake_scores, norms)))


def check_weight(op: str, weight: float) -> None:
    """Raise unless the weight is a finite number, at least 0."""
    check_number(op, "weight", weight)
    if not 0 <= weight < math.inf:
        raise ValueError(f"{op}: weight must be at least 0 and finite, got {weight}")


class _Rows:
    """Real, fake and points below each other: what is scored and where the gradient is taken."""

    def __init__(self, kind: Penalty, real: Inputs, fake: Inputs, points: Inputs) -> None:
        self.batches = [tensors_of(kind.op, name, x) for name, x in (("real", real), ("fake", fake))]
        self.real, self.fake = (batch[0].shape[0] for batch in self.batches)
        self.scored = self.real + self.fake
        if kind.at == "real" or kind.at == "fake":  # points are among the scored rows
            self.first, self.count = (0, self.real) if kind.at == "real" else (self.real, self.fake)
        else:
            self.batches.append(tensors_of(kind.op, "points", points))
            self.first, self.count = self.scored, self.real
        self.total = max(self.scored, self.first + self.count)

    def stacked(self) -> list[Tensor]:
        """Each input of the critic, all rows."""
        return [torch.cat([detached(t) for t in tensors]) for tensors in zip(*self.batches, strict=True)]


def _by_autograd(
    kind: Penalty,
    critic: Critic,
    real: Inputs,
    fake: Inputs,
    rows: _Rows,
    points: Inputs,
    weight: float,
    mask: Inputs | None,
    critic_args: Sequence[Any],
    critic_kwargs: Mapping[str, Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # loss, penalty, scores of real, of fake, and norms; each batch on its own, since a critic that cannot be traced may
    # couple samples

    def scores_of(outputs: Any, batch: int) -> Tensor:
        check_scores(kind.op, outputs, batch, of_input=False)  # which double_backward sees
        flat: Tensor = outputs.reshape(batch, -1).to(accumulation_dtype(outputs.dtype))
        return flat.mean(1) if kind.mean_outputs else flat.sum(1)

    def evaluated(x: Inputs, batch: int) -> Tensor:
        return scores_of(called(kind.op, critic, map_tensors(Tensor.detach, x), critic_args, critic_kwargs), batch)

    def at_points() -> Tensor:
        outputs, gradients[:] = double_backward(kind.op, critic, points, critic_args, critic_kwargs, kind.mean_outputs)
        return scores_of(outputs, rows.count)

    gradients: list[Tensor] = []
    real_scores = at_points() if kind.at == "real" else evaluated(real, rows.real)
    fake_scores = at_points() if kind.at == "fake" else evaluated(fake, rows.fake)
    if not gradients:
        at_points()
    penalty, norms = kind.of(gradients, points, mask)
    loss = fake_scores.mean() - real_scores.mean() + weight * penalty
    return loss, penalty, real_scores, fake_scores, norms


class CriticLoss(nn.Module):
    """``wgan_gp_loss`` with its critic and options set once: the module to wrap in DDP or FSDP2.

    Its forward takes real and fake and returns the loss, so that ``DDP(CriticLoss(critic))`` synchronises the gradients
    of all of it. ``weight`` and the other options are attributes, and may be changed.
    """

    def __init__(
        self,
        critic: nn.Module,
        weight: float = 10.0,
        *,
        at: Points = "interpolates",
        target: float | None = None,
        one_sided: bool = False,
        power: float = 2.0,
        p: float = 2.0,
        reduction: Literal["mean", "sum", "max"] = "mean",
        output_reduction: OutputReduction = "sum",
        engine: Engine = "auto",
        return_parts: bool = False,
    ) -> None:
        super().__init__()
        kind = Penalty("CriticLoss", at, target, one_sided, power, p, reduction, output_reduction)
        check_weight(kind.op, weight)
        check_engine(kind.op, engine)
        check_module(kind.op, "critic", critic)
        self.critic = critic
        self.weight = weight
        self.options: dict[str, Any] = {
            "at": at,
            "target": target,
            "one_sided": one_sided,
            "power": power,
            "p": p,
            "reduction": reduction,
            "output_reduction": output_reduction,
            "engine": engine,
            "return_parts": return_parts,
        }

    def forward(
        self,
        real: Inputs,
        fake: Inputs,
        *,
        mask: Inputs | None = None,
        generator: torch.Generator | None = None,
        mix: Tensor | None = None,
        critic_args: Sequence[Any] = (),
        critic_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor | CriticLossParts:
        """Return the loss, or the parts if return_parts, as ``wgan_gp_loss`` does."""
        result: Tensor | CriticLossParts = wgan_gp_loss(
            self.critic,
            real,
            fake,
            self.weight,
            mask=mask,
            generator=generator,
            mix=mix,
            critic_args=critic_args,
            critic_kwargs=critic_kwargs,
            **self.options,
        )
        return result

    def extra_repr(self) -> str:
        """Name the options."""
        return ", ".join(f"{name}={value!r}" for name, value in {"weight": self.weight, **self.options}.items())
