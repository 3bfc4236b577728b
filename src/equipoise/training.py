"""Train a classifier on data in memory, and measure it.

:func:`fit` prints nothing but a progress bar on stderr, writes nothing outside ``out_dir``, and ends with a
result when Ctrl-C is pressed.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ._lightning import Classifier, Row, placed, run
from .data import Batches, Data, Split
from .errors import FileFormatError, InputError, OptionError, OutputError
from .robust import RobustLoss

__all__ = ["FitResult", "TrainingConfig", "evaluate", "fit"]

CHECKPOINT_NAME = "last.ckpt"


@dataclass(frozen=True)
class TrainingConfig:
    """How to train: cross-entropy, fused Adam, one cycle of the learning rate over all steps.

    ``learning_rate`` is the largest of the cycle; ``weight_decay`` is decoupled (AdamW). ``seed`` fixes the
    order of the samples; initial weights are the caller's. ``accelerator`` is "auto", "cpu", "cuda" or
    "mps". ``robust`` adds worst scores over boxes and a Lipschitz term to the loss.
    Raises :class:`OptionError` for a value outside its range.
    """

    epochs: int
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    seed: int = 0
    accelerator: str = "auto"
    robust: RobustLoss | None = None

    def __post_init__(self) -> None:
        if type(self.epochs) is not int or self.epochs < 1:
            raise OptionError(f"epochs={self.epochs!r}: give a positive integer")
        if not 0 < self.learning_rate < math.inf:
            raise OptionError(f"learning_rate={self.learning_rate!r}: give a positive number, such as 3e-3")
        if not 0 <= self.weight_decay < math.inf:
            raise OptionError(f"weight_decay={self.weight_decay!r}: give 0 or a positive number")
        if self.accelerator not in ("auto", "cpu", "cuda", "mps"):
            raise OptionError(f"accelerator={self.accelerator!r}: choose auto, cpu, cuda or mps")
        if self.robust is not None and not isinstance(self.robust, RobustLoss):
            raise OptionError(f"robust={self.robust!r}: give equipoise.RobustLoss(eps=…), or None")
        empty = Split(torch.empty(0, 1), torch.empty(0, dtype=torch.int64))
        Batches(empty, self.batch_size, seed=self.seed)  # it knows which sizes and seeds it accepts


@dataclass(frozen=True)
class FitResult:
    """What training came to; of an interrupted one, no accuracies, and a history up to its last whole epoch.

    ``history`` has a row per epoch: loss and accuracy on both splits, learning rate, seconds (of the pass
    over the training split; ``seconds_per_epoch`` is their mean) and, where the model has equilibrium
    layers, their smallest proved ``margin`` and the solver ``steps`` per sample. Accuracies are in [0, 1].
    ``checkpoint`` is None without ``out_dir``.
    """

    accuracy_validation: float | None
    accuracy_test: float | None
    seconds_per_epoch: float | None
    history: list[Row]
    interrupted: bool
    checkpoint: Path | None


def fit(
    model: nn.Module,
    data: Data,
    config: TrainingConfig,
    out_dir: str | Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> FitResult:
    """Train ``model``, which maps (B, data.features) to scores (B, data.class_count), in place.

    ``out_dir`` receives ``metrics.csv``, TensorBoard logs in ``tensorboard/``, and ``last.ckpt``, which is
    the last whole epoch (the initial weights before the first one ends). ``resume`` continues from that file
    as if training had never stopped; where there is none, it starts at the beginning. After Ctrl-C the step
    under way is finished, the model keeps its weights, and the result says ``interrupted``.

    Raises:
        InputError: the model does not take or return these shapes, or has nothing to train.
        OptionError: resuming with another configuration, data set or model; an accelerator that is not here.
        OutputError: ``out_dir`` cannot be written, or holds a checkpoint and ``resume`` is False.
        FileFormatError: the checkpoint is damaged or something else.
    """
    _check_model(model, data)
    checkpoint = _prepared(Path(out_dir), resume) if out_dir is not None else None
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "accelerator"}
    module = Classifier(
        model,
        Batches(data.train, config.batch_size, shuffle=True, seed=config.seed),
        data.validation,
        config.learning_rate,
        config.weight_decay,
        identity={"data": data.name, **settings},
        robust=None if config.robust is None else partial(config.robust, preprocessing=data.preprocessing),
    )
    resume = checkpoint is not None and checkpoint.exists()
    if checkpoint is not None and resume:
        _check_checkpoint(checkpoint, module)
    device, was_training = next(model.parameters()).device, model.training
    model.train()
    try:
        interrupted = run(module, config.epochs, config.seed, config.accelerator, checkpoint, resume, progress)
    finally:
        model.to(device).train(was_training)  # Lightning leaves it on the CPU
    history = module.history
    return FitResult(
        accuracy_validation=None if interrupted else evaluate(model, data.validation),
        accuracy_test=None if interrupted else evaluate(model, data.test),
        seconds_per_epoch=sum(row["seconds"] for row in history) / len(history) if history else None,
        history=history,
        interrupted=interrupted,
        checkpoint=checkpoint,
    )


@torch.no_grad()  # and not inference mode: what layers cache here must still serve training afterwards
def evaluate(model: nn.Module, split: Split, batch_size: int = 10_000) -> float:
    """Share of the samples of ``split`` whose highest score is that of their class, in [0, 1].

    Raises :class:`InputError` for an empty split, :class:`OptionError` for a bad batch size.
    """
    if not len(split):
        raise InputError("an empty split has no accuracy: give at least one sample")
    was_training = model.training
    model.eval()
    try:
        hits = [(model(x).argmax(1) == y).sum() for x, y in Batches(placed(split, model), batch_size)]
    finally:
        model.train(was_training)
    return int(torch.stack(hits).sum()) / len(split)


def _check_model(model: nn.Module, data: Data) -> None:
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("the model has no parameters to train (a quantized one holds codes): give a float model")
    sample = placed(Split(data.train.x[:2], data.train.y[:2]), model)
    try:
        with torch.no_grad():  # of a copy: what a layer learns from a call must not differ after a resume
            shape = tuple(copy.deepcopy(model).eval()(sample.x).shape)
    except RuntimeError as error:
        raise InputError(f"the model does not take the {data.features} features of {data.name}: {error}") from error
    if shape != (len(sample), data.class_count):
        wanted = (len(sample), data.class_count)
        raise InputError(
            f"the model returns shape {shape} for two samples of {data.name}, not {wanted}: end it"
            f" with Linear(…, {data.class_count})"
        )


def _prepared(folder: Path, resume: bool) -> Path:
    checkpoint = folder / CHECKPOINT_NAME
    if checkpoint.exists() and not resume:
        raise OutputError(f"{checkpoint} exists: resume it, remove it, or choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{CHECKPOINT_NAME}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"{folder} cannot be written ({error.strerror}): choose another folder") from error
    return checkpoint


def _check_checkpoint(path: Path, module: Classifier) -> None:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        identity, shapes = (
            saved["equipoise"]["identity"],
            {k: v.shape for k, v in saved["state_dict"].items()},
        )
    except Exception as error:  # damaged files make torch raise a dozen unrelated types
        raise FileFormatError(f"{path} is not a checkpoint of this trainer, or damaged: {error}") from error
    for field, value in module.identity.items():
        if identity.get(field) != value:
            was = identity.get(field)
            raise OptionError(f"{path} was written with {field}={was!r}, not {value!r}: resume with the same")
    if shapes != {k: v.shape for k, v in module.state_dict().items()}:
        raise OptionError(f"{path} holds weights of other names or shapes: resume with the model that wrote it")
