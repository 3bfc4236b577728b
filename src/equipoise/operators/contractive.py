"""NEMON weights as codes: what is proved of them is proved by row sums, and kept by algebra (theory §7).

Each stores its weights η beside the codes: they are part of what the numbers mean.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from .. import verified
from ..errors import StructureError
from ..norms import WeightedMax, perron
from ..parametrizations.nemon import check_gamma
from ..quantization.codes import QuantizedTensor
from ..quantization.schemes import Assembled, Structured
from .dense import DenseOperator
from .quantized import QuantizedWeight, fits

__all__ = [
    "AssembledRows",
    "RowWeight",
    "StructuredRows",
    "UnfitSchemeError",
    "lowered",
    "stored_weights",
]


class UnfitSchemeError(StructureError):
    """A scheme that is made for another kind of weights."""


class RowWeight(QuantizedWeight):
    """W̃ given by codes and scales, with the weights η ``(n,)`` of its norm, stored in float32."""

    eta: Tensor

    def __init__(self, eta: Tensor) -> None:
        super().__init__()
        WeightedMax(eta)  # which checks it
        self.features = len(eta)
        self.register_buffer("eta", eta.detach().to(torch.float32).clone())

    def family(self) -> WeightedMax:
        """The norm of the stored weights."""
        return WeightedMax(self.eta)

    @abstractmethod
    def row_floor(self) -> Tensor | None:
        """Lower bounds ``(n,)`` of 1 − μ_i that hold of the codes' matrix by algebra, if any."""

    def ceiling(self) -> float | None:
        """A measure that the matrix multiplied by shall keep, too."""
        return None

    def operator(self, like: Tensor) -> DenseOperator:
        exact, error = self.assemble()
        family, weight = self.family(), exact.to(like)
        ceiling = self.ceiling()
        if ceiling is not None:
            weight = lowered(weight, family, ceiling)
        applied = weight.to("cpu", torch.float64)
        cast = verified.up(error + verified.absolute_norm(exact - applied) * (1 + 1e-15))
        rows, floor = family.row_margins(exact, error), self.row_floor()
        rows = rows if floor is None else torch.maximum(rows, floor)
        both = torch.minimum(rows, family.row_margins(applied))
        return DenseOperator(weight, exact=(exact, cast), family=family, row_floor=both)


class AssembledRows(RowWeight):
    """W̃ = Q(W); its measure moves by at most ‖ΔW‖_η. η is the layer's, or W̃'s own Perron vector where that is
    better."""

    def __init__(self, codes: QuantizedTensor, eta: Tensor) -> None:
        super().__init__(eta)
        fits(codes.shape, (self.features,) * 2)
        self.codes = codes

    @classmethod
    def quantize(cls, weights: Any, scheme: Assembled) -> AssembledRows:
        W = weights().detach().to("cpu", torch.float64)
        codes = QuantizedTensor.fit(W, scheme.bits, scheme.granularity, scheme.scale)
        return cls(codes, better_weights(codes.dequantize().cpu(), stored_weights(weights.family().eta)))

    def row_floor(self) -> Tensor | None:
        return None

    def assemble(self) -> tuple[Tensor, float]:
        exact = self.codes.dequantize().cpu()
        return exact, verified.up(verified.UNIT * verified.absolute_norm(exact) * (1 + 1e-15))

    @property
    def packed_bytes(self) -> int:
        return self.codes.packed_bytes + _bytes(self.eta)


class StructuredRows(RowWeight):
    """W̃ = γ I + D⁻¹ T̃ D − diag(|T̃| 1) with T̃ = Q(T), D = 1/η: μ_i = γ + T̃_ii − |T̃_ii| <= γ.

    The measure stays at most γ at every bit-width, by algebra on the stored numbers; the matrix that is multiplied
    by has its diagonal rounded so that it keeps γ, too.
    """

    gamma: Tensor

    def __init__(self, T: QuantizedTensor, eta: Tensor, gamma: float) -> None:
        super().__init__(eta)
        fits(T.shape, (self.features,) * 2)
        self.T = T
        self.register_buffer("gamma", torch.tensor(check_gamma(gamma), dtype=torch.float64))

    @classmethod
    def quantize(cls, weights: Any, scheme: Structured) -> StructuredRows:
        T, eta, gamma = weights.factors()
        return cls(QuantizedTensor.fit(T, scheme.bits, scheme.granularity, scheme.scale), stored_weights(eta), gamma)

    @staticmethod
    def combine(T: Tensor, eta: Tensor, gamma: Tensor | float) -> Tensor:
        """γ I + D⁻¹ T D − diag(|T| 1) in float64, the one way in which it is computed."""
        W = T * (eta[:, None] / eta[None, :])
        return W - torch.diag(T.abs().sum(1) - gamma)

    def row_floor(self) -> Tensor | None:
        floor = verified.down(1 - float(self.gamma))
        return torch.full((self.features,), floor, dtype=torch.float64)

    def ceiling(self) -> float | None:
        return float(self.gamma)

    def assemble(self) -> tuple[Tensor, float]:
        T, eta, gamma = self.T.dequantize().cpu(), self.eta.to("cpu", torch.float64), float(self.gamma)
        exact = self.combine(T, eta, gamma)
        fitting = lowered(exact, WeightedMax(eta), gamma)
        moved = float((exact - fitting).abs().max()) if len(exact) else 0.0
        # a few roundings an entry, and a sum of n on the diagonal
        sums = torch.diag(2 * T.abs().sum(1) + 2 * T.diagonal().abs() + abs(gamma))
        size = verified.absolute_norm(exact) + verified.absolute_norm(sums)
        error = verified.gamma(len(T) + 12) * size + moved * (1 + 1e-15)
        return fitting, verified.up(error * (1 + 1e-12) + verified.TINY * (T.numel() + 1))

    @property
    def packed_bytes(self) -> int:
        return self.T.packed_bytes + _bytes(self.eta) + _bytes(self.gamma)


def lowered(W: Tensor, family: WeightedMax, ceiling: float) -> Tensor:
    """``W`` with diagonal entries lowered by as few roundings as prove every μ_i <= ``ceiling`` of what is left."""
    W = W.detach().clone()
    for _ in range(8):
        excess = (family.row_measures(W) - ceiling).to(W.device)
        rows = excess > 0
        if not bool(rows.any()):
            break
        diagonal = W.diagonal()
        target = (diagonal.double() - excess * (1 + 1e-9)).to(W.dtype)
        below = torch.minimum(target, torch.nextafter(diagonal, torch.full_like(diagonal, -torch.inf)))
        diagonal.copy_(torch.where(rows, below, diagonal))
    return W


def stored_weights(eta: Tensor) -> Tensor:
    """η as it is stored, in float32: scaled to 1, and no smaller than float32 can tell."""
    scaled = eta.to("cpu", torch.float64)
    return (scaled / scaled.max()).clamp_min(1e-30).to(torch.float32) if len(eta) else scaled.float()


def better_weights(W: Tensor, eta: Tensor) -> Tensor:
    """``eta``, or the Perron vector of ``W``'s majorant where that proves a smaller measure."""
    applied = W.to(torch.float32)  # what a float32 layer multiplies by
    own = stored_weights(perron(W, float(verified.row_norms(W - applied.double()).max()) if len(W) else 0.0)[0])
    found, known = (min(family.margin(W), family.margin(applied)) for family in (WeightedMax(own), WeightedMax(eta)))
    return own if found > known else eta


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
