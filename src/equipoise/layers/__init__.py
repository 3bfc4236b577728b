"""Equilibrium layers as ordinary ``torch.nn.Module``s."""

from .linear import PreparedLinear, QuantizedLinear
from .mondeq import MonDEQ

__all__ = ["MonDEQ", "PreparedLinear", "QuantizedLinear"]
