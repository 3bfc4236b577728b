"""The grids of a convolutional monDEQ, and products on them (theory §8).

A state is ``(B, n)``; its memory is that of ``(n, B)``, the samples last, where products are cheapest. Tier i lies on a
grid of G_i pixels with c_i channels each, pixel by pixel. The last tier's grid is its image. An image of a tier above
it is taken in blocks of 2 × 2 pixels, so that a stride of 2 is a plain convolution too: c_i = 4 C_i channels, ordered
(row in block, column in block, channel), on S_i/2 pixels a side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .torus import Symbols, Torus, mix, torus

__all__ = ["Geometry", "TierProduct", "blocked", "circular", "correlate"]


@dataclass(frozen=True)
class Geometry:
    """The grids of the tiers: ``channels (C_i)`` on images of ``sizes`` S_i = (H, W) each, ``border`` pixels of which
    all around are the border."""

    channels: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    border: int

    @property
    def tiers(self) -> int:
        return len(self.channels)

    def block(self, i: int) -> int:
        """Pixels a side of a block: 2, in the last tier 1."""
        return 1 if i == self.tiers - 1 else 2

    def grid(self, i: int) -> tuple[int, int]:
        """G_i: blocks along each axis."""
        (height, width), s = self.sizes[i], self.block(i)
        return height // s, width // s

    def width(self, i: int) -> int:
        """c_i: channels of a block."""
        return self.channels[i] * self.block(i) ** 2

    def features(self, i: int) -> int:
        return self.channels[i] * math.prod(self.sizes[i])

    def to_blocks(self, images: Tensor, i: int) -> Tensor:
        """``(G, G', c_i, B)`` of images ``(S, S', C_i, B)``."""
        (height, width), s = self.grid(i), self.block(i)
        if s == 1:
            return images
        return (
            images.unflatten(1, (width, s))
            .unflatten(0, (height, s))
            .permute(0, 2, 1, 3, 4, 5)
            .reshape(height, width, self.width(i), images.shape[3])
        )

    def to_images(self, blocks: Tensor, i: int) -> Tensor:
        """The inverse of :meth:`to_blocks`."""
        s = self.block(i)
        if s == 1:
            return blocks
        apart = blocks.unflatten(2, (s, s, self.channels[i])).permute(0, 2, 1, 3, 4, 5)
        return apart.flatten(2, 3).flatten(0, 1)

    def place(self, images: Tensor, i: int) -> Tensor:
        """What ``down`` makes of tier i, ``(G, G', C_{i+1}, B)``, as blocks of tier i + 1: around it zeros, so that it
        lies over the pixels that it was made of."""
        (height, width), start = self.sizes[i + 1], self.border // 2
        rows, columns = height - start - images.shape[0], width - start - images.shape[1]
        return self.to_blocks(pad(images, (0, 0, 0, 0, start, columns, start, rows)), i + 1)

    def unplace(self, blocks: Tensor, i: int) -> Tensor:
        """The transpose of :meth:`place`."""
        (rows, columns), start = self.grid(i), self.border // 2
        return self.to_images(blocks, i + 1)[start : start + rows, start : start + columns]

    def split(self, z: Tensor) -> list[Tensor]:
        """The tiers of a state ``(B, n)`` as blocks ``(G, G', c_i, B)``; no copy where the samples are last."""
        parts = z.mT.contiguous().split([self.features(i) for i in range(self.tiers)])
        return [part.view(*self.grid(i), self.width(i), len(z)) for i, part in enumerate(parts)]

    def join(self, blocks: list[Tensor]) -> Tensor:
        """The inverse of :meth:`split`."""
        parts = [block.flatten(0, 2) for block in blocks]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).mT

    def interior(self) -> Tensor:
        """Which entries ``(n,)`` of a state are not on a border."""
        masks = []
        for i, (channels, size) in enumerate(zip(self.channels, self.sizes, strict=True)):
            p = self.border
            inside = pad(torch.ones(*(n - 2 * p for n in size)), (p,) * 4)
            masks.append(self.to_blocks(inside[:, :, None, None].expand(-1, -1, channels, 1), i).flatten() > 0)
        return torch.cat(masks)


def blocked(kernel: Tensor, rows: int, columns: int) -> Tensor:
    """The kernel of a convolution between images in blocks of ``rows`` and of ``columns`` pixels a side, of which one
    is the other or 1: ``P[(a, o), (b, i), e] = K[o, i, columns · e + b − a]``, e centred; with its graph."""
    if rows == columns == 1:
        return kernel
    outputs, inputs, size, _ = kernel.shape
    reach = size // 2
    wide = (reach + columns - 1) // columns
    e, b, a = torch.arange(-wide, wide + 1), torch.arange(columns), torch.arange(rows)
    taps = columns * e[None, None, :] + b[None, :, None] - a[:, None, None] + reach  # (a, b, e)
    known = (taps >= 0) & (taps < size)
    taps = torch.where(known, taps, size).to(kernel.device)  # the last: a row and column of zeros
    padded = pad(kernel, (0, 1, 0, 1))
    # (o, i, a, b, e, a', b', e') -> ((a, a', o), (b, b', i), e, e')
    found = padded[:, :, taps][..., taps]
    span = 2 * wide + 1
    return found.permute(2, 5, 0, 3, 6, 1, 4, 7).reshape(rows**2 * outputs, columns**2 * inputs, span, span)


def correlate(images: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """``y[n] = Σ_a K[a] x[stride · n + a]``, no padding: x ``(H, W, i, B)``, K ``(o, i, k, l)`` -> ``(H', W', o, B)``.

    One matrix product per tap, so that every entry is a sum of its i·k·l products, in some order. That is what rounding
    is proved of; ``conv2d`` may also go by Winograd's or Fourier's transform, and in fewer bits than products do.
    """
    (height, width, inputs, samples), (outputs, _, tall, wide) = images.shape, kernel.shape
    rows, columns = (height - tall) // stride + 1, (width - wide) // stride + 1
    channels = images.permute(2, 0, 1, 3)
    y = images.new_zeros(outputs, rows * columns * samples)
    for a in range(tall):
        for b in range(wide):
            seen = channels[:, a : a + stride * (rows - 1) + 1 : stride, b : b + stride * (columns - 1) + 1 : stride]
            y = torch.addmm(y, kernel[:, :, a, b], seen.reshape(inputs, rows * columns * samples))
    return y.view(outputs, rows, columns, samples).permute(1, 2, 0, 3)


def circular(images: Tensor, kernel: Tensor) -> Tensor:
    """K ⋆ images ``(H, W, i, B)`` on their torus by :func:`correlate`, whatever the sizes."""
    for axis, reach in enumerate(n // 2 for n in kernel.shape[2:]):
        size = images.shape[axis]
        images = images.index_select(axis, torch.arange(-reach, size + reach, device=images.device) % size)
    return correlate(images, kernel)


class TierProduct:
    """x ↦ y on states, tier by tier: ŷ_i = M_i x̂_i + R_i · moved(L_i s_{i'}) with i' the tier before and s = x̂, or
    x̂ + ŷ where ``feeds``: a product with W, or with a Cayley transform, or with the transpose of either."""

    def __init__(
        self,
        geometry: Geometry,
        M: list[Symbols],
        left: list[Symbols],
        right: list[Symbols],
        reverse: bool = False,
        feeds: bool = False,
    ) -> None:
        self.geometry, self.M, self.left, self.right = geometry, M, left, right
        self.reverse, self.feeds = reverse, feeds
        self._work: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def _torus(self, i: int) -> Torus:
        like = self.M[i][0]
        return torus(self.geometry.grid(i), like.dtype, like.device)

    def _buffers(self, i: int, m: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Two buffers to work in, kept from one product to the next: fresh memory costs as much as the products."""
        if torch.is_grad_enabled():
            return None
        if (i, m) not in self._work:
            self._work = {key: value for key, value in self._work.items() if key[0] != i}
            size = 2 * self._torus(i).frequencies * m
            with torch.inference_mode(False):  # kept, to be written to later outside of it as well
                self._work[i, m] = like.new_empty(size), like.new_empty(size)
        return self._work[i, m]

    def __call__(self, x: Tensor, offset: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """y ``(B, n)``, plus ``offset``; into ``out`` where given, which lies samples last."""
        geometry = self.geometry
        inputs = geometry.split(x)
        offsets = [None] * len(inputs) if offset is None else geometry.split(offset)
        fits = out is not None and out.mT.is_contiguous()
        targets = geometry.split(out) if out is not None and fits else [None] * len(inputs)
        outputs: list[Any] = [None] * len(inputs)
        order = range(geometry.tiers)
        before: Symbols | None = None
        for i in reversed(order) if self.reverse else order:
            block, transform = inputs[i], self._torus(i)
            channels, samples = block.shape[2:]
            work = self._buffers(i, channels * samples, block)
            X = transform.forward(block.flatten(2), channels, work)
            mixed = None if work is None else work[0].view(2, transform.frequencies, channels, samples).unbind()
            Y = mix(self.M[i], X, out=mixed)  # type: ignore[arg-type]
            if before is not None:
                Y = mix(self.right[i], self._moved(before, i, samples), out=mixed, add=Y)  # type: ignore[arg-type]
            if geometry.tiers > 1:
                before = (X[0] + Y[0], X[1] + Y[1]) if self.feeds else (X[0].clone(), X[1].clone())
            plus, target = offsets[i], targets[i]
            outputs[i] = transform.inverse(
                Y,
                None if plus is None else plus.flatten(2),
                None if target is None else target.flatten(2),
                None if work is None else work[1],
            ).view(block.shape)
        if fits:
            assert out is not None
            return out
        found = geometry.join(outputs)
        return found if out is None else out.copy_(found)

    def _moved(self, before: Symbols, i: int, samples: int) -> Symbols:
        """The transform on tier i of what comes from the tier before."""
        geometry, j = self.geometry, i + 1 if self.reverse else i - 1
        sent = mix(self.left[i], before)
        images = self._torus(j).inverse(sent).unflatten(2, (-1, samples))
        blocks = geometry.unplace(images, i) if self.reverse else geometry.place(images, j)
        channels = blocks.shape[2]
        return self._torus(i).forward(blocks.reshape(*geometry.grid(i), -1), channels)
