"""The same fixed number of steps in float32: a module of plain tensor operations, and what its rounding costs.

Unit roundoff u = 2^−24; a sum of k products, in any order, fused or not, is off by at most γ_k times that of the
absolute values (theory §10, §6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import verified
from ..errors import NotWellPosedError, OptionError
from ..layers.linear import affine64
from ..operators.quantized import CayleyWeight, StructuredWeight
from .boxes import Box
from .factored import FactoredMap
from .fixedpoint import SLACK
from .network import Network
from .plan import Iteration

__all__ = ["FixedSteps", "Floating", "plan_floating"]

UNIT = 2.0**-24
TINY = 2.0**-126 * 4
LARGEST = 2.0**126


def _gamma(k: int) -> float:
    return verified.gamma(k, UNIT)


class FixedSteps(nn.Module):
    """x ``(B, d)`` ↦ (scores ``(B, k)``, equilibrium ``(B, n)``), or the equilibrium alone, by ``steps`` steps.

    Only products, sums, absolute values and maxima: ``torch.export`` and compilers take it as it is.
    """

    def __init__(self, network: Network, steps: int, alpha: float) -> None:
        super().__init__()
        layer = network.layer
        self.steps, self.alpha = steps, alpha
        self.register_buffer("U", layer.input_weight.detach().float().clone())
        self.register_buffer("b", layer.bias.detach().float().clone())
        weights = layer.recurrent
        self.cayley = isinstance(weights, CayleyWeight)
        if isinstance(weights, CayleyWeight):
            self.register_buffer("C", weights.C.dequantize(torch.float32))
        else:
            assert isinstance(weights, StructuredWeight)
            self.register_buffer("A", weights.A.dequantize(torch.float32))
            self.register_buffer("K", weights.K.dequantize(torch.float32))
            self.keep = 1 - alpha * float(weights.margin)
        self.has_head = network.head is not None
        if network.head is not None:
            V, c, _, _ = affine64(network.head)
            self.register_buffer("V", V.float())
            self.register_buffer("c", c.float())

    U: Tensor
    b: Tensor
    C: Tensor
    A: Tensor
    K: Tensor
    V: Tensor
    c: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        q = x @ self.U.T + self.b
        z = self._cayley(q) if self.cayley else self._factored(q)
        return (z @ self.V.T + self.c, z) if self.has_head else z

    def _cayley(self, q: Tensor) -> Tensor:
        c = (q @ self.C.T + q) * self.alpha
        u = c
        for _ in range(self.steps):
            u = u.abs() @ self.C.T + c
        return u.relu()

    def _factored(self, q: Tensor) -> Tensor:
        p = q * self.alpha
        z = p.relu()
        for _ in range(self.steps):
            moved = z @ self.K.T - (z @ self.A.T) @ self.A
            z = (z * self.keep + moved * self.alpha + p).relu()
        return z


@dataclass(frozen=True, eq=False)
class Floating:
    """The step α, the exact U and b, and what is proved of the iteration in float32."""

    alpha: float
    U: Tensor
    b: Tensor
    iteration: Iteration

    def head_errors(self, V: Tensor, c: Tensor) -> Tensor:
        """Upper bounds (k,) of what computing ``V z + c`` loses."""
        size = self.iteration.iterate_norm
        return _gamma(V.shape[1] + 6) * (verified.row_norms(V) * size + c.abs()) * SLACK + (
            TINY * V.shape[1] * (1 + size)
        )


def plan_floating(network: Network, box: Box) -> Floating:
    """The map of the codes, iterated in float32 on every input of the box.

    Raises:
        NotWellPosedError: a step that is not proved to contract.
        OptionError: weights or inputs so large that float32 rounding outweighs the contraction.
    """
    U, b, e_U, e_b = affine64(network.layer.injection)  # type: ignore[arg-type]  # its two kinds
    reach = _norm(box.center.abs() + box.half)
    q = box.norm(U, b, e_U) + e_b
    # e_U, e_b bound what the cast to the layer's own dtype lost; below float32 there is one more rounding
    sums = (verified.absolute_norm(U) * reach + _norm(b)) * SLACK
    q_error = _gamma(U.shape[1] + 6) * sums + e_U * reach + e_b + TINY * (1 + reach) * U.shape[1] * len(b)
    weights = network.layer.recurrent
    if isinstance(weights, CayleyWeight):
        alpha, C = float(weights.alpha), weights.C.dequantize()
        spread = verified.absolute_norm(C)
        rho = verified.spectral_norm(C, verified.UNIT * spread)
        terms, gain, widest = len(C) + 8, spread, 1 + spread
        start = alpha * (1 + rho) * q
        start_error = alpha * ((1 + rho) * q_error + _gamma(terms) * (1 + spread) * (q + q_error)) * SLACK
    else:
        assert isinstance(weights, StructuredWeight)
        on = FactoredMap.of(weights)
        alpha, rho = on.alpha, on.rho
        A, K = verified.absolute_norm(weights.A.dequantize()), verified.absolute_norm(weights.K.dequantize())
        terms, gain = len(weights.K.dequantize()) + weights.A.shape[0] + 16, 1 + alpha * (A**2 + K)
        widest = (1 + alpha) * (1 + A + A**2 + K)
        start = alpha * q
        start_error = alpha * (q_error + _gamma(4) * (q + q_error)) * SLACK
    if rho >= 1:
        raise NotWellPosedError(f"the steps are not proved to contract (factor {rho:.9g}); use more bits", 0.0)
    norm, error = _settled(rho, gain, start * SLACK, start_error, _gamma(terms), TINY * terms * len(b))
    _check_overflow(network, reach, (1 + alpha) * (sums + q_error), verified.absolute_norm(U), widest, norm)
    return Floating(alpha, U, b, Iteration(rho, error, norm, (start + start_error) / (1 - rho) * SLACK, 1, False))


def _check_overflow(network: Network, reach: float, start: float, injection: float, widest: float, norm: float) -> None:
    """Whether every number on the way is a float32: inputs, weights, and all sums of absolute values."""
    largest = max(reach, injection, start * widest, widest * (norm + start))
    if network.head is not None:
        V, c, _, _ = affine64(network.head)
        largest = max(largest, verified.absolute_norm(V) * (1 + norm) + _norm(c))
    if not largest < LARGEST:
        raise OptionError(
            f"numbers of up to {largest:.3g} may occur, more than float32 is proved to hold; narrow the input range or "
            "scale the network"
        )


def _settled(
    rho: float, gain: float, start: float, start_error: float, gamma: float, tiny: float
) -> tuple[float, float]:
    """(V, ε): all iterates have norm at most V, and each step errs by at most ε, for V satisfies its own bound."""
    norm = (start + start_error) / (1 - rho) * 1.001
    for _ in range(60):
        error = (gamma * (gain * norm + start + start_error) + start_error + tiny) * SLACK
        needed = (start + error) / (1 - rho) * SLACK
        if needed <= norm:
            return norm, error
        norm = needed * 1.01
        if not math.isfinite(norm):
            break
    raise OptionError("float32 rounding outweighs the contraction of the steps; use more bits or a smaller input range")


def _norm(v: Tensor) -> float:
    return float(verified.row_norms(v[None])[0])
