"""Train through the quantizer, then keep exactly the codes that were trained (theory §4–5)."""

from __future__ import annotations

import copy

from torch import nn

from .errors import StructureError
from .layers.chain import chain, equilibrium_layers, is_prepared
from .layers.linear import PreparedLinear, anchor, prepare_linear
from .operators import PreparedWeight, QuantizedWeight, prepare_weight
from .quantization.schemes import Scheme
from .quantize import check_scheme, replace_head

__all__ = ["convert", "prepare_qat"]


def prepare_qat(model: nn.Module, scheme: Scheme, learn_scale: bool = False) -> nn.Module:
    """A copy of ``model`` to train with the weights that ``scheme`` would store; ``model`` is left as it was.

    Every forward pass rounds the free weights, builds W̃ from what was rounded and solves for its equilibrium; the
    backward solve is that of the same W̃ (Theorem 5 of [LLC26]: certified forward, hence backward), and gradients
    pass straight through the rounding. Scales are fitted again in every step of training by ``scheme.scale``, or
    with ``learn_scale`` are parameters with the gradient of LSQ. The parts are those of :func:`quantize`, each at
    its own bits: ``bits`` (and ``skew_bits``), ``input_bits``, ``bias_bits``, ``head_bits``; None trains floats.
    Theory §4.

    ``model`` may be freshly made or trained. The copy trains like any module; :func:`convert` turns it into codes.

    Raises:
        OptionError: an unknown scheme.
        StructureError: a module that cannot be quantized, by name; a model quantized or prepared already;
            ``head_bits`` for a model that does not end in one linear module.
        InputError: weights that are not finite.
        NotWellPosedError: a scheme that needs a margin, on weights that have none.
    """
    check_scheme(scheme)
    result = copy.deepcopy(model)
    layers = equilibrium_layers(result)
    for name, layer in {id(layer): (name, layer) for name, layer in layers}.values():  # one may appear twice
        if isinstance(layer.recurrent, QuantizedWeight) or not isinstance(layer.injection, nn.Linear):
            raise StructureError(f"layer {name!r} is quantized already; prepare the float model it came from")
        recurrent: nn.Module = prepare_weight(layer.recurrent, scheme, learn_scale)
        layer.recurrent = recurrent.train(layer.training)
        layer.injection = prepare_linear(
            layer.injection, scheme, scheme.input_bits, scheme.bias_bits, learn_scale
        ).train(layer.training)
    replace_head(
        result,
        scheme,
        lambda head: prepare_linear(head, scheme, scheme.head_bits, None, learn_scale).train(head.training),
    )
    return result


def convert(model: nn.Module) -> nn.Module:
    """A copy of a prepared ``model`` that holds codes and scales only: bit for bit the network that was trained.

    Each of its equilibrium layers names its ``scheme``. ``model`` can go on training.

    Raises:
        StructureError: ``model`` was not made by :func:`prepare_qat`.
        NotWellPosedError: Compensated, where the diagonal's grid is too coarse for the target.
    """
    if not any(is_prepared(module) for _, module in chain(model, prepared=True)):
        raise StructureError(
            f"{type(model).__name__} is not prepared: make it with equipoise.prepare_qat(model, scheme) and train it, "
            "or use equipoise.quantize on a float model"
        )
    result = copy.deepcopy(model)
    for _, layer in equilibrium_layers(result, prepared=True):
        if isinstance(layer.recurrent, PreparedWeight):
            layer.scheme = layer.recurrent.scheme
            layer.recurrent = layer.recurrent.quantized().to(anchor(layer.injection).device)
        if isinstance(layer.injection, PreparedLinear):
            layer.injection = layer.injection.quantized()
    for name, module in chain(result, prepared=True):
        if isinstance(module, PreparedLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(result.get_submodule(parent), leaf, module.quantized())
    return result
