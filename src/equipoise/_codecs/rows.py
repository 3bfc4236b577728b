"""How NEMON weights are stored, as floats or as packed codes; see :mod:`.weights`."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import FileFormatError, InputError
from ..norms import WeightedMax
from ..operators.contractive import AssembledRows, StructuredRows
from ..parametrizations import Contractive, ContractiveKernel, Weighted
from ..parametrizations.nemon import check_gamma
from .tensors import Fields, TensorReader, TensorWriter
from .weights import Codec, filled, read_codes, write_codes

__all__ = ["ROW_WEIGHTS", "check_family"]


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


def _write_assembled(weights: AssembledRows, out: TensorWriter) -> dict[str, Any]:
    out.put("eta", weights.eta)
    return {"bits": write_codes(weights.codes, out.under("codes"))}


def _read_assembled(fields: Fields, tensors: TensorReader) -> AssembledRows:
    n = fields.size("features")
    codes = read_codes((n, n), fields.take("bits", int), tensors.under("codes"))
    return AssembledRows(codes, _eta(n, fields, tensors))


def _write_structured(weights: StructuredRows, out: TensorWriter) -> dict[str, Any]:
    out.put("eta", weights.eta)
    out.put("gamma", weights.gamma)
    return {"bits": write_codes(weights.T, out.under("T"))}


def _read_structured(fields: Fields, tensors: TensorReader) -> StructuredRows:
    n = fields.size("features")
    codes = read_codes((n, n), fields.take("bits", int), tensors.under("T"))
    gamma = check_gamma(float(tensors.take("gamma", (), torch.float64)))
    return StructuredRows(codes, _eta(n, fields, tensors), gamma)


def _eta(n: int, fields: Fields, tensors: TensorReader) -> torch.Tensor:
    eta = tensors.take("eta", (n,), torch.float32)
    try:
        WeightedMax(eta)
    except InputError as error:
        raise FileFormatError(f"{fields.where}: {error}") from error
    return eta


def check_family(module: Contractive | ContractiveKernel | Weighted, fields: Fields) -> None:
    try:
        module.family()
    except InputError as error:
        raise FileFormatError(f"{fields.where}: {error}") from error


ROW_WEIGHTS = {
    "contractive": Codec(Contractive, _write_contractive, _read_contractive),
    "weighted": Codec(Weighted, _write_weighted, _read_weighted),
    "assembled_rows": Codec(AssembledRows, _write_assembled, _read_assembled),
    "structured_rows": Codec(StructuredRows, _write_structured, _read_structured),
}
