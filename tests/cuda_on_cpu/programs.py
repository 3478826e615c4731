"""Building and running the programs here: a tower's CUDA kernels as host C++, under the sanitizers."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
TOWERS = sorted(path.parent.name for path in CSRC.glob("*/cuda.cu"))
TOWER_SOURCES = ["csrc/{tower}/cuda.cu", "csrc/{tower}/cpu_portable.cpp", "tests/cuda_on_cpu/{tower}.cpp"]
GROUND_SOURCES = ["tests/cuda_on_cpu/serial.cpp", "csrc/simd.cpp"]

FLAGS = ["-std=c++20", "-O1", "-g", "-DWGAN_EXT_EMULATED"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unknown-pragmas"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    # Alignment again: the red zones of AddressSanitizer align shared arrays better than CUDA does.
    "thread": ["-fsanitize=thread,alignment", "-fno-sanitize-recover=all"],
    "none": [],
}
REFUSED = 70  # kRefused of emulator.h
TIMED_OUT = 124

Shown = subprocess.CompletedProcess[str]


def call(command: list[str], seconds: float = 600, **environment: str) -> Shown:
    """Run a command; one that takes too long has TIMED_OUT for its status."""
    try:
        return subprocess.run(
            command,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, TIMED_OUT, f"still running after {seconds:.0f} s")


def sources_of(program: str) -> list[str]:
    """Return what a program is compiled from: a tower's, or one of a single source."""
    if program not in TOWERS:
        return [f"tests/cuda_on_cpu/{program}.cpp"]
    return [name.format(tower=program) for name in TOWER_SOURCES] + GROUND_SOURCES


class Programs:
    """Compiles programs into a folder, each source once for each sanitizer."""

    def __init__(self, folder: Path, pool: Executor) -> None:
        self.folder, self.pool = folder, pool
        self.objects: dict[tuple[str, str], Future[Shown]] = {}

    def compile(self, name: str, sanitizer: str, root: Path, output: Path, warnings: Sequence[str] = WARNINGS) -> Shown:
        """Compile one source of the tree at ``root``."""
        csrc = root / "csrc"
        includes = [f"-I{csrc}", f"-I{csrc / 'cuda'}", f"-I{HERE}"]
        command = ["g++", *FLAGS, *warnings, *SANITIZERS[sanitizer], *includes, "-c", "-x", "c++"]
        return call([*command, str(root / name), "-o", str(output)])

    def start(self, name: str, sanitizer: str) -> Path:
        """Begin to compile a source, unless it is or was, and say where it goes."""
        output = self.folder / f"{name.replace('/', '_')}_{sanitizer}.o"
        if (name, sanitizer) not in self.objects:
            self.objects[name, sanitizer] = self.pool.submit(self.compile, name, sanitizer, ROOT, output)
        return output

    def link(self, objects: list[Path], sanitizer: str, binary: Path) -> Path:
        """Link a program."""
        shown = call(["g++", *SANITIZERS[sanitizer], *map(str, objects), "-o", str(binary)])
        assert shown.returncode == 0, shown.stdout
        return binary

    def finished(self, names: list[str], sanitizer: str) -> list[Path]:
        """Return the objects of these sources, compiled."""
        objects = [self.start(name, sanitizer) for name in names]
        for name in names:
            shown = self.objects[name, sanitizer].result()
            assert shown.returncode == 0, shown.stdout
        return objects

    def build(self, program: str, sanitizer: str) -> Path:
        """Return a program's binary, built unless it was."""
        binary = self.folder / f"{program}_{sanitizer}"
        if not binary.exists():
            self.link(self.finished(sources_of(program), sanitizer), sanitizer, binary)
        return binary


@functools.cache
def fixed_addresses() -> list[str]:
    """Run a program without address randomisation, which some versions of ThreadSanitizer cannot map around."""
    command = ["setarch", platform.machine(), "-R"]
    works = shutil.which("setarch") is not None and call([*command, "true"]).returncode == 0
    return command if works else []


def run(binary: Path, argument: str = "", order: str = "forward", seconds: float = 600) -> Shown:
    """Run a program, its threads and blocks in this order."""
    prefix = fixed_addresses() if binary.name.endswith("_thread") else []
    return call(
        [*prefix, str(binary), *argument.split()],
        seconds,
        WGAN_EXT_EMULATED_ORDER=order,
        ASAN_OPTIONS="detect_leaks=1",
        UBSAN_OPTIONS="print_stacktrace=1",
        TSAN_OPTIONS="halt_on_error=1",
    )


def kernels_of(*patterns: str) -> set[str]:
    """Names of the ``__global__`` functions in these CUDA sources of ``csrc``; with none, in all."""
    names = set()
    for path in sorted({path for pattern in patterns or ("**/*.cu*",) for path in CSRC.glob(pattern)}):
        text = re.sub(r"//.*|/\*.*?\*/", "", path.read_text(), flags=re.MULTILINE)
        text = re.sub(r"__launch_bounds__\s*(\((?:[^()]|\([^()]*\))*\))", "", text)
        names.update(re.findall(r"__global__\s+void\s+(\w+)\s*\(", text))
        assert len(re.findall(r"\b__global__\b", text)) == len(re.findall(r"__global__\s+void\s+\w+\s*\(", text)), path
    return names


def kernels_in(output: str) -> str:
    """What a program says of the kernels that it ran: their names, template arguments included."""
    return "\n".join(re.findall(r"^emulated kernel (.*): \d+ launches$", output, re.MULTILINE))
