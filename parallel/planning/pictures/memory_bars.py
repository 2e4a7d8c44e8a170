"""Memory by pipeline stage: what fills each device, how far it may go, and where the device ends. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from parallel.planning.memory.prediction import OUTSIDE, MemoryPrediction
from parallel.planning.pictures.bars import Bar, bar_keys, bars_drawing, palette
from parallel.planning.pictures.shapes import Picture, sized
from parallel.planning.topology import HardwareTopology

#: A device of so many times what is needed at most is not drawn to its end: the bars would be slivers.
FAR = 10.0
#: Of the figures beside the bars.
Unit = tuple[str, float]


def memory_picture(prediction: MemoryPrediction, topology: HardwareTopology) -> Picture:
    """A bar for each stage, its components from left to right, a whisker to the upper bound, a line where memory ends.

    The components that are smallest over all stages share one colour.
    """
    size = topology.device.memory_bytes
    end = size if size is not None and size < FAR * prediction.upper else None
    unit = name, scale = sized(prediction.upper, "B")
    totals: dict[str, float] = {}
    for stage in prediction.stages:
        for part, held in stage.components.items():
            totals[part] = totals.get(part, 0.0) + held
    looks = palette(totals)
    bars = [
        Bar(
            f"pp {stage.pp}",
            f"pipeline rank {stage.pp}",
            stage.components,
            stage.device,
            stage.upper,
            f"{stage.device / scale:.1f}, at most {stage.upper / scale:.1f} {name}",
        )
        for stage in prediction.stages
    ]
    legend = [*bar_keys(looks), ("ink", "to the upper bound")]
    if end is not None:
        legend.append(("dashed c1", f"usable memory of a {topology.device.name}, {end / scale:.1f} {name}"))
    shown = [part for part in totals if totals[part] > 0]
    return Picture(
        "Memory by pipeline stage",
        f"{name} ({scale:.0e} bytes) of one device at its peak".replace("e+0", "e"),
        bars_drawing(bars, looks, unit, "memory by pipeline stage", end),
        tuple(legend),
        tuple(_notes(prediction, topology, unit)),
        ("pipeline rank", *shown, "all", "upper bound"),
        tuple(
            (
                f"pp {stage.pp}",
                *(f"{stage.components.get(part, 0.0) / scale:.2f}" for part in shown),
                f"{stage.device / scale:.2f}",
                f"{stage.upper / scale:.2f}",
            )
            for stage in prediction.stages
        ),
    )


def _notes(prediction: MemoryPrediction, topology: HardwareTopology, unit: Unit) -> Iterator[str]:
    name, scale = unit
    worst, upper, size = prediction.worst, prediction.upper, topology.device.memory_bytes
    told = f"Pipeline rank {worst.pp} needs most: {worst.device / scale:.1f} {name}, {upper / scale:.1f} {name} at most"
    if size is None:
        yield f"{told}. How much the device has is unknown."
    elif worst.device > size:
        yield f"{told}: {(worst.device - size) / scale:.1f} {name} more than there is."
    elif size >= FAR * upper:
        whole, base = sized(size, "B")
        yield f"{told}: it fits many times into the {size / base:.1f} {whole} that it may use."
    else:
        yield f"{told}: it fits{'' if upper <= size else ', but for the upper bound'}."
    if not any(stage.components.get(part) for stage in prediction.stages for part in OUTSIDE):
        yield "Tensors alone: the process, its libraries and the buffers of its messages come on top."
    yield f"Not modelled: {'; '.join(prediction.not_modelled)}."
