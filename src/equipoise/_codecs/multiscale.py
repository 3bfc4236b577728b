"""How multiscale networks are stored: the options they are built from, and every tensor of their state; see
:mod:`.weights`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EquipoiseError, FileFormatError
from ..layers import MDEQ, LipschitzMDEQ, QuantizedLinear
from ..layers.blocks import CappedConv2d, CodedKernel
from ..layers.multiscale_deq import MultiscaleDEQ
from .options import read_scheme, read_solver, write_scheme, write_solver
from .tensors import Fields, TensorReader, TensorWriter
from .values import plain
from .weights import LINEAR, Codec, read_codes, read_module, write_codes, write_module

__all__ = ["MULTISCALE"]

SIZES = (
    "in_channels",
    "classes",
    "expansion",
    "groups",
    "post_groups",
    "stem_stride",
    "head_channels",
    "phantom_steps",
)
NUMBERS = ("dropout", "phantom_damping", "tol")
OF_CAPS = ("slope", "residual", "fusion", "norm_cap", "affine_cap")
LARGEST = 2**16
"""No image side or channel count comes near it."""


def _write(model: MultiscaleDEQ, out: TensorWriter) -> dict[str, Any]:
    plan, linear = model.plan, model.linear
    bits = {}
    for name, conv in model.map.convs.items():
        if isinstance(conv, CappedConv2d) and isinstance(conv.kernel, CodedKernel):
            bits[name] = write_codes(conv.kernel.values, out.under(f"map.convs.{name}.kernel.values"))
    head = write_module(linear, LINEAR, out.under("head.linear"))
    for name, tensor in model.state_dict().items():
        if name not in out.tensors and not _elsewhere(name, bits):
            out.put(name, tensor)
    of_map = {name: getattr(plan, name) for name in ("expansion", "groups", "post_groups")}
    own = {name: getattr(model, name) for name in (*SIZES, *NUMBERS) if name not in (*of_map, "head_channels")}
    caps = {name: float(getattr(plan, name)) for name in OF_CAPS} if isinstance(model, LipschitzMDEQ) else {}
    return {
        **of_map,
        **own,
        **caps,
        **({"activation": plan.activation} if isinstance(model, LipschitzMDEQ) else {}),
        "head_channels": model.linear.in_features,
        "size": list(model.size),
        "channels": [shape[0] for shape in plan.shapes],
        "gradient": model.gradient,
        "backward_tol": plain(model.backward_tol, out.where),
        "strict": bool(model.strict),
        "solver": write_solver(model.solver, out.where),
        "scheme": write_scheme(model.scheme, out.where),
        "linear": head,
        "bits": bits,
    }


def _elsewhere(name: str, bits: dict[str, int]) -> bool:
    return name.startswith("head.linear.") or any(name.startswith(f"map.convs.{conv}.kernel.values.") for conv in bits)


def _reader(kind: Callable[..., MultiscaleDEQ], capped: bool) -> Callable[[Fields, TensorReader], nn.Module]:
    def read(fields: Fields, tensors: TensorReader) -> nn.Module:
        options: dict[str, Any] = {name: fields.size(name) for name in SIZES}
        options |= {name: fields.take(name, float) for name in (*NUMBERS, *(OF_CAPS if capped else ()))}
        if capped:
            options["activation"] = fields.take("activation", str)
        for name in ("size", "channels"):
            values = fields.take(name, list)
            if not 0 < len(values) <= 16 or any(type(v) is not int or not 0 < v <= LARGEST for v in values):
                raise FileFormatError(f"{fields.where}: {name} is {str(values)[:80]}; positive integers are needed")
            options[name] = tuple(values)
        if any(options[name] > LARGEST for name in SIZES):
            raise FileFormatError(f"{fields.where}: a size is above {LARGEST}")
        options["backward_tol"] = fields.take("backward_tol", float, type(None))
        options["gradient"], options["strict"] = fields.take("gradient", str), fields.take("strict", bool)
        options["solver"] = read_solver(fields.fields("solver"))
        scheme = read_scheme(fields)
        linear = read_module(fields.fields("linear"), LINEAR, tensors.under("head.linear"))
        bits = fields.take("bits", dict)
        try:
            with torch.device("meta"):  # all tensors are replaced
                model = kind(**options)
        except (EquipoiseError, RuntimeError, OverflowError) as error:
            raise FileFormatError(f"{fields.where}: {error}") from error
        _fill(model, bits, linear, fields.where, tensors)
        model.scheme = scheme
        return model

    return read


def _fill(model: MultiscaleDEQ, bits: dict[str, Any], linear: nn.Module, where: str, tensors: TensorReader) -> None:
    """Put what the file holds in the place of the tensors of ``model``, all of one dtype but codes and scales."""
    assert isinstance(linear, (nn.Linear, QuantizedLinear))
    if (linear.in_features, linear.out_features) != (model.linear.in_features, model.classes):
        raise FileFormatError(f"{where}: the head is {linear.in_features} -> {linear.out_features}")
    model.head["linear"] = linear
    state: dict[str, Tensor] = {}
    dtype: torch.dtype | None = None
    for name, tensor in model.state_dict().items():
        conv = name.split(".")[2] if name.startswith("map.convs.") else ""
        if conv not in bits and not name.startswith("head.linear."):
            state[name] = tensors.take(name, tuple(tensor.shape), dtype)
            dtype = state[name].dtype
    for name, count in bits.items():
        place = model.map.convs._modules.get(name)
        if not isinstance(place, CappedConv2d) or type(count) is not int:
            raise FileFormatError(f"{where}: there is no kernel {name[:40]!r} to be coded")
        assert dtype is not None
        assert not isinstance(place.kernel, CodedKernel)
        shape = tuple(place.kernel.weight.shape)
        values = read_codes(shape, count, tensors.under(f"map.convs.{name}.kernel.values"))
        place.kernel = CodedKernel(values, dtype)
    model.load_state_dict(state, strict=False, assign=True)


MULTISCALE = {
    "lipschitz_mdeq": Codec(LipschitzMDEQ, _write, _reader(LipschitzMDEQ, True)),
    "mdeq": Codec(MDEQ, _write, _reader(MDEQ, False)),
}
"""What a file can hold of multiscale networks, by the name it has there."""
