"""Every option of every command with what nobody should give it: no traceback, nothing left half done."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import io
import math
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
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
from equipoise.data import Preprocessing
from equipoise.jobs import Job
from equipoise.training import TrainingConfig

JUNK = (
    "", " ", "-1", "0", "1", "2", "3", "17", "32", "33", "0.5", "-0.0", "nan", "inf", "-inf", "1e400", "1e-400",
    "1e-200", "1e39",
    "9" * 30, "0x10", "1_000", "٣", "é\n", "\u202e", "a" * 5000, "-", "--", "--json", "--force", "-h x", "null",
    "None", "[]",
    "1,2", "1-3", "3-1", "1-", ",", "8-1,8", "0-9999999999", "1-10001", "%s", "$HOME", "../..", "~", "structured",
    "cayley", "float,float",
)  # fmt: skip
"""For any option, whatever it takes."""

PATHS = (
    "absent", "no/such/folder/file", "float.safetensors", "small.safetensors", "lost.safetensors",
    "five.safetensors", "garbage",
    "truncated", "folder", "full folder", "pipe", "broken link", "loop", "/dev/null", "/dev/full", "/dev/stdin",
    "/", ".", "..",
    "float.safetensors/x", "new\nline", "ünïcode", "x" * 300, "nu\0l", "/proc/self/mem", "/proc/nothing", "-dash",
    "empty",
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

WORK = (
    (Job, "run"),
    (importlib.import_module("equipoise.demo"), "_run"),
    (importlib.import_module("equipoise.bench.run"), "run"),
    (importlib.import_module("equipoise.reproduce.run"), "_run"),
)
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
        value = rng.choice(
            PATHS
            if rng.random() < (0.7 if name in ("file", "out", "reference", "data_dir", "log_dir") else 0.1)
            else JUNK
        )
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


@pytest.fixture(autouse=True)
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object, **__: object) -> None:
        raise Reached

    for owner, name in WORK:
        monkeypatch.setattr(owner, name, reached)
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    monkeypatch.setattr("equipoise._images._fetch", no_hub)


def no_hub(*_: object) -> None:
    raise eq.DataNotFoundError("no hub here")


def check(arguments: list[str], folder: Path) -> None:
    """No traceback, one line of complaint, nothing overwritten, nothing half done."""
    before = state(folder)
    status, err = complaint(arguments, folder)
    after = state(folder)
    assert status in (0, 1, 2)
    changed = {name for name in before if after.get(name) != before[name]}
    if status == 2:
        assert err.splitlines()[-1].startswith("error: "), err
        assert err.count("\n") == 1 + err.count("warning: ")
        assert after == before
    assert "--force" in arguments or not changed
    assert not [name for name in after if name.endswith((".tmp", ".probe"))]
    for name in after.keys() - before.keys():  # what was made must not change the next line
        made = folder / name
        if made.parent == folder:
            shutil.rmtree(made) if made.is_dir() else made.unlink()
    for name in changed:
        (folder / name).unlink(missing_ok=True)


def tried(command: str, seeds: range, folder: Path) -> None:
    for seed in seeds:
        arguments = [command, *lines(Random(f"{command} {seed}"), command)]
        try:
            check(arguments, folder)
        except Exception as error:
            raise AssertionError(f"equipoise {shlex.join(arguments)}") from error


@pytest.mark.parametrize("command", QUICK)
def test_junk_is_refused_in_one_line(command: str, folder: Path) -> None:
    tried(command, range(12), folder)


@pytest.mark.slow
@pytest.mark.parametrize("command", QUICK)
def test_much_junk_is_refused_in_one_line(command: str, folder: Path) -> None:
    tried(command, range(12, 300), folder)


@pytest.mark.parametrize(
    "line",
    [
        ["certify", "pipe"],
        ["certify", "/dev/zero"],
        ["quantize", "float.safetensors", "--scheme", "structured", "--bits", "2", "--out", "/dev/full"],
        ["quantize", "float.safetensors", "--scheme", "structured", "--bits", "2", "--out", "pipe", "--force"],
        ["plan", "float.safetensors", "--data", "digits", "--bits", "2", "--report", "/dev/null", "--force"],
        ["reproduce", "li2026", "--checkpoint", "pipe", "--out", "out"],
        ["export", "small.safetensors", "--target", "c", "--out", "float.safetensors", "--force"],
        ["import", "/dev/urandom", "--format", "nemon", "--out", "out"],
        ["certify", "float.safetensors", "--reference", "pipe"],
        ["sweep", "--out", "float.safetensors"],
    ],
    ids=shlex.join,
)
def test_devices_are_no_files(line: list[str], folder: Path) -> None:
    before = state(folder)
    status, err = complaint(line, folder)
    assert status == 2
    assert err.startswith("error: ")
    assert state(folder) == before


# Constructors

NUMBERS = (
    0,
    -1,
    1,
    2**31,
    2**63,
    1e-200,
    1e-320,
    1e39,
    1e300,
    0.5,
    math.nan,
    math.inf,
    -math.inf,
    True,
    None,
    "no",
    "1",
    [],
    {},
    (1,),
)
"""For any option of a constructor."""

MADE: dict[str, Callable[..., object]] = {
    "ReLU": eq.ReLU, "LeakyReLU": eq.LeakyReLU, "Hardtanh": eq.Hardtanh, "Softplus": eq.Softplus, "ELU": eq.ELU,
    "Structured": lambda **o: eq.Structured(**{"bits": 4, **o}), "Assembled": lambda **o: eq.Assembled(**{"bits": 4,
    **o}),
    "Compensated": lambda **o: eq.Compensated(**{"bits": 4, **o}), "Cayley": lambda **o: eq.Cayley(**{"bits": 4,
    **o}),
    "PeacemanRachford": eq.PeacemanRachford, "ForwardBackward": eq.ForwardBackward, "Anderson": eq.Anderson,
    "Broyden": eq.Broyden, "Tseng": eq.Tseng, "Picard": eq.Picard,
    "Rounded": lambda **o: eq.Rounded(**{"on": eq.ForwardBackward(), "grid": 0.1, **o}),
    "MarginPenalty": eq.MarginPenalty, "RobustLoss": eq.RobustLoss,
    "TrainingConfig": lambda **o: TrainingConfig(**{"epochs": 1, **o}),
    "Preprocessing": lambda **o: Preprocessing(**{"mean": 0.0, "std": 1.0, "scale": 1.0, "input_shape": (4,), **o}),
    "MonDEQ": lambda **o: eq.MonDEQ(**{"in_features": 3, "features": 4, **o}),
    "NEMON": lambda **o: eq.NEMON(**{"in_features": 3, "features": 4, **o}),
    "NEMONConv2d": lambda **o: eq.NEMONConv2d(**{"in_channels": 1, "channels": 2, **o}),
    "MonConv2d": lambda **o: eq.MonConv2d(**{"in_channels": 1, "channels": 2, "image_size": 4, **o}),
    "MultiTierMonDEQ": lambda **o: eq.MultiTierMonDEQ(**{"in_channels": 1, "channels": (1, 2), "image_size": 4, **o}),
    "LipschitzMDEQ": lambda **o: eq.LipschitzMDEQ(
        **{"in_channels": 1, "size": 4, "classes": 2, "channels": (2, 2), "groups": 1, "post_groups": 1,
        "expansion": 1, "head_channels": 2, **o}),
    "MDEQ": lambda **o: eq.MDEQ(
        **{"in_channels": 1, "size": 4, "classes": 2, "channels": (2, 2), "groups": 1, "post_groups": 1,
        "expansion": 1, "head_channels": 2, **o}),
}  # fmt: skip


def parameters(made: str) -> list[str]:
    kind: Any = getattr(eq, made, None) or {"TrainingConfig": TrainingConfig, "Preprocessing": Preprocessing}[made]
    return [n for n, p in inspect.signature(kind).parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


SIZES = {"in_features", "features", "in_channels", "channels", "image_size", "size", "classes", "rank",
    "kernel_size", "expansion",
         "head_channels", "border"}  # fmt: skip
"""Where a huge number is an honest wish for much memory."""


@pytest.mark.parametrize("made", MADE)
def test_hostile_options_are_refused_or_hold(made: str) -> None:
    for name in parameters(made):
        for value in NUMBERS:
            if name in SIZES and isinstance(value, int) and value > 1000:
                continue
            try:
                thing = MADE[made](**{name: value})
            except eq.EquipoiseError as error:
                if not str(error):
                    raise AssertionError(f"{made}({name}={value!r}) is refused without a word") from error
                continue
            except Exception as error:
                raise AssertionError(f"{made}({name}={value!r}): {error!r}") from error
            if made in ("MonDEQ", "NEMON") or (made, name) == ("LipschitzMDEQ", "norm_cap"):
                assert isinstance(thing, nn.Module)
                with contextlib.suppress(eq.EquipoiseError):
                    eq.certify(thing)
