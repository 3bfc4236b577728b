"""What a layer remembers from one step of training to the next, while its weights move little.

It saves searching for a step, inverting a matrix and looking at iterates that cannot have converged yet. A solve still
ends by its tolerance, and an inverse carried over is right to a tenth of it; proofs never use one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..operators import DenseOperator
from ..solvers import Tuning
from ..solvers.loop import Habit

__all__ = ["Memory"]

REFRESH = 50, 800
"""The solver's step is searched for again after 50 calls, then 100, 200, … up to every 800: weights move less and
less, and a search costs as much as some twenty steps of training."""

DRIFT = 0.3
"""It is searched for at once where the weights moved by this part of their norm since."""

INEXACT = 0.1
"""Part of the forward tolerance that an inverse carried over from the last step may be wrong by."""


@dataclass
class Memory:
    """A tuning, the weights it was found for, when it expires and its age in calls; the last Cayley transform; and
    where the forward and the backward solves tend to end."""

    tuning: Tuning
    weight: Tensor
    limit: int
    age: int = 0
    cayley: Tensor | None = None
    forward: Habit = field(default_factory=Habit)
    backward: Habit = field(default_factory=Habit)

    @classmethod
    def after(cls, before: Memory | None, tuning: Tuning, weight: Tensor) -> Memory:
        """A new memory; one that follows another lasts twice as long."""
        limit = REFRESH[0] if before is None else min(2 * before.limit, REFRESH[1])
        return cls(tuning, weight.detach().clone(), limit)

    @classmethod
    def of(cls, tuning: Tuning, operator: DenseOperator, before: Memory | None) -> Memory:
        """:meth:`after` another one, for a dense operator."""
        return cls.after(before, tuning, operator.weight)

    def lasts(self, now: Tensor) -> bool:
        """Whether it is young enough, and for weights like ``now`` that moved little since."""
        then = self.weight
        alike = now.dtype == then.dtype and now.device == then.device and now.shape == then.shape
        if not (alike and self.age < self.limit):
            return False
        norm = torch.linalg.vector_norm
        center = then if then.ndim == 2 else then[:, :, then.shape[2] // 2, then.shape[3] // 2]
        size = norm(then).maximum(norm(center.diagonal() - 1))  # W may be small where I − W is not
        return bool(norm(now.detach() - then) <= DRIFT * size)

    def carry(self, operator: DenseOperator, tol: float) -> None:
        """Begin with new weights: heed the habits, and hand ``operator`` the last Cayley transform to start from if it
        leads to one right to ``tol``."""
        self.forward.plan()
        self.backward.plan()
        if self.cayley is not None:
            operator.refine_cayley(self.tuning.alpha, self.cayley, INEXACT * tol)

    def keep(self, operator: DenseOperator) -> None:
        """Remember the Cayley transform that ``operator`` formed, if it did."""
        self.age += 1
        self.cayley = operator.formed_cayley(self.tuning.alpha)
