"""The map of a multiscale equilibrium network: residual blocks, fusion, post stage (theory §9, [SI26]).

    h = g₁(C₁ z),  r = (1 − a) z + a g₂(drop(C₂ s·σ(h)) + injection),  x_i = g₃(s·σ(r)),
    y_i = (1 − β) x_i + β Σ_{j≠i} w_ij R_ij(x_j),   f_i = g₄(C₄ s·σ(y_i)),

with w_i = softmax(−p_i) over j ≠ i, p_ij = j − i if j > i, else 0. R_ij goes up by a 1×1 convolution, a normalization
and nearest upsampling, down by strided 3×3 convolutions. The injection enters branch 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..operators import FixedPointMap
from .steps import VALUES, Gains, Mask, Path, Proved, Proving, Reading, Step

__all__ = ["Branch", "Cell", "CellMap", "Shape", "gain_matrix", "split", "weights_of_fusion"]

V = TypeVar("V")

Shape = tuple[int, int, int]
"""(C, H, W)."""


@dataclass(frozen=True, eq=False)
class Branch:
    """The paths of one branch: ``widen`` is C₁, g₁, s·σ, C₂; ``mix`` is g₂; ``out`` is s·σ, g₃; ``post`` the rest."""

    widen: Path
    mix: Path
    out: Path
    post: Path


def weights_of_fusion(branches: int, beta: float) -> list[list[float]]:
    """Row i: the weight of branch j's image in branch i, (1 − β) of its own and β softmax(−p_i) of the others."""
    if branches == 1:
        return [[1.0]]
    rows = []
    for i in range(branches):
        scores = [0.0 if j == i else math.exp(-max(j - i, 0)) for j in range(branches)]
        rows.append([1 - beta if j == i else beta * scores[j] / sum(scores) for j in range(branches)])
    return rows


@dataclass(frozen=True, eq=False)
class Cell:
    """f with its tensors fixed, as a program of steps.

    ``shapes``: (C, H, W) of every branch; ``fuse[i][j]``: R_ij; ``weights[i][j]``; ``residual``: a; ``probability`` of
    dropout with its masks, one ``(B, C, H, W)`` a branch, or None.
    """

    shapes: tuple[Shape, ...]
    branches: tuple[Branch, ...]
    fuse: tuple[tuple[Path, ...], ...]
    weights: list[list[float]]
    residual: float
    probability: float = 0.0
    masks: tuple[Tensor, ...] | None = None

    def read(self, reading: Reading[V], z: Sequence[V], injection: V) -> list[V]:
        """What the program gives for the branches ``z``, however it is read."""
        return [
            self._post(reading, i, x) for i, x in enumerate(self._fused(reading, self._blocks(reading, z, injection)))
        ]

    def _blocks(self, reading: Reading[V], z: Sequence[V], injection: V) -> list[V]:
        found = []
        for i, (branch, entry) in enumerate(zip(self.branches, z, strict=True)):
            drop: tuple[Step, ...] = ()
            if self.probability:
                drop = (Mask(self.probability, None if self.masks is None else self.masks[i]),)
            h = reading.along((*branch.widen, *drop), entry)
            if i == 0:
                h = reading.combine((1.0, 1.0), (h, injection))
            h = reading.along(branch.mix, h)
            found.append(reading.along(branch.out, reading.combine((1 - self.residual, self.residual), (entry, h))))
        return found

    def _fused(self, reading: Reading[V], x: Sequence[V]) -> list[V]:
        if len(x) == 1:
            return list(x)
        return [
            reading.combine(row, [reading.along(path, entry) for path, entry in zip(paths, x, strict=True)])
            for row, paths in zip(self.weights, self.fuse, strict=True)
        ]

    def _post(self, reading: Reading[V], i: int, y: V) -> V:
        return reading.along(self.branches[i].post, y)

    @property
    def features(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @staticmethod
    def join(z: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.permute(0, 2, 3, 1).flatten(1) for part in z], dim=1)

    def __call__(self, u: Tensor, injection: Tensor) -> Tensor:
        """f(u) ``(B, n)``, ``injection (B, C₀, H₀, W₀)``."""
        return self.join(self.read(VALUES, split(u, self.shapes), injection))

    def proved(self, u: Tensor, injection: Proved) -> Proved:
        """f(u) in float64 of this cell's ``to64`` for ``u`` in float64, with a bound ``(B,)`` of its error."""
        exact = torch.zeros(len(u), dtype=torch.float64)
        parts = self.read(Proving(), [Proved(part, exact) for part in split(u, self.shapes)], injection)
        errors = torch.stack([part.error for part in parts], 1)
        return Proved(self.join([part.value for part in parts]), torch.linalg.vector_norm(errors, dim=1) * (1 + 1e-9))

    def to64(self) -> Cell:
        def wide(path: Path) -> Path:
            return tuple(step.to64() for step in path)

        return replace(
            self,
            branches=tuple(Branch(wide(b.widen), wide(b.mix), wide(b.out), wide(b.post)) for b in self.branches),
            fuse=tuple(tuple(wide(path) for path in row) for row in self.fuse),
        )

    def select(self, rows: Tensor | slice) -> Cell:
        return self if self.masks is None else replace(self, masks=tuple(mask[rows] for mask in self.masks))


def split(u: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """The branches ``(B, C, H, W)`` of ``u (B, n)``, views whose channels come last in memory."""
    parts = u.split([math.prod(shape) for shape in shapes], dim=1)
    return [part.unflatten(1, (h, w, c)).permute(0, 3, 1, 2) for part, (c, h, w) in zip(parts, shapes, strict=True)]


def gain_matrix(cell: Cell) -> Tensor:
    """N ``(b, b)``: how much branch i of f moves at most, over what branch j of its argument does (theory §9)."""
    b = len(cell.shapes)
    units = [tuple(float(i == j) for j in range(b)) for i in range(b)]
    return torch.tensor(cell.read(Gains(), units, (0.0,) * b), dtype=torch.float64)


class CellMap(FixedPointMap):
    """u ↦ f(u; injection) as a solver sees it: the iterate is the equilibrium's own estimate.

    ``images (B, c, H, W)``: what the injection was made of, where a judge wants to know.
    """

    def __init__(self, cell: Cell, injection: Tensor, images: Tensor | None = None) -> None:
        self.cell, self.injection, self.images = cell, injection, images

    def start(self) -> tuple[Tensor, Tensor]:
        zero = self.injection.new_zeros(len(self.injection), self.cell.features)
        return zero, self(zero)

    def __call__(self, u: Tensor, out: Tensor | None = None) -> Tensor:
        return self.cell(u, self.injection)

    def point(self, u: Tensor) -> Tensor:
        return u

    def select(self, rows: Tensor | slice) -> CellMap:
        images = None if self.images is None else self.images[rows]
        return CellMap(self.cell.select(rows), self.injection[rows], images)
