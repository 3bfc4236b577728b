"""An activation with a border that is held at zero, as convolutional monDEQs have it (theory §8)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..activations import Activation

__all__ = ["Bordered"]


@dataclass(frozen=True, eq=False)
class Bordered(Activation):
    """``of`` inside, 0 on the border: the proximal map of f inside and of the indicator of {0} on the border, so that
    the reflection there is −v.

    ``outside (b,)``: indices of a state's entries on the border. States may lie in memory samples last.
    """

    of: Activation
    outside: Tensor

    @cached_property
    def fixes_zero(self) -> bool:
        return self.of.fixes_zero

    def __call__(self, v: Tensor) -> Tensor:
        return self._cut(self.of(v))

    def prox(self, v: Tensor, alpha: float) -> Tensor:
        return self._cut(self.of.prox(v, alpha))

    def reflect(self, v: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
        reflected = self.of.reflect(v, alpha, out)
        reflected.mT.index_copy_(0, self.outside, v.mT.index_select(0, self.outside).neg_())
        return reflected

    def derivative(self, v: Tensor) -> Tensor:
        return self._cut(self.of.derivative(v))

    def evaluation_error(self, p: Tensor) -> Tensor | float:
        return self.of.evaluation_error(p)

    def _cut(self, values: Tensor) -> Tensor:
        if values.requires_grad:
            return values.index_fill(1, self.outside, 0.0)
        values.mT.index_fill_(0, self.outside, 0.0)
        return values
