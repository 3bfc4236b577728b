"""Activations made of others: the slopes of one, and one applied to the two ends of a box."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .activations import Activation

__all__ = ["Linearized", "Mirrored"]


@dataclass(frozen=True, eq=False)
class Linearized(Activation):
    """v ↦ D v with a tensor D of slopes in [0, 1]: the activation of the backward problem (theory §3).

    It is the proximal map of a separable quadratic (of the indicator of {0} where D = 0):
    prox_{αf}(v) = D v / (D + α (1 − D)). For ReLU, D is 0 or 1 and the reflection multiplies by ±1.
    """

    fixes_zero = True  # whatever the slopes
    slopes: Tensor
    _gains: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, v: Tensor) -> Tensor:
        return self.slopes * v

    def prox(self, v: Tensor, alpha: float) -> Tensor:
        return self._gain(alpha)[0] * v

    def reflect(self, v: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
        return torch.mul(self._gain(alpha)[1], v, out=out)

    def derivative(self, v: Tensor) -> Tensor:
        return self.slopes

    def evaluation_error(self, p: Tensor) -> Tensor | float:
        return torch.finfo(p.dtype).eps * p.abs()

    def _gain(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Gain of the proximal map and of its reflection, formed once per step size."""
        if alpha not in self._gains:
            gain = self.slopes / (self.slopes + alpha * (1 - self.slopes))
            self._gains[alpha] = gain, 2 * gain - 1
        return self._gains[alpha]


@dataclass(frozen=True)
class Mirrored(Activation):
    """(a, b) ↦ (−σ(−a), σ(b)) on pairs ``(B, 2n)``: the activation of a box written as (−lower, upper) (theory §7)."""

    of: Activation

    @cached_property
    def fixes_zero(self) -> bool:
        return self.of.fixes_zero

    def __call__(self, v: Tensor) -> Tensor:
        return self._halves(v, lambda half: self.of(half))

    def prox(self, v: Tensor, alpha: float) -> Tensor:
        return self._halves(v, lambda half: self.of.prox(half, alpha))

    def derivative(self, v: Tensor) -> Tensor:
        a, b = v.chunk(2, -1)
        return torch.cat((self.of.derivative(-a), self.of.derivative(b)), -1)

    def evaluation_error(self, p: Tensor) -> Tensor | float:
        a, b = p.chunk(2, -1)
        errors = self.of.evaluation_error(-a), self.of.evaluation_error(b)
        found = [error for error in errors if isinstance(error, Tensor)]
        return torch.cat(found, -1) if found else 0.0

    def _halves(self, v: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
        a, b = v.chunk(2, -1)
        return torch.cat((-apply(-a), apply(b)), -1)
