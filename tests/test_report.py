"""The report: one page that stands alone, says what is true, and rounds bounds to the safe side."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.data import Data, Split
from equipoise.errors import MissingExtraError, OutputError
from equipoise.ladder import Ladder, Requirements, Rung
from equipoise.plan import build_ladder
from equipoise.report import render, write_report
from equipoise.report.terminal import ladder_table, ladder_words, rendered
from equipoise.report.words import at_least, at_most, bits_text, bytes_text, number, percent_at_least
from test_plan import small_data, small_model

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that every element is closed in order; collects text, attributes and the data in the page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.data: dict[str, str] = {}
        self.script = ""
        self.feed(source)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.script = dict(attrs).get("id") or "" if tag == "script" else self.script
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.data[self.script] = self.data.get(self.script, "") + data
        elif self.open[-1:] != ["style"]:
            self.words.append(data)

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


@pytest.fixture(scope="module")
def ladder() -> Ladder:
    torch.manual_seed(1)
    asked = Requirements(min_agreement=0.5, max_displacement=100.0, min_accuracy=0.0, max_bytes=10_000)
    return build_ladder(small_model(), small_data(), bits=(8, 4, 2, 1), requirements=asked)


@pytest.fixture(scope="module")
def page(ladder: Ladder) -> Page:
    return Page(render(ladder, "a title & more"))


def test_the_page_needs_no_network(ladder: Ladder) -> None:
    source = render(ladder)
    assert not re.search(r"https?:|//[a-z]|@import|@font-face|\bsrc=|fetch\(|XMLHttp|\bimport\b", source)
    links = re.findall(r'(?:href|url)\s*[=(]\s*"?([^")\s>]+)', source)
    assert links
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert source.count("<script") == 3  # two of data, one of code
    assert "default-src 'none'" in source
    assert len(source.encode()) < 2_000_000


def test_identifiers_are_unique_and_every_reference_finds_its_own(page: Page) -> None:
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    wanted = [part for value in page.values("aria-labelledby") for part in value.split()]
    wanted += page.values("for")
    assert wanted
    assert set(wanted) <= set(ids)


def test_every_picture_has_words_for_those_who_cannot_see_it(page: Page) -> None:
    pictures = page.values("role").count("img")
    assert pictures == 4
    assert sum(value.endswith("-d") for value in page.values("id")) == pictures


def test_colours_are_those_of_the_page(ladder: Ladder) -> None:
    source = render(ladder)
    used = set(re.findall(r"var\(--(\w+)", source)) - {"picked"}  # which is one of the others
    assert {"structured", "assembled", "ink", "bad"} <= used
    for name in used:
        assert len(re.findall(rf"--{name}:", source)) == 2, f"--{name} needs a light and a dark value"


def test_the_page_carries_the_ladder_as_json(ladder: Ladder, page: Page) -> None:
    assert json.loads(page.data["ladder"]) == ladder.to_dict()


def test_the_headline_names_the_chosen_version_and_what_is_proved(ladder: Ladder, page: Page) -> None:
    assert ladder.chosen is not None
    rung = ladder.rungs[ladder.chosen]
    assert f"{rung.scheme.capitalize()} at {bits_text(rung.bits)} keeps the guarantee" in page.text
    assert f"at least {at_least(rung.margin)}" in page.text
    assert f"within {rung.steps} steps" in page.text
    assert f"{percent_at_least(rung.agreement)} of the test inputs" in page.text
    assert "a title & more" in page.text


def test_every_rung_is_in_the_table_with_its_verdict(ladder: Ladder, page: Page) -> None:
    for rung in ladder.rungs:
        start = page.text.index(f"{rung.scheme.capitalize()} ", page.text.index("Every version"))
        row = re.search(rf"\b{bits_text(rung.bits)} (chosen )?{rung.size_bytes:,} (\w+) (\S+)", page.text[start:])
        assert row is not None
        assert row[2] == rung.verdict
        assert row[3] == at_least(rung.margin)


def test_the_same_ladder_gives_the_same_page(ladder: Ladder) -> None:
    assert render(ladder) == render(ladder)


def test_a_title_is_text_and_not_markup(ladder: Ladder) -> None:
    assert "<script>alert" not in render(ladder, "<script>alert(1)</script>")


def test_no_word_in_the_data_ends_their_script(ladder: Ladder) -> None:
    odd = dataclasses.replace(ladder.rungs[0], scheme="</script><b>")
    source = render(dataclasses.replace(ladder, rungs=(odd, *ladder.rungs[1:])))
    assert "</script><b>" not in source
    assert json.loads(Page(source).data["frames"])["groups"][0]["scheme"] == "</script><b>"


def test_a_report_that_exists_stays_unless_forced(ladder: Ladder, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    assert write_report(ladder, target) == target
    assert target.read_text(encoding="utf-8") == render(ladder)
    target.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        write_report(ladder, target)
    assert target.read_text() == "mine"
    write_report(ladder, target, force=True)
    with pytest.raises(OutputError, match="does not exist"):
        write_report(ladder, tmp_path / "no" / "report.html")


def test_a_missing_library_is_named_with_its_extra(ladder: Ladder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    render(ladder)  # which the page is drawn without
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'equipoise\[report\]'"):
        render(ladder)


# Ladders of other shapes


def test_without_a_choice_the_page_says_so_and_why(ladder: Ladder) -> None:
    asked = Requirements(min_agreement=1.0, max_bytes=1)
    text = Page(render(dataclasses.replace(ladder, chosen=None, requirements=asked))).text
    assert "No version keeps everything that was asked." in text
    assert "at least 100 % of the classes proved unchanged and at most 1 bytes" in text.replace("\xa0", " ")
    assert "What is proved about it" not in text


def test_notes_on_what_was_not_made_are_shown(ladder: Ladder) -> None:
    notes = ("compensated, 1 bit: not made; <found 0.01>",)
    assert notes[0] in Page(render(dataclasses.replace(ladder, notes=notes))).text.replace("\xa0", " ")


@pytest.mark.parametrize("count", [0, 1])
def test_a_ladder_of_no_rung_or_one_is_drawn(ladder: Ladder, count: int) -> None:
    short = dataclasses.replace(
        ladder,
        rungs=ladder.rungs[:count],
        evidence=ladder.evidence[:count],
        chosen=0 if count else None,
        requirements=Requirements(),
    )
    text, table = Page(render(short)).text, rendered(ladder_table(short))
    assert ("Assembled" in text) == ("assembled" in table) == bool(count)
    assert "structured" not in table


def test_rungs_without_figures_and_of_unknown_schemes_are_drawn() -> None:
    bare = Rung("newscheme", 4, None, 10, None, "diverged", None, None, None, None, None, None)
    text = Page(render(Ladder((bare,), None, Requirements()))).text
    assert "Newscheme" in text
    assert "some of the given inputs did not settle" in text


def test_many_samples_are_thinned_and_the_caption_says_so() -> None:
    data = small_data()
    many = Split(torch.randn(900, 6), torch.zeros(900, dtype=torch.int64))
    wide = Data("wide", data.train, data.validation, many, data.preprocessing, data.classes)
    source = render(build_ladder(small_model(), wide, ["structured"], [8, 4]))
    assert "one test input (every third of 900)" in Page(source).text
    assert len(source) < 400_000


def test_a_sample_that_moved_further_than_its_bound_would_be_told(ladder: Ladder) -> None:
    chosen = ladder.chosen
    assert chosen is not None
    assert "No input moved further than proved." in Page(render(ladder)).text
    proof = ladder.evidence[chosen].certificate
    assert proof.displacement is not None
    lied = dataclasses.replace(proof, actual_displacement=proof.displacement * 2)
    evidence = list(ladder.evidence)
    evidence[chosen] = dataclasses.replace(evidence[chosen], certificate=lied)
    text = Page(render(dataclasses.replace(ladder, evidence=tuple(evidence)))).text
    assert f"{len(proof.displacement)} inputs moved further than proved." in text


# The terminal


def test_the_terminal_shows_every_rung_in_79_columns(ladder: Ladder) -> None:
    text = rendered(ladder_table(ladder))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 79
    assert sum("certified" in line or "converged" in line or "diverged" in line for line in lines) == 17
    assert sum(line.startswith("→") for line in lines) == 1
    assert "keeps the guarantee" in rendered(ladder_words(ladder))


# Rounding


@given(st.floats(-1e9, 1e9), st.integers(1, 8))
def test_bounds_are_rounded_to_the_safe_side(value: float, digits: int) -> None:
    def read(text: str) -> float:
        return float(text.replace("−", "-").replace(",", ""))

    low, near, high = (read(show(value, digits)) for show in (at_least, number, at_most))
    assert low <= value <= high
    assert low <= near <= high
    assert high - low <= 1.01 * max(abs(value) * 10.0 ** (1 - digits), 1e-300) or high - low == 1


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100.0 %"), (0.9999, "99.9 %"), (0.93, "93.0 %"), (0.0, "0.0 %"), (None, "–")]
)
def test_a_proved_share_is_never_rounded_up(share: float | None, text: str) -> None:
    assert percent_at_least(share) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(12, "12 bytes"), (9252, "9.25 kB"), (999_999, "1,000 kB"), (368_044, "368 kB"), (2_500_000, "2.5 MB")],
)
def test_sizes_are_short_and_never_in_powers_of_ten(count: int, text: str) -> None:
    assert bytes_text(count) == text
