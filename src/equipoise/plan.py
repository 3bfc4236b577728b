"""Build the ladder: quantize a float model once per rung, certify each against it, choose one.

Choices are made on the validation split, figures are reported on the test split.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from .certificates import Certificate, Certifier, certify
from .certificates.wellposed import spectrum
from .data import Data, Split
from .errors import ConvergenceError, ConvergenceWarning, InputError, NotWellPosedError, OptionError
from .ladder import Evidence, Findings, Goal, Ladder, Requirements, Rung, Subject, choose
from .layers.chain import chain, features_taken
from .mixed import Menu, Parts, Trial, assign, check_budget, measure, parts_of, scheme_of
from .operators import scheme_from_dict
from .operators import schemes as known_schemes
from .operators.contractive import UnfitSchemeError
from .quantization.schemes import Scheme, Structured
from .quantize import quantize, size

__all__ = ["build_ladder", "check_fits"]

Progress = Callable[[int, int, str], None]
"""Told (steps done, steps in all, what comes next) as the work goes on."""

BATCH = 10_000


def build_ladder(
    model: nn.Module,
    data: Data,
    schemes: Iterable[str] | None = None,
    bits: Iterable[int] = range(8, 0, -1),
    requirements: Requirements = Requirements(),
    input_bits: int | None = None,
    progress: Progress | None = None,
    mixed: bool = False,
) -> Ladder:
    """Quantize ``model`` with every scheme at every number of bits, certify each version, choose one.

    A version that a scheme cannot make (no margin to start from, or none within reach) is left out and noted.

    ``mixed`` adds structured rungs whose parts A, K, U, b and head have bits of their own, out of ``bits`` and
    floats: the best one within ``max_bytes``, or, where no size is asked for, within the size of each version
    with bits that are all alike. On the validation split none of them is proved to move further, in the mean, than
    such a version within the same size. With a ``max_bytes`` the version that is proved to move least is then
    chosen, not the smallest.

    Raises:
        OptionError: unknown scheme, bits out of range, nothing to build; ``mixed`` without the structured scheme,
            or a ``max_bytes`` that no assignment of bits fits in.
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
    goal: Goal = "displacement" if mixed and requirements.max_bytes is not None else "size"
    build = _Builder(model, data, classifies, requirements, goal)
    tell = progress or (lambda done, total, text: None)
    total = len(wanted) + 1 + mixed
    tell(0, total, "float model")
    menu = build.menu([s.bits for s in wanted if isinstance(s, Structured)], input_bits) if mixed else None
    subject = _subject(model, data, classifies)
    for done, scheme in enumerate(wanted, start=1):
        tell(done, total, _label(scheme))
        build.climb(scheme)
    if menu is not None:
        build.mix(menu, lambda text: tell(total - 1, total, text))
    tell(total, total, "done")
    return Ladder(
        tuple(build.rungs), build.chosen, requirements, tuple(build.evidence), subject, tuple(build.notes), goal
    )


class _Builder:
    """A ladder as it grows: every rung certified against the float model on both splits, the best one kept."""

    def __init__(self, model: nn.Module, data: Data, classifies: bool, requirements: Requirements, goal: Goal) -> None:
        self.model, self.classifies, self.requirements, self.goal = model, classifies, requirements, goal
        self.splits = _placed(data.validation, model), _placed(data.test, model)
        self.judges = Certifier(model, self.splits[0].x), Certifier(model, self.splits[1].x)
        self.rungs: list[Rung] = []
        self.evidence: list[Evidence] = []
        self.notes: list[str] = []
        self.chosen: int | None = None
        self._trials: dict[Parts, Trial] = {}

    def climb(self, scheme: Scheme) -> None:
        """Add the rung of ``scheme``, or a note where it cannot be made."""
        try:
            small = quantize(self.model, scheme)
        except (NotWellPosedError, UnfitSchemeError) as error:  # a scheme may not be made for this kind of layer
            self.notes.append(f"{_label(scheme)}: not made; {error}")
            return
        rung, proof = _climb(small, scheme, self.judges, self.splits, self.classifies)
        self.rungs.append(rung)
        self.evidence.append(proof)
        if isinstance(scheme, Structured):
            self._trials[parts_of(scheme)] = Trial(rung.size_bytes, _or_infinite(proof.findings.displacement_mean))
        found = [evidence.findings for evidence in self.evidence]
        self.chosen = choose(found, self.requirements, self.goal)
        # Large models are many: only one that may still be chosen is kept.
        for i, evidence in enumerate(self.evidence):
            self.evidence[i] = evidence if i == self.chosen else dataclasses.replace(evidence, model=None)

    def menu(self, widths: Sequence[int], input_bits: int | None) -> Menu | None:
        """What mixed precision may choose from; None, and a note, where there is no margin to keep."""
        if not widths:
            raise OptionError("mixed precision is that of the structured scheme: name it among the schemes")
        try:
            menu = measure(self.model, self.splits[0].x, widths, input_bits)
        except (NotWellPosedError, UnfitSchemeError) as error:  # a scheme may not be made for this kind of layer
            self.notes.append(f"structured, mixed: not made; {error}")
            return None
        if self.requirements.max_bytes is not None:
            check_budget(menu, self.requirements.max_bytes)
        return menu

    def mix(self, menu: Menu, tell: Callable[[str], None]) -> None:
        """Add the best assignment of bits within the byte budget, or within the size of each uniform one."""

        def judge(parts: Parts) -> Trial:
            if parts not in self._trials:
                tell(f"structured, {parts}")
                small = quantize(self.model, scheme_of(parts))
                moved = _reduced(_proved(self.judges[0], small).displacement, "mean")
                self._trials[parts] = Trial(size(small), _or_infinite(moved))
            return self._trials[parts]

        even = menu.uniform()
        most = self.requirements.max_bytes
        budgets = [menu.size(parts) for parts in even] if most is None else [most]
        known = {rung.parts for rung in self.rungs if rung.scheme == "structured"}
        fresh = [p for p in dict.fromkeys(assign(menu, budgets, even, judge).values()) if p not in known]
        for parts in fresh:
            self.climb(scheme_of(parts))
        if not fresh:
            self.notes.append("structured, mixed: not made; none is proved to move less than bits that are all alike")


def check_fits(model: nn.Module, data: Data) -> None:
    """Raise :class:`InputError`, naming both, unless ``model`` takes as many features as ``data`` has; warn where
    the model was trained on inputs that were preprocessed otherwise."""
    takes = features_taken(model)
    if takes is None:
        raise InputError(f"the model takes images, {data.name} is flat: put an Unflatten before it")
    if takes != data.features:
        raise InputError(
            f"the model takes {takes} features and {data.name} has {data.features}: name the data that the"
            " model was trained on"
        )
    _check_runs(model, data)
    learned = getattr(model, "preprocessing", None)
    if learned is not None and learned != data.preprocessing:
        warnings.warn(
            f"the model was trained on inputs preprocessed as {learned}, {data.name} is {data.preprocessing}:"
            " figures on it may mean little",
            stacklevel=2,
        )


def _check_runs(model: nn.Module, data: Data) -> None:
    """Raise :class:`InputError` where the sizes of two modules of a file do not go together."""
    like = next((p for p in model.parameters() if p.is_floating_point()), data.train.x)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # only the shapes are of interest
            model(data.train.x[:1].to(like))
    except ConvergenceError:  # of a strict layer, which may have its reasons
        pass
    except (RuntimeError, IndexError) as error:  # what torch says of shapes
        raise InputError(f"the model cannot be run on {data.name}, its modules do not fit together: {error}") from error


def _outputs(model: nn.Module) -> int | None:
    """Number of outputs per sample."""
    for _, module in reversed(chain(model)):
        found = getattr(module, "out_features", getattr(module, "features", None))
        if found is not None:
            return int(found)
    return None


def _wanted(asked: Iterable[str] | None, bits: Iterable[int], input_bits: int | None) -> list[Scheme]:
    names, widths = list(dict.fromkeys(known_schemes() if asked is None else asked)), list(dict.fromkeys(bits))
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
    last = _proved(judges[1], small)
    first = _proved(judges[0], small) if last.certified else last  # else there is nothing to prove per input
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the verdict tells
        accuracies = [_accuracy(small, split) if classifies else None for split in splits]
    bytes_, margin = size(small), _finite(last.margin)
    findings = Findings(
        first.certified,
        bytes_,
        margin,
        accuracies[0],
        first.agreement,
        displacement=_reduced(first.displacement, "max"),
        displacement_mean=_reduced(first.displacement, "mean"),
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
        skew_bits=scheme.skew_bits if isinstance(scheme, Structured) else None,
        bias_bits=scheme.bias_bits,
        head_bits=scheme.head_bits,
    )
    return rung, Evidence(small, last, findings, spectrum(small))


def _proved(judge: Certifier, small: nn.Module) -> Certificate:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the verdict tells
        return judge(small)


def _label(scheme: Scheme) -> str:
    if isinstance(scheme, Structured) and scheme.skew_bits is not None:
        return f"structured, {parts_of(scheme)}"
    return f"{scheme.name}, {scheme.bits} bit{'s' if scheme.bits > 1 else ''}"


def _subject(model: nn.Module, data: Data, classifies: bool) -> Subject:
    proof = certify(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        accuracy = _accuracy(model, _placed(data.test, model)) if classifies else None
    rate, steps = _finite(proof.rate), proof.steps
    sizes = len(data.validation), len(data.test)
    numbers = tuple(spectrum(model).tolist())
    return Subject(data.name, *sizes, size(model), _finite(proof.margin), rate, steps, accuracy, numbers)


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


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def _reduced(values: Tensor | None, how: str) -> float | None:
    if values is None or not len(values):
        return None
    return _finite(float(values.max() if how == "max" else values.double().mean()))
