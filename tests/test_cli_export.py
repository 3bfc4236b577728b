"""``equipoise export``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import equipoise as eq
from command_line import Capsys, run, run_json
from equipoise import runtime
from shipping import INPUTS, need_compiler, network, quantized

KEYS = {"steps", "error_bound", "displacement_bound", "rounding_bound", "truncation_bound", "ram_bytes", "flash_bytes"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    eq.save(quantized(network(), eq.Cayley(bits=8, input_bits=8, head_bits=8)), tmp_path / "q.safetensors")
    eq.save(network(), tmp_path / "float.safetensors")
    return tmp_path / "q.safetensors"


def test_a_file_becomes_a_folder_that_runs(model: Path, tmp_path: Path, capsys: Capsys) -> None:
    found = run_json(capsys, "export", model, "--target", "c", "--out", tmp_path / "net")
    assert KEYS | {"macs", "certified", "out"} <= found.keys()
    stored = json.loads((tmp_path / "net" / "certificate.json").read_text())
    assert stored["error_bound"] == found["error_bound"] > 0
    total = found["displacement_bound"] + found["rounding_bound"] + found["truncation_bound"]
    assert found["error_bound"] == pytest.approx(total)
    need_compiler()
    assert np.isfinite(runtime.load(tmp_path / "net")(np.zeros((2, INPUTS)))).all()


def test_words_and_options(model: Path, tmp_path: Path, capsys: Capsys) -> None:
    reference = model.with_name("float.safetensors")
    status, out, _ = run(
        capsys, "export", model, "--target", "c", "--out", tmp_path / "a", "--mode", "cayley", "--reference", reference,
        "--input-range", 0, 200, "--activation-bits", 8, "--tol", 1000,
    )  # fmt: skip
    assert status == 0
    assert "reference network" in out
    assert "RAM" in out
    assert f"cd {tmp_path / 'a'} && cc -std=c99 -O2 eqnet.c selftest.c -o selftest && ./selftest" in out
    alone = run_json(capsys, "export", model, "--target", "c", "--out", tmp_path / "b")
    compared = run_json(capsys, "export", model, "--target", "c", "--out", tmp_path / "d", "--reference", reference)
    assert compared["displacement_bound"] > 1e-3 > alone["displacement_bound"] >= 0


def test_structured_codes_and_graphs(tmp_path: Path, capsys: Capsys) -> None:
    file = tmp_path / "s.safetensors"
    eq.save(quantized(network(), eq.Structured(bits=1, input_bits=1, head_bits=8)), file)
    found = run_json(capsys, "export", file, "--target", "c", "--mode", "factored", "--out", tmp_path / "c")
    assert (found["mode"], found["certified"]) == ("factored", True)
    pytest.importorskip("onnx")
    graph = run_json(capsys, "export", file, "--target", "onnx", "--out", tmp_path / "onnx")
    assert 0 < graph["error_bound"] < found["error_bound"]
    assert (tmp_path / "onnx" / "loop.onnx").is_file()


def test_bad_use_is_one_line_and_two(model: Path, tmp_path: Path, capsys: Capsys) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    base = ("export", model, "--target", "c", "--out", tmp_path / "o")
    bare = tmp_path / "bare.safetensors"
    eq.save(quantized(network(preprocessing=None), eq.Cayley(bits=8)), bare)
    for arguments, words in (
        (("export", model, "--target", "c", "--out", tmp_path / "full"), "--force"),
        (("export", bare, "--target", "c", "--out", tmp_path / "o"), "--input-range LO HI"),
        (("export", model.with_name("float.safetensors"), "--target", "c", "--out", tmp_path / "o"), "--scheme cayley"),
        ((*base, "--tol", "1e-12"), "rounding of this grid"),
        ((*base, "--activation-bits", "4"), "8 and 16"),
        ((*base, "--mode", "factored"), "structured"),
        ((*base, "--input-range", "5", "1"), "LO < HI"),
        (("export", tmp_path / "none", "--target", "c", "--out", tmp_path / "o"), "none"),
        (("export", model, "--target", "rust", "--out", tmp_path / "o"), "rust"),
    ):
        status, out, err = run(capsys, *arguments)
        assert status == 2
        assert out == ""
        assert words in err
        assert err.count("\n") == 1
        assert not (tmp_path / "o").exists()


def test_what_is_not_certified(model: Path, tmp_path: Path, capsys: Capsys) -> None:
    q = eq.load(model)
    q[0].recurrent.C.scale.mul_(3)  # type: ignore[index, union-attr]
    eq.save(q, tmp_path / "lost.safetensors")
    status, _, err = run(capsys, "export", tmp_path / "lost.safetensors", "--target", "c", "--out", tmp_path / "x")
    assert status == 2
    assert "not certified" in err
    status, out, err = run(
        capsys, "export", tmp_path / "lost.safetensors", "--target", "c", "--out", tmp_path / "x", "--uncertified"
    )
    assert status == 0
    assert "UNCERTIFIED" in err
    assert "NO" in out
