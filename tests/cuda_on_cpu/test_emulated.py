"""The CUDA kernels of every tower, run on the host under sanitizers by the emulator, against the CPU kernels.

``faults.cpp`` proves the proof: each of its kernels has one seeded fault, and here stands what must be reported.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
TOWERS = sorted(path.parent.name for path in CSRC.glob("*/cuda.cu"))
TOWER_SOURCES = ["csrc/{tower}/cuda.cu", "csrc/{tower}/cpu_portable.cpp", "tests/cuda_on_cpu/{tower}.cpp"]
GROUND_SOURCES = ["tests/cuda_on_cpu/serial.cpp", "csrc/simd.cpp"]

FLAGS = [
    *("-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unknown-pragmas"),
    *("-DWGAN_EXT_EMULATED", f"-I{CSRC}", f"-I{CSRC / 'cuda'}", f"-I{HERE}"),
]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    # Alignment again: the red zones of AddressSanitizer align shared arrays better than CUDA does.
    "thread": ["-fsanitize=thread,alignment", "-fno-sanitize-recover=all"],
    "none": [],
}
REFUSED = 70  # kRefused of emulator.h

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the emulator needs Linux: ELF thread-local storage, the sanitizers of g++"
)

Build = Callable[[str, str], Path]


def call(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    """Compile a program here, a tower's or ``faults``, once for each sanitizer."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    programs: dict[Path, list[Future[subprocess.CompletedProcess[str]]]] = {}

    def compile_program(program: str, sanitizer: str) -> Path:
        binary = folder / f"{program}_{sanitizer}"
        if binary not in programs:
            names = ["tests/cuda_on_cpu/faults.cpp"]
            if program != "faults":
                names = [name.format(tower=program) for name in TOWER_SOURCES] + GROUND_SOURCES
            compile_one = ["g++", *FLAGS, *SANITIZERS[sanitizer], "-c", "-x", "c++"]
            programs[binary] = [
                pool.submit(call, [*compile_one, str(CSRC.parent / name), "-o", f"{binary}_{i}.o"])
                for i, name in enumerate(names)
            ]
        for source in programs[binary]:
            assert source.result().returncode == 0, source.result().stdout
        if not binary.exists():
            objects = [f"{binary}_{i}.o" for i in range(len(programs[binary]))]
            shown = call(["g++", *SANITIZERS[sanitizer], *objects, "-o", str(binary)])
            assert shown.returncode == 0, shown.stdout
        return binary

    with ThreadPoolExecutor(2) as pool:
        yield compile_program


@functools.cache
def fixed_addresses() -> list[str]:
    """Run a program without address randomisation, which some versions of ThreadSanitizer cannot map around."""
    command = ["setarch", platform.machine(), "-R"]
    works = shutil.which("setarch") is not None and call([*command, "true"]).returncode == 0
    return command if works else []


def run(binary: Path, argument: str = "", order: str = "forward") -> subprocess.CompletedProcess[str]:
    prefix = fixed_addresses() if binary.name.endswith("_thread") else []
    return call(
        [*prefix, str(binary), *argument.split()],
        WGAN_EXT_EMULATED_ORDER=order,
        ASAN_OPTIONS="detect_leaks=1",
        UBSAN_OPTIONS="print_stacktrace=1",
        TSAN_OPTIONS="halt_on_error=1",
    )


def kernels_of(tower: str) -> set[str]:
    """Names of the ``__global__`` functions in a tower's CUDA sources."""
    names = set()
    for path in sorted(CSRC.glob(f"{tower}/*.cu*")):
        text = re.sub(r"//.*|/\*.*?\*/", "", path.read_text())
        text = re.sub(r"__launch_bounds__\s*(\((?:[^()]|\([^()]*\))*\))", "", text)
        names.update(re.findall(r"__global__\s+void\s+(\w+)\s*\(", text))
        assert len(re.findall(r"\b__global__\b", text)) == len(re.findall(r"__global__\s+void\s+\w+\s*\(", text)), path
    return names


def test_every_tower_is_emulated() -> None:
    assert [tower for tower in TOWERS if not (HERE / f"{tower}.cpp").exists()] == []


@pytest.mark.parametrize("tower", TOWERS)
def test_kernels_agree_with_the_cpu(tower: str, build: Build) -> None:
    shown = run(build(tower, "address"))
    assert shown.returncode == 0, shown.stdout[-8000:]
    ran = " ".join(re.findall(r"^emulated kernel (.*): \d+ launches$", shown.stdout, re.MULTILINE))
    declared = kernels_of(tower)
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
