"""Train a WGAN-GP on eight Gaussians, once in eager torch and once with wgan_ext, from the same random numbers.

    python benchmarks/toy.py --seconds 120     # docs/toy.png and benchmarks/toy.json

The settings are those of Gulrajani et al. 2017 (gan_toy.py); the sides differ in the critic loss only. In float64 the
first losses must coincide to rounding; in float32 training itself soon magnifies rounding, so that is reported besides.
Then both train in float32 for as long: the one that has used less time is next, and measuring does not count.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import machine
import torch
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import wgan_ext

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "toy.png"
NUMBERS = HERE / "toy.json"

BATCH = 256
WIDTH = 512
CRITIC_STEPS = 5
WEIGHT = 0.1
COMPARED_LOSSES = 100
POINTS = 1000  # on each side of a distance
MEASUREMENTS = 30

Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]  # of critic, real, fake, mix


def eager_loss(critic: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """As people write it: three forwards and double backward."""
    interpolates = (mix * real + (1 - mix) * fake).requires_grad_()
    (gradients,) = torch.autograd.grad(critic(interpolates).sum(), interpolates, create_graph=True)
    penalty = (gradients.norm(dim=1) - 1).square().mean()
    return critic(fake).mean() - critic(real).mean() + WEIGHT * penalty


def fused_loss(critic: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    return wgan_ext.wgan_gp_loss(critic, real, fake, WEIGHT, mix=mix)


def separate_loss(critic: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    penalty = wgan_ext.gradient_penalty(critic, real, fake, mix=mix)
    return wgan_ext.critic_loss(critic(real), critic(fake)) + WEIGHT * penalty


def network(outputs: int) -> nn.Sequential:
    """2-512-512-512-outputs with ReLU and He's initialization."""
    widths = (2, WIDTH, WIDTH, WIDTH, outputs)
    layers = nn.Sequential(*[layer for n, m in pairwise(widths) for layer in (nn.Linear(n, m), nn.ReLU())][:-1])
    for layer in layers[::2]:
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return layers


def eight_gaussians(count: int, random: torch.Generator) -> Tensor:
    """Points around a regular octagon, of about unit variance."""
    angles = torch.randint(8, (count,), generator=random) * (torch.pi / 4)
    centres = 2 * torch.stack([angles.cos(), angles.sin()], 1)
    return (centres + 0.02 * torch.randn(count, 2, generator=random)) / 1.414


def wasserstein(x: Tensor, y: Tensor) -> float:
    """The exact Wasserstein-1 distance of two sets of as many points."""
    distances = torch.cdist(x.double(), y.double())
    return float(distances[linear_sum_assignment(distances.numpy())].mean())


class Run:
    """A training run; all runs of a seed draw the same numbers."""

    def __init__(
        self,
        loss: Loss,
        networks: tuple[nn.Module, nn.Module],
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.loss, self.device, self.dtype = loss, device, dtype
        self.generator, self.critic = (self.place(copy.deepcopy(network)) for network in networks)
        self.optimizers = [
            torch.optim.Adam(net.parameters(), 1e-4, (0.5, 0.9), fused=True) for net in (self.critic, self.generator)
        ]
        self.random = torch.Generator().manual_seed(seed)
        self.losses: list[Tensor] = []  # of the first critic steps
        self.steps = 0  # of the generator
        self.seconds = 0.0
        self.measured: list[dict[str, float]] = []

    def place(self, it: Any) -> Any:
        return it.to(self.device, self.dtype)

    def noise(self) -> Any:
        return self.place(torch.randn(BATCH, 2, generator=self.random))

    def advance(self) -> None:
        """Some steps of the critic, one of the generator."""
        start = time.perf_counter()
        critic_optimizer, generator_optimizer = self.optimizers
        for _ in range(CRITIC_STEPS):
            real = self.place(eight_gaussians(BATCH, self.random))
            mix = self.place(torch.rand(BATCH, 1, generator=self.random))
            with torch.no_grad():
                fake = self.generator(self.noise())
            critic_optimizer.zero_grad()
            loss = self.loss(self.critic, real, fake, mix)
            loss.backward()
            critic_optimizer.step()
            if len(self.losses) < COMPARED_LOSSES:
                self.losses.append(loss.detach())
        generator_optimizer.zero_grad()
        (-self.critic(self.generator(self.noise())).mean()).backward(inputs=list(self.generator.parameters()))
        generator_optimizer.step()
        self.steps += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def measure(self, noise: Tensor, data: Tensor) -> None:
        distance = wasserstein(self.generator(self.place(noise)).cpu(), data)
        self.measured.append({"seconds": self.seconds, "generator_steps": self.steps, "distance": distance})


def train(runs: list[Run], seconds: float, noise: Tensor, data: Tensor) -> None:
    """Train all runs in turn until each has used as many seconds, and measure each at even times."""
    for run in runs:
        run.measure(noise, data)
    while (run := min(runs, key=lambda run: run.seconds)).seconds < seconds:
        run.advance()
        if run.seconds >= len(run.measured) * seconds / MEASUREMENTS:
            run.measure(noise, data)


def difference(runs: dict[str, Run]) -> float:
    """The largest between the losses of two runs."""
    return max(abs(a - b).item() for a, b in zip(*(run.losses for run in runs.values()), strict=False))


def draw(exact: dict[str, Run], timed: dict[str, Run], floor: float) -> None:
    """Write the picture."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = ("tab:orange", "tab:blue")
    for (name, run), colour, width in zip(exact.items(), colours, (5, 1.5), strict=True):
        losses = [loss.item() for loss in run.losses]
        left.plot(range(1, len(losses) + 1), losses, color=colour, linewidth=width, label=name)
    left.set_title(f"Critic loss, float64: largest difference {difference(exact):.0e}")
    left.set_xlabel("critic steps")
    left.set_ylabel("critic loss")
    for (name, run), colour in zip(timed.items(), colours, strict=True):
        label = f"{name}: {run.steps / run.seconds:.3g} generator steps a second"
        seconds, distances = ([row[key] for row in run.measured] for key in ("seconds", "distance"))
        right.plot(seconds, distances, color=colour, marker=".", label=label)
    right.axhline(floor, color="tab:gray", linestyle=":", label="data against fresh data")
    right.set_yscale("log")
    right.set_title(f"Distance of {POINTS} samples to fresh data, float32")
    right.set_xlabel("seconds of training")
    right.set_ylabel("Wasserstein-1 distance")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(PICTURE, dpi=100)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="training time in float32, both sides together")
    parser.add_argument("--separate", action="store_true", help="ours is gradient_penalty and two forwards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    networks = network(2), network(1)
    losses = {"eager torch": eager_loss, "wgan_ext": separate_loss if options.separate else fused_loss}
    exact, timed = (
        {name: Run(loss, networks, options.seed, options.device, dtype) for name, loss in losses.items()}
        for dtype in (torch.float64, torch.float32)
    )
    for run in exact.values():
        while len(run.losses) < COMPARED_LOSSES:
            run.advance()

    fresh = torch.Generator().manual_seed(options.seed + 1)
    noise, data, others = torch.randn(POINTS, 2, generator=fresh), *(eight_gaussians(POINTS, fresh) for _ in range(2))
    floor = wasserstein(data, others)
    train(list(timed.values()), options.seconds / len(timed), noise, data)

    print(f"largest difference of the critic loss over {COMPARED_LOSSES} steps, float64: {difference(exact):.1e}")
    print(f"the same in float32, where training magnifies rounding: {difference(timed):.1e}")
    for name, run in timed.items():
        print(f"{name}: {run.steps} generator steps in {run.seconds:.1f} s, W1 {run.measured[-1]['distance']:.3f}")
    print(f"data against fresh data: W1 {floor:.3f}")
    draw(exact, timed, floor)
    numbers = {
        "machine": machine.facts(),
        "seed": options.seed,
        "device": options.device.type,
        "critic_loss": losses["wgan_ext"].__name__,
        "largest_loss_difference": {"float64": difference(exact), "float32": difference(timed)},
        "data_against_fresh_data": floor,
        "losses": {name: [loss.item() for loss in run.losses] for name, run in exact.items()},
        "measured": {name: run.measured for name, run in timed.items()},
    }
    NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
