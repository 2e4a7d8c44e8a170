"""transformers' kimi_linear: Kimi delta attention, sigmoid router with a bias, plain norms.

Its full attention is multi-head latent attention, which Stoker has not: a model that has such layers is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pretrain.exchange import fields
from pretrain.exchange.packing import Packing, Prefixes, decoder, experts, packed_experts, swiglu
from pretrain.spec import Dense, Kda, LayerSpec, ModelSpec, MoE
from stoker.errors import Refusal

TRAINING_ONLY = frozenset({"balance_loss", "z_loss", "bias_update_rate"})

_DENSE = {"hidden": "intermediate_size"}
_MOE = {
    "num_experts": "num_experts",
    "top_k": "num_experts_per_token",
    "hidden": "moe_intermediate_size",
    "renormalise": "moe_renormalize",
    "route_scale": "routed_scaling_factor",
}
_KDA = {"num_heads": "linear_num_heads", "conv_width": "linear_conv_kernel_dim"}
#: One width for keys, values and the rank of the gates.
_HEAD_DIM = "linear_head_dim"
_REQUIRED = {"num_hidden_layers", "layer_types", "mlp_layer_types", "num_shared_experts", _HEAD_DIM}.union(
    *(table.values() for table in (fields.MODEL, _DENSE, _MOE, _KDA))
)
_SUPPORTED: fields.Supported = {
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),  # transformers has the key, and a head of its own whatever it says
    "num_expert_group": (1,),
    "topk_group": (1,),
    "moe_router_activation_func": ("sigmoid",),
    "moe_layer_freq": (1,),
    "num_nextn_predict_layers": (0,),
}
#: Keys of latent attention and its positions, and of groups of experts, which are one.
_INERT = {
    *("num_attention_heads", "num_key_value_heads", "head_dim", "q_lora_rank", "kv_lora_rank", "qk_head_dim"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "attention_bias", "attention_dropout", "pretraining_tp"),
    *("mla_use_nope", "rope_theta", "rope_scaling", "rope_parameters", "model_max_length", "use_grouped_topk"),
}
#: Key in ``linear_attn_config`` of published files -> key that transformers 5 writes.
_PUBLISHED = {
    "head_dim": _HEAD_DIM,
    "num_heads": "linear_num_heads",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}


def spec_from(config: Mapping[str, Any]) -> ModelSpec:
    """The model of a ``config.json``, its routers with a bias; see ``hf_config.spec_from_hf``."""
    config = _as_transformers_writes(config)
    problems = list(fields.problems(config, _REQUIRED, _SUPPORTED, _INERT))
    mixers, ffns = config.get("layer_types") or [], config.get("mlp_layer_types") or []
    count = config.get("num_hidden_layers")
    if latent := [index for index, kind in enumerate(mixers) if kind == "full_attention"]:
        problems.append(f"layers {latent} are full_attention: multi-head latent attention, which Stoker has not")
    if len(mixers) != count or not set(mixers) <= {"linear_attention", "full_attention"}:
        problems.append(f"layer_types={mixers} (supported: linear_attention, for each layer)")
    if len(ffns) != count or not set(ffns) <= {"dense", "sparse"}:
        problems.append(f"mlp_layer_types={ffns} (supported: dense or sparse, for each layer)")
    if problems:
        raise Refusal(f"config.json is not a kimi_linear model that Stoker can hold: {'; '.join(problems)}")

    width = config[_HEAD_DIM]
    mixer = Kda(key_dim=width, value_dim=width, gate_rank=width, **fields.read(config, _KDA))
    shared = config["num_shared_experts"] * config["moe_intermediate_size"]
    moe = MoE(router="sigmoid", shared_hidden=shared, **fields.read(config, _MOE))
    dense = Dense(**fields.read(config, _DENSE))
    layers = tuple(LayerSpec(mixer, moe if kind == "sparse" else dense) for kind in ffns)
    return ModelSpec(layers=layers, zero_centred_norm=False, **fields.read(config, fields.MODEL))


def _as_transformers_writes(config: Mapping[str, Any]) -> dict[str, Any]:
    """A published file's keys as those that transformers 5 reads out of them. Layers are counted from 1 there."""
    config = dict(config)
    linear = dict(config.pop("linear_attn_config", None) or {})
    full = linear.pop("full_attn_layers", None)
    if (kda := linear.pop("kda_layers", None)) is not None and full is not None and not config.get("layer_types"):
        kinds = dict.fromkeys(full, "full_attention") | dict.fromkeys(kda, "linear_attention")
        config["layer_types"] = [kinds[index] for index in sorted(kinds)]
    if (dense := config.pop("first_k_dense_replace", None)) is not None and not config.get("mlp_layer_types"):
        count = config.get("num_hidden_layers", 0)
        config["mlp_layer_types"] = ["dense" if index < dense else "sparse" for index in range(count)]
    return config | {_PUBLISHED.get(key, f"linear_attn_config.{key}"): value for key, value in linear.items()}


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """The ``config.json`` nearest to a model: what kimi_linear cannot state is not in it, but for a router without a
    bias, which is refused here."""
    mixers, ffns = [layer.mixer for layer in spec.layers], [layer.ffn for layer in spec.layers]
    if any(isinstance(ffn, MoE) and ffn.bias_update_rate is None for ffn in ffns):
        raise Refusal("transformers' kimi_linear has a bias in every router: give moe.bias_update_rate a value")
    kda = next(m for m in mixers if isinstance(m, Kda))
    # A kind of layer that the model lacks still has its keys in the file; any valid value does.
    dense = next((f for f in ffns if isinstance(f, Dense)), Dense(1))
    moe = next((f for f in ffns if isinstance(f, MoE)), MoE(2, 1, 1))
    return {
        "model_type": "kimi_linear",
        "architectures": ["KimiLinearForCausalLM"],
        # What transformers takes where these are not said are tokens of the published vocabulary.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        # transformers 5.23 asks an attention layer of its cache how much was read, and there is none: it would raise.
        "use_cache": False,
        **{key: values[0] for key, values in _SUPPORTED.items()},
        **fields.write(spec, fields.MODEL),
        **fields.write(kda, _KDA),
        _HEAD_DIM: kda.key_dim,
        **fields.write(dense, _DENSE),
        **fields.write(moe, _MOE),
        "num_shared_experts": max(1, (moe.shared_hidden or 0) // moe.hidden),
        "num_hidden_layers": len(spec.layers),
        "layer_types": ["linear_attention"] * len(spec.layers),
        "mlp_layer_types": ["dense" if isinstance(ffn, Dense) else "sparse" for ffn in ffns],
    }


def packings(spec: ModelSpec, names: Collection[str] = ()) -> Iterator[Packing]:
    """Every tensor that both sides have.

    `names` tell where they come from: a module of transformers 5 (experts packed, gates in a module of their own, one
    convolution), a file that it saved (dense feed-forwards under the name of the mixture), or a published file.
    """
    in_modules = any(".forget_gate." in name for name in names)
    saved = any(".block_sparse_moe.gate_proj." in name for name in names)
    dense = "block_sparse_moe." if saved else "mlp."

    def branches(layer: LayerSpec, prefixes: Prefixes) -> Iterator[Packing]:
        assert isinstance(layer.mixer, Kda)
        yield from _mixer(layer.mixer, prefixes, spec.width, in_modules)
        if isinstance(layer.ffn, Dense):
            yield from swiglu(prefixes, "ffn.", dense, layer.ffn.hidden, spec.width)
        else:
            yield from _moe(layer.ffn, prefixes, spec.width, in_modules)

    return decoder(spec, branches)


def _mixer(mixer: Kda, names: Prefixes, D: int, in_modules: bool) -> Iterator[Packing]:
    H, R, W = mixer.num_heads, mixer.gate_rank, mixer.conv_width
    HK, HV = H * mixer.key_dim, H * mixer.value_dim
    rows = {"q": (HK, D), "k": (HK, D), "v": (HV, D), "b": (H, D), "g_a": (R, D), "g_b": (HV, R), "o": (D, HV)}
    for field, shape in rows.items():
        yield names(f"mixer.{field}.weight", f"self_attn.{field}_proj.weight", *shape)
    decay = "self_attn.forget_gate." if in_modules else "self_attn."
    yield names("mixer.f_a.weight", decay + "f_a_proj.weight", R, D)
    yield names("mixer.f_b.weight", decay + "f_b_proj.weight", HK, R)
    yield names("mixer.A_log", decay + "A_log", 1, 1, H, 1)
    yield names("mixer.dt_bias", decay + "dt_bias", HK)
    if in_modules:
        convs = "mixer.q_conv.weight mixer.k_conv.weight mixer.v_conv.weight"
        yield names(convs, "self_attn.conv1d.weight", 2 * HK + HV, 1, W)
    else:
        for field, channels in (("q_conv", HK), ("k_conv", HK), ("v_conv", HV)):
            yield names(f"mixer.{field}.weight", f"self_attn.{field}1d.weight", channels, 1, W)
    yield names("mixer.out_norm.weight", "self_attn.o_norm.weight", mixer.value_dim)


def _moe(moe: MoE, names: Prefixes, D: int, in_modules: bool) -> Iterator[Packing]:
    theirs = "mlp." if in_modules else "block_sparse_moe."
    yield names("ffn.router.weight", theirs + "gate.weight", moe.num_experts, D)
    yield names("ffn.router.bias", theirs + "gate.e_score_correction_bias", moe.num_experts)
    yield from swiglu(names, "ffn.shared.", theirs + "shared_experts.", moe.shared_hidden or 0, D)
    if in_modules:
        yield from packed_experts(names, theirs, moe, D)
    else:
        yield from experts(names, theirs, moe, D, "w1", "w3", "w2")
