"""A ladder in plain words and formatted numbers, the same on the page and in the terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..certificates.printed import MISSING, at_least, at_most, number
from ..ladder import Evidence, Ladder, Requirements, Rung

__all__ = [
    "MISSING",
    "VERDICTS",
    "Ask",
    "asked_text",
    "asks",
    "at_least",
    "at_most",
    "bits_of",
    "bits_text",
    "bytes_text",
    "headline",
    "measured",
    "name",
    "number",
    "percent",
    "percent_at_least",
    "proved",
    "requirement_text",
    "summary",
    "title",
]

VERDICTS = {
    "certified": "A positive margin is proved: every input has exactly one equilibrium, and the solver reaches it.",
    "converged": "Nothing is proved, yet every given input settled. Another input may not.",
    "diverged": "Nothing is proved, and some of the given inputs did not settle.",
    "unknown": "Nothing is proved, and nothing was tried.",
}


def percent(share: float | None) -> str:
    """A measured share in [0, 1] as a percentage with one decimal."""
    return MISSING if share is None else f"{100 * share:.1f} %"


def percent_at_least(share: float | None) -> str:
    """A share that is proved, rounded down: 100 % only where nothing is missing."""
    return MISSING if share is None else f"{math.floor(1000 * share + 1e-9) / 10:.1f} %"


def asked_text(share: float) -> str:
    """A share as it was asked for, without decimals that nobody wrote."""
    return f"{100 * share:.6g} %"


def bytes_text(count: int) -> str:
    """A size for reading: bytes below a thousand, then kB and MB (powers of ten)."""
    for unit, factor in (("MB", 1_000_000), ("kB", 1_000)):
        if count >= factor:
            value = count / factor
            return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"
    return f"{count} bytes"


def bits_text(bits: int) -> str:
    """ "1 bit", "2 bits"."""
    return f"{bits} bit" if bits == 1 else f"{bits} bits"


def bits_of(rung: Rung) -> str:
    """ "2 bits", or, of a mixed rung, the bits of A, K, U, b and the head: "2/4/1/8/float"."""
    return str(rung.parts) if rung.mixed else bits_text(rung.bits)


def name(rung: Rung) -> str:
    """The rung by its scheme and bits, input bits where there are any."""
    if rung.mixed:
        return f"{rung.scheme.capitalize()} {rung.parts} (A K U b head)"
    inputs = "" if rung.input_bits is None else f" (inputs {bits_text(rung.input_bits)})"
    return f"{rung.scheme.capitalize()} at {bits_text(rung.bits)}{inputs}"


def title(rung: Rung) -> str:
    """The rung by its scheme and bits, for headings."""
    return name(rung) if rung.mixed else f"{rung.scheme.capitalize()} at {bits_text(rung.bits)}"


def headline(ladder: Ladder) -> str:
    """One sentence: what was chosen."""
    if ladder.chosen is None:
        return "No version keeps everything that was asked."
    rung = ladder.rungs[ladder.chosen]
    return f"{title(rung)} keeps the guarantee in {bytes_text(rung.size_bytes)}."


def summary(ladder: Ladder) -> str:
    """One or two sentences under the headline: out of how many, and what was asked."""
    count = len(ladder.rungs)
    certified = sum(rung.certified for rung in ladder.rungs)
    asked = requirement_text(ladder.requirements)
    if ladder.chosen is None and not certified:
        return f"Of {count} quantized versions none is certified: no positive margin could be proved."
    if ladder.chosen is None:
        missing = f"none of those has {asked}" if asked else "none of those was chosen"
        return (
            f"{certified} of the {count} quantized versions are certified, and {missing}, judged on the"
            " validation split. Ask for less, or allow more bits."
        )
    more = f" and {'has' if ladder.goal == 'size' else 'have'} {asked}" if asked else ""
    best = f"This is the smallest that is certified{more}"
    if ladder.goal == "displacement":
        best = f"Of those that are certified{more} this is the one proved to move least"
    return (
        f"Of {count} quantized version{'s' if count > 1 else ''} of this network, {certified}"
        f" {'are' if certified > 1 else 'is'} certified. {best}, judged on the validation split. Figures are of the"
        " test split unless they say otherwise."
    )


def requirement_text(requirements: Requirements) -> str:
    """What was asked beyond being certified, as a phrase after "has"; empty where nothing was."""
    phrases = []
    if requirements.min_agreement is not None:
        phrases.append(f"at least {asked_text(requirements.min_agreement)} of the classes proved unchanged")
    if requirements.max_displacement is not None:
        phrases.append(f"every answer proved to move by at most {number(requirements.max_displacement)}")
    if requirements.min_accuracy is not None:
        phrases.append(f"an accuracy of at least {asked_text(requirements.min_accuracy)}")
    if requirements.max_bytes is not None:
        phrases.append(f"at most {requirements.max_bytes:,} bytes")
    return ", ".join(phrases[:-1]) + (" and " if len(phrases) > 1 else "") + phrases[-1] if phrases else ""


@dataclass(frozen=True)
class Ask:
    """A requirement beside what a version has on the validation split, both in words."""

    what: str
    asked: str
    found: str
    kept: bool


def asks(requirements: Requirements, evidence: Evidence) -> list[Ask]:
    """What was asked, and what one version has of it."""
    found, missed = evidence.findings, requirements.unmet(evidence.findings)
    rows = [("certified", "Margin", "above 0", f"At least {at_least(found.margin)}")]
    if requirements.min_agreement is not None:
        asked = f"at least {asked_text(requirements.min_agreement)}"
        rows.append(("min_agreement", "Classes proved unchanged", asked, percent_at_least(found.agreement)))
    if requirements.max_displacement is not None:
        asked = f"at most {number(requirements.max_displacement)}"
        rows.append(("max_displacement", "Movement, largest proved bound", asked, at_most(found.displacement)))
    if requirements.min_accuracy is not None:
        asked = f"at least {asked_text(requirements.min_accuracy)}"
        rows.append(("min_accuracy", "Accuracy, measured", asked, percent(found.accuracy)))
    if requirements.max_bytes is not None:
        asked = f"at most {requirements.max_bytes:,}"
        rows.append(("max_bytes", "Bytes", asked, f"{found.size_bytes:,}"))
    return [Ask(what, asked, text, field not in missed) for field, what, asked, text in rows]


def proved(rung: Rung, evidence: Evidence) -> list[tuple[str, str]]:
    """What is proved about a certified rung: (lead, rest) of each sentence."""
    proof = evidence.certificate
    lines = [
        (
            "One answer for every input.",
            f"The margin of the stored codes is at least {at_least(rung.margin)}, so the equilibrium exists and is"
            " unique, whatever the input.",
        )
    ]
    if rung.steps is not None:
        tolerance = 1 / proof.tolerance
        lines.append(
            (
                "Reached at a known pace.",
                f"Its solver comes {tolerance:,.0f} times closer to that answer within {rung.steps:,} steps, from"
                " any start.",
            )
        )
    bound = proof.displacement
    if bound is not None and len(bound) and rung.displacement_bound_mean is not None:
        lines.append(
            (
                "Close to the float network.",
                f"None of the {len(bound):,} test answers moved by more than {at_most(float(bound.max()), 3)};"
                f" on average the proved bound is {at_most(rung.displacement_bound_mean, 3)}.",
            )
        )
    if rung.agreement is not None:
        lines.append(
            (
                "The same class.",
                f"For {percent_at_least(rung.agreement)} of the test inputs the predicted class cannot differ from the"
                " float network's.",
            )
        )
    return lines


def measured(ladder: Ladder, rung: Rung) -> list[tuple[str, str]]:
    """What was measured on the test split, and proves nothing about other inputs."""
    lines = []
    if rung.accuracy is not None:
        float_accuracy = ladder.subject.accuracy if ladder.subject else None
        beside = f"; the float network has {percent(float_accuracy)}" if float_accuracy is not None else ""
        lines.append(("Accuracy.", f"{percent(rung.accuracy)} of the classes are right{beside}."))
    if rung.displacement_mean is not None:
        moved = number(rung.displacement_mean, 3)
        times = ""
        if rung.displacement_bound_mean and rung.displacement_mean:
            times = f", {rung.displacement_bound_mean / rung.displacement_mean:.1f} times less than the proved bound"
        lines.append(("Movement.", f"On average the answers moved by {moved}{times}."))
    return lines
