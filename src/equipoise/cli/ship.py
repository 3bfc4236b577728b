"""The command that turns a model file into a program: export."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from .common import DataDir, DataName, Force, Json, Model, say, say_json, tell

__all__ = ["register"]

CALIBRATION = 2000


class TargetName(enum.StrEnum):
    c = "c"
    onnx = "onnx"


class ModeName(enum.StrEnum):
    cayley = "cayley"
    factored = "factored"


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(export)


def export(
    file: Model,
    target: Annotated[TargetName, typer.Option(help="C99 in integers only, or an ONNX graph.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    tol: Annotated[
        float | None, typer.Option(help="Rounding and truncation together stay below this.", show_default=False)
    ] = None,
    mode: Annotated[ModeName | None, typer.Option(help="Default: what the codes are for.", show_default=False)] = None,
    input_range: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LO HI", help="Raw pixels, or network inputs without preprocessing.", show_default=False),
    ] = None,
    activation_bits: Annotated[int, typer.Option(help="Of the iterates: 8 or 16.")] = 16,
    reference: Annotated[
        Path | None, typer.Option(help="The float model it came from: bound the error against it.", show_default=False)
    ] = None,
    data: Annotated[
        DataName | None,
        typer.Option(help="Choose the iterates' range on its training inputs, and check it.", show_default=False),
    ] = None,
    uncertified: Annotated[bool, typer.Option("--uncertified", help="Write it even if nothing is proved.")] = False,
    data_dir: DataDir = None,
    force: Force = False,
    as_json: Json = False,
) -> int:
    """Write a model as a program with a fixed number of steps and a proved error."""
    from ..data import load_data
    from ..export import export as ship
    from ..export.write import check_folder
    from ..files import load
    from ..plan import check_fits
    from ..report.terminal import pairs_table, rendered, waiting

    check_folder(out, force)
    model = load(file)
    original = None if reference is None else load(reference)
    calibration = None
    if data is not None:
        loaded = load_data(data, data_dir)
        check_fits(model, loaded)
        calibration = loaded.train.x[:CALIBRATION]
    with waiting("proving and writing"):
        certificate = ship(
            model,
            out,
            target.value,
            reference=original,
            calibration=calibration,
            tol=tol,
            mode=None if mode is None else mode.value,
            input_range=input_range,
            activation_bits=activation_bits,
            uncertified=uncertified,
            force=force,
        )
    if not certificate.certified:
        tell("warning: UNCERTIFIED: nothing is proved about the answers of this network")
    if as_json:
        say_json({**certificate.to_dict(), "out": str(out)})
    else:
        say(rendered(pairs_table([*certificate.summary(), ("written to", str(out))])), end="")
    return 0
