"""Weights that are trained as the codes they will become, one class per scheme (theory §4).

Each keeps free float tensors and rounds upstream of the scheme's structure in every forward pass; gradients pass
straight through the rounding, and through nothing else: the structure above it is differentiated as it is. W̃ is
formed in float64 by the same functions that form it from stored codes, so :meth:`PreparedWeight.quantized` is bit
for bit what was trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..parametrizations import Dense, Monotone
from ..quantization.schemes import Assembled, Cayley, Compensated, Structured
from ..quantization.straight_through import FakeQuantize, Seen
from .dense import DenseOperator
from .quantized import (
    AssembledWeight,
    CayleyWeight,
    CompensatedWeight,
    QuantizedWeight,
    StructuredWeight,
    round_down,
)

__all__ = [
    "PreparedAssembled",
    "PreparedCayley",
    "PreparedCompensated",
    "PreparedMatrix",
    "PreparedStructured",
    "PreparedWeight",
]


class PreparedWeight(nn.Module, ABC):
    """W̃ ``(n, n)`` of free ``weights`` rounded by ``scheme``.

    Forward: ``() -> W̃`` in the dtype of the weights, with its graph. In training mode the scales are fitted again
    whenever the weights changed; in evaluation they stay.
    """

    def __init__(self, weights: Monotone | Dense, scheme: Any, learn_scale: bool) -> None:
        super().__init__()
        self.weights, self.scheme, self.learn_scale = weights, scheme, learn_scale
        self._seen = Seen()

    def forward(self) -> Tensor:
        self.refit()
        with torch.autocast(self._like.device.type, enabled=False):
            return self.assemble().to(self._like.dtype)

    def refit(self) -> bool:
        """Fit the scales where this is a step of training with other weights than the last; whether it was."""
        if not (self.training and torch.is_grad_enabled() and self._seen.changed(self.weights.parameters())):
            return False
        self.fit()
        return True

    @property
    def _like(self) -> Tensor:
        return next(self.weights.parameters())

    @abstractmethod
    def fit(self) -> None:
        """Fit the scales to the weights as they are."""

    @abstractmethod
    def assemble(self) -> Tensor:
        """W̃ in float64, with its graph."""

    @abstractmethod
    def quantized(self) -> QuantizedWeight:
        """The codes and scales as they are now."""

    def operator(self, derived: dict[Any, Any]) -> DenseOperator:
        """The operator to train with; constants of the values go into ``derived``."""
        if self.refit():  # what was derived before, in evaluation with gradients, is of the scales before
            derived.clear()
        return self._operator(derived)

    def _operator(self, derived: dict[Any, Any]) -> DenseOperator:
        return DenseOperator(self(), derived=derived)

    def _fake(self, w: Tensor, **options: Any) -> FakeQuantize:
        scheme = self.scheme
        options = {"bits": scheme.bits, "granularity": scheme.granularity, "rule": scheme.scale} | options
        return FakeQuantize(w, learn=self.learn_scale, **options).to(w.device)


class PreparedMatrix(PreparedWeight):
    """W̃ = Q(W): W itself is rounded, whatever proves the codes well posed."""

    def __init__(self, weights: Any, scheme: Assembled, learn_scale: bool) -> None:
        super().__init__(weights, scheme, learn_scale)
        self.rounding = self._fake(weights().detach())

    def fit(self) -> None:
        with torch.no_grad():
            self.rounding.fit(self.weights())

    def assemble(self) -> Tensor:
        W: Tensor = self.rounding(self.weights())
        return W


class PreparedAssembled(PreparedMatrix):
    """Q(W) of a monotone layer."""

    @torch.no_grad()
    def quantized(self) -> AssembledWeight:
        return AssembledWeight(self.rounding.quantized(self.weights()))


class PreparedStructured(PreparedWeight):
    """W̃ = (1 − m) I − ÃᵀÃ + K̃ with Ã = Q(A), K̃ = Q(B − Bᵀ): the margin m is kept at every step of training."""

    weights: Monotone

    def __init__(self, weights: Monotone | Dense, scheme: Structured, learn_scale: bool) -> None:
        if not isinstance(weights, Monotone):  # it has no A and B to train; these give the same W
            A, K, margin = (weights if isinstance(weights, Dense) else Dense(weights())).factors()
            weights = Monotone.from_factors(A, K / 2, margin)
        super().__init__(weights, scheme, learn_scale)
        self.rounding_A = self._fake(weights.A)
        bits = scheme.bits if scheme.skew_bits is None else scheme.skew_bits
        self.rounding_K = self._fake(self._skew(), bits=bits, granularity="tensor", part="skew")

    def _skew(self) -> Tensor:
        return self.weights.B - self.weights.B.mT

    def fit(self) -> None:
        with torch.no_grad():
            self.rounding_A.fit(self.weights.A)
            self.rounding_K.fit(self._skew())

    def assemble(self) -> Tensor:
        margin = self.weights.current_margin().double()
        return StructuredWeight.combine(self.rounding_A(self.weights.A), self.rounding_K(self._skew()), margin)

    @torch.no_grad()
    def quantized(self) -> StructuredWeight:
        A, K = self.rounding_A.quantized(self.weights.A), self.rounding_K.quantized_skew(self._skew())
        return StructuredWeight(A, K, float(self.weights.current_margin()))


class PreparedCompensated(PreparedWeight):
    """The off-diagonal of W rounded; its diagonal kept finer and lowered until the margin is the scheme's."""

    def __init__(self, weights: Monotone | Dense, scheme: Compensated, learn_scale: bool) -> None:
        super().__init__(weights, scheme, learn_scale)
        self.rounding = self._fake(weights(), part="off_diagonal")

    def fit(self) -> None:
        with torch.no_grad():
            self.rounding.fit(self.weights())

    def assemble(self) -> Tensor:
        W = self.weights()
        diagonal = W.diagonal().double()
        off: Tensor = self.rounding(W - torch.diag(W.diagonal()))
        with torch.no_grad():
            filled = (off + torch.diag(diagonal)).cpu()
            lowering = CompensatedWeight.lowering(filled, self.scheme.margin, W.dtype)
            stored = round_down(diagonal.cpu() - lowering, self.scheme.diagonal_bits).dequantize().to(W.device)
        return off + torch.diag(stored + (diagonal - diagonal.detach()))

    @torch.no_grad()
    def quantized(self) -> CompensatedWeight:
        W = self.weights()
        codes = self.rounding.quantized_off_diagonal(W)
        return CompensatedWeight.lowered(codes, W.diagonal().cpu().double(), self.scheme, W)


class PreparedCayley(PreparedWeight):
    """C̃ = Q(C_α) at the α of the scheme, or the best one of the weights that were prepared."""

    alpha: Tensor

    def __init__(self, weights: Monotone | Dense, scheme: Cayley, learn_scale: bool) -> None:
        super().__init__(weights, scheme, learn_scale)
        alpha = scheme.alpha
        if alpha is None:
            alpha = DenseOperator(weights().detach().double().cpu()).best_alpha()
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float64))
        self._alpha = alpha
        self.rounding = self._fake(self._transform())

    def _transform(self) -> Tensor:
        """C_α = 2 (I + α (I − W))⁻¹ − I in float64."""
        W = self.weights().double()
        eye = torch.eye(len(W), dtype=W.dtype, device=W.device)
        inverse, _ = torch.linalg.inv_ex(eye + self._alpha * (eye - W))
        return 2 * inverse - eye

    def fit(self) -> None:
        with torch.no_grad():
            self.rounding.fit(self._transform())

    def assemble(self) -> Tensor:
        C: Tensor = self.rounding(self._transform())
        return CayleyWeight.combine(C, self._alpha)[0]

    def _operator(self, derived: dict[Any, Any]) -> DenseOperator:
        with torch.autocast(self._like.device.type, enabled=False):
            C: Tensor = self.rounding(self._transform())
            W = CayleyWeight.combine(C, self._alpha)[0].to(self._like.dtype)
        return DenseOperator(W, cayley=(self._alpha, C.detach()), derived=derived)

    @torch.no_grad()
    def quantized(self) -> CayleyWeight:
        return CayleyWeight(self.rounding.quantized(self._transform()), self._alpha)

    def _apply(self, fn: Any, recurse: bool = True) -> PreparedCayley:
        kept = self.alpha  # a cast would make it another number than the one that is trained with
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.alpha = kept.to(self.alpha.device)
        return self

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        self._alpha = float(self.alpha)
