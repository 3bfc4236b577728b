"""Equilibrium layers as ordinary ``torch.nn.Module``s."""

from .equilibrium import EquilibriumLayer
from .linear import PreparedLinear, QuantizedLinear
from .mondeq import MonDEQ
from .nemon import NEMON

__all__ = ["NEMON", "EquilibriumLayer", "MonDEQ", "PreparedLinear", "QuantizedLinear"]
