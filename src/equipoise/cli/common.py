"""What the commands share: the application, options of the same name and meaning, and ways to speak."""

from __future__ import annotations

import enum
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ..errors import ConvergenceWarning

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "BAD",
    "INTERRUPTED",
    "UNMET",
    "DataDir",
    "DataName",
    "Force",
    "Json",
    "Model",
    "OnData",
    "Out",
    "app",
    "flag",
    "keep",
    "option",
    "say",
    "say_json",
    "show_warning",
    "tell",
]

UNMET, BAD, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Equilibrium networks that keep their guarantee at any bit-width.",
    epilog="Exit status: 0 done, 1 a guarantee that was asked for is not met, 2 bad use or bad input, 130 interrupted.",
)


class DataName(enum.StrEnum):
    digits = "digits"
    mnist = "mnist"
    cifar10 = "cifar10"


def option(help: str, *names: str, **settings: Any) -> Any:
    """An option whose default its help tells, where there is one."""
    return typer.Option(*names, help=help, show_default=False, **settings)


def flag(help: str, name: str, **settings: Any) -> Any:
    """An option that is given or not, and has no value to describe."""
    return typer.Option(name, help=help, metavar="", **settings)


Model = Annotated[Path, typer.Argument(metavar="FILE", help="A model file of equipoise.", show_default=False)]
Out = Annotated[Path, option("The file to write.")]
Force = Annotated[bool, flag("Replace what exists.", "--force")]
Json = Annotated[bool, flag("Print one JSON object on stdout, and nothing else there.", "--json")]
OnData = Annotated[DataName, typer.Option("--data", metavar="DATA", help="Data set: digits, mnist or cifar10.")]
DataDir = Annotated[
    Path | None,
    option(
        "Folder with mnist/ and cifar10/ laid out as on the Hugging Face hub. If not given, the one that the variable"
        " EQUIPOISE_DATA names; without it they are downloaded."
    ),
]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show_version: Annotated[bool, flag("Print the version and exit.", "--version")] = False,
) -> None:
    if show_version:
        say(f"equipoise {version('equipoise')}")
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        say(context.get_help())
        raise typer.Exit(BAD)


def say(text: str, end: str = "\n") -> None:
    """Results: on stdout, flushed. A reader that has gone away takes nothing from the exit status."""
    try:
        sys.stdout.write(text + end)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again at its end
        if not isinstance(error, BrokenPipeError):
            raise


def say_json(values: dict[str, Any]) -> None:
    """One JSON object on one line of stdout."""
    say(json.dumps(values, allow_nan=False, ensure_ascii=False))


def tell(text: str) -> None:
    """Everything that is no result: on stderr."""
    print(text, file=sys.stderr, flush=True)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as one line on stderr; where it comes from interests nobody who typed a command."""
    if issubclass(category, (UserWarning, ConvergenceWarning)):
        tell(f"warning: {' '.join(str(message).split())}")


def keep(
    model: nn.Module,
    out: Path,
    force: bool,
    found: dict[str, Any],
    as_json: bool,
    reference: nn.Module | None = None,
) -> None:
    """Certify ``model``, save it with its certificate, and say what is known about it."""
    from ..certificates import certify
    from ..files import save
    from ..quantize import size
    from ..report.terminal import pairs_table, rendered, waiting

    with waiting("proving"):
        certificate = certify(model, reference)
    save(model, out, certificate, force)
    proof = certificate.to_dict()
    found |= {"size_bytes": size(model), **{k: proof[k] for k in ("certified", "margin", "lipschitz", "delta_norm")}}
    if as_json:
        say_json(found)
        return
    labels = LABELS | {"delta_norm": f"‖ΔW‖{'₂' if proof['family'] == 'l2' else '_η'}, at most"}
    shown = {k: v for k, v in found.items() if v is not None and k not in ("accuracy", "interrupted")}
    rows = [(labels.get(k, k.replace("_", " ")), _shown(k, v)) for k, v in shown.items()]
    say(rendered(pairs_table(rows)), end="")


LABELS = {
    "accuracy_validation": "accuracy, validation split",
    "accuracy_test": "accuracy, test split",
    "size_bytes": "size, bytes",
    "margin": "margin, at least",
    "lipschitz": "Lipschitz constant, at most",
}


def _shown(name: str, value: Any) -> str:
    from ..report.words import at_least, at_most, number, percent

    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return f"{value:,}" if name == "size_bytes" else str(value)
    if name.startswith("accuracy"):
        return percent(value)
    if name == "seconds_per_epoch":
        return number(value, 2)
    return {"margin": at_least, "lipschitz": at_most, "delta_norm": at_most}.get(name, number)(value, 6)
