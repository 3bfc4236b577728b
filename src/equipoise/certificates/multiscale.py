"""The certificate of a multiscale network: its contraction from true norms, and how far codes moved it (theory §9)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import verified
from ..errors import StructureError
from ..layers.lipschitz_mdeq import LipschitzMDEQ
from ..layers.multiscale_deq import MultiscaleDEQ
from ..quantization.schemes import scheme_to_dict
from ..solvers import Picard
from .convergence import inexact_factor, steps_for
from .displacement import scores, settled
from .types import Certificate, Verdict, finite_or_none

__all__ = ["multiscale_certificate"]

CHUNK = 256
"""Images worked on at a time."""

SLACK = 1 + 1e-9


def multiscale_certificate(
    model: MultiscaleDEQ, reference: MultiscaleDEQ | None, inputs: Tensor | None, tol: float
) -> Certificate:
    """What is proved of ``model``, of its distance to a float ``reference``, and per image of ``inputs (B, c, H, W)``.

    ρ = ‖N‖₂ bounds the Lipschitz constant of z ↦ f(z; x), so I − f has margin 1 − ρ and Lipschitz constant 1 + ρ.
    """
    if inputs is not None:
        model.check(inputs)
    rate = model.proved_rate()
    certified = rate < 1
    margin = verified.down(1 - rate) if certified else None
    lipschitz = finite_or_none(verified.up(1 + rate))
    alpha = model.solver_step()
    factor = None  # nothing is proved of Anderson and Broyden
    if certified and type(model.solver) is Picard and alpha <= 1:
        factor = rate if alpha == 1 else verified.up(verified.up(1 - alpha) + verified.up(alpha * rate))
    if reference is not None:
        _check_match(model, reference)
    columns = _columns(model, reference, inputs) if inputs is not None and certified and reference is not None else {}
    return Certificate(
        certified=certified,
        verdict="certified" if certified else _observed(model, inputs),
        margin=finite_or_none(verified.down(1 - rate)),
        lipschitz=lipschitz,
        condition=None if margin is None or lipschitz is None else finite_or_none(verified.up(lipschitz / margin)),
        weight_condition=None if margin is None else finite_or_none(verified.up(rate / margin)),
        solver=type(model.solver).__name__,
        alpha=alpha,
        rate=factor,
        steps=steps_for(factor, tol),
        tolerance=tol,
        inexact=inexact_factor(factor),
        closed_rates={},
        contraction=finite_or_none(rate),
        training_contraction=model.contraction(training=True) if isinstance(model, LipschitzMDEQ) else None,
        scaled_rate=model.scaled_rate() if isinstance(model, LipschitzMDEQ) else None,
        scheme=None if model.scheme is None else scheme_to_dict(model.scheme),
        **columns,
    )


def _observed(model: MultiscaleDEQ, inputs: Tensor | None) -> Verdict:
    if inputs is None:
        return "unknown"
    with torch.no_grad():
        done = [model.converges(part) for part in inputs.split(CHUNK)]
    return "converged" if all(bool(part.all()) for part in done) else "diverged"


def _check_match(model: MultiscaleDEQ, reference: MultiscaleDEQ) -> None:
    for name in ("in_channels", "size", "classes", "stem_stride"):
        ours, theirs = getattr(model, name), getattr(reference, name)
        if ours != theirs:
            raise StructureError(f"the model has {name} {ours}, the reference {theirs}: not the same network")
    if type(model) is not type(reference) or model.plan.shapes != reference.plan.shapes:
        raise StructureError(
            f"the model is a {type(model).__name__} with branches {model.plan.shapes}, the reference a "
            f"{type(reference).__name__} with {reference.plan.shapes}: not the same network"
        )


class _Bounds(NamedTuple):
    displacement: Tensor
    actual: Tensor
    error: Tensor
    agreed: Tensor


def _columns(model: MultiscaleDEQ, reference: MultiscaleDEQ, inputs: Tensor) -> dict[str, Any]:
    """Bounds per image: with w the quantized network's computed equilibrium and ρ, ρ̃ both contractions,

    ‖z̃* − z*‖ <= ‖w − z̃*‖ + ‖w − z*‖ <= ‖f̃(w) − w‖/(1 − ρ̃) + ‖f(w) − w‖/(1 − ρ).
    """
    rate, other = model.proved_rate(), reference.proved_rate()
    if not other < 1:
        return {}
    evaluators = model.evaluator(), reference.evaluator()
    found = []
    for x in inputs.split(CHUNK):
        w = model.solve(x, tol=1e-5).value
        near, far = (evaluator.gap(x, w) for evaluator in evaluators)
        own, moved = near.from_point(rate), far.from_point(other)
        z = reference.solve(x, tol=1e-5).value
        error = evaluators[1].gap(x, z).from_point(other)
        actual = verified.row_norms((w - z).to("cpu", torch.float64))
        agreed = _agreed(model, reference, w, own, moved)
        found.append(_Bounds((own + moved) * SLACK, actual, (own + error) * SLACK + actual * 1e-6, agreed))
    whole = _Bounds(*(torch.cat(column) for column in zip(*found, strict=True))) if found else None
    if whole is None:
        return {}
    share = float(whole.agreed.double().mean()) if len(whole.agreed) else None
    return {
        "displacement": whole.displacement,
        "actual_displacement": whole.actual,
        "actual_error": whole.error,
        "agreement": share,
        "unproved": (~whole.agreed).nonzero()[:, 0],
    }


def _agreed(model: MultiscaleDEQ, reference: MultiscaleDEQ, w: Tensor, own: Tensor, moved: Tensor) -> Tensor:
    """Inputs whose class is proved to be the same: it wins in each network at every point within its bound of w.

    ``own``, ``moved (B,)`` bound how far w lies from the two networks' equilibria.
    """
    parts = [part.detach() for part in model.branches(w)]
    ours, theirs = model.features().proved(parts, own), reference.features().proved(parts, moved)
    top = scores(reference.linear, theirs.value).argmax(1)
    first = settled(reference.linear, theirs.value, top, theirs.error)
    return first & settled(model.linear, ours.value, top, ours.error)
