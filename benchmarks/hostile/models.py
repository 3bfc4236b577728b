"""One small network of every kind that a file can hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import equipoise as eq
from equipoise.data import Preprocessing

__all__ = ["MODELS", "inputs"]

INPUTS = 4


def _chain(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules, nn.Linear(3, 2))


def _mondeq(**options: Any) -> nn.Module:
    return eq.MonDEQ(INPUTS, 3, rank=2, margin=0.5, **options)


def _classifier() -> nn.Module:
    model: Any = _chain(_mondeq(), nn.Dropout(0.5))
    model.preprocessing = Preprocessing(mean=0.1, std=0.3, scale=2.0, input_shape=(1, INPUTS))
    return model


def _images(layer: nn.Module, features: int) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 4, 4)), layer, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(features, 2))


def _multiscale(**options: Any) -> nn.Module:
    sizes: dict[str, Any] = {"groups": 1, "post_groups": 1, "expansion": 1, "head_channels": 2, "dropout": 0.0}
    return eq.LipschitzMDEQ(1, 4, 2, (2, 2), **{**sizes, **options})


MODELS: dict[str, Callable[[], nn.Module]] = {
    "classifier": _classifier,
    "options": lambda: _mondeq(
        solver=eq.Anderson(on=eq.Tseng()), activation=eq.Hardtanh(), learn_margin=True, tol=1e-5
    ),
    "rounded": lambda: _mondeq(solver=eq.Rounded(eq.ForwardBackward(), 0.01), activation=eq.LeakyReLU(0.1)),
    "dense": lambda: eq.MonDEQ.from_weights(torch.eye(3) * 0.4, torch.ones(3, INPUTS), torch.zeros(3)),
    "nested": lambda: nn.Sequential(nn.Sequential(_mondeq(), nn.ReLU()), nn.Identity(), eq.NEMON(3, 3)),
    "assembled": lambda: eq.quantize(_chain(_mondeq()), eq.Assembled(8, granularity="row", input_bits=1)),
    "structured": lambda: eq.quantize(_chain(_mondeq()), eq.Structured(2, input_bits=3, bias_bits=4, head_bits=5)),
    "compensated": lambda: eq.quantize(_chain(_mondeq()), eq.Compensated(3)),
    "cayley": lambda: eq.quantize(_chain(_mondeq()), eq.Cayley(4, head_bits=16)),
    "nemon": lambda: _chain(eq.NEMON(INPUTS, 3, gamma=0.5, learn_gamma=True)),
    "nemon structured": lambda: eq.quantize(_chain(eq.NEMON(INPUTS, 3, gamma=0.5)), eq.Structured(3)),
    "nemon assembled": lambda: eq.quantize(_chain(eq.NEMON(INPUTS, 3, gamma=0.5)), eq.Assembled(4)),
    "nemon conv": lambda: _images(eq.NEMONConv2d(1, 2), 8),
    "nemon conv structured": lambda: eq.quantize(_images(eq.NEMONConv2d(1, 2), 8), eq.Structured(3)),
    "mon conv": lambda: _images(eq.MonConv2d(1, 2, 4), 8),
    "mon conv structured": lambda: eq.quantize(_images(eq.MonConv2d(1, 2, 4), 8), eq.Structured(3)),
    "mon conv assembled": lambda: eq.quantize(_images(eq.MonConv2d(1, 2, 4), 8), eq.Assembled(6)),
    "mon conv compensated": lambda: eq.quantize(_images(eq.MonConv2d(1, 2, 4), 8), eq.Compensated(6)),
    "two tiers": lambda: eq.MultiTierMonDEQ(1, (1, 2), 4, kernel_size=1),
    "two tiers structured": lambda: eq.quantize(eq.MultiTierMonDEQ(1, (1, 2), 4), eq.Structured(4)),
    "multiscale": lambda: _multiscale(),
    "multiscale structured": lambda: eq.quantize(_multiscale(activation="groupsort"), eq.Structured(4)),
    "multiscale plain": lambda: eq.MDEQ(1, 4, 2, (2, 2), groups=1, post_groups=1, expansion=1, head_channels=2),
}


def inputs(model: nn.Module) -> torch.Tensor | None:
    """Two random inputs for ``model``, None where it does not say what it takes or they are too large to be tried."""
    first: Any = model
    while isinstance(first, nn.Sequential):
        if not len(first):
            return None
        first = first[0]
    shape: tuple[int, ...]
    if isinstance(first, nn.Unflatten):
        shape = (int(torch.Size(first.unflattened_size).numel()),)
    elif isinstance(first, (eq.MonDEQ, eq.NEMON, nn.Linear)):
        shape = (first.in_features,)
    elif isinstance(first, (eq.MonConv2d, eq.MultiTierMonDEQ)):
        shape = (first.in_channels, *first.image_size)
    elif isinstance(first, eq.NEMONConv2d):
        shape = (first.in_channels, 4, 4)
    elif isinstance(first, (eq.LipschitzMDEQ, eq.MDEQ)):
        shape = (first.in_channels, *first.size)
    else:
        return None
    if torch.Size(shape).numel() > 10_000:
        return None
    like = next((t for t in model.state_dict().values() if t.is_floating_point()), torch.empty(0))
    return torch.randn(2, *shape, dtype=like.dtype)
