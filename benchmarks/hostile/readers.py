"""Everything that reads a file, each with good files to bend: only the package's own errors may come out of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import tempfile
import traceback
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
import safetensors.torch
import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise import runtime
from equipoise._images import ImageSource, _cached, read_images
from equipoise.data import Data, Preprocessing, Split, load_data
from equipoise.export import export
from equipoise.files import load, read_certificate, save
from equipoise.importers import FORMATS, import_model
from equipoise.jobs import Job
from equipoise.quantize import size
from equipoise.report.sweeps import sweep_figure, sweep_table
from equipoise.report.terminal import rendered
from equipoise.reproduce.journal import Journal
from equipoise.runtime import _compiled
from equipoise.sweep import Row, Sweep, _finished, _identity
from equipoise.training import TrainingConfig, fit

from .junk import bent_bytes, bent_json, bent_tensor, bent_text, checksum
from .models import MODELS, inputs

__all__ = ["READERS", "SOURCE", "Bomb", "Reader", "bend_model", "bomb_png", "exported", "model_file", "parts"]


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


# Models

Document = dict[str, Any]


def parts(content: bytes) -> tuple[Document, dict[str, Tensor]]:
    """The JSON of a model's file, and its tensors."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    return json.loads(header["__metadata__"]["equipoise"]), safetensors.torch.load(content)


@cache
def model_file(kind: str) -> bytes:
    """A good file of ``MODELS[kind]``, with its certificate."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind]().eval()
    path = Path(f"/tmp/hostile-{os.getpid()}.safetensors")
    try:
        save(model, path, eq.certify(model), force=True)
        return path.read_bytes()
    finally:
        path.unlink(missing_ok=True)


def bend_model(rng: Random) -> bytes:
    """A file whose header, document or tensors are bent; its checksums fit, mostly."""
    content = model_file(rng.choice(list(MODELS)))
    action = rng.randrange(8)
    if action == 0:
        return bent_bytes(content, rng)
    if action == 1:
        length = struct.unpack("<Q", content[:8])[0]
        header = bent_text(bent_json(json.loads(content[8 : 8 + length]), rng), rng).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(header)) + header + content[8 + length :]
    document, tensors = parts(content)
    for _ in range(rng.randrange(1, 3)):
        if action < 5:
            document["architecture"] = bent_json(document["architecture"], rng)
        elif action == 5:
            document = bent_json(document, rng)
        elif tensors:
            _bend_tensors(tensors, rng)
    if isinstance(document, dict) and rng.randrange(20):
        document["checksums"] = {name: checksum(tensor) for name, tensor in tensors.items()}
    return safetensors.torch.save(tensors, {"equipoise": bent_text(document, rng)})


def _bend_tensors(tensors: dict[str, Tensor], rng: Random) -> None:
    name = rng.choice(sorted(tensors))
    action = rng.randrange(12)
    if action == 0:
        del tensors[name]
    elif action == 1:
        tensors[name + "x"] = tensors[name].clone()
    elif action == 2:
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    else:
        tensors[name] = bent_tensor(tensors[name], rng)


def _use_model(path: Path) -> None:
    """What the commands do with a file."""
    with contextlib.suppress(eq.FileFormatError):
        read_certificate(path)
    _use(load(path))


def _use(model: nn.Module) -> None:
    eq.certify(model)
    size(model)
    x = inputs(model)
    if x is not None and _runs(model, x):
        eq.certify(model, inputs=x)
    eq.certify(eq.quantize(model, eq.Structured(2)), model)


def _runs(model: nn.Module, x: Tensor) -> bool:
    """Whether torch runs it: sizes of plain modules may not go together."""
    for layer in model.modules():
        if isinstance(getattr(layer, "solver", None), eq.Solver):
            layer.solver = replace(layer.solver, max_steps=20)
    try:
        with torch.no_grad():
            model(x)
    except eq.EquipoiseError:
        return True
    except (RuntimeError, IndexError) as error:
        if any("equipoise" in frame.filename for frame in traceback.extract_tb(error.__traceback__)[1:]):
            raise
        return False
    return True


# Other projects' checkpoints


def _states() -> dict[str, dict[str, Tensor]]:
    head = {"Wout.weight": torch.ones(2, 3), "Wout.bias": torch.zeros(2)}
    core = {"U.weight": torch.ones(3, 4), "U.bias": torch.zeros(3), "A.weight": torch.eye(3) / 4}
    theirs = {f"mon.linear_module.{key}": value for key, value in core.items()}
    return {
        "mondeq-quant": {
            "A": torch.eye(3)[:2],
            "S": torch.ones(3, 3),
            "m_raw": torch.tensor(0.1),
            "U": torch.ones(3, 4),
            "b": torch.zeros(3),
            "classifier.weight": torch.ones(2, 3),
            "classifier.bias": torch.zeros(2),
        },
        "monotone_op_net": {**theirs, "mon.linear_module.B.weight": torch.ones(3, 3), **head},
        "nemon": {**theirs, "mon.linear_module.d": torch.zeros(3), **head},
    }


class Bomb:
    """What a pickle may do when it is loaded: here it makes the folder that this names."""

    where = "/tmp/hostile-pickle"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.where,)


def _odd(rng: Random) -> Any:
    """What a state dict may hold beside plain tensors."""
    return rng.choice([
        lambda: torch.ones(1).expand(2**40), lambda: torch.eye(3).to_sparse(), lambda: torch.empty(3, 4, device="meta"),
        lambda: nn.Parameter(torch.ones(3, 3)), lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        Bomb, lambda: {"a": torch.ones(2)}, lambda: [torch.ones(3)], lambda: "x", lambda: None, lambda: 2**80,
        lambda: torch.nested.nested_tensor([torch.ones(2)]), lambda: torch.eye(3).to_sparse_csr(),
    ])()  # fmt: skip


def _bend_checkpoint(rng: Random) -> bytes:
    name = rng.choice(list(FORMATS))
    state: Any = dict(_states()[name])
    for _ in range(rng.randrange(3)):
        _bend_tensors(state, rng)
    if rng.randrange(6) == 0:
        state[rng.choice([*state, "x", 3])] = _odd(rng)
    wrap = rng.randrange(12)
    if wrap == 0:
        state = {"state_dict": state}
    elif wrap == 1:
        state = {f"module.{key}": value for key, value in state.items()}
    elif wrap == 2:
        state = _odd(rng)
    how = rng.randrange(12)
    if how == 0 and isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values()):
        try:
            saved = safetensors.torch.save(state)
        except (RuntimeError, ValueError, TypeError):  # odd tensors have no place there
            saved = b""
        return bent_bytes(saved, rng)
    if how == 1:
        return pickle.dumps(Bomb() if rng.randrange(2) else state, protocol=rng.randrange(6))
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=how != 2)
    return bent_bytes(buffer.getvalue(), rng) if how in (3, 4) else buffer.getvalue()


def _import(path: Path) -> None:
    """By each format; one of them may know it."""
    errors = []
    for name in FORMATS:
        try:
            model = import_model(path, name)
        except eq.EquipoiseError as error:
            errors.append(error)
        else:
            _use(model)
        assert not Path(Bomb.where).exists(), "a pickle was run"
    if len(errors) == len(FORMATS):
        raise errors[-1]


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
            _bend_tensors(saved[part], rng)
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
        Reader("model", bend_model, _use_model),
        Reader("checkpoint", _bend_checkpoint, _import),
        Reader("journal", _bend_json_file(_journal), _read_journal),
        Reader("sweep", _bend_json_file(_sweep_result), _read_sweep),
        Reader("training", _bend_training, _read_training),
        Reader("images", _bend_images, _read_images),
        Reader("cache", _bend_cache, _read_cache),
        Reader("program", _bend_program, _read_program),
    )
}
