"""W = (1 − m) I − AᵀA + B − Bᵀ: every matrix with margin at least m, and nothing else (theory §1, [WK20])."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import verified
from ..errors import InputError, NotWellPosedError, OptionError

__all__ = ["MARGIN_FLOOR", "Dense", "Margined", "Monotone", "check_margin", "monotone_factors"]

MARGIN_FLOOR = 1e-4
"""A learned margin is softplus(raw) + this floor, so that no training step can lose it."""


def check_margin(margin: float) -> float:
    """``margin`` as a float; raises :class:`OptionError` unless it is finite and positive."""
    try:
        value = float(margin)
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise OptionError(f"margin is {margin!r}; it is a finite number above 0 (0.1 to 1 is usual)")
    return value


def _raw(margin: float) -> float:
    """The inverse of m = softplus(raw) + floor."""
    excess = margin - MARGIN_FLOOR
    return excess + math.log(-math.expm1(-excess))


class Margined(nn.Module):
    """What parametrizations with a margin share: ``margin`` (fixed) or ``raw_margin`` (learned, m = softplus(raw) +
    1e-4).

    Raises:
        OptionError: a margin that is not positive.
    """

    raw_margin: Tensor
    margin: Tensor

    def _keep(self, margin: float, learn_margin: bool) -> None:
        value = check_margin(margin)
        if learn_margin:
            if value <= MARGIN_FLOOR:
                raise OptionError(f"margin is {margin}; a learned one starts above its floor {MARGIN_FLOOR}")
            self.raw_margin = nn.Parameter(torch.tensor(_raw(value), dtype=torch.get_default_dtype()))
        else:
            self.register_buffer("margin", torch.tensor(value, dtype=torch.get_default_dtype()))

    def current_margin(self) -> Tensor:
        """m as a 0-dim tensor."""
        if "raw_margin" in self._parameters:
            return nn.functional.softplus(self.raw_margin) + MARGIN_FLOOR
        return self.margin


class Monotone(Margined):
    """The structured weights of a monotone operator equilibrium network.

    Forward: ``() -> W (n, n)`` with λ_min(sym(I − W)) >= m, exactly m where ``rank < n``.
    State: ``A (r, n)``, ``B (n, n)`` and ``margin`` (fixed) or ``raw_margin`` (learned,
    m = softplus(raw) + 1e-4).

    Raises:
        OptionError: rank outside 0..n or a margin that is not positive.
    """

    def __init__(self, features: int, rank: int | None = None, margin: float = 0.2, learn_margin: bool = False) -> None:
        super().__init__()
        rank = features if rank is None else rank
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= features:
            raise OptionError(f"rank is {rank}; A has between 0 and n = {features} rows")
        scale = 1 / math.sqrt(max(features, 1))
        self.A = nn.Parameter(torch.empty(rank, features).uniform_(-scale, scale))
        self.B = nn.Parameter(torch.empty(features, features).uniform_(-scale, scale))
        self._keep(margin, learn_margin)

    @classmethod
    def from_factors(cls, A: Tensor, B: Tensor, margin: float, learn_margin: bool = False) -> Monotone:
        """The parametrization at given factors, copied, in their dtype."""
        if A.ndim != 2 or B.ndim != 2 or B.shape[0] != B.shape[1] or A.shape[1] != B.shape[0]:
            raise InputError(f"A is {tuple(A.shape)} and B is {tuple(B.shape)}; needed are (r, n) and (n, n)")
        module = cls(A.shape[1], A.shape[0], margin, learn_margin).to(A.device, A.dtype)
        with torch.no_grad():
            module.A.copy_(A)
            module.B.copy_(B)
            if learn_margin:
                module.raw_margin.fill_(_raw(float(margin)))
            else:
                module.margin.fill_(float(margin))
        return module

    def forward(self) -> Tensor:
        with torch.autocast(self.B.device.type, enabled=False):  # W is a definition, not a computation to speed up
            W = torch.addmm(self.B - self.B.mT, self.A.mT, self.A, alpha=-1)
            W.diagonal().add_(1 - self.current_margin())
        return W

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """(A, K = B − Bᵀ, m), detached: what a structured quantizer rounds."""
        return self.A.detach(), (self.B - self.B.mT).detach(), float(self.current_margin().detach())


class Dense(nn.Module):
    """W itself as the free tensor: no structure, so no training step keeps its margin.

    Forward: ``() -> W (n, n)``. State: ``weight (n, n)``.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))

    def forward(self) -> Tensor:
        return self.weight

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """(A, K, m) with (1 − m) I − AᵀA + K = W up to rounding; m is W's proved margin."""
        weight = self.weight.detach()
        margin = verified.margin(weight.to("cpu", torch.float64))
        if margin <= 0:
            raise NotWellPosedError(
                f"W has the margin {margin:.6g}; a structured quantizer keeps a margin only where there is one. "
                "Use Compensated, which makes one",
                margin,
            )
        A, B = monotone_factors(weight, margin)
        return A, B - B.mT, margin


def monotone_factors(W: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """The right inverse: (A, B) with (1 − m) I − AᵀA + B − Bᵀ = W, from the eigenvalues of sym(I − W) − m I.

    Eigenvalues at or below rounding are dropped, so A has as many rows as the rank. ``W`` must have margin
    at least ``margin`` (membership: ``verified.margin(W) >= margin``); negative eigenvalues are cut to 0.
    """
    W64 = W.detach().to("cpu", torch.float64)
    n = W64.shape[0]
    skew = (W64 - W64.mT) / 2
    gap = (1 - margin) * torch.eye(n, dtype=torch.float64) - (W64 + W64.mT) / 2
    values, vectors = torch.linalg.eigh(gap)
    keep = values > 8 * n * verified.UNIT * max(float(values.abs().max()) if n else 0.0, 1.0)
    A = values[keep].sqrt()[:, None] * vectors[:, keep].mT
    return A.to(W), (skew / 2).to(W)
