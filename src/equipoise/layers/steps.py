"""What a convolutional map is made of, one step at a time, and three ways to read a program of them (theory §9).

A path is a sequence of steps; a program sends images along paths and combines them linearly. Read as *values* it
computes; read as *gains* it gives, from the norms of its steps, how much each input can move the output; read as
*proved values* it computes in float64 with a bound on everything that was rounded. What is certified is therefore what
is run.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, NamedTuple, Self, TypeVar, final

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate

from .. import verified

__all__ = [
    "VALUES",
    "Average",
    "Conv",
    "Gains",
    "GroupMean",
    "Mask",
    "Path",
    "Pool",
    "Proved",
    "Proving",
    "Reading",
    "Slope",
    "Sort",
    "Standardize",
    "Step",
    "Up",
    "through",
]  # fmt: skip

EPS = 1e-5
"""What a standard group normalization adds to a variance."""

V = TypeVar("V")


@dataclass(frozen=True, eq=False)
class Step(ABC):
    """An operation on images ``(B, C, H, W)``."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def lipschitz(self) -> float:
        """A proved upper bound of its Lipschitz constant in the 2-norm; ``inf`` where there is none."""

    def gain(self, x: Tensor) -> Tensor | float:
        """A bound ``(B,)`` of how much it moves, relatively, between ``x`` and any image near it."""
        return self.lipschitz()

    def slip(self, x: Tensor, y: Tensor) -> Tensor | float:
        """A bound ``(B,)`` of what ``y = self(x)`` lost by rounding in float64."""
        return 0.0

    def to64(self) -> Self:
        """The same step in float64 on the CPU."""
        wide = {
            field.name: value.detach().to("cpu", torch.float64)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **wide)


Path = tuple[Step, ...]


@final
@dataclass(frozen=True, eq=False)
class Conv(Step):
    """x ↦ K ⋆ x + b, zero padding by ⌊k/2⌋; ``norm`` bounds the operator's, ``inf`` where nothing is proved."""

    kernel: Tensor
    norm: float = math.inf
    stride: int = 1
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return conv2d(x, self.kernel, self.bias, self.stride, self.kernel.shape[2] // 2)

    def lipschitz(self) -> float:
        return self.norm

    def gain(self, x: Tensor) -> float:
        return min(self.norm, self._spread())

    def slip(self, x: Tensor, y: Tensor) -> Tensor:
        terms = self.kernel[0].numel() + 2
        offset = 0.0 if self.bias is None else _length(self.bias[None]) * math.sqrt(_pixels(y))
        return verified.gamma(2 * terms) * (self._spread() * _length(x) + offset) + verified.TINY * _entries(y) * terms

    def _spread(self) -> float:
        """‖ |K| ⋆ · ‖₂ at most: the norm of the kernel's absolute sums."""
        return verified.absolute_norm(self.kernel.abs().sum((2, 3))) * (1 + 1e-9)


@final
@dataclass(frozen=True, eq=False)
class GroupMean(Step):
    """x ↦ γ (x − mean over its group) + β: a projection, then a diagonal, so max|γ|-Lipschitz."""

    groups: int
    gamma: Tensor | None = None
    beta: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3)).unflatten(1, (self.groups, -1)).mean(2)
        means = means.repeat_interleave(x.shape[1] // self.groups, 1)[:, :, None, None]
        if self.gamma is None or self.beta is None:
            return x - means
        gamma, beta = self.gamma[:, None, None], self.beta[:, None, None]
        return torch.addcmul(beta - means * gamma, x, gamma)

    def lipschitz(self) -> float:
        return 1.0 if self.gamma is None else float(self.gamma.detach().double().abs().max())

    def slip(self, x: Tensor, y: Tensor) -> Tensor:
        terms = _entries(x) // self.groups
        offset = 0.0 if self.beta is None else _length(self.beta[None]) * math.sqrt(_pixels(x))
        return verified.gamma(terms + 32) * (4 * self.lipschitz() * _length(x) + offset) + verified.TINY * _entries(x)


@final
@dataclass(frozen=True, eq=False)
class Standardize(Step):
    """x ↦ γ (x − mean)/√(var + ε) + β over groups, the usual group normalization: not Lipschitz by a useful constant.

    Near a given x it is: with s = √(var + ε), ‖g(x) − g(x')‖ <= 2 ‖x − x'‖/s, whatever x', since s moves by at most
    ‖x − x'‖/√n.
    """

    groups: int
    gamma: Tensor
    beta: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float64:
            # torch.nn.functional's refuses a batch of one entry
            return torch.group_norm(x, self.groups, self.gamma, self.beta, EPS)
        centred, scale = self._parts(x)
        normal = (centred / scale).reshape(x.shape)
        return normal * self.gamma[:, None, None] + self.beta[:, None, None]

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        grouped = x.flatten(1).unflatten(1, (self.groups, -1))
        centred = grouped - grouped.mean(2, keepdim=True)
        return centred, (centred.square().mean(2, keepdim=True) + EPS).sqrt()

    def lipschitz(self) -> float:
        return math.inf

    def gain(self, x: Tensor) -> Tensor:
        rounding = verified.gamma(2 * _entries(x) // self.groups + 32) * _length(x)
        narrowest = (self._parts(x)[1].amin((1, 2)) - rounding).clamp_min(math.sqrt(EPS)) * (1 - 1e-9)
        return 2 * float(self.gamma.detach().abs().max()) / narrowest * (1 + 1e-9)

    def slip(self, x: Tensor, y: Tensor) -> Tensor:
        terms = _entries(x) // self.groups
        offset = _length(self.beta[None]) * math.sqrt(_pixels(x))
        return verified.gamma(2 * terms + 64) * (4 * self.gain(x) * _length(x) + 4 * _length(y) + 4 * offset)


@dataclass(frozen=True, eq=False)
class Sloped(Step):
    """A 1-Lipschitz map that only picks entries, or 0, times s."""

    slope: float

    def lipschitz(self) -> float:
        return self.slope

    def slip(self, x: Tensor, y: Tensor) -> Tensor | float:
        return verified.gamma(2) * _length(y) + verified.TINY * _entries(y)


@final
@dataclass(frozen=True, eq=False)
class Slope(Sloped):
    """x ↦ s max(x, 0)."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.relu(x) if self.slope == 1.0 else torch.relu(x) * self.slope


@final
@dataclass(frozen=True, eq=False)
class Sort(Sloped):
    """GroupSort of pairs, times s: channels c and c + 1 are put in order. Between any two images a permutation at each
    point moves nothing apart: sorting is 1-Lipschitz."""

    def __call__(self, x: Tensor) -> Tensor:
        pairs = x.unflatten(1, (-1, 2))
        low, high = torch.minimum(pairs[:, :, 0], pairs[:, :, 1]), torch.maximum(pairs[:, :, 0], pairs[:, :, 1])
        return torch.stack((low, high), 2).flatten(1, 2).mul(self.slope)


@final
@dataclass(frozen=True, eq=False)
class Up(Step):
    """Nearest upsampling by ``factor`` f: each entry appears f² times, so its norm is f."""

    factor: int

    def __call__(self, x: Tensor) -> Tensor:
        return interpolate(x, scale_factor=float(self.factor), mode="nearest")

    def lipschitz(self) -> float:
        return float(self.factor)


@final
@dataclass(frozen=True, eq=False)
class Pool(Step):
    """Mean over squares of ``factor`` × ``factor``: 1/f-Lipschitz."""

    factor: int

    def __call__(self, x: Tensor) -> Tensor:
        return avg_pool2d(x, self.factor) if self.factor > 1 else x

    def lipschitz(self) -> float:
        return verified.up(1.0 / self.factor)

    def slip(self, x: Tensor, y: Tensor) -> Tensor | float:
        return verified.gamma(self.factor**2 + 4) * _length(x) + verified.TINY * _entries(y)


@final
@dataclass(frozen=True, eq=False)
class Average(Step):
    """The mean of each channel over its ``pixels``, ``(B, C, 1, 1)``: of norm 1/√pixels."""

    pixels: int

    def __call__(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)

    def lipschitz(self) -> float:
        return verified.up(1 / verified.down(math.sqrt(self.pixels)))

    def slip(self, x: Tensor, y: Tensor) -> Tensor | float:
        return verified.gamma(_pixels(x) + 4) * _length(x) + verified.TINY * _entries(x)


@final
@dataclass(frozen=True, eq=False)
class Mask(Step):
    """x ↦ mask · x with entries 0 and 1/(1 − p), one ``mask (B, C, H, W)`` for a whole solve; without one, its norm."""

    probability: float
    mask: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return x if self.mask is None else x * self.mask

    def lipschitz(self) -> float:
        return verified.up(1 / verified.down(1 - self.probability)) if self.probability else 1.0


def _entries(x: Tensor) -> int:
    """Of an image of ``x (B, …)``, also where there is none."""
    return math.prod(x.shape[1:])


def _pixels(x: Tensor) -> int:
    return math.prod(x.shape[2:])


def _length(x: Tensor) -> Tensor:
    """‖x‖₂ ``(B,)``, rounded up a little."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1) * (1 + 1e-9)


class Reading(ABC, Generic[V]):
    """How a program is read: what goes along a path, and what a linear combination gives."""

    @abstractmethod
    def along(self, path: Path, x: V) -> V: ...

    @abstractmethod
    def combine(self, weights: Sequence[float], xs: Sequence[V]) -> V:
        """Σ weights · xs."""


class _Values(Reading[Tensor]):
    def along(self, path: Path, x: Tensor) -> Tensor:
        for step in path:
            x = step(x)
        return x

    def combine(self, weights: Sequence[float], xs: Sequence[Tensor]) -> Tensor:
        total = xs[0] if weights[0] == 1.0 else xs[0] * weights[0]
        for weight, x in zip(weights[1:], xs[1:], strict=True):
            total = torch.add(total, x, alpha=weight)
        return total


VALUES = _Values()


@final
class Gains(Reading[tuple[float, ...]]):
    """A value is, for every input, a bound of how much faster than that input it can move."""

    def along(self, path: Path, x: tuple[float, ...]) -> tuple[float, ...]:
        factor = through(path)
        return tuple(_times(factor, entry) for entry in x)

    def combine(self, weights: Sequence[float], xs: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
        columns = zip(*xs, strict=True)
        return tuple(
            _sum(_times(abs(w), entry) for w, entry in zip(weights, column, strict=True)) for column in columns
        )


def through(path: Path) -> float:
    """A bound of the Lipschitz constant of a path: the product of its steps', rounded up."""
    factor = 1.0
    for step in path:
        factor = _times(factor, step.lipschitz())
    return factor


def _times(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a if b == 1 else b if a == 1 else verified.up(a * b)


def _sum(terms: Any) -> float:
    total = 0.0
    for term in terms:
        total = verified.up(total + term) if total and term else total + term
    return total


class Proved(NamedTuple):
    """A value in float64 and a bound ``(B,)`` of its distance to what exact arithmetic gives."""

    value: Tensor
    error: Tensor


@final
class Proving(Reading[Proved]):
    """Computes in float64 and bounds what is lost: sums in any order, fused or not."""

    def along(self, path: Path, x: Proved) -> Proved:
        value, error = x
        for step in path:
            image = step(value)
            error = (step.gain(value) * error + step.slip(value, image)) * (1 + 1e-9)
            value = image
        return Proved(value, error)

    def combine(self, weights: Sequence[float], xs: Sequence[Proved]) -> Proved:
        value = VALUES.combine(weights, [x.value for x in xs])
        rounding = verified.gamma(2 * len(xs) + 2)
        error = sum((abs(w) * (x.error + rounding * _length(x.value)) for w, x in zip(weights, xs, strict=True)), 0.0)
        return Proved(value, torch.as_tensor(error) * (1 + 1e-9) + verified.TINY * _entries(value))
