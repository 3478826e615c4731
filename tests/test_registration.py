"""torch's own checks of every operator: schema, fake kernel, autograd registration, tracing.

opcheck cannot see second derivatives; gradgradcheck, or a refusal by name, is tested beside each engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import wgan_ext  # noqa: F401  (registers the operators)

Samples = Callable[[torch.device], list[tuple[Any, ...]]]

# critic


def _critic(device: torch.device) -> list[tuple[Any, ...]]:
    """Samples of the arguments x, parameters, program, scalars, and of the dtype and channels_last."""

    def samples(dtype: torch.dtype) -> list[tuple[Any, ...]]:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=dtype, device=device)

        def parameters(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
            return [random(*shape).requires_grad_() for shape in shapes]

        mlp = parameters((9, 5), (9,), (4, 9), (2, 4), (2,))
        relu = [0, 3, 0, 0, 1, 1, 9, 4, 3, 1, 0, 0, 1, 9, 0, 3, 2, 2, -1, 1, 4, 0, 3, 3, 3, 4, 1, 2]
        silu = [0, 3, 0, 0, 1, 1, 9, 4, 3, 1, 2, 0, 1, 9, 0, 3, 2, 2, -1, 1, 4]
        images = parameters((6, 3, 4, 4), (6,), (1, 6 * 4 * 4))
        convolution = [1, 13, 0, 0, 1, 0, 1, 2, 2, 1, 1, 1, 1, 0, 0, 3, 6, 4, 4, 4, 3, 1, 0, 0, 3, 6, 4, 4]
        program = [*convolution, 2, 1, 2, 1, 96, 0, 3, 3, 2, -1, 1, 1]
        x = random(5, 3, 8, 8)
        return [
            ([random(5, 5)], mlp, relu, [0.2], dtype, False),
            ([random(5, 5)], mlp, silu, [], dtype, False),
            ([random(5, 5)], mlp[:1], [0, 3, 0, 0, -1, 1, 9], [], dtype, False),
            ([x], images, program, [0.0], dtype, False),
            ([x.to(memory_format=torch.channels_last)], images, program, [0.0], dtype, True),
        ]

    half = [(*sample[:4], torch.float32, sample[5]) for sample in samples(torch.bfloat16)]
    return [*samples(torch.float64), samples(torch.float32)[4], half[0], half[3]]


ROWS = ((0, 0, 5), (3, 3, 2), (5, 0, 3))  # scored, first, count


def critic(device: torch.device) -> list[tuple[Any, ...]]:
    calls = _critic(device)
    calls = [*calls[:1] * 2, *calls]
    return [(*calls[i][:4], False, *ROWS[i % 3], *calls[i][4:]) for i in range(len(calls))]


def critic_forward(device: torch.device) -> list[tuple[Any, ...]]:
    return [(x, [t.detach() for t in parameters], *rest) for x, parameters, *rest in critic(device)]


def critic_backward(device: torch.device) -> list[tuple[Any, ...]]:
    samples: list[tuple[Any, ...]] = []
    for call in critic_forward(device):
        x, parameters, program, scalars, _, *rest = call
        scores, gradients, kept = torch.ops.wgan_ext.critic_forward(*call)
        wanted = [i for i in range(len(parameters)) if parameters[i].dim() > 1]
        cotangents: list[tuple[Any, Any]] = [(scores, []), (None, gradients), (scores, gradients)]
        for grads in cotangents:
            samples.append((*grads, x, parameters, kept, program, scalars, *rest, wanted, False))
    return samples


LOSSES = ((10.0, 1.0, False, 2.0), (0.5, 0.0, True, 1.5))  # weight, target, one_sided, power


def critic_loss(device: torch.device) -> list[tuple[Any, ...]]:
    return [(*call[:5], 2, *call[5:], *LOSSES[i % 2]) for i, call in enumerate(critic(device))]


def critic_loss_forward(device: torch.device) -> list[tuple[Any, ...]]:
    samples = []
    for x, parameters, *rest in critic_loss(device):
        wanted = [i for i in range(len(parameters)) if parameters[i].dim() > 1]
        samples.append((x, [t.detach() for t in parameters], *rest, wanted))
    return samples


# name of the operator -> its sample inputs for a device. Every operator in the library must stand here.
SAMPLES: dict[str, Samples] = {
    "critic": critic,
    "critic_forward": critic_forward,
    "critic_backward": critic_backward,
    "critic_loss": critic_loss,
    "critic_loss_forward": critic_loss_forward,
}


# spectral


def _spectral(device: torch.device) -> list[tuple[Any, ...]]:
    samples: list[tuple[Any, ...]] = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for shape, dim, v_first in (((5, 4, 3), 0, True), ((5, 4, 3), 1, True), ((5, 4), -1, False)):
            weight = torch.randn(shape, dtype=dtype, device=device, requires_grad=dtype != torch.bfloat16)
            rows = shape[dim]
            u, v = (torch.randn(n, dtype=dtype, device=device) for n in (rows, weight.numel() // rows))
            samples.append((weight, u, v, dim, 1, 1e-12, v_first, 0.5, not v_first))
    channels_last = torch.randn(4, 3, 2, 2, device=device).to(memory_format=torch.channels_last)
    u, v = torch.ones(4, device=device), torch.ones(12, device=device)
    samples.append((channels_last, u, v, 0, 0, 1e-12, True, 1.0, False))
    return samples


def _spectral_backward(device: torch.device) -> list[tuple[Any, ...]]:
    samples: list[tuple[Any, ...]] = []
    for weight, u, v, dim, *_ in _spectral(device):
        sigma = torch.tensor(1.5, dtype=torch.promote_types(weight.dtype, torch.float32), device=device)
        grad = torch.randn_like(weight).requires_grad_(weight.requires_grad)
        rest = (weight, u, v, sigma, dim, 0.5, False)
        samples += [(grad, None, *rest), (None, sigma, *rest)]
    return samples


def _spectral_group(device: torch.device) -> list[tuple[Any, ...]]:
    return [tuple(map(list, zip(*_spectral(device), strict=True)))]


def _spectral_sigma(device: torch.device) -> list[tuple[Any, ...]]:
    return [sample[:-2] for sample in _spectral(device)]


SAMPLES["spectral_norm"] = _spectral
SAMPLES["spectral_norm_"] = _spectral
SAMPLES["spectral_norm_fold_"] = _spectral_sigma
SAMPLES["spectral_norm_group"] = _spectral_group
SAMPLES["spectral_norm_sigma"] = _spectral_sigma
SAMPLES["spectral_norm_backward"] = _spectral_backward

# sinkhorn


def sinkhorn_points(device: torch.device) -> tuple[torch.Tensor, ...]:
    x, y = torch.rand(7, 2, device=device, requires_grad=True), torch.rand(5, 2, device=device)
    a = torch.full((7,), 1 / 7, device=device, requires_grad=True)
    return x, y, a, torch.full((5,), 0.2, device=device)


# Of seven and five points, cut into three problems.
OFFSETS = torch.tensor([0, 1, 4, 7]), torch.tensor([0, 3, 4, 5])


def sinkhorn_samples(device: torch.device) -> list[tuple[Any, ...]]:
    x, y, a, b = sinkhorn_points(device)
    options = (0.3, 0.5, 1e-3, 200, None, 0)
    batch = [t.detach().expand(2, *t.shape) for t in (x, y, a, b)]
    zeros = torch.zeros(7, device=device), torch.zeros(5, device=device)
    return [
        (x, y, a, b, "sqeuclidean", 2.0, None, None, *options, None, None, None, None),
        (x, y, None, None, "euclidean", 1.0, None, None, *options, *zeros, None, None),
        (x, y, a, 2 * b, "power", 1.5, 1.0, 2.0, *options, None, None, None, None),
        (*batch, "l1", 1.0, None, None, *options, None, None, None, None),
        (x, y, a, b, "sqeuclidean", 2.0, 1.0, None, *options, *zeros, *OFFSETS),
    ]


def sinkhorn_divergence_samples(device: torch.device) -> list[tuple[Any, ...]]:
    return [(*sample[:14], *sample[16:]) for sample in sinkhorn_samples(device)]


def sinkhorn_matrix_samples(device: torch.device) -> list[tuple[Any, ...]]:
    x, y, a, b = sinkhorn_points(device)
    C = torch.cdist(x.detach(), y.detach()).requires_grad_()
    options = (0.3, 0.5, 1e-3, 200, None, None, None)
    return [(C, a, b, None, None, *options), (C.detach().expand(2, 7, 5), None, None, 1.0, None, *options)]


def sinkhorn_held(device: torch.device) -> tuple[Any, ...]:
    """Return points, weights, potentials, epsilon."""
    x, y, a, b = (t.detach() for t in sinkhorn_points(device))
    return x, y, a, b, torch.zeros_like(a), torch.zeros_like(b), torch.tensor(0.3, dtype=torch.float64, device=device)


TERMS = ("sqeuclidean", 2.0, None, None)
SOFT = ("sqeuclidean", 2.0, 1.0, None)
EPSILONS = torch.tensor([0.3, 0.4, 0.5], dtype=torch.float64)


def sinkhorn_gradient_samples(device: torch.device) -> list[tuple[Any, ...]]:
    *held, epsilon = sinkhorn_held(device)
    return [(*held, epsilon, *TERMS, None, None), (*held, EPSILONS.to(device), *SOFT, *OFFSETS)]


def sinkhorn_weight_gradient_samples(device: torch.device) -> list[tuple[Any, ...]]:
    x, y, a, b, f, _, epsilon = sinkhorn_held(device)
    return [
        (x, y, a, b, f, epsilon, *TERMS, None, None),
        (x, y, a, b, f, epsilon, "euclidean", 1.0, 1.0, None, None, None),
        (x, y, a, b, f, EPSILONS.to(device), *SOFT, *OFFSETS),
    ]


def sinkhorn_matrix_gradient_samples(device: torch.device) -> list[tuple[Any, ...]]:
    x, y, *rest = sinkhorn_held(device)
    return [(torch.cdist(x, y), *rest)]


def sinkhorn_transport_samples(device: torch.device) -> list[tuple[Any, ...]]:
    values = torch.rand(5, 3, device=device, requires_grad=True)
    *held, epsilon = sinkhorn_held(device)
    return [(values, *held, epsilon, *TERMS, None, None), (values, *held, EPSILONS.to(device), *SOFT, *OFFSETS)]


def sinkhorn_softmin_samples(device: torch.device) -> list[tuple[Any, ...]]:
    x, y, _, b, _, g, epsilon = sinkhorn_held(device)
    return [(x.requires_grad_(), y, b, g, epsilon, "sqeuclidean", 2.0)]


def sinkhorn_softmin_gradient_samples(device: torch.device) -> list[tuple[Any, ...]]:
    x, y, _, b, f, g, epsilon = sinkhorn_held(device)
    return [(x, y, b, f, g, epsilon, "euclidean", 1.0)]


SAMPLES["sinkhorn"] = sinkhorn_samples
SAMPLES["sinkhorn_divergence"] = sinkhorn_divergence_samples
SAMPLES["sinkhorn_matrix"] = sinkhorn_matrix_samples
SAMPLES["sinkhorn_gradient"] = sinkhorn_gradient_samples
SAMPLES["sinkhorn_weight_gradient"] = sinkhorn_weight_gradient_samples
SAMPLES["sinkhorn_matrix_gradient"] = sinkhorn_matrix_gradient_samples
SAMPLES["sinkhorn_transport"] = sinkhorn_transport_samples
SAMPLES["sinkhorn_softmin"] = sinkhorn_softmin_samples
SAMPLES["sinkhorn_softmin_gradient"] = sinkhorn_softmin_gradient_samples


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_opcheck(name: str, device: torch.device) -> None:
    for sample in SAMPLES[name](device):
        torch.library.opcheck(getattr(torch.ops.wgan_ext, name).default, sample)


def test_every_operator_has_samples() -> None:
    registered = {
        schema.name.removeprefix("wgan_ext::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("wgan_ext::")
    }
    assert registered == set(SAMPLES)
