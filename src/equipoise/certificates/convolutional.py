"""The certificate of a convolutional layer: of NEMON its row sums, which hold on images of any size (theory §7), of a
monDEQ its symbols, on the torus that it was made for (theory §8)."""

from __future__ import annotations

from typing import Any

from .. import verified
from ..layers.convolutional import ConvolutionalLayer
from ..operators.conv import ConvOperator
from ..quantization.schemes import scheme_to_dict
from .convergence import closed_rates, inexact_factor, kernel_rate, steps_for, tier_rate
from .types import Certificate, finite_or_none
from .wellposed import fresh_kernel

__all__ = ["convolution_certificate"]


def convolution_certificate(layer: ConvolutionalLayer, reference: ConvolutionalLayer | None, tol: float) -> Certificate:
    """What is proved of ``layer``, and of its distance to ``reference`` where there is one.

    All figures are read off the kernels. What is proved of a quantized layer holds of the kernels that its codes define
    and of those multiplied by.
    """
    operator = fresh_kernel(layer)
    margin, lipschitz = operator.margin(), operator.lipschitz()
    certified = margin > 0
    if rows := isinstance(operator, ConvOperator):
        alpha, rate = kernel_rate(layer.solver, operator)
    else:
        alpha, rate = tier_rate(layer.solver, operator)
    delta, sufficient = (None, None) if reference is None else _change(operator, fresh_kernel(reference))
    return Certificate(
        certified=certified,
        verdict="certified" if certified else "unknown",
        margin=finite_or_none(margin),
        lipschitz=finite_or_none(lipschitz),
        condition=finite_or_none(verified.up(lipschitz / margin)) if certified else None,
        weight_condition=finite_or_none(verified.up(operator.norm() / margin)) if certified else None,
        solver=type(layer.solver).__name__,
        alpha=alpha,
        rate=rate,
        steps=steps_for(rate, tol),
        tolerance=tol,
        inexact=inexact_factor(rate),
        closed_rates=closed_rates(0.0 if rows else margin, lipschitz),
        family=operator.family.name,
        measure=finite_or_none(verified.up(1 - margin)),
        scheme=None if layer.scheme is None else scheme_to_dict(layer.scheme),
        delta_norm=None if delta is None else finite_or_none(delta),
        sufficient=sufficient,
    )


def _change(operator: Any, reference: Any) -> tuple[float, bool]:
    """(‖ΔW‖_η or ‖ΔW‖₂ at most, whether that is below the reference's margin)."""
    norm = operator.distance(reference)
    return norm, norm < reference.margin()
