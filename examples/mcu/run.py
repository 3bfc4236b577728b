"""Exported networks on a Cortex-M, bit for bit: cross-compiled, and run in QEMU against their test vectors.

Needs the programs arm-none-eabi-gcc and qemu-system-arm (Debian: apt install gcc-arm-none-eabi qemu-system-arm); says
so, and exits with 2, where one is missing. Networks of MNIST's size with random weights: what is tested is arithmetic.

    make test-mcu
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import equipoise as eq
from equipoise.data import Preprocessing

HERE = Path(__file__).resolve().parent
TOOLS = {"arm-none-eabi-gcc": "gcc-arm-none-eabi", "qemu-system-arm": "qemu-system-arm"}
BOARDS = {"mps2-an385": "cortex-m3", "mps2-an386": "cortex-m4"}
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Wconversion", "-Werror")
SCHEMES: dict[str, eq.Scheme] = {
    "factored, 1 bit": eq.Structured(bits=1, input_bits=1, head_bits=8),
    "factored, 4 bits": eq.Structured(bits=4, input_bits=4, head_bits=8),
    "cayley, 8 bits": eq.Cayley(bits=8, input_bits=8, head_bits=8),
    "cayley, 4 bits": eq.Cayley(bits=4, input_bits=4, head_bits=4),
}


def network() -> nn.Sequential:
    """784 inputs, 100 features, 10 classes."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(eq.MonDEQ(784, 100, rank=25, margin=0.3), nn.Linear(100, 10)).eval()
    model.preprocessing = Preprocessing(mean=0.1307, std=0.3081, scale=255.0, input_shape=(28, 28))
    return model


def run_on_boards(folder: Path) -> list[str]:
    """Compile the export in ``folder`` for each board and run it there; what it printed. Raises where it fails."""
    found = []
    for board, cpu in BOARDS.items():
        target = ["arm-none-eabi-gcc", f"-mcpu={cpu}", "-mthumb", "-Os", "-ffreestanding", "-DEQNET_FREESTANDING"]
        sources = [str(folder / "eqnet.c"), str(folder / "selftest.c")]
        objects = [str(folder / f"{name}.o") for name in ("eqnet", "selftest", "board")]
        for source, built, strict in zip([*sources, str(HERE / "board.c")], objects, (STRICT, STRICT, ()), strict=True):
            command = [*target, *strict, f"-I{folder}", "-c", source, "-o", built]
            subprocess.run(command, check=True)
        image = str(folder / "image.elf")
        link = [*target, "-nostdlib", "-nostartfiles", "-T", str(HERE / "board.ld"), *objects, "-lgcc", "-o", image]
        subprocess.run(link, check=True)
        size = subprocess.run(["arm-none-eabi-size", objects[0]], capture_output=True, text=True, check=True)
        flash = size.stdout.splitlines()[1].split()[0]
        emulate = ["qemu-system-arm", "-M", board, "-nographic", "-monitor", "none", "-serial", "none"]
        emulate += ["-semihosting-config", "enable=on,target=native", "-kernel", image]
        ran = subprocess.run(emulate, capture_output=True, text=True, timeout=600, check=False)
        said = " · ".join((ran.stdout + ran.stderr).split("\n")).strip(" ·")
        if ran.returncode != 0 or "bit for bit" not in said:
            raise SystemExit(f"{board}: {said or 'no answer'} (exit status {ran.returncode})")
        found.append(f"{board}: {said} · flash with code {flash} bytes")
    return found


def main() -> int:
    missing = [f"{tool} (apt install {package})" for tool, package in TOOLS.items() if not shutil.which(tool)]
    if missing:
        print(f"test-mcu needs {' and '.join(missing)}", file=sys.stderr)
        return 2
    model = network()
    for name, scheme in SCHEMES.items():
        quantized: Any = eq.quantize(model, scheme)
        with tempfile.TemporaryDirectory() as scratch:
            certificate = eq.export(quantized, Path(scratch) / "net")
            for line in run_on_boards(Path(scratch) / "net"):
                print(f"{name}, {certificate.steps} steps, {line}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
