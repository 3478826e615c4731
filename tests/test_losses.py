from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import wgan_ext

CRITIC_LOSSES = [wgan_ext.critic_loss, wgan_ext.gan_critic_loss]
GENERATOR_LOSSES = [wgan_ext.generator_loss, wgan_ext.gan_generator_loss]


def saturating(fake_scores: Tensor) -> Tensor:
    return wgan_ext.gan_generator_loss(fake_scores, saturating=True)


def test_values_are_those_of_the_papers(device: torch.device) -> None:
    real = torch.randn(7, 1, dtype=torch.float64, device=device)
    fake = torch.randn(5, 1, dtype=torch.float64, device=device)
    close = torch.testing.assert_close
    close(wgan_ext.critic_loss(real, fake), fake.mean() - real.mean())
    close(wgan_ext.generator_loss(fake), -fake.mean())
    close(wgan_ext.gan_critic_loss(real, fake), -real.sigmoid().log().mean() - (1 - fake.sigmoid()).log().mean())
    close(wgan_ext.gan_generator_loss(fake), -fake.sigmoid().log().mean())
    close(saturating(fake), (1 - fake.sigmoid()).log().mean())


def test_best_gan_critic_gives_the_js_divergence() -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.1, 0.1, 0.8], dtype=torch.float64)
    logits = (p / q).log()  # of D = p/(p + q)
    real = logits.repeat_interleave(torch.tensor([5, 3, 2]))
    fake = logits.repeat_interleave(torch.tensor([1, 1, 8]))
    expected = 2 * math.log(2) - 2 * wgan_ext.js_divergence(p, q)
    torch.testing.assert_close(wgan_ext.gan_critic_loss(real, fake), expected)


def test_best_critic_gives_the_wasserstein_distance() -> None:
    real, fake = torch.rand(50, dtype=torch.float64) + 2, torch.rand(40, dtype=torch.float64)
    # all of fake lies below real, so that the identity is a best 1-Lipschitz critic
    torch.testing.assert_close(-wgan_ext.critic_loss(real, fake), wgan_ext.wasserstein_1d(real, fake))


@pytest.mark.parametrize("score", [1e4, -1e4, 50.0, -50.0])
def test_gan_losses_neither_overflow_nor_lose_the_tail(score: float) -> None:
    scores = torch.tensor([score], dtype=torch.float64, requires_grad=True)
    loss = wgan_ext.gan_generator_loss(scores)
    (grad,) = torch.autograd.grad(loss, scores)
    tail = math.log1p(math.exp(-abs(score)))
    assert loss.item() == pytest.approx(max(-score, 0.0) + tail, rel=1e-15, abs=0)
    assert grad.item() == pytest.approx(-math.exp(-max(score, 0.0)) / (1 + math.exp(-abs(score))), rel=1e-12, abs=0)


def test_only_the_saturating_loss_saturates() -> None:
    scores = torch.tensor([-30.0], requires_grad=True)  # a critic that is sure of a fake
    (grad,) = torch.autograd.grad(saturating(scores), scores)
    assert abs(grad.item()) < 1e-12
    (grad,) = torch.autograd.grad(wgan_ext.gan_generator_loss(scores), scores)
    assert grad.item() == pytest.approx(-1)


@pytest.mark.parametrize("loss", CRITIC_LOSSES)
def test_critic_losses_differentiate_twice(loss: Callable[..., Tensor]) -> None:
    scores = [torch.randn(n, 1, dtype=torch.float64, requires_grad=True) for n in (4, 3)]
    assert torch.autograd.gradcheck(loss, scores)
    assert torch.autograd.gradgradcheck(loss, scores)


@pytest.mark.parametrize("loss", [*GENERATOR_LOSSES, saturating])
def test_generator_losses_differentiate_twice(loss: Callable[..., Tensor]) -> None:
    scores = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, scores)
    assert torch.autograd.gradgradcheck(loss, scores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_averaged_in_float32(dtype: torch.dtype, device: torch.device) -> None:
    real, fake = (torch.randn(3000, device=device).to(dtype) * 100 for _ in range(2))
    expected = torch.float64 if dtype is torch.float64 else torch.float32
    tolerance = 1e-5 if expected is torch.float32 else 1e-12
    for loss in CRITIC_LOSSES:
        value = loss(real, fake)
        assert value.dtype is expected
        torch.testing.assert_close(value.double(), loss(real.double(), fake.double()), rtol=tolerance, atol=1e-4)
    assert wgan_ext.generator_loss(fake).dtype is expected
    assert wgan_ext.gan_generator_loss(fake).dtype is expected


def test_any_shape_and_layout() -> None:
    patches = torch.randn(4, 1, 3, 5)
    torch.testing.assert_close(wgan_ext.generator_loss(patches.mT), -patches.mean())
    torch.testing.assert_close(wgan_ext.critic_loss(patches[..., ::2], patches[0]), wgan_ext.critic_loss(
        patches[..., ::2].contiguous(), patches[0].clone()))  # fmt: skip


@pytest.mark.parametrize("loss", CRITIC_LOSSES)
def test_critic_losses_refuse_by_name(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=rf"{loss.__name__}: fake_scores must not be empty, got shape \(0, 1\)"):
        loss(torch.zeros(3, 1), torch.zeros(0, 1))
    with pytest.raises(
        TypeError, match=rf"{loss.__name__}: real_scores must be a floating-point tensor, got torch.int64"
    ):
        loss(torch.zeros(3, dtype=torch.int64), torch.zeros(3))
    with pytest.raises(TypeError, match=rf"{loss.__name__}: fake_scores must have the dtype of real_scores"):
        loss(torch.zeros(3), torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=rf"{loss.__name__}: fake_scores must be on the device of real_scores"):
        loss(torch.zeros(3), torch.zeros(3, device="meta"))
    with pytest.raises(TypeError, match=rf"{loss.__name__}: real_scores must be a tensor, got float"):
        loss(1.0, torch.zeros(3))


@pytest.mark.parametrize("loss", GENERATOR_LOSSES)
def test_generator_losses_refuse_by_name(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=f"{loss.__name__}: fake_scores must not be empty"):
        loss(torch.zeros(0))
    with pytest.raises(TypeError, match=f"{loss.__name__}: fake_scores must be a floating-point tensor"):
        loss(torch.zeros(3, dtype=torch.bool))


def test_losses_compile() -> None:
    real, fake = torch.randn(4), torch.randn(5)

    def total(real: Tensor, fake: Tensor) -> Tensor:
        return wgan_ext.critic_loss(real, fake) + wgan_ext.gan_critic_loss(real, fake) + wgan_ext.generator_loss(fake)

    compiled = torch.compile(total, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(real, fake), total(real, fake))


def test_clip_weights_clamps_every_parameter_in_place(device: torch.device) -> None:
    critic = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 1, dtype=torch.float64)).to(device)
    critic[0].bias.requires_grad_(False)
    with torch.no_grad():
        critic[1].running_mean.fill_(5)
        critic[2].weight[0, 0] = math.nan
    before = {name: parameter.detach().clone() for name, parameter in critic.named_parameters()}
    places = [parameter.data_ptr() for parameter in critic.parameters()]
    wgan_ext.clip_weights_(critic, 0.03)
    for name, parameter in critic.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name].clamp(-0.03, 0.03), rtol=0, atol=0, equal_nan=True)
    assert places == [parameter.data_ptr() for parameter in critic.parameters()]
    assert critic[0].weight.requires_grad
    assert critic[0].weight.grad_fn is None
    assert critic[1].running_mean.eq(5).all()
    wgan_ext.clip_weights_(nn.ReLU(), 0.03)  # nothing to clip


@pytest.mark.parametrize("c", [0, -1.0, math.inf, math.nan])
def test_clip_weights_needs_a_bound(c: float) -> None:
    with pytest.raises(ValueError, match=f"clip_weights_: c must be positive and finite, got {c}"):
        wgan_ext.clip_weights_(nn.Linear(2, 2), c)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "compute",
    [
        nn.utils.parametrizations.spectral_norm,
        nn.utils.spectral_norm,
        nn.utils.weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 1),
    ],
)
def test_clip_weights_refuses_weights_it_cannot_bound(compute: Callable[[nn.Module], nn.Module]) -> None:
    critic = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), compute(nn.Linear(4, 1)))
    before = critic[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"clip_weights_: 2\.weight is computed from other parameters"):
        wgan_ext.clip_weights_(critic, 0.01)
    assert torch.equal(critic[0].weight, before)  # it refused before it clipped anything
