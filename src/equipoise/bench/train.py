"""Epochs side by side: an explicit network, a monDEQ of the same size, and the same trained for low bits."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data import Batches, Data, Split
from ..errors import MissingExtraError
from ..layers import NEMON, MonConv2d, MonDEQ
from ..layers.equilibrium import EquilibriumLayer
from ..qat import prepare_qat
from ..quantization.schemes import Assembled, Cayley, Compensated, Scheme, Structured
from ..solvers import PeacemanRachford
from .measure import Tracker, interleave, median, spread
from .network import BATCH, CLASSES, FEATURES, Setting, stepper, trained_network, warm_up
from .rows import LESS, Row, Target, at_most_times, bytes_text, not_measured
from .step import ACCURACY, Batch, GradientError, coarsest, finer, gradient_error, whole_batches

try:
    from ..training import TrainingConfig, fit
except MissingExtraError as error:  # then this part of the figures is left out, and says so
    NO_LIGHTNING: str | None = str(error)
else:
    NO_LIGHTNING = None

__all__ = ["FULL", "QUICK", "Sizes", "measure", "memory_row", "rows", "saved_bytes", "tables"]

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


ATTEMPTS = 4
"""How often the tolerances may turn out too coarse for a network that goes on training."""


def measure(setting: Setting, tell: Tracker, sizes: Sizes | None = None) -> dict[str, Any]:
    """Seconds a step of every network; plain values, as JSON has them.

    Every network trains in a plain loop with fused Adam over tensors cut into batches of 128 beforehand, a block of
    steps of each in turn; a ratio is the median over the rounds. The tolerances of an equilibrium are the coarsest that
    keep the typical batch's gradient within 1e-2 of the exact one; it is looked at again after every block, and where
    it was not kept all is measured once more with finer ones. ``fit`` is the monDEQ in
    :func:`equipoise.training.fit`; without Lightning ``notes`` says why it is missing.
    """
    sizes, data = sizes or (QUICK if setting.quick else FULL), setting.data
    tell.expect(5 + sizes.rounds)
    tell("networks to measure on")
    models = _equilibria(data, sizes.warm_up)
    batches = whole_batches(data.train)
    probed = list(islice(batches, sizes.probes))
    tell("tolerances")
    for model in models.values():
        coarsest(model, _layer(model), probed)
    for left in reversed(range(ATTEMPTS)):
        times, errors = _timed(models, setting, sizes, batches, probed, tell)
        late = [_layer(models[name]) for name in models if errors[name].median > ACCURACY]
        if not late or not left:
            break
        tell.expect(tell.total + sizes.rounds + 1)
        for layer in late:
            finer(layer)
    tell("memory")
    memory = {str(count): saved_bytes(models["monDEQ"], probed[0], count) for count in LOOKED_AT}
    return {
        "data": data.name,
        "batch": BATCH,
        "steps_per_epoch": -(-len(data.train) // BATCH),
        "steps_timed": sizes.steps * sizes.rounds,
        "gradients": {name: _gradients(models[name], errors[name]) for name in models},
        "networks": [_row(name, times) for name, taken in times.items() if taken],
        "saved_bytes": memory,
        "notes": [] if NO_LIGHTNING is None else [f"no figures of Lightning: {NO_LIGHTNING}"],
    }


def _timed(
    models: dict[str, nn.Sequential],
    setting: Setting,
    sizes: Sizes,
    batches: Iterator[Batch],
    probed: list[Batch],
    tell: Tracker,
) -> tuple[dict[str, list[float]], dict[str, GradientError]]:
    """Seconds a step of each round, and the worst looks at the gradients of the equilibria."""
    walks: dict[str, nn.Module] = {"explicit": _explicit(setting.data), **models}
    walks |= {name: prepare_qat(models["monDEQ"], scheme) for name, scheme in SCHEMES.items()}
    steps = {name: stepper(walk, STANDING) for name, walk in walks.items()}
    times: dict[str, list[float]] = {name: [] for name in (*walks, "fit", "loader")}
    errors: dict[str, list[GradientError]] = {name: [] for name in models}
    for turn in range(sizes.rounds + 1):
        tell("side by side")
        given = list(islice(batches, sizes.steps))
        taken = interleave(_blocks(steps, given), 1)
        for name, model in models.items():
            errors[name].append(gradient_error(model, probed))
        if turn:  # the first round is a rehearsal
            for name, (seconds, *_) in taken.items():
                times[name].append(seconds / sizes.steps)
            if NO_LIGHTNING is None:
                times["fit"].append(_fitted(models["monDEQ"], setting.data, given))
    return times, {name: GradientError(*map(max, zip(*looks, strict=True))) for name, looks in errors.items()}


def _equilibria(data: Data, steps: int) -> dict[str, nn.Sequential]:
    """A monDEQ and a NEMON 784–100–10 after a moment of training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nemon = nn.Sequential(NEMON(data.features, FEATURES, tol=1e-2), nn.Linear(FEATURES, CLASSES))
    warm_up(nemon, data, steps)
    return {"monDEQ": trained_network(data, steps, margin=MARGIN, decay=DECAY).model.train(), "NEMON": nemon}


def _layer(model: nn.Sequential) -> EquilibriumLayer:
    layer = model[0]
    assert isinstance(layer, EquilibriumLayer)
    return layer


def _gradients(model: nn.Sequential, worst: GradientError) -> dict[str, Any]:
    """How good they were, at which tolerances and steps of the solver."""
    forward, backward = _solver_steps(_layer(model))
    return {
        "tol": _layer(model).tol,
        "backward_tol": _layer(model).backward_tol,
        "error": worst.median,
        "error_worst": worst.worst,
        "error_together": worst.together,
        "reached": worst.median <= ACCURACY,
        "solver_steps": [forward, backward],
        "margin": float(_layer(model).operator.margin()),
    }


def _blocks(steps: dict[str, Callable[[Tensor, Tensor], None]], given: list[Batch]) -> dict[str, Callable[[], object]]:
    """Each network's steps over the batches, and serving them shuffled without any."""

    def block(step: Callable[[Tensor, Tensor], None]) -> Callable[[], object]:
        def steps() -> None:
            for x, y in given:
                step(x, y)

        return steps

    loader = Batches(_joined(given), BATCH, shuffle=True)
    return {name: block(step) for name, step in steps.items()} | {"loader": lambda: [None for _ in loader]}


def _joined(batches: list[Batch]) -> Split:
    return Split(*(torch.cat(column) for column in zip(*batches, strict=True)))


def _fitted(model: nn.Sequential, data: Data, batches: list[Batch]) -> float:
    """Seconds a step of :func:`equipoise.training.fit` on the same batches: its second epoch, of a copy."""
    few = Split(data.validation.x[:BATCH], data.validation.y[:BATCH])
    small = dataclasses.replace(data, train=_joined(batches), validation=few, test=few)
    config = TrainingConfig(epochs=2, batch_size=BATCH, learning_rate=STANDING, accelerator="cpu")
    result = fit(copy.deepcopy(model), small, config, progress=False)
    if result.interrupted:  # by a Ctrl-C that was meant for the whole benchmark
        raise KeyboardInterrupt
    return float(result.history[-1]["seconds"]) / len(batches)


def rows(found: dict[str, Any]) -> list[Row]:
    """The ratios of the steps' times, and of what a step keeps."""
    networks = {row["name"]: row for row in found["networks"]}
    explicit, floats = networks["explicit"]["seconds"], networks["monDEQ"]["seconds"]
    listed = []
    for name, target in (
        ("monDEQ", Target("≤ 3.5×, wished 2.5×", lambda ratio: ratio <= 3.5)),
        ("NEMON", at_most_times(4)),
    ):
        row, good = networks[name], found["gradients"][name]
        what = f"training step, {name} 784–100–10, gradients to {good['error']:.1e}"
        listed.append(Row.timed(what, row["seconds"], explicit, "explicit 784–100–10", row["to_explicit"], target))
    for name in SCHEMES:
        what = f"training step through {name}"
        row = networks[name]
        listed.append(Row.timed(what, row["seconds"], floats, "float monDEQ", row["to_float"], at_most_times(1.3)))
    what = "the monDEQ's step in training.fit"
    if "fit" in networks:
        listed.append(
            Row.timed(what, networks["fit"]["seconds"], floats, "in a plain loop", networks["fit"]["to_float"], LESS)
        )
    else:
        listed.append(not_measured(what, found["notes"][0]))
    return [*listed, memory_row("a training step keeps, monDEQ", found["saved_bytes"])]


def memory_row(what: str, saved: dict[str, int]) -> Row:
    """That what a step keeps does not grow with the steps of the solver."""
    (few, less), (many, more) = saved.items()
    target = Target("= 1×", lambda ratio: ratio == 1)
    return Row.of(f"{what}, {many} solver steps", bytes_text(more), f"{bytes_text(less)} at {few}", more / less, target)


def tables(found: dict[str, Any]) -> list[Table]:
    """All that was measured."""
    title = f"Training on {found['data']}, batch {found['batch']}"
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
    gradients = Table(title="Gradients at these tolerances", title_justify="left")
    for column in ("network", "tol", "backward_tol", "error", "worst batch", "together", "solver steps"):
        gradients.add_column(column, justify="left" if column == "network" else "right")
    for name, good in found["gradients"].items():
        reached = "" if good["reached"] else ", not reached"
        errors = (f"{good[key]:.1e}" for key in ("error_worst", "error_together"))
        counts = " and ".join(map(str, good["solver_steps"]))
        gradients.add_row(
            name, f"{good['tol']:g}", f"{good['backward_tol']:g}", f"{good['error']:.1e}{reached}", *errors, counts
        )
    memory = Table(title="What a training step keeps for its backward pass", title_justify="left")
    memory.add_column("solver steps", justify="right")
    memory.add_column("bytes", justify="right")
    for count, size in found["saved_bytes"].items():
        memory.add_row(count, f"{size:,}")
    return [times, gradients, memory]


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


def _solver_steps(layer: EquilibriumLayer) -> tuple[int | None, int | None]:
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
