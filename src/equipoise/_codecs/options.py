"""Activations, solvers and schemes as plain fields, and back; the layer's own checks have the last word."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..activations import ACTIVATIONS, Activation, activation_from_dict
from ..errors import FileFormatError, StructureError
from ..quantization import SCHEMES, Scheme, scheme_from_dict, scheme_to_dict
from ..solvers import SOLVERS, Rounded, Solver
from .tensors import Fields
from .values import plain

__all__ = [
    "read_activation",
    "read_scheme",
    "read_solver",
    "write_activation",
    "write_scheme",
    "write_solver",
]

STORED: dict[str, type[Solver]] = {**SOLVERS, "Rounded": Rounded}
"""Every solver a file can hold: those that need no options, and the one that does."""


def write_activation(activation: Activation, where: str) -> dict[str, Any]:
    if type(activation) not in ACTIVATIONS.values():
        raise StructureError(f"the activation {activation!r}{where} cannot be saved; known: {', '.join(ACTIVATIONS)}")
    return {key: plain(value, where) for key, value in activation.to_dict().items()}


def read_activation(fields: Fields) -> Activation:
    name, options = fields.take("name", str), fields.options()
    if any(type(value) not in (int, float) for value in options.values()):
        raise FileFormatError(f"{fields.where}: {name} takes numbers")
    return activation_from_dict({"name": name, **options})


def write_solver(solver: Solver, where: str) -> dict[str, Any]:
    if type(solver) not in STORED.values():
        raise StructureError(f"the solver {solver!r}{where} cannot be saved; known: {', '.join(STORED)}")
    values = ((field.name, getattr(solver, field.name)) for field in dataclasses.fields(solver))
    options = {
        key: write_solver(value, where) if isinstance(value, Solver) else plain(value, where) for key, value in values
    }
    return {"name": type(solver).__name__, **options}


def read_solver(fields: Fields) -> Solver:
    name = fields.take("name", str)
    if name not in STORED:
        raise FileFormatError(f"{fields.where}: unknown solver {name!r}; known: {', '.join(STORED)}")
    on = {"on": read_solver(fields.fields("on"))} if fields.holds("on", dict) else {}
    numbers = fields.options()
    known = dataclasses.fields(STORED[name])
    if missing := {f.name for f in known if f.default is dataclasses.MISSING} - {*numbers, *on}:
        raise FileFormatError(f"{fields.where}: {name} needs {', '.join(sorted(missing))}")
    if unknown := {*numbers, *on} - {field.name for field in known}:
        raise FileFormatError(f"{fields.where}: {name} has no option {', '.join(map(ascii, sorted(unknown)))}")
    if numbers.get("on") is not None or any(type(v) not in (int, float, bool, type(None)) for v in numbers.values()):
        raise FileFormatError(f"{fields.where}: {name} takes numbers, and on a solver; got {numbers}")
    options: dict[str, Any] = {**numbers, **on}
    return STORED[name](**options)


def write_scheme(scheme: Scheme | None, where: str) -> dict[str, Any] | None:
    """The scheme a layer was quantized by, None for a float one."""
    if scheme is None:
        return None
    if type(scheme) not in SCHEMES.values():
        raise StructureError(f"the scheme {scheme!r}{where} cannot be saved; known: {', '.join(SCHEMES)}")
    return scheme_to_dict(scheme)


def read_scheme(values: dict[str, Any] | None) -> Scheme | None:
    return None if values is None else scheme_from_dict(values)
