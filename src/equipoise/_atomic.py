"""Files that appear whole or not at all.

What is written goes to a scratch file in the same folder, is flushed to the disk, and only then takes the name
of the target. Whoever opens the target, after a crash as well, sees the old file or the new one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import EquipoiseError, OutputError

__all__ = ["check_output", "replacing"]


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
    # Not tempfile: its files are readable by their owner only, and would stay so under their final name.
    scratch = target.with_name(f".{os.urandom(8).hex()}.tmp")
    try:
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


def _sync(folder: Path) -> None:
    """Make the new name itself last through a power cut, where the system can be asked to."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
