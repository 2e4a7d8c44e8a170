"""The roofline of a plan: what each kind of layer reaches of what its device can do. No torch.

Across, FLOPs for each byte that a layer moves to and from memory; upwards, FLOP/s. A device can reach no more than its
memory's bandwidth times the former, and no more than its peak.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from xml.etree.ElementTree import Element, SubElement

from parallel.planning.execution import Execution
from parallel.planning.pictures.shapes import (
    CHARACTER,
    LINE,
    MARGIN,
    PALETTE,
    WIDTH,
    Picture,
    across,
    down,
    number,
    path,
    scale,
    sized,
    svg,
    text,
)
from parallel.planning.plan import ParallelPlan
from parallel.planning.timing.step_time import TimePrediction, predict_time
from parallel.planning.topology import HardwareTopology
from parallel.planning.workload import LayerWorkload, Operation, Workload

#: Left, top, right and bottom of what is drawn already.
Area = tuple[float, float, float, float]
Predict = Callable[[Workload, ParallelPlan, Execution, HardwareTopology], TimePrediction]

#: Pixels: the margin above, the chart with it, the margin below, a point.
TOP, HEIGHT, BOTTOM, POINT = 20, 320, 38, 5


@dataclass(frozen=True)
class Point:
    """One layer's micro-batch on one rank, forward and backward: its FLOPs, bytes to and from memory, and seconds."""

    name: str
    count: int
    flops: float
    bytes: float
    seconds: float

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes

    @property
    def achieved(self) -> float:
        return self.flops / self.seconds


def layer_points(
    workload: Workload,
    plan: ParallelPlan,
    execution: Execution,
    topology: HardwareTopology,
    predict: Predict = predict_time,
) -> list[Point]:
    """A point for each kind of layer. Its seconds are what one more such layer adds to a model, exchanges included."""
    points = []
    for kind, count in Counter(layer.kind for layer in workload.layers).items():
        layer = next(layer for layer in workload.layers if layer.kind == kind)
        once, twice = (
            sum(_seconds(predict, workload, plan, execution, topology, (layer,) * copies)) for copies in (1, 2)
        )
        flops, moved = (sum(part) for part in zip(*_costs(layer, workload.seq_len, plan, execution), strict=True))
        points.append(Point(kind, count, flops, moved, twice - once))
    return points


def _seconds(
    predict: Predict,
    workload: Workload,
    plan: ParallelPlan,
    execution: Execution,
    topology: HardwareTopology,
    layers: tuple[LayerWorkload, ...],
) -> tuple[float, float]:
    """Forward and backward of a micro-batch through these layers, on a pipeline of one rank."""
    alone = replace(plan, world_size=plan.world_size // plan.pp, num_layers=len(layers), pp=1, vpp=1, stages=())
    stage = predict(replace(workload, layers=layers), alone, execution, topology).stages[0]
    return stage.forward_s, stage.backward_s


def _costs(
    layer: LayerWorkload, seq_len: int, plan: ParallelPlan, execution: Execution
) -> Iterator[tuple[float, float]]:
    """(FLOPs, bytes) of each operation on one rank: activations, weights read twice, gradients added to."""
    tokens = plan.micro_batch * seq_len / plan.cp
    weight_bytes = 2 * execution.element_bytes + 2 * execution.gradient_bytes
    for op in layer.operations:
        share = tokens / _token_cut(op, plan)
        held = op.parameters / math.prod(plan.degree(axis) for axis in op.axes)
        flops = share * (op.forward_flops + op.backward_flops)
        yield flops, share * (op.forward_bytes + op.backward_bytes) + held * weight_bytes


def _token_cut(op: Operation, plan: ParallelPlan) -> int:
    """Over how many ranks the work of an operation is cut: experts take over tokens that tensor parallelism cut."""
    if op.gathered or not (op.axes or plan.sequence_parallel):
        return 1
    return plan.tp


def roofline_picture(points: Sequence[Point], topology: HardwareTopology, execution: Execution) -> Picture:
    """The points under the roof of each peak that the run's products have; a note names those that memory limits."""
    bandwidth = topology.known("device.memory_bandwidth")
    names = dict.fromkeys((execution.base_dtype, execution.precision))
    peaks = {name: topology.peak(name) for name in names}
    roof = max(peaks.values())
    unit, size = sized(roof, "FLOP/s")
    rows = []
    for point in points:
        attainable = min(roof, bandwidth * point.intensity)
        rows.append(
            (
                point.name,
                f"{point.count}",
                f"{point.intensity:,.0f}",
                number(point.achieved / size),
                number(attainable / size),
                f"{100 * point.achieved / attainable:.0f}",
            )
        )
    ridge = roof / bandwidth
    starved = [point.name for point in points if point.intensity < ridge]
    limited = ", ".join(starved) or "no layer lies there"
    return Picture(
        "Roofline by layer",
        f"{topology.device.name}; {unit} of one device against FLOPs a byte of memory, forward and backward",
        _drawing(points, bandwidth, peaks),
        tuple((f"box c{index % PALETTE}", f"{point.name} × {point.count}") for index, point in enumerate(points)),
        (
            f"Left of {ridge:,.0f} FLOPs a byte memory is the limit: {limited}.",
            "Seconds include what a layer sends and waits for: far below the roof it may lack bandwidth elsewhere.",
        ),
        ("layer", "number", "FLOPs a byte", unit, f"attainable {unit}", "% of it"),
        tuple(rows),
    )


def _drawing(points: Sequence[Point], bandwidth: float, peaks: dict[str, float]) -> Element:
    drawing = svg(WIDTH, HEIGHT + BOTTOM, "roofline by layer", "chart wide")
    roof, edge = max(peaks.values()), WIDTH - 12
    (unit, size), (rate, per_byte) = sized(roof, "FLOP/s"), sized(bandwidth, "B/s")
    ridge = roof / bandwidth
    left, right = _extent([*(point.intensity for point in points), ridge / 5, ridge * 5])
    low, high = _extent([*(point.achieved for point in points), roof / 30, roof])
    x, y = scale(left, right, MARGIN, edge), scale(low, high, HEIGHT, TOP)

    def at(intensity: float, rate: float) -> tuple[float, float]:
        return x(math.log10(intensity)), y(math.log10(rate))

    for value in _round(left, right):
        down(drawing, "grid", x(math.log10(value)), TOP, HEIGHT)
        text(drawing, x(math.log10(value)), HEIGHT + 12, f"{value:,g}", anchor="middle")
    for value in _round(low, high):
        across(drawing, "grid", MARGIN, y(math.log10(value)), edge)
        text(drawing, MARGIN - 8, y(math.log10(value)), f"{value / size:,g}", anchor="end")
    text(drawing, (MARGIN + WIDTH) / 2, HEIGHT + 29, "FLOPs a byte", anchor="middle")
    text(drawing, 0, LINE / 2, unit)
    across(drawing, "axis", MARGIN, HEIGHT, edge)

    taken = [_around(*at(point.intensity, point.achieved)) for point in points]
    bends = {name: at(peak / bandwidth, peak) for name, peak in peaks.items()}
    taken += [(a, b - 1, edge, b + 1) for a, b in bends.values()]
    start = max(10.0**left, 10.0**low / bandwidth)
    foot, bend = at(start, start * bandwidth), at(ridge, roof)
    path(drawing, "line c7", ("M", *foot), ("L", *bend))
    beneath = ((foot[0] + bend[0]) / 2 + LINE, (foot[1] + bend[1]) / 2 + LINE, "start")
    _place(drawing, taken, f"memory {number(bandwidth / per_byte)} {rate}", [beneath])
    for name, (a, b) in bends.items():
        across(drawing, "line c7", a, b, edge)
        words = f"{name} {number(peaks[name] / size)} {unit}"
        _place(drawing, taken, words, [(edge - 4, b + step * (LINE / 2 + 2), "end") for step in (-1, 1)])
    for index, point in enumerate(points):
        _point(drawing, taken, point, f"dot c{index % PALETTE}", at(point.intensity, point.achieved))
    return drawing


def _point(drawing: Element, taken: list[Area], point: Point, look: str, at: tuple[float, float]) -> None:
    x, y = at
    group = SubElement(drawing, "g")
    unit, size = sized(point.achieved, "FLOP/s")
    told = f"{number(point.achieved / size)} {unit} at {point.intensity:,.0f} FLOPs a byte"
    SubElement(group, "title").text = f"{point.name} ({point.count} layers): {told}"
    SubElement(group, "circle", {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": f"{POINT}", "class": look})
    beside = [(x + 2 * POINT, y, "start"), (x - 2 * POINT, y, "end")]
    further = [(x, y + step * (LINE - 1), "middle") for step in (1, -1, 2, -2, 3, -3)]
    _place(drawing, taken, point.name, [*beside, *further])


def _extent(values: Sequence[float]) -> tuple[float, float]:
    """Logarithms [low, high] around the values."""
    return math.log10(min(values)) - 0.15, math.log10(max(values)) + 0.15


def _round(low: float, high: float) -> list[float]:
    """Round numbers between two logarithms: powers of ten, and twice and five times them if there is room."""
    times = (1, 2, 5) if high - low < 4 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    return [value for power in powers for one in times if low <= math.log10(value := one * 10.0**power) <= high]


def _around(x: float, y: float) -> Area:
    return x - POINT, y - POINT, x + POINT, y + POINT


def _place(drawing: Element, taken: list[Area], words: str, places: Sequence[tuple[float, float, str]]) -> None:
    """Write ``words`` at the first of ``places`` (x, y, anchor) that is free, else at the last."""
    width = len(words) * CHARACTER
    for x, y, anchor in places:
        left = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
        box = (left, y - LINE / 2, left + width, y + LINE / 2)
        inside = left >= MARGIN and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT
        if inside and not any(_overlap(box, other) for other in taken):
            break
    taken.append(box)
    text(drawing, x, y, words, anchor=anchor)


def _overlap(a: Area, b: Area) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
