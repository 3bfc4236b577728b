"""Bounds entry by entry, where W contracts in a weighted maximum norm (theory §7).

Between two points of slope D in [0, 1], δz = D (W δz + δq), so |δz_i| (1 − W_ii) ≤ Σ_{j≠i} |W_ij| |δz_j| + |δq_i|:
with M the Metzler majorant of W,

    (I − M) |δz| ≤ |δq|,    hence    |δz| ≤ (I − M)⁻¹ |δq|    entry by entry,

since I − M has a non-negative inverse exactly where some μ_η(W) < 1. Every bound with one η follows from it:
max_i (|δq_i|/η_i)/(1 − μ_i) is the smallest t with (I − M) t η ≥ |δq|.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import verified
from ..norms import metzler
from ..operators import DenseOperator

__all__ = ["Comparison"]

SLACK = 1 + 1e-12


class Comparison:
    """(I − M)⁻¹ as a proved upper bound, for every matrix whose rows lie within 2-norm ``error`` of W's.

    ``proved`` says whether I − M was proved to have a non-negative inverse: some v > 0 with (I − M) v > 0.
    """

    def __init__(self, W: Tensor, error: float = 0.0) -> None:
        self.M, self.error = metzler(W.detach().to("cpu", torch.float64)), error
        n = len(self.M)
        comparison = -self.M
        comparison.diagonal().add_(1.0)
        self.inverse, info = torch.linalg.inv_ex(comparison)
        self.v = self.inverse.sum(1)
        self.gain = torch.zeros(())
        good = n > 0 and error < math.inf and int(info) == 0 and bool((torch.isfinite(self.v) & (self.v > 0)).all())
        self.gain = self._image(self.v[None]).min() if good else torch.tensor(-math.inf).double()
        self.proved = bool(self.gain > 0)

    @classmethod
    def of(cls, operator: DenseOperator) -> Comparison:
        """Of the operator's stored matrix, and of the one multiplied by."""
        return operator.once("comparison", lambda: cls(*operator.matrix64()))

    def _image(self, y: Tensor) -> Tensor:
        """Lower bounds of (I − M') y for ``y (B, n)``, all y >= 0."""
        n = len(self.M)
        computed = y - y @ self.M.mT
        diagonal = self.M.diagonal().abs()
        size = y + y @ self.M.abs().mT + diagonal * y
        lost = verified.gamma(n + 8) * size * SLACK + verified.TINY * 16 * (n + 1)
        if self.error:
            lost = lost + (self.error * verified.row_norms(y) * SLACK)[:, None]
        return computed - lost

    def bound(self, r: Tensor) -> Tensor:
        """Upper bounds ``(B, n)`` of (I − M')⁻¹ r for ``r (B, n)`` >= 0; infinite unless ``proved``.

        The computed solution y, and as much of v as makes (I − M') (y + t v) ≥ r provable.
        """
        if not self.proved:
            return torch.full_like(r, math.inf)
        y = (r @ self.inverse.mT).clamp_min(0.0)
        missing = (r - self._image(y)).amax(1).clamp_min(0.0) / self.gain
        return (y + missing[:, None] * self.v * SLACK) * SLACK + verified.TINY
