"""What is before a multiscale map and behind it: the stem and the head, as modules and as programs (theory §9)."""

from __future__ import annotations

from typing import Any

from torch import nn

from .blocks import standardize
from .multiscale import Shape
from .multiscale_proofs import Head
from .steps import Average, Conv, Path, Pool, Slope

__all__ = ["head", "head_program", "stem", "stem_program"]


def stem(in_channels: int, channels: int, stride: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False),
        nn.GroupNorm(groups, channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
        nn.GroupNorm(groups, channels),
    )


def head(channels: tuple[int, ...], groups: int, width: int, classes: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "norms": nn.ModuleList(nn.GroupNorm(groups, c) for c in channels),
            "branches": nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels),
            "mix": nn.Conv2d(width, width, 1),
            "linear": nn.Linear(width, classes),
        }
    )


def stem_program(modules: nn.Sequential) -> Path:
    """x ↦ injection, of a :func:`stem`."""
    parts: Any = modules
    first, norm, _, second, last = parts
    return _conv(first), standardize(norm), Slope(1.0), _conv(second), standardize(last)


def head_program(modules: nn.ModuleDict, shapes: tuple[Shape, ...]) -> Head:
    """Branches of these ``shapes`` ↦ features ``(B, k, 1, 1)``, of a :func:`head`."""
    last = len(shapes) - 1
    branches: Any = modules["branches"]
    norms: Any = modules["norms"]
    each = tuple(
        (standardize(norm), _conv(conv), Slope(1.0), Pool(2 ** (last - i)))
        for i, (norm, conv) in enumerate(zip(norms, branches, strict=True))
    )
    pixels = shapes[-1][1] * shapes[-1][2]
    return Head(each, (_conv(modules["mix"]), Slope(1.0), Average(pixels)))


def _conv(conv: Any) -> Conv:
    return Conv(conv.weight, stride=conv.stride[0], bias=conv.bias)
