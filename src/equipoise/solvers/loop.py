"""The one loop every solver runs in, what it solves, and what it returns.

A solver is a frozen set of hyperparameters that turns a :class:`Problem` into a fixed-point map and says
how to step on it (``init`` / ``step``). The loop looks at the iterates every few steps, on a schedule that
depends on the operator and the tolerance but not on the batch, so that a sample's answer does not depend
on its company; only in training a :class:`Habit`, learned from the steps before, is heeded instead. A sample that
looks finished is judged by the a-posteriori bound of :mod:`.posterior`; if it passes it is written down and leaves
the batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import OptionError
from ..norms import lengths
from ..operators import FixedPointMap, MonotoneOperator
from .problem import Equation

__all__ = ["Habit", "Solver", "State", "Stop", "Tuning", "Verdict", "check_alpha", "iterate", "proved_factor"]

Stop = Literal["bound", "residual"]

MAX_STEPS = 20_000
"""A budget no default exceeds; a solver's own ``max_steps`` may."""

PATIENCE = 4
"""Solves that end at a habit's first look before it comes a step earlier."""

SMALL = 2**15
"""Entries of an iterate below which finished samples are carried along: sorting them out would cost more."""


class Tuning(NamedTuple):
    """What a solver derives from an operator once: its step, its rate, and how to read its residual.

    ``rate`` is the computed contraction factor (None where nothing is known); ``gain`` turns ‖T(u) − u‖ into an
    estimate of ‖z − z*‖ (None where no margin is proved: then ‖T(u) − u‖ itself is compared with the tolerance);
    ``keen`` is an optimistic gain, for those who measure the error before they believe it. ``pace`` and ``lead``
    are what a trial run saw: its contraction per step, and its relative error after one step. All choose steps
    and say when to look; they certify nothing.
    """

    alpha: float
    rate: float | None
    gain: float | None
    keen: float | None = None
    pace: float | None = None
    lead: float = 1.0


class State(NamedTuple):
    """The point where T was evaluated last, its image, and a solver's own memory (batch first)."""

    current: Tensor
    image: Tensor
    memory: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Solver(ABC):
    """Hyperparameters of a solver.

    Args:
        alpha: step; None takes the best one from the operator.
        max_steps: budget; None takes it from the rate (at most 20,000).
        check_every: steps between two looks at the residual; None takes it from the rate.
    """

    alpha: float | None = None
    max_steps: int | None = None
    check_every: int | None = None

    def __post_init__(self) -> None:
        check_alpha(self.alpha, type(self).__name__)
        for name in ("max_steps", "check_every"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise OptionError(f"{type(self).__name__} {name} is {value!r}; it is a positive integer or None")

    @abstractmethod
    def tune(self, operator: MonotoneOperator) -> Tuning:
        """Step, rate and gain for this operator; called once per weights."""

    def factor(self, operator: MonotoneOperator, alpha: float) -> float | None:
        """A bound of the factor by which one step of length ``alpha`` shrinks the distance to the equilibrium, derived
        from the operator's proved constants with every rounding counted; None where nothing is proved.

        Certificates print it of this library's solvers only: of others they would have to take its word.
        """
        return None

    @abstractmethod
    def map(self, problem: Any, tuning: Tuning) -> FixedPointMap:
        """The fixed-point map this solver iterates on a :class:`Problem`; some solvers take a :class:`MapProblem`."""

    def init(self, fixed_point: FixedPointMap) -> State:
        return State(*fixed_point.start())

    def step(self, fixed_point: FixedPointMap, state: State) -> State:
        """One plain step: evaluate T at the last image, reusing the older buffer."""
        return State(state.image, fixed_point(state.image, out=state.current))

    def to_dict(self) -> dict[str, Any]:
        """Name and options as plain values (files carry it)."""
        options = {
            field.name: value.to_dict() if isinstance(value := getattr(self, field.name), Solver) else value
            for field in fields(self)
        }
        return {"name": type(self).__name__, **options}


def proved_factor(value: float) -> float | None:
    """A factor that a closed formula of a dozen roundings gave, rounded up; None unless it is below 1."""
    bound = value * (1 + 2.0**-45) + 2.0**-52
    return bound if bound < 1 else None


def check_alpha(alpha: float | None, owner: str) -> None:
    if alpha is not None and not (
        isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and math.isfinite(alpha) and alpha > 0
    ):
        raise OptionError(f"{owner} alpha is {alpha!r}; it is a finite number above 0, or None to choose it")


@dataclass
class Habit:
    """Where a solve that is repeated on slowly changing problems is worth a first look: where the last ones ended.

    A look that comes too late costs steps, one too early a look: after four solves that ended at the first look it
    comes a step earlier. What is learned is heeded once it is planned, so that the same problem is solved in the same
    steps until then.
    """

    first: int | None = None
    streak: int = 0
    planned: int | None = None

    def plan(self) -> None:
        """Heed from now on what was learned so far."""
        self.planned = self.first

    def learn(self, steps: int) -> None:
        """Take in that a solve ended after ``steps``."""
        if self.first is not None and steps <= self.first:
            self.streak += 1
            if self.streak == PATIENCE:
                self.first, self.streak = max(self.first - 1, 1), 0
        else:
            self.first, self.streak = steps, 0


class Schedule(NamedTuple):
    """When to look: at step ``first`` and every ``every`` steps after it, never past ``last``."""

    first: int
    every: int
    last: int

    @classmethod
    def of(cls, solver: Solver, tuning: Tuning, tol: float, measured: bool, habit: Habit | None = None) -> Schedule:
        """First look where a trial run, or a habit, suggests; a budget well above the a-priori count.

        Where a judge measures errors the first look is early, since what it measures makes the next ones sharp;
        where nobody does, early looks would only cost.
        """
        expected, horizon = 30.0, None
        if tuning.rate is not None and 0 < tuning.rate < 1:
            horizon = min(math.log(min(tol, 0.5)) / math.log(tuning.rate), 1e7)
            expected = horizon / 2
        if tuning.pace is not None:
            expected = max(math.log(min(tol / tuning.lead, 0.9)) / math.log(tuning.pace), 2.0)
        expected = min(expected, MAX_STEPS / 2)
        first = solver.check_every or max(2, math.floor((0.65 if measured else 1.1) * expected))
        every = solver.check_every or max(2, math.ceil((0.1 if measured else 0.2) * expected))
        if habit is not None and habit.planned is not None and solver.check_every is None:
            first, every = habit.planned, 2
        budget = MAX_STEPS // 10 if horizon is None else min(MAX_STEPS, math.ceil(3 * horizon) + 100)
        return cls(first, every, solver.max_steps or min(max(budget, 2 * first), MAX_STEPS))

    def looks(self, step: int) -> bool:
        return step >= self.last or (step >= self.first and (step - self.first) % self.every == 0)


class Verdict(NamedTuple):
    """A judge's word on the rows it was shown: which are ``done (B,)``, the absolute ``error (B,)`` it measured,
    and what to write down."""

    done: Tensor
    error: Tensor
    results: tuple[Tensor, ...]


Judge = Callable[[Any, Tensor], Verdict]
"""(problem, w) -> verdict."""


def iterate(
    solver: Solver,
    problem: Equation,
    tuning: Tuning,
    tol: float,
    stop: Stop,
    judge: Judge | None = None,
    habit: Habit | None = None,
) -> tuple[Tensor, ...]:
    """Run the loop. Returns (steps (B,), done (B,), results...): what ``judge`` wrote down, or without one w.

    A sample ends when the judge passes it, when its iterates stop moving in floating point or are no longer
    finite, or when the budget is spent; the last three are judged as they are. Without a judge the solver's own
    estimate decides, and a sample that stands still counts as done. A ``habit`` says when to look first.
    """
    rows, width = len(problem.injection), problem.width()
    if rows <= width:
        return _Run(solver, problem, tuning, tol, stop, judge, habit).run()
    chunks = [
        _Run(solver, problem.select(slice(begin, begin + width)), tuning, tol, stop, judge, habit).run()
        for begin in range(0, rows, width)
    ]
    return tuple(torch.cat(column) for column in zip(*chunks, strict=True))


class _Run:
    """One chunk's way through the loop: the batch that is still computed, and the results written down."""

    def __init__(
        self,
        solver: Solver,
        problem: Equation,
        tuning: Tuning,
        tol: float,
        stop: Stop,
        judge: Judge | None,
        habit: Habit | None,
    ) -> None:
        self.solver, self.problem, self.tuning, self.tol, self.judge = solver, problem, tuning, tol, judge
        self.schedule = Schedule.of(solver, tuning, tol, judge is not None, habit)
        self.total = len(problem.injection)
        gain = tuning.gain if judge is None or tuning.keen is None else tuning.keen
        largest = torch.finfo(problem.injection.dtype).max  # with a larger one no estimate would say more
        self.first_gain = min(gain, largest) if stop == "bound" and gain is not None else 1.0
        self.results: list[Tensor] = []
        self.fixed_point = solver.map(problem, tuning)
        self.state = solver.init(self.fixed_point)

    def _open(self) -> None:
        """Begin to keep books on the samples, one by one."""
        q = self.problem.injection
        self.rows = torch.arange(self.total, device=q.device)
        self.alive = torch.ones(self.total, dtype=torch.bool, device=q.device)
        self.gain = q.new_full((self.total,), self.first_gain)
        self.still = 4 * torch.finfo(q.dtype).eps
        # the step from which on each sample is looked at again, by its own forecast, and the earliest of them
        self.due = self.rows.new_zeros(self.total)
        self.earliest = 0
        self.pace = -math.log(self.tuning.pace) if self.tuning.pace is not None else math.inf

    def run(self) -> tuple[Tensor, ...]:
        first, last = min(self.schedule.first, self.schedule.last), self.schedule.last
        for _ in range(1, first):
            self.state = self.solver.step(self.fixed_point, self.state)
        if self.judge is None and (settled := self._settled()) is not None:
            q = self.problem.injection
            steps = torch.full((self.total,), first, device=q.device)
            return steps, torch.ones(self.total, dtype=torch.bool, device=q.device), settled
        self._open()
        for step in range(first, last + 1):
            if step > first:
                self.state = self.solver.step(self.fixed_point, self.state)
            if self.schedule.looks(step) and (step >= self.earliest or step >= last) and self._look(step):
                break
        return tuple(self.results)

    def _settled(self) -> Tensor | None:
        """The estimates w if every sample is within the tolerance, as far as the solver can tell: one look at all."""
        move = lengths(self.state.image - self.state.current)
        w = self.fixed_point.point(self.state.image)
        size = lengths(w)
        # an overflow is no convergence, and NaN compares as false
        ready = (move * self.first_gain <= size * self.tol) & (size < math.inf)
        return w if bool(ready.all()) else None

    def _look(self, step: int) -> bool:
        """Write down the samples that are finished; True when none is left."""
        move = lengths(self.state.image - self.state.current)
        w = self.fixed_point.point(self.state.image)
        size = lengths(w)
        due = self.due <= step
        ready = due & (self.gain * move <= self.tol * size) & (size < math.inf)  # an overflow is no convergence
        reach = lengths(self.state.image)
        still = (move <= self.still * reach) & (reach < math.inf)
        hopeless = due & (~torch.isfinite(move) | still)
        if step >= self.schedule.last:
            hopeless = torch.ones_like(hopeless)
        if self.judge is None:
            # relative to an answer of 0 nothing is small; but 0 is the answer where σ(q) = 0
            settled = ready | (due & (still | (self.problem.vanishing() & (size == 0))))
            self._record(torch.full_like(self.rows, step), settled, w)
            self.alive = self.alive & ~(settled | hopeless)
        else:
            self._judge(step, self.judge, w, move, ready, hopeless)
        left = int(self.alive.sum())
        if left:
            self._forecast(step, self.gain * move / (self.tol * size))
        if 0 < left < 0.6 * len(self.alive) and self.state.image.numel() > SMALL:
            self._compact()
        return left == 0

    def _record(self, *columns: Tensor) -> None:
        """Write columns down for the samples still alive; a later look overwrites those it leaves alive."""
        if not self.results:
            self.results = [column.clone() for column in columns]
        elif len(self.rows) == self.total:
            masks = (self.alive.view(-1, *[1] * (column.ndim - 1)) for column in columns)
            self.results = [
                torch.where(mask, new, old) for mask, new, old in zip(masks, columns, self.results, strict=True)
            ]
        else:
            for target, column in zip(self.results, columns, strict=True):
                target[self.rows[self.alive]] = column[self.alive]

    def _judge(self, step: int, judge: Judge, w: Tensor, move: Tensor, ready: Tensor, hopeless: Tensor) -> None:
        look = self.alive & (ready | hopeless)
        count = int(look.sum())
        if count == 0:
            return
        whole = count == len(look)
        chosen = slice(None) if whole else look.nonzero()[:, 0]
        done, error, results = judge(self.problem, w) if whole else judge(self.problem.select(chosen), w[chosen])
        gain = (error / move[chosen]).to(self.gain)
        self.gain[chosen] = torch.where(torch.isfinite(gain) & (gain > 0), gain, self.gain[chosen])
        leave = done | hopeless[chosen]
        leaving = int(leave.sum())
        if leaving == 0:
            return
        columns = torch.full_like(self.rows[chosen], step), done, *results
        self.alive[chosen] = ~leave
        if whole and leaving == self.total:
            self.results = list(columns)
            return
        if not self.results:
            self.results = [column.new_zeros((self.total, *column.shape[1:])) for column in columns]
        for target, column in zip(self.results, columns, strict=True):
            target[self.rows[chosen][leave]] = column[leave]

    def _forecast(self, step: int, ratio: Tensor) -> None:
        """When each sample should be looked at again, from how far its error is from the tolerance (``ratio``)."""
        steps = (1.3 * ratio.log() / self.pace).nan_to_num(0.0, 0.0, 0.0).clamp_(1, 4 * self.schedule.first)
        self.due = torch.where(self.due <= step, step + steps.long(), self.due)
        self.earliest = int(self.due[self.alive].min())

    def _compact(self) -> None:
        """Go on with the samples that are still alive."""
        kept = self.alive.nonzero()[:, 0]
        self.rows, self.gain, self.alive = self.rows[kept], self.gain[kept], self.alive[kept]
        self.due = self.due[kept]
        self.problem, self.fixed_point = self.problem.select(kept), self.fixed_point.select(kept)
        current, image, memory = self.state
        self.state = State(current[kept], image[kept], tuple(m[kept] for m in memory))
