"""Pictures of a plan on its machine: devices, works, bytes and layers are where their numbers say; nothing overlaps."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations, pairwise
from xml.etree.ElementTree import Element, tostring

import pytest

from parallel.planning.execution import Execution
from parallel.planning.memory.prediction import ALLOCATED, OUTSIDE, MemoryPrediction, StageMemory
from parallel.planning.pictures.memory_bars import memory_picture
from parallel.planning.pictures.plan import flops_timeline, plan_pictures, plan_timeline
from parallel.planning.pictures.rack import MAX_DEVICES, domains_shown, rack_picture
from parallel.planning.pictures.roofline import Point, layer_points, roofline_picture
from parallel.planning.pictures.shapes import CHARACTER, MARGIN, PALETTE, WIDTH, Picture
from parallel.planning.pictures.step_bars import Measured, step_picture
from parallel.planning.pictures.timeline import MAX_WORKS, WAITS, timeline_picture
from parallel.planning.placement import place
from parallel.planning.plan import ParallelPlan
from parallel.planning.schedule import Table, dual_pipe, interleaved, one_f_one_b, zb_h1
from parallel.planning.timing.simulator import Durations, Timeline, simulate
from parallel.planning.timing.step_time import PARTS, StageTime, TimePrediction
from parallel.planning.topology import HardwareTopology, load_hardware
from parallel.planning.workload import Workload
from pretrain.figures.plan import plan_page
from pretrain.spec import Attention, Dense, GatedDelta, LayerSpec, ModelSpec, MoE
from pretrain.workload import workload_of

H100, NVL72 = load_hardware("h100"), load_hardware("gb200-nvl72")
DELTA, ATTENTION = GatedDelta(4, 8, 64, 64), Attention(8, 2, 64)
SPEC = ModelSpec(
    512,
    257,
    (LayerSpec(DELTA, Dense(1024)), LayerSpec(DELTA, MoE(8, 2, 256)), LayerSpec(ATTENTION, MoE(8, 2, 256))) * 2,
)
WORK = workload_of(SPEC, 1024, 2)
PLAN = ParallelPlan(16, 64, 1, num_layers=6, tp=2, pp=2, ep=4)

Box = tuple[float, float, float, float]


def described(drawing: Element) -> list[tuple[str, Element]]:
    """The drawn boxes with their description."""
    groups = ((group.findtext("title") or "", group.find("rect")) for group in drawing.iter("g"))
    return [(words, cell) for words, cell in groups if cell is not None]


def cells(drawing: Element) -> dict[str, Element]:
    return dict(described(drawing))


def box(cell: Element) -> Box:
    x, y, width, height = (float(cell.get(name, "")) for name in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def text_box(text: Element) -> Box:
    width = len(text.text or "") * CHARACTER
    anchor = "middle" if text.get("class") == "inside" else text.get("text-anchor", "start")
    x, y = float(text.get("x", "")), float(text.get("y", ""))
    left = x - width * {"start": 0, "middle": 0.5, "end": 1}[anchor]
    return left, y - 5, left + width, y + 5


def overlap(a: Box, b: Box, by: float = 0.05) -> bool:
    return a[0] + by < b[2] and b[0] + by < a[2] and a[1] + by < b[3] and b[1] + by < a[3]


def assert_readable(picture: Picture) -> None:
    """Nothing lies outside the drawing; no label lies on another one; classes carry all the looks."""
    drawing = picture.drawing
    _, _, width, height = map(float, drawing.get("viewBox", "").split())
    for box_ in (*map(box, cells(drawing).values()), *map(text_box, drawing.iter("text"))):
        left, top, right, bottom = box_
        assert min(left, top) >= -1 and right <= width + 1 and bottom <= height + 1, (box_, width, height)
    texts = [(text_box(text), text.text) for text in drawing.iter("text")]
    assert not [(a[1], b[1]) for a, b in combinations(texts, 2) if overlap(a[0], b[0], 1)]
    assert not [element for element in drawing.iter() if "style" in element.attrib]
    assert picture.title and picture.unit and len(set(map(len, (picture.head, *picture.rows)))) == 1


RACKS = {
    "64 of 72": (ParallelPlan(256, 256, 1, num_layers=4, tp=2, pp=4, ep=32), NVL72),
    "one rack, not full": (ParallelPlan(24, 24, 1, num_layers=2, tp=3, pp=2, ep=4), NVL72),
    "hosts": (ParallelPlan(32, 32, 1, num_layers=2, tp=4, pp=2, ep=8), H100),
    "half a host": (ParallelPlan(4, 4, 1, num_layers=2, pp=2), H100),
    "one device": (ParallelPlan(1, 4, 1, num_layers=2), H100),
}


@pytest.mark.parametrize(("plan", "topology"), RACKS.values(), ids=RACKS)
@pytest.mark.parametrize("axis", ["tp", "dp", "pp", "ep", "edp"])
def test_every_device_is_drawn_once_in_the_colour_of_its_group(
    plan: ParallelPlan, topology: HardwareTopology, axis: str
) -> None:
    placement = place(plan, topology)
    picture = rack_picture(placement, axis)
    assert_readable(picture)
    found = cells(picture.drawing)
    ranks = {int(match[1]): cell for words, cell in found.items() if (match := re.match(r"rank (\d+), device", words))}
    assert sorted(ranks) == list(range(plan.world_size))
    groups = plan.group((axis,))
    for index, members in enumerate(groups):
        looks = {(ranks[rank].get("class"), ranks[rank].get("stroke-width")) for rank in members}
        assert looks == {(f"cell c{index % PALETTE}", "2.5" if index == 0 else None)}
    assert not any(overlap(box(a), box(b)) for a, b in combinations(ranks.values(), 2))
    assert len(found) - len(ranks) >= placement.domains * topology.domain.size - plan.world_size
    listed = [row[1] for row in picture.rows]
    assert listed[0].startswith(str(groups[0][0])) and len(listed) == min(len(groups), 25)


def test_devices_kept_aside_are_hatched_and_those_left_over_are_not() -> None:
    spare = cells(rack_picture(place(RACKS["64 of 72"][0], NVL72), "tp").drawing)
    hatched = [words for words, cell in spare.items() if cell.get("fill") == "url(#spare-tp)"]
    assert len([words for words in hatched if words.endswith("a spare")]) == 4 * 8
    assert {re.findall(r"tray (\d+)", words)[0] for words in hatched if "tray" in words} == {"16", "17"}
    partly = cells(rack_picture(place(RACKS["one rack, not full"][0], NVL72), "tp").drawing)
    assert len([words for words in partly if words.endswith(": not used")]) == 48
    assert not [cell for cell in partly.values() if cell.get("fill")]


def test_devices_of_a_tray_lie_in_a_row_and_racks_apart() -> None:
    placement = place(RACKS["64 of 72"][0], NVL72)
    rows: dict[tuple[int, int], set[float]] = defaultdict(set)
    columns: dict[int, list[float]] = defaultdict(list)
    for words, cell in cells(rack_picture(placement, "ep").drawing).items():
        if match := re.match(r"rank (\d+), device \d of tray (\d+) of rack (\d+)", words):
            rank, tray, rack = map(int, match.groups())
            assert (tray, rack) == (placement.host(rank), placement.domain(rank))
            rows[rack, tray].add(box(cell)[1])
            columns[rack].append(box(cell)[0])
    assert all(len(heights) == 1 for heights in rows.values()) and len(rows) == 4 * 16
    assert all(max(columns[rack]) < min(columns[rack + 1]) for rack in range(3))


def test_a_world_of_thousands_is_drawn_in_part_with_the_group_of_rank_0_and_says_so() -> None:
    plan = ParallelPlan(4096, 4096, 1, num_layers=96, tp=8, pp=8, ep=8)
    placement = place(plan, H100)
    for axis in ("tp", "dp", "pp"):
        picture = rack_picture(placement, axis)
        assert_readable(picture)
        drawn = {int(match[1]) for words in cells(picture.drawing) if (match := re.match(r"rank (\d+),", words))}
        assert len(drawn) <= MAX_DEVICES and len(tostring(picture.drawing)) < 120_000
        shown = domains_shown(placement, axis)
        assert shown == sorted(set(shown)) and {placement.domain(rank) for rank in drawn} == set(shown)
        assert f"{len(shown)} of 512 hosts" in picture.notes[0]
    assert set(plan.group(("pp",))[0]) <= drawn


def test_a_picture_says_whether_an_axis_leaves_the_domain() -> None:
    placement = place(RACKS["64 of 72"][0], NVL72)
    assert "stay inside a rack" in rack_picture(placement, "ep").notes[-1]
    assert "over the network" in rack_picture(placement, "pp").notes[-1]


def uneven(table: Table) -> Timeline:
    forward = [1.0 + 0.1 * stage for stage in range(table.num_stages)]
    durations = Durations(
        tuple(forward),
        tuple(2 * value for value in forward),
        tuple(forward),
        tuple(0.4 * value for value in forward),
        tuple(0.4 * value for value in forward),
    )
    return simulate(table, durations, 0.05)


TABLES = {
    "1f1b": one_f_one_b(3, 5),
    "one rank": one_f_one_b(1, 2),
    "interleaved": interleaved(2, 2, 4, 2),
    "halves": zb_h1(3, 6),
    "joined": dual_pipe(4, 8),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_work_is_drawn_when_it_runs_and_the_rest_of_a_row_waits(table: Table) -> None:
    timeline = uneven(table)
    picture = timeline_picture(timeline)
    assert_readable(picture)
    found = [(words, box(cell)) for words, cell in described(picture.drawing)]
    works = {words: at for words, at in found if "micro-batch" in words}
    assert len(works) == sum(map(len, table.orders))
    per_s = (WIDTH - MARGIN - WAITS) / timeline.makespan_s
    for event in timeline.events:
        work = event.work
        name = {"F": "forward", "B": "backward", "I": "gradient of the input", "W": "gradient of the weights"}[
            work.kind
        ]
        matches = [
            at
            for words, at in works.items()
            if re.match(rf"rank {event.rank}, .*{name} of micro-batch {work.micro_batch}, chunk {work.chunk}: ", words)
        ]
        assert len(matches) == 1
        assert matches[0][0] == pytest.approx(MARGIN + event.start_s * per_s, abs=0.6)
        assert matches[0][2] == pytest.approx(MARGIN + event.end_s * per_s, abs=0.6)
    rows: dict[str, list[Box]] = defaultdict(list)
    for words, at in found:
        rows[words.split()[1].strip(",")].append(at)
    for places in rows.values():
        assert not any(overlap(a, b, 0.11) for a, b in combinations(places, 2))
        height = max(bottom - top for _, top, _, bottom in places)
        area = sum(
            (right - left + 1) * (1.0 if bottom - top > 0.7 * height else 0.5) for left, top, right, bottom in places
        )
        assert area == pytest.approx(WIDTH - MARGIN - WAITS, rel=0.01)


def test_a_long_step_is_cut_in_the_middle_and_says_how_much_is_left_out() -> None:
    timeline = uneven(one_f_one_b(4, 400))
    picture = timeline_picture(timeline)
    assert_readable(picture)
    found = cells(picture.drawing)
    assert len([words for words in found if "micro-batch" in words]) < MAX_WORKS
    batches = Counter(int(match[1]) for words in found if (match := re.search(r"micro-batch (\d+)", words)))
    assert {0, 1, 398, 399} <= set(batches) and 200 not in batches
    left_out = float(re.findall(r"middle: ([\d.,]+) s", " ".join(picture.notes))[0].replace(",", ""))
    assert 0.5 * timeline.makespan_s < left_out < timeline.makespan_s


def stage(pp: int, size: float, upper: float) -> StageMemory:
    components = dict.fromkeys((*ALLOCATED, *OUTSIDE), 0.0) | {"weights": 0.3 * size, "activations": 0.5 * size}
    components |= {"context": 0.15 * size, "fragmentation": 0.05 * size}
    return StageMemory(pp, components, 0.3 * size, upper, upper)


@pytest.mark.parametrize("names", [4, 8, 9, 12])
def test_bars_are_as_long_as_their_bytes_whatever_the_number_of_components(names: int) -> None:
    components = dict.fromkeys((*ALLOCATED, *OUTSIDE), 0.0)
    components |= {name: (index + 1) * 1e9 for index, name in enumerate(list(components)[:names])}
    other = dict.fromkeys(components, 0.0) | {"weights": 30e9, "gradients": 10e9}
    prediction = MemoryPrediction((StageMemory(0, components, 0.0, 90e9, 90e9), StageMemory(1, other, 0.0, 44e9, 44e9)))
    picture = memory_picture(prediction, H100)
    assert_readable(picture)
    lengths = defaultdict(float)
    for words, cell in cells(picture.drawing).items():
        rank, held = re.findall(r"pipeline rank (\d), .*: ([\d.]+) GB", words)[0]
        left, _, right, _ = box(cell)
        lengths[rank] += right - left + 1
        assert (right - left + 1) / float(held) == pytest.approx(bytes_pixels(prediction, H100) * 1e9, rel=0.03)
    assert lengths["0"] / lengths["1"] == pytest.approx(sum(components.values()) / 40e9, rel=0.02)
    first = [box(cell) for words, cell in described(picture.drawing) if "rank 0" in words]
    assert all(after[0] - before[2] == pytest.approx(1, abs=0.11) for before, after in pairwise(first))
    looks = Counter(cell.get("class") for words, cell in cells(picture.drawing).items() if "rank 0" in words)
    assert max(looks.values()) == 1 and len(looks) == min(names, PALETTE)
    assert picture.rows[0][-2:] == (f"{sum(components.values()) / 1e9:.2f}", "90.00")


def bytes_pixels(prediction: MemoryPrediction, topology: HardwareTopology) -> float:
    size = topology.known("device.memory_bytes")
    line = memory_line(memory_picture(prediction, topology).drawing)
    assert line > MARGIN
    return (line - MARGIN) / size


def memory_line(drawing: Element) -> float:
    """Where the line of the device's memory stands."""
    path = next(path for path in drawing.iter("path") if "dashed" in path.get("class", ""))
    return float(re.findall(r"M([\d.]+) ", path.get("d", ""))[0])


@pytest.mark.parametrize(
    ("size", "upper", "said"),
    [
        (60e9, 70e9, "it fits."),
        (80e9, 90e9, "it fits, but for the upper bound"),
        (95.5e9, 99e9, "10.0 GB more than there is"),
    ],
)
def test_memory_says_whether_it_fits(size: float, upper: float, said: str) -> None:
    picture = memory_picture(MemoryPrediction((stage(0, size, upper), stage(1, 1e9, 2e9))), H100)
    assert said in picture.notes[0] and "Pipeline rank 0" in picture.notes[0]
    whisker = max(text_box_x(path) for path in picture.drawing.iter("path") if path.get("class") == "line ink")
    assert (whisker > memory_line(picture.drawing)) == (upper > H100.known("device.memory_bytes"))


def text_box_x(path: Element) -> float:
    return max(float(x) for x in re.findall(r"[ML]([\d.]+) ", path.get("d", "")))


def test_memory_of_a_device_of_unknown_size_is_drawn_without_its_end() -> None:
    unknown = replace(H100, device=replace(H100.device, memory_bytes=None))
    picture = memory_picture(MemoryPrediction((stage(0, 60e9, 70e9),)), unknown)
    assert "unknown" in picture.notes[0]
    assert not [path for path in picture.drawing.iter("path") if "dashed" in path.get("class", "")]


def predicted(parts: dict[str, float], low: float, high: float) -> TimePrediction:
    return TimePrediction(sum(parts.values()), low, high, dict.fromkeys(PARTS, 0.0) | parts, (), 0.0)


MANY = {part: 0.1 * (index + 1) for index, part in enumerate(PARTS[:12])}
STEPS = {
    "one part": ({"products": 0.3}, Measured(0.2, 0.25, 0.3, 7)),
    "tiny parts": ({"products": 3.0, "experts": 1.0, "host": 0.001, "optimizer": 0.002}, Measured(3.0, 5.0, 9.0, 1)),
    "more parts than colours": (MANY, Measured(7.0, 7.8, 8.0, 40)),
    "not measured": (MANY, None),
}


@pytest.mark.parametrize(("parts", "measured"), STEPS.values(), ids=STEPS)
def test_a_step_is_as_long_as_its_parts_and_as_what_was_measured(
    parts: dict[str, float], measured: Measured | None
) -> None:
    time = predicted(parts, 0.8 * sum(parts.values()), 1.4 * sum(parts.values()))
    picture = step_picture(time, measured)
    assert_readable(picture)
    found = described(picture.drawing)
    told = [(words, box(cell)) for words, cell in found if words.startswith("predicted, ")]
    assert all(after[1][0] - before[1][2] == pytest.approx(1, abs=0.11) for before, after in pairwise(told))
    per_s = (told[-1][1][2] - told[0][1][0] + 1) / time.step_s
    edges = sorted(text_box_x(path) for path in picture.drawing.iter("path") if path.get("class") == "line ink")
    left = told[0][1][0] - 0.5
    assert edges[-1] == pytest.approx(left + max(time.high_s, measured.high_s if measured else 0.0) * per_s, abs=2)
    assert edges[0] == pytest.approx(left + min(time.low_s, measured.low_s if measured else 99.0) * per_s, abs=2)
    bars = [box(cell) for words, cell in found if words.startswith("measured, ")]
    assert len(bars) == (measured is not None)
    if measured is not None:
        assert bars[0][2] - bars[0][0] + 1 == pytest.approx(measured.median_s * per_s, abs=2)
    looks = Counter(cell.get("class") for _, cell in found)
    assert max(looks.values()) == 1 and len(looks) <= PALETTE
    named = [name for _, name in picture.legend]
    assert all(any(part in name for name in named) for part, took in parts.items() if took > 0.01 * time.step_s)
    assert sorted(row[0] for row in picture.rows) == sorted(parts)


@pytest.mark.parametrize(
    ("median_s", "said"),
    [(1.1, "10 % longer than predicted, within"), (0.5, "50 % shorter than predicted, outside"), (1.0, "0 % longer")],
)
def test_a_step_says_how_far_off_its_prediction_was(median_s: float, said: str) -> None:
    picture = step_picture(predicted({"products": 1.0}, 0.8, 1.3), Measured(0.4, median_s, 1.2, 9))
    assert said in picture.notes[0] and "9 measured steps" in picture.notes[0]


def test_a_small_run_is_told_in_units_that_it_fills_and_without_the_end_of_memory_far_away() -> None:
    prediction = MemoryPrediction((stage(0, 40e6, 50e6), stage(1, 20e6, 30e6)))
    picture = memory_picture(prediction, H100)
    assert_readable(picture)
    assert "MB" in picture.unit and picture.rows[0][-2:] == ("40.00", "50.00")
    assert "many times" in picture.notes[0] and not any("dashed" in look for look, _ in picture.legend)
    widths = {words: box(cell)[2] - box(cell)[0] for words, cell in cells(picture.drawing).items()}
    assert widths["pipeline rank 0, weights: 12.00 MB"] > 100
    point = Point("attention/dense", 1, 2e9, 1e8, 0.5)
    slow = replace(H100, device=replace(H100.device, peak_flops={"float32": 5e10}, memory_bandwidth=2e10))
    words = [text.text for text in roofline_picture([point], slow, Execution("float32")).drawing.iter("text")]
    assert {"GFLOP/s", "float32 50 GFLOP/s", "memory 20 GB/s"} <= set(words)


def test_without_a_prediction_the_timeline_is_that_of_flops_and_says_so() -> None:
    plan = ParallelPlan(8, 32, 1, num_layers=6, pp=2, vpp=2, stages=((0,), (1, 2), (3, 4), (5,)))
    timeline = flops_timeline(WORK, plan, Execution())
    flops = [sum(layer.forward_flops + layer.backward_flops for layer in WORK.layers[at:to]) for at, to in FLOPS_OF]
    flops[-1] += WORK.head.forward_flops + WORK.head.backward_flops
    expected = [plan.num_micro_batches * (flops[pp] + flops[pp + 2]) for pp in range(2)]
    assert timeline.busy_s == pytest.approx(expected, rel=1e-12)
    again = flops_timeline(WORK, replace(plan, recompute="full"), Execution())
    more = sum(layer.forward_flops for layer in WORK.layers) * plan.num_micro_batches
    assert sum(again.busy_s) == pytest.approx(sum(expected) + more, rel=1e-12)
    picture = timeline_picture(timeline, relative=True)
    assert_readable(picture)
    assert picture.unit.endswith("shares of the step") and "FLOPs" in " ".join(picture.notes)
    assert all(float(works) + float(waits) == pytest.approx(100, abs=0.2) for _, works, waits, _ in picture.rows)
    assert not re.search(r"\d (ms|s)\b", "".join(picture.drawing.itertext()))


FLOPS_OF = ((0, 1), (1, 3), (3, 5), (5, 6))


@pytest.mark.parametrize(("ranks", "pp"), [(1, 1), (2, 2), (6, 2)])
def test_ranks_of_a_cpu_are_processes_of_a_small_drawing(ranks: int, pp: int) -> None:
    base = load_hardware("cpu")
    host = replace(base, domain=replace(base.domain, size=ranks, per_host=ranks, practice=(ranks,)))
    picture = rack_picture(place(ParallelPlan(ranks, 12, 1, num_layers=2, pp=pp), host), "pp")
    assert_readable(picture)
    found = cells(picture.drawing)
    assert len([words for words in found if words.startswith("rank ")]) == ranks
    assert not any("device" in words or "not used" in words for words in found)
    assert float(picture.drawing.get("width", "")) < 470 and "device" not in picture.unit


def test_points_of_a_roofline_lie_at_their_intensity_and_rate_under_the_roof() -> None:
    points = [
        Point("attention/dense", 3, 6e12, 2e10, 0.02),
        Point("gated_delta/moe", 9, 4e12, 8e10, 0.04),
        Point("x", 1, 4.1e12, 8e10, 0.04),
    ]
    picture = roofline_picture(points, H100, Execution("fp8"))
    assert_readable(picture)
    dots = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in picture.drawing.iter("circle")]
    grid = {text.text: text for text in picture.drawing.iter("text") if text.get("text-anchor") != "end"}
    words = [text.text for text in picture.drawing.iter("text")]
    x, y = (float(grid["100"].get("x", "")), float(grid["1,000"].get("x", ""))), ruled(picture.drawing)
    for point, (across, up) in zip(points, dots, strict=True):
        assert across == pytest.approx(x[0] + (x[1] - x[0]) * math.log10(point.intensity / 100), abs=0.2)
        assert up == pytest.approx(y[100] + (y[1000] - y[100]) * math.log10(point.achieved / 100e12), abs=0.2)
    assert {"fp8 1,979 TFLOP/s", "bfloat16 989 TFLOP/s", "memory 3.35 TB/s"} <= set(words)
    assert [row[-1] for row in picture.rows] == ["30", "60", "60"]  # of what memory allows, for the last two
    assert "gated_delta/moe, x" in picture.notes[0] and "591 FLOPs a byte" in picture.notes[0]


def ruled(drawing: Element) -> dict[int, float]:
    """TFLOP/s -> height of the ruled line that carries the label."""
    labels = [text for text in drawing.iter("text") if text.get("text-anchor") == "end"]
    return {
        int(label.text.replace(",", "")): float(label.get("y", ""))
        for label in labels
        if (label.text or "").replace(",", "").isdigit()
    }


def told(workload: Workload, plan: ParallelPlan, execution: Execution, topology: HardwareTopology) -> TimePrediction:
    """A predictor that takes 1 ms a layer forward, 2 ms backward, and 5 ms for what is no layer."""
    stages = []
    for pp in range(plan.pp):
        layers = sum(map(len, plan.chunks(pp)))
        stages.append(StageTime(1e-3 * layers + 5e-3 * (pp == 0), 2e-3 * layers))
    return TimePrediction(1.0, 0.9, 1.1, dict.fromkeys(PARTS, 0.0), tuple(stages), 1e-5)


def test_a_layer_takes_what_one_more_of_its_kind_adds() -> None:
    points = layer_points(WORK, PLAN, Execution(), H100, told)
    assert [(point.name, point.count) for point in points] == list(Counter(layer.kind for layer in WORK.layers).items())
    for point in points:
        layer = next(layer for layer in WORK.layers if layer.kind == point.name)
        assert point.seconds == pytest.approx(3e-3, rel=1e-9)
        gathered = sum(op.forward_flops + op.backward_flops for op in layer.operations if not op.axes)
        cut = sum(op.forward_flops + op.backward_flops for op in layer.operations if op.axes)
        assert point.flops == pytest.approx(1024 * (gathered + cut / 2), rel=1e-12)
    sequence = layer_points(WORK, replace(PLAN, sequence_parallel=True), Execution(), H100, told)
    assert all(now.bytes < before.bytes for now, before in zip(sequence, points, strict=True))


def test_the_timeline_spends_what_was_predicted_for_each_rank() -> None:
    plan = ParallelPlan(8, 32, 1, num_layers=6, pp=2, vpp=2, stages=((0,), (1, 2), (3, 4), (5,)))
    time = told(WORK, plan, Execution(), H100)
    for execution in (Execution(), Execution(expert_overlap=True)):
        timeline = plan_timeline(WORK, plan, execution, time)
        spent = [sum(event.end_s - event.start_s for event in timeline.events if event.rank == pp) for pp in range(2)]
        predicted = [plan.num_micro_batches * (rank.forward_s + rank.backward_s) for rank in time.stages]
        assert timeline.busy_s == pytest.approx(predicted, rel=1e-9)
        assert execution.expert_overlap or spent == pytest.approx(predicted, rel=1e-9)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.open += [tag] * (tag not in ("meta", "br"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_of_a_plan_has_every_picture_and_loads_nothing() -> None:
    memory = MemoryPrediction((stage(0, 60e9, 70e9), stage(1, 50e9, 60e9)))
    pictures = plan_pictures(WORK, PLAN, Execution(), H100, told(WORK, PLAN, Execution(), H100), memory, told)
    titles = [picture.title.split()[0] for picture in pictures]
    assert titles == ["A", "A", "Memory", "Roofline", "Layers", "tp", "dp", "pp", "ep", "edp"]
    for picture in pictures:
        assert_readable(picture)
    page = plan_page("<demo>", "on 2 hosts", [("step", "1 s")], pictures, ["a & b"]).decode()
    parsed = Page()
    parsed.feed(page)
    assert not parsed.open and parsed.tags["svg"] == parsed.tags["figure"] == len(pictures)
    assert not parsed.tags["script"] and not parsed.addresses and "<demo>" not in page
    assert not re.findall(r"url\((?!#)", page)
    assert [title for title in re.findall(r"<b>(.*?)</b>", page)] == [picture.title for picture in pictures]


def test_a_plan_without_a_pipeline_has_no_timeline() -> None:
    plan = ParallelPlan(1, 4, 1, num_layers=6)
    memory = MemoryPrediction((stage(0, 60e9, 70e9),))
    pictures = plan_pictures(WORK, plan, Execution(), H100, told(WORK, plan, Execution(), H100), memory, told)
    assert [picture.title for picture in pictures] == [
        "A step, by what it spends its time on",
        "Memory by pipeline stage",
        "Roofline by layer",
        "Layers on pipeline ranks",
    ]
