"""Workload of a ModelSpec: what each operation costs a token.

Widths per token: ``D`` model, ``Q`` queries and ``G`` keys (or values) of attention, ``HK`` keys and ``HV`` values of
a delta rule, ``F`` feed-forward, ``E`` experts. Gates of the delta rules, the log-sum-exp of attention, router and
output logits are float32 whatever the run's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from kernels.chunk_size import CHUNK
from parallel.planning.plan import ParallelPlan, nearest_multiples
from parallel.planning.workload import Divisor, LayerWorkload, Operation, Workload
from pretrain.spec import Attention, Dense, GatedDelta, Kda, LayerSpec, Mixer, ModelSpec, MoE
from stoker.errors import Refusal

FLOAT32_BYTES = 4


def workload_of(spec: ModelSpec, seq_len: int, element_bytes: int = 2) -> Workload:
    """What ``spec`` costs at windows of ``seq_len`` tokens with activations of ``element_bytes`` (bfloat16: 2).

    Causal attention reads seq_len/2 keys on average: documents packed in a window read fewer, which is not counted.
    """
    costs = _Costs(spec.width, seq_len, element_bytes)
    D, vocab = spec.width, spec.vocab_size
    embed = Operation("embed", "lookup", ("tp",), vocab * D, vocab * D, output_bytes=D * element_bytes)
    logits = vocab * FLOAT32_BYTES
    head = replace(costs.gemm("head", vocab, D), output_bytes=logits, saved_bytes=logits)
    if spec.tied_embedding:
        head = replace(head, parameters=0, active_parameters=0)
    return Workload(
        seq_len=seq_len,
        width=D,
        element_bytes=element_bytes,
        embedding=LayerWorkload("embedding", (embed,)),
        layers=tuple(costs.layer(layer) for layer in spec.layers),
        head=LayerWorkload("head", (costs.norm("final_norm"), head)),
        tied_embedding=spec.tied_embedding,
    )


@dataclass(frozen=True)
class _Costs:
    """Costs of a model's operations, as kernels that read inputs once and write outputs once."""

    D: int
    seq_len: int
    element_bytes: int

    def layer(self, layer: LayerSpec) -> LayerWorkload:
        mixer, mixing = self._mixer(layer.mixer)
        if isinstance(layer.ffn, Dense):
            ffn, feeding = "dense", self._dense(layer.ffn)
        else:
            ffn, feeding = "moe", self._moe(layer.ffn)
        return LayerWorkload(
            f"{mixer}/{ffn}",
            (*(replace(op, remade=True) for op in mixing), *feeding),
            tuple(_divisors(layer)),
            stream_bytes=self.D * self.element_bytes,
        )

    def _mixer(self, mixer: Mixer) -> tuple[str, Iterator[Operation]]:
        match mixer:
            case GatedDelta():
                return "gated_delta", self._gated_delta(mixer)
            case Kda():
                return "kda", self._kda(mixer)
            case Attention():
                return "attention", self._attention(mixer)

    def norm(self, name: str) -> Operation:
        """RMSNorm of the residual stream: keeps the stream, and its output for the products that read it."""
        stream = self.D * self.element_bytes
        return replace(self._elementwise(name, (), self.D, self.D, self.D), saved_bytes=2 * stream)

    def gemm(self, name: str, out: int, inner: int, axes: tuple[str, ...] = ("tp",)) -> Operation:
        """A matrix product that keeps its output, which a non-linear operation reads next."""
        flops, out_bytes = 2 * out * inner, out * self.element_bytes
        return Operation(
            name,
            "gemm",
            axes,
            parameters=out * inner,
            active_parameters=out * inner,
            forward_flops=flops,
            backward_flops=2 * flops,
            input_bytes=inner * self.element_bytes,
            output_bytes=out_bytes,
            saved_bytes=out_bytes,
        )

    def _residual(self, name: str, inner: int, axes: tuple[str, ...] = ("tp",)) -> Operation:
        """A product whose output is added to the stream: nobody's backward reads it."""
        return replace(self.gemm(name, self.D, inner, axes), saved_bytes=0)

    def _elementwise(self, name: str, axes: tuple[str, ...], read: int, written: int, parameters: int = 0) -> Operation:
        """``read`` and ``written`` in elements; keeps its output for the product that reads it."""
        out = written * self.element_bytes
        return Operation(
            name, "elementwise", axes, parameters, parameters, 0, 0, read * self.element_bytes, out, saved_bytes=out
        )

    def _attention(self, mixer: Attention) -> Iterator[Operation]:
        Q, G = mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
        yield self.norm("mixer.norm")
        yield from (self.gemm(name, rows, self.D) for name, rows in (("q", Q), ("k", G), ("v", G)))
        if mixer.output_gate:
            yield self.gemm("gate", Q, self.D)
        rotate = self._elementwise("qk_norm_rope", ("tp",), Q + G, Q + G)
        if mixer.qk_norm:
            yield self._elementwise("qk_norm.weight", (), 0, 0, 2 * mixer.head_dim)
        else:
            rotate = replace(rotate, saved_bytes=0)  # a rotation alone needs no copy of what it rotates
        yield rotate
        # QK^T and PV over seq_len / 2 keys. A flash kernel's own recomputation in backward is no model FLOP.
        flops = 2 * 2 * Q * self.seq_len / 2
        log_sum_exp = mixer.num_heads * FLOAT32_BYTES
        read, out = (Q + 2 * G) * self.element_bytes, Q * self.element_bytes + log_sum_exp
        yield Operation("attention", "attention", ("tp",), 0, 0, flops, 2 * flops, read, out, saved_bytes=out)
        if mixer.output_gate:
            yield self._elementwise("output_gate", ("tp",), 2 * Q, Q)
        yield self._residual("o", Q)

    def _gated_delta(self, mixer: GatedDelta) -> Iterator[Operation]:
        heads, K, V = mixer.num_v_heads, mixer.key_dim, mixer.value_dim
        HK, HV = mixer.num_qk_heads * K, heads * V
        yield self.norm("mixer.norm")
        products = (("q", HK), ("k", HK), ("v", HV), ("z", HV), ("b", heads), ("a", heads))
        yield from (self.gemm(name, rows, self.D) for name, rows in products)
        backward = 14 * K * V + 10 * CHUNK * (K + V)
        yield from self._delta_rule(mixer, "gated_delta", HK, HV, heads, decays=heads, backward=heads * backward)

    def _kda(self, mixer: Kda) -> Iterator[Operation]:
        heads, K, V, rank = mixer.num_heads, mixer.key_dim, mixer.value_dim, mixer.gate_rank
        HK, HV = heads * K, heads * V
        yield self.norm("mixer.norm")
        products = (("q", HK), ("k", HK), ("v", HV), ("b", heads))
        yield from (self.gemm(name, rows, self.D) for name, rows in products)
        for gate, rows in (("f", HK), ("g", HV)):
            yield replace(self.gemm(f"{gate}_a", rank, self.D, ()), gathered=True)
            yield self.gemm(f"{gate}_b", rows, rank)
        backward = 14 * K * V + 10 * CHUNK * V + 12 * CHUNK * K
        yield from self._delta_rule(mixer, "kda", HK, HV, heads, decays=HK, backward=heads * backward)

    def _delta_rule(
        self,
        mixer: GatedDelta | Kda,
        kind: Literal["gated_delta", "kda"],
        HK: int,
        HV: int,
        heads: int,
        decays: int,
        backward: float,
    ) -> Iterator[Operation]:
        """From the projections on: ``decays`` log decays a token, ``backward`` FLOPs of the rule's closed form."""
        for name, rows in (("q_conv", HK), ("k_conv", HK), ("v_conv", HV)):
            taps, flops = rows * mixer.conv_width, 2 * rows * mixer.conv_width
            row_bytes = rows * self.element_bytes
            yield Operation(name, "conv", ("tp",), taps, taps, flops, 2 * flops, row_bytes, row_bytes, row_bytes)
        gates = (decays + heads) * FLOAT32_BYTES  # log decay and beta
        decay = self._elementwise("gates", ("tp",), decays + heads, 0, heads + decays)  # A_log and dt_bias
        yield replace(decay, output_bytes=gates, saved_bytes=gates)
        # Dense tiles of C tokens, a value head: six products with the state and four in the chunk, then the inverse.
        C, K, V = CHUNK, mixer.key_dim, mixer.value_dim
        forward = heads * (6 * K * V + 4 * C * (K + V) + 4 * C**2 / 3)
        read, out = (2 * HK + HV) * self.element_bytes + gates, HV * self.element_bytes
        kept = heads * (C + K * V / C) * self.element_bytes  # the chunk's triangular inverse and its entering state
        yield Operation(kind, kind, ("tp",), 0, 0, forward, backward, read, out, out + kept)
        yield self._elementwise("out_norm", ("tp",), 2 * HV, HV)
        yield self._elementwise("out_norm.weight", (), 0, 0, mixer.value_dim)
        yield self._residual("o", HV)

    def _swiglu(self, name: str, hidden: int) -> Iterator[Operation]:
        yield self.gemm(f"{name}gate", hidden, self.D)
        yield self.gemm(f"{name}up", hidden, self.D)
        yield self._elementwise(f"{name}swiglu", ("tp",), 2 * hidden, hidden)
        yield self._residual(f"{name}down", hidden)

    def _dense(self, ffn: Dense) -> Iterator[Operation]:
        yield self.norm("ffn.norm")
        yield from self._swiglu("", ffn.hidden)

    def _moe(self, ffn: MoE) -> Iterator[Operation]:
        yield self.norm("ffn.norm")
        logits = ffn.num_experts * FLOAT32_BYTES
        router = self.gemm("router", ffn.num_experts, self.D, ())
        yield replace(router, output_bytes=logits, saved_bytes=logits)
        # A token travels to top_k experts and back: that many copies of it are read, kept and written.
        k, token = ffn.top_k, self.D * self.element_bytes
        yield self._elementwise("dispatch", (), self.D, k * self.D)
        for op in self._swiglu("experts.", ffn.hidden):
            yield _visited(op, k, ffn.num_experts)
        yield replace(self._elementwise("combine", (), k * self.D, self.D), saved_bytes=k * token)
        if ffn.shared_hidden is not None:
            yield from self._swiglu("shared.", ffn.shared_hidden)
            if ffn.shared_gate:
                yield self.gemm("shared.router", 1, self.D, ())
                # Its sum with the stream keeps nothing; the gate's gradient needs the expert's own output.
                yield replace(self._elementwise("shared.weighting", (), self.D + 1, self.D), saved_bytes=token)


def _visited(op: Operation, top_k: int, num_experts: int) -> Operation:
    """An operation of one expert -> of all experts, each token visiting ``top_k``."""
    return replace(
        op,
        kind="grouped_gemm" if op.kind == "gemm" else op.kind,
        axes=("ep", "etp"),
        parameters=op.parameters * num_experts,
        active_parameters=op.active_parameters * top_k,
        forward_flops=op.forward_flops * top_k,
        backward_flops=op.backward_flops * top_k,
        input_bytes=op.input_bytes * top_k,
        output_bytes=op.output_bytes * top_k,
        saved_bytes=op.saved_bytes * top_k,
    )


def _divisors(layer: LayerSpec) -> Iterator[Divisor]:
    """What must divide what. Value heads follow query/key heads, of which they are a multiple."""
    mixer, ffn = layer.mixer, layer.ffn
    if isinstance(mixer, Attention):
        yield Divisor("tp", "attention.num_heads", mixer.num_heads)
        yield Divisor("tp", "attention.num_kv_heads", mixer.num_kv_heads)
    elif isinstance(mixer, Kda):
        yield Divisor("tp", "kda.num_heads", mixer.num_heads)
    else:
        yield Divisor("tp", "gated_delta.num_qk_heads", mixer.num_qk_heads)
    if isinstance(ffn, Dense):
        yield Divisor("tp", "dense.hidden", ffn.hidden)
        return
    yield Divisor("ep", "moe.num_experts", ffn.num_experts)
    yield Divisor("etp", "moe.hidden", ffn.hidden)
    if ffn.shared_hidden is not None:
        yield Divisor("tp", "moe.shared_hidden", ffn.shared_hidden)


#: Bytes that a row of a grouped matrix product must be a multiple of (torch.nn.functional.grouped_mm, torch 2.13:
#: "strides should be multiple of 16 bytes").
GROUPED_MM_ALIGNMENT = 16


def refuse_ragged_experts(spec: ModelSpec, plan: ParallelPlan, dtype: str) -> None:
    """Raise Refusal for expert widths that the grouped matrix product of this dtype does not take."""
    if dtype == "float64":
        return  # expert by expert
    step = GROUPED_MM_ALIGNMENT // {"float32": 4, "bfloat16": 2}[dtype]
    for layer in spec.layers:
        if not isinstance(layer.ffn, MoE):
            continue
        for key, size, parts in (("model.width", spec.width, 1), ("model.moe.hidden", layer.ffn.hidden, plan.etp)):
            if size % (step * parts):
                nearest = " or ".join(map(str, nearest_multiples(size, step * parts)))
                cut = f" over etp={parts}" if parts > 1 else ""
                raise Refusal(
                    f"{key}={size}{cut}: the experts' grouped matrix product in {dtype} takes multiples of {step}: "
                    f"nearest are {nearest}"
                )
