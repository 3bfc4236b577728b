"""The numbers that certificates return, against their formulas on one to three features, worked out by hand.

A bound may exceed its formula by what rounding needs and no more: 1 % of any factor, either way, is seen.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise.certificates import displacement as moved
from equipoise.certificates.convergence import closed_rates, geometric_sum, inexact_factor, layer_certificate, steps_for
from equipoise.certificates.displacement import Inputs, Trace
from equipoise.certificates.printed import MISSING, at_least, at_most, number
from equipoise.certificates.robustness import reach_of_inputs
from equipoise.certificates.rows import Comparison, _lifts
from equipoise.certificates.sides import DenseSide
from equipoise.certificates.wellposed import fresh_operator
from equipoise.layers import steps
from equipoise.layers.multiscale_proofs import Gap, Head
from equipoise.layers.steps import VALUES, Proved, Proving
from equipoise.norms import WeightedMax
from multiscale_networks import small

F64 = torch.float64
NEAR = 1e-6
"""What a bound may be looser than its formula, relatively."""


def vector(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=F64)


def rows(*entries: list[float]) -> Tensor:
    return torch.tensor(entries, dtype=F64)


def above(value: Any, expected: Any, slack: float = NEAR) -> bool:
    """Whether each ``value`` is at least what is expected, up to a rounding of the test's own, and hardly more."""
    found, least = (torch.as_tensor(numbers, dtype=F64).flatten() for numbers in (value, expected))
    size = least.abs()
    fits = (found >= least - 1e-15 * size) & (found <= least + slack * size)
    return found.shape == least.shape and bool(fits.all())


def below(value: Tensor, expected: list[float]) -> bool:
    return above(-value, [-entry for entry in expected])


def layer_of(W: Tensor, U: Tensor, b: Tensor | None = None) -> eq.MonDEQ:
    """z = W z + U x + b: no activation, so that the equilibrium is a solution of linear equations."""
    b = torch.zeros(len(W), dtype=F64) if b is None else b
    return eq.MonDEQ.from_weights(W, U, b, False, activation=eq.LeakyReLU(1.0))


def side_of(W: Tensor, U: Tensor, b: Tensor | None = None) -> DenseSide:
    layer = layer_of(W, U, b)
    return DenseSide.of(layer, fresh_operator(layer))


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0]).double()
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    return module


def trace(quantized: Tensor, reference: Tensor, *bounds: float) -> Trace:
    return Trace(quantized, reference, *(vector(bound) for bound in bounds))


# One layer: rates, what quantizing moves (theory §2, §5)


def test_closed_rates_of_a_condition_number_of_three() -> None:
    rates, rho = closed_rates(0.5, 1.5), math.sqrt(2 / 4)
    assert above(list(rates.values()), [math.sqrt(1 - 1 / 9), rho, (1 + rho) / 2])
    assert above(inexact_factor(0.75), 4.0)
    assert steps_for(0.5, 2.0**-10) == 11  # one more than needed, of what a logarithm may be off
    assert above(geometric_sum(0.5, 0.25, 1), 1.0)
    assert above(geometric_sum(0.5, 0.25, 3), Fraction(1, 4) + Fraction(1, 8) + Fraction(1, 16))
    assert above(geometric_sum(0.5, 0.5, 3), Fraction(3, 4))


def test_a_scalar_layer_has_the_constants_of_its_number() -> None:
    layer = layer_of(rows([-1.0]), rows([1.0]))
    found = layer_certificate(layer, fresh_operator(layer), 1e-6)
    assert above([-found.margin, found.lipschitz, found.condition, found.weight_condition], [-2.0, 2.0, 1.0, 0.5])


def test_of_several_layers_the_largest_is_reported() -> None:
    parts = [layer_of(rows([w]), rows([1.0])) for w in (-2.0, 0.5)]
    found, alone = eq.certify(nn.Sequential(*parts)), eq.certify(parts[0])
    assert above([found.lipschitz, found.condition], [3.0, 1.0])
    assert found.lipschitz == alone.lipschitz == found.to_dict()["lipschitz"]


@pytest.mark.parametrize("w", [0.5, -2.0])
def test_a_displacement_without_activation_is_the_true_one(w: float) -> None:
    """z̃* − z* = q/(1 − w̃) − q/(1 − w), which is ΔW z̃*/m exactly."""
    tilde, x = w + 0.25, 3.0
    there, here = side_of(rows([w]), rows([2.0])), side_of(rows([tilde]), rows([2.0]))
    found = moved.equilibrium_trace(here, there, moved.start(rows([x])), {}, "layer")
    exact = 2 * x / (1 - tilde), 2 * x / (1 - w)
    assert float(found.quantized) == pytest.approx(exact[0], rel=1e-7)
    assert float(found.reference) == pytest.approx(exact[1], rel=1e-7)
    assert above(found.displacement, exact[0] - exact[1])
    assert above(found.to_reference, exact[0] - exact[1])
    assert torch.equal(Inputs(rows([x])).through(here), rows([2 * x]))


def test_doubts_of_the_input_enter_by_the_norm_of_the_injection() -> None:
    """With m = 1/2, ‖U‖ = 2: 4 times what the input is off, for each of the two networks."""
    side = side_of(rows([0.5]), rows([2.0]))
    before = trace(rows([3.0]), rows([3.0]), 0.25, 0.0, 0.125, 0.5)
    found = moved.equilibrium_trace(side, side, before, {}, "layer")
    assert above(found.error_q, 4 * 0.25)
    assert above(found.displacement, 4 * 0.125)  # from the reference's side: no error of its own there
    assert above(found.to_reference, 4 * 0.125 + 4 * 0.25)
    nearer = moved.equilibrium_trace(side, side, before._replace(to_reference=vector(0.25)), {}, "layer")
    assert above(nearer.to_reference, 4 * 0.25)


def test_a_side_bounds_its_storage_and_absolute_products() -> None:
    side = side_of(rows([0.25, -0.5], [0.125, -0.25]), torch.eye(2, dtype=F64))
    assert above(side.spread(rows([1.0, 2.0])), [1.25, 0.625])
    stored = replace(side, e_U=0.5, e_b=0.25)
    assert above(stored.rounding(rows([0.0, 0.0]), vector(2.0)), 1.25)
    assert above(side_of(rows([0.5]), rows([1.0])).inverse(rows([3.0])), 6.0)


# Through what stands between layers


def test_a_linear_module_moves_points_by_its_norms() -> None:
    """(V a_q + c) − (R a_r + s): ‖R‖ times the change before, and ΔV a_q + Δc."""
    V = linear(rows([2.0, 0.0], [0.0, 1.0]), vector(1.0, 0.0))
    R = linear(rows([3.0, 0.0], [0.0, 1.0]), vector(0.0, 0.0))
    found = moved.linear_trace(V, R, trace(rows([2.0, 1.0]), rows([1.0, 1.0]), 0.25, 0.5, 1.0, 2.0))
    assert torch.equal(found.quantized, rows([5.0, 1.0]))
    assert torch.equal(found.reference, rows([3.0, 1.0]))
    change = abs(-1 * 2.0 + 1)
    assert above([found.error_q, found.error_r], [2 * 0.25, 3 * 0.5])
    assert above([found.displacement, found.to_reference], [3 * 1.0 + change + 1 * 0.25, 3 * 2.0 + change])
    assert torch.equal(moved.scores(V, rows([2.0, -3.0])), rows([5.0, -3.0]))


def test_means_of_pixels_shrink_distances_by_their_side() -> None:
    x = torch.zeros(1, 1, 4, 4, dtype=F64)
    found = moved.pool_trace(nn.AvgPool2d(2), trace(x, x, 1.0, 2.0, 3.0, 5.0))
    assert above(torch.cat(found[2:6]), [0.5, 1.0, 1.5, 2.5])


def test_softplus_of_torch_falls_at_its_threshold() -> None:
    module, x = nn.Softplus(beta=2.0, threshold=1.0), rows([0.0, 0.0, 0.0, 0.0])
    fall = math.log1p(math.exp(-1.0)) / 2
    assert above(moved.softplus_fall(module), fall)
    found = moved.lipschitz_one_trace(module, trace(x, x, 1.0, 2.0, 3.0, 5.0))
    assert above(torch.cat(found[2:6]), [bound + 2 * fall for bound in (1.0, 2.0, 3.0, 5.0)])


@pytest.mark.parametrize("by_rows", [False, True])
def test_a_class_is_settled_up_to_half_its_gap(by_rows: bool) -> None:
    """Scores z_1 ± 0: with V_1 − V_2 = (2, 0) and a gap of 2, any point within 1 keeps the class."""
    head, p = linear(rows([1.0, 0.0], [-1.0, 0.0]), vector(0.0, 0.0)), rows([1.0, 5.0])
    for size, expected in ((0.996, True), (1.0, False)):
        bound = rows([size, 100.0]) if by_rows else vector(size)
        assert bool(moved.settled(head, p, torch.tensor([0]), bound)) is expected


# Entry by entry, and radii (theory §7)


def test_a_comparison_matrix_and_its_inverse() -> None:
    """M = [[1/2, 1/4], [0, 1/4]]: (I − M) y and (I − M)⁻¹ r."""
    found = Comparison(rows([0.5, -0.25], [0.0, 0.25]))
    assert below(found._image(rows([2.0, 1.0])), [0.75, 0.75])
    assert above(found.bound(rows([1.0, 3.0])), [4.0, 4.0])
    doubtful = Comparison(rows([0.5, -0.25], [0.0, 0.25]), 0.125)
    assert below(doubtful._image(rows([3.0, 4.0])), [0.5 - 0.625, 3.0 - 0.625])


def test_known_weights_bound_where_nothing_is_solved() -> None:
    """(I − M) η >= η (1 − μ): with r = (1, 2) and margins 1/2, 1/4, t = 2/(4 · 1/4) = 2."""
    eta, margins = vector(1.0, 4.0), vector(0.5, 0.25)
    known, lift = _lifts(eta, margins)
    assert below(lift, [0.5, 1.0])
    assert torch.equal(known, eta)
    found = Comparison(torch.zeros(2, 2, dtype=F64), math.inf, WeightedMax(eta), margins)
    assert not found.solved
    assert above(found.bound(rows([1.0, 2.0])), [2.0, 8.0])


def test_reach_and_radius_of_a_scalar_network() -> None:
    """z = z/2 + 2 x, scores ± 3 z: z moves 4 times as far as x, and classes meet at x = 0."""
    model = nn.Sequential(layer_of(rows([0.5]), rows([2.0])), linear(rows([3.0], [-3.0]), vector(0.0, 0.0)))
    assert above(reach_of_inputs(model), 4.0)
    assert above([eq.input_lipschitz(model, norm) for norm in ("linf", "l2")], [12.0, 12.0 * math.sqrt(2)])
    for norm in ("linf", "l2"):
        assert below(eq.certified_radius(model, rows([1.5], [-0.25]), norm), [1.5, 0.25])
    x, eps = rows([1.0], [1.0]), rows([0.996], [1.004])
    assert eq.certified_classes(model, x - eps, x + eps).tolist() == [0, -1]
    box = eq.interval(model[0], rows([-1.0]), rows([2.0]))
    assert above([-box.low, box.high], [4.0, 8.0], 1e-4)


# Multiscale networks (theory §9)


def test_distances_from_a_point_and_from_its_image() -> None:
    """ρ/(1 − ρ) = 1/3 of what f moves the point by, and what f(w) itself is off."""
    gap = Gap(rows([0.0, 0.0]), vector(3.0), vector(0.5))
    assert above(gap.from_point(0.25), Fraction(7, 2) / Fraction(3, 4))
    bound, left = gap.from_image(0.25)
    assert above(bound, Fraction(7, 2) / 3 + Fraction(1, 2))
    assert above(left, 1.0)


def test_a_relaxed_step_contracts_by_the_mean() -> None:
    model = small(contraction=0.5).eval()
    model.solver = eq.Picard(alpha=0.25)
    found = eq.certify(model)
    assert 0.3 < found.contraction <= 0.5
    rate = Fraction(found.contraction)
    assert above(found.rate, Fraction(3, 4) + rate / 4)
    assert above([-found.margin, found.lipschitz], [float(rate - 1), float(1 + rate)])
    assert above(found.condition, (1 + rate) / (1 - rate))
    assert above(found.weight_condition, rate / (1 - rate))


KERNEL = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=F64)[:, :, None, None]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (steps.Conv(KERNEL, 1.5), 1.5),
        (steps.GroupMean(1), 1.0),
        (steps.GroupMean(1, vector(-2.0, 0.5), torch.zeros(2)), 2.0),
        (steps.Slope(0.4), 0.4),
        (steps.Sort(0.3), 0.3),
        (steps.Up(3), 3.0),
        (steps.Pool(4), 0.25),
        (steps.Average(9), 1 / 3),
        (steps.Mask(0.25), 4 / 3),
        (steps.Mask(0.0), 1.0),
    ],
)
def test_every_step_has_the_constant_of_the_table(step: steps.Step, expected: float) -> None:
    assert above(step.lipschitz(), expected)
    assert above(torch.as_tensor(step.gain(torch.ones(1, 2, 3, 3, dtype=F64))), expected)
    assert above(steps.through((step, steps.Up(2))), 2 * expected)


def test_what_is_known_near_a_point() -> None:
    """A convolution by its absolute sums; a normalization by 2 max|γ|/√(var + ε), here of entries ± 3."""
    x = 3.0 * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=F64).reshape(1, 1, 2, 2)
    assert above(steps.Conv(torch.ones(1, 1, 3, 3, dtype=F64)).gain(x), 9.0)
    assert steps.Conv(torch.ones(1, 1, 3, 3, dtype=F64)).lipschitz() == math.inf
    normal = steps.Standardize(1, vector(-2.0), vector(0.0))
    assert above(normal.gain(x), 2 * 2 / math.sqrt(9 + 1e-5))
    assert above(steps._length(rows([3.0, 4.0])), 5.0)


def test_errors_along_a_path_and_of_a_sum() -> None:
    x = torch.ones(1, 1, 2, 2, dtype=F64)
    found = Proving().along((steps.Up(3), steps.Slope(0.5)), Proved(x, vector(2.0)))
    assert above([found.error, found.value.amax()], [3.0, 0.5])
    parts = [Proved(x, vector(error)) for error in (1.0, 0.5)]
    total = Proving().combine((2.0, -3.0), parts)
    assert above(total.error, 2.0 + 1.5)
    assert torch.equal(total.value, -x)
    assert torch.equal(VALUES.along((steps.Slope(0.5),), x), x / 2)


def test_a_head_is_moved_by_all_its_branches_together() -> None:
    """Branches 2 and √2, then a half: e √(4 + 2)/2; a 1 × 1 convolution counts by its own norm, not 2."""
    head = Head(((steps.Slope(2.0),), (steps.Conv(KERNEL),)), (steps.Slope(0.5),))
    z = [torch.zeros(1, 2, 2, 2, dtype=F64)] * 2
    found = head.proved(z, vector(3.0))
    assert above(found.error, 3.0 * math.sqrt(6) / 2)


# What is printed


def test_printed_numbers_are_rounded_to_their_side() -> None:
    assert (number(12.3456), at_least(12.3456), at_most(12.3416)) == ("12.35", "12.34", "12.35")
    assert (number(-0.5), at_least(1.5e-12, 2), at_most(1.55e20, 2)) == ("−0.5", "1.5e−12", "1.6e+20")
    assert number(None) == number(math.inf) == MISSING
