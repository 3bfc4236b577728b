"""Small multiscale networks and images for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import equipoise as eq
from equipoise.layers.steps import VALUES

__all__ = ["images", "injected", "small"]


def small(dtype: torch.dtype = torch.float64, **options: Any) -> eq.LipschitzMDEQ:
    """Two branches of four and eight channels on images of 8 × 8."""
    torch.manual_seed(options.pop("seed", 0))
    defaults: dict[str, Any] = {"groups": 2, "post_groups": 2, "expansion": 2, "head_channels": 8, "dropout": 0.0}
    model = eq.LipschitzMDEQ(2, 8, 3, (4, 8), **{**defaults, **options}).to(dtype)
    with torch.no_grad():
        for parameter in model.map.norms.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def images(count: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def injected(model: eq.LipschitzMDEQ, x: Tensor) -> Tensor:
    with torch.no_grad():
        return VALUES.along(model.inject(), x)
