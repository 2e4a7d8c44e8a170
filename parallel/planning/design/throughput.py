"""How fast a shape trains: the best of a short list of layouts. No torch.

The planner proper tries thousands of layouts of one model; a designer tries hundreds of models. What a practitioner
would write down first is enough to tell them apart: as little model parallelism as fits, experts over as much of a
domain as divides them, pipelines across.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

from parallel.planning.execution import Execution, Precision
from parallel.planning.memory.prediction import MemoryPrediction, predict_memory
from parallel.planning.plan import ParallelPlan, Recompute
from parallel.planning.timing.calibration import Calibration
from parallel.planning.timing.step_time import predict_time
from parallel.planning.timing.work import WorkTable
from parallel.planning.topology import HardwareTopology
from parallel.planning.workload import Workload

#: Model parallelism (tp * pp) that is tried, least first, until a level after the first that fits easily.
LEVELS = (1, 2, 4, 8, 16, 32, 64)
TENSOR = (1, 2, 4)
#: Of a pipeline rank, interleaved.
MOST_CHUNKS = 8
#: Rows of an expert's product, below which it is far from its peak.
EXPERT_ROWS = 512
MICRO_BATCHES = (1, 2, 4)
#: By how much of itself the batch may differ from what was asked, so that ranks divide it.
BATCH_OFF = 0.25
#: Of usable memory, what weights, gradients and optimizer state may take: activations want the rest.
STATE_SHARE = 0.85
STATE = ("weights", "gradients", "optimizer")


@dataclass(frozen=True)
class Throughput:
    """Of all GPUs together; ``low`` and ``high`` by the error bars of the step time."""

    tokens_per_s: float
    low: float
    high: float
    plan: ParallelPlan | None = None
    memory_bytes: float | None = None


def short_list(
    topology: HardwareTopology,
    gpus: int,
    batch_tokens: int,
    precision: Precision = "bfloat16",
    calibration: Calibration | None = None,
) -> Callable[[Workload], Throughput | None]:
    """The predictor of ``design.search``: a workload's throughput under the fastest listed layout that fits."""
    execution = Execution(precision=precision)
    room = STATE_SHARE * topology.known("device.memory_bytes")

    def predict(workload: Workload) -> Throughput | None:
        table = WorkTable(workload, execution, topology)
        held: Counter[tuple[str, ...]] = Counter()
        for block in workload.blocks:
            held.update(block.parameters_by_axes())
        sequences = batch_tokens // workload.seq_len
        found: list[Throughput] = []
        for level in LEVELS:
            # Once one fits without running all of forward twice, another level may be faster, and none after that.
            enough = any(each.plan and each.plan.recompute != "full" for each in found)
            for ways in layouts(workload, topology, gpus, sequences, level):
                if _average_state(held, ways[0], execution) > room:
                    continue
                for plan in ways:
                    memory = predict_memory(workload, plan, execution, topology)
                    if _state_bytes(memory) > room:
                        break  # which recomputation does not change
                    if memory.fits(topology):
                        time = predict_time(workload, plan, execution, topology, calibration, table)
                        tokens = plan.global_batch * workload.seq_len
                        speed = tokens / time.step_s, tokens / time.high_s, tokens / time.low_s
                        found.append(Throughput(*speed, plan, memory.peak))
                        break
            if enough:
                break
        return max(found, key=lambda each: each.tokens_per_s, default=None)

    return predict


def layouts(
    workload: Workload, topology: HardwareTopology, gpus: int, sequences: int, level: int
) -> Iterator[list[ParallelPlan]]:
    """Layouts with tp * pp = ``level``, of about ``sequences`` a step; each as a list of the same degrees, that which
    keeps most activations first."""
    world, in_domain = usable(topology, gpus)
    rules = list(workload.divisors())
    for tp in TENSOR:
        pp = level // tp
        cut = [rule.size for rule in rules if rule.axis == "tp"]
        if tp * pp != level or tp > in_domain or any(size % tp for size in cut) or pp > len(workload.layers):
            continue
        if world % level:
            continue
        dp = world // level
        for ep, micro_batch in _experts(workload, in_domain, world // pp, tp):
            step = dp * micro_batch
            batch = round(sequences / step) * step
            if abs(batch - sequences) > BATCH_OFF * sequences:
                continue
            yield [
                ParallelPlan(
                    world,
                    batch,
                    micro_batch,
                    num_layers=len(workload.layers),
                    tp=tp,
                    pp=pp,
                    vpp=_chunks(len(workload.layers), pp, batch // step),
                    ep=ep,
                    sequence_parallel=tp > 1,
                    recompute=recompute,
                )
                for recompute in get_args(Recompute)
            ]


def _chunks(layers: int, pp: int, micro_batches: int) -> int:
    """Chunks of a pipeline rank: the most that share the layers out evenly, where interleaving can run."""
    if pp == 1 or micro_batches % pp:
        return 1
    return max(v for v in range(1, MOST_CHUNKS + 1) if v == 1 or layers % (pp * v) == 0)


def usable(topology: HardwareTopology, gpus: int) -> tuple[int, int]:
    """(ranks in all, ranks of a domain): several domains leave their spares idle, and what does not fill one."""
    size = topology.domain.size
    if gpus <= size:
        return gpus, gpus
    return gpus // size * (size - topology.spares), size - topology.spares


def _experts(workload: Workload, in_domain: int, ranks: int, tp: int) -> list[tuple[int, int]]:
    """Expert parallelism and micro-batch, such that an expert's product has rows enough; (1, 1) without experts."""
    routed = next((e for layer in workload.layers for e in layer.exchanges if e.axis == "ep"), None)
    if routed is None:
        return [(1, 1)]
    for ep in range(min(in_domain, routed.experts), 0, -1):
        if routed.experts % ep or in_domain % ep or ranks % ep:
            continue
        rows = workload.seq_len / tp * routed.visits * ep / routed.experts
        micro_batch = next((size for size in MICRO_BATCHES if size * rows >= EXPERT_ROWS), None)
        if micro_batch:
            return [(ep, micro_batch)]
    return []


def _average_state(held: Mapping[tuple[str, ...], int], plan: ParallelPlan, execution: Execution) -> float:
    """Bytes of weights, gradients and optimizer state on an average rank; ``held``: parameters by the axes that cut
    them."""
    fixed = execution.element_bytes + execution.gradient_bytes
    sharded = execution.master_bytes + 2 * execution.moment_bytes
    found = 0.0
    for axes, parameters in held.items():
        cut, replicas = (plan.ep, plan.edp) if "ep" in axes else (plan.tp if "tp" in axes else 1, plan.dp)
        found += parameters / (cut * plan.pp) * (fixed + sharded / replicas)
    return found


def _state_bytes(memory: MemoryPrediction) -> float:
    return max(sum(stage.components[name] for name in STATE) for stage in memory.stages)
