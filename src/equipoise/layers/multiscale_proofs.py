"""What is proved about points of a multiscale network, in float64, every rounding counted (theory §9).

For any w, whichever solver returned it, and a map that contracts by ρ < 1: ‖w − z*‖ <= ‖f(w) − w‖/(1− ρ), and
‖f(w) − z*‖ <= ρ ‖f(w) − w‖/(1 − ρ). f(w) is computed in float64, from the image on, with a bound of what that lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from .. import verified
from .multiscale import Cell
from .steps import Conv, Path, Proved, Proving, Reading

__all__ = ["Evaluator", "Gap", "Head", "row_lengths"]

ROWS = 64
"""Images evaluated at a time: float64 activations are large."""

SLACK = 1 + 1e-9

V = TypeVar("V")


@dataclass(frozen=True)
class Gap:
    """f(w) ``(B, n)`` in float64, ``distance (B,)`` of w and f(w) as computed, ``error (B,)`` of f(w) at most."""

    image: Tensor
    distance: Tensor
    error: Tensor

    def from_point(self, rate: float) -> Tensor:
        """Bounds ``(B,)`` of ‖w − z*‖ where f contracts by ``rate`` < 1."""
        return (self.distance + self.error) * SLACK / verified.down(1 - rate)

    def from_image(self, rate: float) -> tuple[Tensor, Tensor]:
        """(bounds ``(B,)`` of ‖f(w) − z*‖, f(w) as it is here; the part of them that more steps would shrink)."""
        factor = verified.up(rate / verified.down(1 - rate))
        return (factor * (self.distance + self.error) + self.error) * SLACK, factor * self.distance


class Evaluator:
    """f of one network in float64 on the CPU: its map, computed for a proof, and its stem."""

    def __init__(self, cell: Cell, stem: Path) -> None:
        self.cell, self.stem = cell.to64(), _wide(stem)

    @torch.no_grad()
    def gap(self, x: Tensor, w: Tensor) -> Gap:
        """f(w; x) and how far it is from w, for images ``x (B, c, H, W)`` and points ``w (B, n)``."""
        parts = []
        for rows in torch.arange(len(x)).split(ROWS):
            images, points = (t.detach()[rows.to(t.device)].to("cpu", torch.float64) for t in (x, w))
            exact = torch.zeros(len(images), dtype=torch.float64)
            injection = Proving().along(self.stem, Proved(images, exact))
            image, error = self.cell.proved(points, injection)
            parts.append((image, row_lengths(image - points) * SLACK, error.nan_to_num(math.inf, math.inf)))
        return Gap(*(torch.cat(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True, eq=False)
class Head:
    """What makes features of equilibria: a path for each branch, whose images are summed, and the path of the sum."""

    branches: tuple[Path, ...]
    total: Path

    def read(self, reading: Reading[V], z: Sequence[V]) -> V:
        parts = [reading.along(path, part) for path, part in zip(self.branches, z, strict=True)]
        return reading.along(self.total, reading.combine((1.0,) * len(parts), parts))

    @torch.no_grad()
    def proved(self, z: Sequence[Tensor], error: Tensor) -> Proved:
        """The features ``(B, k)`` of branches, and a bound ``(B,)`` of how far those of any branches that lie within
        ``error (B,)``, all together, are from them, rounding included.

        Where branch i within e_i moves the sum by at most L_i e_i, all of them within Σ e_i² <= e² move it by at most
        e √(Σ L_i²).
        """
        none, reading = torch.zeros_like(error), Proving()
        wide = [part.to("cpu", torch.float64) for part in z]
        paths = [_bounded(tuple(step.to64() for step in path)) for path in self.branches]
        exact = [reading.along(path, Proved(part, none)) for path, part in zip(paths, wide, strict=True)]
        near = [reading.along(path, Proved(part, error)).error for path, part in zip(paths, wide, strict=True)]
        total = reading.combine((1.0,) * len(exact), exact)
        moved = torch.linalg.vector_norm(torch.stack(near), dim=0) * (1 + 1e-9)
        last = _bounded(tuple(step.to64() for step in self.total))
        value, bound = reading.along(last, Proved(total.value, (total.error + moved) * (1 + 1e-9)))
        return Proved(value.flatten(1), bound)


def row_lengths(x: Tensor) -> Tensor:
    """Upper bounds ``(B,)`` of the 2-norms of the rows of ``x (B, n)``, ``inf`` where a row is not finite."""
    finite = torch.isfinite(x).all(1)
    return torch.where(finite, verified.row_norms(torch.where(finite[:, None], x, 0.0)), math.inf)


def _wide(path: Path) -> Path:
    return tuple(step.to64() for step in path)


def _bounded(path: Path) -> Path:
    """``path`` with the norms of its 1×1 convolutions, those of their matrices."""
    return tuple(
        replace(step, norm=verified.spectral_norm(step.kernel[:, :, 0, 0])) if isinstance(step, Conv) else step
        for step in path
    )
