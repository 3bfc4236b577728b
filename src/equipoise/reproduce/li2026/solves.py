"""The sections on the float network and on experiments 1 and 2: what was found beside what was published, in words."""

from __future__ import annotations

from ...report.words import MISSING, at_least, at_most, bits_text, number
from ..record import COUNT, PERCENT, Comparison, Section, Table, compared, decimals, power
from . import published
from .convergence import PATIENCE, Convergence, Rescue, Trial, Width
from .displacement import Displacement
from .figures import convergence_figures, splitting_figures
from .measure import CAP
from .splitting import Splitting
from .subject import Subject

__all__ = ["JSON", "PAPER", "README", "convergence_section", "network_section", "splitting_section", "why"]

OTHER = "Another network than the published one: only the order of magnitude can be compared."
"""The sentence on every difference where the checkpoint is not the released one."""

README, JSON, PAPER = "README of the code", "experiment_results.json of the code", "paper, section V"


def network_section(subject: Subject, displacement: Displacement) -> Section:
    """The float network itself."""
    unsettled = 100 * (1 - displacement.settled)
    reason = (
        "At the exact equilibria. The released code evaluates with forward–backward at α = 1 and 500 steps, which"
        f" leaves {unsettled:.0f} % of {displacement.samples:,} test samples more than 0.1 % away from theirs."
    )
    rows = (
        compared("Test accuracy", published.ACCURACY, subject.accuracy, PERCENT, 5e-5, why(subject, reason), PAPER),
        compared("Margin m", published.MARGIN, subject.margin, decimals(4), 5e-5, why(subject, MISSING), PAPER),
        compared(
            "Lipschitz constant L",
            published.LIPSCHITZ,
            subject.lipschitz,
            decimals(3),
            5e-4,
            why(subject, MISSING),
            PAPER,
        ),
        compared(
            "Relative condition number ‖W‖₂/m",
            published.RELATIVE_CONDITION,
            subject.weight_norm / subject.margin,
            decimals(2),
            5e-3,
            why(subject, MISSING),
            "README and paper, section IV",
        ),
    )
    how = (
        f"trained here for {subject.trained_epochs} epochs (one cycle of Adam up to 3e-3, batches of 128), where the"
        f" paper has {published.NETWORK}"
        if subject.trained_epochs is not None
        else f"taken from {subject.source}"
    )
    return Section(
        "network",
        "The float network",
        f"One equilibrium layer of {subject.features} units, rank of A {subject.rank}, and a linear head; {how}.",
        (
            f"Proved from its weights: margin at least {at_least(subject.margin, 6)}, Lipschitz constant at most"
            f" {at_most(subject.lipschitz, 6)}, condition number at most {at_most(subject.condition, 4)}.",
        ),
        comparisons=rows,
    )


def why(subject: Subject, text: str) -> str:
    """``text`` of the published network, of another one that it is another."""
    return text if subject.published else OTHER


def convergence_section(found: Convergence, subject: Subject) -> Section:
    """Experiment 1."""
    by_bits = {width.bits: width for width in found.widths}
    return Section(
        "convergence",
        "1. Convergence against ‖ΔW‖₂/m",
        "W rounded as a whole with the largest entry as the largest level, U and b in floats. Forward–backward from"
        f" 0 with α = m̃/L̃², or 0.01 where m̃ ≤ 0, until ‖z⁺ − z‖ < 1e−5 ‖z‖ over the first {found.samples} test"
        f" samples or for {CAP:,} steps: the published rule, in float64.",
        (_proved(found), _four(found.rescue, by_bits[4]), _three(found.trials, by_bits[3])),
        convergence_figures(found),
        (_width_table(found),),
        _width_rows(by_bits, found, subject),
    )


def _proved(found: Convergence) -> str:
    certified = [width.bits for width in found.widths if width.verdict == "certified"]
    enough = [width.bits for width in found.widths if width.ratio < 1]
    if not certified:
        return "No number of bits keeps a margin that can be proved."
    more = [bits for bits in certified if bits not in enough]
    text = f"From {bits_text(min(certified))} up a positive margin is proved from the codes."
    if more:
        text += (
            f" ‖ΔW‖₂ < m is sufficient and not necessary: at {' and '.join(bits_text(b) for b in more)} it fails, and"
            " the margin is proved nevertheless."
        )
    return text


def _four(rescue: Rescue, width: Width) -> str:
    if width.verdict == "certified":
        return "At 4 bits this network keeps a proved margin."
    if not rescue.settled:
        late = f"with α = {rescue.alpha:g} the network does not settle within {CAP:,} steps"
        return f"At 4 bits nothing is proved, and {late}."
    if width.settled:
        return f"At 4 bits nothing is proved, and the rule settles in {width.steps:,} steps nevertheless."
    cap = ""
    if rescue.fallback_steps is not None:
        late = "just after" if rescue.fallback_steps < 1.5 * CAP else "after"
        cap = f" The rule's own step of 0.01 gets there {late} the cap, in {rescue.fallback_steps:,} steps."
    return (
        f"At 4 bits “diverges” is the cap: with α = {rescue.alpha:g} the same network settles in {rescue.steps} steps"
        f" on these samples, and on {_all(rescue.test_settled)} of {rescue.test_samples:,} test samples within"
        f" {rescue.test_slowest:,} steps each, {100 * rescue.accuracy:.2f} % of them right.{cap} Nothing certifies"
        f" it: the margin is {number(width.margin, 3)}, and another input may behave otherwise."
    )


def _all(share: float) -> str:
    return "all" if share == 1 else f"{100 * share:.1f} %"


def _three(trials: tuple[Trial, ...], width: Width) -> str:
    if width.verdict == "certified":
        return "At 3 bits this network keeps a proved margin."
    if max(trial.grew for trial in trials) == 0:
        return "At 3 bits nothing is proved, and no sample was seen to grow without bound at any step size tried."
    steps = ", ".join(f"{trial.alpha:g}" for trial in trials[:-1]) + f" or {trials[-1].alpha:g}"
    left = max(1 - trial.grew - trial.settled for trial in trials)
    rest = f", and the few that are left do neither within {PATIENCE:,} steps" if left > 1e-9 else ""
    return (
        f"At 3 bits the network truly diverges: {_span([trial.grew for trial in trials])} of the samples grow past a"
        f" million times the length of their input term, whether α is {steps}. {_span([t.settled for t in trials])}"
        f" settle{rest}. A smaller step changes nothing but the pace."
    )


def _span(shares: list[float]) -> str:
    low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _width_table(found: Convergence) -> Table:
    rows = tuple(
        (
            bits_text(w.bits),
            _short(w.delta_norm),
            _short(w.ratio),
            at_least(w.margin, 4),
            w.verdict,
            f"{w.alpha:.4f}",
            f"{w.steps:,}" if w.settled else f"{w.steps:,} (cap)",
            power(w.residual),
            f"{w.certified_steps:,}" if w.certified_steps else MISSING,
            f"{w.solver_steps:,}" if w.solver_steps else MISSING,
        )
        for w in found.widths
    )
    head = ("W", "‖ΔW‖₂ ≤", "‖ΔW‖₂/m", "Margin ≥", "Verdict", "α", "Steps", "Residual", "FB steps ≤", "PR steps ≤")
    note = (
        "“≥” and “≤” are proved. FB steps: until the distance to the equilibrium has shrunk by 1e−5 with this α,"
        " whatever the input. PR steps: by 1e−6 with Peaceman–Rachford and its own step."
    )
    return Table("Every number of bits", head, rows, note)


def _short(value: float) -> str:
    return f"{value:.3g}" if value > 1e-4 else power(value, 2)


def _width_rows(by_bits: dict[int, Width], found: Convergence, subject: Subject) -> tuple[Comparison, ...]:
    rows = [
        compared(
            f"‖ΔW‖₂, {bits_text(b)}", value, by_bits[b].delta_norm, decimals(3), 5e-4, why(subject, MISSING), README
        )
        for b, value in published.DELTA.items()
    ]
    for b, value in published.TILDE_MARGIN.items():
        margin = by_bits[b].margin
        rounding = "The last digit of float32 eigenvalues: in float64 it is proved smaller."
        rows.append(
            compared(f"Margin m̃, {bits_text(b)}", value, margin, decimals(3), 5e-4, why(subject, rounding), README)
        )
    for b, count in published.RULE_STEPS.items():
        rows.append(
            compared(
                f"Steps of the rule, {bits_text(b)}", count, _steps(by_bits[b]), COUNT, 0, why(subject, MISSING), PAPER
            )
        )
    five, four, three = by_bits[5], by_bits[4], by_bits[3]
    near = "Below the cap, so the published run converged as well." if five.settled else "At the cap."
    rows.append(compared("Steps of the rule, 5 bits", "near the cap of 2,000", _steps(five), COUNT, 0, near, PAPER))
    rescue = found.rescue
    if not four.settled and rescue.settled and four.verdict != "certified":
        rows.append(
            Comparison(
                "4 bits, by the rule",
                "does not converge",
                f"settles in {rescue.steps} steps",
                MISSING,
                f"With α = {rescue.alpha:g} instead of 0.01; by the rule it ends at the cap here as well, with"
                f" residual {power(four.residual)}. Not certified either way.",
                PAPER,
            )
        )
    grew = max(trial.grew for trial in found.trials)
    if not three.settled and grew > 0:
        said = "The same, and it is no matter of the step or the cap."
        rows.append(Comparison("3 bits, by the rule", "does not converge", "diverges", MISSING, said, PAPER))
    return tuple(rows)


def _steps(width: Width) -> float | None:
    return width.steps if width.settled else None


def splitting_section(found: Splitting, subject: Subject) -> Section:
    """Experiment 2."""
    rows = []
    for curve in found.curves:
        if curve.bits is None and curve.solver in ("PR", "FB"):
            said = {"PR": "about 50", "FB": "more than 300"}[curve.solver]
            reason = "To a residual of 1e−5 with the published α; the paper reads its curves by eye."
            rows.append(
                compared(f"Steps, {curve.solver}, float", said, curve.steps, COUNT, 0, why(subject, reason), README)
            )
    apart = Comparison(
        "Largest relative distance between two solvers' answers",
        "below 3e−7",
        power(found.disagreement, 0),
        MISSING,
        "Solved in float64 to a proved bound of 1e−10; the published solves are in float32.",
        README,
    )
    return Section(
        "splitting",
        "2. Three splittings under quantization",
        "Forward–backward with α = m̃/L̃², Peaceman–Rachford and Douglas–Rachford with α = 1/L̃, as published, on"
        f" {found.samples} test samples; residuals in each solver's own variable.",
        (_splitting_words(found),),
        splitting_figures(found),
        (_splitting_table(found),),
        (*rows, apart),
    )


def _splitting_words(found: Splitting) -> str:
    steps = {(curve.solver, curve.bits): curve for curve in found.curves}
    pr = [curve.steps for curve in found.curves if curve.solver == "PR" and curve.steps]
    fb = [curve.steps for curve in found.curves if curve.solver == "FB" and curve.steps]
    if not pr or not fb or ("PR", None) not in steps:
        return "Not every solver reached a residual of 1e−5 within 2,000 steps."
    own = steps["PR", None].own_steps
    better = f" With the step it chooses itself it needs {own}." if own and own < pr[0] else ""
    spread = f"{min(pr)}" if min(pr) == max(pr) else f"{min(pr)} to {max(pr)}"
    return (
        f"Rounding slows forward–backward, whose step shrinks with the margin ({min(fb):,} to {max(fb):,} steps), and"
        " hardly"
        f" touches Peaceman–Rachford ({spread} steps)." + better
    )


def _splitting_table(found: Splitting) -> Table:
    rows = tuple(
        (
            f"{curve.solver}, {'float' if curve.bits is None else bits_text(curve.bits)}",
            f"{curve.alpha:.4f}",
            at_most(curve.rate, 4),
            MISSING if curve.steps is None else f"{curve.steps:,}",
            f"{curve.own_alpha:.4f}",
            MISSING if curve.own_steps is None else f"{curve.own_steps:,}",
        )
        for curve in found.curves
    )
    head = ("Solver", "α, published", "Rate ≤", "Steps", "α, its own choice", "Steps")
    return Table(
        "Steps to a residual of 1e−5", head, rows, "The rate is proved, for every input, with the published α."
    )
