"""Commands that judge models: certify, plan, bench."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from .common import UNMET, DataDir, DataName, Force, Json, Model, OnData, flag, option, say, say_json, tell
from .options import BitsList, InputBits, numbers, scheme_option

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
    reference: Annotated[
        Path | None, option("The float model that it came from: prove how far the codes moved the answers.")
    ] = None,
    data: Annotated[
        DataName | None,
        option("Data set to prove it on, input by input: digits, mnist or cifar10.", metavar="DATA"),
    ] = None,
    split: Annotated[
        SplitName, typer.Option(metavar="SPLIT", help="Part of the data set: train, validation or test.")
    ] = SplitName.test,
    limit: Annotated[int | None, option("Only the first so many samples.")] = None,
    require: Annotated[bool, flag("Exit with 1 unless certified.", "--require")] = False,
    eps_inf: Annotated[
        float | None,
        option("Also certify and attack every image within so much per pixel (of [0, 1]); needs --data."),
    ] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> int:
    """Prove what holds for a file, alone or against the float network it came from.

    certified: a positive margin is proved, so every input has exactly one equilibrium. converged: not proved, yet all
    inputs of --data settled. diverged: some did not. unknown: not proved, and without --data not tried.
    """
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


def asked(help: str) -> Any:
    """An option that asks something of what is chosen."""
    return option(help, rich_help_panel="What is asked of the chosen one, on the validation split")


def plan(
    file: Model,
    data: OnData,
    schemes: Annotated[str, scheme_option(" Several with commas; default all.")] = "",
    bits: BitsList = "8-1",
    input_bits: InputBits = None,
    mixed: Annotated[
        bool, flag("Also choose bits part by part: A, K, U, b and head of a structured version.", "--mixed")
    ] = False,
    min_accuracy: Annotated[float | None, asked("At least this share of right answers, 0 to 1.")] = None,
    min_agreement: Annotated[
        float | None, asked("At least this share of inputs whose class is proved to be the float network's, 0 to 1.")
    ] = None,
    max_displacement: Annotated[
        float | None, asked("Every equilibrium is proved to move by at most this, in the 2-norm.")
    ] = None,
    max_bytes: Annotated[int | None, asked("At most so many bytes, packed.")] = None,
    out: Annotated[Path | None, option("Write the ladder here, as JSON.")] = None,
    report: Annotated[Path | None, option("Write a report here, as one HTML page.")] = None,
    save: Annotated[Path | None, option("Write the chosen model here.")] = None,
    data_dir: DataDir = None,
    force: Force = False,
    as_json: Json = False,
) -> int:
    """Quantize by every scheme at every number of bits, certify each, and choose.

    Chosen is the smallest that is certified and meets every requirement; with --mixed and --max-bytes the one that is
    proved to move least within those bytes. Requirements are judged on the validation split, figures are of the test
    split. Exit status 1 where nothing meets them all.
    """
    from .._atomic import check_output
    from ..data import load_data
    from ..files import load
    from ..ladder import Requirements
    from ..plan import build_ladder
    from ..report.terminal import ladder_table, ladder_words, rendered, waiting

    asked = Requirements(min_agreement, max_displacement, min_accuracy, max_bytes)
    names = [name.strip().lower() for name in schemes.split(",")] if schemes else None
    widths = numbers("bits", bits, 32)
    for path in (out, report, save):
        if path is not None:
            check_output(path, force)
    model, loaded = load(file), load_data(data, data_dir)
    with waiting("quantizing and certifying") as progress:
        ladder = build_ladder(model, loaded, names, widths, asked, input_bits, progress, mixed)
    _write(ladder, out, report, save, force, f"{file.name} on {data}")
    files = {"ladder": out, "report": report, "model": None if ladder.chosen is None else save}
    if as_json:
        say_json(ladder.to_dict())
    else:
        say(rendered(ladder_table(ladder)), end="")
        say(rendered(ladder_words(ladder)), end="")
        for purpose, path in files.items():
            if path is not None:
                say(f"{purpose:<8} {path}")  # whole, whatever the width
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


def bench(
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            help="solve, train, images, certify, export, commands; all if none is named.", show_default=False
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        option("A checkpoint of mondeq-quant, whose solves are timed as well."),
    ] = None,
    quick: Annotated[bool, flag("Less of everything.", "--quick")] = False,
    details: Annotated[bool, flag("Also the tables of every part.", "--details")] = False,
    markdown: Annotated[
        Path | None,
        option("Also write the ratios to this page, or into its place for them.", metavar="FILE"),
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
