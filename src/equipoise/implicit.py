"""Differentiation through an equilibrium (theory §3): the only ``autograd.Function`` of the package.

With v = W z* + q, D = diag(σ'(v)), the gradient g of a loss at z* becomes the gradient y at v by solving
y = D (Wᵀ y + g): the same problem with Wᵀ and the linearized activation, hence the same margin, step and rate
(Theorem 5 of [LLC26]). Upstream of W and q is ordinary autograd, so any parametrization works.
Second derivatives are right, too: the backward problem is again an equilibrium and is attached again.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .activations import Activation, Linearized
from .errors import ConvergenceError, ConvergenceWarning
from .operators import MonotoneOperator
from .solvers import Problem, Solver, Tuning, iterate
from .solvers.loop import Habit

__all__ = ["attach", "equilibrate", "report_failures"]

Solve = Callable[[Problem], Tensor]
"""Problem -> w ``(B, n)``, an equilibrium to the tolerance of its maker."""


@torch.no_grad()
def equilibrate(
    solver: Solver, tuning: Tuning, problem: Problem, tol: float, habit: Habit | None = None
) -> tuple[Tensor, Tensor]:
    """(w ``(B, n)``, done ``(B,)``): equilibria to ``tol`` by the solver's own estimate; a ``habit`` is heeded and
    told how long it took."""
    steps, done, w = iterate(solver, problem, tuning, tol, "bound", habit=habit)
    if habit is not None:
        habit.learn(int(steps.max()))
    return w, done


def report_failures(done: Tensor, value: Tensor, strict: bool, where: str, reached: str = "") -> None:
    """Warn of the samples that are not ``done``, or raise where ``strict``; ``reached`` says how far they came."""
    if bool(done.all()):
        return
    failed = int((~done).sum())
    overflowed = int((~torch.isfinite(value).all(dim=1)).sum())
    message = (
        f"{where}: {failed} of {len(done)} samples did not reach the tolerance"
        + (f", {overflowed} of them overflowed" if overflowed else "")
        + (reached or "; raise the solver's max_steps or tol, or look at layer.solve(x).converged and the margin")
    )
    if strict:
        raise ConvergenceError(message)
    warnings.warn(message, ConvergenceWarning, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """``stacklevel`` of the first frame above torch and this package: a warning names the user's line."""
    own = tuple(os.path.dirname(os.path.abspath(path)) + os.sep for path in (torch.__file__, __file__))
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and os.path.abspath(frame.f_code.co_filename).startswith(own):
        level, frame = level + 1, frame.f_back
    return level


def attach(q: Tensor, w: Tensor, activation: Activation, operator: MonotoneOperator, solve_adjoint: Solve) -> Tensor:
    """p = σ(W w + q), differentiable as the equilibrium of (W, q) that w approximates.

    ``q``, ``w`` are ``(B, n)``; ``operator.tensors()`` carries the graph of the weights; ``solve_adjoint`` solves
    the backward problem.
    """
    with torch.no_grad():
        v = operator.apply(w) + q
    slopes = activation.slopes if isinstance(activation, Linearized) else None
    result: Tensor = _Implicit.apply(  # type: ignore[no-untyped-call]
        q, slopes, v, activation, operator, solve_adjoint, *operator.tensors()
    )
    return result


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        slopes: Tensor | None,
        v: Tensor,
        activation: Activation,
        operator: MonotoneOperator,
        solve_adjoint: Solve,
        *tensors: Tensor,
    ) -> Tensor:
        z = activation(v)
        ctx.save_for_backward(q, slopes, v, z, *tensors)  # the weights too: changing them in between is noticed
        ctx.activation, ctx.operator, ctx.solve_adjoint = activation, operator, solve_adjoint
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, slopes, v, z, *_ = ctx.saved_tensors
        operator, transposed = ctx.operator, ctx.operator.transposed()
        again = torch.is_grad_enabled()  # create_graph: second derivatives may be asked for
        with torch.autocast(grad.device.type, enabled=False):
            if again:
                v = operator.apply(z) + q
            slope = ctx.activation.derivative(v) if slopes is None else slopes
            adjoint = Linearized(slope.detach())
            w = ctx.solve_adjoint(Problem(transposed, grad.detach().contiguous(), adjoint))
            if again:
                y = attach(grad, w, Linearized(slope), transposed, ctx.solve_adjoint)
            else:
                y = adjoint(transposed.apply(w).add_(grad))
            grad_slopes = None
            if slopes is not None and ctx.needs_input_grad[1]:
                grad_slopes = (transposed.apply(y) + grad) * v
            grads = operator.pullback(y, z) if any(ctx.needs_input_grad[6:]) else (None,) * len(operator.tensors())
        return y, grad_slopes, None, None, None, None, *grads
