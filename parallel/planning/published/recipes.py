"""What a published table does not print and its source's scripts state: recipes of benchmarks, and single cells.

``recipes.csv`` holds the recipes behind NVIDIA's performance tables, from the tags of Megatron-Bridge that go
with the containers (25.11: v0.2.0 to 26.06.01: v0.5.1; ``scripts/performance/configs``), each from the release that
brought it; ``cells.yaml`` the rest, with its addresses. Both are settings, never measurements.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from parallel.planning.models.architectures import plain
from parallel.planning.published.rows import Row
from stoker.formats import require

RECIPES = Path(__file__).with_name("recipes.csv")
CELLS = Path(__file__).with_name("cells.yaml")

Release = tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """Settings of one benchmark since ``release``. ``recompute``: modules; ``offloaded_layers``: whose activations wait
    in host memory; ``recomputed_layers``: of each chunk, in full; ``layout``: Megatron's pipeline layout;
    ``cuda_graphs``: of the router, of most of a layer, or of the whole iteration."""

    release: Release
    model: str
    gpu: str
    precision: str
    degrees: tuple[int, ...]
    recompute: tuple[str, ...]
    dispatcher: str
    expert_overlap: bool
    cuda_graphs: Literal["", "partial", "layer", "iteration"]
    offloaded_layers: int
    recomputed_layers: int
    layout: str
    fused_experts: bool
    fp8_attention: bool


@cache
def recipes() -> tuple[Recipe, ...]:
    with open(RECIPES, newline="", encoding="utf-8") as file:
        return tuple(_recipe(cells) for cells in csv.DictReader(file))


def _recipe(cells: dict[str, Any]) -> Recipe:
    return Recipe(
        release_of(cells["release"]),
        cells["model"],
        cells["gpu"],
        cells["precision"],
        tuple(int(cells[name] or 1) for name in ("tp", "pp", "vpp", "ep", "cp", "micro_batch")),
        tuple(filter(None, cells["recompute"].split("+"))),
        cells["dispatcher"],
        cells["expert_overlap"] == "1",
        cells["cuda_graphs"],
        int(cells["offloaded_layers"] or 0),
        int(cells["recomputed_layers"] or 0),
        cells["layout"],
        cells["fused_experts"] == "1",
        cells["fp8_attention"] == "1",
    )


def release_of(text: str) -> Release:
    """ "26.04.01" -> (26, 4, 1)."""
    return tuple(map(int, text.split(".")))


def recipe_of(row: Row, precision: str) -> Recipe | None:
    """The recipe behind a row of Megatron-Bridge's tables: of its model, device and precision, the newest that its
    container has (the oldest known, for older ones), the row's own layout before another one."""
    container = re.search(r"container: (\d\d\.\d\d(?:\.\d\d)?)", row.notes)
    if "bridge" not in row.source.lower() or not container:
        return None
    degrees = tuple(value or 1 for value in (row.tp, row.pp, row.vpp, row.ep, row.cp, row.micro_batch))
    fits = [
        (each.degrees == degrees, sum(map(int.__eq__, each.degrees, degrees)), each.release, index)
        for index, each in enumerate(recipes())
        if plain(row.model).startswith(plain(each.model))
        and plain(row.gpu).startswith(plain(each.gpu))
        and each.precision == precision
        and each.release <= max(release_of(container[1]), recipes()[0].release)
    ]
    return recipes()[max(fits)[-1]] if fits else None


@cache
def _entries() -> tuple[dict[str, Any], ...]:
    content = yaml.safe_load(CELLS.read_text(encoding="utf-8"))
    require(content, "published-cells", 1, str(CELLS))
    return tuple(content["entries"])


def _unstated(row: Row, name: str) -> bool:
    """An empty cell, or no expert parallelism: that tables also print where they mean that they do not say."""
    return getattr(row, name) in (None, "") or (name == "ep" and row.ep == 1)


def with_stated_cells(row: Row, assumed: list[str]) -> Row:
    """The row with empty cells filled from what its source states elsewhere, and its notes lengthened by it."""
    filled: dict[str, Any] = {}
    for entry in _entries():
        fits = row.source.startswith(entry["source"]) and entry.get("address", "") in row.source_url
        if not fits or entry.get("gpu", row.gpu) != row.gpu:
            continue
        for model, cells in entry["models"].items():
            if plain(row.model).startswith(plain(model)):
                new = {name: value for name, value in cells.items() if name != "notes" and name not in filled}
                new = {name: value for name, value in new.items() if _unstated(row, name)}
                if "notes" in cells:
                    new["notes"] = f"{filled.get('notes', row.notes)}; {cells['notes']}"
                    assumed.append(f"{cells['notes']}: {entry['url']}")
                assumed += [f"{name}={value}: {entry['url']}" for name, value in new.items() if name != "notes"]
                filled |= new
    return replace(row, **filled)
