"""The sections on experiments 4, 5 and 6: movements, grids and gradients, in words."""

from __future__ import annotations

from collections.abc import Sequence

from ...report.words import MISSING, at_most, bits_text
from ..record import PERCENT, Comparison, Form, Section, Table, compared, decimals, power
from . import published
from .displacement import Displacement
from .figures import gradient_figures, grid_figures
from .gradients import Error, Gradients
from .grids import Grids, Track
from .plots import displacement_figures
from .solves import JSON, README, why
from .subject import Subject

__all__ = ["displacement_section", "gradient_section", "grid_section"]


def displacement_section(found: Displacement, subject: Subject) -> Section:
    """Experiment 4."""
    rows = []
    for cloud, check in zip(found.clouds, found.checks, strict=True):
        said = published.CHECK[cloud.bits]
        reason = (
            "The bound holds at the equilibria; the published figure is of solves that have not reached them."
            if cloud.share == 1
            else "Rounding of the float64 solves."
        )
        rows.append(
            compared(
                f"Samples within the bound, {bits_text(cloud.bits)}",
                said["share"],
                cloud.share,
                PERCENT,
                5e-5,
                why(subject, reason),
                JSON,
            )
        )
        apart = round(abs(check.share - said["share"]) * found.samples)
        few = f"{apart} samples of {found.samples:,} fall on the other side: float32 operations in another order."
        rows.append(
            compared("… by the published solver", said["share"], check.share, PERCENT, 5e-5, why(subject, few), JSON)
        )
        for name, key, value, share in (
            ("bound", "bound", check.bound, 2e-3),
            ("movement", "moved", check.moved, 4e-3),
        ):
            label, form = f"Mean {name}, by the published solver", _digits(said[key])
            rows.append(compared(label, said[key], value, form, share * said[key], why(subject, few), JSON))
    return Section(
        "displacement",
        "4. Theorem 3 against actual movement",
        f"‖z* − z̃*‖ against ‖ΔW‖₂ ‖z̃*‖/m on the first {found.samples:,} test samples: W alone rounded, both"
        " equilibria solved in float64. Beside it the published check: W, U and b rounded, both solves by"
        " forward–backward with α = 1 in float32, 500 steps at most.",
        _displacement_words(found),
        displacement_figures(found),
        (_displacement_table(found),),
        tuple(rows),
    )


def _digits(like: float) -> Form:
    return decimals(2 if like >= 1 else 4)


def _displacement_words(found: Displacement) -> tuple[str, ...]:
    if not found.clouds:
        return ("No number of bits tried has a proved margin, so Theorem 3 says nothing about this network.",)
    least = min(cloud.share for cloud in found.clouds)
    times = [cloud.bound / cloud.moved for cloud in found.clouds if cloud.moved]
    sharp = [cloud.sharp / cloud.bound for cloud in found.clouds if cloud.bound]
    words = [
        "At the equilibria the bound holds on"
        f" {'every sample' if least == 1 else f'{100 * least:.2f} % of the samples'} at every number of bits,"
        f" {min(times):.1f} to {max(times):.1f} times above the movement on average. The certificate's own bound per"
        f" sample is {min(sharp):.2f} to {max(sharp):.2f} times as large.",
    ]
    exact, settled = (min(getattr(check, f"{kind}_share") for check in found.checks) for kind in ("exact", "settled"))
    if found.settled < 1:
        words.append(
            "Why the published check finds violations: forward–backward at α = 1 is a plain fixed-point iteration,"
            f" which nothing makes contract here. For {100 * (1 - found.settled):.1f} % of the samples its float"
            " solve ends more than 0.1 % away from the equilibrium after 500 steps. Among the others the bound holds"
            f" on {'all' if settled == 1 else f'{100 * settled:.1f} %'}; at the true equilibria of the same networks,"
            " U and b rounded as well and left out of the bound, on"
            f" {'all' if exact == 1 else f'{100 * exact:.1f} %'}."
        )
    return tuple(words)


def _displacement_table(found: Displacement) -> Table:
    rows = tuple(
        (
            bits_text(cloud.bits),
            f"{100 * cloud.share:.2f} %",
            f"{cloud.bound:.3g}",
            f"{cloud.sharp:.3g}",
            f"{cloud.moved:.3g}",
            f"{100 * check.share:.2f} %",
            f"{100 * check.settled_share:.2f} %",
            f"{100 * check.exact_share:.2f} %",
        )
        for cloud, check in zip(found.clouds, found.checks, strict=True)
    )
    head = (
        "W",
        "Within T3",
        "T3, mean",
        "Certificate, mean",
        "Moved, mean",
        "Published check",
        "… where settled",
        "… at equilibria",
    )
    return Table("Shares of the samples, and means", head, rows)


def grid_section(found: Grids, subject: Subject) -> Section:
    """Experiment 5."""
    rows = tuple(
        Comparison(
            f"Adaptive grid, γ = {track.decay:g}",
            "converges to machine precision",
            f"{power(track.end, 0)} after {len(track.distances)} steps",
            MISSING,
            "Still shrinking at the rate γ when the run ends; what C2 proves at that step is"
            f" {at_most(track.floor, 2)}."
            if track.end > 1e-12
            else "The same.",
            README,
        )
        for track in found.tracks
        if track.solver == "PR" and track.decay is not None
    )
    return Section(
        "grids",
        "5. Iterates on a fixed and on an adaptive grid",
        f"{found.bits}-bit weights, every iterate rounded to a grid of width δ, fixed or shrinking as δ γᵏ, on"
        f" {found.samples} test samples in float64. The paper rounds the steps of its adaptive runs, here it is the"
        " iterates themselves, as in Corollary 2.",
        _grid_words(found),
        grid_figures(found),
        (_grid_table(found),) if found.tracks else (),
        rows,
    )


def _grid_words(found: Grids) -> tuple[str, ...]:
    fixed = [track for track in found.tracks if track.grid is not None and track.decay is None]
    judged = [track.worst for track in found.tracks if track.worst is not None]
    if not fixed or not judged:
        return ("The 8-bit weights have no proved margin, so Corollary 2 says nothing about this network.",)
    kept = max(judged) <= 1
    ratio = [track.end / track.floor for track in fixed if track.floor]
    return (
        f"Every sample {'ends within' if kept else 'does not end within'} what C2 proves for it at the last step. On"
        f" a fixed grid the error stays at {min(ratio):.2g} to {max(ratio):.2g} of the proved floor ε/(1 − r) and"
        " shrinks in proportion to the grid; an adaptive grid leaves no floor.",
    )


def _grid_table(found: Grids) -> Table:
    def bound(track: Track) -> str:
        return at_most(track.floor, 3)

    rows = tuple(
        (
            f"{track.solver}, " + ("not rounded" if track.grid is None else f"δ = {track.grid:g}"),
            "fixed"
            if track.grid is not None and track.decay is None
            else MISSING
            if track.decay is None
            else f"γ = {track.decay:g}",
            at_most(track.rate, 4),
            power(track.end, 2),
            bound(track),
            MISSING if track.worst is None else f"{track.worst:.3f}",
        )
        for track in found.tracks
    )
    head = ("Solver and grid", "Grid", "Rate ≤", "Distance", "Distance ≤", "Worst sample / its bound")
    note = (
        "Distances relative to the equilibria, over all samples, after the last step; “≤” proved, in the limit for a"
        " fixed grid and at the last step for an adaptive one."
    )
    return Table("Where each run ends", head, rows, note)


def gradient_section(found: Gradients, subject: Subject) -> Section:
    """Experiment 6."""
    rows = []
    for error in found.errors:
        said = published.HEAD_ERROR.get(error.bits)
        if said is None:
            continue
        reason = (
            "The published figure averages the head's two gradients on the first 256 images alone, W, U and b"
            f" rounded, both solves by forward–backward at α = 1: done that way it is {error.published_head:.3g}"
            f" here. Ours: W rounded, at the equilibria of {found.samples:,} images."
        )
        form = decimals(4 if said > 1e-3 else 6)
        rows.append(
            compared(
                f"Error of the head's gradients, {bits_text(error.bits)}",
                said,
                error.head,
                form,
                0,
                why(subject, reason),
                JSON,
            )
        )
    return Section(
        "gradients",
        "6. Gradient error against ‖ΔW‖₂",
        f"The gradient of the mean cross-entropy of {found.samples:,} test samples for W, by implicit differentiation"
        " with the backward problem solved directly, float against W rounded, all in float64. Then once more with"
        " the rounded network's W̃ and z̃*, and the float network's active set.",
        _gradient_words(found),
        gradient_figures(found),
        (_gradient_table(found.errors),) if found.errors else (),
        tuple(rows),
    )


def _gradient_words(found: Gradients) -> tuple[str, ...]:
    if not found.errors or found.slope is None or found.frozen_slope is None:
        return ("No number of bits tried has a proved margin, so there is no backward guarantee to look at.",)
    coarse = [error for error in found.errors if error.flip_share > 0.01]
    words = [
        "The paper argues that the gradient's error is O(‖ΔW‖₂). With the active set kept it is: the slope in the"
        f" figure is {found.frozen_slope:.2f}."
    ]
    if coarse:
        shares = [100 * error.flip_share for error in coarse]
        most = max(coarse, key=lambda error: error.flip_share)
        words.append(
            "As it is, a ReLU that switches adds an error that does not shrink with ‖ΔW‖₂; only their number does."
            f" From {bits_text(coarse[0].bits)} to {bits_text(coarse[-1].bits)} flips make up {min(shares):.0f} to"
            f" {max(shares):.0f} % of the squared error, although at {bits_text(most.bits)} only"
            f" {100 * most.flipped:.2g} % of the activations flip, in {100 * most.samples_flipped:.2g} % of the"
            " samples."
        )
    return tuple(words)


def _gradient_table(errors: Sequence[Error]) -> Table:
    rows = tuple(
        (
            bits_text(e.bits),
            f"{e.delta_norm:.3g}",
            f"{e.error:.3g}",
            f"{e.frozen:.3g}",
            f"{100 * e.flip_share:.1f} %",
            f"{100 * e.flipped:.3g} %",
            f"{100 * e.samples_flipped:.3g} %",
        )
        for e in errors
    )
    head = ("W", "‖ΔW‖₂", "Error", "Active set kept", "Due to flips", "Activations flipped", "Samples with a flip")
    note = "Errors of the gradient for W in the Frobenius norm, relative to the float network's."
    return Table("Every number of bits", head, rows, note)
