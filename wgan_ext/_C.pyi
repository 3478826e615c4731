"""Types of the compiled extension (csrc/bindings.cpp)."""

from collections.abc import Sequence

import torch
from torch import Tensor

# critic
def critic(
    x: Sequence[Tensor],
    parameters: Sequence[Tensor],
    program: Sequence[int],
    scalars: Sequence[float],
    mean_outputs: bool,
    scored: int,
    first: int,
    count: int,
    compute_dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, list[Tensor]]: ...
def critic_loss(
    x: Sequence[Tensor],
    parameters: Sequence[Tensor],
    program: Sequence[int],
    scalars: Sequence[float],
    mean_outputs: bool,
    real: int,
    scored: int,
    first: int,
    count: int,
    compute_dtype: torch.dtype,
    channels_last: bool,
    weight: float,
    target: float,
    one_sided: bool,
    power: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

# spectral
def spectral_norm(
    weight: Tensor, u: Tensor, v: Tensor, dim: int, n_power_iterations: int, eps: float, v_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def spectral_norm_backward(
    grad: Tensor | None, grad_sigma: Tensor | None, weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor, dim: int
) -> Tensor: ...
def spectral_norm_store_(u: Tensor, v: Tensor, new_u: Tensor, new_v: Tensor) -> None: ...

# sinkhorn
def sinkhorn(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    cost: str,
    power: float,
    rho_x: float | None,
    rho_y: float | None,
    epsilon: float | None,
    scaling: float | None,
    tol: float,
    max_iter: int,
    relaxation: float | None,
    memory_limit: int,
    f: Tensor | None,
    g: Tensor | None,
) -> tuple[Tensor, ...]: ...
def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    cost: str,
    power: float,
    rho_x: float | None,
    rho_y: float | None,
    epsilon: float | None,
    scaling: float | None,
    tol: float,
    max_iter: int,
    relaxation: float | None,
    memory_limit: int,
) -> tuple[Tensor, ...]: ...
def sinkhorn_matrix(
    C: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    rho_x: float | None,
    rho_y: float | None,
    epsilon: float | None,
    scaling: float | None,
    tol: float,
    max_iter: int,
    relaxation: float | None,
    f: Tensor | None,
    g: Tensor | None,
) -> tuple[Tensor, ...]: ...
def sinkhorn_transport(
    values: Tensor,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    f: Tensor,
    g: Tensor,
    epsilon: Tensor,
    cost: str,
    power: float,
    rho_x: float | None,
    rho_y: float | None,
) -> Tensor: ...
def sinkhorn_softmin(
    x: Tensor, y: Tensor, b: Tensor | None, g: Tensor, epsilon: Tensor, cost: str, power: float
) -> Tensor: ...

# build facts
torch_version: tuple[int, int, int]
cuda_architectures: str
simd_level: str
