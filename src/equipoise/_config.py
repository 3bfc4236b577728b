"""How to train. The public path of :class:`TrainingConfig` is ``equipoise.training``."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from .augmentation import Augmentation
from .data import Batches, Split
from .errors import OptionError
from .layers.arguments import check_tol
from .penalties import MarginPenalty
from .robust_loss import RobustLoss

__all__ = ["PRECISIONS", "SCHEDULES", "TrainingConfig"]

SCHEDULES = ("one-cycle", "cosine", "step", "constant")
PRECISIONS = ("32", "bf16", "fp16")
COURSELESS = ("accelerator", "devices", "nodes", "stop_on_lost_margin")


@dataclass(frozen=True)
class TrainingConfig:
    """How to train: cross-entropy, fused Adam, the learning rate by a schedule over all steps.

    Args:
        epochs: passes over the training split.
        batch_size: samples per step, of all processes together.
        learning_rate: the largest of the schedule.
        weight_decay: decoupled (AdamW), of matrices alone. It keeps ‖W‖ small, and with it the solver's steps and what
            rounding can do.
        tol: the equilibria's relative tolerance in training, where a layer has no ``training_tol`` of its own; None
            keeps the layers'. Gradients are right to about as much.
        seed: of the order of the samples and of dropout; initial weights are the caller's.
        accelerator: "auto", "cpu", "cuda" or "mps".
        devices, nodes: processes on each machine, one per device, and machines. With more than one process in all,
            every one runs the script again (see :func:`fit`).
        stop_on_lost_margin: stop after an epoch that ends without a proved positive margin.
        schedule: of the learning rate: "one-cycle" (up and down again), "cosine" (down to 0), "step" (a tenth after
            every quarter of the steps), "constant".
        augment: how the images of a batch are changed at random; see :class:`equipoise.augmentation.Augmentation`.
        precision: "32", or on a GPU "bf16" or "fp16" for what stands around the equilibrium layers; these themselves
            compute in the precision of their weights, or their tolerances would mean nothing.
        channels_last: keep images with their channels last in memory, which tensor cores like.
        margin: what to drive the margin to; see :class:`equipoise.MarginPenalty`.
        robust: worst scores over boxes and a Lipschitz term in the loss; see :class:`equipoise.RobustLoss`.

    Raises :class:`OptionError` for a value outside its range.
    """

    epochs: int
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.3
    tol: float | None = 1e-2
    seed: int = 0
    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    stop_on_lost_margin: bool = False
    schedule: str = "one-cycle"
    augment: Augmentation | None = None
    precision: str = "32"
    channels_last: bool = False
    margin: MarginPenalty | None = None
    robust: RobustLoss | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "devices", "nodes"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise OptionError(f"{name}={value!r}: give a positive integer")
        for name in ("learning_rate", "weight_decay"):
            if type(getattr(self, name)) not in (int, float):
                raise OptionError(f"{name}={getattr(self, name)!r}: give a number")
        if not 0 < self.learning_rate < math.inf:
            raise OptionError(f"learning_rate={self.learning_rate!r}: give a positive number, such as 3e-3")
        if not 0 <= self.weight_decay < math.inf:
            raise OptionError(f"weight_decay={self.weight_decay!r}: give 0 or a positive number")
        if self.tol is not None:
            check_tol(self.tol)
        if self.accelerator not in ("auto", "cpu", "cuda", "mps"):
            raise OptionError(f"accelerator={self.accelerator!r}: choose auto, cpu, cuda or mps")
        for name in ("stop_on_lost_margin", "channels_last"):
            if type(getattr(self, name)) is not bool:
                raise OptionError(f"{name}={getattr(self, name)!r}: give True or False")
        for name, known in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise OptionError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(known)}")
        if self.augment is not None and not isinstance(self.augment, Augmentation):
            raise OptionError(f"augment={self.augment!r}: give equipoise.augmentation.Augmentation(shift=…), or None")
        if self.margin is not None and not isinstance(self.margin, MarginPenalty):
            raise OptionError(f"margin={self.margin!r}: give equipoise.MarginPenalty(target=…), or None")
        if self.robust is not None and not isinstance(self.robust, RobustLoss):
            raise OptionError(f"robust={self.robust!r}: give equipoise.RobustLoss(eps=…), or None")
        empty = Split(torch.empty(0, 1), torch.empty(0, dtype=torch.int64))
        Batches(empty, self.batch_size, seed=self.seed)  # it knows which sizes and seeds it accepts

    def course(self) -> dict[str, object]:
        """The settings that decide what the weights become, up to rounding."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name not in COURSELESS}
