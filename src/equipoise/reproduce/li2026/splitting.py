"""Experiment 2: forward–backward, Peaceman–Rachford and Douglas–Rachford with float, 8-bit and 6-bit weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...certificates.convergence import solver_rate
from ...certificates.wellposed import fresh_operator
from ...layers import MonDEQ
from ...quantization.schemes import Assembled
from ...quantize import quantize
from ...solvers import DouglasRachford, ForwardBackward, PeacemanRachford, Solver
from .convergence import SAMPLES
from .measure import CAP, TOLERANCE, problem, residuals, rule_step
from .subject import Bench

__all__ = ["WEIGHTS", "Curve", "Splitting", "measure"]

WEIGHTS: tuple[int | None, ...] = (None, 8, 6)
"""Bits of W; None leaves it in floats."""
SHOWN, FLOOR = 300, 1e-10
"""The paper's figure ends after so many steps; its solves at this residual."""


@dataclass(frozen=True)
class Curve:
    """One solver on one set of weights. ``steps``: to a residual of 1e-5 with the published α, ``own_steps`` with
    the step that the solver chooses itself; ``rate``: proved factor with the published α."""

    solver: str
    bits: int | None
    alpha: float
    rate: float | None
    steps: int | None
    own_alpha: float
    own_steps: int | None
    residuals: tuple[float, ...]


@dataclass(frozen=True)
class Splitting:
    """All curves; ``disagreement``: the largest relative distance between two solvers' answers on the same weights."""

    samples: int
    curves: tuple[Curve, ...]
    disagreement: float


def measure(bench: Bench) -> Splitting:
    """Residuals of each solver on each set of weights; weights whose margin is not proved are left out."""
    samples = min(SAMPLES, len(bench.data.test))
    x = bench.data.test.x[:samples].double()
    curves: list[Curve] = []
    apart = 0.0
    for bits in WEIGHTS:
        layer = bench.layer if bits is None else quantize(bench.wide, Assembled(bits))[0]  # type: ignore[index]
        assert isinstance(layer, MonDEQ)
        if fresh_operator(layer).margin() <= 0:
            continue
        rule = rule_step(layer.weight)
        makers = (
            ("FB", ForwardBackward, rule.alpha),
            ("DR", DouglasRachford, 1 / rule.lipschitz),
            ("PR", PeacemanRachford, 1 / rule.lipschitz),
        )
        curves += [_curve(name, bits, kind(alpha=alpha), kind(), layer, x) for name, kind, alpha in makers]
        answers = [layer.solve(x, solver=kind(), tol=1e-10).value for _, kind, _ in makers]
        apart = max([apart, *(float((a - b).norm() / b.norm()) for a in answers for b in answers)])
    return Splitting(samples, tuple(curves), apart)


def _curve(name: str, bits: int | None, published: Solver, own: Solver, layer: MonDEQ, x: torch.Tensor) -> Curve:
    of = problem(layer, x)
    seen = residuals(published, of, CAP, TOLERANCE / 1e5)
    chosen = own.tune(layer.operator).alpha
    return Curve(
        solver=name,
        bits=bits,
        alpha=published.alpha or 0.0,
        rate=solver_rate(published, fresh_operator(layer))[1],
        steps=_reached(seen),
        own_alpha=chosen,
        own_steps=_reached(residuals(own, of, CAP, TOLERANCE)),
        residuals=tuple(float(f"{value:.6g}") for value in seen[:SHOWN]),
    )


def _reached(curve: list[float]) -> int | None:
    """The first step with a residual below 1e-5, counted from 1."""
    return next((step for step, value in enumerate(curve, start=1) if value < TOLERANCE), None)
