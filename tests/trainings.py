"""Small networks to train, and what to compare of them afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise.training import TrainingConfig

SHORT = TrainingConfig(epochs=4, learning_rate=1e-2, accelerator="cpu")
STEPS = 10  # of an epoch: 1,257 samples in batches of 128


def explicit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def implicit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(eq.MonDEQ(64, 16, rank=4, margin=0.5, learn_margin=True), nn.Linear(16, 10))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def untimed(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def at_step(model: nn.Module, step: int, act: Callable[[], None]) -> nn.Module:
    """``model``, calling ``act`` in the forward pass of a training step, counted from 1."""
    seen = 0

    def hook(module: nn.Module, given: Any, output: Tensor) -> None:
        nonlocal seen
        seen += module.training
        if module.training and seen == step:
            act()

    model.register_forward_hook(hook)
    return model
