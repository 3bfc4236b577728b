"""What a user waits for: the demo from start to end, and the import of the package beside that of torch."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from .measure import Tracker, interleave, median
from .network import Setting
from .rows import Row, Target, at_most_times, time_text

__all__ = ["measure", "rows", "tables"]

DEMO_LIMIT, IMPORT_LIMIT = 60.0, 0.3


def measure(setting: Setting, tell: Tracker) -> dict[str, Any]:
    """Wall seconds, each in processes of their own; the files were read before, so none waits for the disk."""
    tell("imports")
    imports = {name: lambda name=name: _python("-c", f"import {name}") for name in ("torch", "equipoise")}
    times = interleave(imports, 3 if setting.quick else 5)
    tell("the demo")
    with tempfile.TemporaryDirectory() as scratch:
        begin = time.perf_counter()
        _python("-m", "equipoise", "demo", "--out", str(Path(scratch) / "demo"))
        demo = time.perf_counter() - begin
    return {"demo_seconds": demo, "import_seconds": {name: median(taken) for name, taken in times.items()}}


def _python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def rows(found: dict[str, Any]) -> list[Row]:
    """The ratios."""
    ours, torch = found["import_seconds"]["equipoise"], found["import_seconds"]["torch"]
    within = Target(f"≤ {IMPORT_LIMIT:g} s beyond it", lambda _: ours - torch <= IMPORT_LIMIT)
    demo = found["demo_seconds"]
    return [
        Row.timed("equipoise demo, from start to end", demo, DEMO_LIMIT, "limit", demo / DEMO_LIMIT, at_most_times(1)),
        Row.timed("import equipoise", ours, torch, "import torch", ours / torch, within),
    ]


def tables(found: dict[str, Any]) -> list[Table]:
    """All that was measured."""
    table = Table(title="commands", show_header=False)
    table.add_row("equipoise demo", time_text(found["demo_seconds"]))
    for name, seconds in found["import_seconds"].items():
        table.add_row(f"import {name}", time_text(seconds))
    return [table]
