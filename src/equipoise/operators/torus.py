"""The discrete Fourier transform of images on a torus, by matrix products, pixels first and samples last (theory §8).

An image batch is ``(H, W, m)`` with m = channels · samples contiguous, so that both axes are transformed by plain
products without a copy, and every frequency's channels lie side by side for the product with its symbol. Only the
H · (⌊W/2⌋ + 1) frequencies of real images are kept, real and imaginary parts apart: ``(F, c, B)`` each.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..memory import check_memory

__all__ = ["Symbols", "Torus", "conjugate", "mix", "parts_of", "times", "torus"]

Symbols = tuple[Tensor, Tensor]
"""Real and imaginary part, ``(F, o, i)`` of a convolution, ``(F, c, B)`` of images."""


class Torus:
    """The transform of images of ``size`` = (H, W) in one dtype on one device; see :func:`torus`."""

    def __init__(self, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.size, (height, width) = size, size
        self.half = width // 2 + 1
        self.frequencies = height * self.half
        h, w, q = (torch.arange(n, dtype=torch.float64) for n in (height, width, self.half))
        down = 2 * math.pi / height * (h[:, None] * h % height)
        right = 2 * math.pi / width * (q[:, None] * w % width)
        weight = torch.full((self.half,), 2.0, dtype=torch.float64)
        weight[0] = 1.0
        if width % 2 == 0:
            weight[-1] = 1.0
        weight /= height * width
        cos, sin = down.cos(), down.sin()

        def made(matrix: Tensor) -> Tensor:
            return matrix.to(device, dtype).contiguous()

        # rows (part, q) of the first, columns (h, part) of the second; and back again
        self.along = made(torch.cat((right.cos(), -right.sin())))
        self.across = made(torch.cat((_woven(cos, sin), _woven(-sin, cos))))
        self.back_real, self.back_imag = made(_woven(cos, sin).mT), made(_woven(-sin, cos).mT)
        self.back = made(torch.cat((weight[:, None] * right.cos(), -weight[:, None] * right.sin())).mT)

    def forward(self, x: Tensor, channels: int, work: tuple[Tensor, Tensor] | None = None) -> Symbols:
        """The transform of ``x (H, W, m)``, m = channels · B, as two ``(F, channels, B)``; ``work``: two buffers of
        2 F m entries that may be written to."""
        height, _ = self.size
        m = x.shape[2]
        first, second = (None, None) if work is None else work
        a = torch.matmul(self.along, x, out=None if first is None else first.view(height, 2 * self.half, m))
        b = torch.mm(
            self.across,
            a.view(2 * height, self.half * m),
            out=None if second is None else second.view(2 * height, self.half * m),
        )
        re, im = b.view(2, self.frequencies, channels, -1).unbind()
        return re, im

    def inverse(
        self, parts: Symbols, offset: Tensor | None = None, out: Tensor | None = None, work: Tensor | None = None
    ) -> Tensor:
        """The images ``(H, W, m)`` of ``parts``, plus ``offset``."""
        height, width = self.size
        re, im = (part.reshape(height, -1) for part in parts)
        m = re.shape[1] // self.half
        work = None if work is None else work.view(2 * height, self.half * m)
        a = torch.mm(self.back_real, re, out=work)
        a = torch.addmm(a, self.back_imag, im, out=work)
        a = a.view(height, 2 * self.half, m)
        if offset is None:
            return torch.matmul(self.back, a, out=out)
        return torch.baddbmm(offset, self.back.expand(height, width, 2 * self.half), a, out=out)

    def symbols(self, kernel: Tensor) -> Symbols:
        """K̂ of ``kernel (o, i, k, l)`` with ``y[n] = Σ_a K[a] z[n + a − c]``, with its graph, in the kernel's dtype."""
        (height, width), (outputs, inputs, tall, wide) = self.size, kernel.shape
        needed = self.frequencies * (4 * kernel.element_size() * outputs * inputs + 32 * tall * wide)
        check_memory(needed, f"a convolution of {height}×{width} images", "take smaller ones or fewer channels")
        p, q = (torch.arange(n, dtype=torch.float64) for n in (height, self.half))
        a, b = (torch.arange(n, dtype=torch.float64) - n // 2 for n in (tall, wide))
        angles = (2 * math.pi / height * (p[:, None] * a % height))[:, None, :, None]
        angles = angles + (2 * math.pi / width * (q[:, None] * b % width))[None, :, None, :]
        flat = angles.reshape(self.frequencies, tall * wide)
        taps = kernel.reshape(outputs * inputs, tall * wide).mT
        re, im = (wave.to(kernel) @ taps for wave in (flat.cos(), flat.sin()))
        return re.view(-1, outputs, inputs), im.view(-1, outputs, inputs)


@lru_cache(maxsize=32)
def torus(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Torus:
    """The transform of images of ``size``, made once."""
    with torch.inference_mode(False), torch.no_grad():
        return Torus(size, dtype, device)


def mix(M: Symbols, X: Symbols, out: Symbols | None = None, add: Symbols | None = None) -> Symbols:
    """M X at each frequency, plus ``add``; M ``(F, o, i)``, X ``(F, i, B)``, both real and imaginary."""
    (Mr, Mi), (Xr, Xi) = M, X
    to_re, to_im = (None, None) if out is None else out
    re = torch.bmm(Mr, Xr, out=to_re) if add is None else torch.baddbmm(add[0], Mr, Xr, out=to_re)
    re = torch.baddbmm(re, Mi, Xi, alpha=-1, out=to_re)
    im = torch.bmm(Mi, Xr, out=to_im) if add is None else torch.baddbmm(add[1], Mi, Xr, out=to_im)
    return re, torch.baddbmm(im, Mr, Xi, out=to_im)


def conjugate(M: Symbols) -> Symbols:
    """Mᴴ at each frequency: the symbols of the transpose."""
    return M[0].mT, -M[1].mT


def times(parts: Symbols, factor: float) -> Symbols:
    """Both parts times a number."""
    return parts[0] * factor, parts[1] * factor


def parts_of(values: Tensor) -> Symbols:
    """Real and imaginary part, each contiguous."""
    return values.real.contiguous(), values.imag.contiguous()


def _woven(left: Tensor, right: Tensor) -> Tensor:
    """``(n, 2n)`` with the columns of both in turn."""
    return torch.stack((left, right), 2).reshape(len(left), -1)
