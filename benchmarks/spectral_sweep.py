"""Sweep spectral_norm over shapes from 1 x 1 to 8192 x 8192, against torch and against the bytes that must move.

    python benchmarks/spectral_sweep.py     # docs/spectral_sweep.png and benchmarks/spectral_sweep.json

A forward must read W twice and write W / sigma once. The floor is the time that this takes at the rate at which torch
multiplies a tensor of this size into memory that is there (one read, one write); what a multiplication into fresh
memory takes longer, its page faults, is measured apart.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import machine
import torch
from contestant import Contestant
from matplotlib.figure import Figure
from torch import nn
from torch.nn import utils as torch_utils

import wgan_ext

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "spectral_sweep.png"
NUMBERS = HERE / "spectral_sweep.json"

SIZES = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SHAPES = {
    "square": [(n, n) for n in SIZES],
    "wide": [(max(n // 16, 1), n) for n in SIZES] + [(1, 8192), (16, 8192)],
    "tall": [(n, max(n // 16, 1)) for n in SIZES] + [(8192, 1), (8192, 16)],
}
ROUNDS = (7, 25)
SECONDS = 0.3  # of each contestant and shape


def hook_of(layer: nn.Module, normalize: Callable[[nn.Module], nn.Module]) -> Callable[[], object]:
    layer = normalize(copy.deepcopy(layer))
    (hook,) = layer._forward_pre_hooks.values()
    return lambda: hook(layer, ())


def measure(rows: int, columns: int, device: torch.device) -> dict[str, float]:
    """Medians of interleaved rounds, in seconds; and of their ratios."""
    layer = nn.Linear(columns, rows, bias=False, device=device)
    weight, there = layer.weight.detach(), torch.empty(rows, columns, device=device)
    calls: dict[str, Callable[[], object]] = {
        "wgan_ext": hook_of(layer, wgan_ext.spectral_norm),
        "torch": hook_of(layer, torch_utils.spectral_norm),
        "multiplication": lambda: torch.mul(weight, 0.5, out=there),
        "multiplication, fresh": lambda: weight * 0.5,
    }
    contestants = {name: Contestant(call, device) for name, call in calls.items()}
    longest = max([contestant.calibrate() for contestant in contestants.values()])
    for _ in range(min(max(int(SECONDS / longest), ROUNDS[0]), ROUNDS[1])):
        for contestant in contestants.values():
            contestant()
    seconds = {name: contestant.seconds for name, contestant in contestants.items()}
    figures = {name: statistics.median(values) for name, values in seconds.items()}
    pairs = zip(seconds["torch"], seconds["wgan_ext"], strict=True)
    return {
        "rows": rows,
        "columns": columns,
        "megabytes": 4e-6 * rows * columns,
        **figures,
        "floor": 1.5 * figures["multiplication"],
        "ratio": statistics.median(a / b for a, b in pairs),
    }


def draw(results: dict[str, list[dict[str, float]]]) -> None:
    """Write the picture."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, rows), colour in zip(results.items(), ("tab:blue", "tab:orange", "tab:green"), strict=True):
        rows = sorted(rows, key=lambda row: row["megabytes"])
        size = [row["megabytes"] for row in rows]
        left.plot(size, [row["ratio"] for row in rows], color=colour, marker=".", label=name)
        large = [row for row in rows if row["megabytes"] >= 1]
        size = [row["megabytes"] for row in large]
        right.plot(size, [row["wgan_ext"] / row["floor"] for row in large], color=colour, marker=".", label=name)
        faults = [(row["multiplication, fresh"] - row["multiplication"]) / row["floor"] for row in large]
        right.plot(size, faults, color=colour, linestyle=":")
    left.axhline(1, color="tab:gray", linestyle=":")
    left.set_title("torch's time over ours, one forward")
    left.set_yscale("log", base=2)
    right.axhline(1.5, color="tab:gray", linestyle=":")
    right.set_title("our time over the floor; dotted: page faults of fresh memory")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("megabytes of the weight, float32")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(PICTURE, dpi=100)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    torch.manual_seed(0)
    results: dict[str, list[dict[str, float]]] = {}
    for name, shapes in SHAPES.items():
        results[name] = []
        for rows, columns in shapes:
            row = measure(rows, columns, options.device)
            results[name].append(row)
            print(
                f"{rows:5d} x {columns:5d}  {row['wgan_ext'] * 1e6:9.1f} us  torch {row['torch'] * 1e6:9.1f} us "
                f"{row['ratio']:6.2f}x  {row['wgan_ext'] / row['floor']:6.2f} floors",
                flush=True,
            )
    draw(results)
    numbers = {"machine": machine.facts(), "device": options.device.type, **results}
    NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
