"""The explorer: a frame for each version of the ladder, and pictures in which a slider goes from frame to frame.

Every text and every coordinate is made here, where bounds are rounded to their safe side; the page's script only puts
them in their places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..ladder import Ladder, Rung
from . import words
from .drawing import SPARK, Bend, Picture, Scale, Stroke, dots, fitted
from .overview import Group, courses, groups_of, place, signed, widths_of
from .pictures import scenes

__all__ = ["Explorer", "Frame", "Tile", "explore"]


@dataclass(frozen=True)
class Frame:
    """One version: the texts and paths that the page shows while it is picked, by the places that take them.

    ``tick`` is what stands under its place on the slider.
    """

    verdict: str
    bits: int
    tick: str
    texts: dict[str, str]
    paths: dict[str, str]


@dataclass(frozen=True)
class Tile:
    """A number of the version picked, and its course over the bits. ``kind``: proved, measured or counted."""

    key: str
    label: str
    kind: str
    strokes: list[Stroke]


@dataclass(frozen=True)
class Explorer:
    """``start`` is the frame that the page opens with: the chosen version's, else the first one's."""

    start: int
    groups: list[Group]
    frames: list[Frame]
    tiles: list[Tile]
    pictures: list[Picture]

    @property
    def group(self) -> int:
        """The group that the page opens with."""
        return next(g for g, group in enumerate(self.groups) if self.start in group.frames)

    def data(self) -> dict[str, Any]:
        """What the page's script reads."""
        groups = [{"scheme": group.scheme, "frames": group.frames} for group in self.groups]
        return {"start": self.start, "groups": groups, "frames": [asdict(frame) for frame in self.frames]}


@dataclass(frozen=True)
class _Measure:
    """A number that each version has or lacks: how it is said, and on which scale it is drawn."""

    key: str
    label: str
    kind: str
    value: Callable[[Rung], float | None]
    text: Callable[[Rung], str]
    bend: Bend = "even"

    def known(self, ladder: Ladder) -> list[float]:
        return [value for rung in ladder.rungs if (value := self.value(rung)) is not None]

    def scale(self, ladder: Ladder) -> Scale:
        ends = SPARK.bottom, SPARK.top
        known = self.known(ladder)
        return signed(ladder, known, *ends) if self.bend == "asinh" else fitted(known, *ends, self.bend)


MEASURES = (
    _Measure("size", "Size", "counted", lambda r: r.size_bytes, lambda r: words.bytes_text(r.size_bytes)),
    _Measure("margin", "Margin, at least", "proved", lambda r: r.margin, lambda r: words.at_least(r.margin), "asinh"),
    _Measure(
        "steps",
        "Solver steps, at most",
        "proved",
        lambda r: r.steps or None,
        lambda r: words.MISSING if r.steps is None else f"{r.steps:,}",
        "log",
    ),
    _Measure(
        "moved",
        "Moved, at most",
        "proved",
        lambda r: r.displacement_bound_mean or None,
        lambda r: words.at_most(r.displacement_bound_mean, 3),
        "log",
    ),
    _Measure(
        "kept",
        "Classes kept, at least",
        "proved",
        lambda r: r.agreement,
        lambda r: words.percent_at_least(r.agreement),
    ),
    _Measure("accuracy", "Accuracy", "measured", lambda r: r.accuracy, lambda r: words.percent(r.accuracy)),
)


def explore(ladder: Ladder) -> Explorer | None:
    """The explorer of a ladder; None where it has no rung."""
    if not ladder.rungs:
        return None
    measures = [measure for measure in MEASURES if measure.known(ladder)]
    scales = {measure.key: measure.scale(ladder) for measure in measures}
    stage = scenes(ladder)
    frames = []
    for i, rung in enumerate(ladder.rungs):
        texts = _said(ladder, i, measures)
        paths = {measure.key: _spark(ladder, rung, measure, scales[measure.key]) for measure in measures}
        for scene in stage:
            paths |= {f"{scene.picture.key}-{name}": d for name, d in scene.paths(i).items()}
            told = {"says": scene.says, "aside": scene.aside}
            texts |= {f"{scene.picture.key}-{name}": tell(i) for name, tell in told.items() if tell is not None}
        frames.append(Frame(rung.verdict, rung.bits, "" if rung.mixed else str(rung.bits), texts, paths))
    tiles = [
        Tile(m.key, m.label, m.kind, [*courses(ladder, m.value, SPARK, scales[m.key]), Stroke("spot", moves=m.key)])
        for m in measures
    ]
    return Explorer(ladder.chosen or 0, groups_of(ladder.rungs), frames, tiles, [scene.picture for scene in stage])


def _spark(ladder: Ladder, rung: Rung, measure: _Measure, y: Scale) -> str:
    """Where the version stands on its tile's course; mixed bits have no place there."""
    value = measure.value(rung)
    return "" if rung.mixed or value is None else dots([(place(SPARK, widths_of(ladder.rungs), rung.bits), y(value))])


def _said(ladder: Ladder, i: int, measures: list[_Measure]) -> dict[str, str]:
    """The texts of a version: its name and verdict, and each number with what it is to be compared to."""
    rung = ladder.rungs[i]
    texts = {
        "name": words.title(rung) + (", the chosen version" if i == ladder.chosen else ""),
        "bits": words.bits_of(rung),
        "verdict": rung.verdict,
        "meaning": words.VERDICTS.get(rung.verdict, ""),
        "numbers": "; ".join(f"{m.label}: {m.text(rung)}" for m in measures),
    }
    for measure in measures:
        texts[measure.key] = measure.text(rung)
        texts[f"{measure.key}-beside"] = _beside(ladder, rung, measure.key)
        texts[f"{measure.key}-kind"] = _kind(rung, measure)
    return texts


def _kind(rung: Rung, measure: _Measure) -> str:
    """Whether a number is proved, measured or counted."""
    if measure.kind == "proved" and measure.text(rung) == words.MISSING:
        return "no proof"
    return "not above zero" if measure.key == "margin" and not rung.certified else measure.kind


def _beside(ladder: Ladder, rung: Rung, key: str) -> str:
    """What a number is to be compared to; empty where there is nothing."""
    subject, asked = ladder.subject, ladder.requirements.min_agreement
    if key == "moved":
        return (
            "" if rung.displacement_mean is None else f"in the mean; measured {words.number(rung.displacement_mean, 3)}"
        )
    if key == "kept":
        return "" if asked is None else f"asked: {words.asked_text(asked)}"
    if subject is None:
        return ""
    if key == "size":
        return f"float {words.bytes_text(subject.size_bytes)}, {subject.size_bytes / rung.size_bytes:.1f} times that"
    if key == "margin":
        return f"float {words.at_least(subject.margin)}"
    if key == "steps":
        return "" if subject.steps is None else f"float {subject.steps:,}"
    if rung.accuracy is None or subject.accuracy is None:
        return ""
    points = round(100 * (rung.accuracy - subject.accuracy), 1)
    change = "the same" if not points else f"{points:+.1f} points".replace("-", "−")
    return f"float {words.percent(subject.accuracy)}: {change}"
