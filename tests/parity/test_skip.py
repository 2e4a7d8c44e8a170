"""A step with a NaN anywhere changes nothing, and every rank says so; one more than ``skip_limit`` of them stops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch

from parallel.planning.plan import ParallelPlan
from pretrain.model.norm import RMSNorm
from pretrain.trainer import Trainer
from tests.parity import jobs
from tests.parity.pool import Pool
from tests.parity.specs import HYBRID, plan

SKIP_LIMIT = 2
Where = Literal["activation", "gradient", "loss"]


@contextmanager
def poisoned(trainer: Trainer, where: Where, rank: int) -> Iterator[None]:
    """A layer's activations, one element of one gradient, or the loss of every micro-batch: NaN on one rank only."""
    reduce, run = trainer.replicas.reduce_gradients, trainer.pipeline.run
    norm = next(module for module in trainer.chunks[0].modules() if isinstance(module, RMSNorm))
    normed = norm.forward

    def reduce_gradients() -> None:
        trainer.replicas.chunks[0].buffers[0].grad_data[3] = torch.nan
        reduce()

    def losses(*batches: Any, **options: Any) -> list[torch.Tensor]:
        return [loss * torch.nan for loss in run(*batches, **options)]

    if trainer.groups.rank != rank:
        yield
    elif where == "activation":
        with patch.object(norm, "forward", lambda x: normed(x) * torch.nan):
            yield
    elif where == "gradient":
        with patch.object(trainer.replicas, "reduce_gradients", reduce_gradients):
            yield
    else:
        with patch.object(trainer.pipeline, "run", losses):
            yield


def skipped(layout: dict[str, Any], where: Where, rank: int) -> tuple[list[str], list[str], bool]:
    """Verdicts on this rank of one good step and ``SKIP_LIMIT + 1`` poisoned ones; the state's hash after each; whether
    the routers had moved in the good step."""
    trainer = jobs.make_trainer(HYBRID, layout, "float32", skip_limit=SKIP_LIMIT)
    verdicts, hashes = [jobs.step(trainer, 0)[1]], [trainer.state_hash()]
    routers = trainer.routers.values()
    moved = all(bool(router.load.any()) and bool(router.bias.any()) for router in routers if router.bias is not None)
    with poisoned(trainer, where, rank):
        for index in range(1, SKIP_LIMIT + 2):
            verdicts.append(jobs.step(trainer, index)[1])
            hashes.append(trainer.state_hash())
    return verdicts, hashes, moved


LAYOUTS: dict[str, ParallelPlan] = {
    "dp2.zero1": plan(2, zero=1),
    "tp2.sp": plan(2, tp=2, sequence_parallel=True),
    "ep2": plan(2, ep=2),
    "pp2": plan(2, pp=2),
}


@pytest.mark.parametrize(("where", "rank"), [("activation", 1), ("gradient", 0), ("gradient", 1), ("loss", 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(
    layout: str, where: Where, rank: int, pool: Pool
) -> None:
    if (layout, where) == ("tp2.sp", "loss"):
        rank = 0  # the loss is equal on tensor ranks, and the first one's is counted
    for verdicts, hashes, moved in pool.run(2, skipped, LAYOUTS[layout].to_dict(), where, rank):
        assert verdicts == ["apply", *["skip"] * SKIP_LIMIT, "stop"]
        assert len(set(hashes)) == 1
        assert moved


def goes_on(layout: dict[str, Any]) -> str:
    """The state after a good step, a poisoned one, and a good one again."""
    trainer = jobs.make_trainer(HYBRID, layout, "float32")
    jobs.step(trainer, 0)
    with poisoned(trainer, "gradient", 0):
        assert jobs.step(trainer, 1)[1] == "skip"
    assert jobs.step(trainer, 2)[1] == "apply"
    return trainer.state_hash()


def without(layout: dict[str, Any]) -> str:
    trainer = jobs.make_trainer(HYBRID, layout, "float32")
    assert [jobs.step(trainer, index)[1] for index in (0, 2)] == ["apply", "apply"]
    return trainer.state_hash()


def test_after_a_skipped_step_the_run_goes_on_as_if_its_batch_had_never_been(pool: Pool) -> None:
    layout = plan(2, ep=2, zero=1).to_dict()
    assert pool.run(2, goes_on, layout) == pool.run(2, without, layout)
