"""How near to the equilibrium rounded iterates end, in the arithmetic that computes them (theory §5, C2).

One step of the machine is û⁺ = T(û) + e with ‖e‖ <= √n δ/2 + η: the grid, and the rounding of evaluating T. The latter
grows with the size of û, that is with its distance E from u*; so E⁺ <= (r + η₁) E + √n δ/2 + η₀.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import verified
from ..activations import ACTIVATIONS, PROVED, Activation, Hardtanh, LeakyReLU, ReLU, SoftThreshold
from ..errors import InputError, NotWellPosedError, OptionError, StructureError
from ..layers.chain import chain
from ..layers.linear import QuantizedLinear
from ..layers.mondeq import MonDEQ
from ..operators import DenseOperator
from ..operators.base import product_rounding
from ..solvers import DouglasRachford, ForwardBackward, PeacemanRachford, Problem, Rounded, Solver, solve, tuned
from .convergence import geometric_sum, solver_rate
from .sides import SLACK, SOLVE_TOL, DenseSide
from .types import Certificate
from .wellposed import fresh_operator

__all__ = ["IterateFloor", "iterate_floor"]


@dataclass(frozen=True)
class IterateFloor:
    """Proved distances of rounded iterates from the equilibrium, per input (theory §5, C2 [LLC26]).

    ``alpha``, ``rate``: the splitting's step and a proved factor r of it. ``steps``: the step they hold at, None for
    the limit superior. ``exact``: what the grid costs in exact arithmetic, ε/(1 − r) on a fixed grid, of an adaptive
    one Σ_{j<k} r^{k−1−j} ε_j, 0 in the limit. With the arithmetic's own rounding and, after ``steps``, with what is
    left of the start: ``iterate (B,)`` >= ‖uᵏ − u*‖₂ and ‖zᵏ − z*‖₂; ``value (B,)`` >= ‖σ(W zᵏ + q) − z*‖₂, which is
    what a layer returns. Infinite where the arithmetic is too coarse for the factor.
    """

    alpha: float
    rate: float
    steps: int | None
    exact: float
    iterate: Tensor
    value: Tensor

    def total(self, certificate: Certificate) -> Tensor:
        """``(B,)`` >= ‖σ(W̃ zᵏ + q̃) − z*‖₂, z* the reference's equilibrium: ``value`` plus the displacement (T3).

        ``certificate``: of the network with this one equilibrium layer, with a reference and the same inputs.
        """
        displacement = certificate.displacement
        if displacement is None or certificate.layers or displacement.shape != self.value.shape:
            raise InputError(
                f"the certificate holds no displacement of one equilibrium layer at the same {len(self.value)} "
                "inputs; it comes from certify(model, reference, inputs)"
            )
        return (self.value + displacement) * SLACK


def iterate_floor(layer: MonDEQ, x: Tensor, solver: Rounded | None = None, steps: int | None = None) -> IterateFloor:
    """Bound the iterates of ``solver`` on ``layer`` at the inputs ``x (B, d)``, from u⁰ = 0 (theory §5, C2).

    With r a proved factor of the splitting, S = ‖u*‖, ε_k = √n δ_k/2 and η₀, η₁ the rounding of a step in the layer's
    arithmetic (a step at distance E from u* errs by η₀ + η₁ E at most), ρ = r + η₁ < 1:

        ‖uᵏ − u*‖ <= ρᵏ S + Σ_{j<k} ρ^{k−1−j} (ε_j + η₀),      limsup <= (ε_∞ + η₀)/(1 − ρ).

    z* is the exact equilibrium for the stored numbers and the given x. Of a float32 layer the larger of the bounds in
    float32 and float64 is taken, since ``layer.solve`` may finish there. A splitting without ``alpha`` gets the one
    that it chooses for these weights; a layer in training may use an older one.

    Args:
        solver: default the layer's own, which then must be Rounded.
        steps: the number k of steps taken; None for the limit superior.

    Raises:
        StructureError: not a MonDEQ.
        OptionError: no Rounded solver; a prox_{αf} that is found by iteration, of which no rounding is proved.
        InputError: inputs of another shape, not floating point, NaN or infinite.
        NotWellPosedError: no positive margin, or no factor below 1, is proved.
    """
    if not isinstance(layer, MonDEQ):
        raise StructureError(f"iterate_floor takes an equilibrium layer (MonDEQ), not {type(layer).__name__}")
    chosen: Solver = layer.solver if solver is None else solver
    chain(layer)  # a plain layer and nothing else
    if not isinstance(chosen, Rounded):
        raise OptionError(f"iterate_floor is about iterates on a grid; {chosen!r} rounds none: give it Rounded(...)")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise OptionError(f"steps is {steps!r}; it is a positive integer, or None for the limit")
    _check_inputs(layer, x)
    proved = fresh_operator(layer)
    if (margin := proved.euclidean_margin()) <= 0:
        raise NotWellPosedError(f"the layer has the Euclidean margin {margin:.6g}; nothing contracts", margin)
    with torch.no_grad(), torch.autocast(layer.bias.device.type, enabled=False):
        machine = layer.operator
        machines = [machine]
        if machine.weight.dtype == torch.float32:
            exact, error = proved.matrix64()
            machines.append(DenseOperator(exact.to(machine.weight.device), exact=(exact, error)))
        known = _Sizes.of(layer, proved, x)
        found = [_bound(chosen, layer.activation, known, proved, each, steps) for each in machines]
    first = found[0]
    return replace(
        first,
        iterate=torch.stack([each.iterate for each in found]).amax(0),
        value=torch.stack([each.value for each in found]).amax(0),
    )


def _check_inputs(layer: MonDEQ, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != layer.in_features or not x.is_floating_point():
        given = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"the inputs are {given}; a floating-point tensor (batch, {layer.in_features}) is needed")
    if not bool(torch.isfinite(x).all()):
        raise InputError("the inputs hold NaN or infinite entries; nothing is proved about those")
    if layer.bias.dtype not in (torch.float32, torch.float64):
        raise InputError(f"the layer is {layer.bias.dtype}; float32 or float64 is needed: layer.float()")


class _Sizes(NamedTuple):
    """Per input: a point ẑ near z* and q in float64, bounds on both errors, ‖q‖, and the layer's error in forming q."""

    z: Tensor
    z_error: Tensor
    q: Tensor
    q_error: Tensor
    q_size: Tensor
    formed: Tensor

    @classmethod
    def of(cls, layer: MonDEQ, proved: DenseOperator, x: Tensor) -> _Sizes:
        side = DenseSide.of(layer, proved)
        a = x.detach().to("cpu", torch.float64)
        size = verified.row_norms(a)
        none = a.new_zeros(len(a), layer.features)
        q = a @ side.U.mT + side.b
        q_error = side.rounding(none, size)
        problem = Problem(side.operator, q, layer.activation, q_error)
        z, z_error = q, size
        if len(a):
            finder = PeacemanRachford()
            near = solve(finder, problem, tuned(finder, side.operator, layer.activation, q), SOLVE_TOL, "bound")
            z, z_error = near.value, near.error_bound
        assert isinstance(layer.injection, (nn.Linear, QuantizedLinear))
        like = layer.bias
        info = torch.finfo(like.dtype)
        gamma = product_rounding(2 * layer.in_features + 8, like)
        cast = info.eps if x.dtype.itemsize > like.dtype.itemsize else 0.0  # x itself is rounded
        formed = gamma * (side.spread_U * size + side.size_b) + side.e_U * size + side.e_b
        formed = formed + cast * (1 + gamma) * side.spread_U * size
        formed = (formed + _lost(layer.in_features + layer.features, info, 1 + side.spread_U)) * SLACK
        return cls(z, z_error, q, q_error, (verified.row_norms(q) + q_error) * SLACK, formed)


class _Point(NamedTuple):
    """Bounds of ‖u‖, ‖prox_{αf}(u)‖ and ‖2 prox_{αf}(u) − u‖, of ‖q‖ and of the error of q, and 1 for what underflows.

    What a step can err by is linear in these: at ``point + E · AWAY`` by η₀ + η₁ E.
    """

    u: Tensor
    z: Tensor
    reflected: Tensor
    q: Tensor
    q_error: Tensor
    one: Tensor


AWAY = _Point(*torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
"""What the sizes grow by at distance 1 from u*: the maps are 1-Lipschitz."""


def _bound(
    solver: Rounded,
    activation: Activation,
    known: _Sizes,
    proved: DenseOperator,
    machine: DenseOperator,
    steps: int | None,
) -> IterateFloor:
    """The bounds for the arithmetic of ``machine``, whose matrices are what is multiplied by."""
    alpha = solver.on.tune(machine).alpha
    _, rate = solver_rate(replace(solver.on, alpha=alpha), proved)
    if rate is None:
        raise NotWellPosedError(
            f"no factor below 1 is proved for {type(solver.on).__name__} at α = {alpha:g}; give it another alpha",
            proved.margin(),
        )
    n = machine.features
    info = torch.finfo(machine.weight.dtype)
    unit = info.eps / 2
    prox = _prox_rounding(activation, alpha, info)
    at = _at_equilibrium(solver, alpha, known, proved)
    step: _ForwardStep | _ResolventStep
    if isinstance(solver.on, ForwardBackward):
        step = _ForwardStep(machine, alpha, prox, proved)
    else:
        relaxation = DouglasRachford.relaxation if isinstance(solver.on, DouglasRachford) else 1.0
        step = _ResolventStep(machine, alpha, prox, relaxation, proved)
    # the grid rounds T̂(û), of size at most ‖u*‖ + E + err: a quotient and a product, besides δ/2
    eta_0 = (step.error(at) * (1 + 4 * unit) + 4 * unit * at.u) * SLACK
    eta_1 = float((step.error(AWAY) * (1 + 4 * unit) + 4 * unit) * SLACK)
    grid = math.sqrt(n) * solver.grid / 2 * SLACK
    rho = verified.up(rate + eta_1)
    decay = solver.decay or 1.0
    if rho >= 1:
        far = torch.full_like(at.u, math.inf)
    elif steps is None:
        far = ((grid * (1 + 32 * unit) if decay == 1 else 0.0) + eta_0) / verified.down(1 - rho) * SLACK
    else:
        far = rho**steps * at.u + grid * (1 + 32 * unit) * geometric_sum(rho, decay, steps)
        far = (far + eta_0 * geometric_sum(rho, 1.0, steps)) * SLACK
    if steps is None:
        exact = verified.up(grid / verified.down(1 - rate)) if decay == 1 else 0.0
    else:
        exact = verified.up(grid * geometric_sum(rate, decay, steps))
    away = far if isinstance(solver.on, ForwardBackward) else prox.after(at.z, far, n)
    value = _returned(activation, known, proved, machine, at.z, away)
    return IterateFloor(
        alpha, rate, steps, exact, away.nan_to_num(math.inf, math.inf), value.nan_to_num(math.inf, math.inf)
    )


def _at_equilibrium(solver: Rounded, alpha: float, known: _Sizes, proved: DenseOperator) -> _Point:
    """Sizes at the fixed point: u* = z* of forward–backward, u* = (1 − α) z* + α (W z* + q) of the others."""
    z = (verified.row_norms(known.z) + known.z_error) * SLACK
    q_size, one = (known.q_size + known.formed) * SLACK, torch.ones_like(z)
    if isinstance(solver.on, ForwardBackward):
        return _Point(z, z, z, q_size, known.formed, one)
    matrix, error = proved.matrix64()
    u = (1 - alpha) * known.z + alpha * (known.z @ matrix.mT + known.q)
    spread = abs(1 - alpha) + alpha * proved.absolute_norm()
    doubt = (abs(1 - alpha) + alpha * proved.norm()) * known.z_error + alpha * (known.q_error + error * z)
    doubt = (doubt + verified.gamma(len(matrix) + 8) * (spread * z + alpha * known.q_size)) * SLACK
    reflected = (verified.row_norms(2 * known.z - u) * SLACK + 2 * known.z_error + doubt) * SLACK
    return _Point((verified.row_norms(u) + doubt) * SLACK, z, reflected, q_size, known.formed, one)


class _Prox(NamedTuple):
    """|fl(prox(v)) − prox(v)| <= relative · |fl(prox(v))| + absolute, entry by entry."""

    relative: float
    absolute: float

    def after(self, size: Tensor, error: Tensor, n: int, one: Tensor | float = 1.0) -> Tensor:
        """The error of a computed prox whose argument errs by ``error`` and whose exact value has at most ``size``."""
        return (error + self.relative * (size + error) + math.sqrt(n) * self.absolute * one) / (1 - self.relative)


def _prox_rounding(activation: Activation, alpha: float, info: torch.finfo) -> _Prox:
    kind = type(activation)
    if kind is ReLU:
        return _Prox(0.0, 0.0)
    if kind in (LeakyReLU, Hardtanh):  # a slope or an end, rounded to the dtype
        return _Prox(4 * info.eps, 4 * info.tiny)
    if kind is SoftThreshold:
        assert isinstance(activation, SoftThreshold)
        return _Prox(2 * info.eps, 2 * info.eps * alpha * activation.threshold)
    if kind not in PROVED:
        raise StructureError(f"of {activation!r} no rounding is proved; iterate_floor knows {', '.join(ACTIVATIONS)}")
    if alpha != 1:
        raise OptionError(
            f"prox_αf of {activation} at α = {alpha:g} is found by iteration, and no rounding of it is proved; give "
            "the splitting alpha=1.0"
        )
    return _Prox(activation.ulps * info.eps, activation.ulps * info.tiny)


def _lost(n: int, info: torch.finfo, size: float) -> float:
    """What underflow can cost a product of n terms, in the 2-norm."""
    return float(8 * info.tiny * (n + 4) ** 1.5 * size)


class _ForwardStep:
    """prox_{αf}((1 − α) z + α (W z + q))."""

    def __init__(self, machine: DenseOperator, alpha: float, prox: _Prox, proved: DenseOperator) -> None:
        self.n, self.alpha, self.prox = machine.features, alpha, prox
        self.gamma = product_rounding(self.n + 8, machine.weight)
        self.spread, self.stored = proved.absolute_norm(), proved.representation_error
        self.lost = _lost(self.n, torch.finfo(machine.weight.dtype), 1 + alpha + self.spread)

    def error(self, at: _Point) -> Tensor:
        alpha = self.alpha
        sizes = (alpha * self.spread + abs(1 - alpha)) * at.u + alpha * at.q
        inner = self.gamma * sizes + alpha * self.stored * at.u + alpha * at.q_error + self.lost * (at.one + at.u)
        return self.prox.after(at.z, inner, self.n, at.one)


class _ResolventStep:
    """(1 − θ) u + θ (C (2 prox_{αf}(u) − u) + c), c = α (q + C q), where ‖C‖₂ < 1 is proved."""

    def __init__(
        self, machine: DenseOperator, alpha: float, prox: _Prox, relaxation: float, proved: DenseOperator
    ) -> None:
        self.n, self.alpha, self.prox, self.relaxation = machine.features, alpha, prox, relaxation
        self.unit = torch.finfo(machine.weight.dtype).eps / 2
        self.gamma = product_rounding(self.n + 8, machine.weight)
        C = machine.cayley(alpha).to("cpu", torch.float64)
        self.spread = verified.absolute_norm(C)
        self.off = _cayley_error(C, alpha, proved)
        self.lost = _lost(self.n, torch.finfo(machine.weight.dtype), (1 + alpha) * (2 + self.spread))

    def error(self, at: _Point) -> Tensor:
        alpha, gamma = self.alpha, self.gamma
        prox = self.prox.after(at.z, 0 * at.z, self.n, at.one)
        slip = 2 * prox + 2 * self.unit * (at.reflected + 2 * prox)
        offset = alpha * (gamma * (1 + self.spread) * at.q + self.off * at.q + 2 * at.q_error)
        sizes = self.spread * (at.reflected + slip) + 2 * alpha * at.q + offset
        error = gamma * sizes + (1 + self.off) * slip + self.off * at.reflected + offset
        error = self.relaxation * (error + self.lost * (at.one + at.reflected + at.q))
        return error if self.relaxation == 1 else error * (1 + 8 * self.unit) + 9 * self.unit * at.u


def _cayley_error(C: Tensor, alpha: float, proved: DenseOperator) -> float:
    """A bound of ‖Ĉ − C_α‖₂, Ĉ ``(n, n)`` as it is multiplied by: Ĉ − C_α = V_α ((I + αF₀)(Ĉ + I) − 2I)."""
    stored = proved.stored_cayley
    if stored is not None and stored[0] == alpha:
        rounding = verified.UNIT * verified.absolute_norm(stored[1])
        return verified.up((verified.absolute_norm(C - stored[1]) + rounding) * SLACK)
    matrix, error = proved.matrix64()
    n = len(matrix)
    eye = torch.eye(n, dtype=torch.float64)
    twice = C + eye
    residual = ((1 + alpha) * eye - alpha * matrix) @ twice - 2 * eye
    size = verified.absolute_norm(twice)
    rounding = verified.gamma(n + 16) * ((1 + alpha + alpha * proved.absolute_norm()) * size + 2) + alpha * error * size
    return verified.up(verified.spectral_norm(residual, rounding * SLACK) / (1 + alpha * proved.margin()) * SLACK)


def _returned(
    activation: Activation, known: _Sizes, proved: DenseOperator, machine: DenseOperator, z: Tensor, away: Tensor
) -> Tensor:
    """Bounds ``(B,)`` of ‖p − z*‖ for the computed p = σ(W w + q), w within ``away`` of z*."""
    info = torch.finfo(machine.weight.dtype)
    n, gamma = machine.features, product_rounding(machine.features + 8, machine.weight)
    size, spread = z + away, proved.absolute_norm()
    inner = gamma * (spread * size + known.q_size + known.formed) + proved.representation_error * size
    inner = proved.norm() * away + inner + known.formed + _lost(n, info, 1 + spread) * (1 + size)
    prox = _prox_rounding(activation, 1.0, info)
    last = 2.0**-24 if proved.weight.dtype == torch.float32 else 0.0  # what was solved in float64 is rounded
    p = prox.after(z, inner, n)
    return (p + last * (z + p)) * SLACK
