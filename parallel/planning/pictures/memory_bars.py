"""Memory by pipeline stage: what fills each device, how far it may go, and where the device ends. No torch."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from parallel.planning.memory.prediction import MemoryPrediction, StageMemory
from parallel.planning.pictures.shapes import (
    MARGIN,
    PALETTE,
    WIDTH,
    Picture,
    across,
    cell,
    down,
    fits,
    svg,
    text,
    ticks,
)
from parallel.planning.topology import HardwareTopology

GB = 1e9
#: Pixels: a stage's bar, the gap between bars, the figures on the right.
BAR, GAP, FIGURES = 24, 8, 124
OTHER = "other"


def memory_picture(prediction: MemoryPrediction, topology: HardwareTopology) -> Picture:
    """A bar for each stage, its components from left to right, a whisker to the upper bound, a line where memory ends.

    The components that are smallest over all stages share one colour.
    """
    size = topology.device.memory_bytes
    totals: dict[str, float] = {}
    for stage in prediction.stages:
        for name, held in stage.components.items():
            totals[name] = totals.get(name, 0.0) + held
    large = sorted((name for name in totals if totals[name] > 0), key=lambda name: -totals[name])
    if len(large) > PALETTE:
        large = large[: PALETTE - 1]
    named = [name for name in totals if name in large]
    looks = {name: f"c{index}" for index, name in enumerate(named)}
    legend = [(f"box {look}", name) for name, look in looks.items()]
    if any(totals[name] > 0 for name in totals if name not in looks):
        legend.append(
            ("box c7", f"{OTHER}: {', '.join(name for name in totals if totals[name] and name not in looks)}")
        )
    legend.append(("c7", "to the upper bound"))
    if size is not None:
        legend.append(("dashed c1", f"usable memory of a {topology.device.name}, {size / GB:.1f} GB"))
    worst = prediction.worst
    return Picture(
        "Memory by pipeline stage",
        "GB (1e9 bytes) of one device at its peak",
        _drawing(prediction, size, looks),
        tuple(legend),
        (_verdict(worst, prediction.upper, size), f"Not modelled: {'; '.join(prediction.not_modelled)}."),
        ("pipeline rank", *totals, "all", "upper bound"),
        tuple(
            (f"pp {stage.pp}", *(f"{held / GB:.2f}" for held in (*_held(stage, totals), stage.device, stage.upper)))
            for stage in prediction.stages
        ),
    )


def _held(stage: StageMemory, names: dict[str, float]) -> list[float]:
    return [stage.components.get(name, 0.0) for name in names]


def _verdict(worst: StageMemory, upper: float, size: float | None) -> str:
    told = f"Pipeline rank {worst.pp} needs most: {worst.device / GB:.1f} GB, {upper / GB:.1f} GB at most"
    if size is None:
        return f"{told}. How much the device has is unknown."
    if worst.device > size:
        return f"{told}: {(worst.device - size) / GB:.1f} GB more than there is."
    return f"{told}: it fits{'' if upper <= size else ', but for the upper bound'}."


def _drawing(prediction: MemoryPrediction, size: float | None, looks: dict[str, str]) -> Element:
    top, bottom = 4, 24
    height = top + len(prediction.stages) * (BAR + GAP)
    drawing = svg(WIDTH, height + bottom, "memory by pipeline stage", "chart wide")
    right = WIDTH - FIGURES
    per_byte = (right - MARGIN) / (1.02 * max(prediction.upper, size or 0.0))
    for value in ticks(0, (right - MARGIN) / per_byte / GB, 8):
        at = MARGIN + value * GB * per_byte
        down(drawing, "grid", at, top, height)
        text(drawing, at, height + 12, f"{value:,.6g}", anchor="middle")
    text(drawing, MARGIN - 10, height + 12, "GB", anchor="end")
    for index, stage in enumerate(prediction.stages):
        y = top + index * (BAR + GAP)
        text(drawing, 0, y + BAR / 2, f"pp {stage.pp}")
        x = float(MARGIN)
        named = {name: held for name, held in stage.components.items() if name in looks}
        for name, held in {**named, OTHER: stage.device - sum(named.values())}.items():
            width = held * per_byte
            if width >= 0.5:
                inside = f"{held / GB:.1f}"
                words = f"pipeline rank {stage.pp}, {name}: {held / GB:,.2f} GB"
                look = f"cell {looks.get(name, 'c7')}"
                cell(drawing, (x, y, width, BAR), look, inside if fits(inside, width) else "", words)
            x += width
        end = MARGIN + stage.upper * per_byte
        across(drawing, "line c7", x, y + BAR / 2, end)
        down(drawing, "line c7", end, y + BAR / 4, y + 3 * BAR / 4)
        figures = f"{stage.device / GB:.1f}, at most {stage.upper / GB:.1f}"
        text(drawing, WIDTH, y + BAR / 2, figures, anchor="end")
    if size is not None:
        down(drawing, "line dashed c1", MARGIN + size * per_byte, 0, height)
    across(drawing, "axis", MARGIN, height, right)
    return drawing
