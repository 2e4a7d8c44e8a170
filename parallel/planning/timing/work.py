"""What each kind of pipeline rank does for one micro-batch, in seconds on ideal hardware: input of the time model.

Every kind of work is a column, counted at the peak rates of the topology, with what the shape of the work alone decides
(tiles, waves, ranks of a group) already in it. What software makes of it, the efficiencies, is ``calibration.py``; so
one set of columns serves any calibration, and a fit over hundreds of runs is a few array operations. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parallel.planning.execution import Execution
from parallel.planning.hardware.collectives import Span, all_gather_s, all_to_all_s, point_to_point_s, span
from parallel.planning.models.operations import MODULES
from parallel.planning.plan import ParallelPlan, Recompute, Stages
from parallel.planning.topology import Device, HardwareTopology
from parallel.planning.workload import Exchange, LayerWorkload, Operation, Product, Workload

COLUMNS = (
    "product",  # matrix products in the base dtype
    "quantised",  # matrix products in FP8 or FP4
    "experts",  # products of experts, base dtype
    "quantised_experts",
    "attention",  # softmax attention
    "linear",  # gated delta rule, KDA, Mamba2
    "memory",  # reads and writes of everything else
    "streams",  # large element-wise kernels that are known one by one: unfused softmax, dropout
    "routing",  # reads and writes of routed tokens: permutation, activations and quantisation of experts
    "kernels",  # number of kernels launched, not seconds
    "routed_kernels",  # those of expert layers, which wait for counts and do little work each
    "expert_kernels",  # products of experts, where each local expert has its own
    "tensor",  # gathers and scatters of tensor parallelism
    "expert_domain",  # expert exchange inside the scale-up domain
    "expert_network",  # and across domains
    "context",  # keys, values and states of context parallelism
    "weights",  # gathers and scatters of sharded weights (FSDP)
    "offload",  # activations to host memory and back
)
COLUMN = {name: index for index, name in enumerate(COLUMNS)}
FORWARD, BACKWARD = 0, 1

#: Output tiles of a matrix product and their throughput against the best one (CUTLASS profiler, H100: larger tiles read
#: less from shared memory); a library takes whichever ends first.
TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.9), (64, 128, 0.72), (64, 64, 0.5))
#: Depth of the inner dim at which a tile's start-up and write-back cost as much as its products.
INNER_HALF = 160
#: Attention's backward has five products to forward's two, one of them the scores again (FlashAttention-2, section
#: 3.1): 2.5 times forward, where model FLOPs count 2.
ATTENTION_BACKWARD = 2.5 / 2
#: Throughput of attention grows with the head dim to this power, 1 at 128 (FlashAttention-3, arXiv 2407.08608, figures
#: 5 and 6: 497, 648 and 746 TFLOP/s forward at 64, 128 and 256, 474 and 561 backward at 64 and 128).
HEAD_DIM_POWER = 0.3
#: Until then Megatron's tensor-parallel ranks sent a share each to the next stage, sequence parallel or not, and
#: gathered it there (arXiv 2104.04473, section 4.1).
SCATTERED_UNTIL = (2022, 6)
#: Tokens of a tile of attention's scores.
ATTENTION_TILE = 128
#: Operations that are one kernel each, where others stand for what a framework makes of them.
SINGLE = ("softmax", "dropout")
#: Bytes that quantising an element moves: read in bfloat16, written in FP8 as it is and transposed.
QUANTISE_BYTES = 4

#: What a pipeline rank holds: (kind of layer, how many) sorted, the embedding, the head.
Held = tuple[tuple[tuple[str, int], ...], bool, bool]


@dataclass(frozen=True)
class Share:
    """How a micro-batch and a layer are cut: ``tokens`` of one context-parallel rank, and the plan's degrees."""

    tokens: int
    tp: int
    ep: int
    etp: int
    cp: int
    sequence_parallel: bool
    recompute: Recompute
    tp_span: Span
    ep_span: Span
    cp_span: Span
    etp_span: Span

    @property
    def token_cut(self) -> int:
        """Ranks over which work that tensor parallelism does not cut is cut by token."""
        return self.tp if self.sequence_parallel else 1


@dataclass(frozen=True)
class StepWork:
    """A step's work, by kind of pipeline rank: those that hold the same layers are one kind, ``ranks`` many.

    ``columns`` [kinds, 2, COLUMNS]: one micro-batch, forward and backward. Seconds that are spent once a step:
    ``reduce_s`` and ``gather_s`` [kinds] of gradients and weights over data parallelism, ``optimizer_s`` of its reads
    and writes. ``hop_s``: a message to the next pipeline rank.
    """

    columns: np.ndarray
    ranks: np.ndarray
    reduce_s: np.ndarray
    gather_s: np.ndarray
    optimizer_s: np.ndarray
    hop_s: float
    micro_batches: int
    pp: int
    vpp: int
    world_size: int
    zero_bubble: float = 0.0
    kind_of_rank: tuple[int, ...] = ()


def products_s(
    rows: float, out: float, inner: float, peak: float, device: Device, count: float = 1.0, element_bytes: float = 2
) -> float:
    """Ideal seconds of ``count`` products [rows, inner] x [inner, out] that run together: tiles in waves over the
    processors, with the start-up of the inner dim; or the time of memory, where that is longer."""
    if min(rows, out, inner, count) <= 0:
        return 0.0
    compute, bandwidth = math.inf, device.memory_bandwidth or math.inf
    processors = device.processors or 1
    if device.architecture == "cpu":  # no tiles to fill: cores share a product as they like
        compute = 2 * count * rows * out * inner / peak
    for tall, wide, rate in () if device.architecture == "cpu" else TILES:
        waves = math.ceil(count * math.ceil(rows / tall) * math.ceil(out / wide) / processors)
        compute = min(compute, 2 * waves * processors * tall * wide * (inner + INNER_HALF) / (rate * peak))
    moved = count * (rows * inner + inner * out + rows * out) * element_bytes
    return max(compute, moved / bandwidth)


def stacked(works: Sequence[StepWork]) -> StepWork:
    """Steps along a new first axis, padded with kinds that no rank is of."""
    kinds = max(len(work.ranks) for work in works)

    def padded(name: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        out = np.zeros((len(works), kinds, *shape))
        for index, work in enumerate(works):
            out[index, : len(work.ranks)] = getattr(work, name)
        return out

    def scalars(name: str) -> Any:
        return np.array([getattr(work, name) for work in works], dtype=float)

    return StepWork(
        padded("columns", (2, len(COLUMNS))),
        padded("ranks"),
        padded("reduce_s"),
        padded("gather_s"),
        padded("optimizer_s"),
        *(scalars(name) for name in ("hop_s", "micro_batches", "pp", "vpp", "world_size", "zero_bubble")),
    )


class WorkTable:
    """Work of one model on one machine. Layers of one kind cost the same, so a search that asks for thousands of plans
    asks for few distinct layers; they are remembered here."""

    def __init__(self, workload: Workload, execution: Execution, topology: HardwareTopology) -> None:
        self.workload, self.execution, self.topology = workload, execution, topology
        self._base_peak = topology.peak(execution.base_dtype)
        self._bandwidth = topology.known("device.memory_bandwidth")
        self._kinds = {layer.kind: layer for layer in workload.layers}
        self._layers: dict[tuple[str, Share], np.ndarray] = {}
        self._pipelines: dict[tuple[int, Stages], tuple[dict[Held, int], tuple[int, ...]]] = {}
        self._parameters: dict[tuple[str, int, int, int], tuple[float, float]] = {}

    def step(self, plan: ParallelPlan) -> StepWork:
        """The work of a step under ``plan``."""
        share = self._share(plan)
        key = (plan.pp, plan.stages)
        if key not in self._pipelines:
            self._pipelines[key] = _pipeline_kinds(self.workload, plan)
        kinds, kind_of_rank = self._pipelines[key]
        groups = [self._group(plan, axes) for axes in (("cp", "dp"), ("edp",))]
        columns, once = [], []
        for held, first, last in kinds:
            blocks = [(self._kinds[kind], count) for kind, count in held]
            blocks += [(self.workload.embedding, 1)] * first + [(self.workload.head, 1)] * last
            columns.append(np.sum([count * self._layer(block, share) for block, count in blocks], axis=0))
            once.append(self._once(blocks, plan, groups, columns[-1]))
        reduce_s, gather_s, optimizer_s = np.array(once).T
        ranks = np.array(list(kinds.values()), dtype=float)
        return StepWork(
            np.array(columns),
            ranks,
            reduce_s,
            gather_s,
            optimizer_s,
            self._hop_s(plan, share),
            plan.num_micro_batches,
            plan.pp,
            plan.vpp,
            plan.world_size,
            float(self.execution.schedule == "zero_bubble"),
            kind_of_rank,
        )

    def _share(self, plan: ParallelPlan) -> Share:
        tokens = plan.micro_batch * self.workload.seq_len // plan.cp
        spans = [span(plan, axes, self.topology) for axes in (("tp",), ("ep",), ("cp",), ("etp",))]
        sequence_parallel = plan.sequence_parallel
        return Share(tokens, plan.tp, plan.ep, plan.etp, plan.cp, sequence_parallel, plan.recompute, *spans)

    def _layer(self, layer: LayerWorkload, share: Share) -> np.ndarray:
        key = (layer.kind, share)
        if key not in self._layers:
            self._layers[key] = self._layer_work(layer, share)
        return self._layers[key]

    def _layer_work(self, layer: LayerWorkload, share: Share) -> np.ndarray:
        work = np.zeros((2, len(COLUMNS)))
        for op in layer.operations:
            one = self._operation(op, share)
            work += one
            if self._remade(layer, op, share.recompute):
                work[BACKWARD] += one[FORWARD]
        if "activations" in self.execution.offload and layer.stream_bytes is not None:
            cut = share.tp  # of most of them; those cut by token only where sequence parallelism is on
            kept = layer.activation_bytes(share.recompute) * share.tokens / cut * self.execution.offload_share
            work[:, COLUMN["offload"]] += kept / self.topology.known("host_link.bandwidth")
        for exchange in layer.exchanges:
            sent = self._exchange(exchange, share)
            again = layer.stream_bytes is not None and share.recompute == "full"
            work[FORWARD] += sent
            # Products' gradients need their gathered input again: one gather more where the stream is kept cut.
            regather = 0.5 * sent * (exchange.axis == "tp" and share.sequence_parallel)
            work[BACKWARD] += sent + regather + again * sent
        return work

    def _remade(self, layer: LayerWorkload, op: Operation, recompute: Recompute) -> bool:
        if layer.stream_bytes is None:
            return False
        if recompute == "full" or (recompute == "selective" and op.remade):
            return True
        name = op.name.removeprefix("mtp.")
        return any(name in MODULES[module] for module in self.execution.recompute_modules)

    def _operation(self, op: Operation, share: Share) -> np.ndarray:
        """[2, COLUMNS] of one operation on one rank."""
        work = np.zeros((2, len(COLUMNS)))
        expert = "ep" in op.axes
        routed = expert or op.name.endswith(("dispatch", "combine"))
        launched = COLUMN["routed_kernels" if routed or op.name.endswith("router") else "kernels"]
        work[:, launched] = op.kernels, 2 * op.kernels
        # Routed tokens are cut over tp, whatever holds the experts.
        tokens = share.tokens / (share.tp if expert else 1)
        cut = share.tp if "tp" in op.axes else 1 if expert or op.gathered else share.token_cut
        single = op.name.endswith(SINGLE)
        moved = COLUMN["streams" if single else "routing" if routed else "memory"]
        if op.product is not None:
            self._products(work, op, op.product, share, moved)
            return work
        if op.kind == "attention":
            # A causal kernel computes the tiles on the diagonal in full.
            tiles = 1 + ATTENTION_TILE / self.workload.seq_len
            seconds = tokens / cut / self._base_peak * tiles * (128 / (op.head_dim or 128)) ** HEAD_DIM_POWER
            work[:, COLUMN["attention"]] = op.forward_flops * seconds, op.backward_flops * ATTENTION_BACKWARD * seconds
            return work
        if op.kind in ("gated_delta", "kda", "ssm"):
            seconds = tokens / cut / self._base_peak
            work[:, COLUMN["linear"]] = op.forward_flops * seconds, op.backward_flops * seconds
        seconds = tokens / cut / self._bandwidth
        work[:, moved] = op.forward_bytes * seconds, op.backward_bytes * seconds
        return work

    def _products(self, work: np.ndarray, op: Operation, product: Product, share: Share, moved: int) -> None:
        """A matrix product: forward, and the gradients of its input and of its weight."""
        expert = "ep" in op.axes
        quantised = product.quantised and self.execution.quantised
        peak = self.topology.peak(self.execution.precision) if quantised else self._base_peak
        rows, count, degree = float(share.tokens), 1.0, share.tp if op.axes else 1
        if expert:
            rows = share.tokens / share.tp * product.visits * share.ep * share.etp / product.experts
            count, degree = product.experts / share.ep, share.etp
        elif not op.axes and not op.gathered:
            rows /= share.token_cut
        out, inner = float(product.out), float(product.inner)
        out, inner = (out / degree, inner) if product.cut == "out" else (out, inner / degree)
        size = self.execution.element_bytes / (2 if quantised else 1)

        def seconds(rows: float, out: float, inner: float) -> float:
            return products_s(rows, out, inner, peak, self.topology.device, count, size)

        kind = "experts" if expert else "product"
        column = COLUMN[{"product": "quantised", "experts": "quantised_experts"}[kind] if quantised else kind]
        work[FORWARD, column] = seconds(rows, out, inner)
        work[BACKWARD, column] = seconds(rows, inner, out) + seconds(out, inner, rows)
        if expert and not self.execution.fused_experts:
            work[:, COLUMN["expert_kernels"]] = count, 2 * count
        if quantised and not (expert and self.execution.fused_experts):
            each = QUANTISE_BYTES * count * rows / self._bandwidth
            work[:, moved] += each * inner, each * out

    def _exchange(self, exchange: Exchange, share: Share) -> np.ndarray:
        """What a layer sends in forward for one axis."""
        sent = np.zeros(len(COLUMNS))
        if exchange.axis == "tp" and share.tp > 1:
            one = all_gather_s(exchange.bytes * share.tokens, share.tp_span, self.topology)
            sent[COLUMN["tensor"]] = 2 * exchange.count * one
        elif exchange.axis == "cp" and share.cp > 1:
            amount = exchange.bytes * (share.cp if exchange.state else share.tokens * share.cp)
            sent[COLUMN["context"]] = all_gather_s(amount / share.tp, share.cp_span, self.topology)
        elif exchange.axis == "ep":
            tokens = share.tokens / share.tp
            domain_s, network_s = all_to_all_s(
                tokens,
                exchange.bytes,
                exchange.visits,
                exchange.experts,
                share.ep_span,
                self.topology,
                node_limit=exchange.node_limit,
                deduplicated=self.execution.dispatcher != "alltoall",
            )
            sent[COLUMN["expert_domain"]] = 2 * domain_s  # there and back
            sent[COLUMN["expert_network"]] = 2 * network_s
            # Ranks that cut an expert see the same copies: gathered before it, partial sums scattered behind it.
            copies = tokens * exchange.visits * exchange.bytes * share.etp
            sent[COLUMN["tensor"]] = 2 * all_gather_s(copies, share.etp_span, self.topology)
        return sent

    def _held(self, block: LayerWorkload, plan: ParallelPlan) -> tuple[float, float]:
        """Parameters of a block that a rank holds: dense ones and those of experts."""
        key = (block.kind, plan.tp, plan.ep, plan.etp)
        if key not in self._parameters:
            held = [0.0, 0.0]
            for axes, parameters in block.parameters_by_axes().items():
                expert = "ep" in axes
                held[expert] += parameters / (plan.ep * plan.etp if expert else plan.tp if "tp" in axes else 1)
            self._parameters[key] = held[0], held[1]
        return self._parameters[key]

    def _group(self, plan: ParallelPlan, axes: tuple[str, ...]) -> Span:
        """The ranks that share an optimizer's state."""
        group, parts = span(plan, axes, self.topology), self.execution.zero_parts
        return Span(parts, min(group.per_domain, parts)) if parts and group.ranks > parts else group

    def _once(
        self,
        blocks: Sequence[tuple[LayerWorkload, int]],
        plan: ParallelPlan,
        groups: Sequence[Span],
        work: np.ndarray,
    ) -> list[float]:
        """Seconds of reducing gradients, gathering weights and updating them; FSDP's go into ``work`` instead."""
        execution, topology = self.execution, self.topology
        reduce_s = gather_s = updated = 0.0
        for family, group in enumerate(groups):
            held = sum(count * self._held(block, plan)[family] for block, count in blocks)
            if held and group.ranks > 1:
                gradients = all_gather_s(held * execution.gradient_bytes, group, topology)
                weights = all_gather_s(held * execution.element_bytes, group, topology)
                if plan.zero == 3:
                    work[FORWARD, COLUMN["weights"]] += weights
                    work[BACKWARD, COLUMN["weights"]] += weights + gradients
                else:
                    reduce_s += gradients if plan.zero else 2 * gradients
                    gather_s += weights if plan.zero else 0.0
            updated += held / (group.ranks if plan.zero else 1)
        # Gradient read; master weight and two moments read and written; weight written.
        state = 2 * (execution.master_bytes + 2 * execution.moment_bytes)
        touched = execution.gradient_bytes + execution.element_bytes
        where = "host_link.bandwidth" if "optimizer" in execution.offload else "device.memory_bandwidth"
        seconds = touched / self._bandwidth + state / topology.known(where)
        return [reduce_s, gather_s, updated * seconds]

    def _hop_s(self, plan: ParallelPlan, share: Share) -> float:
        if plan.pp == 1:
            return 0.0
        early = self.execution.generation < SCATTERED_UNTIL
        cut = share.tp if early else share.token_cut
        message = share.tokens * self.workload.width * self.execution.element_bytes / cut
        crosses = span(plan, ("pp",), self.topology).per_domain < plan.pp
        return point_to_point_s(message, crosses, self.topology)


def _pipeline_kinds(workload: Workload, plan: ParallelPlan) -> tuple[dict[Held, int], tuple[int, ...]]:
    """Pipeline ranks by what they hold: {(layers of each kind, embedding, head): how many ranks}, and which each is."""
    found: dict[Held, int] = {}
    each = []
    kinds = [layer.kind for layer in workload.layers]
    for pp in range(plan.pp):
        layers: dict[str, int] = {}
        for chunk in plan.stages[pp :: plan.pp]:
            for kind in kinds[chunk[0] : chunk[-1] + 1]:
                layers[kind] = layers.get(kind, 0) + 1
        held = (tuple(sorted(layers.items())), pp == 0, pp == plan.pp - 1)
        found[held] = found.get(held, 0) + 1
        each.append(held)
    order = {held: index for index, held in enumerate(found)}
    return found, tuple(order[held] for held in each)
