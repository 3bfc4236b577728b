"""The ``equipoise`` command: arguments in, one answer out. Results on stdout, all else on stderr.

Exit status: 0 done, 1 a guarantee that was asked for is not met, 2 bad use or bad input, 130 interrupted.
Rooms are imported when their command runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Sequence

import typer

from ..errors import EquipoiseError
from . import judge, make, reproduce, ship, sweep, train
from .common import BAD, INTERRUPTED, app, say, show_warning, tell

__all__ = ["main"]

make.register(app)
train.register(app)
sweep.register(app)
judge.register(app)
ship.register(app)
reproduce.register(app)
for _command_info in app.registered_commands:  # a paragraph's lines are the source's, not the reader's
    _command_info.help = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(_command_info.callback) or "")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            status = app(args=arguments, prog_name="equipoise", standalone_mode=False)
        say("", end="")  # a full disk or a closed pipe shows now, and not while Python shuts down
    except EquipoiseError as error:
        return _complain(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        return _complain(f"{where}{error.strerror or error}")
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
            return _complain("not enough memory for this: give less at a time, or a smaller network")
        # The parser's own errors: their common class has had several homes, their method only one name.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message().replace("Value error, ", "") + _value(error, arguments)
        return _complain(f"{message} (equipoise {_command(arguments)}--help says more)")
    return status if isinstance(status, int) else 0


def _command(arguments: Sequence[str]) -> str:
    """The command that was meant, for a hint; empty where it is none."""
    known = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    return f"{arguments[0]} " if arguments and arguments[0] in known else ""


def _value(error: Exception, arguments: Sequence[str]) -> str:
    """What was given for the option that the parser refuses, which its message may leave out."""
    for name in getattr(getattr(error, "param", None), "opts", ()):
        for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
            value = following if argument == name else argument.removeprefix(f"{name}=")
            if (argument == name or value != argument) and value and value not in str(error):
                return f", not {value!r}"
    return ""


def _complain(message: str) -> int:
    tell("error: " + " ".join(message.split()))
    return BAD
