"""The specification, in plain torch: slow, obvious, differentiable by autograd to any order.

Tests and benchmarks call it; the library never does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ._ops import Function, Kind, Pad, Resize

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
    channels_last: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """What the operator of this name computes: the scores of all rows, and their gradients at some, from a program.

    Args:
        x: The critic's inputs, each [R, ...]: the values 0, 1, ... of the program.
        parameters: The tensors that the program names, all that does not depend on x.
        program: The records, see ``_ops.Kind``.
        scalars: The numbers that the program names.
        mean_outputs: A row's outputs are averaged, not summed, to its score.
        scored: The number of rows, the first ones, whose scores are wanted.
        first: The first row whose gradients are wanted.
        count: Their number.
        compute_dtype: What x and the parameters are cast to.
        channels_last: A matter of speed.

    Returns:
        The scores, [scored], and d score / d x for each x, [count, ...]; in float64 for float64 x, else in float32.
        They can be differentiated to any order if grad mode is on.
    """
    dtype = torch.promote_types(x[0].dtype, torch.float32)
    grad_mode = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x[0].device.type, enabled=False):
        points = [t.view_as(t) if t.requires_grad and grad_mode else t.detach().clone().requires_grad_() for t in x]
        values = [t.to(compute_dtype) for t in points]
        effective = [t.to(compute_dtype) for t in parameters]
        for kind, payload, sizes in _records(program):
            value = _value(kind, payload, sizes, values, effective, scalars)
            if list(value.shape[1:]) != sizes:
                raise ValueError(f"{kind.name} of value {len(values)} is {list(value.shape[1:])}, not {sizes}")
            values.append(value)
        outputs = values[-1].reshape(len(x[0]), -1).to(dtype)
        total = outputs.mean(1) if mean_outputs else outputs.sum(1)
        gradients = torch.autograd.grad(total.sum(), points, create_graph=grad_mode, materialize_grads=True)
    if not grad_mode:
        total = total.detach()
    return total[:scored], [g[first : first + count].to(dtype) for g in gradients]


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the operator of this name computes from the results of ``critic``, which explains the other arguments.

    Args:
        x: As there.
        parameters: As there.
        program: As there.
        scalars: As there.
        mean_outputs: As there.
        real: The number of scored rows, the first ones, that are real samples; the others are fake ones.
        scored: As there.
        first: As there.
        count: As there.
        compute_dtype: As there.
        channels_last: As there.
        weight: What the penalty is multiplied by in the loss.
        target: The norm that is not penalised.
        one_sided: Smaller norms are not penalised either.
        power: The power of the distance to the target, at least 1.

    Returns:
        The loss: mean score of the fake rows minus that of the real ones, if any are scored, plus weight times the
        penalty; the penalty, a mean over samples; the scores; the norms of the gradients, [count]. Only the loss can be
        differentiated.
    """
    scores, gradients = critic(
        x, parameters, program, scalars, mean_outputs, scored, first, count, compute_dtype, channels_last
    )
    norms = torch.linalg.vector_norm(torch.cat([g.reshape(count, -1) for g in gradients], 1), dim=1)
    excess = norms - target
    penalty = ((excess.clamp_min(0) if one_sided else excess.abs()) ** power).mean()
    loss = weight * penalty
    if scored:
        loss = loss + scores[real:].mean() - scores[:real].mean()
    return loss, penalty.detach(), scores.detach(), norms.detach()


def _records(program: Sequence[int]) -> Iterator[tuple[Kind, list[int], list[int]]]:
    """Each record's kind, payload and sizes."""
    rest = list(program)
    while rest:
        kind, n, *rest = rest
        payload, d, rest = rest[:n], rest[n], rest[n + 1 :]
        yield Kind(kind), payload, rest[:d]
        rest = rest[d:]


def _value(
    kind: Kind,
    payload: list[int],
    sizes: list[int],
    values: list[Tensor],
    parameters: list[Tensor],
    scalars: Sequence[float],
) -> Tensor:
    """The value that one record makes."""
    if kind == Kind.CONSTANT:
        P = parameters[payload[0]]
        return P.expand(len(values[0]), *P.shape[1:])
    if kind == Kind.CAT:
        dim, *numbers = payload
        return torch.cat([values[i] for i in numbers], dim)
    h, (_, *rest) = values[payload[0]], payload
    nd = h.dim() - 2

    def parameter(i: int) -> Tensor | None:
        return None if i < 0 else parameters[i]

    def of_dimension(name: str) -> Callable[..., Tensor]:
        function: Callable[..., Tensor] = getattr(F, f"{name}{nd}d")
        return function

    def spatial(i: int, n: int) -> list[list[int]]:
        """Give n lists of one integer a spatial dimension."""
        return [rest[j : j + nd] for j in range(i, i + n * nd, nd)]

    if kind == Kind.LINEAR:
        return F.linear(h, parameters[rest[0]], parameter(rest[1]))
    if kind == Kind.CONVOLUTION:
        W, bias, transposed, groups = rest[:4]
        stride, padding, dilation, output_padding = spatial(4, 4)
        return torch.convolution(
            h, parameters[W], parameter(bias), stride, padding, dilation, bool(transposed), output_padding, groups
        )
    if kind == Kind.RESHAPE:
        return h.reshape(len(h), *sizes)
    if kind == Kind.PERMUTE:
        return h.permute(rest)
    if kind == Kind.ACTIVATION:
        return _activation(Function(rest[0]), h, scalars[rest[1] :])
    if kind == Kind.PRELU:
        return F.prelu(h, parameters[rest[0]].flatten())
    if kind == Kind.MAX_POOL:
        return of_dimension("max_pool")(h, *spatial(0, 4), ceil_mode=bool(rest[4 * nd]))
    if kind == Kind.AVG_POOL:
        ceil, count_include_pad, divisor = rest[3 * nd :]
        options = [bool(ceil), bool(count_include_pad)] + ([divisor or None] if nd > 1 else [])
        return of_dimension("avg_pool")(h, *spatial(0, 3), *options)
    if kind == Kind.ADAPTIVE_AVG_POOL:
        return of_dimension("adaptive_avg_pool")(h, sizes[1:])
    if kind == Kind.RESIZE:
        mode, align_corners, s = rest
        name = {
            Resize.NEAREST: f"nearest{nd}d",
            Resize.LINEAR: ("linear1d", "bilinear2d", "trilinear3d")[nd - 1],
            Resize.CUBIC: "bicubic2d",
        }[Resize(mode)]
        corners = () if mode == Resize.NEAREST else (bool(align_corners),)
        scales = [factor or None for factor in scalars[s : s + nd]]
        resized: Tensor = getattr(torch.ops.aten, f"upsample_{name}")(h, sizes[1:], *corners, *scales)
        return resized
    if kind == Kind.PAD:
        mode, s, *pads = rest
        constant = {"value": scalars[s]} if mode == Pad.CONSTANT else {}
        return F.pad(h, pads, Pad(mode).name.lower(), **constant)
    if kind == Kind.ADD:
        return h + scalars[rest[1]] * values[rest[0]]
    if kind == Kind.AFFINE:
        return scalars[rest[0]] * h + scalars[rest[0] + 1]
    if kind == Kind.MULTIPLY_PARAMETER:
        return h * parameters[rest[0]]
    if kind == Kind.SUM:
        return h.sum(rest[1:], keepdim=bool(rest[0]))
    if kind == Kind.MAX:
        return h.max(rest[0], keepdim=bool(rest[1])).values
    if kind == Kind.MULTIPLY:
        return h * values[rest[0]]
    if kind == Kind.NORMALIZE:
        return F.layer_norm(h, h.shape[-rest[0] :], eps=scalars[rest[1]])
    if kind == Kind.NARROW:
        return h.narrow(*rest)
    assert kind == Kind.EXPAND, kind
    return h.expand(-1, *sizes)


def _activation(function: Function, h: Tensor, scalars: Sequence[float]) -> Tensor:
    match function:
        case Function.LEAKY_RELU:
            return F.leaky_relu(h, scalars[0])
        case Function.HARDTANH:
            return F.hardtanh(h, scalars[0], scalars[1])
        case Function.SOFTPLUS:
            return F.softplus(h, scalars[0], scalars[1])
        case Function.ELU:
            elu: Tensor = torch.ops.aten.elu(h, *scalars[:3])
            return elu
        case Function.GELU_TANH:
            return F.gelu(h, approximate="tanh")
    functions: dict[Function, Callable[[Tensor], Tensor]] = {
        Function.SILU: F.silu,
        Function.GELU: F.gelu,
        Function.TANH: torch.tanh,
        Function.SIGMOID: torch.sigmoid,
        Function.MISH: F.mish,
        Function.ABS: torch.abs,
    }
    return functions[function](h)


def input_gradient(critic: Callable[[Tensor], Tensor], x: Tensor, output_reduction: str = "sum") -> Tensor:
    """dD/dx of every sample, with the graph that a second differentiation needs."""
    x = x.detach().requires_grad_()
    scores = critic(x)
    total = scores.sum() if output_reduction == "sum" else scores.sum() * x.shape[0] / scores.numel()
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    return gradient


def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    target: float = 1.0,
    one_sided: bool = False,
    power: float = 2.0,
    p: float = 2.0,
    reduction: str = "mean",
    output_reduction: str = "sum",
    mask: Tensor | None = None,
) -> Tensor:
    """Gulrajani et al. 2017, eq. 3, at the points x, and its variants; differentiated by double backward."""
    gradient = input_gradient(critic, x, output_reduction)
    if mask is not None:
        gradient = gradient * mask
    excess = torch.linalg.vector_norm(gradient.flatten(1), p, dim=1) - target
    penalty: Tensor = (excess.clamp_min(0) if one_sided else excess.abs()) ** power
    if reduction == "mean":
        return penalty.mean()
    return {"sum": penalty.sum(), "max": penalty.amax(), "none": penalty}[reduction]


# spectral


def spectral_norm(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    dim: int = 0,
    n_power_iterations: int = 1,
    v_first: bool = True,
    target: float = 1.0,
    shrink_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return W / d, u, v and sigma = u . (W v) after power iterations on weight seen as a matrix.

    The divisor d is sigma / target, so that target is the norm of W / d; or 1 with ``shrink_only`` if that is less.

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
    divisor = weight.new_ones(()) if shrink_only and sigma <= target else sigma / target
    return weight / divisor, u, v, sigma


# sinkhorn


def transport_cost_matrix(x: Tensor, y: Tensor, cost: str | float = "sqeuclidean") -> Tensor:
    """Return C, shape (N, M), by differences; the derivative of a distance is 0 at 0. A number is a power of it."""
    differences = x[:, None] - y[None]
    squares = differences.square().sum(-1)
    match cost:
        case "sqeuclidean":
            return squares
        case "half_sqeuclidean":
            return squares / 2
        case "l1":
            return differences.abs().sum(-1)
        case "dot":
            return -(x @ y.T)
        case "cosine":
            return 1 - torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(y, dim=1).T
    positive = squares > 0
    power = 1.0 if isinstance(cost, str) else cost
    return torch.where(positive, torch.where(positive, squares, 1) ** (power / 2), 0)


def sinkhorn_potentials(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    tol: float = 1e-12,
    max_iter: int = 100_000,
    rho: tuple[float, float] = (math.inf, math.inf),
) -> tuple[Tensor, Tensor]:
    """Return f (N,) and g (M,) of entropic transport by plain alternating updates (Cuturi 2013), in the log domain.

    The marginals' penalties are rho KL(P 1 | a) and rho KL(P^T 1 | b) (Chizat et al. 2018); infinite: they are kept.
    """
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    damping = [1 / (1 + epsilon / r) for r in rho]
    for _ in range(max_iter):
        softmin = -epsilon * torch.logsumexp((g - C) / epsilon + b.log(), 1)
        error = (a * (((f - softmin) / epsilon).exp() - (-f / rho[0]).exp()).abs()).sum()
        f = damping[0] * softmin
        g = -damping[1] * epsilon * torch.logsumexp((f[:, None] - C) / epsilon + a.log()[:, None], 0)
        if error < tol:
            return f, g
    raise RuntimeError(f"sinkhorn_potentials: marginal error {error} > {tol} after {max_iter} iterations")


def transport_dual(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    epsilon: float,
    rho: tuple[float, float] = (math.inf, math.inf),
) -> Tensor:
    """Return <a, F> + <b, G> - epsilon (sum of the plan - sum of a x b), shape ().

    F is f, or rho (1 - exp(-f / rho)) for a penalised marginal, and G likewise.
    """
    plan = torch.outer(a, b) * ((f[:, None] + g - C) / epsilon).exp()
    F, G = (h if math.isinf(r) else r * (1 - (-h / r).exp()) for h, r in zip((f, g), rho, strict=True))
    return (a * F).sum() + (b * G).sum() - epsilon * (plan.sum() - a.sum() * b.sum())


def sinkhorn(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    cost: str | float = "sqeuclidean",
    rho: tuple[float, float] = (math.inf, math.inf),
) -> Tensor:
    """Return min over plans P of <P, C> + epsilon KL(P | a x b), shape (); its derivative is the envelope's."""
    C = transport_cost_matrix(x, y, cost)
    f, g = sinkhorn_potentials(C.detach(), a.detach(), b.detach(), epsilon, rho=rho)
    return transport_dual(C, a, b, f, g, epsilon, rho)


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    cost: str | float = "sqeuclidean",
    rho: tuple[float, float] = (math.inf, math.inf),
) -> Tensor:
    """Return OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 + epsilon / 2 (sum of a - sum of b)^2, shape ().

    Feydy et al. 2019; the last term of unbalanced problems is Sejourne et al.'s (2019).
    """
    cross = sinkhorn(x, y, a, b, epsilon, cost, rho)
    selves = [sinkhorn(p, p, w, w, epsilon, cost, (r, r)) for p, w, r in ((x, a, rho[0]), (y, b, rho[1]))]
    return cross - (selves[0] + selves[1]) / 2 + epsilon / 2 * (a.sum() - b.sum()) ** 2
