"""Mixers from plain numbers: softmax attention and its kin, delta rules and state-space layers (see ``operations.py``).

Widths per token: ``Q`` queries and ``G`` keys (or values) of attention, ``HK`` keys and ``HV`` values of a delta rule.
Gates of the delta rules and the log-sum-exp of attention are float32 whatever the run's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from parallel.planning.models.operations import FLOAT32_BYTES, Part, Stream
from parallel.planning.workload import Divisor, Exchange, Operation

#: Tokens of a chunk of the delta rules (FLA's kernels and Stoker's own), and of Mamba-2 (its authors' kernels).
DELTA_CHUNK = 64
SSM_CHUNK = 128


def _mixer(
    stream: Stream, kind: str, operations: Iterable[Operation], divisors: tuple[Divisor, ...], *exchanges: Exchange
) -> Part:
    return Part(kind, tuple(replace(op, remade=True) for op in operations), divisors, exchanges or (stream.region(),))


def mean_keys(seq_len: int, window: int | None = None) -> float:
    """Keys that a query of causal attention reads on average, the diagonal counted half: seq_len / 2 without a window.
    Documents packed in a window read fewer, which is not counted."""
    reach = min(window or seq_len, seq_len)
    return reach - reach * reach / (2 * seq_len)


def attention(
    stream: Stream,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    rope: bool = True,
    qk_norm: bool = False,
    output_gate: bool = False,
    window: int | None = None,
    flash: bool = True,
    dropout: bool = False,
    norm_vectors: int = 1,
) -> Part:
    """Causal softmax attention, grouped-query; each token reads the last ``window`` tokens.

    ``flash`` false: scores are written to memory and the masked half of them is computed as well, as before
    FlashAttention (5as/h of arXiv 2205.05198). ``dropout``: of attention's weights and of the branch's output.
    """
    Q, G, size = heads * head_dim, kv_heads * head_dim, stream.element_bytes
    ops = [stream.norm("mixer.norm", vectors=norm_vectors)]
    ops += stream.gemms("qkv", {"q": Q, "k": G, "v": G} | ({"gate": Q} if output_gate else {}), stream.width)
    rotated = stream.elementwise("qk_norm_rope", ("tp",), Q + G, Q + G)
    if qk_norm:
        ops.append(stream.weight("qk_norm.weight", 2 * head_dim))
        ops.append(rotated)
    elif rope:
        ops.append(replace(rotated, saved_bytes=0))  # a rotation alone needs no copy of what it rotates
    keys = mean_keys(stream.seq_len, window) if flash else stream.seq_len
    ops += _core(stream, heads, keys, Q, G, Q, G, flash=flash, dropout=dropout)
    if output_gate:
        ops.append(stream.elementwise("output_gate", ("tp",), 2 * Q, Q))
    ops.append(stream.residual("o", Q))
    if dropout:
        ops.append(stream.dropout("mixer.dropout"))
    rules = (Divisor("tp", "attention.num_heads", heads), Divisor("tp", "attention.num_kv_heads", kv_heads))
    kind = "attention" if window is None else f"attention[{window}]"
    return _mixer(stream, kind, ops, rules, stream.region(), Exchange("cp", 2 * G * size))


def _core(
    stream: Stream,
    heads: int,
    keys: float,
    query: int,
    key: int,
    value: int,
    kept_value: int,
    *,
    flash: bool = True,
    dropout: bool = False,
) -> Iterable[Operation]:
    """Scores, softmax and weighted sum; widths of a token: ``query`` and ``value`` over all heads, ``key`` and
    ``kept_value`` as they are stored. A flash kernel's own recomputation in backward is no model FLOP."""
    flops, size = 2 * (query + value) * keys, stream.element_bytes
    log_sum_exp = heads * FLOAT32_BYTES if flash else 0
    out = value * size + log_sum_exp
    read = (query + key + kept_value) * size
    scores = heads * stream.seq_len * size
    if not flash:
        read += 2 * scores  # written by one product and read by the other
    core = Operation("attention", "attention", ("tp",), 0, 0, flops, 2 * flops, read, out, out)
    yield replace(core, head_dim=query // heads, kernels=1 if flash else 2)
    if not flash:
        # Softmax keeps its output; dropout behind it a mask of one byte and its own output.
        mask = heads * stream.seq_len if dropout else 0
        steps = 1 + dropout
        softmax = Operation("attention.softmax", "elementwise", ("tp",), kernels=steps)
        moved, kept = steps * scores, steps * scores + mask
        yield replace(softmax, input_bytes=moved, output_bytes=moved + mask, saved_bytes=kept)


def latent_attention(
    stream: Stream, heads: int, *, kv_lora: int, nope: int, rope: int, value_dim: int, q_lora: int | None = None
) -> Part:
    """Multi-head latent attention in its training form (DeepSeek-V2, arXiv 2405.04434, section 2.1): queries and keys
    have ``nope`` + ``rope`` dims a head, values ``value_dim``. Every rank holds the down products; what is gathered
    for tensor parallelism is their output. Kept for backward are the queries, keys and values of all heads."""
    D, size, QK, V = stream.width, stream.element_bytes, heads * (nope + rope), heads * value_dim
    ops = [stream.norm("mixer.norm")]
    if q_lora:
        ops += (stream.gemm("q_down", q_lora, D, None), stream.norm("q_norm", q_lora))
        ops[-2] = replace(ops[-2], saved_bytes=0)  # kept by the norm that reads it
    ops.append(stream.gemm("mla_up.q", QK, q_lora or D))
    ops += (stream.gemm("kv_down", kv_lora + rope, D, None), stream.norm("kv_norm", kv_lora))
    ops[-2] = replace(ops[-2], saved_bytes=rope * size)
    ops.append(stream.gemm("mla_up.kv", heads * (nope + value_dim), kv_lora))
    # One rotated key for all heads is copied into each.
    rotate = stream.elementwise("mla_up.rope", ("tp",), QK + heads * nope, QK + QK)
    ops.append(replace(rotate, saved_bytes=heads * rope * size))
    ops += _core(stream, heads, mean_keys(stream.seq_len), QK, QK, V, V)
    ops.append(stream.residual("o", V))
    gathered = (q_lora or D) + kv_lora + rope
    region = Exchange("tp", (gathered + D) / 2 * size)
    rules = (Divisor("tp", "attention.num_heads", heads),)
    return _mixer(stream, "mla", ops, rules, region, Exchange("cp", (QK + V) * size))


def gated_delta(
    stream: Stream,
    qk_heads: int,
    v_heads: int,
    key_dim: int,
    value_dim: int,
    conv_width: int = 4,
    chunk: int = DELTA_CHUNK,
) -> Part:
    """Gated delta rule, a scalar decay per value head (arXiv 2412.06464)."""
    K, V, heads = key_dim, value_dim, v_heads
    HK, HV = qk_heads * K, heads * V
    rows = {"q": HK, "k": HK, "v": HV, "z": HV, "b": heads, "a": heads}
    ops = [stream.norm("mixer.norm"), *_projections(stream, rows, gates=("b", "a"))]
    backward = heads * (14 * K * V + 10 * chunk * (K + V))
    ops += _delta_rule(stream, "gated_delta", HK, HV, heads, K, V, conv_width, chunk, heads, backward)
    state = Exchange("cp", heads * K * V * FLOAT32_BYTES, state=True)
    rules = (Divisor("tp", "gated_delta.num_qk_heads", qk_heads),)
    return _mixer(stream, "gated_delta", ops, rules, stream.region(), state)


def kda(
    stream: Stream,
    heads: int,
    key_dim: int,
    value_dim: int,
    gate_rank: int,
    conv_width: int = 4,
    chunk: int = DELTA_CHUNK,
) -> Part:
    """Kimi delta attention: a decay per key channel, gates of low rank (arXiv 2510.26692)."""
    K, V = key_dim, value_dim
    HK, HV = heads * K, heads * V
    ops = [stream.norm("mixer.norm"), *_projections(stream, {"q": HK, "k": HK, "v": HV, "b": heads}, gates=("b",))]
    for gate, rows in (("f", HK), ("g", HV)):
        low = stream.gemm(f"{gate}_a", gate_rank, stream.width, None, quantised=False)
        ops += (replace(low, gathered=True), stream.gemm(f"{gate}_b", rows, gate_rank, quantised=False))
    backward = heads * (14 * K * V + 10 * chunk * V + 12 * chunk * K)
    ops += _delta_rule(stream, "kda", HK, HV, heads, K, V, conv_width, chunk, HK, backward)
    state = Exchange("cp", heads * K * V * FLOAT32_BYTES, state=True)
    return _mixer(stream, "kda", ops, (Divisor("tp", "kda.num_heads", heads),), stream.region(), state)


def _projections(stream: Stream, rows: dict[str, int], gates: tuple[str, ...]) -> Iterable[Operation]:
    """Products of the stream, in one where they are fused; ``gates`` are not quantised where they stand alone."""
    if stream.fused:
        yield stream.gemm("in_proj", sum(rows.values()), stream.width)
        return
    for name, out in rows.items():
        yield stream.gemm(name, out, stream.width, quantised=name not in gates)


def _delta_rule(
    stream: Stream,
    kind: Literal["gated_delta", "kda"],
    HK: int,
    HV: int,
    heads: int,
    K: int,
    V: int,
    conv_width: int,
    chunk: int,
    decays: int,
    backward: float,
) -> Iterable[Operation]:
    """From the projections on: ``decays`` log decays a token, ``backward`` FLOPs of the rule's closed form."""
    size = stream.element_bytes
    yield from (_conv(stream, f"{name}_conv", rows, conv_width) for name, rows in (("q", HK), ("k", HK), ("v", HV)))
    gates = (decays + heads) * FLOAT32_BYTES  # log decay and beta
    decay = stream.elementwise("gates", ("tp",), decays + heads, 0, heads + decays)  # A_log and dt_bias
    yield replace(decay, output_bytes=gates, saved_bytes=gates)
    # Dense tiles of C tokens, a value head: six products with the state and four in the chunk, then the inverse.
    C = chunk
    forward = heads * (6 * K * V + 4 * C * (K + V) + 4 * C**2 / 3)
    read, out = (2 * HK + HV) * size + gates, HV * size
    kept = heads * (C + K * V / C) * size  # the chunk's triangular inverse and its entering state
    yield Operation(kind, kind, ("tp",), 0, 0, forward, backward, read, out, out + kept, kernels=3)
    yield stream.elementwise("out_norm", ("tp",), 2 * HV, HV)
    yield stream.weight("out_norm.weight", V)
    yield stream.residual("o", HV)


def _conv(stream: Stream, name: str, rows: int, width: int) -> Operation:
    """A short causal convolution of each channel."""
    taps, moved = rows * width, rows * stream.element_bytes
    return Operation(name, "conv", ("tp",), taps, taps, 2 * taps, 4 * taps, moved, moved, moved)


def mamba2(
    stream: Stream,
    heads: int,
    head_dim: int,
    groups: int,
    state_dim: int,
    conv_width: int = 4,
    chunk: int = SSM_CHUNK,
) -> Part:
    """Mamba-2 (arXiv 2405.21060): ``heads`` of ``head_dim`` channels with states of ``state_dim``; B and C are shared
    by the heads of a group. FLOPs are those of the chunked form (section 6): per token the chunk's scores for each
    group, their product with the chunk's inputs for each head, and writing and reading the state. As in its authors'
    fused kernel (``mamba_split_conv1d_scan_combined``), backward makes convolution and states again from ``in_proj``'s
    output."""
    size, inner, BC = stream.element_bytes, heads * head_dim, 2 * groups * state_dim
    ops = [stream.norm("mixer.norm"), stream.gemm("in_proj", 2 * inner + BC + heads, stream.width)]
    ops.append(replace(_conv(stream, "conv", inner + BC, conv_width), saved_bytes=0))
    gates = stream.elementwise("gates", ("tp",), heads, heads, 3 * heads)  # A_log, D, dt_bias
    ops.append(replace(gates, saved_bytes=0))
    forward = groups * 2 * chunk * state_dim + heads * head_dim * (2 * chunk + 4 * state_dim)
    read, out = (inner + BC) * size + heads * FLOAT32_BYTES, inner * size
    ops.append(Operation("ssm", "ssm", ("tp",), 0, 0, forward, 2 * forward, read, out, out, kernels=5))
    ops.append(stream.elementwise("out_norm", ("tp",), 2 * inner, inner, inner))
    ops.append(stream.residual("o", inner))
    rules = (Divisor("tp", "mamba2.num_heads", heads), Divisor("tp", "mamba2.groups", groups))
    state = Exchange("cp", inner * state_dim * FLOAT32_BYTES, state=True)
    return _mixer(stream, "mamba2", ops, rules, stream.region(), state)
