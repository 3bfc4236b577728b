"""An exported network against PyTorch: one image on one core, and a batch with as many threads on either side.

n = 100, 784 inputs, 10 classes, 8-bit codes and iterates, 40 steps, injection and head included. PyTorch's step in the
batch is the leanest one, ``addmm`` of |u| with C in float32, equally many. Of one image the CPU times are compared,
which a busy machine spoils least.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from .. import runtime
from ..data import Preprocessing
from ..errors import MissingExtraError
from ..export.build import Options, build
from ..export.write import write_c
from ..layers import MonDEQ
from ..quantization.schemes import Cayley
from ..quantize import quantize
from .measure import Tracker, interleave, median, spread
from .network import CLASSES, FEATURES, RANK, SIDE, Setting
from .rows import Row, Target, at_least_times, ratio_text, time_text

__all__ = ["measure", "rows", "tables"]

STEPS, BATCH, LEAST = 40, 10_000, 40e-6
FLAGS = ("-O3", "-march=native"), ("-O3",), ("-O2",)
ROUNDS, EACH = 20, 1000
"""Of one image: rounds, of which the least counts, and runs in each."""

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
    for (round = 0; round < ROUNDS; ++round) {
        clock_t from = clock();
        double each;
        for (k = 0; k < EACH; ++k) {
            eqnet_scores(eqnet_vector_inputs[k % EQNET_VECTORS], scores);
            sink ^= scores[0];
        }
        each = (double)(clock() - from) / CLOCKS_PER_SEC / EACH;
        least = each < least ? each : least;
    }
    printf("%.4e %d\\n", least, (int)sink);
    return 0;
}
"""


def measure(setting: Setting, tell: Tracker) -> dict[str, Any]:
    """Seconds of both sides; plain values, as JSON has them.

    Raises:
        MissingExtraError: no C compiler on this machine.
    """
    tell("exporting a network")
    compiler = runtime.compiler()
    if compiler is None:
        raise MissingExtraError("no C compiler on this machine: install gcc or clang, or name one with CC")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(MonDEQ(SIDE**2, FEATURES, rank=RANK, margin=0.25), nn.Linear(FEATURES, CLASSES)).eval()
    q: Any = quantize(model, Cayley(bits=8, input_bits=8, head_bits=8))
    q.preprocessing = Preprocessing(mean=0.1307, std=0.3081, scale=255.0, input_shape=(SIDE, SIDE))
    count = BATCH // 10 if setting.quick else BATCH
    raw = np.random.default_rng(0).integers(0, 256, (count, SIDE**2)).astype(np.uint8)
    x = q.preprocessing(raw)
    shipped = build(q, None, x[:500], Options(activation_bits=8))
    shipped = replace(shipped, program=replace(shipped.program, steps=STEPS))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "net"
        write_c(shipped, folder, None, False)
        tell("one image")
        found = {"compiler": _version(compiler), "steps": STEPS, "single": single(q, x[:1], folder, compiler)}
        tell("a batch")
        return found | {"batch": batch(q, x, raw, runtime.load(folder))}


def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or [compiler])[0]


def single(q: nn.Module, x: Tensor, folder: Path, compiler: str) -> dict[str, Any]:
    """CPU seconds of one image on one core: of the C by its flags, and of the same network's ``forward``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            q(x)
            forward = min(_processor_time(lambda: [q(x) for _ in range(20)]) for _ in range(ROUNDS)) / 20
    finally:
        torch.set_num_threads(threads)
    (folder / "loop.c").write_text(LOOP, encoding="utf-8")
    took = {}
    for flags in FLAGS:
        command = [compiler, *flags, f"-DROUNDS={ROUNDS}", f"-DEACH={EACH}"]
        command += [str(folder / "eqnet.c"), str(folder / "loop.c"), "-o", str(folder / "loop")]
        subprocess.run(command, check=True, capture_output=True)
        done = subprocess.run([folder / "loop"], capture_output=True, text=True, check=True)
        took[" ".join(flags)] = float(done.stdout.split()[0])
    return {"forward_seconds": forward, "seconds": took}


def _processor_time(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


@torch.inference_mode()
def batch(q: Any, x: Tensor, raw: np.ndarray[Any, Any], f: runtime.Runtime) -> dict[str, Any]:
    """Wall seconds of the whole batch, both sides in turn."""
    alpha = float(q[0].recurrent.alpha)
    C, U = q[0].operator.cayley(alpha).float(), q[0].input_weight.detach()
    b, (V, c0) = q[0].bias.detach(), q[1].dense()

    @torch.inference_mode()
    def peaceman_rachford() -> Tensor:
        injection = torch.addmm(b, x, U.T)
        c = torch.addmm(injection, injection, C.T).mul_(alpha)
        u, v = c.clone(), torch.empty_like(c)
        for _ in range(STEPS):
            torch.abs(u, out=v)
            torch.addmm(c, v, C.T, out=u)
        return torch.addmm(c0, u.relu_(), V.T)

    times = interleave({"c": lambda: f.integers(raw), "torch": peaceman_rachford}, 9)
    ratios = [theirs / ours for ours, theirs in zip(times["c"], times["torch"], strict=True)]
    return {
        "batch": len(x),
        "seconds": median(times["c"]),
        "torch_seconds": median(times["torch"]),
        "ratio": median(ratios),
        "spread": spread(ratios),
    }


def rows(found: dict[str, Any]) -> list[Row]:
    """The ratios."""
    alone, many = found["single"], found["batch"]
    forward = alone["forward_seconds"]
    listed = []
    for flags, seconds in alone["seconds"].items():
        fast = Target("≥ 10×, < 40 µs", lambda ratio, s=seconds: ratio >= 10 and s < LEAST)  # type: ignore[misc]
        target = fast if "native" in flags else None
        listed.append(
            Row.timed(f"exported C, {flags}, one image, one core", seconds, forward, "PyTorch's forward", target=target)
        )
    peer = f"PyTorch, Peaceman–Rachford in float32, {found['steps']} steps"
    what = f"exported C, as runtime.load compiles it, batch {many['batch']:,}"
    target = at_least_times(1.5) if many["batch"] >= BATCH else None
    listed.append(Row.timed(what, many["seconds"], many["torch_seconds"], peer, many["ratio"], target))
    return listed


def tables(found: dict[str, Any]) -> list[Table]:
    """All that was measured."""
    table = Table(title=f"exported C ({found['compiler']}), {found['steps']} steps, 8-bit codes and iterates")
    for name in ("what", "C", "PyTorch", "ratio"):
        table.add_column(name, justify="left" if name == "what" else "right")
    forward = found["single"]["forward_seconds"]
    for flags, seconds in found["single"]["seconds"].items():
        table.add_row(f"one image, {flags}", time_text(seconds), time_text(forward), ratio_text(forward / seconds))
    many = found["batch"]
    table.add_row(
        f"batch {many['batch']:,}",
        time_text(many["seconds"]),
        time_text(many["torch_seconds"]),
        ratio_text(many["ratio"]),
    )
    return [table]
