"""The one way in for data: named sets as float32 tensors in memory, and batches cut from them.

``load_data`` gives a :class:`Data`: three splits, already preprocessed, and the preprocessing itself,
so that a trained file can carry it. Images are decoded once and kept as bytes in a cache; training
never touches a single sample on its own.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._images import ImageSource, read_images
from .errors import FileFormatError, InputError, MissingExtraError, OptionError

__all__ = ["Batches", "Data", "Preprocessing", "Split", "load_data"]

_DIGIT_NAMES = tuple("0123456789")
_HELD_OUT = 5_000  # validation: the last images of the training file


@dataclass(frozen=True)
class Preprocessing:
    """From raw pixels to what a network is fed: ``(raw / scale − mean) / std``, flattened.

    ``mean`` and ``std`` are numbers, or one number per channel; channels are the first axis of
    ``input_shape``. Raises :class:`OptionError` unless scale and std are positive and finite.
    """

    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    scale: float
    input_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if (
            not isinstance(self.input_shape, tuple)
            or not self.input_shape
            or any(type(n) is not int or n < 1 for n in self.input_shape)
        ):
            raise OptionError(f"input_shape={self.input_shape!r}: give positive integers, such as (28, 28)")
        for name in ("mean", "std", "scale"):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) and name != "scale" else (value,)
            if not all(isinstance(v, int | float) and math.isfinite(v) for v in numbers):
                raise OptionError(f"{name}={value!r}: give finite numbers")
            if name != "mean" and min(numbers) <= 0:
                raise OptionError(f"{name}={value!r}: give positive numbers, pixels are divided by them")
            if isinstance(value, tuple) and len(value) != self.input_shape[0]:
                raise OptionError(f"{name}={value!r}: give {self.input_shape[0]} numbers, one per channel")

    @property
    def features(self) -> int:
        """Number of inputs of the network: the product of ``input_shape``."""
        return math.prod(self.input_shape)

    def __call__(self, raw: Tensor | NDArray[Any]) -> Tensor:
        """Preprocess a batch: ``raw`` is (B, *input_shape) or (B, features); returns float32 (B, features).

        Axes of length 1 may be left out or added. Raises :class:`InputError` for another shape (images
        with their channels last, for one) and for NaN or infinite pixels.
        """
        if isinstance(raw, np.ndarray):
            raw = torch.from_numpy(np.require(raw, requirements=["C", "W"]))
        shape = tuple(raw.shape[1:])
        if shape != (self.features,) and _squeezed(shape) != _squeezed(self.input_shape):
            raise InputError(
                f"raw input of shape {tuple(raw.shape)}: give (B, {', '.join(map(str, self.input_shape))})"
                f" or (B, {self.features})"
            )
        if raw.is_floating_point() and not bool(raw.isfinite().all()):
            raise InputError("raw input has NaN or infinite pixels: clean it first")
        # In this order and in place: bit for bit the usual torchvision transform, without its temporaries.
        channels = self.input_shape[0]
        values = raw.to(torch.float32, copy=True).contiguous().view(-1, channels, self.features // channels)
        mean, std = (values.new_tensor(v).view(-1, 1) for v in (self.mean, self.std))
        return values.div_(self.scale).sub_(mean).div_(std).view(-1, self.features)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them (tuples as lists)."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """What :meth:`to_dict` wrote. Raises :class:`FileFormatError` for anything else."""
        try:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            return cls(**values)
        except (AttributeError, OptionError, TypeError) as error:
            raise FileFormatError(f"preprocessing {fields!r} is not one written here: {error}") from error


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


@dataclass(frozen=True, eq=False)
class Split:
    """Samples in memory: ``x`` (N, features) float, ``y`` (N,) int64 class indices."""

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if self.x.dim() != 2 or self.y.shape != self.x.shape[:1]:
            shapes = f"x {tuple(self.x.shape)}, y {tuple(self.y.shape)}"
            raise InputError(f"a split needs x (N, features) and y (N,), not {shapes}")

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Split:
        """The same samples on another device or in another precision (itself when nothing changes)."""
        return Split(self.x.to(device, dtype), self.y.to(device))


@dataclass(frozen=True, eq=False)
class Data:
    """A data set: three preprocessed splits, how they were preprocessed, and the names of the classes."""

    name: str
    train: Split
    validation: Split
    test: Split
    preprocessing: Preprocessing
    classes: tuple[str, ...]

    @property
    def features(self) -> int:
        """Number of inputs per sample."""
        return self.preprocessing.features

    @property
    def class_count(self) -> int:
        """Number of classes."""
        return len(self.classes)


class Batches:
    """Batches ``(x (b, features), y (b,))`` of a split, the last one possibly smaller.

    The order is a function of ``(seed, epoch)`` alone: iterating again without :meth:`set_epoch` repeats
    it. One permutation per epoch and one gather per batch, so serving a batch costs microseconds
    (views, and no copy at all, when not shuffled).
    """

    def __init__(self, split: Split, batch_size: int, shuffle: bool = False, seed: int = 0) -> None:
        if type(batch_size) is not int or batch_size < 1:
            raise OptionError(f"batch_size={batch_size!r}: give a positive integer")
        self.split = split
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = _checked_seed(seed)
        self.epoch, self.rank, self.ranks = 0, 0, 1

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def share(self, rank: int, ranks: int) -> None:
        """Serve only the part of every batch that falls to one of several processes; sizes differ by one at most."""
        self.rank, self.ranks = rank, ranks

    def weight(self, index: int) -> float:
        """What the mean over this process's part of batch ``index`` counts in the mean over all processes.

        Σ_r weight_r mean_r / ranks is then the mean over the whole batch; 1 where nothing is shared, 0 where a
        batch has fewer samples than there are processes and this one got a sample that is not its own.
        """
        size = min(self.batch_size, len(self.split) - index * self.batch_size)
        mine = size // self.ranks + (self.rank < size % self.ranks)
        return mine * self.ranks / size

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y, size = self.split.x, self.split.y, self.batch_size
        if not self.shuffle:
            for parts in zip(x.split(size), y.split(size), strict=True) if len(y) else ():
                yield self._mine(parts[0]), self._mine(parts[1])
            return
        # numpy's generator: its streams are the same on every device and mix (seed, epoch) properly.
        order = torch.from_numpy(np.random.default_rng((self.seed, self.epoch)).permutation(len(y)))
        for batch in order.to(y.device).split(size) if len(y) else ():
            chosen = self._mine(batch)
            yield x.index_select(0, chosen), y.index_select(0, chosen)

    def _mine(self, batch: Tensor) -> Tensor:
        if self.ranks == 1:
            return batch
        part = batch.tensor_split(self.ranks)[self.rank]
        return part if len(part) else batch[:1]  # or the others would wait for this process's gradient


def _checked_seed(seed: int) -> int:
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise OptionError(f"seed={seed!r}: give an integer from 0 to {2**32 - 1}")
    return seed


_PREPROCESSING = {
    "digits": Preprocessing(mean=0.3053, std=0.3760, scale=16.0, input_shape=(8, 8)),
    "mnist": Preprocessing(mean=0.1307, std=0.3081, scale=255.0, input_shape=(28, 28)),
    "cifar10": Preprocessing(
        mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), scale=255.0, input_shape=(3, 32, 32)
    ),
}
_SOURCES = {
    "mnist": ImageSource("mnist", "ylecun/mnist", "image", shape=(28, 28), classes=_DIGIT_NAMES),
    "cifar10": ImageSource(
        "cifar10",
        "uoft-cs/cifar10",
        "img",
        shape=(3, 32, 32),
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
}


def load_data(name: str = "digits", data_dir: str | Path | None = None, seed: int = 0) -> Data:
    """Load a named data set, preprocessed and in memory.

    - ``digits``: the 1,797 8×8 digits that come with scikit-learn, split 70/10/20 with every class in
      proportion; ``seed`` chooses the split.
    - ``mnist``: 60,000 training images, the last 5,000 of them held out for validation; 10,000 for test.
    - ``cifar10``: 50,000 and 10,000 likewise; 3,072 features, channels first.

    The last two come from ``data_dir``, else from the folder that ``EQUIPOISE_DATA`` names, as
    ``<folder>/<name>/{train,test}-00000-of-00001.parquet``; with neither, from the Hugging Face hub.
    Raises :class:`OptionError` (unknown name, bad seed), :class:`DataNotFoundError` (not in the folder, hub
    out of reach), :class:`FileFormatError` (files that are something else), :class:`MissingExtraError`.
    """
    _checked_seed(seed)
    if name == "digits":
        return _digits(seed)
    if name not in _SOURCES:
        raise OptionError(f"unknown data set {name!r}: choose one of digits, {', '.join(_SOURCES)}")
    source, preprocessing = _SOURCES[name], _PREPROCESSING[name]
    named = data_dir or os.environ.get("EQUIPOISE_DATA")
    folder = Path(named) if named else None
    images, labels = read_images(source, "train", folder)
    if len(images) <= _HELD_OUT:
        raise FileFormatError(f"{name}: {len(images)} training images, more than {_HELD_OUT} are needed")
    x, y = preprocessing(images), torch.from_numpy(labels)
    images, labels = read_images(source, "test", folder)
    return Data(
        name,
        train=Split(x[:-_HELD_OUT], y[:-_HELD_OUT]),
        validation=Split(x[-_HELD_OUT:], y[-_HELD_OUT:]),
        test=Split(preprocessing(images), torch.from_numpy(labels)),
        preprocessing=preprocessing,
        classes=source.classes,
    )


def _digits(seed: int) -> Data:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingExtraError("digits come with scikit-learn: pip install 'equipoise[train]'") from error
    bunch = load_digits()
    labels = bunch.target.astype(np.int64)
    rest, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    train, validation = train_test_split(rest, test_size=0.125, stratify=labels[rest], random_state=seed)
    x, y = _PREPROCESSING["digits"](bunch.images), torch.from_numpy(labels)
    return Data(
        "digits",
        train=Split(x[train], y[train]),
        validation=Split(x[validation], y[validation]),
        test=Split(x[test], y[test]),
        preprocessing=_PREPROCESSING["digits"],
        classes=_DIGIT_NAMES,
    )
