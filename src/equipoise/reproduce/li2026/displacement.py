"""Experiment 4: Theorem 3 against how far equilibria really move, and why the published check finds violations."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...certificates import Certifier
from ...certificates.wellposed import fresh_operator
from ...errors import ConvergenceWarning
from ...layers import MonDEQ
from ...quantization.schemes import Assembled
from ...quantize import quantize
from ...solvers import ForwardBackward, Solution
from .measure import TOLERANCE, iterates, problem
from .subject import Bench

__all__ = ["BITS", "Cloud", "Displacement", "PublishedCheck", "measure", "published_solve"]

BITS = (6, 8, 12, 16)
SAMPLES, POINTS = 2560, 320
BATCH, STEPS, ALPHA, SLACK = 256, 500, 1.0, 1.01
"""The published check: batches, forward–backward steps and step size, and what it allows above the bound."""


@dataclass(frozen=True)
class Cloud:
    """One number of bits of W, U and b in floats. ``bound``: ‖ΔW‖₂ ‖z̃*‖/m per sample, ``sharp``: the certificate's
    own per-sample bound, ``moved``: ‖z* − z̃*‖; means over the samples, and shares of them where it holds, but for the
    proved error of the two solves.

    ``bounds`` and ``moves`` are relative to ‖z*‖, for some of the samples."""

    bits: int
    share: float
    sharp_share: float
    bound: float
    sharp: float
    moved: float
    bounds: tuple[float, ...]
    moves: tuple[float, ...]


@dataclass(frozen=True)
class PublishedCheck:
    """The published way: W, U and b rounded, both networks by forward–backward with α = 1.

    ``share`` of the samples kept to the bound, ``exact_share`` do at the true equilibria; ``settled_share`` do among
    the ``settled`` samples, whose float solve came within 1e-3 of the true equilibrium.
    """

    bits: int
    share: float
    exact_share: float
    settled_share: float
    bound: float
    moved: float
    exact_moved: float
    bounds: tuple[float, ...]
    moves: tuple[float, ...]


@dataclass(frozen=True)
class Displacement:
    """Both ways; ``settled``: share of the samples whose float solve at α = 1 reaches the equilibrium."""

    samples: int
    clouds: tuple[Cloud, ...]
    checks: tuple[PublishedCheck, ...]
    settled: float


def measure(bench: Bench) -> Displacement:
    """The bound and the movement on the first 2,560 test samples; bits whose margin is not proved are left out."""
    x = bench.data.test.x[:SAMPLES]
    solved = bench.layer.solve(x.double(), tol=1e-12)
    exact = solved.value
    judge = Certifier(bench.wide, x)
    rough = published_solve(bench.network, x)
    reached = (rough.double() - exact).norm(dim=1) <= 1e-3 * exact.norm(dim=1)
    clouds, checks = [], []
    for bits in BITS:
        model = quantize(bench.wide, Assembled(bits))
        if fresh_operator(_layer(model)).margin() > 0:
            clouds.append(_cloud(bench, bits, model, judge, x, solved))
            checks.append(_check(bench, bits, x, exact, rough, reached))
    return Displacement(len(x), tuple(clouds), tuple(checks), float(reached.double().mean()))


def _layer(model: nn.Module) -> MonDEQ:
    layer = model[0]  # type: ignore[index]
    assert isinstance(layer, MonDEQ)
    return layer


def _cloud(bench: Bench, bits: int, model: nn.Module, judge: Certifier, x: Tensor, solved: Solution) -> Cloud:
    proof = judge(model)
    assert proof.displacement is not None
    assert proof.delta_norm is not None
    found = _layer(model).solve(x.double(), tol=1e-12)
    exact, other = solved.value, found.value
    moved, doubt = (exact - other).norm(dim=1), solved.error_bound + found.error_bound
    bound = proof.delta_norm / fresh_operator(bench.layer).margin() * other.norm(dim=1)
    return Cloud(
        bits=bits,
        share=_share(moved <= bound + doubt),
        sharp_share=_share(moved <= proof.displacement + doubt),
        bound=float(bound.mean()),
        sharp=float(proof.displacement.mean()),
        moved=float(moved.mean()),
        bounds=_points(bound / exact.norm(dim=1)),
        moves=_points(moved / exact.norm(dim=1)),
    )


def _check(bench: Bench, bits: int, x: Tensor, exact: Tensor, rough: Tensor, reached: Tensor) -> PublishedCheck:
    scheme = Assembled(bits, input_bits=bits, bias_bits=bits)
    layer = _layer(quantize(bench.network, scheme))
    delta = torch.linalg.matrix_norm((layer.weight - _layer(bench.network).weight).detach().double(), 2)
    factor = float(delta) / fresh_operator(bench.layer).margin()
    other = published_solve(quantize(bench.network, scheme), x)
    moved, bound = (rough - other).norm(dim=1).double(), factor * other.norm(dim=1).double()
    kept = moved <= SLACK * bound
    truly = _layer(quantize(bench.wide, scheme)).solve(x.double(), tol=1e-12).value
    exact_moved, exact_bound = (exact - truly).norm(dim=1), factor * truly.norm(dim=1)
    return PublishedCheck(
        bits=bits,
        share=_share(kept),
        exact_share=_share(exact_moved <= exact_bound),
        settled_share=_share(kept[reached]),
        bound=float(bound.mean()),
        moved=float(moved.mean()),
        exact_moved=float(exact_moved.mean()),
        bounds=_points(bound / rough.double().norm(dim=1)),
        moves=_points(moved / rough.double().norm(dim=1)),
    )


def published_solve(model: nn.Module, x: Tensor) -> Tensor:
    """Forward–backward with α = 1 in float32, each batch until its residual is below 1e-5 or for 500 steps."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for part in x.float().split(BATCH):
            last = part.new_zeros(0)
            for before, after, z in iterates(ForwardBackward(alpha=ALPHA), problem(_layer(model), part), STEPS):
                last = z
                if float((after - before).norm() / (before.norm() + 1e-12)) < TOLERANCE:
                    break
            found.append(last.clone())
    return torch.cat(found)


def _share(mask: Tensor) -> float:
    return float(mask.double().mean()) if len(mask) else 0.0


def _points(values: Tensor) -> tuple[float, ...]:
    """Evenly many of the samples, with six digits."""
    stride = max(1, len(values) // POINTS)
    return tuple(float(f"{value:.6g}") for value in values[::stride].nan_to_num(0.0).tolist())
