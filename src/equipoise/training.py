"""Train a classifier on data in memory, and measure it.

:func:`fit` prints nothing but a progress bar on stderr, writes nothing outside ``out_dir``, and ends with a
result when Ctrl-C is pressed.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ._checkpoints import CHECKPOINT_NAME, checkpoint_in, flat, matching, model_fields
from ._config import TrainingConfig
from ._lightning import Classifier, Row, largest_batch, lost_margin, placed, run
from ._machines import check_machines
from .data import Batches, Data, Split
from .errors import ConvergenceWarning, InputError
from .layers.convolutional import ConvolutionalLayer
from .layers.equilibrium import EquilibriumLayer
from .penalties import proved

__all__ = ["CHECKPOINT_NAME", "FitResult", "TrainingConfig", "evaluate", "fit"]


@dataclass(frozen=True)
class FitResult:
    """What training came to; of an interrupted one, no accuracies, and a history up to its last whole epoch.

    ``history`` has a row per epoch: loss and accuracy on both splits, learning rate, seconds (of the pass
    over the training split; ``seconds_per_epoch`` is their mean) and, where the model has equilibrium
    layers, their smallest proved ``margin`` and the solver ``steps`` per sample. Accuracies are in [0, 1].
    ``checkpoint`` is None without ``out_dir``.

    ``margin`` is the smallest that is proved of the model's equilibrium layers, of one prepared for quantization that
    of the codes it would be converted to; ``target_met`` whether all holds that ``config.margin`` asked for, and
    ``shortfall`` says in words what does not; ``stopped`` why training ended before its last epoch, if it did.
    """

    accuracy_validation: float | None
    accuracy_test: float | None
    seconds_per_epoch: float | None
    history: list[Row]
    interrupted: bool
    checkpoint: Path | None
    margin: float | None = None
    target_met: bool | None = None
    shortfall: str | None = None
    stopped: str | None = None


def fit(
    model: nn.Module,
    data: Data,
    config: TrainingConfig,
    out_dir: str | Path | None = None,
    progress: bool = True,
    resume: bool = False,
    origin: Mapping[str, str | float | None] | None = None,
) -> FitResult:
    """Train ``model``, which maps (B, data.features) to scores (B, data.class_count), in place.

    ``out_dir`` receives ``metrics.csv``, TensorBoard logs in ``tensorboard/``, and ``last.ckpt``, which is
    the last whole epoch (the initial weights before the first one ends). ``resume`` continues from that file
    as if training had never stopped, to the last bit, also after ``kill -9``; where there is none, it starts at the
    beginning. After Ctrl-C the step under way is finished, the model keeps its weights, and the result says
    ``interrupted``. ``origin`` names what the weights come from: a run with another one is not resumed.

    With several ``config.devices`` or ``nodes`` Lightning runs the calling script again for each (so it must be a
    file, and has one such training), or torchrun does; every process comes here with the same arguments, takes its
    part of every batch, and all have the same gradient: that of one process, up to rounding and ``config.tol``.
    **Only the first process returns**; the others end inside. Machines share the file system that ``out_dir`` lies on.

    Raises:
        InputError: the model does not take or return these shapes, or has nothing to train.
        OptionError: resuming with another configuration, data set or model; an accelerator that is not here.
        OutputError: ``out_dir`` cannot be written, or holds a checkpoint and ``resume`` is False.
        FileFormatError: the checkpoint is damaged or something else.
        StructureError: ``config.margin`` for a model without equilibrium layers.
    """
    check_machines(config.devices, config.nodes)
    _check_model(model, data)
    checkpoint = checkpoint_in(Path(out_dir), resume) if out_dir is not None else None
    settings = flat({"data": data.name, **config.course(), "model": model_fields(model), **(origin or {})}, "")
    batches = Batches(data.train, config.batch_size, shuffle=True, seed=config.seed)
    module = Classifier(model, batches, data.validation, config, settings, data.preprocessing)
    resume = checkpoint is not None and checkpoint.exists()
    known = matching(checkpoint, settings, module.state_dict()) if checkpoint is not None and resume else []
    over = config.stop_on_lost_margin and lost_margin(known)
    device, was_training = next(model.parameters()).device, model.training
    if config.margin is not None and not resume:
        config.margin.project(model.eval())  # what has no margin may have no equilibria to learn from
    model.train()
    if config.channels_last:
        cast(Any, model).to(memory_format=torch.channels_last)
    try:
        with _coarse(model, config.tol):
            interrupted = run(module, len(known) if over else config.epochs, checkpoint, resume, progress)
    finally:
        model.to(device).train(was_training)  # Lightning leaves it on the CPU
        if config.channels_last:
            cast(Any, model).to(memory_format=torch.contiguous_format)
    return _result(model, data, config, module.history, interrupted, checkpoint)


@contextlib.contextmanager
def _coarse(model: nn.Module, tol: float | None) -> Iterator[None]:
    """With ``tol`` for the equilibrium layers that have no tolerance of their own for training."""
    kinds = (EquilibriumLayer, ConvolutionalLayer)
    layers = [m for m in model.modules() if isinstance(m, kinds) and m.training_tol is None]
    for layer in layers:
        layer.training_tol = tol
    try:
        yield
    finally:
        for layer in layers:
            layer.training_tol = None


def _result(
    model: nn.Module, data: Data, config: TrainingConfig, history: list[Row], interrupted: bool, checkpoint: Path | None
) -> FitResult:
    stopped = margin = shortfall = None
    if not interrupted and config.stop_on_lost_margin and lost_margin(history):
        epoch, last = history[-1]["epoch"], history[-1]["margin"]
        stopped = f"no positive margin is proved after epoch {epoch:.0f} of {config.epochs}, only {last:.6g}"
    if not interrupted:
        margin, shortfall = proved(model, config.margin)
    return FitResult(
        accuracy_validation=None if interrupted else evaluate(model, data.validation),
        accuracy_test=None if interrupted else evaluate(model, data.test),
        seconds_per_epoch=sum(row["seconds"] for row in history) / len(history) if history else None,
        history=history,
        interrupted=interrupted,
        checkpoint=checkpoint,
        margin=margin,
        target_met=None if config.margin is None or interrupted else shortfall is None,
        shortfall=shortfall,
        stopped=stopped,
    )


@torch.no_grad()  # and not inference mode: what layers cache here must still serve training afterwards
def evaluate(model: nn.Module, split: Split, batch_size: int = 10_000) -> float:
    """Share of the samples of ``split`` whose highest score is that of their class, in [0, 1].

    Raises :class:`InputError` for an empty split, :class:`OptionError` for a bad batch size.
    """
    if not len(split):
        raise InputError("an empty split has no accuracy: give at least one sample")
    was_training, size = model.training, min(batch_size, largest_batch(model))
    model.eval()
    try:
        hits = [(model(x).argmax(1) == y).sum() for x, y in Batches(placed(split, model), size)]
    finally:
        model.train(was_training)
    return int(torch.stack(hits).sum()) / len(split)


def _check_model(model: nn.Module, data: Data) -> None:
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("the model has no parameters to train (a quantized one holds codes): give a float model")
    sample = placed(Split(data.train.x[:2], data.train.y[:2]), model)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # only the shape is of interest
            # of a copy: what a layer learns from a call must not differ after a resume
            shape = tuple(copy.deepcopy(model).eval()(sample.x).shape)
    except RuntimeError as error:
        raise InputError(f"the model does not take the {data.features} features of {data.name}: {error}") from error
    if shape != (len(sample), data.class_count):
        wanted = (len(sample), data.class_count)
        raise InputError(
            f"the model returns shape {shape} for two samples of {data.name}, not {wanted}: end it"
            f" with Linear(…, {data.class_count})"
        )
