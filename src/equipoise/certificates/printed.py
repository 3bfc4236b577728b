"""Numbers as they are printed: a bound is rounded to the side on which it still holds."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal

__all__ = ["MISSING", "at_least", "at_most", "number"]

MISSING = "–"


def number(value: float | None, digits: int = 4) -> str:
    """``digits`` significant digits, rounded to the nearest, with a true minus sign."""
    return _rounded(value, digits, ROUND_HALF_EVEN)


def at_least(value: float | None, digits: int = 4) -> str:
    """A proved lower bound, rounded down: what is printed is proved as well."""
    return _rounded(value, digits, ROUND_FLOOR)


def at_most(value: float | None, digits: int = 4) -> str:
    """A proved upper bound, rounded up."""
    return _rounded(value, digits, ROUND_CEILING)


def _rounded(value: float | None, digits: int, rounding: str) -> str:
    if value is None or not math.isfinite(value):
        return MISSING
    exact = Decimal(value)
    places = max(digits - 1 - exact.adjusted(), 0) if exact else 0
    if places < 10 and exact.adjusted() < 15:
        text = f"{exact.quantize(Decimal(1).scaleb(-places), rounding=rounding):,f}"
    else:
        text = f"{Context(prec=digits, rounding=rounding).plus(exact):.{digits - 1}e}"
    if "." in text and "e" not in text:
        text = text.rstrip("0").rstrip(".")
    return text.replace("-", "−")
