"""What is proved about an exported program: one frozen record, in real units and the 2-norm (theory §10)."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

__all__ = ["ShipCertificate"]


@dataclass(frozen=True)
class ShipCertificate:
    """For **every** input in the declared range for which the program answers OK:

    ‖computed equilibrium − exact equilibrium of the reference‖₂ <= ``error_bound`` = ``displacement_bound``
    + ``rounding_bound`` + ``truncation_bound``, and each class score is within ``score_error_bound`` of the
    reference's. The reference is the float network that was given, else the network in the file itself.

    ``displacement_bound``: what its rounded weights move the equilibrium (T3). ``rounding_bound``: every rounding of
    the integer code, repeated for ever (C2), and of the inputs where these are floats by nature (``input_rounding``,
    which must be added for floats between the pixels of a program whose inputs are integers). ``truncation_bound``:
    what more than ``steps`` steps would still change. None where nothing is proved.
    """

    certified: bool
    target: str
    mode: str
    arithmetic: str
    reference: str
    steps: int
    error_bound: float | None
    displacement_bound: float | None
    rounding_bound: float | None
    truncation_bound: float | None
    input_rounding_bound: float | None
    score_error_bound: float | None
    tolerance: float | None
    contraction: float | None
    margin: float | None
    iterate_unit: float | None
    iterate_limit: int | None
    iterate_range: str
    accumulator_bound: int | None
    recurrent_bits: int
    input_bits: int
    head_bits: int | None
    activation_bits: int
    features: int
    inputs: int
    classes: int
    ram_bytes: int
    flash_bytes: int
    macs: int
    overflow: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False, indent=1, ensure_ascii=False)

    def summary(self) -> list[tuple[str, str]]:
        """The lines that people read, name and value."""

        def at_most(value: float | None) -> str:
            return "not proved" if value is None else f"{value:.6g}"

        return [
            ("certified", "yes" if self.certified else "NO: nothing is proved about the answers"),
            ("mode", f"{self.mode}, {self.recurrent_bits}-bit codes, {self.activation_bits}-bit iterates"),
            ("steps", str(self.steps)),
            ("error of the equilibrium, at most", at_most(self.error_bound)),
            ("  moved by rounded weights", at_most(self.displacement_bound)),
            ("  rounding in the program", at_most(self.rounding_bound)),
            ("  steps left out", at_most(self.truncation_bound)),
            ("error of a class score, at most", at_most(self.score_error_bound)),
            ("against", self.reference),
            ("iterates", self.iterate_range),
            ("RAM, bytes", str(self.ram_bytes)),
            ("flash, bytes", str(self.flash_bytes)),
            ("multiply-accumulates", str(self.macs)),
        ]
