"""Commands that make models: demo, import, quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import (
    UNMET,
    Bits,
    Force,
    Json,
    Model,
    Out,
    keep,
    say,
    say_json,
)

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(demo)
    app.command("import")(import_)
    app.command()(quantize)


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
    format: Annotated[str, typer.Option(help="mondeq-quant or monotone_op_net.", show_default=False)],
    out: Out,
    margin: Annotated[
        float | None, typer.Option(help="m where the file has none; default 1.0.", show_default=False)
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> int:
    """Take in a network that was trained elsewhere."""
    from .._atomic import check_output
    from ..importers import import_model

    check_output(out, force)
    keep(import_model(file, format, margin), out, force, {"out": str(out), "format": format}, as_json)
    return 0


def quantize(
    file: Model,
    scheme: Annotated[str, typer.Option(help="assembled, structured, compensated or cayley.", show_default=False)],
    bits: Annotated[int, typer.Option(help="Of the recurrent weights: 1 to 16, or 32.", show_default=False)],
    out: Out,
    skew_bits: Annotated[
        int | None, typer.Option(help="Of K in the structured scheme; default BITS.", show_default=False)
    ] = None,
    input_bits: Bits = None,
    bias_bits: Bits = None,
    head_bits: Bits = None,
    granularity: Annotated[str | None, typer.Option(help="tensor or row.", show_default=False)] = None,
    scale: Annotated[str | None, typer.Option(help="max or mse.", show_default=False)] = None,
    margin: Annotated[float | None, typer.Option(help="Target of the compensated scheme.", show_default=False)] = None,
    alpha: Annotated[float | None, typer.Option(help="Step of the cayley scheme.", show_default=False)] = None,
    force: Force = False,
    as_json: Json = False,
) -> int:
    """Turn a float network's weights into integer codes."""
    from .._atomic import check_output
    from ..files import load
    from ..quantization.schemes import scheme_from_dict, scheme_to_dict
    from ..quantize import quantize as quantized

    options = {
        "scheme": scheme,
        "bits": bits,
        "skew_bits": skew_bits,
        "input_bits": input_bits,
        "bias_bits": bias_bits,
        "head_bits": head_bits,
        "granularity": granularity,
        "scale": scale,
        "margin": margin,
        "alpha": alpha,
    }
    chosen = scheme_from_dict({name: value for name, value in options.items() if value is not None})
    check_output(out, force)
    original = load(file)
    found = {"out": str(out), **scheme_to_dict(chosen)}
    keep(quantized(original, chosen), out, force, found, as_json, reference=original)
    return 0
