"""Integers that stand for real factors: multiplier and shift, rounding to nearest, exact sums (theory §10).

A real factor f becomes an integer M and a shift s with ``f ≈ M 2^−s``. The distance is computed in rationals, so
what a multiplication costs is known exactly. Nothing here is random or depends on the machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import OptionError

__all__ = ["INT32", "SLACK", "Integers", "Multipliers", "above", "exact_product", "fit_multipliers", "requantize"]

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

INT32 = 2**31 - 1
INT62 = 2**62
"""Every 64-bit sum is proved to stay below this: one bit of reserve."""

SLACK = 1 + 1e-9
"""Above what float64 may lose in the few thousand operations of a bound of non-negative terms."""

_DOUBLE = 2**53


def above(value: Fraction) -> float:
    """The least double that is certain to be at least ``value``."""
    return math.nextafter(float(value), math.inf) if value else 0.0


@dataclass(frozen=True, eq=False)
class Multipliers:
    """Integers ``values`` (any shape) with ``values 2^−shift`` within ``errors`` (same shape) of the real factors."""

    values: Integers
    shift: int
    errors: Floats


def fit_multipliers(
    factors: Sequence[Fraction], shape: Sequence[int], gains: Iterable[int], finest: int = 46, bits: int = 31
) -> Multipliers:
    """The finest multipliers of ``factors`` that fit a signed integer of ``bits`` bits and 64-bit products.

    ``gains``: for each factor a bound on the magnitude of what it multiplies; the products stay below 2^61.
    ``finest``: the largest shift to use.

    Raises:
        OptionError: a factor too large for any.
    """
    factors, gains = list(factors), list(gains)
    largest = max((abs(f) for f in factors), default=Fraction(0))
    product = max((abs(f) * g for f, g in zip(factors, gains, strict=True)), default=Fraction(0))
    shift = finest
    while shift > 1 and (largest * 2**shift >= 2 ** (bits - 1) - 1 or product * 2**shift >= 2**61):
        shift -= 1
    if largest * 2**shift >= 2 ** (bits - 1) - 1 or product * 2**shift >= 2**61:
        raise OptionError(
            f"a factor of {float(largest):.3g} has no 32-bit multiplier; the scales are out of proportion"
        )
    values = [round(f * 2**shift) for f in factors]
    errors = [above(abs(f - Fraction(v, 2**shift))) for f, v in zip(factors, values, strict=True)]
    return Multipliers(
        np.array(values, dtype=np.int64).reshape(shape), shift, np.array(errors, dtype=np.float64).reshape(shape)
    )


def requantize(t: Integers, shift: int) -> Integers:
    """``t 2^−shift`` to the nearest integer, halves away from zero: odd in t, no shift of a negative number."""
    magnitude = (np.abs(t) + (1 << (shift - 1))) >> shift
    return np.where(t < 0, -magnitude, magnitude)


def exact_product(x: NDArray[Any], codes: NDArray[Any]) -> Integers:
    """``x (B, k)`` times ``codes (n, k)`` transposed, exactly: sums of products below 2^53 are exact in doubles."""
    assert float(np.abs(x).max(initial=0)) * float(np.abs(codes).sum(axis=1, dtype=np.float64).max(initial=0)) < _DOUBLE
    return np.rint(x.astype(np.float64) @ codes.astype(np.float64).T).astype(np.int64)
