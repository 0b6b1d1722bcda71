"""Line charts as inline SVG: axes, resume marks, and the data that the page's script needs for reading values off."""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 22, 10, 28
MAX_POINTS = 600
"""Points drawn per line; longer ones are thinned to the lowest and highest of each stretch."""
SMOOTH_ABOVE = 80
"""Lines of more points than this show a running mean over the pale raw values."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """One named line; points are (step, value), steps ascending, values finite."""

    label: str
    points: Sequence[Point]
    dots: bool = False
    """Mark every point: for the few of an evaluation."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A titled plot of up to four lines over the same steps."""

    title: str
    unit: str
    lines: Sequence[Line]
    marks: Sequence[int] = ()
    """Steps at which the run was resumed."""
    may_be_log: bool = False
    """Use a logarithmic scale where the values span more than a factor of 50."""


def render_chart(chart: Chart) -> str:
    """The chart as a <figure>; lines without points are left out, and a chart without lines is an empty string."""
    lines = [line for line in chart.lines if line.points]
    if not lines:
        return ""
    steps = [x for line in lines for x, _ in line.points]
    values = [y for line in lines for _, y in line.points]
    is_log = chart.may_be_log and min(values) > 0 and max(values) > 50 * min(values)
    x_axis, y_axis = _Axis(min(0.0, *steps), max(steps)), _Axis(*_value_range(values, is_log), is_log=is_log)
    parts = [_grid(x_axis, y_axis)]
    for mark in chart.marks:
        if x_axis.low <= mark <= x_axis.high:
            x = _x(x_axis, mark)
            parts.append(
                f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"><title>resumed at step {mark}</title></line>'
            )
    for number, line in enumerate(lines):
        parts.append(_draw(line, number, x_axis, y_axis))
    legend = "".join(f'<span class="key c{n}">{html.escape(line.label)}</span>' for n, line in enumerate(lines)) if len(lines) > 1 else ""
    last = _format(lines[0].points[-1][1])
    scale = ", log scale" if is_log else ""
    data = {
        "x": [x_axis.low, x_axis.high, LEFT, WIDTH - RIGHT],
        "y": [y_axis.low, y_axis.high, HEIGHT - BOTTOM, TOP, int(is_log)],
        "lines": [{"label": line.label, "points": [[x, float(f"{y:.6g}")] for x, y in _thin(line.points)]} for line in lines],
    }
    return (
        f'<figure class="chart" data-chart="{html.escape(json.dumps(data, separators=(",", ":")))}">'
        f"<figcaption><b>{html.escape(chart.title)}</b> <small>{html.escape(chart.unit)}{scale}</small>"
        f'<span class="legend">{legend}</span><output>{last}</output></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(chart.title)} over training steps">{"".join(parts)}'
        '<line class="cursor" y1="10" y2="222" x1="-9" x2="-9"/></svg></figure>'
    )


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float
    is_log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies between the ends, 0..1."""
        if self.is_log:
            return (math.log(max(value, self.low)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / ((self.high - self.low) or 1.0)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values within the axis."""
        if self.is_log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1, 2, 5), (1, 3), (1,)):
                ticks = [factor * 10.0**power for power in powers for factor in factors]
                ticks = [tick for tick in ticks if self.low <= tick <= self.high]
                if len(ticks) <= count + 2:
                    break
            return ticks[:: max(1, len(ticks) // count)]
        span = (self.high - self.low) or 1.0
        raw = span / count
        step = next(factor * 10.0 ** math.floor(math.log10(raw)) for factor in (1, 2, 5, 10) if factor * 10.0 ** math.floor(math.log10(raw)) >= raw)
        first = math.ceil(self.low / step)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _value_range(values: Sequence[float], is_log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if is_log:
        return low * 0.9, high * 1.1
    if len(values) > 200:
        # A single spike must not press the rest of the curve flat.
        ordered = sorted(values)
        inner_low, inner_high = ordered[len(ordered) // 200], ordered[-1 - len(ordered) // 200]
        if high - low > 4 * (inner_high - inner_low) > 0:
            low, high = inner_low, inner_high
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return (0.0 if 0 <= low < 0.5 * high else low - margin), high + margin


def _x(axis: _Axis, value: float) -> float:
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: _Axis, value: float) -> float:
    height = HEIGHT - BOTTOM - TOP
    return min(max(HEIGHT - BOTTOM - axis.share(value) * height, TOP), HEIGHT - BOTTOM)


def _grid(x_axis: _Axis, y_axis: _Axis) -> str:
    parts = []
    for tick in y_axis.ticks(5):
        y = _y(y_axis, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_format(tick)}</text>')
    for tick in x_axis.ticks(6):
        x = _x(x_axis, tick)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{_format(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    return "".join(parts)


def _draw(line: Line, number: int, x_axis: _Axis, y_axis: _Axis) -> str:
    def path(points: Sequence[Point], style: str) -> str:
        corners = " ".join(f"{_x(x_axis, x):.1f},{_y(y_axis, y):.1f}" for x, y in points)
        return f'<polyline class="{style} c{number}" points="{corners}"/>'

    if line.dots or len(line.points) == 1:
        dots = "".join(f'<circle class="dot c{number}" cx="{_x(x_axis, x):.1f}" cy="{_y(y_axis, y):.1f}" r="3"/>' for x, y in line.points)
        return path(line.points, "line") + dots
    if len(line.points) <= SMOOTH_ABOVE:
        return path(line.points, "line")
    return path(_thin(line.points), "raw") + path(_thin(_smooth(line.points)), "line")


def _smooth(points: Sequence[Point]) -> list[Point]:
    """Mean over a centred window of 3 % of the points, cut off at the ends."""
    half = max(1, len(points) * 3 // 200)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    smoothed = []
    for index, (x, _) in enumerate(points):
        low, high = max(0, index - half), min(len(points), index + half + 1)
        smoothed.append((x, (sums[high] - sums[low]) / (high - low)))
    return smoothed


def _thin(points: Sequence[Point]) -> list[Point]:
    if len(points) <= MAX_POINTS:
        return list(points)
    stretch = math.ceil(len(points) / (MAX_POINTS // 2))
    thinned: list[Point] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        thinned += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return thinned


def _format(value: float) -> str:
    """At most four significant digits, k and M for thousands and millions."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size and size < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.4g}"
