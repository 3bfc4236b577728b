"""What a scheme makes of each kind of weights: the one table that every scheme is found by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError, OptionError
from ..parametrizations import Contractive, MonotoneKernels, Weighted
from ..quantization.schemes import Assembled, Cayley, Compensated, Scheme, Structured
from .contractive import AssembledRows, StructuredRows, UnfitSchemeError
from .dense import DenseOperator, in_proving_norm
from .grids import Geometry
from .prepared import PreparedAssembled, PreparedCayley, PreparedCompensated, PreparedStructured, PreparedWeight
from .prepared_rows import PreparedAssembledRows, PreparedStructuredRows
from .quantized import AssembledWeight, CayleyWeight, CompensatedWeight, QuantizedWeight, StructuredWeight
from .quantized_tiers import AssembledTiers, CompensatedTiers, QuantizedTiers, StructuredTiers
from .tiers import TierOperator

__all__ = [
    "RECIPES",
    "Recipe",
    "operator_of",
    "prepare_weight",
    "quantize_tiers",
    "quantize_weight",
    "scheme_from_dict",
    "schemes",
    "tiers_of",
]


class Recipe(NamedTuple):
    """Which codes a scheme makes of a monDEQ's weights, and what trains as those codes; of a NEMON layer's, likewise;
    of a convolutional monDEQ's kernels. None: it is not made for these, and says so."""

    weights: type[QuantizedWeight]
    prepared: type[PreparedWeight] | None = None
    rows: type[QuantizedWeight] | None = None
    prepared_rows: type[PreparedWeight] | None = None
    tiers: type[QuantizedTiers] | None = None


RECIPES: dict[type[Scheme], Recipe] = {
    Assembled: Recipe(AssembledWeight, PreparedAssembled, AssembledRows, PreparedAssembledRows, AssembledTiers),
    Structured: Recipe(StructuredWeight, PreparedStructured, StructuredRows, PreparedStructuredRows, StructuredTiers),
    Compensated: Recipe(CompensatedWeight, PreparedCompensated, tiers=CompensatedTiers),
    Cayley: Recipe(CayleyWeight, PreparedCayley),
}
"""Every scheme, by its class: what can be asked for by name, made, trained, saved and loaded. One of your own is added
by ``RECIPES[Mine] = Recipe(MineWeight)``; nothing is believed of its weights but the matrix that they multiply by."""

PROVED = frozenset(kind for recipe in RECIPES.values() for kind in recipe if kind is not None)
"""The weights whose own proofs certificates use."""


def schemes() -> dict[str, type[Scheme]]:
    """Every scheme by the name it has in files and on the command line."""
    return {kind.__name__.lower(): kind for kind in RECIPES}


def scheme_from_dict(values: Mapping[str, Any]) -> Scheme:
    """Inverse of ``scheme_to_dict``; options that are left out take their defaults.

    Raises:
        OptionError: unknown scheme, unknown option, no ``bits``, or a value outside its range.
    """
    options = dict(values)
    name = options.pop("scheme", None)
    known_as = schemes()
    kind = known_as.get(name) if isinstance(name, str) else None
    if kind is None:
        raise OptionError(f"scheme is {name!r}; it is one of {', '.join(known_as)}")
    known = [field.name for field in fields(kind)]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise OptionError(f"{name} has no option {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
    if "bits" not in options:
        raise OptionError(f"{name} needs bits: an integer from 1 to 16, or 32")
    return kind(**options)


def quantize_weight(weights: nn.Module, scheme: Scheme) -> QuantizedWeight:
    """Codes for the recurrent weights of any layer on vectors.

    Raises:
        OptionError: a scheme nobody knows.
        StructureError: a scheme that is not made for these weights.
        InputError: weights that are quantized already, or not finite.
        NotWellPosedError: Structured on weights without a proved positive margin.
    """
    if isinstance(weights, QuantizedWeight):
        raise InputError("the layer is quantized already; quantize the float model it came from")
    kind: Any = _made(weights, scheme, "weights")
    _check_finite(weights)
    with torch.no_grad():
        made: QuantizedWeight = kind.quantize(weights, scheme)
    return made


def prepare_weight(weights: nn.Module, scheme: Scheme, learn_scale: bool = False) -> PreparedWeight:
    """The weights of any layer on vectors (shared, not copied) rounded by ``scheme`` in every forward pass.

    Raises:
        OptionError: a scheme nobody knows.
        StructureError: a scheme that is not made for these weights, or not for training.
        InputError: weights that are not finite.
        NotWellPosedError: Structured on weights without structure and without a proved margin.
    """
    kind: Any = _made(weights, scheme, "prepared")
    _check_finite(weights)
    prepared: PreparedWeight = kind(weights, scheme, learn_scale)
    return prepared


def _made(weights: nn.Module, scheme: Scheme, part: str) -> type[nn.Module]:
    """What ``scheme`` makes of these weights: ``"weights"`` or ``"prepared"`` ones."""
    recipe, by_rows = _recipe(scheme), isinstance(weights, (Contractive, Weighted))
    if by_rows:
        if getattr(scheme, "skew_bits", None) is not None:
            raise OptionError("skew_bits are of a monDEQ's skew part; a NEMON layer has none: leave them out")
        part = {"weights": "rows", "prepared": "prepared_rows"}[part]
    if (kind := getattr(recipe, part)) is None:
        name, known = type(scheme).__name__, _those_with(part)
        if by_rows and recipe.rows is None:
            raise UnfitSchemeError(
                f"{name} is a scheme for monotone layers; a NEMON layer is quantized by one of {known}"
            )
        raise UnfitSchemeError(f"{name} cannot be trained through; known: {known}")
    found: type[nn.Module] = kind
    return found


def quantize_tiers(weights: MonotoneKernels, scheme: Scheme, geometry: Geometry, like: Tensor) -> QuantizedTiers:
    """Codes for the kernels of a convolutional monDEQ.

    Raises:
        StructureError: a scheme that is not made for these weights, by name.
        OptionError: bits for U or b, which stay floats.
        InputError: weights that are not finite.
        NotWellPosedError: Compensated, where the diagonal's grid is too coarse for the target.
    """
    if geometry.tiers > 1 and not isinstance(scheme, Structured):
        raise UnfitSchemeError(
            f"{type(scheme).__name__} does not fit a MultiTierMonDEQ: between its tiers W is no plain convolution; "
            "it takes Structured"
        )
    kind: Any = _recipe(scheme).tiers
    if kind is None:
        why = "its Cayley transform has no small kernel" if isinstance(scheme, Cayley) else "nobody made it for kernels"
        raise UnfitSchemeError(
            f"{type(scheme).__name__} does not fit a convolutional monDEQ: {why}; it is quantized by one of "
            f"{_those_with('tiers')}"
        )
    for name, parts in (("input_bits", "codes of U"), ("bias_bits", "codes of b")):
        if getattr(scheme, name) is not None:
            raise OptionError(f"{name}={getattr(scheme, name)}: a convolutional layer has no {parts}; leave it out")
    _check_finite(weights)
    with torch.no_grad():
        made: QuantizedTiers = kind.quantize(weights, scheme, geometry, like)
        return made


def operator_of(weights: QuantizedWeight, like: Tensor) -> DenseOperator:
    """The operator of codes, in the dtype and on the device of ``like``.

    Of weights that this library does not know nothing is used but the matrix they stand for: whatever they say of its
    error or its margin, constants are proved of the matrix that is multiplied by.
    """
    if type(weights) in PROVED:
        return weights.operator(like)
    return in_proving_norm(DenseOperator(weights().detach().to(like)))


def tiers_of(weights: QuantizedTiers, geometry: Geometry, like: Tensor) -> TierOperator:
    """:func:`operator_of` of kernels as codes, on the grids of ``geometry``: of weights that this library does
    not know, nothing but the kernels that are multiplied by."""
    found = weights.operator(geometry, like)
    return found if type(weights) in PROVED else TierOperator(found.kernels, geometry)


def _recipe(scheme: Scheme) -> Recipe:
    if type(scheme) not in RECIPES:
        known, name = ", ".join(kind.__name__ for kind in RECIPES), type(scheme).__name__
        raise OptionError(
            f"unknown scheme {scheme!r}; known: {known}. One of your own is made known by "
            f"equipoise.operators.RECIPES[{name}] = Recipe({name}Weight)"
        )
    return RECIPES[type(scheme)]


def _those_with(part: str) -> str:
    return ", ".join(kind.__name__ for kind, recipe in RECIPES.items() if getattr(recipe, part) is not None)


def _check_finite(weights: nn.Module) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.parameters()):
        raise InputError("the weights hold NaN or infinite entries; nothing can be quantized or proved")
