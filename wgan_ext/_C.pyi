"""Types of the compiled extension (csrc/bindings.cpp)."""

from collections.abc import Callable, Sequence
from typing import Any

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
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    dim: int,
    n_power_iterations: int,
    eps: float,
    v_first: bool,
    target: float,
    shrink_only: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def spectral_norm_(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    dim: int,
    n_power_iterations: int,
    eps: float,
    v_first: bool,
    target: float,
    shrink_only: bool,
) -> Tensor: ...
def spectral_norm_group(
    weight: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    dim: Sequence[int],
    n_power_iterations: Sequence[int],
    eps: Sequence[float],
    v_first: Sequence[int],
    target: Sequence[float],
    shrink_only: Sequence[int],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]: ...
def spectral_norm_sigma(
    weight: Tensor, u: Tensor, v: Tensor, dim: int, n_power_iterations: int, eps: float, v_first: bool
) -> tuple[Tensor, Tensor, Tensor]: ...
def spectral_norm_fold_(
    weight: Tensor, u: Tensor, v: Tensor, dim: int, n_power_iterations: int, eps: float, v_first: bool
) -> tuple[Tensor, Tensor]: ...
def spectral_norm_backward(
    grad: Tensor | None,
    grad_sigma: Tensor | None,
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    dim: int,
    target: float,
    shrink_only: bool,
) -> Tensor: ...

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
    offsets_x: Tensor | None,
    offsets_y: Tensor | None,
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
    offsets_x: Tensor | None,
    offsets_y: Tensor | None,
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
    offsets_x: Tensor | None,
    offsets_y: Tensor | None,
) -> Tensor: ...
def sinkhorn_softmin(
    x: Tensor, y: Tensor, b: Tensor | None, g: Tensor, epsilon: Tensor, cost: str, power: float
) -> Tensor: ...
def sinkhorn_group(
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
    group: str,
    rank: int,
    counts_x: Sequence[int],
    counts_y: Sequence[int],
) -> tuple[Tensor, ...]: ...
def sinkhorn_divergence_group(
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
    group: str,
    rank: int,
    counts_x: Sequence[int],
    counts_y: Sequence[int],
) -> tuple[Tensor, ...]: ...

# memory
def empty_cache() -> int: ...

# autograd's graphs
def forget_leaves(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> None: ...

# what a plan depends on
def state_of(
    module: object, atoms: frozenset[Any], ignored: frozenset[str], frozen: Callable[[Any], Any]
) -> list[Any]: ...
def same_state(
    module: object,
    atoms: frozenset[Any],
    ignored: frozenset[str],
    frozen: Callable[[Any], Any],
    state: list[Any],
    references: dict[str, Any],
) -> bool: ...

# build facts
torch_version: tuple[int, int, int]
cuda_architectures: str
simd_level: str
