"""The commands and their options, read from the program itself, as Markdown."""

from __future__ import annotations

import html
import inspect
from typing import Any

import typer.main

from equipoise.cli.common import app

__all__ = ["MARK", "reference"]

MARK = "<!-- On the site every command follows, with its options: docs/_site/commands.py -->"
"""Where docs/commands.md has them."""


def reference() -> str:
    """A section per command: what it does, and its options in lists, one per box of its ``--help``."""
    program: Any = typer.main.get_command(app)
    return "\n\n".join(_section(name, command) for name, command in program.commands.items())


def _section(name: str, command: Any) -> str:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option"]
    usage = " ".join(["equipoise", name, *(each.metavar or each.name.upper() for each in arguments)])
    parts = [f"## equipoise {name}", _text(inspect.cleandoc(command.help or "")), f"```text\n{usage} [OPTIONS]\n```"]
    boxes: dict[str, list[Any]] = {}
    for each in arguments + options:
        boxes.setdefault(getattr(each, "rich_help_panel", None) or "", []).append(each)
    for title, members in boxes.items():
        items = [f"- {_names(each)}: {_text(each.help or '')}{_default(each)}" for each in members]
        parts += [f"**{_text(title)}**" if title else "", "\n".join(items)]
    return "\n\n".join(parts)


def _names(parameter: Any) -> str:
    """How it is written, with what it takes."""
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    value = "" if parameter.is_flag else " " + (parameter.metavar or parameter.display_type(ctx=None))
    return ", ".join(f"`{each}{value}`" for each in (*parameter.opts, *parameter.secondary_opts))


def _default(parameter: Any) -> str:
    if parameter.required:
        return " *Required.*"
    value = getattr(parameter.default, "value", parameter.default)
    if not getattr(parameter, "show_default", False) or value in (None, "", False, ()):
        return ""
    return f" Default: `{value}`."


def _text(words: str) -> str:
    """Words of the program as Markdown: what would be markup there is none."""
    return html.escape(words, quote=False).replace("*", r"\*")
