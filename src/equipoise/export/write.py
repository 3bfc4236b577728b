"""A program as a folder: source, header, self-test, host build and certificate."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from .._atomic import replacing, scratch_beside
from ..errors import OutputError
from .build import Shipped
from .fixedpoint import Integers
from .source import header, host, source, template
from .vectors import vectors_header

__all__ = ["PROVED", "check_folder", "fingerprint", "write_c", "write_files"]

LAYOUT = 1

PROVED = ("eqnet.h", "eqnet.c", "eqnet_host.c")
"""The sources that a certificate is about."""

CERTIFICATE = "certificate.json"
EXPORTED = (*PROVED, "vectors.h", "selftest.c", "unrolled.onnx", "loop.onnx")
"""What exports write."""


def check_folder(folder: str | os.PathLike[str], force: bool) -> Path:
    """``folder`` if an export can go there.

    Raises:
        OutputError: something that is no folder, or a folder that holds something, without ``force``.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise OutputError(f"cannot write {path}: it is a file; name a folder")
    try:
        if path.is_dir() and any(path.iterdir()) and not force:
            raise OutputError(
                f"{path} holds files already; pass force=True (--force) to replace those of an export in it"
            )
    except PermissionError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
    return path


def write_files(folder: Path, texts: dict[str, str | bytes], force: bool) -> dict[str, Path]:
    """A new folder appears with all its files or not at all. In one that is there each file is whole or missing, and
    the last one, which belongs to the others, is there only if all are."""
    check_folder(folder, force)
    if folder.exists():
        _fill(folder, texts)
        return {name: folder / name for name in texts}
    scratch = scratch_beside(folder)
    try:
        scratch.mkdir()
        _fill(scratch, texts)
        scratch.rename(folder)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {name: folder / name for name in texts}


def _fill(folder: Path, texts: dict[str, str | bytes]) -> None:
    try:
        # an earlier proof is not to be found beside half of a new program, nor earlier files beside a new proof
        for name in (CERTIFICATE, *EXPORTED):
            if name == CERTIFICATE or name not in texts:
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}") from error
    for name, text in texts.items():
        with replacing(folder / name, True) as file:
            file.write(text.encode("utf-8") if isinstance(text, str) else text)


def write_c(shipped: Shipped, folder: Path, samples: Integers | None, force: bool) -> dict[str, Path]:
    """``eqnet.c`` and ``eqnet.h`` to ship; the rest to test and run them here."""
    texts: dict[str, str | bytes] = {
        "eqnet.h": header(shipped),
        "eqnet.c": source(shipped),
        "vectors.h": vectors_header(shipped, samples),
        "selftest.c": template("selftest.c"),
        "eqnet_host.c": host(shipped),
    }
    certificate = document(shipped, {name: fingerprint(texts[name]) for name in PROVED})
    texts[CERTIFICATE] = json.dumps(certificate, allow_nan=False, indent=1, ensure_ascii=False) + "\n"
    return write_files(folder, texts, force)


def fingerprint(text: str | bytes) -> str:
    """SHA-256 of a file: what is proved is proved about this one."""
    return hashlib.sha256(text.encode("utf-8") if isinstance(text, str) else text).hexdigest()


def document(shipped: Shipped, sources: dict[str, str]) -> dict[str, Any]:
    """``certificate.json``: the certificate, and under ``program`` what reads the integers and its sources."""
    program = shipped.program
    interface = {
        "layout": LAYOUT,
        "grid": shipped.grid.to_dict(),
        "input_type": shipped.grid.ctype,
        "state_type": program.state_type,
        "state_unit": shipped.unit,
        "score_unit": shipped.score_unit,
        "per_input": shipped.per_input,
        "sha256": sources,
    }
    return {**shipped.certificate.to_dict(), "program": interface}
