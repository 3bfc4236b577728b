"""The certificate of a convolutional layer: of NEMON its row sums, which hold on images of any size (theory §7), of a
monDEQ its symbols, on the torus that it was made for (theory §8)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..layers.convolutional import ConvolutionalLayer
from .convergence import layer_certificate
from .types import Certificate, finite_or_none
from .wellposed import fresh_kernel

__all__ = ["convolution_certificate"]


def convolution_certificate(layer: ConvolutionalLayer, reference: ConvolutionalLayer | None, tol: float) -> Certificate:
    """What is proved of ``layer``, and of its distance to ``reference`` where there is one.

    All figures are read off the kernels. What is proved of a quantized layer holds of the kernels that its codes define
    and of those multiplied by.
    """
    operator = fresh_kernel(layer)
    found = layer_certificate(layer, operator, tol)
    if reference is None:
        return found
    delta, sufficient = _change(operator, fresh_kernel(reference))
    return replace(found, delta_norm=finite_or_none(delta), sufficient=sufficient)


def _change(operator: Any, reference: Any) -> tuple[float, bool]:
    """(‖ΔW‖_η or ‖ΔW‖₂ at most, whether that is below the reference's margin)."""
    norm = operator.distance(reference)
    return norm, norm < reference.margin()
