"""The two abstract ideas everything above is written against: a fixed-point map and a monotone operator.

A :class:`FixedPointMap` is what a solver iterates: a splitting of one batch of equilibrium problems.
A :class:`MonotoneOperator` is what the splitting multiplies by: W seen through I − W, with the constants
that make the splitting converge.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .. import verified
from ..errors import NotWellPosedError
from ..norms import EUCLIDEAN, Euclidean, Norm

__all__ = [
    "FixedPointMap",
    "MatrixProduct",
    "MonotoneOperator",
    "Product",
    "golden_section",
    "power_norm",
    "product_rounding",
    "singular",
]

T = TypeVar("T")


class FixedPointMap(ABC):
    """u ↦ T(u) for a batch ``u (B, k)``, whose fixed point u* gives the equilibrium z* = ``point(u*)``."""

    @abstractmethod
    def start(self) -> tuple[Tensor, Tensor]:
        """A first point and its image, both fresh ``(B, k)`` tensors; costs no product with W."""

    @abstractmethod
    def __call__(self, u: Tensor, out: Tensor | None = None) -> Tensor:
        """T(u), ``(B, k)``; written into ``out`` where given, which must not share memory with ``u``."""

    @abstractmethod
    def point(self, u: Tensor) -> Tensor:
        """The equilibrium estimate z ``(B, n)`` that belongs to u; 1-Lipschitz in u."""

    @abstractmethod
    def select(self, rows: Tensor) -> FixedPointMap:
        """The same map for the samples ``rows`` (indices)."""

    def length(self, r: Tensor) -> Tensor:
        """The size ``(B,)`` of each ``r (B, k)`` in the norm in which T contracts, where it does."""
        size: Tensor = torch.linalg.vector_norm(r, dim=1)
        return size


class Product(Protocol):
    """x ↦ M x + offset for every row of ``x (B, n)``, into ``out`` where given, which shares no memory with ``x``."""

    def __call__(self, x: Tensor, offset: Tensor | None = None, out: Tensor | None = None) -> Tensor: ...


class MatrixProduct:
    """The product with a ``matrix (n, n)``."""

    def __init__(self, matrix: Tensor) -> None:
        self.transposed = matrix.mT

    def __call__(self, x: Tensor, offset: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        if offset is None:
            return torch.mm(x, self.transposed, out=out)
        return torch.addmm(offset, x, self.transposed, out=out)


class MonotoneOperator(ABC):
    """z ↦ W z with the constants of F₀ = I − W (theory §1–2).

    ``margin()`` is a proved lower bound of m = λ_min(sym(I − W)), ``lipschitz()`` and ``norm()`` proved
    upper bounds of L = ‖I − W‖₂ and ‖W‖₂ (float64, rounding counted, theory §6). Where ``family`` is another norm
    they are the same in that norm: 1 − μ(W), ‖I − W‖ and ‖W‖ (theory §7). ``representation_error``
    bounds in the 2-norm how far the matrix multiplied by may lie from the one its stored numbers define.
    """

    features: int
    family: Norm = EUCLIDEAN
    representation_error: float = 0.0
    stores_cayley: bool = False
    """Whether C_α itself is what is stored, at ``best_alpha()``."""
    _derived: dict[Any, Any]
    """What :meth:`once` keeps; owned by whoever owns the weights."""

    def once(self, key: Any, compute: Callable[[], T]) -> T:
        """What ``compute`` gives, computed once for these weights."""
        if key not in self._derived:
            # kept constants must serve training as well, and be of the stored weights, not of a cast
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast(self.tensors()[0].device.type, enabled=False),
            ):
                self._derived[key] = compute()
        value: T = self._derived[key]
        return value

    @abstractmethod
    def apply(self, z: Tensor) -> Tensor:
        """W z for every row of ``z (B, n)``."""

    @abstractmethod
    def transpose(self, z: Tensor) -> Tensor:
        """Wᵀ z for every row of ``z (B, n)``."""

    @property
    def terms(self) -> int:
        """How many products are added up for an entry of ``summed``."""
        return self.features

    def summed(self, z: Tensor) -> Tensor:
        """W z by sums of at most ``terms`` products each, whose rounding :func:`product_rounding` bounds."""
        return self.apply(z)

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that W is made of, with their graph: what a gradient is returned for."""

    @abstractmethod
    def pullback(self, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        """The gradient of Σ_b ⟨y_b, W z_b⟩ for each of ``tensors()``; ``y``, ``z`` are ``(B, n)``."""

    @abstractmethod
    def margin(self) -> float: ...

    @abstractmethod
    def lipschitz(self) -> float: ...

    @abstractmethod
    def norm(self) -> float: ...

    @abstractmethod
    def absolute_norm(self) -> float:
        """A proved upper bound of ‖ |W| ‖₂, which scales the rounding of a product."""

    @abstractmethod
    def cayley(self, alpha: float) -> Tensor:
        """C_α = 2 V_α − I with V_α = (I + α(I − W))⁻¹, ``(n, n)``."""

    def cayley_product(self, alpha: float) -> Product:
        """The product with C_α, in whatever way is quick; it may keep memory to work in."""
        return MatrixProduct(self.cayley(alpha))

    @abstractmethod
    def cayley_norm(self, alpha: float) -> float:
        """‖C_α‖₂ as computed: it chooses steps and is never printed as a bound."""

    @abstractmethod
    def best_alpha(self) -> float:
        """The α that minimises ‖C_α‖₂ (theory §2)."""

    @abstractmethod
    def averaging_step(self) -> float:
        """α* = 1/(1 − min_i min(W_ii, 0)), rounded down: the step of averaged iterations (theory §7)."""

    @abstractmethod
    def forward_norm(self, alpha: float) -> float:
        """‖(1 − α) I + α W‖₂ as computed, the factor of a forward step."""

    def cayley_bound(self, alpha: float) -> float | None:
        """A proved bound of ‖C_α‖₂ below 1, or None: the closed one √(1 − 4αm/(1 + 2αm + α²L²)) (theory §2 [G17]),
        where the constants are of the 2-norm."""
        m, reach = self.margin(), alpha * self.lipschitz()
        if m <= 0 or not isinstance(self.family, Euclidean):
            return None
        square = 1 - 4 * alpha * m / (1 + 2 * alpha * m + reach * reach) * (1 - 1e-14)
        bound = math.sqrt(max(square, 0.0)) * (1 + 1e-14) + 2.0**-52
        return bound if bound < 1 else None

    def forward_bound(self, alpha: float) -> float | None:
        """A proved bound of ‖(1 − α) I + αW‖₂ below 1, or None: the closed one √(1 − 2αm + α²L²) (theory §2 [WK20])."""
        m, reach = self.margin(), alpha * self.lipschitz()
        if m <= 0 or not isinstance(self.family, Euclidean):
            return None
        whole = 1 + 2 * alpha * m + reach * reach  # its terms cancel, their roundings do not
        square = max(1 - 2 * alpha * m + reach * reach, 0.0) + 2.0**-50 * whole
        bound = math.sqrt(square) * (1 + 1e-14)
        return bound if bound < 1 else None

    @abstractmethod
    def transposed(self) -> MonotoneOperator:
        """The operator of Wᵀ; constants and inverses are shared, nothing is computed again."""


def singular(alpha: float, margin: float) -> NotWellPosedError:
    """The error for a step at which there is no inverse."""
    return NotWellPosedError(
        f"I + α(I − W) is singular at α = {alpha:g}: W has no positive margin there; "
        "give the solver another alpha, or use ForwardBackward",
        margin,
    )


def product_rounding(terms: int, like: Tensor) -> float:
    """ε with |fl(Σ aᵢbᵢ) − Σ aᵢbᵢ| <= ε Σ |aᵢ||bᵢ| for sums of ``terms`` products in the arithmetic of ``like``.

    γ_k (theory §6), and where torch may round float32 operands first (TF32 keeps 11 bits, bfloat16 8) that as well.
    """
    unit = torch.finfo(like.dtype).eps / 2
    gamma = verified.gamma(terms) * (unit / verified.UNIT)
    if like.dtype != torch.float32:
        return gamma
    operand = _operand_rounding(like.device)
    return gamma + (2 * operand + operand**2) * (1 + gamma)


def _operand_rounding(device: torch.device) -> float:
    """What torch may drop of the operands of a float32 product, which units may round or cut off."""
    try:
        operand = {"highest": 0.0, "high": 2.0**-10}.get(torch.get_float32_matmul_precision(), 2.0**-7)
        if device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
            operand = max(operand, 2.0**-10)
    except RuntimeError:  # set by torch's newer switches, of which the older ones cannot tell
        return 2.0**-7
    return operand


def golden_section(function: Callable[[float], float], low: float, high: float, rtol: float = 0.02) -> float:
    """The minimiser of a quasi-convex function of log x on [low, high], 0 < low <= high, to ``rtol``."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = math.log(low), math.log(high)
    x, y = b - ratio * (b - a), a + ratio * (b - a)
    at_x, at_y = function(math.exp(x)), function(math.exp(y))
    while b - a > rtol:
        if at_x <= at_y:
            b, y, at_y = y, x, at_x
            x = b - ratio * (b - a)
            at_x = function(math.exp(x))
        else:
            a, x, at_x = x, y, at_y
            y = a + ratio * (b - a)
            at_y = function(math.exp(y))
    return math.exp((a + b) / 2)


def power_norm(matrix: Tensor, steps: int = 40) -> float:
    """An estimate of ‖matrix‖₂ (from below) by power iteration; exact SVD where that is cheap; inf of an overflow."""
    if not bool(torch.isfinite(matrix).all()):  # a step of 1/m with m next to nothing
        return math.inf
    if matrix.shape[0] <= 512:
        return float(torch.linalg.matrix_norm(matrix, 2))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(matrix.shape[1], generator=generator, dtype=torch.float64).to(matrix)
    for _ in range(steps):
        y = matrix @ (x / torch.linalg.vector_norm(x))
        x = matrix.T @ y
    return float(torch.linalg.vector_norm(y))
