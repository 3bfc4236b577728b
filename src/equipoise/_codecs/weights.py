"""How weights are stored: linear modules and recurrent weights, as floats or as packed codes.

``write`` puts a module's tensors away under their state keys and returns its fields; ``read`` is its inverse and
trusts nothing: sizes are compared with what the file holds before anything is allocated. A new kind of recurrent
weights registers in ``WEIGHTS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..errors import EquipoiseError, FileFormatError, StructureError
from ..layers import PreparedLinear, QuantizedLinear
from ..operators import PreparedWeight
from ..operators.quantized import AssembledWeight, CayleyWeight, CompensatedWeight, StructuredWeight
from ..parametrizations import Dense, Monotone
from ..parametrizations.monotone import check_margin
from ..quantization import QuantizedSkew, QuantizedTensor, pack, unpack
from .tensors import FLOATS, Fields, TensorReader, TensorWriter

__all__ = ["LINEAR", "WEIGHTS", "Codec", "read_module", "write_module"]

Module = TypeVar("Module", bound=nn.Module)


class Codec(NamedTuple):
    """``write`` puts a module's tensors away and returns its fields; ``read`` is its inverse."""

    module: type[nn.Module]
    write: Callable[[Any, TensorWriter], dict[str, Any]]
    read: Callable[[Fields, TensorReader], nn.Module]


def write_module(module: nn.Module, known: Mapping[str, Codec], out: TensorWriter) -> dict[str, Any]:
    """The fields of ``module``; its type must be one of ``known`` exactly, for a subclass may compute otherwise."""
    for kind, codec in known.items():
        if type(module) is codec.module:
            return {"kind": kind, **codec.write(module, out)}
    if isinstance(module, (PreparedWeight, PreparedLinear)):
        raise StructureError(f"the model is prepared for training with quantization{out.where}; convert it first")
    raise StructureError(
        f"{type(module).__name__}{out.where} cannot be saved; known here: "
        f"{', '.join(dict.fromkeys(codec.module.__name__ for codec in known.values()))}"
    )


def read_module(fields: Fields, known: Mapping[str, Codec], tensors: TensorReader) -> nn.Module:
    """The inverse of :func:`write_module`; raises :class:`FileFormatError` for whatever it did not write."""
    kind = fields.take("kind", str)
    if kind not in known:
        raise FileFormatError(f"{fields.where}: unknown kind {kind!r}; known here: {', '.join(known)}")
    module = known[kind].read(fields, tensors)
    fields.close()
    return module


# Linear modules


def _write_linear(linear: nn.Linear, out: TensorWriter) -> dict[str, Any]:
    out.put("weight", linear.weight)
    if linear.bias is not None:
        out.put("bias", linear.bias)
    sizes = {"in_features": linear.in_features, "out_features": linear.out_features}
    return {**sizes, "bias": linear.bias is not None}


def _read_linear(fields: Fields, tensors: TensorReader) -> nn.Linear:
    d, n = fields.size("in_features", 0), fields.size("out_features", 0)
    state = {"weight": tensors.take("weight", (n, d))}
    if fields.take("bias", bool):
        state["bias"] = tensors.take("bias", (n,), state["weight"].dtype)
    return _filled(lambda: nn.Linear(d, n, bias="bias" in state), state)


def _write_quantized_linear(linear: QuantizedLinear, out: TensorWriter) -> dict[str, Any]:
    weight, bias = linear.weight, linear.bias
    return {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "dtype": _dtype_name(linear.dense()[0].dtype),
        "weight_bits": _write_either("weight", weight, out),
        "bias": bias is not None,
        "bias_bits": None if bias is None else _write_either("bias", bias, out),
    }


def _read_quantized_linear(fields: Fields, tensors: TensorReader) -> QuantizedLinear:
    d, n = fields.size("in_features", 0), fields.size("out_features", 0)
    name = fields.take("dtype", str)
    dtype = next((known for known in FLOATS.values() if _dtype_name(known) == name), None)
    if dtype is None:
        raise FileFormatError(f"{fields.where}: unknown dtype {name!r}")
    weight_bits, bias_bits = (fields.take(key, int, type(None)) for key in ("weight_bits", "bias_bits"))
    weight = _read_either("weight", (n, d), weight_bits, dtype, tensors)
    bias = _read_either("bias", (n,), bias_bits, dtype, tensors) if fields.take("bias", bool) else None
    return QuantizedLinear(weight, bias).to(dtype)  # codes and scales keep their own dtypes


def _write_either(name: str, value: QuantizedTensor | Tensor, out: TensorWriter) -> int | None:
    """Codes or floats; returns the bits of the codes."""
    if isinstance(value, QuantizedTensor):
        return _write_codes(value, out.under(name))
    out.put(name, value)
    return None


def _read_either(
    name: str, shape: tuple[int, ...], bits: int | None, dtype: torch.dtype, tensors: TensorReader
) -> QuantizedTensor | Tensor:
    return tensors.take(name, shape, dtype) if bits is None else _read_codes(shape, bits, tensors.under(name))


# Codes


def _write_codes(quantized: QuantizedTensor, out: TensorWriter) -> int:
    out.put("codes", pack(quantized.codes, quantized.bits))
    out.put("scale", quantized.scale)
    return quantized.bits


def _read_codes(shape: tuple[int, ...], bits: int, tensors: TensorReader) -> QuantizedTensor:
    packed = tensors.take("codes", None, torch.uint8)
    scale = tensors.take("scale", None)
    try:
        return QuantizedTensor.from_codes(unpack(packed, bits, shape), scale, bits)
    except EquipoiseError as error:
        raise FileFormatError(f"codes{tensors.where}: {error}") from error


# Recurrent weights


def _write_monotone(weights: Monotone, out: TensorWriter) -> dict[str, Any]:
    learned = "raw_margin" in weights._parameters
    out.put("A", weights.A)
    out.put("B", weights.B)
    out.put("raw_margin" if learned else "margin", weights.raw_margin if learned else weights.margin)
    return {"rank": weights.A.shape[0], "learn_margin": learned}


def _read_monotone(fields: Fields, tensors: TensorReader) -> Monotone:
    n, rank, learned = fields.size("features"), fields.size("rank", 0), fields.take("learn_margin", bool)
    A = tensors.take("A", (rank, n))
    margin = "raw_margin" if learned else "margin"
    state = {"A": A, "B": tensors.take("B", (n, n), A.dtype), margin: tensors.take(margin, (), A.dtype)}
    module = _filled(lambda: Monotone(n, rank, learn_margin=learned), state)
    check_margin(float(module.current_margin().detach()))
    return module


def _write_dense(weights: Dense, out: TensorWriter) -> dict[str, Any]:
    out.put("weight", weights.weight)
    return {}


def _read_dense(fields: Fields, tensors: TensorReader) -> Dense:
    n = fields.size("features")
    return Dense(tensors.take("weight", (n, n)))


def _write_assembled(weights: AssembledWeight, out: TensorWriter) -> dict[str, Any]:
    return {"bits": _write_codes(weights.codes, out.under("codes"))}


def _read_assembled(fields: Fields, tensors: TensorReader) -> AssembledWeight:
    n = fields.size("features")
    return AssembledWeight(_read_codes((n, n), fields.take("bits", int), tensors.under("codes")))


def _write_structured(weights: StructuredWeight, out: TensorWriter) -> dict[str, Any]:
    out.put("margin", weights.margin)
    return {
        "rank": weights.A.shape[0],
        "bits": _write_codes(weights.A, out.under("A")),
        "skew_bits": _write_codes(weights.K.upper, out.under("K.upper")),
    }


def _read_structured(fields: Fields, tensors: TensorReader) -> StructuredWeight:
    n, rank = fields.size("features"), fields.size("rank", 0)
    A = _read_codes((rank, n), fields.take("bits", int), tensors.under("A"))
    upper = _read_codes((n * (n - 1) // 2,), fields.take("skew_bits", int), tensors.under("K.upper"))
    margin = check_margin(float(tensors.take("margin", (), torch.float64)))
    return StructuredWeight(A, QuantizedSkew(upper, n), margin)


def _write_compensated(weights: CompensatedWeight, out: TensorWriter) -> dict[str, Any]:
    return {
        "bits": _write_codes(weights.off_diagonal, out.under("off_diagonal")),
        "diagonal_bits": _write_codes(weights.diagonal, out.under("diagonal")),
    }


def _read_compensated(fields: Fields, tensors: TensorReader) -> CompensatedWeight:
    n = fields.size("features")
    off_diagonal = _read_codes((n, n - 1), fields.take("bits", int), tensors.under("off_diagonal"))
    return CompensatedWeight(
        off_diagonal, _read_codes((n,), fields.take("diagonal_bits", int), tensors.under("diagonal"))
    )


def _write_cayley(weights: CayleyWeight, out: TensorWriter) -> dict[str, Any]:
    out.put("alpha", weights.alpha)
    return {"bits": _write_codes(weights.C, out.under("C"))}


def _read_cayley(fields: Fields, tensors: TensorReader) -> CayleyWeight:
    n = fields.size("features")
    C = _read_codes((n, n), fields.take("bits", int), tensors.under("C"))
    alpha = float(tensors.take("alpha", (), torch.float64))
    if alpha <= 0:
        raise FileFormatError(f"{fields.where}: alpha is {alpha}; a Cayley transform has a positive one")
    return CayleyWeight(C, alpha)


def _filled(make: Callable[[], Module], state: Mapping[str, Tensor]) -> Module:
    """A module that takes over the tensors of ``state``, which its owner has checked."""
    with torch.device("meta"):
        module = make()
    module.load_state_dict(state, assign=True)
    return module


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


LINEAR = {
    "linear": Codec(nn.Linear, _write_linear, _read_linear),
    "quantized_linear": Codec(QuantizedLinear, _write_quantized_linear, _read_quantized_linear),
}
WEIGHTS = {
    "monotone": Codec(Monotone, _write_monotone, _read_monotone),
    "dense": Codec(Dense, _write_dense, _read_dense),
    "assembled": Codec(AssembledWeight, _write_assembled, _read_assembled),
    "structured": Codec(StructuredWeight, _write_structured, _read_structured),
    "compensated": Codec(CompensatedWeight, _write_compensated, _read_compensated),
    "cayley": Codec(CayleyWeight, _write_cayley, _read_cayley),
}
