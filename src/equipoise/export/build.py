"""From a model to an integer program with its certificate: the one place where the pieces meet (theory §10)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import InputError, NotWellPosedError, OptionError, StructureError
from ..layers.mondeq import MonDEQ
from ..operators.quantized import CayleyWeight, StructuredWeight
from ..solvers.forward_backward import best_forward_step
from .affine import Affine, integer_affine
from .boxes import box_of
from .cayley import plan_cayley
from .certificate import ShipCertificate
from .factored import plan_factored
from .fixedpoint import INT32, Floats, Integers
from .grid import Grid, grid_of
from .memory import flash_bytes, ram_bytes
from .network import CodedLinear, Network, code_linear, take_apart
from .plan import Iterates, Plan, iterate_limit
from .program import Program
from .proof import Bounds, Exact, Reference, equilibrium_bounds, score_bound

__all__ = ["Options", "Shipped", "build", "prepare", "reals"]

CALIBRATION = 256
"""Random inputs that stand in for calibration where nothing can be proved and none were given."""


@dataclass(frozen=True)
class Options:
    """What may be asked of an export; see :func:`equipoise.export.export`."""

    mode: str | None = None
    tol: float | None = None
    input_range: tuple[float, float] | None = None
    activation_bits: int = 16
    uncertified: bool = False


@dataclass(frozen=True, eq=False)
class Shipped:
    """A complete program, the grid of its inputs, the units of its results, and the proof."""

    program: Program
    grid: Grid
    unit: float
    score_unit: float | None
    certificate: ShipCertificate
    per_input: dict[str, float] | None
    """What bounds the error of one input, None where nothing is proved."""


def build(model: nn.Module, reference: nn.Module | None, calibration: Tensor | None, options: Options) -> Shipped:
    """See :func:`equipoise.export.export` for what is raised."""
    iterate_limit(options.activation_bits)
    network, mode, grid, own, against = prepare(model, reference, options)
    box, _ = box_of(grid)
    largest = max(abs(grid.low), abs(grid.high))
    injection = code_linear(network.layer.injection, largest, "the injection")
    real = injection.weight.real(), injection.bias_real()
    measured = _measured(network.layer, mode, grid, calibration, certified=own.margin > 0)
    iterates = Iterates(options.activation_bits, measured)
    if mode == "cayley":
        assert isinstance(network.layer.recurrent, CayleyWeight)
        plan = plan_cayley(network.layer.recurrent, injection, grid, box, iterates)
    else:
        assert isinstance(network.layer.recurrent, StructuredWeight)
        plan = plan_factored(network.layer.recurrent, injection, grid, box, iterates)
    if plan.iteration.contraction >= 1 and not options.uncertified:
        raise NotWellPosedError(
            f"the steps are not proved to contract (factor {plan.iteration.contraction:.9g})", own.margin
        )
    extra = equilibrium_bounds(own, real, against, plan.iteration, 1, grid).input_slip
    steps = plan.iteration.steps_for(options.tol, extra if math.isfinite(extra) else 0.0)
    program = replace(plan.program, low=grid.low, high=grid.high, checked=plan.iteration.checked, steps=steps)
    plan = replace(plan, program=program)
    bounds = equilibrium_bounds(own, real, against, plan.iteration, steps, grid)
    head, head_affine, score_unit = _head(network, plan)
    program = replace(program, head=head_affine)
    certificate = _certificate(network, own, against, plan, bounds, program, mode, options, (head, score_unit))
    iteration = plan.iteration.rounding + plan.iteration.truncation(steps)
    per_input = bounds.per_input(iteration) if certificate.certified else None
    return Shipped(program, grid, plan.unit, score_unit, certificate, per_input)


def prepare(
    model: nn.Module, reference: nn.Module | None, options: Options
) -> tuple[Network, str, Grid, Exact, Reference]:
    """What every target starts from: the network, its mode, its inputs, and both networks in float64."""
    network = take_apart(model)
    mode = _mode(network.layer, options.mode)
    grid = grid_of(network.layer.in_features, network.preprocessing, options.input_range, options.activation_bits)
    own = Exact.of(network.layer)
    _check_certified(own, options.uncertified)
    return network, mode, grid, own, _reference(network, own, reference)


def _mode(layer: MonDEQ, asked: str | None) -> str:
    """The mode that the layer's codes have kernels for."""
    if asked not in (None, "cayley", "factored"):
        raise OptionError(f"mode is {asked!r}; give cayley or factored")
    kinds: dict[type[nn.Module], str] = {CayleyWeight: "cayley", StructuredWeight: "factored"}
    found = kinds.get(type(layer.recurrent))
    if found is None:
        given = "floats" if layer.scheme is None else f"codes of the scheme {layer.scheme.name!r}"
        raise StructureError(
            f"the layer holds {given}, for which there is no integer kernel; quantize the float model with "
            "--scheme cayley (mode cayley) or --scheme structured (mode factored)"
        )
    if asked not in (None, found):
        assert layer.scheme is not None
        raise StructureError(
            f"mode {asked} needs other codes than those of the scheme {layer.scheme.name!r}; leave --mode out, or "
            f"quantize the float model with --scheme {'cayley' if asked == 'cayley' else 'structured'}"
        )
    return found


def _check_certified(own: Exact, uncertified: bool) -> None:
    if own.margin <= 0 and not uncertified:
        raise NotWellPosedError(
            f"the model is not certified: only the margin {own.margin:.6g} is proved, so no step count and no error "
            "can be; quantize with more bits or another scheme, or write it without any guarantee with --uncertified",
            own.margin,
        )


def _reference(network: Network, own: Exact, reference: nn.Module | None) -> Reference:
    if reference is None:
        return Reference(network, own, "the network of the exported file, in exact arithmetic", True)
    theirs = take_apart(reference)
    shapes = [
        (n.layer.in_features, n.layer.features, None if n.head is None else n.head.out_features)
        for n in (network, theirs)
    ]
    if shapes[0] != shapes[1]:
        raise StructureError(
            f"the reference has the sizes {shapes[1]}, the model {shapes[0]} (inputs, features, classes)"
        )
    if theirs.preprocessing not in (None, network.preprocessing):
        raise StructureError(
            f"the reference has the preprocessing {theirs.preprocessing}, the model {network.preprocessing}: from the "
            "same pixels they would get different inputs"
        )
    exact = Exact.of(theirs.layer)
    if exact.margin <= 0:
        raise NotWellPosedError(
            f"the reference has no proved Euclidean margin (found {exact.margin:.6g}), "
            "so no distance to its equilibrium is proved in the 2-norm",
            exact.margin,
        )
    return Reference(theirs, exact, "the reference network that was given, in exact arithmetic", False)


def _measured(layer: MonDEQ, mode: str, grid: Grid, calibration: Tensor | None, certified: bool) -> float | None:
    """The largest iterate on the calibration inputs, in float64; None where a range is proved instead."""
    if calibration is None:
        if certified:
            return None
        raw = np.random.default_rng(0).integers(grid.low, grid.high + 1, (CALIBRATION, grid.features))
        calibration = torch.from_numpy(grid.to_real(raw))
    if calibration.ndim != 2 or calibration.shape[1] != layer.in_features or not len(calibration):
        raise InputError(f"the calibration inputs are {tuple(calibration.shape)}; (N, {layer.in_features}) is needed")
    x = calibration.detach().double()
    if not bool(torch.isfinite(x).all()):
        raise InputError("the calibration inputs hold NaN or infinite entries")
    with torch.no_grad():
        q = x @ layer.input_weight.detach().double().T + layer.bias.detach().double()
        return _largest_iterate(layer, mode, q)


def _largest_iterate(layer: MonDEQ, mode: str, q: Tensor) -> float:
    largest = 0.0
    weights = layer.recurrent
    if isinstance(weights, CayleyWeight):
        C, alpha = weights.C.dequantize(), float(weights.alpha)
        c = alpha * (q + q @ C.T)
        u = c
        for _ in range(100):
            largest = max(largest, float(u.abs().max()))
            u = u.abs() @ C.T + c
        return largest
    # forward–backward from 0: no iterate is much larger than the largest equilibrium, seen again with some headroom
    W = layer.weight.detach().double()
    step = best_forward_step(layer.operator)
    z = torch.zeros_like(q)
    for _ in range(300):
        z = ((1 - step) * z + step * (z @ W.T + q)).clamp(min=0)
        largest = max(largest, float(z.max()))
    return largest


def _head(network: Network, plan: Plan) -> tuple[CodedLinear | None, Affine | None, float | None]:
    """The head on the equilibrium's integers; scores in units of a power of two."""
    if network.head is None:
        return None, None, None
    limit = plan.program.limit
    head = code_linear(network.head, limit, "the head")
    size = max(
        float(s) * int(total) * limit * plan.unit + abs(float(b))
        for s, total, b in zip(head.weight.scales, head.weight.row_sums, head.bias, strict=True)
    )
    exponent = max(math.ceil(math.log2(max(size, 1e-30) * 1.01)) - 30, -60)
    unit = Fraction(2) ** exponent
    steps = (Fraction(plan.unit),)
    affine = integer_affine(head, 1 / unit, (0, limit), steps, (Fraction(0),), "the head")
    assert int(affine.magnitude.max(initial=0)) <= INT32
    return head, affine, float(unit)


def _certificate(
    network: Network, own: Exact, against: Reference, plan: Plan, bounds: Bounds, program: Program, mode: str,
    options: Options, head: tuple[CodedLinear | None, float | None],
) -> ShipCertificate:  # fmt: skip
    """Everything that is known, None where it is not finite."""
    rounding = plan.iteration.rounding + bounds.input_slip
    truncation = plan.iteration.truncation(program.steps)
    error = bounds.displacement + rounding + truncation
    scores = error
    if head[0] is not None and program.head is not None and head[1] is not None:
        lost = torch.from_numpy(program.head.errors) * head[1]
        used = head[0].weight.real(), head[0].bias_real()
        scores = score_bound(against, used, lost, error, plan.iteration.iterate_norm)

    def known(value: float) -> float | None:
        return value if own.margin > 0 and math.isfinite(value) else None

    certified = known(error) is not None
    return ShipCertificate(
        certified=certified,
        target="c",
        mode=mode,
        arithmetic="integers of 8 to 64 bits; bounds proved in float64 with rounding counted, constants in rationals",
        reference=against.words,
        steps=program.steps,
        error_bound=known(error),
        displacement_bound=known(bounds.displacement),
        rounding_bound=known(rounding),
        truncation_bound=known(truncation),
        input_rounding_bound=known(bounds.input_rounding),
        score_error_bound=known(scores),
        tolerance=options.tol,
        contraction=known(plan.iteration.contraction),
        margin=known(own.margin),
        iterate_unit=plan.unit,
        iterate_limit=program.limit,
        iterate_range="checked as they are computed: another status is returned when one leaves its range"
        if program.checked
        else "proved to stay in range on every input",
        accumulator_bound=plan.accumulator,
        recurrent_bits=program.recurrent_bits,
        input_bits=program.injection.bits,
        head_bits=None if program.head is None else program.head.bits,
        activation_bits=options.activation_bits,
        features=program.features,
        inputs=program.inputs,
        classes=0 if program.head is None else program.head.codes.shape[0],
        ram_bytes=ram_bytes(program),
        flash_bytes=flash_bytes(program),
        macs=program.macs,
        overflow="proved absent: each 32-bit sum by the row sums of its codes times the largest input, each 64-bit sum "
        "by its multipliers",
    )


def reals(shipped: Shipped, x: NDArray[Any]) -> tuple[Floats, Floats | None, Integers]:
    """The emulation on network inputs ``x (B, d)``: (equilibrium, scores or None, status), in real units."""
    z, scores, status = shipped.program(shipped.grid.to_raw(x))
    real = None if scores is None or shipped.score_unit is None else scores.astype(np.float64) * shipped.score_unit
    return z.astype(np.float64) * shipped.unit, real, status
