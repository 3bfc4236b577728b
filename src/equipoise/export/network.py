"""The one shape of network that becomes an integer program, taken apart into codes and exact rationals."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from ..activations import ReLU
from ..data import Preprocessing
from ..errors import InputError, OptionError, StructureError
from ..layers.chain import chain
from ..layers.linear import QuantizedLinear
from ..layers.mondeq import MonDEQ
from ..quantization.codes import QuantizedTensor
from .fixedpoint import INT32, Integers

__all__ = ["CodedLinear", "CodedMatrix", "Network", "code_linear", "take_apart"]

WIDEST = 16


@dataclass(frozen=True, eq=False)
class CodedMatrix:
    """``scales[i] codes[i, j]``: integers ``(n, k)`` of ``bits`` bits, and an exact rational per row."""

    codes: Integers
    scales: tuple[Fraction, ...]
    bits: int

    @classmethod
    def of(cls, stored: QuantizedTensor, name: str) -> CodedMatrix:
        """Raises :class:`OptionError` for bits and scales that no kernel reads."""
        if stored.bits > WIDEST:
            raise OptionError(f"{name} has {stored.bits} bits; there are kernels for 1 to {WIDEST}: quantize it again")
        if any(size != 1 for size in stored.scale.shape[1:]):
            raise OptionError(
                f"{name} has scales of the shape {tuple(stored.scale.shape)}; kernels read one per tensor or per row"
            )
        scales = stored.scale.double().flatten().tolist()
        rows = stored.codes.shape[0]
        exact = tuple(Fraction(s) for s in (scales if len(scales) == rows else scales * rows))
        return cls(stored.codes.cpu().numpy().astype(np.int64), exact, stored.bits)

    def real(self) -> Tensor:
        """float64 ``(n, k)``: exact, a float32 scale times at most 16 bits."""
        scales = torch.tensor([float(s) for s in self.scales], dtype=torch.float64)
        return torch.from_numpy(self.codes).double() * scales[:, None]

    @property
    def row_sums(self) -> Integers:
        """``Σ_j |codes_ij|``, (n,)."""
        return np.asarray(np.abs(self.codes).sum(axis=1))


@dataclass(frozen=True, eq=False)
class CodedLinear:
    """x ↦ W̃ x + b̃ with W̃ as codes and b̃ as exact rationals."""

    weight: CodedMatrix
    bias: tuple[Fraction, ...]

    def bias_real(self) -> Tensor:
        return torch.tensor([float(v) for v in self.bias], dtype=torch.float64)


@dataclass(frozen=True)
class Network:
    """Flatten?, equilibrium layer, linear head or none; and the preprocessing it carries."""

    layer: MonDEQ
    head: nn.Linear | QuantizedLinear | None
    preprocessing: Preprocessing | None


def take_apart(model: nn.Module) -> Network:
    """Raises :class:`StructureError` for another chain of modules, by name, and for an activation without kernel."""
    layer: MonDEQ | None = None
    head: nn.Linear | QuantizedLinear | None = None
    for name, module in chain(model):
        if isinstance(module, (nn.Flatten, nn.Identity, nn.Dropout)):
            continue
        if isinstance(module, MonDEQ) and layer is None:
            layer = module
        elif isinstance(module, (nn.Linear, QuantizedLinear)) and layer is not None and head is None:
            head = module
        else:
            raise StructureError(
                f"{type(module).__name__} at position {name!r} cannot be exported: one equilibrium layer, then at most "
                "one linear module, is what becomes an integer program"
            )
    if layer is None:
        raise StructureError(f"{type(model).__name__} has no equilibrium layer; there is nothing to export")
    if type(layer.activation) is not ReLU:  # of one derived from it nothing is proved
        raise StructureError(
            f"the activation {layer.activation!r} has no exact form in integers; networks with ReLU can be exported"
        )
    return Network(layer, head, getattr(model, "preprocessing", None))


def code_linear(linear: nn.Module, largest: int, name: str) -> CodedLinear:
    """The linear module as codes; a float weight is rounded, row by row, to the most bits whose sums fit int32.

    ``largest``: of the integer inputs, in magnitude.
    """
    assert isinstance(linear, (nn.Linear, QuantizedLinear))
    weight = linear.weight
    coded = CodedMatrix.of(weight, name) if isinstance(weight, QuantizedTensor) else _round(weight, largest)
    bias = linear.bias
    if isinstance(bias, QuantizedTensor):
        scales = bias.scale.double().expand(bias.codes.shape).tolist()
        values = tuple(int(c) * Fraction(s) for c, s in zip(bias.codes.tolist(), scales, strict=True))
    elif bias is None:
        values = (Fraction(0),) * coded.codes.shape[0]
    else:
        if not bool(torch.isfinite(bias).all()):
            raise InputError(f"{name} has a bias with NaN or infinite entries; nothing can be proved about it")
        values = tuple(Fraction(v) for v in bias.detach().double().tolist())
    return CodedLinear(coded, values)


def _round(weight: Tensor, largest: int) -> CodedMatrix:
    for bits in range(WIDEST, 1, -1):
        coded = CodedMatrix.of(QuantizedTensor.fit(weight.detach(), bits, "row", "max"), "the weight")
        if bits <= 8 or int(coded.row_sums.max(initial=0)) * largest <= INT32:
            break
    return coded
