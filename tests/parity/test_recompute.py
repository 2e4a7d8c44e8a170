"""Recomputing activations changes no bit: loss, gradients and the state after the steps."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from tests.parity import jobs
from tests.parity.pool import Pool
from tests.parity.specs import HYBRID, plan

STEPS = 2


def hashes(layout: dict[str, Any], dtype: str) -> list[tuple[str, str, str]]:
    """Of each step on this rank: the report, the reduced gradients, the state."""
    trainer = jobs.make_trainer(HYBRID, layout, dtype)
    found = []
    for index in range(STEPS):
        report, _ = jobs.step(trainer, index)
        gradients = hashlib.sha256()
        for shard in trainer.replicas.shards:
            gradients.update(shard.name.encode() + shard.gradient.float().numpy().tobytes())
        found.append((repr(report), gradients.hexdigest(), trainer.state_hash()))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("degrees", [{}, {"tp": 2, "sequence_parallel": True}], ids=["one", "tp2.sp"])
def test_recompute_is_bit_equal_to_none(degrees: dict[str, Any], dtype: str, pool: Pool) -> None:
    def run(recompute: str) -> Any:
        layout = plan(degrees.get("tp", 1), recompute=recompute, **degrees)
        return pool.run(layout.world_size, hashes, layout.to_dict(), dtype)

    none = run("none")
    assert run("selective") == none
    assert run("full") == none
