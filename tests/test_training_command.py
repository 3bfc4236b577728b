"""``equipoise train`` as it is typed: what it prints and writes, with which exit status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import equipoise as eq
from command_line import Capsys, run, run_json, write_models
from equipoise import training
from equipoise.data import load_data

SHORT = ["train", "--epochs", 2, "--features", 12, "--lr", 1e-2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("train")
    write_models(path)
    eq.save(nn.Sequential(eq.MonDEQ(64, 12), nn.Linear(12, 10)), path / "silent.safetensors")
    eq.save(nn.Sequential(eq.MonDEQ(64, 12), nn.Linear(12, 9)), path / "nine.safetensors")
    return path


def test_through_a_quantizer_the_file_holds_the_codes_that_were_trained(tmp_path: Path, capsys: Capsys) -> None:
    out = tmp_path / "o.safetensors"
    line = [*SHORT, "--scheme", "structured", "--bits", 2, "--skew-bits", 3, "--input-bits", 4, "--bias-bits", 8]
    found = run_json(capsys, *line, "--head-bits", 6, "--granularity", "row", "--seed", 4, "--out", out)
    keys = {"accuracy", "margin", "certified", "scheme", "bits", "seconds_per_epoch", "accuracy_test", "interrupted"}
    assert keys <= found.keys()
    assert (found["scheme"], found["bits"], found["skew_bits"], found["certified"]) == ("structured", 2, 3, True)
    model = eq.load(out)
    assert model[0].scheme == eq.Structured(  # type: ignore[index]
        2, skew_bits=3, input_bits=4, bias_bits=8, head_bits=6, granularity="row"
    )
    assert found["accuracy"] == found["accuracy_test"] == training.evaluate(model, load_data("digits").test)
    assert found["margin"] == eq.margin(model)
    assert found["size_bytes"] == eq.size(model)


def test_a_margin_is_reached_or_the_exit_status_says_no(tmp_path: Path, capsys: Capsys) -> None:
    line = [*SHORT, "--scheme", "assembled", "--bits", 3]
    met = run_json(capsys, *line, "--margin-target", 0.3, "--learn-scale", "--out", tmp_path / "met")
    assert met["target_met"] is True
    assert met["margin"] >= 0.3
    missed = run_json(capsys, *line, "--margin-target", 7, "--out", tmp_path / "missed", status=1)
    assert missed["target_met"] is False
    assert eq.margin(eq.load(tmp_path / "missed")) == missed["margin"] < 7
    status, out, err = run(capsys, *line, "--margin-target", 7, "--out", tmp_path / "again")
    assert status == 1
    assert re.search(r"target met +no", out)
    assert err == f"a margin of 7 was asked for, and only {missed['margin']:.6g} is proved\n"
    ratio = run_json(capsys, *line, "--margin-ratio", 0.5, "--margin-weight", 2, "--out", tmp_path / "ratio")
    assert ratio["target_met"] is True


def test_a_margin_that_is_lost_stops_with_exit_1(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [*SHORT, "--scheme", "assembled", "--bits", 4, "--stop-on-lost-margin", "--out", tmp_path / "o"]
    assert run_json(capsys, *line)["stopped"] is None
    monkeypatch.setattr("equipoise._lightning.lost_margin", bool)
    monkeypatch.setattr("equipoise.training.lost_margin", bool)
    status, _, err = run(capsys, *line, "--force")
    assert status == 1
    assert re.fullmatch(r"no positive margin is proved after epoch 1 of 2, only -?[\d.]+\n", err)


def test_it_starts_from_a_float_file(folder: Path, tmp_path: Path, capsys: Capsys) -> None:
    line = ["train", "--epochs", 1, "--lr", 1e-9, "--scheme", "structured", "--bits", 8, "--out", tmp_path / "o"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status, _, err = run(capsys, *line, "--from", folder / "silent.safetensors", "--features", 12)
    assert status == 0
    assert re.fullmatch(r"warning: .*silent\.safetensors does not say how its inputs were preprocessed.*\n", err)
    run_json(capsys, *line, "--from", folder / "float.safetensors", "--rank", 3, "--force")
    start, end = eq.load(folder / "float.safetensors"), eq.load(tmp_path / "o")
    change = torch.linalg.matrix_norm(start[0].weight.detach() - end[0].weight)  # type: ignore[index]
    assert float(change) < 0.05 * float(torch.linalg.matrix_norm(start[0].weight.detach()))  # type: ignore[index]


BAD = [
    ("--bits 4", "--bits needs a --scheme"),
    ("--granularity row", "--granularity needs a --scheme"),
    ("--learn-scale", "learn_scale needs a scheme"),
    ("--scheme structured", "needs bits"),
    ("--scheme rounded --bits 4", "rounded"),
    ("--scheme structured --bits 17", "17"),
    ("--scheme assembled --bits 4 --skew-bits 2", "skew_bits"),
    ("--scheme structured --bits 2 --scale best", "best"),
    ("--scheme structured --bits 2 --head-bits 0", "head_bits"),
    ("--margin-weight 2", "--margin-weight 2 needs"),
    ("--margin-target 0", "target=0.0"),
    ("--margin-target -1", "target=-1.0"),
    ("--margin-ratio 0.5", "needs a scheme"),
    ("--scheme assembled --bits 4 --margin-ratio nan", "ratio=nan"),
    ("--devices 0", "devices=0"),
    ("--nodes two", "two"),
    ("--nodes 2", "MASTER_ADDR"),
    ("--from absent", "absent"),
    ("--from garbage", "garbage"),
    ("--from small.safetensors", "holds codes"),
    ("--from small.safetensors --scheme structured --bits 2", "holds codes"),
    ("--from float.safetensors --features 13", "features=13: the network in float.safetensors has 12"),
    ("--from float.safetensors --rank 4", "rank=4"),
    ("--from float.safetensors --margin 0.3", "margin=0.3"),
    ("--from five.safetensors", "5"),
    ("--from nine.safetensors", "not (2, 10)"),
]


@pytest.mark.filterwarnings("ignore:.*preprocessed")
@pytest.mark.parametrize(("line", "words"), BAD, ids=[line for line, _ in BAD])
def test_bad_use_is_exit_2_and_writes_nothing(
    line: str, words: str, folder: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [__file__])  # a script that could be run again
    for name in ("LOCAL_RANK", "MASTER_ADDR", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    before = sorted(folder.iterdir())
    status, out, err = run(capsys, "train", "--epochs", 1, "--out", "o", *line.split())
    assert (status, out) == (2, "")
    assert words in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ")
    assert sorted(folder.iterdir()) == before


def test_a_resume_with_other_options_names_the_one_that_differs(tmp_path: Path, capsys: Capsys) -> None:
    line = [*SHORT, "--scheme", "structured", "--out", tmp_path / "o", "--log-dir", tmp_path / "run"]
    assert run(capsys, *line, "--bits", 2)[0] == 0
    for change, says in (
        (["--bits", 3], "recurrent.bits=2, not 3"),
        (["--bits", 2, "--margin-target", 0.1], "margin.target=None, not 0.1"),
        (["--bits", 2, "--seed", 5], "seed=0, not 5"),
    ):
        status, _, err = run(capsys, *line, *change, "--resume", "--force")
        assert (status, says in err) == (2, True), err


@pytest.mark.slow
def test_two_devices_make_one_file(tmp_path: Path) -> None:
    line = [*map(str, SHORT), "--scheme", "structured", "--bits", "3", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = []
    for devices in ("1", "2"):
        command = [sys.executable, "-m", "equipoise", *line, "--devices", devices, "--out", str(tmp_path / devices)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        found.append(json.loads(done.stdout))
    assert found[1]["margin"] == pytest.approx(found[0]["margin"], rel=1e-3)
    assert found[1]["accuracy"] == pytest.approx(found[0]["accuracy"], abs=0.01)
