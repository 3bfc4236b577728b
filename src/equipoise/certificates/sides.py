"""One network's layer in float64, with what is proved of it: what bounds per input are made of."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from .. import verified
from ..activations import Activation
from ..layers.equilibrium import EquilibriumLayer
from ..layers.linear import QuantizedLinear, affine64
from ..layers.mon_conv import MonotoneConvolution
from ..norms import Euclidean
from ..operators import DenseOperator
from ..operators.quantized_tiers import QuantizedTiers
from ..operators.recipes import PROVED
from ..operators.tiers import TierOperator
from ..parametrizations import Kernels
from ..solvers import PeacemanRachford, Problem, solve, tuned
from .rows import Comparison

__all__ = ["SLACK", "SOLVE_TOL", "DenseSide", "ImageSide", "Side"]

SLACK = 1 + 1e-12
"""Covers the additions and divisions of per-sample bounds, a few dozen roundings at most."""

SOLVE_TOL = 1e-9


@dataclass(frozen=True)
class Side(ABC):
    """One network's layer in float64: W with its proofs, and of x ↦ U x + b a norm, that of its absolute values, the
    size of b, and bounds on their own storage errors."""

    operator: DenseOperator | TierOperator
    activation: Activation
    norm_U: float
    spread_U: float
    size_b: float
    e_U: float
    e_b: float

    @property
    @abstractmethod
    def terms(self) -> int:
        """How many products are added up for an entry of U a + b."""

    @abstractmethod
    def through(self, a: Tensor) -> Tensor:
        """U a + b for inputs ``a (B, …)``, as states ``(B, n)``."""

    def injects_as(self, other: Side) -> bool:
        """Whether :meth:`through` is known to give the very same numbers as the other's."""
        return self is other

    @abstractmethod
    def leave(self, p: Tensor) -> Tensor:
        """What the layer shows of states; no distance grows."""

    def find(self, q: Tensor) -> Tensor:
        """The equilibrium at injections ``q (B, n)``, to solver tolerance."""
        if not len(q):
            return q
        problem = Problem(self.operator, q, self.activation)
        solver = PeacemanRachford()
        with torch.no_grad():
            return solve(solver, problem, tuned(solver, self.operator, self.activation, q), SOLVE_TOL, "bound").value

    @property
    def by_rows(self) -> bool:
        """Whether its guarantee is one of rows."""
        return not isinstance(self.operator.family, Euclidean)

    def inverse(self, r: Tensor) -> Tensor:
        """Bounds ``(B, n)`` on |z − z'| where |(W z + q) − (W z' + q')| <= ``r (B, n)`` entry by entry."""
        if self.by_rows:
            assert isinstance(self.operator, DenseOperator)
            return Comparison.of(self.operator).bound(r)
        length = verified.row_norms(r) / self.operator.margin() * SLACK
        return length[:, None].expand_as(r).clone()

    def spread(self, delta: Tensor) -> Tensor:
        """|W| δ for δ ``(B, n)`` >= 0, as a bound, storage included."""
        operator = self.operator
        assert isinstance(operator, DenseOperator)  # of the others none is certified by rows
        absolute = operator.once("absolute", lambda: operator.matrix64()[0].abs())
        stored = operator.representation_error * verified.row_norms(delta)
        return (delta @ absolute.mT * (1 + verified.gamma(len(absolute) + 4)) + stored[:, None]) * SLACK

    def rounding(self, w: Tensor, size_a: Tensor) -> Tensor:
        """Bound ``(B,)`` on the error of the computed W w + U a + b, and on what storage leaves open."""
        n = self.operator.terms + self.terms
        gamma = verified.gamma(n + 8)
        size_w = verified.row_norms(w)
        products = self.operator.absolute_norm() * size_w + self.spread_U * size_a + self.size_b
        stored = self.operator.representation_error * size_w + self.e_U * size_a + self.e_b
        return (gamma * products + stored + verified.TINY * (self.operator.features + n) ** 2) * SLACK


@final
@dataclass(frozen=True)
class DenseSide(Side):
    """A layer on vectors: U ``(n, d)``, b ``(n,)``."""

    U: Tensor
    b: Tensor

    @classmethod
    def of(cls, layer: EquilibriumLayer, operator: DenseOperator) -> DenseSide:
        """``operator``: the layer's proved one; the computations here use its exact matrix."""
        matrix, error = operator.matrix64()
        family, known = operator.family, dict(operator.shared_proofs())
        wide = DenseOperator(matrix, exact=(matrix, error), family=family, derived=known)
        assert isinstance(layer.injection, (nn.Linear, QuantizedLinear))
        U, b, e_U, e_b = affine64(layer.injection)
        norm, spread, size_b = verified.spectral_norm(U, e_U), verified.absolute_norm(U), float(b.norm()) * SLACK
        return cls(wide, layer.activation, norm, spread, size_b, e_U, e_b, U, b)

    @property
    def terms(self) -> int:
        return self.U.shape[1]

    def through(self, a: Tensor) -> Tensor:
        return a @ self.U.mT + self.b

    def injects_as(self, other: Side) -> bool:
        return isinstance(other, DenseSide) and torch.equal(self.U, other.U) and torch.equal(self.b, other.b)

    def leave(self, p: Tensor) -> Tensor:
        return p


@final
@dataclass(frozen=True)
class ImageSide(Side):
    """A layer on images, in float64: its states are images with borders, laid out as its operator wants them."""

    layer: MonotoneConvolution[Any]

    @classmethod
    def of(cls, layer: MonotoneConvolution[Any]) -> ImageSide:
        wide = copy.deepcopy(layer).to("cpu", torch.float64)
        weights = layer.recurrent
        if isinstance(weights, QuantizedTiers) and type(weights) in PROVED:
            operator = weights.operator(layer.geometry, torch.zeros(1, dtype=torch.float64))
        else:  # as the layer computes them, in its own dtype
            with torch.no_grad():
                kernels = copy.deepcopy(layer).operator.kernels.flat()
            operator = TierOperator(
                Kernels.of(tuple(k.detach().to("cpu", torch.float64) for k in kernels)), layer.geometry
            )
        U = wide.injection.weight.detach().abs().sum((2, 3))
        spread = verified.absolute_norm(U) * (1 + verified.gamma(wide.injection.weight[0].numel()))
        entries = math.prod(wide.geometry.sizes[0])
        bias = wide.injection.bias
        size_b = 0.0 if bias is None else float(bias.detach().norm()) * math.sqrt(entries) * SLACK
        sigma = wide._sigma(wide.injection.weight)
        return cls(operator, sigma, spread, spread, size_b, 0.0, 0.0, wide)

    @property
    def terms(self) -> int:
        return self.layer.injection.weight[0].numel()

    def through(self, a: Tensor) -> Tensor:
        q: Tensor = self.layer.injection(a)
        return self.layer._enter(q)

    def leave(self, p: Tensor) -> Tensor:
        return self.layer._leave(p, (0, 0))
