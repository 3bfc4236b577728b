"""Integer programs as data, and their emulation in numpy: what the C code computes, bit for bit (theory §10)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from .affine import Affine
from .fixedpoint import INT32, Integers, exact_product, requantize
from .network import CodedMatrix

__all__ = ["INPUT_RANGE", "ITERATE_RANGE", "OK", "CayleyProgram", "Program"]

OK, INPUT_RANGE, ITERATE_RANGE = 0, 1, 2
"""What the program answers beside its result; after anything but ``OK`` the result says nothing."""


@dataclass(frozen=True, eq=False)
class Program(ABC):
    """``low <= raw <= high`` in, equilibrium in integers (and class scores, with a head) out.

    ``injection`` gives p in units of its own; ``limit`` is the largest iterate, ``checked`` whether a larger one can
    occur and is reported; ``steps`` the products with the recurrent codes; ``head`` acts on the equilibrium.
    """

    low: int
    high: int
    injection: Affine
    limit: int
    checked: bool
    steps: int
    head: Affine | None

    @property
    def features(self) -> int:
        return self.injection.codes.shape[0]

    @property
    def inputs(self) -> int:
        return self.injection.codes.shape[1]

    @property
    def state_type(self) -> str:
        """The C type of an iterate."""
        return "uint8_t" if self.limit <= 255 else "int16_t"

    def __call__(self, raw: Integers) -> tuple[Integers, Integers | None, Integers]:
        """(equilibrium ``(B, n)``, scores ``(B, k)`` or None, status ``(B,)``) of ``raw (B, d)``; 0 where not OK."""
        raw = np.asarray(raw, dtype=np.int64)
        status = np.where(((raw < self.low) | (raw > self.high)).any(axis=1), INPUT_RANGE, OK)
        # outside its range nothing about the program is proved; such rows are run on the low end and blanked
        z, within = self.solve(self.injection(np.where(status[:, None] == OK, raw, self.low)))
        status = np.where((status == OK) & ~within, ITERATE_RANGE, status)
        z = np.where(status[:, None] == OK, z, 0)
        if self.head is None:
            return z, None, status
        return z, np.where(status[:, None] == OK, self.head(z), 0), status

    @abstractmethod
    def solve(self, p: Integers) -> tuple[Integers, Integers]:
        """(equilibrium ``(B, n)``, whether every iterate stayed within ``limit`` (B,)) for the injection p."""

    @property
    @abstractmethod
    def recurrent_bits(self) -> int:
        """Bits of the recurrent codes."""

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply–accumulates of one image, additions of ±x counted as such."""


@dataclass(frozen=True, eq=False)
class CayleyProgram(Program):
    """Peaceman–Rachford, v⁺ = |C̃ v + c| with v = |u| (theory §2): codes times non-negative integers.

    c = round(2^−start_shift (start_own p + start_cross (K p))), with ``fraction`` fractional bits; a step is
    t = multipliers (K v) + 2^(shift − fraction) c, v⁺ = round(2^−shift |t|); the equilibrium is v⁺ where t > 0.
    """

    C: CodedMatrix
    start_own: int
    start_cross: Integers
    start_shift: int
    fraction: int
    multipliers: Integers
    shift: int

    def solve(self, p: Integers) -> tuple[Integers, Integers]:
        K = self.C.codes
        c = requantize(self.start_own * p + self.start_cross * exact_product(p, K), self.start_shift)
        assert int(np.abs(c).max(initial=0)) <= INT32
        lift = 1 << (self.shift - self.fraction)
        t = c * lift
        within = np.ones(len(p), dtype=bool)
        for _ in range(self.steps):
            v = np.abs(requantize(t, self.shift))
            within &= (v <= self.limit).all(axis=1)
            v = np.minimum(v, self.limit)
            t = self.multipliers * exact_product(v, K) + c * lift
        z = requantize(np.maximum(t, 0), self.shift)
        within &= (z <= self.limit).all(axis=1)
        return np.minimum(z, self.limit), within

    @property
    def recurrent_bits(self) -> int:
        return self.C.bits

    @property
    def macs(self) -> int:
        n = self.features
        head = 0 if self.head is None else self.head.codes.size
        return self.injection.codes.size + (self.steps + 1) * n * n + head
