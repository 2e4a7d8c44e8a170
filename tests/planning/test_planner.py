"""The planner: what it finds is the best there is, may be run, and comes with reasons that hold."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.planning.capabilities import refuse_unsupported
from parallel.planning.execution import Execution
from parallel.planning.memory.prediction import predict_memory
from parallel.planning.models.mixers import attention
from parallel.planning.models.operations import Stream, assemble, layer, mlp
from parallel.planning.plan import ParallelPlan
from parallel.planning.search import planner
from parallel.planning.search.candidates import Space
from parallel.planning.search.judgement import explain
from parallel.planning.search.planner import Answer
from parallel.planning.search.problem import Problem
from parallel.planning.search.reasons import CAUSES, indistinct, why_slower
from parallel.planning.search.scored import Scored
from parallel.planning.search.stages import CHUNKS, StageChoice
from parallel.planning.search.ways import Relief, Ways
from parallel.planning.timing.step_time import PARTS
from parallel.planning.topology import load_hardware
from parallel.planning.workload import Workload, check_divisibility
from pretrain.config import load, parse
from pretrain.workload import workload_of
from stoker.errors import Refusal
from tests.planning.problems import PRESETS, PROBLEMS, deepseek, dense, machine, mixture, time_of


def search(problem: Problem, top: int = 5) -> Answer:
    return planner.search(problem, time_of, predict_memory, top)


CHEAP: Any = ("norm", "activation")
OFFLOADS: Any = ((), ("optimizer",), ("optimizer", "activations"), ("activations",))


def every_layout(problem: Problem) -> Iterator[tuple[ParallelPlan, Execution]]:
    """Every layout on all GPUs of one or a few hosts that fits, by trying all of them."""
    workload, gpus, layers = problem.workload, problem.gpus, len(problem.workload.layers)
    ways = Ways(problem)
    size = min(problem.topology.domain.size, gpus)
    degrees = [1, 2, 3, 4, 6, 8, 12, 16, 24]
    for tp, pp, vpp, ep, etp, micro_batch in product(degrees, degrees, CHUNKS, degrees, degrees, (1, 2, 4, 8)):
        cut = tp * pp
        if gpus % cut or tp > size or etp * ep > size or pp * vpp > layers or etp not in (1, tp):
            continue
        dp = gpus // cut
        if problem.global_batch % (dp * micro_batch) or (vpp > 1 and pp == 1) or gpus // pp % (ep * etp):
            continue
        for recompute, execution in product(("none", "selective", "full"), ways.executions):
            if (execution.schedule == "zero_bubble" and (pp == 1 or vpp > 1)) or (execution.expert_overlap and ep == 1):
                continue
            options: dict[str, Any] = {"sequence_parallel": tp > 1, "recompute": recompute}
            options |= {"tp": tp, "pp": pp, "vpp": vpp, "ep": ep, "etp": etp, "stages": ways.stages.stages(pp, vpp)}
            try:
                plan = ParallelPlan(gpus, problem.global_batch, micro_batch, num_layers=layers, **options)
                check_divisibility(workload, plan)
            except Refusal:
                continue
            modules = ((), CHEAP) if problem.what_if and recompute == "none" else ((),)
            for again, moved in product(modules, OFFLOADS if problem.what_if else ((),)):
                run = replace(execution, recompute_modules=again, offload=moved)
                sharded = replace(plan, zero=3)
                if fits(problem, plan, run):
                    yield plan, run
                elif problem.what_if and pp == 1 and dp > 1 and fits(problem, sharded, run):
                    yield sharded, run  # where the same fits with whole weights, sharding them only costs


def fits(problem: Problem, plan: ParallelPlan, run: Execution) -> bool:
    return predict_memory(problem.workload, plan, run, problem.topology).fits(problem.topology)


#: A minute's worth of the same test, left to `make verify`.
LONG = ("mixture, two hosts", "mixture, part of a rack", "mixture, what if")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.verify) if n in LONG else n for n in PROBLEMS])
def test_the_best_are_the_best_of_every_layout_there_is(name: str) -> None:
    problem = replace(PROBLEMS[name], exact=True)
    best: dict[Any, float] = {}
    for plan, run in every_layout(problem):
        layout = (plan.tp, plan.pp, plan.ep, plan.etp, plan.zero == 3)
        best[layout] = min(
            best.get(layout, float("inf")), time_of(problem.workload, plan, run, problem.topology).step_s
        )
    assert len(best) > 3
    for top in (1, 3, 5):
        answer = search(problem, top)
        found = [answer.winner, *(loser.scored for loser in answer.runners_up)]
        assert [scored.time.step_s for scored in found] == pytest.approx(sorted(best.values())[:top], rel=1e-9)


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_on_random_problems_no_layout_that_fits_is_faster_than_the_winner(data: st.DataObject) -> None:
    model = data.draw(st.sampled_from([dense(5), dense(8), mixture(), mixture(3)]), "model")
    problem = Problem(
        model,
        data.draw(st.sampled_from([8, 24, 36, 64]), "batch"),
        machine(data.draw(st.sampled_from(["h100", "gb200-nvl72"])), data.draw(st.floats(3.5, 16.0), "GB")),
        data.draw(st.sampled_from([3, 4, 6, 12, 16]), "gpus"),
        what_if=data.draw(st.booleans(), "what if"),
    )
    ways = Ways(problem)
    slow: dict[Any, float] = {}
    for degrees in Space(problem, ways.stages).degrees():
        for execution in (each for each in ways.executions if ways.runs(degrees, each)):
            fitting: list[Relief] = []
            for relief in ways.reliefs(degrees).values():
                if any(relief.beyond(less) for less in fitting):
                    continue
                setting = ways.setting(degrees, execution, relief)
                if predict_memory(model, *setting).fits(problem.topology):
                    fitting.append(relief)
                    layout = (*degrees[:3], *degrees[4:6], relief.zero == 3)
                    slow[layout] = min(slow.get(layout, float("inf")), time_of(model, *setting).step_s)
    try:
        answer = search(problem, top=3)
    except Refusal:
        assert not slow
        return
    found = [each.time.step_s for each in (answer.winner, *(loser.scored for loser in answer.runners_up))]
    assert found == pytest.approx(sorted(slow.values())[:3], rel=1e-11)


def test_stages_share_out_the_work_where_layers_or_the_head_differ() -> None:
    stream = Stream(512, 2048)
    block = layer(stream, attention(stream, 8, 8, 64), mlp(stream, 2048))
    wide = layer(stream, attention(stream, 8, 8, 64), mlp(stream, 8192))
    for blocks, vocab in (((block,) * 8, 200_000), ((wide,) * 3 + (block,) * 9, 512), ((block,) * 5, 512)):
        choice = StageChoice(assemble(stream, vocab, blocks))
        for pp, vpp in ((2, 1), (3, 1), (4, 1), (2, 2)):
            stages = choice.stages(pp, vpp)
            assert [index for chunk in stages for index in chunk] == list(range(len(blocks)))
            assert all(stages) and len(stages) == pp * vpp
            if vpp == 1:  # no cut anywhere else leaves the busiest rank more than a layer better off
                loads = [sum(choice.costs[i] for i in chunk) for chunk in stages]
                loads[-1] += choice.head
                fair = (sum(choice.costs) + choice.head) / pp
                assert max(loads) <= max(fair, choice.head + choice.costs[-1]) + max(choice.costs)
    large_head, no_head = (StageChoice(assemble(stream, vocab, (block,) * 8)) for vocab in (200_000, 512))
    assert len(large_head.stages(4, 1)[-1]) == 1  # it is worth several layers
    assert [len(chunk) for chunk in no_head.stages(4, 1)] == [2, 2, 2, 2]


MACHINES = (("h100", 8), ("h100", 64), ("h100", 96), ("gb200-nvl72", 72), ("a100-40gb", 1))


@cache
def plans_for(preset: str, hardware: str, gpus: int, dtype: str) -> tuple[Scored, ...]:
    config = load(preset)
    workload = workload_of(config.model_spec(), config.data.seq_len, {"float32": 4, "bfloat16": 2}[dtype])
    problem = Problem(workload, 96, load_hardware(hardware), gpus, dtype)  # type: ignore[arg-type]
    try:
        answer = search(problem)
    except Refusal:
        return ()
    return (answer.winner, *(loser.scored for loser in answer.runners_up))


@pytest.mark.parametrize("hardware, gpus", MACHINES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_plan_is_one_that_the_trainer_takes(hardware: str, gpus: int, dtype: str) -> None:
    emitted = 0
    for preset in PRESETS:
        config = load(preset)
        for scored in plans_for(preset, hardware, gpus, dtype):
            emitted += 1
            plan = scored.plan
            refuse_unsupported(plan, scored.execution, has_experts=scored.workload.has_experts)
            check_divisibility(scored.workload, plan)
            values = config.resolved()
            values["run"]["dtype"] = dtype
            values["train"] |= {"global_batch": 96, "micro_batch": plan.micro_batch}
            keys = ("tp", "pp", "vpp", "ep", "etp", "sequence_parallel", "zero", "recompute")
            values["parallel"] = {key: getattr(plan, key) for key in keys}
            values["parallel"]["stages"] = [len(chunk) for chunk in plan.stages]
            assert parse(values, preset).plan(plan.world_size) == plan
    assert emitted >= 3


@pytest.mark.parametrize("hardware, gpus", [("h100", 64), ("h100", 96), ("gb200-nvl72", 72), ("gb200-nvl72", 288)])
def test_no_domain_local_group_crosses_a_domain(hardware: str, gpus: int) -> None:
    crossed = set()
    for preset in ("hybrid-moe-30b-a3b", "hybrid-1b"):
        for scored in plans_for(preset, hardware, gpus, "bfloat16"):
            for axes in (("tp",), ("tp", "cp"), ("etp", "ep")):
                for ranks in scored.plan.group(axes):
                    assert len({rank // scored.domain_ranks for rank in ranks}) == 1, (scored.label, axes)
            crossed |= {scored.placement.crossing("dp") or scored.placement.crossing("pp")}
    assert crossed == {gpus > load_hardware(hardware).domain.size}


def test_groups_of_three_fill_domains_that_they_divide() -> None:
    model, racks = mixture(experts=24), load_hardware("gb200-nvl72")
    answer = search(Problem(model, 288, racks, 288, fixed={"ep": 24}))
    assert answer.winner.domain_ranks == 72
    assert search(Problem(model, 288, racks, 256, fixed={"ep": 8})).winner.domain_ranks == 64
    assert search(Problem(model, 48, machine(), 6, fixed={"ep": 6})).winner.plan.world_size == 6
    with pytest.raises(Refusal, match="group across domains"):
        search(Problem(model, 48, machine(), 24, fixed={"ep": 6}))


def test_gpus_that_fill_racks_are_these_racks() -> None:
    answer = search(Problem(mixture(experts=64), 2048, load_hardware("gb200-nvl72"), 8 * 72))
    for scored in (answer.winner, *(loser.scored for loser in answer.runners_up)):
        assert scored.placement.domains <= 8
        assert 72 % (scored.plan.tp) == 0


def test_gpus_that_do_not_divide_are_left_idle_and_told_or_refused() -> None:
    problem = Problem(dense(), 32, machine(), 7)
    answer = search(problem)
    assert answer.winner.plan.world_size < 7
    assert any(
        re.search(rf"^{7 - answer.winner.plan.world_size} of 7 GPUs stay idle", line) for line in answer.warnings
    )
    exact = search(replace(problem, gpus=6, global_batch=36, exact=True))
    assert exact.winner.plan.world_size == 6
    with pytest.raises(Refusal, match=r"no layout over 11 x .* divides global_batch"):
        search(replace(problem, gpus=11, exact=True))


#: Sampled by name: hypothesis prints its arguments.
CASES = st.sampled_from(["dense, three hosts, batch of 48", "mixture, two hosts"])


@given(CASES, st.floats(3.0, 12.0), st.floats(1.0, 3.0))
@settings(max_examples=6)
def test_more_memory_never_makes_the_best_slower(name: str, memory_gb: float, more: float) -> None:
    def best_s(size: float) -> float:
        try:
            return search(replace(PROBLEMS[name], topology=machine(memory_gb=size)), top=1).winner.time.step_s
        except Refusal:
            return float("inf")

    assert best_s(memory_gb * more) <= best_s(memory_gb) * (1 + 1e-12)


@given(CASES, st.floats(5.0, 12.0), st.sampled_from(["h100", "gb200-nvl72", "mi300x", "trainium2"]))
@settings(max_examples=6)
def test_twice_the_bandwidth_never_makes_the_best_slower(name: str, memory_gb: float, hardware: str) -> None:
    problem = PROBLEMS[name]
    steps = [
        search(replace(problem, topology=machine(hardware, memory_gb, links)), top=1).winner.time.step_s
        for links in (1, 2)
    ]
    assert steps[1] <= steps[0]


def test_the_same_problem_has_the_same_answer() -> None:
    first, second = (search(PROBLEMS["mixture, two hosts"]).to_dict() | {"seconds": 0} for _ in range(2))
    assert first == second


def test_what_the_planner_may_not_choose_stays() -> None:
    fixed = {"tp": 2, "micro_batch": 2, "recompute": "full", "zero": 0}
    answer = search(replace(PROBLEMS["dense, one host, plenty of memory"], fixed=fixed))
    for scored in (answer.winner, *(loser.scored for loser in answer.runners_up)):
        assert {name: getattr(scored.plan, name) for name in fixed} == fixed


@pytest.mark.parametrize("what_if", [False, True])
def test_an_execution_that_is_given_is_the_only_one(what_if: bool) -> None:
    given = Execution("bfloat16", schedule="zero_bubble", expert_overlap=True, routing="real")
    answer = search(replace(PROBLEMS["mixture, two hosts"], what_if=what_if, execution=given))
    for scored in (answer.winner, *(loser.scored for loser in answer.runners_up)):
        assert replace(scored.execution, recompute_modules=(), offload=()) == given
        assert scored.time == time_of(scored.workload, scored.plan, scored.execution, scored.topology)


def test_only_what_if_goes_beyond_the_engine_and_says_so() -> None:
    problem = PROBLEMS["dense, what if"]
    answer = search(problem)
    assert {"fp8 (planned)", "tensor_overlap (model only)"} <= set(answer.beyond)
    plain = search(replace(problem, what_if=False))
    assert plain.beyond == ()
    assert answer.winner.time.step_s < plain.winner.time.step_s


def test_the_reasons_are_those_of_the_numbers() -> None:
    answer = search(PROBLEMS["mixture, two hosts"])
    assert len(answer.runners_up) == 4
    last = answer.winner.time.step_s
    for loser in answer.runners_up:
        best, other = answer.winner, loser.scored
        assert other.time.step_s >= last
        last = other.time.step_s
        said = re.match(
            r"([+-][0-9.]+) % \(([0-9.e-]+) s against ([0-9.e-]+) s\): (.*?): (.*?) ([+-][0-9.]+) %", loser.reason
        )
        assert said, loser.reason
        assert float(said[1]) == pytest.approx(100 * (other.time.step_s / best.time.step_s - 1), abs=0.051)
        differences = {part: other.time.parts[part] - best.time.parts[part] for part in PARTS}
        assert said[5] == max(differences, key=lambda part: differences[part])
        assert float(said[6]) == pytest.approx(100 * differences[said[5]] / best.time.step_s, abs=0.051)
        for cause in said[4].split(" and "):
            name, mine, theirs = re.match(r"(.*) (\S+) instead of (\S+)", cause).groups()  # type: ignore[union-attr]
            name = name.replace("-", "_")
            assert mine != theirs
            held = getattr(other.plan if hasattr(other.plan, name) else other.execution, name)
            assert mine in (str(held), "on" if held else "off", "+".join(held) if isinstance(held, tuple) else mine)


def test_every_part_of_a_step_has_its_likely_causes() -> None:
    assert set(PARTS) <= set(CAUSES)
    answer = search(PROBLEMS["dense, what if"])
    for names in CAUSES.values():
        for name in names:
            assert hasattr(answer.winner.plan, name) or hasattr(answer.winner.execution, name), name


def test_what_the_error_bars_cannot_tell_apart_is_said_with_the_simplest() -> None:
    answer = search(PROBLEMS["mixture, two hosts"])
    best, others = answer.winner, [loser.scored for loser in answer.runners_up]

    def with_bars(scored: Scored, factor: float) -> Scored:
        step_s = scored.time.step_s
        return replace(scored, time=replace(scored.time, low_s=step_s / factor, high_s=step_s * factor))

    assert indistinct(with_bars(best, 1), [with_bars(other, 1) for other in others[1:]]) == ""
    wide = indistinct(with_bars(best, 10), [with_bars(other, 10) for other in others])
    assert "not distinguishable from the next best 4" in wide
    plans = {scored.label: scored.plan for scored in (best, *others)}
    simplest = min(plans, key=lambda label: (plans[label].tp * plans[label].pp, plans[label].ep * plans[label].etp))
    assert simplest in wide or (simplest == best.label and "also the simplest" in wide)


def test_when_nothing_fits_the_refusal_says_what_is_missing_and_what_would_fit() -> None:
    problem = Problem(deepseek(), 512, load_hardware("h100"), 16)
    with pytest.raises(Refusal) as refused:
        search(problem)
    text = str(refused.value)
    said = re.search(
        r"pipeline rank \d+ needs up to ([0-9.]+) GB of ([0-9.]+) GB, ([0-9.]+) GB too much \((\w+) ", text
    )
    assert said and said[4] in ("weights", "optimizer", "gradients"), text
    assert float(said[1]) - float(said[2]) == pytest.approx(float(said[3]), abs=0.11)
    gpus = int(re.search(r"(\d+) GPUs", text)[1])  # type: ignore[index]
    assert search(replace(problem, gpus=gpus)).winner.plan.world_size <= gpus
    with pytest.raises(Refusal, match="nothing fits"):
        search(replace(problem, gpus=gpus - 16))


def test_a_choice_that_keeps_a_model_from_fitting_is_named() -> None:
    problem = replace(PROBLEMS["dense, one host, little memory"], fixed={"tp": 1, "pp": 1, "micro_batch": 4})
    with pytest.raises(Refusal, match=r"with (tp|pp|micro_batch) left to the planner"):
        search(problem)


EXPLAIN = PROBLEMS["dense, one host, little memory"]


def judge(text: str, problem: Problem = EXPLAIN) -> Any:
    return explain(problem, text, time_of, predict_memory)


def test_the_planners_own_layout_is_its_own_choice() -> None:
    plan = search(EXPLAIN).winner.plan
    names = ("tp", "pp", "vpp", "ep", "etp", "micro_batch", "recompute")
    judged = judge(",".join(f"{name}={getattr(plan, name)}" for name in names))
    assert judged.fits and judged.scored.plan == plan
    assert judged.verdict == "the planner's own choice"


def test_what_a_layout_of_ones_own_leaves_open_is_chosen_for_it() -> None:
    problem = replace(EXPLAIN, global_batch=16)
    judged = judge("pp=4,vpp=2", problem)  # at micro-batch 4 there are too few of them to interleave
    assert judged.fits
    plans = [replace(judged.scored.plan, micro_batch=size, recompute="none") for size in (1, 2)]
    fitting = [plan for plan in plans if fits(problem, plan, judged.scored.execution)]
    times = [time_of(problem.workload, plan, judged.scored.execution, problem.topology).step_s for plan in fitting]
    assert judged.scored.time.step_s == min(times)


def test_a_slower_layout_of_ones_own_is_told_by_how_much_and_why() -> None:
    judged = judge("tp=8")
    assert judged.fits and judged.scored.plan.tp == 8
    slower = 100 * (judged.scored.time.step_s / judged.answer.winner.time.step_s - 1)
    assert slower > 1
    assert judged.verdict.startswith(f"+{slower:.1f} %")
    assert judged.verdict == why_slower(judged.answer.winner, judged.scored)


@pytest.mark.parametrize(
    "text, message",
    [
        ("tp=3", "tp\\*cp\\*pp = 3\\*1\\*1 = 3 does not divide world_size=8.*tp=2 or 4"),
        ("tp=8,ep=2", "ep=2 shards experts and the model has none"),
        ("cp=2", "axis cp is planned"),
        ("pp=2,vpp=8", "16 chunks|cannot fill"),
        ("dp=4", "dp=4: tp, cp and pp leave dp=8 of 8 GPUs"),
        ("micro_batch=5", "dp\\*micro_batch"),
    ],
)
def test_a_layout_that_cannot_be_is_told_why(text: str, message: str) -> None:
    judged = judge(text)
    assert judged.scored is None and not judged.fits
    assert judged.verdict.startswith("not possible: ")
    assert re.search(message, judged.verdict), judged.verdict


def test_a_layout_that_does_not_fit_is_told_what_is_missing() -> None:
    judged = judge("pp=1,micro_batch=4,recompute=none")
    assert judged.scored is not None and not judged.fits
    assert re.search(r"does not fit: .* GB too much .*; with \w+ left to the planner it does", judged.verdict)


@pytest.mark.parametrize(
    "text, message",
    [
        ("tpp=2", "'tpp' is no axis and no choice of a plan: did you mean [tv]?pp?"),
        ("micro-batch=2", "did you mean micro_batch"),
        ("tp", "'tp' must be tp=a number"),
        ("tp=two", "must be tp=a number"),
        ("recompute=some", "recompute=none|selective|full"),
    ],
)
def test_a_name_or_value_that_is_none_is_refused_with_the_nearest(text: str, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        judge(text)


def test_p9_planning_loads_neither_torch_nor_what_is_slow_to_load() -> None:
    code = (
        "import sys, parallel.planning.search.planner, parallel.planning.search.judgement\n"
        "slow = {'torch', 'megatron', 'numba', 'zarr', 'wandb', 'pydantic', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(slow)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def known(model: Workload, batch: int, hardware: str, gpus: int, what_if: bool) -> Scored:
    return planner.search(Problem(model, batch, load_hardware(hardware), gpus, what_if=what_if), top=1).winner


def test_known_answer_a_rack_takes_wide_expert_groups_and_a_short_pipeline() -> None:
    """DeepSeek-V3: tp 1, pp 2 to 4, ep 32 to 64 on NVL72; on 8-GPU nodes much pipeline, and a third of the speed
    (arXiv 2603.07685, table 17; Megatron-Bridge performance summary, 2026-08)."""
    published = known(deepseek(), 2048, "gb200-nvl72", 256, what_if=True)
    assert published.plan.tp == 1 and published.plan.pp in (2, 4) and published.plan.ep in (32, 64), published.label
    rack = known(deepseek(), 2048, "gb200-nvl72", 256, what_if=False)
    nodes = known(deepseek(), 8192, "h100", 1024, what_if=False)
    assert rack.plan.tp * rack.plan.pp <= 8 and rack.plan.ep in (32, 64), rack.label
    assert nodes.plan.pp >= 16 and nodes.plan.ep <= 8, nodes.label
    speeds = [scored.tokens_per_s / scored.plan.world_size for scored in (rack, nodes)]
    assert 2 < speeds[0] / speeds[1] < 4


@pytest.mark.parametrize("what_if", [False, True])
def test_known_answer_memory_moves_pipeline_and_tensor_parallelism(what_if: bool) -> None:
    """Llama-3.1-405B: tp * cp of 4 to 16, and less model parallelism the more memory a device has (Megatron-Bridge
    performance summary and MLPerf Training, 2026-08)."""
    stream = Stream(16384, 8192)
    block = layer(stream, attention(stream, 128, 8, 128), mlp(stream, 53248))
    model = assemble(stream, 128256, (block,) * 126)
    plans = [known(model, 512, *place, what_if).plan for place in (("h100", 1024), ("gb300-nvl72", 512))]
    cuts = [plan.tp * plan.cp * plan.pp for plan in plans]
    assert all(2 <= plan.tp * plan.cp <= 16 for plan in plans), plans
    assert cuts[0] >= cuts[1] >= 8
