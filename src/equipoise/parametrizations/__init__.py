"""Free tensors to structured weights: forward, right inverse, membership test."""

from .convolution import Kernels, MonotoneKernels
from .monotone import Dense, Monotone, monotone_factors
from .nemon import Contractive, ContractiveKernel, Weighted, contractive_factors

__all__ = [
    "Contractive",
    "ContractiveKernel",
    "Dense",
    "Kernels",
    "Monotone",
    "MonotoneKernels",
    "Weighted",
    "contractive_factors",
    "monotone_factors",
]
