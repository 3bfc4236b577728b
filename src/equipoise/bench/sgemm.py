"""How much of the machine's own matrix-product rate the solver reaches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from ..layers import MonDEQ
from .measure import interleave, median
from .race import Work

__all__ = ["share_of_sgemm"]


@torch.no_grad()
def share_of_sgemm(layer: MonDEQ, work: Work, tol: float, size: int, rounds: int) -> dict[str, Any]:
    """The rate of Peaceman–Rachford's products over that of one ``size``³ float32 product, both in this run.

    Counted are 2n² operations a step a sample, over the steps that each sample took; the time is that of the
    whole solve less that of the injection. Reflections, looks at the residual and the error bound are thus paid for
    and not counted.
    """
    x = work.batches[0]
    steps = float(layer.solve(x, tol=tol).steps.double().sum())
    a, b = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0))
    U, bias = layer.input_weight.detach(), layer.bias.detach()
    tasks: dict[str, Callable[[], object]] = {
        "sgemm": lambda: a @ b,
        "solve": lambda: layer.solve(x, tol=tol),
        "injection": lambda: linear(x, U, bias),
    }
    for task in tasks.values():
        task()
    times = interleave(tasks, rounds)
    peaks = [2 * size**3 / seconds for seconds in times["sgemm"]]
    # Paired by round: both sides of a pair saw the same machine.
    spent = [solve - inject for solve, inject in zip(times["solve"], times["injection"], strict=False)]
    rates = [2 * layer.features**2 * steps / seconds for seconds in spent]
    return {
        "batch": len(x),
        "size": size,
        "sgemm_gflops": median(peaks) / 1e9,
        "solve_gflops": median(rates) / 1e9,
        "share": median([rate / peak for rate, peak in zip(rates, peaks, strict=False)]),
        "steps": steps / len(x),
        "solve_seconds": median(times["solve"]),
        "injection_seconds": median(times["injection"]),
    }
