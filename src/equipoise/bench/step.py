"""How good the gradients of an equilibrium network are, and the coarsest tolerances at which they are good enough."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import cycle, islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data import Batches, Split
from ..layers.equilibrium import EquilibriumLayer
from .network import BATCH, stepper

__all__ = [
    "ACCURACY",
    "Batch",
    "GradientError",
    "coarsest",
    "exact_gradients",
    "finer",
    "gradient_error",
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
        if isinstance(module, EquilibriumLayer):
            module.tol = module.backward_tol = 1e-11
    return torch.stack([_gradient(wide, x.double(), y) for x, y in batches])


def _gradient(model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    grads = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


def whole_batches(split: Split) -> Iterator[Batch]:
    """Whole batches, views of one tensor, over and over."""
    whole = [batch for batch in Batches(split, BATCH) if len(batch[1]) == BATCH]
    return cycle(whole)


def coarsest(model: nn.Sequential, layer: EquilibriumLayer, probes: list[Batch]) -> tuple[float, float]:
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


def finer(layer: EquilibriumLayer) -> None:
    """The layer's tolerances, each one place further in the list."""
    layer.tol, layer.backward_tol = (
        next((finer for finer in TOLERANCES if finer < given), TOLERANCES[-1])
        for given in (layer.tol or TOLERANCES[0], layer.backward_tol or TOLERANCES[0])
    )
