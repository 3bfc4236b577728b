"""The command line through its entry point: what it prints where, and with which exit status."""

from __future__ import annotations

import json
import re
import signal
import warnings
from pathlib import Path

import pytest
import torch

import equipoise as eq
from command_line import Capsys, run, run_json, write_models
from equipoise import _lightning, training
from equipoise.data import Preprocessing, load_data
from equipoise.presets import classifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    write_models(path)
    return path


# Help, version


def test_help_and_version(capsys: Capsys) -> None:
    status, out, _ = run(capsys, "--version")
    assert status == 0
    assert re.fullmatch(r"equipoise \d\S*\n", out)
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for command in ("demo", "train", "import", "quantize", "certify", "plan", "bench"):
        assert command in out
        assert run(capsys, command, "--help")[0] == 0


def test_help_has_a_box_per_subject(capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = run(capsys, "train", "--help")[1]
    subjects = "Options", "Which network", "How it is trained", "How weights are rounded", "What is asked of it"
    assert [title for title in subjects if title not in out] == []
    assert re.search(r"--force\s+Replace what exists", out), "a flag has no value to describe"


def test_what_the_parser_refuses_is_said_without_its_own_words(capsys: Capsys) -> None:
    status, _, err = run(capsys, "reproduce", "li2027")
    assert status == 2
    assert "'li2027' is not one of 'li2026'" in err
    assert "Value error" not in err


def test_no_command_shows_the_help_and_is_bad_use(capsys: Capsys) -> None:
    status, out, _ = run(capsys)
    assert status == 2
    assert "Usage" in out


# What commands do


def test_certify_proves_alone_with_a_reference_and_on_data(folder: Path, capsys: Capsys) -> None:
    small, original = folder / "small.safetensors", folder / "float.safetensors"
    alone = run_json(capsys, "certify", small)
    assert (alone["certified"], alone["verdict"], alone["delta_norm"]) == (True, "certified", None)
    beside = run_json(capsys, "certify", small, "--reference", original)
    assert beside["delta_norm"] > 0
    assert beside["displacement"] is None
    full = run_json(capsys, "certify", small, "--reference", original, "--data", "digits", "--limit", 7)
    assert len(full["displacement"]) == 7
    status, out, err = run(capsys, "certify", small, "--require")
    assert (status, err) == (0, "")
    assert re.search(r"verdict\s+certified", out)


def test_a_margin_that_is_lost_is_exit_1_only_where_it_is_required(folder: Path, capsys: Capsys) -> None:
    lost = folder / "lost.safetensors"
    found = run_json(capsys, "certify", lost)
    assert (found["certified"], found["verdict"]) == (False, "unknown")
    assert found["margin"] == pytest.approx(-0.3)
    assert run_json(capsys, "certify", lost, "--require", status=1) == found
    _, _, err = run(capsys, "certify", lost, "--require")
    assert re.fullmatch(r"not certified: .*−0\.3\d*\n", err)


def test_quantize_writes_codes_with_their_certificate(folder: Path, tmp_path: Path, capsys: Capsys) -> None:
    line = ["quantize", folder / "float.safetensors", "--scheme", "compensated", "--bits", 3, "--margin", 0.2]
    found = run_json(capsys, *line, "--input-bits", 8, "--out", tmp_path / "o")
    assert (found["scheme"], found["bits"], found["input_bits"], found["certified"]) == (
        "compensated",
        3,
        8,
        True,
    )
    assert found["margin"] >= 0.2 * (1 - 1e-6)  # of the float32 matrix multiplied by as well
    model = eq.load(tmp_path / "o")
    assert found["size_bytes"] == eq.size(model) < eq.size(eq.load(folder / "float.safetensors"))
    assert eq.margin(model) == found["margin"]
    status, out, _ = run(capsys, *line, "--out", tmp_path / "o", "--force")
    assert status == 0
    assert "margin, at least" in out


def test_import_takes_in_a_foreign_state_dict(tmp_path: Path, capsys: Capsys) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (2, 4), "S": (4, 4), "m_raw": (), "U": (4, 6), "b": (4,)}
    state = {f"mon.core.{key}": torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    state |= {"classifier.weight": torch.randn(3, 4, generator=generator), "classifier.bias": torch.zeros(3)}
    torch.save(state, tmp_path / "foreign.pt")
    found = run_json(capsys, "import", tmp_path / "foreign.pt", "--format", "mondeq-quant", "--out", tmp_path / "o")
    assert found["certified"] is True
    assert eq.margin(eq.load(tmp_path / "o")) == found["margin"]


def test_plan_prints_and_writes_the_same_ladder(folder: Path, tmp_path: Path, capsys: Capsys) -> None:
    line = ["plan", folder / "float.safetensors", "--data", "digits", "--schemes", "structured,assembled"]
    line += ["--bits", "8,3-2", "--input-bits", 8, "--max-displacement", 1000]
    files = ["--out", tmp_path / "l.json", "--report", tmp_path / "r.html", "--save", tmp_path / "m"]
    found = run_json(capsys, *line, *files)
    assert found == json.loads((tmp_path / "l.json").read_text())
    order = [(rung["scheme"], rung["bits"], rung["input_bits"]) for rung in found["rungs"]]
    assert order == [(s, b, 8) for s in ("structured", "assembled") for b in (8, 3, 2)]
    assert found["requirements"] == {"max_displacement": 1000.0}
    chosen = found["rungs"][found["chosen"]]
    assert eq.size(eq.load(tmp_path / "m")) == chosen["size_bytes"]
    assert (tmp_path / "m").stat().st_size < 10 * chosen["size_bytes"]
    assert f"at {chosen['bits']}\xa0bits keeps the guarantee" in (tmp_path / "r.html").read_text("utf-8")
    status, out, err = run(capsys, *line)
    assert (status, err) == (0, "")
    assert f"at {chosen['bits']} bits keeps the guarantee" in out
    assert "model    " not in out
    out = run(capsys, *line, "--save", tmp_path / "again")[1]
    assert out.endswith(f"model    {tmp_path / 'again'}\n")


def test_plan_without_a_rung_that_fits_is_exit_1(folder: Path, tmp_path: Path, capsys: Capsys) -> None:
    line = ["plan", folder / "float.safetensors", "--data", "digits", "--bits", "2", "--max-bytes", 1]
    found = run_json(capsys, *line, "--save", tmp_path / "m", status=1)
    assert found["chosen"] is None
    assert not (tmp_path / "m").exists()
    _, out, err = run(capsys, *line)
    assert "No version keeps everything" in out
    assert err == "no rung is certified and meets every requirement\n"


def test_a_warning_is_one_line_on_stderr(tmp_path: Path, capsys: Capsys) -> None:
    model = classifier(load_data("digits"), 8, rank=2)
    model.preprocessing = Preprocessing(0.5, 1.0, 16.0, (8, 8))  # type: ignore[assignment]
    eq.save(model, tmp_path / "other")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status, _, err = run(capsys, "certify", tmp_path / "other", "--data", "digits", "--limit", 3)
    assert status == 0
    assert re.fullmatch(r"warning: the model was trained on inputs .*mean=0\.5.*\n", err)


def test_train_saves_a_certified_model_and_its_log(tmp_path: Path, capsys: Capsys) -> None:
    out = tmp_path / "digits.safetensors"
    line = ["train", "--data", "digits", "--epochs", 1, "--features", 12, "--seed", 3, "--out", out]
    found = run_json(capsys, *line)
    assert found["certified"] is True
    assert found["interrupted"] is False
    assert 0 <= found["accuracy_test"] <= 1
    assert (tmp_path / "digits.run" / "last.ckpt").exists()
    model = eq.load(out)
    assert model.preprocessing == load_data("digits").preprocessing
    assert training.evaluate(model, load_data("digits").test) == found["accuracy_test"]
    assert run(capsys, *line)[0] == 2
    again = run_json(capsys, *line, "--force")
    assert again["accuracy_test"] == found["accuracy_test"]


def test_ctrl_c_in_training_is_exit_130_and_can_be_resumed(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = _lightning.Classifier.on_validation_end
    left = [1]

    def pressed(self: _lightning.Classifier) -> None:
        real(self)
        if left:
            left.pop()
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(_lightning.Classifier, "on_validation_end", pressed)
    out = tmp_path / "o.safetensors"
    line = ["train", "--epochs", 3, "--features", 8, "--out", out]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        status, _, err = run(capsys, *line)
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 130
    assert "--resume" in err
    assert "Traceback" not in err
    assert not out.exists()
    assert (tmp_path / "o.run" / "last.ckpt").exists()
    assert run(capsys, *line)[0] == 2  # a checkpoint is not thrown away unasked
    assert run_json(capsys, *line, "--resume")["interrupted"] is False
    assert out.exists()


def test_ctrl_c_elsewhere_is_exit_130(folder: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("equipoise.files.load", interrupted)
    assert run(capsys, "certify", folder / "float.safetensors")[:2] == (130, "")
