"""How models are stored: equilibrium layers, modules without tensors, and chains of them.

A new kind of module registers in ``MODULES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import FileFormatError
from ..layers import NEMON, EquilibriumLayer, MonDEQ, QuantizedLinear
from ..parametrizations import Contractive, Dense, Monotone, Weighted
from .images import IMAGES
from .multiscale import MULTISCALE
from .options import read_options, read_scheme, write_options
from .rows import row_weights
from .tensors import Fields, TensorReader, TensorWriter
from .tiers import TIERS
from .values import plain
from .weights import LINEAR, Codec, monotone_weights, read_module, write_module

__all__ = ["MODULES"]


def _write_equilibrium(layer: EquilibriumLayer, out: TensorWriter) -> dict[str, Any]:
    return {
        "features": layer.features,
        "recurrent": write_module(layer.recurrent, monotone_weights() | row_weights(), out.under("recurrent")),
        "injection": write_module(layer.injection, LINEAR, out.under("injection")),
        **write_options(layer, out.where),
    }


def _read_mondeq(fields: Fields, tensors: TensorReader) -> MonDEQ:
    layer = _read_equilibrium(
        fields, tensors, monotone_weights(), lambda d, n, **options: MonDEQ(d, n, rank=0, **options)
    )
    assert isinstance(layer, MonDEQ)
    return layer


def _read_nemon(fields: Fields, tensors: TensorReader) -> NEMON:
    layer = _read_equilibrium(fields, tensors, row_weights(), NEMON)
    assert isinstance(layer, NEMON)
    return layer


def _read_equilibrium(
    fields: Fields, tensors: TensorReader, known: Mapping[str, Codec], kind: Callable[..., EquilibriumLayer]
) -> EquilibriumLayer:
    n = fields.size("features")
    recurrent = read_module(fields.fields("recurrent", features=n), known, tensors.under("recurrent"))
    injection = read_module(fields.fields("injection"), LINEAR, tensors.under("injection"))
    assert isinstance(injection, (nn.Linear, QuantizedLinear))
    if injection.out_features != n or injection.bias is None:
        raise FileFormatError(f"{fields.where}: the injection needs {n} outputs and a bias")
    floats = isinstance(recurrent, (Monotone, Dense, Contractive, Weighted))
    if floats and _dtype(recurrent) != _dtype(injection):
        raise FileFormatError(f"{fields.where}: weights {_dtype(recurrent)}, injection {_dtype(injection)}")
    with torch.device("meta"):  # both weights are replaced: draw no random numbers, take no memory
        layer = kind(
            injection.in_features,
            n,
            **read_options(fields),
        )
    layer.recurrent, layer.injection = recurrent, injection
    layer.scheme = read_scheme(fields)
    return layer


def _dtype(module: nn.Module) -> torch.dtype:
    return module.dense()[0].dtype if isinstance(module, QuantizedLinear) else next(module.parameters()).dtype


def _stateless(module: type[nn.Module], *options: str) -> Codec:
    """A module that is given by options which it keeps as attributes of the same name: numbers and booleans."""
    default = module()
    kinds = {name: type(getattr(default, name)) for name in options}

    def write(instance: nn.Module, out: TensorWriter) -> dict[str, Any]:
        return {name: plain(kind(getattr(instance, name)), out.where) for name, kind in kinds.items()}

    def read(fields: Fields, tensors: TensorReader) -> nn.Module:
        values = fields.options()
        if {name: type(value) for name, value in values.items()} != kinds:
            needed = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
            raise FileFormatError(f"{fields.where}: options {values}; needed are {needed or 'none'}")
        try:
            return module(**values)
        except (ValueError, AssertionError) as error:
            raise FileFormatError(f"{fields.where}: {error}") from error

    return Codec(module, write, read)


def _write_sequential(model: nn.Sequential, out: TensorWriter) -> dict[str, Any]:
    # named_children() would name a module that stands twice only once
    children = model._modules.items()
    return {"modules": [{"name": k, **write_module(m, MODULES, out.under(k))} for k, m in children if m is not None]}


def _read_sequential(fields: Fields, tensors: TensorReader) -> nn.Sequential:
    model = nn.Sequential()
    for values in fields.take("modules", list):
        child = Fields(values, f"a module of {fields.where}")
        name = child.take("name", str)
        child.where = f"module{tensors.under(name).where}"
        if name in model._modules:
            raise FileFormatError(f"{child.where}: two modules have this name")
        module = read_module(child, MODULES, tensors.under(name))
        try:
            model.add_module(name, module)
        except KeyError as error:
            raise FileFormatError(f"{child.where}: no module can have this name") from error
    return model


MODULES = {
    "mondeq": Codec(MonDEQ, _write_equilibrium, _read_mondeq),
    "nemon": Codec(NEMON, _write_equilibrium, _read_nemon),
    "sequential": Codec(nn.Sequential, _write_sequential, _read_sequential),
    **LINEAR,
    **IMAGES,
    **MULTISCALE,
    **TIERS,
    "flatten": _stateless(nn.Flatten, "start_dim", "end_dim"),
    "identity": _stateless(nn.Identity),
    "dropout": _stateless(nn.Dropout, "p", "inplace"),
    "relu": _stateless(nn.ReLU, "inplace"),
    "leaky_relu": _stateless(nn.LeakyReLU, "negative_slope", "inplace"),
    "elu": _stateless(nn.ELU, "alpha", "inplace"),
    "softplus": _stateless(nn.Softplus, "beta", "threshold"),
    "softshrink": _stateless(nn.Softshrink, "lambd"),
    "hardtanh": _stateless(nn.Hardtanh, "min_val", "max_val", "inplace"),
    "sigmoid": _stateless(nn.Sigmoid),
    "tanh": _stateless(nn.Tanh),
}
"""What a file can hold, by the name it has there."""
