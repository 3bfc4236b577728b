"""Equilibrium problems whose answers are known exactly, by means that share nothing with the solvers.

Piecewise linear activations: every choice of linear pieces is solved for, and the one that is consistent is
the answer (for ReLU this enumerates the active sets of a linear complementarity problem). Smooth ones: a root
of the scalar equation in 50 digits, or Newton's method on z − σ(W z + q) with the exact Jacobian, polished in
50 digits where a bound is to be tested strictly. 2 × 2 cases are solved by hand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import mpmath
import torch
from torch import Tensor

import equipoise as eq
from catalogue import ACTIVATIONS, EVERY_ACTIVATION, definition, matrix
from equipoise.activations import Activation

__all__ = [
    "CATALOGUE",
    "SMOOTH",
    "Case",
    "equilibrium",
    "exact_rows",
    "matrix",
    "scalar",
    "true_margin",
]

mpmath.mp.dps = 50
INF = math.inf
SMOOTH = [activation for activation in EVERY_ACTIVATION if not definition(activation).linear]


@dataclass(frozen=True)
class Case:
    """z = σ(W z + q) with its answer: W ``(n, n)``, q and answer ``(B, n)``, float64."""

    name: str
    W: Tensor
    q: Tensor
    activation: Activation
    answer: Tensor

    def __str__(self) -> str:
        return self.name


def true_margin(W: Tensor) -> float:
    F = torch.eye(len(W), dtype=torch.float64) - W.double()
    return float(torch.linalg.eigvalsh((F + F.mT) / 2)[0]) if len(W) else INF


# Activations again, in many digits


def scalar(activation: Activation, v: object) -> mpmath.mpf:
    """σ(v) for one number v, in 50 digits, by its definition in the catalogue."""
    return mpmath.mpf(definition(activation).define(activation, mpmath.mpf(v)))


def slope(activation: Activation, v: object) -> mpmath.mpf:
    """σ'(v), v not at a kink."""
    x, h = mpmath.mpf(v), mpmath.mpf(10) ** -18
    if not definition(activation).linear:
        return (scalar(activation, x + h) - scalar(activation, x - h)) / (2 * h)
    return next(mpmath.mpf(piece) for piece, _, low, high in pieces(activation) if low <= x <= high)


def pieces(activation: Activation) -> list[tuple[float, float, float, float]]:
    """The linear pieces σ(v) = slope · v + offset on [low, high], read off between the kinks."""
    known = definition(activation)
    assert known.linear, f"{activation} is not piecewise linear"
    found = []
    for low, high in itertools.pairwise((-INF, *known.kinks(activation), INF)):
        if low == high:
            continue
        middle = high - 2 if low == -INF else low + 2 if high == INF else (mpmath.mpf(low) + high) / 2
        reach = 1 if INF in (-low, high) else (mpmath.mpf(high) - low) / 4
        left, right = (scalar(activation, mpmath.mpf(middle) + side * reach) for side in (-1, 1))
        rise = (right - left) / (2 * reach)
        found.append((float(rise), float(left - rise * (mpmath.mpf(middle) - reach)), low, high))
    return found


# Equilibria


def enumerated(W: Tensor, q: Tensor, activation: Activation) -> Tensor:
    """The answer ``(B, n)`` by trying every combination of linear pieces, at most 3^6 or 2^10 of them."""
    table = torch.tensor(pieces(activation), dtype=torch.float64)
    n = len(W)
    combos = torch.tensor(list(itertools.product(range(len(table)), repeat=n)))
    slopes, offsets, low, high = table[combos].unbind(-1)  # each (combinations, n)
    systems = torch.eye(n, dtype=torch.float64) - slopes[:, :, None] * W
    right = slopes[:, None, :] * q + offsets[:, None, :]
    z = torch.linalg.solve(systems, right.mT).mT  # (combinations, B, n)
    v = z @ W.mT + q
    outside = torch.maximum(low[:, None] - v, v - high[:, None]).amax(2)
    best = outside.argmin(0)
    batch = torch.arange(len(q))
    assert float(outside[best, batch].max()) < 1e-9, "no consistent choice of pieces: not a monotone problem"
    return z[best, batch]


def newton(W: Tensor, q: Tensor, activation: Activation) -> Tensor:
    """The answer ``(B, n)`` for a smooth σ by damped Newton steps in float64; checked by its residual."""
    n = len(W)

    def gap(z: Tensor) -> Tensor:
        return z - activation(z @ W.mT + q)

    z = activation(q)
    for _ in range(200):
        r = gap(z)
        jacobian = torch.eye(n, dtype=torch.float64) - activation.derivative(z @ W.mT + q)[:, :, None] * W
        step = torch.linalg.solve(jacobian, r[:, :, None])[:, :, 0]
        length = torch.ones(len(q), 1, dtype=torch.float64)
        for _ in range(30):
            worse = gap(z - length * step).norm(dim=1, keepdim=True) > r.norm(dim=1, keepdim=True)
            length = torch.where(worse, length / 2, length)
        z = z - length * step
        if float(step.norm()) <= 1e-15 * (1 + float(z.norm())):
            break
    assert float(gap(z).norm()) <= 1e-13 * (1 + float(q.norm()) + float(z.norm()))
    return z


def equilibrium(W: Tensor, q: Tensor, activation: Activation) -> Tensor:
    """z* ``(B, n)`` in float64 for W ``(n, n)`` of positive margin and q ``(B, n)``, of any float dtype."""
    find = newton if activation in SMOOTH else enumerated
    return find(W.detach().double(), q.detach().double(), activation)


def exact_rows(W: Tensor, q: Tensor, activation: Activation) -> list[mpmath.matrix]:
    """z* row by row in 50 digits: three Newton steps from the float64 answer, each with W and q exact."""
    rows = []
    n = len(W)
    M = mpmath.matrix(W.detach().double().tolist())
    for start, row in zip(equilibrium(W, q, activation).tolist(), q.detach().double().tolist(), strict=True):
        z, b = mpmath.matrix(start), mpmath.matrix(row)
        for _ in range(3):
            v = M * z + b
            gap = mpmath.matrix([z[i] - scalar(activation, v[i]) for i in range(n)])
            jacobian = mpmath.eye(n)
            for i in range(n):
                d = slope(activation, v[i])
                for j in range(n):
                    jacobian[i, j] -= d * M[i, j]
            z -= mpmath.lu_solve(jacobian, gap)
        assert mpmath.norm(gap) <= mpmath.mpf(10) ** -30 * (1 + mpmath.norm(b)), "not polished"
        rows.append(z)
    return rows


def scalar_root(w: float, q: float, activation: Activation) -> float:
    """z = σ(w z + q) for numbers with w < 1: v − w σ(v) = q is increasing in v, so bisect for v."""
    low, high = mpmath.mpf(-1), mpmath.mpf(1)

    def gap(v: mpmath.mpf) -> mpmath.mpf:
        return v - mpmath.mpf(w) * scalar(activation, v) - mpmath.mpf(q)

    while gap(low) > 0:
        low *= 2
    while gap(high) < 0:
        high *= 2
    for _ in range(90):
        middle = (low + high) / 2
        low, high = (middle, high) if gap(middle) < 0 else (low, middle)
    return float(scalar(activation, (low + high) / 2))


# The catalogue


def _contraction(n: int, norm: float, seed: int) -> Tensor:
    """A W of spectral norm ``norm`` below 1: what Picard's iteration needs."""
    W = _rows(n, n, seed)
    return W * (norm / torch.linalg.matrix_norm(W, 2))


def _case(name: str, W: Tensor, q: Tensor, activation: Activation) -> Case:
    return Case(f"{name}-{activation.name}", W, q, activation, equilibrium(W, q, activation))


def _rows(count: int, n: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, n, generator=generator, dtype=torch.float64) * scale


def _scalar_case(w: float, activation: Activation) -> Case:
    values = [-3.0, -0.4, 0.0, 0.7, 25.0]
    answer = torch.tensor([[scalar_root(w, v, activation)] for v in values], dtype=torch.float64)
    q = torch.tensor(values, dtype=torch.float64)[:, None]
    return Case(f"scalar-w{w}-{activation.name}", torch.tensor([[w]], dtype=torch.float64), q, activation, answer)


def _skew_case() -> Case:
    """W = (1 − m) I + [[0, k], [−k, 0]] with ReLU, by hand.

    Both positive: m z₁ − k z₂ = q₁ and k z₁ + m z₂ = q₂. One at zero: the other is q/m.
    """
    m, k = 0.5, 1.5
    W = torch.tensor([[1 - m, k], [-k, 1 - m]], dtype=torch.float64)
    d = m * m + k * k
    q = torch.tensor([[1.0, 5.0], [2.0, -1.0], [-9.0, 2.0], [-1.0, -1.0]], dtype=torch.float64)
    answer = torch.tensor(
        [[(m * 1 + k * 5) / d, (m * 5 - k * 1) / d], [2 / m, 0.0], [0.0, 2 / m], [0.0, 0.0]], dtype=torch.float64
    )
    return Case("skew-by-hand-ReLU", W, q, eq.ReLU(), answer)


def _diagonal_case(activation: Activation) -> Case:
    """A diagonal W is two scalar problems; one entry is far below −1, one near the end of the margin."""
    W = torch.diag(torch.tensor([-1.5, 0.6], dtype=torch.float64))
    q = torch.tensor([[1.0, 2.0], [-1.0, 0.3], [0.2, -4.0]], dtype=torch.float64)
    answer = torch.tensor(
        [[scalar_root(-1.5, a, activation), scalar_root(0.6, b, activation)] for a, b in q.tolist()],
        dtype=torch.float64,
    )
    return Case(f"diagonal-{activation.name}", W, q, activation, answer)


def _build() -> list[Case]:
    make: list[Callable[[], Case]] = [_skew_case]
    cases = [builder() for builder in make]
    for activation in ACTIVATIONS:
        cases.append(_scalar_case(-2.5, activation))
        cases.append(_scalar_case(0.7, activation))
        if definition(activation).linear or activation == eq.Tanh():
            cases.append(_diagonal_case(activation))
        cases.append(_case("random4", matrix(4, 0.4, 1), _rows(5, 4, 2), activation))
        cases.append(_case("contraction4", _contraction(4, 0.8, 11), _rows(5, 4, 12), activation))
    relu = eq.ReLU()
    cases.append(_case("lcp10", matrix(10, 0.5, 3, gain=0.3), _rows(6, 10, 4), relu))
    cases.append(_case("lcp8-low-rank", matrix(8, 0.6, 5, rank=2, gain=0.3), _rows(4, 8, 6, 10.0), relu))
    cases.append(_case("wide-margin", matrix(5, 3.0, 7, gain=0.2), _rows(3, 5, 8), relu))
    cases.append(_case("no-recurrence", torch.zeros(3, 3, dtype=torch.float64), _rows(3, 3, 9), eq.Tanh()))
    return cases


CATALOGUE = _build()
