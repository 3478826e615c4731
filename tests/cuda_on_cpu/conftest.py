"""The programs of the emulator, compiled once a session."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import programs
import pytest


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[programs.Programs]:
    with ThreadPoolExecutor(2) as pool:
        yield programs.Programs(tmp_path_factory.mktemp("cuda_on_cpu"), pool)
