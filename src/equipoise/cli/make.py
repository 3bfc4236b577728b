"""Commands that make models: demo, import, quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import UNMET, Force, Json, Model, Out, keep, option, say, say_json
from .options import ROUNDING, Rounding, bits_of, grouped, scheme_option

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(demo)
    app.command("import")(import_)
    app.command()(grouped(quantize))


def demo(
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("demo"),
    force: Force = False,
    as_json: Json = False,
) -> int:
    """Train on handwritten digits, quantize 8 to 1 bits, certify, choose, and write a report."""
    from ..demo import run_demo
    from ..report.terminal import ladder_table, ladder_words, pairs_table, rendered

    result = run_demo(out, force)
    files = {purpose: str(path) for purpose, path in sorted(result.files.items())}
    if as_json:
        say_json({"out": str(out), "files": files, **result.ladder.to_dict()})
    else:
        say(rendered(ladder_table(result.ladder)), end="")
        say(rendered(ladder_words(result.ladder)))
        say(rendered(pairs_table(files.items())), end="")
    return UNMET if result.ladder.chosen is None else 0


def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A .pt, .pth or .safetensors state dict.", show_default=False)
    ],
    format: Annotated[str, option("Whose it is: mondeq-quant, monotone_op_net or nemon.")],
    out: Out,
    margin: Annotated[float | None, option("The margin, where the file has none; default 1, of nemon 0.9.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> int:
    """Take in a network that was trained with the published code of a paper.

    Any other network comes in through Python: MonDEQ.from_weights takes W, U and b.
    """
    from .._atomic import check_output
    from ..importers import import_model

    check_output(out, force)
    keep(import_model(file, format, margin), out, force, {"out": str(out), "format": format}, as_json)
    return 0


def quantize(
    *,
    file: Model,
    out: Out,
    scheme: Annotated[str, scheme_option()],
    bits: Annotated[int, bits_of("the recurrent weights")],
    rounding: Rounding,
    margin: Annotated[
        float | None,
        option("Margin that compensated is to reach; default 0.05.", rich_help_panel=ROUNDING),
    ] = None,
    alpha: Annotated[
        float | None,
        option("Step α of cayley; default the one with the best rate.", rich_help_panel=ROUNDING),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> int:
    """Turn a float network's weights into integer codes, and certify them.

    --bits is about the recurrent weights W alone; the others stay floats unless their own option is given.
    """
    from .._atomic import check_output
    from ..files import load
    from ..operators import scheme_from_dict
    from ..quantization.schemes import scheme_to_dict
    from ..quantize import quantize as quantized

    further = {name: value for name, value in (("margin", margin), ("alpha", alpha)) if value is not None}
    chosen = scheme_from_dict({"scheme": scheme, "bits": bits, **rounding.given(), **further})
    check_output(out, force)
    original = load(file)
    found = {"out": str(out), **scheme_to_dict(chosen)}
    keep(quantized(original, chosen), out, force, found, as_json, reference=original)
    return 0
