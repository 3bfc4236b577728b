"""From a template to one HTML page that stands alone: what every page of the package shares."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..errors import MissingExtraError
from . import words

__all__ = ["embedded", "fill"]

NUMBERS = ("bits_of", "bits_text", "number", "at_least", "at_most", "percent", "percent_at_least")
"""Functions of :mod:`.words` that a template may call."""


def fill(template: str, context: Mapping[str, Any], element: str, data: Mapping[str, Any]) -> str:
    """The page that ``template`` makes of ``context``, with ``data`` as JSON in the element of that id.

    Raises:
        MissingExtraError: Jinja is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise MissingExtraError("the report needs Jinja: pip install 'equipoise[report]'") from error
    environment = Environment(
        loader=PackageLoader("equipoise.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update({name: getattr(words, name) for name in NUMBERS}, missing=words.MISSING)
    page = environment.get_template(template).render(
        **context, version=_version(), element=element, data=embedded(data)
    )
    # A number and its unit stay on one line.
    return re.sub(r"(\d) (?=%|kB|MB|bits?\b|bytes\b)", "\\1\N{NO-BREAK SPACE}", page)


def embedded(data: Mapping[str, Any]) -> str:
    """``data`` as JSON for a script element, where only "<" could end it."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _version() -> str:
    try:
        return version("equipoise")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
