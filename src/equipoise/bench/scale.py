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
from pathlib import Path
from typing import Any

import torch

from ..certificates import certify
from ..errors import ConvergenceWarning
from ..layers import MonDEQ
from .measure import Tracker, median

__all__ = ["JOBS", "figures", "scaling"]

JOBS = ("certify", "solve")
IN_FEATURES, BATCH, TOL = 784, 128, 1e-4


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
    begin = time.perf_counter()
    certificate = certify(layer)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "certified": certificate.certified, "margin": certificate.margin}


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


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(figures(sys.argv[1], int(sys.argv[2]))))
