"""How convolutional monDEQs are stored: layers, float kernels, and kernels as codes; see :mod:`.weights`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import FileFormatError, InputError
from ..layers import MonConv2d, MultiTierMonDEQ
from ..layers.mon_conv import MonotoneConvolution
from ..operators.quantized_tiers import AssembledTiers, CompensatedTiers, QuantizedSkewKernel, StructuredTiers
from ..parametrizations import MonotoneKernels
from ..parametrizations.monotone import check_margin
from .images import read_layer, write_injection
from .options import read_options, write_options
from .tensors import Fields, TensorReader, TensorWriter
from .weights import Codec, filled, read_codes, read_module, write_codes, write_module

__all__ = ["TIERS"]

LARGEST = 8192
"""Pixels a side: a torus is a table of its frequencies, and a file may claim anything."""


def _tiers(fields: Fields) -> tuple[tuple[int, ...], int]:
    """(channels, kernel size), given by the layer."""
    return tuple(fields.take("channels", list)), fields.size("kernel_size")


def _write_monotone(weights: MonotoneKernels, out: TensorWriter) -> dict[str, Any]:
    for name, tensor in weights.state_dict().items():
        out.put(name, tensor)
    return {"learn_margin": "raw_margin" in weights._parameters}


def _read_monotone(fields: Fields, tensors: TensorReader) -> MonotoneKernels:
    channels, k = _tiers(fields)
    learned = fields.take("learn_margin", bool)

    def make() -> MonotoneKernels:
        return MonotoneKernels(channels, k, learn_margin=learned)

    try:
        with torch.device("meta"):
            shapes = {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}
    except RuntimeError as error:  # more entries than can be counted
        raise FileFormatError(f"{fields.where}: channels {channels}, kernel size {k}: {error}") from error
    first = tensors.take("A.0", shapes.pop("A.0"))
    state = {"A.0": first, **{name: tensors.take(name, shape, first.dtype) for name, shape in shapes.items()}}
    module = filled(make, state)
    check_margin(float(module.current_margin().detach()))
    return module


def _write_structured(weights: StructuredTiers, out: TensorWriter) -> dict[str, Any]:
    out.put("margin", weights.margin)

    def write(codes: nn.ModuleList, name: str) -> list[int]:
        parts: list[Any] = list(codes)
        return [write_codes(part, out.under(name.format(i))) for i, part in enumerate(parts)]

    skew = nn.ModuleList(K.taps for K in weights.K)  # type: ignore[misc]
    bits = write(weights.A, "A.{}"), write(weights.down, "down.{}"), write(skew, "K.{}.taps")
    return {"bits": bits[0], "down_bits": bits[1], "skew_bits": bits[2]}


def _read_structured(fields: Fields, tensors: TensorReader) -> StructuredTiers:
    channels, k = _tiers(fields)
    pairs = list(zip(channels[1:], channels, strict=False))

    def read(name: str, shapes: list[tuple[int, ...]], key: str, inner: str = "") -> list[Any]:
        bits = fields.take(key, list)
        if len(bits) != len(shapes) or any(type(b) is not int for b in bits):
            raise FileFormatError(f"{fields.where}: {key} are {str(bits)[:60]}; {len(shapes)} integers are needed")
        return [
            read_codes(shape, b, tensors.under(f"{name}.{i}{inner}"))
            for i, (shape, b) in enumerate(zip(shapes, bits, strict=True))
        ]

    A = read("A", [(c, c, k, k) for c in channels], "bits")
    down = read("down", [(c, d, k, k) for c, d in pairs], "down_bits")
    taps = read("K", [(((c * k) ** 2 - c) // 2,) for c in channels], "skew_bits", ".taps")
    margin = check_margin(float(tensors.take("margin", (), torch.float64)))
    try:
        K = [QuantizedSkewKernel(t, c, k) for t, c in zip(taps, channels, strict=True)]
    except InputError as error:
        raise FileFormatError(f"{fields.where}: {error}") from error
    return StructuredTiers(A, K, down, margin)


def _one_tier(fields: Fields) -> tuple[int, int]:
    """(C, the size of W's kernel)."""
    channels, k = _tiers(fields)
    if len(channels) != 1:
        raise FileFormatError(f"{fields.where}: it is of one tier, not of {len(channels)}")
    return channels[0], 2 * k - 1


def _write_assembled(weights: AssembledTiers, out: TensorWriter) -> dict[str, Any]:
    return {"bits": write_codes(weights.codes, out.under("codes"))}


def _read_assembled(fields: Fields, tensors: TensorReader) -> AssembledTiers:
    c, size = _one_tier(fields)
    return AssembledTiers(read_codes((c, c, size, size), fields.take("bits", int), tensors.under("codes")))


def _write_compensated(weights: CompensatedTiers, out: TensorWriter) -> dict[str, Any]:
    return {
        "bits": write_codes(weights.off, out.under("off")),
        "diagonal_bits": write_codes(weights.diagonal, out.under("diagonal")),
    }


def _read_compensated(fields: Fields, tensors: TensorReader) -> CompensatedTiers:
    c, size = _one_tier(fields)
    off = read_codes((c, c * size**2 - 1), fields.take("bits", int), tensors.under("off"))
    return CompensatedTiers(off, read_codes((c,), fields.take("diagonal_bits", int), tensors.under("diagonal")))


KERNELS = {
    "monotone_kernels": Codec(MonotoneKernels, _write_monotone, _read_monotone),
    "structured_tiers": Codec(StructuredTiers, _write_structured, _read_structured),
    "assembled_tiers": Codec(AssembledTiers, _write_assembled, _read_assembled),
    "compensated_tiers": Codec(CompensatedTiers, _write_compensated, _read_compensated),
}


def _write_layer(layer: MonotoneConvolution[Any], out: TensorWriter) -> dict[str, Any]:
    injection, geometry = layer.injection, layer.geometry
    write_injection(layer, out)
    return {
        "in_channels": layer.in_channels,
        "channels": list(geometry.channels),
        "image_size": list(layer.image_size),
        "kernel_size": injection.kernel_size[0],
        "border": geometry.border,
        "stride": injection.stride[0],
        "recurrent": write_module(layer.recurrent, KERNELS, out.under("recurrent")),
        **write_options(layer, out.where),
    }


def _reader(kind: type[MonotoneConvolution[Any]]) -> Callable[[Fields, TensorReader], nn.Module]:
    def read(fields: Fields, tensors: TensorReader) -> MonotoneConvolution[Any]:
        d, k = fields.size("in_channels"), fields.size("kernel_size")
        channels, image = (
            _integers(fields, name, high) for name, high in (("channels", 2**20), ("image_size", LARGEST))
        )
        if len(image) != 2 or (kind is MonConv2d and len(channels) != 1):
            raise FileFormatError(f"{fields.where}: channels {channels} on images {image} make no {kind.__name__}")
        weights = fields.fields("recurrent", channels=list(channels), kernel_size=k)
        recurrent = read_module(weights, KERNELS, tensors.under("recurrent"))
        border, stride = fields.size("border", 0), fields.size("stride")
        if border > LARGEST:
            raise FileFormatError(f"{fields.where}: a border of {border} pixels")
        sizes: Any = channels[0] if kind is MonConv2d else channels

        def make() -> MonotoneConvolution[Any]:
            return kind(d, sizes, image, k, border=border, stride=stride, **read_options(fields))

        return read_layer(make, recurrent, (channels[0], d, k, k), fields, tensors)

    return read


def _integers(fields: Fields, name: str, largest: int) -> tuple[int, ...]:
    values = fields.take(name, list)
    if not 0 < len(values) <= 64 or any(type(v) is not int or not 0 < v <= largest for v in values):
        raise FileFormatError(f"{fields.where}: {name} are {str(values)[:60]}; integers from 1 to {largest} are needed")
    return tuple(values)


TIERS = {
    "mon_conv": Codec(MonConv2d, _write_layer, _reader(MonConv2d)),
    "multi_tier": Codec(MultiTierMonDEQ, _write_layer, _reader(MultiTierMonDEQ)),
}
"""What a file can hold of convolutional monDEQs, by the name it has there."""
