"""Robustness on the command line, and the example that shows it."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import equipoise as eq
from command_line import Capsys, run, run_json
from equipoise.data import load_data

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "robust_two_bits.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``float`` and ``small`` (2 bits), briefly trained on the digits; ``none``, which no maximum norm certifies."""
    path, data = tmp_path_factory.mktemp("robust"), load_data("digits")
    torch.manual_seed(0)
    model = nn.Sequential(eq.NEMON(64, 16, gamma=0.8), nn.Linear(16, 10))
    model.preprocessing = data.preprocessing  # type: ignore[assignment]
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    loss = eq.RobustLoss(eps=0.05, ramp=0.3)
    for step in range(60):
        optimizer.zero_grad()
        loss(model, data.train.x, data.train.y, model(data.train.x), step / 60, data.preprocessing).backward()
        optimizer.step()
    eq.save(model.eval(), path / "float")
    eq.save(eq.quantize(model, eq.Structured(2)), path / "small")
    B = torch.randn(16, 16)
    none = eq.MonDEQ.from_weights(B - B.mT, torch.randn(16, 64), torch.zeros(16))
    eq.save(nn.Sequential(none, nn.Linear(16, 10)), path / "none")
    return path


def test_certify_reports_all_three_accuracies(folder: Path, capsys: Capsys) -> None:
    found = run_json(
        capsys, "certify", folder / "small", "--reference", folder / "float", "--data", "digits", "--eps-inf", "0.03"
    )
    assert 0 < found["certified_accuracy"] <= found["pgd_accuracy"] <= found["clean_accuracy"]
    assert 0 < found["robust_agreement"] <= 1
    assert found["eps"] == 0.03
    assert found["family"] == "linf"
    assert found["measure"] <= 0.8 + 1e-7
    status, out, _ = run(capsys, "certify", folder / "float", "--data", "digits", "--eps-inf", "0.03", "--limit", "20")
    assert status == 0
    assert "under attack" in out
    assert "measure" in out


@pytest.mark.parametrize("eps", ["-0.1", "2", "nan"])
def test_bad_distances_exit_with_2(eps: str, folder: Path, capsys: Capsys) -> None:
    status, out, err = run(capsys, "certify", folder / "float", "--data", "digits", "--eps-inf", eps)
    assert (status, out) == (2, "")
    assert "eps" in err


def test_what_cannot_be_certified_exits_with_2(folder: Path, capsys: Capsys) -> None:
    status, _, err = run(capsys, "certify", folder / "float", "--eps-inf", "0.1")
    assert status == 2
    assert "--data" in err
    status, _, err = run(capsys, "certify", folder / "none", "--data", "digits", "--eps-inf", "0.1")
    assert status == 2
    assert "abscissa" in err


def test_train_makes_a_nemon(tmp_path: Path, capsys: Capsys) -> None:
    found = {}
    for name, options in (("plain", []), ("robust", ["--lipschitz-weight", "0.01", "--eps-inf", "0.05"])):
        path = tmp_path / name
        found[name] = run_json(
            capsys, "train", "--model", "nemon", "--gamma", "0.7", "--features", "16", "--epochs", "4", "--lr", "2e-2",
            *options, "--out", path,
        )  # fmt: skip
        assert found[name]["certified"]
        assert found[name]["margin"] == pytest.approx(0.3, abs=1e-5)
    plain, robust = (eq.load(tmp_path / name) for name in ("plain", "robust"))
    assert isinstance(plain[0], eq.NEMON)
    before, after = eq.input_lipschitz(plain), eq.input_lipschitz(robust)
    assert before is not None
    assert after is not None
    assert after < before / 2


def test_train_goes_on_from_a_nemon_with_boxes_and_through_codes(folder: Path, tmp_path: Path, capsys: Capsys) -> None:
    found = run_json(
        capsys, "train", "--model", "nemon", "--from", folder / "float", "--eps-inf", "0.03", "--eps-share", "0.3",
        "--eps-ramp", "0", "--scheme", "structured", "--bits", "3", "--epochs", "1", "--out", tmp_path / "more",
    )  # fmt: skip
    assert found["certified"]
    assert found["bits"] == 3
    assert found["margin"] >= 0.2 - 1e-7  # the file's own gamma
    assert isinstance(eq.load(tmp_path / "more")[0], eq.NEMON)


def test_the_attack_is_quiet(folder: Path) -> None:
    data, model = load_data("digits"), eq.load(folder / "float")
    model[0].backward_tol, model[0].solver = 1e-12, eq.PeacemanRachford(max_steps=12)
    ball = eq.PixelBall(0.05, data.preprocessing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eq.pgd(model, data.test.x[:20], data.test.y[:20], ball, 3)
    with pytest.warns(eq.ConvergenceWarning):
        model(data.test.x[:20].clone().requires_grad_()).sum().backward()


@pytest.mark.parametrize(
    "options",
    [
        ["--gamma", "0.5"],
        ["--model", "nemon", "--eps-share", "0.5"],
        ["--model", "nemon", "--eps-inf", "0.1", "--eps-ramp", "2"],
        ["--lipschitz-weight", "1"],
        ["--eps-inf", "0.1"],
        ["--model", "nemon", "--gamma", "1"],
        ["--model", "nemon", "--lipschitz-weight", "-1"],
        ["--model", "nemon", "--eps-inf", "-0.1"],
    ],
)
def test_bad_training_options_exit_with_2(options: list[str], tmp_path: Path, capsys: Capsys) -> None:
    status, out, err = run(capsys, "train", "--epochs", "1", *options, "--out", tmp_path / "out")
    assert (status, out) == (2, "")
    assert err
    assert not (tmp_path / "out").exists()


def test_plan_leaves_out_the_schemes_of_monotone_layers(folder: Path, capsys: Capsys) -> None:
    found = run_json(capsys, "plan", folder / "float", "--data", "digits", "--bits", "4,2", status=0)
    schemes = {rung["scheme"] for rung in found["rungs"]}
    assert schemes <= {"assembled", "structured"}
    assert "structured" in schemes
    kept = [rung for rung in found["rungs"] if rung["scheme"] == "structured"]
    assert all(rung["verdict"] == "certified" for rung in kept)


def test_the_example_runs(capsys: Capsys) -> None:
    values = runpy.run_path(str(EXAMPLE))
    assert values["certificate"].measure <= 0.8 + 1e-6
    assert values["last"].eps == 0.1
    assert values["last"].certified_accuracy > 0.4
    assert "2 bits" in capsys.readouterr().out
