"""A linear layer whose weight or bias is stored as codes and scales: injections and heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import verified
from ..errors import InputError
from ..quantization.codes import QuantizedTensor
from ..quantization.schemes import Scheme
from .cache import Derived, keeping

__all__ = ["QuantizedLinear", "affine64", "quantize_linear"]


class QuantizedLinear(nn.Module):
    """x ↦ W̃ x + b̃ with W̃ ``(out, in)`` and b̃ ``(out,)`` each either codes or a float tensor.

    State: ``weight.codes``, ``weight.scale`` or ``weight``; likewise ``bias`` (None without bias).
    """

    weight: QuantizedTensor | Tensor
    bias: QuantizedTensor | Tensor | None

    def __init__(self, weight: QuantizedTensor | Tensor, bias: QuantizedTensor | Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        for name, value in (("weight", weight), ("bias", bias)):
            if isinstance(value, QuantizedTensor):
                setattr(self, name, value)
            else:
                self.register_buffer(name, None if value is None else value.detach().clone())
        self._derived = Derived()
        self.register_buffer("_like", _anchor(weight, bias), persistent=False)

    _like: Tensor

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """(W̃, b̃) in the dtype and on the device of the module, read-only."""
        kept = self._derived.of(self)
        if "dense" not in kept:
            with keeping():
                kept["dense"] = tuple(
                    None if value is None else _values(value).to(self._like) for value in (self.weight, self.bias)
                )
        weight, bias = kept["dense"]
        return weight, bias

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.dense()
        return nn.functional.linear(x, weight, bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _anchor(*values: QuantizedTensor | Tensor | None) -> Tensor:
    """An empty tensor that remembers dtype and device where only codes are stored."""
    floats = [value for value in values if isinstance(value, Tensor)]
    return torch.empty(0, dtype=floats[0].dtype if floats else torch.get_default_dtype())


def _values(value: QuantizedTensor | Tensor) -> Tensor:
    return value.dequantize() if isinstance(value, QuantizedTensor) else value


def quantize_linear(
    linear: nn.Linear, scheme: Scheme, weight_bits: int | None, bias_bits: int | None
) -> nn.Linear | QuantizedLinear:
    """``linear`` itself where no bits are asked, else its codes, with the scheme's granularity and scale rule.

    Raises:
        InputError: weights that are not finite.
    """
    if weight_bits is None and bias_bits is None:
        return linear
    weight: QuantizedTensor | Tensor = linear.weight.detach()
    bias: QuantizedTensor | Tensor | None = None if linear.bias is None else linear.bias.detach()
    if not bool(torch.isfinite(linear.weight).all()):
        raise InputError("the linear layer holds NaN or infinite weights; nothing can be quantized")
    if weight_bits is not None:
        weight = QuantizedTensor.fit(linear.weight.detach(), weight_bits, scheme.granularity, scheme.scale)
    if bias_bits is not None and linear.bias is not None:
        bias = QuantizedTensor.fit(linear.bias.detach(), bias_bits, "tensor", scheme.scale)
    result = QuantizedLinear(weight, bias)
    result._like = linear.weight.detach().new_empty(0)
    return result


def affine64(linear: nn.Linear | QuantizedLinear) -> tuple[Tensor, Tensor, float, float]:
    """(W, b, e_W, e_b): the stored affine map in float64 on the CPU, and 2-norm bounds on how far both the
    exact stored one and the one multiplied by may lie from it (0 where nothing was rounded)."""
    if isinstance(linear, QuantizedLinear):
        stored = (linear.weight, linear.bias)
        applied = linear.dense()
    else:
        stored = applied = (linear.weight, linear.bias)
    tensors, errors = [], []
    for value, used in zip(stored, applied, strict=True):
        if value is None:
            tensors.append(torch.zeros(linear.out_features, dtype=torch.float64))
            errors.append(0.0)
            continue
        exact = _values(value).detach().to("cpu", torch.float64)
        assert used is not None
        cast = verified.absolute_norm(torch.atleast_2d(exact - used.detach().to("cpu", torch.float64)))
        forming = verified.UNIT * verified.absolute_norm(torch.atleast_2d(exact)) if _rounds(value) else 0.0
        tensors.append(exact)
        errors.append(verified.up((cast + forming) * (1 + 1e-15)) if cast + forming else 0.0)
    return tensors[0], tensors[1], errors[0], errors[1]


def _rounds(value: QuantizedTensor | Tensor) -> bool:
    """Whether code · scale is inexact in float64."""
    return isinstance(value, QuantizedTensor) and not value.exact
