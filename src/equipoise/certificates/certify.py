"""From a model to its certificate: one walk along the chain of modules, layer by layer."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import verified
from ..errors import InputError, OptionError, StructureError
from ..layers.arguments import check_finite
from ..layers.chain import any_layers, chain, final_head, multiscale_of
from ..layers.convolutional import ConvolutionalLayer
from ..layers.equilibrium import EquilibriumLayer
from ..layers.linear import QuantizedLinear, affine64
from ..layers.mon_conv import MonotoneConvolution
from ..layers.multiscale_deq import MultiscaleDEQ
from ..operators import DenseOperator
from . import displacement as moved
from .convergence import layer_certificate
from .convolutional import convolution_certificate
from .fingerprint import fingerprint
from .multiscale import multiscale_certificate
from .sides import SLACK, DenseSide, ImageSide, Side
from .types import Certificate, Verdict, finite_or_none, weakest
from .wellposed import fresh_operator, observe, perturbation

__all__ = ["Certifier", "certify"]

CHUNK, ENTRIES = 4096, 2**24
"""Inputs worked on at a time, and entries of their states: fewer inputs where there are more."""

Pair = tuple[nn.Module, nn.Module]


class Proofs(NamedTuple):
    """The operators of a layer and of its reference (None without one)."""

    quantized: DenseOperator
    reference: DenseOperator | None


def certify(
    model: nn.Module,
    reference: nn.Module | None = None,
    inputs: Tensor | None = None,
    tol: float = 1e-6,
) -> Certificate:
    """Prove what holds of ``model``'s stored numbers (theory §5–9).

    Args:
        model: a layer or a chain of known modules, quantized or float.
        reference: the float model it came from, of the same shape; adds what is proved about the change.
        inputs: ``(B, …)`` as the model takes them; adds bounds and class agreement per input.
        tol: the factor by which ``steps`` shrinks the distance to the equilibrium.

    Raises:
        StructureError: an unsupported module, or a reference of another shape.
        InputError: inputs of the wrong shape, NaN or infinite; a layer that is neither float32 nor float64.
    """
    return _stamped(model, reference, inputs, tol, {})


class Certifier:
    """:func:`certify` for many models of one reference on the same inputs: the reference is solved once.

    Reference and inputs are copied, so that later changes to them cannot reach what is kept.
    """

    def __init__(self, reference: nn.Module, inputs: Tensor, tol: float = 1e-6) -> None:
        self.reference, self.inputs, self.tol = copy.deepcopy(reference), inputs.detach().clone(), tol
        self._known: dict[str, Tensor] = {}

    def __call__(self, model: nn.Module) -> Certificate:
        return _stamped(model, self.reference, self.inputs, self.tol, self._known)


def _stamped(
    model: nn.Module, reference: nn.Module | None, inputs: Tensor | None, tol: float, known: dict[str, Tensor]
) -> Certificate:
    """The certificate with the name of the network it is about, which must be the same when all is proved: some
    parametrizations take another step whenever their weights are read."""
    before = fingerprint(model)
    found = _certify(model, reference, inputs, tol, known)
    if fingerprint(model) != before:
        raise StructureError(
            "the model's numbers change as they are read (a spectral_norm in training does that), so nothing is proved "
            "of them: call model.eval() first"
        )
    return replace(found, fingerprint=before)


def _certify(
    model: nn.Module, reference: nn.Module | None, inputs: Tensor | None, tol: float, known: dict[str, Tensor]
) -> Certificate:
    if not 0 < tol < 1:
        raise OptionError(f"tol is {tol!r}; it is a factor between 0 and 1")
    if (multiscale := multiscale_of(model)) is not None:
        return _multiscale(model, multiscale, reference, inputs, tol)
    everything = any_layers(model)
    for name, layer in everything:
        dtype = layer.injection.weight.dtype if isinstance(layer, ConvolutionalLayer) else layer.bias.dtype
        if dtype not in (torch.float32, torch.float64):
            raise InputError(f"layer {name!r} is {dtype}; float32 or float64 is needed: model.float()")
    for network in (model, reference):
        _check_weights(network)
    if inputs is not None:
        _check_inputs(model, inputs)
    pairs = None if reference is None else _match(model, reference)
    fed_alike = {} if pairs is None else _fed_alike(model, pairs)
    proofs = {
        name: Proofs(
            fresh_operator(layer),
            None if reference is None else fresh_operator(_counterpart(reference, name)),
        )
        for name, layer in everything
        if not isinstance(layer, ConvolutionalLayer)
    }
    parts = {
        name: convolution_certificate(layer, _kernels_counterpart(reference, name), tol)
        if isinstance(layer, ConvolutionalLayer)
        else _layer_certificate(layer, proofs[name], reference, name, tol)
        for name, layer in everything
    }
    parts = {n: part if fed_alike.get(n) else replace(part, relative_bound=None) for n, part in parts.items()}
    proved = all(part.certified for part in parts.values())
    summary = weakest(tuple(parts.values()))
    if not proved:
        verdict: Verdict = "unknown" if inputs is None else observe(model, inputs)
        parts = {n: part if part.certified else replace(part, verdict=verdict) for n, part in parts.items()}
        summary = replace(summary, verdict=verdict)
    elif inputs is not None and pairs is not None:
        assert reference is not None
        sides = _sides(model, reference, proofs)
        if all(side.operator.margin() > 0 for pair in sides.values() for side in pair):
            summary, parts = _with_inputs(summary, parts, model, sides, pairs, inputs, known)
    return replace(summary, layers=tuple(parts.values()) if len(parts) > 1 else ())


def _multiscale(
    model: nn.Module,
    found: tuple[list[nn.Module], MultiscaleDEQ],
    reference: nn.Module | None,
    inputs: Tensor | None,
    tol: float,
) -> Certificate:
    """The certificate of a multiscale network, whose image shapes modules before it may give."""
    for network in (model, reference):
        _check_weights(network)
    theirs = None if reference is None else multiscale_of(reference)
    if reference is not None and theirs is None:
        raise StructureError(f"the reference has no {type(found[1]).__name__}: not the same network")
    if inputs is not None:
        _check_tensor(inputs)
        for module in found[0]:
            try:
                inputs = moved.evaluated(module, inputs)
            except RuntimeError as error:
                raise InputError(f"module {module} does not take {tuple(inputs.shape)}") from error
    return multiscale_certificate(found[1], None if theirs is None else theirs[1], inputs, tol)


def _layer_certificate(
    layer: EquilibriumLayer, proofs: Proofs, reference: nn.Module | None, name: str, tol: float
) -> Certificate:
    operator = proofs.quantized
    found = layer_certificate(layer, operator, tol)
    if reference is None or proofs.reference is None:
        return found
    change = perturbation(layer, operator, proofs.reference)
    float_layer = _counterpart(reference, name)
    return replace(
        found,
        delta_norm=finite_or_none(change.own_norm),
        sufficient=change.sufficient,
        predeployment=change.predeployment,
        relative_bound=_relative(layer, float_layer, change.delta_norm, proofs.reference.margin())
        if operator.family.name == proofs.reference.family.name
        else None,
    )


def _relative(layer: EquilibriumLayer, reference: EquilibriumLayer, delta_norm: float, margin: float) -> float | None:
    """C3: δ/(1 − δ) with δ = ‖ΔW‖₂/m < 1, where U and b are unchanged."""
    if not _same_affine(layer.injection, reference.injection) or margin <= 0:
        return None
    delta = verified.up(delta_norm / margin)
    return verified.up(delta / verified.down(1 - delta)) if delta < 1 else None


def _same_affine(linear: nn.Module, other: nn.Module) -> bool:
    """Whether both stand for the same map exactly, as stored and as multiplied by."""
    assert isinstance(linear, (nn.Linear, QuantizedLinear))
    assert isinstance(other, (nn.Linear, QuantizedLinear))
    (U, b, *errors), (V, c, *others) = affine64(linear), affine64(other)
    return torch.equal(U, V) and torch.equal(b, c) and not any((*errors, *others))


def _fed_alike(model: nn.Module, pairs: list[Pair]) -> dict[str, bool]:
    """For each layer whether both networks surely give it the same input: nothing before it was changed."""
    found, alike = {}, True
    for (name, module), (_, other) in zip(chain(model, images=True), pairs, strict=True):
        if isinstance(module, (EquilibriumLayer, ConvolutionalLayer)):
            found[name], alike = alike, False
        elif isinstance(module, (nn.Linear, QuantizedLinear)):
            alike = alike and _same_affine(module, other)
    return found


def _counterpart(reference: nn.Module, name: str) -> EquilibriumLayer:
    module = reference.get_submodule(name)
    assert isinstance(module, EquilibriumLayer)
    return module


def _kernels_counterpart(reference: nn.Module | None, name: str) -> ConvolutionalLayer | None:
    module = None if reference is None else reference.get_submodule(name)
    assert module is None or isinstance(module, ConvolutionalLayer)
    return module


def _match(model: nn.Module, reference: nn.Module) -> list[Pair]:
    """Modules of both models side by side; raises :class:`StructureError` where they differ."""
    ours, theirs = chain(model, images=True), chain(reference, images=True)
    names, others = [name for name, _ in ours], [name for name, _ in theirs]
    if names != others:
        raise StructureError(f"the model has the modules {names}, the reference {others}: not the same network")
    for (name, module), (_, other) in zip(ours, theirs, strict=True):
        here, there = _shape(module), _shape(other)
        if here != there:
            raise StructureError(f"module {name!r}: the model has {here}, the reference {there}")
        kinds = EquilibriumLayer, ConvolutionalLayer
        if isinstance(module, kinds) and isinstance(other, kinds) and module.activation != other.activation:
            raise StructureError(f"layer {name!r}: activation {module.activation}, in the reference {other.activation}")
    return [(module, other) for (_, module), (_, other) in zip(ours, theirs, strict=True)]


def _shape(module: nn.Module) -> str:
    if isinstance(module, EquilibriumLayer):
        return f"an equilibrium layer {module.in_features} -> {module.features}"
    if isinstance(module, ConvolutionalLayer):
        stride, size = module.injection.stride[0], module.injection.kernel_size[0]
        of = f" on {module.geometry}" if isinstance(module, MonotoneConvolution) else f" -> {module.channels}"
        kind = type(module).__name__
        return f"a convolutional layer {kind} of {module.in_channels} channels{of}, {size}×{size}, stride {stride}"
    if isinstance(module, nn.Unflatten):
        return f"Unflatten({module.dim}, {module.unflattened_size})"
    if isinstance(module, (nn.Linear, QuantizedLinear)):
        return f"a linear module {module.in_features} -> {module.out_features}"
    idle = ("p", "inplace") if isinstance(module, nn.Dropout) else ("inplace",)  # what evaluation does not use
    settings = [name for name in getattr(module, "__constants__", ()) if name not in idle]
    return f"{type(module).__name__}({', '.join(f'{name}={getattr(module, name)}' for name in settings)})"


def _check_weights(network: nn.Module | None) -> None:
    """Refuse NaN and infinities anywhere: a margin of W says nothing about answers that are none."""
    tensors = [] if network is None else [*network.named_parameters(), *network.named_buffers()]
    for name, tensor in tensors:
        check_finite(tensor, name)


def _check_tensor(inputs: Tensor) -> None:
    if not isinstance(inputs, Tensor) or inputs.ndim < 2 or not inputs.is_floating_point():
        given = f"{inputs.dtype} {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise InputError(f"inputs are {given}; a floating-point tensor (batch, …) is needed")
    bad = 0 if math.isfinite(float(inputs.sum())) else int((~torch.isfinite(inputs)).sum())
    if bad:
        raise InputError(f"inputs hold {bad} NaN or infinite entries; nothing is proved about those")


def _check_inputs(model: nn.Module, inputs: Tensor) -> None:
    _check_tensor(inputs)
    probe = torch.zeros(2, *inputs.shape[1:], dtype=torch.float64, device="cpu")
    for name, module in _seen_per_input(model):
        shape = (len(inputs), *probe.shape[1:])
        if isinstance(module, (EquilibriumLayer, nn.Linear, QuantizedLinear)):
            if probe.ndim != 2 or probe.shape[1] != module.in_features:
                raise InputError(f"module {name!r} takes (batch, {module.in_features}); the inputs give it {shape}")
            probe = probe.new_zeros(2, module.features if isinstance(module, EquilibriumLayer) else module.out_features)
        elif isinstance(module, MonotoneConvolution):
            if probe.ndim != 4 or probe.shape[1] != module.in_channels:
                raise InputError(f"module {name!r} takes (batch, {module.in_channels}, height, width), not {shape}")
            module._check_image(probe)
            states = sum(map(module.geometry.features, range(module.geometry.tiers)))
            probe = module._leave(probe.new_zeros(states, 2).mT, (0, 0))
        else:
            try:
                probe = moved.evaluated(module, probe)
            except RuntimeError as error:
                raise InputError(f"module {name!r}, {module}, does not take {shape}") from error
            if probe.ndim < 2 or len(probe) != 2:
                raise InputError(f"module {name!r} does not keep the samples of inputs {tuple(inputs.shape)} apart")


def _seen_per_input(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of ``model``, where per input something is proved of all: not of convolutional NEMON layers, nor of
    means that overlap."""
    found = chain(model, images=all(isinstance(layer, MonotoneConvolution) for layer in _on_images(model)))
    for name, module in found:
        if isinstance(module, nn.AvgPool2d) and not moved.is_plain(module):
            raise StructureError(f"{module} at {name!r}: per input, only AvgPool2d(k) with one size k alone is bounded")
    return found


def _on_images(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, ConvolutionalLayer)]


def _sides(model: nn.Module, reference: nn.Module, proofs: dict[str, Proofs]) -> dict[str, tuple[Side, Side]]:
    """Every layer of both networks in float64."""
    found: dict[str, tuple[Side, Side]] = {}
    for name, layer in any_layers(model):
        if isinstance(layer, EquilibriumLayer):
            pair = (layer, proofs[name].quantized), (_counterpart(reference, name), _required(proofs[name].reference))
            found[name] = DenseSide.of(*pair[0]), DenseSide.of(*pair[1])
        else:
            other = _kernels_counterpart(reference, name)
            assert isinstance(layer, MonotoneConvolution)
            assert isinstance(other, MonotoneConvolution)
            found[name] = ImageSide.of(layer), ImageSide.of(other)
    return found


def _with_inputs(
    summary: Certificate,
    parts: dict[str, Certificate],
    model: nn.Module,
    sides: dict[str, tuple[Side, Side]],
    pairs: list[Pair],
    inputs: Tensor,
    known: dict[str, Tensor],
) -> tuple[Certificate, dict[str, Certificate]]:
    """Bounds per input, chunk by chunk along the chain; ``known`` keeps the reference's equilibria."""
    names = [name for name, _ in chain(model, images=True)]
    head = final_head(model, images=True)
    collected: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in sides}
    agreed: list[Tensor] = []
    chunk = max(64, min(CHUNK, ENTRIES // max(side.operator.features for pair in sides.values() for side in pair)))
    for begin in range(0, max(len(inputs), 1), chunk):
        trace = moved.start(inputs[begin : begin + chunk].detach().to("cpu", torch.float64))
        for name, (module, other) in zip(names, pairs, strict=True):
            if isinstance(module, (EquilibriumLayer, ConvolutionalLayer)):
                trace = moved.equilibrium_trace(*sides[name], trace, known, f"{name} {begin}")
                actual = verified.row_norms((trace.quantized - trace.reference).flatten(1))
                error = (trace.error_q + trace.error_r) * SLACK + actual * 1e-12
                collected[name].append((trace.displacement, actual, error))
            elif isinstance(module, (nn.Linear, QuantizedLinear)):
                assert isinstance(other, (nn.Linear, QuantizedLinear))
                if name == head:
                    agreed.append(moved.agreement(module, other, trace))
                trace = moved.linear_trace(module, other, trace)
            elif isinstance(module, nn.AvgPool2d):
                trace = moved.pool_trace(module, trace)
            else:
                trace = moved.lipschitz_one_trace(module, trace)
    results = {name: tuple(torch.cat(column) for column in zip(*rows, strict=True)) for name, rows in collected.items()}
    parts = {name: _attach(part, results[name]) for name, part in parts.items()}
    summary = _attach(summary, results[list(results)[-1]])
    if head is not None:
        same = torch.cat(agreed)
        share = float(same.double().mean()) if len(same) else None
        summary = replace(summary, agreement=share, unproved=(~same).nonzero()[:, 0])
    return summary, parts


def _attach(part: Certificate, columns: tuple[Tensor, ...]) -> Certificate:
    bound, actual, error = columns
    return replace(part, displacement=bound, actual_displacement=actual, actual_error=error)


def _required(operator: DenseOperator | None) -> DenseOperator:
    assert operator is not None
    return operator
