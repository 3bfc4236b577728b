"""What a release says of itself in several places is the same in all of them. The archives: tests/dist_smoke.py."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIRED = sorted({*PROJECT["dependencies"], *(each for extra in EXTRAS.values() for each in extra)})


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def bare(requirement: str) -> str:
    """The name that is required, as archives spell it."""
    return re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-")


def test_changelog_and_citation_are_of_this_version() -> None:
    version, date = re.search(r"^## \[(\d[^]]*)\] - (\d{4}-\d\d-\d\d)$", text("CHANGELOG.md"), re.MULTILINE).groups()
    assert version == PROJECT["version"]
    cited = dict(re.findall(r'^([a-z-]+): "?([^"\n]+)"?$', text("CITATION.cff"), re.MULTILINE))
    assert (cited["version"], cited["date-released"]) == (version, date)
    assert cited["license"] == PROJECT["license"]


def test_papers_that_theory_rests_on_are_cited() -> None:
    literature = text("docs/theory.md").partition("## References")[2]
    titles = re.findall(r"^- \*\*\[\w+\]\*\* .*? \*([^*]+?)\.\*", literature, re.MULTILINE)
    assert len(titles) >= 10
    cited = text("CITATION.cff").lower()
    assert not [title for title in titles if title.lower() not in cited]


@pytest.mark.parametrize("requirement", REQUIRED)
def test_a_dependency_has_a_lower_bound_and_a_tested_version(requirement: str) -> None:
    assert ">=" in requirement
    pinned = {bare(line) for line in text("constraints.txt").splitlines() if "==" in line}
    # ray and dask are in no environment of the Makefile
    assert bare(requirement) in pinned or requirement in EXTRAS["cluster"]


@pytest.mark.parametrize("name", sorted({*EXTRAS, *(bare(each) for each in REQUIRED)}))
def test_the_page_says_what_a_dependency_is_for(name: str) -> None:
    page = text("docs/install.md")
    plugin_or_own_tool = name.startswith("pytest-")  # "pytest and plugins"
    assert f"`{name}`" in page or plugin_or_own_tool


def test_tested_pythons_are_the_ones_that_are_claimed() -> None:
    claimed = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)}
    assert claimed == set(re.findall(r"3\.\d+", text("docs/install.md").split("\n")[2]))
    assert claimed == set(re.findall(r"python(3\.\d+)", text("Makefile").partition("test-dist:")[2]))
