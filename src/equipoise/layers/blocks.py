"""The modules that a multiscale map is made of, and their places in it (theory §9, [SI26])."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from .. import verified
from ..errors import OptionError
from ..operators.conv_norm import conv_norm, torus
from ..parametrizations.lipschitz import CappedKernel, check_cap
from ..quantization.codes import QuantizedTensor
from ..quantization.schemes import Scheme, Structured
from .cache import Derived
from .multiscale import Branch, Cell, Shape, gain_matrix, weights_of_fusion
from .steps import Conv, GroupMean, Path, Slope, Sort, Standardize, Step, Up

__all__ = ["CappedConv2d", "CodedKernel", "FreeConv2d", "MeanGroupNorm", "Multiscale", "Plan", "Use"]

BELOW = 1e-5
"""A kernel is scaled to this much below its cap, so that rounding its entries does not lift it above."""

START = 1.5
"""tanh of it is where normalizations begin, in units of their cap."""


Use = Literal["training", "evaluation", "proof"]
"""What a kernel is computed for: with the norm that a power iteration sees; with the proved one; and for a proof, with
the numbers exactly as stored and the norm that is proved of them."""


FREE = 0.01
"""Deviation that free kernels begin with, as in the code of multiscale DEQs: the injection then outweighs C₂, and the
first equilibria are found."""


class Place(NamedTuple):
    """Where a convolution stands: channels in and out, kernel size, stride, and the size (H, W) of what comes in."""

    inputs: int
    outputs: int
    kernel_size: int
    stride: int
    size: tuple[int, int]


@final
class CodedKernel(nn.Module):
    """A kernel as integer codes and scales; ``dtype`` is that of the kernel that is multiplied by.

    State: ``values.codes (o, i, k, k)``, ``values.scale``.
    """

    def __init__(self, values: QuantizedTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.values, self.dtype = values, dtype

    def forward(self) -> Tensor:
        """What the codes stand for, float64."""
        return self.values.dequantize()

    def _apply(self, fn: Any, recurse: bool = True) -> CodedKernel:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


@final
class CappedConv2d(nn.Module):
    """x ↦ K ⋆ x with ‖K ⋆ ·‖₂ <= ``cap`` on images of ``size``, zero padding, no bias (theory §8).

    In training the norm is the value of a power iteration; in evaluation the kernel is scaled by the proved bound.
    State: ``kernel.weight (o, i, k, k)``, ``kernel.vector``; of codes ``kernel.values.codes``, ``kernel.values.scale``.
    """

    kernel: CappedKernel | CodedKernel

    def __init__(self, place: Place, cap: float) -> None:
        super().__init__()
        self.place = place
        around = torus(place.size, place.kernel_size, place.stride)
        deviation = math.sqrt(2 / (place.inputs * place.kernel_size**2))
        self.kernel = CappedKernel(_drawn(place, deviation), cap, around, place.stride)
        self._derived = Derived()

    def step(self, use: Use) -> Conv:
        """The convolution with its kernel computed."""
        if isinstance(self.kernel, CappedKernel) and use == "training":
            return Conv(self.kernel(), stride=self.place.stride)
        kept = self._derived.of(self.kernel)
        if isinstance(self.kernel, CodedKernel):
            kernel = self.kernel()
            if use != "proof":
                kernel = kernel.to(self.kernel.dtype)
        else:
            kernel = self.kernel(self._sigma(self.kernel, kept))
        return Conv(kernel, self._norm(kernel, kept) if use == "proof" else math.inf, self.place.stride)

    @torch.no_grad()
    def quantize(self, scheme: Scheme) -> None:
        """Put codes in the place of the kernel; :class:`Structured` lowers their scale until the cap is proved of them.

        Raises:
            OptionError: a scheme that does not act on kernels, or bits of parts that a kernel does not have.
        """
        assert isinstance(self.kernel, CappedKernel)
        kernel, cap = self.step("evaluation").kernel, self.kernel.cap
        values = QuantizedTensor.fit(kernel, scheme.bits, scheme.granularity, scheme.scale)
        if isinstance(scheme, Structured):
            for _ in range(8):
                norm = conv_norm(values.dequantize(), self.place.size, self.place.stride)
                if norm * (1 + BELOW / 10) <= cap:
                    break
                values = QuantizedTensor(values.codes, values.scale * (cap / norm * (1 - BELOW)), values.bits)
        self.kernel = CodedKernel(values, kernel.dtype).to(kernel.device)

    def _sigma(self, kernel: CappedKernel, kept: dict[Any, Any]) -> Tensor:
        """A little more than the proved norm of V, with the gradient that the power iteration sees."""
        if (key := ("sigma", self.place)) not in kept:
            kept[key] = conv_norm(kernel.weight, self.place.size, self.place.stride) * (1 + BELOW)
        value = kernel.weight.new_tensor(kept[key])
        if torch.is_grad_enabled() and kernel.weight.requires_grad and value > 0:
            estimate = kernel.estimate()
            if bool(torch.isfinite(estimate.detach())):  # its squares may overflow
                return value + (estimate - estimate.detach())
        return value

    def _norm(self, kernel: Tensor, kept: dict[Any, Any]) -> float:
        if (key := ("norm", self.place, getattr(self.kernel, "cap", None))) not in kept:
            found = conv_norm(kernel, self.place.size, self.place.stride)
            if isinstance(self.kernel, CodedKernel) and not self.kernel.values.exact:
                slip = 4 * verified.UNIT * verified.absolute_norm(kernel.abs().sum((2, 3)))
                found = verified.up(found + slip)
            kept[key] = found
        norm: float = kept[key]
        return norm

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.place._asdict().items())


@final
class FreeConv2d(nn.Module):
    """x ↦ K ⋆ x without a cap, zero padding, no bias. State: ``weight (o, i, k, k)``."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        self.weight = nn.Parameter(_drawn(place, FREE))

    def step(self, use: Use) -> Conv:
        return Conv(self.weight, stride=self.place.stride)


@final
class MeanGroupNorm(nn.Module):
    """x ↦ γ (x − mean over its group) + β with |γ| < ``cap``: γ = cap · tanh(raw); without ``cap`` no γ and β.

    State: ``raw (C,)``, ``bias (C,)``.
    """

    def __init__(self, channels: int, groups: int, cap: float | None) -> None:
        super().__init__()
        self.groups, self.cap = groups, cap
        self.raw = None if cap is None else nn.Parameter(torch.full((channels,), START))
        self.bias = None if cap is None else nn.Parameter(torch.zeros(channels))

    def step(self) -> GroupMean:
        if self.raw is None or self.cap is None:
            return GroupMean(self.groups)
        return GroupMean(self.groups, self.cap * torch.tanh(self.raw), self.bias)


def standardize(norm: nn.GroupNorm) -> Step:
    """The step of a standard group normalization."""
    return Standardize(norm.num_groups, norm.weight, norm.bias)


def _drawn(place: Place, deviation: float) -> Tensor:
    return torch.randn(place.outputs, place.inputs, place.kernel_size, place.kernel_size) * deviation


@dataclass(frozen=True)
class Plan:
    """What a multiscale map looks like, without its weights.

    ``shapes``: (C, H, W) of every branch, halving; ``expansion``: how much C₁ widens; ``groups`` of its normalizations
    and ``post_groups`` of the last; ``slope`` s, ``activation`` "relu" or "groupsort"; ``residual`` a, ``fusion`` β;
    ``norm_cap`` and ``affine_cap``, None where nothing is capped: then the normalizations are standard ones and the
    branches are summed up.

    Raises:
        OptionError: channels that the groups do not divide, and values out of their range.
    """

    shapes: tuple[Shape, ...]
    expansion: int = 5
    groups: int = 8
    post_groups: int = 4
    slope: float = 0.4
    activation: str = "relu"
    residual: float = 0.5
    fusion: float = 0.3
    norm_cap: float | None = 2.0
    affine_cap: float = 1.0

    def __post_init__(self) -> None:
        for name in ("expansion", "groups", "post_groups"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} is {value!r}; it is a positive integer")
        for channels, _, _ in self.shapes:
            for name in ("groups", "post_groups"):
                if channels % getattr(self, name):
                    raise OptionError(f"{name} is {getattr(self, name)}, which does not divide {channels} channels")
            if self.activation == "groupsort" and channels % 2:
                raise OptionError(f"groupsort orders pairs, and {channels} channels are odd")
        if self.activation not in ("relu", "groupsort"):
            raise OptionError(f"activation is {self.activation!r}; it is 'relu' or 'groupsort'")
        for name in ("residual", "fusion"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise OptionError(f"{name} is {value!r}; it is a weight between 0 and 1")
        if isinstance(self.slope, bool) or not isinstance(self.slope, (int, float)) or not 0 < self.slope < math.inf:
            raise OptionError(f"slope is {self.slope!r}; it is a finite number above 0")
        for cap in (self.norm_cap, self.affine_cap):
            if cap is not None:
                check_cap(cap)

    def convolutions(self) -> dict[str, Place]:
        """Every convolution of the map by its name."""
        found = {}
        for i, (c, h, w) in enumerate(self.shapes):
            found[f"widen_{i}"] = Place(c, self.expansion * c, 3, 1, (h, w))
            found[f"narrow_{i}"] = Place(self.expansion * c, c, 3, 1, (h, w))
            found[f"post_{i}"] = Place(c, c, 1, 1, (h, w))
            for j, (d, tall, wide) in enumerate(self.shapes):
                if j > i:
                    found[f"up_{i}_{j}"] = Place(d, c, 1, 1, (tall, wide))
                for hop in range(i - j):
                    last = hop == i - j - 1
                    found[f"down_{i}_{j}_{hop}"] = Place(d, c if last else d, 3, 2, (tall >> hop, wide >> hop))
        return found

    def norms(self) -> dict[str, tuple[int, int, bool]]:
        """(channels, groups, whether affine) of every normalization: one behind each convolution, one more a branch."""
        found = {
            name: (place.outputs, self.post_groups if name.startswith("post") else self.groups, name[:4] != "post")
            for name, place in self.convolutions().items()
        }
        return {**found, **{f"out_{i}": (c, self.groups, True) for i, (c, _, _) in enumerate(self.shapes)}}

    def cell(self, conv: Callable[[str], Step], norm: Callable[[str], Step], probability: float = 0.0) -> Cell:
        """The program with the steps that ``conv`` and ``norm`` give for each name."""
        act = Slope(self.slope) if self.activation == "relu" else Sort(self.slope)

        def both(name: str) -> Path:
            return conv(name), norm(name)

        def path(i: int, j: int) -> Path:
            if j > i:
                return (*both(f"up_{i}_{j}"), Up(2 ** (j - i)))
            steps: list[Step] = []
            for hop in range(i - j):
                steps += [*([act] if hop else []), *both(f"down_{i}_{j}_{hop}")]
            return tuple(steps)

        b = range(len(self.shapes))
        branches = tuple(
            Branch(
                (*both(f"widen_{i}"), act, conv(f"narrow_{i}")),
                (norm(f"narrow_{i}"),),
                (act, norm(f"out_{i}")),
                (act, *both(f"post_{i}")),
            )
            for i in b
        )
        weights = weights_of_fusion(len(b), self.fusion) if self.norm_cap is not None else [[1.0 for _ in b] for _ in b]
        fuse = tuple(tuple(path(i, j) for j in b) for i in b)
        return Cell(self.shapes, branches, fuse, weights, self.residual, probability)

    def nominal(self, norm_cap: float, probability: float = 0.0) -> Tensor:
        """N ``(b, b)`` where every convolution has norm ``norm_cap`` and every normalization its cap."""
        affine = {name: self.affine_cap if is_affine else 1.0 for name, (_, _, is_affine) in self.norms().items()}
        return gain_matrix(self.cell(lambda _: Nominal(norm_cap), lambda name: Nominal(affine[name]), probability))

    def cap_for(self, contraction: float, probability: float = 0.0) -> float:
        """The largest cap, found by bisection, for which ‖N‖₂ <= ``contraction``.

        Raises:
            OptionError: ``contraction`` not in (0, 1).
        """
        number = isinstance(contraction, (int, float)) and not isinstance(contraction, bool)
        if not number or not 0 < contraction < 1:
            raise OptionError(f"contraction is {contraction!r}; it is a factor between 0 and 1, both excluded")
        low, high = 0.0, 1.0
        while verified.spectral_norm(self.nominal(high, probability)) <= contraction and high < 2.0**20:
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            inside = verified.spectral_norm(self.nominal(middle, probability)) <= contraction
            low, high = (middle, high) if inside else (low, middle)
        return check_cap(low)


@final
@dataclass(frozen=True, eq=False)
class Nominal(Step):
    """A step of which only a norm is known."""

    norm: float

    def __call__(self, x: Tensor) -> Tensor:
        raise AssertionError("a nominal step computes nothing")

    def lipschitz(self) -> float:
        return self.norm


@final
class Multiscale(nn.Module):
    """The weights of a map: ``convs`` and ``norms`` by the names of its plan."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        cap = plan.norm_cap
        self.convs = nn.ModuleDict(
            {
                name: FreeConv2d(place) if cap is None else CappedConv2d(place, cap)
                for name, place in plan.convolutions().items()
            }
        )
        self.norms = nn.ModuleDict(
            {
                name: nn.GroupNorm(groups, channels, affine=True)
                if cap is None
                else MeanGroupNorm(channels, groups, plan.affine_cap if affine else None)
                for name, (channels, groups, affine) in plan.norms().items()
            }
        )

    def cell(self, use: Use, probability: float = 0.0) -> Cell:
        """The program with its weights computed, once for a whole solve."""
        convs = {name: conv.step(use) for name, conv in self.convs.items()}  # type: ignore[operator]
        norms = {
            name: standardize(norm) if isinstance(norm, nn.GroupNorm) else norm.step()  # type: ignore[operator]
            for name, norm in self.norms.items()
        }
        return self.plan.cell(convs.__getitem__, norms.__getitem__, probability)
