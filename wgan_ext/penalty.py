"""Gradient penalties: what drives the norm of a critic's input gradient towards a target."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args, overload

import torch
from torch import Tensor, nn

from ._checks import (
    accumulation_dtype,
    check_batch,
    check_count,
    check_device,
    check_floating_tensor,
    check_number,
    check_type,
)
from ._distributed import guard
from .critic import (
    Critic,
    Engine,
    Evaluation,
    Inputs,
    check_engine,
    double_backward,
    evaluation,
    map_tensors,
    tensors_of,
)

__all__ = ["GradientPenalty", "gradient_penalty"]

Points: TypeAlias = Literal["interpolates", "real", "fake", "noise"]
Reduction: TypeAlias = Literal["mean", "sum", "max", "none"]
OutputReduction: TypeAlias = Literal["sum", "mean"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "at": get_args(Points),
    "reduction": get_args(Reduction),
    "output_reduction": get_args(OutputReduction),
}
_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}


@dataclasses.dataclass(frozen=True)
class Penalty:
    """What a penalty is made of, for a function of the name ``op``; see ``gradient_penalty``."""

    op: str
    at: Points
    target: float | None
    one_sided: bool
    power: float
    p: float
    reduction: Reduction
    output_reduction: OutputReduction

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{self.op}: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        check_type(self.op, "one_sided", self.one_sided, bool, "a bool")
        target = 0 if self.target is None else self.target
        for name, number in (("target", target), ("power", self.power), ("p", self.p)):
            check_number(self.op, name, number)
        if not 0 <= target < math.inf:
            raise ValueError(f"{self.op}: target must be a finite norm, at least 0, got {target}")
        if not 1 <= self.power < math.inf:
            raise ValueError(f"{self.op}: power must be at least 1 and finite, got {self.power}")
        if not self.p >= 1:
            raise ValueError(f"{self.op}: p must be the order of a norm, from 1 to inf, got {self.p}")

    def check(self, real: Inputs | None, fake: Inputs | None) -> None:
        """Raise unless what is needed of real and fake is there, and alike."""
        if self.at != "fake":
            _check_batches(self.op, "real", real)
        if self.at == "fake" or self.at == "interpolates":
            _check_batches(self.op, "fake", fake)
        if self.at == "interpolates":
            _check_alike(self.op, real, fake)

    def check_loss(self, real: Inputs, fake: Inputs) -> None:
        """Raise unless real and fake, and the reduction, suit a critic's loss."""
        if self.reduction == "none":
            raise ValueError(f"{self.op}: reduction must be one of mean, sum, max: a loss is one number, got 'none'")
        _check_batches(self.op, "real", real)
        _check_batches(self.op, "fake", fake)
        _check_alike(self.op, real, fake, same_batch=self.at == "interpolates")
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors_of(self.op, "fake", fake)):
            raise ValueError(
                f"{self.op}: fake must not require grad: this is the critic's loss, which gives the generator no "
                "gradient; pass fake.detach(), or generate under torch.no_grad()"
            )

    @property
    def norm(self) -> float:
        """The target, or its default."""
        if self.target is None:
            return 1.0 if self.at in ("interpolates", "noise") else 0.0
        return self.target

    @property
    def mean_outputs(self) -> bool:
        """Whether a sample's outputs are averaged."""
        return self.output_reduction == "mean"

    def points(
        self, real: Inputs | None, fake: Inputs | None, mix: Tensor | None, generator: torch.Generator | None
    ) -> Any:
        """Where the gradient is taken, detached; real and fake must have been checked."""
        if generator is not None:
            check_type(self.op, "generator", generator, torch.Generator, "a torch.Generator")
        if self.at == "real" or self.at == "fake":
            return map_tensors(Tensor.detach, real if self.at == "real" else fake)
        factors = _factors(self.op, tensors_of(self.op, "real", real)[0], mix, generator)  # type: ignore[arg-type]

        def interpolate(real: Tensor, fake: Tensor) -> Tensor:
            dtype = accumulation_dtype(real.dtype)
            weight = _cast(_for_dims(factors, real.dim()), dtype)
            return _cast(torch.lerp(_cast(detached(fake), dtype), _cast(detached(real), dtype), weight), real.dtype)

        def perturb(real: Tensor) -> Tensor:
            if real.numel() == 1:
                raise ValueError(f'{self.op}: at="noise" needs the standard deviation of real, which has one element')
            dtype = accumulation_dtype(real.dtype)
            clean = _cast(detached(real), dtype)
            weight = _cast(_for_dims(factors, real.dim()), dtype)
            noise = torch.rand(real.shape, generator=generator, device=real.device, dtype=dtype)
            return _cast(clean + weight * (0.5 * clean.std()) * noise, real.dtype)

        return map_tensors(interpolate, real, fake) if self.at == "interpolates" else map_tensors(perturb, real)

    def of(self, gradients: list[Tensor], points: Inputs, mask: Inputs | None) -> tuple[Tensor, Tensor]:
        """The penalty of gradients, and the norms."""
        if mask is not None:
            gradients = _masked(self.op, gradients, points, mask)
        norms = _norms(gradients, self.p)
        excess = norms - self.norm if self.norm else norms
        if self.one_sided:
            excess = excess.relu()
        if self.power == 2:
            penalty = excess.square()
        else:
            penalty = excess.abs() if self.power == 1 else excess.abs().pow(self.power)
        return (penalty if self.reduction == "none" else _REDUCTIONS[self.reduction](penalty)), norms

    def by_engine(
        self,
        analytic: Evaluation,
        x: list[Tensor],
        points: Inputs,
        mask: Inputs | None,
        *,
        weight: float = 1.0,
        real: int = 0,
        scored: int = 0,
        first: int = 0,
        count: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, penalty, scores and norms where x holds ``real`` and other ``scored`` rows, and points from ``first``.

        Only the loss need be differentiable; without scored rows it is the weighted penalty.
        """
        if mask is None and self.p == 2 and self.reduction in ("mean", "sum"):
            total = count if self.reduction == "sum" else 1  # the operator averages
            loss, penalty, scores, norms = analytic.loss(
                x, real, scored, first, count, weight * total, self.norm, self.one_sided, self.power
            )
            return loss, penalty * total if total != 1 else penalty, scores, norms
        scores, gradients = analytic.scores_and_gradients(x, scored, first, count)
        penalty, norms = self.of(gradients, points, mask)
        loss = weight * penalty
        if scored:
            loss = scores[real:].mean() - scores[:real].mean() + loss
        return loss, penalty, scores, norms


_made: dict[tuple[Any, ...], Penalty] = {}


def penalty_of(*options: Any) -> Penalty:
    """``Penalty(*options)``, which takes a while to check its options, or the one made of them before."""
    if torch.compiler.is_compiling():
        return Penalty(*options)
    key = (*options, options[3].__class__)  # 1 equals True
    try:
        return _made[key]
    except (KeyError, TypeError):  # the latter if an option is of a type that it must not be
        made = Penalty(*options)
    if len(_made) >= 64:
        _made.clear()
    _made[key] = made
    return made


@overload
def gradient_penalty(
    critic: Critic,
    real: Inputs | None,
    fake: Inputs | None = None,
    *,
    at: Points = "interpolates",
    target: float | None = None,
    one_sided: bool = False,
    power: float = 2.0,
    p: float = 2.0,
    reduction: Reduction = "mean",
    output_reduction: OutputReduction = "sum",
    mask: Inputs | None = None,
    generator: torch.Generator | None = None,
    mix: Tensor | None = None,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    engine: Engine = "auto",
    return_norms: Literal[False] = False,
) -> Tensor: ...
@overload
def gradient_penalty(
    critic: Critic,
    real: Inputs | None,
    fake: Inputs | None = None,
    *,
    at: Points = "interpolates",
    target: float | None = None,
    one_sided: bool = False,
    power: float = 2.0,
    p: float = 2.0,
    reduction: Reduction = "mean",
    output_reduction: OutputReduction = "sum",
    mask: Inputs | None = None,
    generator: torch.Generator | None = None,
    mix: Tensor | None = None,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    engine: Engine = "auto",
    return_norms: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def gradient_penalty(
    critic: Critic,
    real: Inputs | None,
    fake: Inputs | None = None,
    *,
    at: Points = "interpolates",
    target: float | None = None,
    one_sided: bool = False,
    power: float = 2.0,
    p: float = 2.0,
    reduction: Reduction = "mean",
    output_reduction: OutputReduction = "sum",
    mask: Inputs | None = None,
    generator: torch.Generator | None = None,
    mix: Tensor | None = None,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    engine: Engine = "auto",
    return_norms: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the penalty |n - target|^power over the batch, n the norm of the critic's gradient at one point a sample.

    Unweighted: ``loss = fake_scores.mean() - real_scores.mean() + 10 * gradient_penalty(critic, real, fake)`` is
    WGAN-GP (Gulrajani et al. 2017, eq. 3). Differentiable with respect to the critic's parameters, once by the analytic
    engine (see ``input_gradient``) and as often as the critic by autograd; real and fake are detached. A gradient that
    is 0 gets the subgradient 0. NaN in the inputs is not looked for, and a piecewise-linear critic can give it a finite
    penalty: it shows in the scores (see ``input_gradient``).

    In grad mode the analytic engine computes the parameters' gradients along with the value (except for a mask, for p
    other than 2 and for the reductions "max" and "none"), so evaluate under ``no_grad`` where none is needed; a second
    backward of a retained graph computes them again.

    Args:
        critic: A map from a batch to as many scores, or maps of scores; see ``input_gradient``.
        real: [B, ...], floating point, or a tuple, list or dict of such tensors, which the critic then gets as it
            stands; the norm is over the concatenation of their gradients. Ignored at="fake", where it may be None.
        fake: As real; needed at "interpolates" and "fake", else ignored.
        at: Where the gradient is taken: "interpolates", mix * real + (1 - mix) * fake (WGAN-GP); "real" (R1, Mescheder
            et al. 2018; its weight is gamma / 2); "fake" (R2); "noise", real + mix * 0.5 * std(real) * U[0, 1) with one
            uniform number an element (DRAGAN, Kodali et al. 2017).
        target: The norm that costs nothing; None is 1 at interpolates and noise, 0 at real and fake.
        one_sided: Penalise only norms above the target (WGAN-LP, Petzka et al. 2018).
        power: At least 1; 6 with target=0 is WGAN-div (Wu et al. 2018).
        p: The order of the norm, from 1 to inf. A critic that is 1-Lipschitz in the s-norm has gradients of norm at
            most 1 for p = s / (s - 1) (Banach WGAN, Adler and Lunz 2018).
        reduction: Of the samples' penalties: "mean", "sum", "max" (ties share the gradient) or "none", which gives [B].
        output_reduction: How several outputs of a sample, as of a patch critic, become its score: "sum" or "mean".
        mask: Broadcastable to real, any dtype: the gradient is multiplied by it before the norm, so that elements of
            the input where it is 0 are not constrained. For several inputs, a structure like real.
        generator: Source of mix and noise, on the device of the inputs; None is torch's own.
        mix: The mixing factors, [B, 1, ..., 1] or [B]; None draws one from U[0, 1) for each sample, in float32.
        critic_args: Further positional arguments of the critic (labels, conditions); tensors keep their rows.
        critic_kwargs: Further named arguments of the critic; the same.
        engine: "auto", "analytic" (raises where it cannot) or "autograd"; ``explain`` tells which "auto" takes.
        return_norms: Return also the norms, [B], detached.

    Returns:
        A scalar, or [B] for reduction="none"; float64 for float64 inputs, else float32.

    Raises:
        TypeError, ValueError: an argument is not as above; the critic loses the batch or ignores its input.
        NotImplementedError: see ``input_gradient``; a generator, or the autograd engine, under torch.compile.
        RuntimeError: from ``backward``, which leaves gradients of a critic in DDP unsynchronised.
    """
    kind = penalty_of("gradient_penalty", at, target, one_sided, power, p, reduction, output_reduction)
    kind.check(real, fake)
    points = kind.points(real, fake, mix, generator)
    analytic = evaluation(kind.op, critic, points, critic_args, critic_kwargs, engine, mean_outputs=kind.mean_outputs)
    if analytic is None:
        gradients = double_backward(kind.op, critic, points, critic_args, critic_kwargs or {}, kind.mean_outputs)[1]
        penalty, norms = kind.of(gradients, points, mask)
    else:
        x = tensors_of(kind.op, "points", points)
        penalty, _, _, norms = kind.by_engine(analytic, x, points, mask, count=x[0].shape[0])
    penalty = guard(kind.op, critic, penalty)
    return (penalty, norms.detach()) if return_norms else penalty


class GradientPenalty(nn.Module):
    """``gradient_penalty`` with its options set once; on demand only at each k-th call (lazy regularisation).

    With ``every=k`` the first call and each k-th one after it return k times the penalty, the others a zero without
    gradient (and, for ``return_norms``, no norms: shape [0]). Karras et al. 2020 (StyleGAN2, appendix B), who take the
    penalty in a further step of the optimizer, then scale Adam's learning rate by c = k / (k + 1) and raise its betas
    to the power c; as a term of the critic's loss it wants no such correction. The count is kept in ``state_dict``.
    """

    def __init__(
        self,
        *,
        at: Points = "interpolates",
        target: float | None = None,
        one_sided: bool = False,
        power: float = 2.0,
        p: float = 2.0,
        reduction: Reduction = "mean",
        output_reduction: OutputReduction = "sum",
        engine: Engine = "auto",
        return_norms: bool = False,
        every: int = 1,
    ) -> None:
        super().__init__()
        Penalty("GradientPenalty", at, target, one_sided, power, p, reduction, output_reduction)
        check_engine("GradientPenalty", engine)
        check_count("GradientPenalty", "every", every)
        self.options: dict[str, Any] = {
            "at": at,
            "target": target,
            "one_sided": one_sided,
            "power": power,
            "p": p,
            "reduction": reduction,
            "output_reduction": output_reduction,
            "engine": engine,
            "return_norms": return_norms,
        }
        self.every = every
        self.calls = 0

    def forward(
        self,
        critic: Critic,
        real: Inputs | None,
        fake: Inputs | None = None,
        *,
        mask: Inputs | None = None,
        generator: torch.Generator | None = None,
        mix: Tensor | None = None,
        critic_args: Sequence[Any] = (),
        critic_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the penalty, and the norms if return_norms, as ``gradient_penalty`` does."""
        due = self.calls % self.every == 0
        self.calls += 1
        if not due:
            name, x = ("fake", fake) if self.options["at"] == "fake" else ("real", real)
            _check_batches("gradient_penalty", name, x)
            return self._nothing(tensors_of("gradient_penalty", name, x)[0])  # type: ignore[arg-type]
        result: Tensor | tuple[Tensor, Tensor] = gradient_penalty(
            critic,
            real,
            fake,
            mask=mask,
            generator=generator,
            mix=mix,
            critic_args=critic_args,
            critic_kwargs=critic_kwargs,
            **self.options,
        )
        if self.every == 1:
            return result
        return (self.every * result[0], result[1]) if isinstance(result, tuple) else self.every * result

    def _nothing(self, first: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(first.dtype)
        shape = (first.shape[0],) if self.options["reduction"] == "none" else ()
        penalty = torch.zeros(shape, dtype=dtype, device=first.device)
        return (penalty, penalty.new_zeros(0)) if self.options["return_norms"] else penalty

    def get_extra_state(self) -> dict[str, int]:
        """Return what state_dict keeps: the number of calls."""
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Take what state_dict kept."""
        self.calls = state["calls"]

    def extra_repr(self) -> str:
        """Name the options."""
        return ", ".join(f"{name}={value!r}" for name, value in {**self.options, "every": self.every}.items())


def _norms(gradients: list[Tensor], p: float) -> Tensor:
    """The p-norm of each sample's gradients, [B], accumulated in float32 or better."""
    if len(gradients) == 1:
        gradient = gradients[0]
    else:
        gradient = torch.cat([g.flatten(1) if g.dim() > 1 else g[:, None] for g in gradients], dim=1)
    gradient = gradient.to(accumulation_dtype(gradient.dtype))
    if gradient.dim() == 1:
        return gradient.abs()
    if gradient.is_contiguous():
        gradient = gradient.flatten(1)  # one dimension is quicker than several
    norms: Tensor = torch.linalg.vector_norm(gradient, p, dim=tuple(range(1, gradient.dim())))
    return norms


def _masked(op: str, gradients: list[Tensor], points: Inputs, mask: Inputs) -> list[Tensor]:
    pairs = _pairs(op, points, "mask", mask)
    for x, m in pairs:
        check_type(op, "mask", m, Tensor, "a tensor")
        check_device(op, "mask", m, "real", x)
        if m.dim() > x.dim() or any(n not in (1, size) for n, size in zip(m.shape[::-1], x.shape[::-1], strict=False)):
            raise ValueError(
                f"{op}: mask must be broadcastable to the shape of real {tuple(x.shape)}, got {tuple(m.shape)}"
            )
    return [g * m.detach().to(accumulation_dtype(g.dtype)) for g, (_, m) in zip(gradients, pairs, strict=True)]


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)  # which takes a microsecond to find nothing to do


def _check_batches(op: str, name: str, x: Inputs | None) -> None:
    """Raise unless x is a batch, or several of one size."""
    if isinstance(x, Tensor):
        return check_batch(op, name, x)
    if x is None:
        raise ValueError(f"{op}: {name} is needed, got None")
    tensors = tensors_of(op, name, x)
    if not tensors:
        raise ValueError(f"{op}: {name} must hold at least one tensor, got an empty {type(x).__name__}")
    for t in tensors:
        check_batch(op, name, t)
        if t.shape[0] != tensors[0].shape[0]:
            raise ValueError(
                f"{op}: the tensors of {name} must have one batch size, got {tensors[0].shape[0]} and {t.shape[0]}"
            )
    return None


def _check_alike(op: str, real: Any, fake: Any, *, same_batch: bool = True) -> None:
    """Raise unless fake is what real is, but for its values and perhaps its number of samples."""
    for r, f in _pairs(op, real, "fake", fake):
        if (r.shape != f.shape) if same_batch else (r.shape[1:] != f.shape[1:]):
            raise ValueError(f"{op}: fake must have the shape of real {tuple(r.shape)}, got {tuple(f.shape)}")
        if r.dtype != f.dtype:
            raise TypeError(f"{op}: fake must have the dtype of real ({r.dtype}), got {f.dtype}")
        check_device(op, "fake", f, "real", r)


def _pairs(op: str, real: Inputs, name: str, other: Inputs) -> list[tuple[Tensor, Tensor]]:
    """The tensors of real, each beside that of other; raises unless they are structured alike."""
    if isinstance(real, Tensor) and isinstance(other, Tensor):
        return [(real, other)]
    reals, others = tensors_of(op, "real", real), tensors_of(op, name, other)
    if type(real) is not type(other):
        raise TypeError(
            f"{op}: {name} must have the structure of real ({type(real).__name__}), got {type(other).__name__}"
        )
    if isinstance(real, Mapping) and isinstance(other, Mapping):
        if real.keys() != other.keys():
            raise ValueError(f"{op}: {name} must have the keys of real ({list(real)}), got {list(other)}")
        others = [other[key] for key in real]
    if len(reals) != len(others):
        raise ValueError(f"{op}: {name} must hold as many tensors as real ({len(reals)}), got {len(others)}")
    return list(zip(reals, others, strict=True))


def detached(t: Tensor) -> Tensor:
    """The tensor without its graph, if it has one."""
    return t.detach() if t.requires_grad else t


def _for_dims(factors: Tensor, dims: int) -> Tensor:
    """One factor for each sample, as many dimensions."""
    return factors if factors.dim() == dims else factors.view(-1, *[1] * (dims - 1))


def _factors(op: str, first: Tensor, mix: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """One mixing factor for each sample, [B, 1, ..., 1] or [B]."""
    batch = first.shape[0]
    if mix is None:
        if generator is not None and torch.compiler.is_compiling():
            raise NotImplementedError(f"{op}: torch.compile cannot draw from a generator; draw mix outside and pass it")
        return torch.rand(batch, generator=generator, device=first.device)
    check_floating_tensor(op, "mix", mix)
    if mix.dim() == 0 or mix.shape[0] != batch or mix.numel() != batch:
        raise ValueError(f"{op}: mix must have shape [B, 1, ..., 1] with B = {batch}, got {tuple(mix.shape)}")
    check_device(op, "mix", mix, "real", first)
    return detached(mix)
