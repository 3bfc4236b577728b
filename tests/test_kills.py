"""Commands that are killed, whose disk is full or read-only, or that write one file at once: whole files or none."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import typer

import equipoise as eq
from command_line import Capsys, run, write_models
from equipoise import _atomic
from equipoise.cli import common
from equipoise.files import load, read_certificate, save

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no signals to kill with")

COMMANDS: dict[str, list[str]] = {
    "quantize": ["quantize", "float.safetensors", "--scheme", "structured", "--bits", "2", "--out", "out"],
    "import": ["import", "theirs.pt", "--format", "mondeq-quant", "--out", "out"],
    "plan": ["plan", "float.safetensors", "--data", "digits", "--bits", "3", "--schemes", "structured", "--out",
    "ladder",
             "--report", "report", "--save", "model"],
    "export": ["export", "small.safetensors", "--target", "c", "--out", "out"],
    "train": ["train", "--out", "out", "--epochs", "2", "--features", "4", "--resume"],
    "sweep": ["sweep", "--out", "out", "--epochs", "2", "--features", "4", "--bits", "2", "--seeds", "0-1"],
    "demo": ["demo", "--out", "out"],
    "reproduce": ["reproduce", "jafarpour2021", "--quick", "--out", "out"],
}  # fmt: skip
TIMED = ("last.ckpt", "metrics.csv", "result.json", "sweep.json", "sweep.csv", "results.json", "report.html", ".lock")
"""Files that say how long something took, or how often it was tried."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sources")
    write_models(path)
    state = {"A": torch.eye(4)[:2], "S": torch.ones(4, 4), "m_raw": torch.tensor(0.1), "U": torch.ones(4, 5)}
    state |= {"b": torch.zeros(4), "classifier.weight": torch.ones(2, 4), "classifier.bias": torch.zeros(2)}
    torch.save(state, path / "theirs.pt")
    return path


def contents(folder: Path) -> dict[str, str]:
    """What lies in ``folder``, by its content, but for what tells of time."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in TIMED and "tensorboard" not in path.parts
    }


def started(command: str, folder: Path, limit: int | None = None) -> subprocess.Popen[str]:
    """The command as a process of its own; ``limit``: no file may be longer, as if the disk were full."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    line = [sys.executable, "-m", "equipoise", *COMMANDS[command]]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=folder, stdout=pipe, stderr=pipe, text=True, preexec_fn=prepare)


@pytest.fixture
def data(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reproduction works on, where this machine has it."""
    if request.getfixturevalue("command") == "reproduce":
        monkeypatch.setenv("EQUIPOISE_DATA", str(request.getfixturevalue("mnist_dir")))


# In this process, at every moment of a write


@pytest.mark.parametrize("moment", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_whatever_the_disk_refuses_is_one_line_and_leaves_nothing(
    moment: str, number: int, sources: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "there"
    shutil.copytree(sources, folder)
    before = contents(folder)

    def failing(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    class Full:
        def __init__(self, descriptor: int, mode: str) -> None:
            self.descriptor = descriptor

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            os.close(self.descriptor)

        write = failing

    if moment == "write":
        monkeypatch.setattr(_atomic, "open", Full, raising=False)
    else:
        real = getattr(os, moment)

        def refusing(path: Any, *rest: Any, **options: Any) -> Any:
            ours = moment == "fsync" or str(path).endswith(".tmp")
            return failing() if ours else real(path, *rest, **options)

        monkeypatch.setattr(os, moment, refusing)
    monkeypatch.chdir(folder)
    for command in ("quantize", "import", "export"):
        for line in (COMMANDS[command], [*COMMANDS[command], "--force"]):
            status, out, err = run(capsys, *line)
            assert (status, out, err.count("\n")) == (2, "", 1), err
            assert os.strerror(number) in err
            assert contents(folder) == before


def test_a_kill_between_any_two_steps_of_a_write_leaves_the_old_file_or_the_new(sources: Path, tmp_path: Path) -> None:
    """SIGKILL before each of the calls that a write makes of the system, in a process of its own."""
    program = (
        "import os, signal, sys\n"
        "import equipoise as eq\n"
        "model, moment = eq.load(sys.argv[1]), int(sys.argv[3])\n"
        "calls = 0\n"
        "def counted(real):\n"
        "    def call(*given, **options):\n"
        "        global calls\n"
        "        calls += 1\n"
        "        if calls == moment:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return real(*given, **options)\n"
        "    return call\n"
        "for name in ('open', 'fsync', 'replace'):\n"
        "    setattr(os, name, counted(getattr(os, name)))\n"
        "for moment in [moment] if moment else range(1, 20):\n"
        "    calls, child = 0, os.fork()\n"
        "    if not child:\n"
        "        eq.save(model, sys.argv[2], force=True)\n"
        "        os._exit(0)\n"
        "    status = os.waitpid(child, 0)[1]\n"
        "    eq.load(sys.argv[2])\n"
        "    if not status:\n"
        "        break\n"
        "print(moment)\n"
    )
    target = tmp_path / "model"
    shutil.copy(sources / "float.safetensors", target)
    line = [sys.executable, "-c", program, str(sources / "small.safetensors"), str(target), "0"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 3  # killed at least so often
    assert contents(tmp_path)["model"] == contents(sources)["small.safetensors"]
    left = [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    assert left
    for path in left:
        os.utime(path, (0, time.time() - _atomic.STALE - 60))
    save(load(target), target, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_others_are_writing_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with _atomic.replacing(target) as file:
        file.write(b"mine")
        with _atomic.replacing(target) as other:
            other.write(b"theirs")
        file.write(b"?")
        with pytest.raises(eq.OutputError, match="exists already"):
            _finish(target)
        target.unlink()
    assert target.read_bytes() == b"mine?"
    old = _atomic.scratch_beside(tmp_path / "another")
    old.mkdir()
    os.utime(old, (0, 0))
    with _atomic.replacing(target, force=True) as file:
        file.write(b"2")
    assert old.exists()  # it was on the way to something else
    assert not _atomic.scratch_beside(tmp_path / "another").exists()
    assert not old.exists()


def _finish(target: Path) -> None:
    with _atomic.replacing(target):
        pass


def test_of_many_writers_of_one_file_one_wins_whole(tmp_path: Path) -> None:
    target, refused, texts = tmp_path / "out", [], [bytes([65 + i]) * 100_000 for i in range(8)]

    def write(text: bytes) -> None:
        try:
            with _atomic.replacing(target) as file:
                for place in range(0, len(text), 1000):
                    file.write(text[place : place + 1000])
        except eq.OutputError:
            refused.append(text)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() in texts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


# Processes


def test_two_processes_that_write_one_file(sources: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    shutil.copytree(sources, folder)
    both = [started("quantize", folder) for _ in range(2)]
    ends = sorted((process.communicate()[1], process.returncode) for process in both)
    assert load(folder / "out") is not None
    assert read_certificate(folder / "out")
    statuses = sorted(status for _, status in ends)
    assert statuses in ([0, 0], [0, 2])
    assert statuses == [0, 0] or any("exists already" in err for err, _ in ends)
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]


@pytest.mark.parametrize("command", ["quantize", pytest.param("train", marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_is_one_line(command: str, sources: Path, tmp_path: Path) -> None:
    folder = tmp_path / "full"
    shutil.copytree(sources, folder)
    process = started(command, folder, limit=1000)
    _, err = process.communicate()
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith("error: cannot write ")
    assert "Traceback" not in err
    assert not (folder / "out").exists()
    assert not [path for path in folder.rglob("*.tmp") if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [300, 3000, 10_000])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_fills_up_anywhere(command: str, limit: int, data: None, sources: Path, tmp_path: Path) -> None:
    folder = tmp_path / "full"
    shutil.copytree(sources, folder)
    process = started(command, folder, limit)
    _, err = process.communicate()
    assert process.returncode in (0, 1, 2)
    assert "Traceback" not in err
    whole(folder)


def whole(folder: Path) -> None:
    """Every file with a final name can be read."""
    for path in folder.rglob("*"):
        if not path.is_file() or path.name in ("garbage", "truncated", ".lock") or "tensorboard" in path.parts:
            continue
        if path.suffix == ".json" or path.name == "ladder":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors" or path.name in ("out", "model"):
            load(path)
        elif path.name in ("report", "report.html"):
            assert path.read_text().rstrip().endswith("</html>")
        elif path.suffix == ".ckpt":
            torch.load(path, weights_only=True)
    if (folder / "out" / "eqnet.c").exists():
        eq.runtime.load(folder / "out")


def until(process: subprocess.Popen[str], seconds: float, number: int) -> bool:
    """Whether the signal came before the end; a traceback may only be of what Python itself was importing."""
    try:
        _, err = process.communicate(timeout=seconds)
        early = False
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        early = process.returncode != 0
    assert "Traceback" not in err or "KeyboardInterrupt" in err.splitlines()[-1], err
    return early


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_again_and_again_a_command_ends_as_if_it_had_not_been(
    command: str, data: None, sources: Path, tmp_path: Path
) -> None:
    unbroken, broken, rng = tmp_path / "unbroken", tmp_path / "broken", Random(command)
    shutil.copytree(sources, unbroken)
    shutil.copytree(sources, broken)
    began = time.monotonic()
    process = started(command, unbroken)
    process.communicate()
    assert process.returncode in (0, 1)
    took = time.monotonic() - began
    for _ in range(5):
        number = rng.choice([signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
        if not until(started(command, broken), rng.uniform(0.3, 1.0) * took, number):
            break
        whole(broken)
    process = started(command, broken)
    _, err = process.communicate()
    if process.returncode == 2:  # all or part of it had been done
        assert "--force" in err
        process = subprocess.Popen(
            [sys.executable, "-m", "equipoise", *COMMANDS[command], "--force"], cwd=broken
        ) if command != "sweep" else process  # fmt: skip
        process.wait()
    assert process.returncode in (0, 1)
    assert contents(broken) == contents(unbroken)


def test_the_list_is_complete() -> None:
    found: Any = typer.main.get_command(common.app)
    assert set(found.commands) - {"certify", "bench"} == set(COMMANDS)  # these write nothing


@pytest.mark.parametrize("ignored", [False, True], ids=["Ctrl-C", "behind nohup"])
def test_an_interruption_while_the_package_loads_leaves_no_traceback(ignored: bool) -> None:
    program = f"""
import os, signal, sys
if {ignored}:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "equipoise":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
import equipoise_command
sys.argv = ["equipoise", "--version"]
sys.exit(equipoise_command.main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert (done.returncode, "equipoise" in done.stdout) == ((0, True) if ignored else (130, False))
