"""The plans by which the analytic engine evaluates critics: made by tracing, checked once, kept while they hold.

A plan belongs to a state of its critic, all that could change what its forward does except the values of tensors: its
modules and their classes, modes, hooks and plain attributes, the shapes of parameters, the shapes and dtypes of the
arguments, and the global and enclosing variables that forwards read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

from . import _ops, lowering
from ._distributed import wrapped_layer
from .spectral_group import group_of
from .states import frozen, outside_variables, plain_attributes, same_state, state_of, value_of
from .tracing import (
    Source,
    Step,
    Trace,
    frozen_weights,
    is_weight_hook,
    leaves,
    map_leaves,
    same_random_numbers,
    tensors_in,
    trace,
)

__all__ = ["Plan", "compute_dtype", "parameters_unchanged", "plan_for", "read_parameters"]


@dataclasses.dataclass
class Plan:
    """A trace of a critic, and the critic's modules."""

    trace: Trace
    compute_dtype: torch.dtype
    modules: dict[str, weakref.ref[nn.Module]]
    """By path; the plan keeps no critic alive."""
    variables: list[tuple[Any, str, Any]]
    """The variables outside the critic that its forwards read: namespace or cell, name, frozen value."""
    attributes: list[tuple[str, str, Any]] = dataclasses.field(default_factory=list)
    """The plain attributes of the critic's modules: path, name, value."""
    plain: list[tuple[weakref.ref[nn.Module], str]] | None = None
    """The module and name of each parameter of the trace, if all are parameters of modules: quick to read."""

    refused: bool = False
    """Whether autograd must not take the critic either."""

    def holds(self) -> bool:
        """Whether the modules are still there and the variables have their values."""
        return all(module() is not None for module in self.modules.values()) and self.variables_hold()

    def variables_hold(self) -> bool:
        """Whether the variables have their values."""
        return not self.variables or all(
            frozen(value_of(place, name)) == value for place, name, value in self.variables
        )


class _Plans:
    """The plans of one critic. One that changes its state at every call is not worth tracing each time."""

    def __init__(self) -> None:
        self.plans: dict[Any, Plan] = {}
        self.last: tuple[list[Any], Any, Plan] | None = None  # comparing is quicker than hashing
        self.made = 0
        self.found = 0
        self.refusals = 0  # in a row
        self.trust = 0  # how many calls may take the last refusal on trust
        self.refused_at: Any = None  # what those calls must have in common with it
        self.refusal: Plan | None = None

    def note(self, plan: Plan, critic: nn.Module, x: Any) -> None:
        """Remember whether the plan sends the critic to autograd."""
        if not plan.trace.obstacle or plan.refused:
            self.refusals = self.trust = 0
            return
        self.refusals += 1
        self.trust = min(2**self.refusals, _TRUST) if self.refusals > 1 and isinstance(x, Tensor) else 0
        if self.trust:
            self.refused_at, self.refusal = (critic.training, x.shape[1:], x.dtype), plan

    def trusted(self, critic: nn.Module, x: Any) -> Plan | None:
        """The plan that sent the critic to autograd time and again, if this call may go there without another look.

        Autograd is right whatever has become of the critic: a change that lets the analytic engine take it is noticed
        at most 32 calls later. For a critic that autograd takes, whose products drive Python's data out of the caches,
        a look at all of its state costs a tenth of a millisecond.
        """
        if not isinstance(x, Tensor) or self.refused_at != (critic.training, x.shape[1:], x.dtype):
            return None
        self.trust -= 1
        return self.refusal

    @property
    def exhausted(self) -> bool:
        return self.made >= 16 and self.found < 4 * self.made


_TRUST = 32
_plans: weakref.WeakKeyDictionary[nn.Module, _Plans] = weakref.WeakKeyDictionary()
_lock = threading.RLock()  # tracing hooks all modules and puts the critic's weights aside for a while


def plan_for(critic: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any], trust: bool = False) -> Plan:
    """The plan of an evaluation ``critic(x, *args, **kwargs)``, made if there is none that holds.

    Where ``trust``, it may be one that sent the critic to autograd at earlier calls (see ``_Plans.trusted``).
    """
    if not isinstance(critic, nn.Module):
        return _refusal("the critic is not an nn.Module")
    if torch.compiler.is_compiling():
        if torch_module._has_any_global_hook():  # type: ignore[no-untyped-call]
            return _refusal("a hook is registered for all modules")
        batch = tensors_in(x)[0].shape[0]
        constant = _constant_plan(critic, map_leaves(functools.partial(_like, batch=batch), (x, args, kwargs)))
        _guard(constant, critic)
        return constant
    return _plan_for(critic, x, args, kwargs, trust)


def _plan_for(critic: nn.Module, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any], trust: bool = False) -> Plan:
    with _lock:
        plans = _plans.get(critic)
        if plans is None:
            plans = _plans[critic] = _Plans()
        elif trust and plans.trust and (lately := plans.trusted(critic, x)) is not None:
            return lately
        if torch_module._has_any_global_hook():  # type: ignore[no-untyped-call]
            return _refusal("a hook is registered for all modules")
        call = _signature(x, args, kwargs), _autocast_dtype(x if isinstance(x, Tensor) else tensors_in(x)[0])
        if plans.last is not None:
            state, last_call, last = plans.last
            if last_call == call and same_state(critic, state, last.modules) and last.variables_hold():
                plans.found += 1
                if last.trace.obstacle or plans.refusals:
                    plans.note(last, critic, x)
                return last
        state = state_of(critic)
        key = (*state, call)
        try:
            plan = plans.plans.get(key)
        except TypeError as error:
            return _refusal(f"its state or arguments cannot be compared: {error}")
        if plan is not None and plan.holds():
            plans.found += 1
            plans.last = state, call, plan
            plans.note(plan, critic, x)
            return plan
        if plans.exhausted:
            return _refusal("its attributes, or the shapes of its arguments, change too often to trace it each time")
        plans.made += 1
        if len(plans.plans) >= 16:
            plans.plans.clear()
        plan = plans.plans[key] = _make(critic, x, args, kwargs)
        plans.note(plan, critic, x)
        return plan


def _guard(plan: Plan, critic: nn.Module) -> None:
    """Read, where torch.compile sees it, what the plan depends on, so that it compiles anew when that changes."""
    for path, name, value in plan.attributes:
        if getattr(critic.get_submodule(path), name) != value:
            raise RuntimeError(f"{path}.{name} changed while the critic was compiled")


def _refusal(obstacle: str) -> Plan:
    return Plan(Trace(obstacle), torch.float32, {}, [])


def _signature(x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(x, Tensor) and not args and not kwargs:
        return x.shape[1:], x.dtype, x.device
    batch = tensors_in(x)[0].shape[0]
    return tuple((path, _alike(leaf, batch)) for path, leaf in leaves((x, args, kwargs)))


def _alike(leaf: Any, batch: int) -> Any:
    """What of an argument a plan depends on."""
    if not isinstance(leaf, Tensor):
        return frozen(leaf)
    shape = ("batch", *leaf.shape[1:]) if leaf.shape[:1] == (batch,) else tuple(leaf.shape)
    return shape, leaf.dtype, leaf.device


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast, where it is on, casts x to; like autocast, this leaves float64 alone."""
    device_type = x.device.type
    known = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    on = known and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on and x.dtype != torch.float64 else None


def compute_dtype(x: Tensor) -> torch.dtype:
    """What the engine computes in: autocast's dtype or x's, and float32 for 16-bit types on a CPU."""
    dtype = _autocast_dtype(x) or x.dtype
    return torch.float32 if x.device.type == "cpu" and dtype.itemsize == 2 else dtype


# making


def _make(critic: nn.Module, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
    if wrapped := wrapped_layer(critic):
        return dataclasses.replace(_refusal(wrapped), refused=True)
    first = tensors_in(x)[0]
    batch = first.shape[0]
    variables, blame = outside_variables(critic)
    grouped = [path for path, module in critic.named_modules() if group_of(module) is not None]
    made = Trace()
    with (
        torch.inference_mode(False),
        warnings.catch_warnings(),
        same_random_numbers(first.device) as drawn,
        frozen_weights(critic) as computed,
    ):
        warnings.simplefilter("ignore")  # the true forward warns, if there is one
        before, traces = state_of(critic), []
        for n in (2, 3):
            some = map_leaves(functools.partial(_rows, batch=batch, n=n), (x, args, kwargs))
            traces.append(trace(critic, some[0], some[1], some[2], computed, lowering.HANDLERS))
        made = traces[0] if traces[0].obstacle else traces[1]
        made.grouped = grouped
        if not made.obstacle and drawn():
            made.obstacle = "its forward draws random numbers"
        if not made.obstacle and state_of(critic) != before:
            made.obstacle = "its forward changes its attributes"
        if not made.obstacle and not traces[0].same_as(traces[1]):
            made.obstacle = "its forward depends on the number of samples"
        modules = {name: weakref.ref(module) for name, module in critic.named_modules()}
        plain = _plain_parameters(made, critic, modules)
        plan = Plan(made, compute_dtype(first), modules, variables, plain_attributes(critic), plain)
        made.obstacle = made.obstacle or blame
        if not made.obstacle:
            try:
                made.obstacle = _disagreement(plan, critic, *some)
            except Exception as error:  # autograd will raise on the true batch, or can do what the engine cannot
                made.obstacle = f"the plan traced from it cannot be compared with autograd: {error}"
    return plan


def _plain_parameters(
    made: Trace, critic: nn.Module, modules: dict[str, weakref.ref[nn.Module]]
) -> list[tuple[weakref.ref[nn.Module], str]] | None:
    plain = []
    for kind, path, name in made.parameters:
        if kind != "attribute" or name not in critic.get_submodule(path)._parameters:
            return None
        plain.append((modules[path], name))
    return None if made.steps or made.hooked else plain


def _like(leaf: Any, batch: Any) -> Any:
    """What a tensor is but for its values and the number of samples; torch.compile cannot hand over tensors."""
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.dim() > 0 and leaf.shape[0] == batch:
        return "tensor", True, tuple(int(n) for n in leaf.shape[1:]), leaf.dtype, leaf.device
    return "tensor", False, tuple(int(n) for n in leaf.shape), leaf.dtype, leaf.device


def _unlike(structure: Any) -> Any:
    """A tensor that is like this, in place of each."""
    if isinstance(structure, dict):
        return {key: _unlike(value) for key, value in structure.items()}
    if not isinstance(structure, (tuple, list)):
        return structure
    if len(structure) == 5 and structure[0] == "tensor":
        _, batched, shape, dtype, device = structure
        shape = (4, *shape) if batched else shape
        return (torch.randn(shape) if dtype.is_floating_point else torch.zeros(shape)).to(device, dtype)
    values = map(_unlike, structure)
    return type(structure)(*values) if hasattr(structure, "_fields") else type(structure)(values)


def _constant_plan(critic: nn.Module, likes: Any) -> Plan:
    """The plan, where torch.compile needs it as a constant."""
    with same_random_numbers(torch.device("cpu")):
        x, args, kwargs = _unlike(likes)
    return _plan_for(critic, x, args, kwargs)


_constant_plan._dynamo_marked_constant = True  # type: ignore[attr-defined]  # assume_constant_result, without dynamo


def _rows(leaf: Any, batch: int, n: int) -> Any:
    """The first n rows of a tensor that has a batch, or as many by repeating some."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach()
    return leaf[torch.arange(n, device=leaf.device) % batch] if leaf.shape[:1] == (batch,) else leaf.clone()


def _disagreement(plan: Plan, critic: nn.Module, x: Any, args: Any, kwargs: Any) -> str:
    """Compare the plan with autograd on a few samples; returns what is wrong."""
    x = map_leaves(lambda t: t.nan_to_num(0, 0, 0), x)  # NaN agrees with nothing
    points = tensors_in(x)
    rows = points[0].shape[0]
    dtype = compute_dtype(points[0])
    with torch.enable_grad():
        copies = map_leaves(lambda t: t.clone().requires_grad_(), x)
        scores = critic(copies, *args, **kwargs).reshape(rows, -1).sum(1)
        expected = torch.autograd.grad(scores.sum(), tensors_in(copies), allow_unused=True)
    with torch.no_grad():
        parameters = read_parameters(plan, critic, args, kwargs, rows, hooks=False)
        t = plan.trace
        got_scores, got = _ops.critic(points, parameters, t.program, t.scalars, False, rows, 0, rows, dtype, False)
    pairs = [(got_scores, scores), *((g, e) for g, e in zip(got, expected, strict=True) if e is not None)]
    # rounding puts activations next to 0 on either side, and each moves the gradient a little
    narrow = (_autocast_dtype(points[0]) or points[0].dtype).itemsize == 2
    tolerance = 1e-6 if dtype == torch.float64 else 0.3 if narrow else 0.05
    for mine, theirs in pairs:
        mine, theirs = mine.double(), theirs.detach().double()
        if not (mine - theirs).norm() <= tolerance * theirs.norm() + 1e-30:
            return "the plan traced from it disagrees with autograd"
    return ""


# reading


def read_parameters(
    plan: Plan,
    critic: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch: int,
    copies: int = 1,
    hooks: bool = True,
) -> list[Tensor]:
    """The plan's parameters for one evaluation: each computed weight is computed once.

    Further arguments that have a batch are repeated for ``copies`` batches.
    """
    if plan.plain is not None and not torch.compiler.is_compiling():  # which knows no weak references
        return [module()._parameters[name] for module, name in plan.plain]  # type: ignore[union-attr, misc]
    if not torch.compiler.is_compiling():
        with _lock, _layers_together(plan, critic, hooks):  # another thread, tracing, may have put the weights aside
            return _read(plan, critic, args, kwargs, batch, copies, hooks)
    return _read(plan, critic, args, kwargs, batch, copies, hooks)


@contextlib.contextmanager
def _layers_together(plan: Plan, critic: nn.Module, hooks: bool) -> Iterator[None]:
    """What the hooks of fused spectral norms do around a forward."""
    modules = [_module(plan, critic, path) for path in plan.trace.grouped] if hooks else []
    groups = [(group, module) for module in modules if (group := group_of(module)) is not None]
    try:
        for group, module in groups:
            group.begin(module)
        yield
    finally:
        for group, module in groups:
            group.finish(module)


def _read(
    plan: Plan,
    critic: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch: int,
    copies: int,
    hooks: bool,
) -> list[Tensor]:
    t = plan.trace
    if hooks:
        for path in t.hooked:
            module = _module(plan, critic, path)
            for hook in module._forward_pre_hooks.values():
                if is_weight_hook(hook):
                    hook(module, ())
    read: dict[Source, Tensor] = {}
    slots: list[Tensor] = []

    def decode(source: Source) -> Any:
        kind, first, second = source
        if kind == "value":
            return first
        if kind == "slot":
            return slots[first]
        if kind == "list" or kind == "tuple" or kind == "slice":
            items = [decode(item) for item in first]
            return items if kind == "list" else tuple(items) if kind == "tuple" else slice(*items)
        if source not in read:
            read[source] = (
                getattr(_module(plan, critic, first), second)
                if kind == "attribute"
                else _repeated(_at(((), args, kwargs), first), batch, copies)
            )
        return read[source]

    for step in t.steps:
        result = _function(step)(*[decode(arg) for arg in step.args], **{key: decode(arg) for key, arg in step.kwargs})
        slots += tensors_in(result)
    return [decode(source) for source in t.parameters]


def parameters_unchanged(plan: Plan, critic: nn.Module, batch: int) -> list[Tensor]:
    """The parameters as the next evaluation would read them, without a graph; buffers stay as they are."""
    with _lock, torch.no_grad(), frozen_weights(critic):
        return [p.detach() for p in read_parameters(plan, critic, (), {}, batch, hooks=False)]


def _module(plan: Plan, critic: nn.Module, path: str) -> nn.Module:
    if torch.compiler.is_compiling():
        return critic.get_submodule(path)
    module = plan.modules[path]()
    assert module is not None, path  # the plan holds
    return module


def _function(step: Step) -> Any:
    if not torch.compiler.is_compiling():
        return step.function
    place: Any = torch if step.name.startswith("torch.") else lowering  # torch.compile takes no function from a list
    for name in step.name.removeprefix("torch.").split("."):
        place = getattr(place, name)
    return place


def _at(structure: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        structure = structure[key]
    return structure


def _repeated(t: Tensor, batch: int, copies: int) -> Tensor:
    return torch.cat([t] * copies) if copies > 1 and t.shape[:1] == (batch,) else t
