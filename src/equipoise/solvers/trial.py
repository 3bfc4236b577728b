"""A trial run of a solver: how its residual relates to the error on this operator, and how fast it shrinks.

The formulas behind ``Tuning.gain`` multiply worst cases and are about ten times too careful in practice, which
would cost a dozen steps a solve. A few random injections, the same for every batch, tell what the factor is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import Activation
from ..operators import MonotoneOperator
from .loop import Solver, Tuning
from .posterior import a_posteriori
from .problem import Problem
from .rounded import Rounded

__all__ = ["tuned"]

PROBES = 16
SETTLED = 1e-4
"""The trial stops at this relative movement: far from the start, and far above float32's rounding."""

MAX_TRIAL = 300


@torch.no_grad()
def tuned(solver: Solver, operator: MonotoneOperator, activation: Activation, like: Tensor) -> Tuning:
    """The solver's tuning for this operator, its gain and pace corrected by a trial run.

    ``like`` gives dtype and device. Without a proved margin there is no error to compare with, and no trial.
    """
    if isinstance(solver, Rounded):  # its grid would hide how the splitting moves
        return solver.slowed(tuned(solver.on, operator, activation, like))
    tuning = solver.tune(operator)
    if tuning.gain is None:
        return tuning
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(PROBES, operator.features, generator=generator, dtype=torch.float64).to(like)
    problem = Problem(operator, q, activation)
    fixed_point = solver.map(problem, tuning)
    state = solver.init(fixed_point)
    moves = [_move(state.image - state.current)]
    while len(moves) < MAX_TRIAL:
        state = solver.step(fixed_point, state)
        moves.append(_move(state.image - state.current))
        if not bool((moves[-1] > SETTLED * _move(state.image)).any()):
            break
    found = a_posteriori(problem, fixed_point.point(state.image))
    usable = torch.isfinite(moves[-1]) & (moves[-1] > 0) & (found.size > 0) & (moves[0] > 0)
    if not bool(usable.any()) or len(moves) < 3:
        return tuning
    scale = found.spread[usable] if isinstance(found.spread, Tensor) else found.spread  # moves are 2-norms
    first, last, size = (t[usable] for t in (moves[0], moves[-1], found.size * found.spread))
    ratios = found.truncation[usable] * scale / last
    gain = min(float(ratios.median()), tuning.gain)
    pace = float((last / first).pow(1 / (len(moves) - 1)).median())
    if not (gain > 0 and 0 < pace < 1):
        return tuning
    if isinstance(found.spread, Tensor):  # bounds by rows are of the worst row, far above what is typical
        gain = min(gain, 1 / (1 - pace))
    keen = min(float(ratios.min()) / 2, gain)
    return tuning._replace(
        gain=gain, keen=keen if keen > 0 else None, pace=pace, lead=max(float((gain * first / size).median()), 1e-3)
    )


def _move(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, dim=1).double()
