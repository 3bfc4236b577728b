"""Classes that no perturbation of the input changes: proved over boxes, and within a radius (theory §7)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from .. import verified
from ..errors import InputError, OptionError, StructureError
from ..layers.chain import chain, equilibrium_layers, final_head
from ..layers.equilibrium import EquilibriumLayer
from ..layers.linear import QuantizedLinear, affine64
from ..norms import Euclidean
from . import displacement as moved
from .boxes import Box, affine_box, as_box, check_widths, module_box, outward
from .rows import SLACK, Comparison
from .sides import DenseSide
from .wellposed import euclidean_lipschitz, fresh_operator

__all__ = ["Radius", "certified_classes", "certified_radius", "input_lipschitz", "reach_of_inputs"]

Radius = Literal["linf", "l2"]
NONE = -1
"""The class of an input of which none is proved."""

CHUNK = 1000
"""Inputs worked on at a time."""


@torch.no_grad()
def certified_classes(model: nn.Module, low: Tensor, high: Tensor) -> Tensor:
    """The class ``(B,)`` that ``model`` provably gives every x with ``low`` <= x <= ``high`` ``(B, d)``; −1 where
    none is proved.

    The state's box goes through the differences V_i − V_j of the linear head that ends the model, so that class i is
    proved where every score difference stays above 0 over the whole box (theory §7).

    Raises:
        StructureError: the model does not end in one linear head.
        InputError, NotWellPosedError: as :func:`equipoise.interval`.
    """
    head = _head(model)
    check_widths(model, low)
    found = []
    for begin in range(0, max(len(low), 1), CHUNK):
        box = as_box(low[begin : begin + CHUNK], high[begin : begin + CHUNK])
        for name, module in chain(model):
            box = box if name == head[0] else module_box(module, box)
        found.append(_winner(head[1], box))
    return torch.cat(found)


def _head(model: nn.Module) -> tuple[str, nn.Linear | QuantizedLinear]:
    name = final_head(model)
    module = None if name is None else model.get_submodule(name)
    if name is None or not isinstance(module, (nn.Linear, QuantizedLinear)):
        raise StructureError("classes are proved of a model that ends in one linear module; this one does not")
    return name, module


def _winner(head: nn.Linear | QuantizedLinear, box: Box) -> Tensor:
    V, c, e_V, e_c = affine64(head)
    known = torch.isfinite(box.low + box.high).all(1)
    center = ((box.low + box.high) / 2).where(known[:, None], 0.0)
    top = (center @ V.mT + c).argmax(1)
    won = torch.zeros(len(center), dtype=torch.bool)
    for i in top.unique().tolist():
        rows = (top == i) & known
        D, gap = V[i] - V, c[i] - c
        rounded = verified.UNIT * float(verified.row_norms(D).max()), verified.UNIT * float(gap.abs().max())
        low = affine_box(D, gap, Box(box.low[rows], box.high[rows]), 2 * e_V + rounded[0], 2 * e_c + rounded[1]).low
        low[:, i] = math.inf
        won[rows] = (low > 0).all(1)
    return torch.where(won, top, NONE)


def reach_of_inputs(model: nn.Module) -> Tensor:
    """Proved bounds ``(k,)`` on how far each entry of the final state (before the linear head, or of the output where
    there is none) can move while ‖x − x'‖_∞ <= 1.

    Entry by entry: a linear module carries r to |W| r, an equilibrium layer to (I − M)⁻¹ |U| r (theory §7), of a
    Euclidean layer without such a proof ‖ |U| r ‖₂/m; activations without weights leave r. Infinite where nothing is
    proved, and where there is a torch softplus: it jumps at its threshold.
    """
    return _reach(model, final_head(model))


def _reach(model: nn.Module, stop: str | None) -> Tensor:
    r: Tensor | None = None
    for name, module in chain(model):
        if name == stop and stop is not None:
            break
        if isinstance(module, nn.Softplus):  # it jumps: see softplus_fall
            return torch.tensor([math.inf], dtype=torch.float64)
        if isinstance(module, EquilibriumLayer):
            assert isinstance(module.injection, (nn.Linear, QuantizedLinear))
            r = _through_layer(module, _through_linear(module.injection, r))
        elif isinstance(module, (nn.Linear, QuantizedLinear)):
            r = _through_linear(module, r)
    assert r is not None
    return r


def _through_linear(linear: nn.Linear | QuantizedLinear, r: Tensor | None) -> Tensor:
    W, _, e_W, _ = affine64(linear)
    r = torch.ones(W.shape[1], dtype=torch.float64) if r is None else r
    if not bool(torch.isfinite(r).all()):
        return torch.full((len(W),), math.inf, dtype=torch.float64)
    stored = e_W * float(verified.row_norms(r[None]))
    return (W.abs() @ r * (1 + verified.gamma(len(r) + 4)) + stored + verified.TINY * (len(r) + 1)) * SLACK


def _through_layer(layer: EquilibriumLayer, q: Tensor) -> Tensor:
    operator = fresh_operator(layer)
    if not bool(torch.isfinite(q).all()):
        return q
    bound = Comparison.of(operator).bound(q[None])[0]
    if isinstance(operator.family, Euclidean) and operator.margin() > 0:
        length = verified.up(float(verified.row_norms(q[None])) / operator.margin()) * SLACK
        bound = bound.clamp_max(length)
    return bound


def input_lipschitz(model: nn.Module, norm: Radius | None = None) -> float | None:
    """A proved bound of ‖f(x) − f(x')‖/‖x − x'‖ for the whole model, of x ↦ z for a layer.

    ``norm`` "l2": ‖U‖₂/m per equilibrium layer (theory §1 [PWK21]). "linf": entry by entry,
    max_k (|V| (I − M)⁻¹ |U| 1)_k for a NEMON layer between linear ones, never above max_i u_i/(1 − μ_i) in any weights
    (theory §7 [JDPB21]). Default: that of the model's layers, "l2" if all are Euclidean. None where nothing is proved.

    Raises:
        OptionError: another norm.
        StructureError: an unsupported module, or no equilibrium layer.
    """
    layers = equilibrium_layers(model)
    if norm not in (None, "linf", "l2"):
        raise OptionError(f"norm is {norm!r}; give 'linf' or 'l2'")
    euclidean = all(isinstance(fresh_operator(layer).family, Euclidean) for _, layer in layers)
    if norm == "l2" or (norm is None and euclidean):
        return euclidean_lipschitz(model)
    largest = float(_reach(model, None).max())
    return largest if math.isfinite(largest) else None


@torch.no_grad()
def certified_radius(model: nn.Module, x: Tensor, norm: Radius = "linf") -> Tensor:
    """Proved radii ``(B,)``: no x' with ‖x' − x‖ below it gets another class than x ``(B, d)``; 0 where none.

    From the Lipschitz bound: the score differences at x, divided by what a unit of perturbation can move them
    (theory §7).
    ``"linf"`` by :func:`reach_of_inputs`, ``"l2"`` by ‖U‖₂/m of Euclidean layers. Radii are in the units of x. Of a
    model with a torch softplus, which jumps at its threshold, they are 0; :func:`equipoise.interval` takes those.

    Raises:
        OptionError: another norm.
        StructureError: the model does not end in one linear head; "l2" with a layer that is proved in a maximum norm.
    """
    if norm not in ("linf", "l2"):
        raise OptionError(f"norm is {norm!r}; give 'linf' or 'l2'")
    if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point() or not bool(torch.isfinite(x).all()):
        raise InputError("x is no finite floating-point tensor (batch, features)")
    name, head = _head(model)
    check_widths(model, x)
    reach, length = _sensitivity(model, name, norm)
    radii = [_radius(model, name, head, part, reach, length) for part in x.split(4 * CHUNK)]
    return torch.cat(radii) if radii else x.new_zeros(0, dtype=torch.float64)


def _sensitivity(model: nn.Module, head: str, norm: Radius) -> tuple[Tensor | None, float]:
    """Either how far each entry of the state can move, or the whole state in the 2-norm, per unit of input."""
    if norm == "linf":
        return _reach(model, head), math.inf
    bound = 1.0
    for name, module in chain(model):
        if name == head:
            break
        if isinstance(module, EquilibriumLayer):
            operator = fresh_operator(module)
            if not isinstance(operator.family, Euclidean):
                raise StructureError(
                    "an l2 radius comes from a Euclidean margin; this layer is proved in a maximum norm: ask for 'linf'"
                )
            bound = bound / operator.margin() * SLACK if operator.margin() > 0 else math.inf
            module = module.injection
        if isinstance(module, (nn.Linear, QuantizedLinear)):
            W, _, e_W, _ = affine64(module)
            bound = verified.up(bound * verified.spectral_norm(W, e_W))
        elif isinstance(module, nn.Softplus):
            bound = math.inf
    return None, bound


def _radius(
    model: nn.Module, name: str, head: nn.Linear | QuantizedLinear, x: Tensor, reach: Tensor | None, length: float
) -> Tensor:
    trace = moved.start(x.detach().to("cpu", torch.float64))
    for at, module in chain(model):
        if at == name:
            break
        if isinstance(module, EquilibriumLayer):
            operator = fresh_operator(module)
            if operator.margin() <= 0:
                return torch.zeros(len(x), dtype=torch.float64)
            side = DenseSide.of(module, operator)
            trace = moved.equilibrium_trace(side, side, trace, {}, at)
        elif isinstance(module, (nn.Linear, QuantizedLinear)):
            trace = moved.linear_trace(module, module, trace)
        else:
            trace = moved.lipschitz_one_trace(module, trace)
    V, c, e_V, e_c = affine64(head)
    p = trace.quantized
    slip = trace.error_q[:, None].expand_as(p) if trace.entries is None else trace.entries.error_q
    scores = p @ V.mT + c
    top = scores.argmax(1)
    radius = torch.full((len(p),), math.inf, dtype=torch.float64)
    for i in top.unique().tolist():
        rows = top == i
        D, gap = V[i] - V, c[i] - c
        known = outward(p[rows], p[rows], slip[rows], slip[rows])
        lost = verified.UNIT * float(verified.row_norms(D).max()), verified.UNIT * float(gap.abs().max())
        sure = affine_box(D, gap, known, 2 * e_V + lost[0], 2 * e_c + lost[1]).low.clamp_min(0.0)
        if reach is not None:
            spread = D.abs() @ reach if bool(torch.isfinite(reach).all()) else torch.full((len(D),), math.inf).double()
            spread = spread + 2 * e_V * (reach.norm() if bool(torch.isfinite(reach).all()) else math.inf)
        else:
            spread = (verified.row_norms(D) + 2 * e_V) * length
        moves = spread * (1 + verified.gamma(len(p[0]) + 8)) * SLACK + verified.TINY
        share = sure / moves / SLACK
        share[:, i] = math.inf
        radius[rows] = share.nan_to_num(0.0).amin(1)
    return radius
