"""Flows - plots as inline SVG: curves with intervals, histograms, stacked bars, matrices. No script, no font, no network; colours are CSS.

Every figure is 420 units wide, so its text reads the same on a phone and in a grid on a laptop. Values that are not finite leave a gap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 40


class Series(NamedTuple):
    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    """Lower end of the interval of each point."""
    high: Sequence[float | None] | None = None
    dots: bool = True


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high] from the inside."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """As short as it can be read: 0.25, 1500, 2.1e6."""
    if value == 0:
        return "0"
    return (
        f"{value:.1e}"
        if abs(value) >= 1e5 or abs(value) < 1e-4
        else f"{value:.5g}".replace("-0.", "\u22120.").replace("-", "\u2212")
    )


class _Axes:
    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float], x_label: str, y_label: str):
        self.x_range, self.y_range = _wide(x_range), _wide(y_range)
        self.parts = [
            f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>'
        ]
        middle = (TOP + HEIGHT - BOTTOM) / 2
        self.parts.append(
            f'<text class="label" x="12" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 12 {middle:.0f})">{escape(y_label)}</text>'
        )

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    def grid(self, x_ticks: Sequence[float], x_names: Sequence[str] | None = None) -> None:
        for value in ticks(*self.y_range):
            y = self.y(value)
            self.parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            self.parts.append(f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{number(value)}</text>')
        for index, value in enumerate(x_ticks):
            name = x_names[index] if x_names else number(value)
            self.parts.append(
                f'<text x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{escape(name)}</text>'
            )

    def svg(self, title: str) -> str:
        body = "".join(self.parts)
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">{body}</svg>'


def _wide(ends: tuple[float, float]) -> tuple[float, float]:
    low, high = ends
    if not (math.isfinite(low) and math.isfinite(high)):
        return 0.0, 1.0
    if high > low:
        return low, high
    room = abs(low) * 0.1 or 0.5
    return low - room, high + room


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def lines(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    zero: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    whole: bool = True,
) -> str:
    """Curves; intervals as error bars. `zero`: the axis holds 0, drawn. `marks`: vertical lines with a name. `whole`: x counts things."""
    xs = [float(x) for one in series for x in one.x]
    ys = [float(v) for one in series for values in (one.y, one.low or (), one.high or ()) for v in values if _finite(v)]
    ys += [0.0] if zero else []
    low, high = (min(ys), max(ys)) if ys else (0.0, 1.0)
    room = (high - low) * 0.06
    axes = _Axes((min(xs, default=0.0), max(xs, default=1.0)), (low - room, high + room), x_label, y_label)
    if whole and xs and max(xs) > min(xs):  # room beside the first and the last point
        margin = (max(xs) - min(xs)) * 0.04
        axes.x_range = (min(xs) - margin, max(xs) + margin)
    shown = ticks(min(xs, default=0.0), max(xs, default=1.0), 6)
    axes.grid([value for value in shown if not whole or value == int(value)])
    if zero:
        axes.parts.append(
            f'<line class="zero" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axes.y(0):.1f}" y2="{axes.y(0):.1f}"/>'
        )
    for place, name in marks:
        axes.parts.append(
            f'<line class="mark" x1="{axes.x(place):.1f}" x2="{axes.x(place):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        )
        axes.parts.append(f'<text class="marked" x="{axes.x(place) + 3:.1f}" y="{TOP + 9}">{escape(name)}</text>')
    for index, one in enumerate(series):
        axes.parts.append(_curve(axes, one, index, len(series)))
    return axes.svg(title)


def _curve(axes: _Axes, one: Series, index: int, of: int) -> str:
    shift = (index - (of - 1) / 2) * 5 if one.low is not None else 0.0  # error bars of several series beside each other
    parts, path, pen = [], [], False
    for i, (x, y) in enumerate(zip(one.x, one.y, strict=True)):
        if not _finite(y):
            pen = False
            continue
        px, py = axes.x(float(x)) + shift, axes.y(float(y))
        path.append(f"{'L' if pen else 'M'}{px:.1f} {py:.1f}")
        pen = True
        low, high = (one.low[i], one.high[i]) if one.low is not None and one.high is not None else (None, None)
        text = f"{one.label} at {number(float(x))}: {number(float(y))}"
        if _finite(low) and _finite(high):
            a, b = axes.y(float(low)), axes.y(float(high))
            text += f" [{number(float(low))}, {number(float(high))}]"
            parts.append(
                f'<path class="bar s{index}" d="M{px:.1f} {a:.1f}V{b:.1f}M{px - 4:.1f} {a:.1f}h8M{px - 4:.1f} {b:.1f}h8"/>'
            )
        if one.dots:
            parts.append(
                f'<circle class="dot f{index}" cx="{px:.1f}" cy="{py:.1f}" r="3.6"><title>{escape(text)}</title></circle>'
            )
    return f'<path class="line s{index}" d="{"".join(path)}"/>' + "".join(parts)


def histograms(
    title: str, edges: Sequence[float], series: Sequence[tuple[str, Sequence[float]]], x_label: str, y_label: str
) -> str:
    """Several histograms over the same edges, as steps."""
    top = max((value for _, values in series for value in values), default=1.0) or 1.0
    axes = _Axes((edges[0], edges[-1]), (0.0, top * 1.06), x_label, y_label)
    axes.grid(ticks(edges[0], edges[-1], 6))
    for index, (label, values) in enumerate(series):
        path = [f"M{axes.x(edges[0]):.1f} {axes.y(0):.1f}"]
        for left, right, value in zip(edges, edges[1:], values, strict=False):
            path.append(f"L{axes.x(left):.1f} {axes.y(value):.1f}L{axes.x(right):.1f} {axes.y(value):.1f}")
        path.append(f"L{axes.x(edges[-1]):.1f} {axes.y(0):.1f}")
        axes.parts.append(f'<path class="area f{index}" d="{"".join(path)}Z"><title>{escape(label)}</title></path>')
        axes.parts.append(f'<path class="line s{index}" d="{"".join(path)}"/>')
    return axes.svg(title)


def stacks(
    title: str, names: Sequence[str], parts: Sequence[tuple[str, Sequence[float]]], x_label: str, y_label: str
) -> str:
    """One bar per name, made of parts."""
    totals = [sum(values[i] for _, values in parts) for i in range(len(names))]
    axes = _Axes((-0.5, len(names) - 0.5), (0.0, (max(totals, default=0.0) or 1.0) * 1.08), x_label, y_label)
    every = math.ceil(len(names) / 12)
    axes.grid(range(0, len(names), every), [names[i] for i in range(0, len(names), every)])
    width = min(46.0, 0.7 * (WIDTH - LEFT - RIGHT) / max(len(names), 1))
    for i, name in enumerate(names):
        below = 0.0
        for index, (label, values) in enumerate(parts):
            if values[i] <= 0:
                continue
            top, bottom = axes.y(below + values[i]), axes.y(below)
            text = f"{label}, {name}: {number(round(values[i], 3))}"
            axes.parts.append(
                f'<rect class="f{index % 8}" x="{axes.x(i) - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" height="{max(bottom - top, 0.8):.1f}">'
                f"<title>{escape(text)}</title></rect>"
            )
            below += values[i]
    return axes.svg(title)


def matrix(
    title: str, names: Sequence[str], values: Sequence[Sequence[float | None]], x_label: str, y_label: str
) -> str:
    """A square of win rates in [0, 1]; row against column."""
    longest = max(map(len, names), default=0)
    left, top, count = 38.0 + min(7.0 * longest, 110.0), 30.0, max(len(names), 1)
    cell = min((WIDTH - left - RIGHT) / count, 64.0)
    height = top + cell * count + 8
    out = [
        f'<text class="label" x="{left + cell * count / 2:.0f}" y="11" text-anchor="middle">{escape(x_label)}</text>'
    ]
    middle = top + cell * count / 2
    out.append(
        f'<text class="label" x="12" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 12 {middle:.0f})">{escape(y_label)}</text>'
    )
    for i, name in enumerate(names):
        column, row = _cut(name, int(cell / 8)), _cut(name, 15)
        out.append(f'<text x="{left + cell * (i + 0.5):.1f}" y="25" text-anchor="middle">{escape(column)}</text>')
        out.append(
            f'<text x="{left - 6:.1f}" y="{top + cell * (i + 0.5) + 4:.1f}" text-anchor="end">{escape(row)}</text>'
        )
        for j, other in enumerate(names):
            value = values[i][j]
            x, y = left + cell * j, top + cell * i
            if not _finite(value) or i == j:
                out.append(
                    f'<rect class="none" x="{x:.1f}" y="{y:.1f}" width="{cell - 1.5:.1f}" height="{cell - 1.5:.1f}"/>'
                )
                continue
            strength = min(abs(float(value) - 0.5) * 2, 1.0)
            side = "win" if value >= 0.5 else "lose"
            text = f"{name} against {other}: {value:.1%}"
            out.append(
                f'<rect class="{side}" style="fill-opacity:{strength:.2f}" x="{x:.1f}" y="{y:.1f}" width="{cell - 1.5:.1f}" height="{cell - 1.5:.1f}">'
                f"<title>{escape(text)}</title></rect>"
                f'<text class="cell" x="{x + cell / 2:.1f}" y="{y + cell / 2 + 4:.1f}" text-anchor="middle">{100 * value:.0f}</text>'
            )
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title, quote=True)}">{"".join(out)}</svg>'


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(length - 1, 1)] + "\u2026"


def legend(labels: Sequence[str]) -> str:
    """In HTML, so that it wraps."""
    items = "".join(f'<span><i class="b{index % 8}"></i>{escape(label)}</span>' for index, label in enumerate(labels))
    return f'<div class="legend">{items}</div>' if len(labels) > 1 else ""
