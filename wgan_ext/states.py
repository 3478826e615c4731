"""What a critic's forward depends on, except the values of tensors: where that is the same, so is the trace."""

from __future__ import annotations

import dis
import enum
import functools
import logging
import types
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from . import _C

__all__ = ["frozen", "outside_variables", "plain_attributes", "same_state", "state_of", "value_of"]

_ATOMS = frozenset(
    [
        *(int, float, bool, str, type(None), complex, bytes),
        *(torch.dtype, torch.device, torch.Size),
    ]
)
_IGNORED = frozenset(
    [
        *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_is_full_backward_hook"),
        *("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"),
        *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    ]
)


def plain_attributes(critic: nn.Module) -> list[tuple[str, str, Any]]:
    """The numbers and strings among the attributes of a critic's modules: path, name, value."""
    return [
        (path, name, value)
        for path, module in critic.named_modules()
        for name, value in module.__dict__.items()
        if isinstance(value, (bool, int, float, str)) and name not in _IGNORED
    ]


def state_of(critic: nn.Module) -> list[Any]:
    """Modules, classes, modes, hooks, attributes and the shapes of parameters, to be compared or hashed."""
    return _C.state_of(critic, _ATOMS, _IGNORED, frozen)


def same_state(critic: nn.Module, state: list[Any], modules: dict[str, weakref.ref[nn.Module]]) -> bool:
    """Whether that is ``state`` still, which was that of ``modules``; quicker than comparing a new one."""
    return _C.same_state(critic, _ATOMS, _IGNORED, frozen, state, modules)


class _Identity:
    """Equals another one of the same object, while that lives; keeps alive only what allows no weak reference."""

    def __init__(self, value: Any) -> None:
        self.id = id(value)
        try:
            self.of: Any = weakref.ref(value)
        except TypeError:
            self.of = lambda: value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.id == other.id and self.of() is other.of() is not None

    def __hash__(self) -> int:
        return self.id


def frozen(value: Any, depth: int = 0) -> Any:
    """Something hashable that differs where the value does, as far as a forward can depend on it."""
    kind = value.__class__
    if kind in _ATOMS:
        return value
    if kind is types.MethodType:
        return _Identity(value.__func__), _Identity(value.__self__)
    if isinstance(value, dict):
        return tuple([(key, frozen(item, depth)) for key, item in value.items()]) if value else ()
    if isinstance(value, (tuple, list, deque)):
        return tuple([frozen(item, depth) for item in value])
    if isinstance(value, (set, frozenset)):
        return kind, frozenset([frozen(item, depth) for item in value])
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, (int, float, str)):  # of a class of one's own
        return kind, repr(value)
    if isinstance(value, functools.partial):
        return kind, frozen(value.func, depth), frozen(value.args, depth), frozen(value.keywords, depth)
    if kind.__module__ == "numpy" and hasattr(value, "tobytes"):  # an array or a scalar
        return kind, value.shape, str(value.dtype), value.tobytes()
    contents = dict(getattr(value, "__dict__", {}))  # of a configuration, say
    for slots in (base.__dict__.get("__slots__", ()) for base in kind.__mro__):
        for name in (slots,) if isinstance(slots, str) else slots:
            contents[name] = getattr(value, name, None)
    opaque = (nn.Module, type, types.ModuleType, types.FunctionType, logging.Logger)
    if not contents or depth == 3 or isinstance(value, opaque):
        return _Identity(value)
    return _Identity(value), frozen(contents, depth + 1)


_MISSING = object()


def value_of(place: Any, name: str) -> Any:
    """The value of a variable in a namespace, a module, a class or a cell."""
    if isinstance(place, dict):
        return place.get(name, _MISSING)
    return place.cell_contents if isinstance(place, types.CellType) else getattr(place, name, _MISSING)


def outside_variables(critic: nn.Module) -> tuple[list[tuple[Any, str, Any]], str]:
    """The variables outside of it that a critic's forwards read, or the name of one that cannot be compared."""
    found: list[tuple[Any, str, Any]] = []
    seen: set[Any] = set()
    modules = set(critic.modules())

    def visit(function: Any, owner: type) -> str:
        code = getattr(function, "__code__", None)
        if code is None or (code, owner) in seen:
            return ""
        seen.add((code, owner))
        package = _package(function)
        if package == "torch":
            return ""
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        for name, *attributes in _names_read(code):
            place = cells.get(name, function.__globals__)
            try:
                value = value_of(place, name)
            except ValueError:  # an empty cell
                continue
            while attributes and isinstance(value, (types.ModuleType, type)) and _root(value) not in _LIBRARIES:
                place, name = value, attributes.pop(0)
                value = value_of(place, name)
            if blame := judge(place, name, value, owner, package):
                return blame
        for name in _attributes_read(code):  # methods, among others; super() may call any of them
            for kind in owner.__mro__:
                if kind is nn.Module:
                    break
                value = vars(kind).get(name, _MISSING)
                value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if isinstance(value, types.FunctionType):
                    blame = visit(value, owner)
                else:
                    blame = judge(kind, name, value, owner, package)
                if blame:
                    return blame
        return ""

    def judge(place: Any, name: str, value: Any, owner: type, package: str) -> str:
        if value is _MISSING:  # a builtin
            return ""
        if _is_atom(value):
            if not isinstance(place, types.CellType) or not callable(value):  # the cell would keep the closure alive
                found.append((place, name, frozen(value)))
            same = isinstance(value, types.FunctionType) and _package(value) == package
            return visit(value, owner) if same else ""
        harmless = value in modules if isinstance(value, nn.Module) else callable(value)
        return "" if harmless or isinstance(value, types.ModuleType) else name

    lists = [m for m in modules if isinstance(m, ParametrizationList)]  # which the engine runs as they are
    for module in modules.difference(*(m.modules() for m in lists)):
        functions = [getattr(module.forward, "__func__", module.forward)]
        functions += [value for value in module.__dict__.values() if isinstance(value, types.FunctionType)]
        for function in functions:
            if blame := visit(function, type(module)):
                return found, f"a forward reads the variable {blame!r}, which may change unseen"
    return found, ""


_LIBRARIES = ("torch", "math", "numpy", "builtins")


def _root(value: Any) -> str:
    """The package of a module or class."""
    name = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
    return str(name).partition(".")[0]


def _is_atom(value: Any) -> bool:
    """Whether a variable's value is compared with == and cannot change otherwise."""
    if isinstance(value, tuple):
        return all(map(_is_atom, value))
    return value.__class__ in _ATOMS or isinstance(value, (enum.Enum, types.FunctionType, types.MethodType))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code and that of the functions and comprehensions within."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _names_read(code: types.CodeType) -> Iterator[list[str]]:
    """The global and enclosing variables that are read, each with the attributes that are read of it."""
    for part in _codes(code):
        chain: list[str] = []
        for i in dis.get_instructions(part):
            if i.opname in ("LOAD_GLOBAL", "LOAD_NAME") or (i.opname == "LOAD_DEREF" and i.argval in code.co_freevars):
                if chain:
                    yield chain
                chain = [i.argval]
            elif chain and i.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                chain.append(i.argval)
            elif chain:
                yield chain
                chain = []


def _attributes_read(code: types.CodeType) -> set[str]:
    return {name for part in _codes(code) for name in part.co_names}


def _package(function: types.FunctionType) -> str:
    return str(function.__globals__.get("__name__", "")).partition(".")[0]
