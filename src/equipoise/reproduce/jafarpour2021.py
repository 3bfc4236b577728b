"""Jafarpour, Davydov, Proskurnikov, Bullo: Robust implicit networks via non-Euclidean contractions [JDPB21].

Its experiment: fully connected networks on MNIST, NEMON with and without the Lipschitz regularizer against monDEQ. The
paper shows accuracy under perturbation as curves, which its abstract sums up as "improved accuracy and robustness …
with smaller input-output Lipschitz bounds"; so what is compared here is who wins, and our figures stand by themselves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..certificates import input_lipschitz, margin
from ..data import Data, Split
from ..errors import NotWellPosedError
from ..files import save
from ..presets import classifier
from ..report.words import MISSING
from ..robust import PixelBall, pgd, robustness
from ..robust_loss import RobustLoss
from ..training import TrainingConfig, fit
from .record import PERCENT, Comparison, Reproduction, Section, Table, compared
from .run import Bench, Experiment, Paper, Settings

__all__ = ["PAPER"]

GAMMA, FEATURES, EPOCHS, RADII = 0.95, 100, 10, (0.05, 0.1)
WEIGHT = 1e-3
"""Of the Lipschitz bound in the loss."""

STEPS_TOL = 1e-3
KINDS = {
    "nemon": "NEMON",
    "regularized": "NEMON, Lipschitz regularizer",
    "boxes": "NEMON, trained on boxes of ε = 0.1",
    "mondeq": "monDEQ",
}


@dataclass(frozen=True)
class Trained:
    """What a trained network came to; accuracies are shares of the test split or of its first samples."""

    accuracy: float
    margin: float
    lipschitz: float | None
    steps: float
    seconds: float
    samples: int
    certified: list[float | None]
    attacked: list[float]


def begin(settings: Settings, data: Data, folder: Path) -> Bench:
    """Nothing is shared between the networks but the data and the seed."""
    return Bench(settings, data, folder)


def train(bench: Bench, kind: str) -> Trained:
    """One network, trained and judged."""
    quick, data, seed = bench.settings.quick, bench.data, bench.settings.seed
    losses = {"regularized": RobustLoss(lipschitz_weight=WEIGHT), "boxes": RobustLoss(eps=0.1, share=0.8)}
    config = TrainingConfig(1 if quick else EPOCHS, seed=seed, robust=losses.get(kind))
    gamma = None if kind == "mondeq" else GAMMA
    model = classifier(data, FEATURES, FEATURES // 4, seed=seed, gamma=gamma)
    result = fit(model, data, config, progress=False)
    model.eval()
    bench.folder.mkdir(parents=True, exist_ok=True)
    save(model, bench.folder / f"{kind}.safetensors", force=True)
    count = 200 if quick else 1000
    part = Split(data.test.x[:count], data.test.y[:count])
    certified: list[float | None] = []
    attacked: list[float] = []
    for eps in RADII:
        try:
            found = robustness(model, part, data.preprocessing, eps, attack_steps=5 if quick else 20)
            certified.append(found.certified_accuracy)
            attacked.append(found.pgd_accuracy or 0.0)
        except NotWellPosedError:  # no maximum norm certifies this network: only the attack says something
            certified.append(None)
            attacked.append(_attacked(model, part, data, eps, 5 if quick else 20))
    layer: Any = model[0]
    with torch.no_grad():
        steps = float(layer.solve(part.x, tol=STEPS_TOL).steps.double().mean())
    return Trained(
        float(result.accuracy_test or 0.0),
        margin(model),
        input_lipschitz(model, "linf"),
        steps,
        float(result.seconds_per_epoch or 0.0),
        count,
        certified,
        attacked,
    )


def _attacked(model: Any, part: Split, data: Data, eps: float, steps: int) -> float:
    moved = pgd(model, part.x, part.y, PixelBall(eps, data.preprocessing), steps)
    with torch.no_grad():
        return float((model(moved).argmax(1) == part.y).double().mean())


def write_up(bench: Bench, results: Mapping[str, Any]) -> Reproduction:
    """What each network came to, what an attack leaves of it and what is proved, and who wins."""
    found: dict[str, Trained] = {kind: results[kind] for kind in KINDS}
    plain, regularized, boxes, monotone = (found[kind] for kind in ("nemon", "regularized", "boxes", "mondeq"))
    eps = f"ε = {RADII[-1]:g}"
    findings = (
        f"The proved ℓ∞ Lipschitz bound is {_bound(plain)} without the regularizer and {_bound(regularized)} with it.",
        f"Under attack at {eps} the regularized network keeps {PERCENT.write(regularized.attacked[-1])}, "
        f"the plain one {PERCENT.write(plain.attacked[-1])} and monDEQ {PERCENT.write(monotone.attacked[-1])}.",
        f"Trained on boxes it keeps {PERCENT.write(boxes.attacked[-1])}, and {_share(boxes.certified[-1])} are proved.",
        "The published regularizer is a bound by norms; ours is its sharper row-wise form.",
    )
    section = Section(
        "robustness",
        "Accuracy, Lipschitz bounds and robustness",
        f"n = {FEATURES}, γ = {GAMMA}, {_epochs(bench.settings.quick)}; the first {plain.samples:,} test images "
        "certified and attacked, ε per pixel of [0, 1].",
        findings,
        tables=(_networks(found), _robustness(found)),
        comparisons=tuple(_accuracy(kind, trained) for kind, trained in found.items()),
    )
    return Reproduction(
        "jafarpour2021",
        "Robust implicit networks via non-Euclidean contractions",
        "S. Jafarpour, A. Davydov, A. Proskurnikov, F. Bullo. NeurIPS 2021.",
        f"Proved robust at {eps}: {_share(boxes.certified[-1])} of the images, after training on boxes.",
        findings[1],
        tuple((f"Accuracy: {KINDS[kind]}", PERCENT.write(trained.accuracy)) for kind, trained in found.items()),
        (section,),
        _limits(bench),
        data={kind: dataclasses.asdict(trained) for kind, trained in found.items()},
    )


def _bound(trained: Trained) -> str:
    return MISSING if trained.lipschitz is None else f"{math.ceil(trained.lipschitz):,}"


def _share(share: float | None) -> str:
    return MISSING if share is None else PERCENT.write(share)


def _epochs(quick: bool) -> str:
    return "1 epoch" if quick else f"{EPOCHS} epochs"


def _networks(found: Mapping[str, Trained]) -> Table:
    head = ("network", "accuracy", "ℓ∞ Lipschitz, at most", f"steps to {STEPS_TOL:g}", "seconds an epoch")
    rows = tuple(
        (KINDS[kind], PERCENT.write(t.accuracy), _bound(t), f"{t.steps:.0f}", f"{t.seconds:.1f}")
        for kind, t in found.items()
    )
    note = "Accuracy is of the whole test split, steps the mean over the images certified."
    return Table("Networks side by side", head, rows, note)


def _robustness(found: Mapping[str, Trained]) -> Table:
    head = ("network", *(f"{word} at ε = {eps:g}" for eps in RADII for word in ("certified", "attacked")))
    rows = tuple(
        (KINDS[kind], *(_share(value) for pair in zip(t.certified, t.attacked, strict=True) for value in pair))
        for kind, t in found.items()
    )
    note = (
        "Certified: proved to keep the right class on the whole box. Attacked: still right after projected gradient "
        f"ascent. The truth lies between. {MISSING}: no maximum norm certifies the network."
    )
    return Table("Right within ε of every pixel", head, rows, note)


def _accuracy(kind: str, trained: Trained) -> Comparison:
    why = "The paper gives curves, no number" + (
        "; its code, run again, gives 97.6–98.0 %." if kind == "nemon" else "."
    )
    return compared(f"{KINDS[kind]}: test accuracy", "curve", trained.accuracy, PERCENT, 0.0, why)


def _limits(bench: Bench) -> tuple[str, ...]:
    """What this run did less of, or otherwise than the paper."""
    said = [f"Seed {bench.settings.seed}: one training of each network."]
    if bench.settings.quick:
        said.append("A quick run: these figures say little; run it without --quick.")
    if bench.data.name != "mnist":
        said.append(f"On {bench.data.name}, where the paper has MNIST.")
    return tuple(said)


PAPER: Paper[Bench] = Paper(
    "jafarpour2021",
    "mnist",
    begin,
    tuple(Experiment(kind, f"training {label}", Trained, partial(train, kind=kind)) for kind, label in KINDS.items()),
    write_up,
)
