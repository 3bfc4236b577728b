"""Swap the weights of a model for codes (theory §4): data goes one way, from floats to codes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, OptionError, StructureError
from .layers import NEMONConv2d
from .layers.blocks import CappedConv2d
from .layers.chain import any_layers, chain, final_head, multiscale_of
from .layers.linear import QuantizedLinear, quantize_linear
from .layers.mon_conv import MonotoneConvolution
from .layers.multiscale_deq import MultiscaleDEQ
from .operators import QuantizedWeight, quantize_weight
from .operators.contractive import UnfitSchemeError
from .operators.kernels import StructuredKernel
from .operators.quantized_tiers import QuantizedTiers
from .operators.recipes import quantize_tiers
from .parametrizations import ContractiveKernel, MonotoneKernels
from .parametrizations.lipschitz import CappedKernel
from .quantization.codes import QuantizedSkew, QuantizedTensor
from .quantization.schemes import Assembled, Scheme, Structured

__all__ = ["check_scheme", "quantize", "replace_head", "size"]


def quantize(model: nn.Module, scheme: Scheme) -> nn.Module:
    """A copy of ``model`` whose equilibrium layers hold codes and scales only; ``model`` is left as it was.

    ``scheme.bits`` acts on the recurrent weights; ``input_bits`` and ``bias_bits`` on U and b, ``head_bits`` on the
    linear module that ends the model; None keeps floats. Each quantized layer names its ``scheme``. Theory §4.

    Raises:
        OptionError: an unknown scheme.
        StructureError: a module that cannot be quantized, by name; a model quantized already; ``head_bits`` for a
            model that does not end in one linear module.
        NotWellPosedError: a scheme that needs a margin, on weights that have none.
    """
    check_scheme(scheme)
    result = copy.deepcopy(model)
    if (multiscale := multiscale_of(result)) is not None:
        _quantize_multiscale(multiscale[1], scheme)
        return result
    layers = any_layers(result)
    for name, layer in {id(layer): (name, layer) for name, layer in layers}.values():  # one may appear twice
        coded = isinstance(layer.recurrent, (QuantizedWeight, StructuredKernel, QuantizedTiers))
        if coded or isinstance(layer.injection, QuantizedLinear):
            raise StructureError(f"layer {name!r} is quantized already; quantize the float model it came from")
        if isinstance(layer, (NEMONConv2d, MonotoneConvolution)):
            _quantize_kernels(layer, scheme)
            continue
        assert isinstance(layer.injection, nn.Linear)
        layer.recurrent = quantize_weight(layer.recurrent, scheme).to(layer.injection.weight.device)
        layer.injection = quantize_linear(layer.injection, scheme, scheme.input_bits, scheme.bias_bits)
        layer.scheme = scheme
    replace_head(result, scheme, lambda head: quantize_linear(head, scheme, scheme.head_bits, None))
    return result


def _quantize_kernels(layer: NEMONConv2d | MonotoneConvolution[Any], scheme: Scheme) -> None:
    """Codes for the recurrent kernels; U and b stay floats."""
    weights, like = layer.recurrent, layer.injection.weight.detach()
    if isinstance(layer, MonotoneConvolution):
        assert isinstance(weights, MonotoneKernels)
        layer.recurrent = quantize_tiers(weights, scheme, layer.geometry, like).to(like.device)
    else:
        assert isinstance(weights, ContractiveKernel)
        if not all(bool(torch.isfinite(p).all()) for p in weights.parameters()):
            raise InputError("the kernel holds NaN or infinite entries; nothing can be quantized or proved")
        with torch.no_grad():
            layer.recurrent = StructuredKernel.quantize(weights, scheme).to(like.device)
    layer.scheme = scheme
    layer.forget_tuning()


def _quantize_multiscale(model: MultiscaleDEQ, scheme: Scheme) -> None:
    """Codes for every kernel of the map, and for the last linear module of the head; stem and the rest stay floats."""
    kernels = [conv for conv in model.map.convs.values() if isinstance(conv, CappedConv2d)]
    if not kernels:
        raise StructureError(
            f"a {type(model).__name__} has no guarantee that codes could keep; quantize a LipschitzMDEQ"
        )
    if model.scheme is not None:
        raise StructureError("the model is quantized already; quantize the float model it came from")
    if not isinstance(scheme, (Structured, Assembled)):
        raise UnfitSchemeError(
            f"{type(scheme).__name__} does not act on kernels: Structured keeps their caps, Assembled only rounds them"
        )
    for name in ("skew_bits", "input_bits", "bias_bits"):
        if getattr(scheme, name, None) is not None:
            raise OptionError(f"{name}={getattr(scheme, name)}: a multiscale network has no such part; leave it out")
    for tensor in model.parameters():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError("the model holds NaN or infinite weights; nothing can be quantized or proved")
    for conv in kernels:
        conv.quantize(scheme)
    if scheme.head_bits is not None:
        assert isinstance(model.linear, nn.Linear)
        model.head["linear"] = quantize_linear(model.linear, scheme, scheme.head_bits, None)
    model.scheme = scheme


def check_scheme(scheme: Scheme) -> None:
    """Raise :class:`OptionError` unless it is one."""
    if not isinstance(scheme, Scheme):
        raise OptionError(f"scheme is {scheme!r}; give one such as equipoise.Structured(bits=2)")


def replace_head(model: nn.Module, scheme: Scheme, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put ``make(head)`` in the place of the linear module that ends ``model``, where ``scheme`` has bits for it."""
    if scheme.head_bits is None:
        return
    head = final_head(model, prepared=True, images=True)
    if head is None:
        raise StructureError(
            f"head_bits is {scheme.head_bits}, but no single linear module follows the last equilibrium layer and ends "
            "the model; leave head_bits out"
        )
    parent, _, leaf = head.rpartition(".")
    module = model.get_submodule(head)
    if not isinstance(module, nn.Linear):
        raise StructureError(f"the head {head!r} is quantized already; quantize the float model it came from")
    setattr(model.get_submodule(parent), leaf, make(module))


def size(model: nn.Module) -> int:
    """Bytes of ``model`` when packed: codes at their bits, scales and float parts at their own width.

    A module that appears twice in a chain counts once.
    """
    multiscale = multiscale_of(model)
    if multiscale is not None:
        return _packed(multiscale[1])
    return sum(_packed(module) for module in {id(module): module for _, module in chain(model, images=True)}.values())


def _packed(module: nn.Module) -> int:
    if isinstance(module, (QuantizedWeight, StructuredKernel, QuantizedTensor, QuantizedSkew)):
        return module.packed_bytes
    if isinstance(module, CappedKernel):  # the power iteration's vector is training's
        return module.weight.numel() * module.weight.element_size()
    own: list[Tensor] = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return sum(t.numel() * t.element_size() for t in own) + sum(_packed(child) for child in module.children())
