"""What nvcc and its assembler say of the CUDA kernels, on machines with no GPU: warnings, spills, registers, loads."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
TOWERS = sorted(path.parent.name for path in CSRC.glob("*/cuda.cu"))
ARCHITECTURES = ["80", "90", "100", "120"]

REGISTERS_PER_SM = 65536
LEAST_WARPS_PER_SM = 8
"""A kernel keeps two warps ready for each of an SM's four schedulers, or memory latency is not hidden."""

# The kernels that read global memory 16 bytes at a time, as they promise: patterns of mangled names.
WIDE_LOADS = {
    "critic": [r"activate_kernelI\w+Lb1E", r"mask_kernelI\w+Lb1E"],
    "spectral": [
        *(rf"{name}_kernelI[fd]E" for name in ("rows", "columns", "quotient")),
        *(rf"{name}_kernelI(fLi4|dLi2)E" for name in ("inner_product", "gradient")),
    ],
    "sinkhorn": ["tensor_pass_kernel", r"(?<!tensor_)pass_kernelI[fd]\w+4CostE[0-3]E"],
}

INSTRUCTIONS = {
    "products": r"\bmma\.sync\.aligned\.m16n8k16\.",
    "matrices": r"\bldmatrix\.sync\.aligned\.m8n8\.x4\.",
    "powers": r"\bex2\.approx\.",
    "multiply-adds": r"\bfma\.rn\.f32\b",
}


def find_nvcc() -> Path | None:
    """The nvcc of CUDA_HOME, of PATH, or of the wheels in requirements-nvcc.txt."""
    if "CUDA_HOME" in os.environ:
        return Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc"
    on_path = shutil.which("nvcc")
    if on_path is not None:
        return Path(on_path)
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for nvcc in sorted(Path(folder).glob("cu*/bin/nvcc")):
            return nvcc
    return None


@pytest.fixture(scope="module")
def nvcc() -> Path:
    found = find_nvcc()
    if found is None:
        missing = "no nvcc here: python -m pip install -r tests/requirements-nvcc.txt (Linux only)"
        if os.environ.get("WGAN_EXT_REQUIRE_NVCC"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, mangled name, as assembled for one architecture."""

    name: str
    architecture: str
    registers: int
    spilled: int
    """Bytes of spill stores and loads."""
    stack: int
    """Bytes of local memory: arrays that could not be kept in registers."""
    block: int
    """The largest block it may be launched with."""
    wide_loads: int
    """16-byte loads from global memory."""
    counts: dict[str, int] = dataclasses.field(compare=False)
    """Of INSTRUCTIONS in the text of its PTX."""


ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'\n"
    r".*\n"
    r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*Used (\d+) registers"
)
PTX_ENTRY = re.compile(r"^\s*(?:\.visible |\.weak )*\.entry (\w+)\((.*?)^\}", re.MULTILINE | re.DOTALL)
WIDE_LOAD = re.compile(r"\bld\.global\S*\.(?:v4\.\w32|v2\.\w64|v8\.\w32|v4\.\w64)\b|\bcp\.async\.\S+\s[^;]*\b16\s*[,;]")


@functools.cache
def assemble(nvcc: Path, tower: str, folder: Path) -> list[Kernel]:
    """Compile a tower's kernels for every architecture, warnings as errors."""
    command = [str(nvcc), "-std=c++20", "-O3", "--threads=2", "-Werror", "all-warnings", "-Xcompiler=-Wall,-Wno-psabi"]
    for architecture in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    command += ["-Xptxas=-v", "--keep", "--keep-dir", str(folder), "-c", str(CSRC / tower / "cuda.cu")]
    shown = subprocess.run(
        [*command, "-o", str(folder / "cuda.o")], capture_output=True, text=True, timeout=900, check=False
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr

    blocks, loads, counts = {}, {}, {}
    for architecture in ARCHITECTURES:
        (ptx,) = folder.glob(f"cuda*compute_{architecture}*.ptx")
        for name, body in PTX_ENTRY.findall(ptx.read_text()):
            limit = re.search(r"\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", body)
            sizes = [int(size or 1) for size in limit.groups()] if limit else [1024]
            blocks[name, architecture] = functools.reduce(int.__mul__, sizes)
            loads[name, architecture] = len(WIDE_LOAD.findall(body))
            counts[name, architecture] = {what: len(re.findall(text, body)) for what, text in INSTRUCTIONS.items()}
    return [
        Kernel(
            name,
            arch,
            int(registers),
            int(stores) + int(reads),
            int(stack),
            blocks[name, arch],
            loads[name, arch],
            counts[name, arch],
        )
        for name, arch, stack, stores, reads, registers in ENTRY.findall(shown.stderr)
    ]


@pytest.fixture(scope="module", params=TOWERS)
def tower(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def kernels(nvcc: Path, tower: str, tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    return assemble(nvcc, tower, tmp_path_factory.mktemp(tower))


def listed(kernels: list[Kernel]) -> str:
    return "\n".join(map(str, kernels))


def test_every_architecture_is_assembled(kernels: list[Kernel]) -> None:
    per_architecture = {a: {k.name for k in kernels if k.architecture == a} for a in ARCHITECTURES}
    assert all(per_architecture.values())
    assert len(set(map(frozenset, per_architecture.values()))) == 1


def test_nothing_spills(kernels: list[Kernel]) -> None:
    spilling = [k for k in kernels if k.spilled or k.stack]
    assert not spilling, listed(spilling)


def test_registers_leave_warps_to_hide_latency(kernels: list[Kernel]) -> None:
    def warps(kernel: Kernel) -> int:
        granted = -(-kernel.registers // 8) * 8  # registers are given out in eights
        return REGISTERS_PER_SM // (granted * kernel.block) * kernel.block // 32

    starved = [k for k in kernels if warps(k) < LEAST_WARPS_PER_SM]
    assert not starved, listed(starved)


def test_promised_loads_are_16_bytes_wide(kernels: list[Kernel], tower: str) -> None:
    for pattern in WIDE_LOADS.get(tower, []):
        instances = [k for k in kernels if re.search(pattern, k.name)]
        assert instances, pattern
        narrow = [k for k in instances if not k.wide_loads]
        assert not narrow, listed(narrow)


@pytest.mark.parametrize("tower", ["sinkhorn"], indirect=True)
def test_products_of_sinkhorn_are_the_tensor_cores(kernels: list[Kernel]) -> None:
    """A warp has 2 x 4 tiles of products, three splits, and 32 dimensions a chunk, with and without a maximum.

    A lane's 4 rows of 8 columns each then take one instruction a power.
    """
    tensor = [k for k in kernels if "tensor_pass_kernel" in k.name]
    assert len(tensor) == 2 * len(ARCHITECTURES)
    for kernel in tensor:
        assert kernel.counts["products"] == 2 * (2 * 4 * 3 * 2), kernel
        assert kernel.counts["matrices"] == 2 * (4 + 4) * 2, kernel
        assert kernel.counts["powers"] >= 2 * 32, kernel


@pytest.mark.parametrize("tower", ["sinkhorn"], indirect=True)
def test_powers_of_sinkhorn_are_shared_with_the_multipliers(kernels: list[Kernel]) -> None:
    """A thread has 8 rows of 4 columns: of some rows, the fewer the more dimensions, one power is a polynomial."""
    for architecture in ARCHITECTURES:
        by_dim = {
            int(found[1]): k.counts
            for k in kernels
            if k.architecture == architecture
            and (found := re.search(r"(?<!r_)pass_kernelIf\w+4CostE0ELi(\d)E", k.name))
        }
        assert sorted(by_dim) == [0, 1, 2, 3, 4]
        for dim, rows in {1: 4, 2: 4, 3: 3, 4: 0}.items():
            assert by_dim[4]["powers"] - by_dim[dim]["powers"] == 2 * rows
            assert by_dim[dim]["multiply-adds"] >= 2 * (8 * 4 * dim + 5 * rows)
