"""One side of a contest: its time, and the memory it needs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

ROUND_SECONDS = 0.01
"""A round is long enough for the clock, and for a CUDA queue to be full."""


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
        """Return the most that tensors take during a call above what they take after it.

        For a training step that is what it needs besides parameters and their gradients. What a library allocates past
        torch, as oneDNN and cuDNN do, is not seen.
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.call()
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.call()  # the profiler misses that this frees what was there before it began
            self.call()
        assert profiler.profiler is not None
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        level = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            level += event.nbytes()
            peak = max(peak, level)
        return peak - level
