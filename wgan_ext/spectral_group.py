"""Spectral normalization of all layers of a model in one call of the kernels."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as _TorchParametrization
from torch.nn.utils.spectral_norm import SpectralNorm as _TorchHook

from . import _ops, parametrizations
from ._checks import check_module
from ._distributed import refuse_sharded_weight
from .spectral_hook import PENDING, Pending, Rule, SpectralNorm, wants_formula

__all__ = ["SpectralNormGroup", "fuse_spectral_norm_"]


class _Layer(NamedTuple):
    """A normalized weight: how it is normalized, the module that keeps its vectors, and where the weight is."""

    rule: Rule
    owner: nn.Module
    name: str  # of the weight, under which the owner keeps what was found for it
    u: str
    v: str
    weights: nn.Module
    weight: str


def _layers(model: nn.Module) -> Iterator[_Layer]:
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if type(hook) is SpectralNorm:
                name = hook.name
                yield _Layer(hook, module, name, name + "_u", name + "_v", module, name + "_orig")
        if parametrize.is_parametrized(module):
            for chain in module.parametrizations.values():  # type: ignore[operator]
                rule = chain[0]  # the others are given what this one returns
                if type(rule) is parametrizations._SpectralNorm and "_u" in rule._buffers:
                    yield _Layer(rule, rule, "weight", "_u", "_v", chain, "original")


class SpectralNormGroup:
    """The hooks of a model whose layers are normalized together; see ``fuse_spectral_norm_``."""

    def __init__(self) -> None:
        self._found: tuple[weakref.ref[nn.Module], list[_Layer]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._found = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SpectralNormGroup:
        memo[id(self)] = copied = SpectralNormGroup()  # once, for both hooks
        return copied

    def _layers(self, model: nn.Module) -> list[_Layer]:
        """The model's normalized weights; replicas of a model share its hooks."""
        found = self._found
        if found is None or found[0]() is not model:
            found = self._found = weakref.ref(model), list(_layers(model))
        return found[1]

    def begin(self, model: nn.Module) -> None:
        """Find the normalized weight of each layer, as it would by itself, for its first use in this forward."""
        if torch.compiler.is_compiling() or wants_formula():
            return
        by_device: dict[torch.device, _Group] = {}
        for layer in self._layers(model):
            weight = layer.weights._parameters.get(layer.weight)
            u, v = layer.owner._buffers.get(layer.u), layer.owner._buffers.get(layer.v)
            if weight is None or u is None or v is None or weight.is_complex():
                continue  # not normalized any more, or by torch's operators
            if type(weight) is not nn.Parameter:
                refuse_sharded_weight("spectral_norm", weight)
            last = layer.owner.__dict__.get(layer.name)
            if last is not None and last.requires_grad and layer.owner.training:
                layer.owner.__dict__[layer.name] = last = None  # its memory, still in cache, can serve the next
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
            attributes = layer.owner.__dict__
            if PENDING in attributes:  # else the owner of several weights is done
                for pending in attributes.pop(PENDING).values():
                    if pending.taken and pending.iterations:
                        buffers += (pending.old_u, pending.old_v)
                        values += (pending.u, pending.v)
            if attributes.get(layer.name, layer) is None:  # not used, unlike the last time
                attributes[layer.name] = layer.rule.compute_weight(layer.owner, False)  # type: ignore[attr-defined]
        if buffers:
            with torch.no_grad():
                torch._foreach_copy_(buffers, values)


_Group: TypeAlias = list[tuple[_Layer, nn.Parameter, Tensor, Tensor]]


def _find(group: _Group) -> None:
    layers, weights, us, vs = map(list, zip(*group, strict=True))
    rules = [layer.rule for layer in layers]
    iterations = [layer.rule.n_power_iterations if layer.owner.training else 0 for layer in layers]
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
    for i, (layer, weight, u, v) in enumerate(group):
        pending = Pending(normalized[i], new_us[i], new_vs[i], weight, weight._version, u, v, iterations[i])
        attributes = layer.owner.__dict__
        if PENDING in attributes:
            attributes[PENDING][layer.name] = pending
        else:
            attributes[PENDING] = {layer.name: pending}


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
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if type(hook) is _TorchHook:
                hook.__class__ = SpectralNorm
        if type(module) is _TorchParametrization:
            module.__class__ = parametrizations._SpectralNorm
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
