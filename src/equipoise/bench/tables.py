"""The ratios of a run as one table: on a terminal, and in Markdown with the machine named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich.table import Table

from .._atomic import check_output, replacing
from ..errors import FileFormatError
from .rows import DASH, ratio_text

__all__ = ["WIDE", "check_page", "markdown", "ratios", "write_page"]

HEADINGS = ("what", "ours", "peer or limit", "ratio", "target", "met")
WIDE = 150
"""Columns of the table where nobody is looking."""

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
"""What stands between these lines of a page is replaced."""


def ratios(result: dict[str, Any]) -> Table:
    """One row a figure, a section a part."""
    table = Table(title="ratios of one run", caption=_conditions(result), caption_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading == "ratio" else "left")
    for rows in result["rows"].values():
        for row in rows:
            table.add_row(*_cells(row))
        table.add_section()
    return table


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if row["why"] is not None:
        return row["what"], DASH, f"not measured: {row['why']}", DASH, "", ""
    met = {None: "", True: "yes", False: "no"}[row["met"]]
    return row["what"], row["ours"], row["peer"], ratio_text(row["ratio"]), row["target"], met


def _conditions(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        f"{machine['date']}: {machine['processor']}, {machine['cores']} cores, PyTorch on {machine['threads']}; float32"
        f" on the CPU unless said otherwise. equipoise {result['equipoise']}, torch {machine['torch']}, Python"
        f" {machine['python']}, {machine['system']}. Inputs: {result['data']}."
    ]
    lines += ["--quick: less of everything, so some ratios are of smaller batches."] if result["quick"] else []
    return "\n".join((*lines, *result["notes"]))


def markdown(result: dict[str, Any]) -> str:
    """The table with what it was measured on above it."""
    lines = [_conditions(result).replace("\n", "\n\n"), "", _line(HEADINGS), "|---|---|---|--:|---|---|"]
    lines += [_line(_cells(row)) for rows in result["rows"].values() for row in rows]
    return "\n".join(lines)


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def check_page(path: Path) -> str:
    """The text around the figures of the page at ``path``, so that one knows before the work whether it can be written.

    Raises:
        FileFormatError: a file without a place for them.
        OutputError: no file can be written there.
    """
    if not check_output(path, force=True).exists():
        return f"{BEGIN}\n{END}\n"
    try:
        page = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"cannot read {path}: {error}") from error
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise FileFormatError(f"{path} has no lines {BEGIN} and {END} between which figures belong; name a new file")
    return page


def write_page(path: Path, result: dict[str, Any]) -> None:
    """Write the figures to a new file, or into the place for them in the one that is there.

    Raises:
        FileFormatError: a file without a place for them.
        OutputError: it cannot be written.
    """
    between = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    page = between.sub(lambda _: f"{BEGIN}\n{markdown(result)}\n{END}", check_page(path))
    with replacing(path, force=True) as file:
        file.write(page.encode())
