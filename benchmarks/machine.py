"""Which machine measured."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path

import torch

import wgan_ext


def processor() -> str:
    """The processor's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def facts() -> dict[str, object]:
    """What a reader must know to place the figures; no host names, no paths."""
    info = wgan_ext.build_info()
    known: dict[str, object] = {
        "processor": processor(),
        "threads": info.threads,
        "simd": info.simd,
        "system": platform.system(),
        "python": info.python,
        "torch": info.torch,
        "wgan_ext": info.version,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    if torch.cuda.is_available():
        known["gpu"] = torch.cuda.get_device_name()
        known["cuda"] = torch.version.cuda
    return known
