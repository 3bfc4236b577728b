"""Training that ends early: Ctrl-C, a kill at any moment, and going on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import equipoise as eq
from equipoise.data import Data, load_data
from equipoise.errors import FileFormatError, OptionError
from equipoise.training import TrainingConfig, fit
from trainings import SHORT, STEPS, at_step, explicit, implicit, same, untimed


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def interruptible() -> Any:
    """Ctrl-C works as in a terminal, whatever started the tests; and fit must leave it as it was."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    after = signal.signal(signal.SIGINT, before)
    assert after is signal.default_int_handler


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


KILLED = """
import os, signal, sys, torch
from torch import nn
import equipoise as eq
from equipoise.data import load_data
from equipoise.training import TrainingConfig, fit
torch.set_num_threads(1)
out, kind, stop = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.manual_seed(0)
layer = eq.MonDEQ(64, 16, rank=4, margin=0.5, learn_margin=True)
model = nn.Sequential(layer, nn.Dropout(0.2), nn.Linear(16, 10))
schemes = {
    "structured": eq.Structured(2, input_bits=3, head_bits=4),
    "learned": eq.Assembled(3, input_bits=3),
    "margin": eq.Assembled(3, scale="mse"),
}
if kind in schemes:
    model = eq.prepare_qat(model, schemes[kind], learn_scale=kind == "learned")
seen = 0
def count(module, given, output):
    global seen
    seen += module.training
    if stop and seen == stop:
        os.kill(os.getpid(), signal.SIGKILL)
model[2].register_forward_hook(count)
margin = eq.MarginPenalty(0.1) if kind == "margin" else None
config = TrainingConfig(3, batch_size=16, learning_rate=1e-2, accelerator="cpu", margin=margin)
fit(model, load_data("digits"), config, out, progress=False, resume=True)
torch.save(model.state_dict(), out + "/weights.pt")
"""
EPOCH = 79  # steps: more than the calls after which a layer looks for its solver's step again


def trained(folder: Path, kind: str, stop: int) -> int:
    command = [sys.executable, "-c", KILLED, str(folder), kind, str(stop)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, check=False)
    return done.returncode


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "structured", "learned", "margin"])
def test_after_kill_9_at_any_moment_the_weights_are_those_of_an_unbroken_run(kind: str, tmp_path: Path) -> None:
    """Killed in the first step of epoch 2 (after epoch 1), then in the middle of it, bit for bit."""
    assert trained(tmp_path / "whole", kind, 0) == 0
    assert trained(tmp_path / "killed", kind, EPOCH + 1) == -signal.SIGKILL
    assert len(torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)["equipoise"]["history"]) == 1
    assert trained(tmp_path / "killed", kind, EPOCH // 2) == -signal.SIGKILL
    assert trained(tmp_path / "killed", kind, 0) == 0
    whole, resumed = (torch.load(tmp_path / name / "weights.pt") for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert [name for name, value in whole.items() if not torch.equal(value, resumed[name])] == []
    rows = (tmp_path / "killed" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 3


def test_a_table_lost_to_a_kill_is_written_by_the_next_run(digits: Data, tmp_path: Path) -> None:
    result = fit(explicit(), digits, SHORT, out_dir=tmp_path, progress=False)
    (tmp_path / "metrics.csv").unlink()
    again = fit(explicit(), digits, SHORT, out_dir=tmp_path, resume=True, progress=False)
    assert again.history == result.history
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + 4


def test_the_bar_is_drawn_on_stderr(tmp_path: Path) -> None:
    process = start("30", str(tmp_path), TTY_COMPATIBLE="1", TERM="xterm", COLUMNS="100")
    out, err = process.communicate(timeout=60)
    assert out == "training\nFalse True True\n"
    assert "epoch 30/30" in err
    assert "% right" in err


# Which checkpoint


def test_resuming_with_another_configuration_says_which_field(digits: Data, tmp_path: Path) -> None:
    fit(explicit(), digits, SHORT, out_dir=tmp_path, progress=False)
    for change in ({"epochs": 5}, {"batch_size": 64}, {"seed": 3}):
        config = TrainingConfig(**{"epochs": 4, "learning_rate": 1e-2, "accelerator": "cpu", **change})  # type: ignore[arg-type]
        name, value = next(iter(change.items()))
        with pytest.raises(OptionError, match=f"written with {name}=.*not {value}"):
            fit(explicit(), digits, config, out_dir=tmp_path, resume=True)


def test_resuming_with_another_model_says_which_field(digits: Data, tmp_path: Path) -> None:
    def prepared(bits: int = 3, **options: Any) -> nn.Module:
        return eq.prepare_qat(implicit(), eq.Assembled(bits, **options))

    penalized = replace(SHORT, epochs=1, margin=eq.MarginPenalty(0.1))
    fit(prepared(), digits, penalized, out_dir=tmp_path, progress=False)
    wider = nn.Sequential(eq.MonDEQ(64, 17, rank=4, margin=0.5, learn_margin=True), nn.Linear(17, 10))
    lower = nn.Sequential(eq.MonDEQ(64, 16, rank=3, margin=0.5, learn_margin=True), nn.Linear(16, 10))
    structured = eq.prepare_qat(implicit(), eq.Structured(3))
    others = (
        (prepared(bits=2), penalized, "recurrent.bits=3, not 2"),
        (prepared(granularity="row"), penalized, "recurrent.granularity='tensor', not 'row'"),
        (structured, penalized, "recurrent.scheme='assembled', not 'structured'"),
        (implicit(), penalized, "recurrent.scheme='assembled', not None"),
        (eq.prepare_qat(wider, eq.Assembled(3)), penalized, "0.features=16, not 17"),
        (eq.prepare_qat(lower, eq.Assembled(3)), penalized, "rank=4, not 3"),
        (prepared(), replace(penalized, margin=eq.MarginPenalty(0.2)), "margin.target=0.1, not 0.2"),
        (prepared(), replace(penalized, margin=None), "margin.target=0.1, not None"),
    )
    for model, config, says in others:
        with pytest.raises(OptionError, match=f"was written with .*{says}: resume with the same"):
            fit(model, digits, config, out_dir=tmp_path, resume=True)
    harmless = replace(penalized, stop_on_lost_margin=True)
    fit(prepared(), digits, harmless, out_dir=tmp_path, resume=True, progress=False)


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
