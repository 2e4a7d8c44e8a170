"""The suite on trial: with a known bug put back, the comparison of ``test_axes.py`` fails; without it, it holds."""

from __future__ import annotations

import pytest

from parallel.planning.plan import ParallelPlan
from tests.parity.compare import Compare
from tests.parity.mutations import MUTATIONS
from tests.parity.specs import HYBRID, plan

STEPS = 3

#: Mutation -> the layout that it breaks.
BREAKS: dict[str, ParallelPlan] = {
    "batched transfers in the interleaved schedule": plan(2, pp=2, vpp=2),
    "expert gradients reduced over the dense group": plan(2, tp=2, sequence_parallel=True),
    "experts left out of the gradient norm": plan(2, ep=2),
    "loss divided by the local number of targets": plan(2),
    "auxiliary loss averaged over micro-batches": plan(1),
    "partial sums of norm weights not reduced": plan(2, tp=2, sequence_parallel=True),
    "gradients of the tied embedding not joined": plan(2, pp=2),
    "router counts of one rank only": plan(2),
    "initialisation seeded by rank": plan(2, tp=2),
    "a data rank reads another's rows": plan(2),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_p4_a_known_bug_put_back_fails_the_comparison(mutation: str, compare: Compare) -> None:
    found = compare(HYBRID, BREAKS[mutation], STEPS, mutation)
    assert found.beyond(loss=1e-10, norm=1e-10, aux=1e-10, tensors=1e-9) != []


@pytest.mark.parametrize("layout", dict.fromkeys(BREAKS.values()), ids=lambda layout: f"{layout.world_size}")
def test_p4_without_the_bug_the_same_comparison_holds(layout: ParallelPlan, compare: Compare) -> None:
    found = compare(HYBRID, layout, STEPS)
    assert found.beyond(loss=1e-10, norm=1e-10, aux=1e-10, tensors=1e-9) == []
