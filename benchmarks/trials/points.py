"""What is said of inputs: solutions of every solver, displacement, classes, sensitivity, radii, boxes, iterates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise.certificates.wellposed import euclidean_lipschitz, fresh_operator
from equipoise.errors import EquipoiseError
from equipoise.norms import WeightedMax
from equipoise.solvers import Problem

from .constants import weights
from .equilibria import PLAIN, State, affine, prox, run, slope, stored, through
from .ledger import Ledger
from .wide import LD, UNIT, Array, exact, norms, solve

__all__ = ["boxes", "displacements", "iterates", "radii", "sensitivity", "solutions"]

SOLVERS = (
    "PeacemanRachford", "DouglasRachford", "ForwardBackward", "Picard", "Tseng", "Anderson", "Broyden", "Rounded",
)  # fmt: skip


def solutions(layer: Any, x: Tensor, z: State, patience: int, rng: np.random.Generator, ledger: Ledger) -> None:
    """error_bound of whatever solver, however early it was stopped."""
    for name in rng.choice(SOLVERS, 2, replace=False):
        steps = int(rng.choice([1, 2, 3, 5, 10, 40])) if rng.random() < 0.5 else patience
        if (
            patience >= 400
            and name not in ("Anderson", "Broyden")
            and layer.operator.margin() > 1e-3 * layer.operator.lipschitz()
        ):
            steps = None  # what float32 cannot resolve is finished in float64
        solver = _solver(str(name), steps, rng)
        if isinstance(layer, eq.NEMON) and name in ("Tseng", "Broyden") and rng.random() < 0.5:
            continue
        tol = float(10 ** rng.uniform(-9, -2))
        try:
            found = layer.solve(x, solver, tol=tol, stop=str(rng.choice(["bound", "residual"])))
        except EquipoiseError:  # a step too long for these weights, no inverse: refused
            continue
        away = exact(found.value) - z.value
        rows = isinstance(layer.operator.family, WeightedMax)
        truth = np.abs(away).max(1) if rows else norms(away)
        family = "linf" if rows else "l2"
        ledger.most(f"error bound {name} {family}", exact(found.error_bound), truth, z.error)


def _solver(name: str, steps: int | None, rng: np.random.Generator) -> Any:
    if name == "Rounded":
        on = (eq.ForwardBackward(), eq.PeacemanRachford(), eq.DouglasRachford())[rng.integers(3)]
        decay = None if rng.random() < 0.5 else float(rng.uniform(0.5, 0.99))
        return eq.Rounded(on, grid=float(10 ** rng.uniform(-8, 0)), decay=decay, max_steps=steps or 300)
    if name in ("Anderson", "Broyden"):
        return getattr(eq, name)(max_steps=steps)
    return getattr(eq, name)(max_steps=steps)


# Two networks


def displacements(
    model: nn.Module,
    reference: nn.Module,
    certificate: Any,
    at: list[int],
    ours: list[State],
    theirs: list[State],
    ledger: Ledger,
) -> None:
    """T3 layer by layer, C3, and classes. ``at``: the places of equilibrium layers in the chain."""
    parts = certificate.layers or (certificate,)
    for place, part in zip(at, parts, strict=True):
        q, r = ours[place], theirs[place]
        slack = q.error + r.error
        truth = norms(q.value - r.value)
        ledger.most("displacement", _column(part.displacement), truth, slack)
        if part.actual_displacement is not None:
            error = np.abs(exact(part.actual_displacement) - truth)
            ledger.most("actual displacement's error", exact(part.actual_error), error, slack)
        if part.relative_bound is not None:
            eta = weights(fresh_operator(_at(reference, place)).family)
            length, size = (
                (norms(t) if eta is None else (np.abs(t) / eta).max(1)) for t in (q.value - r.value, r.value)
            )
            spread = LD(1) if eta is None else 1 / eta.min()
            known = size > 1e9 * r.error * spread
            ledger.most(
                "relative bound",
                np.where(known, LD(part.relative_bound), np.inf),
                length / np.where(known, size, 1),
                np.where(known, slack * spread / np.where(known, size, 1) * (1 + length / np.where(known, size, 1)), 0),
            )
    if certificate.unproved is not None:
        proved = np.ones(len(ours[-1].value), bool)
        proved[certificate.unproved.numpy()] = False
        scores, others = ours[-1], theirs[-1]
        told = proved & np.isfinite(scores.value).all(1) & np.isfinite(others.value).all(1)
        ledger.holds("class unchanged", told, scores.value.argmax(1) == others.value.argmax(1))
        ledger.holds("agreement", True, abs(certificate.agreement - proved.mean()) < 1e-12)


def _column(values: Tensor | None) -> Array | None:
    return None if values is None else exact(values)


def _at(model: nn.Module, place: int) -> Any:
    return model[place] if isinstance(model, nn.Sequential) else model


# Inputs


def _gradient(model: nn.Module, states: list[State], x: Array) -> Array:
    """The Jacobian ``(B, k, d)`` of the chain at x, on the pieces that x is on."""
    J = np.broadcast_to(np.eye(x.shape[1], dtype=LD), (len(x), x.shape[1], x.shape[1]))
    before = State(x, np.zeros(len(x), LD))
    for place, module in enumerate(list(model) if isinstance(model, nn.Sequential) else [model]):
        if hasattr(module, "recurrent"):
            W = stored(module.recurrent).W
            q = through(module.injection, before)
            D = slope(module.activation, states[place].value @ W.T + q.value)[:, :, None]
            J = solve(np.eye(len(W), dtype=LD) - D * W, D * (affine(module.injection)[0] @ J))
        elif hasattr(module, "weight"):
            J = affine(module)[0] @ J
        elif not isinstance(module, nn.Identity):
            J = slope(PLAIN[type(module)], before.value)[:, :, None] * J
        before = states[place]
    return J


def _near(model: nn.Module, x: Array, states: list[State]) -> list[State]:
    """The states at other inputs, found from those at the first."""
    return run(model, x, {place: state.value for place, state in enumerate(states)})


def sensitivity(model: nn.Module, x: Array, states: list[State], rng: np.random.Generator, ledger: Ledger) -> None:
    """Lipschitz constants of the whole model in both norms, and how far single entries of its state can move."""
    l2, linf = euclidean_lipschitz(model), eq.input_lipschitz(model, "linf")
    if l2 is None and linf is None:
        return
    J = _gradient(model, states, x)
    J = np.where(np.isfinite(J), J, 0)
    scale = np.abs(J).max((1, 2), keepdims=True)
    _, _, right = np.linalg.svd((J / np.where(scale > 0, scale, 1)).astype(float))
    worst = np.abs(J).sum(2).argmax(1)
    signs = np.where(J[np.arange(len(J)), worst] >= 0, LD(1), LD(-1))
    size = np.where((top := np.abs(x).max(1, keepdims=True)) > 0, top, 1)
    for direction in (right[:, 0].astype(LD), signs):
        reach = size * LD(10) ** rng.uniform(-9, 0, (len(x), 1))
        other = x + reach * direction
        moved = _near(model, other, states)[-1]
        dx, dz = other - x, moved.value - states[-1].value
        error = moved.error + states[-1].error + UNIT * 8 * norms(states[-1].value)
        if l2 is not None:
            ledger.most("euclidean lipschitz", l2, norms(dz) / norms(dx), error / norms(dx))
        if linf is not None:
            far = np.abs(dx).max(1)
            ledger.most("input lipschitz linf", linf, np.abs(dz).max(1) / far, error / far)
    default = eq.input_lipschitz(model)
    ledger.holds("input lipschitz default", default is not None, default in (l2, linf))


def radii(model: nn.Module, x: Tensor, states: list[State], rng: np.random.Generator, ledger: Ledger) -> None:
    """No input nearer than the certified radius gets another class: tried along the steepest ways to each class."""
    for norm in ("linf", "l2"):
        try:
            radius = exact(eq.certified_radius(model, x, norm=norm))
        except EquipoiseError:
            continue
        wide = exact(x)
        scores = states[-1].value
        top = scores.argmax(1)
        J = _gradient(model, states, wide)
        rows = np.arange(len(wide))
        known = np.isfinite(radius) & (radius > 0) & np.isfinite(J).all((1, 2))
        if not known.any():
            continue
        for other in range(scores.shape[1]):
            steepest = J[rows, other] - J[rows, top]
            length = norms(steepest)[:, None]
            way = np.sign(steepest) if norm == "linf" else steepest / np.where(length > 0, length, 1)
            moved = _near(model, wide + np.where(known, radius, 0)[:, None] * way, states)[-1]
            gap = moved.value[rows, top] - moved.value[rows, other]
            start = scores[rows, top] - scores[rows, other]
            usable = known & (top != other) & (start > 0)
            safe = np.where(usable, start, 1)
            # how much of the gap the radius ate, at most all of it
            eaten = np.where(usable, (start - gap) / safe, np.nan)
            slack = 4 * (moved.error + states[-1].error) / safe
            ledger.most(f"radius {norm}", np.where(usable, LD(1), np.inf), eaten, np.where(usable, slack, 0))


def boxes(model: nn.Module, x: Tensor, states: list[State], rng: np.random.Generator, ledger: Ledger) -> None:
    """Outputs of a box stay in its enclosure, and its proved class: at corners, on the steepest ways, anywhere."""
    x = x[: len(x) // 2]
    size = x.double().abs().amax(1, keepdim=True).clamp_min(1e-3)
    eps = size * torch.tensor(10 ** rng.uniform(-6, 0, (len(x), 1)))
    low, high = x.double() - eps, x.double() + eps
    flat = torch.tensor(rng.random(x.shape) < 0.2)
    low, high = torch.where(flat, x.double(), low), torch.where(flat, x.double(), high)
    try:
        box = eq.interval(model, low, high)
        classes = eq.certified_classes(model, low, high).numpy() if isinstance(model, nn.Sequential) else None
    except EquipoiseError:
        return
    bottom, top = exact(box.low), exact(box.high)
    center, radius = exact(low) / 2 + exact(high) / 2, exact(high) / 2 - exact(low) / 2
    part = [State(s.value[: len(x)], s.error[: len(x)]) for s in states]
    J = _gradient(model, part, exact(x))
    k = int(rng.integers(J.shape[1]))
    for way in (np.sign(J[:, k]), -np.sign(J[:, k]), rng.choice([-1.0, 1.0], x.shape), rng.uniform(-1, 1, x.shape)):
        way = np.where(np.isfinite(way), way, 0)
        inside = np.clip(center + radius * way, exact(low), exact(high))
        found = _near(model, inside, part)[-1]
        error = np.broadcast_to(found.error[:, None], found.value.shape)
        # by the width of the box, in which a truth reaches from −1/2 to 1/2
        width = top - bottom
        middle = bottom / 2 + top / 2
        off = np.abs(found.value - middle)
        ledger.most(
            "box",
            np.where(np.isfinite(width), width / 2 * (1 + 4 * UNIT), np.inf),
            off,
            error + 4 * UNIT * np.abs(middle),
        )
        if classes is not None:
            scores = found.value
            ledger.holds("class on a box", (classes >= 0) & np.isfinite(scores).all(1), scores.argmax(1) == classes)


# Iterates


def iterates(layer: Any, x: Tensor, q: State, z: State, rng: np.random.Generator, ledger: Ledger) -> None:
    """C2: rounded iterates in exact arithmetic, in the layer's, and what the layer returns after k steps."""
    if not isinstance(layer, eq.MonDEQ):
        return
    alpha = float(10 ** rng.uniform(-1.5, 0.3)) if rng.random() < 0.7 else None
    on = (eq.ForwardBackward(alpha), eq.PeacemanRachford(alpha), eq.DouglasRachford(alpha))[rng.integers(3)]
    decay = None if rng.random() < 0.5 else float(rng.uniform(0.3, 0.99))
    k = int(rng.choice([1, 2, 3, 7, 30, 120]))
    size = float(norms(z.value)[np.isfinite(z.error)].max(initial=0)) or 1.0
    if not 1e-30 < size < 1e30:
        return
    grid = size * float(10 ** rng.uniform(-7, -0.5))
    solver = eq.Rounded(on, grid=grid, decay=decay, max_steps=k)
    try:
        floor = eq.iterate_floor(layer, x, solver, steps=k)
        forever = eq.iterate_floor(layer, x, solver)
    except EquipoiseError:
        return
    name = type(on).__name__
    found = layer.solve(x, solver, tol=1e-300, stop="residual")
    taken = (found.steps == k).numpy()
    away = norms(exact(found.value) - z.value)
    ledger.most(f"iterate floor value {name}", np.where(taken, exact(floor.value), np.inf), away, z.error)
    used, known = LD(floor.alpha), stored(layer.recurrent)
    proper = prox(layer.activation, np.zeros(1, LD), used)
    if proper is None:
        return
    fixed = (
        z.value if isinstance(on, eq.ForwardBackward) else (1 - used) * z.value + used * (z.value @ known.W.T + q.value)
    )
    reach = (
        4
        * (1 + used * (1 + norms(known.W.reshape(-1))))
        * (z.error + q.error + 16 * UNIT * (norms(z.value) + norms(q.value)))
    )
    _machine(layer, solver, k, x, fixed, reach, floor, forever, ledger, name)
    if not hasattr(layer.recurrent, "C"):
        _grid(layer, on, known, used, q, fixed, reach, solver, k, floor, ledger, name)


def _machine(
    layer: Any,
    solver: Any,
    k: int,
    x: Tensor,
    fixed: Array,
    reach: Array,
    floor: Any,
    forever: Any,
    ledger: Ledger,
    name: str,
) -> None:
    """The layer's own arithmetic, step by step: uᵏ and zᵏ."""
    with torch.no_grad():
        problem = Problem(layer.operator, layer._inject(x), layer.activation)
        T = solver.map(problem, solver.tune(layer.operator))
        state = solver.init(T)
        for step in range(1, (k if k < 30 else 400) + 1):
            if step > 1:
                state = solver.step(T, state)
            if step == k:
                u = exact(state.image)
                ledger.most(f"iterate floor {name}", exact(floor.iterate), norms(u - fixed), reach)
        if step == 400:
            claimed = exact(forever.iterate)
            left = LD(floor.rate) ** 400 * norms(fixed) + (
                0
                if solver.decay is None
                else 400 * LD(max(floor.rate, solver.decay)) ** 399 * solver.grid * math.sqrt(fixed.shape[1])
            )
            ledger.most(f"iterate floor limit {name}", claimed, norms(exact(state.image) - fixed), reach + left)


def _grid(
    layer: Any, on: Any, known: Any, alpha: LD, q: State, fixed: Array, reach: Array, solver: Any, k: int, floor: Any,
    ledger: Ledger, name: str,
) -> None:  # fmt: skip
    """Exact steps, rounded to the grid: rᵏ ‖u*‖ + the part that the certificate calls ``exact``."""
    eye = np.eye(len(known.W), dtype=LD)
    back = solve(((1 + alpha) * eye - alpha * known.W)[None], eye[None])[0]
    C = 2 * back - eye
    theta = LD(0.5) if isinstance(on, eq.DouglasRachford) else LD(1)
    u = np.zeros_like(fixed)
    start = norms(fixed)
    for step in range(k):
        delta = LD(solver.grid) * (LD(1) if solver.decay is None else LD(solver.decay) ** step)
        if isinstance(on, eq.ForwardBackward):
            image = prox(layer.activation, (1 - alpha) * u + alpha * (u @ known.W.T + q.value), alpha)
        else:
            reflected = 2 * prox(layer.activation, u, alpha) - u
            image = (1 - theta) * u + theta * (reflected @ C.T + alpha * (q.value + q.value @ C.T))
        u = np.round(image / delta) * delta
    spread = norms(back.reshape(-1)) * (1 + alpha) * (1 + norms(known.W.reshape(-1)))
    rounding = (k + 1) * 64 * len(eye) * UNIT * spread * spread * (norms(q.value) * (1 + alpha) + start + solver.grid)
    ledger.most(
        f"iterate floor exact {name}", LD(floor.rate) ** k * start + LD(floor.exact), norms(u - fixed), reach + rounding
    )
