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
from ..norms import WeightedMax, metzler
from ..operators import DenseOperator

__all__ = ["Comparison"]

SLACK = 1 + 1e-12


class Comparison:
    """(I − M)⁻¹ as a proved upper bound, for every matrix whose rows lie within 2-norm ``error`` of W's.

    ``proved`` says whether I − M was proved to have a non-negative inverse: some v > 0 with (I − M) v > 0. Known
    weights η with lower bounds ``margins (n,)`` of all 1 − μ_i are such a v: (I − M) η >= η (1 − μ). They serve where
    the features are of so different sizes that a 2-norm ``error`` or the rounding hides the small ones.
    """

    def __init__(
        self, W: Tensor, error: float = 0.0, family: WeightedMax | None = None, margins: Tensor | None = None
    ) -> None:
        self.M, self.error = metzler(W.detach().to("cpu", torch.float64)), error
        n = len(self.M)
        comparison = -self.M
        comparison.diagonal().add_(1.0)
        self.inverse, info = torch.linalg.inv_ex(comparison)
        self.v = self.inverse.sum(1)
        self.gain = torch.zeros(())
        good = n > 0 and error < math.inf and int(info) == 0 and bool((torch.isfinite(self.v) & (self.v > 0)).all())
        self.gain = self._image(self.v[None]).min() if good else torch.tensor(-math.inf).double()
        self.solved = bool(self.gain > 0)
        self.eta, self.lift = (None, None) if family is None or margins is None else _lifts(family.eta, margins)
        self.proved = self.solved or self.lift is not None

    @classmethod
    def of(cls, operator: DenseOperator) -> Comparison:
        """Of the operator's stored matrix, and of the one multiplied by."""
        family = operator.family if isinstance(operator.family, WeightedMax) else None
        margins = None if family is None else operator.row_margins()
        return operator.once("comparison", lambda: cls(*operator.matrix64(), family, margins))

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

        The computed solution y, and as much of v as makes (I − M') (y + t v) ≥ r provable; or t η alone, if smaller.
        """
        bound = torch.full_like(r, math.inf)
        if self.eta is not None and self.lift is not None:
            bound = ((r / self.lift).amax(1)[:, None] * SLACK + verified.TINY) * self.eta * SLACK + verified.TINY
        y = (r @ self.inverse.mT).clamp_min(0.0) if self.solved else bound
        rows = (torch.isfinite(y) & torch.isfinite(r)).all(1)
        if self.solved and bool(rows.any()):
            y = y[rows]
            missing = (r[rows] - self._image(y)).amax(1).clamp_min(0.0) / self.gain
            found = (y + missing[:, None] * self.v * SLACK) * SLACK + verified.TINY
            bound[rows] = torch.minimum(bound[rows], found.nan_to_num(math.inf))
        return bound.nan_to_num(math.inf, math.inf)


def _lifts(eta: Tensor, margins: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(η, lower bounds of (I − M) η) where those are positive, normal numbers, else (None, None)."""
    lift = eta * margins.to(eta) * (1 - 1e-15)
    return (eta, lift) if bool((lift > verified.TINY).all()) else (None, None)
