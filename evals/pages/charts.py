"""Small SVG charts without external files or libraries. A chart without data is empty."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llmc.evals.pages.svg import colour, element, text

WIDTH, HEIGHT = 560, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 18, 52
LETTER = 6.6  # approximate width of a letter at 12 px


@dataclass(frozen=True)
class Point:
    """A point of a scatter chart.

    error: half-length of the vertical error bar. hollow: draw a ring (a second text). doubtful: x is unstable; draw a broken
    outline and add UNSTABLE to the label. guess: x is an estimate; draw a broken outline and a horizontal bar over `span`.
    """

    x: float
    y: float
    label: str
    colour: int
    error: float | None = None
    hollow: bool = False
    doubtful: bool = False
    guess: bool = False
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Line:
    """A series. thin: draw no dots, for many noisy points. ring: x of the point that gets a ring. dashed: not measured."""

    label: str
    colour: int
    points: Sequence[tuple[float, float]]
    thin: bool = False
    ring: float | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Bar:
    """A stacked horizontal bar. parts: lengths, in the order of the legend. note: text after the bar."""

    label: str
    parts: Sequence[float]
    note: str


def ticks(top: float, about: int = 5) -> list[float]:
    """Round numbers from 0 to at least `top`: steps of 1, 2 or 5 times a power of ten."""
    if top <= 0:
        return [0.0, 1.0]
    raw = top / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    return [i * step for i in range(math.ceil(top / step - 1e-9) + 1)]


def number(value: float) -> str:
    """The label of a tick, rounded to six digits: 0.3, 150."""
    return f"{value:.6g}"


class _Axes:
    """Linear axes from zero, in a frame of WIDTH x HEIGHT."""

    def __init__(self, x_top: float, y_top: float, x_label: str, y_label: str) -> None:
        self.xs, self.ys = ticks(x_top), ticks(y_top)
        right, bottom, centre = WIDTH - RIGHT, HEIGHT - BOTTOM, (LEFT + WIDTH - RIGHT) / 2
        self.name = f"{y_label}, against {x_label}"
        self.out: list[Markup] = []
        for t in self.ys:
            y = self.y(t)
            self.out.append(element("line", class_="grid", x1=LEFT, x2=right, y1=y, y2=y))
            self.out.append(text(LEFT - 8, y + 4, number(t), "tick", "end"))
        for t in self.xs:
            x = self.x(t)
            self.out.append(element("line", class_="grid", x1=x, x2=x, y1=TOP, y2=bottom))
            self.out.append(text(x, bottom + 18, number(t), "tick", "middle"))
        self.out.append(element("path", class_="axis", d=f"M{LEFT} {TOP}V{bottom}H{right}"))
        self.out.append(text(centre, HEIGHT - 10, x_label, "label", "middle"))
        self.out.append(element("g", text(0, 0, y_label, "label", "middle"),
                                transform=f"translate(16 {(TOP + bottom) / 2}) rotate(-90)"))

    def x(self, v: float) -> float:
        return LEFT + v / self.xs[-1] * (WIDTH - RIGHT - LEFT)

    def y(self, v: float) -> float:
        return HEIGHT - BOTTOM - v / self.ys[-1] * (HEIGHT - BOTTOM - TOP)

    def path(self, points: Iterable[tuple[float, float]]) -> str:
        """Straight lines through points, for the attribute d."""
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)

    def close(self) -> Markup:
        return _svg(HEIGHT, self.name, self.out)


def _svg(height: int, name: str, content: Iterable[Markup]) -> Markup:
    return element("svg", *content, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=name)


def scatter(points: Sequence[Point], x_label: str, y_label: str, front: Sequence[tuple[float, float]] = ()) -> Markup:
    """A scatter chart with error bars and labels. front: points (x, y) that a line connects."""
    if not points:
        return Markup("")
    axes = _Axes(max(p.span[1] if p.span else p.x for p in points) * 1.02, max(p.y + (p.error or 0) for p in points) or 1,
                 x_label, y_label)
    if len(front) > 1:
        axes.out.append(element("path", class_="front", d=axes.path(front)))
    # boxes (left, top, right, bottom) that a label must not touch: the marks and the labels already placed
    taken = [(axes.x(p.x) - 9, axes.y(p.y) - 9, axes.x(p.x) + 9, axes.y(p.y) + 9) for p in points]
    taken += [(axes.x(p.span[0]), axes.y(p.y) - 2, axes.x(p.span[1]), axes.y(p.y) + 2) for p in points if p.span]
    for p in points:
        mark = " UNSTABLE" if p.doubtful else ""
        title = element("title", f"{p.label}: {p.x:.4g}, {p.y:.4g}{mark}")
        axes.out.append(element("g", title, *_mark(axes, p)))
        if not p.hollow:
            axes.out.append(_label(axes.x(p.x), axes.y(p.y), _shorten(p.label, 34 - len(mark)) + mark, taken))
    return axes.close()


def _mark(axes: _Axes, p: Point) -> Iterable[Markup]:
    """The bars and the circle of a point."""
    x, y, paint = axes.x(p.x), axes.y(p.y), colour(p.colour)
    if p.error:
        low, high = axes.y(max(0.0, p.y - p.error)), axes.y(p.y + p.error)
        yield element("path", class_="error", stroke=paint,
                      d=f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {high:.1f}h8M{x - 4:.1f} {low:.1f}h8")
    if p.span:
        yield element("path", class_="error", stroke=paint, d=f"M{axes.x(p.span[0]):.1f} {y:.1f}H{axes.x(p.span[1]):.1f}")
    broken = {"fill_opacity": "0.3", "stroke_dasharray": "3 2"} if p.doubtful or p.guess else {}
    yield element("circle", cx=x, cy=y, r=8 if p.hollow else 5, fill="none" if p.hollow else paint, **broken, stroke=paint,
                  stroke_width=2)


def _shorten(label: str, most: int) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def _label(x: float, y: float, label: str, taken: list[tuple[float, float, float, float]]) -> Markup:
    """Place `label` near (x, y): at the first place that is free and inside the frame, else above the mark."""
    width = LETTER * len(label)
    places = [(x + 13, y + 4, "start"), (x - 13 - width, y + 4, "end"), (x - width / 2, y - 14, "middle"),
              (x - width / 2, y + 22, "middle"), (x + 9, y - 13, "start"), (x - 9 - width, y - 13, "end"),
              (x + 9, y + 21, "start"), (x - 9 - width, y + 21, "end")]

    def box(place: tuple[float, float, str]) -> tuple[float, float, float, float]:
        return place[0], place[1] - 11, place[0] + width, place[1] + 3

    def free(b: tuple[float, float, float, float]) -> bool:
        inside = b[0] >= LEFT + 2 and b[2] <= WIDTH and b[1] >= 0 and b[3] <= HEIGHT - BOTTOM
        return inside and not any(b[0] < t[2] and t[0] < b[2] and b[1] < t[3] and t[1] < b[3] for t in taken)

    place = next((p for p in places if free(box(p))), places[2])
    taken.append(box(place))
    at = {"start": place[0], "end": place[0] + width, "middle": place[0] + width / 2}[place[2]]
    return text(at, place[1], label, "mark", place[2])


def lines(series: Sequence[Line], x_label: str, y_label: str) -> Markup:
    """A line chart. Lines that are not thin have a dot at every point. The legend is part of the page."""
    every = [p for s in series for p in s.points]
    if not every:
        return Markup("")
    x_top, y_top = (max(p[i] for p in every) or 1 for i in (0, 1))
    axes = _Axes(x_top, y_top, x_label, y_label)
    for s in series:
        style, paint = "line" + " thin" * s.thin + " dashed" * s.dashed, colour(s.colour)
        axes.out.append(element("path", class_=style, stroke=paint, d=axes.path(s.points)))
        for x, y in () if s.thin else s.points:
            cx, cy = axes.x(x), axes.y(y)
            if x == s.ring:
                axes.out.append(element("circle", cx=cx, cy=cy, r=8, fill="none", stroke=paint, stroke_width=2))
            title = element("title", f"{s.label}, {number(x)}: {y:.4g}")
            axes.out.append(element("circle", title, cx=cx, cy=cy, r=3, fill=paint))
    return axes.close()


def bars(rows: Sequence[Bar], kinds: Sequence[str], x_label: str) -> Markup:
    """Stacked horizontal bars. Each has its label above it and its note after it. kinds: names of the parts."""
    if not rows:
        return Markup("")
    left, bar = 8, 22
    step = max(52, min(84, 300 // len(rows)))
    height = step * len(rows) + 44
    xs = ticks(max(sum(r.parts) for r in rows))
    scale = (WIDTH - left - 110) / xs[-1]
    out = []
    for t in xs:
        x = left + t * scale
        out.append(element("line", class_="grid", x1=x, x2=x, y1=4, y2=height - 40))
        out.append(text(x, height - 24, number(t), "tick", "middle" if t else "start"))
    out.append(text(left + xs[-1] * scale / 2, height - 5, x_label, "label", "middle"))
    for i, row in enumerate(rows):
        x, y = float(left), i * step + 22
        out.append(text(left, y - 6, row.label, "mark"))
        for k, (kind, part) in enumerate(zip(kinds, row.parts, strict=True)):
            if part > 0:
                title = element("title", f"{row.label}, {kind}: {part:.4g}")
                out.append(element("rect", title, x=x, y=y, width=part * scale, height=bar, fill=f"var(--k{k})"))
            x += part * scale
        out.append(text(x + 8, y + 15, row.note, "tick"))
    return _svg(height, x_label, out)
