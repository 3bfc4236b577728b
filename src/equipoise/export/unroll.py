"""A model as a fixed number of float32 steps, with its certificate: what ONNX graphs are made from (theory §10)."""

from __future__ import annotations

from torch import nn

from ..errors import OptionError
from ..layers.linear import QuantizedLinear, affine64
from ..operators.quantized import CayleyWeight, StructuredWeight
from ..quantization.codes import QuantizedTensor
from .boxes import box_of
from .build import Options, prepare
from .certificate import ShipCertificate
from .fixedpoint import SLACK
from .floating import FixedSteps, Floating, plan_floating
from .network import Network
from .proof import Reference, equilibrium_bounds, score_bound

__all__ = ["unrolled"]

OVERFLOW = "proved absent: every iterate is bounded, far below the largest float32"


def unrolled(
    model: nn.Module, reference: nn.Module | None = None, options: Options | None = None
) -> tuple[FixedSteps, ShipCertificate]:
    """(a module of plain tensor operations, its certificate): ``torch.export`` takes the module as it is.

    Raises:
        NotWellPosedError, OptionError, StructureError: as :func:`equipoise.export.export`.
    """
    options = options or Options()
    if options.uncertified:
        raise OptionError("uncertified is for target c; a graph is written with a proved number of steps or not at all")
    network, mode, grid, own, against = prepare(model, reference, options)
    plan = plan_floating(network, box_of(grid)[0])
    iteration = plan.iteration
    steps = iteration.steps_for(options.tol)
    bounds = equilibrium_bounds(own, (plan.U, plan.b), against, iteration, steps, grid)
    truncation = iteration.truncation(steps)
    error = bounds.displacement + iteration.rounding + truncation
    head = network.head
    recurrent, injection = _bits(network.layer.recurrent), _bits(network.layer.injection)
    certificate = ShipCertificate(
        certified=True,
        target="onnx",
        mode=mode,
        arithmetic="float32, rounded to nearest, sums in any order; bounds proved in float64 with rounding counted",
        reference=against.words,
        steps=steps,
        error_bound=error,
        displacement_bound=bounds.displacement,
        rounding_bound=iteration.rounding,
        truncation_bound=truncation,
        input_rounding_bound=0.0,
        score_error_bound=_scores(network, against, plan, error),
        tolerance=options.tol,
        contraction=iteration.contraction,
        margin=own.margin,
        iterate_unit=None,
        iterate_limit=None,
        iterate_range=f"at most {iteration.iterate_norm:.6g} in the 2-norm on every input, proved",
        accumulator_bound=None,
        recurrent_bits=recurrent,
        input_bits=injection,
        head_bits=None if head is None else _bits(head),
        activation_bits=32,
        features=network.layer.features,
        inputs=network.layer.in_features,
        classes=0 if head is None else head.out_features,
        ram_bytes=4 * (network.layer.in_features + 4 * network.layer.features),
        flash_bytes=_stored(network),
        macs=_macs(network, steps),
        overflow=OVERFLOW,
    )
    return FixedSteps(network, steps, plan.alpha).eval(), certificate


def _scores(network: Network, against: Reference, plan: Floating, error: float) -> float:
    if network.head is None:
        return error
    V, c, e_V, e_c = affine64(network.head)
    size = plan.iteration.iterate_norm
    return score_bound(against, (V, c), plan.head_errors(V, c) + e_V * size * SLACK + e_c, error, size)


def _bits(module: nn.Module) -> int:
    """Bits of its codes; 32 for floats."""
    if isinstance(module, CayleyWeight):
        return module.C.bits
    if isinstance(module, StructuredWeight):
        return max(module.A.bits, module.K.bits)
    weight = module.weight if isinstance(module, QuantizedLinear) else None
    return weight.bits if isinstance(weight, QuantizedTensor) else 32


def _stored(network: Network) -> int:
    """Bytes of the tensors in the graph: codes as int8 or int16, everything else as float32."""

    def matrix(rows: int, columns: int, bits: int) -> int:
        return rows * columns * (1 if bits <= 8 else 2 if bits <= 16 else 4)

    layer, head = network.layer, network.head
    n = layer.features
    total = matrix(n, layer.in_features, _bits(layer.injection)) + 12 * n
    if isinstance(layer.recurrent, StructuredWeight):
        total += matrix(layer.recurrent.A.shape[0], n, layer.recurrent.A.bits)
    total += matrix(n, n, _bits(layer.recurrent))
    return total + (0 if head is None else matrix(head.out_features, n, _bits(head)) + 8 * head.out_features)


def _macs(network: Network, steps: int) -> int:
    layer, head = network.layer, network.head
    n = layer.features
    step = n * n
    if isinstance(layer.recurrent, StructuredWeight):
        step += 2 * n * layer.recurrent.A.shape[0]
    start = n * n if isinstance(layer.recurrent, CayleyWeight) else 0
    return n * layer.in_features + start + steps * step + (0 if head is None else n * head.out_features)
