"""The ladder and other results in the terminal, and a bar while one waits for them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..ladder import Ladder, Rung
from .words import MISSING, at_least, at_most, headline, number, percent, percent_at_least, summary

__all__ = ["ladder_table", "ladder_words", "pairs_table", "rendered", "waiting"]

STYLES = {"certified": "green", "converged": "yellow", "diverged": "red", "unknown": "yellow"}
WIDTH = 79
"""Columns where nobody is looking: pipes and files."""


def rendered(item: RenderableType, width: int = WIDTH) -> str:
    """``item`` as text for stdout, coloured where stdout is a terminal that shows colours, else ``width`` wide."""
    console = Console(width=None if sys.stdout.isatty() else width, highlight=False)
    with console.capture() as captured:
        console.print(item)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def ladder_words(ladder: Ladder) -> Text:
    """Headline and summary, and what could not be made."""
    return Text("\n".join((headline(ladder), summary(ladder), *ladder.notes)))


def ladder_table(ladder: Ladder) -> Table:
    """One row per rung, in 79 columns; the chosen one is bold and has an arrow."""
    caption = (
        "≥, ≤: proved. steps: until the error is 1e-6 of what it was. kept: inputs of the "
        "same class as float. moved: mean ‖z* − z̃*‖. right: accuracy. Packed bytes."
    )
    if any(rung.mixed for rung in ladder.rungs):
        caption += "\n4/5/6/8/–: bits of A/K/U/b/head in a structured version, – for floats."
    table = Table(
        box=SIMPLE_HEAD, show_edge=False, padding=0, caption=caption, caption_justify="left", caption_style="dim"
    )
    wide = max((len(rung.scheme) for rung in ladder.rungs), default=len("float"))
    # One column for both: the bits of a mixed rung need the room of both.
    for heading in (
        f"{'scheme':<{wide + 2}} bits",
        "bytes",
        "verdict",
        "margin ≥",
        "steps≤",
        "kept≥",
        "moved≤",
        "moved",
        "right",
    ):
        justify: JustifyMethod = "left" if heading.startswith(("scheme", "verdict")) else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    subject = ladder.subject
    if subject is not None:
        certified = subject.margin is not None and subject.margin > 0
        verdict = Text("certified", STYLES["certified"]) if certified else Text(MISSING)
        figures: list[str | Text] = [
            _count(subject.size_bytes),
            verdict,
            at_least(subject.margin),
            _count(subject.steps),
        ]
        figures += [MISSING] * 3
        table.add_row("  float", *figures, percent(subject.accuracy), end_section=True)
    for index, rung in enumerate(ladder.rungs):
        chosen = index == ladder.chosen
        first = index == 0 or _group(ladder.rungs[index - 1]) != _group(rung)
        last = index + 1 == len(ladder.rungs) or _group(ladder.rungs[index + 1]) != _group(rung)
        name = f"{'→' if chosen else ' '} {_name(rung, first or chosen, wide)}"
        table.add_row(name, *_cells(rung), style="bold" if chosen else None, end_section=last)
    return table


def _group(rung: Rung) -> tuple[str, bool]:
    return rung.scheme, rung.mixed


def _name(rung: Rung, named: bool, wide: int) -> str:
    """The scheme, where it is to be named, and its bits; of a mixed rung the bits of every part."""
    if rung.mixed:
        return str(rung.parts).replace("float", MISSING)
    return f"{rung.scheme if named else '':<{wide}} {rung.bits:>4}"


def _cells(rung: Rung) -> list[str | Text]:
    return [
        _count(rung.size_bytes),
        Text(rung.verdict, STYLES[rung.verdict]),
        at_least(rung.margin),
        _count(rung.steps),
        percent_at_least(rung.agreement),
        at_most(rung.displacement_bound_mean, 3),
        number(rung.displacement_mean, 3),
        percent(rung.accuracy),
    ]


def _count(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"


def pairs_table(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values, one pair a line."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in rows:
        table.add_row(name, value)
    return table


@contextlib.contextmanager
def waiting(text: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr while the block runs, gone afterwards; only where stderr is a terminal.

    Yields a function of (steps done, steps in all, what comes next); until it is called the bar pulses.
    """
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=None)

        def tell(done: int, total: int, following: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{text}: {following}")

        yield tell
