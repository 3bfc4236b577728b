"""Files that appear whole or not at all.

What is written goes to a scratch file in the same folder, is flushed to the disk, and only then takes the name
of the target. Whoever opens the target, after a crash as well, sees the old file or the new one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import EquipoiseError, OutputError

__all__ = ["check_output", "replacing", "scratch_beside"]

STALE = 3600.0
"""Seconds after which a scratch file is one that a kill left behind: writing takes seconds."""


def check_output(path: str | os.PathLike[str], force: bool = False) -> Path:
    """``path`` if a file can be written there, so that one learns it before the work and not after.

    Raises:
        OutputError: no such folder, one that cannot be written, a folder or a device of that name, or an
            existing file without ``force``.
    """
    target = Path(path)
    folder = os.path.abspath(target.parent)
    if not os.path.isdir(folder):
        raise OutputError(f"cannot write {target}: the folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {target}: the folder {folder} is not writable; choose another")
    if os.path.isdir(target):
        raise OutputError(f"cannot write {target}: it is a folder; name a file in it")
    if os.path.exists(target) and not os.path.isfile(target):
        raise OutputError(f"cannot write {target}: it is not a regular file")
    if os.path.lexists(target) and not force:
        raise OutputError(f"{target} exists already; pass force=True (--force) to replace it")
    return target


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], force: bool = False) -> Iterator[BinaryIO]:
    """An open file that becomes ``path`` when the block ends well, and vanishes when it does not.

    Raises:
        OutputError: see :func:`check_output`, and whatever the system refuses (a full disk, a long name).
    """
    target = check_output(path, force)
    try:
        # Not tempfile: its files are readable by their owner only, and would stay so under their final name.
        scratch = scratch_beside(target)
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with open(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            check_output(target, force)  # somebody else may have been faster
            os.replace(scratch, target)
        except BaseException:  # Ctrl-C too
            with contextlib.suppress(OSError):
                os.unlink(scratch)
            raise
    except EquipoiseError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise OutputError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from error
    _sync(target.parent)


def scratch_beside(target: Path) -> Path:
    """A fresh hidden name in the folder of ``target``.

    What killed runs left behind on the way to the same ``target`` is removed, once it is so old that nobody can still
    be at work on it.
    """
    stem = f".{zlib.crc32(os.fsencode(target.name)):08x}-"  # of the name: it may be as long as names can be
    with contextlib.suppress(OSError, ValueError):
        for left in target.parent.glob(f"{stem}*.tmp"):
            if time.time() - left.lstat().st_mtime > STALE:
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return target.with_name(f"{stem}{os.urandom(8).hex()}.tmp")


def _sync(folder: Path) -> None:
    """Make the new name itself last through a power cut, where the system can be asked to."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
