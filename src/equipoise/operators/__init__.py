"""What a layer multiplies by: products, proved constants, resolvents and Cayley transforms."""

from .base import FixedPointMap, MonotoneOperator
from .dense import DenseOperator
from .prepared import PreparedWeight, prepare_weight
from .quantized import QuantizedWeight, quantize_weight

__all__ = [
    "DenseOperator",
    "FixedPointMap",
    "MonotoneOperator",
    "PreparedWeight",
    "QuantizedWeight",
    "prepare_weight",
    "quantize_weight",
]
