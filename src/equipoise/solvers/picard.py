"""The averaged iteration z⁺ = (1 − α) z + α σ(W z + q) on the network's own map (theory §2, §7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators import FixedPointMap, MonotoneOperator
from .loop import Problem, Solver, Tuning

__all__ = ["AveragedMap", "Picard"]


class AveragedMap(FixedPointMap):
    """T(z) = (1 − α) z + α σ(W z + q)."""

    def __init__(self, problem: Problem, alpha: float) -> None:
        self.problem, self.alpha = problem, alpha

    def start(self) -> tuple[Tensor, Tensor]:
        q = self.problem.injection
        return torch.zeros_like(q), self.problem.activation(q) * self.alpha

    def __call__(self, u: Tensor, out: Tensor | None = None) -> Tensor:
        image = self.problem.activation(self.problem.operator.apply(u).add_(self.problem.injection))
        return torch.lerp(u, image, self.alpha, out=out)

    def point(self, u: Tensor) -> Tensor:
        return u

    def select(self, rows: Tensor) -> AveragedMap:
        return AveragedMap(self.problem.select(rows), self.alpha)


@dataclass(frozen=True)
class Picard(Solver):
    """Averaged Picard iteration; proved to converge where ‖W‖₂ < 1, factor (1 − α) + α‖W‖₂.

    A positive Euclidean margin alone does not make it converge: ForwardBackward and PeacemanRachford do.
    The default α is 1 where ‖W‖₂ < 1 and 1/(1 + L) elsewhere, without a guarantee.
    """

    def tune(self, operator: MonotoneOperator) -> Tuning:
        norm = operator.norm()
        alpha = self.alpha or (1.0 if norm < 1 else 1 / (1 + operator.lipschitz()))
        rate = 1 - alpha + alpha * norm if norm < 1 and alpha <= 1 else None
        margin = operator.margin()
        return Tuning(alpha, rate, norm / (alpha * margin) if margin > 0 else None)

    def map(self, problem: Problem, tuning: Tuning) -> AveragedMap:
        return AveragedMap(problem, tuning.alpha)
