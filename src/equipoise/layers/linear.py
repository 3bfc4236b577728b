"""A linear layer whose weight or bias is stored as codes and scales, or trained as such: injections and heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import verified
from ..errors import InputError, StructureError
from ..quantization.codes import QuantizedTensor
from ..quantization.schemes import Scheme
from ..quantization.straight_through import FakeQuantize, Seen
from .cache import Derived, keeping

__all__ = ["PreparedLinear", "QuantizedLinear", "affine", "affine64", "anchor", "prepare_linear", "quantize_linear"]


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


class PreparedLinear(nn.Module):
    """x ↦ W̃ x + b̃ with float ``weight (out, in)`` and ``bias (out,)`` that are rounded in every forward pass, each
    where it has bits; gradients pass straight through (theory §4).

    In training mode the scales are fitted again whenever the weights changed; in evaluation they stay.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, linear: nn.Linear, scheme: Scheme, weight_bits: int | None, bias_bits: int | None, learn_scale: bool
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if not all(isinstance(value, nn.Parameter) for value in (linear.weight, linear.bias) if value is not None):
            raise StructureError(
                "the linear layer's weight or bias is computed from other parameters, which cannot be trained through "
                "rounding; call torch.nn.utils.parametrize.remove_parametrizations first"
            )
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.rounding_weight: FakeQuantize | None = None
        self.rounding_bias: FakeQuantize | None = None
        if weight_bits is not None:
            fake = FakeQuantize(linear.weight, weight_bits, scheme.granularity, scheme.scale, learn=learn_scale)
            self.rounding_weight = fake.to(linear.weight.device)
        if bias_bits is not None and linear.bias is not None:
            fake = FakeQuantize(linear.bias, bias_bits, "tensor", scheme.scale, learn=learn_scale)
            self.rounding_bias = fake.to(linear.weight.device)
        self._seen = Seen()
        self._derived = Derived()

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """(W̃, b̃) in the dtype of the weights, with their graph; without gradients read-only."""
        if not torch.is_grad_enabled():
            return self.quantized().dense()
        values: list[Tensor | None] = []
        fit = self.training and self._seen.changed(self.parameters(recurse=False))
        for value, rounding in ((self.weight, self.rounding_weight), (self.bias, self.rounding_bias)):
            if value is None or rounding is None:
                values.append(value)
                continue
            if fit:
                rounding.fit(value)
            values.append(rounding(value, value.dtype))
        weight, bias = values
        assert weight is not None
        return weight, bias

    def quantized(self) -> QuantizedLinear:
        """The codes and scales as they are now, the same object until a weight changes."""
        kept = self._derived.of(self)
        if "quantized" not in kept:
            with keeping(), torch.no_grad():
                weight, bias = (
                    value if value is None or rounding is None else rounding.quantized(value)
                    for value, rounding in ((self.weight, self.rounding_weight), (self.bias, self.rounding_bias))
                )
                assert weight is not None
                kept["quantized"] = QuantizedLinear(weight, bias)
                kept["quantized"]._like = self.weight.detach().new_empty(0)
        result: QuantizedLinear = kept["quantized"]
        return result

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, *self.dense())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def affine(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(W, b) as multiplied by: the parameters themselves, or what codes stand for."""
    if isinstance(linear, (QuantizedLinear, PreparedLinear)):
        return linear.dense()
    assert isinstance(linear, nn.Linear)
    return linear.weight, linear.bias


def anchor(linear: nn.Module) -> Tensor:
    """A tensor with the dtype and on the device that ``linear`` computes in."""
    if isinstance(linear, QuantizedLinear):
        return linear._like
    assert isinstance(linear, (nn.Linear, PreparedLinear))
    return linear.weight


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
    _check_finite(linear)
    if weight_bits is not None:
        weight = QuantizedTensor.fit(linear.weight.detach(), weight_bits, scheme.granularity, scheme.scale)
    if bias_bits is not None and linear.bias is not None:
        bias = QuantizedTensor.fit(linear.bias.detach(), bias_bits, "tensor", scheme.scale)
    result = QuantizedLinear(weight, bias)
    result._like = linear.weight.detach().new_empty(0)
    return result


def prepare_linear(
    linear: nn.Linear, scheme: Scheme, weight_bits: int | None, bias_bits: int | None, learn_scale: bool
) -> nn.Linear | PreparedLinear:
    """``linear`` itself where no bits are asked, else the module that trains as :func:`quantize_linear` would store."""
    if weight_bits is None and (bias_bits is None or linear.bias is None):
        return linear
    _check_finite(linear)
    return PreparedLinear(linear, scheme, weight_bits, bias_bits, learn_scale)


def _check_finite(linear: nn.Linear) -> None:
    if not bool(torch.isfinite(linear.weight).all()):
        raise InputError("the linear layer holds NaN or infinite weights; nothing can be quantized")


def affine64(linear: nn.Linear | QuantizedLinear | PreparedLinear) -> tuple[Tensor, Tensor, float, float]:
    """(W, b, e_W, e_b): the stored affine map in float64 on the CPU, and 2-norm bounds on how far both the
    exact stored one and the one multiplied by may lie from it (0 where nothing was rounded)."""
    linear = linear.quantized() if isinstance(linear, PreparedLinear) else linear
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
