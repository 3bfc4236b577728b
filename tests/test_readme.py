"""The README keeps its word: its Python and console blocks run, in order, in one empty folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from markdown_blocks import Block, blocks, check_fences, commands, run_blocks

README = Path(__file__).resolve().parents[1] / "README.md"


def test_every_block_is_of_a_kind_that_is_checked_or_plainly_text() -> None:
    languages = check_fences(README.read_text(encoding="utf-8"))
    assert languages <= {"python", "console", "text"}
    assert {"python", "console"} <= languages, "the README shows neither Python nor commands any more"


def test_readme_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = run_blocks(blocks(README.read_text(encoding="utf-8")), tmp_path, README)
    assert "eq" in namespace


def test_files_that_the_readme_points_to_exist() -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []


@pytest.mark.parametrize("page", [README, README.parent / "docs" / "index.md"], ids=lambda page: page.name)
def test_every_page_and_tutorial_is_linked(page: Path) -> None:
    docs = README.parent / "docs"
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    linked = {(page.parent / link).resolve() for link in links} | {page.resolve()}
    assert {path.resolve() for path in (*docs.glob("*.md"), *docs.glob("tutorials/*.py"))} <= linked | {
        docs / "index.md"
    }


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
        run_blocks(found, tmp_path, README)


def test_blocks_share_a_namespace_and_keep_their_line_numbers(tmp_path: Path) -> None:
    found = blocks("a\n\n```python\nx = 1\n```\nb\n```python\ny = x + 1\n```\n")
    assert [block.line for block in found] == [4, 8]
    assert run_blocks(found, tmp_path, README)["y"] == 2


def test_a_continued_command_is_one_command() -> None:
    found = commands(Block("console", "$ equipoise a \\\n  --b 1\n$ equipoise c\n", 1))
    assert [shlex.split(command) for command in found] == [["equipoise", "a", "--b", "1"], ["equipoise", "c"]]
