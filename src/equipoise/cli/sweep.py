"""The command that trains many networks: ``equipoise sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import UNMET, DataDir, DataName, Json, OnData, option, say, say_json, tell
from .options import BitsList, Course, LearnScale, Network, Rounding, Target, grouped, numbers, penalty, scheme_option

if TYPE_CHECKING:
    from ..quantization.schemes import Scheme

__all__ = ["register"]

LARGEST = 2**32 - 1


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(grouped(sweep))


def sweep(
    *,
    out: Annotated[Path, option("The folder for everything; a sweep that was begun there goes on.")],
    data: OnData = DataName.digits,
    network: Network,
    course: Course,
    schemes: Annotated[str, scheme_option(" Several with commas, also float; default structured.")] = "structured",
    bits: BitsList = "4,2",
    rounding: Rounding,
    learn_scale: LearnScale = False,
    seeds: Annotated[str, typer.Option(help="Seeds: numbers and ranges with commas, such as 0-2.")] = "0",
    margin_target: Target = None,
    jobs: Annotated[int, typer.Option(help="Trainings at a time.")] = 1,
    backend: Annotated[
        str, typer.Option(help="By what: loky (processes), threading, or a ray or dask cluster.")
    ] = "loky",
    data_dir: DataDir = None,
    as_json: Json = False,
) -> int:
    """Train every scheme at every number of bits and seed, and tabulate what came of it.

    A job that fails does not stop the others: its error is in the table, and the exit status is 1. Killed or
    interrupted, the same command goes on where it stopped.
    """
    from ..jobs import Job
    from ..report.sweeps import sweep_figure, sweep_table
    from ..report.terminal import rendered, waiting
    from ..sweep import run_sweep

    wanted: list[Scheme | None] = []
    for name in (name.strip().lower() for name in schemes.split(",")):
        widths = [None] if name == "float" else numbers("bits", bits, 32)
        wanted += [None if width is None else rounding.scheme(name, width, margin_target) for width in widths]
    aim = penalty(margin_target, None, None)
    config = course.config(network, data, rounding.input_bits, margin=aim)
    first = next((scheme for scheme in wanted if scheme is not None), None)
    base = Job(data, config, first, learn_scale, data_dir=data_dir, **network.fields())
    with waiting("training") as progress:
        found = run_sweep(base, wanted, numbers("seeds", seeds, LARGEST), out, jobs, backend, progress)
    figure = sweep_figure(found.means(), out / "sweep.svg")
    if as_json:
        say_json({"out": str(out), "figure": None if figure is None else str(figure), **found.to_dict()})
    else:
        say(rendered(sweep_table(found.means())), end="")
    for row in found.failed:
        tell(f"{row.folder} failed: {row.error}")
    missed = [row for row in found.rows if row.target_met is False]
    for row in missed:
        tell(f"{row.folder} missed the margin {margin_target:g}: {row.margin:.6g} is proved")
    return UNMET if found.failed or missed else 0
