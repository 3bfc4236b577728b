"""Kernels of convolutional monDEQs as codes, one class per scheme (theory §4, §8)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn

from .. import verified
from ..errors import InputError
from ..parametrizations.convolution import Kernels, MonotoneKernels, assembled
from ..quantization.codes import QuantizedTensor, Stored
from ..quantization.schemes import Assembled, Compensated, Structured
from .grids import Geometry
from .quantized import compensated
from .symbol_bounds import size
from .tiers import TierOperator

__all__ = [
    "AssembledTiers",
    "CompensatedTiers",
    "QuantizedSkewKernel",
    "QuantizedTiers",
    "StructuredTiers",
]


class QuantizedSkewKernel(nn.Module):
    """A kernel ``(C, C, k, k)`` with K[a]_ij = −K[−a]_ji exactly, whatever the codes: half of its taps are stored.

    Its one submodule ``taps`` is the :class:`QuantizedTensor` of the (C² k² − C)/2 entries that come before their
    partners, row by row, with one scale; the diagonal of the centre is 0.

    Raises:
        InputError: another number of codes, or several scales.
    """

    def __init__(self, taps: QuantizedTensor, channels: int, kernel_size: int) -> None:
        super().__init__()
        expected = ((channels * kernel_size) ** 2 - channels) // 2
        if tuple(taps.shape) != (expected,) or taps.scale.ndim:
            raise InputError(
                f"a skew kernel of {channels} channels has {expected} codes and one scale, not {tuple(taps.shape)}"
            )
        self.taps, self.channels, self.kernel_size = taps, channels, kernel_size

    @classmethod
    def fit(cls, K: Tensor, bits: int, scale: Any) -> Self:
        channels, size = K.shape[0], K.shape[2]
        first, second = _partners(channels, size)
        flat = K.detach().to("cpu", torch.float64).flatten()
        return cls(QuantizedTensor.fit((flat[first] - flat[second]) / 2, bits, scale=scale), channels, size)

    def dequantize(self) -> Tensor:
        """The kernel in float64, on the CPU."""
        first, second = _partners(self.channels, self.kernel_size)
        flat, values = torch.zeros(self.channels**2 * self.kernel_size**2).double(), self.taps.dequantize().cpu()
        flat[first], flat[second] = values, -values
        return flat.view(self.channels, self.channels, self.kernel_size, self.kernel_size)


def _partners(channels: int, size: int) -> tuple[Tensor, Tensor]:
    """Indices of the entries that come before their partner K[−a]_ji, and of the partners."""
    index = torch.arange(channels**2 * size**2).view(channels, channels, size, size)
    partner = index.transpose(0, 1).flip(2, 3)
    first = index < partner
    return index[first], partner[first]


class QuantizedTiers(Stored, ABC):
    """The kernels of W̃ given by codes and scales only; scalars keep the dtype they were stored in."""

    @property
    @abstractmethod
    def channels(self) -> tuple[int, ...]:
        """C_i of the tiers."""

    @abstractmethod
    def operator(self, geometry: Geometry, like: Tensor) -> TierOperator:
        """W̃ in the dtype and on the device of ``like``, its distance to what the codes define bounded."""


class StructuredTiers(QuantizedTiers):
    """W̃ = (1 − m) I − ÃᵀÃ + K̃ with Ã = Q(A) on every tier and between them, K̃ = Q(B − Bᵀ) skew: the margin is at
    least m at every bit-width, by algebra on the stored numbers; and what is multiplied by keeps it, too.

    State: ``A.i.codes``, ``A.i.scale``, ``K.i.taps.codes``, …, ``down.i.codes``, …, ``margin`` float64.
    """

    margin: Tensor

    def __init__(
        self,
        A: list[QuantizedTensor],
        K: list[QuantizedSkewKernel],
        down: list[QuantizedTensor],
        margin: float,
    ) -> None:
        super().__init__()
        self.A, self.K, self.down = nn.ModuleList(A), nn.ModuleList(K), nn.ModuleList(down)
        self.register_buffer("margin", torch.tensor(margin, dtype=torch.float64))

    @classmethod
    def quantize(
        cls, weights: MonotoneKernels, scheme: Structured, geometry: Geometry, like: Tensor
    ) -> StructuredTiers:
        A, K, down, margin = weights.factors()
        skew_bits = scheme.bits if scheme.skew_bits is None else scheme.skew_bits
        kernels = [
            [QuantizedTensor.fit(k, scheme.bits, scheme.granularity, scheme.scale) for k in ks] for ks in (A, down)
        ]
        skew = [QuantizedSkewKernel.fit(k, skew_bits, scheme.scale) for k in K]
        return cls(kernels[0], skew, kernels[1], margin)

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(A.shape[0] for A in self.A)  # type: ignore[index, misc]

    def operator(self, geometry: Geometry, like: Tensor) -> TierOperator:
        margin, parts = float(self.margin), (self.A, self.K, self.down)
        exact: list[list[Tensor]] = [[t.dequantize().cpu() for t in ts] for ts in parts]  # type: ignore[operator]
        A, K, down = ([t.to(like.dtype).double() for t in ts] for ts in exact)  # as they are multiplied by
        stored, used = assembled(exact[0], exact[1], exact[2], margin), assembled(A, K, down, margin)
        own = []
        for i, kernel in enumerate(used.own):
            # by algebra the margin is m, up to what forming this kernel and casting it cost
            cast = kernel.to(like.dtype)
            slip = _forming(A[i], K[i], margin) + size(cast.double() - kernel)
            own.append(_lowered(cast, slip))
        forming = [_forming(*pair, margin) for pair in zip(exact[0], exact[1], strict=True)]
        for _ in range(8):  # what is proved falls short of what is true by a few roundings
            kernels = Kernels(*(tuple(t.to(like) for t in ts) for ts in (own, used.down, used.lift)))
            operator = TierOperator(kernels, geometry, floor=(margin, _distance(kernels, stored, forming)))
            short = margin - operator.margin()
            if short <= 0:
                break
            own = [_lowered(kernel, short * 1.01) for kernel in own]
        return operator


class AssembledTiers(QuantizedTiers):
    """W̃ = Q(W), the kernel of W rounded: the margin moves. Of one tier only.

    State: ``codes.codes``, ``codes.scale``.
    """

    def __init__(self, codes: QuantizedTensor) -> None:
        super().__init__()
        self.codes = codes

    @classmethod
    def quantize(cls, weights: MonotoneKernels, scheme: Assembled, geometry: Geometry, like: Tensor) -> AssembledTiers:
        return cls(QuantizedTensor.fit(_kernel64(weights), scheme.bits, scheme.granularity, scheme.scale))

    @property
    def channels(self) -> tuple[int, ...]:
        return (self.codes.shape[0],)

    def kernel(self) -> Tensor:
        """K̃ in float64, on the CPU."""
        return self.codes.dequantize().cpu()

    def operator(self, geometry: Geometry, like: Tensor) -> TierOperator:
        return _plain(self.kernel(), geometry, like)


class CompensatedTiers(QuantizedTiers):
    """The kernel of W rounded, but for the diagonal of its centre, which is kept finer and lowered until m̃ >= target.

    State: ``off.codes``, ``off.scale``, ``diagonal.codes``, ``diagonal.scale``.
    """

    def __init__(self, off: QuantizedTensor, diagonal: QuantizedTensor) -> None:
        super().__init__()
        channels, rest = off.shape
        taps = math.isqrt(max(rest + 1, 1) // max(channels, 1))
        if tuple(diagonal.shape) != (channels,) or channels * taps**2 != rest + 1:
            raise InputError(f"codes {tuple(off.shape)} and a diagonal {tuple(diagonal.shape)} are of no kernel")
        self.off, self.diagonal, self.kernel_size = off, diagonal, taps

    @classmethod
    def quantize(
        cls, weights: MonotoneKernels, scheme: Compensated, geometry: Geometry, like: Tensor
    ) -> CompensatedTiers:
        kernel = _kernel64(weights)
        channels = kernel.shape[0]
        center = _centers(channels, kernel.shape[2])
        flat = kernel.reshape(channels, -1)
        diagonal = flat.gather(1, center)[:, 0]
        off = QuantizedTensor.fit(_without(flat, center), scheme.bits, scheme.granularity, scheme.scale)
        return compensated(
            lambda stored: cls(off, stored), diagonal, 0.0, scheme, lambda made: made.operator(geometry, like).margin()
        )

    @property
    def channels(self) -> tuple[int, ...]:
        return (self.diagonal.shape[0],)

    def kernel(self) -> Tensor:
        """K̃ in float64, on the CPU."""
        off, diagonal = self.off.dequantize().cpu(), self.diagonal.dequantize().cpu()
        channels = len(diagonal)
        flat = torch.zeros(channels, off.shape[1] + 1, dtype=torch.float64)
        center = _centers(channels, self.kernel_size)
        keep = torch.ones_like(flat, dtype=torch.bool).scatter_(1, center, False)
        flat[keep] = off.flatten()
        flat.scatter_(1, center, diagonal[:, None])
        return flat.view(channels, channels, self.kernel_size, self.kernel_size)

    def operator(self, geometry: Geometry, like: Tensor) -> TierOperator:
        return _plain(self.kernel(), geometry, like)


def _kernel64(weights: MonotoneKernels) -> Tensor:
    return weights().own[0].detach().to("cpu", torch.float64)


def _plain(kernel: Tensor, geometry: Geometry, like: Tensor) -> TierOperator:
    """The operator of a stored ``kernel``, cast; what is proved holds of both."""
    cast = kernel.to(like.dtype)
    apart = verified.up(size(cast.double() - kernel) * (1 + 1e-12) + _rounded(kernel))
    return TierOperator(Kernels((cast.to(like),)), geometry, floor=(-math.inf, apart))


def _rounded(kernel: Tensor) -> float:
    """What one rounding of each entry of ``kernel`` changes, in the 2-norm."""
    return verified.up(2 * verified.UNIT * size(kernel) + verified.TINY * kernel.numel())


def _forming(A: Tensor, K: Tensor, margin: float) -> float:
    """What (1 − m) I − AᵀA + K may be rounded by, in the 2-norm."""
    whole = size(A) ** 2 + size(K) + abs(1 - margin)
    return verified.up(verified.gamma(A[0].numel() * 2 + 16) * whole * (1 + 1e-12) + verified.TINY * A.numel())


def _lowered(kernel: Tensor, by: float) -> Tensor:
    """``kernel`` with the diagonal of its centre lowered by at least ``by``."""
    kernel, middle = kernel.clone(), kernel.shape[2] // 2
    center = kernel[:, :, middle, middle].diagonal()
    target = (center.double() - by).to(kernel.dtype)
    center.copy_(torch.nextafter(target, torch.full_like(target, -math.inf)))
    return kernel


def _distance(used: Kernels, stored: Kernels, forming: list[float]) -> float:
    """A bound of ‖W − W'‖₂ between two sets of kernels, the second known up to ``forming`` on its diagonal and up to
    one rounding of each code times a float64 scale beside it."""

    def moved(ones: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> list[tuple[float, float]]:
        found = []
        for one, other in zip((one.detach().to("cpu", torch.float64) for one in ones), others, strict=True):
            found.append((size(one - other) * (1 + 1e-12) + _rounded(other), max(size(one), size(other))))
        return found

    own, down, lift = (moved(getattr(used, name), getattr(stored, name)) for name in ("own", "down", "lift"))
    blocks = torch.diag(torch.tensor([e + f for (e, _), f in zip(own, forming, strict=True)], dtype=torch.float64))
    for i, ((e_d, d), (e_a, a)) in enumerate(zip(down, lift, strict=True)):
        blocks[i, i] += 2 * d * e_d + e_d**2
        blocks[i + 1, i] = 2 * (a * e_d + d * e_a + e_d * e_a)
    return verified.up(verified.absolute_norm(blocks) * (1 + 1e-12))


def _centers(channels: int, size: int) -> Tensor:
    """Where the diagonal of the centre lies in each row ``(C, 1)`` of a kernel ``(C, C·k·k)``."""
    return (torch.arange(channels) * size**2 + size**2 // 2)[:, None]


def _without(flat: Tensor, center: Tensor) -> Tensor:
    keep = torch.ones_like(flat, dtype=torch.bool).scatter_(1, center, False)
    return flat[keep].view(len(flat), -1)
