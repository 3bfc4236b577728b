"""Boxes through an equilibrium: the mixed-monotone system as one more equilibrium of twice the size (theory §7, [D22]).

With W⁺ the diagonal and the non-negative off-diagonal entries of W, W⁻ the others, the bounds lo, hi of z* over all
injections in [q_lo, q_hi] solve lo = σ(W⁺ lo + W⁻ hi + q_lo), hi = σ(W⁺ hi + W⁻ lo + q_hi). For u = (−lo, hi) that is

    u = σ̂(𝕎 u + q̂),    𝕎 = [[W⁺, |W⁻|], [|W⁻|, W⁺]],    q̂ = (−q_lo, q_hi),    σ̂(a, b) = (−σ(−a), σ(b)),

with the measure of W in the same weights: the solvers and the implicit gradients of a layer serve its boxes, too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import StructureError
from ..implicit import attach, equilibrate, report_failures
from ..linearized import Mirrored
from ..norms import WeightedMax
from ..operators import DenseOperator
from ..solvers import Problem, Solver, Tuning, tuned
from .equilibrium import EquilibriumLayer, solver_in_rows
from .linear import PreparedLinear, QuantizedLinear, affine
from .memory import Memory

__all__ = ["box_equilibrium", "box_linear", "doubled"]


def doubled(W: Tensor) -> Tensor:
    """𝕎 ``(2n, 2n)`` of W ``(n, n)``, with its graph; no entry is rounded."""
    diagonal = torch.diag(W.diagonal())
    off = W - diagonal
    plus, minus = off.clamp_min(0) + diagonal, (-off).clamp_min(0)
    return torch.cat((torch.cat((plus, minus), 1), torch.cat((minus, plus), 1)))


def box_equilibrium(
    layer: EquilibriumLayer,
    low: Tensor,
    high: Tensor,
    tol: float = 1e-4,
    family: WeightedMax | None = None,
    report: bool = True,
) -> tuple[Tensor, Tensor]:
    """(lo, hi) ``(B, n)`` of the layer's states over injections in [``low``, ``high``] ``(B, n)``, to ``tol``.

    Differentiable in the box and in the weights (implicitly). Bounds to the solver's tolerance, not a proof:
    :func:`equipoise.interval` proves. ``family``: the norm to solve in, by default the layer's own; ``report``: say
    where the tolerance was not reached.
    """
    operator = layer.operator
    family = operator.family if family is None and isinstance(operator.family, WeightedMax) else family
    if family is None:
        raise StructureError(f"boxes need weights that contract in a maximum norm; {type(layer).__name__} has none")
    twice = WeightedMax(torch.cat((family.eta, family.eta)))
    wide = DenseOperator(doubled(operator.weight), family=twice)
    rows = operator.row_margins() if operator.family is family else family.row_margins(*operator.matrix64())
    wide.once("row_margins", lambda: torch.cat((rows, rows)))
    wide.once("averaging_step", operator.averaging_step)
    activation, q = Mirrored(layer.activation), torch.cat((-low, high), 1)
    trains = layer.training and wide.weight.requires_grad
    solver = solver_in_rows(layer.activation)
    tuning, memory = _tuned(layer, solver, wide, activation, q, trains)
    problem = Problem(wide, q.detach(), activation)
    w, done = equilibrate(solver, tuning, problem, tol, memory.forward if memory else None)
    if report:
        report_failures(done, w, layer.strict, "a box")
    if not (q.requires_grad or wide.weight.requires_grad):
        u = activation(wide.apply(w) + q)
    else:

        def back(adjoint: Problem) -> Tensor:
            y, settled = equilibrate(solver, tuning, adjoint, tol, memory.backward if memory else None)
            report_failures(settled, y, layer.strict, "the gradient of a box")
            return y

        u = attach(q, w, activation, wide, back)
    lo, hi = u.chunk(2, 1)
    return -lo, hi


def _tuned(
    layer: EquilibriumLayer, solver: Solver, wide: DenseOperator, activation: Mirrored, like: Tensor, trains: bool
) -> tuple[Tuning, Memory | None]:
    """The solver's tuning, in training one of a few calls ago; its step is always that of the weights at hand."""
    if not trains:
        return tuned(solver, wide, activation, like), None
    memory = layer.box_memory
    if memory is None or not memory.lasts(wide.weight):
        memory = layer.box_memory = Memory.of(tuned(solver, wide, activation, like), wide, memory)
    memory.age += 1
    memory.forward.plan()
    memory.backward.plan()
    return memory.tuning._replace(alpha=wide.averaging_step()), memory


def box_linear(
    module: nn.Linear | QuantizedLinear | PreparedLinear, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """The box of W x + b over x in [``low``, ``high``], as computed; differentiable."""
    weight, bias = affine(module)
    center, radius = (low + high) / 2, (high - low) / 2
    middle, spread = linear(center, weight, bias), linear(radius, weight.abs())
    return middle - spread, middle + spread
