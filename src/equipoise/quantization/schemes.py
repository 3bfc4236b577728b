"""What to quantize, and how finely: frozen descriptions that travel into functions and files.

A scheme does nothing by itself. ``Assembled`` rounds the matrix W; the others round numbers upstream
of the structure that gives the guarantee, or correct the matrix after rounding. Source: theory §4.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any, final

from ..errors import OptionError
from .rounding import Granularity, ScaleRule, check_bits, check_choice

__all__ = [
    "Assembled",
    "Cayley",
    "Compensated",
    "Scheme",
    "Structured",
    "scheme_to_dict",
]


@dataclass(frozen=True)
class Scheme:
    """Abstract base: the options all schemes share; all but ``bits`` by keyword.

    Args:
        bits: of the recurrent weights, 1 to 16, or 32.
        granularity: ``"tensor"`` (one scale) or ``"row"`` (one per row, i.e. per output).
        scale: ``"max"`` (largest weight is the largest level) or ``"mse"`` (least squared error).
        input_bits, bias_bits, head_bits: of U, of b, and of the linear layers around; None keeps floats.

    Raises:
        OptionError: a value outside its range.
        TypeError: an unknown keyword, or ``Scheme`` itself instantiated.
    """

    bits: int
    _: KW_ONLY
    granularity: Granularity = "tensor"
    scale: ScaleRule = "max"
    input_bits: int | None = None
    bias_bits: int | None = None
    head_bits: int | None = None

    def __post_init__(self) -> None:
        if type(self) is Scheme:
            raise TypeError("Scheme is abstract; choose one such as Structured(bits=2)")
        check_bits(self.bits)
        for name in ("input_bits", "bias_bits", "head_bits"):
            if getattr(self, name) is not None:
                check_bits(getattr(self, name), name)
        check_choice(self.granularity, "granularity", ("tensor", "row"))
        check_choice(self.scale, "scale", ("max", "mse"))

    @property
    def name(self) -> str:
        """Lower-case class name, as on the command line and in files."""
        return type(self).__name__.lower()


@final
@dataclass(frozen=True, kw_only=True)
class Assembled(Scheme):
    """``W̃ = Q(W)``: round the assembled matrix, the published experiment [LLC26]. The margin moves."""


@final
@dataclass(frozen=True, kw_only=True)
class Structured(Scheme):
    """``W̃ = (1 - m) I - ÃᵀÃ + K̃``: round A and the skew part ``K = B - Bᵀ``, keep m.

    ``sym(I - W̃) = m I + ÃᵀÃ``, so the margin survives at every number of bits (theory §4; observed for
    perturbed A and B in [PWK21]). ``granularity`` is that of A; K always has one scale, or it would
    not stay skew.

    Args:
        skew_bits: of K; None takes ``bits``.
    """

    scale: ScaleRule = "mse"
    skew_bits: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skew_bits is not None:
            check_bits(self.skew_bits, "skew_bits")


@final
@dataclass(frozen=True, kw_only=True)
class Compensated(Scheme):
    """Round W off its diagonal; keep the diagonal finer, lowered until the margin is ``margin``.

    The scale is fitted off the diagonal. Least squares is the default because it needs the least
    lowering: at 2 bits with ``margin=0.05`` the published MNIST network keeps 97.0 % accuracy with
    it and 81.7 % with ``"max"``.

    Args:
        margin: target, positive.
        diagonal_bits: of the diagonal entries, 2 to 16, or 32.
    """

    scale: ScaleRule = "mse"
    margin: float = 0.05
    diagonal_bits: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.diagonal_bits, "diagonal_bits", at_least=2)
        object.__setattr__(self, "margin", _positive(self.margin, "margin"))


@final
@dataclass(frozen=True, kw_only=True)
class Cayley(Scheme):
    """``C̃ = Q(C_α)``: round the Cayley transform, so that a Peaceman-Rachford step is codes times |u|.

    Well posed if ``‖C̃‖₂ < 1``. ``alpha`` is stored with the codes; None takes the operator's own choice.
    """

    granularity: Granularity = "row"
    scale: ScaleRule = "mse"
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            object.__setattr__(self, "alpha", _positive(self.alpha, "alpha"))


def scheme_to_dict(scheme: Scheme) -> dict[str, Any]:
    """Plain values for a file: ``{"scheme": name, "bits": ..., ...}``, every option spelled out."""
    return {"scheme": scheme.name, **asdict(scheme)}


def _positive(value: float, name: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 < value < math.inf):
        raise OptionError(f"{name} is {value!r}; it is a finite number above 0")
    return float(value)
