"""Training: it learns, repeats itself, stops on Ctrl-C, goes on where it stopped, and leaves no litter."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise.data import Data, Split, load_data
from equipoise.errors import FileFormatError, InputError, OptionError, OutputError
from equipoise.training import FitResult, TrainingConfig, evaluate, fit

SHORT = TrainingConfig(epochs=4, learning_rate=1e-2, accelerator="cpu")
STEPS = 10  # of an epoch: 1,257 samples in batches of 128


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


def explicit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def implicit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(eq.MonDEQ(64, 16, rank=4, margin=0.5, learn_margin=True), nn.Linear(16, 10))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def untimed(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def at_step(model: nn.Module, step: int, act: Callable[[], None]) -> nn.Module:
    """``model``, calling ``act`` in the forward pass of a training step, counted from 1."""
    seen = 0

    def hook(module: nn.Module, given: Any, output: Tensor) -> None:
        nonlocal seen
        seen += module.training
        if module.training and seen == step:
            act()

    model.register_forward_hook(hook)
    return model


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def interruptible() -> Any:
    """Ctrl-C works as in a terminal, whatever started the tests; and fit must leave it as it was."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    after = signal.signal(signal.SIGINT, before)
    assert after is signal.default_int_handler


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
    optimizer = torch.optim.AdamW(by_hand.parameters(), weight_decay=0.1)
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


# Ctrl-C


@pytest.mark.parametrize("make", [explicit, implicit])
def test_ctrl_c_keeps_the_last_epoch_and_resuming_equals_never_stopping(
    make: Callable[[], nn.Module], digits: Data, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = make()
    expected = fit(whole, digits, SHORT, progress=False)
    stopped = at_step(make(), 2 * STEPS + 4, press_ctrl_c)
    result = fit(stopped, digits, SHORT, out_dir=tmp_path / "here")
    assert result.interrupted
    assert (result.accuracy_validation, result.accuracy_test) == (None, None)
    assert untimed(result.history) == untimed(expected.history[:2])
    assert result.checkpoint is not None
    weights = torch.load(result.checkpoint, weights_only=True)["state_dict"]
    assert not all(torch.equal(weights[f"model.{k}"], v) for k, v in stopped.state_dict().items())
    moved = (tmp_path / "here").rename(tmp_path / "there")
    resumed = make()
    final = fit(resumed, digits, SHORT, out_dir=moved, resume=True)
    assert same(resumed, whole)
    assert untimed(final.history) == untimed(expected.history)
    assert (final.interrupted, final.accuracy_test) == (False, expected.accuracy_test)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("step", [1, STEPS])
def test_ctrl_c_in_the_first_epoch_keeps_the_initial_weights(step: int, digits: Data, tmp_path: Path) -> None:
    result = fit(at_step(explicit(), step, press_ctrl_c), digits, SHORT, out_dir=tmp_path, progress=False)
    assert result.interrupted
    assert (result.history, result.seconds_per_epoch) == ([], None)
    weights = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(weights[f"model.{k}"], v) for k, v in explicit().state_dict().items())
    resumed, whole = explicit(), explicit()
    fit(resumed, digits, SHORT, out_dir=tmp_path, resume=True, progress=False)
    fit(whole, digits, SHORT, progress=False)
    assert same(resumed, whole)


def test_a_second_ctrl_c_does_not_wait_for_the_step(digits: Data) -> None:
    reached = []

    def twice() -> None:
        press_ctrl_c()
        press_ctrl_c()
        reached.append("the rest of the step")

    assert fit(at_step(explicit(), 3, twice), digits, SHORT, progress=False).interrupted
    assert not reached


def test_ctrl_c_stays_ignored_in_a_background_job(digits: Data) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = fit(at_step(explicit(), 3, press_ctrl_c), digits, SHORT, progress=False)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert not result.interrupted


def test_other_errors_come_through(digits: Data, tmp_path: Path) -> None:
    def fail() -> None:
        raise ZeroDivisionError("of the user's own")

    def leave() -> None:
        sys.exit(3)

    with pytest.raises(ZeroDivisionError, match="of the user's own"):
        fit(at_step(explicit(), 3, fail), digits, SHORT, progress=False)
    with pytest.raises(SystemExit, match="3"):
        fit(at_step(explicit(), 3, leave), digits, SHORT, progress=False)


PROGRAM = """
import os, signal, sys, torch
from torch import nn
from equipoise.data import load_data
from equipoise.training import TrainingConfig, fit
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
steps = 0
def tell(module, given, output):
    global steps
    steps += module.training
    if steps == 25:
        print("training", flush=True)
model.register_forward_hook(tell)
config = TrainingConfig(epochs=int(sys.argv[1]), accelerator="cpu")
result = fit(model, load_data("digits"), config, sys.argv[2])
print(result.interrupted, len(result.history) >= 2, result.checkpoint.exists())
sys.exit(130 if result.interrupted else 0)
"""


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )


def test_ctrl_c_from_outside_ends_a_process_without_a_traceback(tmp_path: Path) -> None:
    process = start("100000", str(tmp_path))
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "True True True\n", "")


def test_a_kill_leaves_a_checkpoint_to_resume(digits: Data, tmp_path: Path) -> None:
    process = start("100000", str(tmp_path))
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n"
    process.kill()
    process.communicate(timeout=60)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert len(saved["equipoise"]["history"]) >= 1
    assert saved["epoch"] + 1 >= 1


def test_the_bar_is_drawn_on_stderr(tmp_path: Path) -> None:
    process = start("30", str(tmp_path), TTY_COMPATIBLE="1", TERM="xterm", COLUMNS="100")
    out, err = process.communicate(timeout=60)
    assert out == "training\nFalse True True\n"
    assert "epoch 30/30" in err
    assert "% right" in err


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


def test_resuming_with_another_configuration_says_which_field(digits: Data, tmp_path: Path) -> None:
    fit(explicit(), digits, SHORT, out_dir=tmp_path, progress=False)
    for change in ({"epochs": 5}, {"batch_size": 64}, {"seed": 3}):
        config = TrainingConfig(**{"epochs": 4, "learning_rate": 1e-2, "accelerator": "cpu", **change})  # type: ignore[arg-type]
        name, value = next(iter(change.items()))
        with pytest.raises(OptionError, match=f"written with {name}=.*not {value}"):
            fit(explicit(), digits, config, out_dir=tmp_path, resume=True)
    with pytest.raises(OptionError, match="other names or shapes"):
        fit(nn.Linear(64, 10), digits, SHORT, out_dir=tmp_path, resume=True)


def test_resuming_what_is_not_there_starts_at_the_beginning(digits: Data, tmp_path: Path) -> None:
    first, second = explicit(), explicit()
    fit(first, digits, SHORT, out_dir=tmp_path, resume=True, progress=False)
    fit(second, digits, SHORT, progress=False)
    assert same(first, second)


@pytest.mark.parametrize("content", ["truncated", "junk", "empty", "foreign", "pickled"])
def test_a_damaged_checkpoint_is_refused(content: str, digits: Data, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    if content == "truncated":
        fit(explicit(), digits, SHORT, out_dir=tmp_path, progress=False)
        path.write_bytes(path.read_bytes()[:-200])
    elif content in ("foreign", "pickled"):
        torch.save({"state_dict": {}} if content == "foreign" else {"equipoise": SHORT}, path)
    else:
        path.write_bytes(b"junk" * (content == "junk"))
    with pytest.raises(FileFormatError, match=r"last\.ckpt is not a checkpoint of this trainer, or damaged"):
        fit(explicit(), digits, SHORT, out_dir=tmp_path, resume=True)


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
