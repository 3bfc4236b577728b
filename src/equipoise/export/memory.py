"""Bytes of a program: constant tables, and the arrays it works in."""

from __future__ import annotations

from itertools import pairwise

from .affine import Affine
from .factored import FactoredProgram
from .program import CayleyProgram, Program

__all__ = ["code_bytes", "flash_bytes", "ram_bytes", "row_bytes"]


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row: rows start at a byte; from 8 bits on codes are plain int8 or int16."""
    if bits >= 8:
        return columns * (1 if bits == 8 else 2)
    return -(-columns * bits // 8)


def code_bytes(rows: int, columns: int, bits: int) -> int:
    return rows * row_bytes(columns, bits)


def _affine_bytes(affine: Affine) -> int:
    packed = sum(row_bytes(stop - start, affine.bits) for start, stop in pairwise(affine.bounds))
    return len(affine.offsets) * packed + 4 * affine.multipliers.size + 8 * affine.offsets.size


def flash_bytes(program: Program) -> int:
    """Bytes of all constant tables; the instructions are not counted, they depend on the processor."""
    total = _affine_bytes(program.injection) + (0 if program.head is None else _affine_bytes(program.head))
    if isinstance(program, CayleyProgram):
        n = program.features
        total += code_bytes(n, n, program.C.bits) + 4 * program.multipliers.size + 4 * program.start_cross.size
    if isinstance(program, FactoredProgram):
        rank, n = program.A.codes.shape
        total += code_bytes(rank, n, program.A.bits) + 4 * rank
        total += sum(row_bytes(count, program.K_bits) for count in range(n))
    return total


def ram_bytes(program: Program) -> int:
    """Bytes of the arrays that a call works in; input and results are not counted, they are the caller's."""
    n = program.features
    state = 1 if program.state_type == "uint8_t" else 2
    # Cayley: p, c, and two iterates; factored: p and the two products; with a head the equilibrium is an array of ours
    own = 2 * 4 * n + 2 * state * n if isinstance(program, CayleyProgram) else 3 * 4 * n
    return own + (0 if program.head is None else state * n)
