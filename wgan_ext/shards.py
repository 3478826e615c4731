"""One problem of Sinkhorn whose points are spread over the processes of a group.

What the processes say to each other outside of the solve: first a header, in which each tells what it was called with,
so that those that disagree get an error, all of them, where they would else wait for each other; then the points.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ._checks import check_type
from ._transforms import transformed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Group", "Shards", "shards_of"]

Group: TypeAlias = "ProcessGroup | None"

HEADER_BYTES = 1024
"""Of each process, the same for all: one collective of known size."""


@dataclasses.dataclass(frozen=True)
class Shards:
    """How many rows of x and of y each process has; the problem's follow each other in the order of the ranks."""

    group: ProcessGroup
    rank: int
    counts: tuple[list[int], list[int]]

    @property
    def arguments(self) -> tuple[str, int, list[int], list[int]]:
        """The last arguments of the operators of a group."""
        return (self.group.group_name, self.rank, *self.counts)

    def whole(self, shard: Tensor | None, side: int) -> Tensor | None:
        """All rows of x (side 0) or y (side 1), from a tensor of this process's; its gradient is that of its rows."""
        if shard is None:
            return None
        gathered: Tensor = _Gather.apply(shard, self, side)  # type: ignore[no-untyped-call]
        return gathered

    def own(self, whole: Tensor, side: int) -> Tensor:
        """The rows of this process."""
        begin = sum(self.counts[side][: self.rank])
        return whole[begin : begin + self.counts[side][self.rank]]

    def gathered(self, shard: Tensor, side: int) -> Tensor:
        """All rows. They travel as bytes, as many from each process as the largest shard has."""
        counts = self.counts[side]
        row = shard.shape[1:].numel() * shard.element_size()
        message = torch.zeros(max(counts) * row, dtype=torch.uint8, device=shard.device)
        message[: shard.shape[0] * row] = shard.detach().reshape(-1).view(torch.uint8)
        messages = _all_gather(message, self.group)
        rows = torch.cat([m[: count * row] for m, count in zip(messages, counts, strict=True)])
        return rows.view(shard.dtype).view(-1, *shard.shape[1:])


class _Gather(torch.autograd.Function):
    """Every process computes the same of all rows, and needs no other's gradient of its own."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, shards: Shards, side: int) -> Tensor:
        ctx.rows = shards, side
        return shards.gathered(shard, side)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        shards, side = ctx.rows
        return shards.own(grads[0], side), None, None


def shards_of(
    function: str, group: Any, x: Any, y: Any, a: Any, b: Any, init: Any, check: Callable[[], dict[str, Any]]
) -> Shards:
    """Return the shards that the processes of the group hold, once they agree.

    ``check`` checks this process's arguments and returns, by name, what all must have been given alike. What it raises
    is raised here, and an error in all other processes. Costs one all_gather of ``HEADER_BYTES`` and a wait for it.

    Raises TypeError, ValueError, NotImplementedError, RuntimeError.
    """
    if not torch.distributed.is_available():
        raise NotImplementedError(f"{function}: this torch is built without torch.distributed, which a group needs")
    if torch.compiler.is_compiling():
        raise NotImplementedError(f"{function}: torch.compile of a group's collectives is not implemented")
    check_type(function, "group", group, torch.distributed.ProcessGroup, "a torch.distributed.ProcessGroup")
    mine: dict[str, Any] = {}
    error = None
    try:
        if transformed():
            raise NotImplementedError(f"{function}: torch.func's transforms are not implemented with a group")
        alike = check()
        if x.device.type not in _devices(group):
            raise ValueError(
                f"{function}: x must be on a device whose tensors the group can send ({', '.join(_devices(group))}), "
                f"got {x.device}"
            )
        for name, points in (("x", x), ("y", y)):
            if points.dim() != 2:
                raise ValueError(
                    f"{function}: {name} must be points of shape (count, dim) where a group is given, got "
                    f"{list(points.shape)}"
                )
        for name, w, points in (("a", a, x), ("b", b, y), *zip(("init f", "init g"), init or (), (x, y), strict=False)):
            if w is not None and w.shape != points.shape[:1]:
                raise ValueError(f"{function}: {name} must have shape {list(points.shape[:1])}, got {list(w.shape)}")
        mine = {
            "function": function,
            **{f"the {part} of x": _text(of(x)) for part, of in _PARTS.items()},
            **{f"the {part} of y": _text(of(y)) for part, of in _PARTS.items()},
            **{f"the dtype of {name}": _text(w if w is None else w.dtype) for name, w in (("a", a), ("b", b))},
            "init": "None" if init is None else " and ".join(_text(potential.dtype) for potential in init),
            **{name: _text(value) for name, value in alike.items()},
            "counts": [x.shape[0], y.shape[0]],
        }
    except Exception as raised:
        error = raised
        mine = {"error": f"{type(raised).__name__}: {raised}"}
    headers = _headers(group, mine, x)
    if error is not None:
        raise error
    for rank, header in enumerate(headers):
        if "error" in header:
            raise RuntimeError(f"{function}: rank {rank} of the group refused what it was given: {header['error']}")
    for rank, header in enumerate(headers):
        for name, value in headers[0].items():
            if name != "counts" and header.get(name) != value:
                raise ValueError(
                    f"{function}: {name} must be the same on all ranks of the group, got {value} on rank 0 and "
                    f"{header.get(name)} on rank {rank}"
                )
    counts = [list(each) for each in zip(*(header["counts"] for header in headers), strict=True)]
    for name, side in (("x", counts[0]), ("y", counts[1])):
        if sum(side) == 0:
            raise ValueError(f"{function}: {name} must hold at least one point on some rank of the group, got none")
    return Shards(group, torch.distributed.get_rank(group), (counts[0], counts[1]))


_PARTS: dict[str, Callable[[Tensor], Any]] = {
    "dimension": lambda points: points.shape[1],
    "dtype": lambda points: points.dtype,
    "device": lambda points: points.device.type,
}


def _text(value: Any) -> str:
    return repr(float(value)) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _headers(group: ProcessGroup, mine: dict[str, Any], x: Any) -> list[dict[str, Any]]:
    """Return what each process says of itself. The kind of device is the group's choice alone, its index that of x."""
    text = json.dumps(mine).encode()
    if len(text) > HEADER_BYTES:
        text = json.dumps({"error": mine.get("error", "too long a header")[: HEADER_BYTES // 8]}).encode()
    devices = _devices(group)
    kind = "cpu" if "cpu" in devices else devices[0]
    device = x.device if isinstance(x, Tensor) and x.device.type == kind else kind
    message = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
    message[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    headers = _all_gather(message.to(device), group).cpu()
    return [json.loads(bytes(header.tolist()).rstrip(b"\0")) for header in headers]


def _all_gather(message: Tensor, group: ProcessGroup) -> Tensor:
    """The messages of all processes, shape (processes, size)."""
    messages = message.new_empty(torch.distributed.get_world_size(group), message.numel())
    torch.distributed.all_gather(list(messages), message, group=group)
    return messages


def _devices(group: ProcessGroup) -> list[str]:
    """Kinds of devices whose tensors the group can send."""
    return [part.split(":")[0] for part in str(torch.distributed.get_backend_config(group)).split(",")]
