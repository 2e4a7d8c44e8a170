"""What a run's plan promised and what came: the step by part, its pipeline, memory, roofline. For ``report.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median, quantiles
from typing import TypeVar
from xml.etree.ElementTree import Element

from parallel.planning.execution import Execution
from parallel.planning.memory.prediction import predict_memory
from parallel.planning.pictures.memory_bars import memory_picture
from parallel.planning.pictures.plan import flops_timeline, plan_timeline
from parallel.planning.pictures.roofline import layer_points, roofline_picture
from parallel.planning.pictures.shapes import Picture
from parallel.planning.pictures.step_bars import Measured, step_picture
from parallel.planning.pictures.timeline import timeline_picture
from parallel.planning.plan import ParallelPlan
from parallel.planning.search.scored import remembering_time
from parallel.planning.timing.step_time import TimePrediction
from parallel.planning.workload import Workload
from pretrain.figures.markup import UNKNOWN, facts, node, number
from pretrain.figures.plan import picture_figure
from pretrain.figures.record import Record
from pretrain.forecast import execution_of, workload_at

T = TypeVar("T")

#: Predictions: name, unit and its size, keys of the value and of its bounds.
PREDICTED = (
    ("step time", "s", 1.0, ("step_time_s", "step_time_low_s", "step_time_high_s")),
    ("memory of a rank", "GB", 1e9, ("memory_bytes", "memory_upper_bytes")),
)
NAMES = {"basis": "Predictions stand on", "unknown": f"Predicted step time: {UNKNOWN}"}
#: What a record that this release does not understand can raise. Refusal is a ValueError.
CANNOT = (ArithmeticError, AttributeError, KeyError, TypeError, ValueError)
#: Share by which the step that this release predicts may differ from what plan.json has without a word.
SAME = 0.005


def expected(record: Record) -> list[Element]:
    """The section of the report: what can be drawn, and a sentence for each thing that cannot."""
    config, plan = record.config, record.plan
    told = predictions(record)
    if config is None or plan is None or len(config.model.layers) != plan.num_layers:
        return [told, node("p", "Without configuration and layout the step cannot be drawn.", class_="missing")]
    found = list(_pictures(record, workload_at(config), plan, execution_of(config)))
    shown = [picture_figure(picture) for picture in found if isinstance(picture, Picture)]
    sentences = dict.fromkeys(sentence for sentence in found if isinstance(sentence, str))
    return [told, *(node("p", sentence, class_="note") for sentence in sentences), *shown]


def _pictures(record: Record, workload: Workload, plan: ParallelPlan, execution: Execution) -> Iterator[Picture | str]:
    machine = record.machine
    time: TimePrediction | str | None = None
    if machine is None:
        yield "The run kept no record of its machine: its time by part, memory and roofline are not drawn."
    elif machine.calibration is None:
        yield "Its time by part and its roofline are not drawn: nothing predicts them."
    else:
        timed, topology = remembering_time(machine.calibration), machine.topology
        time = _tried(lambda: timed(workload, plan, execution, topology))
        yield time if isinstance(time, str) else _step(record, time)
    if plan.pp > 1 and isinstance(time, TimePrediction):
        yield timeline_picture(plan_timeline(workload, plan, execution, time))
    elif plan.pp > 1:
        yield timeline_picture(flops_timeline(workload, plan, execution), relative=True)
    if machine is not None:
        topology = machine.topology
        yield _tried(lambda: memory_picture(predict_memory(workload, plan, execution, topology), topology))
    if isinstance(time, TimePrediction):
        yield _tried(
            lambda: roofline_picture(layer_points(workload, plan, execution, topology, timed), topology, execution)
        )


def _tried(make: Callable[[], T]) -> T | str:
    """What it makes, or why it could not: an unknown number of the machine, or a record of another release."""
    try:
        return make()
    except CANNOT as error:
        return f"Not drawn: {error}."


def _step(record: Record, time: TimePrediction) -> Picture:
    picture = step_picture(time, measured(record))
    then = record.predictions.get("step_time_s")
    if isinstance(then, int | float) and abs(time.step_s - then) > SAME * then:
        drift = f"Drawn as this release predicts it, {number(time.step_s)} s; the run was told {number(then)} s."
        return replace(picture, notes=(*picture.notes, drift))
    return picture


def measured(record: Record) -> Measured | None:
    """Steps of the last attempt, whose layout ``plan.json`` holds; None where no clock was read."""
    times = _times(record)
    if not times:
        return None
    low, *_, high = quantiles(times, n=10, method="inclusive") if len(times) > 1 else (times[0], times[0])
    return Measured(low, median(times), high, len(times))


def _times(record: Record) -> list[float]:
    last = record.attempts[-1].number if record.attempts else None
    return [took for event in record.events if event.attempt == last and (took := event.timing.step_time_s) is not None]


def predictions(record: Record) -> Element:
    """What the plan predicted beside what was measured. What is not of the trainer's own making is shown as it is."""
    told = {name: value for name, value in record.predictions.items() if name != "machine"}
    rows = []
    for name, unit, scale, bounds in PREDICTED:
        values = [told[key] for key in bounds if isinstance(told.get(key), (int, float))]
        if len(values) == len(bounds):
            best, *rest = (number(told.pop(key) / scale) for key in bounds)
            words = f"{best} {unit} ({rest[0]} to {rest[1]})" if len(rest) == 2 else f"{best} {unit}, at most {rest[0]}"
            rows.append((f"Predicted {name}", words))
    rows += [(NAMES.get(name, f"Predicted, {name}"), str(value)) for name, value in told.items()]
    found = measured(record)
    took = UNKNOWN if found is None else f"{number(found.median_s)} s, median of {found.steps:,} steps"
    none = [("Predicted", f"{UNKNOWN}: the plan came without predictions")]
    return facts([*(rows or none), ("Measured step time", took)])
