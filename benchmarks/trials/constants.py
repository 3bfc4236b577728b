"""What certificates say of the weights alone: margins, norms, condition, changes, rates, steps."""

from __future__ import annotations

from typing import Any

import numpy as np

import equipoise as eq
from equipoise.certificates.convergence import closed_rates
from equipoise.certificates.wellposed import fresh_operator
from equipoise.norms import WeightedMax

from .equilibria import Exact, activate, codes, prox, stored
from .ledger import Ledger
from .wide import LD, UNIT, Array, exact, inverse, largest, norms, rayleigh

__all__ = ["changes", "constants", "rates", "rates_of"]

SPLITTINGS = eq.PeacemanRachford, eq.DouglasRachford

STEPS = 150
"""Iterations are followed for at most so many steps."""


def weights(family: Any) -> Array | None:
    """η of a weighted maximum norm, None of the 2-norm."""
    return exact(family.eta) if isinstance(family, WeightedMax) else None


def norm_of(A: Array, eta: Array | None) -> tuple[LD, LD]:
    """(what ‖A‖ surely reaches, slack) in the 2-norm or ‖·‖_η."""
    if eta is None:
        return largest(A)
    rows = (np.abs(A) * eta).sum(1) / eta
    return rows.max(), (len(A) + 8) * UNIT * rows.max()


def margin_of(W: Array, eta: Array | None) -> tuple[LD, LD]:
    """(what 1 − μ(W) surely does not exceed, slack)."""
    if eta is None:
        F = np.eye(len(W), dtype=LD) - W
        value, slack = rayleigh((F + F.T) / 2)
        return value, slack + 2 * UNIT * (norms(W.reshape(-1)) + len(W))
    off = np.abs(W) * eta
    np.fill_diagonal(off, 0)
    rows = off.sum(1) / eta
    values = 1 - np.diagonal(W) - rows
    at = values.argmin()
    return values[at], (len(W) + 8) * UNIT * (1 + abs(W[at, at]) + rows[at])


def matrices(layer: Any) -> list[Exact]:
    """The matrix that is stored and the one multiplied by."""
    found = [stored(layer.recurrent)]
    applied = exact(layer.operator.weight)
    if not np.array_equal(applied, found[0].W):
        found.append(Exact(applied, LD(0)))
    return [known for known in found if np.isfinite(known.W).all() and np.isfinite(known.doubt)]


def doubt_in(known: Exact, eta: Array | None) -> LD:
    """How far in the norm the exact matrix may lie from ``known``."""
    return known.doubt if eta is None else known.doubt * norms(eta) / eta.min()


def constants(layer: Any, certificate: Any, ledger: Ledger) -> None:
    """Margin, Lipschitz constant and what is made of them, in the certificate's own norm."""
    operator = fresh_operator(layer)
    eta = weights(operator.family)
    tag = certificate.family
    for known in matrices(layer):
        doubt, eye = doubt_in(known, eta), np.eye(len(known.W), dtype=LD)
        m, m_slack = margin_of(known.W, eta)
        L, L_slack = norm_of(eye - known.W, eta)
        size, size_slack = norm_of(known.W, eta)
        m_slack, L_slack, size_slack = m_slack + doubt, L_slack + doubt, size_slack + doubt
        ledger.least(f"margin {tag}", certificate.margin, m, m_slack)
        ledger.least(f"margin() {tag}", eq.margin(layer), m, m_slack)
        if certificate.measure is not None:
            ledger.most(f"measure {tag}", certificate.measure, 1 - m, m_slack)
        ledger.most(f"lipschitz {tag}", certificate.lipschitz, L, L_slack)
        ledger.most(f"lipschitz() {tag}", eq.lipschitz(layer), L, L_slack)
        ledger.holds("certified", certificate.certified, m + m_slack > 0)
        if certificate.certified and m > 0:
            ledger.most(f"condition {tag}", certificate.condition, (L - L_slack) / (m + m_slack))
            ledger.most(f"weight condition {tag}", certificate.weight_condition, (size - size_slack) / (m + m_slack))
        if tag == "linf":
            rows = operator.row_margins()
            off = np.abs(known.W) * eta
            np.fill_diagonal(off, 0)
            truth = 1 - np.diagonal(known.W) - off.sum(1) / eta
            slack = (len(eta) + 8) * UNIT * (1 + np.abs(np.diagonal(known.W)) + off.sum(1) / eta) + doubt
            ledger.least("row margins", exact(rows), truth, slack)
            euclidean, e_slack = margin_of(known.W, None)
            ledger.least("euclidean margin", operator.euclidean_margin(), euclidean, e_slack + known.doubt)
    _of_cayley(layer, operator, ledger)
    if certificate.certified and tag == "l2":
        _closed(stored(layer.recurrent), certificate, ledger)


def _of_cayley(layer: Any, operator: Any, ledger: Ledger) -> None:
    """Margin and Lipschitz constant of stored Cayley codes, without their inverse: with x = (I + C) y,
    α F x = (I − C) y."""
    if operator.stored_cayley is None:
        return
    C, alpha = codes(layer.recurrent.C), LD(float(layer.recurrent.alpha))
    eye = np.eye(len(C), dtype=LD)
    plus, minus = eye + C, eye - C
    try:
        back = inverse(plus)
    except FloatingPointError:
        return
    F = minus @ back / alpha
    if not np.isfinite(F).all():
        return
    for matrix, least in (((F + F.T) / 2, True), (F.T @ F, False)):
        _, vectors = np.linalg.eigh(matrix.astype(float))
        y = back @ vectors[:, 0 if least else -1].astype(LD)
        y = y / np.abs(y).max()
        x, image = plus @ y, minus @ y / alpha
        if least:
            value, slack = (
                (x @ image) / (x @ x),
                16 * len(C) * UNIT * norms(image) / norms(x) * (1 + norms(plus.reshape(-1)) * norms(y) / norms(x)),
            )
            ledger.least("cayley margin", operator._margin_floor, value, slack)
        else:
            value = norms(image) / norms(x)
            slack = 16 * len(C) * UNIT * (1 + norms(minus.reshape(-1))) * norms(y) / norms(x) * (1 / alpha + value)
            ledger.most("cayley lipschitz", operator._lipschitz_ceiling, value, slack)


def _closed(known: Exact, certificate: Any, ledger: Ledger) -> None:
    """The closed bounds at the steps that they are for, made of the proved m and L."""
    m, L = LD(certificate.margin), LD(certificate.lipschitz)
    rates = closed_rates(certificate.margin, certificate.lipschitz)
    eye = np.eye(len(known.W), dtype=LD)
    for name, alpha in (("peaceman_rachford", 1 / L), ("douglas_rachford", 1 / L), ("forward_backward", m / L**2)):
        claimed = certificate.closed_rates[name]
        ledger.holds("closed rates as stated", claimed is not None, claimed == rates[name])
        if name == "forward_backward":
            value, slack = largest((1 - alpha) * eye + alpha * known.W)
            slack = slack + alpha * known.doubt
        else:
            C, c_slack = _cayley(known, alpha)
            value, slack = largest(C)
            value, slack = (value, slack + c_slack) if name[0] == "p" else ((1 + value) / 2, slack + c_slack)
        ledger.most(f"closed rate {name}", claimed, value, slack)


def _cayley(known: Exact, alpha: LD) -> tuple[Array, LD]:
    """(C_α, how far the exact one may lie from it)."""
    eye = np.eye(len(known.W), dtype=LD)
    system = (1 + alpha) * eye - alpha * known.W
    back = inverse(system)
    spread = norms(back.reshape(-1))
    size = norms(system.reshape(-1))
    return 2 * back - eye, 16 * len(eye) * UNIT * spread * spread * size * size + 4 * spread**2 * alpha * known.doubt


def changes(layer: Any, reference: Any, certificate: Any, ledger: Ledger) -> None:
    """‖ΔW‖ and T2."""
    here, there = stored(layer.recurrent), stored(reference.recurrent)
    if not (np.isfinite(here.W).all() and np.isfinite(here.doubt)):
        return  # codes that define no matrix
    delta = here.W - there.W
    rounding = UNIT * (norms(here.W.reshape(-1)) + norms(there.W.reshape(-1))) + here.doubt + there.doubt
    theirs = weights(fresh_operator(reference).family)
    ours = weights(fresh_operator(layer).family)
    eta = theirs if (ours is None) == (theirs is None) else ours  # the reference's, where both are of one kind
    value, slack = norm_of(delta, eta)
    slack = slack + (rounding if eta is None else rounding * norms(eta) / eta.min())
    ledger.most(f"delta norm {certificate.family}", certificate.delta_norm, value, slack)
    value, slack = norm_of(delta, theirs)
    m, m_slack = margin_of(there.W, theirs)
    slack = slack + m_slack + (rounding if theirs is None else rounding * norms(theirs) / theirs.min())
    ledger.holds("sufficient", certificate.sufficient or False, value - slack < m)
    if certificate.predeployment:
        own, own_slack = margin_of(here.W, None)
        ledger.holds("predeployment", True, own + own_slack + here.doubt > 0)
        ledger.holds("sufficient where predeployment", True, value - slack < m)


# Rates


def rates(layer: Any, certificate: Any, rng: np.random.Generator, ledger: Ledger) -> None:
    """:func:`rates_of` a layer on vectors."""
    operator = fresh_operator(layer)
    eta, alpha = weights(operator.family), certificate.alpha
    if eta is not None and isinstance(layer.solver, SPLITTINGS) and alpha is not None:
        eta = None if alpha > operator.averaging_step() else eta  # a longer step contracts in the 2-norm
    kept = operator.stored_cayley
    cayley = None if kept is None or kept[0] != alpha else codes(layer.recurrent.C)
    rates_of(layer.solver, layer.activation, stored(layer.recurrent), eta, certificate, rng, ledger, cayley)


def rates_of(
    solver: Any, activation: Any, known: Exact, eta: Array | None, certificate: Any, rng: np.random.Generator,
    ledger: Ledger, cayley: Array | None = None,
) -> None:  # fmt: skip
    """‖T u − T v‖ <= ρ ‖u − v‖ at pairs that stretch most, k steps of it, and steps with errors (C2).

    Tseng's map nears its fixed point and need not contract otherwise: there v is the equilibrium. ``cayley``: C_α where
    it is what is stored.
    """
    if certificate.rate is None or certificate.alpha is None:
        return
    alpha, n = LD(certificate.alpha), len(known.W)
    step = _map(solver, activation, known, alpha, cayley)
    if step is None:
        return
    apply, linear, doubt = step
    size = norms(linear.reshape(-1)) + 1
    directions = _directions(linear, eta, rng)

    def settle(u: Array, v: Array, q: Array) -> tuple[Array, Array, Array]:
        """(u, v, q) with the same difference, v the equilibrium at q and its argument of σ what q was."""
        if not isinstance(solver, eq.Tseng):
            return u, v, q
        z = activate(activation, q)
        return z + (u - v), z, q - z @ known.W.T

    def room(u: Array, v: Array, at: Array) -> Array:
        """What rounding one step can do to the distance of u and v."""
        return 32 * (n + 8) * UNIT * (norms(u) + norms(v) + norms(at)) * size * (1 + alpha) * spread

    far = 64 * size * (1 + 1 / alpha)  # where σ stays on one piece
    u, v, at = settle(*_pairs(directions, far, isinstance(solver, SPLITTINGS), rng))
    away = _length(u - v, eta)
    good = away > 0
    u, v, at, away = u[good], v[good], at[good], away[good]
    name = f"{type(solver).__name__} {'l2' if eta is None else 'linf'}"
    spread = LD(1) if eta is None else 1 / eta.min()
    rounding = room(u, v, at)
    slack = rounding + doubt * spread * away * (1 if eta is None else norms(eta))
    ledger.most(f"rate {name}", certificate.rate, _length(apply(u, at) - apply(v, at), eta) / away, slack / away)
    if certificate.steps is not None and certificate.steps <= STEPS and rng.random() < 0.5:
        for _ in range(certificate.steps):
            u, v = apply(u, at), apply(v, at)
            rounding = rounding + room(u, v, at)
        slack = rounding + certificate.steps * doubt * spread * away
        shrunk = _length(u - v, eta) / away / LD(certificate.tolerance)
        ledger.most(f"steps {name}", 1.0, shrunk, slack / away / LD(certificate.tolerance))
    if rng.random() < 0.5:
        error = directions / _length(directions, eta)[:, None]
        at = np.full(error.shape, 1e6, dtype=LD) * np.sign(rng.standard_normal((1, n)))
        u = v = np.full_like(error, 1e6) if rng.random() < 0.5 else rng.standard_normal(error.shape).astype(LD)
        drift, rounding = _drift(apply, room, settle(u, v, at), error, eta)
        ledger.most(f"inexact {name}", certificate.inexact, drift, rounding)


def _pairs(directions: Array, far: LD, splitting: bool, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """(u, v, q): points that differ by ``directions``, large and small, with q ``far`` off and near."""
    n = directions.shape[1]
    q = rng.standard_normal((4, n)).astype(LD)
    q[0], q[1] = far, -far
    base = rng.standard_normal((4, n)).astype(LD)
    base[0], base[2] = 16, 0
    signs = np.where(rng.random((len(directions), n)) < 0.5, LD(-1), LD(1))
    found = []
    for row in range(4):
        for sign in (np.ones_like(signs), signs):
            reach = LD(2.0) ** rng.integers(-12, 3, (len(directions), 1))
            start = base[row] * (sign if splitting else 1)
            u = np.broadcast_to(start, directions.shape)
            v = start + reach * directions * (sign if splitting else 1)
            found.append((u, v, np.broadcast_to(q[row], directions.shape)))
    u, v, at = (np.concatenate(column) for column in zip(*found, strict=True))
    return u, v, at


def _drift(
    apply: Any, room: Any, start: tuple[Array, Array, Array], error: Array, eta: Array | None
) -> tuple[Array, Array]:
    """Errors of size 1 in every step, in one direction or with the step's own: how far u drifts from the exact v."""
    u, v, at = start
    rounding = np.zeros(len(error), dtype=LD)
    for _ in range(60):
        u, v = apply(u, at), apply(v, at)
        rounding = rounding + room(u, v, at)
        moved = u - v
        length = _length(moved, eta)[:, None]
        u = u + np.where(length > 0, moved / np.where(length > 0, length, 1), error)
    return _length(u - v, eta), rounding


def _length(rows: Array, eta: Array | None) -> Array:
    return norms(rows) if eta is None else (np.abs(rows) / eta).max(-1)


def _directions(linear: Array, eta: Array | None, rng: np.random.Generator) -> Array:
    """Unit-sized directions that the linear part stretches most, and random ones."""
    n = len(linear)
    top = np.abs(linear).max()
    scaled = (linear / top if top > 0 else linear).astype(float)
    found = [np.linalg.svd(scaled)[2][0], *rng.standard_normal((2, n))]
    if eta is not None:
        found += [*(np.where(linear >= 0, 1.0, -1.0) * eta.astype(float))]
    rows = np.array(found, dtype=LD)
    return rows / np.abs(rows).max(1, keepdims=True)


def _map(solver: Any, activation: Any, known: Exact, alpha: LD, cayley: Array | None) -> tuple[Any, Array, LD] | None:
    """(T(u, q), the linear part that it stretches by, how far its linear part may be off); None without a closed
    prox."""
    W, eye = known.W, np.eye(len(known.W), dtype=LD)
    closed = prox(activation, np.zeros(1, LD), alpha) is not None

    def sigma(v: Array) -> Array:
        found = prox(activation, v, alpha)
        assert found is not None
        return found

    if isinstance(solver, eq.Picard):
        linear = (1 - alpha) * eye + alpha * W
        return lambda u, q: (1 - alpha) * u + alpha * activate(activation, u @ W.T + q), linear, alpha * known.doubt
    if not closed:
        return None
    if isinstance(solver, eq.ForwardBackward):
        linear = (1 - alpha) * eye + alpha * W
        return lambda u, q: sigma(u @ linear.T + alpha * q), linear, alpha * known.doubt
    if isinstance(solver, eq.Tseng):

        def tseng(u: Array, q: Array) -> Array:
            y = sigma((1 - alpha) * u + alpha * (u @ W.T + q))
            return y - alpha * ((y - u) - (y - u) @ W.T)

        F = alpha * (eye - W)
        return tseng, eye - F + F @ F, alpha * known.doubt * (2 + norms(F.reshape(-1)))
    C, doubt = _cayley(known, alpha) if cayley is None else (cayley, LD(0))
    theta = LD(0.5) if isinstance(solver, eq.DouglasRachford) else LD(1)
    return (
        lambda u, q: (1 - theta) * u + theta * ((2 * sigma(u) - u) @ C.T + q),
        (1 - theta) * eye + theta * C,
        theta * doubt,
    )
