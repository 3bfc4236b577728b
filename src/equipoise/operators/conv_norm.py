"""The true norm of a convolution, which is not that of its kernel as a matrix (theory §8)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..errors import InputError, OptionError
from . import spectra

__all__ = ["Padding", "conv_norm", "torus"]

Padding = Literal["zeros", "circular"]


def torus(size: tuple[int, int], kernel_size: int, stride: int = 1, padding: Padding = "zeros") -> tuple[int, int]:
    """The smallest torus on which a convolution of images of ``size`` is part of a circular one.

    Zero padding by ⌊k/2⌋ is what a pixel finds beyond the edge of an image on a torus of N + ⌊k/2⌋ or more, and the
    stride has to divide its sides.
    """
    if padding not in ("zeros", "circular"):
        raise OptionError(f"padding is {padding!r}; it is 'zeros' or 'circular'")
    if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise OptionError(f"kernel_size is {kernel_size!r}; it is odd, so that a kernel has a centre")
    reach = kernel_size // 2 if padding == "zeros" else 0
    height, width = (n + reach + (-(n + reach) % stride if padding == "zeros" else 0) for n in size)
    return height, width


def conv_norm(kernel: Tensor, image_size: tuple[int, int], stride: int = 1, padding: Padding = "zeros") -> float:
    """A proved upper bound of the 2-norm of ``x ↦ conv2d(x, kernel, stride=stride, padding=k // 2)`` (theory §8).

    For circular padding the norm itself, up to rounding; for zero padding that of the circular convolution on a torus
    just large enough, of which it is a part. The norm of the kernel as a matrix ``(o, i·k·k)`` can be k times smaller.

    Args:
        kernel: ``(o, i, k, k)``, k odd.
        image_size: (H, W) of the input.
        stride: where padding is circular it divides H and W.

    Raises:
        InputError: a kernel of another shape, or not finite.
        OptionError: an even kernel, or a size, stride or padding that does not fit.
    """
    if not isinstance(kernel, Tensor) or kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3]:
        given = tuple(kernel.shape) if isinstance(kernel, Tensor) else type(kernel).__name__
        raise InputError(f"the kernel is {given}; (o, i, k, k) is needed")
    if not isinstance(stride, int) or isinstance(stride, bool) or stride < 1:
        raise OptionError(f"stride is {stride!r}; it is a positive integer")
    if len(image_size) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in image_size):
        raise OptionError(f"image_size is {image_size!r}; it is (height, width), positive integers")
    return spectra.norm(*spectra.symbols(kernel, torus(image_size, kernel.shape[2], stride, padding), stride))
