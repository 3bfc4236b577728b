"""Integer affine maps, ``y = round(2^−s (Σ_g M_g (K_g x_g) + B))``, and what they lose (theory §10)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..errors import OptionError
from .fixedpoint import INT32, INT62, Floats, Integers, above, exact_product, fit_multipliers, requantize
from .network import CodedLinear

__all__ = ["Affine", "integer_affine"]


@dataclass(frozen=True, eq=False)
class Affine:
    """Codes ``(n, k)``; columns ``bounds[g]:bounds[g+1]`` are summed in int32 and meet ``multipliers[:, g]``.

    ``least, most (n,)``: the exact range of the result; ``errors (n,)``: its distance to the real value, in units.
    """

    codes: Integers
    bits: int
    bounds: tuple[int, ...]
    multipliers: Integers
    offsets: Integers
    shift: int
    least: Integers
    most: Integers
    errors: Floats

    def __call__(self, x: Integers) -> Integers:
        """``(B, k)`` to ``(B, n)``."""
        t = np.broadcast_to(self.offsets, (len(x), len(self.offsets))).copy()
        for g, (start, stop) in enumerate(pairwise(self.bounds)):
            t += exact_product(x[:, start:stop], self.codes[:, start:stop]) * self.multipliers[:, g]
        return requantize(t, self.shift)

    @property
    def magnitude(self) -> Integers:
        """Largest |result| per row."""
        return np.maximum(np.abs(self.least), np.abs(self.most))


def integer_affine(
    linear: CodedLinear,
    factor: Fraction,
    ranges: tuple[int, int],
    steps: tuple[Fraction, ...],
    offsets: tuple[Fraction, ...],
    name: str,
) -> Affine:
    """The map ``raw ↦ factor (W (steps raw + offsets) + b)`` in integers, for raw in ``ranges``; channel by channel.

    Raises:
        OptionError: sums that no 32-bit accumulator holds, or results beyond 32 bits.
    """
    codes, scales = linear.weight.codes, linear.weight.scales
    n = codes.shape[0]
    low, high = ranges
    bounds, owners = _segments(codes, max(abs(low), abs(high)), len(steps), name)
    pieces = [codes[:, start:stop] for start, stop in pairwise(bounds)]
    least = np.stack([np.minimum(p * low, p * high).sum(axis=1) for p in pieces], axis=1)
    most = np.stack([np.maximum(p * low, p * high).sum(axis=1) for p in pieces], axis=1)
    sizes = np.maximum(np.abs(least), np.abs(most))
    factors = [factor * scales[i] * steps[g] for i in range(n) for g in owners]
    real_offsets = [
        factor * (b + s * sum((offsets[g] * int(p[i].sum()) for p, g in zip(pieces, owners, strict=True)), Fraction(0)))
        for i, (b, s) in enumerate(zip(linear.bias, scales, strict=True))
    ]
    finest = 46
    while finest > 1 and any(abs(o) * 2**finest >= 2**61 for o in real_offsets):
        finest -= 1
    fitted = fit_multipliers(factors, (n, len(owners)), [int(v) * len(owners) for v in sizes.flatten()], finest)
    shift = fitted.shift
    stored = [round(o * 2**shift) for o in real_offsets]
    lost = np.array([above(abs(o - Fraction(v, 2**shift))) for o, v in zip(real_offsets, stored, strict=True)])
    ends = _ends(fitted.values, least, most, stored, shift)
    if max((abs(v) for pair in ends for v in pair), default=0) > INT32:
        raise OptionError(f"{name}: results beyond 32 bits; narrow the input range")
    errors: NDArray[np.float64] = 0.5 + (fitted.errors * sizes).sum(axis=1) + lost
    return Affine(
        codes, linear.weight.bits, bounds, fitted.values, np.array(stored, dtype=np.int64), shift,
        np.array([e[0] for e in ends], dtype=np.int64), np.array([e[1] for e in ends], dtype=np.int64), errors,
    )  # fmt: skip


def _ends(M: Integers, least: Integers, most: Integers, stored: list[int], shift: int) -> list[tuple[int, int]]:
    """The exact range of each result, in integers of any length."""
    found = []
    for row, low, high, offset in zip(M.tolist(), least.tolist(), most.tolist(), stored, strict=True):
        bottom = offset + sum(min(m * a, m * b) for m, a, b in zip(row, low, high, strict=True))
        top = offset + sum(max(m * a, m * b) for m, a, b in zip(row, low, high, strict=True))
        spread = sum(abs(m) * max(-a, b) for m, a, b in zip(row, low, high, strict=True))
        assert abs(offset) + spread < INT62  # in whatever order it is summed
        found.append((_rounded(bottom, shift), _rounded(top, shift)))
    return found


def _rounded(t: int, shift: int) -> int:
    magnitude = (abs(t) + (1 << (shift - 1))) >> shift
    return -magnitude if t < 0 else magnitude


def _segments(codes: Integers, largest: int, channels: int, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the columns are cut so that each sum fits int32, and the channel of each piece."""
    k = codes.shape[1]
    width = k // channels
    bounds, owners = [0], []
    for g in range(channels):
        sums = np.zeros(codes.shape[0], dtype=np.int64)
        for j in range(g * width, (g + 1) * width):
            column = np.abs(codes[:, j]) * largest
            if column.max(initial=0) > INT32:
                raise OptionError(f"{name}: one product alone exceeds 32 bits; use fewer bits")
            if (sums + column).max(initial=0) > INT32:
                bounds.append(j)
                owners.append(g)
                sums = np.zeros_like(sums)
            sums += column
        bounds.append((g + 1) * width)
        owners.append(g)
    return tuple(bounds), tuple(owners)
