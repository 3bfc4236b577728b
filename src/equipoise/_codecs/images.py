"""How convolutional layers are stored, and what brings images to them and away; see :mod:`.weights`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..errors import FileFormatError, InputError, OptionError, StructureError
from ..layers import NEMONConv2d
from ..operators.kernels import StructuredKernel
from ..parametrizations import ContractiveKernel
from ..parametrizations.nemon import check_gamma
from .options import read_activation, read_scheme, read_solver, write_activation, write_scheme, write_solver
from .tensors import Fields, TensorReader, TensorWriter
from .values import plain
from .weights import Codec, filled, read_codes, read_module, write_codes, write_module

__all__ = ["IMAGES"]


def _write_contractive(weights: ContractiveKernel, out: TensorWriter) -> dict[str, Any]:
    for name in ("T", "d", "gamma"):
        out.put(name, getattr(weights, name))
    return {}


def _read_contractive(fields: Fields, tensors: TensorReader) -> ContractiveKernel:
    c, k = fields.size("channels"), fields.size("kernel_size")
    T = tensors.take("T", (c, c, k, k))
    state = {"T": T, "d": tensors.take("d", (c,), T.dtype), "gamma": tensors.take("gamma", (), T.dtype)}
    module = filled(lambda: ContractiveKernel(c, k), state)
    check_gamma(float(module.gamma))
    _check_family(module, fields)
    return module


def _write_structured(weights: StructuredKernel, out: TensorWriter) -> dict[str, Any]:
    out.put("eta", weights.eta)
    out.put("gamma", weights.gamma)
    return {"bits": write_codes(weights.T, out.under("T"))}


def _read_structured(fields: Fields, tensors: TensorReader) -> StructuredKernel:
    c, k = fields.size("channels"), fields.size("kernel_size")
    codes = read_codes((c, c, k, k), fields.take("bits", int), tensors.under("T"))
    gamma = check_gamma(float(tensors.take("gamma", (), torch.float64)))
    try:
        return StructuredKernel(codes, tensors.take("eta", (c,), torch.float32), gamma)
    except InputError as error:
        raise FileFormatError(f"{fields.where}: {error}") from error


def _check_family(module: ContractiveKernel, fields: Fields) -> None:
    try:
        module.family()
    except InputError as error:
        raise FileFormatError(f"{fields.where}: {error}") from error


KERNELS = {
    "contractive_kernel": Codec(ContractiveKernel, _write_contractive, _read_contractive),
    "structured_kernel": Codec(StructuredKernel, _write_structured, _read_structured),
}


def _write_layer(layer: NEMONConv2d, out: TensorWriter) -> dict[str, Any]:
    out.put("injection.weight", layer.injection.weight)
    if layer.injection.bias is None:
        raise StructureError(f"a convolutional layer without a bias{out.where} cannot be saved")
    out.put("injection.bias", layer.injection.bias)
    return {
        "in_channels": layer.in_channels,
        "channels": layer.channels,
        "kernel_size": layer.injection.kernel_size[0],
        "stride": layer.injection.stride[0],
        "recurrent": write_module(layer.recurrent, KERNELS, out.under("recurrent")),
        "activation": write_activation(layer.activation, out.where),
        "solver": write_solver(layer.solver, out.where),
        "tol": plain(layer.tol, out.where),
        "backward_tol": plain(layer.backward_tol, out.where),
        "strict": bool(layer.strict),
        "scheme": write_scheme(layer.scheme, out.where),
    }


def _read_layer(fields: Fields, tensors: TensorReader) -> NEMONConv2d:
    d, c, k = (fields.size(name) for name in ("in_channels", "channels", "kernel_size"))
    recurrent = read_module(fields.fields("recurrent", channels=c, kernel_size=k), KERNELS, tensors.under("recurrent"))
    assert isinstance(recurrent, (ContractiveKernel, StructuredKernel))
    U = tensors.take("injection.weight", (c, d, k, k))
    b = tensors.take("injection.bias", (c,), U.dtype)
    if isinstance(recurrent, ContractiveKernel) and recurrent.T.dtype != U.dtype:
        raise FileFormatError(f"{fields.where}: kernel {recurrent.T.dtype}, injection {U.dtype}")
    try:
        with torch.device("meta"):  # all weights are replaced
            layer = NEMONConv2d(
                d,
                c,
                k,
                stride=fields.size("stride"),
                activation=read_activation(fields.fields("activation")),
                solver=read_solver(fields.fields("solver")),
                tol=fields.take("tol", float, type(None)),
                backward_tol=fields.take("backward_tol", float, type(None)),
                strict=fields.take("strict", bool),
            )
    except OptionError as error:
        raise FileFormatError(f"{fields.where}: {error}") from error
    layer.recurrent = recurrent
    layer.injection.load_state_dict({"weight": U, "bias": b}, assign=True)
    layer.scheme = read_scheme(fields.take("scheme", dict, type(None)))
    return layer


def _write_unflatten(module: nn.Unflatten, out: TensorWriter) -> dict[str, Any]:
    sizes = module.unflattened_size
    if not isinstance(module.dim, int) or not all(isinstance(size, int) for size in sizes):
        raise StructureError(f"Unflatten{out.where} with named dimensions cannot be saved")
    return {"dim": module.dim, "sizes": list(sizes)}


def _read_unflatten(fields: Fields, tensors: TensorReader) -> nn.Unflatten:
    dim, sizes = fields.take("dim", int), fields.take("sizes", list)
    if not sizes or any(type(size) is not int or not 0 < size < 2**31 for size in sizes) or math.prod(sizes) >= 2**62:
        raise FileFormatError(f"{fields.where}: sizes are {str(sizes)[:80]}; positive integers are needed")
    return nn.Unflatten(dim, tuple(sizes))


def _write_pool(module: nn.AvgPool2d, out: TensorWriter) -> dict[str, Any]:
    size = module.kernel_size
    plainly = (module.padding, module.ceil_mode, module.divisor_override) == (0, False, None)
    if not isinstance(size, int) or module.stride != size or not plainly:
        raise StructureError(f"{module}{out.where} cannot be saved; AvgPool2d(k) with one size k alone can")
    return {"kernel_size": size}


def _read_pool(fields: Fields, tensors: TensorReader) -> nn.AvgPool2d:
    return nn.AvgPool2d(fields.size("kernel_size"))


IMAGES = {
    "nemon_conv": Codec(NEMONConv2d, _write_layer, _read_layer),
    "unflatten": Codec(nn.Unflatten, _write_unflatten, _read_unflatten),
    "avg_pool2d": Codec(nn.AvgPool2d, _write_pool, _read_pool),
}
"""What a file can hold of convolutional networks, by the name it has there."""
