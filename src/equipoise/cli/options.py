"""Options that training commands share, in groups: each a frozen dataclass whose fields are options.

:func:`grouped` lets a command take a group as one argument, while the parser sees the options in it, and the help
shows them in a box of their own with the group's docstring as its title.
"""

from __future__ import annotations

import copy
import enum
import functools
import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from .common import flag, option

if TYPE_CHECKING:
    from ..penalties import MarginPenalty
    from ..quantization.schemes import Scheme
    from ..training import TrainingConfig

__all__ = [
    "ROUNDING",
    "BitsList",
    "Course",
    "InputBits",
    "LearnScale",
    "Network",
    "PrecisionName",
    "Rounding",
    "Target",
    "bits_of",
    "grouped",
    "numbers",
    "penalty",
    "scheme_option",
]

ROUNDING = "How weights are rounded"
"""The title of what stands in the help about schemes and bits."""


def grouped(command: Callable[..., int]) -> Callable[..., int]:
    """``command`` with the fields of its arguments that are dataclasses as arguments of their own."""
    hints = typing.get_type_hints(command, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if name != "return" and is_dataclass(kind)}

    @functools.wraps(command)
    def call(**given: Any) -> int:
        found = {
            name: typing.cast(Any, kind)(**{field.name: given.pop(field.name) for field in fields(kind)})
            for name, kind in groups.items()
        }
        return command(**given, **found)

    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY))
            continue
        inner = _boxed(groups[name])
        parameters += [
            inspect.Parameter(f.name, parameter.KEYWORD_ONLY, default=f.default, annotation=inner[f.name])
            for f in fields(groups[name])
        ]
    signature: Any = call
    signature.__signature__ = inspect.Signature(parameters)
    signature.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del signature.__wrapped__  # or the parser would look through to the groups
    return call


def _boxed(group: Any) -> dict[str, Any]:
    """The fields' annotations, each option in the box that the group's docstring names."""
    boxed = {}
    for name, annotation in typing.get_type_hints(group, include_extras=True).items():
        kind, described = typing.get_args(annotation)
        described = copy.copy(described)
        described.rich_help_panel = inspect.cleandoc(group.__doc__ or "").rstrip(".") or None
        boxed[name] = Annotated[kind, described]
    return boxed


class ModelName(enum.StrEnum):
    mondeq = "mondeq"
    nemon = "nemon"
    nemonconv = "nemonconv"
    monconv = "monconv"
    multitier = "multitier"
    lmdeq = "lmdeq"
    mdeq = "mdeq"


class PresetName(enum.StrEnum):
    tiny = "tiny"
    small = "small"
    published = "published"


class ScheduleName(enum.StrEnum):
    one_cycle = "one-cycle"
    cosine = "cosine"
    step = "step"
    constant = "constant"


class PrecisionName(enum.StrEnum):
    full = "32"
    bf16 = "bf16"
    fp16 = "fp16"


@dataclass(frozen=True)
class Network:
    """Which network."""

    model: Annotated[
        ModelName,
        typer.Option(
            metavar="MODEL",
            help="mondeq (fully connected, proved by a margin), nemon (by row sums, for perturbed pixels); for images"
            " monconv, multitier, nemonconv, lmdeq (contracts), mdeq (proves nothing).",
        ),
    ] = ModelName.mondeq
    preset: Annotated[
        PresetName | None,
        option("Its size, and how it is trained by default: tiny, small or published.", metavar="PRESET"),
    ] = None
    features: Annotated[int | None, option("Units of the equilibrium layer, or channels; default the preset's.")] = None
    rank: Annotated[int | None, option("Rows of A in W = (1 − m)I − AᵀA + B − Bᵀ; default a quarter of them.")] = None
    margin: Annotated[float | None, option("Margin m that a mondeq starts from, default 1; it is learned.")] = None
    gamma: Annotated[
        float | None,
        option(
            "Below 1: the measure of W in a nemon (default 0.95) or nemonconv (default 0.1), or the factor by which"
            " an lmdeq contracts in training."
        ),
    ] = None

    def fields(self) -> dict[str, Any]:
        """The fields of a :class:`~equipoise.jobs.Job` that these are."""
        named = {"model": self.model.value, "preset": None if self.preset is None else self.preset.value}
        return {**named, "features": self.features, "rank": self.rank, "margin": self.margin, "gamma": self.gamma}


@dataclass(frozen=True)
class Course:
    """How it is trained; what is not given is the preset's."""

    epochs: Annotated[int | None, option("Passes over the training split; 12 for a mondeq.")] = None
    batch_size: Annotated[int | None, option("Samples per step; 128.")] = None
    lr: Annotated[float | None, option("Largest learning rate; 3e-3 for a mondeq.", "--lr")] = None
    weight_decay: Annotated[
        float | None,
        option("Pull on matrices that keeps W and its rounding small; 0.3 for a mondeq, 0.1 with --input-bits 1."),
    ] = None
    schedule: Annotated[
        ScheduleName | None,
        option("Course of the learning rate: one-cycle, cosine, step or constant.", metavar="SCHEDULE"),
    ] = None
    augment: Annotated[
        bool | None,
        option("Shift images, and mirror those of cifar10, at random.", "--augment/--no-augment", metavar=""),
    ] = None

    def config(self, network: Network, data: str, input_bits: int | None, **given: Any) -> TrainingConfig:
        """The training of ``network`` on ``data``, with the further fields that are ``given``."""
        from ..presets import preset_of

        # codes of one bit are signs, which decay only makes restless
        decay = 0.1 if self.weight_decay is None and input_bits == 1 else self.weight_decay
        preset = preset_of(network.model.value, None if network.preset is None else network.preset.value)
        return preset.config(
            data,
            self.augment,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.lr,
            weight_decay=decay,
            schedule=None if self.schedule is None else self.schedule.value,
            **given,
        )


def scheme_option(default: str = "") -> Any:
    """The option that names a scheme, or several."""
    return option(
        "structured: what W is made of is rounded, its margin stays at any number of bits. compensated: W is rounded,"
        " its diagonal lowered to a margin. cayley: the solver's matrix is rounded. assembled: W is rounded, and may"
        f" lose its margin.{default}",
        metavar="SCHEME",
        rich_help_panel=ROUNDING,
    )


def bits_of(what: str, otherwise: str = "") -> Any:
    """The option that gives the bits of ``what``."""
    return option(f"Bits of {what}, 1 to 16, or 32.{otherwise}", rich_help_panel=ROUNDING)


FLOATS = " Floats if not given."
InputBits = Annotated[int | None, bits_of("the input weights U", FLOATS)]
BitsList = Annotated[
    str,
    typer.Option(help="Bits of the recurrent weights: numbers and ranges, such as 16,8-1.", rich_help_panel=ROUNDING),
]
LearnScale = Annotated[
    bool, flag("Learn the scales instead of fitting them in every step.", "--learn-scale", rich_help_panel=ROUNDING)
]


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded."""

    skew_bits: Annotated[int | None, bits_of("K = B − Bᵀ, structured only", " As BITS if not given.")] = None
    input_bits: InputBits = None
    bias_bits: Annotated[int | None, bits_of("the bias b", FLOATS)] = None
    head_bits: Annotated[int | None, bits_of("the linear layers around the equilibrium", FLOATS)] = None
    granularity: Annotated[
        str | None, option("One scale per tensor or per row: tensor, or row, which is cayley's default.")
    ] = None
    scale: Annotated[
        str | None, option("Fit scales to the largest weight: max, assembled's default; or in least squares: mse.")
    ] = None

    def given(self) -> dict[str, Any]:
        """The options that were given."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def scheme(self, name: str | None, bits: int | None, target: float | None) -> Scheme | None:
        """The scheme of these options, None where there is none; options that were not given are None."""
        from ..operators import scheme_from_dict

        given = self.given() if bits is None else {"bits": bits, **self.given()}
        if name is None:
            if given:
                option = next(iter(given)).replace("_", "-")
                raise OptionError(f"--{option} needs a --scheme, such as structured")
            return None
        if name == "compensated" and target is not None:
            given["margin"] = target  # the scheme itself reaches it
        return scheme_from_dict({"scheme": name, **given})


Target = Annotated[float | None, option("Drive the proved margin to this in training; exit 1 where it is missed.")]


def numbers(what: str, text: str, largest: int) -> list[int]:
    """ "8,4-2" as [8, 4, 3, 2]."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise OptionError(f"{what} {text!r}: give numbers and ranges with commas, such as 8-1 or 16,8,4")
        first, last = int(match[1]), int(match[2] or match[1])
        if max(first, last) > largest or abs(first - last) > 10_000:
            raise OptionError(f"{what} {text!r}: {max(first, last)} is too many")
        found += range(first, last - 1, -1) if first >= last else range(first, last + 1)
    return found


def penalty(target: float | None, ratio: float | None, weight: float | None) -> MarginPenalty | None:
    """What the three margin options ask for."""
    from ..penalties import MarginPenalty

    if target is None and ratio is None:
        if weight is not None:
            raise OptionError(f"--margin-weight {weight:g} needs --margin-target or --margin-ratio")
        return None
    return MarginPenalty(target, ratio, 1.0 if weight is None else weight)
