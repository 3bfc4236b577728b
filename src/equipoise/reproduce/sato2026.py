"""Sato, Iiduka: Lipschitz multiscale deep equilibrium models [SI26].

Its experiment on CIFAR-10: a multiscale DEQ whose map contracts, against the plain one of the same size, at the same
tolerance, as the slope s of its ReLUs varies: accuracy, evaluations of the map forward and backward, and time. The
paper caps the norms of reshaped kernels, so its contraction is nominal; the caps here are of true operator norms.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ..data import Data
from ..errors import ConvergenceWarning
from ..layers import MDEQ, LipschitzMDEQ
from ..presets import Sizes, multiscale, preset_of
from ..report.canvas import COLOURS, Figure, figure, level
from ..report.words import MISSING, at_most
from ..solvers import Anderson
from ..training import evaluate
from .record import PERCENT, Comparison, Reproduction, Section, Table, compared, decimals
from .resumed import less, resumed
from .run import UNFINISHED, Bench, Experiment, Paper, Settings

__all__ = ["PAPER"]

TOL = 1e-3
SLOPES = (0.2, 0.4, 0.6, 0.8)
PLAIN = "mdeq"
PUBLISHED_SPEEDUP, PUBLISHED_ACCURACY = 4.75, 0.938
LIMIT = 20
"""Evaluations that the plain network's solver may take; the paper has 18 forward and 20 backward."""

QUICK: dict[str, Any] = {"epochs": 2, "learning_rate": 3e-3}
TIMED = 3
"""Training steps and batches that are timed, each after one that is not."""


@dataclass(frozen=True)
class Found:
    """One network, trained and measured at the same tolerance as the others.

    ``contraction`` and ``training_contraction``, without and with dropout, are proved; None of a plain network.
    Evaluations are means per sample, forward of the test split, ``step_`` of training steps; ``failures`` are test
    images whose solve did not reach the tolerance, ``step_failures`` the share of samples, forward or backward.
    """

    slope: float | None
    accuracy: float
    parameters: int
    contraction: float | None
    training_contraction: float | None
    evaluations: float
    failures: int
    images: int
    inference: float
    step_forward: float
    step_backward: float
    step_failures: float
    step: float
    epochs: int
    samples: int


def begin(settings: Settings, data: Data, folder: Path) -> Bench:
    """A quick run sees the first samples only."""
    return Bench(settings, less(data, 1_500, 200) if settings.quick else data, folder)


def measure(bench: Bench, slope: float | None) -> Found:
    """Train one network, plain where ``slope`` is None, and count and time what it takes."""
    quick, data, seed = bench.settings.quick, bench.data, bench.settings.seed
    name = PLAIN if slope is None else f"lmdeq-{slope:g}"
    options: dict[str, Any] = {"tol": TOL}
    options |= {"solver": Anderson(safeguard=False, max_steps=LIMIT)} if slope is None else {"slope": slope}
    kind: type[MDEQ] | type[LipschitzMDEQ] = MDEQ if slope is None else LipschitzMDEQ
    model = multiscale(kind, "tiny", data, Sizes(seed=seed), **options)
    config = preset_of("mdeq", "tiny").config(data.name, seed=seed, **(QUICK if quick else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # counted below
        resumed(model, data, config, bench.folder / UNFINISHED / name)
        return _measured(model, data, slope, config.epochs)


def _measured(model: nn.Sequential, data: Data, slope: float | None, epochs: int) -> Found:
    network: Any = model[1]
    network.tally.reset()
    accuracy = evaluate(model, data.test)
    evaluations, failures = network.tally.evaluations / network.tally.samples, network.tally.failures
    proved = isinstance(network, LipschitzMDEQ)
    steps = _steps(copy.deepcopy(model), data)
    return Found(
        slope=slope,
        accuracy=accuracy,
        parameters=sum(p.numel() for p in model.parameters()),
        contraction=network.contraction() if proved else None,
        training_contraction=network.contraction(training=True) if proved else None,
        evaluations=evaluations,
        failures=failures,
        images=len(data.test),
        inference=_inference(model, data),
        **steps,
        epochs=epochs,
        samples=len(data.train),
    )


@torch.no_grad()
def _inference(model: nn.Module, data: Data) -> float:
    """Milliseconds per image, in batches of 100."""
    times = []
    for part in data.test.x.split(100)[: TIMED + 1]:
        began = time.perf_counter()
        model(part)
        times.append((time.perf_counter() - began) / len(part))
    return 1e3 * statistics.median(times[1:] or times)


def _steps(model: nn.Sequential, data: Data) -> dict[str, float]:
    """Evaluations, failures and milliseconds of training steps of 100 images, at the weights as they are."""
    network: Any = model.train()[1]
    times = []
    network.tally.reset()
    for x, y in list(zip(data.train.x.split(100), data.train.y.split(100), strict=True))[: TIMED + 1]:
        began = time.perf_counter()
        cross_entropy(model(x), y).backward()
        times.append(time.perf_counter() - began)
    tally = network.tally
    return {
        "step_forward": tally.evaluations / tally.samples,
        "step_backward": tally.backward_evaluations / max(tally.backward_samples, 1),
        "step_failures": max(tally.failures, tally.backward_failures) / tally.samples,
        "step": 1e3 * statistics.median(times[1:] or times),
    }


def write_up(bench: Bench, results: Mapping[str, Any]) -> Reproduction:
    """Every network beside the plain one."""
    plain: Found = results[PLAIN]
    ours: list[Found] = [results[_key(slope)] for slope in SLOPES]
    best = max(ours, key=lambda found: found.accuracy)
    ratio = _total(plain) / _total(best)
    lost = sum(found.failures for found in ours)
    findings = (
        f"A training step of the plain network takes {_total(plain):.1f} evaluations of its map, forward and backward; "
        f"of the Lipschitz network of best accuracy (s = {best.slope:g}) {_total(best):.1f}: {ratio:.1f} times fewer, "
        f"in {plain.step / best.step:.1f} times less time.",
        f"Inference takes the plain network {plain.evaluations:.1f} evaluations against {best.evaluations:.1f}, and "
        f"{plain.inference / best.inference:.1f} times the time.",
        f"Test images that did not reach {TOL:g}: {plain.failures:,} of {plain.images:,} with the plain network, "
        f"{lost} with all {len(ours)} Lipschitz networks together.",
        f"Accuracy: {PERCENT.write(plain.accuracy)} plain, {PERCENT.write(best.accuracy)} at s = {best.slope:g}.",
        _proved(ours),
    )
    section = Section(
        "slopes",
        "Evaluations, time and accuracy over the slope",
        f"{plain.parameters:,} parameters; {_epochs(plain)}; relative residual {TOL:g}, forward and backward; one "
        f"thread, one run. The plain network is solved by Anderson acceleration of at most {LIMIT} evaluations, the "
        "others by plain iteration.",
        findings,
        figures=_figures(plain, ours),
        tables=(_costs(plain, ours), _proofs(plain, ours)),
        comparisons=_comparisons(bench, plain, best),
    )
    return Reproduction(
        "sato2026",
        "Lipschitz multiscale deep equilibrium models",
        "N. Sato, H. Iiduka. AISTATS 2026, arXiv:2602.03297.",
        f"{ratio:.1f} times fewer evaluations in a training step than the plain network, and "
        + ("no failures." if not lost else f"{lost} failures."),
        findings[0],
        (
            ("Accuracy: plain", PERCENT.write(plain.accuracy)),
            (f"Accuracy: s = {best.slope:g}", PERCENT.write(best.accuracy)),
            ("Failures: plain", f"{plain.failures:,} of {plain.images:,}"),
            ("Failures: Lipschitz", f"{lost}"),
        ),
        (section,),
        _limits(bench),
        data={key: dataclasses.asdict(result) for key, result in results.items()},
    )


def _proved(ours: list[Found]) -> str:
    """Which networks contract by proof."""
    held = [found for found in ours if found.contraction is not None and found.contraction < 1]
    slopes = ", ".join(f"s = {found.slope:g} by {at_most(found.contraction, 3)}" for found in held) or "none"
    rest = " The others are not proved to, and their solves went as counted." if len(held) < len(ours) else ""
    return (
        f"With every operator norm at most 2, these contract by proof: {slopes}.{rest} The paper caps the norms of "
        "reshaped kernels, which understate those of the operators."
    )


def _key(slope: float) -> str:
    return f"lmdeq-{slope:g}"


def _total(found: Found) -> float:
    return found.step_forward + found.step_backward


def _epochs(found: Found) -> str:
    return f"{found.epochs} epoch{'s' if found.epochs > 1 else ''} of {found.samples:,} images"


def _name(found: Found) -> str:
    return "plain" if found.slope is None else f"s = {found.slope:g}"


def _costs(plain: Found, ours: list[Found]) -> Table:
    head = ("network", "accuracy", "forward", "backward", "a step", "inference", "an image", "failures")
    rows = tuple(
        (
            _name(f),
            PERCENT.write(f.accuracy),
            f"{f.step_forward:.1f}",
            f"{f.step_backward:.1f}",
            f"{f.step:.0f} ms",
            f"{f.evaluations:.1f}",
            f"{f.inference:.2f} ms",
            f"{f.failures:,} of {f.images:,}",
        )
        for f in (plain, *ours)
    )
    note = (
        "Evaluations of the map per sample: forward and backward in a training step of 100 images, and in inference on "
        "the test split. Failures: test images that did not reach the tolerance."
    )
    return Table("What it costs", head, rows, note)


def _proofs(plain: Found, ours: list[Found]) -> Table:
    head = ("network", "contraction, at most", "in training, at most", "failures in training steps")
    rows = tuple(
        (_name(f), _bound(f.contraction), _bound(f.training_contraction), f"{100 * f.step_failures:.0f} %")
        for f in (plain, *ours)
    )
    note = f"{MISSING}: nothing is proved. In training dropout scales what it keeps."
    return Table("What is proved", head, rows, note)


def _bound(value: float | None) -> str:
    return MISSING if value is None else at_most(value, 3)


def _comparisons(bench: Bench, plain: Found, best: Found) -> tuple[Comparison, ...]:
    times = decimals(2)
    small = f"A network of {plain.parameters:,} parameters after {_epochs(plain)}, where the paper trains 10 million."
    where = "" if bench.data.name == "cifar10" else f" On {bench.data.name}, where the paper has CIFAR-10."
    timed = "The paper's is its largest speed-up. " + small + where
    return (
        compared("MDEQ: accuracy", PUBLISHED_ACCURACY, plain.accuracy, PERCENT, 5e-4, small + where),
        compared("Fewer evaluations in a training step", None, _total(plain) / _total(best), times, 0.0, timed),
        compared("Less time for a training step", PUBLISHED_SPEEDUP, plain.step / best.step, times, 0.005, timed),
        compared("Less time for inference", None, plain.inference / best.inference, times, 0.0, timed),
    )


def _figures(plain: Found, ours: list[Found]) -> tuple[Figure, ...]:
    slopes = [found.slope for found in ours]

    def accuracy(axes: Any) -> None:
        axes.plot(slopes, [100 * f.accuracy for f in ours], "o-", color=COLOURS["structured"], ms=6, mew=0)
        level(axes, 100 * plain.accuracy, "plain")
        axes.margins(y=0.25)
        axes.set_xlabel("slope s")
        axes.set_title("accuracy, %", loc="left", fontsize=13, color=COLOURS["muted"])

    def evaluations(axes: Any) -> None:
        for values, shade, whole in (
            ([f.step_forward for f in ours], "structured", plain.step_forward),
            ([f.step_backward for f in ours], "assembled", plain.step_backward),
        ):
            axes.plot(slopes, values, "o-", color=COLOURS[shade], ms=6, mew=0)
            axes.axhline(whole, color=COLOURS[shade], lw=1, ls=(0, (4, 3)))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("slope s")
        axes.set_title("evaluations a sample", loc="left", fontsize=13, color=COLOURS["muted"])

    words = ". ".join(
        f"{_name(f)}: {100 * f.accuracy:.1f} %, {f.step_forward:.1f} evaluations forward, {f.step_backward:.1f} back"
        for f in (plain, *ours)
    )
    legend = (("structured", "forward"), ("assembled", "backward"))
    return (
        figure("accuracy", "Accuracy over the slope", "Of the test split; dashed: plain.", accuracy, words),
        figure(
            "evaluations",
            "Evaluations in a training step",
            f"To a relative residual of {TOL:g}; dashed: the plain network's, whose solver may stop at its limit.",
            evaluations,
            words,
            legend,
        ),
    )


def _limits(bench: Bench) -> tuple[str, ...]:
    """What this run did less of, or otherwise than the paper."""
    said = [
        f"Seed {bench.settings.seed}: one training of each network, of the preset tiny, so that two cores suffice; the "
        "paper's has ten million parameters and 200 epochs."
    ]
    if bench.settings.quick:
        said.append(
            f"A quick run: two epochs on {len(bench.data.train):,} images, {len(bench.data.test):,} test images; its "
            "accuracies say little. Run it without --quick."
        )
    if bench.data.name != "cifar10":
        said.append(f"On {bench.data.name}, where the paper has CIFAR-10.")
    return tuple(said)


PAPER: Paper[Bench] = Paper(
    "sato2026",
    "cifar10",
    begin,
    (
        Experiment(PLAIN, "a plain MDEQ", Found, partial(measure, slope=None)),
        *(Experiment(_key(s), f"a Lipschitz MDEQ, slope {s:g}", Found, partial(measure, slope=s)) for s in SLOPES),
    ),
    write_up,
)
