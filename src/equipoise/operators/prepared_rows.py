"""NEMON weights that are trained as the codes they will become (theory §4, §7)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..norms import WeightedMax
from ..parametrizations import Contractive, Weighted
from ..quantization.schemes import Assembled, Scheme, Structured
from .contractive import AssembledRows, StructuredRows, better_weights, check_row_scheme, lowered, stored_weights
from .dense import DenseOperator
from .prepared import PreparedMatrix, PreparedWeight
from .prepared import prepare_weight as prepare_monotone

__all__ = ["PREPARED_ROWS", "PreparedAssembledRows", "PreparedStructuredRows", "prepare_weight"]


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


PREPARED_ROWS: dict[type[Scheme], Any] = {Assembled: PreparedAssembledRows, Structured: PreparedStructuredRows}
"""Which weights of a NEMON layer train for a scheme: a new scheme registers here."""


def prepare_weight(weights: nn.Module, scheme: Scheme, learn_scale: bool = False) -> PreparedWeight:
    """The weights of any layer (shared, not copied) rounded by ``scheme`` in every forward pass.

    Raises:
        OptionError: a scheme nobody knows.
        StructureError: a scheme that is not made for these weights.
        InputError: weights that are not finite.
        NotWellPosedError: Structured on weights without structure and without a proved margin.
    """
    if not isinstance(weights, (Contractive, Weighted)):
        return prepare_monotone(weights, scheme, learn_scale)  # type: ignore[arg-type]
    check_row_scheme(scheme)
    prepared: PreparedWeight = PREPARED_ROWS[type(scheme)](weights, scheme, learn_scale)
    return prepared
