"""Train a Wasserstein GAN and measure it by its Sinkhorn divergence to data it never saw.

    python examples/train.py                                    handwritten digits, WGAN-GP
    python examples/train.py --data 8gaussians --objective gan  a toy set, the GAN of 2014
    python examples/train.py --data DIR                         a folder of images
    python -m torch.distributed.run --nproc-per-node 2 examples/train.py

--out receives samples.png, curves.png, metrics.csv and checkpoint.pt; --resume continues from that checkpoint and
reaches, bit for bit, what a run without interruption reaches.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import data
import networks
import numpy as np
import pictures
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import wgan_ext

BATCH = 64
REPORT_EVERY = 200  # generator steps between two measurements and checkpoints
DRAW_EVERY = 1000  # and between two sets of pictures


@dataclass(frozen=True)
class Objective:
    """What critic and generator minimise, and the settings that suit it."""

    critic_loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    generator_loss: Callable[[Tensor], Tensor]
    critic_steps: int  # for each of the generator
    optimizer: Callable[..., torch.optim.Optimizer]
    spectral: tuple[str, ...] = ()  # the networks that are spectrally normalized
    clip: float | None = None  # bound of the critic's weights


def of_scores(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """A loss of real and fake scores as a loss of samples, which the critic sees in one batch."""
    return lambda critic, real, fake: loss(*critic(torch.cat([real, fake])).split([len(real), len(fake)]))


wasserstein = of_scores(wgan_ext.critic_loss)
adam = partial(torch.optim.Adam, lr=1e-3, betas=(0.0, 0.9), fused=True)


def gradient_penalized(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """The loss of WGAN-GP; its authors weight the penalty by 0.1 for toy sets and by 10 for images."""
    return wgan_ext.wgan_gp_loss(critic, real, fake, weight=0.1 if real.dim() == 2 else 10.0)


OBJECTIVES = {
    # Gulrajani et al., 2017: the critic's gradient is driven to norm 1 between real and fake. Spectral normalization
    # steadies the generator; in the critic it slows what the penalty already does.
    "wgan-gp": Objective(gradient_penalized, wgan_ext.generator_loss, 3, adam, spectral=("generator",)),
    # Arjovsky et al., 2017: the critic's weights stay in a box.
    "wgan-clip": Objective(wasserstein, wgan_ext.generator_loss, 5, partial(torch.optim.RMSprop, lr=5e-4), clip=0.05),
    # Miyato et al., 2018: every layer of the critic is 1-Lipschitz.
    "wgan-sn": Objective(wasserstein, wgan_ext.generator_loss, 3, adam, spectral=("critic",)),
    # Goodfellow et al., 2014, with the generator's loss that does not saturate.
    "gan": Objective(
        of_scores(wgan_ext.gan_critic_loss),
        wgan_ext.gan_generator_loss,
        1,
        partial(torch.optim.Adam, lr=2e-4, betas=(0.5, 0.999), fused=True),
    ),
}


class Ruler:
    """Measures samples by their Sinkhorn divergence to held-out data.

    Two readings give the scale: ``floor``, that of as many real samples, and ``gaussian``, that of normal ones with the
    mean and covariance of the data, as a multiple of the floor.
    """

    def __init__(self, real: Tensor, held_out: Tensor) -> None:
        count = len(held_out)
        self.held_out = held_out.flatten(1)
        real = real[: max(count, 5000)].flatten(1)
        self.epsilon = 0.2 * torch.cdist(real[:count], self.held_out).square().mean().item()
        self.floor = self.divergence(real[:count])
        noise = torch.randn(count, len(real), generator=torch.Generator().manual_seed(0)).to(real.device)
        gaussian = real.mean(0) + noise @ (real - real.mean(0)) / (len(real) - 1) ** 0.5  # has the data's covariance
        self.gaussian = self.divergence(gaussian) / self.floor

    def divergence(self, samples: Tensor) -> float:
        """S(samples, held-out data), at 0.2 times the mean cost of real against real."""
        return wgan_ext.sinkhorn_divergence(samples.flatten(1), self.held_out, epsilon=self.epsilon).item()


def descend(optimizer: torch.optim.Optimizer, network: nn.Module, loss: Tensor) -> None:
    """One step down the gradient of ``network``'s parameters, averaged over all processes if there are several."""
    parameters = list(network.parameters())
    optimizer.zero_grad()
    loss.backward(inputs=parameters)
    if dist.is_initialized():
        message = nn.utils.parameters_to_vector(parameter.grad for parameter in parameters)
        dist.all_reduce(message)
        means = (message / dist.get_world_size()).split([parameter.numel() for parameter in parameters])
        for parameter, mean in zip(parameters, means, strict=True):
            parameter.grad = mean.view_as(parameter)
    optimizer.step()


class Run:
    """Everything that changes during training, and how it changes in one step."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.objective = args, OBJECTIVES[args.objective]
        samples, device = args.samples, args.device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.train, self.held_out = samples.train.to(device), samples.held_out.to(device)
        torch.manual_seed(args.seed)
        spectral = self.objective.spectral
        self.generator = networks.generator(samples.shape, "generator" in spectral and samples.is_image).to(device)
        self.critic = networks.critic(samples.shape, "critic" in spectral).to(device)
        self.average = AveragedModel(self.generator, multi_avg_fn=get_ema_multi_avg_fn(0.998))
        self.optimizers = [self.objective.optimizer(net.parameters()) for net in (self.generator, self.critic)]
        self.latent = torch.randn(len(self.held_out), networks.latent_size(samples.shape)).to(device)
        self.step = 0
        self.history: list[dict[str, float]] = []

    def advance(self) -> None:
        """One step of the generator after several of the critic.

        All that is random in it follows from (seed, step, rank): a run that is resumed needs no state of any generator.
        """
        torch.manual_seed(int(np.random.SeedSequence([self.args.seed, self.step, self.rank]).generate_state(1)[0]))
        generator_optimizer, critic_optimizer = self.optimizers
        for _ in range(self.objective.critic_steps):
            real = self.train[torch.randint(len(self.train), (BATCH,))]
            with torch.no_grad():
                fake = self.generate()
            loss = self.objective.critic_loss(self.critic, real, fake)
            descend(critic_optimizer, self.critic, loss)
            if self.objective.clip is not None:
                wgan_ext.clip_weights_(self.critic, self.objective.clip)
        descend(generator_optimizer, self.generator, self.objective.generator_loss(self.critic(self.generate())))
        self.average.update_parameters(self.generator)
        self.step += 1

    def generate(self) -> Tensor:
        """A batch of samples."""
        return self.generator(torch.randn(BATCH, self.latent.shape[1], device=self.latent.device))

    @torch.no_grad()
    def measure(self, ruler: Ruler) -> dict[str, float]:
        """Measure on held-out data, leaving training as it is, and write it down."""
        modules = nn.ModuleList([self.generator, self.critic, self.average]).eval()
        real_scores, fake_scores = self.critic(self.held_out), self.critic(self.generator(self.latent))
        if self.args.objective == "gan":  # of the Jensen-Shannon divergence
            estimate = math.log(2) - wgan_ext.gan_critic_loss(real_scores, fake_scores).item() / 2
        else:  # of Wasserstein-1, times the critic's Lipschitz constant
            estimate = -wgan_ext.critic_loss(real_scores, fake_scores).item()
        if not math.isfinite(estimate):
            raise SystemExit(f"training diverged: the critic's estimate is {estimate} at step {self.step}")
        divergence = ruler.divergence(self.average(self.latent))
        modules.train()
        row = {
            "step": self.step,
            "critic_estimate": estimate,
            "sinkhorn_divergence": divergence,
            "ratio": divergence / ruler.floor,
        }
        self.history.append(row)
        return row

    def state(self) -> dict[str, Any]:
        """All that another process needs to go on from here."""
        args = {"objective": self.args.objective, "data": self.args.data, "seed": self.args.seed}
        return {
            "made by": args | {"processes": self.world},
            "step": self.step,
            "history": self.history,
            "modules": [module.state_dict() for module in (self.generator, self.critic, self.average)],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; ValueError if it is of another run."""
        for name, value in self.state()["made by"].items():
            if state["made by"][name] != value:
                raise ValueError(f"it was made with {name} {state['made by'][name]}, not {value}")
        if state["step"] > self.args.steps:
            raise ValueError(f"it was made at step {state['step']}, beyond --steps {self.args.steps}")
        for module, values in zip((self.generator, self.critic, self.average), state["modules"], strict=True):
            module.load_state_dict(values)
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.step = state["step"]
        # The last measurement of a shorter run is between those of a longer one.
        self.history = [row for row in state["history"] if row["step"] % REPORT_EVERY == 0]

    def draw(self, out: Path, ruler: Ruler) -> None:
        """Write samples.png and curves.png."""
        modules = nn.ModuleList([self.critic, self.average]).eval()
        with torch.no_grad():
            pictures.draw_samples(out / "samples.png", self.held_out, self.average(self.latent), self.critic)
        modules.train()
        pictures.draw_curves(out / "curves.png", self.history, ruler.gaussian)

    def write(self, out: Path) -> None:
        """Write metrics.csv and checkpoint.pt."""
        with open(out / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, self.history[0].keys())
            writer.writeheader()
            writer.writerows(self.history)
        torch.save(self.state(), out / "checkpoint.tmp")
        os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")  # whole or not at all


def arguments() -> argparse.Namespace:
    """The command line, checked as far as it can be before data are read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=OBJECTIVES, default="wgan-gp")
    parser.add_argument("--data", default="digits", help=f"{', '.join(data.NAMED)}, a folder of images or an .npy file")
    parser.add_argument("--steps", type=int, default=8000, help="steps of the generator (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder to write to (runs/OBJECTIVE-DATA)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    args = parser.parse_args()
    args.out = args.out or Path("runs", f"{args.objective}-{Path(args.data).resolve().stem}")
    for name, least in (("steps", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"argument --{name}: must be at least {least}, got {getattr(args, name)}")
    try:
        args.device = torch.device(args.device)
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        parser.error(f"argument --device: {args.device} cannot be used: {str(error).splitlines()[0]}")
    try:
        args.samples = data.load(args.data)
    except ValueError as error:
        parser.error(f"argument --data: {error}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    args.checkpoint = args.out / "checkpoint.pt"
    if args.resume and not args.checkpoint.is_file():
        parser.error(f"argument --resume: there is no {args.checkpoint}")
    return args


def main() -> None:
    """Train as the command line says."""
    args = arguments()
    if "WORLD_SIZE" in os.environ:  # started by torch.distributed.run
        if args.device.type == "cuda":
            args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    torch.backends.cudnn.deterministic = True
    run = Run(args)
    if sum(parameter.numel() for parameter in run.critic.parameters()) < 100_000:
        torch.set_num_threads(1)  # layers this small cost more to share than to compute
    if args.resume:
        try:
            run.restore(torch.load(args.checkpoint, map_location=args.device, weights_only=True))
        except (EOFError, RuntimeError, UnpicklingError, ValueError) as error:
            raise SystemExit(f"argument --resume: {args.checkpoint} cannot be continued: {error}") from error
    leads = run.rank == 0
    ruler = Ruler(run.train, run.held_out)
    progress = tqdm(total=args.steps, initial=run.step, unit="step", desc=args.out.name, disable=not leads)
    while run.step < args.steps:
        run.advance()
        progress.update()
        if leads and (run.step % REPORT_EVERY == 0 or run.step == args.steps):
            row = run.measure(ruler)
            run.write(args.out)
            progress.set_postfix_str(
                f"critic {row['critic_estimate']:.3f}, Sinkhorn {row['sinkhorn_divergence']:.3f} = "
                f"{row['ratio']:.2f} x floor (Gaussian {ruler.gaussian:.2f} x)"
            )
        if leads and (run.step % DRAW_EVERY == 0 or run.step == args.steps):
            run.draw(args.out, ruler)
    progress.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
