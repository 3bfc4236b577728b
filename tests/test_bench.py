"""The benchmark measures what it says it does: at toy sizes, and without a look at any time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from equipoise.bench import (
    commands,
    peers,
    run,
    scale,
    ship,
    solve,
    step,
    tables,
    train,
)
from equipoise.bench.contenders import OURS, RACING, REFERENCE
from equipoise.bench.rows import LESS, Row, at_least_times, at_most_times, not_measured
from equipoise.cli import main
from equipoise.errors import FileFormatError, OptionError
from equipoise.runtime import compiler

TORCHDEQ = ["fixed_point_iter", "anderson", "broyden"]


class Told:
    """A progress callback that remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, str]] = []

    def __call__(self, done: int, total: int, text: str) -> None:
        self.calls.append((done, total, text))


@pytest.fixture(scope="module")
def told() -> Told:
    return Told()


@pytest.fixture(scope="module")
def result(told: Told) -> dict[str, Any]:
    """All parts but images, once, on the digits; the demo, which has tests of its own, is not run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("EQUIPOISE_DATA", raising=False)
        sizes = solve.Sizes(batches=((1, 2), (12, 1)), rounds=2, sgemm=64, warm_up_steps=12)
        patch.setattr(solve, "QUICK", sizes)
        patch.setattr(train, "QUICK", train.Sizes(warm_up=12, steps=3, rounds=1, probes=2))
        patch.setattr(step, "SETTLING", 2)
        patch.setattr(step, "TRIALS", 1)
        patch.setattr(ship, "ROUNDS", 1)
        patch.setattr(scale, "QUICK", (8,))
        patch.setattr(commands, "_python", lambda *_: None)
        return run.run([name for name in run.PARTS if name != "images"], quick=True, progress=told)


# The whole run


def test_the_result_is_plain_json(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result["rows"]) == set(result["parts"]) == set(run.PARTS) - {"images"}
    assert result["machine"]["threads"] == torch.get_num_threads()
    assert any("digits" in note for note in result["notes"])


def test_every_solver_of_ours_reaches_the_goal_at_every_batch(result: dict[str, Any]) -> None:
    assert result["parts"]["solve"]["goal"] == 1e-4
    (found,) = result["parts"]["solve"]["networks"]
    assert [(r["batch"], r["solves"]) for r in found["races"]] == [(1, 2), (12, 1)]
    for entry in found["races"]:
        ours = [row for row in entry["contenders"] if row["family"] == OURS]
        assert {row["name"] for row in ours} == {*RACING, f"{REFERENCE}, layer(x)"}
        for row in ours:
            assert row["reached"], row
            assert 0 <= row["worst_error"] <= 1e-4, row
            assert row["setting"] in row["tried"], row
            assert row["seconds"] > 0, row
        assert [row["ratio"] for row in ours if row["name"] == REFERENCE] == [1.0]


def test_the_peers_run_beside_them(result: dict[str, Any]) -> None:
    pytest.importorskip("torchdeq")
    for entry in result["parts"]["solve"]["networks"][0]["races"]:
        theirs = {row["name"]: row for row in entry["contenders"] if row["family"] == peers.FAMILY}
        assert list(theirs) == TORCHDEQ
        assert theirs["fixed_point_iter"]["reached"]
        reached = {name: row["ratio"] for name, row in theirs.items() if row["reached"]}
        assert entry["speedup"] == min(reached.values()) == reached[entry["fastest_peer"]]
        assert all(row["worst_error"] <= 1e-4 for row in theirs.values() if row["reached"])
        assert sum(row["family"] == "plain PyTorch" for row in entry["contenders"]) == 1


def test_the_share_of_the_products(result: dict[str, Any]) -> None:
    sgemm = result["parts"]["solve"]["networks"][0]["sgemm"]
    assert sgemm["size"] == 64
    assert sgemm["batch"] == 12
    assert sgemm["steps"] >= 2


def test_networks_train_beside_an_explicit_one(result: dict[str, Any]) -> None:
    found = result["parts"]["train"]
    assert [row["name"] for row in found["networks"]][:3] == ["explicit", "monDEQ", "NEMON"]
    assert {row["name"] for row in found["networks"]} >= {*train.SCHEMES, "loader"}
    for good in found["gradients"].values():
        assert good["error"] <= good["error_worst"]
        assert good["tol"] <= good["backward_tol"]
        assert good["reached"] == (good["error"] <= 1e-2)
    assert len(set(found["saved_bytes"].values())) == 1, "memory does not grow with steps"


def test_certificates_as_the_layer_grows(result: dict[str, Any]) -> None:
    (row,) = result["parts"]["certify"]["sizes"]
    assert row["features"] == 8
    for job in scale.JOBS:
        assert row[job]["seconds"] > 0
        assert row[job]["peak_megabytes"] >= row[job]["baseline_megabytes"] > 0
    assert row["certify"]["certified"]
    assert row["certify"]["computed_seconds"] > 0
    assert row["solve"]["converged"]
    assert result["parts"]["certify"]["boxes"]["images"] > 100


@pytest.mark.skipif(compiler() is None, reason="no C compiler")
def test_an_exported_program_beside_pytorch(result: dict[str, Any]) -> None:
    found = result["parts"]["export"]
    assert set(found["single"]["seconds"]) == {" ".join(flags) for flags in ship.FLAGS}
    assert all(seconds > 0 for seconds in found["single"]["seconds"].values())
    assert found["batch"]["ratio"] > 0


def test_progress_only_grows_and_every_part_ends(result: dict[str, Any], told: Told) -> None:
    for name in result["parts"]:
        about = run.PARTS[name].about
        calls = [(done, total) for done, total, text in told.calls if f", {about}: " in text]
        assert [done for done, _ in calls] == sorted(done for done, _ in calls)
        assert calls[-1][0] == calls[-1][1]


def test_the_tables_say_it_all(result: dict[str, Any]) -> None:
    text = drawn(*run.tables(result))
    for word in (*RACING, "torchdeq", "share of the sgemm rate", "explicit", "certify", "one image"):
        assert word in text, word


def test_a_row_a_ratio(result: dict[str, Any]) -> None:
    text = drawn(tables.ratios(result))
    for rows in result["rows"].values():
        assert rows
        for row in rows:
            assert row["why"] is not None or row["ratio"] is not None or row["target"] == "none", row
            assert row["what"] in text
    assert f"PyTorch on {result['machine']['threads']}" in text
    whole = result["rows"]["train"][-1]
    assert (whole["ratio"], whole["met"]) == (1.0, True)
    assert all(row["met"] is None for row in result["rows"]["solve"] if "batch 12" in row["what"]), (
        "toys have no target"
    )


def test_what_was_not_reached_or_failed_is_said(result: dict[str, Any]) -> None:
    other = json.loads(json.dumps(result))
    entry = other["parts"]["solve"]["networks"][0]["races"][0]
    entry["contenders"][1] |= {"reached": False, "worst_error": 3.2e-3, "seconds": None, "ratio": None}
    entry["contenders"][2] |= {"reached": False, "worst_error": None, "seconds": None, "ratio": None}
    entry |= {"speedup": None, "fastest_peer": None}
    other["parts"]["solve"]["networks"][0]["sgemm"] = None
    other["parts"]["solve"]["notes"] = ["no peers: pip install"]
    other["parts"]["certify"]["sizes"][0]["certify"] = {"failure": "ended by signal 9: out of memory?"}
    text = drawn(*run.tables(other))
    for word in ("not reached (3.2e-03)", "not reached (diverged)", "out of memory?"):
        assert word in text, word
    other["parts"]["certify"]["sizes"].append(
        {"features": 4096, "certify": {"seconds": 30.0, "computed_seconds": None, "peak_megabytes": 2100.0}}
    )
    assert [row.met for row in scale.rows(other["parts"]["certify"])][1:3] == [True, False]
    rows = solve.rows(other["parts"]["solve"]) + scale.rows(other["parts"]["certify"])
    assert {row.why for row in rows} == {None, "no peers: pip install", "ended by signal 9: out of memory?"}


def test_a_part_that_fails_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    monkeypatch.setattr(ship.runtime, "compiler", lambda: None)
    monkeypatch.setattr(commands, "_python", lambda *_: None)
    found = run.run(["export", "commands"], quick=True, progress=lambda *_: None)
    assert found["parts"]["export"] is None
    (row,) = found["rows"]["export"]
    assert "no C compiler" in row["why"]
    assert len(found["rows"]["commands"]) == 2
    assert "not measured: no C compiler" in drawn(tables.ratios(found))
    assert "not measured: no C compiler" in tables.markdown(found)


def test_a_part_that_is_none_is_refused() -> None:
    with pytest.raises(OptionError, match="no part 'speed'"):
        run.run(["speed"])


def test_rows_know_their_targets() -> None:
    assert Row.of("a", "1 s", "2 s", 2.0, at_least_times(2)).met is True
    assert Row.of("a", "1 s", "2 s", 1.9, at_least_times(2)).met is False
    assert Row.of("a", "1 s", "2 s", 2.1, at_most_times(2)).met is False
    assert Row.of("a", "1 s", "2 s", 2.0).met is None
    assert (Row.of("a", "1 s", "2 s", 2.0, LESS).target, Row.of("a", "1 s", "2 s", 2.0, LESS).met) == (LESS.text, None)
    timed = Row.timed("a", 2e-3, 4e-6, "b")
    assert (timed.ours, timed.peer, timed.ratio) == ("2.00 ms", "4.00 µs b", 2e-3)
    assert not_measured("a", "two\nlines").why == "two lines"


def test_a_page_keeps_its_words_and_gets_new_figures(tmp_path: Path, result: dict[str, Any]) -> None:
    page = tmp_path / "speed.md"
    tables.write_page(page, result)
    first = page.read_text()
    assert first.count("\n| ") == 1 + sum(map(len, result["rows"].values()))
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.write_page(page, result)
    assert page.read_text() == f"before\n{first}after\n"
    page.write_text("no place")
    with pytest.raises(FileFormatError, match="between which figures belong"):
        tables.check_page(page)
    assert page.read_text() == "no place"


def test_the_command_prints_the_table_and_writes_the_page(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(run, "run", lambda *given: asked.append(given) or result)
    page = tmp_path / "speed.md"
    assert main(["bench", "solve", "train", "--quick", "--markdown", str(page)]) == 0
    assert asked == [(["solve", "train"], None, None, True)]
    assert "ratios of one run" in capsys.readouterr().out
    assert tables.BEGIN in page.read_text()
    assert main(["bench", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result
    page.write_text("no place")
    assert main(["bench", "--markdown", str(page)]) == 2
    assert "no place" not in capsys.readouterr().out
    assert main(["bench", "--markdown", str(tmp_path / "absent" / "speed.md")]) == 2
    assert len(asked) == 2, "known before the work"


def drawn(*shown: Any) -> str:
    console = Console(width=300, record=True, quiet=True)
    with console.capture() as captured:
        console.quiet = False
        for table in shown:
            console.print(table)
    return captured.get()
