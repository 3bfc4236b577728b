"""Lightning, with everything of it that talks, guesses or litters turned off. ``training`` is the way in.

Files go only where ``checkpoint`` lies, progress only to stderr, and Ctrl-C ends a run between two steps.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

# First, since it says what to install where Lightning is missing.
from ._callbacks import Bar, Files, Interrupt, Interrupted
from ._config import TrainingConfig
from ._machines import anyone, together, total, world
from .data import Batches, Preprocessing, Split
from .errors import (
    ConvergenceError,
    ConvergenceWarning,
    EquipoiseError,
    FileFormatError,
    InputError,
    MissingExtraError,
    OptionError,
)
from .layers.convolutional import ConvolutionalLayer
from .layers.equilibrium import EquilibriumLayer
from .layers.multiscale_deq import MultiscaleDEQ

# isort: split
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.loggers import TensorBoardLogger

__all__ = ["Classifier", "Row", "largest_batch", "lost_margin", "placed", "quiet", "run"]

Row = dict[str, float]
VALIDATION_BATCH, IMAGE_BATCH = 10_000, 250  # the state of an image layer is as large as its images
PROBED, PROBE_TOL = 256, 1e-4  # validation samples whose solver steps are counted, and to which tolerance


def largest_batch(model: nn.Module) -> int:
    """How many samples are evaluated at a time, so that their states fit into memory."""
    on_images = any(isinstance(m, (ConvolutionalLayer, MultiscaleDEQ)) for m in model.modules())
    return IMAGE_BATCH if on_images else VALIDATION_BATCH


def placed(split: Split, model: nn.Module) -> Split:
    """The split on the model's device and in its precision: moved once, not batch by batch."""
    first = next((p for p in model.parameters() if p.is_floating_point()), split.x)
    return split.to(first.device, first.dtype)


class Classifier(LightningModule):
    """Cross-entropy, fused Adam with decoupled weight decay, the learning rate by a schedule over all steps.

    One batch is one step, taken by hand: Lightning's closures and hooks around an automatic step cost up to
    half of a small network's step. Scores are kept and summed up once per epoch, so that no step waits for
    a number. ``identity`` goes into every checkpoint, with the history of the epochs. What a layer remembers from
    one call to the next is forgotten, and the global generator seeded, where an epoch starts: so a run that goes on
    from a checkpoint is the same as one that never stopped.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Batches,
        validation: Split,
        config: TrainingConfig,
        identity: dict[str, Any],
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.train_batches, self.validation_split = train, validation
        self.validation_batches = Batches(validation, largest_batch(model))
        self.config = config
        self.identity, self.preprocessing = identity, preprocessing
        self.history: list[Row] = []
        self.begun = False
        self._scores: list[tuple[Tensor, Tensor]] = []
        self._row: Row = {}
        self._started = 0.0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":  # Lightning notes it 30 times a step; a module's own way is slow
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def configure_optimizers(self) -> Any:
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        # biases, a learned margin and learned scales are no size to be kept small
        decayed = [p for name, p in named if p.ndim > 1 and not name.endswith("log_scale")]
        kept = [p for name, p in named if p.ndim <= 1 or name.endswith("log_scale")]
        rate, decay = self.config.learning_rate, self.config.weight_decay
        groups = [{"params": decayed, "weight_decay": decay}, {"params": kept, "weight_decay": 0.0}]
        adam = torch.optim.AdamW([group for group in groups if group["params"]], rate, fused=True)
        steps = cast(int, self.trainer.max_epochs) * len(self.train_batches)
        return [adam], [_schedule(self.config.schedule, adam, rate, steps)]

    def train_dataloader(self) -> Any:
        self.train_batches.split = placed(self.train_batches.split, self.model)
        self.train_batches.share(*world())
        return self.train_batches

    def val_dataloader(self) -> Any:
        self.validation_batches.split = placed(self.validation_split, self.model)
        self.validation_batches.share(*world())
        return self.validation_batches

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # it is there already

    def on_train_start(self) -> None:
        self.begun = True

    def on_train_epoch_start(self) -> None:
        self.train_batches.set_epoch(self.current_epoch)
        for layer in self.model.modules():
            if isinstance(layer, (EquilibriumLayer, ConvolutionalLayer)):
                layer.forget_tuning()
        entropy = self.config.seed, self.current_epoch, world()[0]  # each process drops units of its own
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        self._started = time.perf_counter()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        if self.config.augment is not None:
            assert self.preprocessing is not None
            entropy = self.config.seed, self.current_epoch, batch_idx, world()[0]
            x = self.config.augment(x, self.preprocessing, entropy)
        optimizer, schedule = cast(Any, self.optimizers()), cast(Any, self.lr_schedulers())
        penalty = self.config.margin
        if penalty is not None:
            penalty.project(self.model)
        try:
            scores = self.model(x)
        except InputError as error:
            if not bool(torch.isfinite(x).all()):
                raise
            raise self._diverged() from error
        weight = self.train_batches.weight(batch_idx)
        loss = self._loss(x, y, scores, batch_idx) * weight
        with torch.autocast(x.device.type, enabled=False):  # gradients of equilibria are solved for in here
            if penalty is not None:
                loss = loss + penalty.penalty(self.model)
            optimizer.zero_grad()
            self.manual_backward(loss)
        optimizer.step()
        schedule.step()
        if weight:
            self._scores.append((scores.detach(), y))

    def _loss(self, x: Tensor, y: Tensor, scores: Tensor, batch_idx: int) -> Tensor:
        robust = self.config.robust
        if robust is None:
            return cross_entropy(scores, y)
        assert self.preprocessing is not None
        done = (self.current_epoch + batch_idx / len(self.train_batches)) / cast(int, self.trainer.max_epochs)
        return robust(self.model, x, y, scores, done, self.preprocessing)

    def on_validation_start(self) -> None:
        rate = cast(Any, self.lr_schedulers()).get_last_lr()[0]
        loss, accuracy = self._summed_up()
        if not math.isfinite(loss):
            raise self._diverged()
        seconds = time.perf_counter() - self._started
        epoch = float(self.current_epoch + 1)
        self._row = {
            "epoch": epoch,
            "loss": loss,
            "accuracy": accuracy,
            "learning_rate": rate,
            "seconds": seconds,
        }
        if self.config.margin is not None:
            self.config.margin.project(self.model)  # what is saved and evaluated holds it

    def _diverged(self) -> ConvergenceError:
        return ConvergenceError(
            f"training diverged in epoch {self.current_epoch + 1}: the loss or the weights became NaN or infinite. "
            f"Lower learning_rate ({self.config.learning_rate:g}); at few bits drive the margin with "
            "equipoise.MarginPenalty, or use the Structured scheme, which cannot lose it"
        )

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        scores = self.model(x)
        if self.validation_batches.weight(batch_idx):
            self._scores.append((scores, y))

    def on_validation_end(self) -> None:
        self._row["validation_loss"], self._row["validation_accuracy"] = self._summed_up()
        probed = placed(Split(self.validation_split.x[:PROBED], self.validation_split.y[:PROBED]), self.model)
        self._row |= _equilibrium(self.model, probed.x)
        self.history.append(self._row)  # here, since callbacks read it before this class's next hook

    def on_train_epoch_end(self) -> None:
        self.log_dict({name: value for name, value in self._row.items() if name != "epoch"})
        if anyone(self.config.stop_on_lost_margin and lost_margin(self.history)):
            self.trainer.should_stop = True

    def _summed_up(self) -> tuple[float, float]:
        """Mean loss and accuracy of the scores seen since the last call, by all processes."""
        sums = torch.zeros(3, dtype=torch.float64)
        if self._scores:
            scores, y = (torch.cat(parts) for parts in zip(*self._scores, strict=True))
            self._scores.clear()
            scores = scores.float() if scores.dtype.itemsize < 4 else scores  # mixed precision gives halves
            loss, hits = cross_entropy(scores, y, reduction="sum"), (scores.argmax(1) == y).sum()
            sums += torch.tensor([float(loss), float(hits), len(y)], dtype=torch.float64)
        loss_sum, right, count = total(sums).tolist()
        return loss_sum / count, right / count

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["equipoise"] = {"identity": self.identity, "history": self.history}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = list(checkpoint["equipoise"]["history"])


def _schedule(name: str, optimizer: torch.optim.Optimizer, rate: float, steps: int) -> Any:
    """The learning rate over ``steps`` steps; see :class:`TrainingConfig`."""
    schedules = torch.optim.lr_scheduler
    if name == "one-cycle":  # one step more than there are: it is stepped after the last one, too
        return schedules.OneCycleLR(optimizer, rate, total_steps=steps + 1)
    if name == "cosine":
        return schedules.CosineAnnealingLR(optimizer, steps)
    quarters = sorted({steps // 4, steps // 2, 3 * steps // 4} - {0}) if name == "step" else []
    return schedules.MultiStepLR(optimizer, quarters, gamma=0.1)


def lost_margin(history: list[Row]) -> bool:
    """Whether the last epoch ended without a proved margin."""
    return bool(history) and history[-1].get("margin", 1.0) <= 0


@torch.no_grad()
def _equilibrium(model: nn.Module, x: Tensor) -> Row:
    """Smallest proved margin of the equilibrium layers of ``model``, largest mean of solver steps for ``x``.

    An equilibrium layer is known by its ``operator`` and ``solve``; empty where there is none.
    """
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "operator") and hasattr(m, "solve")]
    if not layers:
        return {}
    seen: dict[Any, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_pre_hook(lambda m, given: seen.update({m: given[0]})))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", ConvergenceWarning)  # training's own solves have told
        model(x)
        steps = [float(m.solve(given, tol=PROBE_TOL).steps.double().mean()) for m, given in seen.items()]
    return {"margin": min(float(m.operator.margin()) for m in layers), "steps": max(steps)}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's remarks on hardware, its tips and its advice; our own warnings pass."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def run(module: Classifier, epochs: int, checkpoint: Path | None, resume: bool, progress: bool) -> bool:
    """Train; returns whether Ctrl-C ended it. Leaves global generators and signal handlers as they were.

    Of several processes only the first returns, the others end here.
    """
    config = module.config
    interrupt = Interrupt()
    callbacks: list[Callback] = [interrupt]
    logger: TensorBoardLogger | None = None
    if progress:
        callbacks.append(Bar())
    files = None if checkpoint is None else Files(checkpoint)
    if files is not None:
        callbacks.append(files)
        logger = _board(files.checkpoint.parent)
    generators = torch.random.fork_rng(range(torch.cuda.device_count()))
    with quiet(), interrupt.listening(), generators, together(config.devices, config.nodes):
        torch.manual_seed(config.seed)
        trainer = _trainer(config, epochs, callbacks, logger)
        interrupted = _fit(trainer, module, checkpoint if resume else None)
        if trainer.global_rank > 0:
            raise SystemExit(0)
    if files is not None and module.history:
        files.write_table(module.history)  # a kill may have come between the last checkpoint and its row
    return interrupted


def _board(folder: Path) -> TensorBoardLogger:
    try:
        return TensorBoardLogger(folder, "", "tensorboard", default_hp_metric=False, flush_secs=1)
    except ModuleNotFoundError as error:
        raise MissingExtraError("logs need tensorboard: pip install 'equipoise[train]'") from error


def _trainer(
    config: TrainingConfig, epochs: int, callbacks: list[Callback], logger: TensorBoardLogger | None
) -> Trainer:
    precision: Any = {"bf16": "bf16-mixed", "fp16": "16-mixed"}.get(config.precision, "32-true")
    try:
        trainer = Trainer(
            max_epochs=epochs,
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.nodes,
            precision=precision,
            strategy="ddp" if config.devices * config.nodes > 1 else "auto",
            logger=logger or False,
            callbacks=callbacks,
            enable_checkpointing=any(isinstance(callback, Files) for callback in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=2**31,  # rows are logged once per epoch
            inference_mode=False,  # what layers cache in validation must still serve training
        )
    except (MisconfigurationException, ValueError) as error:
        asked = f"accelerator={config.accelerator!r}"
        if config.devices * config.nodes > 1:
            asked += f" with devices={config.devices}, nodes={config.nodes}"
        raise OptionError(f"{asked} cannot be used here: {error}") from error
    if config.precision != "32" and isinstance(trainer.accelerator, CPUAccelerator):
        raise OptionError(f"precision={config.precision!r} is for GPUs, and this would train on a CPU: use '32'")
    return trainer


def _fit(trainer: Trainer, module: Classifier, start: Path | None) -> bool:
    """Whether Ctrl-C ended it."""
    try:
        trainer.fit(module, ckpt_path=start, weights_only=True)
    except Interrupted:
        return True
    except EquipoiseError:
        raise
    except Exception as error:  # a checkpoint that is damaged within makes Lightning and torch raise whatever they like
        if start is None or module.begun:
            raise
        raise FileFormatError(f"{start} cannot be gone on from, it is damaged: {error!r}") from error
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning answers a KeyboardInterrupt, here from a second Ctrl-C, with sys.exit(1).
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            return True
        raise
    return False
