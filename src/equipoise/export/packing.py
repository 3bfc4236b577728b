"""Code tables as C reads them: each piece of a row starts at a byte, codes from the low bit up, two's complement."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch

from ..quantization.codes import pack
from .fixedpoint import Integers

__all__ = ["array", "code_type", "packed_rows", "piece_bytes"]

WIDTH = 118


def code_type(bits: int) -> str:
    """The C type of the elements of a table of codes."""
    return "uint8_t" if bits < 8 else "int8_t" if bits == 8 else "int16_t"


def piece_bytes(columns: int, bits: int) -> int:
    """Elements that a piece of a row takes in its table."""
    return columns if bits >= 8 else -(-columns * bits // 8)


def packed_rows(codes: Integers, bits: int, bounds: tuple[int, ...]) -> list[int]:
    """The table of ``codes (n, k)``, rows cut at ``bounds``; each piece filled up to a byte."""
    values: list[int] = []
    for row in codes:
        for start, stop in pairwise(bounds):
            piece = row[start:stop]
            values += piece.tolist() if bits >= 8 else pack(torch.from_numpy(piece.copy()), bits).tolist()
    return values


def array(ctype: str, name: str, values: Iterable[int]) -> str:
    """A constant table, wrapped; empty ones get one zero, since C has no empty arrays."""
    macro = {"int64_t": "INT64_C({})", "uint8_t": "{}u"}.get(ctype, "{}")
    items = [macro.format(value) for value in values] or [macro.format(0)]
    lines, line = [], "   "
    for item in items:
        if len(line) + len(item) + 2 > WIDTH:
            lines.append(line)
            line = "   "
        line += f" {item},"
    lines.append(line)
    return f"static const {ctype} {name}[{len(items)}] = {{\n" + "\n".join(lines) + "\n};\n"
