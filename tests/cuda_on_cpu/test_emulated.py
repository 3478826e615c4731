"""The CUDA kernels of every tower, run on the host under sanitizers by the emulator, against the CPU kernels.

``faults.cpp`` proves the proof: each of its kernels has one seeded fault, and here stands what must be reported.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import programs
import pytest
from programs import HERE, REFUSED, SANITIZERS, TOWERS, kernels_in, kernels_of, run

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the emulator needs Linux: ELF thread-local storage, the sanitizers of g++"
)

Build = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def build(emulated: programs.Programs) -> Build:
    """Compile a program here, a tower's or ``faults``, once for each sanitizer."""
    return emulated.build


def test_every_tower_is_emulated() -> None:
    assert [tower for tower in TOWERS if not (HERE / f"{tower}.cpp").exists()] == []


@pytest.mark.parametrize("tower", TOWERS)
def test_kernels_agree_with_the_cpu(tower: str, build: Build) -> None:
    shown = run(build(tower, "address"))
    assert shown.returncode == 0, shown.stdout[-8000:]
    ran = kernels_in(shown.stdout)
    declared = kernels_of(f"{tower}/*.cu*")
    assert declared
    assert {name for name in declared if re.search(rf"\b{name}\b", ran) is None} == set()


@pytest.mark.parametrize("tower", TOWERS)
def test_order_of_threads_and_blocks_does_not_matter(tower: str, build: Build) -> None:
    shown = run(build(tower, "address"), "small", order="reverse")
    assert shown.returncode == 0, shown.stdout[-8000:]


@pytest.mark.parametrize("tower", TOWERS)
def test_no_data_race(tower: str, build: Build) -> None:
    shown = run(build(tower, "thread"), "small")
    assert shown.returncode == 0, shown.stdout[-8000:]


# The emulator's own refusals, with any sanitizer.
REFUSALS = {
    "divergent_syncthreads": r"divergent __syncthreads: thread \(0, 0, 0\) at faults.cpp:\d+, thread \(40, 0, 0\)",
    "syncthreads_after_return": r"__syncthreads after some threads returned: .* thread \(95, 0, 0\) has returned",
    "divergent_shuffle": r"divergent warp collective: shuffle by thread \(0, 0, 0\) .* waits for lanes ffffffff",
    "mixed_collectives": r"divergent warp collective: vote by thread \(0, 0, 0\)",
    "shuffle_from_absent_lane": r"shuffle by thread \(0, 0, 0\) .* reads lane 20, which takes no part",
    "lane_outside_mask": r"shuffle by thread \(16, 0, 0\) .*: its own lane is not in the mask 0000ffff",
    "too_many_threads": r"block \(1025, 1, 1\) breaks the device's limits",
    "too_large_grid": r"grid \(1, 65536, 1\) breaks the device's limits",
    "empty_grid": r"grid \(1, 0, 1\) breaks the device's limits",
    "too_much_shared": r"49153 bytes of dynamic shared memory, the limit is 49152",
}
MEMORY_ERRORS = {
    "read_past_end": r"AddressSanitizer: heap-buffer-overflow.*[\s\S]*READ of size 4[\s\S]*#0 .* in .*read_past_end",
    "write_past_end": r"AddressSanitizer: heap-buffer-overflow.*[\s\S]*WRITE of size 4[\s\S]*#0 .* in .*write_past_end",
    "write_past_dynamic_shared": r"AddressSanitizer: heap-buffer-overflow[\s\S]*#0 .* in .*write_past_dynamic_shared",
    "write_past_static_shared": r"index 96 out of bounds for type 'float \[96\]'",
    "misaligned_vector_load": r"misaligned address .* for type 'const struct float4', which requires 16 byte alignment",
    "write_past_passed_shared": r"AddressSanitizer: .*\n(.*\n)*WRITE of size 4.*\n.*#0 .* in .*fill",
    "misaligned_static_shared": r"misaligned address .* which requires 16 byte alignment",
    "overflowing_index": r"signed integer overflow: 70000 \* 70000",
}
# Shared memory read before it was written: wrong in the order given.
WRONG_RESULTS = {
    "missing_syncthreads": ("forward", r"block 0: got -?nan"),
    "missing_syncwarp": ("reverse", r"block 0: got -?nan"),
    "uninitialised_static_shared": ("forward", r"block 1: got -?nan"),
    "uninitialised_dynamic_shared": ("forward", r"block 0: got -?nan"),
    "ordered_blocks": ("reverse", r"block 1: got 0, want"),
}
RACES = ["missing_syncthreads", "missing_syncwarp", "shuffle_for_syncwarp", "reused_scratch"]


def test_every_fault_is_expected() -> None:
    table = (HERE / "faults.cpp").read_text().split("kRuns[] =")[1].split("};")[0]
    runs = set(re.findall(r"WGAN_EXT_FAULT\((\w+)\)|\{\"(\w+)\"", table))
    assert {a or b for a, b in runs} == {"clean", *REFUSALS, *MEMORY_ERRORS, *WRONG_RESULTS, *RACES}


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_clean_kernel_is_not_reported(sanitizer: str, order: str, build: Build) -> None:
    shown = run(build("faults", sanitizer), "clean", order)
    name = "clean<float>" if sanitizer != "none" else "kernel"  # without a symbolizer, the launcher's word for it
    assert (shown.returncode, shown.stdout) == (0, f"emulated kernel {name}: 1 launches\n")


@pytest.mark.parametrize("fault", REFUSALS)
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_refusals(fault: str, sanitizer: str, build: Build) -> None:
    shown = run(build("faults", sanitizer), fault)
    assert shown.returncode == REFUSED, shown.stdout
    assert re.search(REFUSALS[fault], shown.stdout), shown.stdout


@pytest.mark.parametrize("fault", MEMORY_ERRORS)
def test_memory_errors_are_reported(fault: str, build: Build) -> None:
    shown = run(build("faults", "address"), fault)
    assert shown.returncode not in (0, REFUSED)
    assert re.search(MEMORY_ERRORS[fault], shown.stdout), shown.stdout


@pytest.mark.parametrize("fault", WRONG_RESULTS)
def test_unwritten_shared_memory_spoils_the_result(fault: str, build: Build) -> None:
    order, report = WRONG_RESULTS[fault]
    shown = run(build("faults", "address"), fault, order)
    assert shown.returncode == 1
    assert re.search(report, shown.stdout), shown.stdout


@pytest.mark.parametrize("fault", RACES)
def test_races_are_reported(fault: str, build: Build) -> None:
    shown = run(build("faults", "thread"), fault)
    assert shown.returncode == 66, shown.stdout
    assert re.search(rf"WARNING: ThreadSanitizer: data race[\s\S]*\b{fault}\b", shown.stdout), shown.stdout


def test_reports_come_from_the_detectors(build: Build) -> None:
    """Without sanitizers none of these faults is reported: what the tests above see is the detection, not the fault."""
    plain = build("faults", "none")
    for fault in [*MEMORY_ERRORS, *RACES]:
        shown = run(plain, fault)
        assert shown.returncode in (0, 1), shown.stdout
        assert "Sanitizer" not in shown.stdout
        assert "runtime error" not in shown.stdout
