"""A sweep in the terminal, and as one figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .._atomic import replacing
from ..errors import MissingExtraError
from .canvas import MARKERS, NAMES, colour, figure, percents
from .words import MISSING, at_least, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["sweep_figure", "sweep_table"]

# The page's colours (light), for a picture that stands alone.
PLAIN = {"ink": "#1a1a1a", "muted": "#555555", "line": "#dddddd", "bad": "#b3261e"}
SCHEMES = dict(zip(MARKERS, ("#c2410c", "#0f766e", "#6d28d9", "#1d4ed8"), strict=True))


def sweep_table(means: list[dict[str, Any]]) -> Table:
    """One row per scheme and bits, of what ``Sweep.means`` gives."""
    caption = "accuracy: test split, mean ± standard deviation over seeds. margin ≥: proved, the least of them."
    table = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1), caption=caption, caption_justify="left"
    )
    for heading in ("scheme", "bits", "seeds", "accuracy", "±", "margin ≥", "certified", "bytes"):
        table.add_column(heading, justify="left" if heading == "scheme" else "right", no_wrap=True)
    for row in means:
        spread = row["accuracy_std"]
        certified = row["certified"]
        table.add_row(
            row["scheme"],
            MISSING if row["bits"] is None else str(row["bits"]),
            f"{row['seeds']} of {row['seeds'] + row['failed']}" if row["failed"] else str(row["seeds"]),
            percent(row["accuracy_mean"]),
            MISSING if spread is None else f"{100 * spread:.2f}",
            at_least(row["margin_least"]),
            MISSING if certified is None else ("all" if certified else "not all"),
            MISSING if row["size_bytes"] is None else f"{row['size_bytes']:,}",
        )
    return table


def sweep_figure(means: list[dict[str, Any]], path: Path) -> Path | None:
    """Accuracy against bits, a line per scheme, as an SVG; None where there is nothing to draw, or no matplotlib."""
    means = [row for row in means if row["accuracy_mean"] is not None]
    lines = {
        name: [row for row in means if row["scheme"] == name] for name in dict.fromkeys(r["scheme"] for r in means)
    }
    quantized = {name: rows for name, rows in lines.items() if name != "float"}
    if not quantized:
        return None

    def paint(axes: Axes) -> None:
        for name, rows in quantized.items():
            rows = sorted(rows, key=lambda row: row["bits"])
            x, y = [row["bits"] for row in rows], [row["accuracy_mean"] for row in rows]
            spread = [row["accuracy_std"] or 0.0 for row in rows]
            style: dict[str, Any] = {"color": colour(name), "marker": MARKERS.get(name, "o"), "capsize": 3}
            axes.errorbar(x, y, yerr=spread, label=name, **style)
        for row in lines.get("float", []):
            axes.axhline(row["accuracy_mean"], color=colour("float"), lw=1, ls=(0, (4, 3)), label="float")
        axes.set_xlabel("bits")
        axes.set_xticks(sorted({row["bits"] for rows in quantized.values() for row in rows}))
        axes.yaxis.set_major_formatter(percents)
        axes.legend(frameon=False)

    words = "; ".join(f"{r['scheme']} {r['bits'] or ''} {percent(r['accuracy_mean'])}" for r in means)
    try:
        drawn = figure("sweep", "Accuracy against bits", "", paint, words)
    except MissingExtraError:
        return None
    svg = drawn.svg
    for name in NAMES:
        svg = svg.replace(f"var(--{name})", {**PLAIN, **SCHEMES}.get(name, PLAIN["muted"]))
    with replacing(path, force=True) as file:
        file.write(svg.encode())
    return path
