"""The oracle is held to Hugging Face transformers, in float64 to 1e-10: logits, losses and every gradient.

transformers computes parts in float32 whatever the dtype of its weights. `in_float64` turns those casts into float64
ones, in the modules it is given:

- ``torch.float32`` and ``torch.float`` as these modules see them: RMSNorm and gated RMSNorm, softmax of eager
  attention and of the router, inverse frequencies and angles of RoPE, the whole chunked delta rules, the routers of
  GLM and Kimi and their bias, the sums of the balance loss;
- ``Tensor.float()`` while the test runs: RMSNorm, RoPE positions, ``A_log``, ``dt_bias`` and the decay gates.

It also prefers the kernels of packages that happen to be installed; the fixture unwraps its own torch code.
Documents are run through transformers one at a time, so packing is checked too.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    KimiLinearConfig,
    KimiLinearForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.models.glm4_moe import modeling_glm4_moe
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.qwen3_next import modeling_qwen3_next

from pretrain.exchange import hf
from pretrain.spec import Attention, Dense, GatedDelta, LayerSpec, ModelSpec, MoE
from tests.oracle import plain

BOUND = 1e-10  # per tensor, max|d| / max|w|: promise P4


class Torch64:
    """The torch module, but its float32 is float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (modeling_qwen3_next, modeling_kimi_linear, modeling_glm4_moe):
        monkeypatch.setattr(module, "torch", Torch64())
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    for module, function in (
        (modeling_qwen3_next, "causal_conv1d_fn"),
        (modeling_qwen3_next, "torch_chunk_gated_delta_rule"),
        (modeling_kimi_linear, "causal_conv1d_fn"),
        (modeling_kimi_linear, "chunk_kimi_delta_attention"),
    ):
        own = inspect.unwrap(getattr(module, function))
        assert own.__module__ == module.__name__
        monkeypatch.setattr(module, function, own)


@dataclass(frozen=True)
class Batch:
    """Each ``[B, T]``; see `plain.loss`."""

    tokens: Tensor
    targets: Tensor
    loss_mask: Tensor
    positions: Tensor
    doc_index: Tensor
    valid: Tensor

    def arguments(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def documents(self) -> Iterator[tuple[int, slice]]:
        """Window and place of each document, padding left out."""
        for b, row in enumerate(self.doc_index):
            for document in row[self.valid[b]].unique().tolist():
                place = (row == document).nonzero().flatten().tolist()
                yield b, slice(place[0], place[-1] + 1)


def packed(windows: list[list[int]], vocab_size: int, padding: int = 0, seed: int = 0) -> Batch:
    """Windows of documents of the given lengths; the last `padding` tokens of the last window are padding."""
    random = torch.Generator().manual_seed(seed)
    shape = len(windows), sum(windows[0])
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in windows])
    doc_index = torch.stack([torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in windows])
    valid = torch.ones(shape, dtype=torch.bool)
    if padding:
        valid[-1, -padding:] = False
    return Batch(
        tokens=torch.randint(vocab_size, shape, generator=random),
        targets=torch.randint(vocab_size, shape, generator=random),
        loss_mask=(torch.rand(shape, generator=random) < 0.7) & valid,
        positions=positions,
        doc_index=doc_index,
        valid=valid,
    )


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights under which every part of the model matters, norms and router biases included."""
    random = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" not in name:
            scale = 0.4 if tensor.dim() == 1 else tensor.shape[-1] ** -0.5
            tensor.data = torch.randn(tensor.shape, generator=random, dtype=torch.float64) * scale


def run_documents(model: nn.Module, batch: Batch) -> tuple[list[Tensor], list[list[Tensor]]]:
    """transformers on each document alone: logits in order of documents, and router logits ``[layer][document]``."""
    logits, routers = [], []
    for b, place in batch.documents():
        out = model(
            input_ids=batch.tokens[b : b + 1, place],
            position_ids=batch.positions[b : b + 1, place],
            output_router_logits=True,
            use_cache=False,
        )
        logits.append(out.logits[0])
        routers.append(list(out.router_logits))
    return logits, [list(layer) for layer in zip(*routers, strict=True)]


def main_loss(logits: list[Tensor], batch: Batch) -> Tensor:
    places = list(batch.documents())
    total = sum(
        nn.functional.cross_entropy(rows, batch.targets[b, place], reduction="none")[batch.loss_mask[b, place]].sum()
        for rows, (b, place) in zip(logits, places, strict=True)
    )
    return torch.as_tensor(total) / batch.loss_mask.sum()


def deviation(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float64
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    deviations = {name: deviation(ours[name], theirs[name]) for name in theirs}
    worst = max(deviations, key=deviations.__getitem__)
    print(f"{len(deviations)} tensors, worst {worst}: {deviations[worst]:.1e} (bound {BOUND:.0e})")
    assert deviations[worst] <= BOUND


def trained(spec: ModelSpec) -> set[str]:
    return {name for name, parameter in spec.parameters().items() if parameter.trained}


QWEN = {
    "vocab_size": 257,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 10,
    "shared_expert_intermediate_size": 12,
    "mlp_only_layers": [1],
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_word_embeddings": True, "norm_topk_prob": False, "linear_conv_kernel_dim": 3, "num_experts_per_tok": 3},
        {"layer_types": ["full_attention", "linear_attention"] * 2, "linear_num_value_heads": 2, "rms_norm_eps": 1e-3},
    ],
    ids=["grouped heads", "tied, not renormalised", "attention first"],
)
def test_p4_oracle_equals_transformers_qwen3_next(change: dict[str, Any]) -> None:
    config = Qwen3NextConfig(**(QWEN | change))
    model = Qwen3NextForCausalLM(config)
    randomise(model)
    spec = hf.spec_from_hf(config.to_dict())
    spec = with_router_losses(spec, balance_loss=0.3, z_loss=0.1)
    params = dict(hf.import_state(spec, dict(model.named_parameters())))
    batch = packed([[65, 1, 3, 64], [63, 20, 30, 20]], spec.vocab_size, padding=20)

    logits, routers = run_documents(model, batch)
    windows = [b for b, _ in batch.documents()]
    top_k = config.num_experts_per_tok
    balance = z = torch.zeros((), dtype=torch.float64)
    for layer in routers:
        z = z + 0.1 * torch.cat(layer).logsumexp(-1).square().mean()
        for b in set(windows):
            window = torch.cat([rows for rows, at in zip(layer, windows, strict=True) if at == b])
            # transformers counts the top_k choices of a token as top_k, Stoker as one.
            switch = modeling_qwen3_next.load_balancing_loss_func((window,), config.num_experts, top_k)
            balance = balance + 0.3 * switch / top_k / len(set(windows))
    theirs = {"main": main_loss(logits, batch), "balance": balance, "z": z}
    torch.stack(list(theirs.values())).sum().backward()

    losses, grads = plain.value_and_grad(spec, params, **batch.arguments())
    ours = plain.forward(spec, params, batch.tokens, batch.positions, batch.doc_index, batch.valid)
    assert_same({"logits": ours[batch.valid]}, {"logits": torch.cat(logits)})
    assert_same(vars(losses), theirs)
    # The import only moves rows, so it carries gradients as it carries weights.
    hf_grads = hf.import_state(spec, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_same(grads, {name: hf_grads[name] for name in trained(spec)})


KIMI = {
    "vocab_size": 257,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention"] * 3,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "linear_num_heads": 3,
    "linear_head_dim": 8,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 10,
    "n_shared_experts": 2,
    "experts_implementation": "eager",
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"norm_topk_prob": False, "linear_conv_kernel_dim": 3, "num_experts_per_tok": 3, "rms_norm_eps": 1e-3},
        {"linear_num_heads": 1, "linear_head_dim": 5, "n_shared_experts": 1, "mlp_layer_types": ["sparse"] * 3},
    ],
    ids=["as published, small", "not renormalised, three taps", "one odd head"],
)
def test_p4_oracle_equals_transformers_kimi_linear(change: dict[str, Any]) -> None:
    config = KimiLinearConfig(**(KIMI | change))
    model = KimiLinearForCausalLM(config)
    randomise(model)
    spec = with_router_losses(hf.spec_from_hf(config.to_dict()), balance_loss=0.0, z_loss=0.1)
    params = dict(hf.import_state(spec, model.state_dict()))
    batch = packed([[65, 1, 3, 64], [63, 20, 30, 20]], spec.vocab_size, padding=20)

    logits, routers = run_documents(model, batch)
    z = sum((0.1 * torch.cat(layer).logsumexp(-1).square().mean() for layer in routers), start=torch.zeros(()))
    theirs = {"main": main_loss(logits, batch), "z": z}
    torch.stack(list(theirs.values())).sum().backward()

    losses, grads = plain.value_and_grad(spec, params, **batch.arguments())
    ours = plain.forward(spec, params, batch.tokens, batch.positions, batch.doc_index, batch.valid)
    assert_same({"logits": ours[batch.valid]}, {"logits": torch.cat(logits)})
    assert_same({"main": losses.main, "z": losses.z}, theirs)
    buffers = {name: torch.zeros_like(buffer) for name, buffer in model.named_buffers()}
    hf_grads = hf.import_state(spec, buffers | {name: p.grad for name, p in model.named_parameters()})
    assert_same(grads, {name: hf_grads[name] for name in trained(spec)})


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("tied, renormalise", [(False, True), (True, False)])
def test_p4_oracle_equals_transformers_glm4_moe(tied: bool, renormalise: bool) -> None:
    """Sigmoid router with bias and scale, plain norms, ungated attention and shared expert: what Qwen3-Next lacks."""
    config = Glm4MoeConfig(
        vocab_size=257,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        use_qk_norm=renormalise,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
        n_routed_experts=7,
        num_experts_per_tok=3,
        moe_intermediate_size=10,
        routed_scaling_factor=2.5,
        norm_topk_prob=renormalise,
        tie_word_embeddings=tied,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = Glm4MoeForCausalLM(config)
    randomise(model)
    attention = Attention(6, 3, 8, rope_theta=500.0, qk_norm=renormalise)
    moe = MoE(7, 3, 10, router="sigmoid", renormalise=renormalise, route_scale=2.5, shared_hidden=10)
    layers = tuple(LayerSpec(attention, ffn) for ffn in (Dense(20), moe, moe))
    spec = ModelSpec(24, 257, layers, norm_eps=1e-5, zero_centred_norm=False, tied_embedding=tied)
    params = glm_names(spec, model.state_dict())
    batch = packed([[33, 1, 6], [15, 25, 0]], 257)

    logits, _ = run_documents(model, batch)
    loss = main_loss(logits, batch)
    loss.backward()

    losses, grads = plain.value_and_grad(spec, params, **batch.arguments())
    ours = plain.forward(spec, params, batch.tokens, batch.positions, batch.doc_index)
    assert_same({"logits": ours.flatten(0, 1)}, {"logits": torch.cat(logits)})
    assert_same({"main": losses.main}, {"main": loss})
    hf_grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(grads, glm_names(spec, hf_grads))


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_p1_router_without_preference_has_unit_balance_loss_whatever_the_padding(router: Any) -> None:
    moe = MoE(5, 2, 6, router=router, bias_update_rate=None, balance_loss=0.7, z_loss=0.3)
    spec = ModelSpec(8, 11, (LayerSpec(Attention(2, 1, 4), moe), LayerSpec(GatedDelta(1, 2, 4, 3), moe)))
    params = plain.initial(spec, 0)
    params |= {name: torch.zeros_like(tensor) for name, tensor in params.items() if "router" in name}
    batch = packed([[7, 2], [4, 5]], 11, padding=3)
    losses = plain.loss(spec, params, **batch.arguments())
    assert losses.balance.item() == pytest.approx(2 * 0.7, rel=1e-14)
    assert losses.z.item() == pytest.approx(2 * 0.3 * math.log(5) ** 2, rel=1e-14)


def test_p1_main_loss_does_not_depend_on_which_window_holds_a_document() -> None:
    moe = MoE(5, 2, 6, z_loss=0.3)
    spec = ModelSpec(8, 11, (LayerSpec(GatedDelta(1, 2, 4, 3), moe), LayerSpec(Attention(2, 1, 4), moe)))
    params = plain.initial(spec, 0)
    two = packed([[7, 2], [4, 5]], 11)
    doc_index = torch.stack([two.doc_index[0], two.doc_index[1] + 2])
    one = {name: tensor.reshape(1, -1) for name, tensor in replace(two, doc_index=doc_index).arguments().items()}
    ours, theirs = plain.loss(spec, params, **two.arguments()), plain.loss(spec, params, **one)
    assert_same({"main": ours.main, "z": ours.z}, {"main": theirs.main, "z": theirs.z})


def test_padding_changes_no_loss_and_no_gradient() -> None:
    moe = MoE(5, 2, 6, balance_loss=0.7, z_loss=0.3, shared_hidden=4)
    spec = ModelSpec(8, 11, (LayerSpec(GatedDelta(1, 2, 4, 3), moe), LayerSpec(Attention(2, 1, 4), moe)))
    params = plain.initial(spec, 0)
    batch = packed([[9, 3]], 11, padding=3)
    cut = {name: tensor[:, :9] for name, tensor in batch.arguments().items()}
    (ours, our_grads), (theirs, their_grads) = (
        plain.value_and_grad(spec, params, **arguments) for arguments in (batch.arguments(), cut)
    )
    assert_same(vars(ours), vars(theirs))
    assert_same(our_grads, their_grads)


def with_router_losses(spec: ModelSpec, balance_loss: float, z_loss: float) -> ModelSpec:
    layers = [
        replace(layer, ffn=replace(layer.ffn, balance_loss=balance_loss, z_loss=z_loss))
        if isinstance(layer.ffn, MoE)
        else layer
        for layer in spec.layers
    ]
    return replace(spec, layers=tuple(layers))


def glm_names(spec: ModelSpec, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of glm4_moe under Stoker's names; those that `theirs` lacks are left out."""
    names = {"embed.weight": "embed_tokens.weight", "final_norm.weight": "norm.weight"}
    for i in range(len(spec.layers)):
        ours, layer = f"layers.{i}.", f"layers.{i}."
        names |= {
            f"{ours}mixer.norm.weight": f"{layer}input_layernorm.weight",
            f"{ours}ffn.norm.weight": f"{layer}post_attention_layernorm.weight",
            f"{ours}ffn.router.weight": f"{layer}mlp.gate.weight",
            f"{ours}ffn.router.bias": f"{layer}mlp.gate.e_score_correction_bias",
            f"{ours}ffn.experts.down.weight": f"{layer}mlp.experts.down_proj",
        }
        for field in ("q", "k", "v", "o"):
            names[f"{ours}mixer.{field}.weight"] = f"{layer}self_attn.{field}_proj.weight"
        for field in ("q", "k"):
            names[f"{ours}mixer.{field}_norm.weight"] = f"{layer}self_attn.{field}_norm.weight"
        for field in ("gate", "up", "down"):
            names[f"{ours}ffn.{field}.weight"] = f"{layer}mlp.{field}_proj.weight"
            names[f"{ours}ffn.shared.{field}.weight"] = f"{layer}mlp.shared_experts.{field}_proj.weight"
    found = {our: theirs[f"model.{their}"] for our, their in names.items() if f"model.{their}" in theirs}
    for i in range(len(spec.layers)):
        packed_experts = theirs.get(f"model.layers.{i}.mlp.experts.gate_up_proj")
        if packed_experts is not None:
            gate, up = packed_experts.chunk(2, dim=1)
            found |= {f"layers.{i}.ffn.experts.gate.weight": gate, f"layers.{i}.ffn.experts.up.weight": up}
    if not spec.tied_embedding:
        found["head.weight"] = theirs["lm_head.weight"]
    return found
