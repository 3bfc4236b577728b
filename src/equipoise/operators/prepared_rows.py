"""NEMON weights that are trained as the codes they will become (theory §4, §7)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..norms import WeightedMax
from ..parametrizations import Contractive, Weighted
from ..quantization.schemes import Structured
from .contractive import AssembledRows, StructuredRows, better_weights, lowered, stored_weights
from .dense import DenseOperator
from .prepared import PreparedMatrix, PreparedWeight

__all__ = ["PreparedAssembledRows", "PreparedStructuredRows"]


class PreparedAssembledRows(PreparedMatrix):
    """Q(W) of a NEMON layer, in the norm of the float weights while it trains."""

    weights: Any

    def _operator(self, derived: dict[Any, Any]) -> DenseOperator:
        return DenseOperator(self(), family=self.weights.family(), derived=derived)

    @torch.no_grad()
    def quantized(self) -> AssembledRows:
        codes = self.rounding.quantized(self.weights())
        eta = stored_weights(self.weights.family().eta)
        return AssembledRows(codes, better_weights(codes.dequantize().cpu(), eta))


class PreparedStructuredRows(PreparedWeight):
    """W̃ = γ I + D⁻¹ T̃ D − diag(|T̃| 1) with T̃ = Q(T): the measure γ is kept at every step of training."""

    weights: Any

    def __init__(self, weights: Any, scheme: Structured, learn_scale: bool) -> None:
        if isinstance(weights, Weighted):  # it has no T to train; this gives the same W
            T, eta, gamma = weights.factors()
            weights = Contractive.from_factors(T, -eta.log(), gamma)
        super().__init__(weights, scheme, learn_scale)
        self.rounding = self._fake(weights.T)

    def fit(self) -> None:
        with torch.no_grad():
            self.rounding.fit(self.weights.T)

    def forward(self) -> Tensor:
        W: Tensor = super().forward()
        # as of stored codes, what is multiplied by keeps γ too; the value changes, the gradient passes
        fitting = lowered(W, WeightedMax(self._eta().detach()), float(self.weights.current_gamma().detach()))
        return fitting + (W - W.detach())

    def assemble(self) -> Tensor:
        gamma = self.weights.current_gamma().double()
        W = StructuredRows.combine(self.rounding(self.weights.T), self._eta(), gamma)
        fitting = lowered(W, WeightedMax(self._eta().detach()), float(gamma.detach()))
        return fitting + (W - W.detach())

    def _eta(self) -> Tensor:
        """η as it will be stored, in float64, with its graph."""
        d = self.weights.d.double()
        eta = torch.exp(d.detach().min() - d)
        stored = stored_weights(eta.detach()).to(eta)
        return stored + (eta - eta.detach())

    def _operator(self, derived: dict[Any, Any]) -> DenseOperator:
        return DenseOperator(self(), family=WeightedMax(self._eta().detach()), derived=derived)

    @torch.no_grad()
    def quantized(self) -> StructuredRows:
        gamma = float(self.weights.current_gamma())
        return StructuredRows(self.rounding.quantized(self.weights.T), self._eta().float(), gamma)
