"""A run as a job of the gloo pool: what ``python -m pretrain`` does, without a process start for each rank."""

from __future__ import annotations

import torch.distributed as dist

from launch.cli import main
from pretrain import determinism
from pretrain.config import load
from pretrain.loop import train
from pretrain.run import World, validate
from pretrain.rundir import begin
from pretrain.session import Session


def run(source: str, overrides: list[str]) -> str:
    """Train under the pool's process group to the end of the run; how the attempt ended."""
    config = load(source, [*overrides, "log.quiet=true"])
    if config.run.deterministic:
        determinism.enter()
    rank, size = dist.get_rank(), dist.get_world_size()
    start = validate(config, World(rank, size, rank))
    attempt = begin(start, config, config.plan(size)) if start else None
    told = [(start.attempt, start.resume_step) if start else None]
    dist.broadcast_object_list(told, src=0)
    assert told[0] is not None
    number, resume_step = told[0]
    try:
        return train(Session(config, rank, number, resume_step)).exit_class.value
    finally:
        if attempt is not None:
            attempt.close()


def stoker(*arguments: str) -> int:
    """A command of ``stoker`` in the pool's world of one; its exit code."""
    try:
        main(arguments)
    except SystemExit as ended:
        return int(str(ended.code))
    raise AssertionError("main() always exits")
