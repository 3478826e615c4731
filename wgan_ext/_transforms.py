"""Critics under torch.func (grad, vjp, jvp, vmap, ...) and forward-mode differentiation.

The operators in C++ have no rules for these: torch refuses them without naming the function that was called. And the
double backward of torch.autograd cannot be written inside of a transform, which forbids ``requires_grad_``. What can be
is ``torch.func.vjp``, which nests in every transform.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_Engine = TypeVar("_Engine", bound=str)


def transformed() -> bool:
    """Whether a transform of torch.func, or a level of forward-mode differentiation, is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_derivatives(op: str) -> None:
    """Raise NotImplementedError under a transform that differentiates; vmap is none."""
    kinds = torch._C._functorch.TransformType
    stack = torch._C._functorch.get_interpreter_stack() or []
    if forward_ad._current_level >= 0 or any(level.key() in (kinds.Grad, kinds.Jvp) for level in stack):
        raise NotImplementedError(
            f"{op}: torch.func's grad, vjp, jvp and forward-mode differentiation are not implemented; take "
            "torch.autograd.grad or backward"
        )


def engine_under_transforms(op: str, engine: _Engine) -> _Engine:
    """The engine to take for the one asked for: autograd under a transform, where the analytic one is refused."""
    if engine == "autograd" or not transformed():
        return engine
    if engine == "analytic":
        raise NotImplementedError(
            f"{op}: the analytic engine cannot be transformed by torch.func (grad, vjp, jvp, vmap, ...) or "
            'differentiated in forward mode; engine="auto" takes autograd there'
        )
    return "autograd"  # type: ignore[return-value]


def scores_and_gradients(scores_of: Callable[[Any], Tensor], x: Any, mean_outputs: bool) -> tuple[Tensor, Any]:
    """Return the scores at x and the gradients, a structure like x, of each sample's summed (or averaged) scores.

    x is a tensor, or a tuple, list or dict of tensors. What is returned can be differentiated as often as the critic,
    in reverse and forward mode, with respect to all that the scores depend on, x included.
    """
    scores, pullback = torch.func.vjp(scores_of, x)  # type: ignore[misc]  # three with has_aux
    weight = scores.shape[0] / scores.numel() if mean_outputs else 1.0
    with torch.autocast(scores.device.type, enabled=False):
        (gradients,) = pullback(torch.full_like(scores, weight))
    return scores, gradients
