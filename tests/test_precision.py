"""What is proved of float32 products counts the bits that torch was told it may drop."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from equipoise.operators.base import product_rounding

SWITCHES = {
    "torch.set_float32_matmul_precision('high')": 2.0**-9,
    "torch.set_float32_matmul_precision('medium')": 2.0**-6,
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'": 2.0**-6,
}


def test_full_precision_loses_gamma() -> None:
    assert product_rounding(10, torch.empty(0)) == pytest.approx(10 * 2.0**-24, rel=1e-5)
    assert product_rounding(10, torch.empty(0, dtype=torch.float64)) == pytest.approx(10 * 2.0**-53, rel=1e-5)


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_of_torchs_switches_is_counted(switch: str) -> None:
    """In a process of its own, since the newer switches cannot be taken back."""
    say = "from equipoise.operators.base import product_rounding; print(product_rounding(10, torch.empty(0)))"
    done = subprocess.run(
        [sys.executable, "-c", f"import torch; {switch}; {say}"], capture_output=True, text=True, check=True
    )
    assert SWITCHES[switch] <= float(done.stdout) <= SWITCHES[switch] * 1.1
