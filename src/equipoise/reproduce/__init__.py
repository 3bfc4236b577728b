"""Published experiments, run again: one command a paper, its figures beside ours."""

from typing import Any

from . import li2026
from .run import Outcome, Paper, Settings, run

__all__ = ["PAPERS", "Outcome", "Paper", "Settings", "run"]

PAPERS: dict[str, Paper[Any]] = {paper.name: paper for paper in (li2026.PAPER,)}
"""By the name that the command line takes; a new paper registers here."""
