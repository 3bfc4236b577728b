"""Epochs side by side: an explicit network, a monDEQ of the same size, and the same trained for low bits."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data import Data
from ..layers import MonConv2d, MonDEQ
from ..qat import prepare_qat
from ..quantization.schemes import Assembled, Cayley, Compensated, Scheme, Structured
from ..solvers import PeacemanRachford
from .measure import Progress, Tracker, bar, interleave, machine, median, spread
from .network import BATCH, CLASSES, FEATURES, images, stepper, trained_network
from .step import ACCURACY, Batch, coarsest, gradient_error, whole_batches

__all__ = ["run", "saved_bytes", "table"]

MARGIN, DECAY = 1.0, 0.3
"""What the margin starts from, and the weight decay, as in ``equipoise train``."""

STANDING = 1e-6
"""Learning rate of the timed steps: all of them are of the network as it is, a few epochs into training."""

LOOKED_AT = (20, 200)
"""Steps of the solver between which a training step's memory is compared."""

SCHEMES: dict[str, Scheme] = {
    "structured, 2 bits": Structured(2),
    "structured, U 2 bits too": Structured(2, input_bits=2),
    "assembled, 4 bits": Assembled(4),
    "compensated, 4 bits": Compensated(4),
    "cayley, 8 bits": Cayley(8),
}


class Sizes(NamedTuple):
    """How much is measured: steps before anything is, steps in a block, blocks, batches that gradients are of."""

    warm_up: int
    steps: int
    rounds: int
    probes: int


FULL, QUICK = Sizes(1500, 120, 9, 12), Sizes(200, 20, 3, 4)


def run(data_dir: str | Path | None = None, quick: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Measure; plain values, as JSON has them. ``data_dir`` as in :func:`equipoise.bench.solve.run`.

    Every network trains in a plain loop with fused Adam over tensors cut into batches of 128 beforehand, a block of
    steps of each in turn; a ratio is the median over the rounds. The monDEQ's tolerances are the coarsest that keep
    the typical batch's gradient within 1e-2 of the exact one; it is looked at again after every block.
    """
    with contextlib.nullcontext(progress) if progress is not None else bar() as tell:
        return measure(QUICK if quick else FULL, data_dir, tell)


def measure(sizes: Sizes, data_dir: str | Path | None, progress: Progress) -> dict[str, Any]:
    """:func:`run` at given sizes."""
    tell = Tracker(progress, 4 + sizes.rounds)
    tell("data")
    data, notes = images(data_dir)
    tell("a network to measure on")
    network = trained_network(data, sizes.warm_up, margin=MARGIN, decay=DECAY)
    model = copy.deepcopy(network.model).train()
    layer = model[0]
    assert isinstance(layer, MonDEQ)
    batches = whole_batches(data.train)
    probed = list(islice(batches, sizes.probes))
    tell("tolerance")
    tol, backward_tol = coarsest(model, layer, probed)
    walks: dict[str, nn.Module] = {"explicit": _explicit(data), "monDEQ": model}
    walks |= {name: prepare_qat(model, scheme) for name, scheme in SCHEMES.items()}
    steps = {name: stepper(walk, STANDING) for name, walk in walks.items()}
    times: dict[str, list[float]] = {name: [] for name in walks}
    errors = []
    for turn in range(sizes.rounds + 1):
        tell("side by side")
        given = list(islice(batches, sizes.steps))
        taken = interleave({name: _block(step, given) for name, step in steps.items()}, 1)
        errors.append(gradient_error(model, probed))
        if turn:  # the first round is a rehearsal
            for name, (seconds, *_) in taken.items():
                times[name].append(seconds / sizes.steps)
    tell("memory")
    memory = {str(count): saved_bytes(model, probed[0], count) for count in LOOKED_AT}
    tell.finish()
    return {
        "equipoise": version("equipoise"),
        "machine": machine(),
        "data": data.name,
        "batch": BATCH,
        "steps_per_epoch": -(-len(data.train) // BATCH),
        "steps_timed": sizes.steps * sizes.rounds,
        "tol": tol,
        "backward_tol": backward_tol,
        "gradient_error": max(error.median for error in errors),
        "gradient_error_worst": max(error.worst for error in errors),
        "gradient_reached": max(error.median for error in errors) <= ACCURACY,
        "solver_steps": _solver_steps(layer),
        "margin": float(layer.operator.margin()),
        "networks": [_row(name, times) for name in times],
        "saved_bytes": memory,
        "notes": notes,
    }


def table(found: dict[str, Any]) -> list[Table]:
    """What :func:`run` found, for a terminal."""
    forward, backward = found["solver_steps"]
    title = (
        f"Training on {found['data']}, batch {found['batch']}, {found['machine']['threads']} threads; gradients within"
        f" {found['gradient_error']:.1e}, {forward} solver steps forward and {backward} back"
    )
    times = Table(title=title, title_justify="left")
    for column in ("network", "ms a step", "s an epoch", "× explicit", "× monDEQ", "spread"):
        times.add_column(column, justify="left" if column == "network" else "right")
    for row in found["networks"]:
        seconds = row["seconds"]
        times.add_row(
            row["name"],
            f"{1e3 * seconds:.2f}",
            f"{seconds * found['steps_per_epoch']:.2f}",
            f"{row['to_explicit']:.2f}",
            f"{row['to_float']:.2f}",
            f"{row['spread']:.2f}",
        )
    memory = Table(title="What a training step keeps for its backward pass", title_justify="left")
    memory.add_column("solver steps", justify="right")
    memory.add_column("bytes", justify="right")
    for count, size in found["saved_bytes"].items():
        memory.add_row(count, f"{size:,}")
    return [times, memory]


def saved_bytes(model: nn.Sequential, batch: Batch, steps: int) -> int:
    """Bytes that autograd keeps between the forward and the backward pass where the solver takes ``steps`` steps."""
    copied = copy.deepcopy(model)
    for module in copied:
        if isinstance(module, (MonDEQ, MonConv2d)):  # it never looks before its budget is spent
            module.solver, module.training_tol = PeacemanRachford(max_steps=steps, check_every=steps), 0.5
            module.tol = module.backward_tol = 0.5
    seen: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        seen[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = cross_entropy(copied(batch[0]), batch[1])
    total = sum(tensor.numel() * tensor.element_size() for tensor in seen.values())
    loss.backward()
    return total


def _explicit(data: Data) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(data.features, FEATURES), nn.ReLU(), nn.Linear(FEATURES, CLASSES))


def _block(step: Callable[[Tensor, Tensor], None], batches: list[Batch]) -> Callable[[], object]:
    def block() -> None:
        for x, y in batches:
            step(x, y)

    return block


def _solver_steps(layer: MonDEQ) -> tuple[int | None, int | None]:
    """Where the last solves of training ended, forward and backward."""
    memory = layer.training_memory
    return (None, None) if memory is None else (memory.forward.first, memory.backward.first)


def _row(name: str, times: dict[str, list[float]]) -> dict[str, Any]:
    def ratio(other: str) -> list[float]:
        return [mine / theirs for mine, theirs in zip(times[name], times[other], strict=True)]

    return {
        "name": name,
        "seconds": median(times[name]),
        "to_explicit": median(ratio("explicit")),
        "to_float": median(ratio("monDEQ")),
        "spread": spread(ratio("explicit")),
    }
