"""Charts as pure functions: data in, SVG text or PNG bytes out. Nothing is read, nothing global is changed.

Drawn by matplotlib without its global state (no pyplot), so any thread may draw. An SVG is made to be put into a page:
transparent, its text real text, its ink the page's own colour, so that one picture serves light and dark; narrow
enough that its letters can be read on a phone.

`svg_charts` is the other one: without matplotlib, for the report that every run writes at its end. What needs this one
are a sweep's pictures, which are also PNG files for trackers, and axes that it would be long to draw by hand.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

__all__ = ["ACCENT", "SECOND", "Axis", "Bar", "Line", "bars", "curves", "parallel", "png", "svg"]

INK, FAINT, PAGE = "#1a1b1c", "#a9aaab", "#fdfeff"
"""Text, thin lines and background: right as they are on white paper, the page's own colours in an SVG."""
ACCENT, SECOND, QUIET = "#d9480f", "#2b7bba", "#8a8f98"
"""Best, next to best, and the rest: told apart on white and on black, and by colour-blind readers."""

_WIDTH = 5.2  # inches: about 374 points, a phone's width
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Line:
    """Points (x, y) in order of x. `colour` None: quiet grey, for what is not pointed at; `label`: in the legend."""

    points: Sequence[tuple[float, float]]
    label: str = ""
    colour: str | None = None
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Bar:
    """A named length, with an interval around it where one is known."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    colour: str = SECOND


@dataclass(frozen=True)
class Axis:
    """One axis of parallel coordinates: a value for each line, numbers or names."""

    label: str
    values: Sequence[float | str | bool | None]
    log: bool = False


def _figure(height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def curves(
    lines: Sequence[Line],
    *,
    title: str,
    x: str,
    y: str,
    log_x: bool = False,
    ticks_x: Sequence[float] = (),
    height: float = 3.3,
) -> Figure:
    """Lines over a common axis; those with a colour lie on top, and those with a label are in the legend."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(height, title)
        for line in sorted(lines, key=lambda one: one.colour is not None):
            if not line.points:
                continue
            xs, ys = zip(*line.points, strict=True)
            axes.plot(
                xs, ys, color=line.colour or QUIET, alpha=1 if line.colour else 0.55,
                linewidth=1.8 if line.colour else 0.9, linestyle="--" if line.dashed else "-",
                marker="o" if line.dots or len(line.points) == 1 else None, markersize=4, label=line.label or None,
            )  # fmt: skip
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if log_x:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        if ticks_x:
            axes.set_xticks(list(ticks_x), [_number(tick) for tick in ticks_x])
            axes.minorticks_off()
        axes.grid(axis="y", alpha=0.5)
        if any(line.label for line in lines):
            axes.legend(fontsize=8.5, loc="best")
    return figure


def bars(found: Sequence[Bar], *, title: str, x: str, zero: bool = False) -> Figure:
    """Horizontal bars, first on top, intervals as whiskers; `zero` draws the line they are measured from."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(0.9 + 0.36 * max(1, len(found)), title)
        for place, bar in enumerate(found):
            axes.barh(place, bar.value, height=0.62, color=bar.colour, alpha=0.85)
            if bar.low is not None and bar.high is not None:
                axes.plot([bar.low, bar.high], [place, place], color=INK, linewidth=1.3, solid_capstyle="butt")
        axes.set_yticks(range(len(found)), [bar.label for bar in found])
        axes.invert_yaxis()
        axes.set_xlabel(x)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x", alpha=0.5)
        axes.set_axisbelow(True)
        if zero:
            axes.axvline(0, color=INK, linewidth=0.9)
    return figure


def parallel(axes_: Sequence[Axis], colours: Sequence[str | None], *, title: str, height: float = 3.6) -> Figure:
    """Parallel coordinates: one line a trial through its value on every axis. A None value breaks its line.

    `colours` has one entry a line, None for the quiet grey. Names and few distinct numbers are spread evenly; other
    numbers lie on a linear or a logarithmic scale.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(height, title)
        heights = [_heights(axis) for axis in axes_]
        order = sorted(range(len(colours)), key=lambda i: (colours[i] is not None, colours[i] == ACCENT))
        for i in order:
            ys = [placed.get(axis.values[i], math.nan) for axis, (placed, _) in zip(axes_, heights, strict=True)]
            # A small, fixed offset keeps trials of equal values apart; it says nothing.
            shift = (i % 7 - 3) * 0.006
            axes.plot(
                range(len(ys)), [y + shift for y in ys], color=colours[i] or QUIET, alpha=1 if colours[i] else 0.45,
                linewidth=1.9 if colours[i] else 0.9,
            )  # fmt: skip
        for place, (_, marks) in enumerate(heights):
            axes.axvline(place, color=FAINT, linewidth=0.9)
            for text, at in marks:
                axes.annotate(
                    text, (place, at), xytext=(3, 0), textcoords="offset points", fontsize=8, va="center",
                    ha="left", color=INK,
                    bbox={"boxstyle": "square,pad=0.08", "facecolor": PAGE, "edgecolor": "none", "alpha": 0.7},
                )  # fmt: skip
        axes.set_xticks(range(len(axes_)), [_folded(axis.label) for axis in axes_])
        axes.tick_params(axis="x", length=0)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.set_ylim(-0.06, 1.06)
        axes.set_xlim(-0.1, len(axes_) - 1 + 0.42)
    return figure


def _heights(axis: Axis) -> tuple[dict[Any, float], list[tuple[str, float]]]:
    """Where each value of an axis lies (0 at the bottom, 1 at the top), and the marks to write there."""
    known = [v for v in axis.values if v is not None and not (isinstance(v, float) and not math.isfinite(v))]
    numbers = [v for v in known if not isinstance(v, str | bool)]
    distinct: list[Any] = sorted(set(numbers)) if len(numbers) == len(known) else sorted({str(v) for v in known})
    if not distinct:
        return {}, []
    if len(numbers) < len(known) or len(distinct) <= 5:
        step = 1 / max(1, len(distinct) - 1)
        places = {value: (i * step if len(distinct) > 1 else 0.5) for i, value in enumerate(distinct)}
        texts = distinct if len(numbers) < len(known) else _numbers(distinct)
        marks = list(zip(texts, places.values(), strict=True))
        return {v: places[v if len(numbers) == len(known) else str(v)] for v in known}, marks
    scale = math.log10 if axis.log and distinct[0] > 0 else float
    low, high = scale(distinct[0]), scale(distinct[-1])
    back = (lambda v: 10**v) if scale is math.log10 else float
    levels = (0.0, 0.25, 0.5, 0.75, 1.0)
    marks = list(zip(_numbers([back(low + (high - low) * at) for at in levels]), levels, strict=True))
    return {v: (scale(float(v)) - low) / (high - low) for v in known}, marks


def _numbers(values: Sequence[float]) -> list[str]:
    """Different values in different words: as many digits as that takes, three at least."""
    for digits in (3, 4, 5):
        texts = [_number(v, digits) for v in values]
        if len(set(texts)) == len(set(values)):
            break
    return texts


def _number(value: float, digits: int = 3) -> str:
    """0.0002 -> '2e-4', 0.4812 -> '0.481', 1600 -> '1,600'."""
    if value and abs(value) < 0.001:
        return re.sub(r"\.?0*e-0?", "e-", f"{value:.{digits - 2}e}")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _folded(label: str) -> str:
    """'optim.lr' on two lines, so that neighbours do not touch."""
    return label.replace(".", ".\n", 1) if len(label) > 8 else label


def svg(figure: Figure, label: str) -> str:
    """The figure as an <svg> element for a page: no size of its own, ink `currentColor`, `label` for screen readers."""
    text = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": label}):  # ids must differ between pictures of one page
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    found = text.getvalue()
    found = found[found.index("<svg") :]
    found = re.sub(r"<metadata>.*?</metadata>", "", found, flags=re.DOTALL)
    found = re.sub(r'\s(width|height)="[\d.]+pt"', "", found, count=2)
    found = re.sub(r"<style.*?</style>", "", found, flags=re.DOTALL)  # would rule the whole page
    found = re.sub(r' id="(?![mp][0-9a-f]{8,}")[^"]*"', "", found)  # numbered alike in every picture
    for fixed, own in ((INK, "currentColor"), (FAINT, f"var(--faint, {FAINT})"), (PAGE, f"var(--page, {PAGE})")):
        found = found.replace(fixed, own)
    found = re.sub(r"font-family: [^;\"]+", "font-family: system-ui, sans-serif", found)
    return found.replace("<svg", f'<svg role="img" stroke-linejoin="round" aria-label="{html.escape(label)}"', 1)


def png(figure: Figure, *, dpi: int = 160) -> bytes:
    """The figure as a PNG on white."""
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
