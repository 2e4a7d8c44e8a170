"""Models and plans of the parity suite: small, and hard on purpose.

Vocabulary 257, which no degree divides; six heads and experts, which 2 and 3 divide; grouped heads; four layers,
which three pipeline ranks hold unevenly.
"""

from __future__ import annotations

from typing import Any

from parallel.planning.plan import ParallelPlan
from pretrain.spec import Attention, Dense, GatedDelta, Kda, LayerSpec, ModelSpec, MoE
from tests.parity.batches import GLOBAL_BATCH

#: Tokens of a window: 2 and 3 tensor ranks divide it. Odd lengths are for one process, in ``test_oracle.py``.
SEQ_LEN = 24
VOCABULARY = 257

_DELTA = GatedDelta(num_qk_heads=6, num_v_heads=12, key_dim=4, value_dim=3)
_KDA = Kda(num_heads=6, key_dim=4, value_dim=3, gate_rank=5)
_ATTENTION = Attention(num_heads=12, num_kv_heads=6, head_dim=4, rope_fraction=0.5, output_gate=True)
# torch's grouped_mm wants rows of whole 16 bytes: 48 columns, halved or in three, are in every dtype.
_SOFTMAX = MoE(6, 2, 48, balance_loss=1e-2, z_loss=1e-3, shared_hidden=12, shared_gate=True)
_SIGMOID = MoE(6, 3, 48, router="sigmoid", route_scale=1.5, balance_loss=1e-2, z_loss=1e-3)

DENSE = ModelSpec(
    16,
    VOCABULARY,
    (LayerSpec(_DELTA, Dense(12)), LayerSpec(Attention(6, 6, 4, qk_norm=False), Dense(18))) * 2,
    zero_centred_norm=False,
    init_std=0.05,
)
#: Every mixer, both routers, dense layers between, tied embedding.
HYBRID = ModelSpec(
    16,
    VOCABULARY,
    (
        LayerSpec(_DELTA, _SOFTMAX),
        LayerSpec(_ATTENTION, Dense(12)),
        LayerSpec(_KDA, Dense(12)),
        LayerSpec(_ATTENTION, _SIGMOID),
    ),
    tied_embedding=True,
    init_std=0.05,
)
SPECS = {"dense": DENSE, "hybrid": HYBRID}


def plan(world_size: int, micro_batch: int | None = None, **degrees: Any) -> ParallelPlan:
    """A plan for the four layers and twelve windows of the suite, without ZeRO unless asked; where it can it has an odd
    number of micro-batches."""
    model_parallel = degrees.get("tp", 1) * degrees.get("pp", 1)
    share = GLOBAL_BATCH // (world_size // model_parallel)
    if micro_batch is None:
        micro_batch = share // 3 if share % 3 == 0 else 1
    return ParallelPlan(world_size, GLOBAL_BATCH, micro_batch, num_layers=4, **{"zero": 0, **degrees})


#: What every other plan is compared with: one process, one micro-batch.
ONE = plan(1, micro_batch=GLOBAL_BATCH)
