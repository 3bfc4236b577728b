"""Fenced blocks of a Markdown page, and running them: in order, in one empty folder.

``python`` is executed; all such blocks of a page share one namespace. ``console`` holds ``$ equipoise ...`` and
``$ cc ...`` lines, each of which must exit 0; where there is no C compiler the latter are left out. ``text`` is only
read.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ ((?:equipoise|cc)(?: .*)?)$")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, and the line of the file where the text starts."""

    language: str
    text: str
    line: int


def blocks(markdown: str) -> list[Block]:
    """The fenced blocks of a Markdown text, in order."""
    return [
        Block(match[1], match[2], markdown.count("\n", 0, match.start(2)) + 1) for match in FENCE.finditer(markdown)
    ]


def check_fences(markdown: str) -> set[str]:
    """The languages of the blocks; fails where a fence is not closed or not recognised."""
    found = blocks(markdown)
    fences = sum(line.startswith("```") for line in markdown.splitlines())
    assert fences == 2 * len(found), "a fence is not closed or not recognised"
    return {block.language for block in found}


def commands(block: Block) -> list[str]:
    """The command lines of a console block; a backslash at the end continues a line."""
    lines = [line for line in block.text.replace("\\\n", " ").splitlines() if line.strip()]
    matches = [COMMAND.match(line) for line in lines]
    assert all(matches), (
        f"line {block.line}: a console block holds only lines `$ equipoise ...` or `$ cc ...`, got {lines}"
    )
    return [match[1] for match in matches if match]


def run_command(command: str, folder: Path) -> None:
    """Run one ``equipoise ...`` or ``cc ...`` line as a shell would, in ``folder``."""
    arguments = shlex.split(command)
    if arguments[0] == "equipoise":
        arguments[:0] = [sys.executable, "-m"]
    elif shutil.which(arguments[0]) is None:
        return
    run = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, f"`{command}` exited {run.returncode}\n{run.stdout}\n{run.stderr}"


def run_blocks(found: list[Block], folder: Path, page: Path) -> dict[str, object]:
    """Run all blocks of ``page`` in order, ``folder`` being the working directory; return the Python namespace."""
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in found:
        if block.language == "python":
            # The blank lines make a traceback name the page's own line.
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)
        elif block.language == "console":
            for command in commands(block):
                run_command(command, folder)
    return namespace
