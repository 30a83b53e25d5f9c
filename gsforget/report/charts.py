"""Charts as inline SVG: colours come from the page's style, and shapes and dashes tell the series apart without them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gsforget.report.markup import Html, measured, number, tag

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 40


@dataclass(frozen=True)
class Series:
    """A line: its name, its points (a y of None is a gap), and its style, ``subject``, ``original`` or ``reference``."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    style: str

    def points(self) -> list[tuple[float, float]]:
        return [(float(x), float(y)) for x, y in zip(self.xs, self.ys) if measured(x) and measured(y)]


def lines(
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    y_range: tuple[float, float] = (0.0, 100.0),
    x_names: Sequence[str] | None = None,
) -> Html:
    """A line chart with a legend; y beyond the range is widened to, never cut."""
    shown = [(s, s.points()) for s in series]
    shown = [(s, points) for s, points in shown if points]
    every = [point for _, points in shown for point in points]
    xs = [x for x, _ in every]
    x0, x1 = (min(xs), max(xs)) if xs else (0.0, 1.0)
    x1 = x1 if x1 > x0 else x0 + 1
    y0, y1 = min([y_range[0], *(y for _, y in every)]), max([y_range[1], *(y for _, y in every)])

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = list(_axes(x0, x1, y0, y1, place, x_label, y_label, x_names))
    for s, points in shown:
        at = [place(*point) for point in points]
        parts.append(tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in at), class_=f"line {s.style}"))
        parts += [_mark(x, y, s.style) for x, y in at]
    return tag(
        "figure", _svg(title, description, parts), _legend([(s.name, s.style) for s, _ in shown]), class_="chart"
    )


def scatter(
    title: str,
    description: str,
    groups: Sequence[tuple[str, str, Sequence[Sequence[float]]]],
) -> Html:
    """Points in the plane without axes, both to one scale; ``groups`` are (name, style, [[x, y], …]), drawn in this order."""
    kept = [(n, s, [p for p in points if len(p) == 2 and all(map(measured, p))]) for n, s, points in groups]
    every = [p for _, _, points in kept for p in points]
    low = [min((p[i] for p in every), default=0.0) for i in (0, 1)]
    high = [max((p[i] for p in every), default=1.0) for i in (0, 1)]
    scale = min((s - 30) / (h - a if h > a else 1) for a, h, s in zip(low, high, (WIDTH, HEIGHT)))
    middle = [(a + h) / 2 for a, h in zip(low, high)]
    parts = [tag("rect", x=0.5, y=0.5, width=WIDTH - 1, height=HEIGHT - 1, class_="frame")]
    for _, style, points in kept:
        for x, y in points:
            across, down = WIDTH / 2 + scale * (x - middle[0]), HEIGHT / 2 - scale * (y - middle[1])
            parts.append(_mark(across, down, style))
    return tag("figure", _svg(title, description, parts), _legend([(n, s) for n, s, _ in kept]), class_="chart")


def bar(before: Any, after: Any) -> Html:
    """Two bars of percentages, before above after, for a table cell; the figures stand beside it in the table."""
    parts = [
        tag("rect", x=0, y=y, width=round(max(0.0, min(100.0, float(v))), 1), height=5, class_=f"bar {style}")
        for v, y, style in ((before, 1, "original"), (after, 8, "subject"))
        if measured(v)
    ]
    frame = tag("path", d="M0.5 0V14M100.5 0V14", class_="grid")
    return tag("svg", frame, *parts, viewBox="0 0 101 14", width=101, height=14, aria_hidden="true", class_="bars")


def _axes(
    x0: float, x1: float, y0: float, y1: float, place: Any, x_label: str, y_label: str, names: Any
) -> Iterator[Html]:
    for y in ticks(y0, y1):
        left, down = place(x0, y)
        yield tag("path", d=f"M{left:.1f} {down:.1f}H{WIDTH - RIGHT}", class_="grid")
        yield tag("text", number(y, digits=_places(y1 - y0)), x=left - 6, y=f"{down + 4:.1f}", text_anchor="end")
    if names:
        step = max(1, math.ceil(len(names) / 12))
        marks = [(float(i), str(names[i])) for i in range(0, len(names), step)]
    else:
        marks = [(x, number(x, digits=_places(x1 - x0))) for x in ticks(x0, x1)]
    for x, text in marks:
        across, down = place(x, y0)
        yield tag("path", d=f"M{across:.1f} {down:.1f}v4", class_="tick")
        yield tag("text", text, x=f"{across:.1f}", y=f"{down + 16:.1f}", text_anchor="middle")
    yield tag("path", d=f"M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}", class_="axis")
    yield tag("text", x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle", class_="label")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    yield tag("text", y_label, transform=f"translate(11 {middle}) rotate(-90)", text_anchor="middle", class_="label")


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from low to high, about `wanted` of them: steps of 1, 2, 2.5 or 5 times a power of ten."""
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(power * s for s in (1, 2, 2.5, 5, 10) if span / (power * s) <= wanted)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _places(span: float) -> int:
    return 0 if span >= 10 else 1 if span > 1.5 else 2


def _mark(x: float, y: float, style: str) -> Html:
    """A circle, square or triangle: the shape tells the style apart in black and white."""
    if style in ("subject", "retain"):
        return tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.6, class_=f"mark {style}")
    if style == "original":
        return tag("rect", x=f"{x - 2.4:.1f}", y=f"{y - 2.4:.1f}", width=4.8, height=4.8, class_=f"mark {style}")
    return tag("path", d=f"M{x:.1f} {y - 3.6:.1f}l3.4 6h-6.8z", class_=f"mark {style}")


def _legend(entries: Sequence[tuple[str, str]]) -> Html:
    def swatch(style: str) -> Html:
        line = "" if style in ("forget", "retain") else tag("path", d="M0 6H26", class_=f"line {style}")
        return tag("svg", line, _mark(13, 6, style), viewBox="0 0 26 12", width=26, height=12, aria_hidden="true")

    return tag("figcaption", *(tag("span", swatch(style), " ", name) for name, style in entries), class_="legend")


def _svg(title: str, description: str, parts: Sequence[Html]) -> Html:
    key = re.sub(r"[^a-z0-9]+", "-", f"chart {title}".lower()).strip("-")  # titles are unique within the page
    return tag(
        "svg",
        tag("title", title, id=f"{key}-title"),
        tag("desc", description, id=f"{key}-desc"),
        *parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_labelledby=f"{key}-title {key}-desc",
    )
