"""MNIST at 8, 4, 2 and 1 bits to integer-only C: one network each, with its proved and its measured error.

    python examples/mnist_to_c.py --out mnist_c [--epochs 12] [--data-dir FOLDER] [--float FILE]

At 8 bits the Cayley transform of a float network is rounded, at 4 bits it is trained through the quantizer, with a
penalty that keeps its margin; both have 8-bit iterates. At 2 and 1 bits structured weights are trained through the
quantizer, W and U alike; they run by additions and shifts, with 16-bit iterates. The range of the iterates is chosen
on training images. Each network is compared, over all test images, with the exact equilibria of what its file holds.
Needs a C compiler.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import equipoise as eq
from equipoise.data import Data, load_data
from equipoise.demo import classifier
from equipoise.training import TrainingConfig, fit

SCHEMES: dict[int, tuple[eq.Scheme, int]] = {
    8: (eq.Cayley(bits=8, input_bits=8, head_bits=8), 8),
    4: (eq.Cayley(bits=4, input_bits=4, head_bits=8), 8),
    2: (eq.Structured(bits=2, input_bits=2, head_bits=8), 16),
    1: (eq.Structured(bits=1, input_bits=1, head_bits=8), 16),
}
"""Bits of the weights: the scheme, and the bits of the iterates."""


def trained(data: Data, epochs: int, scheme: eq.Scheme | None) -> Any:
    """A network of 100 features; with a scheme, trained through it and converted to its codes."""
    model: Any = classifier(data, 100, rank=25)
    if scheme is not None:
        model = eq.prepare_qat(model, scheme)
    # codes of a Cayley transform do not keep the margin by themselves
    penalty = eq.MarginPenalty(target=0.1) if isinstance(scheme, eq.Cayley) else None
    fit(model, data, TrainingConfig(epochs=epochs, margin=penalty), progress=False)
    result: Any = eq.convert(model) if scheme is not None else model
    result.preprocessing = data.preprocessing
    return result.eval()


def loaded(path: Path, make: Any) -> Any:
    """The model in ``path``, made and saved first where there is none."""
    if not path.exists():
        eq.save(make(), path)
    return eq.load(path)


def exact(model: nn.Module, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Equilibria with bounds on their own error, and scores, in float64."""
    wide: Any = copy.deepcopy(model).double()
    with torch.no_grad():
        found = wide[0].solve(x.double(), tol=1e-8)
        return found.value.numpy(), found.error_bound.numpy(), wide[1](found.value).numpy()


def row(bits: int, model: Any, data: Data, folder: Path) -> str:
    """One line of the table; raises where a measured error exceeds the proved one."""
    _, iterate_bits = SCHEMES[bits]
    calibration = data.train.x[:2000]
    certificate = eq.export(model, folder, calibration=calibration, activation_bits=iterate_bits, force=True)
    f = eq.runtime.load(folder)
    x, y = data.test.x, data.test.y.numpy()
    z, scores = f.equilibrium(x.numpy()), f(x.numpy())
    answered = np.isfinite(scores).all(axis=1)
    truth, doubt, true_scores = exact(model, x)
    error = np.linalg.norm(z - truth, axis=1)[answered]
    assert certificate.error_bound is not None
    assert (error - doubt[answered] <= certificate.error_bound).all(), "a proved bound is exceeded"
    accuracy, own = ((s.argmax(1) == y).mean() for s in (scores, true_scores))
    return (
        f"| {bits} | {certificate.mode} | {certificate.flash_bytes} | {certificate.ram_bytes} | {certificate.macs} "
        f"| {certificate.steps} | {certificate.error_bound:.3g} | {error.max():.3g} "
        f"| {100 * accuracy:.2f} % | {100 * own:.2f} % | {int((~answered).sum())} |"
    )


def main() -> int:
    """Train or load, export, compare, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of models and exports")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--float", type=Path, default=None, help="a float model file for 8 bits")
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True)
    data = load_data("mnist", arguments.data_dir)
    source = arguments.float or arguments.out / "float.safetensors"
    model = loaded(source, lambda: trained(data, arguments.epochs, None))
    _, _, scores = exact(model, data.test.x)
    print(f"float: {100 * (scores.argmax(1) == data.test.y.numpy()).mean():.2f} %")
    print(
        "| bits | mode | flash | RAM | MACs | K | proved | worst measured | accuracy | its float evaluation | refused |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for bits, (scheme, _) in SCHEMES.items():
        start = time.time()
        path = arguments.out / f"w{bits}.safetensors"
        if bits == 8:
            codes: Any = eq.quantize(model, scheme)
            codes.preprocessing = data.preprocessing
        else:
            codes = loaded(path, lambda scheme=scheme: trained(data, arguments.epochs, scheme))
        print(row(bits, codes, data, arguments.out / f"c{bits}"), flush=True)
        print(f"{bits} bits: {time.time() - start:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
