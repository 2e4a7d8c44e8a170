"""Pictures of a plan: every rank and layer once, colours that say who talks to whom, a bounded size."""

from __future__ import annotations

from itertools import combinations
from xml.etree.ElementTree import Element, tostring

import pytest

from parallel.planning.drawings import MAX_RANKS, axes, layers_drawing, ranks_drawing, ranks_shown, ranks_text
from parallel.planning.layout import FAMILIES
from parallel.planning.plan import ParallelPlan

PLANS = {
    "one rank": ParallelPlan(1, 12, 1, num_layers=1),
    "three ranks": ParallelPlan(3, 12, 1, num_layers=3, ep=3),
    "six ranks": ParallelPlan(6, 12, 1, num_layers=5, tp=3, pp=2, ep=3),
    "interleaved": ParallelPlan(8, 12, 1, num_layers=7, tp=2, pp=2, vpp=2, ep=2, etp=2),
    "uneven stages": ParallelPlan(4, 12, 1, num_layers=7, pp=4, stages=((0,), (1, 2, 3), (4, 5), (6,))),
}


def cells(svg: Element) -> dict[str, Element]:
    """The drawn boxes by their description."""
    return {group.findtext("title") or "": cell for group in svg.iter("g") if (cell := group.find("rect")) is not None}


def rank_cells(svg: Element) -> dict[int, Element]:
    return {int(words.split(":")[0].removeprefix("rank ")): cell for words, cell in cells(svg).items()}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_ranks_share_a_colour_exactly_when_they_differ_on_that_axis_only(plan: ParallelPlan) -> None:
    for axis in axes(plan, experts=True):
        drawn = rank_cells(ranks_drawing(plan, axis))
        assert sorted(drawn) == list(range(plan.world_size))
        family = next(names for names in FAMILIES.values() if axis in (*names, "pp"))
        others = [name for name in (*family, "pp") if name != axis]
        for a, b in combinations(range(plan.world_size), 2):
            together = all(plan.coords(a)[name] == plan.coords(b)[name] for name in others)
            assert (drawn[a].get("class") == drawn[b].get("class")) == together, (axis, a, b)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_layer_is_drawn_once_in_the_row_of_its_pipeline_rank(plan: ParallelPlan) -> None:
    found = cells(layers_drawing(plan, ["attention/moe"] * plan.num_layers))
    rows = sorted({float(cell.get("y", "")) for cell in found.values()})
    assert len(found) == plan.num_layers + 2 and len(rows) == plan.pp  # the embedding and the head have cells too
    for words, cell in found.items():
        if words.startswith("layer"):
            layer = int(words.split(",")[0].removeprefix("layer "))
            assert rows.index(float(cell.get("y", ""))) == plan.stage_of(layer)
    columns = [float(cell.get("x", "")) for words, cell in found.items() if words.startswith("layer")]
    assert len(set(columns)) == plan.num_layers


def test_layers_of_one_kind_share_a_colour() -> None:
    found = cells(layers_drawing(ParallelPlan(1, 1, 1, num_layers=3), ["a/b", "c/d", "a/b"]))
    looks = [cell.get("class") for words, cell in found.items() if words.startswith("layer")]
    assert looks[0] == looks[2] != looks[1]


def test_axes_of_one_rank_are_left_out_and_those_of_experts_without_experts() -> None:
    plan = ParallelPlan(8, 12, 1, num_layers=4, tp=2, pp=2, ep=2)
    assert axes(plan, experts=True) == ["tp", "dp", "pp", "ep", "edp"]
    assert axes(plan, experts=False) == ["tp", "dp", "pp"]
    assert axes(PLANS["one rank"], experts=True) == []


def test_a_world_of_thousands_is_drawn_in_part_with_every_pipeline_rank_in_it() -> None:
    plan = ParallelPlan(4096, 4096, 1, num_layers=94, tp=8, pp=16, ep=32)
    drawn = rank_cells(ranks_drawing(plan, "dp"))
    assert len(drawn) == MAX_RANKS == ranks_shown(plan) * plan.pp
    assert {plan.coords(rank)["pp"] for rank in drawn} == set(range(16))
    assert len(tostring(ranks_drawing(plan, "dp"))) < 60_000


def test_a_kind_of_layer_cannot_become_markup() -> None:
    text = tostring(layers_drawing(ParallelPlan(1, 1, 1, num_layers=1), ["<script>"]), "unicode", method="html")
    assert "<script" not in text and "&lt;script&gt;" in text


def test_long_groups_are_told_by_their_ends_and_their_size() -> None:
    assert ranks_text([3]) == "3"
    assert ranks_text(range(0, 64, 2)) == "0, 2, 4, ..., 62 (32 ranks)"
