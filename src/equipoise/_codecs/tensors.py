"""Safetensors files and JSON objects from strangers: read strictly, every complaint a typed error.

The tensors' sizes come from a header that the library has compared with the length of the file, so what is read
takes memory in proportion to the file, whatever the file claims. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import os
import stat
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import DataNotFoundError, FileFormatError, InputError, StructureError

__all__ = ["FLOATS", "Fields", "TensorReader", "TensorWriter", "first_bytes", "open_tensors"]

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_DTYPES = {**FLOATS, "U8": torch.uint8}
_LARGEST = 2**31
"""No feature count comes near it, and a product of two is still a size that PyTorch can name."""


def first_bytes(path: str | os.PathLike[str], count: int = 16) -> bytes:
    """How the file begins; raises :class:`DataNotFoundError` where there is none that can be read."""
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
        with open(path if regular else os.devnull, "rb") as file:  # opening a pipe would wait for its writer
            begin = file.read(count)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        reason = getattr(error, "strerror", None) or error
        raise DataNotFoundError(f"{os.fspath(path)} cannot be read: {reason}") from error
    if not regular:
        raise DataNotFoundError(f"{os.fspath(path)} is a folder or a device; name a file")
    return begin


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The safetensors file at ``path``, its header checked against its length.

    Raises:
        DataNotFoundError: no such file.
        FileFormatError: another kind of file, or a damaged one; the caller knows its name.
    """
    begin = first_bytes(path)
    try:
        with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError, UnicodeError) as error:
        raise FileFormatError(f"{_looks_like(begin)} ({error})") from error


def _looks_like(begin: bytes) -> str:
    if not begin:
        return "it is empty"
    # A safetensors file may begin with the same two bytes, when its header is 640 long: so ask only now.
    if begin.startswith(b"PK\x03\x04") or (begin[0] == 0x80 and begin[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return (
            "it is a PyTorch checkpoint or another pickle, and running what a pickle says is not safe; if it is "
            "another project's state dict, bring it in with `equipoise import`"
        )
    return "it is not a safetensors file, or a truncated or corrupted one"


class Fields:
    """A JSON object: each entry is taken once and its type checked, and none may be left over."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise FileFormatError(f"{where}: {_short(values)} where an object is needed")
        self._left, self.where = dict(values), where

    def take(self, name: str, *kinds: type) -> Any:
        """The entry, whose type is one of ``kinds`` exactly (True is not an integer)."""
        if name not in self._left:
            raise FileFormatError(f"{self.where}: {name} is missing")
        value = self._left.pop(name)
        if type(value) not in kinds:
            raise FileFormatError(f"{self.where}: {name} is {_short(value)}")
        return value

    def holds(self, name: str, kind: type) -> bool:
        return type(self._left.get(name)) is kind

    def size(self, name: str, least: int = 1) -> int:
        value: int = self.take(name, int)
        if not least <= value <= _LARGEST:
            raise FileFormatError(f"{self.where}: {name} is {value}; a size from {least} to {_LARGEST} is needed")
        return value

    def options(self) -> dict[str, Any]:
        """Everything left, with infinities back from their names."""
        left, self._left = self._left, {}
        return {key: float(value) if value in ("inf", "-inf") else value for key, value in left.items()}

    def fields(self, name: str, **passed_down: Any) -> Fields:
        """An entry that is an object itself, with entries that its owner gives it."""
        return Fields({**self.take(name, dict), **passed_down}, f"{self.where}: {name}")

    def close(self) -> None:
        if self._left:
            raise FileFormatError(f"{self.where}: unknown entries {', '.join(map(_short, self._left))}")


class TensorWriter:
    """Collects tensors under dotted names, as contiguous copies on the CPU."""

    def __init__(self, prefix: str = "", tensors: dict[str, Tensor] | None = None) -> None:
        self._prefix = prefix
        self.tensors: dict[str, Tensor] = {} if tensors is None else tensors

    @property
    def where(self) -> str:
        """Where in the model this is, to continue a message with."""
        return f" at position {self._prefix[:-1]!r}" if self._prefix else ""

    def under(self, name: str) -> TensorWriter:
        return TensorWriter(f"{self._prefix}{name}.", self.tensors)

    def put(self, name: str, tensor: Tensor) -> None:
        full = self._prefix + name
        if tensor.dtype not in _DTYPES.values() or tensor.is_meta or tensor.layout is not torch.strided:
            raise StructureError(f"{full} is {tensor.dtype} on {tensor.device.type} and cannot be saved")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(f"{full} holds {bad} NaN or infinite entries of {tensor.numel()}; nothing was saved")
        self.tensors[full] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

    def checksums(self) -> dict[str, int]:
        """The checksum of every tensor, by its name."""
        return {name: _checksum(tensor) for name, tensor in self.tensors.items()}


class TensorReader:
    """The tensors of an open file, each taken once and compared with what is expected before it is read."""

    def __init__(
        self, file: Any, prefix: str = "", left: set[str] | None = None, seen: dict[str, int] | None = None
    ) -> None:
        self._file, self._prefix = file, prefix
        self._left: set[str] = set(file.keys()) if left is None else left
        self._seen: dict[str, int] = {} if seen is None else seen

    @property
    def where(self) -> str:
        return f" at {self._prefix[:-1]!r}" if self._prefix else ""

    def under(self, name: str) -> TensorReader:
        return TensorReader(self._file, f"{self._prefix}{name}.", self._left, self._seen)

    def take(self, name: str, shape: tuple[int, ...] | None, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of ``shape`` (any where None) and ``dtype`` (any floating one where None), all finite."""
        full = self._prefix + name
        if full not in self._left:
            raise FileFormatError(f"the tensor {full} is missing")
        self._left.remove(full)
        header = self._file.get_slice(full)
        found, kind = tuple(header.get_shape()), str(header.get_dtype())
        if shape is not None and found != shape:
            raise FileFormatError(f"the tensor {full} is {found}; its architecture needs {shape}")
        if _DTYPES.get(kind) not in (FLOATS.values() if dtype is None else (dtype,)):
            raise FileFormatError(f"the tensor {full} is {kind}; needed is {dtype or 'floating point'}")
        tensor: Tensor = self._file.get_tensor(full).clone()  # the original may be a view of the file itself
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise FileFormatError(f"the tensor {full} holds NaN or infinite entries")
        self._seen[full] = _checksum(tensor)
        return tensor

    def compare(self, stored: dict[str, Any]) -> None:
        """Raise :class:`FileFormatError` unless every tensor that was taken is the one that was written."""
        if damaged := sorted(name for name, found in self._seen.items() if stored.get(name) != found):
            raise FileFormatError(f"it is corrupted: the checksum of {', '.join(map(_short, damaged[:20]))} is wrong")

    def close(self) -> None:
        if self._left:
            raise FileFormatError(f"unknown tensors {', '.join(map(_short, sorted(self._left)))}")


def _checksum(tensor: Tensor) -> int:
    """CRC-32 of the entries: told apart is what a disk or a transfer did, not what somebody meant to do."""
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
