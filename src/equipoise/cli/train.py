"""The command that trains: ``equipoise train``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from .common import INTERRUPTED, UNMET, DataDir, DataName, Force, Json, OnData, Out, flag, keep, option, say_json, tell
from .options import (
    Course,
    LearnScale,
    Network,
    PrecisionName,
    Rounding,
    Target,
    bits_of,
    grouped,
    penalty,
    scheme_option,
)

if TYPE_CHECKING:
    from ..jobs import Job
    from ..robust_loss import RobustLoss

__all__ = ["register"]


@dataclass(frozen=True)
class Aims:
    """What is asked of it beside accuracy."""

    eps_inf: Annotated[
        float, option("Train on all images within so much per pixel (of [0, 1]), as boxes; nemon only.")
    ] = 0.0
    eps_share: Annotated[
        float | None, option("Share of the boxes' loss beside that of the images, 0 to 1; default 0.5.")
    ] = None
    eps_ramp: Annotated[
        float | None, option("Part of the training in which boxes and their share grow, 0 to 1; default 0.5.")
    ] = None
    lipschitz_weight: Annotated[float, option("Weight of the ℓ∞ Lipschitz bound in the loss; nemon only.")] = 0.0
    margin_target: Target = None
    margin_ratio: Annotated[
        float | None, option("Drive ‖ΔW‖₂ below this part of the margin, such as 0.9; exit 1 where it is missed.")
    ] = None
    margin_weight: Annotated[float | None, option("Weight of these two in the loss; default 1.")] = None
    stop_on_lost_margin: Annotated[
        bool, flag("Stop, with exit 1, after an epoch that ends without a proved margin.", "--stop-on-lost-margin")
    ] = False

    def fields(self, model: str) -> dict[str, Any]:
        """The fields of a training's configuration that these are."""
        robust = self._robust()
        if robust is not None and model != "nemon":
            raise OptionError("--eps-inf and --lipschitz-weight are of maximum norms: add --model nemon")
        return {
            "robust": robust,
            "margin": penalty(self.margin_target, self.margin_ratio, self.margin_weight),
            "stop_on_lost_margin": self.stop_on_lost_margin,
        }

    def _robust(self) -> RobustLoss | None:
        from ..robust_loss import RobustLoss

        given = {name: value for name in ("share", "ramp") if (value := getattr(self, f"eps_{name}")) is not None}
        if given and not self.eps_inf:
            raise OptionError(f"--eps-{next(iter(given))} is of training on boxes: add --eps-inf, such as 0.1")
        loss = RobustLoss(self.eps_inf, lipschitz_weight=self.lipschitz_weight, **given)
        return loss if loss.eps or loss.lipschitz_weight else None


@dataclass(frozen=True)
class Machines:
    """What it is trained on."""

    devices: Annotated[int, typer.Option(help="Processes on this machine, one per device.")] = 1
    nodes: Annotated[int, typer.Option(help="Machines; the same command is started on each.")] = 1
    precision: Annotated[
        PrecisionName,
        typer.Option(metavar="PRECISION", help="32, or on a GPU bf16 or fp16 around the equilibrium."),
    ] = PrecisionName.full
    channels_last: Annotated[bool, flag("Keep images with their channels last in memory.", "--channels-last")] = False

    def fields(self) -> dict[str, Any]:
        """The fields of a training's configuration that these are."""
        return {**vars(self), "precision": self.precision.value}


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(grouped(train))


def train(
    *,
    out: Out,
    data: OnData = DataName.digits,
    network: Network,
    start: Annotated[Path | None, option("A float model file to start from.", "--from")] = None,
    course: Course,
    scheme: Annotated[str | None, scheme_option(" Default: floats are trained.")] = None,
    bits: Annotated[int | None, bits_of("the recurrent weights")] = None,
    rounding: Rounding,
    learn_scale: LearnScale = False,
    aims: Aims,
    machines: Machines,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of the order of samples.")] = 0,
    log_dir: Annotated[
        Path | None, option("Folder for checkpoint, metrics and TensorBoard; default OUT with the ending .run.")
    ] = None,
    resume: Annotated[bool, flag("Go on from the checkpoint in that folder.", "--resume")] = False,
    data_dir: DataDir = None,
    force: Force = False,
    as_json: Json = False,
) -> int:
    """Train a network, as floats or through a quantizer, and save it with its certificate.

    With --scheme and --bits the codes themselves are trained: what is saved is bit for bit what was trained. After
    Ctrl-C, even after kill -9, --resume goes on from the last whole epoch.
    """
    from .._atomic import check_output
    from ..data import load_data
    from ..jobs import Job
    from ..training import CHECKPOINT_NAME

    chosen = rounding.scheme(scheme, bits, aims.margin_target)
    further = {**aims.fields(network.model), **machines.fields(), "seed": seed}
    config = course.config(network, data, rounding.input_bits, **further)
    job = Job(data, config, chosen, learn_scale, start=start, data_dir=data_dir, **network.fields())
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
