"""A training step of a monDEQ 784–100–10 against an explicit 784–100–10's, and what Lightning adds to it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data import Batches, Data, Split
from ..errors import MissingExtraError
from ..layers import MonDEQ
from .measure import Tracker, interleave, median, spread
from .network import BATCH, CLASSES, FEATURES, Network, stepper

try:
    from ..training import TrainingConfig, fit
except MissingExtraError as error:  # then this part of the figures is left out, and says so
    NO_LIGHTNING: str | None = str(error)
else:
    NO_LIGHTNING = None

__all__ = [
    "ACCURACY",
    "NO_LIGHTNING",
    "Batch",
    "GradientError",
    "coarsest",
    "gradient_error",
    "training_step",
    "whole_batches",
]

ACCURACY = 1e-2
"""The relative error that the whole gradient of a typical batch may have."""

RESERVE = 0.7
"""Part of it that the tolerance is chosen by, since the network changes while it is timed."""

SETTLING = 60
"""Steps after which a layer in training has learned how few iterations do."""

TRIALS = 3
"""How often a tolerance has to give good gradients: what was learned goes up and down by an iteration or two."""

TOLERANCES = (0.1, 0.07, 0.05, 0.03, 0.02, 0.015, 0.01, 7e-3, 5e-3, 3e-3, 2e-3, 1e-3, 3e-4, 1e-4)

Batch = tuple[Tensor, Tensor]


class GradientError(NamedTuple):
    """‖g − g*‖/‖g*‖ of the whole gradient of a batch: the median over batches, the worst, and √(Σ‖g − g*‖²/Σ‖g*‖²).

    A ReLU that flips contributes O(1) at its coordinate however tight the solve (theory §5), and one such sample
    may dominate its batch. So the typical batch is what a tolerance is judged by, and the other two are said.
    """

    median: float
    worst: float
    together: float


def gradient_error(model: nn.Sequential, batches: list[Batch], exact: Tensor | None = None) -> GradientError:
    """How far ``model``'s gradients are from the exact ones, those of tight solves in float64."""
    true = exact_gradients(model, batches) if exact is None else exact
    error = torch.stack([_gradient(model, x, y) for x, y in batches]) - true
    relative = error.norm(dim=1) / true.norm(dim=1)
    return GradientError(float(relative.median()), float(relative.max()), float(error.norm() / true.norm()))


def exact_gradients(model: nn.Sequential, batches: list[Batch]) -> Tensor:
    """A row per batch, float64: its whole gradient at ``model``'s weights."""
    wide = copy.deepcopy(model).double()
    for module in wide:
        if isinstance(module, MonDEQ):
            module.tol = module.backward_tol = 1e-11
    return torch.stack([_gradient(wide, x.double(), y) for x, y in batches])


def _gradient(model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    grads = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


def training_step(network: Network, data: Data, steps: int, rounds: int, probes: int, tell: Tracker) -> dict[str, Any]:
    """Seconds a step of both networks in plain loops over batched tensors, a block of each in turn.

    The layer's ``tol`` and ``backward_tol`` are the coarsest at which the gradient is within ``ACCURACY`` on the
    network that is then trained on; ``gradient_error`` is the largest seen there, before and after every block.
    """
    tell("training step: tolerance")
    model = copy.deepcopy(network.model).train()
    layer = model[0]
    assert isinstance(layer, MonDEQ)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        explicit = nn.Sequential(nn.Linear(data.features, FEATURES), nn.ReLU(), nn.Linear(FEATURES, CLASSES))
    source = whole_batches(data.train)
    probed = list(islice(source, probes))
    tol, backward_tol = coarsest(model, layer, probed)
    tell("training step: side by side")
    walks = {"mondeq": stepper(model), "explicit": stepper(explicit)}
    times: dict[str, list[float]] = {name: [] for name in (*walks, "loader", "fit")}
    errors = []
    for turn in range(rounds + 1):
        batches = list(islice(source, steps))
        taken = _round(walks, batches)
        errors.append(gradient_error(model, probed))
        if turn == 0:  # a rehearsal
            continue
        for name, seconds in taken.items():
            times[name].append(seconds)
        if NO_LIGHTNING is None:
            times["fit"].append(_fitted(model, data, batches))
    largest = GradientError(*(max(column) for column in zip(*errors, strict=True)))
    return {
        "batch": BATCH,
        "steps_timed": steps * rounds,
        "tol": tol,
        "backward_tol": backward_tol,
        "gradient_error": largest.median,
        "gradient_error_worst": largest.worst,
        "gradient_error_together": largest.together,
        "gradient_reached": largest.median <= ACCURACY,
        **_summary(times),
    }


def _round(walks: Mapping[str, Callable[[Tensor, Tensor], None]], batches: list[Batch]) -> dict[str, float]:
    """Seconds a batch: of each walk over the batches, and of serving them shuffled."""
    loader = Batches(_joined(batches), BATCH, shuffle=True)
    blocks = {name: _block(step, batches) for name, step in walks.items()}
    times = interleave(blocks | {"loader": lambda: [None for _ in loader]}, 1)
    return {name: taken[0] / len(batches) for name, taken in times.items()}


def _joined(batches: list[Batch]) -> Split:
    return Split(*(torch.cat(column) for column in zip(*batches, strict=True)))


def _summary(times: dict[str, list[float]]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(times["mondeq"], times["explicit"], strict=True)]
    found: dict[str, Any] = {
        "mondeq_seconds": median(times["mondeq"]),
        "explicit_seconds": median(times["explicit"]),
        "ratio": median(ratios),
        "spread": spread(ratios),
        "loader_seconds": median(times["loader"]),
        "fit_seconds": None,
        "overhead_seconds": None,
    }
    if times["fit"]:
        beyond = [whole - plain for whole, plain in zip(times["fit"], times["mondeq"], strict=True)]
        found |= {"fit_seconds": median(times["fit"]), "overhead_seconds": median(beyond)}
    return found


def whole_batches(split: Split) -> Iterator[Batch]:
    """Whole batches, views of one tensor, over and over."""
    whole = [batch for batch in Batches(split, BATCH) if len(batch[1]) == BATCH]
    return cycle(whole)


def coarsest(model: nn.Sequential, layer: MonDEQ, probes: list[Batch]) -> tuple[float, float]:
    """Sets the layer's two tolerances to the coarsest that give good enough gradients, and returns them.

    The forward one first: errors there flip ReLUs, those of the backward solve are only as large as they are. Each
    is tried after some steps that hardly move the weights, since a layer in training learns how few iterations do.
    """
    exact = exact_gradients(model, probes)
    before = copy.deepcopy(model.state_dict())
    step = stepper(model, 1e-6)

    def serves(tol: float, backward_tol: float) -> bool:
        layer.tol, layer.backward_tol = tol, backward_tol
        for _ in range(TRIALS):
            for x, y in islice(cycle(probes), SETTLING):
                step(x, y)
            model.load_state_dict(before)
            if gradient_error(model, probes, exact).median > RESERVE * ACCURACY:
                return False
        return True

    tol = next((tol for tol in TOLERANCES if serves(tol, tol)), TOLERANCES[-1])
    backward_tol = next(backward for backward in TOLERANCES if backward <= tol or serves(tol, backward))
    layer.tol, layer.backward_tol = tol, backward_tol
    return tol, backward_tol


def _block(step: Callable[[Tensor, Tensor], None], batches: list[Batch]) -> Callable[[], object]:
    def block() -> None:
        for x, y in batches:
            step(x, y)

    return block


def _fitted(model: nn.Sequential, data: Data, batches: list[Batch]) -> float:
    """Seconds a step of :func:`equipoise.training.fit` on the same batches: its second epoch, of a copy."""
    few = Split(data.validation.x[:BATCH], data.validation.y[:BATCH])
    small = dataclasses.replace(data, train=_joined(batches), validation=few, test=few)
    config = TrainingConfig(epochs=2, batch_size=BATCH, learning_rate=1e-3, accelerator="cpu")
    result = fit(copy.deepcopy(model), small, config, progress=False)
    if result.interrupted:  # by a Ctrl-C that was meant for the whole benchmark
        raise KeyboardInterrupt
    return float(result.history[-1]["seconds"]) / len(batches)
