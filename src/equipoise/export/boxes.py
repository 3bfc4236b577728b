"""The largest values of affine maps over a box of inputs, as proved bounds (theory §10)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import verified
from .fixedpoint import SLACK
from .grid import NEAR, Grid

__all__ = ["Box", "box_of", "farthest"]


@dataclass(frozen=True, eq=False)
class Box:
    """All x with ``|x − center| <= half`` entrywise; both ``(d,)`` float64."""

    center: Tensor
    half: Tensor

    def entries(self, M: Tensor, b: Tensor) -> Tensor:
        """Upper bounds ``(n,)`` of |M x + b| entrywise over the box, M ``(n, d)``, b ``(n,)``."""
        wide = M.abs() @ self.half
        slack = verified.gamma(M.shape[1] + 8) * (M.abs() @ self.center.abs() + b.abs() + wide)
        return ((M @ self.center + b).abs() + wide + slack) * SLACK + verified.TINY * M.shape[1]

    def norm(self, M: Tensor, b: Tensor, error: float = 0.0) -> float:
        """Upper bound of ‖M' x + b‖₂ over the box and all M' within 2-norm ``error`` of M."""
        middle = M @ self.center + b
        slack = verified.gamma(M.shape[1] + 8) * (M.abs() @ self.center.abs() + b.abs())
        middle_norm = float(verified.row_norms((middle.abs() + slack * SLACK)[None])[0])
        spread = float(verified.row_norms(self.entries(M, b)[None])[0])
        reach = float(verified.row_norms((self.center.abs() + self.half)[None])[0])
        return min(spread, middle_norm + farthest(M, self.half)) * SLACK + error * reach * SLACK

    def positive(self, M: Tensor, b: Tensor) -> float:
        """Upper bound of ‖max(M x + b, 0)‖₂ over the box."""
        wide = M.abs() @ self.half
        slack = verified.gamma(M.shape[1] + 8) * (M.abs() @ self.center.abs() + b.abs() + wide)
        top = (M @ self.center + b + wide * SLACK + slack * SLACK).clamp(min=0)
        return min(float(verified.row_norms(top[None])[0]) * SLACK, self.norm(M, b))


def farthest(M: Tensor, half: Tensor) -> float:
    """Upper bound of ‖M δ‖₂ for ``|δ| <= half``, M ``(n, d)``.

    For P = M diag(half) and any weights w > 0: ‖P t‖² <= ‖P diag(w)^{−1/2}‖₂² Σ w for |t| <= 1; the best of a few w.
    """
    P = M * half
    columns = P.norm(dim=0)
    best = float(verified.row_norms((P.abs().sum(1) * SLACK)[None])[0])
    if not bool(columns.any()):
        return best
    for power in (0.0, 1.0, 1.5):
        w = (columns / columns.max()).clamp(min=1e-6) ** power
        scaled = P / w.sqrt()
        rounding = verified.gamma(6) * verified.absolute_norm(scaled)
        best = min(best, verified.spectral_norm(scaled, rounding) * math.sqrt(float(w.sum())) * SLACK)
    return best * SLACK


def box_of(grid: Grid) -> tuple[Box, Tensor]:
    """(the box of all network inputs on the grid, how far a float that stands for a grid point may lie from it (d,)).

    For natural grids that is what float32 preprocessing loses; else half a step, and float32 as well.
    """
    steps, offsets = (torch.from_numpy(grid.spread(v)) for v in (grid.steps, grid.offsets))
    low, high = steps * grid.low + offsets, steps * grid.high + offsets
    size = (steps * max(abs(grid.low), abs(grid.high))).abs() + offsets.abs()
    near = NEAR * size
    half = (high - low) / 2 * SLACK + near + 1e-12 * size
    slip = near if grid.natural else near + steps / 2 * SLACK
    return Box((low + high) / 2, half + (0 if grid.natural else steps / 2)), slip


def half_step(grid: Grid) -> Tensor:
    """How far a float in the range lies at most from the grid (d,)."""
    return torch.from_numpy(np.asarray(grid.spread(grid.steps))) / 2 * SLACK
