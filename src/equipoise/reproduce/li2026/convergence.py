"""Experiment 1: convergence against ‖ΔW‖₂/m under the published rule, and what is true of 3 and 4 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ...certificates import certify
from ...certificates.convergence import solver_rate, steps_for
from ...certificates.wellposed import fresh_operator
from ...layers import MonDEQ
from ...quantization.schemes import Assembled
from ...quantize import quantize
from ...solvers import ForwardBackward
from .measure import CAP, TOLERANCE, problem, residuals, rule_step, settle
from .subject import Bench

__all__ = ["BITS", "PATIENCE", "Convergence", "Rescue", "Trial", "Width", "measure"]

BITS = (3, 4, 5, 6, 7, 8, 10, 12, 16, 32)
SAMPLES = 64
GOOD_STEP = 0.25
"""A step that the paper does not try at 4 bits."""
PATIENCE = 20_000
QUICK_TEST = 2_000
CURVE = 3_000


@dataclass(frozen=True)
class Width:
    """One number of bits. ``margin`` and ``delta_norm`` are proved, ``certified_steps`` too: after so many
    forward–backward steps with this α the distance to the equilibrium has shrunk by 1e-5, whatever the input."""

    bits: int
    delta_norm: float
    ratio: float
    margin: float
    verdict: str
    alpha: float
    steps: int
    residual: float
    settled: bool
    certified_steps: int | None
    solver_steps: int | None


@dataclass(frozen=True)
class Trial:
    """Forward–backward with one step, sample by sample: shares that settled and that grew without bound."""

    bits: int
    alpha: float
    settled: float
    grew: float
    slowest: int


@dataclass(frozen=True)
class Rescue:
    """The 4-bit network with a good step: on the rule's samples, and on test samples with their accuracy."""

    bits: int
    alpha: float
    steps: int
    settled: bool
    test_samples: int
    test_settled: float
    test_slowest: int
    accuracy: float
    fallback_steps: int | None
    slow_curve: tuple[float, ...]
    good_curve: tuple[float, ...]
    lost_curve: tuple[float, ...]


@dataclass(frozen=True)
class Convergence:
    """The whole experiment."""

    samples: int
    widths: tuple[Width, ...]
    trials: tuple[Trial, ...]
    rescue: Rescue


def measure(bench: Bench) -> Convergence:
    """Run the published rule on every number of bits, then look closer at 3 and 4 bits."""
    samples = min(SAMPLES, len(bench.data.test))
    widths = tuple(_width(bench, bits, samples) for bits in BITS)
    trials = tuple(_trial(bench, 3, alpha, samples) for alpha in (0.5, GOOD_STEP, 0.01))
    return Convergence(samples, widths, trials, _rescue(bench, samples))


def _assembled(bench: Bench, bits: int) -> tuple[nn.Module, MonDEQ]:
    """W rounded by the published rule, nothing else, in float64."""
    model = quantize(bench.wide, Assembled(bits))
    layer = model[0]  # type: ignore[index]
    assert isinstance(layer, MonDEQ)
    return model, layer


def _width(bench: Bench, bits: int, samples: int) -> Width:
    model, layer = _assembled(bench, bits)
    x = bench.data.test.x[:samples].double()
    proof = certify(model, bench.wide, x)
    alpha = rule_step(layer.weight).alpha
    seen = residuals(ForwardBackward(alpha=alpha), problem(layer, x), CAP, TOLERANCE)
    rate = solver_rate(ForwardBackward(alpha=alpha), fresh_operator(layer))[1]
    assert proof.margin is not None
    assert proof.delta_norm is not None
    return Width(
        bits=bits,
        delta_norm=proof.delta_norm,
        ratio=proof.delta_norm / fresh_operator(bench.layer).margin(),
        margin=proof.margin,
        verdict=proof.verdict,
        alpha=alpha,
        steps=len(seen),
        residual=seen[-1],
        settled=seen[-1] < TOLERANCE,
        certified_steps=steps_for(rate, TOLERANCE) if proof.certified else None,
        solver_steps=proof.steps,
    )


def _trial(bench: Bench, bits: int, alpha: float, samples: int) -> Trial:
    _, layer = _assembled(bench, bits)
    end = settle(ForwardBackward(alpha=alpha), problem(layer, bench.data.test.x[:samples]), PATIENCE)
    settled, grew = (float(mask.double().mean()) for mask in (end.step > 0, end.grew))
    return Trial(bits, alpha, settled, grew, int(end.step.max()))


def _rescue(bench: Bench, samples: int) -> Rescue:
    model, layer = _assembled(bench, 4)
    few, good = problem(layer, bench.data.test.x[:samples]), ForwardBackward(alpha=GOOD_STEP)
    seen = residuals(good, few, CAP, TOLERANCE)
    slow = residuals(ForwardBackward(alpha=0.01), few, 5 * CAP, TOLERANCE)
    split = bench.data.test
    count = min(QUICK_TEST, len(split)) if bench.settings.quick else len(split)
    ends = [settle(good, problem(layer, x), CAP) for x in split.x[:count].split(2_000)]
    steps, grew, value = (torch.cat(parts) for parts in zip(*ends, strict=True))
    with torch.no_grad():
        right = (model[1](value).argmax(1) == split.y[:count]) & ~grew  # type: ignore[index]
    return Rescue(
        bits=4,
        alpha=GOOD_STEP,
        steps=len(seen),
        settled=seen[-1] < TOLERANCE,
        test_samples=count,
        test_settled=float((steps > 0).double().mean()),
        test_slowest=int(steps.max()),
        accuracy=float(right.double().mean()),
        fallback_steps=len(slow) if slow[-1] < TOLERANCE else None,
        slow_curve=_thinned(slow[:CURVE]),
        good_curve=_thinned(seen),
        lost_curve=_thinned(residuals(good, problem(_assembled(bench, 3)[1], bench.data.test.x[:samples]), CURVE)),
    )


def _thinned(curve: list[float]) -> tuple[float, ...]:
    """The first 3,000 values with six digits: enough to draw from, and a small file."""
    return tuple(float(f"{value:.6g}") for value in curve)
