"""Pictures of many runs: their curves, what each key does to the metric, and all keys at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any
from xml.etree.ElementTree import Element

from pretrain.figures.chart import (
    BOTTOM,
    LEFT,
    LOW,
    NARROW,
    RIGHT,
    TALL,
    TOP,
    WIDE,
    Line,
    Scale,
    line_chart,
    log_ticks,
    not_drawn,
    tick_label,
    ticks,
    vertical,
)
from pretrain.figures.markup import figure, node, number, table
from pretrain.figures.sweep import Results, Row, shown

#: Runs drawn in colours of their own; more are not told apart.
COLOURED = 6
#: More values than these are an axis of numbers; fewer stand side by side.
SIDE_BY_SIDE = 12
#: Axes that a picture of all keys has room for, the metric's apart.
MOST_AXES = 9
LABEL = 26
#: Lines that do not cover each other.
FEW_LINES = 150
LONG = "Long curves are means of neighbouring steps."


def curves(results: Results) -> list[Element]:
    """The metric over steps: the best runs in colours, the others behind them."""
    drawn = [row for row in results.rows if len(row.curve.steps) and not row.apart]
    if not drawn:
        return [node("p", "No run has been measured yet.", class_="missing")]
    best = [row for row in drawn if row.ranked][:COLOURED] or drawn[:COLOURED]
    lines = [Line(_label(row, results), f"c{i}", row.curve.steps, row.curve.values) for i, row in enumerate(best)]
    chosen = {row.number for row in best}
    look = _faint(len(drawn))
    rest = [Line(row.name, look, row.curve.steps, row.curve.values) for row in drawn if row.number not in chosen]
    legend = [(line.look, line.name) for line in lines] + ([("c7 faint", f"{len(rest):,} others")] if rest else [])
    log = results.metric == "grad_norm"
    half = max(float(line.steps[-1]) for line in lines) / 2
    found: list[Element] = []
    for unit, near, far in (
        ("over steps", lines, rest),
        ("the second half, where runs come apart", _since(lines, half), _since(rest, half)),
    ):
        if near:
            picture = line_chart(near, wide=True, log=log, behind=far)
            notes = (LONG if not found else "", not_drawn([*near, *far], log))
            found.append(figure(results.metric, unit, picture, *notes, legend=legend))
    return found


def _since(lines: Sequence[Line], step: float) -> list[Line]:
    kept = [(line, line.steps >= step) for line in lines]
    return [Line(line.name, line.look, line.steps[at], line.values[at]) for line, at in kept if at.any()]


def _faint(count: int) -> str:
    """The look of lines that stand behind: the fainter, the more there are."""
    return "c7 faint" if count <= FEW_LINES else "c7 faint many"


def _label(row: Row, results: Results) -> str:
    changes = ", ".join(f"{key.rpartition('.')[2]} {shown(row.values[key])}" for key in results.keys)
    return f"{row.number}: {changes}" if changes else row.name


@dataclass(frozen=True)
class Axis:
    """Where the values of a key stand, 0 to 1, and what is written there."""

    labels: Sequence[tuple[float, str]]
    places: dict[str, float]

    def __call__(self, value: Any) -> float:
        return self.places[shown(value)]

    @classmethod
    def of(cls, values: Sequence[Any]) -> Axis:
        """A few values stand side by side; many numbers on a scale, logarithmic where they span a factor of 20."""
        distinct = {shown(value): value for value in values}
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct.values())
        texts = sorted(distinct, key=lambda text: (distinct[text] if numeric else 0, text))
        if not numeric or len(texts) <= SIDE_BY_SIDE:
            places = {text: (index + 0.5) / len(texts) for index, text in enumerate(texts)}
            every = max(1, -(-len(texts) // SIDE_BY_SIDE))
            return cls([(places[text], text) for text in texts[::every]], places)
        low, high = float(distinct[texts[0]]), float(distinct[texts[-1]])
        scale = Scale(low, high, 0.05, 0.95, log=low > 0 and high > 20 * low)
        at = log_ticks(low, high) if scale.log else ticks(low, high, 5)
        labels = [(float(scale(tick)), tick_label(tick)) for tick in at]
        return cls(labels, {text: float(scale(value)) for text, value in distinct.items()})


def effects(results: Results) -> list[Element]:
    """For each key, the metric of every run that is done, and its mean by value."""
    if len(results.ranked) < 2 or not results.keys:
        return [node("p", "Too few runs are done to say what a key does.", class_="missing")]
    found = [_effect(results, key) for key in results.keys]
    note = (
        "Each point is a run, each line the mean over all that share the value, whatever the other keys are: in a list "
        "of runs that is no grid, a key may get the credit of another."
    )
    if results.rule is not None:
        note += " Runs that the rule stopped are left out, the worse ones, so effects look smaller than they are."
    return [node("div", *found, class_="pair"), node("p", note, class_="note")]


def _effect(results: Results, key: str) -> Element:
    rows = results.ranked
    axis = Axis.of([row.values[key] for row in rows])
    y = vertical([_as_line(results.metric, rows)], LOW)
    svg = node(
        "svg", viewBox=f"0 0 {NARROW} {LOW}", class_="chart", role="img", aria_label=f"{results.metric} by {key}"
    )
    svg.extend(_rules(y, NARROW))
    width = NARROW - LEFT - RIGHT
    below = LOW - BOTTOM + 17
    for place, text in axis.labels:
        at = f"{LEFT + place * width:.1f}"
        svg.append(
            node(
                "text",
                node("title", text),
                _fitted(text, len(axis.labels)),
                x=at,
                y=below,
                class_="tick",
                text_anchor="middle",
            )
        )
    dots = []
    for row in rows:
        spread = ((row.number * 0.618034) % 1 - 0.5) * 0.5 * width / max(len(axis.places), 2)
        dots.append(f"M{LEFT + axis(row.values[key]) * width + spread:.1f} {float(y(row.score)):.1f}h0")
    svg.append(node("path", d="".join(dots), class_="line points c7"))
    if len(axis.places) > SIDE_BY_SIDE:
        return figure(key, results.metric, svg)
    means = []
    for label, place in sorted(axis.places.items(), key=lambda item: item[1]):
        values = [row.score for row in rows if shown(row.values[key]) == label]
        means.append((LEFT + place * width, fmean(values), label, values))
    path = "L".join(f"{at:.1f} {float(y(mean)):.1f}" for at, mean, _, _ in means)
    svg.append(node("path", d=f"M{path}", class_="line c0"))
    for x, mean, label, values in means:
        words = (
            f"{key}={label}: mean {number(mean, 5)} of {len(values)} runs, {number(min(values), 5)} to "
            f"{number(max(values), 5)}"
        )
        svg.append(
            node("circle", node("title", words), cx=f"{x:.1f}", cy=f"{float(y(mean)):.1f}", r=4, class_="dot c0")
        )
    summary = table(
        ["value", "runs", "mean", "lowest", "highest"],
        [[t, f"{len(found):,}", *(number(x, 5) for x in (m, min(found), max(found)))] for _, m, t, found in means],
    )
    return figure(key, results.metric, svg, numbers=summary)


def parallel(results: Results) -> list[Element]:
    """All keys at once: a line for each run that is done, from its values to its metric, the best tenth in colour."""
    keys, rows = list(results.keys)[:MOST_AXES], results.ranked
    if len(rows) < 3 or len(keys) < 2:
        return []
    height, top, bottom = TALL + 60, TOP + 30, TALL + 60 - 34
    places = [LEFT + (WIDE - LEFT - 90) * index / len(keys) for index in range(len(keys) + 1)]
    axes = [Axis.of([row.values[key] for row in rows]) for key in keys]
    last = vertical([_as_line(results.metric, rows)], height)
    last = Scale(last.low, last.high, bottom, top, last.log, last.ticks)

    def at(place: float) -> float:
        return bottom + (top - bottom) * place

    svg = node(
        "svg", viewBox=f"0 0 {WIDE} {height}", class_="chart wide", role="img", aria_label="all keys and the metric"
    )
    best = max(1, len(rows) // 10)
    for index, row in reversed(list(enumerate(rows))):
        points = [f"{x:.1f} {at(axis(row.values[key])):.1f}" for x, axis, key in zip(places, axes, keys)]
        points.append(f"{places[-1]:.1f} {float(last(row.score)):.1f}")
        words = f"{row.name}: {number(row.score, 5)}"
        look = "line c1 near" if index < best else f"line {_faint(len(rows))}"
        svg.append(node("path", node("title", words), d="M" + "L".join(points), class_=look))
    for x, key, axis in zip(places, keys, axes):
        svg.extend(_upright(x, key.rpartition(".")[2], top, bottom, [(at(place), text) for place, text in axis.labels]))
    marks = [(float(last(tick)), tick_label(tick)) for tick in last.ticks]
    svg.extend(_upright(places[-1], results.metric, top, bottom, marks))
    legend = [("c1", f"the best {best:,}"), ("c7 faint", f"{len(rows) - best:,} others")]
    left_out = len(results.keys) - len(keys)
    note = f"{left_out} more keys have no room here." if left_out else ""
    return [figure("All keys", "a line is a run", svg, note, legend=legend)]


def _upright(x: float, title: str, top: int, bottom: int, marks: Sequence[tuple[float, str]]) -> Iterator[Element]:
    yield node("path", d=f"M{x:.1f} {top}V{bottom}", class_="upright")
    yield node(
        "text", node("title", title), _short(title), x=f"{x:.1f}", y=top - 14, text_anchor="middle", class_="inside"
    )
    for y, text in marks:
        words = _short(text)
        yield node("text", node("title", text), words, x=f"{x + 6:.1f}", y=f"{y:.1f}", dy=".35em", class_="tick halo")


def _rules(y: Scale, width: int) -> Iterator[Element]:
    for value, at in zip(y.ticks, y(y.ticks), strict=True):
        yield node("path", d=f"M{LEFT} {at:.1f}H{width - RIGHT}", class_="grid")
        yield node("text", tick_label(value), x=LEFT - 8, y=f"{at:.1f}", dy=".35em", class_="tick", text_anchor="end")
    yield node("path", d=f"M{LEFT} {LOW - BOTTOM}H{width - RIGHT}", class_="axis")


def _as_line(name: str, rows: Sequence[Row]) -> Line:
    return Line.of(name, "c0", range(len(rows)), [row.score for row in rows])


def _fitted(text: str, count: int) -> str:
    """As much of a label as fits beside its neighbours, at about 7 pixels a character."""
    room = max(4, int((NARROW - LEFT - RIGHT) / max(count, 1) / 7))
    return text if len(text) <= room else f"{text[: room - 1]}…"


def _short(text: str) -> str:
    return text if len(text) <= LABEL else f"{text[: LABEL - 1]}…"
