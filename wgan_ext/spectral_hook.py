"""How spectral normalization divides a weight, and the hook that does so before a module's forward."""

from __future__ import annotations

import copy
import dataclasses
import math
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm as _TorchSpectralNorm

from . import _ops
from ._checks import accumulation_dtype, check_count, check_module, check_number, check_type
from ._distributed import refuse_sharded_module, refuse_sharded_weight
from ._transforms import transformed

__all__ = ["PENDING", "Pending", "Rule", "SpectralNorm", "checked_options", "normalized_weight", "take_pending"]

_PLAIN = (Tensor, nn.Parameter)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def checked_options(
    module: nn.Module,
    name: str,
    n_power_iterations: int,
    eps: float,
    dim: int | None,
    target: float,
    shrink_only: bool,
) -> int:
    """Return dim, by default that of the module's class, once what does not depend on the weight is found right."""
    check_module("spectral_norm", "module", module)
    refuse_sharded_module("spectral_norm", module)
    check_type("spectral_norm", "name", name, str, "a string")
    check_count("spectral_norm", "n_power_iterations", n_power_iterations)
    check_number("spectral_norm", "eps", eps)
    if not 0 <= eps < math.inf:
        raise ValueError(f"spectral_norm: eps must be finite and not negative, got {eps}")
    check_number("spectral_norm", "target", target)
    if not 0 < target < math.inf:
        raise ValueError(f"spectral_norm: target must be positive and finite, got {target}")
    check_type("spectral_norm", "shrink_only", shrink_only, bool, "True or False")
    if dim is None:
        return 1 if isinstance(module, _TRANSPOSED) else 0
    check_type("spectral_norm", "dim", dim, int, "an integer")
    return dim


class Rule(Protocol):
    """How a weight is normalized: the hook of one interface or the parametrization of the other."""

    n_power_iterations: int
    dim: int
    eps: float
    v_first: bool  # the order of an iteration: v and then u, or u and then v
    target: float
    shrink_only: bool


def normalized_weight(
    rule: Rule, weight: Tensor, u: Tensor, v: Tensor, n_power_iterations: int, dim: int | None = None
) -> Tensor:
    """Return W / divisor(sigma) after power iterations, which leave their vectors in u and v.

    ``dim``, by default the rule's, is the dimension of the weight that makes the rows of the matrix W.
    """
    if dim is None:
        dim = rule.dim
    if type(weight) not in _PLAIN:
        refuse_sharded_weight("spectral_norm", weight)
    if wants_formula() or weight.is_complex():
        return _formula(rule, weight, u, v, n_power_iterations, dim)
    normalized: Tensor = _ops.spectral_norm_(
        weight, u, v, dim, n_power_iterations, rule.eps, rule.v_first, rule.target, rule.shrink_only
    )
    return normalized


def wants_formula() -> bool:
    """Whether a formula of torch's operators must do: forward-mode derivatives, torch.func, export, jit.trace."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return transformed() or torch._C._get_tracing_state() is not None


def _formula(rule: Rule, weight: Tensor, u: Tensor, v: Tensor, n_power_iterations: int, dim: int) -> Tensor:
    """What the operator computes, and the same of complex weights."""
    if torch.is_autocast_enabled(weight.device.type):
        with torch.autocast(weight.device.type, enabled=False):
            return _formula(rule, weight, u, v, n_power_iterations, dim)
    wide = weight.to(accumulation_dtype(weight.dtype))
    matrix = wide.movedim(dim, 0).flatten(1) if wide.dim() > 1 else wide[:, None]
    if not n_power_iterations:
        new_u, new_v = u.to(wide.dtype, copy=True), v.to(wide.dtype, copy=True)
    else:
        with torch.no_grad():
            constant, new_u, new_v = matrix.detach(), u.to(wide.dtype), v.to(wide.dtype)
            for _ in range(n_power_iterations):
                if rule.v_first:
                    new_v = unit(torch.mv(constant.mH, new_u), new_v)
                new_u = unit(torch.mv(constant, new_v), new_u)
                if not rule.v_first:
                    new_v = unit(torch.mv(constant.mH, new_u), new_v)
            for buffer, vector in ((u, new_u), (v, new_v)):
                torch.mul(vector, 1, out=buffer)  # a copy; to a captured tensor torch.func lets only out= write
    sigma = (new_u.conj() * torch.mv(matrix, new_v)).sum()
    divisor = torch.where(sigma == 0, rule.eps, sigma) / rule.target
    if rule.shrink_only:
        divisor = torch.where(sigma.abs() <= rule.target, 1.0, divisor)
    return (wide / divisor).to(weight.dtype)


def unit(x: Tensor, otherwise: Tensor) -> Tensor:
    """Return x / |x|, or the other vector where |x| is zero or not finite."""
    x = x / x.abs().sum()  # so that no square leaves the range of floating-point numbers; NaN for a vector of zeros
    norm = torch.linalg.vector_norm(x)
    return torch.where(norm.isfinite(), x / norm, otherwise)


PENDING = "_spectral_norm_pending"
"""The attribute in which a module keeps, by name, what a group has found for it: see ``spectral_group``."""


@dataclasses.dataclass(slots=True)
class Pending:
    """A normalized weight that was found for a layer before its forward, and the vectors that are still to be stored.

    It is good for one use of the layer, and only if that would find the same: by the same rule, with the weight
    unchanged, as many iterations to be made, and tensors saved for backward in the same way, so that a checkpointed
    part of a model saves the same when it is run again.
    """

    normalized: Tensor
    u: Tensor
    v: Tensor
    rule: Rule
    weight: Tensor
    version: int
    old_u: Tensor
    old_v: Tensor
    iterations: int
    saving: Any
    taken: bool = False

    def serves(self, rule: Rule, weight: Tensor, iterations: int) -> bool:
        """Whether the layer would find the same now."""
        return (
            not self.taken
            and rule is self.rule
            and weight is self.weight
            and version_of(weight) == self.version
            and iterations == self.iterations
            and (self.normalized.requires_grad or not (weight.requires_grad and torch.is_grad_enabled()))
            and self.saving == hooks_of_saved_tensors()
        )

    def store(self) -> None:
        """Bring the vectors of a use up to date."""
        if self.taken and self.iterations:
            with torch.no_grad():
                torch._foreach_copy_((self.old_u, self.old_v), (self.u, self.v))


def version_of(weight: Tensor) -> int:
    """How often a tensor was changed in place; tensors of inference mode do not know."""
    return -1 if weight.is_inference() else weight._version


def hooks_of_saved_tensors() -> Any:
    """The hooks through which autograd saves tensors now, as torch.utils.checkpoint sets them."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def take_pending(rule: Rule, owner: nn.Module, name: str, weight: Tensor, iterations: int) -> Tensor | None:
    """Return the normalized weight that was found for this use of a layer, if there is one."""
    found: dict[str, Pending] = owner.__dict__.get(PENDING, {})
    pending = found.get(name)
    if pending is None:
        return None
    if pending.serves(rule, weight, iterations):
        pending.taken = True
        return pending.normalized
    found.pop(name, None)
    pending.store()  # if the layer is used again, its vectors go on from the first use
    return None


class SpectralNorm(_TorchSpectralNorm):
    """Torch's hook, with everything between the buffers and the normalized weight done by one operator.

    Buffers, state dict and removal are torch's own, so that either library handles the other's modules.
    """

    v_first = True
    target = 1.0
    shrink_only = False
    _module: weakref.ref[nn.Module] | None = None

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        """Return W / divisor(sigma); with ``do_power_iteration`` update the buffers u and v in place before."""
        name = self.name
        buffers: dict[str, Any] = module._buffers  # attributes, found without the detour of Module.__getattr__
        weight = module._parameters.get(name + "_orig")
        if weight is None:  # a plain attribute, as in a replica of DataParallel
            weight = getattr(module, name + "_orig")
        iterations = self.n_power_iterations if do_power_iteration else 0
        if not torch.compiler.is_compiling() and PENDING in module.__dict__:
            found = take_pending(self, module, name, weight, iterations)
            if found is not None:
                return found
        return normalized_weight(self, weight, buffers[name + "_u"], buffers[name + "_v"], iterations)

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Give the module its normalized weight; with a power iteration if it is in training mode."""
        name, attributes = self.name, module.__dict__
        if name in module._parameters or name in module._buffers:  # registered anew: Module says what is wrong with it
            setattr(module, name, self.compute_weight(module, module.training))
        elif torch.compiler.is_compiling():
            object.__setattr__(module, name, self.compute_weight(module, module.training))
        elif module.training and name in attributes:
            attributes[name] = None  # the memory of the last weight, which is still in cache, can serve the next
            try:
                attributes[name] = self.compute_weight(module, True)
            finally:
                if attributes[name] is None:
                    attributes[name] = getattr(module, name + "_orig").data
        else:
            attributes[name] = self.compute_weight(module, module.training)
        if self._module is None:
            self._module = weakref.ref(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> SpectralNorm:
        """Copy; and let a module be copied whose normalized weight carries a graph, which torch refuses.

        Hooks are copied before the plain attributes of a module, so what stands in the memo now is what the copy gets.
        """
        copied = copy.copy(self)
        memo[id(self)] = copied
        module = None if self._module is None else self._module()
        if module is not None:
            weight = module.__dict__.get(self.name)
            if isinstance(weight, Tensor) and not weight.is_leaf:
                memo[id(weight)] = weight.detach().clone()
            owner = memo.get(id(module))
            copied._module = None if owner is None else weakref.ref(owner)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_module"}
