"""All pictures of a plan on its machine, in the order in which they are read. No torch."""

from __future__ import annotations

from parallel.planning.drawings import axes, layers_drawing
from parallel.planning.execution import Execution
from parallel.planning.memory.prediction import MemoryPrediction
from parallel.planning.pictures.memory_bars import memory_picture
from parallel.planning.pictures.rack import rack_picture
from parallel.planning.pictures.roofline import Predict, layer_points, roofline_picture
from parallel.planning.pictures.shapes import PALETTE, Picture
from parallel.planning.pictures.step_bars import step_picture
from parallel.planning.pictures.timeline import timeline_picture
from parallel.planning.placement import place
from parallel.planning.plan import ParallelPlan
from parallel.planning.schedule import Table, interleaved, one_f_one_b, zb_h1
from parallel.planning.timing.simulator import Durations, Timeline, simulate
from parallel.planning.timing.step_time import StageTime, TimePrediction, predict_time
from parallel.planning.topology import HardwareTopology
from parallel.planning.workload import Workload

#: Share of a backward pass that is the gradient of the weights, for schedules that part the two: products cost the same
#: either way, and attention has no weights.
WEIGHT_SHARE = 0.5


def plan_pictures(
    workload: Workload,
    plan: ParallelPlan,
    execution: Execution,
    topology: HardwareTopology,
    time: TimePrediction,
    memory: MemoryPrediction,
    predict: Predict = predict_time,
) -> list[Picture]:
    """The step, its timeline (of a pipeline), memory, roofline, layers, and the ranks on their devices for each axis.

    ``predict``: what predicted ``time``, asked again for single layers. Refusal as of ``place``.
    """
    placement = place(plan, topology)
    kinds = [layer.kind for layer in workload.layers]
    return [
        step_picture(time),
        *([timeline_picture(plan_timeline(workload, plan, execution, time))] if plan.pp > 1 else []),
        memory_picture(memory, topology),
        roofline_picture(layer_points(workload, plan, execution, topology, predict), topology, execution),
        layers_picture(plan, kinds),
        *(rack_picture(placement, axis) for axis in axes(plan, workload.has_experts)),
    ]


def layers_picture(plan: ParallelPlan, kinds: list[str]) -> Picture:
    legend = tuple((f"box c{index % PALETTE}", kind) for index, kind in enumerate(dict.fromkeys(kinds)))
    rows = tuple((f"pp {pp}", "; ".join(map(_span, plan.chunks(pp)))) for pp in range(plan.pp))
    head = ("pipeline rank", "layers (chunks apart by ;)")
    unit = "left to right is the way of a token"
    return Picture("Layers on pipeline ranks", unit, layers_drawing(plan, kinds), legend, (), head, rows, 2)


def plan_timeline(
    workload: Workload, plan: ParallelPlan, execution: Execution, time: TimePrediction, weight: float = WEIGHT_SHARE
) -> Timeline:
    """The step as its schedule runs it, with the predicted time of each rank shared out over its chunks by FLOPs."""
    forward, backward = [], []
    held = [_flops(workload, plan, chunk) for chunk in range(plan.num_chunks)]
    for chunk, flops in enumerate(held):
        rank: StageTime = time.stages[chunk % plan.pp]
        share = flops / sum(held[chunk % plan.pp :: plan.pp])
        forward.append(rank.forward_s * share)
        backward.append(rank.backward_s * share)
    weights = tuple(weight * seconds for seconds in backward)
    return simulate(plan_table(plan, execution), Durations(tuple(forward), tuple(backward), weights), time.hop_s)


def flops_timeline(workload: Workload, plan: ParallelPlan, execution: Execution) -> Timeline:
    """The step of a machine that nobody measured: a FLOP takes a second wherever it runs, a message no time. Only the
    shares of the step mean anything."""
    forward, backward = [], []
    for chunk, layers in enumerate(plan.stages):
        held = [workload.layers[layer] for layer in layers]
        again = sum(layer.recompute_flops(plan.recompute) for layer in held)
        held += [workload.head] * (chunk == plan.num_chunks - 1)
        forward.append(sum(layer.forward_flops for layer in held))
        backward.append(sum(layer.backward_flops for layer in held) + again)
    weights = tuple(WEIGHT_SHARE * flops for flops in backward)
    return simulate(plan_table(plan, execution), Durations(tuple(forward), tuple(backward), weights))


def plan_table(plan: ParallelPlan, execution: Execution) -> Table:
    """The schedule of a plan."""
    m = plan.num_micro_batches
    if plan.vpp > 1:
        return interleaved(plan.pp, plan.vpp, m, plan.microbatch_group_size(), execution.expert_overlap)
    if execution.schedule == "zero_bubble":
        return zb_h1(plan.pp, m)
    return one_f_one_b(plan.pp, m, execution.expert_overlap)


def _flops(workload: Workload, plan: ParallelPlan, chunk: int) -> float:
    flops = sum(workload.layers[layer].forward_flops for layer in plan.stages[chunk])
    return flops + workload.head.forward_flops * (chunk == plan.num_chunks - 1)


def _span(chunk: tuple[int, ...]) -> str:
    return str(chunk[0]) if len(chunk) == 1 else f"{chunk[0]} to {chunk[-1]}"
