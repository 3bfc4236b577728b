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

from .activations import Activation
from .errors import ConvergenceError, ConvergenceWarning, StructureError
from .linearized import Linearized
from .operators import FixedPointMap, MonotoneOperator
from .solvers import Problem, Solver, Tuning, iterate
from .solvers.loop import Habit

__all__ = ["AdjointMap", "attach", "attach_map", "equilibrate", "report_failures"]

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
            if again:
                grad = grad.contiguous()
            elif grad.stride() != v.stride():  # as its operator lays states out
                grad = torch.empty_like(v).copy_(grad)
            w = ctx.solve_adjoint(Problem(transposed, grad.detach(), adjoint))
            if again:
                y = attach(grad, w, Linearized(slope), transposed, ctx.solve_adjoint)
            else:
                y = adjoint(transposed.apply(w).add_(grad))
            grad_slopes = None
            if slopes is not None and ctx.needs_input_grad[1]:
                grad_slopes = (transposed.apply(y) + grad) * v
            grads = operator.pullback(y, z) if any(ctx.needs_input_grad[6:]) else (None,) * len(operator.tensors())
        return y, grad_slopes, None, None, None, None, *grads


class AdjointMap(FixedPointMap):
    """y ↦ Jᵀ y + g, J the Jacobian at an equilibrium of a map z ↦ f(z): it contracts where f does, as fast.

    ``image`` = f(``point``), both ``(B, n)``, is kept with its graph, and products with Jᵀ are asked of autograd.
    """

    def __init__(self, image: Tensor, point: Tensor, grad: Tensor, rows: Tensor | None = None) -> None:
        self.image, self.at, self.grad, self.rows = image, point, grad, rows

    def start(self) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(self.grad), self.grad.clone()

    def __call__(self, u: Tensor, out: Tensor | None = None) -> Tensor:
        whole = u if self.rows is None else torch.zeros_like(self.at).index_copy_(0, self.rows, u)
        with torch.enable_grad():
            (product,) = torch.autograd.grad(self.image, self.at, whole, retain_graph=True)
        return (product if self.rows is None else product[self.rows]).add(self.grad)

    def point(self, u: Tensor) -> Tensor:
        return u

    def select(self, rows: Tensor) -> AdjointMap:
        kept = torch.arange(len(self.grad), device=self.grad.device) if self.rows is None else self.rows
        return AdjointMap(self.image, self.at, self.grad[rows], kept[rows])


def attach_map(image: Tensor, point: Tensor, solve_adjoint: Callable[[AdjointMap], Tensor]) -> Tensor:
    """``image``, differentiable as the fixed point of z ↦ f(z) that it approximates.

    ``image`` = f(``point``) ``(B, n)`` carries its graph, ``point`` is a leaf of it that requires a gradient. The
    gradient g at the fixed point becomes the solution of y = Jᵀ y + g, and goes on along that graph to whatever else f
    depends on. Second derivatives are not to be had: asking for them raises :class:`StructureError`.
    """

    def adjoint(grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        if torch.is_grad_enabled():
            raise StructureError("second derivatives through this equilibrium are not known; leave create_graph out")
        with torch.autocast(grad.device.type, enabled=False):
            return solve_adjoint(AdjointMap(image, point, grad.contiguous()))

    result = image.view_as(image)
    if result.requires_grad:
        result.register_hook(adjoint)
    return result
