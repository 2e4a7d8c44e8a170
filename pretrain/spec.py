"""ModelSpec: what a model is, without torch.

A model is a tuple of layers between an embedding and a head. Each layer is a mixer (gated delta rule, Kimi delta
attention or softmax attention) followed by a feed-forward (dense SwiGLU or mixture of experts), both pre-normed
residual branches.

Global parameter names are for ever (checkpoints rely on them) and independent of stage, chunk and rank:
``embed.weight``, ``layers.<i>.<mixer|ffn>.<field>``, ``final_norm.weight``, ``head.weight``.
Weight axes are (out, in); q, k, v, gate and up are separate tensors; a layer's experts are one tensor ``[E, ...]``;
the vocabulary is unpadded.

Shapes: ``D`` model width, ``H`` heads, ``K`` key dim, ``V`` value dim, ``F`` feed-forward width, ``E`` experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stoker.errors import Refusal

if TYPE_CHECKING:
    from parallel.planning.workload import Workload

Role = Literal["embedding", "head", "matrix", "expert", "norm", "conv", "decay", "router", "router_bias", "counter"]
Dtype = Literal["param", "high", "int64"]

#: Old global names -> the name used since; checkpoints written by an older release are read through it.
aliases: Mapping[str, str] = {}


@dataclass(frozen=True)
class Init:
    """First value of a parameter, as a distribution of one element (see ``pretrain/initialise.py``).

    ``normal``: N(0, a^2) cut at three standard deviations; ``uniform``: U(a, b); ``constant``: a;
    ``log_uniform``: log of U(a, b); ``inverse_softplus``: softplus^-1 of exp(U(log a, log b)).
    """

    kind: Literal["normal", "uniform", "constant", "log_uniform", "inverse_softplus"]
    a: float
    b: float = 0.0


@dataclass(frozen=True)
class Parameter:
    """One global tensor. ``dtype`` is ``param`` (the run's dtype), ``high`` (float32, or float64 in a float64 run)
    or ``int64``. Roles ``router_bias`` and ``counter`` are state without a gradient."""

    shape: tuple[int, ...]
    dtype: Dtype
    role: Role
    init: Init

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def trained(self) -> bool:
        return self.role not in ("router_bias", "counter")


@dataclass(frozen=True)
class GatedDelta:
    """Gated delta rule with a scalar decay per value head (Gated DeltaNet, arXiv 2412.06464).

    A short causal convolution of ``conv_width`` taps (the last tap is the current token) and SiLU on q, k and v; q and
    k divided by sqrt(their squared norm + 1e-6) per head, q also by sqrt(key_dim). Per token the state decays, is
    corrected by beta * (v - S^T k), written, then read. Grouped heads: value head h reads query/key head
    ``h // (num_v_heads // num_qk_heads)``. The output goes through RMSNorm * weight * silu(z) per head.
    """

    num_qk_heads: int
    num_v_heads: int
    key_dim: int
    value_dim: int
    conv_width: int = 4

    def __post_init__(self) -> None:
        _positive(self, "num_qk_heads", "num_v_heads", "key_dim", "value_dim", "conv_width")
        if self.num_v_heads % self.num_qk_heads:
            raise Refusal(
                f"gated_delta.num_v_heads={self.num_v_heads} is not a multiple of num_qk_heads={self.num_qk_heads}: "
                "every query/key head serves the same number of value heads"
            )


@dataclass(frozen=True)
class Kda:
    """Kimi delta attention: the delta rule with a decay per key channel (Kimi Linear, arXiv 2510.26692, section 3).

    Short convolution, SiLU, unit q and k, and the state's update are those of `GatedDelta`, but channel k of head h
    decays by e^g with g = -exp(A_log[h]) * softplus(f_b(f_a(x)) + dt_bias)[h, k]. The output goes through
    RMSNorm * weight * sigmoid(g_b(g_a(x))) per head. ``gate_rank``: width between f_a and f_b, and between g_a and g_b
    (Kimi Linear: the head's width).
    """

    num_heads: int
    key_dim: int
    value_dim: int
    gate_rank: int
    conv_width: int = 4

    def __post_init__(self) -> None:
        _positive(self, "num_heads", "key_dim", "value_dim", "gate_rank", "conv_width")
        if self.key_dim == 1:
            raise Refusal("kda.key_dim=1: a decay per channel is then one per head, use gated_delta")


@dataclass(frozen=True)
class Attention:
    """Causal softmax attention, grouped-query: query head h reads key/value head ``h // (num_heads // num_kv_heads)``.
    The first ``round(head_dim * rope_fraction)`` dims of each head are rotated, by halves; ``qk_norm`` is RMSNorm over
    the head dim before RoPE; ``output_gate`` multiplies by sigmoid(gate(x))."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_fraction: float = 1.0
    rope_theta: float = 10_000.0
    qk_norm: bool = True
    output_gate: bool = False

    def __post_init__(self) -> None:
        _positive(self, "num_heads", "num_kv_heads", "head_dim", "rope_theta")
        if self.num_heads % self.num_kv_heads:
            raise Refusal(f"attention.num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if not 0.0 <= self.rope_fraction <= 1.0 or self.rope_dim % 2:
            raise Refusal(
                f"attention.rope_fraction={self.rope_fraction} of head_dim={self.head_dim} gives {self.rope_dim} "
                "rotated dims: the fraction must lie in [0, 1] and the rotated dims must be even"
            )

    @property
    def rope_dim(self) -> int:
        return round(self.head_dim * self.rope_fraction)


@dataclass(frozen=True)
class Dense:
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    hidden: int

    def __post_init__(self) -> None:
        _positive(self, "hidden")


@dataclass(frozen=True)
class MoE:
    """Dropless mixture of SwiGLU experts.

    Router scores are ``softmax`` or ``sigmoid`` of the logits. The ``top_k`` experts of a token are chosen by
    score + bias, weighted by score (divided by their sum if ``renormalise``) times ``route_scale``. The bias moves by
    ``bias_update_rate`` * sign(mean load - load) after an applied step (arXiv 2408.15664); None switches it off.
    ``balance_loss`` and ``z_loss`` are coefficients, 0 switches off. ``shared_hidden`` is the width of a shared expert
    (None: no shared expert), weighted by sigmoid(shared.router(x)) if ``shared_gate``.
    """

    num_experts: int
    top_k: int
    hidden: int
    router: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    route_scale: float = 1.0
    bias_update_rate: float | None = 1e-3
    balance_loss: float = 0.0
    z_loss: float = 0.0
    shared_hidden: int | None = None
    shared_gate: bool = False

    def __post_init__(self) -> None:
        _positive(self, "num_experts", "top_k", "hidden", "route_scale")
        if self.top_k > self.num_experts:
            raise Refusal(f"moe.top_k={self.top_k} is larger than moe.num_experts={self.num_experts}")
        if self.router not in ("softmax", "sigmoid"):
            raise Refusal(f"moe.router={self.router!r}: known routers are 'softmax' and 'sigmoid'")
        if self.shared_gate and self.shared_hidden is None:
            raise Refusal("moe.shared_gate=true needs a shared expert: set moe.shared_hidden")
        if self.shared_hidden is not None:
            _positive(self, "shared_hidden")


Mixer = GatedDelta | Kda | Attention
FeedForward = Dense | MoE


@dataclass(frozen=True)
class LayerSpec:
    mixer: Mixer
    ffn: FeedForward


@dataclass(frozen=True)
class ModelSpec:
    """A whole model. ``zero_centred_norm``: RMSNorm scales by (1 + weight), weight starts at 0 (the norm inside the
    gated delta and KDA mixers always scales by weight). ``tied_embedding``: the head reads ``embed.weight``."""

    width: int
    vocab_size: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float = 1e-6
    zero_centred_norm: bool = True
    tied_embedding: bool = False
    init_std: float = 0.02

    def __post_init__(self) -> None:
        _positive(self, "width", "vocab_size", "norm_eps", "init_std")
        if not self.layers:
            raise Refusal("model.layers is empty: a model has at least one layer")

    def parameters(self) -> dict[str, Parameter]:
        """Every global tensor in order of layers: ``{global name: Parameter}``."""
        return dict(self._parameters())

    def _parameters(self) -> Iterator[tuple[str, Parameter]]:
        D = self.width
        norm = Parameter((D,), "param", "norm", Init("constant", 0.0 if self.zero_centred_norm else 1.0))
        yield "embed.weight", Parameter((self.vocab_size, D), "param", "embedding", Init("normal", self.init_std))
        for index, layer in enumerate(self.layers):
            for branch, fields in (("mixer", self._mixer(layer.mixer)), ("ffn", self._ffn(layer.ffn))):
                yield f"layers.{index}.{branch}.norm.weight", norm
                for field, parameter in fields:
                    yield f"layers.{index}.{branch}.{field}", parameter
        yield "final_norm.weight", norm
        if not self.tied_embedding:
            yield "head.weight", Parameter((self.vocab_size, D), "param", "head", Init("normal", self.init_std))

    def _matrix(self, out: int, inner: int) -> Parameter:
        return Parameter((out, inner), "param", "matrix", Init("normal", self.init_std))

    def _residual(self, out: int, inner: int) -> Parameter:
        # A matrix that writes to the residual stream: std / sqrt(2 * layers), so that the stream's variance at the
        # last layer does not grow with depth (GPT-2, section 2.3).
        return Parameter((out, inner), "param", "matrix", Init("normal", self.residual_std))

    @property
    def residual_std(self) -> float:
        return self.init_std / math.sqrt(2 * len(self.layers))

    def _head_norm(self, dim: int) -> Parameter:
        return Parameter((dim,), "param", "norm", Init("constant", 0.0 if self.zero_centred_norm else 1.0))

    def _mixer(self, mixer: Mixer) -> Iterator[tuple[str, Parameter]]:
        match mixer:
            case GatedDelta():
                return self._gated_delta(mixer)
            case Kda():
                return self._kda(mixer)
            case Attention():
                return self._attention(mixer)

    def _attention(self, mixer: Attention) -> Iterator[tuple[str, Parameter]]:
        D = self.width
        HK, GK = mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
        yield "q.weight", self._matrix(HK, D)
        yield "k.weight", self._matrix(GK, D)
        yield "v.weight", self._matrix(GK, D)
        if mixer.output_gate:
            yield "gate.weight", self._matrix(HK, D)
        if mixer.qk_norm:
            yield "q_norm.weight", self._head_norm(mixer.head_dim)
            yield "k_norm.weight", self._head_norm(mixer.head_dim)
        yield "o.weight", self._residual(D, HK)

    def _gated_delta(self, mixer: GatedDelta) -> Iterator[tuple[str, Parameter]]:
        heads, HK, HV = mixer.num_v_heads, mixer.num_qk_heads * mixer.key_dim, mixer.num_v_heads * mixer.value_dim
        for field, rows in (("q", HK), ("k", HK), ("v", HV), ("z", HV), ("b", heads), ("a", heads)):
            yield f"{field}.weight", self._matrix(rows, self.width)
        yield from self._delta_rule(mixer, HK, HV, heads, decays=heads)

    def _kda(self, mixer: Kda) -> Iterator[tuple[str, Parameter]]:
        heads, rank = mixer.num_heads, mixer.gate_rank
        HK, HV = heads * mixer.key_dim, heads * mixer.value_dim
        for field, rows in (("q", HK), ("k", HK), ("v", HV), ("b", heads), ("f_a", rank), ("g_a", rank)):
            yield f"{field}.weight", self._matrix(rows, self.width)
        for field, rows in (("f_b", HK), ("g_b", HV)):
            yield f"{field}.weight", self._matrix(rows, rank)
        yield from self._delta_rule(mixer, HK, HV, heads, decays=HK)

    def _delta_rule(
        self, mixer: GatedDelta | Kda, HK: int, HV: int, heads: int, decays: int
    ) -> Iterator[tuple[str, Parameter]]:
        """What both delta rules have after their projections."""
        bound = 1.0 / math.sqrt(mixer.conv_width)
        taps = Init("uniform", -bound, bound)
        for field, rows in (("q_conv", HK), ("k_conv", HK), ("v_conv", HV)):
            yield f"{field}.weight", Parameter((rows, mixer.conv_width), "param", "conv", taps)
        # Decay e^g with g = -exp(A_log) * softplus(a + dt_bias); ranges of Mamba-2 (arXiv 2405.21060, section 7).
        yield "A_log", Parameter((heads,), "high", "decay", Init("log_uniform", 1.0, 16.0))
        yield "dt_bias", Parameter((decays,), "high", "decay", Init("inverse_softplus", 1e-3, 1e-1))
        yield "out_norm.weight", Parameter((mixer.value_dim,), "param", "norm", Init("constant", 1.0))
        yield "o.weight", self._residual(self.width, HV)

    def _ffn(self, ffn: FeedForward) -> Iterator[tuple[str, Parameter]]:
        D = self.width
        if isinstance(ffn, Dense):
            yield "gate.weight", self._matrix(ffn.hidden, D)
            yield "up.weight", self._matrix(ffn.hidden, D)
            yield "down.weight", self._residual(D, ffn.hidden)
            return
        E, F = ffn.num_experts, ffn.hidden
        yield "router.weight", Parameter((E, D), "param", "router", Init("normal", self.init_std))
        if ffn.bias_update_rate is not None:
            yield "router.bias", Parameter((E,), "high", "router_bias", Init("constant", 0.0))
        yield "router.load", Parameter((E,), "int64", "counter", Init("constant", 0.0))
        inner = Init("normal", self.init_std)
        yield "experts.gate.weight", Parameter((E, F, D), "param", "expert", inner)
        yield "experts.up.weight", Parameter((E, F, D), "param", "expert", inner)
        yield "experts.down.weight", Parameter((E, D, F), "param", "expert", Init("normal", self.residual_std))
        if ffn.shared_hidden is not None:
            yield "shared.gate.weight", self._matrix(ffn.shared_hidden, D)
            yield "shared.up.weight", self._matrix(ffn.shared_hidden, D)
            yield "shared.down.weight", self._residual(D, ffn.shared_hidden)
            if ffn.shared_gate:
                yield "shared.router.weight", self._matrix(1, D)

    @property
    def num_parameters(self) -> int:
        """Trained parameters, each counted once."""
        return sum(p.numel for p in self.parameters().values() if p.trained)

    def workload(self, seq_len: int) -> Workload:
        """What training it costs, for the planner and for MFU."""
        from pretrain.workload import workload_of

        return workload_of(self, seq_len)


def _positive(spec: object, *fields: str) -> None:
    for field in fields:
        value = getattr(spec, field)
        if not value > 0:
            raise Refusal(f"{type(spec).__name__}.{field}={value!r} must be positive")
