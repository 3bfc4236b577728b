"""Circular kernels whose W = (1 − m) I − AᵀA + B − Bᵀ has margin at least m, on one grid or several (theory §8).

A = √g K/‖K‖_F with g = a², so that no training step can make it negative (the published single convolution leaves g
free [WK20], and loses its margin where it falls below 0); B = h K/‖K‖_F.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from .monotone import Margined

__all__ = ["Kernels", "MonotoneKernels", "gram", "transpose"]


class Kernels(NamedTuple):
    """What W is multiplied by, tier by tier, kernels centred, ``y[n] = Σ_a K[a] z[n + a − c]``.

    W is block lower-bidiagonal: block (i, i) is ``own[i] − downᵀ down`` with ``down[i]`` of stride 2 (no second term in
    the last tier), block (i + 1, i) is ``−2 lift[i]ᵀ down[i]``. ``own[i]`` is ``(C_i, C_i, 2k − 1, 2k − 1)``,
    ``down[i] (C_{i+1}, C_i, k, k)``, ``lift[i]``, which is tier i + 1's A, ``(C_{i+1}, C_{i+1}, k, k)``.
    """

    own: tuple[Tensor, ...]
    down: tuple[Tensor, ...] = ()
    lift: tuple[Tensor, ...] = ()

    def flat(self) -> tuple[Tensor, ...]:
        """All tensors in order."""
        return (*self.own, *self.down, *self.lift)

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...]) -> Kernels:
        """The inverse of :meth:`flat`."""
        tiers = (len(tensors) + 2) // 3
        return cls(tensors[:tiers], tensors[tiers : 2 * tiers - 1], tensors[2 * tiers - 1 :])


class MonotoneKernels(Margined):
    """The kernels of a convolutional monDEQ with one tier per entry of ``channels``.

    Forward: ``() -> Kernels`` with λ_min(sym(I − W)) >= m on every torus.
    State: ``A.i``, ``B.i (C_i, C_i, k, k)``, ``down.i (C_{i+1}, C_i, k, k)``, gains ``a.i``, ``h.i``, ``d.i``, and
    ``margin`` (fixed) or ``raw_margin`` (learned).

    Raises:
        OptionError: a margin that is not positive.
    """

    def __init__(
        self, channels: tuple[int, ...], kernel_size: int, margin: float = 1.0, learn_margin: bool = False
    ) -> None:
        super().__init__()

        def made(outputs: int, inputs: int) -> nn.Parameter:
            scale = (inputs * kernel_size**2) ** -0.5
            return nn.Parameter(torch.empty(outputs, inputs, kernel_size, kernel_size).uniform_(-scale, scale))

        def ones(count: int) -> nn.ParameterList:
            return nn.ParameterList(nn.Parameter(torch.ones(())) for _ in range(count))

        self.channels, self.kernel_size = tuple(channels), kernel_size
        tiers = len(channels)
        self.A = nn.ParameterList(made(c, c) for c in channels)
        self.B = nn.ParameterList(made(c, c) for c in channels)
        self.down = nn.ParameterList(made(channels[i + 1], channels[i]) for i in range(tiers - 1))
        self.a, self.h, self.d = ones(tiers), ones(tiers), ones(tiers - 1)
        self._keep(margin, learn_margin)

    def scaled(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """(A_i; K_i = B_i − B_iᵀ, kernels with K[a]_ij = −K[−a]_ji; A_{i+1,i}), with their graph."""
        A = [_unit(K) * a for K, a in zip(self.A, self.a, strict=True)]
        B = [_unit(K) * h for K, h in zip(self.B, self.h, strict=True)]
        down = [_unit(K) * d for K, d in zip(self.down, self.d, strict=True)]
        return A, [K - transpose(K) for K in B], down

    def forward(self) -> Kernels:
        with torch.autocast(self.A[0].device.type, enabled=False):
            A, K, down = self.scaled()
            return assembled(A, K, down, self.current_margin())

    def factors(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], float]:
        """(A_i, K_i, A_{i+1,i}, m), detached: what a structured quantizer rounds."""
        with torch.no_grad():
            A, K, down = self.scaled()
        return A, K, down, float(self.current_margin().detach())


def assembled(A: list[Tensor], K: list[Tensor], down: list[Tensor], margin: Tensor | float) -> Kernels:
    """The kernels of W for these factors, the one way in which they are computed."""
    own = []
    for A_i, K_i in zip(A, K, strict=True):
        reach = (A_i.shape[2] - 1) // 2
        center = torch.zeros_like(A_i)
        center[:, :, reach, reach] = torch.eye(len(A_i), dtype=A_i.dtype, device=A_i.device) * (1 - margin)
        own.append(pad(K_i + center, (reach,) * 4) - gram(A_i))
    return Kernels(tuple(own), tuple(down), tuple(A[1:]))


def gram(A: Tensor) -> Tensor:
    """The kernel ``(i, i, 2k − 1, 2k − 1)`` of AᵀA, ``Σ_a A[a]ᵀ A[a + d]``, for A ``(o, i, k, k)``."""
    columns = A.transpose(0, 1)
    return conv2d(columns, columns, padding=A.shape[2] - 1).transpose(0, 1)


def transpose(K: Tensor) -> Tensor:
    """The kernel of the transpose of a circular convolution of stride 1."""
    return K.transpose(0, 1).flip(2, 3)


def _unit(K: Tensor) -> Tensor:
    return K / torch.linalg.vector_norm(K).clamp_min(torch.finfo(K.dtype).tiny ** 0.5)
