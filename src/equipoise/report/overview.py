"""All versions of a ladder side by side: their groups, numbers over the bits, and what bytes buy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..ladder import Ladder, Rung
from .drawing import BOX, Bend, Box, Picture, Scale, Scene, Stroke, fitted, line, shape
from .words import asked_text, at_least, at_most, bits_text, percent, percent_at_least

__all__ = ["Group", "bytes_scene", "courses", "groups_of", "margin_scene", "place", "signed", "widths_of"]


@dataclass(frozen=True)
class Group:
    """Versions that a slider goes through, fewest bits first, by their index on the ladder."""

    name: str
    scheme: str
    mixed: bool
    frames: list[int]


def groups_of(rungs: tuple[Rung, ...]) -> list[Group]:
    """One group a scheme, and one of those with bits of their own for every part."""
    keys = list(dict.fromkeys((rung.mixed, rung.scheme) for rung in rungs))
    groups = []
    for mixed, scheme in sorted(keys, key=lambda key: key[0]):
        mine = [i for i, rung in enumerate(rungs) if (rung.mixed, rung.scheme) == (mixed, scheme)]
        mine.sort(key=lambda i: rungs[i].size_bytes if mixed else rungs[i].bits)
        groups.append(Group("Mixed" if mixed else scheme.capitalize(), scheme, mixed, mine))
    return groups


def widths_of(rungs: tuple[Rung, ...]) -> list[int]:
    """The numbers of bits, fewest first, that have a place on an axis."""
    return sorted({rung.bits for rung in rungs if not rung.mixed})


def courses(ladder: Ladder, value: Callable[[Rung], float | None], box: Box, y: Scale) -> list[Stroke]:
    """A line for each scheme over the bits."""
    widths = widths_of(ladder.rungs)
    strokes = []
    for g, group in enumerate(groups_of(ladder.rungs)):
        found = {ladder.rungs[i].bits: value(ladder.rungs[i]) for i in group.frames}
        places = [(place(box, widths, b), None if (v := found.get(b)) is None else y(v)) for b in widths]
        if not group.mixed:
            strokes.append(Stroke("course", line(places), scheme=group.scheme, group=g))
    return strokes


def place(box: Box, widths: list[int], bits: int) -> float:
    """Where a number of bits stands across a drawing."""
    step = (box.right - box.left) / len(widths)
    return box.left + step * (widths.index(bits) + 0.5)


def signed(ladder: Ladder, values: list[float], start: float, end: float) -> Scale:
    """A scale for margins and eigenvalues: around zero it is as fine as the float network's margin asks for, and it
    shows what is below."""
    far = max(*(abs(value) for value in values), 1e-9)
    margin = ladder.subject.margin if ladder.subject else None
    unit = min(max(abs(margin or far), far / 200), far)
    return fitted([*values, -0.5 * unit, 0.0], start, end, "asinh", unit)


def margin_scene(ladder: Ladder) -> Scene | None:
    """The margin of every version, over the bits."""
    values = [rung.margin for rung in ladder.rungs if rung.margin is not None]
    widths = widths_of(ladder.rungs)
    if not values or not widths:
        return None
    of_float = ladder.subject.margin if ladder.subject else None
    y = signed(ladder, [*values, *([] if of_float is None else [of_float])], BOX.bottom, BOX.top)

    def where(rung: Rung) -> tuple[float, float] | None:
        return None if rung.mixed or rung.margin is None else (place(BOX, widths, rung.bits), y(rung.margin))

    picture = Picture(
        "margin",
        "Margin, proved",
        "The proved margin of each scheme, from few bits to many. "
        + _ranges(ladder, lambda rung: rung.margin, at_least),
        "margin, at least",
        "bits",
        y.ticks(24),
        [(place(BOX, widths, bits), str(bits)) for bits in widths[:: -(-len(widths) // 10)]],
        [
            Stroke("region bad", f"M{BOX.left} {BOX.bottom}V{y(0):.1f}H{BOX.right}V{BOX.bottom}z"),
            Stroke("zero", f"M{BOX.left} {y(0):.1f}H{BOX.right}"),
            *_level(y, of_float),
            *courses(ladder, lambda rung: rung.margin, BOX, y),
            *_marks(ladder, where),
            Stroke("ring", moves="ring"),
        ],
        "Above zero the network has exactly one answer for every input."
        + ("" if of_float is None else f" The dashed line is the float network, {at_least(of_float)}.")
        + ("" if all(rung.certified for rung in ladder.rungs) else " Hollow marks are not certified."),
    )
    return Scene(picture, _ringed(ladder, where))


class _Worth(NamedTuple):
    """What a version is worth its bytes for: on the axis, by value, in words, as asked for."""

    what: str
    value: Callable[[Rung], float | None]
    text: Callable[[float], str]
    asked: float | None = None
    bend: Bend = "even"


def _worth(ladder: Ladder) -> _Worth:
    """The proved agreement, or the movement where bits are mixed, else the accuracy."""
    asked = ladder.requirements
    if any(rung.mixed and rung.displacement_bound_mean for rung in ladder.rungs):
        return _Worth("proved movement, mean", lambda r: r.displacement_bound_mean or None, at_most, bend="log")
    if any(rung.agreement is not None for rung in ladder.rungs):
        return _Worth("classes proved unchanged", lambda r: r.agreement, percent_at_least, asked.min_agreement)
    return _Worth("accuracy", lambda r: r.accuracy, percent, asked.min_accuracy)


def bytes_scene(ladder: Ladder) -> Scene | None:
    """What bytes buy."""
    rungs, (what, value, text, wanted, bend) = ladder.rungs, _worth(ladder)
    times = 100 if bend == "even" else 1  # shares are read in percent
    known = [times * v for v in (*map(value, rungs), wanted) if v is not None]
    if all(value(rung) is None for rung in rungs):
        return None
    y = fitted(known, BOX.bottom, BOX.top, bend)
    x = fitted([rung.size_bytes / 1000 for rung in rungs], BOX.left, BOX.right)

    def where(rung: Rung) -> tuple[float, float] | None:
        return None if (v := value(rung)) is None else (x(rung.size_bytes / 1000), y(times * v))

    picture = Picture(
        "bytes",
        "What the bytes buy",
        f"Packed size against {what}. {_ranges(ladder, value, text)}",
        what,
        "kB when packed",
        [(at, f"{label} %" if bend == "even" else label) for at, label in y.ticks(24)],
        x.ticks(52),
        [*_level(y, None if wanted is None else times * wanted), *_marks(ladder, where), Stroke("ring", moves="ring")],
        f"Packed size against {what}, of every version; the ring is the one shown."
        + ("" if wanted is None else f" The dashed line is what was asked, {asked_text(wanted)}."),
    )
    return Scene(picture, _ringed(ladder, where))


def _level(y: Scale, height: float | None) -> list[Stroke]:
    return [] if height is None else [Stroke("level", f"M{BOX.left} {y(height):.1f}H{BOX.right}")]


def _marks(ladder: Ladder, where: Callable[[Rung], tuple[float, float] | None]) -> list[Stroke]:
    marks = []
    for g, group in enumerate(groups_of(ladder.rungs)):
        for rung in (ladder.rungs[i] for i in group.frames):
            kind = "mark" if rung.certified else "mark open"
            if (point := where(rung)) is not None:
                d = shape("mixed" if rung.mixed else rung.scheme, *point, 4.2)
                marks.append(Stroke(kind, d, scheme=rung.scheme, group=g))
    return marks


def _ringed(ladder: Ladder, where: Callable[[Rung], tuple[float, float] | None]) -> Callable[[int], dict[str, str]]:
    def paths(i: int) -> dict[str, str]:
        point = where(ladder.rungs[i])
        return {"ring": "" if point is None else shape("ring", *point, 9.0)}

    return paths


def _ranges(ladder: Ladder, value: Callable[[Rung], float | None], text: Callable[[float], str]) -> str:
    """For each scheme its first and last number, for readers of the text."""
    parts = []
    for group in groups_of(ladder.rungs):
        known = [(rung, v) for rung in (ladder.rungs[i] for i in group.frames) if (v := value(rung)) is not None]
        numbers = [f"{text(v)} at {bits_text(rung.bits)}" for rung, v in known[:1] + known[1:][-1:]]
        if numbers and not group.mixed:
            parts.append(f"{group.name}: {', '.join(numbers)}.")
    return " ".join(parts)
