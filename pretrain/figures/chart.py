"""Line charts as SVG: small, sharp, and honest about what they leave out.

A curve of any length keeps the lowest and the highest value of every few pixels, so no spike is lost. Values that are
not finite are gaps. A value far outside the rest is drawn as a triangle at the edge, and said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pretrain.figures.markup import node, number, table

#: Pixels.
WIDE, NARROW, TALL, LOW = 1040, 510, 300, 210
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 30
#: Of half a character of a label, and of the word "step", the axis' name.
HALF_CHARACTER, NAME = 4.0, 26.0
#: Pixels that share one lowest and one highest value; strips that show numbers when one points at them.
BUCKET, STRIPS = 2, 100
#: A line of at most so many points has each of them marked.
DOTS = 60
#: Values farther than this from the bulk (1st to 99th percentile), in units of its width, are drawn at the edge.
FAR = 10.0
#: Larger values are drawn at the edge too, so that no difference or square of what is drawn overflows.
LARGEST = 1e150
TABLE_ROWS = 24

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """A curve: ``values`` at ascending ``steps``. ``look``: its classes, one of ``c0`` to ``c7`` and, where wanted,
    ``thin`` or ``dashed``."""

    name: str
    look: str
    steps: Array
    values: Array

    @classmethod
    def of(cls, name: str, look: str, steps: ArrayLike, values: ArrayLike) -> Line:
        return cls(name, look, np.asarray(steps, np.float64), np.asarray(values, np.float64))


@dataclass(frozen=True)
class Marks:
    """What every chart of a run shows: ``skipped`` steps, and ``resumes``, the first step of each later attempt."""

    skipped: Sequence[int] = ()
    resumes: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True)
class Scale:
    """Values [low, high] on pixels [start, stop]."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False
    ticks: Sequence[float] = field(default=())

    def __call__(self, values: ArrayLike) -> Array:
        low, high = self.low, self.high
        inside = np.clip(np.asarray(values, np.float64), low, high)
        if self.log:
            inside, low, high = np.log(inside), math.log(low), math.log(high)
        return self.start + (inside - low) / (high - low) * (self.stop - self.start)


def line_chart(
    lines: Sequence[Line],
    marks: Marks = Marks(),
    *,
    wide: bool = False,
    log: bool = False,
    floor: float | None = None,
    behind: Sequence[Line] = (),
) -> Element:
    """A chart of ``lines`` over steps. ``log``: the vertical axis is logarithmic if the values span a factor of 20;
    ``floor``: a value that the axis reaches down to; ``behind``: lines, any number of them, that only say their names.
    """
    width, height, look = (WIDE, TALL, "chart wide") if wide else (NARROW, LOW, "chart")
    steps = np.concatenate([line.steps for line in (*lines, *behind)])
    first, last = float(steps.min()), float(steps.max())
    x = Scale(first, max(last, first + 1), LEFT, width - RIGHT)
    x = Scale(x.low, x.high, x.start, x.stop, ticks=[t for t in ticks(x.low, x.high, width // 100) if t == int(t)])
    y = vertical([*lines, *behind], height, log, floor)
    svg = node("svg", viewBox=f"0 0 {width} {height}", class_=look, role="img", aria_label=lines[0].name)
    svg.extend(_axes(x, y, height))
    svg.extend(_marked(marks, x, height, labels=wide))
    for line in behind:
        if (path := next(_drawn(line, x, y), None)) is not None:
            path.append(node("title", line.name))
            svg.append(path)
    for line in lines:
        svg.extend(_drawn(line, x, y))
    svg.extend(_strips(lines, x, height))
    return svg


def not_drawn(lines: Sequence[Line], log: bool = False) -> str:
    """The note about values that ``line_chart`` draws at the edge or not at all, empty if there are none."""
    extent = _Extent.of(lines, log)
    if extent is None:
        return "No finite value."
    said = [f"{extent.far:,} far outside the rest, drawn as triangles at the edge."] if extent.far else []
    said += [f"{extent.absent:,} of zero or less, which a logarithmic axis has not."] if extent.absent else []
    return " ".join(said)


def line_table(lines: Sequence[Line]) -> Element:
    """The values at some steps, the first and the last among them, evenly between."""
    chosen = _shared_steps(lines, TABLE_ROWS)
    columns = [dict(zip(line.steps.tolist(), line.values.tolist(), strict=True)) for line in lines]
    rows = [[f"{step:,.0f}", *(number(c[step], 5) if step in c else "–" for c in columns)] for step in chosen.tolist()]
    return table(["step", *(line.name for line in lines)], rows, text_columns=0)


def _shared_steps(lines: Sequence[Line], most: int) -> Array:
    """Steps to print, the first and the last among them: those that all lines have, or all there are if none is."""
    every = [line.steps for line in lines]
    shared = reduce(np.intersect1d, every)
    steps = shared if shared.size else np.unique(np.concatenate(every))
    return steps[np.unique(np.linspace(0, len(steps) - 1, min(len(steps), most)).round().astype(int))]


def smooth(line: Line, name: str, look: str, reach: int) -> Line:
    """The median of the finite values up to ``reach`` steps to either side, at no more steps than a chart can show.

    Towards the ends both sides shrink alike, so the curve neither lags nor bends there, and a spike leaves no trace.
    """
    count = len(line.steps)
    at = np.unique(np.linspace(0, count - 1, min(count, WIDE // BUCKET)).round().astype(int))
    sides = np.minimum(reach, np.minimum(at, count - 1 - at))
    around = (line.values[index - side : index + side + 1] for index, side in zip(at, sides, strict=True))
    finite = (values[np.isfinite(values)] for values in around)
    return Line.of(name, look, line.steps[at], [np.median(values) if values.size else math.nan for values in finite])


def decimate(steps: Array, values: Array, buckets: int) -> NDArray[np.intp]:
    """Indices to draw: of each of ``buckets`` equal ranges of steps, the lowest and the highest finite value."""
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite) <= 2 * buckets:
        return finite
    at = (steps[finite] - steps[0]) / (steps[-1] - steps[0]) * buckets
    kept = [
        index
        for part in np.split(finite, np.flatnonzero(np.diff(np.floor(at))) + 1)
        for index in (part[values[part].argmin()], part[values[part].argmax()])
    ]
    return np.unique([finite[0], *kept, finite[-1]])


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers in [low, high], about so many: multiples of 1, 2 or 5 times a power of ten.

    >>> ticks(0.0, 9.3, 4)
    [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    rough = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high] on a logarithmic axis: 1, 2 and 5 times powers of ten, or some of the powers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    if len(fine) <= 7:
        return fine
    decades = [10.0**p for p in powers if low <= 10.0**p <= high]
    return decades[:: -(-len(decades) // 7)]


@dataclass(frozen=True)
class _Extent:
    """What a vertical axis must show: [low, high], all finite values but ``far`` ones far from the bulk and, on a
    logarithmic axis, ``absent`` ones that are not positive."""

    low: float
    high: float
    log: bool
    far: int
    absent: int

    @classmethod
    def of(cls, lines: Sequence[Line], log: bool) -> _Extent | None:
        """None where no value is finite. Logarithmic only if asked for and positive values span a factor of 20."""
        values = np.concatenate([line.values for line in lines])
        values = np.clip(values[np.isfinite(values)], -LARGEST, LARGEST)
        if not values.size:
            return None
        positive = np.maximum(values[values > 0], 1 / LARGEST)
        log = log and positive.size > 0 and positive.max() > 20 * positive.min()
        shown = positive if log else values
        low, high = np.quantile(shown, (0.01, 0.99))
        near = shown[(shown >= low - FAR * (high - low)) & (shown <= high + FAR * (high - low))]
        return cls(float(near.min()), float(near.max()), log, shown.size - near.size, values.size - shown.size)


def vertical(lines: Sequence[Line], height: int, log: bool = False, floor: float | None = None) -> Scale:
    """The vertical axis of a chart so high, for the values of these lines: see ``line_chart``."""
    extent = _Extent.of(lines, log) or _Extent(0.0, 1.0, False, 0, 0)
    low, high, pixels = extent.low, extent.high, (height - BOTTOM, TOP)
    if extent.log:
        low, high = low / 1.15, high * 1.15
        return Scale(low, high, *pixels, log=True, ticks=log_ticks(low, high))
    low = low if floor is None else min(low, floor)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = (low if low == floor else low - pad), high + pad
    return Scale(low, high, *pixels, ticks=ticks(low, high, 7 if height == TALL else 5))


def _axes(x: Scale, y: Scale, height: int) -> Iterator[Element]:
    for value, at in zip(y.ticks, y(y.ticks), strict=True):
        yield node("path", d=f"M{LEFT} {at:.1f}H{x.stop:g}", class_="grid")
        yield node("text", tick_label(value), x=LEFT - 8, y=f"{at:.1f}", dy=".35em", class_="tick", text_anchor="end")
    yield node("path", d=f"M{LEFT} {height - BOTTOM}H{x.stop:g}", class_="axis")
    below, edge, free = height - BOTTOM + 17, x.stop + RIGHT, 0.0
    for value, at in zip(x.ticks, x(x.ticks), strict=True):
        label = f"{value:,.0f}"
        if not free:  # the axis' name ends before the first label, which gives way where there is no room for it
            named = max(NAME, min(LEFT - 8.0, at - HALF_CHARACTER * len(label) - 6))
            yield node("text", "step", x=f"{named:.1f}", y=below, class_="tick", text_anchor="end")
            free = named + 6
        place = {"x": f"{at:.1f}", "text_anchor": "middle"}
        if at - HALF_CHARACTER * len(label) < free - 0.1:
            place = {"x": f"{free:.1f}", "text_anchor": "start"}
        elif at + HALF_CHARACTER * len(label) > edge:
            place = {"x": f"{edge:g}", "text_anchor": "end"}
        yield node("text", label, y=below, class_="tick", **place)


def tick_label(value: float) -> str:
    """A round number, with the digits that tell it from the next one: 0.002, 5,000, 3e-4, 1.004e6."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.10g}"
    mantissa, exponent = f"{value:.11e}".split("e")
    return f"{float(mantissa):.12g}e{int(exponent)}"


def _marked(marks: Marks, x: Scale, height: int, labels: bool) -> Iterator[Element]:
    bottom = height - BOTTOM
    for first, last in _spans([step for step in marks.skipped if x.low <= step <= x.high], x):
        a, b = (float(at) for at in x([first, last]))
        words = f"step {first} skipped" if first == last else f"steps {first} to {last}: some or all skipped"
        area = {"x": f"{a - 1.5:.1f}", "y": TOP, "width": f"{b - a + 3:.1f}", "height": bottom - TOP}
        yield node("rect", node("title", words), **area, class_="skipped")
    for step, words in marks.resumes:
        if x.low <= step <= x.high:
            at = float(x(step))
            said = node("title", f"{words} from step {step}")
            yield node("path", said, d=f"M{at:.1f} {TOP}V{bottom}", class_="resume")
            if labels:
                aside, anchor = (-5, "end") if at > 0.85 * x.stop else (5, "start")
                yield node("text", words, x=f"{at + aside:.1f}", y=TOP + 9, text_anchor=anchor, class_="tick")


def _spans(steps: Sequence[int], x: Scale) -> list[tuple[int, int]]:
    """Steps nearer than three pixels to one another, as ranges."""
    spans: list[tuple[int, int]] = []
    near = max(1.0, 3.0 * (x.high - x.low) / (x.stop - x.start))
    for step in steps:
        if spans and step - spans[-1][1] <= near:
            spans[-1] = (spans[-1][0], step)
        else:
            spans.append((step, step))
    return spans


def _drawn(line: Line, x: Scale, y: Scale) -> Iterator[Element]:
    shown = np.where(line.values > 0, line.values, np.nan) if y.log else line.values
    kept = decimate(line.steps, shown, int(x.stop - x.start) // BUCKET)
    if not len(kept):
        return
    at_x, at_y = x(line.steps[kept]), y(shown[kept])
    missing = np.cumsum(~np.isfinite(shown))
    # Between two points that are drawn, only steps without a value: the line is broken.
    gap = (np.diff(missing[kept]) > 0) & (np.diff(missing[kept]) == np.diff(kept) - 1)
    moves = ["M", *np.where(gap, "M", "L")]
    path = "".join(f"{move}{a:.1f} {b:.1f}" for move, a, b in zip(moves, at_x, at_y, strict=True))
    yield node("path", d=path + "h0", class_=f"line {line.look}")
    for index, a, b in zip(kept, at_x, at_y, strict=True):
        value = float(shown[index])
        if not y.low <= value <= y.high:
            up = 1 if value > y.high else -1
            words = f"{line.name}, step {line.steps[index]:,.0f}: {number(value)}"
            edge = f"M{a:.1f} {b:.1f}l-4 {7 * up}h8z"
            yield node("path", node("title", words), d=edge, class_=f"dot {line.look}")
        elif len(kept) <= DOTS and "thin" not in line.look:
            yield node("circle", cx=f"{a:.1f}", cy=f"{b:.1f}", r="2.5", class_=f"dot {line.look}")


def _strips(lines: Sequence[Line], x: Scale, height: int) -> Iterator[Element]:
    """Invisible strips over the chart that say the values when one points at them."""
    chosen = _shared_steps(lines, STRIPS)
    middles = (x(chosen[:-1]) + x(chosen[1:])) / 2
    for step, left, right in zip(chosen, [x.start, *middles], [*middles, x.stop], strict=True):
        said = [f"step {step:,.0f}"]
        for line in lines:
            index = int(np.searchsorted(line.steps, step))
            if index < len(line.steps) and line.steps[index] == step:
                said.append(f"{line.name}: {number(float(line.values[index]), 5)}")
        area = {"x": f"{left:.1f}", "y": TOP, "width": f"{max(right - left, 1):.1f}", "height": height - BOTTOM - TOP}
        yield node("rect", node("title", "\n".join(said)), **area, class_="strip")
