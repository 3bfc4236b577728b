"""What all reproductions share: rows of figures, the journal, the runner, the page, and the command."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import equipoise as eq
from command_line import Capsys, run_json
from command_line import run as command
from equipoise import reproduce
from equipoise._codecs.values import restored
from equipoise.data import Data, load_data
from equipoise.errors import DataNotFoundError, FileFormatError, InputError, OptionError, OutputError
from equipoise.presets import classifier
from equipoise.reproduce import Outcome, Paper, Settings, run
from equipoise.reproduce.journal import Journal
from equipoise.reproduce.li2026 import PAPER
from equipoise.reproduce.page import page
from equipoise.reproduce.record import (
    COUNT,
    PERCENT,
    Comparison,
    Reproduction,
    Section,
    Table,
    compared,
    decimals,
    power,
)
from equipoise.reproduce.run import Experiment
from test_report import Page

# Rows


@pytest.mark.parametrize(
    ("published", "ours", "form", "same", "shown"),
    [
        (0.9822, 0.9825, PERCENT, 5e-5, ("98.22 %", "98.25 %", "+0.03 points")),
        (0.9678, 0.9601, PERCENT, 5e-5, ("96.78 %", "96.01 %", "−0.77 points")),
        (-0.142, -0.1423, decimals(3), 5e-4, ("−0.142", "−0.142", "0.000")),
        (458, 1730, COUNT, 0, ("458", "1,730", "+1,272")),
        ("near the cap", 1730, COUNT, 0, ("near the cap", "1,730", "–")),
        (0.5, None, PERCENT, 0, ("50.00 %", "–", "–")),
        (None, 0.25, PERCENT, 0, ("–", "25.00 %", "–")),
        (0.5, float("nan"), PERCENT, 0, ("50.00 %", "–", "–")),
    ],
)
def test_a_row_shows_both_figures_and_their_difference(
    published: float | str | None, ours: float | None, form: Any, same: float, shown: tuple[str, ...]
) -> None:
    row = compared("it", published, ours, form, same, "a reason")
    assert (row.published, row.ours, row.difference) == shown
    agrees = isinstance(published, float) and ours is not None and abs(ours - published) <= same
    assert row.why == ("The same to the digits published." if agrees else "a reason")


def test_a_difference_just_above_what_rounding_leaves_open_is_one() -> None:
    assert compared("m", 0.207, 0.20751, decimals(3), 5e-4, "a reason").why == "a reason"
    assert compared("m", 0.207, 0.20749, decimals(3), 5e-4, "a reason").why != "a reason"


def test_powers_are_written_with_a_minus_sign() -> None:
    assert [power(1.26e-5), power(3e-11, 0), power(123.0)] == ["1.3e−5", "3e−11", "1.2e2"]


# The journal


@dataclass(frozen=True)
class Inner:
    name: str
    value: float | None


@dataclass(frozen=True)
class Outer:
    count: int
    parts: tuple[Inner, ...]
    last: Inner | None
    curve: tuple[float, ...]


RESULT = Outer(2, (Inner("a", 0.1), Inner("b", None)), None, (1.0, 1e-300, 0.1 + 0.2))


def test_results_come_back_from_json_as_they_were() -> None:
    for result in (RESULT, dataclasses.replace(RESULT, parts=(), last=Inner("c", -0.0))):
        assert restored(Outer, json.loads(json.dumps(dataclasses.asdict(result)))) == result


@pytest.mark.parametrize("damage", [{"count": 1}, {"parts": [{"name": "a"}]}, {"extra": 1}])
def test_results_with_other_fields_are_refused(damage: dict[str, Any]) -> None:
    value = dataclasses.asdict(RESULT)
    changed = {"count": 1} if damage == {"count": 1} else {**value, **damage}
    with pytest.raises((ValueError, TypeError)):
        restored(Outer, changed)


def test_a_journal_keeps_what_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    Journal(path, {"seed": 0}).put("first", RESULT, 1.5)
    again = Journal(path, {"seed": 0})
    assert "first" in again
    assert "second" not in again
    assert again.get("first", Outer) == RESULT
    assert again.to_dict()["seconds"] == {"first": 1.5}


def test_a_journal_of_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    Journal(path, {"seed": 0, "quick": False}).put("first", RESULT, 1.0)
    with pytest.raises(OptionError, match="quick=False, not True"):
        Journal(path, {"seed": 0, "quick": True})
    fresh = Journal(path, {"seed": 0, "quick": True}, fresh=True)
    assert "first" not in fresh


def test_a_finished_journal_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    Journal(path, {"seed": 0}).finish({"comparisons": []})
    assert json.loads(path.read_text())["complete"] is True
    with pytest.raises(OutputError, match="finished"):
        Journal(path, {"seed": 0})


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 99, "complete": false}', "\x00\xff"])
def test_a_damaged_journal_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(FileFormatError, match="--force"):
        Journal(path, {})
    assert "first" not in Journal(path, {}, fresh=True)


def test_a_result_that_does_not_fit_its_kind_is_damage(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "results.json", {})
    journal.put("first", Inner("a", 1.0), 0.0)
    with pytest.raises(FileFormatError, match="first is damaged"):
        journal.get("first", Outer)


# The runner


class Bench:
    """Counts what is computed; ``fails`` breaks one experiment off."""

    fails = ""
    calls: list[str]

    def __init__(self) -> None:
        self.calls = []

    def compute(self, key: str) -> Inner:
        if key == self.fails:
            raise KeyboardInterrupt
        self.calls.append(key)
        return Inner(key, float(len(key)))


def toy(bench: Bench) -> Paper[Bench]:
    def write_up(bench: Bench, results: Mapping[str, Any]) -> Reproduction:
        rows = tuple(
            Comparison(f"<{key}>", "1", f"{found.value:g}", "–", "why & how") for key, found in results.items()
        )
        table = Table("All", ("Name", "Value"), (("a", "1"), ("b", "2")), "A note.")
        section = Section("only", "Only", "How.", ("What.",), tables=(table,), comparisons=rows)
        return Reproduction(
            "toy", "Toy", "Somebody, 2026.", "Done.", "All.", (("Fact", "1"),), (section,), data={"a": 1}
        )

    experiments = tuple(
        Experiment[Bench](key, key, Inner, lambda bench, key=key: bench.compute(key)) for key in ("one", "two", "three")
    )
    return Paper("toy", "digits", lambda settings, data, folder: bench, experiments, write_up)


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


def run_toy(bench: Bench, digits: Data, out: Path, **options: Any) -> Outcome:
    settings = Settings(seed=options.pop("seed", 0), quick=options.pop("quick", False))
    return run(toy(bench), settings, digits, out, **options)


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path, digits: Data) -> None:
    whole = run_toy(Bench(), digits, tmp_path / "whole")
    broken, bench = tmp_path / "broken", Bench()
    bench.fails = "three"
    with pytest.raises(KeyboardInterrupt):
        run_toy(bench, digits, broken)
    assert not (broken / "report.html").exists()
    second, told = Bench(), []
    result = run_toy(second, digits, broken, tell=lambda done, total, label: told.append((done, total, label)))
    assert bench.calls == ["one", "two"]
    assert second.calls == ["three"]
    assert result.report.read_text() == whole.report.read_text()
    assert told == [(0, 4, "one"), (1, 4, "two"), (2, 4, "three"), (3, 4, "the report")]
    assert sorted(path.name for path in broken.iterdir()) == ["report.html", "results.json"]


def test_the_results_say_what_the_page_says(tmp_path: Path, digits: Data) -> None:
    outcome = run_toy(Bench(), digits, tmp_path / "out")
    found = json.loads(outcome.results.read_text(), parse_constant=pytest.fail)
    assert found["complete"] is True
    assert found["results"]["three"] == {"name": "three", "value": 5.0}
    assert [row["what"] for row in found["comparisons"]] == ["<one>", "<two>", "<three>"]
    assert found["settings"] == {"paper": "toy", "checkpoint": None, "quick": False, "seed": 0, "data": "digits"}


def test_the_page_is_whole_and_takes_words_as_words(tmp_path: Path, digits: Data) -> None:
    outcome = run_toy(Bench(), digits, tmp_path / "out")
    read = Page(outcome.report.read_text())  # every element closed in order
    for words in ("<one>", "why & how", "A note.", "Somebody, 2026.", "Done."):
        assert words in read.text
    assert json.loads(read.data["results"]) == {"a": 1}
    links = [link for link in read.values("href") + read.values("src") if not link.startswith(("#", "data:"))]
    assert links == []
    assert page(outcome.reproduction) == outcome.report.read_text()


def test_a_finished_run_is_replaced_only_when_asked(tmp_path: Path, digits: Data) -> None:
    out = tmp_path / "out"
    run_toy(Bench(), digits, out)
    before = (out / "report.html").read_bytes()
    with pytest.raises(OutputError, match="finished"):
        run_toy(Bench(), digits, out)
    assert (out / "report.html").read_bytes() == before
    bench = Bench()
    (out / "unfinished").mkdir()
    (out / "mine.safetensors").write_text("mine")
    run_toy(bench, digits, out, force=True)
    assert bench.calls == ["one", "two", "three"]
    assert sorted(path.name for path in out.iterdir()) == ["mine.safetensors", "report.html", "results.json"]


def test_other_settings_do_not_go_on_with_a_stopped_run(tmp_path: Path, digits: Data) -> None:
    bench = Bench()
    bench.fails = "two"
    with pytest.raises(KeyboardInterrupt):
        run_toy(bench, digits, tmp_path / "out")
    with pytest.raises(OptionError, match="seed=0, not 1"):
        run_toy(Bench(), digits, tmp_path / "out", seed=1)


def test_foreign_folders_are_left_alone(tmp_path: Path, digits: Data) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        run_toy(Bench(), digits, tmp_path / "mine")
    with pytest.raises(OutputError, match="not a folder"):
        run_toy(Bench(), digits, tmp_path / "mine" / "notes.txt")
    with pytest.raises(OutputError, match="does not exist"):
        run_toy(Bench(), digits, tmp_path / "no" / "such")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_threads_are_given_back(tmp_path: Path, digits: Data) -> None:
    before = torch.get_num_threads()
    bench = Bench()
    bench.fails = "one"
    with pytest.raises(KeyboardInterrupt):
        run_toy(bench, digits, tmp_path / "out")
    assert torch.get_num_threads() == before


# Settings and the command


@pytest.mark.parametrize("seed", [-1, 1.5, True, 2**32])
def test_a_bad_seed_is_refused(seed: Any) -> None:
    with pytest.raises(OptionError, match="seed"):
        Settings(seed=seed)


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"nothing\.safetensors"):
        Settings(checkpoint=tmp_path / "nothing.safetensors")


def save(model: nn.Module, path: Path) -> Path:
    eq.save(model, path)
    return path


def test_networks_that_the_paper_is_not_about_are_refused(tmp_path: Path, digits: Data) -> None:
    torch.manual_seed(0)
    good = classifier(digits, 12, rank=3).eval()
    W = 0.3 * torch.eye(12)
    plain = eq.MonDEQ.from_weights(W, torch.randn(12, 64), torch.zeros(12))
    tanh = nn.Sequential(eq.MonDEQ(64, 12, activation="tanh"), nn.Linear(12, 10))
    cases = [
        (eq.quantize(good, eq.Structured(bits=2)), InputError, "float network"),
        (nn.Sequential(plain, nn.Linear(12, 10)), InputError, "structure"),
        (tanh, InputError, "ReLU"),
        (eq.MonDEQ(64, 12), InputError, "Linear head"),
        (nn.Sequential(eq.MonDEQ(5, 12), nn.Linear(12, 10)), InputError, "5 features"),
        (nn.Sequential(eq.MonDEQ(64, 12), nn.Linear(12, 3)), InputError, "3 outputs"),
    ]
    for number, (model, kind, words) in enumerate(cases):
        path = save(model.eval(), tmp_path / f"{number}.safetensors")
        with pytest.raises(kind, match=words):
            run(PAPER, Settings(path), digits, tmp_path / "out")
    noise = tmp_path / "noise.pt"
    noise.write_bytes(b"\x80\x02nothing")
    with pytest.raises(FileFormatError, match="equipoise import"):
        run(PAPER, Settings(noise), digits, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_and_says_what_it_found(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(reproduce.PAPERS, "li2026", toy(Bench()))
    found = run_json(capsys, "reproduce", "li2026", "--out", tmp_path / "a", "--seed", 3)
    assert [row["ours"] for row in found["comparisons"]] == ["3", "3", "5"]
    assert (found["seed"], found["quick"]) == (3, False)
    assert Path(found["report"]).read_text().startswith("<!DOCTYPE html>")
    status, out, error = command(capsys, "reproduce", "li2026", "--out", tmp_path / "b", "--quick")
    assert status == 0
    assert error == ""
    assert "<three>" in out
    assert "results.json" in out
    status, _, error = command(capsys, "reproduce", "li2026", "--out", tmp_path / "b", "--quick")
    assert status == 2
    assert "--force" in error
    assert command(capsys, "reproduce", "li2026", "--out", tmp_path / "b", "--quick", "--force")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nobody2026",), "li2026"),
        (("li2026", "--checkpoint", "/no/such/file"), "no checkpoint"),
        (("li2026", "--seed", "-1"), "seed"),
        (("li2026", "--data-dir", "/no/such/folder"), "--data-dir"),
        ((), "PAPER"),
    ],
)
def test_bad_use_of_the_command(
    arguments: tuple[str, ...], words: str, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, error = command(capsys, "reproduce", *arguments)
    assert status == 2
    assert out == ""
    assert words in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
