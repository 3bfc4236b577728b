"""The ladder as one self-contained page in which a reader explores it. In the terminal: ``report.terminal``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._atomic import check_output, replacing
from ..ladder import Ladder
from . import words
from .drawing import BOX, SPARK, shape
from .explorer import explore
from .pages import embedded, fill

__all__ = ["render", "write_report"]

BLURBS = {
    "assembled": "W itself rounded",
    "structured": "rounded below the structure of W",
    "compensated": "W rounded, its diagonal lowered",
    "cayley": "the Cayley transform rounded",
}


def write_report(ladder: Ladder, path: str | Path, title: str | None = None, force: bool = False) -> Path:
    """Write the page to ``path``, whole or not at all: one HTML file that needs no network.

    Raises:
        OutputError: ``path`` exists and ``force`` is False, or cannot be written.
        MissingExtraError: Jinja is not installed.
    """
    target = check_output(path, force)
    page = render(ladder, title).encode()
    with replacing(target, force) as file:
        file.write(page)
    return target


def render(ladder: Ladder, title: str | None = None) -> str:
    """The page as text; the same ladder always gives the same text."""
    return fill("report.html.j2", _context(ladder, title), "ladder", ladder.to_dict())


def _context(ladder: Ladder, title: str | None) -> dict[str, Any]:
    rung = None if ladder.chosen is None else ladder.rungs[ladder.chosen]
    proof = ladder.evidence[ladder.chosen] if ladder.chosen is not None and ladder.evidence else None
    subject, explorer = ladder.subject, explore(ladder)
    schemes = list(dict.fromkeys(r.scheme for r in ladder.rungs))
    seen = {r.verdict for r in ladder.rungs}
    first = ladder.evidence[0].certificate if ladder.evidence else None
    return {
        "title": title or (f"{subject.data}, quantized and certified" if subject else "Quantized and certified"),
        "headline": words.headline(ladder),
        "summary": words.summary(ladder),
        "rung": rung,
        "rungs": ladder.rungs,
        "subject": subject,
        "chosen": words.name(rung) if rung else "",
        "proved": words.proved(rung, proof) if rung and proof else [],
        "measured": words.measured(ladder, rung) if rung else [],
        "asks": words.asks(ladder.requirements, proof) if proof else [],
        "schemes": schemes,
        "mixed": any(r.mixed for r in ladder.rungs),
        "blurbs": BLURBS,
        "shape": shape,
        "box": BOX,
        "spark": SPARK,
        "explorer": explorer,
        "frame": explorer.frames[explorer.start] if explorer else None,
        "frames": embedded(explorer.data()) if explorer else "",
        "verdicts": words.VERDICTS,
        "verdicts_seen": [verdict for verdict in words.VERDICTS if verdict in seen],
        "input_bits": ladder.rungs[0].input_bits if ladder.rungs else None,
        "notes": ladder.notes,
        "arithmetic": f"Proofs: {first.arithmetic}." if first else "",
    }
