"""What a layer multiplies by: products, proved constants, resolvents and Cayley transforms."""

from .base import FixedPointMap, MonotoneOperator
from .contractive import RowWeight
from .conv_norm import conv_norm
from .dense import DenseOperator
from .prepared import PreparedWeight
from .quantized import QuantizedWeight
from .recipes import (
    RECIPES,
    Recipe,
    operator_of,
    prepare_weight,
    quantize_weight,
    scheme_from_dict,
    schemes,
    tiers_of,
)

__all__ = [
    "RECIPES",
    "DenseOperator",
    "FixedPointMap",
    "MonotoneOperator",
    "PreparedWeight",
    "QuantizedWeight",
    "Recipe",
    "RowWeight",
    "conv_norm",
    "operator_of",
    "prepare_weight",
    "quantize_weight",
    "scheme_from_dict",
    "schemes",
    "tiers_of",
]
