"""Run a paper's experiments one after the other, keep each result, and write the page.

A paper is a list of experiments and a way to write them up (:class:`Paper`); everything else is here, once.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from .._atomic import check_output
from .._machines import one_thread
from ..data import Data
from ..errors import DataNotFoundError, OptionError, OutputError
from .journal import Journal
from .page import write_page
from .record import Reproduction

__all__ = ["UNFINISHED", "Bench", "Experiment", "Outcome", "Paper", "Settings", "run"]

B = TypeVar("B")
UNFINISHED = "unfinished"
"""The folder beside the results for what an experiment has half done; gone when the run is finished."""

Tell = Callable[[int, int, str], None]
"""Told (experiments done, experiments in all, what comes next)."""


@dataclass(frozen=True)
class Settings:
    """What a run depends on. ``quick``: less of everything that takes long, as the page says."""

    checkpoint: Path | None = None
    quick: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise OptionError(f"seed={self.seed!r}: give an integer from 0 to {2**32 - 1}")
        if self.checkpoint is not None and not self.checkpoint.is_file():
            raise DataNotFoundError(f"no checkpoint {self.checkpoint}: name a model file, or leave it out to train one")

    def to_dict(self, data: str) -> dict[str, Any]:
        """Plain values that tell two runs apart: the checkpoint by its content, wherever it lies."""
        content = None if self.checkpoint is None else hashlib.sha256(self.checkpoint.read_bytes()).hexdigest()
        return {"checkpoint": content, "quick": self.quick, "seed": self.seed, "data": data}


@dataclass(frozen=True)
class Bench:
    """What every experiment of a paper works on, where it needs no more."""

    settings: Settings
    data: Data
    folder: Path


@dataclass(frozen=True)
class Experiment(Generic[B]):
    """``run`` turns a paper's bench into a frozen dataclass ``kind`` of plain values, kept under ``key``."""

    key: str
    label: str
    kind: type[Any]
    run: Callable[[B], Any]


@dataclass(frozen=True)
class Paper(Generic[B]):
    """A paper's experiments.

    ``begin(settings, data, folder)`` quickly makes what they all work on, and raises where an input is of no use;
    ``folder`` is theirs for files, and ``folder/unfinished`` for those that a stopped run goes on from.
    ``write_up(bench, results)`` turns the results by key into what the page shows.
    """

    name: str
    data: str
    begin: Callable[[Settings, Data, Path], B]
    experiments: tuple[Experiment[B], ...]
    write_up: Callable[[B, Mapping[str, Any]], Reproduction]


@dataclass(frozen=True)
class Outcome:
    """What a run wrote, and what its page shows."""

    reproduction: Reproduction
    report: Path
    results: Path


def run(
    paper: Paper[Any],
    settings: Settings,
    data: Data,
    out: str | Path,
    force: bool = False,
    tell: Tell = lambda done, total, following: None,
) -> Outcome:
    """Run every experiment of ``paper`` that ``out`` does not hold yet, and write ``out/report.html``.

    ``out/results.json`` is written anew after each experiment, so that a run which was killed goes on where it was.

    Raises:
        OutputError: ``out`` cannot be written, or holds a finished run, or other files, and ``force`` is False.
        OptionError: ``out`` holds an unfinished run of other settings.
    """
    with one_thread():
        return _run(paper, settings, data, _folder(Path(out), force), force, tell)


def _run(paper: Paper[Any], settings: Settings, data: Data, folder: Path, force: bool, tell: Tell) -> Outcome:
    report, results = folder / "report.html", folder / "results.json"
    settled = {"paper": paper.name, **settings.to_dict(data.name)}
    bench = paper.begin(settings, data, folder)
    folder.mkdir(exist_ok=True)
    check_output(report, force or results.exists())
    if force:
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    journal = Journal(results, settled, fresh=force)
    total = len(paper.experiments) + 1
    found = {}
    for done, experiment in enumerate(paper.experiments):
        tell(done, total, experiment.label)
        if experiment.key not in journal:
            began = time.monotonic()
            journal.put(experiment.key, experiment.run(bench), time.monotonic() - began)
        # Also what was computed just now is read back, so that a run in two parts writes the same page.
        found[experiment.key] = journal.get(experiment.key, experiment.kind)
    tell(total - 1, total, "the report")
    reproduction = paper.write_up(bench, found)
    rows = [vars(row) for row in reproduction.comparisons]
    write_page(reproduction, report, force=True)
    journal.finish({"comparisons": rows})
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    return Outcome(reproduction, report, results)


def _folder(target: Path, force: bool) -> Path:
    """``target`` if it is, or can become, a folder for this: known before the work and not after."""
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is not a folder: name another with --out")
    if not target.exists():
        return Path(check_output(target, force=True))
    if target.is_dir() and any(target.iterdir()) and not (target / "results.json").exists() and not force:
        raise OutputError(f"{target} is not empty: pass force=True (--force) to write into it, or name another folder")
    check_output(target / "results.json", force=True)
    return target
