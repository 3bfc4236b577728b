"""Bad use and bad input on the command line: exit 2, one line on stderr, nothing on stdout, nothing written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import Capsys, run, write_models
from equipoise.cli import common


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    write_models(path)
    return path


BAD = [
    ("nonsense", "nonsense"),
    ("certify", "FILE"),
    ("certify absent.safetensors", "absent.safetensors"),
    ("certify garbage", "garbage"),
    ("certify truncated", "truncated"),
    ("certify float.safetensors --reference garbage", "garbage"),
    ("certify float.safetensors --reference five.safetensors", "the reference"),
    ("certify five.safetensors --data digits", "5 features and digits has 64"),
    ("certify float.safetensors --data letters", "letters"),
    ("certify float.safetensors --data digits --split all", "all"),
    ("certify float.safetensors --data digits --limit 0", "0"),
    ("certify float.safetensors --frobnicate", "--frobnicate"),
    ("quantize float.safetensors --scheme structured --bits 4", "--out"),
    ("quantize float.safetensors --scheme structured --bits 0 --out o", "0"),
    ("quantize float.safetensors --scheme structured --bits -1 --out o", "-1"),
    ("quantize float.safetensors --scheme structured --bits 2.5 --out o", "2.5"),
    ("quantize float.safetensors --scheme structured --bits=many --out o", "many"),
    ("quantize float.safetensors --scheme structured --bits 40 --out o", "40"),
    ("quantize float.safetensors --scheme rounded --bits 4 --out o", "rounded"),
    ("quantize float.safetensors --scheme assembled --bits 4 --margin 0.1 --out o", "margin"),
    ("quantize float.safetensors --scheme compensated --bits 4 --margin -1 --out o", "-1"),
    ("quantize float.safetensors --scheme assembled --bits 4 --scale best --out o", "best"),
    ("quantize small.safetensors --scheme assembled --bits 4 --out o", "quantized already"),
    ("quantize float.safetensors --scheme assembled --bits 4 --out small.safetensors", "--force"),
    ("quantize float.safetensors --scheme assembled --bits 4 --out no/o", "does not exist"),
    ("quantize absent --scheme assembled --bits 4 --out o", "absent"),
    ("train --epochs 1", "--out"),
    ("train --epochs 0 --out o", "epochs=0"),
    ("train --epochs 1 --lr -1 --out o", "learning_rate=-1.0"),
    ("train --epochs 1 --batch-size 0 --out o", "batch_size=0"),
    ("train --epochs 1 --seed -1 --out o", "seed=-1"),
    ("train --epochs 1 --features 0 --out o", "features"),
    ("train --epochs 1 --features 8 --rank 9 --out o", "9"),
    ("train --epochs 1 --margin 0 --out o", "margin"),
    ("train --epochs 1 --data letters --out o", "letters"),
    ("train --epochs 1 --model transformer --out o", "transformer"),
    ("train --epochs 1 --out float.safetensors", "--force"),
    ("train --data mnist --data-dir nowhere --epochs 1 --out o", "EQUIPOISE_DATA"),
    ("import float.safetensors --format keras --out o", "keras"),
    ("import garbage --format mondeq-quant --out o", "garbage"),
    ("import absent --format mondeq-quant --out o", "absent"),
    ("import float.safetensors --format mondeq-quant --out o", "float.safetensors"),
    ("plan float.safetensors", "--data"),
    ("plan absent --data digits", "absent"),
    ("plan five.safetensors --data digits", "5 features and digits has 64"),
    ("plan float.safetensors --data digits --bits 8:1", "8:1"),
    ("plan float.safetensors --data digits --bits 0", "0"),
    ("plan float.safetensors --data digits --bits 1-99999999999", "99999999999"),
    ("plan float.safetensors --data digits --schemes structured,rounded", "rounded"),
    ("plan float.safetensors --data digits --min-agreement 95", "min_agreement=95.0"),
    ("plan float.safetensors --data digits --max-displacement -1", "max_displacement=-1.0"),
    ("plan float.safetensors --data digits --max-bytes 0", "max_bytes=0"),
    ("plan float.safetensors --data digits --out float.safetensors", "--force"),
    ("plan float.safetensors --data digits --report no/report.html", "does not exist"),
    ("plan float.safetensors --data mnist --data-dir nowhere", "--data-dir"),
    ("plan small.safetensors --data digits --bits 4", "quantized already"),
    ("demo --out float.safetensors", "not a folder"),
    ("demo --out .", "--force"),
    ("demo --out no/demo", "does not exist"),
    ("bench --checkpoint absent", "absent"),
    ("bench speed", "no part 'speed'"),
]


@pytest.mark.parametrize(("line", "words"), BAD, ids=[line for line, _ in BAD])
def test_bad_use_is_one_line_on_stderr_and_exit_2(
    line: str, words: str, folder: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    before = sorted(path.name for path in folder.iterdir())
    status, out, err = run(capsys, *line.split())
    assert status == 2
    assert out == ""
    assert re.fullmatch(r"error: \S.*\n", err), err
    assert words in err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_folder_that_cannot_be_written_is_exit_2(
    folder: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK))  # root may write anywhere
    target = tmp_path / "o"
    for line in (
        ["quantize", folder / "float.safetensors", "--scheme", "assembled", "--bits", 4],
        ["train", "--epochs", 1],
        ["demo"],
    ):
        status, _, err = run(capsys, *line, "--out", target)
        assert (status, "not writable" in err) == (2, True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_under_stdout_is_exit_2_and_no_traceback() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "equipoise", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*[Nn]o space.*\n", done.stderr)


def test_a_system_error_is_one_line_with_its_file(
    folder: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "secret.bin")

    monkeypatch.setattr("equipoise.files.load", failing)
    assert run(capsys, "certify", folder / "float.safetensors") == (
        2,
        "",
        "error: secret.bin: Permission denied\n",
    )


def test_a_reader_that_goes_away_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Gone:
        def __init__(self) -> None:
            self.file = open(tmp_path / "out", "w")  # noqa: SIM115 - dup2 needs a descriptor of its own

        def write(self, text: str) -> None:
            raise BrokenPipeError(32, "Broken pipe")

        flush = write

        def fileno(self) -> int:
            return self.file.fileno()

    gone = Gone()
    monkeypatch.setattr(sys, "stdout", gone)
    common.say("text")
    monkeypatch.undo()
    gone.file.close()
    assert (tmp_path / "out").read_text() == ""
