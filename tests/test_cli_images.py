"""Networks for images on the command line: quantized, certified input by input, and refused where nothing is built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import equipoise as eq
from equipoise.cli import main
from equipoise.data import load_data
from equipoise.presets import Sizes, preset_of


@pytest.fixture(scope="module", params=["monconv", "multitier", "lmdeq"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = preset_of(request.param, "tiny" if request.param == "lmdeq" else None).build(load_data("digits"), Sizes())
    path = tmp_path_factory.mktemp(request.param) / "float.safetensors"
    eq.save(model.eval(), path)
    return path


def test_codes_are_certified_input_by_input(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "q.safetensors"
    assert main(["quantize", str(file), "--scheme", "structured", "--bits", "8", "--out", str(small), "--json"]) == 0
    capsys.readouterr()
    arguments = ["certify", str(small), "--reference", str(file), "--data", "digits", "--limit", "6", "--json"]
    assert main([*arguments, "--require"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["certified"] is True
    assert len(found["displacement"]) == 6
    assert all(moved > 0 for moved in found["displacement"])
    assert all(a <= b for a, b in zip(found["actual_displacement"], found["displacement"], strict=True))


def test_what_is_not_built_is_refused(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["plan", str(file), "--data", "digits", "--out", str(tmp_path / "plan")],
        ["certify", str(file), "--data", "digits", "--eps-inf", "0.1"],
        ["export", str(file), "--target", "onnx", "--out", str(tmp_path / "onnx")],
    ):
        assert main(arguments) == 2
        assert "network for images" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_data_of_another_size_is_refused(file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = eq.load(file)
    alone = tmp_path / "alone.safetensors"
    eq.save(other[1] if isinstance(other, torch.nn.Sequential) else other, alone)
    assert main(["certify", str(alone), "--data", "digits"]) == 2
    assert "Unflatten" in capsys.readouterr().err
