"""The verified functions themselves, on matrices made to be hard: graded, nearly singular, huge, tiny, denormal."""

from __future__ import annotations

import math

import numpy as np
import torch

from equipoise import verified
from equipoise.certificates.convergence import geometric_sum
from equipoise.certificates.rows import Comparison
from equipoise.norms import WeightedMax, metzler

from .constants import margin_of, norm_of
from .ledger import Ledger
from .wide import LD, UNIT, Array, exact, largest, norms, rayleigh, solve

__all__ = ["numbers"]


def _matrix(rng: np.random.Generator, rows: int, columns: int) -> Array:
    X = rng.standard_normal((rows, columns))
    draw = rng.random()
    if draw < 0.2:  # graded
        X = X * 10.0 ** rng.uniform(-12, 0, (rows, 1))
    elif draw < 0.4:  # of low rank, nearly
        X = np.outer(X[:, 0], X[0]) + 10.0 ** rng.uniform(-16, -4) * X
    elif draw < 0.5:
        X = np.round(X * 3)
    elif draw < 0.6:
        X[rng.random(X.shape) < 0.5] = 0
    scale = rng.choice([0.0, 0.0, 0.0, -310.0, -160.0, -20.0, 20.0, 150.0])
    return X * 10.0**scale


def _disturbed(rng: np.random.Generator, X: Array, error: float, way: Array | None = None) -> Array:
    """A matrix within 2-norm ``error`` of X, by ``way`` (of 2-norm 1) if given."""
    if way is None:
        way = np.outer(_unit(rng.standard_normal(len(X))), _unit(rng.standard_normal(X.shape[1])))
    return exact(X) + LD(error) * (1 - 16 * UNIT) * exact(way)


def _unit(x: Array) -> Array:
    return x / np.linalg.norm(x)


def numbers(rng: np.random.Generator, ledger: Ledger) -> None:
    """One matrix through every function."""
    n = int(rng.integers(1, 9))
    X = _matrix(rng, n, n)
    if not np.isfinite(X).all():
        return
    top = float(np.abs(X).max())
    error = 0.0 if rng.random() < 0.5 or top == 0 else top * float(10 ** rng.uniform(-16, -1))
    single = rng.random() < 0.3 and 1e-30 < top < 1e30
    stored = torch.tensor(X, dtype=torch.float32 if single else torch.float64)
    X = stored.double().numpy()
    _norms(rng, X, stored, error, ledger)
    _eigenvalues(rng, X, error, ledger)
    _margins(rng, X, stored, error, ledger)
    if 1e-3 < top < 1e3:
        _cayley(rng, X, error, ledger)
        _rows(rng, X, error, ledger)
    _rest(rng, X, ledger)


def _norms(rng: np.random.Generator, X: Array, stored: torch.Tensor, error: float, ledger: Ledger) -> None:
    U, _, V = np.linalg.svd(X / (np.abs(X).max() or 1))
    value, slack = largest(_disturbed(rng, X, error, np.outer(U[:, 0], V[0])))
    ledger.most("spectral norm", verified.spectral_norm(stored, error), value, slack + LD(error) * 64 * UNIT * 2**11)
    ledger.most("absolute norm", verified.absolute_norm(stored), *largest(np.abs(exact(X))))
    ledger.most("row norms", exact(verified.row_norms(stored)), norms(exact(X)), 16 * UNIT * norms(exact(X)))
    ledger.least(
        "row norms lower", exact(verified.row_norms_lower(stored)), norms(exact(X)), 16 * UNIT * norms(exact(X))
    )
    w = rng.standard_normal((3, len(X)))
    with torch.no_grad():
        computed = exact(torch.tensor(w) @ torch.tensor(X).T)
    off = norms(computed - exact(w) @ exact(X).T)
    bound = verified.product_rounding(
        verified.absolute_norm(torch.tensor(X)), len(X), verified.row_norms(torch.tensor(w))
    )
    if bool(torch.isfinite(torch.tensor(computed.astype(float))).all()):
        ledger.most(
            "product rounding", exact(bound), off, 8 * len(X) * UNIT * norms(np.abs(exact(w)) @ np.abs(exact(X)).T)
        )


def _eigenvalues(rng: np.random.Generator, X: Array, error: float, ledger: Ledger) -> None:
    draw = rng.random()
    H = X / 2 + X.T / 2 if draw < 0.5 else X @ X.T if np.abs(X).max() < 1e150 else X / 2 + X.T / 2
    H = (H + H.T) / 2
    if not np.isfinite(H).all():
        return
    x = np.linalg.eigh(H / (np.abs(H).max() or 1))[1][:, 0]
    moved = exact(H) - LD(error) * (1 - LD(2) ** -50) * exact(np.outer(x, x))
    value, slack = rayleigh(moved)
    slack = slack + LD(error) * LD(2) ** -48
    found = verified.min_eigenvalue(torch.tensor(H), error)
    ledger.least("min eigenvalue", found, value, slack)
    shift = float(np.abs(H).max()) * float(rng.choice([0, 1e-16, 1e-15, -1e-15])) - float(value)
    if math.isfinite(shift):
        moved = H + shift * np.eye(len(H))
        claimed = verified.is_positive_semidefinite(torch.tensor(moved), error)
        least, slack = rayleigh(exact(moved) - LD(error) * (1 - LD(2) ** -50) * exact(np.outer(x, x)))
        ledger.holds("positive semidefinite", claimed, least + slack + LD(error) * LD(2) ** -48 >= 0)


def _margins(rng: np.random.Generator, X: Array, stored: torch.Tensor, error: float, ledger: Ledger) -> None:
    if np.abs(X).max() > 1e100:
        return
    moved = _disturbed(rng, X, error)
    value, slack = margin_of(moved, None)
    slack = slack + LD(error) * LD(2) ** -48
    ledger.least("verified margin", verified.margin(stored, error), value, slack)
    value, slack = largest(np.eye(len(X), dtype=LD) - moved)
    ledger.most(
        "verified lipschitz", verified.lipschitz(stored, error), value, slack + LD(error) * LD(2) ** -48 + 4 * UNIT
    )
    eta = 10.0 ** rng.uniform(-3, 3, len(X))
    family = WeightedMax(torch.tensor(eta))
    wide = exact(family.eta)
    rows = exact(X) + LD(error) * (1 - LD(2) ** -50) * np.sign(rng.standard_normal(X.shape)) * wide / norms(wide)
    for name, claimed, (value, slack), sign in (
        ("margin", family.margin(stored, error), margin_of(rows, wide), -1),
        ("lipschitz", family.lipschitz(stored, error), norm_of(np.eye(len(X), dtype=LD) - rows, wide), 1),
        ("norm", family.norm(stored, error), norm_of(rows, wide), 1),
    ):
        (ledger.most if sign > 0 else ledger.least)(f"weighted {name}", claimed, value, slack + 4 * UNIT)


def _cayley(rng: np.random.Generator, X: Array, error: float, ledger: Ledger) -> None:
    n, alpha = len(X), float(10 ** rng.uniform(-2, 2))
    eye = np.eye(n, dtype=LD)
    known = _disturbed(rng, X, error)
    F = eye - known
    system = eye + LD(alpha) * F
    back = solve(system[None], eye[None])[0]
    if np.isfinite(back).all():
        value, slack = largest((eye - LD(alpha) * F) @ back)
        slack = slack + 16 * n * UNIT * norms(back.reshape(-1)) ** 2 * norms(system.reshape(-1)) ** 2
        ledger.most("cayley norm", verified.cayley_norm(torch.tensor(X), alpha, error), value, slack)
    P, Q = _matrix(rng, n, n) * 0 + rng.standard_normal((n, n)), X
    back = solve(exact(Q)[None], eye[None])[0]
    if np.isfinite(back).all():
        value, slack = largest(exact(P) @ back)
        slack = slack + 16 * n * UNIT * norms(back.reshape(-1)) ** 2 * norms(exact(Q).reshape(-1)) * norms(
            exact(P).reshape(-1)
        )
        ledger.most("quotient norm", verified.quotient_norm(torch.tensor(P), torch.tensor(Q)), value, slack)
    C = X / (np.linalg.norm(X, 2) * float(10 ** rng.choice([-3, -1, 0.001, 0.1, 0.5])) or 1)
    if rng.random() < 0.5:
        C = np.linalg.qr(X + np.eye(n))[0] * (1 - float(10 ** rng.uniform(-12, -1)))
    plus, minus = eye + exact(C), eye - exact(C)
    back = solve(plus[None], eye[None])[0]
    if not np.isfinite(back).all():
        return
    F = minus @ back / LD(alpha)
    for matrix, which in (((F + F.T) / 2, 0), (F.T @ F, -1)):
        y = back @ np.linalg.eigh(matrix.astype(float))[1][:, which].astype(LD)
        y = y / np.abs(y).max()
        x, image = plus @ y, minus @ y / LD(alpha)
        room = 16 * n * UNIT * (1 + norms(minus.reshape(-1)) + norms(plus.reshape(-1))) * norms(y) / norms(x)
        if which == 0:
            slack = room * (norms(image) / norms(x) * 2 + 1 / LD(alpha))
            ledger.least(
                "verified cayley margin", verified.cayley_margin(torch.tensor(C), alpha), (x @ image) / (x @ x), slack
            )
        else:
            slack = room * (norms(image) / norms(x) + 1 / LD(alpha))
            ledger.most(
                "verified cayley lipschitz",
                verified.cayley_lipschitz(torch.tensor(C), alpha),
                norms(image) / norms(x),
                slack,
            )


def _rows(rng: np.random.Generator, X: Array, error: float, ledger: Ledger) -> None:
    """(I − M)⁻¹ r entry by entry."""
    n = len(X)
    W = X.copy()
    np.fill_diagonal(W, 1 - (np.abs(X).sum(1)) * rng.uniform(0.9, 3) - 10 ** rng.uniform(-9, 0))
    error = error * 1e-3
    r = np.abs(rng.standard_normal((6, n))) * 10.0 ** rng.uniform(-8, 8, (6, 1))
    r[rng.random(r.shape) < 0.3] = 0
    bound = Comparison(torch.tensor(W), error).bound(torch.tensor(r))
    moved = exact(W) + LD(error) * (1 - LD(2) ** -50) / n * np.where(W >= 0, 1, -1)
    np.fill_diagonal(moved, np.diagonal(exact(W)))
    M = exact(metzler(torch.tensor(moved.astype(float)))) * 0 + np.abs(moved)
    np.fill_diagonal(M, np.diagonal(moved))
    system = np.eye(n, dtype=LD) - M
    back = solve(system[None], np.eye(n, dtype=LD)[None])[0]
    truth = exact(r) @ back.T
    slack = 16 * n * UNIT * norms(back.reshape(-1)) ** 2 * norms(system.reshape(-1)) * norms(exact(r))[:, None]
    ledger.most("comparison of rows", exact(bound), truth, slack)


def _rest(rng: np.random.Generator, X: Array, ledger: Ledger) -> None:
    k = int(10 ** rng.uniform(0, 7))
    ku = LD(k) * LD(2) ** -53
    ledger.most("gamma", verified.gamma(k), ku / (1 - ku), 2 * UNIT * ku)
    rate, decay, steps = (float(v) for v in (rng.uniform(0, 1), rng.uniform(0, 1), rng.integers(1, 60)))
    if rng.random() < 0.3:
        decay = rate * (1 + float(rng.choice([0, 1e-16, 1e-9])))
    if decay < 1:
        truth = sum((LD(rate) ** (int(steps) - 1 - j) * LD(decay) ** j for j in range(int(steps))), LD(0))
        ledger.most("geometric sum", geometric_sum(rate, decay, int(steps)), truth, 128 * UNIT * truth)
