"""Test vectors: inputs, and what the emulation answers to them, for C to repeat bit for bit."""

from __future__ import annotations

import numpy as np

from .build import Shipped
from .fixedpoint import Integers
from .packing import array

__all__ = ["DRAWN", "drawn_inputs", "vectors_header"]

DRAWN = 32
"""Inputs drawn inside the self-test, of which only a hash is stored."""


def drawn_inputs(shipped: Shipped, count: int = DRAWN) -> Integers:
    """The inputs ``(count, d)`` that the self-test draws: a linear congruential generator's high bits, scaled."""
    program = shipped.program
    total = count * program.inputs
    values = np.empty(total, dtype=np.int64)
    state = 1
    for k in range(total):
        state = (state * 1664525 + 1013904223) % 2**32
        values[k] = state >> 16
    span = program.high - program.low + 1
    return (((values * span) >> 16) + program.low).reshape(count, program.inputs)


def _hash(status: Integers, z: Integers) -> int:
    """FNV-1a over four bytes of each number."""
    value = 2166136261
    for number in np.column_stack([status, z]).flatten().tolist():
        for byte in int(number).to_bytes(4, "little", signed=True):
            value = ((value ^ byte) * 16777619) % 2**32
    return value


def _chosen(shipped: Shipped, samples: Integers | None) -> Integers:
    """Ends of the range, random inputs, samples, and one input outside where the C type can hold it."""
    program = shipped.program
    rng = np.random.default_rng(7)
    d = program.inputs
    rows = [np.full(d, program.low), np.full(d, program.high)]
    rows += list(rng.integers(program.low, program.high + 1, (3, d)))
    rows += list(np.where(rng.random((2, d)) < 0.5, program.low, program.high))
    if samples is not None:
        rows += list(samples[:4])
    if (top := 255 if shipped.grid.ctype == "uint8_t" else 2**15 - 1) > program.high:
        outside = np.full(d, program.low)
        outside[-1] = top
        rows.append(outside)
    return np.stack(rows).astype(np.int64)


def vectors_header(shipped: Shipped, samples: Integers | None = None) -> str:
    """``vectors.h``."""
    raw = _chosen(shipped, samples)
    z, scores, status = shipped.program(raw)
    drawn_z, _, drawn_status = shipped.program(drawn_inputs(shipped))
    parts = [
        "/* vectors.h: inputs, and what equipoise's emulation in numpy answered. */\n#ifndef EQNET_VECTORS_H\n"
        "#define EQNET_VECTORS_H\n",
        f"#define EQNET_VECTORS {len(raw)}\n#define EQNET_DRAWN {DRAWN}",
        f"#define EQNET_HASH {_hash(drawn_status, drawn_z)}u\n",
        _table("eqnet_input", "eqnet_vector_inputs", raw, "EQNET_INPUTS"),
        _table("eqnet_state", "eqnet_vector_states", z, "EQNET_FEATURES"),
        array("int", "eqnet_vector_status", status.tolist()),
    ]
    if scores is not None:
        parts.append(_table("int32_t", "eqnet_vector_scores", scores, "EQNET_CLASSES"))
    return "\n".join([*parts, "#endif\n"])


def _table(ctype: str, name: str, rows: Integers, size: str) -> str:
    lines = []
    for row in rows.tolist():
        lines.append("    {")
        for k in range(0, len(row), 24):
            lines.append("        " + " ".join(f"{v}," for v in row[k : k + 24]))
        lines.append("    },")
    return f"static const {ctype} {name}[{len(rows)}][{size}] = {{\n" + "\n".join(lines) + "\n};\n"
