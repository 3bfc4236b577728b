"""The README keeps its word: its Python and console blocks run, in order, in one empty folder.

Three kinds of fenced block are allowed. ``python`` is executed; all such blocks share one namespace.
``console`` holds ``$ equipoise ...`` lines, each of which must exit 0. ``text`` is only read.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ (equipoise(?: .*)?)$")


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


def commands(block: Block) -> list[str]:
    """The command lines of a console block; a backslash at the end continues a line."""
    lines = [line for line in block.text.replace("\\\n", " ").splitlines() if line.strip()]
    matches = [COMMAND.match(line) for line in lines]
    assert all(matches), f"line {block.line}: a console block holds only lines `$ equipoise ...`, got {lines}"
    return [match[1] for match in matches if match]


def run_command(command: str, folder: Path) -> None:
    """Run one ``equipoise ...`` line as a shell would, in ``folder``."""
    arguments = [sys.executable, "-m", *shlex.split(command)]
    run = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, f"`{command}` exited {run.returncode}\n{run.stdout}\n{run.stderr}"


def run_blocks(found: list[Block], folder: Path) -> dict[str, object]:
    """Run all blocks in order with ``folder`` as the working directory; return the Python namespace."""
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in found:
        if block.language == "python":
            # The blank lines make a traceback name the README's own line.
            exec(compile("\n" * (block.line - 1) + block.text, str(README), "exec"), namespace)
        elif block.language == "console":
            for command in commands(block):
                run_command(command, folder)
    return namespace


def test_every_block_is_of_a_kind_that_is_checked_or_plainly_text() -> None:
    found = blocks(README.read_text(encoding="utf-8"))
    languages = {block.language for block in found}
    assert languages <= {"python", "console", "text"}
    assert {"python", "console"} <= languages, "the README shows neither Python nor commands any more"
    fences = sum(line.startswith("```") for line in README.read_text(encoding="utf-8").splitlines())
    assert fences == 2 * len(found), "a fence in the README is not closed or not recognised"


def test_readme_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = run_blocks(blocks(README.read_text(encoding="utf-8")), tmp_path)
    assert "eq" in namespace


def test_files_that_the_readme_points_to_exist() -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []


@pytest.mark.parametrize(
    "markdown",
    [
        "```python\nraise SystemError\n```\n",
        "```python\nx = 1\n```\ntext\n```python\nassert x == 2\n```\n",
        "```console\n$ rm -rf somewhere\n```\n",
        "```console\nequipoise --help\n```\n",
        "```console\n$ equipoise no-such-command\n```\n",
    ],
)
def test_a_broken_block_is_seen(markdown: str, tmp_path: Path) -> None:
    found = blocks(markdown)
    assert found
    with pytest.raises((SystemError, AssertionError)):
        run_blocks(found, tmp_path)


def test_blocks_share_a_namespace_and_keep_their_line_numbers(tmp_path: Path) -> None:
    found = blocks("a\n\n```python\nx = 1\n```\nb\n```python\ny = x + 1\n```\n")
    assert [block.line for block in found] == [4, 8]
    assert run_blocks(found, tmp_path)["y"] == 2


def test_a_continued_command_is_one_command() -> None:
    found = commands(Block("console", "$ equipoise a \\\n  --b 1\n$ equipoise c\n", 1))
    assert [shlex.split(command) for command in found] == [["equipoise", "a", "--b", "1"], ["equipoise", "c"]]
