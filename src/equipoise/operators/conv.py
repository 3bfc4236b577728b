"""W as a circular convolution, certified by the row sums of its kernel (theory §7)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad
from torch.nn.grad import conv2d_weight

from .. import verified
from ..errors import InputError, StructureError
from ..norms import WeightedMax
from .base import MonotoneOperator, Product
from .dense import TransposedOperator
from .grids import circular

__all__ = ["ConvOperator", "Doubt"]


class Doubt(NamedTuple):
    """How far the kernel that is multiplied by may lie from the one that stored numbers define.

    ``rows (C,)`` bounds Σ |ΔK_c| η/η_c, ``spectral`` the 2-norm; ``floor``: a lower bound of 1 − μ that holds of the
    stored numbers' kernel by algebra.
    """

    rows: Tensor
    spectral: float
    floor: float


class ConvOperator(MonotoneOperator):
    """z ↦ K ∗ z on images ``(B, C·H·W)``, circular, with K ``(C, C, k, k)``, k odd, centred.

    Every pixel of a channel has the same row sum, so the measure in the norm of the channels' weights η ``(C,)`` is
    read off the kernel: μ_c = K_cc(0) + (Σ |K_c| η − |K_cc(0)| η_c)/η_c. Where the kernel is wider than the image its
    taps fall together, which lowers row sums at most.

    Args:
        kernel: may carry a graph; constants are of its values.
        size: (H, W).
        eta: one weight per channel.
        derived: constants already computed for these same values, shared and filled.
        doubt: where stored numbers define another kernel: bounds hold for both.
    """

    def __init__(
        self,
        kernel: Tensor,
        size: tuple[int, int],
        eta: Tensor,
        derived: dict[Any, Any] | None = None,
        doubt: Doubt | None = None,
    ) -> None:
        channels, inputs, height, width = kernel.shape
        if channels != inputs or height != width or height % 2 == 0:
            raise InputError(f"the kernel is {tuple(kernel.shape)}; (C, C, k, k) with k odd is needed")
        self.weight, self.size, self.channels, self.eta = kernel, size, channels, WeightedMax(eta).eta
        self.features = channels * size[0] * size[1]
        self.family = WeightedMax(self.eta.repeat_interleave(size[0] * size[1]))
        self._derived = {} if derived is None else derived
        self._doubt = doubt
        self.representation_error = 0.0 if doubt is None else doubt.spectral

    def apply(self, z: Tensor) -> Tensor:
        return self._convolve(z, self.weight)

    def transpose(self, z: Tensor) -> Tensor:
        return self._convolve(z, self.weight.transpose(0, 1).flip(2, 3))

    def _convolve(self, z: Tensor, kernel: Tensor) -> Tensor:
        return conv2d(self._padded(z), kernel).flatten(1)

    def _padded(self, z: Tensor) -> Tensor:
        """``z`` as images ``(B, C, H + k − 1, W + k − 1)``, continued around their edges."""
        images, reach = z.unflatten(1, (self.channels, *self.size)), self.weight.shape[2] // 2
        if reach > min(self.size):  # wrapped around more than once
            rows, columns = (torch.arange(-reach, n + reach, device=z.device) % n for n in self.size)
            return images[:, :, rows][:, :, :, columns]
        return pad(images, (reach,) * 4, mode="circular") if reach else images

    @property
    def terms(self) -> int:
        return self.weight[0].numel()

    def summed(self, z: Tensor) -> Tensor:
        found = circular(z.unflatten(1, (self.channels, *self.size)).permute(2, 3, 1, 0), self.weight.detach())
        return found.permute(3, 2, 0, 1).flatten(1)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    def pullback(self, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        shape = list(self.weight.shape)
        return (conv2d_weight(self._padded(z), shape, y.unflatten(1, (self.channels, *self.size))),)

    # Constants

    def _kernel64(self) -> tuple[Tensor, Tensor]:
        """(Σ_taps |K| without the centre's diagonal, ``(C, C)``; the centre's diagonal ``(C,)``), float64."""

        def compute() -> tuple[Tensor, Tensor]:
            K = self.weight.detach().to("cpu", torch.float64)
            if not bool(torch.isfinite(K).all()):
                raise InputError("the kernel holds NaN or infinite entries; nothing can be proved")
            middle = K.shape[2] // 2
            center = K[:, :, middle, middle].diagonal().clone()
            off = K.abs()
            off[:, :, middle, middle].fill_diagonal_(0.0)
            return off.sum((2, 3)), center

        return self.once("kernel64", compute)

    def _rows(self, diagonal: Tensor) -> Tensor:
        """Upper bounds ``(C,)`` of ``diagonal`` + Σ of the other taps · η/η_c."""
        off, _ = self._kernel64()
        taps = self.channels * self.weight.shape[2] ** 2
        tiny = torch.finfo(self.weight.dtype).tiny * 4 * (taps + 1) * (1 + float(self.eta.max()))
        sums = ((off * self.eta).sum(1) + tiny) / self.eta * (1 + verified.gamma(taps + 16))
        up = torch.full_like(sums, math.inf)
        return torch.nextafter(torch.nextafter(sums, up) + diagonal, up)

    def _doubtful(self, rows: Tensor) -> Tensor:
        """Upper bounds ``rows`` ``(C,)`` about the applied kernel, made such of the stored one as well."""
        if self._doubt is None:
            return rows
        return torch.nextafter(rows + self._doubt.rows, torch.full_like(rows, math.inf))

    def channel_measures(self) -> Tensor:
        """Upper bounds ``(C,)`` of μ_c, of the kernel that is multiplied by."""
        return self._rows(self._kernel64()[1])

    def channel_margins(self) -> Tensor:
        """Lower bounds ``(C,)`` of 1 − μ_c."""
        rows = self.channel_measures()
        down = torch.full_like(rows, -math.inf)
        applied = torch.nextafter(1 - rows, down)
        if self._doubt is None:
            return applied
        stored = torch.nextafter(1 - self._doubtful(rows), down).clamp_min(self._doubt.floor)
        return torch.minimum(applied, stored)

    def row_margins(self) -> Tensor:
        """Lower bounds ``(C·H·W,)`` of 1 − μ_i."""
        return self.once("row_margins", lambda: self._spread(self.channel_margins()))

    def row_norms(self) -> Tensor:
        """Upper bounds ``(C·H·W,)`` of Σ_j |W_ij| η_j/η_i."""
        return self.once("row_norms", lambda: self._spread(self._doubtful(self._rows(self._kernel64()[1].abs()))))

    def _spread(self, per_channel: Tensor) -> Tensor:
        return per_channel.repeat_interleave(self.size[0] * self.size[1])

    def margin(self) -> float:
        return self.once("margin", lambda: float(self.channel_margins().min()))

    def norm(self) -> float:
        return float(self.row_norms().max())

    def lipschitz(self) -> float:
        center = self._kernel64()[1]
        distance = torch.nextafter((1 - center).abs(), torch.full_like(center, math.inf))
        return self.once("lipschitz", lambda: float(self._doubtful(self._rows(distance)).max()))

    def absolute_norm(self) -> float:
        def compute() -> float:
            off, center = self._kernel64()
            whole = off + torch.diag(center.abs())
            rows, columns = float(whole.sum(1).max()), float(whole.sum(0).max())
            return verified.up(math.sqrt(rows * columns) * (1 + verified.gamma(whole.numel() + 64)))

        return self.once("absolute_norm", compute)

    def distance(self, reference: ConvOperator) -> float:
        """A bound of ‖W − W'‖_η' on images of any size, W' and η' those of a ``reference``."""
        exact, other = (k.weight.detach().to("cpu", torch.float64) for k in (self, reference))
        change = ConvOperator(exact - other, self.size, reference.eta)
        rows = change._rows(change._kernel64()[1].abs()) * (1 + verified.gamma(4))
        if self._doubt is not None:  # measured in η, so in η' by at most the ratio of ratios
            ratio = self.eta / reference.eta
            rows = rows + self._doubt.rows * float(ratio.max() / ratio.min()) * (1 + 1e-12)
        if reference._doubt is not None:
            rows = rows + reference._doubt.rows
        return verified.up(float(rows.max()))

    def averaging_step(self) -> float:
        lowest = min(float(self._kernel64()[1].min()), 0.0)
        return verified.down(1 / verified.up(1 - lowest))

    def transposed(self) -> TransposedOperator:
        return TransposedOperator(self)

    def _no_inverse(self) -> NoReturn:
        raise StructureError(
            "no inverse of a convolution is formed here; solve with ForwardBackward, Picard, or Anderson on one of them"
        )

    def cayley(self, alpha: float) -> Tensor:
        self._no_inverse()

    def transposed_cayley_product(self, alpha: float) -> Product:
        self._no_inverse()

    def cayley_norm(self, alpha: float) -> float:
        self._no_inverse()

    def best_alpha(self) -> float:
        self._no_inverse()

    def forward_norm(self, alpha: float) -> float:
        self._no_inverse()
