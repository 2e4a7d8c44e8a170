"""transformers' qwen3_next ``config.json`` and ModelSpec, both ways.

The tables say which field is which key. What qwen3_next fixes and Stoker can vary (router, output gate, gate of the
shared expert, zero-centred norms) is checked by reading back what is written. A key that is not known here is refused:
it could change what the model computes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from pretrain.spec import Attention, Dense, GatedDelta, LayerSpec, ModelSpec, MoE
from stoker.errors import Refusal

_MODEL = {
    "width": "hidden_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "tied_embedding": "tie_word_embeddings",
    "init_std": "initializer_range",
}
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
_REQUIRED = {"model_type", "num_hidden_layers", "mlp_only_layers", "decoder_sparse_step"}.union(
    *(table.values() for table in (_MODEL, _ATTENTION, _GATED_DELTA, _DENSE, _MOE))
)
#: transformers 5 writes ``layer_types`` and ``rope_parameters``, 4.57 the others.
_EITHER = {"layer_types", "full_attention_interval", "rope_parameters", *_ROPE.values()}

#: Values under which qwen3_next is the model that Stoker builds; a key that is absent has the first.
_FIXED: Mapping[str, tuple[object, ...]] = {
    "model_type": ("qwen3_next",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "rope_scaling": (None,),
    "use_sliding_window": (None, False),
}
#: Keys that leave the function from tokens to logits as it is. Router losses are a choice of the run.
_INERT = {
    *("architectures", "_name_or_path", "transformers_version", "dtype", "torch_dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "sliding_window", "max_window_layers"),
    *("router_aux_loss_coef", "output_router_logits", "output_attentions", "output_hidden_states", "return_dict"),
    *("use_cache", "id2label", "label2id", "problem_type", "is_encoder_decoder", "chunk_size_feed_forward"),
}

#: Fields of a spec that shape training only, so that no checkpoint has to state them.
TRAINING_ONLY = frozenset({"balance_loss", "z_loss"})


def spec_from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """The model that a qwen3_next ``config.json`` describes, without router bias and auxiliary losses.

    Refuses, in one message, every missing key, unknown key and value that Stoker's model cannot have.
    """
    rope = {key: config[key] for key in _ROPE.values() if key in config} | (config.get("rope_parameters") or {})
    rope_type = rope.pop("rope_type", "default")
    kinds = _kinds(config)

    problems = [f"{key} is missing" for key in sorted(_REQUIRED - config.keys())]
    problems += [f"rope_parameters.{key} is missing" for key in _ROPE.values() if key not in rope]
    problems += [
        f"{key}={config[key]!r} (supported: {supported[0]!r})"
        for key, supported in _FIXED.items()
        if key in config and config[key] not in supported
    ]
    if rope_type != "default":
        problems.append(f"rope_parameters.rope_type={rope_type!r} (supported: 'default')")
    if len(kinds) != config.get("num_hidden_layers") or not set(kinds) <= {"linear_attention", "full_attention"}:
        problems.append(f"layer_types={kinds} (supported: linear_attention or full_attention, for each layer)")
    unknown = config.keys() - _REQUIRED - _EITHER - _FIXED.keys() - _INERT
    unknown |= {f"rope_parameters.{key}" for key in rope.keys() - _ROPE.values()}
    problems += [f"{key} is not a key of qwen3_next known here" for key in sorted(unknown)]
    if problems:
        raise Refusal(f"config.json is not a qwen3_next model that Stoker can hold: {'; '.join(problems)}")

    layers = tuple(_layer(config, rope, index, kind) for index, kind in enumerate(kinds))
    return ModelSpec(layers=layers, zero_centred_norm=True, **_read(config, _MODEL))


def hf_config(spec: ModelSpec, ignore: Collection[str] = TRAINING_ONLY, **inert: Any) -> dict[str, Any]:
    """The qwen3_next ``config.json`` of a model; ``inert`` adds keys such as ``eos_token_id`` or
    ``max_position_embeddings``.

    Refuses, naming each field, a model that qwen3_next cannot state; fields named in `ignore` are not compared.
    """
    mixers, ffns = [layer.mixer for layer in spec.layers], [layer.ffn for layer in spec.layers]
    # A kind of layer that the model lacks still has its keys in the file; any valid value does.
    attention = next((m for m in mixers if isinstance(m, Attention)), Attention(1, 1, 2))
    gated_delta = next((m for m in mixers if isinstance(m, GatedDelta)), GatedDelta(1, 1, 1, 1))
    dense = next((f for f in ffns if isinstance(f, Dense)), Dense(1))
    moe = next((f for f in ffns if isinstance(f, MoE)), MoE(1, 1, 1))
    config = {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        **{key: supported[0] for key, supported in _FIXED.items() if supported[0] is not None},
        **_write(spec, _MODEL),
        **_write(attention, _ATTENTION),
        **_write(gated_delta, _GATED_DELTA),
        **_write(dense, _DENSE),
        **_write(moe, _MOE),
        "shared_expert_intermediate_size": moe.shared_hidden or 1,
        "rope_parameters": {"rope_type": "default", **_write(attention, _ROPE)},
        "num_hidden_layers": len(spec.layers),
        "layer_types": ["full_attention" if isinstance(m, Attention) else "linear_attention" for m in mixers],
        "mlp_only_layers": [index for index, ffn in enumerate(ffns) if isinstance(ffn, Dense)],
        "decoder_sparse_step": 1,
        **inert,
    }
    differences = list(_differences(spec, spec_from_hf(config), "model", ignore))
    if differences:
        raise Refusal(f"transformers' qwen3_next cannot state this model: {'; '.join(differences)}")
    return config


def _kinds(config: Mapping[str, Any]) -> list[str]:
    if config.get("layer_types"):
        return list(config["layer_types"])
    interval = config.get("full_attention_interval")
    if not interval:
        return []
    count = config.get("num_hidden_layers", 0)
    return ["linear_attention" if (index + 1) % interval else "full_attention" for index in range(count)]


def _layer(config: Mapping[str, Any], rope: Mapping[str, Any], index: int, kind: str) -> LayerSpec:
    mixer: GatedDelta | Attention
    if kind == "full_attention":
        mixer = Attention(**_read(config, _ATTENTION), **_read(rope, _ROPE), qk_norm=True, output_gate=True)
        if int(mixer.head_dim * mixer.rope_fraction) != mixer.rope_dim:  # transformers cuts, Stoker rounds
            raise Refusal(
                f"config.json: partial_rotary_factor={mixer.rope_fraction} of head_dim={mixer.head_dim} is not a "
                "whole number of dims, and transformers and Stoker would rotate different ones"
            )
    else:
        mixer = GatedDelta(**_read(config, _GATED_DELTA))

    listed_dense = index in (config["mlp_only_layers"] or [])
    if listed_dense or not config["num_experts"] or (index + 1) % config["decoder_sparse_step"]:
        return LayerSpec(mixer, Dense(**_read(config, _DENSE)))
    moe = MoE(**_read(config, _MOE), router="softmax", bias_update_rate=None, shared_gate=True)
    return LayerSpec(mixer, moe)


def _read(config: Mapping[str, Any], table: Mapping[str, str]) -> dict[str, Any]:
    return {field: config[key] for field, key in table.items()}


def _write(spec: object, table: Mapping[str, str]) -> dict[str, Any]:
    return {key: getattr(spec, field) for field, key in table.items()}


def _differences(ours: Any, theirs: Any, where: str, ignore: Collection[str]) -> Iterator[str]:
    """Where two specs differ, leaf by leaf: ``model.layers.3.ffn.router='sigmoid' (there: 'softmax')``."""
    if is_dataclass(ours) and type(ours) is type(theirs):
        for name in (field.name for field in fields(ours) if field.name not in ignore):
            yield from _differences(getattr(ours, name), getattr(theirs, name), f"{where}.{name}", ignore)
    elif isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(our, their, f"{where}.{index}", ignore)
    elif ours != theirs:
        yield f"{where}={ours!r} (there: {theirs!r})"
