"""Mixed precision: bits of A, K, U, b and the head of their own, chosen under a byte budget (theory §5).

What each part adds to the displacement is estimated at the float network's equilibria, and the assignment of least
sum within the budget is found exactly. The estimate only proposes: certificates of the quantized versions decide.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import OptionError
from .layers.chain import chain, equilibrium_layers, final_head
from .layers.linear import QuantizedLinear, affine64
from .layers.mondeq import MonDEQ
from .operators.quantized import StructuredWeight
from .parametrizations import Dense, Monotone
from .quantization.codes import QuantizedTensor
from .quantization.schemes import Structured
from .quantize import quantize, size

__all__ = ["Menu", "Option", "Parts", "Trial", "assign", "check_budget", "measure", "parts_of", "scheme_of"]

CHUNK = 4096
"""Samples worked on at a time."""
FLOAT64 = torch.float64
TINY = 1e-300


class Parts(NamedTuple):
    """Bits of every part; None keeps floats."""

    A: int | None
    K: int | None
    U: int | None
    b: int | None
    head: int | None

    def __str__(self) -> str:
        """ "2/4/1/8/float"."""
        return "/".join("float" if bits is None else str(bits) for bits in self)


class Contributions(NamedTuple):
    """What every part adds to the mean displacement."""

    A: float
    K: float
    U: float
    b: float
    head: float


class Option(NamedTuple):
    """One width of one part: its packed bytes, and what it adds to the mean displacement."""

    bits: int | None
    size_bytes: int
    contribution: float


class Trial(NamedTuple):
    """A version as it was really made: ``moved`` is its mean proved displacement, inf where nothing is proved."""

    size_bytes: int
    moved: float


Judge = Callable[[Parts], Trial]


@dataclass(frozen=True)
class Menu:
    """What may be chosen: ``options`` of A, K, U, b and the head, in this order, and the bytes of all else."""

    options: tuple[tuple[Option, ...], ...]
    other_bytes: int

    @property
    def smallest(self) -> int:
        """The least bytes that an assignment takes."""
        return self.other_bytes + sum(min(option.size_bytes for option in part) for part in self.options)

    def size(self, parts: Parts) -> int:
        """Bytes of the whole model at ``parts``."""
        return self.other_bytes + sum(option.size_bytes for option in self._at(parts))

    def contributions(self, parts: Parts) -> Contributions:
        """What each part adds to the mean displacement at ``parts``."""
        return Contributions(*(option.contribution for option in self._at(parts)))

    def uniform(self) -> list[Parts]:
        """The assignments with bits that are all alike: for A and K only, the rest as fine as may be; and for all."""
        found = []
        for width in self.options[0]:
            rest = [[option.bits for option in part] for part in self.options[2:]]
            finest = [None if None in widths else max(widths, key=lambda bits: bits or 0) for widths in rest]
            alike = [width.bits if width.bits in widths else fine for widths, fine in zip(rest, finest, strict=True)]
            found += [Parts(width.bits, width.bits, *others) for others in (finest, alike)]
        return found

    def head_at(self, bits: int | None) -> Menu:
        """The menu with no choice of the head, whose contribution then counts nowhere."""
        kept = [option._replace(contribution=0.0) for option in self.options[-1] if option.bits == bits]
        return Menu((*self.options[:-1], tuple(kept)), self.other_bytes)

    def best(self, max_bytes: int, power: int = 1) -> Parts | None:
        """The assignment of least (Σ cᵖ)^(1/p) + c_head within ``max_bytes``, p = ``power``, c the contributions of
        A, K, U, b; of equals, the smaller. None where nothing fits.

        Exact: the whole product of options is looked at. p = 1 minimises the bound, by the triangle inequality;
        p = 2 is closer to the truth where the errors of the parts are about orthogonal.
        """
        sizes = _outer([[option.size_bytes for option in part] for part in self.options]) + self.other_bytes
        fits = sizes <= max_bytes
        if not bool(fits.any()):
            return None
        *parts, head = [[option.contribution for option in part] for part in self.options]
        state = _outer([[cost**power for cost in part] for part in parts]) ** (1 / power)
        costs = state[..., None] + torch.tensor(head, dtype=FLOAT64)
        tied = fits & (costs == costs[fits].min())
        index = torch.where(tied, sizes, math.inf).argmin()
        places = torch.unravel_index(index, sizes.shape)
        return Parts(*(part[int(place)].bits for part, place in zip(self.options, places, strict=True)))

    def _at(self, parts: Parts) -> list[Option]:
        return [
            next(option for option in part if option.bits == bits)
            for part, bits in zip(self.options, parts, strict=True)
        ]


def _outer(columns: Sequence[Sequence[float]]) -> Tensor:
    """The sums of one number of every column, for every choice: one axis a column; bytes stay exact in float64."""
    start = torch.zeros((), dtype=FLOAT64)
    return reduce(lambda total, column: total[..., None] + torch.tensor(column, dtype=FLOAT64), columns, start)


def scheme_of(parts: Parts) -> Structured:
    """The scheme that gives every part its bits."""
    A, K, U, b, head = parts
    assert A is not None
    return Structured(bits=A, skew_bits=K, input_bits=U, bias_bits=b, head_bits=head)


def parts_of(scheme: Structured) -> Parts:
    """The bits of every part that ``scheme`` names."""
    K = scheme.bits if scheme.skew_bits is None else scheme.skew_bits
    return Parts(scheme.bits, K, scheme.input_bits, scheme.bias_bits, scheme.head_bits)


def check_budget(menu: Menu, max_bytes: int) -> None:
    """Raise :class:`OptionError` where no assignment fits."""
    if max_bytes < menu.smallest:
        raise OptionError(
            f"max_bytes={max_bytes}: nothing fits; the smallest assignment of bits takes {menu.smallest} bytes. Give"
            " at least that, or fewer bits to choose from"
        )


def assign(menu: Menu, budgets: Iterable[int], uniform: Sequence[Parts], judge: Judge) -> dict[int, Parts]:
    """For each byte budget the best assignment that was proved to be so: never worse than a uniform one that fits.

    Finalists, all judged: the best by estimate, for both powers, with the head free and as the best uniform
    assignment has it; that uniform one; the winner at the next smaller budget. Of those that are proved to move no
    further than the uniform one, the least of ``moved`` plus the head's contribution wins.

    Args:
        budgets: bytes; each is checked with :func:`check_budget`.
        uniform: the assignments not to be worse than.
        judge: quantizes and certifies an assignment; it is asked again and again.
    """
    found: dict[int, Parts] = {}
    before: Parts | None = None
    for budget in sorted(set(budgets)):
        check_budget(menu, budget)
        even = [parts for parts in uniform if judge(parts).size_bytes <= budget]
        rival = min(even, key=lambda parts: judge(parts).moved, default=None)
        limit = math.inf if rival is None else judge(rival).moved
        menus = (menu,) if rival is None else (menu, menu.head_at(rival.head))
        finalists = [m.best(budget, power) for m in menus for power in (1, 2)] + [rival, before]
        tried = [(judge(parts), parts) for parts in dict.fromkeys(finalists) if parts is not None]
        kept = [(trial, parts) for trial, parts in tried if trial.size_bytes <= budget and trial.moved <= limit]
        if kept:
            before = min(kept, key=lambda t: (t[0].moved + menu.contributions(t[1]).head, t[0].size_bytes))[1]
            found[budget] = before
    return found


@torch.no_grad()
def measure(model: nn.Module, x: Tensor, widths: Iterable[int], input_bits: int | None = None) -> Menu:
    """The bytes and the contributions of every part of ``model`` at every width, means over the samples ``x``.

    With ΔW = (AᵀA − ÃᵀÃ) + ΔK, T3 gives ‖z* − z̃*‖ ≤ (‖(AᵀA − ÃᵀÃ) z*‖ + ‖ΔK z*‖ + ‖ΔU x‖ + ‖Δb‖)/m: the terms are the
    contributions of A, K, U, b. That of the head is ‖ΔV z*‖/‖V‖₂, the displacement that moves the scores as much.
    In a chain every equilibrium layer gets the same bits; the displacement of a layer grows by at most ‖U‖/m or ‖V‖
    on its way through those that follow, and products of two changes are left out.

    Args:
        model: a float model that ``quantize`` takes.
        x: ``(B, …)`` as the model takes them.
        widths: bits to choose from; U, b and the head may stay floats as well.
        input_bits: the bits of U, where they are not to be chosen.

    Raises:
        StructureError, InputError: a model that cannot be quantized.
        NotWellPosedError: no proved margin to keep.
    """
    own = sorted(set(widths))
    every: list[int | None] = [*own, None]
    head = final_head(model)
    choices: tuple[Sequence[int | None], ...] = (
        own,
        own,
        every if input_bits is None else [input_bits],
        every,
        [None] if head is None else every,
    )
    tried = sorted({*own, *([] if input_bits is None else [input_bits])})
    stops: list[_Stop] = []
    costs: dict[int | None, list[float]] = {None: [0.0] * 5}
    taken: dict[int | None, list[int]] = {None: _bytes(model, head)}
    other = 0
    for b in tried:
        small = quantize(model, Structured(b, input_bits=b, bias_bits=b, head_bits=None if head is None else b))
        stops = stops or _stops(model, x)  # only now is it sure that the model can be quantized
        costs[b], taken[b] = _contributions(stops, small), _bytes(small, head)
        other = size(small) - sum(taken[b])
    options = [
        tuple(Option(bits, taken[bits][place], costs[bits][place]) for bits in part)
        for place, part in enumerate(choices)
    ]
    return Menu(tuple(options), other)


class _Stop(NamedTuple):
    """An equilibrium layer or the head of the float network, its input and output on the samples, and what turns a
    change of what it computes there into a displacement: 1/m, times the growth through the layers that follow."""

    name: str
    module: nn.Module
    given: Tensor
    out: Tensor
    gain: float
    A: Tensor | None = None
    K: Tensor | None = None


def _stops(model: nn.Module, x: Tensor) -> list[_Stop]:
    modules, head = chain(copy.deepcopy(model).eval()), final_head(model)
    points = [x]
    for _, module in modules:
        points.append(torch.cat([module(a) for a in points[-1].split(CHUNK)]))
    found: list[_Stop] = []
    growth: float | None = None  # from the output of the module at hand to that of the last equilibrium layer
    for (name, module), given, out in reversed(list(zip(modules, points, points[1:], strict=False))):
        if isinstance(module, MonDEQ):
            assert isinstance(module.recurrent, (Monotone, Dense))
            A, K, margin = module.recurrent.factors()
            growth = 1.0 if growth is None else growth
            found.append(_Stop(name, module, given, out, growth / margin, _wide(A), _wide(K)))
            growth *= _norm(_affine(module.injection)[0]) / margin
        elif isinstance(module, nn.Linear) and name == head:
            found.append(_Stop(name, module, given, out, 1 / max(_norm(module.weight), TINY)))
        elif isinstance(module, nn.Linear) and growth is not None:
            growth *= _norm(module.weight)
    return found


def _contributions(stops: list[_Stop], small: nn.Module) -> list[float]:
    """Of A, K, U, b and the head, means over the samples, for the codes that ``small`` holds."""
    sums = [0.0] * 5
    for stop in stops:
        float_map, module = stop.module, small.get_submodule(stop.name)
        if isinstance(module, MonDEQ):
            assert isinstance(module.recurrent, StructuredWeight)
            assert stop.A is not None
            assert stop.K is not None
            A, K = _wide(module.recurrent.A.dequantize()), _wide(module.recurrent.K.dequantize())
            assert isinstance(float_map, MonDEQ)
            (dU, db), z = _change(module.injection, float_map.injection), stop.out
            found = [_moved(z, stop.A.mT @ stop.A - A.mT @ A), _moved(z, K - stop.K), _moved(stop.given, dU)]
            found += [float(db.norm()), 0.0]
        else:
            found = [0.0] * 4 + [_moved(stop.given, _change(module, float_map)[0])]
        sums = [total + stop.gain * cost for total, cost in zip(sums, found, strict=True)]
    return sums


def _bytes(model: nn.Module, head: str | None) -> list[int]:
    """Bytes of A, K, U, b and the head's weight; those of A and K only in codes. A layer used twice counts once."""
    sums = [0, 0, 0, 0, 0 if head is None else _linear_bytes(model.get_submodule(head))[0]]
    for layer in {id(layer): layer for _, layer in equilibrium_layers(model)}.values():
        weight = layer.recurrent
        codes = (weight.A.packed_bytes, weight.K.packed_bytes) if isinstance(weight, StructuredWeight) else (0, 0)
        sums = [total + count for total, count in zip(sums, (*codes, *_linear_bytes(layer.injection), 0), strict=True)]
    return sums


def _linear_bytes(linear: nn.Module) -> tuple[int, int]:
    assert isinstance(linear, (nn.Linear, QuantizedLinear))
    weight, bias = (
        part.packed_bytes if isinstance(part, QuantizedTensor) else 0 if part is None else part.nbytes
        for part in (linear.weight, linear.bias)
    )
    return weight, bias


def _affine(linear: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(linear, (nn.Linear, QuantizedLinear))
    V, c, _, _ = affine64(linear)
    return V, c


def _change(linear: nn.Module, reference: nn.Module) -> tuple[Tensor, Tensor]:
    """(Ṽ − V, c̃ − c)."""
    (V, c), (R, s) = _affine(linear), _affine(reference)
    return V - R, c - s


def _moved(points: Tensor, change: Tensor) -> float:
    """Mean ‖change a‖₂ over the points a."""
    norms = [(_wide(a) @ change.mT).norm(dim=1) for a in points.flatten(1).split(CHUNK)]
    return float(torch.cat(norms).mean()) if len(points) else 0.0


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", FLOAT64)


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(_wide(matrix), 2))
