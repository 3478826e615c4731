"""The benchmark report, on figures that are known."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "report.py"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "report", module)  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def run(**contests: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """One JSON file of pytest-benchmark with medians and ratios of the contestants."""
    return {
        "machine_info": {"processor": "P", "threads": 2, "simd": "avx2", "torch": "2.13.0", "date": "2026-11-22"},
        "benchmarks": [
            {
                "fullname": f"benchmarks/bench_{contest.split('_')[0]}.py::test_it[{contest}]",
                "group": f"{contest}, cpu",
                "extra_info": {
                    "contestants": {
                        name: {"median": median, "iqr": median / 5, "ratio": ratio, "calls": 1}
                        for name, (median, ratio) in rows.items()
                    }
                },
            }
            for contest, rows in contests.items()
        ],
    }


def test_tables_hold_times_and_ratios(report: ModuleType) -> None:
    data = run(
        norm_a={"wgan_ext": (2e-3, 1), "torch": (5e-3, 2.5)},
        norm_b={"wgan_ext": (3e-6, 1), "torch": (1.5e-6, 0.5), "compiled": (3.3, 1.1e6)},
    )
    lines = report.render(report.collect([data])).splitlines()
    assert lines[:6] == [
        "P (2 threads, avx2), torch 2.13.0, 2026-11-22:",
        "",
        "| norm | wgan_ext | torch | compiled |",
        "| --- | ---: | ---: | ---: |",
        "| norm_a, cpu | 2.00 ms ± 10 % | 5.00 ms ± 10 % (2.50x) |  |",
        "| norm_b, cpu | 3.00 us ± 10 % | 1.50 us ± 10 % (0.50x) | 3.30 s ± 10 % (1100000.00x) |",
    ]


def test_benchmarks_of_one_file_have_tables_of_their_own(report: ModuleType) -> None:
    data = run(norm_a={"wgan_ext": (1, 1), "torch": (2, 2)}, norm_b={"wgan_ext": (1, 1), "dense": (3, 3)})
    for entry, test in zip(data["benchmarks"], ["test_z", "test_a"], strict=True):
        entry["fullname"] = f"benchmarks/bench_norm.py::{test}[cpu]"
    text = report.render(report.collect([data]))
    assert text.index("| norm | wgan_ext | torch |") < text.index("| norm | wgan_ext | dense |")


def test_details_show_the_fastest_other_products_rate_and_memory(report: ModuleType) -> None:
    data = run(
        norm_a={"wgan_ext": (2e-3, 1), "torch": (5e-3, 2.5), "compiled": (3e-3, 1.5)},
        norm_b={"wgan_ext": (1, 1), "torch": (1, 1)},
    )
    known, plain = (entry["extra_info"] for entry in data["benchmarks"])
    for contestants in (known["contestants"], plain["contestants"]):
        for i, row in enumerate(contestants.values()):
            row["peak_bytes"] = 1234 * 1000**i
    known |= {"multiply_adds": {"wgan_ext": 4e9, "autograd": 65e8}, "floor_seconds": 1.5e-3}
    lines = report.render(report.collect([data])).splitlines()
    assert lines[7:11] == [
        "| norm: products and memory | fastest other | multiply-adds | share of the best rate | peak memory |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| norm_a, cpu | compiled (1.50x) | 4.00 G / 6.50 G | 75 % of 5333 GFLOP/s | 1.23 kB / 1.23 GB |",
        "| norm_b, cpu | torch (1.00x) |  |  | 1.23 kB / 1.23 MB |",
    ]


def test_write_replaces_what_is_between_the_markers(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, results = tmp_path / "performance.md", tmp_path / "machine.json"
    page.write_text("before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n")
    results.write_text(json.dumps(run(norm_a={"wgan_ext": (1, 1)})))
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["report.py", "--write", str(results)])
    report.main()
    text = page.read_text()
    assert text.startswith("before\n<!-- benchmarks -->\nP (2 threads")
    assert text.endswith("\n<!-- /benchmarks -->\nafter\n")
    assert "old" not in text
    assert capsys.readouterr().out.strip() in text
