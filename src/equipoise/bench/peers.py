"""torchdeq's three solvers as contenders. torchdeq is imported here, when asked for, and nowhere else."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..errors import MissingExtraError
from ..layers import MonDEQ
from .contenders import Answer, Contender, Solve

__all__ = ["FAMILY", "peers"]

FAMILY = "torchdeq"

BUDGETS = {"fixed_point_iter": 2000, "anderson": 400, "broyden": 120}
"""Steps while the tolerance is looked for. Broyden reserves memory for all of its budget."""

TOLERANCES = (1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 1e-7)
DAMPINGS = (0.5, 0.25, 0.125)
PROBED = 1000


def peers(layer: MonDEQ, samples: Tensor) -> list[Contender]:
    """torchdeq's solvers on v ↦ (1 − β) v + β relu(W v + q), q computed once per solve, relative stopping.

    β = ½; a positive margin does not make that map contract, so for the plain iteration it is halved until the
    iteration settles on ``samples (N, d)``. The map is fused as far as PyTorch allows, and the budget of the timed
    runs is what the solver was seen to need, since torchdeq pads its statistics (and Broyden its memory) to it.

    Raises:
        MissingExtraError: torchdeq is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in its docstrings
            from torchdeq import get_deq
    except ImportError as error:
        raise MissingExtraError("torchdeq is compared with: pip install 'equipoise[bench]'") from error
    weights = layer.weight.detach().mT.contiguous(), layer.input_weight.detach(), layer.bias.detach()
    dampings = dict.fromkeys(BUDGETS, DAMPINGS[0]) | {"fixed_point_iter": _settling(samples[:PROBED], *weights)}
    return [
        Contender(name, FAMILY, "tol", TOLERANCES, _making(get_deq, name, beta, *weights), {"damping": beta})
        for name, beta in dampings.items()
    ]


def _damped(v: Tensor, q: Tensor, W: Tensor, beta: float) -> Tensor:
    return torch.lerp(v, torch.addmm(q, v, W).relu_(), beta)


@torch.no_grad()
def _settling(x: Tensor, W: Tensor, U: Tensor, b: Tensor) -> float:
    """The largest damping with which the plain iteration settles on ``x``; the smallest where none does."""
    q = linear(x, U, b)
    for beta in DAMPINGS:
        v = torch.zeros_like(q)
        for _ in range(BUDGETS["fixed_point_iter"] // 2):
            v = _damped(v, q, W, beta)
        if bool(((_damped(v, q, W, beta) - v).norm(dim=1) <= 1e-5 * v.norm(dim=1)).all()):
            break
    return beta


def _making(
    get_deq: Any, name: str, beta: float, W: Tensor, U: Tensor, b: Tensor
) -> Callable[[float, int | None], Solve]:
    def make(tol: float, room: int | None) -> Solve:
        budget = room or BUDGETS[name]
        deq = get_deq(f_solver=name, f_max_iter=budget, f_tol=tol, f_stop_mode="rel").eval()

        def solve(x: Tensor) -> Answer:
            q, calls = linear(x, U, b), 0

            def step(v: Tensor) -> Tensor:
                nonlocal calls
                calls += 1
                return _damped(v, q, W, beta)

            (z,), _ = deq(step, torch.zeros_like(q))
            return Answer(z, calls)

        return solve

    return make
