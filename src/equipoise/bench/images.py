"""Equilibria on images side by side: two splittings, and a map that contracts beside one that need not.

Every ratio is of tasks that took turns in one run.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data import Data, load_data
from ..errors import ConvergenceWarning
from ..layers import MDEQ, LipschitzMDEQ, MonConv2d
from ..presets import Sizes, multiscale, preset_of
from ..report.words import at_most
from ..solvers import ForwardBackward, PeacemanRachford, Solver
from .measure import Tracker, interleave, median, relative_error, spread
from .network import Setting, stepper
from .rows import Row, Target, at_least_times
from .train import memory_row, saved_bytes

__all__ = ["FULL", "QUICK", "Size", "measure", "rows", "tables"]

GOAL = 4.75
"""How many times less the Lipschitz network should take."""

FB_STEPS, TOL, FLOOR = 200, 1e-3, 1e-6
PR_STEPS = (5, 7, 10, 14, 20, 28, 40, 57, 80, 113, 160, 200)
LOOKED_AT = (20, 200)
KINDS: dict[str, type[MDEQ] | type[LipschitzMDEQ]] = {"lmdeq": LipschitzMDEQ, "mdeq": MDEQ}


class Size(NamedTuple):
    """How much is measured: preset of the convolution, batch, training steps before anything is, rounds."""

    preset: str
    batch: int
    warm_up: int
    rounds: int


FULL, QUICK = Size("published", 128, 30, 3), Size("small", 32, 5, 2)


def measure(setting: Setting, tell: Tracker, size: Size | None = None) -> dict[str, Any]:
    """Plain values, as JSON has them. MNIST and CIFAR-10 come from the folder of data, else all is done on digits.

    On a single convolution, trained for a moment: the time of 200 forward–backward steps, of the best step size, and
    of as few Peaceman–Rachford steps as reach the same error. On two multiscale networks of one size, trained for as
    many steps: evaluations, failures and times of a training step and of inference at the same tolerance.
    """
    size = size or (QUICK if setting.quick else FULL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # runs of a fixed length do not converge; failures count
        return _measured(size, setting.data_dir, tell)


def _measured(size: Size, data_dir: str | Path | None, tell: Tracker) -> dict[str, Any]:
    tell.expect(5)
    here = data_dir is not None or bool(os.environ.get("EQUIPOISE_DATA"))
    tell("data")
    grey = load_data("mnist" if here else "digits", data_dir)
    colour = load_data("cifar10", data_dir) if here else grey
    tell("a convolution to measure on")
    model = preset_of("monconv", size.preset).build(grey, Sizes())
    _warm_up(model, grey, size)
    tell("splittings")
    found: dict[str, Any] = {"data": [grey.name, colour.name], "size": size._asdict()}
    found["splittings"] = splittings(model, grey.test.x[: size.batch], size.rounds)
    batch = grey.train.x[: size.batch], grey.train.y[: size.batch]
    found["saved_bytes"] = {str(count): saved_bytes(model.train(), batch, count) for count in LOOKED_AT}
    tell("multiscale networks")
    networks = {name: multiscale(kind, "tiny", colour, Sizes(), tol=TOL) for name, kind in KINDS.items()}
    for network in networks.values():
        _warm_up(network, colour, size)
    tell("multiscale networks, side by side")
    found["multiscale"] = multiscales(networks, colour, size)
    return found


def _warm_up(model: nn.Sequential, data: Data, size: Size) -> None:
    step = stepper(model.train())
    for x, y in _batches(data, size):
        step(x, y)
    model.eval()


def _batches(data: Data, size: Size) -> list[tuple[Tensor, Tensor]]:
    split = data.train
    parts = list(zip(split.x.split(size.batch), split.y.split(size.batch), strict=True))
    return [parts[i % (len(parts) - 1)] for i in range(size.warm_up)]


@torch.no_grad()
def splittings(model: nn.Sequential, x: Tensor, rounds: int) -> dict[str, Any]:
    """The layer's forward pass by both splittings, to the error of 200 forward–backward steps."""
    layer = model[1]
    assert isinstance(layer, MonConv2d)
    images = model[0](x)
    exact = _wide(layer).solve(images.double(), tol=1e-9).value

    def steps(solver: Solver) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            layer.solver, layer.tol = solver, 1e-30  # nothing ends it before its budget
            z: Tensor = layer(images)
            return z

        return forward

    before = layer.solver, layer.tol
    try:
        slow = steps(ForwardBackward(max_steps=FB_STEPS, check_every=FB_STEPS))
        target = relative_error(slow().flatten(1), exact)
        for count in PR_STEPS:
            fast = steps(PeacemanRachford(max_steps=count, check_every=count))
            error = relative_error(fast().flatten(1), exact)
            if error <= max(target, FLOOR):
                break
        times = interleave({"forward-backward": slow, "peaceman-rachford": fast}, rounds)
    finally:
        layer.solver, layer.tol = before
    ratios = [a / b for a, b in zip(times["forward-backward"], times["peaceman-rachford"], strict=False)]
    return {
        "batch": len(x),
        "channels": layer.channels,
        "forward-backward": {"steps": FB_STEPS, "error": target, "seconds": median(times["forward-backward"])},
        "peaceman-rachford": {"steps": count, "error": error, "seconds": median(times["peaceman-rachford"])},
        "ratio": median(ratios),
        "spread": spread(ratios),
    }


def _wide(layer: MonConv2d) -> MonConv2d:
    """The same layer in float64."""
    copied = MonConv2d(layer.in_channels, layer.channels, layer.image_size, stride=layer.injection.stride[0],
                       learn_margin=True)  # fmt: skip
    copied.load_state_dict(layer.state_dict())
    return copied.double().eval()


def multiscales(networks: dict[str, nn.Sequential], data: Data, size: Size) -> dict[str, Any]:
    """Both networks at the same tolerance: what a training step and inference take, counted and timed."""
    x, y = data.train.x[: size.batch], data.train.y[: size.batch]
    test = data.test.x[: size.batch]
    found: dict[str, Any] = {}
    for name, model in networks.items():
        network: Any = model[1]
        model.train()
        network.tally.reset()
        cross_entropy(model(x), y).backward()
        step = network.tally
        row = {
            "forward": step.evaluations / step.samples,
            "backward": step.backward_evaluations / step.backward_samples,
            "failures_in_step": max(step.failures, step.backward_failures),
        }
        model.eval()
        network.tally.reset()
        with torch.no_grad():
            model(test)
        row |= {"inference": step.evaluations / step.samples, "failures": step.failures, "samples": len(test)}
        found[name] = row
    # One after the other: what evaluation proves of the weights it keeps until a training step changes them.
    times = interleave({f"{name} inference": _inference(model, test) for name, model in networks.items()}, size.rounds)
    times |= interleave({f"{name} step": _step(model, x, y) for name, model in networks.items()}, size.rounds)
    for name in networks:
        found[name] |= {"step_seconds": median(times[f"{name} step"])}
        found[name] |= {"inference_seconds": median(times[f"{name} inference"])}
    ours, plain = found["lmdeq"], found["mdeq"]
    found["ratios"] = {
        "evaluations_step": (plain["forward"] + plain["backward"]) / (ours["forward"] + ours["backward"]),
        "evaluations_inference": plain["inference"] / ours["inference"],
        "time_step": plain["step_seconds"] / ours["step_seconds"],
        "time_inference": plain["inference_seconds"] / ours["inference_seconds"],
    }
    lipschitz = networks["lmdeq"][1]
    assert isinstance(lipschitz, LipschitzMDEQ)
    found["contraction"] = lipschitz.contraction()
    return found


def _inference(model: nn.Module, x: Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def task() -> object:
        return model.eval()(x)

    return task


def _step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    def task() -> object:
        model.train().zero_grad()
        cross_entropy(model(x), y).backward()
        return None

    return task


def rows(found: dict[str, Any]) -> list[Row]:
    """The ratios: a splitting to another, and a map that contracts to one that need not."""
    race, both = found["splittings"], found["multiscale"]
    ours, theirs, ratios = both["lmdeq"], both["mdeq"], both["ratios"]
    fast, slow = race["peaceman-rachford"], race["forward-backward"]
    what = f"single convolution, forward pass, batch {race['batch']}, Peaceman–Rachford, {fast['steps']} steps"
    peer = f"forward–backward, {slow['steps']} steps"
    listed = [
        Row.timed(what, fast["seconds"], slow["seconds"], peer, race["ratio"], at_least_times(3)),
        memory_row("a training step keeps, single convolution", found["saved_bytes"]),
    ]
    counted = {"training step": [row["forward"] + row["backward"] for row in (ours, theirs)]}
    counted["inference"] = [row["inference"] for row in (ours, theirs)]
    for what, key in (("training step", "step"), ("inference", "inference")):
        few, many = (f"{count:.1f}" for count in counted[what])
        name = f"Lipschitz MDEQ, {what}"
        # asked for is either of the two
        best = max(ratios[f"evaluations_{key}"], ratios[f"time_{key}"])
        either = Target("≥ 4.75×, or its time", lambda _, best=best: best >= GOAL)  # type: ignore[misc]
        listed.append(Row.of(f"{name}, evaluations", few, f"{many} MDEQ", ratios[f"evaluations_{key}"], either))
        times = ours[f"{key}_seconds"], theirs[f"{key}_seconds"]
        listed.append(Row.timed(f"{name}, time", *times, "MDEQ", ratios[f"time_{key}"], None))
    failed = (f"{row['failures']} of {row['samples']}" for row in (ours, theirs))
    none = Target("none", lambda _: ours["failures"] == 0)
    return [*listed, Row.of("Lipschitz MDEQ, solves that fail", next(failed), f"{next(failed)} MDEQ", None, none)]


def tables(found: dict[str, Any]) -> list[Table]:
    """All that was measured."""
    race = found["splittings"]
    splitting = Table(title=f"Single convolution, batch {race['batch']}, {race['channels']} channels, forward pass")
    for heading in ("splitting", "steps", "worst relative error", "time"):
        splitting.add_column(heading, justify="left" if heading == "splitting" else "right")
    for name in ("forward-backward", "peaceman-rachford"):
        row = race[name]
        splitting.add_row(name, str(row["steps"]), f"{row['error']:.1e}", f"{1e3 * row['seconds']:.0f} ms")
    splitting.caption = f"ratio {race['ratio']:.1f}, spread {race['spread']:.2f}"
    both = found["multiscale"]
    scale = Table(title=f"Multiscale networks at relative residual {TOL:g}, {found['data'][1]}")
    heads = ("network", "forward", "backward", "step", "inference", "an inference", "failures")
    for heading in heads:
        scale.add_column(heading, justify="left" if heading == "network" else "right")
    for name in KINDS:
        row = both[name]
        scale.add_row(
            name,
            f"{row['forward']:.1f}",
            f"{row['backward']:.1f}",
            f"{1e3 * row['step_seconds']:.0f} ms",
            f"{row['inference']:.1f}",
            f"{1e3 * row['inference_seconds']:.0f} ms",
            f"{row['failures']} of {row['samples']}",
        )
    ratios = both["ratios"]
    scale.caption = (
        f"evaluations of f a sample; plain over Lipschitz: step {ratios['evaluations_step']:.1f} in evaluations, "
        f"{ratios['time_step']:.1f} in time; inference {ratios['evaluations_inference']:.1f} and "
        f"{ratios['time_inference']:.1f}; contraction at most {at_most(both['contraction'], 3)}"
    )
    return [splitting, scale]
