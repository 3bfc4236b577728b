"""Broyden's good method with limited memory, safeguarded, every sample with its own inverse (theory §2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .accelerated import Accelerated, push

__all__ = ["Broyden"]


@dataclass(frozen=True)
class Broyden(Accelerated):
    """u⁺ = u − H r with H ≈ (∂r/∂u)⁻¹, r = T(u) − u, H₀ = −I; each pair (s, y) adds (s − H y) sᵀH / (sᵀH y).

    H is kept as −I + Σ a_j b_jᵀ over the last ``memory`` pairs (default 10).
    """

    memory: int = 10

    def blank(self, u: Tensor) -> tuple[Tensor, ...]:
        shape = len(u), self.memory, u.shape[1]
        return u.new_zeros(shape), u.new_zeros(shape)

    def learn(self, memory: tuple[Tensor, ...], du: Tensor, dr: Tensor) -> None:
        left, right = memory
        row = _combine(left, right, du) - du  # sᵀH
        curvature = (row * dr).sum(1, keepdim=True)
        floor = (
            torch.finfo(du.dtype).eps * (row.square().sum(1, keepdim=True) * dr.square().sum(1, keepdim=True)).sqrt()
        )
        useful = curvature.abs() > floor
        column = (du - self._inverse(memory, dr)) / torch.where(useful, curvature, 1.0)
        push(left, torch.where(useful, column, 0.0))
        push(right, torch.where(useful, row, 0.0))

    def propose(self, memory: tuple[Tensor, ...], u: Tensor, residual: Tensor) -> Tensor:
        return u - self._inverse(memory, residual)

    def _inverse(self, memory: tuple[Tensor, ...], r: Tensor) -> Tensor:
        """H r."""
        left, right = memory
        return _combine(right, left, r) - r


def _combine(read: Tensor, write: Tensor, x: Tensor) -> Tensor:
    """Σ_j (read_j · x) write_j for every row of ``x (B, k)``; ``read``, ``write`` are ``(B, depth, k)``."""
    return ((read @ x[:, :, None]).mT @ write)[:, 0]
