"""Frozen schemes, integer codes with their scales, and the pure functions that make them."""

from __future__ import annotations

from .codes import QuantizedSkew, QuantizedTensor, code_dtype, pack, unpack
from .rounding import fit_scale, levels, round_to_codes
from .schemes import (
    Assembled,
    Cayley,
    Compensated,
    Scheme,
    Structured,
    scheme_to_dict,
)

__all__ = [
    "Assembled",
    "Cayley",
    "Compensated",
    "QuantizedSkew",
    "QuantizedTensor",
    "Scheme",
    "Structured",
    "code_dtype",
    "fit_scale",
    "levels",
    "pack",
    "round_to_codes",
    "scheme_to_dict",
    "unpack",
]
