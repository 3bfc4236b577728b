"""What equilibrium layers share, whatever proves them well posed: solving, gradients, bounds (theory §1–3, §7)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from .. import verified
from ..activations import Activation
from ..errors import InputError, StructureError
from ..implicit import equilibrate, report_failures
from ..norms import EUCLIDEAN, Euclidean, Norm, WeightedMax
from ..operators import DenseOperator, PreparedWeight, QuantizedWeight, operator_of
from ..operators.base import product_rounding
from ..operators.dense import in_proving_norm
from ..parametrizations import Dense
from ..solvers import PeacemanRachford, Picard, Problem, Solution, Solver, Tuning, solve, tuned
from ..solvers.loop import Stop
from .arguments import check_finite, check_solver, check_stop, check_tol, described, reached
from .cache import Derived, keeping
from .linear import PreparedLinear, QuantizedLinear, affine, affine64, anchor
from .memory import Memory
from .solving import TOLERANCE, Options, SolvingLayer

__all__ = ["EquilibriumLayer", "family_of", "solver_in_rows"]

NEAR = 1e-3
"""A float32 solve that came this near, relative to its answer, but not to the tolerance is finished in float64."""


class EquilibriumLayer(SolvingLayer):
    """x ``(B, d)`` ↦ z* ``(B, n)``, the solution of z = σ(W z + U x + b): the abstract base of its kinds.

    ``recurrent`` gives W; the norm in which it is well posed is the weights' own (``family()``, by default the
    2-norm). ``injection`` gives U and b.
    """

    def __init__(self, in_features: int, recurrent: nn.Module, features: int, options: Options) -> None:
        super().__init__(options)
        self.recurrent = recurrent
        self.injection: nn.Module = nn.Linear(in_features, features)
        self.in_features, self.features = in_features, features
        self._derived_injection = Derived()
        self.box_memory: Memory | None = None

    def _assembled(self, recurrent: nn.Module, W: Tensor, U: Tensor, b: Tensor) -> Self:
        """This layer with other weights, in their dtype and on their device."""
        layer = self.to(W.device, W.dtype)
        layer.recurrent = recurrent
        assert isinstance(layer.injection, nn.Linear)
        with torch.no_grad():
            layer.injection.weight.copy_(U)
            layer.injection.bias.copy_(b)
        return layer

    # What the layer is made of

    @property
    def weight(self) -> Tensor:
        """W ``(n, n)``; of a quantized layer dequantized, read-only."""
        if isinstance(self.recurrent, (QuantizedWeight, PreparedWeight)):
            return self.operator.weight
        with torch.autocast(anchor(self.injection).device.type, enabled=False):
            W: Tensor = self.recurrent()
        return W

    @property
    def input_weight(self) -> Tensor:
        """U ``(n, d)``."""
        return self._affine()[0]

    @property
    def bias(self) -> Tensor:
        """b ``(n,)``."""
        return self._affine()[1]

    def _affine(self) -> tuple[Tensor, Tensor]:
        weight, bias = affine(self.injection)
        assert bias is not None
        return weight, bias

    @property
    def operator(self) -> DenseOperator:
        """W as an operator; constants are computed once per weights, gradients flow through its products."""
        with keeping():
            return self._proving(self._kept())

    def _kept(self) -> dict[Any, Any]:
        """What was derived from these weights."""
        if isinstance(self.recurrent, PreparedWeight):
            self.recurrent.refit()  # first, since its scales are part of them
        return self._derived.of(self.recurrent)

    def _operator(self, kept: dict[Any, Any]) -> DenseOperator:
        trained = self._trains()
        constants = kept.setdefault(("constants", self._stage()), {})
        if isinstance(self.recurrent, PreparedWeight) and trained:
            return self.recurrent.operator(constants)
        if isinstance(self.recurrent, (QuantizedWeight, PreparedWeight)):
            like = anchor(self.injection)
            key = "operator", like.dtype, like.device
            if key not in kept:
                weights = self.recurrent
                codes = weights.quantized() if isinstance(weights, PreparedWeight) else weights
                kept[key] = operator_of(codes, like)
            operator: DenseOperator = kept[key]
            return operator
        if "family" not in kept:
            kept["family"] = family_of(self.recurrent)
        family: Norm = kept["family"]
        if trained:
            return DenseOperator(self.recurrent(), family=family, derived=constants)
        if "weight" not in kept:
            kept["weight"] = self.recurrent().detach()
        return DenseOperator(kept["weight"], family=family, derived=constants)

    def _proving(self, kept: dict[Any, Any]) -> DenseOperator:
        """:meth:`_operator`, of weights without structure in whichever family proves it."""
        operator = self._operator(kept)
        if not isinstance(self.recurrent, Dense):
            return operator
        if "proving" not in kept:
            kept["proving"] = in_proving_norm(operator).family
        if kept["proving"] is operator.family:
            return operator
        constants = kept.setdefault(("constants", self._stage(), "proving"), {})
        return DenseOperator(operator.weight, family=kept["proving"], derived=constants)

    # Solving

    def forward(self, x: Tensor) -> Tensor:
        """z* ``(B, n)`` for ``x (B, d)``, differentiable in x and the weights (implicitly, theory §3).

        Warns (:class:`ConvergenceWarning`) of samples that run out of steps or overflow.

        Raises:
            InputError: x not ``(B, d)``, not floating point, NaN or infinite.
        """
        with torch.autocast(x.device.type if isinstance(x, Tensor) else "cpu", enabled=False):
            q = self._inject(x)
            if not len(q):
                return self.activation(q)
            operator, tuning = self._prepare(self.solver)
            tol = self._tolerance(q.dtype)
            problem = Problem(operator, q.detach(), self.activation)
            memory = self.training_memory if self.training and self._trains() else None
            w, done = equilibrate(self.solver, tuning, problem, tol, memory.forward if memory else None)
            if not bool(done.all()) and memory is not None and memory.age > 1:
                tuning = self._retune(self.solver, operator)  # the step may be stale rather than the problem hard
                w, done = equilibrate(self.solver, tuning, problem, tol)
            report_failures(done, w, self.strict, "forward")
            if self.training_memory is not None and self.training and self._trains():
                self.training_memory.keep(operator)
            if not (q.requires_grad or any(t.requires_grad for t in operator.tensors())):
                return self.activation(operator.apply(w).add_(q))
            return self._attached(q, w, self.activation, operator, tuning, memory)

    @torch.no_grad()
    def solve(
        self,
        x: Tensor,
        solver: Solver | None = None,
        tol: float = 1e-6,
        stop: Stop = "bound",
        strict: bool = False,
    ) -> Solution:
        """Equilibria with what is proved about them: a :class:`Solution`, each field ``(B, …)``.

        Args:
            x: ``(B, d)``.
            solver: default the layer's own.
            tol: relative to ‖value‖. What float32 cannot resolve is finished in float64 and rounded.
            stop: ``"bound"`` until the truncation part of the a-posteriori bound is at most tol · ‖value‖ (no
                sample counts as converged where no margin is proved), ``"residual"`` until ‖w − p‖ is.
            strict: raise :class:`ConvergenceError` instead of warning where a sample does not converge.
        """
        check_stop(stop)
        check_tol(tol)
        solver = self.solver if solver is None else check_solver(solver)
        with torch.autocast(x.device.type if isinstance(x, Tensor) else "cpu", enabled=False):
            q = self._inject(x)
            operator, tuning = self._prepare(solver)
            problem = Problem(operator, q, self.activation, self._injection_error(x))
            if not len(q):
                return Solution.empty(q)
            narrow = q.dtype == torch.float32 and solver.max_steps is None
            if narrow and stop == "bound" and _beyond_float32(operator, tol):
                solution = self._solve_wide(x, solver, operator, tol, stop)
            else:
                solution = solve(solver, problem, tuning, tol, stop)
                if narrow:
                    solution = self._finish_wide(x, solver, operator, tol, stop, solution)
        proved, by_rows = operator.margin() > 0, isinstance(operator.family, WeightedMax)
        how_far = reached(solution, tol, stop, proved, by_rows)
        report_failures(solution.converged, solution.value, strict, "solve", how_far)
        return solution

    def _finish_wide(
        self, x: Tensor, solver: Solver, operator: DenseOperator, tol: float, stop: Stop, found: Solution
    ) -> Solution:
        """The samples that float32 brought near but not to the tolerance, solved again in float64 and rounded."""
        size = torch.linalg.vector_norm(found.value, dim=1)
        near = (found.truncation if stop == "bound" else found.residual * size) <= NEAR * size
        if isinstance(operator.family, WeightedMax) and operator.margin() > 0:
            near = torch.isfinite(found.residual)  # it contracts: whoever is not there was stopped by rounding
        rows = (near & ~found.converged).nonzero()[:, 0]
        if not len(rows):
            return found
        again = self._solve_wide(x[rows], solver, operator, tol, stop)
        again = replace(again, steps=again.steps + found.steps[rows])
        pairs = zip(found.columns(), again.columns(), strict=True)
        return Solution(*(old.index_copy(0, rows, new.to(old)) for old, new in pairs))

    def _solve_wide(self, x: Tensor, solver: Solver, operator: DenseOperator, tol: float, stop: Stop) -> Solution:
        """Solved in float64, the answer rounded to float32, which the bound counts."""
        q = nn.functional.linear(x.double(), *(t.detach().double() for t in self._affine()))

        def prepare() -> tuple[DenseOperator, Tuning]:
            exact, error = operator.matrix64()
            wide = DenseOperator(
                exact.to(q.device), exact=(exact, error), family=operator.family, derived=operator.shared_proofs()
            )
            return wide, tuned(solver, wide, self.activation, q)

        wide, tuning = operator.once(("wide", solver, q.device), prepare)
        problem = Problem(wide, q, self.activation, self._injection_error(x.double(), torch.float64))
        found = solve(solver, problem, tuning, tol / 2, stop)
        value = found.value.float()
        slip = torch.linalg.vector_norm(value.double() - found.value, dim=1) * (1 + 1e-9)
        return replace(found, value=value, error_bound=found.error_bound + slip)

    def _inject(self, x: Tensor) -> Tensor:
        """q = U x + b ``(B, n)`` after checking x."""
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != self.in_features:
            raise InputError(
                f"the input is {described(x)}; (batch, {self.in_features}) is needed: flatten images with "
                "torch.nn.Flatten, and give a single sample as x[None]"
            )
        if not x.is_floating_point():
            raise InputError(f"the input is {x.dtype}; floating point is needed: x.float(), scaled as in training")
        like = anchor(self.injection)
        if like.dtype not in TOLERANCE:
            raise InputError(f"the layer is {like.dtype}; it solves in float32 or float64 (autocast is fine)")
        q: Tensor = self.injection(x.to(like.dtype))
        # One number tells of any NaN or infinity in x: U x spreads them, and so does the sum.
        if not math.isfinite(float(q.detach().sum())) and not bool(torch.isfinite(q.detach()).all()):
            rows = int((~torch.isfinite(q.detach()).all(dim=1)).sum())
            raise InputError(
                f"{rows} of {len(q)} samples give U x + b with NaN or infinite entries; clean the input "
                "(torch.isfinite) or the weights"
            )
        return q

    def _injection_error(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A bound on fl(U x + b) − (U x + b) in the layer's arithmetic, storage error included: ``(B,)`` in the 2-norm,
        or ``(B, n)`` entry by entry where the layer contracts by rows."""
        kept = self._derived_injection.of(self.injection)
        if "norms" not in kept:
            assert isinstance(self.injection, (nn.Linear, QuantizedLinear, PreparedLinear))
            U, b, e_U, e_b = affine64(self.injection)
            kept["norms"] = verified.absolute_norm(U), float(b.abs().norm()) * (1 + 1e-12), e_U, e_b
            kept["sizes"] = U.abs().mT.contiguous(), b.abs()
        spread, offset, e_U, e_b = kept["norms"]
        dtype = dtype or anchor(self.injection).dtype
        info = torch.finfo(dtype)
        gamma = product_rounding(2 * self.in_features + 8, x.new_empty(0, dtype=dtype))
        size = torch.linalg.vector_norm(x.detach().to(dtype), dim=1).double() * (1 + gamma)
        cast = info.eps if x.dtype.itemsize > dtype.itemsize else 0.0  # x itself was rounded
        stored = e_U * size + e_b + 4 * info.tiny**0.5
        if not isinstance(family_of(self.recurrent), WeightedMax):
            return (gamma * (spread * size + offset) + stored) + cast * spread * size
        sizes, offsets = (t.to(x.device) for t in kept["sizes"])
        products = x.detach().double().abs() @ sizes * (1 + 1e-9)
        return ((gamma + cast) * products + gamma * offsets + stored[:, None]) * (1 + 1e-9)

    def _trains(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.recurrent.parameters())

    def _stage(self) -> tuple[object, ...]:
        """What besides the weights decides which constants serve: training has approximate inverses, right to its
        tolerances, and of a layer prepared for quantization another operator than that of its codes."""
        trains = self._trains()
        prepared = trains and isinstance(self.recurrent, PreparedWeight)
        return (prepared, self.training_tol, self.tol, self.backward_tol) if trains and self.training else (prepared,)

    def _prepare(self, solver: Solver) -> tuple[DenseOperator, Tuning]:
        """The operator with the solver's step for it; in training a step found some calls ago."""
        with keeping():  # what is kept must serve training as well
            kept = self._kept()
            # a training step has no time to look for another norm
            operator = self._operator(kept) if self.training and self._trains() else self._proving(kept)
            key = "tuning", solver, self._stage()
            if key not in kept:
                memory = self.training_memory if self.training and self._trains() and solver == self.solver else None
                if memory is not None and memory.lasts(operator.weight):
                    tol = self._tolerance(operator.weight.dtype)
                    memory.carry(operator, min(tol, self.backward_tol or tol))
                    kept[key] = memory.tuning
                else:
                    check_finite(operator.weight.detach(), "the recurrent weights' W")
                    kept[key] = self._retune(solver, operator)
        found: Tuning = kept[key]
        return operator, found

    def _retune(self, solver: Solver, operator: DenseOperator) -> Tuning:
        tuning = tuned(solver, operator, self.activation, anchor(self.injection))
        if solver == self.solver and self.training and self._trains():
            self.training_memory = Memory.of(tuning, operator, self.training_memory)
        return tuning

    def forget_tuning(self) -> None:
        super().forget_tuning()
        self.box_memory = None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, features={self.features}, activation={self.activation}, "
            f"solver={self.solver}"
        )


def family_of(recurrent: nn.Module) -> Norm:
    """The norm in which these weights are well posed: their own, or the 2-norm."""
    family = getattr(recurrent, "family", None)
    found: Norm = EUCLIDEAN if family is None else family()
    if type(found) not in (Euclidean, WeightedMax):  # of a norm from elsewhere nothing would be proved
        raise StructureError(f"{type(recurrent).__name__}.family() is {found!r}; give WeightedMax(eta), or no family")
    return found


def solver_in_rows(activation: Activation) -> Solver:
    """What solves in a weighted maximum norm: Peaceman–Rachford, whose proved factor at the averaged iteration's best
    step is the smaller one, or the averaged iteration where prox_{αf} is found by iteration."""
    return Picard() if type(activation).prox is Activation.prox else PeacemanRachford()


def _beyond_float32(operator: DenseOperator, tol: float) -> bool:
    """Whether the truncation W e / m of a float32 iterate would stall above ``tol``, e being its last bits."""
    margin, family = operator.margin(), operator.family
    spread = float(family.eta.max() / family.eta.min()) if isinstance(family, WeightedMax) else 1.0
    return margin > 0 and tol * margin < 2 * torch.finfo(torch.float32).eps * (1 + operator.norm()) * spread
