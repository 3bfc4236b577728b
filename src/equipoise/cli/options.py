"""Options that training commands share, in groups: each a frozen dataclass whose fields are options.

:func:`grouped` lets a command take a group as one argument, while the parser sees the options in it.
"""

from __future__ import annotations

import enum
import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from .common import Bits

if TYPE_CHECKING:
    from ..penalties import MarginPenalty
    from ..quantization.schemes import Scheme
    from ..training import TrainingConfig

__all__ = ["Course", "Network", "PrecisionName", "Rounding", "Target", "grouped", "option", "penalty"]


def option(help: str, *names: str) -> Any:
    """An option whose default its help tells, where there is one."""
    return typer.Option(*names, help=help, show_default=False)


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
        inner = typing.get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(f.name, parameter.KEYWORD_ONLY, default=f.default, annotation=inner[f.name])
            for f in fields(groups[name])
        ]
    signature: Any = call
    signature.__signature__ = inspect.Signature(parameters)
    signature.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del signature.__wrapped__  # or the parser would look through to the groups
    return call


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

    model: Annotated[ModelName, typer.Option(help="Kind of network.")] = ModelName.mondeq
    preset: Annotated[
        PresetName | None, option("Its size and how it is trained by default: tiny, small or published.")
    ] = None
    features: Annotated[int | None, option("Units of the equilibrium layer, or channels; default the preset's.")] = None
    rank: Annotated[int | None, option("Rows of A; default a quarter of the features.")] = None
    margin: Annotated[float | None, option("Margin of a monDEQ to start from, default 1; it is learned.")] = None
    gamma: Annotated[
        float | None,
        option("Below 1: measure of a nemon, default 0.95, of a nemonconv 0.1; contraction of an lmdeq in training."),
    ] = None

    def fields(self) -> dict[str, Any]:
        """The fields of a :class:`~equipoise.jobs.Job` that these are."""
        named = {"model": self.model.value, "preset": None if self.preset is None else self.preset.value}
        return {**named, "features": self.features, "rank": self.rank, "margin": self.margin, "gamma": self.gamma}


@dataclass(frozen=True)
class Course:
    """How it is trained; what is not given is the preset's."""

    epochs: Annotated[int | None, option("Passes over the training split; default the preset's.")] = None
    batch_size: Annotated[int | None, option("Samples per step; default 128.")] = None
    lr: Annotated[float | None, option("Largest learning rate; default 3e-3, or the preset's.", "--lr")] = None
    weight_decay: Annotated[
        float | None,
        option("Of matrices, to keep W and its rounding small; default 0.3, or the preset's; 0.1 at 1 input bit."),
    ] = None
    schedule: Annotated[
        ScheduleName | None, option("Of the learning rate: one-cycle, cosine, step or constant; default the preset's.")
    ] = None
    augment: Annotated[
        bool | None,
        option("Shift images, and mirror those of cifar10, at random; default the preset's.", "--augment/--no-augment"),
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


@dataclass(frozen=True)
class Rounding:
    """Of a quantization scheme, beside its name and bits."""

    skew_bits: Annotated[int | None, option("Of K in the structured scheme; default BITS.")] = None
    input_bits: Bits = None
    bias_bits: Bits = None
    head_bits: Bits = None
    granularity: Annotated[str | None, option("Of scales: tensor or row.")] = None
    scale: Annotated[str | None, option("Fitted in every step: max or mse.")] = None
    learn_scale: Annotated[bool, typer.Option("--learn-scale", help="Learn the scales instead of fitting.")] = False

    def scheme(self, name: str | None, bits: int | None, target: float | None) -> Scheme | None:
        """The scheme of these options, None where there is none; options that were not given are None."""
        from ..quantization.schemes import scheme_from_dict

        options = {"bits": bits, **vars(self)}
        del options["learn_scale"]
        given = {option: value for option, value in options.items() if value is not None}
        if name is None:
            if given:
                option = next(iter(given)).replace("_", "-")
                raise OptionError(f"--{option} needs a --scheme: assembled, structured, compensated or cayley")
            return None
        if name == "compensated" and target is not None:
            given["margin"] = target  # the scheme itself reaches it
        return scheme_from_dict({"scheme": name, **given})


Target = Annotated[float | None, option("Drive the proved margin to this; exit 1 where it is missed.")]


def penalty(target: float | None, ratio: float | None, weight: float | None) -> MarginPenalty | None:
    """What the three margin options ask for."""
    from ..penalties import MarginPenalty

    if target is None and ratio is None:
        if weight is not None:
            raise OptionError(f"--margin-weight {weight:g} needs --margin-target or --margin-ratio")
        return None
    return MarginPenalty(target, ratio, 1.0 if weight is None else weight)
