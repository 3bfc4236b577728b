"""Commands that judge models: certify, plan, bench."""

from __future__ import annotations

import enum
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import OptionError
from .common import (
    UNMET,
    Bits,
    DataDir,
    DataName,
    Force,
    Json,
    Model,
    OnData,
    Share,
    say,
    say_json,
    tell,
)

if TYPE_CHECKING:
    from ..ladder import Ladder

__all__ = ["register"]


class SplitName(enum.StrEnum):
    train = "train"
    validation = "validation"
    test = "test"


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(certify)
    app.command()(plan)
    app.command()(bench)


def certify(
    file: Model,
    reference: Annotated[Path | None, typer.Option(help="The float model it came from.", show_default=False)] = None,
    data: Annotated[
        DataName | None, typer.Option(help="Data set to prove input by input on.", show_default=False)
    ] = None,
    split: Annotated[SplitName, typer.Option(help="Part of the data set.")] = SplitName.test,
    limit: Annotated[int | None, typer.Option(help="Only the first so many samples.", show_default=False)] = None,
    require: Annotated[bool, typer.Option("--require", help="Exit with 1 unless certified.")] = False,
    eps_inf: Annotated[
        float | None,
        typer.Option(help="Also certify and attack within so much per pixel of [0, 1].", show_default=False),
    ] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> int:
    """Prove what holds for a file, alone or against the float network it came from."""
    from ..certificates import certify as prove
    from ..data import Split, load_data
    from ..files import load
    from ..plan import check_fits
    from ..report.terminal import pairs_table, rendered, waiting
    from ..report.words import at_least
    from ..robust import check_eps, robustness

    if limit is not None and limit < 1:
        raise OptionError(f"limit={limit}: give a positive integer, or leave it out for all samples")
    if eps_inf is not None:
        check_eps(eps_inf)
        if data is None:
            raise OptionError("--eps-inf is about images: name a data set with --data")
    model = load(file)
    original = None if reference is None else load(reference)
    inputs = None
    if data is not None:
        loaded = load_data(data, data_dir)
        check_fits(model, loaded)
        inputs = getattr(loaded, split).x[:limit]
    with waiting("proving"):
        certificate = prove(model, original, inputs)
        robust = None
        if eps_inf is not None and inputs is not None:
            part = Split(inputs, getattr(loaded, split).y[:limit])
            robust = robustness(model, part, loaded.preprocessing, eps_inf, original)
    if as_json:
        say_json(certificate.to_dict() | ({} if robust is None else robust.to_dict()))
    else:
        rows = certificate.summary() + ([] if robust is None else robust.summary())
        say(rendered(pairs_table(rows)), end="")
    if require and not certificate.certified:
        tell(f"not certified: no positive margin is proved, only {at_least(certificate.to_dict()['margin'])}")
        return UNMET
    return 0


def plan(
    file: Model,
    data: OnData,
    schemes: Annotated[
        str, typer.Option(help="Some of assembled, structured, compensated, cayley, with commas; default: all.")
    ] = "",
    bits: Annotated[str, typer.Option(help="Numbers and ranges with commas, such as 16,8-1.")] = "8-1",
    input_bits: Bits = None,
    min_accuracy: Share = None,
    min_agreement: Share = None,
    max_displacement: Annotated[
        float | None,
        typer.Option(help="Every validation input is proved to move by at most this.", show_default=False),
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Packed size.", show_default=False)] = None,
    mixed: Annotated[
        bool,
        typer.Option("--mixed", help="Choose bits part by part as well: A, K, U, b, head of a structured version."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the ladder here, as JSON.", show_default=False)] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a report here, as one HTML page.", show_default=False)
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the chosen model here.", show_default=False)] = None,
    data_dir: DataDir = None,
    force: Force = False,
    as_json: Json = False,
) -> int:
    """Print the ladder of schemes and bits; choose the smallest rung that meets every requirement.

    Chosen on the validation split, reported on the test split. Exit status 1 where no rung meets all. With --mixed
    and --max-bytes the rung that is proved to move least within those bytes is chosen instead of the smallest.
    """
    from .._atomic import check_output
    from ..data import load_data
    from ..files import load
    from ..ladder import Requirements
    from ..plan import build_ladder
    from ..quantization.schemes import SCHEMES
    from ..report.terminal import ladder_table, ladder_words, rendered, waiting

    asked = Requirements(min_agreement, max_displacement, min_accuracy, max_bytes)
    names = [name.strip().lower() for name in schemes.split(",")] if schemes else list(SCHEMES)
    widths = _numbers(bits)
    for path in (out, report, save):
        if path is not None:
            check_output(path, force)
    model, loaded = load(file), load_data(data, data_dir)
    with waiting("quantizing and certifying") as progress:
        ladder = build_ladder(model, loaded, names, widths, asked, input_bits, progress, mixed)
    _write(ladder, out, report, save, force, f"{file.name} on {data}")
    if as_json:
        say_json(ladder.to_dict())
    else:
        say(rendered(ladder_table(ladder)), end="")
        say(rendered(ladder_words(ladder)), end="")
    if ladder.chosen is None:
        tell("no rung is certified and meets every requirement")
        return UNMET
    return 0


def _write(ladder: Ladder, out: Path | None, report: Path | None, save: Path | None, force: bool, title: str) -> None:
    """The files that were asked for; without a chosen rung there is no model to save."""
    from ..files import save as save_model
    from ..report import write_report
    from ..report.terminal import waiting

    if out is not None:
        ladder.write(out, force)
    if report is not None:
        with waiting("writing the report"):
            write_report(ladder, report, title, force)
    if save is not None and ladder.chosen is not None:
        chosen = ladder.evidence[ladder.chosen]
        assert chosen.model is not None
        save_model(chosen.model, save, chosen.portable_certificate, force)


def _numbers(text: str) -> list[int]:
    """ "16,8-1" as [16, 8, 7, …, 1]."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise OptionError(f"bits {text!r}: give numbers and ranges with commas, such as 8-1 or 16,8,4")
        first = int(match[1])
        last = int(match[2] or first)
        if max(first, last) > 32:
            raise OptionError(f"bits {text!r}: {max(first, last)} is too many; give 1 to 16, or 32")
        found += range(first, last - 1, -1) if first >= last else range(first, last + 1)
    return found


def bench(
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            help="solve, train, images, certify, export, commands; all if none is named.", show_default=False
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A checkpoint of mondeq-quant, whose solves are timed as well.", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything.")] = False,
    details: Annotated[bool, typer.Option("--details", help="Also the tables of every part.")] = False,
    markdown: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write the ratios to this page, or into its place for them.", show_default=False
        ),
    ] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> int:
    """Measure speed side by side with peers, and print all ratios of the run as one table."""
    from ..bench.run import run, tables
    from ..bench.tables import WIDE, check_page, ratios, write_page
    from ..report.terminal import rendered

    if markdown is not None:
        check_page(markdown)
    result = run(parts or (), checkpoint, data_dir, quick)
    if markdown is not None:
        write_page(markdown, result)
    if as_json:
        say_json(result)
    else:
        shown = (*(tables(result) if details else ()), ratios(result))
        say("\n".join(rendered(table, WIDE) for table in shown), end="")
    return 0
