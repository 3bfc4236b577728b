"""What is proved of sums and products of symbols, rounding counted (theory §6, §8)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import verified
from . import spectra

__all__ = ["contracts", "difference", "gram", "rounding", "size", "whole"]


def whole(blocks: Tensor) -> float:
    """A bound of the norm of a matrix by those of its blocks."""
    return float(blocks) if blocks.numel() == 1 else verified.spectral_norm(blocks)


def difference(one: spectra.Spectrum, other: spectra.Spectrum) -> spectra.Spectrum:
    error = (one.error + other.error) * (1 + 2.0**-48) + rounding(one.values, other.values)
    return spectra.Spectrum(one.values - other.values, verified.up(error))


def gram(spectrum: spectra.Spectrum) -> tuple[Tensor, float]:
    """(XᴴX, a 2-norm bound of its error) for a spectrum X."""
    values, error = spectrum
    length = float(torch.linalg.vector_norm(values.flatten(1), dim=1).max()) * (1 + 1e-12)
    gamma = verified.gamma(4 * values.shape[1] + 16)
    return values.mH @ values, verified.up(
        (2 * error + gamma * length) * (length + error) * (1 + 1e-12) + verified.TINY
    )


def contracts(F: Tensor, alpha: float, rho: float, error: float) -> bool:
    """Whether ‖(I − αF')x‖ <= ρ ‖(I + αF')x‖ is proved at every frequency, all F' within ``error`` of F + its rounding:
    (ρ² + 1) α (F + Fᴴ) − (1 − ρ²)(I + α² FᴴF) ⪰ 0."""
    length = float(torch.linalg.vector_norm(F.flatten(1), dim=1).max()) * (1 + 1e-12)
    error = error + 2 * verified.UNIT * length
    less, more = (1 - rho) * (1 + rho), (1 + rho * rho) * alpha
    Q = F * (2 * more) - (F.mH @ F) * (less * alpha**2)  # of which the Hermitian part counts
    Q.diagonal(dim1=1, dim2=2).sub_(less)
    moved = 2 * more * error + less * alpha**2 * (2 * length + error) * error
    gamma = verified.gamma(4 * F.shape[1] + 32)
    slip = gamma * (2 * more * length + less * (1 + (alpha * length) ** 2))
    return spectra.min_eigenvalue(Q, verified.up((moved + slip) * (1 + 1e-12))) >= 0


def rounding(*values: Tensor) -> float:
    """A 2-norm bound of what the sum of these is rounded by, at any frequency."""
    return sum(float(torch.linalg.vector_norm(v.flatten(1), dim=1).max()) for v in values) * 4 * verified.UNIT


def size(K: Tensor) -> float:
    """An upper bound of the norm of the convolution with |K|."""
    sums = K.detach().to("cpu", torch.float64).abs().sum((2, 3))
    return verified.absolute_norm(sums) * (1 + verified.gamma(K.shape[2] ** 2 + 8))
