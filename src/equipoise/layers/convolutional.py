"""What equilibrium layers on images share: checking, solving, gradients, bounds (theory §1–3, §7–8)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..activations import Activation
from ..errors import InputError
from ..implicit import equilibrate, report_failures
from ..norms import WeightedMax
from ..operators import MonotoneOperator
from ..operators.base import product_rounding
from ..operators.grids import correlate
from ..solvers import Problem, Solution, Solver, Tuning, solve, tuned
from ..solvers.loop import Stop
from .arguments import check_solver, check_stop, check_tol, described, reached
from .memory import Memory
from .solving import TOLERANCE, Options, SolvingLayer

__all__ = ["ConvolutionalLayer"]


class ConvolutionalLayer(SolvingLayer):
    """x ``(B, c, H, W)`` ↦ images of z*, the one solution of z = σ(W z + U ∗ x + b): the abstract base of its kinds.

    ``recurrent`` gives W, ``injection`` U and b. States are ``(B, n)``, laid out as the kind's operator wants them.
    """

    recurrent: nn.Module
    injection: nn.Conv2d

    def __init__(self, recurrent: nn.Module, injection: nn.Conv2d, options: Options) -> None:
        super().__init__(options)
        self.recurrent, self.injection = recurrent, injection

    @property
    def in_channels(self) -> int:
        return self.injection.in_channels

    # What a kind says of itself

    @abstractmethod
    def _operator_for(self, size: tuple[int, int]) -> MonotoneOperator:
        """W on injected images of ``size``; constants are computed once per weights and size."""

    @abstractmethod
    def _check_image(self, x: Tensor) -> None:
        """Raise :class:`InputError` unless images of this height and width fit."""

    def _enter(self, q: Tensor) -> Tensor:
        """Injected images as states."""
        return q.flatten(1)

    @abstractmethod
    def _leave(self, z: Tensor, size: tuple[int, int]) -> Tensor:
        """The layer's images of states, for injected images of ``size``."""

    def _value(self, z: Tensor, size: tuple[int, int]) -> Tensor:
        """States ``(B, n)`` as a :class:`Solution` shows them."""
        return z

    def _sigma(self, like: Tensor) -> Activation:
        """σ on states."""
        return self.activation

    def _step(self, tuning: Tuning, operator: MonotoneOperator) -> Tuning:
        """A remembered tuning for weights that have moved since."""
        return tuning

    # Solving

    def margin(self) -> float:
        """A proved lower bound of 1 − μ(W)."""
        with torch.no_grad():
            return self.operator.margin()

    @property
    @abstractmethod
    def operator(self) -> MonotoneOperator:
        """W with its constants."""

    def forward(self, x: Tensor) -> Tensor:
        """Images of z* for ``x (B, c, H, W)``, differentiable in x and the weights (implicitly, theory §3).

        Warns (:class:`ConvergenceWarning`) of samples that run out of steps or overflow.

        Raises:
            InputError: x of another shape, not floating point, NaN or infinite.
        """
        with torch.autocast(x.device.type if isinstance(x, Tensor) else "cpu", enabled=False):
            q, size = self._inject(x)
            operator, activation = self._operator_for(size), self._sigma(q)
            if not len(q):
                return self._leave(activation(q), size)
            tol = self._tolerance(q.dtype)
            tuning, memory = self._tuned(operator, activation, q)
            problem = Problem(operator, q.detach(), activation)
            w, done = equilibrate(self.solver, tuning, problem, tol, memory.forward if memory else None)
            if memory is not None and memory.age > 1 and not bool(done.all()):
                self.training_memory = None  # the step may be stale rather than the problem hard
                tuning, memory = self._tuned(operator, activation, q)
                w, done = equilibrate(self.solver, tuning, problem, tol)
            report_failures(done, w, self.strict, "forward")
            return self._leave(self._attached(q, w, activation, operator, tuning, memory), size)

    @torch.no_grad()
    def solve(
        self, x: Tensor, solver: Solver | None = None, tol: float = 1e-6, stop: Stop = "bound", strict: bool = False
    ) -> Solution:
        """Equilibria with what is proved about them; ``value`` is ``(B, n)``, flat images channel by channel.

        In a layer of the maximum-norm family all norms are ‖·‖_∞.
        """
        check_stop(stop)
        check_tol(tol)
        solver = self.solver if solver is None else check_solver(solver)
        with torch.autocast(x.device.type if isinstance(x, Tensor) else "cpu", enabled=False):
            q, size = self._inject(x, summed=True)
            operator, activation = self._operator_for(size), self._sigma(q)
            if not len(q):
                return Solution.empty(self._value(q, size))
            problem = Problem(operator, q, activation, self._injection_error(x, q, operator))
            found = solve(solver, problem, tuned(solver, operator, activation, q), tol, stop)
        proved, by_rows = operator.margin() > 0, isinstance(operator.family, WeightedMax)
        report_failures(found.converged, found.value, strict, "solve", reached(found, tol, stop, proved, by_rows))
        columns = found.columns()
        return Solution(self._value(columns[0], size), *columns[1:])

    @abstractmethod
    def images(self, value: Tensor, x: Tensor) -> Tensor:
        """What the layer gives for ``x (B, c, H, W)``, from the ``value (B, n)`` of its solution."""

    def _inject(self, x: Tensor, summed: bool = False) -> tuple[Tensor, tuple[int, int]]:
        """(U ∗ x + b as states, the injected images' (H, W)) after checking x; ``summed``: by sums of products, whose
        rounding :meth:`_injection_error` bounds."""
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != self.in_channels:
            raise InputError(f"the input is {described(x)}; (batch, {self.in_channels}, height, width) is needed")
        dtype = self.injection.weight.dtype
        if not x.is_floating_point() or dtype not in TOLERANCE:
            raise InputError(f"the input is {x.dtype}, the layer {dtype}; floats of 32 or 64 bits are needed")
        self._check_image(x)
        q: Tensor = self._summed_injection(x.to(dtype)) if summed else self.injection(x.to(dtype))
        if not bool(torch.isfinite(q.detach()).all()):
            raise InputError("U x + b holds NaN or infinite entries; clean the input (torch.isfinite) or the weights")
        return self._enter(q), (q.shape[2], q.shape[3])

    def _summed_injection(self, x: Tensor) -> Tensor:
        conv = self.injection
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        images = pad(x, (conv.kernel_size[0] // 2,) * 4, mode).permute(2, 3, 1, 0)
        found = correlate(images, conv.weight, conv.stride[0]).permute(3, 2, 0, 1)
        return found if conv.bias is None else found + conv.bias[:, None, None]

    def _injection_error(self, x: Tensor, q: Tensor, operator: MonotoneOperator) -> Tensor:
        """A bound on the rounding of U ∗ x + b: ``(B, 1)`` on every entry, or in the 2-norm ``(B,)``, as the operator's
        family asks."""
        U, b = self.injection.weight.detach().double(), self.injection.bias
        gamma = product_rounding(2 * U[0].numel() + 8, q[:0])
        largest = x.detach().double().abs().flatten(1).amax(1, keepdim=True)
        offset = 0.0 if b is None else float(b.detach().double().abs().max())
        cast = torch.finfo(q.dtype).eps if x.dtype.itemsize > q.dtype.itemsize else 0.0
        spread = float(U.abs().sum((1, 2, 3)).max()) * (1 + 1e-9)
        error = ((gamma + cast) * spread * largest + gamma * offset) * (1 + 1e-9) + torch.finfo(q.dtype).tiny ** 0.5
        if isinstance(operator.family, WeightedMax):
            return error
        return error[:, 0] * (q.shape[1] ** 0.5 * (1 + 1e-12))

    def _tuned(self, operator: MonotoneOperator, activation: Activation, q: Tensor) -> tuple[Tuning, Memory | None]:
        """The solver's step; in training one found some calls ago, since a search costs as much as many steps."""
        weights = operator.tensors()
        if not (self.training and torch.is_grad_enabled() and any(t.requires_grad for t in weights)):
            return self._once(operator, activation, q), None
        memory = self.training_memory
        if memory is None or not memory.lasts(weights[0]):
            tuning = tuned(self.solver, operator, activation, q)
            memory = self.training_memory = Memory.after(memory, tuning, weights[0])
        memory.age += 1
        memory.forward.plan()
        memory.backward.plan()
        return self._step(memory.tuning, operator), memory

    def _once(self, operator: MonotoneOperator, activation: Activation, q: Tensor) -> Tuning:
        """The solver's tuning, found once per weights and size."""
        kept: dict[Any, Any] = self._derived.of(self)
        key = "tuning", self.solver, operator.features, q.dtype, q.device
        if key not in kept:
            kept[key] = tuned(self.solver, operator, activation, q)
        found: Tuning = kept[key]
        return found

    def extra_repr(self) -> str:
        return f"activation={self.activation}, solver={self.solver}"
