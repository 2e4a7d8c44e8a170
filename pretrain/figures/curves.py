"""The report's curves: training, data draws, held-out loss. Fragments for ``report.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.etree.ElementTree import Element

import numpy as np

from dataio.log import DataLog
from parallel.planning.drawings import PALETTE
from pretrain.events import StepEvent
from pretrain.figures.chart import Line, Marks, line_chart, line_table, not_drawn, smooth
from pretrain.figures.markup import UNKNOWN, figure, node, number, share, table
from pretrain.figures.record import Record

NO_STEPS = "No step has been trained."
#: A smoothed curve is the median over this share of the run, to either side.
REACH = 1 / 60

LOAD, HELDOUT = "load_max_over_mean", "heldout."
HELDOUT_UNITS = {".nats_per_token": "nats per token", ".bits_per_byte": "bits per byte of text"}


def marks(events: Sequence[StepEvent]) -> Marks:
    starts: dict[int, int] = {}
    for event in events:
        starts.setdefault(event.attempt, event.step)
    later = [(step, f"attempt {number}") for number, step in starts.items() if step != events[0].step]
    return Marks([event.step for event in events if not event.applied], later)


def curves(record: Record) -> list[Element]:
    """Loss, gradient norm, learning rate, speed, expert load, and whatever else the steps measured."""
    events = record.events
    if not events:
        return [node("p", NO_STEPS, class_="missing")]
    lr = Line.of("learning rate", "c0", [event.step for event in events], [event.lr for event in events])
    speed = [math.nan if event.timing.tokens_per_s is None else event.timing.tokens_per_s for event in events]
    return [
        _measured(record, "Loss", "nats per valid target of the global batch", [e.loss for e in events], wide=True),
        node(
            "div",
            _measured(record, "Gradient norm", "L2, before clipping", [e.grad_norm for e in events], log=True),
            _curve(record, "Learning rate", "of AdamW", [lr], floor=0.0),
            _measured(record, "Speed", "tokens per second, all ranks", speed, floor=0.0),
            *auxiliary(record),
            class_="pair",
        ),
    ]


def auxiliary(record: Record) -> list[Element]:
    """Expert load, and a chart for each auxiliary loss that was ever other than zero."""
    found = []
    for name in dict.fromkeys(name for event in record.events for name in event.aux):
        values = [event.aux.get(name, math.nan) for event in record.events]
        if name == LOAD:
            unit = "busiest expert over the mean, worst layer"
            found.append(_measured(record, "Expert load", unit, values, floor=1.0))
        elif not name.startswith(HELDOUT) and any(values):
            found.append(_measured(record, name, "reported apart from the loss", values))
    return found


def _measured(
    record: Record,
    title: str,
    unit: str,
    values: Sequence[float],
    wide: bool = False,
    log: bool = False,
    floor: float | None = None,
) -> Element:
    """A noisy curve: every step, and smoothed if there are enough of them."""
    reach = int(REACH * len(values))
    raw = Line.of("every step", "c0 thin" if reach else "c0", [event.step for event in record.events], values)
    lines = [raw, smooth(raw, f"median of {2 * reach + 1} steps", "c0", reach)] if reach else [raw]
    return _curve(record, title, unit, lines, _extremes(raw), wide=wide, log=log, floor=floor)


def _extremes(line: Line) -> str:
    known = np.flatnonzero(np.isfinite(line.values))
    if not known.size:
        return ""
    values = line.values[known]
    low, high = (
        f"{number(float(values[at]))} at step {line.steps[known[at]]:,.0f}" for at in (values.argmin(), values.argmax())
    )
    return f"Lowest {low}, highest {high}, median {number(float(np.median(values)))}."


def _curve(
    record: Record,
    title: str,
    unit: str,
    lines: Sequence[Line],
    note: str = "",
    wide: bool = False,
    log: bool = False,
    floor: float | None = None,
) -> Element:
    shown = marks(record.events)
    legend = [(line.look, line.name) for line in lines] if len(lines) > 1 else []
    if shown.skipped and wide:
        legend.append(("skipped", "skipped"))
    if shown.resumes and wide:
        legend.append(("resume", "a later attempt resumes"))
    picture = line_chart(lines, shown, wide=wide, log=log, floor=floor)
    return figure(title, unit, picture, note, not_drawn(lines, log), legend=legend, numbers=line_table(lines))


def draws(record: Record) -> list[Element]:
    """Share of each source in the windows drawn so far, against what the blend asked for."""
    names = list(dict.fromkeys(name for event in record.events for name in event.draws))
    if not names:
        return [node("p", NO_STEPS, class_="missing")]
    steps = [event.step for event in record.events]
    drawn = np.array([[event.draws.get(name, 0) for name in names] for event in record.events], np.float64)
    asked = _asked(record.data_log, steps, drawn.sum(1), names)
    windows = np.maximum(drawn.cumsum(0).sum(1, keepdims=True), 1)
    shares, wanted = drawn.cumsum(0) / windows, None if asked is None else asked.cumsum(0) / windows
    lines, rows = [], []
    for index, name in enumerate(names):
        look, share_drawn = f"c{index % PALETTE}", shares[:, index]
        lines.append(Line.of(name, look, steps, 100 * share_drawn))
        row = [name, f"{drawn[:, index].sum():,.0f}", share(share_drawn[-1])]
        if wanted is None:
            rows.append([*row, UNKNOWN, UNKNOWN])
        else:
            share_wanted = wanted[:, index]
            lines.append(Line.of(f"{name}, blend", f"{look} dashed", steps, 100 * share_wanted))
            rows.append([*row, share(share_wanted[-1]), f"{100 * (share_drawn - share_wanted)[-1]:+.2f}"])
    summary = table(["source", "windows", "share", "blend", "difference, points"], rows)
    note = "What the blend asked for is unknown." if wanted is None else ""
    legend = [(line.look, line.name) for line in lines]
    picture = line_chart(lines, marks(record.events), wide=True, floor=0.0)
    unit = "% of windows so far"
    return [figure("Draws by source", unit, picture, summary, note, legend=legend, numbers=line_table(lines))]


def _asked(log: DataLog | None, steps: list[int], windows: np.ndarray, names: list[str]) -> np.ndarray | None:
    """Windows [step, source] that the segment of each step would have drawn exactly; None without a log."""
    if log is None:
        return None
    blends = [segment.blend for segment in log.segments]
    shares = np.array([[blend.get(name, 0) / sum(blend.values()) for name in names] for blend in blends])
    return shares[[log.segment_at(step) for step in steps]] * windows[:, None]


def heldout(record: Record) -> list[Element]:
    """Held-out loss by domain, in both units."""
    charts = []
    for suffix, unit in HELDOUT_UNITS.items():
        names = dict.fromkeys(n for e in record.events for n in e.aux if n.startswith(HELDOUT) and n.endswith(suffix))
        lines = [_domain(record.events, name, suffix, f"c{i % PALETTE}") for i, name in enumerate(names)]
        if lines:
            rows = [
                [line.name, number(float(line.values[0])), number(_lowest(line)), number(float(line.values[-1]))]
                for line in lines
            ]
            picture = line_chart(lines, Marks(resumes=marks(record.events).resumes))
            legend = [(line.look, line.name) for line in lines]
            summary = table(["domain", "first", "lowest", "last"], rows)
            charts.append(figure("Held-out loss", unit, picture, summary, legend=legend, numbers=line_table(lines)))
    if not charts:
        return [node("p", "Held-out loss is unknown: no evaluation has been done.", class_="missing")]
    return [node("div", *charts, class_="pair")]


def _domain(events: Sequence[StepEvent], name: str, suffix: str, look: str) -> Line:
    found = [(event.step, event.aux[name]) for event in events if name in event.aux]
    return Line.of(name.removeprefix(HELDOUT).removesuffix(suffix), look, *zip(*found))


def _lowest(line: Line) -> float:
    finite = line.values[np.isfinite(line.values)]
    return float(finite.min()) if finite.size else math.nan
