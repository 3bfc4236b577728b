"""Networks that can be trained by name: kind × preset → the network's sizes and how it is trained by default."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ._config import TrainingConfig
from .augmentation import usual_augmentation
from .data import Data
from .errors import OptionError
from .layers import MDEQ, NEMON, LipschitzMDEQ, MonConv2d, MonDEQ, MultiTierMonDEQ, NEMONConv2d

__all__ = ["KINDS", "Kind", "Preset", "Sizes", "classifier", "convolutional", "multiscale", "preset_of"]


@dataclass(frozen=True)
class Sizes:
    """What may be asked of a network beside its preset: None leaves that to the preset.

    ``features`` are units, or channels; ``rank`` rows of A; ``margin`` that to start from; ``gamma`` the measure, of a
    multiscale network the contraction that is to be proved, dropout counted.
    """

    features: int | None = None
    rank: int | None = None
    margin: float | None = None
    gamma: float | None = None
    seed: int = 0

    def given(self) -> tuple[str, ...]:
        """The names of those that are asked for."""
        return tuple(name for name in ("features", "rank", "margin", "gamma") if getattr(self, name) is not None)


@dataclass(frozen=True)
class Preset:
    """How to build a network for a data set, and how to train it where nothing else is said."""

    build: Callable[[Data, Sizes], nn.Sequential]
    training: TrainingConfig
    augment: bool = False

    def config(self, data: str, augment: bool | None = None, **given: Any) -> TrainingConfig:
        """The preset's training on the data set of that name, with every field of ``given`` that is not None."""
        wanted = self.augment if augment is None else augment
        fields = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self.training, augment=usual_augmentation(data) if wanted else None, **fields)


@dataclass(frozen=True)
class Kind:
    """A kind of network: its presets by name, the default first, and which of :class:`Sizes` it knows."""

    presets: dict[str, Preset]
    sizes: tuple[str, ...]
    images: bool = False
    """Whether its layer is on images; such networks train as floats."""


def classifier(
    data: Data,
    features: int,
    rank: int | None = None,
    margin: float = 0.2,
    seed: int = 0,
    gamma: float | None = None,
) -> nn.Sequential:
    """``Sequential(MonDEQ(data.features, features), Linear(features, data.class_count))``, margin learned.

    With ``gamma`` the layer is a NEMON of that measure, and rank and margin do not apply.
    Weights are drawn from ``seed``; torch's global generator stays where it was.
    """

    def draw() -> tuple[nn.Module, ...]:
        layer: nn.Module
        if gamma is None:
            layer = MonDEQ(data.features, features, rank=rank, margin=margin, learn_margin=True)
        else:
            layer = NEMON(data.features, features, gamma=gamma)
        return layer, nn.Linear(features, data.class_count)

    return _drawn(data, seed, draw)


def convolutional(
    data: Data, channels: int = 32, stride: int = 2, pool: int = 2, seed: int = 0, gamma: float = 0.1
) -> nn.Sequential:
    """``Sequential(Unflatten, NEMONConv2d, AvgPool2d, Flatten, Linear)`` on flat images, kernels of 3×3.

    Weights are drawn from ``seed``; torch's global generator stays where it was.

    Raises :class:`OptionError` where the images are smaller than stride times pooling.
    """
    inputs, height, width = image_shape(data)
    sizes = [-(-side // stride) // pool for side in (height, width)]
    if min(sizes) < 1:
        raise OptionError(f"images of {height}×{width} are too small for stride {stride}, pooling {pool}")

    def draw() -> tuple[nn.Module, ...]:
        return (
            nn.Unflatten(1, (inputs, height, width)),
            NEMONConv2d(inputs, channels, 3, gamma, stride),
            nn.AvgPool2d(pool),
            nn.Flatten(),
            nn.Linear(channels * sizes[0] * sizes[1], data.class_count),
        )

    return _drawn(data, seed, draw)


def image_shape(data: Data) -> tuple[int, int, int]:
    """(channels, height, width) of the images in ``data``; raises :class:`OptionError` where there are none."""
    shape = data.preprocessing.input_shape
    if len(shape) < 2:
        raise OptionError(f"{data.name} has {data.features} features and no images: a convolution needs images")
    return data.features // (shape[-2] * shape[-1]), shape[-2], shape[-1]


def _drawn(data: Data, seed: int, draw: Callable[[], tuple[nn.Module, ...]]) -> nn.Sequential:
    """The modules in a row, their weights drawn from ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(*draw())
    model.preprocessing = data.preprocessing  # type: ignore[assignment]  # travels into files
    return model


def preset_of(kind: str, preset: str | None = None) -> Preset:
    """The preset of that name, the kind's first one where None.

    Raises :class:`OptionError` for a name that there is not.
    """
    if kind not in KINDS:
        raise OptionError(f"model={kind!r}: choose one of {', '.join(KINDS)}")
    presets = KINDS[kind].presets
    if preset is not None and preset not in presets:
        raise OptionError(f"preset={preset!r}: a {kind} has {', '.join(presets)}")
    return presets[next(iter(presets)) if preset is None else preset]


def _mondeq(features: int, share: int) -> Callable[[Data, Sizes], nn.Sequential]:
    """A fully connected monDEQ with 1/``share`` of its features as rank."""

    def build(data: Data, asked: Sizes) -> nn.Sequential:
        n = features if asked.features is None else asked.features
        rank = max(n // share, 1) if asked.rank is None else asked.rank
        return classifier(data, n, rank, 1.0 if asked.margin is None else asked.margin, asked.seed)

    return build


def _nemon(data: Data, asked: Sizes) -> nn.Sequential:
    n, gamma = 100 if asked.features is None else asked.features, 0.95 if asked.gamma is None else asked.gamma
    return classifier(data, n, seed=asked.seed, gamma=gamma)


def _nemonconv(channels: int, stride: int, pool: int) -> Callable[[Data, Sizes], nn.Sequential]:
    """[JDPB21]: ``published`` is as in its code, which pads the images by a pixel first; γ = 0.1 is its default."""

    def build(data: Data, asked: Sizes) -> nn.Sequential:
        c, gamma = channels if asked.features is None else asked.features, 0.1 if asked.gamma is None else asked.gamma
        return convolutional(data, c, stride, pool, asked.seed, gamma)

    return build


def _monconv(channels: int, colours: int, stride: int, pool: int) -> Callable[[Data, Sizes], nn.Sequential]:
    """[WK20]: a single convolution of ``channels``, on images in colour ``colours``, averaged over squares of ``pool``.

    ``published`` has the size that the paper names for MNIST and CIFAR-10.
    """

    def build(data: Data, asked: Sizes) -> nn.Sequential:
        inputs, height, width = image_shape(data)
        c = asked.features or (channels if inputs == 1 else colours)
        height, width = (-(-side // stride) // pool for side in (height, width))
        return _drawn(
            data,
            asked.seed,
            lambda: (
                nn.Unflatten(1, image_shape(data)),
                MonConv2d(inputs, c, image_shape(data)[1:], stride=stride, **_margin(asked)),
                nn.AvgPool2d(pool),
                nn.Flatten(),
                nn.Linear(c * height * width, data.class_count),
            ),
        )

    return build


def _multitier(grey: tuple[int, ...], coloured: tuple[int, ...], stride: int) -> Callable[[Data, Sizes], nn.Sequential]:
    """[WK20]: tiers of ``grey`` or ``coloured`` channels, finest first; the head sees the coarsest.

    Where the features are asked for they are the finest tier's, and the others have twice as many.
    """

    def build(data: Data, asked: Sizes) -> nn.Sequential:
        inputs, *sides = image_shape(data)
        tiers = grey if inputs == 1 else coloured
        if asked.features is not None:
            tiers = (asked.features, *(2 * asked.features for _ in tiers[1:]))
        halved = stride * 2 ** (len(tiers) - 1)
        return _drawn(
            data,
            asked.seed,
            lambda: (
                nn.Unflatten(1, image_shape(data)),
                MultiTierMonDEQ(inputs, tiers, image_shape(data)[1:], stride=stride, **_margin(asked)),
                nn.Flatten(),
                nn.Linear(tiers[-1] * math.prod(side // halved for side in sides), data.class_count),
            ),
        )

    return build


def multiscale(
    kind: type[LipschitzMDEQ] | type[MDEQ], name: Any, data: Data, asked: Sizes, **options: Any
) -> nn.Sequential:
    """``Sequential(Unflatten, kind)`` on flat images: [SI26], the kind's own preset of that name with ``options``."""
    inputs, *size = image_shape(data)
    if asked.gamma is not None:
        options["contraction"] = asked.gamma

    def draw() -> tuple[nn.Module, ...]:
        network = kind.preset(name, inputs, (size[0], size[1]), data.class_count, **options)
        return nn.Unflatten(1, (inputs, *size)), network

    return _drawn(data, asked.seed, draw)


def _multiscales(kind: type[LipschitzMDEQ] | type[MDEQ]) -> Kind:
    epochs = {"tiny": 5, "small": 20, "published": 200}
    return Kind(
        {
            name: Preset(
                partial(multiscale, kind, name),
                TrainingConfig(count, learning_rate=1e-3, weight_decay=0.0, schedule="cosine"),
                augment=True,
            )
            for name, count in epochs.items()
        },
        ("gamma",) if kind is LipschitzMDEQ else (),
        images=True,
    )


def _margin(asked: Sizes) -> dict[str, Any]:
    return {"margin": 1.0 if asked.margin is None else asked.margin, "learn_margin": True}


def _published(epochs: int) -> TrainingConfig:
    """As in the code of [WK20]: plain Adam, its rate cut to a tenth three times."""
    return TrainingConfig(epochs, learning_rate=1e-3, weight_decay=0.0, schedule="step")


DEFAULT = TrainingConfig(12)
SHORT = TrainingConfig(4, learning_rate=1e-2, weight_decay=0.0)

KINDS: dict[str, Kind] = {
    "mondeq": Kind(
        {"small": Preset(_mondeq(100, 4), DEFAULT), "published": Preset(_mondeq(87, 1), _published(40))},
        ("features", "rank", "margin"),
    ),
    "nemon": Kind({"small": Preset(_nemon, DEFAULT)}, ("features", "gamma")),
    "nemonconv": Kind(
        {
            "small": Preset(_nemonconv(32, 2, 2), TrainingConfig(5)),
            "published": Preset(_nemonconv(81, 1, 4), TrainingConfig(40)),
        },
        ("features", "gamma"),
        images=True,
    ),
    "monconv": Kind(
        {
            "small": Preset(_monconv(24, 32, 2, 2), SHORT),
            "tiny": Preset(_monconv(8, 8, 2, 2), SHORT),
            "published": Preset(_monconv(56, 81, 1, 4), _published(40)),
        },
        ("features", "margin"),
        images=True,
    ),
    "multitier": Kind(
        {
            "small": Preset(_multitier((16, 32), (16, 32), 2), SHORT),
            "tiny": Preset(_multitier((4, 8), (4, 8), 2), SHORT),
            "published": Preset(_multitier((16, 32, 38), (16, 32, 60), 1), _published(40)),
        },
        ("features", "margin"),
        images=True,
    ),
    "lmdeq": _multiscales(LipschitzMDEQ),
    "mdeq": _multiscales(MDEQ),
}
"""``published``: sizes and training of the paper's code; ``small``: on two cores in minutes; ``tiny``: to look at."""
