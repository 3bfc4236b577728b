"""An exported network against PyTorch: one image, and a batch of 10,000; ratios of one run, flags and threads named.

    python benchmarks/ship.py [--threads 2]

n = 100, 784 inputs, 10 classes, 8-bit codes and iterates, 40 steps, injection and head included. PyTorch's step is the
leanest one, ``addmm`` of |u| with C in float32, equally many. Wall time, the least of several rounds; CPU time beside
it, since a busy machine spoils the former.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import equipoise as eq
from equipoise import runtime
from equipoise.data import Preprocessing
from equipoise.export.build import Options, build
from equipoise.export.write import write_c

STEPS, BATCH = 40, 10_000
FLAGS = (("-O3", "-march=native"), ("-O3",), ("-O2",))
LOOP = """
#include <stdio.h>
#include <time.h>
#include "eqnet.h"
#include "vectors.h"
int main(void)
{
    double least = 1e9;
    int round, k;
    int32_t scores[EQNET_CLASSES], sink = 0;
    for (round = 0; round < 40; ++round) {
        clock_t from = clock();
        double each;
        for (k = 0; k < 2000; ++k) {
            eqnet_scores(eqnet_vector_inputs[k % EQNET_VECTORS], scores);
            sink ^= scores[0];
        }
        each = (double)(clock() - from) / CLOCKS_PER_SEC / 2000 * 1e6;
        least = each < least ? each : least;
    }
    printf("%.2f %d\\n", least, (int)sink);
    return 0;
}
"""


def least(work: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """(wall, CPU) seconds of the quickest of ``rounds``, each by its own measure."""
    walls, cpus = [], []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus)


def main() -> int:
    """Export, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model: Any = nn.Sequential(eq.MonDEQ(784, 100, rank=25, margin=0.25), nn.Linear(100, 10)).eval()
    q: Any = eq.quantize(model, eq.Cayley(bits=8, input_bits=8, head_bits=8))
    q.preprocessing = Preprocessing(mean=0.1307, std=0.3081, scale=255.0, input_shape=(28, 28))
    raw = np.random.default_rng(0).integers(0, 256, (BATCH, 784)).astype(np.uint8)
    x = q.preprocessing(raw)
    shipped = build(q, None, x[:500], Options(activation_bits=8))
    shipped = replace(shipped, program=replace(shipped.program, steps=STEPS))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "net"
        write_c(shipped, folder, None, False)
        single(q, x[:1], folder)
        batch(q, x, raw, runtime.load(folder), threads)
    return 0


def single(q: Any, x: torch.Tensor, folder: Path) -> None:
    """One image on one core: CPU time of the C, and of the same network's ``forward``."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        q(x)
        _, cpu = least(lambda: [q(x) for _ in range(20)], 20)
    forward = cpu / 20 * 1e6
    (folder / "loop.c").write_text(LOOP)
    for flags in FLAGS:
        sources = [str(folder / "eqnet.c"), str(folder / "loop.c")]
        subprocess.run([runtime.compiler() or "cc", *flags, *sources, "-o", str(folder / "loop")], check=True)
        took = float(subprocess.run([folder / "loop"], capture_output=True, text=True, check=True).stdout.split()[0])
        print(f"one image, {' '.join(flags)}: {took:.1f} us; torch forward {forward:.0f} us; {forward / took:.0f}x")


def batch(q: Any, x: torch.Tensor, raw: np.ndarray, f: runtime.Runtime, threads: int) -> None:
    """The whole batch, both sides with the same number of threads."""
    torch.set_num_threads(threads)
    alpha = float(q[0].recurrent.alpha)
    C, U = q[0].operator.cayley(alpha).float(), q[0].input_weight.detach()
    b, (V, c0) = q[0].bias.detach(), q[1].dense()

    def peaceman_rachford() -> torch.Tensor:
        with torch.inference_mode():
            injection = torch.addmm(b, x, U.T)
            c = torch.addmm(injection, injection, C.T).mul_(alpha)
            u, v = c.clone(), torch.empty_like(c)
            for _ in range(STEPS):
                torch.abs(u, out=v)
                torch.addmm(c, v, C.T, out=u)
            return torch.addmm(c0, u.relu_(), V.T)

    ours, theirs = (least(work, 10) for work in (lambda: f.integers(raw), peaceman_rachford))
    for name, index in (("wall", 0), ("CPU", 1)):
        print(
            f"batch {BATCH}, OMP_NUM_THREADS of the environment, torch {threads}: {name} C {ours[index] * 1e3:.0f} ms, "
            f"torch PR {theirs[index] * 1e3:.0f} ms, {theirs[index] / ours[index]:.2f}x"
        )


if __name__ == "__main__":
    sys.exit(main())
