"""The pages of docs/ keep their word: their code runs, and what they name exists."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

import equipoise as eq
from equipoise.cli.common import app
from equipoise.operators import schemes
from equipoise.reproduce.li2026 import published
from equipoise.solvers import SOLVERS
from markdown_blocks import Block, blocks, check_fences, run_blocks

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
COMMANDS_NOT_RUN = {
    "published.md": "the released checkpoint and all of MNIST, a quarter of an hour",
    "robustness.md": "MNIST, several minutes of training on boxes",
    "training.md": "MNIST and CIFAR-10, hours",
}
"""Pages whose commands are read by the program's parser and not run, and why."""
COMPILED = {"export.md"}
"""Pages whose Python loads a program that was compiled."""

Resolved = Any


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def lines_of_commands(block: Block) -> list[str]:
    """The lines of a block that call ``equipoise``, with or without a prompt, comments left out."""
    lines = (line.removeprefix("$ ") for line in block.text.replace("\\\n", " ").splitlines())
    return [line for line in lines if line.startswith("equipoise ")]


def parse(line: str) -> None:
    """Read one command line as the program does, and stop before it runs."""
    program: Any = typer.main.get_command(app)
    _, name, *arguments = shlex.split(line, comments=True)
    assert name in program.commands, f"`{line}`: no command {name}"
    try:
        program.commands[name].make_context(name, arguments)
    except Exception as error:  # the parser's own errors have had several homes
        pytest.fail(f"`{line}`: {error}")


def resolve(name: str) -> Resolved:
    """The object that a dotted name stands for: modules as far as they go, then attributes."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[count:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_of_a_kind_that_is_known(page: Path) -> None:
    assert check_fences(page.read_text(encoding="utf-8")) <= {"python", "console", "text", "c"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_is_one_that_the_program_reads(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        for line in lines_of_commands(block):
            parse(line)


@pytest.mark.parametrize("line", ["equipoise no-such-command", "equipoise train --no-such-option 1"])
def test_a_command_that_the_program_does_not_read_is_seen(line: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        parse(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name in COMPILED and eq.runtime.compiler() is None:
        pytest.skip("no C compiler: CC, cc, gcc, clang")
    monkeypatch.chdir(tmp_path)
    found = blocks(page.read_text(encoding="utf-8"))
    run = [block for block in found if block.language != "console" or page.name not in COMMANDS_NOT_RUN]
    run_blocks(run, tmp_path, page)


def test_pages_whose_commands_are_not_run_have_some() -> None:
    for name in COMMANDS_NOT_RUN:
        assert any(lines_of_commands(block) for block in blocks(text(name))), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_in_pages_exist(page: Path) -> None:
    for name in re.findall(r"`(equipoise(?:\.\w+)+)(?:\([^`]*\))?`", page.read_text(encoding="utf-8")):
        resolve(name)
    for name in re.findall(r"`eq\.(\w+)[^`]*`", page.read_text(encoding="utf-8")):
        assert name in eq.__all__, f"{page.name}: eq.{name} is not public"


def test_a_name_that_does_not_exist_is_seen() -> None:
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        resolve("equipoise.verified.no_such_function")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_theorem_has_its_section_and_its_function() -> None:
    rows = [line for line in text("theorems.md").splitlines() if line.startswith("| ") and "§" in line]
    sections = set(re.findall(r"^## (\d+)\.", text("theory.md"), re.MULTILINE))
    assert len(rows) > 40
    named = set()
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 3, row
        section = re.fullmatch(r"\[theory §(\d+)\]\(theory\.md\)", cells[1])
        assert section, row
        assert section[1] in sections, row
        assert re.search(r"`equipoise\.\w+", cells[2]), row
        named.add(section[1])
    assert named == sections, "a section of the theory has no row"


def sections_cited(found: Resolved) -> set[int]:
    """The sections of the theory that an object's docstring cites, or its class's or module's."""
    module = inspect.getmodule(found)
    owner = getattr(module, getattr(found, "__qualname__", "").split(".")[0], None)
    words = " ".join(filter(None, (inspect.getdoc(each) for each in (found, owner, module))))
    cited: set[int] = set()
    for run in re.findall(r"[Tt]heory\s+((?:§\d+(?:–\d+)?(?:, | and )?)+)", words):
        for first, last in re.findall(r"§(\d+)(?:–(\d+))?", run):
            cited |= set(range(int(first), int(last or first) + 1))
    return cited


def test_functions_that_theorems_name_cite_their_section() -> None:
    rows = re.findall(r"\[theory §(\d+)\]\(theory\.md\) \| (.*)", text("theorems.md"))
    named = [(int(section), name) for section, cell in rows for name in re.findall(r"`(equipoise(?:\.\w+)+)`", cell)]
    assert len(named) > 60
    assert [(section, name) for section, name in named if section not in sections_cited(resolve(name))] == []


def test_public_functions_cite_the_theory() -> None:
    no_formula = {"convert", "load", "pgd", "save", "size"}
    functions = {name for name in eq.__all__ if inspect.isfunction(getattr(eq, name))}
    assert {name for name in functions if not re.search(r"[Tt]heory §", getattr(eq, name).__doc__)} == no_formula


def test_fields_that_theorems_name_are_fields() -> None:
    found = re.findall(r"fields (`\w+`(?: and `\w+`)*) of `(equipoise\.\w+)`", text("theorems.md"))
    assert found
    for names, owner in found:
        fields = {field.name for field in dataclasses.fields(resolve(owner))}
        assert set(re.findall(r"\w+", names)) - {"and"} <= fields


def test_every_solver_and_scheme_is_in_the_table_of_algorithms() -> None:
    first = set(re.findall(r"^\| `(\w+)` \|", text("algorithms.md"), re.MULTILINE))
    kinds = {*SOLVERS, *(kind.__name__ for kind in schemes().values())}
    assert first == kinds


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_sources_are_spelled_out_in_the_theory(page: Path) -> None:
    known = set(re.findall(r"^- \*\*\[(\w+)\]\*\*", text("theory.md"), re.MULTILINE))
    groups = re.findall(r"\[([A-Z][A-Za-z]*\d\d(?:, [A-Z][A-Za-z]*\d\d)*)\]", page.read_text(encoding="utf-8"))
    assert {key for group in groups for key in group.split(", ")} <= known


def test_published_figures_are_those_that_the_reproduction_compares_with() -> None:
    page = text("published.md")
    figures = [f"{100 * published.ACCURACY:.2f} %"]
    figures += [f"{100 * rung['accuracy']:.2f} %, {rung['margin']:.3f}" for rung in published.QAT.values()]  # type: ignore[operator]
    figures.append(", ".join(f"{100 * published.CHECK[bits]['share']:.1f}" for bits in sorted(published.CHECK)) + " %")
    assert [figure for figure in figures if figure not in page] == []
