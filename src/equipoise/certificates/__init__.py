"""Proved bounds about stored numbers, as frozen dataclasses."""

from .certify import Certifier, certify
from .types import Certificate
from .wellposed import input_lipschitz, lipschitz, margin

__all__ = ["Certificate", "Certifier", "certify", "input_lipschitz", "lipschitz", "margin"]
