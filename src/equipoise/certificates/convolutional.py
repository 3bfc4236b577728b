"""The certificate of a convolutional layer: its row sums, which hold on images of any size (theory §7)."""

from __future__ import annotations

from .. import verified
from ..layers import NEMONConv2d
from ..operators.conv import ConvOperator
from ..quantization.schemes import scheme_to_dict
from .convergence import closed_rates, inexact_factor, kernel_rate, steps_for
from .types import Certificate, finite_or_none
from .wellposed import fresh_kernel

__all__ = ["convolution_certificate"]


def convolution_certificate(layer: NEMONConv2d, reference: NEMONConv2d | None, tol: float) -> Certificate:
    """What is proved of ``layer``, and of its distance to ``reference`` where there is one.

    All figures are read off the kernel, in the weighted maximum norm of its channels. What is proved of a quantized
    layer holds of the kernel that its codes define and of the one multiplied by. Nothing is said per input.
    """
    operator = fresh_kernel(layer)
    margin, lipschitz = operator.margin(), operator.lipschitz()
    certified = margin > 0
    alpha, rate = kernel_rate(layer.solver, operator)
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
        closed_rates=closed_rates(0.0, lipschitz),
        family=operator.family.name,
        measure=finite_or_none(verified.up(1 - margin)),
        scheme=None if layer.scheme is None else scheme_to_dict(layer.scheme),
        delta_norm=None if delta is None else finite_or_none(delta),
        sufficient=sufficient,
    )


def _change(operator: ConvOperator, reference: ConvOperator) -> tuple[float, bool]:
    """(‖ΔW‖_η at most, whether that is below the reference's margin)."""
    norm = operator.distance(reference)
    return norm, norm < reference.margin()
