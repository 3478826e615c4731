"""Run the benchmarks and print what they say: one table for each file, one row for each contest.

    python benchmarks/report.py benchmarks/results/*.json    # print tables
    python benchmarks/report.py --run                        # measure, keep the JSON, print
    python benchmarks/report.py --run -k spectral            # what follows goes to pytest; JSON is not kept
    python benchmarks/report.py --write FILE...              # and put the tables into docs/performance.md

A cell is the median time of a call, half its interquartile range in percent, and the time as a multiple of wgan_ext's.
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


# machine -> benchmark file -> contest -> contestant -> its time
Tables = dict[str, dict[str, dict[str, dict[str, Time]]]]


def machine_name(facts: dict[str, Any]) -> str:
    """One line that names the machine and what ran on it."""
    parts = [facts["gpu"]] if "gpu" in facts else []
    parts += [f"{facts['processor']} ({facts['threads']} threads, {facts['simd']})", f"torch {facts['torch']}"]
    return ", ".join([*parts, str(facts["date"])])


def collect(runs: Iterable[dict[str, Any]]) -> Tables:
    """Collect what pytest-benchmark's JSON files hold."""
    tables: Tables = {}
    for data in runs:
        files = tables.setdefault(machine_name(data["machine_info"]), {})
        for entry in data["benchmarks"]:
            stem = re.sub(r".*bench_(\w+)\.py.*", r"\1", entry["fullname"])
            files.setdefault(stem, {})[entry["group"]] = {
                name: Time(row["median"], row["iqr"], row["ratio"])
                for name, row in entry["extra_info"]["contestants"].items()
            }
    return tables


def render(tables: Tables) -> str:
    """Markdown: the machine, then a table for each benchmark file."""
    lines = []
    for machine, files in sorted(tables.items()):
        lines += [f"{machine}:", ""]
        for stem, contests in sorted(files.items()):
            rivals = dict.fromkeys(name for row in contests.values() for name in row if name != OURS)
            lines.append(f"| {' | '.join([stem.replace('_', ' '), OURS, *rivals])} |")
            lines.append(f"| --- | ---: |{' ---: |' * len(rivals)}")
            for contest, row in contests.items():
                cells = [f"{row[name]} ({row[name].ratio:.2f}x)" if name in row else "" for name in rivals]
                lines.append(f"| {' | '.join([contest, str(row[OURS]), *cells])} |")
            lines.append("")
    lines.append("Median time of a call, half its interquartile range, and the time as a multiple of wgan_ext's.")
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
