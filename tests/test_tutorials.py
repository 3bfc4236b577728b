"""Tutorials run, keep their assertions, and print what their pages show but for the numbers."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

from equipoise import runtime

SITE = Path(__file__).resolve().parents[1] / "docs" / "_site"
TUTORIALS = sorted((SITE.parent / "tutorials").glob("*.py"))
COMPILED = {"4_microcontroller"}
FINDING = re.compile(r"[-−]?\d+(\.\d+)?(e[-+]?\d+)?|certified|converged|diverged|holds|fails")
"""What differs between machines: numbers, and what hangs on them."""


def load(name: str) -> ModuleType:
    """A module of docs/_site."""
    spec = importlib.util.spec_from_file_location(name, SITE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(importlib.import_module("sys").modules, name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
    return module


cells = load("cells")


def shape(lines: tuple[str, ...]) -> list[str]:
    return [re.sub(r"\s+", " ", FINDING.sub("#", line)) for line in lines]


def test_there_are_tutorials() -> None:
    assert len(TUTORIALS) >= 4


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs_and_prints_what_it_shows(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.stem in COMPILED and runtime.compiler() is None:
        pytest.skip("no C compiler: CC, cc, gcc, clang")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for cell, printed in cells.run(path):
        assert shape(printed) == shape(cell.printed), f"line {cell.line}: write it anew with docs/_site/cells.py {path}"


def test_a_script_becomes_text_code_and_what_it_prints(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("# %% [markdown]\n# # A\n#\n# b [c](2_d.py)\n\n# %%\nprint(1 + 1)\n", encoding="utf-8")
    cells.record(path)
    assert path.read_text(encoding="utf-8").endswith("# %%\nprint(1 + 1)\n#: 2\n")
    assert cells.page(path).startswith("# A\n\nb [c](2_d.md)\n\n```python\nprint(1 + 1)\n```\n\n```text\n2\n```\n")
    recorded = path.read_text(encoding="utf-8")
    cells.record(path)
    assert path.read_text(encoding="utf-8") == recorded


def test_what_a_tutorial_no_longer_prints_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("# %%\nprint('margin', 0.2)\n#: margin 0.3\n\n# %%\nprint('x')\n#: y\n", encoding="utf-8")
    alike = [shape(printed) == shape(cell.printed) for cell, printed in cells.run(path)]
    assert alike == [True, False]
