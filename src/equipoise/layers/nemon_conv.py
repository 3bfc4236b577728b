"""The convolutional NEMON layer: circular, its diagonal from the true row sums of the kernel (theory §7, [JDPB21])."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from ..activations import Activation, ReLU, as_activation
from ..errors import InputError, OptionError
from ..implicit import attach, equilibrate, report_failures
from ..operators.base import product_rounding
from ..operators.conv import ConvOperator
from ..operators.kernels import StructuredKernel
from ..parametrizations import ContractiveKernel
from ..quantization.schemes import Scheme
from ..solvers import ForwardBackward, Picard, Problem, Solution, Solver, Tuning, solve, tuned
from ..solvers.loop import Stop
from .arguments import check_solver, check_tol, reached
from .cache import Derived, keeping
from .memory import Memory

__all__ = ["NEMONConv2d"]

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@final
class NEMONConv2d(nn.Module):
    """x ``(B, c, H, W)`` ↦ z* ``(B, C, H/stride, W/stride)``, the one solution of z = σ(K ∗ z + U ∗ x + b), circular.

    K = D⁻¹ T D off its centre, and at the centre of channel i lowered by Σ |T_i| − γ, D = diag(e^d) with one d per
    channel: every row of W sums up to at most γ < 1 in the norm of η = e^{−d}. The published code lowers by max |T|
    times the channels, which is not the row sum.

    Args:
        in_channels, channels: c and C.
        kernel_size: of T, odd; U has the same.
        gamma: below 1.
        stride: of U, which shrinks the image.
        activation, solver, tol, backward_tol, training_tol, strict: as of :class:`equipoise.NEMON`; the solver is
            ForwardBackward, Picard, or Anderson or Broyden on one of them.

    Of a quantized layer ``recurrent`` holds codes, and ``scheme`` is the scheme it was quantized by, else None.

    State: ``recurrent.T (C, C, k, k)``, ``recurrent.d (C,)``, ``recurrent.gamma``, ``injection.weight``,
    ``injection.bias``.

    Raises:
        OptionError: a value outside its range.
    """

    recurrent: ContractiveKernel | StructuredKernel
    injection: nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int = 3,
        gamma: float = 0.95,
        stride: int = 1,
        activation: Activation | str = ReLU(),
        solver: Solver | None = None,
        tol: float | None = None,
        backward_tol: float | None = None,
        training_tol: float | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "channels": channels, "kernel_size": kernel_size, "stride": stride}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} is {value!r}; it is a positive integer")
        if kernel_size % 2 == 0:
            raise OptionError(f"kernel_size is {kernel_size}; it is odd, so that a kernel has a centre")
        self.recurrent = ContractiveKernel(channels, kernel_size, gamma)
        padding = kernel_size // 2
        self.injection = nn.Conv2d(
            in_channels, channels, kernel_size, stride, padding, padding_mode="circular" if padding else "zeros"
        )
        self.activation = as_activation(activation)
        closed = type(self.activation).prox is not Activation.prox
        self.solver = check_solver((ForwardBackward() if closed else Picard()) if solver is None else solver)
        self.tol, self.backward_tol, self.training_tol = (
            None if value is None else check_tol(value) for value in (tol, backward_tol, training_tol)
        )
        self.strict = strict
        self.scheme: Scheme | None = None
        self._derived = Derived()
        self.training_memory: Memory | None = None

    @property
    def in_channels(self) -> int:
        return self.injection.in_channels

    @property
    def channels(self) -> int:
        return self.injection.out_channels

    @property
    def kernel(self) -> Tensor:
        """K ``(C, C, k, k)`` that is multiplied by, the diagonal included."""
        return self.operator.weight

    @property
    def operator(self) -> ConvOperator:
        """W on a single pixel; its constants hold on images of any size."""
        return self.operator_for((1, 1))

    def operator_for(self, size: tuple[int, int]) -> ConvOperator:
        """W on images of ``size`` = (H/stride, W/stride); constants are computed once per weights and size."""
        with keeping():
            kept, like = self._derived.of(self), self.injection.weight
            constants, eta = kept.setdefault(("constants", size), {}), self.recurrent.family().eta
            if isinstance(self.recurrent, ContractiveKernel):
                return ConvOperator(self.recurrent(), size, eta, constants)
            key = "applied", like.dtype, like.device
            if key not in kept:
                with torch.no_grad():
                    kept[key] = self.recurrent.applied(like.detach())
            kernel, doubt = kept[key]
            return ConvOperator(kernel, size, eta, constants, doubt)

    def margin(self) -> float:
        """A proved lower bound of 1 − μ_η(W), on images of any size."""
        with torch.no_grad():
            return self.operator.margin()

    def forward(self, x: Tensor) -> Tensor:
        """z* for ``x (B, c, H, W)``, differentiable in x and the weights (implicitly, theory §3)."""
        with torch.autocast(x.device.type if isinstance(x, Tensor) else "cpu", enabled=False):
            q, size = self._inject(x)
            operator = self.operator_for(size)
            if not len(q):
                return q.unflatten(1, (-1, *size))
            trains = self.training and operator.weight.requires_grad
            tuning, memory = self._tuned(operator, q, trains)
            tol = self.training_tol if self.training and self.training_tol is not None else self.tol
            tol = TOLERANCE[q.dtype] if tol is None else tol
            problem = Problem(operator, q.detach(), self.activation)
            w, done = equilibrate(self.solver, tuning, problem, tol, memory.forward if memory else None)
            report_failures(done, w, self.strict, "forward")
            back_tol = tol if self.backward_tol is None else self.backward_tol

            def back(adjoint: Problem) -> Tensor:
                y, settled = equilibrate(self.solver, tuning, adjoint, back_tol, memory.backward if memory else None)
                report_failures(settled, y, self.strict, "backward")
                return y

            z = attach(q, w, self.activation, operator, back)
            return z.unflatten(1, (-1, *size))

    @torch.no_grad()
    def solve(
        self, x: Tensor, solver: Solver | None = None, tol: float = 1e-6, stop: Stop = "bound", strict: bool = False
    ) -> Solution:
        """Equilibria with what is proved about them; ``value`` is flat, ``(B, C·H·W)``, and all norms are ‖·‖_∞."""
        check_tol(tol)
        if stop not in ("bound", "residual"):
            raise OptionError(f"stop is {stop!r}; it is 'bound' or 'residual'")
        solver = self.solver if solver is None else check_solver(solver)
        with torch.autocast(x.device.type if isinstance(x, Tensor) else "cpu", enabled=False):
            q, size = self._inject(x)
            operator = self.operator_for(size)
            problem = Problem(operator, q, self.activation, self._injection_error(x, q))
            found = solve(solver, problem, tuned(solver, operator, self.activation, q), tol, stop)
        proved = operator.margin() > 0
        report_failures(found.converged, found.value, strict, "solve", reached(found, tol, stop, proved, True))
        return found

    def _inject(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(U ∗ x + b flat ``(B, C·H·W)``, (H, W)) after checking x."""
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != self.injection.in_channels:
            given = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"the input is {given}; (batch, {self.injection.in_channels}, height, width) is needed")
        dtype = self.injection.weight.dtype
        if not x.is_floating_point() or dtype not in TOLERANCE:
            raise InputError(f"the input is {x.dtype}, the layer {dtype}; floats of 32 or 64 bits are needed")
        q: Tensor = self.injection(x.to(dtype))
        if not bool(torch.isfinite(q.detach()).all()):
            raise InputError("U x + b holds NaN or infinite entries; clean the input (torch.isfinite) or the weights")
        return q.flatten(1), (q.shape[2], q.shape[3])

    def _injection_error(self, x: Tensor, q: Tensor) -> Tensor:
        """A bound ``(B, 1)`` on every entry of the rounding of U ∗ x + b."""
        U, b = self.injection.weight.detach().double(), self.injection.bias
        gamma = product_rounding(2 * U[0].numel() + 8, q[:0])
        largest = x.detach().double().abs().flatten(1).amax(1, keepdim=True)
        offset = 0.0 if b is None else float(b.detach().double().abs().max())
        cast = torch.finfo(q.dtype).eps if x.dtype.itemsize > q.dtype.itemsize else 0.0
        spread = float(U.abs().sum((1, 2, 3)).max()) * (1 + 1e-9)
        return ((gamma + cast) * spread * largest + gamma * offset) * (1 + 1e-9) + torch.finfo(q.dtype).tiny ** 0.5

    def _tuned(self, operator: ConvOperator, q: Tensor, trains: bool) -> tuple[Tuning, Memory | None]:
        if not trains:
            return tuned(self.solver, operator, self.activation, q), None
        memory, kernel = self.training_memory, operator.weight.detach()
        if memory is None or memory.age >= memory.limit or memory.weight.shape != kernel.shape:
            tuning = tuned(self.solver, operator, self.activation, q)
            limit = 50 if memory is None else min(2 * memory.limit, 800)
            memory = self.training_memory = Memory(tuning, kernel.clone(), limit)
        memory.age += 1
        memory.forward.plan()
        memory.backward.plan()
        alpha = self.solver.alpha or operator.averaging_step()  # never longer than these weights allow
        return memory.tuning._replace(alpha=alpha), memory

    def forget_tuning(self) -> None:
        """Have the next call search for the solver's step."""
        self._derived, self.training_memory = Derived(), None

    def extra_repr(self) -> str:
        options: dict[str, Any] = {"channels": self.channels, "activation": self.activation, "solver": self.solver}
        return ", ".join(f"{name}={value}" for name, value in options.items())
