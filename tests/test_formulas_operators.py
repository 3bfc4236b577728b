"""Bounds of one or two numbers against what theory gives by hand: neither below it nor 1 % above it."""

from __future__ import annotations

import cmath
import math
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import equipoise as eq
from equipoise import verified
from equipoise.certificates import iterates
from equipoise.operators import DenseOperator, quantized_tiers, spectra, symbol_bounds
from equipoise.operators.conv import ConvOperator, Doubt
from equipoise.operators.grids import Geometry
from equipoise.operators.tiers import TierOperator
from equipoise.parametrizations import Kernels
from test_solvers import layer_of

F64 = torch.float64
NEAR = 2e-6


def above(value: Any, expected: Any) -> None:
    """An upper bound of ``expected``, and a tight one."""
    for found, exact in zip(torch.as_tensor(value, dtype=F64).flatten().tolist(), _numbers(expected), strict=True):
        assert exact <= Fraction(found) <= exact + Fraction(NEAR) * max(abs(exact), Fraction(1, 100))


def below(value: Any, expected: Any) -> None:
    above(-torch.as_tensor(value, dtype=F64), [-exact for exact in _numbers(expected)])


def _numbers(expected: Any) -> list[Fraction]:
    return [Fraction(e) for e in (expected if isinstance(expected, list) else [expected])]


def down(x: float) -> float:
    return x * (1 - 1e-14)  # a root that was rounded itself


def lower_norm(p: float, q: float, r: float) -> float:
    """‖[[p, 0], [q, r]]‖₂: the larger root of σ⁴ − (p² + q² + r²) σ² + p² r²."""
    t = p * p + q * q + r * r
    return down(math.sqrt((t + math.sqrt(t * t - (2 * p * r) ** 2)) / 2))


def one(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value, dtype=F64)


def single(w: float, side: int = 1, floor: tuple[float, float] | None = None) -> TierOperator:
    """w · I on images of one channel."""
    return TierOperator(Kernels((one(w),)), Geometry((1,), ((side, side),), 0), floor=floor)


def pair(own: float, last: float, s: float, a: float, floor: tuple[float, float] | None = None) -> TierOperator:
    """Four pixels and one: W = [[own − s² e eᵀ, 0], [−2 a s eᵀ, last]]."""
    kernels = Kernels((one(own), one(last)), (one(s),), (one(a),))
    return TierOperator(kernels, Geometry((1, 1), ((2, 2), (1, 1)), 0), floor=floor)


# Tiers (theory §8)


def test_two_tiers() -> None:
    W = pair(-0.5, 0.25, 0.75, 0.5)  # block (0, 0) has −1/2 and −1/2 − 9/16
    dense = W.apply(torch.eye(5, dtype=F64)).mT
    assert float(torch.linalg.matrix_norm(dense, 2)) == pytest.approx(lower_norm(1.0625, 0.75, 0.25))
    below(W.margin(), 0.5)  # 1 − 1/4 − a²
    above(W.norm(), lower_norm(1.0625, 0.75, 0.25))
    above(W.lipschitz(), L := lower_norm(2.0625, 0.75, 0.75))
    below(W.averaging_step(), 1 / (1 + L) * (1 + 1e-12))
    alpha, m = 0.125, 0.5
    above(W.cayley_bound(alpha), down(math.sqrt(1 - 4 * alpha * m / (1 + 2 * alpha * m + (alpha * L) ** 2))))
    above(W.forward_bound(alpha), down(math.sqrt(1 - 2 * alpha * m + (alpha * L) ** 2)))


def test_two_tiers_in_absolute_values() -> None:
    W = pair(1.0, 0.0, 0.5, 0.0)
    above(W.absolute_norm(), 1.25)
    above(pair(0.0, 0.0, 0.5, 2.0).absolute_norm(), lower_norm(0.25, 2.0, 0.0))
    above(pair(1.0, 0.0, 0.5, 0.0, (-1.0, 0.25)).absolute_norm(), 1.25 + 0.25 * W.terms)
    assert W.terms == 1 + 2 * 1 + 1 + 8 * 2  # a row of own, down twice, lift, and the sums


@pytest.mark.parametrize(("floor", "margin"), [((0.125, 0.25), 0.25), ((0.375, 0.25), 0.375), ((0.75, 0.25), 0.5)])
def test_what_is_stored_is_proved_by_the_distance_or_by_algebra(floor: tuple[float, float], margin: float) -> None:
    W = pair(-0.5, 0.25, 0.75, 0.5, floor)
    below(W.margin(), margin)
    above(W.norm(), lower_norm(1.0625, 0.75, 0.25) + 0.25)
    above(W.lipschitz(), lower_norm(2.0625, 0.75, 0.75) + 0.25)


def test_distances() -> None:
    W = pair(-0.5, 0.25, 0.75, 0.5, (-1.0, 0.25))
    other = pair(-0.25, 0.375, 0.5, 0.625, (-1.0, 0.125))
    moved = 0.25 + 0.5625 - 0.25  # block (0, 0) on e
    reach = 2 * (0.125 * 0.75 + 0.625 * 0.25)  # 2 (|Δa| s + a' |Δs|)
    above(W.distance(other), lower_norm(moved, reach, 0.125) + 0.375)
    above(single(0.5).distance(single(0.25)), 0.25)
    above(single(0.5, 1, (-1.0, 0.125)).distance(single(0.25)), 0.375)


@pytest.mark.parametrize("side", [1, 23])  # a dense matrix, and power iteration
@pytest.mark.parametrize(("w", "alpha"), [(-0.5, 0.5), (0.25, 1.0), (0.25, 0.5)])
def test_one_tier(side: int, w: float, alpha: float) -> None:
    W, F = single(w, side), 1 - w
    cayley, forward = abs(1 - alpha * F) / (1 + alpha * F), abs(1 - alpha * F)
    assert W.cayley_norm(alpha) == pytest.approx(cayley, rel=1e-9)
    assert W.forward_norm(alpha) == pytest.approx(forward, rel=1e-9)
    above(W.cayley_bound(alpha), down(cayley))
    above(W.forward_bound(alpha), down(forward))
    torch.testing.assert_close(single(w).cayley(alpha), torch.tensor([[(1 - alpha * F) / (1 + alpha * F)]], dtype=F64))
    above(single(w, side, (-1.0, 0.0625)).forward_bound(alpha), down(forward + alpha * 0.0625))


def test_one_tier_of_two_channels() -> None:
    """F = diag(3/2, 3/4): the closed bound takes the larger as L and the smaller as m, which symbols do not."""
    kernel = torch.diag(torch.tensor([-0.5, 0.25], dtype=F64))[:, :, None, None]
    W, alpha = TierOperator(Kernels((kernel,)), Geometry((2,), ((1, 1),), 0)), 0.5
    above(W.cayley_bound(alpha), down(0.625 / 1.375))
    above(W.forward_bound(alpha), 1 - alpha * 0.75)
    below(W.margin(), 0.75)
    above(W.norm(), 0.5)


def test_forming_and_distances_of_codes() -> None:
    K, A = one(-0.75), one(0.5)
    above(quantized_tiers._forming(A, K, 0.25) * 2**53, 18 * 1.75)  # γ₁₈ (‖A‖² + ‖K‖ + 1 − m)
    used = Kernels((one(0.5), one(0.0)), (one(0.75),), (one(0.5),))
    stored = Kernels((one(0.25), one(0.0)), (one(0.5),), (one(0.375),))
    # both lengths are those of the longer
    own = 0.25 + 0.125 + 2 * 0.75 * 0.25 + 0.25**2
    reach = 2 * (0.5 * 0.25 + 0.75 * 0.125 + 0.25 * 0.125)
    blocks = torch.tensor([[own, 0.0], [reach, 0.0]], dtype=F64)
    above(quantized_tiers._distance(used, stored, [0.125, 0.0]), down(verified.absolute_norm(blocks)))
    assert verified.absolute_norm(blocks) >= lower_norm(own, reach, 0.0)


# Symbols


def test_sums_and_products_of_symbols() -> None:
    X = spectra.Spectrum(torch.full((1, 1, 1), 0.75 + 0j, dtype=torch.complex128), 0.25)
    Y = spectra.Spectrum(torch.full((1, 1, 1), 0.5 + 0j, dtype=torch.complex128), 0.125)
    above(symbol_bounds.difference(X, Y).error, 0.375)
    above(symbol_bounds.gram(spectra.Spectrum(X.values, e := 2.0**-20))[1] / e, 2 * 0.75 + e)  # ((3/4 + e)² − (3/4)²)/e
    above(spectra.norm(X.values, 0.25), 1)
    above(spectra.lipschitz(-X.values, 0.25), 2)
    below(spectra.margin(X.values, 0.125), 0.125)
    below(spectra.min_eigenvalue(X.values, 0.25), 0.5)
    above(spectra.norm(0 * X.values, 0.25), 0.25)


@pytest.mark.parametrize(("F", "alpha", "error"), [(1.5, 0.5, 0.125), (0.25, 1.0, 0.03125), (0.75, 0.25, 0.0)])
def test_contraction_is_proved_down_to_its_threshold(F: float, alpha: float, error: float) -> None:
    """2α (1 + ρ²)(F − e) = (1 − ρ²)(1 + α² (F + e)²) of one number, e on all that it touches."""
    t = 2 * alpha * (F - error) / (1 + alpha**2 * (F + error) ** 2)
    rho = math.sqrt((1 - t) / (1 + t))
    symbol = torch.full((1, 1, 1), F + 0j, dtype=torch.complex128)
    assert symbol_bounds.contracts(symbol, alpha, rho * (1 + 1e-6), error)
    assert not symbol_bounds.contracts(symbol, alpha, rho * (1 - 1e-6), error)


def test_roots_of_unity() -> None:
    for j, found in enumerate(spectra._roots(8).tolist()):
        assert abs(found - cmath.exp(2j * math.pi * j / 8)) < 1e-14


# Rows of convolutions (theory §7)

K = torch.tensor([[[[0.25]], [[-0.5]]], [[[0.125]], [[-0.75]]]], dtype=F64)
ETA = torch.tensor([1.0, 2.0], dtype=F64)


def test_rows_of_a_convolution() -> None:
    W = ConvOperator(K, (1, 1), ETA)
    below(W.row_margins(), [1 - 0.25 - 1, 1 + 0.75 - 0.0625])
    above(W.row_norms(), [0.25 + 1, 0.75 + 0.0625])
    above(W.norm(), 1.25)
    above(W.lipschitz(), 1.75 + 0.0625)
    below(W.margin(), -0.25)
    above(W.absolute_norm(), down(math.sqrt(0.875 * 1.25)))  # the largest row sum and column sum of |K|
    below(W.averaging_step(), 1 / 1.75 * (1 + 1e-12))
    assert len(ConvOperator(K, (2, 3), ETA).row_norms()) == 12


@pytest.mark.parametrize(("floor", "first"), [(-9.0, 0.0), (0.0625, 0.0625)])
def test_rows_of_what_is_stored(floor: float, first: float) -> None:
    """Channel 0: 1 − μ = 1/4 applied, 0 stored, or what algebra says of it."""
    doubt = Doubt(torch.tensor([0.25, 0.125], dtype=F64), 0.5, floor)
    W = ConvOperator(K - torch.tensor([[0.5, 0.0], [0.0, 0.0]], dtype=F64)[:, :, None, None], (1, 1), ETA, doubt=doubt)
    below(W.row_margins(), [first, 1.75 - 0.0625 - 0.125])
    above(W.row_norms(), [1.5, 0.8125 + 0.125])
    above(W.lipschitz(), 1.25 + 1 + 0.25)
    other = ConvOperator(K, (1, 1), torch.tensor([1.0, 1.0], dtype=F64), doubt=doubt)
    # |Δ| = 1/2 in row 0; doubt in η = (1, 2) weighs at most twice as much in (1, 1)
    above(W.distance(other), 0.5 + 2 * 0.25 + 0.25)


# Dense matrices


def test_numbers_without_a_matrix() -> None:
    nothing = torch.zeros(2, 2, dtype=F64)
    below(verified.min_eigenvalue(nothing, 1.0), -1)
    above(verified.spectral_norm(nothing, 1.0), 1)
    below(verified.down(1.0), 1)
    below(verified.row_norms_lower(torch.tensor([[3.0, 4.0]], dtype=F64)), 5)
    found = verified.product_rounding(2.0, 3, torch.tensor([5.0]), unit=2.0**-4)
    above(found, Fraction(3, 13) * 10)  # γ₃ = 3u/(1 − 3u)


@pytest.mark.parametrize("c", [-0.5, 0.0, 0.5, 0.75])
def test_one_number_as_a_cayley_transform(c: float) -> None:
    """F = (1 − c)/(α (1 + c))."""
    C, alpha = torch.tensor([[c]], dtype=F64), 0.5
    below(verified.cayley_margin(C, alpha), Fraction(1 - c) / Fraction(alpha * (1 + c)))
    above(verified.cayley_lipschitz(C, alpha), Fraction(1 - c) / Fraction(alpha * (1 + c)))


# Iterates on a grid (theory §5)

ONE = torch.ones(1, dtype=F64)


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("rounding", [0.0, 0.125])
def test_a_grid_and_a_rounding_in_closed_form(
    steps: int | None, rounding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """z = relu(z/2 + 1): r = 1/2, z* = 2; a step that errs by η₀ + η₁ E, η₁ = 1/8 and η₀ = η₁ 2 + 1/4."""
    if rounding:
        step = SimpleNamespace(error=lambda at: rounding * at.u + 2 * rounding * at.one)
        monkeypatch.setattr(iterates, "_ForwardStep", lambda *_: step)
    layer, grid = layer_of(torch.tensor([[0.5]], dtype=F64), eq.ReLU()), 2.0**-4
    solver = eq.Rounded(eq.ForwardBackward(alpha=1.0), grid=grid)
    found = iterates.iterate_floor(layer, torch.ones(1, 1, dtype=F64), solver, steps)
    rho, eps, eta, half = Fraction(0.5 + rounding), Fraction(grid / 2), Fraction(4 * rounding), Fraction(1, 2)
    if steps is None:
        away, exact = (eps + eta) / (1 - rho), eps / half
    else:
        away = rho**3 * 2 + (eps + eta) * (1 + rho + rho**2)
        exact = eps * (1 + half + half**2)
    above(found.exact, exact)
    above(found.iterate, away)
    above(found.value, away / 2)
    certificate: Any = SimpleNamespace(displacement=torch.full((1,), 0.25, dtype=F64), layers=())
    above(found.total(certificate), Fraction(float(found.value)) + Fraction(1, 4))


def test_sizes_at_the_equilibrium() -> None:
    proved = DenseOperator(torch.tensor([[-0.5]], dtype=F64))
    known = iterates._Sizes(2 * ONE[None], ONE / 4, ONE[None], ONE / 8, 1.5 * ONE, ONE / 2)
    solver: Any = SimpleNamespace(on=eq.PeacemanRachford())
    at = iterates._at_equilibrium(solver, 0.5, known, proved)
    # u = z/2 + (W z + q)/2 = 1, known up to (1/2 + 1/4) 1/4 + 1/16 = 1/4; 2 z − u = 3 up to 2/4 + 1/4
    for found, exact in zip(at, [1.25, 2.25, 3.75, 2.0, 0.5, 1.0], strict=True):
        above(found, exact)
    above(iterates._returned(eq.ReLU(), known, proved, proved, 2 * ONE, ONE / 2), 0.5 * 0.5 + 0.5)


POINT = iterates._Point(2 * ONE, 3 * ONE, 4 * ONE, 5 * ONE, ONE / 2, ONE)


def test_rounding_of_a_forward_step() -> None:
    W = DenseOperator(torch.tensor([[-0.5]], dtype=F64))
    prox = iterates._Prox(0.125, 0.25)
    step = iterates._ForwardStep(W, 0.5, prox, W)
    step.gamma, step.stored, step.lost = 0.125, 0.25, 0.0625
    # γ (|α W| + |1 − α|) ‖u‖ and γ α ‖q‖; α stored ‖u‖; α times the error of q; what underflows
    inner = 0.125 * (0.75 * 2 + 0.5 * 5) + 0.5 * 0.25 * 2 + 0.5 * 0.5 + 0.0625 * 3
    above(step.error(POINT), Fraction(inner + 0.125 * (3 + inner) + 0.25) / Fraction(7, 8) * (1 - Fraction(2) ** -50))


@pytest.mark.parametrize("theta", [1.0, 0.5])
def test_rounding_of_a_resolvent_step(theta: float) -> None:
    W, u = DenseOperator(torch.tensor([[0.5]], dtype=F64)), 0.0625
    step = iterates._ResolventStep(W, 1.0, iterates._Prox(0.0, 0.25), theta, W)
    assert step.spread == pytest.approx(1 / 3)
    step.gamma, step.spread, step.off, step.lost, step.unit = 0.125, 0.75, 0.25, 0.5, u
    slip = 2 * 0.25 + 2 * u * (4 + 2 * 0.25)  # 2 p − u: p errs by 1/4
    c = 0.125 * 1.75 * 5 + 0.25 * 5 + 2 * 0.5  # α (q + C q): products and C; q itself twice, as ‖C‖ < 1
    sizes = 0.75 * (4 + slip) + 2 * 5 + c
    error = theta * (0.125 * sizes + (1 + 0.25) * slip + 0.25 * 4 + c + 0.5 * (1 + 4 + 5))
    above(step.error(POINT), down(error if theta == 1 else error * (1 + 8 * u) + 9 * u * 2))


def test_error_of_a_cayley_transform() -> None:
    """F = 1/2, α = 1: C = 1/3, of which Ĉ lies 1/4 off."""
    C, W = torch.tensor([[1 / 3]], dtype=F64), torch.tensor([[0.5]], dtype=F64)
    above(iterates._cayley_error(C + 0.25, 1.0, DenseOperator(W)), down(0.25))
    above(iterates._cayley_error(C + 0.25, 1.0, DenseOperator(W, cayley=(1.0, C))), down(0.25))
