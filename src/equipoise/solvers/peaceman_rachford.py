"""Peaceman–Rachford splitting, one product and one reflection a step, and its relaxation (theory §2).

u⁺ = C_α (2 prox_{αf}(u) − u) + 2α V_α q with 2 V_α = I + C_α; for ReLU the reflection is |u|, so a step is
u⁺ = C_α |u| + c with c = α (I + C_α) q, formed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ..norms import Euclidean, WeightedMax
from ..operators import FixedPointMap, MonotoneOperator
from .loop import Solver, Tuning, proved_factor
from .problem import Problem

__all__ = ["DouglasRachford", "PeacemanRachford", "PeacemanRachfordMap"]


LARGE = 512
"""Features above which the best step is taken as found: each further try would invert a large matrix."""


class PeacemanRachfordMap(FixedPointMap):
    """T(u) = (1 − θ) u + θ (C_α reflect(u) + c); the equilibrium is prox_{αf}(u)."""

    def __init__(self, problem: Problem, alpha: float, relaxation: float = 1.0, offset: Tensor | None = None) -> None:
        self.problem, self.alpha, self.relaxation = problem, alpha, relaxation
        self.product = problem.operator.cayley_product(alpha)
        q = problem.injection
        self.offset = self.product(q, q).mul_(alpha) if offset is None else offset
        self.reflected = torch.empty_like(self.offset)

    def start(self) -> tuple[Tensor, Tensor]:
        # T(0) needs a product only where prox_{αf}(0) is not 0.
        u = torch.zeros_like(self.offset)
        if self.problem.activation.fixes_zero:
            return u, self.offset * self.relaxation
        return u, self(u)

    def __call__(self, u: Tensor, out: Tensor | None = None) -> Tensor:
        reflected = self.problem.activation.reflect(u, self.alpha, out=self.reflected)
        image = self.product(reflected, self.offset, out)
        if self.relaxation == 1:
            return image
        return torch.lerp(u, image, self.relaxation, out=out)

    def point(self, u: Tensor) -> Tensor:
        return self.problem.activation.prox(u, self.alpha)

    def select(self, rows: Tensor) -> PeacemanRachfordMap:
        return PeacemanRachfordMap(self.problem.select(rows), self.alpha, self.relaxation, self.offset[rows])

    def length(self, r: Tensor) -> Tensor:
        operator = self.problem.operator
        return operator.family.of(r) if self.alpha <= operator.averaging_step() else super().length(r)


@dataclass(frozen=True)
class _Reflection(Solver):
    """What Peaceman–Rachford and its relaxation share."""

    relaxation: ClassVar[float]

    def tune(self, operator: MonotoneOperator) -> Tuning:
        if not isinstance(operator.family, Euclidean):
            return self._tuned_in_rows(operator)
        alpha = self.alpha or _largest_good_step(operator)
        norm = operator.cayley_norm(alpha)
        rate = 1 - self.relaxation + self.relaxation * norm
        margin, lipschitz = operator.margin(), operator.lipschitz()
        gap = 2 * alpha * margin * self.relaxation
        known = gap > 0  # and not so small that it vanishes
        gain = (1 + alpha * lipschitz) / gap if known else None
        return Tuning(alpha, rate if known else None, gain)

    def _tuned_in_rows(self, operator: MonotoneOperator) -> Tuning:
        """For α <= α*: ‖I − αF‖_η <= 1 − αm, ‖(I + αF)⁻¹‖_η <= 1/(1 + αm), and no reflection enlarges a coordinate.

        Where the 2-norm contracts faster, ‖C_α‖₂ < (1 − α*m)/(1 + α*m) at a longer step, that step is taken.
        """
        best, margin = operator.averaging_step(), operator.margin()
        alpha = self.alpha or best
        if margin <= 0:
            return Tuning(alpha, None, None)
        norm: float | None = max(1 - alpha * margin, 0.0) / (1 + alpha * margin) if alpha <= best else None
        if self.alpha is None and operator.features <= LARGE and norm is not None:
            longer = _largest_good_step(operator)
            other = operator.cayley_norm(longer)
            if other < norm:
                alpha, norm = longer, other
        rate = None if norm is None else 1 - self.relaxation + self.relaxation * norm
        gain = (1 + alpha * operator.lipschitz()) / (2 * alpha * margin * self.relaxation)
        return Tuning(alpha, rate, gain)

    def factor(self, operator: MonotoneOperator, alpha: float) -> float | None:
        """‖C_α‖₂, and for a relaxation θ 1 − θ + θ‖C_α‖₂; in a weighted maximum norm (1 − αm)/(1 + αm) in its place for
        α <= α*, and at a longer step ‖C_α‖₂ still, in the 2-norm (theory §2, §7 [G17, JDPB21])."""
        norm: float | None
        if not isinstance(operator.family, WeightedMax) or alpha > operator.averaging_step():
            norm = operator.cayley_bound(alpha)
        else:
            reach = alpha * operator.margin()
            norm = proved_factor(max(1 - reach, 0.0) / (1 + reach)) if reach > 0 else None
        if norm is None or self.relaxation == 1:
            return norm
        return proved_factor(1 - self.relaxation + self.relaxation * norm)

    def map(self, problem: Problem, tuning: Tuning) -> PeacemanRachfordMap:
        return PeacemanRachfordMap(problem, tuning.alpha, self.relaxation)


@final
@dataclass(frozen=True)
class PeacemanRachford(_Reflection):
    """Peaceman–Rachford splitting; factor at most ‖C_α‖₂, below 1 for every α where m > 0 [WK20, G17].

    ``alpha=None`` minimises ‖C_α‖₂ once per weights, then takes the largest step whose worst-case rate is within a
    tenth of the best: the norm is flat around its minimum, and typical errors shrink faster with larger steps
    (on the published checkpoint 38 steps instead of 44 to a bound of 1e-5).
    In a weighted maximum norm the default is α* of the averaged iteration, with the factor (1 − αm)/(1 + αm), or the
    step for ‖C_α‖₂ where that is the smaller factor.
    """

    relaxation: ClassVar[float] = 1.0


def _largest_good_step(operator: MonotoneOperator) -> float:
    best = operator.best_alpha()
    norm = operator.cayley_norm(best)
    if not 0 < norm < 1 or operator.stores_cayley or operator.features > LARGE:
        return best
    for widening in (2.0, 1.75, 1.5, 1.3, 1.15):
        if operator.cayley_norm(best * widening) <= norm**0.9:
            return best * widening
    return best


@final
@dataclass(frozen=True)
class DouglasRachford(_Reflection):
    """Douglas–Rachford splitting: u⁺ = ½ u + ½ PR(u), factor (1 + ‖C_α‖₂)/2 [G17]."""

    relaxation: ClassVar[float] = 0.5
