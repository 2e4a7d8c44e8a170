"""``config.json`` of transformers and ModelSpec, both ways, for the families of models that both sides can state.

A family's module has tables of which field is which key. What a family fixes and Stoker can vary (router, output gate,
gate of the shared expert, zero-centred norms) is checked by reading back what is written. A key that is not known is
refused: it could change what the model computes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

from pretrain.exchange import kimi_linear, qwen3_next
from pretrain.exchange.fields import differences
from pretrain.exchange.packing import Packing
from pretrain.spec import Kda, ModelSpec
from stoker.errors import Refusal


class Family(Protocol):
    """A module of this folder, by the ``model_type`` of transformers."""

    #: Spec fields that its files do not state: they shape training only.
    TRAINING_ONLY: frozenset[str]

    def spec_from(self, config: Mapping[str, Any]) -> ModelSpec: ...

    def config_of(self, spec: ModelSpec) -> dict[str, Any]: ...

    def packings(self, spec: ModelSpec, names: Collection[str] = ()) -> Iterator[Packing]: ...


FAMILIES: Mapping[str, Family] = {"qwen3_next": qwen3_next, "kimi_linear": kimi_linear}


def family_of(spec: ModelSpec) -> str:
    """The family that can state a model, if any can."""
    return "kimi_linear" if any(isinstance(layer.mixer, Kda) for layer in spec.layers) else "qwen3_next"


def spec_from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """The model that a ``config.json`` describes, without auxiliary losses.

    Refuses, in one message, every missing key, unknown key and value that Stoker's model cannot have.
    """
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        raise Refusal(f"config.json: model_type={config.get('model_type')!r} (supported: {', '.join(FAMILIES)})")
    return family.spec_from(config)


def hf_config(spec: ModelSpec, **inert: Any) -> dict[str, Any]:
    """The ``config.json`` of a model; ``inert`` adds keys such as ``eos_token_id`` or ``max_position_embeddings``.

    Refuses, naming each field, a model that its family cannot state.
    """
    config = FAMILIES[family_of(spec)].config_of(spec) | inert
    require_statable(spec, config)
    return config


def require_statable(spec: ModelSpec, config: Mapping[str, Any], ignore: Collection[str] = ()) -> None:
    """Raise Refusal where ``config`` does not say what ``spec`` does, but for training and the fields in ``ignore``."""
    name = family_of(spec)
    ignore = {*ignore, *FAMILIES[name].TRAINING_ONLY}
    if found := list(differences(spec, spec_from_hf(config), "model", ignore)):
        raise Refusal(f"transformers' {name} cannot state this model: {'; '.join(found)}")
