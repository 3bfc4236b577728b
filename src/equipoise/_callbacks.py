"""What happens around training steps: heed Ctrl-C, write files, draw a bar. For ``_lightning`` alone."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ._machines import anyone
from .errors import MissingExtraError, OutputError

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import Checkpoint
except ImportError as error:
    raise MissingExtraError("training needs Lightning: pip install 'equipoise[train]'") from error

__all__ = ["Bar", "Files", "Interrupt", "Interrupted"]


class Interrupted(Exception):
    """Raised between two steps after Ctrl-C. Not a KeyboardInterrupt: Lightning answers that by exiting."""


class Interrupt(Callback):
    """Turns the first Ctrl-C into :class:`Interrupted` at the end of the step; a second one acts at once.

    Of several processes all stop at the same step, whichever of them was told.
    """

    asked = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        previous = signal.getsignal(signal.SIGINT)
        # Only the main thread may listen. A shell's background job ignores SIGINT, and goes on doing so.
        if threading.current_thread() is not threading.main_thread() or previous in (signal.SIG_IGN, None):
            yield
            return
        signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _heed(self, *_: Any, **__: Any) -> None:
        if anyone(self.asked):
            raise Interrupted

    on_train_start = on_train_epoch_start = on_train_batch_end = on_validation_batch_end = _heed


class Files(Checkpoint):
    """Replaces the checkpoint and ``metrics.csv`` after every epoch: a kill at any moment leaves whole files.

    Of several processes the first writes; all take part in making the checkpoint.

    Not Lightning's ModelCheckpoint, whose state names folders: this one resumes after a folder has moved.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        if trainer.is_global_zero:
            self.write_table(cast(Any, pl_module).history)

    def write_table(self, history: list[dict[str, float]]) -> None:
        """``metrics.csv`` with a row per epoch."""
        target = self.checkpoint.with_name("metrics.csv")
        with _becoming(target) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, fieldnames=list(history[-1]))
            table.writeheader()
            table.writerows(history)
        os.replace(scratch, target)

    def _save(self, trainer: Trainer) -> None:
        with _becoming(self.checkpoint) as scratch:
            trainer.save_checkpoint(scratch)
            if trainer.is_global_zero:
                os.replace(scratch, self.checkpoint)


@contextlib.contextmanager
def _becoming(target: Path) -> Iterator[Path]:
    """The name of what is to become ``target``, the same in every process; a full disk is told with its name."""
    try:
        yield target.with_name(target.name + ".tmp")
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error


class Bar(Callback):
    """One progress bar over all steps, on stderr, drawn when that is a terminal and redrawn now and then."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        self._progress = Progress(
            *columns,
            console=console,
            auto_refresh=False,  # no second thread beside the training loop
            redirect_stdout=False,  # what a program prints meanwhile is none of ours
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("training")
        self._drawn = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = cast(int, trainer.max_epochs) * int(trainer.num_training_batches)
        self._progress.update(self._task, total=steps, completed=trainer.global_step)
        if trainer.is_global_zero:
            self._progress.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        now = time.monotonic()
        if now - self._drawn > 0.2:
            self._drawn = now
            self._progress.update(self._task, completed=trainer.global_step, refresh=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row = cast(Any, pl_module).history[-1]
        text = f"epoch {row['epoch']:.0f}/{trainer.max_epochs}, {100 * row['validation_accuracy']:.2f} % right"
        self._progress.update(self._task, description=text, refresh=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._progress.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._progress.stop()
