"""What is proved about a point, whichever solver returned it (theory §2).

For any w let p = σ(W w + q) and e = w − p. Monotonicity of ∂f between p and z* gives ‖p − z*‖₂ ≤ ‖W e‖₂ / m.
In a weighted maximum norm the slopes of σ between p and z* give ‖p − z*‖_η ≤ max_i (|W e|_i/η_i)/(1 − μ_i) (theory §7).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..norms import Euclidean, WeightedMax
from ..operators.base import product_rounding
from .loop import Problem, Solver, Stop, Tuning, Verdict, iterate

__all__ = ["Posterior", "Solution", "a_posteriori", "solve"]


@dataclass(frozen=True)
class Solution:
    """What a solve returns, row by row.

    ``value (B, n)``: p = σ(W w + q) for the last iterate w. ``converged (B,)``: the asked stopping rule
    holds. ``steps (B,)``: steps taken. ``residual (B,)``: ‖w − p‖/‖p‖. ``error_bound (B,)``: a proved bound on
    ‖p − z*‖₂, truncation plus rounding (theory §2), float64; infinite where no positive margin is proved.
    ``truncation (B,)``: its part that more steps would shrink. In a maximum-norm family all are ‖·‖_∞.
    """

    value: Tensor
    converged: Tensor
    steps: Tensor
    residual: Tensor
    error_bound: Tensor
    truncation: Tensor

    def columns(self) -> tuple[Tensor, ...]:
        """All fields in order."""
        return self.value, self.converged, self.steps, self.residual, self.error_bound, self.truncation


class Posterior(NamedTuple):
    """p ``(B, n)``; bound and its truncation part ``(B,)`` float64; ‖w − p‖ and ‖p‖ ``(B,)`` float64.

    ``spread``: ‖p‖₂/‖p‖, which is 1 but where the norm is a maximum.
    """

    value: Tensor
    error_bound: Tensor
    truncation: Tensor
    gap: Tensor
    size: Tensor
    spread: Tensor | float = 1.0


def a_posteriori(problem: Problem, w: Tensor) -> Posterior:
    """Bound ‖p − z*‖₂ for p = σ(W w + q), every rounding on the way counted (theory §2).

    With r the error of the computed W w + q and δ that of σ, ‖p − z*‖ ≤ (‖W e‖ + ‖r‖ + ‖W‖‖δ‖)/m + ‖δ‖. Products
    of k terms err by γ_k ‖|W|‖ ‖·‖ in the arithmetic of ``w``, TF32 and bfloat16 products
    included where torch is allowed them; W's own representation error counts as part of r.
    """
    operator = problem.operator
    if isinstance(operator.family, WeightedMax):
        return _by_rows(problem, w, operator.family)
    euclidean = isinstance(operator.family, Euclidean)  # of a dual norm nothing is proved here
    info = torch.finfo(w.dtype)
    n = operator.features
    gamma = product_rounding(2 * n + 8, w)
    floor = math.sqrt(n * info.tiny) * 4
    p = problem.activation(operator.apply(w).add_(problem.injection))
    e = w - p
    norms = torch.stack(
        [torch.linalg.vector_norm(t, dim=1) for t in (operator.apply(e), e, w, p, problem.injection)]
    ).double()
    product, gap, size_w, _, size_q = norms * (1 + gamma) + floor
    margin, spread = operator.margin(), operator.absolute_norm()
    evaluation = problem.activation.evaluation_error(p)
    delta = torch.linalg.vector_norm(evaluation, dim=1).double() if isinstance(evaluation, Tensor) else 0.0
    rounding = gamma * (spread * (size_w + gap) + size_q + product)
    rounding = rounding + operator.representation_error * (size_w + gap)
    if problem.injection_error is not None:
        rounding = rounding + problem.injection_error
    if margin <= 0 or not euclidean:
        infinite = torch.full_like(product, math.inf)
        return Posterior(p, infinite, infinite, norms[1], norms[3])
    truncation = norms[0] / margin
    bound = ((product + rounding + spread * delta) / margin + delta) * (1 + 1e-12)
    return Posterior(p, bound.nan_to_num(math.inf, math.inf), truncation, norms[1], norms[3])


def _by_rows(problem: Problem, w: Tensor, family: WeightedMax) -> Posterior:
    """The bound in ‖·‖_∞, by way of ‖·‖_η: with r the error of the computed W w + q and δ that of σ,

    ‖p − z*‖_η ≤ max_i (|W e| + |W||δ| + |r|)_i/(η_i (1 − μ_i)) + ‖δ‖_η,    ‖·‖_∞ ≤ max_j η_j ‖·‖_η.
    """
    operator: Any = problem.operator
    tiny, gamma = torch.finfo(w.dtype).tiny ** 0.5, product_rounding(2 * operator.features + 8, w)
    v = operator.apply(w).add_(problem.injection)
    p = problem.activation(v)
    e = w - p
    moved = operator.apply(e).abs().double()
    eta, margins, spread = (t.to(w.device) for t in (family.eta, operator.row_margins(), operator.row_norms()))
    weights = 1 / (eta * margins.clamp_min(0.0)) * (1 + 1e-15)
    size_w, gap_eta = ((t.double().abs() / eta).amax(1) * (1 + 1e-15) for t in (w, e))
    evaluation = problem.activation.evaluation_error(p)
    delta = (evaluation.double() / eta).amax(1) if isinstance(evaluation, Tensor) else torch.zeros_like(size_w)
    gap, size = e.abs().amax(1).double(), p.abs().amax(1).double()
    truncation = (moved * weights).amax(1) * family.reach()
    # in row i, over η_i: products of length n with entries up to ‖w‖_η η_j, ‖e‖_η η_j and ‖δ‖_η η_j, and the sums
    swing = (gamma * (size_w + gap_eta) + delta) * (1 + 2 * gamma)
    rounding = eta * (spread * swing[:, None]) + gamma * (problem.injection.double().abs() + 2 * moved)
    rounding = rounding + operator.representation_error * family.length() * (size_w + gap_eta)[:, None] + tiny
    if problem.injection_error is not None:
        error = problem.injection_error
        rounding = rounding + (error if error.ndim == 2 else error[:, None])
    bound = ((((moved + rounding) * weights).amax(1) + delta) * family.reach()) * (1 + 1e-12)
    length = torch.linalg.vector_norm(p, dim=1).double() / size.clamp_min(torch.finfo(w.dtype).tiny)
    if not bool((margins > 0).all()):
        truncation = bound = torch.full_like(bound, math.inf)
    return Posterior(p, bound.nan_to_num(math.inf, math.inf), truncation, gap, size, length.clamp_min(1.0))


def solve(solver: Solver, problem: Problem, tuning: Tuning, tol: float, stop: Stop) -> Solution:
    """Solve every row to ``tol``, relative to the size of its answer, under the asked stopping rule."""

    def judge(part: Problem, w: Tensor) -> Verdict:
        found = a_posteriori(part, w)
        measure = found.truncation if stop == "bound" else found.gap
        residual = torch.where(found.gap == 0, 0.0, found.gap / found.size)
        residual = torch.where(torch.isfinite(found.size), residual, math.inf)  # the size overflowed
        done = (measure <= tol * found.size) & torch.isfinite(found.gap + found.size)
        return Verdict(done, measure * found.spread, (found.value, residual, found.error_bound, found.truncation))

    steps, done, value, residual, bound, truncation = iterate(solver, problem, tuning, tol, stop, judge)
    return Solution(value, done, steps, residual, bound, truncation)
