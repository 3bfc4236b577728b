"""What the conformance suites run on: an activation, a solver, a scheme or an operator that is new gets a line here.

`test_catalogue.py` fails for a class of the library that has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mpmath
import torch
from torch import Tensor

import equipoise as eq
from equipoise.activations import Activation
from equipoise.operators import DenseOperator, MonotoneOperator, QuantizedWeight, quantize_weight, schemes
from equipoise.operators.grids import Geometry
from equipoise.operators.tiers import TierOperator
from equipoise.parametrizations import Dense, Kernels, Monotone, MonotoneKernels

__all__ = [
    "ACTIVATIONS",
    "EVERY_ACTIVATION",
    "LOOSE",
    "OPERATORS",
    "SCHEMES",
    "SCHEME_KINDS",
    "SOLVERS",
    "VARIANTS",
    "Build",
    "Known",
    "codes",
    "definition",
    "matrix",
    "monotone",
]

mpmath.mp.dps = 50
exp, log1p = mpmath.exp, mpmath.log1p

# Activations


@dataclass(frozen=True)
class Known:
    """An activation as everybody knows it: σ(v) of (activation, v) in 50 digits, and where its slope jumps.

    ``variants``: the instances that are tried, the first of them everywhere. ``linear``: between its kinks.
    """

    define: Callable[[Any, Any], Any]
    variants: tuple[Activation, ...]
    kinks: Callable[[Any], tuple[float, ...]] = lambda a: ()
    linear: bool = False


ACTIVATIONS_KNOWN: tuple[Known, ...] = (
    Known(lambda a, v: max(v, 0), (eq.ReLU(),), lambda a: (0.0,), linear=True),
    Known(
        lambda a, v: v if v >= 0 else a.slope * v,
        (eq.LeakyReLU(0.1), eq.LeakyReLU(), eq.LeakyReLU(0.0), eq.LeakyReLU(0.3), eq.LeakyReLU(1.0)),
        lambda a: (0.0,),
        linear=True,
    ),
    Known(lambda a, v: mpmath.tanh(v), (eq.Tanh(),)),
    Known(lambda a, v: 1 / (1 + exp(-v)), (eq.Sigmoid(),)),
    Known(lambda a, v: log1p(exp(v)) if v < 0 else v + log1p(exp(-v)), (eq.Softplus(),)),
    Known(
        lambda a, v: v if v >= 0 else a.scale * mpmath.expm1(v), (eq.ELU(), eq.ELU(0.4), eq.ELU(0.5)), lambda a: (0.0,)
    ),
    Known(
        lambda a, v: min(max(v, a.low), a.high),
        (eq.Hardtanh(), eq.Hardtanh(-0.3, 2.1)),
        lambda a: (a.low, a.high),
        linear=True,
    ),
    Known(
        lambda a, v: mpmath.sign(v) * max(abs(v) - a.threshold, 0),
        (eq.SoftThreshold(0.3), eq.SoftThreshold(), eq.SoftThreshold(0.0), eq.SoftThreshold(0.7)),
        lambda a: (-a.threshold, a.threshold),
        linear=True,
    ),
)
ACTIVATIONS: list[Activation] = [known.variants[0] for known in ACTIVATIONS_KNOWN]
EVERY_ACTIVATION: list[Activation] = [activation for known in ACTIVATIONS_KNOWN for activation in known.variants]


def definition(activation: Activation) -> Known:
    """What is known of it, whatever its options."""
    return next(known for known in ACTIVATIONS_KNOWN if type(known.variants[0]) is type(activation))


# Solvers

SOLVERS: list[eq.Solver] = [
    eq.ForwardBackward(),
    eq.PeacemanRachford(),
    eq.DouglasRachford(),
    eq.Tseng(),
    eq.Picard(),
    eq.Anderson(),
    eq.Broyden(),
]
VARIANTS: list[eq.Solver] = [
    eq.Anderson(on=eq.ForwardBackward(), memory=3),
    eq.Broyden(on=eq.DouglasRachford(), memory=2),
    eq.Anderson(on=eq.Tseng()),
    eq.Anderson(memory=1),
]

# Schemes

SCHEMES: list[eq.Scheme] = [
    eq.Assembled(6),
    eq.Assembled(8, granularity="row", scale="mse"),
    eq.Assembled(32),
    eq.Structured(1),
    eq.Structured(3, granularity="row"),
    eq.Structured(16),
    eq.Structured(32),
    eq.Compensated(3, margin=0.1),
    eq.Compensated(1, margin=0.05, granularity="row"),
    eq.Cayley(8),
    eq.Cayley(5, granularity="tensor"),
    eq.Cayley(32, alpha=0.5),
]
SCHEME_KINDS: list[type[eq.Scheme]] = list(schemes().values())

# Operators

Build = Callable[[torch.dtype], MonotoneOperator]


def matrix(n: int, margin: float, seed: int, rank: int | None = None, gain: float = 0.5) -> Tensor:
    """A random W ``(n, n)``, float64, of margin at least ``margin`` (equal to it where rank < n)."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n if rank is None else rank, n, generator=generator, dtype=torch.float64) * gain
    B = torch.randn(n, n, generator=generator, dtype=torch.float64) * gain
    return (1 - margin) * torch.eye(n, dtype=torch.float64) - A.mT @ A + B - B.mT


def dense(n: int, margin: float, seed: int, rank: int | None = None) -> Build:
    return lambda dtype: DenseOperator(matrix(n, margin, seed, rank, gain=0.3).to(dtype))


def monotone(n: int) -> Monotone:
    torch.manual_seed(5)
    return Monotone(n, rank=max(n // 2, 1), margin=0.3).double()


def codes(scheme: eq.Scheme, n: int) -> QuantizedWeight:
    return quantize_weight(monotone(n), scheme)


def quantized(scheme: eq.Scheme, n: int = 7) -> Build:
    return lambda dtype: codes(scheme, n).operator(torch.zeros(1, dtype=dtype))


def convolved(channels: int | tuple[int, ...], size: tuple[int, int], kernel: int = 3) -> Build:
    """A convolution on one grid, or on tiers that halve."""
    tiers = (channels,) if isinstance(channels, int) else channels

    def build(dtype: torch.dtype) -> MonotoneOperator:
        torch.manual_seed(tiers[0])
        weights = MonotoneKernels(tiers, kernel, margin=0.3).to(dtype)
        sizes = tuple((size[0] // 2**i, size[1] // 2**i) for i in range(len(tiers)))
        with torch.no_grad():
            for gain in weights.a:
                gain.fill_(1.5)
            kernels = Kernels.of(tuple(k.detach() for k in weights().flat()))
            return TierOperator(kernels, Geometry(tiers, sizes, 0))

    return build


def _operators() -> Iterator[tuple[str, Build]]:
    yield "dense-1", dense(1, 0.3, 0)
    yield "dense-2", dense(2, 1.7, 1)
    yield "dense-5", dense(5, 0.2, 2, rank=2)
    yield "dense-12", dense(12, 0.05, 3)
    yield "dense-zero", lambda dtype: DenseOperator(torch.zeros(4, 4, dtype=dtype))
    eye = torch.eye(6, dtype=torch.float64)
    yield "dense-no-margin", lambda dtype: DenseOperator((matrix(4, 0.2, 5, gain=0.3) + 1.2 * eye[:4, :4]).to(dtype))
    yield "dense-large", lambda dtype: DenseOperator(matrix(6, 0.5, 4).to(dtype) * 1e3 - 1e4 * eye.to(dtype))
    yield "mon-conv", convolved(2, (5, 6))
    yield "mon-conv-wide", convolved(1, (9, 9), 5)
    yield "mon-conv-pixel", convolved(4, (1, 1), 1)
    yield "multi-tier", convolved((2, 3), (4, 4))
    yield "transposed-mon-conv", lambda dtype: convolved(2, (5, 5))(dtype).transposed()
    yield "transposed-multi-tier", lambda dtype: convolved((1, 2, 2), (8, 4))(dtype).transposed()
    yield "transposed", lambda dtype: dense(5, 0.2, 2)(dtype).transposed()
    yield "transposed-twice", lambda dtype: dense(5, 0.2, 2)(dtype).transposed().transposed()
    yield "transposed-quantized", lambda dtype: quantized(eq.Structured(2))(dtype).transposed()
    yield "transposed-cayley", lambda dtype: quantized(eq.Cayley(6))(dtype).transposed()
    plain = Dense(matrix(5, 0.2, 9))
    yield "from-weights", lambda dtype: quantize_weight(plain, eq.Structured(4)).operator(torch.zeros(1, dtype=dtype))
    for scheme in SCHEMES:
        yield f"{scheme.name}-{scheme.bits}-{scheme.granularity}", quantized(scheme)
    yield "structured-one-feature", quantized(eq.Structured(2), n=1)
    yield "compensated-one-feature", quantized(eq.Compensated(2), n=1)


OPERATORS: dict[str, Build] = dict(_operators())

LOOSE: dict[str, tuple[float, float]] = {"multi-tier": (0.01, 0.7), "transposed-multi-tier": (0.01, 0.7)}
"""Operators whose constants are proved from their blocks: which part of the true margin, of L and ‖W‖ that may cost."""
