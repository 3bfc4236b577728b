"""From a structured network to an integer program of forward–backward steps on the codes of A and K (theory §10)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from .. import verified
from ..errors import NotWellPosedError, OptionError
from ..operators.base import golden_section
from ..operators.quantized import StructuredWeight
from .affine import Affine, integer_affine
from .boxes import Box
from .fixedpoint import INT32, SLACK, Floats, Integers, exact_product, fit_multipliers, requantize
from .grid import Grid
from .network import WIDEST, CodedLinear, CodedMatrix
from .plan import Iterates, Iteration, Plan, finer, iterate_limit
from .program import Program

__all__ = ["FactoredMap", "FactoredProgram", "plan_factored"]


@dataclass(frozen=True, eq=False)
class FactoredProgram(Program):
    """Forward–backward, z⁺ = max((1 − αm) z + α (K z − Aᵀ(A z)) + α q, 0), K skew (theory §2, §4).

    With Â, K̂ the codes: y = Â z, ŷ = round(2^−pull_shift pull y) with ``pull_fraction`` fractional bits, w = Âᵀ ŷ,
    t = own z + skew (K̂ z) − 2^(shift − pull_fraction) w + 2^(shift − fraction) p, z⁺ = round(2^−shift max(t, 0)).
    """

    A: CodedMatrix
    K: Integers
    K_bits: int
    own: int
    skew: int
    shift: int
    pull: Integers
    pull_shift: int
    pull_fraction: int
    fraction: int

    def solve(self, p: Integers) -> tuple[Integers, Integers]:
        within = np.ones(len(p), dtype=bool)
        z = np.zeros_like(p)
        for _ in range(self.steps + 1):
            y = requantize(self.pull * exact_product(z, self.A.codes), self.pull_shift)
            w = exact_product(y, self.A.codes.T)
            t = self.own * z + self.skew * exact_product(z, self.K)
            t += (p << (self.shift - self.fraction)) - (w << (self.shift - self.pull_fraction))
            z = requantize(np.maximum(t, 0), self.shift)
            within &= (z <= self.limit).all(axis=1)
            z = np.minimum(z, self.limit)
        return z, within

    @property
    def additions_only(self) -> bool:
        """Whether the recurrent part needs no multiplication: codes of one and two bits."""
        return max(self.A.bits, self.K_bits) <= 2

    @property
    def recurrent_bits(self) -> int:
        return max(self.A.bits, self.K_bits)

    @property
    def macs(self) -> int:
        n = self.features
        head = 0 if self.head is None else self.head.codes.size
        # the start T(0) is a step on zeros, and is computed like any other
        return self.injection.codes.size + (self.steps + 1) * (n * (n - 1) + 2 * self.A.codes.size) + head


@dataclass(frozen=True, eq=False)
class FactoredMap:
    """z ↦ max((1 − αm) z + α (K z − Aᵀ(A z)) + α q, 0): its codes, the step α and a proved contraction factor ρ."""

    A: CodedMatrix
    K: Integers
    K_bits: int
    K_scale: Fraction
    margin: float
    alpha: float
    rho: float

    @classmethod
    def of(cls, weights: StructuredWeight) -> FactoredMap:
        """α minimises ‖(1 − α) I + α W‖₂; ρ is an upper bound of that, proved (theory §2, §6)."""
        margin = float(weights.margin)
        if not margin > 0:
            raise NotWellPosedError(f"the stored margin is {margin:g}; forward–backward needs m > 0", margin)
        if weights.K.bits > WIDEST:
            raise OptionError(f"K has {weights.K.bits} bits; there are kernels for 1 to {WIDEST}: quantize it again")
        half = np.zeros((weights.features, weights.features), dtype=np.int64)
        half[np.triu_indices(weights.features, 1)] = weights.K.codes.cpu().numpy()
        W, error = weights.assemble()
        eye = torch.eye(len(W), dtype=torch.float64)
        guess = margin / float(torch.linalg.matrix_norm(eye - W, 2)) ** 2

        def factor(alpha: float) -> float:
            return float(torch.linalg.matrix_norm((1 - alpha) * eye + alpha * W, 2))

        alpha = min(golden_section(factor, guess / 4, guess * 4), 1 / margin)
        M = (1 - alpha) * eye + alpha * W
        forming = verified.gamma(4) * (1 + alpha + alpha * verified.absolute_norm(W))
        rho = verified.spectral_norm(M, verified.up((alpha * error + forming) * SLACK))
        A, scale = CodedMatrix.of(weights.A, "A"), Fraction(float(weights.K.scale))
        return cls(A, half - half.T, weights.K.bits, scale, margin, alpha, rho)


class _Map:
    """A :class:`FactoredMap` over a box of inputs: how large α q can be."""

    def __init__(self, weights: StructuredWeight, injection: CodedLinear, box: Box) -> None:
        step = FactoredMap.of(weights)
        self.A, self.K_codes, self.K_bits, self.K_scale = step.A, step.K, step.K_bits, step.K_scale
        self.margin, self.alpha, self.rho = step.margin, step.alpha, step.rho
        U, b = injection.weight.real(), injection.bias_real()
        self.q = box.entries(U, b).numpy()
        self.q_positive = box.positive(U, b)


def plan_factored(weights: StructuredWeight, injection: CodedLinear, grid: Grid, box: Box, iterates: Iterates) -> Plan:
    """The program without its steps and head, and what bounds it: see :class:`Plan`.

    Raises:
        OptionError: bits without a kernel; sums beyond 32 bits; a contraction too near 1; iterates that are too coarse
            for their range.
    """
    on = _Map(weights, injection, box)
    if on.rho >= 1:
        raise OptionError(
            f"no forward–backward step is proved to contract (factor {on.rho:.9g}): the margin is too small"
        )
    limit = iterate_limit(iterates.bits)
    unit = proved = _proved_unit(on, injection, grid, limit)
    if iterates.measured is not None:
        unit = min(iterates.measured * iterates.headroom / limit, proved)
    if not unit > 0:
        raise OptionError("the iterates are all zero on the calibration inputs; give other inputs")
    step_error, program = _error(on, injection, grid, unit, limit)
    checked = unit < proved
    norm = _iterate_norm(on, step_error)
    if checked:
        norm = min(norm, limit * unit * program.features**0.5 * SLACK)
    iteration = Iteration(
        contraction=on.rho,
        step_error=step_error,
        iterate_norm=norm,
        solution_norm=on.q_positive / on.margin * SLACK,
        first=1,
        checked=checked,
    )
    accumulator = int(limit * max(_sums(on.K_codes), _sums(on.A.codes)))
    return Plan(program, unit, iteration, accumulator)


def _sums(codes: Integers) -> int:
    return int(np.abs(codes).sum(axis=1).max(initial=0))


def _iterate_norm(on: _Map, step_error: float) -> float:
    """Upper bound of ‖z_k‖: ‖max(a + b, 0)‖ <= ‖a‖ + ‖max(b, 0)‖, and ‖z_k − z*‖ <= ρ ‖z*‖ + rounding."""
    rounding = step_error / (1 - on.rho)
    return min((on.alpha * on.q_positive + step_error) / (1 - on.rho), 2 * on.q_positive / on.margin + rounding) * SLACK


def _proved_unit(on: _Map, injection: CodedLinear, grid: Grid, limit: int) -> float:
    """The finest unit in which no iterate exceeds ``limit`` on any input of the box."""
    unit = _iterate_norm(on, 0.0) / limit + 1e-30
    for _ in range(50):
        largest = _iterate_norm(on, _error(on, injection, grid, unit, limit)[0])
        if largest <= limit * unit:
            return unit
        unit *= largest / (limit * unit) * (1 + 1e-6)
        if unit > 1e30:
            break
    raise OptionError(
        f"no grid of {limit} levels holds the iterates: the contraction factor {on.rho:.6g} is too near 1; use "
        f"{finer(limit)}, or the Cayley scheme"
    )


def _error(on: _Map, injection: CodedLinear, grid: Grid, unit: float, limit: int) -> tuple[float, FactoredProgram]:
    """(2-norm bound of what one step loses, the program that loses it, without steps and head)."""
    alpha, scale = Fraction(on.alpha), Fraction(unit)
    k_sums, y_sums = (limit * np.abs(codes).sum(axis=1) for codes in (on.K_codes, on.A.codes))
    if max(int(k_sums.max(initial=0)), int(y_sums.max(initial=0))) > INT32:
        raise OptionError(
            f"{len(k_sums)} features with {max(on.A.bits, on.K_bits)}-bit codes and these iterates exceed 32-bit sums; "
            "use --activation-bits 8 or fewer bits"
        )
    factors = [1 - alpha * Fraction(on.margin), alpha * on.K_scale]
    step = fit_multipliers(factors, (2,), [limit, int(k_sums.max(initial=0))], 30)
    # the four summands of t stay below 2^45, 2^61, 2^61 and 2^60
    pull, pull_fraction, pull_error = _pull(on, alpha, y_sums, step.shift)
    entry, fraction = _entry(on, injection, grid, alpha / scale, step.shift)
    own = 0.5 + step.errors[0] * limit + step.errors[1] * k_sums
    own = own + pull_error + entry.errors * 2.0**-fraction
    lost = float(verified.row_norms(torch.from_numpy(own * unit)[None])[0]) * SLACK
    program = FactoredProgram(
        low=0, high=0, injection=entry, limit=limit, checked=False, steps=0, head=None, A=on.A, K=on.K_codes,
        K_bits=on.K_bits, own=int(step.values[0]), skew=int(step.values[1]), shift=step.shift, pull=pull[0],
        pull_shift=pull[1], pull_fraction=pull_fraction, fraction=fraction,
    )  # fmt: skip
    return lost, program


def _pull(on: _Map, alpha: Fraction, y_sums: Integers, most: int) -> tuple[tuple[Integers, int], int, Floats]:
    """((multipliers of y, shift), fractional bits of ŷ, what α Aᵀ A z loses by it in each entry, in units)."""
    codes = np.abs(on.A.codes)
    squares = [alpha * s * s for s in on.A.scales]
    for bits in range(min(16, most), -1, -1):
        fitted = fit_multipliers([s * 2**bits for s in squares], (len(squares),), [int(v) for v in y_sums])
        largest = (
            np.array([abs(int(m)) * int(v) >> fitted.shift for m, v in zip(fitted.values, y_sums, strict=True)]) + 1
        )
        if int((codes.T @ largest).max(initial=0)) <= INT32 and int(largest.max(initial=0)) <= INT32:
            lost = codes.T @ (0.5 + fitted.errors * y_sums) * 2.0**-bits
            return (fitted.values, fitted.shift), bits, lost
    raise OptionError("AᵀA does not fit 32-bit sums; use fewer bits")


def _entry(on: _Map, injection: CodedLinear, grid: Grid, factor: Fraction, most: int) -> tuple[Affine, int]:
    """(α (U x + b) in units of 2^−fraction, fraction)."""
    largest = float(on.q.max(initial=0)) * float(factor) + 4
    fraction = min(20, most)
    while fraction > 0 and largest * 2.0**fraction >= 2**30:
        fraction -= 1
    if largest * 2.0**fraction >= 2**30:
        raise OptionError(
            f"inputs of the declared range drive the injection {largest:.4g} units far; narrow the range, or "
            "calibrate on larger inputs"
        )
    ranges = (grid.low, grid.high)
    return integer_affine(injection, factor * 2**fraction, ranges, grid.steps, grid.offsets, "the injection"), fraction
