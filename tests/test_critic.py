from __future__ import annotations

import copy
import gc
import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from critics import Forward
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import wgan_ext
from wgan_ext import explain, gradient_penalty, input_gradient, reference, wgan_gp_loss

Gradients = list[Tensor | None]


def mlp(*widths: int, slope: float = 0.2, **options: Any) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(widths):
        layers += [nn.Linear(n, m, **options), nn.LeakyReLU(slope)]
    return nn.Sequential(*layers[:-1])


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ADAPTIVE_POOL = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.last(self.activation(self.first(x)))
        h += x
        return self.activation(h)


# Each critic with the shape of a batch for it.
CRITICS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(5, 16, 13, 1), (11, 5)),
    "one sample": (lambda: mlp(5, 16, 13, 1), (1, 5)),
    "relu": (lambda: nn.Sequential(nn.Linear(3, 17), nn.ReLU(), *mlp(17, 9, 1, slope=0.0)), (7, 3)),
    "without biases": (lambda: mlp(5, 9, 8, 1, bias=False), (6, 5)),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 1)), (6, 5)),
    "one layer": (lambda: nn.Linear(5, 3), (6, 5)),
    "linear twice": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1)), (6, 5)),
    "linear on top": (lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4), nn.Linear(4, 2)), (6, 5)),
    "linear below": (lambda: nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 1)), (6, 5)),
    "ends in an activation": (lambda: nn.Sequential(nn.Linear(5, 8), nn.LeakyReLU(0.1)), (6, 5)),
    "starts with activations": (
        lambda: nn.Sequential(nn.LeakyReLU(0.3), nn.LeakyReLU(0.5), nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 1)),
        (6, 5),
    ),
    "activation alone": (lambda: nn.Sequential(nn.LeakyReLU(0.3)), (6, 5)),
    "negative slope": (lambda: mlp(5, 9, 8, 1, slope=-0.5), (6, 5)),
    "steep slope": (lambda: mlp(5, 9, 8, 1, slope=1.5), (6, 5)),
    "sequences": (lambda: mlp(5, 9, 8, 2), (4, 3, 5)),
    "grids": (lambda: mlp(5, 9, 8, 1), (4, 2, 3, 5)),
    "flattened": (lambda: nn.Sequential(nn.Flatten(), *mlp(30, 9, 1)), (4, 2, 3, 5)),
    "flattened in part": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Flatten(1, 2), nn.Linear(4, 7), nn.ReLU(), nn.Flatten(-2)),
        (4, 2, 3, 5),
    ),
    "in place": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 7), nn.LeakyReLU(0.2, True)),
        (6, 5),
    ),
    "skips": (
        lambda: nn.Sequential(
            nn.Identity(), nn.Sequential(nn.Linear(5, 8), nn.Sequential(nn.ReLU()), nn.Dropout(0.0)), nn.Linear(8, 1)
        ),
        (6, 5),
    ),
    "images": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(8, 5, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(5 * 4 * 3, 1),
        ),
        (4, 3, 16, 12),
    ),
    "patches": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 7, 3), nn.ReLU(), nn.Conv2d(7, 1, 2)
        ),
        (3, 2, 9, 7),
    ),
    "grouped, dilated, uneven": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, (3, 2), (2, 1), (0, 3), (1, 2), groups=2),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=8, bias=False),
            nn.LeakyReLU(),
            nn.Conv2d(8, 3, 1, padding="valid"),
            nn.Flatten(2),
            nn.Flatten(),
        ),
        (3, 4, 9, 7),
    ),
    "one channel": (lambda: nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Conv2d(1, 1, 3)), (3, 1, 9, 7)),
    "one pixel": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 1, 1)),
        (3, 3, 5, 5),
    ),
    "more than one tile": (lambda: nn.Sequential(nn.Conv2d(1, 40, 3), nn.ReLU(), nn.Conv2d(40, 1, 3)), (2, 1, 29, 29)),
    **{
        f"{n}-d convolution, {mode}": (
            lambda n=n, mode=mode: nn.Sequential(
                CONV[n](2, 4, 3, stride=2, padding=1, padding_mode=mode), nn.SiLU(), CONV[n](4, 1, 2, groups=1)
            ),
            (3, 2, *(7, 6, 5)[:n]),
        )
        for n in (1, 2, 3)
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    **{
        f"{n}-d convolution, same, uneven, {mode}": (
            lambda n=n, mode=mode: nn.Sequential(
                CONV[n](2, 4, 4, padding="same", padding_mode=mode),
                nn.LeakyReLU(0.2),
                CONV[n](4, 2, 2, padding="same", dilation=3, groups=2),
            ),
            (3, 2, *(7, 6, 5)[:n]),
        )
        for n in (1, 2, 3)
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    **{
        f"{n}-d transposed convolution": (
            lambda n=n: nn.Sequential(
                TRANSPOSED[n](2, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
                nn.Tanh(),
                TRANSPOSED[n](4, 1, 2, dilation=2, bias=False),
                nn.ReLU(),
            ),
            (3, 2, *(4, 3, 3)[:n]),
        )
        for n in (1, 2, 3)
    },
    "bilinear": (
        lambda: Forward(
            lambda self, x: self.pair(self.left(x), self.right(x).relu()).tanh(),
            left=nn.Linear(5, 4),
            right=nn.Linear(5, 3),
            pair=nn.Bilinear(4, 3, 2),
        ),
        (6, 5),
    ),
    "bilinear without a bias, on sequences": (
        lambda: Forward(lambda self, x: self.pair(x, x.sin() if False else x), pair=nn.Bilinear(5, 5, 2, bias=False)),
        (4, 3, 5),
    ),
    # activations
    **{
        repr(f): (
            lambda f=f: nn.Sequential(nn.Linear(5, 8), f, nn.Linear(8, 6), copy.deepcopy(f), nn.Linear(6, 1)),
            (7, 5),
        )
        for f in (
            nn.PReLU(),
            nn.Hardtanh(-0.4, 0.3),
            nn.ReLU6(),
            nn.RReLU(0.1, 0.3).eval(),
            nn.SiLU(),
            nn.SiLU(inplace=True),
            nn.GELU(),
            nn.GELU("tanh"),
            nn.Softplus(),
            nn.Softplus(2.0, 0.5),
            nn.Tanh(),
            nn.Sigmoid(),
            nn.ELU(),
            nn.ELU(0.7, inplace=True),
            nn.SELU(),
            nn.CELU(0.5),
            nn.Mish(),
            nn.LogSigmoid(),
        )
    },
    "PReLU of channels": (
        lambda: nn.Sequential(nn.Conv2d(2, 5, 3), nn.PReLU(5), nn.Conv2d(5, 1, 3), nn.PReLU()),
        (3, 2, 7, 6),
    ),
    "PReLU of a vector": (lambda: nn.Sequential(nn.Linear(5, 8), nn.PReLU(8), nn.Linear(8, 1)), (6, 5)),
    "GLU": (lambda: nn.Sequential(nn.Linear(5, 8), nn.GLU(), nn.Linear(4, 1)), (6, 5)),
    "GLU of channels": (lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.GLU(1), nn.Conv2d(3, 1, 2)), (3, 2, 7, 6)),
    "maxout": (
        lambda: Forward(
            lambda self, x: (
                self.b(self.a(x).unflatten(1, (4, 3)).max(2).values).view(-1, 2, 3).max(dim=1, keepdim=True)[0]
            ),
            a=nn.Linear(5, 12),
            b=nn.Linear(4, 6),
        ),
        (6, 5),
    ),
    "maximum": (
        lambda: Forward(
            lambda self, x: self.c(torch.max(torch.maximum(self.a(x), self.b(x)), self.floor)),
            a=nn.Linear(5, 7),
            b=nn.Linear(5, 7),
            c=nn.Linear(7, 1),
            floor=nn.Parameter(torch.zeros(7)),
        ),
        (6, 5),
    ),
    "abs": (
        lambda: Forward(lambda self, x: self.b(abs(self.a(x)).abs()), a=nn.Linear(5, 7), b=nn.Linear(7, 1)),
        (6, 5),
    ),
    # normalization
    **{
        f"{n}-d batch norm in eval mode, affine={affine}": (
            lambda n=n, affine=affine: nn.Sequential(
                CONV[n](2, 4, 2), BATCH_NORM[n](4, affine=affine, eps=1e-3), nn.SiLU(), CONV[n](4, 1, 2)
            ).eval(),
            (3, 2, *(5, 4, 4)[:n]),
        )
        for n in (1, 2, 3)
        for affine in (True, False)
    },
    "batch norm of vectors in eval mode": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).eval(),
        (6, 5),
    ),
    "batch norm of sequences in eval mode": (
        lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Conv1d(5, 2, 2), nn.BatchNorm1d(2)).eval(),
        (6, 5, 4),
    ),
    **{
        f"{n}-d instance norm, {options}": (
            lambda n=n, options=options: nn.Sequential(
                CONV[n](2, 4, 2), INSTANCE_NORM[n](4, **options), nn.LeakyReLU(0.2), CONV[n](4, 1, 2)
            ).eval(),
            (3, 2, *(5, 4, 4)[:n]),
        )
        for n in (1, 2, 3)
        for options in ({}, {"affine": True}, {"affine": True, "track_running_stats": True})
    },
    **{
        f"group norm, {options}": (
            lambda options=options: nn.Sequential(
                nn.Conv2d(2, 6, 2), nn.GroupNorm(3, 6, **options), nn.ReLU(), nn.Conv2d(6, 1, 2)
            ),
            (3, 2, 5, 4),
        )
        for options in ({}, {"affine": False}, {"eps": 0.1})
    },
    "group norm of vectors": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Linear(8, 1)),
        (6, 5),
    ),
    **{
        f"layer norm, {options}": (
            lambda options=options: nn.Sequential(
                nn.Linear(5, 8), nn.LayerNorm(8, **options), nn.GELU(), nn.Linear(8, 1)
            ),
            (6, 5),
        )
        for options in ({}, {"elementwise_affine": False}, {"bias": False}, {"eps": 0.1})
    },
    "layer norm of images": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 2), nn.LayerNorm([3, 4, 3]), nn.ReLU(), nn.LayerNorm(3), nn.Flatten(), nn.Linear(36, 1)
        ),
        (3, 2, 5, 4),
    ),
    "dropout in eval mode": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 2),
            nn.Dropout2d(),
            nn.ReLU(),
            nn.AlphaDropout(),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(36, 1),
            nn.FeatureAlphaDropout(),
        ).eval(),
        (3, 2, 5, 4),
    ),
    # pools and resizes
    **{
        f"{n}-d pools": (
            lambda n=n: nn.Sequential(
                CONV[n](1, 2, 2),
                MAX_POOL[n](3, 2, 1),
                CONV[n](2, 2, 1),
                nn.SiLU(),
                AVG_POOL[n](2, 2, 1, count_include_pad=False),
                CONV[n](2, 3, 1),
                nn.ReLU(),
                ADAPTIVE_POOL[n](2),
                AVG_POOL[n](2),
            ),
            (3, 1, *(11, 9, 9)[:n]),
        )
        for n in (1, 2, 3)
    },
    "pools with ceil_mode, dilation, a divisor": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 1),
            nn.MaxPool2d(2, 2, dilation=2, ceil_mode=True),
            nn.AvgPool2d((2, 3), 2, ceil_mode=True),
            nn.Tanh(),
            nn.AvgPool2d(2, 1, divisor_override=3),
            nn.AdaptiveAvgPool2d((None, 1)),
        ),
        (3, 1, 12, 11),
    ),
    "pools by functions": (
        lambda: Forward(
            lambda self, x: F.adaptive_avg_pool2d(
                F.avg_pool2d(F.max_pool2d(self.a(x), (2, 1)), 2, stride=1), (1, 2)
            ).tanh(),
            a=nn.Conv2d(1, 2, 2),
        ),
        (3, 1, 9, 8),
    ),
    **{
        f"resize, {mode}, {options}": (
            lambda n=n, mode=mode, options=options: nn.Sequential(
                CONV[n](1, 2, 2), nn.Upsample(mode=mode, **options), nn.SiLU(), CONV[n](2, 1, 2)
            ),
            (2, 1, *(5, 4, 4)[:n]),
        )
        for mode, dims in (
            ("nearest", (1, 2, 3)),
            ("linear", (1,)),
            ("bilinear", (2,)),
            ("trilinear", (3,)),
            ("bicubic", (2,)),
        )
        for n in dims
        for options in (
            {"size": 5},
            {"scale_factor": 2},
            {"scale_factor": 1.7},
            {"scale_factor": 1.7, "recompute_scale_factor": True},
            *(
                []
                if mode == "nearest"
                else [{"size": 6, "align_corners": True}, {"scale_factor": 1.7, "align_corners": True}]
            ),
        )
    },
    **{
        f"resize, {n}-d area": (
            lambda n=n: Forward(
                lambda self, x: F.interpolate(
                    F.interpolate(self.a(x), scale_factor=0.5, mode="area").tanh(), 3, mode="area"
                ),
                a=CONV[n](1, 2, 2),
            ),
            (2, 1, *(9, 8, 8)[:n]),
        )
        for n in (1, 2, 3)
    },
    "downsampling": (
        lambda: Forward(
            lambda self, x: F.interpolate(
                F.interpolate(self.a(x), scale_factor=(0.5, 0.7), mode="bilinear").tanh(), scale_factor=0.5
            ),
            a=nn.Conv2d(1, 2, 2),
        ),
        (2, 1, 9, 8),
    ),
    "pixel shuffle": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 2), nn.PixelShuffle(2), nn.Tanh(), nn.PixelUnshuffle(3), nn.Conv2d(18, 1, 1)
        ),
        (2, 1, 4, 7),
    ),
    "pads": (
        lambda: nn.Sequential(
            nn.ZeroPad2d((1, -1, 0, 2)),
            nn.Conv2d(1, 2, 2),
            nn.ReflectionPad2d(1),
            nn.Tanh(),
            nn.ReplicationPad2d(2),
            nn.Conv2d(2, 2, 2),
            nn.ConstantPad2d(1, 0.5),
            nn.CircularPad2d((1, 0, 2, 1)),
            nn.SiLU(),
            nn.Conv2d(2, 1, 1),
        ),
        (2, 1, 4, 5),
    ),
    # structure
    "residual in place": (lambda: nn.Sequential(nn.Linear(5, 6), Residual(6), Residual(6), nn.Linear(6, 1)), (7, 5)),
    "nested user modules in a ModuleList": (
        lambda: Forward(
            lambda self, x: sum(head(body(x)) for body, head in zip(self.bodies, self.heads.values(), strict=True)),
            bodies=nn.ModuleList([nn.Sequential(nn.Linear(5, 6), Residual(6)), mlp(5, 7, 6)]),
            heads=nn.ModuleDict({"a": nn.Linear(6, 1), "b": nn.Linear(6, 1)}),
        ),
        (7, 5),
    ),
    "a shared submodule": (
        lambda: Forward(
            lambda self, x: self.head(self.body(self.body(x).relu()).tanh()), body=nn.Linear(5, 5), head=nn.Linear(5, 1)
        ),
        (7, 5),
    ),
    "an unused submodule": (lambda: Forward(lambda self, x: self.a(x), a=mlp(5, 6, 1), unused=nn.Linear(3, 3)), (7, 5)),
    "a ParameterList": (
        lambda: Forward(
            lambda self, x: F.linear(F.linear(x, self.w[0]).relu(), self.w[1]),
            w=nn.ParameterList([torch.randn(6, 5), torch.randn(1, 6)]),
        ),
        (7, 5),
    ),
    "cat and stack": (
        lambda: Forward(
            lambda self, x: self.b(
                torch.stack([torch.cat([self.a(x), x.relu()], 1), torch.cat([x, self.a(x)], dim=-1)], 2).flatten(1)
            ),
            a=nn.Linear(5, 3),
            b=mlp(16, 4, 1),
        ),
        (7, 5),
    ),
    "cat and stack with parameters": (
        lambda: Forward(
            lambda self, x: self.b(
                torch.stack(
                    [
                        torch.cat([x, self.token.expand(len(x), 3) if False else x[:, :3]], 1),
                        x.new_tensor(0) if False else F.pad(x, (0, 3)),
                    ],
                    1,
                )
            ),
            token=nn.Parameter(torch.randn(1, 3)),
            b=mlp(8, 4, 1),
        ),
        (7, 5),
    ),
    "scalar arithmetic": (
        lambda: Forward(
            lambda self, x: (
                self.b(((2 - self.a(x)) / 3 - (-x) * 0.5 + 1).relu().mul(2).sub(1).add(x, alpha=0.3)) * self.gain.exp()
            ),
            a=nn.Linear(5, 5),
            b=nn.Linear(5, 1),
            gain=nn.Parameter(torch.tensor(0.3)),
        ),
        (7, 5),
    ),
    "arithmetic with parameters": (
        lambda: Forward(
            lambda self, x: (
                ((self.a(x) - self.shift) / self.scale.exp() * self.scale + 1 - (1 - self.shift)).relu() @ self.last
            ),
            a=nn.Linear(5, 4),
            shift=nn.Parameter(torch.randn(4)),
            scale=nn.Parameter(torch.randn(1, 4)),
            last=nn.Parameter(torch.randn(4)),
        ),
        (7, 5),
    ),
    "arithmetic in place": (
        lambda: Forward(
            lambda self, x: self.b(self.a(x).mul_(2).add_(1).div_(3).neg_().relu_()),
            a=nn.Linear(5, 4),
            b=nn.Linear(4, 1),
        ),
        (7, 5),
    ),
    "products of activations": (
        lambda: Forward(
            lambda self, x: self.c(self.a(x) * self.b(x).sigmoid() + self.a(x) ** 2 + torch.square(x[:, :1])),
            a=nn.Linear(5, 4),
            b=nn.Linear(5, 4),
            c=nn.Linear(4, 1),
        ),
        (7, 5),
    ),
    "equalised learning rate": (
        lambda: Forward(
            lambda self, x: F.linear(F.leaky_relu(F.linear(x, self.w * self.c, self.b * 0.1), 0.2), self.v * self.c),
            w=nn.Parameter(torch.randn(6, 5)),
            b=nn.Parameter(torch.randn(6)),
            v=nn.Parameter(torch.randn(1, 6)),
            c=0.3,
        ),
        (7, 5),
    ),
    "weights by matmul": (
        lambda: Forward(
            lambda self, x: torch.matmul((x @ self.w.t()).relu().mm(self.u.mT).tanh(), self.v),
            w=nn.Parameter(torch.randn(6, 5)),
            u=nn.Parameter(torch.randn(4, 6)),
            v=nn.Parameter(torch.randn(4, 1)),
        ),
        (7, 5),
    ),
    "a modulated weight": (  # weight demodulation, of parameters alone
        lambda: Forward(
            lambda self, x: F.conv2d(
                x, self.w * torch.rsqrt(self.w.square().sum((1, 2, 3), keepdim=True) + 1e-8)
            ).relu(),
            w=nn.Parameter(torch.randn(3, 2, 2, 2)),
        ),
        (3, 2, 5, 4),
    ),
    "slices": (
        lambda: Forward(
            lambda self, x: self.b(
                self.a(x)[:, 1:].relu()[..., :-2, None].squeeze(-1)
                + self.a(x)[:, 0, None]
                + x.narrow(1, 1, 3)
                + x.select(1, -1).unsqueeze(1)
                + x[:, 2:3]
            ),
            a=nn.Linear(5, 6),
            b=nn.Linear(3, 1),
        ),
        (7, 5),
    ),
    "parts": (
        lambda: Forward(
            lambda self, x: self.b(
                torch.cat([p.relu() * (i + 1) for i, p in enumerate(self.a(x).chunk(3, 1))], 1)
                * torch.cat([*torch.split(x, [1, 4], dim=1), x.unbind(1)[2].unsqueeze(1)], 1)
                + torch.cat(x.tensor_split(2, dim=1) + x.split(1, 1)[:1], 1)
            ),
            a=nn.Linear(5, 6),
            b=nn.Linear(6, 1),
        ),
        (7, 5),
    ),
    "permutations": (
        lambda: Forward(
            lambda self, x: self.b(
                (
                    self.a(x.permute(0, 2, 3, 1)).movedim(-1, 1).relu() + self.c(x.transpose(1, -1)).transpose(-1, 1)
                ).flatten(1)
            ).view(-1, 1),
            a=nn.Linear(2, 3),
            b=nn.Linear(36, 1),
            c=nn.Linear(2, 3),
        ),
        (3, 2, 4, 3),
    ),
    "reshapes": (
        lambda: Forward(
            lambda self, x: (
                self.b(self.a(x.view(len(x), -1)).unflatten(1, (2, 3)).reshape(x.size(0), 3, 2).relu())
                .squeeze(-1)
                .unsqueeze(1)
                .squeeze()
            ),
            a=nn.Linear(12, 6),
            b=nn.Linear(2, 1),
        ),
        (3, 2, 6),
    ),
    "means and sums": (
        lambda: Forward(
            lambda self, x: (
                self.b(self.a(x).relu().mean((2, 3))).sum(1)
                + self.a(x).sum(dim=[1, 2, 3]).tanh()
                + x.mean(dim=(1, 2, 3))
                + x.sum(1, keepdim=True).mean((-1, -2)).sum(-1)
            ),
            a=nn.Conv2d(2, 3, 2),
            b=nn.Linear(3, 2),
        ),
        (3, 2, 5, 4),
    ),
    "other spellings": (
        lambda: Forward(
            lambda self, x: torch.nn.functional.leaky_relu_(
                F.relu_(torch.sigmoid(torch.tanh(torch.relu(self.a(x)).relu()).sigmoid()) - 0.6)
                + F.softplus(x).tanh_()
                - F.hardtanh(x, -0.2, 0.1)
                + F.silu(F.gelu(F.elu(F.selu(F.celu(F.mish(F.logsigmoid(x))))))),
                0.3,
            ).abs(),
            a=nn.Linear(5, 5),
        ),
        (7, 5),
    ),
    "casts": (
        lambda: Forward(lambda self, x: self.a(x.to(x.dtype).contiguous().clone().type_as(x)), a=mlp(5, 4, 1)),
        (7, 5),
    ),
    "expand": (
        lambda: Forward(
            lambda self, x: self.a(x.unsqueeze(1).expand(-1, 3, -1) * self.w).tanh(),
            a=nn.Linear(5, 1),
            w=nn.Parameter(torch.randn(3, 1)),
        ),
        (7, 5),
    ),
    "a buffer": (
        lambda: Forward(lambda self, x: self.a(x * self.running), a=mlp(5, 4, 1), running=nn.Buffer(torch.rand(5))),
        (7, 5),
    ),
    "a submodule that torch.compile wrapped": (
        lambda: nn.Sequential(torch.compile(mlp(5, 8, 4), backend="eager"), nn.ReLU(), nn.Linear(4, 1)),
        (7, 5),
    ),
    "frozen parameters": (
        lambda: nn.Sequential(mlp(5, 8, 4).requires_grad_(False), nn.SiLU(), nn.Linear(4, 1)),
        (7, 5),
    ),
}


def parameter_gradients(gradient: Tensor, module: nn.Module) -> Gradients:
    """The derivative of something that takes in every entry of the gradient in its own way."""
    weights = torch.linspace(0.5, 1.5, gradient.numel(), dtype=gradient.dtype, device=gradient.device)
    total = (gradient * weights.view(gradient.shape)).square().sum()
    moving = {name: p for name, p in module.named_parameters() if p.requires_grad}
    derivatives = torch.autograd.grad(total, list(moving.values()), allow_unused=True) if moving else ()
    by_name = dict(zip(moving, derivatives, strict=True))
    return [by_name.get(name) for name, _ in module.named_parameters()]


def assert_same(got: Gradients, expected: Gradients, **tolerance: float) -> None:
    """Equal values, and None in the same places."""
    assert [g is None for g in got] == [e is None for e in expected]
    for g, e in zip(got, expected, strict=True):
        if g is not None:
            torch.testing.assert_close(g, e, **(tolerance or {"rtol": 1e-12, "atol": 1e-12}))


def randomized(critic: nn.Module) -> nn.Module:
    """Let no scale be 1, and no shift 0."""
    with torch.no_grad():
        for parameter in critic.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
        for name, buffer in critic.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer += torch.rand_like(buffer)
    return critic


@pytest.fixture(params=CRITICS)
def case(request: pytest.FixtureRequest, device: torch.device) -> tuple[str, nn.Module, Tensor]:
    make, shape = CRITICS[request.param]
    return (
        request.param,
        randomized(make()).to(device, torch.float64),
        torch.randn(shape, dtype=torch.float64, device=device),
    )


# What only decides which entry is the largest gets zeros from the engine, as what decides the sign at a ReLU gets from
# both, but nothing from autograd.
MAXIMA = ("maxout", "maximum")


def derivatives_of(name: str, gradient: Tensor, critic: nn.Module) -> Gradients:
    derivatives = parameter_gradients(gradient, critic)
    return [None if name in MAXIMA and g is not None and not g.any() else g for g in derivatives]


def test_value_and_derivative_are_autograds(case: tuple[str, nn.Module, Tensor]) -> None:
    name, critic, x = case
    plan = explain(critic, x)
    assert (plan.engine, plan.reason) == ("analytic", "")
    gradient = input_gradient(critic, x, engine="analytic")
    expected = reference.input_gradient(critic, x)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert_same(derivatives_of(name, gradient, critic), derivatives_of(name, expected, critic))
    x = torch.randn(x.shape[0] + 2, *x.shape[1:]).to(x)  # the plan serves any batch
    gradient, expected = input_gradient(critic, x, engine="analytic"), reference.input_gradient(critic, x)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_float32_is_as_exact_as_autograds(case: tuple[str, nn.Module, Tensor]) -> None:
    name, critic, x = case
    expected = reference.input_gradient(critic, x)
    derivatives = derivatives_of(name, expected, critic)
    single = copy.deepcopy(critic).float()
    gradient = input_gradient(single, x.float(), engine="analytic")
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)
    got = [g if g is None else g.double() for g in derivatives_of(name, gradient, single)]
    assert_same(got, derivatives, rtol=1e-4, atol=1e-4)


@given(
    batch=st.integers(1, 70),
    widths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    slopes=st.lists(st.sampled_from([0.0, 0.01, 0.2, 1.0]), min_size=4, max_size=4),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_any_widths(batch: int, widths: list[int], slopes: list[float], seed: int) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for n, m, slope in zip(widths[:-1], widths[1:], slopes, strict=False):
        layers += [nn.Linear(n, m), nn.LeakyReLU(slope)]
    critic = nn.Sequential(*layers, nn.Linear(widths[-1], 1)).double()
    x = torch.randn(batch, widths[0], dtype=torch.float64)
    gradient, expected = input_gradient(critic, x, engine="analytic"), reference.input_gradient(critic, x)
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-12)
    got, want = parameter_gradients(gradient, critic), parameter_gradients(expected, critic)
    assert_same(got, want, rtol=1e-11, atol=1e-11)


ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.ReLU(),
    lambda: nn.LeakyReLU(0.2),
    nn.PReLU,
    lambda: nn.Hardtanh(-0.5, 0.8),
    nn.SiLU,
    nn.GELU,
    lambda: nn.Softplus(2.0),
    nn.Tanh,
    nn.Sigmoid,
    nn.ELU,
    nn.Mish,
)


class Branch(nn.Module):
    """x + body(x), or body(x) beside x."""

    def __init__(self, body: nn.Module, beside: bool) -> None:
        super().__init__()
        self.body, self.beside = body, beside

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.body(x), x], 1) if self.beside else x + self.body(x)


@st.composite
def random_critics(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A critic of the layers of torch.nn, and the shape of one sample for it."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    n = draw(st.integers(0, 3))  # the dimensions of the images
    shape = (draw(st.integers(1, 5)), *[draw(st.integers(4, 6)) for _ in range(n)])

    def activation() -> nn.Module:
        return draw(st.sampled_from(ACTIVATIONS))()

    def linear(channels: int, width: int) -> nn.Module:
        if n == 0:
            return nn.Linear(channels, width, bias=draw(st.booleans()))
        kernel, mode = draw(st.integers(1, 3)), draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        return CONV[n](channels, width, kernel, padding="same" if kernel == 3 else 0, padding_mode=mode)

    def norm(channels: int) -> nn.Module:
        affine = draw(st.booleans())
        kinds = [lambda: (BATCH_NORM[n] if n else nn.BatchNorm1d)(channels, affine=affine)]
        kinds += [lambda: nn.GroupNorm(1, channels, affine=affine)] if n or channels > 2 else []
        kinds += [lambda: INSTANCE_NORM[n](channels, affine=affine)] if n else []
        kinds += [lambda: nn.LayerNorm(channels, elementwise_affine=affine)] if not n and channels > 2 else []
        return draw(st.sampled_from(kinds))()

    layers: list[nn.Module] = []
    probe = torch.zeros(2, *shape)
    for _ in range(draw(st.integers(1, 4))):
        channels, large = probe.shape[1], n > 0 and min(probe.shape[2:]) >= 3
        block = draw(st.sampled_from(["linear", "norm", "residual", "beside", *["pool", "resize"] * large]))
        width = draw(st.integers(1, 6))
        if block == "linear":
            new = nn.Sequential(linear(channels, width), activation())
        elif block == "norm":
            new = nn.Sequential(linear(channels, width), norm(width), activation())
        elif block in ("residual", "beside"):
            body = nn.Sequential(linear(channels, channels), activation())
            if body(probe).shape != probe.shape:  # an unpadded convolution
                body = activation()
            new = Branch(nn.Sequential(nn.Identity(), Scale(), body), block == "beside")
        elif block == "pool":
            kinds = [MAX_POOL[n](2, 2), MAX_POOL[n](3, 1, 1), AVG_POOL[n](2, 1), ADAPTIVE_POOL[n](2)]
            new = nn.Sequential(activation(), draw(st.sampled_from(kinds)))
        else:
            mode = draw(st.sampled_from(["nearest", {1: "linear", 2: "bilinear", 3: "trilinear"}[n]]))
            new = nn.Upsample(scale_factor=draw(st.sampled_from([0.5, 1.5])), mode=mode)
        if n and min(new.eval()(probe).shape[2:]) < 1:
            continue
        layers.append(new)
        probe = new(probe)
        if n and min(probe.shape[2:]) < 3:
            break
    layers += [nn.Flatten(), nn.Linear(probe[0].numel(), draw(st.integers(1, 2)))]
    return randomized(nn.Sequential(*layers)).double().eval(), shape


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor) -> Tensor:
        return 1 - x * self.scale / 2


@given(made=random_critics(), batch=st.integers(1, 5), seed=st.integers(0, 2**16))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_critics(made: tuple[nn.Module, tuple[int, ...]], batch: int, seed: int) -> None:
    critic, shape = made
    torch.manual_seed(seed)
    x = torch.randn(batch, *shape, dtype=torch.float64)
    gradient, expected = input_gradient(critic, x, engine="analytic"), reference.input_gradient(critic, x)
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-12 * scale)
    got, want = parameter_gradients(gradient, critic), parameter_gradients(expected, critic)
    for g, e in zip(got, want, strict=True):
        if g is None or e is None:  # what only chooses among the largest
            assert all(t is None or not t.any() for t in (g, e))
        else:
            torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-11 * max(1.0, float(e.abs().max())) * scale)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "strided"])
def test_layouts_of_the_input(layout: str, device: torch.device) -> None:
    make, shape = CRITICS["images"]
    for dtype in (torch.float32, torch.float64):
        critic, x = make().to(device, dtype), torch.randn(shape, dtype=dtype, device=device)
        y = {
            "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),  # noqa: B023
            "transposed": lambda: x.mT.contiguous().mT,  # noqa: B023
            "expanded": lambda: x[:1].expand(shape),  # noqa: B023
            "strided": lambda: x.repeat_interleave(2, 0)[::2],  # noqa: B023
        }[layout]()
        gradient, expected = input_gradient(critic, y, engine="analytic"), reference.input_gradient(critic, y)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(gradient, expected, **tolerance)
        for format in (torch.contiguous_format, torch.channels_last):
            cotangent = torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=format)
            got, want = (
                torch.autograd.grad(g, [*critic.parameters()], cotangent, retain_graph=True, allow_unused=True)
                for g in (gradient, expected)
            )
            assert_same(list(got), list(want), **tolerance)


@pytest.mark.parametrize("name", ["mlp", "images", "linear on top", "sequences"])
def test_gradcheck(name: str, device: torch.device) -> None:
    make, shape = CRITICS[name]
    critic = make().to(device, torch.float64)
    x = torch.randn(2, *shape[1:], dtype=torch.float64, device=device)
    weights = {n: p.detach().requires_grad_() for n, p in critic.named_parameters() if n.endswith("weight")}

    def gradient(*values: Tensor) -> Tensor:
        for key, value in zip(weights, values, strict=True):
            module, _, attribute = key.rpartition(".")
            delattr(critic.get_submodule(module), attribute)
            setattr(critic.get_submodule(module), attribute, value)
        return input_gradient(critic, x, engine="analytic")

    torch.autograd.gradcheck(gradient, tuple(weights.values()), fast_mode=True)


def test_second_derivative_is_refused_by_name() -> None:
    critic, x = mlp(3, 8, 1), torch.randn(4, 3)
    total = input_gradient(critic, x, engine="analytic").square().sum()
    derivatives = torch.autograd.grad(total, [critic[0].weight], create_graph=True)
    with pytest.raises(NotImplementedError, match="critic is differentiable once"):
        derivatives[0].sum().backward()


def test_autograd_engine_differentiates_on() -> None:
    critic, x = mlp(3, 8, 1), torch.randn(4, 3)
    total = input_gradient(critic, x, engine="autograd").square().sum()
    derivatives = torch.autograd.grad(total, [critic[0].weight], create_graph=True)
    derivatives[0].square().sum().backward()
    assert critic[2].weight.grad is not None


def test_smooth_critics_have_a_second_derivative_in_x() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    gradient = input_gradient(lambda x: (x**3).sum(1), x)
    torch.testing.assert_close(gradient, 3 * x**2)
    torch.testing.assert_close(torch.autograd.grad(gradient.sum(), x)[0], 6 * x)


def test_derivative_in_x_is_zero_for_the_analytic_engine() -> None:
    critic, x = mlp(3, 8, 1), torch.randn(4, 3, requires_grad=True)
    (derivative,) = torch.autograd.grad(input_gradient(critic, x, engine="analytic").sum(), x)
    assert torch.equal(derivative, torch.zeros_like(x))


@pytest.mark.parametrize("engine", ["analytic", "autograd"])
def test_input_is_left_alone(engine: Any) -> None:
    critic = mlp(3, 8, 1)
    for requires_grad in (False, True):
        x = torch.randn(4, 3, requires_grad=requires_grad)
        before = x.detach().clone()
        input_gradient(critic, x, engine=engine).square().sum().backward()
        assert x.requires_grad == requires_grad
        assert torch.equal(x.detach(), before)
        assert x.grad is None or not x.grad.any()
    critic = nn.Sequential(nn.LeakyReLU(0.2), nn.Linear(3, 1))
    x = torch.randn(4, 3)
    before = x.clone()
    input_gradient(critic, x, engine=engine)
    assert torch.equal(x, before)


@pytest.mark.parametrize("engine", ["analytic", "autograd"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_only_the_value(mode: Any, engine: Any) -> None:
    critic = mlp(3, 8, 1)
    with mode():
        x = torch.randn(4, 3)
        gradient = input_gradient(critic, x, engine=engine)
    assert not gradient.requires_grad
    torch.testing.assert_close(gradient, reference.input_gradient(critic, x.clone()).detach())


def test_frozen_parameters_get_no_gradient() -> None:
    for frozen in (["0.weight"], ["2.weight", "4.weight"], ["0.bias", "2.weight"]):
        critic, x = mlp(3, 8, 7, 1).double(), torch.randn(4, 3, dtype=torch.float64)
        for name in frozen:
            critic.get_parameter(name).requires_grad_(False)
        expected = copy.deepcopy(critic)
        input_gradient(critic, x, engine="analytic").square().sum().backward()
        reference.input_gradient(expected, x).square().sum().backward()
        assert_same([p.grad for p in critic.parameters()], [p.grad for p in expected.parameters()])
    assert not input_gradient(critic.requires_grad_(False), x, engine="analytic").requires_grad


def test_tied_weights_add_up() -> None:
    for tie_modules in (False, True):
        layer = nn.Linear(6, 6)
        other = layer if tie_modules else nn.Linear(6, 6)
        other.weight = layer.weight
        critic = nn.Sequential(layer, nn.ReLU(), other, nn.ReLU(), nn.Linear(6, 1)).double()
        x = torch.randn(5, 6, dtype=torch.float64)
        got = parameter_gradients(input_gradient(critic, x, engine="analytic"), critic)
        assert_same(got, parameter_gradients(reference.input_gradient(critic, x), critic))


# Weights that are computed from others.

NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "legacy spectral_norm": nn.utils.spectral_norm,
    "legacy weight_norm": nn.utils.weight_norm,
    "wgan_ext's spectral_norm": wgan_ext.spectral_norm,
    "wgan_ext's parametrization": wgan_ext.parametrizations.spectral_norm,
}


def normalized(norm: str, images: bool) -> nn.Sequential:
    wrap = NORMS[norm]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if images:
            layers = [wrap(nn.Conv2d(2, 6, 3)), nn.LeakyReLU(0.2), nn.Flatten(), wrap(nn.Linear(6 * 4 * 4, 1))]
        else:
            layers = [wrap(nn.Linear(5, 8)), nn.LeakyReLU(0.2), wrap(nn.Linear(8, 7)), nn.ReLU(), wrap(nn.Linear(7, 1))]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_normalized_weights_move_as_in_one_forward(norm: str, images: bool, training: bool) -> None:
    torch.manual_seed(1)
    critic = normalized(norm, images).train(training)
    torch.manual_seed(1)
    expected = normalized(norm, images).train(training)
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64) if images else torch.randn(3, 5, dtype=torch.float64)
    for _ in range(2):
        got = parameter_gradients(input_gradient(critic, x, engine="analytic"), critic)
        assert_same(got, parameter_gradients(reference.input_gradient(expected, x), expected))
        for a, b in zip(critic.buffers(), expected.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_explain_advances_nothing(norm: str) -> None:
    critic = normalized(norm, images=False)
    before = copy.deepcopy(critic.state_dict())
    assert explain(critic, torch.randn(2, 5, dtype=torch.float64)).engine == "analytic"
    for key, value in critic.state_dict().items():
        assert torch.equal(value, before[key])


def test_each_parametrization_is_read_once() -> None:
    class Count(nn.Module):
        reads = 0

        def forward(self, weight: Tensor) -> Tensor:
            Count.reads += 1
            return 2 * weight

    critic = mlp(3, 8, 1)
    nn.utils.parametrize.register_parametrization(critic[0], "weight", Count())
    explain(critic, torch.randn(2, 3))
    Count.reads = 0
    input_gradient(critic, torch.randn(2, 3), engine="analytic")
    assert Count.reads == 1


# Further arguments and inputs.


class Projection(nn.Module):
    """Miyato and Koyama 2018: the class, or a vector, by an inner product."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 7, 2), nn.ReLU())
        self.head, self.classes = nn.Linear(7, 1), nn.Embedding(4, 7)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        h = self.body(x).sum((2, 3))
        return self.head(h) + (self.classes(label) * h).sum(1, keepdim=True)


LABELS = torch.tensor([3, 0, 1, 3, 2, 0])
VECTORS = torch.linspace(-1, 1, 18, dtype=torch.float64).view(6, 3)

# Each critic with the shape of a batch for it and its further arguments.
CONDITIONAL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = {
    "projection": (Projection, (6, 2, 5, 5), (LABELS,), {}),
    "projection by name": (Projection, (6, 2, 5, 5), (), {"label": LABELS}),
    "an embedding beside the input": (
        lambda: Forward(
            lambda self, x, label: self.body(torch.cat([x, self.classes(label)], 1)),
            classes=nn.Embedding(4, 3),
            body=mlp(8, 9, 1),
        ),
        (6, 5),
        (LABELS,),
        {},
    ),
    "an embedding as channels": (
        lambda: Forward(
            lambda self, x, label: self.body(
                torch.cat([x, self.classes(label)[:, :, None, None].expand(-1, -1, 4, 3)], 1)
            ),
            classes=nn.Embedding(4, 2),
            body=nn.Sequential(nn.Conv2d(4, 3, 2), nn.SiLU(), nn.Conv2d(3, 1, 2)),
        ),
        (6, 2, 4, 3),
        (LABELS,),
        {},
    ),
    "one-hot labels": (
        lambda: Forward(
            lambda self, x, label: self.body(x) * F.one_hot(label, 4).to(x.dtype) + F.one_hot(label, 4),
            body=mlp(5, 9, 4),
        ),
        (6, 5),
        (LABELS,),
        {},
    ),
    "bilinear": (
        lambda: Forward(
            lambda self, x, v: self.pair(self.body(x), v).relu(), body=mlp(5, 4), pair=nn.Bilinear(4, 3, 2)
        ),
        (6, 5),
        (VECTORS,),
        {},
    ),
    "bilinear the other way": (
        lambda: Forward(
            lambda self, x, v: self.pair(v, self.body(x)).tanh(), body=mlp(5, 4), pair=nn.Bilinear(3, 4, 2)
        ),
        (6, 5),
        (VECTORS,),
        {},
    ),
    "modulation": (  # FiLM
        lambda: Forward(
            lambda self, x, v: self.head((self.body(x) * (1 + self.scale(v).tanh()) + self.shift(v)).relu()),
            body=nn.Linear(5, 4),
            scale=nn.Linear(3, 4),
            shift=nn.Linear(3, 4),
            head=nn.Linear(4, 1),
        ),
        (6, 5),
        (VECTORS,),
        {},
    ),
    "one vector for all": (
        lambda: Forward(
            lambda self, x, v, *, gain, act="relu": gain * getattr(F, act)(self.body(x) + self.shift(v)),
            body=nn.Linear(5, 4),
            shift=nn.Linear(3, 4),
        ),
        (6, 5),
        (VECTORS[0],),
        {"gain": 0.3, "act": "silu"},
    ),
    "nested arguments": (
        lambda: Forward(
            lambda self, x, options, flag: self.body(x + options["shift"][0] if flag else x) * options["gain"],
            body=mlp(5, 4, 1),
        ),
        (6, 5),
        ({"shift": [torch.linspace(0, 1, 5, dtype=torch.float64)], "gain": 2},),
        {"flag": True},
    ),
    "a tuple of inputs": (
        lambda: Forward(
            lambda self, x: self.head(torch.cat([self.left(x[0]).relu(), x[1].flatten(1)], 1)).tanh(),
            left=nn.Linear(5, 4),
            head=mlp(10, 5, 1),
        ),
        ((6, 5), (6, 2, 3)),
        (),
        {},
    ),
    "a list of inputs, one ignored": (
        lambda: Forward(lambda self, x: self.head(x[1] * x[0]), head=mlp(5, 4, 1)),
        [(6, 5), (6, 1), (6, 4)],
        (),
        {},
    ),
    "a dict of inputs and a label": (
        lambda: Forward(
            lambda self, x, label: self.head(x["b"] + self.left(x["a"]).relu()) * self.classes(label),
            left=nn.Linear(5, 4),
            head=mlp(4, 4, 1),
            classes=nn.Embedding(4, 1),
        ),
        {"a": (6, 5), "b": (6, 4)},
        (LABELS,),
        {},
    ),
}


def points_of(shapes: Any, dtype: torch.dtype = torch.float64) -> Any:
    """A batch of this shape, or a structure of batches."""
    if isinstance(shapes, dict):
        return {key: torch.randn(shape, dtype=dtype) for key, shape in shapes.items()}
    if isinstance(shapes[0], tuple):
        return type(shapes)(torch.randn(shape, dtype=dtype) for shape in shapes)
    return torch.randn(shapes, dtype=dtype)


@pytest.mark.parametrize("name", CONDITIONAL)
def test_further_arguments_and_inputs(name: str) -> None:
    make, shapes, args, kwargs = CONDITIONAL[name]
    critic, x = make().double(), points_of(shapes)
    given = {"critic_args": args, "critic_kwargs": kwargs}
    assert str(explain(critic, x, **given)).startswith("engine: analytic\n")
    other = points_of(shapes)
    mix = torch.rand(6, dtype=torch.float64)
    got, expected = (
        gradient_penalty(critic, x, other, mix=mix, engine=engine, reduction="none", **given)
        for engine in ("analytic", "autograd")
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert_same(parameter_gradients(got, critic), parameter_gradients(expected, critic))
    losses = [
        wgan_gp_loss(critic, x, other, mix=mix, engine=engine, reduction="max", **given)
        for engine in ("analytic", "autograd")
    ]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    assert_same(*(parameter_gradients(loss, critic) for loss in losses))


def test_labels_move_with_the_call() -> None:
    critic, x = Projection().double(), torch.randn(6, 2, 5, 5, dtype=torch.float64)
    for labels in (LABELS, LABELS.flip(0), LABELS % 2):
        got = input_gradient(critic, x, critic_args=(labels,), engine="analytic")
        expected = reference.input_gradient(lambda x, labels=labels: critic(x, labels), x)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradients_reach_arguments_that_require_them() -> None:
    make, shape, (vectors,), _ = CONDITIONAL["modulation"]
    critic, x = make().double(), torch.randn(shape, dtype=torch.float64)
    got, expected = (
        torch.autograd.grad(input_gradient(critic, x, critic_args=(v,), engine=engine).square().sum(), v)[0]
        for engine in ("analytic", "autograd")
        for v in [vectors.clone().requires_grad_()]
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# Each critic, whose parameters have the same cotangent, with the shape of a batch for it and its further arguments.
SUMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[Any, ...]]] = {
    "two embeddings": (
        lambda: Forward(
            lambda self, x, y: F.silu(self.body(x) + self.a(y) + self.b(y)),
            body=nn.Linear(5, 4),
            a=nn.Embedding(4, 4),
            b=nn.Embedding(4, 4),
        ),
        (6, 5),
        (LABELS,),
    ),
    **{
        f"two vectors of shape {shape}, {name}": (
            lambda shape=shape, after=after: Forward(
                lambda self, x: self.after(self.body(x) + self.a + self.b),
                body=nn.Linear(5, 4),
                after=after(),
                a=nn.Parameter(torch.randn(shape)),
                b=nn.Parameter(torch.randn(shape)),
            ),
            (1, 5),
            (),
        )
        for shape in ((4,), (1, 4))
        for name, after in {
            "linear": nn.Identity,
            "smooth": nn.SiLU,
            "with a head": lambda: nn.Sequential(nn.SiLU(), nn.Linear(4, 1)),
        }.items()
    },
}


@pytest.mark.parametrize("function", [gradient_penalty, wgan_gp_loss])
@pytest.mark.parametrize("p", [2.0, 3.0])
@pytest.mark.parametrize("name", SUMS)
def test_gradients_of_parameters_share_no_memory(name: str, p: float, function: Any) -> None:
    """Where they do, what is scaled or accumulated in place is so more than once."""
    make, shape, args = SUMS[name]
    critic, (real, fake) = make().double(), torch.randn(2, *shape, dtype=torch.float64)
    mix, expected = torch.rand(shape[0], 1, dtype=torch.float64), copy.deepcopy(critic)
    for _ in range(2):  # gradients accumulate
        for model, engine in ((critic, "analytic"), (expected, "autograd")):
            (10 * function(model, real, fake, mix=mix, p=p, engine=engine, critic_args=args)).backward()
        assert_same([q.grad for q in critic.parameters()], [q.grad for q in expected.parameters()])
        grads = [q.grad for q in critic.parameters() if q.grad is not None]
        assert len({grad.untyped_storage().data_ptr() for grad in grads}) == len(grads)


def test_batchnorm_in_training_warns() -> None:
    critic = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    with pytest.warns(UserWarning, match="input_gradient: the critic normalizes over the batch"):
        input_gradient(critic, torch.randn(5, 3))
    input_gradient(critic.eval(), torch.randn(5, 3))


def test_compiled_critics_are_unwrapped() -> None:
    critic, x = mlp(3, 8, 1), torch.randn(2, 3)
    compiled = torch.compile(critic, backend="eager")
    assert explain(compiled, x).engine == "analytic"
    assert torch.equal(input_gradient(compiled, x), input_gradient(critic, x))
    nested = nn.Sequential(torch.compile(mlp(3, 8, 4), backend="eager"), nn.ReLU(), nn.Linear(4, 1))
    torch.testing.assert_close(input_gradient(nested, x, engine="analytic"), reference.input_gradient(nested, x))


def test_data_parallel_critics_are_refused(tmp_path: Any) -> None:
    critic, x = mlp(3, 8, 1), torch.randn(2, 3)
    for engine in ("auto", "analytic", "autograd"):
        with pytest.raises(NotImplementedError, match=r"wrapped in DataParallel.*unsynchronised"):
            input_gradient(nn.DataParallel(critic), x, engine=engine)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(critic)
        with pytest.raises(
            NotImplementedError, match="input_gradient: the critic is wrapped in DistributedDataParallel"
        ):
            input_gradient(wrapped, x)
        with pytest.raises(NotImplementedError, match="explain: the critic is wrapped in DistributedDataParallel"):
            explain(wrapped, x)
    finally:
        torch.distributed.destroy_process_group()


# Precision.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_critics(dtype: torch.dtype, device: torch.device) -> None:
    for name in ("mlp", "images"):
        make, shape = CRITICS[name]
        critic, x = make().to(device, dtype), torch.randn(shape, device=device).to(dtype)
        expected = reference.input_gradient(copy.deepcopy(critic).double(), x.double())
        gradient = input_gradient(critic, x, engine="analytic")
        assert gradient.dtype == dtype
        tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
        torch.testing.assert_close(gradient.double(), expected.detach(), **tolerance)
        for parameter, derivative in zip(critic.parameters(), parameter_gradients(gradient, critic), strict=True):
            assert derivative is None or derivative.dtype == parameter.dtype


def test_autocast_keeps_parameters_and_gradients_in_float32(device: torch.device) -> None:
    critic, x = mlp(5, 32, 32, 1).to(device), torch.randn(16, 5, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        gradient = input_gradient(critic, x, engine="analytic")
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, reference.input_gradient(critic, x), rtol=0.05, atol=0.02)
    for derivative in parameter_gradients(gradient, critic):
        assert derivative is None or derivative.dtype == torch.float32
    with torch.autocast(device.type, dtype=torch.bfloat16):  # a 16-bit input, as from a generator under autocast
        again = input_gradient(critic, x.bfloat16(), engine="analytic")
    assert again.dtype == torch.bfloat16


def test_autocast_leaves_float64_alone(device: torch.device) -> None:
    critic, x = mlp(5, 8, 1).to(device, torch.float64), torch.randn(4, 5, dtype=torch.float64, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        gradient = input_gradient(critic, x, engine="analytic")
    torch.testing.assert_close(gradient, reference.input_gradient(critic, x), rtol=1e-12, atol=1e-12)


def test_a_critic_in_another_dtype_refuses_the_first_one() -> None:
    """As a fresh critic does, although there is a plan for the first dtype."""
    critic, x = mlp(3, 8, 1), torch.randn(4, 3)
    for to, own in ((torch.float64, x), (torch.float32, x.double()), (torch.bfloat16, x)):
        input_gradient(critic, own, engine="analytic")
        wgan_gp_loss(critic, own, own, engine="analytic")
        critic.to(to)
        for other in (critic, copy.deepcopy(critic)):
            with pytest.raises(TypeError, match=rf"x must have the dtype of the critic \({to}\), got {own.dtype}"):
                input_gradient(other, own)
            for function in (gradient_penalty, wgan_gp_loss):
                with pytest.raises(TypeError, match=rf"must have the dtype of the critic \({to}\), got {own.dtype}"):
                    function(other, own, own)
        explain(critic, own)
        assert explain(critic, own.to(to)).engine == "analytic"
        critic.to(torch.float64 if to == torch.float64 else torch.float32)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_result_does_not_depend_on_threads_within_the_kernels(threads: int) -> None:
    make, shape = CRITICS["more than one tile"]
    critic, x = make().double(), torch.randn(shape, dtype=torch.float64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        gradient = input_gradient(critic, x, engine="analytic")
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(gradient, reference.input_gradient(critic, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("level", ["portable", "avx2"])
def test_simd_levels(level: str) -> None:
    """The level is chosen once a process."""
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_critic as t; t.check_some()"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "WGAN_EXT_SIMD": level, "OMP_NUM_THREADS": "1"}
    )


def check_some() -> None:
    for make, shape in map(CRITICS.__getitem__, ("relu", "more than one tile")):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
            critic, x = make().to(dtype), torch.randn(shape, dtype=dtype)
            gradient, expected = input_gradient(critic, x, engine="analytic"), reference.input_gradient(critic, x)
            torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)
            got, want = parameter_gradients(gradient, critic), parameter_gradients(expected, critic)
            assert_same(got, want, rtol=10 * tolerance, atol=10 * tolerance)


def test_graph_is_freed() -> None:
    critic, x = mlp(3, 8, 1), torch.randn(4, 3)
    input_gradient(critic, x).square().sum().backward()
    gc.collect()
    before = len([o for o in gc.get_objects() if type(o) is Tensor])
    for _ in range(3):
        input_gradient(critic, x).square().sum().backward()
    gc.collect()
    assert len([o for o in gc.get_objects() if type(o) is Tensor]) == before


# Errors.


@pytest.mark.parametrize(
    ("critic", "x", "error", "match"),
    [
        (mlp(3, 1), [1.0], TypeError, "input_gradient: x must be a tensor, got list"),
        (
            mlp(3, 1),
            torch.ones(2, 3, dtype=torch.int64),
            TypeError,
            "x must be a floating-point tensor, got torch.int64",
        ),
        (
            mlp(3, 1),
            torch.ones(0, 3),
            ValueError,
            r"x must hold at least one sample in dimension 0, got shape \(0, 3\)",
        ),
        (mlp(3, 1), torch.tensor(1.0), ValueError, "at least one sample"),
        (mlp(3, 1), torch.ones(2, 4), RuntimeError, "mat1 and mat2 shapes cannot be multiplied"),
        (mlp(3, 1), torch.ones(2, 3).double(), TypeError, r"x must have the dtype of the critic \(torch.float32\)"),
        (
            mlp(3, 1),
            torch.ones(2, 3, device="meta"),
            ValueError,
            r"x must be on the device of the critic \(cpu\), got meta",
        ),
        (nn.Conv2d(3, 1, 3), torch.ones(3, 5, 5), ValueError, r"for each of the 3 samples, got shape \(1, 3, 3\)"),
        (nn.Conv2d(3, 1, 6), torch.ones(1, 3, 5, 5), RuntimeError, "Kernel size can't be greater"),
        (nn.Flatten(0), torch.ones(2, 3), ValueError, r"for each of the 2 samples, got shape \(6,\)"),
        (lambda x: x.mean(), torch.ones(2, 3), ValueError, r"one score.*for each of the 2 samples, got shape \(\)"),
        (lambda x: x.sum(0), torch.ones(2, 3), ValueError, r"for each of the 2 samples, got shape \(3,\)"),
        (lambda x: (x, x), torch.ones(2, 3), TypeError, "the critic must return a tensor, got tuple"),
        (lambda x: x.long(), torch.ones(2, 3), TypeError, "must return floating-point scores"),
        (lambda x: torch.ones(2), torch.ones(2, 3), ValueError, "scores do not depend on its input"),
        (lambda x: torch.ones(2, requires_grad=True), torch.ones(2, 3), ValueError, "do not depend on its input"),
        ("critic", torch.ones(2, 3), TypeError, "critic must be callable, got str"),
    ],
)
def test_errors(critic: Any, x: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        input_gradient(critic, x)


def test_unknown_engine() -> None:
    with pytest.raises(ValueError, match='engine must be "auto", "analytic" or "autograd", got \'fast\''):
        input_gradient(mlp(3, 1), torch.ones(2, 3), engine="fast")  # type: ignore[arg-type]


def test_compiled_step() -> None:
    critic, x = mlp(3, 8, 1).double(), torch.randn(4, 3, dtype=torch.float64)

    def step(x: Tensor) -> Tensor:
        return input_gradient(critic, x, engine="analytic").square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    compiled(x).backward()
    got = [p.grad for p in critic.parameters()]
    critic.zero_grad()
    step(x).backward()
    assert_same(got, [p.grad for p in critic.parameters()])
