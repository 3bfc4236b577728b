"""Experiment 5: iterates on a fixed and on an adaptive grid, against the proved floors of Corollary 2."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...certificates import iterate_floor
from ...certificates.wellposed import fresh_operator
from ...layers import MonDEQ
from ...quantization.schemes import Assembled
from ...quantize import quantize
from ...solvers import ForwardBackward, PeacemanRachford, Rounded, Solver
from .convergence import SAMPLES
from .measure import iterates, problem, rule_step
from .subject import Bench

__all__ = ["GRIDS", "Grids", "Track", "measure"]

BITS = 8
STEPS = {"PR": 200, "FB": 600}
"""The paper's figure shows 200 steps of Peaceman–Rachford; forward–backward needs more to get anywhere."""

GRIDS: tuple[tuple[float, float | None], ...] = ((0.1, None), (0.01, None), (0.001, None), (0.1, 0.9), (0.1, 0.5))
"""(δ₀, γ) as published; γ None is a fixed grid."""


@dataclass(frozen=True)
class Track:
    """One solver on one grid (``grid`` None: no rounding). ``distances``: ‖Z − Z*‖_F/‖Z*‖_F after each step.

    ``floor``: the proved bound of that in the limit, and at the last step for an adaptive grid. ``worst``: the
    largest distance of a sample at the last step, as a share of the bound proved for that sample.
    """

    solver: str
    grid: float | None
    decay: float | None
    alpha: float
    rate: float | None
    end: float
    floor: float | None
    worst: float | None
    distances: tuple[float, ...]


@dataclass(frozen=True)
class Grids:
    """All tracks on 8-bit weights; none where these have no proved margin."""

    samples: int
    bits: int
    tracks: tuple[Track, ...]


def measure(bench: Bench) -> Grids:
    """Follow Peaceman–Rachford and forward–backward on each grid to the equilibrium of the 8-bit network."""
    samples = min(SAMPLES, len(bench.data.test))
    x = bench.data.test.x[:samples].double()
    layer = quantize(bench.wide, Assembled(BITS))[0]  # type: ignore[index]
    assert isinstance(layer, MonDEQ)
    if fresh_operator(layer).margin() <= 0:
        return Grids(samples, BITS, ())
    rule, exact = rule_step(layer.weight), layer.solve(x, tol=1e-13).value
    makers = ("PR", PeacemanRachford(alpha=1 / rule.lipschitz)), ("FB", ForwardBackward(alpha=rule.alpha))
    tracks = []
    for name, solver in makers:
        tracks.append(_track(name, solver, None, None, layer, x, exact))
        tracks += [_track(name, solver, grid, decay, layer, x, exact) for grid, decay in GRIDS]
    return Grids(samples, BITS, tuple(tracks))


def _track(
    name: str, on: Solver, grid: float | None, decay: float | None, layer: MonDEQ, x: Tensor, exact: Tensor
) -> Track:
    solver = on if grid is None else Rounded(on, grid, decay)
    steps, size = STEPS[name], exact.norm()
    distances = []
    last = torch.zeros_like(exact)
    for _, _, last in iterates(solver, problem(layer, x), steps):
        distances.append(float((last - exact).norm() / size))
    floor = worst = rate = None
    if isinstance(solver, Rounded):
        found = iterate_floor(layer, x, solver, steps if decay is not None else None)
        rate = found.rate
        floor = float(found.iterate.norm() / size)
        reached = iterate_floor(layer, x, solver, steps).iterate
        worst = float(((last - exact).norm(dim=1) / reached).max())
    return Track(
        solver=name,
        grid=grid,
        decay=decay,
        alpha=on.alpha or 0.0,
        rate=rate,
        end=distances[-1],
        floor=floor,
        worst=worst,
        distances=tuple(float(f"{value:.6g}") for value in distances),
    )
