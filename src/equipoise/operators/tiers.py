"""W of a convolutional monDEQ: circular convolutions on one grid or on several, block lower-bidiagonal (theory §8)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import verified
from ..parametrizations.convolution import Kernels, transpose
from . import spectra
from . import symbol_bounds as bounds
from .base import MonotoneOperator, Product, golden_section, power_norm, singular
from .dense import TransposedOperator
from .grids import Geometry, TierProduct, blocked, circular
from .torus import Symbols, conjugate, mix, parts_of, times, torus

__all__ = ["TierOperator"]

SMALL = 512
"""Features up to which norms are computed from dense matrices."""

POWER_STEPS = 30
"""Of power iterations, which choose steps and prove nothing."""


class TierOperator(MonotoneOperator):
    """W by its ``kernels`` on the grids of ``geometry``.

    Every constant is proved frequency by frequency from the kernels that are multiplied by. With H_i = herm(I − own_i),
    ⟨z, (I − W) z⟩ = Σ ⟨z_i, H_i z_i⟩ + Σ ‖S_i z_i‖² + 2 Σ ⟨A_{i+1} z_{i+1}, S_i z_i⟩, and since ‖S_i z_i + A_{i+1}
    z_{i+1}‖² >= 0 on the pixels that S_i reaches, the margin is at least min_i λ_min(H_i − A_iᵀA_i), i >= 1, and
    λ_min(H_0): with the structure of theory §8 m, or m + λ_min(A_0ᵀA_0).

    Args:
        kernels: may carry a graph; constants are of their values.
        derived: constants already computed for these same values, shared and filled.
        floor: a margin of what stored numbers define, proved by other means, and a 2-norm bound on how far the
            kernels' W may lie from that.
    """

    def __init__(
        self,
        kernels: Kernels,
        geometry: Geometry,
        derived: dict[Any, Any] | None = None,
        floor: tuple[float, float] | None = None,
    ) -> None:
        self.kernels, self.geometry = kernels, geometry
        self.features = sum(geometry.features(i) for i in range(geometry.tiers))
        self._derived = {} if derived is None else derived
        self._floor = floor
        self.representation_error = 0.0 if floor is None else floor[1]

    @property
    def _like(self) -> Tensor:
        return self.kernels.own[0]

    @property
    def terms(self) -> int:
        kernels, geometry = self.kernels, self.geometry
        taps = max(own[0].numel() for own in kernels.own)
        rest = sum(2 * down[0].numel() + lift[0].numel() for down, lift in zip(kernels.down, kernels.lift, strict=True))
        return taps + rest + 8 * geometry.tiers

    # Products

    def _blocks(self, kernels: Kernels) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """own_i, down_i and lift_i between blocks."""
        block, tiers = self.geometry.block, range(self.geometry.tiers - 1)
        own = [blocked(K, block(i), block(i)) for i, K in enumerate(kernels.own)]
        down = [blocked(kernels.down[i], 1, 2) for i in tiers]
        lift = [blocked(kernels.lift[i], block(i + 1), block(i + 1)) for i in tiers]
        return own, down, lift

    def _symbols(self, kernels: Kernels) -> tuple[list[Symbols], list[Symbols], list[Symbols]]:
        """(D_i, S_i, A_{i+1}) at every frequency, with their graph."""
        own, down, lift = self._blocks(kernels)
        tori = [torus(self.geometry.grid(i), K.dtype, K.device) for i, K in enumerate(own)]
        D = [t.symbols(K) for t, K in zip(tori, own, strict=True)]
        S = [t.symbols(K) for t, K in zip(tori[:-1], down, strict=True)]
        A = [t.symbols(K) for t, K in zip(tori[1:], lift, strict=True)]
        for i, down_i in enumerate(S):
            re, im = mix(conjugate(down_i), down_i)
            D[i] = D[i][0] - re, D[i][1] - im
        return D, S, A

    def _known(self) -> Kernels:
        """The kernels' values, without their graph."""
        return Kernels.of(tuple(t.detach() for t in self.kernels.flat()))

    def _known_symbols(self) -> tuple[list[Symbols], list[Symbols], list[Symbols]]:
        """:meth:`_symbols` of the kernels' values."""
        return self.once("symbols", lambda: self._symbols(self._known()))

    def _product(self, symbols: tuple[list[Symbols], list[Symbols], list[Symbols]], reverse: bool) -> TierProduct:
        D, S, A = symbols
        if reverse:
            back = [times(conjugate(s), -2.0) for s in S]
            return TierProduct(self.geometry, [conjugate(d) for d in D], A, back, True)
        nothing = (self._like, self._like)  # the first tier has none before it
        return TierProduct(self.geometry, D, [nothing, *S], [nothing, *(times(conjugate(a), -2.0) for a in A)])

    def _kept_product(self, reverse: bool) -> TierProduct:
        return self.once(("product", reverse), lambda: self._product(self._known_symbols(), reverse))

    def apply(self, z: Tensor) -> Tensor:
        return self._applied(z, False)

    def transpose(self, z: Tensor) -> Tensor:
        return self._applied(z, True)

    def _applied(self, z: Tensor, reverse: bool) -> Tensor:
        if not len(z):
            return torch.zeros_like(z)
        if torch.is_grad_enabled() and any(t.requires_grad for t in self.kernels.flat()):
            return self._product(self._symbols(self.kernels), reverse)(z)
        return self._kept_product(reverse)(z)

    def summed(self, z: Tensor) -> Tensor:
        own, down, lift = self.once("blocks", lambda: self._blocks(self._known()))
        sent: Tensor | None = None
        found = []
        for i, blocks in enumerate(self.geometry.split(z)):
            y = circular(blocks, own[i])
            if sent is not None:
                y = y - 2 * circular(sent, transpose(lift[i - 1]))
            if i < len(down):
                t = circular(blocks, down[i])
                y, sent = y - circular(t, transpose(down[i])), self.geometry.place(t, i)
            found.append(y)
        return self.geometry.join(found)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.kernels.flat()

    def pullback(self, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # z may depend on the kernels, too: only what leads through these copies is asked for
            tensors = tuple(t.view_as(t) if again else t.detach().requires_grad_() for t in self.tensors())
            image = self._product(self._symbols(Kernels.of(tensors)), False)(z)
            asked = tuple(t for t in tensors if t.requires_grad)
            found = iter(torch.autograd.grad(image, asked, y, create_graph=again))
            return tuple(next(found) if t.requires_grad else torch.zeros_like(t) for t in tensors)

    # Constants

    def _spectra(self) -> tuple[list[spectra.Spectrum], ...]:
        """The symbols of own_i, down_i and lift_i in complex128, with their errors."""

        def compute() -> tuple[list[spectra.Spectrum], ...]:
            grids = [self.geometry.grid(i) for i in range(self.geometry.tiers)]
            pairs = zip(self._blocks(self._known()), (grids, grids[:-1], grids[1:]), strict=True)
            return tuple([spectra.symbols(K, at) for K, at in zip(Ks, over, strict=True)] for Ks, over in pairs)

        return self.once("spectra", compute)

    def margin(self) -> float:
        return self.once("margin", self._prove_margin)

    def _prove_margin(self) -> float:
        own, _, lift = self._spectra()
        found = math.inf
        for i, (values, error) in enumerate(own):
            if i:
                gram, slip = bounds.gram(lift[i - 1])
                values, error = (
                    values + gram,
                    verified.up((error + slip) * (1 + 2.0**-48) + bounds.rounding(values, gram)),
                )
            found = min(found, spectra.margin(values, error))
        if self._floor is None:
            return found
        known, apart = self._floor
        return min(found, max(verified.down(found - apart), known))

    def lipschitz(self) -> float:
        return self.once("lipschitz", lambda: self._bound(spectra.lipschitz))

    def norm(self) -> float:
        return self.once("norm", lambda: self._bound(spectra.norm))

    def diagonal(self, i: int) -> spectra.Spectrum:
        """The symbols of block (i, i) of W."""
        own, down, _ = self._spectra()
        if i == len(own) - 1:
            return own[i]
        (values, error), (gram, slip) = own[i], bounds.gram(down[i])
        return spectra.Spectrum(
            values - gram, verified.up((error + slip) * (1 + 2.0**-48) + bounds.rounding(values, gram))
        )

    def _bound(self, of: Callable[[Tensor, float], float]) -> float:
        """An upper bound of a norm of W or I − W by those of its blocks: exact with one tier."""
        _, down, lift = self._spectra()
        norms = [of(*self.diagonal(i)) for i in range(self.geometry.tiers)]
        blocks = torch.diag(torch.tensor(norms, dtype=torch.float64))
        for i, (below, above) in enumerate(zip(lift, down, strict=True)):
            blocks[i + 1, i] = verified.up(2 * spectra.norm(*below) * spectra.norm(*above)) * (1 + 1e-15)
        return verified.up(bounds.whole(blocks) + self.representation_error)

    def distance(self, other: TierOperator) -> float:
        """A bound of ‖W − W'‖₂ between what the numbers behind both define."""
        (_, down, lift), (_, others, lifts) = self._spectra(), other._spectra()
        pairs = [(self.diagonal(i), other.diagonal(i)) for i in range(self.geometry.tiers)]
        moved = [spectra.norm(*bounds.difference(*pair)) for pair in pairs]
        blocks = torch.diag(torch.tensor(moved, dtype=torch.float64))
        for i in range(self.geometry.tiers - 1):
            below, above = (
                spectra.norm(*bounds.difference(*pair)) for pair in ((down[i], others[i]), (lift[i], lifts[i]))
            )
            reach = 2 * (above * spectra.norm(*down[i]) + spectra.norm(*lifts[i]) * below)
            blocks[i + 1, i] = verified.up(reach * (1 + 1e-14))
        return verified.up(bounds.whole(blocks) + self.representation_error + other.representation_error)

    def absolute_norm(self) -> float:
        def compute() -> float:
            own, down, lift = ([bounds.size(K) for K in Ks] for Ks in self._blocks(self.kernels))
            tiers = len(own)
            blocks = torch.diag(torch.tensor(own, dtype=torch.float64))
            for i in range(tiers - 1):
                blocks[i, i] += down[i] ** 2
                blocks[i + 1, i] = 2 * lift[i] * down[i]
            return verified.up(verified.absolute_norm(blocks) * (1 + 1e-14) + self.representation_error * self.terms)

        return self.once("absolute_norm", compute)

    def averaging_step(self) -> float:
        """1/(1 + L): averaged iterations know rows; of a convolution in the 2-norm none are looked at."""
        return verified.down(1 / verified.up(1 + self.lipschitz()))

    # Inverses

    def _inverse(self, alpha: float) -> list[Tensor]:
        """V_i = (I + α(I − D_i))⁻¹, complex ``(F, c, c)``."""
        found = []
        for re, im in self._known_symbols()[0]:
            system = torch.complex(re, im).mul_(-alpha)
            system.diagonal(dim1=1, dim2=2).add_(1 + alpha)
            inverse, info = torch.linalg.inv_ex(system)
            if bool((info != 0).any()):
                raise singular(alpha, self.margin())
            found.append(inverse)
        return found

    def _cayley_symbols(self, alpha: float) -> tuple[list[Symbols], ...]:
        """(C_i; S_i and −2α V_i A_iᴴ of the way down; A_{i+1} and −2α V_iᴴ S_iᴴ of the way up)."""

        def compute() -> tuple[list[Symbols], ...]:
            inverses = self._inverse(alpha)
            _, S, A = self._known_symbols()
            C, down, up = [], [], []
            for i, V in enumerate(inverses):
                if i:
                    down.append(parts_of(V @ torch.complex(*conjugate(A[i - 1])) * (-2 * alpha)))
                if i < len(inverses) - 1:
                    up.append(parts_of(V.mH @ torch.complex(*conjugate(S[i])) * (-2 * alpha)))
                V = V.mul_(2)
                V.diagonal(dim1=1, dim2=2).sub_(1)
                C.append(parts_of(V))
            return C, S, down, A, up

        kept = [key for key in self._derived if isinstance(key, tuple) and key[0] == "cayley"]
        if ("cayley", alpha) not in kept and len(kept) >= 2:
            del self._derived[kept[0]]
        return self.once(("cayley", alpha), compute)

    def transposed_cayley_product(self, alpha: float) -> Product:
        """The product with C_αᵀ."""
        C, _, _, A, up = self._cayley_symbols(alpha)
        return TierProduct(self.geometry, [conjugate(c) for c in C], A, up, True, True)

    def cayley_product(self, alpha: float) -> Product:
        C, S, down, _, _ = self._cayley_symbols(alpha)
        nothing = (self._like, self._like)
        return TierProduct(self.geometry, C, [nothing, *S], [nothing, *down], feeds=True)

    def cayley(self, alpha: float) -> Tensor:
        eye = torch.eye(self.features, dtype=self._like.dtype, device=self._like.device)
        with torch.no_grad():
            return self.cayley_product(alpha)(eye).mT

    def cayley_norm(self, alpha: float) -> float:
        def compute() -> float:
            if self.features <= SMALL:
                return power_norm(self.cayley(alpha))
            return self._power(self.cayley_product(alpha), self.transposed_cayley_product(alpha))

        return self.once(("cayley_norm", alpha), compute)

    def _power(self, product: Callable[[Tensor], Tensor], transposed: Callable[[Tensor], Tensor]) -> float:
        """An estimate of a product's norm (from below) by power iteration."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.features, 2, generator=generator, dtype=torch.float64).to(self._like).mT
        size = torch.zeros(())
        for _ in range(POWER_STEPS):
            y = product(x / torch.linalg.vector_norm(x, dim=1, keepdim=True))
            size = torch.linalg.vector_norm(y, dim=1)
            x = transposed(y)
        return float(size.max())

    def best_alpha(self) -> float:
        return self.once("best_alpha", self._minimise_cayley_norm)

    def _minimise_cayley_norm(self) -> float:
        if (largest := self.lipschitz()) == 0:
            return 1.0
        low = 1 / largest
        high = max(low, 1 / max(self.margin(), 1e-3 * largest))
        if self.features <= SMALL:
            return golden_section(self.cayley_norm, low, high, 0.02)
        return golden_section(self._block_norm, low, high, 0.2)

    def _block_norm(self, alpha: float) -> float:
        """An estimate of max_i ‖C_i‖₂, by power iteration at all frequencies at once."""
        norms = []
        for V in self._inverse(alpha):
            C = V.mul_(2)
            C.diagonal(dim1=1, dim2=2).sub_(1)
            x = torch.ones(C.shape[0], C.shape[2], 1, dtype=C.dtype, device=C.device)
            x.view(torch.float32 if C.dtype == torch.complex64 else torch.float64)[:, ::2, ::2] *= -0.5
            for _ in range(POWER_STEPS):
                y = C @ (x / torch.linalg.vector_norm(x, dim=1, keepdim=True))
                x = C.mH @ y
            norms.append(float(torch.linalg.vector_norm(y, dim=1).max()))
        return max(norms)

    def cayley_bound(self, alpha: float) -> float | None:
        """The closed bound, or of one tier the least ρ found with ρ² (I + αF)ᴴ(I + αF) − (I − αF)ᴴ(I − αF) ⪰ 0 at every
        frequency."""
        if self.margin() <= 0:
            return None
        closed = super().cayley_bound(alpha)
        if self.geometry.tiers == 1 and max(alpha, alpha * self.lipschitz()) < 1e100:  # whose square is no overflow
            values, error = self.diagonal(0)
            error = verified.up(error + self.representation_error)
            F = -values
            F.diagonal(dim1=1, dim2=2).add_(1)
            guess = self.cayley_norm(alpha)
            for slack in (1e-6, 1e-4, 1e-3, 1e-2, 3e-2):
                rho = guess + slack * (1 - guess)
                if not rho < (1 if closed is None else closed):
                    break
                if bounds.contracts(F, alpha, rho, error):
                    return rho
        return closed

    def forward_bound(self, alpha: float) -> float | None:
        """The closed bound, or of one tier by its symbols."""
        found = super().forward_bound(alpha)
        if self.geometry.tiers == 1 and self.margin() > 0:
            values, error = self.diagonal(0)
            step = values * alpha
            step.diagonal(dim1=1, dim2=2).add_(1 - alpha)
            slip = bounds.rounding(step, values * alpha) + abs(1 - alpha) * 2 * verified.UNIT
            error = (error + self.representation_error) * alpha * (1 + 1e-14) + slip
            found = min(1.0 if found is None else found, spectra.norm(step, verified.up(error)))
        return found if found is not None and found < 1 else None

    def forward_norm(self, alpha: float) -> float:
        def compute() -> float:
            forward, back = self._kept_product(False), self._kept_product(True)
            if self.features <= SMALL:
                eye = torch.eye(self.features, dtype=self._like.dtype, device=self._like.device)
                return power_norm((1 - alpha) * eye + alpha * forward(eye))
            steps = (lambda x, W=W: W(x).mul_(alpha).add_(x, alpha=1 - alpha) for W in (forward, back))
            return self._power(*steps)

        return self.once(("forward_norm", alpha), compute)

    def transposed(self) -> TransposedOperator:
        return TransposedOperator(self)
