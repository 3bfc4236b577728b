"""Runs of the ``equipoise`` command inside the test's own process, and files to run it on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import equipoise as eq
from equipoise.cli import main
from equipoise.data import load_data
from equipoise.presets import classifier

Capsys = pytest.CaptureFixture[str]


def run(capsys: Capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command line."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def run_json(capsys: Capsys, *arguments: object, status: int = 0) -> dict[str, Any]:
    """The one object on stdout, read strictly."""
    found, out, _ = run(capsys, *arguments, "--json")
    assert found == status
    assert out.endswith("}\n")
    value = json.loads(out, parse_constant=pytest.fail)
    assert isinstance(value, dict)
    return value


def write_models(path: Path) -> None:
    """Into ``path``: ``float`` and ``small`` (structured, 2 bits), ``lost`` (not certified), ``five`` (features), all
    ``.safetensors``; and two files that are something else."""
    torch.manual_seed(0)
    model = classifier(load_data("digits"), 12, rank=3, margin=0.3).eval()
    eq.save(model, path / "float.safetensors")
    eq.save(eq.quantize(model, eq.Structured(bits=2)), path / "small.safetensors")
    W = torch.diag(torch.linspace(-1, 1.3, 12))
    lost = eq.MonDEQ.from_weights(W, torch.randn(12, 64), torch.zeros(12), check=False)
    eq.save(nn.Sequential(lost, nn.Linear(12, 10)), path / "lost.safetensors")
    eq.save(eq.MonDEQ(5, 4), path / "five.safetensors")
    (path / "garbage").write_bytes(os.urandom(4096))
    (path / "truncated").write_bytes((path / "float.safetensors").read_bytes()[:900])
