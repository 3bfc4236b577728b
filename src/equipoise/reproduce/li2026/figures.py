"""The figures of experiments 1, 2, 5 and 6, in the paper's form: results in, ``Figure`` out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...report.canvas import COLOURS, Figure, figure, plain_log, powers, say
from ...report.words import bits_text, number
from .convergence import Convergence, Width
from .gradients import Gradients
from .grids import Grids, Track
from .measure import CAP
from .splitting import Splitting

__all__ = ["convergence_figures", "gradient_figures", "grid_figures", "splitting_figures"]

Axes = Any
"""matplotlib's, which this room does not import."""

VERDICT_COLOURS = {"certified": "structured", "converged": "compensated", "diverged": "bad", "unknown": "muted"}
VERDICT_WORDS = {
    "certified": "margin proved",
    "converged": "not proved, yet settles with a good step",
    "diverged": "does not settle",
    "unknown": "not tried",
}


def convergence_figures(found: Convergence) -> tuple[Figure, ...]:
    """Iterations and final residuals against ‖ΔW‖₂/m, and the residuals of 4 and 3 bits step by step."""
    seen = {width.verdict for width in found.widths}
    legend = tuple((VERDICT_COLOURS[v], VERDICT_WORDS[v]) for v in VERDICT_WORDS if v in seen)
    described = ". ".join(
        f"{bits_text(w.bits)}: ‖ΔW‖/m {w.ratio:.3g}, {w.steps} steps, residual {w.residual:.2g}" for w in found.widths
    )
    return (
        figure(
            "convergence-steps",
            "Iterations under the published rule",
            "Crosses ran into the rule's cap of 2,000 steps; numbers are bits. Right of the dashed line the"
            " sufficient condition ‖ΔW‖₂ < m fails.",
            lambda axes: _against_ratio(axes, found.widths, lambda w: float(w.steps), None),
            described,
            legend,
        ),
        figure(
            "convergence-residual",
            "Final residual under the published rule",
            "The relative residual that each run ended with; the dotted line is the rule's tolerance.",
            lambda axes: _against_ratio(axes, found.widths, lambda w: w.residual, 1e-5),
            described,
            legend,
        ),
        _rescue(found),
    )


def _against_ratio(
    axes: Axes, widths: Sequence[Width], value: Callable[[Width], float], tolerance: float | None
) -> None:
    title = "steps" if tolerance is None else "relative residual"
    axes.set_title(title, loc="left", fontsize=13, color=COLOURS["muted"])
    if tolerance is not None:
        axes.set_yscale("log")
    reach = max(w.ratio for w in widths)
    near = [w for w in widths if w.ratio < 0.06 * reach]
    for w in widths:
        shade = COLOURS[VERDICT_COLOURS[w.verdict]]
        axes.plot(w.ratio, value(w), "o" if w.settled else "x", color=shade, ms=7, mew=2 if not w.settled else 0)
        if w not in near:
            axes.annotate(str(w.bits), (w.ratio, value(w)), (7, 5), textcoords="offset points", color=COLOURS["ink"])
    if near:
        bits = sorted(w.bits for w in near)
        text = f"{bits[0]} to {bits[-1]}" if len(bits) > 1 else str(bits[0])
        axes.annotate(
            text, (near[-1].ratio, value(near[-1])), (7, -16), textcoords="offset points", color=COLOURS["ink"]
        )
    axes.axhline(CAP if tolerance is None else tolerance, color=COLOURS["muted"], lw=1, ls=":")
    axes.axvline(1.0, color=COLOURS["ink"], lw=1, ls=(0, (4, 3)))
    axes.set_xlim(-0.02 * reach, 1.08 * reach)
    if tolerance is None:
        axes.set_ylim(0, 1.12 * CAP)
    else:
        low, high = axes.get_ylim()
        axes.set_ylim(low / 2, high * 2)
        powers(axes.yaxis)
    axes.set_xlabel("‖ΔW‖₂ / m")


def _rescue(found: Convergence) -> Figure:
    rescue = found.rescue
    curves = (
        (rescue.good_curve, "compensated", f"4 bits, α = {rescue.alpha:g}", "-"),
        (rescue.slow_curve, "compensated", "4 bits, α = 0.01", "--"),
        (rescue.lost_curve, "bad", f"3 bits, α = {rescue.alpha:g}", "-"),
    )

    def paint(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        for curve, shade, _, style in curves:
            steps = range(2, len(curve) + 1)
            axes.plot(steps, curve[1:], color=COLOURS[shade], ls=style)
        axes.axhline(1e-5, color=COLOURS["muted"], lw=1, ls=":")
        axes.axvline(CAP, color=COLOURS["ink"], lw=1, ls=(0, (4, 3)))
        say(axes, CAP * 0.93, 0.6, "cap", "ink", ha="right")
        axes.set_ylim(3e-6, 2)
        powers(axes.yaxis)
        plain_log(axes.xaxis, 2, 3000)
        axes.set_xlabel("steps")
        axes.set_title("relative residual", loc="left", fontsize=13, color=COLOURS["muted"])
        say(axes, 0.03, 0.03, f"solid: α = {rescue.alpha:g}, dashed: α = 0.01", "muted", transform=axes.transAxes)

    return figure(
        "convergence-rescue",
        "What a good step does at 4 bits, and not at 3",
        f"Forward–backward on the rule's {found.samples} samples. The rule's own step of 0.01 is still on its way at"
        " the cap; a residual that stays level is growth at a constant rate.",
        paint,
        ". ".join(f"{label}: {len(curve)} steps, last residual {curve[-1]:.2g}" for curve, _, label, _ in curves),
        (("compensated", "4 bits"), ("bad", "3 bits")),
    )


SOLVER_STYLES = {"FB": "-", "DR": ":", "PR": "--"}
SOLVER_NAMES = {"FB": "forward–backward", "DR": "Douglas–Rachford", "PR": "Peaceman–Rachford"}


def splitting_figures(found: Splitting) -> tuple[Figure, ...]:
    """Residual per iteration of each solver on each set of weights."""
    shades = {None: "ink", 8: "structured", 6: "assembled"}

    def paint(axes: Axes) -> None:
        axes.set_yscale("log")
        for curve in found.curves:
            style = SOLVER_STYLES[curve.solver]
            steps = range(2, len(curve.residuals) + 1)
            axes.plot(steps, curve.residuals[1:], color=COLOURS[shades[curve.bits]], ls=style, lw=1.6)
        axes.axhline(1e-5, color=COLOURS["muted"], lw=1, ls=":")
        axes.set_xlim(0, 300)
        axes.set_ylim(5e-11, 3)
        powers(axes.yaxis)
        axes.set_xlabel("steps")
        axes.set_title("relative residual", loc="left", fontsize=13, color=COLOURS["muted"])
        for name, x, y in (("FB", 215, 2e-2), ("DR", 112, 2e-6), ("PR", 4, 3e-10)):
            say(
                axes,
                x,
                y,
                f"{name} {'(solid)' if name == 'FB' else '(dotted)' if name == 'DR' else '(dashed)'}",
                "muted",
            )

    described = ". ".join(
        f"{c.solver}, {'float' if c.bits is None else bits_text(c.bits)}: "
        + (f"{c.steps} steps" if c.steps else "not reached")
        for c in found.curves
    )
    legend = tuple((shades[bits], "float" if bits is None else bits_text(bits)) for bits in _weights(found))
    return (
        figure(
            "splitting",
            "Three splittings, three sets of weights",
            f"The published step sizes on {found.samples} test samples, in float64: the curves go on falling where"
            " float32 would level off near 1e−7. The dotted line is a residual of 1e−5.",
            paint,
            f"Steps to a residual of 1e-5. {described}",
            legend,
        ),
        _step_figure(found, described),
    )


def _step_figure(found: Splitting, described: str) -> Figure:
    """Steps to a residual of 1e-5 with the published step and with the solver's own."""

    def paint(axes: Axes) -> None:
        for place, curve in enumerate(found.curves):
            for x, count, shade in (
                (place - 0.2, curve.steps, "muted"),
                (place + 0.2, curve.own_steps, "structured"),
            ):
                if count is not None:
                    axes.bar(x, count, 0.38, color=COLOURS[shade])
                    axes.text(x, count, f"{count}", ha="center", va="bottom", color=COLOURS["muted"], fontsize=9.5)
        names = [f"{curve.solver}\n{'float' if curve.bits is None else curve.bits}" for curve in found.curves]
        axes.set_xticks(range(len(names)), names)
        axes.set_title("steps", loc="left", fontsize=13, color=COLOURS["muted"])

    return figure(
        "splitting-steps",
        "Steps to a residual of 1e−5",
        "Each solver on float, 8-bit and 6-bit weights, with the published step size and with the one it chooses.",
        paint,
        described,
        (("muted", "published step"), ("structured", "the solver's own")),
    )


def _weights(found: Splitting) -> list[int | None]:
    return list(dict.fromkeys(curve.bits for curve in found.curves))


GRID_COLOURS = {0.1: "seq3", 0.01: "seq2", 0.001: "seq1"}
DECAY_COLOURS = {0.9: "assembled", 0.5: "cayley"}


def grid_figures(found: Grids) -> tuple[Figure, ...]:
    """Distance to the equilibrium step by step, for Peaceman–Rachford and for forward–backward."""
    return tuple(
        _grid_figure(found, name) for name in ("PR", "FB") if any(track.solver == name for track in found.tracks)
    )


def _grid_figure(found: Grids, name: str) -> Figure:
    tracks = [track for track in found.tracks if track.solver == name]

    def paint(axes: Axes) -> None:
        axes.set_yscale("log")
        for track in tracks:
            steps = range(1, len(track.distances) + 1)
            wide = track.grid is None  # the adaptive runs lie on it for long
            axes.plot(
                steps,
                track.distances,
                color=COLOURS[_grid_colour(track)],
                lw=5 if wide else 1.6,
                alpha=0.3 if wide else 1,
            )
            if track.grid is not None and track.decay is None and track.floor is not None:
                axes.axhline(track.floor, color=COLOURS[_grid_colour(track)], lw=1, ls=(0, (4, 3)))
        axes.set_xlim(0, len(tracks[0].distances))
        low = min(min(track.distances) for track in tracks)
        axes.set_ylim(max(low / 3, 1e-15), 3)
        powers(axes.yaxis)
        axes.set_xlabel("steps")
        axes.set_title("relative distance to the equilibrium", loc="left", fontsize=13, color=COLOURS["muted"])

    ends = ". ".join(f"{_grid_words(track)} ends at {track.end:.2g}" for track in tracks)
    return figure(
        f"grids-{name.lower()}",
        f"Rounded iterates, {SOLVER_NAMES[name]}",
        f"{found.bits}-bit weights, {found.samples} test samples, the published step. Dashed: where C2 proves the"
        " iterates on a fixed grid to end, at the latest, in the same colour.",
        paint,
        ends,
        tuple((_grid_colour(track), _grid_words(track)) for track in tracks),
    )


def _grid_colour(track: Track) -> str:
    if track.grid is None:
        return "ink"
    return GRID_COLOURS[track.grid] if track.decay is None else DECAY_COLOURS[track.decay]


def _grid_words(track: Track) -> str:
    if track.grid is None:
        return "not rounded"
    return f"grid {track.grid:g}" if track.decay is None else f"{track.grid:g} shrinking by {track.decay:g}"


def gradient_figures(found: Gradients) -> tuple[Figure, ...]:
    """The gradient's error against ‖ΔW‖₂, and the share of it that flips make up."""
    shown = [error for error in found.errors if error.bits <= 16]
    if not shown:
        return ()

    def errors(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        sizes = [error.delta_norm for error in shown]
        guide = shown[-1].frozen / shown[-1].delta_norm
        axes.plot(sizes, [guide * size for size in sizes], color=COLOURS["muted"], lw=1, ls=(0, (4, 3)))
        axes.plot(sizes, [error.frozen for error in shown], "s-", color=COLOURS["structured"], ms=5, mew=0)
        axes.plot(sizes, [error.error for error in shown], "o-", color=COLOURS["assembled"], ms=6, mew=0)
        for error in shown:
            axes.annotate(
                str(error.bits), (error.delta_norm, error.error), (-4, 8), textcoords="offset points", ha="right"
            )
        powers(axes.xaxis)
        powers(axes.yaxis)
        axes.margins(0.09, 0.12)
        axes.set_xlabel("‖ΔW‖₂")
        axes.set_title("relative error", loc="left", fontsize=13, color=COLOURS["muted"])

    def shares(axes: Axes) -> None:
        places = range(len(shown))
        axes.bar(places, [100 * error.flip_share for error in shown], 0.6, color=COLOURS["assembled"])
        for place, error in zip(places, shown, strict=True):
            label = f"{100 * error.samples_flipped:.3g} %"
            axes.text(place, 100 * error.flip_share + 2, label, ha="center", color=COLOURS["muted"], fontsize=11)
        axes.set_xticks(list(places), [str(error.bits) for error in shown])
        axes.set_ylim(0, 108)
        axes.set_yticks([0, 25, 50, 75, 100], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        axes.set_xlabel("bits")

    return (
        figure(
            "gradients",
            "Error of the gradient for W",
            f"The mean loss's gradient over {found.samples:,} test samples, in float64. With the float network's"
            " active set kept, the error follows ‖ΔW‖₂ (dashed: proportional to it); numbers are bits.",
            errors,
            ". ".join(f"{bits_text(e.bits)}: {number(e.error, 2)}, frozen {number(e.frozen, 2)}" for e in shown),
            (("assembled", "as it is"), ("structured", "active set kept")),
        ),
        figure(
            "gradients-flips",
            "Share of the error that flipped activations make up",
            "Of the squared error per sample. Above each bar: the share of samples with at least one ReLU that"
            " switched.",
            shares,
            ". ".join(f"{bits_text(e.bits)}: {100 * e.flip_share:.0f} %" for e in shown),
        ),
    )
