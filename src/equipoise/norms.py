"""Norms, their matrix measures, and what is proved in them (theory §1, §7 [JDPB21]).

The equilibrium of z = σ(W z + q) exists and is unique if μ(W) < 1 for the matrix measure of some norm that the
slopes of σ cannot enlarge. Two families are known here: the Euclidean one, where 1 − μ₂(W) = λ_min(sym(I − W)) is the
margin of [WK20], and the weighted maximum norms of [JDPB21],

    ‖x‖_η = max_i |x_i|/η_i,    μ_η(W) = max_i μ_i,    μ_i = W_ii + Σ_{j≠i} |W_ij| η_j/η_i,

where every bound is a row sum and no eigenvalue is needed. In both, ``margin`` is 1 − μ(W).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, final

import torch
from torch import Tensor

from . import verified
from .errors import InputError

__all__ = [
    "EUCLIDEAN", "Euclidean", "Norm", "WeightedMax", "WeightedSum", "best_family", "lengths", "metzler", "perron",
]  # fmt: skip

SPREAD = 2.0**400
"""Largest ratio of two weights: products with them stay far from underflow."""

GRADED = 1e-60
"""Entries below this part of the largest play no role in an estimate of eigenvectors."""


def lengths(rows: Tensor) -> Tensor:
    """The 2-norms ``(B,)`` of ``rows (B, n)`` as computed, whichever way they lie in memory."""
    if rows.stride(0) == 1 < rows.stride(1):  # samples last, where torch's own norm is slow
        return rows.square().sum(1).sqrt_()
    size: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return size


class Norm(ABC):
    """A vector norm with proved bounds about matrices ``W (n, n)`` in float64; what is returned holds for every W'
    of which each row lies within 2-norm ``error`` of W's (so for all within spectral norm ``error``)."""

    name: ClassVar[str]

    @abstractmethod
    def of(self, rows: Tensor) -> Tensor:
        """The norm ``(B,)`` of each row of ``rows (B, n)``, as computed."""

    @abstractmethod
    def dual(self) -> Norm:
        """The norm in which Wᵀ contracts where W does in this one."""

    @abstractmethod
    def margin(self, W: Tensor, error: float = 0.0) -> float:
        """Lower bound of 1 − μ(W')."""

    @abstractmethod
    def lipschitz(self, W: Tensor, error: float = 0.0) -> float:
        """Upper bound of ‖I − W'‖."""

    @abstractmethod
    def norm(self, W: Tensor, error: float = 0.0) -> float:
        """Upper bound of ‖W'‖."""


@final
class Euclidean(Norm):
    """The 2-norm; ``error`` is a spectral norm here."""

    name = "l2"

    def of(self, rows: Tensor) -> Tensor:
        return lengths(rows)

    def dual(self) -> Norm:
        return self

    def margin(self, W: Tensor, error: float = 0.0) -> float:
        return verified.margin(W, error)

    def lipschitz(self, W: Tensor, error: float = 0.0) -> float:
        return verified.lipschitz(W, error)

    def norm(self, W: Tensor, error: float = 0.0) -> float:
        return verified.spectral_norm(W, error)


EUCLIDEAN = Euclidean()


class _Weighted(Norm):
    """What both weighted norms share: their weights, positive and finite."""

    eta: Tensor

    def __init__(self, eta: Tensor) -> None:
        eta = eta.detach().to("cpu", torch.float64)
        good = eta.ndim == 1 and bool((torch.isfinite(eta) & (eta > 0)).all())
        if not good:
            bad = int((~(torch.isfinite(eta) & (eta > 0))).sum())
            raise InputError(
                f"eta {tuple(eta.shape)} holds {bad} entries that are not finite numbers above 0; give one positive "
                "weight per feature (torch.ones(n) is the plain maximum norm)"
            )
        largest = float(eta.max()) if len(eta) else 1.0
        if len(eta) and not largest <= SPREAD * float(eta.min()):
            raise InputError(f"eta spreads from {float(eta.min()):g} to {largest:g}; weights within 1e120 are needed")
        exponent = math.frexp(largest)[1]
        if abs(exponent) > 500:
            raise InputError(f"eta reaches {largest:g}; scale it: only ratios of weights matter")
        self.eta = eta

    def _on(self, rows: Tensor) -> Tensor:
        return self.eta.to(rows)


@final
class WeightedMax(_Weighted):
    """‖x‖_η = max_i |x_i|/η_i with weights ``eta (n,)``, all positive.

    Raises :class:`InputError` for weights that are not positive and finite, or spread over more than 2⁴⁰⁰.
    """

    name = "linf"

    def of(self, rows: Tensor) -> Tensor:
        return (rows.abs() / self._on(rows)).amax(1) if rows.shape[1] else rows.new_zeros(len(rows))

    def dual(self) -> Norm:
        return WeightedSum(self.eta)

    def row_sums(self, W: Tensor) -> Tensor:
        """Upper bounds ``(m,)`` of Σ_j |W_ij| η_j for ``W (m, n)``, float64: any linear map into coordinates."""
        lost, X = _lost(W, self.eta), _exact(W).abs()
        sums = (X * self.eta).sum(1) * (1 + verified.gamma(X.shape[1] + 8))
        return torch.nextafter(sums + lost, _INF)

    def row_measures(self, W: Tensor, error: float = 0.0) -> Tensor:
        """Upper bounds ``(n,)`` of μ_i = W_ii + Σ_{j≠i} |W_ij| η_j/η_i."""
        return self._rows(W, _exact(W).diagonal(), error)

    def _rows(self, W: Tensor, diagonal: Tensor, error: float) -> Tensor:
        """Upper bounds of ``diagonal_i`` + Σ_{j≠i} |W_ij| η_j/η_i + what ``error`` may add."""
        off = _exact(W).abs()
        off.fill_diagonal_(0.0)
        sums = ((off * self.eta).sum(1) + _lost(W, self.eta)) / self.eta * (1 + verified.gamma(len(W) + 8))
        if error:
            length = verified.up(float(self.eta.norm()) * (1 + 1e-12))
            sums = sums + error * length / self.eta * (1 + 1e-12) + verified.TINY
        total = diagonal + torch.nextafter(sums, _INF)
        return torch.nextafter(total, _INF).nan_to_num(math.inf, math.inf)

    def row_margins(self, W: Tensor, error: float = 0.0) -> Tensor:
        """Lower bounds ``(n,)`` of 1 − μ_i."""
        return torch.nextafter(1 - self.row_measures(W, error), -_INF)

    def margin(self, W: Tensor, error: float = 0.0) -> float:
        return float(self.row_margins(W, error).min()) if len(W) else math.inf

    def lipschitz(self, W: Tensor, error: float = 0.0) -> float:
        diagonal = torch.nextafter((1 - _exact(W).diagonal()).abs(), _INF)
        return float(self._rows(W, diagonal, error).max()) if len(W) else 0.0

    def row_norms(self, W: Tensor, error: float = 0.0) -> Tensor:
        """Upper bounds ``(n,)`` of Σ_j |W_ij| η_j/η_i."""
        return self._rows(W, _exact(W).diagonal().abs(), error)

    def norm(self, W: Tensor, error: float = 0.0) -> float:
        return float(self.row_norms(W, error).max()) if len(W) else 0.0

    def reach(self) -> float:
        """An upper bound of max_i η_i: ‖x‖_∞ ≤ reach · ‖x‖_η."""
        return float(self.eta.max()) if len(self.eta) else 0.0

    def length(self) -> float:
        """An upper bound of ‖η‖₂: ‖x‖₂ ≤ length · ‖x‖_η."""
        return verified.up(float(self.eta.norm()) * (1 + 1e-12))


@final
class WeightedSum(_Weighted):
    """Σ_i η_i |y_i|, the dual of :class:`WeightedMax`: column sums of Wᵀ are row sums of W.

    ``margin``, ``lipschitz`` and ``norm`` are given of the matrix that is multiplied by, Wᵀ.
    """

    name = "l1"

    def of(self, rows: Tensor) -> Tensor:
        return (rows.abs() * self._on(rows)).sum(1)

    def dual(self) -> Norm:
        return WeightedMax(self.eta)

    def margin(self, W: Tensor, error: float = 0.0) -> float:
        return WeightedMax(self.eta).margin(W.mT, error)

    def lipschitz(self, W: Tensor, error: float = 0.0) -> float:
        return WeightedMax(self.eta).lipschitz(W.mT, error)

    def norm(self, W: Tensor, error: float = 0.0) -> float:
        return WeightedMax(self.eta).norm(W.mT, error)


_INF = torch.tensor(math.inf, dtype=torch.float64)


def _exact(W: Tensor) -> Tensor:
    """``W (m, n)`` in float64 on the CPU, exactly, a copy."""
    if W.dtype not in (torch.float32, torch.float64) or W.ndim != 2:
        raise InputError(f"W is {tuple(W.shape)}, {W.dtype}; a float matrix of 32 or 64 bits is needed")
    if bad := int((~torch.isfinite(W)).sum()):
        raise InputError(f"{bad} of {W.numel()} entries are not finite; remove NaN and inf first")
    return W.detach().to("cpu", torch.float64, copy=True)


def _lost(W: Tensor, eta: Tensor) -> float:
    """What underflow can cost a row sum: the smallest normal number a product, and one an entry where a processor
    takes denormals for 0."""
    tiny = torch.finfo(W.dtype).tiny
    return tiny * 4 * (len(eta) + 1) * (1 + (float(eta.max()) if len(eta) else 1.0))


def metzler(W: Tensor) -> Tensor:
    """The Metzler majorant: the diagonal of ``W (n, n)`` kept, the rest in absolute value."""
    M = W.abs()
    M.diagonal().copy_(W.diagonal())
    return M


def perron(W: Tensor, error: float = 0.0) -> tuple[Tensor, float]:
    """(η ``(n,)``, abscissa): weights that make μ_η(W) as small as it gets, and an estimate of min_η μ_η(W).

    The right Perron vector of the Metzler majorant, made positive by a small perturbation where the majorant is
    reducible; its spectral abscissa is the infimum (theory §7). Both are estimates: what they prove is found by
    ``WeightedMax(η).margin(W)``. With ``error``, weights so uneven that an error of this 2-norm in a row would cost
    more than they gain are not taken.

    Raises:
        InputError: NaN or infinite entries.
    """
    M = metzler(_exact(W))
    n = len(M)
    if n == 0:
        return M.new_ones(0), -math.inf
    size = max(float(M.abs().max()), verified.TINY)
    M = M / size
    found = None if n > 1024 else _eigenvectors(M)
    if found is not None:
        values, vectors = found
        at = int(values.real.argmax())
        abscissa, start = float(values.real[at]), vectors[:, at].abs()
    else:
        shift, start, abscissa = float(M.diagonal().min()), M.new_ones(n), math.nan
        for _ in range(300):
            image = M @ start - shift * start
            abscissa, start = float(image.sum() / start.sum()) + shift, image / max(float(image.max()), 1e-300)
    return _resolvent(M, abscissa, start, error / size), abscissa * size


def best_family(W: Tensor, error: float = 0.0) -> tuple[WeightedMax, float]:
    """(the maximum norm of :func:`perron`, the spectral abscissa) of ``W (n, n)``, whose rows are known to 2-norm
    ``error``: with weights that are no more uneven than W's rounding to float32 could pay for."""
    rounding = 2.0**-24 * float(_exact(W).abs().sum(1).max()) if len(W) else 0.0
    eta, abscissa = perron(W, max(error, rounding))
    return WeightedMax(eta), abscissa


def _eigenvectors(M: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues and eigenvectors of ``M``, entries at most 1, as LAPACK estimates them, if it does.

    Without the smallest entries: balancing matrices graded over hundreds of decades, it writes beyond its memory.
    """
    try:
        values, vectors = torch.linalg.eig(torch.where(M.abs() < GRADED, 0.0, M))
    except RuntimeError:  # no convergence
        return None
    return values, vectors


def _resolvent(M: Tensor, abscissa: float, start: Tensor, error: float) -> Tensor:
    """η = ((s + δ) I − M)⁻¹ 1 > 0 for the best of some δ: positive whatever M, and near the Perron vector."""
    n, best, best_value = len(M), None, math.inf
    candidates = [start, torch.ones_like(start)]
    for delta in (1e-10, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0) if n <= 1024 else (1e-6, 1e-2):
        shifted = -M
        shifted.diagonal().add_(abscissa + delta)
        solution, info = torch.linalg.solve_ex(shifted, M.new_ones(n))
        if int(info) == 0:
            candidates.append(solution)
    for candidate in candidates:
        eta = candidate / candidate.abs().max()
        if not bool((torch.isfinite(eta) & (eta > 1e-100)).all()):
            continue
        value = float(((M @ eta + error * eta.norm()) / eta).max())
        if value < best_value:
            best, best_value = eta, value
    return M.new_ones(n) if best is None else best
