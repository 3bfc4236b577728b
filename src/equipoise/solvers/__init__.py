"""Solvers of one batch of equilibrium problems; the loop is written once, in ``loop``."""

from .anderson import Anderson
from .broyden import Broyden
from .forward_backward import ForwardBackward
from .loop import Solver, State, Tuning, Verdict, iterate
from .peaceman_rachford import DouglasRachford, PeacemanRachford
from .picard import Picard
from .posterior import Solution, a_posteriori, solve
from .problem import MapProblem, Problem
from .rounded import Rounded
from .trial import tuned
from .tseng import Tseng

__all__ = [
    "PROVED",
    "SOLVERS",
    "Anderson",
    "Broyden",
    "DouglasRachford",
    "ForwardBackward",
    "MapProblem",
    "PeacemanRachford",
    "Picard",
    "Problem",
    "Rounded",
    "Solution",
    "Solver",
    "State",
    "Tseng",
    "Tuning",
    "Verdict",
    "a_posteriori",
    "iterate",
    "solve",
    "tuned",
]

SOLVERS: dict[str, type[Solver]] = {
    kind.__name__: kind
    for kind in (
        ForwardBackward,
        PeacemanRachford,
        DouglasRachford,
        Tseng,
        Picard,
        Anderson,
        Broyden,
        Rounded,
    )
}
"""The solvers that files know by name: one of your own is added by ``SOLVERS["Mine"] = Mine``."""

PROVED = frozenset(SOLVERS.values())
"""Those whose ``factor`` certificates print."""
