"""The soundness trials: a few thousand of them, whether they notice a bound that is 1 % wrong, and their own truths."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch

from problems import CATALOGUE, exact_rows, true_margin

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import soundness
from trials.campaign import SPECIAL
from trials.equilibria import Exact, State, equilibria
from trials.ledger import Ledger
from trials.wide import LD, exact, largest, norms, rayleigh, solve

pytestmark = pytest.mark.skipif(np.finfo(LD).nmant < 63, reason="long doubles are doubles here")

TIGHT = {
    "box", "closed rate douglas_rachford", "closed rate forward_backward", "closed rate peaceman_rachford",
    "condition l2", "condition linf", "conv delta norm", "conv lipschitz", "conv margin", "delta norm l2",
    "displacement", "error bound Picard l2", "euclidean lipschitz", "input lipschitz linf", "lipschitz l2",
    "lipschitz linf", "margin l2", "margin linf", "min eigenvalue", "rate DouglasRachford l2",
    "rate PeacemanRachford l2", "row margins", "spectral norm", "verified cayley margin", "weight condition l2",
}  # fmt: skip
"""Bounds that truths come so near to, within few networks, that 1 % is seen."""

FAMILIES = {
    "tiers": (6, {
        "tiers condition", "tiers delta norm", "tiers lipschitz", "tiers margin", "tiers measure",
        "tiers weight condition",
    }),
    "multiscale": (3, {
        "contraction", "contraction of training", "multiscale inexact", "multiscale margin", "multiscale rate",
        "scaled rate",
    }),
    "exports": (12, {"export 32-bit sums", "export accumulator", "export contraction", "export margin"}),
}  # fmt: skip
"""The same of networks that :data:`trials.campaign.SPECIAL` makes: how many, and which bounds."""


def test_no_bound_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soundness, "BUNCH", 3)
    journal = tmp_path / "journal.jsonl"
    assert soundness.main(["--trials", "4000", "--seed", "11", "--out", str(journal)]) == 0
    assert " 0 violations" in capsys.readouterr().out
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    counts = [tally["trials"] for line in lines[1:] for tally in line["tallies"].values()]
    assert sum(counts) >= 4000
    assert not any(line["violations"] for line in lines[1:])


def test_bounds_one_percent_wrong_are_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    line = soundness.bunch(8, range(50), {"": 0.99})
    broken = {found["bound"] for found in line["violations"]}
    assert not TIGHT - broken
    found = next(found for found in line["violations"] if found["bound"] == "margin l2")
    arguments = ["--seed", "8", "--only", str(found["index"])]
    assert soundness.main([*arguments, "--fault", "margin l2=0.99"]) == 1
    printed = capsys.readouterr().out
    assert f"repeat: python benchmarks/soundness.py --seed 8 --only {found['index']}" in printed
    assert '"bound": "margin l2"' in printed
    assert found["claimed"].split("'")[1] in printed
    assert soundness.main(arguments) == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore::equipoise.errors.ConvergenceWarning")
def test_bounds_of_every_family_one_percent_wrong_are_noticed(family: str) -> None:
    networks, bounds = FAMILIES[family]
    ledger = Ledger({"": 0.99})
    with torch.no_grad(), np.errstate(all="ignore"):
        for index in range(networks):
            SPECIAL[family][1](np.random.default_rng([9, index]), ledger)
    assert not bounds - {found["bound"] for found in ledger.violations}


def test_a_journal_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soundness, "BUNCH", 2)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    for path in (whole, cut):
        soundness.main(["--trials", "1500", "--seed", "3", "--out", str(path)])
    lines = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[:2]) + lines[2][: len(lines[2]) // 2])
    soundness.main(["--trials", "1500", "--seed", "3", "--out", str(cut)])
    assert cut.read_text() == whole.read_text()
    with pytest.raises(SystemExit, match="give another --out"):
        soundness.main(["--seed", "4", "--out", str(cut)])


@pytest.mark.parametrize("arguments", [["--trials", "0"], ["--fault", "x"], ["--only", "-1"]])
def test_bad_use(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        soundness.main(arguments)
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


# The truths


@pytest.mark.parametrize("case", CATALOGUE, ids=str)
def test_equilibria_are_those_known(case) -> None:
    q = State(exact(case.q), np.zeros(len(case.q), LD))
    found = equilibria(Exact(exact(case.W), LD(0)), q, case.activation)
    away = norms(found.value - exact(case.answer))
    assert (away <= 1e-12 * (1 + norms(exact(case.answer)))).all()
    assert (found.error <= 1e-15 * (1 + norms(found.value))).all()


@pytest.mark.parametrize("case", [c for c in CATALOGUE if c.activation.name in ("Tanh", "Softplus", "ELU")], ids=str)
def test_equilibria_lie_within_their_own_errors(case) -> None:
    q = State(exact(case.q), np.zeros(len(case.q), LD))
    found = equilibria(Exact(exact(case.W), LD(0)), q, case.activation)
    rows = exact_rows(case.W, case.q, case.activation)
    for value, error, truth in zip(found.value, found.error, rows, strict=True):
        off = [_many_digits(v) - t for v, t in zip(value, truth, strict=True)]
        assert mpmath.norm(mpmath.matrix(off)) <= _many_digits(error)


def _many_digits(x: LD) -> mpmath.mpf:
    high = float(x)
    return mpmath.mpf(high) + mpmath.mpf(float(x - LD(high)))


def test_witnesses_are_reached_by_what_they_stand_for() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        A = rng.standard_normal((4, 4)) * 10.0 ** rng.uniform(-200, 200)
        value, slack = largest(exact(A))
        true = np.linalg.norm(A / np.abs(A).max(), 2) * np.abs(A).max()
        assert abs(float(value / LD(true)) - 1) < 1e-14
        assert slack < 1e-16 * value
        A = A / np.abs(A).max()
        H = A @ A.T
        low, slack = rayleigh(exact((H + H.T) / 2))
        assert abs(float(low) - np.linalg.eigvalsh((H + H.T) / 2)[0]) < 1e-13
        b = rng.standard_normal((4, 2))
        x = solve(exact(A)[None], exact(b)[None])[0]
        assert float(norms((exact(A) @ x - exact(b)).reshape(-1))) < 1e-15 * (1 + float(norms(x.reshape(-1))))
    W = CATALOGUE[0].W
    low, _ = rayleigh(np.eye(2, dtype=LD) - exact((W + W.mT) / 2))
    assert float(low) == pytest.approx(true_margin(W), abs=1e-15)


def test_the_ledger_tells_what_holds() -> None:
    ledger = Ledger()
    ledger.most("a", [1.0, 1.0, np.inf, 1.0], [0.5, 1.0, 9.0, np.nan])
    ledger.most("a", None, 3.0)
    assert vars(ledger.tallies["a"]) == {"trials": 2, "violations": 0, "ratio": 1.0, "undecided": 1}
    ledger.most("a", 1.0, 1.5, 0.4)
    ledger.least("b", 1.0, 0.5)
    ledger.most("c", np.nan, 1.0)
    ledger.holds("d", [True, False], [False, False])
    assert [found["bound"] for found in ledger.violations] == ["a", "b", "c", "d"]
    faulty = Ledger({"": 0.99})
    faulty.most("a", 1.0, 0.995)
    faulty.least("b", 1.0, 1.005)
    faulty.least("c", -1.0, -0.995)
    assert len(faulty.violations) == 3
