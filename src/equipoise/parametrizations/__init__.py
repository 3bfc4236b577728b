"""Free tensors to structured weights: forward, right inverse, membership test."""

from .monotone import Dense, Monotone, monotone_factors

__all__ = ["Dense", "Monotone", "monotone_factors"]
