"""Convolutional monotone operator equilibrium layers, on one grid or on several (theory §8, [WK20])."""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache
from typing import Generic, TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..activations import Activation, ReLU
from ..errors import InputError, OptionError
from ..operators import tiers_of
from ..operators.grids import Geometry
from ..operators.quantized_tiers import QuantizedTiers
from ..operators.tiers import TierOperator
from ..parametrizations import MonotoneKernels
from ..solvers import PeacemanRachford, Solver
from .arguments import check_sizes, height_and_width
from .border import Bordered
from .cache import keeping
from .convolutional import ConvolutionalLayer
from .solving import Options

__all__ = ["MonConv2d", "MonotoneConvolution", "MultiTierMonDEQ"]


Channels = TypeVar("Channels", int, tuple[int, ...])


class MonotoneConvolution(ConvolutionalLayer, Generic[Channels]):
    """What :class:`MonConv2d` and :class:`MultiTierMonDEQ` share: tiers of images with a masked border."""

    recurrent: MonotoneKernels | QuantizedTiers

    def __init__(
        self,
        in_channels: int,
        channels: Channels,
        image_size: int | tuple[int, int],
        kernel_size: int = 3,
        margin: float = 1.0,
        learn_margin: bool = False,
        border: int | None = None,
        stride: int = 1,
        activation: Activation | str = ReLU(),
        solver: Solver | None = None,
        tol: float | None = None,
        backward_tol: float | None = None,
        training_tol: float | None = None,
        strict: bool = False,
    ) -> None:
        tiers = self._tiers(channels)
        check_sizes(in_channels=in_channels, kernel_size=kernel_size, stride=stride)
        border = kernel_size // 2 if border is None else border
        if isinstance(border, bool) or not isinstance(border, int) or border < 0:
            raise OptionError(f"border is {border!r}; it is a number of pixels, 0 for none")
        image = height_and_width(image_size, "image_size")
        geometry = _geometry(tiers, image, stride, border)
        recurrent = MonotoneKernels(tiers, kernel_size, margin, learn_margin)
        injection = nn.Conv2d(in_channels, tiers[0], kernel_size, stride, kernel_size // 2)
        solver = PeacemanRachford() if solver is None else solver
        super().__init__(recurrent, injection, Options(activation, solver, tol, backward_tol, training_tol, strict))
        self.image_size, self.geometry = image, geometry

    @staticmethod
    @abstractmethod
    def _tiers(channels: Channels) -> tuple[int, ...]:
        """The channels of every tier; raises :class:`OptionError` unless they are positive integers."""

    @property
    @abstractmethod
    def channels(self) -> Channels:
        """As the constructor takes them."""

    @property
    def border(self) -> int:
        return self.geometry.border

    @property
    def operator(self) -> TierOperator:
        """W with its constants; gradients flow through its products."""
        with keeping():
            kept, like = self._derived.of(self), self.injection.weight
            if isinstance(self.recurrent, QuantizedTiers):
                key = "operator", like.dtype, like.device
                if key not in kept:
                    with torch.no_grad():
                        kept[key] = tiers_of(self.recurrent, self.geometry, like.detach())
                operator: TierOperator = kept[key]
                return operator
            constants = kept.setdefault("constants", {})
            if torch.is_grad_enabled() and any(p.requires_grad for p in self.recurrent.parameters()):
                return TierOperator(self.recurrent(), self.geometry, constants)
            if "kernels" not in kept:
                with torch.no_grad():
                    kept["kernels"] = self.recurrent()
            return TierOperator(kept["kernels"], self.geometry, constants)

    def _operator_for(self, size: tuple[int, int]) -> TierOperator:
        return self.operator

    def _check_image(self, x: Tensor) -> None:
        if tuple(x.shape[2:]) != self.image_size:
            given, needed = tuple(x.shape[2:]), self.image_size
            raise InputError(
                f"the images are {given[0]}×{given[1]}; this layer was made for {needed[0]}×{needed[1]}: resize or pad "
                "them, or make a layer with that image_size"
            )

    def _sigma(self, like: Tensor) -> Activation:
        return Bordered(self.activation, _outside(self.geometry, like.device)) if self.border else self.activation

    def _enter(self, q: Tensor) -> Tensor:
        geometry, p = self.geometry, self.geometry.border
        first = geometry.to_blocks(pad(q.permute(2, 3, 1, 0), (0, 0, 0, 0, p, p, p, p)), 0)
        rows = [first.reshape(geometry.features(0), len(q))]
        # the tiers below see no input of their own
        rows += [q.new_zeros(geometry.features(i), len(q)) for i in range(1, geometry.tiers)]
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).mT

    def _images(self, z: Tensor) -> list[Tensor]:
        """Images ``(B, C_i, H_i, W_i)`` of every tier, without borders."""
        geometry, p = self.geometry, self.geometry.border
        found = []
        for i, blocks in enumerate(geometry.split(z)):
            height, width = geometry.sizes[i]
            images = geometry.to_images(blocks, i)[p : height - p, p : width - p]
            found.append(images.permute(3, 2, 0, 1))
        return found

    def _leave(self, z: Tensor, size: tuple[int, int]) -> Tensor:
        return self._images(z)[-1].contiguous()

    def _value(self, z: Tensor, size: tuple[int, int]) -> Tensor:
        return torch.cat([images.flatten(1) for images in self._images(z)], 1)

    def images(self, value: Tensor, x: Tensor) -> Tensor:
        height, width = (n - 2 * self.border for n in self.geometry.sizes[-1])
        last = self.geometry.channels[-1] * height * width
        return value[:, -last:].unflatten(1, (-1, height, width))

    def extra_repr(self) -> str:
        channels = self.geometry.channels
        return f"channels={channels}, image_size={self.image_size}, border={self.border}, {super().extra_repr()}"


@final
class MonConv2d(MonotoneConvolution[int]):
    """x ``(B, c, H, W)`` ↦ z* ``(B, C, H/stride, W/stride)``, the one solution of z = σ(W z + U ∗ x + b) [WK20].

    W = (1 − m) I − AᵀA + B − Bᵀ with A = √g K/‖K‖_F, g = a² >= 0, and B = h K'/‖K'‖_F circular convolutions: it has
    margin m > 0 by algebra, and a proved one frequency by frequency. States have a border of ``border`` pixels where
    σ is 0, so that opposite edges do not touch; it is cut off again.

    Args:
        in_channels, channels: c and C.
        image_size: H = W, or (H, W), of x.
        kernel_size: of A, B and U, odd.
        margin, learn_margin: m, or its initial value if learned.
        border: default ⌊kernel_size/2⌋; 0 for a plain torus.
        stride: of U, which shrinks the image.
        activation, solver, tol, backward_tol, training_tol, strict: as of :class:`equipoise.MonDEQ`.

    Of a quantized layer ``recurrent`` holds codes, and ``scheme`` is the scheme it was quantized by, else None.

    State: ``recurrent.A.0``, ``recurrent.B.0 (C, C, k, k)``, ``recurrent.a.0``, ``recurrent.h.0``,
    ``recurrent.margin`` or ``recurrent.raw_margin``, ``injection.weight``, ``injection.bias``.

    Raises:
        OptionError: a value outside its range.
    """

    @staticmethod
    def _tiers(channels: int) -> tuple[int, ...]:
        check_sizes(channels=channels)
        return (channels,)

    @property
    def channels(self) -> int:
        return self.geometry.channels[0]


@final
class MultiTierMonDEQ(MonotoneConvolution[tuple[int, ...]]):
    """x ``(B, c, H, W)`` ↦ the coarsest tier's z* ``(B, C_last, H_last, W_last)`` of one equilibrium on several tiers.

    Tier i has ``channels[i]`` channels on images half as high and wide as the tier above, each with the border; A maps
    every tier to itself (stride 1) and to the next (stride 2), and B is chosen such that W is block lower-bidiagonal
    (theory §8 [WK20]): its resolvent is back-substitution over tiers.  ``solve`` shows all tiers,
    flat, one after the other.

    Args:
        channels: of the tiers, finest first.
        image_size: H = W, or (H, W), of x; divided by ``stride`` it halves once per further tier, and with a border on
            both sides it is even wherever it halves.
        others: as of :class:`MonConv2d`.

    State: as of :class:`MonConv2d`, one entry per tier, and ``recurrent.down.i (C_{i+1}, C_i, k, k)``,
    ``recurrent.d.i``.

    Raises:
        OptionError: a value outside its range, or sizes that do not halve.
    """

    @staticmethod
    def _tiers(channels: tuple[int, ...]) -> tuple[int, ...]:
        if not isinstance(channels, (tuple, list)) or not channels:
            raise OptionError(f"channels is {channels!r}; it is a tuple such as (16, 32, 32), one entry per tier")
        for count in channels:
            check_sizes(channels=count)
        return tuple(channels)

    @property
    def channels(self) -> tuple[int, ...]:
        return self.geometry.channels


@lru_cache(maxsize=32)
def _outside(geometry: Geometry, device: torch.device) -> Tensor:
    """Indices of a state's entries on the border."""
    with torch.inference_mode(False):
        return (~geometry.interior()).nonzero()[:, 0].to(device)


def _geometry(channels: tuple[int, ...], image: tuple[int, int], stride: int, border: int) -> Geometry:
    """The tiers' grids, or :class:`OptionError` where images do not halve."""
    halvings = len(channels) - 1
    sizes = [tuple(-(-n // stride) for n in image)]
    for n in sizes[0]:
        if n % 2**halvings:
            step = stride * 2**halvings
            raise OptionError(
                f"images of {image[0]}×{image[1]} at stride {stride} do not halve {halvings} times, as {len(channels)} "
                f"tiers need; pad or resize them to multiples of {step}, e.g. {-(-max(image) // step) * step}, or use "
                "fewer tiers"
            )
    for _ in range(halvings):
        sizes.append(tuple(n // 2 for n in sizes[-1]))
    return Geometry(channels, tuple((h + 2 * border, w + 2 * border) for h, w in sizes), border)
