"""What was built, what was found, and what will be used."""

from __future__ import annotations

import dataclasses
import platform

import torch

from . import _C


@dataclasses.dataclass(frozen=True)
class BuildInfo:
    """The facts of this build and this machine; ``str`` prints one to a line."""

    version: str
    python: str
    torch: str
    """The torch that runs now."""
    torch_built: str
    """The torch that the extension was built against."""
    cuda_architectures: tuple[str, ...]
    """What the CUDA kernels were compiled for; empty if they were not built."""
    devices: tuple[str, ...]
    """What the operators run on, here and now."""
    simd: str
    """The vector level of the CPU kernels: avx512, avx2 or portable. WGAN_EXT_SIMD lowers it."""
    threads: int
    """torch.get_num_threads(): what the CPU kernels use."""

    def __str__(self) -> str:
        rows = (
            ("wgan_ext", self.version),
            ("python", self.python),
            ("torch", f"{self.torch} (built against {self.torch_built})"),
            ("cuda kernels", " ".join(self.cuda_architectures) or "not built"),
            ("devices", ", ".join(self.devices)),
            ("simd", self.simd),
            ("threads", str(self.threads)),
        )
        return "\n".join(f"{name:<13}{value}" for name, value in rows)


def build_info() -> BuildInfo:
    """Return versions, CUDA architectures, SIMD level, threads and the devices that will be used."""
    from . import __version__

    architectures = tuple(_C.cuda_architectures.replace(";", " ").split())
    devices = ["cpu"]
    if architectures and torch.cuda.is_available():
        devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return BuildInfo(
        version=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        torch_built=".".join(map(str, _C.torch_version)),
        cuda_architectures=architectures,
        devices=tuple(devices),
        simd=_C.simd_level,
        threads=torch.get_num_threads(),
    )


def check_build() -> None:
    """Raise ImportError if torch is not of the minor version that the extension was built against."""
    running = torch.__version__.split("+")[0].split(".")[:2]
    built = [str(part) for part in _C.torch_version[:2]]
    if running != built:
        raise ImportError(
            f"wgan_ext was built against torch {'.'.join(built)} and cannot run with torch {torch.__version__}: "
            "build it again with `make build` in a checkout, or `pip install --no-build-isolation .`"
        )


check_build()  # on import, before the towers look for their operators
