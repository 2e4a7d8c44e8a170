"""Exchange with transformers' qwen3_next: nothing is lost, added, guessed or run on the way, in either direction.

That the tensors mean the same on both sides (logits and gradients) is `tests/oracle/test_plain_vs_hf.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from pretrain.exchange import hf
from pretrain.exchange.folder import TensorFolder
from pretrain.spec import Attention, Dense, GatedDelta, LayerSpec, ModelSpec, MoE
from stoker.errors import Refusal

ATTENTION = Attention(6, 2, 16, rope_fraction=0.25, rope_theta=1e7, qk_norm=True, output_gate=True)
DELTA = GatedDelta(2, 6, 8, 6)
EXPERTS = MoE(5, 2, 10, bias_update_rate=None, shared_hidden=12, shared_gate=True)
SPEC = ModelSpec(
    width=24,
    vocab_size=257,
    layers=(LayerSpec(DELTA, EXPERTS), LayerSpec(ATTENTION, Dense(20)), LayerSpec(DELTA, EXPERTS)),
)


def parameters(spec: ModelSpec = SPEC, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(p.shape, generator=random).to(dtype) for name, p in spec.parameters().items() if p.trained
    }


def transformers_model(dtype: torch.dtype = torch.bfloat16, spec: ModelSpec = SPEC) -> Qwen3NextForCausalLM:
    return Qwen3NextForCausalLM(Qwen3NextConfig(**hf.hf_config(spec), experts_implementation="eager")).to(dtype)


def assert_bit_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


def files(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_a_checkpoint_of_transformers_comes_back_bit_equal(tmp_path: Path, tied: bool, shard_bytes: int) -> None:
    model = transformers_model(spec=replace(SPEC, tied_embedding=tied))
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard_bytes)
    spec, params = hf.read(tmp_path / "theirs")
    assert spec == replace(SPEC, tied_embedding=tied)
    hf.write(tmp_path / "ours", spec, params, shard_bytes=shard_bytes)

    assert_bit_equal(files(tmp_path / "ours"), files(tmp_path / "theirs"))
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"
    for folder in ("ours", "theirs"):
        sharded = len(list((tmp_path / folder).glob("*.safetensors"))) > 1
        assert sharded == (tmp_path / folder / "model.safetensors.index.json").exists() == (shard_bytes < 10**9)


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_transformers_loads_what_is_exported_and_computes_the_same(tmp_path: Path, shard_bytes: int) -> None:
    model = transformers_model(torch.float32)
    params = hf.import_state(SPEC, model.state_dict())
    hf.write(tmp_path, SPEC, params, shard_bytes, eos_token_id=7, max_position_embeddings=64)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")

    assert type(loaded) is Qwen3NextForCausalLM and loaded.dtype == torch.float32
    assert (loaded.config.eos_token_id, loaded.config.max_position_embeddings) == (7, 64)
    assert_bit_equal(loaded.state_dict(), model.state_dict())
    tokens = torch.arange(65)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-6)


def test_export_is_the_inverse_of_import_for_torch_and_numpy() -> None:
    params = parameters()
    exported = hf.export_state(SPEC, params)
    state = {name: p for name, p in SPEC.parameters().items() if not p.trained}
    for source in (exported, {name: tensor.numpy() for name, tensor in exported.items()}):
        imported = dict(hf.import_state(SPEC, source))
        for name, parameter in state.items():
            assert torch.equal(imported.pop(name), torch.zeros(parameter.shape, dtype=torch.int64))
        assert_bit_equal(imported, params)
    assert_bit_equal(hf.export_state(SPEC, {name: tensor.numpy() for name, tensor in params.items()}), exported)


def test_packed_experts_of_a_state_dict_mean_the_same_as_experts_on_disk(tmp_path: Path) -> None:
    model = transformers_model()
    model.save_pretrained(tmp_path)
    assert any(name.endswith("experts.gate_up_proj") for name in model.state_dict())
    assert_bit_equal(hf.import_state(SPEC, model.state_dict()), hf.read(tmp_path)[1])


def test_import_of_a_model_that_gets_a_router_bias_starts_the_bias_at_zero() -> None:
    biased = tuple(
        replace(x, ffn=replace(x.ffn, bias_update_rate=1e-3) if x.ffn == EXPERTS else x.ffn) for x in SPEC.layers
    )
    imported = hf.import_state(replace(SPEC, layers=biased), hf.export_state(SPEC, parameters()))
    assert torch.equal(imported["layers.0.ffn.router.bias"], torch.zeros(5))


def test_every_parameter_of_the_80b_model_has_its_place() -> None:
    """Names, shapes and their sum against transformers' own model of the published size, on the meta device."""
    config = Qwen3NextConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25})
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(config)
    spec = hf.spec_from_hf(config.to_dict())
    assert spec.num_parameters == sum(p.numel() for p in model.parameters())
    params = {name: torch.empty(p.shape, device="meta") for name, p in spec.parameters().items()}
    imported = hf.import_state(spec, dict(model.named_parameters()))
    for name in ("layers.0.mixer.z.weight", "layers.3.mixer.gate.weight", "layers.47.ffn.experts.up.weight"):
        assert imported[name].shape == params[name].shape
    assert set(imported) == set(params)


def test_a_tensor_is_read_only_when_it_is_asked_for() -> None:
    class Recording(Mapping[str, Tensor]):
        def __init__(self, source: Mapping[str, Tensor]) -> None:
            self.source, self.read = source, list[str]()

        def __getitem__(self, name: str) -> Tensor:
            self.read.append(name)
            return self.source[name]

        def __iter__(self) -> Iterator[str]:
            return iter(self.source)

        def __len__(self) -> int:
            return len(self.source)

    theirs = Recording(dict(hf.export_state(SPEC, parameters())))
    imported = hf.import_state(SPEC, theirs)
    assert theirs.read == []
    for field in ("q", "k", "v", "z"):
        assert imported[f"layers.2.mixer.{field}.weight"].numel()
    assert theirs.read == ["model.layers.2.linear_attn.in_proj_qkvz.weight"]

    ours = Recording(parameters())
    exported = hf.export_state(SPEC, ours)
    for expert in range(5):
        assert exported[f"model.layers.0.mlp.experts.{expert}.up_proj.weight"].shape == (10, 24)
    assert ours.read == ["layers.0.ffn.experts.up.weight"]


attentions = st.builds(
    lambda kv, group, half, quarters, theta: Attention(
        kv * group, kv, 8 * half, quarters / 4, theta, qk_norm=True, output_gate=True
    ),
    *(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.floats(10, 1e8)),
)
deltas = st.builds(
    lambda qk, group, *dims: GatedDelta(qk, qk * group, *dims),
    *(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4)),
)
moes = st.builds(
    lambda top_k, more, hidden, shared, renormalise: replace(
        EXPERTS, num_experts=top_k + more, top_k=top_k, hidden=hidden, shared_hidden=shared, renormalise=renormalise
    ),
    *(st.integers(1, 3), st.integers(0, 3), st.integers(1, 5), st.integers(1, 5), st.booleans()),
)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    kinds = (draw(attentions), draw(deltas)), (draw(moes), Dense(draw(st.integers(1, 5))))
    layer = st.builds(LayerSpec, st.sampled_from(kinds[0]), st.sampled_from(kinds[1]))
    layers = tuple(draw(st.lists(layer, min_size=1, max_size=5)))
    return ModelSpec(draw(st.integers(1, 9)), draw(st.integers(1, 300)), layers, tied_embedding=draw(st.booleans()))


@settings(deadline=None, max_examples=30)
@given(specs())
def test_any_model_that_qwen3_next_can_state_survives_the_way_there_and_back(spec: ModelSpec) -> None:
    config = json.loads(json.dumps(hf.hf_config(spec)))
    assert hf.spec_from_hf(config) == spec
    params = parameters(spec)
    back = hf.import_state(spec, dict(hf.export_state(spec, params)))
    assert_bit_equal({name: back[name] for name in params}, params)


def test_config_as_transformers_4_wrote_it_gives_the_same_model() -> None:
    layers = tuple(LayerSpec(ATTENTION if i % 4 == 3 else DELTA, EXPERTS) for i in range(8))
    spec = replace(SPEC, layers=layers)
    config = hf.hf_config(spec)
    del config["layer_types"], config["rope_parameters"]
    config |= {"full_attention_interval": 4, "rope_theta": 10_000_000, "partial_rotary_factor": 0.25}
    config |= {"rope_scaling": None, "use_sliding_window": False, "torch_dtype": "bfloat16"}
    assert hf.spec_from_hf(config) == spec


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling="),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "partial_rotary_factor is missing"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.35}}, "partial_rotary_factor=0.35"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25, "factor": 8}},
            "rope_parameters.factor",
        ),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"quantization_config": {"bits": 8}}, "quantization_config is not a key"),
        ({"layer_types": ["full_attention"]}, "layer_types=['full_attention']"),
        ({"layer_types": ["full_attention", "sliding_attention", "linear_attention"]}, "sliding_attention"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_experts_per_tok": 9}, "moe.top_k=9"),
    ],
)
def test_config_that_stoker_cannot_hold_is_refused(change: dict[str, Any], named: str) -> None:
    config = {key: value for key, value in (hf.hf_config(SPEC) | change).items() if value is not None}
    with pytest.raises(Refusal) as refusal:
        hf.spec_from_hf(config)
    assert named in str(refusal.value)


def test_all_that_is_wrong_with_a_config_is_said_at_once() -> None:
    config = hf.hf_config(SPEC) | {"hidden_act": "gelu", "attention_bias": True, "kv_sharing": 2}
    del config["head_dim"]
    with pytest.raises(
        Refusal, match=r"head_dim is missing.*hidden_act='gelu'.*attention_bias=True.*kv_sharing"
    ) as refusal:
        hf.spec_from_hf(config)
    assert "supported: 'silu'" in str(refusal.value)


@pytest.mark.parametrize(
    "spec, named",
    [
        (replace(SPEC, zero_centred_norm=False), "model.zero_centred_norm=False"),
        (
            replace(SPEC, layers=(LayerSpec(replace(ATTENTION, output_gate=False), EXPERTS),)),
            "0.mixer.output_gate=False",
        ),
        (replace(SPEC, layers=(LayerSpec(replace(ATTENTION, qk_norm=False), EXPERTS),)), "0.mixer.qk_norm=False"),
        (replace(SPEC, layers=(LayerSpec(DELTA, replace(EXPERTS, router="sigmoid")),)), "0.ffn.router='sigmoid'"),
        (
            replace(SPEC, layers=(LayerSpec(DELTA, replace(EXPERTS, bias_update_rate=0.1)),)),
            "0.ffn.bias_update_rate=0.1",
        ),
        (replace(SPEC, layers=(LayerSpec(DELTA, replace(EXPERTS, route_scale=2.5)),)), "0.ffn.route_scale=2.5"),
        (replace(SPEC, layers=(LayerSpec(DELTA, replace(EXPERTS, shared_gate=False)),)), "0.ffn.shared_gate=False"),
        (replace(SPEC, layers=(LayerSpec(DELTA, MoE(5, 2, 10, bias_update_rate=None)),)), "0.ffn.shared_hidden=None"),
        (replace(SPEC, layers=(LayerSpec(DELTA, Dense(5)), LayerSpec(DELTA, Dense(6)))), "layers.1.ffn.hidden=6"),
    ],
)
def test_model_that_qwen3_next_cannot_state_is_refused_before_anything_is_written(
    tmp_path: Path, spec: ModelSpec, named: str
) -> None:
    with pytest.raises(Refusal) as refusal:
        hf.write(tmp_path / "out", spec, parameters(spec))
    assert named in str(refusal.value) and not (tmp_path / "out").exists()


def test_tensors_that_do_not_match_the_config_are_refused_by_name() -> None:
    theirs = dict(hf.export_state(SPEC, parameters()))
    renamed = {name.replace("mlp.gate.", "mlp.router."): tensor for name, tensor in theirs.items()}
    with pytest.raises(
        Refusal, match=r"missing: model\.layers\.0\.mlp\.gate\.weight.*unknown: .*0\.mlp\.router\.weight"
    ):
        hf.import_state(SPEC, renamed)
    with pytest.raises(Refusal, match=r"unknown: mtp\.norm\.weight; .*drop="):
        hf.import_state(SPEC, theirs | {"mtp.norm.weight": torch.ones(24)})
    assert "mtp.norm.weight" not in hf.import_state(SPEC, theirs | {"mtp.norm.weight": torch.ones(24)}, drop=("mtp.",))

    imported = hf.import_state(SPEC, theirs | {"lm_head.weight": torch.ones(256, 24)})
    with pytest.raises(Refusal, match=r"'lm_head.weight' has shape \(256, 24\), .* \(257, 24\)"):
        imported["head.weight"]
    params = parameters()
    with pytest.raises(Refusal, match=r"missing: layers\.2\.mixer\.o\.weight; tensors unknown: none"):
        hf.export_state(SPEC, {name: p for name, p in params.items() if name != "layers.2.mixer.o.weight"})
    mixed = hf.export_state(SPEC, params | {"layers.0.mixer.k.weight": params["layers.0.mixer.k.weight"].bfloat16()})
    with pytest.raises(Refusal, match=r"different dtypes: .*'layers\.0\.mixer\.k\.weight': 'torch\.bfloat16'"):
        mixed["model.layers.0.linear_attn.in_proj_qkvz.weight"]


def test_folder_that_is_damaged_or_not_safetensors_is_refused_by_file(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"config\.json is not there"):
        hf.read(tmp_path)
    hf.write(tmp_path / "good", SPEC, parameters(), shard_bytes=20_000)
    good = {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()}
    shard = "model-00002-of-"

    def folder(name: str, contents: Mapping[str, bytes]) -> Path:
        (tmp_path / name).mkdir()
        for file, content in contents.items():
            (tmp_path / name / file).write_bytes(content)
        return tmp_path / name

    weights_gone = folder("pickle", {"config.json": good["config.json"], "pytorch_model.bin": b""})
    with pytest.raises(Refusal, match=r"run code when loaded"):
        hf.read(weights_gone)
    with pytest.raises(Refusal, match=rf"names '{shard}.*not a file"):
        hf.read(folder("lost", {file: content for file, content in good.items() if not file.startswith(shard)}))
    with pytest.raises(Refusal, match=rf"{shard}.*damaged"):
        hf.read(folder("cut", {f: c[:-1] if f.startswith(shard) else c for f, c in good.items()}))
    with pytest.raises(Refusal, match=r"config\.json: damaged"):
        hf.read(folder("torn", good | {"config.json": good["config.json"][:-5]}))
    outside = json.dumps({"weight_map": {"lm_head.weight": "../good/" + next(f for f in good if f.startswith(shard))}})
    with pytest.raises(Refusal, match=r"\.\./good/.*not a file of that folder"):
        TensorFolder(folder("outside", {"model.safetensors.index.json": outside.encode()}))


def test_write_that_dies_on_the_way_leaves_no_checkpoint_and_never_mixes_with_another(tmp_path: Path) -> None:
    params = parameters()
    params["head.weight"] = torch.ones(1, 1)  # found when the last shard is made
    with pytest.raises(Refusal, match=r"head\.weight"):
        hf.write(tmp_path, SPEC, params, shard_bytes=20_000)
    assert not list(tmp_path.glob("*.json")) and not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(Refusal, match=r"not empty"):
        hf.write(tmp_path, SPEC, parameters())


def test_single_file_that_safetensors_wrote_is_read(tmp_path: Path) -> None:
    theirs = {name: tensor.clone() for name, tensor in hf.export_state(SPEC, parameters()).items()}
    save_file(theirs, tmp_path / "model.safetensors")
    assert_bit_equal(TensorFolder(tmp_path), theirs)
