"""The certificate: what is proved about one model, frozen, printable, storable."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from .printed import MISSING, at_least, at_most, number

__all__ = ["ARITHMETIC", "Certificate", "Verdict", "finite_or_none", "weakest"]

Verdict = Literal["certified", "converged", "diverged", "unknown"]

ARITHMETIC = (
    "float64 on the CPU, every rounding counted; definiteness by floating-point Cholesky [R06]; "
    "about the stored codes and scales"
)


@dataclass(frozen=True, repr=False)
class Certificate:
    """Proved bounds about a model's stored numbers (theory §5–6); what does not apply is None.

    It speaks of equilibria and scores in exact arithmetic; what a float32 network computes differs from them by its
    solver's tolerance. Of several equilibrium layers the weakest, with each by itself in ``layers``:

    - ``certified``: m̃ > 0 is proved. ``verdict``: "certified"; else "converged" or "diverged" on the given inputs
      (an observation, not a proof); "unknown" without inputs.
    - ``family``: the norm of what is proved, "l2", or "linf" (some ‖·‖_η; theory §7) of a NEMON layer and of
      weights without structure that only such a norm proves. ``measure`` >=
      μ(W̃) in that norm, and the margin is 1 − μ.
    - ``margin`` <= m̃, ``lipschitz`` >= L̃, ``condition`` >= L̃/m̃.
    - ``solver``, ``alpha``, ``rate``: the layer's solver, its step, and a proved factor of it; ``steps``: proved
      steps until the distance to the equilibrium, in the solver's variable, has shrunk by ``tolerance``;
      ``inexact``: C2's 1/(1 − rate).
    - ``closed_rates``: the closed bounds at their best steps, by solver.
    - ``weight_condition`` >= κ_rel = ‖W̃‖₂/m̃ (T4).
    - ``assumes``: what is not proved here and the rest depends on, in words; empty unless somebody's own activation was
      registered.

    Of a multiscale network (theory §9) ``contraction`` >= ‖N‖₂, which bounds the Lipschitz constant of its map, and is
    its ``rate``; ``training_contraction`` counts the dropout of training in; ``scaled_rate`` holds in a norm that
    weighs its branches.

    With a reference: ``delta_norm`` >= ‖ΔW‖₂; ``sufficient`` and ``predeployment`` (T2's other two forms);
    ``relative_bound`` of ‖z* − z̃*‖/‖z*‖ (C3; only where ‖ΔW‖₂ < m and U, b and all modules before are unchanged).

    With a reference and inputs: ``displacement (B,)`` >= ‖z* − z̃*‖₂ per input (T3, the smaller side), of the last
    equilibrium layer, what the layers before it moved included;
    ``actual_displacement (B,)`` the distance of the computed equilibria as the layer shows them (of several tiers the
    last), with ``actual_error (B,)`` bounding its own error; ``agreement``: the share of inputs whose class is proved
    equal to the reference's, through one linear head; ``unproved``: indices of the others.

    ``fingerprint``: of the network that all this is about (:func:`equipoise.certificates.fingerprint.fingerprint`);
    None in ``layers``.
    """

    certified: bool
    verdict: Verdict
    margin: float | None
    lipschitz: float | None
    condition: float | None
    weight_condition: float | None
    solver: str
    alpha: float | None
    rate: float | None
    steps: int | None
    tolerance: float
    inexact: float | None
    closed_rates: dict[str, float | None]
    family: str = "l2"
    measure: float | None = None
    arithmetic: str = ARITHMETIC
    assumes: tuple[str, ...] = ()
    scheme: dict[str, Any] | None = None
    delta_norm: float | None = None
    sufficient: bool | None = None
    predeployment: bool | None = None
    relative_bound: float | None = None
    contraction: float | None = None
    training_contraction: float | None = None
    scaled_rate: float | None = None
    displacement: Tensor | None = None
    actual_displacement: Tensor | None = None
    actual_error: Tensor | None = None
    agreement: float | None = None
    unproved: Tensor | None = None
    fingerprint: str | None = None
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
            ("provided that", "; ".join(self.assumes) or MISSING),
            ("measure μ_η(W), at most", MISSING if self.family == "l2" else at_most(self.measure, 6)),
            ("contraction ‖N‖₂, at most", at_most(self.contraction, 6)),
            ("contraction with dropout, at most", at_most(self.training_contraction, 6)),
            ("contraction of weighted branches, at most", at_most(self.scaled_rate, 6)),
            ("margin, at least", at_least(self.margin, 6)),
            ("Lipschitz constant, at most", at_most(self.lipschitz, 6)),
            ("condition number, at most", at_most(self.condition, 6)),
            (f"rate of {self.solver}{step}, at most", at_most(self.rate, 6)),
            (
                f"steps to shrink the error by {self.tolerance:g}, at most",
                MISSING if self.steps is None else str(self.steps),
            ),
            (f"‖ΔW‖{'₂' if self.family == 'l2' else '_η'}, at most", at_most(self.delta_norm, 6)),
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
        return f"Certificate({self.verdict}, margin={at_least(self.margin)}, lipschitz={at_most(self.lipschitz)})"


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


def weakest(parts: tuple[Certificate, ...]) -> Certificate:
    """The summary of several layers: each figure the weakest, None where one layer has none."""
    if len(parts) == 1:
        return parts[0]
    least = min(parts, key=lambda part: -math.inf if part.margin is None else part.margin)
    slowest = max(parts, key=lambda part: 2.0 if part.rate is None else part.rate)

    def largest(name: str) -> float | None:
        return _largest([getattr(part, name) for part in parts])

    def everywhere(name: str) -> bool | None:
        values = [getattr(part, name) for part in parts]
        return None if None in values else all(values)

    return replace(
        least,
        certified=all(part.certified for part in parts),
        assumes=tuple(dict.fromkeys(word for part in parts for word in part.assumes)),
        lipschitz=largest("lipschitz"),
        condition=largest("condition"),
        weight_condition=largest("weight_condition"),
        solver=slowest.solver,
        alpha=slowest.alpha,
        rate=slowest.rate,
        steps=slowest.steps,
        inexact=slowest.inexact,
        closed_rates={name: _largest([part.closed_rates[name] for part in parts]) for name in least.closed_rates},
        delta_norm=largest("delta_norm"),
        sufficient=everywhere("sufficient"),
        predeployment=everywhere("predeployment"),
        relative_bound=None,
    )


def _largest(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None
