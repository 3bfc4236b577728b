"""The benchmark measures what it says it does: at toy sizes, and without a look at any time."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import equipoise as eq
from equipoise.bench import (
    commands,
    measure,
    network,
    peers,
    race,
    run,
    scale,
    ship,
    solve,
    step,
    tables,
    train,
)
from equipoise.bench.contenders import OURS, RACING, REFERENCE, Answer, Contender, library, plain
from equipoise.bench.rows import Row, at_least_times, at_most_times, not_measured
from equipoise.cli import main
from equipoise.errors import ConvergenceError, FileFormatError, InputError, MissingExtraError, OptionError
from equipoise.runtime import compiler
from problems import matrix

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


@pytest.fixture(scope="module")
def layer() -> eq.MonDEQ:
    """A small layer of margin 0.3."""
    torch.manual_seed(0)
    return eq.MonDEQ(5, 7, rank=3, margin=0.3).eval()


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
    assert f"{result['machine']['threads']} threads" in text
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
    assert len(asked) == 2, "known before the work"


def drawn(*shown: Any) -> str:
    console = Console(width=300, record=True, quiet=True)
    with console.capture() as captured:
        console.quiet = False
        for table in shown:
            console.print(table)
    return captured.get()


# What it measures with


@pytest.mark.parametrize("seed", range(4))
def test_the_truth_solves_the_linear_system_of_its_own_support(seed: int) -> None:
    torch.manual_seed(seed)
    W, q = matrix(9, 0.05, seed), torch.randn(5, 9, dtype=torch.float64)
    z = measure.truth(W, q)
    for row, injection in zip(z, q, strict=True):
        on = (row > 0).double()
        assert bool((W @ row + injection <= 1e-9)[row == 0].all())
        exact = torch.linalg.solve(torch.eye(9, dtype=torch.float64) - on[:, None] * W, on * injection)
        assert torch.allclose(row, exact, rtol=1e-9, atol=1e-9)


def test_there_is_no_truth_without_a_margin() -> None:
    with pytest.raises(ConvergenceError, match="margin -1 has no"):
        measure.truth(2 * torch.eye(3), torch.ones(1, 3))


def test_the_worst_row_counts_and_nan_is_infinite() -> None:
    exact = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    assert measure.relative_error(exact.float(), exact) == 0
    off = exact.clone()
    off[0, 1] += 0.5
    assert measure.relative_error(off, exact) == pytest.approx(0.1)
    off[2, 0] = math.nan
    assert measure.relative_error(off, exact) == math.inf


def test_rounds_differ_in_order_and_warm_up_what_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    tasks = {name: (lambda name=name: seen.append(name)) for name in "abcd"}
    times = measure.interleave(tasks, 3)
    assert {len(taken) for taken in times.values()} == {3}
    assert [seen.count(name) for name in tasks] == [5] * 4  # all but the first time twice
    first, second = seen[:4], seen[4::2][:4]
    assert sorted(first) == sorted(second) == sorted(tasks)
    assert first != second
    assert seen[4::2] == seen[5::2]
    monkeypatch.setattr(measure, "SHORT", 0.0)
    monkeypatch.setattr(measure, "ENOUGH", 0.0)
    seen.clear()
    assert {len(taken) for taken in measure.interleave(tasks, 5).values()} == {3}
    assert len(seen) == 12


def test_a_lone_round_is_a_single_call() -> None:
    seen: list[int] = []
    measure.interleave({"a": lambda: seen.append(1)}, 1)
    assert seen == [1]


# Races


def work_of(layer: eq.MonDEQ) -> race.Work:
    torch.manual_seed(1)
    return race.work_for(layer, torch.randn(3, 5), batch=4, count=2)


def pretender(layer: eq.MonDEQ, errors: dict[float, float], calls: list[float] | None = None) -> Contender:
    """Answers with the truth times (1 + the error of its setting)."""

    def make(setting: float, room: int | None) -> Any:
        def answer(x: Tensor) -> Answer:
            if calls is not None:
                calls.append(setting)
            q = torch.nn.functional.linear(x, layer.input_weight, layer.bias)
            return Answer(measure.truth(layer.weight, q) * (1 + errors[setting]), 3)

        return answer

    return Contender("pretender", "others", "tol", tuple(errors), make)


def test_samples_repeat_where_there_are_too_few(layer: eq.MonDEQ) -> None:
    work = work_of(layer)
    assert [batch.shape for batch in work.batches] == [(4, 5), (4, 5)]
    assert torch.equal(work.batches[0][0], work.batches[0][3])
    solved = layer.double().solve(work.batches[1].double(), tol=1e-10).value
    layer.float()
    assert torch.allclose(solved, work.truths[1], rtol=1e-5, atol=1e-6)


def test_the_coarsest_settings_that_suffice_are_tried_and_no_finer(layer: eq.MonDEQ) -> None:
    calls: list[float] = []
    errors = {1.0: 1e-2, 0.5: 5e-5, 0.2: 2e-5, 0.1: 1e-5}
    form = race.tune(pretender(layer, errors, calls), work_of(layer))
    assert form.tried == [1.0, 0.5, 0.2]
    assert [entry.setting for entry in form.entries] == [0.5, 0.2]
    for entry in form.entries:
        assert entry.run.error == pytest.approx(errors[entry.setting], rel=0.1)
    assert 0.1 not in calls


@pytest.mark.parametrize(("error", "shown"), [(2e-3, 2e-3), (math.nan, None)])
def test_who_misses_the_goal_gets_no_time(layer: eq.MonDEQ, error: float, shown: float | None) -> None:
    entry = run_race(layer, [library(layer)[0], pretender(layer, {1.0: 0.5 if shown else error, 0.1: error})])
    row = entry["contenders"][1]
    assert not row["reached"]
    assert row["seconds"] is None
    assert row["ratio"] is None
    assert row["worst_error"] == (None if shown is None else pytest.approx(shown, rel=1e-3))
    assert entry["speedup"] is None
    assert entry["speedup_plain"] is None


def test_plain_pytorch_runs_the_steps_it_needs(layer: eq.MonDEQ) -> None:
    row = run_race(layer, [library(layer)[0], plain(layer)])["contenders"][1]
    assert row["reached"]
    assert row["worst_error"] <= 1e-4
    assert row["steps"] == row["setting"]
    assert row["setting"] - 5 <= row["tried"][-2] or len(row["tried"]) < 3


@pytest.mark.parametrize(("turn", "damping"), [(1.0, 0.5), (2.0, 0.25), (3.0, 0.125)])
def test_the_damping_is_halved_until_the_plain_iteration_settles(turn: float, damping: float) -> None:
    # z* = (1, 1) with both units on, where |1 − β ± iβt| < 1 iff β < 2/(1 + t²)
    W = torch.tensor([[0.0, turn], [-turn, 0.0]])
    x = torch.tensor([[1 - turn, 1 + turn]])
    assert peers._settling(x, W.mT, torch.eye(2), torch.zeros(2)) == damping


def test_torchdeq_gets_room_for_what_it_needs_only(layer: eq.MonDEQ) -> None:
    pytest.importorskip("torchdeq")
    x = work_of(layer).batches[0]
    first = peers.peers(layer, torch.randn(4, 5))[0]
    needed = first.make(1e-5, None)(x)
    again = first.make(1e-5, needed.steps)(x)
    assert again.steps == needed.steps < peers.BUDGETS["fixed_point_iter"]
    assert torch.equal(again.value, needed.value)


def run_race(layer: eq.MonDEQ, contenders: list[Contender]) -> dict[str, Any]:
    return race.race(layer, contenders, work_of(layer), 1, measure.Tracker(lambda *_: None), "toy")


# What may be missing, or be something else


def test_without_torchdeq_the_rest_still_runs(layer: eq.MonDEQ, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdeq", None)
    with pytest.raises(MissingExtraError, match=r"equipoise\[bench\]"):
        peers.peers(layer, torch.randn(4, 5))
    here = network.Network("toy", nn.Sequential(layer), layer, torch.randn(3, 5), 0.0)
    contenders, missing = solve._contenders(here)
    assert missing is not None
    assert "equipoise[bench]" in missing
    entry = run_race(layer, [contenders[0], contenders[-1]])
    assert [row["reached"] for row in entry["contenders"]] == [True, True]
    assert entry["speedup"] is None
    assert entry["speedup_plain"] is not None


def test_a_checkpoint_of_other_features_is_refused(tmp_path: Path) -> None:
    state = {
        "A": torch.randn(2, 4), "S": torch.randn(4, 4), "m_raw": torch.tensor(0.0), "U": torch.randn(4, 5),
        "b": torch.zeros(4), "classifier.weight": torch.randn(10, 4), "classifier.bias": torch.zeros(10),
    }  # fmt: skip
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(InputError, match="takes 5 features, where MNIST has 784"):
        network.checkpoint_network(tmp_path / "other.pt", network.images(None)[0])


def test_the_published_checkpoint_is_taken(shared_reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    found = network.checkpoint_network(shared_reference, network.images(None)[0]).to_dict()
    assert found["features"] == 100
    assert found["condition"] == pytest.approx(8.13297, rel=1e-5)


def test_an_environment_without_mnist_falls_back_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIPOISE_DATA", str(tmp_path))
    data, notes = network.images(None)
    assert data.features == 784
    assert "no MNIST" in notes[0]
    with pytest.raises(eq.DataNotFoundError):
        network.images(tmp_path)


def test_a_process_that_dies_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (row,) = scale.scaling((8,), measure.Tracker(lambda *_: None))
    assert set(row["certify"]) == {"failure"}


# Gradients


def test_the_gradient_error_sees_a_coarse_solve(layer: eq.MonDEQ) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(eq.MonDEQ(5, 30, margin=0.05), nn.Linear(30, 4))
    batches = [(torch.randn(20, 5), torch.randint(4, (20,))) for _ in range(3)]
    found = []
    for tol in (0.5, 1e-6):
        model[0].tol = tol
        found.append(step.gradient_error(model, batches))
    assert found[0].median > 1e-3
    assert found[1].worst < 1e-4
    assert all(error.median <= error.worst for error in found)
    assert model[0].tol == 1e-6
