"""Builders of operations: bytes and FLOPs against closed forms of papers, against counting, and against model cards."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.planning.models.architectures import Architecture, Form, architecture_of, architectures, workload_from
from parallel.planning.models.mixers import attention, latent_attention, mamba2, mean_keys
from parallel.planning.models.operations import MODULES, Part, Stream, assemble, head, layer, mlp, moe, with_mtp
from parallel.planning.workload import LayerWorkload, Operation, Workload

NAMED = [entry for entry in architectures() if entry.layers and not entry.unmodelled]


def gpt_block(h: int, s: int, heads: int, *, flash: bool) -> LayerWorkload:
    stream = Stream(h, s)
    mixer = attention(stream, heads, heads, h // heads, rope=False, dropout=True, flash=flash, norm_vectors=2)
    return layer(stream, mixer, mlp(stream, 4 * h, gated=False, dropout=True, norm_vectors=2))


def kept(block: LayerWorkload) -> float:
    return sum(op.saved_bytes for op in block.operations)


@pytest.mark.parametrize(("h", "s", "heads"), [(6144, 2048, 64), (12288, 2048, 96), (96, 63, 3)])
def test_a_gpt_block_keeps_the_bytes_of_korthikanti(h: int, s: int, heads: int) -> None:
    """arXiv 2205.05198, equation 1: sbh(34 + 5as/h); without the scores, 34 sbh, and flash attention's statistics."""
    assert kept(gpt_block(h, s, heads, flash=False)) == 34 * h + 5 * heads * s
    assert kept(gpt_block(h, s, heads, flash=True)) == 34 * h + 4 * heads


@pytest.mark.parametrize(("h", "s", "heads"), [(12288, 2048, 96), (96, 63, 3)])
def test_a_gpt_block_without_flash_attention_runs_the_flops_of_korthikanti(h: int, s: int, heads: int) -> None:
    """Equation 7, a layer's forward: 24 b s h^2 (1 + s/6h); the masked half of the scores is computed as well."""
    block = gpt_block(h, s, heads, flash=False)
    assert block.forward_flops == pytest.approx(24 * h * h * (1 + s / (6 * h)), rel=1e-12)
    causal = gpt_block(h, s, heads, flash=True)
    assert block.forward_flops - causal.forward_flops == pytest.approx(2 * s * h, rel=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_a_modern_block_keeps_the_bytes_of_the_memory_model(fused: bool) -> None:
    """Norms in and out 8h, q 2ad, k and v 4gd, output 2ad, log-sum-exp 4a, gate and up 4f, activation 2f."""
    h, a, g, d, f = 96, 6, 3, 16, 100
    stream = Stream(h, 500, fused=fused)
    block = layer(stream, attention(stream, a, g, d), mlp(stream, f))
    assert kept(block) == 8 * h + 2 * a * d + 4 * g * d + 2 * a * d + 4 * a + 6 * f
    wide = Stream(h, 500, element_bytes=4, fused=fused)
    assert kept(layer(wide, attention(wide, a, g, d), mlp(wide, f))) == 2 * kept(block) - 4 * a


@pytest.mark.parametrize("keeps_outputs", [False, True])
def test_an_expert_layer_keeps_its_permuted_tokens(keeps_outputs: bool) -> None:
    """Router 4E; a token's k copies in 2h, gate and up 4f, activation 2f, output 2h unless its weight comes before."""
    h, E, k, f, shared = 96, 9, 4, 20, 50
    stream = Stream(h, 500)
    block = layer(stream, moe(stream, E, k, f, shared=shared, keeps_outputs=keeps_outputs))
    assert kept(block) == 4 * h + 4 * E + k * (2 * h + 6 * f + 2 * h * keeps_outputs) + 6 * shared


@given(seq_len=st.integers(1, 300), window=st.none() | st.integers(1, 400))
def test_mean_keys_is_the_mean_over_positions(seq_len: int, window: int | None) -> None:
    """Position i reads i whole keys and half of the diagonal, or the window."""
    counted = sum(min(i + 0.5, window or seq_len) for i in range(seq_len)) / seq_len
    assert mean_keys(seq_len, window) == pytest.approx(counted, rel=1e-12)


def operations(workload: Workload) -> Iterator[Operation]:
    return (op for block in dict.fromkeys(workload.blocks) for op in block.operations)


@pytest.mark.parametrize("entry", NAMED, ids=lambda entry: entry.names[0])
def test_a_product_says_the_flops_parameters_and_cut_of_its_operation(entry: Architecture) -> None:
    for op in operations(workload_from(entry, 500)):
        if op.product is None:
            assert op.kind not in ("gemm", "grouped_gemm"), op.name
            continue
        size = op.product.out * op.product.inner
        assert op.forward_flops == 2 * size * op.product.visits, op.name
        assert op.backward_flops == 2 * op.forward_flops, op.name
        assert op.parameters in (size * op.product.experts, 0), op.name  # none: a tied head, a prediction layer's
        assert (op.product.cut is None) == (op.axes == ()), op.name
        assert ("ep" in op.axes) == (op.product.experts > 1) == (op.kind == "grouped_gemm"), op.name


@pytest.mark.parametrize("entry", NAMED, ids=lambda entry: entry.names[0])
def test_head_router_and_gates_are_not_quantised(entry: Architecture) -> None:
    products = {op.name: op.product for op in operations(workload_from(entry, 500)) if op.product}
    plain = {name for name, made in products.items() if not made.quantised}
    assert plain == {name for name in products if name.split(".")[-1] in ("head", "router", "f_a", "f_b", "g_a", "g_b")}


def test_an_attention_layer_and_its_feed_forward_are_two_regions_and_single_branches_one() -> None:
    stream = Stream(96, 500)
    mixer, feed = attention(stream, 6, 3, 16), mlp(stream, 100)
    experts, latent = moe(stream, 8, 2, 20), moe(stream, 8, 2, 20, latent=32, shared=40)

    def regions(*parts: Part) -> int:
        return sum(each.count for each in layer(stream, *parts).exchanges if each.axis == "tp")

    assert regions(mixer, feed) == 2
    assert regions(mamba2(stream, 4, 16, 2, 32)) == 1
    # Experts take tokens as they are cut; a shared expert is a region of its own.
    assert regions(mixer, experts) == 1
    assert regions(mixer, latent) == 2
    sent = [each for part in (experts, latent) for each in part.exchanges if each.axis == "ep"]
    assert [(each.bytes, each.visits, each.experts) for each in sent] == [(2 * 96, 2, 8), (2 * 32, 2, 8)]
    (context,) = (each for each in mixer.exchanges if each.axis == "cp")
    assert context.bytes == 2 * (3 * 16 + 3 * 16)


def test_latent_attention_has_the_parameters_of_deepseek_v3_and_finds_what_it_can_make_again() -> None:
    """config.json of DeepSeek-V3; norms of the two latents beside the layer's own."""
    stream = Stream(7168, 4096)
    block = layer(stream, latent_attention(stream, 128, q_lora=1536, kv_lora=512, nope=128, rope=64, value_dim=128))
    q = 7168 * 1536 + 1536 + 1536 * 128 * 192
    kv = 7168 * (512 + 64) + 512 + 512 * 128 * (128 + 128)
    assert block.parameters == 7168 + q + kv + 128 * 128 * 7168
    again = [op for op in block.operations if op.name in MODULES["mla_up"]]
    assert sum(op.saved_bytes for op in again) == 2 * 128 * (192 + 192 + 128)  # queries, keys, values of all heads
    # What is gathered for tensor parallelism are the latents; the stream is scattered.
    assert next(each.bytes for each in block.exchanges if each.axis == "tp") == 2 * (1536 + 512 + 64 + 7168) / 2


def test_mamba2_counts_its_chunked_form() -> None:
    """Multiply-adds of the four products of section 6 of arXiv 2405.21060, counted index by index on a chunk."""
    heads, P, groups, N, C = 4, 3, 2, 5, 7
    scores = {(g, l, s, n) for g, l, s, n in product(range(groups), range(C), range(C), range(N))}
    inside = {(h, l, s, p) for h, l, s, p in product(range(heads), range(C), range(C), range(P))}
    state = {(h, l, p, n) for h, l, p, n in product(range(heads), range(C), range(P), range(N))}
    stream = Stream(24, 70)
    part = mamba2(stream, heads, P, groups, N, chunk=C)
    (core,) = (op for op in part.operations if op.kind == "ssm")
    assert core.forward_flops * C == 2 * (len(scores) + len(inside) + 2 * len(state))
    inner = heads * P
    rows, channels = 2 * inner + 2 * groups * N + heads, inner + 2 * groups * N
    expected = 24 + 24 * rows + 4 * channels + 3 * heads + inner + inner * 24
    assert layer(stream, part).parameters == expected


def test_a_latent_mixture_sends_and_multiplies_at_its_latent_width() -> None:
    h, l, E, k, f = 96, 32, 8, 2, 20
    stream = Stream(h, 500)
    plain, latent = (layer(stream, moe(stream, E, k, f, gated=False, latent=width)) for width in (None, l))
    assert plain.parameters - latent.parameters == E * 2 * f * (h - l) - 2 * h * l
    assert plain.forward_flops - latent.forward_flops == 2 * (k * 2 * f * (h - l) - 2 * h * l)


def test_biased_experts_move_more_and_multiply_the_same() -> None:
    stream = Stream(96, 500)
    plain, biased = (layer(stream, moe(stream, 8, 2, 20, biased=told)) for told in (False, True))
    assert biased.forward_flops == plain.forward_flops
    assert biased.parameters - plain.parameters == 8 * (2 * 20 + 96)
    assert biased.forward_bytes - plain.forward_bytes == 2 * 2 * (4 * (40 + 96) + 3 * (40 + 20))


def test_prediction_layers_of_deepseek_v3_have_their_published_size() -> None:
    """Model card: 685 B on the Hub are 671 B of the model and 14 B of the prediction module, with its own copy of
    embedding and head there."""
    entry = architecture_of("DeepSeek-V3")
    assert entry is not None
    work = workload_from(entry, 4096)
    prediction = sum(op.parameters for op in work.head.operations if op.name.startswith("mtp."))
    assert round((work.parameters - prediction) / 1e9) == 671
    assert round((prediction + 2 * 129280 * 7168) / 1e9, 1) == pytest.approx(13.5, abs=0.6)
    heads = [op for op in work.head.operations if op.name.endswith("head")]
    assert [op.parameters > 0 for op in heads] == [True, False]


def test_depths_of_one_set_of_parameters_cost_as_many_passes() -> None:
    stream = Stream(96, 500)
    block = layer(stream, attention(stream, 6, 3, 16), mlp(stream, 100))
    once, twice, apart = (
        with_mtp(stream, head(stream, 257), [block], 257, depth, shared=shared)
        for depth, shared in ((1, True), (2, True), (2, False))
    )
    plain = head(stream, 257)
    assert twice.parameters == once.parameters
    assert apart.parameters - plain.parameters == 2 * (once.parameters - plain.parameters)
    assert twice.forward_flops - plain.forward_flops == 2 * (once.forward_flops - plain.forward_flops)


def test_layers_of_one_name_and_other_cost_are_numbered() -> None:
    stream = Stream(96, 500)
    narrow, wide = (layer(stream, mlp(stream, width)) for width in (100, 200))
    work = assemble(stream, 257, [narrow, wide, narrow, wide])
    assert [each.kind for each in work.layers] == ["dense", "dense.2", "dense", "dense.2"]
    assert len({each.kind for each in work.layers}) == len(set(work.layers))


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("DeepSeek-V2", 236, 21),
        ("DeepSeek-V2-Lite", 15.7, 2.4),
        ("Kimi K2", 1026, 32),
        ("Kimi-Linear-48B-A3B", 48, 3),
        ("Qwen3 30B A3B", 30.5, 3.3),
        ("Qwen3-235B-A22B", 235, 22),
        ("Qwen3-Next-80B-A3B", 80, 3),
        ("Qwen2-57B-A14B", 57.4, 14),
        ("Mixtral-8x7B", 46.7, 12.9),
        ("Mixtral 8x22B", 141, 39),
        ("openai/gpt-oss-120b", 116.8, 5.1),
        ("gpt oss 20b", 20.9, 3.6),
        ("Nemotron-3-Nano-30B-A3B", 31.6, 3.2),
        ("Nemotron-H-56B", 56, 56),
        ("Nemotron-H-47B", 47, 47),
        ("Nemotron-H 8B", 8.1, 8.1),
        ("Llama 3.1 8B", 8.03, 8.03),
        ("meta-llama/Llama-3.1-405B", 405.9, 405.9),
        ("llama2-13b", 13.0, 13.0),
    ],
)
def test_named_models_have_the_sizes_of_their_cards(name: str, total: float, active: float) -> None:
    """Cards count activated parameters without the embedding, some without the head as well."""
    entry = architecture_of(name)
    assert entry is not None and entry.layers is not None and entry.vocab is not None and entry.hidden is not None
    assert len(entry.pattern) <= entry.layers and (entry.pattern == "A" or entry.layers % len(entry.pattern) == 0)
    work = workload_from(entry, 4096)
    assert work.parameters == pytest.approx(total * 1e9, rel=0.025)
    embedding = entry.vocab * entry.hidden
    assert work.active_parameters - 2 * embedding <= 1.1 * active * 1e9
    assert work.active_parameters >= 0.98 * active * 1e9


def test_the_same_architecture_is_the_same_object() -> None:
    entry = architecture_of("Llama 3 70B")
    assert entry is not None
    assert workload_from(entry, 8192) is workload_from(entry, 8192)
    assert workload_from(entry, 8192) is not workload_from(entry, 8192, Form(lean=False))
