"""Plain values: JSON from strangers, read strictly, and the dataclasses it stands for."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any

from ..errors import FileFormatError, StructureError

__all__ = ["parse", "plain", "restored"]


def parse(text: str | bytes, what: str = "it") -> Any:
    """JSON without what no file of ours holds: NaN, infinities, integers beyond 64 bits.

    Raises:
        FileFormatError: anything else than JSON, or nested too deep: says that ``what`` is.
    """
    try:
        return json.loads(text, parse_constant=_real, parse_float=_real, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{what} is not valid JSON: {error}") from error


def _real(token: str) -> float:
    if not math.isfinite(value := float(token)):
        raise ValueError(f"the number {token[:20]} is not finite")
    return value


def _integer(token: str) -> int:
    if len(token) > 19 or not abs(value := int(token)) < 2**63:
        raise ValueError(f"the number {token[:20]}… is out of range")
    return value


def plain(value: Any, where: str) -> Any:
    """An option as :func:`parse` reads it: numbers and None as they are, an infinity as its name."""
    if value is None or isinstance(value, bool) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    if isinstance(value, str):
        return value
    number = float(value)
    if math.isnan(number):
        raise StructureError(f"an option{where} is NaN and cannot be saved")
    return number if math.isfinite(number) else str(number)


def restored(kind: Any, value: Any) -> Any:
    """Plain values as the frozen dataclass ``kind`` again: the inverse of ``dataclasses.asdict`` through JSON.

    Fields are numbers, texts, booleans, dataclasses, ``tuple[X, ...]``, ``list[X]`` or ``dict[str, X]`` of them, or one
    of these or None. Raises :class:`ValueError` where ``value`` is something else.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        kinds = [option for option in inner if option is not types.NoneType]
        return None if value is None else restored(kinds[0], value)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = {entry.name for entry in dataclasses.fields(kind)}
        if not isinstance(value, dict) or value.keys() != names:
            raise ValueError(f"{str(value)[:60]} instead of the fields {', '.join(sorted(names))}")
        return kind(**{name: restored(hints[name], value[name]) for name in names})  # type: ignore[operator]
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{str(value)[:60]} instead of a list")
        return origin(restored(inner[0], item) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{str(value)[:60]} instead of an object")
        return {restored(inner[0], key): restored(inner[1], item) for key, item in value.items()}
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{str(value)[:60]} instead of {kind.__name__}")
    return value
