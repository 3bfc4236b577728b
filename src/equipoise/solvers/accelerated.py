"""What Anderson and Broyden share: a splitting to accelerate, and a safeguard that keeps its guarantee.

Nothing proves that an accelerated step helps (theory §2). So a step that does not lower ‖T(u) − u‖ of its
sample is thrown away together with what was learned: that sample continues with a plain step of the
splitting from its best point, which does lower it. Every sample is treated by itself.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError
from ..norms import Euclidean
from ..operators import FixedPointMap, MonotoneOperator
from .loop import Solver, State, Tuning
from .peaceman_rachford import PeacemanRachford
from .picard import Picard
from .problem import MapProblem, Problem
from .rounded import Rounded

__all__ = ["Accelerated", "push"]

DEEPEST = 1000
"""Steps worth remembering, each at the cost of two iterates of memory: a file may ask for any number."""


@dataclass(frozen=True)
class Accelerated(Solver):
    """Base of the accelerated solvers; ``on`` is the splitting whose map is accelerated, ``memory`` its depth.

    Without ``safeguard`` every step is taken, as is usual where the map is not known to contract.
    """

    on: Solver | None = None
    memory: int = 5
    safeguard: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.memory, bool) or not isinstance(self.memory, int) or not 1 <= self.memory <= DEEPEST:
            raise OptionError(
                f"{type(self).__name__} memory is {self.memory!r}; it is a positive integer, at most {DEEPEST}"
            )
        if not isinstance(self.safeguard, bool):
            raise OptionError(f"{type(self).__name__} safeguard is {self.safeguard!r}; it is True or False")
        if self.on is not None and (not isinstance(self.on, Solver) or isinstance(self.on, (Accelerated, Rounded))):
            raise OptionError(
                f"{type(self).__name__} acts on a splitting such as ForwardBackward(), not on {self.on!r}"
            )
        if self.on is not None and self.alpha is not None:
            raise OptionError(f"give alpha to the splitting {type(self.on).__name__}, not to {type(self).__name__}")

    def splitting(self, operator: MonotoneOperator) -> Solver:
        """``on``, or what converges on this operator: Peaceman–Rachford, in a weighted maximum norm Picard."""
        if self.on is not None:
            return self.on
        kind = PeacemanRachford if isinstance(operator.family, Euclidean) else Picard
        return kind(alpha=self.alpha)

    def tune(self, operator: MonotoneOperator) -> Tuning:
        return self.splitting(operator).tune(operator)

    def map(self, problem: Problem | MapProblem, tuning: Tuning) -> FixedPointMap:
        if isinstance(problem, MapProblem):
            return (self.on or Picard()).map(problem, tuning)
        return self.splitting(problem.operator).map(problem, tuning)

    @abstractmethod
    def blank(self, u: Tensor) -> tuple[Tensor, ...]:
        """Empty memory for ``u (B, k)``: zero tensors, batch first."""

    @abstractmethod
    def learn(self, memory: tuple[Tensor, ...], du: Tensor, dr: Tensor) -> None:
        """Write down that moving u by ``du (B, k)`` moved the residual by ``dr``; rows of zeros teach nothing."""

    @abstractmethod
    def propose(self, memory: tuple[Tensor, ...], u: Tensor, residual: Tensor) -> Tensor:
        """The next point from the best one; exactly u + residual where the memory is blank."""

    def init(self, fixed_point: FixedPointMap) -> State:
        current, image = fixed_point.start()
        return State(current, image, (current, image - current, *self.blank(current)))

    def step(self, fixed_point: FixedPointMap, state: State) -> State:
        best, best_residual, *learned = state.memory
        residual = state.image - state.current
        size, best_size = (fixed_point.length(r)[:, None] for r in (residual, best_residual))
        accepted = size <= best_size if self.safeguard else torch.ones_like(size, dtype=torch.bool)
        du = torch.where(accepted, state.current - best, 0.0)
        dr = torch.where(accepted, residual - best_residual, 0.0)
        for tensor in learned:
            tensor.masked_fill_(~accepted[:, :, None], 0.0)
        memory = tuple(learned)
        self.learn(memory, du, dr)
        best = torch.where(accepted, state.current, best)
        best_residual = torch.where(accepted, residual, best_residual)
        current = self.propose(memory, best, best_residual)
        return State(current, fixed_point(current), (best, best_residual, *memory))


def push(memory: Tensor, row: Tensor) -> None:
    """Drop the oldest of ``memory (B, depth, k)`` and append ``row (B, k)``, in place."""
    memory[:, :-1] = memory[:, 1:].clone()
    memory[:, -1] = row
