"""The Lipschitz multiscale DEQ, which contracts by proof, and the plain one beside it (theory §9, [SI26])."""

from __future__ import annotations

import math
from typing import Literal, final

import torch
from torch import Tensor

from .. import verified
from ..errors import OptionError
from ..solvers import Anderson, Picard, Solver
from .blocks import Plan
from .multiscale import gain_matrix
from .multiscale_deq import Gradient, MultiscaleDEQ

__all__ = ["MDEQ", "LipschitzMDEQ"]


@final
class LipschitzMDEQ(MultiscaleDEQ):
    """x ``(B, c, H, W)`` ↦ scores ``(B, classes)``, by the equilibrium of a map that contracts by at most ‖N‖₂ < 1.

    N_ij multiplies the factors on the way from branch j to branch i: true operator norms of convolutions, at most
    ``norm_cap``, largest |γ| of mean-only normalizations, at most ``affine_cap``, the slope, upsampling (theory §9).
    The published code caps the norms of reshaped kernels, which are smaller.

    Args:
        in_channels, size, classes: images of c channels and H × W pixels; H and W are divided by ``stem_stride`` and
            then halve once per branch.
        channels: of each branch.
        expansion, groups, post_groups, slope, residual, fusion: see [SI26]; ``activation`` is "relu" or "groupsort".
        norm_cap: of every convolution of the map. ``contraction`` in its place, in (0, 1): the largest cap for which
            ‖N‖₂ is at most that, the dropout of training counted.
        dropout: share of entries that training drops, the same ones in a whole solve.
        solver: Picard, or Anderson or Broyden on it; by default Picard, which needs no safeguard here.
        tol: of the relative residual ‖f(z) − z‖/‖f(z)‖; ``backward_tol`` likewise, by default the same.
        gradient: "implicit" (theory §3), "one-step" (one differentiable evaluation at the equilibrium) or "phantom"
            (``phantom_steps`` of them, damped by ``phantom_damping``).
        strict: raise instead of warning where a solve does not reach ``tol``.

    ``tally`` counts evaluations and failures. Of a quantized model ``scheme`` is its scheme.

    Raises:
        OptionError: a value outside its range, channels that the groups do not divide, sizes that do not halve.
    """

    def __init__(
        self,
        in_channels: int,
        size: int | tuple[int, int],
        classes: int,
        channels: tuple[int, ...] = (32, 64, 128, 256),
        *,
        expansion: int = 5,
        groups: int = 8,
        post_groups: int = 4,
        slope: float = 0.4,
        activation: Literal["relu", "groupsort"] = "relu",
        residual: float = 0.5,
        fusion: float = 0.3,
        norm_cap: float | None = None,
        affine_cap: float = 1.0,
        contraction: float | None = None,
        dropout: float = 0.3,
        stem_stride: int = 1,
        head_channels: int = 128,
        solver: Solver | None = None,
        tol: float = 1e-3,
        backward_tol: float | None = None,
        gradient: Gradient = "implicit",
        phantom_steps: int = 5,
        phantom_damping: float = 0.5,
        strict: bool = False,
    ) -> None:
        if norm_cap is not None and contraction is not None:
            raise OptionError(f"norm_cap is {norm_cap} and contraction {contraction}: give one; the other follows")

        def plan(shapes: tuple[tuple[int, int, int], ...]) -> Plan:
            cap = 2.0 if norm_cap is None else norm_cap
            made = Plan(shapes, expansion, groups, post_groups, slope, activation, residual, fusion, cap, affine_cap)
            if contraction is None:
                return made
            found = made.cap_for(contraction, dropout)
            return Plan(shapes, expansion, groups, post_groups, slope, activation, residual, fusion, found, affine_cap)

        super().__init__(
            in_channels, size, classes, channels, plan,
            dropout=dropout, stem_stride=stem_stride, head_channels=head_channels,
            solver=Picard() if solver is None else solver, tol=tol, backward_tol=backward_tol, gradient=gradient,
            phantom_steps=phantom_steps, phantom_damping=phantom_damping, strict=strict,
        )  # fmt: skip

    # What is proved

    def gains(self, training: bool = False) -> Tensor:
        """N ``(b, b)`` of the stored numbers, float64: f's branch i moves at most N_ij as fast as branch j of z.

        ``training``: with the dropout of training; of training itself caps and estimates are known, and this says what
        holds with the weights as evaluation scales them.
        """
        with torch.no_grad():
            return gain_matrix(self.map.cell("proof", self.dropout if training else 0.0))

    def contraction(self, training: bool = False) -> float:
        """A proved upper bound of ‖N‖₂, hence of the Lipschitz constant of z ↦ f(z; x) for every x."""
        return verified.spectral_norm(self.gains(training))

    def scaled_rate(self, training: bool = False) -> float:
        """A proved upper bound of ‖D N D⁻¹‖₂ for the best D > 0 found: a factor in a norm that weighs branches.

        The infimum over D is the spectral radius of N, at D = diag(√(left_i/right_i)) of its Perron vectors.
        """
        return scaled_norm(self.gains(training))

    def proved_rate(self) -> float:
        return self.contraction()

    def rate(self) -> float:
        """The caps' ‖N‖₂, which chooses budgets and proves nothing."""
        assert self.plan.norm_cap is not None
        return verified.spectral_norm(self.plan.nominal(self.plan.norm_cap, self.dropout if self.training else 0.0))


def scaled_norm(N: Tensor) -> float:
    """Upper bound of min_D ‖D N D⁻¹‖₂ for ``N (b, b)`` >= 0, float64, by a D near the best."""
    best = verified.spectral_norm(N)
    if not 0 < float(N.max()) < math.inf:  # NaN too
        return best
    lifted = N / float(N.max()) + 1e-9
    right, left = torch.ones(len(N), dtype=N.dtype), torch.ones(len(N), dtype=N.dtype)
    for _ in range(2000):
        right, left = lifted @ right, lifted.mT @ left
        right, left = right / right.sum(), left / left.sum()
    exponents = [round(float(v)) for v in torch.log2((left / right).sqrt()) * 2**8]
    # D from powers of 2^(1/256) would round; D of entries with few bits makes D N D⁻¹ one rounding an entry
    d = torch.tensor([2.0 ** (e / 2**8) for e in exponents], dtype=torch.float64)
    scaled = N * d[:, None] / d[None, :]
    slip = verified.gamma(4) * verified.absolute_norm(scaled)
    return min(best, verified.spectral_norm(scaled, slip))


@final
class MDEQ(MultiscaleDEQ):
    """The plain multiscale DEQ: the same sizes, standard group normalization, no caps, branches summed up.

    Nothing proves that its map has one fixed point, or that a solver finds it: ``tally.failures`` counts where it did
    not. Options as of :class:`LipschitzMDEQ`; by default Anderson without a safeguard, and at most 20 steps.
    """

    def __init__(
        self,
        in_channels: int,
        size: int | tuple[int, int],
        classes: int,
        channels: tuple[int, ...] = (32, 64, 128, 256),
        *,
        expansion: int = 5,
        groups: int = 8,
        post_groups: int = 4,
        dropout: float = 0.3,
        stem_stride: int = 1,
        head_channels: int = 128,
        solver: Solver | None = None,
        tol: float = 1e-3,
        backward_tol: float | None = None,
        gradient: Gradient = "implicit",
        phantom_steps: int = 5,
        phantom_damping: float = 0.5,
        strict: bool = False,
    ) -> None:
        super().__init__(
            in_channels, size, classes, channels,
            lambda shapes: Plan(shapes, expansion, groups, post_groups, slope=1.0, norm_cap=None),
            dropout=dropout, stem_stride=stem_stride, head_channels=head_channels,
            solver=Anderson(safeguard=False, max_steps=20) if solver is None else solver, tol=tol,
            backward_tol=backward_tol, gradient=gradient, phantom_steps=phantom_steps,
            phantom_damping=phantom_damping, strict=strict,
        )  # fmt: skip

    def rate(self) -> float:
        return math.inf

    def proved_rate(self) -> float:
        return math.inf
