"""Equilibrium layers as ordinary ``torch.nn.Module``s."""

from .equilibrium import EquilibriumLayer
from .linear import PreparedLinear, QuantizedLinear
from .mondeq import MonDEQ
from .nemon import NEMON
from .nemon_conv import NEMONConv2d

__all__ = ["NEMON", "EquilibriumLayer", "MonDEQ", "NEMONConv2d", "PreparedLinear", "QuantizedLinear"]
