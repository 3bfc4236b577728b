"""The command that trains: ``equipoise train``."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from .common import INTERRUPTED, UNMET, Bits, DataDir, DataName, Force, Json, OnData, Out, keep, say_json, tell

if TYPE_CHECKING:
    from ..jobs import Job
    from ..penalties import MarginPenalty
    from ..quantization.schemes import Scheme
    from ..robust_loss import RobustLoss

__all__ = [
    "BatchSize",
    "Features",
    "Granularity",
    "LearningRate",
    "Margin",
    "Rank",
    "Scale",
    "Target",
    "WeightDecay",
    "register",
]


class ModelName(enum.StrEnum):
    mondeq = "mondeq"
    nemon = "nemon"
    nemonconv = "nemonconv"


class PresetName(enum.StrEnum):
    small = "small"
    published = "published"


def _option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, show_default=False)


Features = Annotated[
    int | None, _option("Size of the equilibrium layer, default 100; channels of a nemonconv.", "--features")
]
Rank = Annotated[int | None, _option("Rows of A; default a quarter of the features.", "--rank")]
Margin = Annotated[float | None, _option("Margin to start from, default 1; it is learned.", "--margin")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Samples per step.")]
LearningRate = Annotated[float, typer.Option("--lr", help="Largest learning rate of the cycle.")]
WeightDecay = Annotated[
    float | None,
    _option("Of matrices, to keep W and its rounding small; default 0.3, and 0.1 at 1 input bit.", "--weight-decay"),
]
Granularity = Annotated[str | None, _option("Of scales: tensor or row.", "--granularity")]
Scale = Annotated[str | None, _option("Fitted in every step: max or mse.", "--scale")]
Target = Annotated[float | None, _option("Drive the proved margin to this; exit 1 where it is missed.")]


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(train)


def train(
    out: Out,
    data: OnData = DataName.digits,
    model: Annotated[ModelName, typer.Option(help="Kind of network.")] = ModelName.mondeq,
    start: Annotated[Path | None, _option("A float network of equipoise to start from.", "--from")] = None,
    features: Features = None,
    rank: Rank = None,
    margin: Margin = None,
    gamma: Annotated[float | None, _option("Measure of a nemon, below 1; default 0.95, of a nemonconv 0.1.")] = None,
    preset: Annotated[
        PresetName | None, _option("Of a nemonconv: small (default) or published, which has 81 channels.")
    ] = None,
    eps: Annotated[
        float, typer.Option("--eps-inf", help="Train on boxes of so much per pixel of [0, 1]; nemon only.")
    ] = 0.0,
    eps_share: Annotated[
        float | None, _option("Of the boxes' loss beside that of the images, 0 to 1; default 0.5.")
    ] = None,
    eps_ramp: Annotated[
        float | None, _option("Part of the training in which boxes and share grow, 0 to 1; default 0.5.")
    ] = None,
    lipschitz_weight: Annotated[float, typer.Option(help="Of the ℓ∞ Lipschitz bound in the loss; nemon only.")] = 0.0,
    epochs: Annotated[int | None, _option("Passes over the training split; default 12, or the preset's.")] = None,
    batch_size: BatchSize = 128,
    lr: LearningRate = 3e-3,
    weight_decay: WeightDecay = None,
    seed: Annotated[int, typer.Option(help="Of initial weights and the order of samples.")] = 0,
    scheme: Annotated[
        str | None, _option("Train the codes of assembled, structured, compensated or cayley; default: floats.")
    ] = None,
    bits: Annotated[int | None, _option("Of the recurrent weights: 1 to 16, or 32.")] = None,
    skew_bits: Annotated[int | None, _option("Of K in the structured scheme; default BITS.")] = None,
    input_bits: Bits = None,
    bias_bits: Bits = None,
    head_bits: Bits = None,
    granularity: Granularity = None,
    scale: Scale = None,
    learn_scale: Annotated[bool, typer.Option("--learn-scale", help="Learn the scales instead of fitting.")] = False,
    margin_target: Target = None,
    margin_ratio: Annotated[float | None, _option("Drive ‖ΔW‖₂ to this part of the margin; else exit 1.")] = None,
    margin_weight: Annotated[float | None, _option("Of these aims in the loss; default 1.")] = None,
    stop_on_lost_margin: Annotated[
        bool, typer.Option("--stop-on-lost-margin", help="Stop, with exit 1, after an epoch without proved margin.")
    ] = False,
    devices: Annotated[int, typer.Option(help="Processes on this machine, one per device.")] = 1,
    nodes: Annotated[int, typer.Option(help="Machines; the same command is started on each.")] = 1,
    log_dir: Annotated[Path | None, _option("For checkpoint, metrics and TensorBoard; default OUT with .run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint there.")] = False,
    data_dir: DataDir = None,
    force: Force = False,
    as_json: Json = False,
) -> int:
    """Train a network, as floats or through a quantizer, and save it with its certificate.

    Ctrl-C, and even kill -9, keep the last whole epoch, for --resume.
    """
    from .._atomic import check_output
    from ..data import load_data
    from ..demo import PRESETS
    from ..jobs import Job
    from ..training import CHECKPOINT_NAME, TrainingConfig

    parts = {"input_bits": input_bits, "bias_bits": bias_bits, "head_bits": head_bits, "skew_bits": skew_bits}
    chosen = chosen_scheme(scheme, bits, {**parts, "granularity": granularity, "scale": scale}, margin_target)
    robust = robust_loss(eps, eps_share, eps_ramp, lipschitz_weight)
    if model is not ModelName.nemon and (robust is not None or (gamma is not None and model is ModelName.mondeq)):
        raise OptionError("--gamma, --eps-inf and --lipschitz-weight are of maximum norms: add --model nemon")
    measure = 0.95 if gamma is None and model is ModelName.nemon and start is None else gamma
    shape = preset_for(model, preset)
    config = TrainingConfig(
        (12 if shape is None else PRESETS[shape].epochs) if epochs is None else epochs,
        batch_size,
        lr,
        decay(weight_decay, input_bits),
        seed=seed,
        devices=devices,
        nodes=nodes,
        stop_on_lost_margin=stop_on_lost_margin,
        margin=penalty(margin_target, margin_ratio, margin_weight),
        robust=robust,
    )
    job = Job(data, config, chosen, learn_scale, features, rank, margin, start, data_dir, measure, shape)
    check_output(out, force)
    folder = log_dir or out.with_suffix(".run")
    if folder == out:
        raise OptionError(f"{out} would be the model and the folder of its training: name one otherwise, or --log-dir")
    if force and not resume and (folder / CHECKPOINT_NAME).exists():
        job.network(load_data(data, data_dir))  # nothing is thrown away for a training that cannot begin
        (folder / CHECKPOINT_NAME).unlink()
    return _run(job, folder, resume, out, force, as_json)


def _run(job: Job, folder: Path, resume: bool, out: Path, force: bool, as_json: bool) -> int:
    """Train, save and report; the exit status."""
    outcome = job.run(folder, resume)
    result = outcome.training
    found = {"out": str(out), **job.scheme_fields(), "seed": job.config.seed, **outcome.figures()}
    if result.interrupted:
        tell(f"interrupted: {result.checkpoint} holds the last whole epoch; add --resume to go on")
        if as_json:
            say_json(found)
        return INTERRUPTED
    keep(outcome.model, out, force, found, as_json)
    missed = [words for words in (result.stopped, result.shortfall) if words is not None]
    for words in missed:
        tell(words)
    return UNMET if missed else 0


def preset_for(model: ModelName, preset: PresetName | None) -> str | None:
    """The preset of a convolutional network, None of any other."""
    if model is ModelName.nemonconv:
        return (preset or PresetName.small).value
    if preset is not None:
        raise OptionError(f"--preset {preset.value} is of convolutional networks: add --model nemonconv")
    return None


def chosen_scheme(name: str | None, bits: int | None, options: dict[str, Any], target: float | None) -> Scheme | None:
    """The scheme of these options, None where there is none; options that were not given are None."""
    from ..quantization.schemes import scheme_from_dict

    given = {option: value for option, value in {"bits": bits, **options}.items() if value is not None}
    if name is None:
        if given:
            option = next(iter(given)).replace("_", "-")
            raise OptionError(f"--{option} needs a --scheme: assembled, structured, compensated or cayley")
        return None
    if name == "compensated" and target is not None:
        given["margin"] = target  # the scheme itself reaches it
    return scheme_from_dict({"scheme": name, **given})


def decay(given: float | None, input_bits: int | None) -> float:
    """The weight decay: codes of one bit are signs, which decay only makes restless."""
    return given if given is not None else 0.1 if input_bits == 1 else 0.3


def robust_loss(eps: float, share: float | None, ramp: float | None, lipschitz_weight: float) -> RobustLoss | None:
    """What the options of robust training ask for."""
    from ..robust_loss import RobustLoss

    given = {name: value for name, value in {"share": share, "ramp": ramp}.items() if value is not None}
    if given and not eps:
        raise OptionError(f"--eps-{next(iter(given))} is of training on boxes: add --eps-inf, such as 0.1")
    loss = RobustLoss(eps, lipschitz_weight=lipschitz_weight, **given)
    return loss if loss.eps or loss.lipschitz_weight else None


def penalty(target: float | None, ratio: float | None, weight: float | None) -> MarginPenalty | None:
    """What the three margin options ask for."""
    from ..penalties import MarginPenalty

    if target is None and ratio is None:
        if weight is not None:
            raise OptionError(f"--margin-weight {weight:g} needs --margin-target or --margin-ratio")
        return None
    return MarginPenalty(target, ratio, 1.0 if weight is None else weight)
