"""The kernel of a convolutional NEMON layer as codes, its diagonal computed from them (theory §4, §7)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import verified
from ..errors import InputError, OptionError
from ..norms import WeightedMax
from ..parametrizations import ContractiveKernel
from ..quantization.codes import QuantizedTensor, Stored
from ..quantization.schemes import Scheme, Structured
from .contractive import UnfitSchemeError, stored_weights
from .conv import ConvOperator, Doubt

__all__ = ["StructuredKernel"]


class StructuredKernel(Stored):
    """K̃ = D⁻¹ T̃ D with the centre of channel i raised by γ − Σ |T̃_i|, T̃ = Q(T), D = 1/η: μ_i <= γ.

    The measure stays at most γ at every bit-width, by algebra on the stored numbers, and the kernel that is multiplied
    by has its centre rounded so that it keeps γ, too.

    State: ``T.codes (C, C, k, k)``, ``T.scale``, ``eta (C,)`` float32, ``gamma`` float64.
    """

    eta: Tensor
    gamma: Tensor

    def __init__(self, T: QuantizedTensor, eta: Tensor, gamma: float) -> None:
        super().__init__()
        channels, inputs, height, width = T.shape
        if channels != inputs or height != width or height % 2 == 0 or tuple(eta.shape) != (channels,):
            raise InputError(f"codes {tuple(T.shape)} with eta {tuple(eta.shape)}; (C, C, k, k), k odd, and (C,) fit")
        WeightedMax(eta)  # which checks it
        self.T = T
        self.register_buffer("eta", eta.detach().to(torch.float32).clone())
        self.register_buffer("gamma", torch.tensor(gamma, dtype=torch.float64))

    @classmethod
    def quantize(cls, weights: ContractiveKernel, scheme: Scheme) -> StructuredKernel:
        """Round T by ``scheme``; raises :class:`StructureError` or :class:`OptionError` where it does not fit."""
        if not isinstance(scheme, Structured):
            raise UnfitSchemeError(
                f"{type(scheme).__name__} does not keep the row sums of a kernel; a convolutional NEMON layer is "
                "quantized by Structured alone"
            )
        for name, parts in (("skew_bits", "a skew part"), ("input_bits", "codes of U"), ("bias_bits", "codes of b")):
            if getattr(scheme, name) is not None:
                raise OptionError(f"{name}={getattr(scheme, name)}: a convolutional layer has no {parts}; leave it out")
        T, eta, gamma = weights.factors()
        return cls(QuantizedTensor.fit(T, scheme.bits, scheme.granularity, scheme.scale), stored_weights(eta), gamma)

    def family(self) -> WeightedMax:
        """The norm of the stored weights."""
        return WeightedMax(self.eta)

    def assemble(self) -> tuple[Tensor, Tensor]:
        """(K̃ float64, e): each entry of Σ_taps |K̃ − what the codes define| is at most e's, ``(C, C)``."""
        T, eta, gamma = self.T.dequantize().cpu(), self.eta.to("cpu", torch.float64), float(self.gamma)
        middle, sums = T.shape[2] // 2, T.abs().sum((1, 2, 3))
        kernel = T * (eta[:, None] / eta[None, :])[:, :, None, None]
        error = verified.gamma(8) * kernel.abs().sum((2, 3))
        kernel[:, :, middle, middle] -= torch.diag(sums - gamma)
        # the sum, its use at the centre, and code times scale where that is rounded
        slips = verified.gamma(T[0].numel() + 12) * (3 * sums + 2 * abs(gamma))
        error = (error + torch.diag(slips)) * (1 + verified.gamma(T[0].numel() + 8)) + verified.TINY * T[0].numel()
        return kernel, error

    def applied(self, like: Tensor) -> tuple[Tensor, Doubt]:
        """The kernel as it is multiplied by, in the dtype and on the device of ``like``, and its distance to K̃."""
        exact, error = self.assemble()
        eta, gamma = self.eta.to("cpu", torch.float64), float(self.gamma)
        kernel = self._lowered(exact.to(like), eta, gamma)
        moved = (kernel.to("cpu", torch.float64) - exact).abs().sum((2, 3))
        apart = (moved + error) * (1 + verified.gamma(exact[0].numel() + 8)) + verified.TINY
        rows = ((apart * eta).sum(1) / eta) * (1 + verified.gamma(len(eta) + 8)) + verified.TINY
        return kernel, Doubt(rows, verified.absolute_norm(apart), verified.down(1 - gamma))

    @staticmethod
    def _lowered(kernel: Tensor, eta: Tensor, ceiling: float) -> Tensor:
        """``kernel`` with the centre lowered by as few roundings as prove μ_c <= ``ceiling`` of what is left."""
        kernel, middle = kernel.clone(), kernel.shape[2] // 2
        for _ in range(8):
            excess = (ConvOperator(kernel, (1, 1), eta).channel_measures() - ceiling).to(kernel.device)
            high = excess > 0
            if not bool(high.any()):
                break
            center = kernel[:, :, middle, middle].diagonal()
            target = (center.double() - excess * (1 + 1e-9)).to(kernel.dtype)
            below = torch.minimum(target, torch.nextafter(center, torch.full_like(center, -torch.inf)))
            center.copy_(torch.where(high, below, center))
        return kernel

    def forward(self) -> Tensor:
        return self.assemble()[0]

    @property
    def packed_bytes(self) -> int:
        """Bytes when packed: codes at their bits, scales, η and γ at their own width."""
        own = (self.eta, self.gamma)
        return self.T.packed_bytes + sum(t.numel() * t.element_size() for t in own)
