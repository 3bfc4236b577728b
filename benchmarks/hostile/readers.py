"""Everything that reads a file, each with good files to bend: only the package's own errors may come out of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

import equipoise as eq
from equipoise import runtime
from equipoise._images import ImageSource, _cached, read_images
from equipoise.data import Data, Preprocessing, Split, load_data
from equipoise.export import export
from equipoise.jobs import Job
from equipoise.report.sweeps import sweep_figure, sweep_table
from equipoise.report.terminal import rendered
from equipoise.reproduce.journal import Journal
from equipoise.runtime import _compiled
from equipoise.sweep import Row, Sweep, _finished, _identity
from equipoise.training import TrainingConfig, fit

from .junk import bent_bytes, bent_json, bent_text
from .networks import Bomb, bend_checkpoint, bend_model, bend_tensors, use_checkpoint, use_model

__all__ = ["READERS", "SOURCE", "Reader", "bomb_png", "exported"]


@dataclass(frozen=True)
class Reader:
    """``bend(rng)`` gives a bent file (or, by name, the files of a folder), ``read(path)`` reads it."""

    name: str
    bend: Callable[[Random], bytes | dict[str, bytes]]
    read: Callable[[Path], object]

    def trial(self, rng: Random, path: Path) -> str:
        """Write a bent file to ``path`` and read it: "read", or the name of the package's error that came out.

        Anything else comes out of here as well, and is a bug.
        """
        bent = self.bend(rng)
        if isinstance(bent, bytes):
            path.write_bytes(bent)
        else:
            path.mkdir(exist_ok=True)
            for name, content in bent.items():
                (path / name).write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                self.read(path)
            except eq.EquipoiseError as error:
                return type(error).__name__
        return "read"


# What runs keep


def _bend_json_file(good: Callable[[], Any]) -> Callable[[Random], bytes]:
    def bend(rng: Random) -> bytes:
        value = good()
        for _ in range(rng.randrange(1, 3)):
            value = bent_json(value, rng)
        text = bent_text(value, rng).encode("utf-8", "surrogatepass")
        return bent_bytes(text, rng) if rng.randrange(8) == 0 else text

    return bend


@dataclass(frozen=True)
class _Inner:
    name: str
    value: float | None
    counts: tuple[int, ...]


@dataclass(frozen=True)
class _Result:
    inner: tuple[_Inner, ...]
    best: _Inner | None
    held: bool
    grid: list[list[float]]


SETTINGS = {"paper": "toy", "quick": True, "seed": 0}


def _journal() -> dict[str, Any]:
    inner = {"name": "a", "value": 1.5, "counts": [1, 2]}
    result = {"inner": [inner], "best": inner, "held": True, "grid": [[0.5], []]}
    return {"format": 1, "complete": False, "settings": SETTINGS, "seconds": {"one": 1.0}, "results": {"one": result}}


def _read_journal(path: Path) -> None:
    journal = Journal(path, SETTINGS)
    if "one" in journal:
        found = journal.get("one", _Result)
        float(sum(i.value or 0 for i in found.inner)), [sum(row) for row in found.grid], str(found.best)
        journal.put("two", found, 1.0)


JOB = Job("digits", TrainingConfig(1), eq.Structured(2), features=8)


def _sweep_result() -> dict[str, Any]:
    row = Row("structured", 2, 0, "structured-2-seed0", 0.9, 0.8, 0.1, True, None, 100, 1.5)
    return {"job": _identity(JOB), "row": row.to_dict()}


def _read_sweep(path: Path) -> None:
    folder = path.with_name(f"{path.name}-sweep")
    folder.mkdir(exist_ok=True)
    os.replace(path, folder / "result.json")
    row = _finished(folder, JOB)
    assert row is not None
    found = Sweep((row, row))
    found.write(folder)
    rendered(sweep_table(found.means()))
    sweep_figure(found.means(), folder / "sweep.svg")


# Trainings


@cache
def _tiny() -> Data:
    digits = load_data("digits")

    def few(split: Split) -> Split:
        return Split(split.x[:8], split.y[:8])

    return replace(digits, train=few(digits.train), validation=few(digits.validation), test=few(digits.test))


def _train(folder: Path, epochs: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(eq.MonDEQ(64, 4), nn.Linear(4, 10))
    fit(model, _tiny(), TrainingConfig(epochs, accelerator="cpu", schedule="constant"), folder, False, resume=True)


@cache
def _trained() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        _train(Path(folder), 1)
        return (Path(folder) / "last.ckpt").read_bytes()


def _bend_training(rng: Random) -> bytes:
    if rng.randrange(6) == 0:
        return bent_bytes(_trained(), rng)
    saved: Any = torch.load(io.BytesIO(_trained()), weights_only=True)
    for _ in range(rng.randrange(1, 3)):
        part = rng.choice([*saved, None]) if isinstance(saved, dict) else None
        if part == "state_dict" and isinstance(saved[part], dict) and saved[part]:
            bend_tensors(saved[part], rng)
        elif part is None:
            saved = bent_json(saved, rng)
        else:
            saved[part] = bent_json(saved[part], rng)
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return buffer.getvalue()


def _read_training(path: Path) -> None:
    folder = path.with_name(f"{path.name}-run")
    folder.mkdir(exist_ok=True)
    os.replace(path, folder / "last.ckpt")
    _train(folder, 1)


# Image sets

SOURCE = ImageSource("tiny", "nobody/tiny", "image", (4, 4), ("a", "b"))


@cache
def _png() -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def _bend_images(rng: Random) -> bytes:
    cells: list[Any] = [{"bytes": _png(), "path": "0.png"} for _ in range(3)]
    labels: list[Any] = [0, 1, 0]
    place, action = rng.randrange(3), rng.randrange(8)
    if action < 3:
        cells[place]["bytes"] = bent_bytes(_png(), rng)
    elif action == 3:
        cells[place]["bytes"] = rng.choice([None, b"", b"GIF89a", pickle.dumps(Bomb()), bomb_png()])
    elif action == 4:
        labels = [rng.choice([-1, 2, 0.5, None, 2**40]) for _ in range(3)]
    elif action == 5:
        labels = [rng.choice(["0", "x"])] * 3
    elif action == 6:
        cells = [rng.choice([None, {"path": "x"}, {"bytes": _png()}])] * 3
    name = rng.choice(["image", "image", "image", "img"])
    buffer = io.BytesIO()
    pq.write_table(pa.table({name: cells, "label": labels}), buffer)
    return bent_bytes(buffer.getvalue(), rng) if action == 7 else buffer.getvalue()


def bomb_png(side: int = 30_000) -> bytes:
    """A small file that says it is a picture of ``side`` × ``side`` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * 10_000_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _read_images(path: Path) -> None:
    folder = path.with_name(f"{path.name}-images")
    (folder / "tiny").mkdir(parents=True, exist_ok=True)
    os.replace(path, folder / "tiny" / "train-00000-of-00001.parquet")
    with _cache_in(folder):
        images, labels = read_images(SOURCE, "train", folder)
    assert images.shape == (len(labels), 4, 4)


@contextlib.contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.update(XDG_CACHE_HOME=before)


def _bend_cache(rng: Random) -> bytes:
    images, labels = np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int64)
    odd: Any = np.array([Bomb()], dtype=object)
    arrays: dict[str, Any] = {"images": images, "labels": labels}
    if rng.randrange(3) == 0:
        arrays[rng.choice(["images", "labels", "x"])] = rng.choice([odd, images.astype(float), labels[:1], images[0]])
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return bent_bytes(buffer.getvalue(), rng) if rng.randrange(2) else buffer.getvalue()


def _read_cache(path: Path) -> None:
    folder = path.with_name(f"{path.name}-cache")
    (folder / "equipoise").mkdir(parents=True, exist_ok=True)
    os.replace(path, folder / "equipoise" / "tiny-train-key.npz")
    made = np.ones((3, 4, 4), np.uint8), np.zeros(3, np.int64)
    with _cache_in(folder):
        images, labels = _cached(SOURCE, "tiny-train-key", lambda: made)
    assert images.shape == (len(labels), 4, 4)
    assert images.dtype == np.uint8
    assert not Path(Bomb.where).exists(), "a pickle was run"


# Exported programs


@cache
def exported() -> dict[str, bytes]:
    torch.manual_seed(0)
    model: Any = eq.quantize(nn.Sequential(eq.MonDEQ(4, 3, margin=0.5), nn.Linear(3, 2)), eq.Cayley(6)).eval()
    model.preprocessing = Preprocessing(mean=0.3, std=0.25, scale=255.0, input_shape=(4,))
    with tempfile.TemporaryDirectory() as folder:
        export(model, Path(folder) / "c")
        return {path.name: path.read_bytes() for path in (Path(folder) / "c").iterdir()}


def _bend_program(rng: Random) -> dict[str, bytes]:
    files = dict(exported())
    name = rng.choice([*files, *["certificate.json"] * 20])
    if name == "certificate.json":
        files[name] = _bend_json_file(lambda: json.loads(files[name]))(rng)
    elif rng.randrange(4):
        files[name] = bent_bytes(files[name], rng)
    else:
        del files[name]
    return files


@cache
def _compiled_once() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in exported().items():
            (Path(folder) / name).write_bytes(content)
        return _compiled(Path(folder))


def _read_program(path: Path) -> None:
    with mock.patch.object(runtime, "_compiled", return_value=_compiled_once()):
        program = runtime.load(path)
    x = np.full((2, 4), 0.5)
    program(x)
    program.error_bound(x)
    program(np.full((2, 4), 7))


READERS = {
    reader.name: reader
    for reader in (
        Reader("model", bend_model, use_model),
        Reader("checkpoint", bend_checkpoint, use_checkpoint),
        Reader("journal", _bend_json_file(_journal), _read_journal),
        Reader("sweep", _bend_json_file(_sweep_result), _read_sweep),
        Reader("training", _bend_training, _read_training),
        Reader("images", _bend_images, _read_images),
        Reader("cache", _bend_cache, _read_cache),
        Reader("program", _bend_program, _read_program),
    )
}
