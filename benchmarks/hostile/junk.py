"""Bent JSON, bent tensors, bent bytes."""

from __future__ import annotations

import json
import re
import zlib
from random import Random
from typing import Any

import torch
from torch import Tensor

__all__ = ["bent_bytes", "bent_json", "bent_tensor", "bent_text", "checksum", "junk"]

SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 5, 8, 16, 17, 33, 64, 1000, 8192, 2**16, 2**31, 2**32, 2**40, 2**62, 2**63,
    -(2**63),
    0.0, -0.0, 0.5, 1.0, 1.5, -1.0, 1e-320, 1e-200, 1e-30, 1e39, 1e300, "", "0", "inf", "-inf", "nan", "1", "\0",
    "\ud800", "é\n", "x" * 300,
    "mondeq", "nemon", "sequential", "linear", "relu", "unflatten", "flatten", "avg_pool2d", "dense", "assembled",
    "structured", "cayley",
    "ReLU", "Hardtanh", "LeakyReLU", "Softplus", "Anderson", "Rounded", "Tseng", "ForwardBackward", "residual",
    "bound", "float64", "float16", "bfloat16", "tensor", "row", "max", "mse", "../x",
)  # fmt: skip
TOKENS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "-1e400",
    "1e-400",
    "9" * 25,
    "9" * 5000,
    "-0",
    "[" * 2000,
    "01",
    "'x'",
    "\\ud800",
)
"""What stands for a number in the text, and is none, or one that JSON's readers differ about."""


def junk(rng: Random, depth: int = 2) -> Any:
    """Any JSON value."""
    kind = rng.randrange(12) if depth else 0
    if kind < 8:
        return rng.choice(SCALARS)
    if kind < 10:
        return [junk(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {str(rng.choice(SCALARS)): junk(rng, depth - 1) for _ in range(rng.randrange(3))}


def bent_json(value: Any, rng: Random) -> Any:
    """``value`` with one entry, somewhere in it, replaced, removed, added, doubled or moved."""
    if not isinstance(value, dict | list) or not value or rng.randrange(10) == 0:
        return _near(value, rng)
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    action = rng.randrange(16)
    if action == 0:
        del copy[key]
    elif action == 1:
        other = rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        copy[key], copy[other] = copy[other], copy[key]
    elif action == 2 and isinstance(copy, dict):
        copy[str(rng.choice(SCALARS))] = junk(rng)
    elif action == 3 and isinstance(copy, list):
        copy.insert(key, copy[rng.randrange(len(copy))])
    else:
        copy[key] = bent_json(copy[key], rng)
    return copy


def _near(value: Any, rng: Random) -> Any:
    """Another value: mostly of the same kind, so that it comes past the first check."""
    kind = rng.randrange(3)
    if kind and isinstance(value, bool):
        return not value
    if kind and isinstance(value, int):
        return rng.choice([value + 1, value - 1, 2 * value, -value, 0, 1, 2, 16, 17, 32, 2**16, 2**31])
    if kind and isinstance(value, float):
        return rng.choice([-value, value / 2, 0.0, 1.0, 1e-300, 5e-324, 1e-12, 0.999999999999, 1e39, 1e300])
    if kind and isinstance(value, str):
        return rng.choice([text for text in SCALARS if isinstance(text, str)])
    return junk(rng)


def bent_text(value: Any, rng: Random) -> str:
    """The JSON of ``value``, sometimes with a number that is none, a doubled key, or its end cut off."""
    text = json.dumps(value)
    action = rng.randrange(12)
    if action == 0 and (numbers := list(re.finditer(r"(?<=[ \[:])-?\d[\d.e+-]*", text))):
        found = rng.choice(numbers)
        return text[: found.start()] + rng.choice(TOKENS) + text[found.end() :]
    if action == 1 and (keys := list(re.finditer(r'"\w+": ', text))):
        found = rng.choice(keys)
        return text[: found.start()] + found.group() + json.dumps(junk(rng)) + ", " + text[found.start() :]
    if action == 2:
        return text[: rng.randrange(len(text) + 1)]
    return text


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int32,
    torch.int64,
          torch.bool, torch.complex64, torch.float8_e4m3fn)  # fmt: skip
NUMBERS = (0.0, -0.0, 1.0, -1.0, 0.5, 3.0, 255.0, 1e-45, 1e-38, 1e-12, 1e4, 1e19, 1e38, 3.4e38, 1e300, 5e-324,
           float("nan"), float("inf"), float("-inf"))  # fmt: skip


def bent_tensor(tensor: Tensor, rng: Random) -> Tensor:
    """Entries, dtype or shape replaced."""
    copy = tensor.clone()
    action = rng.randrange(6)
    if action == 0:
        return copy.to(rng.choice(DTYPES))
    if action == 1:
        shape = [rng.randrange(6) for _ in range(rng.randrange(5))]
        return torch.full(shape, rng.choice([0, 1, 3, 255])).to(copy.dtype)
    if action == 2:
        return rng.choice(
            [copy.flatten(), copy.unsqueeze(0), copy.transpose(0, -1) if copy.ndim else copy]
        ).contiguous()
    if not copy.numel() or not (copy.is_floating_point() or copy.dtype == torch.uint8):
        return copy
    if copy.dtype == torch.uint8:
        copy.view(-1)[rng.randrange(copy.numel())] = rng.randrange(256)
        return copy
    wide, value = copy.double(), rng.choice(NUMBERS)
    if action == 3:
        wide.fill_(value)
    elif action == 4:
        wide.mul_(value)
    else:
        wide.view(-1)[rng.randrange(copy.numel())] = value
    return wide.to(copy.dtype)


def bent_bytes(content: bytes, rng: Random) -> bytes:
    """Bytes flipped, cut out, doubled, or the end cut off."""
    bent = bytearray(content)
    for _ in range(rng.randrange(1, 5)):
        place, length = rng.randrange(len(bent) + 1), rng.randrange(1, 9)
        action = rng.randrange(8)
        if action == 0:
            del bent[place : place + length]
        elif action == 1:
            bent[place:place] = bent[place : place + length]
        elif action == 2 and rng.randrange(3) == 0:
            del bent[place:]
        elif place < len(bent):
            bent[place] ^= rng.randrange(1, 256)
    return bytes(bent)


def checksum(tensor: Tensor) -> int:
    """As files have it."""
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else 0
