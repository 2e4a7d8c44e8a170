"""The ``model`` section: a ModelSpec as a person writes it. No torch.

One description of each kind of mixer and feed-forward, and a list of layers that combines them by name:
``layers: [gated_delta/dense, {repeat: 3, layers: [gated_delta/moe, attention/moe]}]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pretrain import spec
from stoker.errors import Refusal
from stoker.sections import Section, suggestion

MIXERS = ("gated_delta", "kda", "attention")
FEED_FORWARDS = ("dense", "moe")
LAYER_KINDS = tuple(f"{mixer}/{ffn}" for mixer in MIXERS for ffn in FEED_FORWARDS)


class GatedDeltaSection(Section):
    num_qk_heads: int
    """Query/key heads."""
    num_v_heads: int
    """Value heads, a multiple of num_qk_heads; each has its own decay."""
    key_dim: int
    """Width of a query/key head."""
    value_dim: int
    """Width of a value head."""
    conv_width: int = 4
    """Taps of the causal convolution on q, k and v, in tokens."""


class KdaSection(Section):
    num_heads: int
    """Heads of queries, keys and values."""
    key_dim: int
    """Width of a query/key head; each of its channels has its own decay."""
    value_dim: int
    """Width of a value head."""
    gate_rank: int
    """Inner width of the low-rank decay and output gates (Kimi Linear: the head's width)."""
    conv_width: int = 4
    """Taps of the causal convolution on q, k and v, in tokens."""


class AttentionSection(Section):
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads; divides num_heads."""
    head_dim: int
    """Width of a head."""
    rope_fraction: float = 1.0
    """Share of a head's dims that RoPE rotates, 0 to 1."""
    rope_theta: float = 10_000.0
    """Base of RoPE's wavelengths, in tokens."""
    qk_norm: bool = True
    """RMSNorm over each head of q and k, before RoPE."""
    output_gate: bool = False
    """Multiply the output by sigmoid of a projection of the input."""


class DenseSection(Section):
    hidden: int
    """Inner width of the SwiGLU."""


class MoESection(Section):
    num_experts: int
    """Routed experts."""
    top_k: int
    """Experts that a token visits."""
    hidden: int
    """Inner width of an expert."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """Score of an expert, from its logit."""
    renormalise: bool = True
    """Divide the chosen scores by their sum."""
    route_scale: float = 1.0
    """Factor on the chosen weights."""
    bias_update_rate: float | None = 1e-3
    """Step of the balancing bias, in units of score (arXiv 2408.15664); null: no bias."""
    balance_loss: float = 0.0
    """Coefficient of the balance loss over a packed window; 0: none."""
    z_loss: float = 0.0
    """Coefficient of the router's z-loss; 0: none."""
    shared_hidden: int | None = None
    """Inner width of the expert that every token visits; null: none."""
    shared_gate: bool = False
    """Weight the shared expert by a sigmoid of the token."""


def expand_layers(value: Any) -> Any:
    """Layers with every ``{repeat: n, layers: [...]}`` written out, to any depth; refuses names it does not know."""
    return tuple(_expanded(value))


def _expanded(value: Any) -> Iterator[str]:
    if not isinstance(value, (list, tuple)):
        raise Refusal(f"layers is a list of {', '.join(LAYER_KINDS)} and {{repeat: n, layers: [...]}}, not {value!r}")
    for item in value:
        if isinstance(item, dict):
            repeat = item.get("repeat")
            if set(item) != {"repeat", "layers"} or type(repeat) is not int or repeat < 1:
                raise Refusal(f"{item!r}: a repeated block is {{repeat: n, layers: [...]}} with n >= 1")
            yield from repeat * list(_expanded(item["layers"]))
        elif item in LAYER_KINDS:
            yield item
        else:
            raise Refusal(f"unknown layer {item!r}: {suggestion(str(item), LAYER_KINDS)}")


class ModelSection(Section):
    width: int
    """Width of the residual stream."""
    vocab_size: int
    """Rows of the embedding and of the head: at least the tokenizer's."""
    layers: Annotated[tuple[str, ...], BeforeValidator(expand_layers), Field(min_length=1)]
    """Layers in order, each <mixer>/<feed-forward>; {repeat: n, layers: [...]} repeats a block."""
    norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    zero_centred_norm: bool = True
    """RMSNorm scales by 1 + weight."""
    tied_embedding: bool = False
    """The head reads the embedding."""
    init_std: float = 0.02
    """Standard deviation of a matrix's first values."""
    gated_delta: GatedDeltaSection | None = None
    """The gated delta mixer; given exactly when a layer uses it."""
    kda: KdaSection | None = None
    """The Kimi delta attention mixer; given exactly when a layer uses it."""
    attention: AttentionSection | None = None
    """The softmax attention mixer; given exactly when a layer uses it."""
    dense: DenseSection | None = None
    """The dense feed-forward; given exactly when a layer uses it."""
    moe: MoESection | None = None
    """The mixture of experts; given exactly when a layer uses it."""

    @model_validator(mode="after")
    def _buildable(self) -> ModelSection:
        used = {part for layer in self.layers for part in layer.split("/")}
        for name in MIXERS + FEED_FORWARDS:
            given = getattr(self, name) is not None
            if name in used and not given:
                raise Refusal(f"a layer uses {name} and model.{name} is missing: describe it, or change model.layers")
            if given and name not in used:
                raise Refusal(f"model.{name} is given and no layer uses it: remove it (or set it to null)")
        self.spec()
        return self

    def spec(self) -> spec.ModelSpec:
        """The model that this section describes."""
        parts: dict[str, Any] = {
            name: kind(**section.model_dump())
            for name, kind in _KINDS.items()
            if (section := getattr(self, name)) is not None
        }
        layers = (layer.split("/") for layer in self.layers)
        return spec.ModelSpec(
            layers=tuple(spec.LayerSpec(mixer=parts[mixer], ffn=parts[ffn]) for mixer, ffn in layers),
            **self.model_dump(exclude={"layers", *_KINDS}),
        )


_KINDS: dict[str, type] = {
    "gated_delta": spec.GatedDelta,
    "kda": spec.Kda,
    "attention": spec.Attention,
    "dense": spec.Dense,
    "moe": spec.MoE,
}
