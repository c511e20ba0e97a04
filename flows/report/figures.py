"""Flows - plots as inline SVG: curves with intervals, histograms, stacked bars, matrices. No script, font or network.

A drawing is NARROW units wide, so its text reads the same on a phone and in a grid on a laptop; a figure that stands
alone, or with one other, is drawn wider too, for a screen that has the room. Colours are classes of style.css: s0 ... s7 for strokes, f0 ...
f7 for fills. Values that are not finite leave a gap. A pointer over a plot is shown the values there (SVG's <title>).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeGuard

from markupsafe import Markup, escape

NARROW, HALF, WIDE = 420, 560, 1000
"""Units of a drawing's width; on a wide screen one of two figures is drawn HALF, one alone is drawn WIDE."""
HEIGHT = 250
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 12, 40
"""Margins around the axes."""
COLOURS = 8
MOST_COLUMNS = 100
"""Stripes of a plot that show their values to a pointer."""


class Series(NamedTuple):
    """A curve: a value at each x, with the ends of its interval if it has one."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    dots: bool = True


class Drawing(NamedTuple):
    """The inside of an <svg>."""

    title: str
    width: int
    height: int
    body: Markup


class Draw(Protocol):
    """A plot of some data, drawn at a width."""

    def __call__(self, *, width: int = NARROW) -> Drawing: ...


class Figure(NamedTuple):
    """A plot with its caption, as the page shows it and as a file of its own."""

    name: str
    caption: str
    draw: Draw
    labels: Sequence[str] = ()
    """Of its colours, in order; () where the caption says it."""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers inside [low, high], about `count` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(multiple * step, 12) for multiple in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A number, as short as it can be read: 0.25, 1500, 2.1e6, 5e\N{MINUS SIGN}7."""
    if value == 0:
        return "0"
    text = f"{value:.5g}"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        text = f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return text.replace("-", "\N{MINUS SIGN}")


def lines(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    zero: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    width: int = NARROW,
) -> Drawing:
    """Curves over a count (of iterations, of steps), with intervals as error bars.

    zero: the y axis holds 0, and a line shows it. marks: vertical lines, each with a name.
    """
    xs = [float(x) for curve in series for x in curve.x]
    values = [value for curve in series for column in (curve.y, curve.low or (), curve.high or ()) for value in column]
    ys = [float(value) for value in values if _is_finite(value)]
    if zero:
        ys.append(0.0)
    left, right = min(xs, default=0.0), max(xs, default=1.0)
    low, high = (min(ys), max(ys)) if ys else (0.0, 1.0)
    room = (high - low) * 0.06
    margin = (right - left) * 0.04
    axes = _Axes((left - margin, right + margin), (low - room, high + room), x_label, y_label, width)
    axes.grid([value for value in ticks(left, right, width // 70) if value == int(value)])
    if zero:
        axes.add("line", class_="zero", x1=LEFT, x2=width - RIGHT, y1=axes.y(0), y2=axes.y(0))
    for position, name in marks:
        x = axes.x(position)
        axes.add("line", class_="mark", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM)
        axes.add("text", name, class_="marked", x=x + 3, y=TOP + 9)
    _add_columns(axes, series, x_label.partition(",")[0])
    for index, curve in enumerate(series):
        _draw_curve(axes, curve, index, len(series))
    return axes.drawing(title)


def histograms(
    title: str,
    edges: Sequence[float],
    series: Sequence[tuple[str, Sequence[float]]],
    x_label: str,
    y_label: str,
    width: int = NARROW,
) -> Drawing:
    """Several histograms over the same edges, as steps. series: label and height of each bin."""
    top = max((value for _, values in series for value in values), default=1.0) or 1.0
    axes = _Axes((edges[0], edges[-1]), (0.0, top * 1.06), x_label, y_label, width)
    axes.grid(ticks(edges[0], edges[-1], width // 70))
    for index, (_, values) in enumerate(series):
        path = f"M{axes.x(edges[0]):.1f} {axes.y(0):.1f}"
        for left, right, value in zip(edges, edges[1:], values, strict=False):
            path += f"L{axes.x(left):.1f} {axes.y(value):.1f}L{axes.x(right):.1f} {axes.y(value):.1f}"
        path += f"L{axes.x(edges[-1]):.1f} {axes.y(0):.1f}"
        axes.add("path", class_=f"area f{index}", d=f"{path}Z")
        axes.add("path", class_=f"line s{index}", d=path)
    for i, (left, right) in enumerate(pairwise(edges)):
        values = [f"{label}: {number(round(heights[i], 5))}" for label, heights in series]
        text = [f"{x_label} {number(round(left, 5))} to {number(round(right, 5))}", *values]
        axes.column(axes.x(left), axes.x(right), text)
    return axes.drawing(title)


def stacks(
    title: str,
    names: Sequence[str],
    parts: Sequence[tuple[str, Sequence[float]]],
    x_label: str,
    y_label: str,
    width: int = NARROW,
) -> Drawing:
    """A bar per name, made of parts. parts: label and height in each bar."""
    totals = [sum(values[i] for _, values in parts) for i in range(len(names))]
    axes = _Axes((-0.5, len(names) - 0.5), (0.0, (max(totals, default=0.0) or 1.0) * 1.08), x_label, y_label, width)
    labelled = range(0, len(names), math.ceil(len(names) * 35 / width))
    axes.grid(labelled, [names[i] for i in labelled])
    bar = min(46.0, 0.7 * (width - LEFT - RIGHT) / max(len(names), 1))
    for i, name in enumerate(names):
        below = 0.0
        for index, (label, values) in enumerate(parts):
            if values[i] <= 0:
                continue
            top, bottom = axes.y(below + values[i]), axes.y(below)
            axes.add(
                "rect",
                _element("title", f"{label}, {name}: {number(round(values[i], 3))}"),
                class_=f"f{index % COLOURS}",
                x=axes.x(i) - bar / 2,
                y=top,
                width=bar,
                height=max(bottom - top, 0.8),
            )
            below += values[i]
    return axes.drawing(title)


def matrix(
    title: str,
    names: Sequence[str],
    values: Sequence[Sequence[float | None]],
    x_label: str,
    y_label: str,
    width: int = NARROW,
) -> Drawing:
    """A square of win rates in [0, 1], row against column; None where a rate is missing."""
    longest = max(map(len, names), default=0)
    left, top, count = 38.0 + min(7.0 * longest, 110.0), 30.0, max(len(names), 1)
    cell = min((width - left - RIGHT) / count, 64.0)
    body = _axis_labels(left + cell * count / 2, 11, x_label, top + cell * count / 2, y_label)
    for i, name in enumerate(names):
        centre = left + cell * (i + 0.5)
        body.append(_element("text", _cut(name, int(cell / 8)), x=centre, y=25, text_anchor="middle"))
        middle = top + cell * (i + 0.5) + 4
        body.append(_element("text", _cut(name, 15), x=left - 6, y=middle, text_anchor="end"))
        for j, other in enumerate(names):
            square = {"x": left + cell * j, "y": top + cell * i, "width": cell - 1.5, "height": cell - 1.5}
            rate = values[i][j]
            if i == j or not _is_finite(rate):
                body.append(_element("rect", class_="none", **square))
                continue
            side = "win" if rate >= 0.5 else "lose"
            opacity = f"fill-opacity:{min(abs(rate - 0.5) * 2, 1.0):.2f}"
            text = _element("title", f"{name} against {other}: {rate:.1%}")
            body.append(_element("rect", text, class_=side, style=opacity, **square))
            x, y = left + cell * (j + 0.5), top + cell * (i + 0.5) + 4
            body.append(_element("text", f"{100 * rate:.0f}", class_="cell", x=x, y=y, text_anchor="middle"))
    return Drawing(title, width, round(top + cell * count + 8), Markup("").join(body))


class _Axes:
    """Two axes with their labels, and what is drawn between them."""

    def __init__(
        self, x_range: tuple[float, float], y_range: tuple[float, float], x_label: str, y_label: str, width: int
    ):
        self.x_range, self.y_range, self.width = _widened(x_range), _widened(y_range), width
        self.parts = _axis_labels((LEFT + width - RIGHT) / 2, HEIGHT - 5, x_label, (TOP + HEIGHT - BOTTOM) / 2, y_label)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    def add(self, tag: str, content: str = "", /, **attributes: str | float) -> None:
        self.parts.append(_element(tag, content, **attributes))

    def grid(self, x_ticks: Sequence[float], x_names: Sequence[str] | None = None) -> None:
        """Draw a line at each round y, and write the numbers; x_names: instead of the numbers of x_ticks."""
        for value in ticks(*self.y_range):
            y = self.y(value)
            self.add("line", class_="rule", x1=LEFT, x2=self.width - RIGHT, y1=y, y2=y)
            self.add("text", number(value), x=LEFT - 5, y=y + 3.5, text_anchor="end")
        names = x_names or [number(value) for value in x_ticks]
        for value, name in zip(x_ticks, names, strict=True):
            self.add("text", name, x=self.x(value), y=HEIGHT - BOTTOM + 15, text_anchor="middle")

    def drawing(self, title: str) -> Drawing:
        return Drawing(title, self.width, HEIGHT, Markup("").join(self.parts))

    def column(self, left: float, right: float, text: Sequence[str]) -> None:
        """Show these lines to a pointer that is between two x of the drawing."""
        title = _element("title", "\n".join(text))
        self.add("rect", title, class_="hover", x=left, y=TOP, width=right - left, height=HEIGHT - BOTTOM - TOP)


def _add_columns(axes: _Axes, series: Sequence[Series], x_name: str) -> None:
    """Show the values of all curves at an x to a pointer near it; of many x, at some of them evenly spaced."""
    texts: dict[float, list[str]] = {}
    for curve in series:
        ends = zip(curve.low or [None] * len(curve.y), curve.high or [None] * len(curve.y), strict=True)
        for x, y, (low, high) in zip(curve.x, curve.y, ends, strict=True):
            if _is_finite(y):
                interval = f" [{number(low)}, {number(high)}]" if _is_finite(low) and _is_finite(high) else ""
                texts.setdefault(float(x), []).append(f"{curve.label}: {number(float(y))}{interval}")
    xs = sorted(texts)
    xs = xs[:: math.ceil(len(xs) / MOST_COLUMNS)] if xs else []
    middles = [(axes.x(left) + axes.x(right)) / 2 for left, right in pairwise(xs)]
    ends = zip([float(LEFT), *middles], [*middles, float(axes.width - RIGHT)], xs, strict=False)
    for left, right, x in ends:
        axes.column(left, right, [f"{x_name} {number(x)}", *texts[x]])


def _draw_curve(axes: _Axes, curve: Series, index: int, count: int) -> None:
    """Draw one of `count` curves: its line, then an error bar and a dot at each point."""
    shift = 0.0
    if curve.low is not None:
        shift = (index - (count - 1) / 2) * 5  # error bars of several curves stand beside each other
    lows = curve.low or [None] * len(curve.y)
    highs = curve.high or [None] * len(curve.y)
    path, command = "", "M"
    points: list[Markup] = []
    for x_value, y_value, low, high in zip(curve.x, curve.y, lows, highs, strict=True):
        if not _is_finite(y_value):
            command = "M"
            continue
        x, y = axes.x(float(x_value)) + shift, axes.y(float(y_value))
        path += f"{command}{x:.1f} {y:.1f}"
        command = "L"
        text = f"{curve.label} at {number(float(x_value))}: {number(float(y_value))}"
        if _is_finite(low) and _is_finite(high):
            bottom, top = axes.y(float(low)), axes.y(float(high))
            text += f" [{number(float(low))}, {number(float(high))}]"
            bar = f"M{x:.1f} {bottom:.1f}V{top:.1f}M{x - 4:.1f} {bottom:.1f}h8M{x - 4:.1f} {top:.1f}h8"
            points.append(_element("path", class_=f"bar s{index}", d=bar))
        if curve.dots:
            points.append(_element("circle", _element("title", text), class_=f"dot f{index}", cx=x, cy=y, r="3.6"))
    axes.add("path", class_=f"line s{index}", d=path)
    axes.parts += points


def _axis_labels(x_middle: float, x_label_y: float, x_label: str, y_middle: float, y_label: str) -> list[Markup]:
    x, y = f"{x_middle:.0f}", f"{y_middle:.0f}"
    return [
        _element("text", x_label, class_="label", x=x, y=x_label_y, text_anchor="middle"),
        _element("text", y_label, class_="label", x=11, y=y, text_anchor="middle", transform=f"rotate(-90 11 {y})"),
    ]


def _element(tag: str, content: str = "", /, **attributes: str | float) -> Markup:
    """An SVG element: `text_anchor` is written text-anchor, `class_` is class, a float has one decimal.

    Content and attributes are escaped, Markup excepted.
    """
    text = ""
    for name, value in attributes.items():
        if isinstance(value, float):
            value = f"{value:.1f}"
        text += f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
    return Markup(f"<{tag}{text}>{escape(content)}</{tag}>" if content else f"<{tag}{text}/>")


def _widened(ends: tuple[float, float]) -> tuple[float, float]:
    """A range that has a length; [0, 1] if its ends are not finite."""
    low, high = ends
    if not (math.isfinite(low) and math.isfinite(high)):
        return 0.0, 1.0
    if high > low:
        return low, high
    room = abs(low) * 0.1 or 0.5
    return low - room, high + room


def _is_finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _cut(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    return text[: max(length - 1, 1)] + "\N{HORIZONTAL ELLIPSIS}"
