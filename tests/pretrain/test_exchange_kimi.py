"""Exchange with transformers' kimi_linear: KDA layers travel whole, latent attention is refused.

That the tensors mean the same on both sides (logits and gradients) is `tests/oracle/test_plain_vs_hf.py`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, KimiLinearConfig, KimiLinearForCausalLM

from pretrain.exchange import hf
from pretrain.spec import Attention, Dense, GatedDelta, Kda, LayerSpec, ModelSpec, MoE
from stoker.errors import Refusal
from tests.pretrain.test_exchange import assert_bit_equal, files

KDA = Kda(3, key_dim=8, value_dim=8, gate_rank=8)
EXPERTS = MoE(5, 2, 10, router="sigmoid", route_scale=2.5, shared_hidden=20)
SPEC = ModelSpec(
    width=24,
    vocab_size=257,
    layers=(LayerSpec(KDA, Dense(20)), LayerSpec(KDA, EXPERTS), LayerSpec(KDA, EXPERTS)),
    norm_eps=1e-5,
    zero_centred_norm=False,
)
#: Of the published Kimi-Linear-48B-A3B, what its config.json says in keys of its own; three layers, all KDA.
PUBLISHED = {
    "model_type": "kimi_linear",
    "linear_attn_config": {
        "full_attn_layers": [],
        "kda_layers": [1, 2, 3],
        "head_dim": 8,
        "num_heads": 3,
        "short_conv_kernel_size": 4,
    },
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "moe_router_activation_func": "sigmoid",
    "num_expert_group": 1,
    "topk_group": 1,
    "use_grouped_topk": True,
    "num_nextn_predict_layers": 0,
    "mla_use_nope": True,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "head_dim": 72,
}


def parameters(spec: ModelSpec = SPEC) -> dict[str, Tensor]:
    """What an export takes: trained parameters and router biases."""
    random = torch.Generator().manual_seed(0)
    described = spec.parameters().items()
    return {name: torch.randn(p.shape, generator=random) for name, p in described if p.role != "counter"}


def transformers_model(dtype: torch.dtype) -> KimiLinearForCausalLM:
    model = KimiLinearForCausalLM(KimiLinearConfig(**hf.hf_config(SPEC), experts_implementation="eager"))
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.normal_()
    return model.to(dtype)


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_a_checkpoint_of_transformers_goes_through_stoker_bit_equal(tmp_path: Path, shard_bytes: int) -> None:
    model = transformers_model(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard_bytes)
    spec, params = hf.read(tmp_path / "theirs")
    assert spec == SPEC
    assert_bit_equal(params, hf.import_state(SPEC, model.state_dict()))
    hf.write(tmp_path / "ours", spec, params, shard_bytes=shard_bytes, eos_token_id=7)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", experts_implementation="eager")
    assert type(loaded) is KimiLinearForCausalLM and loaded.config.eos_token_id == 7
    assert_bit_equal(loaded.state_dict(), model.state_dict())
    assert loaded(torch.arange(65)[None]).logits.isfinite().all()
    assert_bit_equal(hf.read(tmp_path / "ours")[1], params)
    sharded = (tmp_path / "ours" / "model.safetensors.index.json").exists()
    assert sharded == (shard_bytes < 10**9)


def test_exported_tensors_have_the_names_and_shapes_of_published_files(tmp_path: Path) -> None:
    hf.write(tmp_path, SPEC, parameters())
    written = files(tmp_path)
    layer = "model.layers.1."
    found = {name: tuple(tensor.shape) for name, tensor in written.items() if name.startswith(layer)}
    expert = {"w1": (10, 24), "w3": (10, 24), "w2": (24, 10)}
    shared = {"gate_proj": (20, 24), "up_proj": (20, 24), "down_proj": (24, 20)}
    attention = {
        **{f"{field}_proj.weight": (24, 24) for field in "qkvo"},
        **{f"{field}_conv1d.weight": (24, 1, 4) for field in "qkv"},
        **{"b_proj.weight": (3, 24), "A_log": (1, 1, 3, 1), "dt_bias": (24,), "o_norm.weight": (8,)},
        **{f"{gate}_a_proj.weight": (8, 24) for gate in "fg"},
        **{f"{gate}_b_proj.weight": (24, 8) for gate in "fg"},
    }
    moe = {
        **{"gate.weight": (5, 24), "gate.e_score_correction_bias": (5,)},
        **{f"shared_experts.{field}.weight": shape for field, shape in shared.items()},
        **{f"experts.{e}.{field}.weight": shape for e in range(5) for field, shape in expert.items()},
    }
    assert found == {
        f"{layer}input_layernorm.weight": (24,),
        f"{layer}post_attention_layernorm.weight": (24,),
        **{f"{layer}self_attn.{name}": shape for name, shape in attention.items()},
        **{f"{layer}block_sparse_moe.{name}": shape for name, shape in moe.items()},
    }
    assert "model.layers.0.mlp.gate_proj.weight" in written  # a dense layer is none of a mixture's


def test_export_is_the_inverse_of_import_and_the_router_bias_travels() -> None:
    params = parameters()
    imported = dict(hf.import_state(SPEC, hf.export_state(SPEC, params)))
    for index in (1, 2):
        assert torch.equal(imported.pop(f"layers.{index}.ffn.router.load"), torch.zeros(5, dtype=torch.int64))
    assert_bit_equal(imported, params)
    assert imported["layers.1.ffn.router.bias"].abs().min() > 0


def test_every_parameter_of_the_48b_model_has_its_place() -> None:
    """Names, shapes and their sum against transformers' own model of the published size, with KDA in every layer."""
    config = KimiLinearConfig(layer_types=["linear_attention"] * 27)
    with torch.device("meta"):
        model = KimiLinearForCausalLM(config)
    spec = hf.spec_from_hf(config.to_dict())
    assert spec.layers[26] == LayerSpec(
        Kda(32, 128, 128, 128), MoE(256, 8, 1024, router="sigmoid", route_scale=2.446, shared_hidden=1024)
    )
    assert spec.num_parameters == sum(p.numel() for p in model.parameters())
    imported = hf.import_state(spec, model.state_dict())
    assert set(imported) == set(spec.parameters())
    for name in ("layers.0.mixer.q_conv.weight", "layers.1.mixer.A_log", "layers.26.ffn.experts.up.weight"):
        assert imported[name].shape == spec.parameters()[name].shape


dims = st.integers(1, 4)
experts = st.builds(
    lambda top_k, more, hidden, shared, scale: MoE(
        top_k + more, top_k, hidden, router="sigmoid", route_scale=scale, shared_hidden=shared * hidden
    ),
    *(st.integers(1, 3), st.integers(0, 3), dims, dims, st.floats(0.1, 10)),
)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    width, ffns = draw(st.integers(2, 5)), (draw(experts), Dense(draw(dims)))
    kda = Kda(draw(dims), key_dim=width, value_dim=width, gate_rank=width, conv_width=draw(dims))
    layers = tuple(LayerSpec(kda, ffn) for ffn in draw(st.lists(st.sampled_from(ffns), min_size=1, max_size=5)))
    return ModelSpec(draw(st.integers(1, 9)), draw(st.integers(1, 300)), layers, zero_centred_norm=False)


@settings(deadline=None, max_examples=30)
@given(specs())
def test_any_model_that_kimi_linear_can_state_survives_the_way_there_and_back(spec: ModelSpec) -> None:
    assert hf.spec_from_hf(json.loads(json.dumps(hf.hf_config(spec)))) == spec
    params = parameters(spec)
    back = hf.import_state(spec, dict(hf.export_state(spec, params)))
    assert_bit_equal({name: back[name] for name in params}, params)


def published(**linear: Any) -> dict[str, Any]:
    config = {key: value for key, value in hf.hf_config(SPEC).items() if key not in ("layer_types", "mlp_layer_types")}
    config = {key: value for key, value in config.items() if not key.startswith("linear_")} | PUBLISHED
    return config | {"linear_attn_config": PUBLISHED["linear_attn_config"] | linear}  # type: ignore[operator]


def test_config_as_it_is_published_gives_the_same_model_here_and_in_transformers() -> None:
    assert hf.spec_from_hf(published()) == SPEC
    theirs = KimiLinearConfig(**published())
    assert hf.spec_from_hf(theirs.to_dict()) == SPEC
    written_by_5 = {key: value for key, value in theirs.to_dict().items() if key not in PUBLISHED}
    assert hf.spec_from_hf(written_by_5 | {"model_type": "kimi_linear"}) == SPEC


@pytest.mark.parametrize(
    "config, named",
    [
        (published(kda_layers=[1, 3], full_attn_layers=[2]), r"layers \[1\] are full_attention: multi-head latent"),
        (published(kda_layers=[1, 3]), r"layer_types=\['linear_attention', 'linear_attention'\]"),
        (published(gate_lower_bound=-5.0), r"linear_attn_config\.gate_lower_bound is not a key known here"),
        (published(use_full_rank_gate=True), r"linear_attn_config\.use_full_rank_gate"),
        (published() | {"num_expert_group": 2}, "num_expert_group=2"),
        (published() | {"moe_router_activation_func": "softmax"}, "moe_router_activation_func='softmax'"),
        (published() | {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        (published() | {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (published() | {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers=1"),
        (published() | {"quantization_config": {}}, "quantization_config is not a key"),
        (published() | {"num_hidden_layers": 4}, "mlp_layer_types|layer_types"),
        (published() | {"mlp_layer_types": ["dense", "sparse", "other"]}, "mlp_layer_types=.*other"),
        (published() | {"model_type": "kimi_k3"}, r"model_type='kimi_k3' \(supported: qwen3_next, kimi_linear\)"),
    ],
)
def test_config_that_stoker_cannot_hold_is_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(Refusal, match=named):
        hf.spec_from_hf(config)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"zero_centred_norm": True}, "model.zero_centred_norm=True"),
        ({"tied_embedding": True}, "model.tied_embedding=True"),
        ({"layers": (LayerSpec(replace(KDA, value_dim=4), EXPERTS),)}, "0.mixer.value_dim=4"),
        ({"layers": (LayerSpec(replace(KDA, gate_rank=4), EXPERTS),)}, "0.mixer.gate_rank=4"),
        ({"layers": (LayerSpec(KDA, EXPERTS), LayerSpec(replace(KDA, conv_width=2), EXPERTS))}, "1.mixer.conv_width=2"),
        ({"layers": (LayerSpec(KDA, EXPERTS), LayerSpec(Attention(2, 2, 4), EXPERTS))}, r"1.mixer=Attention\(.*Kda\("),
        ({"layers": (LayerSpec(GatedDelta(1, 1, 8, 8), EXPERTS), LayerSpec(KDA, EXPERTS))}, r"0.mixer=GatedDelta\("),
        ({"layers": (LayerSpec(KDA, replace(EXPERTS, router="softmax")),)}, "0.ffn.router='softmax'"),
        ({"layers": (LayerSpec(KDA, replace(EXPERTS, shared_gate=True)),)}, "0.ffn.shared_gate=True"),
        ({"layers": (LayerSpec(KDA, replace(EXPERTS, shared_hidden=None)),)}, "0.ffn.shared_hidden=None"),
        ({"layers": (LayerSpec(KDA, replace(EXPERTS, shared_hidden=15)),)}, "0.ffn.shared_hidden=15"),
        ({"layers": (LayerSpec(KDA, replace(EXPERTS, bias_update_rate=None)),)}, "a bias in every router"),
    ],
)
def test_model_that_kimi_linear_cannot_state_is_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    spec = replace(SPEC, **change)
    with pytest.raises(Refusal, match=named):
        hf.write(tmp_path / "out", spec, parameters(spec))
    assert not (tmp_path / "out").exists()
