"""Workload: what a model costs, as the planner sees it. No torch, no model.

A layer is a tuple of operations; everything is per token and before sharding, so a plan divides it. FLOPs are model
FLOPs: two for a multiply-add, causal attention counted half, experts by those a token visits, nothing for element-wise
work or recomputation. Bytes are of activations (reads and writes of ideally fused kernels); weights are read once a
micro-batch and are counted by ``parameters``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from parallel.planning.plan import ParallelPlan, Recompute, nearest_divisors, nearest_multiples
from stoker.errors import Refusal

Kind = Literal["gemm", "grouped_gemm", "attention", "gated_delta", "kda", "ssm", "conv", "elementwise", "lookup"]


@dataclass(frozen=True)
class Product:
    """A matrix product [rows, inner] x [inner, out], before sharding; ``cut`` is the dim that the operation's axes
    shard (column or row parallel), None where every rank holds all of it.

    ``visits`` of ``experts``: the product is one of each expert, a token visiting that many (1 of 1: a dense layer), so
    an expert sees tokens * visits / experts rows. ``quantised``: it runs in a run's FP8 or FP4, where there is one;
    head, router and gates do not.
    """

    out: int
    inner: int
    cut: Literal["out", "inner"] | None = None
    experts: int = 1
    visits: int = 1
    quantised: bool = True


@dataclass(frozen=True)
class Exchange:
    """What a layer sends to other ranks for one axis, in bytes a token.

    ``tp``: ``count`` regions, each entered by an all-gather and left by a reduce-scatter of ``bytes`` a token.
    ``ep``: each token goes to ``visits`` of ``experts`` and comes back; ``bytes`` one copy of it. ``node_limit``: hosts
    that a router lets a token visit (group-limited routing).
    ``cp``: keys and values (softmax attention) or, with ``state`` set, a constant state a sequence (linear attention).
    """

    axis: Literal["tp", "ep", "cp"]
    bytes: float
    count: int = 1
    visits: int = 1
    experts: int = 1
    state: bool = False
    node_limit: int | None = None


@dataclass(frozen=True)
class Operation:
    """One kernel's work, per token.

    ``axes``: what cuts its parameters and FLOPs: ("tp",), ("ep", "etp"), or () for work that every tensor-parallel rank
    repeats; sequence parallelism cuts that by token, unless it is ``gathered``: it reads all tokens on every rank.
    ``input_bytes`` and ``output_bytes``: forward reads one and writes the other; backward reads the input and the
    output's gradient and writes the input's gradient.
    ``saved_bytes``: kept for backward without recompute. A tensor that several operations need is counted with the one
    that makes it. ``remade``: part of the mixer, which selective recompute runs again in backward.
    ``product``: its dims, where it is a matrix product. ``head_dim``: of attention, what its scores are summed over.
    ``kernels``: what forward launches.
    """

    name: str
    kind: Kind
    axes: tuple[str, ...] = ()
    parameters: int = 0
    active_parameters: int = 0
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    input_bytes: float = 0.0
    output_bytes: float = 0.0
    saved_bytes: float = 0.0
    remade: bool = False
    gathered: bool = False
    product: Product | None = None
    head_dim: int | None = None
    kernels: int = 1

    @property
    def forward_bytes(self) -> float:
        return self.input_bytes + self.output_bytes

    @property
    def backward_bytes(self) -> float:
        return 2 * self.input_bytes + self.output_bytes


@dataclass(frozen=True)
class Divisor:
    """The rule that the degree of ``axis`` divides ``size``, the model's ``field``. The vocabulary has none: its shards
    are padded."""

    axis: str
    field: str
    size: int


@dataclass(frozen=True)
class LayerWorkload:
    """A layer, or the embedding, or the head with the final norm. ``kind`` names what it is made of; layers of one
    kind cost the same. ``stream_bytes``: its input per token, all that full recompute keeps; None: not recomputed."""

    kind: str
    operations: tuple[Operation, ...]
    divisors: tuple[Divisor, ...] = ()
    stream_bytes: float | None = None
    exchanges: tuple[Exchange, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(op.parameters for op in self.operations)

    @property
    def active_parameters(self) -> int:
        """Parameters that a token meets: of the experts, those that it visits."""
        return sum(op.active_parameters for op in self.operations)

    @property
    def forward_flops(self) -> float:
        return sum(op.forward_flops for op in self.operations)

    @property
    def backward_flops(self) -> float:
        return sum(op.backward_flops for op in self.operations)

    @property
    def forward_bytes(self) -> float:
        return sum(op.forward_bytes for op in self.operations)

    @property
    def backward_bytes(self) -> float:
        return sum(op.backward_bytes for op in self.operations)

    def parameters_by_axes(self) -> dict[tuple[str, ...], int]:
        """Parameters by the axes that cut them: {("tp",): n, ("ep", "etp"): n, (): n}."""
        found: dict[tuple[str, ...], int] = {}
        for op in self.operations:
            found[op.axes] = found.get(op.axes, 0) + op.parameters
        return found

    def activation_bytes(self, recompute: Recompute) -> float:
        """Bytes that forward keeps for backward, per token."""
        if recompute == "none" or self.stream_bytes is None:
            return sum(op.saved_bytes for op in self.operations)
        if recompute == "full":
            return self.stream_bytes
        return self.stream_bytes + sum(op.saved_bytes for op in self.operations if not op.remade)

    def recompute_flops(self, recompute: Recompute) -> float:
        """FLOPs that backward runs a second time, per token: not model FLOPs."""
        if recompute == "none" or self.stream_bytes is None:
            return 0.0
        return sum(op.forward_flops for op in self.operations if op.remade or recompute == "full")


@dataclass(frozen=True)
class Workload:
    """A whole model at windows of ``seq_len`` tokens; activations of ``element_bytes`` bytes an element.

    ``tied_embedding``: the head reads the embedding's parameters, which are then counted with the embedding only
    (on two stages of a pipeline they are held twice).
    """

    seq_len: int
    width: int
    element_bytes: int
    embedding: LayerWorkload
    layers: tuple[LayerWorkload, ...]
    head: LayerWorkload
    tied_embedding: bool = False

    @property
    def blocks(self) -> tuple[LayerWorkload, ...]:
        return (self.embedding, *self.layers, self.head)

    @property
    def parameters(self) -> int:
        return sum(block.parameters for block in self.blocks)

    @property
    def active_parameters(self) -> int:
        return sum(block.active_parameters for block in self.blocks)

    @property
    def forward_flops(self) -> float:
        return sum(block.forward_flops for block in self.blocks)

    @property
    def backward_flops(self) -> float:
        return sum(block.backward_flops for block in self.blocks)

    @property
    def training_flops(self) -> float:
        """Model FLOPs of a training step per token: the numerator of MFU."""
        return self.forward_flops + self.backward_flops

    @property
    def has_experts(self) -> bool:
        return any("ep" in op.axes for layer in self.layers for op in layer.operations)

    def divisors(self) -> Iterator[Divisor]:
        """Each rule once, in order of layers."""
        yield from dict.fromkeys(rule for block in self.blocks for rule in block.divisors)


def check_divisibility(workload: Workload, plan: ParallelPlan) -> None:
    """Raise Refusal where a degree of the plan does not divide what it cuts; names the nearest that do."""
    if plan.num_layers != len(workload.layers):
        raise Refusal(f"the plan is for {plan.num_layers} layers and the model has {len(workload.layers)}: rebuild it")
    rules = list(workload.divisors())
    for axis in ("tp", "ep", "etp"):
        degree, sizes = plan.degree(axis), [rule.size for rule in rules if rule.axis == axis]
        if axis != "tp" and degree > 1 and not workload.has_experts:
            raise Refusal(f"{axis}={degree} cuts experts and the model has no expert layer: set {axis}=1")
        if broken := [f"{rule.field}={rule.size}" for rule in rules if rule.axis == axis and rule.size % degree]:
            nearest = " or ".join(f"{axis}={value}" for value in nearest_divisors(math.gcd(*sizes), degree))
            raise Refusal(f"{axis}={degree} does not divide {', '.join(broken)}: nearest that divide all are {nearest}")
    tokens = plan.micro_batch * workload.seq_len
    if (plan.sequence_parallel or workload.has_experts) and tokens % plan.tp:
        lengths = " or ".join(map(str, nearest_multiples(workload.seq_len, plan.tp)))
        cut = "sequence_parallel cuts" if plan.sequence_parallel else "routing cuts"
        raise Refusal(
            f"{cut} the {plan.micro_batch}*{workload.seq_len} = {tokens} tokens of a micro-batch over "
            f"tp={plan.tp}, which does not divide them: nearest that fit are data.seq_len={lengths}"
        )
