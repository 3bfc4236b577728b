"""One network after another, each made and tried from (seed, index) alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from equipoise.activations import Activation
from equipoise.certificates import certify, iterates, margin, sides
from equipoise.errors import ConvergenceWarning, EquipoiseError, NotWellPosedError
from equipoise.layers.equilibrium import EquilibriumLayer
from equipoise.solvers import PeacemanRachford

from . import constants, points
from .convolution import convolution
from .equilibria import State, run, through
from .exports import exports
from .files import round_trip
from .ledger import Ledger
from .multiscale import multiscale
from .numbers import numbers
from .subjects import Subject, make
from .tiers import tiers
from .wide import exact

__all__ = ["trial"]

SPECIAL = {
    "numbers": (0.15, numbers),
    "convolution": (0.04, convolution),
    "tiers": (0.06, tiers),
    "multiscale": (0.03, multiscale),
    "exports": (0.06, exports),
}
"""What makes its own subjects: share of the indices, function ``(rng, ledger)``. LAYERS WHOSE TRUTHS ARE FOUND IN A
WAY OF THEIR OWN REGISTER HERE."""

STEPS = 60
"""Of equilibria that certificates of those find."""


def trial(seed: int, index: int, faults: Mapping[str, float] | None = None) -> tuple[str, Ledger]:
    """(what network it was, the books about it)."""
    rng, ledger = np.random.default_rng([seed, index]), Ledger(faults or {})
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        draw = rng.random()
        for name, (share, function) in SPECIAL.items():
            if draw < share:
                with torch.no_grad(), _hurried(STEPS):
                    _tried(ledger, function, rng, ledger)
                return name, ledger
            draw -= share
        subject = make(rng)
        if subject is None:
            return "refused", ledger
        steps = _patience(subject.model, rng)
        with torch.no_grad(), _hurried(steps):
            _tried(ledger, _network, subject, steps, rng, ledger)
    return subject.kind, ledger


def _tried(ledger: Ledger, function: Callable[..., None], *arguments: Any) -> None:
    try:
        function(*arguments)
    except Exception as error:  # of the library, nobody expects one; of the trials, neither
        ledger.failed(error)


def _layers(model: nn.Module) -> list[tuple[int, Any]]:
    modules = list(model) if isinstance(model, nn.Sequential) else [model]
    return [(place, module) for place, module in enumerate(modules) if isinstance(module, EquilibriumLayer)]


def _patience(model: nn.Module, rng: np.random.Generator) -> int:
    """Steps that a solve may take here: a prox found by iteration is slow."""
    closed = all(type(layer.activation).prox is not Activation.prox for _, layer in _layers(model))
    return int(rng.choice([5, 50, 400] if closed else [2, 10, 40]))


@contextmanager
def _hurried(steps: int) -> Iterator[None]:
    """Certificates find their own equilibria in at most so many steps: their bounds hold at any point, near or not."""
    found = sides.PeacemanRachford, iterates.PeacemanRachford
    hasty: Any = partial(PeacemanRachford, max_steps=steps)
    sides.PeacemanRachford = iterates.PeacemanRachford = hasty
    try:
        yield
    finally:
        sides.PeacemanRachford, iterates.PeacemanRachford = found


def _starts(model: nn.Module, x: torch.Tensor, steps: int) -> dict[int, Any]:
    """Where the library's solver comes to in a few steps: a place for Newton's method to start, no more."""
    found, a = {}, x.double()
    doubled = copy.deepcopy(model).double()
    for place, module in enumerate(list(doubled) if isinstance(doubled, nn.Sequential) else [doubled]):
        if isinstance(module, EquilibriumLayer):
            try:
                a = module.solve(a, PeacemanRachford(max_steps=steps), tol=1e-8, stop="residual").value
            except EquipoiseError:
                break
            found[place] = exact(a)
        else:
            a = module(a)
    return found


def _network(subject: Subject, steps: int, rng: np.random.Generator, ledger: Ledger) -> None:
    model, reference, x = subject.model, subject.reference, subject.x
    try:
        told = reference is not None and all(margin(network) > 0 for network in (model, reference))
        certificate = certify(model, reference, x if told else None)
    except EquipoiseError:  # overflow, weights that are not finite
        return
    if rng.random() < 0.05:
        round_trip(model, reference, x if told else None, certificate, ledger)
    layers = _layers(model)
    parts = certificate.layers or (certificate,)
    for (place, layer), part in zip(layers, parts, strict=True):
        constants.constants(layer, part, ledger)
        constants.rates(layer, part, rng, ledger)
        if reference is not None:
            constants.changes(layer, points._at(reference, place), part, ledger)
    if not all(part.certified for part in parts):
        return
    wide = exact(x)
    ours = run(model, wide, _starts(model, x, steps) if steps >= 5 else {})
    place, layer = layers[0]
    entry = ours[place - 1] if place else State(wide, np.zeros(len(wide), np.longdouble))
    if place == 0:
        points.solutions(layer, x, ours[0], steps, rng, ledger)
        if rng.random() < 0.4:
            points.iterates(layer, x, through(layer.injection, entry), ours[0], rng, ledger)
    if reference is not None:
        try:
            theirs = run(reference, wide, {at: state.value for at, state in enumerate(ours)})
        except NotWellPosedError:
            theirs = []
        if certificate.displacement is not None and theirs:
            points.displacements(model, reference, certificate, [at for at, _ in layers], ours, theirs, ledger)
    draw = rng.random()
    if draw < 0.35:
        points.sensitivity(model, wide, ours, rng, ledger)
    elif draw < 0.6 and len(ours) > 1:
        points.radii(model, x, ours, rng, ledger)
    elif draw < 0.85:
        points.boxes(model, x, ours, rng, ledger)
