"""transformers' qwen3_next: gated delta rule and gated attention, softmax router, gated shared expert, zero-centred
norms."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pretrain.exchange import fields
from pretrain.exchange.packing import Packing, Prefixes, decoder, experts, packed_experts, swiglu
from pretrain.spec import Attention, Dense, FeedForward, GatedDelta, LayerSpec, Mixer, ModelSpec, MoE
from stoker.errors import Refusal

TRAINING_ONLY = frozenset({"balance_loss", "z_loss"})

_MODEL = {**fields.MODEL, "tied_embedding": "tie_word_embeddings"}
_ATTENTION = {
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}
_GATED_DELTA = {
    "num_qk_heads": "linear_num_key_heads",
    "num_v_heads": "linear_num_value_heads",
    "key_dim": "linear_key_head_dim",
    "value_dim": "linear_value_head_dim",
    "conv_width": "linear_conv_kernel_dim",
}
_DENSE = {"hidden": "intermediate_size"}
_MOE = {
    "num_experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "hidden": "moe_intermediate_size",
    "renormalise": "norm_topk_prob",
    "shared_hidden": "shared_expert_intermediate_size",
}
_ROPE = {"rope_fraction": "partial_rotary_factor", "rope_theta": "rope_theta"}

#: Every release of transformers that knows qwen3_next (4.57 and later) writes these.
_REQUIRED = {"num_hidden_layers", "mlp_only_layers", "decoder_sparse_step"}.union(
    *(table.values() for table in (_MODEL, _ATTENTION, _GATED_DELTA, _DENSE, _MOE))
)
#: transformers 5 writes ``layer_types`` and ``rope_parameters``, 4.57 the others.
_EITHER = {"layer_types", "full_attention_interval", "rope_parameters", *_ROPE.values()}
_SUPPORTED: fields.Supported = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "rope_scaling": (None,),
    "use_sliding_window": (None, False),
}
_INERT = {"max_window_layers"}


def spec_from(config: Mapping[str, Any]) -> ModelSpec:
    """The model of a ``config.json``, without router bias and auxiliary losses; see ``hf_config.spec_from_hf``."""
    rope = {key: config[key] for key in _ROPE.values() if key in config} | (config.get("rope_parameters") or {})
    rope_type = rope.pop("rope_type", "default")
    kinds = _kinds(config)

    problems = list(fields.problems(config, _REQUIRED, _SUPPORTED, _EITHER | _INERT))
    problems += [f"rope_parameters.{key} is missing" for key in _ROPE.values() if key not in rope]
    problems += [f"rope_parameters.{key} is not a key known here" for key in sorted(rope.keys() - _ROPE.values())]
    if rope_type != "default":
        problems.append(f"rope_parameters.rope_type={rope_type!r} (supported: 'default')")
    if len(kinds) != config.get("num_hidden_layers") or not set(kinds) <= {"linear_attention", "full_attention"}:
        problems.append(f"layer_types={kinds} (supported: linear_attention or full_attention, for each layer)")
    if problems:
        raise Refusal(f"config.json is not a qwen3_next model that Stoker can hold: {'; '.join(problems)}")

    layers = tuple(_layer_from(config, rope, index, kind) for index, kind in enumerate(kinds))
    return ModelSpec(layers=layers, zero_centred_norm=True, **fields.read(config, _MODEL))


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """The ``config.json`` nearest to a model: what qwen3_next cannot state is not in it."""
    mixers, ffns = [layer.mixer for layer in spec.layers], [layer.ffn for layer in spec.layers]
    # A kind of layer that the model lacks still has its keys in the file; any valid value does.
    attention = next((m for m in mixers if isinstance(m, Attention)), Attention(1, 1, 2))
    gated_delta = next((m for m in mixers if isinstance(m, GatedDelta)), GatedDelta(1, 1, 1, 1))
    dense = next((f for f in ffns if isinstance(f, Dense)), Dense(1))
    moe = next((f for f in ffns if isinstance(f, MoE)), MoE(1, 1, 1))
    return {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        **{key: values[0] for key, values in _SUPPORTED.items() if values[0] is not None},
        **fields.write(spec, _MODEL),
        **fields.write(attention, _ATTENTION),
        **fields.write(gated_delta, _GATED_DELTA),
        **fields.write(dense, _DENSE),
        **fields.write(moe, _MOE),
        "shared_expert_intermediate_size": moe.shared_hidden or 1,
        "rope_parameters": {"rope_type": "default", **fields.write(attention, _ROPE)},
        "num_hidden_layers": len(spec.layers),
        "layer_types": ["full_attention" if isinstance(m, Attention) else "linear_attention" for m in mixers],
        "mlp_only_layers": [index for index, ffn in enumerate(ffns) if isinstance(ffn, Dense)],
        "decoder_sparse_step": 1,
    }


def _kinds(config: Mapping[str, Any]) -> list[str]:
    if config.get("layer_types"):
        return list(config["layer_types"])
    interval = config.get("full_attention_interval")
    if not interval:
        return []
    count = config.get("num_hidden_layers", 0)
    return ["linear_attention" if (index + 1) % interval else "full_attention" for index in range(count)]


def _layer_from(config: Mapping[str, Any], rope: Mapping[str, Any], index: int, kind: str) -> LayerSpec:
    mixer: GatedDelta | Attention
    if kind == "full_attention":
        attention, rotation = fields.read(config, _ATTENTION), fields.read(rope, _ROPE)
        mixer = Attention(**attention, **rotation, qk_norm=True, output_gate=True)
        if int(mixer.head_dim * mixer.rope_fraction) != mixer.rope_dim:  # transformers cuts, Stoker rounds
            raise Refusal(
                f"config.json: partial_rotary_factor={mixer.rope_fraction} of head_dim={mixer.head_dim} is not a "
                "whole number of dims, and transformers and Stoker would rotate different ones"
            )
    else:
        mixer = GatedDelta(**fields.read(config, _GATED_DELTA))

    listed_dense = index in (config["mlp_only_layers"] or [])
    if listed_dense or not config["num_experts"] or (index + 1) % config["decoder_sparse_step"]:
        return LayerSpec(mixer, Dense(**fields.read(config, _DENSE)))
    moe = MoE(**fields.read(config, _MOE), router="softmax", bias_update_rate=None, shared_gate=True)
    return LayerSpec(mixer, moe)


def packings(spec: ModelSpec, names: Collection[str] = ()) -> Iterator[Packing]:
    """Every tensor that both sides have. `names` tell whether experts are packed, as in modules of transformers 5, or
    one tensor each, as in files."""
    in_modules = any(name.endswith("mlp.experts.gate_up_proj") for name in names)

    def branches(layer: LayerSpec, prefixes: Prefixes) -> Iterator[Packing]:
        yield from _mixer(layer.mixer, prefixes, spec.width)
        yield from _ffn(layer.ffn, prefixes, spec.width, in_modules)

    return decoder(spec, branches)


def _mixer(mixer: Mixer, names: Prefixes, D: int) -> Iterator[Packing]:
    if isinstance(mixer, GatedDelta):
        HK, HV = mixer.num_qk_heads * mixer.key_dim, mixer.num_v_heads * mixer.value_dim
        num_v, groups = mixer.num_v_heads, mixer.num_qk_heads
        linear, projections = "linear_attn.", "mixer.q.weight mixer.k.weight mixer.v.weight mixer.z.weight"
        yield names(projections, linear + "in_proj_qkvz.weight", 2 * HK + 2 * HV, D, units=groups)
        yield names("mixer.b.weight mixer.a.weight", linear + "in_proj_ba.weight", 2 * num_v, D, units=groups)
        convs = "mixer.q_conv.weight mixer.k_conv.weight mixer.v_conv.weight"
        yield names(convs, linear + "conv1d.weight", 2 * HK + HV, 1, mixer.conv_width)
        yield names("mixer.A_log", linear + "A_log", num_v)
        yield names("mixer.dt_bias", linear + "dt_bias", num_v)
        yield names("mixer.out_norm.weight", linear + "norm.weight", mixer.value_dim)
        yield names("mixer.o.weight", linear + "out_proj.weight", D, HV)
        return
    assert isinstance(mixer, Attention)
    H, dim, GK = mixer.num_heads, mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
    yield names("mixer.q.weight mixer.gate.weight", "self_attn.q_proj.weight", 2 * H * dim, D, units=H)
    yield names("mixer.k.weight", "self_attn.k_proj.weight", GK, D)
    yield names("mixer.v.weight", "self_attn.v_proj.weight", GK, D)
    yield names("mixer.q_norm.weight", "self_attn.q_norm.weight", dim)
    yield names("mixer.k_norm.weight", "self_attn.k_norm.weight", dim)
    yield names("mixer.o.weight", "self_attn.o_proj.weight", D, H * dim)


def _ffn(ffn: FeedForward, names: Prefixes, D: int, in_modules: bool) -> Iterator[Packing]:
    if isinstance(ffn, Dense):
        yield from swiglu(names, "ffn.", "mlp.", ffn.hidden, D)
        return
    yield names("ffn.router.weight", "mlp.gate.weight", ffn.num_experts, D)
    yield from swiglu(names, "ffn.shared.", "mlp.shared_expert.", ffn.shared_hidden or 0, D)
    yield names("ffn.shared.router.weight", "mlp.shared_expert_gate.weight", 1, D)
    if in_modules:
        yield from packed_experts(names, "mlp.", ffn, D)
    else:
        yield from experts(names, "mlp.", ffn, D, "gate_proj", "up_proj", "down_proj")
