"""Every option of every command with what nobody should give it: no traceback, nothing left half done."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import typer
from torch import nn

import equipoise as eq
from command_line import write_models
from equipoise.cli import common, main

JUNK = (
    "", " ", "-1", "0", "1", "2", "3", "17", "32", "33", "0.5", "-0.0", "nan", "inf", "-inf", "1e400", "1e-400", "1e-200", "1e39",
    "9" * 30, "0x10", "1_000", "٣", "é\n", "\u202e", "a" * 5000, "-", "--", "--json", "--force", "-h x", "null", "None", "[]",
    "1,2", "1-3", "3-1", "1-", ",", "8-1,8", "0-9999999999", "1-10001", "%s", "$HOME", "../..", "~", "structured", "cayley", "float,float",
)  # fmt: skip
"""For any option, whatever it takes."""

PATHS = (
    "absent", "no/such/folder/file", "float.safetensors", "small.safetensors", "lost.safetensors", "five.safetensors", "garbage",
    "truncated", "folder", "full folder", "pipe", "broken link", "loop", "/dev/null", "/dev/full", "/dev/stdin", "/", ".", "..",
    "float.safetensors/x", "new\nline", "ünïcode", "x" * 300, "nu\0l", "/proc/self/mem", "/proc/nothing", "-dash", "empty",
)  # fmt: skip
"""For options that take a path, as text that the folder of :func:`folder` gives a meaning."""

QUICK = {
    "demo": [],
    "import": ["theirs.pt", "--format", "mondeq-quant", "--out", "out"],
    "quantize": ["float.safetensors", "--scheme", "structured", "--bits", "2", "--out", "out"],
    "train": ["--out", "out", "--epochs", "1", "--features", "4"],
    "sweep": ["--out", "out", "--epochs", "1", "--features", "4", "--bits", "2", "--backend", "threading"],
    "certify": ["float.safetensors", "--limit", "3"],
    "plan": ["float.safetensors", "--data", "digits", "--bits", "4", "--schemes", "structured"],
    "bench": [],
    "export": ["small.safetensors", "--target", "c", "--out", "out"],
    "reproduce": ["li2026", "--out", "out", "--quick"],
}
"""What each command is given beside the junk: little work."""

WORK = ("equipoise.jobs.Job.run", "equipoise.demo._run", "equipoise.bench.solve.run", "equipoise.reproduce.run._run")
"""Not done here: it takes long, and it is what other tests are about."""


class Reached(Exception):
    """The arguments were taken."""


def options(command: str) -> dict[str, tuple[str, ...]]:
    """Names of the parameters of ``command`` with their switches (none: an argument)."""
    found: Any = typer.main.get_command(common.app)
    parameters = found.commands[command].params
    return {p.name: tuple(p.opts) if p.param_type_name == "option" else () for p in parameters}


def test_every_command_is_tried() -> None:
    found: Any = typer.main.get_command(common.app)
    assert set(found.commands) == set(QUICK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("junk")
    write_models(path)
    state = {"A": torch.eye(4)[:2], "S": torch.ones(4, 4), "m_raw": torch.tensor(0.1), "U": torch.ones(4, 5)}
    state |= {"b": torch.zeros(4), "classifier.weight": torch.ones(2, 4), "classifier.bias": torch.zeros(2)}
    torch.save(state, path / "theirs.pt")
    eq.save(nn.Sequential(eq.MonDEQ(64, 3), nn.Linear(3, 10)), path / "-dash")
    (path / "empty").touch()
    (path / "folder").mkdir()
    (path / "full folder").mkdir()
    (path / "full folder" / "kept").write_text("kept")
    os.mkfifo(path / "pipe")
    (path / "broken link").symlink_to("nowhere")
    (path / "loop").symlink_to("loop")
    return path


def state(folder: Path) -> dict[str, str]:
    """What lies in ``folder``, by its content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"
        found[str(path.relative_to(folder))] = content
    return found


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def complaint(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Exit status and stderr of a command line in ``folder``; whatever else comes out is a bug."""
    out, err = io.StringIO(), io.StringIO()
    with inside(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(arguments)
        except Reached:
            return 0, ""
        except SystemExit as error:
            raise AssertionError(f"{arguments} leaves by SystemExit({error.code})") from error
    return status, err.getvalue()


def lines(rng: Random, command: str) -> list[str]:
    """A command line with junk in one place or two."""
    arguments = list(QUICK[command])
    known = options(command)
    for name in rng.sample(sorted(known), min(len(known), rng.choice([1, 1, 2]))):
        value = rng.choice(PATHS if rng.random() < (0.7 if name in ("file", "out", "reference", "data_dir", "log_dir") else 0.1) else JUNK)
        switches = known[name]
        if not switches:
            arguments[:1] = [value]
            continue
        for switch in switches:
            if switch in arguments:
                place = arguments.index(switch)
                del arguments[place : place + 2]
        arguments += rng.choice([[switches[0], value], [f"{switches[0]}={value}"], [switches[0]]])
    return arguments
