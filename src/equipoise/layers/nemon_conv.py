"""The convolutional NEMON layer: circular, its diagonal from the true row sums of the kernel (theory §7, [JDPB21])."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from ..activations import Activation, ReLU, as_activation
from ..errors import InputError
from ..operators import MonotoneOperator
from ..operators.conv import ConvOperator
from ..operators.kernels import StructuredKernel
from ..parametrizations import ContractiveKernel
from ..solvers import ForwardBackward, Picard, Solver, Tuning
from .arguments import check_sizes
from .cache import keeping
from .convolutional import ConvolutionalLayer
from .solving import Options

__all__ = ["NEMONConv2d"]


@final
class NEMONConv2d(ConvolutionalLayer):
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
        check_sizes(in_channels=in_channels, channels=channels, kernel_size=kernel_size, stride=stride)
        recurrent, padding = ContractiveKernel(channels, kernel_size, gamma), kernel_size // 2
        injection = nn.Conv2d(
            in_channels, channels, kernel_size, stride, padding, padding_mode="circular" if padding else "zeros"
        )
        sigma = as_activation(activation)
        if solver is None:
            solver = ForwardBackward() if type(sigma).prox is not Activation.prox else Picard()
        super().__init__(recurrent, injection, Options(sigma, solver, tol, backward_tol, training_tol, strict))

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

    def _operator_for(self, size: tuple[int, int]) -> ConvOperator:
        return self.operator_for(size)

    def _check_image(self, x: Tensor) -> None:
        reach = self.injection.kernel_size[0] // 2
        if min(x.shape[2:]) < max(reach, 1):
            raise InputError(
                f"the images are {x.shape[2]}×{x.shape[3]}; U reaches {reach} pixels, so that both sides are "
                f"{max(reach, 1)} or more: enlarge the images, or take a smaller kernel_size"
            )

    def _leave(self, z: Tensor, size: tuple[int, int]) -> Tensor:
        return z.unflatten(1, (-1, *size))

    def images(self, value: Tensor, x: Tensor) -> Tensor:
        stride = self.injection.stride[0]
        return value.unflatten(1, (-1, *(-(-n // stride) for n in x.shape[2:])))

    def _step(self, tuning: Tuning, operator: MonotoneOperator) -> Tuning:
        # never longer than these weights allow
        return tuning._replace(alpha=self.solver.alpha or operator.averaging_step())

    def extra_repr(self) -> str:
        return f"channels={self.channels}, {super().extra_repr()}"
