"""The explorer's pictures, and the two that show one version: its spectrum, and its bounds against movements."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ladder import Ladder
from .drawing import BOX, Picture, Scale, Scene, Stroke, dots, line, stems
from .overview import bytes_scene, margin_scene, signed
from .words import number

__all__ = ["scenes"]

VALUES = 200
"""Bars of a spectrum, and points of a cloud: enough to see the shape, few enough for a small page."""
POINTS = 400
SPAN = 1e6
"""Ratio of the largest to the smallest movement that the cloud has room for."""


def scenes(ladder: Ladder) -> list[Scene]:
    """Every picture that the ladder has numbers for."""
    found = [_spectrum(ladder), _cloud(ladder), margin_scene(ladder), bytes_scene(ladder)]
    return [scene for scene in found if scene is not None]


# The spectrum


def _spectrum(ladder: Ladder) -> Scene | None:
    """A bar for each eigenvalue, the least first, and the float network's as a line."""
    spectra = [_numbers(proof.spectrum) for proof in ladder.evidence]
    known = ladder.subject.spectrum if ladder.subject else ()
    count = max((len(values) for values in spectra), default=0)
    if not count:
        return None
    thinned = [_thinned(values) for values in (*spectra, list(known))]
    y = signed(ladder, [v for values in thinned for v in values], BOX.bottom, BOX.top)
    step = (BOX.right - BOX.left) / min(count, VALUES)

    def points(values: list[float]) -> list[tuple[float, float]]:
        return [(BOX.left + (i + 0.5) * step, y(value)) for i, value in enumerate(values)]

    def paths(i: int) -> dict[str, str]:
        above, below = ([f(v, 0.0) for v in thinned[i]] for f in (max, min))
        return {"above": stems(y(0), points(above)), "below": stems(y(0), points(below))}

    families = {part.family for proof in ladder.evidence for part in (proof.certificate.layers or (proof.certificate,))}
    title, noun = "Spectrum of sym(I − W̃)", "eigenvalues"
    if families != {"l2"}:
        title, noun = "1 − μ, row by row", "rows"

    def says(i: int) -> str:
        values = spectra[i]
        if not values:
            return f"The codes define no matrix, so there are no {noun}."
        sunk = sum(value < 0 for value in values)
        shown = f" ({VALUES} of them drawn)" if len(values) > VALUES else ""
        lost = f"{sunk:,} of them are below zero" if sunk else "None of them is below zero"
        line_is = " The line is the float network's." if known else ""
        return f"{len(values):,} {noun}{shown}, the least {number(values[0])} as computed. {lost}.{line_is}"

    def aside(i: int) -> str:
        sunk = sum(value < 0 for value in spectra[i])
        return f"{sunk:,} below zero" if sunk else ""

    picture = Picture(
        "spectrum",
        title,
        f"A bar for each of the {noun} of the version shown, the least first; bars below zero are red.",
        "as computed",
        f"{noun}, the least first",
        y.ticks(24),
        [],
        [
            Stroke("region bad", f"M{BOX.left} {BOX.bottom}V{y(0):.1f}H{BOX.right}V{BOX.bottom}z"),
            Stroke("stems", moves="above", width=max(0.72 * step, 0.8)),
            Stroke("stems sunk", moves="below", width=max(0.72 * step, 0.8)),
            Stroke("ghost", line(list(points(thinned[-1])))),
            Stroke("zero", f"M{BOX.left} {y(0):.1f}H{BOX.right}"),
        ],
    )
    return Scene(picture, paths, says, aside)


def _numbers(values: Tensor | None) -> list[float]:
    return [] if values is None else values.tolist()


def _thinned(values: list[float]) -> list[float]:
    """At most ``VALUES`` of them, evenly, both ends among them."""
    if len(values) <= VALUES:
        return values
    return [values[round(i * (len(values) - 1) / (VALUES - 1))] for i in range(VALUES)]


# The bound against the movement


def _cloud(ladder: Ladder) -> Scene | None:
    """A point for each test input: how far its answer moved, and the proved bound of that."""
    both = [_moves(proof.certificate.actual_displacement, proof.certificate.displacement) for proof in ladder.evidence]
    known = torch.cat([pair for pair in both if pair is not None] or [torch.empty(2, 0)], 1)
    known = known[:, (known.isfinite() & (known > 0)).all(0)]
    if not known.numel():
        return None
    high = float(known.max()) * 1.5
    low = max(float(known.min()), high / SPAN) / 1.5
    x, y = (Scale(low, high, *ends, "log") for ends in ((BOX.left, BOX.right), (BOX.bottom, BOX.top)))
    stride = max(1, -(-max(pair.shape[1] for pair in both if pair is not None) // POINTS))
    corner = f"M{BOX.left} {BOX.bottom}L{BOX.right} {BOX.top}"

    def fits(moved: float, bound: float) -> bool:
        return low <= min(moved, bound) and max(moved, bound) <= high

    def paths(i: int) -> dict[str, str]:
        pair = both[i]
        kept = [] if pair is None else pair[:, ::stride].T.tolist()
        return {"points": dots((x(moved), y(bound)) for moved, bound in kept if fits(moved, bound))}

    def says(i: int) -> str:
        pair = both[i]
        if pair is None:
            return "A margin is not proved of both networks, so nothing bounds how far the answers moved."
        count, beyond = pair.shape[1], int((pair[0] > pair[1]).sum())
        every = {1: "", 2: "every second of ", 3: "every third of "}.get(stride, f"every {stride}th of ")
        hidden = " Inputs that hardly moved have no place here." if bool((pair < low).any()) else ""
        return (
            f"Each point is one test input ({every}{count:,}): how far its answer moved, and the proved bound."
            f" {f'{beyond:,} inputs' if beyond else 'No input'} moved further than proved.{hidden}"
        )

    picture = Picture(
        "cloud",
        "Proved bound against actual movement",
        "Scatter plot on logarithmic axes. All points of a sound bound lie above the diagonal.",
        "proved bound",
        "moved, as measured",
        y.ticks(24),
        x.ticks(52),
        [
            Stroke("region", f"{corner}V{BOX.bottom}z"),
            Stroke("axis", corner),
            Stroke("dots", moves="points"),
        ],
    )
    return Scene(picture, paths, says, lambda i: "" if both[i] is not None else "no bound")


def _moves(moved: Tensor | None, bound: Tensor | None) -> Tensor | None:
    """(2, B) of how far each answer moved and its bound."""
    return None if moved is None or bound is None or not len(moved) else torch.stack((moved, bound)).double().cpu()
