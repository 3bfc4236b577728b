"""Training inside an experiment: a run that was killed goes on at its last whole epoch."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from torch import nn

from ..data import Data, Split
from ..training import FitResult, TrainingConfig, fit

__all__ = ["less", "resumed"]


def resumed(model: nn.Module, data: Data, config: TrainingConfig, scratch: Path) -> FitResult:
    """Train ``model`` in place, in ``scratch``, which is gone when it is done; then it is in evaluation mode."""
    result = fit(model, data, config, scratch, progress=False, resume=True)
    if result.interrupted:
        raise KeyboardInterrupt
    model.eval()
    shutil.rmtree(scratch, ignore_errors=True)
    return result


def less(data: Data, train: int, test: int) -> Data:
    """The first samples of ``data`` alone, of the test split as many as of the validation split."""

    def first(split: Split, count: int) -> Split:
        return Split(split.x[:count], split.y[:count])

    return replace(
        data, train=first(data.train, train), validation=first(data.validation, test), test=first(data.test, test)
    )
