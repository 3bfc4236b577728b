"""Symmetric uniform rounding: how far apart the levels lie, and which level each weight takes.

A weight ``w`` is stored as an integer code ``c`` and shares a scale ``s`` with its group; its value
is ``s c``. With ``b >= 2`` bits the codes are ``-(2^(b-1) - 1) .. 2^(b-1) - 1`` (mid-tread: zero is a
level, and so is the negative of every level); with one bit they are -1 and +1. Source: theory §4,
the published rule is scale ``"max"`` [LLC26].

Everything is computed in float64, whatever the weights' dtype, so that 16 and 32 bits are right.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..errors import InputError, OptionError

__all__ = ["check_bits", "check_choice", "code_dtype", "fit_scale", "levels", "round_to_codes"]

Granularity = Literal["tensor", "row"]
ScaleRule = Literal["max", "mse"]

_SWEEP_LIMIT = 2**21  # breakpoints sorted at once: about 0.3 s and 150 MB on one core
_SAMPLE_LIMIT = 2**17  # entries on which the starts of the alternation compete
_STARTS = 17
_ROUNDS = 50  # of the alternation on the sample,
_FINAL_ROUNDS = 20  # and on all entries


def check_bits(bits: int, name: str = "bits", *, at_least: int = 1) -> int:
    """Return ``bits`` if it is an integer from ``at_least`` to 16, or 32; raise OptionError if not."""
    known = isinstance(bits, int) and not isinstance(bits, bool)
    if not known or not (at_least <= bits <= 16 or bits == 32):
        raise OptionError(f"{name} is {bits!r}; it is an integer from {at_least} to 16, or 32")
    return bits


def check_choice(value: str, name: str, allowed: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``allowed``; raise OptionError if not."""
    if not isinstance(value, str) or value not in allowed:
        raise OptionError(f"{name} is {value!r}; it is one of {', '.join(map(repr, allowed))}")
    return value


def levels(bits: int) -> int:
    """Largest code: ``2^(b-1) - 1``, and 1 at one bit, where the codes are -1 and +1.

    Raises:
        OptionError: ``bits`` is not an integer from 1 to 16, or 32.
    """
    return max((1 << check_bits(bits) - 1) - 1, 1)


def code_dtype(bits: int) -> torch.dtype:
    """Smallest of int8, int16 and int32 that holds codes of ``bits`` bits."""
    check_bits(bits)
    if bits <= 8:
        return torch.int8
    return torch.int16 if bits <= 16 else torch.int32


@torch.no_grad()
def fit_scale(w: Tensor, bits: int, rule: ScaleRule = "max", dim: int | None = None) -> Tensor:
    """Scale of the levels of ``w``.

    ``"max"``: ``max|w| / (2^(b-1) - 1)``; rounding then moves no entry by more than half a scale.
    ``"mse"``: the scale of least squared error ``sum (w - s c)^2``, never worse than ``"max"``; the
    global minimum wherever the tensor is small enough to look at every breakpoint (entries times
    largest code up to 2^21), else the best local minimum of alternating least squares from 17 starts.
    At one bit both are ``mean|w|``, the least-squares answer.

    Args:
        w: any shape, finite; floating point or integer.
        bits: 1 to 16, or 32.
        rule: ``"max"`` or ``"mse"``.
        dim: ``None`` for one scale; else the dimension of which each index has a scale of its own
            (0: one per row). A vector counts as one row.

    Returns:
        Shape ``()``, or the shape of ``w`` with 1 everywhere but at ``dim``, e.g. ``(rows, 1)``.
        float32 up to 16 bits, float64 above. A group of zeros has scale 0; any other scale that
        float32 would hold only as a subnormal is raised to its smallest normal number, 2^-126
        (at one bit: lowered to 0), so a scale is never divided by when it has lost its digits.

    Raises:
        OptionError: unknown ``bits`` or ``rule``.
        InputError: entries that are not finite or too large for the scale's dtype.

    Source: theory §4 [LLC26].
    """
    top = levels(bits)
    check_choice(rule, "scale", ("max", "mse"))
    magnitude = _real(w).abs()
    if dim is None or w.ndim < 2:
        shape, groups = [], magnitude.reshape(1, -1)
    else:
        shape = [size if i == dim % w.ndim else 1 for i, size in enumerate(w.shape)]
        groups = magnitude.movedim(dim, 0).flatten(1)
    if groups.numel() == 0:
        return torch.zeros(shape, dtype=_scale_dtype(bits), device=w.device)
    peak = groups.amax(1, keepdim=True)
    unit = groups / torch.where(peak > 0, peak, 1.0)  # squares of tiny or huge weights stay in range
    if bits == 1:
        return _stored(peak * unit.mean(1, keepdim=True), peak, bits).reshape(shape)
    scale = _stored(peak / top, peak, bits)
    if rule == "mse":
        fitted = _stored(peak * _least_squares(unit, top), peak, bits)
        better = _squared_error(groups, unit, fitted, top) < _squared_error(groups, unit, scale, top)
        scale = torch.where(better, fitted, scale)
    return scale.reshape(shape)


@torch.no_grad()
def round_to_codes(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes ``clamp(round(w / scale))``, ties to even; at one bit the sign, +1 for zero.

    Args:
        w: any shape, finite.
        scale: as stored, shape ``()`` or broadcasting to ``w``; where it is 0 the codes are 0
            (at one bit +1; the value is 0 either way).
        bits: 1 to 16, or 32.

    Returns:
        Shape of ``w``, dtype ``code_dtype(bits)``.

    Raises:
        OptionError: unknown ``bits``.
        InputError: ``w`` or ``scale`` not finite, or ``scale`` negative.
    """
    top, values, steps = levels(bits), _real(w), _real(scale, "scale")
    if bool((steps < 0).any()):
        raise InputError(f"a scale is {float(steps.min())}; none is negative")
    codes = torch.where((values >= 0) | (steps == 0), 1.0, -1.0) if bits == 1 else _nearest(values, steps, top)
    return codes.to(code_dtype(bits))


def _real(w: Tensor, name: str = "weights") -> Tensor:
    """``w`` in float64, checked finite."""
    if not isinstance(w, Tensor) or w.is_complex():
        raise InputError(f"{name} given as {getattr(w, 'dtype', type(w).__name__)}; a real tensor is needed")
    values = w.detach().to(torch.float64)
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise InputError(f"{bad} of {values.numel()} entries of the {name} are NaN or infinite; finite ones are needed")
    return values


def _scale_dtype(bits: int) -> torch.dtype:
    return torch.float32 if bits <= 16 else torch.float64


def _stored(scale: Tensor, peak: Tensor, bits: int) -> Tensor:
    """Round to the dtype that scales are kept in, away from subnormal numbers and overflow."""
    limits = torch.finfo(_scale_dtype(bits))
    if bool((scale > limits.max).any()):
        raise InputError(f"rescale the weights: {float(scale.max()):.3g} is too large a {limits.dtype} scale")
    # A scale raised to the smallest normal number keeps the error within half a scale; one bit has
    # no level at zero, so there only 0 stays close to such weights.
    floor = 0.0 if bits == 1 else limits.tiny
    lifted = torch.where((peak > 0) & (scale < limits.tiny), floor, scale)
    return lifted.to(_scale_dtype(bits))


def _nearest(values: Tensor, steps: Tensor, top: int) -> Tensor:
    """Nearest codes in float64; 0 where the step is 0."""
    quotient = values / torch.where(steps > 0, steps, 1.0)
    return torch.where(steps > 0, quotient.round_().clamp_(-top, top), 0.0)


def _squared_error(groups: Tensor, unit: Tensor, scale: Tensor, top: int) -> Tensor:
    """Squared error of each group (G, N) at its stored scale (G, 1), in units of its peak squared."""
    steps = scale.to(torch.float64)
    peak = groups.amax(1, keepdim=True)
    values = _nearest(groups, steps, top) * (steps / torch.where(peak > 0, peak, 1.0))
    return (unit - values).square_().sum(1, keepdim=True)


def _least_squares(unit: Tensor, top: int) -> Tensor:
    """Scales (G, 1) of least squared error for magnitudes (G, N) of peak 1."""
    if unit.numel() * top <= _SWEEP_LIMIT:
        return _sweep(unit, top)
    stride = -(-unit.numel() // _SAMPLE_LIMIT)
    fractions = torch.linspace(0.2, 1.0, _STARTS, dtype=torch.float64, device=unit.device)
    starts = (fractions / top).view(-1, 1, 1).expand(-1, unit.shape[0], 1)
    best = _alternate(unit[:, ::stride], starts, top, _ROUNDS)
    return best if stride == 1 else _alternate(unit, best.unsqueeze(0), top, _FINAL_ROUNDS)


def _sweep(unit: Tensor, top: int) -> Tensor:
    """Global minimum: while the scale falls from infinity, entry i takes code k + 1 at w_i/(k + 1/2).

    Between two such breakpoints the codes c are fixed, the best scale is <w, c>/<c, c> and its squared
    error |w|^2 - <w, c>^2/<c, c>; both products are running sums over the sorted breakpoints.
    """
    halves = torch.arange(top, dtype=torch.float64, device=unit.device) + 0.5
    order = _falling((unit.unsqueeze(2) / halves).flatten(1), unit, top)
    along = unit.gather(1, order // top).cumsum_(1)  # <w, c>: code k -> k + 1 adds w_i
    square = (2 * halves)[order % top].cumsum_(1)  # <c, c>: and (k + 1)^2 - k^2 = 2 (k + 1/2)
    best = (along.square() / square).argmax(1, keepdim=True)
    return along.gather(1, best) / square.gather(1, best)


def _falling(breakpoints: Tensor, unit: Tensor, top: int) -> Tensor:
    """Indices (G, M) of the breakpoints, the largest first; of one group alone only those that may matter.

    With error E at scale 1/top the least error leaves the peak p within sqrt(E) of its code, at most top: no scale
    below (p - sqrt(E))/top is best, and a code raised at a breakpoint far below a scale costs more than rounding.
    """
    if len(unit) > 1:
        return breakpoints.argsort(1, descending=True)
    error = float(((unit * top).round_().div_(top) - unit).square_().sum())
    kept = (breakpoints[0] >= 0.9 * (float(unit.amax()) - error**0.5) / top).nonzero()[:, 0]
    return kept[breakpoints[0, kept].argsort(descending=True)][None]


def _alternate(unit: Tensor, starts: Tensor, top: int, rounds: int) -> Tensor:
    """Alternate nearest codes and their best scale from all ``starts`` (S, G, 1) at once.

    Returns the scale (G, 1) of least squared error in each group. It stops after ``rounds``, or once
    the codes repeat, seen as a scale that moves by less than a float32 can tell.
    """
    scale = starts
    for _ in range(rounds):
        codes = (unit / scale).round_().clamp_(max=top)
        square = torch.einsum("sgn,sgn->sg", codes, codes).unsqueeze(2)
        along = torch.einsum("sgn,gn->sg", codes, unit).unsqueeze(2)
        previous, scale = scale, torch.where(square > 0, along / square.clamp(min=1.0), scale)
        if bool(((scale - previous).abs() <= 2.0**-26 * previous).all()):
            break
    error = ((unit / scale).round_().clamp_(max=top) * scale - unit).square_().sum(2, keepdim=True)
    return scale.gather(0, error.argmin(0, keepdim=True)).squeeze(0)
