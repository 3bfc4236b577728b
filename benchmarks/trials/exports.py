"""Exported programs as numpy runs them, bit for bit what the C code computes: answers against exact equilibria."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

import equipoise as eq
from equipoise.data import Preprocessing
from equipoise.errors import EquipoiseError
from equipoise.export import Shipped, build
from equipoise.export.build import Options
from equipoise.export.factored import FactoredMap, FactoredProgram
from equipoise.export.network import code_linear
from equipoise.export.program import OK
from equipoise.operators.quantized import CayleyWeight
from equipoise.runtime import Runtime

from .constants import margin_of
from .equilibria import State, codes, equilibria, run, stored
from .ledger import Ledger
from .subjects import _affine, _factors, _linear, _tensor
from .wide import LD, UNIT, Array, exact, largest, norms

__all__ = ["exports"]

Rng = np.random.Generator
COUNT = 24


class Emulated(Runtime):
    """The runtime with the emulation in the place of the compiled program."""

    def __init__(self, shipped: Shipped) -> None:
        units = shipped.unit, shipped.score_unit
        library: Any = SimpleNamespace(eqnet_batch=SimpleNamespace())
        types = np.int16, np.int16
        super().__init__(library, shipped.certificate.to_dict(), shipped.grid, types, units, shipped.per_input)
        self.program = shipped.program

    def integers(self, x: Any) -> Any:
        z, scores, status = self.program(self._raw(x))
        return z, scores, status


def exports(rng: Rng, ledger: Ledger) -> None:
    """One network, alone or against the float network that it came from."""
    reference = _network(rng)
    model: Any = _quantized(rng, reference)
    natural, d = rng.random() < 0.5, model[0].in_features
    if natural:
        given = Preprocessing(float(rng.uniform(0, 1)), float(10 ** rng.uniform(-1, 0.5)), 255.0, (d,))
        model.preprocessing = reference.preprocessing = given
    low = float(rng.uniform(-2, 1))
    interval = None if natural else (low, low + float(10 ** rng.uniform(-2, 1)))
    bits = int(rng.choice([8, 16, 16]))
    tol = None if rng.random() < 0.7 else float(10 ** rng.uniform(-4, 1))
    alone = rng.random() < 0.5
    try:
        calibration = torch.tensor(rng.uniform(-1, 1, (6, d))) if rng.random() < 0.4 else None
        against = None if alone else reference
        shipped = build(model, against, calibration, Options(tol=tol, input_range=interval, activation_bits=bits))
    except EquipoiseError:  # no margin, sums beyond 32 bits, a grid too coarse
        return
    _constants(model[0], shipped, ledger)
    _sums(shipped.program, shipped.certificate.accumulator_bound, ledger)
    _answers(model, model if alone else reference, shipped, rng, ledger)


def _network(rng: Rng) -> Any:
    n, d = int(rng.integers(1, 7)), int(rng.integers(1, 6))
    dtype = torch.float32 if rng.random() < 0.6 else torch.float64
    A, B, _ = _factors(rng, n)
    U, b = _affine(rng, n, d, 1.0)
    margin = float(10 ** (rng.uniform(-5, -2) if rng.random() < 0.2 else rng.uniform(-2, 1)))
    layer = eq.MonDEQ.from_factors(*(_tensor(t, dtype) for t in (A, B)), margin, _tensor(U, dtype), _tensor(b, dtype))
    parts: list[nn.Module] = [layer]
    if rng.random() < 0.6:
        parts.append(_linear(rng, n, 3, dtype))
    return nn.Sequential(*parts).eval()


def _quantized(rng: Rng, model: Any) -> nn.Module:
    names = [name for name in ("input_bits", "bias_bits", "head_bits")[: 1 + len(model)] if rng.random() < 0.5]
    options: dict[str, Any] = {name: int(rng.integers(1, 9)) for name in names}
    kind = (eq.Cayley, eq.Structured)[rng.integers(2)]
    granularity = str(rng.choice(["tensor", "row"]))
    return eq.quantize(model, kind(int(rng.integers(1, 9)), granularity=granularity, **options))


def _constants(layer: Any, shipped: Shipped, ledger: Ledger) -> None:
    known, told = stored(layer.recurrent), shipped.certificate
    value, slack = margin_of(known.W, None)
    ledger.least("export margin", told.margin, value, slack + known.doubt)
    if isinstance(layer.recurrent, CayleyWeight):
        value, slack = largest(codes(layer.recurrent.C))
    else:
        alpha = LD(FactoredMap.of(layer.recurrent).alpha)
        value, slack = largest((1 - alpha) * np.eye(len(known.W), dtype=LD) + alpha * known.W)
        slack = slack + alpha * known.doubt + 4 * UNIT
    ledger.most("export contraction", told.contraction, value, slack)
    if told.tolerance is not None:
        lost = None if told.rounding_bound is None else told.rounding_bound + told.truncation_bound
        ledger.holds("export tolerance", lost is not None, lost is not None and lost <= told.tolerance * (1 + 1e-12))


def _sums(program: Any, bound: int, ledger: Ledger) -> None:
    """The largest sums of any iterate within its limit and any input of the range, in integers of any length."""
    affine, limit = program.injection, int(program.limit)
    p = [max(abs(int(a)), abs(int(b))) for a, b in zip(affine.least, affine.most, strict=True)]

    def reach(matrix: Any, v: list[int]) -> list[int]:
        return [sum(abs(int(k)) * e for k, e in zip(row, v, strict=True)) for row in matrix]

    def rounded(t: int, shift: int) -> int:
        return (t >> shift) + 1

    iterate = [limit] * len(p)
    if isinstance(program, FactoredProgram):
        narrow = [*reach(program.A.codes, iterate), *reach(program.K, iterate)]
        pulled = [abs(int(m)) * y for m, y in zip(program.pull, narrow, strict=False)]
        w = reach(program.A.codes.T, [rounded(y, program.pull_shift) for y in pulled])
        skew = [abs(program.skew) * y for y in reach(program.K, iterate)]
        lifts = 1 << (program.shift - program.fraction), 1 << (program.shift - program.pull_fraction)
        wide = pulled + [
            abs(program.own) * limit + s + p_i * lifts[0] + w_i * lifts[1]
            for s, p_i, w_i in zip(skew, p, w, strict=True)
        ]
    else:
        K = program.C.codes
        narrow = [*reach(K, iterate), *reach(K, p)]
        start = [
            abs(program.start_own) * p_i + abs(int(m)) * y
            for p_i, m, y in zip(p, program.start_cross, reach(K, p), strict=True)
        ]
        lift = 1 << (program.shift - program.fraction)
        c = [rounded(s, program.start_shift) for s in start]
        ledger.most("export 32-bit injection", 2**31 - 1, max(c) - 1)
        wide = start + [
            abs(int(m)) * y + c_i * lift for m, y, c_i in zip(program.multipliers, reach(K, iterate), c, strict=True)
        ]
    ledger.most("export accumulator", bound, max(narrow))
    ledger.most("export 32-bit sums", 2**31 - 1, max(narrow))
    ledger.most("export 64-bit sums", LD(2) ** 63 - 1, LD(max(wide)))


def _long(value: Fraction) -> LD:
    high = float(value)
    return LD(high) + LD(float(value - Fraction(high)))


def _inputs(shipped: Shipped, rng: Rng) -> tuple[Any, Array]:
    """(integers, what they stand for): corners of the range, and points anywhere."""
    grid = shipped.grid
    raw = rng.integers(grid.low, grid.high + 1, (COUNT, grid.features))
    corners = rng.random(COUNT) < 0.5
    raw[corners] = np.where(rng.random(raw.shape) < 0.5, grid.low, grid.high)[corners]
    step, offset = (
        [_long(f) for f in fs for _ in range(grid.features // grid.channels)] for fs in (grid.steps, grid.offsets)
    )
    return raw, raw.astype(LD) * np.array(step) + np.array(offset)


def _answers(model: Any, against: Any, shipped: Shipped, rng: Rng, ledger: Ledger) -> None:
    told, grid, mode = shipped.certificate, shipped.grid, shipped.certificate.mode
    raw, real = _inputs(shipped, rng)
    z, scores, status = shipped.program(raw)
    fine = status == OK
    z = exact(z) * LD(shipped.unit)
    truth = run(against, real)
    layer = truth[0]

    def claimed(value: float | None) -> Array | None:
        return None if value is None else np.where(fine, LD(value), np.inf)

    ledger.most(f"export error {mode}", claimed(told.error_bound), norms(z - layer.value), layer.error)
    if scores is not None and shipped.score_unit is not None:
        off = np.abs(exact(scores) * LD(shipped.score_unit) - truth[-1].value).max(1)
        ledger.most(f"export scores {mode}", claimed(told.score_error_bound), off, truth[-1].error)
    # the network that the program computes, U and b as its integers have them
    coded = code_linear(model[0].injection, max(abs(grid.low), abs(grid.high)), "the injection")
    U = coded.weight.codes.astype(LD) * np.array([_long(s) for s in coded.weight.scales])[:, None]
    b = np.array([_long(v) for v in coded.bias])
    size = norms(np.abs(real) @ np.abs(U).T + np.abs(b))
    own = equilibria(stored(model[0].recurrent), State(real @ U.T + b, (U.shape[1] + 8) * UNIT * size), eq.ReLU())
    slack = own.error + layer.error
    ledger.most("export displacement", claimed(told.displacement_bound), norms(own.value - layer.value), slack)
    if told.rounding_bound is not None and told.truncation_bound is not None:
        lost = claimed(told.rounding_bound + told.truncation_bound)
        ledger.most(f"export rounding {mode}", lost, norms(z - own.value), own.error)
    _between(against, shipped, real, rng, ledger)


def _between(against: Any, shipped: Shipped, real: Array, rng: Rng, ledger: Ledger) -> None:
    """Floats between the grid's points: the bound of the range, and that of each input."""
    told, grid = shipped.certificate, shipped.grid
    ends = grid.to_real(np.array([[grid.low] * grid.features, [grid.high] * grid.features]))
    step = np.abs(grid.spread(grid.steps))
    x = real.astype(float) + step * rng.uniform(-0.5, 0.5, real.shape)
    x = np.clip(x, ends.min(0), ends.max(0))
    runtime = Emulated(shipped)
    bound = runtime.error_bound(x)
    z, _, status = runtime.integers(x)
    truth = run(against, exact(x))[0]
    off = norms(exact(z) * LD(shipped.unit) - truth.value)
    ledger.most("export error of an input", np.where(np.isnan(bound), np.inf, bound), off, truth.error)
    if told.error_bound is not None:
        more = told.input_rounding_bound or 0.0 if grid.natural else 0.0
        ledger.most(
            "export error of floats", np.where(status == OK, LD(told.error_bound + more), np.inf), off, truth.error
        )
