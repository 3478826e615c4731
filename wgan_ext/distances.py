"""Distances between distributions, computed exactly: Jensen-Shannon on a common support, Wasserstein on the line.

Weights and histograms are normalised to mass 1: a distance is one of distributions. Inputs of half precision are
computed and returned in float32. Bad values (NaN, infinite points, negative weights, no mass) raise on a CPU; on other
devices, where looking would synchronise, they give NaN.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ._checks import accumulation_dtype, check_floating, check_number, values_are_checked
from ._transforms import transformed

__all__ = ["js_divergence", "wasserstein_1d"]


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of histograms p and q over the same bins, in nats: between 0 and log 2.

    JS(p, q) = KL(p | m)/2 + KL(q | m)/2 with m = (p + q)/2 (Lin, Divergence measures based on the Shannon entropy,
    1991). Bins are the last dimension, [..., K]; the others broadcast and are the shape of the result. JS(p, p) is 0,
    disjoint supports give log 2 to the last bit, wherever they lie: that is why it cannot guide a generator.

    Differentiable to any order in p and q. The derivative in a bin that is exactly 0 is taken as 0: where the other
    histogram is positive the true one is -infinity, so gradients move mass within the support and never out of it.

    Raises:
        ValueError: no bins, numbers of bins that differ, batches that do not broadcast, different devices; on a CPU,
            bins that are negative or not finite, or a histogram without mass.
        TypeError: p and q are not floating-point tensors of one dtype.
    """
    check_floating("js_divergence", p=p, q=q)
    if p.dim() == 0 or q.dim() == 0 or p.shape[-1] != q.shape[-1] or p.shape[-1] == 0:
        raise ValueError(
            "js_divergence: p and q must have the same number of bins (at least 1) in the last dimension, "
            f"got shapes {tuple(p.shape)} and {tuple(q.shape)}"
        )
    _broadcast_batch("js_divergence", "p", p, "q", q)
    p, q = torch.where(p == 0, 0, p), torch.where(q == 0, 0, q)  # no gradient into an empty bin
    p, q = _distribution("js_divergence", "p", p), _distribution("js_divergence", "q", q)
    mass = p + q
    where = mass == 0
    total = torch.where(where, 1, mass)
    # Each bin's share of 1 bit is h = (r log2 r + s log2 s)/2 with r = 2p/mass, s = 2q/mass. Its terms cancel as
    # t = (p - q)/mass -> 0; those of h = (log(1 - t^2) + 2 t atanh t)/(2 log 2) do not.
    t = (p - q) / total
    near = t.abs() < 0.5
    t = torch.where(near, t, 0)
    near_share = (torch.log1p(-t.square()) + 2 * t * torch.atanh(t)) * (0.5 / math.log(2))
    r = torch.where(near | where, 1, 2 * p / total)
    s = torch.where(near | where, 1, 2 * q / total)
    far_share = 0.5 * (_x_log2_x(r) + _x_log2_x(s))
    share = torch.where(near, near_share, far_share)
    # A weighted mean of shares between 0 and 1, so that rounding cannot leave [0, log 2].
    return math.log(2) * ((mass * share).sum(-1) / mass.sum(-1))


def wasserstein_1d(x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None, p: float = 1.0) -> Tensor:
    """Exact Wasserstein-p distance W_p (the root taken, not its p-th power) of weighted samples on the line.

    W_p^p = integral over t in (0, 1) of |F^-1(t) - G^-1(t)|^p, F and G being the distribution functions of x and y:
    sorting is the optimal plan (Peyre and Cuturi, Computational Optimal Transport, 2019, section 2.6).
    Points x [..., N], y [..., M]; weights a [..., N] and b [..., M], 1/N and 1/M if None. All but the last dimension
    broadcast and are the shape of the result. p >= 1. Costs a sort; with weights, masses are summed in float64.

    Differentiable to any order almost everywhere, in points and weights; where points coincide the derivative is one of
    the subgradients, and 0 at distance 0 if p > 1.

    Raises:
        ValueError: no points, weights that do not fit their points, batches that do not broadcast, different devices,
            p < 1 or not finite; on a CPU, points that are not finite, weights that are negative, not finite or all 0.
        TypeError: arguments are not floating-point tensors of one dtype.
    """
    weights = {name: weight for name, weight in (("a", a), ("b", b)) if weight is not None}
    check_floating("wasserstein_1d", x=x, y=y, **weights)
    check_number("wasserstein_1d", "p", p)
    if not 1 <= p < math.inf:
        raise ValueError(f"wasserstein_1d: p must be finite and at least 1, got {p}")
    for name, points in (("x", x), ("y", y)):
        if points.dim() == 0 or points.shape[-1] == 0:
            raise ValueError(
                f"wasserstein_1d: {name} must have points in its last dimension, got shape {tuple(points.shape)}"
            )
    for name, weight in weights.items():
        points_name, points = ("x", x) if name == "a" else ("y", y)
        if weight.dim() == 0 or weight.shape[-1] != points.shape[-1]:
            raise ValueError(
                f"wasserstein_1d: {name} must have one weight for each point of {points_name} {tuple(points.shape)}, "
                f"got shape {tuple(weight.shape)}"
            )
    batch = _broadcast_batch("wasserstein_1d", "x", x, "y", y, "a", a, "b", b)
    x, y = x.to(accumulation_dtype(x.dtype)), y.to(accumulation_dtype(y.dtype))
    if a is None and b is None:
        return _uniform(x, y, p)
    a = _distribution("wasserstein_1d", "a", x.new_ones(x.shape[-1]) if a is None else a)
    b = _distribution("wasserstein_1d", "b", y.new_ones(y.shape[-1]) if b is None else b)
    x, a = x.expand(*batch, -1), a.expand(*batch, -1)
    y, b = y.expand(*batch, -1), b.expand(*batch, -1)
    return _area_between(x, y, a, b) if p == 1 else _weighted(x, y, a, b, p)


def _uniform(x: Tensor, y: Tensor, p: float) -> Tensor:
    """W_p of samples of equal weights: the i-th faces the i-th, or, if N != M, over the steps of both quantiles."""
    x, y = _sorted_values("x", x), _sorted_values("y", y)
    n, m = x.shape[-1], y.shape[-1]
    if n == m:
        return _power_mean(x - y, None, p)
    # The steps are at multiples of 1/n and 1/m, whole numbers of 1/lcm: who faces whom is known without looking.
    unit = math.lcm(n, m)
    steps = [torch.arange(k, device=x.device) * (unit // k) for k in (n, m)]
    start, _ = torch.cat(steps).sort()
    length = torch.cat([start, start.new_full((1,), unit)]).diff().to(torch.float64) / unit
    return _power_mean(x[..., start // (unit // n)] - y[..., start // (unit // m)], length.to(x.dtype), p)


def _area_between(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """W_1 of weighted samples: the area between the two distribution functions, after one sort of all points."""
    points, order = _sorted("x and y", torch.cat([x, y], -1))
    height = torch.cat([a, -b], -1).gather(-1, order).cumsum(-1, dtype=torch.float64)[..., :-1]
    return (height.abs().to(x.dtype) * points.diff()).sum(-1)


def _weighted(x: Tensor, y: Tensor, a: Tensor, b: Tensor, p: float) -> Tensor:
    """W_p of weighted samples, over the steps of both quantile functions."""
    x, order_x = _sorted("x", x)
    y, order_y = _sorted("y", y)
    end_x = a.gather(-1, order_x).cumsum(-1, dtype=torch.float64)
    end_y = b.gather(-1, order_y).cumsum(-1, dtype=torch.float64)
    end, _ = torch.cat([end_x, end_y], -1).sort(-1)
    length = torch.cat([end[..., :1], end.diff()], -1).to(x.dtype)
    i = torch.searchsorted(end_x.detach(), end.detach()).clamp_(max=x.shape[-1] - 1)  # the last sums round apart
    j = torch.searchsorted(end_y.detach(), end.detach()).clamp_(max=y.shape[-1] - 1)
    return _power_mean(x.gather(-1, i) - y.gather(-1, j), length, p)


def _power_mean(difference: Tensor, weights: Tensor | None, p: float) -> Tensor:
    """(sum of weights |difference|^p)^(1/p) over the last dimension, without overflow; its derivative at 0 is 0."""
    if p == 1:
        distance = difference.abs()
        return distance.mean(-1) if weights is None else (distance * weights).sum(-1)
    scale = difference.detach().abs().amax(-1, keepdim=True)  # homogeneous in it, so it needs no derivative
    scale = torch.where(scale == 0, 1, scale)
    ratio = difference / scale
    powers = ratio.square() if p == 2 else ratio.abs().pow(p)
    mean = powers.mean(-1) if weights is None else (powers * weights).sum(-1)
    zero = mean == 0
    return scale.squeeze(-1) * torch.where(zero, 0, torch.where(zero, 1, mean).pow(1 / p))


def _sorted(name: str, points: Tensor) -> tuple[Tensor, Tensor]:
    """The points in order, and the order."""
    if _numpy_can_sort(points):
        order = torch.from_numpy(np.argsort(points.detach().numpy(), -1))
        values = points.gather(-1, order)
    else:
        values, order = points.sort(-1)
    _check_sorted(name, values)
    return values, order


def _sorted_values(name: str, points: Tensor) -> Tensor:
    """The points in order."""
    if (torch.is_grad_enabled() and points.requires_grad) or not _numpy_can_sort(points):
        return _sorted(name, points)[0]
    values = torch.from_numpy(np.sort(points.detach().numpy(), -1))
    _check_sorted(name, values)
    return values


def _numpy_can_sort(points: Tensor) -> bool:
    """Whether NumPy may do it: 10^6 floats take it 3 ms, their order 19; torch's sort, which makes both, 70."""
    plain = type(points) in (Tensor, torch.nn.Parameter) and points.device.type == "cpu"
    if not plain or torch.compiler.is_compiling() or transformed():
        return False
    return torch._C._get_tracing_state() is None and torch._C._len_torch_dispatch_stack() == 0


def _check_sorted(name: str, values: Tensor) -> None:
    # NaN is sorted last and infinities to the ends, so the ends answer for all.
    if values_are_checked(values) and not values.detach()[..., [0, -1]].isfinite().all():
        raise ValueError(f"wasserstein_1d: {name} must be finite")


def _distribution(function: str, name: str, weights: Tensor) -> Tensor:
    weights = weights.to(accumulation_dtype(weights.dtype))
    total = weights.sum(-1, keepdim=True)
    if values_are_checked(weights):
        if not total.isfinite().all():
            raise ValueError(f"{function}: {name} must be finite")
        if (weights < 0).any():
            raise ValueError(f"{function}: {name} must not be negative")
        if not total.all():
            raise ValueError(f"{function}: {name} must have positive mass")
    return weights / total


def _broadcast_batch(function: str, *named: str | Tensor | None) -> torch.Size:
    """The common shape of all dimensions but the last of alternating names and tensors."""
    given = [(name, t.shape[:-1]) for name, t in zip(named[::2], named[1::2], strict=True) if isinstance(t, Tensor)]
    try:
        return torch.broadcast_shapes(*(shape for _, shape in given))  # type: ignore[no-any-return, no-untyped-call]
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in given)
        raise ValueError(f"{function}: batch dimensions must broadcast, got {shapes}") from error


def _x_log2_x(x: Tensor) -> Tensor:
    return x * torch.where(x == 0, 1, x).log2()
