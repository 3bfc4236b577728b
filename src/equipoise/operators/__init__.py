"""What a layer multiplies by: products, proved constants, resolvents and Cayley transforms."""

from .base import FixedPointMap, MonotoneOperator
from .contractive import RowWeight, quantize_weight
from .conv_norm import conv_norm
from .dense import DenseOperator
from .prepared import PreparedWeight
from .prepared_rows import prepare_weight
from .quantized import QuantizedWeight

__all__ = [
    "DenseOperator",
    "FixedPointMap",
    "MonotoneOperator",
    "PreparedWeight",
    "QuantizedWeight",
    "RowWeight",
    "conv_norm",
    "prepare_weight",
    "quantize_weight",
]
