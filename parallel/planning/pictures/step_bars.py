"""A step's time by its parts, and what was measured beside it. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.planning.pictures.bars import Bar, bar_keys, bars_drawing, palette
from parallel.planning.pictures.shapes import PALETTE, Picture, number
from parallel.planning.timing.step_time import TimePrediction

MEASURED = "measured"
#: The last colour is that of what was measured.
COLOURS = PALETTE - 1
#: Parts below this share of the step have no colour of their own.
SMALL = 0.01


@dataclass(frozen=True)
class Measured:
    """Seconds of a run's steps: the median, and the range of four of five."""

    low_s: float
    median_s: float
    high_s: float
    steps: int


def step_picture(time: TimePrediction, measured: Measured | None = None) -> Picture:
    """The predicted step as a bar of its parts with the range that four of five runs should fall in, and the measured
    one below it, with the range of four of its five steps."""
    longest = max(time.high_s, measured.high_s if measured else 0.0)
    unit = name, scale = ("ms", 1e-3) if longest < 2 else ("s", 1.0)
    whole = sum(time.parts.values())
    parts = {part: took for part, took in time.parts.items() if took >= SMALL * whole}
    if (rest := whole - sum(parts.values())) > 0:
        parts["smaller parts"] = rest
    looks = palette(parts, COLOURS)
    bars = [Bar("predicted", "predicted", parts, time.low_s, time.high_s, f"{number(time.step_s / scale)} {name}")]
    legend = [*bar_keys(looks), ("ink", "four of five runs" if measured is None else "four of five runs, or steps")]
    notes = ["On the critical path: what is hidden under something else takes no room."]
    if measured is not None:
        looks |= {MEASURED: f"c{COLOURS}"}
        legend.insert(-1, (f"box c{COLOURS}", MEASURED))
        took = {MEASURED: measured.median_s}
        figures = f"{number(measured.median_s / scale)} {name}"
        bars.append(Bar(MEASURED, MEASURED, took, measured.low_s, measured.high_s, figures))
        notes.insert(0, _verdict(time, measured))
    told = sorted(((took, part) for part, took in time.parts.items() if took > 0), reverse=True)
    return Picture(
        "A step, by what it spends its time on" if measured is None else "A step, predicted and measured",
        f"{name}, on the pipeline rank that takes longest",
        bars_drawing(bars, looks, unit, "time of a step by part"),
        tuple(legend),
        tuple(notes),
        ("part", f"predicted, {name}", "share, %"),
        tuple((part, number(took / scale), f"{100 * took / whole:.1f}") for took, part in told),
    )


def _verdict(time: TimePrediction, measured: Measured) -> str:
    ratio = measured.median_s / time.step_s
    slower = f"{100 * abs(ratio - 1):.0f} % {'longer' if ratio >= 1 else 'shorter'} than predicted"
    within = "within" if time.low_s <= measured.median_s <= time.high_s else "outside"
    return f"The median of {measured.steps:,} measured steps is {slower}, {within} the predicted range."
