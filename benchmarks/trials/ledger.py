"""What was tried, what held, and how near a truth came to its bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .wide import LD

__all__ = ["Ledger", "Tally"]

KEPT = 5
"""Violations of one bound written down in full by one network."""


@dataclass
class Tally:
    """Of one bound: comparisons, violations, the largest truth/bound seen (bound/truth of a lower one), undecided."""

    trials: int = 0
    violations: int = 0
    ratio: float = 0.0
    undecided: int = 0

    def add(self, other: Mapping[str, Any]) -> None:
        self.trials += other["trials"]
        self.violations += other["violations"]
        self.ratio = max(self.ratio, other["ratio"])
        self.undecided += other["undecided"]


@dataclass
class Ledger:
    """Books of one network. ``faults``: factors below 1 by which upper bounds are made too small on purpose, and lower
    ones too large, by name, to see that it is noticed; "" stands for all bounds."""

    faults: Mapping[str, float] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)
    violations: list[dict[str, Any]] = field(default_factory=list)

    def most(self, bound: str, claimed: Any, truth: Any, slack: Any = 0.0) -> None:
        """``claimed`` >= the exact quantity, which is at least ``truth`` − ``slack``: arrays of one shape, or numbers.
        A bound that is None or infinite claims nothing and is no trial; NaN in a truth leaves it undecided."""
        self._compare(bound, claimed, truth, slack, 1)

    def least(self, bound: str, claimed: Any, truth: Any, slack: Any = 0.0) -> None:
        """``claimed`` <= the exact quantity, which is at most ``truth`` + ``slack``."""
        self._compare(bound, claimed, truth, slack, -1)

    def holds(self, bound: str, claimed: Any, truth: Any) -> None:
        """Yes-or-no claims: where ``claimed``, ``truth`` must be. What is not claimed is no trial."""
        claimed, truth = np.atleast_1d(np.asarray(claimed, bool)), np.atleast_1d(np.asarray(truth, bool))
        claimed, truth = np.broadcast_arrays(claimed, truth)
        self._write(bound, claimed & ~truth, int(claimed.sum()), 0.0, 0, claimed.astype(float), truth.astype(float))

    def failed(self, error: Exception) -> None:
        """An exception that is no refusal."""
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        place = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where is not None else "?"
        self.tallies.setdefault("exception", Tally()).add(vars(Tally(1, 1)))
        self.violations.append({"bound": "exception", "row": [], "claimed": place, "truth": repr(error)})

    def _compare(self, bound: str, claimed: Any, truth: Any, slack: Any, sign: int) -> None:
        if claimed is None:
            return
        claimed, truth, slack = np.broadcast_arrays(
            *(np.atleast_1d(np.asarray(v, LD)) for v in (claimed, truth, slack))
        )
        factor = self.faults.get(bound, self.faults.get("", 1.0))
        if factor != 1:  # upper bounds smaller, lower ones larger
            claimed = claimed * np.where((claimed > 0) == (sign > 0), LD(factor), 1 / LD(factor))
        told = ~np.isinf(claimed)
        known = told & np.isfinite(truth) & np.isfinite(slack)
        sure = truth - sign * slack
        broken = known & (np.isnan(claimed) | (sign * (sure - claimed) > 0))
        with np.errstate(all="ignore"):
            ratios = (sure / claimed) if sign > 0 else (claimed / sure)
        usable = known & (claimed > 0) & (sure > 0) & np.isfinite(ratios)
        ratio = float(ratios[usable].max()) if usable.any() else 0.0
        self._write(bound, broken, int(known.sum()), ratio, int((told & ~known).sum()), claimed, truth)

    def _write(
        self, bound: str, broken: Any, trials: int, ratio: float, undecided: int, claimed: Any, truth: Any
    ) -> None:
        tally = self.tallies.setdefault(bound, Tally())
        tally.add({"trials": trials, "violations": int(broken.sum()), "ratio": ratio, "undecided": undecided})
        for at in list(zip(*broken.nonzero(), strict=True))[:KEPT]:
            place = [int(i) for i in at]
            values = {"claimed": repr(claimed[at]), "truth": repr(truth[at])}
            self.violations.append({"bound": bound, "row": place, **values})
