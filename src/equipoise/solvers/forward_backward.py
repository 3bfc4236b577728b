"""Forward–backward splitting: z⁺ = prox_{αf}((1 − α) z + α (W z + q)) (theory §2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..norms import Euclidean, WeightedMax
from ..operators import FixedPointMap, MonotoneOperator
from ..operators.base import golden_section
from .loop import Solver, Tuning, proved_factor
from .problem import Problem

__all__ = ["ForwardBackward", "ForwardBackwardMap", "best_forward_step"]


class ForwardBackwardMap(FixedPointMap):
    """T(z) = prox_{αf}((I − αF) z) with F(z) = (I − W) z − q."""

    def __init__(self, problem: Problem, alpha: float) -> None:
        self.problem, self.alpha = problem, alpha
        self.step = problem.injection * alpha

    def start(self) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(self.step), self.problem.activation.prox(self.step, self.alpha)

    def __call__(self, u: Tensor, out: Tensor | None = None) -> Tensor:
        v = self.problem.operator.apply(u)
        torch.add(self.step, v, alpha=self.alpha, out=v).add_(u, alpha=1 - self.alpha)
        return self.problem.activation.prox(v, self.alpha)

    def point(self, u: Tensor) -> Tensor:
        return u

    def select(self, rows: Tensor) -> ForwardBackwardMap:
        return ForwardBackwardMap(self.problem.select(rows), self.alpha)

    def length(self, r: Tensor) -> Tensor:
        return self.problem.operator.family.of(r)


def best_forward_step(operator: MonotoneOperator) -> float:
    """The α that minimises ‖(1 − α) I + α W‖₂, a convex function of α; 1/(2L) where no margin is proved."""
    margin, lipschitz = operator.margin(), operator.lipschitz()
    if margin <= 0:
        return 1 / (2 * lipschitz) if lipschitz > 0 else 1.0
    low = margin / lipschitz**2
    return golden_section(operator.forward_norm, low, max(1 / lipschitz, 2 * low), 0.05)


@dataclass(frozen=True)
class ForwardBackward(Solver):
    """Forward–backward splitting. Converges for 0 < α < 2m/L², factor at most ‖(1 − α) I + αW‖₂ [WK20].

    In a weighted maximum norm the default is α* of the averaged iteration, with the factor ‖(1 − α) I + αW‖_η =
    1 − α (1 − μ): prox_{αf} enlarges no coordinate.
    """

    def tune(self, operator: MonotoneOperator) -> Tuning:
        if not isinstance(operator.family, Euclidean):
            return _tuned_in_rows(self, operator)
        alpha = self.alpha or best_forward_step(operator)
        rate = operator.forward_norm(alpha)
        margin = operator.margin()
        return Tuning(alpha, rate if margin > 0 else None, rate / (alpha * margin) if margin > 0 else None)

    def factor(self, operator: MonotoneOperator, alpha: float) -> float | None:
        """‖(1 − α) I + αW‖₂; in a weighted maximum norm 1 − αm for α <= α* (theory §2, §7 [JDPB21])."""
        if not isinstance(operator.family, WeightedMax):
            return operator.forward_bound(alpha)
        reach = alpha * operator.margin()
        return proved_factor(max(1 - reach, 0.0)) if reach > 0 and alpha <= operator.averaging_step() else None

    def map(self, problem: Problem, tuning: Tuning) -> ForwardBackwardMap:
        return ForwardBackwardMap(problem, tuning.alpha)


def _tuned_in_rows(solver: Solver, operator: MonotoneOperator) -> Tuning:
    best, margin = operator.averaging_step(), operator.margin()
    alpha = solver.alpha or best
    if margin <= 0:
        return Tuning(alpha, None, None)
    return Tuning(alpha, max(1 - alpha * margin, 0.1) if alpha <= best else None, 1 / (alpha * margin))
