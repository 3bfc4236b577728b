"""The certificate: what is proved about one model, frozen, printable, storable."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .printed import MISSING, at_least, at_most, number

__all__ = ["ARITHMETIC", "Certificate", "Verdict"]

Verdict = Literal["certified", "converged", "diverged", "unknown"]

ARITHMETIC = (
    "float64 on the CPU, every rounding counted; definiteness by floating-point Cholesky [R06]; "
    "about the stored codes and scales"
)


@dataclass(frozen=True, repr=False)
class Certificate:
    """Proved bounds about a model's stored numbers (theory §5–6); what does not apply is None.

    Of the whole model, the weakest over its equilibrium layers (each by itself in ``layers``):

    - ``certified``: m̃ > 0 is proved. ``verdict``: "certified"; else "converged" or "diverged" on the given inputs
      (an observation, not a proof); "unknown" without inputs.
    - ``margin`` <= m̃, ``lipschitz`` >= L̃, ``condition`` >= L̃/m̃.
    - ``solver``, ``alpha``, ``rate``: the layer's solver, its step, and a proved factor of it; ``steps``: proved
      steps until the distance to the equilibrium has shrunk by ``tolerance``; ``inexact``: C2's 1/(1 − rate).
    - ``closed_rates``: the closed bounds at their best steps, by solver.
    - ``weight_condition`` >= κ_rel = ‖W̃‖₂/m̃ (T4).

    With a reference: ``delta_norm`` >= ‖ΔW‖₂; ``sufficient`` and ``predeployment`` (T2's other two forms);
    ``relative_bound`` of ‖z* − z̃*‖/‖z*‖ (C3; only where U and b are unchanged and ‖ΔW‖₂ < m).

    With a reference and inputs: ``displacement (B,)`` >= ‖z* − z̃*‖₂ per input (T3, the smaller side);
    ``actual_displacement (B,)`` the distance of the computed equilibria, with ``actual_error (B,)`` bounding its own
    error; ``agreement``: the share of inputs whose class is proved equal to the reference's, through one linear
    head; ``unproved``: indices of the others.
    """

    certified: bool
    verdict: Verdict
    margin: float
    lipschitz: float
    condition: float | None
    weight_condition: float | None
    solver: str
    alpha: float | None
    rate: float | None
    steps: int | None
    tolerance: float
    inexact: float | None
    closed_rates: dict[str, float | None]
    arithmetic: str = ARITHMETIC
    scheme: dict[str, Any] | None = None
    delta_norm: float | None = None
    sufficient: bool | None = None
    predeployment: bool | None = None
    relative_bound: float | None = None
    displacement: Tensor | None = None
    actual_displacement: Tensor | None = None
    actual_error: Tensor | None = None
    agreement: float | None = None
    unproved: Tensor | None = None
    layers: tuple[Certificate, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values: tensors as lists, no infinities."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def summary(self) -> list[tuple[str, str]]:
        """Rows (what, value) in reading order, without what does not apply."""
        step = "" if self.alpha is None else f" (α = {number(self.alpha)})"
        rows: list[tuple[str, str]] = [
            ("verdict", self.verdict),
            ("margin, at least", at_least(self.margin, 6)),
            ("Lipschitz constant, at most", at_most(self.lipschitz, 6)),
            ("condition number, at most", at_most(self.condition, 6)),
            (f"rate of {self.solver}{step}, at most", at_most(self.rate, 6)),
            (
                f"steps to shrink the error by {self.tolerance:g}, at most",
                MISSING if self.steps is None else str(self.steps),
            ),
            ("‖ΔW‖₂, at most", at_most(self.delta_norm, 6)),
            ("relative displacement, at most", at_most(self.relative_bound)),
        ]
        if self.displacement is not None and len(self.displacement):
            rows.append(("displacement, mean of the proved bounds", at_most(float(self.displacement.mean()))))
            rows.append(("displacement, largest proved bound", at_most(float(self.displacement.max()))))
        if self.actual_displacement is not None and len(self.actual_displacement):
            rows.append(("displacement, mean as measured", number(float(self.actual_displacement.mean()))))
        if self.agreement is not None:
            rows.append(("class proved unchanged", f"{at_least(100 * self.agreement)} % of inputs"))
        rows.append(("arithmetic", self.arithmetic))
        return [row for row in rows if row[1] != MISSING]

    def __str__(self) -> str:
        rows = self.summary()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def __repr__(self) -> str:
        return f"Certificate({self.verdict}, margin={self.margin:.6g}, lipschitz={self.lipschitz:.6g})"


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, Certificate):
        return value.to_dict()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def finite_tensor_or_none(value: Tensor) -> Tensor | None:
    return value if bool(torch.isfinite(value).all()) else None
