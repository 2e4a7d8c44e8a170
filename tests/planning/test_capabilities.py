"""Capabilities: what is refused is reviewed, and what is supported has a plan that the parity suite can run."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from parallel.planning import capabilities
from parallel.planning.capabilities import (
    APART,
    TABLE,
    features_of,
    pairs,
    refuse_unsupported,
    refused,
    smallest_plan,
    status,
)
from parallel.planning.execution import Execution
from parallel.planning.plan import ParallelPlan
from stoker.errors import Refusal

AXES = [row.name for row in TABLE.values() if row.kind == "axis" and row.status == "supported"]


def reviewed() -> list[str]:
    lines = (Path(capabilities.__file__).parent / "refused_pairs.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_p4_the_refused_list_is_the_reviewed_file() -> None:
    assert refused() == reviewed()


def test_p4_the_document_tells_everything_that_is_refused() -> None:
    document = (Path(__file__).parents[2] / "docs" / "parity.md").read_text()
    told = [line for line in document.splitlines() if line.startswith("|")]
    for line in refused():
        names = line.split(" | ")[0].split()
        assert any(all(name in row for name in names) for row in told), line


def test_p4_the_engine_supports_the_axes_of_the_promise() -> None:
    promised = ("tp", "sp", "pp", "vpp", "ep", "etp", "dp", "zero1", "recompute_selective", "recompute_full")
    assert set(AXES) == set(promised)
    assert {row.name for row in TABLE.values() if row.kind == "precision" and row.status == "supported"} == {
        "float64",
        "float32",
        "bfloat16",
    }


def test_p4_every_pair_of_supported_axes_is_run_or_refused_by_name() -> None:
    run, apart = {frozenset(pair) for pair in pairs()}, {frozenset(pair) for pair in APART}
    assert run | apart == {frozenset(pair) for pair in combinations(AXES, 2)}
    assert not run & apart


def test_p7_what_is_refused_says_why_and_what_to_use_instead() -> None:
    for row in TABLE.values():
        assert row.reason
        assert bool(row.instead) == (row.status != "supported"), row.name


def plan_for(features: Iterable[str], **options: Any) -> ParallelPlan:
    return smallest_plan(features, num_layers=4, global_batch=12, **options)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_p4_supported_axes_have_a_plan_of_at_most_eight_ranks_in_which_they_are_at_work(size: int) -> None:
    for features in combinations(AXES, size):
        if status(*features)[0] != "supported":
            continue
        plan = plan_for(features)
        assert set(features) <= set(features_of(plan)), features
        assert plan.world_size <= 2**size, features
        assert plan.zero == ("zero1" in features)
        refuse_unsupported(plan, "float64", has_experts=True)


def test_p4_data_parallel_replicates_what_the_other_axis_shards() -> None:
    plan = plan_for(("dp", "ep"))
    assert (plan.world_size, plan.ep, plan.edp) == (4, 2, 2)
    assert plan_for(("dp", "tp")).edp == 4  # expert replicas on tensor-parallel ranks: row 13 of the seam's table
    assert plan_for(("ep", "etp")).world_size == 4
    assert plan_for(("dp",), degree=3).world_size == 3
    assert plan_for(("dp", "pp"), degree=3).world_size == 9


def test_a_feature_brings_what_it_needs() -> None:
    plan = plan_for(("vpp", "etp"))
    assert (plan.pp, plan.vpp, plan.tp, plan.etp, plan.sequence_parallel) == (2, 2, 1, 2, False)
    assert plan_for(("sp",)).tp == 2
    assert not plan_for(("tp",)).sequence_parallel


def test_p7_no_plan_is_made_of_what_does_not_go_together() -> None:
    with pytest.raises(Refusal, match="one recompute mode"):
        plan_for(("recompute_full", "recompute_selective"))
    with pytest.raises(Refusal, match=r"cp: planned, .*own issue"):
        plan_for(("cp",))
    with pytest.raises(Refusal, match="'fp8' is not a parallel axis"):
        plan_for(("fp8",))


REFUSED: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "axis cp is planned: .*own issue; use cp=1": (dict(cp=2), "float32", ()),
    "precision fp8 is planned: .*dtype=bfloat16": ({}, "fp8", ()),
    "precision 'float8' is not known: choose one of float64, float32, bfloat16": ({}, "float8", ()),
    "axis zero2 is model only: .*use zero=1": (dict(zero=2), "bfloat16", ()),
    "axis fsdp is model only: .*use zero=1": (dict(zero=3), "bfloat16", ()),
    "schedule zero_bubble is model only": (dict(pp=2), "float32", ("zero_bubble",)),
    "dispatcher deepep is planned: .*use dispatcher alltoall": (dict(ep=2), "bfloat16", ("deepep",)),
    "feature 'zerobubble' is not known": ({}, "float32", ("zerobubble",)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_p7_what_the_engine_cannot_run_is_refused_before_the_run(message: str) -> None:
    degrees, dtype, others = REFUSED[message]
    plan = ParallelPlan(8, 16, 1, num_layers=4, **degrees)
    with pytest.raises(Refusal, match=message) as refused_with:
        refuse_unsupported(plan, dtype, has_experts=True, others=others)
    assert "\n" not in str(refused_with.value)


HOW: dict[str, tuple[dict[str, Any], Execution]] = {
    "precision mxfp8 is planned: .*dtype=bfloat16": ({}, Execution("mxfp8")),
    "schedule zero_bubble is model only: .*use vpp": (dict(pp=2), Execution(schedule="zero_bubble")),
    "dispatcher hybridep is planned: .*alltoall": (dict(ep=2), Execution(dispatcher="hybridep")),
    "dispatcher token_dropping is model only": ({}, Execution(routing="dropped")),
    "recompute recompute_modules is model only: .*use recompute=": ({}, Execution(recompute_modules=("norm",))),
    "overlap expert_overlap is model only: .*domain": (dict(ep=2), Execution(expert_overlap=True)),
    "overlap tensor_overlap is model only: .*sequence": (dict(tp=2), Execution(tensor_overlap=True)),
    "kernel cuda_graphs is model only: .*micro-batches": ({}, Execution(graphs="partial")),
    "kernel fused_experts is model only: .*grouped_mm": ({}, Execution(fused_experts=True)),
    "kernel fp8_attention is planned: .*bfloat16": ({}, Execution(fp8_attention=True)),
    "offload offload_optimizer is model only: .*zero=1": ({}, Execution(offload=("optimizer",))),
    "offload offload_activations is model only: .*full": ({}, Execution(offload=("activations",))),
    "state narrow_state is model only: .*float32": ({}, Execution(gradient_bytes=2)),
    "state narrow_state is model only: .*4 bytes": ({}, Execution(master_bytes=0)),
    "axis hybrid_sharding is model only: .*zero=1": ({}, Execution(zero_parts=2)),
}


def plan_of(degrees: dict[str, Any]) -> ParallelPlan:
    return ParallelPlan(8, 16, 1, num_layers=4, **degrees)


@pytest.mark.parametrize("message", HOW)
def test_p7_an_execution_that_the_engine_does_not_have_is_refused(message: str) -> None:
    degrees, execution = HOW[message]
    plan = plan_of(degrees)
    with pytest.raises(Refusal, match=message):
        refuse_unsupported(plan, execution, has_experts=True)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_what_the_engine_does_by_itself_is_not_refused(dtype: Any) -> None:
    plan = ParallelPlan(8, 16, 1, num_layers=4, pp=2, vpp=2, ep=2)
    masters = {} if dtype == "bfloat16" else {"master_bytes": 0}
    refuse_unsupported(plan, Execution(dtype, **masters), has_experts=True)
    assert features_of(plan, Execution(dtype)) == ["dp", "zero1", "pp", "vpp", "ep", dtype, "interleaved", "alltoall"]


def test_every_field_of_an_execution_that_changes_how_it_runs_has_a_row() -> None:
    named = {feature for degrees, execution in HOW.values() for feature in features_of(plan_of(degrees), execution)}
    assert named >= {row.name for row in TABLE.values() if row.kind in ("state", "recompute", "overlap", "kernel")}
    assert named >= {row.name for row in TABLE.values() if row.kind == "offload"}


@pytest.mark.parametrize("axis", ["ep", "etp"])
def test_p7_expert_axes_are_refused_for_a_model_without_experts(axis: str) -> None:
    plan = ParallelPlan(8, 16, 1, num_layers=4, **{axis: 2})
    with pytest.raises(Refusal, match=f"{axis}=2 shards experts and the model has none: use {axis}=1"):
        refuse_unsupported(plan, "bfloat16", has_experts=False)
    refuse_unsupported(plan, "bfloat16", has_experts=True)


@pytest.mark.parametrize("has_experts", [False, True])
def test_tensors_may_be_split_without_sequence_parallel(has_experts: bool) -> None:
    refuse_unsupported(ParallelPlan(8, 16, 1, num_layers=4, tp=2), "bfloat16", has_experts=has_experts)
