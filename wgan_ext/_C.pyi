"""Types of the compiled extension (csrc/bindings.cpp)."""

from torch import Tensor

# critic

# spectral

# sinkhorn
def sinkhorn(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    cost: str,
    epsilon: float | None,
    scaling: float | None,
    tol: float,
    max_iter: int,
    relaxation: float | None,
    f: Tensor | None,
    g: Tensor | None,
) -> tuple[Tensor, ...]: ...
def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    cost: str,
    epsilon: float | None,
    scaling: float | None,
    tol: float,
    max_iter: int,
    relaxation: float | None,
) -> tuple[Tensor, ...]: ...
def sinkhorn_gradient(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, f: Tensor, g: Tensor, epsilon: Tensor, cost: str
) -> Tensor: ...
def sinkhorn_weight_gradient(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, f: Tensor, cost: str
) -> Tensor: ...

# build facts
torch_version: tuple[int, int, int]
cuda_architectures: str
simd_level: str
