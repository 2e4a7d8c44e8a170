"""Workload of a ModelSpec: each layer, as the builders of ``parallel.planning`` count it."""

from __future__ import annotations

from kernels.chunk_size import CHUNK
from parallel.planning.models import mixers
from parallel.planning.models.operations import Part, Stream, assemble, layer, mlp, moe
from parallel.planning.plan import ParallelPlan, nearest_multiples
from parallel.planning.workload import Workload
from pretrain.spec import Attention, Dense, FeedForward, GatedDelta, Kda, Mixer, ModelSpec, MoE
from stoker.errors import Refusal


def workload_of(spec: ModelSpec, seq_len: int, element_bytes: int = 2) -> Workload:
    """What ``spec`` costs at windows of ``seq_len`` tokens with activations of ``element_bytes`` (bfloat16: 2)."""
    stream = Stream(spec.width, seq_len, element_bytes)
    blocks = {kind: layer(stream, _mixer(stream, kind.mixer), _feed(stream, kind.ffn)) for kind in set(spec.layers)}
    return assemble(stream, spec.vocab_size, [blocks[kind] for kind in spec.layers], tied=spec.tied_embedding)


def _mixer(stream: Stream, mixer: Mixer) -> Part:
    match mixer:
        case GatedDelta(qk, v, K, V, taps):
            return mixers.gated_delta(stream, qk, v, K, V, taps, CHUNK)
        case Kda(heads, K, V, rank, taps):
            return mixers.kda(stream, heads, K, V, rank, taps, CHUNK)
        case Attention(heads, kv_heads, dim):
            options = {"qk_norm": mixer.qk_norm, "output_gate": mixer.output_gate}
            return mixers.attention(stream, heads, kv_heads, dim, **options)


def _feed(stream: Stream, ffn: FeedForward) -> Part:
    match ffn:
        case Dense(hidden):
            return mlp(stream, hidden)
        case MoE(experts, top_k, hidden):
            shared, gate = ffn.shared_hidden, ffn.shared_gate
            return moe(stream, experts, top_k, hidden, shared=shared, shared_gate=gate)


#: Bytes that a row of a grouped matrix product must be a multiple of (torch.nn.functional.grouped_mm, torch 2.13:
#: "strides should be multiple of 16 bytes").
GROUPED_MM_ALIGNMENT = 16


def refuse_ragged_experts(spec: ModelSpec, plan: ParallelPlan, dtype: str) -> None:
    """Raise Refusal for expert widths that the grouped matrix product of this dtype does not take."""
    if dtype == "float64":
        return  # expert by expert
    step = GROUPED_MM_ALIGNMENT // {"float32": 4, "bfloat16": 2}[dtype]
    for block in spec.layers:
        if not isinstance(block.ffn, MoE):
            continue
        for key, size, parts in (("model.width", spec.width, 1), ("model.moe.hidden", block.ffn.hidden, plan.etp)):
            if size % (step * parts):
                nearest = " or ".join(map(str, nearest_multiples(size, step * parts)))
                cut = f" over etp={parts}" if parts > 1 else ""
                raise Refusal(
                    f"{key}={size}{cut}: the experts' grouped matrix product in {dtype} takes multiples of {step}: "
                    f"nearest are {nearest}"
                )
