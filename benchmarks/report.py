"""Run the benchmarks and print what they say: one table for each benchmark, one row for each contest.

    python benchmarks/report.py benchmarks/results/*.json    # print tables
    python benchmarks/report.py --run                        # measure, keep the JSON, print
    python benchmarks/report.py --run -k spectral            # what follows goes to pytest; JSON is not kept
    python benchmarks/report.py --write FILE...              # and put the tables into docs/performance.md

A cell is the median time of a call, half its interquartile range in percent, and the time as a multiple of wgan_ext's.
A second table has what else was measured: multiply-adds, how near they come to the best rate, and memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "performance.md"
MARKERS = ("<!-- benchmarks -->", "<!-- /benchmarks -->")
OURS = "wgan_ext"
LEGEND = """\
Median time of a call, half its interquartile range, and the time as a multiple of wgan_ext's. Pairs give wgan_ext's
figure first. Multiply-adds: of all matrix products and convolutions, against those that autograd computes. Best rate:
that of wgan_ext's products timed one by one, each in its best layout and batch; the share of it is what the whole call
reaches. Peak memory: of tensors during a call, above what they take after it, against that of the fastest other."""


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of a call: the median and the interquartile range of its rounds, and the ratio to wgan_ext's."""

    median: float
    iqr: float
    ratio: float

    def __str__(self) -> str:
        unit, scale = next((u, s) for u, s in (("s", 1), ("ms", 1e-3), ("us", 1e-6)) if self.median >= s or u == "us")
        value = self.median / scale
        digits = 0 if value >= 100 else 1 if value >= 10 else 2
        return f"{value:.{digits}f} {unit} ± {50 * self.iqr / self.median:.0f} %"


@dataclasses.dataclass(frozen=True)
class Contest:
    """The times of all contestants, and what else is known of them."""

    times: dict[str, Time]
    peak_bytes: dict[str, int]
    multiply_adds: dict[str, int]
    floor_seconds: float | None

    def fastest_other(self) -> str:
        """The name of the fastest contestant but wgan_ext."""
        return min((name for name in self.times if name != OURS), key=lambda name: self.times[name].ratio)


# machine -> (benchmark file, test) -> contest by its name
Tables = dict[str, dict[tuple[str, str], dict[str, Contest]]]


def machine_name(facts: dict[str, Any]) -> str:
    """One line that names the machine and what ran on it."""
    parts = [facts["gpu"]] if "gpu" in facts else []
    parts += [f"{facts['processor']} ({facts['threads']} threads, {facts['simd']})", f"torch {facts['torch']}"]
    return ", ".join([*parts, str(facts["date"])])


def collect(runs: Iterable[dict[str, Any]]) -> Tables:
    """Collect what pytest-benchmark's JSON files hold."""
    tables: Tables = {}
    for data in runs:
        benchmarks = tables.setdefault(machine_name(data["machine_info"]), {})
        for entry in data["benchmarks"]:
            facts = entry["extra_info"]
            rows = facts["contestants"]
            stem, test = re.findall(r"bench_(\w+)\.py::(\w+)", entry["fullname"])[0]
            benchmarks.setdefault((stem, test), {})[entry["group"]] = Contest(
                times={name: Time(row["median"], row["iqr"], row["ratio"]) for name, row in rows.items()},
                peak_bytes={name: row["peak_bytes"] for name, row in rows.items() if "peak_bytes" in row},
                multiply_adds=facts.get("multiply_adds", {}),
                floor_seconds=facts.get("floor_seconds"),
            )
    return tables


def scaled(number: float, unit: str) -> str:
    """Three digits with a prefix of thousands."""
    prefix, scale = next((p, s) for p, s in (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1)) if number >= s or s == 1)
    value = number / scale
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {prefix}{unit}".rstrip()


def times(title: str, contests: dict[str, Contest]) -> list[list[str]]:
    """The table of times."""
    rivals = dict.fromkeys(name for contest in contests.values() for name in contest.times if name != OURS)
    rows = [[title, OURS, *rivals]]
    for name, contest in contests.items():
        found = contest.times
        cells = [f"{found[rival]} ({found[rival].ratio:.2f}x)" if rival in found else "" for rival in rivals]
        rows.append([name, str(found[OURS]), *cells])
    return rows


def details(title: str, contests: dict[str, Contest]) -> list[list[str]]:
    """The table of what else was measured, without the columns that nothing is known for."""
    rows = [
        [f"{title}: products and memory", "fastest other", "multiply-adds", "share of the best rate", "peak memory"]
    ]
    for name, contest in contests.items():
        fastest, products, peak = contest.fastest_other(), contest.multiply_adds, contest.peak_bytes
        rate = ""
        if contest.floor_seconds is not None:
            best = scaled(2 * products[OURS] / contest.floor_seconds, "FLOP/s")
            rate = f"{100 * contest.floor_seconds / contest.times[OURS].median:.0f} % of {best}"
        rows.append(
            [
                name,
                f"{fastest} ({contest.times[fastest].ratio:.2f}x)",
                " / ".join(scaled(count, "") for count in products.values()),
                rate,
                f"{scaled(peak[OURS], 'B')} / {scaled(peak[fastest], 'B')}" if peak else "",
            ]
        )
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    return [list(row) for row in zip(*columns, strict=True)]


def render(tables: Tables) -> str:
    """Markdown: the machine, then the tables of each benchmark."""
    lines = []
    for machine, benchmarks in sorted(tables.items()):
        lines += [f"{machine}:", ""]
        for (stem, _), contests in sorted(benchmarks.items(), key=lambda item: item[0][0]):
            title = stem.replace("_", " ")
            found = [times(title, contests)]
            if any(contest.multiply_adds or contest.peak_bytes for contest in contests.values()):
                found.append(details(title, contests))
            for head, *rows in found:
                lines += [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
                lines += [f"| {' | '.join(row)} |" for row in rows]
                lines.append("")
    lines.append(LEGEND)
    return "\n".join(lines)


def write(text: str) -> None:
    """Replace what stands between the markers of docs/performance.md."""
    before, rest = PAGE.read_text().split(MARKERS[0])
    _, after = rest.split(MARKERS[1])
    PAGE.write_text(f"{before}{MARKERS[0]}\n{text}\n{MARKERS[1]}{after}")


def measure(pytest_options: list[str]) -> dict[str, Any]:
    """Run the benchmarks; a whole run is kept under the name of the device."""
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "pytest", "-q", f"--benchmark-json={measured}"]
        command += pytest_options + sorted(map(str, HERE.glob("bench_*.py")))
        status = subprocess.run(command, cwd=HERE.parent, check=False).returncode
        if status != 0:
            raise SystemExit(status)
        data: dict[str, Any] = json.loads(measured.read_text())
    for entry in data["benchmarks"]:
        del entry["stats"]["data"]  # every round of ours alone
    if not pytest_options:
        facts = data["machine_info"]
        device = facts.get("gpu", f"{facts['processor']} {facts['threads']} threads")
        RESULTS.mkdir(exist_ok=True)
        target = RESULTS / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")
        target.write_text(json.dumps(data, indent=1) + "\n")
    return data


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="JSON files of pytest-benchmark")
    parser.add_argument("--run", action="store_true", help="measure first; what follows goes to pytest")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    arguments = sys.argv[1:]
    split = arguments.index("--run") + 1 if "--run" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    if options.run:
        runs = [measure(arguments[split:])]
    else:
        runs = [json.loads(path.read_text()) for path in options.files or sorted(RESULTS.glob("*.json"))]
    text = render(collect(runs))
    if options.write:
        write(text)
    print(text)


if __name__ == "__main__":
    main()
