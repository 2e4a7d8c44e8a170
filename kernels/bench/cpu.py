"""Ours against the torch fallbacks of Hugging Face transformers on one CPU thread.

Float32. Peers run in turns with ours, in the same process; the time of each is the median over the rounds, and the
ratio is the median of the rounds' ratios, which a busy machine disturbs less than either time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from kernels.bench.rows import Row
from kernels.decode.op import decode
from kernels.epilogue.op import epilogue
from kernels.gated_delta.op import gated_delta
from kernels.kda.op import kda
from kernels.prologue.op import prologue
from kernels.samples import cu_seqlens_of, epilogue_inputs, gated_delta_inputs, prologue_inputs

Outputs = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class _Case:
    """Two functions of nothing that return the same; ``leaves`` are differentiated, for ``cotangents`` of the results,
    unless there are none."""

    name: str
    ours: Callable[[], Outputs]
    theirs: Callable[[], Outputs]
    leaves: Sequence[Tensor] = ()
    cotangents: Outputs = ()


@dataclass(frozen=True)
class _Comparison:
    """``cases``: number of tokens -> cases; raises ImportError where the peer is not installed."""

    op: str
    peer: str
    cases: Callable[[int], Iterator[_Case]]
    most_rounds: int = 1000


def cpu_rows(rounds: int, tokens: int) -> list[Row]:
    """All rows, float32, one thread. Takes about ``rounds`` seconds, and kda's peer, of 3 rounds at most, a minute."""
    with _one_thread():
        measured = [row for comparison in _COMPARISONS for row in _rows(comparison, rounds, tokens)]
    return measured + [Row(op, "all", "none known on CPU", None, None, None, "not measured") for op in _WITHOUT_PEER]


def _gated_delta(tokens: int) -> Iterator[_Case]:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    for num_qk_heads in (8, 4):
        yield _delta(gated_delta, torch_chunk_gated_delta_rule, tokens, num_qk_heads, per_channel=False)


def _kda(tokens: int) -> Iterator[_Case]:
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention

    yield _delta(kda, chunk_kimi_delta_attention, tokens, 8, per_channel=True)


def _delta(
    rule: Callable[..., tuple[Tensor, Tensor]],
    their_rule: Callable[..., tuple[Tensor, Tensor]],
    tokens: int,
    num_qk_heads: int,
    per_channel: bool,
) -> _Case:
    inputs = gated_delta_inputs([tokens], (num_qk_heads, 8), (64, 64), torch.float32, per_channel=per_channel)
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "g", "beta")]
    cu_seqlens = cu_seqlens_of([tokens])

    def ours() -> Tensor:
        return rule(*leaves, cu_seqlens)[0]

    def theirs() -> Tensor:
        return their_rule(*(x.unsqueeze(0) for x in leaves), output_final_state=True)[0].squeeze(0)

    name = f"T={tokens}, heads {num_qk_heads}/8, K=V=64"
    return _Case(name, ours, theirs, leaves, torch.randn_like(inputs["v"]))


def _decode(tokens: int) -> Iterator[_Case]:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    sequences = 8
    inputs = gated_delta_inputs([1] * sequences, (8, 8), (64, 64), torch.float32)
    state = inputs.pop("initial_state")
    q, k, v, g, beta = (x.unsqueeze(1) for x in inputs.values())

    def ours() -> Tensor:
        return decode(q, k, v, g, beta, state)

    def theirs() -> Tensor:
        return torch_recurrent_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)[0]

    yield _Case(f"B={sequences}, 1 token, heads 8/8, K=V=64", ours, theirs)


def _prologue(tokens: int) -> Iterator[_Case]:
    from transformers.models.qwen3_next.modeling_qwen3_next import causal_conv1d_fn, l2norm

    def case(Hk: int, Hv: int, K: int, V: int) -> _Case:
        inputs = prologue_inputs([tokens], (Hk, Hv), (K, V), torch.float32)
        leaves = [x.requires_grad_() for x in inputs.values()]
        cu_seqlens = cu_seqlens_of([tokens])

        def ours() -> Outputs:
            return prologue(**inputs, cu_seqlens=cu_seqlens, num_qk_heads=Hk)

        def theirs() -> Outputs:
            *projections, a, b, q_conv, k_conv, v_conv, A_log, dt_bias = leaves
            channels_first = torch.cat(projections, -1).T.unsqueeze(0)
            mixed = causal_conv1d_fn(channels_first, torch.cat((q_conv, k_conv, v_conv)), activation="silu")
            q, k, v = mixed.transpose(1, 2)[0].split((Hk * K, Hk * K, Hv * V), -1)
            g = -A_log.exp() * torch.nn.functional.softplus(a + dt_bias)
            return l2norm(q.view(-1, Hk, K)), l2norm(k.view(-1, Hk, K)), v.view(-1, Hv, V), g, b.sigmoid()

        cotangents = [torch.randn_like(x) for x in ours()]
        return _Case(f"T={tokens}, heads {Hk}/{Hv}, K=V={K}, W=4", ours, theirs, leaves, cotangents)

    yield case(8, 8, 64, 64)
    yield case(8, 16, 64, 64)


def _epilogue(tokens: int) -> Iterator[_Case]:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    def case(Hv: int, V: int) -> _Case:
        norm = Qwen3NextRMSNormGated(V, eps=1e-6)
        inputs = epilogue_inputs(tokens, Hv, V, torch.float32)
        o, z = inputs["o"].requires_grad_(), inputs["z"].requires_grad_()

        def ours() -> Tensor:
            return epilogue(o, z, norm.weight, 1e-6, "silu")

        def theirs() -> Tensor:
            return norm(o, z)

        return _Case(f"T={tokens}, heads {Hv}, V={V}", ours, theirs, (o, z, norm.weight), torch.randn_like(o))

    yield case(8, 64)
    yield case(16, 64)


_COMPARISONS = (
    _Comparison("gated_delta", "transformers qwen3_next torch_chunk_gated_delta_rule", _gated_delta),
    _Comparison("kda", "transformers kimi_linear chunk_kimi_delta_attention", _kda, most_rounds=3),
    _Comparison("decode", "transformers qwen3_next torch_recurrent_gated_delta_rule", _decode),
    _Comparison("prologue", "transformers qwen3_next causal_conv1d_fn, l2norm and gates", _prologue),
    _Comparison("epilogue", "transformers qwen3_next Qwen3NextRMSNormGated", _epilogue),
)

_WITHOUT_PEER = ("segment_pairs", "segment_fold", "split_delta")


def _rows(comparison: _Comparison, rounds: int, tokens: int) -> Iterator[Row]:
    """For every case a row for the forward alone (no gradient recorded) and one for forward and backward."""
    op, peer = comparison.op, comparison.peer
    try:
        for case in comparison.cases(tokens):
            for name, measured in (("forward", _forward), ("forward + backward", _forward_and_backward)):
                if measured is _forward or case.leaves:
                    pairs = _seconds(measured, case, min(rounds, comparison.most_rounds))
                    ours_ms, peer_ms = (1e3 * median(column) for column in zip(*pairs, strict=True))
                    label = f"{case.name}, float32, one thread, {name}"
                    yield Row(op, label, peer, ours_ms, peer_ms, median(b / a for a, b in pairs))
    except ImportError as error:
        yield Row(op, "all", peer, None, None, None, f"skipped, {error}")


def _forward(case: _Case, call: Callable[[], Outputs]) -> None:
    with torch.no_grad():
        call()


def _forward_and_backward(case: _Case, call: Callable[[], Outputs]) -> None:
    torch.autograd.grad(call(), case.leaves, case.cotangents)


def _seconds(
    measured: Callable[[_Case, Callable[[], Outputs]], None], case: _Case, rounds: int
) -> list[tuple[float, float]]:
    """Ours and theirs in turns."""

    def seconds(call: Callable[[], Outputs]) -> float:
        begin = time.perf_counter()
        measured(case, call)
        return time.perf_counter() - begin

    pairs = [(seconds(case.ours), seconds(case.theirs)) for _ in range(rounds + 1)]
    return pairs[1:]  # the first round warms up


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
