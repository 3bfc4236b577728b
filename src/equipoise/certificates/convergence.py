"""How fast a solver is proved to converge: factors, step counts, and what inexact steps cost.

Theory §2, with C1 and C2 of theory §5; in maximum norms theory §7.
"""

from __future__ import annotations

import math

import torch

from .. import verified
from ..errors import NotWellPosedError, OptionError, StructureError
from ..layers.convolutional import ConvolutionalLayer
from ..layers.equilibrium import EquilibriumLayer
from ..norms import Euclidean, WeightedMax
from ..operators import DenseOperator, MonotoneOperator
from ..operators.conv import ConvOperator
from ..operators.tiers import TierOperator
from ..quantization.schemes import scheme_to_dict
from ..solvers import (
    DouglasRachford,
    ForwardBackward,
    PeacemanRachford,
    Picard,
    Solver,
    Tseng,
)
from .types import Certificate, finite_or_none

__all__ = [
    "closed_rates",
    "geometric_sum",
    "inexact_factor",
    "kernel_rate",
    "layer_certificate",
    "solver_rate",
    "steps_for",
    "tier_rate",
]

SLACK = 1 + 2.0**-45
"""Covers the dozen roundings of a closed formula."""


def closed_rates(margin: float, lipschitz: float) -> dict[str, float | None]:
    """The closed bounds at their own best steps, κ = L/m (theory §2 [WK20, G17]).

    forward–backward √(1 − 1/κ²) at α = m/L², Peaceman–Rachford √((κ − 1)/(κ + 1)) at α = 1/L, Douglas–Rachford
    (1 + ρ_PR)/2. None where no positive margin is proved.
    """
    names = "forward_backward", "peaceman_rachford", "douglas_rachford"
    if not margin > 0:
        return dict.fromkeys(names)
    kappa = max(lipschitz / margin, 1.0) * SLACK
    rates = _below_one(math.sqrt(1 - (1 / kappa) ** 2)), _below_one(math.sqrt((kappa - 1) / (kappa + 1)))
    return dict(zip(names, (*rates, None if rates[1] is None else _below_one((1 + rates[1]) / 2)), strict=True))


def _below_one(rate: float) -> float | None:
    bound = rate * SLACK + 2.0**-52
    return bound if bound < 1 else None


def solver_rate(solver: Solver, operator: DenseOperator) -> tuple[float | None, float | None]:
    """(α, ρ): the step the solver takes on this operator and a proved bound ρ < 1 of its factor, or None.

    Peaceman–Rachford ‖C_α‖₂, Douglas–Rachford (1 + ‖C_α‖₂)/2, forward–backward ‖(1 − α) I + αW‖₂, Picard
    1 − α + α‖W‖₂ for α <= 1, Tseng √(1 − pq/(p + q)) with p = 1 − α²L², q = 2αm (from its descent inequality
    and strong monotonicity). Tseng's is of the distance to the equilibrium, between other points its map need not
    contract; the others' of any two. Nothing is proved of Anderson and Broyden.
    """
    try:
        alpha = solver.tune(operator).alpha
    except (NotWellPosedError, OptionError):  # I + α(I − W) is singular, or α too long a step for these weights
        return solver.alpha, None
    if isinstance(operator.family, WeightedMax):
        return alpha, rate_in_rows(solver, alpha, operator)
    matrix, error = operator.matrix64()
    rate: float | None = None
    if isinstance(solver, (PeacemanRachford, DouglasRachford)):
        if operator.stored_cayley is not None and operator.stored_cayley[0] == alpha:
            C = operator.stored_cayley[1]  # code times scale, rounded
            rate = verified.spectral_norm(C, verified.UNIT * verified.absolute_norm(C))
        else:
            rate = verified.cayley_norm(matrix, alpha, error)
        if rate is not None and isinstance(solver, DouglasRachford):
            rate = verified.up((1 + rate) / 2)
    elif error == math.inf:
        pass  # no matrix is known
    elif isinstance(solver, ForwardBackward):
        step = alpha * matrix + (1 - alpha) * torch.eye(operator.features, dtype=torch.float64)
        forming = 4 * verified.UNIT * (alpha * operator.absolute_norm() + abs(1 - alpha)) * SLACK
        rate = verified.spectral_norm(step, verified.up(alpha * error * SLACK + forming))
    else:
        rate = _by_constants(solver, alpha, operator)
    return alpha, rate if rate is not None and rate < 1 else None


def tier_rate(solver: Solver, operator: TierOperator) -> tuple[float | None, float | None]:
    """:func:`solver_rate` of a convolutional monDEQ, frequency by frequency where it has one tier."""
    try:
        alpha = solver.tune(operator).alpha
    except (NotWellPosedError, OptionError):
        return solver.alpha, None
    rate: float | None = None
    if operator.margin() <= 0:
        pass
    elif isinstance(solver, (PeacemanRachford, DouglasRachford)):
        rate = operator.cayley_bound(alpha)
        if rate is not None and isinstance(solver, DouglasRachford):
            rate = verified.up((1 + rate) / 2)
    elif isinstance(solver, ForwardBackward):
        rate = operator.forward_bound(alpha)
    else:
        rate = _by_constants(solver, alpha, operator)
    return alpha, rate if rate is not None and rate < 1 else None


def _by_constants(solver: Solver, alpha: float, operator: DenseOperator | TierOperator) -> float | None:
    """The factors of Picard and Tseng, from m, L and ‖W‖₂."""
    if isinstance(solver, Picard) and alpha <= 1:
        return (1 - alpha + alpha * operator.norm()) * SLACK
    if isinstance(solver, Tseng) and operator.margin() > 0:
        p, q = 1 - (alpha * operator.lipschitz()) ** 2 * SLACK, 2 * alpha * operator.margin()
        return math.sqrt(max(1 - p * q / (p + q), 0.0)) * SLACK + 2.0**-50 if p > 0 else None
    return None


def rate_in_rows(solver: Solver, alpha: float, operator: DenseOperator | ConvOperator) -> float | None:
    """A proved factor below 1 in ‖·‖_η for 0 < α <= α* (theory §7 [JDPB21]), or None.

    The averaged iteration 1 − α min(m, 1), forward–backward ‖(1 − α) I + αW‖_η = 1 − αm, Peaceman–Rachford
    (1 − αm)/(1 + αm), with m = 1 − μ_η(W). Of Peaceman–Rachford at a longer step ‖C_α‖₂, in the 2-norm.
    """
    margin = operator.margin()
    if isinstance(solver, (PeacemanRachford, DouglasRachford)) and alpha > operator.averaging_step():
        if isinstance(operator, ConvOperator):
            return None
        matrix, error = operator.matrix64()
        norm = verified.cayley_norm(matrix, alpha, error) if error < math.inf else None
        if norm is not None and isinstance(solver, DouglasRachford):
            norm = verified.up((1 + norm) / 2)
        return norm if norm is not None and norm < 1 else None
    if not (margin > 0 and alpha <= operator.averaging_step()):
        return None
    reach = alpha * margin
    if isinstance(solver, Picard):
        rate = 1 - min(reach, alpha)
    elif isinstance(solver, ForwardBackward):
        rate = max(1 - reach, 0.0)
    elif isinstance(solver, (PeacemanRachford, DouglasRachford)):
        rate = max(1 - reach, 0.0) / (1 + reach)
        rate = (1 + rate) / 2 if isinstance(solver, DouglasRachford) else rate
    else:
        return None
    return _below_one(rate)


def kernel_rate(solver: Solver, operator: ConvOperator) -> tuple[float | None, float | None]:
    """:func:`solver_rate` of a convolution, whose solvers form no inverse."""
    try:
        alpha = solver.tune(operator).alpha
    except (StructureError, NotWellPosedError, OptionError):
        return solver.alpha, None
    return alpha, rate_in_rows(solver, alpha, operator)


def steps_for(rate: float | None, tol: float) -> int | None:
    """Proved steps until the distance to the equilibrium has shrunk by ``tol``: least k with ρᵏ <= tol."""
    if rate is None:
        return None
    if rate == 0:
        return 1
    count = math.ceil(math.log(tol) / math.log(rate) * (1 + 1e-9))
    return max(count, 1)


def inexact_factor(rate: float | None) -> float | None:
    """1/(1 − ρ): steps with errors of at most ε end within ε times this of the equilibrium (C2 [LLC26])."""
    return None if rate is None else verified.up(1 / verified.down(1 - rate))


def geometric_sum(rate: float, decay: float, steps: int) -> float:
    """An upper bound of Σ_{j<k} ρ^{k−1−j} γʲ = (ρᵏ − γᵏ)/(ρ − γ), k ρ^{k−1} where they agree (C2, adaptive grids).

    ``rate`` ρ and ``decay`` γ in [0, 1], k = ``steps`` >= 1. As b^{k−1} (1 − tᵏ)/(1 − t), b the larger and t the ratio,
    nothing cancels: 1 − t = (b − a)/b is formed from the difference.
    """
    low, high = sorted((rate, decay))
    if high == 0 or steps == 1:
        return 0.0 if steps > 1 else 1.0
    short = (high - low) / high
    if short in (0, 1):
        total = float(steps) if short == 0 else 1.0
    else:
        total = -math.expm1(steps * math.log1p(-short)) / short
    return high ** (steps - 1) * total * (1 + 1e-12)


def layer_certificate(
    layer: EquilibriumLayer | ConvolutionalLayer,
    operator: MonotoneOperator,
    step: tuple[float | None, float | None],
    tol: float,
) -> Certificate:
    """What is proved of one layer by itself: well posed or not, and how its solver, of ``step`` = (α, rate), nears."""
    margin, lipschitz, (alpha, rate) = operator.margin(), operator.lipschitz(), step
    certified = margin > 0
    return Certificate(
        certified=certified,
        verdict="certified" if certified else "unknown",
        margin=finite_or_none(margin),
        lipschitz=finite_or_none(lipschitz),
        condition=finite_or_none(verified.up(lipschitz / margin)) if certified else None,
        weight_condition=finite_or_none(verified.up(operator.norm() / margin)) if certified else None,
        solver=type(layer.solver).__name__,
        alpha=alpha,
        rate=rate,
        steps=steps_for(rate, tol),
        tolerance=tol,
        inexact=inexact_factor(rate),
        closed_rates=closed_rates(margin if isinstance(operator.family, Euclidean) else 0.0, lipschitz),
        family=operator.family.name,
        measure=finite_or_none(verified.up(1 - margin)),
        scheme=None if layer.scheme is None else scheme_to_dict(layer.scheme),
    )
