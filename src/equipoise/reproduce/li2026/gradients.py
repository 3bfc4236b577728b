"""Experiment 6: the gradient's error against ‖ΔW‖₂, and how much of it is activations that flipped (theory §5, T5)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...certificates.wellposed import fresh_operator
from ...layers import MonDEQ
from ...quantization.schemes import Assembled
from ...quantize import quantize
from .displacement import published_solve
from .subject import Bench

__all__ = ["BITS", "Error", "Gradients", "Sensitivity", "adjoint", "flipped_share", "measure"]

BITS = (5, 6, 7, 8, 10, 12, 16, 32)
SAMPLES, QUICK_SAMPLES, BATCH = 1280, 512, 256


@dataclass(frozen=True)
class Error:
    """One number of bits. ``error``: ‖∇̃ − ∇‖_F/‖∇‖_F of the mean loss's gradient for W; ``frozen``: the same with
    the float network's active set in the backward solve; ``flip_share``: of the squared error per sample, the part
    due to flips; ``flipped``: share of the activations that flipped. ``head``: mean error norm of the head's gradients
    over batches of 256; ``published_head``: of the first batch, W, U and b rounded, with the published solver."""

    bits: int
    delta_norm: float
    error: float
    frozen: float
    flip_share: float
    flipped: float
    samples_flipped: float
    head: float
    published_head: float


@dataclass(frozen=True)
class Gradients:
    """All bits whose margin is proved; slopes are those of log error against log ‖ΔW‖₂ (1: proportional)."""

    samples: int
    errors: tuple[Error, ...]
    slope: float | None
    frozen_slope: float | None


@dataclass(frozen=True)
class Sensitivity:
    """A network at its equilibria: z*, W, the active set D ``(B, n)``, ∂loss/∂z* and ∂loss/∂scores per sample."""

    z: Tensor
    W: Tensor
    D: Tensor
    g: Tensor
    score_gradient: Tensor


def measure(bench: Bench) -> Gradients:
    """Gradients of the cross-entropy on test samples, float against each number of bits, in float64."""
    count = min(QUICK_SAMPLES if bench.settings.quick else SAMPLES, len(bench.data.test))
    split = bench.data.test
    x, y = split.x[:count].double(), split.y[:count]
    here = _sensitivity(bench.wide, x, y)
    errors = []
    for bits in BITS:
        model = quantize(bench.wide, Assembled(bits))
        layer = model[0]  # type: ignore[index]
        assert isinstance(layer, MonDEQ)
        if fresh_operator(layer).margin() > 0:
            errors.append(_error(bits, here, _sensitivity(model, x, y), _published_head(bench, bits)))
    pairs = [(found.delta_norm, found.error, found.frozen) for found in errors]
    return Gradients(count, tuple(errors), _slope([p[:2] for p in pairs]), _slope([(p[0], p[2]) for p in pairs]))


@torch.no_grad()
def _sensitivity(model: nn.Module, x: Tensor, y: Tensor) -> Sensitivity:
    layer, head = model[0], model[1]  # type: ignore[index]
    assert isinstance(layer, MonDEQ)
    assert isinstance(head, nn.Linear)
    z, W = layer.solve(x, tol=1e-12).value, layer.weight
    active = (z @ W.mT + layer.injection(x) > 0).double()
    scores = torch.softmax(head(z), 1) - nn.functional.one_hot(y, head.out_features)
    return Sensitivity(z, W, active, scores @ head.weight, scores)


@torch.no_grad()
def adjoint(W: Tensor, D: Tensor, g: Tensor) -> Tensor:
    """y ``(B, n)`` with y = D (Wᵀ y + g), solved directly, sample by sample (theory §3)."""
    unit = torch.eye(len(W), dtype=W.dtype)
    parts = zip(D.split(BATCH), g.split(BATCH), strict=True)
    return torch.cat([torch.linalg.solve(unit - d[:, :, None] * W.mT, d * part) for d, part in parts])


def flipped_share(true: Tensor, frozen: Tensor, reference: Tensor) -> float:
    """‖y − y_f‖²/(‖y − y_f‖² + ‖y_f − y₀‖²) over all samples: y of the quantized network, y_f the same with the
    reference's active set, y₀ the reference's own; 0 where nothing differs."""
    flips, rest = float((true - frozen).square().sum()), float((frozen - reference).square().sum())
    return flips / (flips + rest) if flips + rest > 0 else 0.0


def _error(bits: int, here: Sensitivity, there: Sensitivity, published_head: float) -> Error:
    base, true = adjoint(here.W, here.D, here.g), adjoint(there.W, there.D, there.g)
    frozen = adjoint(there.W, here.D, there.g)
    gradient = base.mT @ here.z
    flips = here.D != there.D
    return Error(
        bits=bits,
        delta_norm=float(torch.linalg.matrix_norm(there.W - here.W, 2)),
        error=_relative(true.mT @ there.z, gradient),
        frozen=_relative(frozen.mT @ there.z, gradient),
        flip_share=flipped_share(true, frozen, base),
        flipped=float(flips.double().mean()),
        samples_flipped=float(flips.any(1).double().mean()),
        head=_head_error([_head_gradients(side.z, side.score_gradient) for side in (here, there)]),
        published_head=published_head,
    )


def _relative(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def _head_gradients(z: Tensor, scores: Tensor) -> list[Tensor]:
    """The head's gradients, weight (k, n) and bias (k,), of the mean loss of each batch of 256."""
    parts = [(z[rows], scores[rows]) for rows in torch.arange(len(z)).split(BATCH)]
    return [gradient for a, s in parts for gradient in (s.mT @ a / len(a), s.mean(0))]


def _head_error(pair: list[list[Tensor]]) -> float:
    """The mean norm of the differences between two lists of gradients."""
    found = [float((b - a).norm()) for a, b in zip(*pair, strict=True)]
    return sum(found) / len(found)


@torch.no_grad()
def _published_head(bench: Bench, bits: int) -> float:
    x, y = bench.data.test.x[:BATCH], bench.data.test.y[:BATCH]
    head = bench.network[1]
    rounded = quantize(bench.network, Assembled(bits, input_bits=bits, bias_bits=bits))
    gradients = []
    for model in (bench.network, rounded):
        z = published_solve(model, x)
        scores = torch.softmax(head(z), 1) - nn.functional.one_hot(y, bench.data.class_count)
        gradients.append(_head_gradients(z, scores))
    return _head_error(gradients)


def _slope(points: list[tuple[float, float]]) -> float | None:
    """The least-squares slope of log y against log x."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len(logs) < 2:
        return None
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread if spread > 0 else None
