"""The report's figures, each from the ladder alone.

Numbers against bits, one line per scheme; the proved bound of every sample against how far it really moved;
and what the bytes buy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ladder import Ladder, Rung
from .canvas import COLOURS, MARKERS, Figure, colour, figure, level, percents, plain_log, say
from .words import asked_text, at_least, at_most, bits_of, bits_text, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_all", "featured"]

SAMPLES = 400
"""Points per bit-width in the scatter: enough to see its shape, few enough for a small file."""
CLOUDS = 4
SPAN = 1e6
"""Ratio of the largest to the smallest movement that the scatter has room for."""


def draw_all(ladder: Ladder) -> list[Figure]:
    """Every figure that the ladder has numbers for.

    Raises :class:`MissingExtraError` without matplotlib.
    """
    found = [_margin(ladder), _displacement(ladder), _agreement(ladder), _accuracy(ladder), _steps(ladder)]
    return [drawn for drawn in (*found, _sizes(ladder), _mixed(ladder)) if drawn is not None]


def featured(ladder: Ladder) -> str | None:
    """The scheme whose samples are shown: the chosen one, else the one with most certified rungs."""
    if ladder.chosen is not None:
        return ladder.rungs[ladder.chosen].scheme
    certified = [rung.scheme for rung in ladder.rungs if rung.certified]
    return max(certified, key=certified.count, default=None)


def _margin(ladder: Ladder) -> Figure | None:
    values = [rung.margin for rung in ladder.rungs if rung.margin is not None]
    if not values:
        return None
    float_margin = ladder.subject.margin if ladder.subject else None
    reach = max(v for v in (*values, float_margin or 0.0, 1e-9))
    floor = max(min(*values, 0.0), -0.8 * reach) - 0.1 * reach
    hidden = [rung for rung in ladder.rungs if rung.margin is not None and rung.margin < floor]

    def paint(axes: Axes) -> None:
        axes.set_ylim(floor, 1.15 * reach)
        if floor < -0.15 * reach:
            axes.axhspan(floor, 0, color=COLOURS["bad"], alpha=0.10, lw=0)
            say(axes, 0.015, 0.03, "not certified", "bad", transform=axes.transAxes)
        axes.axhline(0, color=COLOURS["bad"], lw=1.2)
        if float_margin is not None:
            level(axes, float_margin, f"float {at_least(float_margin)}")
        _lines(axes, ladder, lambda rung: rung.margin)
        for rung in hidden:
            axes.plot(rung.bits, floor, "v", color=colour(rung.scheme), ms=7, clip_on=False, zorder=6, mew=0)

    below = " Triangles at the lower edge stand for margins below it." if hidden else ""
    return figure(
        "margin",
        "Margin, proved",
        "Above zero the network has exactly one answer for every input. The dashed line is the float network." + below,
        paint,
        "The proved margin of each scheme from many bits to few. "
        + _ranges(ladder, lambda rung: rung.margin, at_least),
    )


def _displacement(ladder: Ladder) -> Figure | None:
    scheme = featured(ladder)
    clouds = _clouds(ladder, scheme)
    if not clouds:
        return None
    names = [f"seq{round(i * 3 / max(len(clouds) - 1, 1))}" for i in range(len(clouds))]
    high = max(float(both.max()) for _, both in clouds) * 1.6
    placed = [both[:, (both > high / SPAN).all(0)] for _, both in clouds]
    low = min((float(both.min()) for both in placed if both.numel()), default=high / SPAN) / 1.6

    def paint(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.fill_between([low, high], [low, low], [low, high], color=COLOURS["line"], alpha=0.45, lw=0)
        axes.plot([low, high], [low, high], color=COLOURS["muted"], lw=1)
        for token, both in zip(names, placed, strict=True):
            axes.plot(*both[:, :: _stride(both)].numpy(), "o", color=COLOURS[token], ms=3.4, mew=0, alpha=0.75)
        say(axes, 0.97, 0.06, "moved further than proved", "muted", ha="right", transform=axes.transAxes)
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        for axis in (axes.xaxis, axes.yaxis):
            plain_log(axis, low, high)
        axes.set_xlabel("moved, as measured")
        axes.set_title("proved bound", loc="left", fontsize=13, color=COLOURS["muted"])

    whole = clouds[0][1].shape[1]
    step = max(_stride(both) for both in placed)
    below = sum(int((both[0] > both[1]).sum()) for _, both in clouds)
    every = {1: "", 2: "every second of ", 3: "every third of "}.get(step, f"every {step}th of ")
    hidden = any(both.shape[1] < whole for both in placed)
    caption = (
        f"Each point is one test input ({every}{whole:,}), for {str(scheme).capitalize()}: how far its answer moved,"
        f" and the proved bound. {f'{below:,} inputs' if below else 'No input'} moved further than proved."
    ) + (" Inputs that hardly moved have no place on these axes." if hidden else "")
    shown = ", ".join(bits_of(rung) for rung, _ in clouds)
    described = f"Scatter plot on logarithmic axes for {scheme} at {shown}. {caption}"
    legend = tuple((token, bits_of(rung)) for token, (rung, _) in zip(names, clouds, strict=True))
    return figure("displacement", "Proved bound against actual movement", caption, paint, described, legend)


def _clouds(ladder: Ladder, scheme: str | None) -> list[tuple[Rung, Tensor]]:
    """Rungs of one scheme with (2, B): of each test input how far it moved, and the bound of that."""
    found = []
    chosen = None if ladder.chosen is None else ladder.rungs[ladder.chosen]
    for rung, evidence in zip(ladder.rungs, ladder.evidence, strict=False):
        moved, bound = evidence.certificate.actual_displacement, evidence.certificate.displacement
        shown = not rung.mixed or rung is chosen
        if shown and rung.scheme == scheme and moved is not None and bound is not None and rung.displacement_mean:
            found.append((rung, torch.stack((moved, bound)).double()))
    return _spread(found, CLOUDS, lambda pair: pair[0] is chosen)


def _stride(both: Tensor) -> int:
    return max(1, math.ceil(both.shape[1] / SAMPLES))


def _agreement(ladder: Ladder) -> Figure | None:
    asked = ladder.requirements.min_agreement

    def paint(axes: Axes) -> None:
        axes.set_ylim(-0.04, 1.06)
        if asked is not None:
            level(axes, asked, f"asked: {asked_text(asked)}", below=True)
        _lines(axes, ladder, lambda rung: rung.agreement)
        axes.yaxis.set_major_formatter(percents)

    return _bits_figure(
        ladder,
        "agreement",
        "Classes proved unchanged",
        "Share of test inputs whose class cannot differ from the float network's. Where a line stops, the version"
        " is not certified.",
        paint,
        lambda rung: rung.agreement,
        percent,
    )


def _accuracy(ladder: Ladder) -> Figure | None:
    float_accuracy = ladder.subject.accuracy if ladder.subject else None

    def paint(axes: Axes) -> None:
        if float_accuracy is not None:
            level(axes, float_accuracy, f"float {percent(float_accuracy)}")
        _lines(axes, ladder, lambda rung: rung.accuracy)
        axes.yaxis.set_major_formatter(percents)
        axes.margins(y=0.16)
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.03))

    return _bits_figure(
        ladder,
        "accuracy",
        "Accuracy, measured",
        "Share of test inputs that get the right class. Hollow marks are versions without a certificate.",
        paint,
        lambda rung: rung.accuracy,
        percent,
    )


def _steps(ladder: Ladder) -> Figure | None:
    float_steps = ladder.subject.steps if ladder.subject else None

    def paint(axes: Axes) -> None:
        axes.set_yscale("log")
        if float_steps is not None:
            level(axes, float_steps, f"float {float_steps}")
        _lines(axes, ladder, lambda rung: rung.steps)
        low, high = axes.get_ylim()
        low, high = min(low, high / 3), max(high, 3 * low)  # room enough for a tick where all are alike
        axes.set_ylim(low, high)
        plain_log(axes.yaxis, low, high)

    return _bits_figure(
        ladder,
        "steps",
        "Solver steps, proved to be enough",
        "Steps after which the distance to the answer has shrunk a million times, from any start.",
        paint,
        lambda rung: rung.steps,
        lambda value: f"{value:.0f}",
    )


def _sizes(ladder: Ladder) -> Figure | None:
    """What bytes buy: size against certified agreement, else against accuracy."""
    proved = any(rung.agreement is not None for rung in ladder.rungs)
    value: Callable[[Rung], float | None] = (lambda r: r.agreement) if proved else (lambda r: r.accuracy)
    asked = ladder.requirements.min_agreement if proved else ladder.requirements.min_accuracy
    what = "classes proved unchanged" if proved else "accuracy"

    def paint(axes: Axes) -> None:
        if asked is not None:
            level(axes, asked, f"asked: {asked_text(asked)}", below=True)
        for i, rung in enumerate(ladder.rungs):
            found = value(rung)
            if found is not None:
                _mark(axes, rung.size_bytes / 1000, found, rung, i == ladder.chosen)
        axes.set_xlabel("kB when packed")
        axes.yaxis.set_major_formatter(percents)
        axes.margins(0.07, 0.1)

    return _bits_figure(
        ladder,
        "sizes",
        "What the bytes buy",
        f"Packed size against {what}; the ring is the chosen version.",
        paint,
        value,
        percent,
    )


def _mixed(ladder: Ladder) -> Figure | None:
    """What bytes buy where every part has bits of its own: size against the proved displacement."""
    rungs = [r for r in ladder.rungs if r.scheme == "structured" and r.displacement_bound_mean]
    if not any(rung.mixed for rung in rungs):
        return None

    def paint(axes: Axes) -> None:
        axes.set_yscale("log")
        axes.set_xscale("log")
        for i, rung in enumerate(ladder.rungs):
            if rung in rungs and (moved := rung.displacement_bound_mean):
                _mark(axes, rung.size_bytes / 1000, moved, rung, i == ladder.chosen)
        axes.margins(0.07, 0.1)
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            plain_log(axis, *limits)
        axes.set_xlabel("kB when packed")

    parts = [r for r in rungs if r.mixed]
    ends = "; ".join(
        f"{at_most(r.displacement_bound_mean, 3)} in {r.size_bytes:,} bytes" for r in (*parts[:1], *parts[1:][-1:])
    )
    title = "What mixed bits buy: movement, proved"
    caption = "Packed size against the mean proved movement of the structured versions; crosses are the mixed ones."
    return figure("mixed", title, caption, paint, f"{title}. Mixed: {ends}.")


# How all of them are drawn


def _bits_figure(
    ladder: Ladder,
    key: str,
    title: str,
    caption: str,
    paint: Callable[[Axes], None],
    value: Callable[[Rung], float | None],
    words: Callable[[float], str],
) -> Figure | None:
    """A figure of one number per rung; None where no rung has it."""
    if all(value(rung) is None for rung in ladder.rungs):
        return None
    return figure(key, title, caption, paint, f"{title}. {_ranges(ladder, value, words)}")


def _lines(axes: Axes, ladder: Ladder, value: Callable[[Rung], float | None]) -> None:
    """One line per scheme over the bits, many bits first; it is broken where there is no number."""
    alike = [rung for rung in ladder.rungs if not rung.mixed]  # others have no place on an axis of bits
    for scheme in dict.fromkeys(rung.scheme for rung in alike):
        rungs = sorted((r for r in alike if r.scheme == scheme), key=lambda r: -r.bits)
        heights = [math.nan if (v := value(rung)) is None else v for rung in rungs]
        axes.plot([r.bits for r in rungs], heights, color=colour(scheme), alpha=0.85, zorder=3)
    for i, rung in enumerate(ladder.rungs):
        if not rung.mixed and (height := value(rung)) is not None:
            _mark(axes, rung.bits, height, rung, i == ladder.chosen)
    bits = sorted({rung.bits for rung in alike})
    axes.set_xticks(bits if len(bits) <= 10 else bits[:: math.ceil(len(bits) / 10)])
    axes.set_xlim(bits[-1] + 0.4, bits[0] - 0.4)
    axes.set_xlabel("bits")


def _mark(axes: Axes, x: float, y: float, rung: Rung, chosen: bool) -> None:
    paint = colour(rung.scheme)
    fill = paint if rung.certified else "none"
    shape = "P" if rung.mixed else MARKERS.get(rung.scheme, "P")
    axes.plot(x, y, shape, color=paint, mfc=fill, ms=6.5, mew=1.3, zorder=4)
    if chosen:
        axes.plot(x, y, "o", mfc="none", mec=COLOURS["ink"], ms=15, mew=1.8, zorder=5, clip_on=False)


def _spread(items: Sequence[Any], most: int, kept: Callable[[Any], bool]) -> list[Any]:
    """At most ``most`` of the items, evenly, both ends among them, and the one to be kept as well."""
    if len(items) <= most:
        return list(items)
    places = [round(i * (len(items) - 1) / (most - 1)) for i in range(most)]
    wanted = next((i for i, item in enumerate(items) if kept(item)), places[0])
    if wanted not in places:
        places[min(range(1, most - 1), key=lambda i: abs(places[i] - wanted))] = wanted
    return [items[i] for i in sorted(places)]


def _ranges(ladder: Ladder, value: Callable[[Rung], float | None], words: Callable[[float], str]) -> str:
    """For each scheme its first and last number, for readers of the text."""
    parts = []
    for scheme in dict.fromkeys(rung.scheme for rung in ladder.rungs):
        rungs = [r for r in ladder.rungs if r.scheme == scheme and not r.mixed and value(r) is not None]
        ends = rungs[:1] + rungs[1:][-1:]
        numbers = [f"{words(v)} at {bits_text(r.bits)}" for r in ends if (v := value(r)) is not None]
        if numbers:
            parts.append(f"{scheme.capitalize()}: {', '.join(numbers)}.")
    return " ".join(parts)
