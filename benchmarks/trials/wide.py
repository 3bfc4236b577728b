"""Arithmetic with 64-bit mantissas and 15-bit exponents: the truths that bounds in doubles are compared with.

A truth is a witness: a number that the exact quantity surely reaches (‖F x‖/‖x‖ of a norm, a Rayleigh quotient of a
smallest eigenvalue), so that a bound it breaks is broken. Doubles are exact here, products of them nearly so; every
truth comes with the slack that its own rounding needs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["LD", "UNIT", "Array", "exact", "inverse", "norms", "rayleigh", "require_wide", "singular", "solve"]

LD = np.longdouble
UNIT = LD(2.0) ** -64
Array = np.ndarray[Any, Any]


def require_wide() -> None:
    """Refuse to run where a long double is no more than a double."""
    if np.finfo(LD).nmant < 63:
        raise SystemExit("this machine's long double has no 64-bit mantissa: run the soundness trials on x86-64")


def exact(values: Any) -> Array:
    """The same numbers (a tensor, an array, a float) as long doubles."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=LD)


def norms(rows: Array) -> Array:
    """2-norms of the last axis, scaled so that no square under- or overflows."""
    top = np.abs(rows).max(-1, initial=0)
    safe = np.where(top > 0, top, 1)
    return top * np.sqrt(((rows / safe[..., None]) ** 2).sum(-1))


def solve(A: Array, b: Array) -> Array:
    """x with A x = b for ``A (B, n, n)``, ``b (B, n, k)`` by elimination with partial pivoting; inf where singular."""
    A, b = np.array(A, dtype=LD), np.array(b, dtype=LD)
    batch, n = np.arange(len(A)), A.shape[1]
    with np.errstate(all="ignore"):
        for i in range(n):
            p = i + np.abs(A[:, i:, i]).argmax(1)
            A[batch, i], A[batch, p] = A[batch, p].copy(), A[batch, i].copy()
            b[batch, i], b[batch, p] = b[batch, p].copy(), b[batch, i].copy()
            factors = A[:, i + 1 :, i] / A[:, i, i][:, None]
            A[:, i + 1 :] -= factors[:, :, None] * A[:, i][:, None, :]
            b[:, i + 1 :] -= factors[:, :, None] * b[:, i][:, None, :]
        for i in range(n - 1, -1, -1):
            b[:, i] = (b[:, i] - (A[:, i, i + 1 :, None] * b[:, i + 1 :]).sum(1)) / A[:, i, i][:, None]
    return b


def inverse(A: Array) -> Array:
    """A⁻¹ of one ``A (n, n)``."""
    n = len(A)
    return solve(A[None], np.eye(n, dtype=LD)[None])[0]


def _double(A: Array) -> tuple[Array, int]:
    """A scaled by a power of two into the middle of the doubles."""
    top = np.abs(A).max(initial=0)
    e = int(np.frexp(top)[1]) if top > 0 else 0
    return np.ldexp(A, -e).astype(float), e


def singular(A: Array) -> tuple[Array, LD]:
    """(directions, slack): right singular vectors of A as columns, the largest first, in doubles; rounding of a
    witness ‖A x‖/‖x‖, relative to ‖A‖."""
    X, _ = _double(A)
    vectors = np.linalg.svd(X)[2].T if X.size else np.eye(len(A))
    return vectors.astype(LD), 8 * (A.shape[-1] + 4) * UNIT


def largest(A: Array) -> tuple[LD, LD]:
    """(a number that ‖A‖₂ surely reaches but for its slack, slack)."""
    if not A.size:
        return LD(0), LD(0)
    vectors, relative = singular(A)
    x = vectors[:, 0]
    x = x / np.abs(x).max()
    value = norms(A @ x) / norms(x)
    return value, relative * norms(A.reshape(-1))


def rayleigh(H: Array) -> tuple[LD, LD]:
    """(a number that λ_min(H) surely does not exceed but for its slack, slack)."""
    if not H.size:
        return LD(np.inf), LD(0)
    X, _ = _double(H)
    x = np.linalg.eigh(X)[1][:, 0].astype(LD)
    x = x / np.abs(x).max()
    # a step of inverse iteration: what doubles blur between close eigenvalues
    shifted = H - (x @ H @ x / (x @ x)) * np.eye(len(H), dtype=LD)
    values = [(x @ H @ x) / (x @ x)]
    y = solve(shifted[None], x[None, :, None])[0, :, 0]
    if np.isfinite(y).all() and np.abs(y).max() > 0:
        y = y / np.abs(y).max()
        values.append((y @ H @ y) / (y @ y))
    return min(values), 8 * (len(H) + 4) * UNIT * norms(H.reshape(-1))
