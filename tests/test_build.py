from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import wgan_ext

PACKAGE = Path(wgan_ext.__file__).parent


def run(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in ``cwd``, where the package is found only if it lies there."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_build_info_tells_what_is_there() -> None:
    info = wgan_ext.build_info()
    assert info.torch == torch.__version__
    assert torch.__version__.startswith(info.torch_built)
    assert info.threads == torch.get_num_threads()
    assert info.devices[0] == "cpu"
    assert len(info.devices) == 1 + (torch.cuda.device_count() if info.cuda_architectures else 0)


def test_module_prints_build_info() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "wgan_ext"], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == str(wgan_ext.build_info())


def test_simd_level_can_be_lowered_only() -> None:
    def level(wanted: str) -> str:
        code = "import wgan_ext; print(wgan_ext.build_info().simd)"
        return run(code, PACKAGE.parent, WGAN_EXT_SIMD=wanted).stdout.strip()

    order = ["portable", "avx2", "avx512"]
    best = level("avx512")
    assert level("portable") == "portable"
    assert wgan_ext.build_info().simd == min(best, os.environ.get("WGAN_EXT_SIMD", "avx512"), key=order.index)


def test_unknown_simd_level_is_refused() -> None:
    shown = run("import wgan_ext", PACKAGE.parent, WGAN_EXT_SIMD="sse9")
    assert shown.returncode != 0
    assert "WGAN_EXT_SIMD must be portable, avx2 or avx512, got sse9" in shown.stderr


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    """A copy of the package without its extension."""
    shutil.copytree(PACKAGE, tmp_path / "wgan_ext", ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    return tmp_path


def test_unbuilt_checkout_says_what_to_run(unbuilt: Path) -> None:
    shown = run("import wgan_ext", unbuilt)
    assert "ImportError" in shown.stderr
    assert "make build" in shown.stderr


def test_other_torch_minor_version_is_refused(unbuilt: Path) -> None:
    stub = "torch_version = (1, 0, 0)\ncuda_architectures = ''\n"
    (unbuilt / "wgan_ext" / "_C.py").write_text(stub)
    shown = run("import wgan_ext", unbuilt)
    assert "built against torch 1.0 and cannot run with torch" in shown.stderr
