"""What an integer iteration is proved to do, whatever splitting it runs: steps for a tolerance (theory §10, C2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import OptionError
from .fixedpoint import SLACK
from .program import Program

__all__ = ["Iterates", "Iteration", "Plan", "finer", "iterate_limit"]

MOST_STEPS = 100_000
UNCERTIFIED_STEPS = 100


def iterate_limit(bits: int) -> int:
    """The largest iterate: magnitudes alone are stored, in uint8 or int16."""
    if bits not in (8, 16):
        raise OptionError(f"activation bits are {bits}; there are kernels for 8 and 16")
    return 255 if bits == 8 else 2**15 - 1


def finer(limit: int) -> str:
    """What to use where iterates up to ``limit`` are too coarse."""
    return "--activation-bits 16" if limit <= 255 else "weights with a larger margin (more bits, a margin penalty)"


@dataclass(frozen=True)
class Iterates:
    """How iterates are stored: their bits, and the largest one seen on calibration inputs, if there were any."""

    bits: int
    measured: float | None = None
    headroom: float = 1.25


@dataclass(frozen=True)
class Iteration:
    """Proved bounds of an inexact fixed-point iteration in real units, all in the 2-norm, over all inputs.

    ``contraction`` ρ of the exact step; ``step_error`` ε of the computed one; ``iterate_norm`` of any iterate that is
    not reported as out of range; ``solution_norm`` of the fixed point; ``first``: products' worth of steps that the
    start already is; ``checked``: whether iterates may leave their range, which is then reported.
    """

    contraction: float
    step_error: float
    iterate_norm: float
    solution_norm: float
    first: int
    checked: bool

    @property
    def rounding(self) -> float:
        """ε/(1 − ρ): what no number of steps goes below (C2)."""
        return self.step_error / (1 - self.contraction) * SLACK if self.contraction < 1 else math.inf

    def truncation(self, steps: int) -> float:
        """Upper bound of ρ^{K + first} ‖v*‖."""
        if self.contraction >= 1:
            return math.inf
        norm, before = self.solution_norm, self._power(steps + self.first - 1)
        if self.checked and before < 1:
            # ‖v_{K−1}‖ <= iterate_norm and ‖v_{K−1} − v*‖ <= ρ^{K−1+first} ‖v*‖ + rounding; of the last one just the
            # positive part was compared with its limit
            norm = min(norm, (self.iterate_norm + self.rounding) / (1 - before))
        return self._power(steps + self.first) * norm * SLACK

    def _power(self, exponent: int) -> float:
        """Upper bound of ρ^exponent."""
        if exponent <= 0:
            return 1.0
        return math.exp(exponent * math.log(self.contraction)) * SLACK if self.contraction else 0.0

    def steps_for(self, tol: float | None, more: float = 0.0) -> int:
        """The fewest steps with rounding + truncation + ``more`` <= tol; by default truncation <= rounding / 4.

        Raises:
            OptionError: a tolerance that is not positive, or that the grid cannot reach.
        """
        if self.contraction >= 1:
            return UNCERTIFIED_STEPS
        floor = self.rounding + more
        if tol is None:
            allowed = self.rounding / 4
        else:
            if not 0 < tol < math.inf:
                raise OptionError(f"tol is {tol!r}; give a positive number")
            if tol <= floor:
                raise OptionError(
                    f"tol {tol:g} cannot be reached: the rounding of this grid alone is bounded by {floor:.6g}, and "
                    "more steps do not lower that; use finer iterates (--activation-bits 16), a narrower input range, "
                    "or a larger tol"
                )
            allowed = tol - floor
        low, high = 0, 1
        while self.truncation(high) > allowed:
            high *= 2
            if high > MOST_STEPS:
                raise OptionError(f"more than {MOST_STEPS} steps would be needed; give a larger tol")
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.truncation(middle) <= allowed else (middle + 1, high)
        return max(low, 1)


@dataclass(frozen=True, eq=False)
class Plan:
    """A program but for its steps and head, its unit, what is proved of its iteration, and its largest 32-bit sum."""

    program: Program
    unit: float
    iteration: Iteration
    accumulator: int
