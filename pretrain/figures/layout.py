"""The report's pictures of experts and ranks: the load heat map, and the plan. Fragments for ``report.py``."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree.ElementTree import Element

import numpy as np

from parallel.planning.drawings import AXIS_MEANING, PALETTE, axes, ranks_drawing, ranks_shown, ranks_text
from parallel.planning.pictures.plan import layers_picture
from parallel.planning.pictures.rack import UNNAMED, rack_picture
from parallel.planning.placement import Placement, place
from parallel.planning.plan import ParallelPlan
from parallel.planning.topology import HardwareTopology, load_hardware
from pretrain.figures.markup import figure, node, table
from pretrain.figures.plan import picture_figure
from pretrain.figures.record import Loads, Record
from stoker.errors import Refusal

#: Shades of the heat map to either side of even; layers that have tall rows; experts that have numbers in their cells.
LEVELS, FEW_LAYERS, READABLE = 5, 24, 24
#: Groups of an axis that are listed.
GROUPS = 32
#: Pixels; of a drawing that leaves room for another beside it.
WIDTH, LABELS, ROW = 1040, 62, 24
HALF = 470


def experts(record: Record) -> list[Element]:
    """How evenly tokens were spread, layer by layer; over time it is one of the training curves."""
    if record.loads is not None:
        return [heat_figure(record.loads)]
    none = record.config is not None and record.config.model.moe is None
    words = "The model has no experts." if none else "Load by expert is unknown: no checkpoint tells it."
    return [node("p", words, class_="missing")]


def heat_figure(loads: Loads) -> Element:
    legend = [("box c1", "more than its share, full colour at twice"), ("box c0", "less, full colour at half")]
    rows = []
    for layer, counts in loads.by_layer.items():
        ratio = _ratio(counts)
        extremes = (f"{ratio[expert]:.2f} (expert {expert})" for expert in (ratio.argmax(), ratio.argmin()))
        rows.append([str(layer), f"{counts.sum():,}", *extremes, str(int((counts == 0).sum()))])
    head = ["layer", "tokens × experts", "busiest, of the mean", "least used, of the mean", "never used"]
    unit = f"of the layer's mean, steps {loads.start:,} to {loads.stop - 1:,}, from checkpoints"
    return figure("Load by expert", unit, heat_map(loads), legend=legend, numbers=table(head, rows))


def heat_map(loads: Loads) -> Element:
    """A row for each layer, a cell for each expert; cells that are large enough have their numbers in them."""
    few = len(loads.by_layer) <= FEW_LAYERS
    row_height = ROW if few else ROW // 2
    size = f"0 0 {WIDTH} {row_height * len(loads.by_layer)}"
    svg = node("svg", viewBox=size, class_="chart wide", role="img", aria_label="load by layer and expert")
    for row, (layer, counts) in enumerate(loads.by_layer.items()):
        ratio = _ratio(counts)
        width = (WIDTH - LABELS) / len(ratio)
        middle = (row + 0.5) * row_height
        most = f"expert {ratio.argmax()} got most, {ratio.max():.2f} of the mean"
        least = f"expert {ratio.argmin()} least, {ratio.min():.2f}"
        band = node("g", node("title", f"layer {layer}: {most}; {least}"))
        cells = node("g", transform=f"translate({LABELS} {middle:g}) scale({width:.4f} 1)", stroke_width=row_height - 2)
        for level in range(-LEVELS, LEVELS + 1):
            if path := _cells(np.flatnonzero(_levels(ratio) == level), gap=len(ratio) <= READABLE):
                strength = f"{0.06 + 0.54 * abs(level) / LEVELS:.2f}"
                look = "c1" if level > 0 else "c0" if level < 0 else "c7"
                cells.append(node("path", d=path, class_=f"heat {look}", stroke_opacity=strength))
        band.append(cells)
        if few or row % 4 == 0:
            band.append(node("text", f"layer {layer}", y=f"{middle:g}", dy=".35em"))
        if few and len(ratio) <= READABLE:
            for expert, value in enumerate(ratio.tolist()):
                place = {"x": f"{LABELS + (expert + 0.5) * width:.1f}", "y": f"{middle:g}", "dy": ".35em"}
                band.append(node("text", f"{value:.2f}", **place, class_="inside"))
        svg.append(band)
    return svg


def _levels(ratio: np.ndarray) -> np.ndarray:
    """From -LEVELS, half the mean or less, over 0 to LEVELS, twice the mean or more."""
    return np.rint(LEVELS * np.clip(np.log2(np.maximum(ratio, 1e-9)), -1.0, 1.0))


def _cells(columns: np.ndarray, gap: bool) -> str:
    """A path over these columns, each one unit wide; neighbours are one stroke unless there is to be a gap."""
    if gap:
        return "".join(f"M{column} 0h.98" for column in columns)
    runs = np.split(columns, np.flatnonzero(np.diff(columns) != 1) + 1) if columns.size else []
    return "".join(f"M{run[0]} 0h{len(run)}" for run in runs)


def _ratio(counts: np.ndarray) -> np.ndarray:
    return counts / max(float(counts.mean()), 1e-9)


def layout(record: Record) -> list[Element]:
    """The plan in words, its layers on pipeline ranks, and who talks to whom on which machine."""
    plan = record.plan
    if plan is None:
        return [node("p", "The layout is unknown.", class_="missing")]
    layers = record.config.model.layers if record.config else ()
    kinds = list(layers) if len(layers) == plan.num_layers else ["layer"] * plan.num_layers
    has_experts = any(kind.endswith("/moe") or kind == "layer" for kind in kinds)
    found = [node("pre", plan.explain()), picture_figure(layers_picture(plan, kinds))]
    drawn = axes(plan, has_experts)
    if not drawn:
        return [*found, node("p", "One rank: nothing is split.", class_="note")]
    try:
        placed = placement(record, plan)
    except Refusal:  # no placement of the planner's: ranks by pipeline rank, wherever they ran
        return [*found, node("div", *(_axis_figure(plan, axis) for axis in drawn), class_="pair")]
    pictures = [rack_picture(placed, axis) for axis in drawn]
    small = all(float(picture.drawing.get("width", WIDTH)) <= HALF for picture in pictures)
    return [*found, node("div", *map(picture_figure, pictures), class_="pair" if small else None)]


def placement(record: Record, plan: ParallelPlan) -> Placement:
    """Ranks on the machine as far as the run has told: the devices that it recorded, and as many ranks on a host as its
    launcher started there. Refusal where the planner would not place them so."""
    told = str(record.attempts[-1].environment.get("variables", {}).get("LOCAL_WORLD_SIZE")) if record.attempts else ""
    of_host = int(told) if re.fullmatch(r"\d{1,6}", told) and 0 < int(told) < plan.world_size else plan.world_size
    topology = record.machine.topology if record.machine else unnamed()
    if not topology.rack_scale and (of_host < plan.world_size or topology.device.architecture in ("cpu", UNNAMED)):
        name = "its host" if of_host == plan.world_size else "its hosts"
        host = replace(topology.domain, size=of_host, per_host=of_host, practice=(of_host,))
        topology = replace(topology, name=name, domain=host, spares=0)
    return place(plan, topology)


def unnamed() -> HardwareTopology:
    """Hosts of which nothing is known."""
    cpu = load_hardware("cpu")
    return replace(cpu, device=replace(cpu.device, architecture=UNNAMED))


def _axis_figure(plan: ParallelPlan, axis: str) -> Element:
    shown, per_stage = ranks_shown(plan), plan.world_size // plan.pp
    note = f"Drawn: the first {shown} of the {per_stage} ranks of each pipeline rank." if shown < per_stage else ""
    groups = plan.group((axis,))
    colours = f"Colours come again after {PALETTE} groups." if len(groups) > PALETTE else ""
    unit = f"{len(groups)} groups of {plan.degree(axis)}; {AXIS_MEANING[axis]}"
    rows = [[str(index), ranks_text(ranks)] for index, ranks in enumerate(groups[:GROUPS])]
    if len(groups) > GROUPS:
        rows.append(["...", f"{len(groups) - GROUPS:,} more"])
    return figure(axis, unit, ranks_drawing(plan, axis), note, colours, numbers=table(["group", "ranks"], rows, 2))
