"""How every contest is timed, and which machine it was."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import machine
import pytest
import torch
from contestant import Contestant

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

CONTESTANT_SECONDS = 0.5
ROUNDS = (7, 50)

OURS = "wgan_ext"
Contest = Callable[..., None]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that this machine has."""
    torch.manual_seed(0)
    return torch.device(request.param)


@pytest.fixture
def contest(benchmark: Any, device: torch.device) -> Contest:
    """Time contestants against each other: ``contest(group, {"wgan_ext": call, "torch": call, ...}, **facts)``.

    Rounds alternate, so that a change of the machine's pace meets all of them, and ratios are medians of the ratios of
    neighbouring rounds. ``group`` names the contest (operation, shape, dtype), without the device. The caller has
    checked that the contestants agree. ``facts`` go into the JSON; ``report.py`` shows ``multiply_adds``, counted by
    contestant, and ``floor_seconds``, the least time that wgan_ext's products can take. pytest-benchmark's own table
    shows ``wgan_ext`` only, in rounds of several calls; ``report.py`` shows all.
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
            benchmark.extra_info.setdefault("contestants", {})[name] = {
                "median": median,
                "iqr": high - low,
                "ratio": ratio,
                "calls": contestant.calls,
                "peak_bytes": contestant.peak_bytes(),
            }
        benchmark.extra_info.update(facts)

    return run


@pytest.hookimpl
def pytest_benchmark_generate_machine_info() -> dict[str, object]:
    return machine.facts()


@pytest.hookimpl
def pytest_benchmark_update_commit_info(commit_info: dict[str, object]) -> None:
    for key in ("project", "branch"):
        commit_info.pop(key, None)
