"""The command that turns a model file into a program: export."""

from __future__ import annotations

import enum
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import DataDir, DataName, Force, Json, Model, flag, option, say, say_json, tell

if TYPE_CHECKING:
    from torch import Tensor, nn

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
    target: Annotated[TargetName, option("c: C99 in integers only; onnx: ONNX graphs.", metavar="TARGET")],
    out: Annotated[Path, option("The folder to write.")],
    tol: Annotated[
        float | None,
        option("What the program's own rounding and its limited steps may err, together; sets the number of steps."),
    ] = None,
    mode: Annotated[
        ModeName | None,
        option("cayley or factored (codes of structured); default: the one that the codes are for.", metavar="MODE"),
    ] = None,
    input_range: Annotated[
        tuple[float, float] | None,
        option("Smallest and largest raw pixel, or network input where there is no preprocessing.", metavar="LO HI"),
    ] = None,
    activation_bits: Annotated[int, typer.Option(help="Bits of the iterates: 8 or 16.")] = 16,
    reference: Annotated[
        Path | None, option("The float model that it came from: bound the error against it, and not the codes' own.")
    ] = None,
    data: Annotated[
        DataName | None,
        option(
            "Data set (digits, mnist, cifar10) on whose training inputs a finer range of the iterates is chosen; the"
            " program then checks it.",
            metavar="DATA",
        ),
    ] = None,
    uncertified: Annotated[bool, flag("Write it even if nothing is proved of it.", "--uncertified")] = False,
    data_dir: DataDir = None,
    force: Force = False,
    as_json: Json = False,
) -> int:
    """Write a quantized model as a program with a fixed number of steps and a proved error.

    C takes codes of the schemes cayley (1 to 8 bits) and structured (1 to 16), with ReLU.
    """
    from ..export import export as ship
    from ..export.write import check_folder
    from ..files import load
    from ..report.terminal import pairs_table, rendered, waiting

    check_folder(out, force)
    model = load(file)
    original = None if reference is None else load(reference)
    calibration = None if data is None else _calibration(model, data, data_dir)
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
        if target is TargetName.c:
            say(f"check it: cd {shlex.quote(str(out))} && cc -std=c99 -O2 eqnet.c selftest.c -o selftest && ./selftest")
    return 0


def _calibration(model: nn.Module, data: DataName, folder: Path | None) -> Tensor:
    """Training inputs of a data set that fits the model."""
    from ..data import load_data
    from ..plan import check_fits

    loaded = load_data(data, folder)
    check_fits(model, loaded)
    return loaded.train.x[:CALIBRATION]
