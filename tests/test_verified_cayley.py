"""Quotients and Cayley transforms: against exact rationals, perturbations and closed forms."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from equipoise import verified as v
from exact_arithmetic import F64, SCALES, dominated, exact, eye, q, semidefinite, weights


def ball(X: Tensor, error: float) -> Tensor:
    """Some matrix at 2-norm distance just inside ``error``: rank one half of the time."""
    E = torch.randn(X.shape, dtype=F64)
    if random.random() < 0.5:
        E = torch.outer(E[:, 0], E[0])
    return X + E * (error * (1 - 1e-9) / float(torch.linalg.matrix_norm(E, 2)))


def test_quotient_norm_against_exact_rationals() -> None:
    proved = 0
    for i in range(150):
        n, m = 1 + i % 4, 1 + i // 4 % 5
        P = torch.randn(m, n, dtype=F64) * random.choice(SCALES[:4])
        Q = torch.randn(n, n, dtype=F64) * random.choice(SCALES[:4])
        if i % 3 == 0 and n > 1:  # close to singular
            Q[0] = Q[1] + torch.randn(n, dtype=F64) * float(Q.abs().max()) * random.choice([1e-6, 1e-11, 1e-15, 0.0])
        rho = v.quotient_norm(P, Q)
        proved += rho is not None
        assert rho is None or rho == math.inf or dominated(exact(P), exact(Q), q(rho))
        error_p, error_q = float(P.abs().max()) / 50, float(torch.linalg.svdvals(Q)[-1]) / 3
        rho = v.quotient_norm(P, Q, error_p, error_q)
        if rho is not None and rho < math.inf:
            for _ in range(3):
                assert dominated(exact(ball(P, error_p)), exact(ball(Q, error_q)), q(rho))
    assert proved > 100


def test_quotient_norm_is_tight_and_knows_singular_ones() -> None:
    P, Q = torch.randn(60, 80, dtype=F64), torch.randn(80, 80, dtype=F64) + 20 * torch.eye(80, dtype=F64)
    true = float(torch.linalg.matrix_norm(P @ torch.linalg.inv(Q), 2))
    rho = v.quotient_norm(P, Q)
    assert rho is not None
    assert true * (1 - 1e-13) <= rho <= true * (1 + 2e-12)
    widened = v.quotient_norm(P, Q, 1e-3, 1e-3)
    assert widened is not None
    assert rho + 1e-5 < widened < rho * 1.01
    assert v.quotient_norm(torch.ones(2, 2), torch.ones(2, 2)) is None
    assert v.quotient_norm(torch.eye(3), torch.zeros(3, 3)) is None
    assert v.quotient_norm(torch.eye(3), torch.eye(3), error_q=1.0) is None
    assert v.quotient_norm(torch.eye(3), torch.eye(3), error_p=math.inf) is None


def test_a_wrong_inverse_cannot_break_a_quotient(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch.linalg.inv_ex
    for off in (1e-3, 0.1, 1.0):

        def inverse(Q: Tensor, off: float = off) -> tuple[Tensor, Tensor]:
            R, info = honest(Q)
            return R * (1 - off * torch.rand(R.shape, dtype=F64)), info

        monkeypatch.setattr(torch.linalg, "inv_ex", inverse)
        for _ in range(20):
            P, Q = torch.randn(3, 3, dtype=F64), torch.randn(3, 3, dtype=F64) + 3 * torch.eye(3, dtype=F64)
            rho = v.quotient_norm(P, Q)
            assert rho is None or dominated(exact(P), exact(Q), q(rho))


def test_cayley_norm_where_cancellation_leaves_little() -> None:
    for i in range(60):
        alpha, low, n = math.exp(random.uniform(-4, 4)), 10.0 ** random.uniform(-11, -3), 1 + i % 3
        B = torch.randn(n, n, dtype=F64)
        for W in ((1 + (1 - low) / alpha) * torch.eye(n, dtype=F64) + low * (B - B.T), B / 3):
            rho, F = v.cayley_norm(W, alpha), (eye(n) - exact(W)) * q(alpha)
            assert rho is not None
            assert dominated(eye(n) - F, eye(n) + F, q(rho)), (W, alpha)


def test_cayley_norm_against_exact_rationals() -> None:
    for W in weights(60):
        alpha = math.exp(random.uniform(-6, 4))
        rho = v.cayley_norm(W, alpha)
        if rho is not None:
            F = (eye(W.shape[0]) - exact(W)) * q(alpha)
            assert dominated(eye(F.nrows()) - F, eye(F.nrows()) + F, q(rho)), (W, alpha)
        rho = v.cayley_norm(W, alpha, 1e-3)
        if rho is not None:
            F = (eye(W.shape[0]) - exact(ball(W.double(), 1e-3))) * q(alpha)
            assert dominated(eye(F.nrows()) - F, eye(F.nrows()) + F, q(rho)), (W, alpha)


@pytest.mark.parametrize(("size", "alpha"), [(1e300, 1e-300), (1e300, 1e300), (1e-300, 1e300), (1.0, 1e-300)])
def test_cayley_norm_survives_extremes(size: float, alpha: float) -> None:
    W = -torch.tensor([[1.0, 3.0], [-3.0, 1.0]], dtype=F64) * size
    rho, F = v.cayley_norm(W, alpha), (eye(2) - exact(W)) * q(alpha)
    assert rho is not None
    assert dominated(eye(2) - F, eye(2) + F, q(rho))
    assert rho <= 1 + 1e-13


def cayley_cases(count: int) -> Iterator[tuple[Tensor, float]]:
    for i in range(count):
        n, alpha = 1 + i % 5, math.exp(random.uniform(-5, 3))
        W = torch.randn(n, n, dtype=F64) * random.choice([0.3, 1.0, 3.0])
        F = torch.eye(n, dtype=F64) - W
        C = torch.linalg.solve(torch.eye(n, dtype=F64) + alpha * F, torch.eye(n, dtype=F64) - alpha * F)
        yield C, alpha
        yield torch.linalg.qr(torch.randn(n, n, dtype=F64))[0] * (1 + random.choice([1e-12, 0.0, -1e-12, -0.3])), alpha
        yield torch.randint(-7, 8, (n, n)).double() / 8, alpha  # as if from codes
        yield torch.randn(n, n, dtype=F64) * random.choice([1e-200, 1e-3, 10.0, 1e100]), alpha


def test_cayley_margin_and_lipschitz_against_the_exact_congruence() -> None:
    margins, lipschitz = [], 0
    for C, alpha in cayley_cases(60):
        X, one, a = exact(C), eye(C.shape[0]), q(alpha)
        mu, L = v.cayley_margin(C, alpha), v.cayley_lipschitz(C, alpha)
        if mu is not None:
            margins.append(mu)
            square = (one + X).transpose() * (one + X)
            assert semidefinite(one - X.transpose() * X - q(mu) * a * square), (C, alpha, mu)
            assert (one + X).det() != 0
        if L is not None and math.inf > L:
            lipschitz += 1
            assert dominated(one - X, one + X, q(L) * a), (C, alpha, L)
    assert sum(mu > 0 for mu in margins) > 40
    assert sum(mu < 0 for mu in margins) > 40
    assert lipschitz > 150


def test_cayley_bounds_are_tight_and_at_least_as_good_as_the_closed_forms() -> None:
    A, B, one = torch.randn(25, 100, dtype=F64) / 8, torch.randn(100, 100, dtype=F64) / 8, torch.eye(100, dtype=F64)
    for m, alpha in ((0.2, 0.5), (-0.05, 0.5), (0.01, 0.2)):
        F = m * one + A.T @ A + B - B.T
        C = torch.linalg.solve(one + alpha * F, one - alpha * F)
        mu, L, rho = v.cayley_margin(C, alpha), v.cayley_lipschitz(C, alpha), v.spectral_norm(C)
        assert mu is not None
        assert L is not None
        assert m - 1e-10 <= mu <= m + 1e-12
        assert pytest.approx(float(torch.linalg.matrix_norm(F, 2)), rel=1e-11) == L
        if rho < 1:
            assert mu >= (1 - rho) / (alpha * (1 + rho)) * (1 - 1e-14)
            assert (1 + rho) / (alpha * (1 - rho)) * (1 + 1e-14) >= L
        assert v.cayley_norm(one - F, alpha) == pytest.approx(rho, rel=1e-11)


def test_the_closed_form_helps_where_the_congruence_cannot() -> None:
    C = torch.diag(torch.tensor([2.0**-50 - 1, 0.5], dtype=F64))
    mu = v.cayley_margin(C, 2.0)
    assert mu is not None
    assert 2.0**-53 < mu <= 1 / 6


def test_cayley_bounds_say_nothing_where_the_network_does_not_exist() -> None:
    for C in (-torch.eye(3), torch.diag(torch.tensor([0.5, -1.0])), torch.tensor([[0.0, 1.0], [1.0, 0.0]])):
        assert v.cayley_margin(C, 1.0) is None
        assert v.cayley_lipschitz(C, 1.0) is None
    assert v.cayley_margin(torch.zeros(2, 2), 4.0) == pytest.approx(0.25, rel=1e-14)
    assert v.cayley_lipschitz(torch.zeros(2, 2), 4.0) == pytest.approx(0.25, rel=1e-13)
