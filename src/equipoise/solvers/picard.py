"""The averaged iteration z⁺ = (1 − α) z + α σ(W z + q) on the network's own map (theory §2, §7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..norms import WeightedMax, WeightedSum
from ..operators import FixedPointMap, MonotoneOperator
from .loop import Solver, Tuning, proved_factor
from .problem import MapProblem, Problem

__all__ = ["AveragedMap", "DualMap", "Picard"]


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

    def length(self, r: Tensor) -> Tensor:
        return self.problem.operator.family.of(r)


class DualMap(AveragedMap):
    """λ ↦ (1 − α) λ + α (M D λ + g) with the equilibrium y = D λ: the averaged iteration where only M D, and not D M,
    contracts, as M = Wᵀ does in the dual norm (theory §3, §7)."""

    def start(self) -> tuple[Tensor, Tensor]:
        g = self.problem.injection
        return torch.zeros_like(g), g * self.alpha

    def __call__(self, u: Tensor, out: Tensor | None = None) -> Tensor:
        image = self.problem.operator.apply(self.problem.activation(u)).add_(self.problem.injection)
        return torch.lerp(u, image, self.alpha, out=out)

    def point(self, u: Tensor) -> Tensor:
        return self.problem.activation(u)

    def select(self, rows: Tensor) -> DualMap:
        return DualMap(self.problem.select(rows), self.alpha)


class RelaxedMap(FixedPointMap):
    """u ↦ (1 − α) u + α f(u) for a map f that is its own estimate."""

    def __init__(self, fixed_point: FixedPointMap, alpha: float) -> None:
        self.fixed_point, self.alpha = fixed_point, alpha

    def start(self) -> tuple[Tensor, Tensor]:
        u, image = self.fixed_point.start()
        return u, torch.lerp(u, image, self.alpha)

    def __call__(self, u: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.lerp(u, self.fixed_point(u), self.alpha)

    def point(self, u: Tensor) -> Tensor:
        return self.fixed_point.point(u)

    def select(self, rows: Tensor) -> RelaxedMap:
        return RelaxedMap(self.fixed_point.select(rows), self.alpha)


@dataclass(frozen=True)
class Picard(Solver):
    """Averaged iteration; proved to converge where ‖W‖₂ < 1, factor (1 − α) + α‖W‖₂, and where μ_η(W) < 1.

    In the Euclidean family a positive margin alone does not make it converge: ForwardBackward and PeacemanRachford
    do. The default α is 1 where ‖W‖₂ < 1 and 1/(1 + L) elsewhere, without a guarantee.
    In a weighted maximum norm the default is α* = 1/(1 − min_i min(W_ii, 0)), with the factor 1 − α (1 − max(μ, 0)),
    which no longer step can better (theory §7 [JDPB21]).
    """

    def tune(self, operator: MonotoneOperator) -> Tuning:
        if isinstance(operator.family, (WeightedMax, WeightedSum)):
            return _tuned_in_rows(self, operator)
        norm = operator.norm()
        alpha = self.alpha or (1.0 if norm < 1 else 1 / (1 + operator.lipschitz()))
        rate = 1 - alpha + alpha * norm if norm < 1 and alpha <= 1 else None
        margin = operator.margin()
        return Tuning(alpha, rate, norm / (alpha * margin) if margin > 0 else None)

    def factor(self, operator: MonotoneOperator, alpha: float) -> float | None:
        """1 − α + α‖W‖₂ for α <= 1; in a weighted maximum norm 1 − α min(m, 1) for α <= α* (theory §2, §7)."""
        if not isinstance(operator.family, WeightedMax):
            return proved_factor(1 - alpha + alpha * operator.norm()) if alpha <= 1 else None
        margin = operator.margin()
        return (
            proved_factor(1 - alpha * min(margin, 1.0)) if margin > 0 and alpha <= operator.averaging_step() else None
        )

    def map(self, problem: Problem | MapProblem, tuning: Tuning) -> FixedPointMap:
        if isinstance(problem, MapProblem):
            return problem.fixed_point if tuning.alpha == 1 else RelaxedMap(problem.fixed_point, tuning.alpha)
        if isinstance(problem.operator.family, WeightedSum):
            return DualMap(problem, tuning.alpha)
        return AveragedMap(problem, tuning.alpha)


def _tuned_in_rows(solver: Solver, operator: MonotoneOperator) -> Tuning:
    best, margin = operator.averaging_step(), min(operator.margin(), 1.0)
    alpha = solver.alpha or best
    if margin <= 0:
        return Tuning(alpha, None, None)
    return Tuning(alpha, 1 - alpha * margin if alpha <= best else None, 1 / (alpha * margin))
