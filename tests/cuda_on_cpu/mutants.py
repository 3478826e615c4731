"""Seeds faults into the CUDA sources, one at a time, and demands that the emulator's tests find each.

    python tests/cuda_on_cpu/mutants.py              # all of them; `make mutants`
    python tests/cuda_on_cpu/mutants.py spectral     # those whose file or description has the word

Each fault is run as the tests run: wrong results first, which compile soonest, then under AddressSanitizer and
ThreadSanitizer. The last column says who found it. Exit status 1: a fault survived. A fault whose text is not found
exactly once is an error: the source has moved on, and so must the fault.

Faults that only change speed, or that another guard makes harmless, are left out. What orders memory between the blocks
of a launch (the fences of `is_last`) is left out too: the emulator runs block by block.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import programs
from programs import REFUSED, ROOT, TIMED_OUT, TOWERS

CRITIC, SPECTRAL, SINKHORN = (f"csrc/{tower}/cuda.cu" for tower in ("critic", "spectral", "sinkhorn"))
REDUCE = "csrc/cuda/reduce.cuh"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A fault: in this file, the old text becomes the new one."""

    path: str
    old: str
    new: str
    what: str

    def text(self) -> str:
        """The source with the fault in it."""
        source = (ROOT / self.path).read_text()
        found = source.count(self.old)
        if found != 1:
            raise ValueError(f"{self.path}: {self.what}: its text is found {found} times, not once:\n{self.old}")
        return source.replace(self.old, self.new)

    def towers(self) -> list[str]:
        """Whose programs should find it."""
        return [tower for tower in TOWERS if self.path == f"csrc/{tower}/cuda.cu"] or TOWERS


MUTANTS = [
    # the ground floor
    Mutant(REDUCE, "int offset = kWarp / 2;", "int offset = kWarp / 4;", "half a warp is left out of its reduction"),
    Mutant(REDUCE, "  __syncthreads();\n", "", "no barrier between writing and reading a block's scratch"),
    Mutant(
        REDUCE,
        "lane < static_cast<int>(blockDim.x) / kWarp ? scratch[lane] : identity",
        "scratch[lane]",
        "scratch of warps that do not exist is reduced",
    ),
    Mutant(
        REDUCE,
        "lane < static_cast<int>(blockDim.x) / kWarp ?",
        "lane < static_cast<int>(blockDim.x) / kWarp - 1 ?",
        "the last warp is left out of a block's reduction",
    ),
    Mutant(REDUCE, "return a < b ? b : a;", "return a < b ? a : b;", "the maximum is a minimum"),
    Mutant(
        REDUCE,
        "scratch[threadIdx.x / kWarp] = value;",
        "scratch[threadIdx.x % kWarp] = value;",
        "all warps write one place of the scratch",
    ),
    # critic
    Mutant(CRITIC, "i < n ? widen(p[i])", "i <= n ? widen(p[i])", "a tail is loaded one element too long"),
    Mutant(CRITIC, "if (i < n) narrow(p[i], values[i]);", "narrow(p[i], values[i]);", "a tail is stored without guard"),
    Mutant(CRITIC, "slope == 0 ? C(0) : value * slope", "value * slope", "relu multiplies an infinity by 0"),
    Mutant(CRITIC, "positive = !(values[i] <= 0)", "positive = values[i] > 0", "NaN does not pass an activation"),
    Mutant(CRITIC, "<< i;\n      values", "<< (7 - i);\n      values", "signs are packed in reverse"),
    Mutant(CRITIC, "row % in_rows * columns", "row * columns", "a broadcast row is not taken again"),
    Mutant(CRITIC, "row += gridDim.y * depth", "row += depth", "blocks redo rows of others"),
    Mutant(CRITIC, "row += gridDim.y * depth", "row += 2 * gridDim.y * depth", "every other turn over rows is skipped"),
    Mutant(
        CRITIC,
        "byte += int64_t{gridDim.x} * width)",
        "byte += 2 * int64_t{gridDim.x} * width)",
        "every other turn over bytes is skipped",
    ),
    Mutant(CRITIC, "is_aligned(z) && ", "", "wide loads of a misaligned input"),
    Mutant(CRITIC, " && is_aligned(bias)", "", "wide loads of a misaligned bias"),
    Mutant(CRITIC, " && is_aligned(h))", ")", "wide stores to a misaligned output"),
    Mutant(CRITIC, "is_aligned(in) && ", "", "wide loads of a misaligned mask"),
    Mutant(CRITIC, " && is_aligned(out))", ")", "wide stores to a misaligned mask"),
    Mutant(
        CRITIC, "row < rows; row += gridDim.x) {", "row < rows; row += 2 * gridDim.x) {", "every other norm is skipped"
    ),
    Mutant(
        CRITIC,
        "scratch, 0.0);\n      __syncthreads();\n    }",
        "scratch, 0.0);\n    }",
        "the sum may overtake the maximum in the same scratch",
    ),
    Mutant(
        CRITIC,
        "ComputeT<T>(scale * sqrt(sum)));\n    __syncthreads();",
        "ComputeT<T>(scale * sqrt(sum)));",
        "the next row may overtake this one in the same scratch",
    ),
    Mutant(
        CRITIC,
        "i < columns; i += kThreads) largest",
        "i < columns; i += columns) largest",
        "only the first elements of a row are looked at for its scale",
    ),
    Mutant(
        CRITIC,
        "i < columns; i += kThreads) {",
        "i < columns; i += kThreads / 2) {",
        "elements beyond a block's width are added twice",
    ),
    # spectral
    Mutant(SPECTRAL, "    if (last) *ticket = 0;\n", "", "tickets are not zero for the next launch"),
    Mutant(
        SPECTRAL,
        "is_last(shared.tickets + item.tiles, item.tiles)",
        "is_last(shared.tickets + item.tiles, item.tiles - 1)",
        "a product's length is found one tile too soon",
    ),
    Mutant(
        SPECTRAL,
        "is_last(shared.tickets + block, item.splits)",
        "is_last(shared.tickets + block, item.splits - 1)",
        "splits are summed one too soon",
    ),
    Mutant(SPECTRAL, "item.with ? item.with[i] : total", "total", "sigma without an iteration is no product with u"),
    Mutant(
        SPECTRAL,
        "o * (shape.rows - 1) * shape.inner + c;\n    Pack",
        "o * shape.rows * shape.inner + c;\n    Pack",
        "the outer stride is a row too long in W x",
    ),
    Mutant(
        SPECTRAL,
        "c / shape.inner * (shape.rows - 1) * shape.inner + c;",
        "c / shape.inner * (shape.rows - 1) + c;",
        "the outer stride is too short in W^T x",
    ),
    Mutant(SPECTRAL, "      if (first + k >= shape.rows) break;\n", "", "rows past the end are read"),
    Mutant(
        SPECTRAL,
        "if (lane == 0 && first + k < shape.rows) item",
        "if (lane == 0) item",
        "rows past the end are written, over the next split",
    ),
    Mutant(
        SPECTRAL,
        "ceil_div(ceil_div(width, P), item.splits) * P",
        "ceil_div(width, item.splits)",
        "splits begin between packs",
    ),
    Mutant(
        SPECTRAL,
        "sums[warp][lane * P + j] = total[j];\n  __syncthreads();",
        "sums[warp][lane * P + j] = total[j];",
        "no barrier between the warps' sums and their sum",
    ),
    Mutant(
        SPECTRAL,
        "i < kWarp * P && tile + i < width;",
        "i < kWarp * P;",
        "columns past the end are written, over the next split",
    ),
    Mutant(SPECTRAL, "  if (c < width) {", "  if (c <= width) {", "a column past the end is read"),
    Mutant(SPECTRAL, "r += kWarps)", "r += kWarps / 2)", "rows are added twice in W^T x"),
    Mutant(SPECTRAL, "  if (found == 0) found = item.eps;\n", "", "a weight of zeros is divided by 0"),
    Mutant(
        SPECTRAL,
        "item.s_length && item.s_length->inverse > 0 ?",
        "item.s_length ?",
        "v of a weight of zeros is not what it was",
    ),
    Mutant(
        SPECTRAL,
        "blockIdx.x >= group.items[i + 1].first_block",
        "blockIdx.x > group.items[i + 1].first_block",
        "a weight's first block works on the weight before",
    ),
    Mutant(SPECTRAL, "int64_t i = index * P;", "int64_t i = index;", "packs of the quotient overlap, misaligned"),
    Mutant(
        SPECTRAL,
        "const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * P;\n  T total",
        "const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;\n  T total",
        "<grad, W> adds elements twice when its loop turns",
    ),
    Mutant(SPECTRAL, "u[row - o * shape.rows]", "u[row]", "u is read past its end where outer > 1"),
    Mutant(
        SPECTRAL,
        "v + o * shape.inner + (i - row * shape.inner)",
        "v + (i - row * shape.inner)",
        "the gradient takes v of the first outer slice",
    ),
    Mutant(
        SPECTRAL, "return shape.inner % kPack<T> == 0;", "return true;", "packs are loaded where rows are not multiples"
    ),
    Mutant(
        SPECTRAL,
        "    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;\n",
        "    static_cast<void>(pointer);\n",
        "packs are loaded from misaligned weights",
    ),
    # Sinkhorn
    Mutant(SINKHORN, "width : problem * size", "width : 0", "packing writes the first problem only"),
    Mutant(SINKHORN, "? offsets[problem] :", "? 0 :", "packing reads the first problem of a ragged batch only"),
    Mutant(SINKHORN, "i < count && d < dim ? points", "d < dim ? points", "packing reads past the points"),
    Mutant(
        SINKHORN,
        "ground.transposed ? j * rows.count + i",
        "ground.transposed ? j * columns.count + i",
        "a transposed matrix has the stride of the other side",
    ),
    Mutant(
        SINKHORN,
        "return ground.matrix + int64_t{blockIdx.z} * rows.count * columns.count;",
        "static_cast<void>(rows), static_cast<void>(columns);\n  return ground.matrix;",
        "every problem takes the first one's costs",
    ),
    Mutant(
        SINKHORN,
        "sum.most, scratch, T(2 * kLogZero));\n  __syncthreads();",
        "sum.most, scratch, T(2 * kLogZero));",
        "a row done again: the sum may overtake the maximum in the same scratch",
    ),
    Mutant(SINKHORN, "if (__syncthreads_or(redo)) {", "if (redo) {", "a barrier that not all threads reach"),
    Mutant(
        SINKHORN,
        "const Sums mine = i < rows.count ? update_row(*control, rows, role, i, level) : Sums{};",
        "const Sums mine = update_row(*control, rows, role, i, level);",
        "rows past the end are updated",
    ),
    Mutant(SINKHORN, "sums.relaxed_error, scratch[1]", "sums.relaxed_error, scratch[0]", "two sums share a scratch"),
    Mutant(
        SINKHORN,
        "      write_bias(cloud, i, cloud.potential[i], scale);\n    else\n      cloud.bias[i] = T(kLogZero);",
        "      write_bias(cloud, i, cloud.potential[i], scale);\n    else\n      cloud.bias[i] = T(0);",
        "padding has mass",
    ),
    Mutant(
        SINKHORN,
        "role == Role::self ? next : cloud.softmin[i] + shift",
        "role == Role::self ? next : cloud.softmin[i]",
        "a translation leaves the exponents' shift behind",
    ),
    Mutant(
        SINKHORN,
        "cloud.start[i] = role == Role::rows ? cloud.softmin[i] : cloud.potential[i];",
        "cloud.start[i] = cloud.potential[i];",
        "rows keep the wrong start",
    ),
    Mutant(SINKHORN, "combine(mine, sums[int64_t{blockIdx.z} * count + k])", "combine(mine, sums[k])", "wrong problem"),
    Mutant(
        SINKHORN,
        "going = __syncthreads_or(going);",
        "going = __any_sync(kFullMask, going);",
        "a poll looks at the first warp's problems only",
    ),
    Mutant(SINKHORN, "if (from + d < width) quad", "quad", "a tile is read past the dimensions"),
    Mutant(SINKHORN, "offset = kSide / 2;", "offset = kSide / 4;", "half the threads of a row are left out of its sum"),
    Mutant(
        SINKHORN,
        "y.value[c]);\n          }\n      }\n      __syncthreads();",
        "y.value[c]);\n          }\n      }",
        "no barrier before a tile of columns is overwritten",
    ),
    Mutant(
        SINKHORN,
        "from, T(1), shared.columns);\n      __syncthreads();",
        "from, T(1), shared.columns);",
        "no barrier between loading a tile and its use",
    ),
    Mutant(
        SINKHORN,
        "rows.scratch + blockIdx.y * rows.padded + row(r)",
        "rows.scratch + blockIdx.y * rows.count + row(r)",
        "ranges of columns overlap in the scratch",
    ),
    Mutant(
        SINKHORN,
        "if (row(r) < rows.count && j < columns.count) pair",
        "if (row(r) < rows.count) pair",
        "a matrix is read past its end",
    ),
    Mutant(
        SINKHORN,
        "tiles * range / ranges, last",
        "tiles * range / ranges + (range > 1), last",
        "a tile between two ranges is left out",
    ),
    Mutant(
        SINKHORN, "k < size; k += stride()", "k < size; k += 2 * stride()", "every other turn of packing is not made"
    ),
    Mutant(
        SINKHORN,
        "i < cloud.count; i += stride()",
        "i < cloud.count; i += 2 * stride()",
        "every other turn of an update is skipped",
    ),
    Mutant(SINKHORN, "if (d < out_width) out[", "out[", "dimensions past the end are written"),
    Mutant(
        SINKHORN,
        "if (i >= rows.count) continue;\n    if (derivative",
        "if (derivative",
        "rows past the end are written",
    ),
    Mutant(
        SINKHORN,
        "      __syncthreads();\n#pragma unroll 1\n      for (int k = threadIdx.x; k < kForceRows * kDepth",
        "#pragma unroll 1\n      for (int k = threadIdx.x; k < kForceRows * kDepth",
        "no barrier before points in shared memory are overwritten",
    ),
    Mutant(
        SINKHORN,
        ": T(0);\n    }\n    __syncthreads();",
        ": T(0);\n    }",
        "no barrier between the plan's entries and their use",
    ),
    Mutant(
        SINKHORN,
        "values + all_columns.first_padded(blockIdx.z) * source_width",
        "values + all_columns.first(blockIdx.z) * source_width",
        "a batch's values are read at the wrong stride",
    ),
]

# Sanitizer, argument, order: what the tests run, what compiles soonest first.
STAGES = [
    ("none", "small", "forward"),
    ("none", "", "forward"),
    ("none", "small", "reverse"),
    ("address", "small", "forward"),
    ("address", "", "forward"),
    ("thread", "small", "forward"),
]


def finder(shown: programs.Shown) -> str:
    """Who found the fault, from what the program printed and its status."""
    if shown.returncode == REFUSED:
        return "the emulator refuses: " + shown.stdout.split("emulator: ")[-1].split(": ", 2)[-1].splitlines()[0][:60]
    if shown.returncode == TIMED_OUT:
        return "it does not end"
    report = re.search(r"(Address|Thread)Sanitizer: ([\w-]+(?: race)?)|runtime error: (.*)", shown.stdout)
    if report:
        return report[0][:70]
    return "wrong results" if re.search(r"comparisons, [1-9]", shown.stdout) else f"exit status {shown.returncode}"


class Hunt:
    """Builds programs with a fault in them, and else of what was compiled without it."""

    def __init__(self, pristine: programs.Programs) -> None:
        self.pristine = pristine

    def build(self, tower: str, sanitizer: str, tree: Path) -> Path | str:
        """Return a tower's program, compiled from a tree with the fault in it; or what the compiler says."""
        objects = []
        for name in programs.sources_of(tower):
            if name != f"csrc/{tower}/cuda.cu":
                objects += self.pristine.finished([name], sanitizer)
                continue
            objects.append(tree / f"{tower}_{sanitizer}.o")
            shown = self.pristine.compile(name, sanitizer, tree, objects[-1], warnings=[])
            if shown.returncode != 0:
                return shown.stdout
        return self.pristine.link(objects, sanitizer, tree / f"{tower}_{sanitizer}")

    def found(self, mutant: Mutant, stages: Iterable[tuple[str, str, str]] = STAGES) -> str | None:
        """Who finds the fault, or None: it survived."""
        with tempfile.TemporaryDirectory(dir=self.pristine.folder) as folder:
            tree = Path(folder)
            shutil.copytree(ROOT / "csrc", tree / "csrc")
            (tree / mutant.path).write_text(mutant.text())
            built: dict[tuple[str, str], Path] = {}
            for sanitizer, argument, order in stages:
                for tower in mutant.towers():
                    if (tower, sanitizer) not in built:
                        binary = self.build(tower, sanitizer, tree)
                        if isinstance(binary, str):
                            raise ValueError(f"{mutant.path}: {mutant.what}: does not compile:\n{binary}")
                        built[tower, sanitizer] = binary
                    shown = programs.run(built[tower, sanitizer], argument, order, seconds=200)
                    if shown.returncode != 0:
                        return f"{tower}, {finder(shown)}" + (", last thread first" if order == "reverse" else "")
        return None


def main() -> int:
    """Run the faults that are asked for; return the exit status."""
    words = sys.argv[1:]
    chosen = [m for m in MUTANTS if all(word in f"{m.path} {m.what}" for word in words)]
    for mutant in MUTANTS:
        mutant.text()
    begun, survivors = time.monotonic(), 0
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(os.cpu_count()) as compiling,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        pristine = programs.Programs(Path(folder), compiling)
        for tower in sorted({tower for mutant in chosen for tower in mutant.towers()}):
            shown = programs.run(pristine.build(tower, "none"))
            if shown.returncode != 0:
                print(f"{tower} fails without any fault:\n{shown.stdout[-2000:]}")
                return 1
        hunt = Hunt(pristine)
        for mutant, found in zip(chosen, pool.map(hunt.found, chosen), strict=True):
            survivors += found is None
            print(f"{mutant.path:24} {mutant.what:72} {found or 'SURVIVED'}", flush=True)
    print(f"{len(chosen)} faults, {survivors} survived, {time.monotonic() - begun:.0f} s")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
