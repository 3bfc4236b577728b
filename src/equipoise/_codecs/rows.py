"""How NEMON weights are stored, as floats or as packed codes; see :mod:`.weights`."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import FileFormatError, InputError
from ..operators import RECIPES, schemes
from ..parametrizations import Contractive, ContractiveKernel, Weighted
from ..parametrizations.nemon import check_gamma
from .tensors import Fields, TensorReader, TensorWriter
from .weights import Codec, coded, filled

__all__ = ["check_family", "row_weights"]


def _write_contractive(weights: Contractive, out: TensorWriter) -> dict[str, Any]:
    gamma = "raw_gap" if "raw_gap" in weights._parameters else "gamma"
    for name in ("T", "d", gamma):
        out.put(name, getattr(weights, name))
    return {"learn_gamma": gamma == "raw_gap", "learn_weights": "d" in weights._parameters}


def _read_contractive(fields: Fields, tensors: TensorReader) -> Contractive:
    n, learned = fields.size("features"), fields.take("learn_gamma", bool)
    learn_weights = fields.take("learn_weights", bool)
    T, gamma = tensors.take("T", (n, n)), "raw_gap" if learned else "gamma"
    state = {"T": T, "d": tensors.take("d", (n,), T.dtype), gamma: tensors.take(gamma, (), T.dtype)}
    module = filled(lambda: Contractive(n, learn_gamma=learned, learn_weights=learn_weights), state)
    check_gamma(float(module.current_gamma().detach()))
    check_family(module, fields)
    return module


def _write_weighted(weights: Weighted, out: TensorWriter) -> dict[str, Any]:
    out.put("weight", weights.weight)
    out.put("log_eta", weights.log_eta)
    return {}


def _read_weighted(fields: Fields, tensors: TensorReader) -> Weighted:
    n = fields.size("features")
    weight = tensors.take("weight", (n, n))
    module = Weighted(weight, torch.ones(n))
    module.log_eta = tensors.take("log_eta", (n,), weight.dtype)
    check_family(module, fields)
    return module


def check_family(module: Contractive | ContractiveKernel | Weighted, fields: Fields) -> None:
    try:
        module.family()
    except InputError as error:
        raise FileFormatError(f"{fields.where}: {error}") from error


FREE = {
    "contractive": Codec(Contractive, _write_contractive, _read_contractive),
    "weighted": Codec(Weighted, _write_weighted, _read_weighted),
}


def row_weights() -> dict[str, Codec]:
    """What a NEMON layer's recurrent weights may be: free tensors, or codes by a scheme that is made for them."""
    found = ((f"{name}_rows", RECIPES[scheme].rows) for name, scheme in schemes().items())
    return FREE | {name: coded(kind) for name, kind in found if kind is not None}
