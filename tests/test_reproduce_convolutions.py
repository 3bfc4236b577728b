"""The experiments of [WK20] and [SI26], in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import equipoise as eq
from equipoise.data import load_data
from equipoise.reproduce import PAPERS, Outcome, Settings, run, sato2026, winston2020

KINDS = {"mondeq": eq.MonDEQ, "monconv": eq.MonConv2d, "multitier": eq.MultiTierMonDEQ}


@pytest.fixture(scope="module")
def winston(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("winston")
    return run(PAPERS["winston2020"], Settings(quick=True), load_data("digits"), folder / "out")


def test_three_networks_are_trained_and_solved_over_all_steps(winston: Outcome) -> None:
    accuracy, splittings = winston.reproduction.sections
    assert len(accuracy.comparisons) == 3
    assert "98.10 %" in {row.published for row in accuracy.comparisons}
    assert len(splittings.figures) == 3
    for section in (accuracy, splittings):
        for table in section.tables:
            assert all(len(row) == len(table.head) for row in table.rows)
    for kind, layer in KINDS.items():
        model = eq.load(winston.report.parent / f"{kind}.safetensors")
        assert any(isinstance(module, layer) for module in model.modules())
        found = winston.reproduction.data[f"train-{kind}"]
        assert found["margin"] == eq.margin(model) > 0
        assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert "digits" in winston.reproduction.limits[-1]
    assert winston.report.exists()


def test_the_steps_are_of_runs_that_settled(winston: Outcome) -> None:
    for kind in KINDS:
        runs = winston.reproduction.data[f"solve-{kind}"]["runs"]
        assert {run["solver"] for run in runs} == set(winston2020.SOLVERS)
        settled = [run for run in runs if run["settled"] == 1.0]
        assert all(0 < run["steps"] <= run["most"] < winston2020.CAP for run in settled)
        fastest = {name: min(r["steps"] for r in settled if r["solver"] == name) for name in winston2020.SOLVERS}
        assert fastest["PeacemanRachford"] <= fastest["ForwardBackward"]


def test_a_run_that_was_stopped_goes_on(winston: Outcome, tmp_path: Path) -> None:
    kept = json.loads(winston.results.read_text())
    kept["complete"] = False
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text(json.dumps(kept))
    again = run(PAPERS["winston2020"], Settings(quick=True), load_data("digits"), tmp_path / "out")
    assert again.report.read_text() == winston.report.read_text()


def test_networks_that_contract_beside_one_that_need_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sato2026.QUICK, "epochs", 1)
    outcome = run(PAPERS["sato2026"], Settings(quick=True), load_data("digits"), tmp_path / "out")
    (section,) = outcome.reproduction.sections
    found = outcome.reproduction.data
    plain, ours = found["mdeq"], [found[f"lmdeq-{slope:g}"] for slope in sato2026.SLOPES]
    assert plain["contraction"] is None
    assert [network["slope"] for network in ours] == list(sato2026.SLOPES)
    bounds = [network["contraction"] for network in ours]
    assert bounds == sorted(bounds), "a steeper slope contracts less"
    assert bounds[0] < 1
    assert all(network["failures"] == 0 for network in ours if network["contraction"] < 1)
    assert all(network["parameters"] <= plain["parameters"] for network in ours), "of the same size"
    for network in (plain, *ours):
        assert 1 <= network["evaluations"] <= sato2026.LIMIT
        assert network["step"] > 0 < network["inference"]
    for table in section.tables:
        assert len(table.rows) == 1 + len(ours)
        assert all(len(row) == len(table.head) for row in table.rows)
    assert len(section.comparisons) == 4
    assert "digits" in outcome.reproduction.limits[-1]
    assert outcome.report.exists()
