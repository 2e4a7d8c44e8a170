"""What a layer, the embedding or the head takes of one rank's memory: parameters, what forward keeps, what runs need.

The mathematics is Korthikanti et al. (arXiv 2205.05198, section 4), tensor by tensor: each operation says what it keeps
a token, and here that is cut by the plan, shrunk by the precision and dropped by recomputation. Bytes throughout.
``model_blocks`` has them of a whole model, as columns that the chunks of a plan add up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from parallel.planning.execution import Execution
from parallel.planning.models.operations import MODULES
from parallel.planning.plan import ParallelPlan, Recompute
from parallel.planning.workload import LayerWorkload, Operation, Workload

FLOAT32_BYTES = 4
#: Bytes of an element of quantised products, scales included: a float32 for 128 elements (DeepSeek-V3, arXiv
#: 2412.19437, section 3.3), a byte for 32 (OCP Microscaling Formats 1.0) or for 16 (NVFP4).
QUANTISED_BYTES = {"fp8": 1.0, "fp8_block": 1.0 + 4 / 128, "mxfp8": 1.0 + 1 / 32, "nvfp4": 0.5 + 1 / 16}

#: Stacks whose products add a weight's gradient to the accumulated one themselves.
FUSED_ACCUMULATION = frozenset({"megatron", "primus"})
#: Operations on the tokens that a tensor rank routes itself, whether the stream is cut by token or not.
ROUTED = frozenset({"router", "dispatch", "combine", "latent.down", "latent.up", "shared.router", "shared.weighting"})


@dataclass(frozen=True)
class Cut:
    """How the ``tokens`` of a micro-batch (of one context-parallel rank) and a layer lie on ranks; ``width`` of the
    stream in elements."""

    tokens: float
    width: int
    tp: int
    cp: int
    ep: int
    etp: int
    sequence_parallel: bool

    @classmethod
    def of(cls, plan: ParallelPlan, workload: Workload) -> Cut:
        tokens = plan.micro_batch * workload.seq_len / plan.cp
        return cls(tokens, workload.width, plan.tp, plan.cp, plan.ep, plan.etp, plan.sequence_parallel)

    @property
    def routed(self) -> float:
        """Tokens that a rank sends to experts; as many come back to it, and in the mean as many visit its experts."""
        return self.tokens / self.tp

    @property
    def stream(self) -> float:
        """Tokens of the residual stream."""
        return self.routed if self.sequence_parallel else self.tokens

    def rows(self, op: Operation) -> float:
        """Tokens of what ``op`` writes and keeps, times the share of their width that this rank holds."""
        if "ep" in op.axes:
            return self.routed  # copies are gathered over etp and their width is cut by it
        if _name(op) in ROUTED:
            return self.routed * (self.etp if _name(op) == "dispatch" else 1)
        if "tp" in op.axes:
            return self.tokens / self.tp
        return self.tokens if op.gathered else self.stream

    def parameters(self, op: Operation) -> float:
        if "ep" in op.axes:
            return op.parameters / (self.ep * self.etp)
        if op.kind == "lookup" or _name(op) == "head":  # whole rows of the vocabulary, padded at its end
            return math.ceil(op.parameters / self.width / self.tp) * self.width
        return op.parameters / self.tp if "tp" in op.axes else op.parameters


@dataclass(frozen=True)
class BlockMemory:
    """One block on one rank. Parameters: ``dense`` and ``expert``, of both those of quantised products, and the dense
    ones that are ``wide``: float32 whatever the run's dtype.

    ``kept``: bytes from a micro-batch's forward to its backward, ``expert_kept`` of them for the copies of tokens that
    visit this rank's experts. ``remade``: what backward makes again. ``working``: the most that an operation has in
    hand, gradients included. ``logits``: elements of output logits, of ``depths`` heads together.
    """

    dense: float
    expert: float
    quantised_dense: float
    quantised_expert: float
    wide: float
    kept: float
    expert_kept: float
    remade: float
    working: float
    logits: float
    depths: int

    @property
    def parameters(self) -> float:
        return self.dense + self.expert

    @property
    def hand(self) -> float:
        """What backward needs beside what was kept."""
        return self.working + self.remade


def block_memory(
    block: LayerWorkload, cut: Cut, recompute: Recompute, execution: Execution, on_cpu: bool = False
) -> BlockMemory:
    """``block`` where it is cut so. Whether it can be is ``check_divisibility``'s business."""
    dense = expert = quantised_dense = quantised_expert = wide = 0.0
    kept = expert_kept = remade = working = logits = 0.0
    depths = 0
    for op, following in zip(block.operations, (*block.operations[1:], None), strict=True):
        parameters = cut.parameters(op)
        quantised = parameters if execution.quantised and op.product and op.product.quantised else 0.0
        if "ep" in op.axes:
            expert, quantised_expert = expert + parameters, quantised_expert + quantised
        else:
            dense, quantised_dense = dense + parameters, quantised_dense + quantised
        if execution.stack == "stoker" and op.name == "gates":
            wide += parameters
        if _name(op) == "head":
            logits, depths = logits + op.output_bytes / FLOAT32_BYTES * cut.rows(op), depths + 1
            continue  # what becomes of logits is the loss' business
        whole = _kept(op, following, cut, execution, on_cpu)
        left = whole if block.stream_bytes is None else _left(op, whole, recompute, execution, cut.rows(op))
        kept, remade = kept + left, remade + whole - left
        if "ep" in op.axes or _name(op) == "dispatch":
            expert_kept += left
        working = max(working, _working(op, parameters, cut, execution))
    if recompute != "none" and block.stream_bytes is not None:
        kept += block.stream_bytes * cut.stream
    if cut.cp > 1:  # the keys and values that travel, one block being read and one received, and their gradients
        travelling = (each.bytes for each in block.exchanges if each.axis == "cp" and not each.state)
        working += 4 * max(travelling, default=0.0) * cut.tokens / cut.tp
    return BlockMemory(
        dense,
        expert,
        quantised_dense,
        quantised_expert,
        wide,
        kept,
        expert_kept,
        remade,
        working,
        logits,
        depths,
    )


def _name(op: Operation) -> str:
    return op.name.removeprefix("mtp.")


def _kept(op: Operation, following: Operation | None, cut: Cut, execution: Execution, on_cpu: bool) -> float:
    """What ``op`` keeps if nothing is recomputed."""
    kept = op.saved_bytes * cut.rows(op)
    if execution.quantised and following and following.product and following.product.quantised and not op.product:
        # What feeds quantised products is kept as they read it. Attention's own backward wants its output as it was.
        elements = min(op.saved_bytes, op.output_bytes) / execution.element_bytes * cut.rows(op)
        copy = QUANTISED_BYTES[execution.precision] * elements
        kept += copy if op.kind == "attention" else copy - elements * execution.element_bytes
    return kept + (_eager(op, following, cut, execution, on_cpu) if execution.stack == "stoker" else 0.0)


def _eager(op: Operation, following: Operation | None, cut: Cut, execution: Execution, on_cpu: bool) -> float:
    """What Stoker's own modules (``pretrain/model``) keep beyond kernels that are ideally fused.

    Norms run in float32 and keep that copy of their input, on CPU its normalised form too. SiLU and the product behind
    it are two operations. A product keeps the gathered tokens that it read. The router reads the stream in float32 and
    keeps its scores. Delta rules keep the errors of their chunks, and on CPU all of their workspace in float32.
    """
    size, rows = execution.element_bytes, cut.rows(op)
    widened = FLOAT32_BYTES - size if size < FLOAT32_BYTES else 0
    normalised = max(size, FLOAT32_BYTES) if on_cpu else 0
    match op.name:
        case "mixer.norm" | "ffn.norm" | "final_norm":
            gathered = cut.tokens - rows if following and "tp" in following.axes else 0.0
            return op.output_bytes / size * (widened + normalised) * rows + op.output_bytes * gathered
        case "qk_norm_rope" if op.saved_bytes:
            return op.output_bytes / size * (widened + normalised) * rows
        case "router":
            return (op.input_bytes / size * FLOAT32_BYTES * bool(widened) + op.output_bytes) * rows
        case "shared.gate" if cut.tp > 1:
            return op.input_bytes * cut.tokens
        case "mlp.activation" | "experts.activation" | "shared.activation":
            return op.output_bytes * rows
        case "gated_delta" | "kda":
            return (op.output_bytes + op.saved_bytes / size * widened * on_cpu) * rows
    return 0.0


def _left(op: Operation, whole: float, recompute: Recompute, execution: Execution, rows: float) -> float:
    """What remains of ``whole``, which ``op`` would keep, under the recompute mode and modules."""
    if recompute == "full" or (recompute == "selective" and op.remade):
        return 0.0
    # The product behind attention keeps attention's output, whoever makes it again.
    if _name(op) == "attention" or not any(_name(op) in MODULES[module] for module in execution.recompute_modules):
        return whole
    return (op.saved_bytes - op.output_bytes) * rows if op.name.endswith("norm") else 0.0


def _working(op: Operation, parameters: float, cut: Cut, execution: Execution) -> float:
    """Gradients of output and input while ``op`` runs backward, on the tokens gathered for it, and its weights'
    gradient where that is not added in place."""
    read = written = cut.rows(op)
    if op.product and op.product.cut and "tp" in op.axes:
        read, written = (cut.tokens, written) if op.product.cut == "out" else (read, cut.tokens)
    weight = 0.0 if execution.stack in FUSED_ACCUMULATION else parameters * execution.element_bytes
    return op.input_bytes * read + op.output_bytes * written + weight


#: Columns of ``BlockMemory``: parameters, all that adds up over the blocks of a chunk, and that of which only the
#: largest block counts.
PARAMETERS = ("dense", "expert", "quantised_dense", "quantised_expert", "wide")
SUMS = (*PARAMETERS, "kept", "expert_kept")
DENSE, EXPERT, QUANTISED_DENSE, QUANTISED_EXPERT, WIDE, KEPT, EXPERT_KEPT = range(len(SUMS))
MOST = ("hand", "parameters", "kept")
HAND, UNIT, LAYER = range(len(MOST))


@dataclass(frozen=True, eq=False)
class ModelBlocks:
    """A model's blocks under one cut: embedding, layers, head.

    ``sums [blocks + 1, SUMS]``: of the blocks before each; ``most [blocks, MOST]``: of each. ``embedding``: its
    parameters. ``message``: bytes of the stream between two stages; ``copy``: bytes of a token sent to an expert,
    ``routed`` tokens of which a rank sends.
    """

    sums: np.ndarray
    most: np.ndarray
    head: BlockMemory
    embedding: float
    message: float
    copy: float
    routed: float

    def by_chunk(self, plan: ParallelPlan, tied: bool) -> tuple[np.ndarray, np.ndarray]:
        """Sums and largest of each chunk: [vpp, pp, SUMS] and [vpp, pp, MOST]. For a ``tied`` head, and for
        multi-token prediction, the last stage holds the embedding too."""
        starts = [0, *(1 + before for before in accumulate(map(len, plan.stages[:-1])))]
        sums = self.sums[[*starts[1:], len(self.most)]] - self.sums[starts]
        if plan.pp > 1 and (tied or self.head.depths > 1):
            sums[-1, DENSE] += self.embedding
        most = np.maximum.reduceat(self.most, starts)
        return sums.reshape(plan.vpp, plan.pp, -1), most.reshape(plan.vpp, plan.pp, -1)


def model_blocks(
    workload: Workload, cut: Cut, recompute: Recompute, execution: Execution, on_cpu: bool = False
) -> ModelBlocks:
    """Every block of ``workload``; remembered, since a search asks for few distinct ones."""
    return _model_blocks(_Same(workload), cut, recompute, execution, on_cpu)


class _Same:
    """A workload as a key of a cache: by identity, since it never changes and hashing it takes milliseconds."""

    __slots__ = ("value",)

    def __init__(self, value: Workload) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


@lru_cache(maxsize=4096)
def _model_blocks(same: _Same, cut: Cut, recompute: Recompute, execution: Execution, on_cpu: bool) -> ModelBlocks:
    workload = same.value
    kinds: dict[str, BlockMemory] = {}
    for block in workload.blocks:
        if block.kind not in kinds:
            kinds[block.kind] = block_memory(block, cut, recompute, execution, on_cpu)
    blocks = [kinds[block.kind] for block in workload.blocks]
    sums = np.array([[getattr(block, name) for name in SUMS] for block in blocks])
    copies = (each.bytes for block in workload.blocks for each in block.exchanges if each.axis == "ep")
    return ModelBlocks(
        np.concatenate([np.zeros((1, len(SUMS))), sums.cumsum(0)]),
        np.array([[getattr(block, name) for name in MOST] for block in blocks]),
        blocks[-1],
        blocks[0].dense,
        workload.width * workload.element_bytes * cut.stream,
        max(copies, default=0.0),
        cut.routed,
    )
