"""Step time from work and efficiencies: which work hides which, and how long the pipeline takes. No torch.

    prediction = predict_time(workload, plan, execution, topology)
    prediction.step_s, prediction.low_s, prediction.high_s, prediction.parts

The formulas take arrays with any leading axes, so that the calibration fits hundreds of runs, and the planner ranks
thousands of plans, in one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parallel.planning.execution import Execution
from parallel.planning.plan import ParallelPlan
from parallel.planning.timing.calibration import Calibration, Efficiencies, load_calibration
from parallel.planning.timing.layers import BACKWARD, COLUMN
from parallel.planning.timing.work import StepWork, WorkTable
from parallel.planning.topology import HardwareTopology
from parallel.planning.workload import Workload

#: Share of memory bandwidth that a large element-wise kernel reaches (STREAM on H100 and B200: 0.85 to 0.93; on shapes
#: of a layer somewhat less).
STREAM = 0.8
#: Power of the spread for an architecture that no fitted run was on: held out, A100 and GB300 lie about as far again.
UNSEEN = 1.5
#: Parts of a step on the critical path, in the order in which they are told.
PARTS = (
    "products",
    "experts",
    "attention",
    "linear attention",
    "memory-bound",
    "host",
    "tensor parallel",
    "expert exchange",
    "context parallel",
    "sharded weights",
    "offload",
    "pipeline bubble",
    "pipeline messages",
    "gradient reduction",
    "optimizer",
    "stragglers",
    "not explained",
)


@dataclass(frozen=True)
class StageTime:
    """One micro-batch on one pipeline rank (all of its chunks), seconds."""

    forward_s: float
    backward_s: float


@dataclass(frozen=True)
class TimePrediction:
    """``low_s`` to ``high_s``: where four of five runs should fall, by the spread of the calibration's held-out errors.
    ``parts``: seconds on the critical path; they sum to ``step_s``. ``stages``: by pipeline rank."""

    step_s: float
    low_s: float
    high_s: float
    parts: dict[str, float]
    stages: tuple[StageTime, ...]
    hop_s: float


def predict_time(
    workload: Workload,
    plan: ParallelPlan,
    execution: Execution,
    topology: HardwareTopology,
    calibration: Calibration | None = None,
    table: WorkTable | None = None,
) -> TimePrediction:
    """The time of a step. ``table``: remembered work of this model and machine, for many calls."""
    calibration = calibration or load_calibration()
    work = (table or WorkTable(workload, execution, topology)).step(plan)
    efficiencies = calibration.efficiencies(topology, execution)
    directions, parts = critical_path(work, efficiencies)
    step_s = float(sum(parts.values()))
    spread = calibration.spread("moe" if workload.has_experts else "dense")
    if not calibration.has_seen(topology):
        spread **= UNSEEN
    unknown_s = float(parts["not explained"])  # may be none of it, or twice as much
    return TimePrediction(
        step_s,
        (step_s - unknown_s) / spread,
        (step_s - unknown_s) * spread + 2 * unknown_s,
        {name: float(parts[name]) for name in PARTS},
        tuple(StageTime(*map(float, directions[kind])) for kind in work.kind_of_rank),
        float(work.hop_s / efficiencies.links),
    )


def steps_s(work: StepWork, efficiencies: Efficiencies) -> np.ndarray:
    """Step times of works side by side (``work.stacked``), seconds."""
    return np.sum(list(critical_path(work, efficiencies)[1].values()), axis=0)


def critical_path(work: StepWork, e: Efficiencies) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(seconds of one micro-batch [..., kinds, 2 directions], seconds of the step by part [...]).

    Work of a kind with ``ranks`` 0 is padding. Leading axes of ``work`` and of ``e`` are runs.
    """
    c = {name: work.columns[..., index] for name, index in COLUMN.items()}
    run, e = e, e.over(2)  # kinds and directions
    busy = {
        "products": c["product"] / e.product + c["quantised"] / e.quantised,
        "experts": c["experts"] / e.experts + c["quantised_experts"] / e.quantised_experts,
        "attention": c["attention"] / e.attention,
        "linear attention": c["linear"] / e.linear,
        "memory-bound": c["memory"] / e.memory + c["routing"] / e.routing + c["streams"] / STREAM,
    }
    device = sum(busy.values())
    gaps = c["kernels"] * e.kernel_gap_s + c["routed_kernels"] * e.routed_kernel_s
    gaps += c["expert_kernels"] * e.expert_kernel_s
    launched = (c["kernels"] + c["routed_kernels"] + c["expert_kernels"]) * e.kernel_host_s
    compute = ((device + gaps) ** 4 + launched**4) ** 0.25
    exposed = {
        "host": compute - device,
        "tensor parallel": c["tensor"] / e.links * (1 - e.tensor_overlap),
        "expert exchange": (c["expert_domain"] + c["expert_network"]) / e.exchange * (1 - e.expert_overlap),
        "context parallel": _beside(c["context"] / e.links, busy["attention"], e.contention),
        "offload": _beside(c["offload"] / e.links, compute, e.contention),
        "sharded weights": _beside(c["weights"] / e.links, compute, e.weights_contention),
    }
    seconds = {**busy, **exposed}
    directions = sum(seconds.values())
    by_kind = directions.sum(-1)
    slowest = np.expand_dims(by_kind.argmax(-1), -1)

    def of_slowest(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, slowest, -1)[..., 0]

    m, p, v = work.micro_batches, work.pp, work.vpp
    parts = {name: m * of_slowest(values.sum(-1)) for name, values in seconds.items()}
    # While the pipeline fills and drains every other kind runs one micro-batch; a zero-bubble schedule (ZB-H1, arXiv
    # 2401.10241) runs gradients of weights meanwhile, half of what products cost in backward.
    weights = (busy["products"] + busy["experts"])[..., BACKWARD] / 2
    waited = by_kind - 2 * weights * np.expand_dims(work.zero_bubble, -1)
    parts["pipeline bubble"] = np.maximum((waited * work.ranks).sum(-1) - of_slowest(waited), 0.0) / v
    # A message each way a micro-batch and chunk; interleaving sends while it computes, but for the first and last ones.
    waits = np.where(np.greater(v, 1), (1 - run.overlap) * m * v, m) + p - 1
    parts["pipeline messages"] = np.where(np.greater(p, 1), 2 * waits * work.hop_s / run.links, 0.0)
    beside_forward, beside_backward = (run.overlap * of_slowest(directions[..., way]) for way in (0, 1))
    parts["gradient reduction"] = _beside(
        of_slowest(work.reduce_s) / run.links, beside_backward, run.contention
    ) + _beside(of_slowest(work.gather_s) / run.links, beside_forward, run.contention)
    parts["optimizer"] = of_slowest(work.optimizer_s) / STREAM
    doublings = np.log2(np.maximum(np.asarray(work.world_size) / 8, 1.0))
    parts["stragglers"] = sum(parts.values()) * run.stragglers * doublings
    parts["not explained"] = run.step_s * np.ones_like(parts["optimizer"])
    return directions, parts


def _beside(sent: np.ndarray, computed: np.ndarray, contention: np.ndarray) -> np.ndarray:
    """What of ``sent`` is not hidden under ``computed``, and what the hidden part costs the computation."""
    hidden = np.minimum(sent, computed)
    return sent - hidden + contention * hidden
