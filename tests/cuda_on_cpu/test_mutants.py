"""The seeded faults of ``mutants.py``: that all still apply, and that some are found. `make mutants` hunts them all."""

from __future__ import annotations

import re
import sys
from collections import Counter

import mutants
import programs
import pytest

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs Linux")


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: re.sub(r"\W+", "-", mutant.what))
def test_fault_applies(mutant: mutants.Mutant) -> None:
    assert mutant.text() != (programs.ROOT / mutant.path).read_text()


def test_faults_cover_all_sources() -> None:
    counts = Counter(mutant.path for mutant in mutants.MUTANTS)
    assert min(counts[f"csrc/{tower}/cuda.cu"] for tower in programs.TOWERS) >= 10
    assert counts[mutants.REDUCE] >= 5
    assert len({(mutant.path, mutant.new, mutant.what) for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS)


def test_text_that_is_gone_is_an_error() -> None:
    with pytest.raises(ValueError, match="found 0 times, not once"):
        mutants.Mutant(mutants.REDUCE, "int nothing;", "", "gone").text()
    with pytest.raises(ValueError, match=r"found \d+ times, not once"):
        mutants.Mutant(mutants.REDUCE, "kWarp", "", "everywhere").text()


@ON_LINUX
@pytest.mark.parametrize("what", ["a tail is stored without guard", "the next row may overtake"])
def test_fault_is_found(what: str, emulated: programs.Programs) -> None:
    (mutant,) = (mutant for mutant in mutants.MUTANTS if mutant.what.startswith(what))
    stage = ("thread" if "overtake" in what else "address", "small", "forward")
    found = mutants.Hunt(emulated).found(mutant, [stage])
    assert found is not None
    assert re.search("data race|AddressSanitizer: heap-buffer-overflow", found)


@ON_LINUX
def test_what_is_no_fault_is_not_found(emulated: programs.Programs) -> None:
    harmless = mutants.Mutant(mutants.CRITIC, "while (width < kThreads", "while  (width < kThreads", "one space more")
    assert mutants.Hunt(emulated).found(harmless, [("address", "small", "forward")]) is None
