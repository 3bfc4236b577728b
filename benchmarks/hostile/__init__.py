"""What nobody should write into a file, and who reads it: for ``fuzz.py`` and the tests.

All chance comes from a ``random.Random`` that the caller gives: a seeded one, hypothesis's, or a fuzzer's bytes.
"""

from __future__ import annotations

__all__ = ["NAMES"]

NAMES = ("model", "checkpoint", "journal", "sweep", "training", "images", "cache", "program")
"""Of the readers; ``readers`` has them."""
