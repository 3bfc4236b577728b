"""Exact networks: the matrices that stored numbers define, activations, equilibria, whole chains, in long doubles.

An equilibrium is found by Newton's method from several starts, for piecewise linear σ by trying all pieces where that
fails, and believed where the residual vanishes to rounding. Its own error is then at most ‖(I − D W)⁻¹‖ times what is
left, doubled thrice. Nothing of this is shared with the solvers or their bounds.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import equipoise as eq
from equipoise.layers.equilibrium import EquilibriumLayer
from equipoise.layers.linear import QuantizedLinear
from equipoise.operators.contractive import AssembledRows, StructuredRows
from equipoise.operators.quantized import AssembledWeight, CayleyWeight, CompensatedWeight, StructuredWeight

from .wide import LD, UNIT, Array, exact, inverse, norms, solve

__all__ = ["Exact", "State", "activate", "affine", "codes", "equilibria", "prox", "run", "slope", "stored"]

COMBINATIONS = 729
"""At most so many choices of linear pieces are tried."""


@dataclass(frozen=True)
class Exact:
    """W ``(n, n)`` of stored numbers, within ``doubt`` (2-norm) of what they define."""

    W: Array
    doubt: LD


@dataclass(frozen=True)
class State:
    """Points ``(B, n)`` within ``error (B,)`` (2-norm) of a network's exact ones; NaN where none was found."""

    value: Array
    error: Array


# What is stored


def codes(tensor: Any) -> Array:
    """scale · codes."""
    return exact(tensor.codes) * exact(tensor.scale)


def stored(recurrent: nn.Module) -> Exact:
    """The matrix that the stored numbers define; of float weights that which the layer forms in its own dtype."""
    match recurrent:
        case AssembledWeight() | AssembledRows():
            W = codes(recurrent.codes)
            return Exact(W, 2 * UNIT * norms(W.reshape(-1)))
        case StructuredWeight():
            A, K, m = codes(recurrent.A), _skew(recurrent.K), LD(float(recurrent.margin))
            W = (1 - m) * np.eye(len(K), dtype=LD) - A.T @ A + K
            size = norms(A.reshape(-1)) ** 2 + norms(K.reshape(-1)) + (1 + abs(m)) * len(K)
            return Exact(W, (len(A) + 8) * UNIT * size)
        case CompensatedWeight():
            off, diagonal = codes(recurrent.off_diagonal), codes(recurrent.diagonal)
            n = len(diagonal)
            W = np.diag(diagonal)
            W[~np.eye(n, dtype=bool)] = off.reshape(-1)
            return Exact(W, 2 * UNIT * norms(W.reshape(-1)))
        case CayleyWeight():
            C, alpha = codes(recurrent.C), LD(float(recurrent.alpha))
            eye = np.eye(len(C), dtype=LD)
            back = inverse(eye + C)
            W = eye - (eye - C) @ back / alpha
            spread = norms(back.reshape(-1))
            size = norms((eye + C).reshape(-1)) * spread
            return Exact(W, 16 * len(C) * UNIT * (size * (1 + size) * spread / alpha + norms(W.reshape(-1)) + 1))
        case StructuredRows():
            T, eta, gamma = codes(recurrent.T), exact(recurrent.eta), LD(float(recurrent.gamma))
            sums = np.abs(T).sum(1)
            W = T * (eta[:, None] / eta[None, :]) + np.diag(gamma - sums)
            return Exact(W, (len(T) + 8) * UNIT * (norms(W.reshape(-1)) + 2 * norms(sums) + abs(gamma) * len(T)))
    with torch.no_grad():
        return Exact(exact(recurrent()), LD(0))


def _skew(skew: Any) -> Array:
    K = np.zeros((skew.size, skew.size), dtype=LD)
    K[np.triu_indices(skew.size, 1)] = codes(skew.upper)
    return K - K.T


def affine(linear: nn.Module) -> tuple[Array, Array]:
    """(U, b) as stored."""
    assert isinstance(linear, (nn.Linear, QuantizedLinear))
    weight, bias = (
        codes(part) if hasattr(part, "codes") else None if part is None else exact(part)
        for part in (linear.weight, linear.bias)
    )
    assert weight is not None
    return weight, np.zeros(len(weight), dtype=LD) if bias is None else bias


# Activations, written from their definitions


def activate(activation: Any, v: Array) -> Array:
    """σ(v)."""
    match activation:
        case eq.ReLU():
            return np.maximum(v, 0)
        case eq.LeakyReLU(slope=a):
            return np.where(v >= 0, v, LD(a) * v)
        case eq.Tanh():
            return np.tanh(v)
        case eq.Sigmoid():
            return np.where(v >= 0, 1 / (1 + np.exp(-np.abs(v))), np.exp(-np.abs(v)) / (1 + np.exp(-np.abs(v))))
        case eq.Softplus():
            return np.maximum(v, 0) + np.log1p(np.exp(-np.abs(v)))
        case eq.ELU(scale=s):
            return np.where(v > 0, v, LD(s) * np.expm1(np.minimum(v, 0)))
        case eq.Hardtanh(low=low, high=high):
            return np.clip(v, LD(low), LD(high))
        case eq.SoftThreshold(threshold=t):
            return np.sign(v) * np.maximum(np.abs(v) - LD(t), 0)
    raise AssertionError(activation)


def slope(activation: Any, v: Array) -> Array:
    """σ'(v), either one at a kink."""
    match activation:
        case eq.ReLU():
            return (v > 0).astype(LD)
        case eq.LeakyReLU(slope=a):
            return np.where(v > 0, LD(1), LD(a))
        case eq.Tanh():
            return 1 - np.tanh(v) ** 2
        case eq.Sigmoid():
            s = activate(activation, v)
            return s * (1 - s)
        case eq.Softplus():
            return activate(eq.Sigmoid(), v)
        case eq.ELU(scale=s):
            return np.where(v > 0, LD(1), LD(s) * np.exp(np.minimum(v, 0)))
        case eq.Hardtanh(low=low, high=high):
            return ((v > LD(low)) & (v < LD(high))).astype(LD)
        case eq.SoftThreshold(threshold=t):
            return (np.abs(v) > LD(t)).astype(LD)
    raise AssertionError(activation)


def prox(activation: Any, v: Array, alpha: LD) -> Array | None:
    """prox_{αf}(v) where it has a closed form, else None."""
    match activation:
        case eq.ReLU() | eq.Hardtanh():
            return activate(activation, v)
        case eq.LeakyReLU(slope=a):
            return np.where(v >= 0, v, LD(a) / (LD(a) + alpha * (1 - LD(a))) * v)
        case eq.SoftThreshold(threshold=t):
            return np.sign(v) * np.maximum(np.abs(v) - alpha * LD(t), 0)
    return activate(activation, v) if alpha == 1 else None


def _pieces(activation: Any) -> list[tuple[float, float]] | None:
    """(slope, offset) of each linear piece."""
    match activation:
        case eq.ReLU():
            return [(0.0, 0.0), (1.0, 0.0)]
        case eq.LeakyReLU(slope=a):
            return [(a, 0.0), (1.0, 0.0)]
        case eq.Hardtanh(low=low, high=high):
            return [(0.0, low), (1.0, 0.0), (0.0, high)]
        case eq.SoftThreshold(threshold=t):
            return [(1.0, t), (0.0, 0.0), (1.0, -t)]
    return None


# Equilibria


def equilibria(known: Exact, q: State, activation: Any, starts: tuple[Array, ...] = ()) -> State:
    """z = σ(W z + q) for every row of q."""
    W = known.W
    best = np.zeros_like(q.value)
    residual = np.full(len(best), np.inf, dtype=LD)
    for start in (*starts, activate(activation, q.value), best):
        rows = ~_settled(W, q.value, best, residual)
        if rows.any():
            z, r = _newton(W, q.value[rows], activation, np.array(start[rows], dtype=LD))
            better = r < residual[rows]
            at = rows.nonzero()[0][better]
            best[at], residual[at] = z[better], r[better]
    pieces = _pieces(activation)
    rows = ~_settled(W, q.value, best, residual)
    if rows.any() and pieces is not None and len(pieces) ** len(W) <= COMBINATIONS:
        z, r = _tried(W, q.value[rows], activation, pieces)
        better = r < residual[rows]
        at = rows.nonzero()[0][better]
        best[at], residual[at] = z[better], r[better]
    found = _settled(W, q.value, best, residual)
    gain = _gain(W, q.value, activation, best)
    size = norms(best)
    error = 8 * gain * (residual + _rounding(W, q.value, best) + q.error + known.doubt * size)
    best[~found] = np.nan
    return State(best, np.where(found, error, np.nan))


def _rounding(W: Array, q: Array, z: Array) -> Array:
    return (len(W) + 8) * UNIT * (norms(np.abs(z) @ np.abs(W).T + np.abs(q)) + norms(z) + LD(2.0) ** -16000)


def _settled(W: Array, q: Array, z: Array, residual: Array) -> Array:
    return residual <= 64 * _rounding(W, q, z)


def _newton(W: Array, q: Array, activation: Any, z: Array) -> tuple[Array, Array]:
    """(z, ‖z − σ(W z + q)‖) after Newton steps, halved where they do not help; the best point seen."""
    eye = np.eye(len(W), dtype=LD)

    def gap(z: Array) -> Array:
        return z - activate(activation, z @ W.T + q)

    z = np.where(np.isfinite(z), z, 0)
    r = gap(z)
    best, least = z.copy(), norms(r)
    length = np.ones((len(z), 1), dtype=LD)
    for turn in range(25):
        D = slope(activation, z @ W.T + q)
        step = solve(eye - D[:, :, None] * W, r[:, :, None])[:, :, 0]
        if turn >= 10:  # a cycle between pieces: shorter steps leave it
            length = LD(0.5) + LD(0.5) * (turn % 2)
        z = z - length * np.where(np.isfinite(step), step, 0)
        r = gap(z)
        size = norms(r)
        better = size < least
        best[better], least[better] = z[better], size[better]
        if bool((least <= 4 * _rounding(W, q, best)).all()):
            break
    return best, least


def _tried(W: Array, q: Array, activation: Any, pieces: list[tuple[float, float]]) -> tuple[Array, Array]:
    n = len(W)
    table = np.array(pieces, dtype=LD)[np.array(list(itertools.product(range(len(pieces)), repeat=n)))]
    systems = np.eye(n, dtype=LD) - table[:, :, :1] * W
    backs = solve(systems, np.broadcast_to(np.eye(n, dtype=LD), systems.shape))
    right = table[:, None, :, 0] * q + table[:, None, :, 1]  # (combinations, B, n)
    z = np.einsum("cij,cbj->cbi", backs, right)
    residual = norms(z - activate(activation, z @ W.T + q))
    at = np.where(np.isfinite(residual), residual, np.inf).argmin(0)
    batch = np.arange(len(q))
    return z[at, batch], residual[at, batch]


def _gain(W: Array, q: Array, activation: Any, z: Array) -> Array:
    """‖(I − D W)⁻¹‖_F at each z: what a residual can have moved it by."""
    D = slope(activation, z @ W.T + q)
    systems = np.eye(len(W), dtype=LD) - D[:, :, None] * W
    backs = solve(systems, np.broadcast_to(np.eye(len(W), dtype=LD), systems.shape))
    return norms(backs.reshape(len(z), -1)) if len(W) else np.ones(len(z), dtype=LD)


# Whole chains

PLAIN = {
    nn.ReLU: eq.ReLU(), nn.Tanh: eq.Tanh(), nn.Sigmoid: eq.Sigmoid(), nn.Hardtanh: eq.Hardtanh(),
    nn.Softplus: eq.Softplus(),
}  # fmt: skip
"""Activations between layers. torch's Softplus is the identity above 20, where it is 2e-9 too small."""


def run(model: nn.Module, x: Array, starts: dict[int, Array] | None = None) -> list[State]:
    """The exact state after every module of a chain (a layer is a chain of one) at inputs ``x (B, d)``.

    ``starts``: by the module's place, points near its equilibria, if any are known.
    """
    states: list[State] = []
    state = State(x, np.zeros(len(x), dtype=LD))
    modules = list(model) if isinstance(model, nn.Sequential) else [model]
    for place, module in enumerate(modules):
        if isinstance(module, EquilibriumLayer):
            known = (starts or {}).get(place)
            q = through(module.injection, state)
            state = equilibria(stored(module.recurrent), q, module.activation, () if known is None else (known,))
        elif isinstance(module, (nn.Linear, QuantizedLinear)):
            state = through(module, state)
        elif type(module) in PLAIN:
            value = activate(PLAIN[type(module)], state.value)
            value = np.where((state.value > 20) & isinstance(module, nn.Softplus), state.value, value)
            state = State(value, state.error + 8 * UNIT * norms(value))
        states.append(state)
    return states


def through(linear: nn.Module, state: State) -> State:
    """W x + b."""
    U, b = affine(linear)
    size = norms(np.abs(state.value) @ np.abs(U).T + np.abs(b))
    reach = norms(U.reshape(-1))
    return State(state.value @ U.T + b, reach * state.error + (U.shape[1] + 8) * UNIT * size)
