"""Weighted maximum norms: row sums above exact rationals, duals, and the best weights (theory §7)."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import equipoise as eq
from equipoise.errors import InputError, NotWellPosedError
from equipoise.norms import WeightedMax, WeightedSum, metzler, perron
from test_nemon import exact_measures

# The norm


@given(st.integers(1, 7), st.integers(0, 10_000), st.floats(0.0, 6.0))
def test_row_bounds_are_above_exact_rationals_and_near_them(n: int, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(n, n, generator=generator, dtype=torch.float64)
    eta = torch.exp(spread * torch.randn(n, generator=generator, dtype=torch.float64))
    family = WeightedMax(eta)
    exact, eta_max = exact_measures(W, eta), float(eta.max())
    size = float(family.row_norms(W).max())
    for bound, true in zip(family.row_measures(W).tolist(), exact, strict=True):
        assert 0 <= Fraction(bound) - true <= Fraction(1e-13) * (1 + Fraction(size))
    assert Fraction(family.margin(W)) <= 1 - max(exact)
    identity = torch.eye(n, dtype=torch.float64)
    ratios = eta[None, :] / eta[:, None]
    assert family.lipschitz(W) >= float(((identity - W).abs() * ratios).sum(1).max()) * (1 - 1e-12)
    assert family.norm(W) >= float((W.abs() * ratios).sum(1).max()) * (1 - 1e-12)
    assert family.norm(W) <= float((W.abs() * ratios).sum(1).max()) * (1 + 1e-12) + 1e-12
    assert family.reach() == eta_max


def test_an_error_moves_every_row_by_what_it_can() -> None:
    torch.manual_seed(1)
    W, eta, error = torch.randn(5, 5).double(), torch.rand(5).double() + 0.2, 0.03
    family = WeightedMax(eta)
    bound = family.row_measures(W, error)
    for seed in range(200):
        E = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)).double()
        E = E * (error / torch.linalg.matrix_norm(E, 2))
        assert bool((family.row_measures(W + E) <= bound + 1e-12).all())
    # and the worst row direction reaches it
    worst = error * eta / eta.norm()
    E = torch.zeros(5, 5).double()
    E[2] = worst * torch.where(W[2] < 0, -1.0, 1.0)
    E[2, 2] = worst[2]
    assert float(family.row_measures(W + E)[2]) == pytest.approx(float(bound[2]), abs=1e-10)


@pytest.mark.parametrize(
    "eta", [[1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf], [1.0, 1e-150], [1e300, 1e300]]
)
def test_weights_that_are_not_positive_are_refused(eta: list[float]) -> None:
    with pytest.raises(InputError, match="eta"):
        WeightedMax(torch.tensor(eta, dtype=torch.float64))
    with pytest.raises(InputError, match="eta"):
        eq.NEMON.from_weights(
            torch.zeros(2, 2), torch.eye(2), torch.zeros(2), eta=torch.tensor(eta, dtype=torch.float64)
        )


@given(st.integers(1, 7), st.integers(0, 10_000), st.floats(0.0, 6.0))
def test_sums_of_rows_and_the_length_of_eta_are_above_exact_rationals_and_near_them(
    n: int, seed: int, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(3, n, generator=generator, dtype=torch.float64)
    family = WeightedMax(torch.exp(spread * torch.randn(n, generator=generator, dtype=torch.float64)))
    eta = [Fraction(value) for value in family.eta.tolist()]
    for bound, row in zip(family.row_sums(W).tolist(), W.tolist(), strict=True):
        true = sum(abs(Fraction(w)) * e for w, e in zip(row, eta, strict=True))
        assert true <= Fraction(bound) <= true * (1 + Fraction(1e-13))
    square = sum(e * e for e in eta)
    assert square <= Fraction(family.length()) ** 2 <= square * (1 + Fraction(1e-11))
    assert Fraction(family.reach()) == max(eta)


def test_norms_and_their_duals() -> None:
    family = WeightedMax(torch.tensor([1.0, 2.0]))
    x = torch.tensor([[3.0, -8.0], [0.0, 0.0]])
    assert family.of(x).tolist() == [4.0, 0.0]
    assert isinstance(family.dual(), WeightedSum)
    assert family.dual().of(x).tolist() == [19.0, 0.0]
    assert isinstance(family.dual().dual(), WeightedMax)
    W = torch.tensor([[0.2, -1.0], [0.0, 0.5]]).double()
    assert family.dual().margin(W.mT) == family.margin(W) == pytest.approx(-1.2)
    assert family.dual().norm(W.mT) == family.norm(W)
    assert family.dual().lipschitz(W.mT) == family.lipschitz(W)


# The best weights


@given(st.integers(1, 9), st.integers(0, 10_000))
def test_the_perron_vector_reaches_the_spectral_abscissa(n: int, seed: int) -> None:
    W = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    eta, abscissa = perron(W)
    true = float(torch.linalg.eigvals(metzler(W)).real.max())
    assert abscissa == pytest.approx(true, abs=1e-8)
    assert 1 - WeightedMax(eta).margin(W) == pytest.approx(true, abs=1e-6 * (1 + abs(true)))


def test_reducible_majorants_get_positive_weights() -> None:
    W = torch.tensor([[0.5, 3.0, 0.0], [0.0, 0.9, 0.0], [0.0, 0.0, -4.0]]).double()
    eta, abscissa = perron(W)
    assert abscissa == pytest.approx(0.9)
    assert bool((eta > 0).all())
    assert WeightedMax(eta).margin(W) > 0.09
    assert WeightedMax(torch.ones(3)).margin(W) < 0
    made = eq.NEMON.from_weights(W, torch.eye(3).double(), torch.zeros(3).double())
    assert eq.margin(made) > 0.09


def test_large_matrices_use_power_iteration() -> None:
    W = torch.randn(1100, 1100, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 1e-3
    eta, abscissa = perron(W)
    assert 1 - WeightedMax(eta).margin(W) == pytest.approx(abscissa, abs=1e-4)


def test_matrices_that_lapack_cannot_balance_get_weights_all_the_same() -> None:
    rows = [[0.54, 5e-324, -1.63], [0.26, -677.0, 2.3e-308], [-0.49, 1e300, 5e-324]]
    eta, _ = perron(torch.tensor(rows, dtype=torch.float64))
    WeightedMax(eta)
    graded = torch.triu(torch.full((6, 6), 1e-3).double())
    graded[5, 0] = 1e-100
    eta, abscissa = perron(graded)
    assert abscissa == pytest.approx(1e-3, abs=1e-3)
    assert WeightedMax(eta).margin(graded) > 0.99


def test_weights_without_any_certificate_say_the_abscissa() -> None:
    W = torch.tensor([[0.0, 2.0], [2.0, 0.0]]).double()
    with pytest.raises(NotWellPosedError, match="abscissa of its Metzler majorant is about 2") as error:
        eq.NEMON.from_weights(W, torch.eye(2).double(), torch.zeros(2).double())
    assert error.value.margin == pytest.approx(-1)
    free = eq.NEMON.from_weights(W, torch.eye(2).double(), torch.zeros(2).double(), check=False)
    with pytest.warns(eq.ConvergenceWarning):
        assert bool((free.solve(torch.ones(1, 2).double()).error_bound == math.inf).all())
