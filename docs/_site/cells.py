"""Tutorials: scripts in percent format (``# %%``), run by the tests and shown as pages.

A cell that begins with ``# %% [markdown]`` is text, every other one code. What a code cell prints stands below its
code in lines that begin with ``#:``; ``python docs/_site/cells.py FILE...`` runs the files and writes it anew.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT = "#:"


@dataclass(frozen=True)
class Cell:
    """One cell: Markdown or code, its text, what it printed when it was recorded, and the line where it starts."""

    markdown: bool
    text: str
    printed: tuple[str, ...]
    line: int


def cells(path: Path) -> list[Cell]:
    """The cells of a script; what stands before the first marker belongs to none."""
    found = []
    parts = _parts(path)
    line = parts[0].count("\n") + 1
    for marker, body in zip(parts[1::2], parts[2::2], strict=True):
        lines = body.splitlines()
        if "[markdown]" in marker:
            text = "\n".join(re.sub(r"^# ?", "", each) for each in lines)
            found.append(Cell(True, text.strip(), (), line + 1))
        else:
            printed = tuple(each[len(OUT) :].removeprefix(" ") for each in lines if each.startswith(OUT))
            text = "\n".join(each for each in lines if not each.startswith(OUT))
            found.append(Cell(False, text.rstrip(), printed, line + 1))
        line += 1 + body.count("\n")
    return found


def page(path: Path) -> str:
    """The script as Markdown."""
    parts = []
    for cell in cells(path):
        if cell.markdown:
            parts.append(re.sub(r"\]\((\w+)\.py\)", r"](\1.md)", cell.text))  # other tutorials
        else:
            parts.append(f"```python\n{cell.text.strip()}\n```")
            if cell.printed:
                parts.append("```text\n" + "\n".join(cell.printed) + "\n```")
    parts.append(f"*This page is a script, run by the tests: [{path.name}]({path.name}).*")
    return "\n\n".join(parts) + "\n"


def run(path: Path) -> list[tuple[Cell, tuple[str, ...]]]:
    """Run the code cells in order in one namespace; each with the lines it printed."""
    namespace: dict[str, Any] = {"__name__": "tutorial"}
    found = []
    for cell in cells(path):
        if cell.markdown:
            continue
        heard = io.StringIO()
        with contextlib.redirect_stdout(heard):
            exec(compile("\n" * (cell.line - 1) + cell.text, str(path), "exec"), namespace)
        found.append((cell, tuple(line.rstrip() for line in heard.getvalue().rstrip().splitlines())))
    return found


def record(path: Path) -> None:
    """Run the script and write what its cells print below them; nothing else is touched."""
    printed = {cell.line: lines for cell, lines in run(path)}
    parts = _parts(path)
    written, line = [parts[0]], parts[0].count("\n") + 1
    for marker, body in zip(parts[1::2], parts[2::2], strict=True):
        if line + 1 in printed:
            kept = "".join(each for each in body.splitlines(keepends=True) if not each.startswith(OUT))
            shown = "".join(f"{OUT} {each}".rstrip() + "\n" for each in printed[line + 1])
            end = kept[len(kept.rstrip()) :].removeprefix("\n")
            written += [marker, "\n", kept.rstrip(), "\n", shown, end]
        else:
            written += [marker, "\n", body]
        line += 1 + body.count("\n")
    path.write_text("".join(written), encoding="utf-8")


def _parts(path: Path) -> list[str]:
    """What stands before the first marker, then markers and what follows them in turn."""
    return re.split(r"^(# %%.*)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        record(Path(name))
