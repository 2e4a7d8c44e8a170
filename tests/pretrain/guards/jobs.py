"""A run as a job of the gloo pool, with a batch that does harm in it, and a kill at a chosen moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch.distributed as dist

from dataio.types import Batch, BatchPlan, Part
from pretrain import determinism
from pretrain.config import load
from pretrain.feed import Feed
from pretrain.loop import train
from pretrain.run import World, validate
from pretrain.rundir import begin
from pretrain.session import Session

#: ``sample_id`` of the first window of the batch that does harm: step 13 reads it, of twelve windows a step.
POISON_STEP, WINDOWS = 13, 12


class Killed(Exception):
    """What stands for ``kill -9``: nothing is written after it."""


@contextmanager
def poisoned(*batches: int) -> Iterator[None]:
    """These batches, counted as the data order has them, have one target on each data rank, which the whole gradient
    follows: its norm is that of a token, and not of the mean of hundreds."""
    read = Feed.read

    def of_poison(self: Feed, step: int, part: Part, *planned: Any) -> tuple[BatchPlan, Batch]:
        plan, batch = read(self, step, part, *planned)
        if int(plan.sample_id[0]) // WINDOWS in batches:
            mask = np.zeros_like(batch.loss_mask)
            mask.flat[int(np.flatnonzero(batch.loss_mask.ravel())[0])] = True
            batch = replace(batch, loss_mask=mask)
        return plan, batch

    with patch.object(Feed, "read", of_poison):
        yield


def _after(owner: Any, name: str, condition: Callable[..., bool] = lambda *_: True) -> Any:
    real = getattr(owner, name)

    def act(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        if condition(*arguments):
            raise Killed
        return result

    return patch.object(owner, name, act)


def _before(owner: Any, name: str, condition: Callable[..., bool] = lambda *_: True) -> Any:
    real = getattr(owner, name)

    def act(*arguments: Any, **options: Any) -> Any:
        if condition(*arguments):
            raise Killed
        return real(*arguments, **options)

    return patch.object(owner, name, act)


def _second_time_at(step: int) -> Callable[..., bool]:
    """Of ``Session.record``: the step is recorded once more."""
    seen: list[int] = []

    def again(session: Session, plan: Any, report: Any, *rest: Any) -> bool:
        seen.append(report.step)
        return report.step == step and seen.count(step) == 2

    return again


#: Moments of a rewind at which a run is killed.
KILLS: dict[str, Callable[[], Any]] = {
    "before its event is written": lambda: _before(
        Session, "record", lambda session, plan, report, verdict, *_: verdict == "rewind"
    ),
    "before the data log is written": lambda: _before(Feed, "pass_over"),
    "after the data log is written": lambda: _after(Feed, "pass_over"),
    "before the checkpoint is loaded": lambda: _before(
        Session, "_load", lambda session, step: hasattr(session, "feed")
    ),
    "after the checkpoint is loaded": lambda: _after(Session, "_load", lambda session, step: hasattr(session, "feed")),
    "on the way back to the step": lambda: _after(Session, "record", _second_time_at(POISON_STEP - 2)),
    "at the step itself, in its second time": lambda: _after(Session, "record", _second_time_at(POISON_STEP)),
}


def run(source: str, overrides: list[str], poison: tuple[int, ...] = (), kill: str | None = None) -> tuple[str, str]:
    """Train to the end, or to the kill: how the attempt ended (its cause too), and the hash of this rank's state."""
    config = load(source, [*overrides, "log.quiet=true"])
    determinism.enter()
    rank, size = dist.get_rank(), dist.get_world_size()
    start = validate(config, World(rank, size, rank))
    attempt = begin(start, config, config.plan(size)) if start else None
    told = [(start.attempt, start.resume_step) if start else None]
    dist.broadcast_object_list(told, src=0)
    assert told[0] is not None
    try:
        with ExitStack() as stack:
            stack.enter_context(poisoned(*poison))
            if kill is not None:
                stack.enter_context(KILLS[kill]())
            session = Session(config, rank, *told[0])
            ended = train(session)
            return f"{ended.exit_class.value} {ended.kind}: {ended.cause}", session.trainer.state_hash()
    except Killed:
        return "killed", ""
    finally:
        if attempt is not None:
            attempt.close()
