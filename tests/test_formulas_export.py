"""What an export proves, formula by formula: small exact inputs, and the bound computed again by hand (theory §10).

Each bound must be at least its formula and hardly more: 1 % either way fails.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from equipoise.errors import OptionError
from equipoise.export import cayley, factored, fixedpoint
from equipoise.export.affine import Affine, integer_affine
from equipoise.export.boxes import Box, box_of, farthest, half_step
from equipoise.export.fixedpoint import above, fit_multipliers
from equipoise.export.grid import Grid
from equipoise.export.network import CodedLinear, CodedMatrix
from equipoise.export.plan import Iteration, finer
from equipoise.export.proof import Exact, Reference, equilibrium_bounds, score_bound
from equipoise.runtime import Runtime

TIGHT = 1e-6
GRID = Grid(2, 0, 8, (Fraction(1, 8),), (Fraction(-1, 2),), natural=False)
WEIGHT = CodedMatrix(np.array([[1, -2], [3, 1]]), (Fraction(1, 3), Fraction(1, 5)), 3)
LINEAR = CodedLinear(WEIGHT, (Fraction(1, 7),) * 2)
LEAST, MOST = 0.998, 1.002
"""Just below and just above where something fits: nearer than 1 % of an exponent would show."""


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def is_tight(value: Any, formula: Any, most: float = TIGHT) -> None:
    """``formula <= value <= formula (1 + most)`` entrywise, but for the rounding of the formula itself."""
    value, formula = (np.asarray(v, dtype=np.float64) for v in (value, formula))
    assert (value >= formula * (1 - 1e-12)).all(), (value, formula)
    assert (value <= formula * (1 + most)).all(), (value, formula)


def norm(values: Any) -> float:
    return math.sqrt(math.fsum(float(v) ** 2 for v in values))


def distance(real: Fraction, stored: Any, shift: int) -> float:
    return float(abs(real - Fraction(int(stored), 2**shift)))


def test_rounding_and_truncation_are_c2() -> None:
    iteration = Iteration(0.5, 3.0, math.inf, 7.0, 1, False)
    is_tight(iteration.rounding, 6.0)
    is_tight(iteration.truncation(3), 7 / 16)
    checked = Iteration(0.9, 0.05, 2.0, math.inf, 1, True)
    for steps in (1, 2, 9):
        is_tight(checked.truncation(steps), 0.9 ** (steps + 1) * 2.5 / (1 - 0.9**steps))


def test_without_a_tolerance_a_quarter_of_the_rounding_may_be_truncated() -> None:
    quarter = Iteration(0.5, 0.5, math.inf, 16 * 0.995, 1, False)  # rounding 1, truncation(5) 0.995/4
    assert quarter.steps_for(None) == 5
    assert replace(quarter, solution_norm=16 * 1.005).steps_for(None) == 6
    assert finer(255) == "--activation-bits 16" != finer(256)


@pytest.mark.parametrize("bits", [31, 24])
def test_multipliers_are_as_fine_as_fits_and_nearest(bits: int) -> None:
    for share, shift in ((LEAST, 40), (MOST, 39)):
        most = Fraction(share) * 2 ** (bits - 1) / 2**40
        fitted = fit_multipliers([most, most / 3], (2,), [1, 1], bits=bits)
        assert fitted.shift == shift
        for factor, value, error in zip((most, most / 3), fitted.values, fitted.errors, strict=True):
            assert abs(factor * 2**shift - int(value)) <= Fraction(1, 2)
            is_tight(error, distance(factor, value, shift))
        gained = fit_multipliers([Fraction(share) / 2**40], (1,), [2**61], bits=bits)
        assert gained.shift == shift  # the product stays below 2^61
    end = 2 ** (bits - 2)
    assert fit_multipliers([Fraction(LEAST) * end], (1,), [1], bits=bits).shift == 1
    with pytest.raises(OptionError):
        fit_multipliers([Fraction(MOST) * end], (1,), [1], bits=bits)


def test_rationals_are_rounded_up_by_a_hair() -> None:
    assert np.iinfo(np.int32).max == fixedpoint.INT32
    for value in (Fraction(1, 3), Fraction(2, 7) * 2**60, Fraction(1, 2)):
        assert value <= Fraction(above(value)) <= value * (1 + Fraction(1, 2**50))


def affine_errors(found: Affine, factor: Fraction, grid: Grid) -> list[float]:
    """1/2 + |f s_i a − M_i 2^−s| max|Σ K x| + |f b' − B 2^−s|."""
    (step,), (offset,), errors = grid.steps, grid.offsets, []
    for i, (row, scale, bias) in enumerate(zip(WEIGHT.codes.tolist(), WEIGHT.scales, LINEAR.bias, strict=True)):
        largest = max(abs(row[0] * a + row[1] * b) for a in (grid.low, grid.high) for b in (grid.low, grid.high))
        moved = distance(factor * scale * step, found.multipliers[i, 0], found.shift) * largest
        start = factor * (bias + scale * offset * sum(row))
        errors.append(0.5 + moved + distance(start, found.offsets[i], found.shift))
        assert abs(start * 2**found.shift - int(found.offsets[i])) <= Fraction(1, 2)
    return errors


def test_an_affine_map_errs_by_a_half_its_multipliers_and_its_offset() -> None:
    for factor in (Fraction(1, 9), Fraction(2**23, 9)):  # the second has few bits left for fractions
        found = integer_affine(LINEAR, factor, (GRID.low, GRID.high), GRID.steps, GRID.offsets, "it")
        is_tight(found.errors, affine_errors(found, factor, GRID))


def test_suprema_over_a_box_are_reached() -> None:
    eye, zero = torch.eye(2).double(), torch.zeros(2).double()
    butterfly = f64([[1.0, 1.0], [1.0, -1.0]])  # √2 times a rotation: ‖M δ‖ <= 2 over |δ| <= 1, not √8
    box, around_zero = Box(f64([3.0, 1.0]), f64([0.5, 0.25])), Box(zero, zero + 1)
    is_tight(box.entries(f64([[1.0, -2.0]]), f64([4.0])), [6.0])
    is_tight(box.norm(eye, zero), norm([3.5, 1.25]))
    is_tight(box.norm(eye, zero, 0.5), 1.5 * norm([3.5, 1.25]))
    is_tight(around_zero.norm(butterfly, zero), 2.0)
    is_tight(around_zero.positive(eye, f64([-5.0, 1.0])), 2.0)
    is_tight(around_zero.positive(butterfly, zero), 2.0)
    is_tight(farthest(f64([[1.0, 0.0], [0.0, 4.0]]), f64([2.0, 0.5])), norm([2, 2]))
    # columns √18 and √2 with w_j = (norm_j / largest)^{3/2}
    is_tight(farthest(f64([[3.0, 1.0], [3.0, -1.0]]), zero + 1), math.sqrt(18 * (1 + 3**-1.5)))


def test_the_box_of_a_grid_reaches_half_a_step_beyond_its_ends() -> None:
    grid, near = replace(GRID, offsets=(Fraction(1, 2),)), 2.0**-20 * 1.5  # from 1/2 to 3/2
    box, slip = box_of(grid)
    is_tight(box.center, [1.0, 1.0])
    is_tight(box.half, [0.5 + 1 / 16 + near] * 2)
    is_tight(slip, [1 / 16 + near] * 2)
    is_tight(half_step(grid), [1 / 16] * 2)
    box, slip = box_of(replace(grid, natural=True))
    is_tight(box.half, [0.5 + near] * 2)
    is_tight(slip, [near] * 2)


def cayley_map(**values: Any) -> Any:
    """Proved constants of a map, as numbers: nothing but the formulas relates them."""
    C = CodedMatrix(np.array([[5, -3], [2, 7]]), (Fraction(1, 17), Fraction(1, 19)), 4)
    known = {"C": C, "rho": 0.5, "rows": np.array([0.3, 0.4]), "c": np.array([2.0, 1.0]), "c_norm": 3.0, "alpha": 0.7}
    return SimpleNamespace(**{**known, "q": f64([2.0, 1.5]), **values})


def cayley_entry(unit: Fraction) -> tuple[Any, Fraction]:
    return SimpleNamespace(magnitude=np.array([300, 500]), errors=np.array([0.75, 1.5])), unit


@pytest.mark.parametrize("size", [2.0, 60000.0])
def test_what_a_cayley_step_loses(size: float) -> None:
    on, unit, limit = cayley_map(c=np.array([size, 1.0])), 2.0**-8, 255
    entry, p_unit = cayley_entry(Fraction(1, 999))
    lost, program = cayley._error(on, (entry, p_unit), unit, limit)
    assert program.fraction == (20 if size == 2 else 6)  # 60000 · 2^8 · 2^6 < 2^30
    ratio = p_unit / Fraction(unit) * 2**program.fraction
    own = []
    for i, (row, scale) in enumerate(zip(np.abs(on.C.codes), on.C.scales, strict=True)):
        c = 0.5 + distance(ratio, program.start_own, program.start_shift) * int(entry.magnitude[i])
        c += distance(ratio * scale, program.start_cross[i], program.start_shift) * int(row @ entry.magnitude)
        step = distance(scale, program.multipliers[i], program.shift) * limit * int(row.sum())
        own.append(0.5 + step + c / 2**program.fraction)
    is_tight(lost, unit * norm(own) + 1.5 * float(p_unit) * norm(entry.errors), 1e-8)


def test_how_far_cayley_iterates_reach() -> None:
    on, entry = cayley_map(c=np.array([1.0, 2.0])), cayley_entry(Fraction(1, 999))
    is_tight(cayley._largest(on, 1.0, 0.25, 255), 0.4 * 6.5 + 2 + 0.25)
    for limit in (255, 2**15 - 1):
        unit = cayley._proved_unit(on, entry, limit)
        error = cayley._error(on, entry, unit, limit)[0]
        is_tight(limit * unit, 0.4 * (3 + error) / 0.5 + 2 + error, 1e-4)  # found in steps of 1e-6
        plan = cayley._build(on, entry, limit, unit, checked=False)
        is_tight(plan.iteration.step_error, error)
        is_tight(plan.iteration.iterate_norm, (3 + error) / 0.5)
        is_tight(plan.iteration.solution_norm, 3 / 0.5)
        checked = cayley._build(on, entry, limit, unit / 4, checked=True)
        is_tight(checked.iteration.iterate_norm, limit * unit / 4 * math.sqrt(2))
    is_tight(cayley._norm(f64([3.0, 4.0])), 5.0)


def factored_map(**values: Any) -> Any:
    A = CodedMatrix(np.array([[1, -1], [1, 0], [0, 1]]), (Fraction(1, 3), Fraction(1, 5), Fraction(1, 7)), 2)
    known = {"A": A, "K_codes": np.array([[0, 3], [-3, 0]]), "K_bits": 3, "K_scale": Fraction(1, 11), "margin": 0.4}
    more = {"alpha": 0.75, "rho": 0.5, "q": np.array([2.0, 1.5]), "q_positive": 3.0}
    return SimpleNamespace(**{**known, **more, **values})


@pytest.mark.parametrize("size", [2.0, 1.5e6])
def test_what_a_factored_step_loses(size: float) -> None:
    on, unit, limit = factored_map(q=np.array([size, 1.5])), 2.0**-8, 255
    lost, program = factored._error(on, LINEAR, GRID, unit, limit)
    assert program.fraction == (20 if size == 2 else 1)  # 0.75 · 1.5e6 · 2^8 · 2 < 2^30
    alpha, affine = Fraction(on.alpha), program.injection
    pulls = []
    for row, scale, value in zip(np.abs(on.A.codes), on.A.scales, program.pull, strict=True):
        real = alpha * scale**2 * 2**program.pull_fraction
        pulls.append(0.5 + distance(real, value, program.pull_shift) * limit * int(row.sum()))
    pulled = np.abs(on.A.codes).T @ np.array(pulls) / 2**program.pull_fraction
    entered = affine_errors(affine, alpha / Fraction(unit) * 2**program.fraction, GRID)
    own = 0.5 + distance(1 - alpha * Fraction(on.margin), program.own, program.shift) * limit
    own += distance(alpha * on.K_scale, program.skew, program.shift) * limit * 3
    is_tight(lost, unit * norm(own + pulled + np.array(entered) / 2**program.fraction), 1e-8)


def test_coarse_pulls_cost_what_they_round() -> None:
    """Sums of many rows leave few fractional bits: half a unit of each then counts."""
    on = factored_map(A=CodedMatrix(np.full((8, 2), 1), (Fraction(91, 3),) * 8, 2))
    (values, shift), bits, lost = factored._pull(on, Fraction(1, 2), np.full(8, 510), 30)
    largest = (int(values[0]) * 510 >> shift) + 1
    assert 2**30 <= 8 * largest <= 2**31 - 1
    each = 0.5 + distance(Fraction(91, 3) ** 2 / 2 * 2**bits, values[0], shift) * 510
    is_tight(lost, [8 * each / 2**bits] * 2, 1e-8)
    # one more bit would not fit, and the last that does is used
    for share, fits in ((LEAST, 16), (MOST, 15)):
        one = factored_map(A=CodedMatrix(np.array([[1]]), (Fraction(1),), 2))
        assert factored._pull(one, Fraction(share) * 2**15 / 2**8, np.array([2**8]), 30)[1] == fits


def test_injections_are_as_fine_as_fits() -> None:
    for share, less in ((LEAST, 0), (MOST, 1)):
        alone = CodedLinear(CodedMatrix(np.array([[1]]), (Fraction(1, 2**10),), 2), (Fraction(share) * 2**30,))
        found = integer_affine(alone, Fraction(1), (0, 1), (Fraction(1),), (Fraction(0),), "it")
        assert found.shift == 31 - less  # offsets below 2^61
        start = cayley._start(cayley_map(c=np.array([share * 2**14])), cayley_entry(Fraction(1)), 1.0)
        entry = factored._entry(factored_map(q=np.array([share * 2**20])), LINEAR, GRID, Fraction(1), 30)
        assert (start[1], entry[1]) == (16 - less, 10 - less)  # both below 2^30
    assert factored._entry(factored_map(q=np.array([LEAST * 2**30])), LINEAR, GRID, Fraction(1), 30)[1] == 0
    with pytest.raises(OptionError, match="units far"):
        factored._entry(factored_map(q=np.array([MOST * 2**30])), LINEAR, GRID, Fraction(1), 30)


def test_how_far_factored_iterates_reach() -> None:
    is_tight(factored._iterate_norm(factored_map(), 0.25), (0.75 * 3 + 0.25) / 0.5)
    is_tight(factored._iterate_norm(factored_map(margin=2.0), 0.25), 3 + 0.25 / 0.5)  # 2 · 3/2 + ε/(1 − ρ)
    for limit in (255, 2**15 - 1):
        unit = factored._proved_unit(factored_map(), LINEAR, GRID, limit)
        error = factored._error(factored_map(), LINEAR, GRID, unit, limit)[0]
        is_tight(limit * unit, (0.75 * 3 + error) / 0.5, 1e-4)


def network(W: float, U: float, b: float, margin: float, errors: tuple[float, float, float] = (0, 0, 0)) -> Exact:
    eye, one = torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    return Exact(W * eye, errors[0], U * eye, errors[1], b * one, errors[2], margin)


def test_equilibria_and_their_slips() -> None:
    exact, box = network(0, 2.0, 1.0, 0.25, (0.0, 0.5, 0.125)), Box(f64([3.0, 1.0]), f64([0.5, 0.25]))
    is_tight(exact.solution(box), (norm([8.0, 3.5]) + 0.5 * norm([3.5, 1.25]) + 0.125) / 0.25)
    is_tight(exact.slip(f64([3.0, 4.0])), (10 + 0.5 * 5) / 0.25)


@pytest.mark.parametrize("margins", [(0.5, 0.25), (0.25, 0.5)])
def test_displacement_is_t3_in_its_better_form(margins: tuple[float, float]) -> None:
    own, theirs = network(0.5, 1.0, 2.0, margins[0]), network(0.25, 1.5, 1.0, margins[1], (0.0625, 0.125, 0.03125))
    plan, reference = Iteration(0.5, 1.0, 3.0, 1e9, 1, False), Reference(None, theirs, "", False)  # type: ignore[arg-type]
    found = equilibrium_bounds(own, (own.U, own.b), reference, plan, 4, GRID)
    half = 0.5 + 1 / 16 + 2.0**-20 * 1.5
    reach = half * math.sqrt(2)  # the box lies around zero
    delta_W, moved = 0.25 + 0.0625, (0.5 * half + 1) * math.sqrt(2) + 0.125 * reach + 0.03125
    solution = (half + 2) * math.sqrt(2) / margins[0]
    other = ((1.5 * half + 1) * math.sqrt(2) + 0.125 * reach + 0.03125) / margins[1]
    is_tight(found.displacement, min((delta_W * solution + moved) / margins[1], (delta_W * other + moved) / margins[0]))
    is_tight(found.input_rounding, 1.625 * norm([1 / 16 + 2.0**-20 * 1.5] * 2) / margins[1])
    is_tight(found.input_slip, found.input_rounding, 1e-12)
    is_tight(found.solution, solution)
    is_tight(found.delta_weight, delta_W)
    is_tight(found.delta_input, 0.5 + 0.125)
    is_tight(found.delta_center, math.sqrt(2) + 0.125 * reach + 0.03125)
    is_tight(found.reference_input, 1.5 + 0.125)
    checked = equilibrium_bounds(own, (own.U, own.b), reference, replace(plan, checked=True), 4, GRID)
    is_tight(checked.solution, 3 + 2 + 5 / (1 - 2.0**-4) / 2**5)


def test_scores_err_by_head_equilibrium_and_rounding() -> None:
    head = nn.Linear(2, 2).double()
    head.weight, head.bias = nn.Parameter(f64([[3.0, 4.0], [0.0, 1.0]])), nn.Parameter(f64([1.0, 2.0]))
    used = f64([[3.0, 4.5], [0.0, 1.0]]), f64([1.25, 2.0])
    reference: Any = SimpleNamespace(network=SimpleNamespace(head=head))
    is_tight(score_bound(reference, used, f64([0.125, 0.25]), 0.5, 6.0), 5 * 0.5 + 0.5 * 6 + 0.25 + 0.125)


class Fixed(Runtime):
    """A program whose answer is known."""

    def integers(self, x: Any) -> Any:
        return np.array([[30, 40]]), np.zeros((1, 0), np.int32), np.zeros(1, np.int32)


def test_the_error_of_one_input() -> None:
    names = ("iteration", "delta_weight", "delta_input", "delta_center", "reference_input", "reference_margin")
    known = dict(zip(names, (0.5, 0.25, 0.75, 0.125, 2.0, 0.4), strict=True))
    grid = replace(GRID, offsets=(Fraction(2),))  # from 2 to 3, around 5/2
    runtime = Fixed(SimpleNamespace(eqnet_batch=SimpleNamespace()), {}, grid, (), (0.1, None), known)  # type: ignore[arg-type]
    x = np.array([[2.375 + 0.03, 2.875 - 0.04]])  # the nearest of the grid is (2.375, 2.875)
    moved = 0.25 * (5 + 0.5) + 0.125 + 0.75 * norm([0.125, 0.375]) + 2 * norm([0.03, 0.04])
    is_tight(runtime.error_bound(x), [0.5 + moved / 0.4])
