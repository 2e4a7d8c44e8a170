"""Workload: parameters, FLOPs and activation bytes against closed forms written here and against published figures."""

from __future__ import annotations

import pytest

from parallel.planning.plan import ParallelPlan
from parallel.planning.workload import check_divisibility
from pretrain.spec import Attention, Dense, GatedDelta, Kda, LayerSpec, ModelSpec, MoE
from pretrain.workload import workload_of
from stoker.errors import Refusal

ATTENTION = Attention(6, 2, 10, output_gate=True)
DELTA = GatedDelta(2, 6, 12, 20)
KDA = Kda(6, 12, 20, gate_rank=7)
MOE = MoE(5, 3, 14, shared_hidden=22, shared_gate=True)
SPECS = {
    "dense": ModelSpec(24, 257, (LayerSpec(Attention(6, 3, 8, qk_norm=False), Dense(40)),) * 3),
    "hybrid": ModelSpec(24, 257, (LayerSpec(DELTA, Dense(40)), LayerSpec(ATTENTION, Dense(36))), tied_embedding=True),
    "kda": ModelSpec(24, 257, (LayerSpec(KDA, Dense(40)), LayerSpec(KDA, MOE))),
    "moe": ModelSpec(24, 257, (LayerSpec(DELTA, Dense(40)), LayerSpec(DELTA, MOE), LayerSpec(ATTENTION, MOE))),
}


def llama(width: int, layers: int, heads: int, hidden: int) -> ModelSpec:
    layer = LayerSpec(Attention(heads, 8, 128, qk_norm=False), Dense(hidden))
    return ModelSpec(width, 128256, (layer,) * layers)


def qwen3_next_80b_a3b() -> ModelSpec:
    """The published configuration: every fourth layer is attention."""
    attention = Attention(16, 2, 256, rope_fraction=0.25, output_gate=True)
    moe = MoE(512, 10, 512, shared_hidden=512, shared_gate=True, bias_update_rate=None)
    mixers = [attention if index % 4 == 3 else GatedDelta(16, 32, 128, 128) for index in range(48)]
    return ModelSpec(2048, 151936, tuple(LayerSpec(mixer, moe) for mixer in mixers))


def dense_attention_layer(D: int, H: int, G: int, d: int, F: int) -> int:
    return D + D * H * d + 2 * D * G * d + H * d * D + D + 3 * D * F


@pytest.mark.parametrize("seq_len", [1, 63, 500])
def test_a_dense_model_counts_six_flops_a_parameter_and_half_the_attention(seq_len: int) -> None:
    D, H, G, d, F, L, V = 24, 6, 3, 8, 40, 3, 257
    work = workload_of(SPECS["dense"], seq_len)
    parameters = L * dense_attention_layer(D, H, G, d, F) + 2 * V * D + D
    assert work.parameters == work.active_parameters == parameters
    products = parameters - V * D - (2 * L + 1) * D  # the embedding is looked up; norms are not products
    assert work.training_flops == 6 * products + 6 * L * seq_len * H * d
    assert work.backward_flops == 2 * work.forward_flops


def delta_core(K: int, V: int, C: int = 64) -> tuple[float, float]:
    """kernels reference: forward 6KV + 4C(K+V) + 4C^2/3, backward 14KV + 10CV + 10CK, per token and value head."""
    return 6 * K * V + 4 * C * (K + V) + 4 * C * C / 3, 14 * K * V + 10 * C * V + 10 * C * K


def test_a_hybrid_model_counts_the_delta_rule_by_its_chunks() -> None:
    D, F, V, T = 24, 40, 257, 100
    Hk, Hv, K, W = 2, 6, 12, 20
    rows = 2 * Hk * K + 2 * Hv * W + 2 * Hv  # q, k, v, z, b, a
    delta = {"products": D * rows + Hv * W * D, "conv": 4 * (2 * Hk * K + Hv * W), "rest": D + 2 * Hv + W}
    H, G, d = 6, 2, 10
    attention = {"products": D * (2 * H * d + 2 * G * d) + H * d * D, "rest": D + 2 * d}
    ffn = {"products": 3 * D * F + 3 * D * 36, "rest": 2 * D}
    products = delta["products"] + attention["products"] + ffn["products"]
    rest = delta["conv"] + delta["rest"] + attention["rest"] + ffn["rest"] + D
    work = workload_of(SPECS["hybrid"], T)
    assert work.parameters == products + rest + V * D  # tied: one embedding
    forward, backward = delta_core(K, W)
    core = 2 * T * H * d
    assert work.forward_flops == pytest.approx(2 * (products + V * D + delta["conv"]) + Hv * forward + core, rel=1e-12)
    assert work.backward_flops == pytest.approx(
        4 * (products + V * D + delta["conv"]) + Hv * backward + 2 * core, rel=1e-12
    )


def test_the_delta_rule_matches_the_table_of_its_reference() -> None:
    forward, backward = delta_core(128, 128)
    assert (round(forward / 1e3, 1), round(backward / 1e3, 1)) == (169.3, 393.2)
    work = workload_of(ModelSpec(64, 257, (LayerSpec(GatedDelta(32, 32, 128, 128), Dense(8)),)), 64)
    (core,) = (op for op in work.layers[0].operations if op.kind == "gated_delta")
    assert core.forward_flops == pytest.approx(32 * forward)
    assert core.backward_flops == pytest.approx(32 * backward)
    assert (core.forward_bytes / 32, core.backward_bytes / 32) == (1032, 1808)


def test_a_kda_layer_counts_its_low_rank_gates_and_its_decay_per_channel() -> None:
    D, F, T, H, K, W, R, C = 24, 40, 100, 6, 12, 20, 7, 64
    products = D * (2 * H * K + H * W + H + 2 * R) + R * (H * K + H * W) + H * W * D
    conv = 4 * (2 * H * K + H * W)
    (layer, _) = workload_of(SPECS["kda"], T).layers
    assert layer.parameters == products + conv + H + H * K + W + D + 3 * D * F + D
    forward, backward = delta_core(K, W)
    assert layer.forward_flops == pytest.approx(2 * (products + conv + 3 * D * F) + H * forward, rel=1e-12)
    assert layer.backward_flops == pytest.approx(
        4 * (products + conv + 3 * D * F) + H * (backward + 2 * C * K), rel=1e-12
    )
    assert layer.kind == "kda/dense"
    # Tensor parallelism cuts heads; what is of low rank every rank does for all tokens.
    assert {op.name for op in layer.operations if op.gathered} == {"f_a", "g_a"}
    assert layer.parameters_by_axes()[()] == 2 * D * R + W + 2 * D


def test_kda_matches_the_table_of_its_reference() -> None:
    """Forward as the scalar rule, backward 409.6 thousand FLOPs a head; 1540 and 2824 bytes with decays in float32."""
    work = workload_of(ModelSpec(64, 257, (LayerSpec(Kda(32, 128, 128, 128), Dense(8)),)), 64)
    (core,) = (op for op in work.layers[0].operations if op.kind == "kda")
    assert (round(core.forward_flops / 32e3, 1), round(core.backward_flops / 32e3, 1)) == (169.3, 409.6)
    assert (core.forward_bytes / 32, core.backward_bytes / 32) == (1540, 2824)


def test_a_mixture_counts_the_experts_that_a_token_visits() -> None:
    D, E, k, F, S = 24, 5, 3, 14, 22
    with_experts = workload_of(SPECS["moe"], 64).layers[1]
    dense = workload_of(SPECS["moe"], 64).layers[0]
    fixed = E * D + 3 * D * S + D  # router, shared expert, its gate
    assert with_experts.parameters - dense.parameters == fixed + E * 3 * D * F - 3 * D * 40
    assert with_experts.active_parameters - dense.active_parameters == fixed + k * 3 * D * F - 3 * D * 40
    assert with_experts.forward_flops - dense.forward_flops == pytest.approx(2 * (fixed + k * 3 * D * F - 3 * D * 40))
    assert with_experts.parameters_by_axes()["ep", "etp"] == E * 3 * D * F


@pytest.mark.parametrize("name", SPECS)
def test_the_workload_counts_every_trained_parameter_of_the_spec(name: str) -> None:
    spec = SPECS[name]
    work = workload_of(spec, 64)
    assert work.parameters == spec.num_parameters
    for index, layer in enumerate(work.layers):
        owned = [p for n, p in spec.parameters().items() if n.startswith(f"layers.{index}.") and p.trained]
        assert layer.parameters == sum(p.numel for p in owned)
        assert sum(layer.parameters_by_axes().values()) == layer.parameters


@pytest.mark.parametrize(
    ("spec", "published"),
    [
        (llama(4096, 32, 32, 14336), 0.0515e12),
        (llama(8192, 80, 64, 28672), 0.4492e12),
        (llama(16384, 126, 128, 53248), 2.524e12),
    ],
    ids=["8B", "70B", "405B"],
)
def test_flops_of_llama_3_agree_with_published_throughput(spec: ModelSpec, published: float) -> None:
    """FLOPs a token at 8192, from published pairs of tokens/s and TFLOP/s (Megatron-Bridge performance tables)."""
    assert workload_of(spec, 8192).training_flops == pytest.approx(published, rel=1e-3)


def test_qwen3_next_has_its_published_size() -> None:
    """Model card of Qwen3-Next-80B-A3B: 80B parameters in total, 79B of them not embedding, 3B activated."""
    work = workload_of(qwen3_next_80b_a3b(), 4096)
    embeddings = 2 * 151936 * 2048
    assert round(work.parameters / 1e9) == 80
    assert round((work.parameters - embeddings) / 1e9) == 79
    assert round((work.active_parameters - embeddings) / 1e9) == 3
    assert {layer.kind for layer in work.layers} == {"gated_delta/moe", "attention/moe"}


def test_activations_of_a_dense_layer_are_those_of_the_memory_model() -> None:
    """bfloat16, per token: norms and their outputs 8D, q 2Hd, k and v 4Gd, output 2Hd, log-sum-exp 4H, gate, up and
    their product 6F."""
    D, H, G, d, F = 24, 6, 3, 8, 40
    (layer, *_) = workload_of(SPECS["dense"], 64).layers
    assert layer.activation_bytes("none") == 8 * D + 2 * H * d + 4 * G * d + 2 * H * d + 4 * H + 6 * F
    assert layer.activation_bytes("selective") == 2 * D + 4 * D + 6 * F  # the mixer keeps its input only
    assert layer.activation_bytes("full") == 2 * D


@pytest.mark.parametrize("name", SPECS)
def test_recompute_trades_bytes_for_flops(name: str) -> None:
    work = workload_of(SPECS[name], 64)
    for layer in work.layers:
        kept = [layer.activation_bytes(mode) for mode in ("none", "selective", "full")]
        again = [layer.recompute_flops(mode) for mode in ("none", "selective", "full")]
        assert kept[0] > kept[1] > kept[2] > 0
        assert 0 == again[0] < again[1] < again[2] == layer.forward_flops
        doubled = workload_of(SPECS[name], 64, element_bytes=4).layers[work.layers.index(layer)]
        assert doubled.activation_bytes("full") == 2 * layer.activation_bytes("full")
    for end in (work.embedding, work.head):
        assert end.activation_bytes("full") == end.activation_bytes("none")
        assert end.recompute_flops("full") == 0


def plan(spec: ModelSpec, world: int, **degrees: int | bool) -> ParallelPlan:
    return ParallelPlan(world, 2 * world, 1, num_layers=len(spec.layers), **degrees)  # type: ignore[arg-type]


def test_degrees_that_divide_are_accepted_and_the_vocabulary_is_no_obstacle() -> None:
    work = workload_of(SPECS["moe"], 64)
    check_divisibility(work, plan(SPECS["moe"], 10, tp=2, ep=5, sequence_parallel=True))
    check_divisibility(work, plan(SPECS["moe"], 4, tp=2, etp=2, sequence_parallel=True))


REFUSED = {
    "tp=4 does not divide attention.num_heads=6, attention.num_kv_heads=3: .* are tp=1$": ("dense", 4, dict(tp=4)),
    "tp=3 does not divide gated_delta.num_qk_heads=2, .*num_kv_heads=2: .* tp=2$": ("hybrid", 3, dict(tp=3)),
    "tp=4 does not divide kda.num_heads=6, .*: nearest that divide all are tp=2": ("kda", 4, dict(tp=4)),
    "ep=2 does not divide moe.num_experts=5: .* ep=1 or ep=5": ("moe", 2, dict(ep=2)),
    "etp=4 does not divide moe.hidden=14: .* etp=2 or etp=7": ("moe", 4, dict(etp=4)),
    "ep=2 cuts experts and the model has no expert layer: set ep=1": ("hybrid", 2, dict(ep=2)),
    "etp=2 cuts experts": ("dense", 2, dict(etp=2)),
    "63 = 63 tokens .*tp=2, .*data.seq_len=62 or 64": ("hybrid", 2, dict(tp=2, sequence_parallel=True)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_p7_degrees_that_do_not_divide_the_model_are_refused_with_the_nearest_that_do(message: str) -> None:
    name, world, degrees = REFUSED[message]
    with pytest.raises(Refusal, match=message):
        check_divisibility(workload_of(SPECS[name], 63), plan(SPECS[name], world, **degrees))


def test_p7_a_plan_for_another_depth_is_refused() -> None:
    with pytest.raises(Refusal, match="2 layers and the model has 3"):
        check_divisibility(workload_of(SPECS["dense"], 64), ParallelPlan(1, 1, 1, num_layers=2))
