"""Exact statements about stored numbers, and matrices on which proofs are hard: for the tests of proved bounds."""

from __future__ import annotations

import random
from collections.abc import Iterator

import flint
import torch
from flint import fmpq, fmpq_mat
from torch import Tensor

F64 = torch.float64
SCALES = [1.0, 2.0**500, 1e150, 1e-200, 1e-310, 2.0**-1074]


def q(x: float) -> fmpq:
    return fmpq(*float(x).as_integer_ratio())


def exact(X: Tensor) -> fmpq_mat:
    return fmpq_mat(X.shape[0], X.shape[1], [q(x) for x in X.flatten().tolist()])


def eye(n: int, c: fmpq | int = 1) -> fmpq_mat:
    return fmpq_mat(n, n, [c if i == j else 0 for i in range(n) for j in range(n)])


def semidefinite(M: fmpq_mat) -> bool:
    """Exact elimination: no negative pivot, and nothing beside a zero one."""
    n = M.nrows()
    A = [[M[i, j] for j in range(n)] for i in range(n)]
    for k in range(n):
        if A[k][k] < 0 or (A[k][k] == 0 and any(A[i][k] != 0 for i in range(k, n))):
            return False
        for i in range(k + 1, n):
            if A[i][k] != 0:
                f = A[i][k] / A[k][k]
                for j in range(k + 1, n):
                    A[i][j] -= f * A[k][j]
    return True


def at_least(H: fmpq_mat, mu: fmpq) -> bool:
    """Whether no eigenvalue of H is below ``mu``."""
    return semidefinite(H - eye(H.nrows(), mu))


def at_most(X: fmpq_mat, t: fmpq) -> bool:
    """Whether ``‖X‖₂ <= t``."""
    return t >= 0 and semidefinite(eye(X.ncols(), t * t) - X.transpose() * X)


def dominated(P: fmpq_mat, Q: fmpq_mat, rho: fmpq) -> bool:
    """Whether ``‖Px‖ <= ρ ‖Qx‖`` for all x."""
    return rho >= 0 and semidefinite(rho * rho * (Q.transpose() * Q) - P.transpose() * P)


def sym_margin(W: fmpq_mat) -> fmpq_mat:
    return eye(W.nrows()) - (W + W.transpose()) / 2


def symmetric(n: int, scale: float = 1.0, dtype: torch.dtype = F64) -> Tensor:
    B = torch.randn(n, n, dtype=F64) * scale
    return torch.tril(B).to(dtype) + torch.tril(B, -1).to(dtype).T


def spectrum(values: Tensor) -> Tensor:
    """An exactly symmetric matrix with these eigenvalues, up to rounding."""
    n = len(values)
    V = torch.linalg.qr(torch.randn(n, n, dtype=F64))[0]
    H = (V * values) @ V.T
    return (H + H.T) / 2


def matrices(count: int) -> Iterator[Tensor]:
    """Symmetric ones of every scale and source, many within 1e-12 of singular, on both sides."""
    for i in range(count):
        n, scale = 1 + i % 6, SCALES[i % len(SCALES)]
        yield symmetric(n, scale)
        yield symmetric(n, random.choice([1.0, 2.0**-140, 1e30]), torch.float32)
        low = random.choice([0.0, 1e-12, -1e-12, 1e-15, -1e-15, 1e-9])
        yield spectrum(torch.cat([torch.tensor([low], dtype=F64), torch.rand(n, dtype=F64)])) * scale
        A = torch.randint(-9, 9, (n, n + 1)).double()
        yield A.T @ A  # exactly singular


def definite_in_balls(M: flint.arb_mat) -> bool:
    """Elimination in ball arithmetic: every pivot surely positive."""
    n = M.nrows()
    A = [[M[i, j] for j in range(n)] for i in range(n)]
    for k in range(n):
        if not A[k][k] > 0:
            return False
        for i in range(k + 1, n):
            f = A[i][k] / A[k][k]
            for j in range(k + 1, n):
                A[i][j] -= f * A[k][j]
    return True


def weights(count: int) -> Iterator[Tensor]:
    """Weights whose margin is at, just above and just below 0; skew-heavy, huge and tiny ones."""
    for i in range(count):
        n, target = 1 + i % 5, random.choice([0.0, 1e-12, -1e-12, 1e-3, 0.7, -2.0])
        H = spectrum(torch.cat([torch.tensor([target], dtype=F64), target + torch.rand(n, dtype=F64)]))
        B = torch.randn(n + 1, n + 1, dtype=F64) * random.choice([0.0, 1.0, 1e4, 1e150])
        W = torch.eye(n + 1, dtype=F64) - H + B - B.T
        yield W.float() if i % 3 == 0 and float(W.abs().max()) < 1e30 else W
        yield torch.randn(n, n, dtype=F64) * random.choice(SCALES)
