"""torch.func and forward-mode differentiation over the functions of critics, against torch.autograd in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from wgan_ext import gradient_penalty, input_gradient, reference

# What torch does itself when it first differentiates in forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

ENGINES = ("auto", "autograd")
Parameters = dict[str, Tensor]


@pytest.fixture(params=["piecewise-linear", "smooth"])
def critic(request: pytest.FixtureRequest) -> nn.Module:
    activation = nn.LeakyReLU(0.2) if request.param == "piecewise-linear" else nn.Tanh()
    return nn.Sequential(nn.Linear(3, 8), activation, nn.Linear(8, 2)).double()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Real, fake and mix."""
    return torch.randn(4, 3).double(), torch.randn(4, 3).double(), torch.rand(4, 1).double()


def values(critic: nn.Module) -> Parameters:
    return {name: p.detach().clone() for name, p in critic.named_parameters()}


def tangents(parameters: Parameters) -> Parameters:
    return {name: torch.randn_like(p) for name, p in parameters.items()}


class Penalty:
    """The penalty as a function of the critic's parameters."""

    def __init__(self, critic: nn.Module, batch: tuple[Tensor, Tensor, Tensor], **options: Any) -> None:
        self.critic, self.batch, self.options = critic, batch, options

    def __call__(self, parameters: Parameters) -> Tensor:
        class Whole(nn.Module):  # functional_call wants a module, and the engine the critic itself
            def __init__(self, critic: nn.Module) -> None:
                super().__init__()
                self.critic = critic

            def forward(self, real: Tensor, fake: Tensor, mix: Tensor, options: dict[str, Any]) -> Tensor:
                return gradient_penalty(self.critic, real, fake, mix=mix, **options)

        prefixed = {f"critic.{name}": p for name, p in parameters.items()}
        return functional_call(Whole(self.critic), prefixed, (*self.batch, self.options))

    def expected(self, parameters: Parameters) -> Tensor:
        """By torch.autograd's double backward, untransformed."""
        real, fake, mix = self.batch

        def scores(x: Tensor) -> Tensor:
            return functional_call(self.critic, parameters, (x,))

        grads = reference.input_gradient(scores, mix * real + (1 - mix) * fake)
        return (grads.norm(dim=1) - 1).square().mean()

    def expected_gradients(self, parameters: Parameters) -> list[Tensor]:
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        found = torch.autograd.grad(self.expected(leaves), leaves.values(), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters.values(), strict=True)]


@pytest.mark.parametrize("engine", ENGINES)
def test_reverse_mode(critic: nn.Module, batch: Any, engine: str) -> None:
    penalty, parameters = Penalty(critic, batch, engine=engine), values(critic)
    want = penalty.expected_gradients(parameters)
    value, pullback = vjp(penalty, parameters)
    torch.testing.assert_close(value, penalty.expected(parameters))
    for got in (grad(penalty)(parameters), pullback(torch.ones_like(value))[0], jacrev(penalty)(parameters)):
        torch.testing.assert_close(list(got.values()), want)


@pytest.mark.parametrize("engine", ENGINES)
def test_forward_mode(critic: nn.Module, batch: Any, engine: str) -> None:
    penalty, parameters = Penalty(critic, batch, engine=engine), values(critic)
    directions = tangents(parameters)
    want = sum((g * t).sum() for g, t in zip(penalty.expected_gradients(parameters), directions.values(), strict=True))
    torch.testing.assert_close(jvp(penalty, (parameters,), (directions,))[1], want)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(p, directions[name]) for name, p in parameters.items()}
        torch.testing.assert_close(forward_ad.unpack_dual(penalty(dual)).tangent, want)


@pytest.mark.parametrize("engine", ENGINES)
def test_ensembles_and_batches(critic: nn.Module, batch: Any, engine: str) -> None:
    one, other = values(critic), tangents(values(critic))
    stacked = {name: torch.stack([one[name], other[name]]) for name in one}
    penalty = Penalty(critic, batch, engine=engine)
    torch.testing.assert_close(vmap(penalty)(stacked), torch.stack([penalty.expected(p) for p in (one, other)]))
    got = vmap(grad(penalty))(stacked)
    want = zip(penalty.expected_gradients(one), penalty.expected_gradients(other), strict=True)
    torch.testing.assert_close(list(got.values()), [torch.stack(pair) for pair in want])

    x = torch.randn(2, 4, 3).double()
    got = vmap(lambda points: input_gradient(critic, points, engine=engine))(x)
    torch.testing.assert_close(got, torch.stack([reference.input_gradient(critic, points) for points in x]))


@pytest.mark.parametrize("engine", ENGINES)
def test_input_gradient_with_respect_to_its_input(critic: nn.Module, batch: Any, engine: str) -> None:
    x, direction = batch[0], torch.randn_like(batch[0])
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(leaf).sum(), leaf, create_graph=True)
    along = of_square = torch.zeros_like(x)
    if isinstance(critic[1], nn.Tanh):
        (of_square,) = torch.autograd.grad(gradient.square().sum(), leaf, retain_graph=True)
        (along,) = torch.autograd.grad(gradient, leaf, direction)  # the Hessian is symmetric
    got = grad(lambda points: input_gradient(critic, points, engine=engine).square().sum())(x)
    torch.testing.assert_close(got, of_square)
    got = jvp(lambda points: input_gradient(critic, points, engine=engine), (x,), (direction,))[1]
    torch.testing.assert_close(got.detach(), along)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(
            input_gradient(critic, forward_ad.make_dual(x, direction), engine=engine)
        ).tangent
        torch.testing.assert_close(torch.zeros_like(x) if tangent is None else tangent.detach(), along)


def test_the_analytic_engine_is_refused_by_name(critic: nn.Module, batch: Any) -> None:
    real, fake, mix = batch
    for transform in (grad, vmap, lambda f: lambda w: jvp(f, (w,), (w,))):
        argument = torch.ones(2) if transform is vmap else torch.ones(())
        with pytest.raises(NotImplementedError, match=r"gradient_penalty: the analytic engine .*torch\.func"):
            transform(lambda w: w * gradient_penalty(critic, real, fake, mix=mix, engine="analytic"))(argument)
        with pytest.raises(NotImplementedError, match=r"input_gradient: the analytic engine .*torch\.func"):
            transform(lambda w: w * input_gradient(critic, real, engine="analytic").sum())(argument)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="differentiated in forward mode"):
        input_gradient(critic, real, engine="analytic")


def test_several_inputs_patches_and_errors(batch: Any) -> None:
    real, fake, mix = batch
    real, fake = {"a": real, "b": real.flip(0)}, {"a": fake, "b": fake.flip(0)}
    options: dict[str, Any] = {"mix": mix, "output_reduction": "mean", "engine": "autograd"}

    def critic(x: dict[str, Tensor]) -> Tensor:
        return torch.stack([(x["a"] * x["b"]).sum(1), x["a"].square().sum(1)], dim=1)

    got = vmap(lambda w: w * gradient_penalty(critic, real, fake, **options))(torch.ones(2).double())
    torch.testing.assert_close(got, gradient_penalty(critic, real, fake, **options).expand(2))
    with pytest.raises(ValueError, match="input_gradient: the critic's scores do not depend on its input"):
        vmap(lambda w: w * input_gradient(lambda x: torch.ones(len(x)), mix).sum())(torch.ones(2))
    with pytest.raises(ValueError, match="input_gradient: the critic must return one score"):
        vmap(lambda w: w * input_gradient(lambda x: x.sum(), mix).sum())(torch.ones(2))


def test_functional_call_needs_no_transform(critic: nn.Module, batch: Any) -> None:
    penalty, parameters = Penalty(critic, batch, engine="autograd"), values(critic)
    leaves = {name: p.requires_grad_() for name, p in parameters.items()}
    found = torch.autograd.grad(penalty(leaves), leaves.values(), allow_unused=True)
    want = penalty.expected_gradients(parameters)
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(torch.zeros_like(expected) if got is None else got, expected)
