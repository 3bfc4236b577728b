"""A ladder of quantized versions in figures, what is asked of a version, and which one to take.

Nothing is computed here but the choice; ``plan`` builds the ladder.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ._atomic import replacing
from .certificates import Certificate
from .errors import OptionError
from .mixed import Parts

__all__ = ["Evidence", "Findings", "Goal", "Ladder", "Requirements", "Rung", "Subject", "choose"]

Goal = Literal["size", "displacement"]
"""What the chosen version has least of: bytes, or the mean of the proved displacements."""


@dataclass(frozen=True)
class Rung:
    """One quantized version, in figures that go into ``ladder.json``; what does not apply is None.

    ``bits`` are those of the recurrent weights (of A in a structured version), ``skew_bits`` of K, where it has its
    own; ``input_bits`` of U, ``bias_bits`` of b, ``head_bits`` of the head: None for floats.
    ``margin``, ``rate`` and ``steps`` (until the distance to the equilibrium has shrunk by 1e-6) are proved and
    hold for every input; ``displacement_bound_mean`` and ``agreement`` are proved input by input, over the test
    split; ``accuracy`` and ``displacement_mean`` are measured there.
    """

    scheme: str
    bits: int
    input_bits: int | None
    size_bytes: int
    margin: float | None
    verdict: str
    rate: float | None
    steps: int | None
    accuracy: float | None
    displacement_mean: float | None
    displacement_bound_mean: float | None
    agreement: float | None
    skew_bits: int | None = None
    bias_bits: int | None = None
    head_bits: int | None = None

    @property
    def certified(self) -> bool:
        """Whether a positive margin is proved."""
        return self.verdict == "certified"

    @property
    def mixed(self) -> bool:
        """Whether its parts have bits of their own."""
        return any(bits is not None for bits in (self.skew_bits, self.bias_bits, self.head_bits))

    @property
    def parts(self) -> Parts:
        """Bits of A, K, U, b and the head of a structured version."""
        skew_bits = self.bits if self.skew_bits is None else self.skew_bits
        return Parts(self.bits, skew_bits, self.input_bits, self.bias_bits, self.head_bits)


@dataclass(frozen=True)
class Findings:
    """What a rung is chosen by: ``accuracy``, ``agreement`` and ``displacement`` of the validation split.

    ``displacement`` is the *largest* proved bound of ‖z* − z̃*‖₂ over its samples, ``displacement_mean`` their mean.
    """

    certified: bool
    size_bytes: int
    margin: float | None
    accuracy: float | None
    agreement: float | None
    displacement: float | None
    displacement_mean: float | None = None


@dataclass(frozen=True)
class Requirements:
    """What a rung must keep beyond being certified; None asks nothing.

    Args:
        min_agreement: share of inputs whose class is proved to be the float model's, in [0, 1].
        max_displacement: every validation input must be proved to move less than this: the largest bound
            is compared, not the mean, since a mean would promise nothing about any single input.
        min_accuracy: measured share of right classes, in [0, 1].
        max_bytes: packed size.

    Raises:
        OptionError: a value outside its range.
    """

    min_agreement: float | None = None
    max_displacement: float | None = None
    min_accuracy: float | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("min_agreement", "min_accuracy"):
            share = getattr(self, name)
            if share is not None and not (_is_number(share) and 0 <= share <= 1):
                raise OptionError(f"{name}={share!r}: give a share from 0 to 1, such as 0.95")
        moved = self.max_displacement
        if moved is not None and not (_is_number(moved) and 0 <= moved < math.inf):
            raise OptionError(f"max_displacement={moved!r}: give a distance, 0 or more, in the norm of z")
        most = self.max_bytes
        if most is not None and (type(most) is not int or most < 1):
            raise OptionError(f"max_bytes={most!r}: give a positive integer")

    def to_dict(self) -> dict[str, Any]:
        """Only what is asked for."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def unmet(self, findings: Findings) -> tuple[str, ...]:
        """The names of what ``findings`` misses, "certified" first; empty where all is kept."""
        missed = () if findings.certified else ("certified",)
        pairs = (
            ("min_agreement", findings.agreement, 1),
            ("max_displacement", findings.displacement, -1),
            ("min_accuracy", findings.accuracy, 1),
            ("max_bytes", findings.size_bytes, -1),
        )
        return missed + tuple(name for name, found, sign in pairs if not _keeps(found, getattr(self, name), sign))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _keeps(found: float | None, asked: float | None, sign: int) -> bool:
    return asked is None or (found is not None and sign * found >= sign * asked)


@dataclass(frozen=True, eq=False)
class Evidence:
    """Behind a rung, and not in its JSON: its certificate over the test split (per-sample bounds and distances
    included), what the choice saw, the quantized model, kept for the chosen rung only, and the ``spectrum (N,)``
    whose least number the margin bounds, as computed."""

    model: nn.Module | None
    certificate: Certificate
    findings: Findings
    spectrum: Tensor | None = None

    @property
    def portable_certificate(self) -> Certificate:
        """The certificate without its per-sample tensors, which would outweigh the model in its file."""
        return _without_samples(self.certificate)


def _without_samples(certificate: Certificate) -> Certificate:
    return dataclasses.replace(
        certificate,
        displacement=None,
        actual_displacement=None,
        actual_error=None,
        unproved=None,
        layers=tuple(_without_samples(layer) for layer in certificate.layers),
    )


@dataclass(frozen=True)
class Subject:
    """The float model that a ladder starts from, and the data it is judged on (test figures); ``spectrum`` as in
    :class:`Evidence`."""

    data: str
    validation_samples: int
    test_samples: int
    size_bytes: int
    margin: float | None
    rate: float | None
    steps: int | None
    accuracy: float | None
    spectrum: tuple[float, ...] = ()


@dataclass(frozen=True)
class Ladder:
    """All rungs, the index of the chosen one (None: none keeps what was asked), and what was asked.

    ``evidence`` has one entry per rung; ``notes`` say which versions could not be made, and why. ``goal``: what the
    chosen one has least of.
    """

    rungs: tuple[Rung, ...]
    chosen: int | None
    requirements: Requirements
    evidence: tuple[Evidence, ...] = ()
    subject: Subject | None = None
    notes: tuple[str, ...] = ()
    goal: Goal = "size"

    def to_dict(self) -> dict[str, Any]:
        """``{"rungs": [{…}], "chosen": index or None, "requirements": {…}}``, as in ``ladder.json``."""
        return {
            "rungs": [dataclasses.asdict(rung) for rung in self.rungs],
            "chosen": self.chosen,
            "requirements": self.requirements.to_dict(),
        }

    def write(self, path: str | Path, force: bool = False) -> None:
        """Write ``to_dict()`` as JSON, whole or not at all. Raises :class:`OutputError`."""
        with replacing(path, force) as file:
            file.write(json.dumps(self.to_dict(), indent=2, allow_nan=False).encode() + b"\n")


def choose(findings: Sequence[Findings], requirements: Requirements, goal: Goal = "size") -> int | None:
    """The index of the certified version that keeps every requirement and is the smallest, or, for the goal
    ``"displacement"``, is proved to move least in the mean; of equals, the smaller and then the larger margin."""
    kept = [i for i, found in enumerate(findings) if not requirements.unmet(found)]

    def rank(i: int) -> tuple[float, int, float]:
        found = findings[i]
        moved = 0.0 if goal == "size" else found.displacement_mean
        return math.inf if moved is None else moved, found.size_bytes, -(found.margin or 0.0)

    return min(kept, key=rank, default=None)
