"""Several processes that train as one: the parts they get, and that nothing but the time differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from equipoise import _machines
from equipoise.data import Batches, Split, load_data
from equipoise.errors import OptionError
from equipoise.training import TrainingConfig, fit
from trainings import explicit


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("samples", "ranks"), [(32, 2), (33, 2), (37, 3), (34, 5), (7, 8), (1, 2)])
def test_parts_make_up_every_batch_with_weights_that_make_the_mean(samples: int, ranks: int, shuffle: bool) -> None:
    split = Split(torch.arange(float(samples))[:, None], torch.arange(samples))
    whole = Batches(split, 16, shuffle, seed=3)
    shares = [Batches(split, 16, shuffle, seed=3) for _ in range(ranks)]
    for rank, batches in enumerate(shares):
        batches.share(rank, ranks)
        assert len(batches) == len(whole)
    for index, ((x, y), *parts) in enumerate(zip(whole, *shares, strict=True)):
        own = [part for batches, part in zip(shares, parts, strict=True) if batches.weight(index)]
        assert torch.equal(torch.cat([part[0] for part in own]), x)
        assert torch.equal(torch.cat([part[1] for part in own]), y)
        assert all(len(part[0]) for part in parts)  # who has nothing would leave the others waiting
        assert max(len(part[0]) for part in own) - min(len(part[0]) for part in own) <= 1
        mean = sum(b.weight(index) * p[0].mean() for b, p in zip(shares, parts, strict=True)) / ranks
        torch.testing.assert_close(torch.as_tensor(mean), x.mean())


def test_one_process_gets_everything() -> None:
    batches = Batches(Split(torch.zeros(10, 1), torch.zeros(10, dtype=torch.int64)), 4)
    assert [batches.weight(index) for index in range(3)] == [1.0, 1.0, 1.0]
    assert _machines.world() == (0, 1)
    assert _machines.anyone(True)
    assert not _machines.anyone(False)


def test_machines_that_would_wait_for_ever_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = load_data("digits")
    monkeypatch.setattr(sys, "argv", [__file__])  # a script that could be run again
    for name in (*_machines.NAMES, "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(OptionError, match=r"nodes=2.*MASTER_ADDR, MASTER_PORT, NODE_RANK not set"):
        fit(explicit(), digits, TrainingConfig(1, nodes=2), progress=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["-c"])
    with pytest.raises(OptionError, match=r"devices=2.*put the lines in a file"):
        fit(explicit(), digits, TrainingConfig(1, devices=2), progress=False)
    monkeypatch.setattr(_machines, "_done", [2])
    with pytest.raises(OptionError, match="a second training"):
        fit(explicit(), digits, TrainingConfig(1, devices=2), progress=False)


SCRIPT = """
import json, os, signal, sys, threading, torch
import equipoise as eq
from torch import nn
from equipoise.data import Data, Split, load_data
from equipoise.training import TrainingConfig, fit
torch.set_num_threads(1)
devices, out, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
data = load_data("digits")
few = Split(data.train.x[:1025], data.train.y[:1025])  # eight batches of 128, and one of a single sample
data = Data(data.name, few, data.validation, data.test, data.preprocessing, data.classes)
torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)))  # all start from the weights of the first
model = nn.Sequential(eq.MonDEQ(64, 16, rank=4, margin=0.5, learn_margin=True), nn.Linear(16, 10)).double()
margin = None
if kind == "margin":
    model, margin = eq.prepare_qat(model, eq.Assembled(4)), eq.MarginPenalty(0.2)
if kind == "interrupted" and os.environ.get("LOCAL_RANK") is None:  # only one is told
    threading.Timer(6.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
epochs = 100_000 if kind == "interrupted" else 3
config = TrainingConfig(epochs, learning_rate=1e-2, accelerator="cpu", devices=devices, margin=margin, tol=None)
result = fit(model, data, config, out, progress=False)
torch.save({"weights": model.state_dict(), "history": result.history}, out + "/done.pt")
left = [name for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT") if name in os.environ]
print(json.dumps({"interrupted": result.interrupted, "accuracy": result.accuracy_test, "left": left}))
"""


def run(folder: Path, devices: int, kind: str) -> dict[str, object]:
    """What the one process that returns prints."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    clean = {name: value for name, value in os.environ.items() if name not in _machines.NAMES}
    command = [sys.executable, str(script), str(devices), str(folder / str(devices)), kind]
    environment = {**clean, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    value = json.loads(line)
    assert isinstance(value, dict)
    return value


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "margin"])
def test_two_processes_are_one(kind: str, tmp_path: Path) -> None:
    one, two = run(tmp_path, 1, kind), run(tmp_path, 2, kind)
    assert one == two
    alone, both = (torch.load(tmp_path / name / "done.pt", weights_only=True) for name in ("1", "2"))
    for name, value in alone["weights"].items():
        torch.testing.assert_close(both["weights"][name], value, rtol=1e-6, atol=1e-9)
    for row, other in zip(alone["history"], both["history"], strict=True):
        for name in row.keys() - {"seconds"}:
            assert other[name] == pytest.approx(row[name], rel=1e-6)
    assert sorted(p.name for p in (tmp_path / "2").iterdir()) == ["done.pt", "last.ckpt", "metrics.csv", "tensorboard"]
    saved = torch.load(tmp_path / "2" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[f"model.{name}"], value) for name, value in both["weights"].items())


@pytest.mark.slow
def test_ctrl_c_in_one_process_ends_them_all(tmp_path: Path) -> None:
    assert run(tmp_path, 2, "interrupted")["interrupted"] is True
