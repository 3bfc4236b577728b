"""Multiscale equilibrium networks for images: stem, equilibrium of the multiscale map, head (theory §9, [SI26])."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from ..errors import InputError, OptionError
from ..implicit import AdjointMap, attach_map, report_failures
from ..quantization.schemes import Scheme
from ..solvers import Anderson, Broyden, MapProblem, Picard, Solution, Solver, Tuning, Verdict, iterate
from ..solvers.loop import Stop
from .arguments import check_sizes, check_solver, check_stop, check_tol, described, height_and_width, reached
from .blocks import Multiscale, Plan
from .ends import head, head_program, stem, stem_program
from .linear import QuantizedLinear
from .multiscale import Cell, CellMap, Shape, split
from .multiscale_proofs import Evaluator, Head, row_lengths
from .room import check_room
from .steps import VALUES, Path

__all__ = ["PRESETS", "Gradient", "MultiscaleDEQ", "Preset", "Tally"]

Gradient = Literal["implicit", "one-step", "phantom"]
Preset = Literal["tiny", "small", "published"]

PRESETS: dict[str, dict[str, Any]] = {
    "published": {"channels": (32, 64, 128, 256), "head_channels": 512},
    "small": {"channels": (24, 48, 96), "expansion": 3, "stem_stride": 2, "head_channels": 192, "dropout": 0.1},
    "tiny": {"channels": (16, 32), "expansion": 2, "stem_stride": 2, "head_channels": 96, "dropout": 0.0},
}
"""What differs from the defaults, by name; ``published`` has the sizes of [SI26]."""


@dataclass
class Tally:
    """What solving cost since the last ``reset``: samples, evaluations of f (or products with Jᵀ) summed over them, and
    samples that did not reach the tolerance; forward, and in the backward pass of implicit gradients."""

    samples: int = 0
    evaluations: int = 0
    failures: int = 0
    backward_samples: int = 0
    backward_evaluations: int = 0
    backward_failures: int = 0

    def reset(self) -> None:
        for field in fields(self):
            setattr(self, field.name, 0)


class MultiscaleDEQ(nn.Module, ABC):
    """x ``(B, c, H, W)`` ↦ scores ``(B, classes)`` of the equilibrium z* = f(z*; stem(x)): the base of its kinds.

    State: ``stem.*``, ``map.*``, ``head.*``.
    """

    scheme: Scheme | None = None

    def __init__(
        self,
        in_channels: int,
        size: int | tuple[int, int],
        classes: int,
        channels: tuple[int, ...],
        make_plan: Callable[[tuple[Shape, ...]], Plan],
        *,
        dropout: float,
        stem_stride: int,
        head_channels: int,
        solver: Solver,
        tol: float,
        backward_tol: float | None,
        gradient: Gradient,
        phantom_steps: int,
        phantom_damping: float,
        strict: bool,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, classes=classes, stem_stride=stem_stride)
        check_sizes(head_channels=head_channels, phantom_steps=phantom_steps)
        self.size = height_and_width(size, "size")
        self.in_channels, self.classes, self.stem_stride = in_channels, classes, stem_stride
        self.dropout = _share(dropout, "dropout", zero=True)  # which a plan may count in
        plan = make_plan(_shapes(channels, self.size, stem_stride))
        self.solver = _check_solver(solver)
        check_room(plan, 1, torch.empty(0), self.solver, False)
        self.tol = check_tol(tol)
        self.backward_tol = None if backward_tol is None else check_tol(backward_tol)
        if gradient not in ("implicit", "one-step", "phantom"):
            raise OptionError(f"gradient is {gradient!r}; it is 'implicit', 'one-step' or 'phantom'")
        self.gradient: Gradient = gradient
        self.phantom_steps, self.phantom_damping = phantom_steps, _share(phantom_damping, "phantom_damping", one=True)
        self.strict = strict
        self.tally = Tally()
        self.map = Multiscale(plan)
        self.stem = stem(in_channels, channels[0], stem_stride, plan.groups)
        self.head = head(channels, plan.groups, head_channels, classes)

    @classmethod
    def preset(cls, name: Preset, in_channels: int, size: int | tuple[int, int], classes: int, **options: Any) -> Self:
        """A model of a known size, see :data:`PRESETS`, with ``options`` of the constructor on top."""
        if name not in PRESETS:
            raise OptionError(f"preset is {name!r}; it is one of {', '.join(PRESETS)}")
        make: Any = cls  # each kind has its own options
        model: Self = make(in_channels, size, classes, **{**PRESETS[name], **options})
        return model

    @property
    def linear(self) -> nn.Linear | QuantizedLinear:
        """What gives the scores of features."""
        linear: Any = self.head["linear"]
        return linear

    @property
    def plan(self) -> Plan:
        return self.map.plan

    @abstractmethod
    def rate(self) -> float:
        """How fast f contracts at least by its caps, in training with dropout; ``inf`` where nothing says so."""

    @abstractmethod
    def proved_rate(self) -> float:
        """A proved bound of the contraction of f in evaluation; ``inf`` where there is none."""

    # The pieces, as programs

    def inject(self) -> Path:
        """The stem's program: x ↦ injection."""
        return stem_program(self.stem)

    def features(self) -> Head:
        """The head's program but for its last linear module: branches ↦ features ``(B, k, 1, 1)``."""
        return head_program(self.head, self.plan.shapes)

    def classify(self, z: Tensor) -> Tensor:
        """Scores ``(B, classes)`` of equilibria ``z (B, n)``."""
        scores: Tensor = self.linear(self.features().read(VALUES, self.branches(z)).flatten(1))
        return scores

    def branches(self, z: Tensor) -> list[Tensor]:
        """The branches ``(B, C, H, W)`` of ``z (B, n)``."""
        return split(z, self.plan.shapes)

    # Solving

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``(B, classes)``, differentiable in x and the weights.

        Warns (:class:`ConvergenceWarning`) of samples whose relative residual ‖f(z) − z‖/‖f(z)‖ does not reach ``tol``.

        Raises:
            InputError: images of another shape, not floating point, NaN or infinite.
        """
        return self.classify(self.equilibrium(x))

    def equilibrium(self, x: Tensor) -> Tensor:
        """z* ``(B, n)``: all branches, each flattened with its channels last."""
        self.check(x)
        check_room(self.plan, len(x), self._like(), self.solver, torch.is_grad_enabled())
        with torch.autocast(x.device.type, enabled=False):
            injection = VALUES.along(self.inject(), x.to(self._like().dtype))
            self._check_finite(injection)
            cell = self._cell(len(x), injection)
            if not len(x):
                return injection.new_zeros(0, cell.features)
            w = self._solved(cell, injection.detach())
            if not torch.is_grad_enabled():
                return w
            return self._differentiable(cell, injection, w)

    @torch.no_grad()
    def _solved(self, cell: Cell, injection: Tensor) -> Tensor:
        problem = MapProblem(CellMap(cell, injection), injection)
        steps, done, w = iterate(self.solver, problem, self._tuning(self.solver, self.rate()), self.tol, "residual")
        self.tally.samples += len(w)
        self.tally.evaluations += int(steps.sum())
        self.tally.failures += int((~done).sum())
        report_failures(done, w, self.strict, "forward")
        return w

    def _differentiable(self, cell: Cell, injection: Tensor, w: Tensor) -> Tensor:
        if self.gradient == "phantom":
            z = w
            for _ in range(self.phantom_steps):
                z = torch.lerp(z, cell(z, injection), self.phantom_damping)
            return z
        if self.gradient == "one-step":
            return cell(w, injection)
        point = w.detach().requires_grad_()
        return attach_map(cell(point, injection), point, self._solve_adjoint)

    @torch.no_grad()
    def solve(
        self,
        x: Tensor,
        solver: Solver | None = None,
        tol: float | None = None,
        stop: Stop = "residual",
        strict: bool = False,
    ) -> Solution:
        """Equilibria of the network as evaluation uses it, with what is proved about them: :class:`Solution`.

        ``value (B, n)`` is f of the last iterate, evaluated in float64 and rounded; :meth:`branches` gives its images.
        ``steps`` counts evaluations of f. ``error_bound`` >= ‖value − z*‖₂ of the stored numbers, in exact arithmetic;
        infinite where no contraction is proved. That judgement costs one evaluation in float64 on the CPU.

        Args:
            x: ``(B, c, H, W)``.
            solver: default the model's own.
            tol: relative to ‖value‖; default the model's own.
            stop: ``"residual"`` until ‖w − f(w)‖ is at most tol · ‖value‖, ``"bound"`` until the part of the bound is
                that more steps would shrink.
            strict: raise :class:`ConvergenceError` instead of warning where a sample does not converge.
        """
        check_stop(stop)
        tol = self.tol if tol is None else check_tol(tol)
        solver = self.solver if solver is None else _check_solver(solver)
        self.check(x)
        check_room(self.plan, len(x), self._like(), solver, False)
        with torch.autocast(x.device.type, enabled=False):
            injection = VALUES.along(self.inject(), x.to(self._like().dtype))
            self._check_finite(injection)
            cell, rate, evaluator = self.map.cell("evaluation"), self.proved_rate(), self.evaluator()
            problem = MapProblem(CellMap(cell, injection, x), injection)
            if not len(x):
                return Solution.empty(injection.new_zeros(0, cell.features))

            def judge(part: MapProblem, w: Tensor) -> Verdict:
                images = part.fixed_point.images  # type: ignore[attr-defined]
                found = evaluator.gap(images, w)
                size, infinite = row_lengths(found.image), torch.full_like(found.distance, math.inf)
                bound, truncation = found.from_image(rate) if rate < 1 else (infinite, infinite)
                value = found.image.to(w)
                bound = bound + row_lengths(value.to("cpu", torch.float64) - found.image) * (1 + 1e-9)
                measure = found.distance if stop == "residual" else truncation
                done = (measure <= tol * size) & torch.isfinite(size)
                residual = torch.where(found.distance == 0, 0.0, found.distance / size).nan_to_num(math.inf, math.inf)
                columns = (t.to(w.device) for t in (residual, bound, truncation))
                return Verdict(done.to(w.device), measure.to(w.device), (value, *columns))

            tuning = self._tuning(solver, rate)
            steps, done, value, residual, bound, truncation = iterate(solver, problem, tuning, tol, stop, judge)
        solution = Solution(value, done, steps, residual, bound, truncation)
        report_failures(done, value, strict, "solve", reached(solution, tol, stop, rate < 1))
        return solution

    @torch.no_grad()
    def converges(self, x: Tensor) -> Tensor:
        """Whether the solver reaches the tolerance on each image ``(B,)``; an observation."""
        injection = VALUES.along(self.inject(), x.to(self._like().dtype))
        problem = MapProblem(CellMap(self.map.cell("evaluation"), injection), injection)
        return iterate(self.solver, problem, self._tuning(self.solver, self.rate()), self.tol, "residual")[1]

    def evaluator(self) -> Evaluator:
        """f in float64, for proofs about the stored numbers."""
        with torch.no_grad():
            return Evaluator(self.map.cell("proof"), self.inject())

    @torch.no_grad()
    def _solve_adjoint(self, adjoint: AdjointMap) -> Tensor:
        tol = self.tol if self.backward_tol is None else self.backward_tol
        problem = MapProblem(adjoint, adjoint.grad)
        steps, done, y = iterate(self.solver, problem, self._tuning(self.solver, self.rate()), tol, "residual")
        self.tally.backward_samples += len(y)
        self.tally.backward_evaluations += int(steps.sum()) - len(y)  # the first image is the gradient itself
        self.tally.backward_failures += int((~done).sum())
        report_failures(done, y, self.strict, "backward")
        return y

    def solver_step(self) -> float:
        """α of the solver's map (1 − α) z + α f(z): 1 where it says nothing else."""
        return _step_of(self.solver)

    @staticmethod
    def _tuning(solver: Solver, rate: float) -> Tuning:
        return Tuning(_step_of(solver), rate if rate < 1 else None, None)

    def _cell(self, batch: int, injection: Tensor) -> Cell:
        """The program for one solve; in training with one dropout mask for all of it."""
        if not (self.training and self.dropout):
            return self.map.cell("training" if self.training else "evaluation")
        keep = 1 - self.dropout
        masks = tuple(
            torch.empty(batch, *shape, device=injection.device, dtype=injection.dtype).bernoulli_(keep).div_(keep)
            for shape in self.plan.shapes
        )
        return replace(self.map.cell("training", self.dropout), masks=masks)

    def _like(self) -> Tensor:
        first: Any = self.stem[0]
        weight: Tensor = first.weight
        return weight

    def check(self, x: Tensor) -> None:
        """Raise :class:`InputError` unless ``x`` is a batch of the images that this network takes."""
        needed = (self.in_channels, *self.size)
        if not isinstance(x, Tensor) or x.ndim != 4 or tuple(x.shape[1:]) != needed:
            raise InputError(f"the input is {described(x)}; (batch, {', '.join(map(str, needed))}) is needed")
        if not x.is_floating_point() or self._like().dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"the input is {x.dtype}, the model {self._like().dtype}; floats of 32 or 64 bits are needed"
            )

    @staticmethod
    def _check_finite(injection: Tensor) -> None:
        if not bool(torch.isfinite(injection.detach()).all()):
            raise InputError(
                "the injection holds NaN or infinite entries; clean the input (torch.isfinite) or the weights"
            )

    def extra_repr(self) -> str:
        options: dict[str, Any] = {
            "size": self.size,
            "shapes": self.plan.shapes,
            "solver": self.solver,
            "tol": self.tol,
        }
        return ", ".join(f"{name}={value}" for name, value in options.items())


def _shapes(channels: tuple[int, ...], size: tuple[int, int], stride: int) -> tuple[Shape, ...]:
    if not isinstance(channels, (tuple, list)) or not channels:
        raise OptionError(f"channels are {channels!r}; one positive integer per branch is needed")
    if any(isinstance(c, bool) or not isinstance(c, int) or c < 1 for c in channels):
        raise OptionError(f"channels are {channels!r}; one positive integer per branch is needed")
    whole = stride * 2 ** (len(channels) - 1)
    if size[0] % whole or size[1] % whole:
        raise OptionError(
            f"images of {size[0]}×{size[1]} do not halve as often as {len(channels)} branches behind a stem of stride "
            f"{stride} need: sides that {whole} divides"
        )
    return tuple((c, size[0] // stride >> i, size[1] // stride >> i) for i, c in enumerate(channels))


def _share(value: float, name: str, zero: bool = False, one: bool = False) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 < value < 1 or (zero and value == 0) or (one and value == 1)):
        raise OptionError(f"{name} is {value!r}; it is a number between 0 and 1")
    return float(value)


def _check_solver(solver: Solver) -> Solver:
    """The solver, looking at every step: an evaluation costs far more than a look."""
    check_solver(solver)
    on = solver.on if isinstance(solver, (Anderson, Broyden)) else solver
    if not (on is None or isinstance(on, Picard)):
        raise OptionError(
            f"a multiscale map has no splitting for {type(on).__name__}; Picard, Anderson and Broyden solve it"
        )
    return solver if solver.check_every is not None else replace(solver, check_every=1)


def _step_of(solver: Solver) -> float:
    on = solver.on if isinstance(solver, (Anderson, Broyden)) else solver
    alpha = solver.alpha if on is None else on.alpha
    return 1.0 if alpha is None else float(alpha)
