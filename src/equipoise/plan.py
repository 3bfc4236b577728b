"""Build the ladder: quantize a float model once per rung, certify each against it, choose one.

Choices are made on the validation split, figures are reported on the test split.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .certificates import Certifier, certify
from .data import Data, Split
from .errors import ConvergenceWarning, InputError, NotWellPosedError, OptionError
from .ladder import Evidence, Findings, Ladder, Requirements, Rung, Subject, choose
from .layers.chain import chain
from .quantization.schemes import SCHEMES, Scheme, scheme_from_dict
from .quantize import quantize, size

__all__ = ["build_ladder", "check_fits"]

Progress = Callable[[int, int, str], None]
"""Told (steps done, steps in all, what comes next) as the work goes on."""

BATCH = 10_000


def build_ladder(
    model: nn.Module,
    data: Data,
    schemes: Iterable[str] = tuple(SCHEMES),
    bits: Iterable[int] = range(8, 0, -1),
    requirements: Requirements = Requirements(),
    input_bits: int | None = None,
    progress: Progress | None = None,
) -> Ladder:
    """Quantize ``model`` with every scheme at every number of bits, certify each version, choose one.

    A version that a scheme cannot make (no margin to start from, or none within reach) is left out and noted.

    Raises:
        OptionError: unknown scheme, bits out of range, nothing to build.
        InputError: a model that does not take the features of ``data``; an accuracy asked of a model that ends
            in something other than its classes.
        StructureError: a model that cannot be quantized.
    """
    wanted = _wanted(schemes, bits, input_bits)
    check_fits(model, data)
    classifies = _outputs(model) == data.class_count
    if requirements.min_accuracy is not None and not classifies:
        raise InputError(
            f"the model ends in {_outputs(model)} outputs, {data.name} has {data.class_count} classes: it has"
            " no accuracy to ask for; leave min_accuracy out"
        )
    tell = progress or (lambda done, total, text: None)
    total = len(wanted) + 1
    tell(0, total, "float model")
    subject = _subject(model, data, classifies)
    held_out, tested = _placed(data.validation, model), _placed(data.test, model)
    judges = Certifier(model, held_out.x), Certifier(model, tested.x)
    rungs: list[Rung] = []
    evidence: list[Evidence] = []
    notes: list[str] = []
    chosen = None
    for done, scheme in enumerate(wanted, start=1):
        label = f"{scheme.name}, {scheme.bits} bit{'s' if scheme.bits > 1 else ''}"
        tell(done, total, label)
        try:
            small = quantize(model, scheme)
        except NotWellPosedError as error:
            notes.append(f"{label}: not made; {error}")
            continue
        rung, proof = _climb(small, scheme, judges, (held_out, tested), classifies)
        rungs.append(rung)
        evidence.append(proof)
        chosen = choose([proof.findings for proof in evidence], requirements)
        # Large models are many: only one that may still be chosen is kept.
        evidence = [e if i == chosen else dataclasses.replace(e, model=None) for i, e in enumerate(evidence)]
    tell(total, total, "done")
    return Ladder(tuple(rungs), chosen, requirements, tuple(evidence), subject, tuple(notes))


def check_fits(model: nn.Module, data: Data) -> None:
    """Raise :class:`InputError`, naming both, unless ``model`` takes as many features as ``data`` has; warn where
    the model was trained on inputs that were preprocessed otherwise."""
    sizes = [getattr(module, "in_features", None) for _, module in chain(model)]
    takes = next((size for size in sizes if size is not None), None)
    if takes != data.features:
        raise InputError(
            f"the model takes {takes} features and {data.name} has {data.features}: name the data that the"
            " model was trained on"
        )
    learned = getattr(model, "preprocessing", None)
    if learned is not None and learned != data.preprocessing:
        warnings.warn(
            f"the model was trained on inputs preprocessed as {learned}, {data.name} is {data.preprocessing}:"
            " figures on it may mean little",
            stacklevel=2,
        )


def _outputs(model: nn.Module) -> int | None:
    """Number of outputs per sample."""
    for _, module in reversed(chain(model)):
        found = getattr(module, "out_features", getattr(module, "features", None))
        if found is not None:
            return int(found)
    return None


def _wanted(schemes: Iterable[str], bits: Iterable[int], input_bits: int | None) -> list[Scheme]:
    names, widths = list(dict.fromkeys(schemes)), list(dict.fromkeys(bits))
    wanted = [
        scheme_from_dict({"scheme": name, "bits": width, "input_bits": input_bits})
        for name in names
        for width in widths
    ]
    if not wanted:
        raise OptionError("a ladder needs at least one scheme and one number of bits")
    return wanted


def _climb(
    small: nn.Module,
    scheme: Scheme,
    judges: tuple[Certifier, Certifier],
    splits: tuple[Split, Split],
    classifies: bool,
) -> tuple[Rung, Evidence]:
    """The rung of one quantized model, and what is behind it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the verdict tells
        first, last = (judge(small) for judge in judges)
        accuracies = [_accuracy(small, split) if classifies else None for split in splits]
    bytes_, margin = size(small), _finite(last.margin)
    findings = Findings(
        first.certified, bytes_, margin, accuracies[0], first.agreement, _reduced(first.displacement, "max")
    )
    rung = Rung(
        scheme.name,
        scheme.bits,
        scheme.input_bits,
        bytes_,
        margin,
        last.verdict,
        _finite(last.rate),
        last.steps,
        accuracies[1],
        displacement_mean=_reduced(last.actual_displacement, "mean"),
        displacement_bound_mean=_reduced(last.displacement, "mean"),
        agreement=_finite(last.agreement),
    )
    return rung, Evidence(small, last, findings)


def _subject(model: nn.Module, data: Data, classifies: bool) -> Subject:
    proof = certify(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        accuracy = _accuracy(model, _placed(data.test, model)) if classifies else None
    rate, steps = _finite(proof.rate), proof.steps
    sizes = len(data.validation), len(data.test)
    return Subject(data.name, *sizes, size(model), _finite(proof.margin), rate, steps, accuracy)


def _placed(split: Split, model: nn.Module) -> Split:
    """The split on the device that ``model`` is on."""
    tensors = [*model.parameters(), *model.buffers()]
    return split.to(tensors[0].device, split.x.dtype) if tensors else split


@torch.no_grad()
def _accuracy(model: nn.Module, split: Split) -> float | None:
    """Share of right classes; a sample whose scores are not finite is wrong. None for an empty split."""
    if not len(split):
        return None
    was_training = model.training
    model.eval()
    try:
        scores = torch.cat([model(x) for x in split.x.split(BATCH)])
    finally:
        model.train(was_training)
    right = (scores.argmax(1) == split.y) & scores.isfinite().all(1)
    return int(right.sum()) / len(split)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _reduced(values: Tensor | None, how: str) -> float | None:
    if values is None or not len(values):
        return None
    return _finite(float(values.max() if how == "max" else values.double().mean()))
