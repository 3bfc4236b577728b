"""Certify and solve as the layer grows, each in a process of its own, so that its peak memory is its own.

``python -m equipoise.bench.scale certify 1024 2`` prints the figures of one such process as JSON: what it does,
n, and the number of threads.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from ..certificates import Certificate, certified_classes, certify
from ..data import Data
from ..errors import ConvergenceWarning
from ..layers import NEMON, MonDEQ
from ..robust import PixelBall
from .measure import Tracker, interleave, median
from .network import CLASSES, FEATURES, Setting
from .rows import DASH, LESS, Row, at_most_times, not_measured, time_text

__all__ = ["FULL", "JOBS", "QUICK", "figures", "measure", "rows", "scaling", "tables"]

JOBS = ("certify", "solve")
IN_FEATURES, BATCH, TOL = 784, 128, 1e-4
FULL, QUICK = (64, 256, 1024, 4096), (64, 256)
PLAIN = 1024
"""Features up to which the same constants are also computed without a proof."""

LIMIT, MEMORY = 60.0, 2000.0
"""Seconds and megabytes that n = 4,096 may take."""

BALL, IMAGES, IMAGES_LIMIT = 0.1, 1000, 2.0
"""ε and number of the images whose boxes are certified, and the seconds that may take."""


def measure(setting: Setting, tell: Tracker, sizes: tuple[int, ...] | None = None) -> dict[str, Any]:
    """What proofs cost: certificates as the layer grows, and of images against every change of their pixels by ε."""
    sizes = sizes or (QUICK if setting.quick else FULL)
    tell.expect(len(JOBS) * len(sizes) + 1)
    found = scaling(sizes, tell)
    tell("boxes")
    return {"sizes": found, "boxes": _boxes(setting.data)}


def _boxes(data: Data) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(NEMON(data.features, FEATURES), nn.Linear(FEATURES, CLASSES)).eval()
    low, high = PixelBall(BALL, data.preprocessing).box(data.test.x[:IMAGES])
    times = interleave({"boxes": lambda: certified_classes(model, low, high)}, 3)["boxes"]
    return {"eps": BALL, "images": len(low), "seconds": median(times)}


def scaling(sizes: tuple[int, ...], tell: Tracker) -> list[dict[str, Any]]:
    """A row per n, with the figures of both jobs under their names."""
    rows = []
    for n in sizes:
        row: dict[str, Any] = {"features": n}
        for job in JOBS:
            tell(f"{job}, n = {n:,}")
            row[job] = _in_a_process(job, n)
        rows.append(row)
    return rows


def _in_a_process(job: str, n: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "equipoise.bench.scale", job, str(n), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"ended by signal {-done.returncode}: out of memory?"]
        return {"failure": last[0]}
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def figures(job: str, n: int) -> dict[str, Any]:
    """Seconds of one job on a random layer of full rank, and this process's memory before and at its peak."""
    before = _peak()
    torch.manual_seed(0)
    layer = MonDEQ(IN_FEATURES, n).eval()
    found = _certify(layer) if job == "certify" else _solve(layer)
    return {**found, "peak_megabytes": _peak(), "baseline_megabytes": before}


def _certify(layer: MonDEQ) -> dict[str, Any]:
    """Every certificate is made from nothing; of small layers several, beside m and L as LAPACK computes them."""
    small = layer.features <= PLAIN
    made: list[Certificate] = []
    tasks: dict[str, Callable[[], object]] = {"certify": lambda: made.append(certify(layer))}
    if small:
        tasks["compute"] = lambda: _compute(layer)
        tasks["certify"]()  # libraries wake up
    times = interleave(tasks, 5 if small else 1)
    return {
        "seconds": median(times["certify"]),
        "computed_seconds": median(times["compute"]) if small else None,
        "certified": made[-1].certified,
        "margin": made[-1].margin,
    }


@torch.no_grad()
def _compute(layer: MonDEQ) -> None:
    """m and L in float64, not proved."""
    W = layer.weight.double()
    eye = torch.eye(len(W), dtype=W.dtype)
    torch.linalg.eigvalsh(eye - (W + W.mT) / 2)
    torch.linalg.matrix_norm(eye - W, 2)


def _solve(layer: MonDEQ) -> dict[str, Any]:
    """The first solve finds the step and the inverse for these weights; those after it have them."""
    x = torch.randn(BATCH, layer.in_features)
    times = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # `converged` tells
        for _ in range(4):
            begin = time.perf_counter()
            solution = layer.solve(x, tol=TOL)
            times.append(time.perf_counter() - begin)
    return {
        "first_seconds": times[0],
        "seconds": median(times[1:]),
        "batch": BATCH,
        "tol": TOL,
        "steps": float(solution.steps.double().mean()),
        "converged": bool(solution.converged.all()),
    }


def _peak() -> float | None:
    """The largest resident memory of this process so far, in megabytes; None on a system that does not tell.

    Linux hands a parent's ``ru_maxrss`` down to its children, through ``exec``: there only ``VmHWM`` is their own.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return peak / 1024 if sys.platform == "darwin" else peak


def rows(found: dict[str, Any]) -> list[Row]:
    """The ratios: to the same constants without a proof, and to what the largest may take."""
    listed = []
    for row in found["sizes"]:
        what, certify = f"certify(layer), n = {row['features']:,}", row["certify"]
        if "failure" in certify:
            listed.append(not_measured(what, certify["failure"]))
            continue
        seconds, computed = certify["seconds"], certify["computed_seconds"]
        if computed is not None:
            peer = "m and L alone by LAPACK, not proved"
            listed.append(Row.timed(what, seconds, computed, peer, seconds / computed, LESS))
        else:
            listed.append(Row.timed(what, seconds, LIMIT, "limit", seconds / LIMIT, at_most_times(1)))
            if (peak := certify["peak_megabytes"]) is not None:
                ratio = peak / MEMORY
                listed.append(
                    Row.of(f"{what}, memory", f"{peak:,.0f} MB", f"{MEMORY:,.0f} MB limit", ratio, at_most_times(1))
                )
    boxes = found["boxes"]
    what, ratio = f"boxes of {boxes['images']:,} images, ε = {boxes['eps']:g}, NEMON", boxes["seconds"] / IMAGES_LIMIT
    listed.append(Row.timed(what, boxes["seconds"], IMAGES_LIMIT, "limit", ratio, at_most_times(1)))
    return listed


def tables(found: dict[str, Any]) -> list[Table]:
    """All that was measured."""
    return [_scaling(found["sizes"])]


def _scaling(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title="as the layer grows, each in a process of its own",
        caption="solve: first time, with the search for the step; then again. Memory: peak, of it before the work",
    )
    for name in ("n", "certify", "memory", "solve", "memory"):
        table.add_column(name, justify="right")
    for row in rows:
        certify, solve = row["certify"], row["solve"]
        both = DASH if "failure" in solve else f"{time_text(solve['first_seconds'])}; {time_text(solve['seconds'])}"
        table.add_row(
            f"{row['features']:,}",
            certify.get("failure") or time_text(certify["seconds"]),
            _memory(certify),
            solve.get("failure") or both,
            _memory(solve),
        )
    return table


def _memory(job: dict[str, Any]) -> str:
    if "failure" in job or job["peak_megabytes"] is None:
        return DASH
    return f"{job['peak_megabytes']:,.0f} MB, {job['baseline_megabytes']:,.0f}"


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(figures(sys.argv[1], int(sys.argv[2]))))
