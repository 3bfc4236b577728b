"""Proved bounds about stored numbers, as frozen dataclasses."""

from .boxes import Box, interval
from .certify import Certifier, certify
from .iterates import IterateFloor, iterate_floor
from .robustness import certified_classes, certified_radius, input_lipschitz
from .types import Certificate
from .wellposed import lipschitz, margin

__all__ = [
    "Box",
    "Certificate",
    "Certifier",
    "IterateFloor",
    "certified_classes",
    "certified_radius",
    "certify",
    "input_lipschitz",
    "interval",
    "iterate_floor",
    "lipschitz",
    "margin",
]
