"""What a reproduction says: published figures beside ours, tables, figures and sentences. No numbers are made here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..report.canvas import Figure
from ..report.words import MISSING

__all__ = [
    "COUNT",
    "PERCENT",
    "Comparison",
    "Form",
    "Reproduction",
    "Section",
    "Table",
    "compared",
    "decimals",
    "power",
]


@dataclass(frozen=True)
class Form:
    """How a kind of number is written: ``write`` it, and ``subtract`` two of it, in words."""

    write: Callable[[float], str]
    subtract: Callable[[float], str]


def _signed(text: str) -> str:
    """``+`` or ``−`` before a number that is not 0 as written."""
    bare = text.lstrip("-")
    if not bare.strip("0.,"):
        return bare
    return f"−{bare}" if text.startswith("-") else f"+{bare}"


PERCENT = Form(
    lambda share: f"{100 * share:.2f} %",
    lambda gap: f"{_signed(f'{100 * gap:.2f}')} points",
)
"""Shares in [0, 1], to the hundredth of a percent that papers print."""

COUNT = Form(lambda count: f"{count:,.0f}", lambda gap: _signed(f"{gap:,.0f}"))


def decimals(places: int) -> Form:
    """Numbers with so many digits after the point."""
    return Form(lambda value: f"{value:.{places}f}".replace("-", "−"), lambda gap: _signed(f"{gap:.{places}f}"))


def power(value: float, places: int = 1) -> str:
    """``value`` as 1.2e−5, whatever its size."""
    mantissa, exponent = f"{value:.{places}e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


@dataclass(frozen=True)
class Comparison:
    """One row of published | ours | difference, all in words, with a sentence on the difference."""

    what: str
    published: str
    ours: str
    difference: str
    why: str
    source: str = ""


def compared(
    what: str,
    published: float | str | None,
    ours: float | None,
    form: Form,
    same: float,
    why: str,
    source: str = "",
) -> Comparison:
    """The row for two numbers; where they are within ``same`` of each other ``why`` gives way to saying so.

    ``published`` may be words where the paper has no number. ``same`` is what the paper's own rounding leaves open.
    """
    shown = MISSING if ours is None or not math.isfinite(ours) else form.write(ours)
    if not isinstance(published, int | float):
        return Comparison(what, published or MISSING, shown, MISSING, why, source)
    if shown == MISSING or ours is None:
        return Comparison(what, form.write(published), MISSING, MISSING, why, source)
    gap = ours - published
    agrees = abs(gap) <= same * (1 + 1e-9)
    text = "The same to the digits published." if agrees else why
    return Comparison(what, form.write(published), shown, form.subtract(gap), text, source)


@dataclass(frozen=True)
class Table:
    """A table of words; the first column names the row."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One experiment on the page: what was done, what was found, and what differs from the paper."""

    key: str
    title: str
    setting: str
    findings: tuple[str, ...]
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    comparisons: tuple[Comparison, ...] = ()


@dataclass(frozen=True)
class Reproduction:
    """A paper's experiments, run again: everything that its page shows."""

    name: str
    title: str
    citation: str
    headline: str
    summary: str
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    limits: tuple[str, ...] = ()
    arithmetic: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Every row of published | ours | difference, in the order of the sections."""
        return tuple(row for section in self.sections for row in section.comparisons)
