"""Kernels whose operator norm is capped, as a parametrization (theory §8–9).

K = V · min(1, cap/σ(V)), σ(V) the norm of V ⋆ · on a torus. In training σ is the value of a power iteration that goes
on from step to step, so that gradients see the cap; what a certificate says is proved elsewhere, from K.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, pad

from ..errors import OptionError

__all__ = ["CappedKernel", "check_cap"]

WARM = 20
"""Power iterations on the kernel that is begun with."""


def check_cap(cap: float) -> float:
    """Return ``cap``, a bound of a norm; raise :class:`OptionError` unless it is finite and above 0."""
    if isinstance(cap, bool) or not isinstance(cap, (int, float)) or not 0 < cap < math.inf:
        raise OptionError(f"norm_cap is {cap!r}; it is a finite number above 0")
    return float(cap)


class CappedKernel(nn.Module):
    """V ↦ V · min(1, cap/σ), σ the norm of the convolution with V on a torus of ``torus`` pixels, circular
    (theory §9).

    Forward: ``(σ or None) -> K (o, i, k, k)``; without σ by one more step of the power iteration. State: ``weight``
    (V), ``vector (1, i, H, W)``, the iterate, kept so that a run that is continued takes the same steps.
    Right inverse: a kernel of norm at most ``cap`` is itself. Membership: its proved norm.
    """

    vector: Tensor

    def __init__(self, weight: Tensor, cap: float, torus: tuple[int, int], stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.cap, self.stride = check_cap(cap), stride
        self.register_buffer("vector", torch.randn(1, weight.shape[1], *torus).to(weight))
        if not self.vector.is_meta:
            self.vector /= self.vector.norm()
            self.advance(WARM)

    def forward(self, sigma: Tensor | float | None = None) -> Tensor:
        """K for the given σ, or for the one that the power iteration finds."""
        if sigma is None:
            self.advance()
            sigma = self.estimate()
        if isinstance(sigma, Tensor):
            cap = min(self.cap, torch.finfo(sigma.dtype).max)  # a larger one cannot be told from it
            scale = torch.where(sigma > cap, cap / sigma.clamp_min(cap), 1.0)  # no quotient by 0
            return self.weight * scale
        return self.weight * min(1.0, self.cap / sigma) if sigma > 0 else self.weight

    def estimate(self) -> Tensor:
        """σ as the iterate sees it, from below, with its gradient."""
        return torch.linalg.vector_norm(self._apply_kernel(self.vector.clone()))

    @torch.no_grad()
    def advance(self, steps: int = 1) -> None:
        """Steps of the power iteration."""
        for _ in range(steps):
            step = self._transpose(self._apply_kernel(self.vector))
            length = torch.linalg.vector_norm(step)
            if bool(torch.isfinite(length) & (length > 0)):
                self.vector.copy_(step / length)

    def _apply_kernel(self, x: Tensor) -> Tensor:
        reach = self.weight.shape[2] // 2
        return conv2d(_around(x, reach), self.weight, stride=self.stride)

    def _transpose(self, y: Tensor) -> Tensor:
        """The adjoint: what falls beyond an edge of the padded image comes back at the other."""
        reach, (height, width) = self.weight.shape[2] // 2, self.vector.shape[2:]
        spare = (height - 1) % self.stride, (width - 1) % self.stride
        x = conv_transpose2d(y, self.weight, stride=self.stride, output_padding=spare)
        for dim, n in ((2, height), (3, width)):
            rows = (torch.arange(x.shape[dim], device=x.device) - reach) % n
            shape = [*x.shape[:dim], n, *x.shape[dim + 1 :]]
            x = x.new_zeros(shape).index_add_(dim, rows, x)
        return x

    def extra_repr(self) -> str:
        options: dict[str, Any] = {"shape": tuple(self.weight.shape), "cap": self.cap, "stride": self.stride}
        return ", ".join(f"{name}={value}" for name, value in options.items())


def _around(x: Tensor, reach: int) -> Tensor:
    """``x (B, c, H, W)`` continued around its edges."""
    if reach == 0:
        return x
    if reach <= min(x.shape[2:]):
        return pad(x, (reach,) * 4, mode="circular")
    rows, columns = (torch.arange(-reach, n + reach, device=x.device) % n for n in x.shape[2:])
    return x[:, :, rows][:, :, :, columns]
