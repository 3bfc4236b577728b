"""The whole way on real handwritten digits: train, quantize, certify, choose, write it up."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ._atomic import scratch_beside
from ._machines import one_thread
from .certificates import certify
from .data import load_data
from .errors import OutputError
from .files import save
from .ladder import Ladder, Requirements
from .plan import build_ladder
from .presets import classifier
from .report import write_report
from .report.terminal import waiting
from .training import FitResult, TrainingConfig, fit

__all__ = ["DemoResult", "run_demo"]

FEATURES, RANK, MARGIN = 64, 16, 0.2
# Weight decay keeps ‖W‖ and the head small, and with them every bound of what rounding can do.
TRAINING = TrainingConfig(epochs=12, batch_size=64, learning_rate=1e-2, weight_decay=0.5)
INPUT_BITS = 8
ASKED = Requirements(min_agreement=0.9)


@dataclass(frozen=True, eq=False)
class DemoResult:
    """What the demo found and wrote: the files by their purpose."""

    ladder: Ladder
    training: FitResult
    files: dict[str, Path]


def run_demo(
    out_dir: str | Path = "demo",
    force: bool = False,
    requirements: Requirements = ASKED,
    progress: bool = True,
) -> DemoResult:
    """Train on scikit-learn's digits, build the ladder of 8 to 1 bits and all schemes, choose, and write it up.

    ``out_dir`` receives ``model.safetensors`` (the chosen version with its certificate), ``float.safetensors``,
    ``ladder.json`` and ``report.html``: all of them at the end, none if anything fails.

    Raises:
        OutputError: ``out_dir`` cannot be written, or holds something and ``force`` is False.
        MissingExtraError: a library of the extras ``train`` or ``report`` is not installed.
        KeyboardInterrupt: Ctrl-C, also where training itself would have ended quietly.
    """
    target = _checked(Path(out_dir), force)
    with one_thread():
        return _run(target, requirements, progress)


def _run(target: Path, requirements: Requirements, progress: bool) -> DemoResult:
    data = load_data("digits")
    model = classifier(data, FEATURES, RANK, MARGIN)
    training = fit(model, data, TRAINING, progress=progress)
    if training.interrupted:
        raise KeyboardInterrupt
    model.eval()
    with waiting("quantizing and certifying") if progress else contextlib.nullcontext() as tell:
        ladder = build_ladder(model, data, requirements=requirements, input_bits=INPUT_BITS, progress=tell)
    with waiting("writing") if progress else contextlib.nullcontext(), _scratch(target) as scratch:
        files = _write(ladder, model, scratch)
        _move(scratch, target, files)
    return DemoResult(ladder, training, {purpose: target / name for purpose, name in files.items()})


def _write(ladder: Ladder, model: nn.Module, folder: Path) -> dict[str, str]:
    """Every file into ``folder``; returns their names by purpose."""
    files = {"float": "float.safetensors", "ladder": "ladder.json", "report": "report.html"}
    save(model, folder / files["float"], certificate=certify(model))
    ladder.write(folder / files["ladder"])
    write_report(ladder, folder / files["report"], title="handwritten digits, quantized and certified")
    if ladder.chosen is not None:
        chosen = ladder.evidence[ladder.chosen]
        assert chosen.model is not None
        files["model"] = "model.safetensors"
        save(chosen.model, folder / files["model"], certificate=chosen.portable_certificate)
    return files


def _checked(target: Path, force: bool) -> Path:
    """``target`` if it can become the demo's folder, known before the work and not after."""
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is not a folder: name another with --out")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise OutputError(f"{target} is not empty: pass force=True (--force) to replace the demo's files in it")
    within = target if target.is_dir() else target.absolute().parent
    if not within.is_dir():
        raise OutputError(f"cannot make {target}: the folder {within} does not exist; create it first")
    if not os.access(within, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {target}: the folder {within} is not writable; choose another")
    with _scratch(target):  # root may write anywhere, says the system, and then refuses
        return target


@contextlib.contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A folder beside the target (in it where that exists), gone at the end."""
    within = target if target.is_dir() else target.absolute().parent
    folder = scratch_beside(within / "demo")
    try:
        folder.mkdir()
    except OSError as error:
        raise OutputError(f"cannot write in {within}: {error.strerror}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(scratch: Path, target: Path, files: dict[str, str]) -> None:
    """Give the finished files their place. Other files in an existing folder are left alone."""
    try:
        target.mkdir(exist_ok=True)
        if "model" not in files:  # one of an earlier run would be taken for this run's choice
            (target / "model.safetensors").unlink(missing_ok=True)
        for name in files.values():
            os.replace(scratch / name, target / name)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror}") from error
