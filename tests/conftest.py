"""What every test shares: one thread, fixed seeds, and the artefacts that only some machines have."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when torch and numpy load

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
NEIGHBOUR = ROOT.parent / "shared"
CHECKPOINT = "mondeq_quant_mnist_float.safetensors"

torch.set_num_threads(1)

# The same examples in every run: a failure of `make test` is always one that can be seen again.
settings.register_profile("steady", deadline=None, derandomize=True, max_examples=50)
# Fresh examples, and many: `make test-all` names this profile.
settings.register_profile(
    "thorough", deadline=None, max_examples=500, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Each test starts from the same state of the global generators, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - third parties draw from the global generator
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_reference() -> Path:
    """The published MNIST checkpoint of mondeq-quant, which is not part of this repository."""
    path = NEIGHBOUR / "reference" / CHECKPOINT
    if not path.is_file():
        pytest.skip(f"the published checkpoint {CHECKPOINT} is not in ../shared/reference")
    return path


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The folder that holds ``mnist/*.parquet``: what ``--data-dir`` takes. ``EQUIPOISE_DATA`` wins."""
    named = os.environ.get("EQUIPOISE_DATA")
    folder = Path(named) if named else NEIGHBOUR / "data"
    if not list(folder.glob("mnist/test-*.parquet")):
        where = f"EQUIPOISE_DATA={named}" if named else "../shared/data (and EQUIPOISE_DATA is not set)"
        pytest.skip(f"no mnist/test-*.parquet in {where}")
    return folder
