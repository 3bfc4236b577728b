"""The page of a reproduction, whichever paper it is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._atomic import check_output, replacing
from ..report.pages import fill
from .record import Reproduction

__all__ = ["page", "write_page"]


def page(reproduction: Reproduction) -> str:
    """One self-contained HTML page; the same reproduction always gives the same text.

    Raises:
        MissingExtraError: Jinja is not installed.
    """
    context: dict[str, Any] = {"title": reproduction.title, "paper": reproduction}
    return fill("reproduction.html.j2", context, "results", reproduction.data)


def write_page(reproduction: Reproduction, path: Path, force: bool = False) -> Path:
    """Write the page to ``path``, whole or not at all.

    Raises:
        OutputError: ``path`` exists and ``force`` is False, or cannot be written.
    """
    target = check_output(path, force)
    text = page(reproduction).encode()
    with replacing(target, force) as file:
        file.write(text)
    return target
