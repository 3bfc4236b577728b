"""What a solver is given: a batch of equilibrium problems, or of fixed points of a map."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..activations import Activation
from ..linearized import Linearized
from ..operators import FixedPointMap, MonotoneOperator

__all__ = ["Equation", "MapProblem", "Problem"]

CHUNK = 2**21
"""Entries of an iterate worked on at a time on a CPU: what stays in its cache between passes."""


@dataclass(frozen=True)
class Problem:
    """Find z ``(B, n)`` with z = σ(W z + q), row by row (theory §1).

    ``injection_error (B,)`` bounds in the 2-norm how far the computed q may be from U x + b.
    """

    operator: MonotoneOperator
    injection: Tensor
    activation: Activation
    injection_error: Tensor | None = None

    def select(self, rows: Tensor | slice) -> Problem:
        activation = self.activation
        if isinstance(activation, Linearized):
            activation = Linearized(activation.slopes[rows])
        error = None if self.injection_error is None else self.injection_error[rows]
        return replace(self, injection=self.injection[rows], activation=activation, injection_error=error)

    def width(self) -> int:
        """Rows worked on at a time."""
        cpu = self.injection.device.type == "cpu"
        return max(64, CHUNK // max(self.operator.features, 1)) if cpu else len(self.injection)

    def vanishing(self) -> Tensor:
        """Rows ``(B,)`` whose answer may be 0, relative to which nothing is small."""
        return torch.linalg.vector_norm(self.activation(self.injection), dim=1) == 0


@dataclass(frozen=True)
class MapProblem:
    """Find the fixed points u ``(B, n)`` of a map, row by row; ``injection (B, …)`` is what the rows differ in."""

    fixed_point: FixedPointMap
    injection: Tensor

    def select(self, rows: Any) -> MapProblem:
        return MapProblem(self.fixed_point.select(rows), self.injection[rows])

    def width(self) -> int:
        return len(self.injection)

    def vanishing(self) -> Tensor:
        return torch.zeros(len(self.injection), dtype=torch.bool, device=self.injection.device)


Equation = Problem | MapProblem
"""What the loop runs on."""
