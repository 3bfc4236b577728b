"""What a reproduction has found so far, in one JSON file that is whole at every moment.

A run that is killed and started again with the same settings finds here what it need not compute anew.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from .._atomic import replacing
from .._codecs.values import parse, restored
from ..errors import FileFormatError, OptionError, OutputError

__all__ = ["Journal"]

T = TypeVar("T")
FORMAT = 1


class Journal:
    """Results by key in ``path``, written whole after each; ``settings`` say what they are the results of.

    Raises:
        OutputError: ``path`` holds a finished run, or cannot be written.
        OptionError: it holds an unfinished run of other settings (the message names the field).
        FileFormatError: it is no journal. ``fresh`` ignores whatever is there.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], fresh: bool = False) -> None:
        self.path, self.settings = path, dict(settings)
        self._results: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}
        if fresh or not path.exists():
            self._write({"complete": False})
            return
        kept = _read(path)
        if kept["complete"]:
            raise OutputError(f"{path} holds a finished run; pass force=True (--force) to run it again")
        for field, value in self.settings.items():
            if kept["settings"].get(field) != value:
                was = kept["settings"].get(field)
                raise OptionError(
                    f"{path} holds an unfinished run with {field}={was!r}, not {value!r}: go on with the same, "
                    "or pass force=True (--force) to start again"
                )
        self._results, self._seconds = kept["results"], kept["seconds"]

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def get(self, key: str, kind: type[T]) -> T:
        """The result kept under ``key``, as the frozen dataclass ``kind``."""
        try:
            found: T = restored(kind, self._results[key])
        except ValueError as error:
            raise FileFormatError(f"{self.path}: {key} is damaged ({error}); start again with --force") from error
        return found

    def put(self, key: str, result: Any, seconds: float) -> None:
        """Keep a frozen dataclass of plain values, on disk when this returns."""
        self._results[key], self._seconds[key] = dataclasses.asdict(result), round(seconds, 3)
        self._write({"complete": False})

    def finish(self, extra: Mapping[str, Any]) -> None:
        """Mark the run as complete, with what else the file shall say."""
        self._write({"complete": True, **extra})

    def to_dict(self) -> dict[str, Any]:
        """Settings, seconds and results as plain values."""
        return {"settings": self.settings, "seconds": self._seconds, "results": self._results}

    def _write(self, state: Mapping[str, Any]) -> None:
        content = {"format": FORMAT, **state, **self.to_dict()}
        with replacing(self.path, force=True) as file:
            file.write(json.dumps(content, allow_nan=False, ensure_ascii=False, indent=1).encode() + b"\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = parse(path.read_bytes())
        sound = (
            kept["format"] == FORMAT
            and isinstance(kept["complete"], bool)
            and all(isinstance(kept[part], dict) for part in ("settings", "results", "seconds"))
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{path} is not a reproduction's results, or damaged: start again with --force"
        ) from error
    if not sound:
        raise FileFormatError(f"{path} was written by another version: start again with --force")
    found: dict[str, Any] = kept
    return found
