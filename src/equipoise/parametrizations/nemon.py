"""W = γ I + D⁻¹ T D − diag(|T| 1), D = diag(e^d): every matrix with μ_η(W) ≤ γ, η = e^{−d} (theory §7, [JDPB21])."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import InputError, NotWellPosedError, OptionError
from ..norms import WeightedMax, best_family

__all__ = [
    "GAP_FLOOR",
    "Contractive",
    "ContractiveKernel",
    "Weighted",
    "best_weights",
    "check_gamma",
    "contractive_factors",
]

GAP_FLOOR = 1e-3
"""A learned γ is 1 − softplus(raw) − this floor, so that no training step can reach 1."""


def check_gamma(gamma: float) -> float:
    """``gamma`` as a float; raises :class:`OptionError` unless it is finite and below 1."""
    try:
        value = float(gamma)
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value < 1):
        raise OptionError(f"gamma is {gamma!r}; it is a finite number below 1 (0.95 is usual), or nothing contracts")
    return value


class Contractive(nn.Module):
    """The structured weights of a NEMON layer.

    Forward: ``() -> W (n, n)`` with μ_η(W) <= γ, equal where T has no negative diagonal entry (all up to rounding).
    State: ``T (n, n)``, ``d (n,)`` (learned or fixed) and ``gamma`` (fixed) or ``raw_gap`` (learned, γ = 1 −
    softplus(raw) − 1e-3).

    Raises:
        OptionError: γ not below 1.
    """

    raw_gap: Tensor
    gamma: Tensor
    d: Tensor

    def __init__(
        self, features: int, gamma: float = 0.95, learn_gamma: bool = False, learn_weights: bool = True
    ) -> None:
        super().__init__()
        # rows of |T| sum up to 0.15 √n: a third of what is usual, since they lengthen every step of an iteration
        value, scale = check_gamma(gamma), 0.3 / math.sqrt(max(features, 1))
        self.T = nn.Parameter(torch.empty(features, features).uniform_(-scale, scale))
        if learn_weights:
            self.d = nn.Parameter(torch.zeros(features))
        else:
            self.register_buffer("d", torch.zeros(features))
        if learn_gamma:
            if value >= 1 - GAP_FLOOR:
                raise OptionError(f"gamma is {gamma}; a learned one starts below 1 − {GAP_FLOOR}")
            self.raw_gap = nn.Parameter(torch.tensor(_raw(value), dtype=torch.get_default_dtype()))
        else:
            self.register_buffer("gamma", torch.tensor(value, dtype=torch.get_default_dtype()))

    @classmethod
    def from_factors(
        cls, T: Tensor, d: Tensor, gamma: float, learn_gamma: bool = False, learn_weights: bool = True
    ) -> Contractive:
        """The parametrization at given factors, copied, in their dtype."""
        if T.ndim != 2 or T.shape[0] != T.shape[1] or tuple(d.shape) != (T.shape[0],):
            raise InputError(f"T is {tuple(T.shape)} and d is {tuple(d.shape)}; needed are (n, n) and (n,)")
        module = cls(len(T), gamma, learn_gamma, learn_weights).to(T.device, T.dtype)
        with torch.no_grad():
            module.T.copy_(T)
            module.d.copy_(d)
            if learn_gamma:
                module.raw_gap.fill_(_raw(float(gamma)))
            else:
                module.gamma.fill_(float(gamma))
        return module

    def current_gamma(self) -> Tensor:
        """γ as a 0-dim tensor."""
        if "raw_gap" in self._parameters:
            return 1 - GAP_FLOOR - nn.functional.softplus(self.raw_gap)
        return self.gamma

    def forward(self) -> Tensor:
        with torch.autocast(self.T.device.type, enabled=False):  # W is a definition, not a computation to speed up
            W = self.T * torch.exp(self.d[None, :] - self.d[:, None])
            W.diagonal().add_(self.current_gamma() - self.T.abs().sum(1))
        return W

    def family(self) -> WeightedMax:
        """The norm in which W contracts: weights η = e^{−d}, scaled so that the largest is about 1."""
        d = self.d.detach().to("cpu", torch.float64)
        return WeightedMax(torch.exp(d.min() - d) if len(d) else d)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """(T, η float64, γ), detached: what a structured quantizer rounds, and keeps."""
        return self.T.detach(), self.family().eta, float(self.current_gamma().detach())


def _raw(gamma: float) -> float:
    """The inverse of γ = 1 − floor − softplus(raw)."""
    gap = 1 - GAP_FLOOR - gamma
    return gap + math.log(-math.expm1(-gap))


class ContractiveKernel(nn.Module):
    """The kernel of a circular convolution with μ_η <= γ, one weight η = e^{−d} per channel.

    K = D⁻¹ T D off its centre, and at the centre of channel i T_ii(0) + γ − Σ |T_i|, the sum over all taps and inputs:
    the row sum of every pixel of channel i.

    Forward: ``() -> K (C, C, k, k)``, k odd. State: ``T (C, C, k, k)``, ``d (C,)``, ``gamma``.

    Raises:
        OptionError: γ not below 1.
    """

    gamma: Tensor

    def __init__(self, channels: int, kernel_size: int, gamma: float = 0.95) -> None:
        super().__init__()
        scale = 0.3 / math.sqrt(channels * kernel_size**2)
        self.T = nn.Parameter(torch.empty(channels, channels, kernel_size, kernel_size).uniform_(-scale, scale))
        self.d = nn.Parameter(torch.zeros(channels))
        self.register_buffer("gamma", torch.tensor(check_gamma(gamma), dtype=torch.get_default_dtype()))

    def forward(self) -> Tensor:
        with torch.autocast(self.T.device.type, enabled=False):
            ratios = torch.exp(self.d[None, :] - self.d[:, None])[:, :, None, None]
            middle = self.T.shape[2] // 2
            center = torch.zeros_like(self.T)
            center[:, :, middle, middle] = torch.diag(self.gamma - self.T.abs().sum((1, 2, 3)))
            return self.T * ratios + center

    def family(self) -> WeightedMax:
        """The norm of the channels' weights, scaled so that the largest is about 1."""
        d = self.d.detach().to("cpu", torch.float64)
        return WeightedMax(torch.exp(d.min() - d))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """(T, η float64 ``(C,)``, γ), detached."""
        return self.T.detach(), self.family().eta, float(self.gamma)


class Weighted(nn.Module):
    """W itself as the free tensor, with weights η: no structure, so no training step keeps its measure.

    Forward: ``() -> W (n, n)``. State: ``weight (n, n)``, ``log_eta (n,)``.
    """

    log_eta: Tensor

    def __init__(self, weight: Tensor, eta: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
        eta64 = WeightedMax(eta).eta  # which checks it
        self.register_buffer("log_eta", eta64.log().to(weight))

    def forward(self) -> Tensor:
        return self.weight

    def family(self) -> WeightedMax:
        """The norm of the weights η."""
        log_eta = self.log_eta.to("cpu", torch.float64)
        return WeightedMax(torch.exp(log_eta - log_eta.max()))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """(T, η, γ) with γ I + D⁻¹TD − diag(|T|1) = W up to rounding, D = 1/η; γ is W's proved measure."""
        family = self.family()
        gamma = 1 - family.margin(self.weight)
        if not gamma < 1:
            raise NotWellPosedError(
                f"W has the measure {gamma:.6g} in its weighted maximum norm; a structured quantizer keeps a measure "
                "below 1 only where there is one",
                1 - gamma,
            )
        return contractive_factors(self.weight, family.eta, gamma), family.eta, gamma


def contractive_factors(W: Tensor, eta: Tensor, gamma: float) -> Tensor:
    """The right inverse: T ``(n, n)`` with γ I + D⁻¹ T D − diag(|T| 1) = W, D = 1/η, in W's dtype.

    Membership: μ_η(W) <= γ, i.e. ``WeightedMax(eta).margin(W) >= 1 − gamma``; a diagonal above that is cut.
    """
    W64, eta = W.detach().to("cpu", torch.float64), eta.to(torch.float64)
    T = W64 * (eta[None, :] / eta[:, None])
    T.diagonal().zero_()
    T.diagonal().copy_(((W64.diagonal() - gamma + T.abs().sum(1)) / 2).clamp(max=0.0))
    return T.to(W)


def best_weights(W: Tensor) -> WeightedMax:
    """The norm with the smallest measure of ``W (n, n)`` that was found (theory §7).

    Raises:
        NotWellPosedError: no weights prove a measure below 1; says the abscissa found.
    """
    family, abscissa = best_family(W)
    margin = family.margin(W)
    if margin <= 0:
        raise NotWellPosedError(
            f"W has no weighted maximum norm in which it is proved to contract: the spectral abscissa of its Metzler "
            f"majorant is about {abscissa:.6g}, and below 1 is needed (proved: a measure of {1 - margin:.6g}). "
            "Scale W down, or use MonDEQ if its Euclidean margin is positive",
            margin,
        )
    return family
