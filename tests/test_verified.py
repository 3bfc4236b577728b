"""Definiteness, eigenvalues, norms and margins: against exact rationals, balls, bad luck and wrong estimates."""

from __future__ import annotations

import math
import sys
from fractions import Fraction

import flint
import pytest
import torch
from torch import Tensor

from equipoise import verified as v
from equipoise.errors import OptionError
from exact_arithmetic import (
    F64,
    SCALES,
    at_least,
    at_most,
    definite_in_balls,
    exact,
    eye,
    matrices,
    q,
    semidefinite,
    spectrum,
    sym_margin,
    symmetric,
    weights,
)


def test_gamma_is_above_the_quotient_by_one_rounding_at_most() -> None:
    for k in (1, 2, 3, 100, 4096, 10**9, 2**52):
        for unit in (v.UNIT, 2.0**-24):
            if k * unit < 1:
                true = Fraction(k) * Fraction(unit) / (1 - k * Fraction(unit))
                assert true <= Fraction(v.gamma(k, unit)) <= true * (1 + Fraction(1, 2**50))
    assert v.gamma(0) == 0
    assert v.down(1.0) < 1.0 < v.up(1.0)


@pytest.mark.parametrize(("k", "unit"), [(2**53, v.UNIT), (-1, v.UNIT), (256, 2.0**-8), (1, 0.3), (1, 0.0)])
def test_gamma_refuses_what_it_cannot_bound(k: int, unit: float) -> None:
    with pytest.raises(OptionError, match=f"gamma\\({k}"):
        v.gamma(k, unit)


def test_min_eigenvalue_never_exceeds_the_exact_one() -> None:
    for H in matrices(100):
        for error in (0.0, 1e-9, float(H.abs().max()) / 8):
            mu = v.min_eigenvalue(H, error)
            assert at_least(exact(H), q(mu) + q(error)), (H, error, mu)
            assert not v.is_positive_semidefinite(H, error) or at_least(exact(H), q(error)), (H, error)


@pytest.mark.parametrize("scale", [1.0, 2.0**500, 2.0**-600])
def test_min_eigenvalue_is_tight_at_any_scale(scale: float) -> None:
    for n in (2, 5, 20, 100, 200):
        for H in (symmetric(n), spectrum(torch.rand(n, dtype=F64)), torch.eye(n, dtype=F64)):
            values = torch.linalg.eigvalsh(H)
            gap = float(values[0]) - v.min_eigenvalue(H * scale) / scale
            size = float(values.abs().max())
            assert gap <= 0.8 * n * (n + 20) * v.UNIT * size, (n, gap / size)
    assert v.min_eigenvalue(torch.eye(7, dtype=F64) * scale) >= scale * (1 - 1e-15)


def test_min_eigenvalue_with_error_costs_the_error_and_no_more() -> None:
    H = symmetric(50)
    for error in (1e-3, 1.0, 1e6):
        assert v.min_eigenvalue(H, error) == pytest.approx(v.min_eigenvalue(H) - error, rel=1e-15, abs=1e-15)
    assert v.min_eigenvalue(H, math.inf) == -math.inf


@pytest.mark.parametrize("n", [2, 50, 100])
def test_definiteness_is_proved_close_to_singular_and_refused_beyond(n: int) -> None:
    rest = torch.rand(n - 1, dtype=F64) + 0.5

    def with_lowest(low: float) -> Tensor:
        return spectrum(torch.cat([torch.tensor([low], dtype=F64), rest]))

    assert not v.is_positive_semidefinite(with_lowest(-1e-10))
    assert not v.is_positive_semidefinite(with_lowest(-1e-13))
    assert v.is_positive_semidefinite(with_lowest(1e-11))
    assert v.is_positive_semidefinite(with_lowest(1e-11) * 1e200)
    assert v.is_positive_semidefinite(with_lowest(1e-11) * 1e-280)
    assert v.is_positive_semidefinite(with_lowest(1e-3), error=0.999e-3)
    assert not v.is_positive_semidefinite(with_lowest(1e-3), error=1.001e-3)
    assert v.min_eigenvalue(with_lowest(-1e-10)) < -0.99e-10


@pytest.mark.parametrize("n", [30, 300])
@pytest.mark.parametrize("heads", [1, 8])
def test_rounding_that_all_goes_one_way_is_refused(n: int, heads: int) -> None:
    """A last pivot in which a running sum swallows term after term: plain Cholesky succeeds, H is indefinite."""
    for share in (0.45, 0.9):
        b = torch.full((n - 1,), math.sqrt(share * v.UNIT), dtype=F64)
        b[:heads] = 1
        tail = sum(Fraction(x) ** 2 for x in b.tolist()) - heads
        for part in (0.1, 0.5, 0.9):
            H = torch.eye(n, dtype=F64)
            H[-1, :-1] = H[:-1, -1] = b
            H[-1, -1] = heads + part * float(tail)
            indefinite = Fraction(float(H[-1, -1])) <= heads + tail
            assert not (indefinite and v.is_positive_semidefinite(H))
            assert not (indefinite and v.min_eigenvalue(H) >= 0)


def test_definiteness_at_the_edges() -> None:
    assert v.is_positive_semidefinite(torch.zeros(0, 0))
    assert v.is_positive_semidefinite(torch.tensor([[5e-324]], dtype=F64))
    assert not v.is_positive_semidefinite(torch.zeros(3, 3))
    assert not v.is_positive_semidefinite(torch.full((2, 2), math.nan))
    assert not v.is_positive_semidefinite(torch.full((2, 2), math.inf))
    assert not v.is_positive_semidefinite(torch.eye(2), error=math.inf)
    assert v.min_eigenvalue(torch.zeros(3, 3)) == 0
    assert v.min_eigenvalue(torch.zeros(0, 0)) == math.inf


def test_ball_arithmetic_agrees_on_larger_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flint.ctx, "prec", 300)
    for n in (12, 25):
        for H in (symmetric(n), spectrum(torch.logspace(-14, 0, n, dtype=F64)), symmetric(n, 1e-5) + 1):
            one = flint.arb_mat(n, n, [flint.arb(float(i == j)) for i in range(n) for j in range(n)])
            balls = flint.arb_mat(n, n, [flint.arb(x) for x in H.flatten().tolist()])
            mu, t = flint.arb(v.min_eigenvalue(H)), flint.arb(v.spectral_norm(H))
            assert definite_in_balls(balls - one * mu)
            assert not definite_in_balls(balls - one * (mu + 1e-11 * n))
            assert definite_in_balls(one * t * t - balls.transpose() * balls)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1.0, -1.0, 1e-9, 1e300])
def test_a_wrong_estimate_cannot_break_a_bound(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = v._lowest_estimate
    monkeypatch.setattr(v, "_lowest_estimate", lambda H: honest(H) + wrong)
    for n in (1, 3, 5):
        H, W = symmetric(n), torch.randn(n, n, dtype=F64) / n
        assert at_least(exact(H), q(v.min_eigenvalue(H)))
        assert at_most(exact(W), q(v.spectral_norm(W)))
        mu, one = v.cayley_margin(W, 0.5), eye(n)
        if mu is not None:
            C = exact(W)
            form = one - C.transpose() * C - q(mu) / 2 * (one + C).transpose() * (one + C)
            assert semidefinite(form)


def test_a_solver_that_gives_up_leaves_gershgorin(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Tensor) -> Tensor:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigvalsh", fail)
    assert v.min_eigenvalue(torch.tensor([[3.0, 1.0], [1.0, 4.0]])) == pytest.approx(2.0)
    for n in (2, 3, 60):
        for _ in range(40):
            H = symmetric(n)
            off = H.abs().fill_diagonal_(0.0).tolist()
            true = min(q(H[i, i]) - sum(map(q, off[i]), q(0)) for i in range(n))
            assert q(v.min_eigenvalue(H)) <= true
            assert v.min_eigenvalue(H) >= float(true.p) / float(true.q) - 1e-13 * n


def test_large_matrices_take_another_road_to_the_same_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    H = [spectrum(torch.linspace(0, 1, 300, dtype=F64) ** 2), symmetric(300), torch.eye(300, dtype=F64)]
    m, rank = 0.125, torch.randn(40, 300, dtype=F64)
    H.append(m * torch.eye(300, dtype=F64) + rank.T @ rank)
    H[-1] = (H[-1] + H[-1].T) / 2
    direct = [v.min_eigenvalue(h) for h in H]
    monkeypatch.setattr(v, "_DIRECT", 2)
    for h, bound in zip(H, direct, strict=True):
        assert v.min_eigenvalue(h) == pytest.approx(bound, abs=2e-12 * float(h.abs().sum(1).max()))
    for h in matrices(20):
        assert at_least(exact(h), q(v.min_eigenvalue(h)))


def test_norms_are_never_below_the_exact_ones() -> None:
    for i in range(150):
        shape, scale = (1 + i % 5, 1 + i // 5 % 5), SCALES[i % len(SCALES)]
        X = (torch.randn(shape, dtype=F64) * scale).to(torch.float32 if i % 4 == 0 and scale == 1.0 else F64)
        for error in (0.0, 1e-7, float(X.abs().max())):
            t = v.spectral_norm(X, error)
            assert at_most(exact(X), q(t) - q(error)), (X, error, t)
        assert at_most(exact(X.abs()), q(v.absolute_norm(X)))
        if scale * 1e10 > 1e-280:
            assert v.spectral_norm(X) <= v.absolute_norm(X) * (1 + 1e-15)
            bound = math.sqrt(float(X.abs().sum(0).max())) * math.sqrt(float(X.abs().sum(1).max()))
            frobenius = float((X / X.abs().max()).norm() * X.abs().max())
            assert v.absolute_norm(X) <= min(bound, frobenius) * (1 + 1e-6 if X.dtype != F64 else 1 + 1e-13)


def test_a_sum_of_squares_that_swallows_its_terms_is_paid_for() -> None:
    for rows in (1000, 100_000):
        X = torch.full((rows, 1), math.sqrt(0.45 * v.UNIT), dtype=F64)
        X[0] = 1
        square = 1 + (rows - 1) * q(float(X[1])) ** 2
        for Y in (X, X.T.contiguous()):
            for bound in (v.spectral_norm(Y), v.absolute_norm(Y), float(v.row_norms(X.T)[0])):
                assert square <= q(bound) ** 2
        assert q(float(v.row_norms_lower(X.T)[0])) ** 2 <= square


def test_norms_are_tight() -> None:
    for shape in ((1, 1), (3, 2), (100, 100), (30, 200), (200, 30)):
        X = torch.randn(shape, dtype=F64)
        true = float(torch.linalg.matrix_norm(X, 2))
        assert true <= v.spectral_norm(X) * (1 + 1e-13)
        assert v.spectral_norm(X) <= true * (1 + 1e-15 + 0.8 * (max(shape) + 20) ** 2 * v.UNIT)
        assert v.spectral_norm(X * 2.0**600) == v.spectral_norm(X) * 2.0**600
    assert v.spectral_norm(torch.ones(200, 200)) <= v.absolute_norm(torch.ones(200, 200)) <= 200 * (1 + 1e-13)
    assert v.spectral_norm(torch.eye(9)) <= 1 + 1e-13
    assert v.absolute_norm(torch.eye(9)) <= 1 + 1e-13
    assert v.spectral_norm(torch.zeros(3, 4)) == v.absolute_norm(torch.zeros(0, 4)) == 0
    assert v.spectral_norm(torch.zeros(3, 4), error=0.5) == 0.5
    assert v.spectral_norm(torch.full((4, 4), sys.float_info.max, dtype=F64)) == math.inf


def test_margin_and_lipschitz_against_exact_rationals() -> None:
    for W in weights(100):
        for error in (0.0, 1e-6):
            assert at_least(sym_margin(exact(W)), q(v.margin(W, error)) + q(error)), W
            assert at_most(eye(W.shape[0]) - exact(W), q(v.lipschitz(W, error)) - q(error)), W


def test_margin_sees_a_margin_of_one_part_in_a_million_millions() -> None:
    for n in (1, 2, 3, 4):
        B = torch.randn(n, n, dtype=F64).round(decimals=1)
        for low in (1e-12, 1e-10):
            W = (1 - low) * torch.eye(n, dtype=F64) + B - B.T
            assert 0 < v.margin(W) <= 1 - float(W[0, 0])
            W = (1 + low) * torch.eye(n, dtype=F64) + B - B.T
            assert v.margin(W) < 0


def test_margin_and_lipschitz_are_tight_for_a_hundred_units() -> None:
    A, B = torch.randn(25, 100, dtype=F64) / 10, torch.randn(100, 100, dtype=F64) / 10
    W = 0.8 * torch.eye(100, dtype=F64) - A.T @ A + B - B.T
    true = float(torch.linalg.eigvalsh(torch.eye(100, dtype=F64) - (W + W.T) / 2)[0])
    assert true - 5e-13 <= v.margin(W) <= true + 1e-14
    L = float(torch.linalg.matrix_norm(torch.eye(100, dtype=F64) - W, 2))
    assert L * (1 - 1e-13) <= v.lipschitz(W) <= L * (1 + 1e-12)
    assert v.margin(W, 0.1) == pytest.approx(v.margin(W) - 0.1, rel=1e-12)
