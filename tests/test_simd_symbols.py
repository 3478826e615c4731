"""Each SIMD level's code stays in its own functions, and is what it says.

A level is compiled for processors that this one may not be. An inline function of a shared header, compiled for AVX in
one object and weak there, may be the copy that the linker keeps for the whole library: a crash on an older processor.
"""

from __future__ import annotations

import functools
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUBS = sorted(ROOT.glob("csrc/*/cpu_*.cpp"))
FLAGS = [
    "-O0",
    "-g0",
    "-std=c++20",
    "-fopenmp",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-Wall",
    "-Wno-psabi",
]

pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one SIMD level only on this processor"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump (binutils)"),
]

Objects = Callable[[Path], Path]


def call(*command: str) -> str:
    shown = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Objects]:
    """Every stub, compiled without inlining: what the inliner hides in one build it may emit in another."""
    folder = tmp_path_factory.mktemp("simd")

    def compile_stub(stub: Path) -> Path:
        target = folder / f"{stub.parent.name}_{stub.stem}.o"
        call("g++", *FLAGS, "-c", str(stub), "-o", str(target))
        return target

    with ThreadPoolExecutor(2) as pool:
        compiled = {stub: pool.submit(compile_stub, stub) for stub in STUBS}
        yield lambda stub: compiled[stub].result()


@functools.cache
def functions(binary: Path) -> dict[str, str]:
    """Demangled name -> disassembly."""
    parts = re.split(r"^[0-9a-f]+ <(.*)>:\n", call("objdump", "-dC", "--no-show-raw-insn", str(binary)), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def level_of(stub: Path) -> str:
    return stub.stem.removeprefix("cpu_")


def ids(stub: Path) -> str:
    return f"{stub.parent.name}-{level_of(stub)}"


AVX = re.compile(r"%[yz]mm|\bv[a-z0-9]+\s+.*%xmm")


def leaks(binary: Path, level: str) -> set[str]:
    """Functions compiled for a level that another object may define for a lower one, or call."""
    rows = re.findall(r"^[0-9a-f]+ ([A-Za-z]) (.*)$", call("nm", "-C", "--defined-only", str(binary)), re.M)
    code = functions(binary)
    # Baseline code may be shared; so may functions whose name holds the level, which no other object defines.
    shared = {name for kind, name in rows if kind in "WVu" and f"::{level}::" not in name}
    return {name for name in shared if AVX.search(code.get(name, ""))}


@pytest.mark.parametrize("stub", STUBS, ids=ids)
def test_no_other_function_is_compiled_for_the_level(stub: Path, objects: Objects) -> None:
    assert leaks(objects(stub), level_of(stub)) == set()


def test_leak_is_found(tmp_path: Path) -> None:
    (tmp_path / "leak.cpp").write_text(
        """
        #include "simd.h"
        namespace wgan_ext {
        inline double scaled(double x) { return 3 * x; }
        namespace WGAN_EXT_LEVEL {
        inline double twice(double x) { return scaled(x) + scaled(x); }
        }
        }
        double leak(double x) { return wgan_ext::WGAN_EXT_LEVEL::twice(x); }
        """
    )
    level = ["-DWGAN_EXT_LEVEL_AVX2", f"-I{ROOT / 'csrc'}"]
    call("g++", *FLAGS, *level, "-c", str(tmp_path / "leak.cpp"), "-o", str(tmp_path / "leak.o"))
    assert leaks(tmp_path / "leak.o", "avx2") == {"wgan_ext::scaled(double)"}


@pytest.mark.parametrize("stub", STUBS, ids=ids)
def test_code_is_of_its_level(stub: Path, objects: Objects) -> None:
    code = "".join(functions(objects(stub)).values())
    expected = {"portable": (False, False), "avx2": (True, False), "avx512": (True, True)}[level_of(stub)]
    found = (AVX.search(code) is not None, "%zmm" in code)
    assert found == expected
    if level_of(stub) == "avx2":
        assert "%ymm" in code
