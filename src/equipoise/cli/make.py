"""Commands that make models: demo, train, import, quantize."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import OptionError
from .common import (
    INTERRUPTED,
    UNMET,
    Bits,
    DataDir,
    DataName,
    Force,
    Json,
    Model,
    OnData,
    Out,
    keep,
    say,
    say_json,
    tell,
)

__all__ = ["register"]


class ModelName(enum.StrEnum):
    mondeq = "mondeq"
    nemon = "nemon"


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(demo)
    app.command()(train)
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


def train(
    out: Out,
    data: OnData = DataName.digits,
    model: Annotated[ModelName, typer.Option(help="Kind of network.")] = ModelName.mondeq,
    features: Annotated[int, typer.Option(help="Size of the equilibrium layer.")] = 100,
    rank: Annotated[
        int | None, typer.Option(help="Rows of A; default a quarter of the features.", show_default=False)
    ] = None,
    margin: Annotated[float, typer.Option(help="Margin to start from; it is learned.")] = 0.2,
    gamma: Annotated[
        float | None, typer.Option(help="Measure of a nemon, below 1; default 0.95.", show_default=False)
    ] = None,
    eps: Annotated[
        float, typer.Option("--eps-inf", help="Train on boxes of so much per pixel of [0, 1]; nemon only.")
    ] = 0.0,
    lipschitz_weight: Annotated[float, typer.Option(help="Of the ℓ∞ Lipschitz bound in the loss; nemon only.")] = 0.0,
    epochs: Annotated[int, typer.Option(help="Passes over the training split.")] = 12,
    batch_size: Annotated[int, typer.Option(help="Samples per step.")] = 128,
    lr: Annotated[float, typer.Option(help="Largest learning rate of the cycle.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of initial weights and the order of samples.")] = 0,
    log_dir: Annotated[
        Path | None,
        typer.Option(help="For checkpoint, metrics and TensorBoard; default OUT with .run.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint there.")] = False,
    data_dir: DataDir = None,
    force: Force = False,
    as_json: Json = False,
) -> int:
    """Train a network and save it. Ctrl-C keeps the last whole epoch, for --resume."""
    from .._atomic import check_output
    from ..data import load_data
    from ..demo import classifier
    from ..robust import RobustLoss
    from ..training import CHECKPOINT_NAME, TrainingConfig, fit

    check_output(out, force)
    robust = RobustLoss(eps, lipschitz_weight=lipschitz_weight) if eps or lipschitz_weight else None
    if model is not ModelName.nemon and (robust is not None or gamma is not None):
        raise OptionError("--gamma, --eps-inf and --lipschitz-weight are of maximum norms: add --model nemon")
    config = TrainingConfig(epochs, batch_size, lr, seed=seed, robust=robust)
    loaded = load_data(data, data_dir)
    measure = (0.95 if gamma is None else gamma) if model is ModelName.nemon else None
    network = classifier(loaded, features, max(features // 4, 1) if rank is None else rank, margin, seed, measure)
    folder = log_dir or out.with_suffix(".run")
    if force and not resume:
        (folder / CHECKPOINT_NAME).unlink(missing_ok=True)
    result = fit(network, loaded, config, folder, resume=resume)
    found = {
        "out": str(out),
        "interrupted": result.interrupted,
        "checkpoint": str(result.checkpoint),
        "accuracy_validation": result.accuracy_validation,
        "accuracy_test": result.accuracy_test,
        "seconds_per_epoch": result.seconds_per_epoch,
    }
    if result.interrupted:
        tell(f"interrupted: {result.checkpoint} holds the last whole epoch; add --resume to go on")
        if as_json:
            say_json(found)
        return INTERRUPTED
    keep(network.eval(), out, force, found, as_json)
    return 0


def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A .pt, .pth or .safetensors state dict.", show_default=False)
    ],
    format: Annotated[str, typer.Option(help="mondeq-quant, monotone_op_net or nemon.", show_default=False)],
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
