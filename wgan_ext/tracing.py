"""Traces a critic's forward into a program that the analytic engine runs (csrc/critic; records: ``_ops.Kind``).

The forward is run for real, on two and on three samples, while every torch function that it calls is seen. Functions of
the input become records of the program. Functions of parameters and further arguments alone are repeated at every
evaluation, so that gradients flow through them. Whatever the program cannot hold is an obstacle, said by name.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import inspect
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode, resolve_name

from ._ops import Kind
from .spectral_fold import FoldedSpectralNorm
from .spectral_group import group_of, is_group_hook


def is_weight_hook(hook: object) -> bool:
    """Whether a forward pre-hook only sets a weight of its module, whatever its input: the engine runs it itself."""
    return isinstance(hook, (SpectralNorm, WeightNorm)) and not isinstance(hook, FoldedSpectralNorm)


Source: TypeAlias = tuple[str, Any, Any]
"""Where something that does not depend on the critic's input comes from; plain tuples, since torch.compile knows those.

("attribute", path, name) is a tensor of a module of the critic: a parameter, a buffer, a weight computed from others;
("argument", path, None) a further argument, to which the path leads through ((), args, kwargs); ("slot", i, None) what
a step computed; ("value", v, None) anything else; ("list", [sources], None) a list, also "tuple" and "slice".
"""


@dataclasses.dataclass(frozen=True)
class Step:
    """A function of what does not depend on the critic's input."""

    function: Callable[..., Any]
    name: str
    """Its name in torch's namespaces."""
    args: list[Source]
    kwargs: list[tuple[str, Source]]


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """How one layer of a critic is computed."""

    name: str
    """Its path in the critic, as in named_modules."""
    layer: str
    engine: str
    """"analytic" or "autograd"."""
    reason: str
    """Why the analytic engine cannot take it; empty if it can."""


@dataclasses.dataclass
class Trace:
    """A program with what it needs, or the first obstacle to one."""

    obstacle: str = ""
    layers: tuple[LayerPlan, ...] = ()
    program: list[int] = dataclasses.field(default_factory=list)
    places: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    """Where each record comes from: the path of the module that ran, and its class, or the function that it called."""
    scalars: list[float] = dataclasses.field(default_factory=list)
    parameters: list[Source] = dataclasses.field(default_factory=list)
    steps: list[Step] = dataclasses.field(default_factory=list)
    hooked: list[str] = dataclasses.field(default_factory=list)
    """The modules with hooks that compute a weight before they run."""
    grouped: list[str] = dataclasses.field(default_factory=list)
    """The modules whose layers are normalized together."""
    images: bool = False
    """Whether there is a 2-D convolution."""

    def same_as(self, other: Trace) -> bool:
        """Whether both compute the same."""
        return (self.program, self.scalars, self.parameters, self.steps) == (
            other.program,
            other.scalars,
            other.parameters,
            other.steps,
        )


Handler: TypeAlias = "Callable[..., int | list[int]]"
"""Records what a function of torch computes. It takes the recorder, the function's result and the function's own
arguments, and returns the number of the result's value, or one for each tensor of the result."""


class Obstacle(Exception):  # noqa: N818
    """Says why the program cannot hold something."""


def leaves(structure: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Everything in nested tuples, lists and mappings, with its path."""
    if isinstance(structure, Mapping):
        for key, value in structure.items():
            yield from leaves(value, (*path, key))
    elif isinstance(structure, (tuple, list)):
        for i, value in enumerate(structure):
            yield from leaves(value, (*path, i))
    elif isinstance(structure, slice):
        yield from leaves([structure.start, structure.stop, structure.step], path)
    else:
        yield path, structure


def map_leaves(function: Callable[[Any], Any], structure: Any) -> Any:
    """The structure with the function of everything in it."""
    if isinstance(structure, Mapping):
        return {key: map_leaves(function, value) for key, value in structure.items()}
    if isinstance(structure, (tuple, list)):
        values = [map_leaves(function, value) for value in structure]
        return type(structure)(*values) if hasattr(structure, "_fields") else type(structure)(values)
    if isinstance(structure, slice):
        return slice(*map_leaves(function, [structure.start, structure.stop, structure.step]))
    return function(structure)


def tensors_in(structure: Any) -> list[Tensor]:
    """The tensors of a structure."""
    return [leaf for _, leaf in leaves(structure) if isinstance(leaf, Tensor)]


def describe(module: nn.Module) -> str:
    """The class of a module and its options, as its repr."""
    return f"{type(module).__name__}({module.extra_repr()})"


def hooked(module: nn.Module) -> str:
    """Which hook keeps a module from being replaced by what its forward computes, or an empty string."""
    if not all(map(is_group_hook, module._forward_hooks.values())):
        return "has a forward hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has a backward hook"
    if not all(is_weight_hook(hook) or is_group_hook(hook) for hook in module._forward_pre_hooks.values()):
        return "has a forward pre-hook"
    return ""


def couples_samples(module: nn.Module) -> bool:
    """Whether a module normalizes over the batch, so that each sample's output depends on the others."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


@contextlib.contextmanager
def frozen_weights(critic: nn.Module) -> Iterator[dict[nn.Module, bool]]:
    """Make computed weights plain attributes for a while, and leave buffers and attributes as they were.

    Yields the modules that have such weights, and whether hooks compute them.
    """
    modules = list(critic.modules())
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in critic.buffers()]
    places: list[Any] = [m.__dict__ for m in modules]
    places += [v for place in places for v in place.values() if isinstance(v, (dict, list, set))]
    before = [(place, copy.copy(place)) for place in places]
    undo: list[Callable[[], None]] = []
    computed: dict[nn.Module, bool] = {}
    try:
        with torch.no_grad():
            for module in modules:
                if group_of(module) is not None:
                    undo.append(_set_group_aside(module))
                if parametrize.is_parametrized(module):
                    undo.append(_freeze_parametrizations(module))
                    computed[module] = False
                if any(is_weight_hook(hook) for hook in module._forward_pre_hooks.values()):
                    undo.append(_freeze_hooks(module))
                    computed[module] = True
        yield computed
    finally:
        for restore in reversed(undo):
            restore()
        with torch.no_grad():
            for buffer, version, value in buffers:
                # batch norm's kernels change running statistics without counting it as a change in place
                if buffer._version != version or not torch.equal(buffer, value):
                    buffer.copy_(value)
        for place, contents in before:
            _put_back(place, contents)


@contextlib.contextmanager
def same_random_numbers(device: torch.device) -> Iterator[Callable[[], bool]]:
    """Leave random numbers as they were; yields whether Python's or numpy's were drawn, torch's being traced."""
    numpy = sys.modules.get("numpy")

    def elsewhere() -> Any:
        state = numpy.random.get_state() if numpy is not None else ("", None, 0, 0, 0.0)
        return random.getstate(), state

    def unlike(a: Any, b: Any) -> bool:
        return a[0] != b[0] or a[1][2:] != b[1][2:] or (a[1][1] is not None and (a[1][1] != b[1][1]).any())

    others = elsewhere()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield lambda: unlike(elsewhere(), others)
    finally:
        random.setstate(others[0])
        if numpy is not None:
            numpy.random.set_state(others[1])


def _put_back(place: Any, contents: Any) -> None:
    """Make a dict, list or set what it was, unless it is that still."""
    pairs = [list(c.items()) if isinstance(c, dict) else [(0, item) for item in c] for c in (place, contents)]
    if len(pairs[0]) == len(pairs[1]) and all(a[0] == b[0] and a[1] is b[1] for a, b in zip(*pairs, strict=True)):
        return
    if isinstance(place, dict):
        for key in place.keys() - contents.keys():
            del place[key]
        place.update(contents)
    elif isinstance(place, list):
        place[:] = contents
    else:
        place.clear()
        place.update(contents)


def _freeze_parametrizations(module: nn.Module) -> Callable[[], None]:
    kind = type(module)
    weights = {name: getattr(module, name).detach() for name in module.parametrizations}  # type: ignore[union-attr]
    module.__class__ = parametrize.type_before_parametrizations(module)
    module.__dict__.update(weights)

    def restore() -> None:
        for name in weights:
            del module.__dict__[name]
        module.__class__ = kind

    return restore


def _set_group_aside(module: nn.Module) -> Callable[[], None]:
    places: list[Any] = [module._forward_pre_hooks, module._forward_hooks]
    before = [copy.copy(place) for place in places]
    for place in places:
        for key in [key for key, hook in place.items() if is_group_hook(hook)]:
            del place[key]

    def restore() -> None:
        for place, contents in zip(places, before, strict=True):
            place.clear()
            place.update(contents)

    return restore


def _freeze_hooks(module: nn.Module) -> Callable[[], None]:
    hooks, attributes = dict(module._forward_pre_hooks), dict(module.__dict__)
    for key, hook in hooks.items():
        if is_weight_hook(hook):
            hook(module, ())
            del module._forward_pre_hooks[key]

    def restore() -> None:
        module.__dict__.update(attributes)
        module._forward_pre_hooks.update(hooks)

    return restore


def trace(
    critic: nn.Module,
    x: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    computed: dict[nn.Module, bool],
    handlers: Mapping[str, Handler],
) -> Trace:
    """Trace ``critic(x, *args, **kwargs)``; computed weights must be frozen, see ``frozen_weights``."""
    recorder = Recorder(critic, tensors_in(x), ((), args, kwargs), computed, handlers)
    with recorder.modules_watched(), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        try:
            with recorder:
                output = critic(x, *args, **kwargs)
        except Exception as error:  # whatever the forward raises on this batch, autograd will raise on the true one
            recorder.obstacle("", f"its forward fails on a batch of {recorder.batch} samples: {error}")
        else:
            recorder.finish(output)
    return recorder.trace


# What is asked of a tensor without computing with it, and without reading its values.
_QUESTIONS = frozenset(
    [
        *("shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "device", "dtype", "layout", "stride"),
        *("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_leaf", "is_nested", "is_quantized", "is_mkldnn"),
        *("is_contiguous", "is_floating_point", "is_complex", "is_inference", "requires_grad", "grad_fn", "names"),
        *("element_size", "itemsize", "nbytes", "storage_offset", "get_device", "__len__", "__hash__"),
    ]
)
_READS = frozenset(
    [
        *("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__", "is_nonzero"),
        *("equal", "allclose"),
    ]
)
_RANDOM = frozenset(
    [
        *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "uniform"),
        *("bernoulli", "multinomial", "poisson", "binomial", "exponential", "geometric", "cauchy", "log_normal"),
        *("random", "gumbel_softmax", "rrelu"),
    ]
)
_UNSEEN = frozenset(["to", "type", "float", "contiguous", "clone", "__getitem__"])  # not worth a row of explain's table


_PLAIN = (
    *(int, float, complex, str, type(None), type(...), enum.Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


class Recorder(TorchFunctionMode):
    """Sees every torch function that a forward calls, and writes the program; what handlers call."""

    def __init__(
        self,
        critic: nn.Module,
        inputs: Sequence[Tensor],
        arguments: Any,
        computed: dict[nn.Module, bool],
        handlers: Mapping[str, Handler],
    ) -> None:
        super().__init__()
        self.thread = threading.get_ident()  # the hooks see the modules of all threads
        self.handlers = handlers
        self.computed = computed
        self.trace = Trace()
        self.batch, self.dtype = len(inputs[0]), inputs[0].dtype
        self.count = 0  # of values
        self.function = ""  # whose record is being written
        self.slots = 0
        self.kept: list[Any] = []  # so that no id is used twice
        self.called: set[nn.Module] = set()
        self.values: dict[int, int] = {}  # by id of the tensor
        self.stale: set[int] = set()  # ids of tensors whose memory was overwritten through another
        self.rows: list[LayerPlan] = []
        self.running: list[tuple[str, nn.Module, int]] = []  # modules, with the row of each that has one
        self.paths = {id(module): name for name, module in critic.named_modules()}
        self.sources: dict[int, Source] = {}
        for name, module in critic.named_modules():
            tensors = {**module.__dict__, **module._parameters, **module._buffers}
            for key, value in tensors.items():
                if isinstance(value, Tensor):
                    self.sources.setdefault(id(value), ("attribute", name, key))
        for path, leaf in leaves(arguments):
            if isinstance(leaf, Tensor):
                self.kept.append(leaf)
                self.sources[id(leaf)] = ("argument", path, None)
        for x in inputs:
            self.sources.pop(id(x), None)
            self.set_value(x, self.count)
            self.count += 1

    # modules

    @contextlib.contextmanager
    def modules_watched(self) -> Iterator[None]:
        """Know which module is running."""
        before = torch_module.register_module_forward_pre_hook(self.enter)
        after = torch_module.register_module_forward_hook(self.leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def enter(self, module: nn.Module, _: Any) -> None:
        """Note that a module starts to run."""
        if threading.get_ident() != self.thread:
            return
        path = self.paths.get(id(module), "")
        leaf = not module._modules.keys() - {"parametrizations"}
        obstacle = hooked(module)
        row = len(self.rows) if leaf or obstacle else -1
        if row >= 0:
            self.rows.append(LayerPlan(path, describe(module), "analytic", ""))
        self.running.append((path, module, row))
        if not obstacle and couples_samples(module):
            obstacle = "normalizes over the batch"
        if not obstacle and module in self.computed and module in self.called and module.training:
            obstacle = "runs more than once, and its weight is computed anew each time"
        if self.computed.get(module) and module not in self.called:
            self.trace.hooked.append(path)
        self.called.add(module)
        if obstacle:
            self.obstacle("", obstacle)

    def leave(self, *_: Any) -> None:
        """Note that a module ends."""
        if threading.get_ident() == self.thread:
            self.running.pop()

    def obstacle(self, function: str, reason: str) -> None:
        """Note that the running module, or a function that it calls, is an obstacle."""
        path, module, row = self.running[-1] if self.running else ("", None, -1)
        layer = (
            self.rows[row].layer if row >= 0 else f"{function}()" if function else describe(module) if module else ""
        )
        plan = LayerPlan(path, layer, "autograd", reason)
        if row >= 0:
            self.rows[row] = plan if self.rows[row].engine == "analytic" else self.rows[row]
        elif layer:
            self.rows.append(plan)
        if not self.trace.obstacle:
            where = f"layer {path!r}, {layer}," if path else layer
            self.trace.obstacle = f"{where} {reason}".strip()

    def finish(self, output: Any) -> None:
        """Make the critic's output the last value."""
        if isinstance(output, Tensor) and id(output) in self.values:
            if not output.is_floating_point() or output.shape[:1] != (self.batch,):
                self.obstacle("", f"the critic returns {output.dtype} of shape {tuple(output.shape)}")
            elif self.values[id(output)] != self.count - 1:
                self.emit(Kind.RESHAPE, [self.values[id(output)]], output.shape)
        elif not self.trace.obstacle:
            self.obstacle("", "the critic does not return a tensor that was computed from its input by torch functions")
        self.trace.layers = tuple(self.rows)

    # values and parameters

    def set_value(self, tensor: Tensor, value: int) -> None:
        """Note which value a tensor is."""
        self.kept.append(tensor)
        self.values[id(tensor)] = value

    def value(self, tensor: Any) -> int:
        """The number of the value that the tensor is."""
        if not isinstance(tensor, Tensor) or id(tensor) not in self.values:
            raise Obstacle("takes the input in an unexpected place")
        if not tensor.is_floating_point():
            raise Obstacle("takes integers that were made from the input")
        if id(tensor) in self.stale:
            raise Obstacle("uses a tensor that was changed in place through a view")
        return self.values[id(tensor)]

    def moves(self, tensor: Any) -> bool:
        """Whether it depends on the critic's input."""
        return isinstance(tensor, Tensor) and id(tensor) in self.values

    def source(self, tensor: Tensor) -> Source:
        """Where a tensor that does not depend on the input comes from."""
        if id(tensor) not in self.sources:
            raise Obstacle("reads a tensor that is neither of the critic's modules nor an argument of the critic")
        return self.sources[id(tensor)]

    def encode(self, argument: Any) -> Source:
        """The source of an argument of a step."""
        if isinstance(argument, Tensor):
            return self.source(argument)
        for kind in (tuple, list):
            if isinstance(argument, kind):
                return kind.__name__, [self.encode(item) for item in argument], None
        if isinstance(argument, slice):
            return "slice", [self.encode(item) for item in (argument.start, argument.stop, argument.step)], None
        if not isinstance(argument, _PLAIN):
            raise Obstacle(f"takes an object of class {type(argument).__name__}")
        return "value", argument, None

    def parameter(self, tensor: Tensor | None) -> int:
        """The number of the parameter that the tensor is, or -1 for None."""
        if tensor is None:
            return -1
        if self.moves(tensor):
            raise Obstacle("has a weight that depends on the input")
        if not tensor.is_floating_point():  # integers and masks
            tensor = self.derive(Tensor.to, tensor, self.dtype)
        source = self.source(tensor)
        if source not in self.trace.parameters:
            self.trace.parameters.append(source)
        return self.trace.parameters.index(source)

    def scalar(self, *numbers: float) -> int:
        """The index of the first of these scalars."""
        self.trace.scalars += map(float, numbers)
        return len(self.trace.scalars) - len(numbers)

    def emit(self, kind: Kind, payload: Sequence[int], shape: Sequence[int]) -> int:
        """Add a record whose value has this shape, the batch included."""
        if len(shape) == 0 or shape[0] != self.batch:
            raise Obstacle(f"does not keep the batch as dimension 0: it makes shape {tuple(shape)}")
        path, _, row = self.running[-1] if self.running else ("", None, -1)
        self.trace.places.append((path, self.rows[row].layer if row >= 0 else f"{self.function}()"))
        self.trace.program += [kind, len(payload), *payload, len(shape) - 1, *shape[1:]]
        self.count += 1
        return self.count - 1

    def derive(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function of tensors that do not depend on the input, now and at every evaluation."""
        name = resolve_name(function) or function.__name__
        step = Step(
            function, name, [self.encode(arg) for arg in args], [(key, self.encode(arg)) for key, arg in kwargs.items()]
        )
        result = function(*args, **kwargs)
        self.trace.steps.append(step)
        for tensor in tensors_in(result):
            self.kept.append(tensor)
            self.sources[id(tensor)] = ("slot", self.slots, None)
            self.slots += 1
        return result

    # torch functions

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_in([args, kwargs])
        full_name = resolve_name(function) or getattr(function, "__name__", str(function))
        name = full_name.removesuffix(".__get__").rpartition(".")[2]
        if name in _QUESTIONS or full_name.startswith("torch.nn.init.") or name.startswith("_set_grad"):
            return function(*args, **kwargs)
        if name in _READS and tensors:
            self.obstacle(name, "reads the values of a tensor")
            return function(*args, **kwargs)
        if not any(map(self.moves, tensors)):
            return self.constant(name, function, args, kwargs)
        before = {id(tensor): tensor._version for tensor in tensors}
        result = function(*args, **kwargs)
        changed = [tensor for tensor in tensors if tensor._version != before[id(tensor)]]
        try:
            values = self.handle(name, full_name, result, args, kwargs)
        except Obstacle as error:
            self.obstacle(name, str(error))
            values = None
        self.overwrite(name, changed, result)
        for i, tensor in enumerate(tensors_in(result)):
            # behind an obstacle the program is void, but other obstacles are looked for still
            self.set_value(tensor, values[i] if values else 0)
        return result

    def constant(self, name: str, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Call a function that does not depend on the critic's input."""
        own = [t for t in tensors_in([args, kwargs]) if self.sources.get(id(t), ("", 0, 0))[0] != "slot"]
        versions = [tensor._version for tensor in own]
        try:
            training = kwargs.get("training", args[2] if len(args) > 2 else True)
            if name.removesuffix("_") in _RANDOM or ("dropout" in name and training):
                raise Obstacle("draws random numbers")
            result = self.derive(function, *args, **kwargs)
        except Obstacle as error:
            self.obstacle(name, str(error))
            return function(*args, **kwargs)
        if not tensors_in(result) and result is not None:
            self.trace.steps.pop()
            if tensors_in([args, kwargs]):
                self.obstacle(name, "reads the values of a tensor")
        if any(tensor._version != version for tensor, version in zip(own, versions, strict=True)):
            self.obstacle(name, "changes a tensor of the critic in place")
        return result

    def handle(self, name: str, full_name: str, result: Any, args: Any, kwargs: dict[str, Any]) -> list[int]:
        """Record a function of values; return the value of each tensor in its result."""
        plain = name if name.startswith("__") else name.removesuffix("_")
        handler = self.handlers.get(plain) if full_name.startswith("torch.") else None
        if handler is None:
            raise Obstacle("is not a function that the analytic engine knows")
        if not torch.is_grad_enabled():
            raise Obstacle("runs under no_grad")
        try:
            bound = inspect.signature(handler).bind(self, result, *args, **kwargs)
        except TypeError:
            raise Obstacle("is called with arguments that the analytic engine does not know") from None
        self.function = name
        values = handler(*bound.args, **bound.kwargs)
        if self.running and self.running[-1][2] < 0 and name not in _UNSEEN:
            self.rows.append(LayerPlan(self.running[-1][0], f"{name}()", "analytic", ""))
        return [values] if isinstance(values, int) else values

    def overwrite(self, name: str, changed: list[Tensor], result: Any) -> None:
        """After a change in place: other tensors with the same memory no longer hold their values."""
        for tensor in changed:
            if tensor is not result:
                self.obstacle(name, "changes a tensor in place")
                continue
            storage = tensor.untyped_storage().data_ptr()
            for other in self.kept:
                if other is not tensor and isinstance(other, Tensor) and other.untyped_storage().data_ptr() == storage:
                    self.stale.add(id(other))
                    if id(other) in self.sources:
                        self.obstacle(name, "changes a tensor of the critic in place")
            self.stale.discard(id(tensor))
