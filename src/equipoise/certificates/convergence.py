"""How fast a solver is proved to converge: factors, step counts, and what inexact steps cost.

Theory §2, with C1 and C2 of theory §5; in maximum norms theory §7.
"""

from __future__ import annotations

import math

from .. import verified
from ..errors import NotWellPosedError, OptionError, StructureError
from ..layers.convolutional import ConvolutionalLayer
from ..layers.equilibrium import EquilibriumLayer
from ..norms import Euclidean
from ..operators import MonotoneOperator
from ..quantization.schemes import scheme_to_dict
from ..solvers import PROVED, Solver
from ..solvers.loop import proved_factor
from .types import Certificate, finite_or_none
from .wellposed import vouched

__all__ = [
    "closed_rates",
    "geometric_sum",
    "inexact_factor",
    "layer_certificate",
    "solver_rate",
    "steps_for",
]


def closed_rates(margin: float, lipschitz: float) -> dict[str, float | None]:
    """The closed bounds at their own best steps, κ = L/m (theory §2 [WK20, G17]).

    forward–backward √(1 − 1/κ²) at α = m/L², Peaceman–Rachford √((κ − 1)/(κ + 1)) at α = 1/L, Douglas–Rachford
    (1 + ρ_PR)/2. None where no positive margin is proved.
    """
    names = "forward_backward", "peaceman_rachford", "douglas_rachford"
    if not margin > 0:
        return dict.fromkeys(names)
    kappa = max(lipschitz / margin, 1.0) * (1 + 2.0**-45)
    rates = proved_factor(math.sqrt(1 - (1 / kappa) ** 2)), proved_factor(math.sqrt((kappa - 1) / (kappa + 1)))
    return dict(zip(names, (*rates, None if rates[1] is None else proved_factor((1 + rates[1]) / 2)), strict=True))


def solver_rate(solver: Solver, operator: MonotoneOperator) -> tuple[float | None, float | None]:
    """(α, ρ): the step the solver takes on this operator and a proved bound ρ < 1 of its factor, or None.

    What is proved of a solver stands with it, in its ``factor``: Peaceman–Rachford, Douglas–Rachford, forward–backward,
    Picard and Tseng have one, Anderson, Broyden and Rounded none. A solver from elsewhere, or a class derived from one
    of these, is not believed: its steps may be anything.
    """
    if type(solver) not in PROVED:
        return solver.alpha, None
    try:
        alpha = solver.tune(operator).alpha
    except (StructureError, NotWellPosedError, OptionError):
        return solver.alpha, None  # no inverse, I + α(I − W) is singular, or α too long a step for these weights
    return alpha, solver.factor(operator, alpha)


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
    tol: float,
) -> Certificate:
    """What is proved of one layer by itself: well posed or not, and how fast its solver nears the equilibrium."""
    margin, lipschitz, (alpha, rate) = operator.margin(), operator.lipschitz(), solver_rate(layer.solver, operator)
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
        assumes=vouched(layer),
        scheme=None if layer.scheme is None else scheme_to_dict(layer.scheme),
    )
