"""P4: every axis that the engine supports gives the curve of one process, dense and hybrid mixture of experts."""

from __future__ import annotations

from typing import get_args

import pytest

from parallel.planning.capabilities import TABLE, features_of
from parallel.planning.plan import ParallelPlan
from pretrain.spec import Mixer
from tests.parity.compare import Compare
from tests.parity.specs import DENSE, HYBRID, SPECS, plan

STEPS = 20

#: Name -> (model, plan). Axes by themselves at degree 2 and 3, then together up to eight processes.
CASES: dict[str, tuple[str, ParallelPlan]] = {
    "dense one, 12 micro-batches": ("dense", plan(1, micro_batch=1)),
    "dense tp3": ("dense", plan(3, tp=3)),
    "dense tp2.sp": ("dense", plan(2, tp=2, sequence_parallel=True)),
    "dense pp3, uneven": ("dense", plan(3, pp=3)),
    "dense pp2.vpp2": ("dense", plan(2, pp=2, vpp=2)),
    "dense dp3.zero1": ("dense", plan(3, zero=1)),
    "dense tp2.pp2": ("dense", plan(4, tp=2, pp=2)),
    "hybrid one, 3 micro-batches": ("hybrid", plan(1)),
    "hybrid recompute selective": ("hybrid", plan(1, recompute="selective")),
    "hybrid recompute full": ("hybrid", plan(1, recompute="full")),
    "hybrid tp2": ("hybrid", plan(2, tp=2)),
    "hybrid tp2.sp": ("hybrid", plan(2, tp=2, sequence_parallel=True)),
    "hybrid tp3.sp": ("hybrid", plan(3, tp=3, sequence_parallel=True)),
    "hybrid etp2": ("hybrid", plan(2, etp=2)),
    "hybrid tp2.sp.etp2": ("hybrid", plan(2, tp=2, etp=2, sequence_parallel=True)),
    "hybrid pp2": ("hybrid", plan(2, pp=2)),
    "hybrid pp2, stages of 3 and 1": ("hybrid", plan(2, pp=2, stages=((0, 1, 2), (3,)))),
    "hybrid pp2.vpp2": ("hybrid", plan(2, pp=2, vpp=2)),
    "hybrid dp2": ("hybrid", plan(2)),
    "hybrid dp2.zero1": ("hybrid", plan(2, zero=1)),
    "hybrid ep2": ("hybrid", plan(2, ep=2)),
    "hybrid ep3.zero1": ("hybrid", plan(3, ep=3, zero=1)),
    "hybrid pp2.dp2.zero1": ("hybrid", plan(4, pp=2, zero=1)),
    "hybrid ep2.dp4": ("hybrid", plan(4, ep=2, zero=1)),
    "hybrid tp2.pp2.dp2.ep2": ("hybrid", plan(8, tp=2, pp=2, ep=2, zero=1, sequence_parallel=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_p4_an_axis_gives_the_curve_of_one_process(name: str, compare: Compare) -> None:
    spec, layout = CASES[name]
    found = compare(SPECS[spec], layout, STEPS, name=name)
    assert found.beyond(loss=1e-10, norm=1e-10, aux=1e-10, tensors=1e-9) == []


def test_p4_no_supported_axis_is_left_out() -> None:
    at_work = {feature for _, layout in CASES.values() for feature in features_of(layout)}
    assert at_work == {row.name for row in TABLE.values() if row.kind == "axis" and row.status == "supported"}
    assert {layout.world_size for _, layout in CASES.values()} == {1, 2, 3, 4, 8}
    assert {spec for spec, _ in CASES.values()} == set(SPECS)
    assert {type(layer.mixer) for spec in SPECS.values() for layer in spec.layers} == set(get_args(Mixer))
    assert DENSE.vocab_size == HYBRID.vocab_size == 257


def test_p4_the_cases_have_odd_numbers_of_micro_batches_in_every_schedule() -> None:
    odd = {(layout.pp > 1, layout.vpp > 1) for _, layout in CASES.values() if layout.num_micro_batches % 2}
    assert odd == {(False, False), (True, False), (True, True)}
