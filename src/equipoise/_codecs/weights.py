"""How weights are stored: linear modules and recurrent weights, as floats or as packed codes.

``write`` puts a module's tensors away under their state keys and returns its fields; ``read`` is its inverse and
trusts nothing: sizes are compared with what the file holds before anything is allocated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..errors import EquipoiseError, FileFormatError, StructureError
from ..layers import PreparedLinear, QuantizedLinear
from ..operators import RECIPES, PreparedWeight, QuantizedWeight, schemes
from ..parametrizations import Dense, Monotone
from ..parametrizations.monotone import check_margin
from ..quantization import QuantizedSkew, QuantizedTensor, pack, unpack
from .tensors import FLOATS, Fields, TensorReader, TensorWriter

__all__ = [
    "LINEAR",
    "Codec",
    "coded",
    "filled",
    "monotone_weights",
    "read_codes",
    "read_module",
    "write_codes",
    "write_module",
]

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
    return filled(lambda: nn.Linear(d, n, bias="bias" in state), state)


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
        return write_codes(value, out.under(name))
    out.put(name, value)
    return None


def _read_either(
    name: str, shape: tuple[int, ...], bits: int | None, dtype: torch.dtype, tensors: TensorReader
) -> QuantizedTensor | Tensor:
    return tensors.take(name, shape, dtype) if bits is None else read_codes(shape, bits, tensors.under(name))


# Codes


def write_codes(quantized: QuantizedTensor, out: TensorWriter) -> int:
    out.put("codes", pack(quantized.codes, quantized.bits))
    out.put("scale", quantized.scale)
    return quantized.bits


def read_codes(shape: tuple[int, ...], bits: int, tensors: TensorReader) -> QuantizedTensor:
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
    module = filled(lambda: Monotone(n, rank, learn_margin=learned), state)
    check_margin(float(module.current_margin().detach()))
    return module


def _write_dense(weights: Dense, out: TensorWriter) -> dict[str, Any]:
    out.put("weight", weights.weight)
    return {}


def _read_dense(fields: Fields, tensors: TensorReader) -> Dense:
    n = fields.size("features")
    return Dense(tensors.take("weight", (n, n)))


def coded(kind: type[QuantizedWeight]) -> Codec:
    """Weights that are stored as the arguments of their constructor, each kept as an attribute of the same name: codes,
    codes of a skew part, tensors and numbers, as its annotations say."""

    def arguments() -> dict[str, Any]:
        found = {name: a.annotation for name, a in inspect.signature(kind, eval_str=True).parameters.items()}
        if unknown := [f"{name}: {what}" for name, what in found.items() if what not in PARTS]:
            known = ", ".join(part.__name__ for part in PARTS)
            raise StructureError(f"{kind.__name__} is made of {', '.join(unknown)}; files hold {known}")
        return {name: PARTS[what] for name, what in found.items()}

    def write(weights: QuantizedWeight, out: TensorWriter) -> dict[str, Any]:
        return {name: put(getattr(weights, name), name, out) for name, (put, _) in arguments().items()}

    def read(fields: Fields, tensors: TensorReader) -> QuantizedWeight:
        n = fields.size("features")
        parts = {name: take(fields.fields(name), name, tensors) for name, (_, take) in arguments().items()}
        try:
            weights = kind(**parts)
        except EquipoiseError as error:
            raise FileFormatError(f"{fields.where}: {error}") from error
        if weights.features != n:
            raise FileFormatError(f"{fields.where}: codes of {weights.features} features where {n} are needed")
        return weights

    return Codec(kind, write, read)


def _write_part(codes: QuantizedTensor, name: str, out: TensorWriter) -> dict[str, Any]:
    return {"bits": write_codes(codes, out.under(name)), "shape": list(codes.shape)}


def _read_part(fields: Fields, name: str, tensors: TensorReader) -> QuantizedTensor:
    shape, bits = _shape(fields), fields.take("bits", int)
    fields.close()
    return read_codes(shape, bits, tensors.under(name))


def _write_skew(codes: QuantizedSkew, name: str, out: TensorWriter) -> dict[str, Any]:
    return {"bits": write_codes(codes.upper, out.under(f"{name}.upper")), "features": codes.shape[0]}


def _read_skew(fields: Fields, name: str, tensors: TensorReader) -> QuantizedSkew:
    n, bits = fields.size("features"), fields.take("bits", int)
    fields.close()
    upper = read_codes((n * (n - 1) // 2,), bits, tensors.under(f"{name}.upper"))
    return QuantizedSkew(upper, n)


def _write_tensor(tensor: Tensor, name: str, out: TensorWriter) -> dict[str, Any]:
    out.put(name, tensor)
    return {"shape": list(tensor.shape)}


def _read_tensor(fields: Fields, name: str, tensors: TensorReader) -> Tensor:
    shape = _shape(fields)
    fields.close()
    return tensors.take(name, shape)


def _write_number(value: Tensor, name: str, out: TensorWriter) -> dict[str, Any]:
    out.put(name, value)
    return {}


def _read_number(fields: Fields, name: str, tensors: TensorReader) -> float:
    fields.close()
    return float(tensors.take(name, (), torch.float64))


def _shape(fields: Fields) -> tuple[int, ...]:
    sizes = fields.take("shape", list)
    if not 1 <= len(sizes) <= 4:
        raise FileFormatError(f"{fields.where}: shape has {len(sizes)} sizes; 1 to 4 are needed")
    return tuple(Fields({"size": size}, f"{fields.where}: shape").size("size", 0) for size in sizes)


PARTS: dict[Any, tuple[Callable[..., dict[str, Any]], Callable[[Fields, str, TensorReader], Any]]] = {
    QuantizedTensor: (_write_part, _read_part),
    QuantizedSkew: (_write_skew, _read_skew),
    Tensor: (_write_tensor, _read_tensor),
    float: (_write_number, _read_number),
}
"""What weights made of codes may consist of: how each is written and read."""


def filled(make: Callable[[], Module], state: Mapping[str, Tensor]) -> Module:
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
MONOTONE = {
    "monotone": Codec(Monotone, _write_monotone, _read_monotone),
    "dense": Codec(Dense, _write_dense, _read_dense),
}


def monotone_weights() -> dict[str, Codec]:
    """What a MonDEQ's recurrent weights may be: free tensors, or codes by any of the schemes."""
    return MONOTONE | {name: coded(RECIPES[scheme].weights) for name, scheme in schemes().items()}
