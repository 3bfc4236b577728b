"""Who takes part in a race: this library's solvers, and the published iteration in plain PyTorch.

A contender solves z = relu(W z + U x + b) for a batch x, from x to z, the injection U x + b once per solve
included. What depends on the weights alone (steps, inverses) every contender may compute beforehand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..layers import MonDEQ
from ..solvers import SOLVERS, PeacemanRachford, Solver

__all__ = ["OURS", "RACING", "REFERENCE", "Answer", "Contender", "Solve", "library", "plain"]

RACING = {name: kind for name, kind in SOLVERS.items() if all(option.default is not MISSING for option in fields(kind))}
"""Every solver of this library that needs no options."""


class Answer(NamedTuple):
    """z ``(B, n)`` and the steps it took, ``(B,)`` or one number for all (None where nobody counts)."""

    value: Tensor
    steps: Tensor | int | None


Solve = Callable[[Tensor], Answer]
"""x ``(B, d)`` -> answer."""


@dataclass(frozen=True)
class Contender:
    """One way to solve, with the settings among which its fastest sufficient one is looked for.

    ``settings`` go from fast and coarse to slow and fine; ``kind`` says what they are. ``make(setting, room)``
    gives the solve; ``room`` is the number of steps it is known to need, for those that reserve memory for their
    budget, and None before that is known. ``options`` are what is the same at every setting.
    """

    name: str
    family: str
    kind: str
    settings: tuple[float, ...]
    make: Callable[[float, int | None], Solve]
    options: dict[str, float] = field(default_factory=dict)


OURS = "equipoise"
REFERENCE = "PeacemanRachford"
"""The contender that the others' times are divided by."""

TOLERANCES = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5)


def library(layer: MonDEQ) -> list[Contender]:
    """Every solver of this library through ``layer.solve``, and the default one through ``layer(x)``."""

    def solving(solver: Solver) -> Callable[[float, int | None], Solve]:
        def make(tol: float, room: int | None) -> Solve:
            def solve(x: Tensor) -> Answer:
                solution = layer.solve(x, solver=solver, tol=tol)
                return Answer(solution.value, solution.steps)

            return solve

        return make

    def calling(tol: float, room: int | None) -> Solve:
        called = copy.deepcopy(layer).eval()
        called.tol, called.solver = tol, PeacemanRachford()
        return lambda x: Answer(called(x), None)

    # Peaceman–Rachford leads the table; the rest follow in the library's own order.
    names = sorted(RACING, key=lambda name: name != REFERENCE)
    contenders = [Contender(name, OURS, "tol", TOLERANCES, solving(RACING[name]())) for name in names]
    return [*contenders, Contender(f"{REFERENCE}, layer(x)", OURS, "tol", TOLERANCES, calling)]


def plain(layer: MonDEQ) -> Contender:
    """Peaceman–Rachford as published [WK20, LLC26], α = 1, in plain PyTorch: five passes over memory a step.

    Kinder to it than to us: the injection is hoisted, the inverse is computed beforehand, and it runs exactly the
    steps it needs, without a look at its residual.
    """
    W, U, b = layer.weight.detach(), layer.input_weight.detach(), layer.bias.detach()
    resolvent = torch.linalg.inv(2 * torch.eye(len(W), dtype=W.dtype) - W).mT.contiguous()

    def make(steps: float, room: int | None) -> Solve:
        def solve(x: Tensor) -> Answer:
            q = linear(x, U, b)
            u, v = torch.zeros_like(q), torch.zeros_like(q)
            for _ in range(int(steps)):
                half = 2 * v - u
                u = 2 * ((half + q) @ resolvent) - half
                v = u.relu()
            return Answer(v, int(steps))

        return solve

    counts = tuple(float(n) for n in [*range(5, 100, 5), *range(100, 501, 25)])
    return Contender("PeacemanRachford, α = 1", "plain PyTorch", "steps", counts, make, {"alpha": 1.0})
