"""The model and the objective of ``pretrain/spec.py`` in plain float64 torch: the oracle the product is held to.

Slow on purpose and sharing nothing with the product but the spec. Each document runs alone, so nothing can cross its
boundary; the delta rule goes token by token, the short convolution tap by tap, the mixture token by token and expert
by expert. ``test_plain_vs_hf.py`` holds this file to Hugging Face's models.

Shapes: ``B`` windows of the global batch, ``T`` tokens of a window, ``n`` tokens of a document, ``D`` model width,
``H`` heads, ``K`` key dim, ``V`` value dim, ``E`` experts. Parameters are float64, by global name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from pretrain.spec import Attention, Dense, GatedDelta, Kda, ModelSpec, MoE

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Routing:
    """What one MoE layer decided on some tokens, each ``[tokens, E]``: router logits, probabilities that sum to one
    over experts (sigmoid scores are divided by their sum), and 1 where the expert is among the token's top k."""

    logits: Tensor
    probs: Tensor
    chosen: Tensor


@dataclass(frozen=True)
class Losses:
    """``main`` in nats per valid target of the global batch (P1); ``balance`` and ``z`` carry their coefficients."""

    main: Tensor
    balance: Tensor
    z: Tensor

    @property
    def total(self) -> Tensor:
        return self.main + self.balance + self.z


def forward(
    spec: ModelSpec, params: Params, tokens: Tensor, positions: Tensor, doc_index: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Logits ``[B, T, vocabulary]`` of packed windows; every argument after ``params`` is ``[B, T]``.

    A document is a run of equal ``doc_index``; ``positions`` are RoPE's. Tokens that are not ``valid`` are padding:
    they pass no expert, and their logits mean nothing.
    """
    return _run(spec, params, tokens, positions, doc_index, valid)[0]


def loss(
    spec: ModelSpec,
    params: Params,
    tokens: Tensor,
    targets: Tensor,
    loss_mask: Tensor,
    positions: Tensor,
    doc_index: Tensor,
    valid: Tensor | None = None,
) -> Losses:
    """The objective of one global batch ``[B, T]``; differentiable in ``params``.

    ``main``: sum of -log p over targets where ``loss_mask``, divided by their number. ``balance``: per window
    E / (top_k * tokens) * sum over experts of count * mean probability, averaged over windows (a window of padding
    adds 0), summed over layers. ``z``: logsumexp(router logits)^2, mean over all valid tokens, summed over layers.
    """
    logits, layers = _run(spec, params, tokens, positions, doc_index, valid)
    log_p = logits[loss_mask].log_softmax(-1)
    main = -sum(row[target] for row, target in zip(log_p, targets[loss_mask].tolist(), strict=True)) / len(log_p)

    balance = z = torch.zeros((), dtype=torch.float64)
    for index, windows in layers.items():
        ffn = spec.layers[index].ffn
        assert isinstance(ffn, MoE)
        for routing in windows:
            n = max(len(routing.logits), 1)
            fraction, mean_prob = routing.chosen.sum(0) / (ffn.top_k * n), routing.probs.sum(0) / n
            balance = balance + ffn.balance_loss * ffn.num_experts * (fraction * mean_prob).sum() / len(windows)
        router_logits = torch.cat([routing.logits for routing in windows])
        z = z + ffn.z_loss * router_logits.logsumexp(-1).square().mean()
    return Losses(main, balance, z)


def value_and_grad(
    spec: ModelSpec, params: Params, *batch: Tensor, **named: Tensor
) -> tuple[Losses, dict[str, Tensor]]:
    """`loss` with the same arguments, and the gradient of its total for every trained parameter."""
    leaves = {name: tensor.detach().clone() for name, tensor in params.items()}
    trained = [name for name, parameter in spec.parameters().items() if parameter.trained]
    for name in trained:
        leaves[name].requires_grad_()
    losses = loss(spec, leaves, *batch, **named)
    grads = torch.autograd.grad(losses.total, [leaves[name] for name in trained])
    return losses, dict(zip(trained, grads, strict=True))


def initial(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """Random parameters that make every term count: norms and router biases away from their neutral value, gates and
    routers away from saturation and ties. Not the initialiser of a run."""
    random = torch.Generator().manual_seed(seed)
    params = {}
    for name, parameter in spec.parameters().items():
        noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        match parameter.role:
            case "counter":
                params[name] = torch.zeros(parameter.shape, dtype=torch.int64)
            case "norm" | "router_bias":
                params[name] = parameter.init.a + 0.2 * noise
            case "decay":
                params[name] = 0.5 * noise
            case "conv" | "embedding":
                params[name] = 0.5 * noise
            case _:
                params[name] = noise / math.sqrt(parameter.shape[-1])
    return params


def _run(
    spec: ModelSpec, params: Params, tokens: Tensor, positions: Tensor, doc_index: Tensor, valid: Tensor | None
) -> tuple[Tensor, dict[int, list[Routing]]]:
    """Logits, and for each MoE layer the routing of each window's valid tokens."""
    valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
    logits: list[Tensor] = []
    layers: dict[int, list[Routing]] = {i: [] for i, layer in enumerate(spec.layers) if isinstance(layer.ffn, MoE)}
    for b in range(len(tokens)):
        documents = [
            _document(spec, params, tokens[b, start:stop], positions[b, start:stop], valid[b, start:stop])
            for start, stop in _documents(doc_index[b].tolist())
        ]
        logits.append(torch.cat([document_logits for document_logits, _ in documents]))
        for index, windows in layers.items():
            parts = [routings[index] for _, routings in documents]
            windows.append(
                Routing(*(torch.cat([getattr(p, field) for p in parts]) for field in ("logits", "probs", "chosen")))
            )
    return torch.stack(logits), layers


def _documents(doc_index: list[int]) -> list[tuple[int, int]]:
    starts = [t for t in range(len(doc_index)) if t == 0 or doc_index[t] != doc_index[t - 1]]
    return list(zip(starts, [*starts[1:], len(doc_index)], strict=True))


def _document(
    spec: ModelSpec, params: Params, tokens: Tensor, positions: Tensor, valid: Tensor
) -> tuple[Tensor, dict[int, Routing]]:
    """Logits ``[n, vocabulary]`` of one document, and its routing by layer."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return _rms_norm(x, 1 + weight if spec.zero_centred_norm else weight, spec.norm_eps)

    routings = {}
    h = params["embed.weight"][tokens]
    for index, layer in enumerate(spec.layers):
        p = _fields(params, f"layers.{index}.mixer.")
        x = norm(h, p["norm.weight"])
        match layer.mixer:
            case GatedDelta():
                h = h + _gated_delta(layer.mixer, p, x, spec.norm_eps)
            case Kda():
                h = h + _kda(layer.mixer, p, x, spec.norm_eps)
            case Attention():
                h = h + _attention(layer.mixer, p, x, positions, norm)

        p = _fields(params, f"layers.{index}.ffn.")
        x = norm(h, p["norm.weight"])
        if isinstance(layer.ffn, Dense):
            h = h + _swiglu(x, p["gate.weight"], p["up.weight"], p["down.weight"])
        else:
            y, routings[index] = _moe(layer.ffn, p, x, valid)
            h = h + y
    head = params["embed.weight"] if spec.tied_embedding else params["head.weight"]
    return norm(h, params["final_norm.weight"]) @ head.T, routings


def _fields(params: Params, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in params.items() if name.startswith(prefix)}


def _gated_delta(mixer: GatedDelta, p: Params, x: Tensor, eps: float) -> Tensor:
    """Gated DeltaNet (arXiv 2412.06464): one decay a head. ``x [n, D] -> [n, D]``."""
    reads = [h * mixer.num_qk_heads // mixer.num_v_heads for h in range(mixer.num_v_heads)]
    q_nHK, k_nHK = (_unit(_convolved(p, x, f, mixer.num_qk_heads))[:, reads] for f in ("q", "k"))
    v_nHV = _convolved(p, x, "v", mixer.num_v_heads)
    g_nH = -p["A_log"].exp() * softplus(x @ p["a.weight"].T + p["dt_bias"])
    o_nHV = _delta_rule(q_nHK, k_nHK, v_nHV, g_nH[:, :, None], (x @ p["b.weight"].T).sigmoid())
    gate_nHV = silu(_heads(x @ p["z.weight"].T, mixer.num_v_heads))
    return (_rms_norm(o_nHV, p["out_norm.weight"], eps) * gate_nHV).flatten(1) @ p["o.weight"].T


def _kda(mixer: Kda, p: Params, x: Tensor, eps: float) -> Tensor:
    """Kimi delta attention (arXiv 2510.26692): one decay a channel, gates of low rank. ``x [n, D] -> [n, D]``."""
    H = mixer.num_heads
    q_nHK, k_nHK = (_unit(_convolved(p, x, f, H)) for f in ("q", "k"))
    step_nHK = _heads(x @ p["f_a.weight"].T @ p["f_b.weight"].T + p["dt_bias"], H)
    g_nHK = -p["A_log"].exp()[:, None] * softplus(step_nHK)
    o_nHV = _delta_rule(q_nHK, k_nHK, _convolved(p, x, "v", H), g_nHK, (x @ p["b.weight"].T).sigmoid())
    gate_nHV = _heads(x @ p["g_a.weight"].T @ p["g_b.weight"].T, H).sigmoid()
    return (_rms_norm(o_nHV, p["out_norm.weight"], eps) * gate_nHV).flatten(1) @ p["o.weight"].T


def _delta_rule(q_nHK: Tensor, k_nHK: Tensor, v_nHV: Tensor, g_nHK: Tensor, beta_nH: Tensor) -> Tensor:
    """Decay, correct, read, one token after another. The log decay is ``[n, H, K]``, or ``[n, H, 1]`` for all of a
    head's channels."""
    state_HKV = q_nHK.new_zeros(*k_nHK.shape[1:], v_nHV.shape[2])
    outputs = []
    for q_HK, k_HK, v_HV, g_HK, beta_H in zip(q_nHK, k_nHK, v_nHV, g_nHK, beta_nH, strict=True):
        state_HKV = g_HK.exp()[:, :, None] * state_HKV
        u_HV = beta_H[:, None] * (v_HV - (state_HKV * k_HK[:, :, None]).sum(1))
        state_HKV = state_HKV + k_HK[:, :, None] * u_HV[:, None, :]
        outputs.append((state_HKV * q_HK[:, :, None]).sum(1) * q_HK.shape[1] ** -0.5)
    return torch.stack(outputs)


def _convolved(p: Params, x: Tensor, field: str, heads: int) -> Tensor:
    return _heads(silu(_short_conv(x @ p[f"{field}.weight"].T, p[f"{field}_conv.weight"])), heads)


def _heads(y: Tensor, count: int) -> Tensor:
    return y.reshape(len(y), count, -1)


def _unit(y: Tensor) -> Tensor:
    return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def _rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * scale


def _short_conv(x: Tensor, weight: Tensor) -> Tensor:
    """``y[t] = sum over w of weight[:, w] * x[t - (W - 1) + w]``: the last tap is the token itself. ``x [n, C]``."""
    tokens, taps = x.unbind(0), weight.unbind(1)
    before = len(taps) - 1
    reach = [range(max(0, before - t), before + 1) for t in range(len(x))]
    return torch.stack(
        [torch.stack([taps[w] * tokens[t - before + w] for w in reach[t]]).sum(0) for t in range(len(x))]
    )


def _attention(
    mixer: Attention, p: Params, x: Tensor, positions: Tensor, norm: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Causal softmax attention within one document, head by head. ``x [n, D] -> [n, D]``."""
    n, dim = len(x), mixer.head_dim
    q = (x @ p["q.weight"].T).reshape(n, mixer.num_heads, dim)
    k = (x @ p["k.weight"].T).reshape(n, mixer.num_kv_heads, dim)
    v = (x @ p["v.weight"].T).reshape(n, mixer.num_kv_heads, dim)
    if mixer.qk_norm:
        q, k = norm(q, p["q_norm.weight"]), norm(k, p["k_norm.weight"])
    q, k = _rope(mixer, q, positions), _rope(mixer, k, positions)

    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    outputs = []
    for h in range(mixer.num_heads):
        kv = h // (mixer.num_heads // mixer.num_kv_heads)
        scores = (q[:, h] @ k[:, kv].T * dim**-0.5).masked_fill(future, -math.inf)
        outputs.append(scores.softmax(-1) @ v[:, kv])
    o = torch.cat(outputs, dim=1)
    if mixer.output_gate:
        o = o * (x @ p["gate.weight"].T).sigmoid()
    return o @ p["o.weight"].T


def _rope(mixer: Attention, x: Tensor, positions: Tensor) -> Tensor:
    """Rotates dims (i, i + rope_dim / 2) of ``x [n, H, head_dim]`` by position * theta^(-2i / rope_dim), as one
    complex number each (arXiv 2104.09864)."""
    half = mixer.rope_dim // 2
    frequency = mixer.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = positions.to(torch.float64)[:, None, None] * frequency
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)


def _swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def _moe(ffn: MoE, p: Params, x: Tensor, valid: Tensor) -> tuple[Tensor, Routing]:
    """Each valid token through its own experts, one at a time; padding passes the shared expert alone."""
    logits = x @ p["router.weight"].T
    scores = logits.softmax(-1) if ffn.router == "softmax" else logits.sigmoid()
    ranking = scores.detach() + p.get("router.bias", torch.zeros(ffn.num_experts, dtype=torch.float64))
    experts = list(zip(*(p[f"experts.{f}.weight"].unbind(0) for f in ("gate", "up", "down")), strict=True))
    chosen = torch.zeros_like(ranking)
    rows = []
    for t, (token, token_scores) in enumerate(zip(x.unbind(0), scores.unbind(0), strict=True)):
        rank = ranking[t].tolist()
        top = sorted(range(ffn.num_experts), key=rank.__getitem__, reverse=True)[: ffn.top_k] if valid[t] else []
        total = sum(token_scores[e] for e in top) if ffn.renormalise else 1.0
        y = torch.zeros_like(token)
        for e in top:
            chosen[t, e] = 1
            y = y + ffn.route_scale * token_scores[e] / total * _swiglu(token, *experts[e])
        rows.append(y)
    out = torch.stack(rows)
    if ffn.shared_hidden is not None:
        shared = _swiglu(x, *(p[f"shared.{f}.weight"] for f in ("gate", "up", "down")))
        out = out + (shared * (x @ p["shared.router.weight"].T).sigmoid() if ffn.shared_gate else shared)
    probs = scores / scores.sum(-1, keepdim=True)
    return out, Routing(logits[valid], probs[valid], chosen[valid])
