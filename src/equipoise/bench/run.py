"""The benchmark as a whole: ``equipoise bench``. Every ratio is of one run, in which the competitors took turns."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from ..errors import EquipoiseError, OptionError
from . import commands, images, scale, ship, solve, train
from .measure import Progress, Tracker, bar, machine
from .network import Setting, checkpoint_network
from .network import images as pictures
from .rows import Row, not_measured

__all__ = ["PARTS", "Part", "run", "tables"]


class Part(NamedTuple):
    """What it is about, how it is measured, and what of it goes into which table."""

    about: str
    measure: Callable[[Setting, Tracker], dict[str, Any]]
    rows: Callable[[dict[str, Any]], list[Row]]
    tables: Callable[[dict[str, Any]], list[Table]]


PARTS: dict[str, Part] = {
    "solve": Part("solvers", solve.measure, solve.rows, solve.tables),
    "train": Part("training steps", train.measure, train.rows, train.tables),
    "images": Part("convolutions and multiscale networks", images.measure, images.rows, images.tables),
    "certify": Part("certificates", scale.measure, scale.rows, scale.tables),
    "export": Part("exported programs", ship.measure, ship.rows, ship.tables),
    "commands": Part("commands", commands.measure, commands.rows, commands.tables),
}


def run(
    parts: Iterable[str] = (),
    checkpoint: str | Path | None = None,
    data_dir: str | Path | None = None,
    quick: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure; the result is plain values, as JSON has them: ``rows`` by part, and in ``parts`` all that was measured.

    Args:
        parts: of :data:`PARTS`; default all.
        checkpoint: a checkpoint of mondeq-quant for 784 features, whose solves are timed as well.
        data_dir: a folder with MNIST and CIFAR-10 (else the one that ``EQUIPOISE_DATA`` names, else digits).
        quick: less of everything.
        progress: told how far it is; default a bar on stderr, which redraws only between measurements.

    What cannot be measured here, for want of a library or of a compiler, is a row that says why.

    Raises:
        OptionError: no such part.
        DataNotFoundError, FileFormatError: the named files are not there, or something else.
        InputError: the checkpoint takes another number of features.
    """
    wanted = list(dict.fromkeys(parts)) or list(PARTS)
    for name in wanted:
        if name not in PARTS:
            raise OptionError(f"no part {name!r} of the benchmark; there are {', '.join(PARTS)}")
    data, notes = pictures(data_dir)
    given = None if checkpoint is None else checkpoint_network(checkpoint, data)  # first, since it may be refused
    setting = Setting(quick, data, data_dir, given)
    result: dict[str, Any] = {
        "equipoise": version("equipoise"),
        "machine": machine(),
        "quick": quick,
        "data": data.name,
        "rows": {},
        "parts": {},
        "notes": notes,
    }
    with contextlib.nullcontext(progress) if progress is not None else bar() as tell:
        for number, name in enumerate(wanted, start=1):
            tracker = Tracker(tell, f"{number} of {len(wanted)}, {PARTS[name].about}")
            found, rows = _measured(PARTS[name], setting, tracker)
            tracker.finish()
            result["parts"][name] = found
            result["rows"][name] = [row.to_dict() for row in rows]
            notes += [note for note in (found or {}).get("notes", []) if note not in notes]
    return result


def _measured(part: Part, setting: Setting, tell: Tracker) -> tuple[dict[str, Any] | None, list[Row]]:
    """A part's figures and its rows. One that fails does not take the others, which took minutes, with it."""
    try:
        found = part.measure(setting, tell)
    except (EquipoiseError, OSError, subprocess.SubprocessError, RuntimeError, MemoryError) as error:
        return None, [not_measured(part.about, error)]
    return found, part.rows(found)


def tables(result: dict[str, Any]) -> list[Table]:
    """All that was measured, part by part."""
    return [
        table for name, found in result["parts"].items() if found is not None for table in PARTS[name].tables(found)
    ]
