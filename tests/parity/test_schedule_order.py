"""The tables of ``parallel.planning.schedule`` are the order in which the engine runs, recorded from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel.engine.groups import create
from parallel.engine.pipeline import Pipeline, megatron_config
from parallel.planning.execution import Execution
from parallel.planning.plan import ParallelPlan
from parallel.planning.schedule import forward_only, table_of
from tests.parity.pool import Pool

WIDTH, ROWS = 2, 3

Order = list[tuple[str, int, int]]


class _Noted(torch.autograd.Function):
    """Doubles; its forward and its backward are noted when they run."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, order: Order, chunk: int, micro_batch: int) -> torch.Tensor:
        ctx.note = order, chunk, micro_batch
        order.append(("F", chunk, micro_batch))
        return 2 * states

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        order, chunk, micro_batch = ctx.note
        order.append(("B", chunk, micro_batch))
        return 2 * gradient, None, None, None


class _Chunk(torch.nn.Module):
    """A chunk as Megatron's schedules see one; a micro-batch is its own number."""

    model_type: Any = None

    def __init__(self, config: Any, order: Order, chunk: int, last: bool) -> None:
        super().__init__()
        self.config, self._order, self._chunk, self._last = config, order, chunk, last
        self._received: torch.Tensor | None = None

    def set_input_tensor(self, received: list[torch.Tensor | None]) -> None:
        self._received = received[0]

    def forward(self, micro_batch: int) -> torch.Tensor:
        states = self._received
        if states is None:
            states = torch.full((ROWS, 1, WIDTH), 1.0 + micro_batch, requires_grad=True)
        states = _Noted.apply(states, self._order, self._chunk, micro_batch)
        return states.sum() if self._last else states


def record(plan: dict[str, Any], only_forward: bool) -> tuple[Order, list[float]]:
    layout = ParallelPlan.from_dict(plan)
    groups = create(layout)
    config = megatron_config(groups, WIDTH, layout.num_layers, torch.float32)
    order: Order = []
    last = groups.coords["pp"] == layout.pp - 1
    chunks = [_Chunk(config, order, chunk, last and chunk == layout.vpp - 1) for chunk in range(layout.vpp)]
    with torch.set_grad_enabled(not only_forward):
        losses = Pipeline(chunks, groups, config).run(range(layout.num_micro_batches), ROWS, only_forward)
    return order, [float(loss) for loss in losses]


def layout(pp: int, vpp: int, micro_batches: int) -> ParallelPlan:
    return ParallelPlan(pp, micro_batches, 1, pp=pp, vpp=vpp, num_layers=pp * vpp)


@pytest.mark.parametrize(
    ("pp", "vpp", "micro_batches"),
    [
        *((pp, 1, micro_batches) for pp in (1, 2, 4) for micro_batches in (2, 5, 8)),
        *((2, vpp, micro_batches) for vpp in (2, 3) for micro_batches in (2, 4, 5, 6)),
        (3, 2, 7),
        (4, 2, 4),
        (4, 2, 9),
    ],
)
def test_the_engine_runs_a_schedule_in_the_order_of_its_table(
    pp: int, vpp: int, micro_batches: int, pool: Pool
) -> None:
    plan = layout(pp, vpp, micro_batches)
    ran = pool.run(pp, record, plan.to_dict(), False)
    table = table_of(plan, Execution())
    assert [order for order, _ in ran] == [[work[:3] for work in works] for works in table.orders]
    # The states did travel through every stage: the loss is that of each micro-batch.
    assert ran[-1][1] == [2.0 ** (pp * vpp) * ROWS * WIDTH * (1 + index) for index in range(micro_batches)]


@pytest.mark.parametrize(("pp", "vpp", "micro_batches"), [(2, 1, 5), (2, 2, 5), (4, 1, 2)])
def test_the_engine_evaluates_in_the_order_of_its_table(pp: int, vpp: int, micro_batches: int, pool: Pool) -> None:
    plan = layout(pp, vpp, micro_batches)
    ran = pool.run(pp, record, plan.to_dict(), True)
    table = forward_only(pp, micro_batches, vpp, plan.microbatch_group_size())
    assert [order for order, _ in ran] == [[work[:3] for work in works] for works in table.orders]
