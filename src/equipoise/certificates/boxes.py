"""Proved enclosures of what a network computes over a box of inputs (theory §7, [D22]).

Everything is float64 on the CPU, every rounding counted. An equilibrium layer's box is found by iteration and then
proved by inflating and checking it: with u = (−lo, hi), 𝕎, σ̂ as in :mod:`equipoise.layers.box`,

    σ̂(𝕎 u + q̂) ≤ u    entry by entry

says that the averaged iteration with a step of at most α* maps the box into itself for every injection in
[q_lo, q_hi]; since it contracts, the equilibrium lies in the box.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from .. import verified
from ..errors import InputError, NotWellPosedError
from ..layers.arguments import check_finite
from ..layers.box import box_equilibrium, doubled
from ..layers.chain import chain
from ..layers.equilibrium import EquilibriumLayer
from ..layers.linear import QuantizedLinear, affine64
from ..linearized import Mirrored
from ..norms import WeightedMax, best_family
from ..operators import DenseOperator
from .displacement import evaluated, softplus_fall
from .rows import SLACK, Comparison
from .wellposed import fresh_operator

__all__ = [
    "Box", "affine_box", "as_box", "check_widths", "interval", "linear_box", "module_box", "outward", "state_box",
]  # fmt: skip

ATTEMPTS = 6
"""Times that a box is inflated before it is given up."""

WIDEST = 1e150
"""Inflating a box by more than that is giving it up: squares overflow."""


@final
@dataclass(frozen=True, eq=False)
class Box:
    """Every point x with ``low`` <= x <= ``high``, entry by entry; both ``(B, n)``, float64.

    Raises :class:`InputError` for NaN, different shapes, or an entry with low > high.
    """

    low: Tensor
    high: Tensor

    def __post_init__(self) -> None:
        low, high = self.low, self.high
        if low.shape != high.shape or low.ndim != 2:
            raise InputError(
                f"a box needs low and high of one shape (B, n), not {tuple(low.shape)}, {tuple(high.shape)}"
            )
        if bool((torch.isnan(low) | torch.isnan(high)).any()):
            raise InputError("a box has NaN bounds; clean the input first")
        if bad := int((low > high).sum()):
            raise InputError(f"a box has low > high in {bad} of {low.numel()} entries; swap them, or give eps >= 0")

    def contains(self, x: Tensor) -> Tensor:
        """Which rows ``(B,)`` of ``x (B, n)`` lie in it."""
        x = x.to(self.low)
        return ((self.low <= x) & (x <= self.high)).all(1)


@torch.no_grad()
def interval(model: nn.Module, low: Tensor, high: Tensor) -> Box:
    """A proved enclosure of ``model``'s exact outputs over every input x with ``low`` <= x <= ``high`` ``(B, d)``.

    ``model``: a layer or a chain of known modules, float or quantized. Boxes pass linear modules by centre and
    radius, activations by monotonicity, equilibrium layers by the mixed-monotone system (theory §7). A layer that is
    not in a maximum-norm family is taken in the one of its Perron vector. A box that could not be proved is infinite.

    Raises:
        InputError: a box with low > high, NaN or infinite entries, another shape.
        NotWellPosedError: an equilibrium layer without a proved measure below 1 (says the abscissa found).
        StructureError: an unsupported module.
    """
    check_widths(model, low)
    box = as_box(low, high)
    for _, module in chain(model):
        box = module_box(module, box)
    return box


def check_widths(model: nn.Module, x: Tensor) -> None:
    """Raise :class:`InputError` unless ``x`` is a ``(B, d)`` as ``model`` takes it, and the model one in which proofs
    are known."""
    if not isinstance(x, Tensor) or x.ndim != 2:
        raise InputError("boxes and radii are of inputs (batch, features)")
    width = x.shape[1]
    for name, module in chain(model):
        if isinstance(module, EquilibriumLayer):
            takes, gives = module.in_features, module.features
            if module.bias.dtype not in (torch.float32, torch.float64):
                raise InputError(f"layer {name!r} is {module.bias.dtype}; float32 or float64 is needed: model.float()")
        elif isinstance(module, (nn.Linear, QuantizedLinear)):
            takes, gives = module.in_features, module.out_features
        else:
            continue
        if takes != width:
            raise InputError(f"module {name!r} takes (batch, {takes}); it is given (batch, {width})")
        width = gives


def as_box(low: Tensor, high: Tensor) -> Box:
    """A checked box of finite float64 numbers."""
    for name, tensor in (("low", low), ("high", high)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise InputError(f"{name} is no floating-point tensor (B, d)")
        check_finite(tensor, name)
    return Box(*(t.detach().to("cpu", torch.float64) for t in (low, high)))


def module_box(module: nn.Module, box: Box) -> Box:
    """The box after one module of a chain."""
    if isinstance(module, EquilibriumLayer):
        assert isinstance(module.injection, (nn.Linear, QuantizedLinear))
        return state_box(module, linear_box(module.injection, box))
    if isinstance(module, (nn.Linear, QuantizedLinear)):
        return linear_box(module, box)
    if isinstance(module, (nn.Flatten, nn.Identity, nn.Dropout)):
        return Box(evaluated(module, box.low), evaluated(module, box.high))
    low, high = evaluated(module, box.low), evaluated(module, box.high)
    ulps = 2048 if isinstance(module, nn.Softplus) else 16
    slips = [ulps * verified.UNIT * t.abs() + verified.TINY * 64 + softplus_fall(module) for t in (low, high)]
    return outward(low, high, *slips)


def outward(low: Tensor, high: Tensor, below: Tensor, above: Tensor) -> Box:
    """The box with its ends moved outwards by at least so much; unknown ends are infinite."""
    # a sum that overflowed may stand for any number
    lo = (low - below * SLACK).where(low < math.inf, -math.inf).nan_to_num(-math.inf)
    hi = (high + above * SLACK).where(high > -math.inf, math.inf).nan_to_num(math.inf)
    infinity = torch.full_like(lo, math.inf)
    return Box(torch.nextafter(torch.minimum(lo, hi), -infinity), torch.nextafter(torch.maximum(lo, hi), infinity))


def linear_box(linear: nn.Linear | QuantizedLinear, box: Box) -> Box:
    """W x + b over a box: W c + b ± |W| r, where stored and multiplied weights may differ by what is bounded."""
    W, b, e_W, e_b = affine64(linear)
    return affine_box(W, b, box, e_W, e_b)


def affine_box(W: Tensor, b: Tensor, box: Box, e_W: float = 0.0, e_b: float = 0.0) -> Box:
    """The same of given W ``(m, n)``, b ``(m,)``; infinite inputs give infinite outputs."""
    if not bool(torch.isfinite(box.low + box.high).all()):
        good = torch.isfinite(box.low + box.high).all(1)
        found = affine_box(W, b, Box(box.low.where(good[:, None], 0.0), box.high.where(good[:, None], 0.0)), e_W, e_b)
        low, high = found.low.where(good[:, None], -math.inf), found.high.where(good[:, None], math.inf)
        return Box(low, high)
    gamma = verified.gamma(W.shape[1] + 8)
    center = (box.low + box.high) / 2
    # whatever the centre was rounded to, the radius reaches both ends
    radius = torch.maximum(box.high - center, center - box.low) * (1 + 4 * verified.UNIT) + verified.TINY
    size = center.abs() + radius
    spread = (radius + 2 * gamma * size) @ W.abs().mT * (1 + 2 * gamma)
    spread = spread + gamma * b.abs() + verified.TINY * 8 * (W.shape[1] + 1) * (1 + float(W.abs().sum()))
    spread = spread + (e_W * verified.row_norms(size) + e_b)[:, None]
    middle = center @ W.mT + b
    return outward(middle, middle, spread, spread)


def state_box(layer: EquilibriumLayer, q: Box) -> Box:
    """The equilibria over a box of injections: found to a few digits, then inflated until the check passes."""
    operator = fresh_operator(layer)
    W, error = operator.matrix64()
    family = _family_of(operator)
    own = operator.family is family
    comparison = Comparison(W, error, family, operator.row_margins() if own else family.row_margins(W, error))
    finite = torch.isfinite(q.low + q.high).all(1)
    low, high = (t.where(finite[:, None], 0.0) for t in (q.low, q.high))
    like = operator.weight
    lo, hi = box_equilibrium(layer, low.to(like), high.to(like), 1e-5, family, report=False)
    u = torch.cat((-lo, hi), 1).detach().to("cpu", torch.float64)
    finite &= torch.isfinite(u).all(1)
    u = u.where(finite[:, None], 0.0)
    check = _Check(W, error, Mirrored(layer.activation), torch.cat((-low, high), 1))
    above = check.above(u) - u  # what the box lacks of mapping into itself
    lack = torch.maximum(*above.clamp_min(0.0).chunk(2, 1)) + check.rounding(u)[:, None]
    step = comparison.bound(lack * (1 + 1e-6))
    finite &= (step < WIDEST).all(1)
    step = step.where(finite[:, None], 0.0)
    proved = torch.zeros(len(u), dtype=torch.bool)
    for attempt in range(ATTEMPTS):
        wider = u + torch.cat((step, step), 1) * 2.0**attempt
        proved = finite & (check.above(wider) <= wider).all(1)
        if bool((proved | ~finite).all()):
            break
    wide_lo, wide_hi = wider.chunk(2, 1)
    unknown = ~proved[:, None]
    return Box((-wide_lo).masked_fill(unknown, -math.inf), wide_hi.masked_fill(unknown, math.inf))


def _family_of(operator: DenseOperator) -> WeightedMax:
    if isinstance(operator.family, WeightedMax) and operator.margin() > 0:
        return operator.family
    W, error = operator.matrix64()
    family, abscissa = best_family(W, error)
    margin = family.margin(W, error)
    if margin <= 0:
        raise NotWellPosedError(
            f"a layer has no weighted maximum norm in which it is proved to contract (the spectral abscissa of its "
            f"Metzler majorant is about {abscissa:.6g}, below 1 is needed): no box can be proved. Use a NEMON layer, "
            "or the bound from its Euclidean margin",
            margin,
        )
    return family


class _Check:
    """σ̂(𝕎 u + q̂) rounded upwards, for the stored W and every one whose rows lie within 2-norm ``error`` of it."""

    def __init__(self, W: Tensor, error: float, activation: Mirrored, q: Tensor) -> None:
        self.matrix, self.error, self.activation, self.q = doubled(W), error, activation, q
        self.gamma = verified.gamma(2 * len(W) + 8)
        self.size = verified.absolute_norm(self.matrix)

    def rounding(self, u: Tensor) -> Tensor:
        """Bounds ``(B,)`` on the error of every entry of 𝕎 u + q̂."""
        length = verified.row_norms(u)
        products = self.gamma * (self.size * length + verified.row_norms(self.q)) + self.error * length * 2
        return (products + verified.TINY * 64 * (len(self.matrix) + 1) ** 2 * (1 + self.size)) * SLACK

    def above(self, u: Tensor) -> Tensor:
        """An upper bound of σ̂(𝕎 u + q̂), entry by entry."""
        v = u @ self.matrix.mT + self.q + self.rounding(u)[:, None] * (1 + 4 * verified.UNIT)
        v = torch.nextafter(v, torch.full_like(v, math.inf))
        p = self.activation(v)
        slip = self.activation.evaluation_error(p)
        return torch.nextafter(p + (slip if isinstance(slip, Tensor) else 0.0) * SLACK, torch.full_like(p, math.inf))
