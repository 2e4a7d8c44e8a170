"""The product on one process against the plain model of ``tests/oracle``: losses and every gradient, float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.spec import Attention, Dense, GatedDelta, Kda, LayerSpec, ModelSpec, MoE
from tests.oracle import plain
from tests.parity import jobs
from tests.parity.batches import GLOBAL_BATCH, global_batch, part_of
from tests.parity.pool import Pool
from tests.parity.specs import ONE, plan

_DELTA = GatedDelta(num_qk_heads=2, num_v_heads=4, key_dim=4, value_dim=3)
_KDA = Kda(num_heads=3, key_dim=4, value_dim=5, gate_rank=2)
_ATTENTION = Attention(num_heads=4, num_kv_heads=2, head_dim=8, rope_fraction=0.5, output_gate=True)
_SOFTMAX = MoE(4, 2, 8, balance_loss=0.1, z_loss=0.01, shared_hidden=5, shared_gate=True)
_SIGMOID = replace(_SOFTMAX, router="sigmoid", route_scale=2.5, shared_gate=False)
_PLAIN_MOE = MoE(5, 1, 7, renormalise=False, bias_update_rate=None, z_loss=0.01)


def model(*layers: tuple[Any, Any], **options: Any) -> ModelSpec:
    return ModelSpec(12, 257, tuple(LayerSpec(mixer, ffn) for mixer, ffn in layers), **options)


SPECS: dict[str, ModelSpec] = {
    "hybrid, softmax router, gated shared expert, tied": model(
        (_DELTA, _SOFTMAX), (_ATTENTION, Dense(9)), tied_embedding=True
    ),
    "sigmoid router, bias, ungated shared expert": model((_ATTENTION, _SIGMOID), (_DELTA, _SIGMOID)),
    "no bias, no shared expert, no renormalisation": model((_DELTA, _PLAIN_MOE), zero_centred_norm=False),
    "kda, sigmoid router, plain norms": model((_KDA, Dense(9)), (_KDA, _SIGMOID), zero_centred_norm=False),
    "attention alone: ungrouped, full RoPE, no norm": model(
        (Attention(3, 3, 4, qk_norm=False), Dense(9)), zero_centred_norm=False
    ),
    "attention without RoPE, one key head, two taps": model(
        (Attention(4, 1, 4, rope_fraction=0.0), Dense(5)), (GatedDelta(1, 3, 5, 2, conv_width=2), Dense(5))
    ),
}


def product(spec: ModelSpec, seq_len: int, micro_batch: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Losses and gradients by global name, with the oracle's parameters."""
    trainer = jobs.make_trainer(spec, plan(1, micro_batch).to_dict() | layers_of(spec))
    with torch.no_grad():
        for name, value in plain.initial(spec, seed=3).items():
            (trainer.parameters | trainer.state)[name].copy_(value)
    batch = part_of(global_batch(1, seq_len, spec.vocab_size), trainer.part)
    normalisers = trainer.normalisers(batch, GLOBAL_BATCH)
    trainer.replicas.zero_gradients()
    losses = trainer.pipeline.run(trainer.micro_batches(batch, normalisers), rows=micro_batch * seq_len)
    trainer.replicas.reduce_gradients()
    report = trainer.measure(1, losses, normalisers)
    gradients = {}
    for shard in trainer.replicas.shards:
        (piece,) = shard.layout.slices(trainer.groups.coords)
        assert piece.shape == shard.layout.shape
        gradients[shard.name] = shard.gradient.view(piece.shape).numpy().copy()
    return {"main": report.loss, **report.aux}, gradients


def layers_of(spec: ModelSpec) -> dict[str, Any]:
    return {"num_layers": len(spec.layers), "stages": [list(range(len(spec.layers)))]}


@pytest.mark.parametrize(("seq_len", "micro_batch"), [(1, 12), (13, 4), (17, 1)])
@pytest.mark.parametrize("name", SPECS)
def test_p1_losses_and_every_gradient_are_those_of_the_plain_model(
    name: str, seq_len: int, micro_batch: int, pool: Pool
) -> None:
    spec = SPECS[name]
    batch = global_batch(1, seq_len, spec.vocab_size)
    tensors = [torch.from_numpy(array) for array in (batch.tokens, batch.targets, batch.loss_mask, batch.positions)]
    document = torch.from_numpy(batch.doc_index)
    params = plain.initial(spec, seed=3)
    losses_of_plain, gradients = plain.value_and_grad(
        spec, params, tensors[0].long(), tensors[1].long(), tensors[2], tensors[3], document, document >= 0
    )
    main, balance, z = (term.item() for term in (losses_of_plain.main, losses_of_plain.balance, losses_of_plain.z))
    ((losses, found),) = pool.run(ONE.world_size, product, spec, seq_len, micro_batch)
    assert losses["main"] == pytest.approx(main, rel=1e-10)
    if "balance_loss" in losses:
        assert losses["balance_loss"] == pytest.approx(balance, rel=1e-10, abs=0)
        assert losses["z_loss"] == pytest.approx(z, rel=1e-10, abs=0)
    assert found.keys() == gradients.keys()
    largest = {field: float(gradient.abs().max()) for field, gradient in gradients.items()}
    floor = 1e-4 * max(largest.values())  # a gradient that is zero, as of q and k where T = 1, may be rounding
    for field, gradient in gradients.items():
        assert np.abs(found[field] - gradient.numpy()).max() <= 1e-10 * max(largest[field], floor), field
