"""What a file gives back: the same numbers, and so the same certificate."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import equipoise as eq

from .ledger import Ledger

__all__ = ["round_trip"]


def round_trip(model: nn.Module, reference: nn.Module | None, x: Tensor | None, found: Any, ledger: Ledger) -> None:
    """Save and load both networks; the certificate ``found`` of those saved is that of those loaded."""
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "model", Path(folder) / "reference"
        eq.save(model, paths[0])
        again = eq.load(paths[0])
        other = None
        if reference is not None:
            eq.save(reference, paths[1])
            other = eq.load(paths[1])
    if model.training != again.training:
        again.train(model.training)
    ledger.holds("certificate of a file", True, eq.certify(again, other, x).to_json() == found.to_json())
