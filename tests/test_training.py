"""Training: it learns, repeats itself, writes what it says, and refuses what it cannot do."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import equipoise as eq
from equipoise.data import Data, Split, load_data
from equipoise.errors import ConvergenceError, InputError, OptionError, OutputError
from equipoise.training import FitResult, TrainingConfig, evaluate, fit
from trainings import SHORT, at_step, explicit, implicit, same, untimed


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


# What it is for


@pytest.mark.parametrize("make", [explicit, implicit])
def test_it_learns_and_tells_how_it_went(make: Callable[[], nn.Module], digits: Data) -> None:
    model = make()
    result = fit(model, digits, SHORT, progress=False)
    assert result.accuracy_test is not None
    assert result.accuracy_test > 0.8
    assert result.accuracy_test == evaluate(model, digits.test)
    assert result.accuracy_validation == result.history[-1]["validation_accuracy"]
    assert [row["epoch"] for row in result.history] == [1, 2, 3, 4]
    assert result.history[-1]["loss"] < result.history[0]["loss"] / 3
    assert max(row["learning_rate"] for row in result.history) <= 1e-2
    assert result.history[-1]["learning_rate"] < 1e-6  # the cycle is over
    assert result.seconds_per_epoch == pytest.approx(sum(row["seconds"] for row in result.history) / 4)
    assert (result.interrupted, result.checkpoint) == (False, None)


def test_a_step_is_adam_on_the_mean_cross_entropy(digits: Data) -> None:
    """Two epochs of one batch against the same steps written out."""
    data = Data(
        "few", Split(digits.train.x[:50], digits.train.y[:50]), digits.validation, digits.test,
        digits.preprocessing, digits.classes,
    )  # fmt: skip
    model, by_hand = explicit(), explicit()
    config = TrainingConfig(epochs=2, learning_rate=0.01, weight_decay=0.1, accelerator="cpu")
    result = fit(model, data, config, progress=False)
    matrices, vectors = ([p for p in by_hand.parameters() if p.ndim == n] for n in (2, 1))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=3)
    for row in result.history:
        loss = nn.functional.cross_entropy(by_hand(data.train.x), data.train.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["learning_rate"] == cycle.get_last_lr()[0]
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-5)


def test_equilibrium_layers_are_reported(digits: Data) -> None:
    model = implicit()
    row = fit(model, digits, SHORT, progress=False).history[-1]
    assert row["margin"] == model[0].operator.margin()  # type: ignore[index]
    assert row["margin"] != pytest.approx(0.5, abs=1e-4)  # it was learned
    assert 1 <= row["steps"] < 200
    assert "margin" not in fit(explicit(), digits, SHORT, progress=False).history[-1]


@pytest.mark.parametrize("make", [explicit, implicit])
def test_the_seed_decides_everything_and_global_state_stays(make: Callable[[], nn.Module], digits: Data) -> None:
    first, again, other = make(), make(), make()
    torch.manual_seed(5)
    state, filters = torch.get_rng_state(), list(warnings.filters)
    result = fit(first, digits, SHORT, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert warnings.filters == filters
    torch.manual_seed(6)
    repeated = fit(again, digits, SHORT, progress=False)
    fit(other, digits, TrainingConfig(epochs=4, learning_rate=1e-2, seed=1, accelerator="cpu"), progress=False)
    assert same(first, again)
    assert untimed(result.history) == untimed(repeated.history)
    assert not same(first, other)


def test_dropout_repeats_too(digits: Data) -> None:
    def make() -> nn.Module:
        return nn.Sequential(explicit(), nn.Dropout(0.5))

    first, again = make(), make()
    fit(first, digits, SHORT, progress=False)
    torch.rand(3)
    fit(again, digits, SHORT, progress=False)
    assert same(first, again)


def test_a_model_in_double_precision_stays_there(digits: Data) -> None:
    model = explicit().double().eval()
    result = fit(model, digits, SHORT, progress=False)
    assert (result.accuracy_test or 0) > 0.9
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not model.training


def test_a_prepared_model_is_logged_as_the_codes_it_becomes(digits: Data, tmp_path: Path) -> None:
    model = eq.prepare_qat(implicit(), eq.Structured(2, input_bits=4))
    result = fit(model, digits, SHORT, out_dir=tmp_path, progress=False)
    codes = eq.convert(model)
    assert result.margin == result.history[-1]["margin"] == eq.margin(codes)
    assert result.accuracy_test == evaluate(codes, digits.test)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert {"loss", "accuracy", "validation_accuracy", "margin", "steps"} <= last.keys()
    assert float(last["margin"]) == result.margin
    assert result.target_met is None


def unguarded() -> nn.Module:
    """A layer whose W is free: nothing in training keeps its margin."""
    torch.manual_seed(0)
    layer = eq.MonDEQ.from_weights(0.97 * torch.eye(16), torch.randn(16, 64) / 8, torch.zeros(16))
    return nn.Sequential(layer, nn.Linear(16, 10))


@pytest.mark.filterwarnings("ignore::equipoise.ConvergenceWarning")
def test_training_stops_after_the_epoch_that_lost_the_margin(digits: Data, tmp_path: Path) -> None:
    stopping = replace(SHORT, weight_decay=0.0, stop_on_lost_margin=True)
    result = fit(unguarded(), digits, stopping, out_dir=tmp_path, progress=False)
    assert result.margin is not None
    assert result.margin <= 0
    assert len(result.history) < 4
    assert all(row["margin"] > 0 for row in result.history[:-1])
    assert result.stopped is not None
    assert re.search(rf"after epoch {len(result.history)} of 4, only {result.margin:.6g}", result.stopped)
    assert not result.interrupted
    again = fit(unguarded(), digits, stopping, out_dir=tmp_path, resume=True, progress=False)
    assert (again.stopped, again.history, again.accuracy_test) == (result.stopped, result.history, result.accuracy_test)
    guarded = fit(implicit(), digits, stopping, progress=False)
    assert (guarded.stopped, len(guarded.history)) == (None, 4)


@pytest.mark.filterwarnings("ignore::equipoise.ConvergenceWarning")
def test_weights_that_diverge_are_told_and_the_last_good_epoch_stays(digits: Data, tmp_path: Path) -> None:
    model, wild = explicit(), replace(SHORT, learning_rate=1e30)
    with pytest.raises(ConvergenceError, match=r"diverged in epoch 1.*learning_rate \(1e\+30\)"):
        fit(model, digits, wild, out_dir=tmp_path, progress=False)
    weights = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    with pytest.raises(ConvergenceError, match="diverged"):
        fit(implicit(), digits, wild, progress=False)


def test_a_layers_own_warnings_are_heard(digits: Data) -> None:
    def warn() -> None:
        warnings.warn("it did not converge", eq.ConvergenceWarning, stacklevel=1)

    with pytest.warns(eq.ConvergenceWarning, match="did not converge"):
        fit(at_step(explicit(), 3, warn), digits, SHORT, progress=False)


def test_training_in_a_thread_leaves_signals_alone(digits: Data) -> None:
    results: list[FitResult] = []
    thread = threading.Thread(target=lambda: results.append(fit(explicit(), digits, SHORT, progress=False)))
    thread.start()
    thread.join()
    assert len(results[0].history) == 4


# Files


def test_nothing_is_written_or_printed_unasked(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fit(explicit(), digits, SHORT)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")  # and the bar only goes to a terminal


def test_out_dir_receives_logs_and_a_safe_checkpoint(
    digits: Data, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, model = tmp_path / "a" / "b", implicit()
    result = fit(model, digits, SHORT, out_dir=out)
    assert capfd.readouterr() == ("", "")
    assert sorted(p.name for p in out.iterdir()) == ["last.ckpt", "metrics.csv", "tensorboard"]
    assert result.checkpoint == out / "last.ckpt"
    weights = torch.load(result.checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(weights[f"model.{k}"], v) for k, v in model.state_dict().items())
    with (out / "metrics.csv").open(newline="") as file:
        assert [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)] == result.history
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    for name in ("loss", "validation_accuracy", "margin", "steps"):
        logged = [event.value for event in events.Scalars(name)]
        assert logged == pytest.approx([row[name] for row in result.history], rel=1e-6)


def test_a_checkpoint_is_not_overwritten_unasked(digits: Data, tmp_path: Path) -> None:
    fit(explicit(), digits, SHORT, out_dir=tmp_path, progress=False)
    before = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(OutputError, match=r"last\.ckpt exists: resume"):
        fit(explicit(), digits, SHORT, out_dir=tmp_path, progress=False)
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_a_folder_that_cannot_be_written_is_refused(digits: Data, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        fit(explicit(), digits, SHORT, out_dir=tmp_path / "file" / "inside", progress=False)


# Refusals


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"epochs": 1.5},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"weight_decay": -0.1},
        {"seed": -1},
        {"accelerator": "quantum"},
        {"devices": 0},
        {"nodes": -1},
        {"stop_on_lost_margin": 1},
        {"margin": 0.05},
    ],
)
def test_a_bad_configuration_is_refused(change: dict[str, Any]) -> None:
    name, value = next(iter(change.items()))
    with pytest.raises(OptionError, match=f"{name}={value!r}"):
        TrainingConfig(**{"epochs": 1, **change})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_an_absent_accelerator_is_refused(digits: Data) -> None:
    with pytest.raises(OptionError, match="accelerator='cuda' cannot be used here"):
        fit(explicit(), digits, TrainingConfig(epochs=1, accelerator="cuda"))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Linear(784, 10), "does not take the 64 features of digits"),
        (nn.Linear(64, 9), r"shape \(2, 9\).*not \(2, 10\)"),
        (nn.Flatten(0), r"no parameters"),
        (nn.Linear(64, 10).requires_grad_(False), "no parameters"),
    ],
)
def test_a_model_of_other_shapes_is_refused(model: nn.Module, says: str, digits: Data, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        fit(model, digits, SHORT, out_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_lightning_the_extra_is_named() -> None:
    code = "import sys; sys.modules['lightning'] = None; import equipoise.training"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "MissingExtraError" in done.stderr.splitlines()[-1]
    assert "pip install 'equipoise[train]'" in done.stderr.splitlines()[-1]


# evaluate


def test_evaluate_counts_right_answers_whatever_the_batches() -> None:
    model = nn.Identity()
    x = torch.eye(5)[[0, 1, 2, 3, 4, 0, 0]]
    split = Split(x, torch.tensor([0, 1, 2, 0, 0, 0, 4]))  # four of seven
    for size in (1, 2, 3, 7, 100):
        assert evaluate(model, split, size) == 4 / 7
    assert model.training


def test_evaluate_switches_dropout_off_and_back_on(digits: Data) -> None:
    model = nn.Sequential(explicit(), nn.Dropout(0.9))
    assert evaluate(model, digits.test) == evaluate(model[0], digits.test)
    assert model.training
    assert evaluate(model.eval(), digits.test) == evaluate(model[0], digits.test)
    assert not model.training


def test_evaluate_refuses_nothing_at_all(digits: Data) -> None:
    with pytest.raises(InputError, match="empty"):
        evaluate(nn.Identity(), Split(torch.empty(0, 5), torch.empty(0, dtype=torch.int64)))
    with pytest.raises(OptionError, match="batch_size=0"):
        evaluate(explicit(), digits.test, 0)
