"""Random shifts and mirror images of a batch of images in memory, all of its samples at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .data import Preprocessing
from .errors import OptionError

__all__ = ["Augmentation", "usual_augmentation"]


@dataclass(frozen=True)
class Augmentation:
    """Every image shifted by up to ``shift`` pixels along each side, and mirrored left to right half of the time.

    A shift is a random crop of the image padded with black by ``shift`` pixels on every side. Labels stay as they are,
    so digits are not to be mirrored.

    Raises :class:`OptionError` for a shift that is no positive integer where nothing is mirrored either.
    """

    shift: int
    mirror: bool = False

    def __post_init__(self) -> None:
        if type(self.shift) is not int or self.shift < 0 or type(self.mirror) is not bool:
            raise OptionError(
                f"shift={self.shift!r}, mirror={self.mirror!r}: give a number of pixels, and True or False"
            )
        if self.shift == 0 and not self.mirror:
            raise OptionError("shift=0 without mirror changes nothing: leave the augmentation out")

    def __call__(self, x: Tensor, preprocessing: Preprocessing, entropy: tuple[int, ...]) -> Tensor:
        """``x (B, features)`` of preprocessed images, changed; what is drawn is a function of ``entropy`` alone.

        So a training that goes on from a checkpoint sees the images it would have seen.

        Raises :class:`OptionError` for inputs that are no images, or images smaller than the shift.
        """
        shape = preprocessing.input_shape
        if len(shape) < 2 or min(shape[-2:]) <= self.shift:
            raise OptionError(f"inputs of shape {shape} cannot be shifted by {self.shift} pixels: train without")
        height, width = shape[-2:]
        draw, count = np.random.default_rng(entropy), len(x)  # the same numbers whatever device x is on
        drawn = draw.integers(0, 2 * self.shift + 1, (2, count)), draw.integers(0, 2, count) * int(self.mirror)
        (down, right), mirrored = (torch.from_numpy(numbers).to(x.device)[..., None] for numbers in drawn)
        rows = torch.arange(height, device=x.device) + down  # (B, height), into the padded image
        columns = torch.arange(width, device=x.device)
        columns = torch.where(mirrored > 0, width - 1 - columns, columns) + right
        places = rows[:, :, None] * (width + 2 * self.shift) + columns[:, None, :]
        padded = _padded(x, preprocessing, self.shift)
        picked = padded.flatten(2).gather(2, places.view(count, 1, -1).expand(-1, padded.shape[1], -1))
        return picked.view_as(x)


def _padded(x: Tensor, preprocessing: Preprocessing, border: int) -> Tensor:
    """The images ``(B, channels, H + 2 border, W + 2 border)`` with black around them."""
    height, width = preprocessing.input_shape[-2:]
    black = preprocessing(torch.zeros(1, preprocessing.features)).to(x).view(1, -1, height, width)[..., :1, :1]
    padded = black.repeat(len(x), 1, height + 2 * border, width + 2 * border)
    padded[..., border : border + height, border : border + width] = x.view(len(x), -1, height, width)
    return padded


def usual_augmentation(data: str) -> Augmentation:
    """What is usual for the data set of that name: shifts by 4 pixels and mirror images for ``cifar10``, shifts alone
    for digits, by 1 pixel or, for ``mnist``, 2."""
    return {"cifar10": Augmentation(4, mirror=True), "mnist": Augmentation(2)}.get(data, Augmentation(1))
