"""Pictures as coordinates: scales with their ticks, and SVG paths. The page's template writes the elements.

A mark that stays the same from frame to frame keeps its number of points, so that a browser can move it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "BOX",
    "SPARK",
    "Bend",
    "Box",
    "Picture",
    "Scale",
    "Scene",
    "Stroke",
    "dots",
    "fitted",
    "line",
    "shape",
    "stems",
]

Bend = Literal["even", "log", "asinh"]


@dataclass(frozen=True)
class Box:
    """A drawing's size, and the edges of what is inside its axes, in its own units."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


BOX = Box(400, 278, 58, 390, 28, 232)
SPARK = Box(150, 40, 6, 144, 6, 34)


@dataclass(frozen=True)
class Scale:
    """[low, high], low < high, onto [start, end] in units of the drawing. A bent one is logarithmic, or, as
    asinh(value/unit), logarithmic far from zero and even near it, on both sides."""

    low: float
    high: float
    start: float
    end: float
    bend: Bend = "even"
    unit: float = 1.0

    def _bent(self, value: float) -> float:
        if self.bend == "log":
            return math.log(value)
        return math.asinh(value / self.unit) if self.bend == "asinh" else value

    def __call__(self, value: float) -> float:
        low, high = self._bent(self.low), self._bent(self.high)
        return self.start + (self.end - self.start) * (self._bent(value) - low) / (high - low)

    def ticks(self, gap: float) -> list[tuple[float, str]]:
        """Round numbers at least ``gap`` apart as (place, text), the rounder ones first where there is little room."""
        found: list[float] = []
        for value in self._round_numbers(gap):
            apart = all(abs(self(value) - self(other)) > 0.999 * gap for other in found)
            if self.low <= value <= self.high and apart:
                found.append(value)
        return [(self(value), f"{value:,.6g}".replace("-", "−")) for value in sorted(found)]

    def _round_numbers(self, gap: float) -> list[float]:
        if self.bend == "even":
            least = gap * (self.high - self.low) / abs(self.end - self.start)
            power = 10.0 ** math.floor(math.log10(least))
            step = next(k * power for k in (1, 2, 5, 10) if k * power >= least)
            return [k * step for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        top = math.ceil(math.log10(max(abs(self.low), abs(self.high))))
        powers = [10.0**p for p in range(top, top - 30, -1)]
        if self.bend == "log":
            steps = (1, 3) if self.high > 30 * self.low else (1, 2, 5)
            return [k * power for k in steps for power in powers]
        far = [k * power for k in (1, 3, 5) for power in powers if k * power > self.unit / 5]
        return [0.0, *(sign * value for value in far for sign in (1, -1))]


def fitted(values: Iterable[float], start: float, end: float, bend: Bend = "even", unit: float = 1.0) -> Scale:
    """A scale that has room for all of ``values``, and a little more."""
    found = list(values)
    low, high = min(found), max(found)
    if bend == "log":
        room = max((high / low) ** 0.06, 1.15)
        return Scale(low / room, high * room, start, end, bend)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(low - room, high + room, start, end, bend, unit)


@dataclass(frozen=True)
class Stroke:
    """A path of the CSS classes ``kind``: ``d``, or what the frame shown has under ``moves``. ``scheme``: whose colour
    it has; ``group``: it stands out while that group of versions is shown."""

    kind: str
    d: str = ""
    moves: str = ""
    scheme: str = ""
    group: int | None = None
    width: float | None = None


@dataclass(frozen=True)
class Picture:
    """A drawing with axes in ``BOX``: what they are of, their ticks (place, text), and what is drawn. ``caption`` is
    left out where each frame has its own."""

    key: str
    title: str
    description: str
    up: str
    across: str
    rows: list[tuple[float, str]]
    columns: list[tuple[float, str]]
    strokes: list[Stroke]
    caption: str = ""


@dataclass(frozen=True)
class Scene:
    """A picture, and by a version's index what it moves there (path by path), its caption, and words in the picture."""

    picture: Picture
    paths: Callable[[int], dict[str, str]]
    says: Callable[[int], str] | None = None
    aside: Callable[[int], str] | None = None


def dots(points: Iterable[tuple[float, float]]) -> str:
    """A stroke of no length at each point: round caps make it a dot."""
    return "".join(f"M{_at(x)} {_at(y)}h0" for x, y in points)


def stems(base: float, points: Iterable[tuple[float, float]]) -> str:
    """A vertical stroke from ``base`` to each point."""
    return "".join(f"M{_at(x)} {_at(base)}V{_at(y)}" for x, y in points)


def line(points: Sequence[tuple[float, float | None]]) -> str:
    """A line through the points, broken where there is no height."""
    path, pen = "", "M"
    for x, y in points:
        path += "" if y is None else f"{pen}{_at(x)} {_at(y)}"
        pen = "M" if y is None else "L"
    return path


def shape(scheme: str, x: float, y: float, radius: float) -> str:
    """The mark of a scheme around a point; of one that has none, a cross."""
    corners = {
        "assembled": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
        "compensated": ((0, -1.1), (1.05, 0.8), (-1.05, 0.8)),
        "cayley": ((0, -1.15), (1.15, 0), (0, 1.15), (-1.15, 0)),
    }
    if scheme in ("structured", "ring"):
        r, d = _at(radius), _at(2 * radius)
        return f"M{_at(x - radius)} {_at(y)}a{r} {r} 0 1 0 {d} 0a{r} {r} 0 1 0 -{d} 0"
    if scheme not in corners:
        arm = _at(2 * radius / 3)
        start = f"M{_at(x - radius / 3)} {_at(y - radius)}"
        return f"{start}h{arm}v{arm}h{arm}v{arm}h-{arm}v{arm}h-{arm}v-{arm}h-{arm}v-{arm}h{arm}z"
    points = [f"{_at(x + radius * dx)} {_at(y + radius * dy)}" for dx, dy in corners[scheme]]
    return f"M{'L'.join(points)}z"


def _at(value: float) -> str:
    """A coordinate, to a tenth of a unit."""
    return f"{value:.1f}".removesuffix(".0")
