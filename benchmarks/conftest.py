"""How every contest is timed, and which machine it was."""

from __future__ import annotations

import datetime
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import wgan_ext

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

ROUND_SECONDS = 0.01
"""A round is long enough for the clock, and for a CUDA queue to be full."""
CONTESTANT_SECONDS = 0.5
ROUNDS = (7, 50)

OURS = "wgan_ext"
Contest = Callable[..., None]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that this machine has."""
    torch.manual_seed(0)
    return torch.device(request.param)


class Contestant:
    """Times rounds of calls; a round ends when the device has finished."""

    def __init__(self, call: Callable[[], object], device: torch.device) -> None:
        self.call = call
        self.device = device
        self.calls = 1
        self.seconds: list[float] = []  # of one call, the mean of each round

    def __call__(self) -> None:
        start = time.perf_counter()
        for _ in range(self.calls):
            self.call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds.append((time.perf_counter() - start) / self.calls)

    def calibrate(self) -> float:
        """Warm up and choose the number of calls in a round; return the time that a round takes."""
        for _ in range(4):
            self()
        each = statistics.median(self.seconds[1:])
        self.calls = max(1, math.ceil(ROUND_SECONDS / each))
        self.seconds = []
        return each * self.calls

    def peak_bytes(self) -> int:
        """Return what a call allocates on a GPU above what it found."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


@pytest.fixture
def contest(benchmark: Any, device: torch.device) -> Contest:
    """Time contestants against each other: ``contest(group, {"wgan_ext": call, "torch": call, ...}, **facts)``.

    Rounds alternate, so that a change of the machine's pace meets all of them, and ratios are medians of the ratios of
    neighbouring rounds. ``group`` names the contest (operation, shape, dtype), without the device. The caller has
    checked that the contestants agree. ``facts`` go into the JSON. pytest-benchmark's own table shows ``wgan_ext``
    only, in rounds of several calls; ``report.py`` shows all.
    """

    def run(group: str, calls: dict[str, Callable[[], object]], **facts: object) -> None:
        contestants = {name: Contestant(call, device) for name, call in calls.items()}
        ours, rivals = contestants[OURS], [c for name, c in contestants.items() if name != OURS]

        def rivals_turn() -> None:
            for rival in rivals:
                rival()

        benchmark.group = f"{group}, {device.type}"
        if benchmark.disabled:
            benchmark.pedantic(ours, setup=rivals_turn)
            return
        longest = max([contestant.calibrate() for contestant in contestants.values()])
        rounds = min(max(math.ceil(CONTESTANT_SECONDS / longest), ROUNDS[0]), ROUNDS[1])
        benchmark.pedantic(ours, setup=rivals_turn, rounds=rounds)

        for name, contestant in contestants.items():
            low, median, high = statistics.quantiles(contestant.seconds, n=4)
            ratio = statistics.median(a / b for a, b in zip(contestant.seconds, ours.seconds, strict=True))
            row = {"median": median, "iqr": high - low, "ratio": ratio, "calls": contestant.calls}
            if device.type == "cuda":
                row["peak_bytes"] = contestant.peak_bytes()
            benchmark.extra_info.setdefault("contestants", {})[name] = row
        benchmark.extra_info.update(facts)

    return run


def processor() -> str:
    """The processor's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@pytest.hookimpl
def pytest_benchmark_generate_machine_info() -> dict[str, object]:
    """What a reader must know to place the figures; no host names, no paths."""
    info = wgan_ext.build_info()
    facts: dict[str, object] = {
        "processor": processor(),
        "threads": info.threads,
        "simd": info.simd,
        "system": platform.system(),
        "python": info.python,
        "torch": info.torch,
        "wgan_ext": info.version,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


@pytest.hookimpl
def pytest_benchmark_update_commit_info(commit_info: dict[str, object]) -> None:
    for key in ("project", "branch"):
        commit_info.pop(key, None)
