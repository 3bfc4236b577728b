"""The command that runs a paper's experiments again: reproduce."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import DataDir, Force, Json, flag, option, say, say_json

if TYPE_CHECKING:
    from rich.table import Table

    from ..reproduce import Outcome

__all__ = ["register"]


class PaperName(enum.StrEnum):
    li2026 = "li2026"
    jafarpour2021 = "jafarpour2021"
    winston2020 = "winston2020"
    sato2026 = "sato2026"


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(reproduce)


def reproduce(
    paper: Annotated[
        PaperName,
        typer.Argument(metavar="PAPER", help="li2026, jafarpour2021, winston2020 or sato2026.", show_default=False),
    ],
    checkpoint: Annotated[
        Path | None,
        option("A float model file, or the paper's released checkpoint; if not given, a network is trained."),
    ] = None,
    quick: Annotated[bool, flag("Less training and fewer samples: minutes.", "--quick")] = False,
    out: Annotated[Path | None, option("The folder to write; default the paper's name.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of the order of samples.")] = 0,
    data_dir: DataDir = None,
    force: Force = False,
    as_json: Json = False,
) -> int:
    """Run a paper's experiments again, and write its figures beside ours.

    li2026, jafarpour2021 and winston2020 need MNIST, sato2026 CIFAR-10. A run that was stopped goes on.
    """
    from ..data import load_data
    from ..report.terminal import rendered, waiting
    from ..reproduce import PAPERS, Settings, run

    settings = Settings(checkpoint, quick, seed)
    chosen = PAPERS[paper]
    with waiting("reproducing") as tell:
        outcome = run(chosen, settings, load_data(chosen.data, data_dir), out or Path(paper), force, tell)
    files = {"report": str(outcome.report), "results": str(outcome.results)}
    if as_json:
        rows = [vars(row) for row in outcome.reproduction.comparisons]
        say_json({"paper": paper, "quick": quick, "seed": seed, **files, "comparisons": rows})
        return 0
    say(rendered(_table(outcome)), end="")
    say(outcome.reproduction.summary)
    for purpose, path in files.items():  # whole, whatever the width
        say(f"{purpose:<8} {path}")
    return 0


def _table(outcome: Outcome) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for heading in ("published", "ours", "difference"):
        table.add_column(heading, justify="right", overflow="fold")
    for section in outcome.reproduction.sections:
        for row in section.comparisons:
            last = row is section.comparisons[-1]
            table.add_row(row.what, row.published, row.ours, row.difference, end_section=last)
    return table
