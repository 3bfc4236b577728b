"""Experiment 3: rounding after training against training through the quantizer, as published and structured."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import nn

from ...certificates import certify
from ...certificates.wellposed import fresh_operator
from ...errors import ConvergenceWarning, NotWellPosedError
from ...layers import MonDEQ
from ...operators import PreparedWeight
from ...penalties import MarginPenalty
from ...presets import classifier
from ...qat import convert, prepare_qat
from ...quantization.schemes import Assembled, Scheme, Structured
from ...quantize import quantize, size
from ...solvers import ForwardBackward, PeacemanRachford
from ...training import TrainingConfig, evaluate
from .measure import CAP, TOLERANCE, problem, residuals, rule_step
from .subject import FEATURES, MARGIN, RANK, Bench, train

__all__ = ["BITS", "STRUCTURED_BITS", "Trained", "Version", "Versions", "rounded", "scheme_of", "trained"]

BITS, STRUCTURED_BITS = (8, 6, 4), (4, 3, 2, 1)
SAMPLES = 64
GOOD_STEP = 0.25
TARGET = 0.05
"""Of the margin, where training holds it up."""
TRAINING_TOL = 1e-2
"""Of the solves while training, as published; versions are judged at the layer's own tolerance."""


@dataclass(frozen=True)
class Version:
    """One quantized network, ``method`` "rounded", "trained" or "held" (trained, its margin held up).

    ``margin`` is proved, of the codes; ``float_margin`` is m of the weights they came from, ``ratio`` ‖ΔW‖₂ over that;
    ``steps``: of the published rule, None at its cap."""

    scheme: str
    bits: int
    parts: str
    method: str
    accuracy: float
    margin: float
    float_margin: float
    ratio: float
    verdict: str
    steps: int | None
    size_bytes: int


@dataclass(frozen=True)
class Versions:
    """The versions rounded after training."""

    versions: tuple[Version, ...]


@dataclass(frozen=True)
class Trained:
    """One version trained through the quantizer; None, with the reason, where training lost its margin for good."""

    epochs: int
    version: Version | None
    failure: str = ""


def scheme_of(name: str, bits: int, parts: str = "W, U, b") -> Scheme:
    """As published, U and b have as many bits as W; ``parts="W"`` leaves them in floats."""
    kind = {"assembled": Assembled, "structured": Structured}[name]
    return kind(bits) if parts == "W" else kind(bits, input_bits=bits, bias_bits=bits)


def rounded(bench: Bench) -> Versions:
    """The float network rounded: assembled at 8, 6, 4 bits, structured at 4 to 1, W alone and with U and b."""
    wanted = [(name, bits) for name, all_bits in _plan() for bits in all_bits]
    found = []
    for parts in ("W, U, b", "W"):
        for name, bits in wanted:
            model = quantize(bench.network, scheme_of(name, bits, parts))
            found.append(_version(bench, model, bench.network, (name, bits, parts, "rounded")))
    return Versions(tuple(found))


def _plan() -> tuple[tuple[str, tuple[int, ...]], ...]:
    return ("assembled", BITS), ("structured", STRUCTURED_BITS)


def trained(bench: Bench, name: str, bits: int, held: bool = False) -> Trained:
    """Train through the quantizer of W, U and b from random weights, then keep exactly the codes.

    Assembled weights start as the published ones do and learn at the published rate, unless ``held``: then a
    penalty drives the margin of the codes to 0.05.
    """
    scheme, plain = scheme_of(name, bits), name == "assembled" and not held
    origin = _published_start(bench) if plain else classifier(bench.data, FEATURES, RANK, MARGIN, bench.settings.seed)
    first = _layer(origin)
    first.tol = TRAINING_TOL
    if plain and bits <= 4:
        # Such training may lose the margin, and Peaceman-Rachford with it; a short step settles on most inputs still.
        first.solver = ForwardBackward(alpha=GOOD_STEP, max_steps=100)
    config = TrainingConfig(
        bench.epochs,
        learning_rate=1e-3 if plain else 3e-3,
        weight_decay=0.0 if plain else 0.1,  # with U at few bits more of it costs accuracy
        seed=bench.settings.seed,
        margin=MarginPenalty(target=TARGET) if held else None,
    )
    model = prepare_qat(origin, scheme)
    method = "held" if held else "trained"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            train(bench, model, f"{name}-{bits}-{method}", config)
            small = convert(model)
    except NotWellPosedError as error:
        return Trained(bench.epochs, None, f"{name}, {bits} bits: {' '.join(str(error).split())}")
    _layer(small).tol, _layer(small).solver = None, PeacemanRachford()
    return Trained(bench.epochs, _version(bench, small, _free(model, origin), (name, bits, "W, U, b", method)))


def _published_start(bench: Bench) -> nn.Sequential:
    """The architecture with initial weights as in the released code: normal draws times 0.01, m = 0.2 and learned."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.settings.seed)
        A, B, U = (
            0.01 * torch.randn(*shape) for shape in ((RANK, FEATURES), (FEATURES,) * 2, (FEATURES, bench.data.features))
        )
        layer = MonDEQ.from_factors(A, B, MARGIN, U, torch.zeros(FEATURES), learn_margin=True)
        return nn.Sequential(layer, nn.Linear(FEATURES, bench.data.class_count))


def _layer(model: nn.Module) -> MonDEQ:
    layer = model[0]  # type: ignore[index]
    assert isinstance(layer, MonDEQ)
    return layer


def _free(prepared: nn.Module, like: nn.Sequential) -> nn.Module:
    """The float network whose weights a prepared one rounds."""
    weights = _layer(prepared).recurrent
    assert isinstance(weights, PreparedWeight)
    _layer(like).recurrent = weights.weights
    return like


def _version(bench: Bench, model: nn.Module, origin: nn.Module, name: tuple[str, int, str, str]) -> Version:
    layer, before = _layer(model), _layer(origin)
    x = bench.data.test.x[:SAMPLES]
    proof = certify(model, inputs=x)
    assert proof.margin is not None
    with torch.no_grad():
        delta = float(torch.linalg.matrix_norm((layer.weight - before.weight).double(), 2))
    m = fresh_operator(before).margin()
    seen = residuals(ForwardBackward(alpha=rule_step(layer.weight).alpha), problem(layer, x), CAP, TOLERANCE)
    scheme, bits, parts, method = name
    return Version(
        scheme=scheme,
        bits=bits,
        parts=parts,
        method=method,
        accuracy=_accuracy(model, bench, proof.certified),
        margin=proof.margin,
        float_margin=m,
        ratio=delta / m,
        verdict=proof.verdict,
        steps=len(seen) if seen and seen[-1] < TOLERANCE else None,
        size_bytes=size(model),
    )


def _accuracy(model: nn.Module, bench: Bench, certified: bool) -> float:
    """Share of right classes of the test split; without a margin by forward–backward with a step that suits it."""
    layer = _layer(model)
    kept = layer.solver
    if not certified:
        layer.solver = ForwardBackward(alpha=GOOD_STEP, max_steps=CAP)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return evaluate(model, bench.data.test)
    finally:
        layer.solver = kept
