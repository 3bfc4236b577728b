"""From a Cayley network to an integer program, with the proof of what it loses (theory §10)."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from .. import verified
from ..errors import NotWellPosedError, OptionError
from ..operators.quantized import CayleyWeight
from .affine import Affine, integer_affine
from .boxes import Box
from .fixedpoint import INT32, SLACK, Floats, above, fit_multipliers
from .grid import Grid
from .network import CodedLinear, CodedMatrix
from .plan import Iterates, Iteration, Plan, finer, iterate_limit
from .program import CayleyProgram

__all__ = ["plan_cayley"]


class _Map:
    """v ↦ |C̃ v + c(x)| over a box of inputs: proved constants."""

    def __init__(self, weights: CayleyWeight, injection: CodedLinear, box: Box) -> None:
        self.C = CodedMatrix.of(weights.C, "the Cayley matrix")
        if self.C.bits > 8:
            raise OptionError(
                f"the Cayley matrix has {self.C.bits} bits; kernels read 1 to 8: quantize with --bits 8 or fewer"
            )
        self.alpha = float(weights.alpha)
        C, U, b = self.C.real(), injection.weight.real(), injection.bias_real()
        self.rho = verified.spectral_norm(C, verified.UNIT * verified.absolute_norm(C))  # a float64 scale rounds
        self.rows = verified.row_norms(C).numpy()
        self.q = box.entries(U, b)
        plus = C + torch.eye(len(C), dtype=torch.float64)
        M, offset = self.alpha * (plus @ U), self.alpha * (plus @ b)
        # forming M and the offset is rounded; so is b, where it is not a double
        reach = box.center.abs() + box.half
        lost = verified.gamma(len(C) + 8) * self.alpha * (plus.abs() @ (U.abs() @ reach + b.abs())) * SLACK
        self.c = (box.entries(M, offset) + lost).numpy() * SLACK
        self.c_norm = min(box.norm(M, offset) + _norm(lost), _norm(box.entries(M, offset) + lost)) * SLACK


def _norm(values: Tensor | Floats) -> float:
    row = torch.as_tensor(values, dtype=torch.float64)[None]
    return float(verified.row_norms(row)[0])


def plan_cayley(
    weights: CayleyWeight,
    injection: CodedLinear,
    grid: Grid,
    box: Box,
    iterates: Iterates,
) -> Plan:
    """The program without its steps and head, and what bounds it: see :class:`Plan`.

    Raises:
        OptionError: bits without a kernel; sums beyond 32 bits; iterates that are too coarse for their range.
    """
    on = _Map(weights, injection, box)
    limit = iterate_limit(iterates.bits)
    entry = _injection(on, injection, grid)
    unit = float(iterates.measured or 0.0) * iterates.headroom / limit
    if on.rho < 1:
        proved = _proved_unit(on, entry, limit)
        unit = proved if iterates.measured is None else min(unit, proved)
    else:
        proved = np.inf
        if iterates.measured is None:
            raise NotWellPosedError(
                f"the steps are not proved to contract: ‖C‖ <= {on.rho:.9g} is all that is proved; use more bits", 0.0
            )
    if not unit > 0:
        raise OptionError("the iterates are all zero on the calibration inputs; give other inputs")
    return _build(on, entry, limit, unit, checked=unit < proved)


def _injection(on: _Map, injection: CodedLinear, grid: Grid) -> tuple[Affine, Fraction]:
    """(p = α(U x + b) in integers, its unit): as fine as lets K p stay within int32."""
    sums = on.C.row_sums
    p = on.alpha * on.q.numpy() * SLACK + 1e-300
    widest = max(float((np.abs(on.C.codes) @ p).max()), float(p.max()), 1e-30)
    unit = Fraction(widest) / (INT32 - 8 * int(sums.max(initial=0)) - 2**20)
    alpha = Fraction(on.alpha)
    ranges = (grid.low, grid.high)
    for _ in range(8):
        entry = integer_affine(injection, alpha / unit, ranges, grid.steps, grid.offsets, "the injection")
        largest = int((np.abs(on.C.codes) @ entry.magnitude).max(initial=0))
        if largest <= INT32:
            return entry, unit
        unit *= Fraction(largest, INT32) + Fraction(1, 1000)
    raise OptionError("the injection does not fit 32 bits; narrow the input range")


def _proved_unit(on: _Map, entry: tuple[Affine, Fraction], limit: int) -> float:
    """The finest unit in which no iterate exceeds ``limit`` on any input of the box."""
    unit = (on.c_norm / (1 - on.rho) * float(on.rows.max(initial=0)) + float(on.c.max(initial=0))) / limit + 1e-30
    for _ in range(50):
        largest = _largest(on, unit, _error(on, entry, unit, limit)[0], limit)
        if largest <= limit * unit:
            return unit
        unit *= max(largest / (limit * unit), 1.0) * (1 + 1e-6)
    raise OptionError(
        f"no grid of {limit} levels holds the iterates: the contraction factor {on.rho:.6g} is too near 1; "
        f"use {finer(limit)}"
    )


def _largest(on: _Map, unit: float, step_error: float, limit: int) -> float:
    """Upper bound of every entry of every iterate: |C̃_i v| + |c_i| + the error of a step."""
    norm = (on.c_norm + step_error) / (1 - on.rho) * SLACK
    return float((on.rows * norm + on.c).max(initial=0)) * SLACK + step_error


def _start(on: _Map, entry: tuple[Affine, Fraction], unit: float) -> tuple[list[Fraction], int]:
    """(own factor and cross factors of c in units of 2^−fraction, fraction)."""
    largest = float(on.c.max(initial=0)) / unit + 4
    fraction = 20
    while fraction > 0 and largest * 2.0**fraction >= 2**30:
        fraction -= 1
    ratio = entry[1] / Fraction(unit) * 2**fraction
    return [ratio, *(ratio * s for s in on.C.scales)], fraction


def _error(on: _Map, entry: tuple[Affine, Fraction], unit: float, limit: int) -> tuple[float, CayleyProgram]:
    """(2-norm bound of what one step loses, the program that loses it, without steps and head)."""
    affine, p_unit = entry
    factors, fraction = _start(on, entry, unit)
    p_sums = np.abs(on.C.codes) @ affine.magnitude
    gains = [int(affine.magnitude.max(initial=0)), *(int(s) for s in p_sums)]
    start = fit_multipliers(factors, (len(factors),), gains)
    sums = limit * on.C.row_sums
    step = fit_multipliers(list(on.C.scales), (len(sums),), [int(s) for s in sums], min(40, fraction + 30))
    if step.shift < fraction:
        raise OptionError(
            f"a row scale of {max(map(float, on.C.scales)):.3g} in the Cayley matrix is out of proportion"
        )
    if int(sums.max(initial=0)) > INT32:
        raise OptionError(
            f"{on.C.codes.shape[0]} features with {on.C.bits}-bit codes and 16-bit iterates exceed 32-bit sums; "
            "use --activation-bits 8"
        )
    own = 0.5 + step.errors * sums
    c_error = 0.5 + start.errors[0] * affine.magnitude + start.errors[1:] * p_sums
    cross = np.array([float(f) for f in factors[1:]])
    p_error = float(factors[0]) * affine.errors + cross * (np.abs(on.C.codes) @ affine.errors)
    reach = float((on.c / unit * 2.0**fraction + c_error + p_error).max(initial=0)) * SLACK
    if reach > INT32 or fraction < 4:
        raise OptionError(
            f"inputs of the declared range drive the injection to {float(on.c.max(initial=0)):.4g}, far beyond the "
            f"iterates' grid (largest {limit * unit:.4g}); narrow the range, or calibrate on larger inputs"
        )
    own = own + c_error * 2.0**-fraction
    lost = _norm(own * unit) + (1 + on.rho) * _norm(affine.errors * above(p_unit)) * SLACK
    program = CayleyProgram(
        low=0, high=0, injection=affine, limit=limit, checked=False, steps=0, head=None, C=on.C,
        start_own=int(start.values[0]), start_cross=start.values[1:], start_shift=start.shift, fraction=fraction,
        multipliers=step.values, shift=step.shift,
    )  # fmt: skip
    return lost * SLACK, program


def _build(on: _Map, entry: tuple[Affine, Fraction], limit: int, unit: float, checked: bool) -> Plan:
    step_error, program = _error(on, entry, unit, limit)
    n = len(on.rows)
    norm = np.inf if on.rho >= 1 else (on.c_norm + step_error) / (1 - on.rho) * SLACK
    if checked:
        norm = min(norm, limit * unit * n**0.5 * SLACK)
    iteration = Iteration(
        contraction=on.rho,
        step_error=step_error,
        iterate_norm=float(norm),
        solution_norm=on.c_norm / (1 - on.rho) * SLACK if on.rho < 1 else np.inf,
        first=1,
        checked=checked,
    )
    accumulator = int(np.maximum(limit * on.C.row_sums, np.abs(on.C.codes) @ entry[0].magnitude).max(initial=0))
    return Plan(program, unit, iteration, accumulator)
