"""Checks that run in all processes of a spawned group, one after the other."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

Checks = dict[str, Callable[[], None]]


def check(checks: Checks, **choices: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function one check for each combination of its arguments."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for values in itertools.product(*choices.values()):
            arguments = dict(zip(choices, values, strict=True))
            name = function.__name__ + (f"[{'-'.join(map(str, values))}]" if values else "")
            assert name not in checks
            checks[name] = lambda arguments=arguments: function(**arguments)  # type: ignore[misc]
        return function

    return register


def _run(rank: int, processes: int, folder: str, checks: Callable[[], Checks]) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", processes)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=timeout)
    failures = {}
    for name, run in checks().items():
        try:
            run()
        except (Exception, pytest.fail.Exception):
            failures[name] = traceback.format_exc()
        dist.barrier()
    Path(folder, f"{rank}.json").write_text(json.dumps(failures))
    dist.destroy_process_group()


def failures(processes: int, folder: str, checks: Callable[[], Checks]) -> list[dict[str, str]]:
    """Of each process, the traceback of each check that failed; ``checks`` is called there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
        torch.multiprocessing.spawn(_run, (processes, os.fspath(folder), checks), nprocs=processes)
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(processes)]


def fail_if_failed(failures: list[dict[str, str]], name: str) -> None:
    """Fail the test of a check with what its processes said."""
    failed = [f"process {rank}: {texts[name]}" for rank, texts in enumerate(failures) if name in texts]
    if failed:
        pytest.fail("\n".join(failed), pytrace=False)
