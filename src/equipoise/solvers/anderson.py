"""Anderson acceleration (type II), safeguarded, every sample with its own mixing (theory §2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .accelerated import Accelerated, push

__all__ = ["Anderson"]


@dataclass(frozen=True)
class Anderson(Accelerated):
    """u⁺ = u + r − Σ γ_j (Δu_j + Δr_j), γ = argmin ‖r − Σ γ_j Δr_j‖₂, r = T(u) − u; default memory 5."""

    def blank(self, u: Tensor) -> tuple[Tensor, ...]:
        shape = len(u), self.memory, u.shape[1]
        return u.new_zeros(shape), u.new_zeros(shape)

    def learn(self, memory: tuple[Tensor, ...], du: Tensor, dr: Tensor) -> None:
        push(memory[0], du)
        push(memory[1], dr)

    def propose(self, memory: tuple[Tensor, ...], u: Tensor, residual: Tensor) -> Tensor:
        du, dr = memory
        # Normal equations of a few unknowns in float64; a small ridge answers for columns of zeros.
        wide = dr.double()
        gram = wide @ wide.mT
        trace = gram.diagonal(dim1=1, dim2=2).sum(1)
        ridge = 1e-12 * trace + torch.finfo(torch.float64).tiny
        gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        weights, _ = torch.linalg.solve_ex(gram, wide @ residual.double()[:, :, None])
        step = (weights.to(u).mT @ (du + dr))[:, 0]
        return u + residual - torch.where(torch.isfinite(step), step, 0.0)
