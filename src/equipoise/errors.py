"""Typed errors: each message says what was given and what to do about it.

Everything the package raises on purpose derives from :class:`EquipoiseError`, and also from the
built-in type a caller would expect, so ``except ValueError`` keeps working. The command line turns
every one of them into one line on stderr and exit status 2.
"""

from __future__ import annotations

__all__ = [
    "ConvergenceError",
    "ConvergenceWarning",
    "DataNotFoundError",
    "EquipoiseError",
    "FileFormatError",
    "InputError",
    "MissingExtraError",
    "NotWellPosedError",
    "OptionError",
    "OutputError",
    "StructureError",
]


class EquipoiseError(Exception):
    """Base of every error raised on purpose by this package."""


class OptionError(EquipoiseError, ValueError):
    """An option has a value outside its range, or a name nobody knows."""


class InputError(EquipoiseError, ValueError):
    """A tensor has the wrong shape, the wrong type, or entries that are not finite."""


class NotWellPosedError(EquipoiseError, ValueError):
    """The weights have no proved positive margin; ``margin`` is the proved lower bound found."""

    def __init__(self, message: str, margin: float) -> None:
        super().__init__(message)
        self.margin = margin


class StructureError(EquipoiseError, TypeError):
    """A model contains a module that this operation does not know, or does not match another model."""


class ConvergenceError(EquipoiseError, RuntimeError):
    """A solve ran out of steps or overflowed and the caller asked for an error."""


class ConvergenceWarning(UserWarning):
    """A solve ran out of steps or overflowed for some samples."""


class FileFormatError(EquipoiseError, ValueError):
    """A file is truncated, corrupted, foreign, pickled, or written by a newer version."""


class OutputError(EquipoiseError, OSError):
    """An output exists already, or its folder cannot be written."""


class DataNotFoundError(EquipoiseError, FileNotFoundError):
    """A data set is neither on disk where it was looked for nor reachable."""


class MissingExtraError(EquipoiseError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""
