"""What a layer takes of one rank for one micro-batch, in seconds on ideal hardware, by kind of work. No torch.

Degrees, tokens and groups are numbers, or arrays of as many cuts as are asked for together: the formulas are the same,
and seconds come as [2, COLUMNS] or as [2, COLUMNS, cuts].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from parallel.planning.execution import Execution, Module
from parallel.planning.hardware.collectives import Amount, Span, all_gather_s, all_to_all_s, point_to_point_s
from parallel.planning.models.operations import MODULES
from parallel.planning.plan import Recompute
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


@dataclass(frozen=True)
class Spans:
    """Groups of many layouts: the ``distinct`` ones, and which each layout has."""

    distinct: tuple[Span, ...]
    which: np.ndarray

    @classmethod
    def of(cls, groups: Sequence[Span]) -> Spans:
        numbers: dict[Span, int] = {}
        which = [numbers.setdefault(group, len(numbers)) for group in groups]
        return cls(tuple(numbers), np.array(which, dtype=int))

    def __getitem__(self, chosen: np.ndarray) -> Spans:
        return Spans(self.distinct, self.which[chosen])

    @property
    def ranks(self) -> np.ndarray:
        return np.array([group.ranks for group in self.distinct])[self.which]


Groups = Span | Spans


def over(groups: Groups, seconds: Callable[[Amount, Span], Amount], amount: Amount) -> Amount:
    """``seconds`` of ``amount``, each layout's (the last axis) over the group that it has."""
    if isinstance(groups, Span):
        return seconds(amount, groups)
    found: Any = None
    for number in np.unique(groups.which):
        of_group = groups.which == number
        part = np.asarray(seconds(amount[..., of_group], groups.distinct[number]))
        if found is None:
            found = np.empty((*part.shape[:-1], len(groups.which)))
        found[..., of_group] = part
    return amount if found is None else found


@dataclass(frozen=True)
class Share:
    """How a micro-batch and a layer are cut: ``tokens`` of one context-parallel rank, and a plan's degrees."""

    tokens: Amount
    tp: Amount
    ep: Amount
    etp: Amount
    cp: Amount
    sequence_parallel: Amount
    tp_span: Groups
    ep_span: Groups
    cp_span: Groups
    etp_span: Groups

    def __getitem__(self, chosen: np.ndarray) -> Share:
        return Share(**{each.name: getattr(self, each.name)[chosen] for each in fields(self)})

    @property
    def token_cut(self) -> Amount:
        """Ranks over which work that tensor parallelism does not cut is cut by token."""
        return 1 + self.sequence_parallel * (self.tp - 1)


class Again(NamedTuple):
    """What backward runs again, and whether activations wait in host memory meanwhile."""

    recompute: Recompute
    modules: tuple[Module, ...] = ()
    offloaded: bool = False

    @classmethod
    def of(cls, recompute: Recompute, execution: Execution) -> Again:
        return cls(recompute, execution.recompute_modules, "activations" in execution.offload)

    def remakes(self, layer: LayerWorkload, op: Operation) -> bool:
        if layer.stream_bytes is None:
            return False
        if self.recompute == "full" or (self.recompute == "selective" and op.remade):
            return True
        name = op.name.removeprefix("mtp.")
        return any(name in MODULES[module] for module in self.modules)


def products_s(
    rows: Amount,
    out: Amount,
    inner: Amount,
    peak: float,
    device: Device,
    count: Amount = 1.0,
    element_bytes: float = 2,
) -> Amount:
    """Ideal seconds of ``count`` products [rows, inner] x [inner, out] that run together: tiles in waves over the
    processors, with the start-up of the inner dim; or the time of memory, where that is longer."""
    processors = device.processors or 1
    if device.architecture == "cpu":  # no tiles to fill: cores share a product as they like
        compute = 2 * count * rows * out * inner / peak
    else:
        compute = math.inf
        for tall, wide, rate in TILES:
            waves = _ceil(count * _ceil(rows / tall) * _ceil(out / wide) / processors)
            taken = 2 * waves * processors * tall * wide * (inner + INNER_HALF) / (rate * peak)
            compute = _lesser(compute, taken)
    moved = count * (rows * inner + inner * out + rows * out) * element_bytes
    there = (rows > 0) & (out > 0) & (inner > 0) & (count > 0)
    return _greater(compute, moved / (device.memory_bandwidth or math.inf)) * there


def _ceil(value: Amount) -> Amount:
    return -(-value // 1)


def _lesser(one: Amount, other: Amount) -> Amount:
    return np.minimum(one, other) if isinstance(other, np.ndarray) else min(one, other)


def _greater(one: Amount, other: Amount) -> Amount:
    return np.maximum(one, other) if isinstance(other, np.ndarray) else max(one, other)


class LayerCosts:
    """What layers of one model take on one machine, run in one way."""

    def __init__(self, workload: Workload, execution: Execution, topology: HardwareTopology) -> None:
        self.workload, self.execution, self.topology = workload, execution, topology
        self._base_peak = topology.peak(execution.base_dtype)
        self._bandwidth = topology.known("device.memory_bandwidth")

    def work(self, layer: LayerWorkload, share: Share, ways: Sequence[Again]) -> list[np.ndarray]:
        """Columns of a layer, forward and backward, under each of the ``ways``."""
        cuts = np.shape(share.tokens)
        once, repeated = np.zeros((2, len(COLUMNS), *cuts)), [np.zeros((len(COLUMNS), *cuts)) for _ in ways]
        for op in layer.operations:
            one = self._operation(op, share)
            once += one
            for way, more in zip(ways, repeated, strict=True):
                if way.remakes(layer, op):
                    more += one[FORWARD]
        for exchange in layer.exchanges:
            sent = self._exchange(exchange, share)
            once[FORWARD] += sent
            # Products' gradients need their gathered input again: one gather more where the stream is kept cut.
            once[BACKWARD] += sent + 0.5 * sent * ((exchange.axis == "tp") & share.sequence_parallel)
            for way, more in zip(ways, repeated, strict=True):
                if layer.stream_bytes is not None and way.recompute == "full":
                    more += sent
        return [self._run(layer, share, way, once, more) for way, more in zip(ways, repeated, strict=True)]

    def _run(self, layer: LayerWorkload, share: Share, way: Again, once: np.ndarray, more: np.ndarray) -> np.ndarray:
        work = once.copy()
        work[BACKWARD] += more
        if way.offloaded and layer.stream_bytes is not None:
            cut = share.tp  # of most of them; those cut by token only where sequence parallelism is on
            kept = layer.activation_bytes(way.recompute) * share.tokens / cut * self.execution.offload_share
            work[:, COLUMN["offload"]] += kept / self.topology.known("host_link.bandwidth")
        return work

    def hop_s(self, share: Share, pipeline: Groups) -> Amount:
        """Seconds of a message from one rank of the pipeline to the next."""
        early = self.execution.generation < SCATTERED_UNTIL
        cut = share.tp if early else share.token_cut
        message = share.tokens * self.workload.width * self.execution.element_bytes / cut

        def seconds(size: Amount, group: Span) -> Amount:
            return size * 0.0 if group.ranks == 1 else point_to_point_s(size, group.domains > 1, self.topology)

        return over(pipeline, seconds, message)

    def _operation(self, op: Operation, share: Share) -> np.ndarray:
        """[2, COLUMNS, ...] of one operation on one rank."""
        work = np.zeros((2, len(COLUMNS), *np.shape(share.tokens)))
        expert = "ep" in op.axes
        routed = expert or op.name.endswith(("dispatch", "combine"))
        launched = COLUMN["routed_kernels" if routed or op.name.endswith("router") else "kernels"]
        work[FORWARD, launched], work[BACKWARD, launched] = op.kernels, 2 * op.kernels
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
            work[FORWARD, COLUMN["attention"]] = op.forward_flops * seconds
            work[BACKWARD, COLUMN["attention"]] = op.backward_flops * ATTENTION_BACKWARD * seconds
            return work
        if op.kind in ("gated_delta", "kda", "ssm"):
            seconds = tokens / cut / self._base_peak
            work[FORWARD, COLUMN["linear"]] = op.forward_flops * seconds
            work[BACKWARD, COLUMN["linear"]] = op.backward_flops * seconds
        seconds = tokens / cut / self._bandwidth
        work[FORWARD, moved], work[BACKWARD, moved] = op.forward_bytes * seconds, op.backward_bytes * seconds
        return work

    def _products(self, work: np.ndarray, op: Operation, product: Product, share: Share, moved: int) -> None:
        """A matrix product: forward, and the gradients of its input and of its weight."""
        expert = "ep" in op.axes
        quantised = product.quantised and self.execution.quantised
        peak = self.topology.peak(self.execution.precision) if quantised else self._base_peak
        rows, count, degree = 1.0 * share.tokens, 1.0, share.tp if op.axes else 1
        if expert:
            rows = share.tokens / share.tp * product.visits * share.ep * share.etp / product.experts
            count, degree = product.experts / share.ep, share.etp
        elif not op.axes and not op.gathered:
            rows = rows / share.token_cut
        out, inner = float(product.out), float(product.inner)
        out, inner = (out / degree, inner) if product.cut == "out" else (out, inner / degree)
        size = self.execution.element_bytes / (2 if quantised else 1)

        def seconds(rows: Amount, out: Amount, inner: Amount) -> Amount:
            return products_s(rows, out, inner, peak, self.topology.device, count, size)

        kind = "experts" if expert else "product"
        column = COLUMN[{"product": "quantised", "experts": "quantised_experts"}[kind] if quantised else kind]
        work[FORWARD, column] = seconds(rows, out, inner)
        work[BACKWARD, column] = seconds(rows, inner, out) + seconds(out, inner, rows)
        if expert and not self.execution.fused_experts:
            work[FORWARD, COLUMN["expert_kernels"]], work[BACKWARD, COLUMN["expert_kernels"]] = count, 2 * count
        if quantised and not (expert and self.execution.fused_experts):
            each = QUANTISE_BYTES * count * rows / self._bandwidth
            work[FORWARD, moved] += each * inner
            work[BACKWARD, moved] += each * out

    def _exchange(self, exchange: Exchange, share: Share) -> np.ndarray:
        """What a layer sends in forward for one axis."""
        sent = np.zeros((len(COLUMNS), *np.shape(share.tokens)))
        if exchange.axis == "tp":
            one = over(share.tp_span, self._gathered, exchange.bytes * share.tokens)
            sent[COLUMN["tensor"]] = 2 * exchange.count * one
        elif exchange.axis == "cp":
            amount = exchange.bytes * (share.cp if exchange.state else share.tokens * share.cp)
            sent[COLUMN["context"]] = over(share.cp_span, self._gathered, amount / share.tp)
        elif exchange.axis == "ep":

            def seconds(tokens: Amount, group: Span) -> Amount:
                return all_to_all_s(
                    tokens,
                    exchange.bytes,
                    exchange.visits,
                    exchange.experts,
                    group,
                    self.topology,
                    node_limit=exchange.node_limit,
                    deduplicated=self.execution.dispatcher != "alltoall",
                )

            tokens = share.tokens / share.tp
            domain_s, network_s = over(share.ep_span, seconds, tokens)
            sent[COLUMN["expert_domain"]] = 2 * domain_s  # there and back
            sent[COLUMN["expert_network"]] = 2 * network_s
            # Ranks that cut an expert see the same copies: gathered before it, partial sums scattered behind it.
            copies = tokens * exchange.visits * exchange.bytes * share.etp
            sent[COLUMN["tensor"]] = 2 * over(share.etp_span, self._gathered, copies)
        return sent

    def _gathered(self, size: Amount, group: Span) -> Amount:
        return all_gather_s(size, group, self.topology)
