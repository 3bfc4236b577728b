"""A dense W, with everything derived from it computed at most once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import verified
from ..norms import EUCLIDEAN, Euclidean, Norm, WeightedMax, best_family
from .base import MatrixProduct, MonotoneOperator, Product, golden_section, power_norm, singular

__all__ = ["DenseOperator", "TransposedOperator", "averaging_step", "in_proving_norm"]

MATRICES = 4
"""Cayley transforms kept at a time: one a step in use, and a few for those who try steps."""


class DenseOperator(MonotoneOperator):
    """W as an ``(n, n)`` tensor; ``weight`` may carry a graph, every constant is of its values.

    Args:
        weight: the matrix that products use.
        exact: the matrix that the stored numbers define as float64, with a 2-norm bound on how far both
            the true one and ``weight`` may be from it. Default: ``weight`` itself, exactly.
        margin_floor: a margin of ``exact`` proved by other means (algebra), if any.
        lipschitz_ceiling: likewise for the Lipschitz constant.
        cayley: (α, C_α) where a Cayley matrix is what is stored.
        family: the norm in which constants are proved.
        row_floor: lower bounds ``(n,)`` of 1 − μ_i proved by other means, of the matrix the stored numbers define
            and of ``weight``; for a :class:`WeightedMax` family.
        derived: a dict of constants already computed for these same values, shared and filled.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        exact: tuple[Tensor, float] | None = None,
        margin_floor: float | None = None,
        lipschitz_ceiling: float | None = None,
        cayley: tuple[float, Tensor] | None = None,
        family: Norm = EUCLIDEAN,
        row_floor: Tensor | None = None,
        derived: dict[Any, Any] | None = None,
    ) -> None:
        self.weight = weight
        self.features = weight.shape[0]
        self._exact = exact
        self.representation_error = exact[1] if exact else 0.0
        self._margin_floor = margin_floor
        self._lipschitz_ceiling = lipschitz_ceiling
        self.stored_cayley = cayley
        self.stores_cayley = cayley is not None
        self.family = family
        self._row_floor = row_floor
        self._derived = {} if derived is None else derived

    def shared_proofs(self) -> dict[Any, Any]:
        """The proved constants, for another operator of the same matrix in another dtype."""
        known = {"margin": self.margin(), "lipschitz": self.lipschitz(), "norm": self.norm()}
        rows = {"row_margins": self.row_margins()} if isinstance(self.family, WeightedMax) else {}
        return known | rows

    def matrix64(self) -> tuple[Tensor, float]:
        """(W in float64 on the CPU, e): both the stored matrix and ``weight`` are within e of it (2-norm)."""
        if self._exact is not None:
            return self._exact
        return self.once("matrix64", lambda: self.weight.detach().to("cpu", torch.float64)), 0.0

    def apply(self, z: Tensor) -> Tensor:
        return torch.nn.functional.linear(z, self.weight)

    def transpose(self, z: Tensor) -> Tensor:
        return z @ self.weight

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    def pullback(self, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return (y.mT @ z,)

    def margin(self) -> float:
        return self.once("margin", self._prove_margin)

    def _prove_margin(self) -> float:
        if isinstance(self.family, WeightedMax):
            return float(self.row_margins().min()) if self.features else math.inf
        bound = self.family.margin(*self.matrix64())
        if self._margin_floor is None:
            return bound
        return max(bound, verified.down(self._margin_floor - self.representation_error))

    def euclidean_margin(self) -> float:
        """A proved lower bound of λ_min(sym(I − W)), in whichever family the operator is."""
        if isinstance(self.family, Euclidean):
            return self.margin()
        return self.once("euclidean_margin", lambda: EUCLIDEAN.margin(*self.matrix64()))

    def row_margins(self) -> Tensor:
        """Lower bounds ``(n,)`` of 1 − μ_i, row by row; for a :class:`WeightedMax` family (theory §7)."""
        return self.once("row_margins", self._prove_rows)

    def _prove_rows(self) -> Tensor:
        assert isinstance(self.family, WeightedMax)
        rows = self.family.row_margins(*self.matrix64())
        return rows if self._row_floor is None else torch.maximum(rows, self._row_floor)

    def row_norms(self) -> Tensor:
        """Upper bounds ``(n,)`` of Σ_j |W_ij| η_j/η_i; for a :class:`WeightedMax` family."""
        family = self.family
        assert isinstance(family, WeightedMax)
        return self.once("row_norms", lambda: family.row_norms(*self.matrix64()))

    def averaging_step(self) -> float:
        """α* = 1/(1 − min_i min(W_ii, 0)), the longest step at which (1 − α) I + α D W keeps non-negative diagonals
        for all slopes D in [0, 1]; rounded down (theory §7)."""
        return self.once("averaging_step", lambda: averaging_step(self.matrix64()))

    def lipschitz(self) -> float:
        return self.once("lipschitz", self._prove_lipschitz)

    def _prove_lipschitz(self) -> float:
        bound = self.family.lipschitz(*self.matrix64())
        if self._lipschitz_ceiling is None:
            return bound
        return min(bound, verified.up(self._lipschitz_ceiling + self.representation_error))

    def norm(self) -> float:
        return self.once("norm", lambda: self.family.norm(*self.matrix64()))

    def absolute_norm(self) -> float:
        matrix, error = self.matrix64()
        return self.once("absolute_norm", lambda: verified.up(verified.absolute_norm(matrix) + error * self.features))

    def cayley(self, alpha: float) -> Tensor:
        formed = [key for key in self._derived if isinstance(key, tuple) and key[0] == "cayley"]
        if len(formed) >= MATRICES and ("cayley", alpha) not in formed:
            del self._derived[formed[0]]
        return self.once(("cayley", alpha), lambda: self._form_cayley(alpha))

    def _form_cayley(self, alpha: float) -> Tensor:
        weight = self.weight.detach()
        if self.stored_cayley is not None and self.stored_cayley[0] == alpha:
            return self.stored_cayley[1].to(weight)
        system = torch.mul(weight, -alpha)
        system.diagonal().add_(1 + alpha)
        inverse, info = torch.linalg.inv_ex(system)
        if self.features and int(info) != 0:
            raise singular(alpha, self.margin())
        inverse.mul_(2).diagonal().sub_(1)
        return inverse

    def formed_cayley(self, alpha: float) -> Tensor | None:
        """C_α if it was formed already."""
        found: Tensor | None = self._derived.get(("cayley", alpha))
        return found

    @torch.no_grad()
    def refine_cayley(self, alpha: float, guess: Tensor, tol: float) -> bool:
        """Form C_α from that of nearby weights by a step of Newton–Schulz, V⁺ = V + V (I − M V) with V = (I + C)/2 and
        M = I + α (I − W), which squares the residual: two products instead of an inverse.

        Done only where ‖I − M V⁺‖_F <= ``tol``; returns whether it was.
        """
        weight = self.weight.detach()
        if self.stores_cayley or ("cayley", alpha) in self._derived or guess.dtype != weight.dtype:
            return False
        residual = torch.addmm(weight, weight, guess).mul_(alpha / 2)  # I − M V with M V = ((1+α)(I+C) − α W(I+C))/2
        residual.sub_(guess, alpha=(1 + alpha) / 2).diagonal().add_((1 - alpha) / 2)
        if not float(torch.linalg.vector_norm(residual)) ** 2 <= tol:
            return False
        self.once(("cayley", alpha), lambda: torch.addmm(guess + residual, guess, residual))
        return True

    def cayley_norm(self, alpha: float) -> float:
        return self.once(("cayley_norm", alpha), lambda: power_norm(self._form_cayley(alpha)))

    def best_alpha(self) -> float:
        if self.stored_cayley is not None:
            return self.stored_cayley[0]
        return self.once("best_alpha", self._minimise_cayley_norm)

    def _minimise_cayley_norm(self) -> float:
        weight = self.weight.detach()
        if not self.features or not bool(torch.isfinite(weight).all()):
            return 1.0
        forward = torch.eye(self.features).to(weight) - weight
        singular = torch.linalg.svdvals(forward) if self.features <= 512 else None
        largest = float(singular[0]) if singular is not None else power_norm(forward)
        smallest = float(singular[-1]) if singular is not None else max(self.margin(), 1e-3 * largest)
        if not 1e-290 < largest < 1e290:  # W = I, where every step is the same; or so large that none is of use
            return 1.0
        low = 1 / largest
        high = max(low, 1 / max(smallest, 1e-6 * largest))
        coarse = 0.05 if singular is not None else 0.8  # an inverse of thousands of rows costs seconds
        return golden_section(lambda alpha: power_norm(self._form_cayley(alpha)), low, high, coarse)

    def forward_norm(self, alpha: float) -> float:
        def compute() -> float:
            step = self.weight.detach() * alpha
            step.diagonal().add_(1 - alpha)
            return power_norm(step)

        return self.once(("forward_norm", alpha), compute)

    def cayley_bound(self, alpha: float) -> float | None:
        """A proved bound of ‖C_α‖₂ below 1, or None: of the stored Cayley matrix itself where one is, else of W's."""
        matrix, error = self.matrix64()
        if self.stored_cayley is not None and self.stored_cayley[0] == alpha:
            C = self.stored_cayley[1]  # code times scale, rounded
            bound: float | None = verified.spectral_norm(C, verified.UNIT * verified.absolute_norm(C))
        else:
            bound = verified.cayley_norm(matrix, alpha, error) if error < math.inf else None
        return bound if bound is not None and bound < 1 else None

    def forward_bound(self, alpha: float) -> float | None:
        """A proved bound of ‖(1 − α) I + αW‖₂ below 1, or None."""
        matrix, error = self.matrix64()
        if error == math.inf:  # no matrix is known
            return None
        step = alpha * matrix + (1 - alpha) * torch.eye(self.features, dtype=torch.float64)
        spread = verified.absolute_norm(matrix)
        forming = 4 * verified.UNIT * (alpha * spread + abs(1 - alpha)) * (1 + 2.0**-45)
        bound = verified.spectral_norm(step, verified.up(alpha * error * (1 + 2.0**-45) + forming))
        return bound if bound < 1 else None

    def transposed_cayley_product(self, alpha: float) -> Product:
        """The product with C_αᵀ."""
        return MatrixProduct(self.cayley(alpha).mT)

    def transposed(self) -> TransposedOperator:
        return TransposedOperator(self)


def averaging_step(matrix: tuple[Tensor, float]) -> float:
    """α* of every matrix within the given distance (see :meth:`DenseOperator.averaging_step`)."""
    W, error = matrix
    lowest = verified.down(float(W.diagonal().min()) - error) if len(W) else 0.0
    return verified.down(1 / verified.up(1 - min(lowest, 0.0)))


def in_proving_norm(operator: DenseOperator) -> DenseOperator:
    """``operator``, in the family that proves it: the 2-norm wherever a Euclidean margin is proved, else the weighted
    maximum norm of its Perron vector where that proves a measure below 1 (theory §7). For weights without structure,
    which promise neither."""
    plain = isinstance(operator.family, Euclidean) and operator.representation_error < math.inf
    if not plain or not bool(torch.isfinite(operator.weight).all()) or operator.margin() > 0:
        return operator
    matrix, error = operator.matrix64()
    family, _ = best_family(matrix, error)
    if not family.margin(matrix, error) > 0:
        return operator
    return DenseOperator(operator.weight, exact=(matrix, error), family=family)


class TransposedOperator(MonotoneOperator):
    """Wᵀ with the constants and inverses of W: the operator of the backward problem (theory §3)."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.features = base.features
        self.representation_error = base.representation_error
        self.stores_cayley = base.stores_cayley
        self.family = base.family.dual()

    def averaging_step(self) -> float:
        return self.base.averaging_step()

    def apply(self, z: Tensor) -> Tensor:
        return self.base.transpose(z)

    def transpose(self, z: Tensor) -> Tensor:
        return self.base.apply(z)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.base.tensors()

    def pullback(self, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return self.base.pullback(z, y)

    def margin(self) -> float:
        return self.base.margin()

    def lipschitz(self) -> float:
        return self.base.lipschitz()

    def norm(self) -> float:
        return self.base.norm()

    def absolute_norm(self) -> float:
        return self.base.absolute_norm()

    @property
    def terms(self) -> int:
        return self.base.terms

    def cayley(self, alpha: float) -> Tensor:
        return self.base.cayley(alpha).mT

    def cayley_product(self, alpha: float) -> Product:
        return self.base.transposed_cayley_product(alpha)

    def cayley_norm(self, alpha: float) -> float:
        return self.base.cayley_norm(alpha)

    def best_alpha(self) -> float:
        return self.base.best_alpha()

    def forward_norm(self, alpha: float) -> float:
        return self.base.forward_norm(alpha)

    def transposed(self) -> MonotoneOperator:
        base: MonotoneOperator = self.base
        return base
