"""The pictures of train.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn


def draw_samples(path: Path, real: Tensor, fake: Tensor, critic: nn.Module) -> None:
    """Real and generated samples side by side: images in a grid, points as a scatter over the critic's level lines."""
    if real.dim() == 4:
        figure = Figure(figsize=(8, 4.2))
        figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.93, wspace=0.04)
        for axes, images, title in zip(
            figure.subplots(1, 2), (real, fake), ("held-out data", "generated"), strict=True
        ):
            _grid(axes, images[:100])
            axes.set_title(title)
    else:
        figure = Figure(figsize=(5, 5))
        axes = figure.subplots()
        real, fake = real.cpu(), fake.cpu()
        if real.shape[1] == 2:
            _levels(axes, critic, real)
        axes.scatter(*real[:, :2].T, s=4, c="tab:orange", label="held-out data")
        axes.scatter(*fake[:, :2].T, s=4, c="tab:green", label="generated")
        axes.set_aspect("equal")
        axes.legend(loc="upper right")
    figure.savefig(path, dpi=100)


def draw_curves(path: Path, history: list[dict[str, float]], gaussian: float) -> None:
    """What the critic estimates and what the Sinkhorn divergence measures, over the generator's steps."""
    figure = Figure(figsize=(8, 3.5))
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.15, top=0.9)
    left, right = figure.subplots(1, 2)
    steps = [row["step"] for row in history]
    left.plot(steps, [row["critic_estimate"] for row in history])
    left.set_title("critic's estimate")
    right.plot(steps, [row["ratio"] for row in history], label="generator")
    right.axhline(gaussian, color="tab:gray", linestyle=":", label="Gaussian of equal covariance")
    right.axhline(1, color="tab:gray", label="real against real")
    right.set_yscale("log")
    right.set_title("Sinkhorn divergence, real to real = 1")
    right.legend()
    for axes in (left, right):
        axes.set_xlabel("generator steps")
    figure.savefig(path, dpi=100)


def _grid(axes: Axes, images: Tensor, border: int = 1) -> None:
    count, channels, height, width = images.shape
    columns = int(np.ceil(count**0.5))
    rows = -(-count // columns)
    paper = 1.0 if channels == 3 else -1.0  # one channel is drawn as ink
    sheet = torch.full((columns * rows, channels, height + border, width + border), paper)
    sheet[:count, :, :height, :width] = images.cpu()
    sheet = sheet.view(rows, columns, channels, height + border, width + border).permute(0, 3, 1, 4, 2)
    sheet = sheet.reshape(rows * (height + border), columns * (width + border), channels)[:-border, :-border]
    axes.imshow(((sheet + 1) / 2).clamp(0, 1).numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()


@torch.no_grad()
def _levels(axes: Axes, critic: nn.Module, points: Tensor) -> None:
    low, high = points.amin(0) - 0.3, points.amax(0) + 0.3
    x, y = (torch.linspace(low[i].item(), high[i].item(), 80) for i in range(2))
    device = next(critic.parameters()).device
    scores = critic(torch.cartesian_prod(x, y).to(device)).view(80, 80).T.cpu()
    axes.contour(x, y, scores, levels=20, linewidths=0.5, cmap="Greys")
