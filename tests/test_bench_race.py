"""What the benchmark measures with: the truth, rounds in turn, races to it; and what it says of what is missing."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise.bench import (
    measure,
    network,
    peers,
    race,
    scale,
    solve,
    step,
)
from equipoise.bench.contenders import Answer, Contender, library, plain
from equipoise.errors import ConvergenceError, InputError, MissingExtraError
from problems import matrix


@pytest.fixture(scope="module")
def layer() -> eq.MonDEQ:
    """A small layer of margin 0.3."""
    torch.manual_seed(0)
    return eq.MonDEQ(5, 7, rank=3, margin=0.3).eval()


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
