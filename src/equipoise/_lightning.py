"""Lightning, with everything of it that talks, guesses or litters turned off. ``training`` is the way in.

Files go only where ``checkpoint`` lies, progress only to stderr, and Ctrl-C ends a run between two steps.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

# First, since it says what to install where Lightning is missing.
from ._callbacks import Bar, Files, Interrupt, Interrupted
from .data import Batches, Split
from .errors import ConvergenceWarning, MissingExtraError, OptionError

# isort: split
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

__all__ = ["Classifier", "Row", "placed", "run"]

Row = dict[str, float]
VALIDATION_BATCH = 10_000
PROBED, PROBE_TOL = 256, 1e-4  # validation samples whose solver steps are counted, and to which tolerance


def placed(split: Split, model: nn.Module) -> Split:
    """The split on the model's device and in its precision: moved once, not batch by batch."""
    first = next((p for p in model.parameters() if p.is_floating_point()), split.x)
    return split.to(first.device, first.dtype)


class Classifier(LightningModule):
    """Cross-entropy, fused Adam with decoupled weight decay, one cycle of the learning rate over all steps.

    One batch is one step, taken by hand: Lightning's closures and hooks around an automatic step cost up to
    half of a small network's step. Scores are kept and summed up once per epoch, so that no step waits for
    a number. ``identity`` goes into every checkpoint, with the history of the epochs.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Batches,
        validation: Split,
        learning_rate: float,
        weight_decay: float,
        identity: dict[str, Any],
        robust: Callable[[nn.Module, Tensor, Tensor, Tensor, float], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.train_batches, self.validation_split = train, validation
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.identity, self.robust = identity, robust
        self.history: list[Row] = []
        self._scores: list[tuple[Tensor, Tensor]] = []
        self._row: Row = {}
        self._started = 0.0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":  # Lightning notes it 30 times a step; a module's own way is slow
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(parameters, self.learning_rate, weight_decay=self.weight_decay, fused=True)
        # One more than there are: the schedule is stepped after the last one, too.
        steps = cast(int, self.trainer.max_epochs) * len(self.train_batches) + 1
        return [adam], [torch.optim.lr_scheduler.OneCycleLR(adam, self.learning_rate, total_steps=steps)]

    def train_dataloader(self) -> Any:
        self.train_batches.split = placed(self.train_batches.split, self.model)
        return self.train_batches

    def val_dataloader(self) -> Any:
        return Batches(placed(self.validation_split, self.model), VALIDATION_BATCH)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # it is there already

    def on_train_epoch_start(self) -> None:
        self.train_batches.set_epoch(self.current_epoch)
        self._started = time.perf_counter()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        optimizer, schedule = cast(Any, self.optimizers()), cast(Any, self.lr_schedulers())
        scores = self.model(x)
        if self.robust is None:
            loss = cross_entropy(scores, y)
        else:
            done = (self.current_epoch + batch_idx / len(self.train_batches)) / cast(int, self.trainer.max_epochs)
            loss = self.robust(self.model, x, y, scores, done)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        schedule.step()
        self._scores.append((scores.detach(), y))

    def on_validation_start(self) -> None:
        rate = cast(Any, self.lr_schedulers()).get_last_lr()[0]
        loss, accuracy = self._summed_up()
        seconds = time.perf_counter() - self._started
        epoch = float(self.current_epoch + 1)
        self._row = {
            "epoch": epoch,
            "loss": loss,
            "accuracy": accuracy,
            "learning_rate": rate,
            "seconds": seconds,
        }

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self._scores.append((self.model(x), y))

    def on_validation_end(self) -> None:
        self._row["validation_loss"], self._row["validation_accuracy"] = self._summed_up()
        probed = placed(Split(self.validation_split.x[:PROBED], self.validation_split.y[:PROBED]), self.model)
        self._row |= _equilibrium(self.model, probed.x)
        self.history.append(self._row)  # here, since callbacks read it before this class's next hook

    def on_train_epoch_end(self) -> None:
        self.log_dict({name: value for name, value in self._row.items() if name != "epoch"})

    def _summed_up(self) -> tuple[float, float]:
        """Mean loss and accuracy of the scores seen since the last call."""
        scores, y = (torch.cat(parts) for parts in zip(*self._scores, strict=True))
        self._scores.clear()
        return float(cross_entropy(scores, y)), float((scores.argmax(1) == y).double().mean())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["equipoise"] = {"identity": self.identity, "history": self.history}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = list(checkpoint["equipoise"]["history"])


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
def _quiet() -> Iterator[None]:
    """Without Lightning's remarks on hardware, its tips and its advice; our own warnings pass."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning")
            yield
    finally:
        logger.setLevel(level)


def run(
    module: Classifier,
    epochs: int,
    seed: int,
    accelerator: str,
    checkpoint: Path | None,
    resume: bool,
    progress: bool,
) -> bool:
    """Train; returns whether Ctrl-C ended it. Leaves global generators and signal handlers as they were."""
    interrupt = Interrupt()
    callbacks: list[Callback] = [interrupt]
    logger: TensorBoardLogger | None = None
    if progress:
        callbacks.append(Bar())
    if checkpoint is not None:
        callbacks.append(Files(checkpoint))
        try:
            logger = TensorBoardLogger(checkpoint.parent, "", "tensorboard", default_hp_metric=False)
        except ModuleNotFoundError as error:
            raise MissingExtraError("logs need tensorboard: pip install 'equipoise[train]'") from error
    with _quiet(), interrupt.listening(), torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        try:
            trainer = Trainer(
                max_epochs=epochs,
                accelerator=accelerator,
                devices=1,
                logger=logger or False,
                callbacks=callbacks,
                enable_checkpointing=checkpoint is not None,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                log_every_n_steps=2**31,  # rows are logged once per epoch
                inference_mode=False,  # what layers cache in validation must still serve training
            )
        except (MisconfigurationException, ValueError) as error:
            raise OptionError(f"accelerator={accelerator!r} cannot be used here: {error}") from error
        try:
            trainer.fit(module, ckpt_path=checkpoint if resume else None, weights_only=True)
        except Interrupted:
            return True
        except (KeyboardInterrupt, SystemExit) as error:
            # Lightning answers a KeyboardInterrupt, here from a second Ctrl-C, with sys.exit(1).
            if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
                return True
            raise
    return False
