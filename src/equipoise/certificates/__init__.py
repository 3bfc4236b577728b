"""Proved bounds about stored numbers, as frozen dataclasses."""

from .certify import certify
from .types import Certificate
from .wellposed import input_lipschitz, lipschitz, margin

__all__ = ["Certificate", "certify", "input_lipschitz", "lipschitz", "margin"]
