"""Builds the extension wgan_ext._C: for the CPU always, for CUDA where nvcc and a CUDA build of torch are at hand."""

import os
import platform
import warnings
from pathlib import Path

import torch
from setuptools import setup

with warnings.catch_warnings():  # torch warns of a missing nvcc on machines that need none
    warnings.simplefilter("ignore")
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"

with_cuda = CUDA_HOME is not None and torch.version.cuda is not None
if with_cuda:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)

patterns = ["*.cpp", "*/[!c]*.cpp", "*/cpu_portable.cpp"]  # cpu.cpp is included by its stubs, one a SIMD level
if platform.machine() in ("x86_64", "AMD64"):
    patterns += ["*/cpu_avx2.cpp", "*/cpu_avx512.cpp"]
if with_cuda:
    patterns += ["*/cuda.cu"]
sources = sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))
headers = sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu"))

macros = [("AT_PARALLEL_OPENMP", "1")]
if with_cuda:
    architectures = os.environ["TORCH_CUDA_ARCH_LIST"]
    macros += [("WGAN_EXT_CUDA", None), ("WGAN_EXT_CUDA_ARCHITECTURES", f'"{architectures}"')]
flags = ["-O3", "-g0", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wno-psabi"]

setup(
    ext_modules=[
        (CUDAExtension if with_cuda else CppExtension)(
            "wgan_ext._C",
            sources,
            depends=headers,
            define_macros=macros,
            extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden"]},
            extra_link_args=["-fopenmp", "-s"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
