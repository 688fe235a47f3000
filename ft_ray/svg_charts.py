"""Charts as inline SVG: pure functions from numbers to text, coloured by the page's CSS variables, no script.

Every text is escaped; sizes are in user units of a viewBox, so that charts shrink with the page. Every run writes a
report at its end, so its lines and bars are drawn here in milliseconds and without matplotlib; what `charts` draws with
it are a sweep's pictures, which trackers take as PNG too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Series", "bars", "lines"]

Point = tuple[float, float]
_W, _H = 640.0, 280.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 76.0, 12.0, 30.0, 34.0


@dataclass(frozen=True)
class Series:
    """One line: its points in order of x; `faint` draws it thin (raw values under a smoothed line), `dots` marks them.

    `band` holds (x, low, high), a shaded region around the line.
    """

    name: str
    points: Sequence[Point]
    colour: int = 1
    faint: bool = False
    dots: bool = False
    band: Sequence[tuple[float, float, float]] = ()


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return re.sub(r"\.?0*e([+-])0*", lambda m: "e-" if m[1] == "-" else "e", f"{value:.2e}")
    return f"{value:,.4g}"


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high]: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def lines(series: Sequence[Series], *, x: str, y: str, title: str) -> str:
    """A line chart with axes, a legend and a description for screen readers; '' when there is nothing to draw.

    The y axis is cut at the 99th percentile where a few values are far above, so that one spike hides nothing else.
    """
    shown = [Series(s.name, [p for p in s.points if _finite(p)], s.colour, s.faint, s.dots, s.band) for s in series]
    shown = [s for s in shown if s.points]
    if not shown:
        return ""
    xs = [p[0] for s in shown for p in s.points]
    ys = sorted([p[1] for s in shown for p in s.points] + [v for s in shown for b in s.band for v in b[1:]])
    x0, x1 = min(xs), max(xs)
    y0, y1 = ys[0], ys[-1]
    high = ys[int(0.99 * (len(ys) - 1))]
    if len(ys) > 20 and y1 - y0 > 3 * max(high - y0, 0.1 * abs(high)):
        y1 = high
    pad = (y1 - y0) * 0.05 or abs(y1) * 0.1 or 1.0
    y0, y1 = max(0.0, y0 - pad) if y0 >= 0 else y0 - pad, y1 + pad
    x1 = x1 if x1 > x0 else x0 + 1

    def at(px: float, py: float) -> str:
        fx = _LEFT + (px - x0) / (x1 - x0) * (_W - _LEFT - _RIGHT)
        fy = _TOP + (1 - (min(max(py, y0), y1) - y0) / (y1 - y0)) * (_H - _TOP - _BOTTOM)
        return f"{fx:.1f},{fy:.1f}"

    parts = [*_frame(x0, x1, y0, y1, x, y)]
    for s in shown:
        if s.band:
            edge = [at(b[0], b[2]) for b in s.band] + [at(b[0], b[1]) for b in reversed(s.band)]
            parts.append(f'<polygon class="band c{s.colour}" points="{" ".join(edge)}"/>')
        style = "raw" if s.faint else "line"
        if len(s.points) > 1:
            parts.append(f'<polyline class="{style} c{s.colour}" points="{" ".join(at(*p) for p in s.points)}"/>')
        if s.dots or len(s.points) == 1:
            for p in s.points:
                cx, cy = at(*p).split(",")
                label = escape(f"{s.name}: {x} {_number(p[0])}, {_number(p[1])}")
                parts.append(
                    f'<circle class="dot c{s.colour}" cx="{cx}" cy="{cy}" r="3.5"><title>{label}</title></circle>'
                )
    return _figure(title, parts, [(s.name, s.colour) for s in shown if not s.faint])


def bars(items: Sequence[tuple[str, float, float | None, float | None]], *, title: str, unit: str = "") -> str:
    """Horizontal bars: (label, value, low, high); low and high draw an interval. Shares are drawn on a scale to 1."""
    rows = [i for i in items if math.isfinite(i[1])]
    if not rows:
        return ""
    most = max([1.0] + [i[1] for i in rows] + [i[3] for i in rows if i[3] is not None])
    height, left = 30.0, 150.0
    scale = (_W - left - 90) / most
    parts = []
    for k, (label, value, low, high) in enumerate(rows):
        top = k * height + 6
        parts.append(
            f'<text class="lab" x="{left - 8:.0f}" y="{top + 14:.1f}" text-anchor="end">{escape(label)}</text>'
        )
        parts.append(
            f'<rect class="bar" x="{left:.0f}" y="{top:.1f}" width="{max(value, 0) * scale:.1f}" height="18"/>'
        )
        end = value
        if low is not None and high is not None:
            a, b, mid = left + low * scale, left + high * scale, top + 9
            path = f"M{a:.1f} {mid}H{b:.1f}M{a:.1f} {mid - 5}V{mid + 5}M{b:.1f} {mid - 5}V{mid + 5}"
            parts.append(f'<path class="whisker" d="{path}"/>')
            end = max(value, high)
        shown, after = f"{_number(value)}{escape(unit)}", left + end * scale + 8
        parts.append(f'<text class="val" x="{after:.1f}" y="{top + 14:.1f}">{shown}</text>')
    return _figure(title, parts, [], height=len(rows) * height + 10)


def _finite(point: Point) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])


def _frame(x0: float, x1: float, y0: float, y1: float, x: str, y: str) -> list[str]:
    parts = []
    for tick in _ticks(y0, y1):
        level = _TOP + (1 - (tick - y0) / (y1 - y0)) * (_H - _TOP - _BOTTOM)
        parts.append(f'<path class="grid" d="M{_LEFT} {level:.1f}H{_W - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{level + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in _ticks(x0, x1, 7):
        place = _LEFT + (tick - x0) / (x1 - x0) * (_W - _LEFT - _RIGHT)
        parts.append(f'<text x="{place:.1f}" y="{_H - _BOTTOM + 16:.1f}" text-anchor="middle">{_number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{_H - _BOTTOM}H{_W - _RIGHT}"/>')
    parts.append(f'<text x="{_W - _RIGHT}" y="{_H - 3}" text-anchor="end">{escape(x)}</text>')
    # Above the axis, not along it: tick labels are as long as their numbers are, and on a phone large.
    parts.append(f'<text x="2" y="{_TOP - 8:.0f}">{escape(y)}</text>')
    return parts


def _figure(title: str, parts: list[str], legend: Sequence[tuple[str, int]], height: float = _H) -> str:
    names = "".join(f'<li class="c{colour}">{escape(name)}</li>' for name, colour in legend)
    listed = f'<ul class="legend">{names}</ul>' if names else ""
    return (
        f'<figure><figcaption>{escape(title)}</figcaption>{listed}<svg viewBox="0 0 {_W:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )
