"""What every equilibrium layer holds besides its weights: σ, a solver, its tolerances, and gradients through it."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..activations import Activation, as_activation
from ..implicit import attach, equilibrate, report_failures
from ..operators import MonotoneOperator
from ..quantization.schemes import Scheme
from ..solvers import Problem, Solver, Tuning
from .arguments import check_solver, check_tol
from .cache import Derived
from .memory import Memory

__all__ = ["TOLERANCE", "Options", "SolvingLayer"]

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Of a layer that was given none; a layer of another dtype cannot solve."""


@dataclass(frozen=True)
class Options:
    """The options that all layers take, as :class:`equipoise.MonDEQ` explains them."""

    activation: Activation | str
    solver: Solver
    tol: float | None
    backward_tol: float | None
    training_tol: float | None
    strict: bool


class SolvingLayer(nn.Module, ABC):
    """A layer whose output is the solution of z = σ(W z + q): the abstract base of those on vectors and on images."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.activation, self.solver = as_activation(options.activation), check_solver(options.solver)
        self.tol, self.backward_tol, self.training_tol = (
            None if value is None else check_tol(value)
            for value in (options.tol, options.backward_tol, options.training_tol)
        )
        self.strict = options.strict
        self.scheme: Scheme | None = None
        self._derived = Derived()
        self.training_memory: Memory | None = None  # of the last steps; no part of the state

    def forget_tuning(self) -> None:
        """Have the next call search for the solver's step, as in a process that goes on from a checkpoint."""
        self._derived, self.training_memory = Derived(), None

    def _tolerance(self, dtype: torch.dtype) -> float:
        """Of ``forward``, as the mode is."""
        if self.training and self.training_tol is not None:
            return self.training_tol
        return TOLERANCE[dtype] if self.tol is None else self.tol

    def _attached(
        self, q: Tensor, w: Tensor, sigma: Activation, operator: MonotoneOperator, tuning: Tuning, memory: Memory | None
    ) -> Tensor:
        """z = σ(W w + q) of a solve's ``w (B, n)``, whose gradients are solved for by the same solver (theory §3)."""
        tol = self._tolerance(q.dtype) if self.backward_tol is None else self.backward_tol

        def back(adjoint: Problem) -> Tensor:
            y, settled = equilibrate(self.solver, tuning, adjoint, tol, memory.backward if memory else None)
            report_failures(settled, y, self.strict, "backward")
            return y

        return attach(q, w, sigma, operator, back)
