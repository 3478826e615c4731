"""The specification, in plain torch: slow, obvious, differentiable by autograd to any order.

Tests and benchmarks call it; the library never does.
"""

from __future__ import annotations

import torch
from torch import Tensor

# critic

# spectral


def spectral_norm(
    weight: Tensor, u: Tensor, v: Tensor, dim: int = 0, n_power_iterations: int = 1, v_first: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return W / sigma, u, v and sigma = u . (W v) after power iterations on weight seen as a matrix.

    The rows of W are the dimension ``dim`` of weight, its columns all others. With ``v_first`` an iteration is
    v = W^T u / |W^T u|, u = W v / |W v|, as in torch.nn.utils.spectral_norm, else u first and then v, as in
    torch.nn.utils.parametrizations. In derivatives u and v are constants.
    """
    matrix = weight.movedim(dim, 0).flatten(1) if weight.dim() > 1 else weight[:, None]
    with torch.no_grad():
        for _ in range(n_power_iterations):
            if v_first:
                v = torch.nn.functional.normalize(matrix.T @ u, dim=0)
            u = torch.nn.functional.normalize(matrix @ v, dim=0)
            if not v_first:
                v = torch.nn.functional.normalize(matrix.T @ u, dim=0)
    sigma = u @ (matrix @ v)
    return weight / sigma, u, v, sigma


# sinkhorn
