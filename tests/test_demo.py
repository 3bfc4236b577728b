"""The demo, run once for real: what it writes holds, and it spoils nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import equipoise as eq
from command_line import Capsys, run
from equipoise import demo, training
from equipoise.cli import main
from equipoise.data import load_data


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """One run of the real demo: its folder and exit status."""
    target = tmp_path_factory.mktemp("demo") / "demo"
    return target, main(["demo", "--out", str(target)])


def test_the_demo_writes_what_it_found(shown: tuple[Path, int]) -> None:
    target, status = shown
    assert status == 0
    names = ["float.safetensors", "ladder.json", "model.safetensors", "report.html"]
    assert sorted(path.name for path in target.iterdir()) == names
    assert [path.name for path in target.parent.iterdir()] == ["demo"]  # no scratch is left
    ladder = json.loads((target / "ladder.json").read_text(), parse_constant=pytest.fail)
    assert len(ladder["rungs"]) == 32
    chosen = ladder["rungs"][ladder["chosen"]]
    model, original = eq.load(target / "model.safetensors"), eq.load(target / "float.safetensors")
    assert eq.size(model) == chosen["size_bytes"]
    proof = eq.certify(model, reference=original, inputs=load_data("digits").test.x)
    assert proof.certified
    assert proof.margin == chosen["margin"]
    assert proof.agreement == chosen["agreement"]
    assert ladder["requirements"] == {"min_agreement": 0.9}


def test_the_demo_shows_that_structure_keeps_the_margin_and_plain_rounding_does_not(
    shown: tuple[Path, int],
) -> None:
    target, _ = shown
    rungs = json.loads((target / "ladder.json").read_text())["rungs"]
    original = eq.margin(eq.load(target / "float.safetensors"))
    structured = [rung for rung in rungs if rung["scheme"] == "structured"]
    assert all(rung["margin"] > 0.999 * original for rung in structured)
    assert any(rung["verdict"] != "certified" for rung in rungs if rung["scheme"] == "assembled")
    assert min(rung["accuracy"] for rung in structured) > 0.85


def test_the_demo_replaces_its_own_files_and_no_others(
    shown: tuple[Path, int], capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, _ = shown
    mine = target / "mine.txt"
    mine.write_text("mine")
    before = (target / "report.html").read_bytes()
    assert run(capsys, "demo", "--out", target)[0] == 2
    monkeypatch.setattr(demo, "fit", _interrupted)
    assert run(capsys, "demo", "--out", target, "--force")[0] == 130
    assert (target / "report.html").read_bytes() == before
    assert mine.read_text() == "mine"
    mine.unlink()


def test_a_folder_that_refuses_files_is_known_before_the_work(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(demo, "load_data", pytest.fail)
    status, _, complaint = run(capsys, "demo", "--out", tmp_path / "demo")
    assert status == 2
    assert "Read-only" in complaint


def _interrupted(*_: object, **__: object) -> training.FitResult:
    return training.FitResult(None, None, None, [], True, None)
