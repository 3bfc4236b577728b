"""The figures of experiments 3 and 4: versions side by side, and bounds against movements."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...report.canvas import COLOURS, Figure, figure, powers
from ...report.words import bits_text
from .displacement import Cloud, Displacement, PublishedCheck
from .figures import Axes
from .published import QAT, ROUNDED
from .training import BITS, STRUCTURED_BITS, Version

__all__ = ["displacement_figures", "version_figures"]

SHADES = ("seq3", "seq2", "seq1", "seq0")


def displacement_figures(found: Displacement) -> tuple[Figure, ...]:
    """Bound against movement per sample: at the true equilibria, and as the published check computes them."""
    if not found.clouds:
        return ()
    ours = (
        "The paper's bound ‖ΔW‖₂ ‖z̃*‖/m, at equilibria solved in float64. Below the diagonal it holds: "
        + ", ".join(f"{100 * cloud.share:.0f} % at {bits_text(cloud.bits)}" for cloud in found.clouds)
        + "."
    )
    theirs = (
        "W, U and b rounded, forward–backward with α = 1 and 500 steps, as published. In red: samples above the bound."
    )
    return (
        _scatter("displacement", "Theorem 3 at the true equilibria", ours, found.clouds, found.samples),
        _scatter(
            "displacement-published", "The same check with the published solver", theirs, found.checks, found.samples
        ),
    )


def _scatter(key: str, title: str, caption: str, clouds: Sequence[Cloud | PublishedCheck], samples: int) -> Figure:
    both = [value for cloud in clouds for value in (*cloud.bounds, *cloud.moves) if value > 0]
    low, high = min(both) / 1.6, max(both) * 1.6

    def paint(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.fill_between([low, high], [low, high], [high, high], color=COLOURS["line"], alpha=0.45, lw=0)
        axes.plot([low, high], [low, high], color=COLOURS["muted"], lw=1)
        for shade, cloud in zip(SHADES, clouds, strict=False):
            kept = [pair for pair in zip(cloud.bounds, cloud.moves, strict=True) if pair[1] <= 1.01 * pair[0]]
            over = [pair for pair in zip(cloud.bounds, cloud.moves, strict=True) if pair[1] > 1.01 * pair[0]]
            for pairs, name in ((kept, shade), (over, "bad")):
                if pairs:
                    axes.plot(*zip(*pairs, strict=True), "o", color=COLOURS[name], ms=3.2, mew=0, alpha=0.75)
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        powers(axes.xaxis)
        powers(axes.yaxis)
        axes.set_xlabel("bound / ‖z*‖")
        axes.set_title("moved / ‖z*‖", loc="left", fontsize=13, color=COLOURS["muted"])

    legend = tuple((shade, bits_text(cloud.bits)) for shade, cloud in zip(SHADES, clouds, strict=False))
    described = f"{caption} {samples} samples; " + ", ".join(
        f"{bits_text(cloud.bits)}: mean bound {cloud.bound:.3g}, mean movement {cloud.moved:.3g}" for cloud in clouds
    )
    return figure(key, title, caption, paint, described, legend)


PLACES = {"rounded": -0.18, "trained": 0.08, "held": 0.34}


def version_figures(versions: Sequence[Version]) -> tuple[Figure, ...]:
    """Accuracy, margin and ‖ΔW‖₂/m of every version whose W, U and b are rounded, published values beside them."""
    shown = [version for version in versions if version.parts == "W, U, b"]
    if not shown:
        return ()
    lines = ". ".join(
        f"{v.scheme}, {bits_text(v.bits)}, {v.method}: {100 * v.accuracy:.2f} %, margin {v.margin:.3g}" for v in shown
    )
    published = {
        (bits, method): row for method, rows in (("rounded", ROUNDED), ("trained", QAT)) for bits, row in rows.items()
    }
    legend = (
        ("assembled", "assembled, as published"),
        ("structured", "structured"),
        ("ink", "the paper's figure (cross)"),
    )
    kinds = "Hollow: rounded after training. Filled: trained through the quantizer."
    if any(version.method == "held" for version in shown):
        kinds += " Diamond: with the margin held up."

    def draw(
        title: str,
        key: str,
        caption: str,
        value: Callable[[Version], float],
        theirs: str,
        style: Callable[[Axes], None],
    ) -> Figure:
        def paint(axes: Axes) -> None:
            _places(axes)
            for version in shown:
                _mark(axes, version, value(version))
            for (bits, method), row in published.items():
                if row[theirs] is not None:
                    x = BITS.index(bits) + PLACES[method]
                    axes.plot(x, row[theirs], "x", color=COLOURS["ink"], ms=6, mew=1.4, zorder=6)
            style(axes)

        return figure(key, title, caption, paint, lines, legend)

    return (
        draw(
            "Accuracy, measured",
            "versions-accuracy",
            kinds + _cut(shown),
            lambda v: v.accuracy,
            "accuracy",
            _percent_axis,
        ),
        draw(
            "Margin of the codes, proved",
            "versions-margin",
            "Above zero the network has one answer for every input. " + kinds,
            lambda v: v.margin,
            "margin",
            lambda axes: _line(axes, 0.0),
        ),
        draw(
            "‖ΔW‖₂ / m",
            "versions-ratio",
            "Below the line Theorem 2 is enough for convergence; structured weights need no such condition.",
            lambda v: v.ratio,
            "ratio",
            lambda axes: _line(axes, 1.0),
        ),
    )


LOWEST = 0.90


def _cut(shown: Sequence[Version]) -> str:
    below = [v for v in shown if v.accuracy < LOWEST]
    return (
        " Arrows at the edge: "
        + ", ".join(f"{100 * v.accuracy:.1f} % ({v.scheme}, {bits_text(v.bits)})" for v in below)
        + "."
        if below
        else ""
    )


def _places(axes: Axes) -> None:
    """Assembled at 8, 6, 4 bits on the left, structured at 4 to 1 on the right."""
    labels = [str(bits) for bits in (*BITS, *STRUCTURED_BITS)]
    axes.set_xticks(range(len(labels)), labels)
    axes.axvline(len(BITS) - 0.5, color=COLOURS["line"], lw=1)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.set_xlabel("bits of W, U and b")


def _mark(axes: Axes, version: Version, height: float) -> None:
    assembled = version.scheme == "assembled"
    place = BITS.index(version.bits) if assembled else len(BITS) + STRUCTURED_BITS.index(version.bits)
    shade = COLOURS[version.scheme]
    x = place + PLACES[version.method]
    fill = "none" if version.method == "rounded" else shade
    shape = "D" if version.method == "held" else "s" if assembled else "o"
    axes.plot(x, height, shape, color=shade, mfc=fill, ms=7.5, mew=1.5, zorder=4)


def _percent_axis(axes: Axes) -> None:
    """From 90 %, with an arrow for what lies below."""
    for line in list(axes.lines):
        if len(line.get_xdata()) == 1 and line.get_ydata()[0] < LOWEST:
            axes.plot(line.get_xdata()[0], LOWEST + 0.002, "v", color=line.get_color(), ms=7, mew=0, clip_on=False)
            line.set_visible(False)
    axes.set_ylim(LOWEST, 1.0)
    ticks = [0.90, 0.92, 0.94, 0.96, 0.98, 1.0]
    axes.set_yticks(ticks, [f"{100 * tick:.0f} %" for tick in ticks])


def _line(axes: Axes, height: float) -> None:
    axes.axhline(height, color=COLOURS["bad"], lw=1.2, zorder=1)
    axes.margins(y=0.1)
