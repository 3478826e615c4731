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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUBS = sorted(ROOT.glob("csrc/*/cpu_*.cpp"))
FLAGS = ["-g0", "-std=c++20", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wno-psabi"]

pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one SIMD level only on this processor"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump (binutils)"),
]

Objects = dict[tuple[Path, str], Path]


def call(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600, check=True).stdout


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Objects:
    """Every stub, as it is built, and without inlining: what the inliner hides today it may emit tomorrow."""
    folder = tmp_path_factory.mktemp("simd")

    def compile_stub(job: tuple[Path, str]) -> Path:
        stub, level = job
        target = folder / f"{stub.parent.name}_{stub.stem}{level}.o"
        call("g++", *FLAGS, level, "-c", str(stub), "-o", str(target))
        return target

    jobs = [(stub, level) for stub in STUBS for level in ("-O3", "-O0")]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(compile_stub, jobs), strict=True))


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


@pytest.mark.parametrize("optimisation", ["-O3", "-O0"])
@pytest.mark.parametrize("stub", STUBS, ids=ids)
def test_no_other_function_is_compiled_for_the_level(stub: Path, optimisation: str, objects: Objects) -> None:
    level = level_of(stub)
    binary = objects[stub, optimisation]
    rows = re.findall(r"^[0-9a-f]+ ([A-Za-z]) (.*)$", call("nm", "-C", "--defined-only", str(binary)), re.M)
    weak = {name for kind, name in rows if kind in "WVu"}
    code = functions(binary)
    # Baseline code may be shared; so may functions whose name holds the level, which no other object defines.
    shared = {name for name in weak if f"::{level}::" not in name}
    assert {name for name in shared if AVX.search(code.get(name, ""))} == set()


@pytest.mark.parametrize("stub", STUBS, ids=ids)
def test_code_is_of_its_level(stub: Path, objects: Objects) -> None:
    code = "".join(functions(objects[stub, "-O3"]).values())
    expected = {"portable": (False, False), "avx2": (True, False), "avx512": (True, True)}[level_of(stub)]
    found = (AVX.search(code) is not None, "%zmm" in code)
    assert found == expected
    if level_of(stub) == "avx2":
        assert "%ymm" in code
