"""What several experiments measure: iterates under a fixed step, and the rule that the paper stops by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...layers import MonDEQ
from ...solvers import Problem, Solver, State

__all__ = ["CAP", "TOLERANCE", "Published", "iterates", "problem", "residuals", "rule_step", "settle"]

TOLERANCE, CAP = 1e-5, 2000
"""The published rule: stop when ‖z⁺ − z‖_F < 1e-5 ‖z‖_F over the batch, or after 2000 steps."""

FALLBACK = 0.01
"""Its step where the margin is not positive."""


class Published(NamedTuple):
    """The published rule's step, and the constants that it comes from (estimates, not bounds)."""

    alpha: float
    margin: float
    lipschitz: float


def rule_step(weight: Tensor) -> Published:
    """α = m̃/L̃² where m̃ > 0, else 0.01, with m̃ = λ_min(sym(I − W̃)) and L̃ = ‖I − W̃‖₂ of ``weight (n, n)``."""
    forward = torch.eye(len(weight), dtype=torch.float64) - weight.detach().double()
    margin = float(torch.linalg.eigvalsh((forward + forward.mT) / 2)[0])
    lipschitz = float(torch.linalg.matrix_norm(forward, 2))
    return Published(margin / lipschitz**2 if margin > 0 else FALLBACK, margin, lipschitz)


@torch.no_grad()
def problem(layer: MonDEQ, x: Tensor) -> Problem:
    """The equilibrium problems of ``layer`` for inputs ``x (B, d)``, in the layer's dtype."""
    return Problem(layer.operator, layer.injection(x.to(layer.bias.dtype)), layer.activation)


@torch.no_grad()
def iterates(solver: Solver, of: Problem, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(u before, u after, z after) of each step from 0, in the solver's own variable u; the tensors are reused."""
    fixed_point = solver.map(of, solver.tune(of.operator))
    state: State = solver.init(fixed_point)
    for step in range(steps):
        if step:
            state = solver.step(fixed_point, state)
        yield state.current, state.image, fixed_point.point(state.image)


def residuals(solver: Solver, of: Problem, steps: int, tol: float = 0.0) -> list[float]:
    """‖u⁺ − u‖_F/‖u‖_F over the batch after each step, until below ``tol`` or no longer finite."""
    found: list[float] = []
    for before, after, _ in iterates(solver, of, steps):
        residual = float((after - before).norm() / (before.norm() + 1e-12))
        if not math.isfinite(residual):
            break
        found.append(residual)
        if residual < tol:
            break
    return found


class Settled(NamedTuple):
    """Per sample ``(B,)``: the step at which it settled (0: never), whether it grew without bound, and z ``(B, n)``."""

    step: Tensor
    grew: Tensor
    value: Tensor


GROWN = 1e6
"""A sample whose iterate is this many times as long as its injection q, or overflowed, is said to grow."""


def settle(solver: Solver, of: Problem, steps: int, tol: float = TOLERANCE) -> Settled:
    """Iterate until every sample by itself has moved by less than ``tol`` of its length in one step, or grew."""
    rows = len(of.injection)
    at, grew = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.bool)
    limit = GROWN * torch.linalg.vector_norm(of.injection, dim=1)
    value = torch.zeros_like(of.injection)
    for step, (before, after, z) in enumerate(iterates(solver, of, steps), start=1):
        size = torch.linalg.vector_norm(after, dim=1)
        move = torch.linalg.vector_norm(after - before, dim=1) / (torch.linalg.vector_norm(before, dim=1) + 1e-12)
        grew |= ~(size <= limit)
        at = torch.where((at == 0) & (move < tol) & ~grew, step, at)
        value = z
        if bool(((at > 0) | grew).all()):
            break
    return Settled(at, grew, value)
