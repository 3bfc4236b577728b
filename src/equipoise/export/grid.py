"""What goes in: integers on a grid, and the real numbers they stand for (theory §10)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._codecs.values import restored
from ..data import Preprocessing
from ..errors import InputError, OptionError

__all__ = ["Grid", "grid_of"]

NEAR = 2.0**-20
"""A float32 pixel, preprocessed in float32, lies this near to its exact value, relative to its terms."""


@dataclass(frozen=True)
class Grid:
    """Inputs ``x_j = steps[g] raw_j + offsets[g]``, ``raw_j`` an integer in [low, high], g the channel of j.

    ``natural``: the integers are what the world gives (pixels); else floats are rounded to them.
    """

    features: int
    low: int
    high: int
    steps: tuple[Fraction, ...]
    offsets: tuple[Fraction, ...]
    natural: bool

    @property
    def channels(self) -> int:
        return len(self.steps)

    @property
    def ctype(self) -> str:
        """The C type that holds a raw input."""
        return "uint8_t" if self.low >= 0 and self.high <= 255 else "int16_t"

    def spread(self, values: tuple[Fraction, ...]) -> NDArray[np.float64]:
        """One float per feature from one number per channel."""
        return np.repeat([float(v) for v in values], self.features // self.channels)

    def to_raw(self, x: NDArray[Any]) -> NDArray[np.int64]:
        """The nearest grid points ``(B, d)`` of network inputs ``x (B, d)``.

        Raises:
            InputError: another shape, NaN, or an input outside the range.
        """
        values = np.asarray(x, dtype=np.float64)
        if values.ndim != 2 or values.shape[1] != self.features:
            raise InputError(f"the input has shape {values.shape}; (batch, {self.features}) is needed")
        raw = np.rint((values - self.spread(self.offsets)) / self.spread(self.steps))
        outside = ~((raw >= self.low) & (raw <= self.high))  # NaN too
        if outside.any():
            worst = values[outside]
            raise InputError(
                f"{int(outside.sum())} inputs lie outside the declared range, e.g. {worst[0]:.6g}; "
                f"the range is {self.interval()}: export again with a wider --input-range"
            )
        return raw.astype(np.int64)

    def to_real(self, raw: NDArray[Any]) -> NDArray[np.float64]:
        """The network inputs ``(B, d)`` of ``raw (B, d)``, rounded once or twice."""
        return raw.astype(np.float64) * self.spread(self.steps) + self.spread(self.offsets)

    def interval(self) -> str:
        ends = {
            (float(s * self.low + o), float(s * self.high + o)) for s, o in zip(self.steps, self.offsets, strict=True)
        }
        return ", ".join(f"[{low:.6g}, {high:.6g}]" for low, high in sorted(ends))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; the rationals as pairs of integers, exactly."""
        return {
            "features": self.features,
            "low": self.low,
            "high": self.high,
            "steps": [[f.numerator, f.denominator] for f in self.steps],
            "offsets": [[f.numerator, f.denominator] for f in self.offsets],
            "natural": self.natural,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Grid:
        """The inverse of :meth:`to_dict`; raises :class:`ValueError` for anything else."""
        features, low, high = (restored(int, values[name]) for name in ("features", "low", "high"))
        pairs = (restored(list[list[int]], values[name]) for name in ("steps", "offsets"))
        steps, offsets = (tuple(Fraction(top, bottom) for top, bottom in found) for found in pairs)
        if not steps or len(steps) != len(offsets) or features % len(steps) or not min(steps) > 0:
            raise ValueError(f"{len(steps)} steps and {len(offsets)} offsets for {features} inputs")
        return cls(features, low, high, steps, offsets, restored(bool, values["natural"]))


def grid_of(
    features: int, preprocessing: Preprocessing | None, interval: tuple[float, float] | None, bits: int
) -> Grid:
    """The grid of a model's inputs.

    With ``preprocessing`` the raw inputs are integers, from 0 to its scale unless ``interval`` says otherwise, and
    (raw/scale − mean)/std is folded into the injection. Without, ``interval`` is the range of the network's own
    inputs, cut into 2^8 − 1 or 2^15 − 1 steps.

    Raises:
        OptionError: no range, or one that is empty, not finite, or not of integers where pixels are.
    """
    if interval is not None and not (np.isfinite(interval).all() and interval[0] < interval[1]):
        raise OptionError(f"input range {interval[0]:g} {interval[1]:g}: give two finite numbers LO < HI")
    if preprocessing is None:
        if interval is None:
            raise OptionError(
                "the model has no preprocessing that tells its input range; give it: --input-range LO HI "
                "(input_range=(lo, hi)), in the network's own units"
            )
        top = 255 if bits == 8 else 2**15 - 1
        low, high = (Fraction(float(end)) for end in interval)
        return Grid(features, 0, top, ((high - low) / top,), (low,), natural=False)
    if preprocessing.features != features:
        raise OptionError(f"the preprocessing is for {preprocessing.features} inputs, the layer takes {features}")
    ends = (0.0, float(preprocessing.scale)) if interval is None else interval
    if any(end != int(end) or abs(end) > 2**15 - 1 for end in ends):
        raise OptionError(
            f"input range {ends[0]:g} {ends[1]:g}: raw pixels are integers of at most 16 bits; give "
            "--input-range LO HI in pixels, before preprocessing"
        )
    count = preprocessing.input_shape[0]
    means, stds = (v if isinstance(v, tuple) else (v,) for v in (preprocessing.mean, preprocessing.std))
    groups = count if max(len(means), len(stds)) > 1 else 1
    means, stds = (tuple(v) * (groups if len(v) < groups else 1) for v in (means, stds))
    steps = tuple(1 / (Fraction(float(preprocessing.scale)) * Fraction(float(s))) for s in stds)
    offsets = tuple(-Fraction(float(m)) / Fraction(float(s)) for m, s in zip(means, stds, strict=True))
    return Grid(features, int(ends[0]), int(ends[1]), steps, offsets, natural=True)
