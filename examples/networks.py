"""The networks of train.py: a DCGAN for images whose sides halve at least twice, an MLP for points and small images."""

from __future__ import annotations

import math

from torch import nn

import wgan_ext

WIDTH = 128


def latent_size(shape: tuple[int, ...]) -> int:
    """How many normal variables the generator turns into one sample of this shape."""
    return 2 if math.prod(shape) == 2 else 64


def generator(shape: tuple[int, ...], spectral: bool) -> nn.Sequential:
    """From [B, latent_size(shape)] to samples [B, *shape], images in (-1, 1).

    ``spectral`` normalizes all layers but the last.
    """
    latent, layers = latent_size(shape), nn.Sequential()
    halvings = _halvings(shape)
    if halvings:
        channels = [shape[0], *(32 * 2**i for i in range(1, halvings + 1))]
        smallest = (channels[-1], *(side // 2**halvings for side in shape[1:]))
        layers.extend([_layer(spectral, nn.Linear(latent, math.prod(smallest))), nn.Unflatten(1, smallest), nn.ReLU()])
        for i in range(halvings, 1, -1):
            layers.extend([_layer(spectral, nn.ConvTranspose2d(channels[i], channels[i - 1], 4, 2, 1)), nn.ReLU()])
        layers.append(nn.ConvTranspose2d(channels[1], channels[0], 4, 2, 1))
    else:
        for narrow, wide in ((latent, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH)):
            layers.extend([_layer(spectral, nn.Linear(narrow, wide)), nn.ReLU()])
        layers.extend([nn.Linear(WIDTH, math.prod(shape)), nn.Unflatten(1, shape)])
    if len(shape) == 3:
        layers.append(nn.Tanh())
    return layers


def critic(shape: tuple[int, ...], spectral: bool) -> nn.Sequential:
    """From samples [B, *shape] to scores [B, 1]; ``spectral`` normalizes every layer."""
    layers = nn.Sequential()
    halvings = _halvings(shape)
    if halvings:
        channels = [shape[0], *(32 * 2**i for i in range(1, halvings + 1))]
        for i in range(halvings):
            layers.extend([_layer(spectral, nn.Conv2d(channels[i], channels[i + 1], 4, 2, 1)), nn.LeakyReLU(0.2)])
        features = channels[-1] * math.prod(side // 2**halvings for side in shape[1:])
        return layers.extend([nn.Flatten(), _layer(spectral, nn.Linear(features, 1))])
    layers.append(nn.Flatten())
    for narrow, wide in ((math.prod(shape), WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH)):
        layers.extend([_layer(spectral, nn.Linear(narrow, wide)), nn.LeakyReLU(0.2)])
    return layers.append(_layer(spectral, nn.Linear(WIDTH, 1)))


def _layer(spectral: bool, layer: nn.Module) -> nn.Module:
    return wgan_ext.spectral_norm(layer) if spectral else layer


def _halvings(shape: tuple[int, ...]) -> int:
    """How often the sides of an image can be halved and leave at least 4 pixels; 0 if less than twice."""
    if len(shape) != 3:
        return 0
    return next((n for n in (4, 3, 2) if all(side % 2**n == 0 and side >= 4 * 2**n for side in shape[1:])), 0)
