"""Published experiments, run again: one command a paper, its figures beside ours."""

from typing import Any

from . import jafarpour2021, li2026, sato2026, winston2020
from .run import Outcome, Paper, Settings, run

__all__ = ["PAPERS", "Outcome", "Paper", "Settings", "run"]

_ALL: tuple[Paper[Any], ...] = (li2026.PAPER, jafarpour2021.PAPER, winston2020.PAPER, sato2026.PAPER)

PAPERS: dict[str, Paper[Any]] = {paper.name: paper for paper in _ALL}
"""By the name that the command line takes; a new paper registers here."""
