"""From a plan and a reference to the bounds of the certificate (theory §10)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .. import verified
from ..certificates.wellposed import fresh_operator
from ..layers.linear import affine64
from ..layers.mondeq import MonDEQ
from .boxes import Box, box_of, farthest, half_step
from .fixedpoint import SLACK
from .grid import Grid
from .network import Network
from .plan import Iteration

__all__ = ["Bounds", "Exact", "Reference", "equilibrium_bounds", "score_bound"]


@dataclass(frozen=True, eq=False)
class Exact:
    """A network in float64: W within ``e_W``, U within ``e_U``, b within ``e_b`` (2-norm), margin m."""

    W: Tensor
    e_W: float
    U: Tensor
    e_U: float
    b: Tensor
    e_b: float
    margin: float

    @classmethod
    def of(cls, layer: MonDEQ) -> Exact:
        operator = fresh_operator(layer)
        W, e_W = operator.matrix64()
        U, b, e_U, e_b = affine64(layer.injection)  # type: ignore[arg-type]  # its two kinds, checked by the chain
        return cls(W, e_W, U, e_U, b, e_b, operator.euclidean_margin())  # all that follows is in the 2-norm

    def solution(self, box: Box) -> float:
        """Upper bound of ‖z*‖ over the box: ‖max(q, 0)‖/m (theory §10)."""
        if self.margin <= 0:
            return math.inf
        reach = _norm(box.center.abs() + box.half)
        return (box.positive(self.U, self.b) + self.e_U * reach + self.e_b) / self.margin * SLACK

    def slip(self, moved: Tensor) -> float:
        """Upper bound of how far z* moves when each input moves by at most ``moved (d,)``: ‖U δ‖/m [PWK21]."""
        if self.margin <= 0:
            return math.inf
        return (farthest(self.U, moved) + self.e_U * _norm(moved)) / self.margin * SLACK


@dataclass(frozen=True, eq=False)
class Reference:
    """What the program is compared with."""

    network: Network
    exact: Exact
    words: str
    same_weights: bool
    """The recurrent weights are those very codes: nothing but U, b and the head may have moved."""


@dataclass(frozen=True)
class Bounds:
    """In real units, 2-norm, over all inputs of the range."""

    displacement: float
    input_rounding: float
    input_slip: float
    solution: float
    """Of ‖z*‖ of the program's own network."""
    delta_weight: float
    """‖ΔW‖₂."""
    delta_input: float
    """‖ΔU‖₂."""
    delta_center: float
    """‖ΔU x + Δb‖₂ at the centre of the box."""
    reference_input: float
    """‖U‖₂ of the reference."""
    reference_margin: float

    def per_input(self, iteration: float) -> dict[str, float]:
        """What :meth:`equipoise.runtime.Runtime.error_bound` computes with; ``iteration``: rounding and truncation."""
        return {
            "iteration": iteration,
            "delta_weight": self.delta_weight,
            "delta_input": self.delta_input,
            "delta_center": self.delta_center,
            "reference_input": self.reference_input,
            "reference_margin": self.reference_margin,
        }


def _norm(v: Tensor) -> float:
    return float(verified.row_norms(v[None])[0])


def equilibrium_bounds(
    own: Exact, injection: tuple[Tensor, Tensor], reference: Reference, plan: Iteration, steps: int, grid: Grid
) -> Bounds:
    """T3 over the box, in both of its forms, and what the grid of the inputs costs."""
    box, slip = box_of(grid)
    theirs = reference.exact
    U, b = injection
    used = Exact(own.W, own.e_W, U, 0.0, b, 2 * verified.UNIT * _norm(b), own.margin)
    solution = min(used.solution(box), plan.solution_norm)
    if plan.checked:
        solution = min(solution, (plan.iterate_norm + plan.rounding + plan.truncation(steps)) * SLACK)
    delta_U, delta_b = U - theirs.U, b - theirs.b
    reach = _norm(box.center.abs() + box.half)
    forming = verified.UNIT * (verified.absolute_norm(delta_U) * reach + _norm(delta_b))
    moved = delta_input = center = 0.0
    if bool(delta_U.any()) or bool(delta_b.any()) or theirs.e_U or theirs.e_b or used.e_b:
        moved = box.norm(delta_U, delta_b, theirs.e_U) + theirs.e_b + used.e_b + forming
        delta_input = verified.spectral_norm(delta_U, theirs.e_U + verified.UNIT * verified.absolute_norm(delta_U))
        inner = delta_U @ box.center + delta_b
        lost = verified.gamma(len(box.center) + 8) * (delta_U.abs() @ box.center.abs() + delta_b.abs())
        center = _norm(inner.abs() + lost * SLACK) + theirs.e_U * reach + theirs.e_b + used.e_b + forming
    delta_W = 0.0
    if not reference.same_weights:
        delta = own.W - theirs.W
        rounding = verified.UNIT * verified.absolute_norm(delta)
        delta_W = verified.spectral_norm(delta, verified.up((own.e_W + theirs.e_W + rounding) * SLACK))
    one = (delta_W * solution + moved) / theirs.margin if theirs.margin > 0 else math.inf
    other = (delta_W * theirs.solution(box) + moved) / own.margin if own.margin > 0 else math.inf
    displacement = min(one, other) * SLACK if delta_W or moved else 0.0
    return Bounds(
        displacement,
        theirs.slip(half_step(grid) + slip) if grid.natural else theirs.slip(slip),
        theirs.slip(slip),
        solution,
        delta_W,
        delta_input * SLACK,
        center * SLACK,
        verified.spectral_norm(theirs.U, theirs.e_U),
        theirs.margin,
    )


def score_bound(reference: Reference, head: tuple[Tensor, Tensor], lost: Tensor, error: float, size: float) -> float:
    """Upper bound over the classes of |score − the reference's|.

    Ṽ ẑ + c̃ + r − (V z* + c) = V (ẑ − z*) + (Ṽ − V) ẑ + (c̃ − c) + r, ‖ẑ − z*‖ <= ``error``, ‖ẑ‖ <= ``size``,
    |r| <= ``lost (k,)``, ``head`` is (Ṽ, c̃).
    """
    assert reference.network.head is not None
    V, c, e_V, e_c = affine64(reference.network.head)
    used, offset = head
    rows, moved = verified.row_norms(V), verified.row_norms(used - V) * SLACK
    each = (rows + e_V) * error + (moved + e_V) * size + (offset - c).abs() + e_c + lost + 4 * verified.UNIT * c.abs()
    return float(each.max()) * SLACK
