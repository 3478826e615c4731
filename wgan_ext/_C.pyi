"""Types of the compiled extension (csrc/bindings.cpp)."""

from collections.abc import Sequence

import torch
from torch import Tensor

# critic
def critic_input_gradient(
    x: Tensor,
    parameters: Sequence[Tensor],
    program: Sequence[int],
    slopes: Sequence[float],
    mean_outputs: bool,
    compute_dtype: torch.dtype,
    channels_last: bool,
) -> Tensor: ...

# spectral

# sinkhorn

# build facts
torch_version: tuple[int, int, int]
cuda_architectures: str
simd_level: str
