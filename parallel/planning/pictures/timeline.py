"""The pipeline over a step: which rank runs which micro-batch when, and when it waits. No torch.

A row for each pipeline rank, time from left to right, all to one scale. A step too long for its works to be seen is cut
in the middle, where it repeats itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from parallel.planning.pictures.shapes import MARGIN, WIDTH, Picture, across, cell, down, fits, number, svg, text, ticks
from parallel.planning.timing.simulator import Event, Timeline

#: Look and words of each kind of work, on a rank's even chunks and on its odd ones.
LOOKS = {"F": ("c0", "c5"), "B": ("c1", "c4"), "I": ("c1", "c4"), "W": ("c2", "c6")}
WORDS = {"F": "forward", "B": "backward", "I": "backward, gradient of the input", "W": "gradient of the weights"}
#: Pixels: a rank's row, the gap between rows, its waiting on the right, a cut in the middle; and a work of mean length,
#: from where it shows at all to where its number is read.
ROW, GAP, WAITS, CUT = 22, 4, 62, 34
LEAST, READABLE = 5.0, 14.0
#: Works of each row that a cut shows on either side, by stages of the pipeline: its filling and a little more.
FILLING = 1.6
#: Works that are drawn; of a longer step, its beginning and its end.
MAX_WORKS = 2400


def timeline_picture(timeline: Timeline, relative: bool = False) -> Picture:
    """A step of ``timeline.table`` as ``simulate`` timed it; ``relative``: in shares of the step, where nobody knows
    how long it takes."""
    table, step_s = timeline.table, timeline.makespan_s
    windows = _windows(timeline)
    unit, per_s = ("%", 100 / step_s) if relative else ("ms", 1e3) if step_s < 2 else ("s", 1.0)
    chunks = 1 + max(chunk for _, chunk in table.stages)
    kinds = [kind for kind in LOOKS if any(work.kind == kind for order in table.orders for work in order)]
    legend = [
        (f"box {LOOKS[kind][odd]}", WORDS[kind] + ("" if chunks == 1 else (", even chunks", ", odd chunks")[odd]))
        for kind in kinds
        for odd in range(min(chunks, 2))
    ]
    notes = [
        "A row is a pipeline rank: a micro-batch goes down the rows, and its gradient comes back up. "
        f"The ranks wait for {100 * timeline.bubble:.1f} % of the step, taken together.",
        "Not in it: what is left of the gradient reduction after the last backward, and the optimizer.",
    ]
    if relative:
        notes.append("Without a prediction: works are as long as their FLOPs, and messages take no time.")
    if any(work.joined for order in table.orders for work in order):
        notes.append("Halved: a forward and a backward that run together, each under the other's exchanges.")
    if len(windows) > 1:
        left_out = (windows[1][0] - windows[0][1]) * per_s
        notes.append(f"Cut out in the middle: {number(left_out)} {unit} in which the same pattern repeats.")
    took = "shares of the step" if relative else f"{number(step_s * per_s)} {unit}"
    rows = [
        (f"pp {rank}", number(busy * per_s), number(idle * per_s), f"{100 * idle / step_s:.1f}")
        for rank, (busy, idle) in enumerate(zip(timeline.busy_s, timeline.idle_s, strict=True))
    ]
    return Picture(
        "A step of the pipeline",
        f"{table.name}, {table.num_micro_batches} micro-batches (the numbers), {took}",
        _drawing(timeline, windows, per_s, unit),
        (*legend, ("box c7", "waiting")),
        tuple(notes),
        ("pipeline rank", f"works, {unit}", f"waits, {unit}", "waits, %"),
        tuple(rows),
    )


@dataclass(frozen=True)
class _Window:
    """Seconds [start, stop] of the step, drawn from pixel ``left`` on."""

    start: float
    stop: float
    left: float
    per_s: float

    def x(self, at_s: float) -> float:
        return self.left + (at_s - self.start) * self.per_s


def _windows(timeline: Timeline) -> list[tuple[float, float]]:
    """What is drawn of the step, in seconds: all of it, or its two ends."""
    works = sum(len(order) for order in timeline.table.orders)
    mean_s = sum(timeline.busy_s) / works
    row = WIDTH - MARGIN - WAITS
    pixels = min(max(row / 2 / (FILLING * timeline.table.num_stages), LEAST), READABLE)
    seen = min(row / pixels * mean_s, timeline.makespan_s * MAX_WORKS / works)
    if seen >= timeline.makespan_s:
        return [(0.0, timeline.makespan_s)]
    return [(0.0, seen / 2), (timeline.makespan_s - seen / 2, timeline.makespan_s)]


def _drawing(timeline: Timeline, spans: list[tuple[float, float]], per_s: float, unit: str) -> Element:
    ranks, top = timeline.table.num_ranks, 18
    height = top + ranks * (ROW + GAP)
    drawing = svg(WIDTH, height + 34, "pipeline timeline", "chart wide")
    pixels = (WIDTH - MARGIN - WAITS - CUT * (len(spans) - 1)) / sum(stop - start for start, stop in spans)
    windows, left = [], float(MARGIN)
    for start, stop in spans:
        windows.append(_Window(start, stop, left, pixels))
        left += (stop - start) * pixels + CUT
    text(drawing, WIDTH, top / 2 - 2, "waits", anchor="end")
    text(drawing, MARGIN - 10, height + 15, unit, anchor="end")
    for rank in range(ranks):
        y = top + rank * (ROW + GAP)
        text(drawing, 0, y + ROW / 2, f"pp {rank}")
        waits = f"{100 * timeline.idle_s[rank] / timeline.makespan_s:.1f} %"
        text(drawing, WIDTH, y + ROW / 2, waits, anchor="end")
    for window in windows:
        for start, stop, rank in _pauses(timeline, window):
            box = (window.x(start), top + rank * (ROW + GAP), (stop - start) * pixels, ROW)
            cell(drawing, box, "cell end", "", f"rank {rank} waits {number((stop - start) * per_s)} {unit}")
        _axis(drawing, window, height, per_s)
    if len(windows) > 1:
        middle = windows[1].left - CUT / 2
        for rank in range(ranks):
            text(drawing, middle, top + rank * (ROW + GAP) + ROW / 2, "…", anchor="middle")
    for event, part in _halves(timeline):
        for window in windows:
            _work(drawing, window, event, part, top, per_s, unit)
    return drawing


def _halves(timeline: Timeline) -> Iterator[tuple[Event, int | None]]:
    """Works with their place in the row: the upper half (0) and the lower (1) for two that run joined, else None."""
    joined = False
    for event in timeline.events:
        yield event, 0 if event.work.joined else 1 if joined else None
        joined = event.work.joined


def _pauses(timeline: Timeline, window: _Window) -> Iterator[tuple[float, float, int]]:
    """(start, stop, rank) of waiting within the window."""
    for rank, (starts, ends) in enumerate(zip(timeline.starts_s, timeline.ends_s, strict=True)):
        befores, afters = (0.0, *ends), (*starts, timeline.makespan_s)
        for before, after in zip(befores, afters, strict=True):
            start, stop = max(before, window.start), min(after, window.stop)
            if stop - start > 1e-6 * timeline.makespan_s:
                yield start, stop, rank


def _work(drawing: Element, window: _Window, event: Event, part: int | None, top: int, per_s: float, unit: str) -> None:
    start, stop = max(event.start_s, window.start), min(event.end_s, window.stop)
    width = (stop - start) * window.per_s
    if width < 0.05:
        return
    work, y = event.work, top + event.rank * (ROW + GAP) + (ROW / 2 if part == 1 else 0)
    box = (window.x(start), y, width, ROW if part is None else ROW / 2)
    inside = str(work.micro_batch)
    words = f"rank {event.rank}, {WORDS[work.kind]} of micro-batch {work.micro_batch}, chunk {work.chunk}: "
    words += f"{number(event.start_s * per_s)} to {number(event.end_s * per_s)} {unit}"
    look = LOOKS[work.kind][work.chunk % 2]
    cell(drawing, box, f"cell {look}", inside if fits(inside, width) else "", words)


def _axis(drawing: Element, window: _Window, y: float, per_s: float) -> None:
    left, right = window.x(window.start), window.x(window.stop)
    across(drawing, "axis", left, y, right)
    for value in ticks(window.start * per_s, window.stop * per_s, int((right - left) / 110) or 1):
        at = window.x(value / per_s)
        down(drawing, "axis", at, y, y + 5)
        text(drawing, min(max(at, left + 10), right - 10), y + 15, f"{value:,.6g}", anchor="middle")
