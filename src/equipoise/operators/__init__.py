"""What a layer multiplies by: products, proved constants, resolvents and Cayley transforms."""

from .base import FixedPointMap, MonotoneOperator
from .dense import DenseOperator
from .quantized import QuantizedWeight, quantize_weight

__all__ = ["DenseOperator", "FixedPointMap", "MonotoneOperator", "QuantizedWeight", "quantize_weight"]
