"""Multiscale networks: their programs of steps read in long doubles, their equilibria by plain iteration.

The contraction that an equilibrium's own error is judged by comes from norms of dense matrices, with zeros at the
edges, and not from those of tori that the certificates are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import equipoise as eq
from equipoise.certificates import certify
from equipoise.layers import steps as kinds
from equipoise.layers.blocks import CappedConv2d, CodedKernel
from equipoise.operators.conv_norm import conv_norm

from .convolution import dense
from .equilibria import State, through
from .files import round_trip
from .ledger import Ledger
from .wide import LD, UNIT, Array, exact, largest, norms

__all__ = ["multiscale"]

Rng = np.random.Generator

TURNS = 100
"""Evaluations of the map in long doubles that an equilibrium may take."""

ROUNDED = 2**20 * UNIT
"""What an evaluation in long doubles may lose, by the largest number met on the way: a dozen steps of at most a
thousand terms each, and one standardization that may divide by √1e-5."""


class Wide(kinds.Reading[Array]):
    """Images ``(B, C, H, W)`` in long doubles; ``size`` is the largest number met."""

    def __init__(self) -> None:
        self.size, self._matrices = LD(1), dict[tuple[Any, tuple[int, int]], Array]()

    def matrix(self, conv: Any, size: tuple[int, int]) -> Array:
        """The convolution on images of ``size`` with zeros around them."""
        key = conv, size
        if key not in self._matrices:
            self._matrices[key] = dense(exact(conv.kernel), size, conv.stride, around=False)
        return self._matrices[key]

    def along(self, path: Any, x: Array) -> Array:
        for step in path:
            x = self._step(step, x)
            self.size = max(self.size, np.abs(x).max(initial=0))
        return x

    def combine(self, weights: Sequence[float], xs: Sequence[Array]) -> Array:
        total = LD(weights[0]) * xs[0]
        for weight, x in zip(weights[1:], xs[1:], strict=True):
            total = total + LD(weight) * x
        return total

    def _step(self, step: Any, x: Array) -> Array:
        count, channels, height, width = x.shape
        match step:
            case kinds.Conv():
                found = x.reshape(count, -1) @ self.matrix(step, (height, width)).T
                found = found.reshape(count, -1, -(-height // step.stride), -(-width // step.stride))
                return found if step.bias is None else found + exact(step.bias)[:, None, None]
            case kinds.GroupMean() | kinds.Standardize():
                grouped = x.reshape(count, step.groups, -1)
                grouped = grouped - grouped.mean(2, keepdims=True)
                if isinstance(step, kinds.Standardize):
                    grouped = grouped / np.sqrt((grouped**2).mean(2, keepdims=True) + LD(kinds.EPS))
                found = grouped.reshape(x.shape)
                if step.gamma is None or step.beta is None:
                    return found
                return found * exact(step.gamma)[:, None, None] + exact(step.beta)[:, None, None]
            case kinds.Slope():
                return LD(step.slope) * np.maximum(x, 0)
            case kinds.Sort():
                return LD(step.slope) * np.sort(x.reshape(count, -1, 2, height, width), 2).reshape(x.shape)
            case kinds.Up():
                return x.repeat(step.factor, 2).repeat(step.factor, 3)
            case kinds.Pool():
                f = step.factor
                return x.reshape(count, channels, height // f, f, width // f, f).mean((3, 5))
            case kinds.Average():
                return x.mean((2, 3), keepdims=True)
        raise AssertionError(step)


class Norms(kinds.Reading[tuple[Array, tuple[int, int]]]):
    """How much a step surely can move what goes through it, by the branch that it comes from; and its image's size."""

    def __init__(self, wide: Wide) -> None:
        self.wide = wide

    def along(self, path: Any, x: tuple[Array, tuple[int, int]]) -> tuple[Array, tuple[int, int]]:
        moved, (height, width) = x
        for step in path:
            match step:
                case kinds.Conv():
                    value, slack = largest(self.wide.matrix(step, (height, width)))
                    moved = moved * (value - slack)
                    height, width = -(-height // step.stride), -(-width // step.stride)
                case kinds.GroupMean():
                    moved = moved * (1 if step.gamma is None else np.abs(exact(step.gamma)).max())
                case kinds.Slope() | kinds.Sort():
                    moved = moved * LD(step.slope)
                case kinds.Up():
                    moved, height, width = moved * step.factor, height * step.factor, width * step.factor
                case kinds.Mask():
                    moved = moved / (1 - LD(step.probability))
                case _:
                    raise AssertionError(step)
        return moved, (height, width)

    def combine(self, weights: Sequence[float], xs: Any) -> tuple[Array, tuple[int, int]]:
        return sum((abs(LD(w)) * x[0] for w, x in zip(weights, xs, strict=True)), LD(0)), xs[0][1]


# Networks


def _network(rng: Rng, plain: bool) -> Any:
    """Of one to three branches, with kernels far below their cap and far above it."""
    torch.manual_seed(int(rng.integers(2**31)))
    channels = ((2,), (2, 4), (2, 4), (2, 2, 2))[rng.integers(4)]
    options: dict[str, Any] = {
        "expansion": int(rng.integers(1, 3)), "groups": int(rng.integers(1, 3)), "post_groups": int(rng.integers(1, 3)),
        "head_channels": 4, "dropout": float(rng.choice([0.0, 0.3])),
    }  # fmt: skip
    kind = eq.MDEQ if plain else eq.LipschitzMDEQ
    if not plain:
        options |= {
            "solver": (eq.Picard(), eq.Picard(float(rng.uniform(0.1, 1))), eq.Anderson())[rng.integers(3)],
            "activation": str(rng.choice(["relu", "groupsort"])), "slope": float(rng.choice([0.4, 1.0])),
            "residual": float(rng.uniform(0.1, 0.9)), "fusion": float(rng.uniform(0.05, 0.95)),
        }  # fmt: skip
        if rng.random() < 0.8:
            near = 1 - 10 ** rng.uniform(-6, -1) if rng.random() < 0.3 else rng.uniform(0.05, 0.95)
            options["contraction"] = float(near)
        else:
            options["norm_cap"] = float(10 ** rng.uniform(-1, 1))
    model: Any = kind(int(rng.integers(1, 3)), 4, 3, channels, **options)
    with torch.no_grad():
        for conv in model.map.convs.values():
            weight = conv.weight if plain else conv.kernel.weight
            weight.mul_(10 ** (rng.uniform(-20, 15) if rng.random() < 0.1 else rng.uniform(-2, 2)))
        for parameter in model.map.norms.parameters():
            parameter.add_(torch.randn_like(parameter) * float(rng.choice([0.0, 0.3, 3.0])))
        model.linear.weight.mul_(float(10 ** rng.uniform(-1, 2)))
    return model.to(torch.float32 if rng.random() < 0.6 else torch.float64).eval()


def _quantized(rng: Rng, model: Any) -> Any:
    options: dict[str, Any] = {
        "granularity": str(rng.choice(["tensor", "row"])), "scale": str(rng.choice(["max", "mse"])),
    }  # fmt: skip
    if rng.random() < 0.5:
        options["head_bits"] = int(rng.integers(1, 17))
    kind = eq.Structured if rng.random() < 0.7 else eq.Assembled
    return eq.quantize(model, kind(int(rng.integers(1, 17)), **options))


def _inexact(model: Any) -> bool:
    """Whether scales are too fine for codes times scales to be doubles: programs hold them rounded then."""
    return any(
        isinstance(conv, CappedConv2d) and isinstance(conv.kernel, CodedKernel) and not conv.kernel.values.exact
        for conv in model.map.convs.values()
    )


class Truth:
    """f of one network on images x, in long doubles, and what it contracts by."""

    def __init__(self, model: Any, x: torch.Tensor | None = None) -> None:
        self.model, self.cell, self.wide = model, model.map.cell("proof"), Wide()
        if x is not None:
            self.injection = self.wide.along(model.inject(), exact(x))

    def gains(self, probability: float = 0.0) -> Array:
        """N of norms that are surely reached."""
        cell = self.model.map.cell("proof", probability)
        units = np.eye(len(cell.shapes), dtype=LD)
        entries = [(row, shape[1:]) for row, shape in zip(units, cell.shapes, strict=True)]
        return np.array([found for found, _ in cell.read(Norms(self.wide), entries, (0 * units[0], entries[0][1]))])

    def branches(self, z: Array) -> list[Array]:
        found, at = [], 0
        for c, h, w in self.cell.shapes:
            found.append(z[:, at : at + c * h * w].reshape(-1, h, w, c).transpose(0, 3, 1, 2))
            at += c * h * w
        return found

    def __call__(self, z: Array, row: int | None = None) -> Array:
        """f(z) ``(B, n)``; of the image ``row`` alone, if given."""
        injection = self.injection if row is None else self.injection[row : row + 1]
        found = self.cell.read(self.wide, self.branches(z), injection)
        return np.concatenate([part.transpose(0, 2, 3, 1).reshape(len(z), -1) for part in found], 1)

    def equilibrium(self, start: Array, contraction: LD) -> State:
        """By iteration from ``start``, within what is left over 1 − ρ; NaN where that is not small."""
        z = np.where(np.isfinite(start), start, 0)
        for _ in range(TURNS):
            image = self(z)
            left = norms(image - z)
            z = image
            if bool((left <= ROUNDED * self.wide.size).all()):
                break
        error = (norms(self(z) - z) + ROUNDED * self.wide.size * z.shape[1]) / (1 - contraction)
        return State(z, np.where((contraction < 1) & (error <= 1e-9 * (1 + norms(z))), error, np.nan))

    def scores(self, z: State) -> Array:
        features = self.model.features().read(self.wide, self.branches(z.value))
        value = features.reshape(len(features), -1)
        return through(self.model.linear, State(value, np.zeros(len(value), LD))).value


# Trials


def multiscale(rng: Rng, ledger: Ledger) -> None:
    """One network: norms of its convolutions, its contraction, its solutions, and what codes changed."""
    _conv_norm(rng, ledger)
    plain = rng.random() < 0.1
    model, reference = _network(rng, plain), None
    x = torch.tensor(rng.standard_normal((4, model.in_channels, 4, 4)) * 10 ** rng.uniform(-2, 2, (4, 1, 1, 1)))
    x[0] = 0
    x = x.to(model.linear.weight.dtype)
    if not plain and rng.random() < 0.6:
        model, reference = _quantized(rng, model), model
    given = x if reference is not None else None
    certificate = certify(model, reference, given)
    if rng.random() < 0.2:
        round_trip(model, reference, given, certificate, ledger)
    if plain:
        ledger.holds("multiscale proves nothing", True, not certificate.certified and certificate.rate is None)
        found = model.solve(x, eq.Picard(max_steps=3))
        ledger.holds("multiscale proves nothing", True, bool(torch.isinf(found.error_bound).all()))
        return
    truth = Truth(model, x)
    contraction = _constants(truth, certificate, ledger)
    _slopes(truth, certificate, rng, ledger)
    if not certificate.certified or _inexact(model):
        return
    _solutions(truth, x, contraction, rng, ledger)
    if reference is not None and not _inexact(reference):
        _changes(truth, Truth(reference, x), x, certificate, contraction, ledger)


def _conv_norm(rng: Rng, ledger: Ledger) -> None:
    o, i, k = (int(n) for n in (*rng.integers(1, 4, 2), rng.choice([1, 3, 5])))
    stride, around = int(rng.integers(1, 4)), bool(rng.random() < 0.5)
    size = (int(rng.integers(1, 4)), int(rng.integers(1, 4)))
    size = (size[0] * stride, size[1] * stride) if around else size
    K = (
        rng.standard_normal((o, i, k, k))
        * 10 ** rng.uniform(-3, 3, (o, 1, 1, 1))
        * 10.0 ** rng.choice([0, 0, -300, 150])
    )
    K[rng.random(K.shape) < 0.3] = 0
    kernel = torch.tensor(K)
    claimed = conv_norm(kernel, size, stride, "circular" if around else "zeros")
    ledger.most(
        f"conv norm {'circular' if around else 'zeros'}", claimed, *largest(dense(exact(K), size, stride, around))
    )


def _constants(truth: Truth, certificate: Any, ledger: Ledger) -> LD:
    """N against norms of dense matrices, ‖N‖₂ and the factor in a norm of one's own; a contraction of one's own."""
    model, slack = truth.model, LD(2) ** -40  # of products of norms that are witnesses in doubles
    known = truth.gains()
    ledger.most("gains", exact(model.gains()), known, slack * known)
    if model.dropout:
        dropped = truth.gains(model.dropout)
        ledger.most("gains of training", exact(model.gains(training=True)), dropped, slack * dropped)
        ledger.most("contraction of training", certificate.training_contraction, *largest(exact(model.gains(True))))
    N = exact(model.gains())
    ledger.most("contraction", certificate.contraction, *largest(N))
    x = np.ones(len(N), dtype=LD)
    for _ in range(300):
        x = (N + N.max() * np.eye(len(N), dtype=LD)) @ x
        x = x / x.max()
    if (x > 0).all():
        ledger.most("scaled rate", certificate.scaled_rate, (N @ x / x).min(), 64 * UNIT * N.max())  # Collatz
    return largest(known)[0] * (1 + LD(1e-6))


def _slopes(truth: Truth, certificate: Any, rng: Rng, ledger: Ledger) -> None:
    """Difference quotients of f, of id − f, and of the solver's map, where they are extreme about some point."""
    n, row = sum(c * h * w for c, h, w in truth.cell.shapes), int(rng.integers(len(truth.injection)))
    size = LD(10.0 ** rng.uniform(-2, 1))
    z = size * rng.standard_normal((1, n)).astype(LD)
    base, step = truth(z, row), size * LD(2) ** -int(rng.integers(2, 20))
    J = ((truth(z + step * np.eye(n, dtype=LD), row) - base) / step).T
    if not np.isfinite(J).all():
        return
    alpha = LD(certificate.alpha)
    eye, wide = np.eye(n), J.astype(float)
    ways = [
        np.linalg.svd(wide)[2][0], np.linalg.svd(eye - wide)[2][0], np.linalg.eigh(eye - (wide + wide.T) / 2)[1][:, 0],
        np.linalg.svd((1 - float(alpha)) * eye + float(alpha) * wide)[2][0],
    ]  # fmt: skip
    d = step * np.array([way * sign for way in ways for sign in (1, -1)], dtype=LD)
    moved = truth(z + d, row) - base
    length, slack = norms(d), 4 * ROUNDED * truth.wide.size * n / step
    ledger.most("multiscale contraction", certificate.contraction, norms(moved) / length, slack)
    ledger.most("multiscale lipschitz", certificate.lipschitz, norms(d - moved) / length, slack)
    if certificate.margin is not None:
        ledger.least("multiscale margin", certificate.margin, (d * (d - moved)).sum(1) / length**2, slack)
    if certificate.certified:
        least = norms(d - moved) / length
        ledger.most(
            "multiscale condition", certificate.condition, least.max() / least.min(), 4 * slack / least.min() ** 2
        )
    if certificate.rate is not None:
        factor = norms((1 - alpha) * d + alpha * moved) / length
        ledger.most("multiscale rate", certificate.rate, factor, slack)
        ledger.most("multiscale inexact", certificate.inexact, 1 / (1 - factor), slack / (1 - factor) ** 2)
        if certificate.steps is not None:
            reached = LD(certificate.rate) ** certificate.steps / LD(certificate.tolerance)
            ledger.most("multiscale steps", 1.0, reached, certificate.steps * 8 * UNIT)


def _solutions(truth: Truth, x: torch.Tensor, contraction: LD, rng: Rng, ledger: Ledger) -> None:
    steps = int(rng.choice([1, 2, 5, 40]))
    name = str(rng.choice(["Picard", "Anderson", "Broyden"]))
    alpha = float(rng.uniform(0.2, 1)) if name == "Picard" and rng.random() < 0.3 else None
    solver = eq.Picard(alpha, max_steps=steps) if name == "Picard" else getattr(eq, name)(max_steps=steps)
    stop = str(rng.choice(["bound", "residual"]))
    found = truth.model.solve(x, solver, tol=float(10 ** rng.uniform(-9, -1)), stop=stop)
    z = truth.equilibrium(exact(found.value), contraction)
    ledger.most(
        f"multiscale error bound {name}", exact(found.error_bound), norms(exact(found.value) - z.value), z.error
    )


def _changes(truth: Truth, other: Truth, x: torch.Tensor, certificate: Any, contraction: LD, ledger: Ledger) -> None:
    if certificate.displacement is None:
        return
    theirs = largest(other.gains())[0] * (1 + LD(1e-6))
    start = exact(truth.model.solve(x, tol=1e-5).value)
    z = truth.equilibrium(start, contraction)
    y = other.equilibrium(start, theirs)
    moved, slack = norms(z.value - y.value), z.error + y.error
    ledger.most("multiscale displacement", exact(certificate.displacement), moved, slack)
    error = np.abs(exact(certificate.actual_displacement) - moved)
    ledger.most("multiscale actual displacement's error", exact(certificate.actual_error), error, slack)
    proved = np.ones(len(moved), bool)
    proved[certificate.unproved.numpy()] = False
    told = proved & np.isfinite(slack)
    ledger.holds("multiscale class unchanged", told, truth.scores(z).argmax(1) == other.scores(y).argmax(1))
    ledger.holds("multiscale agreement", True, abs(certificate.agreement - proved.mean()) < 1e-12)
