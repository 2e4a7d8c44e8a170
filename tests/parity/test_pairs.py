"""P4 in full: every pair of axes that the capability table supports, and a sample of triples that changes daily."""

from __future__ import annotations

import datetime
import os
import random
from dataclasses import replace
from itertools import combinations

import pytest

from parallel.planning.capabilities import TABLE, pairs, smallest_plan, status
from parallel.planning.plan import ParallelPlan
from tests.parity.batches import GLOBAL_BATCH
from tests.parity.compare import Compare
from tests.parity.specs import HYBRID, SEQ_LEN, plan

STEPS = 20
#: Set it to repeat a sample; else it is today's date.
SEED = os.environ.get("STOKER_TRIPLES_SEED") or datetime.date.today().isoformat()
NUM_SAMPLED = 10

PAIRS = list(pairs())
_AXES = [row.name for row in TABLE.values() if row.kind == "axis"]
TRIPLES = [axes for axes in combinations(_AXES, 3) if status(*axes)[0] == "supported"]
SAMPLE = random.Random(SEED).sample(TRIPLES, NUM_SAMPLED)

#: Always run: (tp2, pp2, ep2) and the interleaved pipeline whose experts are cut both ways.
NAMED: dict[str, ParallelPlan] = {
    "tp2.sp.pp2.ep2": plan(4, tp=2, pp=2, ep=2, sequence_parallel=True),
    "pp2.vpp2.dp2.etp2": plan(4, pp=2, vpp=2, etp=2, zero=1),
    "pp2.vpp2.tp2.sp.dp2.ep2.etp2": plan(8, pp=2, vpp=2, tp=2, ep=2, etp=2, sequence_parallel=True, zero=1),
    "tp3.dp2.ep3.etp2, recomputed": plan(6, tp=3, ep=3, etp=2, zero=1, recompute="full"),
}


def smallest(axes: tuple[str, ...]) -> ParallelPlan:
    """The table's plan for ``axes``, with three micro-batches where its share of the batch allows."""
    found = smallest_plan(axes, num_layers=len(HYBRID.layers), global_batch=GLOBAL_BATCH)
    share = GLOBAL_BATCH // found.dp
    return replace(found, micro_batch=share // 3 if share % 3 == 0 else 1)


def holds(name: str, layout: ParallelPlan, compare: Compare) -> None:
    assert SEQ_LEN % layout.tp == 0
    found = compare(HYBRID, layout, STEPS, name=name)
    assert found.beyond(loss=1e-10, norm=1e-10, aux=1e-10, tensors=1e-9) == []


@pytest.mark.verify
@pytest.mark.parametrize("axes", PAIRS, ids=".".join)
def test_p4_every_valid_pair_gives_the_curve_of_one_process(axes: tuple[str, str], compare: Compare) -> None:
    holds(".".join(axes), smallest(axes), compare)


@pytest.mark.verify
@pytest.mark.parametrize("axes", SAMPLE, ids=".".join)
def test_p4_a_sample_of_triples_gives_the_curve_of_one_process(axes: tuple[str, ...], compare: Compare) -> None:
    print(f"STOKER_TRIPLES_SEED={SEED}")
    holds(f"{'.'.join(axes)} (STOKER_TRIPLES_SEED={SEED})", smallest(axes), compare)


@pytest.mark.verify
@pytest.mark.parametrize("name", NAMED)
def test_p4_named_combinations_give_the_curve_of_one_process(name: str, compare: Compare) -> None:
    holds(name, NAMED[name], compare)


def test_p4_every_pair_and_triple_has_a_plan_of_at_most_eight_processes() -> None:
    assert max(smallest(axes).world_size for axes in (*PAIRS, *TRIPLES)) <= 8
    assert {frozenset(pair) for pair in combinations(_AXES, 2)} >= {frozenset(pair) for pair in PAIRS}
    assert len(PAIRS) == len(set(map(frozenset, PAIRS))) >= 44
