"""Fields of a spec and keys of a ``config.json``: reading, writing, and saying what does not match."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import fields, is_dataclass
from typing import Any

#: Spec field -> config key, or values under which a key makes the model that Stoker builds.
Table = Mapping[str, str]
Supported = Mapping[str, tuple[object, ...]]

#: ModelSpec fields that every decoder of transformers names alike.
MODEL: Table = {
    "width": "hidden_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
#: Keys that leave the function from tokens to logits as it is. Router losses are a choice of the run.
INERT = frozenset(
    {
        *("architectures", "auto_map", "_name_or_path", "transformers_version", "dtype", "torch_dtype"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "sliding_window"),
        *("router_aux_loss_coef", "output_router_logits", "output_attentions", "output_hidden_states", "return_dict"),
        *("use_cache", "id2label", "label2id", "problem_type", "is_encoder_decoder", "chunk_size_feed_forward"),
    }
)


def read(config: Mapping[str, Any], table: Table) -> dict[str, Any]:
    return {field: config[key] for field, key in table.items()}


def write(spec: object, table: Table) -> dict[str, Any]:
    return {key: getattr(spec, field) for field, key in table.items()}


def problems(config: Mapping[str, Any], required: Set[str], supported: Supported, known: Set[str]) -> Iterator[str]:
    """What is wrong with a ``config.json``: keys that are missing, values that are not supported (a key that is absent
    has the first that is), keys that are not known, which could change what the model computes."""
    yield from (f"{key} is missing" for key in sorted(required - config.keys()))
    for key, values in supported.items():
        if key in config and config[key] not in values:
            yield f"{key}={config[key]!r} (supported: {values[0]!r})"
    unknown = config.keys() - {"model_type"} - required - supported.keys() - known - INERT
    yield from (f"{key} is not a key known here" for key in sorted(unknown))


def differences(ours: Any, theirs: Any, where: str, ignore: Collection[str]) -> Iterator[str]:
    """Where two specs differ, leaf by leaf: ``model.layers.3.ffn.router='sigmoid' (there: 'softmax')``."""
    if is_dataclass(ours) and type(ours) is type(theirs):
        for name in (field.name for field in fields(ours) if field.name not in ignore):
            yield from differences(getattr(ours, name), getattr(theirs, name), f"{where}.{name}", ignore)
    elif isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(our, their, f"{where}.{index}", ignore)
    elif ours != theirs:
        yield f"{where}={ours!r} (there: {theirs!r})"
