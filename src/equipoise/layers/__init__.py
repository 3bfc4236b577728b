"""Equilibrium layers as ordinary ``torch.nn.Module``s."""

from .equilibrium import EquilibriumLayer
from .linear import PreparedLinear, QuantizedLinear
from .lipschitz_mdeq import MDEQ, LipschitzMDEQ
from .mon_conv import MonConv2d, MultiTierMonDEQ
from .mondeq import MonDEQ
from .nemon import NEMON
from .nemon_conv import NEMONConv2d

__all__ = [
    "MDEQ",
    "NEMON",
    "EquilibriumLayer",
    "LipschitzMDEQ",
    "MonConv2d",
    "MonDEQ",
    "MultiTierMonDEQ",
    "NEMONConv2d",
    "PreparedLinear",
    "QuantizedLinear",
]
