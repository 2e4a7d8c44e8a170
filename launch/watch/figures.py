"""Curves of a run of any length, in the style of its report: a line is drawn from two thousand points at most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from dataio.log import DataLog
from launch.watch.columns import AUX, DRAWS, Array
from launch.watch.drawn import Drawn
from launch.watch.record import AttemptStatus
from launch.watch.series import Series
from parallel.planning.drawings import AXIS_MEANING, PALETTE, axes, layers_drawing, ranks_drawing
from parallel.planning.plan import ParallelPlan
from pretrain.data import DATA_LOG
from pretrain.figures.chart import Line, Marks, line_chart, not_drawn, smooth
from pretrain.figures.markup import UNKNOWN, figure, node, number, share, table
from stoker.errors import Refusal

#: Points of a line; steps of which the smoothed curve is the median, to either side, as a share of the run.
POINTS, REACH = 2000, 1 / 60
#: Points that the smoothed curve is made from, at most.
SMOOTHED = 4000
#: Later attempts, and skipped steps, that are marked: the newest.
MARKED = 50
#: Charts of measurements by name, at most.
MEASURED = 24
HELDOUT, LOAD = "heldout.", "load_max_over_mean"


def downsample(steps: Array, values: Array, points: int = POINTS) -> tuple[Array, Array]:
    """At most ``points`` of a curve: of each of as many ranges as that allows the lowest and the highest finite value,
    so that no spike is lost; and one value that is not finite of a range that has no other."""
    count = len(values)
    if count <= points:
        return steps, values
    ranges = points // 2
    width = -(-count // ranges)
    padded = np.full(ranges * width, np.nan)
    padded[:count] = np.where(np.isfinite(values), values, np.nan)
    by_range = padded.reshape(ranges, width)
    first = np.arange(ranges) * width
    lowest = first + np.where(np.isnan(by_range), np.inf, by_range).argmin(1)
    highest = first + np.where(np.isnan(by_range), -np.inf, by_range).argmax(1)
    kept = np.unique([lowest, highest])
    kept = kept[kept < count]
    return steps[kept], values[kept]


def marks(series: Series, attempts: Sequence[AttemptStatus]) -> Marks:
    """Skipped steps, and where later attempts begin."""
    first = int(series["step"][0]) if len(series) else 0
    begun = [(a.first_step, f"attempt {a.number}") for a in attempts if a.first_step not in (None, first)]
    skipped = sorted(step for step, verdict in series.verdicts.items() if verdict != "apply")
    return Marks(skipped[-MARKED:], [(step, words) for step, words in begun[-MARKED:] if step is not None])


def curves(series: Series, attempts: Sequence[AttemptStatus], drawn: Drawn) -> list[Element]:
    """Loss, gradient norm, speed, step time, learning rate, and whatever else the steps measured."""
    if not len(series):
        return [node("p", "No step has been trained.", class_="missing")]
    state = (len(series), series.redone_steps, len(attempts))
    shown = marks(series, attempts)
    loss = "nats per valid target of the global batch"

    def curve(title: str, unit: str, name: str, **how: Any) -> Element:
        return drawn(f"{name} {how}", state, lambda: _curve(series, shown, title, unit, name, **how))

    charts = [
        curve("Gradient norm", "L2, before clipping", "grad_norm", log=True),
        curve("Speed", "tokens per second, all ranks", "tokens_per_s", floor=0.0),
        curve("Step time", "seconds", "step_time_s", floor=0.0),
        curve("Learning rate", "of the step", "lr", floor=0.0, smoothed=False),
        curve("Expert load", "busiest expert over the mean, worst layer", AUX + LOAD, floor=1.0),
    ]
    for name in [name for name in series.names(AUX) if name != LOAD][:MEASURED]:
        if name.startswith(HELDOUT):
            domain, _, unit = name.removeprefix(HELDOUT).rpartition(".")
            charts.append(curve(f"Held out: {domain}", unit.replace("_", " "), AUX + name, sparse=True))
        else:
            charts.append(curve(name, "as the steps report it", AUX + name))
    return [
        curve("Loss", loss, "loss", wide=True, look="wide"),
        curve("Loss", loss, "loss", look="narrow"),
        node("div", *(chart for chart in charts if len(chart)), class_="pair"),
    ]


def _curve(
    series: Series,
    shown: Marks,
    title: str,
    unit: str,
    name: str,
    wide: bool = False,
    log: bool = False,
    floor: float | None = None,
    smoothed: bool = True,
    sparse: bool = False,
    look: str | None = None,
) -> Element:
    """A figure, empty where nothing but zero was measured. ``sparse``: only the steps that have a value; ``look``: its
    class."""
    if name.startswith(AUX) and name.removeprefix(AUX) not in series.names(AUX):
        return node("figure")
    steps, values = series["step"], series[name]
    if sparse:
        known = np.isfinite(values)
        steps, values = steps[known], values[known]
    if name.startswith(AUX) and not np.nan_to_num(values).any():
        return node("figure")
    reach = int(REACH * len(values)) if smoothed and not sparse else 0
    lines = [Line.of("every step", "c0 thin" if reach else "c0", *downsample(steps, values))]
    if reach:
        stride = -(-len(values) // SMOOTHED)
        sample = Line.of(title, "c0", steps[::stride], values[::stride])
        lines.append(smooth(sample, f"median of {2 * reach + 1:,} steps", "c0", max(1, reach // stride)))
    picture = line_chart(lines, shown, wide=wide, log=log, floor=floor)
    legend = [(line.look, line.name) for line in lines] if len(lines) > 1 else []
    if look:
        legend += [("skipped", "skipped")] if shown.skipped else []
        legend += [("resume", "a later attempt resumes")] if shown.resumes else []
    drawn = figure(title, unit, picture, _extremes(steps, values), not_drawn(lines, log), legend=legend)
    if look:
        drawn.set("class", look)
    return drawn


def _extremes(steps: Array, values: Array) -> str:
    known = np.flatnonzero(np.isfinite(values))
    if not known.size:
        return ""
    finite = values[known]
    low, high = (
        f"{number(float(finite[at]))} at step {steps[known[at]]:,.0f}" for at in (finite.argmin(), finite.argmax())
    )
    return f"Lowest {low}, highest {high}; newest {number(float(finite[-1]))}."


def draws(series: Series, run_dir: Path, drawn: Drawn) -> list[Element]:
    """Share of each source in the windows drawn so far, against what the blend asked for."""
    state = (len(series), series.redone_steps)
    return [drawn("draws", state, lambda: node("div", *_draws(series, run_dir)))]


def _draws(series: Series, run_dir: Path) -> list[Element]:
    names = series.names(DRAWS)
    if not names or not len(series):
        return [node("p", "Nothing has been drawn.", class_="missing")]
    at = np.unique(np.linspace(0, len(series) - 1, min(len(series), 500)).round().astype(int))
    steps = series["step"][at]
    drawn = np.stack([series[DRAWS + name].cumsum()[at] for name in names], 1).astype(np.float64)
    windows = np.maximum(drawn.sum(1, keepdims=True), 1)
    asked, why = _asked(run_dir, series, names)
    lines, rows = [], []
    for index, name in enumerate(names):
        look, part = f"c{index % PALETTE}", drawn[:, index] / windows[:, 0]
        lines.append(Line.of(name, look, steps, 100 * part))
        row = [name, f"{drawn[-1, index]:,.0f}", share(part[-1])]
        if asked is None:
            rows.append([*row, UNKNOWN, UNKNOWN])
            continue
        wanted = asked[at, index] / windows[:, 0]
        lines.append(Line.of(f"{name}, blend", f"{look} dashed", steps, 100 * wanted))
        rows.append([*row, share(wanted[-1]), f"{100 * (part - wanted)[-1]:+.2f}"])
    summary = table(["source", "windows", "share", "blend", "difference, points"], rows)
    legend = [(line.look, line.name) for line in lines]
    wide = figure(
        "Draws by source", "% of windows so far", line_chart(lines, wide=True, floor=0.0), summary, why, legend=legend
    )
    wide.set("class", "wide")
    narrow = figure("Draws by source", "% of windows so far", line_chart(lines, floor=0.0), summary, why, legend=legend)
    narrow.set("class", "narrow")
    return [wide, narrow]


def _asked(run_dir: Path, series: Series, names: Sequence[str]) -> tuple[Array | None, str]:
    """Windows so far [step, source] that the blend in force at each step would have drawn exactly; None and why."""
    try:
        log = DataLog.open(run_dir / DATA_LOG)
    except (Refusal, OSError, ValueError, KeyError, TypeError) as error:
        return None, f"What the blend asked for is unknown: {error}"
    blends = [segment.blend for segment in log.segments]
    shares = np.array([[blend.get(name, 0) / sum(blend.values()) for name in names] for blend in blends])
    segment = np.searchsorted([s.from_step for s in log.segments], series["step"], side="right") - 1
    windows = np.stack([series[DRAWS + name] for name in names]).sum(0, dtype=np.float64)
    return (shares[np.maximum(segment, 0)] * windows[:, None]).cumsum(0), ""


def plan_figures(plan: ParallelPlan | None, layers: Sequence[str]) -> list[Element]:
    """The layout in words, its layers and its ranks as pictures."""
    if plan is None:
        return [node("p", "The layout is unknown.", class_="missing")]
    kinds = list(layers) if len(layers) == plan.num_layers else ["layer"] * plan.num_layers
    legend = [(f"box c{index % PALETTE}", kind) for index, kind in enumerate(dict.fromkeys(kinds))]
    where = "left to right is the way of a token"
    drawn = axes(plan, any(kind.endswith(("/moe", "layer")) for kind in kinds))
    pictures = [
        figure(axis, f"groups of {plan.degree(axis)}; {AXIS_MEANING[axis]}", ranks_drawing(plan, axis))
        for axis in drawn
    ]
    return [
        node("pre", plan.explain()),
        figure("Layers on pipeline ranks", where, layers_drawing(plan, kinds), legend=legend),
        node("div", *pictures, class_="pair") if pictures else node("p", "One rank: nothing is split.", class_="note"),
    ]


def curve_data(series: Series) -> dict[str, dict[str, list[float | str]]]:
    """The curves as numbers, for programs: steps and values by name; what is not finite is a text."""
    names = [
        "loss",
        "grad_norm",
        "lr",
        "tokens_per_s",
        "step_time_s",
        "mfu",
        *(AUX + name for name in series.names(AUX)),
    ]
    found = {}
    for name in names:
        steps, values = downsample(series["step"], series[name])
        said = [value if math.isfinite(value) else str(value) for value in values.tolist()]
        found[name] = {"step": steps.tolist(), "value": said}
    return found
