"""Lower precisions: what ZeRO-1 changes (nothing), and how far a layout moves the curve."""

from __future__ import annotations

import numpy as np
import pytest

from parallel.planning.plan import ParallelPlan
from tests.parity import jobs
from tests.parity.pool import Pool
from tests.parity.specs import HYBRID, plan

STEPS = 8
#: Relative difference of the loss from one process at any of the first 8 steps (docs/parity.md has the measured bands).
BOUNDS = {"float32": 1e-6, "bfloat16": 1e-3}


def losses(pool: Pool, layout: ParallelPlan, dtype: str) -> tuple[list[float], list[float]]:
    reports = pool.run(layout.world_size, jobs.train, HYBRID, layout.to_dict(), dtype, STEPS)[0].reports
    return [report.loss for report in reports], [report.grad_norm for report in reports]


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_p4_zero_1_on_one_process_changes_no_bit(pool: Pool, dtype: str) -> None:
    assert losses(pool, plan(1, zero=1), dtype) == losses(pool, plan(1, zero=0), dtype)


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_p4_layouts_stay_near_one_process_in_lower_precision(pool: Pool, dtype: str) -> None:
    reference, _ = losses(pool, plan(1), dtype)
    for name, layout in {
        "dp2.zero1": plan(2, zero=1),
        "tp2.sp": plan(2, tp=2, sequence_parallel=True),
        "ep2.zero1": plan(2, ep=2, zero=1),
    }.items():
        found, norms = losses(pool, layout, dtype)
        worst = float(np.max(np.abs(np.subtract(found, reference)) / reference))
        print(f"{name} {dtype}: loss {worst:.1e}")
        assert worst < BOUNDS[dtype] and np.isfinite(norms).all()
