"""From a model to its certificate: one walk along the chain of modules, layer by layer."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import verified
from ..errors import ConvergenceWarning, InputError, NotWellPosedError, OptionError, StructureError
from ..layers.chain import chain, equilibrium_layers, final_head
from ..layers.linear import QuantizedLinear
from ..layers.mondeq import MonDEQ
from ..operators import DenseOperator
from ..quantization.schemes import scheme_to_dict
from ..solvers import ForwardBackward
from . import displacement as moved
from .convergence import closed_rates, inexact_factor, solver_rate, steps_for
from .types import Certificate, Verdict, finite_or_none
from .wellposed import fresh_operator, perturbation

__all__ = ["Certifier", "certify"]

CHUNK = 4096
"""Inputs worked on at a time."""

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
    """Prove what holds of ``model``'s stored numbers (theory §5–6).

    Args:
        model: a layer or a chain of known modules, quantized or float.
        reference: the float model it came from, of the same shape; adds what is proved about the change.
        inputs: ``(B, …)`` as the model takes them; adds bounds and class agreement per input.
        tol: the factor by which ``steps`` shrinks the distance to the equilibrium.

    Raises:
        StructureError: an unsupported module, or a reference of another shape.
        InputError: inputs of the wrong shape, NaN or infinite.
    """
    return _certify(model, reference, inputs, tol, {})


class Certifier:
    """:func:`certify` for many models of one reference on the same inputs: the reference is solved once.

    Reference and inputs are copied, so that later changes to them cannot reach what is kept.
    """

    def __init__(self, reference: nn.Module, inputs: Tensor, tol: float = 1e-6) -> None:
        self.reference, self.inputs, self.tol = copy.deepcopy(reference), inputs.detach().clone(), tol
        self._known: dict[str, Tensor] = {}

    def __call__(self, model: nn.Module) -> Certificate:
        return _certify(model, self.reference, self.inputs, self.tol, self._known)


def _certify(
    model: nn.Module, reference: nn.Module | None, inputs: Tensor | None, tol: float, known: dict[str, Tensor]
) -> Certificate:
    if not 0 < tol < 1:
        raise OptionError(f"tol is {tol!r}; it is a factor between 0 and 1")
    layers = equilibrium_layers(model)
    pairs = None if reference is None else _match(model, reference)
    proofs = {
        name: Proofs(
            fresh_operator(layer),
            None if reference is None else fresh_operator(_counterpart(reference, name)),
        )
        for name, layer in layers
    }
    parts = {name: _layer_certificate(layer, proofs[name], reference, name, tol) for name, layer in layers}
    if inputs is not None:
        _check_inputs(model, inputs)
    proved = all(part.certified for part in parts.values())
    summary = _weakest(tuple(parts.values()))
    if not proved:
        verdict: Verdict = "unknown" if inputs is None else _observe(model, inputs)
        parts = {n: part if part.certified else replace(part, verdict=verdict) for n, part in parts.items()}
        summary = replace(summary, verdict=verdict)
    elif inputs is not None and pairs is not None and _references_proved(proofs):
        assert reference is not None
        summary, parts = _with_inputs(summary, parts, model, reference, pairs, proofs, inputs, known)
    return replace(summary, layers=tuple(parts.values()) if len(parts) > 1 else ())


def _layer_certificate(
    layer: MonDEQ, proofs: Proofs, reference: nn.Module | None, name: str, tol: float
) -> Certificate:
    operator = proofs.quantized
    margin, lipschitz = operator.margin(), operator.lipschitz()
    certified = margin > 0
    alpha, rate = solver_rate(layer.solver, operator)
    scheme = layer.scheme
    found = Certificate(
        certified=certified,
        verdict="certified" if certified else "unknown",
        margin=margin,
        lipschitz=lipschitz,
        condition=finite_or_none(verified.up(lipschitz / margin)) if certified else None,
        weight_condition=finite_or_none(verified.up(operator.norm() / margin)) if certified else None,
        solver=type(layer.solver).__name__,
        alpha=alpha,
        rate=rate,
        steps=steps_for(rate, tol),
        tolerance=tol,
        inexact=inexact_factor(rate),
        closed_rates=closed_rates(margin, lipschitz),
        scheme=None if scheme is None else scheme_to_dict(scheme),
    )
    if reference is None or proofs.reference is None:
        return found
    change = perturbation(layer, operator, proofs.reference)
    float_layer = _counterpart(reference, name)
    return replace(
        found,
        delta_norm=finite_or_none(change.delta_norm),
        sufficient=change.sufficient,
        predeployment=change.predeployment,
        relative_bound=_relative(layer, float_layer, change.delta_norm, proofs.reference.margin()),
    )


def _relative(layer: MonDEQ, reference: MonDEQ, delta_norm: float, margin: float) -> float | None:
    """C3: δ/(1 − δ) with δ = ‖ΔW‖₂/m < 1, where U and b are unchanged."""
    unchanged = torch.equal(layer.input_weight, reference.input_weight) and torch.equal(layer.bias, reference.bias)
    if not unchanged or margin <= 0:
        return None
    delta = verified.up(delta_norm / margin)
    return verified.up(delta / verified.down(1 - delta)) if delta < 1 else None


def _weakest(parts: tuple[Certificate, ...]) -> Certificate:
    """The summary of several layers: each figure the weakest, None where one layer has none."""
    if len(parts) == 1:
        return parts[0]
    weakest = min(parts, key=lambda part: part.margin)
    slowest = max(parts, key=lambda part: 2.0 if part.rate is None else part.rate)

    def largest(name: str) -> float | None:
        values = [getattr(part, name) for part in parts]
        return None if any(value is None for value in values) else max(values)

    return replace(
        weakest,
        certified=all(part.certified for part in parts),
        verdict=weakest.verdict,
        lipschitz=max(part.lipschitz for part in parts),
        condition=largest("condition"),
        weight_condition=largest("weight_condition"),
        solver=slowest.solver,
        alpha=slowest.alpha,
        rate=slowest.rate,
        steps=slowest.steps,
        inexact=slowest.inexact,
        delta_norm=largest("delta_norm"),
        sufficient=None if weakest.sufficient is None else all(part.sufficient for part in parts),
        predeployment=None if weakest.predeployment is None else all(part.predeployment for part in parts),
        relative_bound=largest("relative_bound") if len(parts) == 1 else None,
    )


def _counterpart(reference: nn.Module, name: str) -> MonDEQ:
    module = reference.get_submodule(name)
    assert isinstance(module, MonDEQ)
    return module


def _match(model: nn.Module, reference: nn.Module) -> list[Pair]:
    """Modules of both models side by side; raises :class:`StructureError` where they differ."""
    ours, theirs = chain(model), chain(reference)
    if [name for name, _ in ours] != [name for name, _ in theirs]:
        raise StructureError(f"the model has {len(ours)} modules, the reference {len(theirs)}: not the same network")
    for (name, module), (_, other) in zip(ours, theirs, strict=True):
        here, there = _shape(module), _shape(other)
        if here != there:
            raise StructureError(f"module {name!r}: the model has {here}, the reference {there}")
        if isinstance(module, MonDEQ) and isinstance(other, MonDEQ) and module.activation != other.activation:
            raise StructureError(f"layer {name!r}: activation {module.activation}, in the reference {other.activation}")
    return [(module, other) for (_, module), (_, other) in zip(ours, theirs, strict=True)]


def _shape(module: nn.Module) -> str:
    if isinstance(module, MonDEQ):
        return f"an equilibrium layer {module.in_features} -> {module.features}"
    if isinstance(module, (nn.Linear, QuantizedLinear)):
        return f"a linear module {module.in_features} -> {module.out_features}"
    return type(module).__name__


def _check_inputs(model: nn.Module, inputs: Tensor) -> None:
    if not isinstance(inputs, Tensor) or inputs.ndim < 2 or not inputs.is_floating_point():
        given = f"{inputs.dtype} {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise InputError(f"inputs are {given}; a floating-point tensor (batch, …) is needed")
    bad = int((~torch.isfinite(inputs)).sum())
    if bad:
        raise InputError(f"inputs hold {bad} NaN or infinite entries; nothing is proved about those")
    if isinstance(model, MonDEQ) and inputs.ndim != 2:
        raise InputError(f"inputs are {tuple(inputs.shape)}; the layer takes (batch, {model.in_features})")


def _references_proved(proofs: dict[str, Proofs]) -> bool:
    return all(pair.reference is not None and pair.reference.margin() > 0 for pair in proofs.values())


@torch.no_grad()
def _observe(model: nn.Module, inputs: Tensor) -> Verdict:
    """Whether some solver settles on every input: an observation about these inputs, in float64.

    The layer's own solver first, then forward–backward with a short step: a poor step is not divergence.
    """
    for fallback in (False, True):
        wide = copy.deepcopy(model).cpu().double().eval()
        for _, layer in equilibrium_layers(wide):
            layer.strict = False
            if fallback:
                layer.solver = ForwardBackward(max_steps=2000)
        settled = True
        a = inputs.double().cpu()
        for _, module in chain(wide):
            if isinstance(module, MonDEQ):
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", ConvergenceWarning)
                        solution = module.solve(a, tol=1e-5, stop="residual")
                except NotWellPosedError:  # this solver's step does not exist for these weights
                    settled = False
                    break
                settled = settled and bool(solution.converged.all())
                a = solution.value.nan_to_num(0.0, 0.0, 0.0)
            else:
                a = module(a)
        if settled:
            return "converged"
    return "diverged"


def _with_inputs(
    summary: Certificate,
    parts: dict[str, Certificate],
    model: nn.Module,
    reference: nn.Module,
    pairs: list[Pair],
    proofs: dict[str, Proofs],
    inputs: Tensor,
    known: dict[str, Tensor],
) -> tuple[Certificate, dict[str, Certificate]]:
    """Bounds per input, chunk by chunk along the chain; ``known`` keeps the reference's equilibria."""
    sides = {
        name: (
            moved.Side.of(layer, proofs[name].quantized),
            moved.Side.of(_counterpart(reference, name), _required(proofs[name].reference)),
        )
        for name, layer in equilibrium_layers(model)
    }
    names = [name for name, _ in chain(model)]
    head = final_head(model)
    collected: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in sides}
    agreed: list[Tensor] = []
    for begin in range(0, max(len(inputs), 1), CHUNK):
        trace = moved.start(inputs[begin : begin + CHUNK].detach().to("cpu", torch.float64))
        for name, (module, other) in zip(names, pairs, strict=True):
            if isinstance(module, MonDEQ):
                _check_width(trace.quantized, module.in_features, name)
                trace = moved.equilibrium_trace(*sides[name], trace, known, f"{name} {begin}")
                actual = verified.row_norms(trace.quantized - trace.reference)
                collected[name].append((trace.displacement, actual, trace.error_q + trace.error_r))
            elif isinstance(module, (nn.Linear, QuantizedLinear)):
                assert isinstance(other, (nn.Linear, QuantizedLinear))
                _check_width(trace.quantized, module.in_features, name)
                if name == head:
                    agreed.append(moved.agreement(module, other, trace))
                trace = moved.linear_trace(module, other, trace)
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


def _check_width(a: Tensor, features: int, name: str) -> None:
    if a.ndim != 2 or a.shape[1] != features:
        raise InputError(f"module {name!r} takes (batch, {features}); the inputs give it {tuple(a.shape)}")
