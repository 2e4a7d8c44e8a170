"""Step time: what hides what, and the pipeline's formula against the simulator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.planning.execution import Execution
from parallel.planning.models.mixers import attention
from parallel.planning.models.operations import Stream, assemble, layer, mlp, moe
from parallel.planning.plan import ParallelPlan
from parallel.planning.schedule import table_of
from parallel.planning.timing.calibration import CONSTANTS, Calibration, Efficiencies, load_calibration, priors
from parallel.planning.timing.layers import COLUMN, COLUMNS
from parallel.planning.timing.simulator import Durations, simulate
from parallel.planning.timing.step_time import PARTS, critical_path, predict_time, steps_s
from parallel.planning.timing.work import StepWork, WorkTable, stacked
from parallel.planning.topology import hardware_names, load_hardware
from parallel.planning.workload import Workload

H100, GB200 = load_hardware("h100"), load_hardware("gb200-nvl72")
PERFECT = Efficiencies(
    **dict.fromkeys(("product", "quantised", "experts", "quantised_experts", "attention", "linear", "memory"), 1.0),
    **dict.fromkeys(("routing", "links", "exchange", "overlap"), 1.0),
    **dict.fromkeys(("kernel_gap_s", "kernel_host_s", "routed_kernel_s", "expert_kernel_s", "step_s"), 0.0),
    **dict.fromkeys(("tensor_overlap", "expert_overlap", "contention", "weights_contention", "stragglers"), 0.0),
)


def model(layers: int = 8, experts: int = 0) -> Workload:
    stream = Stream(2048, 2048)
    ffn = moe(stream, experts, 2, 4096) if experts else mlp(stream, 8192)
    return assemble(stream, 32000, (layer(stream, attention(stream, 16, 16, 128), ffn),) * layers)


def plan_of(world: int, batch: int = 64, layers: int = 8, **degrees: object) -> ParallelPlan:
    return ParallelPlan(world, batch, 1, num_layers=layers, **degrees)  # type: ignore[arg-type]


def work_of(seconds: dict[str, float], **fields: float) -> StepWork:
    """One kind of rank with so many seconds in forward and in backward, of one micro-batch."""
    columns = np.zeros((1, 2, len(COLUMNS)))
    for name, value in seconds.items():
        columns[0, :, COLUMN[name]] = value
    once = {name: np.array([fields.pop(name, 0.0)]) for name in ("reduce_s", "gather_s", "optimizer_s")}
    defaults = {"hop_s": 0.0, "micro_batches": 1, "pp": 1, "vpp": 1, "world_size": 1}
    return StepWork(columns, np.array([float(fields.get("pp", 1))]), **once, **{**defaults, **fields})  # type: ignore[arg-type]


def test_the_parts_sum_to_the_step_and_are_all_named() -> None:
    told = predict_time(
        model(experts=8), plan_of(16, pp=2, vpp=2, ep=4, tp=2, sequence_parallel=True), Execution(), H100
    )
    assert tuple(told.parts) == PARTS
    assert sum(told.parts.values()) == pytest.approx(told.step_s, rel=1e-12)
    assert all(seconds >= 0 for seconds in told.parts.values())
    assert told.low_s < told.step_s < told.high_s
    assert len(told.stages) == 2


def test_reduction_hides_under_the_last_backward_pass_and_the_rest_is_in_the_way() -> None:
    parts = critical_path(work_of({"product": 1.0}, reduce_s=0.8, gather_s=0.0), PERFECT)[1]
    assert parts["gradient reduction"] == 0
    parts = critical_path(work_of({"product": 1.0}, reduce_s=1.7, gather_s=1.2), PERFECT)[1]
    assert parts["gradient reduction"] == pytest.approx(0.7 + 0.2)
    assert sum(parts.values()) == pytest.approx(2.0 + 0.9)


def test_kernels_wait_for_the_host_where_it_is_slower() -> None:
    slow_host = replace(PERFECT, kernel_host_s=1e-3)
    step = float(steps_s(work_of({"memory": 0.01, "kernels": 1000}), slow_host))
    assert step == pytest.approx(2.0, rel=1e-6)
    busy = float(steps_s(work_of({"memory": 1.0, "kernels": 10}), slow_host))
    assert busy == pytest.approx(2.0, rel=1e-6)


def test_sharded_weights_hide_under_computation_and_slow_it() -> None:
    contended = replace(PERFECT, weights_contention=0.25)
    assert float(steps_s(work_of({"product": 1.0, "weights": 0.4}), contended)) == pytest.approx(2.2)
    assert float(steps_s(work_of({"product": 1.0, "weights": 1.4}), contended)) == pytest.approx(2 * (1.4 + 0.25))


@given(
    p=st.integers(2, 8),
    groups=st.integers(1, 6),
    v=st.integers(1, 4),
    uneven=st.floats(0, 0.3),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_the_pipeline_formula_agrees_with_the_simulator(p: int, groups: int, v: int, uneven: float, seed: int) -> None:
    """Stages that differ by up to 30 %: never more than 12 % apart, exact where they are even."""
    m, rng = p * groups, np.random.default_rng(seed)
    plan = ParallelPlan(p, m, 1, num_layers=p * v, pp=p, vpp=v)
    of_rank = 1 + uneven * rng.random(p)
    durations = Durations(tuple(of_rank.tolist() * v), tuple((2 * of_rank).tolist() * v))
    played = simulate(table_of(plan, Execution()), durations).makespan_s
    columns = np.zeros((p, 2, len(COLUMNS)))
    columns[:, 0, COLUMN["product"]], columns[:, 1, COLUMN["product"]] = of_rank * v, 2 * of_rank * v
    none = np.zeros(p)
    step = float(steps_s(StepWork(columns, np.ones(p), none, none, none, 0.0, m, p, v, p), PERFECT))
    assert step == pytest.approx(played, rel=0.12 if uneven else 1e-9)


def test_zero_bubble_fills_the_bubble_with_gradients_of_weights() -> None:
    """Forward 1, gradient of the input 1, of the weight 1: (p - 1)(F + I - W) is left of the bubble."""
    columns = np.zeros((1, 2, len(COLUMNS)))
    columns[0, 0, COLUMN["product"]], columns[0, 1, COLUMN["product"]] = 1.0, 2.0
    none = np.zeros(1)
    for zero_bubble, bubble in ((0.0, 3 * 3.0), (1.0, 3 * 1.0)):
        work = StepWork(columns, np.array([4.0]), none, none, none, 0.0, 8, 4, 1, 4, zero_bubble)
        assert critical_path(work, PERFECT)[1]["pipeline bubble"] == pytest.approx(bubble)


def test_more_ranks_straggle_more() -> None:
    late = replace(PERFECT, stragglers=0.01)
    times = [float(steps_s(work_of({"product": 1.0}, world_size=world), late)) for world in (1, 8, 16, 8192)]
    assert times == pytest.approx([2.0, 2.0, 2.0 * 1.01, 2.0 * 1.10])


@pytest.mark.parametrize("name", [n for n in hardware_names() if n != "cpu"])
def test_every_accelerator_has_a_prediction_within_its_peak(name: str) -> None:
    topology = load_hardware(name)
    plan = plan_of(topology.domain.size if topology.domain.size == 8 else 8)
    told = predict_time(model(), plan, Execution(), topology)
    flops = model().training_flops * 64 * 2048 / plan.world_size
    assert 0.05 < flops / told.step_s / topology.peak("bfloat16") < 0.95


def test_side_by_side_predictions_are_those_made_alone() -> None:
    workload, calibration = model(experts=8), load_calibration()
    table = WorkTable(workload, Execution(), GB200)
    plans = [plan_of(16), plan_of(16, ep=8), plan_of(16, pp=4), plan_of(16, pp=2, vpp=2, tp=2, sequence_parallel=True)]
    together = steps_s(stacked([table.step(plan) for plan in plans]), calibration.efficiencies(GB200, Execution()))
    alone = [predict_time(workload, plan, Execution(), GB200).step_s for plan in plans]
    assert together.tolist() == pytest.approx(alone, rel=1e-12)


def test_an_unseen_generation_takes_the_nearest_earlier_one() -> None:
    told = Calibration(priors(), {}, {})

    def routing(year: int, month: int) -> float:
        return float(told.efficiencies(GB200, Execution(generation=(year, month))).routing)

    assert routing(2025, 12) == routing(2025, 11) != routing(2025, 10)
    assert routing(2031, 1) == routing(2026, 2)


def test_constants_are_few_and_named_once() -> None:
    assert len(CONSTANTS) <= 40
    assert len({constant.name for constant in CONSTANTS}) == len(CONSTANTS)
    assert set(load_calibration().values) == {constant.name for constant in CONSTANTS}


def test_hardware_without_fitted_runs_has_a_wider_bar() -> None:
    def bar(name: str) -> float:
        """Without what is not explained, which is another share of either step."""
        told = predict_time(model(), plan_of(8), Execution(), load_hardware(name))
        unknown = told.parts["not explained"]
        assert told.high_s - told.step_s > unknown, "it may be twice as much"
        return (told.high_s - 2 * unknown) / (told.step_s - unknown)

    assert bar("trainium2") == pytest.approx(bar("h100") ** 1.5)
