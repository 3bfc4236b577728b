"""Activations as proximal maps of convex functions.

A monotone equilibrium network needs an activation σ that is the proximal map of a convex, closed, proper,
separable f: σ = prox_f, that is σ non-decreasing with slopes in [0, 1] (theory §1). A splitting with
step α calls prox_{αf}, which is *not* σ in general. Every class here gives

- ``activation(v)``          σ(v),
- ``prox(v, alpha)``         prox_{αf}(v),
- ``reflect(v, alpha)``      2 prox_{αf}(v) − v,
- ``derivative(v)``          σ'(v), entries in [0, 1] (at a kink: the left slope),
- ``evaluation_error(p)``    a bound on |fl(σ(v)) − σ(v)| for a computed p = fl(σ(v)).

All act elementwise on tensors of any shape and keep shape and dtype.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import OptionError

__all__ = [
    "ACTIVATIONS",
    "ELU",
    "PROVED",
    "Activation",
    "Hardtanh",
    "LeakyReLU",
    "ReLU",
    "Sigmoid",
    "SoftThreshold",
    "Softplus",
    "Tanh",
    "activation_from_dict",
    "as_activation",
    "flaw",
]

NEWTON_STEPS = 40


def _number(value: float) -> float:
    """``value`` for a comparison; NaN, which fails all of them, where it is no number."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _as_held(value: float, like: Tensor) -> float:
    """``value``, infinite where the dtype of ``like`` holds no number as large."""
    return value if abs(value) <= torch.finfo(like.dtype).max else math.copysign(math.inf, value)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise OptionError(message)


@dataclass(frozen=True)
class Activation(ABC):
    """A scalar proximal map σ = prox_f applied elementwise (theory §1)."""

    ulps: ClassVar[float] = 0.0
    """|fl(σ(v)) − σ(v)| <= ulps · (eps |fl(σ(v))| + tiny), the latter for what underflows; 0 where σ is exact."""

    @property
    def name(self) -> str:
        return type(self).__name__

    @abstractmethod
    def __call__(self, v: Tensor) -> Tensor: ...

    @abstractmethod
    def derivative(self, v: Tensor) -> Tensor: ...

    def prox(self, v: Tensor, alpha: float) -> Tensor:
        """prox_{αf}(v) = σ(t) where α t + (1 − α) σ(t) = v.

        The left side has slopes between min(1, α) and max(1, α), so t is unique and bracketed; Newton's
        step is taken where it stays in the bracket and bisection elsewhere. The number of steps is
        fixed: no device synchronisation. On a CPU the rest of them is left out once nothing changes over
        two steps, an even number before the end: roundings may go to and fro for ever.
        """
        if alpha == 1.0:
            return self(v)
        low, high = self._bracket(v, alpha)
        t = v.clamp(low, high)
        looks = v.device.type == "cpu" and not torch.compiler.is_compiling()
        before: tuple[Tensor, ...] = ()
        for step in range(NEWTON_STEPS):
            if looks and step % 2 == 0:
                now = t, low, high
                if before and all(map(torch.equal, now, before)):
                    break
                before = now
            gap = alpha * t + (1 - alpha) * self(t) - v
            low = torch.where(gap <= 0, t, low)
            high = torch.where(gap >= 0, t, high)
            newton = t - gap / (alpha + (1 - alpha) * self.derivative(t))
            inside = (newton >= low) & (newton <= high)
            t = torch.where(inside, newton, (low + high) / 2)
        return self(t)

    def _bracket(self, v: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """An interval that holds the root t: the root of the affine bounds through (0, (1 − α) σ(0))."""
        shifted = v - (1 - alpha) * self(torch.zeros((), dtype=v.dtype, device=v.device))
        ends = shifted, shifted / alpha
        slack = torch.finfo(v.dtype).eps * (v.abs() + ends[1].abs() + 1) * 4
        return torch.minimum(*ends) - slack, torch.maximum(*ends) + slack

    @cached_property
    def fixes_zero(self) -> bool:
        """Whether σ(0) = 0; then prox_{αf}(0) = 0 for every α, since both say that f is least at 0."""
        return float(self(torch.zeros(1))) == 0

    def reflect(self, v: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
        """2 prox_{αf}(v) − v, into ``out`` where given (no gradient is recorded then)."""
        return torch.sub(self.prox(v, alpha), v, alpha=0.5, out=out).mul_(2)

    def evaluation_error(self, p: Tensor) -> Tensor | float:
        """Elementwise bound on the rounding of ``p = fl(σ(v))``; 0.0 where there is none."""
        if self.ulps == 0:
            return 0.0
        info = torch.finfo(p.dtype)
        return self.ulps * (info.eps * p.abs() + info.tiny)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class ReLU(Activation):
    """σ(v) = max(v, 0); f is the indicator of the non-negative orthant, so prox_{αf} = σ for every α."""

    def __call__(self, v: Tensor) -> Tensor:
        return v.relu()

    def prox(self, v: Tensor, alpha: float) -> Tensor:
        return v.relu()

    def reflect(self, v: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
        return torch.abs(v, out=out)

    def derivative(self, v: Tensor) -> Tensor:
        return (v > 0).to(v.dtype)


@dataclass(frozen=True)
class LeakyReLU(Activation):
    """σ(v) = v for v >= 0 and ``slope`` · v below, slope in [0, 1]."""

    slope: float = 0.01
    ulps: ClassVar[float] = 2.0

    def __post_init__(self) -> None:
        _check(0 <= _number(self.slope) <= 1, f"LeakyReLU slope is {self.slope}; a proximal map needs 0 <= slope <= 1")

    def __call__(self, v: Tensor) -> Tensor:
        return torch.nn.functional.leaky_relu(v, self.slope)

    def prox(self, v: Tensor, alpha: float) -> Tensor:
        a = self.slope
        return torch.nn.functional.leaky_relu(v, a / (a + alpha * (1 - a)))

    def derivative(self, v: Tensor) -> Tensor:
        return torch.ones_like(v).masked_fill(v <= 0, self.slope)


@dataclass(frozen=True)
class Tanh(Activation):
    """σ(v) = tanh v."""

    ulps: ClassVar[float] = 4.0

    def __call__(self, v: Tensor) -> Tensor:
        return v.tanh()

    def derivative(self, v: Tensor) -> Tensor:
        return 1 - v.tanh().square()


@dataclass(frozen=True)
class Sigmoid(Activation):
    """σ(v) = 1/(1 + e^{−v}); slopes in [0, 1/4]."""

    ulps: ClassVar[float] = 4.0

    def __call__(self, v: Tensor) -> Tensor:
        return v.sigmoid()

    def derivative(self, v: Tensor) -> Tensor:
        s = v.sigmoid()
        return s * (1 - s)


@dataclass(frozen=True)
class Softplus(Activation):
    """σ(v) = log(1 + e^v)."""

    ulps: ClassVar[float] = 4.0

    def __call__(self, v: Tensor) -> Tensor:
        # torch's softplus switches to v above a threshold, an error of 2e-9; this form has none. It is
        # max(v, 0) + log1p(e^{-|v|}).
        return v.relu() + torch.log1p(torch.exp(-v.abs()))

    def derivative(self, v: Tensor) -> Tensor:
        return v.sigmoid()


@dataclass(frozen=True)
class ELU(Activation):
    """σ(v) = v for v >= 0 and ``scale`` · (e^v − 1) below, scale in (0, 1]."""

    scale: float = 1.0
    ulps: ClassVar[float] = 4.0

    def __post_init__(self) -> None:
        _check(0 < _number(self.scale) <= 1, f"ELU scale is {self.scale}; slopes in [0, 1] need 0 < scale <= 1")

    def __call__(self, v: Tensor) -> Tensor:
        return torch.where(v > 0, v, self.scale * torch.expm1(v.clamp(max=0)))

    def derivative(self, v: Tensor) -> Tensor:
        one = torch.ones((), dtype=v.dtype, device=v.device)
        return torch.where(v > 0, one, self.scale * torch.exp(v.clamp(max=0)))


@dataclass(frozen=True)
class Hardtanh(Activation):
    """σ(v) = v clamped to [low, high]; f is an interval's indicator, so prox_{αf} = σ for every α."""

    low: float = -1.0
    high: float = 1.0
    ulps: ClassVar[float] = 1.0  # the ends, rounded to the tensor's dtype

    def __post_init__(self) -> None:
        _check(_number(self.low) < _number(self.high), f"Hardtanh needs low < high, got [{self.low}, {self.high}]")

    def __call__(self, v: Tensor) -> Tensor:
        return v.clamp(_as_held(self.low, v), _as_held(self.high, v))

    def prox(self, v: Tensor, alpha: float) -> Tensor:
        return self(v)

    def derivative(self, v: Tensor) -> Tensor:
        return ((v > self.low) & (v < self.high)).to(v.dtype)


@dataclass(frozen=True)
class SoftThreshold(Activation):
    """σ(v) = sign(v) max(|v| − threshold, 0), the proximal map of threshold · |·|."""

    threshold: float = 0.1

    def __post_init__(self) -> None:
        _check(
            0 <= _number(self.threshold) < math.inf, f"SoftThreshold threshold is {self.threshold}; it is not negative"
        )

    def __call__(self, v: Tensor) -> Tensor:
        return self.prox(v, 1.0)

    def prox(self, v: Tensor, alpha: float) -> Tensor:
        width = _as_held(alpha * self.threshold, v)
        return v - v.clamp(-width, width)

    def derivative(self, v: Tensor) -> Tensor:
        return ((v.abs() > self.threshold) | (self.threshold == 0)).to(v.dtype)

    def evaluation_error(self, p: Tensor) -> Tensor | float:
        return torch.finfo(p.dtype).eps * (p.abs() + self.threshold)  # the threshold is rounded too


ACTIVATIONS: dict[str, type[Activation]] = {
    kind.__name__: kind for kind in (ReLU, LeakyReLU, Tanh, Sigmoid, Softplus, ELU, Hardtanh, SoftThreshold)
}
"""What layers and files know by name. Whoever adds one, by ``ACTIVATIONS["Mine"] = Mine``, vouches for it: proofs then
rest on its being a proximal map that errs by no more than its ``evaluation_error``, and certificates say so."""

PROVED = frozenset(ACTIVATIONS.values())
"""The activations of which that is proved (theory §1)."""


def as_activation(value: Activation | str) -> Activation:
    """An :class:`Activation`, also from its name in any case; raises :class:`OptionError` for others, and for one that
    is seen to be no proximal map."""
    names = {name.lower(): kind for name, kind in ACTIVATIONS.items()}
    if isinstance(value, str) and value.lower() in names:
        value = names[value.lower()]()
    if not isinstance(value, Activation):
        raise OptionError(
            f"unknown activation {value!r}; a proximal map is needed: one of {', '.join(ACTIVATIONS)} "
            "(GELU and SiLU are not monotone with slopes in [0, 1]), or a subclass of Activation of your own"
        )
    if (seen := flaw(value)) is not None:
        raise OptionError(f"{value!r} is no proximal map of a scalar convex function: {seen}")
    return value


@torch.no_grad()
def flaw(activation: Activation) -> str | None:
    """Two points between which σ falls or rises faster than the identity, in words; None where none is seen among a few
    thousand in float64. What is proved of this library's own is not looked for: None."""
    if type(activation) in PROVED:
        return None
    with torch.device("cpu"):  # whatever the default is
        steps = torch.cat((torch.linspace(0, 40, 4001), torch.logspace(-12, 12, 1000))).double()
    v = torch.cat((-steps, steps)).sort().values
    p = activation(v)
    if not isinstance(p, Tensor) or p.shape != v.shape or p.dtype != v.dtype or not bool(p.isfinite().all()):
        return "it does not keep shape and dtype, or is not finite, at finite points"
    error = torch.zeros_like(p) + activation.evaluation_error(p)
    rise, run = p.diff(), v.diff()
    slack = error[1:] + error[:-1] + 2 * torch.finfo(v.dtype).eps * (v.abs()[1:] + v.abs()[:-1])
    wrong = ((rise < -slack) | (rise > run + slack)).nonzero()[:, 0]
    if not len(wrong):
        return None
    i = int(wrong[rise[wrong].sub(run[wrong]).abs().argmax()])
    return f"σ({v[i]:.6g}) = {p[i]:.6g} and σ({v[i + 1]:.6g}) = {p[i + 1]:.6g}; slopes must lie in [0, 1]"


def activation_from_dict(fields: Mapping[str, Any]) -> Activation:
    """The inverse of :meth:`Activation.to_dict`."""
    options = dict(fields)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise OptionError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    try:
        return ACTIVATIONS[name](**options)
    except TypeError as error:
        raise OptionError(f"activation {name} does not take {sorted(options)}") from error
