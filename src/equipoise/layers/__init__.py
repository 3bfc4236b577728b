"""Equilibrium layers as ordinary ``torch.nn.Module``s."""

from .linear import QuantizedLinear
from .mondeq import MonDEQ

__all__ = ["MonDEQ", "QuantizedLinear"]
