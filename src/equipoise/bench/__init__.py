"""Measurements side by side, as ratios of one run: ``bench.solve`` is the way in.

This file imports nothing, so that a child process that measures its memory starts small.
"""

from __future__ import annotations

__all__: list[str] = []
