"""One figure of the benchmark as a row: ours, a peer's or a limit, their ratio, and what it should be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

__all__ = [
    "DASH",
    "LESS",
    "MORE",
    "Row",
    "Target",
    "at_least_times",
    "at_most_times",
    "bytes_text",
    "not_measured",
    "number",
    "ratio_text",
    "time_text",
]

DASH = "–"


class Target(NamedTuple):
    """What a ratio should be: how it reads, and whether one is that, where that is asked."""

    text: str
    met: Callable[[float], bool] | None


LESS, MORE = Target("less is better", None), Target("more is better", None)


def at_least_times(value: float) -> Target:
    return Target(f"≥ {value:g}×", lambda ratio: ratio >= value)


def at_most_times(value: float) -> Target:
    return Target(f"≤ {value:g}×", lambda ratio: ratio <= value)


@dataclass(frozen=True)
class Row:
    """``met`` is None where there is no target; ``why`` says why something was not measured, else None."""

    what: str
    ours: str
    peer: str
    ratio: float | None
    target: str = ""
    met: bool | None = None
    why: str | None = None

    @classmethod
    def of(cls, what: str, ours: str, peer: str, ratio: float | None, target: Target | None = None) -> Row:
        """A row that knows whether it meets its target."""
        if target is None or target.met is None:
            return cls(what, ours, peer, ratio, target.text if target else "")
        return cls(what, ours, peer, ratio, target.text, target.met(math.nan if ratio is None else ratio))

    @classmethod
    def timed(
        cls, what: str, ours: float, peer: float, name: str, ratio: float | None = None, target: Target | None = None
    ) -> Row:
        """Seconds of ours and of the named peer; ``ratio`` is by default how many of ours fit into the peer's."""
        found = peer / ours if ratio is None else ratio
        return cls.of(what, time_text(ours), f"{time_text(peer)} {name}", found, target or MORE)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def not_measured(what: str, why: object) -> Row:
    return Row(what, DASH, DASH, None, why=" ".join(str(why).split()))


def time_text(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    if abs(seconds) < 1e-3:
        return f"{number(seconds * 1e6)} µs"
    return f"{number(seconds * 1e3)} ms" if abs(seconds) < 1 else f"{number(seconds)} s"


def bytes_text(count: float) -> str:
    return f"{number(count / 1e6)} MB" if count >= 1e6 else f"{number(count / 1e3)} kB"


def ratio_text(value: float | None) -> str:
    return DASH if value is None else f"{number(value)}×"


def number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return DASH
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"
