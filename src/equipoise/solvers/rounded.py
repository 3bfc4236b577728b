"""Iterates kept on a grid: a splitting whose every iterate is rounded, as few-bit memory would (theory §5, C2)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from ..errors import OptionError
from ..linearized import Linearized
from ..operators import FixedPointMap, MonotoneOperator
from .forward_backward import ForwardBackward, ForwardBackwardMap
from .loop import Solver, State, Tuning
from .peaceman_rachford import DouglasRachford, PeacemanRachford, PeacemanRachfordMap
from .problem import Problem

__all__ = ["Rounded"]

SPLITTINGS = ForwardBackward, PeacemanRachford, DouglasRachford


@final
@dataclass(frozen=True)
class Rounded(Solver):
    """The splitting ``on`` with every iterate rounded to the grid δ_k ℤ, δ_k = ``grid`` · ``decay``ᵏ [LLC26].

        uᵏ⁺¹ = round(T(uᵏ)) = T(uᵏ) + eᵏ,   ‖eᵏ‖₂ <= ε_k = √n δ_k / 2,

    entry by entry, ties to even, in the splitting's own variable u (z = prox_{αf}(u) is 1-Lipschitz in it). With r < 1
    the factor of T (C2):

    - ``decay=None``, a fixed grid: limsup ‖uᵏ − u*‖ <= ε/(1 − r), and u* itself is not reached in general;
    - 0 < ``decay`` = γ < 1, an adaptive grid: uᵏ → u*, with
      ‖uᵏ − u*‖ <= rᵏ ‖u⁰ − u*‖ + Σ_{j<k} r^{k−1−j} ε_j, where the sum is ε₀ (rᵏ − γᵏ)/(r − γ).

    ``certificates.iterate_floor`` proves these with the rounding of the arithmetic counted.

    The loop sees ‖T(u) − u‖ before rounding, so a coarse grid does not look like convergence. On a fixed grid an
    iterate that repeats itself can change no more: the sample ends and is judged as it is by the a-posteriori bound,
    or, where nothing judges (a layer's ``forward``), counts as done. Iterates that run in a cycle, as those of
    Peaceman–Rachford often do, use up the budget. An entry whose grid is finer than its own last bit stays as it is.
    The transposed problem of a gradient is not rounded: its scale is the loss's, not the grid's.

    Args:
        on: ForwardBackward, PeacemanRachford or DouglasRachford; the step alpha is given to it.
        grid: δ₀, a finite number above 0; a power of two adds no rounding of its own.
        decay: γ, or None for a fixed grid.
        max_steps, check_every: as of every solver.
    """

    alpha: float | None = field(default=None, kw_only=True)
    max_steps: int | None = field(default=None, kw_only=True)
    check_every: int | None = field(default=None, kw_only=True)
    on: Solver
    grid: float
    decay: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.on) not in SPLITTINGS:  # what is proved is of these, not of what may be derived from them
            given = type(self.on).__name__ if isinstance(self.on, Solver) else repr(self.on)
            names = ", ".join(f"{kind.__name__}()" for kind in SPLITTINGS)
            raise OptionError(f"Rounded acts on a splitting that is proved to contract, one of {names}; not on {given}")
        for name in ("alpha", "max_steps", "check_every"):
            here, there = (self, self.on) if name == "alpha" else (self.on, self)
            if getattr(here, name) is not None:
                raise OptionError(f"give {name} to {type(there).__name__}, not to {type(here).__name__}")
        if not (_is_number(self.grid) and 0 < self.grid < math.inf):
            raise OptionError(f"Rounded grid is {self.grid!r}; it is a spacing, a finite number above 0")
        if self.decay is not None and not (_is_number(self.decay) and 0 < self.decay < 1):
            raise OptionError(
                f"Rounded decay is {self.decay!r}; it is a factor between 0 and 1, or None for a fixed grid"
            )

    def tune(self, operator: MonotoneOperator) -> Tuning:
        return self.slowed(self.on.tune(operator))

    def slowed(self, tuning: Tuning) -> Tuning:
        """The splitting's tuning, no faster than the grid shrinks."""
        decay = 0.0 if self.decay is None else self.decay
        rate, pace = (None if value is None else max(value, decay) for value in (tuning.rate, tuning.pace))
        return tuning._replace(rate=rate, pace=pace)

    def map(self, problem: Problem, tuning: Tuning) -> FixedPointMap:
        return self.on.map(problem, tuning)

    def init(self, fixed_point: FixedPointMap) -> State:
        assert isinstance(fixed_point, (ForwardBackwardMap, PeacemanRachfordMap))
        u, image = fixed_point.start()
        if isinstance(fixed_point.problem.activation, Linearized):  # a gradient
            return State(u, image)
        return self._state(u, image, torch.zeros(len(u), 1, dtype=torch.int64, device=u.device))

    def step(self, fixed_point: FixedPointMap, state: State) -> State:
        if not state.memory:
            return self.on.step(fixed_point, state)
        (k,) = state.memory
        return self._state(state.image, fixed_point(state.image, out=state.current), k + 1)

    def _state(self, u: Tensor, image: Tensor, k: Tensor) -> State:
        """u, T(u) and the step's number ``k (B, 1)``: T(u) rounded, with T(u) − u kept as image − current."""
        rounded = _round(image, self._spacing(k, image))
        current = u + (rounded - image)
        if self.decay is None:
            current = torch.where((rounded == u).all(1, keepdim=True), rounded, current)
        return State(current, rounded, (k,))

    def _spacing(self, k: Tensor, like: Tensor) -> Tensor:
        """δ_k for every sample, in the dtype of ``like``."""
        power = torch.ones_like(k, dtype=torch.float64) if self.decay is None else self.decay ** k.double()
        return (self.grid * power).clamp_(max=torch.finfo(like.dtype).max).to(like.dtype)


def _round(u: Tensor, spacing: Tensor) -> Tensor:
    """The multiple of ``spacing`` nearest to u, ties to even; u where its own last bit is worth more."""
    ratio = u / spacing
    fine = ratio.abs() < 1 / torch.finfo(u.dtype).eps  # false of NaN as well, where u or the spacing is none
    return torch.where(fine, ratio.round().mul_(spacing), u)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
