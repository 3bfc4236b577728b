"""How things are measured here: side by side in rounds, against a float64 truth, on a machine that is named."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import rich.progress
import torch
from rich.console import Console
from torch import Tensor

from ..errors import ConvergenceError

__all__ = ["Progress", "Tracker", "bar", "interleave", "machine", "median", "relative_error", "spread", "truth"]

Progress = Callable[[int, int, str], None]
"""Told (steps done, steps in all, what comes next) as the work goes on."""

ENOUGH = 4.0
"""Seconds after which a task is left out of further rounds, once it has had three."""

SHORT = 0.1
"""Seconds up to which a task is run once more, untimed, before each time it counts."""

TRUTH_TOL = 1e-11
TRUTH_STEPS = 50_000


def interleave(tasks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each task, once per round, so that a machine that drifts drifts for all of them alike.

    Each round has another order, and a short task runs once untimed before it is timed, so that nobody pays for
    the caches its predecessor emptied. A long one may miss the later rounds: lists differ in length.
    """
    shuffled = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name in shuffled.sample(list(tasks), len(tasks)):
            taken = times[name]
            if len(taken) >= 3 and sum(taken) > ENOUGH:
                continue
            if taken and taken[-1] < SHORT:
                tasks[name]()
            begin = time.perf_counter()
            tasks[name]()
            taken.append(time.perf_counter() - begin)
    return times


def median(times: list[float]) -> float:
    return statistics.median(times)


def spread(times: list[float]) -> float:
    """(largest − smallest) / median: how restless the machine was."""
    return (max(times) - min(times)) / median(times)


@torch.no_grad()
def truth(weight: Tensor, q: Tensor) -> Tensor:
    """z = relu(W z + q) in float64, ``q (B, n)``, every row within 1e-11 relative of the equilibrium.

    By the modulus form of Peaceman–Rachford, written here once more so that the measure does not depend on what
    is measured; it ends by the a-posteriori bound ‖p − z*‖ ≤ ‖W (w − p)‖/m (theory §2).

    Raises:
        ConvergenceError: W has no positive margin, or one so small that no truth was found.
    """
    W, q = weight.detach().double(), q.double()
    forward = torch.eye(len(W), dtype=W.dtype, device=W.device) - W
    margin = float(torch.linalg.eigvalsh((forward + forward.mT) / 2)[0])
    if not margin > 0:
        raise ConvergenceError(f"a network of margin {margin:.3g} has no sure equilibrium: bench one with m > 0")
    alpha = 1 / float(torch.linalg.matrix_norm(forward, 2))
    resolvent = torch.linalg.inv(torch.eye(len(W), dtype=W.dtype, device=W.device) + alpha * forward).mT
    cayley = 2 * resolvent
    cayley.diagonal().sub_(1)
    offset = 2 * alpha * q @ resolvent
    u = offset.clone()
    for step in range(TRUTH_STEPS):
        u = torch.addmm(offset, u.abs(), cayley)
        if step % 25 == 24:
            w = u.relu()
            p = torch.addmm(q, w, W.mT).relu()
            bound = torch.linalg.vector_norm((w - p) @ W.mT, dim=1) / margin
            if bool((bound <= TRUTH_TOL * torch.linalg.vector_norm(p, dim=1)).all()):
                return p
    raise ConvergenceError(f"no float64 truth in {TRUTH_STEPS:,} steps at margin {margin:.3g}: bench a larger margin")


def relative_error(value: Tensor, exact: Tensor) -> float:
    """The worst ‖v − z‖/‖z‖ over the rows of ``value (B, n)``; infinite where an entry is not finite."""
    size = torch.linalg.vector_norm(exact, dim=1)
    error = torch.linalg.vector_norm(value.double() - exact, dim=1) / torch.where(size > 0, size, 1.0)
    return float(error.nan_to_num(torch.inf).max())


def machine() -> dict[str, Any]:
    """What the figures were measured on and with."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mkl": torch.backends.mkl.is_available(),
        "device": "cpu",
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


class Tracker:
    """Counts the steps of a part of a run, and tells a :data:`Progress` what comes next."""

    def __init__(self, progress: Progress, label: str = "", total: int = 1) -> None:
        self.progress, self.label, self.total, self.done = progress, label, total, -1

    def expect(self, total: int) -> None:
        """So many steps are ahead."""
        self.total = total

    def __call__(self, text: str) -> None:
        self.done = min(self.done + 1, self.total)
        self.progress(self.done, self.total, f"{self.label}: {text}" if self.label else text)

    def finish(self) -> None:
        """All is done, what was left out included."""
        self.progress(self.total, self.total, f"{self.label}: done" if self.label else "done")


@contextlib.contextmanager
def bar() -> Iterator[Progress]:
    """A progress bar on stderr, on a terminal only; drawn when told, since a thread beside it would be measured."""
    console = Console(stderr=True)
    columns = rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn()
    drawn = rich.progress.Progress(
        *columns,
        rich.progress.TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
        redirect_stdout=False,
        transient=True,
        disable=not console.is_terminal,
    )
    task = drawn.add_task("starting", total=None)

    def tell(done: int, total: int, text: str) -> None:
        drawn.update(task, completed=done, total=total, description=text, refresh=True)

    with drawn:
        yield tell
