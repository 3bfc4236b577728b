"""Small networks to ship, their exact answers, and C compilers to ship them with."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import equipoise as eq
from equipoise.data import Preprocessing

INPUTS, FEATURES, CLASSES = 20, 12, 4
PIXELS = Preprocessing(mean=0.3, std=0.25, scale=255.0, input_shape=(20,))
STRICT = ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Wconversion", "-Werror")


def network(seed: int = 0, features: int = FEATURES, head: bool = True, preprocessing: Any = PIXELS) -> nn.Sequential:
    """A float network with random weights, margin 0.5."""
    torch.manual_seed(seed)
    layer = eq.MonDEQ(INPUTS, features, rank=5, margin=0.5)
    model: Any = nn.Sequential(layer, nn.Linear(features, CLASSES)) if head else nn.Sequential(layer)
    if preprocessing is not None:
        model.preprocessing = preprocessing
    return model.eval()


def quantized(model: nn.Module, scheme: eq.Scheme) -> nn.Module:
    """The quantized network, preprocessing kept."""
    result: Any = eq.quantize(model, scheme)
    return result.eval()


def exact(model: nn.Module, x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """(equilibrium, scores, bound of the equilibrium's own error) in float64."""
    wide = __import__("copy").deepcopy(model).double()
    found = wide[0].solve(torch.from_numpy(np.asarray(x, dtype=np.float64)), tol=1e-10)
    with torch.no_grad():
        scores = wide[1](found.value) if len(wide) > 1 else found.value
    return found.value.numpy(), scores.numpy(), found.error_bound.numpy()


def pixels(count: int, low: int = 0, high: int = 255, seed: int = 1) -> NDArray[np.int64]:
    """Random images, corners of the range, and constant ones."""
    rng = np.random.default_rng(seed)
    corners = np.where(rng.random((count, INPUTS)) < 0.5, low, high)
    flat = np.repeat([[low], [high]], INPUTS, axis=1)
    return np.concatenate([rng.integers(low, high + 1, (count, INPUTS)), corners, flat])


def compilers() -> list[str]:
    return [name for name in ("gcc", "clang") if shutil.which(name)] or (
        [found] if (found := shutil.which("cc")) else []
    )


def need_compiler() -> str:
    """A compiler, or the test is skipped, saying so."""
    found = compilers()
    if not found:
        pytest.skip("no C compiler (cc, gcc, clang) on this machine: the exported C is not built")
    return found[0]


def builds_for_32_bits(cc: str, folder: Path) -> bool:
    """Whether ``cc -m32`` finds what it needs, the C library included."""
    (folder / "probe.c").write_text('#include <stdio.h>\nint main(void) { return printf("") != 0; }\n')
    command = [cc, "-m32", str(folder / "probe.c"), "-o", str(folder / "probe")]
    made = subprocess.run(command, capture_output=True, check=False)
    return made.returncode == 0 and subprocess.run([str(folder / "probe")], check=False).returncode == 0


def build_and_run(folder: Path, cc: str, *flags: str) -> str:
    """Compile the self-test strictly and run it; what it says."""
    program = folder / f"selftest-{cc}{''.join(flags)}".replace("=", "").replace(",", "")
    command = [cc, *STRICT, *flags, str(folder / "eqnet.c"), str(folder / "selftest.c"), "-o", str(program)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    run = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout
