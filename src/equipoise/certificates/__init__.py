"""Proved bounds about stored numbers, as frozen dataclasses."""

from .certify import Certifier, certify
from .iterates import IterateFloor, iterate_floor
from .types import Certificate
from .wellposed import input_lipschitz, lipschitz, margin

__all__ = [
    "Certificate",
    "Certifier",
    "IterateFloor",
    "certify",
    "input_lipschitz",
    "iterate_floor",
    "lipschitz",
    "margin",
]
