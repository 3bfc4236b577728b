"""The benchmark as a whole: ``equipoise bench``. Every figure in one run, against peers in the same run."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError
from ..solvers import SOLVERS
from .contenders import OURS, REFERENCE, Contender, library, plain
from .measure import Progress, Tracker, bar, machine
from .network import Network, checkpoint_network, images, trained_network
from .peers import peers
from .race import GOAL, race, work_for
from .scale import JOBS, scaling
from .sgemm import share_of_sgemm
from .step import NO_LIGHTNING, training_step
from .tables import tables

__all__ = ["FULL", "QUICK", "Sizes", "measure", "run", "tables"]

BESIDES = 6
"""Parts of a race besides our solvers: ``layer(x)``, plain PyTorch, torchdeq's three, and the rounds."""


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    ``batches``: (samples in a solve, different solves in a measurement). ``block_steps``: training steps in a row,
    ``block_rounds`` of them. ``probes``: batches that gradients are compared on.
    """

    batches: tuple[tuple[int, int], ...] = ((1, 16), (256, 4), (10_000, 1))
    rounds: int = 9
    sgemm: int = 2048
    warm_up_steps: int = 400
    block_steps: int = 100
    block_rounds: int = 7
    probes: int = 32
    features: tuple[int, ...] = (64, 256, 1024, 4096)


FULL = Sizes()
QUICK = Sizes(
    batches=((1, 8), (256, 1), (1000, 1)),
    rounds=5,
    warm_up_steps=100,
    block_steps=50,
    block_rounds=3,
    features=(64, 256),
)


def run(
    checkpoint: str | Path | None = None,
    data_dir: str | Path | None = None,
    quick: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure everything; the result is plain values, as JSON has them, and :func:`tables` draws it.

    Args:
        checkpoint: a checkpoint of mondeq-quant for 784 features, benched beside the network trained here.
        data_dir: a folder with MNIST (else the one that ``EQUIPOISE_DATA`` names, else enlarged digits).
        quick: smaller batches and layers, fewer rounds.
        progress: told how far it is; default a bar on stderr, which redraws only between measurements.

    Without torchdeq or Lightning everything else is measured, and ``notes`` says what is missing.

    Raises:
        DataNotFoundError, FileFormatError: the named files are not there, or something else.
        InputError: the checkpoint takes another number of features.
    """
    with contextlib.nullcontext(progress) if progress is not None else bar() as tell:
        return measure(QUICK if quick else FULL, checkpoint, data_dir, tell)


def measure(
    sizes: Sizes, checkpoint: str | Path | None, data_dir: str | Path | None, progress: Progress
) -> dict[str, Any]:
    """:func:`run` at given sizes."""
    each = len(sizes.batches) * (len(SOLVERS) + BESIDES) + 1
    tell = Tracker(progress, 4 + each * (1 if checkpoint is None else 2) + len(JOBS) * len(sizes.features))
    tell("data")
    data, notes = images(data_dir)
    tell("a network to measure on")
    given = [] if checkpoint is None else [checkpoint_network(checkpoint, data)]  # first, since it may be refused
    networks = [trained_network(data, sizes.warm_up_steps), *given]
    measured = []
    for network in networks:
        contenders, missing = _contenders(network)
        notes += [missing] if missing and missing not in notes else []
        measured.append(_network(network, contenders, sizes, tell))
    training = training_step(networks[0], data, sizes.block_steps, sizes.block_rounds, sizes.probes, tell)
    notes += [f"no figures of Lightning: {NO_LIGHTNING}"] if NO_LIGHTNING else []
    rows = scaling(sizes.features, tell)
    tell.finish()
    return {
        "equipoise": version("equipoise"),
        "machine": machine(),
        "data": data.name,
        "goal": GOAL,
        "reference": REFERENCE,
        "networks": measured,
        "training": training,
        "scaling": rows,
        "notes": notes,
    }


def _contenders(network: Network) -> tuple[list[Contender], str | None]:
    """Everybody who can take part, and who cannot."""
    contenders = [*library(network.layer), plain(network.layer)]
    try:
        return [*contenders, *peers(network.layer, network.samples)], None
    except MissingExtraError as error:
        return contenders, f"no peers: {error}"


def _network(network: Network, contenders: list[Contender], sizes: Sizes, tell: Tracker) -> dict[str, Any]:
    races = []
    for batch, count in sizes.batches:
        work = work_for(network.layer, network.samples, batch, count)
        label = f"{network.name}, batch {batch:,}"
        races.append(race(network.layer, contenders, work, sizes.rounds, tell, label))
    # at the largest batch, which is the last, and at the setting that served there
    row = next(row for row in races[-1]["contenders"] if (row["family"], row["name"]) == (OURS, REFERENCE))
    tell(f"{network.name}: share of the sgemm rate")
    share = None
    if row["reached"]:
        share = share_of_sgemm(network.layer, work, row["setting"], sizes.sgemm, sizes.rounds)
    return {**network.to_dict(), "races": races, "sgemm": share}
