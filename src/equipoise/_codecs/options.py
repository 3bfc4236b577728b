"""Activations, solvers and schemes as plain fields, and back; the layer's own checks have the last word."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..activations import ACTIVATIONS, Activation, activation_from_dict
from ..errors import FileFormatError, StructureError
from ..layers.solving import SolvingLayer
from ..operators import scheme_from_dict, schemes
from ..quantization import Scheme, scheme_to_dict
from ..solvers import SOLVERS, Solver
from .tensors import Fields
from .values import plain

__all__ = ["read_options", "read_scheme", "read_solver", "write_options", "write_scheme", "write_solver"]


def _check_known(value: Any, what: str, where: str, table: Mapping[str, type], place: str) -> None:
    """Raise :class:`StructureError` unless ``table`` has the very type of ``value`` under its name."""
    name = type(value).__name__
    if table.get(name) is not type(value):
        raise StructureError(
            f"the {what} {value!r}{where} cannot be saved; known: {', '.join(table)}. One of your own is made known, "
            f'where it is saved and where it is loaded, by equipoise.{place}["{name}"] = {name}'
        )


def write_options(layer: SolvingLayer, where: str) -> dict[str, Any]:
    """What a layer holds besides its weights, and its scheme."""
    return {
        "activation": _write_activation(layer.activation, where),
        "solver": write_solver(layer.solver, where),
        "tol": plain(layer.tol, where),
        "backward_tol": plain(layer.backward_tol, where),
        "strict": bool(layer.strict),
        "scheme": write_scheme(layer.scheme, where),
    }


def read_options(fields: Fields) -> dict[str, Any]:
    """The same as the layer's constructor takes it; the scheme is left to :func:`read_scheme`."""
    return {
        "activation": _read_activation(fields.fields("activation")),
        "solver": read_solver(fields.fields("solver")),
        "tol": fields.take("tol", float, type(None)),
        "backward_tol": fields.take("backward_tol", float, type(None)),
        "strict": fields.take("strict", bool),
    }


def _write_activation(activation: Activation, where: str) -> dict[str, Any]:
    _check_known(activation, "activation", where, ACTIVATIONS, "activations.ACTIVATIONS")
    return {key: plain(value, where) for key, value in activation.to_dict().items()}


def _read_activation(fields: Fields) -> Activation:
    name, options = fields.take("name", str), fields.options()
    if any(type(value) not in (int, float) for value in options.values()):
        raise FileFormatError(f"{fields.where}: {name} takes numbers")
    return activation_from_dict({"name": name, **options})


def write_solver(solver: Solver, where: str) -> dict[str, Any]:
    _check_known(solver, "solver", where, SOLVERS, "solvers.SOLVERS")
    values = ((field.name, getattr(solver, field.name)) for field in dataclasses.fields(solver))
    options = {
        key: write_solver(value, where) if isinstance(value, Solver) else plain(value, where) for key, value in values
    }
    return {"name": type(solver).__name__, **options}


def read_solver(fields: Fields) -> Solver:
    name = fields.take("name", str)
    if name not in SOLVERS:
        raise FileFormatError(f"{fields.where}: unknown solver {name!r}; known: {', '.join(SOLVERS)}")
    on = {"on": read_solver(fields.fields("on"))} if fields.holds("on", dict) else {}
    numbers = fields.options()
    known = dataclasses.fields(SOLVERS[name])
    if missing := {f.name for f in known if f.default is dataclasses.MISSING} - {*numbers, *on}:
        raise FileFormatError(f"{fields.where}: {name} needs {', '.join(sorted(missing))}")
    if unknown := {*numbers, *on} - {field.name for field in known}:
        raise FileFormatError(f"{fields.where}: {name} has no option {', '.join(map(ascii, sorted(unknown)))}")
    if numbers.get("on") is not None or any(type(v) not in (int, float, bool, type(None)) for v in numbers.values()):
        raise FileFormatError(f"{fields.where}: {name} has {numbers}; it takes numbers, and on a solver")
    options: dict[str, Any] = {**numbers, **on}
    return SOLVERS[name](**options)


def write_scheme(scheme: Scheme | None, where: str) -> dict[str, Any] | None:
    """The scheme a layer was quantized by, None for a float one."""
    if scheme is None:
        return None
    if type(scheme) not in schemes().values():
        name = type(scheme).__name__
        raise StructureError(
            f"the scheme {scheme!r}{where} cannot be saved; known: {', '.join(schemes())}. One of your own is made "
            f"known, where it is saved and where it is loaded, by equipoise.operators.RECIPES[{name}] = "
            f"Recipe({name}Weight)"
        )
    return scheme_to_dict(scheme)


def read_scheme(fields: Fields) -> Scheme | None:
    values = fields.take("scheme", dict, type(None))
    return None if values is None else scheme_from_dict(values)
