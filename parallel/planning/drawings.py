"""A plan without its machine as pictures: layers and ranks by pipeline rank and group. No torch.

Fragments for a page that has the colours; ``pictures/shapes.py`` says how. On a machine: ``pictures/rack.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from parallel.planning.layout import FAMILIES
from parallel.planning.pictures.shapes import PALETTE, cell, svg, text
from parallel.planning.plan import ORDERS, ParallelPlan

#: Ranks that a picture shows; of a larger world, the first ranks of every pipeline rank.
MAX_RANKS = 128
#: Pixels: a cell, the gap between cells, the column of labels on the left, all cells of a row, a number in a cell.
CELL, GAP, LABELS, ROW, NUMBER = 25, 3, 48, 950, 20
COLUMNS = 16
#: Pixels a layer takes, gap included, in a model that leaves it so much.
LAYER = 42

AXIS_MEANING = {
    "tp": "tensor: each matrix is cut",
    "cp": "context: each window is cut",
    "dp": "data: each rank reads its own windows",
    "pp": "pipeline: each rank holds some layers",
    "etp": "tensor, inside an expert",
    "ep": "experts: each rank holds some of them",
    "edp": "data, for experts: each rank holds the same ones",
}


def axes(plan: ParallelPlan, experts: bool) -> list[str]:
    """Axes of more than one rank, dense ones first; those of the experts only if the model has ``experts``."""
    order = dict.fromkeys((*ORDERS[0], *(FAMILIES["expert"] if experts else ())))
    return [axis for axis in order if plan.degree(axis) > 1]


def layers_drawing(plan: ParallelPlan, kinds: Sequence[str]) -> Element:
    """Which layer lives on which pipeline rank: a row a rank, a column a layer, coloured by kind.

    ``kinds``: what each layer is made of, in order (``LayerWorkload.kind``); colours follow first appearance.
    """
    colours = {kind: index % PALETTE for index, kind in enumerate(dict.fromkeys(kinds))}
    step = min(LAYER, ROW / (plan.num_layers + 2))
    width = step - (GAP if step > 2 * GAP else 0)
    drawing = svg(LABELS + step * (plan.num_layers + 2), plan.pp * (CELL + GAP), "layers by pipeline rank")
    for pp in range(plan.pp):
        text(drawing, 0, pp * (CELL + GAP) + CELL / 2, f"pp {pp}", "label")
    ends = ((-1, 0, "embed", "the embedding"), (plan.num_layers, plan.pp - 1, "head", "final norm and head"))
    for layer, pp, short, words in ends:
        box = (LABELS + step * (layer + 1), pp * (CELL + GAP), width, CELL)
        cell(drawing, box, "cell end", short if step == LAYER else "", f"{words}, on pipeline rank {pp}")
    for chunk, layers in enumerate(plan.stages):
        pp = chunk % plan.pp
        for layer in layers:
            box = (LABELS + step * (layer + 1), pp * (CELL + GAP), width, CELL)
            words = f"layer {layer}, {kinds[layer]}, on pipeline rank {pp}" + f", chunk {chunk}" * (plan.vpp > 1)
            cell(drawing, box, f"cell c{colours[kinds[layer]]}", str(layer) if width >= NUMBER else "", words)
    return drawing


def ranks_drawing(plan: ParallelPlan, axis: str) -> Element:
    """The ranks, a band for each pipeline rank; ranks that talk to one another on ``axis`` share a colour."""
    groups = plan.group((axis,))
    group_of = {rank: index for index, ranks in enumerate(groups) for rank in ranks}
    per_stage, shown = plan.world_size // plan.pp, ranks_shown(plan)
    rows = -(-shown // COLUMNS)
    band = rows * (CELL + GAP) + GAP
    drawing = svg(LABELS + min(shown, COLUMNS) * (CELL + GAP), plan.pp * band, f"ranks by {axis} group")
    for pp in range(plan.pp):
        text(drawing, 0, pp * band + CELL / 2, f"pp {pp}", "label")
        for place in range(shown):
            rank = pp * per_stage + place
            row, column = divmod(place, COLUMNS)
            box = (LABELS + column * (CELL + GAP), pp * band + row * (CELL + GAP), CELL, CELL)
            members = groups[group_of[rank]]
            words = f"rank {rank}: {_coordinates(plan, rank)}; its {axis} group: {ranks_text(members)}"
            cell(drawing, box, f"cell c{group_of[rank] % PALETTE}", str(rank), words)
    return drawing


def ranks_shown(plan: ParallelPlan) -> int:
    """How many ranks of each pipeline rank ``ranks_drawing`` shows."""
    return min(plan.world_size // plan.pp, max(1, MAX_RANKS // plan.pp))


def ranks_text(ranks: Sequence[int], most: int = 8) -> str:
    """Ranks in words, a long list by its beginning and its end: 0, 2, 4, ..., 62 (32 ranks)."""
    if len(ranks) <= most:
        return ", ".join(map(str, ranks))
    return f"{', '.join(map(str, ranks[:3]))}, ..., {ranks[-1]} ({len(ranks)} ranks)"


def _coordinates(plan: ParallelPlan, rank: int) -> str:
    coords = plan.coords(rank)
    return ", ".join(f"{axis} {coords[axis]}" for axis in coords if plan.degree(axis) > 1) or "the only rank"
