"""A race: each contender's fastest setting that reaches the accuracy, then all of them timed in rounds."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..errors import ConvergenceWarning
from ..layers import MonDEQ
from .contenders import OURS, REFERENCE, Contender, Solve
from .measure import Tracker, interleave, median, relative_error, spread, truth
from .peers import FAMILY

__all__ = ["GOAL", "Work", "race", "work_for"]

GOAL = 1e-4
"""The worst relative error of a sample, against float64, that a contender has to reach."""

PATIENCE = 120.0
"""Seconds after which no further setting of a contender is tried."""

LONG = 0.5
"""Seconds from which on one setting is enough."""


@dataclass(frozen=True)
class Work:
    """Batches ``(B, d)`` of one size, and the equilibrium of each ``(B, n)`` in float64."""

    batches: tuple[Tensor, ...]
    truths: tuple[Tensor, ...]


class Run(NamedTuple):
    """One pass over the work: worst error, seconds, mean and most steps of a sample (None where not counted)."""

    error: float
    seconds: float
    steps: float | None
    most: int | None


class Entry(NamedTuple):
    """A setting that reaches the goal."""

    setting: float
    solve: Solve
    run: Run


class Form(NamedTuple):
    """What a contender was found to be able to do: its entries, at most two, and the settings tried, with errors."""

    entries: list[Entry]
    tried: list[float]
    errors: list[float]


def work_for(layer: MonDEQ, x: Tensor, batch: int, count: int) -> Work:
    """``count`` batches of ``batch`` samples of ``x``, whose rows repeat where there are too few."""
    rows = torch.arange(batch * count) % len(x)
    batches = tuple(x[rows].contiguous().split(batch))
    W, U, b = layer.weight.detach(), layer.input_weight.detach().double(), layer.bias.detach().double()
    exact = truth(W, linear(x[rows].double(), U, b))
    return Work(batches, tuple(exact.split(batch)))


@torch.no_grad()
def race(
    layer: MonDEQ, contenders: list[Contender], work: Work, rounds: int, tell: Tracker, label: str
) -> dict[str, Any]:
    """Times per solve as a dict; ``ratio`` is to this library's Peaceman–Rachford, in this very run."""
    U, b = layer.input_weight.detach(), layer.bias.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # who does not reach the goal is reported as such
        forms = []
        for contender in contenders:
            tell(f"{label}: {contender.name}")
            forms.append(tune(contender, work))
        tell(f"{label}: side by side")
        tasks = {
            f"{i} {entry.setting}": _over(entry.solve, work) for i, form in enumerate(forms) for entry in form.entries
        }
        times = interleave({"injection": lambda: [linear(x, U, b) for x in work.batches]} | tasks, rounds)
    count = len(work.batches)
    rows = []
    for i, (contender, form) in enumerate(zip(contenders, forms, strict=True)):
        timed = [(entry, times[f"{i} {entry.setting}"]) for entry in form.entries]
        best = min(timed, key=lambda pair: median(pair[1]), default=None)
        rows.append(_row(contender, form, best, count))
    return {
        "batch": len(work.batches[0]),
        "solves": count,
        "injection_seconds": median(times["injection"]) / count,
        "contenders": rows,
        **_compared(rows),
    }


def tune(contender: Contender, work: Work) -> Form:
    """The coarsest settings of the contender that reach the goal, two of them: the rounds tell which is faster.

    A still finer one only does more of the same; where a pass is long, so does the second.
    """
    form = Form([], [], [])
    begin = time.perf_counter()
    for setting in contender.settings:
        first = attempt(contender.make(setting, None), work)
        form.tried.append(setting)
        form.errors.append(first.error)
        if first.error <= GOAL:
            solve = contender.make(setting, first.most)
            again = attempt(solve, work)
            if again.error <= GOAL:
                form.entries.append(Entry(setting, solve, again))
        wanted = 1 if first.seconds > LONG else 2
        # not lower than two settings ago: a budget is spent, or rounding is reached
        stuck = len(form.errors) > 2 and form.errors[-1] >= 0.99 * form.errors[-3]
        if len(form.entries) >= wanted or stuck or time.perf_counter() - begin > PATIENCE:
            break
    return form


def attempt(solve: Solve, work: Work) -> Run:
    begin = time.perf_counter()
    answers = [solve(x) for x in work.batches]
    seconds = time.perf_counter() - begin
    error = max(relative_error(answer.value, z) for answer, z in zip(answers, work.truths, strict=True))
    counts = [torch.as_tensor(answer.steps).double() for answer in answers if answer.steps is not None]
    if not counts:
        return Run(error, seconds, None, None)
    steps = sum(float(count.mean()) for count in counts) / len(counts)
    return Run(error, seconds, steps, max(int(count.max()) for count in counts))


def _over(solve: Solve, work: Work) -> Callable[[], object]:
    return lambda: [solve(x) for x in work.batches]


def _row(contender: Contender, form: Form, best: tuple[Entry, list[float]] | None, count: int) -> dict[str, Any]:
    entry, times = best or (None, [])
    error = min(form.errors) if entry is None else entry.run.error
    return {
        "name": contender.name,
        "family": contender.family,
        "options": contender.options,
        "reached": entry is not None,
        "worst_error": error if math.isfinite(error) else None,
        "setting_is": contender.kind,
        "setting": None if entry is None else entry.setting,
        "tried": form.tried,
        "steps": None if entry is None else entry.run.steps,
        "seconds": median(times) / count if times else None,
        "spread": spread(times) if times else None,
    }


def _compared(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Adds ``ratio`` to every row, and returns who of the peers came first and how far behind."""
    base = next((row["seconds"] for row in rows if row["family"] == OURS and row["name"] == REFERENCE), None)
    for row in rows:
        row["ratio"] = None if base is None or row["seconds"] is None else row["seconds"] / base
    ranked = sorted((row["ratio"], row["name"]) for row in rows if row["family"] == FAMILY and row["ratio"])
    others = [row["ratio"] for row in rows if row["family"] not in (OURS, FAMILY) and row["ratio"]]
    return {
        "fastest_peer": ranked[0][1] if ranked else None,
        "speedup": ranked[0][0] if ranked else None,
        "speedup_plain": min(others, default=None),
    }
