"""Spectral normalization of all layers of a model in one call of the kernels."""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as _TorchParametrization
from torch.nn.utils.spectral_norm import SpectralNorm as _TorchHook

from . import _ops, parametrizations
from ._checks import check_count, check_module, check_number
from ._distributed import refuse_sharded_weight
from .spectral_hook import (
    PENDING,
    Pending,
    Rule,
    SpectralNorm,
    hooks_of_saved_tensors,
    version_of,
    wants_formula,
)

__all__ = ["SpectralNormGroup", "converge_spectral_norm_", "fuse_spectral_norm_"]


class _Layer(NamedTuple):
    """A normalized weight: how it is normalized, the module that keeps its vectors, and where the weight is."""

    rule: Rule
    owner: nn.Module
    name: str  # of the weight, under which the owner keeps what was found for it
    u: str
    v: str
    weights: nn.Module
    weight: str
    installed: Callable[[], bool]  # whether the rule is still in force


def _layers(model: nn.Module) -> Iterator[_Layer]:
    for module in model.modules():
        for key, hook in module._forward_pre_hooks.items():
            if type(hook) is SpectralNorm:
                name = hook.name
                still = functools.partial(_has_hook, module, key, hook)
                yield _Layer(hook, module, name, name + "_u", name + "_v", module, name + "_orig", still)
        if parametrize.is_parametrized(module):
            for name, chain in module.parametrizations.items():  # type: ignore[union-attr, operator]
                rule = chain[0]  # the others are given what this one returns
                if type(rule) is parametrizations._SpectralNorm and "_u" in rule._buffers:
                    still = functools.partial(_has_chain, module, name, chain)
                    yield _Layer(rule, rule, "weight", "_u", "_v", chain, "original", still)


def _has_hook(module: nn.Module, key: int, hook: object) -> bool:
    return module._forward_pre_hooks.get(key) is hook


def _has_chain(module: nn.Module, name: str, chain: object) -> bool:
    parametrized = module._modules.get("parametrizations")
    return parametrized is not None and parametrized._modules.get(name) is chain


class SpectralNormGroup:
    """The hooks of a model whose layers are normalized together; see ``fuse_spectral_norm_``."""

    _found: tuple[weakref.ref[nn.Module], list[_Layer]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> SpectralNormGroup:
        memo[id(self)] = copied = SpectralNormGroup()  # once, for both hooks
        return copied

    def _layers(self, model: nn.Module) -> list[_Layer]:
        """The model's normalized weights; replicas of a model share its hooks."""
        found = self._found
        if found is None or found[0]() is not model or not all(layer.installed() for layer in found[1]):
            found = self._found = weakref.ref(model), list(_layers(model))
        return found[1]

    def begin(self, model: nn.Module) -> None:
        """Find the normalized weight of each layer, as it would by itself, for its first use in this forward."""
        if torch.compiler.is_compiling() or wants_formula():
            return
        layers = self._layers(model)
        if any(PENDING in layer.owner.__dict__ for layer in layers):  # the model's forward calls the model
            self.finish(model)
        by_device: dict[torch.device, _Group] = {}
        for layer in layers:
            weight = layer.weights._parameters.get(layer.weight)
            u, v = layer.owner._buffers.get(layer.u), layer.owner._buffers.get(layer.v)
            if weight is None or u is None or v is None or weight.is_complex():
                continue  # a replica's attributes, or for torch's operators
            if type(weight) is not nn.Parameter:
                refuse_sharded_weight("spectral_norm", weight)
            by_device.setdefault(weight.device, []).append((layer, weight, u, v))
        for group in by_device.values():
            _find(group)

    def finish(self, model: nn.Module) -> None:
        """Store the vectors of the layers that were used, and forget what was found for the others."""
        if torch.compiler.is_compiling():
            return
        buffers: list[Tensor] = []
        values: list[Tensor] = []
        for layer in self._layers(model):
            for name, pending in layer.owner.__dict__.pop(PENDING, {}).items():
                if pending.taken and pending.iterations:
                    buffers += (pending.old_u, pending.old_v)
                    values += (pending.u, pending.v)
                elif not pending.taken and layer.owner.__dict__.get(name) is pending.normalized:
                    # unlike the last time, it was not used
                    hook: Any = layer.rule
                    layer.owner.__dict__[name] = hook.compute_weight(layer.owner, False)
        if buffers:
            with torch.no_grad():
                torch._foreach_copy_(buffers, values)


_Group: TypeAlias = list[tuple[_Layer, nn.Parameter, Tensor, Tensor]]


def _find(group: _Group) -> None:
    layers, weights, us, vs = map(list, zip(*group, strict=True))
    rules = [layer.rule for layer in layers]
    iterations = [layer.rule.n_power_iterations if layer.owner.training else 0 for layer in layers]
    replaced = set()
    for i, layer in enumerate(layers):
        attributes = layer.owner.__dict__
        last = attributes.get(layer.name)
        if last is not None and last.requires_grad and layer.owner.training:
            attributes[layer.name] = last = weights[i].data  # its memory, still in cache, can serve the next
            replaced.add(i)
    normalized, new_us, new_vs, _ = _ops.spectral_norm_group(
        weights,
        us,
        vs,
        [rule.dim for rule in rules],
        iterations,
        [rule.eps for rule in rules],
        [rule.v_first for rule in rules],
        [rule.target for rule in rules],
        [rule.shrink_only for rule in rules],
    )
    saving = hooks_of_saved_tensors()
    for i, (layer, weight, u, v) in enumerate(group):
        attributes = layer.owner.__dict__
        pending = Pending(
            normalized[i],
            new_us[i],
            new_vs[i],
            layer.rule,
            weight,
            version_of(weight),
            u,
            v,
            iterations[i],
            saving,
        )
        if PENDING in attributes:
            attributes[PENDING][layer.name] = pending
        else:
            attributes[PENDING] = {layer.name: pending}
        if i in replaced:
            attributes[layer.name] = normalized[i]


class _Begin:
    def __init__(self, group: SpectralNormGroup) -> None:
        self.group = group

    def __call__(self, model: nn.Module, inputs: Any) -> None:
        self.group.begin(model)


class _Finish:
    def __init__(self, group: SpectralNormGroup) -> None:
        self.group = group

    def __call__(self, model: nn.Module, inputs: Any, output: Any) -> None:
        self.group.finish(model)


def group_of(model: nn.Module) -> SpectralNormGroup | None:
    """The group of a model's layers, if it was fused."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, _Begin):
            return hook.group
    return None


def is_group_hook(hook: object) -> bool:
    """Whether a forward hook or pre-hook is a group's."""
    return isinstance(hook, (_Begin, _Finish))


def _take_over(model: nn.Module) -> None:
    """Make torch's hooks and parametrizations ours."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if type(hook) is _TorchHook:
                hook.__class__ = SpectralNorm
        if type(module) is _TorchParametrization:
            module.__class__ = parametrizations._SpectralNorm


def fuse_spectral_norm_(model: nn.Module) -> int:
    """Normalize all layers of a built model together, in one call of the kernels in each of its forwards.

    The layers keep their parameters, buffers and state dicts, and compute what they computed before: those of
    ``torch.nn.utils.spectral_norm`` and ``torch.nn.utils.parametrizations.spectral_norm`` become ours. On CUDA a
    forward with one iteration is three launches for up to 20 layers, on a CPU the threads share the layers out.

    A call of ``model`` finds each layer's normalized weight, and the layer's first use in it takes that. Each layer
    counts as many iterations as it would without this function: one that is used again in the same call, that is used
    by itself (outside of a call of ``model``), whose weight or mode changes within the call, or under torch.compile,
    torch.func, export and forward-mode differentiation, normalizes alone; one that is not used in a call keeps its
    vectors u and v as they were. The vectors of a call are stored in the buffers at its end.

    Layers normalized by someone's subclass, complex ones, vectors under a parametrization and a spectral norm on top of
    another parametrization stay as they are. Layers added later are seen after another call of this function.

    Args:
        model: the module whose forward runs the layers; changed in place.

    Returns:
        The number of layers that are normalized together.

    Raises:
        TypeError: ``model`` is no module.
        NotImplementedError: a weight is sharded: a DTensor, or a parameter of an FSDP module.
    """
    check_module("fuse_spectral_norm_", "model", model)
    _take_over(model)
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if is_group_hook(hook)]:  # fused before, as a part or whole
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
    layers = list(_layers(model))
    for layer in layers:
        weight = layer.weights._parameters[layer.weight]
        assert weight is not None
        refuse_sharded_weight("fuse_spectral_norm_", weight)
    if layers:
        group = SpectralNormGroup()
        model.register_forward_pre_hook(_Begin(group), prepend=True)
        model.register_forward_hook(_Finish(group), always_call=True)
    return len(layers)


_ITERATIONS = 10  # between two looks at sigma


def converge_spectral_norm_(model: nn.Module, tol: float = 1e-5, max_iter: int = 1000) -> dict[str, float]:
    """Iterate the vectors u and v of a model's normalized layers until sigma stands still.

    In training one iteration a forward suffices, since weights change slowly; after loading weights without vectors, or
    before evaluation and export, sigma may be well below the largest singular value. This brings each layer of
    ``spectral_norm`` (kind "matrix") and ``parametrizations.spectral_norm``, torch's too, to where 10 iterations change
    sigma by at most ``tol`` of it, which does not bound its distance from the singular value: ``operator_norm`` does.

    Args:
        model: the module; its buffers are changed in place.
        tol: the relative change of sigma, at least 0.
        max_iter: iterations of a layer at most. Reached, it warns with the names of the weights.

    Returns:
        Sigma by the name of the weight's parameter.

    Raises:
        TypeError: an argument is of another type.
        ValueError: ``tol`` is negative or not finite, or ``max_iter`` is not positive.
    """
    function = "converge_spectral_norm_"
    check_module(function, "model", model)
    check_number(function, "tol", tol)
    if not 0 <= tol < math.inf:
        raise ValueError(f"{function}: tol must be finite and not negative, got {tol}")
    check_count(function, "max_iter", max_iter)
    _take_over(model)
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    sigmas: dict[str, float] = {}
    unfinished = []
    for layer in _layers(model):
        weight = layer.weights._parameters[layer.weight]
        u, v = layer.owner._buffers[layer.u], layer.owner._buffers[layer.v]
        assert weight is not None
        assert u is not None
        assert v is not None
        name = names[id(weight)]
        if weight.is_complex():
            continue
        refuse_sharded_weight(function, weight)
        before, sigma, made = math.inf, 0.0, 0
        with torch.no_grad():
            while made < max_iter and not abs(sigma - before) <= tol * abs(sigma):
                count = min(_ITERATIONS, max_iter - made)
                new_u, new_v, found = _ops.spectral_norm_sigma(
                    weight, u, v, layer.rule.dim, count, layer.rule.eps, layer.rule.v_first
                )
                torch._foreach_copy_((u, v), (new_u, new_v))
                before, sigma, made = sigma, found.item(), made + count
        if not abs(sigma - before) <= tol * abs(sigma):
            unfinished.append(name)
        sigmas[name] = sigma
    if unfinished:
        warnings.warn(
            f"{function}: after {max_iter} iterations sigma still changes by more than {tol} of itself in "
            + ", ".join(unfinished),
            stacklevel=2,
        )
    return sigmas
