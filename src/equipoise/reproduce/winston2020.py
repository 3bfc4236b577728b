"""Winston, Kolter: Monotone operator equilibrium networks [WK20].

Its experiments on MNIST: the accuracies of a fully connected, a single convolutional and a multi-tier network, and
how many iterations forward–backward and Peaceman–Rachford splitting take as the step α varies. The paper shows the
latter as curves; so what is compared there is who needs less, at equal proved error.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..certificates import lipschitz, margin
from ..data import Data
from ..errors import ConvergenceWarning
from ..files import load, save
from ..layers.chain import any_layers
from ..presets import Sizes, preset_of
from ..report.canvas import COLOURS, Figure, figure, plain_log
from ..report.words import MISSING, at_least, at_most
from ..solvers import ForwardBackward, PeacemanRachford, Solver
from .record import PERCENT, Comparison, Reproduction, Section, Table, compared
from .resumed import less, resumed
from .run import UNFINISHED, Bench, Experiment, Paper, Settings

__all__ = ["PAPER"]

KINDS = {"mondeq": "fully connected", "monconv": "single convolution", "multitier": "multi-tier"}
PUBLISHED = {"mondeq": (0.981, 84), "monconv": (0.991, 84), "multitier": (0.990, 81)}
"""Accuracy, mean of three runs, each ± 0.1; thousands of parameters."""

TOL, CAP = 1e-3, 1000
STEPS = {
    "ForwardBackward": (1.0, 0.5, 0.25, 0.12, 0.06, 0.03, 0.015),
    "PeacemanRachford": (4.0, 2.0, 1.0, 0.5, 0.25, 0.12, 0.06, 0.03),
}
SOLVERS: dict[str, tuple[type[Solver], str, str]] = {
    "ForwardBackward": (ForwardBackward, "assembled", "forward–backward"),
    "PeacemanRachford": (PeacemanRachford, "structured", "Peaceman–Rachford"),
}


@dataclass(frozen=True)
class Trained:
    """What a trained network came to; the margin and the Lipschitz constant of I − W are proved."""

    accuracy: float
    parameters: int
    epochs: int
    seconds: float
    margin: float
    lipschitz: float


@dataclass(frozen=True)
class Run:
    """One solver with one step on one batch: mean and largest steps, least milliseconds, share of samples settled."""

    solver: str
    alpha: float
    steps: float
    most: int
    time: float
    settled: float


@dataclass(frozen=True)
class Solves:
    """Every solver with every step on the same ``samples`` test images."""

    samples: int
    runs: tuple[Run, ...]

    def best(self, solver: str) -> Run | None:
        """The run of that solver with the fewest steps among those in which every sample settled."""
        runs = [run for run in self.runs if run.solver == solver and run.settled == 1.0]
        return min(runs, key=lambda run: run.steps, default=None)


def begin(settings: Settings, data: Data, folder: Path) -> Bench:
    """A quick run sees the first samples only."""
    return Bench(settings, less(data, 6_000, 2_000) if settings.quick else data, folder)


def train(bench: Bench, kind: str) -> Trained:
    """One network, trained and kept: at the published size, in a quick run a small one for a moment."""
    quick, seed, data = bench.settings.quick, bench.settings.seed, bench.data
    preset = preset_of(kind, "small" if quick else "published")
    model = preset.build(data, Sizes(seed=seed))
    config = preset.config(data.name, False if quick else None, seed=seed, epochs=2 if quick else None)
    result = resumed(model, data, config, bench.folder / UNFINISHED / kind)
    save(model, bench.folder / f"{kind}.safetensors", force=True)
    return Trained(
        float(result.accuracy_test or 0.0),
        sum(p.numel() for p in model.parameters()),
        config.epochs,
        float(result.seconds_per_epoch or 0.0),
        margin(model),
        lipschitz(model),
    )


@torch.no_grad()
def solves(bench: Bench, kind: str) -> Solves:
    """Both splittings over their steps, to the same proved error of every sample."""
    model = load(bench.folder / f"{kind}.safetensors").eval()
    ((_, layer),) = any_layers(model)
    x = _given(model, layer, bench.data.test.x[: 32 if bench.settings.quick else 128])
    runs = []
    for solver, alphas in STEPS.items():
        for alpha in alphas:
            runs.append(_run(layer, x, solver, alpha))
    return Solves(len(x), tuple(runs))


def _given(model: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """What ``layer`` gets where ``model`` gets ``x``."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    try:
        model(x)
    finally:
        handle.remove()
    return seen[0]


def _run(layer: Any, x: Tensor, solver: str, alpha: float) -> Run:
    chosen = SOLVERS[solver][0](alpha=alpha, max_steps=CAP)
    times = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for attempt in range(6):
            began = time.perf_counter()
            found = layer.solve(x, chosen, TOL)
            if attempt > 0 or not bool(found.converged.all()):  # the first one computes what is of the weights alone
                times.append(time.perf_counter() - began)
            if not bool(found.converged.all()):
                break  # its time is that of running into the cap
    steps = found.steps.double()
    settled = float(found.converged.double().mean())
    return Run(solver, alpha, float(steps.mean()), int(steps.max()), 1e3 * min(times), settled)


def write_up(bench: Bench, results: Mapping[str, Any]) -> Reproduction:
    """The accuracies beside the published ones, and the solvers side by side."""
    networks: dict[str, Trained] = {kind: results[f"train-{kind}"] for kind in KINDS}
    solved: dict[str, Solves] = {kind: results[f"solve-{kind}"] for kind in KINDS}
    ratios = {kind: _ratios(solves) for kind, solves in solved.items()}
    known = [ratio[0] for ratio in ratios.values() if ratio is not None]
    summary = (
        f"At its best step Peaceman–Rachford takes {min(known):.1f} to {max(known):.1f} times fewer steps than "
        "forward–backward at its own."
        if known
        else "One of the splittings reached the error with none of the steps tried."
    )
    return Reproduction(
        "winston2020",
        "Monotone operator equilibrium networks",
        "E. Winston, J. Z. Kolter. NeurIPS 2020.",
        "Every network has a proved margin, and one answer for every input.",
        summary,
        tuple((f"Accuracy: {KINDS[kind]}", PERCENT.write(trained.accuracy)) for kind, trained in networks.items()),
        (_accuracies(bench, networks), _splittings(solved, ratios)),
        _limits(bench),
        data={key: dataclasses.asdict(result) for key, result in results.items()},
    )


def _ratios(solves: Solves) -> tuple[float, float] | None:
    """Steps and time of the best forward–backward over those of the best Peaceman–Rachford."""
    slow, fast = (solves.best(name) for name in SOLVERS)
    return None if slow is None or fast is None else (slow.steps / fast.steps, slow.time / fast.time)


def _accuracies(bench: Bench, networks: Mapping[str, Trained]) -> Section:
    head = ("network", "accuracy", "parameters", "margin, at least", "‖I − W‖₂, at most", "epochs", "seconds an epoch")
    rows = tuple(
        (
            KINDS[kind],
            PERCENT.write(t.accuracy),
            f"{t.parameters:,}",
            at_least(t.margin, 3),
            at_most(t.lipschitz, 4),
            f"{t.epochs}",
            f"{t.seconds:.1f}",
        )
        for kind, t in networks.items()
    )
    return Section(
        "accuracy",
        "Three networks",
        "Small networks, trained for a moment."
        if bench.settings.quick
        else "Sizes as in the paper, trained as its code does; the margin is learned from 1, where the paper fixes it.",
        ("The margins are proved from the stored weights, those of convolutions frequency by frequency.",),
        tables=(Table("Networks side by side", head, rows, "Accuracy is of the test split."),),
        comparisons=tuple(_compared(bench, kind, trained) for kind, trained in networks.items()),
    )


def _compared(bench: Bench, kind: str, trained: Trained) -> Comparison:
    accuracy, thousands = PUBLISHED[kind]
    why = (
        "A quick run: a smaller network, a few of the images, two epochs."
        if bench.settings.quick
        else f"Mean of three runs, ± 0.1, with {thousands}K parameters; one run here, with {trained.parameters:,}."
    )
    if bench.data.name != "mnist":
        why = f"On {bench.data.name}, where the paper has MNIST."
    return compared(f"{KINDS[kind]}: test accuracy", accuracy, trained.accuracy, PERCENT, 0.001, why)


def _splittings(solved: Mapping[str, Solves], ratios: Mapping[str, tuple[float, float] | None]) -> Section:
    findings = [
        f"{KINDS[kind]}: {_words(solves)}"
        + ("" if ratio is None else f" That is {ratio[0]:.1f} times fewer steps in {ratio[1]:.1f} times less time.")
        for (kind, solves), ratio in zip(solved.items(), ratios.values(), strict=True)
    ]
    samples = next(iter(solved.values())).samples
    alphas = sorted({alpha for row in STEPS.values() for alpha in row}, reverse=True)
    note = (
        f"Steps, mean over the samples, least milliseconds of five; {MISSING}: not tried; > {CAP}: some did not settle."
    )
    return Section(
        "splittings",
        "Steps and time against α",
        f"{samples} test images, until the proved error of each is below {TOL:g} of its answer's norm; one thread. The "
        "paper stops at a small residual, which means less with a shorter step.",
        tuple(findings),
        figures=tuple(_figure(kind, solves) for kind, solves in solved.items()),
        tables=tuple(
            Table(
                f"Steps and milliseconds, {KINDS[kind]}",
                ("α", *(words for _, _, words in SOLVERS.values())),
                tuple((f"{alpha:g}", *(_cell(solves, solver, alpha) for solver in SOLVERS)) for alpha in alphas),
                note,
            )
            for kind, solves in solved.items()
        ),
    )


def _words(solves: Solves) -> str:
    slow, fast = (solves.best(name) for name in SOLVERS)
    if slow is None or fast is None:
        return "one of the splittings reached the error with none of the steps tried."
    return (
        f"forward–backward at its best takes {slow.steps:.0f} steps (α = {slow.alpha:g}, {slow.time:.0f} ms), "
        f"Peaceman–Rachford {fast.steps:.0f} (α = {fast.alpha:g}, {fast.time:.0f} ms)."
    )


def _cell(solves: Solves, solver: str, alpha: float) -> str:
    run = next((run for run in solves.runs if (run.solver, run.alpha) == (solver, alpha)), None)
    if run is None:
        return MISSING
    return f"{run.steps:.0f}, {run.time:.0f} ms" if run.settled == 1.0 else f"> {CAP}"


def _figure(kind: str, solves: Solves) -> Figure:
    def paint(axes: Any) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        for solver, (_, shade, _) in SOLVERS.items():
            runs = sorted((run for run in solves.runs if run.solver == solver), key=lambda run: run.alpha)
            kept = [run for run in runs if run.settled == 1.0]
            lost = [run for run in runs if run.settled < 1.0]
            axes.plot([r.alpha for r in kept], [r.steps for r in kept], "o-", color=COLOURS[shade], ms=6, mew=0)
            axes.plot([r.alpha for r in lost], [CAP] * len(lost), "x", color=COLOURS[shade], ms=7, mew=2)
        plain_log(axes.xaxis, 0.012, 5)
        plain_log(axes.yaxis, 2, 1.2 * CAP)
        axes.set_ylim(2, 1.4 * CAP)
        axes.set_xlabel("α")
        axes.set_title("steps", loc="left", fontsize=13, color=COLOURS["muted"])

    described = ". ".join(
        f"{SOLVERS[run.solver][2]}, α {run.alpha:g}: {run.steps:.0f} steps, {100 * run.settled:.0f} % settled"
        for run in solves.runs
    )
    legend = tuple((shade, words) for _, shade, words in SOLVERS.values())
    caption = f"Mean steps of {solves.samples} samples. Crosses at the top: not every sample settled in {CAP} steps."
    return figure(f"steps-{kind}", f"Steps, {KINDS[kind]}", caption, paint, described, legend)


def _limits(bench: Bench) -> tuple[str, ...]:
    """What this run did less of, or otherwise than the paper."""
    said = [f"Seed {bench.settings.seed}: one training of each network, where the paper has three."]
    if bench.settings.quick:
        count = len(bench.data.train)
        said.append(f"A quick run: small networks, 2 epochs on {count:,} images; accuracies need one without --quick.")
    if bench.data.name != "mnist":
        said.append(f"On {bench.data.name}, where the paper has MNIST, SVHN and CIFAR-10.")
    return tuple(said)


PAPER: Paper[Bench] = Paper(
    "winston2020",
    "mnist",
    begin,
    (
        *(Experiment(f"train-{k}", f"training, {text}", Trained, partial(train, kind=k)) for k, text in KINDS.items()),
        *(Experiment(f"solve-{k}", f"solvers, {text}", Solves, partial(solves, kind=k)) for k, text in KINDS.items()),
    ),
    write_up,
)
