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


def stopped(model: nn.Module, step: int) -> nn.Module:
    """``model``, raising :class:`InterruptedError` in a training step, counted from 1."""

    def stop() -> None:
        raise InterruptedError

    return at_step(model, step, stop)


def one_step(model: nn.Module, rate: float = 5e-2, seed: int = 0) -> None:
    """One step of gradient descent, in whatever mode the model is."""
    generator = torch.Generator().manual_seed(seed)
    first: Any = next(m for m in model.modules() if hasattr(m, "in_features"))
    x = torch.randn(8, first.in_features, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype)
    model.zero_grad()
    model(x).square().mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= rate * p.grad / (1e-12 + p.grad.norm()) * (1 + p.norm())


def learns_to_compare(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The accuracy on ``(x, y)`` after sixty steps on them."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return float((model.eval()(x).argmax(1) == y).float().mean())


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
