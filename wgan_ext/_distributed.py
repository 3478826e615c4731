"""What keeps a critic's gradients equal on all processes: wrappers that are refused, and penalties that bypass one."""

from __future__ import annotations

import dataclasses
import gc
import sys
import weakref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# Compared by name, since importing them takes half a second.
_FSDP = ("FSDPModule", "FullyShardedDataParallel")
_DTENSOR = ("DTensor",)
WRAPPERS = (DistributedDataParallel, DataParallel)
_SHARD_THE_LOSS = (
    "Shard the module that computes the whole critic loss, wgan_ext.CriticLoss(critic), and nothing inside it: its "
    "forward then reads whole parameters"
)


def refuse_wrapped(op: str, critic: object) -> None:
    """Raise NotImplementedError for a critic that gathers parameters or synchronises gradients in its own forward.

    The layers are looked at only where there is a process group, without which nothing is sharded, and not in code that
    is being compiled: torch.compile cannot follow how.
    """
    if isinstance(critic, WRAPPERS):
        raise NotImplementedError(f"{op}: {_wrapped('the critic', critic)}")
    if "torch.distributed.fsdp" not in sys.modules and not _is_initialized():
        return
    _refuse_sharded(op, "the critic", critic)
    if isinstance(critic, nn.Module) and _is_initialized() and not torch.compiler.is_compiling():
        for name, module in critic.named_modules():
            _refuse_sharded(op, f"layer {name!r} of the critic", module)
        for name, parameter in critic.named_parameters():
            if _base_named(_DTENSOR, type(parameter)):
                raise NotImplementedError(
                    f"{op}: parameter {name!r} of the critic is a DTensor, of which each process holds a part: a "
                    f"module around the critic is sharded and this is not in its forward, or the critic is tensor "
                    f"parallel, which is not supported. {_SHARD_THE_LOSS}"
                )


def refuse_sharded_weight(op: str, weight: Tensor) -> None:
    """Raise NotImplementedError for a DTensor, of which each process would normalize its own part."""
    kind = type(weight)
    if kind is nn.Parameter or kind is Tensor or torch.compiler.is_compiling():
        return
    if _base_named(_DTENSOR, kind):
        raise NotImplementedError(
            f"{op}: the weight is a DTensor, of which each process holds a part, and the singular value is that of the "
            "whole. Normalize the module first and shard then, by FSDP alone; outside of the sharded module's forward, "
            "and under tensor parallelism, the weight is not whole"
        )


def refuse_sharded_module(op: str, module: nn.Module) -> None:
    """Raise NotImplementedError for a module that FSDP shards, whose parameters cannot be replaced any more."""
    if name := _base_named(_FSDP, type(module)):
        raise NotImplementedError(
            f"{op}: module is sharded by FSDP ({name}), which holds its parameters. Normalize it first and shard then"
        )


def wrapped_layer(critic: nn.Module) -> str:
    """What is wrong with a layer that is wrapped in DDP or DataParallel, or an empty string."""
    for name, module in critic.named_modules():
        if isinstance(module, WRAPPERS):
            return _wrapped(f"layer {name!r} of the critic", module)
    return ""


def _wrapped(what: str, module: object) -> str:
    return (
        f"{what} is wrapped in {type(module).__name__}, which synchronises gradients in its forward; bypassing it "
        "would train with unsynchronised gradients. Wrap wgan_ext.CriticLoss(critic) instead, or pass the wrapper's "
        ".module and add the penalty to a loss that has forwards of the wrapper"
    )


def _refuse_sharded(op: str, what: str, module: object) -> None:
    if name := _base_named(_FSDP, type(module)):
        raise NotImplementedError(
            f"{op}: {what} is sharded by FSDP ({name}), which gathers parameters and synchronises gradients in its "
            f"forward, and frees the parameters again after one backward pass. {_SHARD_THE_LOSS}"
        )


def _base_named(names: tuple[str, ...], kind: type) -> str:
    """Which of these classes of torch is a base, or an empty string."""
    for base in kind.__mro__:
        if base.__name__ in names and base.__module__.startswith("torch."):
            return base.__name__
    return ""


def guard(op: str, critic: object, result: Tensor) -> Tensor:
    """Return the result, set to raise if a backward pass through it leaves gradients unsynchronised between processes.

    DDP reduces gradients in the backward pass after a forward of the wrapper. A penalty of the wrapped module bypasses
    that forward: in a joint loss its gradients are reduced with the others', alone they stay those of one process, and
    nothing tells. So at the end of a backward pass through the result, either DDP has reduced something, or no gradient
    was accumulated, or this raises RuntimeError. Under ``no_sync`` nothing is asked.

    It does not see a critic that is no nn.Module, code being compiled, or a backward pass of a penalty by itself that
    comes between the forward and the backward of the other terms, which DDP refuses if a parameter, as the last bias,
    gets no gradient from the penalty. It may be late to see a critic that was wrapped after its first result.
    """
    if torch.compiler.is_compiling() or not _is_initialized() or dist.get_world_size() == 1:
        return result
    if not isinstance(critic, nn.Module) or not result.requires_grad:
        return result
    wrappers = _wrappers_of(critic)
    if not wrappers or not _synchronising(wrappers):
        return result
    # A static graph is reduced once, the first time, without any parameter being marked ready.
    delayed = [ddp for ddp in wrappers if ddp.static_graph and not ddp._static_graph_delay_allreduce_enqueued]

    def watch(_: Tensor) -> None:
        if not _synchronising(wrappers):
            return
        gradients, ready = _gradients(critic), _ready_times(wrappers)

        def check() -> None:
            reduced = ready != _ready_times(wrappers) or any(
                ddp._static_graph_delay_allreduce_enqueued for ddp in delayed
            )
            if reduced or gradients == _gradients(critic):
                return
            if set(_wrappers_of(critic, search=True)) <= set(wrappers):  # else it was wrapped again
                raise RuntimeError(
                    f"{op}: the critic is wrapped in DistributedDataParallel, but this backward pass has no forward of "
                    "the wrapper in it, so that its gradients were not synchronised. Wrap wgan_ext.CriticLoss(critic) "
                    "instead, or add the penalty to a loss that has forwards of the wrapper and call backward once; to "
                    "accumulate gradients for a later backward pass that has them, use the wrapper's no_sync()"
                )

        torch.autograd.Variable._execution_engine.queue_callback(check)

    result.register_hook(watch)  # type: ignore[no-untyped-call]
    return result


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _synchronising(wrappers: list[DistributedDataParallel]) -> bool:
    return all(ddp.require_backward_grad_sync for ddp in wrappers)


def _ready_times(wrappers: list[DistributedDataParallel]) -> list[list[int]]:
    """When DDP last took each gradient for reduction; it takes none that it does not expect."""
    return [ddp.reducer.get_backward_stats() for ddp in wrappers]


def _gradients(critic: nn.Module) -> list[tuple[int, int]]:
    """What changes when a gradient is accumulated."""
    return [(0, 0) if p.grad is None else (id(p.grad), p.grad._version) for p in critic.parameters()]


@dataclasses.dataclass
class _Search:
    found: list[weakref.ref[DistributedDataParallel]] = dataclasses.field(default_factory=list)
    calls: int = 0


_searches: weakref.WeakKeyDictionary[nn.Module, _Search] = weakref.WeakKeyDictionary()


def _wrappers_of(critic: nn.Module, *, search: bool = False) -> list[DistributedDataParallel]:
    """The DDP instances that reduce gradients of the critic's parameters over several processes.

    DDP keeps no list of itself, and looking through all objects takes 0.1 s. So it is done when asked for and when a
    known wrapper is gone; and while there is none, as the critic may be wrapped yet, at calls 1, 2, 4, 8, ...
    """
    known = _searches.setdefault(critic, _Search())
    known.calls += 1
    lost = any(reference() is None for reference in known.found)
    if search or lost or (not known.found and known.calls.bit_count() == 1):
        own = set(map(id, critic.parameters()))
        known.found = [
            weakref.ref(ddp)
            for ddp in gc.get_objects()
            if DistributedDataParallel in type(ddp).__mro__ and any(id(p) in own for p in ddp.parameters())
        ]
        known.calls = 1 if lost else known.calls
    alive = [ddp for reference in known.found if (ddp := reference()) is not None]
    return [
        ddp
        for ddp in alive
        if ddp.process_group.size() > 1 and not ddp._use_python_reducer and not ddp._delay_all_reduce_all_params
    ]
