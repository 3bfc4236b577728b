"""Bent networks: files of the package's own, and other projects' checkpoints; and what is done with them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import tempfile
import traceback
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise.files import load, read_certificate, save
from equipoise.importers import FORMATS, import_model
from equipoise.quantize import size

from .junk import bent_bytes, bent_json, bent_tensor, bent_text, checksum
from .models import MODELS, inputs

__all__ = [
    "Bomb",
    "bend_checkpoint",
    "bend_model",
    "bend_tensors",
    "model_file",
    "parts",
    "use_checkpoint",
    "use_model",
]

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
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save(model, path, eq.certify(model))
        return path.read_bytes()


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
            bend_tensors(tensors, rng)
    if isinstance(document, dict) and rng.randrange(20):
        document["checksums"] = {name: checksum(tensor) for name, tensor in tensors.items()}
    return safetensors.torch.save(tensors, {"equipoise": bent_text(document, rng)})


def bend_tensors(tensors: dict[str, Tensor], rng: Random) -> None:
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


def use_model(path: Path) -> None:
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

    where = str(Path(tempfile.gettempdir()) / f"hostile-pickle-{os.getpid()}")

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


def bend_checkpoint(rng: Random) -> bytes:
    name = rng.choice(list(FORMATS))
    state: Any = dict(_states()[name])
    for _ in range(rng.randrange(3)):
        bend_tensors(state, rng)
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
        except (RuntimeError, ValueError, TypeError, KeyError):  # odd tensors have no place there
            saved = b""
        return bent_bytes(saved, rng)
    if how == 1:
        return pickle.dumps(Bomb() if rng.randrange(2) else state, protocol=rng.randrange(6))
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=how != 2)
    return bent_bytes(buffer.getvalue(), rng) if how in (3, 4) else buffer.getvalue()


def use_checkpoint(path: Path) -> None:
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
