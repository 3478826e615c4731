"""The data sets of train.py: points on a plane or images, scaled to about [-1, 1], a part of them held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.datasets import load_digits, make_swiss_roll
from torch import Tensor

IMAGE_SIDE = 32
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Data:
    """Samples to learn from and samples to be judged by: points [N, D] or images [N, channels, height, width]."""

    train: Tensor
    held_out: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.train.shape[1:])

    @property
    def is_image(self) -> bool:
        """Whether a sample is an image rather than a point."""
        return self.train.dim() == 4


def load(name: str) -> Data:
    """A data set by its name, a folder of images or an .npy file; ValueError says what is wrong with it.

    Images of a folder are read as RGB, cropped to their central square and resized to 32 x 32. An .npy file holds
    points [N, D], or images [N, H, W], [N, H, W, 1] or [N, H, W, 3], of bytes or of numbers of any scale. 500 samples
    are held out, or a third if that is less; which ones is the same in every run.
    """
    path = Path(name)
    if name in NAMED:
        samples = NAMED[name]()
    elif path.is_dir():
        samples = _folder(path)
    elif path.suffix == ".npy" and path.is_file():
        samples = _array(path)
    else:
        raise ValueError(f"{name} is neither one of {', '.join(NAMED)} nor a folder of images nor an .npy file")
    if len(samples) < 12:
        raise ValueError(f"{name} has {len(samples)} samples: 12 are the least that can be split and judged by")
    if (samples == samples[0]).all():
        raise ValueError(f"{name} holds {len(samples)} times the same sample")
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    held_out = min(500, len(samples) // 3)
    samples = samples[order]
    return Data(train=samples[held_out:], held_out=samples[:held_out])


def _digits() -> Tensor:
    images, _ = load_digits(return_X_y=True)  # 1,797 scans of 8 x 8 pixels with values from 0 to 16
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1


# The toy sets are those of Gulrajani et al., Improved Training of Wasserstein GANs, 2017, section 4.
def _eight_gaussians() -> Tensor:
    angles = torch.arange(8) * (torch.pi / 4)
    return _gaussians(torch.stack([angles.cos(), angles.sin()], 1) * 2, deviation=0.02, scale=1.414)


def _twenty_five_gaussians() -> Tensor:
    steps = torch.arange(-2.0, 3.0) * 2
    return _gaussians(torch.cartesian_prod(steps, steps), deviation=0.05, scale=2.828)


def _gaussians(centres: Tensor, deviation: float, scale: float, count: int = 100_000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 2, generator=generator) * deviation
    return (centres[torch.arange(count) % len(centres)] + noise) / scale


def _swiss_roll() -> Tensor:
    points, _ = make_swiss_roll(100_000, noise=0.25, random_state=0)
    return torch.tensor(points[:, [0, 2]] / 7.5, dtype=torch.float32)


NAMED = {
    "digits": _digits,
    "8gaussians": _eight_gaussians,
    "25gaussians": _twenty_five_gaussians,
    "swissroll": _swiss_roll,
}


def _folder(folder: Path) -> Tensor:
    images = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
        try:
            with Image.open(path) as image:
                rgb = ImageOps.exif_transpose(image).convert("RGB")
                images.append(np.asarray(ImageOps.fit(rgb, (IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.LANCZOS)))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
    if not images:
        raise ValueError(f"{folder} has no images in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return torch.from_numpy(np.stack(images)).movedim(-1, 1).float() / 127.5 - 1


def _array(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an .npy file of numbers: {error}") from error
    if array.ndim == 3:
        array = array[..., None]
    is_image = array.ndim == 4 and array.shape[-1] in (1, 3)
    if array.dtype.kind not in "iuf" or 0 in array.shape or not (is_image or array.ndim == 2):
        raise ValueError(
            f"{path} must hold real numbers of shape [N, D], [N, H, W], [N, H, W, 1] or [N, H, W, 3], "
            f"got {array.dtype} of shape {array.shape}"
        )
    samples = torch.from_numpy(array.astype(np.float32))
    if not samples.isfinite().all():
        raise ValueError(f"{path} has NaN or infinite values")
    if array.dtype == np.uint8:
        samples = samples / 127.5 - 1
    else:
        low, high = samples.aminmax()
        samples = (samples - low) * (2 / (high - low).clamp(min=1e-30)) - 1
    return samples.movedim(-1, 1) if is_image else samples
