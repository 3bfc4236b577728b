"""One figure as SVG text that lives in the page: its colours, its font, and nothing fetched.

matplotlib draws with stand-in colours, which are then replaced by CSS variables: one file serves light and
dark pages. Text stays text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from ..errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

__all__ = ["COLOURS", "MARKERS", "Figure", "colour", "figure", "level", "percents", "plain_log", "powers", "say"]

MARKERS = {"assembled": "s", "structured": "o", "compensated": "^", "cayley": "D"}

# Stand-ins, each replaced by var(--name): no other colour is used.
NAMES = ("ink", "muted", "line", "bad", "seq0", "seq1", "seq2", "seq3", *MARKERS)
COLOURS = {name: f"#0a00{index:02x}" for index, name in enumerate(NAMES)}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "equipoise",
    "font.size": 13,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.7,
    "text.color": COLOURS["muted"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "ytick.minor.size": 0.0,
    "xtick.minor.size": 0.0,
    "lines.linewidth": 1.8,
}
WIDTH, HEIGHT = 400, 290


@dataclass(frozen=True)
class Figure:
    """One figure: an ``<svg>`` element, its heading and caption, and what it shows in words for those who
    cannot see it. ``clouds`` are the legend of the scatter, (colour variable, label)."""

    key: str
    title: str
    caption: str
    svg: str
    description: str
    clouds: tuple[tuple[str, str], ...] = ()


def figure(
    key: str,
    title: str,
    caption: str,
    paint: Callable[[Axes], None],
    description: str,
    clouds: tuple[tuple[str, str], ...] = (),
) -> Figure:
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise MissingExtraError("the report needs matplotlib: pip install 'equipoise[report]'") from error
    settings: Any = dict(matplotlib.rcParamsDefault)  # whatever the user's matplotlibrc says
    settings.update(STYLE, backend="agg")
    with matplotlib.rc_context(settings):
        canvas = Canvas(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
        axes = canvas.add_subplot()
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        paint(axes)
        return Figure(key, title, caption, _svg(canvas, key, title, description), description, clouds)


def _svg(canvas: Canvas, key: str, title: str, description: str) -> str:
    """The ``<svg>`` element alone: no prolog, no metadata, identifiers of its own, colours as variables."""
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{key}-", text)
    text = re.sub(r"#0a00([0-9a-f]{2})", lambda m: f"var(--{NAMES[int(m[1], 16)]})", text)
    text = re.sub(r'="[^"]*"', lambda m: re.sub(r"(\d\.\d\d)\d+", r"\1", m[0]), text)  # not in what is read
    text = re.sub(r"\n\s*", "\n", text)
    body = text[text.index(">") + 1 :]
    opening = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{key}-t {key}-d"'
        ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    labels = f'<title id="{key}-t">{escape(title)}</title><desc id="{key}-d">{escape(description)}</desc>'
    return opening + labels + body


def colour(scheme: str) -> str:
    """The stand-in of a scheme; of one that has no colour yet, the muted one."""
    return COLOURS[scheme if scheme in MARKERS else "muted"]


def say(axes: Axes, x: float, y: float, text: str, colour: str, **options: Any) -> None:
    axes.text(x, y, text, color=COLOURS[colour], fontsize=11.5, **options)


def percents(share: float, position: object = None) -> str:
    return f"{100 * share:.0f} %" if -1e-9 <= share <= 1 + 1e-9 else ""


def plain_log(axis: Any, low: float, high: float) -> None:
    """Ticks 1, 2, 5, … or whole powers of ten over a wide range, written as plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 2 else (1, 3) if decades < 3.5 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    skip = max(1, math.ceil(decades / 6))
    ticks = [step * 10.0**p for p in powers if p % skip == 0 for step in steps]
    axis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:,.6g}"))


def powers(axis: Any) -> None:
    """Powers of ten, at most seven: plain from 0.01 to 1,000, else as 10ⁿ."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(10, numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_power))


def _power(value: float, position: object = None) -> str:
    exponent = round(math.log10(value)) if value > 0 else 0
    if -2 <= exponent <= 3:
        return f"{10.0**exponent:,.6g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def level(axes: Axes, height: float, text: str, below: bool = False) -> None:
    """A dashed line across, and its name at the left, above or below it."""
    axes.axhline(height, color=COLOURS["ink"], lw=1, ls=(0, (4, 3)), zorder=2)
    axes.annotate(
        text,
        (0.0, height),
        (3, -9 if below else 9),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="top" if below else "bottom",
        color=COLOURS["ink"],
        annotation_clip=False,
    )
