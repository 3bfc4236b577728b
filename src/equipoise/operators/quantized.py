"""Weights stored as integer codes and scales, one class per scheme (theory §4).

Each holds its codes and nothing derived from floats; the matrix, and what is proved about it, is
assembled from them. ``assemble()`` gives W̃ in float64 with a proved 2-norm bound on its own rounding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import verified
from ..errors import InputError, NotWellPosedError
from ..parametrizations import Dense, Monotone
from ..parametrizations.monotone import check_margin
from ..quantization.codes import QuantizedSkew, QuantizedTensor, Stored
from ..quantization.schemes import Assembled, Cayley, Compensated, Structured
from .dense import DenseOperator, in_proving_norm

__all__ = [
    "AssembledWeight",
    "CayleyWeight",
    "CompensatedWeight",
    "QuantizedWeight",
    "StructuredWeight",
    "compensated",
    "fits",
]

M = TypeVar("M", bound=nn.Module)


class QuantizedWeight(Stored, ABC):
    """W̃ ``(n, n)`` given by codes and scales only.

    Forward: ``() -> W̃`` in float64. State: the codes, scales and scalars of the scheme.
    """

    features: int

    @classmethod
    @abstractmethod
    def quantize(cls, weights: Monotone | Dense, scheme: Any) -> QuantizedWeight:
        """Round ``weights`` by ``scheme``."""

    @abstractmethod
    def assemble(self) -> tuple[Tensor, float]:
        """(W̃ float64, e): the matrix that the codes define lies within e of it in the 2-norm."""

    @property
    @abstractmethod
    def packed_bytes(self) -> int:
        """Bytes when packed: codes at their bits, scales and scalars at their own width."""

    def forward(self) -> Tensor:
        return self.assemble()[0]

    def proofs(self) -> dict[str, Any]:
        """What the structure proves by itself: keywords of :class:`DenseOperator`."""
        return {}

    def operator(self, like: Tensor) -> DenseOperator:
        """The operator in the dtype and on the device of ``like``, with its casting error bounded."""
        exact, error = self.assemble()
        weight = exact.to(like)
        cast = verified.absolute_norm(exact - weight.to("cpu", torch.float64))
        return DenseOperator(weight, exact=(exact, verified.up(error + cast * (1 + 1e-15))), **self.proofs())


class AssembledWeight(QuantizedWeight):
    """W̃ = Q(W): the published scheme [LLC26]; the margin moves by at most ‖ΔW‖₂. Where that leaves no Euclidean one, a
    maximum norm may still prove W̃ well posed."""

    def __init__(self, codes: QuantizedTensor) -> None:
        super().__init__()
        fits(codes.shape, (codes.shape[0],) * 2)
        self.codes = codes
        self.features = codes.shape[0]

    @classmethod
    def quantize(cls, weights: Monotone | Dense, scheme: Assembled) -> AssembledWeight:
        return cls(QuantizedTensor.fit(_weight64(weights), scheme.bits, scheme.granularity, scheme.scale))

    def assemble(self) -> tuple[Tensor, float]:
        exact = self.codes.dequantize().cpu()
        return exact, verified.up(verified.UNIT * verified.absolute_norm(exact) * (1 + 1e-15))

    def operator(self, like: Tensor) -> DenseOperator:
        return in_proving_norm(super().operator(like))

    @property
    def packed_bytes(self) -> int:
        return self.codes.packed_bytes


class StructuredWeight(QuantizedWeight):
    """W̃ = (1 − m) I − ÃᵀÃ + K̃ with Ã = Q(A), K̃ = Q(B − Bᵀ) skew: sym(I − W̃) = m I + ÃᵀÃ ⪰ m I.

    The margin is at least m at every bit-width, by algebra on the stored numbers (theory §4).
    """

    margin: Tensor

    def __init__(self, A: QuantizedTensor, K: QuantizedSkew, margin: float) -> None:
        super().__init__()
        fits(A.shape, (A.shape[0], K.shape[0]))
        self.A, self.K = A, K
        self.features = K.shape[0]
        self.register_buffer("margin", torch.tensor(check_margin(margin), dtype=torch.float64))

    @classmethod
    def quantize(cls, weights: Monotone | Dense, scheme: Structured) -> StructuredWeight:
        known = isinstance(weights, (Monotone, Dense))
        A, K, margin = (weights if known else Dense(weights())).factors()
        codes = QuantizedTensor.fit(A, scheme.bits, scheme.granularity, scheme.scale)
        skew_bits = scheme.bits if scheme.skew_bits is None else scheme.skew_bits
        return cls(codes, QuantizedSkew.fit(K, skew_bits, scheme.scale), margin)

    @staticmethod
    def combine(A: Tensor, K: Tensor, margin: Tensor | float) -> Tensor:
        """(1 − m) I − AᵀA + K, the one way in which it is computed."""
        W = torch.addmm(K, A.mT, A, alpha=-1)
        W.diagonal().add_(1 - margin)
        return W

    def assemble(self) -> tuple[Tensor, float]:
        A, K, margin = self.A.dequantize().cpu(), self.K.dequantize().cpu(), float(self.margin)
        exact = self.combine(A, K, margin)
        size = verified.absolute_norm(A) ** 2 + verified.absolute_norm(K) + abs(1 - margin)
        return exact, verified.up(verified.gamma(A.shape[0] + 8) * size + verified.TINY * A.numel())

    def proofs(self) -> dict[str, Any]:
        return {"margin_floor": float(self.margin)}

    @property
    def packed_bytes(self) -> int:
        return self.A.packed_bytes + self.K.packed_bytes + self.margin.element_size()


class CompensatedWeight(QuantizedWeight):
    """The off-diagonal of W rounded; its diagonal kept finer and lowered until m̃ >= target (theory §4)."""

    def __init__(self, off_diagonal: QuantizedTensor, diagonal: QuantizedTensor) -> None:
        super().__init__()
        n = diagonal.shape[0]
        fits(diagonal.shape, (n,))
        fits(off_diagonal.shape, (n, n - 1))
        self.off_diagonal, self.diagonal = off_diagonal, diagonal
        self.features = diagonal.shape[0]

    @classmethod
    def quantize(cls, weights: Monotone | Dense, scheme: Compensated) -> CompensatedWeight:
        W = _weight64(weights)
        codes = QuantizedTensor.fit(_off_diagonal(W), scheme.bits, scheme.granularity, scheme.scale)
        return cls.lowered(codes, W.diagonal(), scheme, weights().detach())

    @classmethod
    def lowered(cls, codes: QuantizedTensor, diagonal: Tensor, scheme: Compensated, like: Tensor) -> CompensatedWeight:
        """Off-diagonal ``codes`` with the ``diagonal (n,)`` lowered as far as the target asks, in the dtype of
        ``like`` as well: the margin of the codes, and of what the layer multiplies by. See :func:`compensated`."""
        lowering = cls.lowering(_with_diagonal(codes.dequantize().cpu(), diagonal), scheme.margin, like.dtype)
        return compensated(
            lambda stored: cls(codes, stored), diagonal, lowering, scheme, lambda made: made.operator(like).margin()
        )

    @staticmethod
    def lowering(W: Tensor, margin: float, dtype: torch.dtype) -> float:
        """By how much to lower the diagonal of ``W`` (float64) for this margin: an estimate to be proved, and a
        little more than enough for its own rounding and that of a cast to ``dtype``."""
        found = float(torch.linalg.eigvalsh(torch.eye(len(W), dtype=W.dtype) - (W + W.mT) / 2)[0]) if len(W) else 1.0
        slack = 4 * torch.finfo(dtype).eps * (1 + float(torch.linalg.matrix_norm(W)))
        return max(0.0, margin - found + slack)

    def assemble(self) -> tuple[Tensor, float]:
        exact = _with_diagonal(self.off_diagonal.dequantize().cpu(), self.diagonal.dequantize().cpu())
        return exact, verified.up(verified.UNIT * verified.absolute_norm(exact) * (1 + 1e-15))

    @property
    def packed_bytes(self) -> int:
        return self.off_diagonal.packed_bytes + self.diagonal.packed_bytes


class CayleyWeight(QuantizedWeight):
    """C̃ = Q(C_α) is stored, with α: W̃ = I − α⁻¹ (I − C̃)(I + C̃)⁻¹ (theory §4).

    Proved from C̃ itself: m̃ is the largest μ with I − C̃ᵀC̃ ⪰ μα (I + C̃)ᵀ(I + C̃), and L̃ = ‖(I − C̃)(I + C̃)⁻¹‖₂/α.
    """

    alpha: Tensor

    def __init__(self, C: QuantizedTensor, alpha: float) -> None:
        super().__init__()
        fits(C.shape, (C.shape[0],) * 2)
        if not 0 < alpha < math.inf:
            raise InputError(f"alpha is {alpha}; a Cayley transform has a positive one")
        self.C = C
        self.features = C.shape[0]
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float64))

    @classmethod
    def quantize(cls, weights: Monotone | Dense, scheme: Cayley) -> CayleyWeight:
        operator = DenseOperator(_weight64(weights))
        alpha = operator.best_alpha() if scheme.alpha is None else scheme.alpha
        C = operator.cayley(alpha)
        return cls(QuantizedTensor.fit(C, scheme.bits, scheme.granularity, scheme.scale), alpha)

    @staticmethod
    def combine(C: Tensor, alpha: float) -> tuple[Tensor, Tensor, bool]:
        """(W, Q, singular): W = I − Q/α with Q = (I − C)(I + C)⁻¹, the one way in which they are computed."""
        eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
        quotient, info = torch.linalg.solve_ex(eye + C, eye - C, left=False)
        return eye - quotient / alpha, quotient, int(info) != 0

    def assemble(self) -> tuple[Tensor, float]:
        C, alpha = self.C.dequantize().cpu(), float(self.alpha)
        eye = torch.eye(self.features, dtype=torch.float64)
        plus, minus = eye + C, eye - C
        exact, quotient, singular = self.combine(C, alpha)
        # where code · scale is rounded, an inverse near C̃ = −I magnifies that
        code = verified.UNIT * verified.absolute_norm(C) * (1 + 1e-15) if not self.C.exact else 0.0
        forming_plus = verified.UNIT * verified.absolute_norm(plus) + code
        inverse_norm = verified.quotient_norm(eye, plus, error_q=verified.up(forming_plus * (1 + 1e-15)))
        if singular or inverse_norm is None or not bool(torch.isfinite(exact).all()):
            return exact.nan_to_num(0.0, 0.0, 0.0), math.inf
        residual = verified.absolute_norm(minus - quotient @ plus)
        rounding = verified.gamma(self.features + 4) * (
            verified.absolute_norm(quotient) * verified.absolute_norm(plus) + verified.absolute_norm(minus)
        )
        stored = code * (1 + verified.absolute_norm(quotient))
        error = (residual + rounding + stored) * inverse_norm / alpha
        forming = verified.gamma(3) * (1 + verified.absolute_norm(quotient) / alpha)
        return exact, verified.up((error + forming) * (1 + 1e-12))

    def proofs(self) -> dict[str, Any]:
        if not self.C.exact:  # the float64 C is not quite the stored one: only what `assemble` bounds is proved
            return {}
        C, alpha = self.C.dequantize().cpu(), float(self.alpha)
        return {
            "margin_floor": verified.cayley_margin(C, alpha),
            "lipschitz_ceiling": verified.cayley_lipschitz(C, alpha),
            "cayley": (alpha, C),
        }

    @property
    def packed_bytes(self) -> int:
        return self.C.packed_bytes + self.alpha.element_size()


def fits(shape: tuple[int, ...], needed: tuple[int, ...]) -> None:
    """Raise :class:`InputError` unless codes of ``shape`` are of the shape that is ``needed``."""
    if tuple(shape) != needed:
        raise InputError(f"codes {tuple(shape)} where {needed} fit")


def _weight64(weights: Monotone | Dense) -> Tensor:
    W = weights().detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(W).all()):
        raise InputError("the weights hold NaN or infinite entries; nothing can be quantized or proved")
    return W


def _off_diagonal(W: Tensor) -> Tensor:
    """The off-diagonal entries row by row, ``(n, n − 1)``."""
    n = W.shape[0]
    return W[~torch.eye(n, dtype=torch.bool)].reshape(n, max(n - 1, 0))


def _with_diagonal(off_diagonal: Tensor, diagonal: Tensor) -> Tensor:
    """The matrix of these off-diagonal entries ``(n, n − 1)`` and this diagonal ``(n,)``."""
    W = torch.diag(diagonal)
    W[~torch.eye(len(diagonal), dtype=torch.bool)] = off_diagonal.flatten()
    return W


def round_down(values: Tensor, bits: int) -> QuantizedTensor:
    """Codes with code · scale <= value everywhere, so that the diagonal is never raised."""
    fitted = QuantizedTensor.fit(values, bits, "tensor", "max")
    top = 2 ** (bits - 1) - 1
    # A scale one part in `top` wider leaves a code free below the most negative entry.
    scale = (fitted.scale.double() * (1 + 2 / top)).to(fitted.scale.dtype)
    if float(scale) == 0:
        scale = torch.full_like(scale, torch.finfo(scale.dtype).tiny)
    codes = torch.floor(values / scale.double())
    codes = torch.where(codes * scale.double() > values, codes - 1, codes)
    return QuantizedTensor.from_codes(codes.to(fitted.codes.dtype), scale, bits)


def compensated(
    make: Callable[[QuantizedTensor], M],
    diagonal: Tensor,
    lowering: float,
    scheme: Compensated,
    margin: Callable[[M], float],
) -> M:
    """What ``make`` makes of the ``diagonal (n,)``, lowered by ``lowering`` and as much more as its ``margin`` needs to
    reach the target; raises :class:`NotWellPosedError` where the diagonal's grid is too coarse for it."""
    for _ in range(64):
        stored = round_down(diagonal - lowering, scheme.diagonal_bits)
        module = make(stored)
        found = margin(module)
        if found >= scheme.margin:
            return module
        # at least a good part of the diagonal's own grid, or nothing would change
        lowering += max((scheme.margin - found) * (1 + 1e-9), 0.25 * float(stored.scale))
    raise NotWellPosedError(
        f"no diagonal of {scheme.diagonal_bits} bits reaches the margin {scheme.margin:g} (found {found:g}); "
        "lower the target, or use the Structured scheme",
        found,
    )
