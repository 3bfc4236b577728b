"""The paper as a list of experiments, and its page from their results [LLC26]."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from ...certificates.types import ARITHMETIC
from ...report.words import at_least, at_most
from ..record import Reproduction
from ..run import Experiment, Paper
from . import convergence, displacement, gradients, grids, published, splitting, training
from .effects import displacement_section, gradient_section, grid_section
from .solves import convergence_section, network_section, splitting_section
from .subject import Bench, Subject, begin, describe
from .versions import version_section

__all__ = ["PAPER"]

TRAININGS: tuple[tuple[str, int, bool], ...] = (
    *(("assembled", bits, False) for bits in training.BITS),
    ("assembled", 4, True),
    *(("structured", bits, False) for bits in training.STRUCTURED_BITS),
)
"""Scheme, bits, and whether a penalty holds the margin up."""


def _key(name: str, bits: int, held: bool) -> str:
    return f"{'held' if held else 'trained'}-{name}-{bits}"


EXPERIMENTS: tuple[Experiment[Bench], ...] = (
    Experiment("network", "the float network", Subject, describe),
    Experiment("convergence", "1, convergence", convergence.Convergence, convergence.measure),
    Experiment("splitting", "2, splittings", splitting.Splitting, splitting.measure),
    Experiment("displacement", "4, displacement", displacement.Displacement, displacement.measure),
    Experiment("grids", "5, iterate grids", grids.Grids, grids.measure),
    Experiment("gradients", "6, gradients", gradients.Gradients, gradients.measure),
    Experiment("rounded", "3, rounding after training", training.Versions, training.rounded),
    *(
        Experiment(
            _key(name, bits, held),
            f"3, training {name} at {bits} bit{'s' if bits > 1 else ''}",
            training.Trained,
            partial(training.trained, name=name, bits=bits, held=held),
        )
        for name, bits, held in TRAININGS
    ),
)


def write_up(bench: Bench, results: Mapping[str, Any]) -> Reproduction:
    """What the page shows of the results."""
    subject: Subject = results["network"]
    moved: displacement.Displacement = results["displacement"]
    trained = [results[_key(*entry)] for entry in TRAININGS]
    sections = (
        network_section(subject, moved),
        convergence_section(results["convergence"], subject),
        splitting_section(results["splitting"], subject),
        version_section(results["rounded"], trained, subject),
        displacement_section(moved, subject),
        grid_section(results["grids"], subject),
        gradient_section(results["gradients"], subject),
    )
    rows = [row for section in sections for row in section.comparisons]
    same = sum(row.why.startswith("The same") for row in rows)
    network = "the published network" if subject.published else "another network than the published one"
    others = (
        "each of the others has a sentence on why it differs"
        if subject.published
        else "--checkpoint with the released file compares the network itself"
    )
    return Reproduction(
        name="li2026",
        title=published.TITLE,
        citation=published.CITATION,
        headline=f"The published experiments, run again on {network}.",
        summary=(
            f"{same} of {len(rows)} published figures come out the same to the digits printed, on {network}; {others}."
        ),
        facts=(
            ("Network", f"{subject.features} units, rank {subject.rank}, {subject.source}"),
            ("Accuracy", f"{100 * subject.accuracy:.2f} %"),
            ("Margin, at least", at_least(subject.margin, 5)),
            ("Lipschitz constant, at most", at_most(subject.lipschitz, 5)),
        ),
        sections=sections,
        limits=_limits(bench, results),
        arithmetic=f"Proofs: {ARITHMETIC}.",
        data={key: dataclasses.asdict(result) for key, result in results.items()},
    )


def _limits(bench: Bench, results: Mapping[str, Any]) -> tuple[str, ...]:
    """What this run did less of, or otherwise than the paper."""
    epochs = f"{bench.epochs} epoch{'' if bench.epochs == 1 else 's'}"
    said = [
        f"Seed {bench.settings.seed}; each training through the quantizer has {epochs}, the paper 15, with one seed."
    ]
    if bench.settings.quick:
        counts = results["convergence"].rescue.test_samples, results["gradients"].samples
        said.append(
            f"A quick run: {epochs} of training instead of 12, {counts[0]:,} test samples for the 4-bit network and"
            f" {counts[1]:,} for the gradients. Accuracies of the trained versions say little; run it without"
            " --quick."
        )
    if bench.data.name != "mnist":
        said.append(f"On {bench.data.name}, where the paper has MNIST.")
    return tuple(said)


PAPER: Paper[Bench] = Paper("li2026", "mnist", begin, EXPERIMENTS, write_up)
