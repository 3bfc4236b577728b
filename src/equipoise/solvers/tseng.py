"""Tseng's forward–backward–forward splitting: no inverse, and O(κ) steps where forward–backward needs O(κ²)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError
from ..norms import WeightedMax
from ..operators import FixedPointMap, MonotoneOperator
from .loop import Solver, Tuning, proved_factor
from .problem import Problem

__all__ = ["Tseng", "TsengMap"]


class TsengMap(FixedPointMap):
    """y = prox_{αf}(z − αF(z)), T(z) = y − α (F(y) − F(z)) with F(y) − F(z) = (I − W)(y − z)."""

    def __init__(self, problem: Problem, alpha: float) -> None:
        self.problem, self.alpha = problem, alpha
        self.step = problem.injection * alpha

    def start(self) -> tuple[Tensor, Tensor]:
        u = torch.zeros_like(self.step)
        return u, self(u)

    def __call__(self, u: Tensor, out: Tensor | None = None) -> Tensor:
        operator, alpha = self.problem.operator, self.alpha
        v = torch.add(self.step, operator.apply(u), alpha=alpha).add_(u, alpha=1 - alpha)
        y = self.problem.activation.prox(v, alpha)
        moved = y - u
        return y.sub_(moved, alpha=alpha).add_(operator.apply(moved), alpha=alpha)

    def point(self, u: Tensor) -> Tensor:
        return u

    def select(self, rows: Tensor) -> TsengMap:
        return TsengMap(self.problem.select(rows), self.alpha)


@dataclass(frozen=True)
class Tseng(Solver):
    """Tseng's splitting: needs 0 < α < 1/L (default 0.7/L) and two products with W a step."""

    def tune(self, operator: MonotoneOperator) -> Tuning:
        lipschitz, margin = operator.lipschitz(), operator.margin()
        alpha = self.alpha or (0.7 / lipschitz if lipschitz > 0 else 0.7)
        reach = alpha * lipschitz
        if reach >= 1:
            raise OptionError(f"Tseng alpha is {alpha:g}; it is below 1/L = {1 / lipschitz:g}")
        if margin <= 0:
            return Tuning(alpha, None, None)
        # 1 − αm is what the linear part suggests; it plans when to look and is not a bound
        return Tuning(alpha, max(1 - alpha * margin, 0.1), 1 / (alpha * margin) + reach / (1 - reach))

    def factor(self, operator: MonotoneOperator, alpha: float) -> float | None:
        """√(1 − pq/(p + q)) with p = 1 − α²L², q = 2αm, from its descent inequality and strong monotonicity (theory §2
        [T00]): of the distance to the equilibrium; between other points the map need not contract."""
        if isinstance(operator.family, WeightedMax) or operator.margin() <= 0:
            return None
        p, q = 1 - (alpha * operator.lipschitz()) ** 2 * (1 + 2.0**-45), 2 * alpha * operator.margin()
        return proved_factor(math.sqrt(max(1 - p * q / (p + q), 0.0))) if p > 0 else None

    def map(self, problem: Problem, tuning: Tuning) -> TsengMap:
        return TsengMap(problem, tuning.alpha)
