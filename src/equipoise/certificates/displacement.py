"""How far quantization moves an equilibrium, per input, and which predictions it cannot change (T3, theory §5).

Everything is float64 on the CPU. For any w let p = σ(W̃ w + q̃); monotonicity of the float network gives
‖p − z*‖ ≤ ‖(W̃ w + q̃) − (W p + q)‖/m, and that of the quantized one ‖p − z̃*‖ ≤ ‖W̃ (w − p)‖/m̃; together the primal
side of T3 with the solver's error counted. The dual side swaps the networks. The smaller is reported. In a
chain of modules the bounds of one layer are the input perturbations of the next.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import verified
from ..errors import InputError
from ..layers.linear import QuantizedLinear, affine64
from .sides import SLACK, Side

__all__ = [
    "Trace",
    "agreement",
    "equilibrium_trace",
    "evaluated",
    "is_plain",
    "linear_trace",
    "lipschitz_one_trace",
    "pool_trace",
    "scores",
    "settled",
]


class Inputs:
    """The inputs ``a (B, d)`` of a layer, with their norms and what each side makes of them, computed once."""

    def __init__(self, a: Tensor) -> None:
        self.a, self.size = a, verified.row_norms(a.flatten(1))
        self._injected: list[tuple[Side, Tensor]] = []

    def through(self, side: Side) -> Tensor:
        """U a + b; of two sides with the same U and b, as of weights whose W alone is quantized, it is the same."""
        for other, found in self._injected:
            if side is other or side.injects_as(other):
                return found
        self._injected.append((side, side.through(self.a)))
        return self._injected[-1][1]


class Trace(NamedTuple):
    """Both networks' computed points after a module, and bounds ``(B,)`` in the 2-norm.

    ``error_q`` >= ‖quantized − exact quantized‖, ``error_r`` likewise for the reference,
    ``displacement`` >= ‖exact quantized − exact reference‖, ``to_reference`` >= ‖quantized − exact reference‖.
    """

    quantized: Tensor
    reference: Tensor
    error_q: Tensor
    error_r: Tensor
    displacement: Tensor
    to_reference: Tensor
    entries: Entries | None = None


class Entries(NamedTuple):
    """The same bounds entry by entry, ``(B, n)`` each, after a layer whose guarantee is one of rows."""

    error_q: Tensor
    error_r: Tensor
    displacement: Tensor
    to_reference: Tensor


def start(x: Tensor) -> Trace:
    """Both networks see the same exact inputs ``x (B, d)``."""
    none = x.new_zeros(len(x))
    return Trace(x, x, none, none, none, none)


def _cross(here: Side, there: Side, w: Tensor, a: Inputs, doubt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(p, ‖p − here's z*‖ bound, ‖p − there's z*‖ bound) for p = σ_here(W w + U a + b).

    ``a`` is here's computed input; ``doubt (B, 2)`` bounds its distance to here's and there's exact inputs.
    """
    v = here.operator.summed(w) + a.through(here)
    if not bool(torch.isfinite(v).all()):
        raise InputError("W z + U x + b overflows float64 for some inputs; scale the inputs or the weights down")
    p = here.activation(v)
    evaluation = here.activation.evaluation_error(p)
    delta = verified.row_norms(evaluation) * SLACK if isinstance(evaluation, Tensor) else p.new_zeros(len(p))
    r = here.rounding(w, a.size)
    m_here, m_there = here.operator.margin(), there.operator.margin()

    # the same network: W (w − p), with p's own evaluation error
    gap = w - p
    own = verified.row_norms(here.operator.summed(gap)) + here.rounding(gap, torch.zeros_like(a.size))
    own = own + verified.UNIT * here.operator.norm() * verified.row_norms(gap)
    own = own + r + here.norm_U * doubt[:, 0] + here.operator.norm() * delta
    # the other network: v − (W' p + U' a + b'), for v as it was computed
    moved = v - (there.operator.summed(p) + a.through(there))
    other = verified.row_norms(moved) * SLACK + there.rounding(p, a.size)
    other = other + there.norm_U * doubt[:, 1] + there.operator.norm() * delta
    return p, (own / m_here + delta) * SLACK, (other / m_there + delta) * SLACK


def _cross_rows(here: Side, there: Side, w: Tensor, a: Inputs, doubt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_cross` with bounds ``(B, n)`` entry by entry."""
    v = here.operator.summed(w) + a.through(here)
    if not bool(torch.isfinite(v).all()):
        raise InputError("W z + U x + b overflows float64 for some inputs; scale the inputs or the weights down")
    p = here.activation(v)
    evaluation = here.activation.evaluation_error(p)
    delta = evaluation * SLACK if isinstance(evaluation, Tensor) else torch.zeros_like(p)
    gap = w - p
    none = torch.zeros_like(a.size)
    slips = here.rounding(gap, none) + here.rounding(w, a.size) + here.norm_U * doubt[:, 0]
    slips = slips + verified.UNIT * here.operator.absolute_norm() * verified.row_norms(gap)
    own = here.operator.summed(gap).abs() + slips[:, None] + here.spread(delta)
    moved = (v - (there.operator.summed(p) + a.through(there))).abs() * SLACK
    other = there.rounding(p, a.size) + there.norm_U * doubt[:, 1]
    moved = moved + other[:, None] + there.spread(delta)
    return p, (here.inverse(own * SLACK) + delta) * SLACK, (there.inverse(moved * SLACK) + delta) * SLACK


def equilibrium_trace(quantized: Side, reference: Side, before: Trace, known: dict[str, Tensor], key: str) -> Trace:
    """Through one equilibrium layer; both margins must be proved positive.

    ``known`` keeps the reference's equilibria under ``key``: they do not depend on the quantized network.
    """
    a_q = Inputs(before.quantized)
    a_r = a_q if before.reference is before.quantized else Inputs(before.reference)
    if key not in known:
        known[key] = reference.find(a_r.through(reference))
    at_q = torch.stack((before.error_q, before.to_reference), 1)
    at_r = torch.stack((before.error_r, before.displacement + before.error_r), 1)
    if quantized.by_rows or reference.by_rows:
        return _trace_rows(
            _cross_rows(quantized, reference, quantized.find(a_q.through(quantized)), a_q, at_q),
            _cross_rows(reference, quantized, known[key], a_r, at_r),
        )
    p, own_q, to_r = _cross(quantized, reference, quantized.find(a_q.through(quantized)), a_q, at_q)
    p_r, own_r, to_q = _cross(reference, quantized, known[key], a_r, at_r)
    displacement = torch.minimum(to_r + own_q, to_q + own_r) * SLACK
    shown = quantized.leave(p), reference.leave(p_r)
    return Trace(*shown, own_q, own_r, displacement, torch.minimum(to_r, (displacement + own_q) * SLACK))


def _trace_rows(from_q: tuple[Tensor, Tensor, Tensor], from_r: tuple[Tensor, Tensor, Tensor]) -> Trace:
    (p, own_q, to_r), (p_r, own_r, to_q) = from_q, from_r
    displacement = torch.minimum(to_r + own_q, to_q + own_r) * SLACK
    entries = Entries(own_q, own_r, displacement, torch.minimum(to_r, (displacement + own_q) * SLACK))
    error_q, error_r = verified.row_norms(own_q), verified.row_norms(own_r)
    return Trace(
        p, p_r, error_q, error_r, verified.row_norms(displacement), verified.row_norms(entries.to_reference), entries
    )


def is_plain(pool: nn.AvgPool2d) -> bool:
    """Whether it takes means over k × k pixels that do not overlap, and nothing else."""
    options = (pool.padding, pool.ceil_mode, pool.divisor_override)
    return isinstance(pool.kernel_size, int) and pool.stride == pool.kernel_size and options == (0, False, None)


def pool_trace(module: nn.AvgPool2d, before: Trace) -> Trace:
    """Through means over k × k pixels that do not overlap: a linear map of norm 1/k."""
    k = int(module.kernel_size)  # type: ignore[arg-type]
    outs = evaluated(module, before.quantized), evaluated(module, before.reference)
    gamma = verified.gamma(k * k + 4)
    slip_q, slip_r = (
        gamma * verified.row_norms(a.flatten(1)) / k + verified.TINY * (out[:1].numel() + 1)
        for a, out in zip((before.quantized, before.reference), outs, strict=True)
    )
    return Trace(
        *outs,
        (before.error_q / k + slip_q) * SLACK,
        (before.error_r / k + slip_r) * SLACK,
        before.displacement / k * SLACK,
        (before.to_reference / k + slip_q) * SLACK,
    )


def linear_trace(
    quantized: nn.Linear | QuantizedLinear, reference: nn.Linear | QuantizedLinear, before: Trace
) -> Trace:
    """Through a linear module on both sides."""
    (V, c, e_V, e_c), (R, s, e_R, e_s) = affine64(quantized), affine64(reference)
    out_q, out_r = before.quantized @ V.mT + c, before.reference @ R.mT + s
    size_q, size_r = verified.row_norms(before.quantized), verified.row_norms(before.reference)
    gamma = verified.gamma(V.shape[1] + 8)
    lost = verified.TINY * 4 * (V.numel() + 1)  # what underflow can cost
    round_q = gamma * (verified.absolute_norm(V) * size_q + float(c.norm())) + e_V * size_q + e_c + lost
    round_r = gamma * (verified.absolute_norm(R) * size_r + float(s.norm())) + e_R * size_r + e_s + lost
    norm_V, norm_R = verified.spectral_norm(V, e_V), verified.spectral_norm(R, e_R)
    # (V a_q + c) − (R a_r + s) = R (a_q − a_r) + (V − R) a_q + (c − s), a_q the computed point
    change = verified.row_norms(before.quantized @ (V - R).mT + (c - s)) + 2 * (round_q + round_r)
    change = change + gamma * verified.absolute_norm(R) * size_q + e_R * size_q
    to_reference = (norm_R * before.to_reference + change + round_q) * SLACK
    error_q = (norm_V * before.error_q + round_q) * SLACK
    # exact against exact: the exact a_q is within error_q of the computed one
    delta_norm = verified.spectral_norm(V - R, e_V + e_R) * SLACK
    displacement = (norm_R * before.displacement + change + delta_norm * before.error_q) * SLACK
    return Trace(out_q, out_r, error_q, (norm_R * before.error_r + round_r) * SLACK, displacement, to_reference)


def evaluated(module: nn.Module, a: Tensor) -> Tensor:
    """The module's output in evaluation, whatever its mode: dropout passes, nothing is written into ``a``."""
    return a if isinstance(module, nn.Dropout) else module(a.clone())


def softplus_fall(module: nn.Module) -> float:
    """How far an entry of the output falls where torch's softplus turns into the identity; 0 of other modules.

    Beyond β v = threshold it returns v, which is log(1 + e^{−βv})/β too little: 2e-9 for the defaults, 0.3 for a
    threshold of 1. It is 1-Lipschitz only up to that.
    """
    if not isinstance(module, nn.Softplus):
        return 0.0
    fall = float(torch.tensor(-module.threshold, dtype=torch.float64).logaddexp(torch.zeros(()).double()))
    return fall / abs(module.beta) * SLACK if module.beta else math.inf


def lipschitz_one_trace(module: nn.Module, before: Trace) -> Trace:
    """Through a module without weights that is 1-Lipschitz, with few ulps of error; dropout is off."""
    if isinstance(module, (nn.Dropout, nn.Flatten, nn.Identity, nn.Unflatten)):  # nothing is computed
        same = before.reference is before.quantized
        out = evaluated(module, before.quantized)
        return before._replace(quantized=out, reference=out if same else evaluated(module, before.reference))
    outs = evaluated(module, before.quantized), evaluated(module, before.reference)
    fall = softplus_fall(module) * math.sqrt(outs[0][:1].numel()) * SLACK
    ulps = 2048 if isinstance(module, nn.Softplus) else 16  # e^{βv} magnifies the rounding of βv
    slip_q, slip_r = (
        ulps * verified.UNIT * verified.row_norms(out.flatten(1)) + verified.TINY * 64 + fall for out in outs
    )
    return Trace(
        *outs,
        (before.error_q + slip_q) * SLACK,
        (before.error_r + slip_r) * SLACK,
        (before.displacement + fall) * SLACK,
        (before.to_reference + slip_q) * SLACK,
    )


def agreement(quantized: nn.Linear | QuantizedLinear, reference: nn.Linear | QuantizedLinear, before: Trace) -> Tensor:
    """Which inputs ``(B,)`` provably get the reference's class through the final heads (theory §5).

    With p the computed quantized state and i its top class under the float head: gap_ij > ‖V_i − V_j‖₂ · bound for
    every j, with the bound on ‖p − z*‖ for the float head and on ‖p − z̃*‖ for the quantized one. Entry by entry also
    where each network's own equilibrium, within its own error, settles the class under its own head.
    """
    p, entries = before.quantized, before.entries
    top = scores(reference, p).argmax(1)
    if entries is None:
        return settled(reference, p, top, before.to_reference) & settled(quantized, p, top, before.error_q)
    moved = settled(reference, p, top, entries.to_reference) & settled(quantized, p, top, entries.error_q)
    top = scores(quantized, p).argmax(1)
    both = settled(quantized, p, top, entries.error_q)
    return moved | (both & settled(reference, before.reference, top, entries.error_r))


def scores(head: nn.Linear | QuantizedLinear, p: Tensor) -> Tensor:
    """V p + c of the stored head, as computed in float64."""
    V, c, _, _ = affine64(head)
    return p @ V.mT + c


def settled(head: nn.Linear | QuantizedLinear, p: Tensor, top: Tensor, bound: Tensor) -> Tensor:
    """Rows where class ``top`` wins at every point within ``bound`` of p, rounding included.

    ``bound`` is ``(B,)`` in the 2-norm, or ``(B, n)`` entry by entry.
    """
    V, c, e_V, e_c = affine64(head)
    k = V.shape[1]
    scores = p @ V.mT + c
    gaps = scores.gather(1, top[:, None]) - scores
    lengths = verified.row_norms(bound) if bound.ndim == 2 else bound
    moves = torch.empty_like(gaps)
    for i in top.unique().tolist():
        rows = top == i
        if bound.ndim == 2:
            moves[rows] = bound[rows] @ (V[i] - V).abs().mT
        else:  # ‖V_i − V_j‖: one rounding an entry
            moves[rows] = verified.row_norms(V[i] - V) * bound[rows, None]
    # storage leaves each row open by e_V; sums of k terms
    moves = moves * (1 + verified.gamma(k + 8)) * SLACK + 2 * e_V * lengths[:, None]
    size = verified.row_norms(p)
    weight = verified.row_norms(V).max() + verified.row_norms(c[None]).max()
    rounding = 4 * verified.gamma(k + 4) * weight * (size + 1) + 2 * e_V * size + 2 * e_c
    rounding = rounding + verified.TINY * 8 * (k + 1)
    needed = (moves + rounding[:, None]) * SLACK
    others = torch.ones_like(gaps, dtype=torch.bool).scatter_(1, top[:, None], False)
    return ((gaps > needed) | ~others).all(1)
